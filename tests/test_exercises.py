"""Every exercise's stub and wrong answers fail at its grader and the restored code passes; every fork's diff applies and runs.

One process imports the libraries, which takes long, and forks for each of the sixty runs; only the children import the project's modules,
from a copy of it: `python tests/test_exercises.py COPY`.
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

import pytest
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ('--steps=2', '--prompts=2', '--sample_steps=4', '--eval_every=0', '--eval_images=2', '--data=../../pictures', '--device=cpu')


def blank_of(root=ROOT):
    """exercises/blank.py of a copy of the repository."""
    spec = importlib.util.spec_from_file_location('blank', f'{root}/exercises/blank.py')
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def forks_of(root=ROOT):
    """{name: dict(ablation, script, words, text)} of ablations.md, where an entry is `### name: title`, text with a command, and a diff."""
    with open(f'{root}/exercises/ablations.md', encoding='utf-8') as f:
        parts = f.read().split('\n# ')
    found = {}
    for part, ablation in zip(parts[-2:], (True, False)):
        for entry in re.split(r'^### ', part, flags=re.M)[1:]:
            name = entry.split(':')[0]
            script, words = re.search(r'`(grpo_\w+)\.py([^`]*)`', entry).groups()
            found[name] = dict(ablation=ablation, script=script, words=words.split(), text=entry[:re.search(r'^```$', entry, re.M).end()] + '\n')
    return found


EXERCISES, FORKS = blank_of().EXERCISES, forks_of()
unchanged = '-'.join                             # (script, *words) -> the name of the run without a diff


# --- the process that forks ------------------------------------------------------------------------------------------
def child(call):
    """[exit code, the end of the output] of call() in a forked process."""
    pid = os.fork()
    if not pid:
        code = 70
        try:
            with open('output.txt', 'wb') as f:
                os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
            code = int(call() or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(pid, 0)
    with open('output.txt', errors='replace') as f:
        return [os.waitstatus_to_exitcode(status), f.read()[-2000:], usage.ru_utime + usage.ru_stime]


def script(name, root, words):
    """root/name.py with its own modules."""
    os.chdir(root)
    sys.path.insert(0, root)
    sys.argv = [name, *words]
    runpy.run_path(f'{root}/{name}.py', run_name='__main__')


def driver(root):
    """Writes root/results.json: {'exercise variant' or 'restored' or 'fork name': [exit code, output, seconds]}."""
    sys.dont_write_bytecode = True               # a wrong answer may have the size and the second of the right one
    os.chdir(root)
    import diffusers.models.autoencoders.autoencoder_kl  # noqa: F401
    import diffusers.models.transformers.transformer_sd3  # noqa: F401
    import open_clip  # noqa: F401
    import torchvision.transforms  # noqa: F401
    import transformers
    import transformers.models.convnext.modeling_convnext  # noqa: F401
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401
    transformers.AutoProcessor.from_pretrained('data/shapes/base/encoder')       # what the library works out once a process
    transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained('data/shapes/base/encoder')
    blank, results = blank_of(root), {}
    gc.freeze()                                  # a child's collector need not look at the libraries

    def graded(*names):
        return child(lambda: pytest.main(['-x', '-q', '-p', 'no:cacheprovider', '--assert=plain', *[f'tests/{g}' for n in names for g in blank.EXERCISES[n]['grader'].split()]]))
    for name in blank.EXERCISES:
        for variant in range(4):
            blank.exchange(name, variant)
            results[f'{name} {variant}'] = graded(name)
        blank.exchange(name)
    results['restored'] = graded(*blank.EXERCISES)
    os.makedirs('pictures')
    for i in range(6):
        Image.linear_gradient('L').rotate(60 * i).convert('RGB').resize((32, 32)).save(f'pictures/{i}.png')
    runs = {name: (f['script'], f['words'], f['text']) for name, f in FORKS.items()}
    runs.update({unchanged([f['script'], *f['words']]): (f['script'], f['words'], '') for f in FORKS.values()})
    for name, (stage, words, text) in runs.items():
        copy(f'{root}/forks/{name}')
        if text:
            subprocess.run(['git', 'apply', '-'], cwd=f'{root}/forks/{name}', input=text, text=True, check=True)
        results[f'fork {name}'] = child(lambda: script(stage, f'{root}/forks/{name}', [*words, *TINY, *['--group=4'] * (stage == 'grpo_decoder'), '--out_dir=run']))
    with open('results.json', 'w') as f:
        json.dump(results, f)


def copy(target, *folders):
    """The repository's Python files at `target`, with the shipped models and images by reference; of `folders` everything."""
    for folder in ('', 'data', 'data/shapes'):
        os.makedirs(f'{target}/{folder}', exist_ok=True)
        for name in os.listdir(f'{ROOT}/{folder}'):
            if name.endswith('.py'):
                shutil.copy(f'{ROOT}/{folder}/{name}', f'{target}/{folder}/{name}')
    for name in ('base', 'images'):
        if os.path.exists(f'{ROOT}/data/shapes/{name}'):
            os.symlink(f'{ROOT}/data/shapes/{name}', f'{target}/data/shapes/{name}')
    for folder in folders:
        shutil.copytree(f'{ROOT}/{folder}', f'{target}/{folder}', ignore=shutil.ignore_patterns('__pycache__'))
    return target


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    root = copy(tmp_path_factory.mktemp('copy'), 'tests', 'exercises')
    before = {p.relative_to(root): p.read_bytes() for p in root.glob('*.py')}
    env = dict(os.environ, OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', CUDA_VISIBLE_DEVICES='', PYTHONPATH='', PYTEST_DISABLE_PLUGIN_AUTOLOAD='1')
    done = subprocess.run([sys.executable, f'{root}/tests/test_exercises.py', root], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert {p.relative_to(root): p.read_bytes() for p in root.glob('*.py')} == before, 'restored to the byte'
    return dict(json.loads((root / 'results.json').read_text()), root=root)


# --- exercises -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('variant', range(4), ids=['stub', 'wrong1', 'wrong2', 'wrong3'])
@pytest.mark.parametrize('name', EXERCISES)
def test_the_grader_fails_what_is_wrong(results, name, variant):
    code, output, _ = results[f'{name} {variant}']
    assert code == 1 and ' failed' in output or ' error' in output, f'pytest {code}: {output}'
    assert ('NotImplementedError' in output) == (variant == 0)


def test_the_graders_pass_the_restored_code(results):
    code, output, _ = results['restored']
    assert code == 0 and ' passed' in output, output


@pytest.mark.parametrize('name', EXERCISES)
def test_each_wrong_answer_is_made_from_the_code_as_it_stands(name):
    blank = blank_of()
    original = {where: blank.split(where)[1] for where in EXERCISES[name]['where'].split()}
    bodies = [original, *blank.variants(name, original)]
    assert not any(a == b for i, a in enumerate(bodies) for b in bodies[:i])


def test_ten_exercises_each_with_its_hand_out():
    with open(f'{ROOT}/exercises/README.md', encoding='utf-8') as f:
        text = f.read()
    sections = dict(part.split('\n', 1) for part in text.split('\n## ')[1:])
    assert [s for s in sections if s in EXERCISES] == list(EXERCISES) and len(EXERCISES) == 10
    for name, exercise in EXERCISES.items():
        assert len(exercise['wrong']) == 3 and all(f'**{word}**' in sections[name] for word in ('Shapes.', 'Hint.', 'Plot.')), name
        assert all(f'`{where.split(":")[1]}`' in sections[name] and where.split(':')[0] in sections[name] for where in exercise['where'].split()), name


@pytest.fixture
def blank(tmp_path):
    return blank_of(copy(tmp_path, 'exercises'))


def test_a_stub_keeps_signature_and_docstring_and_an_answer_is_not_lost(blank, capsys):
    path = f'{blank.ROOT}/model.py'
    original, body = blank.read('model.py'), blank.split('model.py:sde_step')[1]
    blank.main(['sde_step'])
    assert 'tests/test_sde.py::' in capsys.readouterr().out
    before, stub, after = blank.split('model.py:sde_step')
    assert before + body + after == original and before.rstrip().endswith('"""')
    assert stub.startswith('    raise NotImplementedError(') and stub.count('\n') == 1
    with open(path, 'a') as f:
        f.write('\nNOTE = 1\n')                  # another edit of the student's, in the same file
    for n, words in enumerate((['--wrong=1'], [], ['--restore']), 1):            # an answer is kept whatever comes next
        blank.write('model.py', before + f'    return z, v, s, s_next      # mine {n}\n' + after + '\nNOTE = 1\n')
        blank.main(['sde_step', *words])
        assert f'# mine {n}' in blank.read(capsys.readouterr().out.splitlines()[0].split()[-1])
    assert blank.read('model.py') == original + '\nNOTE = 1\n'
    for words in (['--wrong=1'], [], ['--restore']):                             # nobody's answer is in between
        blank.main(['sde_step', *words])
        assert 'kept' not in capsys.readouterr().out
    assert blank.read('model.py') == original + '\nNOTE = 1\n' and len(os.listdir(f'{blank.ROOT}/{blank.KEPT}')) == 3


@pytest.mark.parametrize('words, said', [(['sde'], 'sde_step'), (['sde_step', '--wrong=4'], '--wrong=3'), (['sde_step', '--restore'], 'not blank')])
def test_what_cannot_be_done_is_one_line(blank, words, said):
    with pytest.raises(SystemExit) as stop:
        blank.main(words)
    assert said in stop.value.code and '\n' not in stop.value.code


def test_a_file_that_does_not_parse_or_is_not_the_original_is_left_alone(blank):
    blank.main(['kl_k3'])
    for planted, said in (('    raise (', 'grpo_encoder.py, line'), ('    return 0 #', 'not the original')):
        broken = blank.read('grpo_encoder.py').replace('    raise NotImplementedError', planted)
        blank.write('grpo_encoder.py', broken)
        if 'return' in planted:
            os.remove(f'{blank.ROOT}/{blank.KEPT}/kl_k3.json')
        with pytest.raises(SystemExit, match=said):
            blank.main(['kl_k3', '--wrong=1'])
        assert blank.read('grpo_encoder.py') == broken
        blank.write('grpo_encoder.py', broken.replace(planted, '    raise NotImplementedError'))


# --- forks -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', FORKS)
def test_a_fork_applies_and_runs_and_is_another_run(results, name):
    fork, logs = FORKS[name], []
    for run in (name, unchanged([fork['script'], *fork['words']])):
        assert results[f'fork {run}'][0] == 0, results[f'fork {run}'][1]
        with open(results['root'] / 'forks' / run / 'run' / 'log.jsonl') as f:
            logs.append([{k: v for k, v in json.loads(line).items() if k not in ('sec', 'peak_gb')} for line in f])
        assert [line['step'] for line in logs[-1]] == [0, 1] and all(abs(v) < 1e4 for line in logs[-1] for v in line.values())
    assert logs[0] != logs[1], 'the diff has an effect'
    assert (logs[0][0]['logp_diff'] > 1e-3) == (name == 'bf16'), 'all but one are on policy at first'


def test_ten_ablations_of_at_most_ten_lines():
    assert sum(fork['ablation'] for fork in FORKS.values()) == 10
    for name, fork in FORKS.items():
        diff = fork['text'].split('```diff\n')[1]
        assert 1 <= sum(line[0] in '+-' and line[:4] not in ('+++ ', '--- ') for line in diff.splitlines()) <= 10, name
        done = subprocess.run(['git', 'apply', '--check', '-'], cwd=ROOT, input=fork['text'], text=True, stderr=subprocess.PIPE)
        assert done.returncode == 0, f'{name}: {done.stderr}'


def test_curves_of_named_fields(tmp_path):
    for run in 'ab':
        (tmp_path / run).mkdir()
        for kind, field in (('log', 'entropy'), ('eval', 'judge')):
            (tmp_path / run / f'{kind}.jsonl').write_text(''.join(json.dumps({'step': i, 'reward': i, field: -i}) + '\n' for i in range(3)))
    from eval_unified import plot_runs                                           # not above: the process that forks imports this file
    folders = [str(tmp_path / run) for run in 'ab']
    plot_runs(folders, ['entropy', 'reward'], tmp_path / 'two.png')
    plot_runs(folders, ['entropy', 'reward', 'judge'], tmp_path / 'three.png')
    two, three = (Image.open(tmp_path / f'{n}.png') for n in ('two', 'three'))
    assert three.width == 1.5 * two.width and three.height == two.height
    with pytest.raises(SystemExit, match='kl not in every run; fields there are: .*entropy.*judge'):
        plot_runs(folders, ['kl', 'reward'], tmp_path / 'none.png')


if __name__ == '__main__':
    driver(sys.argv[1])
