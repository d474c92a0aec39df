"""A script without its models: published architectures with random weights, or with none.

Nothing is downloaded. tools/plan.py and bench/speed.py run a stage's own main on them.
"""
import contextlib
import json
import os
from unittest.mock import patch

import torch

import reward
from config import shared
from lib import checkpoint
from lib.files import load
from lib.towers import clip_preprocessing
from model import Projector, UAE

# --- the models that the presets name: what differs from the libraries' defaults -----------------
SD3_VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
               down_block_types=('DownEncoderBlock2D',) * 4,
               up_block_types=('UpDecoderBlock2D',) * 4, scaling_factor=1.5305,
               shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
ARCHITECTURES = {
    'Qwen/Qwen2.5-VL-3B-Instruct': dict(
        model_type='qwen2_5_vl', tie_word_embeddings=True,
        text_config=dict(
            vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
            num_attention_heads=16, num_key_value_heads=2, rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type='default', rope_theta=1e6,
                                 mrope_section=[16, 24, 24])),
        # depth as is the default: `shortened` looks for it
        vision_config=dict(depth=32, hidden_size=1280, out_hidden_size=2048,
                           tokens_per_second=2)),
    'stabilityai/stable-diffusion-3.5-medium': dict(
        transformer=dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536,
                         pos_embed_max_size=384, dual_attention_layers=tuple(range(13)),
                         qk_norm='rms_norm'),
        vae=SD3_VAE),
    'stabilityai/stable-diffusion-3.5-large': dict(
        transformer=dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432,
                         pos_embed_max_size=192, qk_norm='rms_norm'),
        vae=SD3_VAE),
    'facebook/dinov2-large': dict(model_type='dinov2', hidden_size=1024, num_hidden_layers=24,
                                  num_attention_heads=16, image_size=518),
}


def architecture(name, part='', file='config.json', known=ARCHITECTURES):
    """A model's configuration: of a local folder, or of `known`."""
    if name in known:
        return known[name][part] if part else known[name]
    try:
        with open(os.path.join(name, part, file)) as f:
            return json.load(f)
    except (OSError, ValueError) as error:
        raise SystemExit(f'--plan knows {", ".join(known)} and local folders, not {name!r}: '
                         f'{error}')


def shortened(known, layers):
    """Configurations with at most that many layers in each network; widths stay."""
    found = {}
    for key, value in known.items():
        if isinstance(value, dict):
            value = shortened(value, layers)
        elif key in ('depth', 'num_layers', 'num_hidden_layers'):
            value = min(value, layers)
        elif key == 'dual_attention_layers':
            value = tuple(layer for layer in value if layer < layers)
        found[key] = value
    return found


# --- models --------------------------------------------------------------------------------------
def skeleton(config, device='cpu', known=ARCHITECTURES):
    """A UAE with random weights in the published sizes; on the device 'meta' without weights.

    known: {hub id: configuration}. Where the encoder is not a local folder, the tiny tokenizer
    stands for its own.
    """
    import diffusers
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    dtype = getattr(torch, config.dtype)
    local = os.path.isdir(config.encoder)
    processor = load(AutoProcessor, config.encoder if local else shared['encoder'])
    of_transformer = architecture(config.decoder, 'transformer', known=known)
    of_vae = architecture(config.decoder, 'vae', known=known)
    name = of_transformer.get('_class_name', 'SD3Transformer2DModel')
    kind = checkpoint.DECODERS[name]
    with torch.device(device):
        about = AutoConfig.for_model(**architecture(config.encoder, known=known))
        vlm = AutoModelForImageTextToText.from_config(about).to(dtype)
        transformer = getattr(diffusers, name).from_config(of_transformer).to(dtype)
        vae = getattr(diffusers, kind.vae_class).from_config(of_vae).to(dtype)
    if not local:
        pixels = processor.image_processor
        pixels.patch_size = about.vision_config.patch_size
        pixels.size = dict(shortest_edge=1, longest_edge=2 ** 30)
    encoder = checkpoint.ENCODERS[about.model_type](config, vlm, processor)
    if not local:           # about as many tokens as its own tokenizer and template make of it
        count = len(config.caption_prompt.split()) * 4 // 3 + 21
        missing = count - len(encoder.before_image) - len(encoder.after_image)
        encoder.before_image = [encoder.end] * missing + encoder.before_image
    scheduler = getattr(diffusers, kind.scheduler_class)(shift=3.0)
    decoder = kind(config, transformer, vae, scheduler)
    decoder.pooled.fill_(float(config.decoder in known))    # the tiny one's is zero
    with torch.device(device):
        projector = Projector(encoder.width, decoder.width)
        if config.lora_rank:
            from lib import lora
            lora.add(vlm, config.lora_rank, encoder.lora_targets)
            lora.add(transformer, config.lora_rank, decoder.lora_targets)
    uae = UAE(config, encoder, projector, decoder)
    if device == 'meta':
        return uae
    return uae.to(device)


def random_reward(config, device='cpu', known=ARCHITECTURES):
    """The `Reward` of the key `reward`, its towers with random weights."""
    def open_one(name, config, device):
        return random_tower(name, config, device, known)

    return reward.reward_tower(config, device, open_one)


def random_tower(name, config, device='cpu', known=ARCHITECTURES):
    """One backbone with random weights, in its published size."""
    library, source, preprocessing = reward.describe(name, config)
    with torch.device(device):
        if library == 'open_clip':
            import open_clip
            folder = source.removeprefix('local-dir:')
            if folder != source:
                about = architecture(folder, '', 'open_clip_config.json', known)['model_cfg']
            else:
                about = open_clip.get_model_config(source.split(':')[0])
            tower = open_clip.CLIP(**about).visual
            preprocessing = clip_preprocessing(tower)
        else:
            from transformers import AutoConfig, AutoModel
            about = AutoConfig.for_model(**architecture(source, known=known))
            tower = AutoModel.from_config(about).float()
    pre = preprocessing or reward.BACKBONES['dinov2'][2]
    return reward.Backbone(library, tower, pre, config.micro_batch)


# --- a script's own main on them -----------------------------------------------------------------
class RandomImages:
    """Stands for data.images.ImageSet: noise as images, and captions that say nothing."""

    skipped = ()

    def __init__(self, config):
        self.resolution = config.resolution

    def draw(self, count):
        return torch.rand(count, 3, self.resolution, self.resolution) * 2 - 1

    def batch(self, seed, step, count, rank=0, world=1):
        P = count // world
        return dict(x=self.draw(P), index=torch.arange(P), captions=[''] * P)


@contextlib.contextmanager
def replaced(script, **others):
    """Context in which these names, where a script or lib.checkpoint has them, are others."""
    with contextlib.ExitStack() as stack:
        for name, other in others.items():
            for place in (script, checkpoint):
                if hasattr(place, name):
                    stack.enter_context(patch.object(place, name, other))
        yield


def stand_ins(config):
    """For `replaced`: noise as images, and no checkpoint is read or written."""
    images = RandomImages(config)
    held_out = dict(x=images.draw(config.eval_images), skipped=0, scenes=None,
                    names=[''] * config.eval_images)
    return dict(
        open_data=lambda *args: (images, held_out),
        open_captioned=lambda *args: (images, 0, held_out),
        keep_captioned=lambda *args: 0,
        open_out_dir=lambda *args: 0,
        restore=lambda *args: {},
        maybe_save=lambda *args, **kwargs: None,
    )
