"""bench/ runs the scripts' own steps; these call no network more often than they must; and every
fast path equals the plain one."""
import collections
import copy
import json
from types import SimpleNamespace

import pytest
import torch

from bench import speed
from conftest import at
from encoder import next_state
from running import STAGES, refusal, tiny
from tests.peers import flow_grpo, full_logits
from tools import rehearse

SMALL = ['--batch=2', '--group=2', '--temperature=3', '--caption_len=6', '--denoise_steps=4',
         '--noisy_steps=2', '--trained_steps=2', '--eval_images=4', '--device=cpu']


@pytest.fixture
def once(monkeypatch):
    """Options of the bench for one update that counts."""
    monkeypatch.setattr(speed, 'WARM_UP', 0)
    return SimpleNamespace(steps=1, random=False, layers=0)


# --- no network more often than the mathematics needs ---------------------------------------------
class RowCount(speed.Run):
    """rows: {(network, with gradient): how many rows, of the language model tokens}."""

    def opened(self):
        self.rows = collections.Counter()
        encoder, decoder = self.uae.encoder, self.uae.decoder
        places = [
            ('decoder', decoder.transformer.pos_embed),
            ('vae', decoder.vae.decoder),
            ('reward', self.tower.towers[0].tower),
            ('lm', encoder.language_model.layers[0].mlp),
            ('head', encoder.head),
            ('projector', self.uae.projector),
            ('vision', encoder.vlm.model.visual),
        ]
        if encoder.text_encoder:
            places.append(('lm', encoder.text_encoder.layers[0].mlp))
        if self.reference:
            own = self.reference.encoder
            copies = [('decoder', self.reference.decoder.transformer.pos_embed),
                      ('lm', own.language_model.layers[0].mlp), ('head', own.head)]
            known = [network for _, network in places]
            places += [(name, network) for name, network in copies if network not in known]
        for name, network in places:
            network.register_forward_pre_hook(self.counter_of(name), with_kwargs=True)

    def counter_of(self, name):
        def count(network, args, kwargs):
            x = next(iter((*args, *kwargs.values())))
            tokens = x.shape[1] if name in ('lm', 'head') and x.dim() == 3 else 1
            self.rows[name, torch.is_grad_enabled()] += x.shape[0] * tokens

        return count


def needed_rows(run, name):
    """What one step needs by its mathematics, as RowCount counts it."""
    c, P, G = run.config, run.P, run.G
    B, S, T, C = P * G, c.denoise_steps, c.caption_len, c.cond_len
    vision = run.uae.encoder.see(torch.zeros(1, 3, c.resolution, c.resolution))
    image = vision['features'].shape[1]
    L = image + len(run.uae.encoder.before_image) + len(run.uae.encoder.after_image)
    branches = 2 if c.guidance != 1.0 else 1
    patches = image * run.uae.encoder.vlm.config.vision_config.spatial_merge_size ** 2
    written = B if name == 'grpo_encoder' else P                # captions
    rows = collections.Counter({
        ('vision', False): P * patches,
        ('lm', False): P * L + written * (T - 1),               # prompts once, then token by token
        ('head', False): written * T,
    })
    if name == 'cold_start':
        K = c.grad_steps
        rows.update({('lm', True): P * C, ('projector', True): P, ('decoder', False): (S - K) * P,
                     ('decoder', True): K * P, ('vae', True): P, ('reward', False): P,
                     ('reward', True): P})
        return rows
    rows.update({('lm', False): written * C, ('projector', False): written,
                 ('decoder', False): branches * S * B, ('vae', False): B,
                 ('reward', False): P + B})                     # sources once, not once a drawing
    passes = [True, False] if c.kl else [True]                  # the policy, the reference
    if name == 'grpo_encoder':
        prompts = P if c.micro_batch in (0, G) else B
        for grad in passes:
            rows.update({('lm', grad): prompts * L + B * T, ('head', grad): B * T})
    else:                                                       # v0 is the rollout's
        rows.update({('decoder', True): B * c.trained_steps})
        rows.update({('decoder', False): bool(c.kl) * branches * B * c.trained_steps})
    return rows


@pytest.mark.parametrize('name, extra', [
    ('cold_start', ['--grad_steps=2']),
    ('cold_start', ['--micro_batch=1']),
    ('grpo_encoder', ['--kl=0.1']),
    ('grpo_encoder', ['--micro_batch=2', '--kl=0']),
    ('grpo_encoder', ['--micro_batch=1']),
    ('grpo_decoder', ['--kl=0.1']),
    ('grpo_decoder', ['--micro_batch=1']),
    ('grpo_decoder', ['--guidance=2', '--kl=0.1']),
])
def test_a_step_calls_its_networks_no_more_than_it_must(name, extra, once):
    run = RowCount(name, SMALL + extra, once)
    rows = dict(run.rows)
    assert rows == {key: count for key, count in needed_rows(run, name).items() if count}


# --- fast paths -----------------------------------------------------------------------------------
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_one_more_token_is_the_language_model_s_own_forward(uae, vision, dtype):
    """next_state against the library, token by token, the caches included."""
    own = copy.deepcopy(at(uae).encoder).to(dtype)
    y = torch.tensor([[7, 9, 11]]).repeat(8, 1)
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    with torch.no_grad():
        prompt, _, start = own.prefill(vision)
        fast = own.caption_cache(prompt, 2, y.shape[1])
        plain, _, _ = own.prefill(vision)
        plain.batch_repeat_interleave(2)
        for t in range(y.shape[1]):
            x = own.embed(y[:, t:t + 1])
            position = torch.tensor([start + t])
            a = next_state(own.language_model, x, position, fast)
            b = own.run(x, own.positions_after(position, 8, 1), plain)
            assert a.dtype == b.dtype
            assert (a - b).abs().max() < tolerance * b.abs().max()
    for i, layer in enumerate(plain.layers):
        for a, b in ((fast.keys[i], layer.keys), (fast.values[i], layer.values)):
            a = a[:, :, :fast.place.item()]
            assert a.shape == b.shape
            assert (a - b).abs().max() < 0.03 * b.abs().max()


@pytest.mark.parametrize('name', ['cache', 'past_key_values'])
def test_the_cache_goes_by_the_name_that_the_library_knows(uae, monkeypatch, name):
    own = copy.deepcopy(at(uae).encoder)
    assert own.cache_name in ('cache', 'past_key_values')
    own.cache_name = name
    given = {}

    def forward(**options):
        given.update(options)
        return SimpleNamespace(last_hidden_state='states')

    monkeypatch.setattr(type(own), 'language_model', property(lambda self: forward))
    assert own.run('embedded', 'positions', 'keys and values') == 'states'
    assert given[name] == 'keys and values' and given['use_cache']


def test_compiled_blocks_are_the_plain_ones(tmp_path, monkeypatch):
    """--compile=True hands every transformer block to the compiler and changes nothing else.

    Of the compiler its tracing alone: no generated code.
    """
    blocks = []
    compile = torch.nn.Module.compile

    def traced(self, **options):
        assert options == dict(dynamic=True)
        blocks.append(type(self).__name__)
        compile(self, backend='eager', **options)

    monkeypatch.setattr(torch.nn.Module, 'compile', traced)
    on = tiny('grpo_decoder', tmp_path / 'on', '--compile=True', '--offload=True',
              '--denoise_steps=3')
    off = tiny('grpo_decoder', tmp_path / 'off', '--compile=False', '--denoise_steps=3')
    assert blocks == ['JointTransformerBlock'] * 4
    for a, b in zip(on, off):
        assert a['grad_norm'] == pytest.approx(b['grad_norm'], rel=1e-4)
        assert a['reward'] == pytest.approx(b['reward'], abs=1e-5)
        assert a['logp_diff'] < 1e-5


# --- peers ----------------------------------------------------------------------------------------
def test_flow_grpo_s_gradient_is_ours(once):
    run = flow_grpo.Beside(SMALL, once, guidance=4.5, kl=0.04)
    assert run.ours.norm() > 0
    assert run.differ < 1e-5


def test_full_logits_gradient_is_ours_and_needs_more_memory(capsys):
    out = full_logits.compare(['--batch=2', '--group=4', '--caption_len=24'])
    assert out['gradients differ by'] < 1e-5
    assert out['ratio'] < 0.8


# --- the command ----------------------------------------------------------------------------------
def test_every_stage_on_random_weights(tmp_path, capsys):
    """What `make bench-gpu` runs, in bfloat16 with LoRA, on the tiny architectures."""
    random = ['--random=True', '--steps=1', '--dtype=bfloat16', '--lora_rank=4', '--micro_batch=2']
    speed.main([*random, *SMALL, f'--json={tmp_path}/a.json'])
    with open(tmp_path / 'a.json') as f:
        out = json.load(f)['result']
    text = capsys.readouterr().out
    for name, unit in zip(STAGES, ('images', 'captions', 'images')):
        row = out[name]
        assert row['total'] == pytest.approx(row['rollout'] + row['update'])
        assert row['limit'] == pytest.approx(row['total'] / row['networks'])
        assert row[f'{unit}_per_sec'] > 0
        assert row['update_flops'] > 1e6
        share = row['update_flops'] / row['update'] / row['matmul_peak']
        assert row['update_share_of_peak'] == pytest.approx(share)
        assert f'{name}: 2 x' in text


def test_published_sizes_with_fewer_layers():
    """--layers cuts every network of a published architecture; widths and what is known stay."""
    cut = rehearse.shortened(rehearse.ARCHITECTURES, 2)
    decoder = cut['stabilityai/stable-diffusion-3.5-medium']['transformer']
    encoder = cut['Qwen/Qwen2.5-VL-3B-Instruct']
    assert (decoder['num_layers'], decoder['num_attention_heads']) == (2, 24)
    assert decoder['dual_attention_layers'] == (0, 1)
    assert encoder['text_config']['num_hidden_layers'] == encoder['vision_config']['depth'] == 2
    assert encoder['text_config']['hidden_size'] == 2048


def test_an_unknown_part_or_stage_gets_one_line():
    assert 'growth' in refusal(speed.main, ['--part=all'])
    assert 'cold_start' in refusal(speed.main, ['--stage=reca'])
    assert 'setps' in refusal(speed.main, ['--setps=3'])
