"""Every script as a user runs it, two steps each, in this process; each stage starts from the one
before."""
import builtins
import importlib.metadata
import json
import os
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import reward
from lib import log, optimiser, ranks
from comparing import BASE, optimizer_state, timeless, without_step
from conftest import shared_config
from data.images import ImageSet
from data.shapes import scenes as world
from running import STAGES, arguments, distance, lines, python, script, tiny, weights

EVERY = {'step', 'reward', 'loss', 'grad_norm', 'lr', 'caption_len', 'skipped', 'sec', 'peak_gb'}
GRPO = EVERY | {'reward_std', 'zero_var', 'ratio_max', 'logp_diff', 'clip_frac'}
FIELDS = dict(cold_start=EVERY, grpo_encoder=GRPO, grpo_decoder=GRPO)
IMAGE_SCORES = {'step', 'reward', 'judge', 'mse', 't2i_own', 't2i_true'}
CAPTION_SCORES = {f'caption_{what}' for what in ('len', 'truth', 'recall', 'exact')}
SCORES = IMAGE_SCORES | CAPTION_SCORES | {f'greedy_{name}' for name in CAPTION_SCORES}


def check_log(name, log, steps=2):
    """The promised fields, and what must be true of a first step on policy."""
    assert [line['step'] for line in log] == list(range(steps))
    for line in log:
        assert FIELDS[name] <= line.keys()
        # finite: see running.lines
        assert all(isinstance(value, (int, float)) for value in line.values())
        assert -1 <= line['reward'] <= 1
        assert 0 <= line['caption_len'] <= 24
        assert line['sec'] > 0
        assert line['peak_gb'] > 0
        assert line['grad_norm'] > 0
        if name == 'cold_start':
            assert abs(line['reward'] + line['loss'] - 1) < 1e-6
    first = log[0]
    if name != 'cold_start':
        assert first['logp_diff'] < 1e-5
        assert abs(first['ratio_max'] - 1) < 1e-4
        assert first['clip_frac'] == 0
        assert first['reward_std'] > 0
        assert first['zero_var'] < 1
    assert first['lr'] > log[-1]['lr'] > 0, 'a cosine'


def changed_parts(before, after):
    """The first folder or file below a checkpoint of every tensor that differs or is new."""
    changed = set()
    for key, value in after.items():
        if key not in before or not torch.equal(before[key], value):
            changed.add(key.split(':')[0].split('/')[0])
    return changed


# --- the stages, one after the other --------------------------------------------------------------
@pytest.fixture(scope='module', params=[[], ['--lora_rank=2']], ids=['full', 'lora'])
def chain(request, tmp_path_factory):
    """{stage: its out_dir} of cold_start -> grpo_encoder -> grpo_decoder, and how they were run."""
    root = tmp_path_factory.mktemp('chain')
    before = []
    for name in STAGES:
        kl = [] if name == 'cold_start' else ['--kl=0.1']
        tiny(name, root / name, '--eval_every=1', *request.param, *kl, *before)
        before = [f'--init_from={root / name}']
    return {name: root / name for name in STAGES}, request.param


def test_a_stage_leaves_its_log_evaluations_and_one_checkpoint(chain):
    """Whole, and safe to load; each stage starts where the one before ended."""
    ends = {}
    for name, out in chain[0].items():
        check_log(name, lines(out / 'log.jsonl'))
        found = lines(out / 'eval.jsonl')
        assert [line['step'] for line in found] == [0, 1, 2]
        assert all(SCORES <= line.keys() for line in found)
        ends[name] = [without_step(line) for line in found]

        saved = [name for name in os.listdir(out) if name.startswith('step_')]
        assert saved == ['step_000002']
        meta = json.loads((out / 'step_000002' / 'meta.json').read_text())
        assert meta['step'] == 2
        assert (meta['config']['preset'], meta['config']['out_dir']) == ('tiny', str(out))
        state = optimizer_state(out / 'step_000002')
        assert state['step'] == 2
        assert state['optimizer']['state']
    assert ends['cold_start'][-1] == ends['grpo_encoder'][0]
    assert ends['grpo_encoder'][-1] == ends['grpo_decoder'][0]


def test_a_stage_moves_its_own_part(chain):
    """Stage 2 saves another encoder and keeps its old one, stage 3 saves another decoder."""
    cold_start, encoder, decoder = [weights(out / 'step_000002') for out in chain[0].values()]
    assert changed_parts(cold_start, encoder) == {'encoder', 'text_encoder'}
    assert changed_parts(encoder, decoder) == {'decoder'}
    if chain[1]:
        assert all('lora' in key or key.startswith('projector') for key in decoder)
        assert not any('visual' in key or 'lm_head' in key for key in decoder)


def test_eval_unified_on_a_checkpoint(chain, tmp_path, capsys):
    out_dirs, way = chain
    init_from = f'--init_from={out_dirs["grpo_decoder"]}'
    script('eval_unified', *arguments('eval_unified', tmp_path, init_from, *way))
    with open(tmp_path / 'report.json') as f:
        report = json.load(f)
    assert SCORES - {'step'} == report['summary'].keys()
    assert len(report['captions']) == 4
    last = lines(out_dirs['grpo_decoder'] / 'eval.jsonl')[-1]
    assert report['summary'] == without_step(last), 'the run itself measured the same'
    assert Image.open(tmp_path / 'samples' / 'step_000000.png').size[0] > 100
    assert 'judge' in capsys.readouterr().out


def test_sample_draws_an_image_and_a_prompt(chain, tmp_path, capsys):
    image = os.path.abspath('data/shapes/images/held_out/00000.png')
    out_dirs, way = chain
    init_from = f'--init_from={out_dirs["grpo_decoder"]}'
    shared = [init_from, *way, f'--out_dir={tmp_path}', '--device=cpu']
    script('sample', f'--image={image}', *shared)
    (line,) = lines(tmp_path / 'captions.jsonl')
    assert line['image'] == image
    assert line['caption'] in capsys.readouterr().out
    assert Image.open(tmp_path / '00000.png').size == (64, 32)

    script('sample', f'--image={image}', *shared)
    known = lines(tmp_path / 'captions.jsonl')
    assert len(known) == 1, 'what is captioned already is left alone'

    script('sample', '--prompt=large red circle top-left , gray background .', *shared)
    assert Image.open(tmp_path / 'prompt.png').size == (32, 32)


# --- stage 0 --------------------------------------------------------------------------------------
def manifest(folder, count=8):
    """The --data of a manifest of scenes with their captions."""
    rng = np.random.default_rng(0)
    os.makedirs(folder)
    with open(f'{folder}/manifest.jsonl', 'w') as f:
        for i in range(count):
            scene = world.random_scene(rng)
            Image.fromarray(world.draw(scene)).save(f'{folder}/{i}.png')
            row = dict(image=f'{i}.png', caption=world.caption(scene))
            f.write(json.dumps(row) + '\n')
    return f'--data={folder}/manifest.jsonl'


@pytest.mark.parametrize('train_encoder', [True, False])
def test_pretraining_and_the_stage_after_it(tmp_path, train_encoder):
    out = tmp_path / 'p'
    switch = f'--train_encoder={train_encoder}'
    log = tiny('pretrain_decoder', out, manifest(tmp_path / 'm'), switch, '--lr=1e-2')
    assert log[0]['step'] == 0
    assert log[-1]['step'] == 1
    for line in log:
        assert EVERY - {'reward', 'caption_len'} <= line.keys()
        assert line['grad_norm'] > 0
    assert (log[0]['caption_loss'] > 0) == train_encoder

    base = weights(BASE)
    now = weights(out / 'step_000002')
    changed = [key for key in now if key in base and not torch.equal(now[key], base[key])]
    for part, expected in (('encoder', train_encoder), ('decoder', True), ('projector', True)):
        assert any(key.startswith(part) for key in changed) == expected, part
    check_log('cold_start', tiny('cold_start', tmp_path / 'c', f'--init_from={out}'))


# --- switches -------------------------------------------------------------------------------------
@pytest.mark.parametrize('name, extra', [
    ('grpo_encoder', ['--kl=0.1']),
    ('grpo_encoder', ['--condition=answer', '--guidance=2.0', '--checkpointing=True']),
    ('grpo_encoder', ['--condition=text+image', '--warmup=2', '--ratio=sequence']),
    ('grpo_decoder', ['--kl=0.1', '--micro_batch=1', '--checkpointing=True']),
    ('grpo_decoder', ['--sde=cps', '--noise_level=0.8', '--condition=text+image']),
    ('grpo_decoder', ['--same_noise=True', '--condition=answer', '--guidance=2.0']),
    ('grpo_decoder', ['--condition=image', '--noisy_steps=1', '--trained_steps=1']),
    ('cold_start', ['--condition=image', '--guidance=2.0', '--checkpointing=True']),
    ('cold_start', ['--condition=text+image', '--grad_steps=1', '--micro_batch=1']),
])
def test_switches_of_a_stage(tmp_path, name, extra):
    """One step with each switch; the first step is on policy whatever the switches say."""
    (line,) = tiny(name, tmp_path, *extra, '--lr_decay=0.0', steps=1)
    check_log(name, [line, dict(line, step=1, lr=line['lr'] / 2)])
    if '--kl=0.1' in extra:
        assert abs(line['kl']) < 1e-9, 'at first the policy is its own reference'


@pytest.mark.parametrize('name, parts', [
    ('cold_start', 'judge'),
    ('cold_start', 'clip:0.5,judge:0.5'),
    ('reca', 'judge'),
    ('reca', 'clip'),
])
def test_a_tower_is_loaded_once(tmp_path, monkeypatch, name, parts):
    """Also where the reward of training is the evaluation's, and holds the judge."""
    loaded = []
    really = reward.load_transformers

    def counted(source):
        loaded.append(source)
        return really(source)

    monkeypatch.setattr(reward, 'load_transformers', counted)
    tiny(name, tmp_path, f'--reward={parts}', '--eval_every=1', steps=1)
    assert loaded == ['data/shapes/base/judge']
    found = lines(tmp_path / 'eval.jsonl')[0]
    assert (found['judge'] == found['reward']) == (parts == 'judge')


@pytest.mark.parametrize('name', STAGES)
def test_training_reads_images_only(tmp_path, monkeypatch, name):
    """With the embedded world no stage touches a caption or a scene, once training has begun."""
    opened = []
    training = []
    really_open = builtins.open
    batch = ImageSet.batch
    collate = ImageSet.collate

    def without_captions(self, picks, index):
        found = collate(self, picks, index)
        return {key: value for key, value in found.items() if key != 'captions'}

    def noted_batch(*args, **other):
        training.append(True)
        opened.clear()
        return batch(*args, **other)

    def noted_open(path, *args, **other):
        opened.append(str(path))
        return really_open(path, *args, **other)

    def before_training_only(function):
        def guarded(*args, **other):
            if training:
                pytest.fail('a stage read the truth')
            return function(*args, **other)

        return guarded

    monkeypatch.setattr(ImageSet, 'collate', without_captions)
    monkeypatch.setattr(ImageSet, 'batch', noted_batch)
    monkeypatch.setattr(builtins, 'open', noted_open)
    for part in ('caption', 'load', 'read', 'parse', 'caption_scores', 't2i'):
        monkeypatch.setattr(world, part, before_training_only(getattr(world, part)))
    check_log(name, tiny(name, tmp_path / 'shapes'))
    assert training
    assert not any('scenes.jsonl' in path for path in opened)


# --- the small print of the log -------------------------------------------------------------------
def test_learning_rate_schedule():
    c = SimpleNamespace(lr=2.0, warmup=4, lr_decay=1.0, steps=12)
    assert [optimiser.lr_at(step, c) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert optimiser.lr_at(4, c) == 2.0
    assert abs(optimiser.lr_at(8, c) - 1.0) < 1e-12
    assert optimiser.lr_at(12, c) < 1e-12
    half = SimpleNamespace(lr=2.0, warmup=0, lr_decay=0.5, steps=12)
    assert optimiser.lr_at(9, half) == 0
    constant = SimpleNamespace(lr=2.0, warmup=0, lr_decay=0.0, steps=12)
    assert optimiser.lr_at(11, constant) == 2.0


def test_reward_fields():
    r = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    found = log.reward_fields(r)
    assert found['reward'] == 2
    assert abs(found['reward_std'] - 2 ** 0.5 / 2) < 1e-6
    assert found['zero_var'] == 0.5
    assert distance(dict(a=r), dict(a=r + 1)) == 2


@pytest.mark.parametrize('name, turns', [
    ('grpo_encoder', 'encoder decoder towers encoder'),
    ('grpo_decoder', 'encoder decoder towers decoder'),
    ('nft_decoder', 'encoder decoder towers decoder'),
])
def test_offload_takes_turns_and_changes_nothing(tmp_path, monkeypatch, name, turns):
    """One part comes when its weights are used, after the one that was there has left.

    Moves are recorded: on the CPU alone they have no effect.
    """
    part_of = dict(Qwen2_5_VLForConditionalGeneration='encoder', Qwen2_5_VLTextModel='encoder',
                   SD3Transformer2DModel='decoder', AutoencoderKL='decoder', ModuleList='towers')
    moves = []
    to = torch.nn.Module.to

    def recorded(self, device, **other):
        move = part_of.get(type(self).__name__), 'out' if device == 'cpu' else 'in'
        if move[0] and moves[-1:] != [move]:
            moves.append(move)
        return to(self, device, **other)

    def take_turns(device, *parts, original=ranks.take_turns):
        monkeypatch.setattr(torch.nn.Module, 'to', recorded)
        original('cpu:0', *parts)

    plain = tiny(name, tmp_path / 'plain', steps=1)
    monkeypatch.setattr(ranks, 'take_turns', take_turns)
    offloaded = tiny(name, tmp_path / 'offloaded', '--offload=True', steps=1)
    expected = [(part, 'out') for part in ('encoder', 'decoder', 'towers')]
    before = None
    for part in turns.split():
        if before:
            expected.append((before, 'out'))
        expected.append((part, 'in'))
        before = part
    assert moves == expected
    assert timeless(plain) == timeless(offloaded)


# --- versions -------------------------------------------------------------------------------------
@pytest.mark.parametrize('kind', [FutureWarning, DeprecationWarning])
def test_a_warning_of_what_will_change_is_an_error(kind):
    """Here, and in the processes that tests start."""
    with pytest.raises(kind):
        warnings.warn('soon', kind)
    done = python('-c', f'import warnings; warnings.warn("soon", {kind.__name__})')
    assert done.returncode == 1, done.stdout


def test_versions_out_of_the_ranges_are_found():
    here = importlib.metadata.version('torch')
    newest = here.partition('+')[0]
    seen = ['# ranges', f'torch>=2,<={newest}   # why', 'numpy', 'nosuch>=1,<=2']
    assert ranks.unseen(seen) == []
    assert ranks.unseen([*seen, 'torch>=90,<=91', 'torch>=1,<=2']) == [f'torch {here}'] * 2


def test_a_run_names_unseen_versions_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(ranks, 'unseen', lambda requirements: ['torch 90.0', 'peft 9.0'])
    ranks.say_unseen.cache_clear()
    for _ in range(2):
        ranks.start(shared_config())
    said = capsys.readouterr().err
    assert said.count('\n') == 1
    assert 'torch 90.0, peft 9.0' in said


def test_every_range_says_the_oldest_and_the_newest():
    with open('requirements.txt') as f:
        lines = [line for line in f if '>=' in line]
    names = [re.match(r'(\w+)>=[\d.]+,<=[\d.]+$', line)[1] for line in lines]
    assert names == ['torch', 'transformers', 'diffusers', 'open_clip_torch', 'peft']
