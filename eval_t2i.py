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
import base64
import glob
import hashlib
import http.client
import importlib.util
import io
import json
import math
import os
import re
import sys
import time
import types
import urllib.error
import urllib.request

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

import common
import config
from data.prompts import CLASSES, COLOURS, RELATIONS, TAGS, read_dpg, read_lines, read_metadata, shapes_prompts
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


class Unusable(Exception):
    """One image or answer that cannot be scored: what and why."""


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
            if groups[target] is None:
                fault = f'{name}: nothing to be {relation}'
            elif not all(relation in relative_position(a[0], b[0]) for a in found for b in groups[target]):
                fault = f'{name}: not {relation} its target'
        groups.append(None if fault else found)
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
    return dict(images=len(records), neither=sum(r['neither'] for r in records), categories=shares, columns=dict(columns, overall=100 * mean(r['score'] for r in records)))


def says_yes(answer):
    """True, False, or None where the first word is neither yes nor no."""
    word = re.match(r'\W*(\w*)', answer.lower()).group(1)
    return dict(yes=True, no=False).get(word)


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
def files(c, item):
    """The image files of an item in the benchmark's own layout."""
    if c.bench in ('geneval', 'shapes'):
        return [f'{c.images}/{item["id"]}/samples/{k:05d}.png' for k in range(c.samples)]
    return [f'{c.images}/{item["id"]}.{"png" if c.bench == "dpg" else "jpg"}']


def claim(c, items):
    """Refuses a folder whose images another model or other settings drew; IMAGES.json beside it says which. Rank 0."""
    path, weights = c.images.rstrip('/') + '.json', hashlib.blake2b(digest_size=8)
    for file in sorted(glob.glob(f'{glob.escape(common.find_checkpoint(c))}/**/*.safetensors', recursive=True)):
        with open(file, 'rb') as f:
            weights.update(hashlib.file_digest(f, 'blake2b').digest())
    prompts = hashlib.blake2b(repr([(i['id'], i['prompt']) for i in items]).encode(), digest_size=8).hexdigest()
    mine = dict({k: getattr(c, k) for k in ('bench', 'encoder', 'decoder', 'seed', 'eval_steps', 'guidance', 'negative_prompt', 'resolution')},
                prompts=prompts, weights=weights.hexdigest())
    try:
        with open(path) as f:
            theirs = json.load(f)
    except (OSError, ValueError):
        theirs = {} if os.path.isdir(c.images) and os.listdir(c.images) else mine
    differ = [k for k in mine if mine[k] != theirs.get(k)]
    if differ:
        raise SystemExit(f'{c.images} holds images made with other {", ".join(differ)}: remove it, choose another --out_dir or --images, or --generate=False')
    common.write_atomic(path, lambda tmp: json.dump(mine, open(tmp, 'w'), indent=1))


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
        cut = sum(uae.tokens([item['prompt'] for chunk in todo for item in chunk])[2:])
        for chunk in tqdm(todo, desc=f'draw {c.name}', disable=not run.master):
            jobs = [(item, k) for item in chunk for k in range(c.samples)]
            x = torch.cat([draw(uae, jobs[i:i + c.batch]) for i in range(0, len(jobs), c.batch)])
            for item, own in zip(chunk, x.split(c.samples)):
                save_images(c, item, own)
    cut = sum(common.gather_objects([cut], run))             # also waits for the other ranks' images
    if cut and run.master:
        print(f'warning: {cut} prompts have more than caption_len - 1 = {c.caption_len - 1} tokens and were cut')


# --- scoring images -------------------------------------------------------------------------------------------------------
def picture(path, size=None):
    """An image file -> RGB image. Raises Unusable if it is missing, damaged, or not of the expected (width, height)."""
    if not os.path.exists(path):
        raise Unusable(f'{path}: missing')
    try:
        with Image.open(path, formats=('PNG', 'JPEG')) as im:
            im = ImageOps.exif_transpose(im).convert('RGB')
    except Exception as e:                                   # on damaged bytes the decoders raise nearly anything
        raise Unusable(f'{path}: cannot be read: {type(e).__name__}')
    if size and im.size != size:
        raise Unusable(f'{path}: {im.width}x{im.height}, expected {size[0]}x{size[1]} at --resolution and --samples')
    return im


def shapes_objects(image, meta):
    """What the oracle reads: {shape: [(its cell's box, 1.0, colour)]}. It has no confidence to sort by: what the prompt asks for comes first."""
    reading = world.read(np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1)[0]
    objects, asked = {}, [(r['class'], r.get('color')) for r in meta['include']]
    for o in sorted(reading.objects, key=lambda o: (o.shape, o.colour) not in asked):
        row, column = divmod(world.CELLS.index(o.cell), 2)
        x, y = world.CELL * column, world.CELL * row
        objects.setdefault(o.shape, []).append(((x, y, x + world.CELL, y + world.CELL), 1.0, o.colour))
    return objects


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


# --- GenEval's detector: mmdetection's test pipeline and post-processing around the network of transformers --------------
def open_detector(c, device):
    from transformers import Mask2FormerForUniversalSegmentation
    model = common.load(Mask2FormerForUniversalSegmentation, c.detector).eval().to(device)
    names = model.config.id2label
    if len(names) != len(CLASSES) or (names[0], names[79]) != (CLASSES[0], CLASSES[79]):
        raise SystemExit(f'--detector={c.detector}: expected the 80 classes of COCO instances, got {len(names)}, from {names[0]!r}')
    return model


def to_detector(image):
    """RGB image -> (1, 3, h, w) normalised, and the (h, w) inside its padding: shorter side 800, longer at most 1333, padded to /32."""
    w, h = image.size
    scale = min(1333 / max(h, w), 800 / min(h, w))
    inside = int(h * scale + 0.5), int(w * scale + 0.5)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, inside, mode='bilinear', align_corners=False).round()          # cv2's, not antialiased, back to 8 bits
    mean, std = (torch.tensor(a).view(3, 1, 1) for a in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    return F.pad((x - mean) / std, (0, -inside[1] % 32, 0, -inside[0] % 32)), inside


def instances(class_logits, mask_logits, padded, inside, size, most=100):
    """Logits (Q, C + 1) and (Q, h, w) -> scores, labels (n,), boxes (n, 4), masks (n, *size) bool, best first.

    The best `most` of all (query, class) pairs, so that a query can count as several classes; a score is the class's probability times the mask's
    mean probability inside itself. padded, inside, size: (height, width) of the network's input, of the image in it, of the image.
    """
    scores, flat = class_logits.softmax(-1)[:, :-1].flatten().topk(min(most, class_logits[:, :-1].numel()))
    query, labels = flat // (class_logits.shape[1] - 1), flat % (class_logits.shape[1] - 1)
    m = F.interpolate(mask_logits[None], padded, mode='bilinear', align_corners=False)[:, :, :inside[0], :inside[1]]
    m = F.interpolate(m, size, mode='bilinear', align_corners=False)[0]
    masks = m > 0
    sure = (m.sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
    boxes = torch.zeros(len(masks), 4)
    for i, mask in enumerate(masks.cpu()):
        ys, xs = mask.any(1).nonzero(), mask.any(0).nonzero()
        if len(ys):
            boxes[i] = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    scores, order = (scores * sure[query]).cpu().sort(descending=True)
    query, labels = query.cpu()[order], labels.cpu()[order]
    return scores, labels, boxes[query], masks.cpu()[query]


@torch.no_grad()
def detect(model, image, tag):
    """{class: [(box, score, mask)]}, best first: scores above 0.3 (counting: 0.9), at most 16 of a class."""
    x, inside = to_detector(image)
    out = model(pixel_values=x.to(model.device))
    found, least = {}, 0.9 if tag == 'counting' else 0.3
    for score, label, box, mask in zip(*instances(out.class_queries_logits[0].float(), out.masks_queries_logits[0].float(), x.shape[-2:], inside, image.size[::-1])):
        them = found.setdefault(CLASSES[label], []) if score > least else None
        if them is not None and len(them) < 16:
            them.append((box.tolist(), score.item(), mask.numpy()))
    return found


def open_colours(c, device):
    """-> name_colours(image, [(box, score, mask)], class): CLIP's choice among COLOURS for each object, cut out on grey."""
    import open_clip
    name, _, weights = c.colour_clip.partition(':')
    if weights == 'openai' and 'quickgelu' not in name:
        raise SystemExit(f'--colour_clip={c.colour_clip}: OpenAI\'s weights need QuickGELU: {name}-quickgelu:openai')
    try:
        model, _, transform = open_clip.create_model_and_transforms(name, pretrained=weights, device=device)
    except Exception as e:
        raise SystemExit(f'--colour_clip={c.colour_clip}: cannot be loaded: {str(e).splitlines()[0][:160]}')
    return colour_namer(model.eval(), transform, open_clip.get_tokenizer(name), device)


def colour_namer(model, transform, tokenizer, device):
    heads = {}

    def head(name):
        """(10, d): mean over three templates of the colours' unit text features, unit length."""
        templates = ('a photo of a {} ' + name, 'a photo of a {}-colored ' + name, 'a photo of a {} object')
        texts = tokenizer([t.format(colour) for colour in COLOURS for t in templates]).to(device)
        return F.normalize(F.normalize(model.encode_text(texts).float(), dim=-1).view(len(COLOURS), len(templates), -1).mean(1), dim=-1)

    @torch.no_grad()
    def name_colours(image, found, name):
        if name not in heads:
            heads[name] = head(name)
        grey = Image.new('RGB', image.size, (153, 153, 153))
        crops = [Image.composite(image, grey, Image.fromarray(mask)).crop([int(v) for v in box]) for box, _, mask in found]
        features = F.normalize(model.encode_image(torch.stack([transform(crop) for crop in crops]).to(device)).float(), dim=-1)
        return [COLOURS[i] for i in (features @ heads[name].T).argmax(1).tolist()]
    return name_colours


# --- DPG-Bench: questions to a vision-language model ------------------------------------------------------------------
def remembered(stem, run, ask, who):
    """ask(image, text) -> str whose answers are kept in stem.RANK.jsonl, so that a stopped run asks nothing twice. who: whom it asks."""
    known = {}
    for path in glob.glob(f'{glob.escape(stem)}.*.jsonl'):
        with open(path, encoding='utf-8') as f:
            for line in f:
                try:
                    known.update([json.loads(line)])
                except (ValueError, TypeError):              # a kill in the middle of a line
                    continue

    def answer(image, text):
        key = hashlib.blake2b(repr((who, text, image.size)).encode() + image.tobytes(), digest_size=16).hexdigest()
        if key not in known:
            known[key] = ask(image, text)
            with open(f'{stem}.{run.rank}.jsonl', 'a', encoding='utf-8') as f:
                f.write(json.dumps([key, known[key]]) + '\n')
        return known[key]
    return answer


def local_vlm(c, device):
    """-> vqa(image, question) -> str, greedy."""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    processor = common.load(AutoProcessor, c.vqa)
    model = common.load(AutoModelForImageTextToText, c.vqa, dtype=getattr(torch, c.dtype)).eval().to(device)

    @torch.no_grad()
    def vqa(image, question):
        turn = dict(role='user', content=[dict(type='image'), dict(type='text', text=question)])
        text = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        batch = processor(text=[text], images=[image], return_tensors='pt').to(device)
        out = model.generate(**batch, max_new_tokens=8, do_sample=False)
        return processor.tokenizer.decode(out[0, batch['input_ids'].shape[1]:], skip_special_tokens=True)
    return vqa


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


# --- GenEval++: a judge behind any OpenAI-compatible server -----------------------------------------------------------
JUDGE = ('You check whether an image does exactly what an instruction and a checklist ask for. All of it must hold: the kind of every object, how many '
         'there are, their colours, where they are in the picture, how large they are. The picture must be one natural image that looks like a photo: drawings, '
         'cartoons, collages and several panels fail. Be strict; in doubt it fails. Answer with JSON alone: {"correct": 1 or 0, "reason": "one sentence"}')


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the server that was named and to no other."""
    def redirect_request(self, *args):
        return None


def checklist(meta):
    """GenEval++'s official wording of what an image must show."""
    def thing(req, count):
        return f'{count} {req["class"]}{"s" if req.get("count", 1) > 1 else ""}'

    lines = []
    for req in meta['include']:
        words = [f'{req["color"]}-colored' if 'color' in req else '', req.get('size', ''), thing(req, req.get('count', 1))]
        where = f'located in the {req["region"]} part of the image' if 'region' in req else 'present in the image'
        lines.append(f'- {" ".join(filter(None, words))} {where}.')
    lines += [f'- No more than {thing(req, req["count"] - 1)} should appear.' for req in meta.get('exclude', [])]
    return 'This image should contain:\n' + '\n'.join(lines)


def verdict(reply):
    """A judge's reply -> (0 or 1, reason); fences and prose around the JSON object are allowed. Raises ValueError if there is none."""
    text = re.search(r'\{.*\}', reply, re.S)
    found = json.loads(text.group()) if text else {}
    if found.get('correct') not in (0, 1):
        raise ValueError(f'no {{"correct": 0 or 1}} in {reply[:60]!r}')
    return int(found['correct']), str(found.get('reason', ''))


def ask_judge(c, system, image, text):
    """The server's reply, one that `verdict` understands. Raises Unusable after judge_tries failures, SystemExit where none can succeed."""
    jpeg = io.BytesIO()
    image.save(jpeg, 'jpeg', quality=95)
    picture = dict(type='image_url', image_url=dict(url='data:image/jpeg;base64,' + base64.b64encode(jpeg.getvalue()).decode()))
    body = dict(model=c.judge_model, temperature=0, max_tokens=200, messages=[
        dict(role='system', content=system), dict(role='user', content=[dict(type='text', text=text), picture])])
    headers, url = {'Content-Type': 'application/json'}, c.judge_url.rstrip('/') + '/chat/completions'
    if os.environ.get('OPENAI_API_KEY'):
        headers['Authorization'] = 'Bearer ' + os.environ['OPENAI_API_KEY']
    for n in range(c.judge_tries):
        time.sleep(min(2 ** n, 30) if n else 0)
        end, raw = time.time() + c.judge_timeout, b''
        try:
            with urllib.request.build_opener(NoRedirect).open(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=c.judge_timeout) as r:
                while part := r.read1(65536):                # a server that drips may not outlast the limit either
                    raw += part
                    if time.time() > end:
                        raise TimeoutError('too slow')
            reply = json.loads(raw)['choices'][0]['message']['content']
            verdict(reply)
            return reply
        except urllib.error.HTTPError as e:
            why = f'HTTP {e.code} {e.reason}'
            if e.code in (401, 403, 404):
                raise SystemExit(f'{url}: {why}: check --judge_url, --judge_model and OPENAI_API_KEY; the answers so far are kept')
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as e:
            why = f'{type(e).__name__}: {e}'
    raise Unusable(why[:160])


def judge_scorer(c, run):
    system = '\n'.join(read_lines(c.judge_prompt)) if c.judge_prompt else JUDGE
    ask = remembered(f'{c.folder}/judge', run, lambda image, text: ask_judge(c, system, image, text), (c.judge_url, c.judge_model, system))

    def one(item, path):
        correct, reason = 0, 'no image'                      # a missing image is wrong, as officially
        if os.path.exists(path):
            image = picture(path)
            try:
                correct, reason = verdict(ask(image, f'Instruction:\n{item["prompt"]}\n\nExpectation checklist:\n{checklist(item["meta"])}'))
            except Unusable as e:
                correct, reason = None, f'no answer: {e}'
        return dict(filename=path, tag=item['meta']['tag'], prompt=item['prompt'], correct=correct, reason=reason)
    return one


# --- the benchmarks -----------------------------------------------------------------------------------------------------
BENCHES = {'shapes': (shapes_scorer, geneval_summary), 'geneval': (geneval_scorer, geneval_summary), 'dpg': (dpg_scorer, dpg_summary),
           'geneval++': (judge_scorer, judge_summary)}


def to_score(c, item):
    """The files to score: GenEval's scorer takes every image of digits in an item's folder."""
    if c.bench not in ('geneval', 'shapes'):
        return files(c, item)
    folder = f'{c.images}/{item["id"]}/samples'
    there = sorted(n for n in (os.listdir(folder) if os.path.isdir(folder) else ()) if re.fullmatch(r'\d+\.png', n))
    lost = [os.path.basename(f) for f in files(c, item) if os.path.basename(f) not in there]
    return [f'{folder}/{n}' for n in there + lost[:max(0, c.samples - len(there))]]


def score(c, run, items):
    """Scores the images of all items; results.jsonl, then summary.json -> summary (None on other ranks). No score over fewer images than asked."""
    os.makedirs(c.folder, exist_ok=True)
    scorer, summarise = BENCHES[c.bench]
    one, records, bad = scorer(c, run), [], []
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
    common.write_atomic(f'{c.folder}/summary.json', lambda tmp: json.dump(summary, open(tmp, 'w'), indent=1))
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


def read_items(c):
    """Checks the keys and reads the prompts; everything that is wrong in one line."""
    if c.bench not in BENCHES:
        raise SystemExit(f'--bench: expected one of {" ".join(BENCHES)}, got {c.bench!r}')
    if c.condition != 'text':
        raise SystemExit(f'--condition={c.condition}: a prompt has no image to look at, expected text')
    if c.samples < 1 or c.bench == 'dpg' and c.samples not in (1, 4) or c.batch < 1 or c.judge_tries < 1:
        raise SystemExit(f'--samples={c.samples} --batch={c.batch} --judge_tries={c.judge_tries}: expected 1 or more, and 1 or 4 samples for dpg')
    if c.bench == 'shapes' and c.resolution != world.RESOLUTION:
        raise SystemExit(f'--resolution={c.resolution}: the embedded world has {world.RESOLUTION}')
    if not c.judge_url.startswith(('http://', 'https://', '')[2 * (not c.judge_url):]):
        raise SystemExit(f'--judge_url={c.judge_url}: expected http:// or https://')
    if c.bench != 'shapes' and not c.prompts and (c.generate or c.bench != 'geneval'):
        raise SystemExit(f'--bench={c.bench} needs --prompts=FILE')
    if c.bench == 'shapes' and not c.prompts:
        return [dict(id=f'{n:05d}', number=n, prompt=m['prompt'], meta=m) for n, m in enumerate(shapes_prompts())]
    items = read_dpg(c) if c.bench == 'dpg' else read_metadata(c)
    if not items:
        raise SystemExit(f'no prompts in {c.prompts or c.images or "--images"!r}')
    return items


def name_of(source):
    """out/demo/cold_start -> cold_start, out/demo/cold_start/step_000080 -> cold_start-step_000080, '' -> base."""
    parts = os.path.normpath(source).split(os.sep) if source else ['base']
    return '-'.join(parts[-2:]) if parts[-1].startswith('step_') else parts[-1]


def main(argv):
    c = config.parse(keys, own_presets, argv, __file__)
    c.samples = 1 if c.bench == 'geneval++' else c.samples
    items, sources = read_items(c), c.init_from.split(',')
    names = [name_of(s) for s in sources]
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
        cells = {name: ['-' if v is None else f'{v:.3f}' for v in (s['columns'].get(k) for k in columns)] for name, s in table.items()}
        lines = [['', *columns], ['---'] * (len(columns) + 1), *([name, *row] for name, row in cells.items())]
        text = ''.join(f'| {" | ".join(line)} |\n' for line in lines)
        text += '\nThe detector has other weights than the official one: near the official numbers, not equal.\n' * (c.bench == 'geneval')
        common.write_atomic(f'{c.out_dir}/{c.bench}/table.md', lambda tmp: common.write_lines(tmp, [text]))
        print(text)


if __name__ == '__main__':
    main(sys.argv[1:])
