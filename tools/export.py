"""`sample.py --export=DIR`: a checkpoint as folders that other tools load.

DIR is a plain Qwen2.5-VL folder, adapters merged, that lmms-eval and VLMEvalKit take as their model
path: our weights under the names that the hub uses, every other file the base model's own, since
transformers 5 would write a configuration that older libraries misread. DIR/decoder holds
transformer/ (diffusers, merged) and projector.safetensors, and with --text_encoder=start
text_encoder/, the language model that re-encodes captions.
"""
import copy
import glob
import json
import os
import shutil

import torch
from safetensors.torch import save_file

# the name of a parameter as transformers 5 has it -> as the hub has it
HUB_NAMES = {'model.language_model.': 'model.', 'model.visual.': 'visual.'}
PLAIN = ('json', 'txt', 'jinja')


def merge_lora(tower):
    """Adds LoRA adapters into the layers they sit on and takes them out: the plain module again."""
    for name, layer in list(tower.named_modules()):
        if hasattr(layer, 'get_base_layer'):
            layer.merge(safe_merge=True)
            tower.set_submodule(name, layer.get_base_layer())


def plain_files(source):
    """{name: path} of the configuration, processor and tokenizer of a local folder or hub id."""
    if not os.path.isdir(source):
        from huggingface_hub import snapshot_download
        wanted = [f'*.{suffix}' for suffix in PLAIN]
        source = snapshot_download(source, allow_patterns=wanted, ignore_patterns=['*.index.json'])
    files = {}
    for suffix in PLAIN:
        for path in glob.glob(f'{source}/*.{suffix}'):
            if not path.endswith('.index.json'):
                files[os.path.basename(path)] = path
    return files


def hub_weights(uae):
    """The encoder's tensors under the hub's names, tied ones once.

    A loaded model's save_pretrained repeats the names of the file that it came from.
    """
    weights = {}
    for key, tensor in uae.encoder.vlm.state_dict().items():
        for ours, theirs in HUB_NAMES.items():
            key = key.replace(ours, theirs)
        weights[key] = tensor
    if uae.encoder.head.weight is uae.encoder.embed.weight:
        del weights['lm_head.weight']
    return weights


def write_config(path, dtype):
    """Changes in the base model's config.json what is no longer true."""
    with open(path) as f:
        base = json.load(f)
    for key in ('dtype', 'torch_dtype'):
        if key in base:
            base[key] = dtype
    base['architectures'] = ['Qwen2_5_VLForConditionalGeneration']
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
    from huggingface_hub import save_torch_state_dict
    folder = config.export.rstrip('/')
    tmp = f'{folder}.tmp'
    shutil.rmtree(tmp, ignore_errors=True)
    os.makedirs(f'{tmp}/decoder')
    if uae.encoder.text_encoder:
        export_text_encoder(uae, f'{tmp}/decoder/text_encoder', config)
    for tower in (uae.encoder.vlm, uae.decoder.transformer):
        merge_lora(tower)
        tower.to(getattr(torch, config.dtype))
    save_torch_state_dict(hub_weights(uae), tmp, max_shard_size='4GB')

    files = plain_files(config.encoder)
    for name, path in plain_files(uae.source).items():       # the processor may be a release's own
        if name not in ('config.json', 'generation_config.json'):
            files[name] = path
    for name, path in files.items():
        shutil.copyfile(path, f'{tmp}/{name}')
    write_config(f'{tmp}/config.json', config.dtype)

    uae.decoder.transformer.save_pretrained(f'{tmp}/decoder/transformer', max_shard_size='4GB')
    # in the folder above, vLLM would take it for Qwen's
    save_file(uae.projector.state_dict(), f'{tmp}/decoder/projector.safetensors')
    os.replace(tmp, folder)
    print(config.export)
