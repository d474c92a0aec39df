"""--old_logp=replay: the first update's log-prob is the old one of all updates on a rollout."""
import types

import pytest
import torch

import grpo_decoder
import grpo_encoder
from config import parse
from model import UAE
from running import arguments, lines, tiny

STAGES = dict(grpo_encoder=grpo_encoder, grpo_decoder=grpo_decoder)
stages = pytest.mark.parametrize('name', STAGES)
MICRO = pytest.mark.parametrize('micro_batch', [0, 1])
IN_BFLOAT16 = '--dtype=bfloat16'


@pytest.fixture
def rounding(monkeypatch):
    """Rollouts of stage 3 round otherwise than its updates, as on a GPU; a CPU does not.

    Those of stage 2 do on a CPU too, since they decode with a cache.
    """
    draw_sde = UAE.draw_sde

    def rounded(*args, **other):
        z_0, path = draw_sde(*args, **other)
        path['recorded'] = path['recorded'].bfloat16().float()
        return z_0, path

    monkeypatch.setattr(UAE, 'draw_sde', rounded)


def first_line(name, out, *extra):
    return tiny(name, out, IN_BFLOAT16, *extra, steps=1)[0]


@MICRO
@stages
def test_in_bfloat16_rounding_is_no_policy_ratio(tmp_path, rounding, name, micro_batch):
    """The ratio is exactly 1; what the log calls logp_diff is still the recorded one's."""
    size = f'--micro_batch={micro_batch}'
    replay = first_line(name, tmp_path / 'replay', size)
    assert replay['ratio_max'] == 1
    assert replay['clip_frac'] == 0
    assert replay['grad_norm'] > 0

    recorded = first_line(name, tmp_path / 'recorded', size, '--old_logp=recorded')
    assert recorded['logp_diff'] == replay['logp_diff'] > 0
    assert recorded['ratio_max'] != 1


@stages
def test_replay_is_the_default_in_bfloat16_alone(name):
    stage = STAGES[name]
    for preset, flags, expected in (
            ('tiny', [], 'recorded'), ('tiny', [IN_BFLOAT16], 'replay'), ('medium', [], 'replay'),
            ('tiny', ['--old_logp=replay'], 'replay'),
            ('paper', ['--dtype=float32'], 'recorded'),
            ('paper', ['--old_logp=recorded'], 'recorded')):
        c = parse(stage.keys, stage.own_presets, [f'--preset={preset}', *flags], f'{name}.py')
        assert c.old_logp == expected


def losses_of(monkeypatch, stage, argv):
    """logp and old_logp of every micro-batch of a run, in order."""
    seen = []
    policy_loss = stage.policy_loss

    def spy(logp, old_logp, *args, **other):
        seen.append(types.SimpleNamespace(logp=logp.detach().clone(), old=old_logp.clone()))
        return policy_loss(logp, old_logp, *args, **other)

    monkeypatch.setattr(stage, 'policy_loss', spy)
    stage.main(argv)
    return seen


CASES = [
    ('grpo_encoder', []),
    ('grpo_decoder', []),
    ('grpo_decoder', ['--guidance=2.0']),
    ('grpo_decoder', ['--sde=cps', '--noise_level=0.8']),
]


@MICRO
@pytest.mark.parametrize('name, extra', CASES)
def test_later_updates_are_measured_against_the_first(
        tmp_path, monkeypatch, name, extra, micro_batch):
    """Three updates on each of two rollouts, each micro-batch against its own first log-prob."""
    updates, steps = 3, 2
    flags = [IN_BFLOAT16, f'--micro_batch={micro_batch}', f'--updates={updates}', *extra]
    argv = arguments(name, tmp_path, *flags, steps=steps)
    found = losses_of(monkeypatch, STAGES[name], argv)
    pieces = 4 if micro_batch else 1                        # two images, groups of two
    assert len(found) == steps * updates * pieces
    for step in range(steps):
        rollout = found[step * updates * pieces:][:updates * pieces]
        first = rollout[:pieces]
        for one in first:
            assert torch.equal(one.logp, one.old)
        for later in (rollout[pieces:2 * pieces], rollout[2 * pieces:]):
            for one, begun in zip(later, first, strict=True):
                assert torch.equal(one.old, begun.logp)
            assert any(not torch.equal(one.logp, one.old) for one in later)
    assert all(line['ratio_max'] != 1 for line in lines(tmp_path / 'log.jsonl')), 'the last one'


@stages
def test_recorded_stays_the_old_log_prob_of_every_update(
        tmp_path, monkeypatch, rounding, name):
    flags = ['--old_logp=recorded', IN_BFLOAT16, '--updates=2']
    argv = arguments(name, tmp_path, *flags, steps=1)
    first, second = losses_of(monkeypatch, STAGES[name], argv)
    assert torch.equal(first.old, second.old)
    assert not torch.equal(first.logp, first.old)
