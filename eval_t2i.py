"""Text -> image benchmarks: GenEval, GenEval++, DPG-Bench, and GenEval's six columns in the embedded world.

    python eval_t2i.py                                                     # --bench=shapes: the shipped base
    python eval_t2i.py --init_from=base,out/demo/cold_start,out/demo/grpo_encoder,out/demo/grpo_decoder       # one table
    torchrun --nproc_per_node=8 eval_t2i.py --preset=paper --bench=geneval --prompts=evaluation_metadata.jsonl --init_from=out/grpo_decoder
    python eval_t2i.py --preset=paper --bench=dpg --prompts=dpg_bench.csv --vqa=Qwen/Qwen2.5-VL-7B-Instruct --init_from=out/grpo_decoder
    python eval_t2i.py --preset=paper --bench=geneval++ --prompts=Geneval++.jsonl --judge_url=http://localhost:8000/v1 --judge_model=NAME --init_from=...
    python eval_t2i.py --preset=paper --bench=geneval --generate=False --images=DIR        # score a folder that somebody else drew

Images go to out_dir/BENCH/CHECKPOINT/images in the benchmark's own layout, which the official scorers read unchanged; those that are there
already are not drawn again. Beside them: results.jsonl (one line an image), summary.json, table.md over all checkpoints.

    official                                   here                                      why
    GenEval: mmdetection's Mask2Former         the same network with the weights that    mmdetection does not install beside current torch;
                                               transformers has, mmdetection's pre- and  near, not equal: the output says so
                                               post-processing
    DPG-Bench: mPLUG answers; drops the        any vision-language model answers;        modelscope is not needed; --official_row_bug
    first row of its CSV, and so an image      the row stays                             reproduces the published mean
    GenEval++: gpt-4.1 under its own prompt,   any OpenAI-compatible judge, our prompt   an answer that never came says nothing about
    a failed answer counts as wrong            (--judge_prompt for theirs), a failed     the image
                                               answer is left out and counted
"""
import glob
import hashlib
import importlib.util
import json
import math
import os
import sys
import types

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import common
import config
from bench.prompts import RELATIONS, TAGS, drop_first_row, files, read_items, to_score
from bench.judges import Unusable, detect, judge_scorer, local_vlm, open_colours, open_detector, picture, remembered, says_yes, shapes_objects
from data.shapes import scenes as world
from model import UAE

# --- script keys ---------------------------------------------------------------------------------------------------
keys = dict(
    steps = 0,                 # updates: none here; the word exists in every script
    bench = 'shapes',          # shapes | geneval | geneval++ | dpg
    prompts = '',              # the benchmark's own file: evaluation_metadata.jsonl, Geneval++.jsonl, dpg_bench.csv or a folder of ID.txt; '' = ours (shapes)
    samples = 4,               # images per prompt; dpg: 4 make its grid; geneval++ always has 1
    images = '',               # folder to write and score; '' = out_dir/BENCH/CHECKPOINT/images
    generate = True,           # draw the images that are missing; False = score what is there
    score = True,              # False = images only
    batch = 64,                # images drawn at a time
    detector = 'facebook/mask2former-swin-small-coco-instance',
    colour_clip = 'ViT-L-14-quickgelu:openai',   # names an object's colour (geneval); without quickgelu the features would be wrong
    vqa = '',                  # dpg: a vision-language model for AutoModelForImageTextToText, folder or hub id
    official_row_bug = False,  # dpg: drop the first row as the official script does
    judge_url = '',            # geneval++: an OpenAI-compatible server, up to /v1; its key, if it wants one, in the environment's OPENAI_API_KEY
    judge_model = 'gpt-4.1',
    judge_prompt = '',         # a file with the judge's system prompt; '' = ours
    judge_timeout = 60.0,      # seconds for one answer
    judge_tries = 3,
)
# -------------------------------------------------------------------------------------------------------------------
own_presets = dict(medium=dict(bench='geneval', batch=4), paper=dict(bench='geneval', batch=4))

DPG_SHOWN = ('global', 'entity', 'attribute', 'relation', 'other')


# --- scoring: pure functions ------------------------------------------------------------------------------------------
def relative_position(box_a, box_b):
    """Where A lies as seen from B: a subset of RELATIONS. Boxes (x0, y0, x1, y1, ...), y downwards.

    Per axis the distance of the centres counts only beyond a tenth of both sizes together, and must be half of the
    whole distance; two relations can hold at once, none between boxes that are too close.
    """
    centres = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (box_a, box_b)]
    offset = [a - b for a, b in zip(*centres)]
    slack = [0.1 * (abs(box_a[i + 2] - box_a[i]) + abs(box_b[i + 2] - box_b[i])) for i in (0, 1)]
    beyond = [math.copysign(max(abs(o) - s, 0), o) for o, s in zip(offset, slack)]
    if max(map(abs, beyond)) < 1e-3:
        return set()
    dx, dy = (b / math.hypot(*offset) for b in beyond)
    return {name for name, holds in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)) if holds}


def geneval_verdict(objects, metadata):
    """GenEval's rules -> (correct, reason). objects {class: [(box, score, colour or None), ...]}, thresholded, best first.

    Every `include` clause must hold on the best `count` objects of its class (more are fine), no class of an `exclude`
    clause may reach that clause's count.
    """
    faults, groups = [], []
    for req in metadata.get('include', []):
        name, count, fault = req['class'], req.get('count', 1), ''
        found = objects.get(name, [])[:count]
        right = sum(o[2] == req.get('color') for o in found)
        if len(found) < count:
            fault = f'{name}: {len(found)} of {count}'
        elif 'color' in req and right < count:
            fault = f'{name}: {right} of {count} {req["color"]}, seen: {", ".join(str(o[2]) for o in found)}'
        elif 'position' in req:
            relation, target = req['position']
            if not all(relation in relative_position(a[0], b[0]) for a in found for b in groups[target]):
                fault = f'{name}: not {relation} its target'
        groups.append(found)                                 # a target with a fault of its own has failed the image already
        faults += [fault] if fault else []
    for req in metadata.get('exclude', []):
        n = len(objects.get(req['class'], []))
        if n >= req['count']:
            faults.append(f'{req["class"]}: {n}, fewer than {req["count"]} allowed')
    return not faults, '; '.join(faults)


def geneval_correct(objects, metadata):
    """Whether an image with these objects is what the metadata asks for (`geneval_verdict` says why not)."""
    return geneval_verdict(objects, metadata)[0]


def geneval_summary(records):
    """Lines of results.jsonl -> numbers; overall = plain mean of the tags' means over images, its standard error over prompts."""
    tags = {t: [r for r in records if r['tag'] == t] for t in dict.fromkeys([*TAGS, *(r['tag'] for r in records)])}
    prompts = {}
    for r in records:
        prompts.setdefault((r['tag'], r['metadata']), []).append(r['correct'])
    columns = {t: mean(r['correct'] for r in rs) for t, rs in tags.items() if rs}
    error = 0.0
    for t in columns:
        shares = np.array([mean(v) for (tag, _), v in prompts.items() if tag == t])
        error += shares.var(ddof=1) / len(shares) if len(shares) > 1 else 0.0
    return dict(images=len(records), prompts=len(prompts), correct_images=mean(r['correct'] for r in records),
                correct_prompts=mean(any(v) for v in prompts.values()), columns=dict(columns, overall=mean(columns.values())),
                overall_stderr=math.sqrt(error) / len(columns))


def dpg_score(questions, answers):
    """DPG-Bench's score of one image: the share of questions answered yes, those without their parents' yes set to no.

    questions: {proposition_id, dependency: list of ids, 0 = none}, in the CSV's order; answers {proposition_id: bool}.
    A parent counts with its present value, so a no spreads to grandchildren only where parents come first, as officially.
    """
    now = {q['proposition_id']: bool(answers[q['proposition_id']]) for q in questions}
    for q in questions:
        if not all(now[p] for p in q['dependency'] if p != 0):
            now[q['proposition_id']] = False
    return sum(now.values()) / len(now)


def dpg_summary(records):
    """DPG = 100 * mean over images; categories L2 ("entity - whole") and L1 ("entity") = 100 * mean over the questions of all images."""
    groups = {}
    for r in records:
        for category, answer in r['categories']:
            for name in dict.fromkeys((category, category.split('-')[0].strip())):
                groups.setdefault(name, []).append(answer)
    shares = {name: 100 * mean(v) for name, v in sorted(groups.items())}
    columns = {n: shares[n] for n in DPG_SHOWN if n in shares}
    columns['overall'] = 100 * mean(r['score'] for r in records)
    return dict(images=len(records), neither=sum(r['neither'] for r in records), categories=shares, columns=columns)


def judge_summary(records):
    """GenEval++: per tag the share of right images among the answered ones; overall = mean of the tags, None where a tag has no answer."""
    tags = {t: [r['correct'] for r in records if r['tag'] == t and r['correct'] is not None] for t in dict.fromkeys(r['tag'] for r in records)}
    columns = {t: mean(v) if v else None for t, v in tags.items()}
    overall = mean(columns.values()) if None not in columns.values() else None
    return dict(images=len(records), failed=sum(r['correct'] is None for r in records), missing=sum(r['reason'] == 'no image' for r in records),
                columns=dict(columns, overall=overall))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# --- drawing ------------------------------------------------------------------------------------------------------------
def claim(c, items):
    """Refuses a folder whose images another model or other settings drew; IMAGES.json beside it says which. Rank 0."""
    path, weights = c.images.rstrip('/') + '.json', hashlib.blake2b(digest_size=8)
    for file in sorted(glob.glob(f'{glob.escape(common.find_checkpoint(c))}/**/*.safetensors', recursive=True)):
        with open(file, 'rb') as f:
            weights.update(hashlib.file_digest(f, 'blake2b').digest())
    prompts = hashlib.blake2b(repr([(i['id'], i['prompt']) for i in items]).encode(), digest_size=8).hexdigest()
    mine = dict({k: getattr(c, k) for k in ('bench', 'encoder', 'decoder', 'seed', 'eval_steps', 'guidance', 'negative_prompt', 'resolution', 'caption_len')},
                prompts=prompts, weights=weights.hexdigest())
    try:
        with open(path) as f:
            theirs = json.load(f)
    except (OSError, ValueError):
        theirs = {} if os.path.isdir(c.images) and os.listdir(c.images) else mine
    differ = [k for k in mine if mine[k] != theirs.get(k)]
    if differ:
        why = f'made with other {", ".join(differ)}' if theirs else f'that this script did not draw (no {path})'
        raise SystemExit(f'{c.images} holds images {why}: remove it, choose another --out_dir or --images, or --generate=False')
    common.write_json(path, mine)


@torch.no_grad()
def draw(uae, jobs):
    """jobs [(item, sample)] -> images (n, 3, R, R) by the ODE; start noise is a function of (seed, the item's number, sample) alone."""
    z = torch.cat([common.normal(uae.latent_shape(), [k], 't2i', uae.c.seed, item['number']) for item, k in jobs]).to(uae.device)
    y, mask, _ = uae.tokens([item['prompt'] for item, _ in jobs])
    return uae.to_image(uae.draw(z, uae.condition(y, mask), uae.c.eval_steps)).clamp(-1, 1)


def save_images(c, item, x):
    """x (samples, 3, R, R) -> the item's files; those that exist are left alone, a kill leaves none half-written."""
    if c.bench == 'dpg' and c.samples == 4:
        x = torch.cat([torch.cat([x[0], x[1]], 2), torch.cat([x[2], x[3]], 2)], 1)[None]
    for path, image in zip(files(c, item), ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()):
        if not os.path.exists(path):
            common.write_atomic(path, lambda tmp: Image.fromarray(image).save(tmp, path[-3:].replace('jpg', 'jpeg'), quality=95))
    if c.bench in ('geneval', 'shapes'):
        common.write_atomic(f'{c.images}/{item["id"]}/metadata.jsonl', lambda tmp: common.write_lines(tmp, [json.dumps(item['meta']) + '\n']))


def generate(c, run, items):
    """Draws what is missing. The images drawn together are the same at every world size and after every interruption, so their pixels are too."""
    if run.master:
        claim(c, items)
    n = max(1, c.batch // c.samples)
    chunks = [items[i:i + n] for i in range(0, len(items), n)][run.rank::run.world]
    todo = [chunk for chunk in chunks if not all(os.path.exists(f) for item in chunk for f in files(c, item))]
    cut = 0
    if todo:
        uae = UAE(c, run.device)
        cut = uae.tokens([item['prompt'] for chunk in todo for item in chunk])[2]
        for chunk in tqdm(todo, desc=f'draw {c.name}', disable=not run.master):
            jobs = [(item, k) for item in chunk for k in range(c.samples)]
            x = torch.cat([draw(uae, jobs[i:i + c.batch]) for i in range(0, len(jobs), c.batch)])
            for item, own in zip(chunk, x.split(c.samples)):
                save_images(c, item, own)
    cut = sum(common.gather_objects([cut], run))             # which also waits for the other ranks' images
    if cut and run.master:
        print(f'warning: {cut} prompts have more than caption_len - 1 = {c.caption_len - 1} tokens and were cut')


# --- scoring images -------------------------------------------------------------------------------------------------------
def shapes_scorer(c, run):
    return lambda item, path: geneval_record(path, item['meta'], shapes_objects(picture(path, (world.RESOLUTION,) * 2), item['meta']))


def geneval_scorer(c, run):
    model, name_colours = open_detector(c, run.device), open_colours(c, run.device)

    def one(item, path):
        image, meta = picture(path), item['meta']
        found = detect(model, image, meta['tag'])
        objects = {name: [(box, score, None) for box, score, _ in them] for name, them in found.items()}
        for r in (r for r in meta['include'] if 'color' in r and r['class'] in found):
            name, first = r['class'], found[r['class']][:r.get('count', 1)]
            named = name_colours(image, first, name)
            objects[name][:len(first)] = [(box, score, colour) for (box, score, _), colour in zip(first, named)]
        return geneval_record(path, meta, objects)
    return one


def geneval_record(path, meta, objects):
    """One line of results.jsonl with the official fields."""
    correct, reason = geneval_verdict(objects, meta)
    details = {name: [[*box, score] for box, score, _ in them] for name, them in objects.items()}
    return dict(filename=path, tag=meta['tag'], prompt=meta['prompt'], correct=correct, reason=reason, metadata=json.dumps(meta), details=json.dumps(details))


def dpg_scorer(c, run):
    vqa = remembered(f'{c.folder}/vqa', run, local_vlm(c, run.device), c.vqa)
    R, side = c.resolution, 2 if c.samples == 4 else 1

    def one(item, path):
        image, scores, neither = picture(path, (side * R,) * 2), [], 0
        for k in range(c.samples):
            y, x = divmod(k, 2)
            crop = image.crop((x * R, y * R, x * R + R, y * R + R))
            said = {q['proposition_id']: says_yes(vqa(crop, f'{q["question"]} Answer yes or no.')) for q in item['questions']}
            scores.append(dpg_score(item['questions'], said))
            neither += sum(a is None for a in said.values())
        # as officially, categories are of the last crop and of the answers before any is set to no by its parents
        categories = [[q['category'], float(said[q['proposition_id']] is True)] for q in item['questions']]
        return dict(filename=path, item_id=item['id'], score=mean(scores), scores=scores, neither=neither, categories=categories)
    return one


# --- the benchmarks -----------------------------------------------------------------------------------------------------
BENCHES = {'shapes': (shapes_scorer, geneval_summary), 'geneval': (geneval_scorer, geneval_summary), 'dpg': (dpg_scorer, dpg_summary),
           'geneval++': (judge_scorer, judge_summary)}


def score(c, run, items):
    """Scores the images of all items; results.jsonl, then summary.json -> summary (None on other ranks). No score over fewer images than asked."""
    os.makedirs(c.folder, exist_ok=True)
    scorer, summarise = BENCHES[c.bench]
    one, records, bad = scorer(c, run), [], []
    items = drop_first_row(items) if c.bench == 'dpg' and c.official_row_bug else items
    for item in tqdm(items[run.rank::run.world], desc=f'score {c.name}', disable=not run.master):
        for path in to_score(c, item):
            try:
                records.append(one(item, path))
            except Unusable as e:
                bad.append(str(e))
    records, bad = common.gather_objects(records, run), common.gather_objects(bad, run)
    if not run.master:
        return None
    records.sort(key=lambda r: r['filename'])
    common.write_atomic(f'{c.folder}/results.jsonl', lambda tmp: common.write_lines(tmp, [json.dumps(r) + '\n' for r in records]))
    if bad:
        raise SystemExit(f'{len(bad)} of {len(bad) + len(records)} images cannot be scored, so there is no score; first: {sorted(bad)[0]}; '
                         f'the others are in {c.folder}/results.jsonl')
    summary = summarise(records)
    common.write_json(f'{c.folder}/summary.json', summary)
    print(c.name, ' '.join(f'{k} {v:.4g}' for k, v in summary.items() if isinstance(v, (int, float))))
    return summary


def why_not(c, items):
    """What the score needs and does not have, in one line; '' if nothing."""
    if c.bench == 'geneval' and not importlib.util.find_spec('scipy'):
        return 'the detector of transformers needs scipy: pip install scipy'
    if c.bench == 'dpg' and (not c.vqa or items[0]['questions'] is None):
        return '--prompts=dpg_bench.csv has the questions, --vqa=MODEL answers them'
    if c.bench == 'geneval++' and not c.judge_url:
        return '--judge_url=http://SERVER/v1 and --judge_model=NAME ask a judge'
    return ''


def name_of(source):
    """out/demo/cold_start -> cold_start, out/demo/cold_start/step_000080 -> cold_start-step_000080, '' -> base."""
    parts = os.path.normpath(source).split(os.sep) if source else ['base']
    return '-'.join(parts[-2:]) if parts[-1].startswith('step_') else parts[-1]


def main(argv):
    c = config.parse(keys, own_presets, argv, __file__)
    c.samples = 1 if c.bench == 'geneval++' else c.samples
    items, sources = read_items(c), c.init_from.split(',')
    names = [name_of(s) for s in sources] if c.generate or not c.images else [os.path.basename(os.path.normpath(c.images))]
    if len(sources) > 1 and (c.images or len({*names}) < len(names)):
        raise SystemExit(f'--init_from={c.init_from}: several checkpoints need different names, and --images is for one')
    run, missing, table = common.start(c), why_not(c, items), {}
    if missing and c.score and run.master:
        print(f'no score: {missing}')
    for name, source in zip(names, sources):
        folder = f'{c.out_dir}/{c.bench}/{name}'
        own = types.SimpleNamespace(**dict(vars(c), init_from='' if source == 'base' else source, name=name, folder=folder, images=c.images or f'{folder}/images'))
        if c.generate:
            generate(own, run, items)
        if c.score and not missing:
            table[name] = score(own, run, items)
    if run.master and table:
        columns = list(next(iter(table.values()))['columns'])
        cells = {name: ['-' if s['columns'].get(k) is None else f'{s["columns"][k]:.3f}' for k in columns] for name, s in table.items()}
        lines = [[c.bench, *columns], ['---'] * (len(columns) + 1), *([name, *row] for name, row in cells.items())]
        text = ''.join(f'| {" | ".join(line)} |\n' for line in lines)
        text += '\nThe detector has other weights than the official one: near the official numbers, not equal.\n' * (c.bench == 'geneval')
        common.write_atomic(f'{c.out_dir}/{c.bench}/table.md', lambda tmp: common.write_lines(tmp, [text]))
        print(text)


if __name__ == '__main__':
    main(sys.argv[1:])
