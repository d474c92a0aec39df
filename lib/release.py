"""The weights that the authors released: `--init_from=uae:DIR` reads their layout.

    DIR/llm        Qwen2.5-VL, with the projector in its shards
    DIR/llm_lora   optional: the weights of stage 2, whole ones or LoRA pairs, which win over llm's
    DIR/dit        the transformer
    DIR/dit_lora   optional: its adapter in peft's layout, added in
    DIR/llm_processor   optional: tokenizer, chat template and image processor
"""
import glob
import json
import os
import re

import torch
from safetensors import SafetensorError, safe_open

from lib.files import load

DEFAULT_SCALE = 2.0     # alpha / rank of adapters without a configuration: the release's 64 / 32


def released_key(key):
    """A tensor's name in the release -> (name in our modules, 'A' or 'B' for a LoRA factor, or '').

    Whoever wrapped the model (peft, DistributedDataParallel) and whichever transformers named its
    parts: Qwen's become model.language_model.*, model.visual.* and lm_head.*, and Sequential's
    projector.0 and projector.2 become projector.up and projector.down.
    """
    key = re.sub(r'^(module\.|transformer\.)+|base_model\.(model\.)?|\.base_layer(?=\.)', '', key)
    factor = ''
    pair = re.fullmatch(r'(.+)\.lora_([AB])(\.default)?\.weight', key)
    if pair:
        key = f'{pair[1]}.weight'
        factor = pair[2]
    key = re.sub(r'^(model\.)?projector\.0\.', 'projector.up.', key)
    key = re.sub(r'^(model\.)?projector\.2\.', 'projector.down.', key)
    key = re.sub(r'^(model\.)?visual\.', 'model.visual.', key)
    text = r'^(model\.)?(language_model\.)?(model\.)?(layers|embed_tokens|norm)\.'
    key = re.sub(text, r'model.language_model.\4.', key)
    return key, factor


def shards(folder):
    """Yields (place, key, read) of every tensor in a folder's safetensors.

    Where the folder has an index, these are the files of the index. read() -> the tensor.
    """
    paths = sorted(glob.glob(f'{folder}/*.safetensors'))
    for index in glob.glob(f'{folder}/*.safetensors.index.json'):
        with open(index) as f:
            names = set(json.load(f)['weight_map'].values())
        paths = sorted(os.path.join(folder, name) for name in names)
    if not paths:
        raise SystemExit(f'{folder}: no safetensors here')
    for path in paths:
        try:
            with safe_open(path, 'pt') as f:
                for key in f.keys():
                    yield f'{path}: {key}', key, lambda: f.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise SystemExit(f'{path} is missing or damaged: {error}')


def lora_scale(folder):
    """alpha / rank of the adapters in a folder; refuses what is not plain LoRA."""
    path = f'{folder}/adapter_config.json'
    if not os.path.exists(path):
        return DEFAULT_SCALE
    with open(path) as f:
        config = json.load(f)
    unknown = ('use_dora', 'use_rslora', 'rank_pattern', 'alpha_pattern', 'fan_in_fan_out',
               'modules_to_save')
    odd = [key for key in unknown if config.get(key)]
    if config.get('bias', 'none') != 'none':
        odd.append('bias')
    if odd:
        raise SystemExit(f'{path}: only plain LoRA can be read, this has {" ".join(odd)}')
    return config['lora_alpha'] / config['r']


@torch.no_grad()
def overlay(state, folder):
    """Writes a folder's tensors over `state`, {our name: tensor}, in place.

    Whole weights replace, LoRA pairs are added as alpha / rank B A. No tensor has to be there, but
    what is there has to fit: else SystemExit in one line.
    """
    pairs = {}
    for place, key, read in shards(folder):
        name, factor = released_key(key)
        if name not in state:
            raise SystemExit(f'{place}: unknown key, the model has no {name!r}')
        tensor = read()
        if factor:
            pairs.setdefault(name, {})[factor] = tensor
        elif tensor.shape != state[name].shape:
            raise SystemExit(f'{place}: shape {tuple(tensor.shape)}, the model has '
                             f'{tuple(state[name].shape)}')
        else:
            state[name].copy_(tensor)
    scale = lora_scale(folder)
    for name, pair in pairs.items():
        if len(pair) < 2:
            raise SystemExit(f'{folder}: half a LoRA pair at {name!r}')
        rows, columns = pair['B'].shape[0], pair['A'].shape[1]
        if (rows, columns) != tuple(state[name].shape):
            raise SystemExit(f'{folder}: the LoRA pair at {name!r} is for {rows}x{columns}, the '
                             f'model has {tuple(state[name].shape)}')
        update = scale * pair['B'].float() @ pair['A'].float()
        state[name].add_(update.to(state[name].device))


def load_release(folder, dtype):
    """Reads the release -> encoder, decoder, {name: tensor} of the projector."""
    from diffusers import SD3Transformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration
    for part in ('llm', 'dit'):
        if not os.path.isdir(f'{folder}/{part}'):
            raise SystemExit(f'--init_from=uae:{folder}: no folder {part} in it (llm, dit and, if '
                             'there, llm_lora, dit_lora, llm_processor are read)')
    encoder, llm = load(Qwen2_5_VLForConditionalGeneration, f'{folder}/llm', dtype=dtype,
                               output_loading_info=True)
    decoder, dit = load(SD3Transformer2DModel, f'{folder}/dit', torch_dtype=dtype,
                               output_loading_info=True)
    extra = [k for k in llm['unexpected_keys']
             if not released_key(k)[0].startswith('projector.')]
    refuse_keys(f'{folder}/llm', 'missing', llm['missing_keys'])
    refuse_keys(f'{folder}/llm', 'unknown', extra)
    refuse_keys(f'{folder}/dit', 'missing', dit['missing_keys'])
    refuse_keys(f'{folder}/dit', 'unknown', dit['unexpected_keys'])
    projector = read_projector(f'{folder}/llm', encoder.config.text_config.hidden_size,
                               decoder.config.joint_attention_dim)
    if os.path.isdir(f'{folder}/llm_lora'):
        state = dict(encoder.state_dict())
        for name, tensor in projector.items():
            state[f'projector.{name}'] = tensor
        overlay(state, f'{folder}/llm_lora')
    if os.path.isdir(f'{folder}/dit_lora'):
        overlay(decoder.state_dict(), f'{folder}/dit_lora')
    return encoder, decoder, projector


def refuse_keys(folder, kind, keys):
    if keys:
        raise SystemExit(f'{folder}: {len(keys)} {kind} keys, first {min(keys)!r}')


def read_projector(folder, d, D):
    """The projector's float32 tensors in the shards of llm, for widths d -> 2 D -> D."""
    projector = {}
    for _, key, read in shards(folder):
        name = released_key(key)[0]
        if name.startswith('projector.'):
            projector[name.removeprefix('projector.')] = read().float()
    need = {'up.weight': (2 * D, d), 'up.bias': (2 * D,),
            'down.weight': (D, 2 * D), 'down.bias': (D,)}
    shapes = {name: tuple(tensor.shape) for name, tensor in projector.items()}
    if shapes != need:
        found = ', '.join(f'{name} {shape}' for name, shape in sorted(shapes.items()))
        raise SystemExit(f'{folder}: expected projector.0 and projector.2 that take {d} to '
                         f'{2 * D} to {D} dimensions, found {found or "none"}')
    return projector
