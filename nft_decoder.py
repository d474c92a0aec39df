"""Stage 3 by another rule, DiffusionNFT (arXiv 2509.16117): flow matching on drawings of one's own,
towards the good ones and away from the bad.

    python nft_decoder.py --init_from=out/grpo_encoder                      # tiny
    torchrun --nproc_per_node=8 nft_decoder.py --preset=paper --data=/data/photos \
        --init_from=out/grpo_encoder

Groups, rewards and advantages are grpo_decoder's. But the drawings come from the plain ODE, and the
update needs no step of theirs, only how they end: no SDE, no log-prob, no guidance.

    c = g(h_T(y))               z_0 ~ ODE of v_old(. | c)       z_s = (1 - s) z_0 + s eps
    R_i = cos(f_I(x), f_I(x_hat_i))             A_i = (R_i - mean R) / std R
    r_i = clip(A_i, -a, a) / 2a + 1/2           how much drawing i counts as good
    v+  = (1 - b) v_old + b v_theta             v-  = (1 + b) v_old - b v_theta
    L   = a / b mean over drawings and noise levels of
          r |z_s - s v+ - z_0|^2 / w+  +  (1 - r) |z_s - s v- - z_0|^2 / w-
    w   = mean |z_s - s v - z_0| of the same row, without gradient
    old <- d old + (1 - d) theta                after every update

    paper (DiffusionNFT)        here                         why
    d grows from 0 to .5        `old_decay` 0: the old       nothing to store and no second pass;
    or more                     policy is the present one    what d is worth: docs/results.md
    all the sampler's levels    `levels` of them a drawing   time; the rollout is most of it
    guidance-free, from a       guidance 1                   the same
    model trained with it
    A by the batch's std        the group's own              grpo_decoder's; the rewards of other
                                                             images say nothing about this one
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
    levels = 1,                # noise levels a drawing, of the sampler's own, drawn anew
    clip_adv = 2.0,            # a: advantages beyond it count no more
    beta = 1.0,                # b: how far v+ and v- lie from the old velocity
    old_decay = 0.0,           # d: what the old policy, which draws, keeps of itself an update
    epochs = 1,                # optimiser steps per rollout
    lr = 1e-4,
    warmup = 10,               # loop steps of linear warm-up: Adam's first steps are mostly noise
    lr_decay = 1.0,            # cosine to 0 at step lr_decay * steps; 0 = constant
    offload = False,           # encoder, decoder and towers are on the GPU only while they work
    shuffle_reward = False,    # control: rewards permuted over the batch teach nothing
)
own_presets = dict(
    tiny=dict(denoise_steps=6),             # fewer steps are more drawings in the same time
    medium=dict(steps=500, group=8, warmup=20, levels=2),
    paper=dict(steps=500, batch=48, group=24, warmup=20, levels=3, guidance=1.0))
limits = dict(
    batch=(1, 1e6), group=(2, 1e4), epochs=(1, 1000), captions=('own', 'given'),
    levels=(1, 1000), clip_adv=(1e-6, 1e9), beta=(1e-6, 1e9), old_decay=(0, 1))
# -------------------------------------------------------------------------------------------------


def group_advantage(r):
    """A_i = (R_i - mean_j R_j) / (std_j R_j + 1e-4) over the group: r (P, G) -> (P, G).

    std over G - 1. Exactly 0 where all rewards are equal.
    """
    centred = r - r.mean(1, keepdim=True)
    equal = (r == r[:, :1]).all(1, keepdim=True)
    centred = centred / (r.std(1, keepdim=True) + 1e-4)
    return torch.where(equal, 0.0, centred)


def nft_loss(v, v_old, z_s, z_0, s, good, beta):
    """r |z_s - s v+ - z_0|^2 / w+ + (1 - r) |z_s - s v- - z_0|^2 / w-, by row.

    v, v_old, z_s, z_0 (n, C, H, W), noise levels s (n,), good (n,) in [0, 1] is r. Returns (n,).
    """
    s = s.view(-1, 1, 1, 1)

    def error(velocity):
        off = z_s - s * velocity - z_0                      # of the image that it points at
        size = off.detach().abs().mean((1, 2, 3), keepdim=True)
        return (off ** 2 / size.clamp(min=1e-5)).mean((1, 2, 3))

    towards = error((1 - beta) * v_old + beta * v)
    away = error((1 + beta) * v_old - beta * v)
    return good * towards + (1 - good) * away


def velocity(uae, z, s, c):
    """v_theta (n, C, H, W), without guidance."""
    return uae.decoder.rows(z, s, c)


def trained_of(old, decoder):
    """{name: tensor} of the old policy's weights where the present one's are trained."""
    trained = {name for name, p in decoder.named_parameters() if p.requires_grad}
    return {name: p.data for name, p in old.named_parameters() if name in trained}


@torch.no_grad()
def follow(old, decoder, decay):
    """old <- d old + (1 - d) theta, of what is trained."""
    present = dict(decoder.named_parameters())
    for name, p in trained_of(old, decoder).items():
        p.lerp_(present[name], 1 - decay)


@torch.no_grad()
def rollout(uae, old, tower, images, step, config):
    """G drawings of each image's caption by the old policy, and their rewards.

    images: x (P, 3, R, R), index (P,). All randomness is a function of (seed, step, position in the
    global batch, group member). Returns a dict of c (B, cond_len, D), z_0 (B, C, H, W), the
    finished latents, and for the update s (B, n), eps (B, n, C, H, W), B = P * G, groups together;
    rewards r (P, G); and the captions' y, mask (P, T).
    """
    x, index = images['x'].to(uae.device), images['index']
    P, G, n = len(x), config.group, config.levels
    member = (index[:, None] * G + torch.arange(G)).flatten()   # (B,), in the global batch
    vision = uae.encoder.see(x)
    if config.captions == 'given':
        y, mask, _ = uae.encoder.tokens(images['captions'])
    else:
        y, mask, _ = uae.encoder.sample(vision, temperature=0.0)

    shape = uae.decoder.latent_shape()
    z = ranks.normal(shape, member, config.seed, 'start', step).to(uae.device)
    c = uae.condition(y, mask, vision).repeat_interleave(G, 0)
    z_0 = old.draw(z, c, config.denoise_steps)
    captions = [caption for caption in uae.encoder.texts(y, mask) for _ in range(G)]
    r = clip_reward(x, old.to_image(z_0), tower, captions)      # an image with its G drawings

    place = ranks.uniform((n,), member, config.seed, 'level', step) * config.denoise_steps
    s = old.sigmas(config.denoise_steps)[place.long().to(uae.device)]
    eps = ranks.normal((n, *shape), member, config.seed, 'eps', step).to(uae.device)
    return dict(c=c, z_0=z_0, s=s, eps=eps), r.view(P, G), (y, mask)


def main(argv):
    config = parse(keys, own_presets, argv, __file__, limits)
    run = ranks.start(config)
    P, G = ranks.per_rank('batch', config.batch, run.world), config.group
    start_step = checkpoint.open_out_dir(config, run)
    train, held_out = open_data(config, run)
    if config.captions == 'given':
        keep_captioned(train, config, run)
    uae = checkpoint.open_uae(config, run.device)
    params = uae.train_only('decoder')
    # while it draws, the present policy is the old one; later in an update it has moved on
    old = uae.decoder
    if config.old_decay or config.epochs > 1:
        old = checkpoint.open_reference(uae, ['decoder'], config).decoder
    model = ranks.parallel(uae, run)
    tower = reward_tower(config, run.device)
    optimiser = Optimiser(params, config)
    extra = checkpoint.restore(config, optimiser)
    if extra:
        old.load_state_dict(extra['old'], strict=False)
    log = Log(config, run)
    evaluate = Evaluator(uae, held_out, config, run, dict(reward=tower), log)
    if config.offload:
        ranks.take_turns(run.device, [uae.encoder], [uae.decoder, old], evaluate.towers.values())

    for step in log.progress(start_step):
        evaluate.every(step)
        images = train.batch(config.seed, step, config.batch, run.rank, run.world)
        sampled, r, (y, mask) = rollout(uae, old, tower, images, step, config)

        all_r = ranks.gather(r, run)                            # (world * P, G), whole groups
        if config.shuffle_reward:               # what is logged is what was taught
            all_r = ranks.permuted(all_r, config.seed, 'shuffle', step)
        r = all_r[run.rank * P:(run.rank + 1) * P]
        sampled['adv'] = group_advantage(r).flatten()                       # (P, G) -> (B,)
        clipped = sampled['adv'].clamp(-config.clip_adv, config.clip_adv)
        sampled['good'] = clipped / (2 * config.clip_adv) + 0.5
        scale = 1 / (P * G * config.levels)     # every rank has as many: DDP's mean is the mean

        uae.train()                             # turns on the recomputation of activations
        for epoch in range(config.epochs):
            stats = Stats()
            for rows, at, last in ranks.step_slices(P, G, config.levels, config.micro_batch):
                part = ranks.take(sampled, rows)
                s = part['s'][:, at]                                            # (b, n)
                n = s.shape[1]
                z_0 = part['z_0'].repeat_interleave(n, 0)
                c = part['c'].repeat_interleave(n, 0)
                good = part['good'].repeat_interleave(n)
                s = s.flatten()
                noise = s.view(-1, 1, 1, 1)
                z_s = (1 - noise) * z_0 + noise * part['eps'][:, at].flatten(0, 1)
                with ranks.no_sync(model, last):
                    # model(f, ...) is f(uae, ...): DistributedDataParallel sees the pass
                    v = model(velocity, z_s, s, c)
                    v_old = v.detach()
                    if old is not uae.decoder:
                        with torch.no_grad():
                            v_old = old.rows(z_s, s, c)
                    loss = nft_loss(v, v_old, z_s, z_0, s, good, config.beta)
                    loss = config.clip_adv / config.beta * loss.sum() * scale
                    loss.backward()
                moved = (v - v_old).detach().square().mean()
                stats.add_sum(loss=loss.detach())
                stats.add_mean(len(s), moved=moved)
            taken = optimiser.step(step)                        # and clears the gradients
        uae.eval()
        extra = {}
        if old is not uae.decoder:
            follow(old, uae.decoder, config.old_decay)
            extra['old'] = trained_of(old, uae.decoder)

        if evaluate.due(step + 1) and run.master:           # one group, for tools/report.py
            watch.open_drawings(uae, step + 1, images['x'], sampled, y, r, config)
        words = uae.encoder.words(y, mask)
        log(step, **reward_fields(all_r), **stats.reduce(run), **taken,
            **caption_fields(words, uae.encoder.text_room, run),
            skipped=count_skipped(train, held_out, run))
        checkpoint.maybe_save(config, run, step + 1, uae, optimiser, extra)
    evaluate.every(config.steps)


if __name__ == '__main__':
    main(sys.argv[1:])
