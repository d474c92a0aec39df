"""Reconstruction alignment: what conditions the decoder, what the loss is, what moves."""
import copy
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import config
import reca
from comparing import BASE, without_step
from conftest import P, at
from data.shapes import scenes as world
from running import lines, refusal, same, tiny, weights

KEYS = {key: value for key, value in reca.keys.items() if key != 'steps'}
N = 16                                           # tokens of an image of the tiny world


@pytest.fixture(scope='module')
def model(uae):
    """The session's model under this stage's keys."""
    return at(uae, **KEYS)


@pytest.fixture(scope='module')
def before(model):
    """Tokens in front of the image of a short and of a long template."""
    short = model.encoder.around_image('the image', answer=False)[0]
    long = model.encoder.around_image('describe the background , the image', answer=False)[0]
    return short, long


def image_condition(model, states):
    """c of the image's states, as the stage makes it."""
    return model.projector(model.pad(states))


# --- the states at the image's positions ----------------------------------------------------------
def test_words_after_the_image_change_nothing_and_words_before_it_do(
        model, vision, before, monkeypatch):
    """Behind a short template's image stands what fills its row up to the longest one's: any
    words, and not a bit moves."""
    short, long = before
    templates = [short, long, long, long]
    states = reca.image_states(model.encoder, vision, templates)

    word = model.encoder.tokenizer.convert_tokens_to_ids('random')
    ids = []
    def keep(_, inputs):
        ids.append(inputs[0].clone())

    hook = model.encoder.embed.register_forward_pre_hook(keep)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.encoder.tokenizer), 'pad_token_id', word, raising=False)
        again = reca.image_states(model.encoder, vision, templates)
    hook.remove()
    filled = (ids[0][0, len(short) + N:] == word).sum()
    assert filled == len(long) - len(short) > 0
    assert torch.equal(states[0], again[0])

    other = reca.image_states(model.encoder, vision, [long] * P)
    assert torch.equal(states[1:], other[1:])
    assert (states[0] - other[0]).abs().mean() > 1e-2, 'another template before it'

    two_swapped = {name: t[[1, 0, 2, 3]] for name, t in vision.items()}
    swapped = reca.image_states(model.encoder, two_swapped, [long] * P)
    assert (swapped[0] - other[0]).abs().mean() > 1e-2, 'another image'
    assert torch.equal(swapped[2:], other[2:])


def test_states_are_those_of_the_image_wiring(model, vision, sampled, before):
    """With the caption prompt as template: the condition that model.condition calls `image`, alone
    or beside longer templates."""
    y, mask, _ = sampled
    _, long = before
    own = model.encoder.around_image(model.config.caption_prompt, answer=False)[0]
    assert own == model.encoder.before_image
    with torch.no_grad():
        want = at(model, condition='image').condition(y[::4], mask[::4], vision)
        for templates in ([own] * P, [own, long, own, own]):
            c_v = image_condition(model, reca.image_states(model.encoder, vision, templates))
            rows = [0, 2, 3]
            torch.testing.assert_close(c_v[rows], want[rows], atol=2e-5, rtol=1e-4)


def test_states_of_template_and_image(model, vision, before):
    short, long = before
    templates = [short, long] * 2
    image = reca.image_states(model.encoder, vision, templates, 'image')
    both = reca.image_states(model.encoder, vision, templates, 'image+template')
    end = len(short) + N
    assert both.shape[1] == len(long) + N <= model.config.cond_len
    assert torch.equal(both[0, len(short):end], image[0])
    assert torch.equal(both[1, len(long):], image[1])
    assert not both[0, end:].any()
    assert both[0, :len(short)].abs().min(1).values.max() > 0


def test_a_smaller_image_has_fewer_states(model, x, before):
    small = reca.see_small(model.encoder, x, at(model, see_resolution=16).config)
    assert reca.image_states(model.encoder, small, before * 2).shape[1] == 4
    whole = reca.see_small(model.encoder, x, model.config)
    assert same(whole, model.encoder.see(x))


def test_templates_are_words_that_the_tokenizer_knows_and_all_are_drawn(model, x, monkeypatch):
    ids = reca.read_templates(model.encoder, model.config)
    assert len(set(map(tuple, ids))) == len(ids) >= 5
    assert not any(model.encoder.tokenizer.unk_token_id in row for row in ids)
    assert max(map(len, ids)) + N <= model.config.cond_len
    (alone,) = reca.read_templates(model.encoder, at(model, template=False).config)
    assert len(alone) < min(map(len, ids)), 'no template: the image alone'

    drawn = []

    def spy(encoder, vision, before, states):
        drawn.append([ids.index(row) for row in before])

    monkeypatch.setattr(reca, 'image_states', spy)
    c = at(model, lambda_t2i=0.0).config
    for rows in (range(4), range(4), range(2, 4)):
        images = dict(x=x[:len(rows)], index=torch.tensor(rows))
        reca.noised(model, images, 0, ids, c)
    assert drawn[0] == drawn[1], 'a function of (seed, step, image)'
    assert drawn[0][2:] == drawn[2]
    for step in range(1, 12):
        reca.noised(model, dict(x=x, index=torch.arange(4)), step, ids, c)
    assert {i for row in drawn for i in row} == set(range(len(ids)))


@pytest.mark.parametrize('preset', ['medium', 'paper'])
def test_presets_have_ten_templates(preset):
    c = config.parse(reca.keys, reca.own_presets, [f'--preset={preset}'], 'reca.py')
    assert len(set(c.templates.split('|'))) >= 10


# --- the loss -------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def batch(model, x, vision, before):
    """z0, s, eps, drop, h, caption of P images, the second one's condition dropped."""
    y, mask, _ = model.encoder.sample(vision, 1, 0.0)
    noise = torch.Generator().manual_seed(0)
    tensors = dict(
        z0=model.decoder.to_latent(x),
        s=torch.tensor([0.2, 0.4, 0.6, 0.8]),
        eps=torch.randn(P, *model.decoder.latent_shape(), generator=noise),
        drop=torch.tensor([False, True, False, False]),
        states=reca.image_states(model.encoder, vision, before * 2),
    )
    caption = dict(y=y, mask=mask, vision=vision)
    return SimpleNamespace(**tensors, tensors=tensors, caption=caption)


def loss_of(model, start, batch, caption, c):
    """The stage's loss of a batch: loss, flow_image, flow_text."""
    return reca.both_losses(model, **batch.tensors, caption=caption, start=start, config=c)


def test_loss_is_flow_matching_twice(model, batch):
    """Velocity stubs that tell image from text by the condition: each target, the weights, and the
    dropped row."""
    z0, s, eps = batch.z0, batch.s, batch.eps
    kept = [0, 2, 3]
    with torch.no_grad():
        c_v = image_condition(model, batch.states)
        c_y = model.condition(**batch.caption)
        nothing = model.negative()
    calls = []

    def off_by(image_error, text_error):
        """A velocity that misses its target by a constant."""
        def velocity(z, at_s, c):
            calls.append(c)
            s_ = s.view(-1, 1, 1, 1)
            torch.testing.assert_close(z, (1 - s_) * z0 + s_ * eps)
            assert torch.equal(at_s, s)
            assert torch.equal(c[1:2], nothing), 'the dropped one'
            if torch.equal(c[kept], c_v[kept]):
                return eps - z0 + image_error
            assert torch.equal(c[kept], c_y[kept])
            return eps - z0 + text_error

        return velocity

    student = at(model)
    start = at(model)
    student.decoder.velocity = off_by(2.0, 3.0)
    start.decoder.velocity = off_by(None, 1.0)
    c = at(model, lambda_t2i=0.5).config
    with torch.no_grad():
        for target, want, passes in ((None, 9.0, 2), (start, 4.0, 3)):
            calls.clear()
            loss, f_v, f_y = loss_of(student, target, batch, batch.caption, c)
            assert len(calls) == passes
            assert f_v.item() == pytest.approx(4)
            assert f_y.item() == pytest.approx(want, rel=1e-5)
            assert loss.item() == pytest.approx(4 + 0.5 * want, rel=1e-5)
        loss, f_v, f_y = loss_of(student, None, batch, None, c)
    assert loss == f_v
    assert f_y == 0, 'no caption, no text term'


def train(model, batch, weight):
    """Ten updates on one batch, the text's loss weighed so: the flow terms (image, text)."""
    student = copy.deepcopy(model)
    params = student.train_only('projector', 'decoder')
    start = student.reference('decoder', 'projector')
    c = at(model, lambda_t2i=weight).config
    optimizer = torch.optim.Adam(params, lr=2e-3)
    terms = []
    for _ in range(10):
        loss, f_v, f_y = loss_of(student, start, batch, batch.caption, c)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        terms.append((f_v.item(), f_y.item()))
    assert same(start.decoder.state_dict(), model.decoder.state_dict())
    assert same(start.projector.state_dict(), model.projector.state_dict())
    return terms


def test_loss_falls_on_one_batch_and_the_text_stays(model, batch):
    """From the image's states alone the loss falls; the velocity of captions drifts, and far less
    where it is held."""
    free = train(model, batch, 0.0)
    held = train(model, batch, 20.0)
    assert free[0][1] == held[0][1] == 0, 'at first the model is its own start'
    assert free[-1][0] < 0.8 * free[0][0]
    assert held[-1][0] < 0.95 * held[0][0]
    assert held[-1][1] < 0.5 * free[-1][1]


@pytest.mark.parametrize('rate', [0.0, 0.1, 0.7])
def test_dropout_rate_is_the_key_s(model, x, monkeypatch, rate):
    n = 2000
    monkeypatch.setattr(reca, 'image_states', lambda *args: None)
    blind = at(model)
    blind.encoder.see = lambda x: None
    blind.decoder.to_latent = lambda x: None
    c = at(model, drop=rate, lambda_t2i=0.0).config
    drop = reca.noised(blind, dict(x=x, index=torch.arange(n)), 0, [[0]], c)['drop']
    noise = (rate * (1 - rate) / n) ** 0.5
    assert abs(drop.float().mean().item() - rate) < 4 * noise + 1e-9


# --- the script -----------------------------------------------------------------------------------
def run(out, *extra, steps=2, images=2):
    return tiny('reca', out, f'--batch={images}', *extra, steps=steps)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """Four steps with evaluations and a checkpoint every two."""
    out = tmp_path_factory.mktemp('reca') / 'whole'
    run(out, '--save_every=2', '--eval_every=3', steps=4)
    return out


def test_encoder_is_bit_identical_and_the_checkpoint_like_any_other(whole, tmp_path):
    base = weights(BASE)
    now = weights(whole / 'step_000004')
    changed = [key for key in now if not torch.equal(now[key], base[key])]
    moved = {key.split(':')[0].split('/')[0] for key in changed}
    assert moved == {'projector.safetensors', 'decoder'}
    assert any(key.startswith('encoder/') for key in now)
    parts = ['decoder', 'encoder', 'meta.json', 'projector.safetensors', 'state.pt']
    assert sorted(os.listdir(whole / 'step_000004')) == parts

    following = tmp_path / 'next'
    log = tiny('grpo_encoder', following, f'--init_from={whole}', '--eval_every=1', steps=1)
    assert log[0]['logp_diff'] < 1e-5
    end = lines(whole / 'eval.jsonl')[-1]
    start = lines(following / 'eval.jsonl')[0]
    assert without_step(end) == without_step(start), 'the next stage starts where this one ended'


def test_log(whole):
    log = lines(whole / 'log.jsonl')
    assert [line['step'] for line in log] == [0, 1, 2, 3]
    assert log[0]['lr'] > log[-1]['lr'] > 0
    held = 'held to the start, which is a frozen copy'
    assert log[0]['flow_text'] < 1e-10 < log[-1]['flow_text'], held
    for line in log:
        loss = line['flow_image'] + KEYS['lambda_t2i'] * line['flow_text']
        assert line['loss'] == pytest.approx(loss, rel=1e-5)
        assert line['grad_norm'] > 0
        assert 1 < line['caption_len'] <= 24
        assert line['skipped'] == line['truncated'] == line['cut'] == 0


def test_plain_images_need_no_captions_and_without_lambda_none_are_made(tmp_path, monkeypatch):
    folder = tmp_path / 'images'
    folder.mkdir()
    rng = np.random.default_rng(1)
    for i in range(8):
        Image.fromarray(world.draw(world.random_scene(rng))).save(folder / f'{i}.png')
    data = f'--data={folder}'
    log = run(tmp_path / 'a', data, '--template=False', '--see_resolution=16', steps=1)
    assert log[0]['caption_len'] > 0

    def refuse(*args, **kwargs):
        pytest.fail('a caption was made')

    monkeypatch.setattr('encoder.Encoder.sample', refuse)
    switches = ['--lambda_t2i=0', '--states=image+template', '--lora_rank=2']
    (line,) = run(tmp_path / 'b', data, *switches, steps=1)
    assert line['caption_len'] == line['flow_text'] == 0
    assert line['loss'] == pytest.approx(line['flow_image'])


@pytest.mark.parametrize('flag, said', [
    ('--states=text', 'image+template'),
    ('--t2i_target=base', 'start'),
    ('--see_resolution=64', 'see_resolution'),
    ('--see_resolution=-1', 'see_resolution'),
    ('--templates= | ', 'templates'),
    ('--cond_len=15', 'cond_len'),
])
def test_values_that_mean_nothing(tmp_path, flag, said):
    assert said in refusal(tiny, 'reca', tmp_path / 'out', flag)
