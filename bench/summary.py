"""Lines of results.jsonl -> the numbers of a checkpoint: summary.json, and the table's columns."""
import math

import numpy as np

from bench.prompts import TAGS

DPG_SHOWN = ('global', 'entity', 'attribute', 'relation', 'other')


def mean(values):
    return sum(values) / len(values)


def geneval_summary(records):
    """GenEval's columns are the tags' means over images, overall is the plain mean of these.

    The standard error is over prompts, as images of one prompt are not independent.
    """
    by_tag, by_prompt = {}, {}
    for record in records:
        tag, correct = record['tag'], record['correct']
        by_tag.setdefault(tag, []).append(correct)
        by_prompt.setdefault((tag, record['metadata']), []).append(correct)
    order = [tag for tag in TAGS if tag in by_tag]
    order += [tag for tag in by_tag if tag not in TAGS]
    columns = {tag: mean(by_tag[tag]) for tag in order}
    variance = 0.0
    for tag in columns:
        shares = [mean(correct) for (other, _), correct in by_prompt.items() if other == tag]
        if len(shares) > 1:
            variance += np.var(shares, ddof=1) / len(shares)
    return dict(
        images=len(records),
        prompts=len(by_prompt),
        correct_images=mean([record['correct'] for record in records]),
        correct_prompts=mean([any(correct) for correct in by_prompt.values()]),
        columns=dict(columns, overall=mean(columns.values())),
        overall_stderr=math.sqrt(variance) / len(columns))


def dpg_summary(records):
    """DPG-Bench: 100 times the mean over images, and per category over the questions of all.

    Categories have two levels, "entity - whole" (L2) and "entity" (L1); the columns are of L1.
    """
    level_1, level_2 = {}, {}
    for record in records:
        for category, answer in record['categories']:
            broad = category.split('-')[0].strip()
            level_1.setdefault(broad, []).append(answer)
            level_2.setdefault(category, []).append(answer)
    categories_l1 = {name: 100 * mean(answers) for name, answers in sorted(level_1.items())}
    categories_l2 = {name: 100 * mean(answers) for name, answers in sorted(level_2.items())}
    columns = {name: categories_l1[name] for name in DPG_SHOWN if name in categories_l1}
    columns['overall'] = 100 * mean([record['score'] for record in records])
    return dict(
        images=len(records),
        neither=sum(record['neither'] for record in records),
        categories_l1=categories_l1,
        categories_l2=categories_l2,
        columns=columns)


def judge_summary(records):
    """GenEval++: per tag the share of right images among the answered ones, and their mean.

    A tag without any answer has None, and then there is no overall.
    """
    answered = {record['tag']: [] for record in records}
    for record in records:
        if record['correct'] is not None:
            answered[record['tag']].append(record['correct'])
    columns = {}
    for tag, correct in answered.items():
        columns[tag] = mean(correct) if correct else None
    overall = None
    if None not in columns.values():
        overall = mean(columns.values())
    return dict(
        images=len(records),
        failed=sum(record['correct'] is None for record in records),
        missing=sum(record['reason'] == 'no image' for record in records),
        columns=dict(columns, overall=overall))
