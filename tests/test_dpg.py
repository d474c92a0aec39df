"""DPG-Bench: its rules on hand-made answers, its CSV, its grids, and the official script's bug."""
import os
import types

import numpy as np
import pytest
import torch
from PIL import Image

import eval_t2i
from bench import dpg, prompts, summary
from eval_t2i import dpg_score
from running import lines, refusal
from t2i import SHAPES, keys_of, read_json


# --- the rules ---------------------------------------------------------------------------------
def asks(*dependencies):
    return [dict(proposition_id=n, dependency=d) for n, d in enumerate(dependencies, 1)]


@pytest.mark.parametrize('questions, answers, score', [
    (asks([0], [0]), (1, 1), 1),
    (asks([0], [0]), (0, 1), 0.5),
    (asks([0], [1]), (0, 1), 0),
    (asks([0], [1]), (1, 0), 0.5),
    # a no spreads to grandchildren
    (asks([0], [1], [2]), (0, 1, 1), 0),
    (asks([0], [1], [2]), (1, 0, 1), 1 / 3),
    # ... but not past children that come before their parents
    (asks([2], [0]), (1, 0), 0),
    (asks([2], [3], [0]), (1, 1, 0), 1 / 3),
    (asks([0], [0], [1, 2]), (1, 0, 1), 1 / 3),
    (asks([0], [0], [0, 1]), (1, 0, 1), 2 / 3),
    (asks([1]), (0,), 0)])
def test_dpg_score(questions, answers, score):
    said = {n: bool(a) for n, a in enumerate(answers, 1)}
    before = dict(said)
    assert dpg_score(questions, said) == pytest.approx(score)
    assert said == before, 'the answers are left as they were'


def test_dpg_answers_may_have_any_order():
    questions = [dict(proposition_id=7, dependency=[3]), dict(proposition_id=3, dependency=[0])]
    assert dpg_score(questions, {3: False, 7: True}) == 0


def test_dpg_categories_of_one_name_are_not_mixed():
    """A category without a second level has the name of the first level of others."""
    categories = [['entity', 1.0], ['entity - whole', 0.0], ['relation - spatial', 1.0]]
    s = summary.dpg_summary([dict(score=0.5, neither=0, categories=categories)])
    assert s['categories_l1'] == dict(entity=50.0, relation=100.0)
    assert s['categories_l2'] == {
        'entity': 100.0, 'entity - whole': 0.0, 'relation - spatial': 100.0}
    assert s['columns'] == dict(entity=50.0, relation=100.0, overall=50.0)
    assert list(s['columns']) == ['entity', 'relation', 'overall']


@pytest.mark.parametrize('dependencies, crops, score', [
    ([[0], [0]], [(1, 1)], 1),                           # nobody needs the lost one
    ([[0], [0], [1]], [(1, 1, 1)], None),
    ([[0], [0], [1]], [(1, 0, 0)], None),                # an answer of its own does not help
    ([[0], [0], [1, 2]], [(1, 0, 1)], None),             # the lost parent is looked up first
    ([[0], [0], [2, 1]], [(1, 0, 1)], 0),                # ... or not at all
    ([[0], [0], [2, 1]], [(1, 1, 1)], None),
    ([[0], [0], [2, 1]], [(1, 0, 1), (1, 1, 1)], None),  # one crop is enough
    ([[0], [0], [2], [3, 1]], [(1, 0, 1, 1)], 0),        # a no that its own parent made
    ([[0], [0], [2, 1], [0]], [(1, 0, 1, 1), (0, 0, 0, 1)], 1 / 3)])
def test_the_official_script_leaves_out_whom_it_asks_for_the_lost_row(
        tmp_path, monkeypatch, dependencies, crops, score):
    questions = asks(*dependencies)
    for question in questions:
        question.update(question='?', category='entity - whole')
    # the same crops for our scorer; it takes one or four, and two of them repeated will do
    size = (32, 32)
    if len(crops) == 2:
        crops = crops * 2
        size = (64, 64)
    replies = []
    for _, *answers in crops:
        replies += ['yes' if answer else 'no' for answer in answers]
    replies = iter(replies)
    monkeypatch.setattr(dpg, 'local_vlm', lambda c, device: None)
    monkeypatch.setattr(dpg, 'remembered', lambda *a: lambda image, text: next(replies))
    path = f'{tmp_path}/a.png'
    Image.new('RGB', size).save(path)
    c = keys_of('--bench=dpg', f'--samples={len(crops)}', folder=str(tmp_path))
    scorer = dpg.dpg_scorer(c, types.SimpleNamespace(device='cpu'))
    (item,) = dpg.drop_first_row([dict(id='a', questions=questions)])
    record = scorer(item, path)
    if score is None:
        assert record is None
    else:
        assert record['score'] == pytest.approx(score)
        assert len(record['categories']) == len(dependencies) - 1


@pytest.mark.parametrize('answer, said', [
    ('yes', True), ('Yes.', True), (' YES, there is', True),
    ('no', False), ('No!', False), ('\n"no"', False),
    ('The image shows yes', None), ('', None), ('not sure', None), ('yesterday', None),
    ('None', None), ('...', None)])
def test_yes_or_no_or_neither(answer, said):
    assert dpg.says_yes(answer) is said


# --- the questions -----------------------------------------------------------------------------
COLUMNS = ('item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,'
           'tuple,question_natural_language')


def row(number, parents, detail, thing, name='a1', broad='entity'):
    """A row of the CSV."""
    return (f'{name},two dogs,k,{number},{parents},{broad},whole,'
            f'{broad} - {detail} (dog),Is there {thing}?')


def write_csv(path, *rows):
    path.write_text('\n'.join([COLUMNS, *rows]) + '\n')
    return path


@pytest.mark.parametrize('rows, line, word', [
    ([row('x', 0, 'whole', 'a')], 2, 'malformed'),
    ([row(1, '', 'whole', 'a')], 2, 'malformed'),
    (['a1,two dogs,k,1'], 2, 'malformed'),
    ([row(1, 0, 'w', 'a'), row(1, 0, 'w', 'b')], 3, 'duplicate'),
    ([row(1, 0, 'w', 'a'), row(2, 5, 'w', 'b')], 3, 'depends'),
    ([row(1, 0, 'w', 'a'), row(1, 0, 'w', 'a', 'b1'), row(2, 0, 'w', 'a')], 4, 'duplicate'),
    ([row(1, 0, 'w', 'a', '../a1')], 2, 'file name'),
    ([row(1, 0, 'w', 'a'), row(2, 0, 'w', 'b') + ', or c?'], 3, 'more columns'),
    ([row(1, 0, 'w', 'a'), 'a1,"two' + ' dogs' * 30000], 3, 'malformed')])
def test_malformed_rows_are_named_with_file_and_line(tmp_path, rows, line, word):
    path = write_csv(tmp_path / 'p.csv', *rows)
    argv = ['--bench=dpg', f'--prompts={path}', f'--out_dir={tmp_path}/out']
    message = refusal(eval_t2i.main, argv)
    assert f'{path}:{line}: ' in message and word in message


def test_rows_of_the_csv(tmp_path):
    path = write_csv(
        tmp_path / 'p.csv', row(1, 0, 'whole', 'a'), row(3, '"1, 2"', 'part', 'b'),
        row(2, 0, 'whole', 'c'), row(1, 0, 'whole', 'd', 'b1'))
    items = prompts.read_dpg(str(path))
    named = [(item['id'], item['number'], item['prompt']) for item in items]
    assert named == [('a1', 0, 'two dogs'), ('b1', 1, 'two dogs')]
    fields = ('proposition_id', 'dependency', 'category', 'question')
    questions = items[0]['questions']
    assert [tuple(q[field] for field in fields) for q in questions] == [
        (1, [0], 'entity - whole', 'Is there a?'),
        (3, [1, 2], 'entity - part', 'Is there b?'),
        (2, [0], 'entity - whole', 'Is there c?')]


# --- the whole script --------------------------------------------------------------------------
CORNERS = {(255, 0, 0): (0, 0), (0, 255, 0): (32, 0), (0, 0, 255): (0, 32),
           (255, 255, 255): (32, 32)}
DPG_ROWS = (
    row(1, 0, 'whole', 'red'),
    row(2, 1, 'part', 'paint'),
    row(1, 0, 'whole', 'white', 'b1', 'other'))


@pytest.fixture
def grids(tmp_path):
    """Flags of a run over two items and their 2x2 grids: red, green, blue, white."""
    path = write_csv(tmp_path / 'p.csv', *DPG_ROWS)
    grid = Image.new('RGB', (64, 64))
    for colour, corner in CORNERS.items():
        grid.paste(Image.new('RGB', (32, 32), colour), corner)
    os.makedirs(tmp_path / 'grids')
    for name in ('a1', 'b1'):
        grid.save(tmp_path / 'grids' / f'{name}.png')
    return ['--bench=dpg', f'--prompts={path}', '--generate=False', f'--images={tmp_path}/grids',
            f'--out_dir={tmp_path}/out', '--vqa=stand-in', '--device=cpu']


@pytest.fixture
def asked(monkeypatch):
    """The colours that a stand-in for the vision-language model was shown; it knows them."""
    colours = []

    def vqa(image, question):
        assert image.size == (32, 32)
        colour = image.getpixel((3, 3))
        colours.append(colour)
        if 'paint' in question:
            return 'Yes.'
        wanted = (255, 0, 0) if 'red' in question else (255, 255, 255)
        return 'yes' if colour == wanted else 'I cannot say'
    monkeypatch.setattr(dpg, 'local_vlm', lambda c, device: vqa)
    return colours


def test_dpg_whole(grids, asked, tmp_path):
    eval_t2i.main(grids)
    assert asked[:8:2] == list(CORNERS), 'top left, top right, bottom left, bottom right'
    out = f'{tmp_path}/out/dpg/grids'
    a, b = lines(f'{out}/results.jsonl')
    assert a['scores'] == [1.0, 0, 0, 0], 'no red, so its paint does not count'
    assert b['scores'] == [0, 0, 0, 1.0]
    s = read_json(f'{out}/summary.json')
    # categories: the last crop, before any answer is taken away
    assert s['columns'] == dict(entity=50.0, other=100.0, overall=25.0)
    assert s['categories_l1'] == {'entity': 50.0, 'other': 100.0}
    assert s['categories_l2'] == {
        'entity - whole': 0.0, 'entity - part': 100.0, 'other - whole': 100.0}
    assert s['neither'] == 6
    n = len(asked)
    eval_t2i.main([*grids, '--official_row_bug=True'])
    assert len(asked) == n == 12, 'no question twice, not even in another run'
    s = read_json(f'{out}/summary.json')
    assert s['images'] == 1 and s['columns'] == dict(other=100.0, overall=25.0)
    Image.new('RGB', (32, 32)).save(f'{tmp_path}/grids/b1.png')
    message = refusal(eval_t2i.main, grids)
    assert 'b1.png: 32x32, expected 64x64' in message
    assert len(lines(f'{out}/results.jsonl')) == 1


def test_dpg_with_every_image_left_out_is_one_line(grids, asked, tmp_path):
    """The official bug leaves out an item whose one question it drops."""
    path = write_csv(tmp_path / 'one.csv', DPG_ROWS[0])
    argv = [flag for flag in grids if not flag.startswith('--prompts')]
    argv += [f'--prompts={path}', '--official_row_bug=True']
    assert 'every image is left out' in refusal(eval_t2i.main, argv)


def test_dpg_draws_its_grids(tmp_path, capsys):
    (tmp_path / 'texts').mkdir()
    (tmp_path / 'texts' / 'x7.txt').write_text(SHAPES[0]['prompt'] + '\n')
    eval_t2i.main(['--bench=dpg', f'--prompts={tmp_path}/texts', f'--out_dir={tmp_path}/out',
                   '--eval_denoise_steps=2', '--device=cpu'])
    assert 'no score: ' in capsys.readouterr().out
    images = f'{tmp_path}/out/dpg/base/images'
    grid = np.asarray(Image.open(f'{images}/x7.png'))
    assert grid.shape == (64, 64, 3) and os.listdir(images) == ['x7.png']
    shades = torch.tensor([-1., -0.5, 0.5, 1.]).view(4, 1, 1, 1)
    x = torch.zeros(4, 3, 32, 32) + shades
    eval_t2i.save_images(keys_of('--bench=dpg', images=f'{tmp_path}/g'), dict(id='q'), x)
    grid = np.asarray(Image.open(f'{tmp_path}/g/q.png'))
    corners = [grid[y, x, 0] for y, x in ((0, 0), (0, 63), (63, 0), (63, 63))]
    assert corners == [0, 64, 191, 255]
