"""Shared by the tests: where they run (the repository's root), one small model, images, captions.

The session's model is the shipped tiny one with noise on its weights and a flattened captioner.
So no test leans on how good the shipped weights are, no output is trivial, and captions differ in
length. Nobody may change it: `at` gives a view with other config keys, `copy.deepcopy` a model of
one's own.
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

# what a library is about to rename or drop is an error here, while there is time to follow
WARNINGS = ('error::FutureWarning', 'error::DeprecationWarning')
os.environ['PYTHONWARNINGS'] = ','.join(WARNINGS)           # of the processes that tests start

P, G = 4, 4


def pytest_configure(config):
    for line in WARNINGS:
        config.addinivalue_line('filterwarnings', line)


def shared_config(*arguments):
    """The configuration of a script that has no keys of its own; arguments: '--key=value'."""
    import config
    return config.parse({}, {}, list(arguments), 'x.py')


def new_uae(c, device='cpu'):
    """A model from the checkpoint that the configuration names."""
    from lib.checkpoint import open_uae
    return open_uae(c, device)


def at(uae, **keys):
    """The same model under another configuration."""
    other = copy.copy(uae)
    other._modules = dict(uae._modules)
    other.config = types.SimpleNamespace(**{**vars(uae.config), **keys})
    for name in ('encoder', 'decoder'):
        part = copy.copy(uae._modules[name])
        part._modules = dict(part._modules)
        part.config = other.config
        other._modules[name] = part
    return other


def perturb(module, scale, seed=0):
    """Adds normal noise to every weight, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return module


def uniforms(rows, length, seed=1):
    """Uniforms in [0, 1), (rows, length): the randomness behind sampled captions."""
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed))


def rolled(vision):
    """The images seen, each in its neighbour's place."""
    return {name: rows.roll(1, 0) for name, rows in vision.items()}


@pytest.fixture(scope='session')
def uae():
    from lib import ranks
    ranks.quiet()
    uae = new_uae(shared_config())
    language_model = uae.encoder.vlm.model.language_model
    perturb(language_model, 0.01)
    perturb(uae.decoder.transformer, 0.02)
    language_model.norm.weight.data.mul_(0.4)               # flatter captions, of many lengths
    before = {name: value.clone() for name, value in uae.state_dict().items()}
    yield uae
    after = uae.state_dict()
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    message = f'a test changed the shared model: {changed[:1]} and {len(changed) - 1} more'
    assert not changed, message
    trainable = [p for p in uae.parameters() if p.requires_grad]
    assert not trainable, 'a test left the shared model trainable'


@pytest.fixture(scope='session')
def x():
    """P images (P, 3, 32, 32) in [-1, 1]."""
    from data.shapes import scenes
    rng = np.random.default_rng(0)
    drawn = [scenes.random_scene(rng) for _ in range(P)]
    return torch.as_tensor(scenes.pixels(drawn)).float()


@pytest.fixture(scope='session')
def vision(uae, x):
    """What the vision tower makes of x."""
    return uae.encoder.see(x)


@pytest.fixture(scope='session')
def sampled(uae, vision):
    """G captions of each image at temperature 1: y, mask, logp."""
    u = uniforms(P * G, uae.config.caption_len)
    y, mask, logp = uae.encoder.sample(vision, G, 1.0, u)
    lengths = mask.sum(1)
    assert lengths.unique().numel() > 2, 'these tests need captions of several lengths'
    assert lengths.min() < uae.config.caption_len, 'and some that end'
    return y, mask, logp
