"""tools/report.py: the page about runs, from made-up runs, read in a browser where there is one."""
import json
import os
import random

import numpy as np
import pytest
from PIL import Image

from data.shapes import scenes as world
from tools import report

STAGES = ('cold_start', 'grpo_encoder', 'grpo_decoder')
HOSTILE = '<script>document.title = "hacked"</script>'


# --- made-up runs -------------------------------------------------------------------------------
def save(folder, name, scene, noise, rng):
    """A scene's picture with some noise, as PNG."""
    pixels = world.draw(scene) + rng.normal(0, 255 * noise, (32, 32, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(f'{folder}/samples/{name}')
    return f'samples/{name}'


def append(folder, name, value):
    with open(f'{folder}/{name}.jsonl', 'a') as f:
        f.write(json.dumps(value) + '\n')


def member(place, rng):
    """What every attempt of a group has."""
    return dict(reward=0.5 + place / 10, adv=(place - 1.5) / 1.1,
                logp=[float(value) for value in -rng.exponential(1, 6)])


def make_groups(folder, script, step, scene, rng):
    """One opened group of four attempts."""
    source = save(folder, f'group_{step:06d}.png', scene, 0, rng)
    members = []
    for place in range(4):
        attempt = member(place, rng)
        if script == 'grpo_encoder':
            words = world.terse(scene, 0.2 + place / 4, rng).split()
            attempt['tokens'] = [f' {word}' for word in words]
            attempt['caption'] = ' '.join(words)
            attempt['logp'] = [float(value) for value in -rng.exponential(1, len(words))]
        else:
            name = f'group_{step:06d}_{place:02d}.png'
            attempt['image'] = save(folder, name, scene, 0.3 - place / 20, rng)
        members.append(attempt)
    line = dict(step=step, kind='captions', source=source, members=members)
    if script == 'grpo_decoder':
        line.update(kind='drawings', caption=world.caption(scene))
    append(folder, 'groups', line)


def make_run(folder, script, steps=(0, 20, 40), watch=8, start=0.0):
    """A run folder as the contract of its files has it; skill goes from `start` up by a third."""
    os.makedirs(f'{folder}/samples', exist_ok=True)
    rng = np.random.default_rng(len(script))
    scenes = [world.random_scene(np.random.default_rng(row)) for row in range(watch)]
    for step in steps:
        skill = start + 0.3 * step / max(*steps, 1)
        evaluation = dict(step=step, reward=0.5 + skill / 2, judge=0.45 + skill / 2, mse=0.1,
                          caption_len=6 + 9 * skill)
        for name in ('caption_truth', 'caption_recall', 'greedy_caption_truth',
                     'greedy_caption_recall', 't2i_own', 't2i_true'):
            evaluation[name] = 0.3 + 0.6 * skill + 0.1 * rng.random()
        append(folder, 'eval', evaluation)
        for row, scene in enumerate(scenes):
            caption = world.terse(scene, 0.2 + 0.8 * skill, np.random.default_rng(row))
            false = [phrase.strip() for phrase in caption.strip(' .').split(',')][:row % 2]
            append(folder, 'samples', dict(
                step=step, row=row, name=f'scene {row}', caption=caption,
                caption_len=len(caption.split()), reward=0.5 + skill / 2, judge=0.4, mse=0.05,
                source=save(folder, f'source_{row:03d}.png', scene, 0, rng),
                image=save(folder, f'step_{step:06d}_{row:03d}.png', scene, 0.4 * (1 - skill), rng),
                truth=world.caption(scene), false=false))
        if step and script != 'cold_start':
            make_groups(folder, script, step, scenes[-1], rng)
    with open(f'{folder}/config.json', 'w') as f:
        changed = dict(init_from='out/before', lr=1e-4)
        json.dump(dict(script=script, changed=changed, config=dict(steps=max(steps))), f)


def make_demo(folder, **how):
    for place, script in enumerate(STAGES):
        make_run(f'{folder}/{script}', script, start=place / 3, **how)
    scores = dict(reward=0.5, judge=0.4, t2i_own=0.5)
    table = dict(stages=dict(base=scores, cold_start=scores, grpo_encoder=scores,
                             grpo_decoder=scores),
                 ceiling=dict(reward=0.99, judge=0.98, t2i=0.997), controls={})
    with open(f'{folder}/report.json', 'w') as f:
        json.dump(table, f)
    return str(folder)
