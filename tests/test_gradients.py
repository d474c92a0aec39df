"""Per stage: what is frozen stays bit-identical, what is trained moves, no train mode is left."""
import re
import types

import pytest
import torch
from conftest import new_uae, shared_config

import cold_start
from lib import optimiser, ranks
import config
import reward
from data.images import open_data
from running import STAGES, arguments, refusal, tiny

LANGUAGE_MODEL = 'encoder.model.language_model.'
VISION_TOWER = 'encoder.model.visual.'
TRAINED = dict(
    cold_start=(LANGUAGE_MODEL, 'projector.', 'decoder.'),
    grpo_encoder=(LANGUAGE_MODEL,),
    grpo_decoder=('decoder.',),
    pretrain_decoder=(LANGUAGE_MODEL, 'projector.', 'decoder.'),
)
FROZEN = dict(
    cold_start=(VISION_TOWER, 'vae.'),
    grpo_encoder=(VISION_TOWER, 'vae.', 'projector.', 'decoder.'),
    grpo_decoder=(VISION_TOWER, 'vae.', 'projector.', LANGUAGE_MODEL),
)
WATCHED = ('encoder.model.language_model', 'encoder.model.visual', 'decoder', 'vae')
# parameters of a trained part that no loss can reach: the first is fed the pooled embedding of
# nothing, zeros at tiny size; the others make the text's queries in the last block, whose text
# output SD3 throws away
UNREACHABLE = (
    r'decoder\.time_text_embed\.text_embedder\.linear_1\.weight',
    r'decoder\.transformer_blocks\.3\.attn\.(add_q_proj|norm_added_q)\..*',
)


def trained_by(name, key):
    return key.startswith(TRAINED[name])


def reachable(key):
    return not any(re.fullmatch(pattern, key) for pattern in UNREACHABLE)


def copied_state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def gradient_norms(module):
    """{name: norm of the gradient, or None where there is none}."""
    norms = {}
    for key, p in module.named_parameters():
        norms[key] = None
        if p.grad is not None:
            norms[key] = p.grad.norm().item()
    return norms


class Watch:
    """What one step of a real script did: stands in for three functions that every script calls.

    uae, before: the model, and its weights before the step. grads, optimised: at the update.
    towers: [(reward tower, its weights before)]. modes: [(part, training, autograd on)] of calls.
    """

    def __init__(self, monkeypatch):
        self.towers, self.modes = [], []
        self.real_parallel, self.real_step = ranks.parallel, optimiser.Optimiser.step
        self.real_backbone = reward.Backbone.__init__
        monkeypatch.setattr(common, 'parallel', self.at_start)
        monkeypatch.setattr(optimiser.Optimiser, 'step', self.updating())
        monkeypatch.setattr(reward.Backbone, '__init__', self.tower_init())

    def at_start(self, uae, run):
        self.uae, self.before = uae, copied_state(uae)
        for part in WATCHED:
            uae.get_submodule(part).register_forward_pre_hook(self.mode_hook(part))
        return self.real_parallel(uae, run)

    def mode_hook(self, part):
        def hook(module, args):
            self.modes.append((part, module.training, torch.is_grad_enabled()))
        return hook

    def updating(self):
        def step(optimiser, number):
            self.grads = gradient_norms(self.uae)
            groups = optimiser.adamw.param_groups
            self.optimised = {id(p) for group in groups for p in group['params']}
            return self.real_step(optimiser, number)
        return step

    def tower_init(self):
        def init(tower, *args, **kwargs):
            self.real_backbone(tower, *args, **kwargs)
            self.towers.append((tower, copied_state(tower)))
        return init


@pytest.fixture(scope='module')
def one_step(tmp_path_factory):
    """name, flags -> Watch of one step of the real script."""
    done = {}

    def step(name, *extra):
        if (name, extra) not in done:
            with pytest.MonkeyPatch.context() as monkeypatch:
                watch = Watch(monkeypatch)
                tiny(name, tmp_path_factory.mktemp('step') / 'out', *extra, steps=1)
            done[name, extra] = watch
        return done[name, extra]

    return step


@pytest.mark.parametrize('name', STAGES)
def test_frozen_parts_are_bit_identical(one_step, name):
    watch = one_step(name)
    after = watch.uae.state_dict()
    parameters = dict(watch.uae.named_parameters())
    tied = {p.data_ptr() for key, p in parameters.items() if trained_by(name, key)}
    own = [key for key in after if after[key].data_ptr() not in tied]
    frozen = [key for key in own if not trained_by(name, key)]
    for part in FROZEN[name]:
        assert any(key.startswith(part) for key in frozen), part
    for key in frozen:
        assert torch.equal(watch.before[key], after[key]), key
    assert len(watch.towers) >= 2, 'reward and judge'
    for tower, before in watch.towers:
        for key, value in tower.state_dict().items():
            assert torch.equal(value, before[key]), key
        assert not tower.training
        assert not any(p.requires_grad for p in tower.parameters())
        assert all(p.grad is None for p in tower.parameters())


@pytest.mark.parametrize('name', STAGES)
def test_every_trained_parameter_moves(one_step, name):
    watch = one_step(name)
    parameters = dict(watch.uae.named_parameters())
    trained = {key: p for key, p in parameters.items() if p.requires_grad}
    assert set(trained) == {k for k in parameters if trained_by(name, k) and reachable(k)}
    stuck = [key for key, p in trained.items() if torch.equal(p, watch.before[key])]
    assert not stuck, f'{len(stuck)} parameters did not move, for example {stuck[:3]}'
    dead = [key for key in trained if not watch.grads[key]]
    assert not dead, f'no gradient reaches {dead[:3]}'
    assert watch.optimised == {id(p) for p in trained.values()}


@pytest.mark.parametrize('name', STAGES)
def test_no_gradient_is_kept_on_what_is_frozen(one_step, name):
    watch = one_step(name)
    kept = [key for key, grad in watch.grads.items() if grad is not None]
    assert all(trained_by(name, key) for key in kept)


@pytest.mark.parametrize('extra', [(), ('--checkpointing=True',)])
@pytest.mark.parametrize('name', STAGES)
def test_modes(one_step, name, extra):
    """Rollouts run in eval mode without gradients; the loss in train mode only where it must.

    Checkpointing needs it there. Afterwards everything is in eval mode.
    """
    watch = one_step(name, *extra)
    assert not any(module.training for module in watch.uae.modules())
    for part, training, grad in watch.modes:
        if part in ('encoder.model.visual', 'vae'):
            assert not training
        elif grad:
            assert training == bool(extra)
        elif name == 'cold_start' and part == 'decoder':
            pass                                 # its sampler's first steps, inside the loss
        else:
            assert not training, 'a rollout in train mode'
    policy = 'encoder.model.language_model' if name == 'grpo_encoder' else 'decoder'
    assert {grad for part, _, grad in watch.modes if part == policy} == {True, False}
    assert not any(grad for part, _, grad in watch.modes if part == 'encoder.model.visual')


def test_checkpointing_changes_no_gradient(one_step):
    for name in STAGES:
        plain = one_step(name).grads
        recomputed = one_step(name, '--checkpointing=True').grads
        for key, norm in plain.items():
            if norm:
                assert abs(norm - recomputed[key]) < 1e-3 * norm + 1e-6, key


# --- stage 1 --------------------------------------------------------------------------------------
def cold_start_loss(uae, tower, x, seen, y, mask, z, share, c):
    """Stage 1's loss of a micro-batch, through the model's own door."""
    batch = dict(x=x, y=y, mask=mask, z=z)
    return uae(cold_start.loss_of, tower, seen, batch, share, c)


def flat_gradient(module):
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.fixture(scope='module')
def stage_1():
    """grad_steps -> loss, {part: flat gradient} of the semantic loss on two images, S = 3."""
    argv = arguments('cold_start', 'nowhere', '--denoise_steps=3')
    c = config.parse(cold_start.keys, cold_start.own_presets, argv, 'cold_start.py')
    run = ranks.start(c)
    uae = new_uae(c)
    uae.train_only('encoder', 'projector', 'decoder')
    parts = dict(
        decoder=uae.decoder.transformer,
        projector=uae.projector,
        encoder=uae.encoder.vlm.model.language_model,
    )
    tower = reward.backbone('clip', c)
    train, _ = open_data(c, run)
    x = train.batch(0, 0, 2)['x']
    z = ranks.normal(uae.decoder.latent_shape(), range(2), 'test')
    with torch.no_grad():
        seen = uae.encoder.see(x)
        y, mask, _ = uae.encoder.sample(seen, 1, 0.0)

    def gradients(grad_steps):
        c.grad_steps = grad_steps
        uae.zero_grad()
        loss = cold_start_loss(uae, tower, x, seen, y, mask, z, 0.5, c)
        loss.backward()
        return loss.item(), {name: flat_gradient(module) for name, module in parts.items()}

    return gradients


def test_the_semantic_loss_reaches_decoder_projector_and_language_model(stage_1):
    loss_1, one = stage_1(1)
    loss_2, two = stage_1(2)
    loss_3, full = stage_1(3)
    loss_9, more = stage_1(9)
    assert loss_1 == loss_2 == loss_3 == loss_9, 'where gradients flow is not what is drawn'
    for part in ('decoder', 'projector', 'encoder'):
        assert one[part].norm() > 0
        assert (one[part] - two[part]).norm() > 1e-3 * two[part].norm()
        assert (two[part] - full[part]).norm() > 1e-3 * full[part].norm()
        assert torch.equal(full[part], more[part]), 'all steps are all steps'


# --- the parts ------------------------------------------------------------------------------------
def test_untied_head_and_vision_tower_are_never_trained():
    uae = new_uae(shared_config('--device=cpu'))
    untied = uae.encoder.vlm.lm_head.weight.detach().clone()
    uae.encoder.vlm.lm_head.weight = torch.nn.Parameter(untied, requires_grad=False)
    params = uae.train_only('encoder')
    names = {key for key, p in uae.named_parameters() if p.requires_grad}
    assert len(params) == len(names)
    assert all(key.startswith(LANGUAGE_MODEL) for key in names)
    with pytest.raises(KeyError):
        uae.train_only('vae')


def test_an_error_in_the_loss_leaves_eval_mode():
    uae = new_uae(shared_config('--device=cpu', '--checkpointing=True'))

    def broken(uae):
        assert uae.decoder.transformer.training
        assert uae.encoder.vlm.model.language_model.training
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        uae(broken)
    assert not any(module.training for module in uae.modules())


def test_the_reference_is_frozen_and_stays():
    """It shares what is not trained, copies what is, and does not follow the policy."""
    uae = new_uae(shared_config('--device=cpu'))
    for name in ('encoder', 'decoder'):
        uae.requires_grad_(False)
        params = uae.train_only(name)
        ref = uae.reference(name)
        frozen = getattr(ref, name)
        before = copied_state(frozen)
        with torch.no_grad():
            for p in params:
                p.add_(1.0)
        assert not any(p.requires_grad for p in frozen.parameters())
        assert all(p.requires_grad for p in params)
        for key, value in frozen.state_dict().items():
            assert torch.equal(value, before[key]), key
        assert ref.vae is uae.decoder.vae
        assert ref.projector is uae.projector
    assert ref.encoder is uae.encoder.vlm
    own = uae.encoder.vlm.model.visual.patch_embed.proj.weight
    shared = uae.reference('encoder').encoder.model.visual.patch_embed.proj.weight
    assert own.data_ptr() == shared.data_ptr()


# --- the optimiser step ---------------------------------------------------------------------------
def test_non_finite_gradients_skip_the_step_and_end_the_run(tmp_path):
    c = types.SimpleNamespace(
        lr=1.0,
        warmup=0,
        lr_decay=0.0,
        steps=9,
        grad_clip=1.0,
        patience=3,
        out_dir=str(tmp_path),
    )
    p = torch.nn.Parameter(torch.zeros(2))
    optimiser = optimiser.Optimiser([p], c)
    optimiser.adamw = torch.optim.SGD([p], lr=123.0)         # whose steps are easy to follow
    nan, infinity = float('nan'), float('inf')

    def step(*grad):
        p.grad = torch.tensor(grad)
        return optimiser.step(0)

    assert step(3.0, 4.0) == dict(grad_norm=5.0, lr=1.0, bad_steps=0)
    assert torch.allclose(p, torch.tensor([-0.6, -0.8])), 'clipped to norm 1, lr of the schedule'
    assert p.grad is None
    for _ in range(2):
        step(nan, 0.0)
        taken = step(nan, 0.0)
        assert taken['bad_steps'] == 2
        assert taken['grad_norm'] == -1, 'counted, and a JSON number'
        assert torch.allclose(p.detach().abs().sum(), torch.tensor(1.4)), 'skipped'
        step(0.0, 0.0)                           # a good one: the count starts again
    step(infinity, 0.0)
    step(nan, 0.0)
    assert 'non-finite' in refusal(step, nan, 0.0)
