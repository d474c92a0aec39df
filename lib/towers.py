"""Image towers of open_clip and transformers: loaded whole or not at all, and the preprocessing
that each of them asks for."""
import json
import math
import os

import torch

from lib.files import load

OPENAI = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
MODES = {2: 'bilinear', 3: 'bicubic'}            # by their numbers in PIL


# --- open_clip -----------------------------------------------------------------------------------
def load_open_clip(source):
    """The image tower of an open_clip model, NAME:WEIGHTS or local-dir:FOLDER."""
    import open_clip
    name, _, weights = source.partition(':')
    if not weights:                              # open_clip would go on with random ones
        raise SystemExit(f'--clip={source}: expected NAME:WEIGHTS, for example '
                         'ViT-L-14-quickgelu:openai, or local-dir:FOLDER')
    if name == 'local-dir':
        if not os.path.isdir(weights):
            raise SystemExit(f'--clip={source}: no such folder')
        name, weights = source, None
    try:
        model = open_clip.create_model(name, pretrained=weights, require_pretrained=True)
    except Exception as error:                   # no network, a damaged file: each has its own kind
        lines = str(error).splitlines() or [type(error).__name__]
        raise SystemExit(f'--clip={source} cannot be loaded: {lines[0][:160]}')
    return model.visual


def clip_preprocessing(tower):
    """What an open_clip tower says of itself -> keyword arguments of `preprocess`."""
    side = tower.image_size
    if isinstance(side, tuple):
        side = side[0]
    own = getattr(tower, 'preprocess_cfg', None) or OPENAI
    return dict(mean=own['mean'], std=own['std'], resize=side, crop=side, corner=math.floor)


# --- transformers ---------------------------------------------------------------------------------
def load_transformers(source):
    """An image tower of transformers, all of whose weights are there."""
    from transformers import AutoModel
    tower, info = load(AutoModel, source, dtype=torch.float32, output_loading_info=True)
    # transformers goes on with random weights; a ViT's pooler is often absent, and never used
    absent = sorted(key for key in info['missing_keys'] if 'pooler' not in key)
    if absent:
        raise SystemExit(f'{source}: {len(absent)} weights of {type(tower).__name__} are missing, '
                         f'the first is {absent[0]}')
    return tower


def find_preprocessing(source):
    """The preprocessor_config.json of a folder or hub id."""
    from transformers import utils
    try:
        return utils.cached_file(source, 'preprocessor_config.json')
    except OSError as error:
        reason = str(error).splitlines()[0][:160]
        raise SystemExit(f'{source}: no preprocessor_config.json, {reason}')


def own_preprocessing(path):
    """A transformers preprocessor_config.json -> keyword arguments of `preprocess`.

    Raises SystemExit that names the file and the field that cannot be followed.
    """
    def demand(can, field):
        if not can:
            raise SystemExit(f'{path}: {field}={p.get(field)!r} cannot be followed here')

    try:
        with open(path) as f:
            p = {field: value for field, value in json.load(f).items() if value is not None}
    except (OSError, ValueError, AttributeError) as e:
        raise SystemExit(f'{path}: not a JSON object ({type(e).__name__}: {e})')
    for field, value in dict(do_resize=True, do_rescale=True, rescale_factor=1 / 255).items():
        demand(p.get(field, value) == value, field)
    mode = MODES.get(p.get('resample', 3))
    demand(mode, 'resample')
    if not p.get('do_normalize', True):
        p.update(image_mean=[0.0] * 3, image_std=[1.0] * 3)
    demand('image_mean' in p, 'image_mean')
    demand('image_std' in p, 'image_std')

    size, window = p.get('size'), 'size'
    demand(isinstance(size, dict), 'size')
    demand(set(size) in ({'shortest_edge'}, {'height', 'width'}), 'size')
    if p.get('do_center_crop', 'crop_size' in p):
        window = 'crop_size'
    demand(window == 'crop_size' or 'height' in size, 'do_center_crop')       # else no square
    sides = p.get(window)
    demand(isinstance(sides, dict) and set(sides) == {'height', 'width'}, window)
    crop = sides['height']
    demand(crop == sides['width'] and crop <= min(size.values()), window)
    resize = size.get('shortest_edge') or (size['height'], size['width'])
    if resize == (crop, crop):
        resize = None
    return dict(mean=p['image_mean'], std=p['image_std'], resize=resize, crop=crop, mode=mode,
                corner=math.floor)
