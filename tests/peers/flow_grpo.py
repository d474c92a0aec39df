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
from bench.speed import Run, clock, medians, parse, table, write_report
from decoder import sde_step

PRINTED = ('rollout', 'update', 'total', 'vae', 'reward', 'dit')


def replay(run, decoder, sampled, j, number):
    """The j-th stored step, the number-th of all, by itself: z_next, logp (B,), mean, std.

    One forward pass of 2B rows for both branches of the guidance; the unconditional half has a
    gradient too, and is then detached.
    """
    config = run.config
    *_, negative = run.rollout.args
    z, z_next, c = sampled['z'][:, j], sampled['z_next'][:, j], sampled['c']
    sigmas = decoder.sigmas(config.denoise_steps)
    s, s_next = sigmas[number], sigmas[number + 1]
    if negative is None:
        v = decoder.velocity(z, s, c)
    else:
        both = torch.cat([negative.expand_as(c), c])
        v0, v = decoder.velocity(torch.cat([z, z]), s, both).chunk(2)
        v = v0.detach() + config.guidance * (v - v0.detach())
    return sde_step(z, v, s, s_next, config.sde, config.noise_level, z_next=z_next)


def update(run, sampled, r):
    """Every trained step replayed and back-propagated by itself, and again by the reference."""
    config, decoder = run.config, run.uae.decoder
    adv = grpo_decoder.group_advantage(r).flatten()
    step = run.rollout.args[3]
    _, trained = grpo_decoder.window(step, config, decoder.sigmas(config.denoise_steps))
    for j, number in enumerate(trained):
        _, logp, mean, std = replay(run, decoder, sampled, j, number)
        old_logp = sampled['recorded'][:, j:j + 1]
        loss, _ = grpo_decoder.policy_loss(logp[:, None], old_logp, adv, clip=config.clip_range)
        if config.kl:
            with torch.no_grad():
                _, _, ref_mean, _ = replay(run, run.reference.decoder, sampled, j, number)
            loss = loss + config.kl * grpo_decoder.kl_gauss(mean, ref_mean, std)
        (loss / len(trained)).backward()


class Beside(Run):
    """Our updates, and after each one Flow-GRPO's. The learning rate is 0: the weights are alike.

    The rollout runs the networks as often as ours, so that is shared; `dit` is the decoder's time
    in the rollout and the whole update.
    """

    def __init__(self, argv, options, **changes):
        self.theirs = []
        super().__init__('grpo_decoder', argv, options, denoise_steps=10, lr=0.0, **changes)

    def gradient(self):
        return torch.cat([p.grad.flatten().double() for p in self.params if p.grad is not None])

    def trained(self):
        self.ours = self.gradient()

    def after(self, turn):
        turn['dit'] = turn['rollout dit'] + turn['update']
        self.spent.clear()
        self.mark = clock()
        sampled, r, _ = self.rollout()
        self.end('rollout')
        dit = self.spent['dit']
        update(self, sampled, r)
        self.end('update')
        spent = self.spent
        self.theirs.append(dict(spent, total=spent['rollout'] + spent['update'],
                                dit=dit + spent['update']))
        theirs = self.gradient()
        self.differ = ((self.ours - theirs).norm() / theirs.norm()).item()
        for p in self.params:
            p.grad = None


def compare(options, argv):
    """The same numbers (CFG 4.5, 10 steps, 9 trained, KL), and the fast setting (no CFG, no KL,
    3 of 3)."""
    slow = Beside(argv, options, guidance=4.5, noisy_steps=9, trained_steps=9, kl=0.04)
    fast = Beside(argv, options, guidance=1.0, noisy_steps=3, trained_steps=3)
    sides = {'flow_grpo': slow.theirs, 'ours': slow.turns, 'ours, fast': fast.turns,
             'flow_grpo, fast': fast.theirs}
    out = {}
    for name, turns in sides.items():
        spent = medians(turns)
        out[name] = {part: spent[part] for part in PRINTED}
    for name in ('ours', 'ours, fast'):
        out[f'speed-up, {name}'] = {part: out['flow_grpo'][part] / out[name][part]
                                    for part in PRINTED}
    table(f'Flow-GRPO, {slow.P} images x {slow.G}, 10 steps', out)
    print(f'relative difference of the gradients {slow.differ:.1e}')
    return dict(out, gradients_differ_by=slow.differ)


def main(argv):
    options, of_stages = parse(argv, __file__)
    write_report(options, argv, compare(options, of_stages))


if __name__ == '__main__':
    main(sys.argv[1:])
