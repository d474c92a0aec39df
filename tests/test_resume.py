"""Save, kill, resume equals an uninterrupted run, bit for bit; half a checkpoint is none."""
import contextlib
import json
import os
import resource
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from lib import checkpoint
from lib import files
from lib import lora
from lib.checkpoint import TEXT_ENCODER
from comparing import optimizer_state, timeless_log
from conftest import shared_config
from running import ROOT, STAGES, arguments, lines, python, refusal, same, script, tiny, weights

# runs the jobs of a JSON file, each in a child; one with a number dies in that checkpoint
DRIVER = f'''
import json, os, runpy, shutil, signal, sys
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

def as_killed(whole, folder):
    """A copy of a run as a kill in its second checkpoint would leave it."""
    shutil.copytree(whole, folder)
    with open(folder + '/samples.jsonl', 'a') as f:
        f.write('{{"step": 4, "row": 0}}\\n{{"step": 4, "ro')
    os.rename(folder + '/step_000004', folder + '/step_000004.tmp')
    os.remove(folder + '/step_000004.tmp/meta.json')

for name, argv, die in json.load(open(sys.argv[1])):
    if name == 'as_killed':
        as_killed(*argv)
        continue
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
    ('grpo_encoder', *LIVE, *LORA, *REFERENCE),
    ('grpo_encoder', *LORA, *REFERENCE),
    ('grpo_decoder', *LORA, *REFERENCE),
    ('pretrain_decoder', '--ema=0.6'),
    ('reca',),
]


def name_of(case):
    return '_'.join(case).replace('--', '').replace('=', '_')


def command_of(case, out_dir, *more):
    """Four updates with a checkpoint every two."""
    name, *switches = case
    return arguments(name, out_dir, *switches, '--save_every=2', '--eval_every=2', *more, steps=4)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Each case twice, and one of them killed.

    `whole`: 4 steps; `resumed`: a copy without its second checkpoint that went on; `killed`: in the
    middle of that checkpoint.
    """
    root = tmp_path_factory.mktemp('resume')
    killed = command_of(('grpo_encoder',), root / 'grpo_encoder' / 'killed')
    jobs = [('grpo_encoder', killed, 2)]
    for case in CASES:
        whole, resumed = (str(root / name_of(case) / run) for run in ('whole', 'resumed'))
        jobs.append((case[0], command_of(case, whole), 0))
        jobs.append(('as_killed', (whole, resumed), 0))
        jobs.append((case[0], command_of(case, resumed, '--resume'), 0))
    (root / 'driver.py').write_text(DRIVER)
    (root / 'jobs.json').write_text(json.dumps(jobs))
    done = python(root / 'driver.py', root / 'jobs.json')
    assert done.returncode == 0, done.stdout[-3000:]
    return root


def test_a_kill_while_saving_leaves_the_checkpoint_before(runs):
    folder = runs / 'grpo_encoder' / 'killed'
    left = sorted(os.listdir(runs / 'grpo_encoder' / 'whole'))
    left[left.index('step_000004')] += '.tmp'
    assert sorted(os.listdir(folder)) == left
    assert not (folder / 'step_000004.tmp' / 'meta.json').exists()
    assert checkpoint.newest(str(folder)) == f'{folder}/step_000002'
    assert optimizer_state(folder / 'step_000002')['step'] == 2
    assert len(lines(folder / 'log.jsonl')) == 4, 'it was killed after the fourth update'


@pytest.mark.parametrize('case', CASES, ids=name_of)
def test_resumed_equals_uninterrupted(runs, case):
    """Weights, the optimizer's state, a log that has each step once, and the pictures."""
    whole = runs / name_of(case) / 'whole'
    resumed = runs / name_of(case) / 'resumed'
    last = weights(resumed / 'step_000004')
    assert same(weights(whole / 'step_000004'), last)
    assert not same(weights(whole / 'step_000002'), last)
    state = optimizer_state(resumed / 'step_000004')
    assert same(optimizer_state(whole / 'step_000004'), state)
    assert sorted(os.listdir(resumed)) == sorted(os.listdir(whole)), 'nothing half-written is left'

    log = timeless_log(resumed)
    assert [line['step'] for line in log] == [0, 1, 2, 3]
    assert timeless_log(whole) == log
    evaluations = lines(resumed / 'eval.jsonl')
    assert lines(whole / 'eval.jsonl') == evaluations
    assert [line['step'] for line in evaluations] == [0, 2, 4]
    for name in ('samples.jsonl', 'groups.jsonl'):
        if (whole / name).exists():
            assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def stored_types(folder):
    """{file: dtypes in it} of every safetensors file of a checkpoint."""
    found = {}
    for path in checkpoint.weight_files(folder):
        dtypes = {tensor.dtype for tensor in load_file(path).values()}
        found[os.path.relpath(path, folder)] = dtypes
    return found


@pytest.mark.parametrize('case', [case for case in CASES if LORA[1] in case], ids=name_of)
def test_adapters_are_never_rounded(runs, case):
    """Also those that the stage freezes: the next one trains on. The base is in bfloat16."""
    expected = {*lora.FILES.values(), 'projector.safetensors'}
    if case[0] == 'grpo_encoder' and LIVE[0] not in case:
        expected.add(TEXT_ENCODER)
    for run in ('whole', 'resumed'):
        for step in (2, 4):
            found = stored_types(runs / name_of(case) / run / f'step_{step:06d}')
            assert found == {file: {torch.float32} for file in expected}


# --- what --resume does not do --------------------------------------------------------------------
def modified(folder):
    """{path: when it was last written} of every file below a folder."""
    times = {}
    for path, _, names in os.walk(folder):
        for name in names:
            file = os.path.join(path, name)
            times[file] = os.stat(file).st_mtime_ns
    return times


@pytest.mark.parametrize('name', STAGES)
def test_resuming_a_finished_run_does_nothing(runs, tmp_path, name):
    out = tmp_path / 'a'
    shutil.copytree(runs / name / 'whole', out)
    before = weights(out / 'step_000004')
    log = lines(out / 'log.jsonl')
    evaluations = lines(out / 'eval.jsonl')
    script(name, *arguments(name, out, '--resume', '--eval_every=2', steps=4))

    assert same(before, weights(out / 'step_000004'))
    assert sorted(os.listdir(out)) == sorted(os.listdir(runs / name / 'whole'))
    assert lines(out / 'log.jsonl') == log
    found = lines(out / 'eval.jsonl')
    assert [line['step'] for line in found] == [0, 2, 4]
    assert abs(found[-1]['reward'] - evaluations[-1]['reward']) < 1e-4


def refused_and_kept(name, out, *extra, steps=2):
    """What a run says that refuses an out_dir; nothing in it is touched."""
    before = modified(out)
    message = refusal(script, name, *arguments(name, out, *extra, steps=steps))
    assert str(out) in message
    assert modified(out) == before
    return message


@pytest.mark.parametrize('name', ['pretrain_decoder', *STAGES, 'reca'])
def test_what_is_refused_is_not_touched(tmp_path, name):
    """A used folder without --resume; more updates than --steps; logs without a checkpoint."""
    out = tmp_path / 'a'
    (out / 'step_000004').mkdir(parents=True)
    (out / 'step_000004' / 'meta.json').write_text('{"step": 4, "config": {}}')
    (out / 'eval.jsonl').write_text('{"step": 4}\n')
    (out / 'log.jsonl').write_text('{"step": 0}\n{"step": 1, "rew')
    assert '--resume' in refused_and_kept(name, out)
    fewer = refused_and_kept(name, out, '--resume', '--eval_every=1')
    assert 'has 4 updates already, more than --steps=2' in fewer
    shutil.rmtree(out / 'step_000004')
    (out / 'step_000004.tmp').mkdir()
    assert 'has logs but no checkpoint' in refused_and_kept(name, out, '--resume')


def test_resume_of_nothing_starts(tmp_path):
    assert len(tiny('grpo_decoder', tmp_path / 'new', '--resume', steps=1)) == 1


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


def test_a_folder_is_a_name_and_no_pattern(tmp_path):
    """Resumed, pruned, started from and looked through, whatever letters are in it."""
    out = tmp_path / 'grpo[kl=0.03]*'
    (tmp_path / 'grpok').mkdir()
    tiny('grpo_decoder', out, '--save_every=1', '--warmup=0', steps=2)
    log = tiny('grpo_decoder', out, '--save_every=1', '--warmup=0', '--resume', steps=4)
    assert [line['step'] for line in log] == [0, 1, 2, 3]
    saved = sorted(name for name in os.listdir(out) if name.startswith('step_'))
    assert saved == ['step_000003', 'step_000004']
    uae = checkpoint.open_uae(shared_config(f'--init_from={out}'))
    now = weights(out / 'step_000004' / 'decoder')
    for name, tensor in uae.decoder.transformer.state_dict().items():
        assert torch.equal(now[f'transformer/diffusion_pytorch_model.safetensors:{name}'], tensor)
    file = out / 'step_000004' / 'projector.safetensors'
    os.truncate(file, file.stat().st_size // 2)
    assert str(file) in refusal(checkpoint.open_uae, shared_config(f'--init_from={out}'))


# --- writing --------------------------------------------------------------------------------------
def test_newest_goes_by_number(tmp_path):
    assert checkpoint.newest(str(tmp_path)) is None
    whole = ['step_000010', 'step_999999', 'step_1000000']
    half_written = ['step_000011.tmp', 'step_1000001.tmp']
    for name in [*whole, *half_written, 'step_last', 'other']:
        (tmp_path / name).mkdir()
    newest = checkpoint.newest(str(tmp_path))
    assert newest == str(tmp_path / 'step_1000000'), 'by number, not by name'


def optimiser_of(params):
    return SimpleNamespace(adamw=torch.optim.AdamW(params))


def test_save_keeps_the_newest_and_clears_what_a_kill_left(tmp_path, monkeypatch):
    def write_weights(uae, folder):
        os.makedirs(folder)                      # fails if a .tmp folder is still there
        with open(f'{folder}/weights', 'w') as f:
            f.write('w')

    monkeypatch.setattr(checkpoint, 'save_models', write_weights)
    c = SimpleNamespace(out_dir=str(tmp_path))
    uae = SimpleNamespace(release='', edits='', encoder=SimpleNamespace(text_encoder=None))
    optimiser = optimiser_of([torch.zeros(1, requires_grad=True)])

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


@contextlib.contextmanager
def disk_of(size):
    """Context in which no file can be longer than `size` bytes."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@pytest.mark.parametrize('way, size, writer', [
    ([], 200_000, 'projector'),
    ([], 10 ** 6, 'transformers'),
    (['--lora_rank=64'], 10 ** 6, 'peft'),
    ([], 6 * 10 ** 6, 'torch'),
])
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(tmp_path, way, size, writer):
    """Whoever is writing; what was saved before is whole and goes on, with its `extra`."""
    config = shared_config(f'--out_dir={tmp_path}', *way)
    run = SimpleNamespace(master=True, world=1)
    uae = checkpoint.open_uae(config)
    optimiser = optimiser_of(uae.train_only('projector'))
    extra = dict(old=dict(weight=torch.arange(3.0)), cursor=7, seen=[1, 2])
    checkpoint.save(config, run, 1, uae, optimiser, extra)
    before = modified(tmp_path)
    large = dict(old=torch.zeros(2 * 10 ** 6))
    with disk_of(size):
        message = refusal(checkpoint.save, config, run, 2, uae, optimiser, large)
    assert 'step_000002.tmp cannot be written' in message
    assert 'what was there before is whole' in message
    assert before.items() <= modified(tmp_path).items()

    config.resume = True
    assert checkpoint.find_checkpoint(config) == f'{tmp_path}/step_000001'
    assert same(checkpoint.restore(config, optimiser), extra)
    checkpoint.save(config, run, 2, uae, optimiser, large)
    assert sorted(os.listdir(tmp_path)) == ['step_000001', 'step_000002']


@pytest.mark.parametrize('write', [
    lambda path: files.append_lines(path, [dict(text='x' * 2000)]),
    lambda path: files.write_json(path, 'x' * 2000)])
def test_a_full_disk_is_one_line_wherever_a_run_writes(tmp_path, write):
    with disk_of(1000):
        assert f'{tmp_path}/file cannot be written' in refusal(write, f'{tmp_path}/file')


def test_write_atomic_is_whole_or_not_there(tmp_path):
    path = str(tmp_path / 'deep' / 'file')

    def broken(temporary):
        with open(temporary, 'w') as f:
            f.write('half')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(path, broken)
    assert not os.path.exists(path)
    files.write_atomic(path, lambda temporary: files.write_lines(temporary, ['whole']))
    with open(path) as f:
        assert f.read() == 'whole'
