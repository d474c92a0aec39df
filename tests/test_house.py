"""How the repository is kept: 100 columns, 550 lines a file, 60 a function, imports in one
direction,
and the names of a family of models in the one file that drives it."""
import ast
import graphlib
import os
import re
import subprocess

import pytest

from conftest import ROOT

COLUMNS = 100
LINES = 550
FUNCTION = 60
MAY_BE_LONG = ('data/shapes/', 'tests/')
# what a stage reads, and what it may not import; the last three are doors to bench/ and tools/
CORE = re.compile(r'(lib/)?\w+\.py')
DOORS = ('eval_unified.py', 'eval_t2i.py', 'sample.py')
BESIDE = ('bench', 'tools', 'docs', 'tests')
# what a model's classes and fields are called -> the file that knows it
FAMILIES = {
    r'Qwen2_|text_config|vision_config|image_token_id|image_grid_thw|get_rope_index': 'encoder.py',
    r'SD3|StableDiffusion|AutoencoderKL|joint_attention_dim|pooled_proj|CLIPText': 'decoder.py'}
FENCE = ('```', '~~~')
# a list's or a reference's mark and then one word with a URL in it, which nothing can break
LONE_URL = re.compile(r'\s*([-*>]|\d+\.|\[[^]]+\]:)?\s*\S*https?://\S+')


def read(root, file):
    with open(os.path.join(root, file), encoding='utf-8') as f:
        return f.read()


# --- lines ----------------------------------------------------------------------------------------
def prose(text):
    """(number, line) of Markdown without tables, code blocks and lines of one URL."""
    fenced = indented = False
    before = ''
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip().startswith(FENCE):
            fenced = not fenced
            continue
        indented = line.startswith(('    ', '\t')) and (indented or not before.strip())
        before = line
        table = line.lstrip().startswith('|')
        if not (fenced or indented or table or LONE_URL.fullmatch(line)):
            yield number, line


def wide_lines(root, files):
    """file:number of every line that is too wide."""
    found = []
    for file in files:
        if file.endswith('.md'):
            lines = prose(read(root, file))
        elif file.endswith('.py') or os.path.basename(file) == 'Makefile':
            lines = enumerate(read(root, file).splitlines(), 1)
        else:
            continue
        found += [f'{file}:{number}' for number, line in lines if len(line) > COLUMNS]
    return found


def long_files(root, files):
    """Python files with too many lines."""
    found = []
    for file in files:
        if file.endswith('.py') and not file.startswith(MAY_BE_LONG):
            if len(read(root, file).splitlines()) > LINES:
                found.append(file)
    return found


def long_functions(root, files):
    """file: name of every function that is too long; of a `main` its loop counts."""
    found = []
    for file in files:
        if not file.endswith('.py') or file.startswith(MAY_BE_LONG):
            continue
        for node in ast.walk(ast.parse(read(root, file))):
            if not isinstance(node, ast.FunctionDef):
                continue
            parts = [node]
            if node.name == 'main':
                parts = [part for part in node.body if isinstance(part, ast.For)]
            for part in parts:
                if part.end_lineno - part.lineno >= FUNCTION:
                    found.append(f'{file}: {node.name}')
    return found


# --- imports --------------------------------------------------------------------------------------
def first_text(node):
    """What a string, or an f-string up to its first value, says; else ''."""
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.rstrip('.')
    return ''


def imported_names(root, file):
    """Dotted names that a file imports, anywhere in it, and what may be modules in packages."""
    package = os.path.dirname(file).split('/')
    for node in ast.walk(ast.parse(read(root, file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = [node.module] if node.module else []
            if node.level:
                origin = package[:len(package) - node.level + 1] + origin
            yield '.'.join(origin)
            yield from ('.'.join([*origin, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
            if called in ('import_module', '__import__'):
                yield first_text(node.args[0])


def files_of(name, importer, files):
    """The files that run when `importer` imports a name: packages on the way, and the module.

    Names are looked up from the root, then beside the importer, as Python does with a script.
    """
    for base in ('', os.path.dirname(importer) + '/'):
        found = []
        path = base.rstrip('/')
        for part in name.split('.'):
            path = f'{path}/{part}'.lstrip('/')
            found += [file for file in (f'{path}/__init__.py', f'{path}.py') if file in files]
        if found:
            return found
    return []


def import_graph(root, files):
    """{Python file: the others of them that it imports}."""
    python = {file for file in files if file.endswith('.py')}
    graph = {}
    for file in sorted(python):
        graph[file] = set()
        for name in imported_names(root, file):
            graph[file].update(files_of(name, file, python))
        graph[file].discard(file)
    return graph


def cycle(graph):
    """Files that import each other in a ring, or an empty list."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def imports_from(folders, root, files, importers):
    """'importer: name' wherever one of them imports from one of the folders."""
    found = []
    for file in importers:
        for name in imported_names(root, file):
            places = {name.split('.')[0]}
            places.update(target.split('/')[0] for target in files_of(name, file, files))
            if places & set(folders):
                found.append(f'{file}: {name}')
    return found


def outside_tests(files):
    return [file for file in files if file.endswith('.py') and not file.startswith('tests/')]


def code_of(root, file):
    """A Python file without its comments and docstrings."""
    return ast.unparse(without_docstrings(ast.parse(read(root, file))))


def without_docstrings(tree):
    for node in ast.walk(tree):
        body = getattr(node, 'body', None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            body[0] = ast.Pass()
    return tree


# --- the repository -------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def files():
    """What git tracks, as it stands in the working tree."""
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip('not a git repository: nothing says which files are its own')
    names = listed.stdout.split('\0')
    return [name for name in names if os.path.isfile(os.path.join(ROOT, name))]


def test_lines_have_at_most_100_columns(files):
    assert not wide_lines(ROOT, files)


def test_files_and_functions_are_not_long(files):
    assert not long_files(ROOT, files)
    assert not long_functions(ROOT, files)


def test_nothing_is_left_to_do(files):
    for file in outside_tests(files):
        assert not re.search(r'\b(TODO|FIXME|XXX)\b', read(ROOT, file)), file


def test_imports_go_in_one_direction(files):
    """No ring, the imports inside functions included."""
    graph = import_graph(ROOT, files)
    assert graph['tests/test_house.py'] == {'tests/conftest.py'}
    assert not cycle(graph)


def test_nothing_outside_tests_imports_from_tests(files):
    assert not imports_from(['tests'], ROOT, files, outside_tests(files))


def test_what_a_stage_reads_imports_nothing_of_what_lies_beside_it(files):
    core = [file for file in files if CORE.fullmatch(file) and file not in DOORS]
    assert {'grpo_encoder.py', 'encoder.py', 'lib/checkpoint.py'} <= set(core)
    assert not imports_from(BESIDE, ROOT, files, core)


@pytest.mark.parametrize('names, home', FAMILIES.items(), ids=FAMILIES.values())
def test_a_family_of_models_is_known_to_one_file(files, names, home):
    """What a stage imports knows neither Qwen's names nor SD3's: another takes another class."""
    core = [file for file in files if CORE.fullmatch(file) and file != home]
    core.append('tools/export.py')
    known = [file for file in core if re.search(names, code_of(ROOT, file))]
    assert not known
    assert re.search(names, code_of(ROOT, home))


# --- the rules themselves -------------------------------------------------------------------------
def plant(root, file, text):
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return file


WIDE = 'x' * 101
MARKDOWN = f'''fits
{WIDE}
| {WIDE} |
- https://example.org/{WIDE}
see https://example.org/{WIDE}

    {WIDE}
```
{WIDE}
```
- item
    {WIDE}
'''


def test_wide_lines_and_long_files_and_functions_are_seen(tmp_path):
    function = 'def long():\n' + '    pass\n' * 60
    files = [
        plant(tmp_path, 'a.py', f'"{WIDE}"\n"{WIDE[3:]}"\n'),
        plant(tmp_path, 'Makefile', f'all:\n\t{WIDE}\n'),
        plant(tmp_path, 'docs/a.md', MARKDOWN),
        plant(tmp_path, 'data/table.json', WIDE),
        plant(tmp_path, 'b.py', '\n' * 551),
        plant(tmp_path, 'c.py', '\n' * 550),
        plant(tmp_path, 'd.py', function + function.replace('    pass\n', '', 1)),
        plant(tmp_path, 'tests/b.py', '\n' * 551),
        plant(tmp_path, 'data/shapes/b.py', '\n' * 551),
    ]
    expected = ['a.py:1', 'Makefile:2', 'docs/a.md:2', 'docs/a.md:5', 'docs/a.md:12']
    assert wide_lines(tmp_path, files) == expected
    assert long_files(tmp_path, files) == ['b.py']
    assert long_functions(tmp_path, files) == ['d.py: long']


@pytest.mark.parametrize('back', [
    'import a',
    'def late():\n    from a import name',
    'def late():\n    import_module("a")',
])
def test_rings_are_seen(tmp_path, back):
    """Also through a package, and through an import inside a function."""
    files = [
        plant(tmp_path, 'a.py', 'from package import b'),
        plant(tmp_path, 'package/__init__.py', ''),
        plant(tmp_path, 'package/b.py', 'from . import c'),
        plant(tmp_path, 'package/c.py', back),
        plant(tmp_path, 'tests/other.py', 'import a'),
    ]
    ring = set(cycle(import_graph(tmp_path, files)))
    assert ring == {'a.py', 'package/b.py', 'package/c.py'}
    plant(tmp_path, 'package/c.py', 'import os')
    assert not cycle(import_graph(tmp_path, files))


@pytest.mark.parametrize('line, count', [
    ('import tests.running', 1),
    ('from tests import running', 2),
    ('from tests.peers.flow import step', 2),
    ('import_module(f"tests.peers.{name}")', 1),
    ('import testing', 0),
])
def test_imports_from_tests_are_seen(tmp_path, line, count):
    files = [
        plant(tmp_path, 'a.py', f'def late():\n    {line}\n'),
        plant(tmp_path, 'testing.py', ''),
        plant(tmp_path, 'tests/running.py', 'import a'),
        plant(tmp_path, 'tests/test_a.py', line),
    ]
    assert len(imports_from(['tests'], tmp_path, files, outside_tests(files))) == count
