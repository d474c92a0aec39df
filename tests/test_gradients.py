"""Per stage: what is frozen stays bit-identical, what is trained moves, and nothing is left in train mode."""
import importlib
import re

import pytest
import torch

import common
import config
import model
import reward
from data.images import open_data
from running import STAGES, tiny, words

TRAINED = dict(cold_start=('encoder.model.language_model.', 'projector.', 'decoder.'), grpo_encoder=('encoder.model.language_model.',),
               grpo_decoder=('decoder.',), pretrain_decoder=('encoder.model.language_model.', 'projector.', 'decoder.'))
# parameters of a trained part that no loss can reach: the first is fed the pooled embedding of nothing, zeros at tiny size;
# the others make the text's queries in the last block, whose text output SD3 throws away
UNREACHABLE = r'decoder\.(time_text_embed\.text_embedder\.linear_1\.weight|transformer_blocks\.3\.attn\.(add_q_proj|norm_added_q)\..*)'


def trained_by(name, key):
    return key.startswith(TRAINED[name])


@pytest.fixture(scope='module')
def one_step(tmp_path_factory):
    """name, flags -> (model, weights before, gradients' norms, towers with their weights before, modes seen), of one step of the real script."""
    done = {}

    def step(name, *extra):
        if (name, extra) in done:
            return done[name, extra]
        got = dict(towers=[], modes=[])
        parallel, optimise, backbone = common.parallel, common.optimise, reward.Backbone.__init__

        def at_start(uae, run):
            got.update(uae=uae, before={k: v.clone() for k, v in uae.state_dict().items()})
            for part in ('encoder.model.language_model', 'encoder.model.visual', 'decoder', 'vae'):
                module = uae.get_submodule(part)
                module.register_forward_pre_hook(lambda m, a, part=part: got['modes'].append((part, m.training, torch.is_grad_enabled())))
            return parallel(uae, run)

        def at_update(opt, params, *args):
            got.update(grads={k: None if p.grad is None else p.grad.norm().item() for k, p in got['uae'].named_parameters()},
                       optimised={id(p) for group in opt.param_groups for p in group['params']})
            return optimise(opt, params, *args)

        def tower(self, *args, **kw):
            backbone(self, *args, **kw)
            got['towers'].append((self, {k: v.clone() for k, v in self.state_dict().items()}))

        with pytest.MonkeyPatch.context() as m:
            m.setattr(common, 'parallel', at_start)
            m.setattr(common, 'optimise', at_update)
            m.setattr(reward.Backbone, '__init__', tower)
            tiny(name, tmp_path_factory.mktemp('step') / 'out', *extra, steps=1)
        done[name, extra] = got
        return got

    return step


@pytest.mark.parametrize('name', STAGES)
def test_frozen_parts_are_bit_identical(one_step, name):
    got = one_step(name)
    after = got['uae'].state_dict()
    tied = {p.data_ptr() for k, p in got['uae'].named_parameters() if trained_by(name, k)}
    frozen = [k for k in after if not trained_by(name, k) and after[k].data_ptr() not in tied]
    for part in ('encoder.model.visual.', 'vae.', *(('projector.',) if name != 'cold_start' else ()),
                 *dict(grpo_encoder=('decoder.',), grpo_decoder=('encoder.model.language_model.',)).get(name, ())):
        assert any(k.startswith(part) for k in frozen), part
    assert all(torch.equal(got['before'][k], after[k]) for k in frozen)
    assert len(got['towers']) >= 2, 'reward and judge'
    for tower, before in got['towers']:
        assert all(torch.equal(v, before[k]) for k, v in tower.state_dict().items())
        assert not tower.training and not any(p.requires_grad or p.grad is not None for p in tower.parameters())


@pytest.mark.parametrize('name', STAGES)
def test_every_trained_parameter_moves(one_step, name):
    got = one_step(name)
    parameters = dict(got['uae'].named_parameters())
    assert {k for k, p in parameters.items() if p.requires_grad} == {k for k in parameters if trained_by(name, k) and not re.fullmatch(UNREACHABLE, k)}
    stuck = [k for k, p in parameters.items() if p.requires_grad and torch.equal(p, got['before'][k])]
    assert not stuck, f'{len(stuck)} parameters did not move, for example {stuck[:3]}'
    dead = [k for k, p in parameters.items() if p.requires_grad and not got['grads'][k]]
    assert not dead, f'no gradient reaches {dead[:3]}'
    assert got['optimised'] == {id(p) for p in parameters.values() if p.requires_grad}


@pytest.mark.parametrize('name', STAGES)
def test_no_gradient_is_kept_on_what_is_frozen(one_step, name):
    got = one_step(name)
    assert all(grad is None for k, grad in got['grads'].items() if not trained_by(name, k))


@pytest.mark.parametrize('extra', [(), ('--checkpointing=True',)])
@pytest.mark.parametrize('name', STAGES)
def test_modes(one_step, name, extra):
    """Rollouts run in eval mode without gradients; the loss in train mode only where checkpointing needs it; eval after."""
    got = one_step(name, *extra)
    assert not any(m.training for m in got['uae'].modules())
    assert all(not training for part, training, _ in got['modes'] if part in ('encoder.model.visual', 'vae'))
    assert all(training == bool(extra) for part, training, grad in got['modes'] if grad and part in ('decoder', 'encoder.model.language_model'))
    if name == 'cold_start':                     # its sampler runs its first steps without gradients inside the loss
        assert all(not training for part, training, grad in got['modes'] if not grad and part != 'decoder')
    else:
        assert all(not training for _, training, grad in got['modes'] if not grad), 'a rollout in train mode'
    assert {grad for part, _, grad in got['modes'] if part == ('encoder.model.language_model' if name == 'grpo_encoder' else 'decoder')} == {True, False}
    assert not any(grad for part, _, grad in got['modes'] if part == 'encoder.model.visual')


def test_checkpointing_changes_no_gradient(one_step):
    for name in STAGES:
        a, b = (one_step(name, *extra)['grads'] for extra in ((), ('--checkpointing=True',)))
        assert all(abs(a[k] - b[k]) < 1e-3 * a[k] + 1e-6 for k in a if a[k])


# --- stage 1 -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def stage_1():
    """grad_steps -> {part: flat gradient} of the semantic loss on two images, S = 3."""
    script = importlib.import_module('cold_start')
    c = config.parse(script.keys, script.own_presets, words('cold_start', 'nowhere', '--sample_steps=3'), 'cold_start.py')
    run = common.start(c)
    uae = model.UAE(c, 'cpu')
    uae.train_only('encoder', 'projector', 'decoder')
    tower = reward.backbone('clip', c)
    x = open_data(c, run)[0].batch(0, 0, 2)['x']
    z = common.normal(uae.latent_shape(), range(2), 'test')
    with torch.no_grad():
        seen = uae.see(x)
        y, mask, _ = uae.sample_captions(seen, 1, 0.0)

    def gradients(grad_steps):
        c.grad_steps = grad_steps
        uae.zero_grad()
        loss = uae(script.loss_of, tower, x, seen, y, mask, z, 0.5, c)
        loss.backward()
        parts = dict(decoder=uae.decoder, projector=uae.projector, encoder=uae.encoder.model.language_model)
        return loss.item(), {k: torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for k, m in parts.items()}
    return gradients


def test_the_semantic_loss_reaches_decoder_projector_and_language_model(stage_1):
    (loss_1, one), (loss_2, two), (loss_3, full), (loss_9, more) = (stage_1(k) for k in (1, 2, 3, 9))
    assert loss_1 == loss_2 == loss_3 == loss_9, 'where gradients flow is not what is drawn'
    for part in ('decoder', 'projector', 'encoder'):
        assert one[part].norm() > 0
        assert (one[part] - two[part]).norm() > 1e-3 * two[part].norm() and (two[part] - full[part]).norm() > 1e-3 * full[part].norm()
        assert torch.equal(full[part], more[part]), 'all steps are all steps'


# --- the parts -----------------------------------------------------------------------------------------------------------
def test_untied_head_and_vision_tower_are_never_trained():
    uae = model.UAE(config.parse({}, {}, ['--device=cpu'], 'x.py'))
    uae.encoder.lm_head.weight = torch.nn.Parameter(uae.encoder.lm_head.weight.detach().clone(), requires_grad=False)      # untied
    params = uae.train_only('encoder')
    names = {k for k, p in uae.named_parameters() if p.requires_grad}
    assert len(params) == len(names) and all(k.startswith('encoder.model.language_model.') for k in names)
    with pytest.raises(KeyError):
        uae.train_only('vae')


def test_an_error_in_the_loss_leaves_eval_mode():
    uae = model.UAE(config.parse({}, {}, ['--device=cpu', '--checkpointing=True'], 'x.py'))

    def broken(uae):
        assert uae.decoder.training and uae.encoder.model.language_model.training
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        uae(broken)
    assert not any(m.training for m in uae.modules())


def test_the_reference_is_frozen_and_stays(one_step):
    """It shares what is not trained, copies what is, and does not follow the policy."""
    uae = model.UAE(config.parse({}, {}, ['--device=cpu'], 'x.py'))
    for name, module in (('encoder', uae.encoder.model.language_model), ('decoder', uae.decoder)):
        uae.requires_grad_(False)
        params = uae.train_only(name)
        ref = uae.reference(name)
        before = {k: v.clone() for k, v in getattr(ref, name).state_dict().items()}
        with torch.no_grad():
            for p in params:
                p.add_(1.0)
        assert not any(p.requires_grad for p in getattr(ref, name).parameters()) and all(p.requires_grad for p in params)
        assert all(torch.equal(v, before[k]) for k, v in getattr(ref, name).state_dict().items())
        assert ref.vae is uae.vae and ref.projector is uae.projector
    assert ref.encoder is uae.encoder
    assert uae.encoder.model.visual.patch_embed.proj.weight.data_ptr() == uae.reference('encoder').encoder.model.visual.patch_embed.proj.weight.data_ptr()


# --- the optimiser step ------------------------------------------------------------------------------------------------
def test_non_finite_gradients_skip_the_step_and_end_the_run(tmp_path):
    from types import SimpleNamespace
    from running import refusal
    c = SimpleNamespace(lr=1.0, warmup=0, lr_decay=0.0, steps=9, grad_clip=1.0, patience=3, out_dir=str(tmp_path))
    p = torch.nn.Parameter(torch.zeros(2))
    opt = torch.optim.SGD([p], lr=123.0)

    def step(grad):
        p.grad = torch.tensor(grad)
        return common.optimise(opt, [p], 0, c)
    assert step([3.0, 4.0]) == dict(grad_norm=5.0, lr=1.0, bad_steps=0) and torch.allclose(p, torch.tensor([-0.6, -0.8])), 'clipped to norm 1, lr from the schedule'
    assert p.grad is None
    for _ in range(2):
        for _ in range(2):
            taken = step([float('nan'), 0.0])
        assert taken['bad_steps'] == 2 and taken['grad_norm'] == -1, 'counted, and a JSON number'
        assert torch.allclose(p.detach().abs().sum(), torch.tensor(1.4)), 'skipped'
        step([0.0, 0.0])                         # a good one: the count starts again
    step([float('inf'), 0.0]), step([float('nan'), 0.0])
    assert 'non-finite' in refusal(step, [float('nan'), 0.0])
