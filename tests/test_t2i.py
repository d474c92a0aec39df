"""GenEval, GenEval++ and DPG-Bench: their rules on hand-made cases, their folders, and what happens to bad input and bad judges."""
import http.server
import json
import os
import threading
import time
import types

import numpy as np
import pytest
import torch
from PIL import Image

import common
import config
import eval_t2i
from bench import detector, dpg as dpg_rules, geneval, judges, summary
from bench import prompts
from data.shapes import scenes as world
from eval_t2i import dpg_score, geneval_correct, relative_position
from running import lines, refusal


def keys_of(*argv, **more):
    c = config.parse(eval_t2i.keys, eval_t2i.own_presets, argv, 'eval_t2i.py')
    return types.SimpleNamespace(**dict(vars(c), name='base', **more))


# --- GenEval's rules ----------------------------------------------------------------------------------------------------
def box(x, y, w=10, h=10):
    return (x, y, x + w, y + h)


@pytest.mark.parametrize('a, b, relations', [
    (box(0, 0), box(4, 0), set()), (box(0, 0), box(5, 0), {'left of'}),                           # equal boxes: more than 0.2 of both widths
    (box(0, 0), box(10, 0), {'left of'}), (box(10, 0), box(0, 0), {'right of'}),                  # they touch
    (box(0, 0), box(0, 10), {'above'}), (box(0, 10), box(0, 0), {'below'}), (box(0, 5), box(0, 0), {'below'}), (box(0, 4), box(0, 0), set()),
    (box(0, 0), box(0, 0), set()), (box(0, 0, 30, 30), box(10, 10), set()), (box(0, 0), box(1, 1), set()), (box(0, 0, 0, 0), box(0, 0, 0, 0), set()),
    (box(0, 0), box(100, 100), {'left of', 'above'}), (box(100, 0), box(0, 100), {'right of', 'above'}), (box(0, 0), box(6, 6), set()), (box(0, 0), box(7, 7), {'left of', 'above'}),
    (box(0, 0), box(100, 40), {'left of'}), (box(0, 0), box(16, 16), {'left of', 'above'}),
    (box(0, 0, 40, 10), box(20, 30, 40, 10), {'above'}), ((0, 0, 10, 10, 0.9), (30, 0, 40, 10, 0.1), {'left of'})])
def test_relative_position(a, b, relations):
    assert relative_position(a, b) == relations
    opposite = {'left of': 'right of', 'right of': 'left of', 'above': 'below', 'below': 'above'}
    assert relative_position(b, a) == {opposite[r] for r in relations}


def things(n, at=0, colour=None):
    return [(box(at + 20 * i, 0), 0.9 - 0.1 * i, colour) for i in range(n)]


def wants(*include, exclude=(), tag='x'):
    return dict(tag=tag, prompt='p', include=[dict({'class': c}, count=n, **more) for c, n, more in include], exclude=[dict({'class': c}, count=n) for c, n in exclude])


LEFT = wants(('dog', 1, {}), ('cat', 1, dict(position=['left of', 0])))
COUNT = wants(('dog', 2, {}), exclude=[('dog', 3)])
RED = wants(('dog', 1, dict(color='red')))


@pytest.mark.parametrize('objects, metadata, correct', [
    ({}, wants(('dog', 1, {})), False), ({}, wants(), True), ({}, COUNT, False), ({}, LEFT, False), ({}, RED, False),                       # nothing detected
    (dict(dog=things(1)), wants(('dog', 1, {})), True), (dict(dog=things(3)), wants(('dog', 1, {})), True), (dict(cat=things(1)), wants(('dog', 1, {})), False),
    (dict(dog=things(1)), COUNT, False), (dict(dog=things(2)), COUNT, True), (dict(dog=things(3)), COUNT, False), (dict(dog=things(2), cat=things(9)), COUNT, True),
    (dict(dog=things(1), cat=things(1)), wants(('dog', 1, {}), ('cat', 2, {})), False),
    (dict(dog=things(1, colour='red')), RED, True), (dict(dog=things(1, colour='blue')), RED, False), (dict(dog=things(1)), RED, False),
    (dict(dog=things(1, colour='blue') + things(1, colour='red')), RED, False),                                                             # only the best one is asked
    (dict(dog=things(2, colour='red') + things(1, colour='blue')), wants(('dog', 2, dict(color='red'))), True),
    (dict(dog=things(1, colour='red') + things(1, colour='blue')), wants(('dog', 2, dict(color='red'))), False),
    (dict(dog=things(1, 50), cat=things(1)), LEFT, True), (dict(dog=things(1), cat=things(1, 50)), LEFT, False), (dict(dog=things(1), cat=things(1)), LEFT, False),
    (dict(cat=things(1)), LEFT, False), (dict(dog=things(1, 50)), LEFT, False),
    (dict(dog=things(2, 50), cat=things(1)), LEFT, True), (dict(dog=things(1, 50), cat=things(1, 90) + things(1)), LEFT, False),
    (dict(dog=things(2, 10), cat=things(1)), wants(('dog', 2, {}), ('cat', 1, dict(position=['left of', 0]))), True),
    (dict(dog=things(2, -10), cat=things(1)), wants(('dog', 2, {}), ('cat', 1, dict(position=['left of', 0]))), False),                     # of every one of the targets
    (dict(dog=things(1, 50, 'blue'), cat=things(1)), wants(('dog', 1, dict(color='red')), ('cat', 1, dict(position=['left of', 0]))), False)])
def test_geneval_correct(objects, metadata, correct):
    assert geneval_correct(objects, metadata) is correct
    assert bool(geneval.geneval_verdict(objects, metadata)[1]) is not correct, 'a wrong image has a reason'


def test_geneval_overall_is_the_mean_of_the_tags():
    rows = [('counting', 'a', 1), ('counting', 'a', 0), ('counting', 'b', 0), ('counting', 'b', 0), ('colors', 'c', 1)]
    s = summary.geneval_summary([dict(tag=t, metadata=m, correct=bool(v)) for t, m, v in rows])
    assert s['columns'] == dict(counting=0.25, colors=1.0, overall=0.625)
    assert (s['images'], s['prompts'], s['correct_images'], s['correct_prompts']) == (5, 3, 0.4, 2 / 3)
    assert s['overall_stderr'] == pytest.approx(0.25 / 2), 'counting: shares .5 and 0 of two prompts, so .25; colors has one prompt'


# --- DPG-Bench's rules ------------------------------------------------------------------------------------------------------
def asks(*dependencies):
    return [dict(proposition_id=n, dependency=d) for n, d in enumerate(dependencies, 1)]


@pytest.mark.parametrize('questions, answers, score', [
    (asks([0], [0]), (1, 1), 1), (asks([0], [0]), (0, 1), 0.5), (asks([0], [1]), (0, 1), 0), (asks([0], [1]), (1, 0), 0.5),
    (asks([0], [1], [2]), (0, 1, 1), 0), (asks([0], [1], [2]), (1, 0, 1), 1 / 3),                                    # a no spreads to grandchildren
    (asks([2], [0]), (1, 0), 0), (asks([2], [3], [0]), (1, 1, 0), 1 / 3),                                            # ... but not past children that come before their parents
    (asks([0], [0], [1, 2]), (1, 0, 1), 1 / 3), (asks([0], [0], [0, 1]), (1, 0, 1), 2 / 3), (asks([1]), (0,), 0)])
def test_dpg_score(questions, answers, score):
    said = {n: bool(a) for n, a in enumerate(answers, 1)}
    assert dpg_score(questions, said) == pytest.approx(score)
    assert said == {n: bool(a) for n, a in enumerate(answers, 1)}, 'the answers are left as they were'


def test_dpg_answers_may_have_any_order():
    assert dpg_score([dict(proposition_id=7, dependency=[3]), dict(proposition_id=3, dependency=[0])], {3: False, 7: True}) == 0


@pytest.mark.parametrize('answer, said', [('yes', True), ('Yes.', True), (' YES, there is', True), ('no', False), ('No!', False), ('\n"no"', False),
                                          ('The image shows yes', None), ('', None), ('not sure', None), ('yesterday', None), ('None', None), ('...', None)])
def test_yes_or_no_or_neither(answer, said):
    assert judges.says_yes(answer) is said


# --- prompts --------------------------------------------------------------------------------------------------------------------
GOOD = dict(tag='counting', include=[{'class': 'dog', 'count': 2}], exclude=[{'class': 'dog', 'count': 3}], prompt='a photo of two dogs')


def with_clause(**clause):
    return json.dumps(dict(GOOD, include=[GOOD['include'][0], dict({'class': 'cat', 'count': 1}, **clause)]))


@pytest.mark.parametrize('bad, word', [
    ('{"tag": "counting"', 'JSON'), ('', 'JSON'), ('[]', 'object'), ('{}', 'tag'), (json.dumps(dict(GOOD, prompt=3)), 'prompt'), (json.dumps(dict(GOOD, include='dog')), 'include'),
    (json.dumps(dict(GOOD, include=[{'class': 'dog'}])), 'count'), (json.dumps(dict(GOOD, exclude=[{'class': 'dog', 'count': 0}])), 'exclude[0]'),
    (with_clause(**{'class': 'kitten'}), 'kitten'), (with_clause(color='teal'), 'teal'), (with_clause(position=['near', 0]), 'position'),
    (with_clause(position=['above', 1]), 'position'), (with_clause(position='above'), 'position')])
def test_malformed_metadata_is_named_with_file_and_line(tmp_path, bad, word):
    path = tmp_path / 'p.jsonl'
    path.write_text('\n'.join([json.dumps(GOOD), bad, json.dumps(GOOD)]) + '\n')
    message = refusal(eval_t2i.main, ['--bench=geneval', f'--prompts={path}', f'--out_dir={tmp_path}/out'])
    assert f'{path}:2: ' in message and word in message
    assert not (tmp_path / 'out').exists()


ROW = 'a1,two dogs,k,{},{},entity,whole,entity - {} (dog),Is there {}?'


def write_csv(path, *rows):
    path.write_text('item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n' + '\n'.join(rows) + '\n')
    return path


@pytest.mark.parametrize('rows, line, word', [
    ([ROW.format('x', 0, 'whole', 'a')], 2, 'malformed'), ([ROW.format(1, '', 'whole', 'a')], 2, 'malformed'), (['a1,two dogs,k,1'], 2, 'malformed'),
    ([ROW.format(1, 0, 'w', 'a'), ROW.format(1, 0, 'w', 'b')], 3, 'duplicate'), ([ROW.format(1, 0, 'w', 'a'), ROW.format(2, 5, 'w', 'b')], 3, 'depends'),
    ([ROW.format(1, 0, 'w', 'a'), ROW.format(1, 0, 'w', 'a').replace('a1', 'b1'), ROW.format(2, 0, 'w', 'a')], 4, 'duplicate'),
    ([ROW.format(1, 0, 'w', 'a').replace('a1', '../a1')], 2, 'file name')])
def test_malformed_rows_are_named_with_file_and_line(tmp_path, rows, line, word):
    path = write_csv(tmp_path / 'p.csv', *rows)
    message = refusal(eval_t2i.main, ['--bench=dpg', f'--prompts={path}', f'--out_dir={tmp_path}/out'])
    assert f'{path}:{line}: ' in message and word in message


def test_rows_of_the_csv(tmp_path):
    path = write_csv(tmp_path / 'p.csv', ROW.format(1, 0, 'whole', '"a, b"'.replace('"', '')).replace('a, b', 'a'), ROW.format(3, '"1, 2"', 'part', 'b'), ROW.format(2, 0, 'whole', 'c'),
                     ROW.format(1, 0, 'whole', 'd').replace('a1', 'b1'))
    items = prompts.read_dpg(str(path))
    assert [(i['id'], i['number'], i['prompt']) for i in items] == [('a1', 0, 'two dogs'), ('b1', 1, 'two dogs')]
    assert [(q['proposition_id'], q['dependency'], q['category'], q['question']) for q in items[0]['questions']] == [
        (1, [0], 'entity - whole', 'Is there a?'), (3, [1, 2], 'entity - part', 'Is there b?'), (2, [0], 'entity - whole', 'Is there c?')]
    assert [i['id'] for i in dpg_rules.drop_first_row(items)] == ['b1'], 'the official script loses an image whose first question others depend on'
    free = [dict(items[0], questions=items[0]['questions'][:1] + items[0]['questions'][2:])]
    assert [q['proposition_id'] for q in dpg_rules.drop_first_row(free)[0]['questions']] == [2], '... and else the question alone'
    assert dpg_rules.drop_first_row(items[1:]) == []


@pytest.mark.parametrize('words, word', [
    (['--bench=genevall'], 'geneval++'), (['--bench=geneval'], '--prompts'), (['--bench=dpg', '--prompts=no/such.csv'], 'no/such.csv'), (['--condition=image'], 'condition'),
    (['--samples=0'], 'samples'), (['--bench=dpg', '--samples=2', '--prompts=x'], 'samples'), (['--bench=geneval++', '--prompts=x', '--judge_url=ftp://a'], 'judge_url'),
    (['--resolution=64'], '32'), (['--init_from=a/x,b/x'], 'different names'), (['--bench=dpg', '--prompts=README.md'], 'README.md:1')])
def test_words_that_mean_nothing(words, word):
    assert word in refusal(eval_t2i.main, words)


# --- the embedded world -----------------------------------------------------------------------------------------------------
SHAPES = prompts.shapes_prompts()


def scene_of(prompt):
    *objects, background = world.parse(prompt)
    return world.Scene(tuple(world.Object(**o) for o in objects), background['background'])


def seen(scene, meta):
    return judges.shapes_objects(Image.fromarray(world.draw(scene)), meta)


def test_the_oracle_gives_drawings_of_the_prompts_full_marks(uae):
    assert [m['tag'] for m in SHAPES] == [t for t in prompts.TAGS for _ in range(32)] and len({m['prompt'] for m in SHAPES}) == len(SHAPES)
    for m in SHAPES:
        assert geneval_correct(seen(scene_of(m['prompt']), m), m), m
        assert prompts.parse_metadata(json.dumps(m), 'x:1', world.SHAPES, tuple(world.COLOURS)) == m
    y, mask, cut = uae.tokens([m['prompt'] for m in SHAPES])
    assert not cut and not (y == uae.tokenizer.unk_token_id).any(), 'all prompts are in the words that the tiny models know, and fit'
    assert {m['include'][1]['position'][0] for m in SHAPES if m['tag'] == 'position'} == set(prompts.RELATIONS)
    assert {m['include'][0]['count'] for m in SHAPES if m['tag'] == 'counting'} == {2, 3, 4}
    assert prompts.shapes_prompts() == SHAPES


def test_each_tag_notices_its_own_mistake():
    def change(scene, tag):
        a, *rest = scene.objects
        if tag in ('single_object', 'two_object'):
            return [a._replace(shape=next(s for s in world.SHAPES if s not in [o.shape for o in scene.objects])), *rest]
        if tag == 'counting':
            return rest
        if tag == 'colors':
            return [a._replace(colour=next(c for c in world.COLOURS if c != a.colour))]
        if tag == 'position':
            return [a._replace(cell=rest[0].cell), rest[0]._replace(cell=a.cell)]
        return [a._replace(colour=rest[0].colour), rest[0]._replace(colour=a.colour)]
    for m in SHAPES:
        scene = scene_of(m['prompt'])
        assert not geneval_correct(seen(scene._replace(objects=tuple(change(scene, m['tag']))), m), m), m
    two = next(m for m in SHAPES if m['tag'] == 'counting' and m['include'][0]['count'] < 4)
    scene = scene_of(two['prompt'])
    free = next(c for c in world.CELLS if c not in [o.cell for o in scene.objects])
    assert not geneval_correct(seen(scene._replace(objects=(*scene.objects, scene.objects[0]._replace(cell=free))), two), two), 'one too many'


def test_the_oracle_has_boxes_and_puts_what_is_asked_first():
    scene = world.Scene((world.Object('small', 'red', 'circle', 'top-left'), world.Object('large', 'blue', 'circle', 'bottom-right')), 'gray')
    m = dict(include=[{'class': 'circle', 'count': 1, 'color': 'blue'}])
    assert seen(scene, m) == dict(circle=[((16, 16, 32, 32), 1.0, 'blue'), ((0, 0, 16, 16), 1.0, 'red')]) and geneval_correct(seen(scene, m), m)


@pytest.fixture
def few(tmp_path):
    """Three prompts of the embedded world in a file, and the words of a quick run over them."""
    path = tmp_path / 'p.jsonl'
    path.write_text(''.join(json.dumps(m) + '\n' for m in SHAPES[::40][:3]))
    return [f'--prompts={path}', f'--out_dir={tmp_path}/out', '--samples=2', '--batch=4', '--eval_steps=2', '--device=cpu']


def contents(folder):
    return {os.path.relpath(os.path.join(d, n), folder): open(os.path.join(d, n), 'rb').read() for d, _, names in os.walk(folder) for n in names}


def test_folders_resume_and_world_size(few, tmp_path, capsys, monkeypatch):
    eval_t2i.main(few)
    out = tmp_path / 'out' / 'shapes' / 'base'
    whole = contents(out / 'images')
    assert sorted(whole) == sorted(f'{n:05d}/{f}' for n in range(3) for f in ('metadata.jsonl', 'samples/00000.png', 'samples/00001.png'))
    assert [json.loads(whole[f'{n:05d}/metadata.jsonl']) for n in range(3)] == SHAPES[::40][:3], 'one object a folder'
    assert len(set(whole.values())) == 9, 'samples differ'
    results = lines(out / 'results.jsonl')
    assert len(results) == 6 and list(results[0]) == ['filename', 'tag', 'prompt', 'correct', 'reason', 'metadata', 'details']
    assert json.loads(results[0]['metadata']) == SHAPES[0] and results[0]['filename'].endswith('00000/samples/00000.png')
    table = capsys.readouterr().out.splitlines()[-4:]
    assert table[0] == '| shapes | single_object | two_object | counting | overall |' and table[2].startswith('| base | ')
    same = [dict(id='a', number=0, prompt=SHAPES[0]['prompt']), dict(id='b', number=1, prompt=SHAPES[0]['prompt'])]
    uae = eval_t2i.UAE(keys_of(*few), 'cpu')
    a, b, c = eval_t2i.draw_prompts(uae, [(same[0], 0), (same[1], 0), (same[0], 1)])
    assert min((a - b).abs().max(), (a - c).abs().max(), (b - c).abs().max()) > 0.1, 'every item and every sample has its own noise'
    # what is there stays, what is missing comes back the same
    (out / 'images' / '00001' / 'samples' / '00001.png').unlink()
    (out / 'images' / '00000' / 'samples' / '00000.png').write_bytes(b'mine')
    eval_t2i.generate(keys_of(*few, images=str(out / 'images')), types.SimpleNamespace(rank=0, world=1, master=True, device='cpu'), eval_t2i.read_items(keys_of(*few)))
    again = contents(out / 'images')
    assert again.pop('00000/samples/00000.png') == b'mine' and whole.items() >= again.items() and len(again) == 8
    # two ranks write the very files of one
    monkeypatch.setattr(common, 'gather_objects', lambda items, run: items)
    for rank in (0, 1):
        run = types.SimpleNamespace(rank=rank, world=2, master=rank == 0, device='cpu')
        eval_t2i.generate(keys_of(*few, images=f'{tmp_path}/two'), run, eval_t2i.read_items(keys_of(*few)))
        assert len(contents(tmp_path / 'two')) == (6 if rank == 0 else 9), 'each rank draws its own share'
    assert contents(tmp_path / 'two') == whole
    assert 'seed' in refusal(eval_t2i.main, [*few, '--seed=3']), 'images of another seed are not taken for this one\'s'
    (tmp_path / 'foreign' / '00000').mkdir(parents=True)
    assert f'{tmp_path}/foreign' in refusal(eval_t2i.main, [*few, f'--images={tmp_path}/foreign'])


def drawn(folder, metas, samples=1):
    """Somebody else's images of the embedded world, all right."""
    for n, m in enumerate(metas):
        os.makedirs(f'{folder}/{n:05d}/samples')
        with open(f'{folder}/{n:05d}/metadata.jsonl', 'w') as f:
            json.dump(m, f)
        for k in range(samples):
            Image.fromarray(world.draw(scene_of(m['prompt']))).save(f'{folder}/{n:05d}/samples/{k:04d}.png')
    return folder


def test_images_that_cannot_be_scored_are_named_and_the_rest_is_kept(few, tmp_path):
    folder = drawn(f'{tmp_path}/theirs', SHAPES[::40][:3], 3)
    words = [few[0], few[1], '--generate=False', f'--images={folder}', '--samples=3']
    eval_t2i.main(words)
    assert json.load(open(f'{tmp_path}/out/shapes/theirs/summary.json'))['columns']['overall'] == 1.0
    for damage, said in ((lambda p: p.unlink(), 'missing'), (lambda p: p.write_bytes(b'no image'), 'cannot be read'), (lambda p: Image.new('RGB', (32, 31)).save(p), '32x31, expected 32x32')):
        path = tmp_path / 'theirs' / '00001' / 'samples' / '0001.png'
        kept = path.read_bytes()
        damage(path)
        message = refusal(eval_t2i.main, words)
        assert '1 of 9' in message and said in message and '00001/samples/' in message
        assert len(lines(f'{tmp_path}/out/shapes/theirs/results.jsonl')) == 8
        path.write_bytes(kept)
    eval_t2i.main(words)
    assert len(lines(f'{tmp_path}/out/shapes/theirs/results.jsonl')) == 9


# --- GenEval's detector -------------------------------------------------------------------------------------------------------
def blob(h, w, y0, y1, x0, x1, inside=8.0, outside=-8.0):
    m = torch.full((h, w), outside)
    m[y0:y1, x0:x1] = inside
    return m


def test_instances_from_hand_made_logits():
    """A 64x64 image (so every resize is the identity): a sure query, one between two classes, an empty mask, a half-sure mask."""
    p = torch.tensor([[0.9, 0.05, 0.05], [0.5, 0.4, 0.1], [0.95, 0.01, 0.04], [0.8, 0.1, 0.1]])
    masks = torch.stack([blob(64, 64, 4, 8, 10, 30), blob(64, 64, 32, 64, 0, 1), torch.full((64, 64), -8.0), blob(64, 64, 0, 2, 0, 2, inside=np.log(3))])
    scores, labels, boxes, m = detector.instances(p.log(), masks, (64, 64), (64, 64), (64, 64), most=6)
    sure = 1 / (1 + np.exp(-8))
    expected = [(0.9 * sure, 0, [10, 4, 30, 8]), (0.8 * 0.75, 0, [0, 0, 2, 2]), (0.5 * sure, 0, [0, 32, 1, 64]), (0.4 * sure, 1, [0, 32, 1, 64]), (0.1 * 0.75, 1, [0, 0, 2, 2]), (0, 0, [0, 0, 0, 0])]
    assert [(pytest.approx(s, abs=1e-5), l, b) for s, l, b in expected] == list(zip(scores.tolist(), labels.tolist(), boxes.tolist()))
    assert m.dtype == torch.bool and m[0].sum() == 80 and m[5].sum() == 0
    assert len(detector.instances(p.log(), masks, (64, 64), (64, 64), (64, 64), most=3)[0]) == 3


def test_masks_go_back_to_the_image_without_the_padding():
    """A 50x100 image is shown as 667x1333 in 672x1344; the left half of its mask must come back as the left half."""
    image = Image.new('RGB', (100, 50), (124, 116, 104))
    x, inside = detector.to_detector(image)
    assert x.shape == (1, 3, 672, 1344) and inside == (667, 1333)
    assert x[0, :, :667, :1333].abs().max() < 0.01 and x[0, :, 667:].abs().max() == 0 == x[0, :, :, 1333:].abs().max(), 'normalised, then zeros'
    low = torch.full((1, 168, 336), -8.0)
    low[:, :, :round(336 * 1333 / 1344 / 2)] = 8.0
    _, _, boxes, masks = detector.instances(torch.tensor([[5.0, 0.0]]), low, (672, 1344), inside, (50, 100))
    assert masks.shape == (1, 50, 100) and boxes.tolist() == [[0, 0, 50, 50]]
    _, _, boxes, _ = detector.instances(torch.tensor([[5.0, 0.0]]), blob(64, 64, 0, 16, 0, 64)[None], (64, 64), (32, 64), (32, 64))
    assert boxes.tolist() == [[0, 0, 64, 16]], 'the lower half was padding'
    assert detector.to_detector(Image.new('RGB', (512, 512)))[0].shape == (1, 3, 800, 800)


@pytest.mark.parametrize('tag, kept', [('counting', [0.95]), ('colors', [0.95, 0.9, 0.31])])
def test_thresholds_and_the_limit_of_a_class(monkeypatch, tag, kept):
    class Model:
        device = 'cpu'

        def __call__(self, pixel_values):
            return types.SimpleNamespace(class_queries_logits=torch.zeros(1, 2, 81), masks_queries_logits=torch.zeros(1, 2, 8, 8))

    def found(scores, label):
        n = len(scores)
        monkeypatch.setattr(detector, 'instances', lambda *a: (torch.tensor(scores), torch.full((n,), label), torch.zeros(n, 4), torch.zeros(n, 8, 8, dtype=torch.bool)))
        return {name: [s for _, s, _ in them] for name, them in detector.detect(Model(), Image.new('RGB', (32, 32)), tag).items()}

    assert found([0.95, 0.9, 0.31, 0.3, 0.1], 16) == dict(dog=pytest.approx(kept))
    assert len(found([0.99] * 20, 79)['toothbrush']) == 16
    assert found([0.2], 0) == {}


def tiny_detector(folder, last='toothbrush'):
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    names = {n: 'person' if n == 0 else last if n == 79 else f'{n}' for n in range(80)}
    backbone = SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, out_features=['stage1', 'stage2', 'stage3', 'stage4'])
    c = Mask2FormerConfig(backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1,
                          decoder_layers=2, num_attention_heads=2, num_queries=5, id2label=names)
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(c).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def no_matcher(monkeypatch):
    """Mask2Former asks for scipy when it is built, for its training loss alone."""
    from transformers.models.mask2former import modeling_mask2former
    monkeypatch.setattr(modeling_mask2former, 'requires_backends', lambda *a: None)
    monkeypatch.setattr(eval_t2i.importlib.util, 'find_spec', lambda name: name)


def test_geneval_with_a_tiny_detector(tmp_path, no_matcher, monkeypatch, capsys):
    detector = tiny_detector(tmp_path / 'detector')
    model = detector.open_detector(keys_of(f'--detector={detector}'), 'cpu')
    image = Image.fromarray(world.draw(scene_of(SHAPES[0]['prompt']))).resize((64, 48))
    monkeypatch.setattr(detector, 'to_detector', lambda image, real=detector.to_detector: (torch.nn.functional.interpolate(real(image)[0], (96, 128)), (96, 128)))
    with torch.no_grad():
        out = model(pixel_values=detector.to_detector(image)[0])
    scores, labels, boxes, masks = detector.instances(out.class_queries_logits[0], out.masks_queries_logits[0], (96, 128), (96, 128), (48, 64))
    assert len(scores) == 100 and masks.shape == (100, 48, 64) and labels.max() < 80 and (scores.diff() <= 0).all()
    assert '80 classes' in refusal(detector.open_detector, keys_of(f'--detector={tiny_detector(tmp_path / "other", last="teapot")}'), 'cpu')
    # the whole bench over somebody's folder, colours by a stand-in
    metas = [GOOD, dict(tag='colors', include=[{'class': 'dog', 'count': 1, 'color': 'red'}], prompt='a red dog')]
    for n, m in enumerate(metas):
        os.makedirs(f'{tmp_path}/theirs/{n:04d}/samples')
        with open(f'{tmp_path}/theirs/{n:04d}/metadata.jsonl', 'w') as f:
            json.dump(m, f, indent=1)
        image.save(f'{tmp_path}/theirs/{n:04d}/samples/0000.png')
    asked = []
    monkeypatch.setattr(geneval, 'open_colours', lambda c, device: lambda image, found, name: [asked.append(name) or 'red' for _ in found])
    words = ['--bench=geneval', '--generate=False', f'--images={tmp_path}/theirs', '--samples=1', f'--detector={detector}', f'--out_dir={tmp_path}/out', '--device=cpu']
    eval_t2i.main(words)
    out = capsys.readouterr().out
    assert 'other weights than the official' in out and '| theirs | 0.000 | 0.000 | 0.000 |' in out, 'random weights see nothing'
    mask = np.ones((48, 64), bool)
    monkeypatch.setattr(geneval, 'detect', lambda model, image, tag: dict(dog=[((0.0, 0.0, 9.0, 9.0), 0.95, mask)] * 2))
    eval_t2i.main(words)
    assert asked == ['dog'], 'colours are named where they are asked for, of the best `count`'
    assert [r['correct'] for r in lines(f'{tmp_path}/out/geneval/theirs/results.jsonl')] == [True, True]
    assert all(json.loads(r['details']) == dict(dog=[[0, 0, 9, 9, 0.95]] * 2) for r in lines(f'{tmp_path}/out/geneval/theirs/results.jsonl'))
    os.rename(f'{tmp_path}/theirs/0001', f'{tmp_path}/theirs/00000')
    assert '00000/metadata.jsonl' in refusal(eval_t2i.main, words) and 'twice' in refusal(eval_t2i.main, words)


def test_without_scipy_there_is_a_line_and_no_score(tmp_path, monkeypatch):
    monkeypatch.setattr(eval_t2i.importlib.util, 'find_spec', lambda name: None)
    assert 'scipy' in eval_t2i.why_not(keys_of('--bench=geneval'), []) and eval_t2i.why_not(keys_of(), []) == ''


def test_colours_are_named_from_the_object_alone():
    """A stand-in CLIP whose image feature is the crop's mean colour and whose text feature is the colour that a text names."""
    palette = dict(red=(1., 0, 0), green=(0, 1., 0), blue=(0, 0, 1.))
    texts = []

    class Stand(torch.nn.Module):
        def encode_text(self, t):
            return t

        def encode_image(self, x):
            crops.append(x)
            return x.mean((2, 3)) - 0.3
    crops = []

    def tokenizer(words):
        texts.extend(words)
        return torch.stack([torch.tensor(next((v for k, v in palette.items() if k in w.split('a photo of a ')[1].split('-')[0].split()[0]), (-1., -1., -1.))) for w in words])
    transform = lambda im: torch.from_numpy(np.array(im.resize((4, 4), Image.NEAREST)) / 255.).float().permute(2, 0, 1)             # noqa: E731
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[:, :] = (0, 255, 0)                                                       # all green
    pixels[0:8, 0:8] = (255, 0, 0)
    pixels[10:18, 10:18] = (0, 0, 255)
    masks = [np.zeros((20, 20), bool) for _ in range(2)]
    masks[0][0:8, 0:4], masks[1][10:18, 10:18] = True, True
    found = [((0., 0., 8., 8.), 0.9, masks[0]), ((10., 10., 18., 18.), 0.8, masks[1])]
    namer = detector.colour_namer(Stand(), transform, tokenizer, 'cpu')
    assert namer(Image.fromarray(pixels), found, 'dog') == ['red', 'blue']
    assert torch.allclose(crops[0][0, :, 0, 3], torch.full((3,), 0.6)) and crops[0][0, 0, 0, 0] == 1, 'around the object it is grey 153'
    assert (crops[0][1, 2] == 1).all(), 'and nothing beyond its box'
    assert texts[:3] == ['a photo of a red dog', 'a photo of a red-colored dog', 'a photo of a red object'] and len(texts) == 30
    namer(Image.fromarray(pixels), found, 'dog')
    assert len(texts) == 30, 'texts once per class'
    assert 'quickgelu' in refusal(detector.open_colours, keys_of('--colour_clip=ViT-L-14:openai'), 'cpu')


# --- DPG-Bench, the whole script -------------------------------------------------------------------------------------------------
@pytest.fixture
def dpg(tmp_path):
    """A CSV of two items and their 2x2 grids: quadrants red, green, blue, white; and a VQA that sees the mean colour."""
    rows = [ROW.format(1, 0, 'whole', 'red'), ROW.format(2, 1, 'part', 'paint'), ROW.format(1, 0, 'whole', 'white').replace('a1', 'b1').replace('entity', 'other')]
    path = write_csv(tmp_path / 'p.csv', *rows)
    os.makedirs(tmp_path / 'grids')
    grid = np.zeros((64, 64, 3), np.uint8)
    for (y, x), colour in zip(((0, 0), (0, 32), (32, 0), (32, 32)), ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))):
        grid[y:y + 32, x:x + 32] = colour
    for name in ('a1', 'b1'):
        Image.fromarray(grid).save(tmp_path / 'grids' / f'{name}.png')
    return ['--bench=dpg', f'--prompts={path}', '--generate=False', f'--images={tmp_path}/grids', f'--out_dir={tmp_path}/out', '--vqa=stand-in', '--device=cpu']


def test_dpg_whole(dpg, tmp_path, monkeypatch, capsys):
    asked = []

    def vqa(image, question):
        assert image.size == (32, 32)
        asked.append(image.getpixel((3, 3)))
        if 'paint' in question:
            return 'Yes.'
        return 'yes' if image.getpixel((3, 3)) == dict(red=(255, 0, 0), white=(255, 255, 255))['red' if 'red' in question else 'white'] else 'I cannot say'
    monkeypatch.setattr(dpg_rules, 'local_vlm', lambda c, device: vqa)
    eval_t2i.main(dpg)
    assert asked[:8:2] == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)], 'top left, top right, bottom left, bottom right'
    a, b = lines(f'{tmp_path}/out/dpg/grids/results.jsonl')
    assert a['scores'] == [1.0, 0, 0, 0] and b['scores'] == [0, 0, 0, 1.0], 'no red, so its paint does not count'
    s = json.load(open(f'{tmp_path}/out/dpg/grids/summary.json'))
    assert s['columns'] == dict(entity=50.0, other=100.0, overall=25.0), 'categories: the last crop, before any answer is taken away'
    assert s['categories'] == {'entity': 50.0, 'entity - whole': 0.0, 'entity - part': 100.0, 'other': 100.0, 'other - whole': 100.0} and s['neither'] == 6
    n = len(asked)
    eval_t2i.main([*dpg, '--official_row_bug=True'])
    assert len(asked) == n == 12, 'no question twice, not even in another run'
    s = json.load(open(f'{tmp_path}/out/dpg/grids/summary.json'))
    assert s['images'] == 1 and s['columns'] == dict(other=100.0, overall=25.0)
    Image.new('RGB', (32, 32)).save(f'{tmp_path}/grids/b1.png')
    message = refusal(eval_t2i.main, dpg)
    assert 'b1.png: 32x32, expected 64x64' in message and len(lines(f'{tmp_path}/out/dpg/grids/results.jsonl')) == 1


def test_dpg_draws_its_grids(tmp_path, capsys):
    (tmp_path / 'texts').mkdir()
    (tmp_path / 'texts' / 'x7.txt').write_text(SHAPES[0]['prompt'] + '\n')
    words = ['--bench=dpg', f'--prompts={tmp_path}/texts', f'--out_dir={tmp_path}/out', '--eval_steps=2', '--device=cpu']
    eval_t2i.main(words)
    assert 'no score: ' in capsys.readouterr().out
    grid = np.asarray(Image.open(f'{tmp_path}/out/dpg/base/images/x7.png'))
    assert grid.shape == (64, 64, 3) and os.listdir(f'{tmp_path}/out/dpg/base/images') == ['x7.png']
    x = torch.zeros(4, 3, 32, 32) + torch.tensor([-1., -0.5, 0.5, 1.]).view(4, 1, 1, 1)
    eval_t2i.save_images(keys_of('--bench=dpg', images=f'{tmp_path}/g'), dict(id='q'), x)
    grid = np.asarray(Image.open(f'{tmp_path}/g/q.png'))
    assert [grid[y, x, 0] for y, x in ((0, 0), (0, 63), (63, 0), (63, 63))] == [0, 64, 191, 255]


def test_a_real_model_answers_something():
    """The tiny captioner as the VQA model: it has never seen a question and answers prose, which is neither yes nor no."""
    vqa = judges.local_vlm(keys_of('--vqa=data/shapes/base/encoder'), 'cpu')
    answer = vqa(Image.fromarray(world.draw(scene_of(SHAPES[0]['prompt']))), 'describe the image')
    assert isinstance(answer, str) and '<|' not in answer and judges.says_yes(answer) is None


# --- GenEval++: the judge ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('meta, text', [
    (dict(include=[{'class': 'dog', 'count': 1}]), '- 1 dog present in the image.'),
    (dict(include=[{'class': 'dog', 'count': 3, 'color': 'red', 'size': 'larger', 'region': 'left'}]), '- red-colored larger 3 dogs located in the left part of the image.'),
    (GOOD, '- 2 dogs present in the image.\n- No more than 2 dogs should appear.'),
    (dict(include=[{'class': 'cup', 'count': 1, 'color': 'blue'}, {'class': 'cat', 'count': 2}]), '- blue-colored 1 cup present in the image.\n- 2 cats present in the image.')])
def test_checklist(meta, text):
    assert judges.checklist(meta) == 'This image should contain:\n' + text


@pytest.mark.parametrize('reply, found', [
    ('{"correct": 1, "reason": "fine"}', (1, 'fine')), ('```json\n{"correct": 0, "reason": "x"}\n```', (0, 'x')), ('Sure! {"correct": 1}', (1, '')), ('{"correct": true}', (1, '')),
    ('The image is correct.', None), ('{"correct": 1, "reason": "cut', None), ('{"correct": 2}', None), ('{"correct": -1}', None), ('{"correct": "maybe"}', None), ('{}', None),
    ('', None), ('[1]', None), ('{"correct": 1} or {"correct": 0}', None), ('{"correct": [1]}', None)])
def test_verdict(reply, found):
    if found is None:
        pytest.raises(ValueError, judges.verdict, reply)
    else:
        assert judges.verdict(reply) == found


def test_judge_summary_counts_what_failed_apart():
    rows = [('a', 1, ''), ('a', None, 'no answer'), ('a', 0, 'no image'), ('b', 1, '')]
    records = [dict(tag=t, correct=v, reason=r) for t, v, r in rows]
    s = summary.judge_summary(records)
    assert s['columns'] == dict(a=0.5, b=1.0, overall=0.75) and (s['failed'], s['missing'], s['images']) == (1, 1, 4)
    assert summary.judge_summary([*records, dict(tag='c', correct=None, reason='')])['columns'] == dict(a=0.5, b=1.0, c=None, overall=None), 'no overall without every tag'


class Server(http.server.BaseHTTPRequestHandler):
    """Behaves as the prompt in the request tells it: see `behave`."""
    protocol_version = 'HTTP/1.0'
    seen, got = [], []

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.got.append((self.path, self.headers.get('Authorization')))
        self.send_error(404)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        self.seen.append((self.path, self.headers.get('Authorization'), body))
        how = body['messages'][1]['content'][0]['text'].split('\n')[1]
        times = sum(s[2]['messages'][1] == body['messages'][1] for s in self.seen)
        good = json.dumps(dict(correct=1, reason='fine'))
        if how == 'hangs':
            time.sleep(1.5)
        if how == 'closes':
            return None
        if how in ('500', '403', '400') or how == 'recovers' and times < 3:
            return self.send_error(int(how) if how.isdigit() else 503)
        if how == 'redirects':
            self.send_response(302)
            self.send_header('Location', f'http://127.0.0.1:{self.server.server_port}/elsewhere')
            return self.end_headers()
        text = dict(prose='It looks right to me.', cut='{"correct": 1, "rea', fenced=f'```json\n{good}\n```', wrong='{"correct": 0}').get(how, good)
        raw = dict(bad='<html>', shape='{"choices": []}', null='{"choices": [{"message": {"content": null}}]}').get(how, json.dumps(dict(choices=[dict(message=dict(content=text))])))
        self.send_response(200)
        self.send_header('Content-Length', str(len(raw)))
        self.end_headers()
        try:
            for part in (list(raw) if how == 'drips' else [raw[:30]] if how == 'partial' else [raw]):
                self.wfile.write(part.encode())
                self.wfile.flush()
                time.sleep(0.02 * (how == 'drips'))
        except OSError:                                                              # the client has hung up
            pass


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """Runs GenEval++ over prompts, each of which is what the server should do -> (records, summary, requests)."""
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-very-secret')
    monkeypatch.setattr(judges.time, 'sleep', lambda s, real=time.sleep: real(s if threading.current_thread() is not threading.main_thread() else 0))

    def run(*behaviours, lost=()):
        Server.seen.clear()
        path = tmp_path / 'p.jsonl'
        path.write_text(''.join(json.dumps(dict(tag=f't{n % 2}', include=GOOD['include'], prompt=b)) + '\n' for n, b in enumerate(behaviours)))
        os.makedirs(tmp_path / 'theirs', exist_ok=True)
        for n in range(len(behaviours)):
            if n not in lost:
                Image.new('RGB', (16, 16), (n, 0, 0)).save(tmp_path / 'theirs' / f'{n + 1}.jpg')
        eval_t2i.main(['--bench=geneval++', f'--prompts={path}', '--generate=False', f'--images={tmp_path}/theirs', f'--out_dir={tmp_path}/out', '--judge_timeout=0.5', '--judge_tries=3',
                       '--judge_model=m', f'--judge_url=http://127.0.0.1:{server.server_port}/v1', '--device=cpu'])
        out = f'{tmp_path}/out/geneval++/theirs'
        by_name = {r['prompt']: r for r in lines(f'{out}/results.jsonl')}
        return [by_name[b] for b in behaviours], json.load(open(f'{out}/summary.json')), list(Server.seen)
    yield run
    server.shutdown()
    server.server_close()


def test_a_judge_that_misbehaves(judged, tmp_path):
    good, bad = ('fine', 'fenced', 'recovers', 'wrong'), ('500', '400', 'hangs', 'drips', 'prose', 'cut', 'bad', 'shape', 'null', 'partial', 'closes', 'redirects')
    records, s, requests = judged(*good, *bad, 'lost', lost=[16])
    assert [r['correct'] for r in records] == [1, 1, 1, 0] + [None] * len(bad) + [0]
    assert [records[4 + n]['reason'].split(': ')[1].split()[0] for n in range(len(bad))] == ['HTTP', 'HTTP', 'TimeoutError', 'TimeoutError', 'ValueError', 'ValueError', 'JSONDecodeError',
                                                                                            'IndexError', 'TypeError', 'JSONDecodeError', 'RemoteDisconnected', 'HTTP']
    assert (s['failed'], s['missing'], s['images']) == (12, 1, 17)
    assert s['columns'] == dict(t0=pytest.approx(2 / 3), t1=0.5, overall=pytest.approx(7 / 12)), 'fine, recovers, not lost | fenced, not wrong'
    asked = [b['messages'][1]['content'][0]['text'].split('\n')[1] for _, _, b in requests]
    assert all(asked.count(b) == 3 for b in ('recovers', *bad)) and asked.count('fine') == 1 and {p for p, _, _ in requests} == {'/v1/chat/completions'}, 'three tries, none elsewhere'
    body = requests[0][2]
    assert (body['model'], body['temperature'], body['max_tokens']) == ('m', 0, 200) and body['messages'][0]['role'] == 'system'
    assert body['messages'][1]['content'][0]['text'] == 'Instruction:\nfine\n\nExpectation checklist:\nThis image should contain:\n- 2 dogs present in the image.'
    assert body['messages'][1]['content'][1]['image_url']['url'].startswith('data:image/jpeg;base64,/9j/')
    assert not Server.got, 'the key does not follow a redirect'
    assert all(key == 'Bearer sk-very-secret' for _, key, _ in requests)
    assert not any(b'secret' in text for text in contents(tmp_path / 'out').values())
    # answers are kept, failures are asked again; a new image is a new question
    Image.new('RGB', (16, 16), (200, 0, 0)).save(tmp_path / 'theirs' / '1.jpg')
    again = judged('fine', 'fenced', 'recovers', 'wrong', 'prose')[2]
    assert [b['messages'][1]['content'][0]['text'].split('\n')[1] for _, _, b in again] == ['prose'] * 3


def test_a_judge_that_wants_another_key_ends_the_run_and_nothing_is_lost(judged, tmp_path):
    with pytest.raises(SystemExit, match='HTTP 403.*OPENAI_API_KEY'):
        judged('fine', '403', 'wrong')
    records, _, requests = judged('fine', 'fenced', 'wrong')
    assert [r['correct'] for r in records] == [1, 1, 0] and len(requests) == 2
