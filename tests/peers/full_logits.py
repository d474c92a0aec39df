"""Stage 2's caption log-prob beside the plain way, all logits at once.

    python tests/peers/full_logits.py --batch=2 --group=4

Takes the keys of grpo_encoder.py.
"""
import itertools
import os
import sys

import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
os.chdir(ROOT)
import grpo_encoder
from bench.speed import seconds, table
from config import parse
from encoder import token_logp

V = 151936                      # tokens of the real vocabulary
d = 128


def peak(call, device):
    """Most bytes of tensors that `call` holds at once beyond what is held before it."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    changes = []
    for event in profile.profiler.kineto_results.events():
        if event.name() == '[memory]':
            changes.append((event.start_ns(), event.nbytes()))
    return max(itertools.accumulate(nbytes for _, nbytes in sorted(changes)))


def naive_logp(h, head, y, temperature, forbidden):
    logits = (head(h) / temperature).masked_fill(forbidden, float('-inf'))
    return F.log_softmax(logits, -1).gather(-1, y[..., None])[..., 0]


WAYS = dict(token_logp=token_logp, naive=naive_logp)


def compare(argv):
    """Peak of the caption log-prob and its gradient on rows of the stage, V = 152k."""
    config = parse(grpo_encoder.keys, grpo_encoder.own_presets, argv, __file__)
    B, T = config.batch * config.group, config.caption_len
    head = torch.nn.Linear(d, V, bias=False)
    states = torch.randn(B, T, d)
    y = torch.randint(V, (B, T))
    forbidden = torch.arange(V) >= V - 300
    out = {}
    gradients = {}
    for name, way in WAYS.items():
        h = states.clone().requires_grad_()
        head.weight.grad = torch.zeros_like(head.weight)
        took = []

        def logp_and_gradient():
            logp = way(h, head, y, config.temperature, forbidden)
            logp.clamp(min=-100).mean().backward()

        def timed():
            took.append(seconds(logp_and_gradient))

        out[f'{name} bytes'] = peak(timed, h.device)
        out[f'{name} seconds'] = took[0]
        gradients[name] = torch.cat([h.grad.flatten(), head.weight.grad.flatten()])

    out['ratio'] = out['token_logp bytes'] / out['naive bytes']
    ours, naive = gradients['token_logp'], gradients['naive']
    out['gradients differ by'] = ((ours - naive).norm() / naive.norm()).item()
    title = f'caption log-prob, {B} x {T} tokens, V = {V}, d = {d}'
    table(title, {name: {'': value} for name, value in out.items()})
    return out


if __name__ == '__main__':
    compare(sys.argv[1:])
