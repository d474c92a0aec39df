"""Unified-Bench: image -> caption -> image on held-out images, and how like the source the result is.

    python eval_unified.py                                        # the shipped base, on held-out scenes
    python eval_unified.py --init_from=out/grpo_decoder --eval_images=256
    python eval_unified.py --plot=out/grpo_encoder,out/other      # curves of the evaluations inside some runs
    python eval_unified.py --bench=unified --preset=paper --init_from=out/grpo_decoder --data=UniBench --eval_temperature=0.7 --seeds=3
    python eval_unified.py --bench=unified --data=UniBench --generated=UniBench/example_image    # or --captions=FILE: somebody else's

Captions are greedy unless eval_temperature says otherwise, sampling is the ODE from fixed start noise, and beside the
tower that was the reward stands one that was not (`judge`). In the embedded world captions and images are counted too:
truth, recall and exactness of sampled and greedy captions, and what an oracle reads in the images.

--bench=unified is the paper's benchmark in its official layout: references DATA/Image/*.jpg; reconstructions of the same names go to
out_dir/example_image (seed k: example_image_k), where the official script finds them; unified.json has its keys, report.json means and
standard errors over seeds. A second run draws what is missing. A backbone that does not load, or a reference without a reconstruction,
is refused; the official script leaves them out of the mean. Our encoder sees a reference whole, scaled to resolution^2 pixels.
"""
import glob
import json
import os
import pathlib
import sys
import textwrap

import torch
from tqdm import tqdm

import common
import config
from data.images import image_files, keep, open_data, picture
from model import UAE
from reward import backbone, backbones, clip_reward, over_seeds, pair, unified_score

# --- script keys ---------------------------------------------------------------------------------------------------
keys = dict(
    steps = 0,                 # updates: none here; the word exists in every script
    plot = '',                 # run folders, comma-separated: draw the curves of their evaluations instead; A,B:reward,entropy = of these fields
    bench = '',                # unified = the paper's Unified-Bench on the references in DATA/Image
    backbones = 'clip,longclip,dinov2,dinov3',   # names in reward.BACKBONES; name=FOLDER takes the weights from there
    captions = '',             # .jsonl of {"image", "caption"}, as sample.py writes: draw these captions instead of our encoder's
    generated = '',            # folder of somebody else's reconstructions: score these, none of our models is loaded
    seeds = 1,                 # repetitions with other start noise and other sampled captions
)
# -------------------------------------------------------------------------------------------------------------------


CHUNK = 64                     # held-out images at a time


@torch.no_grad()
def reconstruct(uae, x, rows, temperature=0.0, drawn=True, seed=()):
    """x (n, 3, R, R), rows: their indices -> captions (list), token counts (n,), x_hat (n, 3, R, R), None if not drawn.

    Fixed randomness: start noise and uniforms are functions of an image's index (and of seed, a tuple) alone.
    """
    seen = uae.see(x)
    u = common.uniform((uae.c.caption_len,), rows, 'eval', 'token', *seed).to(uae.device)
    y, mask, _ = uae.sample_captions(seen, 1, temperature, u)
    return uae.texts(y, mask), ((y != uae.end) * mask).sum(1), draw(uae, y, mask, rows, seen, seed) if drawn else None


@torch.no_grad()
def draw(uae, y, mask, rows, seen=None, seed=()):
    """Images (n, 3, R, R) of captions by the ODE, start noise a function of the image's index (and of seed) alone."""
    z = common.normal(uae.latent_shape(), rows, 'eval', 'start', *seed).to(uae.device)
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


def contact_sheet(columns, texts, path):
    """PNG: rows of images beside their captions. columns: lists of N images (3, H, W) in [-1, 1]; texts: list of N strings."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(len(texts), len(columns) + 1, figsize=(3 * len(columns) + 3, 1.5 * len(texts)), squeeze=False)
    for i, text in enumerate(texts):
        for ax, images in zip(axes[i], columns):
            ax.imshow((images[i].permute(1, 2, 0).cpu().clamp(-1, 1) + 1) / 2, interpolation='nearest')
        axes[i, -1].text(0, 0.5, text.replace('$', r'\$'), va='center', fontsize=8, wrap=True)
        for ax in axes[i]:
            ax.axis('off')
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def plot_runs(folders, fields, path):
    """PNG of curves of some runs over updates, one panel a field of eval.jsonl or else of log.jsonl, one line a run; no fields: those of the loop."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    runs = {}
    for folder in folders:
        run = runs[os.path.basename(folder.rstrip('/'))] = {}
        for kind in ('log', 'eval'):
            if not os.path.exists(f'{folder}/{kind}.jsonl'):
                raise SystemExit(f'--plot: no {folder}/{kind}.jsonl')
            with open(f'{folder}/{kind}.jsonl') as f:
                lines = [json.loads(line) for line in f]
            run.update({k: ([line['step'] for line in lines], [line[k] for line in lines]) for k in lines[0]})
    shown = fields or ('reward', 'judge', 'caption_len', 'caption_truth', 'caption_recall', 'greedy_caption_truth', 'greedy_caption_recall', 't2i_own', 't2i_true')
    names = [n for n in shown if all(n in run for run in runs.values())]
    if fields and names != fields:
        raise SystemExit(f'--plot: {" ".join(n for n in fields if n not in names)} not in every run; fields there are: {" ".join(run)}')
    fig, axes = plt.subplots(1, len(names), figsize=(2.8 * len(names), 2.8), squeeze=False)
    for ax, name in zip(axes[0], names):
        for run, curves in runs.items():
            ax.plot(*curves[name], label=run)
        ax.set_title(name, fontsize=9)
        ax.set_xlabel('updates')
    axes[0, 0].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=100)
    plt.close(fig)


# --- the paper's Unified-Bench ---------------------------------------------------------------------------------------
def read_captions(path, references):
    """A .jsonl of {"image", "caption"} -> {reference: caption}, by the image's file name. Raises SystemExit with file and line."""
    items, texts, place = [], {}, path
    try:
        with open(path, encoding='utf-8-sig') as f:
            for n, line in enumerate(f, 1):
                place = f'{path} line {n}'
                if line.strip():
                    row = json.loads(line)
                    items.append((os.path.basename(row['image']), place))
                    texts[place] = '' + row['caption']
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise SystemExit(f'{place}: expected lines {{"image": "...", "caption": "..."}} ({type(e).__name__}: {e})')
    return {r: texts[place] for r, place in pair(items, references, 'caption').items()}


def claim(c, run):
    """Notes in out_dir/run.json what its images depend on; refuses an out_dir whose images were made otherwise."""
    base, path = os.path.abspath(common.find_checkpoint(c)), pathlib.Path(c.out_dir, 'run.json')
    parts = glob.glob(f'{glob.escape(base)}/**/*.safetensors', recursive=True) + [c.captions] * bool(c.captions)
    mine = {k: getattr(c, k) for k in ('encoder decoder lora_rank captions resolution caption_prompt caption_len negative_prompt condition '
                                       'cond_len guidance eval_steps eval_temperature dtype seed').split()}
    mine.update(data=os.path.abspath(c.data), init_from=base, written=max(map(os.path.getmtime, parts)))
    for k, old in json.loads(path.read_text()).items() if path.exists() else ():
        if old != mine.get(k):
            raise SystemExit(f'{c.out_dir} holds images made with {k}={old!r}, this run has {mine.get(k)!r}: give --out_dir=ELSEWHERE')
    common.total(0, run)                         # nobody writes before everybody has read
    if run.master:
        common.write_json(str(path), mine, indent=2)


def rebuild(c, run, references):
    """Draws what out_dir lacks, each rank its share, from the captions of c.captions or our encoder's. -> [(folder, {reference: caption})] of the seeds."""
    given = read_captions(c.captions, references) if c.captions else None
    claim(c, run)
    uae, names, made = UAE(c, run.device), list(references), []
    for k in range(c.seeds):
        folder, texts = (f'{c.out_dir}/{kind}' + f'_{k}' * bool(k) for kind in ('example_image', 'captions'))
        for i in tqdm(range(run.rank, len(names), run.world), desc=f'seed {k + 1} of {c.seeds}', disable=not run.master):
            name, seed = names[i], (c.seed + k,)
            if os.path.exists(f'{folder}/{name}') and os.path.exists(f'{texts}/{name}.json'):
                continue
            x = picture(references[name], c.resolution ** 2).to(uae.device)
            if given is None:
                (text,), _, x_hat = reconstruct(uae, x, [i], c.eval_temperature, seed=seed)
            else:
                text, (y, mask, cut) = given[name], uae.tokens([given[name]])
                x_hat = draw(uae, y, mask, [i], uae.see(x) if c.condition != 'text' else None, seed)
                if cut:
                    print(f'warning: the caption of {name} has more than caption_len - 1 = {c.caption_len - 1} tokens and was cut')
            common.write_json(f'{texts}/{name}.json', text, indent=2)
            keep(x_hat[0], f'{folder}/{name}')
        common.total(0, run)                     # all have drawn
        made.append((folder, {name: json.loads(pathlib.Path(texts, f'{name}.json').read_text()) for name in names}))
    return made


def unified(c, run):
    """--bench=unified: draws what is to be drawn, scores it; unified.json (of seed k: unified_k.json), report.json, contact_sheet.png."""
    if not os.path.isdir(f'{c.data}/Image'):
        raise SystemExit(f'--bench=unified needs --data=DIR with the references in DIR/Image; there is no {c.data}/Image')
    files, results = image_files(f'{c.data}/Image'), []
    references = pair(files, dict(files), 'file')                       # refuses two of one name
    towers = backbones(c) if run.master else {}                         # before hours of drawing
    made = [(c.generated, dict.fromkeys(references, ''))] if c.generated else rebuild(c, run, references)
    if not run.master:
        return
    towers = {name: tower.to(run.device) for name, tower in towers.items()}
    for k, (folder, captions) in enumerate(made):
        files = image_files(folder)
        pairs = pair(files, references, 'reconstruction')
        scores = {name: {file: None for file, _ in files} for name in towers}
        for ref, path in tqdm(pairs.items(), desc='score'):
            x, x_hat = picture(references[ref]).to(run.device), picture(path).to(run.device)
            for name, tower in towers.items():
                scores[name][os.path.basename(path)] = clip_reward(x, x_hat, tower).item()
        results.append(unified_score(scores))
        common.write_json(f'{c.out_dir}/unified' + f'_{k}' * bool(k) + '.json', results[k], indent=2)
    mean, error = over_seeds(results)
    common.write_json(f'{c.out_dir}/report.json', dict(summary=mean, standard_error=error, seeds=len(results), images=len(references), captions=captions), indent=2)
    print('\n'.join(f'{name:22s} {v:.4f}' + (f' +- {error[name]:.4f}' if error else '') for name, v in mean.items()))
    shown = list(references)[:12]
    contact_sheet([[picture(place[r])[0] for r in shown] for place in (references, pairs)],
                  [textwrap.shorten(captions[r], 400, placeholder=' ...') for r in shown], f'{c.out_dir}/contact_sheet.png')


def main(argv):
    c = config.parse(keys, {}, argv, __file__)
    if c.plot:
        os.makedirs(c.out_dir, exist_ok=True)
        folders, _, fields = c.plot.partition(':')
        plot_runs(folders.split(','), fields.split(',') if fields else [], f'{c.out_dir}/curves.png')
        return print(f'{c.out_dir}/curves.png')
    stray = [k for k in ('captions', 'generated', 'seeds') if getattr(c, k) != keys[k]]
    if c.bench not in ('', 'unified') or stray and not c.bench:
        raise SystemExit(f'--bench={c.bench}: expected unified' + (f' (for --{stray[0]})' if stray else ''))
    if c.seeds < 1 or c.generated and len(stray) > 1:
        raise SystemExit(f'--seeds={c.seeds}: expected 1 or more' if c.seeds < 1 else '--generated images are finished: without --captions and --seeds')
    run = common.start(c)
    if c.bench:
        return unified(c, run)
    _, held = open_data(c, run, training=False)
    evaluate = Evaluator(UAE(c, run.device), held, c, run)
    summary, found = evaluate()
    if run.master:
        os.makedirs(c.out_dir, exist_ok=True)
        print('\n'.join(f'{k:22s} {v:.4f}' for k, v in summary.items()))
        common.write_json(f'{c.out_dir}/report.json', dict(summary=summary, captions={r['name']: r['caption'] for r in found}))
        rows = list(range(min(12, len(found))))
        x = held['x'][rows]
        contact_sheet([x, reconstruct(evaluate.uae, x.to(run.device), rows, c.eval_temperature)[2]], [found[i]['caption'] for i in rows],
                      f'{c.out_dir}/reconstructions.png')


if __name__ == '__main__':
    main(sys.argv[1:])
