"""What a step costs: each stage beside the bare cost of its networks, beside a peer's way to the same gradient, and as its sizes grow.

    python bench.py                                                         # every stage: split, limit, list of network calls
    python bench.py --peer=flow_grpo                                        # grpo_decoder.py beside Flow-GRPO's step
    python bench.py --part=growth --json=out/growth.json                    # P, G, T, S times 1, 2, 4, 8
    python bench.py --random=True --preset=medium --resolution=512          # published sizes, random weights, nothing downloaded

Stage keys and shared keys are taken too (--prompts=2 --group=8 --guidance=4.5 --preset=paper). What is compared is measured in turn in
one run; every number is a median. Captions are always exactly caption_len tokens (the end token is forbidden), so that sizes are what they say.
With one thread on a CPU the clock is the process's own CPU time, else wall time. `limit` is the time of a step, data and optimiser apart, over the summed
times of the forward and backward passes that its mathematics needs, on inputs of the same shape and dtype.
"""
import collections
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
import torch.nn.functional as F

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
    part = 'stages',           # stages | growth | memory | compile | ranks
    stage = '',                # cold_start | grpo_encoder | grpo_decoder; '' = all three (growth, ranks: the last two)
    peer = '',                 # 'flow_grpo': grpo_decoder.py beside our own plain statement of Flow-GRPO's step
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
    """A published architecture with fewer layers and heads (0 = as they are); the width of a head stays."""
    arch = {k: dict(v) if isinstance(v, dict) else v for k, v in arch.items()}
    for net, depth, count in (('text_config', 'num_hidden_layers', 'num_attention_heads'), ('vision_config', 'depth', 'num_heads'),
                              ('transformer', 'num_layers', 'num_attention_heads')):
        a = arch.get(net)
        if a and layers:
            a[depth] = layers
            a.update(fullatt_block_indexes=[layers - 1]) if 'fullatt_block_indexes' in a else None
            a.update(dual_attention_layers=[i for i in a['dual_attention_layers'] if i < layers]) if 'dual_attention_layers' in a else None
        if a and heads:
            scale, a[count] = heads / a[count], heads
            a.update({k: int(a[k] * scale) for k in ('hidden_size', 'intermediate_size', 'caption_projection_dim') if k in a})
            a.update(num_key_value_heads=min(heads, a['num_key_value_heads'])) if 'num_key_value_heads' in a else None
    if heads and 'vision_config' in arch:
        arch['vision_config']['out_hidden_size'] = arch['text_config']['hidden_size']
    return arch


def random_uae(c, b, device):
    """UAE(c) with random weights in the published sizes of c.encoder and c.decoder; the tokenizer is the tiny one."""
    saved = common.load, model.pooled_of_nothing
    dtype = getattr(torch, c.dtype)

    def build(cls, path, subfolder='', **_):
        if cls.__name__ == 'AutoProcessor':
            processor = saved[0](cls, config.shared['encoder'])
            processor.image_processor.patch_size = config.architectures[path]['vision_config']['patch_size']
            processor.image_processor.size = dict(shortest_edge=1, longest_edge=2 ** 30)
            return processor
        arch = shrunk(config.architectures[path], b.layers, b.heads)
        if subfolder:
            net = cls.from_config(arch[subfolder])
        else:
            net = cls(cls.config_class(**arch))
        return net.to(dtype) if subfolder != 'scheduler' else net

    common.load, model.pooled_of_nothing = build, lambda c, width: torch.zeros(1, width)
    try:
        with torch.device(device):
            return model.UAE(c, device, new_projector=True)
    finally:
        common.load, model.pooled_of_nothing = saved


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
    m.G = getattr(c, 'group', 1)
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
    u = common.uniform((c.caption_len,), m.index, c.seed, 'token', 0).to(uae.device)
    with torch.no_grad():
        seen = uae.see(m.x)
        y, mask, _ = uae.sample_captions(seen, 1, c.cold_temperature, u)
    yield 'rollout'
    for s, b, _ in common.group_slices(seen, 1, c.micro_batch):
        uae(cold_start.loss_of, m.tower, m.x[b], s, y[b], mask[b], z[b], 1 / c.prompts, c).backward()
    yield 'update'


def grpo_encoder_step(m):
    c, uae = m.c, m.uae
    parts = [grpo_encoder.rollout(uae, m.tower, m.x[i], m.index[i], 0, c) for i in common.image_slices(len(m.x), c.group, c.micro_batch)]
    seen = tuple(torch.cat(t) for t in zip(*(p[0] for p in parts)))
    y, mask, old_logp, r = (torch.cat(t) for t in list(zip(*parts))[1:])
    adv = grpo_encoder.group_advantage(r).flatten()
    yield 'rollout'
    for s, b, _ in common.group_slices(seen, c.group, c.micro_batch):
        with torch.no_grad():
            ref_logp = m.ref.caption_logp(s, y[b], c.temperature) if c.kl else old_logp[b]
        uae(grpo_encoder.loss_of, s, y[b], mask[b], old_logp[b], ref_logp, adv[b], 1 / mask.sum().item(), c)[0].backward()
    yield 'update'


def grpo_decoder_step(m):
    c = m.c
    parts = [grpo_decoder.rollout(m.uae, m.tower, m.x[i], m.index[i], 0, c, m.neg) for i in common.image_slices(len(m.x), c.group, c.micro_batch)]
    cond, z, z_next, *v0, old_logp, r, _ = (torch.cat(t) for t in zip(*parts))
    adv = grpo_decoder.group_advantage(r).flatten()
    yield 'rollout'
    for (_,), b, _ in common.group_slices((r,), c.group, c.micro_batch):
        m.uae(grpo_decoder.loss_of, m.ref, cond[b], z[b], z_next[b], old_logp[b], adv[b], 0, 1 / r.numel(), c, m.neg, [t[b] for t in v0])[0].backward()
    yield 'update'


def flow_grpo_step(m):
    """The same step as Flow-GRPO does it: one forward of 2B rows for both branches of the guidance, in the update too, where the
    unconditional half is computed with its gradient and then detached; every trained step replayed and back-propagated by itself,
    with its own forward pass of the reference. Plain re-statement; sizes, noise and numbers are those of `grpo_decoder_step`."""
    c, uae, G = m.c, m.uae, m.c.group
    noisy, trained = grpo_decoder.window(0, c)
    who, B = (m.index[:, None] * G + torch.arange(G)).flatten(), len(m.x) * G

    def velocity(uae, z, s, cond, neg):
        if c.guidance == 1.0:
            return uae.velocity(z, s, cond)
        v0, v = uae.velocity(torch.cat([z, z]), s, torch.cat([neg.expand_as(cond), cond])).chunk(2)
        return v0.detach() + c.guidance * (v - v0.detach())

    with torch.no_grad():
        seen = uae.see(m.x)
        y, mask, _ = uae.sample_captions(seen, 1, c.caption_temperature, common.uniform((c.caption_len,), m.index, c.seed, 'token', 0).to(uae.device))
        cond, neg, sig = uae.condition(y, mask, seen).repeat_interleave(G, 0), uae.negative(), uae.sigmas(c.sample_steps)
        z = common.normal(uae.latent_shape(), who, c.seed, 'start', 0).to(uae.device)
        noise = common.normal((noisy[1] - noisy[0], *uae.latent_shape()), who, c.seed, 'sde', 0).to(uae.device)
        path, old = [], []
        for i in range(c.sample_steps):
            inside = noisy[0] <= i < noisy[1]
            z_next, logp, _, _ = model.sde_step(z, velocity(uae, z, sig[i], cond, neg), sig[i], sig[i + 1], c.sde, c.noise_level * inside,
                                                noise=noise[:, i - noisy[0]] if inside else 0.0)
            path, old, z = path + [(z, z_next)], old + [logp], z_next
        r = grpo_decoder.clip_reward(m.x, uae.to_image(z), m.tower).view(-1, G)
    adv = grpo_decoder.group_advantage(r).flatten()
    yield 'rollout'
    for i in (noisy[0] + j for j in trained):
        (z, z_next), s = path[i], sig[i:i + 2]
        _, logp, mean, std = model.sde_step(z, velocity(uae, z, s[0], cond, neg), *s, c.sde, c.noise_level, z_next=z_next)
        loss, _ = grpo_decoder.policy_loss(logp[:, None], old[i][:, None], adv, clip=c.clip_range)
        if c.kl:
            with torch.no_grad():
                ref_mean = model.sde_step(z, velocity(m.ref, z, s[0], cond, neg), *s, c.sde, c.noise_level, z_next=z_next)[2]
            loss = loss + c.kl * grpo_decoder.kl_gauss(mean, ref_mean, std)
        (loss / len(trained)).backward()
    yield 'update'


STEPS = dict(cold_start=cold_start_step, grpo_encoder=grpo_encoder_step, grpo_decoder=grpo_decoder_step, flow_grpo=flow_grpo_step)


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
def network_calls(m):
    """What the mathematics of one step needs from the networks: [(what, how often, call)], on inputs of the step's shapes and dtypes."""
    c, uae, lm, G = m.c, m.uae, m.uae.encoder.model.language_model, m.G
    if c.condition != 'text' or c.checkpointing:
        raise SystemExit('the limit is defined for --condition=text without checkpointing')
    from transformers import DynamicCache
    with torch.no_grad():
        seen = uae.see(m.x)
    P, T, B, S, guided = len(m.x), c.caption_len, len(m.x) * G, c.sample_steps, c.guidance != 1.0
    L = len(uae.before_image) + seen[0].shape[1] + len(uae.after_image)
    rows = min(B, max(1, c.micro_batch // G) * G) if c.micro_batch else B               # of a rollout's micro-batch
    part = min(B, c.micro_batch if c.micro_batch < G else rows) if c.micro_batch else B   # of an update's
    pixels = torch.randn(int(seen[1][0].prod()) * rows // G, uae.encoder.model.visual.patch_embed.proj.weight[0].numel(), device=uae.device)
    attend = (torch.arange(c.cond_len, device=uae.device) < len(uae.before_text) + T + len(uae.after_text)).long()

    def run(n, width, start=0, cache=None, attend=None):
        pos = start + torch.arange(width, device=uae.device).expand(3, n, width)
        how = dict(attention_mask=attend.expand(n, -1), use_cache=False) if cache is None else dict(position_ids=pos, past_key_values=cache, use_cache=True)
        return lm(inputs_embeds=uae.embed(torch.zeros(n, width, dtype=torch.long, device=uae.device)), **how).last_hidden_state

    def captions(n, G):
        """The prompt once per image, then token by token."""
        cache = DynamicCache(config=uae.encoder.config.text_config)
        h = run(n // G, L, cache=cache)[:, -1:].repeat_interleave(G, 0)
        cache.batch_repeat_interleave(G)
        for t in range(T):
            uae.head(h)
            h = run(n, 1, L + t, cache) if t < T - 1 else None

    def scores(n):
        """The prompt once per image, then its captions at once; at least one image."""
        cache = DynamicCache(config=uae.encoder.config.text_config)
        h = run(max(1, n // G), L, cache=cache)[:, -1:].repeat_interleave(min(n, G), 0)
        cache.batch_repeat_interleave(min(n, G))
        return uae.head(torch.cat([h, run(n, T, L, cache)], 1)[:, :-1])

    def text(n):
        return uae.projector(run(n, c.cond_len, attend=attend).to(uae.projector.up.weight.dtype))

    def dit(n, leaf=False, chained=False):
        z = torch.randn(n, *uae.latent_shape(), device=uae.device, dtype=uae.decoder.dtype, requires_grad=chained)
        cond = torch.randn(n, c.cond_len, uae.decoder.config.joint_attention_dim, device=uae.device, dtype=uae.decoder.dtype, requires_grad=leaf)
        return uae.decoder(hidden_states=z, timestep=torch.full((n,), 500.0, device=uae.device), encoder_hidden_states=cond,
                           pooled_projections=uae.pooled.expand(n, -1).to(uae.decoder.dtype), return_dict=False)[0]

    def vae(n, leaf=False):
        return uae.vae.decode(torch.randn(n, *uae.latent_shape(), device=uae.device, dtype=uae.vae.dtype, requires_grad=leaf)).sample

    def clip(n, leaf=False):
        return m.tower.tower(torch.randn(n, 3, m.tower.pre['crop'], m.tower.pre['crop'], device=uae.device, requires_grad=leaf))

    def forward(call, *args):
        with torch.no_grad(), uae.autocast():
            call(*args)

    def both(call, *args):
        with uae.autocast():
            out = call(*args)
        out.backward(torch.ones_like(out))

    calls = [('vision tower', rows // G, forward, lambda n: uae.encoder.model.get_image_features(pixels, seen[1][:n]), B // rows)]
    own = G if m.stage == 'grpo_encoder' else 1                                         # captions of an image
    calls += [('captions token by token', rows // G * own, forward, lambda n: captions(n, own), B // rows)]
    if m.stage == 'cold_start':
        K = c.grad_steps
        calls += [('caption to condition', part, both, text, B // part), ('decoder', part, forward, dit, B // part * ((S - K) + S * guided)),
                  ('decoder', part, both, lambda n: dit(n, True), B // part), ('decoder', part, both, lambda n: dit(n, True, True), B // part * (K - 1)),
                  ('vae', part, both, lambda n: vae(n, True), B // part), ('reward tower', part, forward, clip, B // part),
                  ('reward tower', part, both, lambda n: clip(n, True), B // part)]
        return [(f'{what} x {n}' + ', backward' * (kind is both), times, lambda k=kind, f=f, n=n: k(f, n)) for what, n, kind, f, times in calls if times]
    calls += [('caption to condition', rows // G * own, forward, text, B // rows), ('decoder', rows, forward, dit, B // rows * S * (1 + guided)),
              ('vae', min(rows, c.micro_batch or rows), forward, vae, B // min(rows, c.micro_batch or rows)),
              ('reward tower', rows // G, forward, clip, B // rows), ('reward tower', rows, forward, clip, B // rows)]
    if m.stage == 'grpo_encoder':
        calls += [('captions at once', part, both, scores, B // part), ('captions at once', part, forward, scores, B // part * bool(c.kl))]
    else:
        n = len(grpo_decoder.window(0, c)[1]) * part
        calls += [('decoder', n, both, dit, B // part), ('decoder', n, forward, dit, B // part * (guided + (1 + guided) * bool(c.kl)))]
    return [(f'{what} x {n}' + ', backward' * (kind is both), times, lambda k=kind, f=f, n=n: k(f, n)) for what, n, kind, f, times in calls if times]


def limit(m, pairs):
    """The step and its bare networks in turn: medians of the step's parts and of each network call, and the median ratio of the sums."""
    calls, rows = network_calls(m), []
    for _ in range(pairs + 2):
        row = measure(m)
        row['optimiser'] = seconds(lambda: common.optimise(m.opt, m.params, 0, m.c))
        for what, times, call in calls:
            row[f'{times} x {what}'] = seconds(lambda: [call() for _ in range(times)])
            m.opt.zero_grad(set_to_none=True)
        row['networks'] = sum(row[f'{times} x {what}'] for what, times, _ in calls)
        rows.append(dict(row, limit=row['total'] / row['networks']))
    return medians(rows[2:]), [f'{times} x {what}' for what, times, _ in calls]


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


def flow_grpo(b, words):
    """Stage 3 beside Flow-GRPO's step: the same numbers (CFG 4.5, 10 steps, 9 trained, KL), and the fast setting (no CFG, no KL, 3 of 3)."""
    slow = dict(sample_steps=10, guidance=4.5, sde_window=9, train_steps=9, kl=0.04)
    ours = prepare(b, 'grpo_decoder', words, **slow)
    fast = prepare(b, 'grpo_decoder', words, sample_steps=10, guidance=1.0, sde_window=3, train_steps=3)
    out, ratio = in_turn({'flow_grpo': (ours, 'flow_grpo'), 'ours': (ours, None), 'ours, fast': (fast, None), 'flow_grpo, fast': (fast, 'flow_grpo')}, b.pairs)
    out['gradients differ by'] = gradients_differ(ours, 'grpo_decoder', 'flow_grpo')
    for name, row in list(out.items())[:4]:
        row['dit in all'] = row['rollout dit'] + row['update']
    table(f'Flow-GRPO: {len(ours.x)} images x {ours.G}, 10 steps; relative difference of the gradients {out["gradients differ by"]:.1e}',
          ['seconds', 'rollout', 'its dit', 'update', 'dit', 'vae', 'reward', 'total'],
          [(name, *(row[k] for k in ('rollout', 'rollout dit', 'update', 'dit in all', 'vae', 'reward', 'total'))) for name, row in list(out.items())[:4]])
    base = out['flow_grpo']
    out['speed-up'] = {part: 1 / ratio[part]['ours'] for part in ratio} | {'dit, fast': base['dit in all'] / out['ours, fast']['dit in all']}
    print('speed-up', '   '.join(f'{k} {v:.2f}' for k, v in out['speed-up'].items()))
    return out


def gradients_differ(m, *steps):
    """Relative Euclidean distance of the gradients that two ways of a step leave behind."""
    grads = []
    for step in steps:
        measure(m, step)
        grads.append(torch.cat([p.grad.flatten().double() for p in m.params if p.grad is not None]))
    return ((grads[0] - grads[1]).norm() / grads[1].norm()).item()


def growth(b, words):
    """Seconds per sample as P and G grow, captioner seconds per token as T grows, decoder seconds per step as S grows."""
    out = {}
    for stage in [b.stage] if b.stage else ('grpo_encoder', 'grpo_decoder'):
        for key, sizes, part in (('prompts', (2, 4, 8, 16), 'total'), ('group', (2, 4, 8, 16), 'total'), ('caption_len', (8, 16, 32, 64), 'captions'),
                                 ('sample_steps', (4, 8, 16, 32), 'rollout dit')):
            if stage == 'grpo_decoder' and key == 'caption_len':
                continue
            base = dict(dict(prompts=2, group=4), **({} if key != 'caption_len' else dict(cond_len=72)))
            row = {}
            ms = {n: prepare(b, stage, words, **{**base, key: n}) for n in sizes}
            turns = [{n: measure(m) for n, m in ms.items()} for _ in range(b.pairs + 2)][2:]
            for n, m in ms.items():
                each = medians([t[n] for t in turns])
                row[n] = (each[part] + each['update'] * (part == 'captions')) / (len(m.x) * m.G) / (1 if part == 'total' else n)
            out[f'{stage} {key}'] = row
    table('growth, seconds of one sample (of its token, its denoising step)', ['stage and key', 'x 1', 'x 2', 'x 4', 'x 8', 'x 8 over x 1'],
          [(k, *row.values(), list(row.values())[-1] / list(row.values())[0]) for k, row in out.items()])
    return out


def memory(b, words):
    """Peak of the caption log-prob and its gradient, all logits at once against model.token_logp: rows of the stage, a vocabulary of 152k."""
    c = prepare(b, 'grpo_encoder', words).c
    d, V, B = 128, 151936, c.prompts * c.group
    head = torch.nn.Linear(d, V, bias=False)
    h, y = torch.randn(B, c.caption_len, d), torch.randint(V, (B, c.caption_len))
    forbidden = torch.arange(V) >= V - 300
    out, grads = {}, {}

    def naive():
        logits = (head(h_) / c.temperature).masked_fill(forbidden, float('-inf'))
        return F.log_softmax(logits, -1).gather(-1, y[..., None])[..., 0]

    for name, way in (('token_logp', lambda: model.token_logp(h_, head, y, c.temperature, forbidden)), ('naive', naive)):
        h_, head.weight.grad = h.clone().requires_grad_(), torch.zeros_like(head.weight)
        took = []
        out[f'{name} bytes'] = peak(lambda: took.append(seconds(lambda: way().clamp(min=-100).mean().backward())), h.device)
        out[f'{name} seconds'] = took[0]
        grads[name] = torch.cat([h_.grad.flatten(), head.weight.grad.flatten()])
    out['ratio'] = out['token_logp bytes'] / out['naive bytes']
    out['gradients differ by'] = ((grads['token_logp'] - grads['naive']).norm() / grads['naive'].norm()).item()
    table(f'caption log-prob, {B} captions of {c.caption_len} tokens, V = {V}, d = {d}', ['', ''], [(k, float(v)) for k, v in out.items()])
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


PARTS = dict(stages=stages, growth=growth, memory=memory, compile=compiled, ranks=ranks)


def main(argv):
    own = [w for w in argv if w.split('=')[0][2:] in keys or w in ('--help', '-h')]
    words = [w for w in argv if w not in own]
    b = config.parse(keys, own_presets, own, __file__)
    if b.part not in PARTS or b.stage not in ('', *STAGES) or b.peer not in ('', 'flow_grpo'):
        raise SystemExit(f'--part is one of {" ".join(PARTS)}; --stage one of {" ".join(STAGES)}; --peer is flow_grpo or nothing')
    known = {*config.shared, 'preset', *(k for s in STAGES.values() for k in s.keys)}
    unknown = [w for w in words if w.split('=')[0][2:] not in known]
    if unknown:
        raise SystemExit(f'{unknown[0]!r} is no key of bench.py, of the stages or shared (--help)')
    out = dict(machine=machine(), argv=argv, part=b.peer or b.part, result=flow_grpo(b, words) if b.peer else PARTS[b.part](b, words))
    if b.json:
        common.write_atomic(b.json, lambda path: common.write_lines(path, [json.dumps(out, indent=1, allow_nan=False)]))


if __name__ == '__main__':
    main(sys.argv[1:])
