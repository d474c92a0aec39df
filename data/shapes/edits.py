"""Edits of the embedded world: a source, an instruction and a target, and what an oracle counts.

The instructions are made of words that the tokenizer knows, none of which is a verb. An object is
named by its shape and cell, and what follows is what becomes of it:

    change      "circle top-left blue ."            a new size, colour or shape
    removal     "cross top-right background ."
    addition    "small red square bottom-right ."   into an empty cell
    background  "navy background ."

    fact        (place, attribute): value           of a scene, as many as `t2i` asks for
    edited      share of the facts that tell target from source which hold in a drawing
    kept        share of the facts that target and source have in common
    outside     squared error of a drawing in the three cells which the instruction does not name

A copy of the source has 0 edited and 1 kept.
"""
import argparse
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from data.shapes.demo import train              # first: it sets how threads wait
import numpy as np
import torch
from PIL import Image

import pretrain_decoder
import reca
from bench.summary import markdown
from config import parse
from data.shapes import scenes as world
from lib import ranks
from lib.checkpoint import open_uae
from lib.files import write_atomic, write_lines
from lib.scores import draw_edits

# --- script keys ---------------------------------------------------------------------------------
keys = dict(
    steps = 1800,              # updates of stage 0
    reca_steps = 64,           # updates of RecA from there
    edits = 16384,             # to learn from
    scenes = 256,              # held-out edits, one of each held-out scene
    seeds = 1,                 # whole runs, from --seed on; one takes about thirteen minutes
)
limits = dict(edits=(1, 1e6), scenes=(1, 256), seeds=(1, 100))
# -------------------------------------------------------------------------------------------------
WIRED = ('--condition=text+image', '--guidance=2.0')     # guidance is worth .02 of kept
KINDS = ('size', 'colour', 'shape', 'removal', 'addition', 'background')


class Edit(NamedTuple):
    source: world.Scene
    target: world.Scene
    instruction: str
    cell: str                   # that the instruction names, '' = none
    combination: tuple          # two words: what is changed, and what it becomes


# --- scene -> edit -------------------------------------------------------------------------------
def other(words, word, rng):
    """One of the words, but not that one."""
    left = [one for one in words if one != word]
    return left[rng.integers(len(left))]


def random_edit(scene, rng):
    """An edit of the scene, each of the kinds that it allows being equally likely."""
    kinds = list(KINDS)
    if len(scene.objects) == 1:
        kinds.remove('removal')             # a scene has an object
    if len(scene.objects) == len(world.CELLS):
        kinds.remove('addition')
    kind = kinds[rng.integers(len(kinds))]
    if kind == 'background':
        new = other(world.BACKGROUNDS, scene.background, rng)
        return Edit(scene, scene._replace(background=new), f'{new} background .', '',
                    (scene.background, new))
    if kind == 'addition':
        empty = set(world.CELLS) - {thing.cell for thing in scene.objects}
        look = list(world.LOOKS)[rng.integers(len(world.LOOKS))]
        new = world.Object(*look, sorted(empty)[rng.integers(len(empty))])
        return Edit(scene, with_objects(scene, [*scene.objects, new]), ' '.join(new) + ' .',
                    new.cell, (new.colour, new.shape))
    i = rng.integers(len(scene.objects))
    old = scene.objects[i]
    rest = [*scene.objects[:i], *scene.objects[i + 1:]]
    if kind == 'removal':
        return Edit(scene, with_objects(scene, rest), f'{old.shape} {old.cell} background .',
                    old.cell, (old.shape, old.cell))
    value = other(world.VALUES[kind], getattr(old, kind), rng)
    target = with_objects(scene, [*rest, old._replace(**{kind: value})])
    return Edit(scene, target, f'{old.shape} {old.cell} {value} .', old.cell, (old.shape, value))


def with_objects(scene, objects):
    """The scene with other objects, put in reading order."""
    objects = sorted(objects, key=lambda thing: world.CELLS.index(thing.cell))
    return scene._replace(objects=tuple(objects))


# --- data sets -----------------------------------------------------------------------------------
def is_held_out(edit):
    """One combination in five is never trained on, though each of its words is."""
    first, second = map(world.WORDS.index, edit.combination)
    return (first + second) % 5 == 0


def splits(train, held_out):
    """How many -> (edits to train on, held-out edits); the same for every number of the former.

    The held-out ones have a held-out combination, and each another of the world's held-out scenes.
    No training edit has one of their scenes, before or after.
    """
    rng = np.random.default_rng(22)
    apart, found = [], []
    for scene in world.splits()[1]:
        one = random_edit(scene, rng)
        while not is_held_out(one):
            one = random_edit(scene, rng)
        apart.append(one)
    avoid = {scene for one in apart for scene in (one.source, one.target)}
    while len(found) < train:
        one = random_edit(world.random_scene(rng), rng)
        if not is_held_out(one) and avoid.isdisjoint((one.source, one.target)):
            found.append(one)
    return found, apart[:held_out]


def write(root, *parts):
    """Edits to train on and held-out ones -> root/edits.jsonl, a line an edit, and its PNGs.

    `caption` is the instruction, `answer` the target's own caption.
    """
    lines = []
    for split, edits in zip(world.SPLITS, parts):
        for i, edit in enumerate(edits):
            row = dict(image=f'{split}/{i:05d}.png', source=f'{split}/{i:05d}.source.png',
                       caption=edit.instruction, answer=world.caption(edit.target))
            lines.append((row, edit))
    manifest = Path(root, 'edits.jsonl')
    text = ''.join(json.dumps(row) + '\n' for row, _ in lines)
    if manifest.exists() and manifest.read_text() == text:
        return manifest
    for split in world.SPLITS:
        os.makedirs(f'{root}/{split}', exist_ok=True)
    for row, edit in lines:
        Image.fromarray(world.draw(edit.source)).save(f'{root}/{row["source"]}', compress_level=1)
        Image.fromarray(world.draw(edit.target)).save(f'{root}/{row["image"]}', compress_level=1)
    manifest.write_text(text)                   # last: it says that all are there
    return manifest


# --- drawing -> numbers --------------------------------------------------------------------------
def facts(scene):
    """{(place, attribute): value}: each cell's emptiness, size, colour and shape, the background.
    """
    found = {('', 'background'): scene.background}
    for cell in world.CELLS:
        found[cell, 'object'] = False
    for thing in scene.objects:
        found[thing.cell, 'object'] = True
        for name in ('size', 'colour', 'shape'):
            found[thing.cell, name] = getattr(thing, name)
    return found


def count_facts(images, edits):
    """Drawings (n, 3, 32, 32) in [-1, 1] of n edits -> (n, 6): changed, asked; kept, common; the
    squared error of the cells outside, the number of these (0 where no cell is named)."""
    images = np.asarray(images, dtype=np.float32)
    counts = []
    for image, reading, edit in zip(images, world.read(images), edits, strict=True):
        before, after = facts(edit.source).items(), facts(edit.target).items()
        seen = facts(reading).items()
        asked, common = after - before, after & before
        error, cells = 0.0, 0
        if edit.cell:
            errors = cell_errors(image, edit.target)
            error, cells = sum(errors.values()) - errors[edit.cell], len(errors) - 1
        shown, kept = len(asked & seen), len(common & seen)
        counts.append([shown, len(asked), kept, len(common), error, cells])
    return np.array(counts, dtype=float)


def cell_errors(image, scene):
    """{cell: mean squared error} of an image (3, 32, 32) in [-1, 1]."""
    error = (image - world.pixels([scene])[0]) ** 2
    means = error.reshape(3, 2, world.CELL, 2, world.CELL).mean((0, 2, 4))
    return dict(zip(world.CELLS, means.flatten()))


def shares(counts):
    """(..., 6) as `count_facts` -> edited, kept, outside (3,), pooled over all edits."""
    sums = counts.reshape(-1, 6).sum(0)
    return sums[0::2] / sums[1::2]


# --- make edit -----------------------------------------------------------------------------------
def score(init_from, edits, config):
    """A checkpoint's drawings of edits -> `count_facts` of them."""
    settings = [f'--init_from={init_from}', f'--device={config.device}', *WIRED]
    own = parse({}, {}, settings, 'eval_t2i.py')
    uae = open_uae(own, ranks.start(own).device)
    drawn = []
    for start in range(0, len(edits), 64):
        rows = range(start, min(start + 64, len(edits)))
        source = torch.from_numpy(world.pixels([edits[i].source for i in rows]))
        drawn.append(draw_edits(uae, source, [edits[i].instruction for i in rows], rows).cpu())
    return count_facts(torch.cat(drawn), edits)


def train_both(config, manifest):
    """Stage 0 on edits, then RecA from there -> {script: its out_dir}."""
    edited, _ = train('pretrain_decoder', pretrain_decoder, config, [
        f'--data={manifest}', "--data_keys=('image', 'caption', '', 'source')",
        *WIRED, '--caption_every=0', f'--steps={config.steps}', '--batch=32', '--warmup=50',
        '--eval_every=0'])
    aligned, _ = train('reca', reca, config, [
        f'--init_from={edited}', f'--steps={config.reca_steps}', '--lambda_t2i=0',
        '--guidance=2.0', '--eval_every=0'])
    return dict(pretrain_decoder=edited, reca=aligned)


def with_error(table, rng, resamples=1000):
    """[(sign, counts (seeds, edits, 6))] -> the signed sum of their shares (3,), and its error.

    The error is the standard deviation over resamples of seeds and of edits, the same for all
    counts.
    """
    def total(seeds, edits):
        return sum(sign * shares(counts[seeds][:, edits]) for sign, counts in table)

    size = table[0][1].shape[:2]
    found = []
    for _ in range(resamples):
        found.append(total(*(rng.integers(n, size=n) for n in size)))
    return total(*map(np.arange, size)), np.std(found, 0)


def report(results, rng):
    """{name: counts (seeds, edits, 6)} -> the table, with RecA's difference as its last row."""
    rows = {name: [(1, counts)] for name, counts in results.items()}
    rows['reca - pretrain_decoder'] = [(1, results['reca']), (-1, results['pretrain_decoder'])]
    shown = {}
    for name, table in rows.items():
        cells = [f'{value:.3f} ± {error:.3f}' for value, error in zip(*with_error(table, rng))]
        shown[name] = dict(zip(('edited', 'kept', 'outside'), cells))
    return markdown('', shown)


def main(argv):
    config = parse(keys, {}, argv, __file__, limits)
    training, held_out = splits(config.edits, config.scenes)
    manifest = write(f'{config.out_dir}/data', training, held_out)
    copied = world.pixels([edit.source for edit in held_out])
    found = dict(copy=[count_facts(copied, held_out)], base=[score('', held_out, config)],
                 pretrain_decoder=[], reca=[])
    for seed in range(config.seed, config.seed + config.seeds):
        folder = f'{config.out_dir}/{seed}'
        own = argparse.Namespace(**dict(vars(config), seed=seed, out_dir=folder))
        for name, out in train_both(own, manifest).items():
            found[name].append(score(out, held_out, config))
            edited, kept, _ = shares(found[name][-1])
            print(f'seed {seed}, {name}: edited {edited:.3f}, kept {kept:.3f}', flush=True)
    results = {name: np.stack(counts) for name, counts in found.items()}
    text = report(results, np.random.default_rng(0))
    write_atomic(f'{config.out_dir}/table.md', lambda tmp: write_lines(tmp, [text]))
    print(f'\n{text}\n{config.seeds} seeds, {len(held_out)} held-out edits')


if __name__ == '__main__':
    main(sys.argv[1:])
