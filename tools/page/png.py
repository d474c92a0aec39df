"""Watched images as each of several runs left them: one sheet, a row a scene, a column a run."""
import os

from PIL import Image, ImageDraw

from tools.page.gif import (INK, LINE_HEIGHT, LINES, PAPER, SOFT, STRONG, TEXT, load,
                            write_caption)
from tools.page.runs import number, read_runs, scenes_of, stops_of

SCENES = 4
SIDE = 128                     # of an image, in pixels
TEXT_HEIGHT = 38 + LINES * LINE_HEIGHT      # below it, and a gap to the next row
COLUMN, MARGIN, HEAD = 180, 16, 44


def last_stops(runs, stops):
    """{run's number: its last stop that has pictures}."""
    found = {}
    for stop in stops:
        if stop.step in runs[stop.run].samples:
            found[stop.run] = stop
    return found


def draw_row(image, scene, ends, top):
    """The source, then for each run its drawing, caption and judge."""
    draw = ImageDraw.Draw(image)
    image.paste(load(scene.source, SIDE), (MARGIN, top))
    for column, stop in enumerate(ends, start=1):
        sample = scene.at.get(stop.index)
        if not sample:
            continue
        left = MARGIN + column * COLUMN
        image.paste(load(sample['image'], SIDE), (left, top))
        judge = number(sample.get('judge'))
        draw.text((left, top + SIDE + 4), f'judge {judge}', SOFT, TEXT)
        caption = str(sample.get('caption', ''))
        write_caption(draw, caption, None, left, top + SIDE + 22, COLUMN - 12)


def write_png(folders, path):
    """Writes the sheet of some runs; folders as `find_runs` takes them.

    Raises SystemExit in one line where no image was watched.
    """
    runs = read_runs(folders)
    stops = stops_of(runs)
    scenes = scenes_of(runs, stops)[:SCENES]
    if not scenes:
        raise SystemExit(f'{" ".join(folders)}: no watched images here (key watch)')
    ends = last_stops(runs, stops)
    width = 2 * MARGIN + (1 + len(ends)) * COLUMN
    image = Image.new('RGB', (width, HEAD + len(scenes) * (SIDE + TEXT_HEIGHT)), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, 18), 'source', INK, STRONG)
    for column, place in enumerate(ends, start=1):
        draw.text((MARGIN + column * COLUMN, 18), runs[place].name, INK, STRONG)
    for row, scene in enumerate(scenes):
        draw_row(image, scene, ends.values(), HEAD + row * (SIDE + TEXT_HEIGHT))
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    image.save(path)
