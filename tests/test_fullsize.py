"""Full size without weights: the published architectures on the meta device, and what real photos ask of the captioner:
images of more than one size, two-dimensional positions, logits of a 152k vocabulary in pieces."""
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import at
from test_logp import full_forward, uniforms
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import config
import model
from model import DECODER_LORA, ENCODER_LORA, UAE, token_logp


@pytest.fixture(scope='module', params=['medium', 'paper'])
def full(request):
    """(preset, UAE without weights, with LoRA)."""
    common.quiet()
    return request.param, common.skeleton(config.parse({}, {}, [f'--preset={request.param}'], 'x.py'))[0]


def count(module):
    return sum(p.numel() for n, p in module.named_parameters() if 'lora_' not in n)


def adapted(tower):
    return {n.removesuffix('.lora_A.default') for n, _ in tower.named_modules() if n.endswith('.lora_A.default')}


# --- the published models ---------------------------------------------------------------------------------------------
def test_parameter_counts_are_the_published_ones(full):
    preset, uae = full
    assert all(p.is_meta for p in uae.parameters())
    assert round(count(uae.encoder) / 1e9, 2) == 3.75 and round(count(uae.encoder.model.visual) / 1e6) == 669
    assert uae.head.weight is uae.embed.weight and tuple(uae.head.weight.shape) == (151936, 2048)
    assert round(count(uae.decoder) / 1e9, 2) == dict(medium=2.24, paper=8.06)[preset]
    table = uae.decoder.pos_embed.pos_embed
    assert round((count(uae.decoder) + table.numel()) / 1e9, 2) == dict(medium=2.47, paper=8.15)[preset]
    assert round(count(uae.vae) / 1e6, 1) == 83.8 and uae.latent_shape() == (16, 64, 64)
    assert tuple(uae.projector.up.weight.shape) == (8192, 2048) and tuple(uae.projector.down.weight.shape) == (4096, 8192)      # paper: 2048 -> 8192 -> 4096


def test_every_target_of_lora_is_there_and_nothing_else_is_adapted(full):
    """7 linear layers in each of 36 layers of the language model; Flow-GRPO's 8 projections of each block's joint attention (the last
    block has no to_add_out), and not the second attention (attn2) of SD3.5-medium, which those names do not reach."""
    preset, uae = full
    encoder, decoder, layers = adapted(uae.encoder), adapted(uae.decoder), dict(medium=24, paper=38)[preset]
    linear = [f'self_attn.{k}_proj' for k in 'qkvo'] + [f'mlp.{k}_proj' for k in ('gate', 'up', 'down')]
    assert encoder == {f'model.language_model.layers.{i}.{k}' for i in range(36) for k in linear} and len(encoder) == 252
    joint = ['add_k_proj', 'add_q_proj', 'add_v_proj', 'to_add_out', 'to_k', 'to_out.0', 'to_q', 'to_v']
    assert decoder == {f'transformer_blocks.{i}.attn.{k}' for i in range(layers) for k in joint} - {f'transformer_blocks.{layers - 1}.attn.to_add_out'}
    assert any('attn2.to_q' in n for n, _ in uae.decoder.named_modules()) == (preset == 'medium')
    assert not adapted(uae.projector) and not adapted(uae.vae)
    assert not any(part in n for n in encoder | decoder for part in ('visual', 'lm_head', 'embed_tokens', 'attn2'))
    module = uae.encoder.model.language_model.layers[0].mlp.up_proj
    assert module.r['default'] == 32 and module.scaling['default'] == 2            # alpha 64
    assert all(re.fullmatch(ENCODER_LORA, n) for n in encoder) and all(re.fullmatch(DECODER_LORA, n) for n in decoder)


@pytest.mark.parametrize('part, trained', [('encoder', 32 * 36 * 51968), ('decoder', None)])
def test_what_trains_at_full_size(full, part, trained):
    """The adapters of one tower, rank (in + out) numbers each, as float32 master weights."""
    _, uae = full
    params = uae.train_only(part)
    names = [n for n, p in uae.named_parameters() if p.requires_grad]
    uae.requires_grad_(False)
    assert all(n.startswith(part) and '.lora_' in n for n in names) and all(p.dtype == torch.float32 for p in params)
    assert trained in (None, sum(p.numel() for p in params))
    last = f'decoder.transformer_blocks.{uae.decoder.config.num_layers - 1}.attn.add_q_proj'
    assert not any(n.startswith(last) for n in names) and len(names) == 2 * (252 if part == 'encoder' else len(adapted(uae.decoder)) - 1)


def test_presets_are_the_paper_s():
    """Prompts, sizes and rates from the paper and its released code."""
    import cold_start, grpo_decoder, grpo_encoder
    for preset in ('medium', 'paper'):
        enc, dec, cold = (config.parse(m.keys, m.own_presets, [f'--preset={preset}'], 'x.py') for m in (grpo_encoder, grpo_decoder, cold_start))
        assert enc.negative_prompt == 'Generate a random, low quality, ugly, blur, bad and anime, cartoon image.'
        assert enc.caption_prompt.startswith('You are an expert vision-language model.  \nYour task is: Given an input image, generate a **textual description**')
        assert enc.caption_prompt.endswith('transcribe it inside double quotes "".  \nNow, carefully analyze the input image and output the full description. ')
        assert (enc.resolution, enc.sample_steps, enc.eval_steps, enc.lora_rank, enc.cond_len, enc.dtype) == (512, 10, 40, 32, 512, 'bfloat16')
        assert (enc.lr, enc.kl, enc.group, enc.temperature) == (1e-6, 1e-6, 4, 1.0)                     # v5
        assert (dec.lr, dec.clip_range[0]) == (3e-4, dict(medium=1e-5, paper=1e-4)[preset]) and cold.lr == 1e-6
        assert enc.guidance == dict(medium=1.0, paper=5.0)[preset] and enc.clip == 'ViT-L-14-quickgelu:openai'


# --- photos of any size: the library's own forward on tokens, pixels and mm_token_type_ids ------------------------------
@pytest.fixture(scope='module', params=[(64, 64), (32, 64), (96, 32)], ids=str)
def photos(request, uae):
    """Three images of more rows and columns than the tiny world's, and what the captioner sees of them."""
    g = torch.Generator().manual_seed(3)
    x = F.interpolate(torch.rand(3, 3, 8, 8, generator=g) * 2 - 1, request.param, mode='bilinear')
    with torch.no_grad():
        return x, uae.see(x)


@pytest.mark.parametrize('G', [1, 3])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_shared_prompt_is_the_naive_forward(uae, photos, G, checkpointing):
    """One vision pass and prefill per image, expanded to the group, against the whole model on every row alone: 1e-5."""
    x, seen = photos
    y, mask, recorded = uae.sample_captions(seen, G, 1.0, uniforms(3 * G, uae.c.caption_len))
    want = full_forward(uae, x, y).masked_fill(uae.forbidden, -torch.inf).log_softmax(-1)
    with torch.no_grad():
        states = at(uae, checkpointing=checkpointing).caption_states(seen, y)[:, :-1]
        logits = uae.head(states).masked_fill(uae.forbidden, -torch.inf).log_softmax(-1)
    valid = mask.bool()
    torch.testing.assert_close(logits[valid], want[valid], atol=1e-5, rtol=0)
    assert ((want.gather(-1, y[..., None])[..., 0] - recorded) * mask).abs().max() < 1e-5


def test_positions_are_the_library_s_in_three_dimensions(uae, photos):
    """The prompt's positions are get_rope_index's; a caption goes on after the largest of them, which is less than the number of tokens."""
    x, seen = photos
    emb, pos = uae.prompt(seen)
    token, (t, h, w) = uae.encoder.config.image_token_id, (n // k for n, k in zip(seen[1][0].tolist(), (1, 2, 2)))
    ids = torch.tensor([uae.before_image + [token] * (t * h * w) + uae.after_image])
    a, n = len(uae.before_image), t * h * w
    image = pos[:, 0, a:a + n] - a
    assert torch.equal(image[1].view(h, w), torch.arange(h)[:, None].expand(h, w)) and torch.equal(image[2].view(h, w), torch.arange(w).expand(h, w))
    assert not image[0].any() and torch.equal(pos, pos[:, :1].expand_as(pos))
    assert torch.equal(pos[:, 0, :a], torch.arange(a).expand(3, a)) and torch.equal(pos[:, 0, a + n:], (a + max(h, w) + torch.arange(ids.shape[1] - a - n)).expand(3, -1))
    with torch.no_grad():
        cache, _, start = uae.prefill(seen, 2)
    assert start == a + max(h, w) + len(uae.after_image) < ids.shape[1] == cache.get_seq_length()


def test_leaving_out_mm_token_type_ids_would_be_seen(uae, photos, monkeypatch):
    x, seen = photos
    y, mask, recorded = uae.sample_captions(seen, 2, 1.0, uniforms(6, uae.c.caption_len))
    bare = uae.encoder.model.get_rope_index
    monkeypatch.setattr(uae.encoder.model, 'get_rope_index', lambda ids, mm_token_type_ids, **kw: bare(ids, mm_token_type_ids=torch.zeros_like(mm_token_type_ids), **kw))
    with torch.no_grad():
        line = uae.caption_logp(seen, y)
    assert ((line - recorded) * mask).abs().amax(1).min() > 1e-3


def test_rope_deltas_of_an_earlier_image_do_not_leak(uae, photos):
    """The library keeps the offset of the last image on the model; ours must not read it, nor leave one behind."""
    x, seen = photos
    u, inner = uniforms(6, uae.c.caption_len), uae.encoder.model
    y, mask, logp = uae.sample_captions(seen, 2, 1.0, u)
    before = inner.rope_deltas
    try:
        for other in (torch.tensor([[-7]]), torch.tensor([[500]]), None):
            inner.rope_deltas = other
            again = uae.sample_captions(seen, 2, 1.0, u)
            with torch.no_grad():
                assert torch.equal(again[0], y) and torch.equal(again[2], logp) and ((uae.caption_logp(seen, y) - logp) * mask).abs().max() < 1e-5
            assert inner.rope_deltas is other
    finally:
        inner.rope_deltas = before


def test_images_of_two_sizes_one_after_the_other(uae):
    """A small image after a large one is captioned as if it came first."""
    g = torch.Generator().manual_seed(4)
    small, large = (torch.rand(1, 3, s, s, generator=g) * 2 - 1 for s in (32, 96))
    u = uniforms(2, uae.c.caption_len)
    with torch.no_grad():
        first = uae.sample_captions(uae.see(small), 2, 1.0, u)
        full_forward(uae, large, uae.sample_captions(uae.see(large), 2, 1.0, u)[0])
        again = uae.sample_captions(uae.see(small), 2, 1.0, u)
    uae.encoder.model.rope_deltas = None
    assert all(torch.equal(a, b) for a, b in zip(first, again))


# --- truncated captions -------------------------------------------------------------------------------------------------
def test_a_truncated_caption_counts_as_it_stands(uae, seen):
    """No end token within caption_len: every one of the T tokens is valid, is scored, and is what the decoder gets; nothing is dropped or appended."""
    u = at(uae, caption_len=3)
    y, mask, logp = u.sample_captions(seen, 4, 1.0, uniforms(16, 3))
    cut = y[:, -1] != u.end
    assert cut.any() and mask[cut].all() and (logp[cut] < 0).all()
    with torch.no_grad():
        assert ((u.caption_logp(seen, y) - logp) * mask).abs().max() < 1e-5
        longer = F.pad(y[cut], (0, 2), value=u.end)
        assert torch.equal(u.condition(y[cut], mask[cut]), u.condition(longer, F.pad(mask[cut], (0, 2))))


# --- the vocabulary in pieces -------------------------------------------------------------------------------------------
class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.size = max([self.size] + [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)])
        return out


def test_logits_of_the_real_vocabulary_are_never_whole():
    """(B, T, V) = (2, 64, 151936) is 19 million numbers, 78 MB in float32: neither the forward nor the backward pass holds more than a piece."""
    V, B, T, d = 151936, 2, 64, 4
    head = torch.nn.Linear(d, V, bias=False)
    h, y = torch.randn(B, T, d, requires_grad=True), torch.randint(V, (B, T))
    kept = {}

    def keep(t):
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            logp = token_logp(h, head, y, 1.0, torch.zeros(V, dtype=torch.bool))
        logp.sum().backward()
    assert V < largest.size <= 2 ** 24 < B * T * V
    assert sum(kept.values()) < 2 * (head.weight.nbytes + h.nbytes + V + y.nbytes)
    assert logp.shape == (B, T) and h.grad.abs().sum() > 0


def test_the_captioner_s_log_prob_goes_through_those_pieces(uae, seen, sampled, monkeypatch):
    """caption_logp asks for the logits of T positions a caption, none of the prompt's, through token_logp alone."""
    y, mask, logp = sampled
    rows = []
    monkeypatch.setattr(model, 'token_logp', lambda h, *a: rows.append(tuple(h.shape[:2])) or token_logp(h, *a, chunk=64 * 5))
    with torch.no_grad():
        assert ((uae.caption_logp(seen, y) - logp) * mask).abs().max() < 1e-5
    assert rows == [tuple(y.shape)]
