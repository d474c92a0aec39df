"""What the tests of whole scripts share: runs in this process, and runs in processes that may be killed or refused."""
import json
import math
import os
import runpy
import subprocess
import sys

import torch
from safetensors.torch import load_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STAGES = ('cold_start', 'grpo_encoder', 'grpo_decoder')
UNTRAINED = ('eval_unified', 'eval_t2i', 'sample')         # scripts that make no updates


def words(name, out_dir, *extra, steps=2, images=2):
    """The command line of a tiny run. A temperature of 3, so that the captions of a group differ whatever the shipped base is."""
    own = dict(cold_start=[f'--prompts={images}'], grpo_encoder=[f'--prompts={images}', '--group=2', '--temperature=3'],
               grpo_decoder=[f'--prompts={images}', '--group=2'], pretrain_decoder=[f'--batch={images}']).get(name, [])
    flags = ['--eval_images=4', '--eval_every=0', '--device=cpu', f'--out_dir={out_dir}']
    if name not in UNTRAINED:
        flags.append(f'--steps={steps}')
    return [*flags, *own, *extra]


def script(name, *argv):
    """Runs ROOT/name.py in this process as `python name.py *argv` would; returns its globals."""
    old = sys.argv
    sys.argv = [f'{name}.py', *map(str, argv)]
    try:
        return runpy.run_path(os.path.join(ROOT, f'{name}.py'), run_name='__main__')
    finally:
        sys.argv = old


def tiny(name, out_dir, *extra, **kw):
    """script(name) with the words of a tiny run; returns the lines of its log."""
    script(name, *words(name, out_dir, *extra, **kw))
    return lines(f'{out_dir}/log.jsonl')


def lines(path):
    """Objects of a .jsonl file; a number that is not finite is a failure."""
    def number(text):
        raise AssertionError(f'{text} in {path}')
    with open(path) as f:
        return [json.loads(line, parse_constant=number) for line in f]


def refusal(call, *args):
    """The one line with which a run refuses its input, without a traceback and with an exit code that is not 0."""
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
            if name.endswith('.safetensors'):
                file = os.path.join(path, name)
                out.update({f'{os.path.relpath(file, folder)}:{k}': v.float() for k, v in load_file(file).items()})      # the base is shipped in 16 bits
    assert out, f'no weights in {folder}'
    return out


def distance(a, b):
    """Euclidean distance of two dicts of tensors with the same names."""
    assert a.keys() == b.keys()
    return math.sqrt(sum((a[k].double() - b[k].double()).square().sum().item() for k in a))


def same(a, b):
    """Bitwise equality of nested dicts, lists, tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def python(*argv, timeout=300):
    """A python process in ROOT on one thread; returns it with its output."""
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=ROOT, OMP_WAIT_POLICY='PASSIVE', CUDA_VISIBLE_DEVICES='')
    return subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, env=env, timeout=timeout, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
