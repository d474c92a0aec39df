"""Every script as a user runs it, two steps each, in this process; each stage starts from the one before."""
import builtins
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import common
from data.images import ImageSet
from data.shapes import scenes as world
from running import STAGES, distance, lines, script, tiny, weights, words

EVERY = {'step', 'reward', 'loss', 'grad_norm', 'lr', 'caption_len', 'sec', 'peak_gb'}
GRPO = EVERY | {'reward_std', 'zero_var', 'ratio_max', 'logp_diff', 'clip_frac'}
FIELDS = dict(cold_start=EVERY, grpo_encoder=GRPO, grpo_decoder=GRPO)
SCORES = {'step', 'reward', 'judge', 'mse', 't2i_own', 't2i_true'} | {
    f'{kind}caption_{what}' for kind in ('', 'greedy_') for what in ('len', 'truth', 'recall', 'exact')}


def check_log(name, log, steps=2):
    """The promised fields, and what must be true of a first step on policy."""
    assert [line['step'] for line in log] == list(range(steps))
    for line in log:
        assert FIELDS[name] <= line.keys()
        assert all(isinstance(v, (int, float)) for v in line.values())          # finite: see running.lines
        assert -1 <= line['reward'] <= 1 and 0 <= line['caption_len'] <= 24 and line['sec'] > 0 and line['peak_gb'] > 0
    if name != 'cold_start':
        assert log[0]['logp_diff'] < 1e-5 and abs(log[0]['ratio_max'] - 1) < 1e-4 and log[0]['clip_frac'] == 0
        assert log[0]['reward_std'] > 0 and log[0]['zero_var'] < 1
    else:
        assert all(abs(line['reward'] + line['loss'] - 1) < 1e-6 for line in log)
    assert all(line['grad_norm'] > 0 for line in log)
    assert log[0]['lr'] > log[-1]['lr'] > 0, 'a cosine'


@pytest.fixture(scope='module')
def chain(tmp_path_factory):
    """cold_start -> grpo_encoder -> grpo_decoder, two steps each with evaluations. -> {stage: its out_dir}."""
    root, before = tmp_path_factory.mktemp('chain'), []
    for name in STAGES:
        tiny(name, root / name, '--eval_every=1', *before)
        before = [f'--init_from={root / name}']
    return {name: str(root / name) for name in STAGES}


@pytest.mark.parametrize('name', STAGES)
def test_stage_writes_its_log(chain, name):
    check_log(name, lines(f'{chain[name]}/log.jsonl'))


@pytest.mark.parametrize('name', STAGES)
def test_stage_evaluates_before_between_and_at_the_end(chain, name):
    found = lines(f'{chain[name]}/eval.jsonl')
    assert [line['step'] for line in found] == [0, 1, 2]
    assert all(SCORES <= line.keys() for line in found)


def test_each_stage_starts_where_the_one_before_ended(chain):
    last = [lines(f'{chain[name]}/eval.jsonl')[-1] for name in STAGES]
    first = [lines(f'{chain[name]}/eval.jsonl')[0] for name in STAGES]
    for end, start in zip(last, first[1:]):
        assert {k: v for k, v in end.items() if k != 'step'} == {k: v for k, v in start.items() if k != 'step'}
    assert len({json.dumps(line, sort_keys=True) for line in first}) == 3, 'and changed something'


def test_checkpoints_are_whole_and_safe_to_load(chain):
    for name in STAGES:
        assert sorted(f for f in os.listdir(chain[name]) if f.startswith('step_')) == ['step_000002']
        folder = f'{chain[name]}/step_000002'
        state = torch.load(f'{folder}/state.pt', weights_only=True)
        assert state['step'] == 2 and state['optimizer']['state']
        with open(f'{folder}/meta.json') as f:
            meta = json.load(f)
        assert meta['step'] == 2 and meta['config']['preset'] == 'tiny' and meta['config']['out_dir'] == chain[name]
    stages = [weights(f'{chain[name]}/step_000002') for name in STAGES]
    moved = [{k.split(':')[0].split('/')[0] for k in b if not torch.equal(a[k], b[k])} for a, b in zip(stages, stages[1:])]
    assert moved == [{'encoder'}, {'decoder'}], 'stage 2 saves another encoder, stage 3 another decoder, nothing else moves'


def test_eval_unified_on_a_checkpoint(chain, tmp_path, capsys):
    script('eval_unified', *words('eval_unified', tmp_path, f'--init_from={chain["grpo_decoder"]}'))
    with open(tmp_path / 'report.json') as f:
        report = json.load(f)
    assert SCORES - {'step'} == report['summary'].keys() and len(report['captions']) == 4
    last = lines(f'{chain["grpo_decoder"]}/eval.jsonl')[-1]
    assert report['summary'] == {k: v for k, v in last.items() if k != 'step'}, 'the run itself measured the same'
    assert Image.open(tmp_path / 'reconstructions.png').size[0] > 100
    assert 'judge' in capsys.readouterr().out


def test_sample_draws_an_image_and_a_prompt(chain, tmp_path, capsys):
    if not os.path.exists('sample.py'):
        pytest.skip('no sample.py')
    image = os.path.abspath('data/shapes/images/held_out/00000.png')
    at = [f'--init_from={chain["grpo_decoder"]}', f'--out_dir={tmp_path}', '--device=cpu']
    script('sample', f'--image={image}', *at)
    (line,) = lines(tmp_path / 'captions.jsonl')
    assert line['image'] == image and line['caption'] in capsys.readouterr().out
    assert Image.open(tmp_path / '00000.png').size == (64, 32)
    script('sample', f'--image={image}', *at)
    assert len(lines(tmp_path / 'captions.jsonl')) == 1, 'what is captioned already is left alone'
    script('sample', '--prompt=large red circle top-left , gray background .', *at)
    assert Image.open(tmp_path / 'prompt.png').size == (32, 32)


def manifest(folder, n=8):
    """A manifest of n scenes with their captions."""
    rng = np.random.default_rng(0)
    os.makedirs(folder)
    with open(f'{folder}/manifest.jsonl', 'w') as f:
        for i in range(n):
            scene = world.random_scene(rng)
            Image.fromarray(world.draw(scene)).save(f'{folder}/{i}.png')
            f.write(json.dumps(dict(image=f'{i}.png', caption=world.caption(scene))) + '\n')
    return f'--data={folder}/manifest.jsonl'


@pytest.mark.parametrize('train_encoder', [True, False])
def test_pretraining_and_the_stage_after_it(tmp_path, train_encoder):
    base = weights('data/shapes/base')
    log = tiny('pretrain_decoder', tmp_path / 'p', manifest(tmp_path / 'm'), f'--train_encoder={train_encoder}', '--lr=1e-2')
    assert log[0]['step'] == 0 and log[-1]['step'] == 1
    assert all(EVERY - {'reward', 'caption_len'} <= line.keys() and line['grad_norm'] > 0 for line in log)
    assert (log[0]['caption_loss'] > 0) == train_encoder
    now = weights(tmp_path / 'p' / 'step_000002')
    moved = {part: any(not torch.equal(now[k], base[k]) for k in now if k.startswith(part) and k in base) for part in ('encoder', 'decoder', 'projector')}
    assert moved == dict(encoder=train_encoder, decoder=True, projector=True)
    check_log('cold_start', tiny('cold_start', tmp_path / 'c', f'--init_from={tmp_path / "p"}'))


@pytest.mark.parametrize('name, extra', [
    ('grpo_encoder', ['--kl=0.1']),
    ('grpo_encoder', ['--micro_batch=1', '--checkpointing=True']),
    ('grpo_encoder', ['--condition=answer', '--guidance=2.0']),
    ('grpo_encoder', ['--condition=text+image']),
    ('grpo_encoder', ['--warmup=2', '--clip_range=0.2,0.28']),
    ('grpo_decoder', ['--kl=0.1', '--micro_batch=1', '--checkpointing=True']),
    ('grpo_decoder', ['--sde=cps', '--noise_level=0.8', '--caption_temperature=1.0']),
    ('grpo_decoder', ['--same_noise=True', '--condition=answer']),
    ('grpo_decoder', ['--condition=image', '--sde_window=1', '--train_steps=1']),
    ('grpo_decoder', ['--condition=text+image', '--guidance=2.0']),
    ('cold_start', ['--condition=answer', '--cold_temperature=1.0']),
    ('cold_start', ['--condition=image', '--guidance=2.0', '--checkpointing=True']),
    ('cold_start', ['--condition=text+image', '--grad_steps=1', '--micro_batch=1', '--reward=judge'])])
def test_switches_of_a_stage(tmp_path, name, extra):
    """One step with each switch; the first step is on policy whatever the switches say."""
    (line,) = tiny(name, tmp_path, *extra, '--lr_decay=0.0', steps=1)
    check_log(name, [line, dict(line, step=1, lr=line['lr'] / 2)])
    if '--kl=0.1' in extra:
        assert abs(line['kl']) < 1e-9, 'at first the policy is its own reference'


@pytest.mark.parametrize('name', ['grpo_encoder', 'grpo_decoder'])
def test_a_second_update_on_the_same_rollout_is_off_policy(tmp_path, name):
    (line,) = tiny(name, tmp_path, '--updates=2', '--kl=0.1', steps=1)
    assert line['ratio_max'] != 1 and line['kl'] > 0 and line['logp_diff'] < 1e-5, 'logp_diff is the first update\'s, the other two the last one\'s'


@pytest.mark.parametrize('name', ['grpo_encoder', 'grpo_decoder'])
def test_shuffled_rewards_are_the_same_rewards(tmp_path, name):
    """The control permutes rewards: same captions and images, same mean, another gradient."""
    (a,), (b,) = (tiny(name, tmp_path / str(s), f'--shuffle_reward={s}', steps=1, images=4) for s in (False, True))
    assert abs(a['reward'] - b['reward']) < 1e-6 and a['caption_len'] == b['caption_len']
    assert a['grad_norm'] != b['grad_norm']


def test_lora_in_all_stages(tmp_path):
    """Adapters alone are trained and saved, and the next stage loads them."""
    before, saved = [], {}
    for name in STAGES:
        log = tiny(name, tmp_path / name, '--lora_rank=2', '--eval_every=1', *(['--kl=0.1'] if name != 'cold_start' else []), *before, steps=1)
        assert log[0]['grad_norm'] > 0
        before, saved[name] = [f'--init_from={tmp_path / name}'], weights(tmp_path / name / 'step_000001')
        assert all('lora' in k or k.startswith('projector') for k in saved[name])
        assert not any('visual' in k or 'lm_head' in k for k in saved[name])
    a, b = (lines(tmp_path / name / 'eval.jsonl') for name in STAGES[:2])
    assert a[-1]['reward'] == b[0]['reward'], 'stage 2 starts where stage 1 ended'
    for one, two, part in zip(STAGES, STAGES[1:], ('encoder', 'decoder')):
        moved = {k.split('/')[0] for k in saved[one] if not torch.equal(saved[one][k], saved[two][k])}
        assert moved == {part}


@pytest.mark.parametrize('name', STAGES)
def test_training_reads_images_only(tmp_path, monkeypatch, name):
    """A plain folder without captions is enough; and with the embedded world no stage touches a caption or a scene."""
    rng = np.random.default_rng(1)
    for i in range(8):
        Image.fromarray(world.draw(world.random_scene(rng))).save(tmp_path / f'{i}.png')
    plain = tiny(name, tmp_path / 'plain', f'--data={tmp_path}', '--eval_every=1', steps=1)
    assert 'caption_recall' not in lines(tmp_path / 'plain' / 'eval.jsonl')[0] and 'judge' in lines(tmp_path / 'plain' / 'eval.jsonl')[0]
    assert FIELDS[name] <= plain[0].keys()

    collate, opened, training = ImageSet.collate, [], []

    def without_captions(self, picks, index):
        return {k: v for k, v in collate(self, picks, index).items() if k != 'captions'}

    def spy(path, *args, **kw):
        opened.append(str(path))
        return really_open(path, *args, **kw)

    really_open, batch = builtins.open, ImageSet.batch
    monkeypatch.setattr(ImageSet, 'collate', without_captions)
    monkeypatch.setattr(ImageSet, 'batch', lambda *a, **kw: training.append(opened.clear()) or batch(*a, **kw))
    monkeypatch.setattr(builtins, 'open', spy)
    for part in ('caption', 'load', 'read', 'parse', 'caption_scores', 't2i'):
        monkeypatch.setattr(world, part, (lambda f: lambda *a, **kw: f(*a, **kw) if not training else pytest.fail('a stage read the truth'))(getattr(world, part)))
    check_log(name, tiny(name, tmp_path / 'shapes'))
    assert training and not any('scenes.jsonl' in path for path in opened)


# --- the small print of the log --------------------------------------------------------------------------------------
def test_learning_rate_schedule():
    from types import SimpleNamespace as C
    c = C(lr=2.0, warmup=4, lr_decay=1.0, steps=12)
    assert [common.lr_at(s, c) for s in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert common.lr_at(4, c) == 2.0 and abs(common.lr_at(8, c) - 1.0) < 1e-12 and common.lr_at(12, c) < 1e-12
    assert common.lr_at(9, C(lr=2.0, warmup=0, lr_decay=0.5, steps=12)) == 0
    assert common.lr_at(11, C(lr=2.0, warmup=0, lr_decay=0.0, steps=12)) == 2.0


def test_reward_fields():
    r = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    found = common.reward_fields(r)
    assert found['reward'] == 2 and abs(found['reward_std'] - 2 ** 0.5 / 2) < 1e-6 and found['zero_var'] == 0.5
    assert distance(dict(a=r), dict(a=r + 1)) == 2


def test_offload_parks_what_is_idle_and_changes_nothing(tmp_path, monkeypatch):
    """Moves are recorded: on the CPU alone they have no effect."""
    moves = []
    to = torch.nn.Module.to

    def recorded(self, *args, **kw):
        if type(self).__name__ in ('Qwen2_5_VLForConditionalGeneration', 'SD3Transformer2DModel', 'AutoencoderKL'):
            moves.append((type(self).__name__, str(args[0])))
        return to(self, *args, **kw)
    for name, idle in (('grpo_encoder', 'SD3Transformer2DModel'), ('grpo_decoder', 'Qwen2_5_VLForConditionalGeneration')):
        plain = tiny(name, tmp_path / name / 'plain', steps=1)
        monkeypatch.setattr(torch.nn.Module, 'to', recorded)
        moves.clear()
        parked = tiny(name, tmp_path / name / 'parked', '--offload=True', steps=1)
        monkeypatch.undo()
        assert [m for m in moves if m[1] == 'cpu'][-4:] == [(idle, 'cpu'), ('AutoencoderKL', 'cpu')] * 2, 'out before the update, back after it'
        assert [{k: v for k, v in line.items() if k not in ('sec', 'peak_gb')} for line in plain] == \
               [{k: v for k, v in line.items() if k not in ('sec', 'peak_gb')} for line in parked]
