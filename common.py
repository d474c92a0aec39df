"""Plumbing with one right form and nothing to teach: ranks, addressed randomness, checkpoints, log lines."""
import contextlib
import glob
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import types

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm


# --- ranks ---------------------------------------------------------------------------------------------------------
def start(c):
    """Joins the process group that torchrun announces (nccl on CUDA, gloo on CPU), seeds, picks the device.

    Returns a namespace rank, world, device, master. Outside torchrun: rank 0 of 1.
    """
    world, rank, local = (int(os.environ.get(k, d)) for k, d in (('WORLD_SIZE', 1), ('RANK', 0), ('LOCAL_RANK', 0)))
    device = c.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if device.split(':')[0] not in ('cpu', 'cuda', 'mps') or device.startswith('cuda') and not torch.cuda.is_available():
        raise SystemExit(f'--device={device}: expected cpu, or cuda or mps where there is one')
    if device == 'cuda':
        device = f'cuda:{local}'
        torch.cuda.set_device(local)
    if world > 1 and not dist.is_initialized():
        store, *_ = next(dist.rendezvous('env://'))
        life = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')       # torchrun's store outlives a restart, and addresses of the dead stand in it
        dist.init_process_group('nccl' if device.startswith('cuda') else 'gloo', store=dist.PrefixStore(life, store), rank=rank, world_size=world)
    quiet()
    random.seed(c.seed), np.random.seed(c.seed), torch.manual_seed(c.seed)
    return types.SimpleNamespace(rank=rank, world=world, device=device, master=rank == 0)


def per_rank(name, count, world, group=2):
    """`count` is for all ranks together; each rank's share, or one line that says why there is none, or no baseline in a group."""
    if count % world or count < 1:
        raise SystemExit(f'{name}={count} does not divide over {world} ranks')
    if group < 2:
        raise SystemExit(f'group={group}: the others of its group are what a sample is compared with, at least 2 are needed')
    return count // world


def total(value, run):
    """Sum of a number or tensor over the ranks."""
    t = torch.as_tensor(value, dtype=torch.float64).clone().to(run.device if run.device != 'mps' else 'cpu')
    if run.world > 1:
        dist.all_reduce(t)
    return t if t.dim() else t.item()


def gather(t, run):
    """Concatenation over ranks, in rank order, of equally shaped tensors."""
    if run.world == 1:
        return t
    parts = [torch.empty_like(t) for _ in range(run.world)]
    dist.all_gather(parts, t.contiguous())
    return torch.cat(parts)


def parallel(uae, run):
    """DistributedDataParallel around `uae` under torchrun, else `uae` itself."""
    if run.world == 1:
        return uae
    ids = [torch.device(run.device).index] if run.device.startswith('cuda') else None
    return torch.nn.parallel.DistributedDataParallel(uae, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def gather_objects(items, run):
    """Lists of picklable things of all ranks, joined."""
    if run.world == 1:
        return items
    parts = [None] * run.world
    dist.all_gather_object(parts, items)
    return [i for p in parts for i in p]


# --- addressed randomness: the same numbers at every world size, and nothing to save for a resume --------------------
def generator(*address):
    """A CPU generator that is a pure function of its address, a tuple of ints and strings."""
    digest = hashlib.blake2b(repr(address).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, 'little') >> 1)


def normal(shape, rows, *address):
    """Standard normals (len(rows), *shape); row i depends on (address, rows[i]) alone."""
    return torch.stack([torch.randn(shape, generator=generator(*address, int(r))) for r in rows])


def uniform(shape, rows, *address):
    """Uniforms in [0, 1), addressed like `normal`."""
    return torch.stack([torch.rand(shape, generator=generator(*address, int(r))) for r in rows])


# --- loading and checkpoints -----------------------------------------------------------------------------------------
def load(cls, path, **kwargs):
    """cls.from_pretrained with one clear line when the folder or hub id cannot be had."""
    try:
        return cls.from_pretrained(path, **kwargs)
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        where = os.path.join(path, kwargs.get('subfolder', ''))
        first = (str(e).strip().splitlines() or [''])[0][:160]
        raise SystemExit(f'cannot load {cls.__name__} from {where!r}: {first}')


def newest(out_dir):
    """The newest whole checkpoint in out_dir, or None. Folders named .tmp are half-written ones and never count."""
    done = [d for d in glob.glob(f'{out_dir}/step_*') if d.rsplit('_', 1)[1].isdigit()]
    return max(done, key=lambda d: int(d.rsplit('_', 1)[1]), default=None)


def find_checkpoint(c, need_projector=True):
    """The folder a run starts from: --resume's own newest, --init_from, or the shipped base of the tiny preset
    ('' where there is none and need_projector is False). --init_from=uae:DIR stays as it is, see `load_release`.

    Raises SystemExit in one line when there is none, when it is half-written, or when it belongs to other base models.
    """
    folder = newest(c.out_dir) if c.resume else None
    if not folder and not c.init_from:
        folder = os.path.dirname(c.encoder.rstrip('/'))
        if not os.path.exists(f'{folder}/projector.safetensors'):
            if not need_projector:
                return ''
            raise SystemExit(f'no trained projector next to {c.encoder!r}: give --init_from=CHECKPOINT, '
                             'made by pretrain_decoder.py (stage 0) or cold_start.py (stage 1)')
        return folder
    if not folder and c.init_from.startswith('uae:'):
        return c.init_from
    folder = folder or newest(c.init_from) or c.init_from
    if not os.path.isdir(folder):
        raise SystemExit(f'--init_from={c.init_from}: no such folder')
    if not os.path.exists(f'{folder}/projector.safetensors') or not os.path.exists(f'{folder}/meta.json'):
        raise SystemExit(f'{folder}: no checkpoint here (projector.safetensors and meta.json expected)')
    meta = read_meta(folder)
    for key in ('encoder', 'decoder', 'lora_rank', 'cond_len'):
        if meta['config'][key] != getattr(c, key):
            raise SystemExit(f'{folder} was trained with {key}={meta["config"][key]!r}, this run has {getattr(c, key)!r}; '
                             f'its preset was {meta["config"]["preset"]!r}')
    check_whole(folder, c.lora_rank)
    return folder


def stage_start(uae, parts, c, run, first):
    """A UAE whose `parts` are frozen as the stage began with them (uae.reference); after a resume, first > 0, they are loaded again."""
    if first:
        uae = type(uae)(types.SimpleNamespace(**dict(vars(c), resume=False)), run.device)
        uae.train_only(*parts)
    for part in parts:
        uae = uae.reference(part)
    return uae


def read_meta(folder):
    """A checkpoint's meta.json: {step, config}."""
    try:
        with open(f'{folder}/meta.json') as f:
            return json.load(f)
    except (OSError, ValueError) as e:
        raise SystemExit(f'{folder}/meta.json is missing or damaged: {e}')


def check_whole(folder, lora_rank):
    """Raises SystemExit in one line if a part of a checkpoint is missing or cut short; a base model would take its place."""
    lora, full = ('encoder/adapter_model.safetensors', 'decoder/pytorch_lora_weights.safetensors'), ('encoder/config.json', 'decoder/transformer/config.json')
    for part in lora if lora_rank else full:
        if not os.path.exists(f'{folder}/{part}'):
            raise SystemExit(f'{folder} is half a checkpoint: {part} is missing')
    for path in sorted(glob.glob(f'{folder}/**/*.safetensors', recursive=True)):
        try:
            with safe_open(path, 'pt'):          # reads the header, and compares it with the length of the file
                pass
        except (OSError, SafetensorError) as e:
            raise SystemExit(f'{path} is half-written or damaged: {e}')


def open_out_dir(c, run):
    """Refuses a used out_dir unless --resume; creates it. Returns the step to start from (0 for a fresh run).

    A resumed run says which keys differ from those it was begun with. From here on SIGTERM stops the run at its next checkpoint.
    """
    if os.path.isdir(c.out_dir) and os.listdir(c.out_dir) and not c.resume:
        raise SystemExit(f'{c.out_dir} is not empty: --resume continues it, --out_dir=ELSEWHERE starts anew')
    folder = newest(c.out_dir) if c.resume else None
    if run.world > 1:
        dist.barrier()
    if run.master:
        os.makedirs(c.out_dir, exist_ok=True)
    meta = read_meta(folder) if folder else dict(step=0, config={})
    if run.master:
        for k, old in json.loads(json.dumps(meta['config'])).items():
            new = json.loads(json.dumps(getattr(c, k, None)))          # a tuple comes back from JSON as a list
            if new != old and k not in ('resume', 'out_dir'):
                print(f'resume: {k}={new!r}, the run was begun with {old!r}')
        rewind(c.out_dir, meta['step'])
    watch_sigterm(True)
    return meta['step']


sigterm = types.SimpleNamespace(asked=False)


def watch_sigterm(on):
    """SIGTERM (a cluster's preemption) is only noted, for `maybe_save` to act on between two updates; off = it kills again."""
    sigterm.asked = False
    signal.signal(signal.SIGTERM, (lambda *_: setattr(sigterm, 'asked', True)) if on else signal.SIG_DFL)


def rewind(out_dir, step):
    """Drops from the logs the lines of `step` and later, which a resumed run writes again, and a half-written last line."""
    for path in (f'{out_dir}/log.jsonl', f'{out_dir}/eval.jsonl'):
        if os.path.exists(path):
            with open(path) as f:
                lines = [line for line in f if line.endswith('\n') and json.loads(line)['step'] < step]
            write_atomic(path, lambda tmp: write_lines(tmp, lines))


def write_lines(path, lines):
    with open(path, 'w') as f:
        f.writelines(lines)


def write_atomic(path, write):
    """write(temporary path), then rename: the file is whole or not there, and two ranks that write the same one do not meet."""
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    tmp = f'{path}.{os.getpid()}.tmp'
    write(tmp)
    os.replace(tmp, path)


def write_json(path, value, indent=1, **how):
    """A JSON file, whole or not there; how: further words of json.dumps."""
    write_atomic(path, lambda tmp: write_lines(tmp, [json.dumps(value, indent=indent, **how)]))


def save(c, run, step, uae, optimizer, keep=2):
    """Checkpoint out_dir/step_NNNNNN: the models (uae.save), meta.json, state.pt with optimizer and step.

    Written beside and renamed, so a kill never leaves half a checkpoint; the newest `keep` stay. Rank 0 writes.
    """
    folder = f'{c.out_dir}/step_{step:06d}'
    if run.master and not os.path.isdir(folder):
        shutil.rmtree(folder + '.tmp', ignore_errors=True)
        uae.save(folder + '.tmp')
        torch.save(dict(optimizer=optimizer.state_dict(), step=step), f'{folder}.tmp/state.pt')
        with open(f'{folder}.tmp/meta.json', 'w') as f:
            json.dump(dict(step=step, release=getattr(uae, 'release', ''), config=vars(c)), f, indent=1)
        os.replace(folder + '.tmp', folder)
        done = sorted(glob.glob(f'{c.out_dir}/step_' + '[0-9]' * 6))
        for old in done[:-keep]:
            shutil.rmtree(old)
    if run.world > 1:
        dist.barrier()
    return folder


def maybe_save(c, run, done, uae, opt):
    """Checkpoint after `done` updates: every c.save_every, at the end, and when any rank got SIGTERM; then every rank exits 0."""
    stop = total(sigterm.asked, run) > 0
    if done == c.steps or stop or c.save_every and done % c.save_every == 0:
        folder = save(c, run, done, uae, opt)
    if done == c.steps:
        watch_sigterm(False)
    elif stop:
        if run.master:
            tqdm.write(f'SIGTERM: stopped after update {done}, saved {folder}; --resume continues')
        watch_sigterm(False)
        raise SystemExit(0)


def restore(c, optimizer):
    """Loads the optimizer's state of the newest checkpoint in out_dir into `optimizer` (with --resume)."""
    folder = newest(c.out_dir) if c.resume else None
    if folder:
        try:
            state = torch.load(f'{folder}/state.pt', map_location='cpu', weights_only=True)
        except Exception as e:                   # a damaged file raises nearly anything
            raise SystemExit(f'{folder}/state.pt is missing or damaged, --resume needs it: {type(e).__name__}')
        optimizer.load_state_dict(state['optimizer'])


def add_lora(tower, rank, targets, path):
    """Puts fresh LoRA adapters (alpha = 2 rank, gaussian) on the linear layers that match, or those saved at `path`."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights='gaussian', target_modules=targets), tower)
    if os.path.exists(path):
        saved = {k.removeprefix('base_model.model.').removeprefix('transformer.'): v for k, v in load_file(path).items()}
        result = set_peft_model_state_dict(tower, saved)
        if result.unexpected_keys:
            raise SystemExit(f'{path}: not an adapter of this model; first unknown key {result.unexpected_keys[0]}')


def save_lora(encoder, decoder, folder):
    """Writes both towers' adapters: encoder/ in peft's layout, decoder/ as load_lora_weights of StableDiffusion3Pipeline reads it, alpha included."""
    from diffusers import StableDiffusion3Pipeline
    from peft import get_peft_model_state_dict
    os.makedirs(f'{folder}/encoder', exist_ok=True)
    adapter = {f'base_model.model.{k}': v for k, v in get_peft_model_state_dict(encoder).items()}
    save_file(adapter, f'{folder}/encoder/adapter_model.safetensors')
    encoder.peft_config['default'].save_pretrained(f'{folder}/encoder')
    StableDiffusion3Pipeline.save_lora_weights(f'{folder}/decoder', get_peft_model_state_dict(decoder),
                                               transformer_lora_adapter_metadata=decoder.peft_config['default'].to_dict())


def pooled_of_nothing(c, width):
    """pooled_projections (1, width): the constant pooled CLIP-L + CLIP-G embedding of the empty string, computed once by
    the decoder's own text encoders and cached; zeros where the decoder comes without text encoders (the tiny one)."""
    if os.path.isdir(c.decoder) and not os.path.isdir(f'{c.decoder}/text_encoder'):
        return torch.zeros(1, width)
    cache = os.path.join('out', 'pooled-' + c.decoder.strip('/').replace('/', '--') + '.safetensors')
    if not os.path.exists(cache):
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer
        parts = []
        for i in ('', '_2'):
            ids = load(CLIPTokenizer, c.decoder, subfolder=f'tokenizer{i}')('', padding='max_length', return_tensors='pt').input_ids
            with torch.no_grad():
                parts.append(load(CLIPTextModelWithProjection, c.decoder, subfolder=f'text_encoder{i}')(ids).text_embeds)
        write_atomic(cache, lambda path: save_file(dict(pooled=torch.cat(parts, -1).float()), path))
    return load_file(cache)['pooled']


# --- the authors' release: --init_from=uae:DIR -------------------------------------------------------------------------
RELEASE_SCALE = 2.0          # alpha / rank of adapters that come without their configuration: the release's own 64 / 32


def find_release(ckpt):
    """The release's folder below a start 'uae:DIR' or below the adapters of a checkpoint that began there, '' = none."""
    if ckpt.startswith('uae:'):
        return os.path.abspath(ckpt.removeprefix('uae:'))
    return read_meta(ckpt).get('release', '') if os.path.exists(f'{ckpt}/meta.json') else ''


def released_key(key):
    """A tensor's name in the release -> (name in our modules, 'A' or 'B' if it is one factor of a LoRA pair, else '').

    Whoever wrapped the model (peft, DistributedDataParallel) and whichever transformers named its parts, Qwen's become
    model.language_model.*, model.visual.*, lm_head.*; Sequential's projector.0 and .2 become projector.up and .down.
    """
    key = re.sub(r'^(module\.|transformer\.)+|base_model\.(model\.)?|\.base_layer(?=\.)', '', key)
    pair = re.fullmatch(r'(.+)\.lora_([AB])(\.default)?\.weight', key)
    key, factor = (f'{pair[1]}.weight', pair[2]) if pair else (key, '')
    key = re.sub(r'^(model\.)?projector\.([02])\.', lambda m: {'0': 'projector.up.', '2': 'projector.down.'}[m[2]], key)
    key = re.sub(r'^(model\.)?visual\.', 'model.visual.', key)
    return re.sub(r'^(model\.)?(language_model\.)?(model\.)?(layers|embed_tokens|norm)\.', r'model.language_model.\4.', key), factor


def shards(folder):
    """Yields (place, key, read) of every tensor in a folder's safetensors, those of its index where it has one."""
    paths = sorted(glob.glob(f'{folder}/*.safetensors'))
    for index in glob.glob(f'{folder}/*.safetensors.index.json'):
        with open(index) as f:
            paths = sorted({os.path.join(folder, name) for name in json.load(f)['weight_map'].values()})
    if not paths:
        raise SystemExit(f'{folder}: no safetensors here')
    for path in paths:
        try:
            with safe_open(path, 'pt') as f:
                for key in f.keys():
                    yield f'{path}: {key}', key, lambda: f.get_tensor(key)
        except (OSError, SafetensorError) as e:
            raise SystemExit(f'{path} is missing or damaged: {e}')


def lora_scale(folder):
    """alpha / rank of the adapters in a folder."""
    if not os.path.exists(f'{folder}/adapter_config.json'):
        return RELEASE_SCALE
    with open(f'{folder}/adapter_config.json') as f:
        config = json.load(f)
    odd = [k for k in ('use_dora', 'use_rslora', 'rank_pattern', 'alpha_pattern', 'fan_in_fan_out', 'modules_to_save') if config.get(k)]
    if odd or config.get('bias', 'none') != 'none':
        raise SystemExit(f'{folder}/adapter_config.json: only plain LoRA can be read, this has {" ".join(odd) or "bias"}')
    return config['lora_alpha'] / config['r']


@torch.no_grad()
def overlay(state, folder):
    """Writes a folder's tensors over `state`, {our name: tensor}, in place: whole weights replace, LoRA pairs are added as
    alpha / rank B A. Nothing has to be there, but what is there has to fit: else SystemExit in one line."""
    pairs, scale = {}, lora_scale(folder)
    for place, key, read in shards(folder):
        name, factor = released_key(key)
        if name not in state:
            raise SystemExit(f'{place}: unknown key, the model has no {name!r}')
        tensor = read()
        if factor:
            pairs.setdefault(name, {})[factor] = tensor
        elif tensor.shape != state[name].shape:
            raise SystemExit(f'{place}: shape {tuple(tensor.shape)}, the model has {tuple(state[name].shape)}')
        else:
            state[name].copy_(tensor)
    for name, pair in pairs.items():
        if len(pair) < 2:
            raise SystemExit(f'{folder}: half a LoRA pair at {name!r}')
        if (pair['B'].shape[0], pair['A'].shape[1]) != tuple(state[name].shape):
            raise SystemExit(f'{folder}: the LoRA pair at {name!r} is for {pair["B"].shape[0]}x{pair["A"].shape[1]}, the model has {tuple(state[name].shape)}')
        state[name].add_((scale * pair['B'].float() @ pair['A'].float()).to(state[name].device))


def load_release(folder, dtype):
    """Reads the layout of the authors' release -> encoder, decoder, {name: tensor} of the projector.

    llm: Qwen2.5-VL with the projector in its shards; llm_lora (optional): the weights of stage 2, whole ones or LoRA pairs,
    which win over llm's; dit: the transformer; dit_lora (optional): its adapter in peft's layout, added in.
    """
    from diffusers import SD3Transformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration
    for part in ('llm', 'dit'):
        if not os.path.isdir(f'{folder}/{part}'):
            raise SystemExit(f'--init_from=uae:{folder}: no folder {part} in it (llm, dit and, if there, llm_lora, dit_lora, llm_processor are read)')
    encoder, seen = load(Qwen2_5_VLForConditionalGeneration, f'{folder}/llm', dtype=dtype, output_loading_info=True)
    decoder, drawn = load(SD3Transformer2DModel, f'{folder}/dit', torch_dtype=dtype, output_loading_info=True)
    unknown = [k for k in seen['unexpected_keys'] if not released_key(k)[0].startswith('projector.')]
    for part, kind, keys in (('llm', 'missing', seen['missing_keys']), ('llm', 'unknown', unknown),
                             ('dit', 'missing', drawn['missing_keys']), ('dit', 'unknown', drawn['unexpected_keys'])):
        if keys:
            raise SystemExit(f'{folder}/{part}: {len(keys)} {kind} keys, first {min(keys)!r}')
    found = ((released_key(key)[0], read) for _, key, read in shards(f'{folder}/llm'))
    projector = {name.removeprefix('projector.'): read().float() for name, read in found if name.startswith('projector.')}
    d, D = encoder.config.text_config.hidden_size, decoder.config.joint_attention_dim
    need = {'up.weight': (2 * D, d), 'up.bias': (2 * D,), 'down.weight': (D, 2 * D), 'down.bias': (D,)}
    if {k: tuple(v.shape) for k, v in projector.items()} != need:
        raise SystemExit(f'{folder}/llm: expected projector.0 and projector.2 that take {d} to {2 * D} to {D} dimensions, '
                         f'found {", ".join(f"{k} {tuple(v.shape)}" for k, v in sorted(projector.items())) or "none"}')
    state = {**encoder.state_dict(), **{f'projector.{k}': v for k, v in projector.items()}}
    for part, over in (('llm_lora', state), ('dit_lora', decoder.state_dict())):
        if os.path.isdir(f'{folder}/{part}'):
            overlay(over, f'{folder}/{part}')
    return encoder, decoder, projector


# --- decoding --------------------------------------------------------------------------------------------------------
def next_state(lm, x, position, cache):
    """One more token of every row through a Qwen2.5 language model, without what its own forward does besides (masks, wrappers, the keys copied to
    each head, seven kernels a norm): 1.3 times as fast where kernels are small. x (B, 1, d) embedded tokens, `position` theirs; grows `cache`. -> (B, 1, d)."""
    def norm(m, x):
        return torch.rms_norm(x, m.weight.shape, m.weight, m.variance_epsilon)

    angle = position * lm.rotary_emb.inv_freq.float()
    cos, sin = (a.to(x.dtype) for a in (torch.cat([angle, angle]).cos(), torch.cat([-angle, angle]).sin()))
    for i, layer in enumerate(lm.layers):
        a, h = layer.self_attn, norm(layer.input_layernorm, x)
        q, k, v = (p(h).view(len(x), -1, 1, a.head_dim) for p in (a.q_proj, a.k_proj, a.v_proj))
        qk = torch.cat([q, k], 1)
        qk = torch.addcmul(qk * cos, qk.roll(a.head_dim // 2, -1), sin)                   # rotary embedding: halves swapped, the first negated
        q, (k, v) = qk[:, :q.shape[1]], cache.update(qk[:, q.shape[1]:], v, i)
        o = torch.nn.functional.scaled_dot_product_attention(q.reshape(len(x), k.shape[1], -1, a.head_dim), k, v)       # heads that share a key, as rows of one query
        x = x + a.o_proj(o.reshape(len(x), 1, -1))
        x = x + layer.mlp(norm(layer.post_attention_layernorm, x))
    return norm(lm.norm, x)


# --- optimisation ----------------------------------------------------------------------------------------------------
def lr_at(step, c):
    """Learning rate of an update: linear warm-up over c.warmup updates, then a cosine that reaches 0 at update
    c.lr_decay * c.steps; constant if c.lr_decay is 0."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    if not c.lr_decay:
        return c.lr
    done = (step - c.warmup) / max(1, c.lr_decay * c.steps - c.warmup)
    return c.lr * 0.5 * (1 + math.cos(math.pi * min(1, done)))


def image_slices(P, G, size):
    """Slices of range(P) that hold whole groups of G, at most `size` samples where that is possible; size 0 = all."""
    k = max(1, size // G) if size else P
    return [slice(i, min(i + k, P)) for i in range(0, P, k)]


def group_slices(seen, G, size):
    """Micro-batches of B = P*G samples in contiguous groups: yields (seen of their images, slice of the samples, last).

    seen: tensors with the images in front; size: samples per micro-batch, 0 = all. Smaller than G splits a group.
    """
    cuts = []
    for i in image_slices(len(seen[0]), G, size):
        rows = range(i.start * G, i.stop * G)
        step = min(size or len(rows), len(rows))
        cuts += [(i, slice(b, min(b + step, rows.stop))) for b in range(rows.start, rows.stop, step)] if step < G else [(i, slice(rows.start, rows.stop))]
    for n, (i, b) in enumerate(cuts):
        yield tuple(t[i] for t in seen), b, n == len(cuts) - 1


def no_sync(ddp, skip):
    """Context in which the backward pass of a DistributedDataParallel does not synchronise gradients, if `skip`."""
    return ddp.no_sync() if skip and hasattr(ddp, 'no_sync') else contextlib.nullcontext()


def optimise(opt, params, step, c):
    """One optimiser step at the scheduled learning rate on clipped gradients -> log fields grad_norm (before clipping), lr, bad_steps.

    A non-finite gradient (the same on every rank, gradients being synchronised; a non-finite loss makes one) skips the step;
    c.patience skipped ones in a row end the run. bad_steps counts those in a row so far.
    """
    for group in opt.param_groups:
        group['lr'] = lr_at(step, c)
    norm = torch.nn.utils.clip_grad_norm_(params, c.grad_clip).item()
    opt.bad = 0 if math.isfinite(norm) else getattr(opt, 'bad', 0) + 1
    if not opt.bad:
        opt.step()
    elif opt.bad >= c.patience:
        raise SystemExit(f'{opt.bad} steps in a row with a non-finite gradient, the last one {step}; last good checkpoint: {newest(c.out_dir)}')
    opt.zero_grad(set_to_none=True)
    return dict(grad_norm=norm if not opt.bad else -1.0, lr=group['lr'], bad_steps=opt.bad)


# --- log -------------------------------------------------------------------------------------------------------------
class Stats:
    """Statistics of a step's micro-batches: losses add up, names with `max` or `diff` keep the largest, the rest are
    means weighted by the valid entries of each micro-batch."""

    def __init__(self):
        self.rows = []

    def add(self, weight=1, **stats):
        self.rows.append(dict({k: float(v) for k, v in stats.items()}, weight=float(weight)))

    def reduce(self, run):
        """{name: number} over micro-batches and ranks (a loss is the mean over ranks)."""
        names = sorted(self.rows[0])
        table = torch.tensor([[row[k] for k in names] for row in self.rows], dtype=torch.float64, device=run.device)
        table = dict(zip(names, gather(table, run).T))
        weight = table.pop('weight')
        return {k: (v.max() if 'max' in k or 'diff' in k else v.sum() / run.world if k == 'loss' else (v * weight).sum() / weight.sum()).item()
                for k, v in table.items()}


def reward_fields(r):
    """Log fields of rewards (P, G) of all ranks: mean, std inside the groups, share of groups that teach nothing."""
    return dict(reward=r.mean().item(), reward_std=r.std(1).mean().item(), zero_var=(r == r[:, :1]).all(1).float().mean().item())


# what a stage has no use for keeps its value here, so that every line of every stage has the same fields
NEUTRAL = dict(reward=0.0, reward_std=0.0, zero_var=0.0, ratio_max=1.0, logp_diff=0.0, kl=0.0, clip_frac=0.0)


class Log:
    """One printed line and one JSON line in out_dir/log.jsonl per step, rank 0 only; wandb if asked."""

    def __init__(self, c, run):
        self.master, self.path, self.wandb, self.t = run.master, f'{c.out_dir}/log.jsonl', None, time.time()
        if self.master and c.wandb:
            import wandb
            self.wandb = wandb.init(project=c.wandb, config=vars(c))

    def __call__(self, step, **fields):
        """Prints and appends; floats are rounded in print only. Adds `sec` since the last line and `peak_gb`."""
        now = time.time()
        fields = dict(NEUTRAL, **fields, sec=now - self.t, peak_gb=peak_memory())
        self.t = now
        if not self.master:
            return
        text = ' '.join(f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k, v in fields.items())
        tqdm.write(f'step {step:4d} | {text}')
        with open(self.path, 'a') as f:
            f.write(json.dumps(dict(step=step, **fields)) + '\n')
        if self.wandb:
            self.wandb.log(fields, step=step)


def peak_memory():
    """Peak memory so far in GB: of the CUDA device, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == 'darwin' else 1e6)


def quiet():
    """Silences the libraries' own progress bars and advice, so that a run's lines are its own."""
    import diffusers
    import transformers
    for lib in (transformers, diffusers):
        lib.utils.logging.set_verbosity_error()
        lib.utils.logging.disable_progress_bar()


# --- plan: what a stage needs on one GPU, before anything is downloaded ------------------------------------------------
ALLOWANCE = 2.0                 # GB: CUDA context, kernels' workspace, logits in chunks, what a rollout holds


def skeleton(c, device='meta'):
    """A UAE, the reward's CLIP tower and the judge without weights, or on another device with random ones; configs from local folders or config.architectures."""
    import config
    import model
    import open_clip
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import AutoConfig, AutoModel, AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    def read(name, sub='', file='config.json'):
        if name in config.architectures:
            return config.architectures[name][sub] if sub else config.architectures[name]
        try:
            with open(os.path.join(name, sub, file)) as f:
                return json.load(f)
        except (OSError, ValueError) as e:
            raise SystemExit(f'--plan knows {", ".join(config.architectures)} and local folders, not {name!r}: {e}')

    uae = model.UAE.__new__(model.UAE)
    torch.nn.Module.__init__(uae)
    uae.c, uae.device, dtype = types.SimpleNamespace(**vars(c)), torch.device('cpu' if device == 'meta' else device), getattr(torch, c.dtype)
    with torch.device(device):
        uae.encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(read(c.encoder))).to(dtype)
        uae.decoder = SD3Transformer2DModel.from_config(read(c.decoder, 'transformer')).to(dtype)
        uae.vae = AutoencoderKL.from_config(read(c.decoder, 'vae')).to(dtype)
        uae.projector = model.Projector(uae.encoder.config.text_config.hidden_size, uae.decoder.config.joint_attention_dim)
        if c.lora_rank:
            add_lora(uae.encoder, c.lora_rank, model.ENCODER_LORA, '')
            add_lora(uae.decoder, c.lora_rank, model.DECODER_LORA, '')
        clip = c.clip.removeprefix('local-dir:')
        clip = read(clip, file='open_clip_config.json')['model_cfg'] if clip != c.clip else open_clip.get_model_config(c.clip.split(':')[0])
        tower, judge = open_clip.CLIP(**clip).visual, AutoModel.from_config(AutoConfig.for_model(**read(c.judge)))
    uae.words = len(c.caption_prompt.split()) * 4 // 3 + 21         # the prompt's text tokens, about; exactly where there is a tokenizer
    if os.path.isdir(c.encoder):
        uae.processor = load(AutoProcessor, c.encoder)
        uae.tokenizer = uae.processor.tokenizer
        uae.templates()
        uae.words = len(uae.before_image + uae.after_image)
    uae.register_buffer('pooled', torch.full((1, uae.decoder.config.pooled_projection_dim), float(c.decoder in config.architectures)))
    uae.register_buffer('forbidden', torch.zeros(uae.head.weight.shape[0], dtype=torch.bool))
    return tuple(m.requires_grad_(False).eval() for m in (uae, tower, judge))


def kept_by_autograd(uae, tower, trained):
    """Bytes that autograd keeps for the backward pass of one micro-batch, weights not counted, and its size B.

    The stage's way from what it trains to its loss runs once on tensors without storage (FakeTensorMode), with everything
    that is sampled replaced by zeros of the same shape, and the storages that are saved for backward are added up.
    """
    from model import token_logp
    c, lm, kept = uae.c, uae.encoder.model.language_model, {}
    d, vision, T = lm.config.hidden_size, uae.encoder.config.vision_config, c.caption_len
    share = (getattr(c, 'batch', 0) or c.prompts * getattr(c, 'group', 1)) // int(os.environ.get('WORLD_SIZE', 1))
    B = share if hasattr(c, 'batch') or not c.micro_batch else min(share, c.micro_batch)
    L = round(c.resolution / vision.patch_size / vision.spatial_merge_size) ** 2 + uae.words                          # the prompt: image and text

    def loss(u):
        out = []
        if trained == ('encoder',) or 'encoder' in trained and hasattr(c, 'train_encoder'):
            h = lm(inputs_embeds=torch.zeros(B, L + T, d), position_ids=torch.zeros(3, B, L + T, dtype=torch.long), use_cache=False).last_hidden_state
            out.append(token_logp(h[:, -T - 1:-1], u.head, torch.zeros(B, T, dtype=torch.long), 1.0, u.forbidden))
        if trained == ('encoder',):
            return out
        n = B * min(getattr(c, 'train_steps', 1), c.sample_steps - 1)             # denoising steps are replayed in one forward
        z, s, cond = torch.zeros(n, *u.latent_shape()), torch.zeros(n), torch.zeros(n, c.cond_len * (1 + (c.condition == 'text+image')), u.projector.down.out_features)
        for i in range(getattr(c, 'grad_steps', 1 + bool(getattr(c, 'lambda_t2i', 0)))):
            if 'projector' in trained and not (i and hasattr(c, 'grad_steps')):
                with torch.set_grad_enabled('encoder' in trained):
                    h = lm(inputs_embeds=torch.zeros(*cond.shape[:2], d), use_cache=False).last_hidden_state
                cond = u.projector(h.to(u.projector.up.weight.dtype))
            z = z - u.velocity(z, s, cond)
        if hasattr(c, 'grad_steps'):
            z = tower(torch.nn.functional.interpolate(u.to_image(z), tower.image_size, mode='bicubic', antialias=True))
        return out + [z]

    def keep(t):
        kept[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), uae.autocast():
        end = uae(loss)                          # alive until the storages are counted
    own = {t.untyped_storage()._cdata for m in (uae, tower) for t in m.state_dict(keep_vars=True).values()}
    return sum(s.nbytes() for k, s in kept.items() if k not in own), B, end


def plan(c, *trained):
    """Prints weights, gradients, optimizer and activations of a stage that trains the named parts; returns them as a dict."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    quiet()
    uae, tower, judge = skeleton(c)
    uae.c.checkpointing = True
    uae.train_only(*trained)
    rows, GB = {}, lambda tensors: sum(t.numel() * t.element_size() for t in tensors) / 1e9
    world, towers = int(os.environ.get('WORLD_SIZE', 1)), (('reward', tower), ('judge', judge)) if hasattr(c, 'prompts') else ()        # stage 0 has no reward
    print(f'memory of one GPU of {world} in GB = 1e9 bytes, preset {c.preset}\n{"":12s} parameters   weights   trained  gradients   AdamW  reference')
    for name, m in (*((k, getattr(uae, k)) for k in ('encoder', 'projector', 'decoder', 'vae')), *towers):
        grads = [p for p in m.parameters() if p.requires_grad]
        r = rows[name] = dict(parameters=sum(p.numel() for n, p in m.named_parameters() if 'lora_' not in n), weights=GB([*m.parameters(), *m.buffers()]),
                              trained=sum(p.numel() for p in grads), gradients=GB(grads), adamw=2 * GB(grads), reference=GB(grads) if getattr(c, 'kl', 0) else 0.0)
        print(f'{name:12s} {r["parameters"] / 1e9:8.4f} B {r["weights"]:9.3f} {r["trained"] / 1e6:7.2f} M {r["gradients"]:10.3f} {r["adamw"]:7.3f} {r["reference"]:10.3f}')
    with FakeTensorMode():                       # the same modules, their weights without storage and as if on the CPU
        twin = {}
        for m in (*uae.modules(), *tower.modules()):
            for group in (m._parameters, m._buffers):
                for k, t in group.items():
                    if t is not None and id(t) not in twin:
                        new = torch.empty(t.shape, dtype=t.dtype)
                        twin[id(t)] = torch.nn.Parameter(new, t.requires_grad) if isinstance(t, torch.nn.Parameter) else new
                    group[k] = None if t is None else twin[id(t)]
        kept = {}
        for ck in (True, False):
            uae.c.checkpointing = ck
            (uae.decoder.enable_gradient_checkpointing if ck else uae.decoder.disable_gradient_checkpointing)()
            kept[ck], B, _ = kept_by_autograd(uae, tower, trained)
    layers = dict(encoder=uae.encoder.config.text_config.num_hidden_layers, decoder=uae.decoder.config.num_layers)
    blocks = min(layers[part] for part in trained if part in layers)
    again, fixed = (kept[False] - kept[True]) / blocks / 1e9, sum(r[k] for r in rows.values() for k in ('weights', 'gradients', 'adamw', 'reference'))
    total = {True: fixed + kept[True] / 1e9 + again, False: fixed + kept[False] / 1e9}
    print(f'activations of a micro-batch of {B}: {kept[True] / 1e9:.3f} kept + {again:.3f} of one recomputed block with checkpointing, {kept[False] / 1e9:.3f} without')
    for ck in (True, False):
        fits = ', '.join(f'{"fits" if total[ck] + ALLOWANCE < size else "does not fit"} {size} GB' for size in (24, 80))
        print(f'total {"with   " if ck else "without"} checkpointing: {total[ck]:.2f} + {ALLOWANCE} for CUDA and the rollout: {fits}{" (this run)" if ck == c.checkpointing else ""}')
    return dict(rows, kept=kept, total=total, B=B)
