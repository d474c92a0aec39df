"""Per stage: what is frozen stays bit-identical, what is trained moves, no train mode is left."""
import re
import types

import pytest
import torch
from conftest import new_uae, shared_config
from running import ALONE, STAGES, Recorder, arguments, refusal, tiny

import cold_start
from config import parse
from data.images import open_data
from lib import ranks
from lib.optimiser import PATIENCE, Optimiser
from reward import backbone

LANGUAGE_MODEL = 'encoder.vlm.model.language_model.'
VISION_TOWER = 'encoder.vlm.model.visual.'
DECODER = 'decoder.transformer.'
TRAINED = dict(
    cold_start=(LANGUAGE_MODEL, 'projector.', DECODER),
    grpo_encoder=(LANGUAGE_MODEL,),
    grpo_decoder=(DECODER,),
)
PARTS = (LANGUAGE_MODEL, VISION_TOWER, 'projector.', DECODER, 'decoder.vae.')
# parameters of a trained part that no loss can reach: the first is fed the pooled embedding of
# nothing, zeros at tiny size; the others make the text's queries in the last block, whose text
# output SD3 throws away
UNREACHABLE = (
    r'.*\.time_text_embed\.text_embedder\.linear_1\.weight',
    r'.*\.transformer_blocks\.3\.attn\.(add_q_proj|norm_added_q)\..*',
)


def trained_by(name, key):
    return key.startswith(TRAINED[name])


def reachable(key):
    return not any(re.fullmatch(pattern, key) for pattern in UNREACHABLE)


@pytest.fixture(scope='module')
def one_step(tmp_path_factory):
    """name, flags -> Recorder of one step of the real script."""
    done = {}

    def step(name, *extra):
        if (name, extra) not in done:
            with pytest.MonkeyPatch.context() as monkeypatch:
                recorder = Recorder(monkeypatch)
                tiny(name, tmp_path_factory.mktemp('step') / 'out', *extra, steps=1)
            done[name, extra] = recorder
        return done[name, extra]

    return step


@pytest.mark.parametrize('name', STAGES)
def test_frozen_parts_are_bit_identical(one_step, name):
    recorder = one_step(name)
    after = recorder.uae.state_dict()
    tied = {p.data_ptr() for key, p in recorder.uae.named_parameters() if trained_by(name, key)}
    frozen = [key for key in recorder.before
              if not trained_by(name, key) and after[key].data_ptr() not in tied]
    for part in set(PARTS) - set(TRAINED[name]):
        assert any(key.startswith(part) for key in frozen), part
    for key in frozen:
        assert torch.equal(recorder.before[key], after[key]), key
    for tower, before in recorder.towers:
        for key, value in tower.state_dict().items():
            assert torch.equal(value, before[key]), key
        assert not tower.training
        assert not any(p.requires_grad or p.grad is not None for p in tower.parameters())
    assert recorder.towers


@pytest.mark.parametrize('name', STAGES)
def test_every_trained_parameter_moves(one_step, name):
    """And no gradient is kept on what is frozen."""
    recorder = one_step(name)
    [update] = recorder.updates
    parameters = dict(recorder.uae.named_parameters())
    trained = {key: p for key, p in parameters.items() if p.requires_grad}
    assert set(trained) == {k for k in parameters if trained_by(name, k) and reachable(k)}
    assert set(update.grads) == set(trained)
    dead = [key for key, grad in update.grads.items() if not grad.any()]
    assert not dead, f'no gradient reaches {dead[:3]}'
    stuck = [key for key, p in trained.items() if torch.equal(p, recorder.before[key])]
    assert not stuck, f'{len(stuck)} parameters did not move, for example {stuck[:3]}'
    assert update.optimised == {id(p) for p in trained.values()}


@pytest.mark.parametrize('name', STAGES)
def test_modes(one_step, name):
    """Rollouts run in eval mode without gradients, the update in train mode, its frozen parts too.

    Afterwards everything is in eval mode.
    """
    recorder = one_step(name)
    assert not any(module.training for module in recorder.uae.modules())
    [update] = recorder.updates
    for part, training, grad, _ in update.passes:
        if grad:
            assert training
            assert part != 'encoder.vlm.model.visual', 'the vision tower is never trained'
        elif name != 'cold_start' or part != 'decoder.transformer':
            assert not training, 'a rollout in train mode'      # the others: the sampler's first
    policy = 'encoder.language_model' if name == 'grpo_encoder' else 'decoder.transformer'
    assert {grad for part, _, grad, _ in update.passes if part == policy} == {True, False}


@pytest.mark.parametrize('name', STAGES)
def test_checkpointing_changes_no_gradient(one_step, name):
    plain, recomputed = one_step(name), one_step(name, '--checkpointing=True')
    for recorder, on in ((plain, False), (recomputed, True)):
        for part in (recorder.uae.encoder.language_model, recorder.uae.decoder.transformer):
            assert part.gradient_checkpointing == on
    for key, grad in plain.updates[0].grads.items():
        other = recomputed.updates[0].grads[key]
        assert (grad - other).norm() < 1e-3 * grad.norm() + 1e-6, key


# --- stage 1 --------------------------------------------------------------------------------------
def flat_gradient(module):
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.fixture(scope='module')
def stage_1():
    """grad_steps -> loss, {part: flat gradient} of the semantic loss on two images, S = 3."""
    argv = arguments('cold_start', 'nowhere', '--denoise_steps=3')
    config = parse(cold_start.keys, cold_start.own_presets, argv, 'cold_start.py')
    uae = new_uae(config)
    uae.train_only('encoder', 'projector', 'decoder')
    parts = dict(decoder=uae.decoder.transformer, projector=uae.projector,
                 encoder=uae.encoder.language_model)
    tower = backbone('clip', config)
    images = open_data(config, ALONE)[0].batch(0, 0, 2)
    sampled, vision = cold_start.rollout(uae, images, 0, config)
    z = ranks.normal(uae.decoder.latent_shape(), range(2), config.seed, 'start', 0)
    assert torch.equal(sampled['z'], z)

    def gradients(grad_steps):
        config.grad_steps = grad_steps
        uae.zero_grad()
        loss = uae(cold_start.reconstruction_loss, tower, **sampled, vision=vision, config=config)
        loss.backward()
        return loss.item(), {name: flat_gradient(module) for name, module in parts.items()}

    return gradients


def test_the_semantic_loss_reaches_decoder_projector_and_language_model(stage_1):
    loss_1, one = stage_1(1)
    loss_2, two = stage_1(2)
    loss_3, full = stage_1(3)
    assert loss_1 == loss_2 == loss_3, 'where gradients flow is not what is drawn'
    for part in ('decoder', 'projector', 'encoder'):
        assert one[part].norm() > 0
        assert (one[part] - two[part]).norm() > 1e-3 * two[part].norm()
        assert (two[part] - full[part]).norm() > 1e-3 * full[part].norm()


@pytest.mark.parametrize('micro_batch', [0, 2])
def test_a_step_of_stage_1_is_the_mean_over_its_images(monkeypatch, tmp_path, micro_batch):
    """However it is cut: three images, the loss and its gradient one by one."""
    recorder = Recorder(monkeypatch)
    flags = [f'--micro_batch={micro_batch}', '--denoise_steps=3']
    argv = arguments('cold_start', tmp_path / 'out', *flags, steps=1, images=3)
    cold_start.main(argv)
    config = parse(cold_start.keys, cold_start.own_presets, argv, 'cold_start.py')
    [update] = recorder.updates
    uae, tower = recorder.uae, backbone('clip', config)
    recorder.back_to(update)
    sampled, vision = cold_start.rollout(
        uae, open_data(config, ALONE)[0].batch(config.seed, 0, 3), 0, config)
    for _, rows, _ in ranks.sample_slices(3, 1, 1):
        one = ranks.take(sampled, rows)
        seen = ranks.take(vision, rows)
        loss = cold_start.reconstruction_loss(uae, tower, **one, vision=seen, config=config)
        (loss / 3).backward()
    for key, p in uae.named_parameters():
        if p.requires_grad:
            assert (update.grads[key] - p.grad).norm() < 1e-3 * p.grad.norm() + 1e-6, key


# --- the parts ------------------------------------------------------------------------------------
def test_untied_head_and_vision_tower_are_never_trained():
    uae = new_uae(shared_config())
    untied = uae.encoder.head.weight.detach().clone()
    uae.encoder.vlm.lm_head.weight = torch.nn.Parameter(untied, requires_grad=False)
    params = uae.train_only('encoder')
    names = {key for key, p in uae.named_parameters() if p.requires_grad}
    assert len(params) == len(names)
    assert all(key.startswith(LANGUAGE_MODEL) for key in names)
    with pytest.raises(KeyError):
        uae.train_only('vae')


# --- the optimiser step ---------------------------------------------------------------------------
def test_non_finite_gradients_skip_the_step_and_end_the_run(tmp_path):
    config = types.SimpleNamespace(lr=1.0, warmup=0, lr_decay=0.0, steps=9, out_dir=str(tmp_path))
    p = torch.nn.Parameter(torch.zeros(2))
    optimiser = Optimiser([p], config)
    optimiser.adamw = torch.optim.SGD([p], lr=123.0)         # whose steps are easy to follow
    nan, infinity = float('nan'), float('inf')

    def step(*grad):
        p.grad = torch.tensor(grad)
        return optimiser.step(0)

    assert step(3.0, 4.0) == dict(grad_norm=5.0, lr=1.0, bad_steps=0)
    assert torch.allclose(p, torch.tensor([-0.6, -0.8])), 'clipped to norm 1, lr of the schedule'
    assert p.grad is None
    for _ in range(2):
        for count in range(1, PATIENCE):
            taken = step(nan if count % 2 else infinity, 0.0)
            assert taken['bad_steps'] == count
            assert taken['grad_norm'] == -1, 'counted, and a JSON number'
        assert torch.allclose(p.detach().abs().sum(), torch.tensor(1.4)), 'skipped'
        step(0.0, 0.0)                           # a good one: the count starts again
    for _ in range(1, PATIENCE):
        step(nan, 0.0)
    assert 'non-finite' in refusal(step, nan, 0.0)
