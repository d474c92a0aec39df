"""Text -> image benchmarks: GenEval, GenEval++, DPG-Bench; GenEval's columns in the embedded world.

    python eval_t2i.py                       # --bench=shapes: the shipped base
    python eval_t2i.py --init_from=base,out/demo/cold_start,out/demo/grpo_encoder    # one table
    torchrun --nproc_per_node=8 eval_t2i.py --preset=paper --bench=geneval \\
        --prompts=evaluation_metadata.jsonl --init_from=out/grpo_decoder
    python eval_t2i.py --preset=paper --bench=dpg --prompts=dpg_bench.csv \\
        --vqa=Qwen/Qwen2.5-VL-7B-Instruct --init_from=out/grpo_decoder
    python eval_t2i.py --preset=paper --bench=geneval++ --prompts=Geneval++.jsonl \\
        --judge_url=http://localhost:8000/v1 --judge_model=NAME --init_from=out/grpo_decoder
    python eval_t2i.py --preset=paper --bench=geneval --generate=False --images=DIR    # score only
    (--bench=imgedit and gedit: docs/benchmarks.md)

Images go to out_dir/BENCH/CHECKPOINT/images in the benchmark's own layout, which the official
scorers read unchanged; those that are there already are not drawn again. Beside them: results.jsonl
(one line an image), summary.json; over all checkpoints table.md. The benchmarks' rules are in
bench/: geneval.py (with the embedded world's and GenEval++), dpg.py; judges.py asks a server.

    official                      here                           why
    GenEval: mmdetection's        the same network with the      mmdetection does not install
    Mask2Former                   weights that transformers      beside current torch; near, not
                                  has, mmdetection's pre- and    equal: the output says so
                                  post-processing
    DPG-Bench: mPLUG answers;     any vision-language model      modelscope is not needed;
    drops the first row of its    answers; the row stays         --official_row_bug reproduces
    CSV, and so an image                                         the published mean
    GenEval++: gpt-4.1 under its  any OpenAI-compatible judge,   an answer that never came says
    own prompt, a failed answer   our prompt (--judge_prompt     nothing about the image
    counts as wrong               for theirs), a failed answer
                                  is left out and counted
"""
import collections
import hashlib
import importlib.util
import json
import os
import sys
import types

import torch
from PIL import Image
from tqdm import tqdm

from lib import checkpoint, ranks
from lib.scores import draw_edits, images_at_once, warn_of_losses
from lib.files import write_atomic, write_json, write_lines
from lib.pictures import save_image
from bench.dpg import dpg_scorer, drop_first_row
from bench.dpg import dpg_score                                  # the rules, for whoever imports
from bench.edit import BENCHES as EDITS, need_images, read_edits, score_edits
from bench.geneval import geneval_correct, relative_position     # them from here
from bench.geneval import geneval_scorer, judge_scorer, shapes_scorer
from bench.pictures import Unusable, write_results
from bench.prompts import files_to_score, item_files, read_items
from bench.summary import dpg_summary, geneval_summary, judge_summary, markdown
from config import parse
from data.images import open_images

# --- script keys -------------------------------------------------------------------------------
keys = dict(
    bench = 'shapes',          # shapes | geneval | geneval++ | dpg; edits: imgedit | gedit, drawn
                               # where init_from is given
    prompts = '',              # evaluation_metadata.jsonl, Geneval++.jsonl, dpg_bench.csv or a
                               # folder of ID.txt; '' = ours (shapes); edits: docs/benchmarks.md
    sources = '',              # imgedit: folder of the source images; '' = that of prompts
    samples = 4,               # images per prompt; dpg: 4 make its grid; geneval++ always has 1
    images = '',               # folder to write and score; '' = out_dir/BENCH/CHECKPOINT/images
    generate = True,           # draw the images that are missing; False = score what is there
    score = True,              # False = images only
    detector = 'facebook/mask2former-swin-small-coco-instance',
    colour_clip = 'ViT-L-14-quickgelu:openai',   # names an object's colour (geneval); without
                                                 # quickgelu the features would be wrong
    vqa = '',                  # dpg: a model for AutoModelForImageTextToText, folder or hub id
    official_row_bug = False,  # dpg: drop the first row as the official script does
    judge_url = '',            # geneval++, edits: an OpenAI-compatible server, up to /v1; its key,
                               # if it wants one, in the environment's OPENAI_API_KEY
    judge_model = 'gpt-4.1',
    judge_prompt = '',         # a file with the judge's system prompt; '' = ours
    judge_timeout = 60.0,      # seconds for one answer
    judge_tries = 3,
    judge_threads = 8,         # edits: questions under way at a time
)
# -----------------------------------------------------------------------------------------------
own_presets = dict(
    medium=dict(bench='geneval'),
    paper=dict(bench='geneval'),
    release=dict(bench='geneval'))
limits = dict(samples=(1, 1e4), judge_tries=(1, 1000), judge_threads=(1, 1000))

# bench: its scorer (item, path) -> record, and the summary of all records
BENCHES = {
    'shapes': (shapes_scorer, geneval_summary),
    'geneval': (geneval_scorer, geneval_summary),
    'dpg': (dpg_scorer, dpg_summary),
    'geneval++': (judge_scorer, judge_summary)}
# keys that images depend on, beside prompts and weights
DRAWN_WITH = (
    'bench', 'encoder', 'decoder', 'seed', 'eval_denoise_steps', 'guidance', 'negative_prompt',
    'resolution', 'caption_len', 'cond_len')


# --- drawing -----------------------------------------------------------------------------------
def origin(config, items):
    """What images of a run come from: keys, and digests of the prompts and of the weights."""
    weights = hashlib.blake2b(digest_size=8)
    for path in checkpoint.weight_files(checkpoint.find_checkpoint(config)):
        with open(path, 'rb') as f:
            weights.update(hashlib.file_digest(f, 'blake2b').digest())
    named = [(item['id'], item['prompt']) for item in items]
    prompts = hashlib.blake2b(repr(named).encode(), digest_size=8)
    chosen = {key: getattr(config, key) for key in DRAWN_WITH}
    return dict(chosen, prompts=prompts.hexdigest(), weights=weights.hexdigest())


def claim_images(config, items, drawn):
    """Refuses a folder whose images another model or other settings drew; IMAGES.json beside it
    says which. drawn: whether there are any. Rank 0.
    """
    path = config.images.rstrip('/') + '.json'
    mine = origin(config, items)
    try:
        with open(path) as f:
            theirs = json.load(f)
    except (OSError, ValueError):
        theirs = {} if drawn else mine
    differ = [key for key in mine if mine[key] != theirs.get(key)]
    if differ:
        why = f'made with other {", ".join(differ)}'
        if not theirs:
            why = f'that this script did not draw (no {path})'
        raise SystemExit(
            f'{config.images} holds images {why}: remove it, choose another --out_dir or --images, '
            'or --generate=False')
    write_json(path, mine)


@torch.no_grad()
def draw_prompts(uae, jobs):
    """jobs [(item, sample)] -> images (n, 3, R, R) by the ODE.

    Start noise is a function of (seed, the item's number, sample) alone.
    """
    shape, seed = uae.decoder.latent_shape(), uae.config.seed
    noise = []
    for item, sample in jobs:
        noise.append(ranks.normal(shape, [sample], 't2i', seed, item['number']))
    z = torch.cat(noise).to(uae.device)
    y, mask, _ = uae.encoder.tokens([item['prompt'] for item, _ in jobs])
    return uae.draw(z, uae.condition(y, mask), uae.config.eval_denoise_steps).clamp(-1, 1)


def save_images(config, item, x):
    """x (samples, 3, R, R) -> the item's files; those that exist are left alone."""
    if config.bench == 'dpg' and config.samples == 4:
        upper = torch.cat([x[0], x[1]], 2)
        lower = torch.cat([x[2], x[3]], 2)
        x = torch.cat([upper, lower], 1)[None]
    pixels = ((x + 1) * 127.5).round().byte()
    pixels = pixels.permute(0, 2, 3, 1).cpu().numpy()
    for path, array in zip(item_files(config, item), pixels):
        if not os.path.exists(path):
            image = Image.fromarray(array)
            kind = 'png' if path.endswith('.png') else 'jpeg'
            write_atomic(path, lambda tmp: image.save(tmp, kind, quality=95))
    if config.bench in ('geneval', 'shapes'):
        line = json.dumps(item['meta']) + '\n'
        path = f'{config.images}/{item["id"]}/metadata.jsonl'
        write_atomic(path, lambda tmp: write_lines(tmp, [line]))


def generate(config, run, items):
    """Draws what is missing.

    The images drawn together are the same at every world size and after every interruption, so
    their pixels are too.
    """
    if run.master:
        claim_images(config, items, os.path.isdir(config.images) and os.listdir(config.images))
    size = max(1, images_at_once(config) // config.samples)
    chunks = [items[i:i + size] for i in range(0, len(items), size)]
    todo = []
    for chunk in chunks[run.rank::run.world]:
        paths = [path for item in chunk for path in item_files(config, item)]
        if not all(map(os.path.exists, paths)):
            todo.append(chunk)
    lost = {}
    if todo:
        lost = draw_chunks(config, run, todo)
    everywhere = collections.Counter()
    for counts in ranks.gather_objects([lost], run):        # also waits for the others' images
        everywhere.update(counts)
    if run.master:
        warn_of_losses('the prompts', everywhere, config)


def draw_chunks(config, run, chunks):
    """Draws and saves lists of items -> what their prompts lost, see Encoder.tokens."""
    uae = checkpoint.open_uae(config, run.device)
    for chunk in tqdm(chunks, desc=f'draw {config.name}', disable=not run.master):
        jobs = [(item, sample) for item in chunk for sample in range(config.samples)]
        parts = []
        at_once = images_at_once(config)
        for start in range(0, len(jobs), at_once):
            parts.append(draw_prompts(uae, jobs[start:start + at_once]))
        x = torch.cat(parts)
        for item, own in zip(chunk, x.split(config.samples)):
            save_images(config, item, own)
    prompts = [item['prompt'] for chunk in chunks for item in chunk]
    _, _, lost = uae.encoder.tokens(prompts)
    return lost


def generate_edits(config, run, items):
    """Draws the results that are missing, each from the centre square of its source."""
    named = [dict(id=item['key'], prompt=item['instruction']) for item in items]
    todo = [n for n, item in enumerate(items) if not os.path.exists(item['result'])]
    if run.master:
        claim_images(config, named, len(todo) < len(items))
    ranks.barrier(run)                          # nobody draws before all know what is missing
    mine = todo[run.rank::run.world]
    if mine:
        uae = checkpoint.open_uae(config, run.device)
        if run.master:
            _, _, lost = uae.encoder.tokens([items[n]['instruction'] for n in todo])
            warn_of_losses('the instructions', lost, config)
    for n in tqdm(mine, desc=f'draw {config.name}', disable=not run.master):
        source, *_ = open_images(items[n]['source'], config.resolution).get(0)
        x_hat = draw_edits(uae, source[None], [items[n]['instruction']], [n], (config.seed,))
        save_image(x_hat[0], items[n]['result'])
    ranks.barrier(run)


# --- scoring -----------------------------------------------------------------------------------
def why_not(config, items):
    """What the score needs and does not have, in one line; '' if nothing."""
    if config.bench == 'geneval' and not importlib.util.find_spec('scipy'):
        return 'the detector of transformers needs scipy: pip install scipy'
    if config.bench == 'dpg' and (not config.vqa or items[0]['questions'] is None):
        return '--prompts=dpg_bench.csv has the questions, --vqa=MODEL answers them'
    if config.bench == 'geneval++' and not config.judge_url:
        return '--judge_url=http://SERVER/v1 and --judge_model=NAME ask a judge'
    return ''


def score(config, run, items):
    """Scores the images of all items: results.jsonl, then summary.json.

    -> the summary, None on other ranks.
    """
    os.makedirs(config.folder, exist_ok=True)
    open_scorer, summarise = BENCHES[config.bench]
    scorer = open_scorer(config, run)
    if config.bench == 'dpg' and config.official_row_bug:
        items = drop_first_row(items)
    records, unusable = [], []
    mine = items[run.rank::run.world]
    for item in tqdm(mine, desc=f'score {config.name}', disable=not run.master):
        for path in files_to_score(config, item):
            try:
                records.append(scorer(item, path))
            except Unusable as e:
                unusable.append(str(e))
    records = ranks.gather_objects(records, run)
    unusable = ranks.gather_objects(unusable, run)
    if not run.master:
        return None
    # a scorer's None is an image that is left out, as the official script does (dpg)
    records = [record for record in records if record is not None]
    records.sort(key=lambda record: record['filename'])
    write_results(config.folder, records, sorted(unusable))
    if not records:
        raise SystemExit(f'{config.images}: every image is left out, so there is no score')
    summary = summarise(records)
    write_json(f'{config.folder}/summary.json', summary)
    numbers = [f'{k} {v:.4g}' for k, v in summary.items() if isinstance(v, (int, float))]
    print(config.name, ' '.join(numbers))
    return summary


def write_table(config, summaries):
    """table.md: a row per checkpoint. summaries {name: summary}."""
    rows = {name: summary['columns'] for name, summary in summaries.items()}
    text = markdown(config.bench, rows)
    if config.bench == 'geneval':
        text += ('\nThe detector has other weights than the official one: near the official '
                 'numbers, not equal.\n')
    path = f'{config.out_dir}/{config.bench}/table.md'
    write_atomic(path, lambda tmp: write_lines(tmp, [text]))
    print(text)


# --- the run -----------------------------------------------------------------------------------
def name_of(source):
    """'' -> base, out/cold_start -> cold_start, out/cold_start/step_80 -> cold_start-step_80."""
    if not source:
        return 'base'
    parts = os.path.normpath(source).split(os.sep)
    if parts[-1].startswith('step_'):
        return '-'.join(parts[-2:])
    return parts[-1]


def edits(config):
    """--bench=imgedit and gedit: draws edits where a checkpoint is given, and scores them."""
    needed = ['prompts', 'judge_prompt']
    if config.score:
        needed.append('judge_url')
    if not config.init_from:
        needed.append('images')
    for key in needed:
        if not getattr(config, key):
            raise SystemExit(f'--bench={config.bench} needs --{key} (docs/benchmarks.md)')
    run = ranks.start(config)
    config.name = name_of(config.init_from)
    if config.images:
        config.name = os.path.basename(os.path.normpath(config.images))
    config.folder = f'{config.out_dir}/{config.bench}/{config.name}'
    config.images = config.images or f'{config.folder}/images'
    items = read_edits(config)
    if config.init_from:
        need_images(config, items, 'source')
        config.condition = checkpoint.editing_condition(config)
        generate_edits(config, run, items)
    if config.score:
        summary = score_edits(config, run, items)
        if run.master:
            write_table(config, {config.name: summary})


def main(argv):
    config = parse(keys, own_presets, argv, __file__, limits)
    if config.bench in EDITS:
        return edits(config)
    if config.bench == 'geneval++':
        config.samples = 1
    items = read_items(config)
    sources = config.init_from.split(',')
    if config.generate or not config.images:
        names = [name_of(source) for source in sources]
    else:
        names = [os.path.basename(os.path.normpath(config.images))]
    if len(sources) > 1 and (config.images or len(set(names)) < len(names)):
        raise SystemExit(f'--init_from={config.init_from}: several checkpoints need other names, '
                         'and --images is for one')
    run = ranks.start(config)
    missing = why_not(config, items)
    if missing and config.score and run.master:
        print(f'no score: {missing}')
    summaries = {}
    for name, source in zip(names, sources):
        own = types.SimpleNamespace(**vars(config))
        own.init_from = '' if source == 'base' else source
        own.name = name
        own.folder = f'{config.out_dir}/{config.bench}/{name}'
        own.images = config.images or f'{own.folder}/images'
        if config.generate:
            generate(own, run, items)
        if config.score and not missing:
            summaries[name] = score(own, run, items)
    if run.master and summaries:
        write_table(config, summaries)


if __name__ == '__main__':
    main(sys.argv[1:])
