"""How the tests compare two runs: plain gradient descent, logs without the clock, two ranks."""
import math
import socket

import torch

from lib import optimiser
from running import distance, lines, python, weights

BASE = 'data/shapes/base'
CLOCK = ('sec', 'peak_gb')


def plain_descent(monkeypatch):
    """Plain gradient descent in the place of AdamW, without clipping.

    AdamW divides a gradient by its own size, so rounding noise in an entry that should be 0
    becomes a step of a whole lr. After plain descent the weights tell the gradient, its scale
    included.
    """
    def descent(params, lr, **other):
        return torch.optim.SGD(params, lr=lr)

    monkeypatch.setattr(torch.optim, 'AdamW', descent)
    monkeypatch.setattr(optimiser, 'GRAD_CLIP', math.inf)


def timeless(log):
    """The lines of a log without what a clock says."""
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in log]


def timeless_log(out_dir):
    return timeless(lines(out_dir / 'log.jsonl'))


def without_step(line):
    """What an evaluation found, without the update it was made at."""
    return {key: value for key, value in line.items() if key != 'step'}


def moved_from_base(trained):
    """How far trained weights are from the shipped base."""
    start = weights(BASE)
    # a text encoder that stands still has no name of its own there
    known = [name for name in trained if name in start]
    return distance({name: trained[name] for name in known}, {name: start[name] for name in known})


def check_same_training(one, other):
    """Two checkpoints hold the same weights, up to a thousandth of what the training moved."""
    a = weights(one)
    b = weights(other)
    moved = moved_from_base(a)
    assert moved > 1e-3, 'else equality says nothing'
    assert distance(a, b) < 1e-3 * moved


def optimizer_state(folder):
    """The state.pt of a checkpoint folder."""
    return torch.load(folder / 'state.pt', weights_only=True)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def on_two_ranks(*command):
    """Runs a driver with its arguments under torchrun, two ranks on this machine."""
    launcher = ['-m', 'torch.distributed.run', '--nproc_per_node=2']
    return python(*launcher, f'--master_port={free_port()}', *command)
