"""Unified-Bench: its files, its reconstructions, its score by the rules of the official script.

References are DATA/Image/*.jpg; reconstructions of the same names go to out_dir/example_image (seed
k: example_image_k), where the official script finds them. A backbone that does not load, or a
reference without a reconstruction, is refused; the official script leaves them out of the mean.
"""
import glob
import json
import math
import os
import pathlib
import statistics

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data.images import FORMATS, complaint
from lib import ranks
from lib.checkpoint import find_checkpoint, open_uae
from lib.files import write_json
from lib.scores import draw_captions, reconstruct, warn_of_losses
from lib.pictures import save_image
from reward import backbone, clip_reward

BENCH_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tiff', '.webp')    # of the official script
# what the images in an out_dir depend on
CLAIMED = (
    'encoder', 'decoder', 'lora_rank', 'captions', 'resolution', 'caption_prompt', 'caption_len',
    'negative_prompt', 'condition', 'cond_len', 'guidance', 'eval_denoise_steps',
    'temperature', 'dtype', 'seed')


# --- files ---------------------------------------------------------------------------------------
def of_seed(name, k):
    """The name of a file or folder of seed k; the first seed's is plain, as officially."""
    return f'{name}_{k}' if k else name


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


def match_files(items, references, what):
    """[(file name, place)] -> {reference: place}, in the references' order.

    The official script's rules: the same name, else the same stem, else recon_ + stem. Raises
    SystemExit that names the references without a file, or with two.
    """
    by_stem = {}
    for reference in references:
        stem = os.path.splitext(reference)[0]
        by_stem.setdefault(stem, reference)
        by_stem.setdefault(f'recon_{stem}', reference)
    pairs = {}
    for name, place in items:
        stem = os.path.splitext(name)[0]
        reference = name if name in references else by_stem.get(stem)
        if reference is None:
            print(f'warning: {place} belongs to no reference and is left out')
            continue
        first = pairs.setdefault(reference, place)
        if first != place:
            raise SystemExit(f'{place} is a second {what} of {reference}, the first is {first}')
    missing = [reference for reference in references if reference not in pairs]
    if missing:
        shown = ' '.join(missing[:8])
        more = ' ...' if len(missing) > 8 else ''
        raise SystemExit(f'{len(missing)} of {len(references)} references have no {what}, '
                         f'and a mean over the others is no score: {shown}{more}')
    return {reference: pairs[reference] for reference in references}


def read_captions(path, references):
    """A .jsonl of {"image", "caption"} -> {reference: caption}, by the image's file name.

    Raises SystemExit with file and line.
    """
    items, captions, place = [], {}, path
    try:
        with open(path, encoding='utf-8-sig') as f:
            for n, line in enumerate(f, 1):
                place = f'{path} line {n}'
                if not line.strip():
                    continue
                row = json.loads(line)
                name, caption = os.path.basename(row['image']), row['caption']
                if not isinstance(caption, str):
                    raise TypeError(f'a caption of type {type(caption).__name__}')
                items.append((name, place))
                captions[place] = caption
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise SystemExit(f'{place}: expected lines {{"image": "...", "caption": "..."}} '
                         f'({type(e).__name__}: {e})')
    places = match_files(items, references, 'caption')
    return {reference: captions[place] for reference, place in places.items()}


# --- reconstructions -----------------------------------------------------------------------------
def claim_folder(config, run):
    """Notes in out_dir/run.json what its images depend on; refuses those made otherwise."""
    base = os.path.abspath(find_checkpoint(config))
    files = glob.glob(f'{glob.escape(base)}/**/*.safetensors', recursive=True)
    if config.captions:
        files.append(config.captions)
    mine = {key: getattr(config, key) for key in CLAIMED}
    mine.update(data=os.path.abspath(config.data), init_from=base)
    mine.update(written=max(os.path.getmtime(file) for file in files))

    path = pathlib.Path(config.out_dir, 'run.json')
    noted = json.loads(path.read_text()) if path.exists() else {}
    for key, old in noted.items():
        new = mine.get(key)
        if old != new:
            raise SystemExit(f'{config.out_dir} holds images made with {key}={old!r}, '
                             f'this run has {new!r}: give --out_dir=ELSEWHERE')
    ranks.barrier(run)                         # nobody writes before everybody has read
    if run.master:
        write_json(str(path), mine, indent=2)


def rebuild(config, run, references):
    """Draws what out_dir lacks, each rank its share. -> a list of (folder, {reference: caption}).

    One for each seed. references: {name: path}. The captions are those of --captions, or else our
    encoder's.
    """
    given = read_captions(config.captions, references) if config.captions else None
    claim_folder(config, run)
    uae = open_uae(config, run.device)
    names = list(references)
    area = config.resolution ** 2
    if config.own_size:
        area = 0
    mine = range(run.rank, len(names), run.world)
    rebuilt = []
    for k in range(config.seeds):
        folder = of_seed(f'{config.out_dir}/example_image', k)
        notes = of_seed(f'{config.out_dir}/captions', k)
        for i in tqdm(mine, desc=f'seed {k + 1} of {config.seeds}', disable=not run.master):
            name = names[i]
            image_file, note = f'{folder}/{name}', f'{notes}/{name}.json'
            if os.path.exists(image_file) and os.path.exists(note):
                continue
            x = load_picture(references[name], area).to(uae.device)
            seed = (config.seed + k,)
            if given is None:
                texts, _, x_hat = reconstruct(uae, x, [i], config.temperature, seed=seed)
                text = texts[0]
            else:
                text = given[name]
                x_hat = draw_given(uae, text, x, i, seed, name)
            write_json(note, text, indent=2)
            save_image(x_hat[0], image_file)
        ranks.barrier(run)                     # all have drawn
        captions = {}
        for name in names:
            captions[name] = json.loads(pathlib.Path(notes, f'{name}.json').read_text())
        rebuilt.append((folder, captions))
    return rebuilt


def draw_given(uae, text, x, row, seed, name):
    """Draws somebody else's caption of x (1, 3, H, W), the image called `name` -> (1, 3, R, R)."""
    y, mask, lost = uae.encoder.tokens([text])
    warn_of_losses(f'the caption of {name}', lost, uae.config)
    vision = None
    if uae.config.condition != 'text':                # the decoder is shown the image as well
        vision = uae.encoder.see(x)
    return draw_captions(uae, y, mask, [row], vision, seed)


# --- scores --------------------------------------------------------------------------------------
def backbones(config):
    """{name: tower} of the words NAME or NAME=SOURCE in config.backbones.

    Raises SystemExit that names one that cannot be had.
    """
    towers = {}
    for word in config.backbones.split(','):
        name, _, source = word.strip().partition('=')
        if name in towers:
            raise SystemExit(f'--backbones={config.backbones}: {name} comes twice')
        try:
            towers[name] = backbone(name, config, source=source)
        except SystemExit as e:
            raise SystemExit(f'--backbones: {name} cannot be had, '
                             f'and a mean over the others is no score: {e}')
    return towers


def score_folder(folder, references, towers, device):
    """-> (`unified_score` of the reconstructions in a folder, {reference: its reconstruction})."""
    files = image_files(folder)
    pairs = match_files(files, references, 'reconstruction')
    scores = {}
    for name in towers:
        scores[name] = {file: None for file, _ in files}
    for reference, path in tqdm(pairs.items(), desc='score'):
        x = load_picture(references[reference]).to(device)
        x_hat = load_picture(path).to(device)
        for name, tower in towers.items():
            scores[name][os.path.basename(path)] = clip_reward(x, x_hat, tower).item()
    return unified_score(scores), pairs


def unified_score(scores):
    """{backbone: {file: cosine, or None for a file without a reference}} -> the official JSON.

    Key for key as the official script writes it. `overall_average` is the plain mean of the
    backbones' means, whatever their files.
    """
    statistics_by_model, means = {}, {}
    for name, found in scores.items():
        valid = [score for score in found.values() if score is not None]
        means[name] = sum(valid) / len(valid)
        statistics_by_model[name] = dict(
            total_images=len(found), valid_pairs=len(valid), average_similarity=means[name],
            min_similarity=min(valid), max_similarity=max(valid))
    best = max(means, key=means.get)
    worst = min(means, key=means.get)
    summary = dict(
        models_used=list(means), average_scores_by_model=means,
        overall_average=sum(means.values()) / len(means),
        best_model=(best, means[best]), worst_model=(worst, means[worst]))
    return dict(model_types=list(scores), similarities_by_model=scores,
                statistics_by_model=statistics_by_model, summary=summary)


def over_seeds(results):
    """Results of unified_score, one a seed -> ({backbone: mean}, {backbone: standard error}).

    Both have 'overall' as well; the second is empty for one seed.
    """
    columns = {}
    for result in results:
        summary = result['summary']
        row = dict(summary['average_scores_by_model'], overall=summary['overall_average'])
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    means, errors = {}, {}
    for name, values in columns.items():
        means[name] = statistics.mean(values)
        if len(values) > 1:
            errors[name] = statistics.stdev(values) / math.sqrt(len(values))
    return means, errors
