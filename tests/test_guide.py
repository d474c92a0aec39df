"""Every command of docs/full_size.md: its keys at full size, and the command itself at tiny width.

The commands run in the page's order in one folder, so that each reads what those before it wrote.
"""
import importlib
import os
import re
import shlex

import numpy as np
import pytest
from PIL import Image
from torch.distributed.run import get_args_parser

import config
from conftest import ROOT
from data.shapes import scenes as world
from running import arguments, lines, script

PAGE = 'docs/full_size.md'
PHOTOS = '/data/photos'
NOT_RUN = {
    'hf auth login': 'asks for a token',
    'make rounds': 'stages 2 and 3, which are run by themselves',
    'uae:DIR': "the authors' weights: test_export.py makes some up",
    '--plan': 'test_plan.py runs it',
}


def page_commands():
    """The words of each command in an indented block of the page, in order."""
    with open(os.path.join(ROOT, PAGE)) as f:
        text = f.read()
    found = []
    for block in re.findall(r'(?:^    .*\n)+', text, re.M):
        for command in block.replace('\\\n', ' ').strip().split('\n'):
            found.append(shlex.split(command))
    return [words for words in found if words[0] in ('python', 'torchrun', 'hf', 'make')]


def runs_here(words):
    command = ' '.join(words)
    return not any(mark in command for mark in NOT_RUN)


COMMANDS = [words for words in page_commands() if runs_here(words)]


def parted(words):
    """(options of torchrun, name of the script, its arguments)."""
    place = next(i for i, word in enumerate(words) if word.endswith('.py'))
    return words[1:place], words[place].removesuffix('.py'), words[place + 1:]


def test_the_page_has_these_commands():
    names = [parted(words)[1] for words in COMMANDS if words[0] == 'python']
    assert names == ['sample', 'pretrain_decoder', 'cold_start', 'grpo_encoder',
                     'grpo_decoder', 'eval_unified', 'sample', 'grpo_encoder', 'eval_unified',
                     'sample']
    assert sum(words[0] == 'torchrun' for words in COMMANDS) == 7
    page = [' '.join(words) for words in page_commands()]
    for mark in NOT_RUN:
        assert any(mark in command for command in page), mark


@pytest.mark.parametrize('words', COMMANDS, ids=' '.join)
def test_keys_are_known_at_full_size(words):
    launcher, name, argv = parted(words)
    torchrun = get_args_parser()
    if '--shutdown-timeout' not in torchrun.format_help():         # of torch 2.11
        launcher = [word for word in launcher if not word.startswith('--shutdown-timeout')]
    torchrun.parse_args([*launcher, f'{name}.py'])
    stage = importlib.import_module(name)
    presets = getattr(stage, 'own_presets', {})
    found = config.parse(stage.keys, presets, argv, f'{name}.py')
    assert found.preset in ('medium', 'paper')


# --- at tiny width --------------------------------------------------------------------------------
@pytest.fixture
def tiny_world(tmp_path, monkeypatch):
    """A folder of photos, and the models beside which no trained projector lies."""
    photos = tmp_path / 'photos'
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(world.draw(world.random_scene(rng))).save(photos / f'{i}.png')
    (tmp_path / 'models').mkdir()
    os.symlink(f'{ROOT}/data/shapes/base/encoder', tmp_path / 'models' / 'encoder')
    return tmp_path


def tiny_argv(name, argv, root, out_dir):
    """The arguments of a page's command, at tiny width and in one folder."""
    of_photos = [word.replace(PHOTOS, f'{root}/photos') for word in argv]
    in_root = [re.sub(r'=out/', f'={root}/out/', word) for word in of_photos]
    kept = [word for word in in_root if not word.startswith('--preset=')]
    models = [f'--encoder={root}/models/encoder', '--lora_rank=2', '--dtype=bfloat16']
    return arguments(name, out_dir, *models, *kept, steps=1)


def test_every_command_reads_what_those_before_it_wrote(tiny_world):
    """Those that are the same at tiny width run once."""
    done = []
    for words in COMMANDS:
        _, name, argv = parted(words)
        argv = tiny_argv(name, argv, tiny_world, f'{tiny_world}/out/{name}')
        if argv in done:
            continue
        done.append(argv)
        where = f'{tiny_world}/out/{name}'
        if name.startswith('grpo') and os.path.exists(where):
            argv = [*argv, f'--out_dir={tiny_world}/out/other_{len(done)}']
        script(name, *argv)

    out = tiny_world / 'out'
    photos = [line['image'] for line in lines(out / 'captions' / 'captions.jsonl')]
    assert photos == [f'{tiny_world}/photos/{i}.png' for i in range(8)]
    for name in ('pretrain_decoder', 'cold_start', 'grpo_encoder', 'grpo_decoder'):
        assert (out / name / 'step_000001' / 'projector.safetensors').exists(), name
        assert lines(out / name / 'log.jsonl')[0]['grad_norm'] > 0
    assert (out / 'eval_unified' / 'report.json').exists()
    assert (out / 'plain' / 'config.json').exists()
    assert len(list(out.glob('other_*'))) == 2, 'the two other stages 2 of the page'
