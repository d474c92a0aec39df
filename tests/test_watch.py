"""The pictures, captions and groups that a run leaves are those of its own numbers."""
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import grpo_encoder
from lib import pictures, watch
from conftest import shared_config
from data.images import open_data
from data.shapes import scenes as world
from lib.log import Log
from lib.scores import Evaluator
from reward import backbone, clip_reward
from running import lines, tiny

SMALL = ('--eval_every=1', '--denoise_steps=4', '--eval_denoise_steps=4', '--eval_images=2')


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """{stage: out_dir} of two updates with an evaluation before, between and after."""
    root = tmp_path_factory.mktemp('watched')
    for name in ('grpo_encoder', 'grpo_decoder'):
        tiny(name, root / name, *SMALL)
    return {name: root / name for name in ('grpo_encoder', 'grpo_decoder')}


def as_picture(image):
    """A Pillow image as (1, 3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels[None] / 127.5 - 1


def load_picture(path):
    """A PNG as (1, 3, R, R) in [-1, 1]."""
    with Image.open(path) as image:
        return as_picture(image)


@pytest.mark.parametrize('name', ['grpo_encoder', 'grpo_decoder'])
def test_the_same_images_at_every_evaluation(runs, name):
    out = runs[name]
    samples = lines(out / 'samples.jsonl')
    assert [(row['step'], row['row']) for row in samples] == [
        (step, row) for step in range(3) for row in range(2)]
    for row in samples:
        assert os.path.getsize(out / row['source']) and os.path.getsize(out / row['image'])
    for step in range(3):
        with Image.open(out / 'samples' / f'step_{step:06d}.png') as sheet:
            assert sheet.size == (4 * 136 + 8, 136 + 8), 'two pairs, four times as large'
            x = load_picture(out / samples[2 * step]['source'])
            assert torch.equal(as_picture(sheet)[..., 8:136, 8:136][..., ::4, ::4], x)


def test_a_kept_image_has_the_score_beside_it(runs):
    out = runs['grpo_decoder']
    tower = backbone('clip', shared_config('--device=cpu'))
    for row in lines(out / 'samples.jsonl'):
        x, x_hat = load_picture(out / row['source']), load_picture(out / row['image'])
        assert clip_reward(x, x_hat, tower).item() == pytest.approx(row['reward'], abs=0.02)
        assert (x - x_hat).square().mean().item() == pytest.approx(row['mse'], abs=0.01)


def test_false_phrases_are_those_that_do_not_hold(runs):
    _, held = world.splits(train=0)
    for row in lines(runs['grpo_encoder'] / 'samples.jsonl'):
        assert row['truth'] == world.caption(held[row['row']])
        assert world.false_phrases(row['truth'], held[row['row']]) == []
    scene = world.Scene([world.Object('small', 'red', 'circle', 'top-left')], 'gray')
    text = 'small red circle top-left , large red circle top-left , nonsense , gray background .'
    assert world.false_phrases(text, scene) == ['large red circle top-left', 'nonsense']


@pytest.mark.parametrize('name, kind', [
    ('grpo_encoder', 'captions'), ('grpo_decoder', 'drawings')])
def test_an_opened_group_is_a_group(runs, name, kind):
    groups = lines(runs[name] / 'groups.jsonl')
    assert [group['step'] for group in groups] == [1, 2]
    for group in groups:
        assert group['kind'] == kind
        members = group['members']
        r = torch.tensor([[member['reward'] for member in members]])
        want = grpo_encoder.group_advantage(r)[0].tolist()
        assert [member['adv'] for member in members] == pytest.approx(want, abs=1e-3)
        assert os.path.getsize(runs[name] / group['source'])


def test_tokens_joined_are_the_caption(runs):
    for group in lines(runs['grpo_encoder'] / 'groups.jsonl'):
        for member in group['members']:
            assert ''.join(member['tokens']) == member['caption']
            assert len(member['tokens']) == len(member['logp'])
            assert all(logp <= 0 for logp in member['logp'])


def test_a_group_s_drawings_have_the_rewards_beside_them(runs):
    out = runs['grpo_decoder']
    tower = backbone('clip', shared_config('--device=cpu'))
    for group in lines(out / 'groups.jsonl'):
        x = load_picture(out / group['source'])
        for member in group['members']:
            found = clip_reward(x, load_picture(out / member['image']), tower).item()
            assert found == pytest.approx(member['reward'], abs=0.03)


def test_the_watched_images_alone_have_pictures(uae, monkeypatch):
    monkeypatch.setattr(watch, 'WATCHED', 2)
    config = SimpleNamespace(**dict(vars(uae.config), eval_images=4, eval_denoise_steps=2))
    run = SimpleNamespace(rank=0, world=1, device='cpu', master=True)
    _, held = open_data(config, run)
    _, records = Evaluator(uae, held, config, run)()
    assert ['pictures' in record for record in records] == [True, True, False, False]
    sources = torch.stack([record['pictures'][0] for record in records[:2]])
    assert torch.equal(sources, watch.to_bytes(held['x'][:2]))


def test_large_images_are_kept_small():
    assert watch.to_bytes(torch.zeros(1, 3, 32, 32)).shape[-1] == 32
    kept = watch.to_bytes(torch.linspace(-2, 2, 3 * 512 * 512).view(1, 3, 512, 512))
    assert kept.shape == (1, 3, 256, 256)
    assert kept.min() == 0 and kept.max() == 255


def test_a_sheet_has_images_of_any_size_and_any_text():
    wide, small = Image.new('RGB', (300, 200), 'red'), Image.new('RGB', (8, 8), 'blue')
    items = [([], 'a prompt ' * 40), ([wide, small], 'from $5_{ to $6'), ([small], ''), ([], '')]
    page = pictures.sheet(items, columns=2, heads=('left', 'right'), side=60, lines=3)
    assert page.size == (2 * (2 * 68 + 8), 16 + 14 + 2 * (60 + 3 * 14 + 16))
    pixels = np.array(page)
    assert (pixels == (255, 0, 0)).all(-1).sum() == 60 * 40             # its shape is kept
    assert (pixels == (0, 0, 255)).all(-1).sum() == 2 * 60 * 60
    assert (pixels[30:90, 8:140] < 128).all(-1).sum() > 100             # text in place of images


def test_config_json_says_what_was_changed(runs):
    with open(runs['grpo_encoder'] / 'config.json') as f:
        about = json.load(f)
    assert about['script'] == 'grpo_encoder'
    assert about['changed']['eval_images'] == 2
    assert 'kl' not in about['changed'] and about['config']['kl'] == 0.03


class Writer:
    """Stands for TensorBoard's SummaryWriter."""

    def __init__(self, folder):
        self.scalars, self.images = [], []

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def add_image(self, name, pixels, step, dataformats):
        self.images.append((name, pixels.shape, step, dataformats))

    def flush(self):
        pass


def test_tensorboard_gets_fields_and_sheets(tmp_path, monkeypatch):
    writer = Writer(tmp_path)
    fake = SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', fake)
    config = shared_config(f'--out_dir={tmp_path}', '--device=cpu')
    config.tracker = 'tensorboard'              # on the command line it has to be installed
    log = Log(config, SimpleNamespace(master=True))
    log(3, loss=0.5)
    assert ('loss', 0.5, 3) in writer.scalars
    Image.new('RGB', (20, 10)).save(tmp_path / 'sheet.png')
    log.publish({'eval/judge': 0.7}, 4, f'{tmp_path}/sheet.png')
    assert ('eval/judge', 0.7, 4) in writer.scalars
    assert writer.images == [('samples', (10, 20, 3), 4, 'HWC')]
