"""A stage opened for measuring: its models, one batch, and its step as its script does it.

Captions are exactly caption_len tokens: the end token is forbidden.
"""
import collections
import statistics
import time

import torch

import cold_start
import grpo_decoder
import grpo_encoder
from config import parse, shared
from data.images import open_data
from lib import checkpoint, ranks
from lib.optimiser import Optimiser
from reward import reward_tower
from tools.rehearse import ARCHITECTURES, RandomImages, random_reward, shortened, skeleton

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
        config = parse(script.keys, script.own_presets, argv, script.__file__, script.limits)
        run = ranks.start(config)
        self.name = name
        self.config = config
        self.G = getattr(config, 'group', 1)
        self.open_models(random, layers, run.device)
        self.optimiser = Optimiser(self.params, config)
        self.train = RandomImages(config)
        if not random:
            self.train, _ = open_data(config, run)
        self.images = self.data()
        self.x = self.images['x']
        self.spent = collections.Counter()       # seconds of the present step by part
        self.watch_networks()

    def open_models(self, random, layers, device):
        """layers: of every network with random weights, widths as published; 0 = all."""
        config = self.config
        if random:
            known = shortened(ARCHITECTURES, layers) if layers else ARCHITECTURES
            self.uae = skeleton(config, device, known)
            self.tower = random_reward(config, device, known)
        else:
            self.uae = checkpoint.open_uae(config, device)
            self.tower = reward_tower(config, device)
        encoder = self.uae.encoder
        encoder.forbidden[encoder.end] = True
        self.params = self.uae.train_only(*TRAINED[self.name])
        self.negative = None
        if config.guidance != 1.0 and self.name == 'grpo_decoder':
            self.negative = self.uae.negative()
        self.reference = None
        if getattr(config, 'kl', 0):
            self.reference = self.uae.reference(TRAINED[self.name][0])

    def data(self):
        """A batch of images, read anew."""
        return self.train.batch(self.config.seed, 0, self.config.batch)

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
        encoder, decoder = self.uae.encoder, self.uae.decoder
        self.watch(encoder, 'see', 'captions')
        self.watch(encoder, 'sample', 'captions')
        self.watch(self.uae, 'condition', 'condition')
        self.watch(decoder.vae, 'decode', 'vae')
        self.watch(self.tower, 'reward', 'reward')
        self.watch(decoder.transformer, 'forward', 'dit')
        if self.reference and self.reference.decoder is not decoder:
            self.watch(self.reference.decoder.transformer, 'forward', 'dit')


# Each step as its script does it, without data, optimiser and log: yields the name of each part
# that is done, and leaves the gradients.
def cold_start_step(stage):
    config, uae = stage.config, stage.uae
    sampled, vision = cold_start.rollout(uae, stage.images, 0, config)
    yield 'rollout'
    uae.train()
    for _, rows, _ in ranks.sample_slices(config.batch, 1, config.micro_batch):
        part = ranks.take(sampled, rows)
        loss = cold_start.reconstruction_loss(uae, stage.tower, **part, config=config,
                                              vision=ranks.take(vision, rows))
        (loss * len(part['x']) / config.batch).backward()
    uae.eval()
    yield 'update'


def grpo_encoder_step(stage):
    config, uae = stage.config, stage.uae
    sampled, r, vision = grpo_encoder.rollout(uae, stage.tower, stage.images, 0, config)
    sampled['adv'] = grpo_encoder.group_advantage(r, config.adv_std).flatten()
    yield 'rollout'
    sampled['weight'], count = grpo_encoder.token_weights(sampled['mask'], config.loss_mean)
    uae.train()
    for shown, rows, _ in ranks.sample_slices(config.batch, config.group, config.micro_batch):
        part, seen = ranks.take(sampled, rows), ranks.take(vision, shown)
        logp = uae.encoder.logp(seen, part['y'], config.temperature)
        loss, _ = grpo_encoder.policy_loss(
            logp, logp.detach(), part['adv'], part['mask'], config.clip_range, config.ratio,
            part['weight'])
        weight = part['weight'].sum()
        if stage.reference:
            with torch.no_grad():
                ref_logp = stage.reference.encoder.logp(seen, part['y'], config.temperature)
            k3 = grpo_encoder.kl_k3(logp, ref_logp)
            loss = loss + config.kl * (k3 * part['weight']).sum() / weight
        (loss * weight / count).backward()
    uae.eval()
    yield 'update'


def decoder_rollout(stage):
    """What an update of stage 3 takes, and the numbers of its trained steps."""
    config = stage.config
    sampled, r, _ = grpo_decoder.rollout(stage.uae, stage.tower, stage.images, 0, config,
                                         stage.negative)
    sampled['adv'] = grpo_decoder.group_advantage(r).flatten()
    sigmas = stage.uae.decoder.sigmas(config.denoise_steps)
    return sampled, grpo_decoder.window(0, config, sigmas)[1]


def grpo_decoder_step(stage):
    config, uae = stage.config, stage.uae
    sampled, trained = decoder_rollout(stage)
    yield 'rollout'
    P, G, n = config.batch, config.group, len(trained)
    uae.train()
    for rows, at, _ in ranks.step_slices(P, G, n, config.micro_batch):
        part = ranks.take(sampled, rows)
        stored = dict(z=part['z'][:, at], z_next=part['z_next'][:, at], c=part['c'],
                      steps=trained[at], S=config.denoise_steps, kind=config.sde,
                      noise_level=config.noise_level, negative=stage.negative)
        v0 = part['v0'][:, at] if 'v0' in part else None
        logp, mean, std = uae.decoder.step_logp(**stored, v0=v0)
        loss, _ = grpo_decoder.policy_loss(logp, logp.detach(), part['adv'],
                                           clip=config.clip_range)
        if stage.reference:
            with torch.no_grad():
                _, ref_mean, _ = stage.reference.decoder.step_logp(**stored)
            loss = loss + config.kl * grpo_decoder.kl_gauss(mean, ref_mean, std)
        (loss * logp.numel() / (P * G * n)).backward()
    uae.eval()
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
