"""LoRA through peft: adapters on a model, in the files that other tools read.

The encoder's lie in peft's layout, the decoder's as diffusers' pipeline writes them.
"""
import os

import diffusers
from peft import (LoraConfig, get_peft_model_state_dict, inject_adapter_in_model,
                  set_peft_model_state_dict)
from safetensors.torch import load_file, save_file

FILES = dict(encoder='encoder/adapter_model.safetensors',
             decoder='decoder/pytorch_lora_weights.safetensors')


def add(model, rank, targets):
    """Puts fresh adapters (alpha = 2 rank, gaussian) on the linear layers that match `targets`.

    They are float32 from the start, so that nothing that is loaded into them is rounded.
    """
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights='gaussian',
                      target_modules=targets)
    inject_adapter_in_model(lora, model)
    for key, p in model.named_parameters():
        if 'lora_' in key:
            p.data = p.data.float()


def read(model, path):
    """Loads the adapters saved at `path` into those of a model; where none are, fresh ones."""
    if not os.path.exists(path):
        for key, p in model.named_parameters():
            if 'lora_B' in key:
                p.data.zero_()
        return
    saved = {}
    for key, tensor in load_file(path).items():
        saved[key.removeprefix('base_model.model.').removeprefix('transformer.')] = tensor
    unknown = set_peft_model_state_dict(model, saved).unexpected_keys
    if unknown:
        raise SystemExit(f'{path}: not an adapter of this model; first unknown key {unknown[0]}')


def save(encoder, decoder, folder):
    """Writes the adapters of both, each with its alpha."""
    adapter = {}
    for key, tensor in get_peft_model_state_dict(encoder.vlm).items():
        adapter[f'base_model.model.{key}'] = tensor
    os.makedirs(f'{folder}/encoder', exist_ok=True)
    save_file(adapter, f'{folder}/{FILES["encoder"]}')
    encoder.vlm.peft_config['default'].save_pretrained(f'{folder}/encoder')
    transformer = decoder.transformer
    getattr(diffusers, decoder.pipeline_class).save_lora_weights(
        f'{folder}/decoder', get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config['default'].to_dict())
