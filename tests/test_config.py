"""The command line: what is understood, what is refused in one line, and what the presets say."""
import glob
import importlib
import math
import os
import re

import pytest

import config
from running import ROOT, STAGES, UNTRAINED, refusal, script, tiny
from lib import checkpoint

# the same in every script; where something is trained, steps as well
FLAGS = ('preset', 'data', 'init_from', 'out_dir', 'seed', 'denoise_steps', 'eval_denoise_steps',
         'device')
FULL_SIZE = ('lora_rank', 'dtype', 'micro_batch', 'checkpointing')      # a group of their own


def read(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        return f.read()


def find_scripts():
    """Names of the files in the root that have keys of their own."""
    paths = [path for path in glob.glob(f'{ROOT}/*.py') if '\nkeys = dict(' in read(path)]
    return sorted(os.path.basename(path)[:-3] for path in paths)


SCRIPTS = find_scripts()
TOOLS = ['data.shapes.pretrain', 'data.shapes.shared']      # have keys and limits as well
EVERY_SCRIPT = pytest.mark.parametrize('name', SCRIPTS)


def module(name):
    return importlib.import_module(name)


def parse(*argv, **keys):
    return config.parse(keys, {}, argv, 'some/where/x.py')


def limits_of(name):
    """{key: limit} of a script, the shared ones among them."""
    return {**config.limits, **getattr(module(name), 'limits', {})}


def test_the_scripts_are_found():
    others = {'pretrain_decoder', 'reca', 'eval_unified', 'eval_t2i', 'sample'}
    assert {*STAGES, *others} <= set(SCRIPTS)


# --- the command line ----------------------------------------------------------------------------
def test_unknown_key_is_refused_with_the_list_of_keys():
    message = refusal(parse, '--stepz=3')
    assert 'stepz' in message
    for key in (*config.shared, 'preset'):
        assert re.search(rf'\b{key}\b', message), key
    assert 'lr' in refusal(lambda: parse('--x=1', lr=1.0)).split()


# an old key -> what its refusal has to name
OLD_KEYS = dict(
    prompts='batch', updates='epochs', sample_steps='denoise_steps', sde_window='noisy_steps',
    eval_steps='eval_denoise_steps', train_steps='trained_steps', wandb='--tracker=wandb:PROJECT',
    tensorboard='--tracker=tensorboard', eval_temperature='temperature', old_logp='dtype',
    grad_clip='GRAD_CLIP', patience='PATIENCE', watch='WATCHED', caption_batch='CAPTIONS_AT_ONCE',
    batch='images_at_once', eval_batch='images_at_once', caption_temperature='0',
    cold_temperature='0', text_encoder='grpo_encoder.py')


@pytest.mark.parametrize('old', sorted({*OLD_KEYS, *config.RENAMED}))
def test_an_old_key_is_refused_with_the_name_of_the_new_one(old):
    message = refusal(parse, f'--{old}=1')
    assert old in message
    assert OLD_KEYS[old] in message.partition('it is now')[2]


def test_what_an_old_key_became_is_there():
    keys = set(config.shared).union(*(module(name).keys for name in SCRIPTS))
    for new in config.RENAMED.values():
        word = re.match(r'(?:--)?(\w+)', new)[1]
        assert word in keys or word in ('a', 'of', 'decided', '0'), new
    for file, constant in re.findall(r'a constant, ([\w/]+)\.(\w+)', str(config.RENAMED)):
        assert hasattr(module(file.replace('/', '.')), constant), constant


NO_ARGUMENTS = ['steps=3', '--steps', '--steps 3', '-steps=3', '3', '--=3', '', '--resume=True',
                '--plan=1', 'resume']


@pytest.mark.parametrize('argument', NO_ARGUMENTS)
def test_what_is_not_key_value_is_refused(argument):
    assert refusal(lambda: parse(argument, steps=1))


DEFAULTS = dict(lr=1.0, shift=0.5, steps=1, on=True, pair=(0.2, 0.3), text='x')
VALUES = [
    ('--lr=0', 0.0), ('--lr=1e-3', 1e-3), ('--steps=7', 7), ('--on=False', False),
    ('--on=True', True), ('--pair=(1, 0.3)', (1.0, 0.3)), ('--pair=0.1,0.3', (0.1, 0.3)),
    ('--text=a=b=c', 'a=b=c'), ('--text=', ''), ('--text=False', 'False'), ('--text=12', '12'),
    ('--text=two\nlines', 'two\nlines'), ('--text="quoted"', '"quoted"'),
]


@pytest.mark.parametrize('argument, value', VALUES)
def test_values_have_the_type_of_the_default(argument, value):
    key = argument[2:].split('=')[0]
    found = getattr(parse(argument, **DEFAULTS), key)
    assert found == value
    assert type(found) is type(value)


WRONG_TYPES = [
    '--steps=1.5', '--steps=1e3', '--steps=True', '--steps=many', '--steps=', '--lr=fast',
    '--lr=True', '--lr=nan', '--on=0', '--on=false', '--on=yes', '--pair=0.2', '--pair=[0.1, 0.2]',
    '--pair=(0.1,)', '--pair=(0.1, "a")', '--steps={[]: 1}', '--lr=(', '--lr=__import__("os")',
]


@pytest.mark.parametrize('argument', WRONG_TYPES)
def test_wrong_types_are_refused_with_an_example(argument):
    message = refusal(lambda: parse(argument, **DEFAULTS))
    key = argument[2:].split('=')[0]
    assert message.startswith(f'--{key}: ')
    assert repr(DEFAULTS[key]) in message


def test_order_of_precedence():
    own = dict(steps=1, lr=1.0)
    own_presets = dict(tiny=dict(steps=2), medium=dict(steps=3, guidance=7.0))
    c = config.parse(own, own_presets, [], 'x.py')
    assert (c.steps, c.lr, c.guidance) == (2, 1.0, config.shared['guidance'])
    assert (c.preset, c.resume, c.script, c.out_dir) == ('tiny', False, 'x', 'out/x')
    assert c.changed == {}                       # a plain command has changed nothing
    c = config.parse(own, own_presets, ['--steps=4', '--preset=medium', '--resume'], 'x.py')
    assert (c.steps, c.guidance, c.preset, c.resume) == (4, 7.0, 'medium', True)
    assert (c.changed['steps'], c.changed['guidance']) == (4, 7.0)
    assert c.lora_rank == config.presets['medium']['lora_rank']
    assert parse('--seed=1', '--seed=2').seed == 2
    assert parse('--out_dir=a/b').out_dir == 'a/b'
    assert own == dict(steps=1, lr=1.0)
    assert config.shared['seed'] == 1337


def test_unknown_preset_is_refused_with_the_list_of_presets():
    message = refusal(parse, '--preset=huge')
    assert all(name in message for name in ('huge', 'tiny', 'medium', 'paper'))


def test_a_script_key_may_not_hide_a_shared_one():
    with pytest.raises(AssertionError):
        parse(seed=1)


# --- every script --------------------------------------------------------------------------------
def test_keys_of_full_size_stand_in_a_group_of_their_own():
    group = read('config.py').split('    # full size: ')[1].split('\n)\n')[0]
    assert tuple(re.findall(r'^    (\w+) = ', group, re.M)) == FULL_SIZE
    assert tuple(config.shared)[-len(FULL_SIZE):] == FULL_SIZE
    assert len(config.shared) < 30


@EVERY_SCRIPT
def test_keys_of_a_script(name):
    keys = module(name).keys
    assert not keys.keys() & config.shared.keys()
    assert len(keys) <= 20
    assert set(FLAGS) <= {*keys, *config.shared, 'preset'}
    assert 'steps' in keys or name in UNTRAINED


@EVERY_SCRIPT
@pytest.mark.parametrize('preset', ['tiny', 'medium', 'paper'])
def test_presets_of_a_script(name, preset):
    both = {**config.shared, **module(name).keys}
    own = getattr(module(name), 'own_presets', {})
    assert own.keys() <= config.presets.keys()
    for part in (config.presets[preset], own.get(preset, {})):
        for key, value in part.items():
            assert type(value) is type(both[key]), key
    c = parse_script(name, f'--preset={preset}')
    assert (c.preset, c.out_dir) == (preset, f'out/{name}')
    if name in STAGES and preset != 'tiny':
        assert c.lora_rank > 0 and c.steps > 0
        assert c.decoder.startswith('stabilityai/')


def parse_script(name, *argv):
    """The configuration of a script's command line."""
    of = module(name)
    own_presets = getattr(of, 'own_presets', {})
    return config.parse(of.keys, own_presets, argv, f'{name}.py', limits_of(name))


@EVERY_SCRIPT
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
    assert 'seed = 1337' in text
    assert '# what the models are asked' in text


# --- what a value may be -------------------------------------------------------------------------
def limited_keys():
    """(script, key) of every key that is a number, or numbers, or one of some words."""
    found = []
    for name in SCRIPTS + TOOLS:
        of = module(name)
        limits = limits_of(name)
        assert limits.keys() <= {**config.shared, **of.keys}.keys(), 'a limit of nothing'
        for key, value in of.keys.items():
            if key in limits or not isinstance(value, (str, bool)):
                found.append((name, key))
    for key, value in config.shared.items():
        if key in config.limits or type(value) in (int, float):
            found.append(('cold_start', key))
    return found


def one_further(number, direction):
    """The next number of its own type."""
    if isinstance(number, int):
        return number + direction
    return math.nextafter(number, direction * math.inf)


@pytest.mark.parametrize('name, key', limited_keys())
def test_a_value_may_be_its_limit_and_not_beyond(name, key):
    of = module(name)
    limits = limits_of(name)
    values = {**config.shared, **of.keys}
    limit = limits.get(key, config.NOT_NEGATIVE)
    if isinstance(limit[0], str):
        for word in (limit[0][:-1], limit[0] + 's', ''):
            message = refusal(config.check, dict(values, **{key: word}), limits)
            assert all(word in message for word in limit)
        return

    number = values[key]
    pair = isinstance(number, tuple)
    kind = type(number[-1] if pair else number)
    least, most = (kind(value) for value in limit)
    assert least <= (number[-1] if pair else number) <= most
    for value, fine in ((least, True), (most, True), (one_further(least, -1), False),
                        (one_further(most, 1), False)):
        asked = (*number[:-1], value) if pair else value
        call = (config.check, dict(values, **{key: asked}), limits)
        if not fine:
            assert refusal(*call).startswith(f'--{key}: expected {limit[0]} to {limit[1]:g}, got ')
        elif key != 'cond_len' or value:                # 0 is for evaluation: see below
            call[0](*call[1:])


MEANINGLESS = [
    ('cold_start', '--cond_len=0'), ('eval_unified', '--cond_len=0 --condition=text+image'),
    ('grpo_decoder', '--cond_len=3'), ('grpo_decoder', '--denoise_steps=1'),
    ('grpo_decoder', '--noise_level=3 --sde=cps'),
    ('grpo_decoder', '--noise_level=3 --sde=cps_exact'),
    ('cold_start', '--grad_steps=0'), ('cold_start', '--grad_steps=9'),
    ('grpo_encoder', '--clip_range=0.2,-0.1'), ('grpo_encoder', '--reward=clip,clip'),
    ('grpo_encoder', '--condition=image'), ('reca', '--see_resolution=64'),
    ('cold_start', '--tracker=wandb'), ('cold_start', '--tracker=wandb:'),
    ('cold_start', '--tracker=mlflow:x'),
]


@pytest.mark.parametrize('name, flags', MEANINGLESS)
def test_what_means_nothing_is_one_line_and_leaves_nothing(tmp_path, name, flags):
    out = tmp_path / 'out'
    message = refusal(tiny, name, out, *flags.split())
    assert message.startswith(flags.split('=')[0])
    assert not out.exists() or not os.listdir(out)


@pytest.mark.parametrize('tracker', ['wandb:x', 'tensorboard'])
def test_a_tracker_that_is_not_installed_is_refused_before_the_models_are_loaded(
        tmp_path, monkeypatch, tracker):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    monkeypatch.setattr(checkpoint, 'open_uae', lambda *_: pytest.fail('they are loaded'))
    package = tracker.split(':')[0]
    for name in STAGES:
        message = refusal(tiny, name, tmp_path / 'out', f'--tracker={tracker}')
        assert message.endswith(f'pip install {package}')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('below', ['', '/a', '/a/b/c'])
def test_an_out_dir_that_cannot_be_is_refused_and_what_is_there_kept(tmp_path, below):
    file = tmp_path / 'file'
    file.write_text('precious')
    for name in (*STAGES, 'sample'):
        message = refusal(parse_script, name, f'--out_dir={file}{below}')
        assert message == f'--out_dir={file}{below}: {file} is a file, expected a folder'
    assert file.read_text() == 'precious'
