"""The reward R = cos(f_I(x), f_I(x_hat)) of source and reconstruction, and the image towers f_I it can be measured with.

A tower is frozen but differentiable in the image, so the same code is the loss of stage 1, the reward of stages 2 and 3
and the score of Unified-Bench. Preprocessing is each model's own, done on tensors in float32 so that gradients pass.
"""
import json
import math
import os
import statistics

import torch
import torch.nn.functional as F
from torch import nn

import common

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
OPENAI = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
# name -> (library, hub id, preprocessing). `resize` is the shortest side, then the centre `crop`; resize None squashes. Where the
# crop's corner falls between two pixels torchvision (LongCLIP) rounds and transformers (Unified-Bench's CLIP, DINOv2) goes down.
BACKBONES = dict(
    clip=('open_clip', None, None),              # the configuration's own: c.clip
    judge=('transformers', None, None),          # the configuration's own: c.judge
    longclip=('transformers', 'zer0int/LongCLIP-L-Diffusers', dict(OPENAI, resize=224, crop=224)),
    dinov2=('transformers', 'facebook/dinov2-large', dict(IMAGENET, resize=256, crop=224, corner=math.floor)),
    dinov3=('transformers', 'facebook/dinov3-vitl16-pretrain-lvd1689m', dict(IMAGENET, resize=None, crop=224, mode='bilinear')),
)


def preprocess(x, mean, std, resize, crop, mode='bicubic', corner=round):
    """x (B, 3, H, W) in [-1, 1] -> (B, 3, crop, crop) normalised. Antialiased, as PIL does it; without, the features are wrong."""
    x = x.float() * 0.5 + 0.5
    h, w = x.shape[-2:]
    size = (crop, crop) if resize is None else (int(h * resize / min(h, w)), int(w * resize / min(h, w)))
    if size != (h, w):
        x = F.interpolate(x, size, mode=mode, antialias=True, align_corners=False)
    top, left = (corner((n - crop) / 2) for n in x.shape[-2:])
    x = x[..., top:top + crop, left:left + crop].clamp(0, 1)
    mean, std = (torch.tensor(a, device=x.device).view(3, 1, 1) for a in (mean, std))
    return (x - mean) / std


def own_preprocessing(path):
    """A transformers preprocessor_config.json -> keyword arguments of `preprocess`: shortest side and crop, or one size to squash to."""
    try:
        with open(path) as f:
            p = json.load(f)
        shortest = p['size'].get('shortest_edge')
        crop = p['crop_size' if shortest else 'size']['height']
        return dict(mean=p['image_mean'], std=p['image_std'], resize=shortest, crop=crop,
                    mode='bilinear' if p.get('resample') == 2 else 'bicubic', corner=math.floor)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise SystemExit(f'{path}: no preprocessing that can be followed here ({type(e).__name__}: {e})')


class Backbone(nn.Module):
    """A frozen image tower. `features(x)`: (B, 3, H, W) in [-1, 1] -> (B, d) of unit length, differentiable in x."""

    def __init__(self, name, clip, judge, device='cpu', source=''):
        super().__init__()
        if name not in BACKBONES:
            raise SystemExit(f'unknown backbone {name!r}; there are: {" ".join(BACKBONES)}')
        self.library, own, self.pre = BACKBONES[name]
        source = source or own or dict(clip=clip, judge=judge)[name]
        if self.library == 'open_clip':
            self.load_open_clip(source)
        else:
            self.load_transformers(source)
        self.requires_grad_(False).eval().to(device)

    def load_open_clip(self, source):
        import open_clip
        local, (name, _, weights) = source.startswith('local-dir:'), source.partition(':')
        if local and not os.path.isdir(weights):
            raise SystemExit(f'--clip={source}: no such folder')
        if not weights:                          # open_clip would go on with random ones
            raise SystemExit(f'--clip={source}: expected NAME:WEIGHTS, for example ViT-L-14-quickgelu:openai, or local-dir:FOLDER')
        try:
            model = open_clip.create_model(source if local else name, pretrained=None if local else weights, require_pretrained=True)
        except Exception as e:                   # an unknown name, no network, a damaged file: each has its own kind
            raise SystemExit(f'--clip={source} cannot be loaded: {(str(e).splitlines() or [type(e).__name__])[0][:160]}')
        side = model.visual.image_size
        side = side[0] if isinstance(side, tuple) else side
        cfg = getattr(model.visual, 'preprocess_cfg', None) or OPENAI
        self.pre = self.pre or dict(mean=cfg['mean'], std=cfg['std'], resize=side, crop=side, corner=math.floor)
        self.tower = model.visual

    def load_transformers(self, source):
        from transformers import AutoModel
        self.tower, info = common.load(AutoModel, source, dtype=torch.float32, output_loading_info=True)
        absent = sorted(k for k in info['missing_keys'] if 'pooler' not in k)        # a ViT's pooler is often not there and never used
        if absent:                               # transformers would go on with random ones
            raise SystemExit(f'{source}: {len(absent)} weights of {type(self.tower).__name__} are missing, the first is {absent[0]}')
        path = os.path.join(source, 'preprocessor_config.json')
        if self.pre is None and os.path.exists(path):
            self.pre = own_preprocessing(path)
        self.pre = self.pre or BACKBONES['dinov2'][2]

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


def backbone(name, c, device='cpu', source=''):
    """The tower called `name` for a run with configuration c; source: another hub id or folder to load it from."""
    return Backbone(name, c.clip, c.judge, device, source)


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


# --- Unified-Bench by the rules of its official script ---------------------------------------------------------------
def backbones(c):
    """{name: tower} of Unified-Bench, of the words NAME or NAME=SOURCE in c.backbones. Raises SystemExit that names one that cannot be had."""
    towers = {}
    for word in c.backbones.split(','):
        name, _, source = word.strip().partition('=')
        if name in towers:
            raise SystemExit(f'--backbones={c.backbones}: {name} comes twice')
        try:
            towers[name] = backbone(name, c, source=source)
        except SystemExit as e:
            raise SystemExit(f'--backbones: {name} cannot be had, and a mean over the others is no score: {e}')
    return towers


def pair(items, references, what):
    """[(file name, place)] -> {reference: place} by the official script's rules: same name, else same stem, else recon_ + stem.

    In the references' order. Raises SystemExit that names the references without a file, or with two.
    """
    pairs, stems = {}, [(r, os.path.splitext(r)[0]) for r in references]
    for name, place in items:
        stem = os.path.splitext(name)[0]
        ref = name if name in references else next((r for r, own in stems if stem in (own, 'recon_' + own)), None)
        if ref is None:
            print(f'warning: {place} belongs to no reference and is left out')
        elif pairs.setdefault(ref, place) != place:
            raise SystemExit(f'{place} is a second {what} of {ref}, the first is {pairs[ref]}')
    missing = [r for r in references if r not in pairs]
    if missing:
        raise SystemExit(f'{len(missing)} of {len(references)} references have no {what}, and a mean over the others is no score: '
                         f'{" ".join(missing[:8])}{" ..." * (len(missing) > 8)}')
    return {r: pairs[r] for r in references}


def unified_score(scores):
    """{backbone: {file: cosine, or None for a file without a reference}} -> the official script's JSON, key for key.

    `overall_average` is the plain mean of the backbones' means, whatever their files.
    """
    stats = {}
    for name, found in scores.items():
        valid = [s for s in found.values() if s is not None]
        stats[name] = dict(total_images=len(found), valid_pairs=len(valid), average_similarity=sum(valid) / len(valid),
                           min_similarity=min(valid), max_similarity=max(valid))
    means = {name: s['average_similarity'] for name, s in stats.items()}
    best, worst = (pick(means.items(), key=lambda kv: kv[1]) for pick in (max, min))
    return dict(model_types=list(scores), similarities_by_model=scores, statistics_by_model=stats, summary=dict(
        models_used=list(means), average_scores_by_model=means, overall_average=sum(means.values()) / len(means), best_model=best, worst_model=worst))


def over_seeds(results):
    """Results of unified_score, one a seed -> ({backbone: mean, 'overall': mean}, {the same: standard error}, empty for one seed)."""
    rows = [dict(r['summary']['average_scores_by_model'], overall=r['summary']['overall_average']) for r in results]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return ({name: statistics.mean(v) for name, v in columns.items()},
            {name: statistics.stdev(v) / math.sqrt(len(v)) for name, v in columns.items() if len(v) > 1})
