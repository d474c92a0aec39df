"""Stage 3, understanding for generation: GRPO on the denoising steps, the encoder frozen as prompter (Flow-GRPO).

    python grpo_decoder.py --init_from=out/grpo_encoder                     # tiny
    torchrun --nproc_per_node=8 grpo_decoder.py --preset=paper --data=/data/photos --init_from=out/grpo_encoder

The encoder captions x once; the diffusion transformer p_theta draws that caption G times, each denoising step a Gaussian
policy (an SDE with the ODE's marginals), and learns from which of the G drawings looks most like x:
    c = g(h_T(y))     z_{s'} ~ N(mean_theta(z_s, c), std^2)     R_i = cos(f_I(x), f_I(x_hat_i))     A_i = (R_i - mean R) / std R
    ratio_s = p_theta(z_{s'} | z_s, c) / p_theta_old(z_{s'} | z_s, c)
    J       = mean over steps of  min(ratio A, clip(ratio) A) - kl mean (mean_theta - mean_ref)^2 / (2 std^2)

    paper                          here                                      why
    "Flow-GRPO style"              log-density is the mean over dimensions   Flow-GRPO's code: the ratio stays near 1, hence the clip of 1e-4
    KL of Flow-GRPO drops |dt|     the Gaussians' own KL, per dimension      exact; `kl` weighs 1/|dt| more than Flow-GRPO's beta, .02 there is .002 here at S = 10
    all steps trained              `train_steps` of a window of noisy ones   time; without bias for the window, whose place is drawn from the first half
    last step                      never trained                             its standard deviation goes to 0 and the density to infinity
    c = {c_text, c_img}            condition=text in every preset           the text alone is a true bottleneck; --condition=text+image is the paper's
    caption temperature            0 (greedy)                                the captioner's best caption; a key
"""
import sys

import torch
from tqdm import tqdm

import common
import config
from data.images import open_data
from evaluate import Evaluator
from model import UAE
from reward import backbone, clip_reward

# --- script keys ---------------------------------------------------------------------------------------------------
keys = dict(
    steps = 120,               # updates
    prompts = 8,               # images per update, all ranks together
    group = 16,                # G drawings per image; their mean reward is the baseline
    caption_temperature = 0.0, # of the frozen captioner; one caption per image, shared by the group
    sde = 'flow',              # 'flow' or 'cps' (coefficient-preserving: no excess noise in the last steps)
    noise_level = 0.7,         # of the SDE; 0.8 is usual with cps
    sde_window = 7,            # how many steps are noisy, the others are ODE steps; at most sample_steps - 1
    train_steps = 3,           # of those, drawn anew each update; all replayed in one forward pass
    same_noise = False,        # one start noise for the whole group
    clip_range = (1e-4, 1e-4), # ratio in [1 - a, 1 + b]; narrow, as a log-density is a mean over dimensions
    kl = 0.0,                  # weight of the Gaussian KL against the stage's initial decoder
    updates = 1,               # optimiser steps per rollout
    lr = 2e-4,
    grad_clip = 1.0,           # largest gradient norm
    patience = 5,              # updates in a row with a non-finite gradient that end the run
    warmup = 0,                # updates of linear warm-up
    lr_decay = 1.0,            # cosine to 0 after lr_decay * steps updates; 0 = constant
    offload = False,           # encoder and VAE wait on the CPU while the decoder is updated
    shuffle_reward = False,    # control: rewards permuted over the batch
    compile = False,           # the transformer blocks, compiled in the first update; needs a compiler, when it pays: README
)
own_presets = dict(
    medium=dict(steps=500, prompts=8, group=8, lr=3e-4, sde_window=3, train_steps=3, sde='cps', noise_level=0.8, clip_range=(1e-5, 1e-5)),
    paper=dict(steps=500, prompts=48, group=24, lr=3e-4, kl=0.002, sde_window=9, train_steps=9))
# -------------------------------------------------------------------------------------------------------------------


def group_advantage(r):
    """A_i = (R_i - mean_j R_j) / (std_j R_j + 1e-4) over the group: r (P, G) -> (P, G); exactly 0 where all are equal."""
    centred = r - r.mean(1, keepdim=True)
    equal = (r == r[:, :1]).all(1, keepdim=True)
    return torch.where(equal, 0.0, centred / (r.std(1, keepdim=True) + 1e-4))


def policy_loss(logp, old_logp, adv, mask=None, clip=(0.2, 0.2)):
    """Clipped surrogate of the step policy, minus the mean over denoising steps of min(ratio A, clip(ratio) A).

    logp, old_logp (B, S) per-step log-densities, adv (B,), mask (B, S) or None. Returns loss () and detached stats.
    """
    mask = torch.ones_like(logp) if mask is None else mask
    valid, count = mask > 0, mask.sum().clamp(min=1e-8)
    ratio = torch.where(valid, logp - old_logp, 0.0).exp()
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1])
    a = adv[:, None]
    gain = torch.min(ratio * a, clipped * a)
    with torch.no_grad():
        stats = dict(ratio_max=ratio.max(), clip_frac=((ratio * a > clipped * a) * mask).sum() / count)
    return -(gain * mask).sum() / count, stats


def kl_gauss(mean, ref_mean, std):
    """KL of two Gaussian steps of equal std, |mean - ref_mean|^2 / (2 std^2), mean over everything. (B, S, C, H, W)."""
    return ((mean - ref_mean) ** 2 / (2 * std ** 2)).mean()


def window(step, c):
    """(first, last + 1) of the noisy steps of this update, and which of them are trained (sorted offsets from first)."""
    W = min(c.sde_window, c.sample_steps - 1)                       # never the last step
    g = common.generator(c.seed, 'window', step)
    first = torch.randint(max(0, c.sample_steps // 2 - W) + 1, (), generator=g).item()
    return (first, first + W), sorted(torch.randperm(W, generator=g)[:c.train_steps].tolist())


@torch.no_grad()
def rollout(uae, tower, x, index, step, c, neg=None):
    """G drawings of each image's caption, and their rewards. x (P, 3, R, R), index (P,) position in the global batch,
    neg: the unconditional branch's condition, if there is guidance.

    Returns cond (B, cond_len, D), path (z, z_next; with guidance also v0) each (B, W, C, H, W), old_logp (B, W), r (P, G), words (P,).
    """
    G, who = c.group, (index[:, None] * c.group + torch.arange(c.group)).flatten()
    seen = uae.see(x)
    u = common.uniform((c.caption_len,), index, c.seed, 'token', step).to(uae.device)
    y, mask, _ = uae.sample_captions(seen, 1, c.caption_temperature, u)
    cond = uae.condition(y, mask, seen).repeat_interleave(G, 0)
    if c.same_noise:
        z = common.normal(uae.latent_shape(), index, c.seed, 'start', step).repeat_interleave(G, 0)
    else:
        z = common.normal(uae.latent_shape(), who, c.seed, 'start', step)
    noisy, _ = window(step, c)
    noise = common.normal((noisy[1] - noisy[0], *uae.latent_shape()), who, c.seed, 'sde', step)
    z0, path, old_logp = uae.draw_sde(z.to(uae.device), cond, c.sample_steps, noise.to(uae.device), c.sde, c.noise_level, noisy, neg)
    r = clip_reward(x, uae.to_image(z0), tower).view(-1, G)
    return cond, *path, old_logp, r, ((y != uae.end) * mask).sum(1)


def loss_of(uae, ref, cond, z, z_next, old_logp, adv, step, share, c, neg=None, v0=()):
    """The whole loss of a micro-batch; `share` = world / samples of the step; v0: as the rollout left it, in a step's first update."""
    noisy, trained = window(step, c)
    args = trained, cond, c.sample_steps, c.sde, c.noise_level, noisy[0], neg
    logp, mean, std = uae.step_logp((z, z_next, *v0), *args)
    loss, stats = policy_loss(logp, old_logp[:, trained], adv, clip=c.clip_range)
    if c.kl:
        with torch.no_grad():
            ref_mean = ref.step_logp((z, z_next), *args)[1]
        kl = kl_gauss(mean, ref_mean, std)
        loss, stats = loss + c.kl * kl, dict(stats, kl=kl.detach())
    stats['logp_diff'] = (logp - old_logp[:, trained]).detach().abs().max()
    return loss * len(logp) * share, stats


def compile_blocks(*uaes):
    """Regional compilation in place: every transformer block of the decoders by itself, one compilation for blocks of a kind and all batch sizes."""
    for uae in filter(None, uaes):
        for block in uae.decoder.transformer_blocks:
            block.compile(dynamic=True)


def main(argv):
    c = config.parse(keys, own_presets, argv, __file__)
    if min(c.sde_window, c.sample_steps - 1) < 1:
        raise SystemExit('no noisy step is left to train: sde_window >= 1 and sample_steps >= 2 are needed')
    if c.plan:
        return common.plan(c, 'decoder')
    run = common.start(c)
    P = common.per_rank('prompts', c.prompts, run.world, c.group)
    first = common.open_out_dir(c, run)
    train, held = open_data(c, run)
    uae = UAE(c, run.device)
    params = uae.train_only('decoder')
    ref = common.stage_start(uae, ['decoder'], c, run, first) if c.kl else None
    if c.compile:
        compile_blocks(uae, ref)
    ddp = common.parallel(uae, run)
    tower = backbone(c.reward, c, run.device)
    opt = torch.optim.AdamW(params, lr=c.lr, weight_decay=0.0, fused=True)
    common.restore(c, opt)
    neg = uae.negative() if c.guidance != 1.0 else None                       # the encoder is frozen: once
    log, evaluate = common.Log(c, run), Evaluator(uae, held, c, run)

    for step in tqdm(range(first, c.steps), initial=first, total=c.steps, desc='grpo_decoder', disable=not run.master):
        evaluate.every(step)
        # rollout, in micro-batches of whole groups
        batch = train.batch(c.seed, step, c.prompts, run.rank, run.world)
        x = batch['x'].to(run.device)
        parts = [rollout(uae, tower, x[i], batch['index'][i], step, c, neg) for i in common.image_slices(P, c.group, c.micro_batch)]
        cond, z, z_next, *v0, old_logp, r, words = (torch.cat(t) for t in zip(*parts))

        # advantage: whole groups on one rank; the control permutes rewards over the whole batch, reproducibly
        all_r = common.gather(r, run)
        if c.shuffle_reward:
            order = torch.randperm(all_r.numel(), generator=common.generator(c.seed, 'shuffle', step))
            all_r = all_r.flatten()[order.to(all_r.device)].view_as(all_r)
        b_adv = group_advantage(all_r[run.rank * P:(run.rank + 1) * P]).flatten()                       # (P, G) -> (B,)

        # update
        with uae.parked(*['encoder', 'vae'] * c.offload):
            for k in range(c.updates):
                stats = common.Stats()
                for (_,), b, last in common.group_slices((r,), c.group, c.micro_batch):
                    with common.no_sync(ddp, not last):
                        known = [t[b] for t in v0] if k == 0 else []            # the first update has the rollout's weights
                        loss, stat = ddp(loss_of, ref, cond[b], z[b], z_next[b], old_logp[b], b_adv[b], step, run.world / all_r.numel(), c, neg, known)
                        loss.backward()
                    stats.add(len(b_adv[b]), loss=loss.detach(), **stat)
                stats = stats.reduce(run)
                diff = stats['logp_diff'] if k == 0 else diff                   # after an update they rightly differ
                taken = common.optimise(opt, params, step, c)
        log(step, **common.reward_fields(all_r), **dict(stats, logp_diff=diff), **taken,
            caption_len=common.total(words.sum(), run) / c.prompts,
            skipped=int(common.total(len(train.skipped), run)) + held['skipped'])
        common.maybe_save(c, run, step + 1, uae, opt)
    evaluate.every(c.steps, last=True)


if __name__ == '__main__':
    main(sys.argv[1:])
