"""The keys that every script shares, their presets, and the command line.

A script adds its own keys to `shared`; the two dicts together are the whole configuration, and `--help` prints their
source, so the comments are the manual. Values come from, later wins: `shared`, the script's `keys`, the preset
(`--preset=tiny|medium|paper`), the words `--key=value`.
"""
import ast
import inspect
import re
import sys
import types

# --- shared keys ---------------------------------------------------------------------------------------------------
shared = dict(
    # models: hub ids, or local folders in the library's own format
    encoder = 'data/shapes/base/encoder',        # Qwen2_5_VLForConditionalGeneration + processor
    decoder = 'data/shapes/base/decoder',        # folder with transformer/ vae/ scheduler/ as StableDiffusion3Pipeline saves it
    clip = 'local-dir:data/shapes/base/clip',    # open_clip name:weights, or local-dir:FOLDER
    judge = 'data/shapes/base/judge',            # image tower that only evaluation sees: a folder or hub id for AutoModel
    init_from = '',                              # checkpoint of an earlier stage, or uae:DIR (the authors' release); '' = the shipped base (tiny only)
    out_dir = '',                                # '' = out/<script name>
    data = 'shapes',                             # 'shapes', or a folder / manifest / tar shards (data/README.md)
    data_keys = ('image', 'caption', ''),        # a manifest's field names, and the folder its image paths are relative to
    held_out = '',                               # the same, for evaluation; '' = the last eval_images of data, kept from training
    # what the models are asked
    resolution = 32,                             # images are resized and centre-cropped to this square
    caption_prompt = 'describe the image',       # user turn: this text, then the image
    negative_prompt = 'random image',            # unconditional branch of classifier-free guidance
    condition = 'text',                          # text | answer | image | text+image: what the decoder sees, see model.condition
    cond_len = 28,                               # every condition is padded to this many tokens: SD3 has no text mask
    caption_len = 24,                            # T, most tokens of a sampled caption, its end token included
    guidance = 1.0,                              # classifier-free guidance scale; 1 = off and costs nothing
    sample_steps = 8,                            # S, denoising steps of a rollout
    # evaluation: on held-out images, ODE sampling, fixed noise
    reward = 'clip',                             # backbone of the reward, any name of reward.BACKBONES
    eval_steps = 8,                              # denoising steps
    eval_images = 64,                            # held-out images
    eval_every = 20,                             # updates between evaluations, 0 = never
    eval_temperature = 0.0,                      # of the captions; 0 = greedy, 0.7 for the paper's Unified-Bench
    # optimisation
    lora_rank = 0,                               # 0 = full fine-tuning; > 0 = LoRA of this rank (alpha = 2 rank) through peft
    micro_batch = 0,                             # samples per forward and backward pass on a rank, 0 = all; lower it if out of memory
    checkpointing = False,                       # recompute activations in the backward pass: less memory, 30 % more time
    # run
    seed = 1337,
    device = '',                                 # '' = cuda if there is one, else cpu
    dtype = 'float32',                           # of the frozen weights and the matrix work; the SDE and log-probs are always float32
    save_every = 0,                              # updates between checkpoints; 0 = only at the end
    wandb = '',                                  # project name; '' = nothing is imported
)
presets = dict(tiny={}, medium=dict(
    encoder='Qwen/Qwen2.5-VL-3B-Instruct', decoder='stabilityai/stable-diffusion-3.5-medium',
    clip='ViT-L-14-quickgelu:openai', judge='facebook/dinov2-large', data='',
    resolution=512, cond_len=512, caption_len=384, guidance=1.0, sample_steps=10, eval_steps=40, save_every=20,
    caption_prompt='You are an expert vision-language model.  \nYour task is: Given an input image, generate a **textual description** of the image. '
                   'If there is text in the image, transcribe it inside double quotes "".  \nNow, carefully analyze the input image and output the full description. ',
    negative_prompt='Generate a random, low quality, ugly, blur, bad and anime, cartoon image.',
    lora_rank=32, micro_batch=1, checkpointing=True, dtype='bfloat16'))
presets['paper'] = dict(presets['medium'], decoder='stabilityai/stable-diffusion-3.5-large', guidance=5.0, micro_batch=2)
choices = dict(condition=('text', 'answer', 'image', 'text+image'), dtype=('float32', 'bfloat16'), sde=('flow', 'cps'))
# -------------------------------------------------------------------------------------------------------------------


class ConfigError(SystemExit):
    """A command line that cannot be understood; one line that says what, and what would be right."""


def fit(old, new):
    """`new` in the type of `old`: an int may stand for a float, tuples have as many members; None if it does not fit."""
    if isinstance(old, tuple) and isinstance(new, tuple) and len(new) == len(old):
        new = tuple(map(fit, old, new))
        return None if None in new else new
    if isinstance(old, float) and type(new) is int:
        return float(new)
    return new if type(new) is type(old) and not isinstance(old, tuple) else None


def literal(key, old, text):
    """The value of `text` in the type of the default `old`."""
    try:
        new = text if isinstance(old, str) else ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError):                 # TypeError: '{[]: 1}'
        new = text
    new = fit(old, new)
    if new is None:
        raise ConfigError(f'--{key}: expected {type(old).__name__}, for example {old!r}, got {text!r}')
    return new


def parse(keys, own_presets, argv, script):
    """Configuration of one run.

    keys: the script's own dict of defaults. own_presets: {preset: differences of own keys}. argv: list of words
    '--key=value', or the bare '--resume', '--plan', '--help'. script: the script's path, for --help and out_dir.
    Returns a namespace with every key plus preset, resume, plan. Raises ConfigError (exit code not 0) in one line.
    """
    both = {**shared, **keys}
    assert len(both) == len(shared) + len(keys), 'a script key hides a shared one'
    if '--help' in argv or '-h' in argv:
        print_help(script)
        raise SystemExit(0)
    words = {}
    flags = dict(preset='tiny', resume=False, plan=False)
    for word in argv:
        if word in ('--resume', '--plan'):
            flags[word[2:]] = True
            continue
        match = re.fullmatch(r'--([A-Za-z_]\w*)=(.*)', word, re.S)
        if not match:
            raise ConfigError(f'expected --key=value, --resume, --plan or --help, got {word!r}')
        key, text = match.groups()
        if key == 'preset':
            flags['preset'] = text
        elif key not in both:
            raise ConfigError(f'unknown key {key!r}; the keys are: preset {" ".join(both)}')
        else:
            words[key] = literal(key, both[key], text)
    if flags['preset'] not in presets:
        raise ConfigError(f'unknown preset {flags["preset"]!r}; the presets are: {" ".join(presets)}')
    both.update(presets[flags['preset']])
    both.update(own_presets.get(flags['preset'], {}))
    both.update(words)
    for key in choices.keys() & both.keys():
        if both[key] not in choices[key]:
            raise ConfigError(f'--{key}: expected one of {" ".join(choices[key])}, got {both[key]!r}')
    stem = re.sub(r'\.py$', '', str(script).replace('\\', '/').rsplit('/', 1)[-1])
    both['out_dir'] = both['out_dir'] or f'out/{stem}'
    return types.SimpleNamespace(**both, **flags)


def print_help(script):
    """The script's docstring and the commented source of its keys, then the shared ones."""
    with open(script, encoding='utf-8') as f:
        text = f.read()
    print(ast.get_docstring(ast.parse(text)), '\n')
    for source in (text, inspect.getsource(sys.modules[__name__])):
        block = re.search(r'^# --- \w+ keys -*\n(.*?)^# -+$', source, re.S | re.M)
        print(block.group(0) if block else '')
