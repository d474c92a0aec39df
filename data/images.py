"""Images, and captions where there are any, from folders, manifests and tar shards -> batches.

`open_images` lists the images once, `ImageSet.batch(seed, step, n)` reads those of one step. Which
images a step sees is a pure function of (seed, step, n): ranks and resume cannot change it, and
there is no iterator state to save. Nothing is ever unpacked: a tar member is read in place, so
whatever its name says it lands nowhere.
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

from lib.files import write_atomic

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.tiff', '.tif', '.gif')
MANIFESTS = ('.json', '.jsonl', '.jsonlines')
# all that Pillow may try: its EPS reader would start ghostscript
FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'TIFF', 'GIF')
BENCH_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tiff', '.webp')    # of the official script
MIN_SIDE = 8                # pixels; anything smaller is a tracking pixel, not a picture
CACHE_BYTES = 256 * 2**20   # a set whose decoded pixels fit in here is decoded once and kept


class DataError(SystemExit):
    """Data that cannot be used as given; one line that says what and where."""


class ImageError(DataError):
    """One image that cannot be read; batches step over it."""


# --- one image -----------------------------------------------------------------------------------
def decode(raw, resolution):
    """Bytes of an image file -> (R, R, 3) uint8, R = resolution. Raises ImageError.

    EXIF orientation is applied; then RGB: transparency on white, 16-bit grey by its high byte, an
    animation's first frame, colour profiles ignored; then the centre square, resized to R with
    Lanczos. That is the shorter side resized to R and a centre crop, without the intermediate,
    which a 9 x 60000 strip would make enormous. A shorter side of exactly R is not resampled.
    Refused: a side below MIN_SIDE, more pixels than 2 * Image.MAX_IMAGE_PIXELS (Pillow's
    decompression-bomb error), a file that ends too early.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')     # about large images and odd metadata it reads well
            return open_square(raw, resolution)
    except Exception as error:                  # on damaged bytes decoders raise nearly anything
        raise ImageError(complaint(error)) from None


def complaint(error):
    """What an image library's error says, without the address of the BytesIO behind ' <'."""
    return str(error).split(' <')[0] or type(error).__name__


def open_square(raw, resolution):
    """`decode` without the translation of errors."""
    image = Image.open(io.BytesIO(raw), formats=FORMATS)
    if min(image.size) < MIN_SIDE:
        raise ValueError(f'too small, {image.width}x{image.height}')
    # JPEG only: decode at 1/2, 1/4 or 1/8, never below twice the resolution
    image.draft(None, (2 * resolution, 2 * resolution))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I'):              # 16-bit grey: some Pillow versions clip it to white
        grey = np.clip(np.asarray(image), 0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(white, image.convert('RGBA'))
    side = min(image.size)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    square = image.convert('RGB').crop((left, top, left + side, top + side))
    size = (resolution, resolution)
    square = square.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.array(square)


def read_bytes(path, offset=0, size=-1):
    """-> `size` bytes of a file, -1 = all to its end. Raises OSError."""
    with open(path, 'rb') as f:
        f.seek(offset)
        return f.read(size)


# --- one caption ---------------------------------------------------------------------------------
def find_caption(row, key, place):
    """row: an object of a manifest or of a tar's .json -> its caption at `key`, str or None.

    A list there is a LLaVA conversation [{from, value}, ...] whose first answer is the caption.
    Most stages need images only, so without the default key the caption is None; a key that
    somebody asked for has to be there. Raises DataError.
    """
    if not isinstance(row, dict):
        row = {}
    if key not in row and key != 'caption':
        raise DataError(f'{place}: no key {key!r} (the caption of --data_keys, or stage 0\'s '
                        f'--answer_key); the keys there are: {" ".join(row)}')
    value = row.get(key)
    if isinstance(value, list):
        value = first_answer(value)
    if value is not None and not isinstance(value, str):
        raise DataError(f'{place}: the caption at {key!r} is neither a string nor a conversation '
                        'with a gpt turn')
    return value


def first_answer(turns):
    """The first answer of a conversation, or what was given if there is none."""
    for turn in turns:
        if isinstance(turn, dict) and turn.get('from') in ('gpt', 'assistant'):
            return turn.get('value')
    return turns


def is_blank(caption):
    """Whether a caption, None, a str, or one left on the disk, is known to say nothing."""
    if isinstance(caption, str):
        return not caption.strip()
    return caption is None


def load_caption(caption, key, place):
    """The caption of an entry, see below -> str or None. Raises OSError, DataError."""
    if not isinstance(caption, tuple):
        return caption
    kind, where = caption
    text = read_bytes(*where).decode('utf-8-sig', errors='replace').strip()
    if kind == '.txt':
        return text
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f'{place}: not JSON ({error})') from None
    return find_caption(row, key, place)


# --- listing -------------------------------------------------------------------------------------
# An entry is (name, image, caption): image = the arguments of `read_bytes`; caption = None, a str,
# or ('.txt' | '.json', the arguments of `read_bytes`): left on the disk until its image is wanted,
# since the captions of a large set fill the memory.

def entries_of(files, kinds):
    """files: {name: arguments of `read_bytes`} -> an entry for each image.

    Its caption is the first of `kinds` that has the image's stem.
    """
    entries = []
    for name, where in files.items():
        stem, suffix = os.path.splitext(name)
        hidden = os.path.basename(name).startswith('.')         # '._x.jpg' is macOS metadata
        if hidden or suffix.lower() not in SUFFIXES:
            continue
        there = [kind for kind in kinds if stem + kind in files]
        caption = None
        if there:
            caption = (there[0], files[stem + there[0]])
        entries.append((name, where, caption))
    return entries


def list_folder(path, caption_key):
    """The images (caption: x.txt beside x.jpg), then the .tar shards at any depth -> entries."""
    files = []
    for folder, _, names in os.walk(path):
        files += [os.path.join(folder, name) for name in names]
    files.sort()
    entries = entries_of({os.path.relpath(file, path): (file,) for file in files}, ('.txt',))
    for file in files:
        if file.lower().endswith('.tar'):
            entries += list_tar(file, caption_key)
    return entries


def read_manifest(path):
    """A .json list, or .jsonl lines -> [(place, object)]. Raises DataError with file and line."""
    rows, line = [], 1
    try:
        with open(path, encoding='utf-8-sig') as f:
            if path.lower().endswith('.json'):
                for i, row in enumerate(json.load(f), 1):
                    rows.append((f'{path} entry {i}', row))
            else:
                for line, text in enumerate(f, 1):
                    if text.strip():
                        rows.append((f'{path} line {line}', json.loads(text.strip())))
    except json.JSONDecodeError as error:
        place = f'{path} line {line + error.lineno - 1}'
        raise DataError(f'{place}: not JSON ({error.msg})') from None
    except (OSError, UnicodeDecodeError, TypeError) as error:
        raise DataError(f'{path}: not a readable manifest ({error})') from None
    return rows


def list_manifest(path, image_key, caption_key, image_root):
    """A manifest -> entries in the file's order. Raises DataError with file and line.

    Image paths are relative to the manifest's folder, or to image_root; with image_root a leading
    '/' is dropped.
    """
    entries = []
    for place, row in read_manifest(path):
        if not isinstance(row, dict):
            raise DataError(f'{place}: no path at {image_key!r} (the image of --data_keys); it is '
                            f'no object but {row!r:.40}')
        name = row.get(image_key)
        if not isinstance(name, str):
            raise DataError(f'{place}: no path at {image_key!r} (the image of --data_keys); the '
                            f'keys there are: {" ".join(row)}')
        if image_root:
            file = os.path.join(image_root, name.lstrip('/'))
        else:
            file = os.path.join(os.path.dirname(path), name)
        entries.append((name, (file,), find_caption(row, caption_key, place)))
    start = [image[0] for _, image, _ in entries[:100]]
    if start and not any(map(os.path.exists, start)):           # not by a million warnings
        raise DataError(f'{path}: its images are not there, for example {start[0]}; is the folder '
                        'of --data_keys right?')
    return entries


def list_tar(path, caption_key):
    """One tar in webdataset layout -> entries in the tar's order. Raises DataError.

    x.jpg, x.txt and x.json belong together. The .txt is the caption, unless a caption key was
    asked for: then .json[caption_key]. Only regular files count; links and devices are not looked
    at.
    """
    members = {}
    try:
        with tarfile.open(path, 'r:') as tar:       # uncompressed: in others there is no seeking
            for member in tar:
                if member.isreg():
                    members[member.name] = (path, member.offset_data, member.size)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f'{path}: not a readable tar ({error}); compressed ones have to be '
                        'unpacked first') from None
    kinds = ('.json', '.txt')
    if caption_key == 'caption':
        kinds = ('.txt', '.json')
    shard = os.path.basename(path)
    entries = entries_of(members, kinds)
    return [(f'{shard}/{name}', where, caption) for name, where, caption in entries]


def list_source(path, image_key, caption_key, image_root):
    """Entries of one folder, manifest, tar or image. Raises DataError."""
    if os.path.isdir(path):
        return list_folder(path, caption_key)
    if path.lower().endswith(MANIFESTS):
        return list_manifest(path, image_key, caption_key, image_root)
    if path.lower().endswith('.tar'):
        return list_tar(path, caption_key)
    if path.lower().endswith(SUFFIXES):
        return entries_of({os.path.basename(path): (path,)}, ())
    raise DataError(f'expected a folder, an image, .json, .jsonl or .tar (unpack a .tar.gz), '
                    f'got {path}')


def open_images(data, resolution, image_key='image', caption_key='caption', image_root=''):
    """data -> ImageSet of R = resolution. Images are opened when they are wanted, not here.

    data: a folder, an image, a .json or .jsonl manifest, a .tar, a glob of these, or several with
    commas between. Raises DataError.
    """
    sources = data.split(',')
    if os.path.exists(data):                        # a comma may be part of a name
        sources = [data]
    entries = []
    for source in sources:
        source = os.path.expanduser(source.strip())
        paths = [source]
        if not os.path.exists(source):
            paths = sorted(glob.glob(source, recursive=True))
        if not paths:
            raise DataError(f'no such file or folder, and no glob that matches: {source!r}')
        for path in paths:
            found = list_source(path, image_key, caption_key, image_root)
            if not found:
                raise DataError(f'{path}: no images in it ({" ".join(SUFFIXES)})')
            name, _, caption = found[0]
            if caption_key != 'caption':
                # a key that is nowhere should stop us here, not skip every image later on
                load_caption(caption, caption_key, f'{path}, {name}')
            entries += found
    return ImageSet(entries, resolution, caption_key)


# --- the set -------------------------------------------------------------------------------------
@lru_cache(maxsize=4)
def permutation(seed, epoch, n):
    """The order of one epoch -> (n,) int64, the same on every rank and after every resume."""
    return np.random.default_rng([seed, epoch]).permutation(n)


class ImageSet:
    """Images at one resolution.

    names: a unique id each, a relative path that stays inside any folder it is joined to. skipped:
    {name: reason} of the unreadable ones that this process has met.
    """

    def __init__(self, entries, resolution, caption_key='caption'):
        self.resolution = resolution
        self.caption_key = caption_key
        self.need_caption = False
        self.sources = [entry[1:] for entry in entries]
        self.names = []
        self.skipped = {}
        self.cache = {}
        copies = {}
        for name, _, _ in entries:
            # names become output files: '../x' must not climb, equal ones must not overwrite
            name = os.path.normpath('/' + name).lstrip('/')
            copies[name] = copies.get(name, 0) + 1
            if copies[name] > 1:
                stem, suffix = os.path.splitext(name)
                name = f'{stem}#{copies[name]}{suffix}'
            self.names.append(name)

    def __len__(self):
        return len(self.names)

    def split_off(self, n):
        """Moves the last n images (at most half) into an ImageSet of their own -> that."""
        cut = len(self) - min(n, len(self) // 2)
        held = copy.copy(self)
        held.skipped = {}
        held.cache = {}
        held.sources, self.sources = self.sources[cut:], self.sources[:cut]
        held.names, self.names = self.names[cut:], self.names[:cut]
        return held

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

    def get(self, i):
        """Image i -> x (3, R, R) float32 in [-1, 1], x = u8 / 127.5 - 1, and its caption or None.

        Raises ImageError, for a caption that cannot be read as well.
        """
        if i not in self.cache:
            pixels, caption = self.load(i)
            if len(self) * pixels.size <= CACHE_BYTES:
                self.cache[i] = pixels, caption
        else:
            pixels, caption = self.cache[i]
        x = torch.from_numpy(pixels).permute(2, 0, 1).float().contiguous()
        return x / 127.5 - 1, caption

    def load(self, i):
        """Image i from its file -> (R, R, 3) uint8, and its caption or None. Raises ImageError."""
        image, caption = self.sources[i]
        try:
            pixels = decode(read_bytes(*image), self.resolution)
            place = f'the .json of {self.names[i]}'
            caption = load_caption(caption, self.caption_key, place)
        except (OSError, DataError) as error:
            raise ImageError(str(error)) from None
        if self.need_caption and is_blank(caption):
            raise ImageError('no caption')
        return pixels, caption

    def readable(self, start):
        """Yields (i, x, caption) of every readable image once, from `start` on and round the end.

        Prints and records each unreadable one when it is first met. Raises DataError if nothing
        can be read.
        """
        for d in range(len(self)):
            i = (start + d) % len(self)
            name = self.names[i]
            if name in self.skipped:
                continue
            try:
                x, caption = self.get(i)
            except ImageError as error:
                self.skipped[name] = str(error)
                print(f'warning: skipped {name}: {error}', flush=True)
                continue
            yield i, x, caption
        if len(self.skipped) == len(self):
            raise DataError(f'none of the {len(self)} images can be read, see the warnings above')

    def batch(self, seed, step, n, rank=0, world=1):
        """This rank's share of the n images of step `step` -> a dict.

        x (n/world, 3, R, R) float32, captions (list), names (list), index (n/world,) int64, the
        positions in the global batch. Position k = step * n + j of the endless order is image
        permutation(seed, k // N)[k % N]: an epoch shows each image once, across step boundaries
        too. An unreadable one is replaced by the next readable one in index order, which no rank
        can see differently. Raises AssertionError if world does not divide n, DataError.
        """
        assert n % world == 0, f'{n} images a step cannot be split evenly over {world} ranks'
        if world > len(self):
            raise DataError(f'more ranks ({world}) than images ({len(self)})')
        index = range(rank * n // world, (rank + 1) * n // world)
        picks = []
        for j in index:
            epoch, place = divmod(step * n + j, len(self))
            first = permutation(seed, epoch, len(self))[place]
            picks.append(next(self.readable(int(first))))
        return self.collate(picks, index)

    def first(self, n):
        """The first n readable images in index order -> dict as `batch`: a fixed evaluation set.

        Shorter if there are no more. Raises DataError if there is none.
        """
        picks = list(islice(self.readable(0), n))
        return self.collate(picks, range(len(picks)))

    def collate(self, picks, index):
        """[(image index, x (3, R, R), caption)] and positions in the batch -> dict as `batch`."""
        return dict(x=torch.stack([x for _, x, _ in picks]),
                    captions=[caption for _, _, caption in picks],
                    names=[self.names[i] for i, _, _ in picks],
                    index=torch.tensor(index))


def open_data(config, run, training=True):
    """The images of a run -> training ImageSet, held-out dict as `batch`, scenes and skipped.

    'shapes' writes the embedded world on first use; there `scenes` is the truth that evaluation
    alone may read, elsewhere None. Without --held_out the last eval_images of --data are kept from
    training; an evaluation (training False) does with --held_out alone. Raises DataError.
    """
    if config.data == 'shapes':
        return open_shapes(config)
    if not config.data and (training or not config.held_out):
        raise DataError('give --data=FOLDER (or a manifest, or tar shards: data/README.md)')
    train = None
    if config.data:
        train = open_images(config.data, config.resolution, *config.data_keys)
    if config.held_out:
        held = open_images(config.held_out, config.resolution, *config.data_keys)
    else:
        if len(train) < 2:
            raise DataError(f'{config.data}: one image is too few, one has to be held out '
                            '(or give --held_out)')
        held = train.split_off(config.eval_images)
    if train and run.world > len(train):
        raise DataError(f'more ranks ({run.world}) than images ({len(train)}) in {config.data}')
    images = held.first(config.eval_images)
    return train, dict(images, scenes=None, skipped=len(held.skipped))


def open_shapes(config):
    """`open_data` of the embedded world."""
    from data.shapes import scenes as world
    root = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'shapes', 'images')
    world.write(root)
    train = open_images(os.path.join(root, 'train'), config.resolution)
    held = open_images(os.path.join(root, 'held_out'), config.resolution)
    scenes = world.load(root, 'held_out')[:config.eval_images]
    return train, dict(held.first(config.eval_images), scenes=scenes, skipped=0)


# --- image files one by one: evaluation and benchmarks -------------------------------------------
def image_files(folder):
    """[(file name, path)] of the images at any depth below a folder, as the official script does.

    Its suffixes, its order.
    """
    paths = []
    for path in glob.glob(f'{glob.escape(folder)}/**', recursive=True):
        if path.lower().endswith(BENCH_SUFFIXES):
            paths.append(path)
    if not paths:
        why = 'no images in it' if os.path.isdir(folder) else 'no such folder'
        raise SystemExit(f'{folder}: {why}')
    return [(os.path.basename(path), path) for path in sorted(paths)]


def load_picture(path, area=0):
    """-> x (1, 3, H, W) in [-1, 1] as the official script reads it, RGB by PIL alone.

    At its own size, or scaled to about `area` pixels.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            image = file.convert('RGB')
        if max(image.size) > 100 * min(image.size):
            raise ValueError(f'{image.width} x {image.height} is too long and thin')
    except Exception as error:                  # on damaged bytes decoders raise nearly anything
        raise SystemExit(f'{path}: not a usable image ({complaint(error)})')
    scale = 1
    if area:
        scale = math.sqrt(area / (image.width * image.height))
    size = [max(1, round(side * scale)) for side in image.size]
    image = image.resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def save_image(x, path):
    """x (3, R, R) in [-1, 1] -> an image file in the format of its name; whole or not there."""
    pixels = ((x + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    suffix = os.path.splitext(path)[1].lower()
    kind = Image.registered_extensions()[suffix]
    options = dict(JPEG=dict(quality=100, subsampling=0), WEBP=dict(lossless=True)).get(kind, {})
    image = Image.fromarray(pixels)
    write_atomic(path, lambda temporary: image.save(temporary, kind, **options))
