"""data/ on files made here: what each source lists, what each kind of picture becomes.

Also which images a step sees, and that what cannot be used is stepped over or refused in one line.
"""
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

import config
import pretrain_decoder
from conftest import ROOT
from data import images
from data.files import name_bytes, printable
from data.images import DataError, ImageError, keep_captioned, open_data, open_images
from data.shapes import scenes as world

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
    """Writes bytes or a str to a file; returns its path as a str."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def tar_of(members, links=(), mode='w'):
    """The bytes of a tar. members: [(name, bytes)]; links: [(name, target, tarfile type)]"""
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode=mode) as tar:
        for name, target, kind in links:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = target
            tar.addfile(info)
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return f.getvalue()


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
    x, *_ = s.get(i)
    return ((x + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def reds(s, indices=None):
    """The red values of these images' corners, of all by default."""
    return [int(image_of(s, i)[0, 0, 0]) for i in indices or range(len(s))]


def captions_of(s):
    """All captions."""
    return [s.get(i)[1] for i in range(len(s))]


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
    write(tmp_path / '.old' / '0.tar', b'x')
    write(tmp_path / 'b.txt', '\ufeff a red cube \n')
    write(tmp_path / 'a/z.TXT', 'upper case')
    write(tmp_path / 'notes.md', 'no image')
    s = open_images(str(tmp_path), R)
    assert s.names == ['a/b/c.webp', 'a/z.JPG', 'b.png', 'c.bmp', 'd.tiff', 'e.gif', 'f.jpeg',
                       'g.v2.png']
    assert len(s) == 8
    assert s.left_out == 0
    assert captions_of(s) == [None, 'upper case', 'a red cube', *[None] * 5]
    matched = open_images(f'{tmp_path}/*.png,{tmp_path}/a/z.JPG', R)
    assert captions_of(matched) == ['a red cube', None, 'upper case'], 'one by one as well'
    matched = open_images(f'{tmp_path}/*', R)
    assert len(matched) == 8
    assert matched.left_out == 0, 'of a glob, what may hold images'


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
    assert len(s) == 2
    assert s.left_out == 1
    assert 'shut' in capsys.readouterr().out


def test_comma_and_glob_concatenate_with_unique_names(tmp_path):
    numbered(tmp_path / 'one', 2)
    numbered(tmp_path / 'two', 3)
    save(tmp_path / 'two' / '00#2.png', plain(50))
    write(tmp_path / 't.tar', tar_of([('00.png', encoded(plain(60)))]))
    s = open_images(f'{tmp_path}/one, {tmp_path}/two,{tmp_path}/*.tar', R)
    assert s.names == ['00.png', '01.png', '00#2.png', '00#3.png', '01#2.png', '02.png',
                       't.tar/00.png']
    assert reds(s) == [0, 10, 50, 0, 10, 20, 60]
    assert len(open_images(str(tmp_path), R)) == 7
    folder = numbered(tmp_path / 'a,b[1]', 1)    # these belong to a name
    assert len(open_images(str(folder), R)) == 1


NAMES = {
    b'caf\xe9.png': True,                        # Latin-1
    'été.png'.encode(): True,
    'é\n\x1b[31m.png'.encode(): False,
    b'\xff\xfe.png': False,
}
LIST_THEM = """
import sys
from data.images import open_images
for data in (sys.argv[1], sys.argv[1] + '/m.jsonl'):
    print(len(open_images(data, 16).first(9)['names']))
"""


def test_names_of_any_bytes(tmp_path, capsys):
    """Read and announced in every locale. NAMES: those that are True are images."""
    folder = tmp_path / 'd'
    write(folder / 'm.jsonl', jsonl(dict(image=os.fsdecode(name)) for name in NAMES))
    for name, whole in NAMES.items():
        with open(os.path.join(os.fsencode(folder), name), 'wb') as f:
            f.write(encoded(plain(10)) if whole else b'broken')
    found = open_images(str(folder), R).first(9)['names']
    assert [name_bytes(name) for name in found] == [b'caf\xe9.png', 'été.png'.encode()]
    out = capsys.readouterr().out                # a screen of UTF-8 has no half characters
    assert out.count('\n') == 2
    assert 'é\\n\\x1b[31m.png' in out
    assert '\\udcff\\udcfe.png' in out
    assert printable('\ud83d') == '\\ud83d'

    env = dict(os.environ, LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0', PYTHONPATH=ROOT)
    command = [sys.executable, '-c', LIST_THEM, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True)
    said = done.stdout.decode('ascii').splitlines()
    assert [line for line in said if 'warning' not in line] == ['2', '2'], done.stderr.decode()
    assert len(said) == 6


# --- pictures -------------------------------------------------------------------------------------
def test_exact_size_is_not_resampled(tmp_path):
    pixels = noise()
    save(tmp_path / 'x.png', pixels)
    x, *_ = open_images(str(tmp_path), R).get(0)
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

    twelve = Image.fromarray(grey.astype(np.uint16) * 16)
    assert np.array_equal(images.eight_bits(twelve, {258: (12,)}), grey)
    exif = Image.Exif()
    exif[274] = 3
    got = one(save(tmp_path / 'turned' / 'x.png', deep, exif=exif))
    assert np.array_equal(got[..., 0], np.rot90(grey, 2))

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
    for i in range(3):
        write(tmp_path / f'{i}.png', b'broken')
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
    x, *_ = s.get(0)
    first = x.clone()
    x, *_ = s.get(0)
    x.zero_()                                    # what a caller does to his x stays with him
    x, *_ = s.get(0)
    assert torch.equal(x, first)
    assert len(calls) == 1
    monkeypatch.setattr(images, 'CACHE_BYTES', 3 * R * R * 3 - 1)
    s = open_images(str(tmp_path), R)
    s.get(0)
    s.get(0)
    assert len(calls) == 3


# --- captions -------------------------------------------------------------------------------------
SAID = ['None of it', '!', '紅い丸', '🔴']
NOTHING = ['', ' \n', '\u200b\ufeff', '\u3164', '\u2800', 'nan', 'None', ' null ', 'N/A', None]
NO_TEXT = ['\ud83d', 'red \udce9']
CAPTIONS = [*SAID, *NOTHING, *NO_TEXT]


@pytest.mark.parametrize('kind', ['txt', 'jsonl', 'tar'])
def test_captions_that_say_nothing_or_are_no_text(tmp_path, capsys, kind):
    """The former are no captions; the latter are stepped over, as damaged images are."""
    rows, members = [], []
    for i, caption in enumerate(CAPTIONS):
        row = dict(image=f'{i:02d}.png', caption=caption)
        rows.append(row)
        members.append((row['image'], encoded(plain(i))))
        if kind == 'tar':
            members.append((f'{i:02d}.json', json.dumps(row).encode()))
        if kind == 'txt':
            members.append((f'{i:02d}.txt', (caption or '').encode(errors='surrogatepass')))
    data = write(tmp_path / 'd.tar', tar_of(members))
    if kind != 'tar':
        with tarfile.open(data) as tar:
            tar.extractall(tmp_path / 'd', filter='data')
        data = str(tmp_path / 'd')
    if kind == 'jsonl':
        data = write(tmp_path / 'd' / 'm.jsonl', jsonl(rows))
    s = open_images(data, R)
    assert s.first(99)['captions'] == SAID + [None] * len(NOTHING)
    assert s.left_out + len(s.skipped) == 2
    assert 'not UTF-8, or has half a character' in capsys.readouterr().out
    keep_captioned(s, config.parse({}, {}, [], 'x.py'), types.SimpleNamespace(master=True))
    assert s.first(99)['captions'] == SAID


# --- manifests and CSV ----------------------------------------------------------------------------
TALK = [
    {'from': 'human', 'value': '<image>\nwhat is it?'},
    {'from': 'gpt', 'value': 'a cube'},
    {'from': 'gpt', 'value': 'no'},
]
ROWS = [
    {'image': 'pics/02.png', 'caption': 'two, "2"'},
    {'image': 'pics/00.png', 'caption': TALK},
    {'image': '/pics/01.png', 'caption': float('nan')},             # as pandas writes what is not
]
CSV = 'image,caption\npics/02.png,"two, ""2"""\r\npics/00.png,a cube\n/pics/01.png\n'
FORMS = {
    'm.jsonl': jsonl(ROWS).replace('\n', '\n\n'),
    'm.jsonlines': '\ufeff' + jsonl(ROWS).replace('\n', '\r\n'),
    'm.json': json.dumps(ROWS),
    'lines.json': jsonl(ROWS),
    'list.jsonl': json.dumps(ROWS, indent=1),
    'named.json': json.dumps({str(i): row for i, row in enumerate(ROWS)}),
    'windows.json': json.dumps(ROWS).encode('utf-16'),
    'm.csv': '\ufeff' + CSV,
    'm.tsv': 'image\tcaption\npics/02.png\ttwo, "2"\npics/00.png\ta cube\n/pics/01.png\t\n',
}


@pytest.mark.parametrize('name', FORMS)
def test_forms_of_tables(tmp_path, name):
    numbered(tmp_path / 'pics', 3)
    s = open_images(write(tmp_path / name, FORMS[name]), R, image_root=str(tmp_path))
    assert s.names == ['pics/02.png', 'pics/00.png', 'pics/01.png']
    assert captions_of(s) == ['two, "2"', 'a cube', None]
    assert reds(s) == [20, 0, 10]


def test_manifest_keys_and_root(tmp_path):
    numbered(tmp_path / 'pics', 2)
    row = {'output_image': '/pics/01.png', 'instruction': 'draw', 'caption': 'no'}
    path = write(tmp_path / 'lists' / 'm.jsonl', jsonl([row]))
    s = open_images(path, R, image_key='output_image', caption_key='instruction',
                    image_root=str(tmp_path))
    assert captions_of(s) == ['draw']
    assert reds(s) == [10]
    for file in (str(tmp_path / 'pics/01.png'), '../pics/01.png'):
        path = write(tmp_path / 'lists' / 'm.jsonl', jsonl([dict(image=file)]))
        assert reds(open_images(path, R)) == [10]


GOOD = '{"image": "00.png", "caption": "t", "text": "t"}\n'
BAD_ROWS = {
    '{"image": \n': 'line 2: no path at .* no object but',
    '{"file": "00.png"}\n': r"line 2: no path at 'image' \(the image of --data_keys\); the keys "
                            'there are: file',
    '{"image": null, "conversations": []}\n': 'line 2: no path',
    '{"image": ["00.png"]}\n': 'line 2: no path',
    '["00.png"]\n': 'line 2: .*no object but',
    '{"image": "00.png", "caption": ["a", "b"]}\n': 'line 2: .*neither a string nor a convers',
    '{"image": "00.png", "caption": "\\ud83d"}\n': 'line 2: .*not UTF-8, or has half a char',
    '{"image": "gone.png"}\n': "skipped gone.png: .*No such file.*: '/",
    '{"image": "a\\u0000.png"}\n': r'skipped a\\x00.png: embedded null byte',
    '{"image": "\\ud83d.png"}\n': r'skipped \\ud83d.png: .*No such file',
}


@pytest.mark.parametrize('row', BAD_ROWS)
def test_a_bad_row_is_stepped_over_and_counted(tmp_path, capsys, row):
    numbered(tmp_path, 1)
    s = open_images(write(tmp_path / 'm.jsonl', GOOD + row + GOOD), R)
    assert set(s.batch(0, 0, 6)['names']) == {'00.png', '00#2.png'}
    assert s.left_out + len(s.skipped) == 1
    out = capsys.readouterr().out
    assert out.count('\n') == 1
    assert re.search(BAD_ROWS[row], out)


def test_what_is_left_out_is_said_by_one_rank(tmp_path, capsys, monkeypatch):
    numbered(tmp_path, 1)
    path = write(tmp_path / 'm.jsonl', GOOD + '3\n' * 5)
    for rank in '10':
        monkeypatch.setenv('RANK', rank)
        assert capsys.readouterr().out == ''
        assert open_images(path, R).left_out == 5
    assert capsys.readouterr().out.count('cannot be used: 5, the first') == 1


BAD_TABLES = {
    'a.json': ('[\n{"image": "00.png"},\n{"image" "00.png"}]', r'a\.json line 3: not JSON'),
    'b.json': ('[]', r'b\.json: no images'),
    'c.jsonl': ('3\n{"a": 1}', r'c\.jsonl line 1: no path .*no object but 3'),
    'd.jsonl': ('{"image": "x.png"}', r'd\.jsonl: its images are not there.*folder of --data_k'),
    'e.jsonl': ('version https://git-lfs.github.com/spec/v1\noid 0\n', r'e\.jsonl: .*git lfs pull'),
    'f.csv': ('image,caption\n00.png,"open\n', r'f\.csv line 2: not CSV'),
    'g.csv': ('image,caption\n00.png,red, round\n', r'g\.csv line 2: .*1 cells more than'),
    'h.csv': ('url\nhttps://x.org/00.png\n', r"h\.csv line 2: no path at 'image'.*: url"),
    'i.csv': ('image\nhttps://x.org/00.png\n', r'i\.csv: its images are not.*img2dataset'),
    'j.parquet': ('cut', r'j\.parquet: (not a readable|needs pyarrow)'),
}


@pytest.mark.parametrize('name', BAD_TABLES)
def test_tables_that_are_refused(tmp_path, name):
    numbered(tmp_path, 1)
    text, message = BAD_TABLES[name]
    refused(message, write(tmp_path / name, text), R)


def test_a_key_that_was_asked_for_has_to_be_there(tmp_path):
    numbered(tmp_path, 1)
    path = write(tmp_path / 'd.jsonl', '{"image": "00.png", "text": "t"}\n')
    refused(r"d\.jsonl line 1: no key 'prompt' \(the caption of --data_keys, or stage 0's "
            r'--answer_key\); the keys there are: image text', path, R, caption_key='prompt')
    assert captions_of(open_images(path, R)) == [None]              # nobody asked for a caption


# --- parquet and the hub --------------------------------------------------------------------------
def parquet(path, images, **columns):
    """Writes groups of two rows."""
    import pyarrow
    from pyarrow.parquet import write_table
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(pyarrow.table(dict(image=images, **columns)), path, row_group_size=2)
    return str(path)


def test_parquet(tmp_path):
    """With images in it, as the hub writes them or bare, or beside it."""
    pytest.importorskip('pyarrow')
    numbered(tmp_path / 'pics', 5)
    raw = [encoded(plain(10 * i)) for i in range(5)]
    hub = [dict(bytes=raw[i], path=f'{i}.png') for i in range(5)]
    hub[2]['path'] = None
    hub[3] = None
    path = parquet(tmp_path / 'set' / '0.parquet', hub, text=['a', None, 'c', 'd', 'e'])
    s = open_images(path, R, caption_key='text')
    files = ['0.png', '1.png', '000002', '000003', '4.png']
    assert s.names == [f'0.parquet/{file}' for file in files]
    assert s.first(9)['captions'] == ['a', None, 'c', 'e']
    assert s.skipped == {'0.parquet/000003': 'no image in this row'}
    assert reds(s, [4, 0, 2, 1]) == [40, 0, 20, 10], 'in any order'
    refused(r"row 0: no key 'say'.*are: image text", path, R, caption_key='say')
    refused(r"row 0: no path at 'picture'.*are: image text", path, R, 'picture')

    parquet(tmp_path / 'set' / 'b' / '1.parquet', raw)
    write(tmp_path / 'set' / 'c.parquet', 'cut')
    both = open_images(str(tmp_path / 'set'), R)
    assert both.left_out == 1
    assert reds(both, range(5, 10)) == [0, 10, 20, 30, 40]
    paths = parquet(tmp_path / 'p.parquet', ['pics/03.png', 'pics/01.png'])
    assert reds(open_images(paths, R)) == [30, 10]
    lists = parquet(tmp_path / 'l.parquet', [hub[:2]])
    refused("no path at 'image'", lists, R)


def test_libraries_that_are_not_installed(tmp_path, monkeypatch):
    for name in ('pyarrow', 'pyarrow.parquet', 'datasets'):
        monkeypatch.setitem(sys.modules, name, None)
    refused('pip install pyarrow', write(tmp_path / 'x.parquet', 'x'), R)
    refused('hf:a/b: .*pip install datasets', 'hf:a/b', R)


def test_a_set_of_the_hub(tmp_path, monkeypatch):
    """The datasets library names the files of a split; they are read where the hub keeps them."""
    folder = numbered(tmp_path / 'pics', 4)
    shard = write(tmp_path / '0.tar', tar_of([('0.png', encoded(plain(70)))]))
    listed = write(folder / 'metadata.csv', 'file_name,text\n01.png,one\n')
    pictures = [str(folder / f'{i:02d}.png') for i in range(4)]
    files = dict(train=[shard], validation=pictures[:2], test=[*pictures, listed])
    opened = []

    def builder(*name):
        opened.append(name)
        if name == ('a/gone',):
            raise FileNotFoundError('no such\nset')
        return types.SimpleNamespace(config=types.SimpleNamespace(data_files=files))

    library = types.ModuleType('datasets')
    library.load_dataset_builder = builder
    library.DownloadManager = lambda: types.SimpleNamespace(download=lambda files: files)
    monkeypatch.setitem(sys.modules, 'datasets', library)
    assert reds(open_images('hf:a/b:small:validation,hf:a/b', R)) == [0, 10, 70]
    assert opened == [('a/b', 'small'), ('a/b',)]
    assert captions_of(open_images('hf:a/b:test', R, 'file_name', 'text')) == ['one']
    refused("hf:a/b:dev: no split 'dev'; there are: train validation test", 'hf:a/b:dev', R)
    refused('hf:a/gone: no such set', 'hf:a/gone', R)


def test_the_datasets_library_itself(tmp_path, monkeypatch):
    """On a folder in place of a set on the hub."""
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    pytest.importorskip('datasets')
    for i, split in enumerate(['test', 'train']):
        parquet(tmp_path / f'{split}-00000-of-00001.parquet', [encoded(plain(10 * i))] * 2)
    assert reds(open_images(f'hf:{tmp_path},hf:{tmp_path}:test', R)) == [10, 10, 0, 0]
    refused("no split 'dev'; there are: train test", f'hf:{tmp_path}:dev', R)


# --- tar shards -----------------------------------------------------------------------------------
def test_tar_members_with_one_stem_belong_together(tmp_path):
    members = [
        ('x/001.json', b'{"prompt": "one"}'),
        ('x/000.png', encoded(plain(0))),
        ('x/000.txt', b'zero\n'),
        ('x/000.json', b'{"prompt": "0"}'),
        ('x/000.mask.png', encoded(noise())),    # parts of a sample are no images of their own
        ('x/000.depth.16.png', encoded(noise())),
        ('x/001.PNG', encoded(plain(10))),
        ('x/001.TXT', b'upper'),
        ('y.v1/000.a.png', encoded(plain(20))),                     # only dots in names
        ('y.txt', b''),
        ('./z.png', encoded(plain(30))),
        ('x/002.cls', b'7'),
        ('x/._000.png', b'?'),
        ('.thumbs/000.png', encoded(noise())),
    ]
    path = write(tmp_path / '0.tar', tar_of(members))
    s = open_images(path, R)
    assert s.names == ['0.tar/x/000.png', '0.tar/x/001.PNG', '0.tar/y.v1/000.a.png',
                       '0.tar/z.png']
    assert captions_of(s) == ['zero', 'upper', None, None]
    assert reds(s) == [0, 10, 20, 30]
    prompts = open_images(path, R, caption_key='prompt')
    assert captions_of(prompts) == ['0', 'one', None, None]


def test_tar_json_without_the_key(tmp_path):
    pictures = [(f'{i}.png', encoded(noise())) for i in range(3)]
    raw = tar_of(pictures + [('0.json', b'{"prompt": "p", "width": 3}')])
    path = write(tmp_path / 'a.tar', raw)
    refused("no key 'text'.*the keys there are: prompt width", path, R, caption_key='text')

    # only some are bad, the first too: skipped as a damaged image is
    texts = [('0.json', b'{"url": 3}'), ('1.json', b'{"text": "p"}'), ('2.json', b'{"te')]
    path = write(tmp_path / 'b.tar', tar_of(pictures + texts))
    s = open_images(path, R, caption_key='text')
    assert s.first(3)['captions'] == ['p']
    assert "no key 'text'" in s.skipped['b.tar/0.png']
    assert 'not JSON' in s.skipped['b.tar/2.png']
    path = write(tmp_path / 'c.tar', tar_of(pictures + [('0.json', b'[1]')]))
    assert captions_of(open_images(path, R)) == [None] * 3


def test_tar_members_cannot_escape(tmp_path):
    secret = save(tmp_path / 'secret.png', noise())
    names = ['../x.png', '/tmp/nanouae_x.png', '../../x.png']
    members = [(name, encoded(plain(10 * i))) for i, name in enumerate(names)]
    links = [
        ('link.png', str(secret), tarfile.SYMTYPE),
        ('hard.png', '../secret.png', tarfile.LNKTYPE),
        ('dir.png', '', tarfile.DIRTYPE),
        ('fifo.png', '', tarfile.FIFOTYPE),
        ('dev.png', '', tarfile.CHRTYPE),
    ]
    path = write(tmp_path / 'in' / 'evil.tar', tar_of(members, links))
    before = sorted(tmp_path.rglob('*'))
    s = open_images(path, R)
    assert reds(s) == [0, 10, 20]
    assert sorted(tmp_path.rglob('*')) == before
    assert not os.path.exists('/tmp/nanouae_x.png')
    for name in s.names:                         # joined to an output folder it stays in it
        assert not os.path.isabs(name)
        assert '..' not in name.split('/')
    assert len(set(s.names)) == 3


def test_folder_of_shards(tmp_path):
    for shard in ['b/c/0.tar', 'a/1.tar', 'a/0.tar']:
        members = [('0.png', encoded(noise())), ('0.txt', shard.encode())]
        write(tmp_path / shard, tar_of(members))
    s = open_images(str(tmp_path), R)
    assert captions_of(s) == ['a/0.tar', 'a/1.tar', 'b/c/0.tar']
    assert s.names == ['0.tar/0.png', '1.tar/0.png', '0.tar/0#2.png']
    matched = open_images(f'{tmp_path}/**/0.tar', R)
    assert captions_of(matched) == ['a/0.tar', 'b/c/0.tar']


PICTURES = [(f'{i}.png', encoded(noise(99, 99))) for i in range(2)]
BAD_TARS = {
    'junk.tar': (b'junk' * 1000, 'not a readable tar'),
    'empty.tar': (b'', 'not a readable tar'),
    'pointer.tar': (b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
    'gz.tar': (tar_of(PICTURES, mode='w:gz'), r'gunzip -c .*gz\.tar > '),
    'x.tar.gz': (tar_of(PICTURES, mode='w:gz'), r'gunzip -c .*x\.tar\.gz > '),
    'x.tar.xz': (tar_of(PICTURES, mode='w:xz'), 'unxz -c'),
    'x.tar.bz2': (tar_of(PICTURES, mode='w:bz2'), 'bunzip2 -c'),
    'x.tar.zst': (b'\x28\xb5\x2f\xfd', 'unzstd -c'),
    'none.tar': (tar_of([('a.txt', b'x')]), 'no images in it'),
}


@pytest.mark.parametrize('name', BAD_TARS)
def test_a_bad_tar_of_three(tmp_path, capsys, name):
    """It is refused alone; among others it is left out with a line."""
    raw, reason = BAD_TARS[name]
    refused(reason, write(tmp_path / name, raw), R)
    for i in range(2):
        write(tmp_path / f'{i}.tar', tar_of([('0.png', encoded(plain(10 * i)))]))
    for data in (f'{tmp_path}', f'{tmp_path}/*.tar*'):
        s = open_images(data, R)
        assert reds(s) == [0, 10]
        assert s.left_out == 1
        out = capsys.readouterr().out
        assert re.search(f'^warning: left out .*{name}: .*{reason}', out)
        assert out.count('\n') == 1


WHOLE = tar_of(PICTURES)
HEADER = tarfile.open(fileobj=io.BytesIO(WHOLE)).getmembers()[1].offset        # of the second file
CUTS = {
    'in an image': WHOLE[:HEADER + 9000],
    'in a header': WHOLE[:HEADER + 100],
    'behind an image': WHOLE[:HEADER],
    'a damaged header': WHOLE[:HEADER] + b'x' * 512 + WHOLE[HEADER + 512:],
}


@pytest.mark.parametrize('cut', CUTS)
def test_a_cut_tar_gives_what_is_before_the_cut(tmp_path, capsys, cut):
    s = open_images(write(tmp_path / 'x.tar', CUTS[cut]), R)
    assert s.first(9)['names'] == ['x.tar/0.png']
    assert s.left_out == 1
    assert 'x.tar: cut or damaged behind' in capsys.readouterr().out


# --- what is trained on ---------------------------------------------------------------------------
RUN = types.SimpleNamespace(world=1)


def keys_of(data, **keys):
    """A configuration."""
    c = config.parse({}, {}, [f'--data={data}', '--eval_images=2', '--eval_every=0'], 'x.py')
    vars(c).update(resolution=R, **keys)
    return c


def opened(data, training=True, **keys):
    """open_data of a run."""
    return open_data(keys_of(data, **keys), RUN, training)


def test_nothing_below_held_out_is_trained_on(tmp_path, capsys):
    """The embedded world's list, its folder, a glob of its folders, and somebody's list of both."""
    root = tmp_path / 'w'
    world.write(root, train=6, held_out=3)
    files = sorted(map(str, root.glob('*/*.png')))
    listed = write(tmp_path / 'm.jsonl', jsonl(dict(file=file) for file in files))
    own = str(numbered(tmp_path / 'own', 3))
    for data in (root / 'scenes.jsonl', root, f'{root}/[th]*', listed):
        train, held = opened(data, data_keys=('file', 'caption', ''))
        assert len(train) == 6
        assert all('/train/' in os.path.abspath(image[0]) for image, _, _ in train.places)
        assert len(held['names']) == 2
        assert '3 images of ' in capsys.readouterr().out
        train, _ = opened(data, data_keys=('file', 'caption', ''), held_out=f'{own}/*.png')
        assert len(train) == 6
    c = keys_of(root / 'scenes.jsonl', data_keys=('file', 'caption', ''))
    train, _, _ = pretrain_decoder.open_captioned(c, RUN, 'caption')    # evaluates nothing
    assert len(train) == 6
    with pytest.raises(DataError, match='no image of it is left to train on'):
        opened(root / 'held_out')
    _, held = opened(root / 'held_out', training=False)
    assert len(held['names']) == 2


def test_what_is_left_out_counts_as_skipped(tmp_path):
    numbered(tmp_path, 1)
    path = write(tmp_path / 'm.jsonl', GOOD * 4 + '3\n' * 5)
    train, held = opened(path)
    assert len(train) == 2
    assert held['skipped'] == 5
    train, held = opened(path, held_out=write(tmp_path / 'other.jsonl', GOOD + '3\n'))
    assert len(train) == 4
    assert held['skipped'] == 6


def test_the_last_images_are_held_out_but_never_more_than_half(tmp_path):
    for count, trained in ((2, 1), (3, 2), (4, 2), (9, 7)):
        train, held = opened(numbered(tmp_path / str(count), count))        # eval_images is 2
        names = [f'{i:02d}.png' for i in range(count)]
        assert (train.names, held['names']) == (names[:trained], names[trained:])
        assert len({*train.names, *held['names']}) == count


def test_held_out_beside_the_embedded_world(tmp_path):
    train, held = opened('shapes', held_out=str(numbered(tmp_path, 3)))
    assert len(train) == 4096
    assert held['names'] == ['00.png', '01.png']
    assert held['scenes'] is None


# --- the layouts of data/README.md ----------------------------------------------------------------
SETS = dict(blip='blip3o-60k', t2i='t2i-2m', echo='Echo-4o-Image', share='sharegpt-4o',
            docci='docci/', llava='llava/', megalith='megalith/tars', laion='laion/tars')
# what lies beside picture # in two tars
IN_TARS = {
    'blip3o-60k': {'.txt': 'blip #'},
    't2i-2m/data_512_2M': {'.json': '{"prompt": "t2i #"}'},
    'megalith/tars': {'.json': '{"url": "u", "key": "#", "status": "success"}'},
    'laion/tars': {'.txt': 'laion #', '.json': '{"caption": "laion #", "url": "u"}'},
}
# a list, picture # of it, and its row
ECHO = 'Echo-4o-Image/Instruction-Following-Image'
ANSWER = [{'from': 'human', 'value': '<image>\nDescribe.'}, {'from': 'gpt', 'value': 'llava #'}]
IN_LISTS = [
    (f'{ECHO}/all.jsonl', f'{ECHO}/images/0000#.jpg',
     dict(instruction='echo #', output_image=f'/{ECHO}/images/0000#.jpg')),
    ('sharegpt-4o/text_to_image.json', 'sharegpt-4o/text_to_image/image_#.png',
     dict(input_prompt='share #', output_image='text_to_image/image_#.png')),
    ('sharegpt-4o/text_and_image_to_image.json', 'sharegpt-4o/edited/image_#.png',
     dict(input_prompt='share #', input_image=['text_to_image/image_#.png'],
          output_image='edited/image_#.png')),
    ('docci/docci_descriptions.jsonlines', 'docci/images/train_0000#.jpg',
     dict(split='train', image_file='train_0000#.jpg', description='docci #')),
    ('llava/blip_laion_cc_sbu_558k.json', 'llava/images/0000#/#.jpg',
     dict(id='#', image='0000#/#.jpg', conversations=ANSWER)),
    ('hf/metadata.jsonl', 'hf/#.png', dict(file_name='#.png', text='hf #')),
]


def lay_out(sets):
    """Miniatures of the public sets as their downloads and the README's commands leave them.

    Each has two pictures, the second with red value 10.
    """
    rows = {}
    for i in range(2):
        for folder, texts in IN_TARS.items():
            members = [(f'{i:09d}.jpg', encoded(plain(10 * i), 'JPEG', quality=95))]
            for suffix, text in texts.items():
                members.append((f'{i:09d}{suffix}', text.replace('#', str(i)).encode()))
            write(sets / folder / f'{i:05d}.tar', tar_of(members))
        for path, picture, row in IN_LISTS:
            save(sets / picture.replace('#', str(i)), plain(10 * i))
            rows.setdefault(path, []).append(json.loads(json.dumps(row).replace('#', str(i))))
    for path, found in rows.items():
        write(sets / path, json.dumps(found) if path.endswith('.json') else jsonl(found))


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
    """--data and --data_keys are taken from data/README.md itself."""
    with open('data/README.md', encoding='utf-8') as f:
        text = f.read()
    sets = tmp_path / 'sets'
    lay_out(sets)
    found = {}
    for script_name, *arguments in commands_of(text, sets):
        own = pretrain_decoder.keys if script_name == 'pretrain_decoder.py' else {}
        keys = config.parse(own, {}, arguments, script_name)
        s = open_images(keys.data, R, *keys.data_keys)
        [name] = [name for name, folder in SETS.items() if f'{sets}/{folder}' in keys.data]
        found[name] = captions_of(s)
        assert np.allclose(reds(s), [0, 10], rtol=0, atol=3), name
        if script_name == 'pretrain_decoder.py':
            assert found[name] == [f'{name} 0', f'{name} 1'], 'a command that needs captions'
    want = {name: [f'{name} 0', f'{name} 1'] for name in SETS}
    want['megalith'] = [None, None]
    assert found == want

    flag = re.search(r'`--data=FOLDER/metadata.jsonl (--data_keys=.*?)`', text)[1]
    keys = config.parse({}, {}, shlex.split(flag), 'x.py')
    s = open_images(str(sets / 'hf' / 'metadata.jsonl'), R, *keys.data_keys)
    assert captions_of(s) == ['hf 0', 'hf 1']
