"""Edits: a manifest's source images, stage 0 on them, what a checkpoint then can, and the embedded
world's own edits with what an oracle counts in them."""
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import config
from conftest import at
from data.images import DataError, open_images
from data.shapes import edits as world_edits
from data.shapes import scenes as world
from decoder import Decoder
from encoder import Encoder
from lib import checkpoint, scores
from running import ALONE, lines, refusal, script, tiny

KEYS = ('image', 'caption', '', 'source')
SOURCES = f'--data_keys={KEYS!r}'
TO_EDIT = [SOURCES, '--condition=text+image']


@pytest.fixture(scope='module')
def some():
    """Eight edits to train on and four held-out ones."""
    return world_edits.splits(8, 4)


@pytest.fixture(scope='module')
def manifest(some, tmp_path_factory):
    return str(world_edits.write(tmp_path_factory.mktemp('edits'), *some))


@pytest.fixture(scope='module')
def trained(manifest, tmp_path_factory):
    """The out_dir of two updates of stage 0 on edits, with an evaluation."""
    out = tmp_path_factory.mktemp('trained') / 'out'
    tiny('pretrain_decoder', out, f'--data={manifest}', *TO_EDIT, '--answer_key=answer',
         '--eval_every=2', '--warmup=0', images=4)
    return str(out)


# --- data -----------------------------------------------------------------------------------------
def test_a_batch_has_the_sources_of_its_images(some, manifest):
    images = open_images(manifest, 32, *KEYS).batch(0, 0, 12)
    edits = dict(zip([f'train/{i:05d}.png' for i in range(8)], some[0]))
    edits.update(zip([f'held_out/{i:05d}.png' for i in range(4)], some[1]))
    assert sorted(images['names']) == sorted(edits)
    for k, name in enumerate(images['names']):
        source, target = world.pixels(edits[name][:2])
        assert torch.equal(images['source'][k], torch.from_numpy(source))
        assert torch.equal(images['x'][k], torch.from_numpy(target))
        assert images['captions'][k] == edits[name].instruction
    assert 'source' not in open_images(manifest, 32).batch(0, 0, 2)


def test_an_unreadable_source_leaves_the_triple_out(manifest, tmp_path, capsys):
    shutil.copytree(os.path.dirname(manifest), tmp_path / 'd')
    (tmp_path / 'd' / 'train' / '00002.source.png').write_bytes(b'broken')
    os.remove(tmp_path / 'd' / 'train' / '00005.source.png')
    with open(tmp_path / 'd' / 'edits.jsonl', 'a') as f:
        f.write(json.dumps(dict(image='train/00000.png', caption='red .')) + '\n')
        row = dict(image='train/00000.png', caption='red .', source=['train/00001.png'])
        f.write(json.dumps(row) + '\n')
        row['source'] *= 2
        f.write(json.dumps(row) + '\n')
    images = open_images(str(tmp_path / 'd' / 'edits.jsonl'), 32, *KEYS)
    assert "no path at 'source' (the source of --data_keys)" in capsys.readouterr().out
    assert (len(images), images.left_out) == (13, 2)
    names = images.first(13)['names']
    assert set(images.skipped) == {'train/00002.png', 'train/00005.png'}
    assert len(names) == 11 and not set(names) & set(images.skipped)


def test_only_tables_name_sources(manifest):
    with pytest.raises(DataError, match='only a table can name sources'):
        open_images(os.path.dirname(manifest) + '/train', 32, *KEYS)


def test_sources_inside_a_parquet(manifest, tmp_path):
    pytest.importorskip('pyarrow')
    import pyarrow
    from pyarrow.parquet import write_table
    folder = os.path.dirname(manifest)
    columns = dict(image=[], source=[], caption=[])
    for row in lines(manifest):
        for key in ('image', 'source'):
            with open(f'{folder}/{row[key]}', 'rb') as f:
                columns[key].append(dict(bytes=f.read(), path=row[key]))
        columns['caption'].append(row['caption'])
    write_table(pyarrow.table(columns), tmp_path / 'e.parquet', row_group_size=5)
    inside = open_images(str(tmp_path / 'e.parquet'), 32, *KEYS).first(12)
    beside = open_images(manifest, 32, *KEYS).first(12)
    assert torch.equal(inside['x'], beside['x'])
    assert torch.equal(inside['source'], beside['source'])
    assert inside['captions'] == beside['captions']


@pytest.mark.parametrize('given, read', [
    ("('a', 'b', 'c', 'd')", ('a', 'b', 'c', 'd')), ("('a', 'b', 'c')", ('a', 'b', 'c', '')),
    ("('a', 'b')", ('a', 'b', '', '')), ("('a',)", None), ("('a', 'b', 'c', 'd', 'e')", None),
    ("('a', 'b', 'c', 4)", None)])
def test_data_keys_of_before_are_understood(given, read):
    def parse():
        return config.parse({}, {}, [f'--data_keys={given}'], 'x.py').data_keys
    if read:
        assert parse() == read
    else:
        assert '--data_keys: expected tuple' in refusal(parse)


# --- stage 0 --------------------------------------------------------------------------------------
def test_the_encoder_sees_the_source_and_the_decoder_draws_the_target(
        manifest, tmp_path, monkeypatch):
    seen, drawn = [], []
    see, to_latent = Encoder.see, Decoder.to_latent

    def spy_see(self, x):
        seen.append(x)
        return see(self, x)

    def spy_latent(self, x):
        drawn.append(x)
        return to_latent(self, x)

    monkeypatch.setattr(Encoder, 'see', spy_see)
    monkeypatch.setattr(Decoder, 'to_latent', spy_latent)
    tiny('pretrain_decoder', tmp_path / 'out', f'--data={manifest}', *TO_EDIT,
         '--caption_every=0', '--micro_batch=1', steps=1, images=4)
    images = open_images(manifest, 32, *KEYS)
    images.split_held_out()
    batch = images.batch(1337, 0, 4)
    assert not torch.equal(batch['x'], batch['source'])
    assert torch.equal(torch.cat(seen), batch['source'])
    assert torch.equal(torch.cat(drawn), batch['x'])


def test_edits_are_evaluated_as_edits(uae, manifest, trained):
    """Drawn from source and instruction, compared with the target; a caption is taught beside."""
    log = lines(f'{trained}/log.jsonl')
    assert log[0]['caption_loss'] > 0 == log[0]['unknown']
    assert [line['step'] for line in lines(f'{trained}/eval.jsonl')] == [0, 2]
    model = at(uae, condition='text+image', eval_every=0)
    images = open_images(manifest, 32, *KEYS)
    held = dict(images.split_held_out().first(4), scenes=None)
    records = scores.Evaluator(model, held, model.config, ALONE).records([1, 3])
    drawn = scores.draw_edits(model, held['source'], held['captions'], range(4))
    for record in records:
        row = record['row']
        error = (drawn[row] - held['x'][row]).square().mean().item()
        assert record['mse'] == pytest.approx(error, rel=1e-4)
        assert record['caption'] == held['captions'][row]
        assert record['caption_len'] == len(record['caption'].split()), 'without the end token'
    other = scores.draw_edits(model, held['x'], held['captions'], range(4))
    assert (other - drawn).abs().max() > 0.01, 'the source matters'


@pytest.mark.parametrize('extra, said', [
    ([SOURCES], '--condition=text leaves unseen'),
    ([SOURCES, '--condition=image'], '--condition=image leaves unseen'),
    (TO_EDIT, '--answer_key=FIELD')])
def test_what_edits_cannot_be_learnt_with_is_one_line(manifest, tmp_path, extra, said):
    message = refusal(tiny, 'pretrain_decoder', tmp_path / 'out', f'--data={manifest}', *extra)
    assert said in message


# --- a checkpoint that can ------------------------------------------------------------------------
def test_a_checkpoint_says_how_it_sees_sources_and_hands_it_on(trained, tmp_path):
    def says(out):
        return checkpoint.editing_condition(SimpleNamespace(init_from=str(out)))

    assert says(trained) == says(f'{trained}/step_000002') == 'text+image'
    tiny('reca', tmp_path / 'next', f'--init_from={trained}', '--lambda_t2i=0', steps=1)
    assert says(tmp_path / 'next') == 'text+image'
    tiny('reca', tmp_path / 'other', '--lambda_t2i=0', steps=1)
    for out in ('', tmp_path / 'other'):
        assert 'cannot edit' in refusal(says, out)


def test_a_picture_is_edited_by_such_a_checkpoint_alone(trained, manifest, tmp_path, capsys):
    name = 'held_out/00001'
    source = f'{os.path.dirname(manifest)}/{name}.source.png'
    flags = [f'--image={source}', '--prompt=red background .', '--device=cpu', '--seed=5',
             f'--out_dir={tmp_path}/out']
    script('sample', *flags, f'--init_from={trained}')
    path = f'{tmp_path}/out/00001.source.png'
    assert path in capsys.readouterr().out
    with Image.open(path) as image:
        both = np.asarray(image)
    assert both.shape == (32, 64, 3)
    assert np.array_equal(both[:, :32], np.asarray(Image.open(source)))
    c = config.parse({}, {}, [f'--init_from={trained}', '--condition=text+image'], 'x.py')
    x, *_ = open_images(source, 32).get(0)
    drawn = scores.draw_edits(checkpoint.open_uae(c), x[None], ['red background .'], [5])[0]
    wanted = ((drawn + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(both[:, 32:] - wanted).max() <= 1
    assert 'cannot edit' in refusal(script, 'sample', *flags)


def test_a_benchmark_is_drawn_by_such_a_checkpoint_alone(
        trained, manifest, tmp_path, monkeypatch):
    folder = os.path.dirname(manifest)
    items = {}
    for i, row in enumerate(lines(manifest)[:5]):
        items[str(i)] = dict(id=row['source'], prompt=row['caption'], edit_type='add')
    (tmp_path / 'items.json').write_text(json.dumps(items))
    (tmp_path / 'questions.json').write_text('{"add": "?"}')
    flags = ['--bench=imgedit', f'--prompts={tmp_path}/items.json', f'--sources={folder}',
             f'--judge_prompt={tmp_path}/questions.json', '--score=False', '--device=cpu',
             f'--out_dir={tmp_path}/out']
    script('eval_t2i', *flags, f'--init_from={trained}')
    results = f'{tmp_path}/out/imgedit/out/images'
    assert sorted(os.listdir(results)) == [f'{i}.png' for i in range(5)]
    with Image.open(f'{results}/3.png') as image:
        before = np.asarray(image)
    os.remove(f'{results}/3.png')
    kept = os.stat(f'{results}/2.png').st_mtime_ns
    script('eval_t2i', *flags, f'--init_from={trained}')
    assert os.stat(f'{results}/2.png').st_mtime_ns == kept
    with Image.open(f'{results}/3.png') as image:
        assert np.array_equal(before, np.asarray(image))
    assert 'made with other seed' in refusal(
        script, 'eval_t2i', *flags, f'--init_from={trained}', '--seed=2')
    assert 'cannot edit' in refusal(script, 'eval_t2i', *flags, '--init_from=base')
    assert 'needs --images' in refusal(script, 'eval_t2i', *flags)
    monkeypatch.setattr(checkpoint, 'open_uae', lambda *_: pytest.fail('nothing is missing'))
    script('eval_t2i', *flags, f'--init_from={trained}')
    items['5'] = dict(items['4'], id='none.png')
    (tmp_path / 'items.json').write_text(json.dumps(items))
    refused = refusal(script, 'eval_t2i', *flags, f'--init_from={trained}')
    assert '1 of 6 images' in refused and 'none.png' in refused, 'before anything is drawn'


# --- edits of the embedded world ------------------------------------------------------------------
def applied(scene, words):
    """A scene after an instruction, read by the grammar in edits.py and by nothing else of it."""
    things = {thing.cell: thing for thing in scene.objects}
    if len(words) == 3 and words[0] in world.BACKGROUNDS:
        return set(things.values()), words[0]
    if len(words) == 5:
        assert words[3] not in things
        things[words[3]] = world.Object(*words[:4])
        return set(things.values()), scene.background
    shape, cell, value, _ = words
    assert things[cell].shape == shape
    if value == 'background':
        del things[cell]
    else:
        things[cell] = things[cell]._replace(**{world.ATTRIBUTE[value]: value})
    return set(things.values()), scene.background


def test_an_instruction_says_all_that_changes(uae):
    training, held_out = world_edits.splits(400, 256)
    for edit in training + held_out:
        words = edit.instruction.split()
        assert words[-1] == '.'
        objects, background = applied(edit.source, words)
        assert (objects, background) == (set(edit.target.objects), edit.target.background)
        assert edit.source != edit.target and edit.target.objects
        assert world.read(world.pixels([edit.target])) == [edit.target], 'in reading order too'
        assert (edit.cell == '') == (words[1] == 'background')
        assert edit.cell in ('', *words)
    _, _, lost = uae.encoder.tokens([edit.instruction for edit in training])
    assert lost == dict(cut=0, unknown=0)


def test_held_out_edits_are_new_in_scene_and_combination():
    training, held_out = world_edits.splits(3000, 256)
    assert training[:100] == world_edits.splits(100, 8)[0]
    trained = {edit.combination for edit in training}
    assert not trained & {edit.combination for edit in held_out}
    assert len({edit.source for edit in held_out}) == 256
    assert {edit.source for edit in held_out} <= set(world.splits()[1])
    seen = {scene for edit in training for scene in (edit.source, edit.target)}
    assert not seen & {scene for edit in held_out for scene in (edit.source, edit.target)}
    words = {word for edit in training for word in edit.instruction.split()}
    assert words >= {word for edit in held_out for word in edit.instruction.split()}
    kinds = {len(edit.instruction.split()) for edit in held_out}
    assert kinds == {3, 4, 5}


A = world.Object('small', 'red', 'circle', 'top-left')
B = world.Object('large', 'blue', 'cross', 'bottom-right')
START = world.Scene((A, B), 'gray')
BLUE = world_edits.Edit(START, world.Scene((A._replace(colour='blue'), B), 'gray'),
                        'circle top-left blue .', 'top-left', ('circle', 'blue'))
GONE = world_edits.Edit(START, world.Scene((B,), 'gray'), 'circle top-left background .',
                        'top-left', ('circle', 'top-left'))
NAVY = world_edits.Edit(START, START._replace(background='navy'), 'navy background .', '',
                        ('gray', 'navy'))
MORE = world_edits.Edit(START, world.Scene((A, A._replace(cell='top-right'), B), 'gray'),
                        'small red circle top-right .', 'top-right', ('red', 'circle'))


@pytest.mark.parametrize('edit, drawn, changed, asked, kept, common', [
    (BLUE, START, 0, 1, 10, 10),                    # a copy of the source
    (BLUE, BLUE.target, 1, 1, 10, 10),
    (BLUE, world.Scene((A._replace(colour='green'),), 'gray'), 0, 1, 6, 10),
    (BLUE, world.Scene((B,), 'navy'), 0, 1, 6, 10),
    (GONE, START, 0, 1, 7, 7),
    (GONE, GONE.target, 1, 1, 7, 7),
    (NAVY, START, 0, 1, 10, 10),
    (NAVY, NAVY.target, 1, 1, 10, 10),
    (MORE, START, 0, 4, 10, 10),
    (MORE, MORE.target, 4, 4, 10, 10),
    (MORE, world.Scene((A, B._replace(cell='top-right'), B), 'gray'), 1, 4, 10, 10)])
def test_facts_by_hand(edit, drawn, changed, asked, kept, common):
    """Of two objects: 2 x 4 facts, 2 empty cells, the background: 11."""
    [counts] = world_edits.count_facts(world.pixels([drawn]), [edit])
    assert counts[:4].tolist() == [changed, asked, kept, common]


def test_the_error_outside_is_that_of_the_other_cells():
    x = world.pixels([BLUE.target] * 3)
    x[1, :, :16, :16] += 0.5                        # in the cell that is named
    x[2, :, 16:, :16] += 0.5                        # beside it
    counts = world_edits.count_facts(x, [BLUE, BLUE, BLUE])
    assert counts[:, 4:].tolist() == [[0, 3], [0, 3], [pytest.approx(0.25), 3]]
    assert world_edits.count_facts(x[:1], [NAVY])[0, 4:].tolist() == [0, 0]
    assert world_edits.shares(counts)[2] == pytest.approx(0.25 / 9)


def test_errors_of_the_table():
    """Two results that are the same differ by 0 +- 0; over edits alone the error is a share's."""
    rng = np.random.default_rng(0)
    changed = rng.random((1, 400)) < 0.3
    counts = np.ones((1, 400, 6))
    counts[..., 0] = changed
    values, errors = world_edits.with_error([(1, counts)], rng)
    assert values.tolist() == [pytest.approx(changed.mean()), 1, 1]
    assert errors[0] == pytest.approx((0.3 * 0.7 / 400) ** 0.5, rel=0.15) and errors[1] == 0
    same, errors = world_edits.with_error([(1, counts), (-1, counts)], rng)
    assert not same.any() and not errors.any()
    apart = np.concatenate([counts, counts])
    apart[0, :, 0], apart[1, :, 0] = 0, 1
    _, errors = world_edits.with_error([(1, apart)], rng)
    assert errors[0] == pytest.approx(0.5 / 2 ** 0.5, rel=0.15), 'seeds are drawn too'


def test_make_edit_leaves_its_table(tmp_path, capsys):
    flags = ['--steps=1', '--reca_steps=1', '--edits=40', '--scenes=6', '--seeds=2', '--device=cpu']
    world_edits.main([*flags, f'--out_dir={tmp_path}'])
    table = (tmp_path / 'table.md').read_text()
    assert table in capsys.readouterr().out
    rows = {}
    for line in table.splitlines()[2:]:
        name, *cells = [cell.strip() for cell in line.strip('|').split('|')]
        rows[name] = [float(cell.split(' ± ')[0]) for cell in cells]
    assert list(rows) == ['copy', 'base', 'pretrain_decoder', 'reca', 'reca - pretrain_decoder']
    assert rows['copy'] == [0, 1, 0]
    difference = np.subtract(rows['reca'], rows['pretrain_decoder'])
    assert np.abs(difference - rows['reca - pretrain_decoder']).max() < 0.0011
    for seed in (1337, 1338):
        assert checkpoint.newest(f'{tmp_path}/{seed}/reca')
