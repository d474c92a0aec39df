"""One image (or a folder) -> caption -> reconstruction; or one prompt -> image.

    python sample.py --init_from=out/grpo_decoder --image=scene.png
    python sample.py --init_from=out/grpo_decoder --image=/data/photos      # captions.jsonl for a whole folder, resumable
    python sample.py --init_from=out/grpo_decoder --prompt="small red circle top-left , gray background ."

Writes out_dir/NAME.png (source | reconstruction) and out_dir/captions.jsonl, one {"image", "caption"} a line: the
manifest that pretrain_decoder.py reads.
"""
import json
import os
import sys

import torch
from PIL import Image
from tqdm import tqdm

import common
import config
import eval_unified
from data.images import ImageError, open_images
from model import UAE

# --- script keys ---------------------------------------------------------------------------------------------------
keys = dict(
    steps = 0,                 # updates: none here; the word exists in every script
    image = '',                # an image file, or a folder
    prompt = '',               # a text to draw
    draw = True,               # also draw each caption; False = captions only
)
# -------------------------------------------------------------------------------------------------------------------


def save_png(x, path):
    """x (3, H, W) in [-1, 1] -> PNG file, folders made."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()).save(path)


def from_prompt(uae, c):
    """Draws c.prompt into out_dir/prompt.png."""
    y, mask, cut = uae.tokens([c.prompt])
    if cut:
        print(f'warning: the prompt has more than caption_len - 1 = {c.caption_len - 1} tokens and was cut')
    noise = [c.seed]
    x_hat = eval_unified.draw(uae, y, mask, noise)
    save_png(x_hat[0], f'{c.out_dir}/prompt.png')
    print(f'{c.out_dir}/prompt.png')


def from_images(uae, c):
    """Captions every image of c.image, and draws the captions; images already in captions.jsonl are left alone."""
    images = open_images(c.image, c.resolution)
    os.makedirs(c.out_dir, exist_ok=True)
    path, done = f'{c.out_dir}/captions.jsonl', set()
    if os.path.exists(path):
        with open(path) as f:
            done = {json.loads(line)['image'] for line in f}
    with open(path, 'a') as f:
        for i, name in enumerate(tqdm(images.names, desc='sample', disable=len(images) == 1)):
            full = os.path.abspath(c.image if os.path.isfile(c.image) else os.path.join(c.image, name))
            if full in done:
                continue
            try:
                x = images.get(i)[0][None].to(uae.device)
            except ImageError as e:
                print(f'warning: skipped {name}: {e}')
                continue
            texts, _, x_hat = eval_unified.reconstruct(uae, x, [c.seed], c.eval_temperature, c.draw)
            f.write(json.dumps(dict(image=full, caption=texts[0])) + '\n')
            f.flush()
            if c.draw:
                save_png(torch.cat([x[0], x_hat[0]], 2), os.path.join(c.out_dir, os.path.splitext(name)[0] + '.png'))
            if len(images) == 1:
                print(texts[0])
    print(path)


def main(argv):
    c = config.parse(keys, {}, argv, __file__)
    if bool(c.image) == bool(c.prompt):
        raise SystemExit('give --image=FILE_OR_FOLDER or --prompt=TEXT')
    uae = UAE(c, common.start(c).device)
    (from_prompt if c.prompt else from_images)(uae, c)


if __name__ == '__main__':
    main(sys.argv[1:])
