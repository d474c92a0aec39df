"""Unified-Bench: image -> caption -> image on held-out images, and how like the source it is.

    python eval_unified.py                                    # the shipped base, on held-out scenes
    python eval_unified.py --init_from=out/grpo_decoder --eval_images=256
    python eval_unified.py --bench=unified --preset=paper --init_from=out/grpo_decoder \\
        --data=UniBench --temperature=0.7 --seeds=3
    python eval_unified.py --bench=unified --data=UniBench --generated=UniBench/example_image
        # score somebody else's images, or with --captions=FILE draw somebody else's captions
    python eval_unified.py --bench=pairs --captions=ours.jsonl --against=theirs.jsonl \\
        --judge_url=http://localhost:8000/v1 --judge_model=NAME

Captions are greedy unless `temperature` says otherwise; what is measured stands in lib/scores.py.

--bench=unified is the paper's benchmark in its official layout, see bench/unified.py. It writes
unified.json with the official script's keys, and report.json with means and standard errors over
seeds. A second run draws what is missing. The encoder sees a reference whole, scaled to
resolution^2 pixels, or with the preset `release` as large as it is.
"""
import os
import sys

from PIL import Image

from bench.pairs import judge_pairs
from bench.unified import (
    backbones, image_files, match_files, of_seed, over_seeds, rebuild, score_folder)
from config import parse
from data.images import open_data
from lib import pictures, ranks, watch
from lib.checkpoint import open_uae
from lib.files import write_json
from lib.scores import Evaluator

# --- script keys ---------------------------------------------------------------------------------
keys = dict(
    bench = '',                # unified = the paper's Unified-Bench on references in DATA/Image;
                               # pairs = a judge compares `captions` with those of `against`
    # names in reward.BACKBONES; name=FOLDER takes the weights from there
    backbones = 'clip,longclip,dinov2,dinov3',
    captions = '',             # .jsonl of {"image", "caption"} as sample.py writes: draw these
    generated = '',            # folder of finished reconstructions: score these, load no UAE
    own_size = False,          # the encoder sees a reference at its own size
    temperature = 0.0,         # of the captions; 0 = greedy, 0.7 for the paper's Unified-Bench
    seeds = 1,                 # repetitions with other start noise and other sampled captions
    against = '',              # pairs: the other .jsonl of captions
    judge_url = '',            # pairs: an OpenAI-compatible server, up to /v1; its key, if it wants
                               # one, in the environment's OPENAI_API_KEY
    judge_model = 'gpt-4.1',   # of several judges: A,B
    judge_prompt = '',         # a file with the judge's system prompt; '' = ours
    judge_timeout = 60.0,      # seconds for one answer
    judge_tries = 3,
    judge_threads = 8,         # questions under way at a time
)
own_presets = dict(release=dict(own_size=True, temperature=0.7))
limits = dict(seeds=(1, 1e4), judge_tries=(1, 1000), judge_threads=(1, 1000))
# -------------------------------------------------------------------------------------------------

SHOWN = 12                     # images on a contact sheet


# --- evaluations ---------------------------------------------------------------------------------
def held_out(config, run):
    """Scores a model on the held-out images: report.json, and pictures of the watched ones."""
    _, held = open_data(config, run, training=False)
    uae = open_uae(config, run.device)
    evaluate = Evaluator(uae, held, config, run, temperature=config.temperature)
    summary, records = evaluate()
    if not run.master:
        return
    for name, value in summary.items():
        print(f'{name:22s} {value:.4f}')
    captions = {record['name']: record['caption'] for record in records}
    write_json(f'{config.out_dir}/report.json', dict(summary=summary, captions=captions))
    print(watch.save_samples(records, 0, config.out_dir))


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
        write_json(path, result, indent=2)

    means, errors = over_seeds(results)                      # captions and pairs: the last seed's
    report = dict(summary=means, standard_error=errors, seeds=len(results),
                  images=len(references), captions=captions)
    write_json(f'{config.out_dir}/report.json', report, indent=2)
    for name, mean in means.items():
        error = f' +- {errors[name]:.4f}' if errors else ''
        print(f'{name:22s} {mean:.4f}{error}')
    items = []
    for name in list(references)[:SHOWN]:
        images = [Image.open(references[name]), Image.open(pairs[name])]
        items.append((images, captions[name]))
    pictures.sheet(items, min(4, len(items)), lines=8).save(f'{config.out_dir}/contact_sheet.png')


def check(config):
    """Refuses, in one line, a command line that makes no sense."""
    given = [key for key in ('captions', 'generated', 'seeds') if getattr(config, key) != keys[key]]
    if config.bench not in ('', 'unified', 'pairs'):
        raise SystemExit(f'--bench={config.bench}: expected unified or pairs')
    if config.bench == 'pairs' and not (config.captions and config.against and config.judge_url):
        raise SystemExit('--bench=pairs needs --captions, --against and --judge_url')
    if given and not config.bench:
        raise SystemExit(f'--bench={config.bench}: expected unified (for --{given[0]})')
    if config.generated and len(given) > 1:
        raise SystemExit('--generated images are finished: without --captions and --seeds')


def main(argv):
    config = parse(keys, own_presets, argv, __file__, limits)
    check(config)
    run = ranks.start(config)
    if config.bench == 'pairs':
        config.folder = f'{config.out_dir}/pairs'
        judge_pairs(config, run)
    elif config.bench:
        unified(config, run)
    else:
        held_out(config, run)


if __name__ == '__main__':
    main(sys.argv[1:])
