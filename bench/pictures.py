"""Prompts as every checkpoint drew them, side by side: out_dir/BENCH/prompts.png."""
import os
import textwrap

from PIL import Image, ImageDraw

from bench.prompts import item_files

SIDE = 112                     # pixels of an image on the sheet
LABEL = 250                    # and of the prompt beside its row
HEAD = 24
ROWS = 6


def first_of_kinds(items):
    """The first prompt of each of GenEval's tags, or simply the first prompts."""
    chosen = {}
    for item in items:
        tag = (item.get('meta') or {}).get('tag', item['id'])
        chosen.setdefault(tag, item)
    return list(chosen.values())[:ROWS]


def prompt_sheet(items, configs):
    """A row per prompt, a column per checkpoint: the first image of each -> a Pillow image.

    configs: each checkpoint's, with its name and its folder `images`.
    """
    items = first_of_kinds(items)
    size = LABEL + len(configs) * (SIDE + 8), HEAD + len(items) * (SIDE + 8)
    page = Image.new('RGB', size, 'white')
    draw = ImageDraw.Draw(page)
    for column, config in enumerate(configs):
        left = LABEL + column * (SIDE + 8)
        draw.text((left, 6), config.name, fill='black', font_size=12)
        for row, item in enumerate(items):
            top = HEAD + row * (SIDE + 8)
            lines = textwrap.wrap(item['prompt'], 38, max_lines=6, placeholder=' ...')
            draw.text((8, top + 8), '\n'.join(lines), fill='black', font_size=12)
            path = item_files(config, item)[0]
            if os.path.exists(path):
                with Image.open(path) as image:
                    shown = image.convert('RGB').resize((SIDE, SIDE), Image.Resampling.NEAREST)
                page.paste(shown, (left, top))
    return page
