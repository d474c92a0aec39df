"""The condition c of a caption, and what the decoder makes of it (velocity, guidance).

It is the same in any batch, as long as cond_len says, and holds what its wiring promises.
"""
import copy

import numpy as np
import pytest
import torch
from conftest import G, P, at, rolled
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.shapes import scenes
from lib.ranks import take
from model import Projector

WIRINGS = ('text', 'answer', 'image', 'text+image')
wirings = pytest.mark.parametrize('kind', WIRINGS)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def largest(difference):
    """The largest absolute entry of each sample: (B,)."""
    return difference.abs().amax((1, 2))


def other_token(y, t):
    """The captions with another word at position t."""
    other = y.clone()
    other[:, t] = torch.where(y[:, t] == 20, 21, 20)
    return other


def projection_of_nothing(uae):
    return uae.projector(torch.zeros(uae.projector.up.in_features))


# --- captions as strings -------------------------------------------------------------------------
def test_strings_there_and_back(uae):
    rng = np.random.default_rng(0)
    texts = [scenes.caption(scenes.random_scene(rng)) for _ in range(40)] + ['', 'red']
    y, mask, lost = uae.encoder.tokens(texts)
    assert uae.encoder.texts(y, mask) == texts
    assert lost == dict(cut=0, unknown=0)
    T = uae.config.caption_len
    assert y.shape == mask.shape == (len(texts), T)
    assert not uae.encoder.forbidden[y].any()
    for row, row_mask, text in zip(y.tolist(), mask.int().tolist(), texts):
        n = len(text.split()) + 1                # as the sampler returns them
        assert row_mask == [1] * n + [0] * (T - n)
        assert row[n - 1:] == [uae.encoder.end] * (T - n + 1)


@pytest.mark.parametrize('cond_len', [0, 14, 60])
def test_a_string_may_be_as_long_as_a_condition_has_room_for(uae, monkeypatch, cond_len):
    monkeypatch.setattr(uae.config, 'cond_len', cond_len)
    room = uae.encoder.text_room
    y, mask, lost = uae.encoder.tokens([' '.join(['red'] * n) for n in (room, room + 1)])
    assert y.shape == (2, room + 1)
    assert uae.encoder.words(y, mask).sum(1).tolist() == [room, room + 1]
    assert lost == dict(cut=1, unknown=0)


def test_what_strings_lose_is_counted(uae):
    T = uae.config.caption_len
    texts = [' '.join(['red'] * n) for n in (T - 1, T, T + 30)] + ['a zebra', 'large red zebra']
    y, mask, lost = uae.encoder.tokens(texts)
    assert lost == dict(cut=2, unknown=3)
    assert [text.split().count('red') for text in uae.encoder.texts(y, mask)] == [T - 1, T, T, 0, 1]
    assert y[0, -1] == uae.encoder.end
    assert (y[1:3] != uae.encoder.end).all()
    shorter, _, lost = uae.encoder.tokens(texts, 5)
    assert shorter.shape == (5, 5)
    assert lost['cut'] == 3


def spelling_tokenizer():
    """A byte-level BPE tokenizer without an unknown token, as Qwen's, with its control tokens."""
    special = ['<|im_end|>', '<|image_pad|>', '<|im_start|>']
    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet)
    whole.train_from_iterator(['red circle'], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=whole, eos_token=special[0],
                                   additional_special_tokens=special[1:])


@pytest.mark.parametrize('spelling', [False, True])
def test_control_tokens_cannot_arise_from_texts(uae, spelling):
    """The tiny tokenizer knows whole words and reads `<unk>`, the other one spells them out."""
    encoder = at(uae).encoder
    if spelling:
        encoder.tokenizer = spelling_tokenizer()
        encoder.end = encoder.tokenizer.eos_token_id
    special = set(encoder.tokenizer.all_special_tokens) - {encoder.tokenizer.unk_token}
    assert len(special) >= 3
    texts = [f'red {name} circle' for name in special] + [f'red{name}circle' for name in special]
    y, mask, lost = encoder.tokens(texts, 40)
    control = torch.tensor(encoder.tokenizer.convert_tokens_to_ids(sorted(special)))
    assert not torch.isin(y[encoder.words(y, mask)], control).any()
    assert torch.equal(encoder.words(y, mask).sum(1) + 1, mask.sum(1).long()), 'one end token each'
    if spelling:
        assert encoder.texts(y, mask) == texts
        assert lost == dict(cut=0, unknown=0)
    else:
        assert encoder.texts(y, mask) == ['red circle'] * len(special) + [''] * len(special)
        assert lost == dict(cut=0, unknown=len(texts))
        y, mask, _ = encoder.tokens(['red \ud83d circle'])  # a lone surrogate
        assert encoder.texts(y, mask) == ['red circle']


def test_texts_stop_at_the_mask(uae, sampled):
    y, mask = sampled[0], sampled[1].clone()
    mask[:, 3:] = 0
    lengths = [len(text.split()) for text in uae.encoder.texts(y, mask)]
    assert lengths == uae.encoder.words(y, mask).sum(1).tolist()
    assert max(lengths) == 3


# --- every wiring --------------------------------------------------------------------------------
@wirings
def test_the_same_alone_and_in_any_batch(uae, vision, sampled, kind):
    """Alone, alone and cut to its own length, in another order, next to longer captions."""
    u, (y, mask, _) = at(uae, condition=kind), sampled
    c = u.condition(y, mask, vision)
    lengths = mask.sum(1).long()
    assert lengths.min() < lengths.max()
    for i in (int(lengths.argmin()), int(lengths.argmax()), 5):
        n, image = int(lengths[i]), take(vision, slice(i // G, i // G + 1))
        alone = u.condition(y[i:i + 1], mask[i:i + 1], image)
        cut = u.condition(y[i:i + 1, :n], mask[i:i + 1, :n], image)
        assert (alone - c[i]).abs().max() < 1e-6
        assert (cut - c[i]).abs().max() < 1e-6
    order = torch.arange(P * G).view(P, G).flip(0, 1).flatten()
    backwards = {name: t.flip(0) for name, t in vision.items()}
    reordered = u.condition(y[order], mask[order], backwards)
    assert (reordered - c[order]).abs().max() < 1e-6


@wirings
@pytest.mark.parametrize('cond_len', [9, 28, 40])
def test_length_is_constant(uae, vision, sampled, kind, cond_len):
    """cond_len tokens, twice that for text+image, whatever the captions; too long is cut."""
    u, (y, mask, _) = at(uae, condition=kind, cond_len=cond_len), sampled
    length = cond_len * (1 + (kind == 'text+image'))
    want = (length, uae.decoder.width)
    long = torch.full((P, 60), y[0, 0].item())
    captions = [(y, mask), (y[::G, :2], mask[::G, :2]), (long, torch.ones(P, 60))]
    for some_y, some_mask in captions:
        c = u.condition(some_y, some_mask, vision)
        assert c.shape == (len(some_y), *want)
        assert c.isfinite().all()
    assert u.negative().shape == (1, *want)


def test_without_a_cond_len_a_condition_is_as_long_as_its_rows(uae):
    """A row alone is padded no further than itself or the negative prompt, as is the negative."""
    u = at(uae, cond_len=0)
    padded = at(uae, cond_len=40)
    y, mask, _ = u.encoder.tokens(['large red circle top-left , navy background .', 'red'])
    around = len(u.encoder.before_text) + len(u.encoder.after_text)
    for i in (0, 1):
        c = u.condition(y[i:i + 1], mask[i:i + 1])
        own = int(u.encoder.words(y[i:i + 1], mask[i:i + 1]).sum())
        assert c.shape[1] == around + max(own, u.encoder.negative_length)
        assert u.negative(c.shape[1]).shape == c.shape
        alone = padded.condition(y[i:i + 1], mask[i:i + 1])[:, :around + own]
        assert (c[:, :around + own] - alone).abs().max() < 1e-5


@wirings
def test_negative(uae, kind):
    """The negative prompt as text; beside it, for text+image, an image of nothing. No gradient."""
    u = copy.deepcopy(at(uae, condition=kind, negative_prompt='large red circle'))
    u.train_only('encoder', 'projector')
    with torch.enable_grad():
        neg = u.negative()
    assert not neg.requires_grad
    y, mask, _ = u.encoder.tokens(['large red circle'])
    n = u.config.cond_len
    torch.testing.assert_close(neg[:, :n], at(u, condition='text').condition(y, mask))
    nothing = projection_of_nothing(u).expand(1, neg.shape[1] - n, -1)
    torch.testing.assert_close(neg[:, n:], nothing)
    other = at(u, negative_prompt='small').negative()
    assert (other - neg).abs().max() > 0.01


@wirings
def test_gradient_reaches_the_language_model(uae, vision, sampled, kind):
    u = copy.deepcopy(at(uae, condition=kind))
    params = u.train_only('encoder', 'projector')
    with torch.enable_grad():
        c = u.condition(sampled[0], sampled[1], vision)
        c.square().sum().backward()
    reached = [p for p in params if p.grad is not None and bool(p.grad.any())]
    assert len(reached) > 0.9 * len(params)


# --- the projector -------------------------------------------------------------------------------
def test_projector_is_two_linear_layers_and_a_gelu():
    """g(h) = W2 gelu(W1 h + b1) + b2, hidden width 2D, gelu(a) = a Phi(a)."""
    g = Projector(6, 4)
    shapes = {name: tuple(p.shape) for name, p in g.named_parameters()}
    want = {'up.weight': (8, 6), 'up.bias': (8,), 'down.weight': (4, 8), 'down.bias': (4,)}
    assert shapes == want
    h = 3 * torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    a = h @ g.up.weight.T + g.up.bias
    gelu = a * torch.distributions.Normal(0.0, 1.0).cdf(a)
    torch.testing.assert_close(g(h), gelu @ g.down.weight.T + g.down.bias)


# --- what each holds -----------------------------------------------------------------------------
def test_text_does_not_see_the_image(uae, vision, sampled):
    y, mask, _ = sampled
    c = uae.condition(y, mask)
    assert uae.config.condition == 'text'
    assert torch.equal(uae.condition(y, mask, vision), c)
    assert torch.equal(uae.condition(y, mask, rolled(vision)), c)
    assert largest(uae.condition(other_token(y, 1), mask) - c).min() > 1e-3


def test_text_is_the_library_s_encoding_of_the_chat_message(uae):
    """Projected last states of the template around the caption; behind it the padding's states."""
    text = 'large red circle top-left'
    y, mask, _ = uae.encoder.tokens([text])
    turn = dict(role='generate', content=[dict(type='text', text=text)])
    processor = uae.encoder.processor
    message = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([processor.tokenizer(message, add_special_tokens=False).input_ids])
    states = uae.encoder.vlm(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    n = ids.shape[1]
    assert n < uae.config.cond_len
    c = uae.condition(y, mask)
    torch.testing.assert_close(c[:, :n], uae.projector(states), atol=1e-5, rtol=1e-4)


def test_text_holds_the_caption_and_nothing_after_its_end(uae, sampled):
    """Tokens behind the mask, and whether the end token is there, change nothing.

    Padding positions are there and full.
    """
    y, mask, _ = sampled
    c = uae.condition(y, mask)
    junk = torch.where(mask > 0, y, 20)
    assert not torch.equal(junk, y)
    assert torch.equal(uae.condition(junk, mask), c)
    assert torch.equal(uae.condition(y, uae.encoder.words(y, mask).float()), c)
    assert c.abs().amax((0, 2)).min() > 0
    short = int(mask.sum(1).argmin())
    end = int(mask.sum(1).min()) - 1 + uae.config.cond_len - uae.encoder.text_room
    assert end < uae.config.cond_len - 2
    assert (c[short, end] - c[short, end - 1]).abs().max() > 1e-3


def test_padding_is_masked(uae, sampled):
    """The language model attends to the template and the caption, not to the padding behind."""
    y, mask, _ = sampled
    masks = []

    def hook(module, args, kwargs):
        masks.append(kwargs.get('attention_mask'))

    with uae.encoder.language_model.register_forward_pre_hook(hook, with_kwargs=True):
        uae.condition(y, mask)
    around = len(uae.encoder.before_text) + len(uae.encoder.after_text)
    length = uae.encoder.words(y, mask).sum(1) + around
    length = length.clamp(max=uae.config.cond_len)
    assert torch.equal(masks[0].bool(), torch.arange(uae.config.cond_len) < length[:, None])


def test_text_too_long_keeps_its_beginning_and_the_template_s_end(uae):
    g = torch.Generator().manual_seed(0)
    y, ones = torch.randint(15, 40, (2, 60), generator=g), torch.ones(2, 60)
    room = uae.encoder.text_room
    c = uae.condition(y, ones)
    assert torch.equal(uae.condition(y[:, :room], ones[:, :room]), c)
    shorter = uae.condition(y[:, :room - 1], ones[:, :room - 1])
    assert (shorter - c).abs().max() > 1e-3


def test_answer_is_the_caption_s_states_after_the_image(uae, vision, sampled):
    """c = g(h_T), the states at the caption's own positions; behind them that of nothing."""
    u, (y, mask, _) = at(uae, condition='answer'), sampled
    c = u.condition(y, mask, vision)
    wrong = u.condition(y, mask, rolled(vision))
    assert largest(wrong - c).min() > 1e-3                  # it depends on the image
    states = u.encoder.caption_states(vision, y)[:, 1:]
    nothing = projection_of_nothing(u)
    lengths = u.encoder.words(y, mask).sum(1)
    for i in range(P * G):
        n = int(lengths[i])
        own = u.projector(states[i, :n])
        torch.testing.assert_close(c[i, :n], own, atol=1e-5, rtol=1e-4)
        behind = nothing.expand(u.config.cond_len - n, -1)
        torch.testing.assert_close(c[i, n:], behind, atol=1e-6, rtol=1e-5)
    moved = (u.condition(other_token(y, 2), mask, vision) - c).abs().amax(-1)
    assert not moved[:, :2].gt(1e-5).any()                  # causal
    assert (moved[:, 2] > 1e-3).all()                       # position t is token t


def test_image_does_not_see_the_caption(uae, vision, sampled):
    u, (y, mask, _) = at(uae, condition='image'), sampled
    c = u.condition(y, mask, vision)
    assert torch.equal(u.condition(y.roll(1, 1), mask, vision), c)
    shared = c[::G, None].expand(-1, G, -1, -1)             # the group shares its image
    assert torch.equal(c.unflatten(0, (P, G)), shared)
    moved = u.condition(y, mask, rolled(vision))
    torch.testing.assert_close(moved, c.roll(G, 0), atol=1e-6, rtol=1e-5)
    N = vision['features'].shape[1]
    nothing = projection_of_nothing(u).expand(P * G, u.config.cond_len - N, -1)
    torch.testing.assert_close(c[:, N:], nothing, atol=1e-6, rtol=1e-5)
    apart = (c[::G] - c[:1]).abs().amax(-1)
    assert apart[1:, :N].min() > 1e-4            # each of the image's positions


def test_image_states_stand_at_the_image_s_positions(uae, x, vision, sampled):
    """Against the library's forward pass on pixels: the last states where the image tokens are."""
    u8 = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    pix = uae.encoder.processor.image_processor(images=list(u8), return_tensors='pt')
    token, N = uae.encoder.image_token, vision['features'].shape[1]
    ids = torch.tensor([uae.encoder.before_image + [token] * N + uae.encoder.after_image] * P)
    out = uae.encoder.vlm(
        input_ids=ids,
        mm_token_type_ids=(ids == token).int(),
        output_hidden_states=True,
        **pix,
    )
    states = out.hidden_states[-1][ids == token].view(P, N, -1)
    y, mask, _ = sampled
    c = at(uae, condition='image').condition(y[::G], mask[::G], vision)
    torch.testing.assert_close(c[:, :N], uae.projector(states), atol=1e-5, rtol=1e-4)


def test_text_and_image_are_both(uae, vision, sampled):
    y, mask, _ = sampled
    text = at(uae, condition='text').condition(y, mask, vision)
    image = at(uae, condition='image').condition(y, mask, vision)
    both = at(uae, condition='text+image').condition(y, mask, vision)
    assert torch.equal(both, torch.cat([text, image], 1))


# --- what the decoder makes of it ----------------------------------------------------------------
CLOSE = dict(atol=1e-5, rtol=1e-4)


@pytest.fixture
def calls(uae):
    """The decoder's forward passes: of each, is autograd on, and how many rows?"""
    met = []

    def hook(module, args, kwargs):
        met.append((torch.is_grad_enabled(), len(kwargs['hidden_states'])))

    with uae.decoder.transformer.register_forward_pre_hook(hook, with_kwargs=True):
        yield met


@pytest.fixture
def inputs(uae, sampled):
    y, mask, _ = sampled
    z = torch.randn(P, *uae.decoder.latent_shape(), generator=torch.Generator().manual_seed(0))
    return z, uae.condition(y[::G], mask[::G]), uae.negative()


def test_velocity_is_the_decoder_s_output(uae, inputs, calls):
    z, c, _ = inputs
    s = torch.tensor([0.9, 0.5, 0.3, 0.1])
    want = uae.decoder.transformer(
        hidden_states=z,
        timestep=s * 1000,
        encoder_hidden_states=c,
        pooled_projections=uae.decoder.pooled.expand(P, -1),
        return_dict=False,
    )[0]
    calls.clear()
    velocity = uae.decoder.velocity
    v = velocity(z, s, c)
    assert len(calls) == 1
    assert v.dtype == torch.float32
    assert v.shape == z.shape
    torch.testing.assert_close(v, want)
    each = [velocity(z[i:i + 1], s[i], c[i:i + 1]) for i in range(P)]       # s: () or (B,)
    torch.testing.assert_close(torch.cat(each), v, **CLOSE)
    for other in (velocity(z, s, c.roll(1, 0)), velocity(z, s * 0.8, c), velocity(z * 1.1, s, c)):
        assert (other - v).abs().amax((1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize('guidance', [0.0, 2.0, 5.0])
def test_guidance(uae, inputs, calls, guidance):
    """For an update two passes, in a rollout both branches at once."""
    z, c, negative = inputs
    s = torch.tensor(0.6)
    decoder = at(uae, guidance=guidance).decoder
    v, v0 = decoder.velocity(z, s, c), decoder.velocity(z, s, negative.expand(P, -1, -1))
    assert (v - v0).abs().max() > 1e-3
    want = v0 + guidance * (v - v0)
    for live, passes in ((True, [(False, P), (True, P)]), (False, [(False, 2 * P)])):
        calls.clear()
        with torch.set_grad_enabled(live):
            torch.testing.assert_close(decoder.velocity(z, s, c, negative), want, **CLOSE)
            branches = decoder.branches(z, s, c, negative)
        assert sorted(calls) == sorted(2 * passes)
        for branch, expected in zip(branches, (v, v0)):
            torch.testing.assert_close(branch, expected, **CLOSE)
    torch.testing.assert_close(decoder.guided(v, v0), want, **CLOSE)
    assert decoder.guided(v, None) is v


def test_guidance_one_is_off_and_costs_one_call_a_step(uae, inputs, calls):
    z, c, _ = inputs
    u = at(uae, guidance=1.0)
    u.negative = None                            # nor is the negative prompt encoded
    u.draw(z, c, 4)
    noise = torch.zeros(P, 1, *uae.decoder.latent_shape())
    u.decoder.draw_sde(z, c, 4, noise, 'flow', 0.7, (0, 1))
    assert calls == [(False, P)] * 8
    calls.clear()
    at(uae, guidance=3.0).draw(z, c, 4)
    assert calls == [(False, 2 * P)] * 4


def test_the_unconditional_branch_has_no_gradient(uae, inputs, calls):
    z, c, negative = inputs
    s, decoder = torch.tensor(0.6), at(uae, guidance=3.0).decoder
    with torch.enable_grad():
        c, negative = c.requires_grad_(), negative.requires_grad_()
        weight = torch.randn_like(z)
        plain = torch.autograd.grad((decoder.velocity(z, s, c) * weight).sum(), c)[0]
        calls.clear()
        guided = (decoder.velocity(z, s, c, negative) * weight).sum()
        got, none = torch.autograd.grad(guided, (c, negative), allow_unused=True)
    assert none is None
    assert plain.abs().max() > 1e-3
    assert sorted(calls) == [(False, P), (True, P)]
    torch.testing.assert_close(got, 3 * plain, atol=1e-4, rtol=1e-3)


def test_latents_and_images(uae, x):
    """The VAE there and back, with scale and shift; slices change nothing; a gradient passes."""
    decoder, vae = uae.decoder, uae.decoder.vae
    z = decoder.to_latent(x)
    assert z.shape == (P, *decoder.latent_shape())
    assert z.dtype == torch.float32
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0
    torch.testing.assert_close(z, (vae.encode(x).latent_dist.mean - shift) * scale, **CLOSE)
    back = decoder.to_image(z)
    assert back.shape == x.shape
    assert back.dtype == torch.float32
    torch.testing.assert_close(back, vae.decode(z / scale + shift).sample, **CLOSE)
    with torch.enable_grad():
        z = z.requires_grad_()
        decoder.to_image(z).square().sum().backward()
    assert z.grad.abs().amax((1, 2, 3)).min() > 0


# --- rows at once ---------------------------------------------------------------------------------
def rows_of(call, module, count):
    """What a call returns, and how many rows each of its passes through a module had."""
    rows = []

    def hook(module, args, kwargs):
        rows.append(count(*args, **kwargs))

    with module.register_forward_pre_hook(hook, with_kwargs=True):
        return call(), rows


@pytest.mark.parametrize('size', [0, 1, 3, 16, 100])
def test_micro_batch_bounds_the_rows_of_every_pass(uae, x, sampled, inputs, size):
    """Transformer, VAE both ways, text encoder, vision tower: the same values by few rows."""
    y, mask, _ = sampled
    z, c, negative = inputs
    u = at(uae, micro_batch=size, guidance=2.0)
    decoder, s = u.decoder, torch.tensor(0.6)
    passes = [
        (4 * P, lambda u: u.decoder.velocity(z.repeat(2, 1, 1, 1), s, c.repeat(2, 1, 1), negative),
         decoder.transformer, lambda **inputs: len(inputs['hidden_states'])),
        (P, lambda u: u.decoder.to_image(z), decoder.vae.decoder, lambda z, *rest: len(z)),
        (P, lambda u: u.decoder.to_latent(x), decoder.vae.encoder, len),
        (P * G, lambda u: u.condition(y, mask), u.encoder.language_model,
         lambda **inputs: len(inputs['inputs_embeds'])),
        (P, lambda u: u.encoder.see(x)['features'], u.encoder.vlm.model.visual,
         lambda pixels, grid_thw, **options: len(grid_thw)),
    ]
    for total, call, module, count in passes:
        found, rows = rows_of(lambda: call(u), module, count)
        assert sum(rows) == total
        assert max(rows) == min(size or total, total)
        assert len(rows) == -(-total // max(rows)), 'and no fewer than may be'
        torch.testing.assert_close(found, call(at(uae, micro_batch=0, guidance=2.0)), **CLOSE)
    with torch.enable_grad():                    # a micro-batch already: it stays together
        c = c.requires_grad_()
        _, rows = rows_of(lambda: decoder.velocity(z, s, c), *passes[0][2:])
    assert rows == [P]
