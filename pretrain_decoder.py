"""Stage 0: long-caption pre-training of the decoder (flow matching on image and caption), or edits.

    python pretrain_decoder.py                 # tiny, the embedded world's scenes and captions
    python pretrain_decoder.py --data=manifest.jsonl --ema=0.999
    torchrun --nproc_per_node=8 pretrain_decoder.py --preset=paper --data=/data/longcap
    python pretrain_decoder.py --condition=text+image --caption_every=0 \\
        --data=edits.jsonl --data_keys="('image', 'caption', '', 'source')"

The decoder learns to draw from the encoder's projected states before any reward is used:

    c = g(h_T(caption))      z_s = (1 - s) z_0 + s eps
    L = mean | v_theta(z_s, s, c) - (eps - z_0) |^2      tiny: + cross-entropy of a caption,
                                                         every third update

    paper                       here                         why
    encoder frozen              train_encoder: tiny True     a 3-layer language model keeps little
                                                             of earlier words in its last states
    logit-normal s, mean 0,     tiny: mean 1, std 1.2        in tiny latents colour is decided at
    std 1                                                    high noise (data/shapes)
    condition dropout not       10 % to the negative prompt  classifier-free guidance needs the
    stated                                                   unconditional branch
    EMA not stated              off; `ema`, .999 is usual    short runs end on a falling learning
                                                             rate, which averages too

A caption that does not fit cond_len is cut, counted (log field `cut`) and announced, as are words
that the tokenizer does not know (`unknown`). An image without a caption is left out and counted
(`skipped`). Where data_keys names a source image the caption is an instruction: the encoder reads
the two separately, c = {c_text, c_img}, the decoder draws the image, and evaluations draw held-out
edits. With --ema the weights that are evaluated, saved and read by later stages are the averaged
ones; those in training lie in state.pt.
"""
import argparse
import contextlib
import os
import sys

import torch

from config import parse
from data.images import keep_captioned, open_data, open_images
from lib import checkpoint, ranks
from lib.log import Log, Stats, count_skipped
from lib.optimiser import Optimiser
from lib.scores import Evaluator

# --- script keys ---------------------------------------------------------------------------------
keys = dict(
    steps = 1000,              # updates
    batch = 64,                # images an update, all ranks together
    lr = 1e-3,
    warmup = 100,              # updates of linear warm-up
    lr_decay = 1.0,            # cosine to 0 after lr_decay * steps updates; 0 = constant
    sigma_mean = 1.0,          # s = sigmoid(sigma_mean + sigma_std N(0,1)); SD3 has 0 and 1
    sigma_std = 1.2,
    drop = 0.1,                # share of conditions replaced by the negative prompt
    ema = 0.0,                 # decay of the averaged weights per update; 0 = none
    train_encoder = True,      # flow loss for the language model; a caption loss beside it
    caption_every = 3,         # updates between caption losses (train_encoder); 0 = none
    answer_key = 'caption',    # manifest field that the caption loss teaches (train_encoder)
)
own_presets = dict(
    tiny=dict(eval_every=250),
    medium=dict(steps=10000, batch=64, lr=1e-4, sigma_mean=0.0, sigma_std=1.0,
                train_encoder=False, eval_every=500),
    paper=dict(steps=10000, batch=256, lr=1e-4, sigma_mean=0.0, sigma_std=1.0,
               train_encoder=False, eval_every=500))
limits = dict(
    batch=(1, 1e6), sigma_mean=(-100, 100), drop=(0, 0.999), ema=(0, 1 - 1e-9))
# -------------------------------------------------------------------------------------------------


def open_captioned(config, run, key):
    """Training images with the captions at manifest field `key`.

    Returns the ImageSet, the number left out for want of a caption, and the held-out dict. Where
    nothing is evaluated nothing is held out. The embedded world's list of scenes is a manifest.
    """
    image_key, _, *others = config.data_keys
    config = argparse.Namespace(**dict(vars(config), data_keys=(image_key, key, *others)))
    if config.eval_every or config.data == 'shapes':
        images, held_out = open_data(config, run)
    else:
        images = open_images(config.data, config.resolution, *config.data_keys)
        held_out = dict(skipped=images.left_out)
    if config.data == 'shapes':
        from data.shapes import scenes as world
        root = os.path.dirname(world.__file__)
        images = open_images(f'{root}/images/scenes.jsonl', config.resolution, 'file', key)
    images.split_held_out()                                 # scenes.jsonl lists these too
    return images, keep_captioned(images, config, run), held_out


def check_edits(config, teaching):
    """Refuses edits whose source nobody would see, or whose instruction a captioner would learn."""
    caption_key, source_key = config.data_keys[1], config.data_keys[3]
    if not source_key:
        return
    if config.condition not in ('answer', 'text+image'):
        raise SystemExit(f'--data_keys names a source image, {source_key!r}, which '
                         f'--condition={config.condition} leaves unseen or uninstructed: '
                         'expected text+image')
    if teaching and config.answer_key == caption_key:
        raise SystemExit('the caption of an edit is an instruction, and no caption of its image: '
                         '--answer_key=FIELD teaches another one, --caption_every=0 none')


def flow_loss(uae, z0, y, mask, s, eps, vision=None, drop=None):
    """Flow matching, mean over everything: mean | v_theta(z_s, s, c) - (eps - z_0) |^2.

    z0, eps (B, C, H, W), s (B,), captions y, mask (B, T); drop (B,) bool: the negative prompt
    instead of the condition.
    """
    noise = s.view(-1, 1, 1, 1)
    c = uae.condition(y, mask, vision)
    if drop is not None:
        c = torch.where(drop.view(-1, 1, 1), uae.negative(), c)
    v = uae.decoder.velocity((1 - noise) * z0 + noise * eps, s, c)
    return (v - (eps - z0)).square().mean()


def sayable(encoder, y, mask):
    """Tokens (B, T) of given captions that the captioner may say.

    Of the others, an unknown word say, the log-prob is -inf.
    """
    return mask.bool() & ~encoder.forbidden[y]


def caption_loss(uae, vision, y, mask, count=None):
    """Cross-entropy of given captions: minus the sum of log pi over tokens / count.

    count: None is the number of these tokens.
    """
    valid = sayable(uae.encoder, y, mask)
    if count is None:
        count = valid.sum()
    logp = torch.where(valid, uae.encoder.logp(vision, y), 0.0)
    return -logp.sum() / count


def both_losses(uae, flow, answers):
    """Flow matching, and every few updates the caption loss.

    flow: a dict, the arguments of `flow_loss`; answers: those of `caption_loss`, or None.
    """
    loss = flow_loss(uae, **flow)
    if answers is None:
        return loss, torch.zeros((), device=loss.device)
    return loss, caption_loss(uae, **answers)


# --- averaged weights, kept as `other` in the optimizer's state, and so in state.pt --------------
def average(adamw, decay):
    """w_ema <- decay w_ema + (1 - decay) w, after an update; it starts at the first one's w."""
    for p, state in adamw.state.items():
        if 'other' in state:
            state['other'].lerp_(p.data, 1 - decay)
        else:
            state['other'] = p.data.clone()


def swap(adamw):
    """Exchanges the weights in training and their averages, where there are any."""
    for p, state in adamw.state.items():
        if 'other' in state:
            p.data, state['other'] = state['other'], p.data


@contextlib.contextmanager
def averaged(adamw):
    """Inside, the models have the averaged weights, for an evaluation or a checkpoint."""
    swap(adamw)
    yield
    swap(adamw)


# --- one update ----------------------------------------------------------------------------------
def noised(uae, images, step, config):
    """Images and captions of a rank's batch -> the arguments of `flow_loss`, and what texts lost.

    All randomness is addressed by (seed, step, image).
    """
    index, x = images['index'], images['x'].to(uae.device)
    y, mask, lost = uae.encoder.tokens(images['captions'])
    nothing, nothing_mask, _ = uae.encoder.tokens([config.negative_prompt])
    drop = ranks.uniform((), index, config.seed, 'drop', step) < config.drop
    y[drop] = nothing[0]
    mask[drop] = nothing_mask[0]
    sigma = ranks.normal((), index, config.seed, 'sigma', step)
    s = torch.sigmoid(config.sigma_mean + config.sigma_std * sigma)
    eps = ranks.normal(uae.decoder.latent_shape(), index, config.seed, 'eps', step)
    flow = dict(z0=uae.decoder.to_latent(x), y=y, mask=mask, s=s.to(uae.device),
                eps=eps.to(uae.device))
    if config.condition != 'text':           # without its caption the image would still be seen
        flow['drop'] = drop.to(uae.device)
    return flow, lost


def main(argv):
    config = parse(keys, own_presets, argv, __file__, limits)
    trained = ['projector', 'decoder']
    if config.train_encoder:
        trained.append('encoder')
    teaching = config.train_encoder and config.caption_every
    check_edits(config, teaching)
    run = ranks.start(config)
    P = ranks.per_rank('batch', config.batch, run.world)
    start_step = checkpoint.open_out_dir(config, run)
    train, gone, held_out = open_captioned(config, run, config.data_keys[1])
    teachers = train
    if teaching and config.answer_key != config.data_keys[1]:
        teachers, _, _ = open_captioned(config, run, config.answer_key)
    uae = checkpoint.open_uae(config, run.device, new_projector=True)
    if config.data_keys[3]:
        uae.edits = config.condition
    params = uae.train_only(*trained)
    model = ranks.parallel(uae, run)
    optimiser = Optimiser(params, config, betas=(0.9, 0.99), weight_decay=0.01)
    adamw = optimiser.adamw
    checkpoint.restore(config, optimiser)
    swap(adamw)                         # a checkpoint's models are the averaged ones
    log = Log(config, run)
    evaluate = Evaluator(uae, held_out, config, run, log=log)

    for step in log.progress(start_step):
        with averaged(adamw):
            evaluate.every(step)
        images = train.batch(config.seed, step, config.batch, run.rank, run.world)
        flow, lost = noised(uae, images, step, config)
        answers = None
        if teaching and step % config.caption_every == 0:
            taught = teachers.batch(config.seed, step, config.batch, run.rank, run.world)
            y, mask, _ = uae.encoder.tokens(taught['captions'])
            answers = dict(x=taught['x'], y=y, mask=mask)
            said = ranks.total(sayable(uae.encoder, y, mask).sum(), run) / run.world

        seen = images.get('source', images['x'])
        stats = Stats()
        uae.train()                             # turns on the recomputation of activations
        for _, rows, last in ranks.sample_slices(P, 1, config.micro_batch):
            part = ranks.take(flow, rows)
            if config.condition != 'text':
                part['vision'] = uae.encoder.see(seen[rows])
            answer = None
            if answers:
                answer = ranks.take(answers, rows)
                answer.update(vision=uae.encoder.see(answer.pop('x')), count=said)
            with ranks.no_sync(model, last):
                # model(f, ...) is f(uae, ...): DistributedDataParallel sees the forward pass
                loss, nll = model(both_losses, part, answer)
                loss = loss * len(part['y']) / P        # the sum of the parts is the mean
                (loss + nll).backward()
            stats.add_sum(loss=loss.detach(), caption_loss=nll.detach())
        taken = optimiser.step(step)
        uae.eval()
        if config.ema and not optimiser.bad_steps:
            average(adamw, config.ema)

        lost = {name: int(ranks.total(count, run)) for name, count in lost.items()}
        skipped = gone + count_skipped(train, held_out, run)
        log(step, **stats.reduce(run), **taken, **lost, skipped=skipped)
        with averaged(adamw):
            checkpoint.maybe_save(config, run, step + 1, uae, optimiser)
    with averaged(adamw):
        evaluate.every(config.steps)


if __name__ == '__main__':
    main(sys.argv[1:])
