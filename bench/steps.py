"""A stage opened for measuring: its models, one batch, and its step as its script does it.

Captions are exactly caption_len tokens: the end token is forbidden.
"""
import collections
import contextlib
import statistics
import time

import torch

import cold_start
import common
import config
import grpo_decoder
import grpo_encoder
from data.images import open_data
from model import UAE
from reward import OPENAI, Backbone, backbone

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


@contextlib.contextmanager
def fewer_layers(layers):
    """Inside, the published architectures have at most that many layers; 0 = all of them."""
    published = dict(config.architectures)
    if layers:
        config.architectures.update(shortened(published, layers))
    try:
        yield
    finally:
        config.architectures.update(published)


class RandomTower(Backbone):
    """The reward's tower with the weights that it comes with."""

    def __init__(self, tower):
        torch.nn.Module.__init__(self)
        side = tower.image_size[0]
        self.library = 'open_clip'
        self.tower = tower
        self.pre = dict(OPENAI, resize=side, crop=side)


def random_models(c, layers, device):
    """UAE and reward tower in the published sizes of c's models; the tokenizer is the tiny one."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import AutoProcessor
    with fewer_layers(layers):
        uae, tower, _ = common.skeleton(c, device)
    uae.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    uae.processor = common.load(AutoProcessor, config.shared['encoder'])
    uae.tokenizer = uae.processor.tokenizer
    pixels = uae.processor.image_processor
    pixels.patch_size = uae.encoder.config.vision_config.patch_size
    pixels.size = dict(shortest_edge=1, longest_edge=2 ** 30)
    uae.end = uae.tokenizer.convert_tokens_to_ids('<|im_end|>')
    uae.templates()
    return uae.to(device), RandomTower(tower)


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
        known = {'preset', *config.shared, *script.keys}
        argv = [*argv, *(f'--{key}={value}' for key, value in changes.items())]
        argv = [argument for argument in argv if key_of(argument) in known]
        c = config.parse(script.keys, script.own_presets, argv, script.__file__)
        run = common.start(c)
        self.name = name
        self.c = c
        self.G = getattr(c, 'group', 1)
        self.open_models(random, layers, run.device)
        self.optimiser = torch.optim.AdamW(self.params, lr=c.lr, weight_decay=0.0, fused=True)
        self.train = None
        if not random:
            self.train, _ = open_data(c, run)
        batch = self.data()
        self.x = batch['x'].to(run.device)
        self.index = batch['index']
        self.spent = collections.Counter()       # seconds of the present step by part
        self.watch_networks()

    def open_models(self, random, layers, device):
        c = self.c
        if random:
            self.uae, self.tower = random_models(c, layers, device)
        else:
            self.uae = UAE(c, device)
            self.tower = backbone(c.reward, c, device)
        self.uae.forbidden[self.uae.end] = True
        self.params = self.uae.train_only(*TRAINED[self.name])
        self.negative = None
        if c.guidance != 1.0 and self.name == 'grpo_decoder':
            self.negative = self.uae.negative()
        self.reference = None
        if getattr(c, 'kl', 0):
            self.reference = self.uae.reference(TRAINED[self.name][0])

    def data(self):
        """A batch of images, read anew."""
        c = self.c
        if self.train:
            return self.train.batch(c.seed, 0, c.prompts)
        x = torch.rand(c.prompts, 3, c.resolution, c.resolution) * 2 - 1
        return dict(x=x, index=torch.arange(c.prompts))

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
    c, uae = stage.c, stage.uae
    z = common.normal(uae.latent_shape(), stage.index, c.seed, 'start', 0).to(uae.device)
    u = common.uniform((c.caption_len,), stage.index, c.seed, 'token', 0).to(uae.device)
    with torch.no_grad():
        seen = uae.see(stage.x)
        y, mask, _ = uae.sample_captions(seen, 1, c.cold_temperature, u)
    yield 'rollout'
    for part, rows, _ in common.group_slices(seen, 1, c.micro_batch):
        loss = uae(cold_start.loss_of, stage.tower, stage.x[rows], part, y[rows], mask[rows],
                   z[rows], 1 / c.prompts, c)
        loss.backward()
    yield 'update'


def encoder_rollout(stage):
    """What grpo_encoder.rollout returns, for all images of the step: seen, y, mask, logp, r."""
    c = stage.c
    parts = []
    for images in common.image_slices(len(stage.x), c.group, c.micro_batch):
        x, index = stage.x[images], stage.index[images]
        parts.append(grpo_encoder.rollout(stage.uae, stage.tower, x, index, 0, c))
    seen_parts, *others = zip(*parts)
    seen = tuple(torch.cat(tensors) for tensors in zip(*seen_parts))
    return seen, *(torch.cat(tensors) for tensors in others)


def grpo_encoder_step(stage):
    c = stage.c
    seen, y, mask, old_logp, r = encoder_rollout(stage)
    adv = grpo_encoder.group_advantage(r, c.adv_std).flatten()
    weight, count = grpo_encoder.token_weights(mask, c)
    yield 'rollout'
    for part, rows, _ in common.group_slices(seen, c.group, c.micro_batch):
        ref_logp = old_logp[rows]
        if c.kl:
            with torch.no_grad():
                ref_logp = stage.reference.caption_logp(part, y[rows], c.temperature)
        loss, _ = stage.uae(grpo_encoder.loss_of, part, y[rows], weight[rows], old_logp[rows],
                            ref_logp, adv[rows], 1 / count, c)
        loss.backward()
    yield 'update'


def decoder_rollout(stage):
    """What the update needs of grpo_decoder.rollout: cond, path, old_logp, advantages (B,)."""
    c = stage.c
    parts = []
    for images in common.image_slices(len(stage.x), c.group, c.micro_batch):
        x, index = stage.x[images], stage.index[images]
        drawn = grpo_decoder.rollout(stage.uae, stage.tower, x, index, 0, c, stage.negative)
        parts.append(drawn)
    cond, *path, old_logp, r, _ = [torch.cat(tensors) for tensors in zip(*parts)]
    return cond, path, old_logp, grpo_decoder.group_advantage(r).flatten()


def grpo_decoder_step(stage):
    c = stage.c
    cond, path, old_logp, adv = decoder_rollout(stage)
    yield 'rollout'
    for _, rows, _ in common.group_slices((stage.x,), c.group, c.micro_batch):
        z, z_next, *v0 = [latents[rows] for latents in path]
        loss, _ = stage.uae(grpo_decoder.loss_of, stage.reference, cond[rows], z, z_next,
                            old_logp[rows], adv[rows], 0, 1 / len(adv), c, stage.negative, v0)
        loss.backward()
    yield 'update'


STEPS = dict(
    cold_start=cold_start_step,
    grpo_encoder=grpo_encoder_step,
    grpo_decoder=grpo_decoder_step,
)


def take_step(stage):
    """The stage's optimiser on the gradients that a step has left."""
    common.optimise(stage.optimiser, stage.params, 0, stage.c)


# --- measuring -----------------------------------------------------------------------------------
def measure(stage, step=None):
    """One step, the stage's own or another: {part: seconds}. The gradients stay.

    `total` leaves data and optimiser out.
    """
    step = step or STEPS[stage.name]
    spent = stage.spent
    spent.clear()
    spent['data'] = seconds(stage.data)
    stage.optimiser.zero_grad(set_to_none=True)
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
