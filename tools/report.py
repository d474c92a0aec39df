"""Training runs as one page to look at: curves, captions and drawings at every evaluation.

    python tools/report.py out/demo                       # its stages, into out/demo/report.html
    python tools/report.py out/cold_start out/grpo_encoder     # runs in order, into the last one
    python tools/report.py out/demo --gif=assets/loop.gif      # a moving picture instead

The page is one file without a server: images are inside it, and it reads without scripts too.
--out_dir=DIR puts it elsewhere.
"""
import base64
import io
import os
import re
import string
import sys
from html import escape

from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from config import ConfigError, literal
from tools.report_curves import curves_html
from tools.report_data import finite, number, read_json, read_runs, scenes_of, stops_of
from tools.report_gif import write_gif
from tools.report_words import SHADES, caption_html, closed_up, tokens_html

# --- script keys ---------------------------------------------------------------------------------
keys = dict(
    out_dir = '',              # where report.html goes; '' = the last of the folders given
    gif = '',                  # a path: write a moving picture there instead of the page
)
# -------------------------------------------------------------------------------------------------
HERE = os.path.dirname(os.path.abspath(__file__))
SMALL = 64                     # pixels: images up to this size stay as they are, square by square
LARGE = 256                    # pixels: larger ones are made as small as this
LOOP_PLACES = dict(            # left and top of the two images in the drawings of the loop
    x=dict(wide=(26, 22), narrow=(38, 26)),
    x_hat=dict(wide=(744, 22), narrow=(38, 272)))
LOOP_LABEL = ('The image x goes through the encoder, which writes the caption y. Projector and '
              'decoder draw x̂ from y alone. R compares x and x̂.')
DOES = dict(
    pretrain_decoder='the decoder learns to draw captions',
    cold_start='encoder and decoder learn to understand each other',
    grpo_encoder='the encoder learns what to say',
    grpo_decoder='the decoder learns to draw better')


# --- pieces --------------------------------------------------------------------------------------
def data_uri(path):
    """An image file -> (its content as a URI, width, height); None if it cannot be read."""
    try:
        with open(path, 'rb') as f:
            content = f.read()
        image = Image.open(io.BytesIO(content))
        image.load()
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    kind = 'png'
    if max(image.size) > SMALL or image.format != 'PNG':
        image = image.convert('RGB')
        image.thumbnail((LARGE, LARGE))
        kind = 'webp'
        if max(image.size) <= SMALL:
            kind = 'png'
        buffer = io.BytesIO()
        image.save(buffer, kind, quality=80)
        content = buffer.getvalue()
    encoded = base64.b64encode(content).decode()
    return f'data:image/{kind};base64,{encoded}', *image.size


def picture(path, alt):
    """An <img> with the image inside it, or a box that says that there is none."""
    found = data_uri(path)
    if not found:
        return '<span class="picture missing">no image</span>'
    uri, width, height = found
    pixels = ''
    if max(width, height) <= SMALL:
        pixels = ' pixels'
    return (f'<img class="picture{pixels}" width="{width}" height="{height}" '
            f'alt="{escape(alt)}" src="{uri}">')


def at_stop(stop):
    """The class and the place of something that is seen at one stop alone."""
    shown = ''
    if stop.edge:
        shown = ' edge'
    return f'class="stop{shown}" data-stop="{stop.index}"'


def stop_label(stop, runs):
    """'grpo_encoder, update 40 of 100'."""
    run = runs[stop.run]
    of = ''
    if run.planned:
        of = f' of {run.planned}'
    return f'{run.name}, update {stop.step}{of}'


# --- sections ------------------------------------------------------------------------------------
def runs_html(runs, stops):
    """What was run, and how far it came."""
    lines = []
    for index, run in enumerate(runs):
        does = DOES.get(run.script or run.name, '')
        last = max((stop.step for stop in stops if stop.run == index), default=None)
        came = f'{last} updates'
        if last is None:
            came = 'no evaluations'
        elif last < run.planned:
            came = f'unfinished: {last} of {run.planned} updates'
        words = ' · '.join(filter(None, (escape(does), came)))
        lines.append(f'<li><b>{escape(run.name)}</b> <span>{words}</span></li>')
    return ''.join(lines)


def loop_images(scenes):
    """{name in the template: <image>}: the first watched image stands for x in the loop."""
    values = dict(x_wide='', x_narrow='', x_hat_wide='', x_hat_narrow='')
    if not scenes:
        return values
    scene = scenes[0]
    last = scene.at[max(scene.at)]
    for name, path in (('x', scene.source), ('x_hat', last['image'])):
        found = data_uri(path)
        for size, (left, top) in LOOP_PLACES[name].items():
            if found:
                values[f'{name}_{size}'] = (f'<image href="{found[0]}" x="{left}" y="{top}" '
                                            f'width="80" height="80"/>')
    return values


def slider_html(runs, stops):
    """The bar that stays in sight: where we are, the slider, and the stages to jump to."""
    if not stops:
        return ''
    labels, buttons = [], []
    for stop in stops:
        run = runs[stop.run]
        of = ''
        if run.planned:
            of = f' of {run.planned}'
        labels.append(f'<span data-stop="{stop.index}"><b>{escape(run.name)}</b> '
                      f'update {stop.step}{of}</span>')
    for index, run in enumerate(runs):
        own = [stop.index for stop in stops if stop.run == index]
        if own:
            buttons.append(f'<button type="button" style="flex-grow: {len(own)}" '
                           f'data-first="{own[0]}" data-final="{own[-1]}">'
                           f'{escape(run.name)}</button>')
    return (f'<div id="bar" role="group" aria-label="choose an update">'
            f'<div class="row"><p id="where">{"".join(labels)}</p>'
            f'<button type="button" id="play">Play</button></div>'
            f'<input type="range" id="stop" autocomplete="off" min="0" max="{len(stops) - 1}" '
            f'value="{len(stops) - 1}" aria-label="update">'
            f'<div id="stages">{"".join(buttons)}</div></div>')


def sample_html(stop, runs, sample, before):
    """One watched image at one stop."""
    image = picture(sample['image'], f'reconstruction: {sample.get("caption", "")}')
    caption = caption_html(sample.get('caption', ''), before, sample.get('false') or ())
    scores = [f'{name} {number(sample[name])}' for name in ('reward', 'judge') if name in sample]
    when = f'came back<span class="then">: {escape(stop_label(stop, runs))}</span>'
    return (f'<figure {at_stop(stop)}><p class="when">{when}</p>{image}'
            f'<figcaption><p class="caption">{caption}</p>'
            f'<p class="scores">{" · ".join(scores)}</p></figcaption></figure>')


def scene_html(scene, runs, stops):
    """One watched image: its source once, and what came back at every stop."""
    figures, before, truth = [], None, ''
    for stop in stops:
        sample = scene.at.get(stop.index)
        if sample is None:
            figures.append(f'<p data-stop="{stop.index}" class="absent">not watched here</p>')
            continue
        figures.append(sample_html(stop, runs, sample, before))
        before = sample.get('caption', '')
        truth = sample.get('truth') or truth
    style = 'scene plain'
    if truth:
        style = 'scene'
        truth = f'<p class="truth">{closed_up(escape(str(truth)))}</p>'
    source = picture(scene.source, f'source: {scene.name}')
    return (f'<article class="{style}"><figure class="source"><p class="when">source</p>{source}'
            f'<figcaption>{truth}</figcaption></figure>{"".join(figures)}</article>')


def sort_key(member):
    reward = member.get('reward')
    if not finite(reward):
        return -float('inf')
    return reward


def bar_html(advantage, most):
    """A bar from the middle, negative to the left, `most` filling one half; and the number."""
    value = 0.0
    if finite(advantage):
        value = advantage
    share = 50 * abs(value) / most
    side, sign = 'left', 'plus'
    if value < 0:
        side, sign = 'right', 'minus'
    shown = f'{value:+.2f}'.replace('-', '−')
    return (f'<span class="bar"><i class="{sign}" style="{side}: 50%; width: {share:.1f}%"></i>'
            f'</span><b>{shown}</b>')


def member_html(member, place, run, most):
    """One attempt of a group: its reward, its advantage, and what it is."""
    bar = bar_html(member.get('adv'), most)
    reward = f'<span class="reward">{number(member.get("reward"))}</span>'
    if 'image' in member:
        path = os.path.join(run.folder, member['image'] or '')
        image = picture(path, f'drawing {place + 1} of the group')
        return f'<li class="drawing">{image}{reward}{bar}</li>'
    return f'<li class="words">{reward}{bar}<span class="tokens">{tokens_html(member)}</span></li>'


def group_html(stop, runs, edge):
    """The opened group of one stop, the best first."""
    run = runs[stop.run]
    group = run.groups[stop.step]
    members = sorted(group.get('members') or [], key=sort_key, reverse=True)
    sizes = [abs(member['adv']) for member in members if finite(member.get('adv'))]
    most = max(sizes, default=0) or 1
    kind = 'words'
    if group.get('kind') == 'drawings':
        kind = 'drawings'
    rows = [member_html(member, place, run, most) for place, member in enumerate(members)]
    shown = ''
    if edge:
        shown = ' edge'
    caption = ''
    if group.get('caption'):
        caption = f'<p class="caption">{caption_html(group["caption"])}</p>'
    source = picture(os.path.join(run.folder, group.get('source') or ''), 'the image of the group')
    when = f'source<span class="then">: {escape(stop_label(stop, runs))}</span>'
    head = f'<li class="head"><span>reward</span><span>advantage</span><span>{LEGEND}</span></li>'
    if kind == 'drawings':
        head = ''
    return (f'<div class="stop group{shown}" data-stop="{stop.index}">'
            f'<figure class="source"><p class="when">{when}</p>{source}'
            f'<figcaption>{caption}</figcaption></figure>'
            f'<ol class="members {kind}">{head}{"".join(rows)}</ol></div>')


SWATCHES = ''.join(f'<i class="shade{k}"></i>' for k in range(SHADES + 1))
LEGEND = f'tokens: certain <span class="swatches">{SWATCHES}</span> probability .01 or less'
NO_GROUP = 'No group here: groups open after an update of stage 2 or 3.'


def groups_html(runs, stops):
    """The groups of all stops."""
    opened = {}
    for stop in stops:
        if stop.step in runs[stop.run].groups:
            opened.setdefault(stop.run, []).append(stop)
    if not opened:
        return '<p class="none">No run here opened a group.</p>'
    parts = []
    for stop in stops:
        own = opened.get(stop.run, [])
        if stop in own:
            parts.append(group_html(stop, runs, stop in (own[0], own[-1])))
        else:
            parts.append(f'<p class="stop none" data-stop="{stop.index}">{NO_GROUP}</p>')
    return ''.join(parts)


def keys_html(runs):
    """The changed keys of every run."""
    parts = []
    for run in runs:
        if run.changed is None:
            rows = '<tr><td>it left no config.json</td></tr>'
        elif not run.changed:
            rows = '<tr><td>every key has its default</td></tr>'
        else:
            rows = ''.join(f'<tr><th scope="row">{escape(str(key))}</th>'
                           f'<td>{escape(str(value))}</td></tr>'
                           for key, value in run.changed.items())
        parts.append(f'<table><caption>{escape(run.name)}</caption>{rows}</table>')
    return ''.join(parts)


def table_html(folders):
    """The demo's table of final scores; '' without a report.json."""
    report = {}
    for folder in folders:
        report = report or read_json(f'{folder}/report.json')
    columns = dict(report.get('stages') or {})
    if not columns:
        return ''
    shuffled = (report.get('controls') or {}).get('shuffled_reward')
    if shuffled:
        columns['rewards shuffled'] = shuffled
    ceiling = report.get('ceiling') or {}
    columns['ceiling'] = dict(ceiling, t2i_own=ceiling.get('t2i'), t2i_true=ceiling.get('t2i'))
    head = ''.join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    rows = []
    for field in next(iter(columns.values())):
        cells = ''.join(f'<td>{number(column.get(field))}</td>' for column in columns.values())
        rows.append(f'<tr><th scope="row">{escape(field)}</th>{cells}</tr>')
    return string.Template(TABLE).substitute(head=head, rows=''.join(rows))


TABLE = '''<section id="table">
<h2>Final scores</h2>
<p>All held-out scenes after each stage. Read a row from left to right: each stage should come
closer to the ceiling, which is what the VAE alone loses.</p>
<div class="wide" tabindex="0" role="region" aria-label="table of final scores">
<table><thead><tr><td></td>$head</tr></thead><tbody>$rows</tbody></table></div>
</section>'''


# --- the page ------------------------------------------------------------------------------------
def read_own(name):
    with open(os.path.join(HERE, name), encoding='utf-8') as f:
        return f.read()


def fill(name, values):
    """One of the templates beside this file, with its $names replaced."""
    return string.Template(read_own(name)).substitute(values)


def page(folders):
    """The whole page as a string; folders as `find_runs` takes them."""
    runs = read_runs(folders)
    stops = stops_of(runs)
    scenes = scenes_of(runs, stops)
    curves_hint = 'Click into a curve or press the arrow keys: everything below follows.'
    curves = curves_html(runs, stops)
    if not curves:
        curves_hint = 'These runs have not evaluated yet.'
    scenes_hint = ('Left the source, right what came back from the caption below it. '
                   '<mark>Marked</mark> words are new since the stop before.')
    if any(sample.get('false') for scene in scenes for sample in scene.at.values()):
        scenes_hint += ' <del>Struck out</del> phrases are false.'
    if not scenes:
        scenes_hint = 'These runs watched no images (key <code>watch</code>).'
    return fill('report.html', dict(
        names=escape(', '.join(run.name for run in runs)), runs=runs_html(runs, stops),
        style=read_own('report.css'), script=read_own('report.js'), loop_label=LOOP_LABEL,
        curves=curves, curves_hint=curves_hint, slider=slider_html(runs, stops),
        scenes=''.join(scene_html(scene, runs, stops) for scene in scenes),
        scenes_hint=scenes_hint, groups=groups_html(runs, stops), keys=keys_html(runs),
        table=table_html(folders), **loop_images(scenes)))


def write_report(folders, path):
    """Writes the page about some runs, or about a folder of the demo, to a path."""
    text = page(folders)
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with open(path, 'w', encoding='utf-8') as f:
        f.write(text)


def read_arguments(argv):
    """-> (folders, {key: value}); raises ConfigError in one line."""
    folders, values = [], dict(keys)
    for argument in argv:
        match = re.fullmatch(r'--(\w+)=(.*)', argument, re.S)
        if not match and argument.startswith('-'):
            raise ConfigError(f'expected folders and --key=value, got {argument!r}')
        if not match:
            folders.append(argument)
            continue
        key, text = match.groups()
        if key not in keys:
            raise ConfigError(f'unknown key {key!r}; the keys are: {" ".join(keys)}')
        values[key] = literal(key, keys[key], text)
    if not folders:
        raise ConfigError('expected a folder of runs, for example out/demo, or several runs')
    return folders, values


def main(argv):
    if '--help' in argv or '-h' in argv:
        print(__doc__)
        return
    folders, values = read_arguments(argv)
    if values['gif']:
        write_gif(folders, values['gif'])
        print(values['gif'])
        return
    path = os.path.join(values['out_dir'] or folders[-1], 'report.html')
    write_report(folders, path)
    print(path)


if __name__ == '__main__':
    main(sys.argv[1:])
