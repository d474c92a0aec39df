"""Reconstruction alignment (RecA, arXiv 2509.07295): the decoder learns to redraw an image from
what the encoder saw of it.

    python reca.py                                    # tiny, in place of cold_start.py
    python reca.py --init_from=out/grpo_decoder       # or after the loop
    torchrun --nproc_per_node=8 reca.py --preset=paper --data=/data/photos \
        --init_from=out/pretrain_decoder

    h_v = h_T(image), the image's tokens in a caption's place      c_v = g(h_v)
    c_y = g(h_T(y)),  y = greedy caption of x          z_s = (1 - s) z_0 + s eps
    F(c, u) = mean | v_theta(z_s, s, c) - u |^2
    L = F(c_v, eps - z_0) + lambda_t2i F(c_y, u),      u = eps - z_0 or the initial velocity

The first term needs no caption: the image is its own, dense prompt. The encoder is frozen
(understanding and generation share no weights, so lambda_i2t = 0), projector and decoder are
trained. Afterwards the condition is text again. Captions profit as far as the language model's
states of images resemble those of words: data/shapes/shared.py measures that in the embedded world,
docs/results.md has the law. Where nothing is alike, as in the shipped base, captions lose what
images gain.

    paper                       here                         why
    360 templates in front of   the text's own template,     only the caption's place then differs
    the image                   the image in the caption's   between training and drawing
                                place
    lambda_t2i = 0              1, tiny 5; 0 in `make reca`  where images and words share little
                                                             this decoder forgets how to read a
                                                             caption; where they share all it gains
    t2i target eps - z_0        tiny: the initial velocity   a terse caption does not say what the
                                (`t2i_target`)               image is: the decoder would learn to
                                                             invent the rest
    image at 224 pixels         224, tiny: full              the tiny image has 32 pixels already
    condition dropout by        10 % to the negative prompt  classifier-free guidance needs the
    family                                                   unconditional branch
"""
import sys

import torch
import torch.nn.functional as F

from config import parse
from data.images import open_data
from lib import checkpoint, ranks
from lib.log import Log, Stats, caption_fields, count_skipped
from lib.optimiser import Optimiser
from lib.scores import Evaluator

# --- script keys ---------------------------------------------------------------------------------
keys = dict(
    steps = 128,               # updates
    batch = 48,                # images an update, all ranks together
    lr = 3e-4,
    warmup = 0,                # updates of linear warm-up
    lr_decay = 1.0,            # cosine to 0 after lr_decay * steps updates; 0 = constant
    lambda_t2i = 5.0,          # weight of the loss on the encoder's own greedy caption; 0 = none
    t2i_target = 'start',      # of that loss: image (eps - z_0) | start (the initial velocity)
    see_resolution = 0,        # pixels of the image that the encoder sees here; 0 = resolution
    sigma_mean = 1.0,          # s = sigmoid(sigma_mean + sigma_std N(0,1)); SD3 has 0 and 1
    sigma_std = 1.2,
    drop = 0.1,                # share of conditions replaced by the negative prompt
)
own_presets = dict(
    medium=dict(steps=1000, batch=32, lr=4e-5, warmup=10, lambda_t2i=1.0, t2i_target='image',
                sigma_mean=0.0, sigma_std=1.0, see_resolution=224),
    paper=dict(steps=1000, batch=96, lr=4e-5, warmup=10, lambda_t2i=1.0, t2i_target='image',
               sigma_mean=0.0, sigma_std=1.0, see_resolution=224))
limits = dict(
    batch=(1, 1e6), t2i_target=('image', 'start'), sigma_mean=(-100, 100), drop=(0, 0.999))
# -------------------------------------------------------------------------------------------------


def see_small(encoder, x, config):
    """x (P, 3, R, R) -> what the encoder sees of it at config.see_resolution."""
    if config.see_resolution:
        size = (config.see_resolution, config.see_resolution)
        x = F.interpolate(x, size, mode='bicubic', antialias=True).clamp(-1, 1)
    return encoder.see(x)


def text_velocity(uae, z, s, caption, drop):
    """v_theta(z_s, s, c_y) (P, C, H, W). caption: y, mask, vision; drop (P,) bool: the negative
    prompt instead."""
    c = uae.condition(**caption)
    c = torch.where(drop.view(-1, 1, 1), uae.negative(), c)
    return uae.decoder.velocity(z, s, c)


def both_losses(uae, z0, eps, s, drop, states, caption, start, config):
    """L, mean over images, and both its terms, detached.

    z0, eps (P, C, H, W), s (P,), drop (P,) bool, states (P, cond_len, d). caption: y, mask,
    vision, or None. start: the model whose velocity is the captions' target, or None. Dropped
    conditions train the decoder alone.
    """
    noise = s.view(-1, 1, 1, 1)
    z = (1 - noise) * z0 + noise * eps
    target = eps - z0
    nothing = uae.negative()[:, :config.cond_len]       # text+image's has an empty image behind it
    c_v = torch.where(drop.view(-1, 1, 1), nothing, uae.project(states))
    f_v = (uae.decoder.velocity(z, s, c_v) - target).square().mean()
    f_y = torch.zeros((), device=z.device)
    if caption:
        if start:
            with torch.no_grad():
                target = text_velocity(start, z, s, caption, drop)
        f_y = (text_velocity(uae, z, s, caption, drop) - target).square().mean()
    return f_v + config.lambda_t2i * f_y, f_v.detach(), f_y.detach()


@torch.no_grad()
def noised(uae, images, step, config):
    """Images of a rank's batch -> the arguments z0, eps, s, drop, states of `both_losses`.

    All randomness is addressed by (seed, step, image).
    """
    x, index = images['x'].to(uae.device), images['index']
    sigma = ranks.normal((), index, config.seed, 'sigma', step)
    eps = ranks.normal(uae.decoder.latent_shape(), index, config.seed, 'eps', step)
    drop = ranks.uniform((), index, config.seed, 'drop', step) < config.drop
    s = torch.sigmoid(config.sigma_mean + config.sigma_std * sigma)
    states = uae.encoder.image_as_text(see_small(uae.encoder, x, config))
    return dict(z0=uae.decoder.to_latent(x), eps=eps.to(uae.device), s=s.to(uae.device),
                drop=drop.to(uae.device), states=states)


def main(argv):
    config = parse(keys, own_presets, argv, __file__, limits)
    if config.see_resolution > config.resolution:
        raise SystemExit(f'--see_resolution={config.see_resolution}: between 1 and '
                         f'resolution={config.resolution}, or 0 for the full one')
    run = ranks.start(config)
    P = ranks.per_rank('batch', config.batch, run.world)
    start_step = checkpoint.open_out_dir(config, run)
    train, held_out = open_data(config, run)
    uae = checkpoint.open_uae(config, run.device)
    seen = see_small(uae.encoder, held_out['x'][:1].to(run.device), config)
    room, needed = uae.encoder.text_room, seen['features'].shape[1]
    if needed > room:
        raise SystemExit(f'an image has {needed} tokens, a caption room for {room}: lower '
                         '--see_resolution or raise --cond_len')
    params = uae.train_only('projector', 'decoder')
    start = None
    if config.lambda_t2i and config.t2i_target == 'start':
        start = checkpoint.open_reference(uae, ['projector', 'decoder'], config)
    model = ranks.parallel(uae, run)
    optimiser = Optimiser(params, config, betas=(0.9, 0.99))
    checkpoint.restore(config, optimiser)
    log = Log(config, run)
    evaluate = Evaluator(uae, held_out, config, run, log=log)

    for step in log.progress(start_step):
        evaluate.every(step)
        images = train.batch(config.seed, step, config.batch, run.rank, run.world)
        flow = noised(uae, images, step, config)
        y = mask = torch.zeros(0, config.caption_len)
        if config.lambda_t2i:
            vision = uae.encoder.see(images['x'].to(run.device))
            y, mask, _ = uae.encoder.sample(vision, temperature=0.0)

        stats = Stats()
        uae.train()                             # turns on the recomputation of activations
        for _, rows, last in ranks.sample_slices(P, 1, config.micro_batch):
            part = ranks.take(flow, rows)
            caption = None
            if config.lambda_t2i:
                caption = dict(y=y[rows], mask=mask[rows], vision=ranks.take(vision, rows))
            with ranks.no_sync(model, last):
                # model(f, ...) is f(uae, ...): DistributedDataParallel sees the forward pass
                loss, f_v, f_y = model(both_losses, **part, caption=caption, start=start,
                                       config=config)
                loss = loss * len(part['z0']) / P       # the sum of the parts is the mean
                loss.backward()
            stats.add_sum(loss=loss.detach())
            stats.add_mean(len(part['z0']), flow_image=f_v, flow_text=f_y)
        taken = optimiser.step(step)
        uae.eval()

        words = uae.encoder.words(y, mask)
        log(step, **stats.reduce(run), **taken,
            **caption_fields(words, uae.encoder.text_room, run),
            skipped=count_skipped(train, held_out, run))
        checkpoint.maybe_save(config, run, step + 1, uae, optimiser)
    evaluate.every(config.steps)


if __name__ == '__main__':
    main(sys.argv[1:])
