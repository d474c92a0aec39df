"""Bad input: one line that says what and where, an exit code that is not 0, nothing saved is lost.

What can be skipped is skipped.
"""
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
    """Writes n pictures of the embedded world, numbered from `start` on."""
    os.makedirs(folder, exist_ok=True)
    for i in range(start, start + n):
        scene = world.random_scene(rng)
        Image.fromarray(world.draw(scene)).save(f'{folder}/{i:03d}.png')


def chunk(kind, data):
    """One chunk of a PNG file."""
    checksum = zlib.crc32(kind + data)
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', checksum)


def huge_header(path, side=200000):
    """A PNG that claims side x side pixels."""
    header = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
    with open(path, 'wb') as f:
        f.write(b'\x89PNG\r\n\x1a\n')
        f.write(chunk(b'IHDR', header))
        f.write(chunk(b'IDAT', zlib.compress(b'\0')))
        f.write(chunk(b'IEND', b''))


# --- images ---------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', [*STAGES, 'eval_unified', 'pretrain_decoder'])
def test_missing_and_empty_folders(tmp_path, name):
    out = tmp_path / 'out'
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'texts').mkdir()
    (tmp_path / 'texts' / 'a.txt').write_text('no image')
    for kind in ('missing', 'empty', 'texts'):
        folder = tmp_path / kind
        assert str(folder) in refusal(tiny, name, out, f'--data={folder}')
    if out.exists():
        assert not os.listdir(out), 'a refused run leaves nothing that --resume would trip over'


def test_one_image_is_too_few(tmp_path):
    folder = tmp_path / 'one'
    good(folder, 1)
    message = refusal(tiny, 'grpo_encoder', tmp_path / 'out', f'--data={folder}')
    assert str(folder) in message
    assert 'warnings above' not in message


@pytest.mark.parametrize('name', STAGES)
def test_a_folder_of_everything_trains_and_counts_what_it_skips(tmp_path, capsys, name):
    folder = tmp_path / 'mixed'
    good(folder, 4)
    good(folder, 4, start=100)                   # the last ones are held out
    Image.new('L', (50, 40), 90).save(folder / '010_grey.png')
    Image.new('LA', (50, 40), (90, 128)).save(folder / '011_grey_alpha.png')
    Image.new('RGBA', (40, 50), (200, 20, 20, 128)).save(folder / '012_rgba.png')
    Image.new('CMYK', (64, 64), (10, 200, 30, 40)).save(folder / '013_cmyk.jpg')
    Image.new('P', (64, 64), 3).save(folder / '014_palette.gif')
    whole = (folder / '000.png').read_bytes()
    (folder / '020_empty.png').write_bytes(b'')
    (folder / '021_text.jpg').write_text('not an image')
    (folder / '022_cut.png').write_bytes(whole[:-40])
    Image.new('RGB', (1, 1)).save(folder / '023_one_pixel.png')
    huge_header(folder / '024_huge.png')
    bad = ['020_empty.png', '021_text.jpg', '022_cut.png', '023_one_pixel.png', '024_huge.png']

    out = tmp_path / 'out'
    # 2 steps of 8 see all 14
    log = tiny(name, out, f'--data={folder}', '--eval_every=2', images=8)
    assert [line['step'] for line in log] == [0, 1]
    assert len(lines(out / 'eval.jsonl')) == 2
    skipped = []
    for line in capsys.readouterr().out.splitlines():
        if line.startswith('warning: skipped '):
            skipped.append(line.split()[2].rstrip(':'))
    assert sorted(skipped) == bad, 'each bad one is named once, no good one is'
    assert log[-1]['skipped'] == 5, 'counted in the log'
    assert 0 < log[0]['skipped'] <= 5


def test_nothing_readable_is_refused(tmp_path):
    for i in range(8):
        (tmp_path / f'{i}.png').write_text('not an image')
    message = refusal(tiny, 'grpo_decoder', tmp_path / 'out', f'--data={tmp_path}')
    assert 'can be read' in message


def test_images_that_rot_after_the_start_are_refused_in_one_line(tmp_path):
    """The held-out ones are fine, the training ones are not: found at the first step only."""
    train = tmp_path / 'train'
    held = tmp_path / 'held'
    good(held, 4)
    train.mkdir()
    for i in range(4):
        (train / f'{i}.png').write_text('not an image')
    message = refusal(tiny, 'grpo_decoder', tmp_path / 'out', f'--data={train}',
                      f'--held_out={held}')
    assert 'none of the 4 images' in message


def test_captions_that_are_not_there_stop_the_pretraining(tmp_path):
    plain = tmp_path / 'plain'
    good(plain, 8)
    for flag in ('--train_encoder=True', '--train_encoder=False'):
        message = refusal(tiny, 'pretrain_decoder', tmp_path / 'out', f'--data={plain}', flag)
        assert 'caption' in message


# --- checkpoints ----------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """The checkpoint of one step of the cheapest stage."""
    out = tmp_path_factory.mktemp('checkpoint') / 'a'
    tiny('grpo_decoder', out, steps=1)
    return out / 'step_000001'


def start_from(path, tmp_path, *extra, name='grpo_encoder'):
    """What a run says that refuses to start from `path`."""
    return refusal(tiny, name, tmp_path / 'out', f'--init_from={path}', *extra)


@pytest.mark.parametrize('name', [*STAGES, 'eval_unified'])
def test_init_from_that_does_not_exist(tmp_path, name):
    nowhere = tmp_path / 'nowhere'
    message = start_from(nowhere, tmp_path, name=name)
    assert str(nowhere) in message
    assert 'no such folder' in message


def test_init_from_that_is_no_checkpoint(tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'file').write_text('x')
    (tmp_path / 'killed' / 'step_000004.tmp').mkdir(parents=True)
    for kind in ('empty', 'file', 'killed'):
        path = tmp_path / kind
        assert str(path) in start_from(path, tmp_path)


@pytest.mark.parametrize('flag', ['--lora_rank=4', '--cond_len=30', '--preset=medium'])
def test_checkpoint_of_another_preset(checkpoint, tmp_path, flag):
    message = start_from(checkpoint, tmp_path, flag, '--data=shapes')
    assert str(checkpoint) in message
    assert "its preset was 'tiny'" in message


PARTS = [
    'meta.json',
    'projector.safetensors',
    'encoder/model.safetensors',
    'encoder/config.json',
    'decoder/transformer/config.json',
    'decoder/transformer/diffusion_pytorch_model.safetensors',
]


@pytest.mark.parametrize('damage', ['missing', 'truncated', 'empty'])
@pytest.mark.parametrize('part', PARTS)
def test_half_written_checkpoint(checkpoint, tmp_path, part, damage):
    half = tmp_path / 'half'
    shutil.copytree(checkpoint, half)
    file = half / part
    if damage == 'missing':
        file.unlink()
    elif damage == 'truncated':
        os.truncate(file, file.stat().st_size // 2)
    else:
        os.truncate(file, 0)
    message = start_from(half, tmp_path)
    assert str(half) in message


ADAPTERS = ['encoder/adapter_model.safetensors', 'decoder/pytorch_lora_weights.safetensors']


@pytest.mark.parametrize('part', ADAPTERS)
def test_half_written_adapters(tmp_path, part):
    trained = tmp_path / 'a'
    tiny('grpo_decoder', trained, '--lora_rank=2', steps=1)
    file = trained / 'step_000001' / part
    os.truncate(file, file.stat().st_size // 2)
    assert str(file) in start_from(trained, tmp_path, '--lora_rank=2')
    file.unlink()
    assert part in start_from(trained, tmp_path, '--lora_rank=2')


def test_models_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    out = tmp_path / 'out'
    nowhere = f'{tmp_path}/nowhere'
    places = dict(encoder=nowhere, decoder=nowhere, judge=nowhere, clip=f'local-dir:{nowhere}')
    for key, place in places.items():
        assert nowhere in refusal(tiny, 'grpo_decoder', out, f'--{key}={place}')
    message = refusal(tiny, 'grpo_decoder', out, '--preset=paper', '--data=shapes')
    assert 'stage 0' in message, 'a projector is needed: it says where from'


# --- values ---------------------------------------------------------------------------------------
VALUES = [
    ('grpo_decoder', '--sde=ode'),
    ('grpo_decoder', '--condition=words'),
    ('grpo_encoder', '--dtype=float8'),
    ('grpo_encoder', '--reward=clap'),
    ('grpo_decoder', '--device=abacus'),
    ('cold_start', '--grad_steps=0'),
    ('grpo_decoder', '--noisy_steps=0'),
    ('grpo_decoder', '--denoise_steps=1'),
    ('cold_start', '--stepz=3'),
    ('grpo_encoder', '--group=1'),
    ('grpo_decoder', '--group=1'),
    ('grpo_encoder', '--batch=0'),
    ('grpo_encoder', '--resolution=33'),        # the VAE halves it twice
    ('cold_start', '--resolution=8'),           # one patch of the encoder is as wide
    ('grpo_decoder', '--resolution=72'),        # more positions than the transformer has
    ('pretrain_decoder', '--resolution=128'),
]


@pytest.mark.parametrize('name, flag', VALUES)
def test_values_that_mean_nothing(tmp_path, name, flag):
    key, value = flag[2:].split('=')
    message = refusal(tiny, name, tmp_path / 'out', flag)
    assert key in message or repr(value) in message


def test_cps_needs_a_step_that_may_be_noisy(tmp_path):
    flags = ['--sde=cps', '--denoise_steps=2', '--noise_level=1']
    assert 'more steps' in refusal(tiny, 'grpo_decoder', tmp_path / 'out', *flags)
    assert not list((tmp_path / 'out').glob('*.json*')), 'the corrected command may use the folder'


def test_sample_asks_for_something_to_do(tmp_path):
    assert '--image' in refusal(script, 'sample', f'--out_dir={tmp_path}')
    missing = tmp_path / 'no.png'
    message = refusal(script, 'sample', f'--out_dir={tmp_path}', f'--image={missing}')
    assert str(missing) in message


def test_the_tools_of_the_embedded_world_refuse_in_one_line(tmp_path):
    from data.shapes import demo, pretrain
    out = f'--out_dir={tmp_path}/out'
    assert "no part 'typo'" in refusal(pretrain.main, ['--parts=vae,typo', out])
    assert '--vae_steps' in refusal(pretrain.main, ['--vae_steps=0', out])
    assert '--scenes' in refusal(demo.main, ['--scenes=0', out])
    assert not os.path.exists(f'{tmp_path}/out')


def test_exit_code_and_one_line(tmp_path):
    """As a user meets it: no traceback, one line, exit code 1."""
    nowhere = f'{tmp_path}/nowhere'
    command = arguments('grpo_encoder', tmp_path / 'out', f'--init_from={nowhere}')
    done = python('grpo_encoder.py', *command)
    assert done.returncode == 1
    assert 'Traceback' not in done.stdout
    said = [line for line in done.stdout.splitlines() if 'nowhere' in line]
    assert said == [f'--init_from={nowhere}: no such folder']
