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
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from data.shapes import scenes as world

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


def splits(train=16384, held_out=256, seed=0):
    """(train edits, held-out edits), these of the world's held-out scenes and combinations.

    No training edit has one of the scenes, before or after.
    """
    rng = np.random.default_rng([seed, 22])
    kept_apart, found = [], []
    for scene in world.splits()[1] * 2:
        edit = random_edit(scene, rng)
        while not is_held_out(edit):
            edit = random_edit(scene, rng)
        kept_apart.append(edit)
    kept_apart = kept_apart[:held_out]
    avoid = {scene for edit in kept_apart for scene in edit[:2]}
    while len(found) < train:
        edit = random_edit(world.random_scene(rng), rng)
        if not is_held_out(edit) and avoid.isdisjoint(edit[:2]):
            found.append(edit)
    return found, kept_apart


def write(root, **sizes):
    """Makes root/{train,held_out}/*.png and root/edits.jsonl, a line an edit -> its path."""
    lines = []
    for split, edits in zip(world.SPLITS, splits(**sizes)):
        os.makedirs(f'{root}/{split}', exist_ok=True)
        for i, edit in enumerate(edits):
            row = dict(source=f'{split}/{i:05d}.source.png', image=f'{split}/{i:05d}.png',
                       caption=edit.instruction, answer=world.caption(edit.target))
            lines.append(json.dumps(row) + '\n')
            for name, scene in (('source', edit.source), ('image', edit.target)):
                Image.fromarray(world.draw(scene)).save(f'{root}/{row[name]}', compress_level=1)
    Path(f'{root}/edits.jsonl').write_text(''.join(lines))
    return f'{root}/edits.jsonl'


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


def edit_scores(images, edits):
    """Drawings (B, 3, 32, 32) in [-1, 1] of edits -> {"edited", "kept", "outside"}, floats.

    The shares are pooled over edits.
    """
    asked = common = changed = kept = 0
    for reading, edit in zip(world.read(images), edits, strict=True):
        before, after = facts(edit.source).items(), facts(edit.target).items()
        seen = facts(reading).items()
        asked += len(after - before)
        common += len(after & before)
        changed += len((after - before) & seen)
        kept += len(after & before & seen)
    return dict(edited=changed / asked, kept=kept / common, outside=outside(images, edits))


def outside(images, edits):
    """Mean squared error in the cells that the instructions do not name, of edits that name one."""
    wanted = world.pixels([edit.target for edit in edits])
    errors = (np.asarray(images, dtype=np.float32) - wanted) ** 2
    means = []
    for error, edit in zip(errors, edits):
        if edit.cell:
            row, column = divmod(world.CELLS.index(edit.cell), 2)
            cells = error.reshape(3, 2, world.CELL, 2, world.CELL).mean((0, 2, 4))
            means.append((cells.sum() - cells[row, column]) / 3)
    return float(np.mean(means))
