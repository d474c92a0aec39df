"""The supervised losses: their values where they are known, and that they fall on a batch that may
be learned by heart."""
import copy

import pytest
import torch
from conftest import G, P, at

import cold_start
import pretrain_decoder
from reward import backbone, clip_reward


def fall(loss, params, steps=15, lr=1e-3):
    """Loss before and after so many steps of Adam on one batch."""
    opt = torch.optim.Adam(params, lr=lr)
    first = None
    for _ in range(steps):
        opt.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        opt.step()
        if first is None:
            first = value.item()
    with torch.no_grad():
        return first, loss().item()


@pytest.fixture
def captions(sampled):
    """One caption of each image: y, mask, logp (P, T)."""
    y, mask, logp = sampled
    return y[::G], mask[::G], logp[::G]


@pytest.fixture
def noised(uae, x):
    """What flow matching mixes: z0, eps (P, C, H, W) and s (P,)."""
    z0 = uae.decoder.to_latent(x)
    eps = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    return z0, eps, torch.tensor([0.2, 0.4, 0.6, 0.8])


def test_flow_matching_learns_a_batch(uae, captions, noised):
    """A decoder from scratch: at first it predicts next to nothing, the loss is |eps - z_0|^2.

    Then it falls.
    """
    from diffusers import SD3Transformer2DModel
    u, (y, mask, _), (z0, eps, s) = copy.deepcopy(uae), captions, noised
    torch.manual_seed(0)
    u.decoder.transformer = SD3Transformer2DModel.from_config(u.decoder.transformer.config)
    params = u.train_only('projector', 'decoder')
    first, last = fall(lambda: pretrain_decoder.flow_loss(u, z0, y, mask, s, eps), params)
    nothing = (eps - z0).square().mean().item()
    assert first == pytest.approx(nothing, rel=0.3)
    assert last < 0.8 * first


def test_flow_loss_is_the_velocity_s_error(uae, captions, noised):
    """z_s = (1 - s) z_0 + s eps, target eps - z_0, some conditions dropped for the negative.

    The right answer costs nothing and the other sign costs most.
    """
    u, (y, mask, _), (z0, eps, s) = at(uae), captions, noised
    calls = []

    def right(z, s, c):
        calls.append((z, s, c))
        return eps - z0

    u.decoder.velocity = right
    drop = torch.tensor([False, True, False, True])
    assert pretrain_decoder.flow_loss(u, z0, y, mask, s, eps, drop=drop) == 0
    z, s_seen, c = calls[0]
    for i in range(P):
        torch.testing.assert_close(z[i], z0[i] + s[i] * (eps[i] - z0[i]))
    assert torch.equal(s_seen, s)
    expected = uae.condition(y, mask)
    expected[drop] = uae.negative()
    assert torch.equal(c, expected)
    u.decoder.velocity = lambda z, s, c: z0 - eps
    most = 4 * (eps - z0).square().mean().item()
    wrong = pretrain_decoder.flow_loss(u, z0, y, mask, s, eps)
    assert wrong.item() == pytest.approx(most, rel=1e-5)


def test_cold_start_learns_a_batch(uae, x, vision, captions):
    u, (y, mask, _) = copy.deepcopy(at(uae, denoise_steps=4, grad_steps=2)), captions
    params = u.train_only('encoder', 'projector', 'decoder')
    tower = backbone('clip', u.config)
    z = torch.randn(P, *u.decoder.latent_shape(), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def reward():
        x_hat = u.draw(z, u.condition(y, mask), 4)
        return clip_reward(x, x_hat, tower).mean().item()

    def loss():
        return cold_start.reconstruction_loss(u, tower, x, y, mask, z, vision, u.config)

    before = reward()
    first, last = fall(loss, params)
    assert first == pytest.approx(1 - before, abs=1e-4)
    assert last == pytest.approx(1 - reward(), abs=1e-4)
    assert 0.02 < first < 2
    assert last < 0.7 * first


def test_caption_loss_learns_a_batch(uae, vision, sampled):
    """Cross-entropy over valid tokens: before, minus the mean recorded log-prob; then it falls."""
    u, (y, mask, logp) = copy.deepcopy(uae), sampled
    params = u.train_only('encoder')
    first, last = fall(lambda: pretrain_decoder.caption_loss(u, vision, y, mask), params)
    assert first == pytest.approx(-(logp.sum() / mask.sum()).item(), abs=1e-4)
    assert last < 0.7 * first
