"""data/images.py on files made here: what each source lists, what each kind of picture becomes.

Also which images a step sees, and that what cannot be used is stepped over or refused in one line.
"""
import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import types
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin, TiffImagePlugin

import common
import config
from conftest import ROOT
from data import images, sources
from data.files import name_bytes, printable
from data.images import DataError, ImageError, open_data, open_images
from data.shapes import scenes as world
from running import lines, refusal, script

R = 16
rng = np.random.default_rng(0)


# --- files to read --------------------------------------------------------------------------------
def noise(w=R, h=R, channels=3):
    """(h, w, channels) uint8, or (h, w); no resampling leaves random pixels as they are."""
    shape = (h, w)
    if channels > 1:
        shape = (h, w, channels)
    return rng.integers(0, 256, shape, dtype=np.uint8)


def plain(red):
    """(R, R, 3) uint8 of one colour."""
    return np.full((R, R, 3), (red, 0, 0), np.uint8)


def save(path, pixels, **options):
    """Writes pixels, an array or an image, to a file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels
    if not isinstance(pixels, Image.Image):
        image = Image.fromarray(pixels)
    image.save(path, **options)
    return path


def encoded(pixels, kind='PNG', **options):
    """The bytes of an image file."""
    f = io.BytesIO()
    Image.fromarray(pixels).save(f, kind, **options)
    return f.getvalue()


def write(path, content):
    """Writes bytes or a str to a file, whose folder is made; returns its path as a str."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def make_tar(path, members, links=()):
    """members: [(name, bytes)]; links: [(name, target, tarfile type)]"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for name, target, kind in links:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = target
            tar.addfile(info)
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return str(path)


def jsonl(rows):
    """Rows as JSON lines."""
    return ''.join(json.dumps(row) + '\n' for row in rows)


def numbered(folder, n):
    """A folder of n plain images; image i has the red value 10 i: a batch says which it holds."""
    for i in range(n):
        save(folder / f'{i:02d}.png', plain(10 * i))
    return folder


# --- what was read --------------------------------------------------------------------------------
def image_of(s, i):
    """Image i of a set -> (R, R, 3) uint8"""
    x, _ = s.get(i)
    return ((x + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def reds(s, n):
    """The red values of the first n images' corners."""
    return [int(image_of(s, i)[0, 0, 0]) for i in range(n)]


def captions_of(s, n):
    """The first n captions."""
    return [s.get(i)[1] for i in range(n)]


def one(path, resolution=R):
    """The only image of a folder -> (R, R, 3) uint8"""
    return image_of(open_images(str(path.parent), resolution), 0)


def refused(match, *args, **keys):
    """open_images refuses these arguments with one line that matches."""
    with pytest.raises(DataError, match=match) as e:
        open_images(*args, **keys)
    assert '\n' not in str(e.value)


# --- folders --------------------------------------------------------------------------------------
def test_folder_is_recursive_and_sorted(tmp_path):
    for name in ['b.png', 'a/z.JPG', 'a/b/c.webp', 'c.bmp', 'd.tiff', 'e.gif', 'f.jpeg', 'g.v2.png',
                 '._b.png', '.ipynb_checkpoints/b.png', 'a/.cache/b.png', 'a/@eaDir/b.png']:
        save(tmp_path / name, noise())
    write(tmp_path / '._0.tar', b'what macOS adds to 0.tar')
    write(tmp_path / 'b.txt', '\ufeff a red cube \n')
    write(tmp_path / 'a/z.TXT', 'upper case')
    write(tmp_path / 'notes.md', 'no image')
    s = open_images(str(tmp_path), R)
    assert s.names == ['a/b/c.webp', 'a/z.JPG', 'b.png', 'c.bmp', 'd.tiff', 'e.gif', 'f.jpeg',
                       'g.v2.png']
    assert (len(s), s.left_out) == (8, 0)
    assert captions_of(s, 3) == [None, 'upper case', 'a red cube']
    matched = open_images(f'{tmp_path}/*.png,{tmp_path}/a/z.JPG', R)
    assert captions_of(matched, 3) == ['a red cube', None, 'upper case'], 'one by one as well'
    assert len(open_images(f'{tmp_path}/*', R)) == 8, 'of a glob, what may hold images'


def test_sources_that_are_not_there(tmp_path):
    (tmp_path / 'empty').mkdir()
    refused('no such file or folder.*nowhere', str(tmp_path / 'nowhere'), R)
    refused('no such file or folder', '', R)
    refused('empty: no images', str(tmp_path / 'empty'), R)
    refused('x.doc: expected a folder', write(tmp_path / 'x.doc', 'x'), R)


def test_a_folder_that_may_not_be_read_is_announced(tmp_path, monkeypatch, capsys):
    numbered(tmp_path / 'open', 2)
    numbered(tmp_path / 'shut', 2)
    scandir = os.scandir

    def guarded(path):
        if 'shut' in str(path):
            raise PermissionError(13, 'Permission denied', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', guarded)
    s = open_images(str(tmp_path), R)
    assert (len(s), s.left_out) == (2, 1)
    assert 'shut' in capsys.readouterr().out


def test_comma_and_glob_concatenate_with_unique_names(tmp_path):
    numbered(tmp_path / 'one', 2)
    numbered(tmp_path / 'two', 3)
    save(tmp_path / 'two' / '00#2.png', plain(50))
    make_tar(tmp_path / 't.tar', [('00.png', encoded(noise()))])
    s = open_images(f'{tmp_path}/one, {tmp_path}/two,{tmp_path}/*.tar', R)
    assert s.names == ['00.png', '01.png', '00#2.png', '00#2#2.png', '01#2.png', '02.png',
                       't.tar/00.png']
    assert reds(s, 6) == [0, 10, 50, 0, 10, 20]
    both = open_images(str(tmp_path), R)         # the images, then the shards
    assert len(both) == 7
    folder = numbered(tmp_path / 'a,b[1]', 1)    # these belong to a name
    assert len(open_images(str(folder), R)) == 1


# --- names that are any bytes ---------------------------------------------------------------------
NAMES = {
    b'caf\xe9.png': True,                        # Latin-1
    'été.png'.encode(): True,
    'é\n\x1b[31m.png'.encode(): False,
    b'\xff\xfe.png': False,
}
LIST_THEM = """
import sys
from data.images import open_images
s = open_images(sys.argv[1], 16)
rows = open_images(sys.argv[1] + '/m.jsonl', 16)
print(len(s.first(9)['names']), len(rows.first(9)['names']), sys.stdout.encoding)
"""


def of_any_bytes(folder):
    """A folder of NAMES, those that are True can be read, and a manifest of them."""
    os.makedirs(folder)
    for name, whole in NAMES.items():
        with open(os.path.join(os.fsencode(folder), name), 'wb') as f:
            f.write(encoded(plain(10)) if whole else b'broken')
    write(folder / 'm.jsonl', jsonl(dict(image=os.fsdecode(name)) for name in NAMES))
    return folder


def test_names_of_any_bytes(tmp_path, capsys):
    s = open_images(str(of_any_bytes(tmp_path / 'd')), R)
    found = s.first(9)
    assert [name_bytes(name) for name in found['names']] == sorted(
        name for name, whole in NAMES.items() if whole)
    out = capsys.readouterr().out                # a screen of UTF-8 shows no half characters
    assert out.count('\n') == 2
    assert 'é\\n\\x1b[31m.png' in out
    assert '\\udcff\\udcfe.png' in out
    assert printable('\ud83d') == '\\ud83d'
    assert name_bytes('\ud83d')


def test_names_of_any_bytes_in_a_strict_locale(tmp_path):
    env = dict(os.environ, LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0', PYTHONPATH=ROOT)
    env.pop('PYTHONIOENCODING', None)
    command = [sys.executable, '-c', LIST_THEM, str(of_any_bytes(tmp_path / 'd'))]
    done = subprocess.run(command, env=env, capture_output=True)
    said = done.stdout.decode('ascii').splitlines()
    assert len(said) == 5, done.stderr.decode()
    assert said[-1] == '2 2 ascii' or said[-1].startswith('2 2 ANSI')
    assert all(line.startswith('warning: skipped ') for line in said[:-1])


# --- pictures -------------------------------------------------------------------------------------
def test_exact_size_is_not_resampled(tmp_path):
    pixels = noise()
    save(tmp_path / 'x.png', pixels)
    x, _ = open_images(str(tmp_path), R).get(0)
    assert x.dtype == torch.float32
    assert x.shape == (3, R, R)
    assert x.is_contiguous()
    assert torch.equal(x, torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1)
    wide = np.pad(pixels, ((0, 0), (5, 5), (0, 0)))
    tall = np.pad(pixels, ((7, 7), (0, 0), (0, 0)))
    assert np.array_equal(one(save(tmp_path / 'wide' / 'x.png', wide)), pixels)
    assert np.array_equal(one(save(tmp_path / 'tall' / 'x.png', tall)), pixels)


def test_resize_is_antialiased_and_centred(tmp_path):
    dark = np.indices((64, 64)).sum(0) % 2
    board = np.repeat(dark[..., None] * 255, 3, 2).astype(np.uint8)
    edge = np.full((64, 30, 3), (255, 0, 0), np.uint8)
    wide = np.concatenate([edge, board, edge], 1)
    got = one(save(tmp_path / 'x.png', wide)).astype(int)
    # picking pixels would give 0 or 255; a crop that is off centre, red
    assert abs(got - 128).max() < 12
    small = save(tmp_path / 'up' / 'x.png', noise(9, 12))
    strip = save(tmp_path / 'strip' / 'x.png', noise(9, 60000))
    assert one(small).shape == (R, R, 3)         # enlarged
    assert one(strip).shape == (R, R, 3)


def test_jpeg_is_decoded_at_reduced_size(tmp_path, monkeypatch):
    line = np.linspace(0, 255, 512).astype(np.uint8)
    ramp = np.repeat(line[None, :, None], 512, 0).repeat(3, 2)
    path = save(tmp_path / 'x.jpg', ramp, quality=95)
    sizes = []
    draft = JpegImagePlugin.JpegImageFile.draft

    def spy(image, mode, size):
        answer = draft(image, mode, size)
        sizes.append(image.size)
        return answer

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, 'draft', spy)
    got = one(path).astype(int)
    assert sizes == [(64, 64)]                   # 512 / 8, still at least 2 R
    want = np.asarray(Image.fromarray(ramp).resize((R, R), Image.Resampling.LANCZOS))
    assert abs(got - want).max() <= 4
    one(save(tmp_path / 'small' / 'x.jpg', noise(100, 100)))
    assert sizes[1:] == [(50, 50)]               # a quarter would be less than 2 R


def test_modes_become_rgb(tmp_path):
    grey = noise(channels=1)
    three = np.repeat(grey[..., None], 3, 2)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(one(save(tmp_path / 'L' / 'x.png', grey)), three)
    assert np.array_equal(one(save(tmp_path / '16' / 'x.png', deep)), three)
    assert np.array_equal(one(save(tmp_path / '16t' / 'x.tiff', deep)), three)

    palette = Image.fromarray(noise()).quantize(16)
    got = one(save(tmp_path / 'P' / 'x.png', palette))
    assert np.array_equal(got, np.asarray(palette.convert('RGB')))

    cmyk = Image.new('CMYK', (R, R), (255, 0, 0, 0))                # cyan ink alone
    got = one(save(tmp_path / 'CMYK' / 'x.jpg', cmyk, quality=95)).astype(int)
    assert abs(got - (0, 255, 255)).max() < 6


def test_transparency_is_laid_on_white(tmp_path):
    rgba = noise(channels=4)
    rgba[:8, :, 3] = 255
    rgba[8:, :, 3] = 0
    got = one(save(tmp_path / 'RGBA' / 'x.png', rgba))
    assert np.array_equal(got[:8], rgba[:8, :, :3])
    assert (got[8:] == 255).all()

    half = np.zeros((R, R, 4), np.uint8)
    half[..., 3] = 128
    got = one(save(tmp_path / 'half' / 'x.webp', half, lossless=True)).astype(int)
    assert abs(got - 127).max() <= 1

    palette = Image.new('P', (R, R), 1)
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.paste(0, (0, 0, R, 8))
    got = one(save(tmp_path / 'P' / 'x.png', palette, transparency=0))
    assert (got[:8] == 255).all()                # colour 0 is the hole
    assert (got[8:] == (0, 200, 0)).all()


def test_deep_grey_and_what_has_no_known_range(tmp_path):
    """What a TIFF says of its values counts; what no file says is refused by its name."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262], tags[274] = 0, 3                  # white is zero, upside down
    grey = noise(channels=1)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    got = one(save(tmp_path / 'white' / 'x.tiff', deep, tiffinfo=tags))
    assert np.array_equal(got[..., 0], 255 - np.rot90(grey, 2))

    twelve = images.Image.fromarray(grey.astype(np.uint16) * 16)
    twelve.tag_v2 = {258: (12,)}
    assert np.array_equal(np.asarray(images.eight_bits(twelve)), grey)

    for mode, dtype in dict(F=np.float32, I=np.int32).items():
        save(tmp_path / mode / 'x.tiff', Image.fromarray((grey / 255).astype(dtype)))
        with pytest.raises(ImageError, match=f'mode {mode}: .*convert it to 8 or 16 bits'):
            one(tmp_path / mode / 'x.tiff')


@pytest.mark.parametrize('orientation, turns', [(3, 2), (6, -1), (8, 1)])
def test_exif_orientation(tmp_path, orientation, turns):
    """turns: how many quarter turns to the left put the picture upright."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = noise()
    got = one(save(tmp_path / 'x.png', pixels, exif=exif))
    assert np.array_equal(got, np.rot90(pixels, turns))


# --- pictures that cannot be read -----------------------------------------------------------------
def first_half(raw):
    return raw[:len(raw) // 2]


DAMAGED = {
    'empty': (b'', 'cannot identify'),
    'header only': (b'\x89PNG\r\n\x1a\n' + bytes(99), '.'),
    'zeros': (bytes(1000), 'cannot identify'),
    'jpeg cut': (first_half(encoded(noise(200, 200), 'JPEG')), 'truncated'),
    'png cut': (encoded(noise(99, 99))[:9000], 'truncated'),
    '1x1': (encoded(noise(1, 1)), 'too small, 1x1'),
    '100x7': (encoded(noise(100, 7)), 'too small, 100x7'),
    'pointer': (b'version https://git-lfs.github.com/spec/v1\noid 0\n', 'git lfs pull'),
    'postscript': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n', 'cannot identify'),
}


@pytest.mark.parametrize('raw, reason', DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_image(tmp_path, raw, reason):
    (tmp_path / 'x.png').write_bytes(raw)
    with pytest.raises(ImageError, match=reason) as e:
        open_images(str(tmp_path), R).get(0)
    assert ' at 0x' not in str(e.value)          # no memory address: the same in every run


def test_huge_image(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    # between the limit and twice the limit: read, and nothing said
    save(tmp_path / 'a.png', noise(40, 40))
    save(tmp_path / 'b.png', noise(50, 50))
    s = open_images(str(tmp_path), R)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        s.get(0)
    with pytest.raises(ImageError, match='exceeds limit'):
        s.get(1)


def test_damaged_is_replaced_by_the_next_and_named_once(tmp_path, capsys):
    numbered(tmp_path, 6)
    for name in ['02.png', '03.png', '05.png']:
        (tmp_path / name).write_bytes(b'broken')
    s = open_images(str(tmp_path), R)
    order = [int(images.permutation(1, 0, 6)[j]) for j in range(6)]
    # the next in index order, round the end
    stand_in = {0: 0, 1: 1, 2: 4, 3: 4, 4: 4, 5: 0}
    shown = [stand_in[i] for i in order]
    for _ in range(2):
        b = s.batch(1, 0, 6)
        red = b['x'][:, 0, 0, 0].add(1).mul(127.5).round()
        assert b['names'] == [f'{i:02d}.png' for i in shown]
        assert red.tolist() == [10 * i for i in shown]
    assert sorted(s.skipped) == ['02.png', '03.png', '05.png']
    assert 'cannot identify' in s.skipped['02.png']
    out = capsys.readouterr().out
    assert out.count('\n') == 3
    assert all(out.count(name) == 1 for name in s.skipped)


def test_nothing_readable(tmp_path):
    numbered(tmp_path, 3)
    for path in tmp_path.iterdir():
        path.write_bytes(b'broken')
    s = open_images(str(tmp_path), R)
    for _ in range(2):
        with pytest.raises(DataError, match='none of the 3 images'):
            s.batch(0, 0, 2)
    with pytest.raises(DataError, match='none of the 3 images'):
        s.first(2)


# --- which images a step sees ---------------------------------------------------------------------
def test_each_epoch_covers_each_image_once(tmp_path):
    s = open_images(str(numbered(tmp_path, 7)), R)
    seen = []
    for step in range(14):                       # 42 = 6 epochs; 3 does not divide 7
        seen += s.batch(5, step, 3)['names']
    epochs = [seen[i:i + 7] for i in range(0, 42, 7)]
    assert all(sorted(epoch) == s.names for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1              # shuffled anew
    wide = s.batch(5, 0, 14)                     # a step may span epochs
    assert sorted(wide['names']) == sorted(2 * s.names)


def test_step_is_a_pure_function(tmp_path):
    numbered(tmp_path, 9)
    a = open_images(str(tmp_path), R)
    b = open_images(str(tmp_path), R)
    late = b.batch(3, 11, 4)
    early = [a.batch(3, step, 4) for step in range(12)][11]
    assert early['names'] == late['names']
    assert torch.equal(early['x'], late['x'])
    # not drawn again for each image
    assert images.permutation(3, 0, 9) is images.permutation(3, 0, 9)
    assert (images.permutation(3, 1, 9) == np.random.default_rng([3, 1]).permutation(9)).all()
    three = [a.batch(3, step, 4)['names'] for step in range(3)]
    four = [a.batch(4, step, 4)['names'] for step in range(3)]
    assert three != four
    more = [a.batch(3, 0, 9, more=k)['names'] for k in range(3)]
    assert more[0] == a.batch(3, 0, 9)['names']
    assert len(set(map(tuple, more))) == 3, 'other images of the same step'
    assert more[1] == b.batch(3, 0, 9, more=1)['names']


@pytest.mark.parametrize('world', [2, 3, 6])
def test_rank_slices_make_up_the_batch(tmp_path, world):
    numbered(tmp_path, 8)
    (tmp_path / '03.png').write_bytes(b'broken')
    (tmp_path / '03.txt').write_text('caption of a broken one')
    (tmp_path / '04.txt').write_text('four')
    whole = open_images(str(tmp_path), R)
    ranks = [open_images(str(tmp_path), R) for _ in range(world)]
    for step in range(5):
        full = whole.batch(2, step, 12)
        parts = [s.batch(2, step, 12, rank, world) for rank, s in enumerate(ranks)]
        assert full['index'].dtype == torch.int64
        assert full['index'].tolist() == list(range(12))
        assert all(part['x'].shape == (12 // world, 3, R, R) for part in parts)
        for key in ['x', 'index']:
            assert torch.equal(full[key], torch.cat([part[key] for part in parts]))
        for key in ['names', 'captions']:
            assert full[key] == sum([part[key] for part in parts], [])
        for caption, name in zip(full['captions'], full['names']):
            assert caption == ('four' if name == '04.png' else None)


def test_ranks_have_to_fit(tmp_path):
    s = open_images(str(numbered(tmp_path, 3)), R)
    message = '5 images a step cannot be split evenly over 2 ranks'
    with pytest.raises(AssertionError, match=message):
        s.batch(0, 0, 5, 0, 2)
    with pytest.raises(DataError, match=r'more ranks \(4\) than images \(3\)'):
        s.batch(0, 0, 8, 0, 4)


def test_first(tmp_path):
    numbered(tmp_path, 6)
    for name in ['00.png', '05.png']:
        (tmp_path / name).write_bytes(b'broken')
    s = open_images(str(tmp_path), R)
    b = s.first(3)
    assert b['names'] == ['01.png', '02.png', '03.png']
    assert b['x'].shape == (3, 3, R, R)
    assert b['index'].tolist() == [0, 1, 2]
    assert b['captions'] == [None] * 3
    every = s.first(99)                          # no more, and none twice
    assert every['names'] == ['01.png', '02.png', '03.png', '04.png']
    assert sorted(s.skipped) == ['00.png', '05.png']


def test_small_sets_are_decoded_once(tmp_path, monkeypatch):
    numbered(tmp_path, 3)
    calls = []
    decode = images.decode

    def spy(raw, resolution):
        calls.append(1)
        return decode(raw, resolution)

    monkeypatch.setattr(images, 'decode', spy)
    s = open_images(str(tmp_path), R)
    x, _ = s.get(0)
    first = x.clone()
    x, _ = s.get(0)
    x.zero_()                                    # what a caller does to his x stays with him
    x, _ = s.get(0)
    assert torch.equal(x, first)
    assert len(calls) == 1
    monkeypatch.setattr(images, 'CACHE_BYTES', 3 * R * R * 3 - 1)
    s = open_images(str(tmp_path), R)
    s.get(0)
    s.get(0)
    assert len(calls) == 3


# --- captions -------------------------------------------------------------------------------------
NOTHING = ['', ' \n', '\u200b\ufeff', '\u3164', '\u2800', 'nan', 'None', ' null ', 'N/A']
NOT_TEXT = ['\ud83d', 'red \udce9']


def in_texts(folder, captions):
    """Captions beside images, in .txt files; returns --data."""
    for i, caption in enumerate(captions):
        save(folder / f'{i}.png', noise())
        raw = (caption or '').encode('utf-8', 'surrogatepass')
        write(folder / f'{i}.txt', raw)
    return str(folder)


def in_tar_json(folder, captions):
    """Captions in the .json beside images in a tar."""
    members = []
    for i, caption in enumerate(captions):
        members.append((f'{i}.png', encoded(noise())))
        members.append((f'{i}.json', json.dumps(dict(caption=caption)).encode()))
    return make_tar(folder / '0.tar', members)


def in_rows(folder, captions):
    """Captions in the rows of a manifest."""
    for i in range(len(captions)):
        save(folder / f'{i}.png', noise())
    rows = [dict(image=f'{i}.png', caption=caption) for i, caption in enumerate(captions)]
    return write(folder / 'm.jsonl', jsonl(rows))


@pytest.mark.parametrize('lay_out', [in_texts, in_tar_json, in_rows])
def test_captions_that_say_nothing_or_are_no_text(tmp_path, capsys, lay_out):
    """The former are no captions; the latter are stepped over, like damaged images."""
    said = ['None of it', '!', '紅い丸', '🔴']
    captions = [*said, *NOTHING, None, *NOT_TEXT]
    s = open_images(lay_out(tmp_path / 'd', captions), R)
    b = s.first(99)
    assert b['captions'] == [*said, *[None] * (len(NOTHING) + 1)]
    assert s.left_out + len(s.skipped) == 2
    assert 'not UTF-8, or has half a character' in capsys.readouterr().out
    s.keep_captioned()
    assert s.first(99)['captions'] == said


# --- manifests, CSV, parquet ----------------------------------------------------------------------
TALK = [
    {'from': 'human', 'value': '<image>\nwhat is it?'},
    {'from': 'gpt', 'value': 'a cube'},
    {'from': 'gpt', 'value': 'no'},
]
ROWS = [
    {'image': 'pics/02.png', 'caption': 'two, "2"'},
    {'image': 'pics/00.png', 'caption': TALK},
    {'image': '/pics/01.png'},
]


def as_csv(rows, **options):
    """The text of a CSV with these rows."""
    f = io.StringIO()
    writer = csv.DictWriter(f, ['image', 'caption'], **options)
    writer.writeheader()
    writer.writerows(rows)
    return f.getvalue()


FLAT = [ROWS[0], dict(ROWS[1], caption='a cube'), ROWS[2]]
FORMS = {
    'm.jsonl': jsonl(ROWS).replace('\n', '\n\n'),
    'm.jsonlines': '\ufeff' + jsonl(ROWS).replace('\n', '\r\n'),
    'm.json': json.dumps(ROWS),
    'lines.json': jsonl(ROWS),
    'list.jsonl': json.dumps(ROWS, indent=1),
    'named.json': json.dumps({str(i): row for i, row in enumerate(ROWS)}),
    'windows.json': json.dumps(ROWS).encode('utf-16'),
    'm.csv': '\ufeff' + as_csv(FLAT),
    'm.tsv': as_csv(FLAT, delimiter='\t'),
}


@pytest.mark.parametrize('name', FORMS)
def test_forms_of_tables(tmp_path, name):
    numbered(tmp_path / 'pics', 3)
    path = write(tmp_path / name, FORMS[name])
    s = open_images(path, R, image_root=str(tmp_path))
    assert s.names == ['pics/02.png', 'pics/00.png', 'pics/01.png']
    assert captions_of(s, 3) == ['two, "2"', 'a cube', None]
    assert reds(s, 3) == [20, 0, 10]


def test_manifest_keys_and_root(tmp_path):
    numbered(tmp_path / 'pics', 2)
    row = {'output_image': '/pics/01.png', 'instruction': 'draw', 'caption': 'no'}
    path = write(tmp_path / 'lists' / 'm.jsonl', jsonl([row]))
    s = open_images(path, R, image_key='output_image', caption_key='instruction',
                    image_root=str(tmp_path))
    assert captions_of(s, 1) == ['draw']
    assert s.names == ['pics/01.png']
    row['output_image'] = str(tmp_path / 'pics/01.png')
    s = open_images(write(tmp_path / 'lists' / 'm.jsonl', jsonl([row])), R, 'output_image')
    assert reds(s, 1) == [10]


GOOD = '{"image": "00.png", "caption": "t", "text": "t"}\n'
BAD_ROWS = {
    '{"image": \n': r'line 2: no path at .* no object but',
    '{"file_name": "00.png"}\n':
        r"line 2: no path at 'image' \(the image of --data_keys\); the keys there are: file_name",
    '{"image": null, "conversations": []}\n': r'line 2: no path',
    '{"image": ["00.png"]}\n': r'line 2: no path',
    '["00.png"]\n': r'line 2: .*no object but',
    '3\n': r'line 2: .*no object but 3',
    '{"image": "00.png", "caption": ["a", "b"]}\n': r'line 2: .*neither a string nor a convers',
    '{"image": "00.png", "caption": "\\ud83d"}\n': r'line 2: .*not UTF-8, or has half a char',
    '{"image": "gone.png"}\n': r'skipped gone.png: .*No such file',
    '{"image": "a\\u0000.png"}\n': r'skipped a\\x00.png: embedded null byte',
    '{"image": "\\ud83d.png"}\n': r'skipped \\ud83d.png: .*No such file',
}


@pytest.mark.parametrize('row, reason', BAD_ROWS.items())
def test_a_bad_row_is_stepped_over_and_counted(tmp_path, capsys, row, reason):
    """A whole table of them is refused."""
    numbered(tmp_path, 1)
    s = open_images(write(tmp_path / 'm.jsonl', GOOD + row + GOOD), R)
    assert s.batch(0, 0, 6)['names'] == s.first(9)['names'] * 3
    assert s.first(9)['names'] == ['00.png', '00#2.png']
    assert s.left_out + len(s.skipped) == 1
    out = capsys.readouterr().out
    assert out.count('\n') == 1
    assert re.search(reason, out)
    if s.left_out:
        reason = reason.replace('line 2', '(line|entry) .*')
    else:
        reason = 'its images are not there'
    refused(rf'm\.jsonl.*{reason}', write(tmp_path / 'm.jsonl', row * 2), R)


def test_what_is_left_out_is_said_by_one_rank(tmp_path, capsys, monkeypatch):
    numbered(tmp_path, 1)
    path = write(tmp_path / 'm.jsonl', GOOD + '3\n' * 5)
    monkeypatch.setenv('RANK', '1')
    assert open_images(path, R).left_out == 5
    assert capsys.readouterr().out == ''
    monkeypatch.setenv('RANK', '0')
    open_images(path, R)
    assert capsys.readouterr().out.count('cannot be used: 5, the first') == 1


BAD_TABLES = {
    'b.json': ('[\n{"image": "00.png"},\n{"image" "00.png"}]', r'b\.json line 3: not JSON'),
    'h.json': ('[]', r'h\.json: no images'),
    'i.csv': ('image,caption\n00.png,"open\n', r'i\.csv line 2: not CSV'),
    'j.csv': ('image,caption\n00.png,red, round\n', r'j\.csv line 2: .*1 cells more than'),
    'k.csv': ('url\nhttps://x.org/00.png\n', r"k\.csv line 2: no path at 'image'.*: url"),
    'l.csv': ('image\nhttps://x.org/00.png\n', r'l\.csv: its images are not.*img2dataset'),
    'm.jsonl': ('version https://git-lfs.github.com/spec/v1\noid 0\n', r'm\.jsonl: .*git lfs pull'),
}


@pytest.mark.parametrize('name', BAD_TABLES)
def test_tables_that_are_refused(tmp_path, name):
    numbered(tmp_path, 1)
    text, message = BAD_TABLES[name]
    refused(message, write(tmp_path / name, text), R)


def test_manifest_without_what_data_keys_name(tmp_path):
    numbered(tmp_path, 1)
    path = write(tmp_path / 'd.jsonl', GOOD)
    refused(r"d\.jsonl line 1: no key 'prompt' \(the caption of --data_keys, or stage 0's "
            r'--answer_key\); the keys there are: image caption text', path, R,
            caption_key='prompt')
    refused(r'its images are not there.* is the folder of --data_keys right',
            path, R, image_root=str(tmp_path / 'elsewhere'))
    path = write(tmp_path / 'e.jsonl', '{"image": "00.png", "text": "t"}\n')
    assert captions_of(open_images(path, R), 1) == [None]           # nobody asked for a caption


def parquet(path, images, **columns):
    """A parquet of groups of two rows."""
    import pyarrow
    from pyarrow.parquet import write_table
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(pyarrow.table(dict(image=images, **columns)), path, row_group_size=2)
    return str(path)


def test_parquet(tmp_path, monkeypatch, capsys):
    """Images in it, as the hub writes them or bare, or beside it; a row group is read at a time."""
    pytest.importorskip('pyarrow')
    raw = [encoded(plain(10 * i)) for i in range(5)]
    numbered(tmp_path / 'pics', 5)
    hub = [dict(bytes=raw[i], path=f'{i}.png') for i in range(5)]
    hub[2] = dict(bytes=raw[2], path=None)
    hub[3] = None
    texts = ['a', None, 'c', 'd', 'e']
    path = parquet(tmp_path / 'set' / '0.parquet', hub, text=texts)
    s = open_images(path, R, caption_key='text')
    assert s.names == [f'0.parquet/{name}' for name in ('0.png', '1.png', '000002', '000003',
                                                       '4.png')]
    b = s.first(9)
    assert b['captions'] == ['a', None, 'c', 'e']
    assert s.skipped == {'0.parquet/000003': 'no image in this row'}
    assert [image_of(s, i)[0, 0, 0] for i in (4, 0, 2, 1)] == [40, 0, 20, 10], 'in any order'
    assert captions_of(open_images(path, R), 1) == [None]
    refused(r"row 0: no key 'say'.*are: image text", path, R, caption_key='say')
    refused(r"row 0: no path at 'picture'.*are: image text", path, R, 'picture')

    parquet(tmp_path / 'set' / 'b' / '1.parquet', raw)
    write(tmp_path / 'set' / 'c.parquet', 'cut')
    both = open_images(str(tmp_path / 'set'), R)
    assert (len(both), both.left_out) == (10, 1)
    assert reds(both, 10)[-5:] == [0, 10, 20, 30, 40]
    paths = open_images(parquet(tmp_path / 'p.parquet', ['pics/03.png', 'pics/01.png']), R)
    assert reds(paths, 2) == [30, 10]
    assert sorted(file.name for file in tmp_path.iterdir()) == ['p.parquet', 'pics', 'set']


def test_parquet_without_its_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
    refused('pip install pyarrow', write(tmp_path / 'x.parquet', 'x'), R)
    monkeypatch.setitem(sys.modules, 'datasets', None)
    refused('hf:a/b: .*pip install datasets', 'hf:a/b', R)


def test_a_set_of_the_hub(tmp_path, monkeypatch):
    """The datasets library names the files of a split; they are read where the hub keeps them."""
    folder = numbered(tmp_path / 'pics', 4)
    shard = make_tar(tmp_path / '0.tar', [('0.png', encoded(plain(70)))])
    listed = write(folder / 'metadata.csv', 'file_name,text\n01.png,one\n')
    pictures = [str(folder / f'{i:02d}.png') for i in range(4)]
    files = dict(train=[shard], validation=pictures[:2], test=[*pictures, listed])
    opened = []

    class Builder:
        config = types.SimpleNamespace(data_files=files)

    def builder(*name):
        opened.append(name)
        if name[0] == 'a/gone':
            raise FileNotFoundError('no such\nset')
        return Builder

    library = types.ModuleType('datasets')
    library.load_dataset_builder = builder
    library.DownloadManager = lambda: types.SimpleNamespace(download=lambda files: files)
    monkeypatch.setitem(sys.modules, 'datasets', library)
    assert reds(open_images('hf:a/b', R), 1) == [70]
    both = open_images('hf:a/b:small:validation,hf:a/b', R)
    assert reds(both, 3) == [0, 10, 70]
    assert opened[1:] == [('a/b', 'small'), ('a/b',)]
    s = open_images('hf:a/b:test', R, 'file_name', 'text')
    assert captions_of(s, len(s)) == ['one']
    refused("hf:a/b:dev: no split 'dev'; there are: train validation test", 'hf:a/b:dev', R)
    refused('hf:a/gone: no such set', 'hf:a/gone', R)


def test_the_datasets_library_finds_files(tmp_path, monkeypatch):
    """The library itself, on a folder in place of a set on the hub."""
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    pytest.importorskip('datasets')
    parquet(tmp_path / 'd' / 'test-00000-of-00001.parquet', [encoded(plain(30))])
    parquet(tmp_path / 'd' / 'train-00000-of-00001.parquet', [encoded(plain(20))] * 2)
    assert reds(open_images(f'hf:{tmp_path}/d', R), 2) == [20, 20]
    assert reds(open_images(f'hf:{tmp_path}/d:test', R), 1) == [30]
    refused("no split 'dev'; there are: train test", f'hf:{tmp_path}/d:dev', R)


# --- tar shards -----------------------------------------------------------------------------------
def test_tar_members_with_one_stem_belong_together(tmp_path):
    a, b, c = noise(), noise(), noise()
    members = [
        ('x/001.json', b'{"prompt": "one"}'),
        ('x/000.png', encoded(a)),
        ('x/000.txt', b'zero\n'),
        ('x/000.json', b'{"prompt": "0"}'),
        ('x/000.mask.png', encoded(noise())),    # parts of a sample are no images of their own
        ('x/000.depth.16.png', encoded(noise())),
        ('x/001.PNG', encoded(b)),
        ('x/001.TXT', b'upper'),
        ('./y.v1/000.a.webp', encoded(c, 'WEBP', lossless=True)),    # a name with a dot is a name
        ('x/002.cls', b'7'),
        ('x/._000.png', b'?'),
        ('.thumbs/000.png', encoded(noise())),
    ]
    path = make_tar(tmp_path / '0.tar', members)
    s = open_images(path, R)
    assert s.names == ['0.tar/x/000.png', '0.tar/x/001.PNG', '0.tar/y.v1/000.a.webp']
    assert captions_of(s, 3) == ['zero', 'upper', None]
    for i, pixels in enumerate([a, b, c]):
        assert np.array_equal(image_of(s, i), pixels)
    prompts = open_images(path, R, caption_key='prompt')
    assert captions_of(prompts, 3) == ['0', 'one', None]


def test_tar_json_without_the_key(tmp_path):
    pictures = [(f'{i}.png', encoded(noise())) for i in range(3)]
    path = make_tar(tmp_path / 'a.tar', pictures + [('0.json', b'{"prompt": "p", "width": 3}')])
    refused("no key 'text'.*the keys there are: prompt width", path, R, caption_key='text')

    # only some are bad, the first too: skipped as a damaged image is
    texts = [('0.json', b'{"url": 3}'), ('1.json', b'{"text": "p"}'), ('2.json', b'{"te')]
    path = make_tar(tmp_path / 'b.tar', pictures + texts)
    s = open_images(path, R, caption_key='text')
    assert s.first(3)['captions'] == ['p']
    assert "no key 'text'" in s.skipped['b.tar/0.png']
    assert 'not JSON' in s.skipped['b.tar/2.png']
    assert captions_of(open_images(path, R), 1) == [None]

    path = make_tar(tmp_path / 'c.tar', pictures + [('0.json', b'[1]')])
    assert captions_of(open_images(path, R), 1) == [None]


def test_tar_members_cannot_escape(tmp_path):
    secret = save(tmp_path / 'secret.png', noise())
    pixels = [noise() for _ in range(3)]
    names = ['../x.png', '/tmp/nanouae_x.png', '../../x.png']
    members = [(name, encoded(picture)) for name, picture in zip(names, pixels)]
    links = [
        ('link.png', str(secret), tarfile.SYMTYPE),
        ('hard.png', '../secret.png', tarfile.LNKTYPE),
        ('dir.png', '', tarfile.DIRTYPE),
        ('fifo.png', '', tarfile.FIFOTYPE),
        ('dev.png', '', tarfile.CHRTYPE),
    ]
    path = make_tar(tmp_path / 'in' / 'evil.tar', members, links)
    before = sorted(tmp_path.rglob('*'))
    s = open_images(path, R)
    assert len(s) == 3
    for i, picture in enumerate(pixels):
        assert np.array_equal(image_of(s, i), picture)
    assert sorted(tmp_path.rglob('*')) == before
    assert not os.path.exists('/tmp/nanouae_x.png')
    for name in s.names:                         # joined to an output folder it stays in it
        assert not os.path.isabs(name)
        assert '..' not in name.split('/')
    assert len(set(s.names)) == 3


def test_folder_of_shards(tmp_path):
    for shard in ['b/c/0.tar', 'a/1.tar', 'a/0.tar']:
        make_tar(tmp_path / shard, [('0.png', encoded(noise())), ('0.txt', shard.encode())])
    s = open_images(str(tmp_path), R)
    assert captions_of(s, 3) == ['a/0.tar', 'a/1.tar', 'b/c/0.tar']
    assert s.names == ['0.tar/0.png', '1.tar/0.png', '0.tar/0#2.png']
    matched = open_images(f'{tmp_path}/**/0.tar', R)
    assert captions_of(matched, 2) == ['a/0.tar', 'b/c/0.tar']


def tar_bytes(tmp_path, mode='w'):
    """The bytes of a tar of two images of 29,954 bytes each."""
    pictures = np.random.default_rng(1).integers(0, 256, (2, 99, 99, 3), np.uint8)
    path = make_tar(tmp_path / 'whole' / 'a.tar', [(f'{i}.png', encoded(pictures[i]))
                                                   for i in range(2)])
    with open(path, 'rb') as f:
        raw = f.read()
    if mode == 'w':
        return raw
    with tarfile.open(tmp_path / 'packed', mode) as tar:
        tar.add(path, '0.png')
    return (tmp_path / 'packed').read_bytes()


BAD_TARS = {
    'junk.tar': (lambda tmp: b'junk' * 1000, 'not a readable tar'),
    'empty.tar': (lambda tmp: b'', 'not a readable tar'),
    'pointer.tar': (lambda tmp: b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
    'gz.tar': (lambda tmp: tar_bytes(tmp, 'w:gz'), r'gunzip -c .*gz\.tar > '),
    'x.tar.gz': (lambda tmp: tar_bytes(tmp, 'w:gz'), r'gunzip -c .*x\.tar\.gz > '),
    'x.tar.xz': (lambda tmp: tar_bytes(tmp, 'w:xz'), 'unxz -c'),
    'x.tar.bz2': (lambda tmp: tar_bytes(tmp, 'w:bz2'), 'bunzip2 -c'),
    'x.tar.zst': (lambda tmp: b'\x28\xb5\x2f\xfd', 'unzstd -c'),
    'none.tar': (lambda tmp: make_tar(tmp / 'n', [('a.txt', b'x')]) and (tmp / 'n').read_bytes(),
                 'no images in it'),
}


@pytest.mark.parametrize('name', BAD_TARS)
def test_a_bad_tar_of_three(tmp_path, capsys, name):
    """Is refused alone; among others, it is left out with a line."""
    make, reason = BAD_TARS[name]
    path = write(tmp_path / 'd' / name, make(tmp_path))
    refused(reason, path, R)
    for i in range(2):
        make_tar(tmp_path / 'd' / f'{i}.tar', [('0.png', encoded(plain(10 * i)))])
    for data in (f'{tmp_path}/d', f'{tmp_path}/d/*.tar*'):
        capsys.readouterr()
        s = open_images(data, R)
        assert reds(s, len(s)) == [0, 10]
        assert s.left_out == 1
        out = capsys.readouterr().out
        assert re.search(rf'^warning: left out .*{name}: .*{reason}', out)
        assert out.count('\n') == 1


CUTS = {
    'in an image': lambda raw: raw[:40000],
    'in a header': lambda raw: raw[:30720 + 100],
    'behind an image': lambda raw: raw[:30720],
    'a damaged header': lambda raw: raw[:30720] + b'x' * 512 + raw[30720 + 512:],
}


@pytest.mark.parametrize('cut', CUTS)
def test_a_cut_tar_gives_what_is_before_the_cut(tmp_path, capsys, cut):
    raw = CUTS[cut](tar_bytes(tmp_path))
    s = open_images(write(tmp_path / 'x.tar', raw), R)
    assert s.first(9)['names'] == ['x.tar/0.png']
    assert s.left_out == 1
    assert 'x.tar: cut or damaged behind' in capsys.readouterr().out


# --- what is trained on ---------------------------------------------------------------------------
def opened(data, training=True, **keys):
    """open_data of a run."""
    c = config.parse({}, {}, [f'--data={data}', '--eval_images=2'], 'x.py')
    vars(c).update(resolution=R, **keys)
    return open_data(c, types.SimpleNamespace(world=1), training)


def test_nothing_below_held_out_is_trained_on(tmp_path, capsys):
    """The embedded world's list, its folder, a glob of its folders, and a list of their images."""
    root = tmp_path / 'w'
    world.write(root, train=6, held_out=3)
    held = [f'held_out/{i:05d}.png' for i in range(3)]
    rows = [dict(image=str(root / name), file=name) for name in [*held, 'train/00000.png',
                                                                 'train/00001.png']]
    listed = write(tmp_path / 'm.jsonl', jsonl(rows))
    keys = ('file', 'caption', '')
    for data, n, data_keys in [(root / 'scenes.jsonl', 6, keys), (root, 6, ('image', 'caption', '')),
                               (f'{root}/*', 6, ('image', 'caption', '')),
                               (listed, 2, ('image', 'caption', ''))]:
        train, evaluated = opened(data, data_keys=data_keys)
        assert len(train) == n
        assert all('/train/' in os.path.abspath(image[0]) for image, _ in train.sources)
        assert len(evaluated['names']) == 2
        assert '3 images of ' in capsys.readouterr().out
        train, _ = opened(data, data_keys=data_keys, held_out=str(numbered(tmp_path / 'own', 3)))
        assert len(train) == n
    with pytest.raises(DataError, match='no image of it is left to train on'):
        opened(root / 'held_out')
    _, evaluated = opened(root / 'held_out', training=False)
    assert len(evaluated['names']) == 2


def test_left_out_rows_are_counted_with_the_held_out_set(tmp_path):
    numbered(tmp_path, 1)
    path = write(tmp_path / 'm.jsonl', GOOD * 4 + '3\n' * 5)
    train, held = opened(path)
    assert (len(train), held['skipped']) == (2, 5)
    other = write(tmp_path / 'other.jsonl', GOOD + '3\n')
    train, held = opened(path, held_out=other)
    assert (len(train), held['skipped']) == (4, 6)


def test_held_out_beside_the_embedded_world(tmp_path):
    train, held = opened('shapes', held_out=str(numbered(tmp_path, 3)))
    assert len(train) == 4096
    assert held['names'] == ['00.png', '01.png']
    assert held['scenes'] is None


# --- sample.py: captions for a whole folder -------------------------------------------------------
def sample(folder, out, *extra):
    """Captions of a folder by sample.py: {name: caption} of what stands in `out`."""
    script('sample', f'--image={folder}', f'--out_dir={out}', '--device=cpu',
           '--eval_temperature=1', '--eval_steps=1', *extra)
    captions = {}
    for row in lines(out / 'captions.jsonl'):
        captions[os.path.relpath(row['image'], folder)] = row['caption']
    return captions


def photos(folder, n=5):
    """n images in the folders 0 and 1."""
    for i in range(n):
        save(folder / f'{i % 2}' / f'{i:02d}.png', noise(32, 32))
    return folder


def test_captions_of_a_folder_do_not_depend_on_the_batch(tmp_path):
    """Nor on what else lies there; images with one stem have pictures of their own.

    The result is a manifest that opens.
    """
    folder = photos(tmp_path / 'in')
    save(folder / '0' / '00.bmp', noise(32, 32))
    (folder / '0' / '03.png').write_bytes(b'broken')
    one_by_one = sample(folder, tmp_path / 'one', '--batch=1')
    names = ['0/00.bmp', '0/00.png', '0/02.png', '0/04.png', '1/01.png', '1/03.png']
    assert sorted(one_by_one) == names
    assert len(set(one_by_one.values())) == 6, 'noise of its own each'
    assert sample(folder, tmp_path / 'all', '--batch=4') == one_by_one
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
    s = open_images(str(tmp_path / 'less' / 'captions.jsonl'), R)
    assert captions_of(s, len(s)) == list(less.values())


def test_captions_resume_after_a_kill(tmp_path, capsys):
    """A last line that was cut, in the middle of a letter too, is written anew.

    Whole ones stay, and nothing is there twice.
    """
    folder = photos(tmp_path / 'in')
    out = tmp_path / 'out'
    want = sample(folder, out, '--draw=False', '--batch=2')
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
    path = make_tar(tmp_path / 'a.tar', [('0.png', encoded(noise()))])
    assert 'inside a tar' in refusal(sample, path, out)
    assert 'lies in --image' in refusal(sample, folder, folder / 'out')
    assert '--batch: expected 1' in refusal(sample, folder, out, '--batch=0')


def test_captions_on_two_ranks_are_those_of_one(tmp_path, monkeypatch):
    """Rank 1 first, what it would send kept for rank 0.

    Lines are in the folder's order whoever captioned them.
    """
    folder = photos(tmp_path / 'in')
    out = tmp_path / 'two'
    (folder / '1' / '03.png').write_bytes(b'broken')
    want = sample(folder, tmp_path / 'one', '--draw=False')
    sent = []

    def start(rank):
        """Makes the next run one of two ranks."""
        run = types.SimpleNamespace(rank=rank, world=2, master=rank == 0, device='cpu')
        monkeypatch.setattr(common, 'start', lambda config: run)

    def send(items, run):
        sent.append(items)
        return items

    def receive(items, run):
        return items + sent.pop(0)

    monkeypatch.setattr(common, 'total', lambda value, run: value)
    start(1)
    monkeypatch.setattr(common, 'gather_objects', send)
    script('sample', f'--image={folder}', f'--out_dir={out}', '--eval_temperature=1',
           '--draw=False', '--batch=2')
    assert sum(len(part) for part in sent) == 2
    assert len(sent) == 2
    assert not (out / 'captions.jsonl').exists()

    start(0)
    monkeypatch.setattr(common, 'gather_objects', receive)
    assert sample(folder, out, '--draw=False', '--batch=2') == want
    order = [row['image'] for row in lines(out / 'captions.jsonl')]
    assert len(order) == 4
    assert order == sorted(order)


# --- the layouts of data/README.md ----------------------------------------------------------------
SETS = dict(blip='blip3o-60k', t2i='t2i-2m', echo='Echo-4o-Image', share='sharegpt-4o',
            docci='docci/', llava='llava/', megalith='megalith/tars', laion='laion/tars')


def in_tars(folder, text_of):
    """Two tars of one picture; text_of(i) -> {suffix: text} of what lies beside picture i."""
    for i in range(2):
        stem = f'{i:09d}'
        members = [(f'{stem}.jpg', encoded(plain(10 * i), 'JPEG', quality=95))]
        for suffix, text in text_of(i).items():
            members.append((stem + suffix, text.encode()))
        make_tar(folder / f'{i:05d}.tar', members)


def lay_out_tars(sets):
    """Miniatures of the sets that come as tars."""
    def blip(i):
        return {'.txt': f'blip {i}'}

    def t2i(i):
        return {'.json': json.dumps(dict(prompt=f't2i {i}'))}

    def megalith(i):
        return {'.json': json.dumps(dict(url='u', key=f'{i:09d}', status='success'))}

    def laion(i):
        return {'.txt': f'laion {i}', '.json': json.dumps(dict(caption=f'laion {i}', url='u'))}

    in_tars(sets / 'blip3o-60k', blip)
    in_tars(sets / 't2i-2m' / 'data_512_2M', t2i)
    in_tars(sets / 'megalith' / 'tars', megalith)
    in_tars(sets / 'laion' / 'tars', laion)


def lay_out_manifests(sets):
    """Miniatures of the sets that come as a manifest and images."""
    echo = sets / 'Echo-4o-Image' / 'Instruction-Following-Image'
    share = sets / 'sharegpt-4o'
    docci = sets / 'docci'
    llava = sets / 'llava'
    rows = dict(echo=[], share=[], docci=[], llava=[], hf=[])
    save(docci / 'images' / 'x.jpg', plain(0))   # in no manifest
    for i in range(2):
        picture = plain(10 * i)
        save(echo / 'images' / f'{i:05d}.jpg', picture, quality=95)
        output = f'/Echo-4o-Image/Instruction-Following-Image/images/{i:05d}.jpg'
        rows['echo'].append(dict(task_type='t2i', instruction=f'echo {i}', type='x',
                                 output_image=output))

        save(share / 'text_to_image' / f'image_{i}.png', picture)
        rows['share'].append(dict(input_prompt=f'share {i}',
                                  output_image=f'text_to_image/image_{i}.png',
                                  output_image_resolution=[R, R]))

        save(docci / 'images' / f'train_{i:05d}.jpg', picture, quality=95)
        rows['docci'].append(dict(example_id=f'train_{i:05d}', split='train',
                                  image_file=f'train_{i:05d}.jpg', description=f'docci {i}'))

        save(llava / 'images' / f'0000{i}' / f'{i}.jpg', picture, quality=95)
        question = {'from': 'human', 'value': '<image>\nDescribe.'}
        answer = {'from': 'gpt', 'value': f'llava {i}'}
        rows['llava'].append(dict(id=str(i), image=f'0000{i}/{i}.jpg',
                                  conversations=[question, answer]))

        save(sets / 'hf' / f'{i}.png', picture)
        rows['hf'].append(dict(file_name=f'{i}.png', text=f'hf {i}'))
    write(echo / 'Instruction-Following-Image.jsonl', jsonl(rows['echo']))
    write(share / 'text_to_image.json', json.dumps(rows['share']))
    write(docci / 'docci_descriptions.jsonlines', jsonl(rows['docci']))
    write(llava / 'blip_laion_cc_sbu_558k.json', json.dumps(rows['llava']))
    write(sets / 'hf' / 'metadata.jsonl', jsonl(rows['hf']))


def commands_of(text, sets):
    """The training commands on a public set that a README shows, as a shell would read them."""
    commands = []
    for block in re.findall(r'^```sh\n(.*?)^```', text, re.S | re.M):
        block = block.replace('\\\n', ' ').replace('$SETS', str(sets))
        for line in block.splitlines():
            if line.startswith('python ') and str(sets) in line:
                commands.append(shlex.split(line)[1:])
    return commands


def test_every_command_of_the_readme_finds_its_set(tmp_path):
    """Miniatures of the public sets as their downloads and the README's commands leave them.

    Each of two pictures, the second with red value 10. --data and --data_keys are taken from
    data/README.md itself.
    """
    with open('data/README.md', encoding='utf-8') as f:
        text = f.read()
    sets = tmp_path / 'sets'
    lay_out_tars(sets)
    lay_out_manifests(sets)
    found = {}
    for script_name, *arguments in commands_of(text, sets):
        keys = config.parse({}, {}, arguments, script_name)
        s = open_images(keys.data, R, *keys.data_keys)
        [name] = [name for name, folder in SETS.items() if f'{sets}/{folder}' in keys.data]
        found[name] = captions_of(s, len(s))
        assert len(s) == 2, name
        assert np.allclose(reds(s, 2), [0, 10], rtol=0, atol=3), name
        if script_name == 'pretrain_decoder.py':
            assert found[name] == [f'{name} 0', f'{name} 1'], 'a command that needs captions'
    want = {name: [f'{name} 0', f'{name} 1'] for name in SETS}
    want['megalith'] = [None, None]
    assert found == want

    flag = re.search(r'`--data=FOLDER/metadata.jsonl (--data_keys=.*?)`', text)[1]
    keys = config.parse({}, {}, shlex.split(flag), 'x.py')
    s = open_images(str(sets / 'hf' / 'metadata.jsonl'), R, *keys.data_keys)
    assert captions_of(s, 2)[1] == 'hf 1'
