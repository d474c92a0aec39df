"""Captions in pairs: the rules, and whole runs in the embedded world against an oracle judge."""
import json
import os
import random
import threading
import types

import numpy as np
import pytest
from PIL import Image

from bench import judges, pairs, summary
from data.shapes import scenes as world
from judge_server import FactJudge, chat, images_of, question_of, response, serving
from running import lines, refusal
from t2i import read_json

RUN = types.SimpleNamespace(rank=0, world=1, master=True, device='cpu')


# --- the rules -----------------------------------------------------------------------------------
@pytest.mark.parametrize('answer, score', [
    ('{"winner": "A", "reason": "B is short"}', 1),
    ('{"winner": "b"}', 0),
    ('{"Winner": "Caption A."}', 1),
    ('{"winner": "TIE"}', 0.5),
    ('first {"winner": "A"}, but no: ```{"winner": "B"}```', 0),
    ('| A | 9 |\nFinal Answer: A', 1),
    ('Final Answer: A? No.\n**Final answer:** [B]', 0),
    ('Final Answer: tie', 0.5),
    ('{"winner": "C"}', None),
    ('{"winner": "A or B"}', None),
    ('{"winner": null}', None),
    ('{"winner": ["A"]}', 1),
    ('Final Answer: both', None),
    ('A', None),
    ('', None)])
def test_winner(answer, score):
    if score is None:
        pytest.raises(ValueError, pairs.winner, answer)
    else:
        assert pairs.winner(answer) == score


def judged(image, orders, judge='m', words=(10, 10)):
    return dict(judge=judge, image=image, words=list(words), orders=orders)


def test_a_summary_worked_by_hand():
    """Scores of ours when it is shown first and when second."""
    records = [
        judged('a', [1, 1]),                                 # ours in both orders
        judged('b', [0, 0], words=(10, 12)),
        judged('c', [1, 0], words=(13, 10)),                 # whatever is first
        judged('d', [1, 0.5], words=(10, 13)),
        judged('e', None)]
    row = summary.pair_summary(records)['judges']['m']
    assert row['win'] == pytest.approx((1 + 0 + .5 + .75) / 4)
    assert (row['pairs'], row['failed']) == (5, 1)
    assert row['win_both'] == row['lose_both'] == 1 / 4
    assert row['disagree'] == 2 / 4
    # shown first: ours, theirs | theirs, ours | ours, theirs | ours; the tie is not decided
    assert row['first'] == pytest.approx((1 + 0 + 0 + 1 + 1 + 1 + 1) / 7)
    assert row['win_similar'] == 1 / 2, 'of a and b: e has no answer'
    s = summary.pair_summary(records)
    assert s['similar'] == 3 and s['judges']['mean']['win'] == row['win']


def test_the_mean_over_judges_and_their_errors():
    """100 images: one judge says ours in 75, the other in 25; for the mean they cancel out."""
    records = []
    for n in range(100):
        ours = float(n % 4 > 0)
        records.append(judged(f'{n}', [ours, ours], 'p'))
        records.append(judged(f'{n}', [1 - ours, 1 - ours], 'q'))
    s = summary.pair_summary(records)['judges']
    assert (s['p']['win'], s['q']['win'], s['mean']['win']) == (.75, .25, .5)
    assert s['p']['win_error'] == pytest.approx((.75 * .25 / 100) ** .5, rel=.1)
    assert s['mean']['win_error'] < 1e-9, 'images are drawn once for all judges'
    assert s == summary.pair_summary(records)['judges'], 'the same errors every time'
    records.append(judged('0', None, 'silent'))
    s = summary.pair_summary(records)['judges']
    assert s['silent']['win'] is None and s['mean']['win'] is None and s['p']['win'] == .75


# --- whole runs ----------------------------------------------------------------------------------
@pytest.fixture
def scenes(tmp_path):
    """40 scenes as PNG files -> (scenes, keys of a run whose judges ask `server`).

    Ours are full captions, theirs name every second object and invent one.
    """
    rng = np.random.default_rng(3)
    found = [world.random_scene(rng) for _ in range(40)]
    ours, theirs = [], []
    for n, scene in enumerate(found):
        path = f'{tmp_path}/{n}.png'
        Image.fromarray(world.draw(scene)).save(path)
        full = world.caption(scene)
        phrases = full.removesuffix(' .').split(' , ')
        short = ' , '.join(phrases[::2] + ['teal ball']) + ' .'
        ours.append(dict(image=path, caption=full))
        theirs.append(dict(image=f'elsewhere/{n}.png', caption=short))
    random.Random(0).shuffle(theirs)
    for name, rows in (('ours', ours), ('theirs', theirs)):
        with open(tmp_path / f'{name}.jsonl', 'w') as f:
            f.writelines(json.dumps(row) + '\n' for row in rows)

    def keys(server, **more):
        given = dict(
            data='shapes', captions=f'{tmp_path}/ours.jsonl', against=f'{tmp_path}/theirs.jsonl',
            judge_url=server.url, judge_model='m', judge_timeout=20.0, judge_tries=2,
            judge_threads=4, judge_prompt='', folder=f'{tmp_path}/out', seed=0)
        return types.SimpleNamespace(**{**given, **more})
    return found, keys


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    monkeypatch.setattr(judges.time, 'sleep', lambda seconds: None)


def test_an_oracle_prefers_the_caption_with_more_facts(scenes, tmp_path):
    found, keys = scenes
    with serving(FactJudge()) as server:
        s = pairs.judge_pairs(keys(server), RUN)
        row = s['judges']['m']
        assert row['win'] == row['win_both'] == 1 and row['disagree'] == 0 and row['first'] == .5
        assert len(server.seen) == 80, 'both orders'
        _, _, body = server.seen[0]
        assert body['messages'][0] == dict(role='system', content=pairs.PAIR)
        (image,) = images_of(body)
        assert image.format == 'PNG' and image.size == (32, 32)
        own = keys(server, against=f'{tmp_path}/ours.jsonl', folder=f'{tmp_path}/self')
        assert pairs.judge_pairs(own, RUN)['judges']['m']['win'] == .5
        assert len(server.seen) == 80, 'the same caption needs no judge'
        swapped = keys(server, captions=f'{tmp_path}/theirs.jsonl', folder=f'{tmp_path}/swap',
                       against=f'{tmp_path}/ours.jsonl', data=str(tmp_path))
        os.makedirs(tmp_path / 'Image')
        for n in range(40):
            os.rename(tmp_path / f'{n}.png', tmp_path / 'Image' / f'{n}.png')
        assert pairs.judge_pairs(swapped, RUN)['judges']['m']['win'] == 0
    records = lines(f'{tmp_path}/out/results.jsonl')
    assert [record['image'] for record in records] == [f'{tmp_path}/{n}.png' for n in range(40)]
    assert records[0]['ours'] == world.caption(found[0])
    table = open(f'{tmp_path}/out/table.md').read()
    assert '| m | 1.000 | 0.000 |' in table and '| mean | 1.000 |' in table


def test_several_judges_that_misbehave_and_a_run_that_is_resumed(scenes, tmp_path, monkeypatch):
    """One likes what comes first, one answers by fits and starts, each with its own key."""
    found, keys = scenes
    fair = FactJudge()
    silent = [world.caption(scene) for scene in found[:4]]
    turns = []

    def moody(body):
        turns.append(body)
        if any(f'Caption A:\n{text}' in question_of(body) for text in silent):
            return [response(chat('pass')), response('', 500), response(chat(None)),
                    response('{"error": {"message": "slow"}}', 429)][len(turns) % 4]
        return fair(body) if len(turns) % 2 else response(chat('<think>{"winner": "A"}'))

    monkeypatch.setenv('OPENAI_API_KEY', 'key-1,key-2')
    with serving(lambda body: response(chat('{"winner": "A"}'))) as first, serving(moody) as second:
        c = keys(first, judge_model='first,moody', judge_url=f'{first.url},{second.url}',
                 judge_tries=3, judge_threads=1)
        s = pairs.judge_pairs(c, RUN)
        assert {key for _, key, _ in first.seen} == {'Bearer key-1'}
        assert {key for _, key, _ in second.seen} == {'Bearer key-2'}
        assert s['judges']['first']['win'] == .5 and s['judges']['first']['disagree'] == 1
        assert s['judges']['first']['first'] == 1
        moody_row = s['judges']['moody']
        assert moody_row['failed'] == 4 and moody_row['win'] == 1
        assert s['judges']['mean']['win'] == pytest.approx(.75)
        kept = lines(f'{tmp_path}/out/replies.0.jsonl')
        assert {row['judge'] for row in kept} == {'first', 'moody'}
        assert {row['order'] for row in kept} == {'ours first', 'theirs first'}
        assert any(row['reply'] == 'pass' for row in kept), 'every reply'
        before = len(first.seen), len(second.seen)
        assert pairs.judge_pairs(c, RUN) == s
        assert len(first.seen) == before[0]
        assert len(second.seen) == before[1] + 4 * 3, 'failures only'
    assert read_json(f'{tmp_path}/out/summary.json') == s


@pytest.mark.parametrize('change, key, word', [
    (dict(judge_model='a,b', judge_url='http://a/v1,http://b/v1,http://c/v1'), '', 'judge_url'),
    (dict(judge_model='a,a'), '', 'different names'),
    (dict(judge_model='a,b', judge_url='http://a/v1,http://b/v1'), 'one', 'OPENAI_API_KEY'),
    (dict(judge_url='localhost'), '', 'judge_url'),
    (dict(judge_threads=0), '', 'judge_threads'),
    (dict(judge_tries=0), '', 'judge_tries'),
    (dict(against='no/such.jsonl'), '', 'no/such.jsonl'),
    (dict(captions='README.md'), '', 'README.md:1')])
def test_keys_that_cannot_be_meant(scenes, monkeypatch, change, key, word):
    _, keys = scenes
    monkeypatch.setenv('OPENAI_API_KEY', key)
    with serving(None) as server:
        assert word in refusal(pairs.judge_pairs, keys(server, **change), RUN)


def test_a_judge_that_refuses_us_is_not_asked_forty_times(scenes, tmp_path):
    _, keys = scenes
    with serving(lambda body: response('{"error": "who are you"}', 401)) as server:
        assert 'HTTP 401: who are you' in refusal(pairs.judge_pairs, keys(server), RUN)
        assert len(server.seen) < 20
    os.remove(tmp_path / '7.png')
    with serving(None) as server:
        message = refusal(pairs.judge_pairs, keys(server), RUN)
        assert '1 of 40 images' in message and '7.png' in message


def test_threads_that_send_what_a_model_refuses_at_the_same_time(scenes):
    _, keys = scenes
    together = threading.Barrier(4)

    def respond(body):
        if 'temperature' not in body:
            return FactJudge()(body)
        together.wait(20)
        return response('{"error": {"message": "no temperature, please"}}', 400)
    with serving(respond) as server:
        assert pairs.judge_pairs(keys(server), RUN)['judges']['m']['win'] == 1
        assert len(server.seen) == 80 + 4


def test_a_caption_without_a_counterpart_is_no_pair(scenes, tmp_path):
    _, keys = scenes
    text = open(tmp_path / 'theirs.jsonl').read().splitlines()
    with open(tmp_path / 'theirs.jsonl', 'w') as f:
        f.write('\n'.join(text[1:]))
    with serving(None) as server:
        assert '1 of 40 references' in refusal(pairs.judge_pairs, keys(server), RUN)
