"""The slider over all stops, and the watched images that follow it.

Everything is in the page once. What carries data-stop is seen at its own stop alone; without
scripts what has the class `edge` is seen: the first and the last stop of each run.
"""
from html import escape

from tools.page.pictures import picture
from tools.page.runs import number
from tools.page.words import caption_html, closed_up


def at_stop(stop, edge, style):
    """The attributes of something that is seen at one stop alone."""
    if edge:
        style = f'{style} edge'
    return f'class="{style}" data-stop="{stop.index}"'


def update_text(stop, run):
    """'update 40 of 100'."""
    if run.planned:
        return f'update {stop.step} of {run.planned}'
    return f'update {stop.step}'


def when_html(what, stop, run):
    """The line above an image; without scripts it says of which stop it is."""
    then = escape(f': {run.name}, {update_text(stop, run)}')
    return f'<p class="when">{what}<span class="then">{then}</span></p>'


# --- the slider ----------------------------------------------------------------------------------
SLIDER = '''<div id="bar" role="group" aria-label="choose an update">
<div class="row"><p id="where">{labels}</p><button type="button" id="play">Play</button></div>
<input type="range" id="stop" autocomplete="off" min="0" max="{last}" value="{last}"
aria-label="update"><div id="stages">{buttons}</div></div>'''


def slider_html(runs, stops):
    """The bar that stays in sight: where we are, the slider, and the stages to jump to."""
    if not stops:
        return ''
    labels = []
    for stop in stops:
        run = runs[stop.run]
        labels.append(f'<span data-stop="{stop.index}"><b>{escape(run.name)}</b> '
                      f'{update_text(stop, run)}</span>')
    buttons = []
    for place, run in enumerate(runs):
        own = [stop.index for stop in stops if stop.run == place]
        if own:
            name = escape(run.name)
            buttons.append(
                f'<button type="button" title="{name}" style="flex-grow: {len(own)}" '
                f'data-first="{own[0]}" data-final="{own[-1]}">{name}</button>')
    return SLIDER.format(
        labels=''.join(labels), last=len(stops) - 1, buttons=''.join(buttons))


# --- watched images ------------------------------------------------------------------------------
def sample_html(stop, run, sample, before):
    """One watched image at one stop; before: its caption at the stop before, or None."""
    caption = sample.get('caption', '')
    image = picture(sample['image'], f'reconstruction: {caption}')
    marked = caption_html(caption, before, sample.get('false') or ())
    scores = [f'{name} {number(sample[name])}' for name in ('reward', 'judge') if name in sample]
    return (f'<figure {at_stop(stop, stop.edge, "stop")}>{when_html("redrawn", stop, run)}'
            f'{image}<figcaption><p class="caption">{marked}</p>'
            f'<p class="scores">{" · ".join(scores)}</p></figcaption></figure>')


def scene_html(scene, runs, stops):
    """One watched image: its source once, and redrawn at every stop."""
    figures, before, truth = [], None, ''
    for stop in stops:
        sample = scene.at.get(stop.index)
        if sample is None:
            figures.append(f'<p data-stop="{stop.index}" class="absent">not watched here</p>')
            continue
        figures.append(sample_html(stop, runs[stop.run], sample, before))
        before = sample.get('caption', '')
        truth = sample.get('truth') or truth
    style = 'scene plain'
    if truth:
        style = 'scene'
        truth = f'<p class="truth">{closed_up(escape(str(truth)))}</p>'
    source = picture(scene.source, f'source: {scene.name}')
    return (f'<article class="{style}"><figure class="source"><p class="when">source</p>{source}'
            f'<figcaption>{truth}</figcaption></figure>{"".join(figures)}</article>')


def hint(scenes):
    """What to look for, as far as it is there."""
    if not scenes:
        return 'These runs watched no images (key <code>watch</code>).'
    samples = [sample for scene in scenes for sample in scene.at.values()]
    parts = ['Left the source, right the image redrawn from the caption below it.']
    if any(sample.get('truth') for sample in samples):
        parts.append('Below the source is its complete caption.')
    parts.append('<mark>Marked</mark> words are new since the stop before.')
    if any(sample.get('false') for sample in samples):
        parts.append('<del>Struck out</del> phrases are false.')
    return ' '.join(parts)


def scenes_html(scenes, runs, stops):
    """All watched images."""
    return ''.join(scene_html(scene, runs, stops) for scene in scenes)
