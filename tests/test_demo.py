"""`make demo` at two updates a stage: what it promises to leave behind."""
import json
import math
import os
import subprocess
import sys

import pytest

import config
from data.images import open_data
from data.shapes import demo
from lib import ranks
from lib.checkpoint import open_uae
from lib.scores import Evaluator

COUNTS = {'caption_len', 'caption_truth', 'caption_recall', 'caption_exact'}
GREEDY = {f'greedy_{name}' for name in COUNTS}
MEASURES = {'reward', 'judge', 'mse', 't2i_own', 't2i_true'} | COUNTS | GREEDY


@pytest.fixture(scope='module')
def out(tmp_path_factory):
    """The folder of a demo of few images."""
    folder = str(tmp_path_factory.mktemp('demo'))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(config.shared, 'eval_images', 8)
        for script in demo.STAGES.values():
            monkeypatch.setitem(script.keys, 'batch', 2)
        demo.main(['--steps=2', '--scenes=8', f'--out_dir={folder}', '--device=cpu'])
    return folder


def test_report_has_every_promised_number(out):
    with open(f'{out}/report.json') as f:
        report = json.load(f)
    assert set(report['stages']) == {'base', *demo.STAGES}
    for scores in (*report['stages'].values(), report['controls']['shuffled_reward']):
        assert set(scores) == MEASURES and all(math.isfinite(v) for v in scores.values())
    assert set(report['ceiling']) == {'reward', 'judge', 'mse', 't2i'}
    assert report['ceiling']['t2i'] > 0.97
    assert report['floor']['t2i'] < report['stages']['base']['t2i_true']
    assert set(report['controls']['base_cool']) == COUNTS
    assert set(report['history']) == {*demo.STAGES, 'shuffled_reward'}
    for stage in demo.STAGES:
        assert [line['step'] for line in report['history'][stage]] == [0, 2]
    assert set(report['seconds']) >= {*demo.STAGES, 'shuffled_reward', 'eval_base'}
    assert report['seed'] == 1337 and report['versions']['torch']


def test_what_follows_stage_2_changes_drawings_and_no_caption(out):
    with open(f'{out}/report.json') as f:
        stages = json.load(f)['stages']
    before = stages['grpo_encoder']
    for name in ('nft_decoder', 'by_gradient'):
        after = stages[name]
        assert all(after[count] == before[count] for count in COUNTS | GREEDY)
        assert after['reward'] != before['reward']
        before = after


def test_the_table_and_the_page_are_not_blank(out):
    assert os.path.getsize(f'{out}/report.md') > 500
    with open(f'{out}/report.html') as f:
        assert f.read().count('<img') > 3 * 8, 'drawings of each stage'


def test_the_base_is_honest_about_what_rl_may_show(out):
    """Fixed before any RL run; docs/log.md has all 256 held-out scenes, here are the first 128."""
    c = config.parse({}, {}, ['--eval_images=128', '--device=cpu'], 'x.py')
    run = ranks.start(c)
    summary, _ = Evaluator(open_uae(c), open_data(c, run)[1], c, run)()
    assert 0.15 <= summary['caption_recall'] <= 0.35
    assert summary['greedy_caption_recall'] <= 0.70 and summary['greedy_caption_truth'] >= 0.85


def test_threads_of_the_demo_spin_only_for_a_while():
    """As the library that runs the threads says it, if it is one that does."""
    env = {name: value for name, value in os.environ.items() if 'OMP_' not in name}
    env.update(OMP_DISPLAY_ENV='verbose')
    command = [sys.executable, '-c', 'import data.shapes.demo']
    done = subprocess.run(command, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    if 'GOMP_SPINCOUNT' not in done.stderr:
        pytest.skip('no OpenMP that shows its settings')
    assert "GOMP_SPINCOUNT = '3000'" in done.stderr
