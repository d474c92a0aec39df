"""Stage 0: which captions it learns from, the averaged weights, resume, and that ranks and micro-batches change nothing."""
import json
import os
import shutil
import socket
from types import SimpleNamespace as C

import numpy as np
import pytest
import torch
from PIL import Image

import common
import pretrain_decoder
from conftest import at
from data.images import ImageSet
from data.shapes import scenes as world
from running import ROOT, distance, lines, python, refusal, same, tiny, weights, words
from test_parallel import DRIVER

STRANGE = ['紅い丸、灰色の背景', 'دائرة حمراء', 'красный круг', '🔴🟦', '<|image_pad|> <|im_start|> <unk> \0', 'Small RED circle...']


def scenes(folder, captions, txt=False):
    """Images with these captions ('' stays, None is left out; True is the scene's own), in a manifest or as .txt files. -> the --data word."""
    rng, rows = np.random.default_rng(0), []
    os.makedirs(folder)
    for i, caption in enumerate(captions):
        scene = world.random_scene(rng)
        Image.fromarray(world.draw(scene)).save(f'{folder}/{i}.png')
        caption = world.caption(scene) if caption is True else caption
        rows.append(dict(image=f'{i}.png') if caption is None else dict(image=f'{i}.png', caption=caption))
        if txt and caption is not None:
            (folder / f'{i}.txt').write_text(caption)
    if not txt:
        (folder / 'm.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return f'--data={folder}' if txt else f'--data={folder}/m.jsonl'


# --- captions --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('txt', [False, True])
def test_images_without_captions_are_left_out_and_counted(tmp_path, capsys, monkeypatch, txt):
    """Missing ones go at once with one line for all; an empty .txt is known when it is read. Other scripts go through."""
    seen = []
    monkeypatch.setattr('model.UAE.tokens', (lambda f: lambda self, texts, T=None: seen.extend(texts) or f(self, texts, T))(pretrain_decoder.UAE.tokens))
    log = tiny('pretrain_decoder', tmp_path / 'out', scenes(tmp_path / 'd', [None, True, '', *STRANGE, None, ' \n'], txt), images=7)
    out = capsys.readouterr().out
    assert log[-1]['skipped'] == 4 and all(line['truncated'] == 0 for line in log), 'a strange caption is short'
    assert out.count('have no caption') == 1 and f'{2 if txt else 4} of the 11 images' in out
    assert out.count(': no caption') == (2 if txt else 0)
    assert set(STRANGE) <= set(seen) and '' not in seen and None not in seen
    assert all(line['grad_norm'] > 0 and line['loss'] > 0 for line in log) and log[0]['caption_loss'] > 0, 'finite: see running.lines'


def test_no_captions_at_all_is_one_line(tmp_path):
    for captions, txt in (([None] * 3, False), (['', ' '], False), ([None] * 3, True)):
        shutil.rmtree(tmp_path / 'd', ignore_errors=True)
        assert 'has a caption' in refusal(lambda: tiny('pretrain_decoder', tmp_path / 'out', scenes(tmp_path / 'd', captions, txt)))


def test_long_captions_are_cut_where_cond_len_ends_and_never_silently(uae, tmp_path, capsys):
    wide = at(uae, cond_len=40, sigma_mean=0.0, sigma_std=1.0, drop=0.0)     # has more room than caption_len
    room = 40 - len(uae.before_text) - len(uae.after_text)
    fits, long = ' '.join(['red'] * room), ' '.join(['red'] * (room + 1))
    batch = dict(index=torch.arange(2), x=torch.zeros(2, 3, 32, 32), captions=[fits, long])
    args, cut = pretrain_decoder.prepare(wide, wide.c, batch, slice(0, 2), 0, (0, 0), room)
    red = uae.tokenizer.convert_tokens_to_ids('red')
    assert cut == 1 and ((args[1] == red) & args[2].bool()).sum(1).tolist() == [room, room + 1]
    lengths = []
    hook = uae.embed.register_forward_pre_hook(lambda m, a: lengths.append((a[0] == red).sum(1).tolist()))
    with torch.no_grad():
        wide.condition(*args[1:3])
    hook.remove()
    assert lengths == [[room, room]], 'all that fits reaches the decoder'
    log = tiny('pretrain_decoder', tmp_path / 'out', scenes(tmp_path / 'd', [' '.join(['red'] * 300), ' '.join(['red'] * (room - 12))] * 2), '--micro_batch=1', images=4, steps=3)
    out = capsys.readouterr().out
    assert [line['truncated'] for line in log] == [2, 2, 2]
    assert out.count('were cut') == 2 and f'{room - 12} tokens' in out and 'warning: 2 captions' in out and 'warning: 6 captions' in out


def test_the_embedded_world_brings_its_training_captions(tmp_path, monkeypatch):
    batches, collate = [], ImageSet.collate
    monkeypatch.setattr(ImageSet, 'collate', lambda *a: batches.append(collate(*a)) or batches[-1])
    assert tiny('pretrain_decoder', tmp_path / 'out', '--eval_every=1', '--train_encoder=False', steps=1, images=8)
    assert [line['step'] for line in lines(tmp_path / 'out' / 'eval.jsonl')] == [0, 1]
    train, held = world.splits()
    used = [(name, x, caption) for b in batches for name, x, caption in zip(b['names'], b['x'], b['captions']) if caption is not None]
    assert len(used) == 8
    for name, x, caption in used:
        scene = train[int(name.removeprefix('train/').removesuffix('.png'))]
        assert caption == world.caption(scene) and torch.equal(x, torch.from_numpy(world.pixels([scene])[0])) and scene not in held


def test_held_out_images_are_kept_from_training_only_where_something_is_evaluated(tmp_path):
    data = scenes(tmp_path / 'd', [True] * 8).removeprefix('--data=')
    for every, left in ((0, 8), (5, 5)):
        c = C(data=data, held_out='', data_keys=('image', 'caption', ''), resolution=32, eval_images=3, eval_every=every)
        images, gone, held = pretrain_decoder.open_captioned(c, C(world=1), 'caption')
        assert len(images) == left and gone == 0
        assert held is None if not every else not set(held['names']) & set(images.names) and len(held['x']) == 3


# --- dropout, wirings ------------------------------------------------------------------------------------------------
def test_dropout_rate_is_the_key_s(uae):
    n = 2000
    model, batch = at(uae), dict(index=torch.arange(n), x=torch.zeros(n, 3, 32, 32), captions=['red circle'] * n)
    model.to_latent = lambda x: x
    negative = [t[0] for t in uae.tokens(['random image'], 26)[:2]]
    for rate in (0.0, 0.1, 0.7):
        y, mask = pretrain_decoder.prepare(model, at(uae, sigma_mean=0.0, sigma_std=1.0, drop=rate).c, batch, slice(0, n), 3, negative, 25)[0][1:3]
        dropped = (y == negative[0]).all(1) & (mask == negative[1]).all(1)
        assert abs(dropped.float().mean().item() - rate) < 4 * (rate * (1 - rate) / n) ** 0.5 + 1e-9


@pytest.mark.parametrize('wiring', ['answer', 'text+image'])
def test_dropped_conditions_hide_the_image_too(uae, x, wiring):
    model, batch = at(uae, condition=wiring), dict(index=torch.arange(4), x=x, captions=['red circle .'] * 4)
    negative = [t[0] for t in uae.tokens(['random image'], 26)[:2]]
    c = at(uae, condition=wiring, sigma_mean=0.0, sigma_std=1.0, drop=0.5).c
    flow, _ = pretrain_decoder.prepare(model, c, batch, slice(0, 4), 0, negative, 25)
    drop, got = flow[-1], []
    assert 0 < drop.sum() < 4
    model.velocity = lambda z, s, cond: got.append(cond) or z
    with torch.no_grad():
        pretrain_decoder.flow_loss(model, *flow)
        assert all(torch.equal(row, model.negative()[0]) == bool(d) for row, d in zip(got[0], drop))


# --- averaged weights --------------------------------------------------------------------------------------------------
def test_average_has_its_closed_form():
    """w_ema,n = d^(n-1) w_1 + (1 - d) sum_{i=2..n} d^(n-i) w_i; inside `averaged` the weights are these, outside the others."""
    p, d, seen = torch.nn.Parameter(torch.tensor([1.0, -2.0])), 0.9, []
    opt = torch.optim.AdamW([p], lr=0.3)
    for i in range(7):
        with pretrain_decoder.averaged(opt):
            (p * torch.tensor([1.0, i - 3.0])).sum().backward()
        opt.step()
        opt.zero_grad()
        pretrain_decoder.average(opt, d)
        seen.append(p.detach().clone())
    want = d ** 6 * seen[0] + (1 - d) * sum(d ** (6 - i) * w for i, w in enumerate(seen) if i)
    with pretrain_decoder.averaged(opt):
        torch.testing.assert_close(p.detach(), want)
        assert torch.equal(opt.state_dict()['state'][0]['other'], seen[-1])
    assert torch.equal(p.detach(), seen[-1])


@pytest.fixture(scope='module')
def averaged_run(tmp_path_factory):
    """Four steps with --ema -> (out_dir, the --data word, the trained weights after each update)."""
    root, seen, optimise = tmp_path_factory.mktemp('ema'), [], common.optimise
    data = scenes(root / 'd', [True] * 12)

    def spy(opt, params, *args):
        norm = optimise(opt, params, *args)
        seen.append([p.detach().clone() for p in params])
        return norm

    with pytest.MonkeyPatch.context() as m:
        m.setattr(common, 'optimise', spy)
        tiny('pretrain_decoder', root / 'whole', data, '--ema=0.6', '--save_every=2', '--eval_every=2', '--warmup=0', steps=4)
    return root / 'whole', data, seen


def test_a_checkpoint_has_the_averages_and_state_pt_the_others(averaged_run):
    out, _, seen = averaged_run
    want = [0.6 ** 3 * a + 0.4 * (0.6 ** 2 * b + 0.6 * c + d) for a, b, c, d in zip(*seen)]
    state = torch.load(out / 'step_000004' / 'state.pt', weights_only=True)['optimizer']['state']
    assert len(state) == len(want) and all(torch.equal(state[i]['other'], seen[-1][i]) for i in state)
    saved = {tuple(v.shape) + (round(v.double().sum().item(), 3),) for v in weights(out / 'step_000004').values()}
    assert all(tuple(w.shape) + (round(w.double().sum().item(), 3),) in saved for w in want)
    assert distance(dict(enumerate(want)), dict(enumerate(seen[-1]))) > 0.1


def test_resume_with_averages_is_bitwise(averaged_run, tmp_path):
    out, data, _ = averaged_run
    shutil.copytree(out, tmp_path / 'a', ignore=shutil.ignore_patterns('step_000004'))
    tiny('pretrain_decoder', tmp_path / 'a', data, '--ema=0.6', '--save_every=2', '--eval_every=2', '--warmup=0', '--resume', steps=4)
    assert same(weights(out / 'step_000004'), weights(tmp_path / 'a' / 'step_000004'))
    assert same(*(torch.load(f / 'step_000004' / 'state.pt', weights_only=True) for f in (out, tmp_path / 'a')))
    a, b = ([{k: v for k, v in line.items() if k not in ('sec', 'peak_gb')} for line in lines(f / 'log.jsonl')] for f in (out, tmp_path / 'a'))
    assert a == b and [line['step'] for line in a] == [0, 1, 2, 3] and lines(out / 'eval.jsonl') == lines(tmp_path / 'a' / 'eval.jsonl')


@pytest.mark.parametrize('step', [2, 4])
def test_what_is_evaluated_is_what_is_saved(averaged_run, tmp_path, step):
    """Inside the run and at its end: the evaluation is the one that a next stage begins with. The vision tower has not moved."""
    out, data, _ = averaged_run
    tiny('cold_start', tmp_path / 'next', data, f'--init_from={out}/step_{step:06d}', '--eval_every=1', steps=1)
    a = {line['step']: line for line in lines(out / 'eval.jsonl')}
    assert dict(a[step], step=0) == lines(tmp_path / 'next' / 'eval.jsonl')[0] != dict(a[0], step=0)
    base, now = weights('data/shapes/base'), weights(out / f'step_{step:06d}')
    frozen = [k for k in now if 'visual' in k]
    assert frozen and all(torch.equal(now[k], base[k]) for k in frozen)


# --- micro-batches and ranks ---------------------------------------------------------------------------------------------
def plain(name, data, *extra):
    """A command line for plain gradient descent: the captions differ in length, so tokens must be counted over all parts."""
    own = dict(pretrain_decoder=['--lr=0.03', '--warmup=0', '--caption_every=1', '--drop=0.3', data], reca=['--lr=0.03', '--drop=0.3', '--t2i_target=image'])[name]
    return ['--batch=4', '--grad_clip=1e9', '--eval_every=2', *own, *extra]


def agree(one, other, keys):
    base, a, b = weights('data/shapes/base'), weights(one / 'step_000002'), weights(other / 'step_000002')
    moved = distance(a, {k: base[k] for k in a})
    assert moved > 1e-3 and distance(a, b) < 1e-3 * moved
    for x, y in zip(lines(one / 'log.jsonl'), lines(other / 'log.jsonl'), strict=True):
        assert x.keys() == y.keys() and all(x[k] == pytest.approx(y[k], rel=1e-3) for k in keys)


KEYS = dict(pretrain_decoder=('loss', 'caption_loss', 'grad_norm', 'truncated', 'skipped'), reca=('loss', 'flow_image', 'flow_text', 'grad_norm', 'caption_len'))


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    """One rank, whole batches: the folder of both runs and the --data word."""
    root = tmp_path_factory.mktemp('one')
    data = scenes(root / 'd', ['red circle .', True, True, 'blue .', True, ' '.join(['red'] * 30), None, 'gray background .'] * 2)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.optim, 'AdamW', lambda params, lr, **kw: torch.optim.SGD(params, lr=lr))
        for name in KEYS:
            tiny(name, root / name, *plain(name, data))
    return root, data


def test_micro_batches_equal_the_whole(one, tmp_path, monkeypatch):
    root, data = one
    monkeypatch.setattr(torch.optim, 'AdamW', lambda params, lr, **kw: torch.optim.SGD(params, lr=lr))
    tiny('pretrain_decoder', tmp_path / 'out', *plain('pretrain_decoder', data, '--micro_batch=1'))
    agree(root / 'pretrain_decoder', tmp_path / 'out', KEYS['pretrain_decoder'])


def test_two_ranks_equal_one(one, tmp_path):
    """Both scripts in one torchrun of two ranks, in micro-batches of one."""
    root, data = one
    (tmp_path / 'driver.py').write_text(DRIVER)
    jobs = [(name, words(name, tmp_path / name, *plain(name, data, '--micro_batch=1')), '') for name in KEYS]
    (tmp_path / 'jobs.json').write_text(json.dumps(jobs))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    done = python('-m', 'torch.distributed.run', '--nproc_per_node=2', f'--master_port={port}', tmp_path / 'driver.py', tmp_path / 'jobs.json')
    assert done.returncode == 0, done.stdout[-3000:]
    for name, keys in KEYS.items():
        agree(root / name, tmp_path / name, keys)
