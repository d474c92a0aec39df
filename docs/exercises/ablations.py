"""Eleven ablations and three mistakes, each a fork: a few named edits to one file of the project.

    python docs/exercises/ablations.py                  # the forks, and what each changes
    python docs/exercises/ablations.py length           # makes the edits in the working tree
    python docs/exercises/ablations.py length --undo    # takes them back
    python docs/exercises/ablations.py --write          # writes the edits anew into ablations.md

An edit says: in this file, this text becomes that one. The text has to be there exactly once.
"""
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = 'docs/exercises/ablations.md'

ADVANTAGE = 'group_advantage(r, config.adv_std)'
IMAGE = '''        return by_rows(lambda part: self.vae.decode(part).sample.float(),
                       self.config.micro_batch, z.to(self.vae.dtype))
'''

# name -> [(file, old text, new text)]
FORKS = dict(
    dr_grpo=[
        ('grpo_encoder.py', 'adv_std = True, ', 'adv_std = False,'),
        ('grpo_encoder.py', "loss_mean = 'token',   ", "loss_mean = 'constant',")],
    no_std=[
        ('grpo_encoder.py', 'adv_std = True, ', 'adv_std = False,')],
    no_clip=[
        ('grpo_encoder.py', 'clip_range = (0.2, 0.2),', 'clip_range = (1e9, 1e9),')],
    no_kl=[
        ('grpo_encoder.py', '    kl = 0.03, ', '    kl = 0.0,  ')],
    live=[
        ('grpo_encoder.py', "text_encoder = 'start',", "text_encoder = 'live', ")],
    judge=[
        ('config.py', "reward = 'clip', ", "reward = 'judge',")],
    length=[
        ('grpo_encoder.py', 'r.view(P, G), vision',
         '(r - 0.02 * mask.sum(1)).view(P, G), vision')],
    answer=[
        ('config.py', "condition = 'text',  ", "condition = 'answer',")],
    g2=[
        ('grpo_encoder.py', 'batch = 8, ', 'batch = 32,'),
        ('grpo_encoder.py', 'group = 8,', 'group = 2,')],
    cps=[
        ('grpo_decoder.py', "sde = 'flow',     ", "sde = 'cps_exact',"),
        ('grpo_decoder.py', 'noise_level = 0.7,', 'noise_level = 0.8,')],
    projector=[
        ('grpo_decoder.py', 'return dict(path, c=c, z_0=z_0)',
         'y_of, mask_of = y.repeat_interleave(G, 0), mask.repeat_interleave(G, 0)\n'
         '    return dict(path, y=y_of, mask=mask_of, c=c, z_0=z_0)'),
        ('grpo_decoder.py', "c=part['c'],",
         "\n                                  c=uae.condition(part['y'], part['mask']),"),
        ('grpo_decoder.py', "train_only('decoder')", "train_only('decoder', 'projector')")],
    blind=[
        ('decoder.py', IMAGE,
         IMAGE.replace('return', 'x_hat =')
         + '        return x_hat[:, :1].expand(-1, 3, -1, -1)\n')],
    axis=[
        ('grpo_encoder.py', 'r.view(P, G), vision', 'r.view(G, P).T, vision'),
        ('grpo_encoder.py', f'{ADVANTAGE}.flatten()', f'{ADVANTAGE}.T.flatten()')],
    bf16=[
        ('grpo_encoder.py', '@torch.no_grad()\ndef rollout(',
         "@torch.autocast('cpu', torch.bfloat16)\n@torch.no_grad()\ndef rollout(")],
)


def exchange(name, undo=False, root=ROOT):
    """Makes a fork's edits below `root`, or takes them back. Nothing is written if one fails."""
    texts = {}
    for file, old, new in FORKS[name]:
        text = texts.get(file) or (root / file).read_text(encoding='utf-8')
        if undo:
            old, new = new, old
        elif new in text:
            raise SystemExit(f'{name}: {file} has this edit already, which expects the original')
        if text.count(old) != 1:
            raise SystemExit(f'{name}: {file} holds {text.count(old)} times what the edit expects '
                             f'once: {old.strip().splitlines()[0]!r}')
        texts[file] = text.replace(old, new)
    for file, text in texts.items():
        beside = root / f'{file}.new'
        beside.write_text(text, encoding='utf-8')
        os.replace(beside, root / file)             # a kill leaves the old file or the new one


def whole_lines(text, part, start):
    """The lines of a text that its part from `start` on touches."""
    first = text.rfind('\n', 0, start) + 1
    end = start + len(part.rstrip('\n'))
    last = text.find('\n', end)
    return text[first:last].split('\n')


def describe(name, root=ROOT):
    """A fork's edits as the lines that go (-) and come (+), by file."""
    shown, file = [], None
    for path, old, new in FORKS[name]:
        before = (root / path).read_text(encoding='utf-8')
        start = before.index(old)
        after = before[:start] + new + before[start + len(old):]
        gone = whole_lines(before, old, start)
        come = whole_lines(after, new, start)
        if path != file:
            shown.append(f'{path}:')
            file = path
        shown += [f'-{line}' for line in gone if line not in come]
        shown += [f'+{line}' for line in come if line not in gone]
    return '\n'.join(shown)


def page(text):
    """ablations.md with every fork's diff block as the code stands now."""
    for name in FORKS:
        block = re.compile(rf'(^### {name}:.*?^```diff\n).*?(^```$)', re.S | re.M)
        diff = describe(name)
        text, found = block.subn(lambda match: f'{match[1]}{diff}\n{match[2]}', text, count=1)
        if not found:
            raise SystemExit(f'{PAGE}: no entry ### {name}: with a diff block')
    return text


def main(argv):
    if argv == ['--write']:
        path = ROOT / PAGE
        path.write_text(page(path.read_text(encoding='utf-8')), encoding='utf-8')
        return
    if not argv or argv == ['--help']:
        print(__doc__)
        for name in FORKS:
            print(f'{name}\n{describe(name)}\n')
        return
    name = argv[0]
    if name not in FORKS or argv[1:] not in ([], ['--undo']):
        raise SystemExit(f'expected one of {" ".join(FORKS)}, and nothing or --undo after it')
    undo = argv[1:] == ['--undo']
    if not undo:
        print(describe(name))
    exchange(name, undo)


if __name__ == '__main__':
    main(sys.argv[1:])
