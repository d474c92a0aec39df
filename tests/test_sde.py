"""decoder.sde_step: an ODE step without noise, a Gaussian with its own log-density with it.

And, where the velocity is known exactly, a sampler of the right distribution.
"""
import math
import types

import pytest
import torch

from decoder import sde_step
from grpo_decoder import window

KINDS = ('flow', 'cps', 'cps_exact')
kinds = pytest.mark.parametrize('kind', KINDS)
SHAPE = (3, 4, 6, 6)


def latents(seed=0):
    """z, v and a noise, each (3, 4, 6, 6)."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=g) for _ in range(3)]


def flat(std):
    return std.flatten().tolist()


# --- one step -------------------------------------------------------------------------------------
@kinds
@pytest.mark.parametrize('s, s_next', [(1.0, 0.9), (0.7, 0.4), (0.2, 0.0), (1.0, 0.0)])
def test_no_noise_is_the_euler_step(kind, s, s_next):
    z, v, noise = latents()
    z_next, logp, mean, std = sde_step(z, v, s, s_next, kind, 0.0, noise=noise)
    torch.testing.assert_close(z_next, z + (s_next - s) * v, atol=1e-5, rtol=0)
    torch.testing.assert_close(mean, z_next)
    assert torch.equal(logp, torch.zeros(3))
    assert not std.any()


# a noise level as a float, () or (B,)
FORMS = dict(float=float, scalar=torch.tensor, batch=lambda s: torch.full((3,), s))


@kinds
@pytest.mark.parametrize('s, s_next', [(1.0, 0.9), (0.9, 0.5), (0.4, 0.01)])
@pytest.mark.parametrize('form', FORMS)
def test_logp_is_the_mean_log_density(kind, s, s_next, form):
    z, v, noise = latents()
    s, s_next = FORMS[form](s), FORMS[form](s_next)
    z_next, logp, mean, std = sde_step(z, v, s, s_next, kind, 0.7, noise=noise)
    assert logp.shape == (3,)
    assert z_next.shape == mean.shape == z.shape
    assert std.shape == (3, 1, 1, 1)
    assert (std > 0).all()
    torch.testing.assert_close(z_next, mean + std * noise)
    density = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(z_next)
    if kind == 'cps':                            # its authors drop the constants, 2 std^2 too
        density = -(z_next - mean) ** 2
    torch.testing.assert_close(logp, density.mean((1, 2, 3)), atol=1e-5, rtol=1e-5)
    scored = sde_step(z, v, s, s_next, kind, 0.7, z_next=z_next)
    assert torch.equal(scored[1], logp)
    assert torch.equal(scored[0], z_next)
    other = sde_step(z, v, s, s_next, kind, 0.7, z_next=z_next + 3 * std)[1]
    assert (other < logp).all()


@kinds
def test_sigmas_of_a_batch_are_each_sample_s_own(kind):
    z, v, noise = latents()
    s, s_next = torch.tensor([1.0, 0.6, 0.3]), torch.tensor([0.8, 0.5, 0.0])
    whole = sde_step(z, v, s, s_next, kind, 0.7, noise=noise)
    for i in range(3):
        b = slice(i, i + 1)
        one = sde_step(z[b], v[b], s[i].item(), s_next[i].item(), kind, 0.7, noise=noise[b])
        for alone, together in zip(one, whole):
            torch.testing.assert_close(alone, together[b], atol=1e-6, rtol=1e-5)


def test_flow_mean_and_std():
    """Drift v - sigma^2/2 score, score = -E[eps | z] / s.

    Diffusion sigma = noise_level sqrt(s / (1 - s)).
    """
    z, v, _ = latents()
    for s, s_next in ((0.9, 0.7), (0.5, 0.45), (0.3, 0.0)):
        sigma2 = 0.7 ** 2 * s / (1 - s)
        score = -(z + (1 - s) * v) / s
        want = z + (s_next - s) * (v - sigma2 / 2 * score)
        _, _, mean, std = sde_step(z, v, s, s_next, 'flow', 0.7)
        torch.testing.assert_close(mean, want, atol=1e-5, rtol=1e-5)
        assert flat(std) == pytest.approx([math.sqrt(sigma2 * (s - s_next))] * 3, rel=1e-5)


@pytest.mark.parametrize('s, s_next', [
    (1.0, 0.75),
    (torch.tensor([1.0, 1.0, 0.5]), torch.tensor([0.75, 0.75, 0.2])),
], ids=['float', 'batch'])
def test_flow_at_pure_noise_borrows_the_next_sigma(s, s_next):
    """sigma is infinite at s = 1; there sqrt(1 / (1 - s_next)) stands in, in mean and std."""
    z, v, noise = latents()
    found = sde_step(z, v, s, s_next, 'flow', 0.6, noise=noise)
    assert all(value.isfinite().all() for value in found)
    _, _, mean, std = found
    sigma = 0.6 * math.sqrt(1 / 0.25)
    assert flat(std)[:2] == pytest.approx([sigma * math.sqrt(0.25)] * 2, rel=1e-5)
    want = z - 0.25 * (v + sigma ** 2 / 2 * z)
    torch.testing.assert_close(mean[:2], want[:2], atol=1e-5, rtol=1e-5)


def test_cps_mean_and_std():
    """Image and noise estimate mixed at s_next, a share sin(noise_level pi / 2) of it fresh."""
    z, v, _ = latents()
    for s, s_next in ((1.0, 0.8), (0.5, 0.4)):
        _, _, mean, std = sde_step(z, v, s, s_next, 'cps', 0.8)
        fresh = s_next * math.sin(0.4 * math.pi)
        assert flat(std) == pytest.approx([fresh] * 3, rel=1e-5)
        image, noise = z - s * v, z + (1 - s) * v
        want = (1 - s_next) * image + math.sqrt(s_next ** 2 - fresh ** 2) * noise
        torch.testing.assert_close(mean, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('kind', ['cps', 'cps_exact'])
def test_cps_last_step_has_no_density(kind):
    z, v, noise = latents()
    z_next, logp, mean, std = sde_step(z, v, 0.2, 0.0, kind, 0.9, noise=noise)
    assert not std.any() and not logp.any()
    assert torch.equal(z_next, mean)
    torch.testing.assert_close(mean, z - 0.2 * v)


@kinds
def test_gradient_goes_through_the_mean_only(kind):
    z, v, noise = latents()
    v.requires_grad_()
    s, s_next = 0.6, 0.5
    z_next, logp, mean, std = sde_step(z, v, s, s_next, kind, 0.7, noise=noise)
    assert not z_next.requires_grad              # a sample is data
    got = torch.autograd.grad(logp.sum(), v, retain_graph=True)[0]
    slope = (noise / std).detach() / v[0].numel()
    if kind == 'cps':
        slope = 2 * (std * noise).detach() / v[0].numel()
    want = torch.autograd.grad(mean, v, grad_outputs=slope)[0]
    assert got.abs().max() > 1e-4
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-3)
    given = z_next.clone().requires_grad_()
    logp = sde_step(z, v, s, s_next, kind, 0.7, z_next=given)[1]
    again, none = torch.autograd.grad(logp.sum(), (v, given), allow_unused=True)
    assert none is None
    torch.testing.assert_close(again, got)


@kinds
def test_gradient_is_finite_where_std_is_zero(kind):
    z, v, _ = latents()
    v.requires_grad_()
    s, s_next = torch.tensor([1.0, 0.5, 0.2]), torch.tensor([0.5, 0.2, 0.0])
    for level in (0.0, 0.7):
        logp = sde_step(z, v, s, s_next, kind, level, z_next=z)[1]
        grad = torch.autograd.grad(logp.sum(), v)[0]
        assert grad.isfinite().all()
        assert bool(grad.any()) == (level > 0)


@kinds
def test_float32_whatever_comes_in(kind):
    z, v, noise = (t.bfloat16() for t in latents())
    s = torch.tensor(0.7, dtype=torch.bfloat16)
    drawn = sde_step(z, v, s, 0.3, kind, 0.7, noise=noise)
    scored = sde_step(z, v, 0.7, 0.3, kind, 0.7, z_next=noise)
    for t in (*drawn, *scored):
        assert t.dtype == torch.float32
    exact = sde_step(z.double(), v.double(), 0.7, 0.3, kind, 0.7, noise=noise.float())
    single = sde_step(z, v, 0.7, 0.3, kind, 0.7, noise=noise.float())
    torch.testing.assert_close(single[2], exact[2])


def test_a_generator_makes_it_reproducible():
    z, v, _ = latents()

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return sde_step(z, v, 0.7, 0.5, generator=generator)[0]

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))
    members = sde_step(z[:1].expand(SHAPE), v[:1].expand(SHAPE), 0.7, 0.5)[0]
    assert (members.std(0) > 0).all(), 'and without one each sample has its own noise'


def test_unknown_kind():
    z, v, _ = latents()
    with pytest.raises(ValueError, match='euler'):
        sde_step(z, v, 0.7, 0.5, 'euler')


# --- many steps -----------------------------------------------------------------------------------
MU, SD = 0.8, 0.5


def exact_velocity(z, s):
    """E[eps - z_0 | z_s] for z_0 ~ N(MU, SD^2): z_s is Gaussian, so the mean is linear in it."""
    var = (1 - s) ** 2 * SD ** 2 + s ** 2
    slope = (s - (1 - s) * SD ** 2) / var
    return -MU + slope * (z - (1 - s) * MU)


def moments(noise_level, sigmas):
    """Mean and variance that `flow` ends with, exactly.

    With this velocity a step is affine in z and in the noise.
    """
    mean, var, two = 0.0, 1.0, torch.tensor([[0.0], [1.0]])
    for s, s_next in zip(sigmas, sigmas[1:]):
        v = exact_velocity(two, s)
        _, _, ends, std = sde_step(two, v, s, s_next, 'flow', noise_level)
        offset = ends[0].item()
        slope = (ends[1] - ends[0]).item()
        mean = offset + slope * mean
        var = slope ** 2 * var + std[0].item() ** 2
    return mean, var


@pytest.mark.parametrize('noise_level', [0.7, 0.3, 0.0])
def test_sampler_ends_in_the_data_s_distribution(noise_level):
    """1-D Gaussian data and the exact velocity: the SDE has the ODE's marginals.

    So both end with the data's moments.
    """
    mean, var = moments(noise_level, torch.linspace(1, 0, 201).tolist())
    assert mean == pytest.approx(MU, rel=0.02)
    assert var == pytest.approx(SD ** 2, rel=0.02)


def test_cps_keeps_the_schedule_s_noise():
    """A point mass and its exact velocity: after each step the noise has the std s_next."""
    g = torch.Generator().manual_seed(0)
    z0 = torch.tensor([[-1.5], [0.3], [2.0]])
    z = torch.randn(3, 20000, generator=g)
    sigmas = torch.linspace(1, 0, 11).tolist()
    for s, s_next in zip(sigmas, sigmas[1:]):
        z = sde_step(z, (z - z0) / s, s, s_next, 'cps', 0.8, generator=g)[0]
        rest = z - (1 - s_next) * z0
        assert rest.std().item() == pytest.approx(s_next, rel=0.01, abs=1e-5)
    torch.testing.assert_close(z, z0.expand_as(z), atol=1e-5, rtol=0)


# --- which steps ----------------------------------------------------------------------------------
def window_config(S, W, n, sde='flow'):
    return types.SimpleNamespace(denoise_steps=S, noisy_steps=W, trained_steps=n, seed=0, sde=sde)


@pytest.mark.parametrize('S, W, n', [(8, 7, 3), (8, 20, 3), (10, 3, 3), (10, 2, 5), (10, 9, 9)])
def test_window_never_holds_the_last_step(S, W, n):
    """In the first half if it fits there, with each of its places and trained steps met."""
    config = window_config(S, W, n)
    length = min(W, S - 1)
    begins, offsets = set(), set()
    for step in range(60):
        (begin, end), trained = window(step, config, None)
        assert 0 <= begin < end < S
        assert end - begin == length
        assert length > S // 2 or end <= S // 2
        assert trained == sorted(set(trained))
        assert len(trained) == min(n, length)
        assert set(trained) <= set(range(begin, end))
        assert window(step, config, None) == ((begin, end), trained)
        begins.add(begin)
        offsets |= {number - begin for number in trained}
    assert offsets == set(range(length))
    assert begins == set(range(max(0, S // 2 - length) + 1))


@pytest.mark.parametrize('sde', ['cps', 'cps_exact'])
def test_cps_steps_that_end_near_no_noise_are_never_noisy(sde):
    sigmas = torch.tensor([1, 0.5, 0.03, 0.015, 0])          # the third step ends below .02
    for step in range(20):
        assert window(step, window_config(4, 3, 3), sigmas)[0] == (0, 3)
        assert window(step, window_config(4, 3, 3, sde), sigmas)[0] == (0, 2)
    with pytest.raises(SystemExit, match='needs more steps'):
        window(0, window_config(2, 1, 1, sde), torch.tensor([1, 0.01, 0]))
