"""Reconstruction alignment: what conditions the decoder, what the loss is, what moves, and that a resume is the same run."""
import copy
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import config
import reca
from conftest import P, at
from data.shapes import scenes as world
from running import distance, lines, refusal, same, tiny, weights

KEYS = {key: value for key, value in reca.keys.items() if key != 'steps'}


@pytest.fixture(scope='module')
def u(uae):
    return at(uae, **KEYS)


@pytest.fixture(scope='module')
def before(u):
    return [reca.before_image(u, t) for t in ('the image', 'describe the background , the image')]


# --- the states at the image's positions -------------------------------------------------------------------------------
def test_words_after_the_image_change_nothing_and_words_before_it_do(u, seen, before, monkeypatch):
    """Behind a short template's image stands what fills its row up to the longest one's: any words, and not a bit moves."""
    short, long = before
    row = [short, long, long, long]
    h = reca.image_states(u, seen, row)
    ids, word = [], u.tokenizer.convert_tokens_to_ids('random')
    embed = u.embed.register_forward_pre_hook(lambda m, a: ids.append(a[0].clone()))
    with monkeypatch.context() as m:
        m.setattr(type(u.tokenizer), 'pad_token_id', word, raising=False)
        again = reca.image_states(u, seen, row)
    embed.remove()
    assert (ids[0][0, len(short) + 16:] == word).sum() == len(long) - len(short) > 0
    assert torch.equal(h[0], again[0])
    other = reca.image_states(u, seen, [long] * P)
    assert torch.equal(h[1:], other[1:]) and (h[0] - other[0]).abs().mean() > 1e-2, 'another template before it'
    swapped = reca.image_states(u, tuple(t[[1, 0, 2, 3]] for t in seen), [long] * P)
    assert (swapped[0] - other[0]).abs().mean() > 1e-2 and torch.equal(swapped[2:], other[2:]), 'another image'


def test_states_are_those_of_the_image_wiring(u, seen, sampled, before):
    """With the caption prompt as template: the condition that model.condition calls `image`, alone or beside longer templates."""
    y, mask, _ = sampled
    mine = reca.before_image(u, u.c.caption_prompt)
    assert mine == u.before_image
    with torch.no_grad():
        want = at(u, condition='image').condition(y[::4], mask[::4], seen)
        for rows in ([mine] * P, [mine, before[1], mine, mine]):
            c_v = u.projector(u.pad(reca.image_states(u, seen, rows)))
            torch.testing.assert_close(c_v[[0, 2, 3]], want[[0, 2, 3]], atol=2e-5, rtol=1e-4)


def test_states_of_template_and_image(u, seen, before):
    short, long = before
    h, both = (reca.image_states(u, seen, [short, long] * 2, states) for states in ('image', 'image+template'))
    assert both.shape[1] == len(long) + 16 <= u.c.cond_len
    assert torch.equal(both[0, len(short):len(short) + 16], h[0]) and torch.equal(both[1, len(long):], h[1])
    assert not both[0, len(short) + 16:].any() and both[0, :len(short)].abs().min(1).values.max() > 0


def test_a_smaller_image_has_fewer_states(u, x, before):
    seen = reca.see_small(u, x, at(u, see_resolution=16).c)
    assert reca.image_states(u, seen, before * 2).shape[1] == 4
    assert torch.equal(reca.see_small(u, x, u.c)[0], u.see(x)[0])


def test_templates_are_words_that_the_tokenizer_knows_and_all_are_drawn(u, x, monkeypatch):
    templates = KEYS['templates'].split('|')
    ids = [reca.before_image(u, t) for t in templates]
    assert len(set(map(tuple, ids))) == len(ids) >= 5
    assert not any(u.tokenizer.unk_token_id in row for row in ids) and max(map(len, ids)) + 16 <= u.c.cond_len
    assert len(reca.before_image(u, '')) < min(map(len, ids)), 'no template: the image alone'
    got = []
    monkeypatch.setattr(reca, 'image_states', lambda uae, seen, before, states: got.append([ids.index(b) for b in before]))
    c = at(u, lambda_t2i=0.0).c
    for rows in (range(4), range(4), range(2, 4)):
        reca.prepare(u, c, x[:len(rows)], rows, 0, ids)
    assert got[0] == got[1] and got[0][2:] == got[2], 'a function of (seed, step, image)'
    for step in range(1, 12):
        reca.prepare(u, c, x, range(4), step, ids)
    assert {i for row in got for i in row} == set(range(len(ids)))
    for preset in ('medium', 'paper'):
        assert len(set(config.parse(reca.keys, reca.own_presets, [f'--preset={preset}'], 'reca.py').templates.split('|'))) >= 10


# --- the loss --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def args(u, x, seen, before):
    """z0, s, eps, drop, h, caption of P images, the second one's condition dropped."""
    y, mask, _ = u.sample_captions(seen, 1, 0.0)
    eps = torch.randn(P, *u.latent_shape(), generator=torch.Generator().manual_seed(0))
    return u.to_latent(x), torch.tensor([0.2, 0.4, 0.6, 0.8]), eps, torch.tensor([False, True, False, False]), \
        reca.image_states(u, seen, before * 2), (y, mask, seen)


def test_loss_is_flow_matching_twice(u, args):
    """Velocity stubs that tell image from text by the condition: each target, the weights, and the dropped row."""
    z0, s, eps, drop, h, caption = args
    with torch.no_grad():
        c_v, c_y, nothing = u.projector(u.pad(h)), u.condition(*caption), u.negative()
    calls = []

    def velocity(error):
        def v(z, at_s, cond):
            calls.append(cond)
            torch.testing.assert_close(z, (1 - s.view(-1, 1, 1, 1)) * z0 + s.view(-1, 1, 1, 1) * eps)
            assert torch.equal(at_s, s) and torch.equal(cond[1:2], nothing), 'the dropped one'
            image = torch.equal(cond[[0, 2, 3]], c_v[[0, 2, 3]])
            assert image or torch.equal(cond[[0, 2, 3]], c_y[[0, 2, 3]])
            return eps - z0 + error[0 if image else 1]
        return v
    student, start = copy.copy(u), copy.copy(u)
    student.velocity, start.velocity = velocity((2.0, 3.0)), velocity((None, 1.0))
    with torch.no_grad():
        for target, want in ((None, 9.0), (start, 4.0)):
            calls.clear()
            loss, f_v, f_y = reca.loss_of(student, target, *args, 1 / 8, at(u, lambda_t2i=0.5).c)
            assert len(calls) == 2 + (target is not None)
            assert f_v.item() == pytest.approx(4) and f_y.item() == pytest.approx(want, rel=1e-5)
            assert loss.item() == pytest.approx((4 + 0.5 * want) * P / 8, rel=1e-5)
        loss, f_v, f_y = reca.loss_of(student, None, *args[:-1], None, 1 / P, at(u, lambda_t2i=0.5).c)
        assert loss == f_v and f_y == 0, 'no caption, no text term'


def test_loss_falls_on_one_batch_and_the_text_stays(u, args):
    """From the image's states alone the loss falls; the velocity of captions drifts, and far less where it is held."""
    drift = []
    for weight in (0.0, 20.0):
        model = copy.deepcopy(u)
        params = model.train_only('projector', 'decoder')
        start = model.reference('decoder').reference('projector')
        c, opt = at(u, lambda_t2i=weight).c, torch.optim.Adam(params, lr=2e-3)
        terms = []
        for _ in range(10):
            loss, f_v, f_y = reca.loss_of(model, start, *args, 1 / P, c)
            opt.zero_grad()
            loss.backward()
            opt.step()
            terms.append((f_v.item(), f_y.item()))
        assert terms[0][1] == 0, 'at first the model is its own start'
        assert terms[-1][0] < (0.95 if weight else 0.8) * terms[0][0]
        assert same(start.decoder.state_dict(), u.decoder.state_dict()) and same(start.projector.state_dict(), u.projector.state_dict())
        drift.append(terms[-1][1])
    assert drift[1] < 0.5 * drift[0]


def test_dropout_rate_is_the_key_s(u, x, monkeypatch):
    monkeypatch.setattr(reca, 'image_states', lambda *a: None)
    model = copy.copy(u)
    model.see, model.to_latent = lambda x: None, lambda x: None
    for rate in (0.0, 0.1, 0.7):
        drop = reca.prepare(model, at(u, drop=rate, lambda_t2i=0.0).c, x, range(2000), 0, [[0]])[3]
        assert abs(drop.float().mean().item() - rate) < 4 * (rate * (1 - rate) / 2000) ** 0.5 + 1e-9


# --- the script ------------------------------------------------------------------------------------------------------
def run(out, *extra, steps=2, images=2):
    return tiny('reca', out, f'--batch={images}', *extra, steps=steps)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """Four steps with evaluations and a checkpoint every two."""
    out = tmp_path_factory.mktemp('reca') / 'whole'
    run(out, '--save_every=2', '--eval_every=3', steps=4)
    return out


def test_encoder_is_bit_identical_and_the_checkpoint_like_any_other(whole, tmp_path):
    base, now = weights('data/shapes/base'), weights(whole / 'step_000004')
    moved = {k.split(':')[0].split('/')[0] for k in now if not torch.equal(now[k], base[k])}
    assert moved == {'projector.safetensors', 'decoder'} and any(k.startswith('encoder/') for k in now)
    assert sorted(os.listdir(whole / 'step_000004')) == ['decoder', 'encoder', 'meta.json', 'projector.safetensors', 'state.pt']
    log = tiny('grpo_encoder', tmp_path / 'next', f'--init_from={whole}', '--eval_every=1', steps=1)
    assert log[0]['logp_diff'] < 1e-5
    a, b = lines(whole / 'eval.jsonl')[-1], lines(tmp_path / 'next' / 'eval.jsonl')[0]
    assert {k: v for k, v in a.items() if k != 'step'} == {k: v for k, v in b.items() if k != 'step'}, 'the next stage starts where this one ended'


def test_log(whole):
    log = lines(whole / 'log.jsonl')
    assert [line['step'] for line in log] == [0, 1, 2, 3] and log[0]['lr'] > log[-1]['lr'] > 0
    assert log[0]['flow_text'] < 1e-10 < log[-1]['flow_text'], 'held to the start, which is a frozen copy'
    for line in log:
        assert line['loss'] == pytest.approx(line['flow_image'] + KEYS['lambda_t2i'] * line['flow_text'], rel=1e-5)
        assert line['grad_norm'] > 0 and 1 < line['caption_len'] <= 24 and line['skipped'] == line['truncated'] == 0


def test_resume_is_bitwise(whole, tmp_path):
    shutil.copytree(whole, tmp_path / 'a', ignore=shutil.ignore_patterns('step_000004'))
    run(tmp_path / 'a', '--save_every=2', '--eval_every=3', '--resume', steps=4)
    assert same(weights(whole / 'step_000004'), weights(tmp_path / 'a' / 'step_000004'))
    assert same(*(torch.load(f / 'step_000004' / 'state.pt', weights_only=True) for f in (whole, tmp_path / 'a')))
    a, b = ([{k: v for k, v in line.items() if k not in ('sec', 'peak_gb')} for line in lines(f / 'log.jsonl')] for f in (whole, tmp_path / 'a'))
    assert a == b and lines(whole / 'eval.jsonl') == lines(tmp_path / 'a' / 'eval.jsonl')


def test_micro_batches_equal_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim, 'AdamW', lambda params, lr, **kw: torch.optim.SGD(params, lr=lr))
    for size in (0, 1):
        log = run(tmp_path / str(size), f'--micro_batch={size}', '--lr=0.03', '--grad_clip=1e9', '--t2i_target=image', '--drop=0.5', images=4)
    a, b, base = weights(tmp_path / '0' / 'step_000002'), weights(tmp_path / '1' / 'step_000002'), weights('data/shapes/base')
    assert distance(a, {k: base[k] for k in a}) > 1e-3 and distance(a, b) < 1e-3 * distance(a, {k: base[k] for k in a})
    for one, other in zip(lines(tmp_path / '0' / 'log.jsonl'), log):
        assert all(one[k] == pytest.approx(other[k], rel=1e-3) for k in ('loss', 'flow_image', 'flow_text', 'grad_norm', 'caption_len'))


def test_plain_images_need_no_captions_and_without_lambda_none_are_made(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    (tmp_path / 'images').mkdir()
    for i in range(8):
        Image.fromarray(world.draw(world.random_scene(rng))).save(tmp_path / 'images' / f'{i}.png')
    assert run(tmp_path / 'a', f'--data={tmp_path / "images"}', '--template=False', '--see_resolution=16', steps=1)[0]['caption_len'] > 0
    monkeypatch.setattr('model.UAE.sample_captions', lambda *a: pytest.fail('a caption was made'))
    (line,) = run(tmp_path / 'b', f'--data={tmp_path / "images"}', '--lambda_t2i=0', '--states=image+template', '--lora_rank=2', steps=1)
    assert line['caption_len'] == line['flow_text'] == 0 and line['loss'] == pytest.approx(line['flow_image'])


@pytest.mark.parametrize('flag, said', [
    ('--states=text', 'image+template'), ('--t2i_target=base', 'start'), ('--see_resolution=64', 'see_resolution'), ('--see_resolution=-1', 'see_resolution'),
    ('--templates= | ', 'templates'), ('--cond_len=15', 'cond_len')])
def test_values_that_mean_nothing(tmp_path, flag, said):
    assert said in refusal(lambda: tiny('reca', tmp_path / 'out', flag))
