"""`make reca`: what reconstruction alignment (reca.py) gains, and when.

RecA shows the decoder images in a caption's place. What it learns there reaches captions as far as
the language model's states of images and of words are alike. Here that is a number: bases whose
vision tower was pulled to words for more or fewer updates (pretrain.py), and a probe that learns
from words and is asked about images. Their one decoder has seen brief captions alone.

    python data/shapes/shared.py                # one base and its table
    python data/shapes/shared.py --pulled=0,100,200,400,800 --seeds=3   # the law, law.png

Stopped half-way it goes on with the run that it was at; delete out_dir to start anew.
"""
import contextlib
import json
import os
import shutil
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from data.shapes import demo                    # first: it sets how threads wait
import numpy as np
import torch
import torch.nn.functional as F

import cold_start
import eval_t2i
import pretrain_decoder
import reca
from bench.summary import markdown
from config import parse
from data.images import open_data
from data.shapes import pretrain
from data.shapes import scenes as world
from lib import ranks
from lib.checkpoint import open_uae
from lib.files import write_json
from lib.scores import Evaluator

# --- script keys ---------------------------------------------------------------------------------
keys = dict(
    pulled = '800',            # updates of the pull to words, comma-separated: a base each
    seeds = 1,                 # runs from the last base; one from each of the others
    reca_steps = 600,          # updates; those of the controls take the same seconds
    terse_steps = 660,
    cold_steps = 210,
    scenes = 256,              # held-out scenes of the evaluations
    geneval = True,            # also GenEval's columns
    shorten = 1,               # divides every number of updates, those of the base too
)
limits = dict.fromkeys(
    ('seeds', 'reca_steps', 'terse_steps', 'cold_steps', 'scenes', 'shorten'), (1, 1e6))
# -------------------------------------------------------------------------------------------------
# of RecA and of more brief captions: the base's batches, a third of its learning rate
TRAINED = ('--batch=32', '--lr=5e-4', '--lr_decay=1.0', '--warmup=0')
FACTS = ('size', 'colour', 'shape')


# --- how much images share with words ------------------------------------------------------------
def probe(words, images, ridge=0.1):
    """Share of right answers about images of a linear probe that learnt from words alone.

    words: states (n, d) and what they are, n numbers of classes; images: the same of others.
    """
    (h, learnt), (seen, true) = words, images
    target = F.one_hot(learnt).float()
    bias, mean = target.mean(0), h.mean(0)
    h, seen = h - mean, seen - mean
    weights = torch.linalg.solve(h.T @ h + ridge * torch.eye(h.shape[1]), h.T @ (target - bias))
    return ((seen @ weights + bias).argmax(1) == true).float().mean().item()


@torch.no_grad()
def object_states(uae, features, scenes):
    """Mean state of each object's four places, and {fact: (n,)} what it is, as numbers.

    features (n, 16, d) of these scenes, in a caption's place.
    """
    start = len(uae.encoder.before_text)
    states = uae.encoder.image_as_text(dict(features=features))[:, start:start + 16]
    states = states.unflatten(1, (4, 4)).mean(2)                # (n, cells, d)
    kept, facts = [], {name: [] for name in FACTS}
    for scene, cells in zip(scenes, states):
        for thing in scene.objects:
            kept.append(cells[world.CELLS.index(thing.cell)])
            for name in FACTS:
                facts[name].append(list(world.VALUES[name]).index(getattr(thing, name)))
    return torch.stack(kept), {name: torch.tensor(values) for name, values in facts.items()}


def shared_space(uae, n=1024):
    """{fact: the probe's right answers}: n training scenes in words, held-out ones as images."""
    train, held = world.splits()
    told = uae.encoder.embed(pretrain.in_words(uae, train[:n]))
    h, learnt = object_states(uae, told, train[:n])
    seen, true = object_states(uae, uae.encoder.see(pretrain.pixels(held))['features'], held)
    return {name: probe((h, learnt[name]), (seen, true[name])) for name in FACTS}


# --- runs and their scores -----------------------------------------------------------------------
def once(path, make):
    """make() -> a dict, kept in a file: a second call reads it."""
    if not os.path.exists(path):
        write_json(path, make())
    with open(path) as f:
        return json.load(f)


def score(uae_flags, config, held, with_probe=False):
    """What an evaluation says of the UAE that these flags open."""
    opened = parse({}, {}, uae_flags, 'eval_unified.py')
    uae = open_uae(opened)
    summary, _ = Evaluator(uae, held, opened, ranks.start(opened))()
    if with_probe:
        summary.update(shared_space(uae))
    if config.geneval:
        out = f'{config.out_dir}/geneval'
        shutil.rmtree(out, ignore_errors=True)
        eval_t2i.main([*uae_flags, f'--out_dir={out}'])
        name = eval_t2i.name_of(opened.init_from)
        with open(f'{out}/shapes/{name}/summary.json') as f:
            summary['geneval'] = json.load(f)['columns']['overall']
    return summary


def pretrain_parts(parts, out, config, **updates):
    """Parts of pretrain.py, with numbers of updates other than its own -> CPU seconds."""
    flags = [f'--parts={parts}', f'--out_dir={out}', f'--seed={config.seed}']
    for part in parts.split(','):
        number = updates.get(part, pretrain.keys[f'{part}_steps'])
        flags.append(f'--{part}_steps={max(1, number // config.shorten)}')
    start = time.process_time()
    pretrain.main([*flags, f'--decoder_images={max(64, 8192 // config.shorten)}'])
    return time.process_time() - start


def pretrain_base(pulled, parts, config, held):
    """The base whose tower was pulled for so many updates -> the flags that open it, its scores.

    parts: of pretrain.py, for a tower that is pulled at all.
    """
    terse, base = f'{config.out_dir}/terse', f'{config.out_dir}/pulled_{pulled}'
    flags = [f'--encoder={base}/encoder', f'--decoder={base}/decoder']

    def make_terse():
        shutil.rmtree(f'{terse}_stage0', ignore_errors=True)
        return dict(seconds=pretrain_parts('terse', terse, config))

    def make():
        shutil.copytree(terse, base, dirs_exist_ok=True)
        seconds = 0
        if pulled:
            seconds = pretrain_parts(parts, base, config, tower=pulled)
        return dict(score(flags, config, held, with_probe=True), pretrained=seconds)

    once(f'{terse}.json', make_terse)
    return flags, once(f'{base}.json', make)


def train(name, script, steps, flags, base_flags, seed, config, held):
    """One run from a base, scored -> a row: the evaluation, updates and CPU seconds."""
    images = [f'--data={config.out_dir}/terse_stage0/manifest.jsonl']

    def run():
        out = f'{config.out_dir}/{name}'
        shutil.rmtree(out, ignore_errors=True)
        updates = max(1, steps // config.shorten)
        start = time.process_time()
        script.main([*base_flags, *images, *flags, f'--steps={updates}', f'--seed={seed}',
                     '--eval_every=0', f'--out_dir={out}'])
        seconds = time.process_time() - start
        row = score([*base_flags, f'--init_from={out}'], config, held)
        return dict(row, steps=updates, seconds=seconds)

    return once(f'{config.out_dir}/{name}.json', run)


# --- table and picture ---------------------------------------------------------------------------
COLUMNS = ('greedy_caption_truth', 'greedy_caption_recall', 't2i_own', 't2i_true', 'geneval')


def gains(control):
    """The scores that RecA is there for, of those that were measured."""
    return [field for field in ('t2i_true', 'geneval') if field in control[0]]


def mean_of(rows, field):
    return np.mean([row[field] for row in rows])


def mean_and_error(rows, field):
    """'mean ± standard error' of a field over seeds; one seed has no error."""
    values = [row[field] for row in rows if field in row]
    if not values:
        return ''
    text = f'{np.mean(values):.3f}'
    if len(values) > 1:
        text += f' ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}'
    return text


def table(runs):
    """What became of a base at equal seconds; runs: {name: rows, one a seed}, the base first."""
    shown = {}
    for name, rows in runs.items():
        shown[name] = {'updates': '', 'CPU seconds': ''}
        if 'seconds' in rows[0]:
            seconds = np.mean([row['seconds'] for row in rows])
            shown[name] = {'updates': str(rows[0]['steps']), 'CPU seconds': f'{seconds:.0f}'}
        shown[name].update({field: mean_and_error(rows, field) for field in COLUMNS})
    return markdown('', shown)


def law(bases, aligned, control):
    """Per base the probe, and what RecA makes of it: t2i of true captions and GenEval's columns."""
    shown = {}
    for pulled, base in bases.items():
        row = {f'probe: {name}': f'{base[name]:.2f}' for name in FACTS}
        for field in gains(control):
            gain = mean_of(aligned[pulled], field) - mean_of(control, field)
            row[field] = f'{base[field]:.3f}'
            row[f'{field} after RecA'] = mean_and_error(aligned[pulled], field)
            row[f'{field} over the control'] = f'{gain:+.3f}'
        shown[str(pulled)] = row
    return markdown('updates of the pull', shown)


def draw_law(bases, aligned, control, path):
    """The scores after RecA, a point a run, over the probe's mean right answers."""
    from matplotlib.figure import Figure
    fields = gains(control)
    figure = Figure(figsize=(4.5 * len(fields), 3.4), layout='constrained')
    titles = dict(t2i_true='t2i of true captions', geneval="GenEval's columns")
    for axes, field in zip(np.atleast_1d(figure.subplots(1, len(fields))), fields):
        points = []
        for pulled, rows in aligned.items():
            known = np.mean([bases[pulled][name] for name in FACTS])
            points.extend((known, row[field]) for row in rows)
        axes.scatter(*zip(*points), label='RecA', zorder=3)
        axes.axhline(mean_of(bases.values(), field), color='0.6', label='base')
        axes.axhline(mean_of(control, field), color='0.3', ls='--',
                     label='more brief captions, as many seconds')
        axes.set_xlabel('probe: learnt from words, right about images')
        axes.set_ylabel(titles[field])
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def run_all(config, held):
    """Every base and every run.

    Returns {pulled: a base's scores}, {pulled: RecA's rows}, the rows of more captions, and those
    of the cold start.
    """
    seeds = range(config.seed, config.seed + config.seeds)
    bases, aligned = {}, {}
    *others, last = map(int, config.pulled.split(','))
    for pulled in (*others, last):
        # only through the last tower does the language model learn to caption: RecA needs none
        parts = 'tower,reader' if pulled == last else 'tower'
        flags, bases[pulled] = pretrain_base(pulled, parts, config, held)
        alike = ['--lambda_t2i=0', *TRAINED]
        runs = seeds if pulled == last else seeds[:1]
        aligned[pulled] = [train(f'reca_{pulled}_{seed}', reca, config.reca_steps, alike, flags,
                                 seed, config, held) for seed in runs]
    # from the last base; that of captions alone is the same from all
    brief = ['--train_encoder=False', *TRAINED]
    control = [train(f'brief_{seed}', pretrain_decoder, config.terse_steps, brief, flags, seed,
                     config, held) for seed in seeds]
    cold = [train(f'cold_{seed}', cold_start, config.cold_steps, [], flags, seed, config, held)
            for seed in seeds]
    return bases, aligned, control, cold


def main(argv):
    config = parse(keys, {}, argv, __file__, limits)
    config.eval_images = config.scenes
    os.makedirs(config.out_dir, exist_ok=True)
    _, held = open_data(config, ranks.start(config))
    # the lines of all runs go to a file, their progress bars to the screen
    with open(f'{config.out_dir}/log.txt', 'a') as f, contextlib.redirect_stdout(f):
        bases, aligned, control, cold = run_all(config, held)
    last = list(bases)[-1]
    runs = {'base': [bases[last]], 'more brief captions': control, 'cold start': cold,
            'RecA': aligned[last]}
    text = f'{table(runs)}\n{law(bases, aligned, control)}'
    with open(f'{config.out_dir}/table.md', 'w') as f:
        f.write(text)
    if len(bases) > 1:
        draw_law(bases, aligned, control, f'{config.out_dir}/law.png')
    print(text)


if __name__ == '__main__':
    main(sys.argv[1:])
