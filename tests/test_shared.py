"""A base whose images are words, and the probe that says how much they are."""
import torch

from conftest import at
from data.shapes import pretrain, shared
from data.shapes import scenes as world
from running import weights


def test_the_probe_s_known_answers():
    """Classes along axes: an image that is its word is known, a turned or a shifted one is not."""
    facts = torch.arange(400) % 4
    noise = 0.1 * torch.randn(2, 400, 8, generator=torch.Generator().manual_seed(0))
    words, images = torch.eye(8)[facts] + noise
    assert shared.probe((words, facts), (images, facts)) == 1
    others = images.roll(4, 1)                          # along axes that no word uses
    assert shared.probe((words, facts), (others, facts)) < 0.5
    assert shared.probe((words, facts), (images, (facts + 1) % 4)) == 0


def test_words_in_an_image_s_place_are_told_cell_by_cell(uae):
    red = world.Object('small', 'red', 'circle', 'top-right')
    blue = world.Object('large', 'blue', 'cross', 'bottom-left')
    ids = pretrain.in_words(uae, [world.Scene((red, blue), 'gray')])
    said = uae.encoder.tokenizer.decode(ids[0])
    assert said == (', gray background , small red circle top-right '
                    'large blue cross bottom-left , gray background ,')


def test_images_that_are_words_share_all_and_the_shipped_tower_s_share_nothing(uae, monkeypatch):
    nothing = shared.shared_space(uae)
    assert nothing['size'] < 0.7 and nothing['colour'] < 0.3 and nothing['shape'] < 0.45
    held = world.splits()[1]
    told = uae.encoder.embed(pretrain.in_words(uae, held))
    words = at(uae)
    words.encoder.see = lambda x: dict(features=told)
    everything = shared.shared_space(words)
    assert min(everything.values()) > 0.8


def test_table_and_law_of_everything_in_one_update(tmp_path, capsys):
    """From nothing to both tables and the picture."""
    few = ['--shorten=1000', '--scenes=4', '--geneval=False', '--pulled=0,1',
           f'--out_dir={tmp_path}']
    shared.main(few)
    text = (tmp_path / 'table.md').read_text()
    assert capsys.readouterr().out.endswith(text + '\n')
    rows = [line.split(' | ') for line in text.splitlines()]
    assert [row[0] for row in rows[2:6]] == [
        '| base', '| more brief captions', '| cold start', '| RecA']
    assert rows[2][3:5] == rows[5][3:5], 'RecA leaves the captioner alone'
    assert [row[0] for row in rows[-2:]] == ['| 0', '| 1']
    assert rows[-2][4] == rows[-1][4], 'one decoder'
    assert (tmp_path / 'law.png').stat().st_size


def test_the_law_lays_each_gain_beside_the_control():
    base = dict(size=0.5, colour=0.25, shape=1.0, t2i_true=0.4, geneval=0.1)
    aligned = {0: [dict(t2i_true=0.3, geneval=0.2)],
               8: [dict(t2i_true=0.8, geneval=0.3), dict(t2i_true=0.6, geneval=0.3)]}
    control = [dict(t2i_true=0.5, geneval=0.2), dict(t2i_true=0.6, geneval=0.3)]
    bases = {0: base, 8: dict(base, colour=0.75)}
    heads, _, *rows = [line.strip('| ').split(' | ')
                       for line in shared.law(bases, aligned, control).splitlines()]
    nothing, everything = (dict(zip(heads, row)) for row in rows)
    assert (nothing['probe: colour'], everything['probe: colour']) == ('0.25', '0.75')
    assert (nothing['t2i_true'], nothing['t2i_true after RecA']) == ('0.400', '0.300')
    assert nothing['t2i_true over the control'] == '-0.250'
    assert everything['t2i_true after RecA'] == '0.700 ± 0.100'
    assert everything['geneval over the control'] == '+0.050'
    without = [dict(t2i_true=0.5)]
    assert 'geneval' not in shared.law(bases, aligned, without)


def test_the_error_is_the_standard_error_of_the_seeds():
    rows = [dict(t2i=0.5), dict(t2i=0.7), dict(t2i=0.6)]
    assert shared.mean_and_error(rows, 't2i') == '0.600 ± 0.058'
    assert shared.mean_and_error(rows[:1], 't2i') == '0.500'
    assert shared.mean_and_error(rows, 'geneval') == ''


def test_each_part_trains_its_own(tmp_path):
    few = ['--terse_steps=2', '--tower_steps=3', '--reader_steps=3', '--decoder_images=40',
           f'--out_dir={tmp_path}/base']
    states = [weights(pretrain.BASE)]
    for part in ('terse', 'tower', 'reader'):
        pretrain.main([f'--parts={part}', *few])
        states.append(weights(tmp_path / 'base'))
    moved = []
    for before, after in zip(states, states[1:]):
        changed = [key for key in after if not torch.equal(before[key], after[key])]
        moved.append({key.split(':')[0] + ' tower' * ('visual' in key) for key in changed})
    encoder = 'encoder/model.safetensors'
    decoder = 'decoder/transformer/diffusion_pytorch_model.safetensors'
    assert moved == [{decoder, 'projector.safetensors'}, {f'{encoder} tower'}, {encoder}]
