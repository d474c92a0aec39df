"""What a cluster does to a run: several nodes, a preemption, a rank that dies and a restart."""
import json
import os
import signal
import subprocess
import sys
import time

from comparing import check_same_training, free_port, optimizer_state, plain_descent
from running import ROOT, arguments, lines, tiny
from test_parallel import DRIVER as PLAIN_SGD

# a rank that writes its exit code beside the run, and that in its first life dies like a lost
# machine at update `die`
DRIVER = f'''
import json, os, runpy, sys
sys.path.insert(0, {ROOT!r})
import torch
torch.set_num_threads(1)
from lib import optimiser
name, argv, die = json.load(open(sys.argv[1]))
rank, life = int(os.environ['RANK']), int(os.environ['TORCHELASTIC_RESTART_COUNT'])
take_step = optimiser.Optimiser.step

def mortal(optimiser, step):
    if rank == 1 and step == die and life == 0:
        os._exit(7)
    return take_step(optimiser, step)

optimiser.Optimiser.step = mortal
sys.argv = [name + '.py', *argv]
try:
    runpy.run_path({ROOT!r} + '/' + name + '.py', run_name='__main__')
    code = 0
except SystemExit as e:
    code = e.code or 0
folder = os.path.dirname(sys.argv[-1].split('=')[1])
with open(os.path.join(folder, 'code%d' % rank), 'w') as f:
    f.write(repr(code))
sys.exit(code)
'''


def torchrun(*arguments):
    """A torchrun that goes on in the background."""
    env = dict(os.environ, OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE',
               PYTHONPATH=f'{ROOT}:{ROOT}/tests', CUDA_VISIBLE_DEVICES='')
    command = [sys.executable, '-m', 'torch.distributed.run', *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run_of(tmp_path, name, *extra, steps, die=-1, restarts=0):
    """A torchrun of two ranks of DRIVER; out_dir is tmp_path/run."""
    argv = [*arguments(name, '', *extra, steps=steps), f'--out_dir={tmp_path}/run']
    (tmp_path / 'driver.py').write_text(DRIVER)
    (tmp_path / 'job.json').write_text(json.dumps([name, argv, die]))
    return torchrun('--nproc_per_node=2', f'--master_port={free_port()}',
                    f'--max-restarts={restarts}', tmp_path / 'driver.py', tmp_path / 'job.json')


def line_count(path):
    if not os.path.exists(path):
        return 0
    with open(path) as f:
        return sum(1 for _ in f)


def wait_for_lines(path, count, process, seconds=600):
    """Until a log has that many lines."""
    end = time.time() + seconds
    while line_count(path) < count:
        running = process.poll() is None and time.time() < end
        assert running, process.communicate()[0][-3000:]
        time.sleep(0.1)


def test_two_nodes_of_one_rank_equal_one_rank(tmp_path, monkeypatch):
    extra = ['--lr=0.03']
    two = tmp_path / 'two'
    job = ('grpo_encoder', arguments('grpo_encoder', two, *extra), '')
    (tmp_path / 'driver.py').write_text(PLAIN_SGD)
    (tmp_path / 'jobs.json').write_text(json.dumps([job]))
    port = free_port()
    nodes = []
    for i in range(2):
        node = torchrun('--nnodes=2', f'--node_rank={i}', '--nproc_per_node=1',
                        '--master_addr=127.0.0.1', f'--master_port={port}',
                        tmp_path / 'driver.py', tmp_path / 'jobs.json')
        nodes.append(node)
    said = [node.communicate(timeout=600)[0] for node in nodes]
    codes = [node.returncode for node in nodes]
    assert codes == [0, 0], said[0][-2000:] + said[1][-2000:]

    plain_descent(monkeypatch)
    log = tiny('grpo_encoder', tmp_path / 'one', *extra)
    check_same_training(tmp_path / 'one' / 'step_000002', two / 'step_000002')
    for x, y in zip(log, lines(two / 'log.jsonl'), strict=True):
        assert abs(x['reward'] - y['reward']) < 1e-5, 'the same images and start noise'
        assert x['caption_len'] == y['caption_len'], 'the same tokens'


def test_sigterm_on_one_rank_stops_saves_and_exits_0_on_all(tmp_path):
    run = run_of(tmp_path, 'cold_start', steps=100000)
    wait_for_lines(tmp_path / 'run' / 'log.jsonl', 1, run)
    children = subprocess.run(['pgrep', '-P', str(run.pid)], capture_output=True, text=True)
    ranks = children.stdout.split()
    os.kill(int(ranks[1]), signal.SIGTERM)
    said = run.communicate(timeout=300)[0]
    assert run.returncode == 0, said[-2000:]
    for rank in range(2):
        assert (tmp_path / f'code{rank}').read_text() == '0', said[-2000:]
    assert said.count('SIGTERM: stopped after update') == 1, 'one rank says so'

    done = len(lines(tmp_path / 'run' / 'log.jsonl'))
    assert 0 < done < 100000
    state = optimizer_state(tmp_path / 'run' / f'step_{done:06d}')
    assert state['step'] == done, 'the last finished update is the one that was saved'


def test_a_restart_goes_on_from_the_newest_checkpoint(tmp_path):
    out = tmp_path / 'run'
    run = run_of(tmp_path, 'cold_start', '--save_every=1', '--resume', steps=4, die=2, restarts=1)
    said = run.communicate(timeout=600)[0]
    assert run.returncode == 0, said[-3000:]
    log = lines(out / 'log.jsonl')
    assert [line['step'] for line in log] == [0, 1, 2, 3]
    assert (out / 'step_000004').exists()
    whole = tiny('cold_start', tmp_path / 'whole', steps=4)
    for x, y in zip(whole, log, strict=True):
        assert abs(x['reward'] - y['reward']) < 1e-3, 'it went on, and did not start again'
