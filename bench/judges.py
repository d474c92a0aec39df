"""Who looks at the images of eval_t2i.py: the embedded world's oracle, a local vision-language
model, a judge behind a server. GenEval's detector is in bench/detector.py.
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
from PIL import Image, ImageOps

from lib.files import load
from bench.prompts import read_lines
from data.shapes import scenes as world


class Unusable(Exception):
    """One image or answer that cannot be scored: what and why."""


def open_image(path, size=None):
    """An image file -> RGB image.

    Raises Unusable if it is missing, damaged, or not of the expected (width, height).
    """
    if not os.path.exists(path):
        raise Unusable(f'{path}: missing')
    try:
        with Image.open(path, formats=('PNG', 'JPEG')) as file:
            image = ImageOps.exif_transpose(file).convert('RGB')
    except Exception as e:                   # on damaged bytes the decoders raise nearly anything
        raise Unusable(f'{path}: cannot be read: {type(e).__name__}')
    if size and image.size != size:
        raise Unusable(
            f'{path}: {image.width}x{image.height}, expected {size[0]}x{size[1]} '
            'at --resolution and --samples')
    return image


def remembered(stem, run, ask, who):
    """ask(image, text) -> str whose answers are kept in stem.RANK.jsonl: none is asked for twice,
    not even by another run. who: whom it asks, and how.
    """
    known = {}
    for path in glob.glob(f'{glob.escape(stem)}.*.jsonl'):
        with open(path, encoding='utf-8') as f:
            for line in f:
                try:
                    known.update([json.loads(line)])
                except (ValueError, TypeError):      # a kill in the middle of a line
                    continue

    def answer(image, text):
        question = repr((who, text, image.size)).encode() + image.tobytes()
        key = hashlib.blake2b(question, digest_size=16).hexdigest()
        if key not in known:
            known[key] = ask(image, text)
            with open(f'{stem}.{run.rank}.jsonl', 'a', encoding='utf-8') as f:
                f.write(json.dumps([key, known[key]]) + '\n')
        return known[key]
    return answer


# --- the embedded world's oracle ---------------------------------------------------------------
def shapes_objects(image, meta):
    """What the oracle reads: {shape: [(its cell's box, 1.0, colour)]}.

    It has no confidence to sort by: what the prompt asks for comes first.
    """
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None]
    reading = world.read(pixels / 127.5 - 1)[0]
    asked = [(clause['class'], clause.get('color')) for clause in meta['include']]

    def unasked(thing):
        return (thing.shape, thing.colour) not in asked

    objects = {}
    for thing in sorted(reading.objects, key=unasked):
        row, column = divmod(world.CELLS.index(thing.cell), 2)
        x, y = world.CELL * column, world.CELL * row
        box = x, y, x + world.CELL, y + world.CELL
        objects.setdefault(thing.shape, []).append((box, 1.0, thing.colour))
    return objects


# --- a vision-language model (DPG-Bench) -------------------------------------------------------
def local_vlm(config, device):
    """-> vqa(image, question) -> str, greedy."""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    processor = load(AutoProcessor, config.vqa)
    dtype = getattr(torch, config.dtype)
    model = load(AutoModelForImageTextToText, config.vqa, dtype=dtype).eval().to(device)

    @torch.no_grad()
    def vqa(image, question):
        content = [dict(type='image'), dict(type='text', text=question)]
        turns = [dict(role='user', content=content)]
        text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        batch = processor(text=[text], images=[image], return_tensors='pt').to(device)
        out = model.generate(**batch, max_new_tokens=8, do_sample=False)
        prompt_len = batch['input_ids'].shape[1]
        return processor.tokenizer.decode(out[0, prompt_len:], skip_special_tokens=True)
    return vqa


def says_yes(answer):
    """True, False, or None where the first word is neither yes nor no."""
    first = re.match(r'\W*(\w*)', answer.lower()).group(1)
    return dict(yes=True, no=False).get(first)


# --- a judge behind any OpenAI-compatible server (GenEval++) -----------------------------------
JUDGE = (
    'You check whether an image does exactly what an instruction and a checklist ask for. All of '
    'it must hold: the kind of every object, how many there are, their colours, where they are in '
    'the picture, how large they are. The picture must be one natural image that looks like a '
    'photo: drawings, cartoons, collages and several panels fail. Be strict; in doubt it fails. '
    'Answer with JSON alone: {"correct": 1 or 0, "reason": "one sentence"}')
JPEG_QUALITY = 75                            # of the image that the judge gets, as officially
LONGEST_WAIT = 30                            # seconds between two tries


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the server that was named and to no other."""

    def redirect_request(self, *args):
        return None


def judge_scorer(config, run):
    """GenEval++: -> scorer(item, path) -> a line of results.jsonl."""
    system = JUDGE
    if config.judge_prompt:
        system = '\n'.join(read_lines(config.judge_prompt))

    def ask_server(image, text):
        return ask_judge(config, system, image, text)

    who = (config.judge_url, config.judge_model, system, JPEG_QUALITY)
    ask = remembered(f'{config.folder}/judge', run, ask_server, who)

    def scorer(item, path):
        correct, reason = 0, 'no image'      # a missing image is wrong, as officially
        if os.path.exists(path):
            image = open_image(path)
            try:
                correct, reason = verdict(ask(image, judge_question(item)))
            except Unusable as e:
                correct, reason = None, f'no answer: {e}'
        return dict(filename=path, tag=item['meta']['tag'], prompt=item['prompt'],
                    correct=correct, reason=reason)
    return scorer


def judge_question(item):
    asked = checklist(item['meta'])
    return f'Instruction:\n{item["prompt"]}\n\nExpectation checklist:\n{asked}'


def checklist(meta):
    """GenEval++'s official wording of what an image must show."""
    lines = ['This image should contain:']
    for clause in meta['include']:
        phrase = []
        if 'color' in clause:
            phrase.append(f'{clause["color"]}-colored')
        if clause.get('size'):
            phrase.append(clause['size'])
        phrase.append(counted(clause, clause.get('count', 1)))
        if 'region' in clause:
            where = f'located in the {clause["region"]} part of the image'
        else:
            where = 'present in the image'
        lines.append(f'- {" ".join(phrase)} {where}.')
    for clause in meta.get('exclude', []):
        most = counted(clause, clause['count'] - 1)
        lines.append(f'- No more than {most} should appear.')
    return '\n'.join(lines)


def counted(clause, count):
    """The number and the clause's class, whose plural goes by the clause's own count."""
    if clause.get('count', 1) > 1:
        return f'{count} {clause["class"]}s'
    return f'{count} {clause["class"]}'


def verdict(reply):
    """A judge's reply -> (0 or 1, reason); fences and prose around the JSON object are allowed.

    Raises ValueError if there is none.
    """
    found = {}
    text = re.search(r'\{.*\}', reply, re.S)
    if text:
        found = json.loads(text.group())
    if found.get('correct') not in (0, 1):
        raise ValueError(f'no {{"correct": 0 or 1}} in {reply[:60]!r}')
    return int(found['correct']), str(found.get('reason', ''))


def ask_judge(config, system, image, text):
    """The server's reply, one that `verdict` understands.

    Raises Unusable after judge_tries failures, SystemExit where none can succeed.
    """
    url = config.judge_url.rstrip('/') + '/chat/completions'
    body = judge_body(config, system, image, text)
    for attempt in range(config.judge_tries):
        if attempt:
            time.sleep(min(2 ** attempt, LONGEST_WAIT))
        try:
            raw = post(url, body, config.judge_timeout)
            reply = json.loads(raw)['choices'][0]['message']['content']
            verdict(reply)
            return reply
        except urllib.error.HTTPError as e:
            why = f'HTTP {e.code} {e.reason}'
            if e.code in (401, 403, 404):
                raise SystemExit(
                    f'{url}: {why}: check --judge_url, --judge_model and OPENAI_API_KEY; '
                    'the answers so far are kept')
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError,
                AttributeError) as e:        # no connection, or a reply of another form
            why = f'{type(e).__name__}: {e}'
    raise Unusable(why[:160])


def judge_body(config, system, image, text):
    """The question as the server's JSON."""
    jpeg = io.BytesIO()
    image.save(jpeg, 'jpeg', quality=JPEG_QUALITY)
    data = base64.b64encode(jpeg.getvalue()).decode()
    content = [
        dict(type='text', text=text),
        dict(type='image_url', image_url=dict(url=f'data:image/jpeg;base64,{data}'))]
    messages = [dict(role='system', content=system), dict(role='user', content=content)]
    return dict(model=config.judge_model, temperature=0, max_tokens=200, messages=messages)


def post(url, body, seconds):
    """The server's answer, as bytes; the key is read from the environment alone."""
    headers = {'Content-Type': 'application/json'}
    key = os.environ.get('OPENAI_API_KEY')
    if key:
        headers['Authorization'] = f'Bearer {key}'
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    opener = urllib.request.build_opener(NoRedirect)
    end = time.time() + seconds
    raw = b''
    with opener.open(request, timeout=seconds) as response:
        while part := response.read1(65536):
            raw += part
            if time.time() > end:            # a server that drips may not outlast the limit either
                raise TimeoutError('too slow')
    return raw
