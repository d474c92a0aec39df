"""Stage 3, understanding for generation: GRPO on the denoising steps, the encoder as prompter.

    python grpo_decoder.py --init_from=out/grpo_encoder                     # tiny
    torchrun --nproc_per_node=8 grpo_decoder.py --preset=paper --data=/data/photos \
        --init_from=out/grpo_encoder

The frozen encoder captions x once. The diffusion transformer p_theta draws that caption G times,
each denoising step a Gaussian policy (an SDE with the marginals of the ODE), and learns from which
of the G drawings looks most like x:

    c = g(h_T(y))               z_{s'} ~ N(mean_theta(z_s, c), std^2)
    R_i = cos(f_I(x), f_I(x_hat_i))             A_i = (R_i - mean R) / std R
    ratio_s = p_theta(z_{s'} | z_s, c) / p_theta_old(z_{s'} | z_s, c),  std with sqrt(|dt|) in it
    J   = mean over steps of  min(ratio A, clip(ratio) A) - kl (mean_theta - mean_ref)^2 / (2 std^2)

    paper                       here                         why
    "Flow-GRPO style"           log-density is the mean      Flow-GRPO's code: the ratio stays near
                                over dimensions              1, hence the clip of 1e-4
    std of A not stated         of the group, over G - 1     GRPO's; Flow-GRPO takes the batch's for
                                                             SD3, the population's elsewhere
    KL of Flow-GRPO drops |dt|  the Gaussians' own KL        exact; their weight b is about our
                                                             kl = b / S
    batch, G, lr, KL not        paper: 48, 24, 3e-4, 0.002   Flow-GRPO's for SD3.5; its KL of 0.02,
    stated                      medium: Flow-GRPO-Fast's     which drops |dt|, over S = 10 steps
    all steps trained           `trained_steps` of a window  time; a window of up to S / 2 is drawn
                                of `noisy_steps`             in the first half (medium), a longer
                                                             one starts at step 0 (tiny, paper)
    last step                   never noisy, never trained   its noise would stay in the image; so
                                                             for cps steps that end below s = .02
    Flow-CPS                    kind cps: its authors'       cps_exact keeps 1 / (2 std^2), which
                                -(z_{s'} - mean)^2           grows without bound as s' falls
    weight decay, EMA, clip of  none of them (Flow-GRPO has  not needed here; in bfloat16 with one
    A: not stated               all three)                   epoch the ratio is 1, no clip binds
    c = {c_text, c_img}         condition=text               a true bottleneck; text+image is the
                                                             paper's (key `condition`)
    caption temperature         0 (greedy), or the           no sampling noise; true captions teach
    not stated                  manifest's own captions      the decoder more (`captions`)
    LoRA as Flow-GRPO           tiny: the whole transformer, it is small; medium and paper have
                                medium, paper: rank 32       theirs, alpha = 2 rank
    guidance 5                  tiny, medium: 1; paper: 5,   Flow-GRPO trains with 4.5; the other
                                also in the loss             branch, v_0, gets no gradient
    old log-prob not stated     float32: as recorded while   in bfloat16 a GPU's result depends on
                                sampling; bfloat16: the      the batch's shape, by more than the
                                update's own, ratio 1        clip
"""
import sys

import torch

from config import parse
from data.images import keep_captioned, open_data
from lib import checkpoint, ranks, watch
from lib.log import Log, Stats, caption_fields, count_skipped, reward_fields
from lib.optimiser import Optimiser
from lib.scores import Evaluator
from reward import clip_reward, reward_tower

# --- script keys ---------------------------------------------------------------------------------
# those that all scripts share are in config.py
keys = dict(
    steps = 150,               # of the loop: one rollout and `epochs` optimiser steps each
    batch = 8,                 # images an update, all ranks together
    group = 16,                # G drawings per image; their mean reward is the baseline
    captions = 'own',          # what is drawn: own, the encoder's greedy caption | given, the one
                               # that comes with the image
    sde = 'flow',              # flow | cps (coefficient-preserving) | cps_exact: see sde_step
    noise_level = 0.7,         # how strong the SDE's noise is, not a level s; with cps usually 0.8
    noisy_steps = 4,           # the others are ODE steps; at most denoise_steps - 1
    trained_steps = 4,         # how many of them the loss takes, drawn anew each rollout
    same_noise = False,        # one start noise for the whole group
    ratio = 'step',            # step | sequence: exp of a drawing's mean log-ratio (GSPO)
    clip_range = (1e-4, 1e-4), # ratio in [1 - a, 1 + b]; narrow: a log-density is a mean
    kl = 0.0,                  # weight of the Gaussian KL against the stage's initial decoder
    epochs = 1,                # optimiser steps per rollout; 1 = on policy
    lr = 1e-4,
    warmup = 30,               # loop steps of linear warm-up: Adam's first steps are mostly noise
    lr_decay = 1.0,            # cosine to 0 at step lr_decay * steps; 0 = constant
    offload = False,           # encoder, decoder and towers are on the GPU only while they work
    shuffle_reward = False,    # control: rewards permuted over the batch teach nothing
    compile = False,           # the transformer blocks; when it pays: docs/results.md, speed
)
own_presets = dict(
    tiny=dict(denoise_steps=6),             # fewer steps are more drawings in the same time
    medium=dict(steps=500, group=8, lr=3e-4, warmup=20, noisy_steps=3, trained_steps=3,
                sde='cps', noise_level=0.8, clip_range=(1e-5, 1e-5), micro_batch=4),
    paper=dict(steps=500, batch=48, group=24, lr=3e-4, warmup=20, kl=0.002, noisy_steps=9,
               trained_steps=9))
limits = dict(
    batch=(1, 1e6), group=(2, 1e4), epochs=(1, 1000), captions=('own', 'given'),
    sde=('flow', 'cps', 'cps_exact'), noise_level=(0.01, 10), noisy_steps=(1, 1000),
    trained_steps=(1, 1000), ratio=('step', 'sequence'), denoise_steps=(2, 1000))
# -------------------------------------------------------------------------------------------------


def group_advantage(r):
    """A_i = (R_i - mean_j R_j) / (std_j R_j + 1e-4) over the group: r (P, G) -> (P, G).

    std over G - 1. Exactly 0 where all rewards are equal.
    """
    centred = r - r.mean(1, keepdim=True)
    equal = (r == r[:, :1]).all(1, keepdim=True)
    centred = centred / (r.std(1, keepdim=True) + 1e-4)
    return torch.where(equal, 0.0, centred)


def policy_loss(logp, old_logp, adv, mask=None, clip=(0.2, 0.2), ratio='step', weight=None):
    """Clipped surrogate: minus the weighted mean over steps of min(ratio A, clip(ratio) A).

    logp, old_logp (B, n) of n steps, adv (B,), mask (B, n), 0 where a step does not count. The code
    is grpo_encoder's, so that either file can be read alone. Returns loss () and detached stats.
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


def kl_gauss(mean, ref_mean, std):
    """KL of two Gaussian steps of equal std, |mean - ref_mean|^2 / (2 std^2), mean over all.

    mean, ref_mean (B, n, C, H, W) of n trained steps, std (B, n, 1, 1, 1) -> ().
    """
    return ((mean - ref_mean) ** 2 / (2 * std ** 2)).mean()


def window(step, config, sigmas):
    """(begin, end) of this rollout's noisy steps, and the trained ones among them, sorted.

    Both are drawn by (seed, step). The window lies in the first half of the steps, or begins at 0
    if it is longer than that. Never noisy: the last step, whose noise would stay in the image, and
    steps of cps that end below .02, where its std is hardly more than 0. sigmas (S + 1,).
    """
    usable = config.denoise_steps - 1                   # steps that may be noisy, from the first
    if config.sde != 'flow':
        usable = min(usable, int((sigmas[1:] >= 0.02).sum()))
    if usable < 1:
        raise SystemExit(f'--denoise_steps={config.denoise_steps}: {config.sde} needs more steps')
    width = min(config.noisy_steps, usable)
    place = ranks.generator(config.seed, 'window', step)
    room = max(0, min(config.denoise_steps // 2, usable) - width)
    begin = torch.randint(room + 1, (), generator=place).item()
    trained = torch.randperm(width, generator=place)[:config.trained_steps]
    return (begin, begin + width), sorted(begin + offset for offset in trained.tolist())


@torch.no_grad()
def rollout(uae, tower, images, step, config, negative=None):
    """G drawings of each image's caption, and their rewards. images: x (P, 3, R, R), index (P,).

    All randomness is a function of (seed, step, position in the global batch, group member).
    negative: the unconditional branch's condition under guidance. Returns a dict, B = P * G rows,
    groups together: c (B, cond_len, D); of the n trained steps z, z_next, under guidance v0
    (B, n, C, H, W) and recorded (B, n); z_0 (B, C, H, W), the finished latents. Then rewards r
    (P, G), and the captions' y, mask (P, T).
    """
    x, index = images['x'].to(uae.device), images['index']
    P, G = len(x), config.group
    member = (index[:, None] * G + torch.arange(G)).flatten()   # (B,), in the global batch
    vision = uae.encoder.see(x)
    if config.captions == 'given':
        y, mask, _ = uae.encoder.tokens(images['captions'])
    else:
        y, mask, _ = uae.encoder.sample(vision, temperature=0.0)

    start = index.repeat_interleave(G) if config.same_noise else member
    z = ranks.normal(uae.decoder.latent_shape(), start, config.seed, 'start', step).to(uae.device)
    noisy, trained = window(step, config, uae.decoder.sigmas(config.denoise_steps))
    begin, end = noisy
    shape = (end - begin, *uae.decoder.latent_shape())
    noise = ranks.normal(shape, member, config.seed, 'sde', step).to(uae.device)
    c = uae.condition(y, mask, vision).repeat_interleave(G, 0)
    z_0, path = uae.decoder.draw_sde(z, c, config.denoise_steps, noise, config.sde,
                                     config.noise_level, noisy, negative)
    x_hat = uae.decoder.to_image(z_0)
    captions = [caption for caption in uae.encoder.texts(y, mask) for _ in range(G)]
    r = clip_reward(x, x_hat, tower, captions)                  # an image with its G drawings
    offsets = [number - begin for number in trained]
    path = {name: stored[:, offsets] for name, stored in path.items()}
    return dict(path, c=c, z_0=z_0), r.view(P, G), (y, mask)


def main(argv):
    config = parse(keys, own_presets, argv, __file__, limits)
    if config.sde != 'flow' and config.noise_level > 1:
        raise SystemExit(f'--noise_level={config.noise_level}: with --sde={config.sde} expected at '
                         'most 1')
    run = ranks.start(config)
    P, G = ranks.per_rank('batch', config.batch, run.world), config.group
    start_step = checkpoint.open_out_dir(config, run)
    train, held_out = open_data(config, run)
    if config.captions == 'given':
        keep_captioned(train, config, run)
    uae = checkpoint.open_uae(config, run.device)
    params = uae.train_only('decoder')
    reference = None
    if config.kl:
        reference = checkpoint.open_reference(uae, ['decoder'], config).decoder
    if config.compile:
        uae.decoder.compile_blocks()
        if config.kl:
            reference.compile_blocks()
    policy = ranks.parallel(uae.decoder, run)           # its forward pass is the log-prob
    tower = reward_tower(config, run.device)
    optimiser = Optimiser(params, config)
    checkpoint.restore(config, optimiser)
    negative = None
    if config.guidance != 1.0:
        negative = uae.negative()                       # once: the encoder is frozen
    sigmas = uae.decoder.sigmas(config.denoise_steps)
    window(start_step, config, sigmas)                  # exits now if no step can be noisy
    sampler = dict(S=config.denoise_steps, kind=config.sde, noise_level=config.noise_level)
    rows_at_once = config.micro_batch
    if config.ratio == 'sequence':              # all steps of a drawing stay in one pass
        rows_at_once *= config.trained_steps
    log = Log(config, run)
    evaluate = Evaluator(uae, held_out, config, run, dict(reward=tower), log)
    if config.offload:
        parts = [uae.encoder], [uae.decoder, reference], evaluate.towers.values()
        ranks.take_turns(run.device, *parts)
    # old_logp: in float32 the log-prob recorded while sampling; in bfloat16, where that differs by
    # rounding, the first epoch's own, detached
    old_is_own = config.dtype == 'bfloat16'

    for step in log.progress(start_step):
        evaluate.every(step)
        images = train.batch(config.seed, step, config.batch, run.rank, run.world)
        sampled, r, (y, mask) = rollout(uae, tower, images, step, config, negative)

        all_r = ranks.gather(r, run)                            # (world * P, G), whole groups
        if config.shuffle_reward:               # what is logged is what was taught
            all_r = ranks.permuted(all_r, config.seed, 'shuffle', step)
        r = all_r[run.rank * P:(run.rank + 1) * P]
        sampled['adv'] = group_advantage(r).flatten()                       # (P, G) -> (B,)
        sampled['old_logp'] = sampled['recorded'].clone()
        _, trained = window(step, config, sigmas)               # the same as in the rollout
        scale = 1 / (P * G * len(trained))      # every rank has as many: DDP's mean is the mean

        health = Stats()
        uae.train()                             # turns on the recomputation of activations
        for epoch in range(config.epochs):
            stats = Stats()
            for rows, at, last in ranks.step_slices(P, G, len(trained), rows_at_once):
                part = ranks.take(sampled, rows)
                stored = dict(z=part['z'][:, at], z_next=part['z_next'][:, at], c=part['c'],
                              steps=trained[at], **sampler)
                v0 = None
                if epoch == 0 and negative is not None:     # it moves with the weights
                    v0 = part['v0'][:, at]
                with ranks.no_sync(policy, last):
                    logp, mean, std = policy(**stored, negative=negative, v0=v0)    # (b, n)
                    if epoch == 0:
                        difference = logp - part['recorded'][:, at]
                        health.add_max(logp_diff=difference.detach().abs().max())
                    if epoch == 0 and old_is_own:
                        sampled['old_logp'][rows, at] = logp.detach()   # so the ratio is 1
                    old_logp = sampled['old_logp'][rows, at]
                    loss, fields = policy_loss(
                        logp, old_logp, part['adv'], clip=config.clip_range,
                        ratio=config.ratio)
                    if config.kl:
                        with torch.no_grad():
                            _, ref_mean, _ = reference.step_logp(**stored, negative=negative)
                        kl = kl_gauss(mean, ref_mean, std)
                        loss = loss + config.kl * kl
                        fields['kl'] = kl.detach()
                    # the micro-batch's mean -> its sum -> its part of the mean over all
                    loss = loss * logp.numel() * scale
                    loss.backward()
                stats.add_update(loss.detach(), fields, logp.numel())
            taken = optimiser.step(step)                        # and clears the gradients
        uae.eval()

        if evaluate.due(step + 1) and run.master:           # one group, for tools/report.py
            watch.open_drawings(uae, step + 1, images['x'], sampled, y, r, config)
        words = uae.encoder.words(y, mask)
        log(step, **reward_fields(all_r), **health.reduce(run), **stats.reduce(run), **taken,
            **caption_fields(words, uae.encoder.text_room, run),
            skipped=count_skipped(train, held_out, run))
        checkpoint.maybe_save(config, run, step + 1, uae, optimiser)
    evaluate.every(config.steps)


if __name__ == '__main__':
    main(sys.argv[1:])
