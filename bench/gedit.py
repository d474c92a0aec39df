"""GEdit-Bench: a judge scores edited images by VIEScore's questions, whose file the user gives.

Rules: stepfun-ai/Step1X-Edit, GEdit-Bench (VIEScore's task "tie"); bench/summary.py averages.
"""
import ast
import csv
import json
import math
import os
import re

from bench.answers import last_object, number
from bench.judges import Judge, kept_replies
from bench.pictures import Unusable, jpeg, open_image
from bench.prompts import read_json, read_lines, texts_of

# of viescore/vie_prompts.py: what makes up the question on the edit, and that on the quality
VIE_EDIT = (
    '_context_no_delimit', '_prompts_0shot_two_image_edit_rule', '_prompts_0shot_tie_rule_SC')
GEDIT_FIELDS = ('key', 'task_type', 'language', 'intersection', 'instruction', 'source', 'result')
GEDIT_COLUMNS = ('source_image', 'edited_image', 'instruction', 'sementics_score', 'quality_score',
                 'intersection_exist', 'instruction_language')       # officially spelt like this
VIE_QUALITY = ('_context_no_delimit', '_prompts_0shot_rule_PQ')


# --- the rules: pure functions -----------------------------------------------------------------
def gedit_scores(answer):
    """The scores of 0 to 10 in {"score": [...]}, in a bare pair [a, b], or of a bare number.

    Raises ValueError.
    """
    try:
        scores = last_object(answer, 'score')['score']
    except ValueError:
        pairs = re.findall(r'\[\s*[\d.]+\s*,\s*[\d.]+\s*\]', answer)
        scores = json.loads(pairs[-1]) if pairs else answer
    if not isinstance(scores, list):
        scores = [scores]
    try:
        scores = [float(score) for score in scores]
    except TypeError:
        scores = []
    if not scores or not all(0 <= score <= 10 for score in scores):
        raise ValueError(f'no scores of 0 to 10 in {answer[:60]!r}')
    return scores


def gedit_item(edit, quality):
    """The scores of both answers -> (SC, PQ, O)."""
    return min(edit), min(quality), math.sqrt(min(edit) * min(quality))


# --- items: what is asked about which images -----------------------------------------------------
def read_gedit(config):
    """A .jsonl of the dataset's rows; images/fullset/GROUP/LANGUAGE/KEY.png and KEY_SRCIMG.png."""
    edit, quality = vie_prompts(config.judge_prompt)
    found = {}
    for n, line in enumerate(read_lines(config.prompts), 1):
        where = f'{config.prompts}:{n}'
        row = read_json(line, where)
        key, group, prompt, language = texts_of(
            row, where, 'key', 'task_type', 'instruction', 'instruction_language')
        stem = f'{config.images}/fullset/{group}/{language}/{key}'
        if stem in found:
            raise SystemExit(f'{where}: duplicate: {group}, {language}, {key} is above')
        try:
            intersection = bool(number(row['Intersection_exist']))
        except (KeyError, ValueError):
            raise SystemExit(f'{where}: expected Intersection_exist, true or false')
        found[stem] = dict(
            key=key, task_type=group, language=language, instruction=prompt,
            intersection=intersection,
            source=f'{stem}_SRCIMG.png', result=f'{stem}.png',
            question=edit.replace('<instruction>', prompt), quality=quality)
    return list(found.values())


def vie_prompts(path):
    """VIEScore's vie_prompts.py, read and not run, or {"SC": ..., "PQ": ...} -> two questions."""
    text = '\n'.join(read_lines(path))
    if not path.endswith('.py'):
        return texts_of(read_json(text, path), path, 'SC', 'PQ')
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError) as e:
        raise SystemExit(f'{path}: not VIEScore\'s vie_prompts.py: {e}')
    texts = {}
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            texts[ast.unparse(node.targets[0])] = node.value.value
    edit = texts_of(texts, path, *VIE_EDIT)
    return '\n'.join(edit), '\n'.join(texts_of(texts, path, *VIE_QUALITY))


# --- the scorer ----------------------------------------------------------------------------------
def gedit_scorer(config, run):
    """-> scorer(item) -> a line of results.jsonl. The result is scaled to its source's size."""
    judge = Judge(config, kept_replies(f'{config.folder}/replies', run))

    def scorer(item):
        source = open_image(item['source'])
        result = open_image(item['result']).resize(source.size)
        record = {name: item[name] for name in GEDIT_FIELDS}
        shown = jpeg(result)
        try:
            edit = judge.ask(gedit_scores, item['question'], jpeg(source), shown, item=item['key'])
            quality = judge.ask(gedit_scores, item['quality'], shown, item=item['key'])
        except Unusable as e:
            return dict(record, score=None, reason=f'no answer: {e}')
        return dict(record, score=gedit_item(edit, quality), reason='')
    return scorer


def write_tables(config, records):
    method = os.path.basename(os.path.normpath(config.images))
    for group in sorted({record['task_type'] for record in records}):
        path = f'{config.folder}/{method}_{group}_gpt_score.csv'
        with open(path, 'w', encoding='utf-8', newline='') as f:
            rows = csv.writer(f)
            rows.writerow(GEDIT_COLUMNS)
            for r in records:
                if r['task_type'] == group and r['score'] is not None:
                    rows.writerow([r['source'], r['result'], r['instruction'], *r['score'][:2],
                                   r['intersection'], r['language']])
