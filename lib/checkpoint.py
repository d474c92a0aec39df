"""Checkpoints: where a run starts, what it leaves, and how a killed one goes on.

A checkpoint is a folder step_NNNNNN of safetensors and JSON: encoder/, decoder/ and
projector.safetensors hold full weights, or with LoRA the adapters (lib/lora.py). meta.json has the
step and the keys, state.pt the optimizer. It is written beside and renamed, so that a kill never
leaves half a checkpoint.
"""
import argparse
import json
import os
import re
import shutil
import signal
import threading
from pathlib import Path

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoProcessor

from decoder import DECODERS
from encoder import ENCODERS
from lib import ranks
from lib.files import load, load_known, load_whole, write_atomic, write_json, writing
from lib.log import rewind
from model import Projector, UAE, frozen_copy

# keys without which a checkpoint's weights mean nothing, and those whose change it can live with
FIXED = ('encoder', 'decoder', 'lora_rank', 'cond_len')
TOLD = ('condition', 'resolution', 'caption_prompt', 'negative_prompt', 'guidance', 'caption_len')
TEXT_ENCODER = 'text_encoder/model.safetensors'
POOLED = 'out/pooled'                   # where `open_decoder` keeps a constant of each decoder


# --- finding one ---------------------------------------------------------------------------------
def checkpoints(out_dir):
    """Paths of the whole checkpoints in a folder, oldest first; a half-written one is .tmp."""
    if not os.path.isdir(out_dir):
        return []
    names = [name for name in os.listdir(out_dir) if re.fullmatch(r'step_\d+', name)]
    names.sort(key=lambda name: int(name.removeprefix('step_')))
    return [os.path.join(out_dir, name) for name in names]


def newest(out_dir):
    """The newest whole checkpoint in out_dir, or None."""
    return next(reversed(checkpoints(out_dir)), None)


def resumed(config):
    """The checkpoint that --resume goes on from; None without the flag, or where none is yet."""
    if config.resume:
        return newest(config.out_dir)
    return None


def find_checkpoint(config, need_projector=True):
    """The folder a run starts from: --resume's own newest, --init_from, or the shipped base.

    '' where there is none and need_projector is False; 'uae:DIR' (the authors' release) stays as
    it is. Raises SystemExit in one line when there is none, when it is half-written, or when it
    belongs to other base models.
    """
    folder = resumed(config)
    if not folder and not config.init_from:
        return find_base(config, need_projector)
    if not folder and config.init_from.startswith('uae:'):
        return config.init_from
    folder = folder or newest(config.init_from) or config.init_from
    if not os.path.isdir(folder):
        raise SystemExit(f'--init_from={config.init_from}: no such folder')
    meta = read_meta(folder)
    for key in FIXED + TOLD:
        old, new = meta['config'].get(key), getattr(config, key)
        if old == new or (old is None and key in TOLD):     # a key that came later
            continue
        line = f'{folder} was trained with {key}={old!r}, this run has {new!r}'
        if key in FIXED:
            raise SystemExit(f'{line}; its preset was {meta["config"]["preset"]!r}')
        print(f'warning: {line}', flush=True)
    # what is held out is the data's end; there, more images than before were trained on
    kept = meta['config'].get('eval_images', config.eval_images)
    same = config.data == meta['config'].get('data') and not config.held_out
    if same and config.data != 'shapes' and config.eval_images > kept:
        print(f'warning: {folder} was trained with eval_images={kept}, of the {config.eval_images} '
              'held out now the others were trained on', flush=True)
    check_whole(folder, meta, config.lora_rank)
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
        raise SystemExit(f'{folder}: no checkpoint here, or half of one: meta.json: {error}')


def check_whole(folder, meta, lora_rank):
    """Refuses a checkpoint with a part missing or cut short; a base model would take its place."""
    parts = ['projector.safetensors', 'encoder/config.json', 'decoder/transformer/config.json']
    if lora_rank:
        from lib import lora
        parts[1:] = lora.FILES.values()
    if meta.get('text_encoder'):                # the captioner would take its place
        parts.append(TEXT_ENCODER)
    for part in parts:
        if not os.path.exists(f'{folder}/{part}'):
            raise SystemExit(f'{folder} is half a checkpoint: {part} is missing')
    for path in weight_files(folder):
        try:
            with safe_open(path, 'pt'):         # compares the header with the file's length
                pass
        except (OSError, SafetensorError) as error:
            raise SystemExit(f'{path} is half-written or damaged: {error}')


def weight_files(folder):
    """The .safetensors files at any depth below a folder, sorted."""
    return sorted(map(str, Path(folder).rglob('*.safetensors')))


def find_release(start):
    """The folder of the authors' release under a start 'uae:DIR', or under a checkpoint, or ''."""
    if start.startswith('uae:'):
        return os.path.abspath(start.removeprefix('uae:'))
    return meta_of(start).get('release', '')


def meta_of(start):
    """A checkpoint's meta.json, {} for what has none: the shipped base, a release."""
    if os.path.exists(f'{start}/meta.json'):
        return read_meta(start)
    return {}


def editing_condition(config):
    """The `condition` by which a checkpoint sees source images; SystemExit where it sees none."""
    start = newest(config.init_from) or config.init_from
    condition = meta_of(start).get('edits')
    if not condition:
        raise SystemExit(f'{start or "the shipped base"} cannot edit: stage 0 trained it without '
                         'source images (the fourth of --data_keys)')
    return condition


# --- a model from one ----------------------------------------------------------------------------
def open_uae(config, device='cpu', new_projector=False):
    """A UAE with the weights that a run starts from (`find_checkpoint`).

    new_projector: a fresh projector where no trained one is at hand, as stage 0 begins.
    """
    start = find_checkpoint(config, need_projector=not new_projector)
    release = find_release(start)               # its checkpoints' adapters stand on it
    source = config.encoder                     # of tokenizer, chat template and image processor
    if release and os.path.isdir(f'{release}/llm_processor'):
        source = f'{release}/llm_processor'
    vlm = open_model('encoder', config, start)
    encoder = ENCODERS[vlm.config.model_type](config, vlm, load(AutoProcessor, source))
    decoder = open_decoder(config, start)
    projector = Projector(encoder.width, decoder.width)
    load_projector(projector, start)
    if config.lora_rank:
        from lib import lora
        for tower, model in ((encoder, vlm), (decoder, decoder.transformer)):
            lora.add(model, config.lora_rank, tower.lora_targets)
        lora.read(vlm, f'{start}/{lora.FILES["encoder"]}')
        lora.read(decoder.transformer, f'{start}/{lora.FILES["decoder"]}')
    uae = UAE(config, encoder, projector, decoder)
    uae.release = release
    uae.edits = meta_of(start).get('edits', '')
    uae.source = source
    check_sizes(uae)
    load_text_encoder(encoder, f'{start}/{TEXT_ENCODER}')
    return uae.to(device)


def open_model(part, config, start):
    """The model of 'encoder' or 'decoder': a full checkpoint's, else what adapters stand on.

    Its class is what its config.json says. In full fine-tuning it is float32: what a checkpoint
    holds is not rounded on the way in.
    """
    known = dict(encoder=ENCODERS, decoder=DECODERS)[part]
    dtype = getattr(torch, config.dtype) if config.lora_rank else torch.float32
    release = find_release(start)
    full = os.path.exists(f'{start}/meta.json') and os.path.exists(f'{start}/encoder/config.json')
    if release and not full:
        from lib.release import open_release
        return open_release(part, release, known, dtype)
    source = f'{start}/{part}' if full else getattr(config, part)
    return load_known(known, source, dtype, 'transformer' if part == 'decoder' else '')


def open_decoder(config, start):
    """The decoder, with the VAE and the noise schedule of config.decoder."""
    transformer = open_model('decoder', config, start)
    kind = DECODERS[type(transformer).__name__]
    vae = load_whole(getattr(diffusers, kind.vae_class), config.decoder, subfolder='vae',
                     torch_dtype=getattr(torch, config.dtype))
    scheduler = load(getattr(diffusers, kind.scheduler_class), config.decoder,
                     subfolder='scheduler')
    decoder = kind(config, transformer, vae, scheduler)
    # a constant, computed once and cached; zeros where no text encoders come with the decoder
    local = os.path.isdir(config.decoder)
    if not local or os.path.isdir(f'{config.decoder}/text_encoder'):
        name = config.decoder.strip('/').replace('/', '--')
        cache = f'{POOLED}-{name}.safetensors'
        if not os.path.exists(cache):
            pooled = decoder.pooled_of_nothing(config.decoder)
            write_atomic(cache, lambda path: save_file(dict(pooled=pooled), path))
        decoder.pooled = load_file(cache)['pooled']
    return decoder


def load_projector(projector, start):
    """Loads the weights that a run starts from; without a start it stays as it is."""
    if not start:
        return
    if start.startswith('uae:'):
        from lib.release import open_projector
        d, D = projector.up.in_features, projector.down.out_features
        weights = open_projector(find_release(start), d, D)
    else:
        weights = load_file(f'{start}/projector.safetensors')
    try:
        projector.load_state_dict(weights)
    except RuntimeError as error:
        last = str(error).splitlines()[-1].strip()
        raise SystemExit(f'{start}: its projector does not fit between the encoder and the '
                         f'decoder: {last}')


def check_sizes(uae):
    """Refuses a resolution or a cond_len that the models cannot take."""
    config, encoder = uae.config, uae.encoder
    around = len(encoder.before_text) + len(encoder.after_text)
    if 0 < config.cond_len <= around:
        raise SystemExit(f'--cond_len={config.cond_len}: the template around a caption has '
                         f'{around} tokens, expected more, or 0 for no padding')
    wrong = encoder.check_resolution(config.resolution)
    wrong = wrong or uae.decoder.check_resolution(config.resolution)
    if wrong:
        raise SystemExit(f'--resolution={config.resolution}: {wrong}')


def open_reference(uae, parts, config):
    """A UAE whose `parts` are frozen as the stage began with them: the reference policy.

    parts: of 'encoder', 'projector', 'decoder'. A resumed run loads them from where it began, also
    where the command does not repeat --init_from.
    """
    twin = uae.reference(*parts)
    folder = resumed(config)
    if not folder:
        return twin
    init_from = config.init_from or read_meta(folder)['config'].get('init_from', '')
    begun = argparse.Namespace(**dict(vars(config), resume=False, init_from=init_from))
    start = find_checkpoint(begun)
    models = dict(encoder=twin.encoder.vlm, decoder=twin.decoder.transformer)
    for part in parts:
        if part == 'projector':
            load_projector(twin.projector, start)
        elif config.lora_rank:
            from lib import lora
            lora.read(models[part], f'{start}/{lora.FILES[part]}')
        else:
            models[part].load_state_dict(open_model(part, begun, start).state_dict())
    return twin


# --- text_encoder=start: the language model as stage 2 found it re-encodes the captions ----------
def choose_text_encoder(uae, kind):
    """Gives a UAE, of which stage 2 will train the encoder, what re-encodes captions.

    kind 'start': a language model that stands still, the checkpoint's own if it has one; with LoRA
    it shares the base with the captioner, and has adapters of its own. 'live': the captioner.
    """
    encoder = uae.encoder
    if kind == 'live':
        encoder.text_encoder = None
    elif encoder.text_encoder is None:
        encoder.text_encoder = frozen_copy(encoder.language_model)


def load_text_encoder(encoder, path):
    """The text encoder of a checkpoint, if it has one: what the file lacks is the captioner's."""
    if not os.path.exists(path):
        return
    weights = load_file(path)
    encoder.text_encoder = frozen_copy(encoder.language_model, own=weights)
    encoder.text_encoder.load_state_dict(weights, strict=False)


def save_text_encoder(encoder, path):
    """Writes what the text encoder does not share with the captioner."""
    shared = set(encoder.language_model.parameters())
    parameters = encoder.text_encoder.named_parameters()
    own = {name: p.data for name, p in parameters if p not in shared}
    os.makedirs(os.path.dirname(path), exist_ok=True)
    save_file(own, path)


# --- a run's own checkpoints ---------------------------------------------------------------------
def open_out_dir(config, run):
    """Creates out_dir, or refuses a used one without --resume. -> the step to start from.

    A resumed run says which keys differ from those it was begun with. Rank 0 says where it goes
    on; a rank that does not see that checkpoint is refused. From here on SIGTERM is only noted:
    `maybe_save` acts on it.
    """
    used = os.path.isdir(config.out_dir) and len(os.listdir(config.out_dir)) > 0
    if ranks.total(used and not config.resume, run):
        raise SystemExit(f'{config.out_dir} is not empty: --resume continues it, '
                         '--out_dir=ELSEWHERE starts anew')
    folder = resumed(config)
    folders = ranks.gather_objects([folder], run)
    if folder != folders[0]:
        raise SystemExit(f'--resume: rank 0 goes on from {folders[0]}, rank {run.rank} sees '
                         f'{folder}: out_dir has to be a folder that all nodes share')
    meta = dict(step=0, config={})
    if folder:
        meta = read_meta(folder)
    elif used and os.path.exists(f'{config.out_dir}/log.jsonl'):
        raise SystemExit(f'--resume: {config.out_dir} has logs but no checkpoint: remove it to '
                         'start anew')
    if meta['step'] > config.steps:
        raise SystemExit(f'{folder} has {meta["step"]} updates already, more than '
                         f'--steps={config.steps}: nothing to do')
    if run.master:
        with writing(config.out_dir):
            os.makedirs(config.out_dir, exist_ok=True)
        tell_changes(meta['config'], config)
        rewind(config.out_dir, meta['step'])
    stop_asked.clear()
    signal.signal(signal.SIGTERM, lambda number, frame: stop_asked.set())
    return meta['step']


def tell_changes(begun, config):
    """Prints the keys in which a resumed run differs from the configuration it was begun with."""
    now = json.loads(json.dumps(vars(config)))       # a tuple comes back from JSON as a list
    for key, old in begun.items():
        new = now.get(key, old)                      # old: a key of before
        if new != old and key not in ('resume', 'out_dir', 'changed'):
            print(f'resume: {key}={new!r}, the run was begun with {old!r}')


def save(config, run, step, uae, optimiser, extra=None, keep=2):
    """Writes the checkpoint out_dir/step_NNNNNN, and keeps the newest `keep`; rank 0 writes.

    extra: a dict of tensors, numbers and lists of these that `restore` gives back.
    """
    folder = f'{config.out_dir}/step_{step:06d}'
    if run.master and not os.path.isdir(folder):
        half = folder + '.tmp'
        shutil.rmtree(half, ignore_errors=True)
        state = dict(optimizer=optimiser.adamw.state_dict(), step=step, extra=extra or {})
        meta = dict(step=step, release=uae.release, edits=uae.edits,
                    text_encoder=uae.encoder.text_encoder is not None, config=vars(config))
        with writing(half):
            save_models(uae, half)
            torch.save(state, f'{half}/state.pt')
            write_json(f'{half}/meta.json', meta)
            os.replace(half, folder)
        for old in checkpoints(config.out_dir)[:-keep]:
            shutil.rmtree(old)
    ranks.barrier(run)
    return folder


def save_models(uae, folder):
    """Writes projector, encoder and decoder: full weights, or with LoRA the adapters alone."""
    os.makedirs(folder, exist_ok=True)
    save_file(uae.projector.state_dict(), f'{folder}/projector.safetensors')
    if uae.config.lora_rank:
        from lib import lora
        lora.save(uae.encoder, uae.decoder, folder)
    else:
        uae.encoder.vlm.save_pretrained(f'{folder}/encoder')
        uae.decoder.transformer.save_pretrained(f'{folder}/decoder/transformer')
    if uae.encoder.text_encoder:
        save_text_encoder(uae.encoder, f'{folder}/{TEXT_ENCODER}')


def restore(config, optimiser):
    """With --resume: loads the optimizer's state -> what `save` was given as extra."""
    folder = resumed(config)
    if not folder:
        return {}
    try:
        state = torch.load(f'{folder}/state.pt', map_location='cpu', weights_only=True)
    except Exception as error:                  # a damaged file raises nearly anything
        raise SystemExit(f'{folder}/state.pt is missing or damaged, --resume needs it: '
                         f'{type(error).__name__}')
    optimiser.adamw.load_state_dict(state['optimizer'])
    return state.get('extra', {})


# --- SIGTERM: a cluster takes the machine back ---------------------------------------------------
stop_asked = threading.Event()


def maybe_save(config, run, done, uae, optimiser, extra=None):
    """Checkpoint after `done` updates: every config.save_every, at the end, and after a SIGTERM.

    A SIGTERM that any rank got ends the run on every rank with exit code 0. extra: see `save`.
    """
    stop = ranks.total(stop_asked.is_set(), run) > 0
    end = done == config.steps
    due = config.save_every and done % config.save_every == 0
    if end or stop or due:
        folder = save(config, run, done, uae, optimiser, extra)
    if end or stop:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)       # SIGTERM ends the process again
    if stop and not end:
        if run.master:
            tqdm.write(f'SIGTERM: stopped after update {done}, saved {folder}; --resume continues')
        raise SystemExit(0)
