"""What the tests of whole scripts share: runs in this process, and runs in processes of their own.

The latter may be killed or refused.
"""
import json
import math
import os
import runpy
import subprocess
import sys
import types

import torch
from safetensors.torch import load_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STAGES = ('cold_start', 'grpo_encoder', 'grpo_decoder')
UNTRAINED = ('eval_unified', 'eval_t2i', 'sample')         # scripts that make no updates
ALONE = types.SimpleNamespace(rank=0, world=1, device='cpu', master=True)       # as ranks.start


def arguments(name, out_dir, *extra, steps=2, images=2):
    """The command line of a tiny run.

    Temperature 3, so that the captions of a group differ whatever the shipped base is; no warm-up,
    so that the first update moves something.
    """
    own = dict(
        cold_start=[f'--batch={images}'],
        grpo_encoder=[f'--batch={images}', '--group=2', '--temperature=3'],
        grpo_decoder=[f'--batch={images}', '--group=2', '--warmup=0'],
        pretrain_decoder=[f'--batch={images}'],
        reca=[f'--batch={images}'],
    )
    every = ['--eval_images=4', '--eval_every=0', '--device=cpu', f'--out_dir={out_dir}']
    if name not in UNTRAINED:
        every.append(f'--steps={steps}')
    return every + own.get(name, []) + list(extra)


def script(name, *argv):
    """Runs ROOT/name.py in this process as `python name.py *argv` would; returns its globals."""
    old = sys.argv
    sys.argv = [f'{name}.py', *map(str, argv)]
    try:
        return runpy.run_path(os.path.join(ROOT, f'{name}.py'), run_name='__main__')
    finally:
        sys.argv = old


def tiny(name, out_dir, *extra, **how):
    """script(name) with the arguments of a tiny run; returns the lines of its log."""
    script(name, *arguments(name, out_dir, *extra, **how))
    return lines(f'{out_dir}/log.jsonl')


def lines(path):
    """Objects of a .jsonl file; a number that is not finite is a failure."""
    def number(text):
        raise AssertionError(f'{text} in {path}')

    with open(path) as f:
        return [json.loads(line, parse_constant=number) for line in f]


def refusal(call, *args):
    """The one line with which a run refuses its input: no traceback, an exit code that is not 0."""
    try:
        call(*args)
    except SystemExit as e:
        assert isinstance(e.code, str), f'exit code {e.code!r} and no message'
        assert e.code and '\n' not in e.code.strip(), e.code
        return e.code
    raise AssertionError('the run was not refused')


def weights(folder):
    """{name: tensor} of every safetensors file below a checkpoint folder."""
    out = {}
    for path, _, names in os.walk(folder):
        for name in names:
            if not name.endswith('.safetensors'):
                continue
            file = os.path.join(path, name)
            place = os.path.relpath(file, folder)
            for key, value in load_file(file).items():
                out[f'{place}:{key}'] = value.float()       # the base is shipped in 16 bits
    assert out, f'no weights in {folder}'
    return out


def distance(a, b):
    """Euclidean distance of two dicts of tensors with the same names."""
    assert a.keys() == b.keys()
    squares = [(a[name].double() - b[name].double()).square().sum().item() for name in a]
    return math.sqrt(sum(squares))


def same(a, b):
    """Bitwise equality of nested dicts, lists, tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def python(*argv, timeout=900):
    """A python process in ROOT on one thread; returns it with its output."""
    env = dict(
        os.environ,
        OMP_NUM_THREADS='1',
        PYTHONPATH=ROOT,
        OMP_WAIT_POLICY='PASSIVE',
        CUDA_VISIBLE_DEVICES='',
    )
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=env,
        timeout=timeout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
