"""Lines of results.jsonl -> the numbers of a checkpoint: summary.json, and the table."""
import math

import numpy as np

from bench.prompts import TAGS

DPG_SHOWN = ('global', 'entity', 'attribute', 'relation', 'other')
SIMILAR = 1.2                                # captions' lengths up to this ratio are similar
RESAMPLES = 1000


def mean(values):
    return sum(values) / len(values)


def markdown(head, rows):
    """{row: {column: number, text or None}} -> a table; the first row's columns are everybody's."""
    columns = list(next(iter(rows.values())))
    lines = [[head, *columns], ['---'] * (len(columns) + 1)]
    for name, row in rows.items():
        cells = [name]
        for column in columns:
            cell = row.get(column)
            if cell is None:
                cell = '-'
            if not isinstance(cell, str):
                cell = f'{cell:.3f}'
            cells.append(cell)
        lines.append(cells)
    return ''.join(f'| {" | ".join(cells)} |\n' for cells in lines)


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


# --- edits: records whose score is None have no answer, and are left out and counted --------------
def answered(records):
    return [record for record in records if record['score'] is not None]


def rounded_mean(scores):
    """To two digits, None of nothing."""
    return round(sum(scores) / len(scores), 2) if scores else None


def whole_mean(values):
    """The plain mean; None where one of them is missing, or all."""
    values = list(values)
    if not values or None in values:
        return None
    return float(np.mean(values))


def imgedit_summary(records):
    """records [{edit_type, score or None, scores}] -> columns: each type, and their mean.

    odd counts the answers that have not three scores of 1 to 5; they count as officially.
    """
    by_type = {record['edit_type']: [] for record in records}
    for record in answered(records):
        by_type[record['edit_type']].append(record['score'])
    columns = {name: rounded_mean(scores) for name, scores in by_type.items()}
    shapes = [(len(record['scores']), set(record['scores']) <= set(range(1, 6)))
              for record in answered(records)]
    return dict(
        images=len(records),
        failed=len(records) - len(answered(records)),
        odd=sum(shape != (3, True) for shape in shapes),
        over_items=rounded_mean([record['score'] for record in answered(records)]),
        columns=dict(columns, overall=whole_mean(columns.values())))


def gedit_summary(records):
    """records [{task_type, language, intersection, score: (SC, PQ, O) or None}] -> the averages.

    For every language, over its items and over those marked intersection: each group's means, and
    under `average` the means of the groups; columns are the averages.
    """
    columns, groups = {}, {}
    for language in sorted({record['language'] for record in records}):
        of_language = [record for record in records if record['language'] == language]
        marked = [record for record in of_language if record['intersection']]
        for name, some in ((language, of_language), (f'{language} intersection', marked)):
            found = {record['task_type']: {} for record in of_language}
            for group, means in found.items():
                scores = [r['score'] for r in answered(some) if r['task_type'] == group]
                for i, part in enumerate(('SC', 'PQ', 'O')):
                    means[part] = whole_mean([score[i] for score in scores])
            average = {}
            for part in ('SC', 'PQ', 'O'):
                average[part] = whole_mean([means[part] for means in found.values()])
                columns[f'{name} {part}'] = average[part]
            groups[name] = dict(found, average=average)
    return dict(images=len(records), failed=len(records) - len(answered(records)),
                groups=groups, columns=columns)


# --- pairs of captions ---------------------------------------------------------------------------
def similar(words):
    """Whether two captions of so many words are of similar length."""
    return max(words) <= SIMILAR * min(words)


def pair_summary(records, seed=0):
    """records [{judge, image, words, orders: [ours as A, ours as B] or None}] -> the numbers.

    orders are our caption's scores. Per judge and for their mean: win, a pair being the mean of
    its orders; win_similar, of pairs of similar length; both with bootstrap errors over images.
    disagree: share of pairs whose two orders differ; first: share of decided answers that prefer
    the caption shown first. What has no answer is left out and counted.
    """
    judges = list(dict.fromkeys(record['judge'] for record in records))
    images = list(dict.fromkeys(record['image'] for record in records))
    win = np.full((len(judges), len(images)), np.nan)
    alike = np.zeros(len(images), bool)
    orders = {judge: [] for judge in judges}
    for record in records:
        column = images.index(record['image'])
        alike[column] = similar(record['words'])
        if record['orders']:
            orders[record['judge']].append(record['orders'])
            win[judges.index(record['judge']), column] = np.mean(record['orders'])
    drawn = np.random.default_rng(seed).integers(len(images), size=(RESAMPLES, len(images)))
    rows, means = {}, {}
    for name, some in (('win', win), ('win_similar', np.where(alike, win, np.nan))):
        resampled = np.array([average(row[drawn]) for row in some])          # (judges, RESAMPLES)
        values = [average(row) for row in some]
        for judge, value, error in zip(judges, values, spread(resampled)):
            rows.setdefault(judge, {}).update({name: value, f'{name}_error': error})
        means.update({name: np.mean(values), f'{name}_error': spread(resampled.mean(0))})
    for judge, row in rows.items():
        row.update(bias(orders[judge]), pairs=len(images), failed=len(images) - len(orders[judge]))
    for name in ('disagree', 'first', 'pairs', 'failed'):
        means[name] = np.mean([row[name] for row in rows.values()])
    rows['mean'] = means
    return dict(similar=int(alike.sum()), judges=plain(rows))


def average(values):
    """The mean over the last axis of what is not NaN; NaN of nothing."""
    there = ~np.isnan(values)
    with np.errstate(invalid='ignore'):
        return np.where(there, values, 0).sum(-1) / there.sum(-1)


def spread(resampled):
    """The standard error of bootstrapped values over the last axis."""
    return np.std(resampled, axis=-1, ddof=1)


def bias(orders):
    """What the place of a caption does to one judge's answers [[ours as A, ours as B]]."""
    orders = np.array(orders).reshape(-1, 2)
    as_first = np.stack([orders[:, 0], 1 - orders[:, 1]], 1)        # of the caption shown first
    decided = as_first[as_first != 0.5]
    return dict(
        win_both=average((orders > 0.5).all(1).astype(float)),
        lose_both=average((orders < 0.5).all(1).astype(float)),
        disagree=average((orders[:, 0] != orders[:, 1]).astype(float)),
        first=average(decided))


def plain(rows):
    """{judge: {name: value}} as JSON has it: floats, None for NaN."""
    out = {}
    for judge, row in rows.items():
        out[judge] = {name: None if np.isnan(v) else float(v) for name, v in row.items()}
    return out
