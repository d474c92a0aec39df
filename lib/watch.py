"""What a run leaves to look at: the same held-out images at every evaluation, and one group opened.

In out_dir, with steps counted in updates done:

    samples/step_000020.png        a sheet of the first WATCHED held-out images
    samples/source_000.png         one of them, and its reconstruction at that evaluation
    samples/step_000020_000.png
    samples.jsonl                  a line per evaluation and watched image: caption and scores
    groups.jsonl                   a line per evaluation of stages 2 and 3: one image, its captions
                                   or drawings with their rewards, advantages and log-probs

`tools/report.py` turns them into a page.
"""
import os
import textwrap

import torch
from PIL import Image, ImageDraw, ImageOps

from lib.files import append_lines, write_atomic, writing

WATCHED = 8                    # held-out images whose pictures each evaluation keeps
LARGEST = 256                  # pixels of a picture's side, as it is kept
SHOWN = 160                    # the same on a sheet
GAP, LINE, LETTER = 8, 14, 6   # of a sheet, in pixels: between pictures, and of its text


# --- pictures ------------------------------------------------------------------------------------
def to_bytes(x):
    """Images (n, 3, R, R) in [-1, 1] -> uint8 on the CPU, at most LARGEST pixels wide."""
    if x.shape[-1] > LARGEST:
        x = torch.nn.functional.interpolate(x.float(), (LARGEST, LARGEST), mode='area')
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def picture(pixels):
    """uint8 (3, R, R) -> a Pillow image."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def save_picture(pixels, out_dir, name):
    """Writes samples/NAME.png -> its path relative to out_dir."""
    path = f'samples/{name}.png'
    with writing(f'{out_dir}/{path}'):
        picture(pixels).save(f'{out_dir}/{path}')
    return path


def save_image(x, path):
    """x (3, R, R) in [-1, 1] -> an image file in the format of its name; whole or not there."""
    pixels = ((x + 1) * 127.5).round().byte().cpu()
    suffix = os.path.splitext(path)[1].lower()
    kind = Image.registered_extensions()[suffix]
    options = dict(JPEG=dict(quality=100, subsampling=0), WEBP=dict(lossless=True)).get(kind, {})
    image = picture(pixels)
    write_atomic(path, lambda temporary: image.save(temporary, kind, **options))


def fitted(image, side):
    """A Pillow image as large as fits into a square; a small one's pixels become squares."""
    image = ImageOps.exif_transpose(image).convert('RGB')
    method = Image.Resampling.LANCZOS
    if max(image.size) < side:
        method = Image.Resampling.NEAREST
    return ImageOps.contain(image, (side, side), method)


def sheet(items, columns, heads=(), side=SHOWN, lines=5):
    """A grid, row by row: each item is some images beside each other, and a text below them.

    items: [(Pillow images, text)]; heads: what stands above the columns; lines: of a text at most.
    -> a Pillow image.
    """
    images_across = max(1, *(len(images) for images, _ in items))
    width = images_across * (side + GAP) + GAP
    height = side + lines * LINE + 2 * GAP
    head = 2 * GAP
    if heads:
        head += LINE
    rows = -(-len(items) // columns)
    page = Image.new('RGB', (columns * width, head + rows * height), 'white')
    draw = ImageDraw.Draw(page)
    for column, text in enumerate(heads):
        draw.text((column * width + GAP, GAP), text, fill='black', font_size=13)
    for place, (images, text) in enumerate(items):
        row, column = divmod(place, columns)
        left, top = column * width + GAP, head + row * height
        for k, image in enumerate(images):
            page.paste(fitted(image, side), (left + k * (side + GAP), top))
        most = side // LINE                         # without images the text has their place
        if images:
            most, top = lines, top + side + 2
        text = text.replace(' ,', ',').replace(' .', '.')          # spaces of the embedded world
        wrapped = textwrap.wrap(text, (width - GAP) // LETTER, max_lines=most, placeholder=' ...')
        draw.text((left, top), '\n'.join(wrapped), fill='black', font_size=11)
    return page


# --- the watched images --------------------------------------------------------------------------
SCORES = ('reward', 'judge')                    # judge, if there is one
FIELDS = ('row', 'name', 'caption', 'caption_len', *SCORES, 'mse')


def save_samples(records, step, config, scenes):
    """Writes the sheet, the small pictures and their lines in samples.jsonl -> the sheet's path.

    records: of the watched images, as `Evaluator` makes them, with `pictures`, source and
    reconstruction. scenes: the held-out scenes of the embedded world, or None.
    """
    os.makedirs(f'{config.out_dir}/samples', exist_ok=True)
    rows, items = [], []
    for record in records:
        source, reconstruction = record['pictures']
        scores = ', '.join(f'{name} {record[name]:.3f}' for name in SCORES if name in record)
        items.append(([picture(source), picture(reconstruction)], f'{scores}: {record["caption"]}'))
        row = dict(step=step, **{field: record[field] for field in FIELDS if field in record})
        row['source'] = save_picture(source, config.out_dir, f'source_{row["row"]:03d}')
        row['image'] = save_picture(reconstruction, config.out_dir,
                                    f'step_{step:06d}_{row["row"]:03d}')
        if scenes:
            from data.shapes import scenes as world
            scene = scenes[row['row']]
            row['truth'] = world.caption(scene)
            row['false'] = world.false_phrases(row['caption'], scene)
        rows.append(row)
    append_lines(f'{config.out_dir}/samples.jsonl', rows)
    path = f'{config.out_dir}/samples/step_{step:06d}.png'
    with writing(path):
        sheet(items, min(4, len(items))).save(path)
    return path


# --- one group -----------------------------------------------------------------------------------
def token_texts(uae, ids):
    """The text that each token adds to a caption; joined they are the caption."""
    texts, before = [], ''
    for count in range(1, len(ids) + 1):
        text = uae.encoder.tokenizer.decode(ids[:count], skip_special_tokens=True)
        texts.append(text[len(before):])
        before = text
    return texts


def open_captions(uae, step, x, sampled, r, config):
    """Writes the first image's group of captions: rewards, advantages, log-probs by token.

    x (P, 3, R, R); sampled and r (P, G) as `grpo_encoder.rollout` returns them, with adv (B,).
    step: the updates done, this rollout's included.
    """
    G = config.group
    words = uae.encoder.words(sampled['y'][:G], sampled['mask'][:G])
    members = []
    for i in range(G):
        texts = token_texts(uae, sampled['y'][i][words[i]].tolist())
        logp = sampled['recorded'][i][words[i]]
        members.append(dict(caption=''.join(texts), tokens=texts, logp=logp.tolist(),
                            reward=r[0, i].item(), adv=sampled['adv'][i].item()))
    save_group(step, 'captions', x[0], members, config)


def open_drawings(uae, step, x, sampled, y, r, config):
    """The same for stage 3: the drawings of the first image's caption, log-probs by trained step.

    A rollout that has no log-probs is opened without them.
    """
    G = config.group
    caption = uae.encoder.texts(y[:1], torch.ones_like(y[:1]))[0]
    with torch.no_grad():
        drawings = to_bytes(uae.decoder.to_image(sampled['z_0'][:G]))
    os.makedirs(f'{config.out_dir}/samples', exist_ok=True)
    members = []
    for i in range(G):
        path = save_picture(drawings[i], config.out_dir, f'group_{step:06d}_{i:02d}')
        member = dict(image=path, reward=r[0, i].item(), adv=sampled['adv'][i].item())
        if 'recorded' in sampled:
            member['logp'] = sampled['recorded'][i].tolist()
        members.append(member)
    save_group(step, 'drawings', x[0], members, config, caption=caption)


def save_group(step, kind, x, members, config, **more):
    """Writes a group's source and its line in groups.jsonl."""
    os.makedirs(f'{config.out_dir}/samples', exist_ok=True)
    source = save_picture(to_bytes(x[None])[0], config.out_dir, f'group_{step:06d}')
    line = dict(step=step, kind=kind, source=source, **more, members=members)
    append_lines(f'{config.out_dir}/groups.jsonl', [line])
