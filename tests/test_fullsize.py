"""Full size without weights: the published architectures on the meta device, and real photos.

Photos ask of the captioner: images of more than one size, two-dimensional positions, logits of a
vocabulary of 152k in pieces.
"""
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import encoder
from conftest import at, shared_config, uniforms
from encoder import token_logp
from lib import ranks
from test_logp import full_forward, library_logp
from tools import plan
from tools.rehearse import skeleton

LAYERS = dict(medium=24, paper=38)              # of the decoder


@pytest.fixture(scope='module', params=['medium', 'paper'])
def full(request):
    """(preset, UAE without weights, with LoRA)."""
    ranks.quiet()
    return request.param, skeleton(shared_config(f'--preset={request.param}'), 'meta')


def count(module):
    """Parameters without those of adapters."""
    return sum(p.numel() for name, p in module.named_parameters() if 'lora_' not in name)


def adapted(tower):
    """Names of the layers that have an adapter."""
    end = '.lora_A.default'
    return {name.removesuffix(end) for name, _ in tower.named_modules() if name.endswith(end)}


# --- the published models -------------------------------------------------------------------------
def test_parameter_counts_are_the_published_ones(full):
    """What the architectures leave to the libraries' defaults is right as well."""
    preset, uae = full
    vlm, transformer = uae.encoder.vlm, uae.decoder.transformer
    assert all(p.is_meta for p in uae.parameters())
    assert count(vlm) == 3_754_622_976
    assert round(count(vlm.model.visual) / 1e6) == 669
    assert tuple(list(vlm.config.vision_config.fullatt_block_indexes)) == (7, 15, 23, 31)
    assert uae.encoder.head.weight is uae.encoder.embed.weight
    assert tuple(uae.encoder.head.weight.shape) == (151936, 2048)
    assert round(count(transformer) / 1e9, 2) == dict(medium=2.24, paper=8.06)[preset]
    with_table = count(transformer) + transformer.pos_embed.pos_embed.numel()
    assert round(with_table / 1e9, 2) == dict(medium=2.47, paper=8.15)[preset]
    assert round(count(uae.decoder.vae) / 1e6, 1) == 83.8
    assert uae.decoder.latent_shape() == (16, 64, 64)
    # paper: 2048 -> 8192 -> 4096
    assert tuple(uae.projector.up.weight.shape) == (8192, 2048)
    assert tuple(uae.projector.down.weight.shape) == (4096, 8192)


def test_lora_at_full_size(full):
    """7 linear layers in each of 36 layers of the language model, rank (in + out) numbers each;
    Flow-GRPO's 8 projections of each block's joint attention (the last block has no to_add_out),
    not SD3.5-medium's second attention. test_logp has the names."""
    preset, uae = full
    transformer = uae.decoder.transformer
    assert len(adapted(uae.encoder.vlm)) == 7 * 36
    assert len(adapted(transformer)) == 8 * LAYERS[preset] - 1
    second = [name for name, _ in transformer.named_modules() if name.endswith('attn2.to_q')]
    assert len(second) == dict(medium=13, paper=0)[preset]
    assert not any('attn2' in name for name in adapted(transformer))
    module = uae.encoder.language_model.layers[0].mlp.up_proj
    assert (module.r['default'], module.scaling['default']) == (32, 2)       # alpha 64
    for part, layers, trained in (('encoder', 7 * 36, 32 * 36 * 51968),
                                  ('decoder', 8 * LAYERS[preset] - 2, None)):    # add_q of the last
        params = uae.train_only(part)
        names = [name for name, p in uae.named_parameters() if p.requires_grad]
        uae.requires_grad_(False)
        assert all(name.startswith(part) and '.lora_' in name for name in names)
        assert len(names) == 2 * layers
        assert all(p.dtype == torch.float32 for p in params)
        assert trained in (None, sum(p.numel() for p in params))


@pytest.mark.parametrize('preset', ['medium', 'paper'])
def test_presets_are_the_paper_s(preset):
    """Prompts, sizes and rates from the paper and its released code."""
    captions = plan.read('grpo_encoder', [f'--preset={preset}'])[1]
    drawings = plan.read('grpo_decoder', [f'--preset={preset}'])[1]
    assert captions.negative_prompt == (
        'Generate a random, low quality, ugly, blur, bad and anime, cartoon image.')
    assert captions.caption_prompt.startswith(
        'You are an expert vision-language model.  \n'
        'Your task is: Given an input image, generate a **textual description**')
    assert captions.caption_prompt.endswith(
        'transcribe it inside double quotes "".  \n'
        'Now, carefully analyze the input image and output the full description. ')
    expected = dict(resolution=512, denoise_steps=10, eval_denoise_steps=40, lora_rank=32,
                    cond_len=512, dtype='bfloat16', clip='ViT-L-14-quickgelu:openai',
                    lr=1e-6, kl=1e-6, group=4, temperature=1.0,              # v5
                    guidance=dict(medium=1.0, paper=5.0)[preset])
    assert {key: getattr(captions, key) for key in expected} == expected
    assert drawings.lr == 3e-4
    assert drawings.clip_range[0] == dict(medium=1e-5, paper=1e-4)[preset]
    assert plan.read('cold_start', [f'--preset={preset}'])[1].lr == 1e-6


# --- photos of any size: the library's own forward on tokens, pixels and mm_token_type_ids --------
@pytest.fixture(scope='module', params=[(64, 64), (32, 64), (96, 32)], ids=str)
def photos(request, uae):
    """Three images larger than the tiny world's, and what the captioner sees of them."""
    g = torch.Generator().manual_seed(3)
    blurred = torch.rand(3, 3, 8, 8, generator=g) * 2 - 1
    x = F.interpolate(blurred, request.param, mode='bilinear')
    return x, uae.encoder.see(x)


def sample(uae, vision, u):
    """Captions at temperature 1 for the uniforms u: y, mask, logp."""
    return uae.encoder.sample(vision, len(u) // len(vision['grid']), 1.0, u)


@pytest.mark.parametrize('G', [1, 3])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_shared_prompt_is_the_naive_forward(uae, photos, G, checkpointing):
    """One vision pass and prefill per image, expanded to the group, against the whole model on
    every row alone: 1e-5."""
    x, vision = photos
    y, mask, recorded = sample(uae, vision, uniforms(3 * G, uae.config.caption_len))
    want = library_logp(uae, full_forward(uae, x, y), y, 1.0)
    with torch.no_grad():
        scored = at(uae, checkpointing=checkpointing).encoder.logp(vision, y)
    assert ((want - recorded) * mask).abs().max() < 1e-5
    assert ((want - scored) * mask).abs().max() < 1e-5


def test_positions_are_the_library_s_in_three_dimensions(uae, photos):
    """The prompt's positions are get_rope_index's; a caption goes on after the largest of them,
    which is less than the number of tokens."""
    _, vision = photos
    _, positions = uae.encoder.prompt(vision)
    t, h, w = vision['grid'][0].tolist()
    h, w = h // 2, w // 2
    before, after = len(uae.encoder.before_image), len(uae.encoder.after_image)
    n = t * h * w
    image = positions[:, 0, before:before + n] - before
    assert torch.equal(image[1].view(h, w), torch.arange(h)[:, None].expand(h, w))
    assert torch.equal(image[2].view(h, w), torch.arange(w).expand(h, w))
    assert not image[0].any()
    assert torch.equal(positions, positions[:, :1].expand_as(positions))
    assert torch.equal(positions[:, 0, :before], torch.arange(before).expand(3, before))
    text = before + max(h, w) + torch.arange(after)
    assert torch.equal(positions[:, 0, before + n:], text.expand(3, -1))
    with torch.no_grad():
        cache, _, start = uae.encoder.prefill(vision)
    assert start == before + max(h, w) + after
    assert start < before + n + after == cache.get_seq_length()


def test_leaving_out_mm_token_type_ids_would_be_seen(uae, photos, monkeypatch):
    _, vision = photos
    y, mask, recorded = sample(uae, vision, uniforms(6, uae.config.caption_len))
    inner = uae.encoder.vlm.model
    rope_index = inner.get_rope_index

    def without_kinds(ids, mm_token_type_ids, **other):
        return rope_index(ids, mm_token_type_ids=torch.zeros_like(mm_token_type_ids), **other)

    monkeypatch.setattr(inner, 'get_rope_index', without_kinds)
    with torch.no_grad():
        logp = uae.encoder.logp(vision, y)
    assert ((logp - recorded) * mask).abs().amax(1).min() > 1e-3


def test_an_earlier_image_leaves_nothing_behind(uae, photos, monkeypatch):
    """The library keeps the offset of the last image on the model: ours must not read it, nor leave
    one. A small image after a large one is captioned as if it came first."""
    x, vision = photos
    u = uniforms(6, uae.config.caption_len)
    inner = uae.encoder.vlm.model
    y, mask, logp = sample(uae, vision, u)
    for other in (torch.tensor([[-7]]), torch.tensor([[500]]), None):
        monkeypatch.setattr(inner, 'rope_deltas', other)
        again = sample(uae, vision, u)
        assert torch.equal(again[0], y) and torch.equal(again[2], logp)
        with torch.no_grad():
            assert ((uae.encoder.logp(vision, y) - logp) * mask).abs().max() < 1e-5
        assert inner.rope_deltas is other
    small = uae.encoder.see(x[:, :, :32, :32])
    first = sample(uae, small, u)
    full_forward(uae, x, y)
    assert all(torch.equal(a, b) for a, b in zip(first, sample(uae, small, u)))


# --- truncated captions ---------------------------------------------------------------------------
def test_a_truncated_caption_counts_as_it_stands(uae, vision):
    """No end token within caption_len: every one of the T tokens is valid, is scored, and is what
    the decoder gets; nothing is dropped or appended."""
    short = at(uae, caption_len=3)
    y, mask, logp = sample(short, vision, uniforms(16, 3))
    cut = y[:, -1] != short.encoder.end
    assert cut.any()
    assert mask[cut].all()
    assert (logp[cut] < 0).all()
    with torch.no_grad():
        assert ((short.encoder.logp(vision, y) - logp) * mask).abs().max() < 1e-5
        longer = F.pad(y[cut], (0, 2), value=short.encoder.end)
        c = short.condition(y[cut], mask[cut])
        assert torch.equal(c, short.condition(longer, F.pad(mask[cut], (0, 2))))


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


def test_the_captioner_s_log_prob_goes_through_those_pieces(uae, vision, sampled, monkeypatch):
    """It asks for the logits of T positions a caption, none of the prompt's, by token_logp alone.
    """
    y, mask, logp = sampled
    shapes = []

    def in_pieces(h, *args):
        shapes.append(tuple(h.shape[:2]))
        return token_logp(h, *args, chunk=64 * 5)

    monkeypatch.setattr(encoder, 'token_logp', in_pieces)
    with torch.no_grad():
        scored = uae.encoder.logp(vision, y)
    assert ((scored - logp) * mask).abs().max() < 1e-5
    assert shapes == [tuple(y.shape)]
