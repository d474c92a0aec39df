"""Images, and captions where there are any, from folders, manifests and tar shards -> batches.

`open_images(data, resolution)` lists the images once, `ImageSet.batch(seed, step, n)` reads those of one step. Which
images a step sees is a pure function of (seed, step, n): ranks and resume cannot change it, and there is no iterator
state to save. Nothing is ever unpacked: a tar member is read in place, so whatever its name says it lands nowhere.
"""
import copy
import glob
import io
import json
import math
import os
import tarfile
import warnings
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
from PIL import Image, ImageOps

import common

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.tiff', '.tif', '.gif')
FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'TIFF', 'GIF')  # all that Pillow may try: its EPS reader would start ghostscript
MIN_SIDE = 8               # pixels; anything smaller is a tracking pixel, not a picture
CACHE_BYTES = 256 * 2**20  # a set whose decoded pixels fit in here is decoded once and kept


class DataError(SystemExit):
    """Data that cannot be used as given; one line that says what and where."""


class ImageError(DataError):
    """One image that cannot be read; batches step over it."""


def decode(raw, resolution):
    """Bytes of an image file -> (R, R, 3) uint8, R = resolution. Raises ImageError.

    EXIF orientation is applied; then RGB: transparency on white, 16-bit grey by its high byte, an animation's first
    frame, colour profiles ignored; then the centre square, resized to R with Lanczos. That is the shorter side resized
    to R and a centre crop, without the intermediate, which a 9 x 60000 strip would make enormous. A shorter side of
    exactly R is not resampled. Refused: a side below MIN_SIDE, more pixels than 2 * Image.MAX_IMAGE_PIXELS (Pillow's
    decompression-bomb error), a file that ends too early.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Pillow grumbles about large images and odd metadata that it reads well
            im = Image.open(io.BytesIO(raw), formats=FORMATS)
            if min(im.size) < MIN_SIDE:
                raise ValueError(f'too small, {im.width}x{im.height}')
            im.draft(None, (2 * resolution, 2 * resolution))  # JPEG only: decode at 1/2, 1/4 or 1/8, never below 2R
            im = ImageOps.exif_transpose(im)
            if im.mode.startswith('I'):  # 16-bit grey: some Pillow versions clip it to white
                im = Image.fromarray((np.clip(np.asarray(im), 0, 65535) >> 8).astype(np.uint8))
            if im.has_transparency_data:
                im = Image.alpha_composite(Image.new('RGBA', im.size, 'white'), im.convert('RGBA'))
            side = min(im.size)
            left, top = (im.width - side) // 2, (im.height - side) // 2
            im = im.convert('RGB').crop((left, top, left + side, top + side))
            return np.array(im.resize((resolution, resolution), Image.Resampling.LANCZOS, reducing_gap=3.0))  # R x R: a copy
    except Exception as e:  # on damaged bytes the decoders raise nearly anything: OSError, SyntaxError, struct.error ...
        raise ImageError(str(e).split(' <')[0] or type(e).__name__) from None  # ' <' starts the address of the BytesIO


def read(path, offset=0, size=-1):
    """-> `size` bytes of a file, -1 = all to its end. Raises OSError."""
    with open(path, 'rb') as f:
        f.seek(offset)
        return f.read(size)


def find_caption(row, key, place):
    """row: an object of a manifest or of a tar's .json -> its caption at `key`, str or None. Raises DataError.

    A list there is a LLaVA conversation [{from, value}, ...] whose first answer is the caption. Most stages need images
    only, so without the default key the caption is None; a key that somebody asked for has to be there.
    """
    row = row if isinstance(row, dict) else {}
    if key not in row and key != 'caption':
        raise DataError(f'{place}: no key {key!r} (caption_key); the keys there are: {" ".join(row)}')
    value = row.get(key)
    if isinstance(value, list):
        value = next((t.get('value') for t in value if isinstance(t, dict) and t.get('from') in ('gpt', 'assistant')), value)
    if value is not None and not isinstance(value, str):
        raise DataError(f'{place}: the caption at {key!r} is neither a string nor a conversation with a gpt turn')
    return value


def is_blank(caption):
    """Whether a caption, None, a str, or one left on the disk, is known to say nothing."""
    return caption is None or isinstance(caption, str) and not caption.strip()


def load_caption(caption, key, place):
    """The caption of an entry, see below -> str or None. Raises OSError, DataError."""
    if not isinstance(caption, tuple):
        return caption
    kind, where = caption
    text = read(*where).decode('utf-8-sig', errors='replace').strip()
    try:
        return text if kind == '.txt' else find_caption(json.loads(text), key, place)
    except json.JSONDecodeError as e:
        raise DataError(f'{place}: not JSON ({e})') from None


# An entry is (name, image, caption): image = the arguments of `read`; caption = None, a str, or ('.txt' | '.json', the
# arguments of `read`): left on the disk until its image is wanted, since the captions of a large set fill the memory.

def pair(files, kinds):
    """files: {name: arguments of `read`} -> an entry for each image, with the first of `kinds` that has its stem."""
    entries = []
    for name, where in files.items():
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in SUFFIXES and not os.path.basename(name).startswith('.'):  # '._x.jpg' is macOS metadata
            caption = next(((kind, files[stem + kind]) for kind in kinds if stem + kind in files), None)
            entries.append((name, where, caption))
    return entries


def list_folder(path, caption_key):
    """The images (caption: x.txt beside x.jpg), then the .tar shards at any depth, by relative path -> entries."""
    files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    images = pair({os.path.relpath(file, path): (file,) for file in files}, ('.txt',))
    return images + [entry for file in files if file.lower().endswith('.tar') for entry in list_tar(file, caption_key)]


def list_manifest(path, image_key, caption_key, image_root):
    """A .json list, or .jsonl lines, of objects -> entries in the file's order. Raises DataError with file and line.

    Image paths are relative to the manifest's folder, or to image_root; with image_root a leading '/' is dropped.
    """
    rows, entries, line = [], [], 1
    try:
        with open(path, encoding='utf-8-sig') as f:
            if path.lower().endswith('.json'):
                rows = [(f'{path} entry {i}', row) for i, row in enumerate(json.load(f), 1)]
            else:
                for line, text in enumerate(f, 1):
                    rows += [(f'{path} line {line}', json.loads(text.strip()))] if text.strip() else []
    except json.JSONDecodeError as e:
        raise DataError(f'{path} line {line + e.lineno - 1}: not JSON ({e.msg})') from None
    except (OSError, UnicodeDecodeError, TypeError) as e:
        raise DataError(f'{path}: not a readable manifest ({e})') from None
    for place, row in rows:
        if not isinstance(row, dict) or not isinstance(row.get(image_key), str):
            there = 'the keys there are: ' + ' '.join(row) if isinstance(row, dict) else f'it is no object but {row!r:.40}'
            raise DataError(f'{place}: no path at {image_key!r} (image_key); {there}')
        name = row[image_key]
        file = os.path.join(image_root, name.lstrip('/')) if image_root else os.path.join(os.path.dirname(path), name)
        entries.append((name, (file,), find_caption(row, caption_key, place)))
    if entries and not any(os.path.exists(image[0]) for _, image, _ in entries[:100]):  # not by a million warnings
        raise DataError(f'{path}: its images are not there, for example {entries[0][1][0]}; is image_root right?')
    return entries


def list_tar(path, caption_key):
    """One tar in webdataset layout -> entries in the tar's order. Raises DataError.

    x.jpg, x.txt and x.json belong together. The .txt is the caption, unless a caption_key was asked for: then
    .json[caption_key]. Only regular files count; links and devices are not looked at.
    """
    try:
        with tarfile.open(path, 'r:') as tar:  # 'r:' = uncompressed; in a compressed tar there is no seeking
            members = {m.name: (path, m.offset_data, m.size) for m in tar if m.isreg()}
    except (tarfile.TarError, OSError, ValueError) as e:
        raise DataError(f'{path}: not a readable tar ({e}); compressed ones have to be unpacked first') from None
    entries = pair(members, ('.txt', '.json') if caption_key == 'caption' else ('.json', '.txt'))
    return [(f'{os.path.basename(path)}/{name}', where, caption) for name, where, caption in entries]


def open_images(data, resolution, image_key='image', caption_key='caption', image_root=''):
    """data: a folder, an image, a .json or .jsonl manifest, a .tar, a glob of these, or several with commas between -> ImageSet
    of R = resolution. Raises DataError. Images are opened when they are wanted, not here."""
    entries = []
    for source in [data] if os.path.exists(data) else data.split(','):
        source = os.path.expanduser(source.strip())
        paths = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
        if not paths:
            raise DataError(f'no such file or folder, and no glob that matches: {source!r}')
        for path in paths:
            if os.path.isdir(path):
                found = list_folder(path, caption_key)
            elif path.lower().endswith(('.json', '.jsonl', '.jsonlines')):
                found = list_manifest(path, image_key, caption_key, image_root)
            elif path.lower().endswith('.tar'):
                found = list_tar(path, caption_key)
            elif path.lower().endswith(SUFFIXES):
                found = pair({os.path.basename(path): (path,)}, ())
            else:
                raise DataError(f'expected a folder, an image, .json, .jsonl or .tar (unpack a .tar.gz), got {path}')
            if not found:
                raise DataError(f'{path}: no images in it ({" ".join(SUFFIXES)})')
            if caption_key != 'caption':  # a key that is nowhere should stop us here, not skip every image later on
                load_caption(found[0][2], caption_key, f'{path}, {found[0][0]}')
            entries += found
    return ImageSet(entries, resolution, caption_key)


@lru_cache(maxsize=4)
def permutation(seed, epoch, n):
    """The order of one epoch -> (n,) int64, the same on every rank and after every resume."""
    return np.random.default_rng([seed, epoch]).permutation(n)


class ImageSet:
    """Images at one resolution. names: a unique id each, a relative path that stays inside any folder it is joined to;
    skipped: {name: reason} of the unreadable ones that this process has met."""

    def __init__(self, entries, resolution, caption_key='caption'):
        self.resolution, self.caption_key = resolution, caption_key
        self.need_caption = False
        self.sources = [entry[1:] for entry in entries]
        self.names, seen, self.skipped, self.cache = [], {}, {}, {}
        for name, _, _ in entries:  # ids become output files: '../x' must not climb, equal ones must not overwrite
            name = os.path.normpath('/' + name).lstrip('/')
            seen[name] = copies = seen.get(name, 0) + 1
            self.names.append(name if copies == 1 else f'#{copies}'.join(os.path.splitext(name)))

    def __len__(self):
        return len(self.names)

    def split_off(self, n):
        """Moves the last n images (at most half) into an ImageSet of their own, which is returned."""
        n = min(n, len(self) // 2)
        held = copy.copy(self)
        held.skipped, held.cache = {}, {}
        held.sources, held.names = self.sources[len(self) - n:], self.names[len(self) - n:]
        self.sources, self.names = self.sources[:len(self) - n], self.names[:len(self) - n]
        return held

    def get(self, i):
        """Image i -> (x (3, R, R) float32 in [-1, 1], caption str or None), x = u8 / 127.5 - 1. Raises ImageError, for
        a caption that cannot be read as well."""
        if i in self.cache:
            pixels, caption = self.cache[i]
        else:
            image, caption = self.sources[i]
            try:
                pixels = decode(read(*image), self.resolution)
                caption = load_caption(caption, self.caption_key, f'the .json of {self.names[i]}')
            except (OSError, DataError) as e:
                raise ImageError(str(e)) from None
            if len(self) * pixels.size <= CACHE_BYTES:
                self.cache[i] = pixels, caption
        if self.need_caption and is_blank(caption):
            raise ImageError('no caption')
        return torch.from_numpy(pixels).permute(2, 0, 1).float().contiguous() / 127.5 - 1, caption

    def keep_captioned(self):
        """Leaves out the images without a caption -> how many.

        At once where the listing tells, later on, for an empty .txt, as unreadable.
        """
        kept = [i for i, (_, caption) in enumerate(self.sources) if not is_blank(caption)]
        gone = len(self) - len(kept)
        self.sources = [self.sources[i] for i in kept]
        self.names = [self.names[i] for i in kept]
        self.need_caption = True
        return gone

    def readable(self, start):
        """Yields (i, x, caption) of every readable image once, in index order from `start` on and round the end. Prints
        and records each unreadable one when it is first met. Raises DataError if nothing can be read."""
        for i in ((start + d) % len(self) for d in range(len(self))):
            if self.names[i] not in self.skipped:
                try:
                    x, caption = self.get(i)
                except ImageError as e:
                    self.skipped[self.names[i]] = str(e)
                    print(f'warning: skipped {self.names[i]}: {e}', flush=True)
                else:
                    yield i, x, caption
        if len(self.skipped) == len(self):
            raise DataError(f'none of the {len(self)} images can be read, see the warnings above')

    def batch(self, seed, step, n, rank=0, world=1):
        """This rank's share of the n images of step `step` -> dict of x (n/world, 3, R, R) float32, captions (list),
        names (list), index (n/world,) int64, the positions in the global batch.

        Position k = step * n + j of the endless order is image permutation(seed, k // N)[k % N]: an epoch shows each
        image once, across step boundaries too. An unreadable one is replaced by the next readable one in index order,
        which no rank can see differently. Raises AssertionError if world does not divide n, DataError.
        """
        assert n % world == 0, f'{n} images a step cannot be split evenly over {world} ranks'
        if world > len(self):
            raise DataError(f'more ranks ({world}) than images ({len(self)})')
        index, picks = range(rank * n // world, (rank + 1) * n // world), []
        for j in index:
            epoch, place = divmod(step * n + j, len(self))
            picks.append(next(self.readable(int(permutation(seed, epoch, len(self))[place]))))
        return self.collate(picks, index)

    def first(self, n):
        """The first n readable images in index order, a fixed evaluation set -> dict as `batch`, shorter if there are
        no more. Raises DataError if there is none."""
        picks = list(islice(self.readable(0), n))
        return self.collate(picks, range(len(picks)))

    def collate(self, picks, index):
        """[(image index, x (3, R, R), caption)] and their positions in the global batch -> dict as `batch`."""
        return dict(x=torch.stack([x for _, x, _ in picks]), captions=[caption for _, _, caption in picks],
                    names=[self.names[i] for i, _, _ in picks], index=torch.tensor(index))


def open_data(c, run, training=True):
    """The images of a run -> (training ImageSet, held-out dict as ImageSet.batch plus `scenes` and `skipped`).

    'shapes' writes the embedded world on first use; there `scenes` is the truth that evaluation alone may read, elsewhere
    None. Without --held_out the last c.eval_images of --data are kept from training; an evaluation (training False) does
    with --held_out alone. Raises DataError.
    """
    if c.data == 'shapes':
        from data.shapes import scenes as world
        root = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'shapes', 'images')
        world.write(root)
        train, held = (open_images(os.path.join(root, split), c.resolution) for split in ('train', 'held_out'))
        return train, dict(held.first(c.eval_images), scenes=world.load(root, 'held_out')[:c.eval_images], skipped=0)
    if not c.data and (training or not c.held_out):
        raise DataError('give --data=FOLDER (or a manifest, or tar shards: data/README.md)')
    train = open_images(c.data, c.resolution, *c.data_keys) if c.data else None
    if train and not c.held_out and len(train) < 2:
        raise DataError(f'{c.data}: one image is too few, one has to be held out (or give --held_out)')
    held = open_images(c.held_out, c.resolution, *c.data_keys) if c.held_out else train.split_off(c.eval_images)
    if train and run.world > len(train):
        raise DataError(f'more ranks ({run.world}) than images ({len(train)}) in {c.data}')
    return train, dict(held.first(c.eval_images), scenes=None, skipped=len(held.skipped))


# --- image files one by one: evaluation and benchmarks ------------------------------------------------------------------
def image_files(folder):
    """[(file name, path)] of the images at any depth below a folder, with the official script's suffixes and in its order."""
    paths = sorted(p for p in glob.glob(f'{glob.escape(folder)}/**', recursive=True)
                   if p.lower().endswith(('.jpg', '.jpeg', '.png', '.bmp', '.tiff', '.webp')))
    if not paths:
        raise SystemExit(f'{folder}: {"no images in it" if os.path.isdir(folder) else "no such folder"}')
    return [(os.path.basename(p), p) for p in paths]


def picture(path, area=0):
    """-> x (1, 3, H, W) in [-1, 1] as the official script reads it, RGB by PIL alone, at its own size or scaled to about `area` pixels."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            im = file.convert('RGB')
        if max(im.size) > 100 * min(im.size):
            raise ValueError(f'{im.width} x {im.height} is too long and thin')
    except Exception as e:                       # on damaged bytes the decoders raise nearly anything
        raise SystemExit(f'{path}: not a usable image ({str(e).split(" <")[0] or type(e).__name__})')
    scale = math.sqrt(area / (im.width * im.height)) if area else 1
    im = im.resize([max(1, round(side * scale)) for side in im.size], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(im)).permute(2, 0, 1)[None].float() / 127.5 - 1


def keep(x, path):
    """x (3, R, R) in [-1, 1] -> an image file in the format of its name; whole or not there."""
    im = Image.fromarray(((x + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())
    kind = Image.registered_extensions()[os.path.splitext(path)[1].lower()]
    how = dict(JPEG=dict(quality=100, subsampling=0), WEBP=dict(lossless=True)).get(kind, {})
    common.write_atomic(path, lambda tmp: im.save(tmp, kind, **how))
