"""The keys that every script shares, their presets and bounds, and the command line.

A script adds its own keys to `shared`; the two dicts together are the whole configuration, and
`--help` prints their source, so the comments are the manual. Values come from, later wins:
`shared`, the script's `keys`, the preset (`--preset=tiny|medium|paper|release`), `--key=value`.
"""
import argparse
import ast
import inspect
import math
import os
import re
import sys

# --- shared keys ---------------------------------------------------------------------------------
shared = dict(
    # models: hub ids, or local folders in the library's own format
    encoder = 'data/shapes/base/encoder',      # Qwen2_5_VLForConditionalGeneration + processor
    decoder = 'data/shapes/base/decoder',      # transformer/ vae/ scheduler/ of diffusers
    clip = 'local-dir:data/shapes/base/clip',  # open_clip name:weights, or local-dir:FOLDER
    judge = 'data/shapes/base/judge',          # image tower that only evaluation sees
    init_from = '',            # checkpoint of an earlier stage, or uae:DIR (the authors' release);
                               # '' = the shipped base (tiny only)
    out_dir = '',              # '' = out/<script name>
    data = 'shapes',           # 'shapes', or a folder / manifest / tar shards (data/README.md)
    data_keys = ('image', 'caption', ''),   # a manifest's fields, and the folder its paths start at
    held_out = '',             # data for evaluation; '' = the last eval_images of data, kept apart
    # what the models are asked
    resolution = 32,           # images are resized and centre-cropped to this square
    caption_prompt = 'describe the image',  # user turn: this text, then the image
    negative_prompt = 'random image',       # unconditional branch of classifier-free guidance
    condition = 'text',        # text | answer | image | text+image: see model.UAE.condition
    text_encoder = '',         # what re-encodes captions: live, the captioner itself | start, the
                               # language model as stage 2 found it; '' = as the checkpoint has it
    cond_len = 28,             # tokens that every condition is padded to: SD3 has no text mask;
                               # 0 (evaluation only) = no further than the rows drawn together
    caption_len = 24,          # T, most tokens of a sampled caption, its end token included
    guidance = 1.0,            # classifier-free guidance scale; 1 = off and costs nothing
    sample_steps = 8,          # S, denoising steps of a rollout
    # evaluation: on held-out images, ODE sampling, fixed noise
    reward = 'clip',           # a name of reward.BACKBONES, or a weighted sum: clip:0.7,dinov2:0.3
    eval_steps = 8,            # denoising steps
    eval_images = 64,          # held-out images
    eval_every = 20,           # updates between evaluations, 0 = never
    eval_temperature = 0.0,    # of the captions; 0 = greedy, 0.7 for the paper's Unified-Bench
    watch = 8,                 # held-out images whose pictures each evaluation keeps, 0 = none
    # run
    seed = 1337,
    device = '',               # '' = cuda if there is one, else cpu
    save_every = 0,            # updates between checkpoints; 0 = only at the end
    wandb = '',                # project name; '' = nothing is imported
    tensorboard = False,       # curves and pictures in out_dir/tensorboard
    # full size: what a tiny run need not know
    lora_rank = 0,             # 0 = full fine-tuning; > 0 = LoRA of this rank (alpha = 2 rank)
    dtype = 'float32',         # of frozen weights and matrix work; the SDE is always float32
    micro_batch = 0,           # samples per forward and backward pass on a rank, 0 = all
    eval_batch = 64,           # held-out images at a time on a rank
    checkpointing = False,     # recompute activations: less memory, 30 % more time
    old_logp = '',             # of stages 2 and 3: recorded while sampling | replay: the first
                               # update's own, ratio 1; '' = replay in bfloat16, else recorded
)
presets = dict(tiny={})
presets['medium'] = dict(
    encoder='Qwen/Qwen2.5-VL-3B-Instruct', decoder='stabilityai/stable-diffusion-3.5-medium',
    clip='ViT-L-14-quickgelu:openai', judge='facebook/dinov2-large', data='', resolution=512,
    cond_len=512, caption_len=384, sample_steps=10, eval_steps=40, eval_batch=4, save_every=20,
    lora_rank=32, micro_batch=1, checkpointing=True, dtype='bfloat16',
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
    presets['paper'], resolution=1024, cond_len=0, caption_len=513, eval_steps=40, eval_batch=1,
    eval_temperature=0.7, micro_batch=1)
choices = dict(
    condition=('text', 'answer', 'image', 'text+image'), dtype=('float32', 'bfloat16'),
    text_encoder=('', 'live', 'start'), sde=('flow', 'cps', 'cps_exact'),
    old_logp=('', 'recorded', 'replay'),
    loss_mean=('token', 'caption', 'constant'))
# the least and the most that a number may be, of every script's keys
bounds = dict(
    resolution=(8, 4096), cond_len=(0, 8192), caption_len=(2, 8192), guidance=(1e-3, 100),
    sample_steps=(1, 1000), eval_steps=(1, 1000), eval_images=(1, 10 ** 6), eval_batch=(1, 10 ** 6),
    eval_every=(0, 10 ** 9), eval_temperature=(0, 10), watch=(0, 10 ** 4), lora_rank=(0, 4096),
    micro_batch=(0, 10 ** 6), seed=(0, 2 ** 31), save_every=(0, 10 ** 9), steps=(0, 10 ** 9),
    prompts=(1, 10 ** 6), group=(2, 10 ** 4), batch=(1, 10 ** 6), caption_batch=(0, 10 ** 6),
    temperature=(0.01, 10), cold_temperature=(0, 10), caption_temperature=(0, 10),
    clip_range=(0, math.inf), kl=(0, 1e6), updates=(1, 1000), lr=(0, 1),
    grad_clip=(1e-12, math.inf), patience=(1, 10 ** 9), warmup=(0, 10 ** 9), lr_decay=(0, 1e6),
    grad_steps=(1, 1000), noise_level=(0.01, 10), sde_window=(1, 1000), train_steps=(1, 1000),
    sigma_mean=(-100, 100), sigma_std=(0, 100), drop=(0, 0.999), ema=(0, 1 - 1e-9),
    caption_every=(1, 10 ** 9), lambda_t2i=(0, 1e6), see_resolution=(0, 4096), layers=(0, 1000),
    scenes=(1, 10 ** 6), vae_steps=(1, 10 ** 9), clip_steps=(1, 10 ** 9), judge_steps=(1, 10 ** 9),
    encoder_steps=(1, 10 ** 9), decoder_steps=(1, 10 ** 9), settle_steps=(0, 10 ** 9),
    decoder_images=(1, 10 ** 9), full_share=(0, 1), most_phrases=(0, 100), samples=(1, 10 ** 4),
    seeds=(1, 10 ** 4), judge_tries=(1, 1000), judge_timeout=(0, 1e6))
# -------------------------------------------------------------------------------------------------


class ConfigError(SystemExit):
    """A command line that cannot be understood; one line says what, and what would be right."""


def fit(old, new):
    """`new` in the type of `old`, None if it does not fit.

    An int may stand for a float, and a tuple has as many members as the default.
    """
    if isinstance(old, tuple):
        if not isinstance(new, tuple) or len(new) != len(old):
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


def check(values):
    """Refuses a value out of its choices or bounds, and an out_dir that is a file."""
    for key in choices.keys() & values.keys():
        if values[key] not in choices[key]:
            raise ConfigError(f'--{key}: expected one of {" ".join(choices[key])}, '
                              f'got {values[key]!r}')
    for key, value in values.items():
        least, most = bounds.get(key, (-math.inf, math.inf))
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if isinstance(number, (int, float)) and not least <= number <= most:
                raise ConfigError(f'--{key}: expected {least} to {most}, got {number}')
    if values.get('sde', 'flow') != 'flow' and values['noise_level'] > 1:
        raise ConfigError(f'--noise_level={values["noise_level"]}: with --sde={values["sde"]} '
                          'expected at most 1')
    if 'lr' in values and not values['cond_len']:
        raise ConfigError('--cond_len=0: conditions of many lengths cannot be trained on, it is '
                          'for the evaluation of released weights')
    if values['condition'] == 'text+image' and not values['cond_len']:
        raise ConfigError('--cond_len=0: with --condition=text+image expected a length')
    if os.path.isfile(values['out_dir']):
        raise ConfigError(f'--out_dir={values["out_dir"]}: a file is there, expected a folder')


def parse(keys, own_presets, argv, script):
    """Configuration of one run.

    keys: the script's own dict of defaults. own_presets: {preset: differences of own keys}. argv:
    '--key=value', or the bare '--resume', '--plan', '--help'. script: its path, for --help and
    out_dir. Returns a namespace with every key plus preset, resume, plan, script (its name) and
    changed (the keys that differ from a plain command's). Raises ConfigError in one line.
    """
    values = {**shared, **keys}
    assert len(values) == len(shared) + len(keys), 'a script key hides a shared one'
    defaults = {**values, **own_presets.get('tiny', {})}
    if '--help' in argv or '-h' in argv:
        print_help(script)
        raise SystemExit(0)
    given = {}
    flags = dict(preset='tiny', resume=False, plan=False)
    for option in argv:
        if option in ('--resume', '--plan'):
            flags[option[2:]] = True
            continue
        match = re.fullmatch(r'--([A-Za-z_]\w*)=(.*)', option, re.S)
        if not match:
            raise ConfigError(f'expected --key=value, --resume, --plan or --help, got {option!r}')
        key, text = match.groups()
        if key == 'preset':
            flags['preset'] = text
        elif key not in values:
            raise ConfigError(f'unknown key {key!r}; the keys are: preset {" ".join(values)}')
        else:
            given[key] = literal(key, values[key], text)
    if flags['preset'] not in presets:
        raise ConfigError(f'unknown preset {flags["preset"]!r}; the presets are: '
                          f'{" ".join(presets)}')
    values.update(presets[flags['preset']])
    values.update(own_presets.get(flags['preset'], {}))
    values.update(given)
    changed = {key: value for key, value in values.items() if value != defaults[key]}
    stem = os.path.basename(str(script)).removesuffix('.py')
    values['out_dir'] = values['out_dir'] or f'out/{stem}'
    if not values['old_logp']:
        values['old_logp'] = 'recorded'
        if values['dtype'] == 'bfloat16':
            values['old_logp'] = 'replay'
    check(values)
    return argparse.Namespace(**values, **flags, script=stem, changed=changed)


def print_help(script):
    """The script's docstring and the commented source of its keys, then the shared ones."""
    with open(script, encoding='utf-8') as f:
        text = f.read()
    print(ast.get_docstring(ast.parse(text)), '\n')
    for source in (text, inspect.getsource(sys.modules[__name__])):
        block = re.search(r'^# --- \w+ keys -*\n(.*?)^# -+$', source, re.S | re.M)
        if block:
            print(block.group(0))
