"""Prompts of the text-to-image benchmarks: the files of GenEval, GenEval++, DPG-Bench -> items.

An item is a dict: id (its folder or file name), number (its place, the address of its noise),
prompt, and meta (GenEval's tag, include, exclude) or questions (DPG-Bench). The embedded world has
a GenEval of its own. A line that cannot be used ends the run in one line with file and number.
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
COLOURS = (
    'red', 'orange', 'yellow', 'green', 'blue', 'purple', 'pink', 'brown', 'black', 'white')
# COCO's order, GenEval's names
CLASSES = (
    'person', 'bicycle', 'car', 'motorcycle', 'airplane', 'bus', 'train', 'truck', 'boat',
    'traffic light', 'fire hydrant', 'stop sign', 'parking meter', 'bench', 'bird', 'cat', 'dog',
    'horse', 'sheep', 'cow', 'elephant', 'bear', 'zebra', 'giraffe', 'backpack', 'umbrella',
    'handbag', 'tie', 'suitcase', 'frisbee', 'skis', 'snowboard', 'sports ball', 'kite',
    'baseball bat', 'baseball glove', 'skateboard', 'surfboard', 'tennis racket', 'bottle',
    'wine glass', 'cup', 'fork', 'knife', 'spoon', 'bowl', 'banana', 'apple', 'sandwich', 'orange',
    'broccoli', 'carrot', 'hot dog', 'pizza', 'donut', 'cake', 'chair', 'couch', 'potted plant',
    'bed', 'dining table', 'toilet', 'tv', 'laptop', 'computer mouse', 'tv remote',
    'computer keyboard', 'cell phone', 'microwave', 'oven', 'toaster', 'sink', 'refrigerator',
    'book', 'clock', 'vase', 'scissors', 'teddy bear', 'hair drier', 'toothbrush')
DPG_COLUMNS = (
    'item_id', 'text', 'proposition_id', 'dependency', 'tuple', 'question_natural_language')


def check_keys(config):
    """Refuses keys that have no meaning, or none together, in one line."""
    if config.bench not in ('shapes', 'geneval', 'dpg', 'geneval++'):
        raise SystemExit('--bench: expected shapes, geneval, geneval++ or dpg, got '
                         f'{config.bench!r}')
    if config.condition != 'text':
        raise SystemExit(
            f'--condition={config.condition}: a prompt has no image to look at, expected text')
    if config.bench == 'dpg' and config.samples not in (1, 4):
        raise SystemExit(f'--samples={config.samples}: expected 1 or 4 for dpg')
    if config.bench == 'shapes' and config.resolution != world.RESOLUTION:
        raise SystemExit(
            f'--resolution={config.resolution}: the embedded world has {world.RESOLUTION}')
    if config.judge_url and not config.judge_url.startswith(('http://', 'https://')):
        raise SystemExit(f'--judge_url={config.judge_url}: expected http:// or https://')
    # GenEval's folders hold their prompts, so whoever only scores them needs no file
    has_prompts = config.bench == 'shapes' or config.bench == 'geneval' and not config.generate
    if not config.prompts and not has_prompts:
        raise SystemExit(f'--bench={config.bench} needs --prompts=FILE')


def read_items(config):
    """The items of a run; a key or a prompt that is wrong ends it in one line."""
    check_keys(config)
    if config.bench == 'dpg':
        items = read_dpg(config.prompts)
    elif config.bench == 'shapes' and not config.prompts:
        metas = shapes_prompts()
        items = [metadata_item(n, f'{n:05d}', meta) for n, meta in enumerate(metas)]
    else:
        items = read_metadata(config)
    if not items:
        source = config.prompts or config.images or '--images'
        raise SystemExit(f'no prompts in {source!r}')
    return items


def read_lines(path):
    """The lines of a text file, those at its end that are empty left out.

    A byte order mark and the line ends of other systems do not count as text.
    """
    try:
        with open(path, encoding='utf-8-sig') as f:
            return f.read().rstrip().split('\n')
    except (OSError, ValueError) as e:       # also not UTF-8, or a name with a NUL
        raise SystemExit(f'{path}: cannot be read: {e}')


def read_json(text, where):
    """A JSON text -> its value; ends the run with the text's place if it is not JSON."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()       # half a surrogate pair is no text
        return value
    except (ValueError, RecursionError) as e:
        raise SystemExit(f'{where}: not JSON: {e}: {text[:60]!r}')


def texts_of(row, where, *names):
    """These fields of a row, all of them text; else the run ends in one line."""
    values = [row.get(name) if isinstance(row, dict) else None for name in names]
    if not all(isinstance(value, str) and value for value in values):
        raise SystemExit(f'{where}: expected the texts {", ".join(names)}')
    return values


# --- GenEval and GenEval++: lines of metadata --------------------------------------------------
def read_metadata(config):
    """Items of a metadata file, or without one of a folder in GenEval's layout."""
    classes, colours = (), ()
    if config.bench == 'geneval':
        classes, colours = CLASSES, COLOURS
    elif config.bench == 'shapes':
        classes, colours = world.SHAPES, tuple(world.COLOURS)
    if config.prompts:
        found = metadata_of_file(config.prompts, config.bench)
    else:
        found = metadata_of_folders(config.images)
    items = []
    for number, name, where, text in found:
        meta = parse_metadata(text, where, classes, colours)
        items.append(metadata_item(number, name, meta))
    return items


def metadata_item(number, name, meta):
    return dict(id=name, number=number, prompt=meta['prompt'], meta=meta)


def metadata_of_file(path, bench):
    """-> [(number, id, where it stands, text)] of the lines of a file."""
    found = []
    for number, text in enumerate(read_lines(path)):
        if bench == 'geneval++':
            name = f'{number + 1}'           # its images are 1.jpg, 2.jpg, ...
        else:
            name = f'{number:05d}'
        found.append((number, name, f'{path}:{number + 1}', text))
    return found


def metadata_of_folders(images):
    """-> [(number, id, where it stands, text)] of the folders of digits that somebody else drew."""
    if not images:
        return []
    paths = {}
    for path in sorted(glob.glob(f'{glob.escape(images)}/*/metadata.jsonl')):
        name = folder_name(path)
        if not name.isdigit():
            continue
        number = int(name)
        if number in paths:
            raise SystemExit(
                f'{path}: the number {number} is there twice, also as {paths[number]}')
        paths[number] = path
    found = []
    for number, path in sorted(paths.items()):
        text = '\n'.join(read_lines(path))
        found.append((number, folder_name(path), path, text))
    return found


def folder_name(path):
    return os.path.basename(os.path.dirname(path))


def parse_metadata(text, where, classes=(), colours=()):
    """One line of GenEval metadata, checked: {tag, prompt, include, exclude}.

    classes, colours: the words that the scorer knows, () = any.
    """
    meta = read_json(text, where)
    if not has_metadata_fields(meta):
        raise SystemExit(
            f'{where}: expected a JSON object with "tag", "prompt" and the list "include"')
    for part in ('include', 'exclude'):
        for index, clause in enumerate(meta.get(part) or ()):
            fault = clause_fault(clause, index, classes, colours)
            if fault:
                raise SystemExit(f'{where}: {part}[{index}]: {fault}')
    return meta


def has_metadata_fields(meta):
    if not isinstance(meta, dict):
        return False
    texts = isinstance(meta.get('tag'), str) and isinstance(meta.get('prompt'), str)
    return texts and isinstance(meta.get('include'), list)


def clause_fault(clause, index, classes, colours):
    """What is wrong with the clause at `index` of a metadata line's part; '' if nothing."""
    named = isinstance(clause, dict) and isinstance(clause.get('class'), str)
    if not named or type(clause.get('count')) is not int or clause['count'] < 1:
        return 'expected an object with "class" and a "count" of 1 or more'
    if classes and clause['class'] not in classes:
        return f'unknown class {clause["class"]!r}'
    if colours and 'color' in clause and clause['color'] not in colours:
        return f'unknown color {clause["color"]!r}; there are: {" ".join(colours)}'
    if 'position' in clause and not is_position(clause['position'], index):
        relations = ', '.join(RELATIONS)
        return (f'"position" is [one of {relations}; index of an earlier object], '
                f'got {clause["position"]}')
    return ''


def is_position(position, index):
    """Whether it is [relation, index of a clause before this one]."""
    if not isinstance(position, list) or len(position) != 2:
        return False
    relation, target = position
    return relation in RELATIONS and type(target) is int and 0 <= target < index


# --- DPG-Bench: a CSV of questions -------------------------------------------------------------
def read_dpg(path):
    """Items of dpg_bench.csv, or of a folder of ID.txt, which has prompts but no questions."""
    if os.path.isdir(path):
        return read_dpg_folder(path)
    rows = csv.DictReader(io.StringIO('\n'.join(read_lines(path)), newline=''))
    if not set(DPG_COLUMNS) <= set(rows.fieldnames or ()):
        raise SystemExit(f'{path}:1: expected the columns {", ".join(DPG_COLUMNS)}')
    items = {}
    previous = None
    for row, where in numbered(rows, path):
        name, question = parse_row(row, where)
        if name not in items:
            prompt = row['text'].strip()
            items[name] = dict(id=name, number=len(items), prompt=prompt, questions=[])
        questions = items[name]['questions']
        again = ''
        if questions and name != previous:
            again = 'has rows'
        elif question['proposition_id'] in [q['proposition_id'] for q in questions]:
            again = 'has this proposition_id'
        if again:
            first = questions[0]['where']
            raise SystemExit(f'{where}: duplicate: {name} {again} above, at {first}')
        questions.append(question)
        previous = name
    for item in items.values():
        check_dependencies(item)
    return list(items.values())


def numbered(rows, path):
    """The rows of a csv.DictReader, each with its file and line."""
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as e:               # such as a quote that never ends
            raise SystemExit(f'{path}:{rows.line_num + 1}: malformed row: {e}')
        yield row, f'{path}:{rows.line_num}'


def read_dpg_folder(folder):
    items = []
    for number, path in enumerate(sorted(glob.glob(f'{glob.escape(folder)}/*.txt'))):
        name = os.path.basename(path).removesuffix('.txt')
        prompt = ' '.join(read_lines(path)).strip()
        items.append(dict(id=name, number=number, prompt=prompt, questions=None))
    return items


def parse_row(row, where):
    """A row of the CSV -> its item's id, its question."""
    beyond = ''.join(row.pop(None, []))      # a comma at the end of a line is no column
    if beyond.strip():
        raise SystemExit(f'{where}: malformed row: more columns than the header has: {beyond!r}')
    try:
        name = row['item_id']
        parents = row['dependency'].split(',')
        question = dict(
            proposition_id=int(row['proposition_id']),
            dependency=[int(parent) for parent in parents],
            question=row['question_natural_language'].strip(),
            category=row['tuple'].split('(')[0].strip(),
            where=where)
    except (ValueError, AttributeError):
        raise SystemExit(
            f'{where}: malformed row: proposition_id and dependency are whole numbers, '
            'no column is empty')
    if not re.fullmatch(r'[\w-]+', name):
        raise SystemExit(f'{where}: item_id {name!r} cannot be a file name')
    return name, question


def check_dependencies(item):
    known = {0}                              # 0 = depends on nothing
    known.update(question['proposition_id'] for question in item['questions'])
    for question in item['questions']:
        parents = question['dependency']
        if not known.issuperset(parents):
            raise SystemExit(
                f'{question["where"]}: {item["id"]} depends on a proposition_id '
                f'it does not have: {parents}')


# --- the embedded world ------------------------------------------------------------------------
def shapes_prompts(per_tag=32, seed=0):
    """A GenEval of the embedded world: per_tag distinct metadata lines of each tag.

    Lines {tag, include[, exclude], prompt}, always the same. Prompts are full captions of scenes
    with just the objects that count; only what GenEval would ask of them is scored.
    """
    rng = np.random.default_rng(seed)
    found = {}                               # by prompt, so that all are distinct
    for number, tag in enumerate(TAGS, 1):
        while len(found) < number * per_tag:
            meta = shapes_metadata(tag, rng)
            found.setdefault(meta['prompt'], meta)
    return list(found.values())


def shapes_metadata(tag, rng):
    """One metadata line of this tag, which asks for what the tag is about."""
    first, second = rng.choice(list(world.SHAPES), 2, replace=False).tolist()
    colours = rng.choice(list(world.COLOURS), 2, replace=False).tolist()
    count = int(rng.integers(2, 5))          # drawn for every tag: the prompts depend on it
    if tag in ('single_object', 'colors'):
        count = 1
    elif tag != 'counting':
        count = 2
    cells = sorted(rng.choice(4, count, replace=False).tolist())
    shapes = [first, second]
    include = [{'class': first, 'count': 1}, {'class': second, 'count': 1}][:count]
    exclude = []
    if tag == 'counting':
        shapes = [first] * count
        include = [{'class': first, 'count': count}]
        exclude = [{'class': first, 'count': count + 1}]
    elif tag in ('colors', 'color_attr'):
        for clause, colour in zip(include, colours):
            clause['color'] = colour
    elif tag == 'position':
        relation = int(rng.integers(4))
        if relation < 2:
            pairs = (0, 1), (2, 3)           # side by side
        else:
            pairs = (0, 2), (1, 3)           # one above the other
        cells = pairs[rng.integers(2)]
        placed, target = include
        if relation % 2 == 1:                # right of, below: the second is the one that is placed
            target, placed = include
        placed['position'] = [RELATIONS[relation], 0]
        include = [target, placed]
    colours += rng.choice(list(world.COLOURS), 2).tolist()
    objects = []
    for colour, shape, cell in zip(colours, shapes, cells):
        size = str(rng.choice(list(world.SIZES)))
        objects.append(world.Object(size, colour, shape, world.CELLS[cell]))
    background = str(rng.choice(list(world.BACKGROUNDS)))
    prompt = world.caption(world.Scene(tuple(objects), background))
    meta = dict(tag=tag, include=include)
    if exclude:
        meta['exclude'] = exclude
    meta['prompt'] = prompt
    return meta


# --- where the images of an item are -----------------------------------------------------------
def item_files(config, item):
    """The image files of an item in the benchmark's own layout."""
    if config.bench in ('geneval', 'shapes'):
        folder = f'{config.images}/{item["id"]}/samples'
        return [f'{folder}/{sample:05d}.png' for sample in range(config.samples)]
    if config.bench == 'dpg':
        return [f'{config.images}/{item["id"]}.png']
    return [f'{config.images}/{item["id"]}.jpg']


def files_to_score(config, item):
    """The files to score: GenEval's scorer takes every image of digits in an item's folder.

    Where there are fewer than `samples`, files that are missing fill the list up.
    """
    expected = item_files(config, item)
    if config.bench not in ('geneval', 'shapes'):
        return expected
    folder = os.path.dirname(expected[0])
    names = []
    if os.path.isdir(folder):
        names = [name for name in sorted(os.listdir(folder)) if re.fullmatch(r'\d+\.png', name)]
    there = [f'{folder}/{name}' for name in names]
    missing = [path for path in expected if path not in there]
    lacking = max(0, config.samples - len(there))
    return there + missing[:lacking]
