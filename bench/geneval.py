"""GenEval: its rules on detected objects, and its scorers, of photos and of the embedded world.

objects are always {class: [(box, score, colour or None), ...]}, thresholded, best first; a box is
(x0, y0, x1, y1), y downwards. metadata is a line of evaluation_metadata.jsonl.
"""
import json
import math

from bench.detector import detect, open_colours, open_detector
from bench.judges import open_image, shapes_objects
from bench.prompts import RELATIONS
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
