"""data/images.py on files made here: what each kind of source lists, what each kind of picture
becomes, which images a step sees, and that bad input is stepped over or refused in one line."""

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
import common
import config
from data import images
from data.images import DataError, ImageError, open_images
from running import lines, refusal, script

R = 16
rng = np.random.default_rng(0)


def noise(w=R, h=R, channels=3):
    """(h, w, channels) uint8; random pixels, so that no resampling leaves them as they are."""
    return rng.integers(0, 256, (h, w, channels) if channels > 1 else (h, w), dtype=np.uint8)


def save(path, pixels, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **kw)
    return path


def u8(x):
    """(3, R, R) in [-1, 1] -> (R, R, 3) uint8"""
    return ((x + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def one(path, resolution=R):
    """The only image of a folder -> (R, R, 3) uint8"""
    return u8(open_images(str(path.parent), resolution).get(0)[0])


def encoded(pixels, kind='PNG', **kw):
    f = io.BytesIO()
    Image.fromarray(pixels).save(f, kind, **kw)
    return f.getvalue()


def make_tar(path, members, links=()):
    """members: [(name, bytes)]; links: [(name, target, tarfile type)]"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for name, target, kind in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return str(path)


def numbered(folder, n):
    """A folder of n plain images; image i has the red value 10 i, so a batch says which ones it
    holds."""
    for i in range(n):
        save(folder / f'{i:02d}.png', np.full((R, R, 3), (10 * i, 0, 0), np.uint8))
    return folder


def refused(match, *args, **kw):
    with pytest.raises(DataError, match=match) as e:
        open_images(*args, **kw)
    assert '\n' not in str(e.value)


# --- folders -------------------------------------------------------------------------------------


def test_folder_is_recursive_and_sorted(tmp_path):
    for name in ['b.png', 'a/z.JPG', 'a/b/c.webp', 'c.bmp', 'd.tiff', 'e.gif', 'f.jpeg', '._b.png']:
        save(tmp_path / name, noise())
    (tmp_path / 'b.txt').write_text(' a red cube \n', encoding='utf-8-sig')
    (tmp_path / 'notes.md').write_text('no image')
    s = open_images(str(tmp_path), R)
    assert (
        s.names == ['a/b/c.webp', 'a/z.JPG', 'b.png', 'c.bmp', 'd.tiff', 'e.gif', 'f.jpeg']
        and len(s) == 7
    )
    assert [s.get(i)[1] for i in range(3)] == [None, None, 'a red cube']


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
    assert [int(u8(s.get(i)[0])[0, 0, 0]) for i in range(5)] == [0, 10, 0, 10, 20]
    assert (
        len(open_images(str(tmp_path), R)) == 6
    )  # a folder with both: the images, then the shards
    assert (
        len(open_images(str(numbered(tmp_path / 'a,b', 1)), R)) == 1
    )  # a comma that belongs to a name


# --- pictures ------------------------------------------------------------------------------------


def test_exact_size_is_not_resampled(tmp_path):
    pixels = noise()
    save(tmp_path / 'x.png', pixels)
    x, _ = open_images(str(tmp_path), R).get(0)
    assert x.dtype == torch.float32 and x.shape == (3, R, R) and x.is_contiguous()
    assert torch.equal(x, torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1)
    assert np.array_equal(
        one(save(tmp_path / 'wide' / 'x.png', np.pad(pixels, ((0, 0), (5, 5), (0, 0))))), pixels
    )
    assert np.array_equal(
        one(save(tmp_path / 'tall' / 'x.png', np.pad(pixels, ((7, 7), (0, 0), (0, 0))))), pixels
    )


def test_resize_is_antialiased_and_centred(tmp_path):
    board = np.repeat(np.indices((64, 64)).sum(0)[..., None] % 2 * 255, 3, 2).astype(np.uint8)
    wide = np.concatenate(
        [
            np.full((64, 30, 3), (255, 0, 0), np.uint8),
            board,
            np.full((64, 30, 3), (255, 0, 0), np.uint8),
        ],
        1,
    )
    got = one(save(tmp_path / 'x.png', wide)).astype(int)
    assert (
        abs(got - 128).max() < 12
    )  # picking pixels would give 0 or 255; a crop that is off centre, red
    assert one(save(tmp_path / 'up' / 'x.png', noise(9, 12))).shape == (
        R,
        R,
        3,
    )  # small ones are enlarged
    assert one(save(tmp_path / 'strip' / 'x.png', noise(9, 60000))).shape == (R, R, 3)


def test_jpeg_is_decoded_at_reduced_size(tmp_path, monkeypatch):
    ramp = np.repeat(np.linspace(0, 255, 512).astype(np.uint8)[None, :, None], 512, 0).repeat(3, 2)
    path = save(tmp_path / 'x.jpg', ramp, quality=95)
    sizes, draft = [], JpegImagePlugin.JpegImageFile.draft
    monkeypatch.setattr(
        JpegImagePlugin.JpegImageFile,
        'draft',
        lambda im, mode, size: (draft(im, mode, size), sizes.append(im.size))[0],
    )
    got = one(path)
    assert sizes == [(64, 64)]  # 512 / 8, still at least 2 R
    assert (
        abs(
            got.astype(int)
            - np.asarray(Image.fromarray(ramp).resize((R, R), Image.Resampling.LANCZOS))
        ).max()
        <= 4
    )
    one(save(tmp_path / 'small' / 'x.jpg', noise(100, 100)))
    assert sizes[1:] == [(50, 50)]  # a quarter would be less than 2 R


def test_modes_become_rgb(tmp_path):
    grey = noise(channels=1)
    three = np.repeat(grey[..., None], 3, 2)
    assert np.array_equal(one(save(tmp_path / 'L' / 'x.png', grey)), three)
    assert np.array_equal(
        one(save(tmp_path / '16' / 'x.png', Image.fromarray(grey.astype(np.uint16) * 257))), three
    )
    assert np.array_equal(
        one(save(tmp_path / '16t' / 'x.tiff', Image.fromarray(grey.astype(np.uint16) * 257))), three
    )

    palette = Image.fromarray(noise()).quantize(16)
    assert np.array_equal(
        one(save(tmp_path / 'P' / 'x.png', palette)), np.asarray(palette.convert('RGB'))
    )

    cmyk = Image.new('CMYK', (R, R), (255, 0, 0, 0))  # cyan ink alone
    got = one(save(tmp_path / 'CMYK' / 'x.jpg', cmyk, quality=95)).astype(int)
    assert abs(got - (0, 255, 255)).max() < 6


def test_transparency_is_laid_on_white(tmp_path):
    rgba = noise(channels=4)
    rgba[:8, :, 3], rgba[8:, :, 3] = 255, 0
    got = one(save(tmp_path / 'RGBA' / 'x.png', rgba))
    assert np.array_equal(got[:8], rgba[:8, :, :3]) and (got[8:] == 255).all()
    half = np.zeros((R, R, 4), np.uint8)
    half[..., 3] = 128
    assert (
        abs(one(save(tmp_path / 'half' / 'x.webp', half, lossless=True)).astype(int) - 127).max()
        <= 1
    )

    palette = Image.new('P', (R, R), 1)
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.paste(0, (0, 0, R, 8))
    got = one(save(tmp_path / 'P' / 'x.png', palette, transparency=0))  # colour 0 is the hole
    assert (got[:8] == 255).all() and (got[8:] == (0, 200, 0)).all()


@pytest.mark.parametrize(
    'orientation, turn',
    [(3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)],
)
def test_exif_orientation(tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = noise()
    assert np.array_equal(one(save(tmp_path / 'x.png', pixels, exif=exif)), turn(pixels))


# --- pictures that cannot be read ----------------------------------------------------------------


def jpeg_cut_short():
    raw = encoded(noise(200, 200), 'JPEG')
    return raw[: len(raw) // 2]


@pytest.mark.parametrize(
    'raw, reason',
    [
        (b'', 'cannot identify'),
        (b'\x89PNG\r\n\x1a\n' + bytes(99), '.'),
        (bytes(1000), 'cannot identify'),
        (jpeg_cut_short(), 'truncated'),
        (encoded(noise(99, 99))[:9000], 'truncated'),
        (encoded(noise(1, 1)), 'too small, 1x1'),
        (encoded(noise(100, 7)), 'too small, 100x7'),
        (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n', 'cannot identify'),
    ],
    ids=['empty', 'header only', 'zeros', 'jpeg cut', 'png cut', '1x1', '100x7', 'postscript'],
)
def test_damaged_image(tmp_path, raw, reason):
    (tmp_path / 'x.png').write_bytes(raw)
    with pytest.raises(ImageError, match=reason) as e:
        open_images(str(tmp_path), R).get(0)
    assert ' at 0x' not in str(e.value)  # no memory address: the same reason in every run


def test_huge_image(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    save(
        tmp_path / 'a.png', noise(40, 40)
    )  # between the limit and twice the limit: read, and nothing said
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
    stand_in = {0: 0, 1: 1, 2: 4, 3: 4, 4: 4, 5: 0}  # the next in index order, round the end
    for _ in range(2):
        b = s.batch(1, 0, 6)
        assert b['names'] == [f'{stand_in[i]:02d}.png' for i in order]
        assert b['x'][:, 0, 0, 0].add(1).mul(127.5).round().tolist() == [
            10 * stand_in[i] for i in order
        ]
    assert (
        sorted(s.skipped) == ['02.png', '03.png', '05.png']
        and 'cannot identify' in s.skipped['02.png']
    )
    out = capsys.readouterr().out
    assert out.count('\n') == 3 and all(out.count(name) == 1 for name in s.skipped)


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


# --- which images a step sees --------------------------------------------------------------------


def test_each_epoch_covers_each_image_once(tmp_path):
    s = open_images(str(numbered(tmp_path, 7)), R)
    seen = [
        name for step in range(14) for name in s.batch(5, step, 3)['names']
    ]  # 42 = 6 epochs; 3 does not divide 7
    epochs = [seen[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(epoch) == s.names for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1  # shuffled anew
    assert sorted(s.batch(5, 0, 14)['names']) == sorted(2 * s.names)  # a step may span epochs


def test_step_is_a_pure_function(tmp_path):
    numbered(tmp_path, 9)
    a, b = open_images(str(tmp_path), R), open_images(str(tmp_path), R)
    late = b.batch(3, 11, 4)
    early = [a.batch(3, step, 4) for step in range(12)][11]
    assert early['names'] == late['names'] and torch.equal(early['x'], late['x'])
    assert images.permutation(3, 0, 9) is images.permutation(
        3, 0, 9
    )  # not drawn again for each image
    assert any(a.batch(3, step, 4)['names'] != a.batch(4, step, 4)['names'] for step in range(3))


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
        assert full['index'].dtype == torch.int64 and full['index'].tolist() == list(range(12))
        assert all(part['x'].shape == (12 // world, 3, R, R) for part in parts)
        for key in ['x', 'index']:
            assert torch.equal(full[key], torch.cat([part[key] for part in parts]))
        for key in ['names', 'captions']:
            assert full[key] == sum([part[key] for part in parts], [])
        assert all(
            c == ('four' if name == '04.png' else None)
            for c, name in zip(full['captions'], full['names'])
        )


def test_ranks_have_to_fit(tmp_path):
    s = open_images(str(numbered(tmp_path, 3)), R)
    with pytest.raises(AssertionError, match='5 images a step cannot be split evenly over 2 ranks'):
        s.batch(0, 0, 5, 0, 2)
    with pytest.raises(DataError, match=r'more ranks \(4\) than images \(3\)'):
        s.batch(0, 0, 8, 0, 4)


def test_first(tmp_path):
    numbered(tmp_path, 6)
    for name in ['00.png', '05.png']:
        (tmp_path / name).write_bytes(b'broken')
    s = open_images(str(tmp_path), R)
    b = s.first(3)
    assert b['names'] == ['01.png', '02.png', '03.png'] and b['x'].shape == (3, 3, R, R)
    assert b['index'].tolist() == [0, 1, 2] and b['captions'] == [None] * 3
    assert s.first(99)['names'] == [
        '01.png',
        '02.png',
        '03.png',
        '04.png',
    ]  # no more, and none twice
    assert sorted(s.skipped) == ['00.png', '05.png']


def test_small_sets_are_decoded_once(tmp_path, monkeypatch):
    numbered(tmp_path, 3)
    calls, decode = [], images.decode
    monkeypatch.setattr(images, 'decode', lambda raw, r: (calls.append(1), decode(raw, r))[1])
    s = open_images(str(tmp_path), R)
    first = s.get(0)[0].clone()
    s.get(0)[0].zero_()  # what a caller does to his x stays with him
    assert torch.equal(s.get(0)[0], first) and len(calls) == 1
    monkeypatch.setattr(images, 'CACHE_BYTES', 3 * R * R * 3 - 1)
    s = open_images(str(tmp_path), R)
    s.get(0), s.get(0)
    assert len(calls) == 3


# --- manifests -----------------------------------------------------------------------------------


def write_manifest(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = (
        json.dumps(rows)
        if path.suffix == '.json'
        else '\n\n'.join(json.dumps(r) for r in rows) + '\n'
    )
    path.write_text(text, encoding='utf-8-sig')  # the byte order mark that Windows editors write
    return str(path)


@pytest.mark.parametrize('name', ['m.json', 'm.jsonl', 'm.jsonlines'])
def test_manifest(tmp_path, name):
    numbered(tmp_path / 'pics', 3)
    talk = [
        {'from': 'human', 'value': '<image>\nwhat is it?'},
        {'from': 'gpt', 'value': 'a cube'},
        {'from': 'gpt', 'value': 'no'},
    ]
    m = write_manifest(
        tmp_path / name,
        [
            {'image': 'pics/02.png', 'caption': 'two'},
            {'image': 'pics/00.png', 'caption': talk},
            {'image': str(tmp_path / 'pics/01.png')},
        ],
    )
    s = open_images(m, R)
    assert s.names[:2] == ['pics/02.png', 'pics/00.png'] and len(s) == 3
    assert [s.get(i)[1] for i in range(3)] == ['two', 'a cube', None]
    assert [int(u8(s.get(i)[0])[0, 0, 0]) for i in range(3)] == [20, 0, 10]


def test_manifest_keys_and_root(tmp_path):
    numbered(tmp_path / 'pics', 2)
    m = write_manifest(
        tmp_path / 'lists' / 'm.jsonl',
        [{'output_image': '/pics/01.png', 'instruction': 'draw', 'caption': 'no'}],
    )
    s = open_images(
        m, R, image_key='output_image', caption_key='instruction', image_root=str(tmp_path)
    )
    x, caption = s.get(0)
    assert caption == 'draw' and u8(x)[0, 0, 0] == 10 and s.names == ['pics/01.png']


def test_manifest_errors(tmp_path):
    numbered(tmp_path, 1)
    good = '{"image": "00.png", "text": "t"}\n'
    (tmp_path / 'a.jsonl').write_text(good + '\n' + '{"image": \n')
    refused(r'a\.jsonl line 3: not JSON', str(tmp_path / 'a.jsonl'), R)
    (tmp_path / 'b.json').write_text('[\n{"image": "00.png"},\n{"image" "00.png"}]')
    refused(r'b\.json line 3: not JSON', str(tmp_path / 'b.json'), R)
    (tmp_path / 'c.jsonl').write_text(good + '{"file_name": "00.png", "text": "t"}\n')
    refused(
        r"c\.jsonl line 2: no path at 'image'.*the keys there are: file_name text",
        str(tmp_path / 'c.jsonl'),
        R,
    )
    (tmp_path / 'd.jsonl').write_text(good)
    refused(
        r"d\.jsonl line 1: no key 'prompt'.*the keys there are: image text",
        str(tmp_path / 'd.jsonl'),
        R,
        caption_key='prompt',
    )
    assert open_images(str(tmp_path / 'd.jsonl'), R).get(0)[1] is None  # nobody asked for a caption
    (tmp_path / 'e.jsonl').write_text(good + '["00.png"]\n')
    refused(r'e\.jsonl line 2: .*no object but', str(tmp_path / 'e.jsonl'), R)
    (tmp_path / 'f.json').write_text('{"00.png": "t"}')
    refused(r'f\.json entry 1: .*no object but', str(tmp_path / 'f.json'), R)
    (tmp_path / 'g.json').write_text('3')
    refused(r'g\.json: not a readable manifest', str(tmp_path / 'g.json'), R)
    (tmp_path / 'h.json').write_text('[]')
    refused(r'h\.json: no images', str(tmp_path / 'h.json'), R)
    (tmp_path / 'i.jsonl').write_bytes(b'\xff\xfe{}')
    refused(r'i\.jsonl: not a readable manifest', str(tmp_path / 'i.jsonl'), R)
    (tmp_path / 'j.jsonl').write_text('{"image": "00.png", "caption": ["a", "b"]}')
    refused(r'j\.jsonl line 1: .*neither a string nor a conversation', str(tmp_path / 'j.jsonl'), R)
    refused(
        r'its images are not there.*--data_keys',
        str(tmp_path / 'd.jsonl'),
        R,
        image_root=str(tmp_path / 'elsewhere'),
    )


def test_manifest_with_one_missing_file(tmp_path):
    numbered(tmp_path, 1)
    s = open_images(
        write_manifest(tmp_path / 'm.jsonl', [{'image': 'gone.png'}, {'image': '00.png'}]), R
    )
    assert s.batch(0, 0, 2)['names'] == ['00.png'] * 2 and 'No such file' in s.skipped['gone.png']


# --- tar shards ----------------------------------------------------------------------------------


def test_tar_members_with_one_stem_belong_together(tmp_path):
    a, b, c = noise(), noise(), noise()
    t = make_tar(
        tmp_path / '0.tar',
        [
            ('x/001.json', b'{"prompt": "one"}'),
            ('x/000.png', encoded(a)),
            ('x/000.txt', b'zero\n'),
            ('x/000.json', b'{"prompt": "0"}'),
            ('x/001.PNG', encoded(b)),
            ('y/000.webp', encoded(c, 'WEBP', lossless=True)),
            ('x/002.cls', b'7'),
            ('x/._000.png', b'?'),
        ],
    )
    s = open_images(t, R)
    assert s.names == ['0.tar/x/000.png', '0.tar/x/001.PNG', '0.tar/y/000.webp']
    assert [s.get(i)[1] for i in range(3)] == ['zero', None, None]
    assert all(np.array_equal(u8(s.get(i)[0]), pixels) for i, pixels in enumerate([a, b, c]))
    assert [open_images(t, R, caption_key='prompt').get(i)[1] for i in range(3)] == [
        '0',
        'one',
        None,
    ]


def test_tar_json_without_the_key(tmp_path):
    rows = [(f'{i}.png', encoded(noise())) for i in range(3)]
    t = make_tar(tmp_path / 'a.tar', rows + [('0.json', b'{"prompt": "p", "width": 3}')])
    refused("no key 'text'.*the keys there are: prompt width", t, R, caption_key='text')
    t = make_tar(
        tmp_path / 'b.tar',
        rows + [('0.json', b'{"text": "p"}'), ('1.json', b'{"url": 3}'), ('2.json', b'{"te')],
    )
    s = open_images(t, R, caption_key='text')  # only some are bad: skipped as a damaged image is
    assert (
        s.first(3)['captions'] == ['p']
        and "no key 'text'" in s.skipped['b.tar/1.png']
        and 'not JSON' in s.skipped['b.tar/2.png']
    )
    assert open_images(t, R).get(0)[1] is None
    assert (
        open_images(make_tar(tmp_path / 'c.tar', rows + [('0.json', b'[1]')]), R).get(0)[1] is None
    )


def test_tar_members_cannot_escape(tmp_path):
    evil = tmp_path / 'in' / 'evil.tar'
    secret = save(tmp_path / 'secret.png', noise())
    pixels = [noise() for _ in range(3)]
    make_tar(
        evil,
        [
            ('../x.png', encoded(pixels[0])),
            ('/tmp/nanouae_x.png', encoded(pixels[1])),
            ('../../x.png', encoded(pixels[2])),
        ],
        [
            ('link.png', str(secret), tarfile.SYMTYPE),
            ('hard.png', '../secret.png', tarfile.LNKTYPE),
            ('dir.png', '', tarfile.DIRTYPE),
            ('fifo.png', '', tarfile.FIFOTYPE),
            ('dev.png', '', tarfile.CHRTYPE),
        ],
    )
    before = sorted(tmp_path.rglob('*'))
    s = open_images(str(evil), R)
    assert all(np.array_equal(u8(s.get(i)[0]), pixels[i]) for i in range(3)) and len(s) == 3
    assert sorted(tmp_path.rglob('*')) == before and not os.path.exists('/tmp/nanouae_x.png')
    for name in s.names:  # an id joined to an output folder stays in it
        assert not os.path.isabs(name) and '..' not in name.split('/')
    assert len(set(s.names)) == 3


def test_folder_of_shards(tmp_path):
    for shard in ['b/c/0.tar', 'a/1.tar', 'a/0.tar']:
        make_tar(tmp_path / shard, [('0.png', encoded(noise())), ('0.txt', shard.encode())])
    s = open_images(str(tmp_path), R)
    assert [s.get(i)[1] for i in range(3)] == ['a/0.tar', 'a/1.tar', 'b/c/0.tar']
    assert s.names == ['0.tar/0.png', '1.tar/0.png', '0.tar/0#2.png']
    assert [open_images(f'{tmp_path}/**/0.tar', R).get(i)[1] for i in range(2)] == [
        'a/0.tar',
        'b/c/0.tar',
    ]


def test_unreadable_tar(tmp_path):
    t = make_tar(tmp_path / 'a.tar', [(f'{i}.png', encoded(noise(99, 99))) for i in range(2)])
    whole = open(t, 'rb').read()
    (tmp_path / 'cut.tar').write_bytes(whole[:40000])
    (tmp_path / 'junk.tar').write_bytes(b'junk' * 1000)
    (tmp_path / 'empty.tar').write_bytes(b'')
    with tarfile.open(tmp_path / 'gz.tar', 'w:gz') as tar:
        tar.add(t, '0.png')
    for name in ['cut', 'junk', 'empty', 'gz']:
        refused(f'{name}.tar: not a readable tar', str(tmp_path / f'{name}.tar'), R)
    refused('none.tar: no images', make_tar(tmp_path / 'none.tar', [('a.txt', b'x')]), R)


# --- sample.py: captions for a whole folder ------------------------------------------------------


def sample(folder, out, *arguments):
    script(
        'sample',
        f'--image={folder}',
        f'--out_dir={out}',
        '--device=cpu',
        '--eval_temperature=1',
        '--eval_steps=1',
        *arguments,
    )
    return {
        os.path.relpath(row['image'], folder): row['caption']
        for row in lines(out / 'captions.jsonl')
    }


def photos(folder, n=5):
    for i in range(n):
        save(folder / f'{i % 2}' / f'{i:02d}.png', noise(32, 32))
    return folder


def test_captions_of_a_folder_do_not_depend_on_the_batch(tmp_path, monkeypatch):
    """Nor on what else lies there; images with one stem have pictures of their own; the result is
    a manifest that opens."""
    photos(tmp_path / 'in')
    save(tmp_path / 'in' / '0' / '00.bmp', noise(32, 32))
    (tmp_path / 'in' / '0' / '03.png').write_bytes(b'broken')
    one = sample(tmp_path / 'in', tmp_path / 'one', '--batch=1')
    assert (
        sorted(one) == ['0/00.bmp', '0/00.png', '0/02.png', '0/04.png', '1/01.png', '1/03.png']
        and len(set(one.values())) == 6
    ), 'noise of its own each'
    assert sample(tmp_path / 'in', tmp_path / 'all', '--batch=4') == one
    for name in one:
        stem = name if '/00.' in name else name.removesuffix('.png')
        a, b = (
            np.asarray(Image.open(tmp_path / out / f'{stem}.png')).astype(int)
            for out in ('one', 'all')
        )
        assert a.shape == (32, 64, 3) and abs(a - b).max() <= 1
    assert not (tmp_path / 'all' / '0' / '03.png').exists()
    (tmp_path / 'in' / '0' / '02.png').unlink()
    less = sample(tmp_path / 'in', tmp_path / 'less', '--draw=False')
    assert less == {k: v for k, v in one.items() if k != '0/02.png'} and not list(
        (tmp_path / 'less').rglob('*.png')
    )
    assert sample(tmp_path / 'in', tmp_path / 'other', '--draw=False', '--seed=3') != less
    s = open_images(str(tmp_path / 'less' / 'captions.jsonl'), R)
    assert [s.get(i)[1] for i in range(len(s))] == list(less.values())


def test_captions_resume_after_a_kill(tmp_path, capsys):
    """A last line that was cut, in the middle of a letter too, is written anew; whole ones stay,
    and nothing is there twice."""
    photos(tmp_path / 'in')
    want = sample(tmp_path / 'in', tmp_path / 'out', '--draw=False', '--batch=2')
    path = tmp_path / 'out' / 'captions.jsonl'
    whole = path.read_bytes()
    for cut in (
        whole[:-9],
        whole[:-1],
        whole[: whole.index(b'\n') + 20],
        whole[:7],
        b'',
        whole[:-1] + 'é'.encode()[:1],
    ):
        path.write_bytes(cut)
        kept = cut[: cut.rfind(b'\n') + 1].count(b'\n')
        capsys.readouterr()
        assert (
            sample(tmp_path / 'in', tmp_path / 'out', '--draw=False') == want
            and len(lines(path)) == 5
        )
        assert f'{5 - kept} captions more, {kept} were there' in capsys.readouterr().out
    path.write_bytes(b'{"picture": 3}\n')
    assert 'captions.jsonl' in refusal(lambda: sample(tmp_path / 'in', tmp_path / 'out'))


def test_a_picture_is_there_before_its_line(tmp_path, monkeypatch):
    """A run killed between the two draws the picture again instead of leaving it out for ever."""
    photos(tmp_path / 'in', 2)
    monkeypatch.setattr(
        Image.Image, 'save', lambda *a, **kw: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        sample(tmp_path / 'in', tmp_path / 'out')
    assert not (tmp_path / 'out' / 'captions.jsonl').exists()


def test_folders_that_sample_refuses(tmp_path):
    photos(tmp_path / 'in', 2)
    t = make_tar(tmp_path / 'a.tar', [('0.png', encoded(noise()))])
    assert 'inside a tar' in refusal(lambda: sample(t, tmp_path / 'out'))
    assert 'lies in --image' in refusal(lambda: sample(tmp_path / 'in', tmp_path / 'in' / 'out'))
    assert '--batch: expected 1' in refusal(
        lambda: sample(tmp_path / 'in', tmp_path / 'out', '--batch=0')
    )


def test_captions_on_two_ranks_are_those_of_one(tmp_path, monkeypatch):
    """Rank 1 first, what it would send kept for rank 0; lines are in the folder's order whoever
    captioned them."""
    photos(tmp_path / 'in')
    (tmp_path / 'in' / '1' / '03.png').write_bytes(b'broken')
    want = sample(tmp_path / 'in', tmp_path / 'one', '--draw=False')
    sent = []
    monkeypatch.setattr(common, 'total', lambda value, run: value)
    for rank, gather in (
        (1, lambda items, run: sent.append(items) or items),
        (0, lambda items, run: items + sent.pop(0)),
    ):
        monkeypatch.setattr(common, 'gather_objects', gather)
        monkeypatch.setattr(
            common,
            'start',
            lambda c: types.SimpleNamespace(rank=rank, world=2, master=rank == 0, device='cpu'),
        )
        if rank:
            script(
                'sample',
                f'--image={tmp_path}/in',
                f'--out_dir={tmp_path}/two',
                '--eval_temperature=1',
                '--draw=False',
                '--batch=2',
            )
            assert (
                sum(len(part) for part in sent) == 2
                and len(sent) == 2
                and not (tmp_path / 'two' / 'captions.jsonl').exists()
            )
    assert sample(tmp_path / 'in', tmp_path / 'two', '--draw=False', '--batch=2') == want
    images = [row['image'] for row in lines(tmp_path / 'two' / 'captions.jsonl')]
    assert len(images) == 4 and images == sorted(images)


# --- the layouts of data/README.md ---------------------------------------------------------------


def layouts(sets):
    """Miniatures of the public sets as their downloads and the commands of data/README.md leave
    them below `sets`, each of two pictures, the second with red value 10; -> {set: captions}."""
    red = [np.full((R, R, 3), (10 * i, 0, 0), np.uint8) for i in range(2)]

    def tars(folder, caption):
        for i in range(2):
            make_tar(
                sets / folder / f'{i:05d}.tar',
                [(f'{i:09d}.jpg', encoded(red[i], 'JPEG', quality=95)), *caption(i)],
            )

    tars('blip3o-60k', lambda i: [(f'{i:09d}.txt', f'blip {i}'.encode())])
    tars(
        't2i-2m/data_512_2M',
        lambda i: [(f'{i:09d}.json', json.dumps(dict(prompt=f't2i {i}')).encode())],
    )
    tars(
        'megalith/tars',
        lambda i: [
            (f'{i:09d}.json', json.dumps(dict(url='u', key=f'{i:09d}', status='success')).encode())
        ],
    )
    tars(
        'laion/tars',
        lambda i: [
            (f'{i:09d}.txt', f'laion {i}'.encode()),
            (f'{i:09d}.json', json.dumps(dict(caption=f'laion {i}', url='u')).encode()),
        ],
    )
    echo = sets / 'Echo-4o-Image' / 'Instruction-Following-Image'
    save(sets / 'docci' / 'images' / 'x.jpg', red[0])
    for i in range(2):
        save(echo / 'images' / f'{i:05d}.jpg', red[i], quality=95)
        save(sets / 'sharegpt-4o' / 'text_to_image' / f'image_{i}.png', red[i])
        save(sets / 'docci' / 'images' / f'train_{i:05d}.jpg', red[i], quality=95)
        save(sets / 'llava' / 'images' / f'0000{i}' / f'{i}.jpg', red[i], quality=95)
        save(sets / 'hf' / f'{i}.png', red[i])
    write_manifest(
        echo / 'Instruction-Following-Image.jsonl',
        [
            dict(
                task_type='t2i',
                instruction=f'echo {i}',
                type='x',
                output_image=f'/Echo-4o-Image/Instruction-Following-Image/images/{i:05d}.jpg',
            )
            for i in range(2)
        ],
    )
    write_manifest(
        sets / 'sharegpt-4o' / 'text_to_image.json',
        [
            dict(
                input_prompt=f'share {i}',
                output_image=f'text_to_image/image_{i}.png',
                output_image_resolution=[R, R],
            )
            for i in range(2)
        ],
    )
    write_manifest(
        sets / 'docci' / 'docci_descriptions.jsonlines',
        [
            dict(
                example_id=f'train_{i:05d}',
                split='train',
                image_file=f'train_{i:05d}.jpg',
                description=f'docci {i}',
            )
            for i in range(2)
        ],
    )
    write_manifest(
        sets / 'llava' / 'blip_laion_cc_sbu_558k.json',
        [
            dict(
                id=str(i),
                image=f'0000{i}/{i}.jpg',
                conversations=[
                    {'from': 'human', 'value': '<image>\nDescribe.'},
                    {'from': 'gpt', 'value': f'llava {i}'},
                ],
            )
            for i in range(2)
        ],
    )
    write_manifest(
        sets / 'hf' / 'metadata.jsonl',
        [dict(file_name=f'{i}.png', text=f'hf {i}') for i in range(2)],
    )
    return dict(
        blip='blip3o-60k',
        t2i='t2i-2m',
        echo='Echo-4o-Image',
        share='sharegpt-4o',
        docci='docci/',
        llava='llava/',
        megalith='megalith/tars',
        laion='laion/tars',
    )


def test_every_command_of_the_readme_finds_its_set(tmp_path):
    """The words --data and --data_keys are taken from data/README.md itself, quoted as a shell
    would read them."""
    with open('data/README.md', encoding='utf-8') as f:
        text = f.read()
    sets, found = layouts(tmp_path / 'sets'), {}
    for block in re.findall(r'^```sh\n(.*?)^```', text, re.S | re.M):
        block = block.replace('\\\n', ' ').replace('$SETS', str(tmp_path / 'sets'))
        for command in [
            line
            for line in block.splitlines()
            if line.startswith('python ') and f'{tmp_path}/sets' in line
        ]:
            script_name, *words = shlex.split(command)[1:]
            c = config.parse({}, {}, words, script_name)
            s = open_images(c.data, R, *c.data_keys)
            name = next(k for k, folder in sets.items() if f'{tmp_path}/sets/{folder}' in c.data)
            found[name] = [s.get(i)[1] for i in range(len(s))]
            assert [abs(int(u8(s.get(i)[0])[0, 0, 0]) - 10 * i) <= 3 for i in range(len(s))] == [
                True,
                True,
            ], name
            assert (script_name == 'pretrain_decoder.py') <= (
                found[name] == [f'{name} {i}' for i in range(2)]
            ), 'a command that needs captions'
    assert found == {**{k: [f'{k} 0', f'{k} 1'] for k in sets}, 'megalith': [None, None]}
    keys = re.search(r'`--data=FOLDER/metadata.jsonl (--data_keys=.*?)`', text)[1]
    c = config.parse({}, {}, shlex.split(keys), 'x.py')
    assert (
        open_images(str(tmp_path / 'sets' / 'hf' / 'metadata.jsonl'), R, *c.data_keys).get(1)[1]
        == 'hf 1'
    )
