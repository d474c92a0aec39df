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
choices = dict(condition=('text', 'answer', 'image', 'text+image'), dtype=('float32', 'bfloat16'), sde=('flow', 'cps'), loss_mean=('token', 'caption', 'constant'))
# -------------------------------------------------------------------------------------------------------------------

# the published config.json of what the presets name, so that sizes are known before the first download (--plan, tests)
_sd3 = dict(sample_size=128, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64, joint_attention_dim=4096, pooled_projection_dim=2048,
            qk_norm='rms_norm')
_sd3_vae = dict(block_out_channels=(128, 256, 512, 512), down_block_types=('DownEncoderBlock2D',) * 4, up_block_types=('UpDecoderBlock2D',) * 4, layers_per_block=2,
                latent_channels=16, norm_num_groups=32, sample_size=1024, scaling_factor=1.5305, shift_factor=0.0609,
                use_quant_conv=False, use_post_quant_conv=False)
architectures = {
    'Qwen/Qwen2.5-VL-3B-Instruct': dict(
        text_config=dict(vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
                         max_position_embeddings=128000, max_window_layers=70, rms_norm_eps=1e-6, tie_word_embeddings=True,
                         bos_token_id=151643, eos_token_id=151645, rope_parameters=dict(rope_type='default', rope_theta=1e6, mrope_section=[16, 24, 24])),
        vision_config=dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048, patch_size=14, spatial_merge_size=2,
                           temporal_patch_size=2, window_size=112, fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2),
        image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653, tie_word_embeddings=True),
    'stabilityai/stable-diffusion-3.5-medium': dict(
        transformer=dict(_sd3, num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384, dual_attention_layers=tuple(range(13))),
        vae=_sd3_vae, scheduler=dict(num_train_timesteps=1000, shift=3.0)),
    'stabilityai/stable-diffusion-3.5-large': dict(
        transformer=dict(_sd3, num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192, dual_attention_layers=()),
        vae=_sd3_vae, scheduler=dict(num_train_timesteps=1000, shift=3.0)),
    'facebook/dinov2-large': dict(model_type='dinov2', hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, patch_size=14, image_size=518),
}


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
