"""Rollout and update as a whole, against a plain recomputation: one sample at a time, in loops.

Whose noise is whose (an address each), whose reward is whose, which equation goes into the loss and
with what weight, what a bad gradient may change, and what t2i of true captions is drawn from.
"""
import copy

import numpy as np
import pytest
import torch
from conftest import G, P, at, uniforms
from PIL import Image
from running import ALONE, Recorder, arguments, lines, refusal, tiny

import cold_start
import encoder
import grpo_decoder
import grpo_encoder
from config import parse
from data.images import open_data
from data.shapes import scenes
from decoder import sde_step
from lib import ranks
from lib.scores import Evaluator
from reward import backbone, clip_reward

INDEX = torch.tensor([5, 2, 9, 4])               # positions of the P images in the global batch
STEP = 3
IMAGES, GROUP = 2, 3                             # where it is recomputed one by one
# a short chain: few denoising steps are noisy, and of these one is trained
SHORT = ('--denoise_steps=6', '--noisy_steps=2', '--trained_steps=1')
CLOSE = dict(atol=2e-5, rtol=1e-4)


# --- how the project is called here ---------------------------------------------------------------
def stage_config(stage, *argv):
    limits = stage.limits
    return parse(stage.keys, stage.own_presets, list(argv), f'{stage.__name__}.py', limits)


def as_stage(uae, stage, *argv):
    """The shared model as a stage uses it, and the configuration."""
    config = stage_config(stage, *argv)
    return at(uae, **vars(config)), config


def batch(x, index, captions=None):
    return dict(x=x, index=index, captions=captions)


def decoder_rollout(u, tower, images, step, config):
    """Stage 3's rollout -> what it stores, with the rewards r and the captions y."""
    negative = u.negative() if config.guidance != 1 else None
    found, r, (y, _) = grpo_decoder.rollout(u, tower, images, step, config, negative)
    return dict(found, r=r, y=y)


def window(u, step, config):
    sigmas = u.decoder.sigmas(config.denoise_steps)
    return grpo_decoder.window(step, config, sigmas)


@pytest.fixture(scope='module')
def tower(uae):
    return backbone('clip', uae.config)


# --- addressed randomness, a row at a time --------------------------------------------------------
def normal_at(shape, *address):
    return torch.randn(shape, generator=ranks.generator(*address))[None]


def uniform_at(shape, *address):
    return torch.rand(shape, generator=ranks.generator(*address))[None]


def told_apart(r):
    """Whether no two rewards are so near that one could stand for the other."""
    return torch.pdist(r.reshape(-1, 1)).min() > 1e-4


# --- a stage, plainly -----------------------------------------------------------------------------
@torch.no_grad()
def plain_captions(uae, tower, images, step, config):
    """Stage 2's rollout, a caption at a time: [(vision, y, mask, logp, r)] in B's order.

    One start noise per image, which its group shares; a uniform per member and token.
    """
    samples = []
    for i, place in enumerate(images['index'].tolist()):
        x = images['x'][i:i + 1]
        vision = uae.encoder.see(x)
        z = normal_at(uae.decoder.latent_shape(), config.seed, 'start', step, place)
        for j in range(config.group):
            member = place * config.group + j
            u = uniform_at((config.caption_len,), config.seed, 'token', step, member)
            y, mask, logp = uae.encoder.sample(vision, 1, config.temperature, u)
            x_hat = uae.draw(z, uae.condition(y, mask, vision), config.denoise_steps)
            samples.append((vision, y, mask, logp, clip_reward(x, x_hat, tower)))
    return samples


def plain_velocity(uae, z, s, c, v0, config):
    """v_theta under guidance, whose unconditional branch is v0."""
    return v0 + config.guidance * (uae.decoder.velocity(z, s, c) - v0)


@torch.no_grad()
def plain_drawing(uae, z, c, noise, noisy, config):
    """One drawing, a step at a time: z_0, and of its noisy steps {i: (z, z_next, v0, logp)}."""
    sigmas, negative = uae.decoder.sigmas(config.denoise_steps), uae.negative()
    path = {}
    for i in range(config.denoise_steps):
        v0 = uae.decoder.velocity(z, sigmas[i], negative)
        v = plain_velocity(uae, z, sigmas[i], c, v0, config)
        z_next = z + (sigmas[i + 1] - sigmas[i]) * v
        if noisy[0] <= i < noisy[1]:
            fresh = noise[:, i - noisy[0]]
            z_next, logp, _, _ = sde_step(
                z, v, sigmas[i], sigmas[i + 1], config.sde, config.noise_level, noise=fresh)
            path[i] = (z, z_next, v0, logp)
        z = z_next
    return z, path


@torch.no_grad()
def plain_drawings(uae, tower, images, step, config):
    """Stage 3's rollout, a drawing at a time: [(c, path, r)] in B's order.

    With same_noise the group shares its start noise, never that of the steps.
    """
    noisy, _ = window(uae, step, config)
    shape, W = uae.decoder.latent_shape(), noisy[1] - noisy[0]
    samples = []
    for i, place in enumerate(images['index'].tolist()):
        x = images['x'][i:i + 1]
        vision = uae.encoder.see(x)
        y, mask, _ = uae.encoder.sample(vision, 1, 0.0)
        c = uae.condition(y, mask, vision)
        for j in range(config.group):
            member = place * config.group + j
            z = normal_at(shape, config.seed, 'start', step, place if config.same_noise else member)
            noise = normal_at((W, *shape), config.seed, 'sde', step, member)
            z_0, path = plain_drawing(uae, z, c, noise, noisy, config)
            samples.append((c, path, clip_reward(x, uae.decoder.to_image(z_0), tower)))
    return samples


def plain_advantages(samples, step, config):
    """(R - mean) / (std + 1e-4) in each group, a list in B's order."""
    rewards = torch.cat([r for *_, r in samples])
    assert told_apart(rewards)
    if config.shuffle_reward:
        rewards = ranks.permuted(rewards, config.seed, 'shuffle', step)
    advantages = []
    for r in rewards.split(config.group):
        std = r.std() + 1e-4 if getattr(config, 'adv_std', True) else 1
        advantages += ((r - r.mean()) / std).tolist()
    return advantages


def plain_gain(logp, old_logp, adv, config):
    """min(ratio A, clip(ratio) A) of one sample's tokens or steps (n,)."""
    log_ratio = logp - old_logp
    if config.ratio == 'sequence':
        log_ratio = log_ratio.mean().expand_as(log_ratio)
    ratio = log_ratio.exp()
    low, high = config.clip_range
    return torch.min(ratio * adv, ratio.clamp(1 - low, 1 + high) * adv)


def plain_encoder_loss(uae, reference, samples, step, config):
    """Minus the mean over tokens, as loss_mean has it, of the surrogate without its k3."""
    of_captions = []
    advantages = plain_advantages(samples, step, config)
    for (vision, y, mask, old_logp, _), adv in zip(samples, advantages):
        n = int(mask.sum())
        logp = uae.encoder.logp(vision, y, config.temperature)[0, :n]
        with torch.no_grad():
            ref_logp = reference.encoder.logp(vision, y, config.temperature)[0, :n]
        k3 = (ref_logp - logp).exp() - (ref_logp - logp) - 1
        of_captions.append(plain_gain(logp, old_logp[0, :n], adv, config) - config.kl * k3)
    if config.loss_mean == 'caption':
        return -torch.stack([gain.mean() for gain in of_captions]).mean()
    tokens = torch.cat(of_captions)
    count = len(tokens) if config.loss_mean == 'token' else len(samples) * config.caption_len
    return -tokens.sum() / count


def plain_decoder_loss(uae, reference, samples, step, config, stale=False):
    """Minus the mean over drawings and trained steps of the surrogate without the Gaussian KL.

    The unconditional branch is that of the present weights; stale: of the rollout's.
    """
    _, trained = window(uae, step, config)
    sigmas, negative = uae.decoder.sigmas(config.denoise_steps), uae.negative()
    terms = []
    for (c, path, _), adv in zip(samples, plain_advantages(samples, step, config)):
        logps, kls = [], []
        for i in trained:
            z, z_next, v0, _ = path[i]
            if not stale:
                with torch.no_grad():
                    v0 = uae.decoder.velocity(z, sigmas[i], negative)
            v = plain_velocity(uae, z, sigmas[i], c, v0, config)
            at_step = (sigmas[i], sigmas[i + 1], config.sde, config.noise_level)
            _, logp, mean, std = sde_step(z, v, *at_step, z_next=z_next)
            with torch.no_grad():
                v0 = reference.decoder.velocity(z, sigmas[i], negative)
                v = plain_velocity(reference, z, sigmas[i], c, v0, config)
            ref_mean = sde_step(z, v, *at_step)[2]
            kls.append((mean - ref_mean).square().mean() / (2 * std.squeeze() ** 2))
            logps.append(logp[0])
        old_logp = torch.stack([path[i][3][0] for i in trained])
        gain = plain_gain(torch.stack(logps), old_logp, adv, config)
        terms.append(gain - config.kl * torch.stack(kls))
    return -torch.cat(terms).mean()


# --- rollout: whose reward is whose ---------------------------------------------------------------
def test_captions_are_sampled_together_or_in_whole_groups(uae, vision, sampled, monkeypatch):
    """Whatever micro_batch is, by CAPTIONS_AT_ONCE: the captions are the same."""
    sizes = []
    together = encoder.Encoder.sample_together

    def spied(self, vision, G, *rest):
        sizes.append(len(vision['grid']) * G)
        return together(self, vision, G, *rest)

    monkeypatch.setattr(encoder.Encoder, 'sample_together', spied)
    u = at(uae, micro_batch=1)
    for most in (encoder.CAPTIONS_AT_ONCE, 2 * G + 1, 1):
        monkeypatch.setattr(encoder, 'CAPTIONS_AT_ONCE', most)
        y, _, _ = u.encoder.sample(vision, G, 1.0, uniforms(P * G, uae.config.caption_len))
        assert torch.equal(y, sampled[0])
    assert sizes == [P * G] + P // 2 * [2 * G] + P * [G]


def test_rewards_of_stage_2_belong_to_their_image_and_caption(uae, x, tower):
    hot = '--temperature=2'                      # captions that differ, hence rewards
    u, config = as_stage(uae, grpo_encoder, f'--group={GROUP}', hot, '--micro_batch=4')
    images = batch(x[:IMAGES], INDEX[:IMAGES])
    found, r, _ = grpo_encoder.rollout(u, tower, images, STEP, config)
    assert r.shape == (IMAGES, GROUP)
    assert told_apart(r)
    for b, (_, y, mask, logp, own) in enumerate(plain_captions(u, tower, images, STEP, config)):
        assert torch.equal(found['y'][b:b + 1], y)
        assert torch.equal(found['mask'][b:b + 1], mask)
        torch.testing.assert_close(found['recorded'][b:b + 1], logp, **CLOSE)
        torch.testing.assert_close(r[b // GROUP, b % GROUP], own[0], **CLOSE)
    part, part_r, _ = grpo_encoder.rollout(u, tower, batch(x[1:2], INDEX[1:2]), STEP, config)
    assert torch.equal(part['y'], found['y'][GROUP:]), 'some of the images, as on another rank'
    torch.testing.assert_close(part_r, r[1:], **CLOSE)


@pytest.mark.parametrize('argv', [
    ('--guidance=1.0', '--same_noise=True', *SHORT),
    ('--guidance=2.0', '--same_noise=False', '--micro_batch=4', *SHORT),
    ('--sde=cps', '--noisy_steps=4', '--trained_steps=2', '--micro_batch=4'),
], ids=' '.join)
def test_rewards_of_stage_3_belong_to_their_image_and_drawing(uae, x, tower, argv):
    """And its stored steps are the trained ones."""
    u, config = as_stage(uae, grpo_decoder, f'--group={GROUP}', *argv)
    images = batch(x[:IMAGES], INDEX[:IMAGES])
    (begin, end), trained = window(u, STEP, config)
    assert len(trained) < end - begin
    found = decoder_rollout(u, tower, images, STEP, config)
    assert found['r'].shape == (IMAGES, GROUP)
    assert told_apart(found['r'])
    for b, (c, path, r) in enumerate(plain_drawings(u, tower, images, STEP, config)):
        steps = (torch.cat(column) for column in zip(*(path[i] for i in trained)))
        expected = dict(zip(('z', 'z_next', 'v0', 'recorded'), steps), c=c[0])
        if config.guidance == 1:
            assert expected.pop('v0') is not None and 'v0' not in found
        for name, value in expected.items():
            torch.testing.assert_close(found[name][b], value, **CLOSE)
        torch.testing.assert_close(found['r'][b // GROUP, b % GROUP], r[0], **CLOSE)
    part = decoder_rollout(u, tower, batch(x[1:2], INDEX[1:2]), STEP, config)
    torch.testing.assert_close(part['z'], found['z'][GROUP:], **CLOSE)
    torch.testing.assert_close(part['r'], found['r'][1:], **CLOSE)


# --- captions that come with the images -----------------------------------------------------------
def test_given_captions_are_what_is_drawn(uae, x, tower):
    texts = ['large red circle', 'small blue square top-left', '', 'cyan cross']
    y, mask, _ = uae.encoder.tokens(texts)
    images = batch(x, INDEX, texts)
    u, config = as_stage(uae, cold_start, '--captions=given')
    sampled, _ = cold_start.rollout(u, images, STEP, config)
    assert torch.equal(sampled['y'], y) and torch.equal(sampled['mask'], mask)
    u, config = as_stage(uae, grpo_decoder, '--captions=given', f'--group={G}', *SHORT)
    found = decoder_rollout(u, tower, images, STEP, config)
    assert torch.equal(found['y'], y)
    with torch.no_grad():
        c = u.condition(y, mask).repeat_interleave(G, 0)
    torch.testing.assert_close(found['c'], c, **CLOSE)


@pytest.mark.parametrize('name', ['cold_start', 'grpo_decoder', 'nft_decoder'])
def test_given_captions_of_a_folder(tmp_path, name):
    """Images without one are left out; where none has one, a line says so."""
    folder = tmp_path / 'images'
    folder.mkdir()
    scene = scenes.random_scene(np.random.default_rng(0))
    for i in range(8):
        Image.fromarray(scenes.draw(scene)).save(folder / f'{i}.png')
        if i % 2:
            (folder / f'{i}.txt').write_text('large red circle')
    flags = ['--captions=given', f'--data={folder}', '--eval_images=2']
    log = tiny(name, tmp_path / 'out', *flags)
    assert [line['caption_len'] for line in log] == [3, 3]
    said = refusal(tiny, name, tmp_path / 'none', '--captions=given')
    assert 'none of the' in said and 'has a caption' in said


# --- a training step ------------------------------------------------------------------------------
def train(stage, monkeypatch, out_dir, *extra, steps=1, spoil=None):
    """A real run of the stage's script in this process -> Recorder, its configuration, its log."""
    argv = arguments(stage.__name__, out_dir, f'--group={GROUP}', '--warmup=0', *extra,
                     steps=steps, images=IMAGES)
    recorder = Recorder(monkeypatch, spoil)
    stage.main(argv)
    return recorder, stage_config(stage, *argv), lines(out_dir / 'log.jsonl')


def gradient_error(recorder, update, loss):
    """How far the update's gradient is from that of `loss` at the same weights, relatively."""
    recorder.uae.zero_grad()
    loss.backward()
    off = size = 0
    for name, p in recorder.uae.named_parameters():
        if p.requires_grad:
            off += (update.grads[name] - p.grad).square().sum().item()
            size += p.grad.square().sum().item()
    assert size > 0
    return (off / size) ** 0.5


def check_updates(recorder, config, log, rollout, loss_of):
    """The second update on one rollout, the first on the next, against the loss written out.

    rollout(uae, images, step) and loss_of(uae, reference, samples, step) recompute them; the
    reference has the weights that the run began with.
    """
    images = open_data(config, ALONE)[0]
    first, *_ = recorder.updates
    recorder.back_to(first)
    reference = copy.deepcopy(recorder.uae)
    for step in range(2):
        images_of_step = images.batch(config.seed, step, config.batch)
        recorder.back_to(recorder.updates[2 * step])
        samples = rollout(recorder.uae, images_of_step, step)
        update = recorder.updates[1 + step]
        recorder.back_to(update)
        loss = loss_of(recorder.uae, reference, samples, step)
        assert gradient_error(recorder, update, loss) < 1e-3
        if step == 0:                            # the log has the last update's
            assert log[step]['loss'] == pytest.approx(loss.item(), rel=1e-3, abs=2e-5)
        rewards = torch.cat([r for *_, r in samples])
        assert log[step]['reward'] == pytest.approx(rewards.mean().item(), abs=1e-5)
        assert log[step]['logp_diff'] < 2e-5
    assert 0 < log[0]['clip_frac'] < 1 and log[1]['kl'] > 0, 'or these terms are not tested'


@pytest.mark.parametrize('argv', [
    ('--micro_batch=0', '--clip_range=(0.02, 0.1)'),
    ('--micro_batch=3', '--clip_range=(0.01, 0.02)', '--loss_mean=caption', '--ratio=sequence'),
    ('--micro_batch=2', '--clip_range=(0.02, 0.1)', '--loss_mean=constant', '--adv_std=False',
     '--shuffle_reward=True'),
], ids=' '.join)
def test_a_step_of_stage_2_against_its_plain_recomputation(monkeypatch, tmp_path, argv):
    """All at once, whole groups, parts of a group."""
    out = tmp_path / 'out'
    flags = (*argv, '--epochs=2', '--kl=0.5', '--denoise_steps=8')
    recorder, config, log = train(grpo_encoder, monkeypatch, out, *flags, steps=2)
    tower = backbone('clip', config)
    check_updates(recorder, config, log,
                  lambda uae, images, step: plain_captions(uae, tower, images, step, config),
                  lambda *args: plain_encoder_loss(*args, config))


@pytest.mark.parametrize('argv', [
    ('--micro_batch=0', *SHORT),
    ('--micro_batch=3', '--denoise_steps=4', '--ratio=sequence', '--sde=cps_exact'),
    ('--micro_batch=2', '--denoise_steps=3', '--shuffle_reward=True'),
], ids=' '.join)
def test_a_step_of_stage_3_against_its_plain_recomputation(monkeypatch, tmp_path, argv):
    """With guidance: each update after a rollout's first has an unconditional branch of its own."""
    flags = (*argv, '--epochs=2', '--guidance=3', '--kl=0.5', '--clip_range=(1e-3, 2e-3)')
    recorder, config, log = train(grpo_decoder, monkeypatch, tmp_path / 'out', *flags, steps=2)
    tower, samples = backbone('clip', config), []

    def rollout(uae, images, step):
        samples.append(plain_drawings(uae, tower, images, step, config))
        return samples[-1]

    check_updates(recorder, config, log, rollout, lambda *args: plain_decoder_loss(*args, config))
    first, second, *_ = recorder.updates
    recorder.back_to(first)
    reference = copy.deepcopy(recorder.uae)
    recorder.back_to(second)
    stale = plain_decoder_loss(recorder.uae, reference, samples[0], 0, config, stale=True)
    assert gradient_error(recorder, second, stale) > 1e-2, 'this test would not see a stale branch'


def passes_of(update, part='decoder.transformer'):
    """[(autograd on, rows)] of an update's forward passes, the rollout before it included."""
    return [(grad, rows) for name, _, grad, rows in update.passes if name == part]


@pytest.mark.parametrize('micro_batch', [0, 3, 2])
def test_the_stored_branch_spares_the_first_update_its_passes(monkeypatch, tmp_path, micro_batch):
    flags = (f'--micro_batch={micro_batch}', '--epochs=2', '--guidance=3', *SHORT)
    recorder, config, _ = train(grpo_decoder, monkeypatch, tmp_path / 'out', *flags)
    first, second = ([grad for grad, _ in passes_of(update)] for update in recorder.updates)
    B = IMAGES * GROUP
    rollout = -(-2 * B // (micro_batch or 2 * B)) * config.denoise_steps
    live = {0: 1, 3: 2, 2: 4}[micro_batch]       # of these none holds parts of two groups
    assert first == [False] * rollout + [True] * live
    assert second == [False, True] * live


# --- micro-batches --------------------------------------------------------------------------------
@pytest.mark.parametrize('P', [1, 3])
@pytest.mark.parametrize('G', [1, 4, 5])
@pytest.mark.parametrize('n', [1, 3])
@pytest.mark.parametrize('size', [0, 1, 2, 3, 7, 12, 100])
def test_step_slices(P, G, n, size):
    """Every (sample, step) once, the last marked once, sizes bounded, groups whole if they fit."""
    met = torch.zeros(P * G, n)
    marks = []
    for rows, steps, last in ranks.step_slices(P, G, n, size):
        met[rows, steps] += 1
        marks.append(last)
        samples, in_piece = rows.stop - rows.start, steps.stop - steps.start
        assert not size or samples * in_piece <= size
        if not size or size >= n:
            assert in_piece == n, "a sample's steps stay together where they fit"
        whole = rows.start % G == 0 and samples % G == 0
        assert whole or rows.start // G == (rows.stop - 1) // G, 'never parts of two groups'
        assert whole or 0 < size < n * G, 'whole ones where they fit'
    assert (met == 1).all()
    assert marks == [False] * (len(marks) - 1) + [True]


STEPS_3 = ('--noisy_steps=3', '--trained_steps=3', '--guidance=2', '--kl=0.1')


@pytest.mark.parametrize('ratio', ['step', 'sequence'])
def test_micro_batches_of_steps_change_nothing(monkeypatch, tmp_path, ratio):
    """micro_batch 1 of three trained steps: the gradient of all at once, and never more rows.

    A ratio of sequences needs all steps of a drawing together: three rows.
    """
    grads, logs = [], []
    for size in (0, 1):
        with monkeypatch.context() as patch:
            recorder, _, log = train(grpo_decoder, patch, tmp_path / str(size), *STEPS_3,
                                     f'--ratio={ratio}', f'--micro_batch={size}')
        grads.append(recorder.updates[0].grads)
        logs.append(log[0])
    live = {rows for grad, rows in passes_of(recorder.updates[0]) if grad}
    others = {rows for grad, rows in passes_of(recorder.updates[0]) if not grad}
    assert others == {1}
    assert live == {1 if ratio == 'step' else 3}
    assert {rows for _, rows in passes_of(recorder.updates[0], 'decoder.vae.decoder')} == {1}
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).norm() < 1e-3 * grad.norm() + 1e-7, name
    for field in ('loss', 'reward', 'ratio_max', 'clip_frac', 'kl'):
        assert logs[1][field] == pytest.approx(logs[0][field], rel=1e-4, abs=1e-5), field


@pytest.mark.parametrize('stage', [grpo_encoder, grpo_decoder], ids=lambda stage: stage.__name__)
def test_a_step_with_a_non_finite_gradient_changes_no_weight(monkeypatch, tmp_path, stage):
    """The second of three updates: nothing moves, the moments of the optimiser neither spoil."""
    recorder, _, log = train(stage, monkeypatch, tmp_path / 'out', steps=3, spoil=1)
    good, bad, later = recorder.updates
    assert not all(grad.isfinite().all() for grad in bad.grads.values())
    for name, value in bad.after.items():
        assert torch.equal(value, bad.before[name]), name
    assert [line['bad_steps'] for line in log] == [0, 1, 0]
    for update in (good, later):
        for name in update.grads:
            assert not torch.equal(update.after[name], update.before[name]), name
        assert all(value.isfinite().all() for value in update.after.values())


# --- evaluation -----------------------------------------------------------------------------------
def draughtsman(uae, held_out, told):
    """A stand-in that draws exactly what a caption says, in the embedded world.

    It captions scene i with the caption of told[i].
    """
    u = at(uae)
    drawings = {scenes.caption(scene): torch.as_tensor(scenes.pixels([scene]))
                for scene in (*held_out['scenes'], *told)}

    def see(x):
        """Which held-out image each one is."""
        return [int((held_out['x'] - image).abs().flatten(1).amax(1).argmin()) for image in x]

    def sample(rows, *rest):
        y, mask, _ = u.encoder.tokens([scenes.caption(told[row]) for row in rows])
        return y, mask, torch.zeros_like(mask)

    u.encoder.see = see
    u.encoder.sample = sample
    u.condition = lambda y, mask, vision=None: u.encoder.texts(y, mask)
    u.draw = lambda z, texts, S: torch.cat([drawings[text] for text in texts])
    return u


def test_t2i_of_true_captions_is_drawn_from_the_true_captions(uae):
    """A model that draws perfectly and captions every image as another one."""
    u, config = as_stage(uae, grpo_encoder, '--eval_images=6')
    _, held_out = open_data(config, ALONE)
    rng = np.random.default_rng(5)
    told = [scenes.random_scene(rng) for _ in range(6)]
    evaluator = Evaluator(draughtsman(u, held_out, told), held_out, config, ALONE)
    summary, records = evaluator()
    assert [record['read_true'] for record in records] == held_out['scenes']
    assert [record['read_own'] for record in records] == told
    assert [record['caption'] for record in records] == [scenes.caption(scene) for scene in told]
    rows = [4, 1, 5]
    some = evaluator.records(rows)
    assert [record['read_true'] for record in some] == [held_out['scenes'][i] for i in rows]
    assert [record['read_own'] for record in some] == [told[i] for i in rows]
    assert summary['t2i_true'] == 1.0
    assert summary['t2i_own'] == scenes.t2i_of_readings(told, held_out['scenes']) < 0.9
