"""Shared by the tests: where they run (the repository's root), and one small model with pictures and captions.

The session's model is the shipped tiny one with noise on its weights and a flattened captioner, so that no test leans on
how good the shipped weights are, no output is trivial, and captions differ in length. Nobody may change it: `at` gives a
view with other config keys, `copy.deepcopy` a model of one's own.
"""
import copy
import os
import sys
import types

import numpy as np
import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.chdir(ROOT)
torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 2)))

P, G = 4, 4


def at(uae, **keys):
    """The same model under another configuration."""
    other = copy.copy(uae)
    other.c = types.SimpleNamespace(**{**vars(uae.c), **keys})
    return other


def perturb(module, scale, seed=0):
    """Adds normal noise to every weight, the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g))
    return module


@pytest.fixture(scope='session')
def uae():
    import common
    import config
    from model import UAE
    common.quiet()
    uae = UAE(config.parse({}, {}, [], 'x.py'))
    perturb(uae.encoder.model.language_model, 0.01)
    perturb(uae.decoder, 0.02)
    uae.encoder.model.language_model.norm.weight.data.mul_(0.4)         # flatter captions, of many lengths
    before = {k: v.clone() for k, v in uae.state_dict().items()}
    yield uae
    changed = [k for k, v in uae.state_dict().items() if not torch.equal(v, before[k])]
    assert not changed, f'a test changed the shared model: {changed[0]} and {len(changed) - 1} more'
    assert not any(p.requires_grad for p in uae.parameters()), 'a test left the shared model trainable'


@pytest.fixture(scope='session')
def x():
    """P pictures (P, 3, 32, 32) in [-1, 1]."""
    from data.shapes import scenes
    rng = np.random.default_rng(0)
    return torch.as_tensor(scenes.pixels([scenes.random_scene(rng) for _ in range(P)])).float()


@pytest.fixture(scope='session')
def seen(uae, x):
    with torch.no_grad():
        return uae.see(x)


@pytest.fixture(scope='session')
def sampled(uae, seen):
    """G captions of each picture at temperature 1: y, mask, logp."""
    y, mask, logp = uae.sample_captions(seen, G, 1.0, torch.rand(P * G, uae.c.caption_len, generator=torch.Generator().manual_seed(1)))
    assert mask.sum(1).unique().numel() > 2, 'these tests need captions of several lengths'
    assert mask.sum(1).min() < uae.c.caption_len, 'and some that end'
    return y, mask, logp
