"""An image or a folder -> captions and reconstructions; a prompt -> image; both -> edited images.

    python sample.py --init_from=out/grpo_decoder --image=scene.png
    python sample.py --init_from=out/grpo_decoder --image=/data/photos    # a folder, resumable
    torchrun --nproc_per_node=8 sample.py --preset=paper --init_from=out/grpo_encoder \\
        --image=/data/photos --draw=False
    python sample.py --init_from=out/grpo_decoder --prompt="small red circle top-left ."
    python sample.py --init_from=out/edit/stage0 --image=scene.png --prompt="circle top-left blue ."
    python sample.py --init_from=out/grpo_decoder --export=out/plain

--image writes out_dir/NAME.png (source | reconstruction) and out_dir/captions.jsonl, one {"image",
"caption"} a line: the manifest that pretrain_decoder.py reads. A caption depends on --seed and the
image's name, not on the images beside it, the batch or the ranks. --prompt writes
out_dir/prompt.png. Both together write out_dir/NAME.png (source | edit), by a checkpoint that
stage 0 trained with source images.

--export=DIR writes the models for other tools, as tools/export.py says.
"""
import collections
import json
import os
import sys
import zlib

import torch
from tqdm import tqdm

from lib import ranks
from lib.files import append_lines, write_atomic, write_lines
from lib.checkpoint import editing_condition, open_uae
from config import parse
from data.files import name_bytes, warn
from data.images import ImageError, open_images
from lib.scores import draw_captions, draw_edits, images_at_once, reconstruct, warn_of_losses
from tools.export import export
from lib.pictures import save_image

# --- script keys ---------------------------------------------------------------------------------
keys = dict(
    image = '',                # an image file, a folder, or a manifest
    prompt = '',               # a text to draw; with --image what to change in it
    export = '',               # a new folder for the checkpoint in plain form
    draw = True,               # also draw each caption; False = captions only
    temperature = 0.0,         # of the captions; 0 = greedy
)
own_presets = dict(release=dict(temperature=0.7))
# -------------------------------------------------------------------------------------------------


def from_prompt(uae, config):
    """Draws config.prompt into out_dir/prompt.png."""
    y, mask, lost = uae.encoder.tokens([config.prompt])
    warn_of_losses('the prompt', lost, config)
    x_hat = draw_captions(uae, y, mask, rows=[config.seed])
    path = f'{config.out_dir}/prompt.png'
    save_image(x_hat[0].clamp(-1, 1), path)
    print(path)


def from_both(uae, config):
    """Changes every image of --image as config.prompt says, into out_dir/NAME.png."""
    images = open_images(config.image, config.resolution)
    _, _, lost = uae.encoder.tokens([config.prompt])
    warn_of_losses('the prompt', lost, config)
    for i, path in enumerate(picture_files(images.names, config.out_dir)):
        x = read_image(images, i)
        if x is not None:
            x_hat = draw_edits(uae, x[None], [config.prompt], rows=[config.seed])
            save_image(torch.cat([x, x_hat[0].cpu()], 2), path)
            print(path)


def already_captioned(path, run):
    """The images in a captions.jsonl. A last line that a kill cut short is dropped from it."""
    if not os.path.exists(path):
        return set()
    with open(path, encoding='utf-8', errors='replace') as f:
        lines = f.readlines()
    whole = [line for line in lines if line.endswith('\n')]
    if run.master and whole != lines:
        write_atomic(path, lambda tmp: write_lines(tmp, whole))
    try:
        return {json.loads(line)['image'] for line in whole}
    except (ValueError, TypeError, KeyError) as e:
        raise SystemExit(f'{path}: not one {{"image", "caption"}} a line ({e}); '
                         'mend it, or give another --out_dir')


def from_images(uae, config, run):
    """Captions every image of --image that is not in captions.jsonl yet, and draws the captions."""
    images = open_images(config.image, config.resolution, *config.data_keys)
    if any(len(image) > 1 for image, _, _ in images.places):
        raise SystemExit(f'--image={config.image}: captions.jsonl cannot name one inside a tar; '
                         'unpack it first')
    inside = os.path.realpath(config.out_dir).startswith(os.path.realpath(config.image) + os.sep)
    if os.path.isdir(config.image) and inside:
        raise SystemExit(f'--out_dir={config.out_dir} lies in --image={config.image}: '
                         'its pictures would be captioned next time')
    os.makedirs(config.out_dir, exist_ok=True)
    path = f'{config.out_dir}/captions.jsonl'
    files = [os.path.abspath(image[0]) for image, _, _ in images.places]
    done = already_captioned(path, run)
    todo = [i for i, file in enumerate(files) if file not in done]
    pictures = picture_files(images.names, config.out_dir)

    at_once = images_at_once(config) * run.world
    quiet = len(todo) < 2 or not run.master
    captions = {}
    for start in tqdm(range(0, len(todo), at_once), desc='sample', disable=quiet):
        mine = todo[start:start + at_once][run.rank::run.world]
        captions = caption_batch(uae, config, images, mine, pictures)
        lines = []
        for i, text in captions.items():
            lines.append((i, dict(image=files[i], caption=text)))
        lines = ranks.gather_objects(lines, run)
        if run.master:
            append_lines(path, [line for _, line in sorted(lines)])

    if len(files) == 1 and captions:
        print(captions[0])
    skipped = ranks.total(len(images.skipped), run)
    if run.master:
        more = len(todo) - skipped
        ending = f', {skipped:.0f} images skipped' if skipped else ''
        print(f'{path}: {more:.0f} captions more, {len(done)} were there{ending}')


def picture_files(names, out_dir):
    """The .png of each image: its name without the suffix, with it where two share the stem."""
    stems = [os.path.splitext(name)[0] for name in names]
    shared = collections.Counter(stems)
    paths = []
    for name, stem in zip(names, stems):
        unique = stem if shared[stem] == 1 else name
        paths.append(os.path.join(out_dir, unique + '.png'))
    return paths


def caption_batch(uae, config, images, wanted, pictures):
    """Captions, and draws, those of the wanted images that can be read -> {index: caption}.

    Pictures are on the disk before this returns: a line in captions.jsonl says that all is done.
    """
    found = {}
    for i in wanted:
        x = read_image(images, i)
        if x is not None:
            found[i] = x
    if not found:
        return {}
    x = torch.stack(list(found.values())).to(uae.device)
    rows = [config.seed << 32 | zlib.crc32(name_bytes(images.names[i])) for i in found]
    texts, _, x_hat = reconstruct(uae, x, rows, config.temperature, config.draw)
    if config.draw:
        side_by_side = torch.cat([x, x_hat], 3).clamp(-1, 1)
        for i, pair in zip(found, side_by_side):
            save_image(pair, pictures[i])
    return dict(zip(found, texts))


def read_image(images, i):
    """Image i (3, R, R), or None with a warning if it cannot be read."""
    try:
        return images.get(i)[0]
    except ImageError as e:
        images.skipped[images.names[i]] = str(e)
        warn(f'skipped {images.names[i]}: {e}')
        return None


def main(argv):
    config = parse(keys, own_presets, argv, __file__)
    if bool(config.export) == bool(config.image or config.prompt):
        raise SystemExit('give --image=FILE_OR_FOLDER, --prompt=TEXT or both, or '
                         '--export=NEW_FOLDER')
    if config.export and os.path.exists(config.export):
        if not os.path.isdir(config.export) or os.listdir(config.export):
            raise SystemExit(f'--export={config.export} is there already and not an empty folder')
    run = ranks.start(config)
    if run.world > 1 and (config.prompt or config.export):
        raise SystemExit('several ranks are for --image; --prompt and --export take one')
    if config.image and config.prompt:
        config.condition = editing_condition(config)
    # captions need no projector: photos can be captioned before any training
    uae = open_uae(config, run.device, new_projector=not config.draw)
    if config.image and config.prompt:
        from_both(uae, config)
    elif config.image:
        from_images(uae, config, run)
    elif config.export:
        export(uae, config)
    else:
        from_prompt(uae, config)


if __name__ == '__main__':
    main(sys.argv[1:])
