"""Unified-Bench: image -> caption -> image on held-out images, and how like the source it is.

    python eval_unified.py                                    # the shipped base, on held-out scenes
    python eval_unified.py --init_from=out/grpo_decoder --eval_images=256
    python eval_unified.py --plot=out/grpo_encoder,out/other  # curves of these runs' evaluations
    python eval_unified.py --bench=unified --preset=paper --init_from=out/grpo_decoder \\
        --data=UniBench --eval_temperature=0.7 --seeds=3
    python eval_unified.py --bench=unified --data=UniBench --generated=UniBench/example_image
        # score somebody else's images, or with --captions=FILE draw somebody else's captions

Captions are greedy unless eval_temperature says otherwise; what is measured stands in evaluate.py.

--bench=unified is the paper's benchmark in its official layout, see bench/unified.py. It writes
unified.json with the official script's keys, and report.json with means and standard errors over
seeds. A second run draws what is missing. The encoder sees a reference whole, scaled to
resolution^2 pixels, or with the preset `release` as large as it is.
"""
import json
import os
import sys
import textwrap

import common
import watch
from bench.unified import backbones, match_files, of_seed, over_seeds, rebuild, score_folder
from checkpoint import open_uae
from config import parse
from data.images import image_files, load_picture, open_data
from evaluate import Evaluator

# --- script keys ---------------------------------------------------------------------------------
keys = dict(
    plot = '',                 # run folders A,B: draw their curves; A,B:reward,entropy = only these
    bench = '',                # unified = the paper's Unified-Bench on the references in DATA/Image
    # names in reward.BACKBONES; name=FOLDER takes the weights from there
    backbones = 'clip,longclip,dinov2,dinov3',
    captions = '',             # .jsonl of {"image", "caption"} as sample.py writes: draw these
    generated = '',            # folder of finished reconstructions: score these, load no UAE
    own_size = False,          # the encoder sees a reference at its own size
    seeds = 1,                 # repetitions with other start noise and other sampled captions
)
own_presets = dict(release=dict(own_size=True))
# -------------------------------------------------------------------------------------------------

SHEET_ROWS = 12                # images on a contact sheet
PLOTTED = (                    # without fields of one's own
    'reward', 'judge', 'caption_len', 'caption_truth', 'caption_recall', 'greedy_caption_truth',
    'greedy_caption_recall', 't2i_own', 't2i_true')


# --- pictures ------------------------------------------------------------------------------------
def contact_sheet(columns, texts, path):
    """PNG of N rows: images beside a text. columns: lists of N images (3, H, W); texts: N."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    width, height = 3 * len(columns) + 3, 1.5 * len(texts)
    fig, axes = plt.subplots(len(texts), len(columns) + 1, figsize=(width, height), squeeze=False)
    for i, text in enumerate(texts):
        for ax, images in zip(axes[i], columns):
            image = images[i].permute(1, 2, 0).cpu().clamp(-1, 1)
            ax.imshow(((image + 1) / 2).numpy(), interpolation='nearest')
        plain = text.replace('$', r'\$')                     # no mathematics
        axes[i, -1].text(0, 0.5, plain, va='center', fontsize=8, wrap=True)
        for ax in axes[i]:
            ax.axis('off')
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def read_curves(folder):
    """A run's logs -> {field: (steps, values)}; of eval.jsonl where both logs have the field."""
    curves = {}
    for kind in ('log', 'eval'):
        path = f'{folder}/{kind}.jsonl'
        if not os.path.exists(path):
            raise SystemExit(f'--plot: no {path}')
        with open(path) as f:
            lines = [json.loads(line) for line in f]
        steps = [line['step'] for line in lines]
        for field in lines[0]:
            curves[field] = steps, [line[field] for line in lines]
    return curves


def plot_runs(folders, fields, path):
    """PNG of curves over updates, one panel a field, one line a run; no fields: `PLOTTED`."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    runs = {}
    for folder in folders:
        name = os.path.basename(folder.rstrip('/'))
        runs[name] = read_curves(folder)
    in_every_run = set.intersection(*(set(curves) for curves in runs.values()))
    absent = [field for field in fields if field not in in_every_run]
    if absent:
        there = ' '.join(runs[name])
        raise SystemExit(f'--plot: {" ".join(absent)} not in every run; fields there are: {there}')
    shown = fields or [field for field in PLOTTED if field in in_every_run]
    fig, axes = plt.subplots(1, len(shown), figsize=(2.8 * len(shown), 2.8), squeeze=False)
    for ax, field in zip(axes[0], shown):
        for name, curves in runs.items():
            steps, values = curves[field]
            ax.plot(steps, values, label=name)
        ax.set_title(field, fontsize=9)
        ax.set_xlabel('updates')
    axes[0, 0].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=100)
    plt.close(fig)


# --- evaluations ---------------------------------------------------------------------------------
def held_out(config, run):
    """Scores a model on the held-out images: report.json, and pictures of the watched ones."""
    _, held = open_data(config, run, training=False)
    evaluate = Evaluator(open_uae(config, run.device), held, config, run)
    summary, records = evaluate(config.watch)
    if not run.master:
        return
    for name, value in summary.items():
        print(f'{name:22s} {value:.4f}')
    captions = {record['name']: record['caption'] for record in records}
    common.write_json(f'{config.out_dir}/report.json', dict(summary=summary, captions=captions))
    if config.watch:
        print(watch.save_samples(records[:config.watch], 0, config, held['scenes']))


def unified(config, run):
    """--bench=unified: draws what is missing and scores everything.

    unified.json (of seed k: unified_k.json), report.json, contact_sheet.png.
    """
    if not os.path.isdir(f'{config.data}/Image'):
        raise SystemExit('--bench=unified needs --data=DIR with the references in DIR/Image; '
                         f'there is no {config.data}/Image')
    files = image_files(f'{config.data}/Image')
    references = match_files(files, dict(files), 'file')     # refuses two of one name
    towers = {}
    if run.master:
        towers = backbones(config)                                # refuses before hours of drawing
    if config.generated:
        rebuilt = [(config.generated, dict.fromkeys(references, ''))]
    else:
        rebuilt = rebuild(config, run, references)
    if not run.master:
        return

    for tower in towers.values():
        tower.to(run.device)
    results = []
    for k, (folder, captions) in enumerate(rebuilt):
        result, pairs = score_folder(folder, references, towers, run.device)
        results.append(result)
        path = of_seed(f'{config.out_dir}/unified', k) + '.json'
        common.write_json(path, result, indent=2)

    means, errors = over_seeds(results)                      # captions and pairs: the last seed's
    report = dict(summary=means, standard_error=errors, seeds=len(results),
                  images=len(references), captions=captions)
    common.write_json(f'{config.out_dir}/report.json', report, indent=2)
    for name, mean in means.items():
        error = f' +- {errors[name]:.4f}' if errors else ''
        print(f'{name:22s} {mean:.4f}{error}')
    shown = list(references)[:SHEET_ROWS]
    sources = [load_picture(references[name])[0] for name in shown]
    images = [load_picture(pairs[name])[0] for name in shown]
    texts = [textwrap.shorten(captions[name], 400, placeholder=' ...') for name in shown]
    contact_sheet([sources, images], texts, f'{config.out_dir}/contact_sheet.png')


def check(config):
    """Refuses, in one line, a command line that makes no sense."""
    given = [key for key in ('captions', 'generated', 'seeds') if getattr(config, key) != keys[key]]
    if config.bench not in ('', 'unified'):
        raise SystemExit(f'--bench={config.bench}: expected unified')
    if given and not config.bench:
        raise SystemExit(f'--bench={config.bench}: expected unified (for --{given[0]})')
    if config.seeds < 1:
        raise SystemExit(f'--seeds={config.seeds}: expected 1 or more')
    if config.generated and len(given) > 1:
        raise SystemExit('--generated images are finished: without --captions and --seeds')


def main(argv):
    config = parse(keys, own_presets, argv, __file__)
    if config.plot:
        os.makedirs(config.out_dir, exist_ok=True)
        folders, _, fields = config.plot.partition(':')
        fields = fields.split(',') if fields else []
        plot_runs(folders.split(','), fields, f'{config.out_dir}/curves.png')
        print(f'{config.out_dir}/curves.png')
        return
    check(config)
    run = common.start(config)
    if config.bench:
        unified(config, run)
    else:
        held_out(config, run)


if __name__ == '__main__':
    main(sys.argv[1:])
