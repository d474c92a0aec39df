"""What a run left to look at: its evaluations, watched images and opened groups, read from files.

Nothing here needs torch. A run may be unfinished, of an older version, or watch nothing: what is
missing is empty, and a line that a kill cut short is passed over.
"""
import json
import math
import os
from typing import NamedTuple

STAGES = ('cold_start', 'grpo_encoder', 'grpo_decoder')
RECORDS = ('eval.jsonl', 'log.jsonl', 'samples.jsonl', 'groups.jsonl')
MOST_STOPS = 40                # of one run; more are thinned out, so that the page stays small


class Run(NamedTuple):
    """One stage. Steps are the updates done when an evaluation ran."""
    folder: str
    name: str
    script: str                # '' if the run left no config.json
    changed: dict              # keys that differ from the script's defaults; None if unknown
    planned: int               # updates that were asked for, 0 if unknown
    evals: dict                # step -> {measure: number}
    samples: dict              # step -> the watched images, one dict each
    groups: dict               # step -> the opened group


class Stop(NamedTuple):
    """One place of the slider: an evaluation of a run."""
    index: int                 # over all runs
    run: int
    step: int
    edge: bool                 # the first or the last of its run: shown without scripts


# --- numbers ------------------------------------------------------------------------------------
def finite(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def number(value, digits=2):
    """A score as 0.83, a count as 6.8, and a dash for what is no number."""
    if not finite(value):
        return '–'
    if abs(value) >= 5:
        digits = 1
    return f'{value:.{digits}f}'.replace('-', '−')


# --- files ---------------------------------------------------------------------------------------
def read_json(path):
    """The object in a JSON file; {} if there is none, or not a whole one."""
    try:
        with open(path, encoding='utf-8') as f:
            value = json.load(f)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_steps(path):
    """[(step, object)] of the lines of a .jsonl file that are objects with a step."""
    if not os.path.exists(path):
        return []
    with open(path, encoding='utf-8', errors='replace') as f:
        lines = f.readlines()
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and type(value.get('step')) is int:
            found.append((value['step'], value))
    return found


# --- runs ----------------------------------------------------------------------------------------
def is_run(folder):
    return any(os.path.isfile(os.path.join(folder, name)) for name in RECORDS)


def find_runs(folders):
    """Run folders in order; a folder of the demo stands for its three stages.

    Raises SystemExit in one line where a folder is neither.
    """
    found = []
    for folder in folders:
        folder = folder.rstrip('/')
        inside = [os.path.join(folder, stage) for stage in STAGES]
        if is_run(folder):
            found.append(folder)
        elif any(map(is_run, inside)):
            found += filter(is_run, inside)
        else:
            raise SystemExit(f'{folder}: no run here, which has eval.jsonl or log.jsonl, and no '
                             f'folder {", ".join(STAGES)} with one')
    return found


def read_run(folder, name):
    """One run folder -> Run."""
    config = read_json(f'{folder}/config.json')
    keys = config.get('config') or {}
    samples = {}
    for step, sample in read_steps(f'{folder}/samples.jsonl'):
        by_row = samples.setdefault(step, {})
        by_row[sample.get('row')] = sample          # written twice, the last one counts
    watched = {step: list(by_row.values()) for step, by_row in samples.items()}
    return Run(
        folder=folder, name=name, script=config.get('script', ''), changed=config.get('changed'),
        planned=keys.get('steps', 0), evals=dict(read_steps(f'{folder}/eval.jsonl')),
        samples=watched, groups=dict(read_steps(f'{folder}/groups.jsonl')))


def read_runs(folders):
    """Folders as `find_runs` takes them -> Runs; a second run of a name has its number behind."""
    runs, count = [], {}
    for folder in find_runs(folders):
        name = os.path.basename(os.path.abspath(folder))
        count[name] = count.get(name, 0) + 1
        if count[name] > 1:
            name = f'{name} ({count[name]})'
        runs.append(read_run(folder, name))
    return runs


# --- stops ---------------------------------------------------------------------------------------
def thinned(steps, most):
    """At most `most` of sorted steps, evenly, the first and the last among them."""
    if len(steps) <= most:
        return steps
    stride = (len(steps) - 1) / (most - 1)
    places = [round(k * stride) for k in range(most)]
    return [steps[place] for place in places]


def stops_of(runs):
    """All places of the slider, in order: every evaluation of every run."""
    stops = []
    for number, run in enumerate(runs):
        steps = sorted(run.evals.keys() | run.samples.keys() | run.groups.keys())
        steps = thinned(steps, MOST_STOPS)
        for step in steps:
            edge = step in (steps[0], steps[-1])
            stops.append(Stop(len(stops), number, step, edge))
    return stops


class Scene(NamedTuple):
    """A watched image over all stops."""
    name: str
    source: str                # path of its picture
    at: dict                   # stop index -> sample, with `image` as a path


def picture_key(path, sample):
    """What tells watched images apart: the picture itself, since runs number theirs anew."""
    if os.path.isfile(path):
        with open(path, 'rb') as f:
            return f.read()
    return sample.get('name'), sample.get('row')


def scenes_of(runs, stops):
    """The watched images of all runs, each with its samples by stop."""
    scenes = {}
    for stop in stops:
        run = runs[stop.run]
        for sample in run.samples.get(stop.step, []):
            source = os.path.join(run.folder, sample.get('source') or '')
            image = os.path.join(run.folder, sample.get('image') or '')
            key = picture_key(source, sample)
            name = sample.get('name') or f'image {sample.get("row")}'
            scene = scenes.setdefault(key, Scene(str(name), source, {}))
            scene.at[stop.index] = dict(sample, image=image)
    return list(scenes.values())
