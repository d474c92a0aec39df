"""Stage 1, cold-start reconstruction: the semantic loss, back-propagated through the sampler into both sides.

    python cold_start.py                                                    # tiny, from the shipped base
    torchrun --nproc_per_node=8 cold_start.py --preset=paper --data=/data/photos --init_from=out/pretrain_decoder

    y = caption of x by the encoder      c = g(h_T(y))      x_hat ~ p_theta(. | c)      L = 1 - cos(f_I(x), f_I(x_hat))

What gets a gradient: the decoder through the last `grad_steps` denoising steps, the projector and, through c, the
language model that re-encodes the caption. What does not: the choice of words (tokens are discrete, that is stage 2),
the vision tower (frozen), VAE and CLIP (frozen, but the gradient passes through them).

    paper                             here                                why
    steps and depth of the sampler    tiny: 6 ODE steps, gradient through 2 a shorter chain needs less memory
    captions not stated               greedy (`cold_temperature` 0)       a terse sampled caption does not determine the image: the decoder
                                                                          would be taught the average picture
    learning rate not stated          2e-5 (tiny), 1e-6 (paper)           a large step teaches the average picture
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
# -------------------------------------------------------------------------------------------------------------------


def reconstruction_loss(uae, tower, x, seen, y, mask, z, c):
    """L = 1 - cos(f_I(x), f_I(x_hat)), mean over images. x (P, 3, R, R), y, mask (P, T), start noise z (P, C, H, W)."""
    cond = uae.condition(y, mask, seen)
    x_hat = uae.to_image(uae.draw(z, cond, c.sample_steps, c.grad_steps))
    return (1 - clip_reward(x, x_hat, tower)).mean()


def loss_of(uae, tower, x, seen, y, mask, z, share, c):
    """The whole loss of a micro-batch; `share` = world / images of the step, so that micro-batches and ranks add up."""
    return reconstruction_loss(uae, tower, x, seen, y, mask, z, c) * len(x) * share


def main(argv):
    c = config.parse(keys, own_presets, argv, __file__)
    if not 1 <= c.grad_steps <= c.sample_steps:
        raise SystemExit(f'--grad_steps={c.grad_steps}: between 1 and sample_steps={c.sample_steps} denoising steps carry the gradient')
    if c.plan:
        return common.plan(c, 'encoder', 'projector', 'decoder')
    run = common.start(c)
    common.per_rank('prompts', c.prompts, run.world)                    # which must divide
    first = common.open_out_dir(c, run)
    train, held = open_data(c, run)
    uae = UAE(c, run.device)
    params = uae.train_only('encoder', 'projector', 'decoder')
    ddp = common.parallel(uae, run)
    tower = backbone(c.reward, c, run.device)
    opt = torch.optim.AdamW(params, lr=c.lr, weight_decay=0.0, fused=True)
    common.restore(c, opt)
    log, evaluate = common.Log(c, run), Evaluator(uae, held, c, run)

    for step in tqdm(range(first, c.steps), initial=first, total=c.steps, desc='cold_start', disable=not run.master):
        evaluate.every(step)
        batch = train.batch(c.seed, step, c.prompts, run.rank, run.world)
        x, index = batch['x'].to(run.device), batch['index']
        z = common.normal(uae.latent_shape(), index, c.seed, 'start', step).to(run.device)
        u = common.uniform((c.caption_len,), index, c.seed, 'token', step).to(run.device)
        with torch.no_grad():
            seen = uae.see(x)
            y, mask, _ = uae.sample_captions(seen, 1, c.cold_temperature, u)

        stats = common.Stats()
        for s, b, last in common.group_slices(seen, 1, c.micro_batch):
            with common.no_sync(ddp, not last):
                loss = ddp(loss_of, tower, x[b], s, y[b], mask[b], z[b], run.world / c.prompts, c)
                loss.backward()
            stats.add(loss=loss.detach())                               # losses add up: each has its share in it
        taken = common.optimise(opt, params, step, c)

        stats = stats.reduce(run)
        words = (y != uae.end) * mask                                   # without end tokens
        log(step, reward=1 - stats['loss'], **stats, **taken,
            caption_len=common.total(words.sum(), run) / c.prompts, truncated=common.total(words[:, -1].sum(), run) / c.prompts,
            skipped=int(common.total(len(train.skipped), run)) + held['skipped'])
        common.maybe_save(c, run, step + 1, uae, opt)
    evaluate.every(c.steps, last=True)


if __name__ == '__main__':
    main(sys.argv[1:])
