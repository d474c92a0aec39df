"""Bad input: one line that says what and where, an exit code that is not 0, nothing saved is lost.

What can be skipped is skipped.
"""
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from data.shapes import scenes as world
from running import STAGES, arguments, lines, python, refusal, tiny

rng = np.random.default_rng(0)


def good(folder, n, start=0):
    """Writes n pictures of the embedded world, numbered from `start` on."""
    os.makedirs(folder, exist_ok=True)
    for i in range(start, start + n):
        scene = world.random_scene(rng)
        Image.fromarray(world.draw(scene)).save(f'{folder}/{i:03d}.png')


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


def test_a_folder_of_everything_trains_and_counts_what_it_skips(tmp_path, capsys):
    folder = tmp_path / 'mixed'
    good(folder, 4)
    good(folder, 4, start=100)                   # the last ones are held out
    Image.new('LA', (50, 40), (90, 128)).save(folder / '011_grey_alpha.png')
    Image.new('CMYK', (64, 64), (10, 200, 30, 40)).save(folder / '013_cmyk.jpg')
    whole = (folder / '000.png').read_bytes()
    (folder / '020_empty.png').write_bytes(b'')
    (folder / '021_text.jpg').write_text('not an image')
    (folder / '022_cut.png').write_bytes(whole[:-40])
    Image.new('RGB', (1, 1)).save(folder / '023_one_pixel.png')
    bad = ['020_empty.png', '021_text.jpg', '022_cut.png', '023_one_pixel.png']

    out = tmp_path / 'out'
    # 2 steps of 8 see all
    log = tiny('grpo_encoder', out, f'--data={folder}', '--eval_every=2', images=8)
    assert [line['step'] for line in log] == [0, 1]
    evaluations = lines(out / 'eval.jsonl')
    assert len(evaluations) == 2
    assert 'judge' in evaluations[0] and 'caption_recall' not in evaluations[0]
    skipped = []
    for line in capsys.readouterr().out.splitlines():
        if line.startswith('warning: skipped '):
            skipped.append(line.split()[2].rstrip(':'))
    assert sorted(skipped) == bad, 'each bad one is named once, no good one is'
    assert log[-1]['skipped'] == 4, 'counted in the log'
    assert 0 < log[0]['skipped'] <= 4


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


# --- checkpoints ----------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """{the flag that it takes: the checkpoint of one step of the cheapest stage}."""
    found = {}
    for way in ('--lora_rank=0', '--lora_rank=2'):
        out = tmp_path_factory.mktemp('checkpoint') / 'a'
        tiny('grpo_decoder', out, way, steps=1)
        found[way] = out / 'step_000001'
    return found


def start_from(path, tmp_path, *extra, name='grpo_encoder'):
    """What a run says that refuses to start from `path`."""
    return refusal(tiny, name, tmp_path / 'out', f'--init_from={path}', *extra)


@pytest.mark.parametrize('name', [*STAGES, 'eval_unified'])
def test_init_from_that_does_not_exist(tmp_path, name):
    nowhere = tmp_path / 'nowhere'
    message = start_from(nowhere, tmp_path, name=name)
    assert message == f'--init_from={nowhere}: no such folder'


def test_init_from_that_is_no_checkpoint(tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'file').write_text('x')
    (tmp_path / 'killed' / 'step_000004.tmp').mkdir(parents=True)
    for kind in ('empty', 'file', 'killed'):
        path = tmp_path / kind
        assert str(path) in start_from(path, tmp_path)


PARTS = [
    ('--lora_rank=0', 'meta.json'),
    ('--lora_rank=0', 'projector.safetensors'),
    ('--lora_rank=0', 'encoder/model.safetensors'),
    ('--lora_rank=0', 'encoder/config.json'),
    ('--lora_rank=0', 'decoder/transformer/config.json'),
    ('--lora_rank=0', 'decoder/transformer/diffusion_pytorch_model.safetensors'),
    ('--lora_rank=2', 'encoder/adapter_model.safetensors'),
    ('--lora_rank=2', 'decoder/pytorch_lora_weights.safetensors'),
]


@pytest.mark.parametrize('damage', ['missing', 'truncated'])
@pytest.mark.parametrize('way, part', PARTS)
def test_half_written_checkpoint(checkpoints, tmp_path, way, part, damage):
    half = tmp_path / 'half'
    shutil.copytree(checkpoints[way], half)
    file = half / part
    if damage == 'missing':
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2)
    assert str(half) in start_from(half, tmp_path, way)


def test_models_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    out = tmp_path / 'out'
    nowhere = f'{tmp_path}/nowhere'
    places = dict(encoder=nowhere, decoder=nowhere, judge=nowhere, clip=f'local-dir:{nowhere}')
    for key, place in places.items():
        assert nowhere in refusal(tiny, 'grpo_decoder', out, f'--{key}={place}', '--eval_every=1')
    message = refusal(tiny, 'grpo_decoder', out, '--preset=paper', '--data=shapes')
    assert 'stage 0' in message, 'a projector is needed: it says where from'


# --- values ---------------------------------------------------------------------------------------
# beside those that config.py knows: tests/test_config.py
@pytest.mark.parametrize('name, flag, says', [
    ('grpo_encoder', '--reward=clap', 'clap'),
    ('grpo_decoder', '--device=abacus', '--device=abacus'),
    ('grpo_encoder', '--resolution=33', '--resolution=33'),         # the VAE halves it twice
    ('cold_start', '--resolution=8', '--resolution=8'),     # one patch of the encoder is as wide
    ('grpo_decoder', '--resolution=72', 'up to 64'),    # more positions than the transformer has
    ('pretrain_decoder', '--resolution=128', 'up to 64'),
    ('reca', '--caption_prompt=what is <|image_pad|> here', 'without the image mark <|image_pad|>'),
    ('sample', '--caption_prompt=<|image_pad|> --prompt=x', 'without the image mark <|image_pad|>'),
    ('sample', '', '--image'),
    ('sample', '--image=no.png', 'no.png'),
    ('grpo_decoder', '--sde=cps --denoise_steps=2 --noise_level=1', 'more steps'),
])
def test_values_that_mean_nothing(tmp_path, name, flag, says):
    out = tmp_path / 'out'
    flags = [f'--{part}' for part in flag.split('--') if part]
    assert says in refusal(tiny, name, out, *(part.strip() for part in flags))
    assert not list(out.glob('*.json*')), 'the corrected command may use the folder'


def test_an_out_dir_that_no_disk_takes_is_one_line(tmp_path):
    message = refusal(tiny, 'grpo_decoder', '/proc/nowhere')
    assert message.startswith('/proc/nowhere cannot be written')


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
    assert done.stdout.splitlines()[-1] == f'--init_from={nowhere}: no such folder'
