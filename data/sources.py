"""What --data may be beside folders: tables (JSON manifests, CSV, parquet), tars, sets of the hub.

Also captions, wherever they come from. Imported where a run has any of these.

A row of a table is (place, row): the place says where it stands in its file, the row is a dict, or
what else stands there. keys: the four of --data_keys. lost: a list that gets a line for each row
or shard that is left out.
"""
import csv
import io
import json
import os
import tarfile
import unicodedata
from collections import namedtuple
from functools import lru_cache

from data.files import DataError, entries_of, name_bytes, read_bytes, warn

UNPACK = {b'\x1f\x8b': 'gunzip', b'BZh': 'bunzip2', b'\xfd7zXZ': 'unxz', b'(\xb5/\xfd': 'unzstd'}
NO_CAPTION = ('nan', 'none', 'null', 'n/a', '<na>', 'undefined')    # as other programs write it
NO_INK = '\u115f\u1160\u3164\uffa0\u2800'       # letters and a symbol that show nothing


# --- texts and captions --------------------------------------------------------------------------
def text_of(raw):
    """Bytes of a text file -> str, with lone surrogates in place of what is not UTF-8."""
    if raw.startswith((b'\xff\xfe', b'\xfe\xff')):          # what Windows calls Unicode
        return raw.decode('utf-16', 'replace')
    return raw.decode('utf-8-sig', 'surrogateescape')


def said(caption):
    """A caption, or None where it says nothing. Raises ValueError if it is no text."""
    if caption is None:
        return None
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise ValueError('its caption is not UTF-8, or has half a character') from None
    seen = any(unicodedata.category(c)[0] in 'LNPS' and c not in NO_INK for c in caption)
    if not seen or caption.strip().lower() in NO_CAPTION:
        return None
    return caption


def caption_of(row, key):
    """The caption at `key` of a row, or of a tar's .json -> str or None. Raises ValueError.

    A list there is a LLaVA conversation [{from, value}, ...] whose first answer is the caption.
    Most stages need images only, so without the default key the caption is None; a key that
    somebody asked for has to be there.
    """
    if not isinstance(row, dict):
        row = {}
    if key not in row and key != 'caption':
        raise ValueError(f'no key {key!r} (the caption of --data_keys, or stage 0\'s '
                         f'--answer_key); the keys there are: {" ".join(row)}')
    value = row.get(key)
    if isinstance(value, list):
        value = first_answer(value)
    if isinstance(value, float) and value != value:         # NaN: pandas found nothing there
        value = None
    if value is not None and not isinstance(value, str):
        raise ValueError(f'the caption at {key!r} is neither a string nor a conversation with a '
                         'gpt turn')
    return said(value)


def first_answer(turns):
    """The first answer of a conversation, or what was given if there is none."""
    for turn in turns:
        if isinstance(turn, dict) and turn.get('from') in ('gpt', 'assistant'):
            return turn.get('value')
    return turns


def load_caption(kind, where, key):
    """A caption that an entry left on the disk -> str or None. Raises OSError, ValueError."""
    text = text_of(read_bytes(*where)).strip()
    if kind == '.txt':
        return said(text)
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f'its .json is not JSON ({error})') from None
    return caption_of(row, key)


# --- tables --------------------------------------------------------------------------------------
Cell = namedtuple('Cell', 'name row column')    # where an image is that lies in a parquet


def list_table(path, keys, lost):
    """A manifest, CSV or parquet -> entries in the file's order. Raises DataError."""
    image_key, caption_key, root, source_key = keys
    entries, errors = [], []
    try:
        for place, row in rows_of(path, (image_key, source_key), caption_key):
            try:
                name, where = image_of(row, image_key, path, root)
                source = None
                if source_key:
                    _, source = image_of(row, source_key, path, root, 'source')
                entries.append((name, where, caption_of(row, caption_key), source))
            except ValueError as error:
                errors.append(f'{path} {place}: {error}')
    except ImportError:
        raise DataError(f'{path}: needs pyarrow, which is not installed (pip install pyarrow)')
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f'{path}: not a readable table, {reason}') from None
    if errors and not entries:
        raise DataError(errors[0])
    if errors:
        warn(f'left out rows that cannot be used: {len(errors)}, the first {errors[0]}', once=True)
    lost += errors
    start = [where[0] for _, where, _, _ in entries[:100]]
    if start and not any(os.path.exists(name_bytes(file)) for file in start):
        raise DataError(f'{path}: its images are not there, for example {start[0]}; is the folder '
                        'of --data_keys right? (img2dataset fetches links)')
    return entries


def rows_of(path, image_keys, caption_key):
    """Rows of a table by its suffix."""
    kind = os.path.splitext(path)[1].lower()
    if kind == '.parquet':
        read_bytes(path, 0, 512)                # a pointer is refused by its name
        return parquet_rows(path, image_keys, caption_key)
    text = text_of(read_bytes(path))
    if kind in ('.csv', '.tsv'):
        return csv_rows(path, text, '\t' if kind == '.tsv' else ',')
    return json_rows(path, text)


def image_of(row, key, path, root, which='image'):
    """A row of the table `path` -> the name and the place of its image. Raises ValueError.

    Paths are relative to the table's folder, or to `root`; with this a leading '/' is dropped.
    """
    lacking = f'no path at {key!r} (the {which} of --data_keys); '
    if not isinstance(row, dict):
        raise ValueError(f'{lacking}it is no object but {row!r:.40}')
    image = row.get(key)
    if which == 'source' and isinstance(image, list) and len(image) == 1:
        [image] = image                         # sets where an edit may have many sources
    if isinstance(image, Cell):
        return f'{os.path.basename(path)}/{image.name}', (path, image.row, image.column)
    if not image or not isinstance(image, str):
        raise ValueError(f'{lacking}the keys there are: {" ".join(row)}')
    if root:
        return image, (os.path.join(root, image.lstrip('/')),)
    return image, (os.path.join(os.path.dirname(path), image),)


def json_rows(path, text):
    """A list, an object of objects, or an object a line, whatever the file's suffix says."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith('['):
            raise DataError(f'{path} line {error.lineno}: not JSON ({error.msg})') from None
        return json_lines(text)
    if isinstance(found, dict) and all(isinstance(value, dict) for value in found.values()):
        found = list(found.values())
    if not isinstance(found, list):
        return [('line 1', found)]
    return [(f'entry {i}', row) for i, row in enumerate(found, 1)]


def json_lines(text):
    """An object a line; a line that is not JSON is a row that cannot be used."""
    for number, line in enumerate(io.StringIO(text), 1):
        line = line.strip()
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = line
        yield f'line {number}', row


def csv_rows(path, text, delimiter):
    """Rows below a header. Strict: an open quote would swallow everything behind it."""
    reader = csv.DictReader(io.StringIO(text, newline=''), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row:                     # an unquoted comma: the caption would be cut
                row = f'{len(row[None])} cells more than the header'
            yield f'line {reader.reader.line_num}', row
    except csv.Error as error:
        raise DataError(f'{path} line {reader.reader.line_num}: not CSV ({error})') from None


@lru_cache(maxsize=8)
def open_parquet(path):
    import pyarrow.parquet
    return pyarrow.parquet.ParquetFile(path)


def parquet_rows(path, image_keys, caption_key):
    """Rows with their images and caption filled in.

    The bytes of images stay where they are: where the column holds these, or {bytes, path} as the
    hub writes images, the row has a `Cell`.
    """
    schema = open_parquet(path).schema_arrow
    empty = dict.fromkeys(schema.names)
    columns = [caption_key] if caption_key in empty else []
    inside = {}
    for key in empty.keys() & set(image_keys):
        kind = str(schema.field(key).type)
        if kind in ('binary', 'large_binary'):
            inside[key] = key
        elif kind.startswith('struct<') and 'bytes: ' in kind:
            inside[key] = f'{key}.bytes'
            columns.append(f'{key}.path')
        elif 'binary' not in kind:              # a list of images, say: not into the memory
            columns.append(key)
    number = 0
    for batch in open_parquet(path).iter_batches(columns=columns):
        for found in batch.to_pylist():
            row = dict(empty, **found)
            for key, column in inside.items():
                name = (row[key] or {}).get('path') or f'{number:06d}'
                row[key] = Cell(name, number, column)
            yield f'row {number}', row
            number += 1


@lru_cache(maxsize=4)
def row_group(path, group, column):
    """One column of some rows, the least that can be read of a parquet."""
    return open_parquet(path).read_row_group(group, columns=[column]).column(0)


def read_cell(path, number, column):
    """-> the bytes of the image in row `number`. Raises OSError, ValueError."""
    metadata = open_parquet(path).metadata
    group = 0
    while number >= metadata.row_group(group).num_rows:
        number -= metadata.row_group(group).num_rows
        group += 1
    value = row_group(path, group, column)[number].as_py()
    if isinstance(value, dict):
        value = value['bytes']
    if value is None:
        raise ValueError('no image in this row')
    return value


# --- tars ----------------------------------------------------------------------------------------
def list_tar(path, keys, lost):
    """One tar in webdataset layout -> entries in the tar's order. Raises DataError.

    x.jpg, x.txt and x.json belong together. The .txt is the caption, unless a caption key was
    asked for: then .json[caption_key]. Only regular files count; links and devices are not looked
    at.
    """
    members = {}
    try:
        start = read_bytes(path, 0, 512)
        for magic, tool in UNPACK.items():
            if start.startswith(magic):
                raise ValueError(f'compressed, so its images cannot be read in place: {tool} -c '
                                 f'{path} > UNCOMPRESSED.tar')
        with tarfile.open(path, 'r:') as tar:
            for member in tar:
                if member.isreg():
                    members[member.name] = (path, member.offset_data, member.size)
        if read_bytes(path, tar.offset, 512) != bytes(512):     # there tarfile just stops
            raise ValueError('no end mark')
    except (tarfile.TarError, OSError, ValueError) as error:
        if not members:
            raise DataError(f'{path}: not a readable tar ({error})') from None
        lost.append(f'{path}: cut or damaged behind its first {len(members)} files ({error})')
        warn(lost[-1], once=True)
    kinds = ('.json', '.txt')
    if keys[1] == 'caption':
        kinds = ('.txt', '.json')
    entries = entries_of(without_parts(members), kinds)
    check_captions(entries[:100], keys[1], path)
    shard = os.path.basename(path)
    return [(f'{shard}/{name}', *place) for name, *place in entries]


def without_parts(members):
    """Leaves out 0.mask.png where there is 0.jpg or 0.txt: a part of that sample, no image."""
    stems = {os.path.splitext(name)[0] for name in members}
    kept = {}
    for name, where in members.items():
        stem = os.path.splitext(name)[0]
        folder, file = os.path.split(stem)
        sample = os.path.join(folder, file.split('.')[0])
        if sample == stem or sample not in stems:
            kept[name] = where
    return kept


def check_captions(entries, key, path):
    """Raises DataError if no caption can be read: a key that is nowhere is no matter of one row."""
    errors = []
    for name, _, caption, _ in entries:
        try:
            if caption:
                load_caption(*caption, key)
                return
        except (OSError, ValueError) as error:
            errors.append(f'{path}, {name}: {error}')
    if errors:
        raise DataError(errors[0])


# --- the hub -------------------------------------------------------------------------------------
def hub_files(source):
    """'hf:owner/name', ':split' or ':config:split' behind it -> its files in the hub's cache.

    What is not there yet is downloaded. The files are used as they are, without a second copy.
    Raises DataError.
    """
    try:
        import datasets
        _, name, *rest = source.split(':')
        *config, split = rest or ['train']
        splits = datasets.load_dataset_builder(name, *config).config.data_files
        if split not in splits:
            raise ValueError(f'no split {split!r}; there are: {" ".join(map(str, splits))}')
        files = datasets.DownloadManager().download(list(splits[split]))
    except ImportError:
        raise DataError(f'{source}: needs the datasets library (pip install datasets)') from None
    except Exception as error:                  # of half a dozen libraries
        raise DataError(f'{source}: {" ".join(str(error).split())}') from None
    lists = [file for file in files if os.path.basename(file).startswith('metadata.')]
    return lists or files                       # the list of an image folder stands for its images
