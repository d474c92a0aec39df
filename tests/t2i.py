"""What the tests of the text-to-image benchmarks share."""
import json
import os
import types

from PIL import Image

import config
import eval_t2i
from bench import geneval, prompts
from data.shapes import scenes as world

SHAPES = prompts.shapes_prompts()
GOOD = dict(
    tag='counting',
    include=[{'class': 'dog', 'count': 2}],
    exclude=[{'class': 'dog', 'count': 3}],
    prompt='a photo of two dogs')


def keys_of(*argv, **more):
    """The keys of a run over one checkpoint, as main hands them on."""
    c = config.parse(eval_t2i.keys, eval_t2i.own_presets, argv, 'eval_t2i.py')
    return types.SimpleNamespace(**dict(vars(c), name='base', **more))


def scene_of(prompt):
    """The scene of a full caption."""
    *objects, background = world.parse(prompt)
    things = tuple(world.Object(**thing) for thing in objects)
    return world.Scene(things, background['background'])


def picture_of(prompt):
    return Image.fromarray(world.draw(scene_of(prompt)))


def seen(scene, meta):
    """What the oracle sees in the scene's picture."""
    return geneval.shapes_objects(Image.fromarray(world.draw(scene)), meta)


def contents(folder):
    """{path: bytes} of every file below a folder."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            with open(path, 'rb') as f:
                found[os.path.relpath(path, folder)] = f.read()
    return found


def read_json(path):
    with open(path) as f:
        return json.load(f)
