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
    KL of Flow-GRPO drops |dt|  the Gaussians' own KL        exact; .02 there is about .02 / S here
    all steps trained           `train_steps` of a window    time; the window lies in the first half
                                of noisy ones                of the steps, or if it is longer than
                                                             that, it starts at step 0
    last step                   never noisy, never trained   its noise would stay in the image; the
                                                             same for cps steps that end below .02
    Flow-CPS                    kind cps: its authors'       cps_exact keeps 1 / (2 std^2), which
                                -(z_{s'} - mean)^2           grows without bound as s' falls
    c = {c_text, c_img}         condition=text               a true bottleneck; text+image is the
                                                             paper's (key `condition`)
    caption temperature         0 (greedy)                   no sampling noise
    old log-prob not stated     float32: as recorded while   key `old_logp`; in bfloat16 a GPU's
                                sampling; bfloat16: the      result depends on the batch's shape, by
                                update's own                 more than the clip
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
from reward import clip_reward, reward_tower
from tools.plan import plan

# --- script keys ---------------------------------------------------------------------------------
# those that all scripts share, as old_logp and micro_batch, are in config.py
keys = dict(
    steps = 150,               # of the loop: one rollout and `updates` optimiser steps each
    prompts = 8,               # images per rollout, all ranks together
    group = 16,                # G drawings per image; their mean reward is the baseline
    caption_temperature = 0.0, # of the frozen captioner; one caption per image, for its group
    sde = 'flow',              # flow | cps (coefficient-preserving) | cps_exact: see sde_step
    noise_level = 0.7,         # of the SDE; 0.8 is usual with cps
    sde_window = 4,            # noisy steps, the others are ODE steps; at most sample_steps - 1
    train_steps = 4,           # of those in the loss, drawn anew each rollout; one forward pass
    same_noise = False,        # one start noise for the whole group
    clip_range = (1e-4, 1e-4), # ratio in [1 - a, 1 + b]; narrow: a log-density is a mean
    kl = 0.0,                  # weight of the Gaussian KL against the stage's initial decoder
    updates = 1,               # optimiser steps per rollout
    lr = 1e-4,
    grad_clip = 1.0,           # largest gradient norm
    patience = 5,              # updates in a row with a non-finite gradient that end the run
    warmup = 30,               # loop steps of linear warm-up: Adam's first steps are mostly noise
    lr_decay = 1.0,            # cosine to 0 at step lr_decay * steps; 0 = constant
    offload = False,           # encoder and VAE wait on the CPU while the decoder is updated
    shuffle_reward = False,    # control: rewards permuted over the batch teach nothing
    compile = False,           # the transformer blocks; when it pays: docs/results.md, speed
)
own_presets = dict(
    tiny=dict(sample_steps=6),              # fewer steps are more drawings in the same time
    medium=dict(steps=500, prompts=8, group=8, lr=3e-4, warmup=20, sde_window=3, train_steps=3,
                sde='cps', noise_level=0.8, clip_range=(1e-5, 1e-5)),
    paper=dict(steps=500, prompts=48, group=24, lr=3e-4, warmup=20, kl=0.002, sde_window=9,
               train_steps=9))
# -------------------------------------------------------------------------------------------------


def group_advantage(r):
    """A_i = (R_i - mean_j R_j) / (std_j R_j + 1e-4) over the group: r (P, G) -> (P, G).

    Exactly 0 where all rewards are equal.
    """
    centred = r - r.mean(1, keepdim=True)
    equal = (r == r[:, :1]).all(1, keepdim=True)
    centred = centred / (r.std(1, keepdim=True) + 1e-4)
    return torch.where(equal, 0.0, centred)


def policy_loss(logp, old_logp, adv, mask=None, clip=(0.2, 0.2)):
    """Clipped surrogate: minus the mean over denoising steps of min(ratio A, clip(ratio) A).

    logp, old_logp (B, n) of n steps, adv (B,), mask (B, n), 0 where a step does not count. The code
    is grpo_encoder's, so that either file can be read alone. Returns loss () and detached stats.
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


def kl_gauss(mean, ref_mean, std):
    """KL of two Gaussian steps of equal std, |mean - ref_mean|^2 / (2 std^2), mean over all.

    mean, ref_mean (B, n, C, H, W) of n trained steps, std (B, n, 1, 1, 1) -> ().
    """
    return ((mean - ref_mean) ** 2 / (2 * std ** 2)).mean()


def window(step, config, sigmas=None):
    """(begin, end) of this rollout's noisy steps, and which of them are trained.

    The trained ones are sorted offsets from `begin`. Never noisy: the last step, whose noise would
    stay in the image, and steps of cps that end below .02, where its std is hardly more than 0;
    for these sigmas (S + 1,) is needed.
    """
    usable = config.sample_steps - 1                    # steps that may be noisy, from the first
    if config.sde != 'flow':
        usable = min(usable, int((sigmas[1:] >= 0.02).sum()))
    if usable < 1:
        raise SystemExit(f'--sample_steps={config.sample_steps}: {config.sde} needs more steps')
    width = min(config.sde_window, usable)
    place = common.generator(config.seed, 'window', step)
    room = max(0, min(config.sample_steps // 2, usable) - width)
    begin = torch.randint(room + 1, (), generator=place).item()
    trained = torch.randperm(width, generator=place)[:config.train_steps]
    return (begin, begin + width), sorted(trained.tolist())


@torch.no_grad()
def rollout(uae, tower, x, index, step, config, negative=None):
    """G drawings of each image's caption, and their rewards. x (P, 3, R, R), index (P,).

    index: positions in the global batch, the address of all randomness. negative: the unconditional
    branch's condition under guidance. Returns a dict of cond (B, cond_len, D), z, z_next, under
    guidance v0 (B, W, C, H, W), recorded (B, W), the captions y (B, T), the finished latents z_0
    (B, C, H, W), B = P * G with a group's drawings together; r (P, G); and spoken (P, T) bool, the
    captions' own tokens without the end token.
    """
    P, G = len(x), config.group
    seen = uae.see(x)
    uniforms = common.uniform((config.caption_len,), index, config.seed, 'token', step)
    y, mask, _ = uae.sample_captions(seen, 1, config.caption_temperature,
                                     uniforms.to(uae.device))

    member = (index[:, None] * G + torch.arange(G)).flatten()
    start = member
    if config.same_noise:
        start = index.repeat_interleave(G)
    z = common.normal(uae.latent_shape(), start, config.seed, 'start', step)
    noisy, _ = window(step, config, uae.sigmas(config.sample_steps))
    begin, end = noisy
    shape = (end - begin, *uae.latent_shape())
    noise = common.normal(shape, member, config.seed, 'sde', step)

    parts = []
    for images, rows, _ in common.group_slices(P, G, config.micro_batch):
        cond = uae.condition(y[images], mask[images], common.take(seen, images))
        cond = cond.repeat_interleave(G, 0)
        z_0, path = uae.draw_sde(
            z[rows].to(uae.device), cond, config.sample_steps, noise[rows].to(uae.device),
            config.sde, config.noise_level, noisy, negative)
        r = clip_reward(x[images], uae.to_image(z_0), tower)
        caption = y[images].repeat_interleave(G, 0)
        parts.append(dict(path, cond=cond, y=caption, z_0=z_0, r=r))
    batch = common.join(parts)
    r = batch.pop('r').view(P, G)
    return batch, r, uae.spoken(y, mask)


def loss_of(uae, reference, batch, step, share, same_weights, config, negative=None):
    """The whole loss of a micro-batch, log fields, and the detached log-probs (B, n).

    batch: what `rollout` returns and adv (B,), old_logp (B, W). share: world / samples of the step,
    so that micro-batches and ranks add up. same_weights: whether the model is still the rollout's.
    """
    # a function of `step` alone: the rollout's
    (begin, _), trained = window(step, config, uae.sigmas(config.sample_steps))
    settings = dict(steps=trained, c=batch['cond'], S=config.sample_steps, kind=config.sde,
                    noise_level=config.noise_level, begin=begin, negative=negative)
    path = dict(z=batch['z'], z_next=batch['z_next'])
    own_path = dict(path)
    if same_weights and 'v0' in batch:      # the unconditional branch would come out the same
        own_path['v0'] = batch['v0']
    logp, mean, std = uae.step_logp(own_path, **settings)
    old_logp = batch['old_logp'][:, trained]
    if same_weights and config.old_logp == 'replay':
        old_logp = logp.detach()
    loss, stats = policy_loss(logp, old_logp, batch['adv'], clip=config.clip_range)
    if config.kl:
        with torch.no_grad():
            _, ref_mean, _ = reference.step_logp(path, **settings)
        kl = kl_gauss(mean, ref_mean, std)
        loss = loss + config.kl * kl
        stats['kl'] = kl.detach()
    difference = logp - batch['recorded'][:, trained]
    stats['logp_diff'] = difference.detach().abs().max()
    # a mean times its weight is a sum; times share, the sums of all parts are the step's mean
    return loss * len(logp) * share, stats, logp.detach()


def update(uae, ddp, optimiser, reference, batch, step, run, config, negative=None):
    """config.updates optimiser steps on one rollout -> log fields."""
    B, G = len(batch['adv']), config.group
    batch['old_logp'] = batch['recorded'].clone()
    _, trained = window(step, config, uae.sigmas(config.sample_steps))
    for k in range(config.updates):
        same_weights = k == 0
        stats = Stats()
        for _, rows, last in common.sample_slices(B // G, G, config.micro_batch):
            part = common.take(batch, rows)
            with common.no_sync(ddp, last):
                # ddp(f, ...) calls f(uae, ...), so that DDP sees the forward pass; share is 1 / B,
                # as every rank has B of the world * B samples
                loss, fields, logp = ddp(loss_of, reference, part, step, 1 / B, same_weights,
                                         config, negative)
                loss.backward()
            if same_weights and config.old_logp == 'replay':
                batch['old_logp'][rows, trained] = logp         # of every later update as well
            stats.add_update(loss.detach(), fields, len(part['adv']))
        reduced = stats.reduce(run)
        if same_weights:
            logp_diff = reduced['logp_diff']            # later it would measure the step taken
        taken = optimiser.step(step)
    reduced['logp_diff'] = logp_diff
    return dict(reduced, **taken)


def planned_loss(uae, tower, size, prompt_len, config):
    """For --plan: the loss of `size` drawings, zeros in place of latents, conditions, rewards."""
    trained = list(range(min(config.train_steps, config.sde_window, config.sample_steps - 1)))
    cond = torch.zeros(size, config.cond_len, uae.projector.down.out_features)
    latents = torch.zeros(size, len(trained), *uae.latent_shape())
    path = dict(z=latents, z_next=latents, v0=latents)
    logp, _, _ = uae.step_logp(path, trained, cond, config.sample_steps, config.sde,
                               config.noise_level, 0)
    return policy_loss(logp, torch.zeros(logp.shape), torch.zeros(size), clip=config.clip_range)[0]


def main(argv):
    config = parse(keys, own_presets, argv, __file__)
    if config.sample_steps < 2:
        raise SystemExit('--sample_steps=1: expected 2 or more, as the last step is never noisy')
    if config.plan:
        return plan(config, ['decoder'], planned_loss)
    run = common.start(config)
    P = common.per_rank('prompts', config.prompts, run.world)
    start_step = checkpoint.open_out_dir(config, run)
    checkpoint.watch_sigterm()
    train, held_out = open_data(config, run)
    uae = checkpoint.open_uae(config, run.device)
    params = uae.train_only('decoder')
    reference = None
    if config.kl:
        reference = checkpoint.stage_start(uae, ['decoder'], config)
    if config.compile:
        uae.compile_decoder()
        if config.kl:
            reference.compile_decoder()
    ddp = common.parallel(uae, run)
    tower = reward_tower(config, run.device)
    optimiser = common.Optimiser(params, config)
    checkpoint.restore(config, optimiser)
    negative = None
    if config.guidance != 1.0:
        negative = uae.negative()                        # once: the encoder is frozen
    window(start_step, config, uae.sigmas(config.sample_steps))     # refused without a noisy step
    log = Log(config, run)
    evaluate = Evaluator(uae, held_out, config, run, dict(reward=tower), log)
    idle = ('encoder', 'vae') if config.offload else ()

    for step in log.progress(start_step):
        evaluate.every(step)
        source = train.batch(config.seed, step, config.prompts, run.rank, run.world)
        x = source['x'].to(run.device)
        batch, r, spoken = rollout(uae, tower, x, source['index'], step, config, negative)
        all_rewards = common.gather(r, run)                     # (world * P, G), whole groups
        if config.shuffle_reward:               # what is logged is what was taught
            all_rewards = common.permuted(all_rewards, config.seed, 'shuffle', step)
        mine = all_rewards[run.rank * P:(run.rank + 1) * P]
        batch['adv'] = group_advantage(mine).flatten()        # (P, G) -> (B,)
        with uae.parked(*idle):
            fields = update(uae, ddp, optimiser, reference, batch, step, run, config, negative)
        if evaluate.due(step + 1) and run.master:
            watch.open_drawings(uae, step + 1, x, batch, mine, config)
        log(step, **reward_fields(all_rewards), **fields, **caption_fields(spoken, run),
            skipped=count_skipped(train, held_out, run))
        checkpoint.maybe_save(config, run, step + 1, uae, optimiser)
    evaluate.every(config.steps)


if __name__ == '__main__':
    main(sys.argv[1:])
