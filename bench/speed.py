"""What a step costs: beside the bare cost of its networks, and as its sizes grow.

    python bench/speed.py                       # every stage: its parts, and its limit
    python bench/speed.py --part=growth         # P, G, T, S times 1, 2, 4, 8
    python bench/speed.py --part=compile        # grpo_decoder.py with and without --compile=True
    python bench/speed.py --part=ranks          # one rank and two
    python bench/speed.py --random=True --preset=medium     # published sizes (make bench-gpu)

Keys of the stages and shared keys are taken too (--batch=2 --preset=paper). What is compared is
measured in turn; numbers are medians. Captions are exactly caption_len tokens: the end token is
forbidden. With one CPU thread the clock is the process's own CPU time, else wall time.

`limit` is a step without data and optimiser over the forward and backward passes that its
mathematics needs (bench/networks.py). Steps of other projects: tests/peers.
"""
import gc
import json
import os
import statistics
import subprocess
import sys

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.chdir(ROOT)
from lib.files import write_json
import config
from bench.networks import network_calls
from bench.steps import SCRIPTS, STEPS, WARM_UP, Stage
from bench.steps import forget_gradients, in_turn, key_of, measure, medians, seconds
from lib.log import peak_memory
from tools.flops import flop_counter

# --- script keys ---------------------------------------------------------------------------------
keys = dict(
    part = 'stages',           # stages | growth | compile | ranks
    stage = '',                # cold_start | grpo_encoder | grpo_decoder; '' = all three (growth,
                               # ranks: the last two)
    steps = 7,                 # updates measured of each side, in turn, after two that do not count
    random = False,            # random weights in published sizes: nothing is loaded or downloaded
    layers = 0,                # of every network with random weights, widths as published; 0 = all
    json = '',                 # file for everything that was measured
)
# -------------------------------------------------------------------------------------------------


# --- measuring -----------------------------------------------------------------------------------
def limit(stage, steps):
    """The step and its bare networks in turn.

    Returns medians: of the step's parts, of each network call, and of the ratio of their sums.
    """
    calls = network_calls(stage)
    turns = []
    for _ in range(steps + WARM_UP):
        turn = measure(stage)
        turn['optimiser'] = seconds(stage.optimiser.step, 0)
        bare = {}
        for call in calls:
            bare[call.label()] = seconds(call.repeat, stage.uae)
            forget_gradients(stage)
        networks = sum(bare.values())
        turn.update(bare, networks=networks, limit=turn['total'] / networks)
        turns.append(turn)
    return medians(turns), list(bare)


def utilisation(stage, update_seconds):
    """The update's FLOP, a square matrix product's FLOP per second, the update's share of it.

    FLOP of matrix products, convolutions and attention, with what is recomputed.
    """
    step = STEPS[stage.name](stage)
    next(step)                                   # the rollout
    with flop_counter() as counter:
        for _ in step:
            pass
    flops = counter.get_total_flops()
    device = stage.uae.device
    side = 8192 if device.type == 'cuda' else 1024
    a = torch.randn(side, side, device=device, dtype=getattr(torch, stage.config.dtype))
    turns = [seconds(torch.matmul, a, a) for _ in range(10 + WARM_UP)]
    peak = 2 * side ** 3 / statistics.median(turns[WARM_UP:])
    return dict(update_flops=flops, matmul_peak=peak,
                update_share_of_peak=flops / update_seconds / peak)


def table(title, rows):
    """Prints {row: {column: number}}; the first row's columns are everybody's."""
    columns = list(next(iter(rows.values())))
    heading = ''.join(f'{column:>14}' for column in columns)
    print(f'\n{title:48s}{heading}')
    for name, row in rows.items():
        numbers = ''.join(f'{row[column]:14.4g}' for column in columns)
        print(f'{name:48s}{numbers}')


def print_column(title, numbers):
    table(title, {name: dict(seconds=number) for name, number in numbers.items()})


# --- part stages ---------------------------------------------------------------------------------
PRINTED = ('data', 'rollout', 'update', 'optimiser', 'total', 'captions', 'condition', 'dit', 'vae',
           'reward')


def stages(options, argv):
    """Each stage's step: by part, over its bare networks, per second, share of the peak."""
    names = [options.stage] if options.stage else SCRIPTS
    out = {}
    for name in names:
        out[name] = one_stage(name, options, argv)
        gc.collect()             # a full-size model and its watched methods go before the next one
    return out


def one_stage(name, options, argv):
    stage = Stage(name, argv, options.random, options.layers)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    row, labels = limit(stage, options.steps)
    unit = 'captions' if name == 'grpo_encoder' else 'images'
    per_second = stage.config.batch * stage.G / row['total']
    row[f'{unit}_per_sec'] = per_second
    row['peak_gb'] = peak_memory()
    row.update(utilisation(stage, row['update']))

    own = stage.config
    title = (f'{name}: {own.batch} x {stage.G}, T {own.caption_len}, '
             f'S {own.denoise_steps}, guidance {own.guidance}, {own.dtype}')
    print_column(title, {part: row.get(part, 0.0) for part in PRINTED})
    bare = {label: row[label] for label in [*labels, 'networks']}
    print_column('bare networks, times x call x rows', bare)
    print(f'limit {row["limit"]:.3f}   {per_second:.3g} {unit}/s   '
          f'update {row["update_flops"] / 1e12:.3g} TFLOP, '
          f'{100 * row["update_share_of_peak"]:.0f} % of {row["matmul_peak"] / 1e12:.3g} TFLOP/s   '
          f'peak {row["peak_gb"]:.2f} GB')
    return row


# --- part growth ---------------------------------------------------------------------------------
SIZES = dict(
    batch=(2, 4, 8, 16),
    group=(2, 4, 8, 16),
    caption_len=(8, 16, 32, 64),
    denoise_steps=(4, 8, 16, 32),
)
# stage, the key that grows, the parts of the step that are timed
GROWTHS = (
    ('grpo_encoder', 'batch', ('total',)),
    ('grpo_encoder', 'group', ('total',)),
    ('grpo_encoder', 'caption_len', ('captions', 'update')),
    ('grpo_decoder', 'batch', ('total',)),
    ('grpo_decoder', 'group', ('total',)),
    ('grpo_decoder', 'denoise_steps', ('rollout dit',)),
)


def growth(options, argv):
    """Seconds of a sample as P and G grow, of a token as T grows, of a denoising step as S."""
    out = {}
    for name, key, parts in GROWTHS:
        if options.stage in ('', name):
            out[f'{name} {key}'] = growth_of(name, key, parts, options, argv)
    table('growth, seconds of a sample (token, step)', out)
    return out


def growth_of(name, key, parts, options, argv):
    sizes = SIZES[key]
    by_size = {}
    for size in sizes:
        changes = {'batch': 2, 'group': 4, 'cond_len': 72, key: size}
        by_size[size] = Stage(name, argv, options.random, options.layers, **changes)
    turns = []
    for _ in range(options.steps + WARM_UP):
        turn = {}
        for size, stage in by_size.items():
            spent = measure(stage)
            turn[size] = sum(spent[part] for part in parts)
        turns.append(turn)

    found = medians(turns)
    row = {}
    for size, stage in by_size.items():
        units = stage.config.batch * stage.G
        if parts != ('total',):
            units *= size                        # tokens or steps, not samples
        row[f'x {size // sizes[0]}'] = found[size] / units
    row['x 8 over x 1'] = row['x 8'] / row['x 1']
    return row


# --- part compile --------------------------------------------------------------------------------
def compiled(options, argv):
    """grpo_decoder.py's step with and without --compile=True."""
    off = Stage('grpo_decoder', argv, options.random, options.layers)
    on = Stage('grpo_decoder', argv, options.random, options.layers)
    on.uae.decoder.compile_blocks()
    if on.reference:
        on.reference.decoder.compile_blocks()
    first_step = seconds(measure, on)
    found = in_turn(dict(off=(off, None), on=(on, None)), options.steps)
    out = {}
    for side, row in found.items():
        out[side] = {part: row[part] for part in ('rollout', 'update', 'total')}
    out['on / off'] = {part: out['on'][part] / out['off'][part] for part in out['on']}
    table(f'compile, first step {first_step:.0f} s', out)
    return dict(out, first_step=first_step)


# --- part ranks ----------------------------------------------------------------------------------
def ranks(options, argv):
    """The scripts on one rank and on two, one thread each, same global batch.

    Median seconds of an update, by the wall's clock.
    """
    names = [options.stage] if options.stage else ['grpo_encoder', 'grpo_decoder']
    out = {}
    for name in names:
        one = update_seconds(name, 1, options.steps, argv)
        two = update_seconds(name, 2, options.steps, argv)
        out[name] = {'1 ranks': one, '2 ranks': two, 'speed-up': one / two}
    table('seconds of an update', out)
    return out


def update_seconds(name, world, steps, argv):
    folder = f'out/bench/{name}-{world}-{os.getpid()}'
    command = [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={world}',
               SCRIPTS[name].__file__, f'--out_dir={folder}', f'--steps={steps + WARM_UP}',
               '--eval_every=0', '--eval_images=2', *argv]
    env = dict(os.environ, OMP_NUM_THREADS='1')
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
    with open(f'{folder}/log.jsonl') as f:
        return medians([json.loads(line) for line in f])['sec']


# --- the command ---------------------------------------------------------------------------------
PARTS = dict(stages=stages, growth=growth, compile=compiled, ranks=ranks)


def parse(argv, script=__file__):
    """Arguments -> the keys of this file, and the arguments that are for the stages."""
    of_stages = {}
    for stage in SCRIPTS.values():
        of_stages.update(stage.keys)
    options = config.parse({**of_stages, **keys}, {}, argv, script)
    if options.part not in PARTS or options.stage not in ('', *SCRIPTS):
        raise SystemExit(f'--part is one of {" ".join(PARTS)}; --stage one of {" ".join(SCRIPTS)}')
    return options, [argument for argument in argv if key_of(argument) not in keys]


def write_report(options, argv, result):
    """The file of --json: what was measured, and on what."""
    if not options.json:
        return
    device = False
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    report = dict(device=device, threads=torch.get_num_threads(), torch=torch.__version__,
                  argv=argv, result=result)
    write_json(options.json, report, allow_nan=False)


def main(argv):
    options, of_stages = parse(argv)
    result = PARTS[options.part](options, of_stages)
    write_report(options, argv, result)


if __name__ == '__main__':
    main(sys.argv[1:])
