"""--plan: what a stage needs on one GPU, printed before anything is downloaded, and right."""
import contextlib
import functools
import importlib
import os
import re
import socket
import sys

import pytest
import torch

from lib import checkpoint
from lib import ranks
import config
import tools.plan
from conftest import at, new_uae
from reward import backbone
from running import refusal, script

TRAINS = dict(
    cold_start=('encoder', 'projector', 'decoder'),
    grpo_encoder=('encoder',),
    grpo_decoder=('decoder',),
    pretrain_decoder=('projector', 'decoder', 'encoder'),
    reca=('projector', 'decoder'),
)
WITHOUT_REWARD = ('pretrain_decoder', 'reca')


def configuration(name, *argv):
    stage = importlib.import_module(name)
    return config.parse(stage.keys, stage.own_presets, argv, f'{name}.py')


@functools.cache
def plan(name, *argv):
    """What the plan of a stage returns, made once."""
    stage = importlib.import_module(name)
    c = configuration(name, *argv)
    with open(os.devnull, 'w') as text, contextlib.redirect_stdout(text):
        return tools.plan.plan(c, list(TRAINS[name]), stage.planned_loss)


def open_models(c):
    """The UAE of a configuration and the tower of its reward."""
    return new_uae(c), backbone('clip', c)


# --- a micro-batch of each stage's own loss, its inputs random ------------------------------------
def inputs(uae):
    """x, seen, y, mask, z, ones (B,) of one micro-batch."""
    c = uae.config
    g = torch.Generator().manual_seed(0)
    x = torch.rand(c.micro_batch, 3, c.resolution, c.resolution, generator=g) * 2 - 1
    z = torch.randn(c.micro_batch, *uae.decoder.latent_shape(), generator=g)
    seen = uae.encoder.see(x)
    y = torch.randint(7, 30, (c.micro_batch, c.caption_len), generator=g)
    return x, seen, y, torch.ones(y.shape), z, torch.ones(c.micro_batch)


def cold_start_loss(stage, uae, tower):
    x, seen, y, mask, z, _ = inputs(uae)
    batch = dict(x=x, y=y, mask=mask, z=z)
    return stage.loss_of, tower, seen, batch, 1.0, uae.config


def grpo_encoder_loss(stage, uae, tower):
    x, seen, y, mask, z, adv = inputs(uae)
    batch = dict(y=y, weight=mask, recorded=mask, old_logp=mask, ref_logp=mask,
                 adv=adv)
    return stage.loss_of, seen, batch, 1.0, True, uae.config


def grpo_decoder_loss(stage, uae, tower):
    x, seen, y, mask, z, adv = inputs(uae)
    noisy, _ = stage.window(0, uae.config)
    path = torch.randn(len(z), noisy[1] - noisy[0], *z.shape[1:])
    old_logp = torch.zeros(path.shape[:2])
    batch = dict(z=path, z_next=path, cond=uae.condition(y, mask, seen), adv=adv,
                 recorded=old_logp, old_logp=old_logp)
    return stage.loss_of, None, batch, 0, 1.0, True, uae.config


def pretrain_decoder_loss(stage, uae, tower):
    x, seen, y, mask, z, ones = inputs(uae)
    flow = dict(z0=z, y=y, mask=mask, s=ones / 2, eps=z)
    answers = dict(seen=seen, y=y, mask=mask)
    return stage.both_losses, flow, answers, 1.0


def reca_loss(stage, uae, tower):
    x, seen, y, mask, z, ones = inputs(uae)
    drop = torch.zeros(len(z), dtype=torch.bool)
    batch = dict(z0=z, s=ones / 2, eps=z, drop=drop, states=seen[0])
    return stage.loss_of, None, batch, (y, mask, seen), 1.0, uae.config


LOSSES = dict(
    cold_start=cold_start_loss,
    grpo_encoder=grpo_encoder_loss,
    grpo_decoder=grpo_decoder_loss,
    pretrain_decoder=pretrain_decoder_loss,
    reca=reca_loss,
)


def really_kept(name, *argv):
    """Bytes that autograd really keeps in one micro-batch, weights not counted."""
    ranks.quiet()
    uae, tower = open_models(configuration(name, *argv))
    uae.train_only(*TRAINS[name])
    with torch.no_grad():
        loss_and_inputs = LOSSES[name](importlib.import_module(name), uae, tower)
    storages = {}

    def keep(t):
        storage = t.untyped_storage()
        storages[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        uae(*loss_and_inputs)
    for module in (uae, tower):
        for t in module.state_dict(keep_vars=True).values():
            storages.pop(t.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('name', TRAINS)
def test_activations_are_what_the_stage_keeps(name, checkpointing):
    """The count on tensors without storage against the stage's own loss on real ones, caption
    prompt and all."""
    argv = ['--micro_batch=4', f'--checkpointing={checkpointing}']
    if name in WITHOUT_REWARD:
        argv.append('--batch=4')
    said = plan(name, *argv)['kept'][checkpointing]
    found = really_kept(name, *argv)
    assert found > 1e5
    assert abs(said / found - 1) < 0.15, (said, found)


def test_activations_of_lora_in_bfloat16():
    argv = ['--micro_batch=4', '--lora_rank=4', '--dtype=bfloat16']
    for name in ('grpo_encoder', 'grpo_decoder'):
        said = plan(name, *argv)['kept'][False]
        found = really_kept(name, *argv)
        assert abs(said / found - 1) < 0.15, (name, said, found)


@pytest.mark.parametrize('name', ['grpo_encoder', 'grpo_decoder'])
def test_bytes_are_those_of_the_run(name):
    """Weights after train_only, gradients like them, two moments, and a reference of what is
    trained if there is a KL: against the real model."""
    live = '--text_encoder=live'
    said = plan(name, '--micro_batch=4', '--kl=0.1', '--eval_batch=1', live)
    uae, _ = open_models(configuration(name))
    params = uae.train_only(*TRAINS[name])
    trained_part = TRAINS[name][0]
    trained = sum(p.numel() * p.element_size() for p in params) / 1e9
    for part in ('encoder', 'projector', 'decoder', 'vae'):
        module = getattr(uae, part)
        row = said[part]
        tensors = [*module.parameters(), *module.buffers()]
        weights = sum(t.numel() * t.element_size() for t in tensors) / 1e9
        moving = [p.numel() for p in module.parameters() if p.requires_grad]
        assert row['parameters'] == sum(p.numel() for p in module.parameters())
        assert row['trained'] == sum(moving)
        assert row['weights'] == pytest.approx(weights)
        own = trained if part == trained_part else 0.0
        found = (row['gradients'], row['adamw'], row['reference'])
        assert found == pytest.approx((own, 2 * own, own))

    rows = [said[part] for part in ('encoder', 'projector', 'decoder', 'vae', 'reward', 'judge')]
    kinds = ('weights', 'gradients', 'adamw', 'reference')
    fixed = sum(row[kind] for row in rows for kind in kinds)
    total = said['total']
    assert total[False] == pytest.approx(fixed + said['kept'][False] / 1e9)
    assert fixed + said['kept'][True] / 1e9 < total[True] < total[False]
    assert said['evaluation'] < said['kept'][True] / 1e9
    assert not plan(name, '--micro_batch=4', '--kl=0', live)[trained_part]['reference']
    wide = plan(name, '--micro_batch=4', '--kl=0.1', '--eval_batch=4096', live)
    of_evaluation = pytest.approx(fixed + wide['evaluation'])
    assert wide['total'] == {True: of_evaluation, False: of_evaluation}


@pytest.mark.parametrize('lora', [[], ['--lora_rank=4', '--dtype=bfloat16']])
def test_a_text_encoder_that_stands_still_is_counted(lora):
    """Whatever it does not share with the captioner: a whole language model, or adapters."""
    argv = ['--micro_batch=4', '--text_encoder=start', *lora]
    said = plan('grpo_encoder', *argv)
    uae = new_uae(configuration('grpo_encoder', *argv))
    uae.train_only('encoder')
    checkpoint.choose_text_encoder(uae)
    shared = {id(p) for p in uae.encoder.vlm.parameters()}
    own = [p for p in uae.encoder.text_encoder.parameters() if id(p) not in shared]
    row = said['text_encoder']
    assert row['parameters'] == sum(p.numel() for p in own) > 0
    assert row['weights'] == pytest.approx(sum(p.nbytes for p in own) / 1e9)

    live = plan('grpo_encoder', '--micro_batch=4', '--text_encoder=live', *lora)
    assert 'text_encoder' not in live
    more = said['total'][True] - live['total'][True]
    assert more == pytest.approx(row['weights'])


def test_operations_are_twice_the_weights_that_a_token_meets():
    """And attention: every token's queries meet all keys, and their scores all values."""
    argv = ['--micro_batch=4', '--text_encoder=live']
    uae = new_uae(configuration('grpo_encoder', *argv))
    weights = 0
    for layer in uae.encoder.language_model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            weights += layer.weight.numel()
    linear = 2 * weights * uae.config.cond_len
    read = plan('grpo_encoder', *argv)['flops']
    of_projector = 2 * uae.config.cond_len * (
        uae.projector.up.weight.numel() + uae.projector.down.weight.numel())
    found = read['caption to condition'] - of_projector
    text = uae.encoder.vlm.config.text_config
    attention = 4 * text.num_hidden_layers * text.hidden_size * uae.config.cond_len ** 2
    assert attention > 0.01 * linear
    # torch 2.11 counts the angles of the positions too, a ten-thousandth
    assert found == pytest.approx(linear + attention, rel=1e-3)
    assert all(read.values())


@pytest.mark.parametrize('key_heads', [4, 2])
def test_attention_is_counted(key_heads):
    """Two matrix products forward and five back, also where heads share keys; twice the
    multiplications."""
    q = torch.randn(2, 4, 3, 8, requires_grad=True)
    k, v = torch.randn(2, 2, key_heads, 5, 8, requires_grad=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    product = 2 * (2 * 4 * 3 * 5 * 8)
    with tools.plan.flop_counter() as counter:
        mixed = attend(q, k, v, enable_gqa=True)
    assert counter.get_total_flops() == 2 * product
    with tools.plan.flop_counter() as counter:
        mixed.sum().backward()
    assert counter.get_total_flops() == 5 * product


def test_recomputation_wants_no_gradient_through_a_frozen_encoder():
    """The library asks for gradients of every embedding once activations are recomputed."""
    uae = new_uae(configuration('reca', '--checkpointing=True'))
    params = uae.train_only(*TRAINS['reca'])
    x, seen, y, mask, _, _ = inputs(at(uae, micro_batch=1))
    uae.projector.requires_grad_(False)
    assert params
    for module in (uae.encoder.language_model, uae.encoder.vlm.model.visual):
        module.train()
    assert not uae.condition(y, mask, seen).requires_grad
    assert not uae.encoder.see(x)[0].requires_grad


def test_the_micro_batch_is_the_run_s(monkeypatch):
    """micro_batch samples, all of a rank's if it is 0; activations grow with it, and with the
    denoising steps that are replayed."""
    assert plan('grpo_encoder', '--micro_batch=4')['B'] == 4
    assert plan('grpo_encoder', '--batch=4', '--group=4')['B'] == 16
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert plan('grpo_encoder', '--batch=4', '--group=4', '--seed=2')['B'] == 8
    monkeypatch.delenv('WORLD_SIZE')
    one = plan('grpo_decoder', '--micro_batch=4', '--trained_steps=1')['kept'][False]
    more = plan('grpo_decoder', '--micro_batch=4')['kept'][False]
    assert more > 2.5 * one


# --- the command ----------------------------------------------------------------------------------
@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **other):
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
    parts = ['encoder', 'projector', 'decoder', 'vae']
    if name not in WITHOUT_REWARD:
        parts += ['reward', 'judge']
    for part in parts:
        millions = float(re.search(rf'^{part} .* ([\d.]+) M', text, re.M)[1])
        assert (millions > 0) == (part in TRAINS[name]), part
    assert 'fits 24 GB' in text
    assert not os.path.exists(f'{tmp_path}/out')


def test_plan_of_a_preset(capsys, offline):
    """Nothing of it is on this machine: known architectures are enough, and what it says of the
    encoder is right to the byte."""
    script('grpo_encoder', '--preset=medium', '--plan')
    text = capsys.readouterr().out
    columns = r'^encoder +(\S+) B +(\S+) +(\S+) M +(\S+) +(\S+) +(\S+)$'
    row = [float(value) for value in re.search(columns, text, re.M).groups()]
    adapters = 32 * 36 * 51968                   # rank, layers, in + out of their linear layers
    weights = (2 * 3754622976 + 4 * adapters) / 1e9
    training = [size * adapters / 1e9 for size in (4, 8, 4)]
    assert row == pytest.approx([3.7546, weights, adapters / 1e6, *training], abs=1e-2)

    def total(how):
        return float(re.search(rf'^total {how} +checkpointing: (\S+)', text, re.M)[1])

    assert 14 < total('with') < total('without') < 24
    assert re.search(r'^total with .* fits 24 GB, fits 80 GB \(this run\)$', text, re.M)


def test_unknown_models_are_named():
    c = configuration('grpo_encoder', '--decoder=somebody/else')
    stage = importlib.import_module('grpo_encoder')
    message = refusal(tools.plan.plan, c, ['encoder'], stage.planned_loss)
    assert 'somebody/else' in message
    assert 'stabilityai/stable-diffusion-3.5-large' in message
