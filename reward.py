"""The reward R = cos(f_I(x), f_I(x_hat)) of source and reconstruction, and the image towers f_I it can be measured with.

A tower is frozen but differentiable in the image, so the same code is the loss of stage 1, the reward of stages 2 and 3
and the score of Unified-Bench. Preprocessing is each model's own, done on tensors in float32 so that gradients pass.
"""
import json
import os

import torch
import torch.nn.functional as F
from torch import nn

import common

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
OPENAI = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
# name -> (library, hub id, preprocessing). `resize` is the shortest side, then the centre `crop`; resize None squashes.
BACKBONES = dict(
    clip=('open_clip', None, None),              # the configuration's own: c.clip
    judge=('transformers', None, None),          # the configuration's own: c.judge
    longclip=('transformers', 'zer0int/LongCLIP-L-Diffusers', dict(OPENAI, resize=224, crop=224)),
    dinov2=('transformers', 'facebook/dinov2-large', dict(IMAGENET, resize=256, crop=224)),
    dinov3=('transformers', 'facebook/dinov3-vitl16-pretrain-lvd1689m', dict(IMAGENET, resize=None, crop=224)),
)


def preprocess(x, mean, std, resize, crop, mode='bicubic'):
    """x (B, 3, H, W) in [-1, 1] -> (B, 3, crop, crop) normalised. Antialiased, as PIL does it; without, the features are wrong."""
    x = x.float() * 0.5 + 0.5
    h, w = x.shape[-2:]
    size = (crop, crop) if resize is None else (int(h * resize / min(h, w)), int(w * resize / min(h, w)))
    if size != (h, w):
        x = F.interpolate(x, size, mode=mode, antialias=True, align_corners=False)
    top, left = round((x.shape[-2] - crop) / 2), round((x.shape[-1] - crop) / 2)
    x = x[..., top:top + crop, left:left + crop].clamp(0, 1)
    mean, std = (torch.tensor(a, device=x.device).view(3, 1, 1) for a in (mean, std))
    return (x - mean) / std


class Backbone(nn.Module):
    """A frozen image tower. `features(x)`: (B, 3, H, W) in [-1, 1] -> (B, d) of unit length, differentiable in x."""

    def __init__(self, name, clip, judge, device='cpu'):
        super().__init__()
        if name not in BACKBONES:
            raise SystemExit(f'unknown backbone {name!r}; there are: {" ".join(BACKBONES)}')
        self.library, source, self.pre = BACKBONES[name]
        source = source or dict(clip=clip, judge=judge)[name]
        if self.library == 'open_clip':
            self.load_open_clip(source)
        else:
            self.load_transformers(source)
        self.requires_grad_(False).eval().to(device)

    def load_open_clip(self, source):
        import open_clip
        if source.startswith('local-dir:') and not os.path.isdir(source.removeprefix('local-dir:')):
            raise SystemExit(f'--clip={source}: no such folder')
        name, weights = (source, None) if source.startswith('local-dir:') else source.split(':')
        model = open_clip.create_model(name, pretrained=weights)
        side = model.visual.image_size
        side = side[0] if isinstance(side, tuple) else side
        cfg = getattr(model.visual, 'preprocess_cfg', None) or OPENAI
        self.pre = self.pre or dict(mean=cfg['mean'], std=cfg['std'], resize=side, crop=side)
        self.tower = model.visual

    def load_transformers(self, source):
        from transformers import AutoModel
        self.tower = common.load(AutoModel, source, dtype=torch.float32)
        path = os.path.join(source, 'preprocessor_config.json')
        if self.pre is None and os.path.exists(path):
            with open(path) as f:
                p = json.load(f)
            self.pre = dict(mean=p['image_mean'], std=p['image_std'], resize=p['size']['height'], crop=p['size']['height'])
        self.pre = self.pre or dict(IMAGENET, resize=256, crop=224)

    def features(self, x):
        x = preprocess(x, **self.pre)
        if self.library == 'open_clip':
            f = self.tower(x)
        elif hasattr(self.tower, 'get_image_features'):
            f = self.tower.get_image_features(pixel_values=x).pooler_output
        else:
            out = self.tower(pixel_values=x)     # ViT: its CLS token; a convolutional tower: its pooled map
            f = out.last_hidden_state[:, 0] if out.last_hidden_state.dim() == 3 else out.pooler_output.flatten(1)
        return F.normalize(f.float(), dim=-1)


def backbone(name, c, device='cpu'):
    """The tower called `name` for a run with configuration c."""
    return Backbone(name, c.clip, c.judge, device)


_default = []


def clip_reward(x, x_hat, tower=None):
    """R_i = cos(f_I(x_i), f_I(x_hat_i)), the one objective of the method.

    x, x_hat (B, 3, H, W) in [-1, 1] -> (B,) in [-1, 1]; differentiable in x_hat, x is a constant. x may be the P images of
    B = P*G reconstructions in contiguous groups. tower: a Backbone; None = the tiny CLIP of the embedded world.
    """
    if tower is None:
        if not _default:
            _default.append(Backbone('clip', 'local-dir:data/shapes/base/clip', ''))
        tower = _default[0].to(x_hat.device)
    with torch.no_grad():
        f = tower.features(x).repeat_interleave(len(x_hat) // len(x), 0)
    return (f * tower.features(x_hat)).sum(-1)
