"""Every exercise's stub and wrong answers fail at its grader, and the restored code passes.

Every fork's edits apply and run. One process imports the libraries, which takes long, and forks
for each of the runs; only the children import the project's modules, from a copy of it:
`python tests/test_exercises.py COPY`.
"""
import gc
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGES = f'{ROOT}/docs/exercises'
CODE = ('', 'lib', 'data', 'data/shapes', 'bench', 'tools')
TINY = (
    '--steps=2', '--batch=2', '--denoise_steps=4', '--eval_every=0', '--eval_images=2',
    '--data=../../pictures', '--device=cpu')


def module_of(name, root=ROOT):
    """docs/exercises/NAME.py of a copy of the repository."""
    path = f'{root}/docs/exercises/{name}.py'
    spec = importlib.util.spec_from_file_location(name, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def page_of(name):
    with open(f'{PAGES}/{name}', encoding='utf-8') as f:
        return f.read()


def commands():
    """{fork: (script, its options, whether it is an ablation)}, as ablations.md has them."""
    found = {}
    *_, ablations, mistakes = page_of('ablations.md').split('\n# ')
    for part, is_ablation in ((ablations, True), (mistakes, False)):
        for entry in re.split(r'^### ', part, flags=re.M)[1:]:
            name = entry.split(':')[0]
            script, options = re.search(r'`(grpo_\w+)\.py([^`]*)`', entry).groups()
            found[name] = (script, tuple(options.split()), is_ablation)
    return found


EXERCISES = module_of('blank').EXERCISES
FORKS = module_of('ablations').FORKS
COMMANDS = commands()


def unchanged(name):
    """The name of the run that a fork is laid beside."""
    script, options, _ = COMMANDS[name]
    return '-'.join([script, *options])


# --- the process that forks -----------------------------------------------------------------------
def child(call):
    """[exit code, the end of the output] of call() in a forked process."""
    pid = os.fork()
    if not pid:
        code = 70
        try:
            with open('output.txt', 'wb') as f:
                os.dup2(f.fileno(), 1)
                os.dup2(f.fileno(), 2)
            code = int(call() or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    with open('output.txt', errors='replace') as f:
        output = f.read()[-2000:]
    return [os.waitstatus_to_exitcode(status), output]


def script(name, root, argv):
    """root/name.py with its own modules."""
    torch.set_num_threads(1)        # makes the pool anew after a fork; loaders' threads would race
    os.chdir(root)
    sys.path.insert(0, root)
    sys.argv = [name, *argv]
    runpy.run_path(f'{root}/{name}.py', run_name='__main__')


def import_libraries():
    import diffusers.models.autoencoders.autoencoder_kl  # noqa: F401
    import diffusers.models.transformers.transformer_sd3  # noqa: F401
    import open_clip  # noqa: F401
    import torchvision.transforms  # noqa: F401
    import transformers
    import transformers.models.convnext.modeling_convnext  # noqa: F401
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401
    # what the library works out once a process
    encoder = 'data/shapes/base/encoder'
    transformers.AutoProcessor.from_pretrained(encoder)
    transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(encoder)
    gc.freeze()                                  # a child's collector need not look at these


def graded(exercises, names):
    """pytest of some exercises' graders, in a child."""
    tests = []
    for name in names:
        tests += [f'tests/{test}' for test in exercises[name]['grader']]
    options = ['-x', '-q', '-p', 'no:cacheprovider', '--assert=plain']
    return child(lambda: pytest.main([*options, *tests]))


def run_exercises(root, results):
    blank = module_of('blank', root)
    for name in blank.EXERCISES:
        for variant in range(4):
            blank.exchange(name, variant)
            results[f'{name} {variant}'] = graded(blank.EXERCISES, [name])
        blank.exchange(name)
    results['restored'] = graded(blank.EXERCISES, list(blank.EXERCISES))


def run_forks(root, results):
    os.makedirs('pictures')
    for i in range(6):
        picture = Image.linear_gradient('L').rotate(60 * i).convert('RGB').resize((32, 32))
        picture.save(f'pictures/{i}.png')
    runs = {name: (name, True) for name in FORKS}
    runs.update({unchanged(name): (name, False) for name in FORKS})
    for run, (name, edited) in runs.items():
        stage, options, _ = COMMANDS[name]
        folder = copy(f'{root}/forks/{run}')
        if edited:
            module_of('ablations').exchange(name, root=Path(folder))
        argv = [*options, *TINY, '--out_dir=run']
        if stage == 'grpo_decoder':
            argv.append('--group=4')
        results[f'fork {run}'] = child(lambda: script(stage, folder, argv))


def driver(root):
    """Writes root/results.json: {run: [exit code, output]}."""
    sys.dont_write_bytecode = True               # a wrong answer may be as long as the right one
    os.chdir(root)
    import_libraries()
    results = {}
    run_exercises(root, results)
    run_forks(root, results)
    with open('results.json', 'w') as f:
        json.dump(results, f)


def copy(target, *folders):
    """The repository's Python files at `target`, models and images by reference.

    `folders` are copied whole.
    """
    for folder in CODE:
        os.makedirs(f'{target}/{folder}', exist_ok=True)
        for name in os.listdir(f'{ROOT}/{folder}'):
            if name.endswith('.py'):
                shutil.copy(f'{ROOT}/{folder}/{name}', f'{target}/{folder}/{name}')
    shutil.copy(f'{ROOT}/requirements.txt', target)
    for name in ('base', 'images'):
        if os.path.exists(f'{ROOT}/data/shapes/{name}'):
            os.symlink(f'{ROOT}/data/shapes/{name}', f'{target}/data/shapes/{name}')
    for folder in folders:
        ignore = shutil.ignore_patterns('__pycache__')
        shutil.copytree(f'{ROOT}/{folder}', f'{target}/{folder}', ignore=ignore)
    return target


def sources(root):
    return {path.relative_to(root): path.read_bytes() for path in root.glob('*.py')}


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    root = copy(tmp_path_factory.mktemp('copy'), 'tests', 'docs/exercises')
    before = sources(root)
    env = dict(
        os.environ, OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', CUDA_VISIBLE_DEVICES='',
        PYTHONPATH='', PYTEST_DISABLE_PLUGIN_AUTOLOAD='1')
    command = [sys.executable, f'{root}/tests/test_exercises.py', root]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert sources(root) == before, 'restored to the byte'
    return dict(json.loads((root / 'results.json').read_text()), root=root)


# --- exercises ------------------------------------------------------------------------------------
@pytest.mark.parametrize('variant', range(4), ids=['stub', 'wrong1', 'wrong2', 'wrong3'])
@pytest.mark.parametrize('name', EXERCISES)
def test_the_grader_fails_what_is_wrong(results, name, variant):
    code, output = results[f'{name} {variant}']
    failed = code == 1 and ' failed' in output
    assert failed or ' error' in output, f'pytest {code}: {output}'
    assert ('NotImplementedError' in output) == (variant == 0)


def test_the_graders_pass_the_restored_code(results):
    code, output = results['restored']
    assert code == 0, output
    assert ' passed' in output, output


@pytest.mark.parametrize('name', EXERCISES)
def test_each_wrong_answer_is_made_from_the_code_as_it_stands(name):
    blank = module_of('blank')
    original = {where: blank.split(where)[1] for where in EXERCISES[name]['where']}
    bodies = [original, *blank.variants(name, original)]
    for i, body in enumerate(bodies):
        assert body not in bodies[:i]


def test_ten_exercises_each_with_its_hand_out():
    parts = page_of('README.md').split('\n## ')[1:]
    sections = dict(part.split('\n', 1) for part in parts)
    assert [section for section in sections if section in EXERCISES] == list(EXERCISES)
    assert len(EXERCISES) == 10
    for name, exercise in EXERCISES.items():
        assert len(exercise['wrong']) == 3
        for word in ('Shapes.', 'Hint.', 'Plot.'):
            assert f'**{word}**' in sections[name], name
        for where in exercise['where']:
            file, function = where.split(':')
            assert f'`{function}`' in sections[name], name
            assert file in sections[name], name


@pytest.fixture
def blank(tmp_path):
    return module_of('blank', copy(tmp_path, 'docs/exercises'))


NOTE = '\nNOTE = 1\n'                            # another edit of the student's, in the same file
OPTIONS = (['--wrong=1'], [], ['--restore'])


def test_a_stub_keeps_signature_and_docstring_and_an_answer_is_not_lost(blank, capsys):
    path = f'{blank.ROOT}/decoder.py'
    original = blank.read('decoder.py')
    body = blank.split('decoder.py:sde_step')[1]
    blank.main(['sde_step'])
    assert 'tests/test_sde.py::' in capsys.readouterr().out
    before, stub, after = blank.split('decoder.py:sde_step')
    assert before + body + after == original
    assert before.rstrip().endswith('"""')
    assert stub.startswith('    raise NotImplementedError(')
    assert stub.count('\n') == 1
    with open(path, 'a') as f:
        f.write(NOTE)
    for n, options in enumerate(OPTIONS, 1):     # an answer is kept whatever comes next
        mine = f'    return z, v, s, s_next      # mine {n}\n'
        blank.write('decoder.py', before + mine + after + NOTE)
        blank.main(['sde_step', *options])
        said = capsys.readouterr().out.splitlines()[0]
        assert f'# mine {n}' in blank.read(said.split()[-1])
    assert blank.read('decoder.py') == original + NOTE
    for options in OPTIONS:                      # nobody's answer is in between
        blank.main(['sde_step', *options])
        assert 'kept' not in capsys.readouterr().out
    assert blank.read('decoder.py') == original + NOTE
    assert len(os.listdir(f'{blank.ROOT}/{blank.KEPT}')) == 3


@pytest.mark.parametrize('argv, said', [
    (['sde'], 'sde_step'),
    (['sde_step', '--wrong=4'], '--wrong=3'),
    (['sde_step', '--restore'], 'not blank'),
])
def test_what_cannot_be_done_is_one_line(blank, argv, said):
    with pytest.raises(SystemExit) as stop:
        blank.main(argv)
    assert said in stop.value.code
    assert '\n' not in stop.value.code


def test_a_file_that_does_not_parse_or_is_not_the_original_is_left_alone(blank):
    blank.main(['kl_k3'])
    stub = '    raise NotImplementedError'
    cases = (('    raise (', 'grpo_encoder.py, line'), ('    return 0 #', 'not the original'))
    for planted, said in cases:
        broken = blank.read('grpo_encoder.py').replace(stub, planted)
        blank.write('grpo_encoder.py', broken)
        if 'return' in planted:
            os.remove(f'{blank.ROOT}/{blank.KEPT}/kl_k3.json')
        with pytest.raises(SystemExit, match=said):
            blank.main(['kl_k3', '--wrong=1'])
        assert blank.read('grpo_encoder.py') == broken
        blank.write('grpo_encoder.py', broken.replace(planted, stub))


# --- forks ----------------------------------------------------------------------------------------
def log_of(root, run):
    """The log of a fork's run without its clock and memory."""
    rows = []
    with open(root / 'forks' / run / 'run' / 'log.jsonl') as f:
        for line in f:
            row = json.loads(line)
            del row['sec'], row['peak_gb']
            rows.append(row)
    return rows


@pytest.mark.parametrize('name', FORKS)
def test_a_fork_applies_and_runs_and_is_another_run(results, name):
    logs = []
    for run in (name, unchanged(name)):
        code, output = results[f'fork {run}']
        assert code == 0, output
        logs.append(log_of(results['root'], run))
        assert [row['step'] for row in logs[-1]] == [0, 1]
        for row in logs[-1]:
            assert all(abs(value) < 1e4 for value in row.values())
    assert logs[0] != logs[1], 'the edits have an effect'
    off_policy = logs[0][0]['logp_diff'] > 1e-3
    assert off_policy == (name == 'bf16'), 'all but one are on policy at first'


def test_ablations_of_at_most_ten_lines():
    assert set(COMMANDS) == set(FORKS)
    assert sum(is_ablation for _, _, is_ablation in COMMANDS.values()) == 11
    describe = module_of('ablations').describe
    for name in FORKS:
        changed = [line for line in describe(name).splitlines() if line[0] in '+-']
        assert 1 <= len(changed) <= 10, name


def test_the_page_shows_the_edits_as_the_code_stands():
    text = page_of('ablations.md')
    assert module_of('ablations').page(text) == text, 'python docs/exercises/ablations.py --write'


def test_a_fork_is_taken_back_to_the_byte(tmp_path):
    root = Path(copy(tmp_path))
    exchange = module_of('ablations').exchange
    before = sources(root)
    for name in FORKS:
        exchange(name, root=root)
        assert sources(root) != before
        with pytest.raises(SystemExit, match='expects'):
            exchange(name, root=root)
        exchange(name, undo=True, root=root)
        assert sources(root) == before, name


if __name__ == '__main__':
    driver(sys.argv[1])
