"""Stage 0: long-caption pre-training of the decoder (flow matching on image and caption).

    python pretrain_decoder.py --data=manifest.jsonl
    torchrun --nproc_per_node=8 pretrain_decoder.py --preset=paper --data=/data/longcap

The decoder learns to draw from the encoder's projected hidden states before any reward is used:
    z_s = (1 - s) z_0 + s eps,   L = mean | v_theta(z_s, s, c) - (eps - z_0) |^2,   c = g(h_T(caption))

    paper                                 here                                      why
    encoder frozen                        train_encoder: paper False, tiny True     a 3-layer language model keeps little of earlier words in its last states
    logit-normal s                        sigmoid(sigma_mean + sigma_std N(0,1))    in tiny latents colour is decided at high noise (data/shapes)
    condition dropout not stated          10 % to the negative prompt               classifier-free guidance needs the unconditional branch
"""
import sys

import torch
from tqdm import tqdm

import common
import config
from data.images import open_images
from model import UAE

# --- script keys ---------------------------------------------------------------------------------------------------
keys = dict(
    steps = 1000,              # updates
    batch = 64,                # images per update, all ranks together
    lr = 1e-3,
    grad_clip = 1.0,           # largest gradient norm
    warmup = 100,              # updates of linear warm-up
    lr_decay = 1.0,            # cosine to 0 after lr_decay * steps updates; 0 = constant
    sigma_mean = 1.0,          # s = sigmoid(sigma_mean + sigma_std N(0,1)); 0 and 1 are SD3's published density
    sigma_std = 1.2,
    drop = 0.1,                # share of conditions replaced by the negative prompt
    train_encoder = True,      # the flow loss reaches the language model, and a caption loss keeps it a captioner
    caption_every = 3,         # updates between caption losses (train_encoder)
    answer_key = 'caption',    # manifest field that the caption loss teaches (train_encoder)
)
own_presets = dict(
    medium=dict(steps=10000, batch=64, lr=1e-4, sigma_mean=0.0, sigma_std=1.0, train_encoder=False),
    paper=dict(steps=10000, batch=256, lr=1e-4, sigma_mean=0.0, sigma_std=1.0, train_encoder=False))
# -------------------------------------------------------------------------------------------------------------------


def flow_loss(uae, z0, y, mask, s, eps):
    """Flow matching, mean over everything: z0, eps (B, C, H, W), s (B,), captions y, mask (B, T)."""
    s_ = s.view(-1, 1, 1, 1)
    v = uae.velocity((1 - s_) * z0 + s_ * eps, s, uae.condition(y, mask))
    return (v - (eps - z0)).square().mean()


def caption_loss(uae, seen, y, mask):
    """Cross-entropy of given captions, mean over tokens."""
    return -(uae.caption_logp(seen, y) * mask).sum() / mask.sum()


def both_losses(uae, flow, answers):
    """The whole loss of a micro-batch: flow matching, and every few updates the caption loss too."""
    loss = flow_loss(uae, *flow)
    return (loss, caption_loss(uae, *answers)) if answers else (loss, torch.zeros(()))


def prepare(uae, c, batch, step, negative):
    """One rank's batch -> the arguments of `flow_loss`; all randomness addressed by (seed, step, image)."""
    rows = batch['index']
    if None in batch['captions']:
        raise SystemExit(f'{batch["names"][batch["captions"].index(None)]} has no caption: stage 0 needs one for every image (data/README.md)')
    y, mask, cut = uae.tokens(batch['captions'])
    drop = common.uniform((), rows, c.seed, 'drop', step) < c.drop
    y[drop], mask[drop] = negative
    s = torch.sigmoid(c.sigma_mean + c.sigma_std * common.normal((), rows, c.seed, 'sigma', step)).to(uae.device)
    eps = common.normal(uae.latent_shape(), rows, c.seed, 'eps', step).to(uae.device)
    return (uae.to_latent(batch['x'].to(uae.device)), y, mask, s, eps), cut


def main(argv):
    c = config.parse(keys, own_presets, argv, __file__)
    if c.plan:
        return common.plan(c, 'projector', 'decoder', *['encoder'] * c.train_encoder)
    run = common.start(c)
    first = common.open_out_dir(c, run)
    uae = UAE(c, run.device, new_projector=True)
    params = uae.train_only('projector', 'decoder', *['encoder'] * c.train_encoder)
    ddp = common.parallel(uae, run)
    opt = torch.optim.AdamW(params, lr=c.lr, betas=(0.9, 0.99), weight_decay=0.01)
    common.restore(c, opt)
    images = open_images(c.data, c.resolution, *c.data_keys)
    answers = open_images(c.data, c.resolution, c.data_keys[0], c.answer_key, c.data_keys[2]) if c.train_encoder else None
    common.per_rank('batch', c.batch, run.world)
    log = common.Log(c, run)
    negative = [t[0] for t in uae.tokens([c.negative_prompt])[:2]]

    for step in tqdm(range(first, c.steps), initial=first, total=c.steps, desc='pretrain_decoder', disable=not run.master, mininterval=5):
        batch = images.batch(c.seed, step, c.batch, run.rank, run.world)
        flow, cut = prepare(uae, c, batch, step, negative)
        teach = None
        if c.train_encoder and step % c.caption_every == 0:
            a = answers.batch(c.seed, step, c.batch, run.rank, run.world)
            teach = (uae.see(a['x']), *uae.tokens(a['captions'])[:2])
        loss, nll = ddp(both_losses, flow, teach)
        for group in opt.param_groups:
            group['lr'] = common.lr_at(step, c)
        opt.zero_grad(set_to_none=True)
        (loss + nll).backward()
        norm = torch.nn.utils.clip_grad_norm_(params, c.grad_clip)
        opt.step()
        if step % 50 == 0 or step == c.steps - 1:
            log(step, loss=loss.item(), caption_loss=nll.item(), grad_norm=norm.item(), lr=group['lr'], truncated=cut)
        common.maybe_save(c, run, step + 1, uae, opt)


if __name__ == '__main__':
    main(sys.argv[1:])
