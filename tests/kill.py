"""kill -9 at random moments, and --resume: the same weights and the same log as without.

    python tests/kill.py --kills=10
    python tests/kill.py --kills=10 --stage=reca --seed=7

pytest does not collect it: it takes minutes. Every stage runs with LoRA in bfloat16, with a KL and
two updates a rollout where it has these. Each of its runs is killed once, at a moment drawn
uniformly from the seconds of a whole run, and then resumed to its end; before its first checkpoint
there is nothing to resume, and it starts anew. Prints one line a stage, and says at once what
differs.
"""
import os
import random
import runpy
import shutil
import signal
import sys
import time
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.chdir(ROOT)
# imported before the forks, so that a run is not mostly imports
import diffusers
import open_clip
import peft
import torch
import transformers

import config
from lib import checkpoint
from comparing import timeless
from running import arguments, lines, same, weights

# --- script keys ---------------------------------------------------------------------------------
keys = dict(
    kills = 10,                # of each stage
    stage = '',                # one of them; '' = all
)
# -------------------------------------------------------------------------------------------------
STEPS = 4
REFERENCE = ['--kl=0.1', '--epochs=2']
OWN = dict(
    pretrain_decoder=['--ema=0.9'],
    cold_start=[],
    grpo_encoder=REFERENCE,
    grpo_decoder=REFERENCE,
    nft_decoder=['--batch=2', '--group=2', '--old_decay=0.5'],
    reca=[],
)


def begin(name, out_dir):
    """Starts a stage, or resumes it, in a process of its own -> its id."""
    switches = ['--resume', '--save_every=1', '--eval_every=2', '--dtype=bfloat16',
                '--lora_rank=4', *OWN[name]]
    sys.argv = [f'{name}.py', *arguments(name, out_dir, *switches, steps=STEPS)]
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)    # makes the pool anew after a fork; the loader's threads would race
    said = open(f'{out_dir}.txt', 'a')
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    try:
        runpy.run_path(f'{ROOT}/{name}.py', run_name='__main__')
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def finish(child, out_dir):
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise SystemExit(f'exit code {code} of a run that nobody killed: see {out_dir}.txt')


def kill_after(child, seconds):
    """Whether the run was still there to be killed."""
    time.sleep(seconds)
    ended, _ = os.waitpid(child, os.WNOHANG)
    if ended:
        return False
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


class Left:
    """What a run left: weights, optimizer's state, and its logs without the clock."""

    def __init__(self, out_dir):
        last = f'{out_dir}/step_{STEPS:06d}'
        self.parts = dict(
            weights=weights(last),
            optimizer=torch.load(f'{last}/state.pt', weights_only=True),
            log=timeless(lines(f'{out_dir}/log.jsonl')),
            evaluations=lines(f'{out_dir}/eval.jsonl'),
        )

    def differs(self, other):
        return [part for part in self.parts if not same(self.parts[part], other.parts[part])]


def kill_stage(name, kills, out_dir, moments):
    """Kills and resumes one stage -> how many kills met a run, and what differed afterwards."""
    whole = f'{out_dir}/{name}'
    start = time.time()
    finish(begin(name, whole), whole)
    duration = time.time() - start
    expected = Left(whole)
    met, differences = 0, []
    for k in range(kills):
        folder = f'{whole}_{k}'
        moment = moments.uniform(0, duration)
        met += kill_after(begin(name, folder), moment)
        saved = checkpoint.newest(folder)
        if not saved:
            shutil.rmtree(folder, ignore_errors=True)
        finish(begin(name, folder), folder)
        differing = expected.differs(Left(folder))
        print(f'{name} killed after {moment:.2f} of {duration:.2f} s, there was '
              f'{saved or "no checkpoint"}: {differing or "equal"}', flush=True)
        differences += differing
        shutil.rmtree(folder)
    return met, differences


def main(argv):
    options = config.parse(keys, {}, argv, __file__)
    torch.set_num_threads(1)
    shutil.rmtree(options.out_dir, ignore_errors=True)
    os.makedirs(options.out_dir)
    moments = random.Random(options.seed)
    names = [options.stage] if options.stage else OWN
    failed = False
    for name in names:
        met, differences = kill_stage(name, options.kills, options.out_dir, moments)
        failed = failed or differences
        print(f'{name}: {options.kills} runs, {met} killed before their end, '
              f'{len(differences)} differences', flush=True)
    raise SystemExit(bool(failed))


if __name__ == '__main__':
    main(sys.argv[1:])
