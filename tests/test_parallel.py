"""Ranks and micro-batches change nothing: two ranks in micro-batches equal one rank without.

These runs take plain gradient descent without clipping: see comparing.plain_descent. Every split of
a step against its plain recomputation: test_step.py, test_gradients.py.
"""
import functools
import json
import types

import numpy as np
import pytest
import torch
from PIL import Image

from lib import checkpoint
from lib import ranks
from comparing import check_same_training, on_two_ranks, plain_descent
from running import ROOT, arguments, lines, refusal, tiny, weights
from test_pretrain import scenes

# runs the jobs of a JSON file one after the other; a refusal is written to a file of each rank
DRIVER = f'''
import json, os, runpy, sys
sys.path.insert(0, {ROOT!r})
import torch
torch.set_num_threads(1)
torch.optim.AdamW = lambda params, lr, **other: torch.optim.SGD(params, lr=lr)
from lib import optimiser
optimiser.GRAD_CLIP = float('inf')
for name, argv, refused in json.load(open(sys.argv[1])):
    sys.argv = [name + '.py', *argv]
    try:
        runpy.run_path({ROOT!r} + '/' + name + '.py', run_name='__main__')
    except SystemExit as e:
        if not refused:
            raise
        with open(refused + os.environ['RANK'], 'w') as f:
            f.write(str(e.code))
'''
# one switch of every kind that has to know about ranks
EXTRA = dict(
    pretrain_decoder=['--lr=0.03', '--warmup=0', '--caption_every=1', '--drop=0.3'],
    reca=['--lr=0.03', '--t2i_target=image', '--drop=0.3'],
    cold_start=['--lr=0.03'],
    grpo_encoder=['--lr=0.03', '--kl=0.1', '--epochs=2'],
    grpo_decoder=['--lr=1.0', '--kl=0.1', '--shuffle_reward=True', '--clip_range=0.2,0.2'],
)


@pytest.fixture(scope='module')
def command_of(tmp_path_factory):
    """command_of(name, out_dir, *extra): the command line of two updates.

    Stage 0 has captions of many lengths: tokens are counted over all parts. One image has none.
    """
    captions = ['red circle .', True, True, 'blue .', True, ' '.join(['red'] * 30), None,
                'gray background .']
    data = scenes(tmp_path_factory.mktemp('captions') / 'd', captions * 2)

    def command_of(name, out, *extra):
        if name == 'pretrain_decoder':
            extra = [data, *extra]
        return arguments(name, out, '--eval_every=2', *EXTRA[name], *extra, images=4)

    return command_of


def agree(x, y):
    """Two log lines say the same.

    The advantage divides the reward's rounding noise of 1e-7 by a group's std of perhaps 1e-3, so
    what is made of it agrees to 1e-3 of its size; a wrong scale would be off by a factor.
    """
    for key in ('reward', 'reward_std', 'zero_var', 'lr', 'caption_len', 'truncated', 'cut',
                'skipped'):
        assert key not in x or abs(x[key] - y[key]) < 1e-5, key
    for key in ('loss', 'grad_norm', 'ratio_max', 'caption_loss', 'flow_image', 'flow_text'):
        assert key not in x or abs(x[key] - y[key]) < 1e-3 * abs(x[key]) + 1e-5, key


@pytest.fixture(scope='module')
def one(tmp_path_factory, command_of):
    """stage -> out_dir of its run on one rank in one micro-batch; run when first asked for."""
    root = tmp_path_factory.mktemp('one')

    @functools.cache
    def run(name):
        with pytest.MonkeyPatch.context() as monkeypatch:
            plain_descent(monkeypatch)
            tiny(name, root / name, *command_of(name, root / name))
        return root / name

    return run


def two_images(folder):
    folder.mkdir()
    for i in range(2):
        grey = np.full((32, 32, 3), 60 * i, np.uint8)
        Image.fromarray(grey).save(folder / f'{i}.png')


@pytest.fixture(scope='module')
def two(tmp_path_factory, command_of):
    """One torchrun of two ranks: the stages in micro-batches of 1, then what has to be refused."""
    root = tmp_path_factory.mktemp('two')
    few = root / 'few'
    two_images(few)
    held_out = f'--held_out={few}'
    enough = arguments('grpo_encoder', root / 'r1', f'--data={few}', held_out, images=4)
    one_image = arguments('grpo_encoder', root / 'r2', f'--data={few}/0.png', held_out, images=4)
    used = command_of('grpo_decoder', root / 'grpo_decoder')
    odd = arguments('cold_start', root / 'r3', images=3)

    jobs = [(name, command_of(name, root / name, '--micro_batch=1'), '') for name in EXTRA]
    jobs.append(('grpo_encoder', enough, ''))
    jobs.append(('grpo_encoder', one_image, f'{root}/images'))
    jobs.append(('grpo_decoder', used, f'{root}/used'))
    jobs.append(('cold_start', odd, ''))
    (root / 'driver.py').write_text(DRIVER)
    (root / 'jobs.json').write_text(json.dumps(jobs))
    return root, on_two_ranks(root / 'driver.py', root / 'jobs.json')


@pytest.mark.parametrize('name', EXTRA)
def test_two_ranks_equal_one(one, two, name):
    root, done = two
    assert (root / name / 'step_000002').exists(), done.stdout[-3000:]
    a = weights(one(name) / 'step_000002')
    b = weights(root / name / 'step_000002')
    check_same_training(one(name) / 'step_000002', root / name / 'step_000002')
    assert max((a[key] - b[key]).abs().max().item() for key in a) < 1e-5

    log_1 = lines(one(name) / 'log.jsonl')
    log_2 = lines(root / name / 'log.jsonl')
    assert [line['step'] for line in log_2] == [0, 1], 'one line a step, by rank 0'
    for x, y in zip(log_1, log_2):
        assert x.keys() == y.keys()
        agree(x, y)
    for x, y in zip(lines(one(name) / 'eval.jsonl'), lines(root / name / 'eval.jsonl')):
        assert all(abs(x[key] - y[key]) < 1e-4 for key in x)


def test_two_ranks_leave_the_pictures_of_one(one, two):
    alone, together = one('grpo_encoder'), two[0] / 'grpo_encoder'
    samples = lines(together / 'samples.jsonl')[:4]         # before the first update
    for x, y in zip(lines(alone / 'samples.jsonl'), samples):
        assert x['caption'] == y['caption'] and abs(x['reward'] - y['reward']) < 1e-4
    assert [row['row'] for row in samples] == [0, 1, 2, 3]
    groups = [lines(out / 'groups.jsonl')[0]['members'] for out in (alone, together)]
    captions = [[member['caption'] for member in members] for members in groups]
    assert captions[0] == captions[1]


def test_refusals_under_torchrun(two):
    """More ranks than images, a used out_dir, a count that does not divide: one line a rank."""
    root, done = two
    assert (root / 'r1' / 'step_000002').exists(), 'two images are enough for two ranks'
    for name, said in (('images', 'more ranks (2) than images (1)'), ('used', 'is not empty')):
        for rank in '01':
            message = (root / f'{name}{rank}').read_text()
            assert said in message
            assert '\n' not in message
    assert done.returncode != 0
    assert 'batch=3 does not divide over 2 ranks' in done.stdout
    assert 'Traceback' not in done.stdout.split('batch=3')[0]
    assert not (root / 'r3').exists() or not list((root / 'r3').iterdir())


@pytest.mark.parametrize('G, size', [
    (1, 0), (4, 0), (4, 8), (4, 9), (4, 4), (4, 3), (1, 4), (4, 100)])
@pytest.mark.parametrize('name', ['group_slices', 'sample_slices'])
def test_the_last_micro_batch_is_marked_and_images_are_those_of_the_samples(name, G, size):
    """Groups stay whole, but where micro-batches of exactly `size` samples are asked for."""
    P = 6
    found = list(getattr(ranks, name)(P, G, size))
    marks = [last for _, _, last in found]
    assert marks == [False] * (len(found) - 1) + [True]
    rows = [row for _, samples, _ in found for row in range(P * G)[samples]]
    assert rows == list(range(P * G))
    for images, samples, _ in found:
        if name == 'group_slices':
            assert samples.start % G == samples.stop % G == 0
            assert not size or samples.stop - samples.start <= max(size, G)
        else:
            assert not size or samples.stop - samples.start <= size
        owners = {row // G for row in range(samples.start, samples.stop)}
        assert set(range(P)[images]) == owners


def test_shares_of_a_count():
    assert ranks.per_rank('batch', 8, 4) == 2
    assert 'batch=6' in refusal(ranks.per_rank, 'batch', 6, 4)


def test_randomness_is_addressed():
    """Row i depends on its address alone: not on its neighbours, nor on anything drawn before."""
    all_rows = ranks.normal((3,), range(6), 1, 'start', 2)
    torch.randn(5)
    assert torch.equal(all_rows[[4, 1]], ranks.normal((3,), [4, 1], 1, 'start', 2))
    for address in ((1, 'start', 3), (2, 'start', 2), (1, 'sde', 2)):
        assert not torch.equal(all_rows, ranks.normal((3,), range(6), *address))
    assert len({tuple(row.tolist()) for row in all_rows}) == 6

    u = ranks.uniform((1000,), [0], 'u')
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.05
    assert abs(ranks.normal((1000,), [0], 'n').std() - 1) < 0.1


def test_shuffled_rewards_are_the_same_in_another_order():
    """Of all groups together, by the address alone."""
    r = torch.rand(6, 4)
    other = ranks.permuted(r, 1, 'shuffle', 0)
    assert other.shape == r.shape
    assert torch.equal(other.flatten().sort()[0], r.flatten().sort()[0])
    assert ((other[:, :, None] == r[:, None]).any(2).sum(1) < 4).all(), 'not inside the groups'
    assert torch.equal(other, ranks.permuted(r, 1, 'shuffle', 0))
    assert not torch.equal(other, ranks.permuted(r, 1, 'shuffle', 1))


def test_sums_for_the_log_are_exact_where_the_device_has_no_float64():
    run = types.SimpleNamespace(rank=0, world=1, device='mps:0')
    t = ranks.in_float64(torch.ones(2), run)
    assert (t.dtype, t.device.type) == (torch.float64, 'cpu')


def test_a_device_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    assert '--device=mps' in refusal(ranks.pick_device, 'mps')


def test_a_rank_that_sees_another_folder_says_so(monkeypatch, tmp_path):
    run = types.SimpleNamespace(rank=1, world=1, device='cpu', master=False)
    config = types.SimpleNamespace(out_dir=f'{tmp_path}/own', resume=True)
    monkeypatch.setattr(ranks, 'gather_objects', lambda items, run: ['shared/step_000004', *items])
    assert 'all nodes share' in refusal(checkpoint.open_out_dir, config, run)


def test_ranks_wait_two_hours_for_each_other(monkeypatch):
    joined = {}
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr(ranks.dist, 'rendezvous', lambda url: iter([('store', 0, 2)]))
    monkeypatch.setattr(ranks.dist, 'PrefixStore', lambda life, store: store)
    monkeypatch.setattr(ranks.dist, 'init_process_group', lambda *_, **how: joined.update(how))
    ranks.start(types.SimpleNamespace(device='cpu', seed=0))
    assert joined['timeout'].total_seconds() == 2 * 3600
