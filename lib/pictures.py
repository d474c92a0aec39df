"""Images as files to look at: one alone, or many beside each other with their texts.

For evaluations, samples and the report; a training stage needs none of it.
"""
import os
import textwrap

from PIL import Image, ImageDraw, ImageOps

from lib.files import write_atomic
from lib.watch import picture

SHOWN = 160                    # pixels of a picture's side on a sheet
GAP, LINE, LETTER = 8, 14, 6   # in pixels: between pictures, and of the text


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
