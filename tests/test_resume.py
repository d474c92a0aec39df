"""Save, kill, resume equals an uninterrupted run, bit for bit; half a checkpoint is none."""
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from lib import checkpoint
from lib import files
from lib.checkpoint import ADAPTERS, TEXT_ENCODER
from comparing import optimizer_state, timeless_log
from running import ROOT, STAGES, arguments, lines, python, refusal, same, script, tiny, weights

# runs the jobs of a JSON file, each in a child; one with a number dies in that checkpoint
DRIVER = f'''
import json, os, runpy, signal, sys
sys.path.insert(0, {ROOT!r})
import torch, diffusers, transformers, open_clip, peft
torch.set_num_threads(1)

def kill_in_save(number):
    """SIGKILL half-way through the checkpoint of this number."""
    really, count = torch.save, [0]
    def save(what, path):
        count[0] += 1
        really(what, path)
        if count[0] == number:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save = save

for name, argv, die in json.load(open(sys.argv[1])):
    child = os.fork()
    if not child:
        torch.set_num_threads(1)    # makes the pool anew after a fork; loaders' threads would race
        if die:
            kill_in_save(die)
        sys.argv = [name + '.py', *argv]
        runpy.run_path({ROOT!r} + '/' + name + '.py', run_name='__main__')
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) == bool(die), (name, argv, status)
    assert die or os.WEXITSTATUS(status) == 0, (name, argv, status)
'''
LORA = ('--dtype=bfloat16', '--lora_rank=4')
REFERENCE = ('--kl=0.1', '--epochs=2')
LIVE = ('--text_encoder=live',)         # the tiny preset keeps the start's captioner beside it
CASES = [
    ('cold_start',),
    ('grpo_encoder',),
    ('grpo_decoder',),
    ('grpo_encoder', *LIVE, '--kl=0'),
    ('grpo_decoder', '--kl=0.1'),
    ('grpo_encoder', *LIVE, '--kl=0.1', '--dtype=bfloat16'),
    ('cold_start', '--dtype=bfloat16'),
    ('cold_start', *LORA),
    ('grpo_encoder', *LIVE, *LORA, *REFERENCE),
    ('grpo_decoder', *LORA, *REFERENCE),
    ('grpo_encoder', *REFERENCE),
    ('grpo_encoder', *LORA, *REFERENCE),
]


def name_of(case):
    return '_'.join(case).replace('--', '').replace('=', '_')


def command_of(case, out_dir, *more):
    """Four updates with a checkpoint every two."""
    name, *switches = case
    return arguments(name, out_dir, *switches, '--save_every=2', '--eval_every=3', *more, steps=4)


def drive(root, jobs):
    (root / 'driver.py').write_text(DRIVER)
    (root / 'jobs.json').write_text(json.dumps(jobs))
    done = python(root / 'driver.py', root / 'jobs.json')
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Each case three times.

    `whole`: 4 steps; `killed`: in the middle of the second checkpoint; `resumed`: a copy of it
    that went on.
    """
    root = tmp_path_factory.mktemp('resume')
    jobs = []
    for case in CASES:
        folder = root / name_of(case)
        jobs.append((case[0], command_of(case, folder / 'whole'), 0))
        jobs.append((case[0], command_of(case, folder / 'killed'), 2))
    drive(root, jobs)

    jobs = []
    for case in CASES:
        folder = root / name_of(case)
        shutil.copytree(folder / 'killed', folder / 'resumed')
        jobs.append((case[0], command_of(case, folder / 'resumed', '--resume'), 0))
    drive(root, jobs)
    return root


@pytest.mark.parametrize('case', CASES, ids=name_of)
def test_a_kill_while_saving_leaves_the_checkpoint_before(runs, case):
    folder = runs / name_of(case) / 'killed'
    checkpoints = sorted(name for name in os.listdir(folder) if name.startswith('step_'))
    assert checkpoints == ['step_000002', 'step_000004.tmp']
    assert checkpoint.newest(str(folder)) == f'{folder}/step_000002'
    assert optimizer_state(folder / 'step_000002')['step'] == 2
    assert len(lines(folder / 'log.jsonl')) == 4, 'it was killed after the fourth update'


@pytest.mark.parametrize('case', CASES, ids=name_of)
def test_resumed_equals_uninterrupted(runs, case):
    whole = runs / name_of(case) / 'whole'
    resumed = runs / name_of(case) / 'resumed'
    last = weights(resumed / 'step_000004')
    assert same(weights(whole / 'step_000004'), last)
    assert not same(weights(whole / 'step_000002'), last)
    state = optimizer_state(resumed / 'step_000004')
    assert same(optimizer_state(whole / 'step_000004'), state)
    assert sorted(os.listdir(resumed)) == sorted(os.listdir(whole)), 'nothing half-written is left'


@pytest.mark.parametrize('case', CASES, ids=name_of)
def test_logs_of_a_resumed_run_have_each_step_once(runs, case):
    whole = runs / name_of(case) / 'whole'
    resumed = runs / name_of(case) / 'resumed'
    log = timeless_log(resumed)
    assert [line['step'] for line in log] == [0, 1, 2, 3]
    assert timeless_log(whole) == log
    evaluations = lines(resumed / 'eval.jsonl')
    assert lines(whole / 'eval.jsonl') == evaluations
    assert [line['step'] for line in evaluations] == [0, 3, 4]


def stored_types(folder):
    """{file: dtypes in it} of every safetensors file below a checkpoint folder."""
    found = {}
    for path, _, names in os.walk(folder):
        for name in names:
            if name.endswith('.safetensors'):
                file = os.path.join(path, name)
                tensors = load_file(file).values()
                found[os.path.relpath(file, folder)] = {t.dtype for t in tensors}
    return found


@pytest.mark.parametrize('case', [case for case in CASES if LORA[1] in case], ids=name_of)
def test_adapters_are_never_rounded(runs, case):
    """Also those that the stage freezes: the next one trains on. The base is in bfloat16."""
    expected = {*ADAPTERS.values(), 'projector.safetensors'}
    if case[0] == 'grpo_encoder' and LIVE[0] not in case:
        expected.add(TEXT_ENCODER)
    for run in ('whole', 'resumed'):
        for step in (2, 4):
            found = stored_types(runs / name_of(case) / run / f'step_{step:06d}')
            assert found == {file: {torch.float32} for file in expected}


@pytest.mark.parametrize('name', STAGES)
def test_resuming_a_finished_run_does_nothing(runs, tmp_path, name):
    out = tmp_path / 'a'
    shutil.copytree(runs / name / 'whole', out)
    before = weights(out / 'step_000004')
    log = lines(out / 'log.jsonl')
    evaluations = lines(out / 'eval.jsonl')
    script(name, *arguments(name, out, '--resume', '--eval_every=3', steps=4))

    assert same(before, weights(out / 'step_000004'))
    assert sorted(os.listdir(out)) == sorted(os.listdir(runs / name / 'whole'))
    assert lines(out / 'log.jsonl') == log
    found = lines(out / 'eval.jsonl')
    assert [line['step'] for line in found] == [0, 3, 4]
    assert abs(found[-1]['reward'] - evaluations[-1]['reward']) < 1e-4


def modified(folder):
    """{path: when it was last written} of every file below a folder."""
    times = {}
    for path, _, names in os.walk(folder):
        for name in names:
            file = os.path.join(path, name)
            times[file] = os.stat(file).st_mtime_ns
    return times


@pytest.mark.parametrize('name', STAGES)
def test_a_used_out_dir_is_refused_and_kept(runs, tmp_path, name):
    shutil.copytree(runs / name / 'killed', tmp_path / 'a')
    before = modified(tmp_path)
    message = refusal(tiny, name, tmp_path / 'a')
    assert '--resume' in message
    assert str(tmp_path) in message
    assert modified(tmp_path) == before


def test_resume_of_nothing_starts(tmp_path):
    assert len(tiny('grpo_decoder', tmp_path / 'new', '--resume', steps=1)) == 1

    killed_before_its_first_checkpoint = '{"step": 0}\n{"step": 1, "rew'
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'log.jsonl').write_text(killed_before_its_first_checkpoint)
    log = tiny('grpo_decoder', tmp_path / 'other', '--resume', steps=1)
    assert [line['step'] for line in log] == [0]


@pytest.mark.parametrize('part', ['state.pt', 'meta.json', 'encoder/model.safetensors'])
@pytest.mark.parametrize('damage', ['missing', 'truncated'])
def test_resume_of_a_damaged_checkpoint_is_one_line(runs, tmp_path, part, damage):
    shutil.copytree(runs / 'grpo_encoder' / 'killed', tmp_path / 'a')
    file = tmp_path / 'a' / 'step_000002' / part
    if damage == 'truncated':
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.unlink()
    assert 'step_000002' in refusal(tiny, 'grpo_encoder', tmp_path / 'a', '--resume')


def test_newest_goes_by_number(tmp_path):
    assert checkpoint.newest(str(tmp_path)) is None
    whole = ['step_000010', 'step_999999', 'step_1000000']
    half_written = ['step_000011.tmp', 'step_1000001.tmp']
    for name in [*whole, *half_written, 'step_last', 'other']:
        (tmp_path / name).mkdir()
    newest = checkpoint.newest(str(tmp_path))
    assert newest == str(tmp_path / 'step_1000000'), 'by number, not by name'


def write_weights(uae, folder):
    """In the place of checkpoint.save_models."""
    os.makedirs(folder)                          # fails if a .tmp folder is still there
    with open(f'{folder}/weights', 'w') as f:
        f.write('w')


def test_save_keeps_the_newest_and_clears_what_a_kill_left(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, 'save_models', write_weights)
    c = SimpleNamespace(out_dir=str(tmp_path))
    uae = SimpleNamespace(release='', text_encoder=None)
    adamw = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    optimiser = SimpleNamespace(adamw=adamw)

    def save(step, master=True):
        run = SimpleNamespace(master=master, world=1)
        checkpoint.save(c, run, step, uae, optimiser)

    (tmp_path / 'step_000002.tmp').mkdir()
    for step in (1, 2, 3):
        save(step)
    assert sorted(os.listdir(tmp_path)) == ['step_000002', 'step_000003']
    last = tmp_path / 'step_000003'
    assert sorted(os.listdir(last)) == ['meta.json', 'state.pt', 'weights']

    written = os.stat(last / 'weights').st_mtime_ns
    save(3)
    assert os.stat(last / 'weights').st_mtime_ns == written, 'a checkpoint stays as it is'
    save(4, master=False)
    assert not (tmp_path / 'step_000004').exists(), 'rank 0 writes'


def test_write_atomic_is_whole_or_not_there(tmp_path):
    path = str(tmp_path / 'deep' / 'file')

    def broken(temporary):
        with open(temporary, 'w') as f:
            f.write('half')
        raise KeyboardInterrupt

    def empty(temporary):
        open(temporary, 'w').close()

    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(path, broken)
    assert not os.path.exists(path)
    files.write_atomic(path, empty)
    assert os.path.exists(path)
