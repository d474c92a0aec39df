"""`make demo`: the whole loop on the embedded world, base -> cold_start -> grpo_encoder -> grpo_decoder -> evaluation.

    python data/shapes/demo.py                       # about ten minutes on two slow cores; out/demo/report.md and pictures
    python data/shapes/demo.py --seed=1 --out_dir=out/demo_1

Stopped half-way it goes on where it was; delete out_dir to start anew. Writes report.json, report.md, curves.png and
before_after.png. The truth about the scenes is used by the evaluation alone.
"""
import contextlib
import importlib.metadata
import json
import os
import sys
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
os.chdir(ROOT)
import cold_start
import common
import config
import eval_unified
import grpo_decoder
import grpo_encoder
from data.images import open_data
from data.shapes import scenes as world
from model import UAE
from reward import clip_reward

# --- script keys ---------------------------------------------------------------------------------------------------
keys = dict(
    steps = 0,                 # updates of every stage; 0 = each script's own
    scenes = 256,              # held-out scenes of the final evaluations
    controls = True,           # also run stage 2 with shuffled rewards
)
# -------------------------------------------------------------------------------------------------------------------
STAGES = dict(cold_start=cold_start, grpo_encoder=grpo_encoder, grpo_decoder=grpo_decoder)
SHOWN = ('reward', 'judge', 'mse', 'caption_len', 'caption_truth', 'caption_recall', 'caption_exact', 'greedy_caption_len', 'greedy_caption_truth',
         'greedy_caption_recall', 'greedy_caption_exact', 't2i_own', 't2i_true')


def train(name, script, c, words):
    """Runs one stage script in this process; its lines go to out_dir/name.txt, its progress bar to the screen."""
    os.makedirs(c.out_dir, exist_ok=True)
    out = f'{c.out_dir}/{name}'
    with open(f'{out}.txt', 'a') as f, contextlib.redirect_stdout(f):
        script.main([f'--out_dir={out}', f'--seed={c.seed}', f'--device={c.device}', '--resume', *words])
    with open(f'{out}/log.jsonl') as f:
        return out, sum(json.loads(line)['sec'] for line in f)


def score(name, init_from, c, held):
    """Final evaluation of one checkpoint on all held-out scenes, kept in out_dir/name.json. -> dict(summary, ...)."""
    path = f'{c.out_dir}/{name}.final.json'
    if not os.path.exists(path):
        start = time.time()
        own = config.parse(eval_unified.keys, {}, [f'--init_from={init_from}'], 'eval_unified.py')
        run = common.start(own)
        uae = UAE(own, run.device)
        evaluate = eval_unified.Evaluator(uae, held, own, run)
        summary, found = evaluate()
        result = dict(summary={k: summary[k] for k in SHOWN}, captions=[r['caption'] for r in found])
        if name == 'base':
            result.update(references(uae, evaluate, held))
        rows = list(range(8))
        images = eval_unified.reconstruct(uae, held['x'][rows].to(run.device), rows)[2]
        result.update(images=[[round(v, 3) for v in im.flatten().tolist()] for im in images.cpu()], seconds=time.time() - start)
        common.write_json(path, result, indent=None)
    with open(path) as f:
        return json.load(f)


@torch.no_grad()
def references(uae, evaluate, held):
    """What the scores can be at best and by chance: the VAE's own reconstruction, somebody else's caption, a cooler base."""
    x, scenes, device = held['x'], held['scenes'], uae.device
    rows = list(range(len(x)))
    x_hat = uae.to_image(uae.to_latent(x.to(device))).clamp(-1, 1)
    ceiling = {k: clip_reward(x.to(device), x_hat, tower).mean().item() for k, tower in evaluate.towers.items()}
    ceiling.update(mse=(x_hat.cpu() - x).square().mean().item(), t2i=world.t2i(x_hat.cpu(), scenes))
    y, mask, _ = uae.tokens([world.caption(s) for s in scenes[1:] + scenes[:1]])
    floor = dict(t2i=world.t2i(eval_unified.draw(uae, y, mask, rows, uae.see(x.to(device))).cpu(), scenes))
    cool = world.caption_scores(eval_unified.reconstruct(uae, x.to(device), rows, 0.5, drawn=False)[0], scenes)
    return dict(ceiling=ceiling, floor=floor, base_cool={f'caption_{k}': v for k, v in cool.items()})


def history(out):
    with open(f'{out}/eval.jsonl') as f:
        return [json.loads(line) for line in f]


def curves(hist, path):
    """Held-out measures over updates, stages side by side; the shuffled control dashed."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    panels = {'held-out similarity': ('reward', 'judge'), 'sampled caption length': ('caption_len',), 'truth': ('caption_truth', 'greedy_caption_truth'),
              'recall': ('caption_recall', 'greedy_caption_recall'), 'images read right': ('t2i_own', 't2i_true')}
    fig, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.4))
    for ax, (title, names) in zip(axes, panels.items()):
        at = 0
        for stage in STAGES:
            steps = [at + h['step'] for h in hist[stage]]
            for i, n in enumerate(names):
                ax.plot(steps, [h[n] for h in hist[stage]], color=f'C{i}', label=n.replace('caption_', '') if stage == 'cold_start' else None)
                if stage == 'grpo_encoder' and 'shuffled_reward' in hist:
                    ax.plot([at + h['step'] for h in hist['shuffled_reward']], [h[n] for h in hist['shuffled_reward']], color=f'C{i}', ls=':')
            ax.axvline(at, color='gray', lw=0.5)
            ax.text(at, 1.0, ' ' + stage, transform=ax.get_xaxis_transform(), fontsize=7, va='bottom')
            at = steps[-1]
        ax.set_title(title, pad=14)
        if len(names) > 1 and 'similarity' not in title:
            ax.set_ylim(0, 1.03)                     # shares, on one scale
        ax.set_xlabel('updates')
        ax.legend(fontsize=7)
    fig.text(0.995, 0.01, 'dotted: stage 2 with shuffled rewards', ha='right', fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def before_after(held, base, last, path):
    """Source | reconstruction and caption before | after, for eight held-out scenes."""
    import textwrap
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(4, 6, figsize=(15, 12))
    for i in range(8):
        pictures = [held['x'][i], *(torch.tensor(r['images'][i]).view(3, 32, 32) for r in (base, last))]
        row = axes[i % 4, i // 4 * 3:][:3]
        for ax, picture, text in zip(row, pictures, ('', base['captions'][i], last['captions'][i])):
            ax.imshow((picture.permute(1, 2, 0) + 1) / 2, interpolation='nearest')
            ax.text(0.5, -0.04, '\n'.join(textwrap.wrap(text, 36)), transform=ax.transAxes, ha='center', va='top', fontsize=8)
            ax.axis('off')
    for ax, head in zip(axes[0], ('source', 'before: base', 'after: grpo_decoder') * 2):
        ax.set_title(head, weight='bold')
    fig.tight_layout()
    fig.savefig(path, dpi=80)
    plt.close(fig)


def table(report):
    """The report as a markdown table, one row per measure."""
    columns = {**report['stages'], **{k: v for k, v in report['controls'].items() if k == 'shuffled_reward'}}
    lines = ['| | ' + ' | '.join(columns) + ' | ceiling |', '|---|' + '---|' * (len(columns) + 1)]
    for k in SHOWN:
        top = report['ceiling'].get('t2i' if k.startswith('t2i') else k)
        lines.append(f'| {k} | ' + ' | '.join(f'{v[k]:.3f}' for v in columns.values()) + f' | {"" if top is None else f"{top:.3f}"} |')
    return '\n'.join(lines)


def main(argv):
    c = config.parse(keys, {}, argv, __file__)
    run = common.start(c)
    c.eval_images = c.scenes
    os.makedirs(c.out_dir, exist_ok=True)
    _, held = open_data(c, run)
    short = [f'--steps={c.steps}'] if c.steps else []
    results, seconds, hist, out = {}, {}, {}, ''
    for name in ('base', *STAGES):
        if name != 'base':
            out, seconds[name] = train(name, STAGES[name], c, short + ([f'--init_from={out}'] if out else []))
            hist[name] = history(out)
        results[name] = score(name, out, c, held)
        seconds[f'eval_{name}'] = results[name]['seconds']
        if name == 'grpo_encoder' and c.controls:
            half = (c.steps or grpo_encoder.keys['steps']) // 2         # half the updates on the same learning rate schedule
            words = [f'--init_from={c.out_dir}/cold_start', '--shuffle_reward=True', f'--steps={half}', '--lr_decay=2.0']
            control, seconds['shuffled_reward'] = train('shuffled_reward', grpo_encoder, c, words)
            hist['shuffled_reward'] = history(control)
            results['shuffled_reward'] = score('shuffled_reward', control, c, held)
            seconds['eval_shuffled_reward'] = results['shuffled_reward']['seconds']
    base = results['base']
    report = dict(
        stages={k: results[k]['summary'] for k in ('base', *STAGES)}, ceiling=base['ceiling'], floor=base['floor'],
        controls=dict(base_cool=base['base_cool'], **{k: results[k]['summary'] for k in results if k == 'shuffled_reward'}),
        history=hist, seconds={k: round(v, 1) for k, v in seconds.items()}, seed=c.seed,
        versions={p: importlib.metadata.version(p) for p in ('torch', 'transformers', 'diffusers', 'open_clip_torch', 'numpy')} | dict(python=sys.version.split()[0]))
    common.write_json(f'{c.out_dir}/report.json', report)
    text = f'{table(report)}\n\nseed {c.seed}, {sum(seconds.values()):.0f} seconds, {len(held["x"])} held-out scenes\n'
    common.write_atomic(f'{c.out_dir}/report.md', lambda p: open(p, 'w').write(text))
    curves(hist, f'{c.out_dir}/curves.png')
    before_after(held, base, results['grpo_decoder'], f'{c.out_dir}/before_after.png')
    print(f'\n{text}\n{c.out_dir}: report.json report.md curves.png before_after.png')


if __name__ == '__main__':
    main(sys.argv[1:])
