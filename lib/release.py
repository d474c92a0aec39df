"""The weights that the authors released: `--init_from=uae:DIR` reads their layout.

    DIR/llm        Qwen2.5-VL, with the projector in its shards
    DIR/llm_lora   optional: the weights of stage 2, whole ones or LoRA pairs, which win over llm's
    DIR/dit        the transformer
    DIR/dit_lora   optional: its adapter in peft's layout, added in
    DIR/llm_processor   optional: tokenizer, chat template and image processor
"""
import json
import os
import re

import torch
from safetensors import SafetensorError, safe_open

from lib.files import load_known

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


def tensors_of(folder):
    """Yields (place, key, read) of every tensor in a folder's safetensors.

    Where the folder has an index, these are the files of the index. read() -> the tensor.
    """
    names = os.listdir(folder)
    files = {name for name in names if name.endswith('.safetensors')}
    for name in names:
        if name.endswith('.safetensors.index.json'):
            with open(f'{folder}/{name}') as f:
                files = set(json.load(f)['weight_map'].values())
    if not files:
        raise SystemExit(f'{folder}: no safetensors here')
    for path in (os.path.join(folder, name) for name in sorted(files)):
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
def overlay(state, folder, wanted):
    """Writes a folder's tensors over `state`, {our name: tensor}, in place, if wanted(key).

    Whole weights replace, LoRA pairs are added as alpha / rank B A. No tensor has to be there, but
    what is there has to fit: else SystemExit in one line.
    """
    pairs = {}
    for place, key, read in tensors_of(folder):
        if not wanted(key):
            continue
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


def of_projector(key):
    return released_key(key)[0].startswith('projector.')


def open_release(part, folder, known, dtype):
    """The model of 'encoder' or 'decoder' in a release; known: see `load_known`."""
    name = dict(encoder='llm', decoder='dit')[part]
    if not os.path.isdir(f'{folder}/{name}'):
        raise SystemExit(f'--init_from=uae:{folder}: no folder {name} in it (llm, dit and, if '
                         'there, llm_lora, dit_lora, llm_processor are read)')
    model = load_known(known, f'{folder}/{name}', dtype, elsewhere=of_projector)
    if os.path.isdir(f'{folder}/{name}_lora'):
        overlay(model.state_dict(), f'{folder}/{name}_lora', lambda key: not of_projector(key))
    return model


def open_projector(folder, d, D):
    """The projector's float32 tensors among those of llm and llm_lora, of widths d -> 2 D -> D."""
    state = {}
    for _, key, read in tensors_of(f'{folder}/llm'):
        if of_projector(key):
            state[released_key(key)[0]] = read().float()
    need = {'projector.up.weight': (2 * D, d), 'projector.up.bias': (2 * D,),
            'projector.down.weight': (D, 2 * D), 'projector.down.bias': (D,)}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes != need:
        found = ', '.join(f'{name} {shape}' for name, shape in sorted(shapes.items()))
        raise SystemExit(f'{folder}/llm: expected projector.0 and projector.2 that take {d} to '
                         f'{2 * D} to {D} dimensions, found {found or "none"}')
    if os.path.isdir(f'{folder}/llm_lora'):
        overlay(state, f'{folder}/llm_lora', of_projector)
    return {name.removeprefix('projector.'): tensor for name, tensor in state.items()}
