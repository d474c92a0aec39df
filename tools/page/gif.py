"""Watched images over all stages as a moving picture: source, reconstruction and caption.

One frame for each stop, as wide as a README shows it. Words that are new since the frame before
have the accent colour, and a curve of the reward runs along.
"""
import os

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from tools.page.curves import Axis, lines_of, scale
from tools.page.runs import finite, number, read_runs, scenes_of, stops_of, thinned
from tools.page.words import SEPARATORS, new_words

SCENES = 8
MOST_FRAMES = 30
SECONDS = 12.0
HOLD = 2.5                     # seconds of them for the last frame
MOST_BYTES = 1_500_000
COLOURS = (256, 128, 64, 32)   # of the palette: the first that keeps the file small enough
WIDTH, MARGIN, HEAD = 800, 20, 100
COLUMNS, SPACE = 4, 18         # scenes in a row, and the pixels between them
INSIDE = 6                     # pixels between a source and its reconstruction
LINES, LINE_HEIGHT = 7, 16     # of a caption
CURVE_WIDTH, CURVE_HEIGHT, FINE = 330, 52, 4       # the curve is drawn FINE times as large
PAPER, INK, SOFT, RULE = '#fbfaf7', '#22262b', '#646a72', '#d9d5cc'
ACCENT = '#0b7a75'
FONTS = os.path.join(matplotlib.get_data_path(), 'fonts', 'ttf')


def font(size, bold=False):
    name = 'DejaVuSans.ttf'
    if bold:
        name = 'DejaVuSans-Bold.ttf'
    return ImageFont.truetype(os.path.join(FONTS, name), size)


TEXT, STRONG, TITLE, SMALL = font(13), font(13, True), font(21, True), font(14)


# --- pieces --------------------------------------------------------------------------------------
def load(path, side):
    """An image file as a square of `side` pixels; a gray one if it cannot be read."""
    try:
        with Image.open(path) as image:
            image = image.convert('RGB')
    except (OSError, ValueError):
        return Image.new('RGB', (side, side), RULE)
    method = Image.Resampling.LANCZOS
    if max(image.size) < side:
        method = Image.Resampling.NEAREST
    return image.resize((side, side), method)


def write_caption(draw, caption, before, left, top, width):
    """A caption in lines of a width; words that `before` did not have in the accent colour."""
    words = caption.split()
    new = set()
    if before is not None:
        new = new_words(words, before.split())
    x, line, space = 0, 0, TEXT.getlength(' ')
    for place, word in enumerate(words):
        colour, face = INK, TEXT
        if place in new:
            colour, face = ACCENT, STRONG
        if word in SEPARATORS:
            x -= space
        length = face.getlength(word)
        if x and x + length > width and word not in SEPARATORS:
            if line == LINES - 1:
                draw.text((left + x, top + line * LINE_HEIGHT), '…', INK, TEXT)
                return
            x, line = 0, line + 1
        draw.text((left + x, top + line * LINE_HEIGHT), word, colour, face)
        x += length + space


def draw_curve(runs, stops, now):
    """The reward over all runs, up to the stop `now` in the accent colour."""
    width, height = CURVE_WIDTH * FINE, CURVE_HEIGHT * FINE
    image = Image.new('RGB', (width, height), PAPER)
    lines = lines_of(runs, stops, 'reward')
    if not lines:
        return image.resize((CURVE_WIDTH, CURVE_HEIGHT))
    low, high = scale([value for points in lines for _, _, value in points], None, None)
    axis = Axis(stops, 6 * FINE, width - 6 * FINE, 10 * FINE)
    draw = ImageDraw.Draw(image)

    def place(run, step, value):
        share = (value - low) / (high - low)
        return axis(run, step), height * (0.88 - 0.76 * share)

    for points in lines:
        past = [point for point in points if point[:2] <= (now.run, now.step)]
        draw.line([place(*point) for point in points], RULE, 2 * FINE, 'curve')
        if len(past) > 1:
            draw.line([place(*point) for point in past], ACCENT, 3 * FINE, 'curve')
    for run, (start, end) in axis.ends.items():
        shade = RULE
        if run == now.run:
            shade = ACCENT
        draw.line([(start, height - FINE), (end, height - FINE)], shade, 2 * FINE)
    value = runs[now.run].evals.get(now.step, {}).get('reward')
    if finite(value):
        draw.circle(place(now.run, now.step, value), 5 * FINE, ACCENT)
    return image.resize((CURVE_WIDTH, CURVE_HEIGHT), Image.Resampling.LANCZOS)


# --- frames --------------------------------------------------------------------------------------
def draw_head(image, runs, stops, now):
    """Stage, update and reward, and the curve beside them."""
    draw = ImageDraw.Draw(image)
    run = runs[now.run]
    draw.text((MARGIN, 14), run.name, INK, TITLE)
    reward = number(run.evals.get(now.step, {}).get('reward'))
    draw.text((MARGIN, 45), f'update {now.step} · reward {reward}', SOFT, SMALL)
    draw.text((MARGIN, 66), 'left: source, right: drawn from the caption alone', SOFT, SMALL)
    image.paste(draw_curve(runs, stops, now), (WIDTH - MARGIN - CURVE_WIDTH, 18))


def draw_scene(image, scene, now, before, left, top, width):
    """Source, reconstruction and caption of one scene."""
    side = (width - INSIDE) // 2
    image.paste(load(scene.source, side), (left, top))
    sample = scene.at.get(now.index)
    if not sample:
        return
    image.paste(load(sample['image'], side), (left + side + INSIDE, top))
    caption_top = top + side + 5
    caption = str(sample.get('caption', ''))
    write_caption(ImageDraw.Draw(image), caption, before, left, caption_top, width)


def draw_frame(runs, stops, scenes, now, last):
    """One frame; `last` is the stop of the frame before, or None."""
    width = (WIDTH - 2 * MARGIN - (COLUMNS - 1) * SPACE) // COLUMNS
    height = width // 2 + LINES * LINE_HEIGHT + 16
    rows = -(-len(scenes) // COLUMNS)
    image = Image.new('RGB', (WIDTH, HEAD + rows * height + 6), PAPER)
    draw_head(image, runs, stops, now)
    for place, scene in enumerate(scenes):
        row, column = divmod(place, COLUMNS)
        before = None
        if last and last.index in scene.at:
            before = str(scene.at[last.index].get('caption', ''))
        left = MARGIN + column * (width + SPACE)
        draw_scene(image, scene, now, before, left, HEAD + row * height, width)
    return image


def save(frames, path, colours):
    """Writes the frames on one palette, so that only what changes is stored."""
    middle = len(frames) // 2
    typical = [frames[0], frames[middle], frames[-1]]
    height = frames[0].height
    sheet = Image.new('RGB', (WIDTH, height * len(typical)))
    for place, frame in enumerate(typical):
        sheet.paste(frame, (0, place * height))
    palette = sheet.quantize(colours, kmeans=3)     # without it rare colours get lost
    flat = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    each = 1000 * (SECONDS - HOLD) / max(1, len(frames) - 1)
    durations = [each] * (len(frames) - 1) + [1000 * HOLD]
    flat[0].save(path, save_all=True, append_images=flat[1:], duration=durations, loop=0)


def write_gif(folders, path):
    """Writes the moving picture of some runs, at most MOST_BYTES; folders as `find_runs` takes.

    Raises SystemExit in one line where no image was watched.
    """
    runs = read_runs(folders)
    stops = stops_of(runs)
    scenes = scenes_of(runs, stops)[:SCENES]
    if not scenes:
        raise SystemExit(f'{" ".join(folders)}: no watched images here (key watch)')
    watched = [stop for stop in stops if stop.step in runs[stop.run].samples]
    frames, last = [], None
    for stop in thinned(watched, MOST_FRAMES):
        frames.append(draw_frame(runs, stops, scenes, stop, last))
        last = stop
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    for colours in COLOURS:
        save(frames, path, colours)
        if os.path.getsize(path) <= MOST_BYTES:
            return
