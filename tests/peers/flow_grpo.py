"""Stage 3 beside Flow-GRPO's step, our own plain re-statement of it.

    python tests/peers/flow_grpo.py --batch=4 --group=8

Takes the keys of bench/speed.py and of grpo_decoder.py.
"""
import os
import sys

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
os.chdir(ROOT)
import grpo_decoder
from bench.speed import parse, table, write_report
from bench.steps import Stage, decoder_rollout, in_turn, measure
from decoder import sde_step

PRINTED = ('rollout', 'update', 'total', 'vae', 'reward')


def replay(stage, decoder, batch, j, number):
    """The j-th stored step, the number-th of all, by itself: z_next, logp (B,), mean, std.

    One forward pass of 2B rows for both branches of the guidance; the unconditional half has a
    gradient too, and is then detached.
    """
    c, cond = stage.config, batch['c']
    z, z_next = batch['z'][:, j], batch['z_next'][:, j]
    sigmas = decoder.sigmas(c.denoise_steps)
    s, s_next = sigmas[number], sigmas[number + 1]
    if c.guidance == 1.0:
        v = decoder.velocity(z, s, cond)
    else:
        both = torch.cat([stage.negative.expand_as(cond), cond])
        v0, v = decoder.velocity(torch.cat([z, z]), s, both).chunk(2)
        v = v0.detach() + c.guidance * (v - v0.detach())
    return sde_step(z, v, s, s_next, c.sde, c.noise_level, z_next=z_next)


def step(stage):
    """Every trained step replayed and back-propagated by itself, and again by the reference.

    The rollout runs the networks as often as ours, so that is shared; `dit` is the decoder's time
    in the rollout and the whole update.
    """
    c = stage.config
    batch, trained = decoder_rollout(stage)
    yield 'rollout'

    for j, number in enumerate(trained):
        _, logp, mean, std = replay(stage, stage.uae.decoder, batch, j, number)
        old_logp = batch['recorded'][:, j:j + 1]
        loss, _ = grpo_decoder.policy_loss(logp[:, None], old_logp, batch['adv'],
                                           clip=c.clip_range)
        if c.kl:
            with torch.no_grad():
                _, _, ref_mean, _ = replay(stage, stage.reference.decoder, batch, j, number)
            loss = loss + c.kl * grpo_decoder.kl_gauss(mean, ref_mean, std)
        (loss / len(trained)).backward()
    yield 'update'


def gradients_differ(stage):
    """Relative Euclidean distance of the gradients that our step and Flow-GRPO's leave."""
    found = []
    for way in (None, step):
        measure(stage, way)
        gradients = [p.grad.flatten().double() for p in stage.params if p.grad is not None]
        found.append(torch.cat(gradients))
    ours, theirs = found
    return ((ours - theirs).norm() / theirs.norm()).item()


def compare(options, argv):
    """The same numbers (CFG 4.5, 10 steps, 9 trained, KL), and the fast setting (no CFG, no KL,
    3 of 3)."""
    def open_stage(**changes):
        return Stage('grpo_decoder', argv, options.random, options.layers, denoise_steps=10,
                     **changes)

    slow = open_stage(guidance=4.5, noisy_steps=9, trained_steps=9, kl=0.04)
    fast = open_stage(guidance=1.0, noisy_steps=3, trained_steps=3)
    sides = {
        'flow_grpo': (slow, step),
        'ours': (slow, None),
        'ours, fast': (fast, None),
        'flow_grpo, fast': (fast, step),
    }
    out = {}
    for name, row in in_turn(sides, options.steps).items():
        out[name] = {part: row[part] for part in PRINTED}
        out[name]['dit'] = row['rollout dit'] + row['update']
    base = out['flow_grpo']
    for name in ('ours', 'ours, fast'):
        out[f'speed-up, {name}'] = {part: base[part] / out[name][part] for part in base}
    differ = gradients_differ(slow)
    table(f'Flow-GRPO, {len(slow.x)} images x {slow.G}, 10 steps', out)
    print(f'relative difference of the gradients {differ:.1e}')
    return dict(out, gradients_differ_by=differ)


def main(argv):
    options, of_stages = parse(argv, __file__)
    write_report(options, argv, compare(options, of_stages))


if __name__ == '__main__':
    main(sys.argv[1:])
