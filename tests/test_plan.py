"""--plan: what a stage needs on one GPU, printed before anything is downloaded, and right."""
import contextlib
import os
import re
import socket
import sys

import pytest
import torch
from conftest import at

import common
import config
from running import refusal, script

TRAINS = dict(cold_start=('encoder', 'projector', 'decoder'), grpo_encoder=('encoder',), grpo_decoder=('decoder',),
              pretrain_decoder=('projector', 'decoder', 'encoder'))
PLANS = {}


def configuration(name, *words):
    module = __import__(name)
    return config.parse(module.keys, module.own_presets, words, f'{name}.py')


def plan(name, *words):
    """The dict and the printed text of a stage's plan, made once."""
    if (name, *words) not in PLANS:
        c, text = configuration(name, *words), open(os.devnull, 'w')
        trained = TRAINS[name] if getattr(c, 'train_encoder', True) else TRAINS[name][:-1]
        with text, contextlib.redirect_stdout(text):
            PLANS[name, *words] = common.plan(c, *trained)
    return PLANS[name, *words]


def kept(loss):
    """Bytes of the storages that autograd saves while loss() runs, and its result, which keeps them alive."""
    found = {}

    def keep(t):
        found[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = loss()
    return found, out


def real(name, *words):
    """What autograd really keeps in one micro-batch of the stage's own loss, weights not counted."""
    from model import UAE
    from reward import backbone
    c, module = configuration(name, *words), __import__(name)
    common.quiet()
    uae, tower = UAE(c), backbone('clip', c)
    uae.train_only(*TRAINS[name])
    B, g = c.micro_batch, torch.Generator().manual_seed(0)
    x, z = torch.rand(B, 3, c.resolution, c.resolution, generator=g) * 2 - 1, torch.randn(B, *uae.latent_shape(), generator=g)
    with torch.no_grad():
        seen = uae.see(x)
        y = torch.randint(7, 30, (B, c.caption_len), generator=g)
        mask, adv = torch.ones(y.shape), torch.ones(B)
        if name == 'grpo_encoder':
            args = module.loss_of, seen, y, mask, mask, mask, adv, 1.0, c
        elif name == 'cold_start':
            args = module.loss_of, tower, x, seen, y, mask, z, 1.0, c
        elif name == 'grpo_decoder':
            noisy, _ = module.window(0, c)
            z0 = torch.randn(B, noisy[1] - noisy[0], *z.shape[1:], generator=g)
            args = module.loss_of, None, uae.condition(y, mask, seen), z0, z0, torch.zeros(z0.shape[:2]), adv, 0, 1.0, c
        else:
            args = module.both_losses, (z, y, mask, adv / 2, z), (seen, y, mask)
    found, out = kept(lambda: uae(*args))
    own = {t.untyped_storage()._cdata for m in (uae, tower) for t in m.state_dict(keep_vars=True).values()}
    return sum(s.nbytes() for k, s in found.items() if k not in own)


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('name', TRAINS)
def test_activations_are_what_the_stage_keeps(name, checkpointing):
    """The count on tensors without storage against the stage's own loss on real ones, caption prompt and all."""
    words = ('--micro_batch=4', f'--checkpointing={checkpointing}') + (('--batch=4',) if name == 'pretrain_decoder' else ())
    said, found = plan(name, *words)['kept'][checkpointing], real(name, *words)
    assert found > 1e5 and abs(said / found - 1) < 0.15, (said, found)


def test_activations_of_lora_in_bfloat16():
    words = ('--micro_batch=4', '--lora_rank=4', '--dtype=bfloat16')
    for name in ('grpo_encoder', 'grpo_decoder'):
        said, found = plan(name, *words)['kept'][False], real(name, *words)
        assert abs(said / found - 1) < 0.15, (name, said, found)
