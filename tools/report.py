"""Training runs as one page to look at: curves, captions and drawings at every evaluation.

    python tools/report.py out/demo                       # its stages, into out/demo/report.html
    python tools/report.py out/cold_start out/grpo_encoder     # runs in order, into the last one
    python tools/report.py out/a out/b --curves=reward+judge,entropy   # only out/b/curves.png
    python tools/report.py out/a out/b --png=sheet.png    # only how each run drew in the end
    python tools/report.py out/demo --gif=assets/loop.gif      # only a moving picture

The page is one file without a server: images are inside it, and it reads without scripts too.
--out_dir=DIR puts it elsewhere. --curves has a panel for each word between commas, a field of
eval.jsonl or log.jsonl; fields joined by + share a panel. In curves a run begins where the run of
its init_from ended, if that one is given before it, and else at 0.
"""
import base64
import dataclasses
import difflib
import io
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from config import ConfigError

# --- script keys ---------------------------------------------------------------------------------
keys = dict(
    out_dir = '',              # where the page or the curves go; '' = the last of the folders given
    curves = '',               # fields, as said above: curves.png instead of the page
    png = '',                  # a path: the watched images as each run left them
    gif = '',                  # a path: a moving picture of the watched images
)
# -------------------------------------------------------------------------------------------------
# a folder of stages has some of these in it
STAGES = ('cold_start', 'grpo_encoder', 'grpo_decoder', 'nft_decoder', 'by_gradient')
MOST_STOPS = 40                # of one run; more are thinned out, so that the page stays small
SMALL, LARGE = 64, 256         # pixels: up to SMALL an image stays exact, none has more than LARGE

INK, SOFT, RULE = '#22262b', '#646a72', '#e5e1d9'     # the page's own, in its light scheme
COLOURS = ('#1b9e8f', '#dd7a2c', '#7d74c9', '#c2468a', '#5b8bd0', '#8b8f96')    # of runs, in turn
DASHES = ('-', '--', ':')                                                       # of fields
STYLE = {
    'svg.fonttype': 'none', 'svg.hashsalt': 'nanoUAE', 'font.size': 10, 'text.color': INK,
    'axes.edgecolor': RULE, 'axes.spines.right': False, 'axes.spines.top': False,
    'axes.grid': True, 'axes.grid.axis': 'y', 'grid.color': RULE,
    'xtick.color': SOFT, 'ytick.color': SOFT, 'xtick.major.size': 0, 'ytick.major.size': 0,
    'lines.markersize': 4}


# --- runs ----------------------------------------------------------------------------------------
class Stop(NamedTuple):
    """One place of the slider: an evaluation of a run, after `step` updates."""
    index: int                 # over all runs
    run: 'Run'
    step: int


@dataclasses.dataclass(eq=False)
class Run:
    """What a run left; whatever is missing is empty."""
    folder: str
    name: str
    colour: str
    about: dict                # config.json
    evals: dict                # step -> {measure: number}
    samples: dict              # step -> {row: line of a watched image}
    groups: dict               # step -> the opened group
    log: dict = dataclasses.field(default_factory=dict)    # as evals; only --curves reads it
    stops: list = dataclasses.field(default_factory=list)
    start: int = 0             # where it begins on the axis of the curves


def finite(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def number(value, digits=2):
    """A score as 0.83, a count as 6.8, and a dash for what is no number."""
    if not finite(value):
        return '–'
    if abs(value) >= 5:
        digits = 1
    return f'{value:.{digits}f}'.replace('-', '−')


def read_json(text):
    """A JSON object; {} if it is none, for example because a kill cut it short."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def read_text(path):
    """What is in a file; '' if there is none."""
    path = Path(path)
    return path.read_text(encoding='utf-8', errors='replace') if path.is_file() else ''


def read_steps(path):
    """The objects with a step that a .jsonl file has, in order."""
    lines = [read_json(line) for line in read_text(path).splitlines()]
    return [line for line in lines if type(line.get('step')) is int]


def find_runs(folders):
    """Run folders in order; a folder of the demo stands for its stages."""
    found = []
    for folder in folders:
        places = [folder] + [os.path.join(folder, stage) for stage in STAGES]
        runs = [place for place in places if any(Path(place).glob('*.jsonl'))]
        if not runs:
            raise SystemExit(f'{folder}: no run here, which has eval.jsonl or log.jsonl, and none '
                             f'in a folder {", ".join(STAGES)}')
        found += runs[:1] if runs[0] == folder else runs
    return found


def read_run(folder, name, colour):
    """A run folder -> Run."""
    samples = {}
    for line in read_steps(f'{folder}/samples.jsonl'):
        samples.setdefault(line['step'], {})[line.get('row')] = line      # the last one counts
    return Run(
        folder, name, colour, about=read_json(read_text(f'{folder}/config.json')), samples=samples,
        evals={line['step']: line for line in read_steps(f'{folder}/eval.jsonl')},
        groups={line['step']: line for line in read_steps(f'{folder}/groups.jsonl')})


def read_runs(folders):
    """Folders as `find_runs` takes them -> (Runs, all Stops)."""
    runs, stops, names = [], [], []
    for folder in find_runs(folders):
        name = os.path.basename(os.path.abspath(folder))
        shown = folder if name in names else name
        names.append(name)
        run = read_run(folder, shown, COLOURS[len(runs) % len(COLOURS)])
        steps = sorted({*run.evals, *run.samples, *run.groups})
        stride = max(1, math.ceil((len(steps) - 1) / (MOST_STOPS - 1)))
        for step in steps[:-1:stride] + steps[-1:]:
            run.stops.append(Stop(len(stops), run, step))
            stops.append(run.stops[-1])
        init_from = (run.about.get('config') or {}).get('init_from') or ''
        for parent, parent_name in zip(runs, names):
            if parent.stops and parent_name in init_from.split('/'):
                run.start = parent.start + parent.stops[-1].step
        runs.append(run)
    return runs, stops


def scenes_of(stops):
    """The watched images: a dict each with name, source, truth, and its lines `at` the stops.

    The same picture is the same scene in every run.
    """
    scenes = {}
    for stop in stops:
        for row, line in stop.run.samples.get(stop.step, {}).items():
            line = dict(line, caption=str(line.get('caption', '')))
            for key in ('source', 'image'):
                line[key] = os.path.join(stop.run.folder, line.get(key) or '')
            picture, _ = data_uri(line['source'])          # runs number theirs anew
            scene = scenes.setdefault(picture or row, dict(line, at={}))
            scene['at'][stop.index] = line
    return list(scenes.values())


# --- words and images ----------------------------------------------------------------------------
def caption_html(caption, before=None, false=()):
    """A caption: words that it did not have `before` marked, false phrases struck out."""
    words = caption.split()
    old = words if before is None else before.split()
    kept = set()
    for block in difflib.SequenceMatcher(None, old, words, autojunk=False).get_matching_blocks():
        kept.update(range(block.b, block.b + block.size))
    html, place = '', 0
    for phrase in re.split(r'(?<!\S)([,.])(?!\S)', ' '.join(words)):       # a comma is one too
        marked = []
        for word in phrase.split():
            text = str(escape(word))
            if place not in kept and word not in ',.':
                text = f'<mark>{text}</mark>'
            marked.append(text)
            place += 1
        text = ' '.join(marked).replace('</mark> <mark>', ' ')
        if text and phrase.strip() in false:
            text = f'<del>{text}</del>'
        html += f' {text}' if text else ''
    # without the space that the embedded world has before a comma and a full stop
    return Markup(re.sub(r' ([,.])(?= |$)', r'\1', html.strip()))


def data_uri(path):
    """An image file -> (its content as a URI, whether it is small); ('', False) if unreadable."""
    try:
        with Image.open(path) as image:
            image = image.convert('RGB')
    except (OSError, ValueError, Image.DecompressionBombError):
        return '', False
    small = max(image.size) <= SMALL
    image.thumbnail((LARGE, LARGE))
    buffer = io.BytesIO()
    image.save(buffer, 'webp', quality=80, lossless=small)
    return f'data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}', small


# --- curves --------------------------------------------------------------------------------------
def draw_curves(axes, runs, fields):
    """Some fields over the updates: colours tell runs apart, dashes fields."""
    for run in runs:
        for field, dash in zip(fields, DASHES):
            lines = run.log
            if any(field in line for line in run.evals.values()):
                lines = run.evals
            steps = [step for step in sorted(lines) if finite(lines[step].get(field))]
            if steps:
                updates = [run.start + step for step in steps]
                values = [lines[step][field] for step in steps]
                label = run.name if field == fields[0] else None
                axes.plot(updates, values, dash, marker='.', color=run.colour, label=label)
    axes.locator_params(axis='x', integer=True)


def curves_svg(runs, fields, least=None, most=None):
    """A panel of the page -> its SVG in the page's colours, {stop's index: percent of the width}.

    None if no run measured any of it. least and most: ends of the scale.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, 2.6))
        axes = figure.add_axes((0.09, 0.12, 0.89, 0.84))
        draw_curves(axes, runs, fields)
        if not axes.lines:
            return None
        axes.set_ylim(least, most)
        axes.set_xlim(*axes.get_xlim())                    # from here on it stays
        places = {}
        for stop in (stop for run in runs for stop in run.stops):
            x, _ = axes.transData.transform((stop.run.start + stop.step, 0))
            places[stop.index] = 100 * x / figure.bbox.width
        buffer = io.StringIO()
        nothing = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
        figure.savefig(buffer, format='svg', transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', '', svg[svg.index('<svg'):])
    for colour, name in ((INK, 'ink'), (SOFT, 'soft'), (RULE, 'rule')):
        svg = svg.replace(colour, f'var(--{name})')
    return Markup(svg), places


def write_curves(folders, panels, out_dir):
    """Writes out_dir/curves.png; panels: as the key `curves`."""
    runs, _ = read_runs(folders)
    panels = panels.split(',')
    for run in runs:
        run.log = {line['step']: line for line in read_steps(f'{run.folder}/log.jsonl')}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(panels), 3.2), layout='constrained')
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            draw_curves(axes, runs, panel.split('+'))
            if not axes.lines:
                raise SystemExit(f'--curves: no run here measured {panel}')
            axes.set_title(panel.replace('+', ', dashed '), fontsize=9)
            axes.set_xlabel('updates')
        figure.axes[0].legend(fontsize=8)
        figure.savefig(f'{out_dir}/curves.png')


# --- pictures ------------------------------------------------------------------------------------
def picture(path):
    """A whole Pillow image; SystemExit if it is missing or damaged."""
    try:
        return Image.open(path).convert('RGB')
    except (OSError, ValueError) as error:
        raise SystemExit(f'{path}: this picture of the run cannot be read ({error})')


def draw_stop(stop, scenes, count):
    """The first scenes at a stop, each as source, drawing and caption -> a Pillow image."""
    from lib.pictures import sheet                          # it imports torch, the page needs none
    lines = [scene['at'][stop.index] for scene in scenes if stop.index in scene['at']]
    items = []
    for line in lines[:count]:
        items.append(([picture(line['source']), picture(line['image'])], line['caption']))
    reward = number(stop.run.evals.get(stop.step, {}).get('reward'))
    heads = (stop.run.name, f'update {stop.step}', f'reward {reward}', 'left: source, right: drawn')
    return sheet(items, 4, heads, side=96)


def write_pictures(folders, png, gif):
    """Writes the watched images to png, as each run left them, and to gif, at every stop."""
    _, stops = read_runs(folders)
    stops = [stop for stop in stops if stop.step in stop.run.samples]
    if not stops:
        raise SystemExit(f'{" ".join(folders)}: no watched images here (key eval_every)')
    scenes = scenes_of(stops)
    if png:
        last = {stop.run: stop for stop in stops}          # of each run the last one stays
        frames = [draw_stop(stop, scenes, 4) for stop in last.values()]
        Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames])).save(png)
    if gif:
        frames = [draw_stop(stop, scenes, 8) for stop in stops]
        palette = frames[-1].quantize(kmeans=3)            # without it rare colours get lost
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
        durations = [400] * (len(frames) - 1) + [2500]     # milliseconds
        frames[0].save(gif, save_all=True, append_images=frames[1:], duration=durations, loop=0)


# --- the page ------------------------------------------------------------------------------------
def write_report(folders, out_dir):
    """Writes the page as out_dir/report.html."""
    runs, stops = read_runs(folders)
    # the demo's report.json has a table of final scores
    tables = [read_json(read_text(f'{folder}/report.json')) for folder in folders]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.ChainableUndefined)
    page = environment.from_string(read_text(f'{ROOT}/tools/report.html')).render(
        runs=runs, stops=stops, scenes=scenes_of(stops), tables=tables, number=number,
        caption_html=caption_html, data_uri=data_uri, curves_svg=curves_svg)
    Path(f'{out_dir}/report.html').write_text(page, encoding='utf-8')


# --- the command line ----------------------------------------------------------------------------
def main(argv):
    if '--help' in argv or '-h' in argv:
        print(__doc__)
        return
    folders, values = [word for word in argv if not word.startswith('-')], dict(keys)
    for word in argv:
        key, _, value = word.removeprefix('--').partition('=')
        if key in keys:
            values[key] = value
        elif word not in folders:
            raise ConfigError(f'expected folders, or --key=value with one of the keys '
                              f'{" ".join(keys)}; got {word!r}')
    if not folders:
        raise ConfigError('expected a folder of runs, for example out/demo, or several runs')
    out_dir = values['out_dir'] or folders[-1]
    os.makedirs(out_dir, exist_ok=True)
    if values['png'] or values['gif']:
        write_pictures(folders, values['png'], values['gif'])
    elif values['curves']:
        write_curves(folders, values['curves'], out_dir)
        print(f'{out_dir}/curves.png')
    else:
        write_report(folders, out_dir)
        print(f'{out_dir}/report.html')


if __name__ == '__main__':
    main(sys.argv[1:])
