"""DiffusionNFT: its loss by hand, the old policy; micro-batches and a resume change nothing."""
import shutil

import pytest
import torch

import nft_decoder
from config import parse
from comparing import check_same_training, optimizer_state, plain_descent, timeless_log
from data.images import open_data
from reward import backbone
from running import ALONE, Recorder, arguments, lines, same, tiny, weights

N, SHAPE = 5, (2, 3, 3)


@pytest.fixture(scope='module')
def rows():
    """v, v_old, z_s, z_0, s of N rows in float64."""
    noise = torch.Generator().manual_seed(0)
    v, v_old, z_s, z_0 = torch.randn(4, N, *SHAPE, generator=noise, dtype=torch.float64)
    s = torch.tensor([0.1, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
    return v, v_old, z_s, z_0, s


def by_hand(v, v_old, z_s, z_0, s, good, beta):
    """The loss of one row, number by number."""
    found = []
    for i in range(N):
        loss = 0.0
        for share, sign in ((good[i], 1), (1 - good[i], -1)):
            velocity = (1 - sign * beta) * v_old[i] + sign * beta * v[i]
            off = (z_s[i] - s[i] * velocity - z_0[i]).flatten()
            loss += share * (off @ off) / len(off) / (off.abs().sum() / len(off))
        found.append(loss)
    return torch.stack(found)


@pytest.mark.parametrize('beta', [1.0, 0.3])
def test_the_loss_by_hand(rows, beta):
    good = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    found = nft_decoder.nft_loss(*rows, good, beta)
    torch.testing.assert_close(found, by_hand(*rows, good, beta))


def test_the_gradient_goes_towards_good_drawings_and_away_from_bad_ones(rows):
    """On policy it is (2 r - 1) b times the gradient of |z_s - s v - z_0|^2 / w, w a constant."""
    v, _, z_s, z_0, s = rows
    off = z_s - s.view(-1, 1, 1, 1) * v - z_0
    w = off.abs().mean((1, 2, 3), keepdim=True)
    of_flow_matching = -2 * s.view(-1, 1, 1, 1) * off / w / off[0].numel()
    for beta in (1.0, 0.3):
        good = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
        leaf = v.clone().requires_grad_()
        nft_decoder.nft_loss(leaf, v, z_s, z_0, s, good, beta).sum().backward()
        share = beta * (2 * good - 1).view(-1, 1, 1, 1)
        torch.testing.assert_close(leaf.grad, share * of_flow_matching)


def test_the_old_policy_follows_what_is_trained():
    old, new = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    new.bias.requires_grad_(False)
    weight, bias = old.weight.detach().clone(), old.bias.detach().clone()
    kept = nft_decoder.follow(old, new, 0.75)
    assert list(kept) == ['weight'] and kept['weight'].data_ptr() == old.weight.data_ptr()
    torch.testing.assert_close(old.weight, 0.75 * weight + 0.25 * new.weight)
    assert torch.equal(old.bias, bias)


SMALL = ('--group=4', '--denoise_steps=3', '--warmup=0', '--levels=2', '--batch=2')


def test_a_step_is_flow_matching_on_its_drawings_times_the_clipped_advantage(
        monkeypatch, tmp_path):
    """On policy b cancels. Drawing by drawing and level by level, from the rollout alone."""
    recorder = Recorder(monkeypatch)
    argv = arguments('nft_decoder', tmp_path, *SMALL, '--clip_adv=0.8', '--beta=0.5', steps=1)
    nft_decoder.main(argv)
    config = parse(nft_decoder.keys, nft_decoder.own_presets, argv, 'nft_decoder.py')
    [update] = recorder.updates
    uae, tower = recorder.uae, backbone('clip', config)
    recorder.back_to(update)
    images = open_data(config, ALONE)[0].batch(config.seed, 0, 2)
    sampled, r, _ = nft_decoder.rollout(uae, uae.decoder, tower, images, 0, config)
    adv = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)
    assert adv.abs().max() > 0.8 > adv.abs().min(), 'some are clipped'
    for i, A in enumerate(adv.flatten().clamp(-0.8, 0.8)):
        for s, eps in zip(sampled['s'][i], sampled['eps'][i]):
            z_0 = sampled['z_0'][i:i + 1]
            z_s = (1 - s) * z_0 + s * eps
            off = z_s - s * uae.decoder.velocity(z_s, s.view(1), sampled['c'][i:i + 1]) - z_0
            loss = A * off.square().mean() / off.detach().abs().mean()
            (loss / sampled['s'].numel()).backward()
    for key, p in uae.named_parameters():
        if p.requires_grad:
            assert (update.grads[key] - p.grad).norm() < 1e-3 * p.grad.norm() + 1e-6, key


def test_micro_batches_equal_the_whole(tmp_path, monkeypatch):
    plain_descent(monkeypatch)
    for size in (0, 3, 1):
        tiny('nft_decoder', tmp_path / f'{size}', *SMALL, '--lr=0.03', f'--micro_batch={size}')
    for size in (3, 1):
        check_same_training(tmp_path / '0' / 'step_000002', tmp_path / f'{size}' / 'step_000002')


def test_resume_is_bitwise_with_an_old_policy(tmp_path):
    whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
    switches = (*SMALL, '--old_decay=0.5', '--save_every=1', '--eval_every=1')
    tiny('nft_decoder', whole, *switches, steps=3)
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns('step_000003'))
    tiny('nft_decoder', resumed, *switches, '--resume', steps=3)
    assert same(weights(whole / 'step_000003'), weights(resumed / 'step_000003'))
    states = [optimizer_state(out / 'step_000003') for out in (whole, resumed)]
    assert same(*states)
    old = states[0]['extra']['old']
    present = weights(whole / 'step_000003' / 'decoder' / 'transformer')
    name = 'transformer.pos_embed.proj.weight'
    file = 'diffusion_pytorch_model.safetensors'
    assert not torch.equal(old[name], present[f'{file}:{name.removeprefix("transformer.")}'])
    assert timeless_log(whole) == timeless_log(resumed)
    assert lines(whole / 'eval.jsonl') == lines(resumed / 'eval.jsonl')


def test_shuffled_rewards_teach_something_else(tmp_path):
    for name, flag in (('a', False), ('b', True)):
        tiny('nft_decoder', tmp_path / name, *SMALL, f'--shuffle_reward={flag}')
    a, b = (lines(tmp_path / name / 'log.jsonl') for name in ('a', 'b'))
    assert a[0]['reward'] == pytest.approx(b[0]['reward'], abs=1e-6)
    assert a[0]['grad_norm'] != b[0]['grad_norm']
