"""sample.py on a whole folder: captions that depend on nothing else, and a run that goes on."""
import os
import tarfile
import types

import numpy as np
import pytest
from PIL import Image

from lib import ranks, scores
from data.images import open_images
from running import lines, refusal, script

rng = np.random.default_rng(0)


def save(path):
    """A picture of noise; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


def sample(folder, out, *extra):
    """Captions of a folder by sample.py: {name: caption} of what stands in `out`."""
    script('sample', f'--image={folder}', f'--out_dir={out}', '--device=cpu',
           '--temperature=1', '--eval_denoise_steps=1', *extra)
    captions = {}
    for row in lines(out / 'captions.jsonl'):
        captions[os.path.relpath(row['image'], folder)] = row['caption']
    return captions


def photos(folder, n=5):
    """n images in the folders 0 and 1."""
    for i in range(n):
        save(folder / f'{i % 2}' / f'{i:02d}.png')
    return folder


def test_captions_of_a_folder_do_not_depend_on_the_batch(tmp_path, monkeypatch):
    """Nor on what else lies there; images with one stem have pictures of their own.

    The result is a manifest that opens.
    """
    folder = photos(tmp_path / 'in')
    save(folder / '0' / '00.bmp')
    (folder / '0' / '03.png').write_bytes(b'broken')
    monkeypatch.setattr(scores, 'images_at_once', lambda config: 1)
    one_by_one = sample(folder, tmp_path / 'one')
    names = ['0/00.bmp', '0/00.png', '0/02.png', '0/04.png', '1/01.png', '1/03.png']
    assert sorted(one_by_one) == names
    assert len(set(one_by_one.values())) == 6, 'noise of its own each'
    monkeypatch.setattr(scores, 'images_at_once', lambda config: 4)
    assert sample(folder, tmp_path / 'all') == one_by_one
    for name in names:
        if '/00.' in name:
            file = f'{name}.png'                 # two with the stem 00: the whole name
        else:
            file = name
        a = np.asarray(Image.open(tmp_path / 'one' / file)).astype(int)
        b = np.asarray(Image.open(tmp_path / 'all' / file)).astype(int)
        assert a.shape == (32, 64, 3)
        assert abs(a - b).max() <= 1
    assert not (tmp_path / 'all' / '0' / '03.png').exists()

    (folder / '0' / '02.png').unlink()
    one_by_one.pop('0/02.png')
    less = sample(folder, tmp_path / 'less', '--draw=False')
    assert less == one_by_one
    assert not list((tmp_path / 'less').rglob('*.png'))
    assert sample(folder, tmp_path / 'other', '--draw=False', '--seed=3') != less
    s = open_images(str(tmp_path / 'less' / 'captions.jsonl'), 32)
    assert s.first(9)['captions'] == list(less.values())


def test_captions_resume_after_a_kill(tmp_path, capsys, monkeypatch):
    """A last line that was cut, in the middle of a letter too, is written anew.

    Whole ones stay, and nothing is there twice.
    """
    folder = photos(tmp_path / 'in')
    out = tmp_path / 'out'
    monkeypatch.setattr(scores, 'images_at_once', lambda config: 2)
    want = sample(folder, out, '--draw=False')
    path = out / 'captions.jsonl'
    whole = path.read_bytes()
    second = whole.index(b'\n') + 20             # in the second line
    half_a_letter = 'é'.encode()[:1]
    cuts = [whole[:-9], whole[:-1], whole[:second], whole[:7], b'', whole[:-1] + half_a_letter]
    for cut in cuts:
        path.write_bytes(cut)
        kept = cut.count(b'\n')                  # what stands behind the last one is no line
        capsys.readouterr()
        assert sample(folder, out, '--draw=False') == want
        assert len(lines(path)) == 5
        assert f'{5 - kept} captions more, {kept} were there' in capsys.readouterr().out
    path.write_bytes(b'{"picture": 3}\n')
    assert 'captions.jsonl' in refusal(sample, folder, out)


def test_a_picture_is_there_before_its_line(tmp_path, monkeypatch):
    """A run killed between the two draws the picture again instead of leaving it out for ever."""
    photos(tmp_path / 'in', 2)

    def interrupt(*args, **keys):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, 'save', interrupt)
    with pytest.raises(KeyboardInterrupt):
        sample(tmp_path / 'in', tmp_path / 'out')
    assert not (tmp_path / 'out' / 'captions.jsonl').exists()


def test_folders_that_sample_refuses(tmp_path):
    folder = photos(tmp_path / 'in', 2)
    out = tmp_path / 'out'
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        tar.add(folder / '0' / '00.png', '0.png')
    assert 'inside a tar' in refusal(sample, tmp_path / 'a.tar', out)
    assert 'lies in --image' in refusal(sample, folder, folder / 'out')


def test_captions_on_two_ranks_are_those_of_one(tmp_path, monkeypatch):
    """Rank 1 first, what it would send kept for rank 0.

    Lines are in the folder's order whoever captioned them.
    """
    folder = photos(tmp_path / 'in')
    out = tmp_path / 'two'
    (folder / '1' / '03.png').write_bytes(b'broken')
    want = sample(folder, tmp_path / 'one', '--draw=False')
    sent = []
    monkeypatch.setattr(scores, 'images_at_once', lambda config: 2)

    def start(rank):
        """Makes the next run one of two ranks."""
        run = types.SimpleNamespace(rank=rank, world=2, master=rank == 0, device='cpu')
        monkeypatch.setattr(ranks, 'start', lambda config: run)

    def send(items, run):
        sent.append(items)
        return items

    def receive(items, run):
        return items + sent.pop(0)

    monkeypatch.setattr(ranks, 'total', lambda value, run: value)
    start(1)
    monkeypatch.setattr(ranks, 'gather_objects', send)
    script('sample', f'--image={folder}', f'--out_dir={out}', '--temperature=1',
           '--draw=False')
    assert sum(len(part) for part in sent) == 2
    assert len(sent) == 2
    assert not (out / 'captions.jsonl').exists()

    start(0)
    monkeypatch.setattr(ranks, 'gather_objects', receive)
    assert sample(folder, out, '--draw=False') == want
    order = [row['image'] for row in lines(out / 'captions.jsonl')]
    assert len(order) == 4
    assert order == sorted(order)
