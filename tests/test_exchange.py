"""Another encoder and another decoder, in few lines: docs/exchange.md.

A LLaVA (another family of transformers: its own vision tower, plain positions, a Llama) and a Flux
(latents packed into tokens, single blocks behind the double ones), both tiny and random.
"""
import inspect
import math
import shutil

import diffusers
import pytest
import torch
import torch.nn.functional as F
import transformers

from decoder import DECODERS, Decoder
from encoder import ENCODERS, Encoder
from lib import ranks
from lib.checkpoint import open_uae
from comparing import BASE
from conftest import perturb, shared_config, uniforms
from running import tiny, weights

G = 3


class LlavaEncoder(Encoder):
    hub_names = {}

    def check_resolution(self, resolution):
        return ''                               # its processor makes one size of all

    def see(self, x):
        pixels = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
        images = self.processor.image_processor(images=list(pixels), return_tensors='pt')
        with torch.no_grad(), self.autocast():
            pixel_values = images['pixel_values'].to(self.device)
            features = self.vlm.model.get_image_features(pixel_values).pooler_output
        return dict(features=torch.stack(list(features)))

    def positions(self, token_ids, vision):
        return torch.arange(token_ids.shape[1], device=self.device).expand(token_ids.shape)

    def positions_after(self, start, B, T):
        return (start + torch.arange(T, device=self.device)).expand(B, T)


class LibraryCache(LlavaEncoder):
    """The same where the language model is no Qwen or Llama: the library's own forward pass."""

    def caption_cache(self, prompt, G, room):
        prompt.batch_repeat_interleave(G)
        return prompt

    def next_state(self, token, position, cache):
        return self.run(self.embed(token), self.positions_after(position, len(token), 1), cache)


class FluxDecoder(Decoder):
    pipeline_class = 'FluxPipeline'

    def check_resolution(self, resolution):
        step = 2 ** len(self.vae.config.block_out_channels)
        return f'expected a multiple of {step}' if resolution % step else ''

    def network(self, z, s, c):
        dtype = self.transformer.dtype
        height, width = z.shape[2] // 2, z.shape[3] // 2
        places = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width))
        tokens = F.pixel_unshuffle(z, 2).flatten(2).transpose(1, 2)
        with self.autocast():
            v = self.transformer(
                hidden_states=tokens.to(dtype), timestep=s, encoder_hidden_states=c.to(dtype),
                pooled_projections=self.pooled.expand(len(z), -1).to(dtype),
                img_ids=places.to(z), txt_ids=torch.zeros(c.shape[1], 3).to(z),
                return_dict=False)[0]
        return F.pixel_shuffle(v.float().transpose(1, 2).unflatten(2, (height, width)), 2)


def write_llava(folder):
    """A random one with the tiny tokenizer and 16 places of an image."""
    base = transformers.AutoProcessor.from_pretrained(f'{BASE}/encoder')
    image_processor = transformers.CLIPImageProcessor(
        size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    processor = transformers.LlavaProcessor(
        image_processor, base.tokenizer, patch_size=8, vision_feature_select_strategy='default',
        chat_template=base.chat_template, image_token=base.image_token,
        num_additional_image_tokens=1)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    image_token = base.tokenizer.convert_tokens_to_ids(base.image_token)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=8),
        text_config=transformers.LlamaConfig(
            **sizes, vocab_size=len(base.tokenizer), num_key_value_heads=2,
            eos_token_id=base.tokenizer.eos_token_id, pad_token_id=base.tokenizer.pad_token_id),
        image_token_id=image_token)
    model = transformers.LlavaForConditionalGeneration(config)
    perturb(model, 0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_flux(folder):
    """A random one beside the tiny VAE and schedule."""
    for part in ('vae', 'scheduler'):
        shutil.copytree(f'{BASE}/decoder/{part}', f'{folder}/{part}')
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=48, pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6))
    perturb(transformer, 0.05)
    transformer.save_pretrained(f'{folder}/transformer')


@pytest.fixture(scope='module')
def flags(tmp_path_factory):
    """The command line that names them."""
    ranks.quiet()
    folder = tmp_path_factory.mktemp('others')
    write_llava(f'{folder}/llava')
    write_flux(f'{folder}/flux')
    return [f'--encoder={folder}/llava', f'--decoder={folder}/flux']


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """What a fork writes at the end of its own file."""
    monkeypatch.setitem(ENCODERS, 'llava', LlavaEncoder)
    monkeypatch.setitem(DECODERS, 'FluxTransformer2DModel', FluxDecoder)


def opened(flags, *more):
    torch.manual_seed(0)
    return open_uae(shared_config(*flags, *more), new_projector=True)


def test_they_are_short():
    assert len(inspect.getsource(LlavaEncoder).splitlines()) <= 60
    assert len(inspect.getsource(FluxDecoder).splitlines()) <= 30


@pytest.mark.parametrize('kind', [LlavaEncoder, LibraryCache])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_the_encoder_samples_what_its_log_prob_says(flags, x, monkeypatch, kind, checkpointing):
    monkeypatch.setitem(ENCODERS, 'llava', kind)
    uae = opened(flags, f'--checkpointing={checkpointing}')
    encoder = uae.encoder
    assert type(encoder) is kind
    vision = encoder.see(x)
    u = uniforms(len(x) * G, uae.config.caption_len)
    y, mask, recorded = encoder.sample(vision, G, 1.3, u)
    assert len({tuple(row) for row in y.tolist()}) == len(y)
    assert (y != encoder.image_token).all()
    with torch.no_grad():
        logp = encoder.logp(vision, y, 1.3)
        assert ((logp - recorded) * mask).abs().max() < 1e-5
        other = encoder.logp({name: rows.roll(1, 0) for name, rows in vision.items()}, y, 1.3)
    assert ((logp - other) * mask).abs().max() > 0.01, 'it sees the image'


def test_its_log_prob_is_the_librarys(flags, x):
    """Of the whole model on the processor's own inputs, image included."""
    encoder = opened(flags).encoder
    y = torch.arange(7, 15).expand(len(x), -1)
    logp = encoder.logp(encoder.see(x), y)
    text = encoder.processor.apply_chat_template(
        [dict(role='user', content=[dict(type='text', text=encoder.config.caption_prompt),
                                    dict(type='image')])],
        tokenize=False, add_generation_prompt=True)
    pixels = list(((x + 1) * 127.5).round().byte())
    inputs = encoder.processor(text=[text] * len(x), images=pixels, return_tensors='pt')
    token_ids = torch.cat([inputs['input_ids'], y], 1)
    with torch.no_grad():
        logits = encoder.vlm(input_ids=token_ids, pixel_values=inputs['pixel_values']).logits
    logits = logits[:, -y.shape[1] - 1:-1].masked_fill(encoder.forbidden, -math.inf)
    expected = logits.log_softmax(-1).gather(2, y[..., None])[..., 0]
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('guidance', [1.0, 2.0])
def test_the_decoders_steps_have_the_log_prob_that_is_recorded(flags, guidance):
    uae = opened(flags, f'--guidance={guidance}')
    decoder = uae.decoder
    assert type(decoder) is FluxDecoder
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, *decoder.latent_shape(), generator=generator)
    noise = torch.randn(2, 2, *z.shape[1:], generator=generator)
    y, mask, _ = uae.encoder.tokens(['small red circle top-left .', 'large blue square center .'])
    sampler = dict(S=4, kind='flow', noise_level=0.7)
    with torch.no_grad():
        c = uae.condition(y, mask)
        negative = uae.negative() if guidance != 1 else None
        drawn, path = decoder.draw_sde(z, c, noise=noise, window=(0, 2), negative=negative,
                                       **sampler)
        logp, _, _ = decoder.step_logp(path['z'], path['z_next'], [0, 1], c, negative=negative,
                                       **sampler)
        assert (logp - path['recorded']).abs().max() < 1e-6
        swapped, _, _ = decoder.step_logp(path['z'], path['z_next'], [0, 1], c.flip(0),
                                          negative=negative, **sampler)
        assert (swapped - logp).abs().max() > 1e-6, 'it reads the condition'
        assert uae.decoder.to_image(drawn).shape == (2, 3, 32, 32)


def test_what_is_frozen_is_what_no_loss_reaches(flags):
    """SD3's last block drops what texts ask; Flux's does not, and trains it."""
    uae = opened(flags)
    params = uae.train_only('projector', 'decoder')
    y, mask, _ = uae.encoder.tokens(['small red circle top-left .'])
    z = torch.randn(1, *uae.decoder.latent_shape())
    uae.decoder.velocity(z, torch.tensor(0.5), uae.condition(y, mask)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in params)
    frozen = [name for name, p in uae.decoder.transformer.named_parameters() if not p.requires_grad]
    assert frozen == ['time_text_embed.text_embedder.linear_1.weight']


@pytest.mark.parametrize('way', [[], ['--lora_rank=2']], ids=['full', 'lora'])
def test_the_stages_run_on_them(flags, tmp_path, way):
    """Stage 0 makes the projector; the two policies agree with themselves; checkpoints are read."""
    tiny('pretrain_decoder', tmp_path / 'p', *flags, *way, steps=1)
    start = f'--init_from={tmp_path}/p'
    for name in ('grpo_encoder', 'grpo_decoder'):
        line, = tiny(name, tmp_path / name, *flags, *way, start, '--kl=0.1', steps=1)
        assert line['logp_diff'] < 1e-5
        assert line['grad_norm'] > 0
        start = f'--init_from={tmp_path}/{name}'
    before = weights(tmp_path / 'grpo_encoder' / 'step_000001')
    after = weights(tmp_path / 'grpo_decoder' / 'step_000001')
    changed = {name.split('/')[0] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {'decoder'}


@pytest.mark.parametrize('kind,name', [(Encoder, 'logp'), (Decoder, 'step_logp')])
def test_a_policy_calls_the_log_prob_of_its_own_class(kind, name):
    """Else the trained policy and its reference would have two log-probs."""
    own = type('Own', (kind,), {name: lambda self, *args: args})
    assert own.forward(object.__new__(own), 1, 2) == (1, 2)
