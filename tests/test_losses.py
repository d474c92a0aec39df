"""The equations of the two GRPO scripts: advantage, clipped surrogate, KL.

Every number worked out by hand.
"""
import ast
import inspect
import math
import textwrap

import pytest
import torch

import grpo_decoder
import grpo_encoder

SCRIPTS = [grpo_encoder, grpo_decoder]
both = pytest.mark.parametrize('script', SCRIPTS, ids=lambda s: s.__name__)


# --- advantage ------------------------------------------------------------------------------------
@both
def test_advantage_hand_table(script):
    r = torch.tensor([[0., 1., 2., 3.], [5., 5., 5., 9.], [.5, .5, .5, .5]])
    a, b = math.sqrt(5 / 3) + 1e-4, 2 + 1e-4     # sample standard deviations sqrt(5/3) and 2
    want = torch.tensor([
        [-1.5 / a, -.5 / a, .5 / a, 1.5 / a],
        [-1 / b, -1 / b, -1 / b, 3 / b],
        [0., 0., 0., 0.],
    ])
    torch.testing.assert_close(script.group_advantage(r), want, atol=1e-6, rtol=0)


@both
def test_advantage_of_a_narrow_group_is_damped_by_1e_4(script):
    adv = script.group_advantage(torch.tensor([[0., 1e-4]]))
    # the standard deviation is 1e-4 / sqrt(2): without the 1e-4 the result were 0.7071
    want = torch.tensor([[-1., 1.]]) * 0.5 / (math.sqrt(.5) + 1)
    torch.testing.assert_close(adv, want, atol=1e-5, rtol=0)


@both
def test_advantage_is_centred_in_each_group(script):
    """Groups at different levels: each has mean 0 and its own order, wherever it stands."""
    g = torch.Generator().manual_seed(0)
    r = torch.rand(6, 5, generator=g) + torch.arange(6.)[:, None] * 3
    adv = script.group_advantage(r)
    assert r.mean(1).std() > 1                   # the batch mean is nobody's mean
    assert adv.mean(1).abs().max() < 1e-5
    assert torch.allclose(adv.std(1), torch.ones(6), atol=2e-3)
    assert torch.equal(adv.argsort(1), r.argsort(1))
    assert torch.allclose(script.group_advantage(r - 7), adv, atol=1e-4)
    rows, columns = torch.tensor([3, 0, 4, 1, 2, 5]), torch.tensor([2, 0, 3, 1, 4])
    moved = script.group_advantage(r[rows][:, columns])
    assert torch.allclose(moved, adv[rows][:, columns], atol=1e-4)


@both
def test_advantage_of_equal_rewards_is_exactly_zero(script):
    rounds = 0
    for value in (0.3, 0.1 * 3, 0.7, 1 / 3, 0.9999, -0.1, 1e-3):
        for G in (2, 3, 5, 6, 7, 11, 12, 24):
            r = torch.full((2, G), value)
            centred = r - r.mean(1, keepdim=True)
            rounds += bool(centred.any())
            r[1, 0] += 1                         # a neighbour that does differ
            adv = script.group_advantage(r)
            assert not adv[0].any()
            assert adv[1].abs().min() > 0
            assert adv.isfinite().all()
    assert rounds, 'none of these means rounds: the test would not see a missing guard'


def code(f):
    """A function's code without docstring and comments."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(f)))
    tree.body[0].body = tree.body[0].body[1:]
    return ast.unparse(tree)


def test_the_twins_are_equal():
    """Repeated on purpose, so they may not drift apart."""
    advantage = code(grpo_encoder.group_advantage).replace(', std=True', '')
    advantage = advantage.replace('if std:\n        centred', 'centred')
    assert advantage == code(grpo_decoder.group_advantage)
    loss = code(grpo_encoder.policy_loss).replace("ratio='token'", "ratio='step'")
    assert loss == code(grpo_decoder.policy_loss)


# --- clipped surrogate ----------------------------------------------------------------------------
# adv, ratio -> min(ratio A, clipped ratio A), and whether it has a gradient; the ratio is clipped
# to [0.8, 1.28]: below, inside (outside a symmetric 0.2), above
TABLE = [
    (2., 0.5, 1.0, True),
    (2., 1.25, 2.5, True),
    (2., 1.5, 2.56, False),
    (-2., 0.5, -1.6, False),
    (-2., 1.25, -2.5, True),
    (-2., 1.5, -3.0, True),
]
CLIP = (0.2, 0.28)


@both
def test_surrogate_hand_table(script):
    for adv, ratio, gain, learns in TABLE:
        logp = torch.tensor([[math.log(ratio) - 3]], requires_grad=True)
        old_logp = torch.tensor([[-3.]])
        loss, stats = script.policy_loss(logp, old_logp, torch.tensor([adv]), clip=CLIP)
        loss.backward()
        slope = -ratio * adv if learns else 0
        assert loss.item() == pytest.approx(-gain, abs=1e-5)
        assert logp.grad.item() == pytest.approx(slope, abs=1e-5)
        assert stats['ratio_max'].item() == pytest.approx(ratio, abs=1e-5)
        assert stats['clip_frac'].item() == (not learns)

    adv, ratio, gain, _ = (torch.tensor(column) for column in zip(*TABLE))
    loss, stats = script.policy_loss(ratio.log()[:, None], torch.zeros(6, 1), adv, clip=CLIP)
    assert loss.item() == pytest.approx(-gain.mean().item(), abs=1e-6)
    assert stats['clip_frac'].item() == pytest.approx(2 / 6)
    assert stats['ratio_max'].item() == pytest.approx(1.5)
    assert not any(value.requires_grad for value in stats.values())


@both
def test_default_clip_is_20_percent_either_side(script):
    old_logp, one = torch.zeros(1, 1), torch.ones(1)
    up, _ = script.policy_loss(torch.tensor([[1.]]), old_logp, one)
    down, _ = script.policy_loss(torch.tensor([[-1.]]), old_logp, -one)
    assert up.item() == pytest.approx(-1.2)
    assert down.item() == pytest.approx(0.8)


def batch(B=6, T=5, seed=0):
    """logp, old_logp (B, T), adv (B,), mask: captions of 1 .. T tokens, the last the end token."""
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(B, T, generator=g)
    old_logp = -3 * torch.rand(B, T, generator=g)
    adv = torch.randn(B, generator=g)
    length = torch.arange(B) % T + 1
    mask = (torch.arange(T) < length[:, None]).float()
    return logp.requires_grad_(), old_logp, adv, mask


INF = math.inf
JUNK = [(-INF, -INF), (-INF, 0.), (0., -INF), (500., -500.), (math.nan, math.nan)]


@both
@pytest.mark.parametrize('junk', JUNK)
def test_masked_tokens_weigh_nothing(script, junk):
    """Whatever stands behind the end token: its gradient is exactly 0, no one else's changes."""
    logp, old_logp, adv, mask = batch()
    clean_loss, clean = script.policy_loss(logp, old_logp, adv, mask)
    want = torch.autograd.grad(clean_loss, logp)[0]
    dirty = torch.where(mask > 0, logp, junk[0]).detach().requires_grad_()
    dirty_old = torch.where(mask > 0, old_logp, junk[1])
    loss, stats = script.policy_loss(dirty, dirty_old, adv, mask)
    loss.backward()
    assert (mask == 0).any() and not want[mask == 0].any()
    assert torch.equal(dirty.grad, want)
    assert loss.item() == clean_loss.item()
    assert stats == clean


@both
def test_no_valid_token_is_no_nan(script):
    logp, old_logp, adv, mask = batch()
    loss, stats = script.policy_loss(logp, old_logp, adv, torch.zeros_like(mask))
    loss.backward()
    assert loss.item() == 0
    assert not logp.grad.any()
    assert all(value.isfinite() for value in stats.values())


# --- KL -------------------------------------------------------------------------------------------
def test_k3():
    log2 = math.log(2)
    logp = torch.tensor([-1., -1., -1.], requires_grad=True)
    ref_logp = torch.tensor([-1., -1 + log2, -1 - log2])    # d = 0, ln 2, -ln 2
    kl = grpo_encoder.kl_k3(logp, ref_logp)
    assert kl.tolist() == pytest.approx([0., 1 - log2, log2 - 0.5], abs=1e-6)
    kl.sum().backward()                          # descent raises what the reference likes more
    assert logp.grad.tolist() == pytest.approx([0., -1., 0.5], abs=1e-6)


def test_k3_is_not_negative_and_estimates_the_kl():
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(8, generator=g).log_softmax(0) for _ in range(2))
    k3 = grpo_encoder.kl_k3(p, q)
    assert (k3 >= 0).all()
    assert k3.max() > 0.1
    estimate, kl = (p.exp() * k3).sum(), (p.exp() * (p - q)).sum()
    assert estimate.item() == pytest.approx(kl.item(), abs=1e-5)


def test_kl_gauss_is_the_exact_one_per_dimension():
    g = torch.Generator().manual_seed(0)
    mean, ref_mean = (torch.randn(3, 2, 4, 5, 5, generator=g) for _ in range(2))
    std = torch.rand(3, 2, 1, 1, 1, generator=g) + 0.2
    policy = torch.distributions.Normal(mean, std.expand_as(mean))
    reference = torch.distributions.Normal(ref_mean, std.expand_as(ref_mean))
    want = torch.distributions.kl_divergence(policy, reference).mean()
    mean.requires_grad_()
    kl = grpo_decoder.kl_gauss(mean, ref_mean, std)
    assert kl.item() == pytest.approx(want.item(), rel=1e-5)
    kl.backward()
    assert torch.equal(mean.grad.sign(), (mean - ref_mean).detach().sign())
    assert grpo_decoder.kl_gauss(ref_mean, ref_mean, std) == 0


# --- switches: Dr. GRPO, means --------------------------------------------------------------------
def test_dr_grpo_does_not_divide_by_the_std():
    r = torch.tensor([[0.1, 0.2, 0.6], [0.5, 0.5, 0.5]])
    adv = grpo_encoder.group_advantage(r, std=False)
    torch.testing.assert_close(adv, torch.tensor([[-0.2, -0.1, 0.3], [0., 0., 0.]]))
    assert torch.equal(adv[1], torch.zeros(3)), 'exactly'


MEANS = dict(
    token=lambda gain, mask: (gain * mask).sum() / mask.sum(),
    caption=lambda gain, mask: ((gain * mask).sum(1) / mask.sum(1)).mean(),
    constant=lambda gain, mask: (gain * mask).sum() / mask.numel())


@pytest.mark.parametrize('cuts', ([8], [3, 3, 2], [1] * 8), ids=str)
@pytest.mark.parametrize('name', MEANS)
def test_the_three_means_over_tokens(name, cuts):
    """A step's loss and gradient against the mean written out, however the step is cut.

    As the loop adds them up: a micro-batch's mean times its weight, over the step's count.
    """
    logp, old_logp, adv, mask = batch(8)
    ratio = (logp - old_logp).exp()
    A = adv[:, None]
    gain = torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A)
    want = -MEANS[name](gain, mask)
    weight, count = grpo_encoder.token_weights(mask, name)
    assert not weight[mask == 0].any()
    loss = 0
    for rows in torch.arange(8).split(cuts):
        part, _ = grpo_encoder.policy_loss(
            logp[rows], old_logp[rows], adv[rows], mask[rows], weight=weight[rows])
        loss = loss + part * weight[rows].sum() / count
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    got = torch.autograd.grad(loss, logp, retain_graph=True)[0]
    torch.testing.assert_close(got, torch.autograd.grad(want, logp)[0])
    assert mask.sum(1).unique().numel() > 1, 'of one length all three are the same up to a factor'


# --- GSPO -----------------------------------------------------------------------------------------
@both
def test_the_ratio_of_a_sequence(script):
    """GSPO (arXiv 2507.18071): s_i = exp(sum of log-ratios / length), clipped as a whole.

    Its gradient spreads A s_i over the sequence's own entries, 1 / length each.
    """
    clip = (0.05, 0.1)
    logp, old_logp, adv, mask = batch()
    old_logp = logp.detach() * 0.7 + old_logp * 0.3          # ratios on both sides of the clip
    junk = torch.where(mask > 0, logp, -math.inf)
    loss, stats = script.policy_loss(junk, old_logp, adv, mask, clip, ratio='sequence')
    total, slopes, ratios, cut = 0.0, torch.zeros_like(mask), [], 0
    for i, n in enumerate(mask.sum(1).int().tolist()):
        s = math.exp(sum(logp[i, t].item() - old_logp[i, t].item() for t in range(n)) / n)
        A = adv[i].item()
        clipped = min(max(s, 1 - clip[0]), 1 + clip[1])
        total += n * min(s * A, clipped * A)
        ratios.append(s)
        if s * A > clipped * A:
            cut += n
        else:
            slopes[i, :n] = -s * A / mask.sum()
    assert 0 < cut < mask.sum()
    assert loss.item() == pytest.approx(-total / mask.sum().item(), rel=1e-5)
    assert stats['ratio_max'].item() == pytest.approx(max(ratios), rel=1e-5)
    assert stats['clip_frac'].item() == pytest.approx(cut / mask.sum().item(), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], slopes)
