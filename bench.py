"""What a step costs: each stage beside the bare cost of its networks, beside a peer's way to the same gradient, and as its sizes grow.

    python bench.py                                                         # every stage: split, limit, list of network calls
    python bench.py --peer=flow_grpo --prompts=4 --group=8                  # grpo_decoder.py beside Flow-GRPO's step
    python bench.py --part=growth --json=out/growth.json                    # P, G, T, S times 1, 2, 4, 8
    python bench.py --random=True --preset=medium --resolution=512          # published sizes, random weights, nothing downloaded

Stage keys and shared keys are taken too (--prompts=2 --group=8 --guidance=4.5 --preset=paper). What is compared is measured in turn in
one run; every number is a median. Captions are always exactly caption_len tokens (the end token is forbidden), so that sizes are what they say.
With one thread on a CPU the clock is the process's own CPU time, else wall time. `limit` is the time of a step, data and optimiser apart, over the summed
times of the forward and backward passes that its mathematics needs, on inputs of the same shape and dtype.
"""
import collections
import functools
import importlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import types

import torch

import cold_start
import common
import config
import grpo_decoder
import grpo_encoder
import model
from data.images import open_data
from reward import backbone

# --- script keys ---------------------------------------------------------------------------------------------------
keys = dict(
    part = 'stages',           # stages | growth | compile | ranks
    stage = '',                # cold_start | grpo_encoder | grpo_decoder; '' = all three (growth, ranks: the last two)
    peer = '',                 # a comparison of tests/peers in place of a part: flow_grpo | full_logits (TRL has its own script there)
    pairs = 7,                 # measurements of each side, in turn, after two that do not count
    random = False,            # random weights in the published sizes of the preset's models: nothing is loaded or downloaded
    layers = 0,                # of every network with random weights; 0 = as published
    heads = 0,                 # attention heads of every network with random weights, which sets its width; 0 = as published
    json = '',                 # file for everything that was measured
)
own_presets = {}
# -------------------------------------------------------------------------------------------------------------------
STAGES = dict(cold_start=cold_start, grpo_encoder=grpo_encoder, grpo_decoder=grpo_decoder)
TRAINED = dict(cold_start=('encoder', 'projector', 'decoder'), grpo_encoder=('encoder',), grpo_decoder=('decoder',))
spent = collections.Counter()  # seconds of the present step by part: rollout, update, and what `watch` has been told to watch


def clock():
    """Seconds; of this process where it is alone on one CPU thread, else of the wall, after the device has finished."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def watch(owner, name, label):
    """Adds the seconds of every call of owner.name to spent[label]; a call inside such a call counts once."""
    call, inside = getattr(owner, name), []

    def watched(*args, **kwargs):
        if inside:
            return call(*args, **kwargs)
        inside.append(1)
        start = clock()
        out = call(*args, **kwargs)
        spent[label] += clock() - start
        inside.clear()
        return out
    setattr(owner, name, watched)


def seconds(call):
    """Seconds of one call, gradients dropped afterwards by the caller."""
    start = clock()
    call()
    return clock() - start


# --- models with random weights in published sizes -----------------------------------------------------------------------
def shrunk(arch, layers, heads):
    """A published architecture with fewer layers and heads (0 = as they are); a head keeps its width."""
    arch = {k: dict(v) if isinstance(v, dict) else v for k, v in arch.items()}
    for net in (arch[k] for k in ('text_config', 'vision_config', 'transformer') if k in arch):
        depth, count = ('depth', 'num_heads') if 'depth' in net else ('num_layers' if 'num_layers' in net else 'num_hidden_layers', 'num_attention_heads')
        if heads:
            scale, net[count] = heads / net[count], heads
            net.update({k: int(net[k] * scale) for k in ('hidden_size', 'intermediate_size', 'caption_projection_dim') if k in net})
            net.update({k: min(net[k], heads) for k in ('num_key_value_heads',) if k in net})
        if layers:
            net[depth] = layers
            net.update({k: [i for i in net[k] if i < layers] for k in ('fullatt_block_indexes', 'dual_attention_layers') if k in net})
    if heads and 'vision_config' in arch:
        arch['vision_config']['out_hidden_size'] = arch['text_config']['hidden_size']
    return arch


def random_uae(c, b, device):
    """UAE(c) with random weights in the published sizes of c.encoder and c.decoder; the tokenizer is the tiny one."""
    load, pooled = common.load, model.pooled_of_nothing

    def build(cls, path, subfolder='', **_):
        if cls.__name__ == 'AutoProcessor':
            processor = load(cls, config.shared['encoder'])
            processor.image_processor.patch_size = config.architectures[path]['vision_config']['patch_size']
            processor.image_processor.size = dict(shortest_edge=1, longest_edge=2 ** 30)
            return processor
        arch = shrunk(config.architectures[path], b.layers, b.heads)
        net = cls.from_config(arch[subfolder]) if subfolder else cls(cls.config_class(**arch))
        return net if subfolder == 'scheduler' else net.to(getattr(torch, c.dtype))
    common.load, model.pooled_of_nothing = build, lambda c, width: torch.zeros(1, width)
    try:
        with torch.device(device):
            return model.UAE(c, device, new_projector=True)
    finally:
        common.load, model.pooled_of_nothing = load, pooled


def prepare(b, stage, words, **changes):
    """Everything that a step of `stage` needs: configuration, models, a batch of images, optimiser."""
    script = STAGES[stage]
    own = {**config.shared, **script.keys}
    words = [w for w in words if w.split('=')[0][2:] in own or w.startswith('--preset=')] + [f'--{k}={v}' for k, v in changes.items() if k in own]
    c = config.parse(script.keys, script.own_presets, words, script.__file__)
    run = common.start(c)
    if b.random:
        c.clip, c.data = c.clip.split(':')[0] + ':' if not c.clip.startswith('local-dir:') else c.clip, ''
    m = types.SimpleNamespace(stage=stage, script=script, c=c, uae=random_uae(c, b, run.device) if b.random else model.UAE(c, run.device))
    m.uae.forbidden[m.uae.end] = True
    m.tower = backbone(c.reward, c, run.device)
    m.params = m.uae.train_only(*TRAINED[stage])
    m.neg = m.uae.negative() if c.guidance != 1.0 and stage == 'grpo_decoder' else None
    m.ref = m.uae.reference(TRAINED[stage][0]) if getattr(c, 'kl', 0) else None
    m.opt = torch.optim.AdamW(m.params, lr=c.lr, weight_decay=0.0)
    m.G, m.rollout = getattr(c, 'group', 1), lambda: decoder_rollout(m)
    m.data = (lambda train=open_data(c, run)[0]: train.batch(c.seed, 0, c.prompts)) if c.data else (lambda: dict(
        x=torch.rand(c.prompts, 3, c.resolution, c.resolution) * 2 - 1, index=torch.arange(c.prompts)))
    batch = m.data()
    m.x, m.index = batch['x'].to(run.device), batch['index']
    if m.ref:
        watch(m.ref, 'velocity', 'dit')
    for owner, name, label in ((m.uae, 'see', 'captions'), (m.uae, 'sample_captions', 'captions'), (m.uae, 'condition', 'condition'),
                               (m.uae, 'velocity', 'dit'), (m.uae, 'to_image', 'vae'), (m.tower, 'features', 'reward')):
        watch(owner, name, label)
    return m


# --- one step of each stage, as its script does it, without data, optimiser and log: yields the name of each part that is done -----
def cold_start_step(m):
    c, uae = m.c, m.uae
    z = common.normal(uae.latent_shape(), m.index, c.seed, 'start', 0).to(uae.device)
    with torch.no_grad():
        seen = uae.see(m.x)
        y, mask, _ = uae.sample_captions(seen, 1, c.cold_temperature, common.uniform((c.caption_len,), m.index, c.seed, 'token', 0).to(uae.device))
    yield 'rollout'
    for s, b, _ in common.group_slices(seen, 1, c.micro_batch):
        uae(cold_start.loss_of, m.tower, m.x[b], s, y[b], mask[b], z[b], 1 / c.prompts, c).backward()
    yield 'update'


def grpo_encoder_step(m):
    c = m.c
    parts = [grpo_encoder.rollout(m.uae, m.tower, m.x[i], m.index[i], 0, c) for i in common.image_slices(len(m.x), c.group, c.micro_batch)]
    seen = tuple(torch.cat(t) for t in zip(*(p[0] for p in parts)))
    y, mask, old_logp, r = (torch.cat(t) for t in list(zip(*parts))[1:])
    adv = grpo_encoder.group_advantage(r).flatten()
    yield 'rollout'
    for s, b, _ in common.group_slices(seen, c.group, c.micro_batch):
        with torch.no_grad():
            ref_logp = m.ref.caption_logp(s, y[b], c.temperature) if c.kl else old_logp[b]
        m.uae(grpo_encoder.loss_of, s, y[b], mask[b], old_logp[b], ref_logp, adv[b], 1 / mask.sum().item(), c)[0].backward()
    yield 'update'


def decoder_rollout(m):
    parts = [grpo_decoder.rollout(m.uae, m.tower, m.x[i], m.index[i], 0, m.c, m.neg) for i in common.image_slices(len(m.x), m.G, m.c.micro_batch)]
    cond, z, z_next, *v0, old_logp, r, _ = (torch.cat(t) for t in zip(*parts))
    return cond, z, z_next, old_logp, grpo_decoder.group_advantage(r).flatten(), v0


def grpo_decoder_step(m):
    cond, z, z_next, old_logp, adv, v0 = decoder_rollout(m)
    yield 'rollout'
    for _, b, _ in common.group_slices((m.x,), m.G, m.c.micro_batch):
        known = [t[b] for t in v0]
        m.uae(grpo_decoder.loss_of, m.ref, cond[b], z[b], z_next[b], old_logp[b], adv[b], 0, 1 / len(adv), m.c, m.neg, known)[0].backward()
    yield 'update'


STEPS = dict(cold_start=cold_start_step, grpo_encoder=grpo_encoder_step, grpo_decoder=grpo_decoder_step)


def measure(m, step=None):
    """One step of m.stage (or the named one): {part: seconds}, where `total` leaves data and optimiser out. Gradients stay."""
    spent.clear()
    spent['data'] = seconds(m.data)
    for p in m.params:
        p.grad = None
    last = first = clock()
    for part in STEPS[step or m.stage](m):
        now = clock()
        spent[part], last = now - last, now
        spent[f'{part} dit'] = spent['dit'] - spent['rollout dit']
    return dict(spent, total=last - first)


def medians(rows):
    return {k: statistics.median(r.get(k, 0.0) for r in rows) for k in rows[-1]}


# --- the bare networks ---------------------------------------------------------------------------------------------------
def networks(m):
    """The networks of stage m.stage by name, each called with a number of rows, on inputs of the step's shapes and dtypes."""
    c, uae, lm, device = m.c, m.uae, m.uae.encoder.model.language_model, m.uae.device
    from transformers import DynamicCache
    pixels = uae.processor.image_processor(images=[torch.zeros(3, c.resolution, c.resolution, dtype=torch.uint8)], return_tensors='pt')
    pixels, grid = pixels['pixel_values'].to(device), pixels['image_grid_thw'].to(device)
    T, L = c.caption_len, len(uae.before_image) + int(grid.prod()) // uae.encoder.config.vision_config.spatial_merge_size ** 2 + len(uae.after_image)
    attend = (torch.arange(c.cond_len, device=device) < len(uae.before_text) + T + len(uae.after_text)).long()

    def run(n, width, **how):
        return lm(inputs_embeds=uae.embed(torch.zeros(n, width, dtype=torch.long, device=device)), **how).last_hidden_state

    def cached(n, width, start, cache):
        return run(n, width, position_ids=start + torch.arange(width, device=device).expand(3, n, width), past_key_values=cache, use_cache=True)

    def prefill(n, G):
        cache = DynamicCache(config=uae.encoder.config.text_config)
        h = cached(max(1, n // G), L, 0, cache)[:, -1:].repeat_interleave(min(n, G), 0)
        cache.batch_repeat_interleave(min(n, G))
        return cache, h

    def captions(n, G):
        cache, h = prefill(n, G)
        for t in range(T):
            uae.head(h)
            h = cached(n, 1, L + t, cache) if t < T - 1 else None

    def scores(n):
        cache, h = prefill(n, m.G)
        return uae.head(torch.cat([h, cached(n, T, L, cache)], 1)[:, :-1])

    def decoder(n, leaf=False, chained=False):
        z = torch.randn(n, *uae.latent_shape(), device=device, dtype=uae.decoder.dtype, requires_grad=chained)
        cond = torch.randn(n, c.cond_len, uae.decoder.config.joint_attention_dim, device=device, dtype=z.dtype, requires_grad=leaf)
        return uae.decoder(hidden_states=z, timestep=torch.full((n,), 500.0, device=device), encoder_hidden_states=cond,
                           pooled_projections=uae.pooled.expand(n, -1).to(z.dtype), return_dict=False)[0]

    side = m.tower.pre['crop']
    return types.SimpleNamespace(
        vision=lambda n: uae.encoder.model.get_image_features(pixels.repeat(n, 1), grid.repeat(n, 1)), captions=captions, scores=scores, decoder=decoder,
        text=lambda n: uae.projector(run(n, c.cond_len, attention_mask=attend.expand(n, -1), use_cache=False).to(uae.projector.up.weight.dtype)),
        vae=lambda n, leaf=False: uae.vae.decode(torch.randn(n, *uae.latent_shape(), device=device, dtype=uae.vae.dtype, requires_grad=leaf)).sample,
        clip=lambda n, leaf=False: m.tower.tower(torch.randn(n, 3, side, side, device=device, requires_grad=leaf)))


def network_calls(m):
    """What the mathematics of one step needs from the networks: [(text, how often, call)]."""
    c, net, G, S, guided = m.c, networks(m), m.G, m.c.sample_steps, m.c.guidance != 1.0
    if c.condition != 'text' or c.checkpointing or c.reward != 'clip':
        raise SystemExit('the limit is known for --condition=text --reward=clip --checkpointing=False')
    B = len(m.x) * G
    rows = min(B, max(1, c.micro_batch // G) * G) if c.micro_batch else B               # of a rollout's micro-batch, whole groups
    part = min(B, c.micro_batch or B) if c.micro_batch < G else rows                    # of an update's
    one, some = rows // G, min(rows, c.micro_batch or rows)
    plain, grad = (B // rows, False), (B // part, True)
    if m.stage == 'cold_start':
        K, plain_part = c.grad_steps, (B // part, False)
        calls = [('vision tower', B, net.vision, 1, False), ('captions token by token', B, lambda n: net.captions(n, 1), 1, False), ('caption to condition', part, net.text, *grad),
                 ('decoder', part * (1 + guided), net.decoder, B // part * (S - K), False), ('decoder', part, lambda n: net.decoder(n, True), *grad),
                 ('decoder with gradient in z', part, lambda n: net.decoder(n, True, True), B // part * (K - 1), True), ('decoder', part, net.decoder, B // part * K * guided, False),
                 ('vae', part, lambda n: net.vae(n, True), *grad), ('reward tower', part, net.clip, *plain_part), ('reward tower', part, lambda n: net.clip(n, True), *grad)]
    else:
        own = G if m.stage == 'grpo_encoder' else 1                                     # captions of an image
        calls = [('vision tower', one, net.vision, *plain), ('captions token by token', one * own, lambda n: net.captions(n, own), *plain),
                 ('caption to condition', one * own, net.text, *plain), ('decoder', rows * (1 + guided), net.decoder, B // rows * S, False),
                 ('vae', some, net.vae, B // some, False), ('reward tower', one, net.clip, *plain), ('reward tower', rows, net.clip, *plain)]
        if m.stage == 'grpo_encoder':
            calls += [('captions at once', part, net.scores, *grad), ('captions at once', part, net.scores, B // part * bool(c.kl), False)]
        else:
            n = len(grpo_decoder.window(0, c)[1]) * part
            calls += [('decoder', n, net.decoder, *grad), ('decoder', n * (1 + guided), net.decoder, B // part * bool(c.kl), False)]

    def call(f, n, backward):
        with torch.set_grad_enabled(backward), m.uae.autocast():
            out = f(n)
        if backward:
            out.backward(torch.ones_like(out))
    return [(f'{times} x {what}, {n} rows' + ' and backward' * backward, times, lambda f=f, n=n, k=backward: call(f, n, k)) for what, n, f, times, backward in calls if times]


def limit(m, pairs):
    """The step and its bare networks in turn: medians of the step's parts and of each network call, and the median ratio of the sums."""
    calls, rows = network_calls(m), []
    for _ in range(pairs + 2):
        row = measure(m)
        row['optimiser'] = seconds(lambda: common.optimise(m.opt, m.params, 0, m.c))
        for what, times, call in calls:
            row[what] = seconds(lambda: [call() for _ in range(times)])
            m.opt.zero_grad(set_to_none=True)
        row['networks'] = sum(row[what] for what, _, _ in calls)
        rows.append(dict(row, limit=row['total'] / row['networks']))
    return medians(rows[2:]), [what for what, _, _ in calls]


# --- what is printed and kept ------------------------------------------------------------------------------------------
def table(title, columns, rows):
    """Prints a table; cells are texts or numbers."""
    cells = [columns, *([f'{v:.4g}' if isinstance(v, float) else str(v) for v in row] for row in rows)]
    wide = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    print(f'\n{title}')
    for row in cells:
        print('  '.join(v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(row, wide))))


def machine():
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return dict(device=name, threads=torch.get_num_threads(), clock='process' if torch.get_num_threads() == 1 and not torch.cuda.is_available() else 'wall',
                torch=torch.__version__)


def matmul_peak(m):
    """Measured FLOP per second of a square matrix product in the run's dtype on its device."""
    n = 8192 if m.uae.device.type == 'cuda' else 1024
    a = torch.randn(n, n, device=m.uae.device, dtype=getattr(torch, m.c.dtype))
    return 2 * n ** 3 / statistics.median([seconds(lambda: a @ a) for _ in range(12)][2:])


def flops(m):
    """FLOP of the update of one step: matrix products, convolutions and attention, forward and backward, recomputation included."""
    from torch.utils.flop_counter import FlopCounterMode
    parts = STEPS[m.stage](m)
    next(parts)
    with FlopCounterMode(display=False) as counter:
        for _ in parts:
            pass
    return counter.get_total_flops()


def peak(call, device):
    """Most bytes of tensors that `call` holds at once beyond what is held before it."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = sorted((e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == '[memory]')
    return max(itertools.accumulate(nbytes for _, nbytes in events))


# --- the parts -----------------------------------------------------------------------------------------------------------
def stages(b, words):
    """Each stage's step: seconds by part, over its bare networks, per second, and the update's share of the measured matmul peak."""
    out = {}
    for stage in [b.stage] if b.stage else STAGES:
        m = prepare(b, stage, words)
        row, calls = limit(m, b.pairs)
        peak_flops, B = matmul_peak(m), len(m.x) * m.G
        out[stage] = row = dict(row, samples=B, samples_per_sec=B / row['total'], update_flops=flops(m), matmul_peak=peak_flops, peak_gb=common.peak_memory())
        row['update_share_of_peak'] = row['update_flops'] / row['update'] / peak_flops
        table(f'{stage}: {len(m.x)} images x {m.G}, T {m.c.caption_len}, S {m.c.sample_steps}, guidance {m.c.guidance}, {m.c.dtype}',
              ['seconds', ''], [(k, row.get(k, 0.0)) for k in ('data', 'rollout', 'update', 'optimiser', 'total', 'captions', 'condition', 'dit', 'vae', 'reward')])
        table('bare networks', ['times x call x rows', 'seconds'], [(k, row[k]) for k in calls] + [('sum', row['networks'])])
        print(f'limit {row["limit"]:.3f}   {row["samples_per_sec"]:.3g} samples/s   update {row["update_flops"] / 1e12:.3g} TFLOP, '
              f'{100 * row["update_share_of_peak"]:.0f} % of {peak_flops / 1e12:.3g} TFLOP/s   peak {row["peak_gb"]:.2f} GB')
        del m
    return out


def in_turn(sides, pairs):
    """sides {name: (m, step)}, each measured in turn: {name: medians}, and {name: median over pairs of its total over the first's}."""
    rows = [{name: measure(*side) for name, side in sides.items()} for _ in range(pairs + 2)][2:]
    first = next(iter(sides))
    ratio = {part: {name: statistics.median(r[name].get(part, 0.0) / r[first][part] for r in rows) for name in sides} for part in ('rollout', 'update', 'total')}
    return {name: medians([r[name] for r in rows]) for name in sides}, ratio


def gradients_differ(m, *steps):
    """Relative Euclidean distance of the gradients that two ways of a step leave behind."""
    grads = []
    for step in steps:
        measure(m, step)
        grads.append(torch.cat([p.grad.flatten().double() for p in m.params if p.grad is not None]))
    return ((grads[0] - grads[1]).norm() / grads[1].norm()).item()


def growth(b, words):
    """Seconds of a sample as P and G grow, of the captioner's token as T grows, of the decoder's step as S grows."""
    out = {}
    for stage, key, sizes, part in (('grpo_encoder', 'prompts', (2, 4, 8, 16), 'total'), ('grpo_encoder', 'group', (2, 4, 8, 16), 'total'),
                                    ('grpo_encoder', 'caption_len', (8, 16, 32, 64), 'captions'), ('grpo_decoder', 'prompts', (2, 4, 8, 16), 'total'),
                                    ('grpo_decoder', 'group', (2, 4, 8, 16), 'total'), ('grpo_decoder', 'sample_steps', (4, 8, 16, 32), 'dit')):
        if b.stage in ('', stage):
            ms = {n: prepare(b, stage, words, **{**dict(prompts=2, group=4, cond_len=72), key: n}) for n in sizes}
            turns = [{n: measure(m) for n, m in ms.items()} for _ in range(b.pairs + 2)][2:]
            out[f'{stage} {key}'] = {n: statistics.median(t[n]['rollout dit' if part == 'dit' else part] + t[n]['update'] * (part == 'captions') for t in turns)
                                     / (len(m.x) * m.G * (1 if part == 'total' else n)) for n, m in ms.items()}
    table('growth, seconds of one sample (of its token, its denoising step)', ['stage and key', 'x 1', 'x 2', 'x 4', 'x 8', 'x 8 over x 1'],
          [(k, *row.values(), list(row.values())[-1] / list(row.values())[0]) for k, row in out.items()])
    return out


def compiled(b, words):
    """grpo_decoder.py's step with and without diffusers' regional compilation of the transformer blocks."""
    off, on = (prepare(b, 'grpo_decoder', words) for _ in range(2))
    on.uae.decoder.compile_repeated_blocks(dynamic=True)
    warm = seconds(lambda: measure(on))
    out, ratio = in_turn(dict(off=(off, None), on=(on, None)), b.pairs)
    out.update(first_step=warm, ratio={part: ratio[part]['on'] for part in ratio})
    table(f'compile: first step {warm:.0f} s', ['seconds', 'rollout', 'update', 'total'],
          [(n, *(out[n][k] for k in ('rollout', 'update', 'total'))) for n in ('off', 'on')] + [('on / off', *out['ratio'].values())])
    return out


def ranks(b, words):
    """The scripts themselves on one rank and on two, one thread each, same global batch: median seconds of an update (wall)."""
    out = {}
    for stage in [b.stage] if b.stage else ('grpo_encoder', 'grpo_decoder'):
        for n in (1, 2):
            folder = f'out/bench/{stage}-{n}-{os.getpid()}'
            subprocess.run([sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={n}', STAGES[stage].__file__, f'--out_dir={folder}', f'--steps={b.pairs + 2}',
                            '--eval_every=0', '--eval_images=2', *words], check=True, stdout=subprocess.DEVNULL, env=dict(os.environ, OMP_NUM_THREADS='1'))
            with open(f'{folder}/log.jsonl') as f:
                out[f'{stage} {n}'] = statistics.median([json.loads(line)['sec'] for line in f][2:])
        out[f'{stage} speed-up'] = out[f'{stage} 1'] / out[f'{stage} 2']
    table('ranks, seconds of an update', ['', ''], out.items())
    return out


PARTS = dict(stages=stages, growth=growth, compile=compiled, ranks=ranks)
PEERS = ('flow_grpo', 'full_logits')


def main(argv):
    own = [w for w in argv if w.split('=')[0][2:] in keys or w in ('--help', '-h')]
    words = [w for w in argv if w not in own]
    b = config.parse(keys, own_presets, own, __file__)
    if b.part not in PARTS or b.stage not in ('', *STAGES) or b.peer not in ('', *PEERS):
        raise SystemExit(f'--part is one of {" ".join(PARTS)}; --stage one of {" ".join(STAGES)}; --peer one of {" ".join(PEERS)}')
    known = {*config.shared, 'preset', *(k for s in STAGES.values() for k in s.keys)}
    unknown = [w for w in words if w.split('=')[0][2:] not in known]
    if unknown:
        raise SystemExit(f'{unknown[0]!r} is no key of bench.py, of the stages or shared (--help)')
    part = PARTS[b.part] if not b.peer else functools.partial(importlib.import_module(f'tests.peers.{b.peer}').compare, sys.modules[__name__])
    out = dict(machine=machine(), argv=argv, part=b.peer or b.part, result=part(b, words))
    if b.json:
        common.write_atomic(b.json, lambda path: common.write_lines(path, [json.dumps(out, indent=1, allow_nan=False)]))


if __name__ == '__main__':
    main(sys.argv[1:])
