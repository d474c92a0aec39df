"""`sample.py --export=DIR`: a checkpoint as folders that other tools load.

DIR is a plain folder of the encoder, adapters merged, that lmms-eval and VLMEvalKit take as their
model path: our weights under the names that the hub uses, every other file the base model's own,
since transformers 5 would write a configuration that older libraries misread. DIR/decoder holds
transformer/ (diffusers, merged) and projector.safetensors, and where the captions are re-encoded by
a language model that stands still, text_encoder/.
"""
import copy
import json
import os
import shutil

import torch
from safetensors.torch import save_file

from lib.files import writing

PLAIN = ('.json', '.txt', '.jinja')       # configuration, processor and tokenizer


def merge_lora(tower):
    """Adds LoRA adapters into the layers they sit on and takes them out: the plain module again."""
    for name, layer in list(tower.named_modules()):
        if hasattr(layer, 'get_base_layer'):
            layer.merge(safe_merge=True)
            tower.set_submodule(name, layer.get_base_layer())


def plain_files(source):
    """{name: path} of the PLAIN files of a local folder or hub id, without those of the weights."""
    if not os.path.isdir(source):
        from huggingface_hub import snapshot_download
        wanted = [f'*{suffix}' for suffix in PLAIN]
        source = snapshot_download(source, allow_patterns=wanted, ignore_patterns=['*.index.json'])
    names = [name for name in os.listdir(source) if name.endswith(PLAIN)]
    return {name: f'{source}/{name}' for name in names if not name.endswith('.index.json')}


def hub_weights(encoder):
    """Its tensors under the hub's names, tied ones once.

    A loaded model's save_pretrained repeats the names of the file that it came from.
    """
    weights = {}
    for key, tensor in encoder.vlm.state_dict().items():
        for ours, theirs in encoder.hub_names.items():
            key = key.replace(ours, theirs)
        weights[key] = tensor
    if encoder.head.weight is encoder.embed.weight:
        del weights['lm_head.weight']
    return weights


def write_config(path, architecture, dtype):
    """Changes in the base model's config.json what is no longer true."""
    with open(path) as f:
        base = json.load(f)
    for key in ('dtype', 'torch_dtype'):
        if key in base:
            base[key] = dtype
    base['architectures'] = [architecture]
    with open(path, 'w') as f:
        json.dump(base, f, indent=2)


def export_text_encoder(uae, folder, config):
    """Writes the language model that re-encodes captions, where it is not the captioner itself.

    A copy, made before anything is merged: with LoRA the two share the weights below the adapters.
    """
    from huggingface_hub import save_torch_state_dict
    text_encoder = copy.deepcopy(uae.encoder.text_encoder)
    merge_lora(text_encoder)
    text_encoder.to(getattr(torch, config.dtype))
    os.makedirs(folder)
    save_torch_state_dict(text_encoder.state_dict(), folder, max_shard_size='4GB')


def export(uae, config):
    """Writes config.export, see above; beside it and renamed, so a kill leaves no half of it."""
    folder = config.export.rstrip('/')
    half = f'{folder}.tmp'
    shutil.rmtree(half, ignore_errors=True)
    with writing(folder):
        write_all(uae, config, half)
        os.replace(half, folder)
    print(config.export)


def write_all(uae, config, folder):
    """Writes every file of an export into a new folder."""
    from huggingface_hub import save_torch_state_dict
    os.makedirs(f'{folder}/decoder')
    if uae.encoder.text_encoder:
        export_text_encoder(uae, f'{folder}/decoder/text_encoder', config)
    for model in (uae.encoder.vlm, uae.decoder.transformer):
        merge_lora(model)
        model.to(getattr(torch, config.dtype))
    save_torch_state_dict(hub_weights(uae.encoder), folder, max_shard_size='4GB')

    files = plain_files(config.encoder)
    for name, path in plain_files(uae.source).items():       # the processor may be a release's own
        if name not in ('config.json', 'generation_config.json'):
            files[name] = path
    for name, path in files.items():
        shutil.copyfile(path, f'{folder}/{name}')
    write_config(f'{folder}/config.json', type(uae.encoder.vlm).__name__, config.dtype)

    uae.decoder.transformer.save_pretrained(f'{folder}/decoder/transformer', max_shard_size='4GB')
    # in the folder above, vLLM would take it for the encoder's
    save_file(uae.projector.state_dict(), f'{folder}/decoder/projector.safetensors')
