"""Stage 0: which captions it learns from, and the averaged weights."""
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lib import optimiser
import pretrain_decoder
from comparing import BASE, optimizer_state
from conftest import at
from data.images import ImageSet
from data.shapes import scenes as world
from encoder import Encoder
from running import distance, lines, refusal, tiny, weights

STRANGE = ['紅い丸、灰色の背景', 'دائرة حمراء', 'красный круг', '🔴🟦',
           '<|image_pad|> <|im_start|> <unk> \0', 'Small RED circle...']


def scenes(folder, captions, as_text=False):
    """Draws images with these captions into a folder; returns the --data of them.

    '' stays, None is left out, True is the scene's own caption. They stand in a manifest, or in
    .txt files beside the images.
    """
    rng = np.random.default_rng(0)
    rows = []
    os.makedirs(folder)
    for i, caption in enumerate(captions):
        scene = world.random_scene(rng)
        Image.fromarray(world.draw(scene)).save(f'{folder}/{i}.png')
        row = dict(image=f'{i}.png')
        if caption is True:
            row['caption'] = world.caption(scene)
        elif caption is not None:
            row['caption'] = caption
        rows.append(row)
    if not as_text:
        manifest = ''.join(json.dumps(row) + '\n' for row in rows)
        (folder / 'm.jsonl').write_text(manifest)
        return f'--data={folder}/m.jsonl'
    for i, row in enumerate(rows):
        if 'caption' in row:
            (folder / f'{i}.txt').write_text(row['caption'])
    return f'--data={folder}'


def noised(uae, images, step, **keys):
    """The flow loss's arguments of a whole batch, and what its captions lost.

    keys: configuration keys other than the model's own; the noise levels are SD3's published ones.
    """
    config = at(uae, sigma_mean=0.0, sigma_std=1.0, **keys).config
    return pretrain_decoder.noised(uae, images, step, config)


# --- captions -------------------------------------------------------------------------------------
@pytest.mark.parametrize('as_text', [False, True])
def test_images_without_captions_are_left_out_and_counted(tmp_path, capsys, monkeypatch, as_text):
    """Missing ones go at once with one line for all; an empty .txt is known when it is read.
    Other scripts go through."""
    seen = []
    tokens = Encoder.tokens

    def spy(self, texts, T=None):
        seen.extend(texts)
        return tokens(self, texts, T)

    monkeypatch.setattr(Encoder, 'tokens', spy)
    data = scenes(tmp_path / 'd', [None, True, '', *STRANGE, None, ' \n'], as_text)
    log = tiny('pretrain_decoder', tmp_path / 'out', data, images=7)
    out = capsys.readouterr().out
    assert log[-1]['skipped'] == 4
    assert all(line['cut'] == 0 for line in log), 'a strange caption is short'
    assert log[0]['unknown'] > 10, 'and its words are not in the tokenizer'
    assert out.count('have no caption') == 1
    at_once, when_read = (2, 2) if as_text else (4, 0)
    assert f'{at_once} of the 11 images' in out
    assert out.count(': no caption') == when_read
    assert set(STRANGE) <= set(seen)
    assert '' not in seen
    assert None not in seen
    assert all(line['grad_norm'] > 0 and line['loss'] > 0 for line in log)
    assert log[0]['caption_loss'] > 0, 'finite: see running.lines'


@pytest.mark.parametrize('captions, as_text', [
    ([None] * 3, False), (['', ' '], False), ([None] * 3, True)])
def test_no_captions_at_all_is_one_line(tmp_path, captions, as_text):
    data = scenes(tmp_path / 'd', captions, as_text)
    assert 'has a caption' in refusal(tiny, 'pretrain_decoder', tmp_path / 'out', data)


def test_long_captions_are_cut_where_cond_len_ends_and_never_silently(uae, tmp_path, capsys):
    wide = at(uae, cond_len=40)                  # has more room than caption_len
    room = 40 - len(uae.encoder.before_text) - len(uae.encoder.after_text)
    captions = [' '.join(['red'] * room), ' '.join(['red'] * (room + 1))]
    batch = dict(index=torch.arange(2), x=torch.zeros(2, 3, 32, 32), captions=captions)
    flow, lost = noised(wide, batch, 0, drop=0.0)
    y, mask = flow['y'], flow['mask']
    red = uae.encoder.tokenizer.convert_tokens_to_ids('red')
    assert lost == dict(cut=1, unknown=0)
    assert ((y == red) & mask.bool()).sum(1).tolist() == [room, room + 1]

    lengths = []

    def count(module, inputs):
        lengths.append((inputs[0] == red).sum(1).tolist())

    hook = uae.encoder.embed.register_forward_pre_hook(count)
    with torch.no_grad():
        wide.condition(y, mask)
    hook.remove()
    assert lengths == [[room, room]], 'all that fits reaches the decoder'

    room = room - 12                             # of the shipped base, whose cond_len is 28
    captions = [' '.join(['red'] * 300), ' '.join(['red'] * room)]
    data = scenes(tmp_path / 'd', captions * 2)
    log = tiny('pretrain_decoder', tmp_path / 'out', data, '--micro_batch=1', images=4, steps=3)
    out = capsys.readouterr().out
    assert [line['cut'] for line in log] == [2, 2, 2]
    assert out.count('were cut') == 2, 'at the first one and at the end'
    assert 'warning: 2 captions' in out
    assert 'warning: 6 captions' in out


def test_the_embedded_world_brings_its_training_captions(tmp_path, monkeypatch):
    batches = []
    collate = ImageSet.collate

    def spy(*args):
        batches.append(collate(*args))
        return batches[-1]

    monkeypatch.setattr(ImageSet, 'collate', spy)
    extra = ['--eval_every=1', '--train_encoder=False']
    assert tiny('pretrain_decoder', tmp_path / 'out', *extra, steps=1, images=8)
    evaluations = lines(tmp_path / 'out' / 'eval.jsonl')
    assert [line['step'] for line in evaluations] == [0, 1]

    train, held = world.splits()
    used = 0
    for batch in batches:
        for name, x, caption in zip(batch['names'], batch['x'], batch['captions']):
            if caption is None:
                continue
            used += 1
            scene = train[int(name.removeprefix('train/').removesuffix('.png'))]
            assert caption == world.caption(scene)
            assert torch.equal(x, torch.from_numpy(world.pixels([scene])[0]))
            assert scene not in held
    assert used == 8


def test_held_out_images_are_kept_from_training_only_where_something_is_evaluated(tmp_path):
    data = scenes(tmp_path / 'd', [True] * 8).removeprefix('--data=')

    def opened(eval_every):
        c = SimpleNamespace(data=data, held_out='', data_keys=('image', 'caption', ''),
                            resolution=32, eval_images=3, eval_every=eval_every)
        return pretrain_decoder.open_captioned(c, SimpleNamespace(world=1), 'caption')

    with open(data, 'a') as f:
        f.write('no row\n')
    images, gone, held = opened(eval_every=0)
    assert (len(images), gone, held) == (8, 0, dict(skipped=1))
    images, gone, held = opened(eval_every=5)
    assert (len(images), gone, len(held['x'])) == (5, 0, 3)
    assert not set(held['names']) & set(images.names)


# --- dropout, wirings -----------------------------------------------------------------------------
@pytest.mark.parametrize('rate', [0.0, 0.1, 0.7])
def test_dropout_rate_is_the_key_s(uae, rate):
    n = 2000
    model = at(uae)
    model.decoder.to_latent = lambda x: x
    batch = dict(index=torch.arange(n), x=torch.zeros(n, 3, 32, 32), captions=['red circle'] * n)
    flow, _ = noised(model, batch, 3, drop=rate)
    y, mask, _ = uae.encoder.tokens(['random image'], flow['y'].shape[1])
    dropped = (flow['y'] == y).all(1) & (flow['mask'] == mask).all(1)
    noise = (rate * (1 - rate) / n) ** 0.5
    assert abs(dropped.float().mean().item() - rate) < 4 * noise + 1e-9


@pytest.mark.parametrize('wiring', ['answer', 'text+image'])
def test_dropped_conditions_hide_the_image_too(uae, x, wiring):
    model = at(uae, condition=wiring)
    batch = dict(index=torch.arange(4), x=x, captions=['red circle .'] * 4)
    flow, _ = noised(model, batch, 0, condition=wiring, drop=0.5)
    flow['vision'] = model.encoder.see(x)
    drop = flow['drop']
    assert 0 < drop.sum() < 4

    conditions = []

    def velocity(z, s, c):
        conditions.append(c)
        return z

    model.decoder.velocity = velocity
    with torch.no_grad():
        pretrain_decoder.flow_loss(model, **flow)
        nothing = model.negative()[0]
    for row, dropped in zip(conditions[0], drop):
        assert torch.equal(row, nothing) == bool(dropped)


# --- averaged weights -----------------------------------------------------------------------------
def test_average_has_its_closed_form():
    """w_ema,n = d^(n-1) w_1 + (1 - d) sum_{i=2..n} d^(n-i) w_i; inside `averaged` the weights are
    these, outside the others."""
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    decay = 0.9
    trained = []
    optimizer = torch.optim.AdamW([p], lr=0.3)
    for i in range(7):
        with pretrain_decoder.averaged(optimizer):
            (p * torch.tensor([1.0, i - 3.0])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        pretrain_decoder.average(optimizer, decay)
        trained.append(p.detach().clone())

    later = sum(decay ** (6 - i) * trained[i] for i in range(1, 7))
    want = decay ** 6 * trained[0] + (1 - decay) * later
    with pretrain_decoder.averaged(optimizer):
        torch.testing.assert_close(p.detach(), want)
        assert torch.equal(optimizer.state_dict()['state'][0]['other'], trained[-1])
    assert torch.equal(p.detach(), trained[-1])


AVERAGED = ['--ema=0.6', '--save_every=2', '--eval_every=2', '--warmup=0']


@pytest.fixture(scope='module')
def averaged_run(tmp_path_factory):
    """Four steps with --ema: out_dir, the --data, the trained weights after each update."""
    root = tmp_path_factory.mktemp('ema')
    data = scenes(root / 'd', [True] * 12)
    trained = []
    take_step = optimiser.Optimiser.step

    def spy(optimiser, step):
        taken = take_step(optimiser, step)
        trained.append([p.detach().clone() for p in optimiser.params])
        return taken

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(optimiser.Optimiser, 'step', spy)
        tiny('pretrain_decoder', root / 'whole', data, *AVERAGED, steps=4)
    return root / 'whole', data, trained


def fingerprint(tensor):
    """Shape and sum, by which a tensor is found under another name."""
    return *tensor.shape, round(tensor.double().sum().item(), 3)


def test_a_checkpoint_has_the_averages_and_state_pt_the_others(averaged_run):
    out, _, trained = averaged_run
    want = []
    for a, b, c, d in zip(*trained):
        want.append(0.6 ** 3 * a + 0.4 * (0.6 ** 2 * b + 0.6 * c + d))
    state = optimizer_state(out / 'step_000004')['optimizer']['state']
    assert len(state) == len(want)
    assert all(torch.equal(state[i]['other'], trained[-1][i]) for i in state)

    saved = {fingerprint(tensor) for tensor in weights(out / 'step_000004').values()}
    assert all(fingerprint(tensor) in saved for tensor in want)
    assert distance(dict(enumerate(want)), dict(enumerate(trained[-1]))) > 0.1


@pytest.mark.parametrize('step', [2, 4])
def test_what_is_evaluated_is_what_is_saved(averaged_run, tmp_path, step):
    """Inside the run and at its end: the evaluation is the one that a next stage begins with.
    The vision tower has not moved."""
    out, data, _ = averaged_run
    init_from = f'--init_from={out}/step_{step:06d}'
    tiny('cold_start', tmp_path / 'next', data, init_from, '--eval_every=1', steps=1)
    evaluations = {line['step']: line for line in lines(out / 'eval.jsonl')}
    first = lines(tmp_path / 'next' / 'eval.jsonl')[0]
    assert first == dict(evaluations[step], step=0)
    assert first != evaluations[0]

    base = weights(BASE)
    now = weights(out / f'step_{step:06d}')
    frozen = [key for key in now if 'visual' in key]
    assert frozen
    assert all(torch.equal(now[key], base[key]) for key in frozen)
