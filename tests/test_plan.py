"""--plan: what a stage needs on one GPU, printed before anything is downloaded, and right."""
import contextlib
import importlib
import os
import re
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch.utils._pytree import tree_leaves

from conftest import new_uae
from lib import checkpoint, ranks
from lib.ocr import Ocr
from model import UAE
from running import python, refusal
from tools import plan
from tools.flops import flop_counter
from tools.rehearse import replaced


def configuration(name, *argv):
    return plan.read(name, argv)[1]


def held(rehearsal):
    """{act: the most GB}, the acts of a rollout together."""
    found = {}
    for act, _, size in rehearsal.acts:
        name = act if act in ('update', 'evaluation') else 'rollout'
        found[name] = max(size, found.get(name, 0.0))
    return found


# --- against real runs ----------------------------------------------------------------------------
class RealPeak(plan.Peak):
    """The same count where tensors have values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf.untyped_storage())
        return out


def really_held(name, *argv):
    """`held` of real models and images, counted through a whole rollout and a micro-batch."""
    script = importlib.import_module(name)
    peak = RealPeak()
    found = {}

    def lap(act):
        found[act] = (peak.most - peak.base) / 1e9
        peak.most = peak.alive

    def progress(start_step):
        peak.base = peak.most = peak.alive
        yield 0

    def train(uae, mode=True, original=UAE.train):
        if mode and hasattr(peak, 'base'):
            lap('rollout')
        return original(uae, mode)

    def optimiser(params, config, **options):
        for p in params:
            p.grad = torch.zeros_like(p)
        return SimpleNamespace(adamw=SimpleNamespace(state={}), step=finish)

    def finish(step):
        lap('update')
        raise plan.Done

    log = SimpleNamespace(progress=progress)
    first = {place: plan.first_of(getattr(ranks, place))
             for place in ('sample_slices', 'step_slices')}
    with replaced(script, Log=lambda *args: log, Optimiser=optimiser, open_out_dir=nothing):
        with patch.object(UAE, 'train', train), patch.multiple(ranks, **first):
            with peak, contextlib.suppress(plan.Done):
                script.main([*argv, '--eval_every=0', '--eval_images=4', '--device=cpu'])
    return found


def nothing(*args):
    return 0


@pytest.mark.parametrize('name, checkpointing', [
    ('pretrain_decoder', False),
    ('cold_start', True),
    ('grpo_encoder', False),
    ('grpo_encoder', True),
    ('grpo_decoder', True),
    ('nft_decoder', False),
    ('reca', True),
])
def test_acts_hold_what_they_really_hold(name, checkpointing):
    """To the byte but for what a kernel keeps beside."""
    argv = ['--batch=4', '--micro_batch=2', '--caption_len=8', f'--checkpointing={checkpointing}']
    if hasattr(configuration(name), 'group'):
        argv += ['--group=4', '--denoise_steps=4']
    said = held(plan.rehearse(name, (*argv, '--eval_every=0')))
    found = really_held(name, *argv)
    assert set(said) == set(found) == {'rollout', 'update'}
    for act in said:
        assert found[act] > 1e-4
        assert said[act] == pytest.approx(found[act], rel=0.05)


@pytest.mark.parametrize('lora', [[], ['--lora_rank=4', '--dtype=bfloat16']])
def test_bytes_are_those_of_the_run(lora):
    """Weights after train_only, gradients like them, a reference if there is a KL, and what a text
    encoder that stands still does not share with the captioner."""
    argv = ('--kl=0.1', '--micro_batch=1', '--batch=1', '--group=2', '--caption_len=8', *lora)
    rows = plan.rehearse('grpo_encoder', (*argv, '--eval_every=0')).rows
    uae = new_uae(configuration('grpo_encoder', *argv))
    uae.train_only('encoder')
    checkpoint.choose_text_encoder(uae, 'start')
    encoder = [*uae.encoder.vlm.parameters()]
    trained = [p for p in encoder if p.requires_grad]
    shared = {id(p) for p in encoder}
    own = [p for p in uae.encoder.text_encoder.parameters() if id(p) not in shared]
    parts = dict(encoder=encoder, text_encoder=own, projector=[*uae.projector.parameters()],
                 decoder=[*uae.decoder.transformer.parameters()],
                 vae=[*uae.decoder.vae.parameters()], reference=trained)
    for name, tensors in parts.items():
        weights = sum(tensor.nbytes for tensor in tensors) / 1e9
        assert rows[name]['weights'] == pytest.approx(weights, rel=0.02), name    # and buffers
    assert rows['encoder']['trained'] == sum(p.numel() for p in trained) > 0
    assert rows['encoder']['gradients'] == pytest.approx(sum(p.nbytes for p in trained) / 1e9)
    assert not any(rows[name]['trained'] for name in rows if name != 'encoder')
    base = [p for name, p in uae.encoder.vlm.named_parameters() if 'lora_' not in name]
    assert rows['encoder']['parameters'] == sum(p.numel() for p in base)
    assert 'judge' not in rows, 'no evaluation, no judge'


# --- the sum --------------------------------------------------------------------------------------
def test_most_is_the_largest_sum_of_what_is_there():
    """By hand: weights of all, or of those whose turn it is; AdamW's two moments always; gradients
    in an update."""
    weights = dict(encoder=8, text_encoder=1, projector=0.5, decoder=5, vae=2, reward=3, judge=4,
                   reference=0.25)
    rows = {name: dict(weights=size, gradients=0.0, trained=0) for name, size in weights.items()}
    rows['encoder'].update(gradients=0.125, trained=1)
    acts = [('evaluation', 'encoder', 2.0), ('drawing', 'decoder', 6.0), ('rewards', 'towers', 1.0),
            ('update', 'trained', 4.5)]
    rehearsal = SimpleNamespace(rows=rows, acts=acts)

    def most(**keys):
        return plan.most(rehearsal, SimpleNamespace(**{'judge': 'x', 'offload': False, **keys}))

    assert most() == (sum(weights.values()) + 2 * 0.125 + 6, 'drawing')
    assert most(judge='')[0] == most()[0] - 4
    assert most(ema=0.9)[0] == most()[0] + 0.125
    of_update = 0.5 + 8 + 1 + 0.25 + 3 * 0.125 + 4.5
    of_drawing = 0.5 + 5 + 2 + 2 * 0.125 + 6
    assert most(offload=True) == (max(of_update, of_drawing), 'update')
    acts[3] = ('update', 'trained', 2.0)
    assert most(offload=True) == (of_drawing, 'drawing')
    acts[1] = ('drawing', 'decoder', 1.0)
    assert most(offload=True)[0] == 0.5 + 8 + 1 + 0.25 + 3 * 0.125 + 2.0
    acts[2] = ('rewards', 'towers', 9.0)
    assert most(offload=True) == (0.5 + 3 + 4 + 2 * 0.125 + 9, 'rewards')


def test_a_plan_is_that_of_one_rank_s_share():
    argv = ('--group=2', '--caption_len=8', '--micro_batch=0')
    share = plan.rehearse('grpo_encoder', ('--batch=2', '--eval_images=4', *argv))
    one_of_two = plan.rehearse('grpo_encoder', ('--batch=4', '--eval_images=8', *argv), 2)
    assert one_of_two.acts == share.acts
    whole = plan.rehearse('grpo_encoder', ('--batch=4', '--eval_images=8', *argv))
    for act, size in held(whole).items():
        assert size > 1.2 * held(share)[act], act
    assert 'divide' in refusal(plan.rehearse, 'grpo_encoder', ('--batch=3', *argv), 2)


# --- operations -----------------------------------------------------------------------------------
def test_operations_are_twice_the_weights_that_a_token_meets():
    """And attention: every token's queries meet all keys, and their scores all values."""
    argv = ('--batch=2', '--group=2', '--caption_len=8', '--micro_batch=0', '--eval_images=4')
    uae = new_uae(configuration('grpo_encoder', *argv))
    C = uae.config.cond_len
    weights = sum(layer.weight.numel() for layer in uae.encoder.language_model.layers.modules()
                  if isinstance(layer, torch.nn.Linear))
    of_projector = uae.projector.up.weight.numel() + uae.projector.down.weight.numel()
    linear = 2 * C * (weights + of_projector)
    text = uae.encoder.vlm.config.text_config
    attention = 4 * text.num_hidden_layers * text.hidden_size * C ** 2
    assert attention > 0.01 * linear
    read = plan.rehearse('grpo_encoder', argv).flops
    # torch 2.11 counts the angles of the positions too, a ten-thousandth
    assert read['caption to condition'] == pytest.approx(linear + attention, rel=1e-3)
    assert all(read.values())


@pytest.mark.parametrize('key_heads', [4, 2])
def test_attention_is_counted(key_heads):
    """Two matrix products forward and five back, also where heads share keys; twice the
    multiplications."""
    q = torch.randn(2, 4, 3, 8, requires_grad=True)
    k, v = torch.randn(2, 2, key_heads, 5, 8, requires_grad=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    product = 2 * (2 * 4 * 3 * 5 * 8)
    with flop_counter() as counter:
        mixed = attend(q, k, v, enable_gqa=True)
    assert counter.get_total_flops() == 2 * product
    with flop_counter() as counter:
        mixed.sum().backward()
    assert counter.get_total_flops() == 5 * product


def test_recomputation_wants_no_gradient_through_a_frozen_encoder(x):
    """The library asks for gradients of every embedding once activations are recomputed."""
    uae = new_uae(configuration('reca', '--checkpointing=True'))
    uae.train_only('decoder')
    vision = uae.encoder.see(x)
    uae.train()
    y = torch.full((len(x), 5), 7)
    assert not uae.condition(y, torch.ones(y.shape), vision).requires_grad
    assert not vision['features'].requires_grad


# --- the command ----------------------------------------------------------------------------------
def test_plan_of_a_script(tmp_path):
    """Printed by a process of its own, with nothing written; without LoRA also without peft."""
    result = python('-c', 'import sys; sys.modules["peft"] = None; from tools import plan; '
                    'plan.plan("pretrain_decoder", "--batch=2", "--eval_images=2", '
                    f'"--out_dir={tmp_path}/out")')
    assert result.returncode == 0, result.stdout
    for part in ('encoder', 'projector', 'decoder', 'vae', 'judge'):
        millions = float(re.search(rf'^{part} .* ([\d.]+) M', result.stdout, re.M)[1])
        assert (millions > 0) == (part in ('encoder', 'projector', 'decoder')), part
    assert 'fits 16 GB' in result.stdout
    assert 'would save' not in result.stdout
    assert not os.path.exists(f'{tmp_path}/out')


def test_a_reward_without_a_tower_ends_no_plan(tmp_path, monkeypatch):
    path = tmp_path / 'own.py'
    path.write_text('def own(captions, x, x_hat):\n    return 1 / len(captions[0])\n')
    monkeypatch.setattr(Ocr, '__init__', torch.nn.Module.__init__)
    small = '--batch=1', '--caption_len=8', '--eval_every=0'
    for stage, name in (('cold_start', f'{path}:own'), ('grpo_encoder', 'clip,ocr')):
        assert held(plan.rehearse(stage, (f'--reward={name}', *small))).keys() >= {'update'}


def test_only_stages_have_a_plan():
    assert refusal(plan.plan, 'sample').startswith('only stages have a plan')


def test_unknown_models_are_named():
    message = refusal(plan.plan, 'grpo_encoder', '--decoder=somebody/else')
    assert 'somebody/else' in message
    assert 'stabilityai/stable-diffusion-3.5-large' in message
