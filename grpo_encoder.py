"""Stage 2, generation for understanding: GRPO on the captions, the decoder frozen.

    python grpo_encoder.py                                                  # tiny, the shipped base
    torchrun --nproc_per_node=2 grpo_encoder.py --init_from=out/cold_start  # tiny, two ranks
    torchrun --nproc_per_node=8 grpo_encoder.py --preset=paper --data=/data/photos \
        --init_from=out/cold_start

For each image x the vision-language model pi_phi writes G captions; each is re-encoded, drawn and
compared with x:

    y_i ~ pi_phi_old(. | x)      c_i = g(h_T(y_i))      x_hat_i ~ p_theta(. | c_i)
    R_i = cos(f_I(x), f_I(x_hat_i))             A_i = (R_i - mean R) / std R
    ratio_t = pi_phi(y_t | x, y_<t) / pi_phi_old(y_t | x, y_<t)
    J   = mean over tokens of  min(ratio A, clip(ratio) A) - kl k3(phi, ref)

Nothing rewards length. Only the language model of pi_phi is trained (`encoder`, the captioner).
Its vision tower, projector and decoder are frozen; no gradient passes through the drawing.

    paper                       here                         why
    mean over a caption, then   mean over all tokens of the  a token weighs the same in short and
    over captions               step                         long captions; key `loss_mean`
    which weights re-encode y:  tiny: the captioner's as     else each update also moves what the
    not stated                  the stage found them; medium frozen decoder reads. The other presets
                                and paper: as they are now   keep the paper's likely reading
    start noise not stated      one start noise per group    captions alone tell rewards apart
    ratio clip not stated       0.2                          PPO's; binds only if updates > 1
    h_T of the answer, which    the caption re-encoded       a true bottleneck; the paper's is
    has seen the image          alone                        `condition=answer`
    batch size 1 (v5)           tiny: 8 images, paper: 64    less noise; theirs was for the cost
    KL 1e-6 (v5)                tiny: 0.03, and a falling    it keeps captions true: without it
                                learning rate                they become a code for this decoder
    truncated captions          rewarded as they stand       what was cut off draws nothing; the
    not stated                                               field `truncated` is their share
    old log-prob not stated     float32: as recorded while   key `old_logp`; in bfloat16 another
                                sampling; bfloat16: the      batch shape is another rounding, which
                                update's own                 must not count as a policy ratio
"""
import sys

import torch

import checkpoint
import common
import watch
from config import parse
from data.images import open_data
from evaluate import Evaluator
from log import Log, Stats, caption_fields, count_skipped, reward_fields
from policy import token_logp
from reward import clip_reward, reward_tower
from tools.plan import plan

# --- script keys ---------------------------------------------------------------------------------
# those that all scripts share, as old_logp and micro_batch, are in config.py
keys = dict(
    steps = 200,               # of the loop: one rollout and `updates` optimiser steps each
    prompts = 8,               # images per rollout, all ranks together
    group = 8,                 # G captions per image; their mean reward is the baseline
    temperature = 1.0,         # of the sampling, and of the log-probs in the loss
    caption_batch = 0,         # captions sampled at once on a rank, in whole groups; 0 = all
    clip_range = (0.2, 0.2),   # ratio in [1 - a, 1 + b]; (0.2, 0.28) is clip-higher
    adv_std = True,            # divide by the group's std; False (Dr. GRPO): then a group of nearly
                               # equal rewards teaches little
    loss_mean = 'token',       # token: over all tokens of the step | caption: over each caption,
                               # then captions (GRPO, the paper) | constant: the sum / (captions *
                               # caption_len), no length normalisation at all (Dr. GRPO)
    kl = 0.03,                 # weight of the k3 estimate against the stage's initial captioner
    updates = 1,               # optimiser steps per rollout; 1 = on policy
    lr = 1e-4,                 # a larger step makes captions that the decoder does not know
    grad_clip = 1.0,           # largest gradient norm
    patience = 5,              # updates in a row with a non-finite gradient that end the run
    warmup = 0,                # loop steps of linear warm-up
    lr_decay = 1.0,            # cosine to 0 at step lr_decay * steps; 0 = constant: at this
                               # lr and without a KL the captioner then collapses (docs/results.md)
    offload = False,           # decoder and VAE wait on the CPU while the encoder is updated
    shuffle_reward = False,    # control: rewards permuted over all captions say nothing of them
)
own_presets = dict(
    tiny=dict(text_encoder='start'),        # medium and paper: the captioner as it is now
    medium=dict(steps=500, prompts=8, group=4, lr=1e-6, kl=1e-6, lr_decay=0.0),
    paper=dict(steps=500, prompts=64, group=4, lr=1e-6, kl=1e-6, lr_decay=0.0))
# -------------------------------------------------------------------------------------------------


def group_advantage(r, std=True):
    """A_i = (R_i - mean_j R_j) / (std_j R_j + 1e-4) over the group: r (P, G) -> (P, G).

    Exactly 0 where all rewards are equal. Without std it is not divided (Dr. GRPO, 2503.20783).
    """
    centred = r - r.mean(1, keepdim=True)
    equal = (r == r[:, :1]).all(1, keepdim=True)
    if std:
        centred = centred / (r.std(1, keepdim=True) + 1e-4)
    return torch.where(equal, 0.0, centred)


def token_weights(mask, config):
    """How much each sampled token weighs in the loss, by config.loss_mean. mask (B, T).

    Returns weights (B, T), 0 where no token was sampled, and count, this rank's share of what the
    weighted sum is divided by: its tokens, its captions, or its captions times T.
    """
    if config.loss_mean == 'caption':
        return mask / mask.sum(1, keepdim=True), len(mask)
    if config.loss_mean == 'token':
        return mask, mask.sum().item()
    return mask, mask.numel()


def policy_loss(logp, old_logp, adv, mask=None, clip=(0.2, 0.2)):
    """Clipped surrogate: minus the weighted mean over tokens of min(ratio A, clip(ratio) A).

    logp, old_logp (B, T), adv (B,), mask (B, T), 0 where no token was sampled, else its weight.
    Returns loss () and detached stats.
    """
    if mask is None:
        mask = torch.ones_like(logp)
    total_weight = mask.sum().clamp(min=1e-8)
    # masked before the exponential: a -inf that does not count must not become a nan
    log_ratio = torch.where(mask > 0, logp - old_logp, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1])
    A = adv[:, None]
    gain = torch.min(ratio * A, clipped * A)
    loss = -(gain * mask).sum() / total_weight
    with torch.no_grad():
        cut = ratio * A > clipped * A               # the clip has taken the gradient away
        stats = dict(ratio_max=ratio.max(), clip_frac=(cut * mask).sum() / total_weight)
    return loss, stats


def kl_k3(logp, ref_logp):
    """Elementwise, non-negative estimate of KL(pi || ref): exp(d) - d - 1, d = ref_logp - logp.

    logp, ref_logp (B, T), of tokens that were sampled from pi. Returns (B, T).
    """
    d = ref_logp - logp
    return d.exp() - d - 1


@torch.no_grad()
def rollout(uae, tower, x, index, step, config):
    """G captions per image, drawn and rewarded. x (P, 3, R, R), index (P,) in the global batch.

    All randomness is a function of (seed, step, position in the global batch, group member).
    Returns seen, features and grid of the vision tower, P rows each; a dict of y tokens, mask and
    recorded, the log-probs while sampling, (B, T), B = P * G, groups together; rewards r (P, G).
    """
    P, G = len(x), config.group
    member = (index[:, None] * G + torch.arange(G)).flatten()   # (B,), in the global batch
    uniforms = common.uniform((config.caption_len,), member, config.seed, 'token', step)
    uniforms = uniforms.to(uae.device)
    seen = uae.see(x)
    parts = []
    for images, rows, _ in common.group_slices(P, G, config.caption_batch):
        shown = common.take(seen, images)
        y, mask, logp = uae.sample_captions(shown, G, config.temperature, uniforms[rows])
        parts.append(dict(y=y, mask=mask, recorded=logp))
    batch = common.join(parts)

    z = common.normal(uae.latent_shape(), index, config.seed, 'start', step).to(uae.device)
    z = z.repeat_interleave(G, 0)                   # (B, C, H, W), one start noise per group
    rewards = []
    for images, rows, _ in common.group_slices(P, G, config.micro_batch):
        shown = common.take(seen, images)
        cond = uae.condition(batch['y'][rows], batch['mask'][rows], shown)
        x_hat = uae.to_image(uae.draw(z[rows], cond, config.sample_steps))
        rewards.append(clip_reward(x[images], x_hat, tower))    # each image with its G drawings
    r = torch.cat(rewards).view(P, G)
    return seen, batch, r


@torch.no_grad()
def reference_logp(reference, seen, y, config):
    """log pi_ref (B, T) of the sampled tokens."""
    parts = []
    for images, rows, _ in common.sample_slices(len(seen[0]), config.group, config.micro_batch):
        shown = common.take(seen, images)       # the vision tower is frozen: the same features
        parts.append(reference.caption_logp(shown, y[rows], config.temperature))
    return torch.cat(parts)


def loss_of(uae, seen, batch, share, same_weights, config):
    """A micro-batch's part of the step's loss, log fields, and the detached log-probs (B, T).

    batch: y, weight, recorded, old_logp (B, T), adv (B,), and ref_logp (B, T) if config.kl. share:
    world / the `count` of `token_weights` of all ranks. same_weights: whether the model is still
    that of the rollout.
    """
    weight = batch['weight']
    logp = uae.caption_logp(seen, batch['y'], config.temperature)
    old_logp = batch['old_logp']
    if same_weights and config.old_logp == 'replay':
        old_logp = logp.detach()                # the ratio is 1, its gradient is not 0
    loss, stats = policy_loss(logp, old_logp, batch['adv'], weight, config.clip_range)
    if config.kl:
        own_logp = torch.where(weight > 0, logp, 0.0)
        ref_logp = torch.where(weight > 0, batch['ref_logp'], 0.0)
        kl = (kl_k3(own_logp, ref_logp) * weight).sum() / weight.sum()
        loss = loss + config.kl * kl
        stats['kl'] = kl.detach()
    difference = torch.where(weight > 0, logp - batch['recorded'], 0.0)     # rounding alone
    stats['logp_diff'] = difference.detach().abs().max()
    # a mean times its weight is a sum; times share, the sums of all parts are the step's loss
    return loss * weight.sum() * share, stats, logp.detach()


def update(ddp, optimiser, seen, batch, step, run, config):
    """config.updates optimiser steps on one rollout -> log fields of the last; completes batch."""
    P = len(seen[0])
    batch['weight'], count = token_weights(batch['mask'], config)
    batch['old_logp'] = batch['recorded'].clone()
    share = run.world / common.total(count, run)        # DDP averages over ranks: hence world
    for k in range(config.updates):
        same_weights = k == 0
        stats = Stats()
        for images, rows, last in common.sample_slices(P, config.group, config.micro_batch):
            part = common.take(batch, rows)
            shown = common.take(seen, images)
            with common.no_sync(ddp, last):
                # ddp(f, ...) calls f(uae, ...), so that DDP sees the forward pass
                loss, fields, logp = ddp(loss_of, shown, part, share, same_weights, config)
                loss.backward()
            if same_weights and config.old_logp == 'replay':
                batch['old_logp'][rows] = logp          # of every later update as well
            stats.add_update(loss.detach(), fields, part['weight'].sum())
        reduced = stats.reduce(run)
        if same_weights:
            logp_diff = reduced['logp_diff']            # later it would measure the step taken
        taken = optimiser.step(step)                    # and clears the gradients
    reduced['logp_diff'] = logp_diff
    return dict(reduced, **taken)


def planned_loss(uae, tower, size, prompt_len, config):
    """For --plan: the loss of `size` captions, zeros in place of prompt, tokens and rewards."""
    y = torch.zeros(size, config.caption_len, dtype=torch.long)
    embedded = torch.zeros(size, prompt_len, uae.encoder.config.text_config.hidden_size)
    positions = torch.zeros(3, size, prompt_len, dtype=torch.long)
    states = uae.states_after(embedded, positions, y)[:, :-1]    # the last predicts no token
    logp = token_logp(states, uae.head, y, config.temperature, uae.forbidden)
    return policy_loss(logp, torch.zeros(logp.shape), torch.zeros(size), clip=config.clip_range)[0]


def main(argv):
    config = parse(keys, own_presets, argv, __file__)
    if config.condition == 'image':
        raise SystemExit('--condition=image: the decoder would not see the caption, so no caption '
                         'could be better than another')
    if config.plan:
        return plan(config, ['encoder'], planned_loss)
    run = common.start(config)
    P = common.per_rank('prompts', config.prompts, run.world)
    start_step = checkpoint.open_out_dir(config, run)
    checkpoint.watch_sigterm()
    train, held_out = open_data(config, run)
    uae = checkpoint.open_uae(config, run.device)
    params = uae.train_only('encoder')
    if config.text_encoder == 'start':
        checkpoint.freeze_text_encoder(uae)
    reference = None
    if config.kl:
        reference = checkpoint.stage_start(uae, ['encoder'], config)
    ddp = common.parallel(uae, run)
    tower = reward_tower(config, run.device)
    optimiser = common.Optimiser(params, config)
    checkpoint.restore(config, optimiser)
    log = Log(config, run)
    evaluate = Evaluator(uae, held_out, config, run, dict(reward=tower), log)
    idle = ('decoder', 'vae') if config.offload else ()

    for step in log.progress(start_step):
        evaluate.every(step)
        source = train.batch(config.seed, step, config.prompts, run.rank, run.world)
        x = source['x'].to(run.device)
        seen, batch, r = rollout(uae, tower, x, source['index'], step, config)
        all_rewards = common.gather(r, run)                     # (world * P, G), whole groups
        if config.shuffle_reward:               # what is logged is what was taught
            all_rewards = common.permuted(all_rewards, config.seed, 'shuffle', step)
        mine = all_rewards[run.rank * P:(run.rank + 1) * P]
        batch['adv'] = group_advantage(mine, config.adv_std).flatten()        # (P, G) -> (B,)
        if config.kl:
            batch['ref_logp'] = reference_logp(reference, seen, batch['y'], config)
        with uae.parked(*idle):
            fields = update(ddp, optimiser, seen, batch, step, run, config)
        if evaluate.due(step + 1) and run.master:           # one group, for tools/report.py
            watch.open_captions(uae, step + 1, x, batch, mine, config)
        logp_sum = common.total((batch['recorded'] * batch['mask']).sum(), run)
        entropy = -logp_sum / common.total(batch['mask'].sum(), run)    # estimate, nats a token
        log(step, **reward_fields(all_rewards), **fields, entropy=entropy,
            **caption_fields(uae.spoken(batch['y'], batch['mask']), run),
            skipped=count_skipped(train, held_out, run))
        checkpoint.maybe_save(config, run, step + 1, uae, optimiser)
    evaluate.every(config.steps)


if __name__ == '__main__':
    main(sys.argv[1:])
