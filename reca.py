"""Reconstruction alignment (RecA, arXiv 2509.07295): the decoder learns to redraw an image from what the encoder saw of it.

    python reca.py                                                    # tiny, on the shipped base, in place of cold_start.py
    python reca.py --init_from=out/grpo_decoder                       # or after the loop
    torchrun --nproc_per_node=8 reca.py --preset=paper --data=/data/photos --init_from=out/pretrain_decoder
    python grpo_encoder.py --init_from=out/reca                       # what follows reads a checkpoint like any other

    h_v = last-layer states at the image's positions of (template, image)      c_v = g(h_v)      c_y = g(h_T(y)), y = greedy caption of x
    z_s = (1 - s) z_0 + s eps      F(c, u) = mean | v_theta(z_s, s, c) - u |^2      L = F(c_v, eps - z_0) + lambda_t2i F(c_y, u)

The first term needs no caption: the image is its own, dense prompt. Encoder frozen (understanding and generation share no weights, so lambda_i2t = 0),
projector and decoder trained. The template stands BEFORE the image: in a causal language model words after it change nothing at the image's positions.
Afterwards the condition is text again, which the second term keeps alive with greedy captions by the frozen encoder itself; u is eps - z_0 or the initial
model's velocity (`t2i_target`). In the embedded world RecA gains nothing and costs nothing; LOG.md has the runs and the likely reason.

    paper                                here                              why
    lambda_t2i = 0                       1, tiny 5                         its models draw from a sequence that holds the text; this decoder forgets how to read a caption
    t2i target eps - z_0                 `t2i_target`: tiny v of the start a terse caption does not determine its image: the decoder would be taught to invent the rest
    360 templates                        a handful, key `templates`        short requests of one kind; the tiny tokenizer knows 33 words
    image at 224 pixels                  `see_resolution`: 224, tiny full  the tiny image has 32 pixels, 16 tokens, already
    condition dropout by family          10 % to the negative prompt       classifier-free guidance needs the unconditional branch
"""
import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import config
from data.images import open_data
from evaluate import Evaluator
from model import UAE

PHOTO_TEMPLATES = ('Describe the picture.|Say what is shown here, thing by thing.|Give a complete account of this image.|Which objects are there, how many, and where?|'
                   'Put the scene into words: subjects, layout, background.|Name the colours, materials and textures that you see.|'
                   'Explain the picture to somebody who cannot see it.|List everything that would be needed to paint this again.|Transcribe any text, then describe the rest.|'
                   'Summary of the image:|What is this?|Foreground first, then background, light and style.')

# --- script keys ---------------------------------------------------------------------------------------------------
keys = dict(
    steps = 128,               # updates
    batch = 48,                # images per update, all ranks together
    lr = 3e-4,
    grad_clip = 1.0,           # largest gradient norm
    patience = 5,              # updates in a row with a non-finite gradient that end the run
    warmup = 0,                # updates of linear warm-up
    lr_decay = 1.0,            # cosine to 0 after lr_decay * steps updates; 0 = constant
    lambda_t2i = 5.0,          # weight of the loss conditioned on the encoder's own greedy caption; 0 = captions are not even made
    t2i_target = 'start',      # of that loss: image (eps - z_0) | start (the velocity of the model as this stage found it)
    states = 'image',          # which states condition the decoder: image (its positions) | image+template (all up to the image's end)
    template = True,           # a request in front of the image, one of `templates` at random; False = the image alone
    templates = 'describe the image|the image|describe the image .|describe the background , the image|image , background .',  # '|' between them
    see_resolution = 0,        # pixels of the image that the encoder sees here; 0 = resolution
    sigma_mean = 1.0,          # s = sigmoid(sigma_mean + sigma_std N(0,1)); 0 and 1 are SD3's published density
    sigma_std = 1.2,
    drop = 0.1,                # share of conditions replaced by the negative prompt
)
own_presets = dict(
    medium=dict(steps=1000, batch=32, lr=4e-5, warmup=10, lambda_t2i=1.0, t2i_target='image', sigma_mean=0.0, sigma_std=1.0, see_resolution=224, templates=PHOTO_TEMPLATES),
    paper=dict(steps=1000, batch=96, lr=4e-5, warmup=10, lambda_t2i=1.0, t2i_target='image', sigma_mean=0.0, sigma_std=1.0, see_resolution=224, templates=PHOTO_TEMPLATES))
# -------------------------------------------------------------------------------------------------------------------


def before_image(uae, template):
    """Token ids of a user turn up to the image's first position; template '' = the image alone."""
    content = [dict(type='text', text=template)] * bool(template) + [dict(type='image')]
    text = uae.processor.apply_chat_template([dict(role='user', content=content)], tokenize=False)
    return uae.tokenizer(text.split('<|image_pad|>')[0], add_special_tokens=False).input_ids


@torch.no_grad()
def image_states(uae, seen, before, states='image'):
    """h_v: last-layer states of the frozen encoder, each image read after its own template.

    seen = (features (P, N, d), grid (P, 3)); before: P lists of token ids. -> (P, N, d), the image's positions, or with
    'image+template' (P, L, d), zero past an image's end. Rows are padded on the right, where causality makes it harmless.
    """
    feats, grid = seen
    (P, N), image = feats.shape[:2], uae.encoder.config.image_token_id
    ids = torch.full((P, max(map(len, before)) + N), uae.tokenizer.pad_token_id)
    for row, b in zip(ids, before):
        row[:len(b) + N] = torch.tensor([*b, *[image] * N])
    ids = ids.to(uae.device)
    at = ids == image
    with uae.autocast():
        pos, _ = uae.encoder.model.get_rope_index(ids, mm_token_type_ids=at.int(), image_grid_thw=grid)
        emb = uae.embed(ids)
        emb = emb.masked_scatter(at[..., None], feats.to(emb.dtype))
        h = uae.encoder.model.language_model(inputs_embeds=emb, position_ids=pos, use_cache=False).last_hidden_state
    if states == 'image':
        return h[at].view(P, N, -1)
    ends = torch.tensor([len(b) + N for b in before], device=uae.device)
    return h * (torch.arange(ids.shape[1], device=uae.device) < ends[:, None])[..., None]


def see_small(uae, x, c):
    """x (P, 3, R, R) -> uae.see of it at c.see_resolution."""
    if c.see_resolution:
        x = F.interpolate(x, (c.see_resolution, c.see_resolution), mode='bicubic', antialias=True).clamp(-1, 1)
    return uae.see(x)


def text_velocity(uae, z, s, caption, drop):
    """v_theta(z_s, s, c_y) (P, C, H, W); caption: the arguments of uae.condition; drop (P,) bool: the negative prompt instead."""
    return uae.velocity(z, s, torch.where(drop.view(-1, 1, 1), uae.negative(), uae.condition(*caption)))


def loss_of(uae, start, z0, s, eps, drop, h, caption, share, c):
    """The whole loss of a micro-batch, and both its terms; `share` = world / images of the step.

    z0, eps (P, C, H, W), s (P,), drop (P,) bool, h (P, L, d) states, caption (y, mask, seen) or None; start: the
    model whose velocity is the captions' target, or None. Dropped conditions train the decoder alone.
    """
    s_ = s.view(-1, 1, 1, 1)
    z, target = (1 - s_) * z0 + s_ * eps, eps - z0
    with uae.autocast():
        c_v = uae.projector(uae.pad(h).to(uae.projector.up.weight.dtype))
    c_v = torch.where(drop.view(-1, 1, 1), uae.negative()[:, :c.cond_len], c_v)
    f_v, f_y = (uae.velocity(z, s, c_v) - target).square().mean(), torch.zeros((), device=z.device)
    if caption:
        with torch.no_grad():
            target = text_velocity(start, z, s, caption, drop) if start else target
        f_y = (text_velocity(uae, z, s, caption, drop) - target).square().mean()
    return (f_v + c.lambda_t2i * f_y) * len(z0) * share, f_v.detach(), f_y.detach()


def prepare(uae, c, x, rows, step, befores):
    """Images x (P, 3, R, R) at positions `rows` of the global batch -> the arguments of `loss_of` from z0 to caption.

    All randomness is addressed by (seed, step, image).
    """
    pick = (common.uniform((), rows, c.seed, 'template', step) * len(befores)).long().tolist()
    h = image_states(uae, see_small(uae, x, c), [befores[i] for i in pick], c.states)
    s = torch.sigmoid(c.sigma_mean + c.sigma_std * common.normal((), rows, c.seed, 'sigma', step)).to(uae.device)
    eps = common.normal(uae.latent_shape(), rows, c.seed, 'eps', step).to(uae.device)
    drop = (common.uniform((), rows, c.seed, 'drop', step) < c.drop).to(uae.device)
    seen = uae.see(x) if c.lambda_t2i else None
    caption = (*uae.sample_captions(seen, 1, 0.0)[:2], seen) if seen else None
    return uae.to_latent(x), s, eps, drop, h, caption


def main(argv):
    c = config.parse(keys, own_presets, argv, __file__)
    templates = [t.strip() for t in c.templates.split('|') if t.strip()] if c.template else ['']
    for key, known in dict(states=('image', 'image+template'), t2i_target=('image', 'start')).items():
        if getattr(c, key) not in known:
            raise SystemExit(f'--{key}: expected one of {" ".join(known)}, got {getattr(c, key)!r}')
    if not templates:
        raise SystemExit("--templates is empty: give some with '|' between them, or --template=False")
    if not 0 <= c.see_resolution <= c.resolution:
        raise SystemExit(f'--see_resolution={c.see_resolution}: between 1 and resolution={c.resolution}, or 0 for the full one')
    if c.plan:
        return common.plan(c, 'projector', 'decoder')
    run = common.start(c)
    P = common.per_rank('batch', c.batch, run.world)
    first = common.open_out_dir(c, run)
    train, held = open_data(c, run)
    uae = UAE(c, run.device)
    befores = [before_image(uae, t) for t in templates]
    room = image_states(uae, see_small(uae, held['x'][:1].to(run.device), c), [max(befores, key=len)], c.states).shape[1]
    if room > c.cond_len:
        raise SystemExit(f'the states of template and image are {room}, cond_len is {c.cond_len}: lower --see_resolution, or shorten --templates')
    params = uae.train_only('projector', 'decoder')
    start = common.stage_start(uae, ['projector', 'decoder'], c, run, first) if c.lambda_t2i and c.t2i_target == 'start' else None
    ddp = common.parallel(uae, run)
    opt = torch.optim.AdamW(params, lr=c.lr, betas=(0.9, 0.99), weight_decay=0.0)
    common.restore(c, opt)
    log, evaluate = common.Log(c, run), Evaluator(uae, held, c, run)

    for step in tqdm(range(first, c.steps), initial=first, total=c.steps, desc='reca', disable=not run.master):
        evaluate.every(step)
        batch = train.batch(c.seed, step, c.batch, run.rank, run.world)
        stats, words = common.Stats(), []
        for i in common.image_slices(P, 1, c.micro_batch):
            *args, caption = prepare(uae, c, batch['x'][i].to(run.device), batch['index'][i], step, befores)
            with common.no_sync(ddp, i.stop < P):
                loss, f_v, f_y = ddp(loss_of, start, *args, caption, run.world / c.batch, c)
                loss.backward()
            stats.add(len(batch['index'][i]), loss=loss.detach(), flow_image=f_v, flow_text=f_y)
            words += [(caption[0] != uae.end) * caption[1]] if caption else []
        taken = common.optimise(opt, params, step, c)

        words = torch.cat(words) if words else torch.zeros(1, 1)
        log(step, **stats.reduce(run), **taken, caption_len=common.total(words.sum(), run) / c.batch,
            truncated=common.total(words[:, -1].sum(), run) / c.batch, skipped=int(common.total(len(train.skipped), run)) + held['skipped'])
        common.maybe_save(c, run, step + 1, uae, opt)
    evaluate.every(c.steps, last=True)


if __name__ == '__main__':
    main(sys.argv[1:])
