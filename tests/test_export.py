"""What other tools read: the decoder's LoRA in a plain SD3 pipeline, the encoder's in peft, exported folders in plain library
classes; and what others wrote: the authors' released layout. Outputs agree to 1e-5 with the model in memory."""
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import common
import config
from conftest import ROOT, perturb
from model import UAE
from running import refusal, script, tiny

BASE = f'{ROOT}/data/shapes/base'


def load(*words):
    """A UAE as a script with these words on its command line would have it."""
    common.quiet()
    return UAE(config.parse({}, {}, list(words), 'x.py'))


def shake(uae, what='', scale=0.05):
    """Noise on every weight of encoder, decoder and projector whose name contains `what`, so that none is trivial."""
    for tower in (uae.encoder, uae.decoder, uae.projector):
        for i, (name, p) in enumerate(tower.named_parameters()):
            if what in name:
                with torch.no_grad():
                    p.add_(scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return uae


def velocity(decoder, uae):
    """One forward pass of an SD3 transformer on fixed inputs."""
    g = torch.Generator().manual_seed(3)
    z, c = torch.randn(2, *uae.latent_shape(), generator=g), torch.randn(2, 5, decoder.config.joint_attention_dim, generator=g)
    with torch.no_grad():
        return decoder(hidden_states=z, timestep=torch.tensor([300.0, 900.0]), encoder_hidden_states=c,
                       pooled_projections=uae.pooled.expand(2, -1), return_dict=False)[0]


def logits(encoder, processor, x):
    """Logits of an image and a question, the inputs made by the processor as an evaluation harness makes them."""
    messages = [dict(role='user', content=[dict(type='image'), dict(type='text', text='describe the image')])]
    text = processor.apply_chat_template([messages[0]], tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[((x + 1) * 127.5).round().byte()], return_tensors='pt')
    with torch.no_grad():
        return encoder(**inputs).logits


def close(a, b, tol=1e-5):
    assert a.shape == b.shape and (a - b).abs().max() < tol, (a - b).abs().max()


# --- the adapters of a checkpoint ------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def adapters(tmp_path_factory):
    """A run's checkpoint with LoRA of rank 4, its adapters then shaken and saved again: (folder, the model in memory)."""
    out = tmp_path_factory.mktemp('lora') / 'run'
    tiny('grpo_decoder', out, '--lora_rank=4', steps=1)
    uae = shake(load('--lora_rank=4', f'--init_from={out}'), 'lora_')
    uae.save(f'{out}/step_000001')
    return str(out), uae


def test_decoder_lora_in_a_plain_pipeline(adapters):
    """Its alpha of twice the rank travels in the file's metadata: without it the pipeline would halve the adapter."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    out, uae = adapters
    parts = dict(transformer=SD3Transformer2DModel, vae=AutoencoderKL, scheduler=FlowMatchEulerDiscreteScheduler)
    parts = {name: cls.from_pretrained(f'{BASE}/decoder', subfolder=name) for name, cls in parts.items()}
    none = dict.fromkeys(('text_encoder', 'tokenizer', 'text_encoder_2', 'tokenizer_2', 'text_encoder_3', 'tokenizer_3'))
    pipe = StableDiffusion3Pipeline(**parts, **none)
    pipe.transformer.float()
    before = velocity(pipe.transformer, uae)
    pipe.load_lora_weights(f'{out}/step_000001/decoder')
    close(velocity(pipe.transformer, uae), velocity(uae.decoder, uae))
    assert (before - velocity(uae.decoder, uae)).abs().max() > 0.05, 'the adapter does something'
    pipe.fuse_lora()
    close(velocity(pipe.transformer, uae), velocity(uae.decoder, uae))


def test_encoder_lora_in_plain_peft(adapters, x):
    from peft import PeftModel
    from transformers import Qwen2_5_VLForConditionalGeneration
    out, uae = adapters
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(f'{BASE}/encoder', dtype=torch.float32)
    before = logits(plain, uae.processor, x[0])
    model = PeftModel.from_pretrained(plain, f'{out}/step_000001/encoder')
    close(logits(model, uae.processor, x[0]), logits(uae.encoder, uae.processor, x[0]))
    assert (before - logits(uae.encoder, uae.processor, x[0])).abs().max() > 0.05
