"""Files as other people leave them: names that are any bytes, and what belongs together."""
import os
import sys

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.tiff', '.tif', '.gif')
LFS_POINTER = b'version https://git-lfs'


class DataError(SystemExit):
    """Data that cannot be used as given; one line that says what and where."""


class ImageError(DataError):
    """One image that cannot be read; batches step over it."""


def name_bytes(name):
    """A file name as the disk has it: the same bytes in every locale, UTF-8 or not."""
    try:
        return name.encode('utf-8', 'surrogateescape')
    except UnicodeEncodeError:                  # half a character, from a JSON file
        return name.encode('utf-8', 'surrogatepass')


def printable(text):
    """Text as one line that the screen can show in every locale."""
    text = ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    encoding = sys.stdout.encoding or 'ascii'
    return text.encode(encoding, 'backslashreplace').decode(encoding)


def warn(text, once=False):
    """Prints a line of warning. once: every rank finds the same, so the first one says it."""
    if not once or os.environ.get('RANK', '0') == '0':
        print(printable(f'warning: {text}'), flush=True)


def read_bytes(path, offset=0, size=-1):
    """-> `size` bytes of a file, -1 = all to its end. Raises OSError, ValueError."""
    try:
        with open(name_bytes(path), 'rb') as f:
            f.seek(offset)
            raw = f.read(size)
    except OSError as error:
        error.filename = path                   # as it was given, not as bytes
        raise
    if raw.startswith(LFS_POINTER):
        raise ValueError('a Git LFS pointer and not the file itself; git lfs pull fetches it')
    return raw


def hidden(name):
    """Whether a path goes through what no user put there: ._x.jpg, .ipynb_checkpoints, ..."""
    parts = name.split('/')
    dotted = [part for part in parts if part.startswith('.') and part not in ('.', '..')]
    return bool(dotted) or '@eaDir' in parts    # thumbnails on a Synology disk


# An entry is (name, image, caption, source): image = the arguments of `read_bytes`, or of
# `read_cell` for one in a parquet; caption = None, a str, or ('.txt' | '.json', the arguments of
# `read_bytes`): left on the disk until its image is wanted, since the captions of a large set fill
# the memory; source = None, or as image: what the image was edited from.

def entries_of(files, kinds):
    """files: {name: arguments of `read_bytes`} -> an entry for each image.

    Its caption is the first of `kinds` that has the image's stem.
    """
    captions = {}
    for name, where in files.items():
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in kinds:
            captions[stem, suffix.lower()] = where
    entries = []
    for name, where in files.items():
        stem, suffix = os.path.splitext(name)
        if hidden(name) or suffix.lower() not in SUFFIXES:
            continue
        there = [(kind, captions[stem, kind]) for kind in kinds if (stem, kind) in captions]
        caption = there[0] if there else None
        entries.append((name, where, caption, None))
    return entries
