"""The tiny world: every count against a number worked out by hand, and the ways to cheat it."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from data.shapes import scenes as world
from data.shapes.scenes import Object, Scene
from data.shapes.scenes import caption, caption_scores, draw, parse, pixels, read, t2i, terse

RED = Object("small", "red", "circle", "top-left")
BLUE = Object("large", "blue", "square", "bottom-right")
TWO = Scene((RED, BLUE), "gray")  # 7 facts, 11 items for t2i
FULL = "small red circle top-left , large blue square bottom-right , gray background ."
TRAIN, HELD_OUT = world.splits(seed=0, train=512, held_out=256)


def score(text, scene=TWO):
    return caption_scores([text], [scene])


# --- scenes and pictures

def test_scenes_are_well_formed_and_varied():
    rng = np.random.default_rng(0)
    scenes = [world.random_scene(rng) for _ in range(2000)]
    for scene in scenes:
        places = [world.CELLS.index(thing.cell) for thing in scene.objects]
        assert places == sorted(set(places))
        assert scene.background in world.BACKGROUNDS
    counts = np.bincount([len(scene.objects) for scene in scenes], minlength=6)
    assert counts[0] == counts[5] == 0
    assert (counts[1:5] > 430).all()  # 500 each, give or take
    looks, grounds = set(), set()
    for scene in scenes:
        for thing in scene.objects:
            looks.add(thing[:3])
            grounds.add((thing.cell, scene.background))
    assert looks == set(world.LOOKS)
    assert len(grounds) == 16
    assert not world.BACKGROUNDS.keys() & world.COLOURS.keys()


def test_draw_puts_each_object_in_its_cell():
    image = draw(TWO)
    red = world.COLOURS["red"]
    blue = world.COLOURS["blue"]
    gray = world.BACKGROUNDS["gray"]
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    assert tuple(image[8, 8]) == red
    assert tuple(image[24, 24]) == blue
    assert tuple(image[8, 24]) == tuple(image[24, 8]) == tuple(image[0, 0]) == gray
    assert (image == blue).all(-1).sum() == 14 * 14  # a square of radius 7
    assert (image == red).all(-1).sum() == 44
    triangle = Object("large", "white", "triangle", "top-right")
    top = draw(Scene((triangle,), "black"))[:, :, 0] > 0
    assert top[:16, 16:].sum() == top.sum()
    assert top[3].sum() < top[12].sum()  # points upwards


def test_every_drawing_is_far_from_every_other():
    flat = world.CLEAN
    square = (flat ** 2).sum(1)
    distance = square[:, None] + square - 2 * flat @ flat.T
    others = ~np.eye(260, dtype=bool)
    assert flat.shape == (260, 768)
    # 20 times the noise of std .1 that the oracle bears
    assert distance[others].min() > 4 ** 2


def test_pixels_are_the_drawing_in_model_range():
    x = pixels([TWO, HELD_OUT[0]])
    assert x.shape == (2, 3, 32, 32)
    assert x.dtype == np.float32
    blue = np.array(world.COLOURS["blue"]) / 127.5 - 1
    np.testing.assert_allclose(x[0, :, 24, 24], blue, rtol=1e-6)
    white = BLUE._replace(colour="white")
    extreme = pixels([Scene((white,), "black")])
    assert extreme.min() == -1
    assert extreme.max() == 1


# --- captions

def test_full_caption():
    assert caption(TWO) == FULL
    captions = [caption(scene).split() for scene in TRAIN]
    assert set(world.WORDS) >= set().union(*captions)
    assert len(world.WORDS) == len(set(world.WORDS)) == 25
    assert max(len(words) for words in captions) == 23


def test_caption_and_parser_round_trip():
    for scene in HELD_OUT:
        *things, background = parse(caption(scene))
        objects = tuple(Object(**thing) for thing in things)
        assert Scene(objects, background["background"]) == scene


PARSED = [
    ("", []),
    (" . ", []),
    (",", [None, None]),
    ("red", [{"colour": "red"}]),
    ("red .", [{"colour": "red"}]),
    ("red , .", [{"colour": "red"}, None]),
    ("small circle top-left , navy background",
     [{"size": "small", "shape": "circle", "cell": "top-left"}, {"background": "navy"}]),
    ("red small", [None]),  # wrong order
    ("red red", [None]),  # an attribute twice
    ("red blue", [None]),
    ("shiny red", [None]),  # unknown words
    ("red . blue", [None]),
    ("red . .", [None]),
    ("gray", [None]),  # half a background, or more than one
    ("background", [None]),
    ("gray circle", [None]),
    ("red background", [None]),
    ("background gray", [None]),
    ("gray gray background", [None]),
    ("red gray background", [None]),
]


@pytest.mark.parametrize("text, phrases", PARSED)
def test_parse(text, phrases):
    assert parse(text) == phrases


def test_terse_keeps_everything_at_one():
    rng = np.random.default_rng(0)
    assert all(terse(scene, 1, rng) == caption(scene) for scene in HELD_OUT)


@pytest.mark.parametrize("keep", [0, 0.25, 0.5, 0.75])
def test_terse_is_true_and_never_repeats_itself(keep):
    rng = np.random.default_rng(0)
    scenes = HELD_OUT * 4
    texts = [terse(scene, keep, rng) for scene in scenes]
    for text, scene in zip(texts, scenes):
        phrases = parse(text)
        assert text.endswith(" .")
        assert phrases and None not in phrases
        distinct = {tuple(phrase.items()) for phrase in phrases}
        assert len(distinct) == len(phrases)
        places = [world.CELLS.index(phrase["cell"]) for phrase in phrases if "cell" in phrase]
        assert places == sorted(places)
    assert caption_scores(texts, scenes)["truth"] == 1.0
    said = np.mean([text.split()[-2] == "background" for text in texts])
    assert abs(said - keep) < 0.05
    if keep == 0.75:
        # a kept object states .75 * 4 of its words, plus the rare one it is made to state
        things = sum(len(scene.objects) for scene in scenes)
        words = 0
        for text in texts:
            words += sum(len(phrase) for phrase in parse(text) if "background" not in phrase)
        assert abs(words / things - 0.75 * 3) < 0.1


def test_terse_never_says_nothing_and_drops_duplicates():
    rng = np.random.default_rng(0)
    alike = Scene((RED, RED._replace(cell="top-right")), "gray")
    texts = {terse(alike, 0.5, rng) for _ in range(2000)}
    assert "small red circle ." in texts
    assert "small red circle , gray background ." in texts
    shortest = {terse(alike, 0, rng) for _ in range(200)}
    assert len(shortest) == 5  # any one word: 3 shared and 2 cells


# --- scores of captions

def test_scores_of_the_full_caption():
    assert score(FULL) == {"len": 13.0, "truth": 1.0, "recall": 1.0, "exact": 1.0}


SCORES = [
    ("red circle , gray background .", 1, 1 / 7),  # true, but only the background is placed
    ("red circle top-left .", 1, 2 / 7),
    ("blue circle .", 0, 0),  # there is blue and there is a circle, in different objects
    ("small red circle top-right .", 0, 0),  # wrong cell
    # wrong size: the phrase is false, two of its facts are right
    ("large red circle top-left .", 0, 2 / 7),
    ("navy background .", 0, 0),
    ("gray background , gray background , gray background .", 1 / 3, 1 / 7),  # repeated
    ("red , red , blue .", 2 / 3, 0),
    ("top-left , bottom-left .", 1 / 2, 0),  # that a cell is full is no fact of its own
    ("red top-left , blue top-left .", 1 / 2, 0),  # contradicts itself
    ("red top-left , red circle top-left .", 1, 2 / 7),  # says it twice, consistently
    ("gray background , navy background .", 1 / 2, 0),
    ("red shiny top-left , circle small , , red circle .", 1 / 4, 0),  # only the last phrase parses
    ("", 0, 0),
    (".", 0, 0),
    (" , .", 0, 0),
]


@pytest.mark.parametrize("text, truth, recall", SCORES)
def test_scores_by_hand(text, truth, recall):
    want = {"len": len(text.split()), "truth": truth, "recall": recall, "exact": 0}
    assert score(text) == pytest.approx(want)


def test_every_cell_stated_with_every_colour_earns_nothing():
    phrases = [f"{colour} {cell}" for colour in world.COLOURS for cell in world.CELLS]
    scores = score(" , ".join(phrases) + " .")
    assert scores["recall"] == 0
    assert scores["truth"] == 2 / 32


def test_scores_pool_over_scenes():
    one = Scene((BLUE._replace(colour="cyan"),), "navy")  # 4 facts
    scores = caption_scores([FULL, "red ."], [TWO, one])
    want = {"len": 7.5, "truth": 3 / 4, "recall": 7 / 11, "exact": 1 / 2}
    assert scores == pytest.approx(want)
    assert caption_scores(["", FULL], [one, TWO])["truth"] == 1  # the mean over scenes would be 1/2
    with pytest.raises(ValueError):
        caption_scores([FULL], [TWO, one])


def test_exact_is_word_for_word():
    assert score(FULL.removesuffix(" ."))["exact"] == 0
    swapped = "large blue square bottom-right , small red circle top-left , gray background ."
    assert score(swapped) == {"len": 13.0, "truth": 1.0, "recall": 1.0, "exact": 0.0}


# --- the oracle

def test_oracle_reads_clean_and_noisy_drawings():
    x = pixels(HELD_OUT)
    assert read(x) == HELD_OUT
    assert t2i(x, HELD_OUT) == 1.0
    noise = np.random.default_rng(0).normal(0, 0.1, x.shape)
    assert read(x + noise) == HELD_OUT
    everywhere = []
    for look in world.LOOKS:
        thing = Object(*look, "top-right")
        everywhere += [Scene((thing,), ground) for ground in world.BACKGROUNDS]
    assert read(pixels(everywhere)) == everywhere


def test_oracle_takes_tensors_and_empty_pictures():
    torch = pytest.importorskip("torch")
    assert read(torch.from_numpy(pixels([TWO]))) == [TWO]
    assert read(pixels([Scene((), "brown")])) == [Scene((), "brown")]


def test_oracle_settles_the_background_for_the_whole_picture():
    x = pixels([Scene((), "gray")])
    other = pixels([Scene((RED,), "navy")])
    x[:, :, :16, :16] = other[:, :, :16, :16]  # one corner disagrees
    [reading] = read(x)
    assert reading.background == "gray"


CYAN = Object("large", "cyan", "cross", "top-right")
ITEMS = [
    ((RED, BLUE), "gray", 11),
    ((RED, BLUE), "navy", 10),
    ((RED,), "gray", 7),  # a missing object loses its four items
    ((), "gray", 3),
    ((RED, CYAN, BLUE), "gray", 10),  # one too many
    ((RED, BLUE._replace(colour="green")), "gray", 10),
    ((RED._replace(size="large", shape="cross"), BLUE), "gray", 9),
    ((RED._replace(cell="top-right"), BLUE), "gray", 6),  # missing here, too many there
]


@pytest.mark.parametrize("objects, background, right", ITEMS)
def test_t2i_by_hand(objects, background, right):
    shown = Scene(objects, background)
    assert t2i(pixels([shown]), [TWO]) == pytest.approx(right / 11)


def test_t2i_pools_over_images():
    one = Scene((BLUE,), "navy")  # 8 items
    x = pixels([TWO, Scene((), "navy")])
    assert t2i(x, [TWO, one]) == pytest.approx((11 + 4) / (11 + 8))
    with pytest.raises(ValueError):
        t2i(pixels([TWO, TWO]), [TWO])


def test_measures_tell_sampled_from_greedy_and_own_from_true():
    """Each of its own scene, whatever the order of the records."""
    one = Scene((Object("small", "red", "circle", "top-left"),), "gray")
    other = Scene((Object("large", "blue", "square", "bottom-right"),), "navy")
    wrong = "large green cross top-right ."
    records = [
        dict(row=1, caption=caption(other), sampled=wrong, read_own=other, read_true=one),
        dict(row=0, caption=caption(one), sampled=wrong, read_own=one, read_true=other)]
    found = world.measures(records, [one, other])
    assert (found["greedy_caption_exact"], found["greedy_caption_recall"]) == (1, 1)
    assert (found["caption_exact"], found["caption_truth"]) == (0, 0)
    assert found["t2i_own"] == 1 > found["t2i_true"]


# --- data sets

def test_splits_are_disjoint_and_deterministic():
    assert (len(TRAIN), len(HELD_OUT)) == (512, 256)
    assert len({*TRAIN, *HELD_OUT}) == 768
    assert world.splits(seed=0, train=512, held_out=256) == (TRAIN, HELD_OUT)
    assert world.splits(seed=1, train=512, held_out=256)[1] != HELD_OUT
    assert world.splits(seed=0, train=8, held_out=256)[1] == HELD_OUT
    train, held_out = world.splits(seed=0, train=4096, held_out=256)
    assert len({*train, *held_out}) == 4352  # chance alone would repeat scenes of one object


def test_write_and_load_round_trip(tmp_path):
    (tmp_path / "shapes").mkdir()  # an empty folder is as good as none
    root = world.write(tmp_path / "shapes", train=12, held_out=5)
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]
    train, held_out = world.splits(train=12, held_out=5)
    assert world.load(root, "train") == train
    assert world.load(root, "held_out") == held_out
    lines = (root / "scenes.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["file"] for row in rows[11:13]] == ["train/00011.png", "held_out/00000.png"]
    for row, scene in zip(rows, train + held_out, strict=True):
        image = np.asarray(Image.open(root / row["file"]))
        assert (image == draw(scene)).all()
        assert row["caption"] == caption(scene)
        assert row["background"] == scene.background
    with pytest.raises(AssertionError, match="split is one of"):
        world.load(root, "test")


def test_write_leaves_the_same_world_alone_and_refuses_another(tmp_path, monkeypatch):
    root = world.write(tmp_path / "shapes", train=4, held_out=2)
    monkeypatch.setattr(world, "draw", None)  # drawing again would fail
    assert world.write(str(root), train=4, held_out=2) == root
    with pytest.raises(FileExistsError, match="remove it"):
        world.write(root, train=5, held_out=2)
    with pytest.raises(FileExistsError, match="remove it"):
        world.write(root, seed=1, train=4, held_out=2)


def test_a_killed_write_leaves_no_half_folder(tmp_path):
    """Killed outright, with no chance to clean up: the name is free and the next write succeeds."""
    root = tmp_path / "shapes"
    child = os.fork()
    if child == 0:
        world.draw = lambda scene: os._exit(9)
        world.write(root, train=4, held_out=2)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    assert not root.exists()
    world.write(root, train=4, held_out=2)
    assert len(world.load(root, "held_out")) == 2


@pytest.mark.parametrize("other, fails", [({"seed": 0}, False), ({"seed": 1}, True)])
def test_of_two_writers_one_wins(tmp_path, monkeypatch, other, fails):
    root = tmp_path / "shapes"
    rename = os.rename

    def second_writer_comes_first(source, target):
        monkeypatch.setattr(world.os, "rename", rename)
        world.write(root, train=4, held_out=2, **other)
        rename(source, target)

    monkeypatch.setattr(world.os, "rename", second_writer_comes_first)
    if fails:
        with pytest.raises(OSError):
            world.write(root, train=4, held_out=2)
    else:
        assert world.write(root, train=4, held_out=2) == root
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]
    train, _ = world.splits(train=4, held_out=2, **other)
    assert world.load(root, "train") == train
