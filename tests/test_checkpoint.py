"""Where a reference policy comes from, and the text encoder that stands still."""
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from lib import checkpoint
from lib import ranks
from comparing import without_step
from conftest import shared_config
from running import arguments, lines, refusal, same, script, tiny, weights

ADAPTED = ['--lora_rank=4']
FULL = []
IN_BFLOAT16 = ['--dtype=bfloat16', '--lora_rank=4']
WAYS = pytest.mark.parametrize('way', [FULL, ADAPTED, IN_BFLOAT16], ids=['full', 'lora', 'bf16'])
FULL_IN_BFLOAT16 = ['--dtype=bfloat16']
ALL_WAYS = pytest.mark.parametrize(
    'way', [FULL, FULL_IN_BFLOAT16, ADAPTED, IN_BFLOAT16],
    ids=['full', 'full-bf16', 'lora', 'lora-bf16'])
HERE = SimpleNamespace(master=True, world=1, rank=0, device='cpu')


def opened(config, *parts):
    """The model as a stage that trains these parts opens it."""
    ranks.quiet()
    uae = checkpoint.open_uae(config)
    return uae, uae.train_only(*parts)


def shake(params, seed):
    """An update, as it were: noise on everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in params:
            p.add_(0.05 * torch.randn(p.shape, generator=generator))


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
    with torch.no_grad(), uae.autocast():
        return uae.decoder.velocity(z, torch.tensor(0.5), uae.project(h))


POLICIES = dict(encoder=captions_logp, decoder=drawing, projector=drawing)


# --- the reference policy of a resumed run --------------------------------------------------------
@pytest.fixture
def counted(monkeypatch):
    """Which towers are loaded whole, one after the other."""
    loads = []
    really = dict(encoder=checkpoint.load_encoder, decoder=checkpoint.load_decoder)

    def counting(part):
        def count(config, start):
            loads.append(part)
            return really[part](config, start)
        return count

    for part in really:
        monkeypatch.setattr(checkpoint, f'load_{part}', counting(part))
    return loads


@ALL_WAYS
@pytest.mark.parametrize('from_checkpoint', [False, True], ids=['base', 'checkpoint'])
@pytest.mark.parametrize('parts', [['encoder'], ['decoder'], ['projector', 'decoder']], ids=str)
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
    again = configured(tmp_path / 'run', *flags, resume=True)
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


# --- adapters -------------------------------------------------------------------------------------
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
    assert changed
    assert {name.split('/')[0] for name in changed} == {part}


# --- text_encoder=start ---------------------------------------------------------------------------
def condition(uae):
    """The condition of four fixed captions."""
    y = torch.arange(7, 15).view(4, 2)
    with torch.no_grad():
        return uae.condition(y, torch.ones(y.shape))


def with_text_encoder(config):
    """The model of stage 2 with a text encoder that stands still, and what is trained."""
    uae, params = opened(config, 'encoder')
    checkpoint.choose_text_encoder(uae)
    return uae, params


@WAYS
def test_the_condition_stands_still_while_the_policy_moves(tmp_path, x, way):
    uae, params = with_text_encoder(configured(tmp_path, *way))
    c, logp = condition(uae), captions_logp(uae, x)
    assert not any(p.requires_grad for p in uae.encoder.text_encoder.parameters())
    live, trained = opened(configured(tmp_path, *way), 'encoder')
    assert torch.equal(condition(live), c), 'at first they are one'
    assert len(trained) == len(params)
    for model, moving in ((uae, params), (live, trained)):
        shake(moving, 1)
    assert torch.equal(condition(uae), c)
    assert not torch.equal(captions_logp(uae, x), logp)
    assert not torch.equal(condition(live), c)


@pytest.mark.parametrize('way', [ADAPTED, IN_BFLOAT16], ids=['lora', 'bf16'])
def test_with_lora_there_is_one_base(tmp_path, way):
    """Captioner and text encoder share every weight but the adapters, also after a resume, and
    the checkpoint has these alone."""
    config = configured(tmp_path / 'run', *way)
    uae, params = with_text_encoder(config)
    check_one_base(uae)
    shake(params, 1)
    folder = save(config, uae, params, 1)
    names = weights(folder).keys()
    own = [name for name in names if name.startswith('text_encoder')]
    assert len(own) == len(params)
    assert all('lora_' in name for name in own)

    resumed = configured(tmp_path / 'run', *way, resume=True)
    check_one_base(with_text_encoder(resumed)[0])
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
def test_a_checkpoint_brings_its_text_encoder_without_the_key(tmp_path, way):
    config = configured(tmp_path / 'run', *way)
    uae, params = with_text_encoder(config)
    c = condition(uae)
    shake(params, 1)
    save(config, uae, params, 1)
    start = [*way, f'--init_from={tmp_path}/run']

    found, _ = opened(configured(tmp_path / 'next', *start), 'decoder')
    assert torch.equal(condition(found), c)
    live, _ = opened(configured(tmp_path / 'next', *start, '--text_encoder=live'), 'decoder')
    assert live.text_encoder is None
    assert not torch.equal(condition(live), c)
    again, moving = with_text_encoder(configured(tmp_path / 'next', *start, '--text_encoder=start'))
    shake(moving, 2)
    assert torch.equal(condition(again), c), 'the first one stays, in a second stage 2 too'


@pytest.fixture(scope='module')
def chain(tmp_path_factory):
    """Stage 2 with a text encoder, then stage 3 without the key: their out_dirs."""
    root = tmp_path_factory.mktemp('text_encoder')
    extra = ['--text_encoder=start', '--lr=1e-2', '--eval_every=1']
    tiny('grpo_encoder', root / 'encoder', *extra)
    init_from = f'--init_from={root}/encoder'
    tiny('grpo_decoder', root / 'decoder', init_from, '--eval_every=1')
    return root


def parts_of(tensors, part):
    return {name: tensor for name, tensor in tensors.items() if name.startswith(part)}


def test_stage_3_and_the_evaluation_read_it(chain, tmp_path):
    end = lines(chain / 'encoder' / 'eval.jsonl')[-1]
    start = lines(chain / 'decoder' / 'eval.jsonl')[0]
    assert without_step(end) == without_step(start)
    before = weights(chain / 'encoder' / 'step_000002')
    after = weights(chain / 'decoder' / 'step_000002')
    assert parts_of(before, 'text_encoder')
    assert same(parts_of(before, 'text_encoder'), parts_of(after, 'text_encoder'))
    assert not same(parts_of(before, 'decoder'), parts_of(after, 'decoder'))

    summaries = {}
    for key in ('', 'live'):
        out = tmp_path / f'eval_{key}'
        flags = [f'--init_from={chain}/decoder', f'--text_encoder={key}']
        script('eval_unified', *arguments('eval_unified', out, *flags))
        with open(out / 'report.json') as f:
            summaries[key] = json.load(f)['summary']
    last = lines(chain / 'decoder' / 'eval.jsonl')[-1]
    assert summaries[''] == without_step(last)
    assert summaries['live']['reward'] != summaries['']['reward']


def test_stage_1_refuses_a_text_encoder_that_it_would_not_train(chain, tmp_path):
    message = refusal(tiny, 'cold_start', tmp_path / 'out', f'--init_from={chain}/decoder')
    assert 'text encoder of its own' in message
    assert not os.listdir(tmp_path / 'out')


def test_a_text_encoder_that_is_lost_is_missed(chain, tmp_path):
    start = tmp_path / 'out'
    shutil.copytree(chain / 'encoder', start)
    path, = start.glob(f'step_*/{checkpoint.TEXT_ENCODER}')
    path.unlink()
    message = refusal(checkpoint.find_checkpoint, shared_config(f'--init_from={start}'))
    assert 'text_encoder/model.safetensors is missing' in message
