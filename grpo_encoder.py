"""Stage 2, generation for understanding: GRPO on the captions, the decoder frozen inside the reward.

    python grpo_encoder.py                                                  # tiny, from the shipped base
    torchrun --nproc_per_node=2 grpo_encoder.py --init_from=out/cold_start  # tiny, two ranks
    torchrun --nproc_per_node=8 grpo_encoder.py --preset=paper --data=/data/photos --init_from=out/cold_start

For each image x the vision-language model pi_phi writes G captions; each is re-encoded, drawn and compared with x:
    y_i ~ pi_phi_old(. | x)     c_i = g(h_T(y_i))     x_hat_i ~ p_theta(. | c_i)     R_i = cos(f_I(x), f_I(x_hat_i))
    A_i = (R_i - mean R) / std R     ratio_t = pi_phi(y_t | x, y_<t) / pi_phi_old(y_t | x, y_<t)
    J   = mean over tokens of  min(ratio A, clip(ratio) A) - kl k3(phi, ref)

Nothing rewards length. The language model alone is trained (projector, decoder, vision tower are frozen); no gradient passes through the drawing.

    paper                                here                                 why
    mean over a caption, then captions   mean over all tokens of the step     no bias to short captions; key `loss_mean`
    start noise not stated               one start noise per group            the reward compares captions, not noise
    ratio clip not stated                0.2                                  GRPO's own; it binds only if updates > 1
    KL 1e-6 (v5)                         kl 0 and a cosine learning rate      tiny: the falling rate keeps it from collapsing (LOG.md); paper has the KL
    truncated captions not stated        rewarded as they stand               a caption cut at caption_len draws what it says; the field `truncated` is their share
    old log-prob not stated              recorded while sampling              the field `logp_diff` of every line is a real check, not a tautology
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
    steps = 200,               # updates
    prompts = 8,               # images per update, all ranks together
    group = 8,                 # G captions per image; their mean reward is the baseline
    temperature = 1.0,         # of the sampling, and of the log-probs in the loss
    clip_range = (0.2, 0.2),   # ratio in [1 - a, 1 + b]; (0.2, 0.28) is clip-higher
    adv_std = True,            # divide by the group's std; False is Dr. GRPO's: groups that hardly differ weigh less
    loss_mean = 'token',       # 'token': over all tokens of the step; 'caption': over each caption, then captions (GRPO, the paper);
                               # 'constant': the sum / (captions * caption_len) (Dr. GRPO): no length normalisation at all
    kl = 0.0,                  # weight of the k3 estimate against the stage's initial captioner
    updates = 1,               # optimiser steps per rollout; 1 = on policy: ratio 1 (`logp_diff` < 1e-5 in float32), its gradient not 0
    lr = 1e-4,                 # the language model is policy and text encoder at once: a larger step outruns the decoder (LOG.md)
    grad_clip = 1.0,           # largest gradient norm
    patience = 5,              # updates in a row with a non-finite gradient that end the run
    warmup = 0,                # updates of linear warm-up
    lr_decay = 1.0,            # cosine to 0 after lr_decay * steps updates; 0 = constant: without it and without KL
                               # the captioner collapses (README, what goes wrong)
    offload = False,           # decoder and VAE wait on the CPU while the encoder is updated
    shuffle_reward = False,    # control: rewards permuted over the batch, nothing can be learned from them
)
own_presets = dict(
    medium=dict(steps=500, prompts=8, group=4, lr=1e-6, kl=1e-6, lr_decay=0.0),
    paper=dict(steps=500, prompts=64, group=4, lr=1e-6, kl=1e-6, lr_decay=0.0))
# -------------------------------------------------------------------------------------------------------------------


def group_advantage(r, std=True):
    """A_i = (R_i - mean_j R_j) / (std_j R_j + 1e-4) over the group: r (P, G) -> (P, G); exactly 0 where all are equal.
    Without std, A_i = R_i - mean_j R_j (Dr. GRPO, arXiv 2503.20783)."""
    centred = r - r.mean(1, keepdim=True)
    equal = (r == r[:, :1]).all(1, keepdim=True)
    return torch.where(equal, 0.0, centred / (r.std(1, keepdim=True) + 1e-4) if std else centred)


def token_weights(mask, c):
    """How much each sampled token weighs in the loss, by c.loss_mean: weights (B, T), and what their sum is divided by."""
    if c.loss_mean == 'caption':
        return mask / mask.sum(1, keepdim=True), len(mask)
    return mask, mask.sum().item() if c.loss_mean == 'token' else mask.numel()


def policy_loss(logp, old_logp, adv, mask=None, clip=(0.2, 0.2)):
    """Clipped surrogate of the token policy, minus the mean over sampled tokens of min(ratio A, clip(ratio) A).

    logp, old_logp (B, T), adv (B,), mask (B, T), 0 where no token was sampled, else its weight. Returns loss () and detached stats.
    """
    mask = torch.ones_like(logp) if mask is None else mask
    valid, count = mask > 0, mask.sum().clamp(min=1e-8)
    ratio = torch.where(valid, logp - old_logp, 0.0).exp()          # a masked -inf must not become a nan
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1])
    a = adv[:, None]
    gain = torch.min(ratio * a, clipped * a)
    with torch.no_grad():
        stats = dict(ratio_max=ratio.max(), clip_frac=((ratio * a > clipped * a) * mask).sum() / count)
    return -(gain * mask).sum() / count, stats


def kl_k3(logp, ref_logp):
    """Elementwise, non-negative estimate of KL(pi || ref): exp(d) - d - 1, d = ref_logp - logp."""
    d = ref_logp - logp
    return d.exp() - d - 1


@torch.no_grad()
def rollout(uae, tower, x, index, step, c):
    """G captions per image, drawn and rewarded. x (P, 3, R, R), index (P,) position in the global batch.

    Returns seen, y, mask (1 where a token was sampled, the end token among them), old_logp (B, T), r (P, G); all randomness
    is a function of (seed, step, position in the global batch, member).
    """
    G, who = c.group, (index[:, None] * c.group + torch.arange(c.group)).flatten()
    seen = uae.see(x)
    u = common.uniform((c.caption_len,), who, c.seed, 'token', step).to(uae.device)
    y, mask, old_logp = uae.sample_captions(seen, G, c.temperature, u)
    z = common.normal(uae.latent_shape(), index, c.seed, 'start', step).to(uae.device).repeat_interleave(G, 0)
    x_hat = uae.to_image(uae.draw(z, uae.condition(y, mask, seen), c.sample_steps))
    r = clip_reward(x, x_hat, tower).view(-1, G)
    return seen, y, mask, old_logp, r


def loss_of(uae, seen, y, weight, old_logp, ref_logp, adv, share, c):
    """The whole loss of a micro-batch; weight (B, T) of `token_weights`; `share` = world / (what the step's weights are divided by)."""
    logp = uae.caption_logp(seen, y, c.temperature)
    loss, stats = policy_loss(logp, old_logp, adv, weight, c.clip_range)
    if c.kl:
        k3 = (kl_k3(*torch.where(weight > 0, torch.stack([logp, ref_logp]), 0.0)) * weight).sum() / weight.sum()
        loss, stats = loss + c.kl * k3, dict(stats, kl=k3.detach())
    stats['logp_diff'] = torch.where(weight > 0, logp - old_logp, 0.0).detach().abs().max()
    return loss * weight.sum() * share, stats


def main(argv):
    c = config.parse(keys, own_presets, argv, __file__)
    if c.condition == 'image':
        raise SystemExit('--condition=image: the decoder would not see the caption, so no caption could be better than another')
    if c.plan:
        return common.plan(c, 'encoder')
    run = common.start(c)
    P = common.per_rank('prompts', c.prompts, run.world, c.group)
    first = common.open_out_dir(c, run)
    train, held = open_data(c, run)
    uae = UAE(c, run.device)
    params = uae.train_only('encoder')
    ref = common.stage_start(uae, ['encoder'], c, run, first) if c.kl else None
    ddp = common.parallel(uae, run)
    tower = backbone(c.reward, c, run.device)
    opt = torch.optim.AdamW(params, lr=c.lr, weight_decay=0.0, fused=True)
    common.restore(c, opt)
    log, evaluate = common.Log(c, run), Evaluator(uae, held, c, run)

    for step in tqdm(range(first, c.steps), initial=first, total=c.steps, desc='grpo_encoder', disable=not run.master):
        evaluate.every(step)
        # rollout, in micro-batches of whole groups
        batch = train.batch(c.seed, step, c.prompts, run.rank, run.world)
        x = batch['x'].to(run.device)
        parts = [rollout(uae, tower, x[i], batch['index'][i], step, c) for i in common.image_slices(P, c.group, c.micro_batch)]
        seen = tuple(torch.cat(t) for t in zip(*(p[0] for p in parts)))
        y, mask, old_logp, r = (torch.cat(t) for t in list(zip(*parts))[1:])
        ref_logp = old_logp
        if ref:
            with torch.no_grad():
                ref_logp = torch.cat([ref.caption_logp(s, y[b], c.temperature) for s, b, _ in common.group_slices(seen, c.group, c.micro_batch)])

        # advantage: whole groups on one rank; the control permutes rewards over the whole batch, reproducibly
        all_r = common.gather(r, run)
        if c.shuffle_reward:
            order = torch.randperm(all_r.numel(), generator=common.generator(c.seed, 'shuffle', step))
            all_r = all_r.flatten()[order.to(all_r.device)].view_as(all_r)
        b_adv = group_advantage(all_r[run.rank * P:(run.rank + 1) * P], c.adv_std).flatten()              # (P, G) -> (B,)

        # update
        weight, count = token_weights(mask, c)
        share = run.world / common.total(count, run)                                            # of one unit of weight in the step's loss
        with uae.parked(*['decoder', 'vae'] * c.offload):
            for k in range(c.updates):
                stats = common.Stats()
                for s, b, last in common.group_slices(seen, c.group, c.micro_batch):
                    with common.no_sync(ddp, not last):
                        loss, stat = ddp(loss_of, s, y[b], weight[b], old_logp[b], ref_logp[b], b_adv[b], share, c)
                        loss.backward()
                    stats.add(weight[b].sum(), loss=loss.detach(), **stat)
                stats = stats.reduce(run)
                diff = stats['logp_diff'] if k == 0 else diff                   # after an update they rightly differ
                taken = common.optimise(opt, params, step, c)
        words = (y != uae.end) * mask                                                                   # without end tokens
        entropy = -common.total((old_logp * mask).sum(), run) / common.total(mask.sum(), run)   # of the policy, nats a token, estimated
        log(step, **common.reward_fields(all_r), **dict(stats, logp_diff=diff), **taken, entropy=entropy,
            caption_len=common.total(words.sum(), run) / all_r.numel(), truncated=common.total(words[:, -1].sum(), run) / all_r.numel(),
            skipped=int(common.total(len(train.skipped), run)) + held['skipped'])
        common.maybe_save(c, run, step + 1, uae, opt)
    evaluate.every(c.steps, last=True)


if __name__ == '__main__':
    main(sys.argv[1:])
