"""GenEval's rules on hand-made cases, its prompts and folders, and what happens to bad input."""
import json
import os
import types

import pytest
from PIL import Image

from lib import ranks
import eval_t2i
from bench import geneval, prompts, summary
from conftest import new_uae
from data.shapes import scenes as world
from eval_t2i import geneval_correct, relative_position
from running import lines, refusal
from t2i import GOOD, SHAPES, contents, keys_of, picture_of, read_json, scene_of, seen


# --- GenEval's rules ---------------------------------------------------------------------------
LEFT, RIGHT, ABOVE, BELOW = 'left of', 'right of', 'above', 'below'
OPPOSITE = {LEFT: RIGHT, RIGHT: LEFT, ABOVE: BELOW, BELOW: ABOVE}


def box(x, y, w=10, h=10):
    return (x, y, x + w, y + h)


@pytest.mark.parametrize('a, b, relations', [
    # equal boxes: more than 0.2 of both widths
    (box(0, 0), box(4, 0), set()),
    (box(0, 0), box(5, 0), {LEFT}),
    # they touch
    (box(0, 0), box(10, 0), {LEFT}),
    (box(10, 0), box(0, 0), {RIGHT}),
    (box(0, 0), box(0, 10), {ABOVE}),
    (box(0, 10), box(0, 0), {BELOW}),
    (box(0, 5), box(0, 0), {BELOW}),
    (box(0, 4), box(0, 0), set()),
    # one in the other, or nearly so
    (box(0, 0), box(0, 0), set()),
    (box(0, 0, 30, 30), box(10, 10), set()),
    (box(0, 0), box(1, 1), set()),
    (box(0, 0, 0, 0), box(0, 0, 0, 0), set()),
    # on both axes
    (box(0, 0), box(100, 100), {LEFT, ABOVE}),
    (box(100, 0), box(0, 100), {RIGHT, ABOVE}),
    (box(0, 0), box(6, 6), set()),
    (box(0, 0), box(7, 7), {LEFT, ABOVE}),
    (box(0, 0), box(100, 40), {LEFT}),
    (box(0, 0), box(16, 16), {LEFT, ABOVE}),
    (box(0, 0, 40, 10), box(20, 30, 40, 10), {ABOVE}),
    # with scores
    ((0, 0, 10, 10, 0.9), (30, 0, 40, 10, 0.1), {LEFT})])
def test_relative_position(a, b, relations):
    assert relative_position(a, b) == relations
    assert relative_position(b, a) == {OPPOSITE[relation] for relation in relations}


def things(n, at=0, colour=None):
    return [(box(at + 20 * i, 0), 0.9 - 0.1 * i, colour) for i in range(n)]


def wants(*include, exclude=()):
    """A metadata line; include: (class, count, more of the clause), exclude: (class, count)."""
    return dict(
        tag='x',
        prompt='p',
        include=[dict({'class': name}, count=n, **more) for name, n, more in include],
        exclude=[dict({'class': name}, count=n) for name, n in exclude])


DOG = wants(('dog', 1, {}))
CAT_LEFT_OF_DOG = wants(('dog', 1, {}), ('cat', 1, dict(position=[LEFT, 0])))
CAT_LEFT_OF_DOGS = wants(('dog', 2, {}), ('cat', 1, dict(position=[LEFT, 0])))
CAT_LEFT_OF_RED_DOG = wants(
    ('dog', 1, dict(color='red')), ('cat', 1, dict(position=[LEFT, 0])))
TWO_DOGS = wants(('dog', 2, {}), exclude=[('dog', 3)])
RED_DOG = wants(('dog', 1, dict(color='red')))
RED_DOGS = wants(('dog', 2, dict(color='red')))
RED, BLUE = things(1, colour='red'), things(1, colour='blue')


@pytest.mark.parametrize('objects, metadata, correct', [
    # nothing detected
    ({}, DOG, False),
    ({}, wants(), True),
    ({}, TWO_DOGS, False),
    ({}, CAT_LEFT_OF_DOG, False),
    ({}, RED_DOG, False),
    # counts
    (dict(dog=things(1)), DOG, True),
    (dict(dog=things(3)), DOG, True),
    (dict(cat=things(1)), DOG, False),
    (dict(dog=things(1)), TWO_DOGS, False),
    (dict(dog=things(2)), TWO_DOGS, True),
    (dict(dog=things(3)), TWO_DOGS, False),
    (dict(dog=things(2), cat=things(9)), TWO_DOGS, True),
    (dict(dog=things(1), cat=things(1)), wants(('dog', 1, {}), ('cat', 2, {})), False),
    # colours: only the best ones are asked
    (dict(dog=RED), RED_DOG, True),
    (dict(dog=BLUE), RED_DOG, False),
    (dict(dog=things(1)), RED_DOG, False),
    (dict(dog=BLUE + RED), RED_DOG, False),
    (dict(dog=things(2, colour='red') + BLUE), RED_DOGS, True),
    (dict(dog=RED + BLUE), RED_DOGS, False),
    # positions
    (dict(dog=things(1, 50), cat=things(1)), CAT_LEFT_OF_DOG, True),
    (dict(dog=things(1), cat=things(1, 50)), CAT_LEFT_OF_DOG, False),
    (dict(dog=things(1), cat=things(1)), CAT_LEFT_OF_DOG, False),
    (dict(cat=things(1)), CAT_LEFT_OF_DOG, False),
    (dict(dog=things(1, 50)), CAT_LEFT_OF_DOG, False),
    (dict(dog=things(2, 50), cat=things(1)), CAT_LEFT_OF_DOG, True),
    (dict(dog=things(1, 50), cat=things(1, 90) + things(1)), CAT_LEFT_OF_DOG, False),
    # of every one of the targets
    (dict(dog=things(2, 10), cat=things(1)), CAT_LEFT_OF_DOGS, True),
    (dict(dog=things(2, -10), cat=things(1)), CAT_LEFT_OF_DOGS, False),
    (dict(dog=things(1, 50, 'blue'), cat=things(1)), CAT_LEFT_OF_RED_DOG, False)])
def test_geneval_correct(objects, metadata, correct):
    assert geneval_correct(objects, metadata) is correct
    _, reason = geneval.geneval_verdict(objects, metadata)
    assert bool(reason) is not correct, 'a wrong image has a reason'


def test_geneval_overall_is_the_mean_of_the_tags():
    rows = [('counting', 'a', 1), ('counting', 'a', 0), ('counting', 'b', 0),
            ('counting', 'b', 0), ('colors', 'c', 1)]
    records = [dict(tag=t, metadata=m, correct=bool(v)) for t, m, v in rows]
    s = summary.geneval_summary(records)
    assert s['columns'] == dict(counting=0.25, colors=1.0, overall=0.625)
    assert (s['images'], s['prompts']) == (5, 3)
    assert (s['correct_images'], s['correct_prompts']) == (0.4, 2 / 3)
    # counting: shares .5 and 0 of two prompts, so .25; colors has one prompt
    assert s['overall_stderr'] == pytest.approx(0.25 / 2)


# --- prompts -----------------------------------------------------------------------------------
def line_of(**changes):
    return json.dumps(dict(GOOD, **changes))


def with_clause(**changes):
    clause = dict({'class': 'cat', 'count': 1}, **changes)
    return line_of(include=GOOD['include'] + [clause])


@pytest.mark.parametrize('bad, word', [
    ('{"tag": "counting"', 'JSON'),
    ('', 'JSON'),
    ('[]', 'object'),
    ('{}', 'tag'),
    (line_of(prompt=3), 'prompt'),
    (line_of(include='dog'), 'include'),
    (line_of(include=[{'class': 'dog'}]), 'count'),
    (line_of(exclude=[{'class': 'dog', 'count': 0}]), 'exclude[0]'),
    (with_clause(**{'class': 'kitten'}), 'kitten'),
    (with_clause(color='teal'), 'teal'),
    (with_clause(position=['near', 0]), 'position'),
    (with_clause(position=['above', 1]), 'position'),
    (with_clause(position='above'), 'position'),
    (line_of() + ',', 'Extra data'),
    ('{"tag": "counting",}', 'JSON'),
    (line_of() + line_of(), 'Extra data'),
    ('{"a":' * 100000, 'JSON'),
    (line_of(prompt='a dog \ud83d'), 'surrogate')])
def test_malformed_metadata_is_named_with_file_and_line(tmp_path, bad, word):
    path = tmp_path / 'p.jsonl'
    path.write_text('\n'.join([json.dumps(GOOD), bad, json.dumps(GOOD)]) + '\n')
    argv = ['--bench=geneval', f'--prompts={path}', f'--out_dir={tmp_path}/out']
    message = refusal(eval_t2i.main, argv)
    assert f'{path}:2: ' in message and word in message
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('start, end, close', [
    (b'', b'\n', b''), (b'\xef\xbb\xbf', b'\n', b'\n'), (b'', b'\r\n', b'\r\n'),
    (b'\xef\xbb\xbf', b'\r', b' \r\r')])
def test_marks_and_line_ends_of_other_systems(tmp_path, start, end, close):
    """The same prompts, with a byte order mark, other line ends, empty lines at the end."""
    def write(*texts):
        path = tmp_path / 'file'
        path.write_bytes(start + end.join(text.encode() for text in texts) + close)
        return str(path)

    meta = json.dumps(dict(GOOD, prompt='two d\u00f6gs'), ensure_ascii=False)
    items = prompts.read_items(keys_of('--bench=geneval', f'--prompts={write(meta, meta)}'))
    assert [(item['id'], item['prompt']) for item in items] == [
        ('00000', 'two d\u00f6gs'), ('00001', 'two d\u00f6gs')]
    columns = ','.join(prompts.DPG_COLUMNS) + ','
    (item,) = prompts.read_dpg(write(columns, 'a1,"two, d",1,0,e - w (d),Is?,'))
    assert (item['id'], item['prompt']) == ('a1', 'two, d')
    assert prompts.read_lines(write('a', '', 'b')) == ['a', '', 'b']


@pytest.mark.parametrize('argv, word', [
    (['--bench=genevall'], 'geneval++'),
    (['--bench=geneval'], '--prompts'),
    (['--bench=dpg', '--prompts=no/such.csv'], 'no/such.csv'),
    (['--condition=image'], 'condition'),
    (['--samples=0'], 'samples'),
    (['--bench=dpg', '--samples=2', '--prompts=x'], 'samples'),
    (['--bench=geneval++', '--prompts=x', '--judge_url=ftp://a'], 'judge_url'),
    (['--resolution=64'], '32'),
    (['--init_from=a/x,b/x'], 'several checkpoints need other names'),
    (['--bench=dpg', '--prompts=README.md'], 'README.md:1')])
def test_keys_that_mean_nothing(argv, word):
    assert word in refusal(eval_t2i.main, argv)


# --- the embedded world ------------------------------------------------------------------------
def test_the_oracle_gives_drawings_of_the_prompts_full_marks(uae):
    expected = []
    for tag in prompts.TAGS:
        expected += [tag] * 32
    assert [m['tag'] for m in SHAPES] == expected
    assert len({m['prompt'] for m in SHAPES}) == len(SHAPES)
    for m in SHAPES:
        assert geneval_correct(seen(scene_of(m['prompt']), m), m), m
        colours = tuple(world.COLOURS)
        assert prompts.parse_metadata(json.dumps(m), 'x:1', world.SHAPES, colours) == m
    y, mask, cut = uae.encoder.tokens([m['prompt'] for m in SHAPES])
    assert not any(cut.values()), 'all prompts fit'
    assert not (y == uae.encoder.tokenizer.unk_token_id).any(), 'in words that the tiny models know'
    positions = [m['include'][1]['position'] for m in SHAPES if m['tag'] == 'position']
    assert {relation for relation, _ in positions} == set(prompts.RELATIONS)
    counts = [m['include'][0]['count'] for m in SHAPES if m['tag'] == 'counting']
    assert set(counts) == {2, 3, 4}
    assert prompts.shapes_prompts() == SHAPES


def spoilt(scene, tag):
    """The scene's objects with one mistake that the tag is about."""
    first, *rest = scene.objects
    if tag in ('single_object', 'two_object'):
        there = [thing.shape for thing in scene.objects]
        other = next(shape for shape in world.SHAPES if shape not in there)
        return [first._replace(shape=other), *rest]
    if tag == 'counting':
        return rest
    if tag == 'colors':
        other = next(colour for colour in world.COLOURS if colour != first.colour)
        return [first._replace(colour=other)]
    (second,) = rest
    if tag == 'position':
        return [first._replace(cell=second.cell), second._replace(cell=first.cell)]
    return [first._replace(colour=second.colour), second._replace(colour=first.colour)]


def test_each_tag_notices_its_own_mistake():
    for m in SHAPES:
        scene = scene_of(m['prompt'])
        wrong = scene._replace(objects=tuple(spoilt(scene, m['tag'])))
        assert not geneval_correct(seen(wrong, m), m), m
    counting = [m for m in SHAPES if m['tag'] == 'counting']
    m = next(m for m in counting if m['include'][0]['count'] < 4)
    scene = scene_of(m['prompt'])
    taken = [thing.cell for thing in scene.objects]
    free = next(cell for cell in world.CELLS if cell not in taken)
    one_more = scene.objects[0]._replace(cell=free)
    wrong = scene._replace(objects=(*scene.objects, one_more))
    assert not geneval_correct(seen(wrong, m), m), 'one too many'


def test_the_oracle_has_boxes_and_puts_what_is_asked_first():
    red = world.Object('small', 'red', 'circle', 'top-left')
    blue = world.Object('large', 'blue', 'circle', 'bottom-right')
    scene = world.Scene((red, blue), 'gray')
    m = dict(include=[{'class': 'circle', 'count': 1, 'color': 'blue'}])
    circles = [((16, 16, 32, 32), 1.0, 'blue'), ((0, 0, 16, 16), 1.0, 'red')]
    assert seen(scene, m) == dict(circle=circles)
    assert geneval_correct(seen(scene, m), m)


FEW = SHAPES[::40][:3]


@pytest.fixture
def few(tmp_path):
    """Three prompts of the embedded world in a file, and the flags of a quick run over them."""
    path = tmp_path / 'p.jsonl'
    path.write_text(''.join(json.dumps(m) + '\n' for m in FEW))
    return [f'--prompts={path}', f'--out_dir={tmp_path}/out', '--samples=2',
            '--eval_denoise_steps=2', '--device=cpu']


def rank(number, world_size):
    return types.SimpleNamespace(
        rank=number, world=world_size, master=number == 0, device='cpu')


def generate(argv, folder, run):
    c = keys_of(*argv, images=str(folder))
    eval_t2i.generate(c, run, prompts.read_items(c))


def test_folders(few, tmp_path, capsys):
    eval_t2i.main(few)
    out = tmp_path / 'out' / 'shapes' / 'base'
    images = contents(out / 'images')
    expected = []
    for n in range(3):
        for name in ('metadata.jsonl', 'samples/00000.png', 'samples/00001.png'):
            expected.append(f'{n:05d}/{name}')
    assert sorted(images) == expected
    metas = [json.loads(images[f'{n:05d}/metadata.jsonl']) for n in range(3)]
    assert metas == FEW, 'one object a folder'
    assert len(set(images.values())) == 9, 'samples differ'
    results = lines(out / 'results.jsonl')
    assert len(results) == 6
    assert list(results[0]) == [
        'filename', 'tag', 'prompt', 'correct', 'reason', 'metadata', 'details']
    assert json.loads(results[0]['metadata']) == SHAPES[0]
    assert results[0]['filename'].endswith('00000/samples/00000.png')
    table = capsys.readouterr().out.splitlines()[-4:]
    assert table[0] == '| shapes | single_object | two_object | counting | overall |'
    assert table[2].startswith('| base | ')


def test_every_item_and_every_sample_has_its_own_noise(few):
    prompt = SHAPES[0]['prompt']
    first = dict(id='a', number=0, prompt=prompt)
    second = dict(id='b', number=1, prompt=prompt)
    uae = new_uae(keys_of(*few))
    a, b, c = eval_t2i.draw_prompts(uae, [(first, 0), (second, 0), (first, 1)])
    for one, other in ((a, b), (a, c), (b, c)):
        assert (one - other).abs().max() > 0.1


def test_resume_and_world_size(few, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_t2i, 'images_at_once', lambda config: 4)
    eval_t2i.main(few)
    images = tmp_path / 'out' / 'shapes' / 'base' / 'images'
    whole = contents(images)
    # what is there stays, what is missing comes back the same
    (images / '00001' / 'samples' / '00001.png').unlink()
    (images / '00000' / 'samples' / '00000.png').write_bytes(b'mine')
    generate(few, images, rank(0, 1))
    again = contents(images)
    assert again.pop('00000/samples/00000.png') == b'mine'
    assert whole.items() >= again.items() and len(again) == 8
    # two ranks write the very files of one
    monkeypatch.setattr(ranks, 'gather_objects', lambda items, run: items)
    for number, written in ((0, 6), (1, 9)):
        generate(few, tmp_path / 'two', rank(number, 2))
        assert len(contents(tmp_path / 'two')) == written, 'each rank draws its own share'
    assert contents(tmp_path / 'two') == whole


def test_images_of_others_are_not_taken_for_ours(few, tmp_path):
    eval_t2i.main(few)
    assert 'seed' in refusal(eval_t2i.main, [*few, '--seed=3'])
    (tmp_path / 'foreign' / '00000').mkdir(parents=True)
    argv = [*few, f'--images={tmp_path}/foreign']
    assert f'{tmp_path}/foreign' in refusal(eval_t2i.main, argv)


def drawn(folder, metas, samples=1):
    """Somebody else's images of the embedded world, all right."""
    for n, m in enumerate(metas):
        os.makedirs(f'{folder}/{n:05d}/samples')
        with open(f'{folder}/{n:05d}/metadata.jsonl', 'w') as f:
            json.dump(m, f)
        for k in range(samples):
            picture_of(m['prompt']).save(f'{folder}/{n:05d}/samples/{k:04d}.png')
    return folder


def remove(path):
    path.unlink()


def overwrite(path):
    path.write_bytes(b'no image')


def shrink(path):
    Image.new('RGB', (32, 31)).save(path)


def test_images_that_cannot_be_scored_are_named_and_the_rest_is_kept(few, tmp_path):
    folder = drawn(f'{tmp_path}/theirs', FEW, 3)
    argv = [few[0], few[1], '--generate=False', f'--images={folder}', '--samples=3']
    out = f'{tmp_path}/out/shapes/theirs'
    eval_t2i.main(argv)
    assert read_json(f'{out}/summary.json')['columns']['overall'] == 1.0
    path = tmp_path / 'theirs' / '00001' / 'samples' / '0001.png'
    kept = path.read_bytes()
    for damage, said in ((remove, 'missing'), (overwrite, 'cannot be read'),
                         (shrink, '32x31, expected 32x32')):
        damage(path)
        message = refusal(eval_t2i.main, argv)
        assert '1 of 9' in message and said in message and '00001/samples/' in message
        assert len(lines(f'{out}/results.jsonl')) == 8
        path.write_bytes(kept)
    eval_t2i.main(argv)
    assert len(lines(f'{out}/results.jsonl')) == 9
