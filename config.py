"""The keys that every script shares, their presets and bounds, and the command line.

A script adds its own keys to `shared`; the two dicts together are the whole configuration, and
`--help` prints their source, so the comments are the manual. Values come from, later wins:
`shared`, the script's `keys`, the preset (`--preset=tiny|medium|paper|release`), `--key=value`.
"""
import argparse
import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys

# --- shared keys ---------------------------------------------------------------------------------
shared = dict(
    # models: hub ids, or local folders in the library's own format (docs/exchange.md: which)
    encoder = 'data/shapes/base/encoder',      # of transformers, with its processor
    decoder = 'data/shapes/base/decoder',      # of diffusers: transformer/ vae/ scheduler/
    clip = 'local-dir:data/shapes/base/clip',  # open_clip name:weights, or local-dir:FOLDER
    judge = 'data/shapes/base/judge',          # image tower that only evaluation sees; '' = none
    init_from = '',            # checkpoint of an earlier stage, or uae:DIR (the authors' release);
                               # '' = the shipped base (tiny only)
    out_dir = '',              # '' = out/<script name>
    data = 'shapes',           # 'shapes', or a folder / manifest / tar shards (data/README.md)
    data_keys = ('image', 'caption', '', ''),   # a manifest's fields of image and caption, the
                               # folder its paths start at, its field of an edit's source (stage 0)
    held_out = '',             # data for evaluation; '' = the last eval_images of data, kept apart
    # what the models are asked
    resolution = 32,           # images are resized and centre-cropped to this square
    caption_prompt = 'describe the image',  # user turn: this text, then the image
    negative_prompt = 'random image',       # unconditional branch of classifier-free guidance
    condition = 'text',        # text | answer | image | text+image: see model.UAE.condition
    cond_len = 28,             # tokens that every condition is padded to: SD3 has no text mask;
                               # 0 (evaluation only) = to the longest row drawn together
    caption_len = 24,          # T, most tokens of a sampled caption, its end token included
    guidance = 1.0,            # classifier-free guidance scale; 1 = off and costs nothing
    denoise_steps = 8,         # S, denoising steps of a training rollout; tiny stages have fewer
    # evaluation: on held-out images, greedy captions, ODE sampling, fixed noise
    reward = 'clip',           # NAME of reward.BACKBONES or FILE.py:FUNCTION, or a weighted sum:
                               # clip:0.7,dinov2:0.3. `ocr` reads text: clip:0.7,ocr:0.3
    eval_denoise_steps = 8,
    eval_images = 64,          # held-out images
    eval_every = 20,           # updates between evaluations, 0 = never
    # run
    seed = 1337,
    device = '',               # '' = cuda if there is one, else cpu
    save_every = 0,            # updates between checkpoints; 0 = only at the end
    tracker = '',              # wandb:PROJECT or tensorboard; '' = nothing is imported
    # full size: what a tiny run need not know
    lora_rank = 0,             # 0 = full fine-tuning; > 0 = LoRA of this rank (alpha = 2 rank)
    dtype = 'float32',         # of frozen weights and matrix work; the SDE is always float32
    micro_batch = 0,           # rows of a forward and backward pass on a rank, 0 = all
    checkpointing = False,     # recompute activations: less memory, 30 % more time
)
presets = dict(tiny={})
presets['medium'] = dict(
    encoder='Qwen/Qwen2.5-VL-3B-Instruct', decoder='stabilityai/stable-diffusion-3.5-medium',
    clip='ViT-L-14-quickgelu:openai', judge='facebook/dinov2-large', data='', resolution=512,
    cond_len=512, caption_len=384, denoise_steps=10, eval_denoise_steps=40, save_every=20,
    lora_rank=32, micro_batch=1, checkpointing=True, dtype='bfloat16',
    # guidance stays 1, not the paper's 5: half the time of a rollout, for one card
    caption_prompt=(                                            # the authors' own, spaces and all
        'You are an expert vision-language model.  \n'
        'Your task is: Given an input image, generate a **textual description** of the image. '
        'If there is text in the image, transcribe it inside double quotes "".  \n'
        'Now, carefully analyze the input image and output the full description. '),
    negative_prompt='Generate a random, low quality, ugly, blur, bad and anime, cartoon image.')
presets['paper'] = dict(
    presets['medium'], decoder='stabilityai/stable-diffusion-3.5-large', guidance=5.0,
    micro_batch=2)
presets['release'] = dict(                                      # as the authors' demo runs theirs
    presets['paper'], resolution=1024, cond_len=0, caption_len=513, eval_denoise_steps=40,
    micro_batch=1)
# what a value may be: one of some words, or a number from the least to the most. A number of which
# nothing is said, here or in a script's own `limits`, is not negative
limits = dict(
    condition=('text', 'answer', 'image', 'text+image'), dtype=('float32', 'bfloat16'),
    resolution=(8, 4096), cond_len=(0, 8192), caption_len=(2, 8192), guidance=(1e-3, 100),
    denoise_steps=(1, 1000), eval_denoise_steps=(1, 1000), eval_images=(1, 1e6))
NOT_NEGATIVE = (0, 1e9)
# -------------------------------------------------------------------------------------------------
# keys of before, and where their meaning went
RENAMED = dict(
    prompts='batch', updates='epochs', sample_steps='denoise_steps',
    eval_steps='eval_denoise_steps', sde_window='noisy_steps', train_steps='trained_steps',
    wandb='--tracker=wandb:PROJECT', tensorboard='--tracker=tensorboard',
    eval_temperature='temperature, of eval_unified.py and sample.py',
    text_encoder='a key of grpo_encoder.py alone, whose checkpoints bring their own',
    old_logp='decided by dtype: replayed in bfloat16',
    caption_temperature='0, a constant', cold_temperature='0, a constant',
    grad_clip='a constant, lib/optimiser.GRAD_CLIP', patience='a constant, lib/optimiser.PATIENCE',
    watch='a constant, lib/watch.WATCHED', caption_batch='a constant, encoder.CAPTIONS_AT_ONCE',
    batch='a constant, lib/scores.images_at_once', eval_batch='a constant, '
    'lib/scores.images_at_once')


class ConfigError(SystemExit):
    """A command line that cannot be understood; one line says what, and what would be right."""


def fit(old, new):
    """`new` in the type of `old`, None if it does not fit.

    An int may stand for a float. A tuple has as many members as the default, or less where those
    that are left off at its end are ''.
    """
    if isinstance(old, tuple):
        if not isinstance(new, tuple):
            return None
        new += tuple(member for member in old[len(new):] if member == '')
        if len(new) != len(old):
            return None
        members = tuple(map(fit, old, new))
        return None if None in members else members
    if isinstance(old, float) and type(new) is int:
        return float(new)
    if type(new) is type(old):
        return new
    return None


def literal(key, old, text):
    """The value of `text` in the type of the default `old`."""
    value = text
    if not isinstance(old, str):
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError, TypeError):         # TypeError: '{[]: 1}'
            pass
    value = fit(old, value)
    if value is None:
        raise ConfigError(f'--{key}: expected {type(old).__name__}, for example {old!r}, '
                          f'got {text!r}')
    return value


def check(values, limits):
    """Refuses a value out of its limits, a tracker or an out_dir that cannot be."""
    for key, value in values.items():
        limit = limits.get(key, NOT_NEGATIVE)
        if isinstance(limit[0], str):
            if value not in limit:
                raise ConfigError(f'--{key}: expected one of {" ".join(limit)}, got {value!r}')
            continue
        least, most = limit
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if isinstance(number, (int, float)) and not least <= number <= most:
                raise ConfigError(f'--{key}: expected {least} to {most:g}, got {number}')
    if not values['cond_len'] and ('lr' in values or values['condition'] == 'text+image'):
        raise ConfigError('--cond_len=0: conditions of many lengths cannot be trained on or '
                          'joined, it is for the evaluation of released weights')
    kind, _, project = values['tracker'].partition(':')
    if kind not in ('', 'wandb', 'tensorboard') or (kind == 'wandb' and not project):
        raise ConfigError(f'--tracker={values["tracker"]}: expected wandb:PROJECT or tensorboard')
    if kind and not importlib.util.find_spec(kind):
        raise ConfigError(f'--tracker={values["tracker"]}: there is no {kind} here; '
                          f'pip install {kind}')
    folder = values['out_dir']
    while folder and not os.path.isdir(folder):
        if os.path.exists(folder):
            raise ConfigError(f'--out_dir={values["out_dir"]}: {folder} is a file, expected a '
                              'folder')
        folder = os.path.dirname(folder)


def parse(keys, own_presets, argv, script, own_limits=None):
    """Configuration of one run.

    keys: the script's own dict of defaults. own_presets: {preset: differences of own keys}. argv:
    '--key=value', or the bare '--resume', '--plan', '--help'. script: its path, for --help and
    out_dir. own_limits: as `limits`. Returns a namespace with every key plus preset, resume,
    script (its name) and changed (the keys that differ from a plain command's). Raises ConfigError
    in one line.
    """
    values = {**shared, **keys}
    assert len(values) == len(shared) + len(keys), 'a script key hides a shared one'
    defaults = {**values, **own_presets.get('tiny', {})}
    stem = os.path.basename(str(script)).removesuffix('.py')
    if '--help' in argv or '-h' in argv:
        print_help(script)
        raise SystemExit(0)
    if '--plan' in argv:
        raise SystemExit(plan(stem, argv))
    given, flags = read(argv, values)
    values.update(presets[flags['preset']])
    values.update(own_presets.get(flags['preset'], {}))
    values.update(given)
    changed = {key: value for key, value in values.items() if value != defaults[key]}
    values['out_dir'] = values['out_dir'] or f'out/{stem}'
    check(values, {**limits, **(own_limits or {})})
    return argparse.Namespace(**values, **flags, script=stem, changed=changed)


def read(argv, values):
    """Arguments -> {key: value} of the keys that are given, and the flags preset and resume."""
    given = {}
    flags = dict(preset='tiny', resume=False)
    for option in argv:
        if option == '--resume':
            flags['resume'] = True
            continue
        match = re.fullmatch(r'--([A-Za-z_]\w*)=(.*)', option, re.S)
        if not match:
            raise ConfigError(f'expected --key=value, --resume, --plan or --help, got {option!r}')
        key, text = match.groups()
        if key == 'preset':
            flags['preset'] = text
        elif key in values:
            given[key] = literal(key, values[key], text)
        elif key in RENAMED:
            raise ConfigError(f'there is no key {key!r} any more, it is now {RENAMED[key]}')
        else:
            raise ConfigError(f'unknown key {key!r}; the keys are: preset {" ".join(values)}')
    if flags['preset'] not in presets:
        raise ConfigError(f'unknown preset {flags["preset"]!r}; the presets are: '
                          f'{" ".join(presets)}')
    return given, flags


def plan(stem, argv):
    """--plan: what this command would need, by tools/plan.py in a process of its own."""
    tool = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'tools', 'plan.py')
    arguments = [argument for argument in argv if argument != '--plan']
    return subprocess.run([sys.executable, tool, stem, *arguments]).returncode


def print_help(script):
    """The script's docstring and the commented source of its keys, then the shared ones."""
    with open(script, encoding='utf-8') as f:
        text = f.read()
    print(ast.get_docstring(ast.parse(text)), '\n')
    for source in (text, inspect.getsource(sys.modules[__name__])):
        block = re.search(r'^# --- \w+ keys -*\n(.*?)^# -+$', source, re.S | re.M)
        if block:
            print(block.group(0))
