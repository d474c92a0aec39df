"""What a run leaves to look at: the same held-out images at every evaluation, and one group opened.

In out_dir, with steps counted in updates done:

    samples/source_000.png         a watched held-out image, and its reconstruction at an evaluation
    samples/step_000020_000.png
    samples/step_000020.png        all of them: source, reconstruction, source, ...
    samples.jsonl                  a line per evaluation and watched image: caption and scores
    groups.jsonl                   a line per evaluation of stages 2 and 3: one image, its captions
                                   or drawings with their rewards, advantages and log-probs

`tools/report.py` turns them into a page.
"""
import os

import torch
from PIL import Image
from torchvision.utils import make_grid

from lib.files import append_lines, writing

WATCHED = 8                    # held-out images whose pictures each evaluation keeps
LARGEST = 256                  # pixels of a picture's side, as it is kept
PAIRS = 4                      # of source and reconstruction, beside each other on the sheet
FIELDS = ('row', 'name', 'caption', 'caption_len', 'reward', 'judge', 'mse', 'truth', 'false')


# --- pictures ------------------------------------------------------------------------------------
def to_bytes(x):
    """Images (n, 3, R, R) in [-1, 1] -> uint8 on the CPU, at most LARGEST pixels wide."""
    if x.shape[-1] > LARGEST:
        x = torch.nn.functional.interpolate(x.float(), (LARGEST, LARGEST), mode='area')
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def picture(pixels):
    """uint8 (3, H, W) -> a Pillow image."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def save_picture(pixels, out_dir, name):
    """Writes samples/NAME.png -> its path relative to out_dir."""
    path = f'samples/{name}.png'
    with writing(f'{out_dir}/{path}'):
        os.makedirs(f'{out_dir}/samples', exist_ok=True)
        picture(pixels).save(f'{out_dir}/{path}')
    return path


def save_samples(records, step, out_dir):
    """Writes the pictures of the watched images and their lines -> the path of the sheet of all.

    records: as `Evaluator` makes them; the watched ones have `pictures`, uint8 (2, 3, R, R).
    """
    watched = [record for record in records if 'pictures' in record]
    rows = []
    for record in watched:
        row = dict(step=step, **{field: record[field] for field in FIELDS if field in record})
        source, reconstruction = record['pictures']
        name = f'{record["row"]:03d}'
        row['source'] = save_picture(source, out_dir, f'source_{name}')
        row['image'] = save_picture(reconstruction, out_dir, f'step_{step:06d}_{name}')
        rows.append(row)
    append_lines(f'{out_dir}/samples.jsonl', rows)

    pairs = torch.cat([record['pictures'] for record in watched])
    times = max(1, LARGEST // 2 // pairs.shape[-1])         # small images are enlarged
    pairs = pairs.repeat_interleave(times, 2).repeat_interleave(times, 3)
    sheet = make_grid(pairs, nrow=2 * PAIRS, padding=8, pad_value=255)
    return f'{out_dir}/{save_picture(sheet, out_dir, f"step_{step:06d}")}'


# --- one group -----------------------------------------------------------------------------------
def token_texts(tokenizer, ids):
    """The text that each token adds to a caption; joined they are the caption."""
    whole = [tokenizer.decode(ids[:count], skip_special_tokens=True)
             for count in range(len(ids) + 1)]
    return [after[len(before):] for before, after in zip(whole, whole[1:])]


def open_captions(uae, step, x, sampled, r, config):
    """Writes the first image's group of captions: rewards, advantages, log-probs by token.

    x (P, 3, R, R); sampled and r (P, G) as `grpo_encoder.rollout` returns them, with adv (B,).
    step: the updates done, this rollout's included.
    """
    words = uae.encoder.words(sampled['y'], sampled['mask'])
    members = members_of(sampled, r)
    for i, member in enumerate(members):
        tokens = token_texts(uae.encoder.tokenizer, sampled['y'][i][words[i]].tolist())
        logp = sampled['recorded'][i][words[i]].tolist()
        member.update(caption=''.join(tokens), tokens=tokens, logp=logp)
    save_group(step, x, config, kind='captions', members=members)


def open_drawings(uae, step, x, sampled, y, r, config):
    """The same for stage 3: the drawings of the first image's caption, log-probs by trained step.

    A rollout that has no log-probs is opened without them.
    """
    caption = uae.encoder.texts(y[:1], torch.ones_like(y[:1]))[0]
    members = members_of(sampled, r)
    with torch.no_grad():
        drawings = to_bytes(uae.decoder.to_image(sampled['z_0'][:len(members)]))
    for i, member in enumerate(members):
        name = f'group_{step:06d}_{i:02d}'
        member['image'] = save_picture(drawings[i], config.out_dir, name)
        if 'recorded' in sampled:
            member['logp'] = sampled['recorded'][i].tolist()
    save_group(step, x, config, kind='drawings', caption=caption, members=members)


def members_of(sampled, r):
    """The first image's group: a dict each of reward and advantage."""
    pairs = zip(r[0].tolist(), sampled['adv'].tolist())     # r[0] (G,) ends before adv (B,)
    return [dict(reward=reward, adv=adv) for reward, adv in pairs]


def save_group(step, x, config, **line):
    """Writes a group's source and its line in groups.jsonl."""
    source = save_picture(to_bytes(x[:1])[0], config.out_dir, f'group_{step:06d}')
    line = dict(step=step, source=source, **line)
    append_lines(f'{config.out_dir}/groups.jsonl', [line])
