"""Checkpoints: where a run starts, what it leaves, and how a killed one goes on.

A checkpoint is a folder step_NNNNNN of safetensors and JSON: encoder/, decoder/ and
projector.safetensors hold full weights, or with LoRA the adapters (the encoder's in peft's layout,
the decoder's as StableDiffusion3Pipeline.save_lora_weights writes it). meta.json has the step and
the keys, state.pt the optimizer. It is written beside and renamed: a kill leaves none by half.
"""
import argparse
import glob
import json
import os
import shutil
import signal
import threading

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import common
from model import Projector, UAE
from parts import frozen_copy
from tools.release import load_release

# every linear layer of the language model, never the vision tower, lm_head or projector; in the
# decoder the attention projections that Flow-GRPO adapts
ENCODER_LORA = r'.*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj'
DECODER_LORA = r'.*\.attn\.(add_[qkv]_proj|to_add_out|to_[qkv]|to_out\.0)'
ADAPTERS = dict(encoder='encoder/adapter_model.safetensors',
                decoder='decoder/pytorch_lora_weights.safetensors')
TEXT_ENCODER = 'text_encoder/model.safetensors'


# --- finding one ---------------------------------------------------------------------------------
def step_of(folder):
    """The number of a folder step_NNNNNN; -1 for others, half-written .tmp folders among them."""
    number = os.path.basename(folder).removeprefix('step_')
    if number.isdigit():
        return int(number)
    return -1


def newest(out_dir):
    """The newest whole checkpoint in out_dir, or None."""
    folders = [f for f in glob.glob(f'{out_dir}/step_*') if step_of(f) >= 0]
    return max(folders, key=step_of, default=None)


def find_checkpoint(config, need_projector=True):
    """The folder a run starts from: --resume's own newest, --init_from, or the shipped base.

    '' where there is none and need_projector is False; 'uae:DIR' (the authors' release) stays as
    it is. Raises SystemExit in one line when there is none, when it is half-written, or when it
    belongs to other base models.
    """
    folder = None
    if config.resume:
        folder = newest(config.out_dir)
    if not folder and not config.init_from:
        return find_base(config, need_projector)
    if not folder and config.init_from.startswith('uae:'):
        return config.init_from
    folder = folder or newest(config.init_from) or config.init_from
    if not os.path.isdir(folder):
        raise SystemExit(f'--init_from={config.init_from}: no such folder')
    for name in ('projector.safetensors', 'meta.json'):
        if not os.path.exists(f'{folder}/{name}'):
            raise SystemExit(f'{folder}: no checkpoint here ({name} expected)')
    saved = read_meta(folder)['config']
    for key in ('encoder', 'decoder', 'lora_rank', 'cond_len'):
        if saved[key] != getattr(config, key):
            raise SystemExit(f'{folder} was trained with {key}={saved[key]!r}, this run has '
                             f'{getattr(config, key)!r}; its preset was {saved["preset"]!r}')
    check_whole(folder, config.lora_rank)
    return folder


def find_base(config, need_projector):
    """The folder of the shipped base, which lies around config.encoder, or ''."""
    folder = os.path.dirname(config.encoder.rstrip('/'))
    if os.path.exists(f'{folder}/projector.safetensors'):
        return folder
    if need_projector:
        raise SystemExit(f'no trained projector next to {config.encoder!r}: give '
                         '--init_from=CHECKPOINT, made by pretrain_decoder.py (stage 0) or '
                         'cold_start.py (stage 1)')
    return ''


def read_meta(folder):
    """A checkpoint's meta.json: {step, config}."""
    try:
        with open(f'{folder}/meta.json') as f:
            return json.load(f)
    except (OSError, ValueError) as error:
        raise SystemExit(f'{folder}/meta.json is missing or damaged: {error}')


def check_whole(folder, lora_rank):
    """Refuses a checkpoint with a part missing or cut short; a base model would take its place."""
    parts = ('encoder/config.json', 'decoder/transformer/config.json')
    if lora_rank:
        parts = ADAPTERS.values()
    parts = list(parts)
    if read_meta(folder).get('text_encoder'):   # the captioner would take its place
        parts.append(TEXT_ENCODER)
    for part in parts:
        if not os.path.exists(f'{folder}/{part}'):
            raise SystemExit(f'{folder} is half a checkpoint: {part} is missing')
    for path in sorted(glob.glob(f'{folder}/**/*.safetensors', recursive=True)):
        try:
            with safe_open(path, 'pt'):         # compares the header with the file's length
                pass
        except (OSError, SafetensorError) as error:
            raise SystemExit(f'{path} is half-written or damaged: {error}')


def find_release(start):
    """The folder of the authors' release under a start 'uae:DIR', or under a checkpoint, or ''."""
    if start.startswith('uae:'):
        return os.path.abspath(start.removeprefix('uae:'))
    if os.path.exists(f'{start}/meta.json'):
        return read_meta(start).get('release', '')
    return ''


# --- a model from one ----------------------------------------------------------------------------
def open_uae(config, device='cpu', new_projector=False):
    """A UAE with the weights that a run starts from (`find_checkpoint`).

    new_projector: a fresh projector where no trained one is at hand, as stage 0 begins.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from transformers import AutoProcessor
    start = find_checkpoint(config, need_projector=not new_projector)
    release = find_release(start)
    encoder, decoder, projector = load_towers(config, start, release)
    if config.lora_rank:
        add_lora(encoder, config.lora_rank, ENCODER_LORA)
        add_lora(decoder, config.lora_rank, DECODER_LORA)
        load_adapter(encoder, f'{start}/{ADAPTERS["encoder"]}')
        load_adapter(decoder, f'{start}/{ADAPTERS["decoder"]}')
    dtype = getattr(torch, config.dtype)
    vae = common.load(AutoencoderKL, config.decoder, subfolder='vae', torch_dtype=dtype)
    scheduler = common.load(FlowMatchEulerDiscreteScheduler, config.decoder, subfolder='scheduler')
    source = processor_source(config, release)
    processor = common.load(AutoProcessor, source)
    pooled = pooled_of_nothing(config, decoder.config.pooled_projection_dim)
    uae = UAE(config, encoder, projector, decoder, vae, scheduler, processor, pooled, device)
    uae.release = release                       # its checkpoints' adapters stand on that release
    uae.source = source
    check_sizes(uae)
    if config.text_encoder != 'live':
        load_text_encoder(uae, f'{start}/{TEXT_ENCODER}')
    return uae.to(device)


def check_sizes(uae):
    """Refuses a resolution or a cond_len that the models cannot take."""
    around = len(uae.before_text) + len(uae.after_text)
    if 0 < uae.config.cond_len <= around:
        raise SystemExit(f'--cond_len={uae.config.cond_len}: the template around a caption has '
                         f'{around} tokens, expected more, or 0 for no padding')
    R, vision = uae.config.resolution, uae.encoder.config.vision_config
    step = 2 ** (len(uae.vae.config.block_out_channels) - 1) * uae.decoder.config.patch_size
    least = 2 * vision.patch_size * vision.spatial_merge_size
    most = step * uae.decoder.config.pos_embed_max_size
    if R % step or not least <= R <= most:
        raise SystemExit(f'--resolution={R}: expected a multiple of {step} from {least} to {most}, '
                         'for the VAE, the patches of the encoder and those of the transformer')


def loaded_dtype(config):
    """In full fine-tuning what a checkpoint holds is not rounded on the way in."""
    if config.lora_rank:
        return getattr(torch, config.dtype)
    return torch.float32


def load_encoder(config, start):
    """The full weights of a checkpoint, else those it stands on."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    folder = config.encoder
    if os.path.exists(f'{start}/encoder/config.json'):
        folder = f'{start}/encoder'
    return common.load(Qwen2_5_VLForConditionalGeneration, folder, dtype=loaded_dtype(config))


def load_decoder(config, start):
    """The same of the decoder."""
    from diffusers import SD3Transformer2DModel
    folder = config.decoder
    if os.path.exists(f'{start}/decoder/transformer/config.json'):
        folder = f'{start}/decoder'
    return common.load(SD3Transformer2DModel, folder, subfolder='transformer',
                       torch_dtype=loaded_dtype(config))


def load_towers(config, start, release):
    """Encoder, decoder and projector as a run starts with them."""
    weights = None
    if release and not os.path.exists(f'{start}/encoder/config.json'):
        encoder, decoder, weights = load_release(release, loaded_dtype(config))
    else:
        encoder, decoder = load_encoder(config, start), load_decoder(config, start)
    projector = Projector(encoder.config.text_config.hidden_size,
                          decoder.config.joint_attention_dim)
    if start and not start.startswith('uae:'):
        weights = load_file(f'{start}/projector.safetensors')
    if weights:
        projector.load_state_dict(weights)
    return encoder, decoder, projector


def processor_source(config, release):
    """The folder or hub id of tokenizer, chat template and image processor."""
    if release and os.path.isdir(f'{release}/llm_processor'):
        return f'{release}/llm_processor'
    return config.encoder


def pooled_of_nothing(config, width):
    """pooled_projections (1, width): the pooled CLIP-L + CLIP-G embedding of the empty string.

    A constant, computed once by the decoder's own text encoders and cached. Zeros where the
    decoder comes without text encoders, as the tiny one does.
    """
    if os.path.isdir(config.decoder) and not os.path.isdir(f'{config.decoder}/text_encoder'):
        return torch.zeros(1, width)
    name = config.decoder.strip('/').replace('/', '--')
    cache = os.path.join('out', f'pooled-{name}.safetensors')
    if not os.path.exists(cache):
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer
        parts = []
        for i in ('', '_2'):
            tokenizer = common.load(CLIPTokenizer, config.decoder, subfolder=f'tokenizer{i}')
            ids = tokenizer('', padding='max_length', return_tensors='pt').input_ids
            model = common.load(CLIPTextModelWithProjection, config.decoder,
                                subfolder=f'text_encoder{i}')
            with torch.no_grad():
                parts.append(model(ids).text_embeds)
        pooled = torch.cat(parts, -1).float()
        common.write_atomic(cache, lambda path: save_file(dict(pooled=pooled), path))
    return load_file(cache)['pooled']


def stage_start(uae, parts, config):
    """A UAE whose `parts` are frozen as the stage began with them: the reference policy.

    A resumed run loads only what was trained of these parts, from where the stage began.
    """
    for part in parts:
        uae = uae.reference(part)
    if not config.resume or not newest(config.out_dir):
        return uae
    begun = argparse.Namespace(**dict(vars(config), resume=False))
    start = find_checkpoint(begun)
    for part in parts:
        tower = getattr(uae, part)
        if config.lora_rank and part != 'projector':
            for key, p in tower.named_parameters():
                if 'lora_B' in key:
                    p.zero_()                   # a fresh adapter, for a start without one
            load_adapter(tower, f'{start}/{ADAPTERS[part]}')
        elif part == 'projector' and os.path.exists(f'{start}/projector.safetensors'):
            tower.load_state_dict(load_file(f'{start}/projector.safetensors'))
        else:
            tower.load_state_dict(load_part(part, begun, start).state_dict())
    return uae


def load_part(part, config, start):
    """Encoder, decoder or projector as a run starts with it, and where possible nothing else."""
    release = find_release(start)
    if part == 'encoder' and not release:
        return load_encoder(config, start)
    if part == 'decoder' and not release:
        return load_decoder(config, start)
    towers = load_towers(config, start, release)
    return dict(zip(('encoder', 'decoder', 'projector'), towers))[part]


# --- text_encoder=start: the language model as stage 2 found it re-encodes the captions ----------
def freeze_text_encoder(uae):
    """Gives a UAE, of which stage 2 will train the encoder, a text encoder that stands still.

    With LoRA it shares the base with the captioner, and has adapters of its own. A text encoder
    that came with the checkpoint stays.
    """
    if uae.text_encoder is None:
        uae.text_encoder = frozen_copy(uae.language_model)


def load_text_encoder(uae, path):
    """The text encoder of a checkpoint, if it has one."""
    if not os.path.exists(path):
        return
    weights = load_file(path)
    for name, p in uae.language_model.named_parameters():
        p.requires_grad_(name in weights)       # what it has of its own; the rest is shared
    uae.text_encoder = frozen_copy(uae.language_model)
    uae.language_model.requires_grad_(False)
    uae.text_encoder.load_state_dict(weights, strict=False)


def save_text_encoder(uae, folder):
    """Writes what the text encoder does not share with the captioner."""
    os.makedirs(f'{folder}/text_encoder', exist_ok=True)
    shared = {id(p) for p in uae.language_model.parameters()}
    own = {name: p.data for name, p in uae.text_encoder.named_parameters() if id(p) not in shared}
    save_file(own, f'{folder}/{TEXT_ENCODER}')


# --- LoRA ----------------------------------------------------------------------------------------
def add_lora(tower, rank, targets):
    """Puts fresh LoRA adapters (alpha = 2 rank, gaussian) on the linear layers that match.

    They are float32 from the start, so that nothing that is loaded into them is rounded.
    """
    from peft import LoraConfig, inject_adapter_in_model
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights='gaussian',
                        target_modules=targets)
    inject_adapter_in_model(lora, tower)
    for key, p in tower.named_parameters():
        if 'lora_' in key:
            p.data = p.data.float()


def load_adapter(tower, path):
    """Loads the adapters saved at `path`, if there are any, into those of a tower."""
    if not os.path.exists(path):
        return
    from peft import set_peft_model_state_dict
    saved = {}
    for key, tensor in load_file(path).items():
        key = key.removeprefix('base_model.model.').removeprefix('transformer.')
        saved[key] = tensor
    result = set_peft_model_state_dict(tower, saved)
    if result.unexpected_keys:
        raise SystemExit(f'{path}: not an adapter of this model; first unknown key '
                         f'{result.unexpected_keys[0]}')


def save_lora(encoder, decoder, folder):
    """Writes both towers' adapters, the decoder's with its alpha as load_lora_weights reads it."""
    from diffusers import StableDiffusion3Pipeline
    from peft import get_peft_model_state_dict
    os.makedirs(f'{folder}/encoder', exist_ok=True)
    adapter = {}
    for key, tensor in get_peft_model_state_dict(encoder).items():
        adapter[f'base_model.model.{key}'] = tensor
    save_file(adapter, f'{folder}/{ADAPTERS["encoder"]}')
    encoder.peft_config['default'].save_pretrained(f'{folder}/encoder')
    StableDiffusion3Pipeline.save_lora_weights(
        f'{folder}/decoder', get_peft_model_state_dict(decoder),
        transformer_lora_adapter_metadata=decoder.peft_config['default'].to_dict())


# --- a run's own checkpoints ---------------------------------------------------------------------
def open_out_dir(config, run):
    """Creates out_dir, or refuses a used one without --resume. -> the step to start from.

    A resumed run says which keys differ from those it was begun with. Rank 0 says where it goes
    on; a rank that does not see that checkpoint is refused.
    """
    used = os.path.isdir(config.out_dir) and len(os.listdir(config.out_dir)) > 0
    if common.total(used and not config.resume, run):
        raise SystemExit(f'{config.out_dir} is not empty: --resume continues it, '
                         '--out_dir=ELSEWHERE starts anew')
    folder = None
    if config.resume:
        folder = newest(config.out_dir)
    folders = common.gather_objects([folder], run)
    if folder != folders[0]:
        raise SystemExit(f'--resume: rank 0 goes on from {folders[0]}, rank {run.rank} sees '
                         f'{folder}: out_dir has to be a folder that all nodes share')
    meta = dict(step=0, config={})
    if folder:
        meta = read_meta(folder)
    if run.master:
        os.makedirs(config.out_dir, exist_ok=True)
        tell_changes(meta['config'], config)
        rewind(config.out_dir, meta['step'])
    return meta['step']


def tell_changes(begun, config):
    """Prints the keys in which a resumed run differs from the configuration it was begun with."""
    now = json.loads(json.dumps(vars(config)))       # a tuple comes back from JSON as a list
    for key, old in begun.items():
        new = now.get(key)
        if new != old and key not in ('resume', 'out_dir', 'changed'):
            print(f'resume: {key}={new!r}, the run was begun with {old!r}')


def rewind(out_dir, step):
    """Drops the log lines of `step` and later, which a resumed run writes again.

    A group is written before the checkpoint of its step, and stays.
    """
    for name in ('log.jsonl', 'eval.jsonl', 'samples.jsonl', 'groups.jsonl'):
        end = step
        if name == 'groups.jsonl':
            end = step + 1
        path = f'{out_dir}/{name}'
        if not os.path.exists(path):
            continue
        with open(path) as f:
            whole = [line for line in f if line.endswith('\n')]        # a kill may cut the last
        kept = [line for line in whole if json.loads(line)['step'] < end]
        common.write_atomic(path, lambda temporary: common.write_lines(temporary, kept))


def save(config, run, step, uae, optimiser, keep=2):
    """Writes the checkpoint out_dir/step_NNNNNN, and keeps the newest `keep`; rank 0 writes."""
    folder = f'{config.out_dir}/step_{step:06d}'
    if run.master and not os.path.isdir(folder):
        half = folder + '.tmp'
        shutil.rmtree(half, ignore_errors=True)
        save_models(uae, half)
        torch.save(dict(optimizer=optimiser.adamw.state_dict(), step=step), f'{half}/state.pt')
        meta = dict(step=step, release=uae.release, text_encoder=uae.text_encoder is not None,
                    config=vars(config))
        common.write_json(f'{half}/meta.json', meta)
        os.replace(half, folder)
        done = [f for f in glob.glob(f'{config.out_dir}/step_*') if step_of(f) >= 0]
        for old in sorted(done, key=step_of)[:-keep]:
            shutil.rmtree(old)
    common.barrier(run)
    return folder


def save_models(uae, folder):
    """Writes projector, encoder and decoder: full weights, or with LoRA the adapters alone."""
    os.makedirs(folder, exist_ok=True)
    save_file(uae.projector.state_dict(), f'{folder}/projector.safetensors')
    if uae.config.lora_rank:
        save_lora(uae.encoder, uae.decoder, folder)
    else:
        uae.encoder.save_pretrained(f'{folder}/encoder')
        uae.decoder.save_pretrained(f'{folder}/decoder/transformer')
    if uae.text_encoder:
        save_text_encoder(uae, folder)


def restore(config, optimiser):
    """With --resume: loads the optimizer's state of the newest checkpoint in out_dir."""
    folder = None
    if config.resume:
        folder = newest(config.out_dir)
    if not folder:
        return
    try:
        state = torch.load(f'{folder}/state.pt', map_location='cpu', weights_only=True)
    except Exception as error:                  # a damaged file raises nearly anything
        raise SystemExit(f'{folder}/state.pt is missing or damaged, --resume needs it: '
                         f'{type(error).__name__}')
    optimiser.adamw.load_state_dict(state['optimizer'])


# --- SIGTERM: a cluster takes the machine back ---------------------------------------------------
stop_asked = threading.Event()


def watch_sigterm():
    """From here on SIGTERM is only noted; `maybe_save` acts on it between two updates."""
    stop_asked.clear()
    signal.signal(signal.SIGTERM, lambda number, frame: stop_asked.set())


def release_sigterm():
    """From here on SIGTERM ends the process again."""
    stop_asked.clear()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def maybe_save(config, run, done, uae, optimiser):
    """Checkpoint after `done` updates: every config.save_every, at the end, and after a SIGTERM.

    A SIGTERM that any rank got ends the run on every rank with exit code 0.
    """
    stop = common.total(stop_asked.is_set(), run) > 0
    end = done == config.steps
    due = config.save_every and done % config.save_every == 0
    if end or stop or due:
        folder = save(config, run, done, uae, optimiser)
    if end or stop:
        release_sigterm()
    if stop and not end:
        if run.master:
            tqdm.write(f'SIGTERM: stopped after update {done}, saved {folder}; --resume continues')
        raise SystemExit(0)
