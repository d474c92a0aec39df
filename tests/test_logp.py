"""The ratio is one: what a rollout records while sampling and what the update computes from the stored sample are the same
log-probability, for captions and for denoising steps, however the batch is cut; and both are the library's own."""
import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import G, P, at

import common
from grpo_encoder import kl_k3
from model import UAE, sde_step, token_logp


def uniforms(rows, T, seed=1):
    return torch.rand(rows, T, generator=torch.Generator().manual_seed(seed))


class Head(nn.Module):
    """An lm_head with a bias on top, or with the bias alone."""

    def __init__(self, head, bias, constant=False):
        super().__init__()
        self.weight, self.bias, self.scale, self.calls = head.weight, bias, 0.0 if constant else 1.0, []

    def forward(self, h):
        self.calls.append(h[..., 0].numel())
        return self.scale * F.linear(h, self.weight) + self.bias


def with_head(uae, bias, constant=False):
    """The shared model with another head; its other weights are the shared ones."""
    other, encoder = copy.copy(uae), copy.copy(uae.encoder)
    encoder._modules = dict(encoder._modules, lm_head=Head(uae.head, bias, constant))
    other._modules = dict(uae._modules, encoder=encoder)
    return other


# --- captions: sampled against re-scored ---------------------------------------------------------------------------
@pytest.mark.parametrize('temperature', [1.0, 0.7, 1.5])
def test_recorded_equals_rescored(uae, seen, temperature):
    y, mask, logp = uae.sample_captions(seen, G, temperature, uniforms(P * G, uae.c.caption_len))
    assert mask.sum(1).unique().numel() > 1
    with torch.no_grad():
        again = uae.caption_logp(seen, y, temperature)
        other = uae.caption_logp(seen, y, temperature + 0.3)
    assert again.shape == y.shape and again.dtype == torch.float32 and again.isfinite().all()
    assert ((again - logp) * mask).abs().max() < 1e-5
    assert ((other - logp) * mask).abs().max() > 0.1                    # the temperature is part of the policy
    assert (logp <= 0).all() and logp.min() < -1 and not logp[mask == 0].any()


@pytest.mark.parametrize('size', [0, 1, 3, 4, 8, 11, 100])
def test_micro_batches_change_nothing(uae, seen, sampled, size):
    y, mask, logp = sampled
    rows, parts = [], []
    for s, b, last in common.group_slices(seen, G, size):
        with torch.no_grad():
            parts.append(uae.caption_logp(s, y[b]))
        rows += range(b.start, b.stop)
        assert last == (b.stop == P * G) and (not size or len(parts[-1]) <= max(size, 1))
    assert rows == list(range(P * G))
    assert ((torch.cat(parts) - logp) * mask).abs().max() < 1e-5


def test_groups_are_contiguous_blocks(uae, seen, sampled):
    """G captions of the first image, then of the second: sampled and scored alone they are the same, and against
    another image they are not."""
    y, mask, logp = sampled
    u = uniforms(P * G, uae.c.caption_len)
    for i in range(P):
        b, one = slice(i * G, (i + 1) * G), tuple(t[i:i + 1] for t in seen)
        assert torch.equal(uae.sample_captions(one, G, 1.0, u[b])[0], y[b])
        with torch.no_grad():
            assert ((uae.caption_logp(one, y[b]) - logp[b]) * mask[b]).abs().max() < 1e-5
    with torch.no_grad():
        wrong = uae.caption_logp(tuple(t.roll(1, 0) for t in seen), y)
    assert (((wrong - logp) * mask).abs().amax(1) > 0.1).all()


def full_forward(uae, x, y, **kwargs):
    """Logits of every caption position from the library's own forward pass on tokens and pixels, no cache."""
    u8 = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    pix = uae.processor.image_processor(images=list(u8), return_tensors='pt')
    n, grid = len(y) // len(x), pix['image_grid_thw']
    N = int(grid[0].prod()) // uae.encoder.config.vision_config.spatial_merge_size ** 2
    prompt = torch.tensor(uae.before_image + [uae.encoder.config.image_token_id] * N + uae.after_image)
    ids = torch.cat([prompt.expand(len(y), -1), y], 1)
    if not kwargs:
        kwargs = dict(mm_token_type_ids=(ids == uae.encoder.config.image_token_id).int())
    pixels = pix['pixel_values'].view(len(x), -1, pix['pixel_values'].shape[-1]).repeat_interleave(n, 0).flatten(0, 1)
    with torch.no_grad():
        logits = uae.encoder(input_ids=ids, pixel_values=pixels, image_grid_thw=grid.repeat_interleave(n, 0), **kwargs).logits
    return logits[:, len(prompt) - 1:-1]


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_equals_the_library_s_forward(uae, x, seen, sampled, temperature):
    y, mask, _ = sampled
    logits = full_forward(uae, x, y)
    logp = (logits / temperature).masked_fill(uae.forbidden, -math.inf).log_softmax(-1).gather(-1, y[..., None])[..., 0]
    with torch.no_grad():
        ours = uae.caption_logp(seen, y, temperature)
    assert ((logp - ours) * mask).abs().max() < 1e-5


def test_image_positions_are_two_dimensional(uae, x, sampled):
    """Without mm_token_type_ids the image's tokens stand in a line and every logit moves: the test above would see it."""
    y = sampled[0]
    logits, line = full_forward(uae, x, y), full_forward(uae, x, y, mm_token_type_ids=None)
    assert (logits - line).abs().amax((1, 2)).min() > 0.01


def test_template_is_the_processor_s(uae, x, seen):
    """The prompt is what apply_chat_template and the processor make of the caption prompt and the image."""
    from PIL import Image
    user = dict(role='user', content=[dict(type='text', text=uae.c.caption_prompt), dict(type='image')])
    text = uae.processor.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    image = Image.fromarray(((x[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
    ids = uae.processor(text=[text], images=[image], return_tensors='pt').input_ids[0].tolist()
    N = seen[0].shape[1]
    assert ids == uae.before_image + [uae.encoder.config.image_token_id] * N + uae.after_image
    assert uae.prompt(seen)[0].shape[1] == len(ids)


def encoder_gradients(uae, checkpointing, seen, y, mask):
    other = copy.deepcopy(uae)
    other.c.checkpointing = checkpointing
    params = other.train_only('encoder')
    logp = other(lambda u: u.caption_logp(seen, y, 0.9))
    (logp * mask).sum().backward()
    return logp.detach(), [p.grad for p in params], other


def test_checkpointing_is_the_same_policy(uae, seen, sampled):
    """Recomputing the prompt instead of caching it: same log-probs, same gradients, no mode left behind."""
    y, mask, _ = sampled
    logp, grads, _ = encoder_gradients(uae, False, seen, y, mask)
    logp_ck, grads_ck, other = encoder_gradients(uae, True, seen, y, mask)
    assert ((logp - logp_ck) * mask).abs().max() < 1e-5
    assert len(grads) == len(grads_ck) > 10
    for a, b in zip(grads, grads_ck):
        assert a.abs().max() > 0 and (a - b).norm() < 1e-4 * a.norm()
    assert not any(m.training for m in other.modules())


# --- captions: one function -----------------------------------------------------------------------------------------
def test_chunks_change_nothing():
    g = torch.Generator().manual_seed(0)
    head, bias = nn.Linear(8, 20, bias=False), torch.zeros(20)
    nn.init.normal_(head.weight, generator=g)
    h, y, weight = torch.randn(3, 7, 8, generator=g), torch.randint(0, 15, (3, 7), generator=g), torch.randn(3, 7, generator=g)
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
    want = (head(h) / 0.7).masked_fill(forbidden, -math.inf).log_softmax(-1).gather(-1, y[..., None])[..., 0]
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


# --- captions: forbidden tokens -------------------------------------------------------------------------------------
def test_what_is_forbidden(uae):
    """Every special token but the end token, and every id past the tokenizer."""
    V, tok = uae.head.weight.shape[0], uae.tokenizer
    assert uae.forbidden.shape == (V,) and not uae.forbidden[uae.end]
    assert uae.forbidden[uae.encoder.config.image_token_id] and uae.forbidden[len(tok):].all() and V > len(tok)
    assert set(uae.forbidden.nonzero().flatten().tolist()) == set(tok.all_special_ids) - {uae.end} | set(range(len(tok), V))


@pytest.mark.parametrize('temperature', [0.0, 0.7, 1.0])
def test_forbidden_tokens_are_never_sampled(uae, seen, temperature):
    """Not even where their logits are by far the largest, and they take nothing from the others' probability."""
    pushed = with_head(uae, uae.forbidden * 50.0)
    u = uniforms(P * G, uae.c.caption_len)
    u[0], u[1], u[2] = 0.0, 1 - 2 ** -24, 1e-30
    y, mask, logp = pushed.sample_captions(seen, G, temperature, u)
    assert not uae.forbidden[y].any() and logp.isfinite().all()
    plain = uae.sample_captions(seen, G, temperature, u)
    assert torch.equal(y, plain[0]) and torch.equal(logp, plain[2])
    with torch.no_grad():
        assert torch.equal(pushed.caption_logp(seen, y), uae.caption_logp(seen, y))


def test_forbidden_tokens_score_minus_infinity(uae, seen, sampled):
    y = sampled[0].clone()
    y[:, 3] = uae.encoder.config.image_token_id
    y[:, 5] = len(uae.tokenizer)
    with torch.no_grad():
        logp = uae.caption_logp(seen, y)
        every = torch.stack([token_logp(uae.caption_states(seen, y)[:, :1], uae.head, torch.full((P * G, 1), t), 0.7, uae.forbidden)[:, 0]
                             for t in range(uae.head.weight.shape[0])])
    assert (logp[:, [3, 5]] == -math.inf).all() and logp[:, [0, 1, 2, 4]].isfinite().all()
    torch.testing.assert_close(every.exp().sum(0), torch.ones(P * G))    # the rest sums to one
    assert (every[uae.forbidden] == -math.inf).all()


# --- captions: the sampler ------------------------------------------------------------------------------------------
@pytest.mark.parametrize('temperature', [1.0, 0.6])
def test_frequencies_are_the_softmax(uae, seen, temperature):
    """Uniforms on a fine grid through fixed logits: each token is drawn exactly its share, to one part of the grid."""
    V, N = uae.head.weight.shape[0], 4000
    bias = torch.randn(V, generator=torch.Generator().manual_seed(0)) * 2
    fixed = at(with_head(uae, bias, constant=True), caption_len=1)
    u = (torch.arange(N)[:, None] + 0.5) / N
    y, mask, logp = fixed.sample_captions(tuple(t[:1] for t in seen), N, temperature, u[torch.randperm(N)])
    p = (bias / temperature).masked_fill(uae.forbidden, -math.inf).softmax(-1)
    assert (torch.bincount(y[:, 0], minlength=V) / N - p).abs().max() < 1.5 / N
    torch.testing.assert_close(logp[:, 0].exp(), p[y[:, 0]], atol=1e-5, rtol=1e-4)
    assert mask.all()


def test_greedy_is_the_argmax(uae, x, seen):
    y, mask, logp = uae.sample_captions(seen, 2, 0)
    again = uae.sample_captions(seen, 2, 0, uniforms(2 * P, uae.c.caption_len))
    assert all(torch.equal(a, b) for a, b in zip((y, mask, logp), again))
    assert torch.equal(y[::2], y[1::2])
    best = full_forward(uae, x, y).masked_fill(uae.forbidden, -math.inf).argmax(-1)
    assert torch.equal(best[mask > 0], y[mask > 0])
    with torch.no_grad():
        assert ((uae.caption_logp(seen, y) - logp) * mask).abs().max() < 1e-5


def test_the_uniforms_are_the_randomness(uae, seen, sampled):
    """Same uniforms, same captions; members of a group differ because theirs do, also in the first token."""
    y = sampled[0]
    torch.manual_seed(7)
    assert torch.equal(uae.sample_captions(seen, G, 1.0, uniforms(P * G, uae.c.caption_len))[0], y)
    assert not torch.equal(uae.sample_captions(seen, G, 1.0, uniforms(P * G, uae.c.caption_len, seed=2))[0], y)
    assert all(len(set(map(tuple, block.tolist()))) == G for block in y.split(G))
    later = uniforms(P * G, uae.c.caption_len, seed=2)
    later[:, :3] = uniforms(P * G, uae.c.caption_len)[:, :3]            # one uniform per token: only later ones change
    changed = uae.sample_captions(seen, G, 1.0, later)[0] != y
    assert not changed[:, :3].any() and changed[:, 3:].any()
    same = uniforms(P, uae.c.caption_len).repeat_interleave(G, 0)
    y = uae.sample_captions(seen, G, 1.0, same)[0].unflatten(0, (P, G))
    assert (y == y[:, :1]).all()
    hot = uae.sample_captions(tuple(t[:1] for t in seen), 32, 5.0, uniforms(32, uae.c.caption_len))[0]
    assert hot[:, 0].unique().numel() > 3


def test_mask_has_one_entry_per_sampled_token(uae, sampled):
    """1 up to and with the end token, 0 after it; after it only end tokens."""
    y, mask, _ = sampled
    T = uae.c.caption_len
    assert y.shape == mask.shape == (P * G, T) and set(mask.unique().tolist()) == {0., 1.}
    ends = 0
    for row, m in zip(y.tolist(), mask.int().tolist()):
        n = row.index(uae.end) + 1 if uae.end in row else T
        ends += n < T
        assert m == [1] * n + [0] * (T - n)
        assert row[n:] == [uae.end] * (T - n)
    assert 0 < ends < P * G + 1


def test_caption_length_is_respected(uae, seen, sampled):
    y, mask, logp = at(uae, caption_len=5).sample_captions(seen, G, 1.0, uniforms(P * G, uae.c.caption_len))
    assert y.shape == (P * G, 5)
    assert torch.equal(y, sampled[0][:, :5]) and torch.equal(mask, sampled[1][:, :5])


# --- denoising steps ------------------------------------------------------------------------------------------------
S, B = 8, 4


@pytest.fixture(scope='module')
def cond(uae, sampled):
    y, mask, _ = sampled
    with torch.no_grad():
        return uae.condition(y[::G], mask[::G])


def noises(uae, W, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, *uae.latent_shape(), generator=g), torch.randn(B, W, *uae.latent_shape(), generator=g)


def tolerance(std):
    """1e-6; where a step's std is tiny (cps near s = 0), what rounding of the mean in float32 comes to."""
    return 1e-6 * (0.05 / std.flatten(1)).clamp(min=1)


@pytest.mark.parametrize('window', [(0, 7), (2, 5)], ids=str)
@pytest.mark.parametrize('kind', ['flow', 'cps'])
@pytest.mark.parametrize('guidance', [1.0, 2.0])
def test_steps_recorded_equal_steps_replayed(uae, cond, guidance, kind, window):
    """Every step, any subset of steps in one forward pass, any cut of the batch."""
    u, W = at(uae, guidance=guidance), window[1] - window[0]
    z, noise = noises(u, W)
    neg = u.negative() if guidance != 1 else None
    z0, path, logp = u.draw_sde(z, cond, S, noise, kind, 0.7, window, neg)
    assert logp.shape == (B, W) and path[0].shape == path[1].shape == (B, W, *u.latent_shape()) and logp.abs().min() > 0
    assert len(path) == 2 + (guidance != 1)
    for steps, size, known in [(s, n, path[:2]) for s in (list(range(W)), [0, 2], [1], [2, 1]) for n in (B, 3, 1)] + [([0, 2], 3, path), ([2, 1], B, path)]:
        with torch.no_grad():
            parts = [u.step_logp([p[b:b + size] for p in known], steps, cond[b:b + size], S, kind, 0.7, window[0], neg) for b in range(0, B, size)]
        again, mean, std = (torch.cat(t) for t in zip(*parts))
        assert again.shape == (B, len(steps)) and mean.shape == (B, len(steps), *u.latent_shape()) and std.shape[:2] == again.shape
        assert ((again - logp[:, steps]).abs() < tolerance(std.flatten(0, 1)).view_as(again)).all()
        torch.testing.assert_close(mean + std * noise[:, steps], path[1][:, steps], atol=1e-5, rtol=1e-4)
    with torch.no_grad():                                               # against another caption it is another policy
        wrong = u.step_logp(path[:2], list(range(W)), cond.roll(1, 0), S, kind, 0.7, window[0], neg)[0]
    assert (wrong - logp).abs().max() > 1e-4


@pytest.mark.parametrize('kind', ['flow', 'cps'])
def test_outside_the_window_it_is_the_ode(uae, cond, kind):
    z, noise = noises(uae, 3)
    z0, (before, after), _ = uae.draw_sde(z, cond, S, noise, kind, 0.7, (2, 5))
    sig = uae.sigmas(S)

    def ode(z, first, last):
        for i in range(first, last):
            with torch.no_grad():
                z = z + (sig[i + 1] - sig[i]) * uae.velocity(z, sig[i], cond)
        return z

    close = dict(atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(before[:, 0], ode(z, 0, 2), **close)
    torch.testing.assert_close(z0, ode(after[:, -1], 5, S), **close)
    assert torch.equal(before[:, 1:], after[:, :-1])
    step = sde_step(before[:, 1], uae.velocity(before[:, 1], sig[3], cond), sig[3], sig[4], kind, 0.7, noise=noise[:, 1])[0]
    torch.testing.assert_close(after[:, 1], step, **close)
    assert (uae.draw_sde(z, cond, S, noise * 0 + 1, kind, 0.7, (2, 5))[0] - z0).abs().max() > 0.1


@pytest.mark.parametrize('guidance', [1.0, 2.0])
def test_draw_is_the_chain_of_noiseless_steps(uae, cond, guidance):
    u = at(uae, guidance=guidance)
    z, _ = noises(u, 1)
    sig, neg, chain = u.sigmas(S), u.negative(), z
    assert sig.shape == (S + 1,) and sig[0] == 1 and sig[-1] == 0 and (sig.diff() < 0).all() and sig.dtype == torch.float32
    with torch.no_grad():
        z0 = u.draw(z, cond, S)
        for i in range(S):
            chain = sde_step(chain, u.velocity(chain, sig[i], cond, neg, guidance), sig[i], sig[i + 1], 'flow', 0.0)[0]
    torch.testing.assert_close(z0, chain, atol=1e-5, rtol=1e-5)


def test_draw_has_gradients_of_its_last_steps_only(uae, cond, monkeypatch):
    z, _ = noises(uae, 1)
    with torch.no_grad():
        plain = uae.draw(z, cond, S)
    for k in (0, 1, 3, S):
        live, c = [], cond.clone().requires_grad_()
        monkeypatch.setattr(UAE, 'velocity', lambda self, z, s, c, *a, real=UAE.velocity: live.append(torch.is_grad_enabled()) or real(self, z, s, c, *a))
        z0 = uae.draw(z, c, S, k)
        monkeypatch.undo()
        assert live == [False] * (S - k) + [True] * k and z0.requires_grad == (k > 0)
        torch.testing.assert_close(z0.detach(), plain, atol=1e-5, rtol=1e-5)
        assert torch.is_grad_enabled()


def test_step_logp_has_a_gradient(uae, cond):
    other = copy.deepcopy(uae)
    params = other.train_only('decoder')
    z, noise = noises(uae, 7)
    _, path, old = other.draw_sde(z, cond, S, noise, 'flow', 0.7, (0, 7))
    logp = other(lambda u: u.step_logp(path, [0, 3], cond, S, 'flow', 0.7, 0)[0])
    logp.sum().backward()
    assert not old.requires_grad and sum(p.grad is not None and p.grad.abs().max() > 0 for p in params) > 0.9 * len(params)


# --- the reference policy and LoRA -----------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def lora(uae):
    import config
    return UAE(config.parse({}, {}, ['--lora_rank=4'], 'x.py'))


@pytest.mark.parametrize('rank', [0, 4])
def test_reference_of_the_encoder(uae, lora, seen, sampled, rank):
    """Before an update KL is 0; an update moves the policy and not the reference, which shares all that is not trained."""
    y, mask, _ = sampled
    u = copy.deepcopy(lora if rank else uae)
    params = u.train_only('encoder')
    ref = u.reference('encoder')
    with torch.no_grad():
        logp, ref_logp = u.caption_logp(seen, y), ref.caption_logp(seen, y)
        assert torch.equal(logp, ref_logp) and not (kl_k3(logp, ref_logp) * mask).any()
        for i, p in enumerate(params):
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        moved, still = u.caption_logp(seen, y), ref.caption_logp(seen, y)
    assert torch.equal(still, ref_logp)
    assert ((moved - logp) * mask).abs().max() > 1e-2 and (kl_k3(moved, still) * mask).max() > 0
    assert not any(p.requires_grad for p in ref.encoder.parameters())
    trained = {id(p) for p in params}
    own = {id(p) for p in ref.encoder.parameters()} - {id(p) for p in u.encoder.parameters()}
    assert len(own) == len(params) and not own & trained
    assert ref.decoder is u.decoder and ref.projector is u.projector and [id(p) for p in u.parameters() if p.requires_grad] == [id(p) for p in params]


@pytest.mark.parametrize('rank', [0, 4])
def test_reference_of_the_decoder(uae, lora, cond, rank):
    u = copy.deepcopy(lora if rank else uae)
    params = u.train_only('decoder')
    ref = u.reference('decoder')
    z, noise = noises(u, 2)
    _, path, _ = u.draw_sde(z, cond, S, noise, 'flow', 0.7, (1, 3))
    args = path, [0, 1], cond, S, 'flow', 0.7, 1
    with torch.no_grad():
        mean, ref_mean = u.step_logp(*args)[1], ref.step_logp(*args)[1]
        assert torch.equal(mean, ref_mean)
        for i, p in enumerate(params):
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        assert torch.equal(ref.step_logp(*args)[1], ref_mean)
        assert (u.step_logp(*args)[1] - mean).abs().max() > 1e-3
    assert not any(p.requires_grad for p in ref.decoder.parameters()) and ref.encoder is u.encoder


def test_where_lora_goes(lora):
    """Every linear layer of the language model and Flow-GRPO's attention projections of the decoder; nothing else."""
    u = copy.deepcopy(lora)
    adapted = {name.rsplit('.lora_A', 1)[0] for name, _ in u.named_modules() if name.endswith('.lora_A.default')}
    encoder, decoder = ({n for n in adapted if n.startswith(side)} for side in ('encoder.', 'decoder.'))
    layers = u.encoder.config.text_config.num_hidden_layers
    linear = [f'self_attn.{k}_proj' for k in 'qkvo'] + [f'mlp.{k}_proj' for k in ('gate', 'up', 'down')]
    assert encoder == {f'encoder.model.language_model.layers.{i}.{k}' for i in range(layers) for k in linear}
    assert {n.split('.attn.')[1] for n in decoder} == {'add_k_proj', 'add_q_proj', 'add_v_proj', 'to_add_out', 'to_k', 'to_out.0', 'to_q', 'to_v'}
    assert {n.split('.attn.')[0] for n in decoder} == {f'decoder.transformer_blocks.{i}' for i in range(u.decoder.config.num_layers)}
    assert adapted == encoder | decoder
    assert not any(part in n for n in adapted for part in ('visual', 'lm_head', 'projector'))
    params = {id(p): n for n, p in u.named_parameters()}
    trained = [params[id(p)] for p in u.train_only('encoder')]
    assert trained and all('.lora_' in n and n.startswith('encoder.') for n in trained) and len(trained) == 2 * len(encoder)


def test_fresh_lora_is_the_base_model(lora, seen, sampled):
    import config
    y, mask, _ = sampled
    base = UAE(config.parse({}, {}, [], 'x.py'))
    with torch.no_grad():
        assert ((base.caption_logp(seen, y) - lora.caption_logp(seen, y)) * mask).abs().max() < 1e-5
    module = lora.encoder.model.language_model.layers[0].mlp.up_proj
    assert module.scaling['default'] == 2 and not module.lora_B['default'].weight.any() and module.lora_A['default'].weight.std() > 0


def test_what_trains(uae):
    """The encoder is the language model without the vision tower; an absent name trains nothing."""
    u = copy.deepcopy(uae)
    names = {id(p): n for n, p in u.named_parameters()}
    trained = {names[id(p)] for p in u.train_only('encoder', 'projector')}
    assert any(n.startswith('encoder.model.language_model.layers.0.') for n in trained) and any(n.startswith('projector.') for n in trained)
    assert not any('visual' in n or n.startswith(('decoder', 'vae')) for n in trained)
    u = copy.deepcopy(uae)
    names = {id(p): n for n, p in u.named_parameters()}
    assert {names[id(p)].split('.')[0] for p in u.train_only('decoder')} == {'decoder'}
