"""The condition c of a caption: the same in any batch, as long as cond_len says, and holding what its wiring promises; and
what the decoder makes of it (velocity, guidance)."""
import copy

import numpy as np
import pytest
import torch
from conftest import G, P, at

from data.shapes import scenes
from model import Projector

WIRINGS = ('text', 'answer', 'image', 'text+image')
wirings = pytest.mark.parametrize('kind', WIRINGS)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def rows(seen, *i):
    return tuple(t[list(i)] for t in seen)


def positions(c):
    """How much each position of c differs from the first row's: (B, length)."""
    return (c - c[:1]).abs().amax(-1)


# --- captions as strings -------------------------------------------------------------------------------------------
def test_strings_there_and_back(uae):
    rng = np.random.default_rng(0)
    texts = [scenes.caption(scenes.random_scene(rng)) for _ in range(40)] + ['', 'red']
    y, mask, cut = uae.tokens(texts)
    assert uae.texts(y, mask) == texts and cut == 0
    T = uae.c.caption_len
    assert y.shape == mask.shape == (len(texts), T) and not uae.forbidden[y].any()
    for row, m, text in zip(y.tolist(), mask.int().tolist(), texts):    # as the sampler returns them
        n = len(text.split()) + 1
        assert m == [1] * n + [0] * (T - n) and row[n - 1:] == [uae.end] * (T - n + 1)


def test_strings_too_long_are_cut_and_counted(uae):
    T = uae.c.caption_len
    fits, cut, long = (' '.join(['red'] * n) for n in (T - 1, T, T + 30))
    y, mask, count = uae.tokens([fits, cut, long])
    assert count == 2 and mask.all() and y.shape == (3, T)
    assert [t.split().count('red') for t in uae.texts(y, mask)] == [T - 1, T, T] and (y[0, -1] == uae.end) and (y[1:] != uae.end).all()


def test_texts_stop_at_the_mask(uae, sampled):
    y, mask, _ = sampled
    assert [len(t.split()) for t in uae.texts(y, mask)] == ((y != uae.end) * mask).sum(1).int().tolist()
    half = mask.clone()
    half[:, 3:] = 0
    assert all(len(t.split()) <= 3 for t in uae.texts(y, half))


# --- every wiring --------------------------------------------------------------------------------------------------
@wirings
def test_the_same_alone_and_in_any_batch(uae, seen, sampled, kind):
    """Alone, alone and cut to its own length, in another order, next to longer captions."""
    u, (y, mask, _) = at(uae, condition=kind), sampled
    c = u.condition(y, mask, seen)
    lengths = mask.sum(1).long()
    assert lengths.min() < lengths.max()
    for i in (int(lengths.argmin()), int(lengths.argmax()), 5):
        n, one = int(lengths[i]), rows(seen, i // G)
        assert (u.condition(y[i:i + 1], mask[i:i + 1], one) - c[i]).abs().max() < 1e-6
        assert (u.condition(y[i:i + 1, :n], mask[i:i + 1, :n], one) - c[i]).abs().max() < 1e-6
    order = torch.arange(P * G).view(P, G).flip(0, 1).flatten()
    assert (u.condition(y[order], mask[order], rows(seen, 3, 2, 1, 0)) - c[order]).abs().max() < 1e-6


@wirings
@pytest.mark.parametrize('cond_len', [9, 28, 40])
def test_length_is_constant(uae, seen, sampled, kind, cond_len):
    """cond_len tokens, twice that for text+image, whatever the captions; too long is cut and no crash."""
    u, (y, mask, _) = at(uae, condition=kind, cond_len=cond_len), sampled
    want = (cond_len * (2 if kind == 'text+image' else 1), uae.decoder.config.joint_attention_dim)
    long = torch.full((P, 60), y[0, 0].item())
    for ys, ms in ((y, mask), (y[::G, :2], mask[::G, :2]), (long, torch.ones(P, 60))):
        c = u.condition(ys, ms, seen)
        assert c.shape == (len(ys), *want) and c.isfinite().all()
    assert u.negative().shape == (1, *want)


@wirings
def test_negative(uae, seen, kind):
    """The negative prompt as text; beside it, for text+image, an image of nothing. No gradient."""
    u = copy.deepcopy(at(uae, condition=kind, negative_prompt='large red circle'))
    u.train_only('encoder', 'projector')
    with torch.enable_grad():
        neg = u.negative()
    assert not neg.requires_grad
    y, mask, _ = u.tokens(['large red circle'])
    n = u.c.cond_len
    torch.testing.assert_close(neg[:, :n], at(u, condition='text').condition(y, mask))
    nothing = u.projector(torch.zeros(1, 1, u.projector.up.in_features))
    torch.testing.assert_close(neg[:, n:], nothing.expand(1, n if kind == 'text+image' else 0, -1))
    assert (at(u, negative_prompt='small').negative() - neg).abs().max() > 0.01


@wirings
def test_gradient_reaches_the_language_model(uae, seen, sampled, kind):
    u = copy.deepcopy(at(uae, condition=kind))
    params = u.train_only('encoder', 'projector')
    with torch.enable_grad():
        u.condition(sampled[0], sampled[1], seen).square().sum().backward()
    assert sum(p.grad is not None and bool(p.grad.any()) for p in params) > 0.9 * len(params)


# --- the projector -------------------------------------------------------------------------------------------------
def test_projector_is_two_linear_layers_and_a_gelu():
    """g(h) = W2 gelu(W1 h + b1) + b2, hidden width 2D, under a checkpoint's names; gelu(a) = a Phi(a)."""
    g = Projector(6, 4)
    assert {k: tuple(p.shape) for k, p in g.named_parameters()} == {'up.weight': (8, 6), 'up.bias': (8,), 'down.weight': (4, 8), 'down.bias': (4,)}
    h = 3 * torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    a = h @ g.up.weight.T + g.up.bias
    want = (a * torch.distributions.Normal(0.0, 1.0).cdf(a)) @ g.down.weight.T + g.down.bias
    torch.testing.assert_close(g(h), want)


# --- what each holds -----------------------------------------------------------------------------------------------
def test_text_does_not_see_the_image(uae, seen, sampled):
    y, mask, _ = sampled
    c = uae.condition(y, mask)
    assert uae.c.condition == 'text'
    assert torch.equal(uae.condition(y, mask, seen), c) and torch.equal(uae.condition(y, mask, tuple(t.roll(1, 0) for t in seen)), c)
    other = y.clone()
    other[:, 1] = torch.where(y[:, 1] == 20, 21, 20)
    assert (uae.condition(other, mask) - c).abs().amax((1, 2)).min() > 1e-3


def test_text_is_the_library_s_encoding_of_the_chat_message(uae):
    """Projected last states of the template around the caption, encoded alone; behind it the padding's states."""
    text = 'large red circle top-left'
    y, mask, _ = uae.tokens([text])
    message = uae.processor.apply_chat_template([dict(role='generate', content=[dict(type='text', text=text)])], tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([uae.tokenizer(message, add_special_tokens=False).input_ids])
    states = uae.encoder(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    n = ids.shape[1]
    assert n < uae.c.cond_len
    torch.testing.assert_close(uae.condition(y, mask)[:, :n], uae.projector(states), atol=1e-5, rtol=1e-4)


def test_text_holds_the_caption_and_nothing_after_its_end(uae, sampled):
    """Tokens behind the mask, and whether the end token is there, change nothing; padding positions are there and full."""
    y, mask, _ = sampled
    c = uae.condition(y, mask)
    junk = torch.where(mask > 0, y, 20)
    assert not torch.equal(junk, y) and torch.equal(uae.condition(junk, mask), c)
    without = mask * (y != uae.end)
    assert torch.equal(uae.condition(y, without), c)
    assert c.abs().amax((0, 2)).min() > 0
    short, end = int(mask.sum(1).argmin()), int(mask.sum(1).min()) - 1 + len(uae.before_text) + len(uae.after_text)
    assert end < uae.c.cond_len - 2 and (c[short, end] - c[short, end - 1]).abs().max() > 1e-3


def test_padding_is_masked(uae, sampled):
    """The language model attends to the template and the caption, not to the padding behind them."""
    y, mask, _ = sampled
    seen_by = []
    handle = uae.encoder.model.language_model.register_forward_pre_hook(lambda m, a, kw: seen_by.append(kw.get('attention_mask')), with_kwargs=True)
    try:
        uae.condition(y, mask)
    finally:
        handle.remove()
    n = ((y != uae.end) * mask).sum(1).long() + len(uae.before_text) + len(uae.after_text)
    assert torch.equal(seen_by[0].bool(), torch.arange(uae.c.cond_len) < n.clamp(max=uae.c.cond_len)[:, None])


def test_text_too_long_keeps_its_beginning_and_the_template_s_end(uae):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(15, 40, (2, 60), generator=g)
    room = uae.c.cond_len - len(uae.before_text) - len(uae.after_text)
    ones = torch.ones(2, 60)
    c = uae.condition(y, ones)
    assert torch.equal(uae.condition(y[:, :room], ones[:, :room]), c)
    assert (uae.condition(y[:, :room - 1], ones[:, :room - 1]) - c).abs().max() > 1e-3


def test_answer_is_the_caption_s_states_after_the_image(uae, seen, sampled):
    """c = g(h_T), the states at the caption's own positions; behind the caption the projection of nothing."""
    u, (y, mask, _) = at(uae, condition='answer'), sampled
    c = u.condition(y, mask, seen)
    wrong = u.condition(y, mask, tuple(t.roll(1, 0) for t in seen))
    assert (wrong - c).abs().amax((1, 2)).min() > 1e-3                  # it depends on the image
    states = u.caption_states(seen, y)[:, 1:]
    nothing = u.projector(torch.zeros(states.shape[-1]))
    for i in range(P * G):
        n = int(((y[i] != u.end) * mask[i]).sum())
        torch.testing.assert_close(c[i, :n], u.projector(states[i, :n]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(c[i, n:], nothing.expand(u.c.cond_len - n, -1), atol=1e-6, rtol=1e-5)
    other = y.clone()
    other[:, 2] = torch.where(y[:, 2] == 20, 21, 20)
    moved = (u.condition(other, mask, seen) - c).abs().amax(-1)
    assert not moved[:, :2].gt(1e-5).any() and (moved[:, 2] > 1e-3).all()   # causal, and position t is token t


def test_image_does_not_see_the_caption(uae, seen, sampled):
    u, (y, mask, _) = at(uae, condition='image'), sampled
    c = u.condition(y, mask, seen)
    assert torch.equal(u.condition(y.roll(1, 1), mask, seen), c)
    assert torch.equal(c.unflatten(0, (P, G)), c[::G, None].expand(-1, G, -1, -1))          # the group shares its image
    rolled = u.condition(y, mask, tuple(t.roll(1, 0) for t in seen))
    torch.testing.assert_close(rolled, c.roll(G, 0), atol=1e-6, rtol=1e-5)
    N = seen[0].shape[1]
    nothing = u.projector(torch.zeros(u.projector.up.in_features))
    torch.testing.assert_close(c[:, N:], nothing.expand(P * G, u.c.cond_len - N, -1), atol=1e-6, rtol=1e-5)
    assert positions(c[::G])[1:, :N].min() > 1e-4                       # each of the image's positions, and no other


def test_image_states_stand_at_the_image_s_positions(uae, x, seen, sampled):
    """Against the library's forward pass on pixels: the last states where the image tokens are."""
    u8 = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    pix = uae.processor.image_processor(images=list(u8), return_tensors='pt')
    token, N = uae.encoder.config.image_token_id, seen[0].shape[1]
    ids = torch.tensor([uae.before_image + [token] * N + uae.after_image] * P)
    h = uae.encoder(input_ids=ids, **pix, mm_token_type_ids=(ids == token).int(), output_hidden_states=True).hidden_states[-1]
    c = at(uae, condition='image').condition(sampled[0][::G], sampled[1][::G], seen)
    torch.testing.assert_close(c[:, :N], uae.projector(h[ids == token].view(P, N, -1)), atol=1e-5, rtol=1e-4)


def test_text_and_image_are_both(uae, seen, sampled):
    y, mask, _ = sampled
    text, image, both = (at(uae, condition=k).condition(y, mask, seen) for k in ('text', 'image', 'text+image'))
    assert torch.equal(both, torch.cat([text, image], 1))


# --- what the decoder makes of it ----------------------------------------------------------------------------------
@pytest.fixture
def calls(uae):
    """Counts the decoder's forward passes."""
    count = []
    handle = uae.decoder.register_forward_hook(lambda *_: count.append(torch.is_grad_enabled()))
    yield count
    handle.remove()


@pytest.fixture
def inputs(uae, sampled):
    y, mask, _ = sampled
    z = torch.randn(P, *uae.latent_shape(), generator=torch.Generator().manual_seed(0))
    return z, uae.condition(y[::G], mask[::G]), uae.negative()


def test_velocity_is_the_decoder_s_output(uae, inputs, calls):
    z, c, neg = inputs
    s = torch.tensor([0.9, 0.5, 0.3, 0.1])
    want = uae.decoder(hidden_states=z, timestep=s * 1000, encoder_hidden_states=c, pooled_projections=uae.pooled.expand(P, -1), return_dict=False)[0]
    calls.clear()
    v = uae.velocity(z, s, c)
    assert len(calls) == 1 and v.dtype == torch.float32 and v.shape == z.shape
    torch.testing.assert_close(v, want)
    one = torch.cat([uae.velocity(z[i:i + 1], s[i], c[i:i + 1]) for i in range(P)])     # () or (B,)
    torch.testing.assert_close(one, v, atol=1e-5, rtol=1e-4)
    for other in (uae.velocity(z, s, c.roll(1, 0)), uae.velocity(z, s * 0.8, c), uae.velocity(z * 1.1, s, c)):
        assert (other - v).abs().amax((1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize('guidance', [0.0, 2.0, 5.0])
def test_guidance(uae, inputs, calls, guidance):
    z, c, neg = inputs
    s = torch.tensor(0.6)
    v, v0 = uae.velocity(z, s, c), uae.velocity(z, s, neg.expand(P, -1, -1))
    assert (v - v0).abs().max() > 1e-3
    for live, want in ((True, [False, True]), (False, [False])):       # for an update two passes, in a rollout both branches at once
        calls.clear()
        with torch.set_grad_enabled(live):
            torch.testing.assert_close(uae.velocity(z, s, c, neg, guidance), v0 + guidance * (v - v0), atol=1e-5, rtol=1e-4)
        assert sorted(calls) == want
    calls.clear()
    torch.testing.assert_close(uae.velocity(z, s, c, v0, guidance), v0 + guidance * (v - v0), atol=1e-5, rtol=1e-4)
    assert len(calls) == 1                                              # a known v0 is not computed again


def test_guidance_one_is_off_and_costs_one_call(uae, inputs, calls):
    z, c, neg = inputs
    v = uae.velocity(z, torch.tensor(0.6), c, neg, 1.0)
    assert len(calls) == 1 and torch.equal(v, uae.velocity(z, torch.tensor(0.6), c))
    calls.clear()
    u = at(uae, guidance=1.0)
    u.negative = None                                                   # nor is the negative prompt encoded
    u.draw(z, c, 4)
    u.draw_sde(z, c, 4, torch.zeros(P, 1, *u.latent_shape()), 'flow', 0.7, (0, 1))
    assert len(calls) == 8
    calls.clear()
    with torch.no_grad():
        at(uae, guidance=3.0).draw(z, c, 4)
    assert len(calls) == 4


def test_the_unconditional_branch_has_no_gradient(uae, inputs, calls):
    z, c, neg = inputs
    s, g = torch.tensor(0.6), 3.0
    with torch.enable_grad():
        c, neg = c.requires_grad_(), neg.requires_grad_()
        weight = torch.randn_like(z)
        plain = torch.autograd.grad((uae.velocity(z, s, c) * weight).sum(), c)[0]
        calls.clear()
        got, none = torch.autograd.grad((uae.velocity(z, s, c, neg, g) * weight).sum(), (c, neg), allow_unused=True)
    assert none is None and plain.abs().max() > 1e-3 and sorted(calls) == [False, True]
    torch.testing.assert_close(got, g * plain, atol=1e-4, rtol=1e-3)


def test_latents_and_images(uae, x):
    """The VAE there and back, with its scale and shift; slices change nothing; a gradient passes."""
    z = uae.to_latent(x)
    assert z.shape == (P, *uae.latent_shape()) and z.dtype == torch.float32
    scale, shift = uae.vae.config.scaling_factor, uae.vae.config.shift_factor or 0
    torch.testing.assert_close(z, (uae.vae.encode(x).latent_dist.mean - shift) * scale, atol=1e-5, rtol=1e-4)
    back = uae.to_image(z)
    assert back.shape == x.shape and back.dtype == torch.float32
    torch.testing.assert_close(back, uae.vae.decode(z / scale + shift).sample, atol=1e-5, rtol=1e-4)
    cut = at(uae, micro_batch=3)
    torch.testing.assert_close(cut.to_latent(x), z, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cut.to_image(z), back, atol=1e-5, rtol=1e-4)
    with torch.enable_grad():
        z = z.requires_grad_()
        uae.to_image(z).square().sum().backward()
    assert z.grad.abs().amax((1, 2, 3)).min() > 0
