"""Who looks at the images of eval_t2i.py: the embedded world's oracle, GenEval's detector and colour namer, a local
vision-language model, a judge behind a server. Each says what it sees; the benchmarks' rules are in eval_t2i.py.
"""
import base64
import glob
import hashlib
import http.client
import io
import json
import os
import re
import time
import urllib.error
import urllib.request

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import common
from bench.prompts import CLASSES, COLOURS, read_lines
from data.shapes import scenes as world


class Unusable(Exception):
    """One image or answer that cannot be scored: what and why."""


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


# --- a vision-language model (DPG-Bench) ---------------------------------------------------------------------------------
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


def says_yes(answer):
    """True, False, or None where the first word is neither yes nor no."""
    word = re.match(r'\W*(\w*)', answer.lower()).group(1)
    return dict(yes=True, no=False).get(word)


# --- a judge behind any OpenAI-compatible server (GenEval++) ------------------------------------------------------------
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
