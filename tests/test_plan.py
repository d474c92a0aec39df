"""--plan: what a stage needs on one GPU, printed before anything is downloaded, and right."""
import contextlib
import os
import re
import socket
import sys

import pytest
import torch

import common
import config
from running import refusal, script

TRAINS = dict(cold_start=('encoder', 'projector', 'decoder'), grpo_encoder=('encoder',), grpo_decoder=('decoder',),
              pretrain_decoder=('projector', 'decoder', 'encoder'), reca=('projector', 'decoder'))
PLANS = {}


def configuration(name, *words):
    module = __import__(name)
    return config.parse(module.keys, module.own_presets, words, f'{name}.py')


def plan(name, *words):
    """What common.plan returns for a stage, made once."""
    if (name, *words) not in PLANS:
        with open(os.devnull, 'w') as text, contextlib.redirect_stdout(text):
            PLANS[name, *words] = common.plan(configuration(name, *words), *TRAINS[name])
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
        elif name == 'reca':
            args = module.loss_of, None, z, adv / 2, z, torch.zeros(B, dtype=torch.bool), seen[0], (y, mask, seen), 1.0, c
        else:
            args = module.both_losses, (z, y, mask, adv / 2, z), (seen, y, mask), 1.0
    found, out = kept(lambda: uae(*args))
    own = {t.untyped_storage()._cdata for m in (uae, tower) for t in m.state_dict(keep_vars=True).values()}
    return sum(s.nbytes() for k, s in found.items() if k not in own)


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('name', TRAINS)
def test_activations_are_what_the_stage_keeps(name, checkpointing):
    """The count on tensors without storage against the stage's own loss on real ones, caption prompt and all."""
    words = ('--micro_batch=4', f'--checkpointing={checkpointing}') + (('--batch=4',) if name in ('pretrain_decoder', 'reca') else ())
    said, found = plan(name, *words)['kept'][checkpointing], real(name, *words)
    assert found > 1e5 and abs(said / found - 1) < 0.15, (said, found)


def test_activations_of_lora_in_bfloat16():
    words = ('--micro_batch=4', '--lora_rank=4', '--dtype=bfloat16')
    for name in ('grpo_encoder', 'grpo_decoder'):
        said, found = plan(name, *words)['kept'][False], real(name, *words)
        assert abs(said / found - 1) < 0.15, (name, said, found)


@pytest.mark.parametrize('name', ['grpo_encoder', 'grpo_decoder'])
def test_bytes_are_those_of_the_run(name):
    """Weights after train_only, gradients like them, two moments, and a reference of what is trained if there is a KL: against the real model."""
    from model import UAE
    said = plan(name, '--micro_batch=4', '--kl=0.1')
    uae = UAE(configuration(name))
    params = uae.train_only(*TRAINS[name])
    mine = sum(p.numel() * p.element_size() for p in params) / 1e9
    for part in ('encoder', 'projector', 'decoder', 'vae'):
        module, row = getattr(uae, part), said[part]
        assert row['parameters'] == sum(p.numel() for p in module.parameters()) and row['trained'] == sum(p.numel() for p in module.parameters() if p.requires_grad)
        assert row['weights'] == pytest.approx(sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers())) / 1e9)
        own = mine if part == TRAINS[name][0] else 0.0
        assert (row['gradients'], row['adamw'], row['reference']) == pytest.approx((own, 2 * own, own))
    fixed = sum(said[p][k] for p in ('encoder', 'projector', 'decoder', 'vae', 'reward', 'judge') for k in ('weights', 'gradients', 'adamw', 'reference'))
    assert said['total'][False] == pytest.approx(fixed + said['kept'][False] / 1e9)
    assert fixed + said['kept'][True] / 1e9 < said['total'][True] < said['total'][False]
    assert not plan(name, '--micro_batch=4')[TRAINS[name][0]]['reference']


def test_the_micro_batch_is_the_run_s(monkeypatch):
    """micro_batch samples, all of a rank's if it is 0; activations grow with it, and with the denoising steps that are replayed."""
    assert plan('grpo_encoder', '--micro_batch=4')['B'] == 4
    assert plan('grpo_encoder', '--prompts=4', '--group=4')['B'] == 16
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert plan('grpo_encoder', '--prompts=4', '--group=4', '--seed=2')['B'] == 8
    monkeypatch.delenv('WORLD_SIZE')
    one, more = (plan('grpo_decoder', '--micro_batch=4', *w)['kept'][False] for w in (['--train_steps=1'], []))
    assert more > 2.5 * one


# --- the command ------------------------------------------------------------------------------------------------------
@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kw):
        raise AssertionError('--plan asks the network')
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


@pytest.mark.parametrize('name', TRAINS)
def test_plan_of_a_script(name, tmp_path, capsys, monkeypatch, offline):
    """Printed, with nothing loaded, written or joined; without LoRA also without peft."""
    monkeypatch.setitem(sys.modules, 'peft', None)
    monkeypatch.setattr(common, 'start', lambda c: pytest.fail('--plan starts a run'))
    script(name, '--plan', f'--out_dir={tmp_path}/out')
    text = capsys.readouterr().out
    for part in ('encoder', 'projector', 'decoder', 'vae') + ('reward', 'judge') * (name not in ('pretrain_decoder', 'reca')):
        assert (float(re.search(rf'^{part} .* ([\d.]+) M', text, re.M)[1]) > 0) == (part in TRAINS[name]), part
    assert 'fits 24 GB' in text and not os.path.exists(f'{tmp_path}/out')


def test_plan_of_a_preset(capsys, offline):
    """Nothing of it is on this machine: known architectures are enough, and what it says of the encoder is right to the byte."""
    script('grpo_encoder', '--preset=medium', '--plan')
    text = capsys.readouterr().out
    row = re.search(r'^encoder +(\S+) B +(\S+) +(\S+) M +(\S+) +(\S+) +(\S+)$', text, re.M).groups()
    adapters = 32 * 36 * 51968                   # rank, layers, in + out of their linear layers
    assert [float(v) for v in row] == pytest.approx([3.7546, (2 * 3754622976 + 4 * adapters) / 1e9, adapters / 1e6, *(k * adapters / 1e9 for k in (4, 8, 4))], abs=1e-2)
    with_, without = (float(re.search(rf'^total {w} +checkpointing: (\S+)', text, re.M)[1]) for w in ('with', 'without'))
    assert 14 < with_ < without < 24
    assert re.search(r'^total with .* fits 24 GB, fits 80 GB \(this run\)$', text, re.M)


def test_unknown_models_are_named():
    message = refusal(common.plan, configuration('grpo_encoder', '--decoder=somebody/else'), 'encoder')
    assert 'somebody/else' in message and 'stabilityai/stable-diffusion-3.5-large' in message
