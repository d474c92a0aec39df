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
    which weights re-encode y:  tiny: a frozen copy from     else each update also moves what the
    not stated                  before the first stage 2;    frozen decoder reads. Medium and paper
                                medium, paper: the           keep the likely reading of the text
                                captioner as it is now
    start noise not stated      one start noise per group    captions alone tell rewards apart
    ratio clip not stated       0.2                          PPO's; binds only if epochs > 1
    h_T: the answer's states,   the caption re-encoded       a true bottleneck, as in the authors'
    which have seen the image   alone                        demo; their training's, in their file,
                                                             is `condition=answer`
    batch size 1 (arXiv v5)     tiny: 8 images, paper: 64    less noise; theirs was for the cost
    G = 4, lr 1e-6 (v5)         medium, paper: the same;     a small model takes larger steps
                                tiny: 8, 1e-4, falling
    KL 1e-6 (v5)                medium, paper: the same;     it keeps captions true: without it
                                tiny: 0.03                   they become a code for this decoder
    captions without an end     rewarded as they stand       log field `truncated` is their share;
    token: not stated                                        `cut` counts what cond_len cannot hold
    LoRA of rank 32             tiny: all of the language    it is small; `lora_rank` is set by
                                model; medium, paper: theirs the presets medium and paper
    guidance 5                  tiny, medium: 1; paper: 5    two passes a denoising step, and half
                                                             the time of the drawings without
    old log-prob not stated     float32: as recorded while   in bfloat16 another batch shape is
                                sampling; bfloat16: the      another rounding, which must not count
                                update's own, ratio 1        as a policy ratio
"""
import sys

import torch

from config import parse
from data.images import open_data
from lib import checkpoint, ranks, watch
from lib.log import Log, Stats, caption_fields, count_skipped, reward_fields
from lib.optimiser import Optimiser
from lib.scores import Evaluator
from reward import clip_reward, reward_tower

# --- script keys ---------------------------------------------------------------------------------
# those that all scripts share are in config.py
keys = dict(
    steps = 300,               # of the loop: one rollout and `epochs` optimiser steps each
    batch = 8,                 # images an update, all ranks together
    group = 8,                 # G captions per image; their mean reward is the baseline
    temperature = 1.0,         # of the sampling, and of the log-probs in the loss
    ratio = 'token',           # token | sequence: exp of a caption's mean log-ratio; GSPO, with
                               # loss_mean='caption' and a clip_range of about 0.01
    clip_range = (0.2, 0.2),   # ratio in [1 - a, 1 + b]; (0.2, 0.28) is clip-higher
    adv_std = True,            # divide by the group's std; False (Dr. GRPO): then a group of nearly
                               # equal rewards teaches little
    loss_mean = 'token',       # token: over all tokens of the step | caption: over each caption,
                               # then captions (GRPO, the paper) | constant: the sum / (captions *
                               # caption_len), no length normalisation at all (Dr. GRPO)
    kl = 0.03,                 # weight of the k3 estimate against the stage's initial captioner
    text_encoder = 'start',    # what re-encodes captions: start, the language model as the first
                               # stage 2 found it | live, the captioner as it is now
    epochs = 1,                # optimiser steps per rollout; 1 = on policy
    lr = 1e-4,                 # a larger step makes captions that the decoder does not know
    warmup = 0,                # loop steps of linear warm-up
    lr_decay = 1.0,            # cosine to 0 at step lr_decay * steps; 0 = constant: at a
                               # larger lr without a KL the captioner collapses (docs/results.md)
    offload = False,           # encoder, decoder and towers are on the GPU only while they work
    shuffle_reward = False,    # control: rewards permuted over all captions say nothing of them
)
own_presets = dict(
    tiny=dict(denoise_steps=4),             # coarse drawings rank captions as well
    medium=dict(steps=500, group=4, text_encoder='live', lr=1e-6, kl=1e-6, lr_decay=0.0,
                micro_batch=4),
    paper=dict(steps=500, batch=64, group=4, text_encoder='live', lr=1e-6, kl=1e-6, lr_decay=0.0))
limits = dict(
    batch=(1, 1e6), group=(2, 1e4), temperature=(0.01, 10), epochs=(1, 1000),
    ratio=('token', 'sequence'), loss_mean=('token', 'caption', 'constant'),
    text_encoder=('start', 'live'))
# -------------------------------------------------------------------------------------------------


def group_advantage(r, std=True):
    """A_i = (R_i - mean_j R_j) / (std_j R_j + 1e-4) over the group: r (P, G) -> (P, G).

    std over G - 1. Exactly 0 where all rewards are equal. Without std it is not divided (Dr. GRPO,
    arXiv 2503.20783).
    """
    centred = r - r.mean(1, keepdim=True)
    equal = (r == r[:, :1]).all(1, keepdim=True)
    if std:
        centred = centred / (r.std(1, keepdim=True) + 1e-4)
    return torch.where(equal, 0.0, centred)


def token_weights(mask, loss_mean):
    """How much each sampled token weighs in the loss. mask (B, T).

    Returns weights (B, T), 0 where no token was sampled, and count, this rank's share of what the
    weighted sum is divided by: its tokens, its captions, or its captions times T.
    """
    if loss_mean == 'caption':
        return mask / mask.sum(1, keepdim=True), len(mask)
    if loss_mean == 'token':
        return mask, mask.sum().item()
    return mask, mask.numel()


def policy_loss(logp, old_logp, adv, mask=None, clip=(0.2, 0.2), ratio='token', weight=None):
    """Clipped surrogate: minus the weighted mean over tokens of min(ratio A, clip(ratio) A).

    logp, old_logp (B, T), adv (B,), mask (B, T), 0 where no token was sampled. ratio 'sequence':
    one for the whole caption, exp of its mean log-ratio (GSPO, arXiv 2507.18071). weight (B, T) of
    each token; None = the mask. Returns loss () and detached stats.
    """
    if mask is None:
        mask = torch.ones_like(logp)
    if weight is None:
        weight = mask
    total_weight = weight.sum().clamp(min=1e-8)
    # masked before the exponential: a -inf that does not count must not become a nan
    log_ratio = torch.where(mask > 0, logp - old_logp, 0.0)
    if ratio == 'sequence':
        length = mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio.sum(1, keepdim=True) / length).expand_as(logp)
    ratios = log_ratio.exp()
    clipped = ratios.clamp(1 - clip[0], 1 + clip[1])
    A = adv[:, None]
    gain = torch.min(ratios * A, clipped * A)
    loss = -(gain * weight).sum() / total_weight
    with torch.no_grad():
        cut = ratios * A > clipped * A              # the clip has taken the gradient away
        stats = dict(ratio_max=ratios.max(), clip_frac=(cut * weight).sum() / total_weight)
    return loss, stats


def kl_k3(logp, ref_logp):
    """Elementwise, non-negative estimate of KL(pi || ref): exp(d) - d - 1, d = ref_logp - logp.

    logp, ref_logp (B, T), of tokens that were sampled from pi. Returns (B, T).
    """
    d = ref_logp - logp
    return d.exp() - d - 1


@torch.no_grad()
def rollout(uae, tower, images, step, config):
    """G captions per image, drawn and rewarded. images: x (P, 3, R, R), index (P,) in the batch.

    All randomness is a function of (seed, step, position in the global batch, group member).
    Returns a dict of y, mask and recorded (the log-probs while sampling), all (B, T), B = P * G,
    groups together; rewards r (P, G); and vision, P rows.
    """
    x, index = images['x'].to(uae.device), images['index']
    P, G = len(x), config.group
    member = (index[:, None] * G + torch.arange(G)).flatten()   # (B,), in the global batch
    uniforms = ranks.uniform((config.caption_len,), member, config.seed, 'token', step)
    vision = uae.encoder.see(x)
    y, mask, recorded = uae.encoder.sample(vision, G, config.temperature, uniforms.to(uae.device))

    z = ranks.normal(uae.decoder.latent_shape(), index, config.seed, 'start', step)
    z = z.to(uae.device).repeat_interleave(G, 0)    # (B, C, H, W), one start noise per group
    c = uae.condition(y, mask, vision)
    x_hat = uae.draw(z, c, config.denoise_steps)
    r = clip_reward(x, x_hat, tower, uae.encoder.texts(y, mask))    # an image with its G drawings
    return dict(y=y, mask=mask, recorded=recorded), r.view(P, G), vision


def main(argv):
    config = parse(keys, own_presets, argv, __file__, limits)
    if config.condition == 'image':
        raise SystemExit('--condition=image: the decoder would not see the caption, so no caption '
                         'could be better than another')
    run = ranks.start(config)
    P, G = ranks.per_rank('batch', config.batch, run.world), config.group
    start_step = checkpoint.open_out_dir(config, run)
    train, held_out = open_data(config, run)
    uae = checkpoint.open_uae(config, run.device)
    params = uae.train_only('encoder')
    checkpoint.choose_text_encoder(uae, config.text_encoder)
    reference = None
    if config.kl:
        # a frozen copy of what is trained: with LoRA of the adapters alone
        reference = checkpoint.open_reference(uae, ['encoder'], config).encoder
    policy = ranks.parallel(uae.encoder, run)           # its forward pass is the log-prob
    tower = reward_tower(config, run.device)
    optimiser = Optimiser(params, config)
    checkpoint.restore(config, optimiser)
    log = Log(config, run)
    evaluate = Evaluator(uae, held_out, config, run, dict(reward=tower), log)
    if config.offload:
        parts = [uae.encoder, reference], [uae.decoder], evaluate.towers.values()
        ranks.take_turns(run.device, *parts)
    # old_logp: in float32 the log-prob recorded while sampling; in bfloat16, where that differs by
    # rounding, the first epoch's own, detached
    old_is_own = config.dtype == 'bfloat16'

    for step in log.progress(start_step):
        evaluate.every(step)
        images = train.batch(config.seed, step, config.batch, run.rank, run.world)
        sampled, r, vision = rollout(uae, tower, images, step, config)

        all_r = ranks.gather(r, run)                            # (world * P, G), whole groups
        if config.shuffle_reward:               # what is logged is what was taught
            all_r = ranks.permuted(all_r, config.seed, 'shuffle', step)
        r = all_r[run.rank * P:(run.rank + 1) * P]
        sampled['adv'] = group_advantage(r, config.adv_std).flatten()       # (P, G) -> (B,)
        sampled['weight'], count = token_weights(sampled['mask'], config.loss_mean)
        sampled['old_logp'] = sampled['recorded'].clone()
        # loss = sum over all ranks of weight x token loss / count; DDP averages: hence world
        scale = run.world / ranks.total(count, run)

        health = Stats()
        uae.train()                             # turns on the recomputation of activations
        for epoch in range(config.epochs):
            stats = Stats()
            for shown, rows, last in ranks.sample_slices(P, G, config.micro_batch):
                part = ranks.take(sampled, rows)
                seen = ranks.take(vision, shown)
                valid = part['mask'] > 0
                with ranks.no_sync(policy, last):
                    logp = policy(seen, part['y'], config.temperature)          # (b, T)
                    if epoch == 0:
                        difference = torch.where(valid, logp - part['recorded'], 0.0)
                        health.add_max(logp_diff=difference.detach().abs().max())
                    if epoch == 0 and old_is_own:
                        sampled['old_logp'][rows] = logp.detach()       # so the ratio is 1
                    old_logp = sampled['old_logp'][rows]
                    loss, fields = policy_loss(
                        logp, old_logp, part['adv'], part['mask'], clip=config.clip_range,
                        ratio=config.ratio, weight=part['weight'])
                    if config.kl:
                        with torch.no_grad():
                            ref_logp = reference.logp(seen, part['y'], config.temperature)
                        k3 = torch.where(valid, kl_k3(logp, ref_logp), 0.0)
                        kl = (k3 * part['weight']).sum() / part['weight'].sum()
                        loss = loss + config.kl * kl
                        fields['kl'] = kl.detach()
                    # the micro-batch's mean -> its sum -> its part of the mean over all
                    loss = loss * part['weight'].sum() * scale
                    loss.backward()
                stats.add_update(loss.detach(), fields, part['weight'].sum())
            taken = optimiser.step(step)                        # and clears the gradients
        uae.eval()

        if evaluate.due(step + 1) and run.master:           # one group, for tools/report.py
            watch.open_captions(uae, step + 1, images['x'], sampled, r, config)
        entropy = -ranks.total((sampled['recorded'] * sampled['mask']).sum(), run)
        entropy = entropy / ranks.total(sampled['mask'].sum(), run)     # estimate, nats a token
        words = uae.encoder.words(sampled['y'], sampled['mask'])
        log(step, **reward_fields(all_r), **health.reduce(run), **stats.reduce(run), **taken,
            **caption_fields(words, uae.encoder.text_room, run), entropy=entropy,
            skipped=count_skipped(train, held_out, run))
        checkpoint.maybe_save(config, run, step + 1, uae, optimiser)
    evaluate.every(config.steps)


if __name__ == '__main__':
    main(sys.argv[1:])
