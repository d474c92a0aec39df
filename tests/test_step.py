"""Rollout and update as a whole, against a plain recomputation: one sample at a time, in loops.

Whose noise is whose, whose reward is whose, when the stored unconditional branch is used, what a
bad gradient may change, and what t2i of true captions is drawn from.
"""
import copy
import types

import numpy as np
import pytest
import torch
from conftest import G, P, at
from running import arguments

from lib import optimiser, ranks
import config
import grpo_decoder
import grpo_encoder
from data.images import open_data
from data.shapes import scenes
from lib.scores import Evaluator
from model import sde_step
from reward import backbone, clip_reward

STAGES = (grpo_encoder, grpo_decoder)
INDEX = torch.tensor([5, 2, 9, 4])               # positions of the P images in the global batch
STEP = 3


# --- how the project is called here ---------------------------------------------------------------
def stage_config(stage, *argv):
    return config.parse(stage.keys, stage.own_presets, list(argv), f'{stage.__name__}.py')


def encoder_rollout(uae, tower, x, index, step, c):
    """Stage 2's rollout by name: y, mask, old_logp (B, T), r (P, G)."""
    _, batch, r = grpo_encoder.rollout(uae, tower, x, index, step, c)
    return dict(y=batch['y'], mask=batch['mask'], old_logp=batch['recorded'], r=r)


def decoder_rollout(uae, tower, x, index, step, c):
    """Stage 3's rollout by name: cond, z, z_next (B, W, C, H, W), old_logp (B, W), r (P, G).

    With guidance also v0, like z.
    """
    neg = None
    if c.guidance != 1:
        neg = uae.negative()
    batch, r, _ = grpo_decoder.rollout(uae, tower, x, index, step, c, neg)
    return dict(batch, old_logp=batch['recorded'], r=r)


def replayed(uae, found, c, step):
    """Mean and standard deviation of every noisy step of a stage 3 rollout without guidance."""
    noisy, _ = grpo_decoder.window(step, c)
    path = dict(z=found['z'], z_next=found['z_next'])
    steps = list(range(noisy[1] - noisy[0]))
    how = (c.denoise_steps, c.sde, c.noise_level, noisy[0])
    _, mean, std = uae.decoder.step_logp(path, steps, found['cond'], *how)
    return mean, std


def new_evaluator(uae, held, c):
    towers = {name: backbone(name, c) for name in ('clip', 'judge')}
    named = dict(reward=towers['clip'], judge=towers['judge'])
    run = types.SimpleNamespace(rank=0, world=1, device='cpu', master=True)
    return Evaluator(uae, held, c, run, named)


# --- addressed randomness, a row at a time --------------------------------------------------------
def normal_at(shape, *address):
    return torch.randn(shape, generator=ranks.generator(*address))[None]


def uniform_at(shape, *address):
    return torch.rand(shape, generator=ranks.generator(*address))[None]


def independent(rows):
    """Whether the rows (n, ...) are pairwise as far apart as independent standard normals are."""
    rows = rows.flatten(1)
    usual = (2 * rows.shape[1]) ** 0.5
    return bool((torch.pdist(rows) > 0.7 * usual).all())


# --- a stage, plainly -----------------------------------------------------------------------------
@torch.no_grad()
def plain_captions(uae, tower, x, index, step, c):
    """Stage 2's rollout, a caption at a time: [(image seen, y, mask, old_logp, r)] in B's order."""
    samples = []
    for i, place in enumerate(index.tolist()):
        image = x[i:i + 1]
        seen = uae.encoder.see(image)
        z = normal_at(uae.decoder.latent_shape(), c.seed, 'start', step, place)
        for j in range(c.group):
            u = uniform_at((c.caption_len,), c.seed, 'token', step, place * c.group + j)
            y, mask, logp = uae.encoder.sample(seen, 1, c.temperature, u)
            x_hat = uae.decoder.to_image(uae.draw(z, uae.condition(y, mask, seen), c.denoise_steps))
            samples.append((seen, y, mask, logp, clip_reward(image, x_hat, tower)))
    return samples


def guided(v, v0, guidance):
    return v0 + guidance * (v - v0)


@torch.no_grad()
def plain_drawing(uae, z, cond, noise, noisy, c):
    """One drawing, a step at a time: z_0, and [(z, z_next, v0, logp)] of its noisy steps."""
    sig, neg = uae.decoder.sigmas(c.denoise_steps), uae.negative()
    path = []
    for s in range(c.denoise_steps):
        v0 = uae.decoder.velocity(z, sig[s], neg)
        v = guided(uae.decoder.velocity(z, sig[s], cond), v0, c.guidance)
        if noisy[0] <= s < noisy[1]:
            fresh = noise[:, s - noisy[0]]
            z_next, logp, _, _ = sde_step(
                z, v, sig[s], sig[s + 1], c.sde, c.noise_level, noise=fresh)
            path.append((z, z_next, v0, logp))
        else:
            z_next = z + (sig[s + 1] - sig[s]) * v
        z = z_next
    return z, path


@torch.no_grad()
def plain_drawings(uae, tower, x, index, step, c):
    """Stage 3's rollout, a drawing at a time: [(cond, path, r)] in B's order."""
    noisy, _ = grpo_decoder.window(step, c)
    shape, W = uae.decoder.latent_shape(), noisy[1] - noisy[0]
    samples = []
    for i, place in enumerate(index.tolist()):
        image = x[i:i + 1]
        seen = uae.encoder.see(image)
        u = uniform_at((c.caption_len,), c.seed, 'token', step, place)
        y, mask, _ = uae.encoder.sample(seen, 1, c.caption_temperature, u)
        cond = uae.condition(y, mask, seen)
        for j in range(c.group):
            member = place * c.group + j
            start = place if c.same_noise else member
            z = normal_at(shape, c.seed, 'start', step, start)
            noise = normal_at((W, *shape), c.seed, 'sde', step, member)
            z0, path = plain_drawing(uae, z, cond, noise, noisy, c)
            r = clip_reward(image, uae.decoder.to_image(z0), tower)
            samples.append((cond, path, r))
    return samples


def plain_advantages(rewards, group):
    """(R - mean) / (std + 1e-4) in each group, a list in B's order."""
    advantages = []
    for first in range(0, len(rewards), group):
        r = torch.cat(rewards[first:first + group])
        advantages += ((r - r.mean()) / (r.std() + 1e-4)).tolist()
    return advantages


def surrogate(logp, old_logp, adv, clip):
    ratio = (logp - old_logp).exp()
    return torch.min(ratio * adv, ratio.clamp(1 - clip[0], 1 + clip[1]) * adv)


def plain_encoder_loss(uae, samples, c):
    """Minus the mean over the step's tokens of the clipped surrogate."""
    advantages = plain_advantages([r for *_, r in samples], c.group)
    total = count = 0
    for (seen, y, mask, old_logp, _), adv in zip(samples, advantages):
        logp = uae.encoder.logp(seen, y, c.temperature)
        total = total + (surrogate(logp, old_logp, adv, c.clip_range) * mask).sum()
        count += mask.sum()
    return -total / count


def plain_decoder_loss(uae, samples, step, c, stale=False):
    """Minus the mean over drawings and trained steps of the clipped surrogate.

    The unconditional branch is that of the present weights; stale: of the rollout's.
    """
    advantages = plain_advantages([r for *_, r in samples], c.group)
    noisy, trained = grpo_decoder.window(step, c)
    sig, neg = uae.decoder.sigmas(c.denoise_steps), uae.negative()
    gains = []
    for (cond, path, _), adv in zip(samples, advantages):
        for t in trained:
            z, z_next, v0, old_logp = path[t]
            s, s_next = sig[noisy[0] + t], sig[noisy[0] + t + 1]
            if not stale:
                with torch.no_grad():
                    v0 = uae.decoder.velocity(z, s, neg)
            v = guided(uae.decoder.velocity(z, s, cond), v0, c.guidance)
            _, logp, _, _ = sde_step(z, v, s, s_next, c.sde, c.noise_level, z_next=z_next)
            gains.append(surrogate(logp, old_logp, adv, c.clip_range))
    return -torch.cat(gains).mean()


# --- rollout: noise -------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def tower(uae):
    return backbone('clip', uae.config)


def stage_2(uae, *argv):
    """The shared model as stage 2 uses it, and the configuration."""
    c = stage_config(grpo_encoder, f'--group={G}', *argv)
    return at(uae, **vars(c)), c


def stage_3(uae, *argv):
    c = stage_config(grpo_decoder, f'--group={G}', *argv)
    return at(uae, **vars(c)), c


def encoder_start_noise(uae, tower, x, index, step, c):
    """The start noise that a rollout of stage 2 draws from: (P, G, C, H, W)."""
    u, starts = copy.copy(uae), []

    def draw(z, *rest):
        starts.append(z)
        return uae.draw(z, *rest)

    u.draw = draw
    encoder_rollout(u, tower, x, index, step, c)
    return torch.cat(starts).unflatten(0, (len(x), c.group))


def test_stage_2_has_one_start_noise_per_image_which_its_group_shares(uae, x, tower):
    u, c = stage_2(uae)
    z = encoder_start_noise(u, tower, x, INDEX, STEP, c)
    assert torch.equal(z, z[:, :1].expand_as(z)), 'the group shares it'
    later = encoder_start_noise(u, tower, x, INDEX, STEP + 1, c)
    assert independent(torch.cat([z[:, 0], later[:, 0]])), 'every image and every step its own'
    for i, place in enumerate(INDEX.tolist()):
        own = normal_at(u.latent_shape(), c.seed, 'start', STEP, place)
        assert torch.equal(z[i, :1], own)


def decoder_noises(uae, tower, x, index, step, c):
    """Start noise (P, G, C, H, W) of a rollout of stage 3, and that of its steps (P, G, W, ...)."""
    found = decoder_rollout(uae, tower, x, index, step, c)
    first = grpo_decoder.window(step, c)[0][0]
    assert first == 0, 'the first stored latent is the start noise'
    with torch.no_grad():
        mean, std = replayed(uae, found, c, step)
    noise = (found['z_next'] - mean) / std
    groups = (len(x), c.group)
    return found['z'][:, 0].unflatten(0, groups), noise.unflatten(0, groups)


def test_stage_3_has_its_own_start_noise_for_every_member(uae, x, tower):
    u, c = stage_3(uae)
    z, _ = decoder_noises(u, tower, x, INDEX, STEP, c)
    later, _ = decoder_noises(u, tower, x, INDEX, STEP + 1, c)
    assert independent(torch.cat([z, later]).flatten(0, 1))


def test_stage_3_with_same_noise_shares_the_start_alone(uae, x, tower):
    u, c = stage_3(uae, '--same_noise=True')
    z, noise = decoder_noises(u, tower, x, INDEX, STEP, c)
    assert torch.equal(z, z[:, :1].expand_as(z))
    assert independent(z[:, 0])
    assert independent(noise.flatten(0, 2)), 'or the group would hold one drawing G times'


def test_stage_3_has_its_own_noise_for_every_step(uae, x, tower):
    u, c = stage_3(uae)
    z, noise = decoder_noises(u, tower, x, INDEX, STEP, c)
    _, later = decoder_noises(u, tower, x, INDEX, STEP + 1, c)
    assert noise.shape[2] == min(c.noisy_steps, c.denoise_steps - 1) > 2
    every = torch.cat([z.flatten(0, 1), noise.flatten(0, 2), later.flatten(0, 2)])
    assert independent(every)


# a short chain: few denoising steps are noisy, and of these one is trained
SHORT = ('--denoise_steps=6', '--noisy_steps=2', '--trained_steps=1')


# --- rollout: whose reward is whose ---------------------------------------------------------------
CLOSE = dict(atol=2e-5, rtol=1e-4)


def told_apart(r):
    """Whether no two rewards are so near that one could stand for the other."""
    return torch.pdist(r.reshape(-1, 1)).min() > 1e-4


def test_all_captions_are_sampled_in_one_call_or_in_those_asked_for(uae, x, tower, monkeypatch):
    """Drawing goes by micro_batch, sampling by caption_batch: the captions are the same."""
    sizes = []
    sample = type(uae).sample_captions

    def spied(self, seen, G, *rest):
        sizes.append(len(seen[0]) * G)
        return sample(self, seen, G, *rest)

    monkeypatch.setattr(type(uae), 'sample_captions', spied)
    found = []
    for argv in (['--micro_batch=1'], [f'--caption_batch={G}']):
        u, c = stage_2(uae, *argv)
        found.append(encoder_rollout(u, tower, x, INDEX, STEP, c))
    assert sizes == [P * G] + P * [G]
    assert torch.equal(found[0]['y'], found[1]['y'])


def test_rewards_of_stage_2_belong_to_their_image_and_caption(uae, x, tower):
    u, c = stage_2(uae, '--temperature=2')       # captions that differ, hence rewards
    found = encoder_rollout(u, tower, x, INDEX, STEP, c)
    samples = plain_captions(u, tower, x, INDEX, STEP, c)
    assert found['r'].shape == (P, G)
    assert told_apart(found['r'])
    for b, (_, y, mask, logp, r) in enumerate(samples):
        assert torch.equal(found['y'][b:b + 1], y)
        assert torch.equal(found['mask'][b:b + 1], mask)
        torch.testing.assert_close(found['old_logp'][b:b + 1], logp, **CLOSE)
        torch.testing.assert_close(found['r'][b // G, b % G], r[0], **CLOSE)
    part = encoder_rollout(u, tower, x[2:], INDEX[2:], STEP, c)
    assert torch.equal(part['y'], found['y'][2 * G:]), 'a micro-batch of the images'
    torch.testing.assert_close(part['r'], found['r'][2:], **CLOSE)


@pytest.mark.parametrize('same_noise', [False, True])
@pytest.mark.parametrize('guidance', [1.0, 2.0])
def test_rewards_of_stage_3_belong_to_their_image_and_drawing(
        uae, x, tower, guidance, same_noise):
    argv = [f'--guidance={guidance}', f'--same_noise={same_noise}', '--caption_temperature=1.0']
    u, c = stage_3(uae, *argv, *SHORT)
    assert grpo_decoder.window(STEP, c)[0] == (1, 3), 'steps without noise on both sides'
    found = decoder_rollout(u, tower, x, INDEX, STEP, c)
    samples = plain_drawings(u, tower, x, INDEX, STEP, c)
    assert found['r'].shape == (P, G)
    assert told_apart(found['r'])
    for b, (cond, path, r) in enumerate(samples):
        z, z_next, v0, logp = zip(*path)
        torch.testing.assert_close(found['cond'][b:b + 1], cond, **CLOSE)
        torch.testing.assert_close(found['z'][b], torch.cat(z), **CLOSE)
        torch.testing.assert_close(found['z_next'][b], torch.cat(z_next), **CLOSE)
        torch.testing.assert_close(found['old_logp'][b], torch.cat(logp), **CLOSE)
        torch.testing.assert_close(found['r'][b // G, b % G], r[0], **CLOSE)
        if guidance != 1:
            torch.testing.assert_close(found['v0'][b], torch.cat(v0), **CLOSE)
    part = decoder_rollout(u, tower, x[2:], INDEX[2:], STEP, c)
    torch.testing.assert_close(part['z'], found['z'][2 * G:], **CLOSE)
    torch.testing.assert_close(part['r'], found['r'][2:], **CLOSE)


# --- a training step ------------------------------------------------------------------------------
class Recorder:
    """Stands in for two functions that every stage calls, and keeps what the updates saw.

    uae: the model. updates: of each update the trained weights before and after it, their
    gradients, and `passes`, one entry per forward pass of the decoder before it: is autograd on?
    spoil: the number of an update whose gradients are made non-finite, or None.
    """

    def __init__(self, monkeypatch, spoil=None):
        self.updates, self.passes, self.spoil = [], [], spoil
        self.real_parallel, self.real_step = ranks.parallel, optimiser.Optimiser.step
        monkeypatch.setattr(common, 'parallel', self.at_start)
        monkeypatch.setattr(optimiser.Optimiser, 'step', self.updating())

    def at_start(self, uae, run):
        self.uae = uae
        self.trained = {key: p for key, p in uae.named_parameters() if p.requires_grad}
        uae.decoder.transformer.register_forward_hook(self.count_pass)
        next(iter(self.trained.values())).register_hook(self.spoil_gradient)
        return self.real_parallel(uae, run)

    def count_pass(self, *_):
        self.passes.append(torch.is_grad_enabled())

    def spoil_gradient(self, grad):
        if len(self.updates) == self.spoil:
            return grad * float('inf')
        return grad

    def state(self):
        return {key: value.clone() for key, value in self.uae.state_dict().items()}

    def updating(self):
        def step(optimiser, number):
            update = types.SimpleNamespace(before=self.state(), passes=self.passes)
            update.grads = {key: p.grad.clone() for key, p in self.trained.items()}
            self.passes = []
            update.taken = self.real_step(optimiser, number)
            update.after = self.state()
            self.updates.append(update)
            return update.taken
        return step

    def back_to(self, update):
        """Gives the model the weights that an update began with, and no gradients."""
        self.uae.load_state_dict(update.before)
        self.uae.zero_grad()


IMAGES, GROUP = 2, 3                             # of a training step


def train(stage, monkeypatch, out_dir, *extra, steps=1, spoil=None):
    """A real run of the stage's script in this process -> Recorder, its configuration."""
    own = (f'--group={GROUP}', '--warmup=0', *extra)
    argv = arguments(stage.__name__, out_dir, *own, steps=steps, images=IMAGES)
    recorder = Recorder(monkeypatch, spoil)
    stage.main(argv)
    return recorder, stage_config(stage, *argv)


def first_batch(c):
    """The images of step 0 and their positions in the global batch."""
    run = types.SimpleNamespace(rank=0, world=1, device='cpu', master=True)
    batch = open_data(c, run)[0].batch(c.seed, 0, c.batch)
    return batch['x'], batch['index']


def gradient_error(recorder, update, loss):
    """How far the update's gradient is from that of `loss` at the same weights, relatively."""
    recorder.uae.zero_grad()
    loss.backward()
    off = size = 0
    for key, p in recorder.trained.items():
        off += (update.grads[key] - p.grad).square().sum().item()
        size += p.grad.square().sum().item()
    assert size > 0
    return (off / size) ** 0.5


MICRO_BATCHES = [0, GROUP, 2]                    # all at once, whole groups, parts of a group
micro_batches = pytest.mark.parametrize('micro_batch', MICRO_BATCHES)


@micro_batches
def test_a_step_of_stage_2_against_its_plain_recomputation(monkeypatch, tmp_path, micro_batch):
    """Both updates of a rollout: advantage i goes with caption i, and the old policy stays."""
    extra = (f'--micro_batch={micro_batch}', '--epochs=2', '--clip_range=(0.5, 0.5)', '--kl=0')
    recorder, c = train(grpo_encoder, monkeypatch, tmp_path / 'out', *extra)
    first, second = recorder.updates
    recorder.back_to(first)
    samples = plain_captions(recorder.uae, backbone('clip', c), *first_batch(c), 0, c)
    assert told_apart(torch.cat([r for *_, r in samples]))
    for update in (first, second):
        recorder.back_to(update)
        loss = plain_encoder_loss(recorder.uae, samples, c)
        assert gradient_error(recorder, update, loss) < 1e-3


@micro_batches
def test_a_step_of_stage_3_against_its_plain_recomputation(monkeypatch, tmp_path, micro_batch):
    """Both updates of a rollout with guidance; the second has an unconditional branch of its own.

    What the rollout stored of that branch is used in the first update, which saves its forward
    passes, and in no other: the weights have moved.
    """
    extra = (f'--micro_batch={micro_batch}', '--epochs=2', '--guidance=3', *SHORT)
    wide = '--clip_range=(0.5, 0.5)'             # or the second update would be clipped away
    recorder, c = train(grpo_decoder, monkeypatch, tmp_path / 'out', *extra, wide)
    assert grpo_decoder.window(0, c) == ((1, 3), [1]), 'not the first of the noisy steps'
    first, second = recorder.updates
    recorder.back_to(first)
    samples = plain_drawings(recorder.uae, backbone('clip', c), *first_batch(c), 0, c)
    assert told_apart(torch.cat([r for *_, r in samples]))
    loss = plain_decoder_loss(recorder.uae, samples, 0, c)
    assert gradient_error(recorder, first, loss) < 1e-3

    recorder.back_to(second)
    loss = plain_decoder_loss(recorder.uae, samples, 0, c)
    assert gradient_error(recorder, second, loss) < 1e-3
    stale = plain_decoder_loss(recorder.uae, samples, 0, c, stale=True)
    assert gradient_error(recorder, second, stale) > 1e-2, 'this test would not see a stale branch'


@micro_batches
def test_the_stored_branch_spares_the_first_update_its_passes(monkeypatch, tmp_path, micro_batch):
    extra = (f'--micro_batch={micro_batch}', '--epochs=2', '--guidance=3', *SHORT)
    recorder, c = train(grpo_decoder, monkeypatch, tmp_path / 'out', *extra)
    first, second = recorder.updates
    rollouts = len(list(ranks.group_slices(IMAGES, GROUP, micro_batch)))
    live = second.passes.count(True)             # one a micro-batch
    assert live >= rollouts
    assert first.passes == [False] * rollouts * c.denoise_steps + [True] * live
    assert second.passes == [False, True] * live


@pytest.mark.parametrize('stage', STAGES, ids=lambda stage: stage.__name__)
def test_a_step_with_a_non_finite_gradient_changes_no_weight(monkeypatch, tmp_path, stage):
    """The second of three updates: nothing moves, the moments of the optimiser neither spoil."""
    recorder, _ = train(stage, monkeypatch, tmp_path / 'out', steps=3, spoil=1)
    good, bad, later = recorder.updates
    assert not all(grad.isfinite().all() for grad in bad.grads.values())
    for key, value in bad.after.items():
        assert torch.equal(value, bad.before[key]), key
    assert bad.taken['bad_steps'] == 1
    for update in (good, later):
        assert update.taken['bad_steps'] == 0
        for key in recorder.trained:
            assert not torch.equal(update.after[key], update.before[key]), key
        assert all(value.isfinite().all() for value in update.after.values())


# --- evaluation -----------------------------------------------------------------------------------
class Draughtsman:
    """A stand-in for the model that draws exactly what a caption says, in the embedded world.

    It captions scene i with the caption of `told[i]`.
    """

    def __init__(self, uae, held, told):
        self.config, self.device = uae.config, uae.device
        self.real, self.end = uae, uae.encoder.end
        self.tokens, self.texts, self.latent_shape = uae.encoder.tokens, uae.encoder.texts, uae.decoder.latent_shape
        self.held, self.told = held, told
        self.drawings = {}
        for scene in (*held['scenes'], *told):
            self.drawings[scenes.caption(scene)] = torch.as_tensor(scenes.pixels([scene]))

    def see(self, x):
        """Which held-out image each one is: a tuple of one tensor (P,)."""
        every = self.held['x']
        rows = [int((every - image).abs().flatten(1).amax(1).argmin()) for image in x]
        return (torch.tensor(rows),)

    def sample_captions(self, seen, G=1, temperature=1.0, u=None):
        texts = [scenes.caption(self.told[i]) for i in seen[0].tolist()]
        y, mask, _ = self.tokens(texts)
        return y, mask, torch.zeros_like(mask)

    def condition(self, y, mask, seen=None):
        return self.texts(y, mask)

    def draw(self, z, cond, S):
        return cond

    def to_image(self, cond):
        return torch.cat([self.drawings[text] for text in cond])


def test_t2i_of_true_captions_is_drawn_from_the_true_captions(uae):
    """A model that draws perfectly and captions every image as another one."""
    n = 6
    c = stage_config(grpo_encoder, f'--eval_images={n}', '--eval_temperature=0.0')
    run = types.SimpleNamespace(rank=0, world=1, device='cpu', master=True)
    _, held = open_data(c, run)
    rng = np.random.default_rng(5)
    told = [scenes.random_scene(rng) for _ in range(n)]
    evaluator = new_evaluator(Draughtsman(at(uae, **vars(c)), held, told), held, c)
    summary, records = evaluator()
    assert [record['read_true'] for record in records] == held['scenes']
    assert [record['read_own'] for record in records] == told
    assert [record['caption'] for record in records] == [scenes.caption(scene) for scene in told]
    rows = [4, 1, 5]
    some = evaluator.records(rows)
    assert [record['read_true'] for record in some] == [held['scenes'][i] for i in rows]
    assert [record['read_own'] for record in some] == [told[i] for i in rows]
    assert summary['t2i_true'] == 1.0
    assert summary['t2i_own'] == scenes.t2i_of_readings(told, held['scenes']) < 0.9
