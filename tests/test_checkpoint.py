"""Where a run starts: whose weights are taken, what a checkpoint may contradict, which models are
refused; the reference policy, and the text encoder that stands still."""
import json
import os
import shutil
from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from config import shared
from lib import checkpoint
from lib import ranks
from comparing import BASE
from conftest import perturb, shared_config
from running import refusal, same, tiny, weights

FULL, FULL_IN_BFLOAT16 = [], ['--dtype=bfloat16']
ADAPTED, IN_BFLOAT16 = ['--lora_rank=4'], ['--dtype=bfloat16', '--lora_rank=4']
WAYS = pytest.mark.parametrize('way', [FULL, ADAPTED, IN_BFLOAT16], ids=['full', 'lora', 'bf16'])
ALL_WAYS = pytest.mark.parametrize(
    'way', [FULL, FULL_IN_BFLOAT16, ADAPTED, IN_BFLOAT16],
    ids=['full', 'full-bf16', 'lora', 'lora-bf16'])
HERE = SimpleNamespace(master=True, world=1, rank=0, device='cpu')


def opened(config, *parts):
    """The model as a stage that trains these parts opens it, and what it trains."""
    ranks.quiet()
    uae = checkpoint.open_uae(config)
    return uae, uae.train_only(*parts)


def shake(params, seed):
    """An update, as it were: noise on everything that is trained."""
    perturb(SimpleNamespace(parameters=lambda: params), 0.05, seed)


def save(config, uae, params, step):
    optimiser = SimpleNamespace(adamw=torch.optim.AdamW(params))
    return checkpoint.save(config, HERE, step, uae, optimiser)


def configured(out_dir, *flags, resume=False):
    config = shared_config(f'--out_dir={out_dir}', *flags)
    config.resume = resume
    return config


def captions_logp(uae, x):
    """Log-probs of fixed tokens."""
    y = torch.arange(7, 19).expand(len(x), -1)
    with torch.no_grad():
        return uae.encoder.logp(uae.encoder.see(x), y)


def drawing(uae, x):
    """A velocity under a fixed condition that went through the projector."""
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(2, *uae.decoder.latent_shape(), generator=generator)
    h = torch.randn(2, 6, uae.projector.up.in_features, generator=generator)
    with torch.no_grad():
        return uae.decoder.velocity(z, torch.tensor(0.5), uae.project(h))


POLICIES = dict(encoder=captions_logp, decoder=drawing, projector=drawing)


# --- what a checkpoint may contradict -------------------------------------------------------------
# of every shared key: refused, since the weights then mean nothing; told, in one line; or silent,
# since they say nothing about it
CONTRADICTED = dict(
    encoder='refused', decoder='refused', lora_rank='refused', cond_len='refused',
    condition='told', resolution='told', caption_prompt='told', negative_prompt='told',
    guidance='told', caption_len='told')


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A checkpoint of full weights, all of them shaken."""
    out = tmp_path_factory.mktemp('saved')
    uae, params = opened(configured(out), 'encoder', 'projector', 'decoder')
    shake(params, 1)
    return save(configured(out), uae, params, 1)


@pytest.mark.parametrize('flags,warned', [
    (['--eval_images=3'], True), (['--eval_images=2'], False),
    (['--eval_images=3', '--held_out=elsewhere'], False), (['--data=b', '--eval_images=3'], False)])
def test_more_held_out_images_than_the_checkpoint_kept(tmp_path, capsys, flags, warned):
    """Those were trained on."""
    kept = configured(tmp_path, '--data=a', '--eval_images=2')
    uae, params = opened(kept, 'projector')
    folder = save(kept, uae, params, 1)
    checkpoint.find_checkpoint(shared_config(f'--init_from={folder}', '--data=a', *flags))
    assert ('the others were trained on' in capsys.readouterr().out) == warned


@pytest.mark.parametrize('key', shared)
def test_every_key_that_a_checkpoint_can_contradict(saved, capsys, key):
    wanted = CONTRADICTED.get(key, 'silent')
    now = shared_config(f'--init_from={saved}')
    if key != 'init_from':
        old = getattr(now, key)
        setattr(now, key, 'another' if isinstance(old, (str, tuple)) else 2 * old + 1)
    if wanted == 'refused':
        message = refusal(checkpoint.find_checkpoint, now)
        assert f'was trained with {key}=' in message and "its preset was 'tiny'" in message
        return
    assert checkpoint.find_checkpoint(now) == saved
    said = capsys.readouterr().out
    assert said.count(f'warning: {saved} was trained with {key}=') == (wanted == 'told')
    assert len(said.splitlines()) == (wanted == 'told')


def test_a_key_that_a_checkpoint_does_not_know_is_no_contradiction(saved, tmp_path):
    shutil.copytree(saved, tmp_path / 'old')
    meta = json.loads((tmp_path / 'old' / 'meta.json').read_text())
    del meta['config']['condition']
    (tmp_path / 'old' / 'meta.json').write_text(json.dumps(meta))
    found = checkpoint.find_checkpoint(shared_config(f'--init_from={tmp_path}/old'))
    assert found == f'{tmp_path}/old'


# --- whose models are taken -----------------------------------------------------------------------
def model_folder(part, tmp_path, change=None, **about):
    """A copy of the base's encoder or decoder -> the flag that names it.

    change(tensors): of its weights; about: of its config.json.
    """
    copy = tmp_path / part
    shutil.copytree(f'{BASE}/{part}', copy)
    inner = copy / 'transformer' if part == 'decoder' else copy
    if about:
        config_json = inner / 'config.json'
        config_json.write_text(json.dumps({**json.loads(config_json.read_text()), **about}))
    if change:
        path, = inner.glob('*.safetensors')
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata=dict(format='pt'))
    return f'--{part}={copy}'


def zero(tensors):
    for tensor in tensors.values():
        tensor.zero_()


def drop_one(tensors):
    del tensors[max(tensors)]


def add_one(tensors):
    tensors['odd'] = torch.zeros(1)


def test_the_decoder_that_is_asked_for_is_the_one_that_draws(tmp_path):
    """The shipped base beside it gives the projector alone."""
    uae, _ = opened(shared_config(model_folder('decoder', tmp_path, zero)))
    assert not any(p.any() for p in uae.decoder.transformer.parameters())
    projector = load_file(f'{BASE}/projector.safetensors')
    assert same(dict(uae.projector.state_dict()), projector)


@pytest.mark.parametrize('part, change, about, says', [
    ('encoder', None, dict(model_type='qwen2_vl'), 'the kind qwen2_vl, expected one of qwen2_5_vl'),
    ('encoder', None, dict(model_type='no_such'), 'the kind no_such, expected one of qwen2_5_vl'),
    ('decoder', None, dict(_class_name='FluxTransformer2DModel'),
     'the kind FluxTransformer2DModel, expected one of SD3Transformer2DModel'),
    ('decoder', None, dict(_class_name=None), 'the kind None, expected'),
    ('encoder', drop_one, {}, '1 missing keys'), ('encoder', add_one, {}, "first 'odd'"),
    ('decoder', drop_one, {}, '1 missing keys'), ('decoder', add_one, {}, "first 'odd'"),
])
def test_a_model_is_whole_and_of_a_known_class_or_refused(tmp_path, part, change, about, says):
    flag = model_folder(part, tmp_path, change, **about)
    message = refusal(opened, shared_config(flag, f'--init_from={tmp_path}'))
    assert 'no checkpoint here' in message, 'the start is looked at first'
    shutil.copy(f'{BASE}/projector.safetensors', tmp_path)
    message = refusal(opened, shared_config(flag))
    assert str(tmp_path / part) in message and says in message


def test_a_projector_of_another_width_is_refused(tmp_path):
    flag = model_folder('encoder', tmp_path)
    tensors = load_file(f'{BASE}/projector.safetensors')
    save_file(dict(tensors, **{'up.bias': torch.zeros(3)}), tmp_path / 'projector.safetensors')
    assert 'does not fit' in refusal(opened, shared_config(flag))


def test_the_pooled_embedding_of_nothing_is_the_pipelines(tmp_path, monkeypatch):
    """Computed once by the text encoders that come with the decoder, and cached."""
    flag = model_folder('decoder', tmp_path)
    folder = tmp_path / 'decoder'
    parts = {}
    for number in ('', '_2'):
        vocabulary = {'<|startoftext|>': 0, '<|endoftext|>': 1, 'a</w>': 2}
        tokenizer = transformers.CLIPTokenizer(vocabulary, [], model_max_length=6)
        text_encoder = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(
            vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=6, projection_dim=16, eos_token_id=1,
            bos_token_id=0)).eval()
        tokenizer.save_pretrained(folder / f'tokenizer{number}')
        text_encoder.save_pretrained(folder / f'text_encoder{number}')
        parts.update({f'tokenizer{number}': tokenizer, f'text_encoder{number}': text_encoder})
    monkeypatch.setattr(checkpoint, 'POOLED', f'{tmp_path}/pooled')
    decoder = checkpoint.open_decoder(shared_config(flag), '')
    pipe = diffusers.StableDiffusion3Pipeline(
        **parts, text_encoder_3=None, tokenizer_3=None, transformer=decoder.transformer,
        vae=decoder.vae, scheduler=decoder.scheduler)
    expected = pipe.encode_prompt('', '', '', do_classifier_free_guidance=False)[2]
    assert expected.any()
    torch.testing.assert_close(decoder.pooled, expected)
    shutil.rmtree(folder / 'tokenizer')
    again = checkpoint.open_decoder(shared_config(flag), '')
    assert torch.equal(again.pooled, decoder.pooled)


# --- the reference policy of a resumed run --------------------------------------------------------
@pytest.fixture
def counted(monkeypatch):
    """Which models are loaded whole, one after the other."""
    loads = []
    really = checkpoint.open_model

    def count(part, config, start):
        loads.append(part)
        return really(part, config, start)

    monkeypatch.setattr(checkpoint, 'open_model', count)
    return loads


@ALL_WAYS
@pytest.mark.parametrize('from_checkpoint', [False, True], ids=['base', 'checkpoint'])
@pytest.mark.parametrize('parts', [['encoder'], ['projector', 'decoder']], ids=str)
def test_a_resumed_run_has_the_reference_of_a_fresh_one(
        tmp_path, x, counted, parts, from_checkpoint, way):
    """Bit for bit what the stage began with; no second model is loaded for it.

    With LoRA the reference is adapters. In full fine-tuning it is the trained part alone.
    """
    flags = list(way)
    if from_checkpoint:
        before = configured(tmp_path / 'before', *way)
        uae, params = opened(before, 'encoder', 'projector', 'decoder')
        shake(params, 1)
        save(before, uae, params, 3)
        flags.append(f'--init_from={tmp_path}/before')

    fresh = configured(tmp_path / 'run', *flags)
    uae, params = opened(fresh, *parts)
    first = checkpoint.open_reference(uae, parts, fresh)
    wanted = [POLICIES[part](first, x) for part in parts]
    shake(params, 2)
    save(fresh, uae, params, 2)
    assert same(wanted, [POLICIES[part](first, x) for part in parts]), 'it does not move'

    counted.clear()
    again = configured(tmp_path / 'run', *way, resume=True)     # --init_from is not repeated
    uae, _ = opened(again, *parts)
    reference = checkpoint.open_reference(uae, parts, again)
    assert same(wanted, [POLICIES[part](reference, x) for part in parts])
    for part, logp in zip(parts, wanted):
        assert not same(logp, POLICIES[part](uae, x)), 'the policy itself goes on'
        assert not any(p.requires_grad for p in getattr(reference, part).parameters())
    again_loaded = []
    if '--lora_rank=4' not in way:
        again_loaded = [part for part in parts if part != 'projector']
    assert counted == ['encoder', 'decoder', *again_loaded]
    if from_checkpoint or '--lora_rank=4' not in way:
        for part in parts:
            wanted_weights = getattr(first, part).state_dict()
            assert same(wanted_weights, getattr(reference, part).state_dict())


@WAYS
@pytest.mark.parametrize('part', ['encoder', 'decoder'])
def test_what_a_stage_freezes_it_saves_as_it_found_it(tmp_path, part, way):
    """Adapters bit for bit also in bfloat16, where what is frozen below them is rounded."""
    before = configured(tmp_path / 'before', *way)
    uae, params = opened(before, 'encoder', 'projector', 'decoder')
    shake(params, 1)
    found = weights(save(before, uae, params, 1))
    if way:
        assert not any(torch.equal(p, p.bfloat16().float()) for p in params)

    after = configured(tmp_path / 'after', *way, f'--init_from={tmp_path}/before')
    uae, params = opened(after, part)
    shake(params, 2)
    left = weights(save(after, uae, params, 1))
    changed = {name for name in found if not torch.equal(found[name], left[name])}
    assert {name.split('/')[0] for name in changed} == {part}


# --- text_encoder=start ---------------------------------------------------------------------------
def condition(uae):
    """The condition of four fixed captions."""
    y = torch.arange(7, 15).view(4, 2)
    with torch.no_grad():
        return uae.condition(y, torch.ones(y.shape))


def stage_2(config, kind='start'):
    """The model of stage 2 with what re-encodes its captions, and what is trained."""
    uae, params = opened(config, 'encoder')
    checkpoint.choose_text_encoder(uae, kind)
    return uae, params


@WAYS
def test_the_condition_stands_still_while_the_policy_moves(tmp_path, x, way):
    uae, params = stage_2(configured(tmp_path, *way))
    c, logp = condition(uae), captions_logp(uae, x)
    assert not any(p.requires_grad for p in uae.encoder.text_encoder.parameters())
    live, trained = stage_2(configured(tmp_path, *way), 'live')
    assert torch.equal(condition(live), c), 'at first they are one'
    assert len(trained) == len(params)
    for moving in (params, trained):
        shake(moving, 1)
    assert torch.equal(condition(uae), c)
    assert not torch.equal(captions_logp(uae, x), logp)
    assert not torch.equal(condition(live), c)


@pytest.mark.parametrize('way', [ADAPTED, IN_BFLOAT16], ids=['lora', 'bf16'])
def test_with_lora_there_is_one_base(tmp_path, way):
    """Captioner and text encoder share every weight but the adapters, also after a resume, and
    the checkpoint has these alone."""
    config = configured(tmp_path / 'run', *way)
    uae, params = stage_2(config)
    check_one_base(uae)
    shake(params, 1)
    names = weights(save(config, uae, params, 1)).keys()
    own = [name for name in names if name.startswith('text_encoder')]
    assert len(own) == len(params)
    assert all('lora_' in name for name in own)

    check_one_base(stage_2(configured(tmp_path / 'run', *way, resume=True))[0])
    later, _ = opened(configured(tmp_path / 'next', *way, f'--init_from={tmp_path}/run'), 'decoder')
    check_one_base(later)


def check_one_base(uae):
    captioner = dict(uae.encoder.language_model.named_parameters())
    twin = dict(uae.encoder.text_encoder.named_parameters())
    assert captioner.keys() == twin.keys()
    for name, p in captioner.items():
        one = p.data_ptr() == twin[name].data_ptr()
        assert one == ('lora_' not in name), name
        if 'lora_' in name:
            assert p.dtype == twin[name].dtype == torch.float32


@WAYS
def test_a_checkpoint_brings_its_text_encoder(tmp_path, way):
    config = configured(tmp_path / 'run', *way)
    uae, params = stage_2(config)
    c = condition(uae)
    shake(params, 1)
    save(config, uae, params, 1)
    after = configured(tmp_path / 'next', *way, f'--init_from={tmp_path}/run')

    found, _ = opened(after, 'decoder')
    assert torch.equal(condition(found), c)
    live, _ = stage_2(after, 'live')
    assert live.encoder.text_encoder is None
    assert not torch.equal(condition(live), c)
    again, moving = stage_2(after)
    shake(moving, 2)
    assert torch.equal(condition(again), c), 'the first one stays, in a second stage 2 too'


def test_stage_1_refuses_a_text_encoder_that_it_would_not_train(tmp_path):
    uae, params = stage_2(configured(tmp_path / 'run'))
    saved = save(configured(tmp_path / 'run'), uae, params, 1)
    init_from = f'--init_from={tmp_path}/run'
    message = refusal(tiny, 'cold_start', tmp_path / 'out', init_from)
    assert 'text encoder of its own' in message
    assert not os.listdir(tmp_path / 'out')
    tiny('cold_start', tmp_path / 'out', init_from, '--trains=decoder', steps=1)
    before, after = weights(saved), weights(tmp_path / 'out' / 'step_000001')
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert changed and all('decoder/transformer' in name for name in changed)


def test_a_text_encoder_that_is_lost_is_missed(tmp_path):
    uae, params = stage_2(configured(tmp_path))
    saved = save(configured(tmp_path), uae, params, 1)
    os.remove(f'{saved}/{checkpoint.TEXT_ENCODER}')
    message = refusal(checkpoint.find_checkpoint, shared_config(f'--init_from={tmp_path}'))
    assert 'text_encoder/model.safetensors is missing' in message
