"""In bfloat16 the update's own first log-prob is the old one of all updates on a rollout.

There another batch shape is another rounding, which must not count as a policy ratio. In float32
the old one is what was recorded while sampling.
"""
import types

import pytest
import torch
from running import arguments, lines, tiny

import grpo_decoder
import grpo_encoder
from decoder import Decoder

STAGES = dict(grpo_encoder=grpo_encoder, grpo_decoder=grpo_decoder)
stages = pytest.mark.parametrize('name', STAGES)
IN_BFLOAT16 = '--dtype=bfloat16'


@pytest.fixture(autouse=True)
def rounding(monkeypatch):
    """Rollouts of stage 3 round otherwise than its updates, as on a GPU; a CPU does not.

    Those of stage 2 do on a CPU too, since they decode with a cache.
    """
    draw_sde = Decoder.draw_sde

    def rounded(*args, **other):
        z_0, path = draw_sde(*args, **other)
        path['recorded'] = path['recorded'].bfloat16().float()
        return z_0, path

    monkeypatch.setattr(Decoder, 'draw_sde', rounded)


@pytest.mark.parametrize('micro_batch', [0, 1])
@stages
def test_in_bfloat16_rounding_is_no_policy_ratio(tmp_path, name, micro_batch):
    """The ratio is exactly 1; what the log calls logp_diff is still the recorded one's."""
    size = f'--micro_batch={micro_batch}'
    [line] = tiny(name, tmp_path / 'out', IN_BFLOAT16, size, steps=1)
    assert line['ratio_max'] == 1
    assert line['clip_frac'] == 0
    assert line['grad_norm'] > 0
    assert line['logp_diff'] > 1e-3


def losses_of(monkeypatch, stage, argv):
    """logp and old_logp of every micro-batch of a run, in order, and what each rollout recorded."""
    losses, rollouts = [], []
    policy_loss, rollout = stage.policy_loss, stage.rollout

    def spied_loss(logp, old_logp, *args, **other):
        losses.append(types.SimpleNamespace(logp=logp.detach().clone(), old=old_logp.clone()))
        return policy_loss(logp, old_logp, *args, **other)

    def spied_rollout(*args):
        found = rollout(*args)
        rollouts.append(found[0]['recorded'].clone())
        return found

    monkeypatch.setattr(stage, 'policy_loss', spied_loss)
    monkeypatch.setattr(stage, 'rollout', spied_rollout)
    stage.main(argv)
    return losses, rollouts


EPOCHS, STEPS = 3, 2
CASES = [
    ('grpo_encoder', []),
    ('grpo_encoder', ['--ratio=sequence', '--micro_batch=1']),
    ('grpo_decoder', ['--guidance=2.0']),
    ('grpo_decoder', ['--sde=cps', '--noise_level=0.8', '--micro_batch=1']),
]


@pytest.mark.parametrize('name, extra', CASES)
def test_later_updates_are_measured_against_the_first(tmp_path, monkeypatch, name, extra):
    """Three updates on each of two rollouts, each micro-batch against its own first log-prob."""
    argv = arguments(name, tmp_path, IN_BFLOAT16, f'--epochs={EPOCHS}', *extra, steps=STEPS)
    losses, rollouts = losses_of(monkeypatch, STAGES[name], argv)
    pieces = len(losses) // (STEPS * EPOCHS)
    assert len(losses) == STEPS * EPOCHS * pieces
    assert pieces > 1 or '--micro_batch=1' not in extra
    for step in range(STEPS):
        updates = losses[step * EPOCHS * pieces:][:EPOCHS * pieces]
        first = updates[:pieces]
        for one in first:
            assert torch.equal(one.logp, one.old)
        for epoch in range(1, EPOCHS):
            later = updates[epoch * pieces:][:pieces]
            for one, begun in zip(later, first, strict=True):
                assert torch.equal(one.old, begun.logp)
            assert any(not torch.equal(one.logp, one.old) for one in later)
    assert all(line['ratio_max'] != 1 for line in lines(tmp_path / 'log.jsonl')), 'the last one'


@stages
def test_in_float32_the_recorded_log_prob_is_the_old_one_of_every_update(
        tmp_path, monkeypatch, name):
    argv = arguments(name, tmp_path, '--epochs=2', steps=1)
    (first, second), [recorded] = losses_of(monkeypatch, STAGES[name], argv)
    assert torch.equal(first.old, recorded)
    assert torch.equal(second.old, recorded)
    assert not torch.equal(first.logp, first.old)
