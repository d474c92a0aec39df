"""The tiny world: scene <-> caption <-> image, with an oracle that reads images back.

A scene is one to four objects in the 2x2 cells of a 32x32 picture, on a plain background.
Everything about it is known, so what a caption says and what a picture shows can be counted,
without a judge model:

    scene   Scene((Object("small", "red", "circle", "top-left"), ...), "gray")
    image   (32, 32, 3) uint8 from `draw`; (B, 3, 32, 32) float32 in [-1, 1] from `pixels`
    caption "small red circle top-left , large blue square bottom-right , gray background ."
            (at most 23 tokens)

`caption_scores` measures understanding (captions against scenes), `t2i` generation (images against
scenes).
"""

import json
import os
import shutil
import uuid
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

RESOLUTION = 32
CELL = RESOLUTION // 2
SIZES = {"small": 4, "large": 7}  # radius in pixels
COLOURS = {
    "red": (230, 20, 30), "green": (20, 190, 50), "blue": (30, 90, 255), "yellow": (255, 230, 30),
    "purple": (190, 40, 230), "orange": (255, 135, 0), "cyan": (0, 225, 235),
    "white": (255, 255, 255)}
SHAPES = ("circle", "square", "triangle", "cross")
CELLS = ("top-left", "top-right", "bottom-left", "bottom-right")  # in reading order
# Dark or dull, and named apart from every colour: no object can vanish into its background.
BACKGROUNDS = {
    "black": (0, 0, 0), "gray": (125, 125, 125), "navy": (0, 0, 110), "brown": (110, 65, 20)}
WORDS = (*SIZES, *COLOURS, *SHAPES, *CELLS, *BACKGROUNDS, "background", ",", ".")


class Object(NamedTuple):
    size: str
    colour: str
    shape: str
    cell: str


class Scene(NamedTuple):
    objects: tuple  # of Object, in reading order, at most one per cell
    background: str


VALUES = dict(size=SIZES, colour=COLOURS, shape=SHAPES, cell=CELLS)
ATTRIBUTE = {}                                          # "red" -> "colour"
for name, words in VALUES.items():
    for word in words:
        ATTRIBUTE[word] = name


def random_scene(rng):
    """One scene with a uniform number of objects; rng is a np.random.Generator."""
    def pick(words):
        return tuple(words)[rng.integers(len(words))]

    number = rng.integers(1, len(CELLS) + 1)
    objects = []
    for i in sorted(rng.choice(len(CELLS), size=number, replace=False)):
        objects.append(Object(pick(SIZES), pick(COLOURS), pick(SHAPES), CELLS[i]))
    return Scene(tuple(objects), pick(BACKGROUNDS))


# -----------------------------------------------------------------------------
# scene -> image

def silhouette(size, shape):
    """(16, 16) bool: the pixels of a cell that the object covers."""
    r = SIZES[size]
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    near = np.minimum(abs(x), abs(y))
    far = np.maximum(abs(x), abs(y))
    square = far <= r
    if shape == "circle":
        return np.hypot(x, y) <= 0.9 * r    # so that the small one, too, is far from its square
    if shape == "triangle":
        return square & (abs(x) <= (y + r) / 2)
    if shape == "cross":
        return square & (near <= r / 3)
    return square


# Every cell there can be, drawn once: 4 backgrounds x (64 looks + the empty cell).
LOOKS = {look: i for i, look in enumerate(product(SIZES, COLOURS, SHAPES))}
EMPTY = len(LOOKS)
DRAWINGS = np.zeros((len(BACKGROUNDS), len(LOOKS) + 1, CELL, CELL, 3), np.uint8)
for drawings, background in zip(DRAWINGS, BACKGROUNDS.values()):
    drawings[:] = background
    for (size, colour, shape), i in LOOKS.items():
        drawings[i][silhouette(size, shape)] = COLOURS[colour]


def draw(scene):
    """The scene's picture, (32, 32, 3) uint8."""
    looks = [EMPTY] * len(CELLS)
    for thing in scene.objects:
        looks[CELLS.index(thing.cell)] = LOOKS[thing[:3]]
    background = list(BACKGROUNDS).index(scene.background)
    cells = DRAWINGS[background, looks].reshape(2, 2, CELL, CELL, 3)
    return cells.swapaxes(1, 2).reshape(RESOLUTION, RESOLUTION, 3)


def pixels(scenes):
    """The scenes' pictures as the models see them, (B, 3, 32, 32) float32 in [-1, 1]."""
    pictures = np.stack([draw(scene) for scene in scenes]).transpose(0, 3, 1, 2)
    return pictures.astype(np.float32) / 127.5 - 1


# -----------------------------------------------------------------------------
# scene <-> caption

def caption(scene):
    """The full caption: every attribute of every object, then the background."""
    phrases = [" ".join(thing) for thing in scene.objects]
    phrases.append(f"{scene.background} background")
    return " , ".join(phrases) + " ."


def terse(scene, keep, rng, all_objects=False):
    """A caption that leaves things out.

    Each object, attribute and the background stays with probability `keep`; with all_objects every
    object is told of, in part. What it says is true, no phrase is empty or said twice, and it says
    something at any `keep`; keep=1 is `caption`.
    """
    def phrase(thing):
        kept = [word for word in thing if rng.random() < keep]
        if not kept:
            kept = [thing[rng.integers(len(thing))]]
        return " ".join(kept)

    phrases = []
    for thing in scene.objects:
        if all_objects or rng.random() < keep:
            phrases.append(phrase(thing))
    if rng.random() < keep:
        phrases.append(f"{scene.background} background")
    if not phrases:
        thing = scene.objects[rng.integers(len(scene.objects))]
        phrases = [phrase(thing)]
    distinct = dict.fromkeys(phrases)       # in order
    return " , ".join(distinct) + " ."


def parse_phrase(phrase):
    """'red circle' -> {"colour": "red", "shape": "circle"}; None where it does not parse.

    'gray background' -> {"background": "gray"}.
    """
    words = phrase.split()
    if len(words) == 2 and words[0] in BACKGROUNDS and words[1] == "background":
        return {"background": words[0]}
    stated = {ATTRIBUTE.get(word): word for word in words}  # an unknown word has the key None
    in_order = [name for name in Object._fields if name in stated]
    # nothing repeated, unknown or out of order
    well_formed = len(stated) == len(words) and list(stated) == in_order
    if words and well_formed:
        return stated
    return None


def parse(text):
    """Caption -> one entry per phrase: the attributes it states, None where it does not parse."""
    text = text.strip().removesuffix(".")
    if not text.strip():
        return []
    return [parse_phrase(phrase) for phrase in text.split(",")]


def holds(stated, scene):
    """Whether an object of the scene, or its background, has all that a parsed phrase states."""
    if "background" in stated:
        return stated["background"] == scene.background
    for thing in scene.objects:
        if stated.items() <= thing._asdict().items():
            return True
    return False


def false_phrases(text, scene):
    """The phrases of a caption that do not hold for its scene, or do not parse, as strings."""
    text = text.strip().removesuffix(".")
    found = []
    for phrase in text.split(","):
        stated = parse_phrase(phrase)
        if phrase.strip() and not (stated and holds(stated, scene)):
            found.append(phrase.strip())
    return found


def count_true(phrases, scene):
    """How many parsed phrases are true of the scene; said again, a phrase earns nothing."""
    distinct = {tuple(stated.items()) for stated in phrases if stated}
    return sum(holds(dict(stated), scene) for stated in distinct)


def count_facts(phrases, scene):
    """How many of the scene's 3 n + 1 facts are stated with their cell, and never contradicted."""
    said = {}           # (cell or None, attribute) -> every value the caption gives it
    for stated in filter(None, phrases):
        for name, value in stated.items():
            place = (stated.get("cell"), name)
            said.setdefault(place, set()).add(value)
    facts = {(None, "background"): scene.background}
    for thing in scene.objects:
        for name in ("size", "colour", "shape"):
            facts[thing.cell, name] = getattr(thing, name)
    return sum(said.get(place) == {value} for place, value in facts.items())


def caption_scores(texts, scenes):
    """Captions against their scenes -> {"len", "truth", "recall", "exact"}, floats.

    len     mean number of tokens
    truth   share of all phrases that hold; a repetition or a phrase that does not parse does not
    recall  share of all facts that are stated rightly: size, colour and shape of each cell's
            object, and the background
    exact   share of captions that are the full caption word for word

    Truth takes a phrase as it stands: were it made to name its cell, a caption would look truer
    merely for its length.
    """
    words = true = stated = phrases = facts = exact = 0
    for text, scene in zip(texts, scenes, strict=True):
        parsed = parse(text)
        words += len(text.split())
        phrases += len(parsed)
        true += count_true(parsed, scene)
        facts += 3 * len(scene.objects) + 1
        stated += count_facts(parsed, scene)
        exact += text.split() == caption(scene).split()
    return {"len": words / len(texts), "truth": true / max(phrases, 1), "recall": stated / facts,
            "exact": exact / len(texts)}


# -----------------------------------------------------------------------------
# image -> scene: the oracle

# every cell there can be, (4 * 65, 768) in [-1, 1]
CLEAN = DRAWINGS.reshape(-1, CELL * CELL * 3).astype(np.float32) / 127.5 - 1


def read(images):
    """What the pictures show: (B, 3, 32, 32) in [-1, 1], array or CPU tensor -> B Scenes.

    Each cell is read as the nearest of the 65 clean drawings, all four on the background that suits
    the picture best. A Scene may have no objects.
    """
    x = np.asarray(images, dtype=np.float32).reshape(-1, 3, 2, CELL, 2, CELL)
    x = x.transpose(0, 2, 4, 3, 5, 1)
    x = x.reshape(-1, CELL * CELL * 3)                  # (B * 4, 768), cells in reading order
    # |x - clean|^2, less |x|^2 which is the same for all
    distance = (CLEAN ** 2).sum(1) - 2 * x @ CLEAN.T
    distance = distance.reshape(-1, len(CELLS), len(BACKGROUNDS), len(LOOKS) + 1)
    backgrounds = distance.min(3).sum(1).argmin(1)      # (B,)
    names = list(BACKGROUNDS)
    looks = list(LOOKS)
    readings = []
    for cells, background in zip(distance, backgrounds):
        objects = []
        for i, cell in zip(cells[:, background].argmin(1), CELLS):
            if i != EMPTY:
                objects.append(Object(*looks[i], cell))
        readings.append(Scene(tuple(objects), names[background]))
    return readings


def t2i(images, scenes):
    """Share of what the scenes ask for that the oracle reads in the images: a float in [0, 1].

    Pooled over images. An object asks for four things (presence, size, colour, shape), an empty
    cell for one (stay empty), and the background is one more.
    """
    return t2i_of_readings(read(images), scenes)


def t2i_of_readings(readings, scenes):
    """`t2i` from what `read` returned."""
    right = total = 0
    for reading, scene in zip(readings, scenes, strict=True):
        found = {thing.cell: thing for thing in reading.objects}
        wanted = {thing.cell: thing for thing in scene.objects}
        right += reading.background == scene.background
        total += 1
        for cell in CELLS:
            if cell in wanted:
                # the fourth field is the cell itself: it agrees, and stands for presence
                right += sum(a == b for a, b in zip(found.get(cell, ()), wanted[cell]))
                total += 4
            else:
                right += cell not in found
                total += 1
    return right / total


def measures(records, scenes):
    """What lib.scores.Evaluator reports of this world: {name: float}.

    `caption_scores` of sampled and of greedy captions, and how much of its scene the oracle reads
    in an image (t2i) of the own caption and of the true one. records: the evaluator's, a dict each.
    """
    scenes = [scenes[record["row"]] for record in records]
    found = {}
    for prefix, field in (("caption_", "sampled"), ("greedy_caption_", "caption")):
        scores = caption_scores([record[field] for record in records], scenes)
        found.update({prefix + name: value for name, value in scores.items()})
    for name in ("own", "true"):
        readings = [record[f"read_{name}"] for record in records]
        found[f"t2i_{name}"] = t2i_of_readings(readings, scenes)
    return found


# -----------------------------------------------------------------------------
# data sets

SPLITS = ("train", "held_out")


def splits(seed=0, train=4096, held_out=256):
    """(train scenes, held-out scenes), all distinct.

    The held-out ones are drawn first: they do not depend on `train`.
    """
    rng = np.random.default_rng(seed)
    scenes = {}
    while len(scenes) < train + held_out:
        scenes[random_scene(rng)] = None
    scenes = list(scenes)
    return scenes[held_out:], scenes[:held_out]


def line_of(file, scene):
    """A scene's line of scenes.jsonl."""
    row = {"file": file, "background": scene.background,
           "objects": [thing._asdict() for thing in scene.objects], "caption": caption(scene)}
    return json.dumps(row) + "\n"


def write(root, seed=0, train=4096, held_out=256):
    """Makes root/train/*.png, root/held_out/*.png and root/scenes.jsonl, a line per image -> root.

    A folder that already holds these very scenes is left as it is. A new one is made beside its
    place and renamed, so a kill leaves no half folder under its name and of two writers one wins.
    """
    root = Path(root)
    files = {}
    for split, part in zip(SPLITS, splits(seed, train, held_out)):
        for i, scene in enumerate(part):
            files[f"{split}/{i:05d}.png"] = scene
    manifest = "".join(line_of(file, scene) for file, scene in files.items())

    def done():
        listed = root / "scenes.jsonl"
        return listed.is_file() and listed.read_text() == manifest

    if done():
        return root
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(f"{root} holds something other than these scenes: remove it or name "
                              "another folder")
    beside = root.with_name(f"{root.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        for split in SPLITS:
            (beside / split).mkdir(parents=True)
        for file, scene in files.items():
            Image.fromarray(draw(scene)).save(beside / file)
        (beside / "scenes.jsonl").write_text(manifest)
        os.rename(beside, root)
    except OSError:
        if not done():  # else another writer was first, with the same scenes
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return root


def load(root, split):
    """The scenes of "train" or "held_out" that `write` put in root, in the order of their files."""
    assert split in SPLITS, f"split is one of {SPLITS}, not {split!r}"
    scenes = []
    for line in (Path(root) / "scenes.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["file"].startswith(f"{split}/"):
            objects = tuple(Object(**thing) for thing in row["objects"])
            scenes.append(Scene(objects, row["background"]))
    return scenes
