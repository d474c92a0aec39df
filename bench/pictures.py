"""Images as the benchmarks read them and as a judge gets them; what was found about each."""
import io
import json
import os

from PIL import Image, ImageOps

from lib.files import write_atomic, write_lines

JPEG_QUALITY = 75              # of an image that is coded for a judge, as officially
FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'GIF')
PNG, JPEG = b'\x89PNG', b'\xff\xd8'


class Unusable(Exception):
    """One image or answer that cannot be scored: what and why."""


# --- images --------------------------------------------------------------------------------------
def open_image(path, size=None):
    """An image file -> RGB image.

    Raises Unusable if it is missing, damaged, or not of the expected (width, height).
    """
    if not os.path.exists(path):
        raise Unusable(f'{path}: missing')
    try:
        with Image.open(path, formats=FORMATS) as file:
            image = ImageOps.exif_transpose(file).convert('RGB')
    except Exception as e:                   # on damaged bytes the decoders raise nearly anything
        raise Unusable(f'{path}: cannot be read: {type(e).__name__}')
    if size and image.size != size:
        raise Unusable(
            f'{path}: {image.width}x{image.height}, expected {size[0]}x{size[1]} '
            'at --resolution and --samples')
    return image


def jpeg(image):
    """An image as the bytes of a JPEG file."""
    file = io.BytesIO()
    image.save(file, 'jpeg', quality=JPEG_QUALITY)
    return file.getvalue()


def file_bytes(path):
    """A PNG or JPEG file as it is, and of another image a PNG. Raises Unusable."""
    image = open_image(path)
    with open(path, 'rb') as f:
        raw = f.read()
    if raw.startswith(PNG) or raw.startswith(JPEG):
        return raw
    file = io.BytesIO()
    image.save(file, 'png')
    return file.getvalue()


# --- results -------------------------------------------------------------------------------------
def write_results(folder, records, faults):
    """Writes folder/results.jsonl. There is no score over fewer images than asked: where one is at
    fault the run ends in one line.
    """
    path = f'{folder}/results.jsonl'
    lines = [json.dumps(record) + '\n' for record in records]
    write_atomic(path, lambda tmp: write_lines(tmp, lines))
    if faults:
        asked = len(faults) + len(records)
        raise SystemExit(f'{len(faults)} of {asked} cannot be scored, so there is no score; '
                         f'first: {faults[0]}; the others are in {path}')
