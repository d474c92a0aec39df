"""The reward R = cos(f_I(x), f_I(x_hat)) of source and reconstruction, and its image towers f_I.

A tower is frozen but differentiable in the image, so the same code is the loss of stage 1, the
reward of stages 2 and 3 and the score of Unified-Bench. Preprocessing is each model's own, done on
tensors in float32 so that gradients pass. Beside it stand rewards without a tower: a function of
one's own, and the likeness of the text that is read in both images.
"""
import argparse
import math
import runpy

import torch
import torch.nn.functional as F
from torch import nn

from lib.ranks import by_rows
from lib.towers import (
    OPENAI, clip_preprocessing, find_preprocessing, load_open_clip, load_transformers,
    own_preprocessing)

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
DINOV3 = 'facebook/dinov3-vitl16-pretrain-lvd1689m'
# name -> (library, hub id, arguments of `preprocess`). None = the configuration's own.
BACKBONES = dict(
    clip=('open_clip', None, None),              # config.clip; ViT-L/14 at full size
    judge=('transformers', None, None),          # config.judge
    longclip=('transformers', 'zer0int/LongCLIP-L-Diffusers', dict(OPENAI, resize=224, crop=224)),
    dinov2=('transformers', 'facebook/dinov2-large',
            dict(IMAGENET, resize=256, crop=224, corner=math.floor)),
    dinov3=('transformers', DINOV3, dict(IMAGENET, resize=None, crop=224, mode='bilinear')),
)


def preprocess(x, mean, std, resize, crop, mode='bicubic', corner=round):
    """x (B, 3, H, W) in [-1, 1] -> (B, 3, crop, crop) normalised, with the centre crop last.

    resize: the shortest side; or (height, width), squashed; or None, squashed to the crop. Where
    the corner falls between two pixels, torchvision (LongCLIP) rounds and transformers goes down.
    """
    x = x.float() * 0.5 + 0.5
    h, w = x.shape[-2:]
    if resize is None:
        size = (crop, crop)
    elif isinstance(resize, tuple):
        size = resize
    else:
        size = (int(h * resize / min(h, w)), int(w * resize / min(h, w)))
    if size != (h, w):                           # antialiased as PIL does it; without, f_I is wrong
        x = F.interpolate(x, size, mode=mode, antialias=True, align_corners=False)
    top, left = (corner((n - crop) / 2) for n in x.shape[-2:])
    x = x[..., top:top + crop, left:left + crop].clamp(0, 1)
    mean, std = (torch.tensor(a, device=x.device).view(3, 1, 1) for a in (mean, std))
    return (x - mean) / std


class Backbone(nn.Module):
    """A frozen image tower: `features` is differentiable in the image.

    library: open_clip or transformers, whose tower it is; pre: the arguments of `preprocess`; rows:
    of one pass, 0 = all.
    """

    def __init__(self, library, tower, pre, rows=0):
        super().__init__()
        self.rows = rows
        self.library = library
        self.tower = tower
        self.pre = pre
        self.requires_grad_(False)
        self.eval()

    def features(self, x):
        """x (B, 3, H, W) in [-1, 1] -> (B, d) of unit length."""
        x = preprocess(x, **self.pre)
        if self.library == 'open_clip':
            f = self.tower(x)
        elif hasattr(self.tower, 'get_image_features'):
            f = self.tower.get_image_features(pixel_values=x).pooler_output
        else:
            out = self.tower(pixel_values=x)
            if out.last_hidden_state.dim() == 3:             # a ViT: its CLS token
                f = out.last_hidden_state[:, 0]
            else:                                            # convolutional: its pooled map
                f = out.pooler_output.flatten(1)
        return F.normalize(f.float(), dim=-1)

    def reward(self, x, x_hat, captions=None):
        """R_i = cos(f_I(x_i), f_I(x_hat_i)): (B,); see `clip_reward`."""
        with torch.no_grad():
            f = by_rows(self.features, self.rows, x).repeat_interleave(len(x_hat) // len(x), 0)
        return (f * by_rows(self.features, self.rows, x_hat)).sum(-1)


def describe(name, config):
    """A backbone's library, its hub id or folder, and its preprocessing if that is known."""
    if name not in BACKBONES:
        raise SystemExit(f'unknown backbone {name!r}; there are: {" ".join(BACKBONES)}')
    library, hub_id, pre = BACKBONES[name]
    return library, hub_id or getattr(config, name), pre


def backbone(name, config, device='cpu', source=''):
    """The tower called `name` in BACKBONES; source: a hub id or folder instead of its own."""
    library, own, pre = describe(name, config)
    if library == 'open_clip':
        tower = load_open_clip(source or own)
        pre = pre or clip_preprocessing(tower)
    else:
        tower = load_transformers(source or own)
        pre = pre or own_preprocessing(find_preprocessing(source or own))
    rows = getattr(config, 'micro_batch', 0)
    return Backbone(library, tower, pre, rows).to(device)


class Function(nn.Module):
    """A reward of one's own, FILE.py:NAME: a function (captions, x, x_hat) -> (B,)."""

    def __init__(self, source):
        super().__init__()
        path, _, name = source.rpartition(':')
        try:
            self.function = runpy.run_path(path)[name]
        except (OSError, KeyError) as error:
            raise SystemExit(f'--reward={source}: expected FILE.py:FUNCTION ({error!r})')

    def reward(self, x, x_hat, captions):
        r = self.function(captions, x.repeat_interleave(len(x_hat) // len(x), 0), x_hat)
        if r.shape != (len(x_hat),):
            raise SystemExit(f'--reward: expected one number for each of {len(x_hat)} images, got '
                             f'the shape {tuple(r.shape)}')
        return r.float()


class Reward(nn.Module):
    """The key `reward`: a weighted sum of rewards, parts {name: (weight, tower)}."""

    def __init__(self, parts):
        super().__init__()
        self.weights = {name: weight for name, (weight, _) in parts.items()}
        self.towers = nn.ModuleList(tower for _, tower in parts.values())

    def reward(self, x, x_hat, captions):
        """Where the source has no text, the others share the weight of `ocr`."""
        terms = {}
        for name, tower in zip(self.weights, self.towers):
            terms[name] = tower.reward(x, x_hat, captions)
            if x_hat.requires_grad and not terms[name].requires_grad:
                raise SystemExit(f'--reward: {name} has no gradient in the image, which stage 1 '
                                 'needs; stages 2 and 3 do not')
        of_text = terms.pop('ocr', None)
        r = sum(self.weights[name] * term for name, term in terms.items())
        if of_text is None:
            return r
        weight = self.weights['ocr']
        others = sum(self.weights.values()) - weight
        return torch.where(of_text.isnan(), r * (1 + weight / others), r + weight * of_text)

    def part(self, name):
        """The tower of that name, None if it is not in the sum."""
        return dict(zip(self.weights, self.towers)).get(name)


def reward_parts(config):
    """The key `reward`, NAME or NAME:WEIGHT,NAME:WEIGHT -> {name: weight}.

    A name is one of BACKBONES, `ocr`, or FILE.py:FUNCTION. Refuses the judge's own tower under
    another name: it would judge itself.
    """
    parts = {}
    for word in config.reward.split(','):
        name, _, weight = word.strip().partition(':')
        if name.endswith('.py'):
            function, _, weight = weight.partition(':')
            name = f'{name}:{function}'
        try:
            value = float(weight or 1)
        except ValueError:
            value = 0.0
        if name in parts or not 0 < value < math.inf:
            raise SystemExit(f'--reward={config.reward}: expected NAME or NAME:WEIGHT,NAME:WEIGHT '
                             'with positive weights, for example clip:0.7,dinov2:0.3')
        parts[name] = value
        judged = '.py:' not in name and name not in ('judge', 'ocr') and config.judge
        if judged and describe(name, config)[1] == config.judge:
            raise SystemExit(f'--reward={config.reward}: {name} is the judge too ({config.judge}), '
                             'which must be a tower that was not the reward: name another --judge')
    if list(parts) == ['ocr']:
        raise SystemExit('--reward=ocr: an image without text would have no reward; give another '
                         'beside it, for example clip:0.7,ocr:0.3')
    return parts


def reward_tower(config, device='cpu', open_one=backbone):
    """The `Reward` of the key `reward`; open_one(name, config, device) opens a tower."""
    parts = {}
    for name, weight in reward_parts(config).items():
        if '.py:' in name:
            parts[name] = weight, Function(name)
        elif name == 'ocr':
            from lib.ocr import Ocr
            parts[name] = weight, Ocr()
        else:
            parts[name] = weight, open_one(name, config, device)
    return Reward(parts)


_default = []                                    # the tiny CLIP, once loaded


def clip_reward(x, x_hat, tower=None, captions=None):
    """R_i = cos(f_I(x_i), f_I(x_hat_i)), the one objective of the method.

    x, x_hat (B, 3, H, W) in [-1, 1] -> (B,) in [-1, 1]; differentiable in x_hat, x is a constant.
    x may be the P images of B = P*G reconstructions in contiguous groups. tower: a Reward or a
    Backbone; None = the tiny CLIP of the embedded world. captions, of the reconstructions: for
    rewards of one's own.
    """
    if tower is None:
        if not _default:
            tiny = argparse.Namespace(clip='local-dir:data/shapes/base/clip')
            _default.append(backbone('clip', tiny))
        tower = _default[0].to(x_hat.device)
    return tower.reward(x, x_hat, captions)
