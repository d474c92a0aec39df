"""Training runs as one page to look at: curves, captions and drawings at every evaluation.

    python tools/report.py out/demo                       # its stages, into out/demo/report.html
    python tools/report.py out/cold_start out/grpo_encoder     # runs in order, into the last one
    python tools/report.py out/demo --gif=assets/loop.gif      # a moving picture instead
    python tools/report.py out/a out/b --png=sheet.png         # or how each run drew in the end

The page is one file without a server: images are inside it, and it reads without scripts too.
--out_dir=DIR puts it elsewhere.
"""
import os
import re
import string
import sys
from html import escape

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from config import ConfigError, literal
from tools.page import scenes
from tools.page.curves import curves_html
from tools.page.gif import write_gif
from tools.page.png import write_png
from tools.page.groups import groups_html
from tools.page.pictures import loop_images
from tools.page.runs import number, read_json, read_runs, scenes_of, stops_of

# --- script keys ---------------------------------------------------------------------------------
keys = dict(
    out_dir = '',              # where report.html goes; '' = the last of the folders given
    gif = '',                  # a path: write a moving picture there instead of the page
    png = '',                  # or a sheet: the watched images as each run left them
)
# -------------------------------------------------------------------------------------------------
PAGE = os.path.join(ROOT, 'tools', 'page')
DOES = dict(
    pretrain_decoder='the decoder learns to draw captions',
    cold_start='encoder and decoder learn to understand each other',
    grpo_encoder='the encoder learns what to say',
    grpo_decoder='the decoder learns to draw better')
LOOP_LABEL = ('The image x goes through the encoder, which writes the caption y. Projector and '
              'decoder draw x̂ from y alone. R compares x and x̂.')
TABLE = '''<section id="table">
<h2>Final scores</h2>
<p>All held-out scenes after each stage; the curves above score fewer of them. <i>Base</i> is the
model before these stages, <i>ceiling</i> the best that can be: the source through the VAE alone.
{control}</p>
<div class="wide" tabindex="0" role="region" aria-label="table of final scores">
<table><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table></div>
</section>'''
CONTROL = ('<i>Rewards shuffled</i> is a control: a shorter stage 2 whose captions got the rewards '
           'of other captions. What changes there, changes by chance.')
LABELS = dict(                 # rows of the table, by measure; others have the measure's own name
    mse='pixel error, lower is better', caption_len='tokens per caption',
    caption_truth='truth, sampled captions', caption_recall='recall, sampled captions',
    caption_exact='full captions, sampled', greedy_caption_len='tokens per greedy caption',
    greedy_caption_truth='truth, greedy captions', greedy_caption_recall='recall, greedy captions',
    greedy_caption_exact='full captions, greedy', t2i_own='t2i, own captions',
    t2i_true='t2i, true captions')
GAINS = dict(reward='reward', judge='judge', caption_len='tokens per caption')


# --- sections ------------------------------------------------------------------------------------
def progress(run, steps):
    """How far a run came; steps: those of its stops."""
    if not steps:
        return 'no evaluations'
    if steps[-1] < run.planned:
        return f'unfinished: {steps[-1]} of {run.planned} updates'
    return f'{steps[-1]} updates'


def gains(run, steps):
    """The scores that a run changed, from its first stop to its last: ['judge 0.56 → 0.80']."""
    evals = [run.evals[step] for step in steps if step in run.evals]
    found = []
    for field, label in GAINS.items():
        values = [number(line[field]) for line in evals if field in line]
        if values and values[0] != values[-1]:
            found.append(f'{label} {values[0]} → {values[-1]}')
    return found


def runs_html(runs, stops):
    """What was run, how far it came, and what it changed."""
    lines = []
    for place, run in enumerate(runs):
        steps = [stop.step for stop in stops if stop.run == place]
        words = [progress(run, steps)]
        does = DOES.get(run.script or run.name)
        if does:
            words.insert(0, does)
        lines.append(f'<li><b>{escape(run.name)}</b> <span>{" · ".join(words)}</span>'
                     f'<span class="gains">{" · ".join(gains(run, steps))}</span></li>')
    return ''.join(lines)


def keys_html(runs):
    """The changed keys of every run."""
    tables = []
    for run in runs:
        rows = []
        for key, value in (run.changed or {}).items():
            name, value = escape(str(key)), escape(str(value))
            rows.append(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>')
        if run.changed is None:
            rows.append('<tr><td>it left no config.json</td></tr>')
        elif not rows:
            rows.append('<tr><td>every key has its default</td></tr>')
        tables.append(f'<table><caption>{escape(run.name)}</caption>{"".join(rows)}</table>')
    return ''.join(tables)


def table_columns(report):
    """{column: {measure: score}} of the demo's report.json; {} if it has no stages."""
    columns = dict(report.get('stages') or {})
    if not columns:
        return {}
    controls = report.get('controls') or {}
    if 'shuffled_reward' in controls:
        columns['rewards shuffled'] = controls['shuffled_reward']
    ceiling = dict(report.get('ceiling') or {})
    for name in ('t2i_own', 't2i_true'):                # one ceiling, whoever wrote the caption
        ceiling[name] = ceiling.get('t2i')
    columns['ceiling'] = ceiling
    return columns


def table_html(folders):
    """The demo's table of final scores; '' where no folder has a report.json."""
    columns = {}
    for folder in folders:
        columns = columns or table_columns(read_json(f'{folder}/report.json'))
    if not columns:
        return ''
    head = [f'<th scope="col">{escape(name)}</th>' for name in columns]
    rows = []
    for field in next(iter(columns.values())):
        cells = [f'<td>{number(column.get(field), 3)}</td>' for column in columns.values()]
        label = escape(LABELS.get(field, field))
        rows.append(f'<tr><th scope="row">{label}</th>{"".join(cells)}</tr>')
    control = ''
    if 'rewards shuffled' in columns:
        control = CONTROL
    return TABLE.format(control=control, head=''.join(head), rows=''.join(rows))


# --- the page ------------------------------------------------------------------------------------
def read_own(name):
    """One of the files that the page is made from."""
    with open(os.path.join(PAGE, name), encoding='utf-8') as f:
        return f.read()


def page(folders):
    """The whole page as a string; folders as `find_runs` takes them."""
    runs = read_runs(folders)
    stops = stops_of(runs)
    watched = scenes_of(runs, stops)
    curves = curves_html(runs, stops)
    curves_hint = 'Click into a curve or press the arrow keys: everything below follows.'
    if not curves:
        curves_hint = 'These runs have not evaluated yet.'
    return string.Template(read_own('page.html')).substitute(
        style=read_own('page.css'), script=read_own('page.js'),
        names=escape(', '.join(run.name for run in runs)), runs=runs_html(runs, stops),
        loop_label=LOOP_LABEL, **loop_images(watched),
        curves=curves, curves_hint=curves_hint, slider=scenes.slider_html(runs, stops),
        scenes=scenes.scenes_html(watched, runs, stops), scenes_hint=scenes.hint(watched),
        groups=groups_html(runs, stops), keys=keys_html(runs), table=table_html(folders))


def write_report(folders, path):
    """Writes the page about some runs, or about a folder of the demo, to a path.

    Raises SystemExit in one line where a folder has no run.
    """
    text = page(folders)
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with open(path, 'w', encoding='utf-8') as f:
        f.write(text)


# --- the command line ----------------------------------------------------------------------------
def read_arguments(argv):
    """-> (folders, {key: value}); raises ConfigError in one line."""
    folders, values = [], dict(keys)
    for argument in argv:
        match = re.fullmatch(r'--(\w+)=(.*)', argument, re.S)
        if not match:
            if argument.startswith('-'):
                raise ConfigError(f'expected folders and --key=value, got {argument!r}')
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
    if values['gif'] and values['png']:
        raise ConfigError('--gif and --png: one at a time')
    path = os.path.join(values['out_dir'] or folders[-1], 'report.html')
    write = write_report
    if values['gif']:
        path, write = values['gif'], write_gif
    elif values['png']:
        path, write = values['png'], write_png
    write(folders, path)
    print(path)


if __name__ == '__main__':
    main(sys.argv[1:])
