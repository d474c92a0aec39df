"""The ratio is one: what a rollout records and what the update computes are the same log-prob.

For captions and for denoising steps, however the batch is cut; and both are the library's own.
"""
import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import G, P, at, new_uae, rolled, shared_config, uniforms
from PIL import Image

import encoder
from decoder import sde_step
from encoder import token_logp
from grpo_encoder import kl_k3
from lib import ranks


@torch.no_grad()
def score(uae, vision, y, temperature=1.0):
    """log pi(y | x), (B, T), without a gradient."""
    return uae.encoder.logp(vision, y, temperature)


def largest(difference, mask):
    """The largest absolute entry where a token was sampled."""
    return (difference * mask).abs().max()


# --- captions: sampled against re-scored ---------------------------------------------------------
@pytest.mark.parametrize('temperature', [1.0, 0.7, 1.5])
def test_recorded_equals_rescored(uae, vision, temperature):
    u = uniforms(P * G, uae.config.caption_len)
    y, mask, logp = uae.encoder.sample(vision, G, temperature, u)
    assert mask.sum(1).unique().numel() > 1
    again = score(uae, vision, y, temperature)
    other = score(uae, vision, y, temperature + 0.3)
    assert again.shape == y.shape
    assert again.dtype == torch.float32
    assert again.isfinite().all()
    assert largest(again - logp, mask) < 1e-5
    assert largest(other - logp, mask) > 0.1                # the temperature is part of the policy
    assert (logp <= 0).all()
    assert logp.min() < -1
    assert not logp[mask == 0].any()


def test_groups_are_contiguous_blocks(uae, vision, sampled):
    """G captions of the first image, then of the second; against another image they differ."""
    y, mask, logp = sampled
    u = uniforms(P * G, uae.config.caption_len)
    for image, rows, _ in ranks.group_slices(P, G, G):
        one = ranks.take(vision, image)
        assert torch.equal(uae.encoder.sample(one, G, 1.0, u[rows])[0], y[rows])
    wrong = score(uae, rolled(vision), y)
    off = ((wrong - logp) * mask).abs().amax(1)
    assert (off > 0.1).all()


def full_forward(uae, x, y, **kwargs):
    """Logits of every caption position from the library's own forward pass, no cache."""
    u8 = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    pix = uae.encoder.processor.image_processor(images=list(u8), return_tensors='pt')
    n, grid = len(y) // len(x), pix['image_grid_thw']
    vlm, token = uae.encoder.vlm, uae.encoder.image_token
    N = int(grid[0].prod()) // vlm.config.vision_config.spatial_merge_size ** 2
    prompt = torch.tensor(uae.encoder.before_image + [token] * N + uae.encoder.after_image)
    ids = torch.cat([prompt.expand(len(y), -1), y], 1)
    if not kwargs:
        kwargs = dict(mm_token_type_ids=(ids == token).int())
    pixels = pix['pixel_values'].unflatten(0, (len(x), -1))
    pixels = pixels.repeat_interleave(n, 0).flatten(0, 1)
    grids = grid.repeat_interleave(n, 0)
    with torch.no_grad():
        out = vlm(input_ids=ids, pixel_values=pixels, image_grid_thw=grids, **kwargs)
    return out.logits[:, len(prompt) - 1:-1]


def library_logp(uae, logits, y, temperature):
    """log pi(y) from logits, forbidden tokens out."""
    logits = (logits / temperature).masked_fill(uae.encoder.forbidden, -math.inf)
    return logits.log_softmax(-1).gather(-1, y[..., None])[..., 0]


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_equals_the_library_s_forward(uae, x, vision, sampled, temperature):
    y, mask, _ = sampled
    logits = full_forward(uae, x, y)
    logp = library_logp(uae, logits, y, temperature)
    ours = score(uae, vision, y, temperature)
    assert largest(logp - ours, mask) < 1e-5
    line = full_forward(uae, x, y, mm_token_type_ids=None)  # the image's tokens stand in a line:
    assert (logits - line).abs().amax((1, 2)).min() > 0.01  # this test would see it


def test_template_is_the_processor_s(uae, x, vision):
    """The prompt is what apply_chat_template and the processor make of caption prompt and image."""
    content = [dict(type='text', text=uae.config.caption_prompt), dict(type='image')]
    user = dict(role='user', content=content)
    processor = uae.encoder.processor
    text = processor.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    pixels = ((x[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    image = Image.fromarray(pixels)
    ids = processor(text=[text], images=[image], return_tensors='pt').input_ids[0].tolist()
    N = vision['features'].shape[1]
    token = uae.encoder.image_token
    assert ids == uae.encoder.before_image + [token] * N + uae.encoder.after_image
    assert uae.encoder.prompt(vision)[0].shape[1] == len(ids)


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
    other, vlm = at(uae), copy.copy(uae.encoder.vlm)
    vlm._modules = dict(vlm._modules, lm_head=head)
    other.encoder._modules['vlm'] = vlm
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
    encoder = uae.encoder
    V, known = encoder.head.weight.shape[0], len(encoder.tokenizer)
    special = set(encoder.tokenizer.all_special_ids) - {encoder.end}
    assert encoder.forbidden.shape == (V,) and V > known
    assert encoder.image_token in special
    forbidden = set(encoder.forbidden.nonzero().flatten().tolist())
    assert forbidden == special | set(range(known, V))


@pytest.mark.parametrize('temperature', [0.0, 0.7, 1.0])
def test_forbidden_tokens_are_never_sampled(uae, vision, temperature):
    """Not even where their logits are the largest; they take nothing from the others' share."""
    pushed = with_head(uae, uae.encoder.forbidden * 50.0)
    u = uniforms(P * G, uae.config.caption_len)
    u[0], u[1], u[2] = 0.0, 1 - 2 ** -24, 1e-30
    y, mask, logp = pushed.encoder.sample(vision, G, temperature, u)
    assert not uae.encoder.forbidden[y].any()
    assert logp.isfinite().all()
    plain_y, _, plain_logp = uae.encoder.sample(vision, G, temperature, u)
    assert torch.equal(y, plain_y)
    assert torch.equal(logp, plain_logp)
    assert torch.equal(score(pushed, vision, y), score(uae, vision, y))


def test_forbidden_tokens_score_minus_infinity(uae, vision, sampled):
    """And the others' probabilities sum to one."""
    encoder, y = uae.encoder, sampled[0].clone()
    y[:, 3] = encoder.image_token
    y[:, 5] = len(encoder.tokenizer)
    logp = score(uae, vision, y)
    assert (logp[:, [3, 5]] == -math.inf).all()
    assert logp[:, [0, 1, 2, 4]].isfinite().all()
    with torch.no_grad():
        first = encoder.caption_states(vision, y)[:, :1]
        V = encoder.head.weight.shape[0]
        every = token_logp(first.expand(-1, V, -1), encoder.head,
                           torch.arange(V).expand(P * G, -1), 0.7, encoder.forbidden)
    torch.testing.assert_close(every.exp().sum(1), torch.ones(P * G))
    assert (every[:, encoder.forbidden] == -math.inf).all()


# --- captions: the sampler -----------------------------------------------------------------------
@pytest.mark.parametrize('temperature', [1.0, 0.6])
def test_frequencies_are_the_softmax(uae, vision, temperature):
    """Uniforms on a fine grid through fixed logits.

    Each token is drawn exactly its share, to one part of the grid.
    """
    V, N = uae.encoder.head.weight.shape[0], 4000
    bias = torch.randn(V, generator=torch.Generator().manual_seed(0)) * 2
    fixed = at(with_head(uae, bias, constant=True), caption_len=1)
    u = (torch.arange(N)[:, None] + 0.5) / N
    first = ranks.take(vision, slice(0, 1))
    y, mask, logp = fixed.encoder.sample(first, N, temperature, u[torch.randperm(N)])
    p = (bias / temperature).masked_fill(uae.encoder.forbidden, -math.inf).softmax(-1)
    frequency = torch.bincount(y[:, 0], minlength=V) / N
    assert (frequency - p).abs().max() < 1.5 / N
    torch.testing.assert_close(logp[:, 0].exp(), p[y[:, 0]], atol=1e-5, rtol=1e-4)
    assert mask.all()


def test_greedy_is_the_argmax(uae, x, vision):
    y, mask, logp = uae.encoder.sample(vision, 2, 0)
    again = uae.encoder.sample(vision, 2, 0, uniforms(2 * P, uae.config.caption_len))
    for a, b in zip((y, mask, logp), again):
        assert torch.equal(a, b)
    assert torch.equal(y[::2], y[1::2])
    best = full_forward(uae, x, y).masked_fill(uae.encoder.forbidden, -math.inf).argmax(-1)
    assert torch.equal(best[mask > 0], y[mask > 0])
    assert largest(score(uae, vision, y) - logp, mask) < 1e-5


def test_the_uniforms_are_the_randomness(uae, vision, sampled):
    """Same uniforms, same captions; members of a group differ because theirs do."""
    T, y = uae.config.caption_len, sampled[0]
    first, second = uniforms(P * G, T), uniforms(P * G, T, seed=2)
    torch.manual_seed(7)
    assert torch.equal(uae.encoder.sample(vision, G, 1.0, first)[0], y)
    assert not torch.equal(uae.encoder.sample(vision, G, 1.0, second)[0], y)
    for block in y.split(G):
        assert len(set(map(tuple, block.tolist()))) == G

    later = second.clone()                       # one uniform per token: only later ones change
    later[:, :3] = first[:, :3]
    changed = uae.encoder.sample(vision, G, 1.0, later)[0] != y
    assert not changed[:, :3].any()
    assert changed[:, 3:].any()


def test_mask_has_one_entry_per_sampled_token(uae, vision, sampled):
    """1 up to and with the end token, 0 after it; after it only end tokens; caption_len at most."""
    y, mask, _ = sampled
    T = uae.config.caption_len
    assert y.shape == mask.shape == (P * G, T)
    assert set(mask.unique().tolist()) == {0., 1.}
    for row, row_mask in zip(y.tolist(), mask.int().tolist()):
        n = (row + [uae.encoder.end]).index(uae.encoder.end) + 1
        assert row_mask == ([1] * n + [0] * T)[:T]
        assert row[n:] == [uae.encoder.end] * (T - n)
    short = at(uae, caption_len=5).encoder
    y, mask, _ = short.sample(vision, G, 1.0, uniforms(P * G, T))
    assert y.shape == (P * G, 5)
    assert torch.equal(y, sampled[0][:, :5])
    assert torch.equal(mask, sampled[1][:, :5])


# --- denoising steps -----------------------------------------------------------------------------
S, B = 8, 4
CLOSE = dict(atol=1e-5, rtol=1e-5)


@pytest.fixture(scope='module')
def c(uae, sampled):
    """Conditions of one caption of each image."""
    y, mask, _ = sampled
    with torch.no_grad():
        return uae.condition(y[::G], mask[::G])


def noises(uae, W):
    """Start noise (B, C, H, W), and that of W steps."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(B, *uae.decoder.latent_shape(), generator=g)
    return start, torch.randn(B, W, *uae.decoder.latent_shape(), generator=g)


def score_steps(uae, path, offsets, begin, c, kind='flow', negative=None, rows=slice(None)):
    """Some of the stored steps scored again: logp, mean, std."""
    stored = {name: path[name][rows][:, offsets] for name in ('z', 'z_next', 'v0') if name in path}
    steps = [begin + offset for offset in offsets]
    return uae.decoder.step_logp(steps=steps, c=c[rows], S=S, kind=kind, noise_level=0.7,
                                 negative=negative, **stored)


def tolerance(std):
    """1e-6; where a step's std is tiny (cps near s = 0), what rounding in float32 comes to."""
    return 1e-6 * (0.05 / std.flatten(1)).clamp(min=1)


@pytest.mark.parametrize('guidance, kind, window', [
    (1.0, 'flow', (0, 7)),
    (2.0, 'flow', (2, 5)),
    (1.0, 'cps', (2, 5)),
    (2.0, 'cps', (0, 7)),
    (2.0, 'cps_exact', (2, 5)),
])
@torch.no_grad()
def test_steps_recorded_equal_steps_replayed(uae, c, guidance, kind, window):
    """Every step, any subset of steps in one forward pass, any cut of the batch."""
    u, W = at(uae, guidance=guidance), window[1] - window[0]
    z, noise = noises(u, W)
    negative = u.negative() if guidance != 1 else None
    _, path = u.decoder.draw_sde(z, c, S, noise, kind, 0.7, window, negative)
    recorded, v0 = path['recorded'], path.pop('v0', None)
    assert recorded.shape == (B, W)
    assert recorded.abs().min() > 0
    assert (v0 is None) == (negative is None)
    cases = [(offsets, size, path) for offsets in (list(range(W)), [0, 2], [2, 1])
             for size in (B, 3)]
    if v0 is not None:
        cases += [([0, 2], 3, dict(path, v0=v0)), ([2, 1], B, dict(path, v0=v0))]
    for offsets, size, known in cases:
        parts = [score_steps(u, known, offsets, window[0], c, kind, negative, slice(b, b + size))
                 for b in range(0, B, size)]
        again, mean, std = (torch.cat(part) for part in zip(*parts))
        assert again.shape == std.flatten(1).shape == (B, len(offsets))
        bound = tolerance(std.flatten(0, 1)).view_as(again)
        assert ((again - recorded[:, offsets]).abs() < bound).all()
        z_next = mean + std * noise[:, offsets]
        torch.testing.assert_close(z_next, path['z_next'][:, offsets], atol=1e-5, rtol=1e-4)
    # against another caption it is another policy
    wrong = score_steps(u, path, list(range(W)), window[0], c.roll(1, 0), kind, negative)[0]
    assert (wrong - recorded).abs().max() > 1e-4


@pytest.mark.parametrize('kind', ['flow', 'cps'])
@torch.no_grad()
def test_outside_the_window_it_is_the_ode(uae, c, kind):
    z, noise = noises(uae, 3)
    z_0, path = uae.decoder.draw_sde(z, c, S, noise, kind, 0.7, (2, 5))
    before, after = path['z'], path['z_next']
    sigmas = uae.decoder.sigmas(S)

    def ode(z, first, last):
        for i in range(first, last):
            z = z + (sigmas[i + 1] - sigmas[i]) * uae.decoder.velocity(z, sigmas[i], c)
        return z

    torch.testing.assert_close(before[:, 0], ode(z, 0, 2), **CLOSE)
    torch.testing.assert_close(z_0, ode(after[:, -1], 5, S), **CLOSE)
    assert torch.equal(before[:, 1:], after[:, :-1])
    other, _ = uae.decoder.draw_sde(z, c, S, torch.ones_like(noise), kind, 0.7, (2, 5))
    assert (other - z_0).abs().max() > 0.1


@pytest.mark.parametrize('guidance', [1.0, 2.0])
@torch.no_grad()
def test_draw_is_the_chain_of_noiseless_steps(uae, c, guidance):
    u = at(uae, guidance=guidance)
    z, _ = noises(u, 1)
    sigmas, negative, chain = u.decoder.sigmas(S), u.negative(), z
    assert sigmas.shape == (S + 1,)
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    assert sigmas.dtype == torch.float32
    for i in range(S):
        v = u.decoder.velocity(chain, sigmas[i], c, negative)
        chain = sde_step(chain, v, sigmas[i], sigmas[i + 1], 'flow', 0.0)[0]
    torch.testing.assert_close(u.decoder.draw(z, c, S, negative), chain, **CLOSE)
    torch.testing.assert_close(u.draw(z, c, S), u.decoder.to_image(chain), **CLOSE)


@pytest.mark.parametrize('k', [0, 1, 3, S])
def test_draw_has_gradients_of_its_last_steps_only(uae, c, k):
    """Velocity c z: each step multiplies by 1 + c dt.

    So the last k steps have a derivative in c that can be written out.
    """
    live = []                                    # of each step: is autograd on?

    def velocity(z, s, c, negative):
        live.append(torch.is_grad_enabled())
        return c * z

    decoder = at(uae).decoder
    decoder.velocity = velocity
    steps = decoder.sigmas(S).diff()
    c = torch.tensor(0.7, requires_grad=True)
    z_0 = decoder.draw(torch.ones(1, 1, 1, 1), c, S, None, k)
    factors = 1 + c.detach() * steps
    torch.testing.assert_close(z_0.detach().squeeze(), factors.prod(), **CLOSE)
    assert live == [False] * (S - k) + [True] * k
    assert torch.is_grad_enabled()
    assert z_0.requires_grad == (k > 0)
    if k:
        got = torch.autograd.grad(z_0.sum(), c)[0]
        want = factors.prod() * (steps[S - k:] / factors[S - k:]).sum()
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


# --- the reference policy and LoRA ---------------------------------------------------------------
@pytest.fixture(scope='module')
def lora():
    return new_uae(shared_config('--lora_rank=4'))


@torch.no_grad()
def move(params):
    """An update of some size, the same each time."""
    for i, p in enumerate(params):
        p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))


def ids_of(module):
    return {id(p) for p in module.parameters()}


@pytest.mark.parametrize('rank', [0, 4])
@pytest.mark.parametrize('name', ['encoder', 'decoder'])
def test_the_reference_policy(uae, lora, vision, sampled, c, name, rank):
    """Before an update KL is 0; an update moves the policy and not the reference.

    The reference is frozen, copies what is trained and shares all else.
    """
    y, mask, _ = sampled
    u = copy.deepcopy(lora if rank else uae)
    params = u.train_only(name)
    ref = u.reference(name)
    z, noise = noises(u, 2)
    _, path = u.decoder.draw_sde(z, c, S, noise, 'flow', 0.7, (1, 3))

    @torch.no_grad()
    def policy(model):
        if name == 'encoder':
            return score(model, vision, y) * mask
        return score_steps(model, path, [0, 1], 1, c)[1]

    begun = policy(u)
    assert torch.equal(policy(ref), begun)
    move(params)
    assert torch.equal(policy(ref), begun)
    assert (policy(u) - begun).abs().max() > 1e-3
    if name == 'encoder':
        assert not kl_k3(begun, begun).any()
        assert kl_k3(policy(u), begun).max() > 0

    frozen, trained = getattr(ref, name), getattr(u, name)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in params)
    own = ids_of(frozen) - ids_of(trained)
    assert len(own) == len(params)
    assert not own & {id(p) for p in params}
    for other in {'encoder', 'projector', 'decoder'} - {name}:
        assert getattr(ref, other) is getattr(u, other)


def test_where_lora_goes(lora):
    """Every linear layer of the language model, the decoder's attention projections, nothing else.

    The latter are those of Flow-GRPO.
    """
    u = copy.deepcopy(lora)
    modules = [name for name, _ in u.named_modules() if name.endswith('.lora_A.default')]
    adapted = {name.rsplit('.lora_A', 1)[0] for name in modules}
    linear = [f'self_attn.{k}_proj' for k in 'qkvo']
    linear += [f'mlp.{k}_proj' for k in ('gate', 'up', 'down')]
    projections = ['add_k_proj', 'add_q_proj', 'add_v_proj', 'to_add_out']
    projections += ['to_k', 'to_out.0', 'to_q', 'to_v']
    layers = range(u.encoder.vlm.config.text_config.num_hidden_layers)
    blocks = range(u.decoder.transformer.config.num_layers)
    encoder = {f'encoder.vlm.model.language_model.layers.{i}.{k}' for i in layers for k in linear}
    decoder = {f'decoder.transformer.transformer_blocks.{i}.attn.{k}'
               for i in blocks for k in projections}
    decoder.remove(f'decoder.transformer.transformer_blocks.{blocks[-1]}.attn.to_add_out')  # unused
    assert adapted == encoder | decoder

    names = {id(p): name for name, p in u.named_parameters()}
    trained = {names[id(p)] for p in u.train_only('encoder')}
    assert trained == {f'{name}.lora_{k}.default.weight' for name in encoder for k in 'AB'}


def test_fresh_lora_is_the_base_model(lora, vision, sampled):
    y, mask, _ = sampled
    base = new_uae(shared_config())
    assert largest(score(base, vision, y) - score(lora, vision, y), mask) < 1e-5
    module = lora.encoder.language_model.layers[0].mlp.up_proj
    assert module.scaling['default'] == 2
    assert not module.lora_B['default'].weight.any()
    assert module.lora_A['default'].weight.std() > 0


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_a_cache_of_fixed_length_writes_the_same_captions(uae, vision, monkeypatch, temperature):
    """What a GPU replays as one graph: every place is attended to, those to come are masked."""
    monkeypatch.setattr(encoder, 'captured', lambda step: step)
    other = at(uae).encoder
    lengths = []

    def fixed_cache(prompt, G, room):
        cache = encoder.CaptionCache(prompt, G, room, fixed=True)
        lengths.append({len(cache.places), *(keys.shape[2] for keys in cache.keys)})
        return cache

    other.caption_cache = fixed_cache
    u = uniforms(P * G, uae.config.caption_len)
    y, mask, logp = uae.encoder.sample(vision, G, temperature, u)
    y_fixed, mask_fixed, logp_fixed = other.sample(vision, G, temperature, u)
    assert torch.equal(y, y_fixed) and torch.equal(mask, mask_fixed)
    torch.testing.assert_close(logp, logp_fixed, atol=1e-5, rtol=1e-4)
    assert all(len(found) == 1 and found.pop() % 8 == 0 for found in lengths), 'one length'


def test_float32_on_a_card_is_float32_and_attention_is_planned_once():
    ranks.start(shared_config('--device=cpu'))
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.cudnn_sdp_enabled()
