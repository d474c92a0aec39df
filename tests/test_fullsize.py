"""Full size without weights: the published architectures on the meta device, and real photos.

Photos ask of the captioner: images of more than one size, two-dimensional positions, logits of a
vocabulary of 152k in pieces.
"""
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cold_start
from lib import ranks
import config
import grpo_decoder
import grpo_encoder
import model
from lib.checkpoint import DECODER_LORA, ENCODER_LORA
from conftest import at
from encoder import token_logp
from test_logp import full_forward, uniforms
from tools.plan import skeleton


def without_weights(preset):
    """The UAE of a preset without weights, with LoRA."""
    ranks.quiet()
    c = config.parse({}, {}, [f'--preset={preset}'], 'x.py')
    return skeleton(c, 'meta')


@pytest.fixture(scope='module', params=['medium', 'paper'])
def full(request):
    """(preset, UAE without weights, with LoRA)."""
    return request.param, without_weights(request.param)


def count(module):
    """Parameters without those of adapters."""
    return sum(p.numel() for name, p in module.named_parameters() if 'lora_' not in name)


def adapted(tower):
    """Names of the layers that have an adapter."""
    end = '.lora_A.default'
    return {name.removesuffix(end) for name, _ in tower.named_modules() if name.endswith(end)}


# --- the published models -------------------------------------------------------------------------
def test_parameter_counts_are_the_published_ones(full):
    preset, uae = full
    assert all(p.is_meta for p in uae.parameters())
    assert round(count(uae.encoder.vlm) / 1e9, 2) == 3.75
    assert round(count(uae.encoder.vlm.model.visual) / 1e6) == 669
    assert uae.encoder.head.weight is uae.encoder.embed.weight
    assert tuple(uae.encoder.head.weight.shape) == (151936, 2048)
    assert round(count(uae.decoder.transformer) / 1e9, 2) == dict(medium=2.24, paper=8.06)[preset]
    table = uae.decoder.transformer.pos_embed.pos_embed
    with_table = count(uae.decoder.transformer) + table.numel()
    assert round(with_table / 1e9, 2) == dict(medium=2.47, paper=8.15)[preset]
    assert round(count(uae.decoder.vae) / 1e6, 1) == 83.8
    assert uae.decoder.latent_shape() == (16, 64, 64)
    # paper: 2048 -> 8192 -> 4096
    assert tuple(uae.projector.up.weight.shape) == (8192, 2048)
    assert tuple(uae.projector.down.weight.shape) == (4096, 8192)


def test_every_target_of_lora_is_there_and_nothing_else_is_adapted(full):
    """7 linear layers in each of 36 layers of the language model; Flow-GRPO's 8 projections of
    each block's joint attention (the last block has no to_add_out), and not the second attention
    (attn2) of SD3.5-medium, which those names do not reach."""
    preset, uae = full
    encoder = adapted(uae.encoder.vlm)
    decoder = adapted(uae.decoder.transformer)
    layers = dict(medium=24, paper=38)[preset]

    linear = [f'self_attn.{k}_proj' for k in 'qkvo']
    linear += [f'mlp.{k}_proj' for k in ('gate', 'up', 'down')]
    assert encoder == {f'model.language_model.layers.{i}.{k}' for i in range(36) for k in linear}
    assert len(encoder) == 252

    joint = ['add_k_proj', 'add_q_proj', 'add_v_proj', 'to_add_out']
    joint += ['to_k', 'to_out.0', 'to_q', 'to_v']
    expected = {f'transformer_blocks.{i}.attn.{k}' for i in range(layers) for k in joint}
    assert decoder == expected - {f'transformer_blocks.{layers - 1}.attn.to_add_out'}

    second = any('attn2.to_q' in name for name, _ in uae.decoder.transformer.named_modules())
    assert second == (preset == 'medium')
    assert not adapted(uae.projector)
    assert not adapted(uae.decoder.vae)
    for part in ('visual', 'lm_head', 'embed_tokens', 'attn2'):
        assert not any(part in name for name in encoder | decoder)
    module = uae.encoder.vlm.model.language_model.layers[0].mlp.up_proj
    assert module.r['default'] == 32
    assert module.scaling['default'] == 2        # alpha 64
    assert all(re.fullmatch(ENCODER_LORA, name) for name in encoder)
    assert all(re.fullmatch(DECODER_LORA, name) for name in decoder)


@pytest.mark.parametrize('part, trained', [('encoder', 32 * 36 * 51968), ('decoder', None)])
def test_what_trains_at_full_size(full, part, trained):
    """The adapters of one tower, rank (in + out) numbers each, as float32 master weights."""
    _, uae = full
    params = uae.train_only(part)
    names = [name for name, p in uae.named_parameters() if p.requires_grad]
    uae.requires_grad_(False)
    assert all(name.startswith(part) and '.lora_' in name for name in names)
    assert all(p.dtype == torch.float32 for p in params)
    assert trained in (None, sum(p.numel() for p in params))

    last = f'decoder.transformer_blocks.{uae.decoder.transformer.config.num_layers - 1}.attn.add_q_proj'
    assert not any(name.startswith(last) for name in names)
    layers = 252 if part == 'encoder' else len(adapted(uae.decoder.transformer)) - 1
    assert len(names) == 2 * layers


@pytest.mark.parametrize('preset', ['medium', 'paper'])
def test_presets_are_the_paper_s(preset):
    """Prompts, sizes and rates from the paper and its released code."""
    def configuration(stage):
        return config.parse(stage.keys, stage.own_presets, [f'--preset={preset}'], 'x.py')

    enc = configuration(grpo_encoder)
    dec = configuration(grpo_decoder)
    cold = configuration(cold_start)
    negative = 'Generate a random, low quality, ugly, blur, bad and anime, cartoon image.'
    assert enc.negative_prompt == negative
    assert enc.caption_prompt.startswith(
        'You are an expert vision-language model.  \n'
        'Your task is: Given an input image, generate a **textual description**')
    assert enc.caption_prompt.endswith(
        'transcribe it inside double quotes "".  \n'
        'Now, carefully analyze the input image and output the full description. ')
    assert enc.resolution == 512
    assert (enc.denoise_steps, enc.eval_denoise_steps) == (10, 40)
    assert (enc.lora_rank, enc.cond_len, enc.dtype) == (32, 512, 'bfloat16')
    assert (enc.lr, enc.kl, enc.group, enc.temperature) == (1e-6, 1e-6, 4, 1.0)      # v5
    assert dec.lr == 3e-4
    assert dec.clip_range[0] == dict(medium=1e-5, paper=1e-4)[preset]
    assert cold.lr == 1e-6
    assert enc.guidance == dict(medium=1.0, paper=5.0)[preset]
    assert enc.clip == 'ViT-L-14-quickgelu:openai'


# --- photos of any size: the library's own forward on tokens, pixels and mm_token_type_ids --------
@pytest.fixture(scope='module', params=[(64, 64), (32, 64), (96, 32)], ids=str)
def photos(request, uae):
    """Three images larger than the tiny world's, and what the captioner sees of them."""
    g = torch.Generator().manual_seed(3)
    blurred = torch.rand(3, 3, 8, 8, generator=g) * 2 - 1
    x = F.interpolate(blurred, request.param, mode='bilinear')
    with torch.no_grad():
        return x, uae.encoder.see(x)


def sample(uae, seen, u):
    """Captions at temperature 1 for the uniforms u: y, mask, logp."""
    G = len(u) // len(seen[0])
    return uae.encoder.sample(seen, G, 1.0, u)


@pytest.mark.parametrize('G', [1, 3])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_shared_prompt_is_the_naive_forward(uae, photos, G, checkpointing):
    """One vision pass and prefill per image, expanded to the group, against the whole model on
    every row alone: 1e-5."""
    x, seen = photos
    y, mask, recorded = sample(uae, seen, uniforms(3 * G, uae.config.caption_len))
    want = full_forward(uae, x, y).masked_fill(uae.encoder.forbidden, -torch.inf).log_softmax(-1)
    with torch.no_grad():
        states = at(uae, checkpointing=checkpointing).caption_states(seen, y)[:, :-1]
        logits = uae.encoder.head(states).masked_fill(uae.encoder.forbidden, -torch.inf).log_softmax(-1)
    valid = mask.bool()
    torch.testing.assert_close(logits[valid], want[valid], atol=1e-5, rtol=0)
    picked = want.gather(-1, y[..., None])[..., 0]
    assert ((picked - recorded) * mask).abs().max() < 1e-5


def test_positions_are_the_library_s_in_three_dimensions(uae, photos):
    """The prompt's positions are get_rope_index's; a caption goes on after the largest of them,
    which is less than the number of tokens."""
    x, seen = photos
    emb, pos = uae.encoder.prompt(seen)
    patches = seen[1][0].tolist()
    t, h, w = patches[0], patches[1] // 2, patches[2] // 2
    before = len(uae.encoder.before_image)
    after = len(uae.encoder.after_image)
    n = t * h * w
    length = before + n + after

    image = pos[:, 0, before:before + n] - before
    rows = torch.arange(h)[:, None].expand(h, w)
    columns = torch.arange(w).expand(h, w)
    assert torch.equal(image[1].view(h, w), rows)
    assert torch.equal(image[2].view(h, w), columns)
    assert not image[0].any()
    assert torch.equal(pos, pos[:, :1].expand_as(pos))
    assert torch.equal(pos[:, 0, :before], torch.arange(before).expand(3, before))
    text = before + max(h, w) + torch.arange(after)
    assert torch.equal(pos[:, 0, before + n:], text.expand(3, -1))

    with torch.no_grad():
        cache, _, start = uae.prefill(seen, 2)
    assert start == before + max(h, w) + after
    assert start < length == cache.get_seq_length()


def test_leaving_out_mm_token_type_ids_would_be_seen(uae, photos, monkeypatch):
    x, seen = photos
    y, mask, recorded = sample(uae, seen, uniforms(6, uae.config.caption_len))
    rope_index = uae.encoder.vlm.model.get_rope_index

    def without_kinds(ids, mm_token_type_ids, **other):
        return rope_index(ids, mm_token_type_ids=torch.zeros_like(mm_token_type_ids), **other)

    monkeypatch.setattr(uae.encoder.vlm.model, 'get_rope_index', without_kinds)
    with torch.no_grad():
        logp = uae.encoder.logp(seen, y)
    assert ((logp - recorded) * mask).abs().amax(1).min() > 1e-3


def test_rope_deltas_of_an_earlier_image_do_not_leak(uae, photos):
    """The library keeps the offset of the last image on the model; ours must not read it, nor
    leave one behind."""
    x, seen = photos
    u = uniforms(6, uae.config.caption_len)
    inner = uae.encoder.vlm.model
    y, mask, logp = sample(uae, seen, u)
    before = inner.rope_deltas
    try:
        for other in (torch.tensor([[-7]]), torch.tensor([[500]]), None):
            inner.rope_deltas = other
            again = sample(uae, seen, u)
            assert torch.equal(again[0], y)
            assert torch.equal(again[2], logp)
            with torch.no_grad():
                scored = uae.encoder.logp(seen, y)
            assert ((scored - logp) * mask).abs().max() < 1e-5
            assert inner.rope_deltas is other
    finally:
        inner.rope_deltas = before


def test_images_of_two_sizes_one_after_the_other(uae):
    """A small image after a large one is captioned as if it came first."""
    g = torch.Generator().manual_seed(4)
    small = torch.rand(1, 3, 32, 32, generator=g) * 2 - 1
    large = torch.rand(1, 3, 96, 96, generator=g) * 2 - 1
    u = uniforms(2, uae.config.caption_len)
    with torch.no_grad():
        first = sample(uae, uae.encoder.see(small), u)
        y, _, _ = sample(uae, uae.encoder.see(large), u)
        full_forward(uae, large, y)
        again = sample(uae, uae.encoder.see(small), u)
    uae.encoder.vlm.model.rope_deltas = None
    assert all(torch.equal(a, b) for a, b in zip(first, again))


# --- truncated captions ---------------------------------------------------------------------------
def test_a_truncated_caption_counts_as_it_stands(uae, seen):
    """No end token within caption_len: every one of the T tokens is valid, is scored, and is what
    the decoder gets; nothing is dropped or appended."""
    short = at(uae, caption_len=3)
    y, mask, logp = sample(short, seen, uniforms(16, 3))
    cut = y[:, -1] != short.end
    assert cut.any()
    assert mask[cut].all()
    assert (logp[cut] < 0).all()
    with torch.no_grad():
        assert ((short.encoder.logp(seen, y) - logp) * mask).abs().max() < 1e-5
        longer = F.pad(y[cut], (0, 2), value=short.end)
        longer_mask = F.pad(mask[cut], (0, 2))
        c = short.condition(y[cut], mask[cut])
        assert torch.equal(c, short.condition(longer, longer_mask))


# --- the vocabulary in pieces ---------------------------------------------------------------------
class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.size = max(self.size, leaf.numel())
        return out


def test_logits_of_the_real_vocabulary_are_never_whole():
    """(B, T, V) = (2, 64, 151936) is 19 million numbers, 78 MB in float32: neither the forward nor
    the backward pass holds more than a piece."""
    V, B, T, d = 151936, 2, 64, 4
    head = torch.nn.Linear(d, V, bias=False)
    h = torch.randn(B, T, d, requires_grad=True)
    y = torch.randint(V, (B, T))
    kept = {}

    def keep(t):
        storage = t.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return t

    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            logp = token_logp(h, head, y, 1.0, torch.zeros(V, dtype=torch.bool))
        logp.sum().backward()
    assert V < largest.size <= 2 ** 24 < B * T * V
    assert sum(kept.values()) < 2 * (head.weight.nbytes + h.nbytes + V + y.nbytes)
    assert logp.shape == (B, T)
    assert h.grad.abs().sum() > 0


def test_the_captioner_s_log_prob_goes_through_those_pieces(uae, seen, sampled, monkeypatch):
    """caption_logp asks for the logits of T positions a caption, none of the prompt's, through
    token_logp alone."""
    y, mask, logp = sampled
    shapes = []

    def in_pieces(h, *args):
        shapes.append(tuple(h.shape[:2]))
        return token_logp(h, *args, chunk=64 * 5)

    monkeypatch.setattr(model, 'token_logp', in_pieces)
    with torch.no_grad():
        scored = uae.encoder.logp(seen, y)
    assert ((scored - logp) * mask).abs().max() < 1e-5
    assert shapes == [tuple(y.shape)]
