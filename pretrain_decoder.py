"""Stage 0: long-caption pre-training of the decoder (flow matching on image and caption).

    python pretrain_decoder.py                                 # tiny, on the embedded world's training scenes and their captions
    python pretrain_decoder.py --data=manifest.jsonl --ema=0.999
    torchrun --nproc_per_node=8 pretrain_decoder.py --preset=paper --data=/data/longcap

The decoder learns to draw from the encoder's projected hidden states before any reward is used:
    z_s = (1 - s) z_0 + s eps,   L = mean | v_theta(z_s, s, c) - (eps - z_0) |^2,   c = g(h_T(caption));   tiny: + cross-entropy of a caption, every third update

    paper                                 here                                      why
    encoder frozen                        train_encoder: paper False, tiny True     a 3-layer language model keeps little of earlier words in its last states
    logit-normal s of mean 0, std 1       tiny: mean 1, std 1.2 (`sigma_mean`)      in tiny latents colour is decided at high noise (data/shapes)
    condition dropout not stated          10 % to the negative prompt               classifier-free guidance needs the unconditional branch
    EMA not stated                        off; `ema`, .999 to .9999 is usual       short runs end on a falling learning rate, which averages too

A caption that does not fit cond_len is cut, counted (log field `truncated`) and announced. An image without a caption is left out and counted (`skipped`).
With --ema the weights that are evaluated, saved and read by later stages are the averaged ones; those in training lie in state.pt, for --resume.
"""
import contextlib
import os
import sys

import torch
from tqdm import tqdm

import common
import config
from data.images import ImageError, open_data, open_images
from evaluate import Evaluator
from model import UAE

# --- script keys ---------------------------------------------------------------------------------------------------
keys = dict(
    steps = 1000,              # updates
    batch = 64,                # images per update, all ranks together
    lr = 1e-3,
    grad_clip = 1.0,           # largest gradient norm
    patience = 5,              # updates in a row with a non-finite gradient that end the run
    warmup = 100,              # updates of linear warm-up
    lr_decay = 1.0,            # cosine to 0 after lr_decay * steps updates; 0 = constant
    sigma_mean = 1.0,          # s = sigmoid(sigma_mean + sigma_std N(0,1)); 0 and 1 are SD3's published density
    sigma_std = 1.2,
    drop = 0.1,                # share of conditions replaced by the negative prompt
    ema = 0.0,                 # decay of the averaged weights per update; 0 = none
    train_encoder = True,      # the flow loss reaches the language model, and a caption loss keeps it a captioner
    caption_every = 3,         # updates between caption losses (train_encoder)
    answer_key = 'caption',    # manifest field that the caption loss teaches (train_encoder)
)
own_presets = dict(
    tiny=dict(eval_every=250),
    medium=dict(steps=10000, batch=64, lr=1e-4, sigma_mean=0.0, sigma_std=1.0, train_encoder=False, eval_every=500),
    paper=dict(steps=10000, batch=256, lr=1e-4, sigma_mean=0.0, sigma_std=1.0, train_encoder=False, eval_every=500))
# -------------------------------------------------------------------------------------------------------------------


def captioned(images, source):
    """Takes the images without a caption, or with an empty one, out of the set: at once where the listing tells, later on
    (an empty .txt) as unreadable. Returns how many went at once. Raises SystemExit if none is left."""
    def missing(caption):
        return caption is None or isinstance(caption, str) and not caption.strip()

    def get(i, really_get=images.get):
        x, caption = really_get(i)
        if missing(caption):
            raise ImageError('no caption')
        return x, caption

    keep = [i for i, (_, caption) in enumerate(images.sources) if not missing(caption)]
    gone = len(images) - len(keep)
    if not keep:
        raise SystemExit(f'{source}: none of the {gone} images has a caption, stage 0 needs them (data/README.md)')
    images.get, images.sources, images.names = get, [images.sources[i] for i in keep], [images.names[i] for i in keep]
    return gone


def open_captioned(c, run, key):
    """Training images with the captions at manifest field `key` -> (ImageSet, number left out, held-out dict or None).

    Nothing is held out where nothing is evaluated (eval_every 0). The embedded world's list of scenes is a manifest.
    """
    c = type(c)(**dict(vars(c), data_keys=(c.data_keys[0], key, c.data_keys[2])))
    images, held = open_data(c, run) if c.eval_every or c.data == 'shapes' else (open_images(c.data, c.resolution, *c.data_keys), None)
    if c.data == 'shapes':
        from data.shapes import scenes as world
        images = open_images(os.path.join(os.path.dirname(world.__file__), 'images', 'scenes.jsonl'), c.resolution, 'file', key)
        images.split_off(sum(name.startswith('held_out/') for name in images.names))          # they are its last lines
    whole, gone = len(images), captioned(images, c.data)
    if gone and run.master:
        print(f'warning: {gone} of the {whole} images of {c.data} have no caption and are left out', flush=True)
    return images, gone, held


def flow_loss(uae, z0, y, mask, s, eps, seen=None, drop=None):
    """Flow matching, mean over everything: z0, eps (B, C, H, W), s (B,), captions y, mask (B, T); drop (B,) bool: the negative prompt instead of the condition."""
    s_ = s.view(-1, 1, 1, 1)
    cond = uae.condition(y, mask, seen)
    if drop is not None:
        cond = torch.where(drop.view(-1, 1, 1), uae.negative(), cond)
    v = uae.velocity((1 - s_) * z0 + s_ * eps, s, cond)
    return (v - (eps - z0)).square().mean()


def sayable(uae, y, mask):
    """Tokens (B, T) of given captions that the captioner may say; of the others, an unknown word say, the log-prob is -inf."""
    return mask.bool() & ~uae.forbidden[y]


def caption_loss(uae, seen, y, mask, count=None):
    """Cross-entropy of given captions: minus the sum of log pi over tokens / count (None: their number)."""
    valid = sayable(uae, y, mask)
    return -torch.where(valid, uae.caption_logp(seen, y), 0.0).sum() / (valid.sum() if count is None else count)


def both_losses(uae, flow, answers, share):
    """The whole loss of a micro-batch: flow matching, and every few updates the caption loss; `share` = world / images of the step."""
    flow = flow_loss(uae, *flow) * len(flow[0]) * share
    return flow, caption_loss(uae, *answers) if answers else torch.zeros((), device=flow.device)


def average(opt, decay):
    """w_ema <- decay w_ema + (1 - decay) w, after an update; it starts at the weights after the first one. Kept as `other` in
    the optimiser's state, hence in state.pt."""
    for p in (p for group in opt.param_groups for p in group['params'] if opt.state[p]):
        if 'other' in opt.state[p]:
            opt.state[p]['other'].lerp_(p.data, 1 - decay)
        else:
            opt.state[p]['other'] = p.data.clone()


def swap(opt):
    """Exchanges the weights in training and their averages, where there are any."""
    for p, state in opt.state.items():
        if 'other' in state:
            p.data, state['other'] = state['other'], p.data


@contextlib.contextmanager
def averaged(opt):
    """Inside, the models have the averaged weights: for evaluation, and for a checkpoint, whose state.pt then keeps the others."""
    swap(opt)
    yield
    swap(opt)


def prepare(uae, c, batch, i, step, negative, room):
    """Images i (a slice) of a rank's batch -> the arguments of `flow_loss`, and how many captions are too long; all randomness
    addressed by (seed, step, image)."""
    rows, x = batch['index'][i], batch['x'][i].to(uae.device)
    y, mask, cut = uae.tokens(batch['captions'][i], room + 1)               # and the end token
    drop = common.uniform((), rows, c.seed, 'drop', step) < c.drop
    y[drop], mask[drop] = negative
    s = torch.sigmoid(c.sigma_mean + c.sigma_std * common.normal((), rows, c.seed, 'sigma', step)).to(uae.device)
    eps = common.normal(uae.latent_shape(), rows, c.seed, 'eps', step).to(uae.device)
    sight = () if c.condition == 'text' else (uae.see(x), drop.to(uae.device))          # without the caption the image is still seen
    return (uae.to_latent(x), y, mask, s, eps, *sight), cut


def main(argv):
    c = config.parse(keys, own_presets, argv, __file__)
    if c.plan:
        return common.plan(c, 'projector', 'decoder', *['encoder'] * c.train_encoder)
    run = common.start(c)
    P = common.per_rank('batch', c.batch, run.world)
    first = common.open_out_dir(c, run)
    images, gone, held = open_captioned(c, run, c.data_keys[1])
    answers = images if c.answer_key == c.data_keys[1] or not c.train_encoder else open_captioned(c, run, c.answer_key)[0]
    uae = UAE(c, run.device, new_projector=True)
    params = uae.train_only('projector', 'decoder', *['encoder'] * c.train_encoder)
    ddp = common.parallel(uae, run)
    opt = torch.optim.AdamW(params, lr=c.lr, betas=(0.9, 0.99), weight_decay=0.01)
    common.restore(c, opt)
    swap(opt)                                                               # a checkpoint's models are the averaged ones
    log, evaluate = common.Log(c, run), Evaluator(uae, held, c, run) if c.eval_every else None
    room, too_long = c.cond_len - len(uae.before_text) - len(uae.after_text), 0
    negative = [t[0] for t in uae.tokens([c.negative_prompt], room + 1)[:2]]

    for step in tqdm(range(first, c.steps), initial=first, total=c.steps, desc='pretrain_decoder', disable=not run.master, mininterval=5):
        if evaluate:
            with averaged(opt):
                evaluate.every(step)
        batch, teach = images.batch(c.seed, step, c.batch, run.rank, run.world), None
        if c.train_encoder and step % c.caption_every == 0:
            teach = answers.batch(c.seed, step, c.batch, run.rank, run.world)
            y, mask, _ = uae.tokens(teach['captions'])
            count = common.total(sayable(uae, y, mask).sum(), run) / run.world
        stats, cut, slices = common.Stats(), 0, common.image_slices(P, 1, c.micro_batch)
        for i in slices:
            flow, n = prepare(uae, c, batch, i, step, negative, room)
            with common.no_sync(ddp, i.stop < P):
                loss, nll = ddp(both_losses, flow, (uae.see(teach['x'][i]), y[i], mask[i], count) if teach else None, run.world / c.batch)
                (loss + nll).backward()
            stats.add(loss=loss.detach(), caption_loss=nll.detach() * len(slices))              # its average is then the sum
            cut += n
        taken = common.optimise(opt, params, step, c)
        if c.ema and not taken['bad_steps']:
            average(opt, c.ema)

        cut = int(common.total(cut, run))
        too_long += cut
        if run.master and (cut and cut == too_long or too_long and step == c.steps - 1):
            tqdm.write(f'warning: {too_long} captions so far do not fit the {room} tokens that cond_len={c.cond_len} has for them, and were cut')
        log(step, **stats.reduce(run), **taken, truncated=cut,
            skipped=gone + int(common.total(len(images.skipped), run)) + (held['skipped'] if held else 0))
        with averaged(opt):
            common.maybe_save(c, run, step + 1, uae, opt)
    if evaluate:
        with averaged(opt):
            evaluate.every(c.steps, last=True)


if __name__ == '__main__':
    main(sys.argv[1:])
