"""A stage opened for measuring: its models, one batch, and its step as its script does it.

Captions are exactly caption_len tokens: the end token is forbidden.
"""
import collections
import statistics
import time

import torch

from lib import checkpoint
import cold_start
from lib import ranks
import grpo_decoder
import grpo_encoder
from config import parse, shared
from data.images import open_data
from reward import reward_tower
from tools import plan

SCRIPTS = dict(cold_start=cold_start, grpo_encoder=grpo_encoder, grpo_decoder=grpo_decoder)
TRAINED = dict(
    cold_start=('encoder', 'projector', 'decoder'),
    grpo_encoder=('encoder',),
    grpo_decoder=('decoder',),
)
WARM_UP = 2                     # first turns, which do not count


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
    found = {}
    for key in turns[-1]:
        found[key] = statistics.median(turn.get(key, 0.0) for turn in counted)
    return found


# --- models with random weights ------------------------------------------------------------------
LAYER_COUNTS = ('depth', 'num_layers', 'num_hidden_layers')
LAYER_LISTS = ('fullatt_block_indexes', 'dual_attention_layers')


def shortened(architecture, layers):
    """A published configuration with at most that many layers in each network; widths stay."""
    found = {}
    for key, value in architecture.items():
        if isinstance(value, dict):
            value = shortened(value, layers)
        elif key in LAYER_COUNTS:
            value = min(value, layers)
        elif key in LAYER_LISTS:
            value = [i for i in value if i < layers]
        found[key] = value
    return found


def random_models(config, layers, device):
    """UAE and reward tower in the published sizes of c's models; layers: see `shortened`, 0 = all.

    The tokenizer is the tiny one.
    """
    known = plan.ARCHITECTURES
    if layers:
        known = shortened(known, layers)
    return plan.skeleton(config, device, known), plan.random_reward(config, device, known)


# --- a stage and its step ------------------------------------------------------------------------
def key_of(argument):
    return argument.split('=')[0].removeprefix('--')


class Stage:
    """Everything that a step of a stage needs: configuration, models, optimiser, one batch.

    argv: arguments of the command line; those that the stage has no key for are left out.
    changes: keys that win over them.
    """

    def __init__(self, name, argv, random=False, layers=0, **changes):
        script = SCRIPTS[name]
        known = {'preset', *shared, *script.keys}
        argv = [*argv, *(f'--{key}={value}' for key, value in changes.items())]
        argv = [argument for argument in argv if key_of(argument) in known]
        config = parse(script.keys, script.own_presets, argv, script.__file__)
        run = ranks.start(config)
        self.name = name
        self.config = config
        self.G = getattr(config, 'group', 1)
        self.open_models(random, layers, run.device)
        self.optimiser = common.Optimiser(self.params, config)
        self.train = None
        if not random:
            self.train, _ = open_data(config, run)
        batch = self.data()
        self.x = batch['x'].to(run.device)
        self.index = batch['index']
        self.spent = collections.Counter()       # seconds of the present step by part
        self.watch_networks()

    def open_models(self, random, layers, device):
        config = self.config
        if random:
            self.uae, self.tower = random_models(config, layers, device)
        else:
            self.uae = checkpoint.open_uae(config, device)
            self.tower = reward_tower(config, device)
        self.uae.forbidden[self.uae.end] = True
        self.params = self.uae.train_only(*TRAINED[self.name])
        self.negative = None
        if config.guidance != 1.0 and self.name == 'grpo_decoder':
            self.negative = self.uae.negative()
        self.reference = None
        if getattr(config, 'kl', 0):
            self.reference = self.uae.reference(TRAINED[self.name][0])

    def data(self):
        """A batch of images, read anew."""
        config = self.config
        if self.train:
            return self.train.batch(config.seed, 0, config.prompts)
        x = torch.rand(config.prompts, 3, config.resolution, config.resolution) * 2 - 1
        return dict(x=x, index=torch.arange(config.prompts))

    def watch(self, owner, name, part):
        """Adds the seconds of every call of owner.name to spent[part]."""
        call = getattr(owner, name)

        def watched(*args, **kwargs):
            start = clock()
            out = call(*args, **kwargs)
            self.spent[part] += clock() - start
            return out

        setattr(owner, name, watched)

    def watch_networks(self):
        self.watch(self.uae, 'see', 'captions')
        self.watch(self.uae, 'sample_captions', 'captions')
        self.watch(self.uae, 'condition', 'condition')
        self.watch(self.uae.vae, 'decode', 'vae')
        self.watch(self.tower, 'features', 'reward')
        self.watch(self.uae.decoder, 'forward', 'dit')
        if self.reference and self.reference.decoder is not self.uae.decoder:
            self.watch(self.reference.decoder, 'forward', 'dit')


# Each step as its script does it, without data, optimiser and log: yields the name of each part
# that is done, and leaves the gradients.
def cold_start_step(stage):
    config = stage.config
    seen, batch = cold_start.caption(stage.uae, stage.x, stage.index, 0, config)
    yield 'rollout'
    for _, rows, _ in ranks.group_slices(len(stage.x), 1, config.micro_batch):
        part, seen_part = ranks.take(batch, rows), ranks.take(seen, rows)
        share = 1 / config.prompts
        loss = stage.uae(cold_start.loss_of, stage.tower, seen_part, part, share, config)
        loss.backward()
    yield 'update'


def grpo_encoder_step(stage):
    config, uae = stage.config, stage.uae
    seen, batch, r = grpo_encoder.rollout(uae, stage.tower, stage.x, stage.index, 0, config)
    batch['adv'] = grpo_encoder.group_advantage(r, config.adv_std).flatten()
    yield 'rollout'
    batch['old_logp'] = batch['recorded']
    batch['weight'], count = grpo_encoder.token_weights(batch['mask'], config)
    if stage.reference:
        batch['ref_logp'] = grpo_encoder.reference_logp(stage.reference, seen, batch['y'], config)
    for images, rows, _ in ranks.sample_slices(len(stage.x), config.group, config.micro_batch):
        part, seen_part = ranks.take(batch, rows), ranks.take(seen, images)
        loss, _, _ = uae(grpo_encoder.loss_of, seen_part, part, 1 / count, True, config)
        loss.backward()
    yield 'update'


def decoder_rollout(stage):
    """The batch of grpo_decoder.loss_of."""
    batch, r, _ = grpo_decoder.rollout(stage.uae, stage.tower, stage.x, stage.index, 0,
                                       stage.config, stage.negative)
    batch['adv'] = grpo_decoder.group_advantage(r).flatten()
    batch['old_logp'] = batch['recorded']
    return batch


def grpo_decoder_step(stage):
    config = stage.config
    batch = decoder_rollout(stage)
    yield 'rollout'
    share = 1 / len(batch['adv'])
    for _, rows, _ in ranks.sample_slices(len(stage.x), config.group, config.micro_batch):
        part = ranks.take(batch, rows)
        loss, _, _ = stage.uae(grpo_decoder.loss_of, stage.reference, part, 0, share, True, config,
                               stage.negative)
        loss.backward()
    yield 'update'


STEPS = dict(
    cold_start=cold_start_step,
    grpo_encoder=grpo_encoder_step,
    grpo_decoder=grpo_decoder_step,
)


def forget_gradients(stage):
    stage.optimiser.adamw.zero_grad(set_to_none=True)


# --- measuring -----------------------------------------------------------------------------------
def measure(stage, step=None):
    """One step, the stage's own or another: {part: seconds}. The gradients stay.

    `total` leaves data and optimiser out.
    """
    step = step or STEPS[stage.name]
    spent = stage.spent
    spent.clear()
    spent['data'] = seconds(stage.data)
    forget_gradients(stage)
    first = last = clock()
    for part in step(stage):
        now = clock()
        spent[part] = now - last
        spent[f'{part} dit'] = spent['dit'] - spent['rollout dit']
        last = now
    return dict(spent, total=last - first)


def in_turn(sides, steps):
    """{name: (stage, step)}, measured in turn -> {name: medians}."""
    turns = []
    for _ in range(steps + WARM_UP):
        turns.append({name: measure(stage, step) for name, (stage, step) in sides.items()})
    return {name: medians([turn[name] for turn in turns]) for name in sides}
