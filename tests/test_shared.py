"""A base whose images are words, and the probe that says how much they are."""
import pytest
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


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A base after a few updates of each part, and its text before the tower."""
    out = tmp_path_factory.mktemp('shared') / 'base'
    few = ['--reader_steps=3', '--terse_steps=2', '--tower_steps=3', '--decoder_images=40',
           f'--out_dir={out}']
    pretrain.main(['--parts=reader,terse', *few])
    text = weights(out)
    pretrain.main(['--parts=tower', *few])
    return text, weights(out)


def test_each_part_trains_its_own(base):
    shipped = weights(pretrain.BASE)
    text, both = base
    def moved(before, after, part):
        return any(not torch.equal(before[key], after[key]) for key in after if part in key)

    assert moved(shipped, text, 'encoder') and moved(shipped, text, 'decoder/transformer')
    assert not moved(shipped, text, 'visual') and not moved(shipped, text, 'decoder/vae')
    assert moved(text, both, 'visual')
    language = [key for key in both if 'visual' not in key]
    assert all(torch.allclose(text[key], both[key], atol=1e-3) for key in language)
