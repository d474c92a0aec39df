"""What the tests of whole scripts share: runs in this process, and runs in processes of their own.

The latter may be killed or refused.
"""
import json
import math
import operator
import os
import runpy
import subprocess
import sys
import types

import torch
from safetensors.torch import load_file

import reward
from lib import checkpoint
from lib.optimiser import Optimiser

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


class Recorder:
    """Watches a stage that runs in this process: functions that every stage calls report to it.

    uae, before: the model as it was opened, and its weights then. towers: [(image tower, its
    weights)]. passes: [(part, training, autograd on, rows)], the forward passes of PARTS since the
    last update. updates: of each its weights `before` and `after`, `grads`, `passes`, the ids of
    what is `optimised`, and the log fields `taken`. spoil: the number of an update whose gradients
    are made non-finite.
    """
    PARTS = ('encoder.language_model', 'encoder.vlm.model.visual', 'decoder.transformer',
             'decoder.vae.encoder', 'decoder.vae.decoder')

    def __init__(self, monkeypatch, spoil=None):
        self.towers, self.passes, self.updates = [], [], []
        open_uae, step = checkpoint.open_uae, Optimiser.step
        open_tower = reward.Backbone.__init__

        def opened(*args, **options):
            self.uae = open_uae(*args, **options)
            self.before = state_of(self.uae)
            for part in self.PARTS:
                module = operator.attrgetter(part)(self.uae)
                module.register_forward_pre_hook(self.hook(part), with_kwargs=True)
            return self.uae

        def opened_tower(tower, *args):
            open_tower(tower, *args)
            self.towers.append((tower, state_of(tower)))

        def watched_step(optimiser, number):
            update = types.SimpleNamespace(before=state_of(self.uae), passes=self.passes)
            self.passes = []
            self.updates.append(update)
            if spoil == len(self.updates) - 1:
                optimiser.params[0].grad.mul_(math.inf)
            update.grads = {name: p.grad.clone() for name, p in self.uae.named_parameters()
                            if p.grad is not None}
            groups = optimiser.adamw.param_groups
            update.optimised = {id(p) for group in groups for p in group['params']}
            update.taken = step(optimiser, number)
            update.after = state_of(self.uae)
            return update.taken

        monkeypatch.setattr(checkpoint, 'open_uae', opened)
        monkeypatch.setattr(Optimiser, 'step', watched_step)
        monkeypatch.setattr(reward.Backbone, '__init__', opened_tower)

    def hook(self, part):
        def note(module, args, kwargs):
            first = next(iter((*args, *kwargs.values())))
            self.passes.append((part, module.training, torch.is_grad_enabled(), len(first)))
        return note

    def back_to(self, update):
        """Gives the model the weights that an update began with, and no gradients."""
        self.uae.load_state_dict(update.before)
        self.uae.zero_grad()


def state_of(module):
    """A copy of its weights."""
    return {name: value.clone() for name, value in module.state_dict().items()}


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
