"""docs/paper_map.md both ways: what it names exists, and the method's functions stand in it."""
import ast
import os
import re
from pathlib import Path

import pytest

from conftest import ROOT

# scripts of the root whose functions are no method
BESIDE = ('config.py', 'eval_unified.py', 'eval_t2i.py', 'sample.py')
FILES = sorted(path.name for path in Path(ROOT).glob('*.py') if path.name not in BESIDE)
# what no symbol of the paper stands for: the loop, batches, tokens <-> strings, precision,
# devices, disk
PLUMBING = {
    'main', 'open_captioned', 'check_edits', 'backbone', 'Encoder', 'Decoder', 'UAE.pad',
    'UAE.device', 'UAE.forward', 'UAE.recompute_activations', 'Encoder.texts', 'Encoder.tokens',
    'Encoder.autocast', 'Decoder.autocast', 'Decoder.latent_shape', 'Decoder.compile_blocks',
}
# of the paper's method section, in the letters of the code
SYMBOLS = (
    'y ~ pi_phi(',
    'log pi_phi(y_t',
    'pi_phi_old',
    'pi_ref',
    'h_T',
    'c = g(h_T)',
    'c = {c_text, c_img}',
    'x_hat ~ p_theta(',
    'f_I',
    'R_i = cos(f_I(x), f_I(x_hat_i))',
    'A_i = (R_i - mean R) / std R',
    'L = 1 - cos(f_I(x), f_I(x_hat))',
    'ratio_t = pi_phi',
    'ratio_s = p_theta',
    'clip(ratio',
    'J =',
    'KL(pi_phi',
    'KL(p_theta',
    '1/G sum_i 1/len(y_i) sum_t',
    'N(mean_theta',
)


def functions(file):
    """Top-level functions and classes of a file, and its classes' methods as Class.method."""
    with open(os.path.join(ROOT, file), encoding='utf-8') as f:
        tree = ast.parse(f.read())
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    yield f'{node.name}.{method.name}'


def of_the_method(file):
    """Functions and classes of a file that the map owes a row, by rule.

    All but plumbing; of the classes' methods UAE's alone.
    """
    found = set()
    for name in functions(file):
        owed = '.' not in name or name.startswith('UAE.')
        if owed and name not in PLUMBING and not name.endswith('.__init__'):
            found.add(name)
    return found


def cells_of(line):
    return [cell.strip() for cell in line.strip().strip('|').split('|')]


def in_backticks(cell):
    return re.findall(r'`([^`]+)`', cell)


def rows(text):
    """The table's rows: (symbol, files, functions)."""
    header, rule, *body = [cells_of(line) for line in text.splitlines() if line.startswith('|')]
    assert header == ['paper', 'symbol', 'file', 'function']
    assert set(rule) == {'---'}
    assert all(len(row) == 4 and all(row) for row in body), 'an empty cell, or a | in one'
    return [(symbol, in_backticks(files), in_backticks(names)) for _, symbol, files, names in body]


@pytest.fixture(scope='module')
def table():
    with open(os.path.join(ROOT, 'docs/paper_map.md'), encoding='utf-8') as f:
        return rows(f.read())


def named_in(table, files):
    """Functions that the table names in one of these files."""
    return {name for _, where, names in table if set(where) & set(files) for name in names}


def test_every_function_named_exists(table):
    assert len(table) > 10
    for symbol, files, names in table:
        assert files and names, f'{symbol}: file and function stand in backticks'
        missing = set(names).difference(*(functions(file) for file in files))
        assert not missing, f'{symbol}: no {missing} in {files}'


@pytest.mark.parametrize('file', FILES)
def test_every_function_of_the_method_is_in_the_map(table, file):
    missing = of_the_method(file) - named_in(table, [file])
    assert not missing, f'{file}: {sorted(missing)} has no row in docs/paper_map.md'


def test_plumbing_is_a_short_list_of_what_exists_and_is_not_mapped(table):
    assert len(PLUMBING) < 20
    assert PLUMBING <= {name for file in FILES for name in functions(file)}
    assert not PLUMBING & named_in(table, FILES)


def test_every_symbol_of_the_method_has_a_row(table):
    text = ' '.join(symbol for symbol, _, _ in table)
    assert not [symbol for symbol in SYMBOLS if symbol not in text]
