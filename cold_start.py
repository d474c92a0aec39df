"""Stage 1, cold-start reconstruction: the semantic loss, back-propagated through the sampler.

    python cold_start.py                                              # tiny, from the shipped base
    torchrun --nproc_per_node=8 cold_start.py --preset=paper --data=/data/photos \
        --init_from=out/pretrain_decoder

    y = caption of x by the encoder      c = g(h_T(y))      x_hat ~ p_theta(. | c)
    L = 1 - cos(f_I(x), f_I(x_hat))

What gets a gradient: the decoder through the last `grad_steps` denoising steps, the projector and,
through c, the language model that re-encodes the caption. What does not: the choice of words
(tokens are discrete, that is stage 2), the vision tower, and VAE and CLIP, which it only crosses.

    paper                       here                         why
    steps and depth of the      tiny: 6 ODE steps, gradient  a shorter chain needs less memory
    sampler not stated          through 2
    captions not stated         greedy                       a terse sampled caption does not say
                                                             what the image is: the decoder would
                                                             learn to draw the average picture
    learning rate not stated    2e-5 (tiny), 1e-6 (paper)    so does a large step
"""
import sys

import torch

import checkpoint
import common
from config import parse
from data.images import open_data
from evaluate import Evaluator
from log import Log, Stats, caption_fields, count_skipped
from reward import clip_reward, reward_tower
from tools.plan import plan

# --- script keys ---------------------------------------------------------------------------------
keys = dict(
    steps = 80,                # updates
    prompts = 24,              # images per update, all ranks together
    cold_temperature = 0.0,    # of the captions; 0 = greedy
    grad_steps = 2,            # K: gradients flow through the last K denoising steps
    lr = 2e-5,
    grad_clip = 1.0,           # largest gradient norm
    patience = 5,              # updates in a row with a non-finite gradient that end the run
    warmup = 0,                # updates of linear warm-up
    lr_decay = 1.0,            # cosine to 0 after lr_decay * steps updates; 0 = constant
)
own_presets = dict(
    tiny=dict(sample_steps=6),
    medium=dict(steps=500, prompts=32, lr=1e-6),
    paper=dict(steps=500, prompts=64, lr=1e-6))
# -------------------------------------------------------------------------------------------------


def reconstruction_loss(uae, tower, x, seen, y, mask, z, config):
    """L = 1 - cos(f_I(x), f_I(x_hat)), mean over images.

    x (P, 3, R, R), y, mask (P, T), start noise z (P, C, H, W) -> loss ().
    """
    cond = uae.condition(y, mask, seen)
    x_hat = uae.to_image(uae.draw(z, cond, config.sample_steps, config.grad_steps))
    return (1 - clip_reward(x, x_hat, tower)).mean()


def loss_of(uae, tower, seen, batch, share, config):
    """The whole loss of a micro-batch. batch: x (P, 3, R, R), y, mask (P, T), z (P, C, H, W).

    share: world / images of the step, so that micro-batches and ranks add up.
    """
    loss = reconstruction_loss(uae, tower, batch['x'], seen, batch['y'], batch['mask'],
                               batch['z'], config)
    return loss * len(batch['x']) * share


@torch.no_grad()
def caption(uae, x, index, step, config):
    """Each image's caption and start noise. x (P, 3, R, R), index (P,) in the global batch.

    Returns seen (the images as the encoder sees them) and the batch of `loss_of`.
    """
    z = common.normal(uae.latent_shape(), index, config.seed, 'start', step).to(uae.device)
    uniforms = common.uniform((config.caption_len,), index, config.seed, 'token', step)
    seen = uae.see(x)
    y, mask, _ = uae.sample_captions(seen, 1, config.cold_temperature, uniforms.to(uae.device))
    return seen, dict(x=x, y=y, mask=mask, z=z)


def planned_loss(uae, tower, size, prompt_len, config):
    """For --plan: the loss of `size` images, zeros in place of images, tokens and noise."""
    x = torch.zeros(size, 3, config.resolution, config.resolution)
    y = torch.zeros(size, config.caption_len, dtype=torch.long)
    z = torch.zeros(size, *uae.latent_shape())
    return reconstruction_loss(uae, tower, x, None, y, torch.ones(y.shape), z, config)


def main(argv):
    config = parse(keys, own_presets, argv, __file__)
    if not 1 <= config.grad_steps <= config.sample_steps:
        raise SystemExit(f'--grad_steps={config.grad_steps}: between 1 and '
                         f'sample_steps={config.sample_steps} denoising steps carry the gradient')
    if config.plan:
        return plan(config, ['encoder', 'projector', 'decoder'], planned_loss)
    run = common.start(config)
    P = common.per_rank('prompts', config.prompts, run.world)
    start_step = checkpoint.open_out_dir(config, run)
    checkpoint.watch_sigterm()
    train, held_out = open_data(config, run)
    uae = checkpoint.open_uae(config, run.device)
    if uae.text_encoder:
        raise SystemExit(f'{config.init_from} has a text encoder of its own, which stage 1 would '
                         'not train: start from a checkpoint of before --text_encoder=start')
    params = uae.train_only('encoder', 'projector', 'decoder')
    ddp = common.parallel(uae, run)
    tower = reward_tower(config, run.device)
    optimiser = common.Optimiser(params, config)
    checkpoint.restore(config, optimiser)
    log = Log(config, run)
    evaluate = Evaluator(uae, held_out, config, run, dict(reward=tower), log)

    for step in log.progress(start_step):
        evaluate.every(step)
        source = train.batch(config.seed, step, config.prompts, run.rank, run.world)
        seen, batch = caption(uae, source['x'].to(run.device), source['index'], step, config)
        stats = Stats()
        for _, rows, last in common.group_slices(P, 1, config.micro_batch):
            part = common.take(batch, rows)
            with common.no_sync(ddp, last):
                loss = ddp(loss_of, tower, common.take(seen, rows), part, 1 / P, config)
                loss.backward()
            stats.add_sum(loss=loss.detach())
        taken = optimiser.step(step)
        fields = stats.reduce(run)
        log(step, reward=1 - fields['loss'], **fields, **taken,
            **caption_fields(uae.spoken(batch['y'], batch['mask']), run),
            skipped=count_skipped(train, held_out, run))
        checkpoint.maybe_save(config, run, step + 1, uae, optimiser)
    evaluate.every(config.steps)


if __name__ == '__main__':
    main(sys.argv[1:])
