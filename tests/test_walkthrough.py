"""walkthrough.ipynb: short, stored with its pictures, no helper of its own.

Run here cell by cell, without Jupyter, it shows what it says.
"""
import ast
import base64
import contextlib
import io
import json
import os
import re

import pytest
import torch
from PIL import Image

from conftest import ROOT
from reward import clip_reward

PATH = os.path.join(ROOT, 'docs', 'walkthrough.ipynb')
AGAIN = 'run it again: jupyter nbconvert --to notebook --execute --inplace docs/walkthrough.ipynb'
with open(PATH, encoding='utf-8') as f:
    CELLS = json.load(f)['cells']
CODE = [cell for cell in CELLS if cell['cell_type'] == 'code']
OUTPUTS = [out for cell in CODE for out in cell['outputs']]
STORED = ''.join(''.join(out['text']) for out in OUTPUTS if out['output_type'] == 'stream')


def source(cell):
    return ''.join(cell['source'])


def colours(png):
    with Image.open(png) as picture:
        return len(picture.convert('RGB').getcolors(1 << 24))


@pytest.fixture(scope='module')
def ran():
    """The notebook's names after all its cells; `printed`; `figures`, the colours of each."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    names, figures = {}, []

    def show():
        for number in plt.get_fignums():
            png = io.BytesIO()
            plt.figure(number).savefig(png)
            figures.append(colours(png))
        plt.close('all')

    printed, patches = io.StringIO(), pytest.MonkeyPatch.context()
    with patches as patch, plt.rc_context(), contextlib.redirect_stdout(printed):
        patch.setattr(plt, 'show', show)
        for i, cell in enumerate(CODE):
            code = compile(source(cell), f'walkthrough.ipynb, code cell {i + 1}', 'exec')
            exec(code, names)
    return dict(names, printed=printed.getvalue(), figures=figures)


# --- the file ------------------------------------------------------------------------------------
def test_short_and_stored_as_executed():
    assert len(CELLS) < 40
    assert [cell['execution_count'] for cell in CODE] == list(range(1, len(CODE) + 1)), AGAIN
    kinds = {out['output_type'] for out in OUTPUTS}
    assert kinds == {'stream', 'display_data'}, 'an error, or a value that nobody printed'
    assert all(cell['outputs'] for cell in CODE), 'a code cell that shows nothing'
    assert os.path.getsize(PATH) < 700_000


def test_nothing_of_the_machine_is_stored():
    for cell in CELLS:
        assert not cell['metadata']
        assert not any(out.get('metadata') for out in cell.get('outputs', []))
    assert all(out.get('name', 'stdout') == 'stdout' for out in OUTPUTS)
    text = STORED + ''.join(map(source, CELLS))
    assert not re.search(r'(^|[\s\'"=(])/\w+/\w+|[A-Z]:\\|\.venv|site-packages|0x[0-9a-f]{6}', text)


def test_no_helpers():
    tree = ast.parse('\n'.join(map(source, CODE)))
    imported = set()
    for node in ast.walk(tree):
        assert not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda))
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    assert imported == {
        'copy', 'math', 'os', 'sys', 'matplotlib.pyplot', 'torch', 'config', 'decoder', 'lib',
        'lib.checkpoint', 'grpo_decoder', 'grpo_encoder', 'data.shapes', 'reward'}


def test_the_papers_symbols_are_quoted():
    text = ''.join(source(cell) for cell in CELLS if cell['cell_type'] == 'markdown')
    for symbol in (
            'y ~ pi_phi(y | x)', 'c = g(h_T)', 'x_hat ~ p_theta(. | c)',
            'R_i = cos(f_I(x), f_I(x_hat_i))', 'A_i = (R_i - mean_j R_j)', 'pi_phi_old',
            'clip(ratio'):
        assert symbol in text, symbol


# --- the run -------------------------------------------------------------------------------------
def test_the_stored_pictures_and_words_are_those_of_this_code(ran):
    stored = []
    for out in OUTPUTS:
        if out['output_type'] == 'display_data':
            png = base64.b64decode(out['data']['image/png'])
            stored.append(colours(io.BytesIO(png)))
    assert len(stored) == len(ran['figures']) >= 10, AGAIN
    assert min(stored) > 20 and min(ran['figures']) > 20, 'a blank picture'
    for start in ('the truth:', 'y =', 'flow z_0'):
        line, = re.findall(f'^{start}.*$', ran['printed'], re.M)
        assert line in STORED, AGAIN
    first_words = [[line.split()[0] for line in text.splitlines()]
                   for text in (ran['printed'], STORED)]
    assert first_words[0] == first_words[1], AGAIN


def test_what_it_says_of_ratio_group_and_gradient_holds(ran):
    gaps = re.findall(r'\|logp - old_logp\|:? (?:<= )?(\S+)', ran['printed'])
    assert len(gaps) == 3 and max(map(float, gaps)) < 1e-5
    assert 'number of tokens): True' in ran['printed']
    assert ran['r'].std() > 0.05, 'a group that teaches nothing'
    shown_again = clip_reward(ran['x'].expand_as(ran['X_hat']), ran['X_hat'], ran['clip'])
    # the images shown are the images rewarded
    torch.testing.assert_close(shown_again, ran['r'][0], atol=1e-4, rtol=0)
    advantage, moved = ran['adv'][0], ran['moved']
    assert moved[advantage.argmax()] > 0 > moved[advantage.argmin()]
    assert not any(p.requires_grad for p in ran['uae'].parameters()), 'the step was on a copy'

