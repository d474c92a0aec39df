"""GenEval: its rules on detected objects, and its scorers, of photos and of the embedded world.
GenEval++, whose scorer asks a judge.

objects are always {class: [(box, score, colour or None), ...]}, thresholded, best first; a box is
(x0, y0, x1, y1), y downwards. metadata is a line of evaluation_metadata.jsonl.
"""
import json
import math
import os

import numpy as np

from bench.answers import last_object, number
from bench.detector import detect, open_colours, open_detector
from bench.judges import Judge, kept_replies
from bench.pictures import Unusable, jpeg, open_image
from bench.prompts import RELATIONS, read_lines
from data.shapes import scenes as world


# --- the rules: pure functions -----------------------------------------------------------------
def relative_position(box_a, box_b):
    """Where A lies as seen from B: a subset of RELATIONS.

    Per axis the distance of the centres counts only beyond a tenth of both sizes together, and
    must be half of the whole distance; two relations can hold at once, none between boxes that are
    too close.
    """
    offsets, beyond = [], []
    for axis in (0, 1):
        low_a, high_a = box_a[axis], box_a[axis + 2]
        low_b, high_b = box_b[axis], box_b[axis + 2]
        offset = (low_a + high_a) / 2 - (low_b + high_b) / 2
        slack = 0.1 * (abs(high_a - low_a) + abs(high_b - low_b))
        offsets.append(offset)
        beyond.append(math.copysign(max(abs(offset) - slack, 0), offset))
    if max(abs(beyond[0]), abs(beyond[1])) < 1e-3:
        return set()
    distance = math.hypot(*offsets)
    dx, dy = beyond[0] / distance, beyond[1] / distance
    holds = dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5
    return {relation for relation, true in zip(RELATIONS, holds) if true}


def geneval_correct(objects, metadata):
    """Whether an image with these objects is what the metadata asks for."""
    correct, _ = geneval_verdict(objects, metadata)
    return correct


def geneval_verdict(objects, metadata):
    """GenEval's rules -> (correct, reason why not).

    Every `include` clause must hold on the best `count` objects of its class (more are fine), no
    class of an `exclude` clause may reach that clause's count.
    """
    faults, groups = [], []
    for clause in metadata.get('include', []):
        found = objects.get(clause['class'], [])[:clause.get('count', 1)]
        faults.append(include_fault(clause, found, groups))
        groups.append(found)
    for clause in metadata.get('exclude', []):
        name, limit = clause['class'], clause['count']
        count = len(objects.get(name, []))
        if count >= limit:
            faults.append(f'{name}: {count}, fewer than {limit} allowed')
    faults = [fault for fault in faults if fault]
    return not faults, '; '.join(faults)


def include_fault(clause, found, groups):
    """What is wrong with a clause's objects, '' if nothing; groups: those of the earlier clauses.

    A target with a fault of its own has failed the image already, so any of its objects will do.
    """
    name, count = clause['class'], clause.get('count', 1)
    if len(found) < count:
        return f'{name}: {len(found)} of {count}'
    if 'color' in clause:
        wanted = clause['color']
        seen = [colour for _, _, colour in found]
        right = seen.count(wanted)
        if right < count:
            return f'{name}: {right} of {count} {wanted}, seen: {", ".join(map(str, seen))}'
    if 'position' in clause:
        relation, target = clause['position']
        for box, _, _ in found:
            for target_box, _, _ in groups[target]:
                if relation not in relative_position(box, target_box):
                    return f'{name}: not {relation} its target'
    return ''


# --- the embedded world's oracle ---------------------------------------------------------------
def shapes_objects(image, meta):
    """What the oracle reads: {shape: [(its cell's box, 1.0, colour)]}.

    It has no confidence to sort by: what the prompt asks for comes first.
    """
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None]
    reading = world.read(pixels / 127.5 - 1)[0]
    asked = [(clause['class'], clause.get('color')) for clause in meta['include']]

    def unasked(thing):
        return (thing.shape, thing.colour) not in asked

    objects = {}
    for thing in sorted(reading.objects, key=unasked):
        row, column = divmod(world.CELLS.index(thing.cell), 2)
        x, y = world.CELL * column, world.CELL * row
        box = x, y, x + world.CELL, y + world.CELL
        objects.setdefault(thing.shape, []).append((box, 1.0, thing.colour))
    return objects


# --- scorers: (item, path) -> a line of results.jsonl with the official fields -----------------
def shapes_scorer(config, run):
    size = world.RESOLUTION, world.RESOLUTION

    def scorer(item, path):
        objects = shapes_objects(open_image(path, size), item['meta'])
        return geneval_record(path, item['meta'], objects)
    return scorer


def geneval_scorer(config, run):
    model = open_detector(config, run.device)
    name_colours = open_colours(config, run.device)

    def scorer(item, path):
        image = open_image(path)
        found = detect(model, image, item['meta']['tag'])
        objects = {}
        for name, instances in found.items():
            objects[name] = [(box, score, None) for box, score, _ in instances]
        # colours are named where they are asked for, of the objects that will count
        for clause in item['meta']['include']:
            name, count = clause['class'], clause.get('count', 1)
            if 'color' in clause and name in found:
                best = found[name][:count]
                colours = name_colours(image, best, name)
                for i, colour in enumerate(colours):
                    box, score, _ = best[i]
                    objects[name][i] = (box, score, colour)
        return geneval_record(path, item['meta'], objects)
    return scorer


def geneval_record(path, metadata, objects):
    correct, reason = geneval_verdict(objects, metadata)
    details = {}
    for name, instances in objects.items():
        details[name] = [[*box, score] for box, score, _ in instances]
    return dict(
        filename=path,
        tag=metadata['tag'],
        prompt=metadata['prompt'],
        correct=correct,
        reason=reason,
        metadata=json.dumps(metadata),
        details=json.dumps(details))


# --- GenEval++: a judge --------------------------------------------------------------------------
JUDGE = (
    'You check whether an image does exactly what an instruction and a checklist ask for. All of '
    'it must hold: the kind of every object, how many there are, their colours, where they are in '
    'the picture, how large they are. The picture must be one natural image that looks like a '
    'photo: drawings, cartoons, collages and several panels fail. Be strict; in doubt it fails. '
    'Answer with JSON alone: {"correct": 1 or 0, "reason": "one sentence"}')


def judge_scorer(config, run):
    """GenEval++: -> scorer(item, path) -> a line of results.jsonl."""
    system = JUDGE
    if config.judge_prompt:
        system = '\n'.join(read_lines(config.judge_prompt))
    judge = Judge(config, kept_replies(f'{config.folder}/judge', run), system)

    def scorer(item, path):
        correct, reason = 0, 'no image'      # a missing image is wrong, as officially
        if os.path.exists(path):
            image = jpeg(open_image(path))
            try:
                correct, reason = judge.ask(verdict, judge_question(item), image, image=path)
            except Unusable as e:
                correct, reason = None, f'no answer: {e}'
        return dict(filename=path, tag=item['meta']['tag'], prompt=item['prompt'],
                    correct=correct, reason=reason)
    return scorer


def judge_question(item):
    asked = checklist(item['meta'])
    return f'Instruction:\n{item["prompt"]}\n\nExpectation checklist:\n{asked}'


def checklist(meta):
    """GenEval++'s official wording of what an image must show."""
    lines = ['This image should contain:']
    for clause in meta['include']:
        phrase = []
        if 'color' in clause:
            phrase.append(f'{clause["color"]}-colored')
        if clause.get('size'):
            phrase.append(clause['size'])
        phrase.append(counted(clause, clause.get('count', 1)))
        if 'region' in clause:
            where = f'located in the {clause["region"]} part of the image'
        else:
            where = 'present in the image'
        lines.append(f'- {" ".join(phrase)} {where}.')
    for clause in meta.get('exclude', []):
        most = counted(clause, clause['count'] - 1)
        lines.append(f'- No more than {most} should appear.')
    return '\n'.join(lines)


def counted(clause, count):
    """The number and the clause's class, whose plural goes by the clause's own count."""
    if clause.get('count', 1) > 1:
        return f'{count} {clause["class"]}s'
    return f'{count} {clause["class"]}'


def verdict(answer):
    """A judge's answer -> (0 or 1, reason); prose may stand around the JSON object.

    Raises ValueError if there is none.
    """
    found = last_object(answer, 'correct')
    correct = number(found['correct'])
    if correct not in (0, 1):
        raise ValueError(f'expected {{"correct": 0 or 1}}, got {answer[:60]!r}')
    return int(correct), str(found.get('reason', ''))
