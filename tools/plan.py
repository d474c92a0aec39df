"""What a stage needs on one GPU, said before anything is downloaded.

    python tools/plan.py grpo_encoder --preset=paper        # any stage and its keys; or
    python grpo_encoder.py --preset=paper --plan

The models are built from their published configurations on tensors without storage, and the
script's own main makes one evaluation and one micro-batch of a step with them: the bytes that are
alive at once are counted. Where a card is too small, the same is done with what can be changed.
At the end stand the floating-point operations of each network.
"""
import contextlib
import functools
import importlib
import math
import os
import sys
import types
import warnings
import weakref
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from config import parse
from decoder import Decoder
from encoder import Encoder
from lib import checkpoint, ranks
from lib.ocr import Ocr
from lib.scores import Evaluator, images_at_once
from model import UAE
from reward import Backbone, Function
from tools.flops import forward_flops
from tools.rehearse import random_reward, random_tower, replaced, skeleton, stand_ins

STAGES = ('pretrain_decoder', 'cold_start', 'grpo_encoder', 'grpo_decoder', 'nft_decoder', 'reca')
CARDS = (16, 24, 80)    # GB
# GB: CUDA's context and the workspaces of its kernels, which hold .2 to .3 GB more than is counted
# here where that was measured (docs/full_size.md), and the vision tower's pass
ALLOWANCE = 1.0
# what makes a stage smaller: key -> value, and what it costs
LEVERS = dict(
    checkpointing=('True', 'an update makes its forward pass twice'),
    micro_batch=('1', 'smaller passes, slower on a large card'),
    dtype=('bfloat16', 'frozen weights and matrix work are rounded'),
    lora_rank=('32', 'adapters are trained in place of all weights'),
    offload=('True', 'encoder, decoder and towers take turns on the GPU: seconds a step'),
    judge=('', 'evaluations have no second opinion'),
)
# after these, outside of an update, an act is done, and whose it was
ACTS = (
    (Encoder, 'sample', 'captions', 'encoder'),
    (UAE, 'condition', 'conditions', 'encoder'),
    (Decoder, 'to_latent', 'latents', 'decoder'),
    (Decoder, 'draw', 'drawing', 'decoder'),
    (Decoder, 'draw_sde', 'drawing', 'decoder'),
    (Decoder, 'to_image', 'drawing', 'decoder'),
    (Backbone, 'reward', 'rewards', 'towers'),
)


# --- bytes ---------------------------------------------------------------------------------------
class NoValues(FakeTensorMode):
    """Within this context tensors have a size and no bytes."""

    def __deepcopy__(self, memo):
        return self                             # a model's copy has the same kind of tensors


class Peak(TorchDispatchMode):
    """Counts the bytes of what is made within this context and alive: now, and at the most.

    Where somebody asks for a value it is 0.
    """

    def __init__(self):
        super().__init__()
        self.alive = 0
        self.most = 0
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return 0
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage):
        key = storage._cdata
        if key in self.seen:                    # a view, or changed in place
            return
        size = storage.nbytes()
        self.seen.add(key)
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.seen.discard(key)
        self.alive -= size


def first_rows(peak):
    """Stands for lib.ranks.by_rows: of pieces that are alike only the first is run.

    When the same comes again, one allocation as large as its peak stands for it.
    """
    known = {}                  # what is called, whose, and its shapes -> bytes, what comes out

    def run(call, piece):
        owner = id(getattr(call, '__self__', None))         # two towers are not alike
        key = call.__qualname__, owner, *[tensor.shape for tensor in piece]
        if key in known:
            size, shape, dtype = known[key]
            torch.empty(size, dtype=torch.uint8)
            return torch.empty(shape, dtype=dtype)
        before, most = peak.alive, peak.most
        peak.most = before
        out = call(*piece)
        known[key] = peak.most - before, out.shape, out.dtype
        peak.most = max(most, peak.most)
        return out

    def by_rows(call, size, *tensors):
        if torch.is_grad_enabled():
            return call(*tensors)
        rows = len(tensors[0])
        piece = [tensor[:size or rows] for tensor in tensors]
        first = run(call, piece)
        if len(first) == rows:
            return first
        between = first.new_empty(max(0, rows - 2 * len(first)), *first.shape[1:])
        last = run(call, piece)                 # while what came before it is alive
        return torch.cat([first, between, last])[:rows]

    return by_rows


def without_storage(*modules):
    """Under NoValues: every weight and buffer as if on the CPU."""
    twins = {}                                          # a tied weight stays one weight
    for module in modules:
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in twins:
                        twin = torch.empty(tensor.shape, dtype=tensor.dtype)
                        if isinstance(tensor, torch.nn.Parameter):
                            twin = torch.nn.Parameter(twin, tensor.requires_grad)
                        twins[id(tensor)] = twin, tensor        # kept: its id must not come again
                    tensors[name] = twins[id(tensor)][0]


# --- a script's own main on them -----------------------------------------------------------------
class Done(Exception):
    """One step has been made."""


def see(encoder, x):
    """Stands for Encoder.see: the vision tower's windows depend on values."""
    vision = encoder.vlm.config.vision_config
    side = round(x.shape[-1] / vision.patch_size / vision.spatial_merge_size)
    features = torch.zeros(len(x), side ** 2, encoder.width, dtype=encoder.vlm.dtype)
    return dict(features=features, grid=torch.zeros(len(x), 3, dtype=torch.long))


def positions(encoder, token_ids, vision):
    return torch.zeros(3, *token_ids.shape, dtype=torch.long)


def first_of(slices):
    """Stands for a function of lib.ranks that yields slices; no other is larger."""
    def first(*args):
        yield next(slices(*args))

    return first


class Rehearsal:
    """One evaluation and the first micro-batch of a step, by script.main(argv) itself.

    acts: [(act, whose, GB that were alive beside weights and gradients)]. rows: see `weigh`.
    flops: see tools/flops.py.
    """

    def __init__(self, script, config, argv):
        self.script, self.config = script, config
        self.acts = []
        self.evaluating = False
        self.reference = None
        self.peak = Peak()
        self.uae = skeleton(config, 'meta')
        checkpoint.check_sizes(self.uae)
        self.towers = dict(reward=random_reward(config, 'meta'))
        if config.judge and config.eval_every:
            self.towers['judge'] = random_tower('judge', config, 'meta')
        others = list(self.others())
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings('ignore', 'Accessing the data pointer of FakeTensor')
            stack.enter_context(NoValues())
            stack.enter_context(patch.multiple(Encoder, see=see, positions=positions))
            with contextlib.ExitStack() as inner:
                inner.enter_context(self.peak)
                without_storage(self.uae, *self.towers.values())
                for place, name, other in others:
                    inner.enter_context(patch.object(place, name, other))
                inner.enter_context(replaced(script, **self.surroundings()))
                inner.enter_context(contextlib.suppress(Done))
                script.main(argv)
            self.rows = self.weigh()
            self.flops = forward_flops(self.uae, self.towers['reward'])

    def others(self):
        """(place, name, what stands there during main); asked for while there are values."""
        script, config, by_rows = self.script, self.config, first_rows(self.peak)
        yield sys.modules['encoder'], 'by_rows', by_rows
        yield sys.modules['decoder'], 'by_rows', by_rows
        yield sys.modules['reward'], 'by_rows', by_rows
        yield Encoder, 'texts', lambda encoder, y, mask: [''] * len(y)
        for own in (Function, Ocr):
            yield own, 'reward', lambda part, x, x_hat, captions: x_hat.flatten(1).mean(1)
        yield ranks, 'total', lambda value, run: 1.0
        yield ranks, 'sample_slices', first_of(ranks.sample_slices)
        yield ranks, 'step_slices', first_of(ranks.step_slices)
        self.uae.decoder.sigmas(config.eval_denoise_steps)      # the decoder remembers them
        sigmas = self.uae.decoder.sigmas(config.denoise_steps)
        if hasattr(script, 'window'):
            window = script.window(0, config, sigmas)
            yield script, 'window', lambda *args: window
        if hasattr(script, 'image_states'):
            yield script, 'image_states', lambda encoder, vision, *_: encoder.image_states(vision)
        for place, name, act, whose in ACTS:
            yield place, name, self.followed_by_lap(getattr(place, name), act, whose)

    def surroundings(self):
        """For `replaced`: a log that asks for one step, an optimiser with which it ends."""
        def progress(start_step):
            self.base = self.peak.most = self.peak.alive
            yield 0

        def open_reference(*args, original=checkpoint.open_reference):
            self.reference = original(*args)
            return self.reference

        def optimiser(params, config, **options):
            for p in params:
                p.grad = torch.empty_like(p)
            return types.SimpleNamespace(adamw=types.SimpleNamespace(state={}), step=self.finish)

        def evaluator(uae, held_out, config, run, *others, **options):
            own = Evaluator(uae, held_out, config, run, self.towers)
            return types.SimpleNamespace(every=lambda step: self.evaluate(own))

        log = types.SimpleNamespace(progress=progress)
        return dict(stand_ins(self.config), open_uae=lambda *args, **options: self.uae,
                    reward_tower=lambda *args: self.towers['reward'],
                    open_reference=open_reference, Log=lambda *args: log, Optimiser=optimiser,
                    Evaluator=evaluator)

    def followed_by_lap(self, original, act, whose):
        def call(*args, **kwargs):
            out = original(*args, **kwargs)
            if not self.uae.training:
                self.lap(act, whose)
            return out

        return call

    def lap(self, act, whose):
        """Notes what was alive at most since the last one."""
        if self.evaluating:
            act = 'evaluation'
        self.acts.append((act, whose, (self.peak.most - self.base) / 1e9))
        self.peak.most = self.peak.alive

    def evaluate(self, evaluator):
        """As many images as are evaluated together."""
        if self.config.eval_every:
            self.evaluating = True
            evaluator.records(list(range(images_at_once(self.config)))[:self.config.eval_images])
            self.evaluating = False

    def finish(self, step):
        """Stands for Optimiser.step."""
        self.lap('update', 'trained')
        raise Done

    def weigh(self):
        """{model: its numbers of parameters, and GB}; what two share is the first one's."""
        uae = self.uae
        parts = dict(encoder=uae.encoder.vlm, text_encoder=uae.encoder.text_encoder,
                     projector=uae.projector, decoder=uae.decoder.transformer,
                     vae=uae.decoder.vae, **self.towers, reference=self.reference)
        rows, seen = {}, set()
        for name, part in parts.items():
            if not part:
                continue
            own = {}
            for key, tensor in (*part.named_parameters(), *part.named_buffers()):
                place = tensor.untyped_storage()._cdata
                if place not in seen:
                    own[key] = tensor
                    seen.add(place)
            published = [tensor for key, tensor in own.items()
                         if isinstance(tensor, torch.nn.Parameter) and 'lora_' not in key]
            trained = [tensor for tensor in own.values() if tensor.requires_grad]
            rows[name] = dict(
                parameters=sum(tensor.numel() for tensor in published),
                weights=sum(tensor.nbytes for tensor in own.values()) / 1e9,
                trained=sum(tensor.numel() for tensor in trained),
                gradients=sum(tensor.nbytes for tensor in trained) / 1e9)
        return rows


# --- the plan ------------------------------------------------------------------------------------
def read(stage, argv):
    """A stage's module and its configuration."""
    if stage not in STAGES:
        raise SystemExit(f'only stages have a plan, {stage!r} is none: python tools/plan.py STAGE '
                         f'[--key=value ...] with one of {" ".join(STAGES)}')
    script = importlib.import_module(stage)
    return script, parse(script.keys, script.own_presets, argv, script.__file__, script.limits)


@functools.cache
def rehearse(stage, argv, world=1):
    """A `Rehearsal` of one rank's share, with all models on the GPU all the time."""
    script, config = read(stage, argv)
    argv = [*argv, f'--batch={ranks.per_rank("batch", config.batch, world)}', '--device=cpu',
            f'--eval_images={math.ceil(config.eval_images / world)}']
    argv += [f'--{key}=False' for key in ('offload', 'compile') if hasattr(config, key)]
    ranks.quiet()
    with patch.dict(os.environ, WORLD_SIZE='1', RANK='0'):
        return Rehearsal(script, read(stage, argv)[1], argv)


def most(rehearsal, config):
    """The most GB that are on the GPU at once, and the act in which they are."""
    rows = rehearsal.rows
    gradients = sum(row['gradients'] for row in rows.values())
    states = 3 if getattr(config, 'ema', 0) else 2          # AdamW's moments, an average
    turns = dict(encoder={'encoder', 'text_encoder'}, decoder={'decoder', 'vae'},
                 towers={'reward', 'judge'})
    trained = {name for name, row in rows.items() if row['trained']}
    turns['trained'] = {'reference'}.union(*[turn for turn in turns.values() if turn & trained])
    found = []
    for act, whose, size in rehearsal.acts:
        there = set(rows)
        if getattr(config, 'offload', False):
            there = {'projector', *turns[whose]}
            if there & trained:
                there.add('reference')
        if not config.judge:
            there.discard('judge')
        weights = sum(rows[name]['weights'] for name in there if name in rows)
        kept = (states + (act == 'update')) * gradients
        found.append((weights + kept + size, act))
    return max(found)


def levers(stage, argv, config, world):
    """{--key=value: the most GB with it} of what can still be made smaller, and with all of it."""
    options = []
    for key, (value, cost) in LEVERS.items():
        now = getattr(config, key, value)
        if str(now) != value and not (key == 'lora_rank' and now):
            options.append(f'--{key}={value}')

    def with_options(*options):
        # who is on the GPU changes nothing of what an act needs
        rehearsed = [option for option in options if option not in ('--offload=True', '--judge=')]
        rehearsal = rehearse(stage, (*argv, *rehearsed), world)
        return most(rehearsal, read(stage, [*argv, *options])[1])[0]

    found = {option: with_options(option) for option in options}
    return found, with_options(*options)


def verdict(total):
    words = [f'{"fits" if total + ALLOWANCE <= card else "does not fit"} {card} GB'
             for card in CARDS]
    return f'{total:.2f} + {ALLOWANCE} for CUDA and its workspaces: {", ".join(words)}'


def plan(stage, *argv):
    """Prints what a stage needs, and what would make it less; returns these numbers."""
    world = int(os.environ.get('WORLD_SIZE', 1))
    argv = tuple(argument for argument in argv if argument != '--resume')
    rehearsal = rehearse(stage, argv, world)
    _, config = read(stage, argv)
    total, when = most(rehearsal, config)
    print(f'memory of one GPU of {world} in GB = 1e9 bytes, preset {config.preset}')
    print(f'{"":12s} parameters   weights   trained  gradients   AdamW')
    for name, row in rehearsal.rows.items():
        print(f'{name:12s} {row["parameters"] / 1e9:8.4f} B {row["weights"]:9.3f} '
              f'{row["trained"] / 1e6:7.2f} M {row["gradients"]:10.3f} '
              f'{2 * row["gradients"]:7.3f}')
    beside = {}
    for act, _, size in rehearsal.acts:
        beside[act] = max(size, beside.get(act, 0.0))
    print('beside them:', ', '.join(f'{act} {size:.2f}' for act, size in beside.items()))
    print(f'most at once, {when}: {verdict(total)}')
    smaller, smallest = {}, total
    if total + ALLOWANCE > CARDS[0]:
        smaller, smallest = levers(stage, argv, config, world)
        print('what each of these would save:')
        for option, size in smaller.items():
            cost = LEVERS[option[2:].split('=')[0]][1]
            print(f'{option:22s} {total - size:6.2f}   {cost}')
        print(f'{"all of them:":22s} {verdict(smallest)}')
    counts = [f'{name} {count / 1e12:.3g}' for name, count in rehearsal.flops.items()]
    print('TFLOP of a forward pass:', ', '.join(counts))
    return dict(rows=rehearsal.rows, beside=beside, total=total, smaller=smaller,
                smallest=smallest, flops=rehearsal.flops)


if __name__ == '__main__':
    plan(*sys.argv[1:] or [''])
