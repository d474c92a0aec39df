"""Reconstruction alignment: what conditions the decoder, what the loss is, what moves."""
import copy
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

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


# --- an image in a caption's place ---------------------------------------------------------------
def test_an_image_of_words_is_read_as_these_words(model, vision):
    """Template, positions and padding are a text's: with words for features not a bit differs."""
    texts = ['small red circle top-left , large blue square bottom-right , gray background , '
             'small red cross', ' '.join(['red'] * N)] * 2
    y, mask, _ = model.encoder.tokens(texts, N)
    assert model.encoder.words(y, mask).all()
    with torch.no_grad():
        told = model.encoder.text_states(y, mask)
        seen = model.encoder.image_as_text(dict(vision, features=model.encoder.embed(y)))
        assert seen.shape[1] == model.config.cond_len
        assert torch.equal(seen, told)
        images = model.encoder.image_as_text(vision)
    assert (images - told).abs().mean() > 1e-2
    assert (images[0] - images[1]).abs().mean() > 1e-2, 'another image'
    start = len(model.encoder.before_text)
    assert torch.equal(images[:, :start], told[:, :start]), 'the template has not read it yet'


def test_images_are_read_in_micro_batches_and_by_the_text_encoder(model, vision):
    with torch.no_grad():
        whole = model.encoder.image_as_text(vision)
        parts = at(model, micro_batch=1).encoder.image_as_text(vision)
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
        own = at(model).encoder
        own.text_encoder = copy.deepcopy(own.language_model)
        own.text_encoder.norm.weight.mul_(2)
        torch.testing.assert_close(own.image_as_text(vision), 2 * whole)


def test_a_smaller_image_has_fewer_states(model, x):
    small = reca.see_small(model.encoder, x, at(model, see_resolution=16).config)
    assert small['features'].shape[1] == 4
    whole = reca.see_small(model.encoder, x, model.config)
    assert same(whole, model.encoder.see(x))


# --- the loss -------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def batch(model, x, vision):
    """z0, s, eps, drop, h, caption of P images, the second one's condition dropped."""
    y, mask, _ = model.encoder.sample(vision, 1, 0.0)
    noise = torch.Generator().manual_seed(0)
    tensors = dict(
        z0=model.decoder.to_latent(x),
        s=torch.tensor([0.2, 0.4, 0.6, 0.8]),
        eps=torch.randn(P, *model.decoder.latent_shape(), generator=noise),
        drop=torch.tensor([False, True, False, False]),
        states=model.encoder.image_as_text(vision),
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
        c_v = model.projector(batch.states)
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
def test_dropout_rate_is_the_key_s(model, x, rate):
    n = 2000
    blind = at(model)
    blind.encoder.image_as_text = lambda vision: None
    blind.encoder.see = lambda x: None
    blind.decoder.to_latent = lambda x: None
    c = at(model, drop=rate, lambda_t2i=0.0).config
    drop = reca.noised(blind, dict(x=x, index=torch.arange(n)), 0, c)['drop']
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


def test_it_runs_under_the_wiring_of_text_and_image(tmp_path):
    """There the negative prompt's condition is twice as long as an image's."""
    log = run(tmp_path, '--condition=text+image', '--drop=0.5', steps=1)
    assert log[0]['grad_norm'] > 0


def test_plain_images_need_no_captions_and_without_lambda_none_are_made(tmp_path, monkeypatch):
    folder = tmp_path / 'images'
    folder.mkdir()
    rng = np.random.default_rng(1)
    for i in range(8):
        Image.fromarray(world.draw(world.random_scene(rng))).save(folder / f'{i}.png')
    data = f'--data={folder}'
    log = run(tmp_path / 'a', data, '--see_resolution=16', steps=1)
    assert log[0]['caption_len'] > 0

    def refuse(*args, **kwargs):
        pytest.fail('a caption was made')

    monkeypatch.setattr('encoder.Encoder.sample', refuse)
    switches = ['--lambda_t2i=0', '--lora_rank=2']
    (line,) = run(tmp_path / 'b', data, *switches, steps=1)
    assert line['caption_len'] == line['flow_text'] == 0
    assert line['loss'] == pytest.approx(line['flow_image'])


@pytest.mark.parametrize('flag, said', [
    ('--t2i_target=base', 'start'),
    ('--see_resolution=64', 'see_resolution'),
    ('--see_resolution=-1', 'see_resolution'),
    ('--cond_len=20', 'cond_len'),
])
def test_values_that_mean_nothing(tmp_path, flag, said):
    assert said in refusal(tiny, 'reca', tmp_path / 'out', flag)
