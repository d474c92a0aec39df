"""Images, and captions where there are any, from folders, tables and tar shards -> batches.

`open_images` lists the images once, `ImageSet.batch(seed, step, n)` reads those of one step. Which
images a step sees is a pure function of (seed, step, n): ranks and resume cannot change it, and
there is no iterator state to save. Nothing is ever unpacked: a tar member is read in place, so
whatever its name says it lands nowhere.

An image, row or shard that cannot be used is left out, announced in one line and counted; where
nothing of a source can be used, DataError is raised.
"""
import copy
import glob
import io
import os
import warnings
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
from PIL import Image, ImageOps

from data.files import (
    SUFFIXES, DataError, ImageError, entries_of, hidden, name_bytes, read_bytes, warn)

TABLES = ('.json', '.jsonl', '.jsonlines', '.csv', '.tsv', '.parquet')
TARS = ('.tar', '.tar.gz', '.tgz', '.tar.bz2', '.tar.xz', '.tar.zst')
# all that Pillow may try: its EPS reader would start ghostscript
FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'TIFF', 'GIF')
MIN_SIDE = 8                # pixels; anything smaller is a tracking pixel, not a picture
CACHE_BYTES = 256 * 2**20   # a set whose decoded pixels fit in here is decoded once and kept


# --- one image -----------------------------------------------------------------------------------
def decode(raw, resolution):
    """Bytes of an image file -> (R, R, 3) uint8, R = resolution. Raises ImageError.

    EXIF orientation is applied; then RGB: transparency on white, deep grey by its high byte, an
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
    tags = getattr(image, 'tag_v2', {})         # of a TIFF
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(('I', 'F')):       # Pillow would clip these, to white or to black
        image = eight_bits(image, tags)
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


def eight_bits(image, tags):
    """Grey of 9 to 16 bits -> its high byte. Raises ValueError on floats and wider integers.

    tags: of a TIFF; 258 is BitsPerSample, and where 262 is 0, zero is white.
    """
    if tags and not image.mode.startswith('I;16'):
        raise ValueError(f'mode {image.mode}: nobody says which of its values are black and '
                         'white; convert it to 8 or 16 bits')
    [bits] = tags.get(258, [16])
    grey = np.asarray(image).clip(0, 65535) >> bits - 8
    if tags.get(262) == 0:
        grey = 255 - grey
    return Image.fromarray(grey.astype(np.uint8))


def image_bytes(path, *place):
    """Bytes of an image where an entry says that it is. Raises OSError, ValueError."""
    if path.lower().endswith('.parquet'):
        from data.sources import read_cell
        return read_cell(path, *place)
    return read_bytes(path, *place)


# --- listing -------------------------------------------------------------------------------------
# Entries are those of data/files.py. keys: the four of --data_keys. lost: a list that gets a line
# for each row or shard that is left out.

def list_all(paths, keys, lost, entries=()):
    """`entries`, and those of several files or folders; a path that gives none is left out.

    Raises DataError, that of the first path, if there are none at all.
    """
    entries, errors = list(entries), []
    for path in paths:
        try:
            entries += list_source(path, keys, lost)
        except DataError as error:
            errors.append(str(error))
    if errors and not entries:
        raise DataError(errors[0])
    for error in errors:
        warn(f'left out {error}', once=True)
    lost += errors
    return entries


def list_source(path, keys, lost):
    """Entries of one folder, table, tar or image, at least one. Raises DataError."""
    name = path.lower()
    if os.path.isdir(path):
        entries = list_folder(path, keys, lost)
    elif name.endswith(TABLES):
        from data.sources import list_table
        entries = list_table(path, keys, lost)
    elif name.endswith(TARS):
        from data.sources import list_tar
        entries = list_tar(path, keys, lost)
    elif name.endswith(SUFFIXES):
        stem = os.path.splitext(path)[0]
        files = [file for file in (path, stem + '.txt', stem + '.TXT') if os.path.exists(file)]
        entries = entries_of({os.path.basename(file): (file,) for file in files}, ('.txt',))
    else:
        raise DataError(f'{path}: expected a folder, an image, or {" ".join(TABLES)} .tar')
    if not entries:
        raise DataError(f'{path}: no images in it ({" ".join(SUFFIXES)})')
    if keys[3]:
        entries = [entry for entry in entries if entry[3]]
        if not entries:
            raise DataError(f'{path}: only a table can name sources (the fourth of --data_keys)')
    return entries


def list_folder(path, keys, lost):
    """The images (caption: x.txt beside x.jpg), then those in tars and .parquet, at any depth."""
    files, closed = [], []
    for folder, inside, names in os.walk(path, onerror=closed.append):
        inside[:] = [name for name in inside if not hidden(name)]
        files += [os.path.join(folder, name) for name in names if not hidden(name)]
    files.sort(key=name_bytes)                  # the same order in every locale
    for error in closed:
        warn(f'left out {error}', once=True)
    lost += closed
    entries = entries_of({os.path.relpath(file, path): (file,) for file in files}, ('.txt',))
    shards = [file for file in files if file.lower().endswith((*TARS, '.parquet'))]
    return list_all(shards, keys, lost, entries)


def paths_of(source):
    """A file, a folder, a glob or hf:owner/name -> paths. Raises DataError."""
    path = os.path.expanduser(source.strip())
    if os.path.exists(path):
        return [path]
    if path.startswith('hf:'):
        from data.sources import hub_files
        return hub_files(path)
    paths = sorted(glob.glob(path, recursive=True))
    if not paths:
        raise DataError(f'no such file or folder, and no glob that matches: {path!r}')
    known = (*SUFFIXES, *TABLES, *TARS)
    return [path for path in paths if os.path.isdir(path) or path.lower().endswith(known)] or paths


def open_images(data, resolution, image_key='image', caption_key='caption', image_root='',
                source_key=''):
    """data -> ImageSet of R = resolution. Images are opened when they are wanted, not here.

    data: a folder, an image, a table, a .tar, a glob of these, hf:owner/name, or several with
    commas between. Raises DataError.
    """
    sources = data.split(',')
    if os.path.exists(data):                        # a comma may be part of a name
        sources = [data]
    keys = image_key, caption_key, image_root, source_key
    entries, lost = [], []
    for source in sources:
        entries += list_all(paths_of(source), keys, lost)
    images = ImageSet(entries, resolution, caption_key)
    images.left_out = len(lost)
    return images


# --- the set -------------------------------------------------------------------------------------
@lru_cache(maxsize=4)
def permutation(seed, epoch, n, more=0):
    """The order of one epoch -> (n,) int64, the same on every rank and after every resume."""
    return np.random.default_rng([seed, epoch, more]).permutation(n)


class ImageSet:
    """Images at one resolution.

    names: a unique id each, a relative path that stays inside any folder it is joined to. skipped:
    {name: reason} of the unreadable ones that this process has met. left_out: how many rows and
    shards could not even be listed.
    """

    def __init__(self, entries, resolution, caption_key='caption'):
        self.resolution = resolution
        self.caption_key = caption_key
        self.need_caption = False
        self.places = [entry[1:] for entry in entries]      # image, caption, source
        self.names = []
        self.skipped = {}
        self.left_out = 0
        self.cache = {}
        copies, taken = {}, set()
        for name, *_ in entries:
            # names become output files: '../x' must not climb, equal ones must not overwrite
            name = os.path.normpath('/' + name).lstrip('/')
            unique = name
            while unique in taken:
                copies[name] = copies.get(name, 1) + 1
                stem, suffix = os.path.splitext(name)
                unique = f'{stem}#{copies[name]}{suffix}'
            taken.add(unique)
            self.names.append(unique)

    def __len__(self):
        return len(self.names)

    def keep(self, indices):
        """Leaves out all others."""
        self.places = [self.places[i] for i in indices]
        self.names = [self.names[i] for i in indices]
        self.cache = {}

    def move(self, indices):
        """Moves some images into an ImageSet of their own -> that."""
        moved = copy.copy(self)
        moved.keep(indices)
        moved.skipped = {}
        moved.left_out = 0
        self.keep(sorted(set(range(len(self))) - set(indices)))
        return moved

    def split_held_out(self):
        """Moves those in a folder called held_out into an ImageSet of their own -> that.

        The embedded world's scenes.jsonl lists its held-out scenes too.
        """
        files = [os.path.abspath(image[0]) for image, _, _ in self.places]
        return self.move([i for i, file in enumerate(files) if '/held_out/' in file])

    def get(self, i):
        """Image i -> x (3, R, R) float32 in [-1, 1], its caption or None, its source as x or None.

        x = u8 / 127.5 - 1. Raises ImageError, also for a caption or source that cannot be read.
        """
        if i not in self.cache:
            pixels, caption = self.load(i)
            if len(self) * pixels.size <= CACHE_BYTES:
                self.cache[i] = pixels, caption
        else:
            pixels, caption = self.cache[i]
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1
        source = x[1] if len(x) == 2 else None
        return x[0], caption, source

    def load(self, i):
        """Image i from its file -> (1, R, R, 3) uint8, 2 with its source, and its caption or None.

        Raises ImageError.
        """
        image, caption, source = self.places[i]
        try:
            pixels = [decode(image_bytes(*image), self.resolution)]
            if source:
                pixels.append(decode(image_bytes(*source), self.resolution))
            if isinstance(caption, tuple):
                from data.sources import load_caption
                caption = load_caption(*caption, self.caption_key)
        except (OSError, ValueError) as error:
            raise ImageError(str(error)) from None
        if self.need_caption and caption is None:
            raise ImageError('no caption')
        return np.stack(pixels), caption

    def readable(self, start):
        """Yields (i, x, caption, source) of every readable image once, from `start` on and round.

        Prints and records each unreadable one when it is first met. Raises DataError if nothing
        can be read.
        """
        for d in range(len(self)):
            i = (start + d) % len(self)
            name = self.names[i]
            if name in self.skipped:
                continue
            try:
                found = self.get(i)
            except ImageError as error:
                self.skipped[name] = str(error)
                warn(f'skipped {name}: {error}')
                continue
            yield i, *found
        if self.skipped.keys() >= set(self.names):
            raise DataError(f'none of the {len(self)} images can be read, see the warnings above')

    def batch(self, seed, step, n, rank=0, world=1, more=0):
        """This rank's share of the n images of step `step` -> a dict.

        x (n/world, 3, R, R) float32, captions (list), names (list), index (n/world,) int64, the
        positions in the global batch; source, as x, where data_keys names one. Position
        k = step * n + j of the endless order is image permutation(seed, k // N)[k % N]: an epoch
        shows each image once, across step boundaries too. An unreadable one is replaced by the next
        readable one in index order, which no rank can see differently. more: 1, 2, ... are other
        images of the same step. Raises AssertionError if world does not divide n, DataError.
        """
        assert n % world == 0, f'{n} images a step cannot be split evenly over {world} ranks'
        if world > len(self):
            raise DataError(f'more ranks ({world}) than images ({len(self)})')
        index = range(rank * n // world, (rank + 1) * n // world)
        picks = []
        for j in index:
            epoch, place = divmod(step * n + j, len(self))
            first = permutation(seed, epoch, len(self), more)[place]
            picks.append(next(self.readable(int(first))))
        return self.collate(picks, index)

    def first(self, n):
        """The first n readable images in index order -> dict as `batch`: a fixed evaluation set.

        Shorter if there are no more. Raises DataError if there is none.
        """
        picks = list(islice(self.readable(0), n))
        return self.collate(picks, range(len(picks)))

    def collate(self, picks, index):
        """What `readable` yields, and positions in the batch -> dict as `batch`."""
        i, x, captions, sources = zip(*picks)
        images = dict(x=torch.stack(x), captions=list(captions),
                      names=[self.names[k] for k in i], index=torch.tensor(index))
        if sources[0] is not None:
            images['source'] = torch.stack(sources)
        return images


def open_data(config, run, training=True):
    """The images of a run -> training ImageSet, held-out dict as `batch`, scenes and skipped.

    scenes: of the embedded world the truth, which evaluation alone may read; elsewhere None.
    Without --held_out, images of --data are kept from training: those in a folder called held_out,
    else the last eval_images. An evaluation (training False) does with --held_out alone. Raises
    DataError.
    """
    train = held = scenes = None
    left_out = 0
    if config.data == 'shapes':
        train, held, scenes = open_shapes(config)
    elif config.data:
        train = open_images(config.data, config.resolution, *config.data_keys)
        held = train.split_held_out()
        left_out = train.left_out
        if held and training:
            warn(f'{len(held)} images of {config.data} are in a folder held_out, which no stage '
                 'trains on', once=True)
    elif training or not config.held_out:
        raise DataError('give --data=FOLDER (or a manifest, or tar shards: data/README.md)')
    if config.held_out:
        held = open_images(config.held_out, config.resolution, *config.data_keys)
        left_out += held.left_out
        scenes = None
    elif not held:
        if len(train) < 2:
            raise DataError(f'{config.data}: one image is too few, one has to be held out '
                            '(or give --held_out)')
        start = len(train) - min(config.eval_images, len(train) // 2)
        held = train.move(range(start, len(train)))
    if training and not train:
        raise DataError(f'{config.data}: no image of it is left to train on')
    if training and run.world > len(train):
        raise DataError(f'more ranks ({run.world}) than images ({len(train)}) in {config.data}')
    images = held.first(config.eval_images)
    return train, dict(images, scenes=scenes, skipped=len(held.skipped) + left_out)


def open_shapes(config):
    """The embedded world, written on first use -> its two ImageSets and the held-out scenes."""
    from data.shapes import scenes as world
    root = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'shapes', 'images')
    world.write(root)
    train = open_images(os.path.join(root, 'train'), config.resolution)
    held = open_images(os.path.join(root, 'held_out'), config.resolution)
    return train, held, world.load(root, 'held_out')[:config.eval_images]


def keep_captioned(images, config, run):
    """Leaves out the images that come without a caption, and says so -> how many.

    At once where the listing tells; later on, for an empty .txt, as unreadable. Raises SystemExit
    where none is left.
    """
    whole = len(images)
    images.keep([i for i, (_, caption, _) in enumerate(images.places) if caption is not None])
    images.need_caption = True
    gone = whole - len(images)
    if gone == whole:
        raise SystemExit(f'{config.data}: none of the {gone} images has a caption '
                         '(data/README.md)')
    if gone and run.master:
        print(f'warning: {gone} of the {whole} images of {config.data} have no caption and are '
              'left out', flush=True)
    return gone
