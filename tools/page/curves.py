"""The evaluations of all runs side by side, as drawings in SVG.

Each run has a width by its number of stops, as on the slider; within a run updates are to scale.
"""
import math
from html import escape
from typing import NamedTuple

from tools.page.runs import finite, number

WIDTH, HEIGHT = 360, 190       # of a drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 34, 352, 22, 168
GAP = 10                       # between two runs
TEXT_WIDTH = 5.6               # of a letter


class Panel(NamedTuple):
    title: str
    hint: str
    fields: dict               # measure in eval.jsonl -> its label
    least: float               # the scale has to hold these two
    most: float


PANELS = (
    Panel('Reward and judge',
          'How alike source and reconstruction are, 1 is equal. The reward is trained on. The '
          'judge is another network that no training sees. If the reward rises and the judge does '
          'not, the model exploits the reward.',
          dict(reward='reward', judge='judge'), math.nan, math.nan),
    Panel('Caption length',
          'Tokens of a caption. Nothing rewards length: captions grow where words help to draw.',
          dict(caption_len='tokens'), 0, math.nan),
    Panel('Recall',
          'The share of a scene’s facts that its captions state. Sampled captions are what is '
          'trained; greedy ones always take the likeliest word.',
          dict(caption_recall='sampled', greedy_caption_recall='greedy'), 0, 1),
    Panel('Truth',
          'The share of a caption’s phrases that are true. Look whether it stays high while '
          'captions grow.',
          dict(caption_truth='sampled', greedy_caption_truth='greedy'), 0, 1),
    Panel('t2i: text to image',
          'The share of facts that come out right in drawings. From true captions it tells whether '
          'the decoder still reads plain language, not only what this encoder writes.',
          dict(t2i_own='own captions', t2i_true='true captions'), 0, 1),
)


# --- where things are ----------------------------------------------------------------------------
def shares(stops):
    """run number -> (left, right) of the share of the width that is its own, in [0, 1].

    As wide as its stops are many. A run without stops has none.
    """
    counts = {}
    for stop in stops:
        counts[stop.run] = counts.get(stop.run, 0) + 1
    found, done = {}, 0
    for run, count in counts.items():
        found[run] = (done / len(stops), (done + count) / len(stops))
        done += count
    return found


class Axis:
    """x of a run's step, between two ends."""

    def __init__(self, stops, left, right, gap):
        self.ends = {}
        width = right - left
        for run, (start, end) in shares(stops).items():
            first = left + start * width
            last = left + end * width
            self.ends[run] = (first + gap / 2, last - gap / 2)
        self.last = {}
        for stop in stops:
            self.last[stop.run] = max(stop.step, self.last.get(stop.run, 0))

    def __call__(self, run, step):
        start, end = self.ends[run]
        last = self.last[run]
        if not last:
            return (start + end) / 2
        return start + (end - start) * step / last


def scale(values, least, most):
    """(low, high) of an axis that holds all values, and least and most where they are given."""
    values = list(values)
    for given in (least, most):
        if finite(given):
            values.append(given)
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.1
    if not finite(least):
        low -= room
    if not finite(most):
        high += room
    return low, high


def ticks(low, high):
    """Two to four round numbers between the ends of an axis."""
    rough = (high - low) / 3.5
    power = 10 ** math.floor(math.log10(rough))
    step = min(unit * power for unit in (1, 2, 5, 10) if unit * power >= rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def lines_of(runs, stops, field):
    """One list of (run, step, value) for each run that measured the field."""
    found = []
    for run in sorted({stop.run for stop in stops}):
        evals = runs[run].evals
        points = [(run, step, evals[step][field])
                  for step in sorted(evals) if finite(evals[step].get(field))]
        if points:
            found.append(points)
    return found


# --- one drawing ---------------------------------------------------------------------------------
def frame(runs, axis, height, low, high):
    """Names of the runs, their first and last update, and the scale."""
    parts = []
    for run, (start, end) in axis.ends.items():
        middle = (start + end) / 2
        name = runs[run].name
        updates = f'{axis.last[run]} updates'
        if len(name) * TEXT_WIDTH > end - start:
            name = str(run + 1)
        if len(updates) * TEXT_WIDTH > end - start:
            updates = str(axis.last[run])
        parts.append(f'<rect class="band" x="{start - GAP / 4:.1f}" y="{TOP}" '
                     f'width="{end - start + GAP / 2:.1f}" height="{BOTTOM - TOP}"/>')
        parts.append(f'<text class="stage" x="{middle:.1f}" y="{TOP - 8}">{escape(name)}</text>')
        parts.append(f'<text class="update" x="{middle:.1f}" y="{BOTTOM + 15}">{updates}</text>')
    for value in ticks(low, high):
        y = f'{height(value):.1f}'
        parts.append(f'<line class="grid" x1="{LEFT + GAP / 4}" x2="{RIGHT - GAP / 4}" '
                     f'y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="scale" x="{LEFT - 4}" y="{y}" dy="3.5">{value:g}</text>')
    return parts


def curve(points, axis, height, style):
    """A line through a run's points."""
    places = [f'{axis(run, step):.1f},{height(value):.1f}' for run, step, value in points]
    line = f'<polyline class="{style}" points="{" ".join(places)}"/>'
    if len(points) == 1:
        x, y = places[0].split(',')
        line = f'<circle class="{style} lone" cx="{x}" cy="{y}" r="2.5"/>'
    return line


def cursor(stop, run, fields, axis, height):
    """The cursor at one stop: a line, and a dot on each curve."""
    x = f'{axis(stop.run, stop.step):.1f}'
    parts = [f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{BOTTOM}"/>']
    for place, field in enumerate(fields):
        value = run.evals.get(stop.step, {}).get(field)
        if finite(value):
            parts.append(f'<circle class="line{place}" cx="{x}" cy="{height(value):.1f}" r="4"/>')
    return f'<g class="cursor" data-stop="{stop.index}">{"".join(parts)}</g>'


def readouts(stops, runs, fields):
    """The legend: each field's name and its number at every stop."""
    items = []
    for place, (field, label) in enumerate(fields.items()):
        values = []
        for stop in stops:
            value = number(runs[stop.run].evals.get(stop.step, {}).get(field))
            last = ''
            if stop is stops[-1]:
                last = ' class="last"'
            values.append(f'<b data-stop="{stop.index}"{last}>{value}</b>')
        items.append(f'<span class="key line{place}">{label} {"".join(values)}</span>')
    return f'<p class="legend">{"".join(items)}</p>'


def panel_html(panel, runs, stops):
    """One panel as a figure; '' if no run measured any of it."""
    curves = {}
    for field in panel.fields:
        lines = lines_of(runs, stops, field)
        if lines:
            curves[field] = lines
    if not curves:
        return ''
    values = [value for lines in curves.values() for points in lines for _, _, value in points]
    low, high = scale(values, panel.least, panel.most)
    axis = Axis(stops, LEFT, RIGHT, GAP)

    def height(value):
        return BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP)

    drawn = frame(runs, axis, height, low, high)
    for place, lines in enumerate(curves.values()):
        drawn += [curve(points, axis, height, f'line{place}') for points in lines]
    drawn += [cursor(stop, runs[stop.run], curves, axis, height) for stop in stops]
    places = ' '.join(f'{axis(stop.run, stop.step):.1f}' for stop in stops)
    fields = {field: panel.fields[field] for field in curves}
    label = f'{panel.title}: curves of {", ".join(fields.values())} over the updates of all stages'
    return (f'<figure class="panel"><h3>{panel.title}</h3>{readouts(stops, runs, fields)}'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}" '
            f'data-places="{places}">{"".join(drawn)}</svg>'
            f'<figcaption>{panel.hint}</figcaption></figure>')


def curves_html(runs, stops):
    """All panels that have something to show."""
    panels = [panel_html(panel, runs, stops) for panel in PANELS]
    return ''.join(panels)
