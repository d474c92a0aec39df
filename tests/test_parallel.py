"""Ranks and micro-batches change nothing: two gloo ranks equal one, any split of the batch equals the whole.

AdamW divides a gradient by its own size, so rounding noise in an entry that should be 0 becomes a step of a whole lr.
These runs take plain gradient descent without clipping instead: then the weights tell the gradient, its scale included.
"""
import functools
import json
import socket

import pytest
import torch

import common
from running import ROOT, STAGES, distance, lines, python, refusal, tiny, weights, words

DRIVER = f'''
import json, os, runpy, sys
sys.path.insert(0, {ROOT!r})
import torch
torch.set_num_threads(1)
torch.optim.AdamW = lambda params, lr, **kw: torch.optim.SGD(params, lr=lr)
for name, argv, refused in json.load(open(sys.argv[1])):
    sys.argv = [name + '.py', *argv]
    try:
        runpy.run_path({ROOT!r} + '/' + name + '.py', run_name='__main__')
    except SystemExit as e:
        if not refused:
            raise
        with open(refused + os.environ['RANK'], 'w') as f:
            f.write(str(e.code))
'''
# one switch of every kind that has to know about ranks
EXTRA = dict(cold_start=['--lr=0.03'], grpo_encoder=['--lr=0.03', '--kl=0.1', '--updates=2'], grpo_decoder=['--lr=1.0', '--kl=0.1', '--shuffle_reward=True', '--clip_range=0.2,0.2'])


def argv(name, out, *extra, images=4):
    return words(name, out, '--eval_every=2', '--grad_clip=1e9', *EXTRA[name], *extra, images=images)


def agree(x, y):
    """Two log lines say the same. The advantage divides the reward's rounding noise of 1e-7 by a group's std of perhaps
    1e-3, so what is made of it agrees to 1e-3 of its size; a wrong scale would be off by a factor."""
    for key in ('reward', 'reward_std', 'zero_var', 'lr', 'caption_len', 'truncated'):
        assert key not in x or abs(x[key] - y[key]) < 1e-5, key
    for key in ('loss', 'grad_norm', 'ratio_max'):
        assert key not in x or abs(x[key] - y[key]) < 1e-3 * abs(x[key]) + 1e-5, key


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    """stage -> out_dir of its run on one rank, all samples in one micro-batch; run when first asked for."""
    root = tmp_path_factory.mktemp('one')

    @functools.cache
    def run(name):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(torch.optim, 'AdamW', lambda params, lr, **kw: torch.optim.SGD(params, lr=lr))
            tiny(name, root / name, *argv(name, root / name))
        return root / name
    return run


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    """One torchrun of two ranks: the stages with micro-batches of 2, then three command lines that have to be refused."""
    root = tmp_path_factory.mktemp('two')
    few = root / 'few'
    few.mkdir()
    import numpy as np
    from PIL import Image
    for i in range(2):
        Image.fromarray(np.full((32, 32, 3), 60 * i, np.uint8)).save(few / f'{i}.png')
    (root / 'driver.py').write_text(DRIVER)
    jobs = [(name, argv(name, root / name, '--micro_batch=2'), '') for name in STAGES]
    jobs += [('grpo_encoder', words('grpo_encoder', root / 'r1', f'--data={few}', f'--held_out={few}', images=4), ''),
             ('grpo_encoder', words('grpo_encoder', root / 'r2', f'--data={few / "0.png"}', f'--held_out={few}', images=4), f'{root}/images'),
             ('grpo_decoder', argv('grpo_decoder', root / 'grpo_decoder'), f'{root}/used'),
             ('cold_start', words('cold_start', root / 'r3', images=3), '')]
    (root / 'jobs.json').write_text(json.dumps(jobs))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    done = python('-m', 'torch.distributed.run', '--nproc_per_node=2', f'--master_port={port}', root / 'driver.py', root / 'jobs.json')
    return root, done


@pytest.mark.parametrize('name', STAGES)
def test_two_ranks_equal_one(one, two, name):
    root, done = two
    assert (root / name / 'step_000002').exists(), done.stdout[-3000:]
    start = weights('data/shapes/base')
    a, b = weights(one(name) / 'step_000002'), weights(root / name / 'step_000002')
    moved = distance(a, {k: start[k] for k in a})
    assert moved > 1e-3, 'else equality says nothing'
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-5 and distance(a, b) < 1e-3 * moved
    log_1, log_2 = lines(one(name) / 'log.jsonl'), lines(root / name / 'log.jsonl')
    assert [line['step'] for line in log_2] == [0, 1], 'one line a step, by rank 0'
    for x, y in zip(log_1, log_2):
        assert x.keys() == y.keys()
        agree(x, y)
    for x, y in zip(lines(one(name) / 'eval.jsonl'), lines(root / name / 'eval.jsonl')):
        assert all(abs(x[key] - y[key]) < 1e-4 for key in x)


def test_refusals_under_torchrun(two):
    """More ranks than images, a used out_dir, a count that does not divide: one line on each rank, exit code not 0."""
    root, done = two
    assert (root / 'r1' / 'step_000002').exists(), 'two images are enough for two ranks'
    for name, said in (('images', 'more ranks (2) than images (1)'), ('used', 'is not empty')):
        for rank in '01':
            message = (root / f'{name}{rank}').read_text()
            assert said in message and '\n' not in message
    assert done.returncode != 0
    assert 'prompts=3 does not divide over 2 ranks' in done.stdout and 'Traceback' not in done.stdout.split('prompts=3')[0]
    assert not (root / 'r3').exists() or not list((root / 'r3').iterdir())


@pytest.mark.parametrize('name, size', [('cold_start', 1), ('grpo_encoder', 2), ('grpo_encoder', 1), ('grpo_decoder', 4), ('grpo_decoder', 1)])
def test_micro_batches_equal_the_whole(one, tmp_path, monkeypatch, name, size):
    """4 images, groups of 2: one forward pass, or 2, 4 and 8 (which cuts groups)."""
    passes, run = [], common.group_slices
    monkeypatch.setattr(torch.optim, 'AdamW', lambda params, lr, **kw: torch.optim.SGD(params, lr=lr))
    monkeypatch.setattr(common, 'group_slices', lambda *a: (passes.append(p) or p for p in run(*a)))
    log = tiny(name, tmp_path, *argv(name, tmp_path, f'--micro_batch={size}'))
    samples = 4 if name == 'cold_start' else 8
    assert sum(last for _, _, last in passes) * samples // size <= len(passes), 'it was split'
    whole = lines(one(name) / 'log.jsonl')
    a, b = weights(one(name) / 'step_000002'), weights(tmp_path / 'step_000002')
    start = weights('data/shapes/base')
    assert distance(a, b) < 1e-3 * distance(a, {k: start[k] for k in a})
    for x, y in zip(whole, log):
        agree(x, y)


def test_the_last_micro_batch_is_marked_and_groups_stay_whole():
    seen = (torch.arange(6),)
    for G, size in ((1, 0), (4, 0), (4, 8), (4, 9), (4, 4), (4, 3), (1, 4), (4, 100)):
        found = list(common.group_slices(seen, G, size))
        assert [last for *_, last in found] == [False] * (len(found) - 1) + [True]
        assert [i for _, b, _ in found for i in range(24 * G // 4)[b]] == list(range(6 * G))
        for (images,), b, _ in found:
            assert not size or b.stop - b.start <= max(size, 1)
            assert set(images.tolist()) == {row // G for row in range(b.start, b.stop)}


def test_shares_of_a_count():
    assert common.per_rank('prompts', 8, 4) == 2
    assert 'prompts=6' in refusal(functools.partial(common.per_rank, 'prompts'), 6, 4)


def test_randomness_is_addressed():
    """Row i depends on its address alone: not on its neighbours, nor on anything drawn before."""
    all_rows = common.normal((3,), range(6), 1, 'start', 2)
    torch.randn(5)
    assert torch.equal(all_rows[[4, 1]], common.normal((3,), [4, 1], 1, 'start', 2))
    others = [common.normal((3,), range(6), 1, 'start', 3), common.normal((3,), range(6), 2, 'start', 2), common.normal((3,), range(6), 1, 'sde', 2)]
    assert all(not torch.equal(all_rows, other) for other in others)
    assert len({tuple(row.tolist()) for row in all_rows}) == 6
    u = common.uniform((1000,), [0], 'u')
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.05 and abs(common.normal((1000,), [0], 'n').std() - 1) < 0.1
