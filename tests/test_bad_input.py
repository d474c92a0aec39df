"""Bad input: one line that says what and where, an exit code that is not 0, and nothing saved is
lost; what can be skipped is."""

import os
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data.shapes import scenes as world
from running import STAGES, arguments, lines, python, refusal, script, tiny

rng = np.random.default_rng(0)


def good(folder, n, start=0):
    os.makedirs(folder, exist_ok=True)
    for i in range(start, start + n):
        Image.fromarray(world.draw(world.random_scene(rng))).save(f'{folder}/{i:03d}.png')


def huge_header(path, side=200000):
    """A PNG that claims side x side pixels."""

    def chunk(kind, data):
        return (
            struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        )

    with open(path, 'wb') as f:
        f.write(
            b'\x89PNG\r\n\x1a\n'
            + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress(b'\0'))
            + chunk(b'IEND', b'')
        )


# --- images --------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', [*STAGES, 'eval_unified', 'pretrain_decoder'])
def test_missing_and_empty_folders(tmp_path, name):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'texts').mkdir()
    (tmp_path / 'texts' / 'a.txt').write_text('no image')
    for folder in ('missing', 'empty', 'texts'):
        assert str(tmp_path / folder) in refusal(
            lambda: tiny(name, tmp_path / 'out', f'--data={tmp_path / folder}')
        )
    assert not (tmp_path / 'out').exists() or not os.listdir(tmp_path / 'out'), (
        'a refused run leaves nothing that --resume or a second try would trip over'
    )


def test_one_image_is_too_few(tmp_path):
    good(tmp_path / 'one', 1)
    message = refusal(lambda: tiny('grpo_encoder', tmp_path / 'out', f'--data={tmp_path / "one"}'))
    assert str(tmp_path / 'one') in message and 'warnings above' not in message


@pytest.mark.parametrize('name', STAGES)
def test_a_folder_of_everything_trains_and_counts_what_it_skips(tmp_path, capsys, name):
    folder = tmp_path / 'mixed'
    good(folder, 4)
    good(folder, 4, start=100)  # the last ones are held out
    Image.new('L', (50, 40), 90).save(folder / '010_grey.png')
    Image.new('LA', (50, 40), (90, 128)).save(folder / '011_grey_alpha.png')
    Image.new('RGBA', (40, 50), (200, 20, 20, 128)).save(folder / '012_rgba.png')
    Image.new('CMYK', (64, 64), (10, 200, 30, 40)).save(folder / '013_cmyk.jpg')
    Image.new('P', (64, 64), 3).save(folder / '014_palette.gif')
    (folder / '020_empty.png').write_bytes(b'')
    (folder / '021_text.jpg').write_text('not an image')
    (folder / '022_cut.png').write_bytes((folder / '000.png').read_bytes()[:-40])
    Image.new('RGB', (1, 1)).save(folder / '023_one_pixel.png')
    huge_header(folder / '024_huge.png')
    bad = ['020_empty.png', '021_text.jpg', '022_cut.png', '023_one_pixel.png', '024_huge.png']
    log = tiny(
        name, tmp_path / 'out', f'--data={folder}', '--eval_every=2', images=8
    )  # 2 steps of 8 see all 14
    out = capsys.readouterr().out
    assert [line['step'] for line in log] == [0, 1] and len(
        lines(tmp_path / 'out' / 'eval.jsonl')
    ) == 2
    skipped = [
        line.split()[2].rstrip(':')
        for line in out.splitlines()
        if line.startswith('warning: skipped ')
    ]
    assert sorted(skipped) == bad, 'each bad one is named once, no good one is'
    assert log[-1]['skipped'] == 5 and 0 < log[0]['skipped'] <= 5, 'counted in the log'


def test_nothing_readable_is_refused(tmp_path):
    for i in range(8):
        (tmp_path / f'{i}.png').write_text('not an image')
    message = refusal(lambda: tiny('grpo_decoder', tmp_path / 'out', f'--data={tmp_path}'))
    assert 'can be read' in message


def test_images_that_rot_after_the_start_are_refused_in_one_line(tmp_path):
    """The held-out ones are fine, the training ones are not: found at the first step only."""
    good(tmp_path / 'held', 4)
    (tmp_path / 'train').mkdir()
    for i in range(4):
        (tmp_path / 'train' / f'{i}.png').write_text('not an image')
    assert 'none of the 4 images' in refusal(
        lambda: tiny(
            'grpo_decoder',
            tmp_path / 'out',
            f'--data={tmp_path / "train"}',
            f'--held_out={tmp_path / "held"}',
        )
    )


def test_captions_that_are_not_there_stop_the_pretraining(tmp_path):
    good(tmp_path / 'plain', 8)
    for flag in ('--train_encoder=True', '--train_encoder=False'):
        assert 'caption' in refusal(
            lambda: tiny('pretrain_decoder', tmp_path / 'out', f'--data={tmp_path / "plain"}', flag)
        )


# --- checkpoints ---------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """The checkpoint of one step of the cheapest stage."""
    out = tmp_path_factory.mktemp('checkpoint') / 'a'
    tiny('grpo_decoder', out, steps=1)
    return out / 'step_000001'


def start_from(path, tmp_path, *extra, name='grpo_encoder'):
    return refusal(lambda: tiny(name, tmp_path / 'out', f'--init_from={path}', *extra))


@pytest.mark.parametrize('name', [*STAGES, 'eval_unified'])
def test_init_from_that_does_not_exist(tmp_path, name):
    message = start_from(tmp_path / 'nowhere', tmp_path, name=name)
    assert str(tmp_path / 'nowhere') in message and 'no such folder' in message


def test_init_from_that_is_no_checkpoint(tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'file').write_text('x')
    (tmp_path / 'killed' / 'step_000004.tmp').mkdir(parents=True)
    for what in ('empty', 'file', 'killed'):
        assert str(tmp_path / what) in start_from(tmp_path / what, tmp_path)


@pytest.mark.parametrize('flag', ['--lora_rank=4', '--cond_len=30', '--preset=medium'])
def test_checkpoint_of_another_preset(checkpoint, tmp_path, flag):
    message = start_from(checkpoint, tmp_path, flag, '--data=shapes')
    assert str(checkpoint) in message and "its preset was 'tiny'" in message


@pytest.mark.parametrize('damage', ['missing', 'truncated', 'empty'])
@pytest.mark.parametrize(
    'part',
    [
        'meta.json',
        'projector.safetensors',
        'encoder/model.safetensors',
        'encoder/config.json',
        'decoder/transformer/config.json',
        'decoder/transformer/diffusion_pytorch_model.safetensors',
    ],
)
def test_half_written_checkpoint(checkpoint, tmp_path, part, damage):
    shutil.copytree(checkpoint, tmp_path / 'half')
    file = tmp_path / 'half' / part
    file.unlink() if damage == 'missing' else os.truncate(
        file, file.stat().st_size // 2 if damage == 'truncated' else 0
    )
    message = start_from(tmp_path / 'half', tmp_path)
    assert str(tmp_path / 'half') in message


@pytest.mark.parametrize(
    'part', ['encoder/adapter_model.safetensors', 'decoder/pytorch_lora_weights.safetensors']
)
def test_half_written_adapters(tmp_path, part):
    tiny('grpo_decoder', tmp_path / 'a', '--lora_rank=2', steps=1)
    file = tmp_path / 'a' / 'step_000001' / part
    os.truncate(file, file.stat().st_size // 2)
    assert str(file) in start_from(tmp_path / 'a', tmp_path, '--lora_rank=2')
    file.unlink()
    assert part in start_from(tmp_path / 'a', tmp_path, '--lora_rank=2')


def test_models_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    for key in ('encoder', 'decoder', 'judge', 'clip'):
        value = f'{"local-dir:" if key == "clip" else ""}{tmp_path}/nowhere'
        assert f'{tmp_path}/nowhere' in refusal(
            lambda: tiny('grpo_decoder', tmp_path / 'out', f'--{key}={value}')
        )
    assert 'stage 0' in refusal(
        lambda: tiny('grpo_decoder', tmp_path / 'out', '--preset=paper', '--data=shapes')
    ), 'a projector is needed: it says where from'


# --- values --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'name, flag',
    [
        ('grpo_decoder', '--sde=ode'),
        ('grpo_decoder', '--condition=words'),
        ('grpo_encoder', '--dtype=float8'),
        ('grpo_encoder', '--reward=clap'),
        ('grpo_decoder', '--device=abacus'),
        ('cold_start', '--grad_steps=0'),
        ('grpo_decoder', '--sde_window=0'),
        ('grpo_decoder', '--sample_steps=1'),
        ('cold_start', '--stepz=3'),
        ('grpo_encoder', '--group=1'),
        ('grpo_decoder', '--group=1'),
        ('grpo_encoder', '--prompts=0'),
    ],
)
def test_values_that_mean_nothing(tmp_path, name, flag):
    key, value = flag[2:].split('=')
    message = refusal(lambda: tiny(name, tmp_path / 'out', flag))
    assert key in message or repr(value) in message


def test_sample_asks_for_something_to_do(tmp_path):
    if not os.path.exists('sample.py'):
        pytest.skip('no sample.py')
    assert '--image' in refusal(lambda: script('sample', f'--out_dir={tmp_path}'))
    assert str(tmp_path / 'no.png') in refusal(
        lambda: script('sample', f'--out_dir={tmp_path}', f'--image={tmp_path}/no.png')
    )


def test_exit_code_and_one_line(tmp_path):
    """As a user meets it: no traceback, one line, exit code 1."""
    done = python(
        'grpo_encoder.py',
        *arguments('grpo_encoder', tmp_path / 'out', f'--init_from={tmp_path}/nowhere'),
    )
    assert done.returncode == 1 and 'Traceback' not in done.stdout
    assert [line for line in done.stdout.splitlines() if 'nowhere' in line] == [
        f'--init_from={tmp_path}/nowhere: no such folder'
    ]
