"""Forks of the repository: each diff of exercises/ablations.md on a copy, run beside the unchanged scripts, and the curves of both.

    python exercises/fork.py --list
    python exercises/fork.py kl                         # -> out/forks/kl/ (code, log, evaluations), out/forks/kl.png
    python exercises/fork.py kl --steps=20 --seed=2     # words for both runs
    python exercises/fork.py --all                      # the ten ablations -> out/forks/ablations.png

A run that is there with the same words is not run again. The stages start from `make demo`: out/demo/cold_start and out/demo/grpo_encoder,
elsewhere from `--demo=FOLDER`.
"""
import json
import os
import re
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDERS = ('', 'data', 'data/shapes')
WORDS = dict(grpo_encoder=('--steps=60', '--eval_every=10'), grpo_decoder=('--steps=60', '--eval_every=10'))
BEFORE = dict(grpo_encoder='cold_start', grpo_decoder='grpo_encoder')


def forks():
    """{name: dict(title, ablation, script, words, curves, diff)} of ablations.md; curves are like 'eval.judge' and 'log.entropy'.

    An entry: `### name: title`, a line of code spans (the script with the words of both runs, then the curves), a diff block.
    """
    with open(f'{ROOT}/exercises/ablations.md', encoding='utf-8') as f:
        text = f.read()
    found = {}
    for part, ablation in zip(text.split('\n# ')[-2:], (True, False)):
        for entry in re.split(r'^### ', part, flags=re.M)[1:]:
            name, title = re.match(r'(\w+): (.*)', entry).groups()
            (script, *words), *curves = (span.split() for span in re.findall(r'`([^`]+)`', entry.split('\n\n')[1]))
            found[name] = dict(title=title, ablation=ablation, script=script.removesuffix('.py'), words=words, curves=[c for c, in curves],
                               diff=re.search(r'```diff\n(.*?)```', entry, re.S)[1])
    return found


def copy(target):
    """The repository's Python files at `target`, with the shipped models and images by reference."""
    for folder in FOLDERS:
        os.makedirs(f'{target}/{folder}', exist_ok=True)
        for name in os.listdir(f'{ROOT}/{folder}'):
            if name.endswith('.py'):
                shutil.copy(f'{ROOT}/{folder}/{name}', f'{target}/{folder}/{name}')
    for name in ('base', 'images'):
        if os.path.exists(f'{ROOT}/data/shapes/{name}'):
            os.symlink(f'{ROOT}/data/shapes/{name}', f'{target}/data/shapes/{name}')


def apply(diff, target):
    """Applies a unified diff below `target`. A hunk goes where its old lines stand, whatever its line number; they must stand there once."""
    for part in re.split(r'^--- .*\n', diff, flags=re.M)[1:]:
        head, *hunks = re.split(r'^@@.*\n', part, flags=re.M)
        path = f'{target}/{head.split()[1].removeprefix("b/")}'
        with open(path, encoding='utf-8') as f:
            text = f.read()
        for hunk in hunks:
            lines = [line or ' ' for line in hunk.splitlines()]
            old, new = (''.join(line[1:] + '\n' for line in lines if line[0] in kind) for kind in (' -', ' +'))
            if text.count(old) != 1:
                raise SystemExit(f'{path}: these lines of the diff stand there {text.count(old)} times, not once: {old.strip()[:80]!r}...')
            text = text.replace(old, new)
        with open(path, 'w', encoding='utf-8') as f:
            f.write(text)


def run(out, script, words, diff=''):
    """out/code/script.py on a copy with the diff, unless it has been done with these words; {'log', 'eval'}: lines of its two files."""
    done, words = f'{out}/done.json', [*words, f'--out_dir={out}/run']
    said = json.dumps([script, words, diff])
    if not os.path.exists(done) or open(done).read() != said:
        shutil.rmtree(out, ignore_errors=True)
        copy(f'{out}/code')
        apply(diff, f'{out}/code')
        if subprocess.run([sys.executable, f'{out}/code/{script}.py', *words], cwd=ROOT).returncode:
            raise SystemExit(f'{out}: the run above failed')
        with open(done, 'w') as f:
            f.write(said)
    lines = {}
    for kind in ('log', 'eval'):
        with open(f'{out}/run/{kind}.jsonl') as f:
            lines[kind] = [json.loads(line) for line in f]
    return lines


def both(name, fork, demo, words):
    """-> the unchanged run and the fork's."""
    script = fork['script']
    words = [f'--init_from={demo}/{BEFORE[script]}', *WORDS[script], *fork['words'], *words]
    plain = '-'.join([script, *(re.sub(r'\W+', '', w) for w in fork['words'])])
    return run(f'{ROOT}/out/forks/unchanged-{plain}', script, words), run(f'{ROOT}/out/forks/{name}', script, words, fork['diff'])


def draw(panels, path, columns):
    """PNG of panels (title, curve, unchanged, fork), the unchanged run in gray."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    rows = -(-len(panels) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(2.2 * columns, 1.9 * rows), squeeze=False)
    for ax in axes.flat[len(panels):]:
        ax.axis('off')
    for ax, (title, curve, *runs) in zip(axes.flat, panels):
        kind, field = curve.split('.')
        for lines, style in zip(runs, (dict(color='0.6', label='unchanged'), dict(color='C3', label='fork'))):
            ax.plot([line['step'] for line in lines[kind]], [line[field] for line in lines[kind]], lw=1.3, **style)
        ax.set_title(f'{title}\n{field}' if title else field, fontsize=8)
        ax.tick_params(labelsize=7)
        if field == 'logp_diff':
            ax.set_yscale('log')
    axes[0, 0].legend(fontsize=7)
    for ax in axes[-1]:
        ax.set_xlabel('updates', fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=80)
    plt.close(fig)


def last(lines):
    """One line of what a run came to: the end of eval.jsonl, and of what the log says about the policy the mean over the run."""
    shown = {k: v for k, v in lines['eval'][-1].items() if k in ('reward', 'judge', 'caption_len', 't2i_own', 't2i_true', 'greedy_caption_recall') or k in (
        'caption_truth', 'caption_recall')}
    return ' '.join(f'{k} {v:.3f}' for k, v in shown.items())


def main(argv):
    known, words = forks(), [w for w in argv if w.startswith('--') and '=' in w]
    demo = next((w.split('=', 1)[1] for w in words if w.startswith('--demo=')), 'out/demo')
    words = [w for w in words if not w.startswith('--demo=')]
    names = [w for w in argv if w not in words and not w.startswith('--demo=')]
    if names == ['--all']:
        names, picture = [n for n in known if known[n]['ablation']], 'ablations'
    elif len(names) == 1 and names[0] in known:
        picture = names[0]
    else:
        return print('\n'.join(f'{n:14s} {fork["title"]}' for n, fork in known.items()))
    panels = []
    for name in names:
        fork = known[name]
        plain, changed = both(name, fork, demo, words)
        print(f'{name:14s} unchanged {last(plain)}\n{name:14s} fork      {last(changed)}')
        panels += [(name if len(names) > 1 else '', curve, plain, changed) for curve in (fork['curves'][:1] if len(names) > 1 else fork['curves'])]
    draw(panels, f'{ROOT}/out/forks/{picture}.png', 5 if len(names) > 1 else len(panels))
    print(f'out/forks/{picture}.png')


if __name__ == '__main__':
    main(sys.argv[1:])
