"""Stage 0: long-caption pre-training of the decoder (flow matching on image and caption).

    python pretrain_decoder.py                 # tiny, the embedded world's scenes and captions
    python pretrain_decoder.py --data=manifest.jsonl --ema=0.999
    torchrun --nproc_per_node=8 pretrain_decoder.py --preset=paper --data=/data/longcap

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

A caption that does not fit cond_len is cut, counted (log field `truncated`) and announced. An image
without a caption is left out and counted (`skipped`). With --ema the weights that are evaluated,
saved and read by later stages are the averaged ones; those in training lie in state.pt.
"""
import argparse
import contextlib
import os
import sys

import torch
from tqdm import tqdm

import checkpoint
import common
from config import parse
from data.images import open_data, open_images
from evaluate import Evaluator
from log import Log, Stats
from policy import token_logp
from tools.plan import plan

# --- script keys ---------------------------------------------------------------------------------
keys = dict(
    steps = 1000,              # updates
    batch = 64,                # images per update, all ranks together
    lr = 1e-3,
    grad_clip = 1.0,           # largest gradient norm
    patience = 5,              # updates in a row with a non-finite gradient that end the run
    warmup = 100,              # updates of linear warm-up
    lr_decay = 1.0,            # cosine to 0 after lr_decay * steps updates; 0 = constant
    sigma_mean = 1.0,          # s = sigmoid(sigma_mean + sigma_std N(0,1)); SD3 has 0 and 1
    sigma_std = 1.2,
    drop = 0.1,                # share of conditions replaced by the negative prompt
    ema = 0.0,                 # decay of the averaged weights per update; 0 = none
    train_encoder = True,      # flow loss for the language model; a caption loss beside it
    caption_every = 3,         # updates between caption losses (train_encoder)
    answer_key = 'caption',    # manifest field that the caption loss teaches (train_encoder)
)
own_presets = dict(
    tiny=dict(eval_every=250),
    medium=dict(steps=10000, batch=64, lr=1e-4, sigma_mean=0.0, sigma_std=1.0,
                train_encoder=False, eval_every=500),
    paper=dict(steps=10000, batch=256, lr=1e-4, sigma_mean=0.0, sigma_std=1.0,
               train_encoder=False, eval_every=500))
# -------------------------------------------------------------------------------------------------


def open_captioned(config, run, key):
    """Training images with the captions at manifest field `key`.

    Returns the ImageSet, the number left out for want of a caption, and the held-out dict, or None
    where nothing is evaluated. The embedded world's list of scenes is a manifest.
    """
    image_key, _, folder = config.data_keys
    config = argparse.Namespace(**dict(vars(config), data_keys=(image_key, key, folder)))
    held_out = None
    if config.eval_every or config.data == 'shapes':
        images, held_out = open_data(config, run)
    else:
        images = open_images(config.data, config.resolution, *config.data_keys)
    if config.data == 'shapes':
        from data.shapes import scenes as world
        root = os.path.dirname(world.__file__)
        images = open_images(f'{root}/images/scenes.jsonl', config.resolution, 'file', key)
    images.split_held_out()                                 # scenes.jsonl lists these too
    whole = len(images)
    gone = images.keep_captioned()
    if gone == whole:
        raise SystemExit(f'{config.data}: none of the {gone} images has a caption, stage 0 needs '
                         'them (data/README.md)')
    if gone and run.master:
        print(f'warning: {gone} of the {whole} images of {config.data} have no caption and are '
              'left out', flush=True)
    return images, gone, held_out


def flow_loss(uae, z0, y, mask, s, eps, seen=None, drop=None):
    """Flow matching, mean over everything: mean | v_theta(z_s, s, c) - (eps - z_0) |^2.

    z0, eps (B, C, H, W), s (B,), captions y, mask (B, T); drop (B,) bool: the negative prompt
    instead of the condition.
    """
    noise = s.view(-1, 1, 1, 1)
    cond = uae.condition(y, mask, seen)
    if drop is not None:
        cond = torch.where(drop.view(-1, 1, 1), uae.negative(), cond)
    v = uae.velocity((1 - noise) * z0 + noise * eps, s, cond)
    return (v - (eps - z0)).square().mean()


def sayable(uae, y, mask):
    """Tokens (B, T) of given captions that the captioner may say.

    Of the others, an unknown word say, the log-prob is -inf.
    """
    return mask.bool() & ~uae.forbidden[y]


def caption_loss(uae, seen, y, mask, count=None):
    """Cross-entropy of given captions: minus the sum of log pi over tokens / count.

    count: None is the number of these tokens.
    """
    valid = sayable(uae, y, mask)
    if count is None:
        count = valid.sum()
    logp = torch.where(valid, uae.caption_logp(seen, y), 0.0)
    return -logp.sum() / count


def both_losses(uae, flow, answers, share):
    """The whole loss of a micro-batch: flow matching, and every few updates the caption loss.

    flow: a dict, the arguments of `flow_loss`; answers: those of `caption_loss`, or None. share:
    world / images of the step.
    """
    loss = flow_loss(uae, **flow) * len(flow['z0']) * share
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
def prepare(uae, config, images, rows, step, negative):
    """Images `rows`, a slice, of a rank's batch -> the arguments of `flow_loss`.

    All randomness is addressed by (seed, step, image). Returns also how many captions are too long.
    """
    index = images['index'][rows]
    x = images['x'][rows].to(uae.device)
    y, mask, cut = uae.tokens(images['captions'][rows], len(negative['y']))
    drop = common.uniform((), index, config.seed, 'drop', step) < config.drop
    y[drop] = negative['y']
    mask[drop] = negative['mask']
    sigma = common.normal((), index, config.seed, 'sigma', step)
    s = torch.sigmoid(config.sigma_mean + config.sigma_std * sigma)
    eps = common.normal(uae.latent_shape(), index, config.seed, 'eps', step)
    flow = dict(z0=uae.to_latent(x), y=y, mask=mask, s=s.to(uae.device), eps=eps.to(uae.device))
    if config.condition != 'text':           # without its caption the image would still be seen
        flow.update(seen=uae.see(x), drop=drop.to(uae.device))
    return flow, cut


def prepare_answers(uae, images, run):
    """A batch of captions to be taught -> x, y, mask, and count, the step's tokens per rank."""
    y, mask, _ = uae.tokens(images['captions'])
    count = common.total(sayable(uae, y, mask).sum(), run) / run.world
    return dict(x=images['x'], y=y, mask=mask), count


def backward(uae, ddp, images, taught, step, negative, config):
    """The gradients of one update, a micro-batch at a time -> Stats, captions that are too long.

    images: a rank's batch; taught: what `prepare_answers` returns, or None.
    """
    P = len(images['x'])
    stats, cut = Stats(), 0
    for _, rows, last in common.group_slices(P, 1, config.micro_batch):
        flow, too_long = prepare(uae, config, images, rows, step, negative)
        answers = None
        if taught:
            batch, count = taught
            part = common.take(batch, rows)
            answers = dict(seen=uae.see(part.pop('x')), **part, count=count)
        with common.no_sync(ddp, last):
            loss, nll = ddp(both_losses, flow, answers, 1 / P)
            (loss + nll).backward()
        stats.add_sum(loss=loss.detach(), caption_loss=nll.detach())
        cut += too_long
    return stats, cut


def planned_loss(uae, tower, size, prompt_len, config):
    """For --plan: the losses of `size` images, zeros in place of latents, prompt and tokens."""
    latents = torch.zeros(size, *uae.latent_shape())
    y = torch.zeros(size, config.caption_len, dtype=torch.long)
    flow = flow_loss(uae, latents, y, torch.ones(y.shape), torch.zeros(size), latents)
    if not config.train_encoder:
        return flow
    embedded = torch.zeros(size, prompt_len, uae.encoder.config.text_config.hidden_size)
    positions = torch.zeros(3, size, prompt_len, dtype=torch.long)
    states = uae.states_after(embedded, positions, y)[:, :-1]
    return flow, token_logp(states, uae.head, y, 1.0, uae.forbidden)


class Cuts:
    """Counts captions that do not fit, and says so at the first one and at the end."""

    def __init__(self, room, config, run):
        self.room, self.config, self.run = room, config, run
        self.so_far = 0

    def add(self, cut, step):
        """cut: of one step, all ranks together."""
        told = self.so_far > 0
        self.so_far += cut
        now = cut and not told
        end = self.so_far and step == self.config.steps - 1
        if self.run.master and (now or end):
            tqdm.write(f'warning: {self.so_far} captions so far do not fit the {self.room} tokens '
                       f'that cond_len={self.config.cond_len} has for them, and were cut')


def main(argv):
    config = parse(keys, own_presets, argv, __file__)
    trained = ['projector', 'decoder']
    if config.train_encoder:
        trained.append('encoder')
    if config.plan:
        return plan(config, trained, planned_loss)
    run = common.start(config)
    common.per_rank('batch', config.batch, run.world)
    start_step = checkpoint.open_out_dir(config, run)
    checkpoint.watch_sigterm()
    train, gone, held_out = open_captioned(config, run, config.data_keys[1])
    teachers = train
    if config.train_encoder and config.answer_key != config.data_keys[1]:
        teachers, _, _ = open_captioned(config, run, config.answer_key)
    uae = checkpoint.open_uae(config, run.device, new_projector=True)
    params = uae.train_only(*trained)
    ddp = common.parallel(uae, run)
    optimiser = common.Optimiser(params, config, betas=(0.9, 0.99), weight_decay=0.01)
    adamw = optimiser.adamw
    checkpoint.restore(config, optimiser)
    swap(adamw)                         # a checkpoint's models are the averaged ones
    log = Log(config, run)
    evaluate = Evaluator(uae, held_out, config, run) if config.eval_every else None
    room = config.cond_len - len(uae.before_text) - len(uae.after_text)
    y, mask, _ = uae.tokens([config.negative_prompt], room + 1)
    negative = dict(y=y[0], mask=mask[0])
    cuts = Cuts(room, config, run)

    for step in log.progress(start_step):
        if evaluate:
            with averaged(adamw):
                evaluate.every(step)
        images = train.batch(config.seed, step, config.batch, run.rank, run.world)
        taught = None
        if config.train_encoder and step % config.caption_every == 0:
            examples = teachers.batch(config.seed, step, config.batch, run.rank, run.world)
            taught = prepare_answers(uae, examples, run)
        stats, cut = backward(uae, ddp, images, taught, step, negative, config)
        taken = optimiser.step(step)
        if config.ema and not optimiser.bad_steps:
            average(adamw, config.ema)
        cut = int(common.total(cut, run))
        cuts.add(cut, step)
        skipped = gone + int(common.total(len(train.skipped), run))
        if held_out:
            skipped += held_out['skipped']
        log(step, **stats.reduce(run), **taken, truncated=cut, skipped=skipped)
        with averaged(adamw):
            checkpoint.maybe_save(config, run, step + 1, uae, optimiser)
    if evaluate:
        with averaged(adamw):
            evaluate.every(config.steps)


if __name__ == '__main__':
    main(sys.argv[1:])
