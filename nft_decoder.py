"""Stage 3 by DiffusionNFT (arXiv 2509.16117): flow matching towards good drawings, away from bad.

    python nft_decoder.py --init_from=out/grpo_encoder                      # tiny
    torchrun --nproc_per_node=8 nft_decoder.py --preset=paper --data=DIR --init_from=CHECKPOINT

Groups, rewards and advantages are grpo_decoder's. But drawings come from the plain ODE, and the
update needs only how they end: no SDE, no log-prob, no guidance.

    c = g(h_T(y))               z_0 ~ ODE of v_old(. | c)       z_s = (1 - s) z_0 + s eps
    R_i = cos(f_I(x), f_I(x_hat_i))             A_i = (R_i - mean R) / std R
    r_i = clip(A_i, -a, a) / 2a + 1/2           how much drawing i counts as good
    v+  = (1 - b) v_old + b v_theta             v-  = (1 + b) v_old - b v_theta
    L   = a / b mean of  r |z_s - s v+ - z_0|^2 / w+  +  (1 - r) |z_s - s v- - z_0|^2 / w-
    w+  = mean |z_s - s v+ - z_0| of the row, without gradient, and w- with v-
    old <- d old + (1 - d) theta                after every update

Where d = 0, b cancels: the gradient is that of flow matching on the drawing times clip(A) s^2 / w.

    paper (DiffusionNFT)        here                         why
    d grows to .5 or more       d = `old_decay` = 0          nothing to store, no second pass
    all the sampler's levels    `levels`, never the last     time; the last is hardly noisy
    eps of each drawing         one for the group            then its members differ in z_0 alone
    a = 5, std of the batch     a = 2, std of the group      else a few drawings weigh the most
"""
import sys

import torch

from config import parse
from data.images import keep_captioned, open_data
from grpo_decoder import group_advantage
from lib import checkpoint, ranks, watch
from lib.log import Log, Stats, caption_fields, count_skipped, reward_fields
from lib.optimiser import Optimiser
from lib.scores import Evaluator
from reward import clip_reward, reward_tower

# --- script keys ---------------------------------------------------------------------------------
# those that all scripts share are in config.py
keys = dict(
    steps = 120,               # of the loop: one rollout and one optimiser step each
    batch = 16,                # images an update, all ranks together
    group = 8,                 # G drawings per image; their mean reward is the baseline
    captions = 'own',          # what is drawn: own, the encoder's greedy caption | given, the one
                               # that comes with the image
    levels = 3,                # noise levels a drawing, of the sampler's own, drawn anew
    clip_adv = 2.0,            # a: advantages beyond it count no more
    beta = 1.0,                # b: how far v+ and v- lie from the old velocity
    old_decay = 0.0,           # d: what the old policy, which draws, keeps of itself an update
    lr = 1.5e-4,               # twice as much wins the reward alone
    warmup = 10,               # updates of linear warm-up: Adam's first steps are mostly noise
    lr_decay = 1.0,            # cosine to 0 at step lr_decay * steps; 0 = constant
    offload = False,           # encoder, decoder and towers are on the GPU only while they work
    shuffle_reward = False,    # control: rewards permuted over the batch teach nothing
)
own_presets = dict(
    tiny=dict(denoise_steps=6),             # fewer steps are more drawings in the same time
    medium=dict(steps=500, batch=8, lr=3e-4, warmup=20),        # lr: the authors', with LoRA
    paper=dict(steps=500, batch=48, group=16, lr=3e-4, warmup=20, denoise_steps=8, guidance=1.0))
limits = dict(
    batch=(1, 1e6), group=(2, 1e4), captions=('own', 'given'), levels=(1, 1000),
    clip_adv=(1e-6, 1e9), beta=(1e-6, 1e9), old_decay=(0, 1))
# -------------------------------------------------------------------------------------------------


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


def drawings_loss(uae, old, part, at, beta):
    """nft_loss of b drawings at n noise levels each, summed.

    part: b rows of what `rollout` returns, and good (b,). at: a slice, which n of their levels.
    """
    s = part['s'][:, at].flatten()                              # (b * n,)
    n = len(s) // len(part['s'])
    c, z_0, good = (part[name].repeat_interleave(n, 0) for name in ('c', 'z_0', 'good'))
    noise = s.view(-1, 1, 1, 1)
    z_s = (1 - noise) * z_0 + noise * part['eps'][:, at].flatten(0, 1)
    v = uae.decoder.rows(z_s, s, c)
    v_old = v.detach()
    if old is not uae.decoder:
        with torch.no_grad():
            v_old = old.rows(z_s, s, c)
    return nft_loss(v, v_old, z_s, z_0, s, good, beta).sum()


@torch.no_grad()
def follow(old, decoder, decay):
    """old <- d old + (1 - d) theta, of what is trained -> {name: tensor}, the old policy's."""
    present = {name: p for name, p in decoder.named_parameters() if p.requires_grad}
    trained = {name: p.data for name, p in old.named_parameters() if name in present}
    for name, p in trained.items():
        p.lerp_(present[name], 1 - decay)
    return trained


@torch.no_grad()
def rollout(uae, old, tower, images, step, config):
    """G drawings of each image's caption, and their rewards. images: x (P, 3, R, R), index (P,).

    All randomness is a function of (seed, step, position in the global batch, group member).
    Returns a dict, B = P * G rows, groups together: c (B, cond_len, D), z_0 (B, C, H, W), and of
    the n noise levels s (B, n), eps (B, n, C, H, W). Then r (P, G), and the captions' y, mask.
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
    group = index.repeat_interleave(G)
    place = (torch.arange(n) + ranks.uniform((n,), group, config.seed, 'level', step)) / n
    s = old.sigmas(config.denoise_steps)[(place * (config.denoise_steps - 1)).long()]
    eps = ranks.normal((n, *shape), group, config.seed, 'eps', step).to(uae.device)
    return dict(c=c, z_0=z_0, s=s, eps=eps), r.view(P, G), (y, mask)


def main(argv):
    config = parse(keys, own_presets, argv, __file__, limits)
    run = ranks.start(config)
    P, G = ranks.per_rank('batch', config.batch, run.world), config.group
    a, b = config.clip_adv, config.beta
    start_step = checkpoint.open_out_dir(config, run)
    train, held_out = open_data(config, run)
    if config.captions == 'given':
        keep_captioned(train, config, run)
    uae = checkpoint.open_uae(config, run.device)
    params = uae.train_only('decoder')
    old = uae.decoder
    if config.old_decay:
        old = checkpoint.open_reference(uae, ['decoder'], config).decoder
    model = ranks.parallel(uae, run)
    tower = reward_tower(config, run.device)
    optimiser = Optimiser(params, config)
    extra = checkpoint.restore(config, optimiser)
    old.load_state_dict(extra.get('old', {}), strict=False)
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
        sampled['good'] = sampled['adv'].clamp(-a, a) / (2 * a) + 0.5
        scale = a / b / (P * G * config.levels)  # every rank has as many: DDP's mean is the mean
        stats = Stats()
        uae.train()                             # turns on the recomputation of activations
        for rows, at, last in ranks.step_slices(P, G, config.levels, config.micro_batch):
            part = ranks.take(sampled, rows)
            with ranks.no_sync(model, last):
                # model(f, ...) is f(uae, ...): DistributedDataParallel sees the forward pass
                loss = model(drawings_loss, old, part, at, b) * scale
                loss.backward()
            stats.add_sum(loss=loss.detach())
        taken = optimiser.step(step)                            # and clears the gradients
        uae.eval()
        if config.old_decay:
            extra['old'] = follow(old, uae.decoder, config.old_decay)
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
