"""What a run says of itself: a line per update on the screen and in out_dir/log.jsonl, the progress
bar, and if asked wandb or TensorBoard."""
import collections
import json
import os
import sys
import time

import torch
from tqdm import tqdm

from lib import ranks
from lib.files import append_lines, write_atomic, write_json, write_lines


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
        """A micro-batch of a policy update: the loss, and the fields of its `policy_loss`."""
        self.add_sum(loss=loss)
        self.add_max(ratio_max=fields['ratio_max'])
        self.add_mean(weight, clip_frac=fields['clip_frac'], kl=fields.get('kl', 0.0))

    def reduce(self, run):
        """{name: number}, the same on every rank."""
        fields = {}
        for name, values in self.sums.items():
            fields[name] = ranks.total(sum(float(v) for v in values), run) / run.world
        for name, pairs in self.means.items():
            weighted = sum(float(value) * float(weight) for value, weight in pairs)
            weights = sum(float(weight) for _, weight in pairs)
            fields[name] = ranks.total(weighted, run) / ranks.total(weights, run)
        for name, values in self.maxima.items():
            mine = ranks.in_float64([float(v) for v in values], run).max()
            fields[name] = ranks.gather(mine[None], run).max().item()
        return fields


def reward_fields(r):
    """Log fields of rewards (P, G) of all ranks.

    The mean, the std inside the groups, and the share of groups that teach nothing.
    """
    equal = (r == r[:, :1]).all(1)
    return dict(reward=r.mean().item(), reward_std=r.std(1).mean().item(),
                zero_var=equal.float().mean().item())


def caption_fields(words, room, run):
    """Log fields of captions, words (n, T) bool without end tokens.

    Their mean length; truncated, the share that fills caption_len; cut, the number of those that a
    condition has no `room` for.
    """
    lengths = words.sum(1)
    captions = max(1, ranks.total(len(words), run))
    return dict(caption_len=ranks.total(lengths.sum(), run) / captions,
                truncated=ranks.total(words[:, -1].sum(), run) / captions,
                cut=int(ranks.total((lengths > room).sum(), run)))


def count_skipped(train, held, run):
    """Unreadable images met so far, on all ranks and in the held-out set."""
    return int(ranks.total(len(train.skipped), run)) + held['skipped']


# fields that count what a caption lost, and what to say when the first one comes
LOSSES = dict(
    cut='captions are longer than a condition has room for, and were cut: raise --cond_len',
    unknown='words are not in the tokenizer, and became its unknown token')


def rewind(out_dir, step):
    """Drops the log lines of `step` and later, which a resumed run writes again.

    A group is written before the checkpoint of its step, and stays.
    """
    for name in ('log.jsonl', 'eval.jsonl', 'samples.jsonl', 'groups.jsonl'):
        end = step
        if name == 'groups.jsonl':
            end = step + 1
        path = f'{out_dir}/{name}'
        if not os.path.exists(path):
            continue
        with open(path) as f:
            whole = [line for line in f if line.endswith('\n')]        # a kill may cut the last
        kept = [line for line in whole if json.loads(line)['step'] < end]
        write_atomic(path, lambda temporary: write_lines(temporary, kept))


class Log:
    """One printed line and one JSON line in out_dir/log.jsonl per step; rank 0 alone writes."""

    def __init__(self, config, run):
        self.config = config
        self.master = run.master
        self.path = f'{config.out_dir}/log.jsonl'
        self.bar = None
        self.lost = collections.Counter()
        self.last = time.time()
        self.tracker = None
        if config.tracker and self.master:
            from lib.tracker import open_tracker
            self.tracker = open_tracker(config)

    def progress(self, start_step):
        """Numbers of the updates that are left, behind a progress bar on rank 0."""
        config = self.config
        about_path = f'{config.out_dir}/config.json'
        if self.master and not os.path.exists(about_path):
            about = dict(script=config.script, changed=config.changed, config=vars(config))
            write_json(about_path, about)
        self.bar = tqdm(range(start_step, config.steps), initial=start_step, total=config.steps,
                        desc=config.script, disable=not self.master, mininterval=1)
        return self.bar

    def __call__(self, step, **fields):
        """Prints and appends the fields, with `sec` since the last line and `peak_gb`."""
        now = time.time()
        name = 'reward' if 'reward' in fields else 'loss'
        if self.bar is not None:
            self.bar.set_postfix({name: f'{fields[name]:.3f}'}, refresh=False)
        fields.update(sec=now - self.last, peak_gb=peak_memory())
        self.last = now
        if not self.master:
            return
        tqdm.write(f'step {step:4d} | ' + ' '.join(map(shown, fields, fields.values())))
        append_lines(self.path, [dict(step=step, **fields)])
        self.publish(fields, step)
        self.warn(fields, step)

    def publish(self, fields, step, sheet=''):
        """Sends numbers, and a picture if there is one, to the tracker that was asked for."""
        if self.tracker:
            self.tracker(fields, step, sheet)

    def warn(self, fields, step):
        """Says of what captions lose that it happens, at the first one and at the end."""
        for name, words in LOSSES.items():
            count = fields.get(name, 0)
            first = count and not self.lost[name]
            self.lost[name] += count
            if first or (self.lost[name] and step == self.config.steps - 1):
                tqdm.write(f'warning: {self.lost[name]} {words}')


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
