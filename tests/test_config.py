"""The command line, the presets, and the promises about size that make the repository readable."""
import ast
import glob
import importlib
import math
import os
import re

import pytest

import config
from running import ROOT, STAGES, UNTRAINED, python, refusal, script, tiny

FLAGS = (                                        # and --preset; where something is trained --steps
    'data',
    'init_from',
    'out_dir',
    'seed',
    'sample_steps',
    'eval_steps',
    'device',
)
FULL_SIZE = (                                    # a group of their own
    'lora_rank',
    'dtype',
    'micro_batch',
    'eval_batch',
    'checkpointing',
    'old_logp',
)
CORE = (
    'config.py',
    'model.py',
    'parts.py',
    'policy.py',
    'reward.py',
    'common.py',
    'checkpoint.py',
    'log.py',
    'evaluate.py',
    'cold_start.py',
    'grpo_encoder.py',
    'grpo_decoder.py',
    'eval_unified.py',
)


def read(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        return f.read()


def find_scripts():
    """Names of the files in the root that have keys of their own."""
    paths = [path for path in glob.glob(f'{ROOT}/*.py') if '\nkeys = dict(' in read(path)]
    return sorted(os.path.basename(path)[:-3] for path in paths)


SCRIPTS = find_scripts()
TOOLS = ['data.shapes.demo', 'data.shapes.pretrain', 'bench.speed']      # have keys as well


def module(name):
    return importlib.import_module(name)


def parse(*argv, **keys):
    return config.parse(keys, {}, argv, 'some/where/x.py')


def test_the_scripts_are_found():
    stages = {'cold_start', 'grpo_encoder', 'grpo_decoder', 'pretrain_decoder'}
    assert stages | {'eval_unified'} <= set(SCRIPTS)


# --- the command line ----------------------------------------------------------------------------
def test_unknown_key_is_refused_with_the_list_of_keys():
    message = refusal(parse, '--stepz=3')
    assert 'stepz' in message
    for key in (*config.shared, 'preset'):
        assert re.search(rf'\b{key}\b', message), key
    assert 'lr' in refusal(lambda: parse('--x=1', lr=1.0)).split()


NO_ARGUMENTS = [
    'steps=3',
    '--steps',
    '--steps 3',
    '-steps=3',
    '3',
    '--=3',
    '',
    '--resume=True',
    '--plan=1',
    'resume',
]


@pytest.mark.parametrize('argument', NO_ARGUMENTS)
def test_what_is_not_key_value_is_refused(argument):
    assert refusal(lambda: parse(argument, steps=1))


VALUES = [
    ('--lr=0', 'lr', 0.0),
    ('--lr=1e-3', 'lr', 1e-3),
    ('--shift=-2', 'shift', -2.0),
    ('--steps=7', 'steps', 7),
    ('--on=False', 'on', False),
    ('--on=True', 'on', True),
    ('--pair=(1, 0.3)', 'pair', (1.0, 0.3)),
    ('--pair=0.1,0.3', 'pair', (0.1, 0.3)),
    ('--text=a=b=c', 'text', 'a=b=c'),
    ('--text=', 'text', ''),
    ('--text=False', 'text', 'False'),
    ('--text=12', 'text', '12'),
    ('--text=two\nlines', 'text', 'two\nlines'),
    ('--text="quoted"', 'text', '"quoted"'),
]


@pytest.mark.parametrize('argument, key, value', VALUES)
def test_values_have_the_type_of_the_default(argument, key, value):
    defaults = dict(lr=1.0, shift=0.5, steps=1, on=True, pair=(0.2, 0.2), text='x')
    c = parse(argument, **defaults)
    assert getattr(c, key) == value
    assert type(getattr(c, key)) is type(value)


WRONG_TYPES = [
    '--steps=1.5',
    '--steps=1e3',
    '--steps=True',
    '--steps=many',
    '--steps=',
    '--lr=fast',
    '--lr=True',
    '--lr=nan',
    '--on=0',
    '--on=false',
    '--on=yes',
    '--pair=0.2',
    '--pair=[0.1, 0.2]',
    '--pair=(0.1,)',
    '--pair=(0.1, "a")',
    '--steps={[]: 1}',
    '--lr=(',
    '--lr=__import__("os")',
]


@pytest.mark.parametrize('argument', WRONG_TYPES)
def test_wrong_types_are_refused_with_an_example(argument):
    defaults = dict(lr=1.0, steps=1, on=True, pair=(0.2, 0.3))
    message = refusal(lambda: parse(argument, **defaults))
    key = argument[2:].split('=')[0]
    assert message.startswith(f'--{key}: ')
    assert repr(defaults[key]) in message


OUTSIDE = ['--condition=texts', '--dtype=float', '--dtype=float16', '--condition=']


@pytest.mark.parametrize('argument', OUTSIDE)
def test_values_outside_a_short_list_are_refused(argument):
    message = refusal(parse, argument)
    key = argument[2:].split('=')[0]
    assert all(choice in message for choice in config.choices[key])


def test_order_of_precedence():
    own = dict(steps=1, lr=1.0)
    own_presets = dict(tiny=dict(steps=2), medium=dict(steps=3, guidance=7.0))
    c = config.parse(own, own_presets, [], 'x.py')
    assert (c.steps, c.lr, c.guidance) == (2, 1.0, config.shared['guidance'])
    assert (c.preset, c.resume, c.plan) == ('tiny', False, False)
    assert c.changed == {}                       # a plain command has changed nothing
    c = config.parse(own, own_presets, ['--steps=4', '--preset=medium', '--resume'], 'x.py')
    assert (c.steps, c.guidance, c.preset, c.resume) == (4, 7.0, 'medium', True)
    assert (c.changed['steps'], c.changed['guidance']) == (4, 7.0)
    assert c.lora_rank == config.presets['medium']['lora_rank']
    assert parse('--seed=1', '--seed=2').seed == 2
    assert own == dict(steps=1, lr=1.0)
    assert config.shared['seed'] == 1337


def test_unknown_preset_is_refused_with_the_list_of_presets():
    message = refusal(parse, '--preset=huge')
    assert all(name in message for name in ('huge', 'tiny', 'medium', 'paper'))


def test_out_dir_defaults_to_the_name_of_the_script():
    assert parse().out_dir == 'out/x'
    assert parse('--out_dir=a/b').out_dir == 'a/b'


# --- every script --------------------------------------------------------------------------------
def test_keys_of_full_size_stand_in_a_group_of_their_own():
    group = read('config.py').split('    # full size: ')[1].split('\n)\n')[0]
    assert tuple(re.findall(r'^    (\w+) = ', group, re.M)) == FULL_SIZE
    assert tuple(config.shared)[-len(FULL_SIZE):] == FULL_SIZE


@pytest.mark.parametrize('name', SCRIPTS)
def test_keys_of_a_script(name):
    keys = module(name).keys
    assert not keys.keys() & config.shared.keys()
    assert len(keys) <= 20
    assert len(config.shared) - len(FULL_SIZE) <= 30
    assert set(FLAGS) <= {*keys, *config.shared}
    assert 'steps' in keys or name in UNTRAINED


@pytest.mark.parametrize('name', SCRIPTS)
@pytest.mark.parametrize('preset', ['tiny', 'medium', 'paper'])
def test_presets_of_a_script(name, preset):
    both = {**config.shared, **module(name).keys}
    own = getattr(module(name), 'own_presets', {})
    assert own.keys() <= config.presets.keys()
    for part in (config.presets[preset], own.get(preset, {})):
        assert part.keys() <= both.keys()
        for key, value in part.items():
            assert type(value) is type(both[key]), key
    c = config.parse(module(name).keys, own, [f'--preset={preset}'], f'{name}.py')
    assert c.preset == preset
    assert c.out_dir == f'out/{name}'
    if name in STAGES and preset != 'tiny':
        assert c.lora_rank > 0
        assert c.steps > 0
        assert c.decoder.startswith('stabilityai/')


@pytest.mark.parametrize('name', SCRIPTS)
def test_help_prints_the_commented_keys(name, capsys):
    with pytest.raises(SystemExit) as e:
        script(name, '--help')
    text = capsys.readouterr().out
    assert not e.value.code
    assert f'python {name}.py' in text, 'the docstring'
    for key in (*config.shared, *module(name).keys):
        assert re.search(rf'^    {key} = \S', text, re.M), key
    own = read(f'{name}.py').split('\nkeys = dict(\n')[1].split('\n)\n')[0]
    assert own in text
    assert '# updates' in own or name in UNTRAINED
    assert 'seed = 1337' in text
    assert '# what the models are asked' in text


# --- bounds --------------------------------------------------------------------------------------
def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def numeric_keys(keys):
    """Keys whose default is a number, or a tuple of numbers."""
    found = []
    for key, value in keys.items():
        members = value if isinstance(value, tuple) else (value,)
        if all(map(is_number, members)):
            found.append(key)
    return found


def all_numeric_keys():
    """Those of all scripts and the shared ones."""
    found = set(numeric_keys(config.shared))
    for name in SCRIPTS + TOOLS:
        found.update(numeric_keys(module(name).keys))
    return sorted(found)


def test_every_number_has_bounds_and_no_bound_is_of_nothing():
    assert all_numeric_keys() == sorted(config.bounds)
    assert {'micro_batch', 'clip_range', 'noise_level', 'sigma_mean'} <= config.bounds.keys()
    for key, (least, most) in config.bounds.items():
        assert least < most, key


@pytest.mark.parametrize('key', sorted(config.bounds))
def test_a_number_may_be_its_bound_and_not_beyond(key):
    """Of its own type: the least and the most are taken, the next one is not."""
    least, most = config.bounds[key]
    default = {**config.shared, **owner_of(key)}[key]
    if isinstance(default, int):
        below, above = least - 1, most + 1
    else:
        below, above = math.nextafter(least, -math.inf), math.nextafter(most, math.inf)
    for value in (least, most):
        if math.isfinite(value):
            config.check(values_with(key, default, value))
    for value in (below, above):
        if least <= value <= most:              # beyond infinity there is nothing
            continue
        message = refusal(config.check, values_with(key, default, value))
        assert message.startswith(f'--{key}: expected {least} to {most}, got ')


def owner_of(key):
    """The keys of a script that has this one, {} for a shared key."""
    for name in SCRIPTS + TOOLS:
        keys = module(name).keys
        if key in keys:
            return keys
    return {}


def values_with(key, default, value):
    """The shared defaults and this key; where it is a pair, the last of the two."""
    if isinstance(default, tuple):
        value = (*default[:-1], value)
    return {**config.shared, key: value}


MEANINGLESS = [
    ('grpo_encoder', '--micro_batch=-3'),
    ('grpo_decoder', '--cond_len=3'),
    ('cold_start', '--cond_len=0'),
    ('grpo_encoder', '--caption_len=0'),
    ('grpo_encoder', '--caption_len=1'),
    ('cold_start', '--lr=-1'),
    ('cold_start', '--steps=-1'),
    ('cold_start', '--sample_steps=0'),
    ('cold_start', '--eval_steps=0'),
    ('eval_unified', '--eval_steps=0'),
    ('grpo_decoder', '--train_steps=0'),
    ('grpo_encoder', '--temperature=-1'),
    ('grpo_encoder', '--temperature=0'),
    ('grpo_encoder', '--updates=0'),
    ('grpo_decoder', '--updates=0'),
    ('grpo_encoder', '--lora_rank=-1'),
    ('cold_start', '--seed=-1'),
    ('eval_unified', '--eval_images=0'),
    ('cold_start', '--eval_images=0'),
    ('cold_start', '--save_every=-1'),
    ('grpo_decoder', '--noise_level=0'),
    ('grpo_decoder', '--noise_level=-1'),
    ('grpo_decoder', '--clip_range=-0.1,0.2'),
    ('grpo_encoder', '--clip_range=0.2,-0.1'),
    ('grpo_encoder', '--kl=-0.1'),
    ('grpo_decoder', '--kl=-0.1'),
    ('grpo_decoder', '--guidance=-1'),
    ('grpo_encoder', '--guidance=0'),
    ('cold_start', '--guidance=0'),
    ('cold_start', '--grad_clip=0'),
    ('pretrain_decoder', '--ema=2'),
    ('pretrain_decoder', '--drop=2'),
    ('reca', '--drop=2'),
    ('reca', '--drop=1'),
    ('grpo_decoder', '--noise_level=1e-6'),
    ('grpo_encoder', '--temperature=1e-3'),
    ('grpo_encoder', '--reward=clip,clip'),
]


@pytest.mark.parametrize('name, flag', MEANINGLESS)
def test_numbers_that_mean_nothing_are_one_line_and_leave_nothing(tmp_path, name, flag):
    out = tmp_path / 'out'
    message = refusal(tiny, name, out, flag)
    assert message.startswith(flag.split('=')[0])
    assert not out.exists() or not os.listdir(out)


@pytest.mark.parametrize('kind', ['cps', 'cps_exact'])
def test_cps_takes_no_noise_level_above_1(tmp_path, kind):
    flags = [f'--sde={kind}', '--noise_level=3']
    message = refusal(tiny, 'grpo_decoder', tmp_path, *flags)
    assert '--noise_level=3' in message
    assert kind in message


def test_an_out_dir_that_is_a_file_is_refused_and_kept(tmp_path):
    file = tmp_path / 'file'
    file.write_text('precious')
    for name in STAGES:
        assert refusal(tiny, name, file).startswith(f'--out_dir={file}: a file')
    assert file.read_text() == 'precious'


# --- what a script must not hide -----------------------------------------------------------------
def test_a_script_key_may_not_hide_a_shared_one():
    with pytest.raises(AssertionError):
        parse(seed=1)


def test_exit_code_of_a_refused_command_line():
    """The one subprocess: a refusal is one line, no traceback, exit code 1."""
    program = 'import sys, config; config.parse({}, {}, sys.argv[1:], "x.py")'
    done = python('-c', program, '--stepz=3')
    assert done.returncode == 1
    assert len(done.stdout.strip().splitlines()) == 1
    assert 'Traceback' not in done.stdout


# --- size ----------------------------------------------------------------------------------------
def python_files():
    """Every Python file of the repository outside tests and data."""
    found = []
    for folder, subfolders, names in os.walk(ROOT):
        visible = [name for name in subfolders if not name.startswith('.')]
        if folder == ROOT:
            visible = [name for name in visible if name not in ('tests', 'data', 'docs', 'out')]
        subfolders[:] = visible                  # os.walk goes on with these
        for name in names:
            if name.endswith('.py'):
                found.append(os.path.relpath(os.path.join(folder, name), ROOT))
    return sorted(found)


def test_budgets_in_lines():
    count = {path: read(path).count('\n') for path in python_files()}
    assert set(CORE) <= count.keys()
    for name in SCRIPTS:
        budget = 330
        if name in ('eval_t2i', 'bench'):        # four benchmarks, all stages in one
            budget = 380
        assert count[f'{name}.py'] < budget, name
    assert count['model.py'] < 520
    assert sum(count[path] for path in CORE) < 3350
    assert sum(count.values()) < 8600


def test_no_long_function_and_nothing_left_to_do():
    data = glob.glob(f'{ROOT}/data/**/*.py', recursive=True)
    for path in python_files() + [os.path.relpath(file, ROOT) for file in data]:
        assert not re.search(r'\bTODO\b|\bFIXME\b|\bXXX\b', read(path)), path
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f'{path}: {node.name}'
