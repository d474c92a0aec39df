"""Each loss does what it is for: a toy policy finds the best arm, a Gaussian step moves to its target, and with shuffled
rewards neither does; the two supervised losses fall on a batch they may memorise."""
import copy

import pytest
import torch
from conftest import G, P, at

import cold_start
import grpo_decoder
import grpo_encoder
import pretrain_decoder
from model import sde_step
from reward import Backbone, clip_reward


def shuffled(r, g):
    return r.flatten()[torch.randperm(r.numel(), generator=g)].view_as(r)


def bandit(shuffle, seed=0, steps=60, arms=5, best=3):
    """Captions of two tokens over five words, reward 1 for the best word first: p(best) before and after."""
    g = torch.Generator().manual_seed(seed)
    theta = torch.zeros(2, arms, requires_grad=True)
    opt = torch.optim.SGD([theta], lr=0.5)
    for _ in range(steps):
        p = theta.detach().softmax(-1)
        y = torch.stack([torch.multinomial(p[t], 8 * 8, True, generator=g) for t in range(2)], 1)
        old = p.log().expand(64, -1, -1).gather(2, y[..., None])[..., 0]
        r = (y[:, 0] == best).float().view(8, 8) + 0.1 * torch.randn(8, 8, generator=g) + torch.arange(8.)[:, None]
        adv = grpo_encoder.group_advantage(shuffled(r, g) if shuffle else r).flatten()
        logp = theta.log_softmax(-1).expand(64, -1, -1).gather(2, y[..., None])[..., 0]
        loss, _ = grpo_encoder.policy_loss(logp, old, adv, torch.ones(64, 2))
        opt.zero_grad()
        loss.backward()
        opt.step()
    return theta.detach().softmax(-1)[0, best].item() - 1 / arms


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_token_policy_finds_the_best_arm(seed):
    assert bandit(False, seed) > 0.25
    assert abs(bandit(True, seed)) < 0.15


def walk(shuffle, kind, seed=0, steps=60):
    """One denoising step in two dimensions, reward: near the target. How much nearer the step's mean comes."""
    g = torch.Generator().manual_seed(seed)
    s, s_next, z, target = 0.6, 0.4, torch.zeros(1, 2), torch.tensor([[0.6, -0.4]])
    v = torch.zeros(1, 2, requires_grad=True)
    opt = torch.optim.SGD([v], lr=0.5)
    start = None
    for _ in range(steps):
        wide = z.expand(64, -1)
        with torch.no_grad():
            z_next, old, mean, _ = sde_step(wide, v.expand(64, -1), s, s_next, kind, 0.7, generator=g)
        start = mean[0] if start is None else start
        r = -(z_next - target).norm(dim=1).view(8, 8)
        adv = grpo_decoder.group_advantage(shuffled(r, g) if shuffle else r).flatten()
        logp = sde_step(wide, v.expand(64, -1), s, s_next, kind, 0.7, z_next=z_next)[1]
        loss, stats = grpo_decoder.policy_loss(logp[:, None], old[:, None], adv, clip=(0.2, 0.2))
        assert stats['ratio_max'] == 1
        opt.zero_grad()
        loss.backward()
        opt.step()
    return 1 - ((mean[0] - target).norm() / (start - target).norm()).item()


@pytest.mark.parametrize('kind', ['flow', 'cps'])
def test_step_policy_moves_to_its_target(kind):
    assert walk(False, kind) > 0.5
    assert abs(walk(True, kind)) < 0.2


def fall(loss, params, steps=15, lr=1e-3):
    """Loss before and after so many steps of Adam on one batch."""
    opt, first = torch.optim.Adam(params, lr=lr), None
    for _ in range(steps):
        opt.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        opt.step()
        first = value.item() if first is None else first
    with torch.no_grad():
        return first, loss().item()


def test_flow_matching_learns_a_batch(uae, x, sampled):
    """A decoder from scratch: at first it predicts next to nothing, so the loss is |eps - z_0|^2; then it falls."""
    from diffusers import SD3Transformer2DModel
    u, (y, mask, _) = copy.deepcopy(uae), sampled
    torch.manual_seed(0)
    u.decoder = SD3Transformer2DModel.from_config(u.decoder.config)
    params = u.train_only('projector', 'decoder')
    z0, g = u.to_latent(x), torch.Generator().manual_seed(0)
    eps, s = torch.randn(z0.shape, generator=g), torch.tensor([0.2, 0.4, 0.6, 0.8])
    first, last = fall(lambda: pretrain_decoder.flow_loss(u, z0, y[::G], mask[::G], s, eps), params)
    nothing = (eps - z0).square().mean().item()
    assert first == pytest.approx(nothing, rel=0.3)
    assert last < 0.8 * first


def test_flow_loss_is_the_velocity_s_error(uae, x, sampled):
    """z_s = (1 - s) z_0 + s eps, target eps - z_0: the right answer costs nothing and the other sign costs most."""
    u, (y, mask, _) = copy.copy(uae), sampled
    z0, s = uae.to_latent(x), torch.tensor([0.2, 0.4, 0.6, 0.8])
    eps = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    calls = []
    u.velocity = lambda z, s, c: calls.append((z, s, c)) or eps - z0
    assert pretrain_decoder.flow_loss(u, z0, y[::G], mask[::G], s, eps) == 0
    z, at_s, c = calls[0]
    for i in range(P):
        torch.testing.assert_close(z[i], z0[i] + s[i] * (eps[i] - z0[i]))
    assert torch.equal(at_s, s) and torch.equal(c, uae.condition(y[::G], mask[::G]))
    u.velocity = lambda z, s, c: z0 - eps
    assert pretrain_decoder.flow_loss(u, z0, y[::G], mask[::G], s, eps).item() == pytest.approx(4 * (eps - z0).square().mean().item(), rel=1e-5)


def test_cold_start_learns_a_batch(uae, x, seen, sampled):
    u, (y, mask, _) = copy.deepcopy(uae), sampled
    params = u.train_only('encoder', 'projector', 'decoder')
    tower = Backbone('clip', u.c.clip, u.c.judge)
    c = at(u, sample_steps=4, grad_steps=2).c
    z = torch.randn(P, *u.latent_shape(), generator=torch.Generator().manual_seed(0))

    def reward():
        with torch.no_grad():
            x_hat = u.to_image(u.draw(z, u.condition(y[::G], mask[::G]), 4))
            return clip_reward(x, x_hat, tower).mean().item()

    before = reward()
    first, last = fall(lambda: cold_start.reconstruction_loss(u, tower, x, seen, y[::G], mask[::G], z, c), params)
    assert first == pytest.approx(1 - before, abs=1e-4) and last == pytest.approx(1 - reward(), abs=1e-4)
    assert 0.02 < first < 2 and last < 0.7 * first


def test_caption_loss_learns_a_batch(uae, seen, sampled):
    """Cross-entropy over valid tokens: before, minus the mean recorded log-prob; then it falls."""
    u, (y, mask, logp) = copy.deepcopy(uae), sampled
    params = u.train_only('encoder')
    first, last = fall(lambda: pretrain_decoder.caption_loss(u, seen, y, mask), params)
    assert first == pytest.approx(-(logp.sum() / mask.sum()).item(), abs=1e-4)
    assert last < 0.7 * first
