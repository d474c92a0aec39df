"""What a cluster does to a run: several nodes, a preemption, a rank that dies, a restart."""
import json
import os
import signal
import socket
import subprocess
import sys
import time

import torch

from running import ROOT, distance, lines, tiny, weights, words
from test_parallel import DRIVER as PLAIN_SGD

# a rank that writes its exit code beside the run, and that dies like a lost machine at update `die` (in its first life, or in each)
DRIVER = f'''
import json, os, runpy, sys
sys.path.insert(0, {ROOT!r})
import torch
torch.set_num_threads(1)
import common
name, argv, die, always = json.load(open(sys.argv[1]))
rank, life = int(os.environ['RANK']), int(os.environ['TORCHELASTIC_RESTART_COUNT'])
optimise = common.optimise

def mortal(opt, params, step, c):
    if rank == 1 and step == die and (always or life == 0):
        os._exit(7)
    return optimise(opt, params, step, c)

common.optimise = mortal
sys.argv = [name + '.py', *argv]
try:
    runpy.run_path({ROOT!r} + '/' + name + '.py', run_name='__main__')
    code = 0
except SystemExit as e:
    code = e.code or 0
open(os.path.join(os.path.dirname(sys.argv[-1].split("=")[1]), "code%d" % rank), "w").write(repr(code))
sys.exit(code)
'''


def port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def torchrun(*argv, **kw):
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=f'{ROOT}:{ROOT}/tests', OMP_WAIT_POLICY='PASSIVE', CUDA_VISIBLE_DEVICES='')
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', *map(str, argv)], cwd=ROOT, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kw)


def run_of(tmp_path, name, *extra, steps, die=-1, always=False, restarts=0):
    """A torchrun of two ranks of DRIVER; out_dir is tmp_path/run."""
    (tmp_path / 'driver.py').write_text(DRIVER)
    (tmp_path / 'job.json').write_text(json.dumps([name, [*words(name, '', *extra, steps=steps), f'--out_dir={tmp_path}/run'], die, always]))
    return torchrun('--nproc_per_node=2', f'--master_port={port()}', f'--max-restarts={restarts}', tmp_path / 'driver.py', tmp_path / 'job.json')


def wait_for_lines(path, n, process, seconds=120):
    """Until a log has n lines."""
    end = time.time() + seconds
    while not os.path.exists(path) or sum(1 for _ in open(path)) < n:
        assert process.poll() is None and time.time() < end, process.communicate()[0][-3000:]
        time.sleep(0.1)


def test_two_nodes_of_one_rank_equal_one_rank(tmp_path, monkeypatch):
    extra = ['--lr=0.03', '--grad_clip=1e9']
    (tmp_path / 'driver.py').write_text(PLAIN_SGD)
    (tmp_path / 'jobs.json').write_text(json.dumps([('grpo_encoder', words('grpo_encoder', tmp_path / 'two', *extra), '')]))
    at = port()
    nodes = [torchrun('--nnodes=2', f'--node_rank={i}', '--nproc_per_node=1', '--master_addr=127.0.0.1', f'--master_port={at}',
                      tmp_path / 'driver.py', tmp_path / 'jobs.json') for i in range(2)]
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said[0][-2000:] + said[1][-2000:]
    monkeypatch.setattr(torch.optim, 'AdamW', lambda params, lr, **kw: torch.optim.SGD(params, lr=lr))
    one = tiny('grpo_encoder', tmp_path / 'one', *extra)
    a, b, start = weights(tmp_path / 'one' / 'step_000002'), weights(tmp_path / 'two' / 'step_000002'), weights('data/shapes/base')
    moved = distance(a, {k: start[k] for k in a})
    assert moved > 1e-3 and distance(a, b) < 1e-3 * moved
    for x, y in zip(one, lines(tmp_path / 'two' / 'log.jsonl'), strict=True):
        assert abs(x['reward'] - y['reward']) < 1e-5 and x['caption_len'] == y['caption_len'], 'the same images, tokens and start noise'


def test_sigterm_on_one_rank_stops_saves_and_exits_0_on_all(tmp_path):
    run = run_of(tmp_path, 'cold_start', steps=100000)
    wait_for_lines(tmp_path / 'run' / 'log.jsonl', 1, run)
    ranks = subprocess.run(['pgrep', '-P', str(run.pid)], capture_output=True, text=True).stdout.split()
    start = time.time()
    os.kill(int(ranks[1]), signal.SIGTERM)
    said = run.communicate(timeout=60)[0]
    assert time.time() - start < 20
    assert run.returncode == 0 and [(tmp_path / f'code{r}').read_text() for r in range(2)] == ['0', '0'], said[-2000:]
    assert said.count('SIGTERM: stopped after update') == 1, 'one rank says so'
    done = len(lines(tmp_path / 'run' / 'log.jsonl'))
    state = torch.load(tmp_path / 'run' / f'step_{done:06d}' / 'state.pt', weights_only=True)
    assert 0 < done < 100000 and state['step'] == done, 'the last finished update is the one that was saved'


def test_a_restart_goes_on_from_the_newest_checkpoint(tmp_path):
    run = run_of(tmp_path, 'cold_start', '--save_every=1', '--resume', steps=4, die=2, restarts=1)
    said = run.communicate(timeout=240)[0]
    assert run.returncode == 0, said[-3000:]
    assert [line['step'] for line in lines(tmp_path / 'run' / 'log.jsonl')] == [0, 1, 2, 3]
    assert (tmp_path / 'run' / 'step_000004').exists()
    whole = tiny('cold_start', tmp_path / 'whole', steps=4)
    for x, y in zip(whole, lines(tmp_path / 'run' / 'log.jsonl'), strict=True):
        assert abs(x['reward'] - y['reward']) < 1e-3, 'it went on, and did not start again'


def test_a_rank_that_dies_takes_the_run_down(tmp_path):
    run = run_of(tmp_path, 'cold_start', '--save_every=1', steps=4, die=2, always=True)
    said = run.communicate(timeout=240)[0]
    assert run.returncode != 0 and 'exitcode: 7' in said.replace('exitcode  : 7', 'exitcode: 7'), said[-3000:]
    assert (tmp_path / 'run' / 'step_000002').exists() and not (tmp_path / 'run' / 'step_000003').exists()
