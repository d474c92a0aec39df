"""Every exercise's stub and wrong answers fail at its grader and the restored code passes; every fork's diff applies and runs.

One process imports the libraries, which takes long, and forks for each of the sixty runs; only the children import the project's modules,
from a copy of it: `python tests/test_exercises.py COPY`.
"""
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import traceback

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ('--steps=2', '--prompts=2', '--eval_every=0', '--eval_images=4', '--device=cpu')


def module(name, root=ROOT):
    """exercises/name.py of a copy of the repository."""
    spec = importlib.util.spec_from_file_location(name, f'{root}/exercises/{name}.py')
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


EXERCISES, FORKS = module('blank').EXERCISES, module('fork').forks()
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
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open('output.txt', errors='replace') as f:
        return [code, f.read()[-2000:]]


def script(name, root, words):
    """root/name.py with its own modules."""
    os.chdir(root)
    sys.path.insert(0, root)
    sys.argv = [name, *words]
    runpy.run_path(f'{root}/{name}.py', run_name='__main__')


def driver(root):
    """Writes root/results.json: {'exercise wrong' or 'restored' or 'fork name': [exit code, output]}."""
    sys.dont_write_bytecode = True               # a wrong answer may have the size and the second of the right one
    os.chdir(root)
    import diffusers.models.autoencoders.autoencoder_kl  # noqa: F401
    import diffusers.models.transformers.transformer_sd3  # noqa: F401
    import open_clip  # noqa: F401
    import torchvision.transforms  # noqa: F401
    import transformers.models.convnext.modeling_convnext  # noqa: F401
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401
    blank, fork, results = module('blank', root), module('fork', root), {}

    def graded(*names):
        return child(lambda: pytest.main(['-x', '-q', '-p', 'no:cacheprovider', *[f'tests/{g}' for n in names for g in blank.EXERCISES[n]['grader']]]))
    for name in blank.EXERCISES:
        for wrong in range(4):
            blank.plant(name, wrong)
            results[f'{name} {wrong}'] = graded(name)
        blank.restore(name)
    results['restored'] = graded(*blank.EXERCISES)
    runs = {name: (f['script'], f['words'], f['diff']) for name, f in fork.forks().items()}
    runs.update({unchanged([f['script'], *f['words']]): (f['script'], f['words'], '') for f in fork.forks().values()})
    for name, (stage, words, diff) in runs.items():
        fork.copy(f'{root}/forks/{name}')
        fork.apply(diff, f'{root}/forks/{name}')
        results[f'fork {name}'] = child(lambda: script(stage, f'{root}/forks/{name}', [*TINY, *words, '--out_dir=run']))
    with open('results.json', 'w') as f:
        json.dump(results, f)


def duplicate(root):
    """The repository's code, tests and exercises at `root`."""
    module('fork').copy(str(root))
    for folder in ('tests', 'exercises'):
        shutil.copytree(f'{ROOT}/{folder}', root / folder, ignore=shutil.ignore_patterns('__pycache__'))
    return root


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    root = duplicate(tmp_path_factory.mktemp('copy'))
    before = {p.relative_to(root): p.read_bytes() for p in root.glob('*.py')}
    env = dict(os.environ, OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', CUDA_VISIBLE_DEVICES='', PYTHONPATH='')
    done = subprocess.run([sys.executable, f'{root}/tests/test_exercises.py', root], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert {p.relative_to(root): p.read_bytes() for p in root.glob('*.py')} == before, 'restored to the byte'
    return dict(json.loads((root / 'results.json').read_text()), root=root)


# --- exercises -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('wrong', range(4), ids=['stub', 'wrong1', 'wrong2', 'wrong3'])
@pytest.mark.parametrize('name', EXERCISES)
def test_the_grader_fails_what_is_wrong(results, name, wrong):
    code, output = results[f'{name} {wrong}']
    assert code == 1 and ' failed' in output or ' error' in output, f'pytest {code}: {output}'
    assert ('NotImplementedError' in output) == (wrong == 0)


def test_the_graders_pass_the_restored_code(results):
    code, output = results['restored']
    assert code == 0 and ' passed' in output, output


def test_ten_exercises_each_with_its_hand_out():
    with open(f'{ROOT}/exercises/README.md', encoding='utf-8') as f:
        text = f.read()
    sections = dict(part.split('\n', 1) for part in text.split('\n## ')[1:])
    assert [s for s in sections if s in EXERCISES] == list(EXERCISES) and len(EXERCISES) == 10
    for name, exercise in EXERCISES.items():
        assert len(exercise['wrong']) == 3 and all(f'**{word}**' in sections[name] for word in ('Shapes.', 'Hint.', 'Plot.')), name
        assert all(f'`{where.split(":")[1]}`' in sections[name] and where.split(':')[0] in sections[name] for where in exercise['where']), name


@pytest.fixture
def blank(tmp_path):
    return module('blank', duplicate(tmp_path))


def test_a_stub_keeps_signature_and_docstring_and_an_answer_is_not_lost(blank, capsys):
    path = f'{blank.ROOT}/model.py'
    original = blank.read('model.py')
    blank.main(['sde_step'])
    assert 'tests/test_sde.py::' in capsys.readouterr().out
    before, body, after = blank.split('model.py:sde_step')
    assert before + after == original.replace(blank.kept('sde_step')['model.py:sde_step'][0], '') and before.rstrip().endswith('"""')
    assert body.startswith('    raise NotImplementedError(') and body.count('\n') == 1
    with open(path, 'a') as f:
        f.write('\nNOTE = 1\n')                  # another edit of the student's, in the same file
    blank.write('model.py', blank.read('model.py').replace(body, '    return z, v, s, s_next      # mine\n'))
    with pytest.raises(SystemExit, match='answer of yours'):
        blank.main(['sde_step', '--wrong=1'])
    blank.main(['sde_step', '--restore'])
    assert blank.read('model.py') == original + '\nNOTE = 1\n'
    kept = capsys.readouterr().out.split()[-1]
    assert '# mine' in blank.read(kept)
    blank.main(['sde_step', '--wrong=1'])
    blank.main(['sde_step'])                     # from one to the other without a word: nobody's answer is in between
    blank.main(['sde_step', '--restore'])
    assert blank.read('model.py') == original + '\nNOTE = 1\n' and not blank.kept('sde_step')


@pytest.mark.parametrize('words, said', [(['sde'], 'sde_step'), (['sde_step', '--wrong=4'], '--wrong=3'), (['sde_step', '--restore'], 'not blank')])
def test_what_cannot_be_done_is_one_line(blank, words, said):
    with pytest.raises(SystemExit) as stop:
        blank.main(words)
    assert said in stop.value.code and '\n' not in stop.value.code


def test_a_file_that_does_not_parse_is_left_alone(blank):
    blank.main(['kl_k3'])
    broken = blank.read('grpo_encoder.py').replace('    raise NotImplementedError', '    raise (')
    blank.write('grpo_encoder.py', broken)
    with pytest.raises(SystemExit, match='grpo_encoder.py, line'):
        blank.main(['kl_k3', '--restore'])
    assert blank.read('grpo_encoder.py') == broken and blank.kept('kl_k3')


# --- forks -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', FORKS)
def test_a_fork_applies_and_runs_and_is_another_run(results, name):
    fork = FORKS[name]
    for run in (f'fork {name}', f'fork {unchanged([fork["script"], *fork["words"]])}'):
        assert results[run][0] == 0, results[run][1]
    logs = []
    for run in (name, unchanged([fork['script'], *fork['words']])):
        with open(results['root'] / 'forks' / run / 'run' / 'log.jsonl') as f:
            logs.append([{k: v for k, v in json.loads(line).items() if k not in ('sec', 'peak_gb')} for line in f])
        assert [line['step'] for line in logs[-1]] == [0, 1] and all(abs(v) < 1e4 for line in logs[-1] for v in line.values())
    assert logs[0] != logs[1], 'the diff has an effect'
    assert (logs[0][0]['logp_diff'] > 1e-3) == (name == 'bf16'), 'all but one are on policy at first'


def test_ten_ablations_of_at_most_ten_lines(tmp_path):
    assert sum(fork['ablation'] for fork in FORKS.values()) == 10
    duplicate(tmp_path)
    for name, fork in FORKS.items():
        changed = [line for line in fork['diff'].splitlines() if line[0] in '+-' and line[:3] not in ('+++', '---')]
        assert 1 <= len(changed) <= 10, name
        done = subprocess.run(['git', 'apply', '--check', '-'], cwd=tmp_path, input=fork['diff'], text=True, stderr=subprocess.PIPE)
        assert done.returncode == 0, f'{name}: {done.stderr}'


def test_a_diff_whose_lines_are_gone_is_refused(tmp_path):
    duplicate(tmp_path)
    (tmp_path / 'grpo_encoder.py').write_text('')
    with pytest.raises(SystemExit, match='grpo_encoder.py: these lines'):
        module('fork').apply(FORKS['kl']['diff'], str(tmp_path))


if __name__ == '__main__':
    driver(sys.argv[1])
