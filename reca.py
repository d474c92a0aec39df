"""Reconstruction alignment (RecA, arXiv 2509.07295): the decoder learns to redraw an image from
what the encoder saw of it.

    python reca.py                                    # tiny, in place of cold_start.py
    python reca.py --init_from=out/grpo_decoder       # or after the loop
    torchrun --nproc_per_node=8 reca.py --preset=paper --data=/data/photos \
        --init_from=out/pretrain_decoder

    h_v = last-layer states at the image's positions of (template, image)      c_v = g(h_v)
    c_y = g(h_T(y)),  y = greedy caption of x          z_s = (1 - s) z_0 + s eps
    F(c, u) = mean | v_theta(z_s, s, c) - u |^2
    L = F(c_v, eps - z_0) + lambda_t2i F(c_y, u),      u = eps - z_0 or the initial velocity

The first term needs no caption: the image is its own, dense prompt. The encoder is frozen
(understanding and generation share no weights, so lambda_i2t = 0), projector and decoder are
trained. The template stands before the image, since in a causal language model words after it
change nothing at the image's positions. Afterwards the condition is text again, which the second
term keeps alive. In the embedded world RecA gains nothing: docs/results.md has the runs.

    paper                       here                         why
    lambda_t2i = 0              1, tiny 5                    its models draw from a sequence that
                                                             holds the text; this decoder forgets
                                                             how to read a caption
    t2i target eps - z_0        tiny: the initial velocity   a terse caption does not say what the
                                (`t2i_target`)               image is: the decoder would learn to
                                                             invent the rest
    360 templates               a handful, key `templates`   the tiny tokenizer knows 33 words
    image at 224 pixels         224, tiny: full              the tiny image has 32 pixels already
    condition dropout by        10 % to the negative prompt  classifier-free guidance needs the
    family                                                   unconditional branch
"""
import sys

import torch
import torch.nn.functional as F

import checkpoint
import common
from config import parse
from data.images import open_data
from evaluate import Evaluator
from log import Log, Stats, caption_fields, count_skipped
from tools.plan import plan

PHOTO_TEMPLATES = (
    'Describe the picture.|Say what is shown here, thing by thing.|'
    'Give a complete account of this image.|Which objects are there, how many, and where?|'
    'Put the scene into words: subjects, layout, background.|'
    'Name the colours, materials and textures that you see.|'
    'Explain the picture to somebody who cannot see it.|'
    'List everything that would be needed to paint this again.|'
    'Transcribe any text, then describe the rest.|Summary of the image:|What is this?|'
    'Foreground first, then background, light and style.')
TINY_TEMPLATES = (
    'describe the image|the image|describe the image .|describe the background , the image|'
    'image , background .')

# --- script keys ---------------------------------------------------------------------------------
keys = dict(
    steps = 128,               # updates
    batch = 48,                # images per update, all ranks together
    lr = 3e-4,
    grad_clip = 1.0,           # largest gradient norm
    patience = 5,              # updates in a row with a non-finite gradient that end the run
    warmup = 0,                # updates of linear warm-up
    lr_decay = 1.0,            # cosine to 0 after lr_decay * steps updates; 0 = constant
    lambda_t2i = 5.0,          # weight of the loss on the encoder's own greedy caption; 0 = none
    t2i_target = 'start',      # of that loss: image (eps - z_0) | start (the initial velocity)
    states = 'image',          # that condition the decoder: image | image+template (all up to it)
    template = True,           # a request in front of the image; False = the image alone
    templates = TINY_TEMPLATES,  # one of these at random, '|' between them
    see_resolution = 0,        # pixels of the image that the encoder sees here; 0 = resolution
    sigma_mean = 1.0,          # s = sigmoid(sigma_mean + sigma_std N(0,1)); SD3 has 0 and 1
    sigma_std = 1.2,
    drop = 0.1,                # share of conditions replaced by the negative prompt
)
own_presets = dict(
    medium=dict(steps=1000, batch=32, lr=4e-5, warmup=10, lambda_t2i=1.0, t2i_target='image',
                sigma_mean=0.0, sigma_std=1.0, see_resolution=224, templates=PHOTO_TEMPLATES),
    paper=dict(steps=1000, batch=96, lr=4e-5, warmup=10, lambda_t2i=1.0, t2i_target='image',
               sigma_mean=0.0, sigma_std=1.0, see_resolution=224, templates=PHOTO_TEMPLATES))
# -------------------------------------------------------------------------------------------------


def before_image(uae, template):
    """Token ids of a user turn up to the image's first position; template '' = the image alone."""
    content = [dict(type='image')]
    if template:
        content.insert(0, dict(type='text', text=template))
    turn = dict(role='user', content=content)
    text = uae.processor.apply_chat_template([turn], tokenize=False)
    before, _ = text.split('<|image_pad|>')
    return uae.tokenizer(before, add_special_tokens=False).input_ids


@torch.no_grad()
def image_states(uae, seen, before, states='image'):
    """h_v: last-layer states of the frozen encoder, each image read after its own template.

    seen: features (P, N, d), grid (P, 3). before: P lists of token ids. Returns (P, N, d), the
    image's positions, or with 'image+template' (P, L, d), zero past an image's end. Rows are padded
    on the right, where causality makes it harmless.
    """
    features, grid = seen
    P, N = features.shape[:2]
    image = uae.encoder.config.image_token_id
    ends = torch.tensor([len(ids) + N for ids in before])
    ids = torch.full((P, ends.max().item()), uae.tokenizer.pad_token_id)
    for row, template in zip(ids, before):
        row[:len(template)] = torch.tensor(template)
        row[len(template):len(template) + N] = image
    ids = ids.to(uae.device)
    at_image = ids == image
    with uae.autocast():
        positions, _ = uae.encoder.model.get_rope_index(ids, mm_token_type_ids=at_image.int(),
                                                        image_grid_thw=grid)
        embedded = uae.embed(ids)
        features = features.to(embedded.dtype)
        embedded = embedded.masked_scatter(at_image[..., None], features)
        hidden = uae.language_model(inputs_embeds=embedded, position_ids=positions,
                                    use_cache=False).last_hidden_state
    if states == 'image':
        return hidden[at_image].view(P, N, -1)
    inside = torch.arange(ids.shape[1]) < ends[:, None]
    return hidden * inside[..., None].to(uae.device)


def see_small(uae, x, config):
    """x (P, 3, R, R) -> uae.see of it at config.see_resolution."""
    if config.see_resolution:
        size = (config.see_resolution, config.see_resolution)
        x = F.interpolate(x, size, mode='bicubic', antialias=True).clamp(-1, 1)
    return uae.see(x)


def text_velocity(uae, z, s, caption, drop):
    """v_theta(z_s, s, c_y) (P, C, H, W). caption: y, mask, seen; drop (P,) bool: the negative
    prompt instead."""
    cond = uae.condition(*caption)
    cond = torch.where(drop.view(-1, 1, 1), uae.negative(), cond)
    return uae.velocity(z, s, cond)


def loss_of(uae, start, batch, caption, share, config):
    """The whole loss of a micro-batch, and both its terms, detached.

    batch: z0, eps (P, C, H, W), s (P,), drop (P,) bool, states (P, L, d). caption: y, mask, seen,
    or None. start: the model whose velocity is the captions' target, or None. share: world / images
    of the step. Dropped conditions train the decoder alone.
    """
    z0, eps, s, drop = batch['z0'], batch['eps'], batch['s'], batch['drop']
    noise = s.view(-1, 1, 1, 1)
    z = (1 - noise) * z0 + noise * eps
    target = eps - z0
    with uae.autocast():
        c_v = uae.project(uae.pad(batch['states']))
    c_v = torch.where(drop.view(-1, 1, 1), uae.negative()[:, :config.cond_len], c_v)
    f_v = (uae.velocity(z, s, c_v) - target).square().mean()
    f_y = torch.zeros((), device=z.device)
    if caption:
        if start:
            with torch.no_grad():
                target = text_velocity(start, z, s, caption, drop)
        f_y = (text_velocity(uae, z, s, caption, drop) - target).square().mean()
    loss = (f_v + config.lambda_t2i * f_y) * len(z0) * share
    return loss, f_v.detach(), f_y.detach()


def prepare(uae, config, x, index, step, templates):
    """Images x (P, 3, R, R) at positions `index` of the global batch -> the batch and the caption
    of `loss_of`; all randomness addressed by (seed, step, image). templates: lists of token ids."""
    choice = common.uniform((), index, config.seed, 'template', step) * len(templates)
    before = [templates[i] for i in choice.long().tolist()]
    sigma = common.normal((), index, config.seed, 'sigma', step)
    eps = common.normal(uae.latent_shape(), index, config.seed, 'eps', step)
    drop = common.uniform((), index, config.seed, 'drop', step) < config.drop
    s = torch.sigmoid(config.sigma_mean + config.sigma_std * sigma)
    batch = dict(z0=uae.to_latent(x), eps=eps.to(uae.device), s=s.to(uae.device),
                 drop=drop.to(uae.device),
                 states=image_states(uae, see_small(uae, x, config), before, config.states))
    if not config.lambda_t2i:
        return batch, None
    seen = uae.see(x)
    y, mask, _ = uae.sample_captions(seen, 1, 0.0)
    return batch, (y, mask, seen)


def planned_loss(uae, tower, size, prompt_len, config):
    """For --plan: the loss of `size` images, zeros in place of latents, states and tokens."""
    latents = torch.zeros(size, *uae.latent_shape())
    states = torch.zeros(size, config.cond_len, uae.projector.up.in_features)
    batch = dict(z0=latents, eps=latents, states=states, s=torch.zeros(size),
                 drop=torch.zeros(size, dtype=torch.bool))
    caption = None
    if config.lambda_t2i:
        y = torch.zeros(size, config.caption_len, dtype=torch.long)
        caption = (y, torch.ones(y.shape), None)
    return loss_of(uae, None, batch, caption, 1.0, config)[0]


def read_templates(uae, config):
    """The keys `template` and `templates` -> lists of token ids."""
    texts = ['']
    if config.template:
        texts = [text.strip() for text in config.templates.split('|') if text.strip()]
    if not texts:
        raise SystemExit("--templates is empty: give some with '|' between them, or "
                         '--template=False')
    return [before_image(uae, text) for text in texts]


def check_keys(config):
    for key, known in dict(states=('image', 'image+template'),
                           t2i_target=('image', 'start')).items():
        if getattr(config, key) not in known:
            raise SystemExit(f'--{key}: expected one of {" ".join(known)}, '
                             f'got {getattr(config, key)!r}')
    if not 0 <= config.see_resolution <= config.resolution:
        raise SystemExit(f'--see_resolution={config.see_resolution}: between 1 and '
                         f'resolution={config.resolution}, or 0 for the full one')


def main(argv):
    config = parse(keys, own_presets, argv, __file__)
    check_keys(config)
    if config.plan:
        return plan(config, ['projector', 'decoder'], planned_loss)
    run = common.start(config)
    P = common.per_rank('batch', config.batch, run.world)
    start_step = checkpoint.open_out_dir(config, run)
    checkpoint.watch_sigterm()
    train, held_out = open_data(config, run)
    uae = checkpoint.open_uae(config, run.device)
    templates = read_templates(uae, config)
    example = see_small(uae, held_out['x'][:1].to(run.device), config)
    room = image_states(uae, example, [max(templates, key=len)], config.states).shape[1]
    if room > config.cond_len:
        raise SystemExit(f'the states of template and image are {room}, cond_len is '
                         f'{config.cond_len}: lower --see_resolution, or shorten --templates')
    params = uae.train_only('projector', 'decoder')
    start = None
    if config.lambda_t2i and config.t2i_target == 'start':
        start = checkpoint.stage_start(uae, ['projector', 'decoder'], config)
    ddp = common.parallel(uae, run)
    optimiser = common.Optimiser(params, config, betas=(0.9, 0.99))
    checkpoint.restore(config, optimiser)
    log = Log(config, run)
    evaluate = Evaluator(uae, held_out, config, run, log=log)

    for step in log.progress(start_step):
        evaluate.every(step)
        source = train.batch(config.seed, step, config.batch, run.rank, run.world)
        stats = Stats()
        captions = [torch.zeros(0, config.caption_len, dtype=torch.bool)]
        for _, rows, last in common.group_slices(P, 1, config.micro_batch):
            x = source['x'][rows].to(run.device)
            batch, caption = prepare(uae, config, x, source['index'][rows], step, templates)
            with common.no_sync(ddp, last):
                loss, f_v, f_y = ddp(loss_of, start, batch, caption, 1 / P, config)
                loss.backward()
            stats.add_sum(loss=loss.detach())
            stats.add_mean(len(x), flow_image=f_v, flow_text=f_y)
            if caption:
                captions.append(uae.spoken(*caption[:2]).cpu())
        taken = optimiser.step(step)
        log(step, **stats.reduce(run), **taken, **caption_fields(torch.cat(captions), run),
            skipped=count_skipped(train, held_out, run))
        checkpoint.maybe_save(config, run, step + 1, uae, optimiser)
    evaluate.every(config.steps)


if __name__ == '__main__':
    main(sys.argv[1:])
