"""Who does which part of the work: ranks, parts that take turns on a GPU, micro-batches, and
randomness that depends on none of these."""
import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import os
import sys
import types
from datetime import timedelta

import torch
import torch.distributed as dist


# --- ranks ---------------------------------------------------------------------------------------
def start(config):
    """Joins the process group that torchrun announces, seeds, and picks the device.

    Returns a namespace rank, world, device, master. Outside torchrun: rank 0 of 1.
    """
    world = int(os.environ.get('WORLD_SIZE', 1))
    rank = int(os.environ.get('RANK', 0))
    device = pick_device(config.device)
    if world > 1 and not dist.is_initialized():
        store, *_ = next(dist.rendezvous('env://'))
        # after a restart the store still has the addresses of processes that died: hence a prefix
        life = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
        backend = 'nccl' if device.startswith('cuda') else 'gloo'
        # two hours: a first download, or an evaluation that is longer on one rank than on others
        dist.init_process_group(backend, store=dist.PrefixStore(life, store), rank=rank,
                                world_size=world, timeout=timedelta(hours=2))
    quiet()
    if rank == 0:
        say_unseen()
    torch.backends.cudnn.allow_tf32 = False     # float32 means float32, in convolutions too
    torch.backends.cuda.enable_cudnn_sdp(False)     # it plans 60 ms for each new length
    torch.manual_seed(config.seed)              # of fresh weights; all else is addressed
    return types.SimpleNamespace(rank=rank, world=world, device=device, master=rank == 0)


def pick_device(device):
    """--device, or by default the local rank's CUDA device where there is one, else the CPU."""
    if not device:
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    present = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if not present.get(device.split(':')[0]):
        raise SystemExit(f'--device={device}: expected cpu, or cuda or mps where there is one')
    if device == 'cuda':
        device = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
        torch.cuda.set_device(device)
    return device


def unseen(requirements):
    """['torch 2.15.0', ...]: installed versions outside the ranges of a requirements.txt."""
    from packaging.requirements import Requirement
    found = []
    for line in requirements:
        line = line.partition('#')[0].strip()
        if '>=' not in line:
            continue
        asked = Requirement(line)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):   # peft: LoRA alone
            version = importlib.metadata.version(asked.name)
            if not asked.specifier.contains(version, prereleases=True):
                found.append(f'{asked.name} {version}')
    return found


@functools.cache                # once a process, however many runs it starts
def say_unseen():
    """One line with the versions that nobody has seen to pass, if there are any."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with open(os.path.join(root, 'requirements.txt'), encoding='utf-8') as f:
        found = unseen(f)
    if found:
        print(f'not seen to pass: {", ".join(found)}; requirements.txt has the versions that were',
              file=sys.stderr)


def quiet():
    """Silences the libraries' progress bars and advice, so that a run's lines are its own."""
    import diffusers
    import transformers
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def per_rank(name, count, world):
    """Each rank's share of a count that is for all ranks together; refuses what does not divide."""
    if count % world or count < 1:
        raise SystemExit(f'{name}={count} does not divide over {world} ranks')
    return count // world


def barrier(run):
    """Waits until every rank is here."""
    if run.world > 1:
        dist.barrier()


def in_float64(values, run):
    """A number or tensor as float64 on the run's device; on the CPU where that has no float64."""
    device = 'cpu' if run.device.startswith('mps') else run.device
    if isinstance(values, torch.Tensor):
        values = values.to(device)
    return torch.as_tensor(values, dtype=torch.float64, device=device)


def total(value, run):
    """Sum of a number or tensor over the ranks; a number for a number."""
    t = in_float64(value, run).clone()
    if run.world > 1:
        dist.all_reduce(t)
    if t.dim():
        return t
    return t.item()


def gather(t, run):
    """Concatenation over ranks, in rank order, of equally shaped tensors."""
    if run.world == 1:
        return t
    parts = [torch.empty_like(t) for _ in range(run.world)]
    dist.all_gather(parts, t.contiguous())
    return torch.cat(parts)


def gather_objects(items, run):
    """Lists of picklable things of all ranks, joined."""
    if run.world == 1:
        return items
    parts = [None] * run.world
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def parallel(module, run):
    """DistributedDataParallel around a module under torchrun, else the module itself."""
    if run.world == 1:
        return module
    ids = None
    if run.device.startswith('cuda'):
        ids = [torch.device(run.device).index]
    ddp = torch.nn.parallel.DistributedDataParallel
    # no forward changes a buffer; torch 2.11 knows broadcast_buffers alone, 2.14 deprecates it
    known = inspect.signature(ddp).parameters
    name = 'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers'
    return ddp(module, device_ids=ids, gradient_as_bucket_view=True, **{name: False})


def no_sync(ddp, last):
    """Context in which a backward pass synchronises gradients between ranks only if `last`."""
    if last or not hasattr(ddp, 'no_sync'):
        return contextlib.nullcontext()
    return ddp.no_sync()


def take_turns(device, *parts):
    """From now on only the part that works is on the device, the others wait on the CPU.

    parts: lists of modules, or of None. What moves are the modules' children: buffers of their own
    stay. A part comes when one of its weights is used.
    """
    here = None

    def move(part, device):
        for module in part:
            for child in module.children():
                child.to(device)

    def before_forward(part, module, inputs):
        nonlocal here
        if here is part:
            return
        if here:
            move(here, 'cpu')
            if device.startswith('cuda'):
                torch.cuda.empty_cache()        # what comes has weights of other sizes
        move(part, device)
        here = part

    for part in parts:
        part = [module for module in part if module]
        move(part, 'cpu')
        for module in part:
            for inner in module.modules():
                if list(inner.parameters(recurse=False)):
                    inner.register_forward_pre_hook(functools.partial(before_forward, part))


# --- addressed randomness: the same numbers at every world size, and nothing to save -------------
def generator(*address):
    """A CPU generator that is a pure function of its address, a tuple of ints and strings."""
    digest = hashlib.blake2b(repr(address).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, 'little') >> 1)


def normal(shape, rows, *address):
    """Standard normals (len(rows), *shape); row i depends on (address, rows[i]) alone."""
    draws = [torch.randn(shape, generator=generator(*address, int(row))) for row in rows]
    return torch.stack(draws)


def uniform(shape, rows, *address):
    """Uniforms in [0, 1), addressed like `normal`."""
    draws = [torch.rand(shape, generator=generator(*address, int(row))) for row in rows]
    return torch.stack(draws)


def permuted(t, *address):
    """The entries of a tensor in another order, which depends on the address alone."""
    order = torch.randperm(t.numel(), generator=generator(*address)).to(t.device)
    return t.flatten()[order].view_as(t)


# --- micro-batches -------------------------------------------------------------------------------
def group_slices(P, G, size):
    """Slices of P images and of their B = P*G samples, whole groups, at most `size` samples.

    Yields (images, rows, last). size 0 means all at once; smaller than G it means one group.
    """
    step = max(1, (size or P * G) // G)
    for i in range(0, P, step):
        stop = min(i + step, P)
        yield slice(i, stop), slice(i * G, stop * G), stop == P


def sample_slices(P, G, size):
    """`group_slices` of exactly `size` samples also where that splits a group."""
    size = size or P * G
    for images, rows, _ in group_slices(P, G, size):
        for start in range(rows.start, rows.stop, size):
            stop = min(start + size, rows.stop)
            yield images, slice(start, stop), stop == P * G


def step_slices(P, G, n, size):
    """Slices of B = P*G samples and of their n denoising steps, at most `size` rows of both.

    Yields (rows, steps, last). Whole groups where they fit, one sample's steps in pieces where they
    do not. size 0 means all at once.
    """
    size = size or P * G * n
    for _, rows, end in sample_slices(P, G, max(1, size // n)):
        for start in range(0, n, size):
            stop = min(start + size, n)
            yield rows, slice(start, stop), end and stop == n


def by_rows(call, size, *tensors):
    """call(*tensors) on at most `size` rows at a time, joined; size 0 means all at once.

    Where a gradient is wanted the rows are a micro-batch already, and stay together.
    """
    if not size or torch.is_grad_enabled():
        return call(*tensors)
    pieces = zip(*(tensor.detach().split(size) for tensor in tensors))
    return torch.cat([call(*piece) for piece in pieces])


def take(tensors, rows):
    """The given rows, a slice, of every tensor of a dict."""
    return {name: tensor[rows] for name, tensor in tensors.items()}
