"""bench.py measures what it says: its steps are the scripts' own, its bare networks are what a step needs; and every fast path equals the plain one."""
import collections
import copy
import json
import types

import pytest
import torch

import bench
import common
from conftest import at
from running import STAGES, refusal, tiny
from tests.peers import flow_grpo, full_logits

PLAIN = types.SimpleNamespace(random=False, layers=0)
SMALL = ['--prompts=2', '--group=2', '--temperature=3', '--caption_len=6', '--sample_steps=4', '--sde_window=2', '--train_steps=2', '--eval_images=4', '--device=cpu']


def norm(m, step=None):
    """Norm of the gradients that a step of the bench leaves behind."""
    bench.measure(m, step)
    return torch.stack([p.grad.norm() for p in m.params if p.grad is not None]).norm().item()


@pytest.mark.parametrize('name, words', [('cold_start', ['--micro_batch=1']), ('grpo_encoder', ['--kl=0.1', '--loss_mean=caption']),
                                         ('grpo_decoder', ['--micro_batch=2', '--guidance=2', '--kl=0.1'])])
def test_a_step_of_the_bench_is_the_script_s(name, words, tmp_path):
    """The same gradient, up to the end token, which the bench forbids."""
    m = bench.prepare(PLAIN, name, SMALL + words)
    m.uae.forbidden[m.uae.end] = False
    known = {*bench.config.shared, *bench.STAGES[name].keys}
    log = tiny(name, tmp_path / 'run', *(w for w in SMALL + words if w[2:].split('=')[0] in known), steps=1)
    assert norm(m) == pytest.approx(log[0]['grad_norm'], rel=1e-4) and log[0]['grad_norm'] > 0


@pytest.mark.parametrize('name, words', [('cold_start', ['--grad_steps=2']), ('cold_start', ['--micro_batch=1']), ('grpo_encoder', ['--kl=0.1']), ('grpo_encoder', ['--micro_batch=2']),
                                         ('grpo_decoder', ['--kl=0.1']), ('grpo_decoder', ['--micro_batch=1']), ('grpo_decoder', ['--guidance=2', '--kl=0.1'])])
def test_bare_networks_are_what_a_step_calls(name, words):
    """As many rows go through every network, with gradients and without, in the step and in the list that its limit is measured with."""
    m = bench.prepare(PLAIN, name, SMALL + words)
    rows, lm = collections.Counter(), m.uae.encoder.model.language_model
    parts = dict(decoder=m.uae.decoder.pos_embed, vae=m.uae.vae.decoder, reward=m.tower.tower, lm=lm.layers[0].mlp, head=m.uae.head, projector=m.uae.projector, vision=m.uae.encoder.model.visual)
    refs = dict(decoder=m.ref.decoder.pos_embed, head=m.ref.head, lm=m.ref.encoder.model.language_model.layers[0].mlp) if m.ref else {}
    for part, net in [*parts.items(), *((k, v) for k, v in refs.items() if v is not parts[k])]:
        def count(_, args, kwargs, part=part):
            x = next(iter((*args, *kwargs.values())))
            rows[part, torch.is_grad_enabled()] += x.shape[0] * (x.shape[1] if part in ('lm', 'head') and x.dim() == 3 else 1)
        net.register_forward_pre_hook(count, with_kwargs=True)
    bench.measure(m)
    step, _ = dict(rows), rows.clear()
    for _, n, f, times, backward in bench.network_calls(m):
        with torch.set_grad_enabled(backward):
            for _ in range(times):
                f(n)
    assert step == dict(rows) and len(step) >= 6


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_one_more_token_is_the_language_model_s_own_forward(uae, seen, dtype):
    """common.next_state against the library, token by token, the caches included."""
    own = at(uae)
    own._modules = dict(uae._modules, encoder=copy.deepcopy(uae.encoder).to(dtype))
    lm, y = own.encoder.model.language_model, torch.tensor([[7, 9, 11]]).repeat(8, 1)
    with torch.no_grad():
        (fast, _, start), (plain, _, _) = own.prefill(seen, 2), own.prefill(seen, 2)
        for t in range(y.shape[1]):
            x = own.embed(y[:, t:t + 1])
            a = common.next_state(lm, x, start + t, fast)
            b = lm(inputs_embeds=x, position_ids=torch.full((3, 8, 1), start + t), past_key_values=plain, use_cache=True).last_hidden_state
            assert a.dtype == b.dtype and (a - b).abs().max() < (1e-4 if dtype == torch.float32 else 0.03) * b.abs().max()
    for a, b in zip(fast.layers, plain.layers):
        assert a.keys.shape == b.keys.shape and (a.keys - b.keys).abs().max() < 0.03 * b.keys.abs().max()


def test_compiled_blocks_are_the_plain_ones(tmp_path, monkeypatch):
    """--compile=True hands every transformer block to the compiler (here its tracing alone, no generated code) and changes nothing else."""
    blocks, compile = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, **kw: (blocks.append(type(self).__name__), compile(self, backend='eager', **kw)))
    on, off = (tiny('grpo_decoder', tmp_path / k, f'--compile={k}', '--sample_steps=3') for k in ('True', 'False'))
    assert blocks == ['JointTransformerBlock'] * 4
    for a, b in zip(on, off):
        assert a['grad_norm'] == pytest.approx(b['grad_norm'], rel=1e-4) and a['reward'] == pytest.approx(b['reward'], abs=1e-5) and a['logp_diff'] < 1e-5


def test_the_reference_is_compiled_too(monkeypatch):
    blocks, net = [], types.SimpleNamespace(decoder=types.SimpleNamespace(transformer_blocks=[torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)]))
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, **kw: blocks.append((self, kw)))
    bench.grpo_decoder.compile_blocks(net, None)
    assert len(blocks) == 2
    bench.grpo_decoder.compile_blocks(net, net)
    assert len(blocks) == 6 and all(kw == dict(dynamic=True) for _, kw in blocks)


# --- peers -------------------------------------------------------------------------------------------------------------
def test_flow_grpo_s_gradient_is_ours():
    bench.STEPS['flow_grpo'] = flow_grpo.step
    m = bench.prepare(PLAIN, 'grpo_decoder', SMALL + ['--guidance=4.5', '--kl=0.04'])
    assert flow_grpo.gradients_differ(m, 'grpo_decoder', 'flow_grpo') < 1e-5


def test_full_logits_gradient_is_ours_and_needs_more_memory(capsys):
    out = full_logits.compare(PLAIN, ['--prompts=2', '--group=4', '--caption_len=24'])
    assert out['gradients differ by'] < 1e-5 and out['ratio'] < 0.8


# --- the command ------------------------------------------------------------------------------------------------------
def test_every_stage_on_random_weights(tmp_path, capsys):
    """What `make bench-gpu` runs, in bfloat16 with LoRA, on the tiny architectures."""
    bench.main(['--random=True', '--steps=1', '--dtype=bfloat16', '--lora_rank=4', '--micro_batch=2', *SMALL, f'--json={tmp_path}/a.json'])
    with open(tmp_path / 'a.json') as f:
        out = json.load(f)['result']
    text = capsys.readouterr().out
    for name, unit in zip(STAGES, ('images', 'captions', 'images')):
        row = out[name]
        assert row['total'] == pytest.approx(row['rollout'] + row['update'], rel=0.3) and row[f'{unit}_per_sec'] > 0 and row['limit'] > 0.5
        assert row['update_flops'] > 1e6 and 0 < row['update_share_of_peak'] < 1.5 and row['peak_gb'] > 0
        assert row['networks'] == pytest.approx(sum(v for k, v in row.items() if ' x ' in k), rel=0.5) and f'{name}: 2 x' in text


def test_published_sizes_with_fewer_layers(monkeypatch):
    """--layers cuts every network of a published architecture and leaves its widths, and what config.py knows, alone."""
    seen = {}
    monkeypatch.setattr(common, 'skeleton', lambda c, device: (seen.update(bench.config.architectures), 1 / 0))
    c = bench.config.parse({}, {}, ['--preset=medium'], 'x.py')
    with pytest.raises(ZeroDivisionError):
        bench.random_models(c, types.SimpleNamespace(layers=2), 'cpu')
    net, known = seen[c.decoder]['transformer'], bench.config.architectures[c.decoder]['transformer']
    assert (net['num_layers'], list(net['dual_attention_layers']), net['num_attention_heads']) == (2, [0, 1], known['num_attention_heads']) and known['num_layers'] == 24
    net = seen[c.encoder]
    assert (net['text_config']['num_hidden_layers'], net['vision_config']['depth'], net['text_config']['hidden_size'], net['image_token_id']) == (2, 2, 2048, 151655)


@pytest.mark.parametrize('word, what', [('--part=all', 'growth'), ('--stage=reca', 'cold_start'), ('--peer=trl', 'flow_grpo'), ('--setps=3', 'setps'), ('--checkpointing=True', 'checkpointing=False')])
def test_bad_words_get_one_line(word, what):
    assert what in refusal(bench.main, [word, '--stage=grpo_decoder'] if 'check' in word else [word])
