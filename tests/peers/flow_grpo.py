"""Stage 3 beside Flow-GRPO's step, our own plain re-statement of it: python bench.py --peer=flow_grpo."""
import torch

import bench
import common
import grpo_decoder
import model


def step(m):
    """The same step as Flow-GRPO does it, a plain re-statement: every trained step replayed and back-propagated by itself, in one forward pass of 2B
    rows for both branches of the guidance, the unconditional half with its gradient and then detached, and another pass of the
    reference. Its rollout runs the networks as often as ours, so that is shared; `dit` is the decoder's time in the rollout and the whole update."""
    c, (noisy, trained), sig = m.c, grpo_decoder.window(0, m.c), m.uae.sigmas(m.c.sample_steps)
    parts = [grpo_decoder.rollout(m.uae, m.tower, m.x[i], m.index[i], 0, c, m.neg) for i in common.image_slices(len(m.x), m.G, c.micro_batch)]
    cond, z, z_next, *_, old_logp, r, _ = (torch.cat(t) for t in zip(*parts))
    adv = grpo_decoder.group_advantage(r).flatten()
    yield 'rollout'

    def replay(uae, j):
        s = sig[noisy[0] + j]
        if c.guidance == 1.0:
            v = uae.velocity(z[:, j], s, cond)
        else:
            v0, v = uae.velocity(torch.cat([z[:, j], z[:, j]]), s, torch.cat([m.neg.expand_as(cond), cond])).chunk(2)
            v = v0.detach() + c.guidance * (v - v0.detach())
        return model.sde_step(z[:, j], v, s, sig[noisy[0] + j + 1], c.sde, c.noise_level, z_next=z_next[:, j])

    for j in trained:
        _, logp, mean, std = replay(m.uae, j)
        loss, _ = grpo_decoder.policy_loss(logp[:, None], old_logp[:, j:j + 1], adv, clip=c.clip_range)
        if c.kl:
            with torch.no_grad():
                ref_mean = replay(m.ref, j)[2]
            loss = loss + c.kl * grpo_decoder.kl_gauss(mean, ref_mean, std)
        (loss / len(trained)).backward()
    yield 'update'


def gradients_differ(m, *steps):
    """Relative Euclidean distance of the gradients that two ways of a step leave behind."""
    grads = []
    for way in steps:
        bench.measure(m, way)
        grads.append(torch.cat([p.grad.flatten().double() for p in m.params if p.grad is not None]))
    return ((grads[0] - grads[1]).norm() / grads[1].norm()).item()


def compare(b, words):
    """Stage 3 beside Flow-GRPO's step: the same numbers (CFG 4.5, 10 steps, 9 trained, KL), and the fast setting (no CFG, no KL, 3 of 3)."""
    bench.STEPS['flow_grpo'] = step
    slow = dict(sample_steps=10, guidance=4.5, sde_window=9, train_steps=9, kl=0.04)
    ours = bench.prepare(b, 'grpo_decoder', words, **slow)
    fast = bench.prepare(b, 'grpo_decoder', words, sample_steps=10, guidance=1.0, sde_window=3, train_steps=3)
    out = bench.in_turn({'flow_grpo': (ours, 'flow_grpo'), 'ours': (ours, None), 'ours, fast': (fast, None), 'flow_grpo, fast': (fast, 'flow_grpo')}, b.steps)
    out = {name: {k: row[k] for k in ('rollout', 'update', 'total', 'vae', 'reward')} | {'dit': row['rollout dit'] + row['update']} for name, row in out.items()}
    base = out['flow_grpo']
    for name in ('ours', 'ours, fast'):
        out[f'speed-up, {name}'] = {k: base[k] / out[name][k] for k in base}
    differ = gradients_differ(ours, 'grpo_decoder', 'flow_grpo')
    bench.table(f'Flow-GRPO, {len(ours.x)} images x {ours.G}, 10 steps', out)
    print(f'relative difference of the gradients {differ:.1e}')
    return dict(out, gradients_differ_by=differ)
