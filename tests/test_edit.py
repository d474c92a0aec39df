"""ImgEdit-Bench and GEdit-Bench: official rules, and whole runs against a judge that misbehaves."""
import collections
import csv
import json
import math
import os
import random
import types

import pytest
from PIL import Image

from bench import edit, gedit, judges, summary
from conftest import ROOT
from judge_server import chat, images_of, question_of, response, serving
from running import lines, refusal
from t2i import read_json

PHOTOS = os.path.join(ROOT, '..', 'shared', 'photos', 'imgedit')
RUN = types.SimpleNamespace(rank=0, world=1, master=True, device='cpu')


# --- ImgEdit's rules -----------------------------------------------------------------------------
@pytest.mark.parametrize('answer, score', [
    ('Prompt Compliance: 4\nVisual Naturalness: 3\nDetail: 5', 4.0),
    ('Brief reasoning: fine.\n  A: 1  \nB: 2\nC: 2', 1.67),
    ('A: 5\nB: 4', 4.5),
    ('A: 3', 3.0),
    ('A: 7\nB: 0', 3.5),                                     # no range is officially checked
    ('A: 1\nB: 4/5\nC: 4.5\nD:5\n**E:** 5\nF: g: 5\nH: -2', 1.0),
    ('A: 1\nB: 1\nC: 1\nD: 1\nE: 1\nF: 1\nG: 1\nH: 2', 1.12),        # 1.125: halves to even
    ('no score', None),
    ('', None),
    ('A: 5 \u00b2', None),
    ('A: 4\nB: \u00b2', 4.0),
    ('A: \u00b2', None)])
def test_an_item_of_imgedit(answer, score):
    if score is None:
        pytest.raises(ValueError, edit.imgedit_item, answer)
    else:
        assert edit.imgedit_item(answer) == score


def edited(kind, score, scores=(3, 3, 3)):
    return dict(edit_type=kind, score=score, scores=list(scores))


def test_the_averages_of_imgedit():
    records = [edited('add', 4.33), edited('add', 2.0), edited('add', 2.67), edited('style', 5.0),
               edited('style', None, []), edited('add', 3.0, [3, 3]), edited('add', 5.0, [5, 9, 1])]
    s = summary.imgedit_summary(records)
    # add: 17 / 5; all: 22 / 6
    assert s['columns'] == dict(add=3.4, style=5.0, overall=pytest.approx(4.2))
    assert (s['images'], s['failed'], s['odd'], s['over_items']) == (7, 1, 2, 3.67)
    s = summary.imgedit_summary([*records, edited('action', None, [])])
    assert s['columns']['action'] is None and s['columns']['overall'] is None


# --- GEdit's rules -------------------------------------------------------------------------------
@pytest.mark.parametrize('answer, scores', [
    ('{"score": [7, 9], "reasoning": "x"}', [7, 9]),
    ('```json\n{\n"score" : [7, 9],\n"reasoning" : "[1, 2]"\n}\n```', [7, 9]),
    ('||V^=^V||\n{"score": [0, 10]}\n||V^=^V||', [0, 10]),
    ('{"Score": ["7", 8.5]}', [7, 8.5]),
    ('{"score": 6}', [6]),
    ('at first {"score": [1, 1]}, no: {"score": [7, 9]}', [7, 9]),
    ('[6, 0]', [6, 0]),
    ("{'score': [6, 0]}", [6, 0]),
    ('so the output score = [6, 0].', [6, 0]),
    (' 8\n', [8]),
    ('{"score": [11, 3]}', None),
    ('{"score": [-1, 3]}', None),
    ('{"score": [NaN, 3]}', None),
    ('{"score": []}', None),
    ('{"score": null}', None),
    ('{"score": {"a": 1}}', None),
    ('{"score": "yes"}', None),
    ('as said in [1], good', None),
    ('I give it an 8', None),
    ('', None)])
def test_scores_of_gedit(answer, scores):
    if scores is None:
        pytest.raises(ValueError, gedit.gedit_scores, answer)
    else:
        assert gedit.gedit_scores(answer) == scores


def graded(group, score, language='en', intersection=True):
    return dict(task_type=group, language=language, intersection=intersection, score=score)


def test_the_averages_of_gedit():
    assert gedit.gedit_item([9, 4], [9, 10]) == (4, 9, 6)
    records = [
        graded('a', (4, 9, 6)), graded('a', (0, 10, 0), intersection=False), graded('a', None),
        graded('b', (9, 9, 9)), graded('a', (1, 1, 1), 'cn', False), graded('b', None, 'cn')]
    s = summary.gedit_summary(records)
    assert s['groups']['en'] == dict(
        a=dict(SC=2, PQ=9.5, O=3), b=dict(SC=9, PQ=9, O=9), average=dict(SC=5.5, PQ=9.25, O=6))
    assert s['groups']['en intersection']['average'] == dict(SC=6.5, PQ=9, O=7.5)
    assert s['columns']['en O'] == 6 and s['columns']['en intersection O'] == 7.5
    assert s['groups']['cn']['a'] == dict(SC=1, PQ=1, O=1)
    assert s['columns']['cn O'] is None, 'no mean over fewer groups'
    assert s['columns']['cn intersection O'] is None
    assert (s['images'], s['failed']) == (6, 2)


# --- whole runs ----------------------------------------------------------------------------------
class Moody:
    """A judge that gives a question a random score, in a random way; the same for the same one.

    .scores {question: scores}: what it will say at last.
    """
    ways = ('plain', 'plain', 'thinks', 'prose first', 'busy first', 'broken first', 'never')

    def __init__(self, scores_of, says):
        self.scores_of, self.says = scores_of, says
        self.asked = collections.Counter()

    def __call__(self, body):
        question = question_of(body)
        self.asked[question] += 1
        rng = random.Random(question)
        way = rng.choice(self.ways)
        answer = self.says(self.scores_of(rng))
        if way == 'never':
            return rng.choice([response(chat(None)), response('<html>', 502),
                               response(chat('I had rather not say.'))])
        if self.asked[question] == 1:
            if way == 'prose first':
                return response(chat('A fine picture.'))
            if way == 'busy first':
                return response('{"error": {"message": "busy"}}', 429, Retry_After='1')
            if way == 'broken first':
                return response('', 500)
        if way == 'thinks':
            answer = f'<think>{self.says([1, 1, 1][:len(self.scores_of(rng))])}</think>\n{answer}'
        return response(chat(answer))

    def expected(self, question):
        rng = random.Random(question)
        way = rng.choice(self.ways)
        return None if way == 'never' else self.scores_of(rng)


@pytest.fixture
def judge(monkeypatch):
    """Starts a server -> its config keys; nobody sleeps between tries."""
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    monkeypatch.setattr(judges.time, 'sleep', lambda seconds: None)
    opened = []

    def start(respond):
        context = serving(respond)
        opened.append(context)
        return context.__enter__()
    yield start
    for context in opened:
        context.__exit__(None, None, None)


def keys(server, folder, **more):
    return types.SimpleNamespace(
        judge_url=server.url, judge_model='m', judge_timeout=20.0, judge_tries=2, judge_threads=4,
        folder=str(folder), sources='', seed=0, **more)


def scored(c):
    return edit.score_edits(c, RUN, edit.read_edits(c))


def write(path, text):
    path.write_text(text, encoding='utf-8')
    return str(path)


def small_set(folder):
    """An ImgEdit of 60 items over 12 images of 16 pixels -> its basic_edit.json."""
    os.makedirs(folder / 'animal')
    items = {}
    for n in range(60):
        name = f'animal/{n % 12}.jpg'
        Image.new('RGB', (16, 16), (n, 9, 9)).save(folder / name)
        kind = ('add', 'style', 'extract')[n % 3]
        items[f'{n}'] = dict(id=name, prompt=f'edit {n}', edit_type=kind)
    return write(folder / 'basic_edit.json', json.dumps(items))


def imgedit_answer(scores):
    return 'Brief reasoning: ok.\n' + '\n'.join(f'Score {n}: {s}' for n, s in enumerate(scores))


@pytest.mark.parametrize('whole', [False, True])
def test_imgedit_against_a_moody_judge(tmp_path, judge, whole):
    """All official items on their photos where these are at hand, else a small set.

    The results are the sources upside down; scores and averages are worked out again by hand.
    """
    prompts = f'{PHOTOS}/basic_edit.json'
    if not whole:
        prompts = small_set(tmp_path)
    elif not os.path.exists(prompts):
        pytest.skip('needs the benchmark: its photos are not part of the project')
    folder = os.path.dirname(prompts)
    items = {key: item for key, item in read_json(prompts).items()
             if os.path.exists(os.path.join(folder, item['id']))}         # 736 of 737
    results = tmp_path / 'results'
    results.mkdir()
    for key, item in items.items():
        with Image.open(os.path.join(folder, item['id'])) as image:
            image.resize((24, 24)).rotate(180).save(results / f'{key}.png')
    types_ = sorted({item['edit_type'] for item in items.values()})
    questions = {kind: f'{kind}? <edit_prompt> ({{}})' for kind in types_}
    moody = Moody(lambda rng: [rng.randint(1, 5) for _ in range(3)], imgedit_answer)
    server = judge(moody)
    c = keys(server, tmp_path / 'out', bench='imgedit', images=str(results),
             prompts=write(tmp_path / 'items.json', json.dumps(items)),
             judge_prompt=write(tmp_path / 'prompts.json', json.dumps(questions)))
    c.sources = folder
    s = scored(c)
    by_type, everything, failed = {kind: [] for kind in types_}, [], 0
    for item in items.values():
        scores = moody.expected(f'{item["edit_type"]}? {item["prompt"]} ({{}})')
        if scores is None:
            failed += 1
            continue
        everything.append(round(sum(scores) / 3, 2))
        by_type[item['edit_type']].append(everything[-1])
    means = {kind: round(sum(found) / len(found), 2) for kind, found in by_type.items()}
    overall = s['columns'].pop('overall')
    assert s['columns'] == means and overall == pytest.approx(sum(means.values()) / len(means))
    assert s['over_items'] == round(sum(everything) / len(everything), 2)
    assert (s['images'], s['failed'], s['odd']) == (len(items), failed, 0) and failed
    records = lines(f'{tmp_path}/out/results.jsonl')
    assert [record['key'] for record in records] == list(items), 'in the order of the file'
    kept = lines(f'{tmp_path}/out/replies.0.jsonl')
    assert any('think' in row['reply'] for row in kept) and 'A fine picture.' in str(kept)
    official = read_json(f'{tmp_path}/out/result.json')
    for record in records:
        if record['score'] is not None:
            assert edit.imgedit_item(official[record['key']]) == record['score']
    _, _, body = server.seen[0]
    source, result = images_of(body)
    assert result.size == (24, 24) and (source.format, result.format) == ('JPEG', 'PNG')
    before = sum(moody.asked.values())
    assert scored(c)['columns'].pop('overall') == overall
    again = sum(moody.asked.values()) - before
    assert again == 2 * len({r['key'] for r in records if r['score'] is None}), 'failures only'


def gedit_answer(scores):
    return json.dumps(dict(score=scores, reasoning='ok'))


VIE = '''"""theirs"""
_context_no_delimit = """context"""
_prompts_0shot_two_image_edit_rule = """two images"""
_prompts_0shot_tie_rule_SC = """
edit? <instruction>
"""
_prompts_0shot_rule_PQ = """quality?"""
_other = ["not", "a", "text"]
raise SystemExit("it must not be run")
'''


def gedit_set(folder, n=200):
    """Rows of GEdit over 11 groups in two languages, and their images -> the .jsonl."""
    rows = []
    for i in range(n):
        row = dict(key=f'k{i}', task_type=f'group-{i % 11}', instruction=f'\u6539 {i}',
                   instruction_language='en' if i < n // 2 else 'cn',
                   Intersection_exist=i % 3 > 0)
        rows.append(row)
        stem = folder / 'ours' / 'fullset' / row['task_type'] / row['instruction_language']
        os.makedirs(stem, exist_ok=True)
        Image.new('RGB', (20, 10), (i, 0, 0)).save(stem / f'k{i}_SRCIMG.png')
        Image.new('RGB', (16, 16), (i, 99, 0)).save(stem / f'k{i}.png')
    return rows, write(folder / 'gedit.jsonl', '\ufeff' + '\n'.join(map(json.dumps, rows)) + '\n')


@pytest.mark.parametrize('form', ['json', 'py'])
def test_gedit_against_a_moody_judge(tmp_path, judge, form):
    """200 items in two languages; the question on the quality is the same for all images."""
    rows, prompts = gedit_set(tmp_path)
    moody = Moody(lambda rng: [rng.randint(0, 10) for _ in range(2)], gedit_answer)

    def respond(body):
        if 'quality?' in question_of(body):                  # 0 to 10 by the image's red
            (image,) = images_of(body)
            return response(chat(gedit_answer([image.getpixel((5, 5))[0] // 24, 10])))
        return moody(body)
    server = judge(respond)
    question = 'context\ntwo images\n\nedit? {}\n'
    text, name = VIE, 'vie_prompts.py'
    if form == 'json':
        text = json.dumps(dict(SC=question.format('<instruction>'), PQ='context\nquality?'))
        name = 'prompts.json'
    c = keys(server, tmp_path / 'out', bench='gedit', prompts=prompts, images=f'{tmp_path}/ours',
             judge_prompt=write(tmp_path / name, text))
    s = scored(c)
    records = lines(f'{tmp_path}/out/results.jsonl')
    assert len(records) == 200
    scores = collections.defaultdict(lambda: collections.defaultdict(list))
    for row, record in zip(rows, records):
        wanted = moody.expected(question.format(row['instruction']))
        if wanted is None:
            assert record['score'] is None and record['reason']
            continue
        edit_score, quality, overall = record['score']
        assert edit_score == min(wanted) and overall == math.sqrt(edit_score * quality)
        assert abs(quality - int(row['key'][1:]) // 24) <= 1, 'JPEG moves a colour a little'
        name = row['instruction_language']
        scores[name][row['task_type']].append(overall)
        if row['Intersection_exist']:
            scores[f'{name} intersection'][row['task_type']].append(overall)
    for name, groups in scores.items():
        means = [sum(found) / len(found) for found in groups.values()]
        assert len(groups) == 11
        assert s['columns'][f'{name} O'] == pytest.approx(sum(means) / 11)
    assert s['failed'] == sum(record['score'] is None for record in records) > 0
    sizes = {tuple(image.size for image in images_of(body)) for _, _, body in server.seen}
    assert sizes == {((20, 10), (20, 10)), ((20, 10),)}, 'a result is scaled to its source'
    with open(f'{tmp_path}/out/ours_group-3_gpt_score.csv', encoding='utf-8') as f:
        table = list(csv.DictReader(f))
    (first,) = [row for row in table if row['edited_image'].endswith('/k3.png')] or [table[0]]
    assert set(first) == set(gedit.GEDIT_COLUMNS)
    of_group = [r for r in records if r['task_type'] == 'group-3' and r['score']]
    assert [float(row['sementics_score']) for row in table] == [r['score'][0] for r in of_group]


@pytest.mark.parametrize('bench, prompts, questions, word', [
    ('imgedit', '[1]', '{}', 'edit_type'),
    ('imgedit', '{"1": {"id": "a.jpg"}}', '{}', 'item 1'),
    ('imgedit', '{"1": {"id": "a.jpg",}}', '{}', 'line 1'),
    ('imgedit', '{"1": {"id": "a.jpg", "prompt": "p", "edit_type": "add"}}', '{}', 'add'),
    ('imgedit', '{"1": {"id": "a.jpg", "prompt": "p", "edit_type": "add"}}', '{"add": "?"}',
     '2 of 2 images'),
    ('imgedit', '{}', '{}', 'no score'),
    ('gedit', '{"key": "k"}', '{"SC": "s", "PQ": "p"}', ':1'),
    ('gedit', '{"key": "k"},', '{"SC": "s", "PQ": "p"}', ':1'),
    ('gedit', '{}', '{"SC": "s"}', 'PQ')])
def test_files_that_cannot_be_used_are_named(tmp_path, judge, bench, prompts, questions, word):
    c = keys(judge(None), tmp_path / 'out', bench=bench, images=str(tmp_path),
             prompts=write(tmp_path / 'items.json', prompts),
             judge_prompt=write(tmp_path / 'questions.json', questions))
    message = refusal(scored, c)
    assert word in message and str(tmp_path) in message


@pytest.mark.parametrize('change, word', [
    (dict(Intersection_exist=None), 'Intersection_exist'),
    (dict(instruction=3), 'instruction'),
    (dict(key='k0', task_type='group-0', instruction_language='en'), 'duplicate')])
def test_rows_of_gedit_that_cannot_be_used_are_named(tmp_path, judge, change, word):
    rows, path = gedit_set(tmp_path, 3)
    rows[2].update(change)
    write(tmp_path / 'gedit.jsonl', '\n'.join(map(json.dumps, rows)))
    for name, text in (('p.py', VIE), ('q.py', 'x = ('), ('r.py', 'x = 1')):
        c = keys(judge(None), tmp_path / 'out', bench='gedit', images=f'{tmp_path}/ours',
                 prompts=path, judge_prompt=write(tmp_path / name, text))
        message = refusal(scored, c)
        assert (f'{path}:3' in message and word in message) if name == 'p.py' else name in message


def test_a_damaged_result_leaves_no_score(tmp_path, judge):
    prompts = small_set(tmp_path)
    for n in range(60):
        write(tmp_path / f'{n}.png', 'not an image')
    c = keys(judge(None), tmp_path / 'out', bench='imgedit', images=str(tmp_path), prompts=prompts,
             judge_prompt=write(tmp_path / 'p.json', '{"add": "?", "style": "?", "extract": "?"}'))
    message = refusal(scored, c)
    assert '60 of 60' in message and '0.png: cannot be read' in message
    assert not os.path.exists(f'{tmp_path}/out/summary.json')
