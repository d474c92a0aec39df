"""`make demo`: the whole loop on the embedded world.

base -> cold_start -> grpo_encoder -> nft_decoder -> by_gradient -> evaluation.

    python data/shapes/demo.py                       # about eleven minutes on two slow cores
    python data/shapes/demo.py --seed=1 --out_dir=out/demo_1

Stopped half-way it goes on with the stage that ran; delete out_dir to start anew. Writes
report.html, report.json and report.md. The truth about the scenes is used by the evaluation alone.
"""
import contextlib
import importlib.metadata
import json
import os
import shutil
import sys
import time

# waiting threads soon sleep: beside other work spinning made an update 25 times slower
os.environ.setdefault('GOMP_SPINCOUNT', '3000')             # read when torch is loaded
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
os.chdir(ROOT)
import cold_start
from lib import ranks
from lib.files import write_atomic, write_json, write_lines
import grpo_encoder
import nft_decoder
from lib.checkpoint import newest, open_uae
from bench.summary import markdown
from config import parse
from data.images import open_data
from data.shapes import scenes as world
from lib.scores import Evaluator, draw_captions, reconstruct
from reward import clip_reward
from tools.report import write_report

# --- script keys ---------------------------------------------------------------------------------
keys = dict(
    steps = 0,                 # updates of every stage; 0 = each script's own
    scenes = 256,              # held-out scenes of the final evaluations
    controls = True,           # also run stage 2 with shuffled rewards
)
# -------------------------------------------------------------------------------------------------
STAGES = dict(cold_start=cold_start, grpo_encoder=grpo_encoder, nft_decoder=nft_decoder,
              by_gradient=cold_start)
# stage 1's loss on the decoder alone: what stage 3 would win without noise
FLAGS = dict(by_gradient=['--trains=decoder', '--steps=100', '--lr=1e-4', '--warmup=10'])
CONTROL = 'shuffled_reward'
EVAL_EVERY = 30                # updates; an evaluation takes as long as three of stage 2
SHOWN = (
    'reward', 'judge', 'mse', 'caption_len', 'caption_truth', 'caption_recall', 'caption_exact',
    'greedy_caption_len', 'greedy_caption_truth', 'greedy_caption_recall', 'greedy_caption_exact',
    't2i_own', 't2i_true')
PACKAGES = ('torch', 'transformers', 'diffusers', 'open_clip_torch', 'numpy')
NEXT = '''Look at   {out}/report.html
Then try  python sample.py --init_from={out}/by_gradient --prompt="small red circle top-left ."
          make bench
          python docs/exercises/ablations.py length'''


# --- stages and their scores ---------------------------------------------------------------------
def train(name, script, config, flags):
    """Runs one stage script in this process -> (its out_dir, seconds of its updates).

    Its lines go to out_dir/name.txt, its progress bar to the screen.
    """
    os.makedirs(config.out_dir, exist_ok=True)
    out = f'{config.out_dir}/{name}'
    if not newest(out):                     # stopped before its first checkpoint: from its start
        shutil.rmtree(out, ignore_errors=True)
    shared = [f'--out_dir={out}', f'--seed={config.seed}', f'--device={config.device}',
              f'--eval_every={EVAL_EVERY}', '--resume']
    with open(f'{out}.txt', 'a') as f, contextlib.redirect_stdout(f):
        script.main(shared + flags)
    with open(f'{out}/log.jsonl') as f:
        seconds = sum(json.loads(line)['sec'] for line in f)
    return out, seconds


def score(name, init_from, config, held):
    """Final evaluation of a checkpoint on all held-out scenes; kept in out_dir/name.final.json."""
    path = f'{config.out_dir}/{name}.final.json'
    if not os.path.exists(path):
        result = evaluate_checkpoint(init_from, held, is_base=name == 'base')
        write_json(path, result, indent=None)
    with open(path) as f:
        return json.load(f)


def evaluate_checkpoint(init_from, held, is_base):
    """-> summary and seconds; of the base also `limits`."""
    start = time.time()
    config = parse({}, {}, [f'--init_from={init_from}'], 'eval_unified.py')
    run = ranks.start(config)
    uae = open_uae(config, run.device)
    evaluate = Evaluator(uae, held, config, run)
    summary, _ = evaluate()
    result = dict(summary={field: summary[field] for field in SHOWN})
    if is_base:
        result.update(limits(uae, evaluate.towers, held))
    result['seconds'] = time.time() - start
    return result


@torch.no_grad()
def limits(uae, towers, held):
    """What the scores can be at best and by chance.

    ceiling: the VAE's own reconstruction; floor: images of another scene's caption; base_cool: the
    base's captions at temperature 0.5.
    """
    scenes = held['scenes']
    x = held['x'].to(uae.device)
    rows = list(range(len(x)))
    x_hat = uae.decoder.to_image(uae.decoder.to_latent(x)).clamp(-1, 1)
    ceiling = {}
    for name, tower in towers.items():
        ceiling[name] = clip_reward(x, x_hat, tower).mean().item()
    ceiling['mse'] = (x_hat.cpu() - held['x']).square().mean().item()
    ceiling['t2i'] = world.t2i(x_hat.cpu(), scenes)

    others = scenes[1:] + scenes[:1]
    y, mask, _ = uae.encoder.tokens([world.caption(scene) for scene in others])
    drawn = draw_captions(uae, y, mask, rows, uae.encoder.see(x))
    floor = dict(t2i=world.t2i(drawn.cpu(), scenes))

    texts, _, _ = reconstruct(uae, x, rows, 0.5, drawn=False)
    cool = {}
    for name, value in world.caption_scores(texts, scenes).items():
        cool[f'caption_{name}'] = value
    return dict(ceiling=ceiling, floor=floor, base_cool=cool)


def announce(name, summary, seconds):
    """Prints what a stage came to, in three numbers."""
    print(f'{name} ({seconds:.0f} s): judge {summary["judge"]:.3f} for its reconstructions; '
          f'sampled captions state {summary["caption_recall"]:.0%} of a scene; '
          f'images of true captions are {summary["t2i_true"]:.0%} right', flush=True)


def read_history(out):
    """The evaluations inside a run, one dict each."""
    with open(f'{out}/eval.jsonl') as f:
        return [json.loads(line) for line in f]


# --- the table -----------------------------------------------------------------------------------
def table(report):
    """The report as a markdown table, one row per measure."""
    columns = dict(report['stages'])
    if CONTROL in report['controls']:
        columns[CONTROL] = report['controls'][CONTROL]
    rows = {}
    for field in SHOWN:
        name = 't2i' if field.startswith('t2i') else field
        rows[field] = {stage: summary[field] for stage, summary in columns.items()}
        rows[field]['ceiling'] = report['ceiling'].get(name)
    return markdown('', rows)


def versions():
    found = {package: importlib.metadata.version(package) for package in PACKAGES}
    found['python'] = sys.version.split()[0]
    return found


# --- the loop ------------------------------------------------------------------------------------
def run_all(config, held):
    """Trains and scores everything -> results, seconds, history: dicts by name."""
    print('scoring the base models on held-out scenes, then the stages', flush=True)
    results = dict(base=score('base', '', config, held))
    seconds = dict(eval_base=results['base']['seconds'])
    announce('base', results['base']['summary'], seconds['eval_base'])
    history, out = {}, ''
    for name, script in STAGES.items():
        flags = list(FLAGS.get(name, []))
        if config.steps:
            flags.append(f'--steps={config.steps}')
        if out:
            flags.append(f'--init_from={out}')
        out, seconds[name] = train(name, script, config, flags)
        history[name] = read_history(out)
        results[name] = score(name, out, config, held)
        seconds[f'eval_{name}'] = results[name]['seconds']
        announce(name, results[name]['summary'], seconds[name])
        if name == 'grpo_encoder' and config.controls:
            # a fifth of the updates on the same learning rate schedule
            fifth = max(1, (config.steps or grpo_encoder.keys['steps']) // 5)
            flags = [f'--init_from={config.out_dir}/cold_start', '--shuffle_reward=True',
                     f'--steps={fifth}', '--lr_decay=5.0']
            control, seconds[CONTROL] = train(CONTROL, grpo_encoder, config, flags)
            history[CONTROL] = read_history(control)
            results[CONTROL] = score(CONTROL, control, config, held)
            seconds[f'eval_{CONTROL}'] = results[CONTROL]['seconds']
            announce('stage 2 with shuffled rewards', results[CONTROL]['summary'],
                     seconds[CONTROL])
    return results, seconds, history


def main(argv):
    config = parse(keys, {}, argv, __file__, dict(scenes=(1, 1e6)))
    run = ranks.start(config)
    config.eval_images = config.scenes
    os.makedirs(config.out_dir, exist_ok=True)
    _, held = open_data(config, run)
    results, seconds, history = run_all(config, held)

    base = results['base']
    controls = dict(base_cool=base['base_cool'])
    if CONTROL in results:
        controls[CONTROL] = results[CONTROL]['summary']
    report = dict(
        stages={name: results[name]['summary'] for name in ('base', *STAGES)},
        ceiling=base['ceiling'], floor=base['floor'], controls=controls, history=history,
        seconds={name: round(value, 1) for name, value in seconds.items()},
        seed=config.seed, versions=versions())
    write_json(f'{config.out_dir}/report.json', report)

    total = sum(seconds.values())
    summary = f'seed {config.seed}, {total:.0f} seconds, {len(held["x"])} held-out scenes'
    text = f'{table(report)}\n{summary}\n'
    write_atomic(f'{config.out_dir}/report.md', lambda tmp: write_lines(tmp, [text]))
    write_report([config.out_dir], config.out_dir)
    print(f'\n{text}\n{NEXT.format(out=config.out_dir)}')


if __name__ == '__main__':
    main(sys.argv[1:])
