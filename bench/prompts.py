"""Prompts of the text-to-image benchmarks: GenEval, GenEval++ and DPG-Bench files -> items, and a GenEval of the embedded world.

An item is a dict: id (its folder or file name), number (its place, the address of its noise), prompt, and meta (GenEval's
tag, include, exclude) or questions (DPG-Bench). A line that cannot be used ends the run in one line with file and number.
"""
import csv
import glob
import io
import json
import os
import re

import numpy as np

from data.shapes import scenes as world

TAGS = ('single_object', 'two_object', 'counting', 'colors', 'position', 'color_attr')
RELATIONS = ('left of', 'right of', 'above', 'below')
COLOURS = ('red', 'orange', 'yellow', 'green', 'blue', 'purple', 'pink', 'brown', 'black', 'white')
CLASSES = ('person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,bird,cat,dog,horse,sheep,'
           'cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,'
           'skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,'
           'donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,'
           'toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush').split(',')         # COCO's order, GenEval's names
DPG_COLUMNS = ('item_id', 'text', 'proposition_id', 'dependency', 'tuple', 'question_natural_language')


def read_items(c):
    """Checks the keys and reads the prompts; everything that is wrong in one line."""
    if c.bench not in ('shapes', 'geneval', 'dpg', 'geneval++'):
        raise SystemExit(f'--bench: expected shapes, geneval, geneval++ or dpg, got {c.bench!r}')
    if c.condition != 'text':
        raise SystemExit(f'--condition={c.condition}: a prompt has no image to look at, expected text')
    if c.samples < 1 or c.bench == 'dpg' and c.samples not in (1, 4) or c.batch < 1 or c.judge_tries < 1:
        raise SystemExit(f'--samples={c.samples} --batch={c.batch} --judge_tries={c.judge_tries}: expected 1 or more, and 1 or 4 samples for dpg')
    if c.bench == 'shapes' and c.resolution != world.RESOLUTION:
        raise SystemExit(f'--resolution={c.resolution}: the embedded world has {world.RESOLUTION}')
    if c.judge_url and not c.judge_url.startswith(('http://', 'https://')):
        raise SystemExit(f'--judge_url={c.judge_url}: expected http:// or https://')
    if c.bench != 'shapes' and not c.prompts and (c.generate or c.bench != 'geneval'):
        raise SystemExit(f'--bench={c.bench} needs --prompts=FILE')
    if c.bench == 'shapes' and not c.prompts:
        return [dict(id=f'{n:05d}', number=n, prompt=m['prompt'], meta=m) for n, m in enumerate(shapes_prompts())]
    items = read_dpg(c) if c.bench == 'dpg' else read_metadata(c)
    if not items:
        raise SystemExit(f'no prompts in {c.prompts or c.images or "--images"!r}')
    return items


def read_lines(path):
    try:
        with open(path, encoding='utf-8') as f:
            return f.read().rstrip('\n').split('\n')
    except (OSError, UnicodeDecodeError) as e:
        raise SystemExit(f'--prompts={path}: cannot be read: {e}')


def metadata(text, where, classes=(), colours=()):
    """One line of GenEval metadata, checked: {tag, prompt, include, exclude}; classes, colours: the words that the scorer knows, () = any."""
    try:
        meta = json.loads(text)
    except ValueError:
        raise SystemExit(f'{where}: not JSON: {text[:60]!r}')
    if not isinstance(meta, dict) or not all(isinstance(meta.get(k), str) for k in ('tag', 'prompt')) or not isinstance(meta.get('include'), list):
        raise SystemExit(f'{where}: expected a JSON object with "tag", "prompt" and the list "include"')
    for part in ('include', 'exclude'):
        for i, req in enumerate(meta.get(part) or ()):
            if wrong := clause_fault(req, i, classes, colours):
                raise SystemExit(f'{where}: {part}[{i}]: {wrong}')
    return meta


def clause_fault(req, i, classes, colours):
    """What is wrong with the i-th clause of a metadata line; '' if nothing."""
    if not isinstance(req, dict) or not isinstance(req.get('class'), str) or type(req.get('count')) is not int or req['count'] < 1:
        return 'expected an object with "class" and a "count" of 1 or more'
    if classes and req['class'] not in classes:
        return f'unknown class {req["class"]!r}'
    if colours and req.get('color', colours[0]) not in colours:
        return f'unknown color {req["color"]!r}; there are: {" ".join(colours)}'
    p = req.get('position', ['above', 0])
    if not isinstance(p, list) or len(p) != 2 or p[0] not in RELATIONS or type(p[1]) is not int or 'position' in req and not 0 <= p[1] < i:
        return f'"position" is [one of {", ".join(RELATIONS)}; index of an earlier object], got {p}'
    return ''


def read_metadata(c):
    """Items of a metadata file, or without one of a folder in GenEval's layout: [dict(id, number, prompt, meta)]."""
    words = dict(geneval=(CLASSES, COLOURS), shapes=(world.SHAPES, tuple(world.COLOURS))).get(c.bench, ())
    if not c.prompts:
        folders = {}
        for path in sorted(glob.glob(f'{glob.escape(c.images)}/*/metadata.jsonl')) if c.images else []:
            name = os.path.basename(os.path.dirname(path))
            if name.isdigit() and folders.setdefault(int(name), path) != path:
                raise SystemExit(f'{path}: the number {int(name)} is there twice, also as {folders[int(name)]}')
        texts = [(n, os.path.basename(os.path.dirname(p)), p, '\n'.join(read_lines(p))) for n, p in sorted(folders.items())]
    else:
        texts = [(n, f'{n:05d}' if c.bench != 'geneval++' else f'{n + 1}', f'{c.prompts}:{n + 1}', t) for n, t in enumerate(read_lines(c.prompts))]
    metas = [(n, name, metadata(t, where, *words)) for n, name, where, t in texts]
    return [dict(id=name, number=n, prompt=m['prompt'], meta=m) for n, name, m in metas]


def read_dpg(c):
    """Items of dpg_bench.csv: [dict(id, number, prompt, questions)], or of a folder of ID.txt, which has prompts alone."""
    if os.path.isdir(c.prompts):
        paths = sorted(glob.glob(f'{glob.escape(c.prompts)}/*.txt'))
        return [dict(id=os.path.basename(p)[:-4], number=n, prompt=' '.join(read_lines(p)).strip(), questions=None) for n, p in enumerate(paths)]
    rows = csv.DictReader(io.StringIO('\n'.join(read_lines(c.prompts)).removeprefix('\ufeff')))
    if not set(DPG_COLUMNS) <= set(rows.fieldnames or ()):
        raise SystemExit(f'{c.prompts}:1: expected the columns {", ".join(DPG_COLUMNS)}')
    items = {}
    last = None
    for row in rows:
        where = f'{c.prompts}:{rows.line_num}'
        try:
            key, category = row['item_id'], row['tuple'].split('(')[0].strip()
            q = dict(proposition_id=int(row['proposition_id']), dependency=[int(d) for d in row['dependency'].split(',')],
                     question=row['question_natural_language'].strip(), category=category, where=where)
        except (ValueError, AttributeError):
            raise SystemExit(f'{where}: malformed row: proposition_id and dependency are whole numbers, no column is empty')
        if not re.fullmatch(r'[\w-]+', key):
            raise SystemExit(f'{where}: item_id {key!r} cannot be a file name')
        item = items.setdefault(key, dict(id=key, number=len(items), prompt=row['text'].strip(), questions=[]))
        if key != last and item['questions'] or q['proposition_id'] in [o['proposition_id'] for o in item['questions']]:
            raise SystemExit(f'{where}: duplicate: {key} {"has this proposition_id" if key == last else "has rows"} above, at {item["questions"][0]["where"]}')
        item['questions'].append(q)
        last = key
    for item in items.values():
        known = {0, *(q['proposition_id'] for q in item['questions'])}
        for q in item['questions']:
            if not known.issuperset(q['dependency']):
                raise SystemExit(f'{q["where"]}: {item["id"]} depends on a proposition_id it does not have: {q["dependency"]}')
    return list(items.values())


def drop_first_row(items):
    """The official script loses the first question; where others depend on it, it fails on the whole image and leaves it out."""
    lost, *rest = items[0]['questions']
    keep = rest and not any(lost['proposition_id'] in q['dependency'] for q in rest)
    return [dict(items[0], questions=rest)] * bool(keep) + items[1:]


def shapes_prompts(per_tag=32, seed=0):
    """A GenEval of the embedded world: per_tag distinct metadata lines {tag, include[, exclude], prompt} of each tag, always the same.

    Prompts are full captions of scenes with just the objects that count; only what GenEval would ask of them is scored.
    """
    rng = np.random.default_rng(seed)

    def one(tag):
        (a, b), (p, q) = (rng.choice(list(words), 2, replace=False).tolist() for words in (world.SHAPES, world.COLOURS))
        exclude = []
        n = dict(single_object=1, colors=1, counting=int(rng.integers(2, 5))).get(tag, 2)
        cells = sorted(rng.choice(4, n, replace=False).tolist())
        include = [dict({'class': a}, count=1), dict({'class': b}, count=1)][:n]
        if tag == 'counting':
            include, exclude = [dict({'class': a}, count=n)], [dict({'class': a}, count=n + 1)]
        elif tag in ('colors', 'color_attr'):
            include = [dict(req, color=colour) for req, colour in zip(include, (p, q))]
        elif tag == 'position':
            relation = int(rng.integers(4))
            cells = [((0, 1), (2, 3)), ((0, 2), (1, 3))][relation // 2][rng.integers(2)]         # side by side, or one above the other
            target, placed = include[::-1] if relation % 2 == 0 else include
            include = [target, dict(placed, position=[RELATIONS[relation], 0])]
        shapes, colours = ([a] * n if tag == 'counting' else [a, b]), [p, q, *rng.choice(list(world.COLOURS), 2)]
        objects = tuple(world.Object(str(rng.choice(list(world.SIZES))), str(c), s, world.CELLS[i]) for c, s, i in zip(colours, shapes, cells))
        prompt = world.caption(world.Scene(objects, str(rng.choice(list(world.BACKGROUNDS)))))
        return dict(tag=tag, include=include, **(dict(exclude=exclude) if exclude else {}), prompt=prompt)

    found = {}
    for tag in TAGS:
        while sum(m['tag'] == tag for m in found.values()) < per_tag:
            m = one(tag)
            found.setdefault(m['prompt'], m)
    return list(found.values())


# --- where the images of an item are -------------------------------------------------------------------------------------
def files(c, item):
    """The image files of an item in the benchmark's own layout."""
    if c.bench in ('geneval', 'shapes'):
        return [f'{c.images}/{item["id"]}/samples/{k:05d}.png' for k in range(c.samples)]
    return [f'{c.images}/{item["id"]}.{"png" if c.bench == "dpg" else "jpg"}']


def to_score(c, item):
    """The files to score: GenEval's scorer takes every image of digits in an item's folder."""
    if c.bench not in ('geneval', 'shapes'):
        return files(c, item)
    folder = f'{c.images}/{item["id"]}/samples'
    there = sorted(n for n in (os.listdir(folder) if os.path.isdir(folder) else ()) if re.fullmatch(r'\d+\.png', n))
    lost = [os.path.basename(f) for f in files(c, item) if os.path.basename(f) not in there]
    return [f'{folder}/{n}' for n in there + lost[:max(0, c.samples - len(there))]]
