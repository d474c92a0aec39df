"""data/images.py on files made here: what each source lists, what each kind of picture becomes.

Also which images a step sees, and that bad input is stepped over or refused in one line.
"""
import io
import json
import os
import re
import shlex
import sys
import tarfile
import types
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from lib import ranks
import config
from data import images
from data.images import DataError, ImageError, open_images
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


def write_manifest(path, rows):
    """Writes rows as .json, or as .jsonl with empty lines between; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.json':
        text = json.dumps(rows)
    else:
        text = '\n\n'.join(json.dumps(row) for row in rows) + '\n'
    path.write_text(text, encoding='utf-8-sig')  # the byte order mark that Windows editors write
    return str(path)


def numbered(folder, n):
    """A folder of n plain images; image i has the red value 10 i: a batch says which it holds."""
    for i in range(n):
        save(folder / f'{i:02d}.png', plain(10 * i))
    return folder


# --- what was read --------------------------------------------------------------------------------
def u8(x):
    """(3, R, R) in [-1, 1] -> (R, R, 3) uint8"""
    return ((x + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def image_of(s, i):
    """Image i of a set -> (R, R, 3) uint8"""
    x, _ = s.get(i)
    return u8(x)


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
    for name in ['b.png', 'a/z.JPG', 'a/b/c.webp', 'c.bmp', 'd.tiff', 'e.gif', 'f.jpeg', '._b.png']:
        save(tmp_path / name, noise())
    (tmp_path / 'b.txt').write_text(' a red cube \n', encoding='utf-8-sig')
    (tmp_path / 'notes.md').write_text('no image')
    s = open_images(str(tmp_path), R)
    assert s.names == ['a/b/c.webp', 'a/z.JPG', 'b.png', 'c.bmp', 'd.tiff', 'e.gif', 'f.jpeg']
    assert len(s) == 7
    assert captions_of(s, 3) == [None, None, 'a red cube']


def test_sources_that_are_not_there(tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'x.tar.gz').write_bytes(b'x')
    refused('no such file or folder.*nowhere', str(tmp_path / 'nowhere'), R)
    refused('no such file or folder', '', R)
    refused('empty: no images', str(tmp_path / 'empty'), R)
    refused('unpack a .tar.gz', str(tmp_path / 'x.tar.gz'), R)


def test_comma_and_glob_concatenate_with_unique_names(tmp_path):
    numbered(tmp_path / 'one', 2)
    numbered(tmp_path / 'two', 3)
    make_tar(tmp_path / 't.tar', [('00.png', encoded(noise()))])
    s = open_images(f'{tmp_path}/one, {tmp_path}/two,{tmp_path}/*.tar', R)
    assert s.names == ['00.png', '01.png', '00#2.png', '01#2.png', '02.png', 't.tar/00.png']
    assert reds(s, 5) == [0, 10, 0, 10, 20]
    both = open_images(str(tmp_path), R)         # the images, then the shards
    assert len(both) == 6
    folder = numbered(tmp_path / 'a,b', 1)       # a comma that belongs to a name
    assert len(open_images(str(folder), R)) == 1


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
    three = [a.batch(3, step, 4)['names'] for step in range(3)]
    four = [a.batch(4, step, 4)['names'] for step in range(3)]
    assert three != four


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


# --- manifests ------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', ['m.json', 'm.jsonl', 'm.jsonlines'])
def test_manifest(tmp_path, name):
    numbered(tmp_path / 'pics', 3)
    talk = [
        {'from': 'human', 'value': '<image>\nwhat is it?'},
        {'from': 'gpt', 'value': 'a cube'},
        {'from': 'gpt', 'value': 'no'},
    ]
    rows = [
        {'image': 'pics/02.png', 'caption': 'two'},
        {'image': 'pics/00.png', 'caption': talk},
        {'image': str(tmp_path / 'pics/01.png')},
    ]
    s = open_images(write_manifest(tmp_path / name, rows), R)
    assert s.names[:2] == ['pics/02.png', 'pics/00.png']
    assert len(s) == 3
    assert captions_of(s, 3) == ['two', 'a cube', None]
    assert reds(s, 3) == [20, 0, 10]


def test_manifest_keys_and_root(tmp_path):
    numbered(tmp_path / 'pics', 2)
    row = {'output_image': '/pics/01.png', 'instruction': 'draw', 'caption': 'no'}
    path = write_manifest(tmp_path / 'lists' / 'm.jsonl', [row])
    s = open_images(path, R, image_key='output_image', caption_key='instruction',
                    image_root=str(tmp_path))
    assert captions_of(s, 1) == ['draw']
    assert reds(s, 1) == [10]
    assert s.names == ['pics/01.png']


GOOD = b'{"image": "00.png", "text": "t"}\n'
MANIFEST_ERRORS = [
    ('a.jsonl', GOOD + b'\n{"image": \n',
     r'a\.jsonl line 3: not JSON'),
    ('b.json', b'[\n{"image": "00.png"},\n{"image" "00.png"}]',
     r'b\.json line 3: not JSON'),
    ('c.jsonl', GOOD + b'{"file_name": "00.png", "text": "t"}\n',
     r"c\.jsonl line 2: no path at 'image' \(the image of --data_keys\); "
     r'the keys there are: file_name text'),
    ('e.jsonl', GOOD + b'["00.png"]\n',
     r'e\.jsonl line 2: .*no object but'),
    ('f.json', b'{"00.png": "t"}',
     r'f\.json entry 1: .*no object but'),
    ('g.json', b'3',
     r'g\.json: not a readable manifest'),
    ('h.json', b'[]',
     r'h\.json: no images'),
    ('i.jsonl', b'\xff\xfe{}',
     r'i\.jsonl: not a readable manifest'),
    ('j.jsonl', b'{"image": "00.png", "caption": ["a", "b"]}',
     r'j\.jsonl line 1: .*neither a string nor a conversation'),
]


@pytest.mark.parametrize('name, text, message', MANIFEST_ERRORS,
                         ids=[name for name, _, _ in MANIFEST_ERRORS])
def test_manifest_errors(tmp_path, name, text, message):
    numbered(tmp_path, 1)
    (tmp_path / name).write_bytes(text)
    refused(message, str(tmp_path / name), R)


def test_manifest_without_what_data_keys_name(tmp_path):
    numbered(tmp_path, 1)
    path = tmp_path / 'd.jsonl'
    path.write_bytes(GOOD)
    refused(r"d\.jsonl line 1: no key 'prompt' \(the caption of --data_keys, or stage 0's "
            r'--answer_key\); the keys there are: image text', str(path), R, caption_key='prompt')
    refused(r'its images are not there.* is the folder of --data_keys right',
            str(path), R, image_root=str(tmp_path / 'elsewhere'))
    assert captions_of(open_images(str(path), R), 1) == [None]      # nobody asked for a caption


def test_manifest_with_one_missing_file(tmp_path):
    numbered(tmp_path, 1)
    path = write_manifest(tmp_path / 'm.jsonl', [{'image': 'gone.png'}, {'image': '00.png'}])
    s = open_images(path, R)
    assert s.batch(0, 0, 2)['names'] == ['00.png'] * 2
    assert 'No such file' in s.skipped['gone.png']


# --- tar shards -----------------------------------------------------------------------------------
def test_tar_members_with_one_stem_belong_together(tmp_path):
    a, b, c = noise(), noise(), noise()
    members = [
        ('x/001.json', b'{"prompt": "one"}'),
        ('x/000.png', encoded(a)),
        ('x/000.txt', b'zero\n'),
        ('x/000.json', b'{"prompt": "0"}'),
        ('x/001.PNG', encoded(b)),
        ('y/000.webp', encoded(c, 'WEBP', lossless=True)),
        ('x/002.cls', b'7'),
        ('x/._000.png', b'?'),
    ]
    path = make_tar(tmp_path / '0.tar', members)
    s = open_images(path, R)
    assert s.names == ['0.tar/x/000.png', '0.tar/x/001.PNG', '0.tar/y/000.webp']
    assert captions_of(s, 3) == ['zero', None, None]
    for i, pixels in enumerate([a, b, c]):
        assert np.array_equal(image_of(s, i), pixels)
    prompts = open_images(path, R, caption_key='prompt')
    assert captions_of(prompts, 3) == ['0', 'one', None]


def test_tar_json_without_the_key(tmp_path):
    pictures = [(f'{i}.png', encoded(noise())) for i in range(3)]
    path = make_tar(tmp_path / 'a.tar', pictures + [('0.json', b'{"prompt": "p", "width": 3}')])
    refused("no key 'text'.*the keys there are: prompt width", path, R, caption_key='text')

    # only some are bad: skipped as a damaged image is
    texts = [('0.json', b'{"text": "p"}'), ('1.json', b'{"url": 3}'), ('2.json', b'{"te')]
    path = make_tar(tmp_path / 'b.tar', pictures + texts)
    s = open_images(path, R, caption_key='text')
    assert s.first(3)['captions'] == ['p']
    assert "no key 'text'" in s.skipped['b.tar/1.png']
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


def test_unreadable_tar(tmp_path):
    members = [(f'{i}.png', encoded(noise(99, 99))) for i in range(2)]
    path = make_tar(tmp_path / 'a.tar', members)
    with open(path, 'rb') as f:
        whole = f.read()
    (tmp_path / 'cut.tar').write_bytes(whole[:40000])
    (tmp_path / 'junk.tar').write_bytes(b'junk' * 1000)
    (tmp_path / 'empty.tar').write_bytes(b'')
    with tarfile.open(tmp_path / 'gz.tar', 'w:gz') as tar:
        tar.add(path, '0.png')
    for name in ['cut', 'junk', 'empty', 'gz']:
        refused(f'{name}.tar: not a readable tar', str(tmp_path / f'{name}.tar'), R)
    path = make_tar(tmp_path / 'none.tar', [('a.txt', b'x')])
    refused('none.tar: no images', path, R)


# --- sample.py: captions for a whole folder -------------------------------------------------------
def sample(folder, out, *extra):
    """Captions of a folder by sample.py: {name: caption} of what stands in `out`."""
    script('sample', f'--image={folder}', f'--out_dir={out}', '--device=cpu',
           '--eval_temperature=1', '--eval_denoise_steps=1', *extra)
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
    write_manifest(echo / 'Instruction-Following-Image.jsonl', rows['echo'])
    write_manifest(share / 'text_to_image.json', rows['share'])
    write_manifest(docci / 'docci_descriptions.jsonlines', rows['docci'])
    write_manifest(llava / 'blip_laion_cc_sbu_558k.json', rows['llava'])
    write_manifest(sets / 'hf' / 'metadata.jsonl', rows['hf'])


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
