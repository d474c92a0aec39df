"""Images inside the page, and the drawing of the loop with two of them."""
import base64
import io
from html import escape

from PIL import Image

SMALL = 64                     # pixels: images up to this size stay as they are, square by square
LARGE = 256                    # pixels: larger ones are made as small as this
LOOP_PLACES = dict(            # left and top of the two images in the drawings of the loop
    x=dict(wide=(26, 22), narrow=(38, 26)),
    x_hat=dict(wide=(744, 22), narrow=(38, 272)))


def encoded(image, content):
    """An opened image and its file's content -> (kind, content) as the page has it."""
    if image.format == 'PNG' and max(image.size) <= SMALL:
        return 'png', content
    image = image.convert('RGB')
    image.thumbnail((LARGE, LARGE))
    buffer = io.BytesIO()
    image.save(buffer, 'webp', quality=80)
    return 'webp', buffer.getvalue()


def data_uri(path):
    """An image file -> (its content as a URI, width, height); None if it cannot be read."""
    try:
        with open(path, 'rb') as f:
            content = f.read()
        image = Image.open(io.BytesIO(content))
        kind, content = encoded(image, content)
        width, height = Image.open(io.BytesIO(content)).size
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    text = base64.b64encode(content).decode()
    return f'data:image/{kind};base64,{text}', width, height


def picture(path, alt):
    """An <img> with the image inside it, or a box that says that there is none."""
    found = data_uri(path)
    if not found:
        return '<span class="picture missing">no image</span>'
    uri, width, height = found
    style = 'picture'
    if max(width, height) <= SMALL:
        style = 'picture pixels'
    return (f'<img class="{style}" width="{width}" height="{height}" alt="{escape(alt)}" '
            f'src="{uri}">')


def loop_images(scenes):
    """{name in the template: <image>}: the first watched image stands for x in the loop."""
    values = {}
    for name, places in LOOP_PLACES.items():
        for size in places:
            values[f'{name}_{size}'] = ''
    if not scenes:
        return values
    scene = scenes[0]
    last = scene.at[max(scene.at)]
    for name, path in (('x', scene.source), ('x_hat', last['image'])):
        found = data_uri(path)
        if not found:
            continue
        for size, (left, top) in LOOP_PLACES[name].items():
            values[f'{name}_{size}'] = (
                f'<image href="{found[0]}" x="{left}" y="{top}" width="80" height="80"/>')
    return values
