"""ImgEdit-Bench and GEdit-Bench: a judge scores edited images, averages are the official ones.

Rules: PKU-YuanGroup/ImgEdit, Benchmark/Basic (step1, step2), and stepfun-ai/Step1X-Edit,
GEdit-Bench (VIEScore's task "tie", calculate_statistics). Their prompts for the judge are files
that the user gives.

    official                           here                        why
    an answer without a score: left    asked again, then left out  a guess says nothing about
    out (ImgEdit), guessed (GEdit)     and counted as failed       the image
    a missing image: a failed item     no score at all             a mean over others is no score
    ImgEdit has no overall, RecA's     `overall` is the mean of    types differ in size; RecA's
    script has the mean of all items   types, `over_items` RecA's  3.75 is probably over items
"""
import os

from lib.files import write_json
from bench.gedit import gedit_scorer, read_gedit, write_tables
from bench.judges import Judge, ask_all, kept_replies
from bench.pictures import Unusable, file_bytes
from bench.prompts import read_json, read_lines, texts_of
from bench.summary import gedit_summary, imgedit_summary


# --- ImgEdit's rules: pure functions -------------------------------------------------------------
def imgedit_scores(answer):
    """The numbers in an answer's lines `name: digits`; officially no other line counts.

    Raises ValueError if there is none.
    """
    values = [line.strip().partition(': ')[2] for line in answer.splitlines()]
    scores = [int(value) for value in values if value.isdecimal()]
    if not scores:
        raise ValueError(f'no line `name: digit` in {answer[:60]!r}')
    return scores


def imgedit_item(answer):
    """An item's score: the mean of its answer's numbers to two digits."""
    scores = imgedit_scores(answer)
    return round(sum(scores) / len(scores), 2)


# --- items: what is asked about which images -----------------------------------------------------
def read_imgedit(config):
    """basic_edit.json {key: {id, prompt, edit_type}}, prompts.json {edit_type: question}."""
    items = read_json('\n'.join(read_lines(config.prompts)), config.prompts)
    questions = read_json('\n'.join(read_lines(config.judge_prompt)), config.judge_prompt)
    if not isinstance(items, dict):
        raise SystemExit(f'{config.prompts}: expected {{key: {{id, prompt, edit_type}}}}')
    folder = config.sources or os.path.dirname(config.prompts)
    found = []
    for key, row in items.items():
        where = f'{config.prompts}: item {key}'
        source, prompt, kind = texts_of(row, where, 'id', 'prompt', 'edit_type')
        (question,) = texts_of(questions, f'{config.judge_prompt}: {kind}', kind)
        found.append(dict(
            key=key, edit_type=kind, instruction=prompt, source=os.path.join(folder, source),
            result=f'{config.images}/{key}.png',
            question=question.replace('<edit_prompt>', prompt)))
    return found


# --- scorers -------------------------------------------------------------------------------------
def imgedit_scorer(config, run):
    """-> scorer(item) -> a line of results.jsonl. The judge gets the files as they are."""
    judge = Judge(config, kept_replies(f'{config.folder}/replies', run))

    def read(answer):
        return imgedit_scores(answer), answer

    def scorer(item):
        images = [file_bytes(item['source']), file_bytes(item['result'])]
        record = dict(key=item['key'], edit_type=item['edit_type'], score=None, scores=[])
        try:
            scores, answer = judge.ask(read, item['question'], *images, item=item['key'])
        except Unusable as e:
            return dict(record, answer='', reason=f'no answer: {e}')
        return dict(record, score=imgedit_item(answer), scores=scores, answer=answer, reason='')
    return scorer


def write_answers(config, records):
    answers = {record['key']: record['answer'] for record in records}
    write_json(f'{config.folder}/result.json', answers)


# --- the run -------------------------------------------------------------------------------------
BENCHES = dict(
    imgedit=(read_imgedit, imgedit_scorer, imgedit_summary, write_answers),
    gedit=(read_gedit, gedit_scorer, gedit_summary, write_tables))


def read_edits(config):
    """config.bench imgedit or gedit -> its items."""
    return BENCHES[config.bench][0](config)


def need_images(config, items, *names):
    """Refuses items whose `source` or `result`, as `names` say, is not there."""
    files = [item[name] for item in items for name in names]
    missing = [path for path in files if not os.path.exists(path)]
    if missing or not items:
        raise SystemExit(f'{len(missing)} of {len(files)} images of {config.prompts} are missing, '
                         f'so there is no score; first: {"".join(missing[:1])}')


def score_edits(config, run, items):
    """Asks about every edit of config.bench, writes results.jsonl and summary.json.

    -> the summary, None on other ranks. Beside them what the official scripts read: ImgEdit's
    result.json, GEdit's METHOD_GROUP_gpt_score.csv.
    """
    _, open_scorer, summarise, write_official = BENCHES[config.bench]
    need_images(config, items, 'source', 'result')
    records = ask_all(config, run, items, open_scorer(config, run))
    if not run.master:
        return None
    write_official(config, records)
    summary = summarise(records)
    write_json(f'{config.folder}/summary.json', summary)
    return summary
