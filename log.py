"""What a run says of itself: a line per update on the screen and in out_dir/log.jsonl, the progress
bar, and if asked wandb or TensorBoard."""
import json
import os
import sys
import time

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import common


class Stats:
    """Statistics of a step's micro-batches, reduced over these and over the ranks."""

    def __init__(self):
        self.sums, self.means, self.maxima = {}, {}, {}

    def add_sum(self, **values):
        """Parts of a loss: they add up over micro-batches; of the ranks the mean is taken."""
        for name, value in values.items():
            self.sums.setdefault(name, []).append(value)

    def add_mean(self, weight, **values):
        """Means over a micro-batch's valid entries, whose number, or weight, is `weight`."""
        for name, value in values.items():
            self.means.setdefault(name, []).append((value, weight))

    def add_max(self, **values):
        """The largest value of a micro-batch."""
        for name, value in values.items():
            self.maxima.setdefault(name, []).append(value)

    def add_update(self, loss, fields, weight):
        """A micro-batch of a policy update: the loss and the fields of its `loss_of`."""
        self.add_sum(loss=loss)
        self.add_max(ratio_max=fields['ratio_max'], logp_diff=fields['logp_diff'])
        self.add_mean(weight, clip_frac=fields['clip_frac'], kl=fields.get('kl', 0.0))

    def reduce(self, run):
        """{name: number}, the same on every rank."""
        fields = {}
        for name, values in self.sums.items():
            fields[name] = common.total(sum(float(v) for v in values), run) / run.world
        for name, pairs in self.means.items():
            weighted = sum(float(value) * float(weight) for value, weight in pairs)
            weights = sum(float(weight) for _, weight in pairs)
            fields[name] = common.total(weighted, run) / common.total(weights, run)
        for name, values in self.maxima.items():
            mine = common.exact([float(v) for v in values], run).max()
            fields[name] = common.gather(mine[None], run).max().item()
        return fields


def reward_fields(r):
    """Log fields of rewards (P, G) of all ranks.

    The mean, the std inside the groups, and the share of groups that teach nothing.
    """
    equal = (r == r[:, :1]).all(1)
    return dict(reward=r.mean().item(), reward_std=r.std(1).mean().item(),
                zero_var=equal.float().mean().item())


def caption_fields(spoken, run):
    """Log fields of captions, spoken (n, T) bool without end tokens: mean length, share cut off."""
    captions = max(1, common.total(len(spoken), run))
    return dict(caption_len=common.total(spoken.sum(), run) / captions,
                truncated=common.total(spoken[:, -1].sum(), run) / captions)


def count_skipped(train, held, run):
    """Unreadable images met so far, on all ranks and in the held-out set."""
    return int(common.total(len(train.skipped), run)) + held['skipped']


# what a stage has no use for keeps its value here: every line of every stage has the same fields
NEUTRAL = dict(reward=0.0, reward_std=0.0, zero_var=0.0, ratio_max=1.0, logp_diff=0.0, kl=0.0,
               clip_frac=0.0)


class Log:
    """One printed line and one JSON line in out_dir/log.jsonl per step; rank 0 alone writes."""

    def __init__(self, config, run):
        self.config = config
        self.master = run.master
        self.path = f'{config.out_dir}/log.jsonl'
        self.bar = None
        self.wandb = None
        self.tensorboard = None
        self.last = time.time()
        if self.master and config.wandb:
            import wandb
            self.wandb = wandb.init(project=config.wandb, config=vars(config))
        if self.master and config.tensorboard:
            self.tensorboard = open_tensorboard(f'{config.out_dir}/tensorboard')

    def progress(self, start_step):
        """Numbers of the updates that are left, behind a progress bar on rank 0."""
        config = self.config
        about_path = f'{config.out_dir}/config.json'
        if self.master and not os.path.exists(about_path):
            about = dict(script=config.script, changed=config.changed, config=vars(config))
            common.write_json(about_path, about)
        self.bar = tqdm(range(start_step, config.steps), initial=start_step, total=config.steps,
                        desc=config.script, disable=not self.master, mininterval=1)
        return self.bar

    def __call__(self, step, **fields):
        """Prints and appends the fields, with `sec` since the last line and `peak_gb`."""
        now = time.time()
        name = 'loss'
        if 'reward' in fields:
            name = 'reward'
        if self.bar is not None:
            self.bar.set_postfix({name: f'{fields[name]:.3f}'}, refresh=False)
        fields = dict(NEUTRAL, **fields)
        fields.update(sec=now - self.last, peak_gb=peak_memory())
        self.last = now
        if not self.master:
            return
        tqdm.write(f'step {step:4d} | ' + ' '.join(map(shown, fields, fields.values())))
        with open(self.path, 'a') as f:
            f.write(json.dumps(dict(step=step, **fields)) + '\n')
        self.publish(step, fields)

    def publish(self, step, fields, sheet=''):
        """Sends fields, and a picture if there is one, to wandb and TensorBoard; on rank 0."""
        if self.wandb:
            import wandb
            if sheet:
                fields = dict(fields, samples=wandb.Image(sheet))
            self.wandb.log(fields, step=step)
        if self.tensorboard:
            for name, value in fields.items():
                self.tensorboard.add_scalar(name, value, step)
            if sheet:
                with Image.open(sheet) as picture:
                    pixels = np.asarray(picture)                    # (height, width, 3)
                self.tensorboard.add_image('samples', pixels, step, dataformats='HWC')
            self.tensorboard.flush()


def open_tensorboard(folder):
    """A writer of TensorBoard's files; one line says where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SystemExit(f'--tensorboard=True: {error}; pip install tensorboard')
    return SummaryWriter(folder)


def shown(name, value):
    """A log field as it is printed; floats have four digits."""
    if isinstance(value, float):
        return f'{name} {value:.4g}'
    return f'{name} {value}'


def peak_memory():
    """Peak memory so far in GB = 1e9 bytes: of the CUDA device, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
