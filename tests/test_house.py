"""How the repository is kept: 100 columns, 550 lines a file, 60 a function, imports in one
direction, and the names of a family of models in the one file that drives it."""
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


def read(file):
    with open(os.path.join(ROOT, file), encoding='utf-8') as f:
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
        indented = line.startswith('    ') and (indented or not before.strip())
        before = line
        table = line.lstrip().startswith('|')
        if not (fenced or indented or table or LONE_URL.fullmatch(line)):
            yield number, line


def wide_lines(files):
    """file:number of every line that is too wide."""
    found = []
    for file in files:
        if file.endswith('.md'):
            lines = prose(read(file))
        elif file.endswith('.py') or file == 'Makefile':
            lines = enumerate(read(file).splitlines(), 1)
        else:
            continue
        found += [f'{file}:{number}' for number, line in lines if len(line) > COLUMNS]
    return found


def long_functions(file):
    """Names of the functions that are too long; of a `main` its loop counts."""
    for node in ast.walk(ast.parse(read(file))):
        if not isinstance(node, ast.FunctionDef):
            continue
        parts = [node]
        if node.name == 'main':
            parts = [part for part in node.body if isinstance(part, ast.For)]
        if any(part.end_lineno - part.lineno >= FUNCTION for part in parts):
            yield node.name


# --- imports --------------------------------------------------------------------------------------
def imported_names(file):
    """Dotted names that a file imports, anywhere in it, and what may be modules in packages."""
    for node in ast.walk(ast.parse(read(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{file}: a relative import, which these rules do not follow'
            yield node.module
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def import_graph(files):
    """{Python file: the others of them that it imports}.

    Names are looked up from the root, then beside the importer, as Python does with a script.
    """
    graph = {}
    for file in files:
        graph[file] = set()
        for name in imported_names(file):
            path = name.replace('.', '/') + '.py'
            beside = os.path.join(os.path.dirname(file), path)
            graph[file].update({path, beside} & set(files) - {file})
    return graph


def imports_from(folders, files):
    """'importer: name' wherever one of these files imports from one of the folders."""
    found = []
    for file in files:
        for name in imported_names(file):
            if name.split('.')[0] in folders:
                found.append(f'{file}: {name}')
    return found


def code_of(file):
    """A Python file without its comments and docstrings."""
    tree = ast.parse(read(file))
    for node in ast.walk(tree):
        body = getattr(node, 'body', None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            body[0] = ast.Pass()
    return ast.unparse(tree)


# --- the repository -------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def files():
    """What git tracks, as it stands in the working tree."""
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip('not a git repository: nothing says which files are its own')
    names = listed.stdout.split('\0')
    return [name for name in names if os.path.isfile(os.path.join(ROOT, name))]


@pytest.fixture(scope='module')
def code(files):
    return [file for file in files if file.endswith('.py')]


def test_lines_files_and_functions_are_not_long(files, code):
    assert not wide_lines(files)
    for file in code:
        if not file.startswith(MAY_BE_LONG):
            assert len(read(file).splitlines()) <= LINES, file
            assert not list(long_functions(file)), file


def test_nothing_is_left_to_do(code):
    for file in code:
        if not file.startswith('tests/'):
            assert not re.search(r'\b(TODO|FIXME|XXX)\b', read(file)), file


def test_imports_go_in_one_direction(code):
    """No ring, the imports inside functions included; and nothing imports from tests/."""
    graph = import_graph(code)
    assert graph['tests/test_house.py'] == {'tests/conftest.py'}
    graphlib.TopologicalSorter(graph).prepare()
    assert not imports_from(['tests'], [file for file in code if not file.startswith('tests/')])


def test_what_a_stage_reads_imports_nothing_of_what_lies_beside_it(code):
    core = [file for file in code if CORE.fullmatch(file) and file not in DOORS]
    assert {'grpo_encoder.py', 'encoder.py', 'lib/checkpoint.py'} <= set(core)
    assert not imports_from(BESIDE, core)


@pytest.mark.parametrize('names, home', FAMILIES.items(), ids=FAMILIES.values())
def test_a_family_of_models_is_known_to_one_file(code, names, home):
    """What a stage imports knows neither Qwen's names nor SD3's: another takes another class."""
    core = [file for file in code if CORE.fullmatch(file) and file != home]
    known = [file for file in [*core, 'tools/export.py'] if re.search(names, code_of(file))]
    assert not known
    assert re.search(names, code_of(home))


def test_prose_is_not_tables_code_or_an_address():
    wide = 'x' * 101
    lines = [wide, f'| {wide} |', f'- https://a.org/{wide}', f'see https://a.org/{wide}', '',
             f'    {wide}', '```', wide, '```', '- item', f'    {wide}']
    found = prose('\n'.join(lines))
    assert [number for number, line in found if len(line) > COLUMNS] == [1, 4, 11]
