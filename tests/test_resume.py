"""Save, kill, resume equals an uninterrupted run, bit for bit; nothing half-written is ever taken for a checkpoint."""
import json
import os
import shutil
import types

import pytest
import torch

import common
from running import ROOT, STAGES, lines, python, refusal, same, script, tiny, weights, words

DRIVER = f'''
import json, os, runpy, signal, sys
sys.path.insert(0, {ROOT!r})
import torch, diffusers, transformers, open_clip, peft
torch.set_num_threads(1)

def kill_in_save(n):
    """SIGKILL half-way through the n-th checkpoint."""
    really, count = torch.save, [0]
    def save(what, path):
        count[0] += 1
        really(what, path)
        if count[0] == n:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save = save

for name, argv, die in json.load(open(sys.argv[1])):
    child = os.fork()
    if not child:
        if die:
            kill_in_save(die)
        sys.argv = [name + '.py', *argv]
        runpy.run_path({ROOT!r} + '/' + name + '.py', run_name='__main__')
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) == bool(die) and (die or os.WEXITSTATUS(status) == 0), (name, argv, status)
'''
CASES = [('cold_start',), ('grpo_encoder',), ('grpo_decoder',), ('grpo_encoder', '--kl=0.1'), ('grpo_decoder', '--kl=0.1'),
         ('grpo_encoder', '--kl=0.1', '--dtype=bfloat16'), ('cold_start', '--dtype=bfloat16')]


def name_of(case):
    return '_'.join(case).replace('--', '').replace('=', '_')


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Each case: `whole` 4 steps; `killed`: in the middle of the second checkpoint; `resumed`: a copy of it that went on."""
    root = tmp_path_factory.mktemp('resume')
    jobs = []
    for case in CASES:
        def argv(kind, *more):
            return words(case[0], root / name_of(case) / kind, *case[1:], '--save_every=2', '--eval_every=3', *more, steps=4)
        jobs += [(case[0], argv('whole'), 0), (case[0], argv('killed'), 2)]
    (root / 'driver.py').write_text(DRIVER)
    (root / 'jobs.json').write_text(json.dumps(jobs))
    done = python(root / 'driver.py', root / 'jobs.json')
    assert done.returncode == 0, done.stdout[-3000:]
    for case in CASES:
        shutil.copytree(root / name_of(case) / 'killed', root / name_of(case) / 'resumed')
    (root / 'jobs.json').write_text(json.dumps([(case[0], words(case[0], root / name_of(case) / 'resumed', *case[1:], '--save_every=2', '--eval_every=3',
                                                              '--resume', steps=4), 0) for case in CASES]))
    done = python(root / 'driver.py', root / 'jobs.json')
    assert done.returncode == 0, done.stdout[-3000:]
    return root


@pytest.mark.parametrize('case', CASES, ids=name_of)
def test_a_kill_while_saving_leaves_the_checkpoint_before(runs, case):
    folder = runs / name_of(case) / 'killed'
    assert sorted(f for f in os.listdir(folder) if f.startswith('step_')) == ['step_000002', 'step_000004.tmp']
    assert common.newest(str(folder)) == f'{folder}/step_000002'
    assert torch.load(folder / 'step_000002' / 'state.pt', weights_only=True)['step'] == 2
    assert len(lines(folder / 'log.jsonl')) == 4, 'it was killed after the fourth update'


@pytest.mark.parametrize('case', CASES, ids=name_of)
def test_resumed_equals_uninterrupted(runs, case):
    whole, resumed = (runs / name_of(case) / kind for kind in ('whole', 'resumed'))
    assert same(weights(whole / 'step_000004'), weights(resumed / 'step_000004'))
    assert not same(weights(whole / 'step_000002'), weights(resumed / 'step_000004'))
    a, b = (torch.load(f / 'step_000004' / 'state.pt', weights_only=True) for f in (whole, resumed))
    assert same(a, b)
    assert sorted(os.listdir(resumed)) == sorted(os.listdir(whole)), 'nothing half-written is left'


@pytest.mark.parametrize('case', CASES, ids=name_of)
def test_logs_of_a_resumed_run_have_each_step_once(runs, case):
    whole, resumed = (runs / name_of(case) / kind for kind in ('whole', 'resumed'))
    a, b = ([{k: v for k, v in line.items() if k not in ('sec', 'peak_gb')} for line in lines(f / 'log.jsonl')] for f in (whole, resumed))
    assert [line['step'] for line in b] == [0, 1, 2, 3] and a == b
    assert lines(whole / 'eval.jsonl') == lines(resumed / 'eval.jsonl') and [line['step'] for line in lines(resumed / 'eval.jsonl')] == [0, 3, 4]


@pytest.mark.parametrize('name', STAGES)
def test_resuming_a_finished_run_does_nothing(runs, tmp_path, name):
    shutil.copytree(runs / name / 'whole', tmp_path / 'a')
    before, logs = weights(tmp_path / 'a' / 'step_000004'), [lines(tmp_path / 'a' / f) for f in ('log.jsonl', 'eval.jsonl')]
    script(name, *words(name, tmp_path / 'a', '--resume', '--eval_every=3', steps=4))
    assert same(before, weights(tmp_path / 'a' / 'step_000004')) and sorted(os.listdir(tmp_path / 'a')) == sorted(os.listdir(runs / name / 'whole'))
    assert lines(tmp_path / 'a' / 'log.jsonl') == logs[0]
    found = lines(tmp_path / 'a' / 'eval.jsonl')
    assert [line['step'] for line in found] == [0, 3, 4] and abs(found[-1]['reward'] - logs[1][-1]['reward']) < 1e-4


@pytest.mark.parametrize('name', STAGES)
def test_a_used_out_dir_is_refused_and_kept(runs, tmp_path, name):
    shutil.copytree(runs / name / 'killed', tmp_path / 'a')
    before = {os.path.join(d, f): os.stat(os.path.join(d, f)).st_mtime_ns for d, _, fs in os.walk(tmp_path) for f in fs}
    message = refusal(tiny, name, tmp_path / 'a')
    assert '--resume' in message and str(tmp_path) in message
    assert before == {os.path.join(d, f): os.stat(os.path.join(d, f)).st_mtime_ns for d, _, fs in os.walk(tmp_path) for f in fs}


def test_resume_of_nothing_starts(tmp_path):
    assert len(tiny('grpo_decoder', tmp_path / 'new', '--resume', steps=1)) == 1
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'log.jsonl').write_text('{"step": 0}\n{"step": 1, "rew')     # killed before its first checkpoint
    assert [line['step'] for line in tiny('grpo_decoder', tmp_path / 'other', '--resume', steps=1)] == [0]


@pytest.mark.parametrize('part', ['state.pt', 'meta.json', 'encoder/model.safetensors'])
@pytest.mark.parametrize('damage', ['missing', 'truncated'])
def test_resume_of_a_damaged_checkpoint_is_one_line(runs, tmp_path, part, damage):
    shutil.copytree(runs / 'grpo_encoder' / 'killed', tmp_path / 'a')
    file = tmp_path / 'a' / 'step_000002' / part
    os.truncate(file, file.stat().st_size // 2) if damage == 'truncated' else file.unlink()
    assert 'step_000002' in refusal(lambda: tiny('grpo_encoder', tmp_path / 'a', '--resume'))


def test_newest_goes_by_number(tmp_path):
    assert common.newest(str(tmp_path)) is None
    for name in ('step_000010', 'step_999999', 'step_1000000', 'step_000011.tmp', 'step_1000001.tmp', 'step_last', 'other'):
        (tmp_path / name).mkdir()
    assert common.newest(str(tmp_path)) == str(tmp_path / 'step_1000000'), 'by number, not by name'


def test_save_keeps_the_newest_and_clears_what_a_kill_left(tmp_path):
    class Model:
        def save(self, folder):
            os.makedirs(folder)                  # fails if a .tmp folder is still there
            with open(f'{folder}/weights', 'w') as f:
                f.write('w')
    c, run = types.SimpleNamespace(out_dir=str(tmp_path)), types.SimpleNamespace(master=True, world=1)
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    (tmp_path / 'step_000002.tmp').mkdir()
    for step in (1, 2, 3):
        common.save(c, run, step, Model(), opt)
    assert sorted(os.listdir(tmp_path)) == ['step_000002', 'step_000003']
    assert sorted(os.listdir(tmp_path / 'step_000003')) == ['meta.json', 'state.pt', 'weights']
    mtime = os.stat(tmp_path / 'step_000003' / 'weights').st_mtime_ns
    common.save(c, run, 3, Model(), opt)
    assert os.stat(tmp_path / 'step_000003' / 'weights').st_mtime_ns == mtime, 'a checkpoint that is there stays as it is'
    common.save(c, types.SimpleNamespace(master=False, world=1), 4, Model(), opt)
    assert not (tmp_path / 'step_000004').exists(), 'rank 0 writes'


def test_write_atomic_is_whole_or_not_there(tmp_path):
    path = str(tmp_path / 'deep' / 'file')

    def broken(p):
        with open(p, 'w') as f:
            f.write('half')
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        common.write_atomic(path, broken)
    assert not os.path.exists(path)
    common.write_atomic(path, lambda p: open(p, 'w').close())
    assert os.path.exists(path)
