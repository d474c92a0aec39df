"""What a step costs: beside the bare cost of its networks, and as its sizes grow.

    python bench/speed.py                       # every stage: its parts, and its limit
    python bench/speed.py --part=growth         # P, G, T, S times 1, 2, 4, 8
    python bench/speed.py --part=compile        # grpo_decoder.py with and without --compile=True
    python bench/speed.py --part=ranks          # one rank and two
    python bench/speed.py --random=True --preset=medium     # published sizes (make bench-gpu)

Keys of the stages and shared keys are taken too (--batch=2 --preset=paper). A stage's own main runs
a few updates with a clock at its seams; numbers are medians. Captions are exactly caption_len
tokens: the end token is forbidden. With one CPU thread the clock is the process's own CPU time,
else wall time.

`limit` is a step without data and optimiser over the seconds that it spends inside its networks and
their backward passes. Steps of other projects: tests/peers.
"""
import collections
import contextlib
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from unittest.mock import patch

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.chdir(ROOT)
import cold_start
import config
import grpo_decoder
import grpo_encoder
from decoder import Decoder
from encoder import Encoder
from lib import checkpoint
from lib.files import write_json
from lib.log import peak_memory
from lib.optimiser import Optimiser
from model import UAE
from reward import Reward, reward_tower
from tools.flops import flop_counter
from tools.rehearse import (ARCHITECTURES, random_reward, replaced, shortened, skeleton,
                            stand_ins)

SCRIPTS = dict(cold_start=cold_start, grpo_encoder=grpo_encoder, grpo_decoder=grpo_decoder)
WARM_UP = 2                     # first updates, which do not count

# --- script keys ---------------------------------------------------------------------------------
keys = dict(
    part = 'stages',           # stages | growth | compile | ranks
    stage = '',                # cold_start | grpo_encoder | grpo_decoder; '' = all three (growth,
                               # ranks: the last two)
    steps = 7,                 # updates measured, after two that do not count
    random = False,            # random weights in published sizes: nothing is loaded or downloaded
    layers = 0,                # of every network with random weights, widths as published; 0 = all
    json = '',                 # file for everything that was measured
)
# -------------------------------------------------------------------------------------------------


# --- the clock -----------------------------------------------------------------------------------
def clock():
    """Seconds: of this process where it is alone on one CPU thread, else of the wall.

    Where there is a device it has finished first.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def seconds(call, *args):
    """Seconds of one call."""
    start = clock()
    call(*args)
    return clock() - start


def medians(turns):
    """Dicts of numbers, one a turn -> their medians without the first turns."""
    counted = turns[WARM_UP:]
    return {name: statistics.median(turn.get(name, 0.0) for turn in counted)
            for name in turns[-1]}


# --- a stage's own main --------------------------------------------------------------------------
# functions whose seconds are noted, as what
WATCHED = (
    (Encoder, 'see', 'captions'),
    (Encoder, 'sample', 'captions'),
    (UAE, 'condition', 'condition'),
    (Decoder, 'network', 'dit'),
    (Decoder, 'to_image', 'vae'),
    (Reward, 'reward', 'reward'),
)


def key_of(argument):
    return argument.split('=')[0].removeprefix('--')


class Run:
    """A few updates of a script's main -> turns, for each update {part: seconds}.

    argv: arguments of the command line; those that the script has no key for are left out. changes:
    keys that win over them. Subclasses do more: `opened` before the first update, `drawn` after a
    rollout, `trained` when the gradients are there, `after` an update.
    """

    def __init__(self, name, argv, options, **changes):
        script = SCRIPTS[name]
        known = {'preset', *config.shared, *script.keys}
        argv = [*argv, *(f'--{key}={value}' for key, value in changes.items())]
        argv = [argument for argument in argv if key_of(argument) in known]
        argv += ['--eval_every=0', f'--steps={options.steps + WARM_UP}']
        self.options = options
        self.config = config.parse(script.keys, script.own_presets, argv, script.__file__,
                                   script.limits)
        self.P, self.G = self.config.batch, getattr(self.config, 'group', 1)
        self.reference = None
        self.turns = []
        self.spent = collections.Counter()
        self.inside = None                      # the network that is at work, or a backward pass
        others = dict(open_out_dir=lambda *args: 0, maybe_save=lambda *args: None)
        if options.random:
            others = stand_ins(self.config)
        others.update(open_uae=self.open_uae, open_reference=self.open_reference,
                      reward_tower=self.open_tower, Log=lambda *args: self,
                      Optimiser=self.open_optimiser, rollout=self.watched_rollout(script.rollout))
        networks = [(torch.Tensor, 'backward'), (Encoder, 'next_state')]
        if torch.cuda.is_available():           # captions are written by one graph
            networks.append((Encoder, 'sample'))
        with contextlib.ExitStack() as stack:
            for place, name in networks:
                call = self.network(getattr(place, name))
                stack.enter_context(patch.object(place, name, call))
            for place, name, part in WATCHED:
                call = self.timed(getattr(place, name), part)
                stack.enter_context(patch.object(place, name, call))
            stack.enter_context(replaced(script, **others))
            script.main(argv)

    def opened(self):
        pass

    def drawn(self):
        pass

    def trained(self):
        pass

    def after(self, turn):
        pass

    # --- what main opens -------------------------------------------------------------------------
    @property
    def known(self):
        """Published configurations, cut to options.layers."""
        return shortened(ARCHITECTURES, self.options.layers or math.inf)

    def open_uae(self, config, device, original=checkpoint.open_uae):
        if self.options.random:
            self.uae = skeleton(config, device, self.known)
        else:
            self.uae = original(config, device)
        encoder, decoder = self.uae.encoder, self.uae.decoder
        encoder.forbidden[encoder.end] = True
        self.watch_networks(encoder.vlm.model.visual, encoder.language_model, encoder.head,
                            self.uae.projector, decoder.transformer, decoder.vae.decoder)
        return self.uae

    def open_reference(self, *args, original=checkpoint.open_reference):
        self.reference = original(*args)
        return self.reference

    def open_tower(self, config, device):
        if self.options.random:
            self.tower = random_reward(config, device, self.known)
        else:
            self.tower = reward_tower(config, device)
        self.watch_networks(*[backbone.tower for backbone in self.tower.towers])
        return self.tower

    def open_optimiser(self, params, config, **options):
        self.params = params
        optimiser = Optimiser(params, config, **options)
        take_step = optimiser.step

        def step(number):
            self.end('update')
            self.trained()
            self.mark = clock()
            taken = take_step(number)
            self.end('optimiser')
            return taken

        optimiser.step = step
        return optimiser

    # --- the clock at its seams ------------------------------------------------------------------
    def progress(self, start_step):
        """In place of the log's: an update is a turn."""
        self.opened()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        for step in range(self.config.steps):
            self.spent.clear()
            self.mark = clock()
            yield step
            total = self.spent['rollout'] + self.spent['update']
            turn = dict(self.spent, total=total, limit=total / self.spent['networks'])
            self.after(turn)
            self.turns.append(turn)

    def __call__(self, step, **fields):
        """In place of a line of the log."""

    def end(self, part):
        now = clock()
        self.spent[part] += now - self.mark
        self.mark = now

    def watched_rollout(self, rollout):
        def call(*args):
            self.end('data')
            self.rollout = partial(rollout, *args)              # for whoever wants another
            out = self.rollout()
            self.end('rollout')
            self.spent['rollout dit'] = self.spent['dit']
            self.drawn()
            return out

        return call

    def timed(self, call, part):
        def watched(*args, **kwargs):
            start = clock()
            out = call(*args, **kwargs)
            self.spent[part] += clock() - start
            return out

        return watched

    # --- networks: a frozen copy of one has its hooks too ----------------------------------------
    def watch_networks(self, *modules):
        for module in modules:
            module.register_forward_pre_hook(lambda module, inputs: self.enter(module))
            module.register_forward_hook(lambda module, inputs, out: self.leave(module))

    def network(self, call):
        def watched(*args, **kwargs):
            self.enter(call)
            out = call(*args, **kwargs)
            self.leave(call)
            return out

        return watched

    def enter(self, network):
        if self.inside is None:
            self.inside = network
            self.entered = clock()

    def leave(self, network):
        if self.inside is network:
            self.inside = None
            self.spent['networks'] += clock() - self.entered


# --- part stages ---------------------------------------------------------------------------------
class Counted(Run):
    """A run whose first update is counted in floating-point operations."""

    def drawn(self):
        self.counter = flop_counter()
        if not self.turns:
            self.counter.__enter__()

    def trained(self):
        if not self.turns:
            self.counter.__exit__(None, None, None)
            self.update_flops = self.counter.get_total_flops()


def matmul_peak(config, device):
    """FLOP per second of a square matrix product."""
    side = 8192 if device.type == 'cuda' else 1024
    a = torch.randn(side, side, device=device, dtype=getattr(torch, config.dtype))
    turns = [dict(product=seconds(torch.matmul, a, a)) for _ in range(10 + WARM_UP)]
    return 2 * side ** 3 / medians(turns)['product']


def table(title, rows):
    """Prints {row: {column: number}}; the first row's columns are everybody's."""
    columns = list(next(iter(rows.values())))
    print(f'\n{title:48s}' + ''.join(f'{column:>14}' for column in columns))
    for name, row in rows.items():
        print(f'{name:48s}' + ''.join(f'{row[column]:14.4g}' for column in columns))


PRINTED = ('data', 'rollout', 'update', 'optimiser', 'total', 'networks', 'captions', 'condition',
           'dit', 'vae', 'reward')


def stages(options, argv):
    """Each stage's step: by part, over its bare networks, per second, share of the peak."""
    out = {}
    for name in [options.stage] if options.stage else SCRIPTS:
        run = Counted(name, argv, options)
        row = medians(run.turns)
        unit = 'captions' if name == 'grpo_encoder' else 'images'
        peak = matmul_peak(run.config, run.uae.device)
        row.update({f'{unit}_per_sec': run.P * run.G / row['total'], 'peak_gb': peak_memory()},
                   update_flops=run.update_flops, matmul_peak=peak,
                   update_share_of_peak=run.update_flops / row['update'] / peak)
        c = run.config
        title = (f'{name}: {run.P} x {run.G}, T {c.caption_len}, S {c.denoise_steps}, '
                 f'guidance {c.guidance}, {c.dtype}')
        table(title, {part: dict(seconds=row.get(part, 0.0)) for part in PRINTED})
        print(f'limit {row["limit"]:.3f}   {row[f"{unit}_per_sec"]:.3g} {unit}/s   '
              f'update {run.update_flops / 1e12:.3g} TFLOP, '
              f'{100 * row["update_share_of_peak"]:.0f} % of {peak / 1e12:.3g} TFLOP/s   '
              f'peak {row["peak_gb"]:.2f} GB')
        out[name] = row
        del run
        gc.collect()                            # a full-size model goes before the next one
    return out


# --- part growth ---------------------------------------------------------------------------------
SIZES = dict(batch=(2, 4, 8, 16), group=(2, 4, 8, 16), caption_len=(8, 16, 32, 64),
             denoise_steps=(4, 8, 16, 32))
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
        if options.stage not in ('', name):
            continue
        row = {}
        for size in SIZES[key]:
            run = Run(name, argv, options, **{'batch': 2, 'group': 4, 'cond_len': 72, key: size})
            spent = medians(run.turns)
            units = run.P * run.G * (1 if parts == ('total',) else size)
            row[f'x {size // SIZES[key][0]}'] = sum(spent[part] for part in parts) / units
        row['x 8 over x 1'] = row['x 8'] / row['x 1']
        out[f'{name} {key}'] = row
    table('growth, seconds of a sample (token, step)', out)
    return out


# --- parts compile and ranks ---------------------------------------------------------------------
def compiled(options, argv):
    """grpo_decoder.py's step with and without --compile=True."""
    off = Run('grpo_decoder', argv, options, compile=False)
    on = Run('grpo_decoder', argv, options, compile=True)
    out = {}
    for side, run in dict(off=off, on=on).items():
        spent = medians(run.turns)
        out[side] = {part: spent[part] for part in ('rollout', 'update', 'total')}
    out['on / off'] = {part: out['on'][part] / out['off'][part] for part in out['on']}
    first_step = on.turns[0]['total']
    table(f'compile, first step {first_step:.0f} s', out)
    return dict(out, first_step=first_step)


def on_ranks(options, argv):
    """The scripts on one rank and on two, one thread each, same global batch.

    Median seconds of an update, by the wall's clock.
    """
    out = {}
    for name in [options.stage] if options.stage else ['grpo_encoder', 'grpo_decoder']:
        sec = {}
        for world in (1, 2):
            folder = f'out/bench/{name}-{world}-{os.getpid()}'
            command = [sys.executable, '-m', 'torch.distributed.run',
                       f'--nproc_per_node={world}', SCRIPTS[name].__file__,
                       f'--out_dir={folder}', f'--steps={options.steps + WARM_UP}',
                       '--eval_every=0', '--eval_images=2', *argv]
            env = dict(os.environ, OMP_NUM_THREADS='1')
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
            with open(f'{folder}/log.jsonl') as f:
                sec[f'{world} ranks'] = medians([json.loads(line) for line in f])['sec']
        out[name] = dict(sec, **{'speed-up': sec['1 ranks'] / sec['2 ranks']})
    table('seconds of an update', out)
    return out


# --- the command ---------------------------------------------------------------------------------
PARTS = dict(stages=stages, growth=growth, compile=compiled, ranks=on_ranks)


def parse(argv, script=__file__):
    """Arguments -> the keys of this file, and the arguments that are for the stages."""
    of_stages = {}
    for stage in SCRIPTS.values():
        of_stages.update(stage.keys)
    options = config.parse({**of_stages, **keys}, {}, argv, script,
                           dict(part=tuple(PARTS), stage=('', *SCRIPTS)))
    return options, [argument for argument in argv if key_of(argument) not in keys]


def write_report(options, argv, result):
    """The file of --json: what was measured, and on what."""
    if options.json:
        device = torch.cuda.is_available() and torch.cuda.get_device_name()
        report = dict(device=device, threads=torch.get_num_threads(), torch=torch.__version__,
                      argv=argv, result=result)
        write_json(options.json, report, allow_nan=False)


def main(argv):
    options, of_stages = parse(argv)
    write_report(options, argv, PARTS[options.part](options, of_stages))


if __name__ == '__main__':
    main(sys.argv[1:])
