"""What a step costs: each stage beside the bare cost of its networks, beside a peer's way to the same gradient, and as its sizes grow.

    python bench.py                                                         # every stage: split, limit, list of network calls
    python bench.py --peer=flow_grpo                                        # grpo_decoder.py beside Flow-GRPO's step; TRL: tests/peers/trl_grpo.py
    python bench.py --part=growth --json=out/growth.json                    # P, G, T, S times 1, 2, 4, 8
    python bench.py --random=True --preset=medium                           # published sizes, random weights, nothing downloaded (make bench-gpu)

Stage keys and shared keys are taken too (--prompts=2 --preset=paper). What is compared is measured in turn; numbers are medians. Captions are exactly
caption_len tokens (the end token is forbidden). With one CPU thread the clock is the process's own CPU time, else wall time. `limit`: a step
without data and optimiser over the forward and backward passes that its mathematics needs, bare, on inputs of the same shape and dtype.
"""
import collections
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
import types
from unittest import mock

import torch

import cold_start
import common
import config
import grpo_decoder
import grpo_encoder
import model
import reward
from data.images import open_data

# --- script keys ---------------------------------------------------------------------------------------------------
keys = dict(
    part = 'stages',           # stages | growth | compile | ranks
    stage = '',                # cold_start | grpo_encoder | grpo_decoder; '' = all three (growth, ranks: the last two)
    peer = '',                 # a comparison of tests/peers in place of a part: flow_grpo | full_logits
    steps = 7,                 # updates measured of each side, in turn, after two that do not count
    random = False,            # random weights in the published sizes of the preset's models: nothing is loaded or downloaded
    layers = 0,                # of every network with random weights, widths as published; 0 = all of them
    json = '',                 # file for everything that was measured
)
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
    """Adds the seconds of every call of owner.name to spent[label]."""
    call = getattr(owner, name)

    def watched(*args, **kwargs):
        start = clock()
        out = call(*args, **kwargs)
        spent[label] += clock() - start
        return out
    setattr(owner, name, watched)


def seconds(call):
    """Seconds of one call."""
    start = clock()
    call()
    return clock() - start


def random_models(c, b, device):
    """UAE(c) and the reward's tower with random weights in the published sizes of c.encoder, c.decoder and c.clip; the tokenizer is the tiny one."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import AutoProcessor
    lists, counts, n = ('fullatt_block_indexes', 'dual_attention_layers'), ('depth', 'num_layers', 'num_hidden_layers'), b.layers or 999
    cut = lambda k, v: min(v, n) if k in counts else [i for i in v if i < n] if k in lists else {q: cut(q, w) for q, w in v.items()} if isinstance(v, dict) else v
    with mock.patch.dict(config.architectures, cut('', config.architectures)):
        uae, net, _ = common.skeleton(c, device)
    uae.scheduler, uae.processor = FlowMatchEulerDiscreteScheduler(shift=3.0), common.load(AutoProcessor, config.shared['encoder'])
    uae.tokenizer, pixels = uae.processor.tokenizer, uae.processor.image_processor
    pixels.patch_size, pixels.size = uae.encoder.config.vision_config.patch_size, dict(shortest_edge=1, longest_edge=2 ** 30)
    uae.end = uae.tokenizer.convert_tokens_to_ids('<|im_end|>')
    uae.templates()
    tower = types.SimpleNamespace(library='open_clip', tower=net, pre=dict(reward.OPENAI, resize=net.image_size[0], crop=net.image_size[0]))
    tower.features = lambda x: reward.Backbone.features(tower, x)
    return uae.to(device), tower


def prepare(b, stage, words, **changes):
    """Everything that a step of `stage` needs: configuration, models, a batch of images, optimiser."""
    script = STAGES[stage]
    own = {**config.shared, **script.keys}
    words = [w for w in words if w.split('=')[0][2:] in own or w.startswith('--preset=')] + [f'--{k}={v}' for k, v in changes.items() if k in own]
    c = config.parse(script.keys, script.own_presets, words, script.__file__)
    run = common.start(c)
    m = types.SimpleNamespace(stage=stage, c=c, G=getattr(c, 'group', 1))
    m.uae, m.tower = random_models(c, b, run.device) if b.random else (model.UAE(c, run.device), reward.backbone(c.reward, c, run.device))
    m.uae.forbidden[m.uae.end] = True
    m.params = m.uae.train_only(*TRAINED[stage])
    m.neg = m.uae.negative() if c.guidance != 1.0 and stage == 'grpo_decoder' else None
    m.ref = m.uae.reference(TRAINED[stage][0]) if getattr(c, 'kl', 0) else None
    m.opt = torch.optim.AdamW(m.params, lr=c.lr, weight_decay=0.0, fused=True)
    train = None if b.random else open_data(c, run)[0]
    m.data = lambda: train.batch(c.seed, 0, c.prompts) if train else dict(x=torch.rand(c.prompts, 3, c.resolution, c.resolution) * 2 - 1, index=torch.arange(c.prompts))
    batch = m.data()
    m.x, m.index = batch['x'].to(run.device), batch['index']
    for owner, name, label in ((m.uae, 'see', 'captions'), (m.uae, 'sample_captions', 'captions'), (m.uae, 'condition', 'condition'), (m.uae.vae, 'decode', 'vae'),
                               (m.tower, 'features', 'reward'), *((net, 'forward', 'dit') for net in {m.uae.decoder, (m.ref or m.uae).decoder})):
        watch(owner, name, label)
    return m


# --- one step of each stage, as its script does it, without data, optimiser and log: yields the name of each part that is done -----
def cold_start_step(m):
    c, uae, z = m.c, m.uae, common.normal(m.uae.latent_shape(), m.index, m.c.seed, 'start', 0).to(m.uae.device)
    u = common.uniform((c.caption_len,), m.index, c.seed, 'token', 0).to(uae.device)
    with torch.no_grad():
        seen = uae.see(m.x)
        y, mask, _ = uae.sample_captions(seen, 1, c.cold_temperature, u)
    yield 'rollout'
    for s, b, _ in common.group_slices(seen, 1, c.micro_batch):
        uae(cold_start.loss_of, m.tower, m.x[b], s, y[b], mask[b], z[b], 1 / c.prompts, c).backward()
    yield 'update'


def grpo_encoder_step(m):
    c = m.c
    parts = [grpo_encoder.rollout(m.uae, m.tower, m.x[i], m.index[i], 0, c) for i in common.image_slices(len(m.x), c.group, c.micro_batch)]
    seen = tuple(torch.cat(t) for t in zip(*(p[0] for p in parts)))
    y, mask, old_logp, r = (torch.cat(t) for t in list(zip(*parts))[1:])
    adv, (weight, count) = grpo_encoder.group_advantage(r, c.adv_std).flatten(), grpo_encoder.token_weights(mask, c)
    yield 'rollout'
    for s, b, _ in common.group_slices(seen, c.group, c.micro_batch):
        with torch.no_grad():
            ref_logp = m.ref.caption_logp(s, y[b], c.temperature) if c.kl else old_logp[b]
        m.uae(grpo_encoder.loss_of, s, y[b], weight[b], old_logp[b], ref_logp, adv[b], 1 / count, c)[0].backward()
    yield 'update'


def grpo_decoder_step(m):
    c = m.c
    parts = [grpo_decoder.rollout(m.uae, m.tower, m.x[i], m.index[i], 0, c, m.neg) for i in common.image_slices(len(m.x), m.G, c.micro_batch)]
    cond, z, z_next, *v0, old_logp, r, _ = (torch.cat(t) for t in zip(*parts))
    adv = grpo_decoder.group_advantage(r).flatten()
    yield 'rollout'
    for _, b, _ in common.group_slices((m.x,), m.G, c.micro_batch):
        m.uae(grpo_decoder.loss_of, m.ref, cond[b], z[b], z_next[b], old_logp[b], adv[b], 0, 1 / len(adv), c, m.neg, [t[b] for t in v0])[0].backward()
    yield 'update'


STEPS = dict(cold_start=cold_start_step, grpo_encoder=grpo_encoder_step, grpo_decoder=grpo_decoder_step)


def measure(m, step=None):
    """One step of m.stage (or the named one): {part: seconds}, where `total` leaves data and optimiser out. Gradients stay."""
    spent.clear()
    spent['data'] = seconds(m.data)
    m.opt.zero_grad(set_to_none=True)
    last = first = clock()
    for part in STEPS[step or m.stage](m):
        now = clock()
        spent[part], last = now - last, now
        spent[f'{part} dit'] = spent['dit'] - spent['rollout dit']
    return dict(spent, total=last - first)


def medians(rows):
    """Dicts of numbers, one a turn -> their medians without the first two turns."""
    return {k: statistics.median(r.get(k, 0.0) for r in rows[2:]) for k in rows[-1]}


# --- the bare networks ---------------------------------------------------------------------------------------------------
def networks(m):
    """The networks of stage m.stage by name, each called with a number of rows, on inputs of the step's shapes and dtypes."""
    from transformers import DynamicCache
    c, uae, lm, device, T = m.c, m.uae, m.uae.encoder.model.language_model, m.uae.device, m.c.caption_len
    pixels = uae.processor.image_processor(images=[torch.zeros(3, c.resolution, c.resolution, dtype=torch.uint8)], return_tensors='pt')
    pixels, grid = pixels['pixel_values'].to(device), pixels['image_grid_thw'].to(device)
    L = len(uae.before_image) + int(grid.prod()) // uae.encoder.config.vision_config.spatial_merge_size ** 2 + len(uae.after_image)
    attend = (torch.arange(c.cond_len, device=device) < len(uae.before_text) + T + len(uae.after_text)).long()

    embedded = lambda n, width: uae.embed(torch.zeros(n, width, dtype=torch.long, device=device))
    noise = lambda n, shape, dtype, grad=False: torch.randn(n, *shape, device=device, dtype=dtype, requires_grad=grad)

    def cached(n, width, start, cache):
        at = start + torch.arange(width, device=device).expand(3, n, width)
        return lm(inputs_embeds=embedded(n, width), position_ids=at, past_key_values=cache, use_cache=True).last_hidden_state

    def prefill(n, G):
        cache, G = DynamicCache(config=uae.encoder.config.text_config), min(n, G)
        h = cached(n // G, L, 0, cache)[:, -1:].repeat_interleave(G, 0)
        cache.batch_repeat_interleave(G)
        return cache, h

    def captions(n, G):
        cache, h = prefill(n, G)
        for t in range(T):
            uae.head(h)
            h = common.next_state(lm, embedded(n, 1), L + t, cache) if t < T - 1 else None

    def scores(n):
        cache, h = prefill(n, m.G)
        return uae.head(torch.cat([h, cached(n, T, L, cache)], 1)[:, :-1])

    def decoder(n, leaf=False, chained=False):
        z, dtype = noise(n, uae.latent_shape(), uae.decoder.dtype, chained), uae.decoder.dtype
        return uae.decoder(z, noise(n, (c.cond_len, uae.projector.down.out_features), dtype, leaf), uae.pooled.expand(n, -1).to(dtype), torch.ones(n, device=device)).sample

    last = lambda n: lm(inputs_embeds=embedded(n, c.cond_len), attention_mask=attend.expand(n, -1), use_cache=False).last_hidden_state
    return types.SimpleNamespace(
        captions=captions, scores=scores, decoder=decoder, text=lambda n: uae.projector(last(n).to(uae.projector.up.weight.dtype)),
        vision=lambda n: uae.encoder.model.get_image_features(pixels.repeat(n, 1), grid.repeat(n, 1)),
        vae=lambda n, leaf=False: uae.vae.decode(noise(n, uae.latent_shape(), uae.vae.dtype, leaf)).sample,
        clip=lambda n, leaf=False: m.tower.tower(noise(n, (3, m.tower.pre['crop'], m.tower.pre['crop']), torch.float32, leaf)))


def network_calls(m):
    """What the mathematics of one step needs from the networks: [(name, rows, function of rows, how often, with backward)]."""
    c, net, G, S, guided = m.c, networks(m), m.G, m.c.sample_steps, m.c.guidance != 1.0
    if c.condition != 'text' or c.checkpointing or c.reward != 'clip':
        raise SystemExit('the bare networks are known for --condition=text --reward=clip --checkpointing=False')
    B = len(m.x) * G
    rows = min(B, max(1, c.micro_batch // G) * G) if c.micro_batch else B               # of a rollout's micro-batch, whole groups
    part = min(B, c.micro_batch or B) if c.micro_batch < G else rows                    # of an update's
    some, one, rollouts, updates = min(rows, c.micro_batch or rows), rows // G, B // rows, B // part
    if m.stage == 'cold_start':
        K, leaf = c.grad_steps, lambda f: lambda n: f(n, True)
        return [('vision tower', B, net.vision, 1, False), ('captions token by token', B, lambda n: net.captions(n, 1), 1, False),
                ('caption to condition', part, net.text, updates, True), ('decoder', part * (1 + guided), net.decoder, updates * (S - K), False),
                ('decoder', part, leaf(net.decoder), updates, True), ('decoder with gradient in z', part, lambda n: net.decoder(n, True, True), updates * (K - 1), True),
                ('decoder', part, net.decoder, updates * K * guided, False), ('vae', part, leaf(net.vae), updates, True),
                ('reward tower', part, net.clip, updates, False), ('reward tower', part, leaf(net.clip), updates, True)]
    own = G if m.stage == 'grpo_encoder' else 1                                         # captions of an image
    calls = [('vision tower', one, net.vision, rollouts, False), ('captions token by token', one * own, lambda n: net.captions(n, own), rollouts, False),
             ('caption to condition', one * own, net.text, rollouts, False), ('decoder', rows * (1 + guided), net.decoder, rollouts * S, False),
             ('vae', some, net.vae, B // some, False), ('reward tower', one, net.clip, rollouts, False), ('reward tower', rows, net.clip, rollouts, False)]
    if m.stage == 'grpo_encoder':
        return calls + [('captions at once', part, net.scores, updates, True), ('captions at once', part, net.scores, updates * bool(c.kl), False)]
    n = len(grpo_decoder.window(0, c)[1]) * part                                        # trained steps replayed at once
    return calls + [('decoder', n, net.decoder, updates, True), ('decoder', n * (1 + guided), net.decoder, updates * bool(c.kl), False)]


def limit(m, steps):
    """The step and its bare networks in turn: medians of the step's parts and of each network call, and the median ratio of the sums."""
    rows, calls = [], {f'{times} x {name}, {n} rows' + ' and backward' * backward: (times, f, n, backward) for name, n, f, times, backward in network_calls(m) if times}

    def bare(f, n, backward):
        with torch.set_grad_enabled(backward), m.uae.autocast():
            out = f(n)
        if backward:
            out.backward(torch.ones_like(out))

    for _ in range(steps + 2):
        row = dict(measure(m), optimiser=seconds(lambda: common.optimise(m.opt, m.params, 0, m.c)))
        for what, (times, *call) in calls.items():
            row[what] = seconds(lambda: [bare(*call) for _ in range(times)])
            m.opt.zero_grad(set_to_none=True)
        rows.append(dict(row, networks=(bottom := sum(row[what] for what in calls)), limit=row['total'] / bottom))
    return medians(rows), list(calls)


# --- the parts -----------------------------------------------------------------------------------------------------------
def table(title, rows):
    """Prints {row: {column: number}}; the first row's columns are everybody's."""
    columns = list(next(iter(rows.values())))
    print(f'\n{title:48s}' + ''.join(f'{k:>14}' for k in columns))
    for name, row in rows.items():
        print(f'{name:48s}' + ''.join(f'{row[k]:14.4g}' for k in columns))


def utilisation(m, update):
    """The update's FLOP (matrix products, convolutions, attention; with what is recomputed), a square matrix product's FLOP per second, the update's share of it."""
    from torch.utils.flop_counter import FlopCounterMode
    parts, n = STEPS[m.stage](m), 8192 if m.uae.device.type == 'cuda' else 1024
    next(parts)
    with FlopCounterMode(display=False) as counter:
        collections.deque(parts, 0)
    a = torch.randn(n, n, device=m.uae.device, dtype=getattr(torch, m.c.dtype))
    peak, done = 2 * n ** 3 / statistics.median([seconds(lambda: a @ a) for _ in range(12)][2:]), counter.get_total_flops()
    return dict(update_flops=done, matmul_peak=peak, update_share_of_peak=done / update / peak)


def stages(b, words):
    """Each stage's step: seconds by part, over its bare networks, per second, and the update's share of the measured matmul peak."""
    out = {}
    for stage in [b.stage] if b.stage else STAGES:
        m = prepare(b, stage, words)
        torch.cuda.is_available() and torch.cuda.reset_peak_memory_stats()
        row, calls = limit(m, b.steps)
        B, unit = len(m.x) * m.G, 'captions' if stage == 'grpo_encoder' else 'images'
        row.update({f'{unit}_per_sec': B / row['total']}, peak_gb=common.peak_memory(), **utilisation(m, row['update']))
        parts = ('data', 'rollout', 'update', 'optimiser', 'total', 'captions', 'condition', 'dit', 'vae', 'reward')
        table(f'{stage}: {len(m.x)} x {m.G}, T {m.c.caption_len}, S {m.c.sample_steps}, guidance {m.c.guidance}, {m.c.dtype}', {k: dict(seconds=row.get(k, 0.0)) for k in parts})
        table('bare networks, times x call x rows', {k: dict(seconds=row[k]) for k in [*calls, 'networks']})
        print(f'limit {row["limit"]:.3f}   {B / row["total"]:.3g} {unit}/s   update {row["update_flops"] / 1e12:.3g} TFLOP, '
              f'{100 * row["update_share_of_peak"]:.0f} % of {row["matmul_peak"] / 1e12:.3g} TFLOP/s   peak {row["peak_gb"]:.2f} GB')
        out[stage], m = row, None                # a full-size model goes before the next one comes
    return out


def in_turn(sides, steps):
    """sides {name: (m, step)}, each measured in turn -> {name: medians}."""
    rows = [{name: measure(*side) for name, side in sides.items()} for _ in range(steps + 2)]
    return {name: medians([row[name] for row in rows]) for name in sides}


def growth(b, words):
    """Seconds of a sample as P and G grow, of the captioner's token as T grows, of the decoder's step as S grows."""
    out, sizes = {}, dict(prompts=(2, 4, 8, 16), group=(2, 4, 8, 16), caption_len=(8, 16, 32, 64), sample_steps=(4, 8, 16, 32))
    for stage, key, *parts in (('grpo_encoder', 'prompts', 'total'), ('grpo_encoder', 'group', 'total'), ('grpo_encoder', 'caption_len', 'captions', 'update'),
                               ('grpo_decoder', 'prompts', 'total'), ('grpo_decoder', 'group', 'total'), ('grpo_decoder', 'sample_steps', 'rollout dit')):
        if b.stage in ('', stage):
            ms = {n: prepare(b, stage, words, **{**dict(prompts=2, group=4, cond_len=72), key: n}) for n in sizes[key]}
            turns = [{n: sum(map(measure(m).get, parts)) for n, m in ms.items()} for _ in range(b.steps + 2)]
            per = {n: t / (len(ms[n].x) * ms[n].G * (1 if parts == ['total'] else n)) for n, t in medians(turns).items()}
            out[f'{stage} {key}'] = {f'x {n // sizes[key][0]}': t for n, t in per.items()} | {'x 8 over x 1': per[sizes[key][3]] / per[sizes[key][0]]}
    table('growth, seconds of a sample (token, step)', out)
    return out


def compiled(b, words):
    """grpo_decoder.py's step with and without --compile=True, regional compilation of the transformer blocks."""
    off, on = (prepare(b, 'grpo_decoder', words) for _ in range(2))
    grpo_decoder.compile_blocks(on.uae, on.ref)
    warm, parts = seconds(lambda: measure(on)), ('rollout', 'update', 'total')
    out = in_turn(dict(off=(off, None), on=(on, None)), b.steps)
    out = {n: {k: row[k] for k in parts} for n, row in out.items()} | {'on / off': {k: out['on'][k] / out['off'][k] for k in parts}}
    table(f'compile, first step {warm:.0f} s', out)
    return dict(out, first_step=warm)


def ranks(b, words):
    """The scripts themselves on one rank and on two, one thread each, same global batch: median seconds of an update (wall)."""
    out = {}
    for stage in [b.stage] if b.stage else ('grpo_encoder', 'grpo_decoder'):
        sec = {}
        for n in (1, 2):
            folder = f'out/bench/{stage}-{n}-{os.getpid()}'
            run = f'-m torch.distributed.run --nproc_per_node={n} {STAGES[stage].__file__} --out_dir={folder} --steps={b.steps + 2} --eval_every=0 --eval_images=2'
            subprocess.run([sys.executable, *run.split(), *words], check=True, stdout=subprocess.DEVNULL, env=dict(os.environ, OMP_NUM_THREADS='1'))
            with open(f'{folder}/log.jsonl') as f:
                sec[f'{n} ranks'] = medians([json.loads(line) for line in f])['sec']
        out[stage] = dict(sec, **{'speed-up': sec['1 ranks'] / sec['2 ranks']})
    table('seconds of an update', out)
    return out


PARTS, PEERS = dict(stages=stages, growth=growth, compile=compiled, ranks=ranks), ('flow_grpo', 'full_logits')


def main(argv):
    b = config.parse({**{k: v for script in STAGES.values() for k, v in script.keys.items()}, **keys}, {}, argv, __file__)
    if b.part not in PARTS or b.stage not in ('', *STAGES) or b.peer not in ('', *PEERS):
        raise SystemExit(f'--part is one of {" ".join(PARTS)}; --stage one of {" ".join(STAGES)}; --peer one of {" ".join(PEERS)}')
    part = importlib.import_module(f'tests.peers.{b.peer}').compare if b.peer else PARTS[b.part]
    result = part(b, [w for w in argv if w.split('=')[0][2:] not in keys])
    if b.json:
        out = dict(device=torch.cuda.is_available() and torch.cuda.get_device_name(), threads=torch.get_num_threads(), torch=torch.__version__, argv=argv, result=result)
        common.write_json(b.json, out, allow_nan=False)


if __name__ == '__main__':
    main(sys.argv[1:])
