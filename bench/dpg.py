"""DPG-Bench: the score of an image from answers to questions that depend on each other.

questions are [{proposition_id, dependency: list of ids, 0 = none, ...}] in the CSV's order.
"""
import re

import torch

from bench.judges import digest, kept_replies
from bench.pictures import open_image
from lib.files import load


def dpg_score(questions, answers):
    """The share of questions answered yes, after those without their parents' yes are set to no.

    answers {proposition_id: bool}. A parent counts with its present value, so a no spreads to
    grandchildren only where parents come first, as officially.
    """
    present = {}
    for question in questions:
        name = question['proposition_id']
        present[name] = bool(answers[name])
    for question in questions:
        for parent in question['dependency']:
            if parent != 0 and not present[parent]:
                present[question['proposition_id']] = False
                break                        # later parents are not looked up, see drop_first_row
    return sum(present.values()) / len(present)


def drop_first_row(items):
    """The items without the first question of the first one, as the official script reads them.

    It then scores this item like any other. Where it looks the lost parent up, a KeyError makes it
    leave the image out of every mean. But it stops at a question's first parent with a no, so an
    image counts if, in each of its crops, every question that names the lost parent has a no
    before it. `dpg_score` has the same order and the same KeyError. An item that has no other
    question is always left out.
    """
    first, others = items[0], items[1:]
    questions = first['questions'][1:]
    if not questions:
        return others
    return [dict(first, questions=questions)] + others


# --- a local vision-language model answers --------------------------------------------------------
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


def remembered(stem, run, ask, who):
    """ask(image, text) -> str, never asked twice; who: whom it asks, and how."""
    known, keep = kept_replies(stem, run)

    def answer(image, text):
        key = digest(who, text, image.size, image.tobytes())
        if key not in known:
            keep(key, ask(image, text), text=text)
        return known[key]
    return answer


def dpg_scorer(config, run):
    """-> scorer(item, path) -> a line of results.jsonl, None where the image is left out."""
    vqa = remembered(f'{config.folder}/vqa', run, local_vlm(config, run.device), config.vqa)
    side = config.resolution
    corners = [(0, 0), (side, 0), (0, side), (side, side)][:config.samples]
    if config.samples == 4:
        size = 2 * side, 2 * side
    else:
        size = side, side

    def ask(crop, questions):
        """{proposition_id: True, False or None}."""
        said = {}
        for question in questions:
            answer = vqa(crop, f'{question["question"]} Answer yes or no.')
            said[question['proposition_id']] = says_yes(answer)
        return said

    def scorer(item, path):
        image = open_image(path, size)
        questions = item['questions']
        scores = []
        neither = 0
        for x, y in corners:
            said = ask(image.crop((x, y, x + side, y + side)), questions)
            neither += list(said.values()).count(None)
            try:
                scores.append(dpg_score(questions, said))
            except KeyError:                 # the lost parent, see drop_first_row
                return None
        # as officially, categories are of the last crop, before parents set any answer to no
        categories = []
        for question in questions:
            answer = float(said[question['proposition_id']] is True)
            categories.append([question['category'], answer])
        return dict(
            filename=path,
            item_id=item['id'],
            score=sum(scores) / len(scores),
            scores=scores,
            neither=neither,
            categories=categories)
    return scorer
