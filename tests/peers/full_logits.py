"""Stage 2's caption log-prob beside the plain way, all logits at once: python bench.py --peer=full_logits."""
import itertools

import torch
import torch.nn.functional as F

import bench
import model


def peak(call, device):
    """Most bytes of tensors that `call` holds at once beyond what is held before it."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = sorted((e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == '[memory]')
    return max(itertools.accumulate(nbytes for _, nbytes in events))


def compare(b, words):
    """Peak of the caption log-prob and its gradient, all logits at once against model.token_logp: rows of the stage, a vocabulary of 152k."""
    c = bench.prepare(b, 'grpo_encoder', words).c
    d, V, B = 128, 151936, c.prompts * c.group
    head = torch.nn.Linear(d, V, bias=False)
    h, y = torch.randn(B, c.caption_len, d), torch.randint(V, (B, c.caption_len))
    forbidden = torch.arange(V) >= V - 300
    out, grads = {}, {}

    def naive():
        logits = (head(h_) / c.temperature).masked_fill(forbidden, float('-inf'))
        return F.log_softmax(logits, -1).gather(-1, y[..., None])[..., 0]

    for name, way in (('token_logp', lambda: model.token_logp(h_, head, y, c.temperature, forbidden)), ('naive', naive)):
        h_, head.weight.grad = h.clone().requires_grad_(), torch.zeros_like(head.weight)
        took = []
        out[f'{name} bytes'] = peak(lambda: took.append(bench.seconds(lambda: way().clamp(min=-100).mean().backward())), h.device)
        out[f'{name} seconds'] = took[0]
        grads[name] = torch.cat([h_.grad.flatten(), head.weight.grad.flatten()])
    out['ratio'] = out['token_logp bytes'] / out['naive bytes']
    out['gradients differ by'] = ((grads['token_logp'] - grads['naive']).norm() / grads['naive'].norm()).item()
    bench.table(f'caption log-prob, {B} x {c.caption_len} tokens, V = {V}, d = {d}', {k: {'': v} for k, v in out.items()})
    return out
