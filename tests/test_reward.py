"""The reward: preprocessing as the towers expect it, a cosine of the right pairs, a gradient in the reconstruction alone."""
import json
import math
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

import reward
from reward import BACKBONES, IMAGENET, OPENAI, backbone, clip_reward, preprocess

CONFIG = types.SimpleNamespace(clip='local-dir:data/shapes/base/clip', judge='data/shapes/base/judge')


# --- preprocessing -------------------------------------------------------------------------------------------------
def structured(h, w):
    """(h, w, 3) uint8: waves from slow to faster than any small copy can hold, edges, a ramp. Away from 0 and 255, where
    PIL would clip the overshoot at an edge between its two passes."""
    i, j = np.mgrid[:h, :w].astype(float)
    red = 128 + 70 * np.sin(0.0012 * i * j / 4)
    green = 60 + 136 * (((i // 3) + (j // 5)) % 2)
    blue = 255 * j / w
    return np.stack([red, green, blue], -1).clip(0, 255).astype(np.uint8)


def pil(image, mean, std, resize, crop):
    """The same by torchvision's transforms on a PIL image, as open_clip and the models' own processors do it."""
    size = (crop, crop) if resize is None else resize
    steps = [T.Resize(size, T.InterpolationMode.BICUBIC), T.CenterCrop(crop), T.ToTensor(), T.Normalize(mean, std)]
    return T.Compose(steps)(Image.fromarray(image))


@pytest.mark.parametrize('h, w, how', [
    (512, 512, dict(OPENAI, resize=224, crop=224)), (512, 512, dict(IMAGENET, resize=256, crop=224)),
    (427, 640, dict(IMAGENET, resize=256, crop=224)), (512, 384, dict(OPENAI, resize=224, crop=224)),
    (384, 512, dict(IMAGENET, resize=None, crop=224)), (100, 100, dict(OPENAI, resize=224, crop=224))],
    ids=lambda a: str(a) if isinstance(a, int) else f"{a['resize']}")
def test_preprocess_is_pil_s(h, w, how):
    image = structured(h, w)
    x = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
    got, want = preprocess(x, **how)[0], pil(image, **how)
    assert got.shape == (3, 224, 224)
    assert (got - want).abs().max().item() < 0.05


def test_without_antialias_the_picture_above_is_another_one():
    """The picture is one that can tell: sampled without the filter it is far off."""
    image = structured(512, 512)
    x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    rough = torch.nn.functional.interpolate(x, (224, 224), mode='bicubic')[0]
    assert (rough - pil(image, (0, 0, 0), (1, 1, 1), 224, 224)).abs().mean().item() > 0.02


def test_preprocess_of_the_right_size_only_normalises():
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    got = preprocess(x, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5), 32, 32)
    want = (x / 2 + 0.5 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.25, 0.5]).view(3, 1, 1)
    torch.testing.assert_close(got, want)
    assert preprocess(x.sign() * 7, (0., 0., 0.), (1., 1., 1.), 32, 32).unique().tolist() == [0, 1]    # no reward outside the range
    assert preprocess(x.bfloat16(), (0., 0., 0.), (1., 1., 1.), 32, 32).dtype == torch.float32


def test_tiny_towers_preprocess_as_their_folders_say():
    with open('data/shapes/base/clip/open_clip_config.json') as f:
        cfg = json.load(f)
    pre, side = cfg['preprocess_cfg'], cfg['model_cfg']['vision_cfg']['image_size']
    assert {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in backbone('clip', CONFIG).pre.items()} == dict(
        mean=tuple(pre['mean']), std=tuple(pre['std']), resize=side, crop=side, corner=math.floor)
    with open('data/shapes/base/judge/preprocessor_config.json') as f:
        p = json.load(f)
    assert backbone('judge', CONFIG).pre == dict(mean=p['image_mean'], std=p['image_std'], resize=None, crop=p['size']['height'], mode='bicubic', corner=math.floor)


def test_a_folder_s_own_preprocessing(tmp_path):
    """As transformers reads it: shortest side and centre crop, or one size to squash to; what cannot be followed is refused."""
    path, norm = tmp_path / 'preprocessor_config.json', dict(image_mean=[0, 0, 0], image_std=[1, 1, 1])
    path.write_text(json.dumps(dict(norm, size=dict(shortest_edge=256), crop_size=dict(height=224, width=224), resample=3)))
    assert reward.own_preprocessing(path) == dict(mean=[0, 0, 0], std=[1, 1, 1], resize=256, crop=224, mode='bicubic', corner=math.floor)
    path.write_text(json.dumps(dict(norm, size=dict(height=224, width=224), resample=2)))
    assert reward.own_preprocessing(path) == dict(mean=[0, 0, 0], std=[1, 1, 1], resize=None, crop=224, mode='bilinear', corner=math.floor)
    for text in ('{}', '[', json.dumps(dict(norm, size=224)), json.dumps(dict(norm, size=dict(shortest_edge=224)))):
        path.write_text(text)
        with pytest.raises(SystemExit) as stop:
            reward.own_preprocessing(path)
        assert str(path) in str(stop.value) and '\n' not in str(stop.value)


# --- the cosine ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module', params=['clip', 'judge'])
def tower(request):
    return backbone(request.param, CONFIG)


@pytest.fixture(scope='module')
def x_hat(x):
    """Reconstructions of x, each worse than the one before."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return (x + noise * torch.linspace(0.05, 0.6, len(x)).view(-1, 1, 1, 1)).clamp(-1, 1)


def test_a_picture_is_like_itself(tower, x, x_hat):
    torch.testing.assert_close(clip_reward(x, x, tower), torch.ones(len(x)), atol=1e-5, rtol=0)
    assert (clip_reward(x, x_hat, tower) < 1 - 1e-4).all()
    assert (clip_reward(x, x.roll(1, 0), tower) < 0.999).all()


def test_symmetric_and_in_range(tower, x, x_hat):
    r = clip_reward(x, x_hat, tower)
    assert r.shape == (len(x),) and r.dtype == torch.float32
    torch.testing.assert_close(r, clip_reward(x_hat, x, tower), atol=1e-6, rtol=1e-5)
    worst = clip_reward(x, -x, tower)
    assert r.abs().max() <= 1 + 1e-6 and worst.abs().max() <= 1 + 1e-6 and worst.mean() < r.mean()


def test_it_is_the_cosine_of_the_features(tower, x, x_hat):
    f, g = tower.features(x), tower.features(x_hat)
    torch.testing.assert_close(f.norm(dim=-1), torch.ones(len(x)))
    torch.testing.assert_close(clip_reward(x, x_hat, tower), torch.cosine_similarity(f, g), atol=1e-5, rtol=0)


def test_row_i_is_scored_against_row_i(tower, x, x_hat):
    r = clip_reward(x, x_hat, tower)
    for i in range(len(x)):
        assert abs(clip_reward(x[i:i + 1], x_hat[i:i + 1], tower).item() - r[i].item()) < 1e-5
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(clip_reward(x[order], x_hat[order], tower), r[order], atol=1e-5, rtol=0)
    assert (clip_reward(x, x_hat[order], tower) - r).abs().min() > 1e-4
    mixed = x_hat.clone()
    mixed[1] = x[1]
    changed = (clip_reward(x, mixed, tower) - r).abs() > 1e-5
    assert changed.tolist() == [False, True, False, False]


def test_groups_share_their_source(tower, x, x_hat):
    """P pictures against P*G reconstructions in contiguous groups: each source goes through the tower once."""
    seen = []
    handle = tower.tower.register_forward_hook(lambda m, args, kwargs, out: seen.append(len((*args, *kwargs.values())[0])), with_kwargs=True)
    r = clip_reward(x[:2], x_hat, tower)
    handle.remove()
    assert seen == [2, 4]
    torch.testing.assert_close(r, clip_reward(x[:2].repeat_interleave(2, 0), x_hat, tower), atol=1e-6, rtol=1e-5)


def test_gradient_in_the_reconstruction_alone(tower, x, x_hat):
    x, x_hat = x.clone().requires_grad_(), x_hat.clone().requires_grad_()
    r = clip_reward(x, x_hat, tower)
    r.sum().backward()
    assert x.grad is None and x_hat.grad.isfinite().all() and x_hat.grad.abs().amax((1, 2, 3)).min() > 0
    assert not any(p.requires_grad or p.grad is not None for p in tower.parameters()) and not tower.training
    with torch.no_grad():                                               # and uphill is uphill
        step = x_hat + 0.5 * x_hat.grad / x_hat.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        assert clip_reward(x, step, tower).mean() > r.mean()


def test_the_default_tower_is_the_tiny_clip(x, x_hat):
    torch.testing.assert_close(clip_reward(x, x_hat), clip_reward(x, x_hat, backbone('clip', CONFIG)))
    assert len(reward._default) == 1
    assert (clip_reward(x, x_hat) - clip_reward(x, x_hat, backbone('judge', CONFIG))).abs().max() > 1e-3


def test_unknown_backbone_names_those_there_are():
    with pytest.raises(SystemExit) as stop:
        backbone('clop', CONFIG)
    message = str(stop.value)
    assert '\n' not in message and 'clop' in message and all(name in message for name in BACKBONES)


@pytest.mark.parametrize('name, key', [('clip', 'local-dir:no/such'), ('judge', 'no/such/folder')])
def test_missing_backbone_is_one_line(name, key):
    with pytest.raises(SystemExit) as stop:
        backbone(name, types.SimpleNamespace(clip=key, judge=key))
    assert '\n' not in str(stop.value) and 'no/such' in str(stop.value)
