"""--old_logp=replay: the first update's log-prob is the old one of all updates on a rollout."""
import types

import pytest
import torch
import torch.nn.functional as F

from lib import optimiser, ranks
import grpo_decoder
import grpo_encoder
from bench.steps import shortened
from config import parse
from conftest import at
from model import UAE
from running import arguments, lines, tiny
from tools.plan import ARCHITECTURES, skeleton

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
    flags = [IN_BFLOAT16, f'--micro_batch={micro_batch}', f'--epochs={updates}', *extra]
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
    flags = ['--old_logp=recorded', IN_BFLOAT16, '--epochs=2']
    argv = arguments(name, tmp_path, *flags, steps=1)
    first, second = losses_of(monkeypatch, STAGES[name], argv)
    assert torch.equal(first.old, second.old)
    assert not torch.equal(first.logp, first.old)


# --- at true width, with another order of summation in the update ---------------------------------
LAYERS = 2
VOCABULARY = 2048               # the tiny tokenizer needs fewer; the real 151936 would take 1 GB
AT_TRUE_WIDTH = ['--preset=medium', '--resolution=64', '--cond_len=48', '--caption_len=16',
                 '--denoise_steps=6', '--micro_batch=2']
ONE_GROUP = ['--batch=1', '--group=4', '--lr=0']
FLOW = ['--sde=flow', '--noise_level=0.7', '--clip_range=(1e-4, 1e-4)', '--denoise_steps=10',
        '--noisy_steps=9', '--trained_steps=9']


def architectures():
    """The published ones with few layers, a small vocabulary, and a VAE that is never asked."""
    known = shortened(ARCHITECTURES, LAYERS)
    encoder = known['Qwen/Qwen2.5-VL-3B-Instruct']
    encoder.update(image_token_id=VOCABULARY - 1, video_token_id=VOCABULARY - 2,
                   vision_start_token_id=VOCABULARY - 3, vision_end_token_id=VOCABULARY - 4)
    encoder['text_config']['vocab_size'] = VOCABULARY
    decoder = known['stabilityai/stable-diffusion-3.5-medium']
    decoder['vae'].update(block_out_channels=(32,) * 4, layers_per_block=1)
    decoder['transformer'].update(pos_embed_max_size=32)
    return known


@pytest.fixture(scope='module')
def wide():
    """A model of the published widths with random weights, LoRA, in bfloat16: 1.2 GB."""
    ranks.quiet()
    config = parse({}, {}, AT_TRUE_WIDTH, 'x.py')
    return skeleton(config, 'cpu', architectures())


def rounded_linear(x, weight, bias=None):
    """F.linear of bfloat16 numbers, added up in float32 and rounded: what the hardware does.

    Where a CPU has no instructions for it, torch's own takes minutes at this width.
    """
    x, weight = x.bfloat16().float(), weight.bfloat16().float()
    with torch.autocast('cpu', enabled=False):
        y = F.linear(x, weight).bfloat16()
    if bias is not None:
        y = y + bias.bfloat16()
    return y


def whole(self, x):
    return rounded_linear(x, self.weight, self.bias)


def in_halves(self, x):
    """The first half of the inputs is added up, then the second.

    A GPU does the like when a batch has another shape.
    """
    half = self.in_features // 2
    first = rounded_linear(x[..., :half], self.weight[:, :half])
    return first + rounded_linear(x[..., half:], self.weight[:, half:], self.bias)


def random_rewards(x, x_hat, tower):
    g = torch.Generator().manual_seed(0)
    return torch.rand(len(x_hat), generator=g)


def first_updates(name, wide, monkeypatch, flags=()):
    """Log fields of a first update with --old_logp=replay, then =recorded, on one rollout."""
    stage = STAGES[name]
    argv = [*AT_TRUE_WIDTH, *ONE_GROUP, *flags]
    config = parse(stage.keys, stage.own_presets, argv, f'{name}.py')
    run = ranks.start(config)
    uae = at(wide, **vars(config))
    wide.requires_grad_(False)
    params = uae.train_only(name.removeprefix('grpo_'))
    monkeypatch.setattr(uae, 'to_image', lambda z: z[:, :3])
    monkeypatch.setattr(stage, 'clip_reward', random_rewards)
    monkeypatch.setattr(torch.nn.Linear, 'forward', whole)
    x = torch.rand(1, 3, config.resolution, config.resolution) * 2 - 1
    index = torch.zeros(1, dtype=torch.long)
    if name == 'grpo_encoder':
        seen, batch, r = stage.rollout(uae, None, x, index, 0, config)
        batch['ref_logp'] = batch['recorded']
        models = (uae,)
        given = (seen, batch)
    else:
        batch, r, _ = stage.rollout(uae, None, x, index, 0, config)
        models = (uae, uae)
        given = (None, batch)
    batch['adv'] = stage.group_advantage(r).flatten()
    fields = []
    monkeypatch.setattr(torch.nn.Linear, 'forward', in_halves)
    for config.old_logp in ('replay', 'recorded'):
        optimiser = optimiser.Optimiser(params, config)
        fields.append(stage.update(*models, optimiser, *given, 0, run, config))
    return fields


def rounding_counts_for_nothing(fields):
    return fields['ratio_max'] == 1 and fields['clip_frac'] == 0


@pytest.mark.parametrize('name, flags', [
    ('grpo_encoder', []), ('grpo_decoder', []), ('grpo_decoder', FLOW)])
def test_another_order_of_summation_is_no_policy_ratio(wide, monkeypatch, name, flags):
    """In bfloat16 at true width: exactly 1, and no sample loses its gradient to the clip.

    The same update with the recorded log-prob shows the need.
    """
    replay, recorded = first_updates(name, wide, monkeypatch, flags)
    assert rounding_counts_for_nothing(replay)
    assert replay['grad_norm'] > 0
    assert recorded['logp_diff'] == replay['logp_diff'] > 0
    assert not rounding_counts_for_nothing(recorded)
    if name == 'grpo_decoder' and not flags:     # the clip of flow is wider: it binds now and then
        assert recorded['clip_frac'] > 0
