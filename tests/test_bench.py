"""bench/ measures what it says: its steps are the scripts' own, its bare networks what a step
needs; and every fast path equals the plain one."""
import collections
import copy
import json
from types import SimpleNamespace

import pytest
import torch

import config
from bench import speed, steps
from bench.networks import network_calls
from bench.steps import Stage, measure
from conftest import at
from decoder import Decoder
from encoder import next_state
from running import STAGES, refusal, tiny
from tests.peers import flow_grpo, full_logits
from tools import rehearse

SMALL = ['--batch=2', '--group=2', '--temperature=3', '--caption_len=6', '--denoise_steps=4',
         '--noisy_steps=2', '--trained_steps=2', '--eval_images=4', '--device=cpu']


def gradient_norm(stage):
    """Norm of the gradients that a step of the bench leaves behind."""
    measure(stage)
    norms = [p.grad.norm() for p in stage.params if p.grad is not None]
    return torch.stack(norms).norm().item()


@pytest.mark.parametrize('name, extra', [
    ('cold_start', ['--micro_batch=1']),
    ('grpo_encoder', ['--kl=0.1', '--loss_mean=caption']),
    ('grpo_decoder', ['--micro_batch=2', '--guidance=2', '--kl=0.1']),
])
def test_a_step_of_the_bench_is_the_script_s(name, extra, tmp_path):
    """The same gradient, up to the end token, which the bench forbids."""
    argv = SMALL + extra
    stage = Stage(name, argv)
    for model in filter(None, (stage.uae, stage.reference)):
        model.encoder.forbidden[model.encoder.end] = False
    known = {*config.shared, *steps.SCRIPTS[name].keys}
    argv = [argument for argument in argv if steps.key_of(argument) in known]
    log = tiny(name, tmp_path / 'run', *argv, steps=1)
    assert log[0]['grad_norm'] > 0
    assert gradient_norm(stage) == pytest.approx(log[0]['grad_norm'], rel=1e-4)


def networks_by_part(stage):
    """[(part, network)]: a place in each network that every one of its rows goes through once."""
    uae = stage.uae
    parts = [
        ('decoder', uae.decoder.transformer.pos_embed),
        ('vae', uae.decoder.vae.decoder),
        ('reward', stage.tower.towers[0].tower),
        ('lm', uae.encoder.vlm.model.language_model.layers[0].mlp),
        ('head', uae.encoder.head),
        ('projector', uae.projector),
        ('vision', uae.encoder.vlm.model.visual),
    ]
    if stage.reference:
        known = [network for _, network in parts]
        encoder = stage.reference.encoder.vlm
        of_reference = [
            ('decoder', stage.reference.decoder.transformer.pos_embed),
            ('head', stage.reference.encoder.head),
            ('lm', encoder.model.language_model.layers[0].mlp),
        ]
        for part, network in of_reference:
            if not any(network is other for other in known):
                parts.append((part, network))
    return parts


@pytest.mark.parametrize('name, extra', [
    ('cold_start', ['--grad_steps=2']),
    ('cold_start', ['--micro_batch=1']),
    ('grpo_encoder', ['--kl=0.1']),
    ('grpo_encoder', ['--micro_batch=2']),
    ('grpo_decoder', ['--kl=0.1']),
    ('grpo_decoder', ['--micro_batch=1']),
    ('grpo_decoder', ['--guidance=2', '--kl=0.1']),
])
def test_bare_networks_are_what_a_step_calls(name, extra):
    """As many rows go through every network, with gradients and without, in the step and in the
    list that its limit is measured with."""
    stage = Stage(name, SMALL + extra)
    rows = collections.Counter()

    def counter_of(part):
        def count(network, args, kwargs):
            x = next(iter((*args, *kwargs.values())))
            size = x.shape[0]
            if part in ('lm', 'head') and x.dim() == 3:
                size *= x.shape[1]
            rows[part, torch.is_grad_enabled()] += size

        return count

    for part, network in networks_by_part(stage):
        network.register_forward_pre_hook(counter_of(part), with_kwargs=True)
    measure(stage)
    of_step = dict(rows)
    rows.clear()
    for call in network_calls(stage):
        with torch.set_grad_enabled(call.backward):
            for _ in range(call.times):
                call.run(call.rows)
    assert of_step == dict(rows)
    assert len(of_step) >= 6


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
        blocks.append(type(self).__name__)
        compile(self, backend='eager', **options)

    monkeypatch.setattr(torch.nn.Module, 'compile', traced)
    on = tiny('grpo_decoder', tmp_path / 'on', '--compile=True', '--denoise_steps=3')
    off = tiny('grpo_decoder', tmp_path / 'off', '--compile=False', '--denoise_steps=3')
    assert blocks == ['JointTransformerBlock'] * 4
    for a, b in zip(on, off):
        assert a['grad_norm'] == pytest.approx(b['grad_norm'], rel=1e-4)
        assert a['reward'] == pytest.approx(b['reward'], abs=1e-5)
        assert a['logp_diff'] < 1e-5


def test_every_block_is_compiled_by_itself(monkeypatch):
    blocks = []
    layers = [torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)]
    net = SimpleNamespace(transformer=SimpleNamespace(transformer_blocks=layers))

    def spy(self, **options):
        blocks.append(options)

    monkeypatch.setattr(torch.nn.Module, 'compile', spy)
    Decoder.compile_blocks(net)
    assert len(blocks) == 2
    assert all(options == dict(dynamic=True) for options in blocks)


# --- peers ----------------------------------------------------------------------------------------
def test_flow_grpo_s_gradient_is_ours():
    stage = Stage('grpo_decoder', SMALL + ['--guidance=4.5', '--kl=0.04'])
    assert flow_grpo.gradients_differ(stage) < 1e-5


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
        assert all(value >= 0 for value in row.values() if isinstance(value, float))
        assert row['total'] == pytest.approx(row['rollout'] + row['update'])
        assert row['limit'] == pytest.approx(row['total'] / row['networks'])
        assert row['update_flops'] > 1e6
        share = row['update_flops'] / row['update'] / row['matmul_peak']
        assert row['update_share_of_peak'] == pytest.approx(share)
        networks = sum(value for label, value in row.items() if ' x ' in label)
        assert row['networks'] == pytest.approx(networks)
        assert f'{name}: 2 x' in text


def test_published_sizes_with_fewer_layers():
    """--layers cuts every network of a published architecture; widths and what is known stay."""
    name = 'stabilityai/stable-diffusion-3.5-medium'
    cut = rehearse.shortened(rehearse.ARCHITECTURES, 2)
    decoder, whole = cut[name]['transformer'], rehearse.ARCHITECTURES[name]['transformer']
    assert decoder['num_layers'] == 2 and whole['num_layers'] == 24
    assert list(decoder['dual_attention_layers']) == [0, 1]
    assert decoder['num_attention_heads'] == whole['num_attention_heads']
    encoder = cut['Qwen/Qwen2.5-VL-3B-Instruct']
    assert encoder['text_config']['num_hidden_layers'] == 2
    assert encoder['vision_config']['depth'] == 2
    assert encoder['text_config']['hidden_size'] == 2048
