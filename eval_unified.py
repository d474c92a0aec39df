"""Unified-Bench: image -> caption -> image on held-out images, and how like the source the result is.

    python eval_unified.py                                        # the shipped base, on held-out scenes
    python eval_unified.py --init_from=out/grpo_decoder --eval_images=256
    python eval_unified.py --plot=out/grpo_encoder,out/other      # curves of the evaluations inside some runs
    python eval_unified.py --preset=paper --init_from=out/grpo_decoder --held_out=UniBench/Image --eval_temperature=0.7

Captions are greedy unless eval_temperature says otherwise, sampling is the ODE from fixed start noise, and beside the
tower that was the reward stands one that was not (`judge`). In the embedded world captions and images are counted too:
truth, recall and exactness of sampled and greedy captions, and what an oracle reads in the images.
"""
import json
import os
import sys

import torch
from tqdm import tqdm

import common
import config
from data.images import open_data
from model import UAE
from reward import backbone, clip_reward

# --- script keys ---------------------------------------------------------------------------------------------------
keys = dict(
    steps = 0,                 # updates: none here; the word exists in every script
    plot = '',                 # run folders, comma-separated: draw the curves of their eval.jsonl instead
)
# -------------------------------------------------------------------------------------------------------------------


CHUNK = 64                     # held-out images at a time


@torch.no_grad()
def reconstruct(uae, x, rows, temperature=0.0, drawn=True):
    """x (n, 3, R, R), rows: their indices -> captions (list), token counts (n,), x_hat (n, 3, R, R), None if not drawn.

    Fixed randomness: start noise and uniforms are functions of an image's index alone.
    """
    seen = uae.see(x)
    u = common.uniform((uae.c.caption_len,), rows, 'eval', 'token').to(uae.device)
    y, mask, _ = uae.sample_captions(seen, 1, temperature, u)
    return uae.texts(y, mask), ((y != uae.end) * mask).sum(1), draw(uae, y, mask, rows, seen) if drawn else None


@torch.no_grad()
def draw(uae, y, mask, rows, seen=None):
    """Images (n, 3, R, R) of captions by the ODE, start noise a function of the image's index alone."""
    z = common.normal(uae.latent_shape(), rows, 'eval', 'start').to(uae.device)
    return uae.to_image(uae.draw(z, uae.condition(y, mask, seen), uae.c.eval_steps)).clamp(-1, 1)


class Evaluator:
    """Scores a UAE on fixed held-out images; `held` from data.images.open_data. Every rank takes a share of the images."""

    def __init__(self, uae, held, c, run, towers=None):
        self.uae, self.held, self.c, self.run = uae, held, c, run
        self.towers = towers or {name: backbone(source, c, run.device) for name, source in (('reward', c.reward), ('judge', 'judge'))}

    def records(self, rows):
        """One dict per image: caption, scores, and in the embedded world everything that is counted."""
        uae, x = self.uae, self.held['x'][rows].to(self.uae.device)
        texts, lengths, x_hat = reconstruct(uae, x, rows, self.c.eval_temperature)
        scores = {name: clip_reward(x, x_hat, tower).tolist() for name, tower in self.towers.items()}
        mse = (x - x_hat).square().flatten(1).mean(1).tolist()
        out = [dict(row=int(i), name=self.held['names'][i], caption=texts[k], caption_len=lengths[k].item(), mse=mse[k],
                    **{n: s[k] for n, s in scores.items()}) for k, i in enumerate(rows)]
        if self.held['scenes']:
            from data.shapes import scenes as world
            truth = [world.caption(self.held['scenes'][i]) for i in rows]
            y, mask, _ = uae.tokens(truth)
            true = draw(uae, y, mask, rows, uae.see(x))
            sampled = reconstruct(uae, x, rows, 1.0, drawn=False)[0]
            for rec, own, ideal, s in zip(out, world.read(x_hat.cpu()), world.read(true.cpu()), sampled):
                rec.update(read_own=own, read_true=ideal, sampled=s)
        return out

    def __call__(self):
        """-> (summary {name: number}, records of all images in order); the same on every rank."""
        mine = range(self.run.rank, len(self.held['x']), self.run.world)
        found = [r for i in range(0, len(mine), CHUNK) for r in self.records(list(mine[i:i + CHUNK]))]
        found = sorted(common.gather_objects(found, self.run), key=lambda r: r['row'])
        summary = {k: sum(r[k] for r in found) / len(found) for k in ('reward', 'judge', 'mse', 'caption_len')}
        if self.held['scenes']:
            summary.update(count(found, self.held['scenes']))
        return summary, found

    def every(self, step, last=False):
        """Evaluation inside a run: every c.eval_every updates and at the end; printed and appended to eval.jsonl."""
        if not self.c.eval_every or (step % self.c.eval_every and not last):
            return
        summary, _ = self()
        if self.run.master:
            tqdm.write(f'eval {step:4d} | ' + ' '.join(f'{k} {v:.3f}' for k, v in summary.items()))
            with open(f'{self.c.out_dir}/eval.jsonl', 'a') as f:
                f.write(json.dumps(dict(step=step, **summary)) + '\n')


def count(found, scenes):
    """Counts of the embedded world: captions sampled at temperature 1 (the policy itself) and greedy ones, and t2i."""
    from data.shapes import scenes as world
    scenes = [scenes[r['row']] for r in found]
    out = {f'caption_{k}': v for k, v in world.caption_scores([r['sampled'] for r in found], scenes).items()}
    out.update({f'greedy_caption_{k}': v for k, v in world.caption_scores([r['caption'] for r in found], scenes).items()})
    out.update({f't2i_{k}': world.t2i_of_readings([r[f'read_{k}'] for r in found], scenes) for k in ('own', 'true')})
    return out


def contact_sheet(columns, texts, path, scale=4):
    """PNG: rows of images beside their captions. columns: list of (N, 3, R, R) in [-1, 1]; texts: list of N strings."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(len(texts), len(columns) + 1, figsize=(3 * len(columns) + 3, 1.5 * len(texts)), squeeze=False)
    for i, text in enumerate(texts):
        for ax, images in zip(axes[i], columns):
            ax.imshow((images[i].permute(1, 2, 0).cpu().clamp(-1, 1) + 1) / 2, interpolation='nearest')
        axes[i, -1].text(0, 0.5, text, va='center', fontsize=8, wrap=True)
        for ax in axes[i]:
            ax.axis('off')
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def plot_runs(folders, path):
    """PNG with the evaluations inside some runs over updates, one panel a measure, one line a run."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    runs = {}
    for folder in folders:
        if not os.path.exists(f'{folder}/eval.jsonl'):
            raise SystemExit(f'--plot: no {folder}/eval.jsonl')
        with open(f'{folder}/eval.jsonl') as f:
            runs[os.path.basename(folder.rstrip('/'))] = [json.loads(line) for line in f]
    shown = ('reward', 'judge', 'caption_len', 'caption_truth', 'caption_recall', 'greedy_caption_truth', 'greedy_caption_recall', 't2i_own', 't2i_true')
    names = [n for n in shown if all(n in lines[0] for lines in runs.values())]
    fig, axes = plt.subplots(1, len(names), figsize=(2.8 * len(names), 2.8), squeeze=False)
    for ax, name in zip(axes[0], names):
        for run, lines in runs.items():
            ax.plot([line['step'] for line in lines], [line[name] for line in lines], label=run)
        ax.set_title(name, fontsize=9)
        ax.set_xlabel('updates')
    axes[0, 0].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=100)
    plt.close(fig)


def main(argv):
    c = config.parse(keys, {}, argv, __file__)
    if c.plot:
        os.makedirs(c.out_dir, exist_ok=True)
        plot_runs(c.plot.split(','), f'{c.out_dir}/curves.png')
        return print(f'{c.out_dir}/curves.png')
    run = common.start(c)
    _, held = open_data(c, run, training=False)
    evaluate = Evaluator(UAE(c, run.device), held, c, run)
    summary, found = evaluate()
    if run.master:
        os.makedirs(c.out_dir, exist_ok=True)
        print('\n'.join(f'{k:22s} {v:.4f}' for k, v in summary.items()))
        with open(f'{c.out_dir}/report.json', 'w') as f:
            json.dump(dict(summary=summary, captions={r['name']: r['caption'] for r in found}), f, indent=1)
        rows = list(range(min(12, len(found))))
        x = held['x'][rows]
        contact_sheet([x, reconstruct(evaluate.uae, x.to(run.device), rows, c.eval_temperature)[2]], [found[i]['caption'] for i in rows],
                      f'{c.out_dir}/reconstructions.png')


if __name__ == '__main__':
    main(sys.argv[1:])
