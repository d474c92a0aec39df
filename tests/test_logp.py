"""The ratio is one: what a rollout records and what the update computes are the same log-prob.

For captions and for denoising steps, however the batch is cut; and both are the library's own.
"""
import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import G, P, at, new_uae, shared_config, uniforms

from lib import ranks
from grpo_encoder import kl_k3
from model import UAE, sde_step, token_logp


# --- how the model is called here ----------------------------------------------------------------
@torch.no_grad()
def score(uae, seen, y, temperature=1.0):
    """log pi(y | x), (B, T), without a gradient."""
    return uae.encoder.logp(seen, y, temperature)


PATH = ('z', 'z_next', 'v0')                     # v0 where there is guidance


def draw_steps(uae, z, cond, noise, kind, window, neg=None):
    """A drawing whose steps in `window` are noisy: z_0, path, logp."""
    z_0, stored = uae.decoder.draw_sde(z, cond, S, noise, kind, 0.7, window, neg)
    path = [stored[name] for name in PATH if name in stored]
    return z_0, path, stored['recorded']


def score_steps(uae, path, steps, cond, kind, first, neg=None):
    """The stored steps scored again: logp, mean, std."""
    stored = dict(zip(PATH, path))
    return uae.decoder.step_logp(stored, steps, cond, S, kind, 0.7, first, neg)


def rows_of(seen, rows):
    return tuple(t[rows] for t in seen)


def rolled(seen):
    """The images seen, each in its neighbour's place."""
    return tuple(t.roll(1, 0) for t in seen)


def largest(difference, mask):
    """The largest absolute entry where a token was sampled."""
    return (difference * mask).abs().max()


# --- captions: sampled against re-scored ---------------------------------------------------------
@pytest.mark.parametrize('temperature', [1.0, 0.7, 1.5])
def test_recorded_equals_rescored(uae, seen, temperature):
    u = uniforms(P * G, uae.config.caption_len)
    y, mask, logp = uae.encoder.sample(seen, G, temperature, u)
    assert mask.sum(1).unique().numel() > 1
    again = score(uae, seen, y, temperature)
    other = score(uae, seen, y, temperature + 0.3)
    assert again.shape == y.shape
    assert again.dtype == torch.float32
    assert again.isfinite().all()
    assert largest(again - logp, mask) < 1e-5
    assert largest(other - logp, mask) > 0.1                # the temperature is part of the policy
    assert (logp <= 0).all()
    assert logp.min() < -1
    assert not logp[mask == 0].any()


@pytest.mark.parametrize('size', [0, 1, 3, 4, 8, 11, 100])
def test_micro_batches_change_nothing(uae, seen, sampled, size):
    y, mask, logp = sampled
    rows, parts = [], []
    for images, b, last in ranks.sample_slices(P, G, size):
        part = score(uae, ranks.take(seen, images), y[b])
        parts.append(part)
        rows += range(b.start, b.stop)
        assert last == (b.stop == P * G)
        assert not size or len(part) <= max(size, 1)
    assert rows == list(range(P * G))
    assert largest(torch.cat(parts) - logp, mask) < 1e-5


def test_groups_are_contiguous_blocks(uae, seen, sampled):
    """G captions of the first image, then of the second.

    Sampled and scored alone they are the same, and against another image they are not.
    """
    y, mask, logp = sampled
    u = uniforms(P * G, uae.config.caption_len)
    for i in range(P):
        b = slice(i * G, (i + 1) * G)
        one = rows_of(seen, slice(i, i + 1))
        assert torch.equal(uae.encoder.sample(one, G, 1.0, u[b])[0], y[b])
        again = score(uae, one, y[b])
        assert largest(again - logp[b], mask[b]) < 1e-5
    wrong = score(uae, rolled(seen), y)
    off = ((wrong - logp) * mask).abs().amax(1)
    assert (off > 0.1).all()


def full_forward(uae, x, y, **kwargs):
    """Logits of every caption position from the library's own forward pass, no cache."""
    u8 = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    pix = uae.encoder.processor.image_processor(images=list(u8), return_tensors='pt')
    n, grid = len(y) // len(x), pix['image_grid_thw']
    token = uae.encoder.vlm.config.image_token_id
    N = int(grid[0].prod()) // uae.encoder.vlm.config.vision_config.spatial_merge_size ** 2
    prompt = torch.tensor(uae.encoder.before_image + [token] * N + uae.encoder.after_image)
    ids = torch.cat([prompt.expand(len(y), -1), y], 1)
    if not kwargs:
        kwargs = dict(mm_token_type_ids=(ids == token).int())
    pixels = pix['pixel_values']
    pixels = pixels.view(len(x), -1, pixels.shape[-1])
    pixels = pixels.repeat_interleave(n, 0).flatten(0, 1)
    grids = grid.repeat_interleave(n, 0)
    with torch.no_grad():
        out = uae.encoder.vlm(input_ids=ids, pixel_values=pixels, image_grid_thw=grids, **kwargs)
    return out.logits[:, len(prompt) - 1:-1]


def library_logp(uae, logits, y, temperature):
    """log pi(y) from logits, forbidden tokens out."""
    logits = (logits / temperature).masked_fill(uae.encoder.forbidden, -math.inf)
    return logits.log_softmax(-1).gather(-1, y[..., None])[..., 0]


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_equals_the_library_s_forward(uae, x, seen, sampled, temperature):
    y, mask, _ = sampled
    logp = library_logp(uae, full_forward(uae, x, y), y, temperature)
    ours = score(uae, seen, y, temperature)
    assert largest(logp - ours, mask) < 1e-5


def test_image_positions_are_two_dimensional(uae, x, sampled):
    """Without mm_token_type_ids the image's tokens stand in a line and every logit moves.

    The test above would see it.
    """
    y = sampled[0]
    logits = full_forward(uae, x, y)
    line = full_forward(uae, x, y, mm_token_type_ids=None)
    assert (logits - line).abs().amax((1, 2)).min() > 0.01


def test_template_is_the_processor_s(uae, x, seen):
    """The prompt is what apply_chat_template and the processor make of caption prompt and image."""
    from PIL import Image
    content = [dict(type='text', text=uae.config.caption_prompt), dict(type='image')]
    user = dict(role='user', content=content)
    text = uae.encoder.processor.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    pixels = ((x[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    image = Image.fromarray(pixels)
    ids = uae.encoder.processor(text=[text], images=[image], return_tensors='pt').input_ids[0].tolist()
    N = seen[0].shape[1]
    token = uae.encoder.vlm.config.image_token_id
    assert ids == uae.encoder.before_image + [token] * N + uae.encoder.after_image
    assert uae.encoder.prompt(seen)[0].shape[1] == len(ids)


def encoder_gradients(uae, checkpointing, seen, y, mask):
    """logp, the gradients of its sum over valid tokens, and the model they were taken from."""
    def loss(model):
        return model.encoder.logp(seen, y, 0.9)

    other = copy.deepcopy(uae)
    other.config.checkpointing = checkpointing
    params = other.train_only('encoder')
    logp = other(loss)
    (logp * mask).sum().backward()
    return logp.detach(), [p.grad for p in params], other


def test_checkpointing_is_the_same_policy(uae, seen, sampled):
    """The prompt recomputed, not cached: same log-probs, same gradients, no train mode left."""
    y, mask, _ = sampled
    logp, grads, _ = encoder_gradients(uae, False, seen, y, mask)
    logp_again, grads_again, other = encoder_gradients(uae, True, seen, y, mask)
    assert largest(logp - logp_again, mask) < 1e-5
    assert len(grads) == len(grads_again) > 10
    for a, b in zip(grads, grads_again):
        assert a.abs().max() > 0
        assert (a - b).norm() < 1e-4 * a.norm()
    assert not any(m.training for m in other.modules())


# --- captions: one function ----------------------------------------------------------------------
class Head(nn.Module):
    """An lm_head with a bias on top, or with the bias alone; it counts its rows."""

    def __init__(self, head, bias, constant=False):
        super().__init__()
        self.weight, self.bias = head.weight, bias
        self.scale = 0.0 if constant else 1.0
        self.calls = []

    def forward(self, h):
        self.calls.append(h[..., 0].numel())
        return self.scale * F.linear(h, self.weight) + self.bias


def with_head(uae, bias, constant=False):
    """The shared model with another head; its other weights are the shared ones."""
    head = Head(uae.encoder.head, bias, constant)
    other, encoder = copy.copy(uae), copy.copy(uae.encoder.vlm)
    encoder._modules = dict(encoder._modules, lm_head=head)
    other._modules = dict(uae._modules, encoder=encoder)
    return other


def test_chunks_change_nothing():
    g = torch.Generator().manual_seed(0)
    head, bias = nn.Linear(8, 20, bias=False), torch.zeros(20)
    nn.init.normal_(head.weight, generator=g)
    h = torch.randn(3, 7, 8, generator=g)
    y = torch.randint(0, 15, (3, 7), generator=g)
    weight = torch.randn(3, 7, generator=g)
    forbidden = torch.arange(20) >= 15
    results = []
    for chunk, rows in ((2 ** 24, 21), (20 * 4, 4), (20 * 4 + 19, 4), (1, 1)):
        h = h.detach().requires_grad_()
        wrapped = Head(head, bias)
        logp = token_logp(h, wrapped, y, 0.7, forbidden, chunk)
        head.weight.grad = None
        (logp * weight).sum().backward()
        assert max(wrapped.calls) == rows
        results.append((logp.detach(), h.grad, head.weight.grad))
    logits = (head(h) / 0.7).masked_fill(forbidden, -math.inf)
    want = logits.log_softmax(-1).gather(-1, y[..., None])[..., 0]
    torch.testing.assert_close(results[0][0], want.detach(), atol=1e-5, rtol=1e-5)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_token_logp_is_float32_over_bfloat16_logits():
    head = nn.Linear(8, 20, bias=False).bfloat16()
    h, y = torch.randn(2, 3, 8).bfloat16(), torch.zeros(2, 3, dtype=torch.long)
    logp = token_logp(h, head, y)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp, head(h).float().log_softmax(-1)[..., 0])


# --- captions: forbidden tokens ------------------------------------------------------------------
def test_what_is_forbidden(uae):
    """Every special token but the end token, and every id past the tokenizer."""
    V, tokenizer = uae.encoder.head.weight.shape[0], uae.encoder.tokenizer
    known = len(tokenizer)
    assert uae.encoder.forbidden.shape == (V,)
    assert not uae.encoder.forbidden[uae.encoder.end]
    assert uae.encoder.forbidden[uae.encoder.vlm.config.image_token_id]
    assert uae.encoder.forbidden[known:].all() and V > known
    special = set(tokenizer.all_special_ids) - {uae.encoder.end}
    forbidden = set(uae.encoder.forbidden.nonzero().flatten().tolist())
    assert forbidden == special | set(range(known, V))


@pytest.mark.parametrize('temperature', [0.0, 0.7, 1.0])
def test_forbidden_tokens_are_never_sampled(uae, seen, temperature):
    """Not even where their logits are the largest; they take nothing from the others' share."""
    pushed = with_head(uae, uae.encoder.forbidden * 50.0)
    u = uniforms(P * G, uae.config.caption_len)
    u[0], u[1], u[2] = 0.0, 1 - 2 ** -24, 1e-30
    y, mask, logp = pushed.encoder.sample(seen, G, temperature, u)
    assert not uae.encoder.forbidden[y].any()
    assert logp.isfinite().all()
    plain_y, _, plain_logp = uae.encoder.sample(seen, G, temperature, u)
    assert torch.equal(y, plain_y)
    assert torch.equal(logp, plain_logp)
    assert torch.equal(score(pushed, seen, y), score(uae, seen, y))


@torch.no_grad()
def logp_of_every_token(uae, seen, y, temperature):
    """log pi of each of the V tokens at the first position: (V, B)."""
    first = uae.encoder.caption_states(seen, y)[:, :1]
    rows = []
    for token in range(uae.encoder.head.weight.shape[0]):
        tokens = torch.full((len(y), 1), token)
        rows.append(token_logp(first, uae.encoder.head, tokens, temperature, uae.encoder.forbidden)[:, 0])
    return torch.stack(rows)


def test_forbidden_tokens_score_minus_infinity(uae, seen, sampled):
    y = sampled[0].clone()
    y[:, 3] = uae.encoder.vlm.config.image_token_id
    y[:, 5] = len(uae.encoder.tokenizer)
    logp = score(uae, seen, y)
    every = logp_of_every_token(uae, seen, y, 0.7)
    assert (logp[:, [3, 5]] == -math.inf).all()
    assert logp[:, [0, 1, 2, 4]].isfinite().all()
    torch.testing.assert_close(every.exp().sum(0), torch.ones(P * G))   # the rest sums to one
    assert (every[uae.encoder.forbidden] == -math.inf).all()


# --- captions: the sampler -----------------------------------------------------------------------
@pytest.mark.parametrize('temperature', [1.0, 0.6])
def test_frequencies_are_the_softmax(uae, seen, temperature):
    """Uniforms on a fine grid through fixed logits.

    Each token is drawn exactly its share, to one part of the grid.
    """
    V, N = uae.encoder.head.weight.shape[0], 4000
    bias = torch.randn(V, generator=torch.Generator().manual_seed(0)) * 2
    fixed = at(with_head(uae, bias, constant=True), caption_len=1)
    u = (torch.arange(N)[:, None] + 0.5) / N
    first = rows_of(seen, slice(0, 1))
    y, mask, logp = fixed.encoder.sample(first, N, temperature, u[torch.randperm(N)])
    p = (bias / temperature).masked_fill(uae.encoder.forbidden, -math.inf).softmax(-1)
    frequency = torch.bincount(y[:, 0], minlength=V) / N
    assert (frequency - p).abs().max() < 1.5 / N
    torch.testing.assert_close(logp[:, 0].exp(), p[y[:, 0]], atol=1e-5, rtol=1e-4)
    assert mask.all()


def test_greedy_is_the_argmax(uae, x, seen):
    y, mask, logp = uae.encoder.sample(seen, 2, 0)
    again = uae.encoder.sample(seen, 2, 0, uniforms(2 * P, uae.config.caption_len))
    for a, b in zip((y, mask, logp), again):
        assert torch.equal(a, b)
    assert torch.equal(y[::2], y[1::2])
    best = full_forward(uae, x, y).masked_fill(uae.encoder.forbidden, -math.inf).argmax(-1)
    assert torch.equal(best[mask > 0], y[mask > 0])
    assert largest(score(uae, seen, y) - logp, mask) < 1e-5


def test_the_uniforms_are_the_randomness(uae, seen, sampled):
    """Same uniforms, same captions; members of a group differ because theirs do."""
    T, y = uae.config.caption_len, sampled[0]
    first, second = uniforms(P * G, T), uniforms(P * G, T, seed=2)
    torch.manual_seed(7)
    assert torch.equal(uae.encoder.sample(seen, G, 1.0, first)[0], y)
    assert not torch.equal(uae.encoder.sample(seen, G, 1.0, second)[0], y)
    for block in y.split(G):
        assert len(set(map(tuple, block.tolist()))) == G

    later = second.clone()                       # one uniform per token: only later ones change
    later[:, :3] = first[:, :3]
    changed = uae.encoder.sample(seen, G, 1.0, later)[0] != y
    assert not changed[:, :3].any()
    assert changed[:, 3:].any()

    shared = uniforms(P, T).repeat_interleave(G, 0)
    y = uae.encoder.sample(seen, G, 1.0, shared)[0].unflatten(0, (P, G))
    assert (y == y[:, :1]).all()

    image = rows_of(seen, slice(0, 1))           # the first token differs as well
    hot = uae.encoder.sample(image, 32, 5.0, uniforms(32, T))[0]
    assert hot[:, 0].unique().numel() > 3


def test_mask_has_one_entry_per_sampled_token(uae, sampled):
    """1 up to and with the end token, 0 after it; after it only end tokens."""
    y, mask, _ = sampled
    T = uae.config.caption_len
    assert y.shape == mask.shape == (P * G, T)
    assert set(mask.unique().tolist()) == {0., 1.}
    ends = 0
    for row, row_mask in zip(y.tolist(), mask.int().tolist()):
        n = T
        if uae.encoder.end in row:
            n = row.index(uae.encoder.end) + 1
        ends += n < T
        assert row_mask == [1] * n + [0] * (T - n)
        assert row[n:] == [uae.encoder.end] * (T - n)
    assert 0 < ends < P * G + 1


def test_caption_length_is_respected(uae, seen, sampled):
    short = at(uae, caption_len=5)
    y, mask, logp = short.encoder.sample(seen, G, 1.0, uniforms(P * G, uae.config.caption_len))
    assert y.shape == (P * G, 5)
    assert torch.equal(y, sampled[0][:, :5])
    assert torch.equal(mask, sampled[1][:, :5])


# --- denoising steps -----------------------------------------------------------------------------
S, B = 8, 4


@pytest.fixture(scope='module')
def cond(uae, sampled):
    y, mask, _ = sampled
    with torch.no_grad():
        return uae.condition(y[::G], mask[::G])


def noises(uae, W, seed=0):
    """Start noise (B, C, H, W), and that of W steps."""
    g = torch.Generator().manual_seed(seed)
    start = torch.randn(B, *uae.decoder.latent_shape(), generator=g)
    return start, torch.randn(B, W, *uae.decoder.latent_shape(), generator=g)


def tolerance(std):
    """1e-6; where a step's std is tiny (cps near s = 0), what rounding in float32 comes to."""
    return 1e-6 * (0.05 / std.flatten(1)).clamp(min=1)


@torch.no_grad()
def score_in_parts(uae, path, steps, size, cond, kind, first, neg):
    """score_steps on `size` samples at a time, joined."""
    parts = []
    for b in range(0, B, size):
        rows = slice(b, b + size)
        part = [p[rows] for p in path]
        parts.append(score_steps(uae, part, steps, cond[rows], kind, first, neg))
    logp, mean, std = (torch.cat(t) for t in zip(*parts))
    return logp, mean, std


@pytest.mark.parametrize('window', [(0, 7), (2, 5)], ids=str)
@pytest.mark.parametrize('kind', ['flow', 'cps'])
@pytest.mark.parametrize('guidance', [1.0, 2.0])
def test_steps_recorded_equal_steps_replayed(uae, cond, guidance, kind, window):
    """Every step, any subset of steps in one forward pass, any cut of the batch."""
    u, W = at(uae, guidance=guidance), window[1] - window[0]
    latents = u.latent_shape()
    z, noise = noises(u, W)
    guided = guidance != 1
    neg = u.negative() if guided else None
    z0, path, logp = draw_steps(u, z, cond, noise, kind, window, neg)
    assert logp.shape == (B, W)
    assert path[0].shape == path[1].shape == (B, W, *latents)
    assert logp.abs().min() > 0
    assert len(path) == 2 + guided

    cases = []
    for steps in (list(range(W)), [0, 2], [1], [2, 1]):
        for size in (B, 3, 1):
            cases.append((steps, size, path[:2]))
    cases += [([0, 2], 3, path), ([2, 1], B, path)]         # with a v0, where there is guidance
    for steps, size, known in cases:
        again, mean, std = score_in_parts(u, known, steps, size, cond, kind, window[0], neg)
        assert again.shape == (B, len(steps))
        assert mean.shape == (B, len(steps), *latents)
        assert std.shape[:2] == again.shape
        bound = tolerance(std.flatten(0, 1)).view_as(again)
        assert ((again - logp[:, steps]).abs() < bound).all()
        z_next = mean + std * noise[:, steps]
        torch.testing.assert_close(z_next, path[1][:, steps], atol=1e-5, rtol=1e-4)
    with torch.no_grad():                        # against another caption it is another policy
        other = cond.roll(1, 0)
        wrong = score_steps(u, path[:2], list(range(W)), other, kind, window[0], neg)[0]
    assert (wrong - logp).abs().max() > 1e-4


@pytest.mark.parametrize('kind', ['flow', 'cps'])
def test_outside_the_window_it_is_the_ode(uae, cond, kind):
    z, noise = noises(uae, 3)
    z0, (before, after), _ = draw_steps(uae, z, cond, noise, kind, (2, 5))
    sig = uae.decoder.sigmas(S)

    @torch.no_grad()
    def ode(z, first, last):
        for i in range(first, last):
            z = z + (sig[i + 1] - sig[i]) * uae.decoder.velocity(z, sig[i], cond)
        return z

    close = dict(atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(before[:, 0], ode(z, 0, 2), **close)
    torch.testing.assert_close(z0, ode(after[:, -1], 5, S), **close)
    assert torch.equal(before[:, 1:], after[:, :-1])
    v = uae.decoder.velocity(before[:, 1], sig[3], cond)
    step = sde_step(before[:, 1], v, sig[3], sig[4], kind, 0.7, noise=noise[:, 1])[0]
    torch.testing.assert_close(after[:, 1], step, **close)
    other = draw_steps(uae, z, cond, torch.ones_like(noise), kind, (2, 5))[0]
    assert (other - z0).abs().max() > 0.1


@pytest.mark.parametrize('guidance', [1.0, 2.0])
def test_draw_is_the_chain_of_noiseless_steps(uae, cond, guidance):
    u = at(uae, guidance=guidance)
    z, _ = noises(u, 1)
    sig, neg, chain = u.sigmas(S), u.negative(), z
    assert sig.shape == (S + 1,)
    assert sig[0] == 1 and sig[-1] == 0
    assert (sig.diff() < 0).all()
    assert sig.dtype == torch.float32
    with torch.no_grad():
        z0 = u.draw(z, cond, S)
        for i in range(S):
            v = u.velocity(chain, sig[i], cond, neg, guidance)
            chain = sde_step(chain, v, sig[i], sig[i + 1], 'flow', 0.0)[0]
    torch.testing.assert_close(z0, chain, atol=1e-5, rtol=1e-5)


def test_draw_has_gradients_of_its_last_steps_only(uae, cond, monkeypatch):
    z, _ = noises(uae, 1)
    with torch.no_grad():
        plain = uae.draw(z, cond, S)
    for k in (0, 1, 3, S):
        live = []                                # of each step: is autograd on?

        def velocity(self, *args, real=UAE.velocity):
            live.append(torch.is_grad_enabled())
            return real(self, *args)

        c = cond.clone().requires_grad_()
        with monkeypatch.context() as m:
            m.setattr(UAE, 'velocity', velocity)
            z0 = uae.draw(z, c, S, k)
        assert live == [False] * (S - k) + [True] * k
        assert z0.requires_grad == (k > 0)
        torch.testing.assert_close(z0.detach(), plain, atol=1e-5, rtol=1e-5)
        assert torch.is_grad_enabled()


def test_draw_has_the_gradient_of_the_whole_chain_behind_its_start(uae):
    """Velocity c z: each step multiplies by 1 + c dt.

    So the last k steps have a derivative in c that can be written out.
    """
    u = copy.copy(uae)
    u.velocity = lambda z, s, c, *rest: c * z
    steps = u.sigmas(S).diff()
    for k in (1, 3, S):
        c = torch.tensor(0.7, requires_grad=True)
        z0 = u.draw(torch.ones(1, 1, 1, 1), c, S, k)
        got = torch.autograd.grad(z0.sum(), c)[0]
        last = 1 + c * steps[S - k:]
        want = (1 + c * steps).prod() * (steps[S - k:] / last).sum()
        torch.testing.assert_close(got, want.detach(), atol=1e-6, rtol=1e-5)


def test_step_logp_has_a_gradient(uae, cond):
    other = copy.deepcopy(uae)
    params = other.train_only('decoder')
    z, noise = noises(uae, 7)
    _, path, old = draw_steps(other, z, cond, noise, 'flow', (0, 7))
    logp = other(lambda u: score_steps(u, path, [0, 3], cond, 'flow', 0)[0])
    logp.sum().backward()
    reached = [p for p in params if p.grad is not None and p.grad.abs().max() > 0]
    assert not old.requires_grad
    assert len(reached) > 0.9 * len(params)


# --- the reference policy and LoRA ---------------------------------------------------------------
@pytest.fixture(scope='module')
def lora():
    return new_uae(shared_config('--lora_rank=4'))


@torch.no_grad()
def move(params):
    """An update of some size, the same each time."""
    for i, p in enumerate(params):
        p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))


def ids_of(params):
    return {id(p) for p in params}


def a_copy(uae, lora, rank):
    """A copy of the model with adapters, or of the one without."""
    if rank:
        return copy.deepcopy(lora)
    return copy.deepcopy(uae)


@pytest.mark.parametrize('rank', [0, 4])
def test_reference_of_the_encoder(uae, lora, seen, sampled, rank):
    """Before an update KL is 0; an update moves the policy and not the reference.

    The reference shares all that is not trained.
    """
    y, mask, _ = sampled
    u = a_copy(uae, lora, rank)
    params = u.train_only('encoder')
    ref = u.reference('encoder')
    logp, ref_logp = score(u, seen, y), score(ref, seen, y)
    assert torch.equal(logp, ref_logp)
    assert not (kl_k3(logp, ref_logp) * mask).any()
    move(params)
    moved, still = score(u, seen, y), score(ref, seen, y)
    assert torch.equal(still, ref_logp)
    assert largest(moved - logp, mask) > 1e-2
    assert (kl_k3(moved, still) * mask).max() > 0

    assert not any(p.requires_grad for p in ref.encoder.parameters())
    own = ids_of(ref.encoder.parameters()) - ids_of(u.encoder.parameters())
    assert len(own) == len(params)
    assert not own & ids_of(params)
    assert ref.decoder is u.decoder
    assert ref.projector is u.projector
    assert [id(p) for p in u.parameters() if p.requires_grad] == [id(p) for p in params]


@pytest.mark.parametrize('rank', [0, 4])
def test_reference_of_the_decoder(uae, lora, cond, rank):
    u = a_copy(uae, lora, rank)
    params = u.train_only('decoder')
    ref = u.reference('decoder')
    z, noise = noises(u, 2)
    _, path, _ = draw_steps(u, z, cond, noise, 'flow', (1, 3))

    @torch.no_grad()
    def mean_of(policy):
        return score_steps(policy, path, [0, 1], cond, 'flow', 1)[1]

    mean, ref_mean = mean_of(u), mean_of(ref)
    assert torch.equal(mean, ref_mean)
    move(params)
    assert torch.equal(mean_of(ref), ref_mean)
    assert (mean_of(u) - mean).abs().max() > 1e-3
    assert not any(p.requires_grad for p in ref.decoder.parameters())
    assert ref.encoder is u.encoder


def test_where_lora_goes(lora):
    """Every linear layer of the language model, the decoder's attention projections, nothing else.

    The latter are those of Flow-GRPO.
    """
    u = copy.deepcopy(lora)
    modules = [name for name, _ in u.named_modules() if name.endswith('.lora_A.default')]
    adapted = {name.rsplit('.lora_A', 1)[0] for name in modules}
    encoder = {name for name in adapted if name.startswith('encoder.')}
    decoder = {name for name in adapted if name.startswith('decoder.')}
    linear = [f'self_attn.{k}_proj' for k in 'qkvo']
    linear += [f'mlp.{k}_proj' for k in ('gate', 'up', 'down')]
    want = set()
    for i in range(u.encoder.config.text_config.num_hidden_layers):
        want |= {f'encoder.model.language_model.layers.{i}.{k}' for k in linear}
    assert encoder == want
    projections = {'add_k_proj', 'add_q_proj', 'add_v_proj', 'to_add_out'}
    projections |= {'to_k', 'to_out.0', 'to_q', 'to_v'}
    blocks = {f'decoder.transformer_blocks.{i}' for i in range(u.decoder.config.num_layers)}
    assert {name.split('.attn.')[1] for name in decoder} == projections
    assert {name.split('.attn.')[0] for name in decoder} == blocks
    assert adapted == encoder | decoder
    for part in ('visual', 'lm_head', 'projector'):
        assert not any(part in name for name in adapted)

    names = {id(p): name for name, p in u.named_parameters()}
    trained = [names[id(p)] for p in u.train_only('encoder')]
    assert trained
    assert all('.lora_' in name and name.startswith('encoder.') for name in trained)
    assert len(trained) == 2 * len(encoder)


def test_fresh_lora_is_the_base_model(lora, seen, sampled):
    y, mask, _ = sampled
    base = new_uae(shared_config())
    assert largest(score(base, seen, y) - score(lora, seen, y), mask) < 1e-5
    module = lora.encoder.model.language_model.layers[0].mlp.up_proj
    assert module.scaling['default'] == 2
    assert not module.lora_B['default'].weight.any()
    assert module.lora_A['default'].weight.std() > 0


def trained_names(uae, *parts):
    """The names of what train_only(*parts) makes trainable, on a copy of the model."""
    u = copy.deepcopy(uae)
    names = {id(p): name for name, p in u.named_parameters()}
    return {names[id(p)] for p in u.train_only(*parts)}


def test_what_trains(uae):
    """The encoder is the language model without the vision tower; an absent name trains nothing."""
    trained = trained_names(uae, 'encoder', 'projector')
    assert any(name.startswith('encoder.model.language_model.layers.0.') for name in trained)
    assert any(name.startswith('projector.') for name in trained)
    assert not any('visual' in name for name in trained)
    assert not any(name.startswith(('decoder', 'vae')) for name in trained)
    assert {name.split('.')[0] for name in trained_names(uae, 'decoder')} == {'decoder'}
