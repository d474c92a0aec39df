"""Stage 1, cold-start reconstruction: the semantic loss, back-propagated through the sampler.

    python cold_start.py                                              # tiny, from the shipped base
    torchrun --nproc_per_node=8 cold_start.py --preset=paper --data=/data/photos \
        --init_from=out/pretrain_decoder

    y = caption of x by the encoder      c = g(h_T(y))      x_hat ~ p_theta(. | c)
    L = 1 - cos(f_I(x), f_I(x_hat))

What gets a gradient: the decoder through the last `grad_steps` denoising steps, the projector and,
through c, the language model that re-encodes the caption. What does not: the choice of words
(tokens are discrete, that is stage 2), the branch of the negative prompt under guidance, the vision
tower, and VAE and CLIP, which it only crosses.

    paper                       here                         why
    steps and depth of the      tiny: 6 ODE steps, gradient  a shorter chain needs less memory
    sampler not stated          through 2
    captions not stated         greedy                       a terse sampled caption does not say
                                                             what the image is: the decoder would
                                                             learn to draw the average picture
    learning rate not stated    2e-5 (tiny), 1e-6 (paper)    a large step too teaches the average
                                                             picture
    CLIP sees images resized    with antialias, as CLIP      the authors' file also divides by 255
    without antialias           itself was trained           twice; not imitated
"""
import sys

import torch

from config import parse
from data.images import keep_captioned, open_data
from lib import checkpoint, ranks
from lib.log import Log, Stats, caption_fields, count_skipped
from lib.optimiser import Optimiser
from lib.scores import Evaluator
from reward import clip_reward, reward_tower

# --- script keys ---------------------------------------------------------------------------------
# those that all scripts share are in config.py
keys = dict(
    steps = 80,                # updates
    batch = 24,                # images an update, all ranks together
    trains = 'all',            # all | decoder: after stage 2, in place of stage 3 where the
                               # reward has a gradient (docs/results.md)
    captions = 'own',          # what is drawn: own, the encoder's greedy caption | given, the one
                               # that comes with the image
    grad_steps = 2,            # K: gradients flow through the last K denoising steps
    lr = 2e-5,
    warmup = 0,                # updates of linear warm-up
    lr_decay = 1.0,            # cosine to 0 after lr_decay * steps updates; 0 = constant
)
own_presets = dict(
    tiny=dict(denoise_steps=6),
    medium=dict(steps=500, batch=32, lr=1e-6),
    paper=dict(steps=500, batch=64, lr=1e-6))
limits = dict(
    batch=(1, 1e6), trains=('all', 'decoder'), captions=('own', 'given'), grad_steps=(1, 1000))
# -------------------------------------------------------------------------------------------------


def reconstruction_loss(uae, tower, x, y, mask, z, vision, config):
    """L = 1 - cos(f_I(x), f_I(x_hat)), mean over images.

    x (P, 3, R, R), captions y, mask (P, T), start noise z (P, C, H, W) -> loss ().
    """
    c = uae.condition(y, mask, vision)
    x_hat = uae.draw(z, c, config.denoise_steps, config.grad_steps)
    return (1 - clip_reward(x, x_hat, tower, uae.encoder.texts(y, mask))).mean()


@torch.no_grad()
def rollout(uae, images, step, config):
    """Each image's caption and start noise. images: x (P, 3, R, R), index (P,) in the global batch.

    Returns the arguments x, y, mask, z of `reconstruction_loss`, and vision, P rows each.
    """
    x = images['x'].to(uae.device)
    vision = uae.encoder.see(x)
    if config.captions == 'given':
        y, mask, _ = uae.encoder.tokens(images['captions'])
    else:
        y, mask, _ = uae.encoder.sample(vision, temperature=0.0)
    shape = uae.decoder.latent_shape()
    z = ranks.normal(shape, images['index'], config.seed, 'start', step).to(uae.device)
    return dict(x=x, y=y, mask=mask, z=z), vision


def main(argv):
    config = parse(keys, own_presets, argv, __file__, limits)
    if config.grad_steps > config.denoise_steps:
        raise SystemExit(f'--grad_steps={config.grad_steps}: between 1 and '
                         f'denoise_steps={config.denoise_steps} denoising steps carry the gradient')
    run = ranks.start(config)
    P = ranks.per_rank('batch', config.batch, run.world)
    start_step = checkpoint.open_out_dir(config, run)
    train, held_out = open_data(config, run)
    if config.captions == 'given':
        keep_captioned(train, config, run)
    uae = checkpoint.open_uae(config, run.device)
    parts = ['decoder']
    if config.trains == 'all':
        parts += ['encoder', 'projector']
    if uae.encoder.text_encoder and config.trains == 'all':
        raise SystemExit(f'{config.init_from} has a text encoder of its own, which stage 1 would '
                         'not train: start from a checkpoint of before stage 2, or give '
                         '--trains=decoder')
    params = uae.train_only(*parts)
    model = ranks.parallel(uae, run)
    tower = reward_tower(config, run.device)
    optimiser = Optimiser(params, config)
    checkpoint.restore(config, optimiser)
    log = Log(config, run)
    evaluate = Evaluator(uae, held_out, config, run, dict(reward=tower), log)

    for step in log.progress(start_step):
        evaluate.every(step)
        images = train.batch(config.seed, step, config.batch, run.rank, run.world)
        sampled, vision = rollout(uae, images, step, config)

        stats = Stats()
        uae.train()                             # turns on the recomputation of activations
        for _, rows, last in ranks.sample_slices(P, 1, config.micro_batch):
            part = ranks.take(sampled, rows)
            with ranks.no_sync(model, last):
                # model(f, ...) is f(uae, ...): DistributedDataParallel sees the forward pass
                loss = model(reconstruction_loss, tower, **part, vision=ranks.take(vision, rows),
                             config=config)
                loss = loss * len(part['x']) / P        # the sum of the parts is the mean
                loss.backward()
            stats.add_sum(loss=loss.detach())
        taken = optimiser.step(step)
        uae.eval()

        fields = stats.reduce(run)
        words = uae.encoder.words(sampled['y'], sampled['mask'])
        log(step, reward=1 - fields['loss'], **fields, **taken,
            **caption_fields(words, uae.encoder.text_room, run),
            skipped=count_skipped(train, held_out, run))
        checkpoint.maybe_save(config, run, step + 1, uae, optimiser)
    evaluate.every(config.steps)


if __name__ == '__main__':
    main(sys.argv[1:])
