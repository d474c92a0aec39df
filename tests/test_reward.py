"""The reward: preprocessing as the towers expect it, a cosine of the right pairs, its gradient."""
import json
import math
import os
import shutil
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision import transforms as T

import reward
from conftest import shared_config
from lib.ocr import Ocr, edit_distance
from reward import BACKBONES, IMAGENET, OPENAI, backbone, clip_reward, preprocess
from running import refusal, tiny

JUDGE = 'data/shapes/base/judge'
CONFIG = types.SimpleNamespace(clip='local-dir:data/shapes/base/clip', judge=JUDGE)


# --- preprocessing -------------------------------------------------------------------------------
def structured(h, w):
    """(h, w, 3) uint8: waves from slow to faster than any small copy can hold, edges, a ramp.

    Away from 0 and 255, where PIL would clip the overshoot at an edge between its two passes.
    """
    i, j = np.mgrid[:h, :w].astype(float)
    red = 128 + 70 * np.sin(0.0012 * i * j / 4)
    green = 60 + 136 * (((i // 3) + (j // 5)) % 2)
    blue = 255 * j / w
    return np.stack([red, green, blue], -1).clip(0, 255).astype(np.uint8)


def pil(image, mean, std, resize, crop):
    """The same by torchvision's transforms on a PIL image, as the models' own libraries do it."""
    size = (crop, crop) if resize is None else resize
    steps = [T.Resize(size, T.InterpolationMode.BICUBIC), T.CenterCrop(crop)]
    steps += [T.ToTensor(), T.Normalize(mean, std)]
    return T.Compose(steps)(Image.fromarray(image))


def batch_of(image):
    """(h, w, 3) uint8 -> (1, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1


CASES = (
    (512, 512, dict(OPENAI, resize=224, crop=224)),
    (512, 512, dict(IMAGENET, resize=256, crop=224)),
    (427, 640, dict(IMAGENET, resize=256, crop=224)),
    (512, 384, dict(OPENAI, resize=224, crop=224)),
    (384, 512, dict(IMAGENET, resize=None, crop=224)),
    (384, 512, dict(IMAGENET, resize=(256, 240), crop=224)),
    (100, 100, dict(OPENAI, resize=224, crop=224)))


@pytest.mark.parametrize(
    'h, w, how', CASES, ids=lambda a: str(a) if isinstance(a, int) else f"{a['resize']}")
def test_preprocess_is_pil_s(h, w, how):
    image = structured(h, w)
    got, want = preprocess(batch_of(image), **how)[0], pil(image, **how)
    assert got.shape == (3, 224, 224)
    assert (got - want).abs().max().item() < 0.05


def test_without_antialias_the_picture_above_is_another_one():
    """The picture is one that can tell: sampled without the filter it is far off."""
    image = structured(512, 512)
    x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    rough = torch.nn.functional.interpolate(x, (224, 224), mode='bicubic')[0]
    assert (rough - pil(image, (0, 0, 0), (1, 1, 1), 224, 224)).abs().mean().item() > 0.02


def test_preprocess_of_the_right_size_only_normalises():
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    got = preprocess(x, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5), 32, 32)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.5])
    want = (x / 2 + 0.5 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(got, want)
    plain = dict(mean=(0., 0., 0.), std=(1., 1., 1.), resize=32, crop=32)
    values = preprocess(x.sign() * 7, **plain).unique().tolist()
    assert values == [0, 1], 'no reward outside the range'
    assert preprocess(x.bfloat16(), **plain).dtype == torch.float32


def test_tiny_towers_preprocess_as_their_folders_say():
    with open('data/shapes/base/clip/open_clip_config.json') as f:
        cfg = json.load(f)
    pre, side = cfg['preprocess_cfg'], cfg['model_cfg']['vision_cfg']['image_size']
    clip = dict(backbone('clip', CONFIG).pre)
    clip['mean'], clip['std'] = tuple(clip['mean']), tuple(clip['std'])
    assert clip == dict(mean=tuple(pre['mean']), std=tuple(pre['std']), resize=side, crop=side,
                        corner=math.floor)
    with open(f'{JUDGE}/preprocessor_config.json') as f:
        p = json.load(f)
    assert backbone('judge', CONFIG).pre == dict(
        mean=p['image_mean'], std=p['image_std'], resize=None, crop=p['size']['height'],
        mode='bicubic', corner=math.floor)


# --- a model's own preprocessor_config.json ------------------------------------------------------
NORM = dict(image_mean=[0, 0, 0], image_std=[1, 1, 1])
SQUARE = dict(height=224, width=224)
SHORTEST = dict(NORM, size=dict(shortest_edge=256), crop_size=SQUARE, resample=3)
SQUASHED = dict(NORM, size=SQUARE, resample=2)
FOLLOWED = dict(mean=[0, 0, 0], std=[1, 1, 1], crop=224, corner=math.floor)
BICUBIC = dict(FOLLOWED, resize=256, mode='bicubic')
BILINEAR = dict(FOLLOWED, resize=None, mode='bilinear')


@pytest.mark.parametrize('written, want', [
    (SHORTEST, BICUBIC),
    (SQUASHED, BILINEAR),
    (dict(SHORTEST, do_resize=True, do_center_crop=True, do_normalize=True), BICUBIC),
    (dict(SHORTEST, do_rescale=True, rescale_factor=0.00392156862745098), BICUBIC),
    (dict(SHORTEST, do_normalize=False, image_mean=[.5] * 3), BICUBIC),
    (dict(SHORTEST, size=dict(height=256, width=240)), dict(BICUBIC, resize=(256, 240))),
    (dict(SQUASHED, crop_size=SQUARE, do_center_crop=True), BILINEAR),
    (dict(SQUASHED, crop_size=dict(height=200, width=200), do_center_crop=False), BILINEAR),
    (dict(SQUASHED, crop_size=None, do_center_crop=None, do_resize=None), BILINEAR)])
def test_a_folder_s_own_preprocessing(tmp_path, written, want):
    """As transformers reads it: shortest side, or a size to squash to, then a centre crop."""
    path = tmp_path / 'preprocessor_config.json'
    path.write_text(json.dumps(written))
    assert reward.own_preprocessing(path) == want


def test_without_normalisation_values_stay_between_0_and_1(tmp_path):
    path = tmp_path / 'preprocessor_config.json'
    path.write_text(json.dumps(dict(size=SQUARE, do_normalize=False)))
    x = torch.rand(1, 3, 224, 224) * 2 - 1
    got = preprocess(x, **reward.own_preprocessing(path))
    torch.testing.assert_close(got, x / 2 + 0.5)


def without(fields, gone):
    return {field: value for field, value in fields.items() if field != gone}


@pytest.mark.parametrize('written, field', [
    (NORM, 'size'),
    ({}, 'image_mean'),
    (dict(NORM, size=224), 'size'),
    (dict(NORM, size=dict(height=224, width=200)), 'size'),
    (dict(NORM, size=dict(shortest_edge=256, longest_edge=300), crop_size=SQUARE), 'size'),
    (dict(NORM, size=dict(shortest_edge=224)), 'do_center_crop'),
    (dict(SHORTEST, do_center_crop=False), 'do_center_crop'),
    (dict(SQUASHED, do_center_crop=True), 'crop_size'),
    (dict(SHORTEST, crop_size=224), 'crop_size'),
    (dict(SHORTEST, crop_size=dict(height=224, width=200)), 'crop_size'),
    (dict(SHORTEST, crop_size=dict(height=300, width=300)), 'crop_size'),
    (dict(SHORTEST, do_resize=False), 'do_resize'),
    (dict(SHORTEST, do_rescale=False), 'do_rescale'),
    (dict(SHORTEST, rescale_factor=1 / 127.5), 'rescale_factor'),
    (dict(SHORTEST, resample=0), 'resample'),
    (dict(SHORTEST, resample=1), 'resample'),
    (without(SHORTEST, 'image_mean'), 'image_mean'),
    (without(SHORTEST, 'image_std'), 'image_std')])
def test_what_cannot_be_followed_is_refused_with_file_and_field(tmp_path, written, field):
    path = tmp_path / 'preprocessor_config.json'
    path.write_text(json.dumps(written))
    message = refusal(reward.own_preprocessing, path)
    assert message.startswith(f'{path}: {field}=')


@pytest.mark.parametrize('text', ['[', '[]', '3', None])
def test_a_file_that_is_no_object_is_refused(tmp_path, text):
    path = tmp_path / 'preprocessor_config.json'
    if text is not None:
        path.write_text(text)
    assert str(path) in refusal(reward.own_preprocessing, path)


def test_a_judge_without_its_preprocessing_is_refused(tmp_path):
    """Not measured through another model's preprocessing."""
    folder = str(tmp_path / 'judge')
    shutil.copytree(JUDGE, folder)
    c = types.SimpleNamespace(clip='', judge=folder)
    assert backbone('judge', c).pre['crop'] == 32
    os.remove(f'{folder}/preprocessor_config.json')
    message = refusal(backbone, 'judge', c)
    assert folder in message and 'preprocessor_config.json' in message


def test_a_judge_from_the_hub_gets_its_own_preprocessing(tmp_path, monkeypatch):
    """From the hub's cache, where a download would leave it; nothing is asked of the network."""
    snapshot = tmp_path / 'cache' / 'models--us--judge' / 'snapshots' / ('0' * 40)
    shutil.copytree(JUDGE, snapshot)
    refs = tmp_path / 'cache' / 'models--us--judge' / 'refs'
    refs.mkdir()
    (refs / 'main').write_text('0' * 40)
    for module in ('huggingface_hub.constants', 'transformers.utils.hub.constants'):
        monkeypatch.setattr(f'{module}.HF_HUB_CACHE', str(tmp_path / 'cache'))
        monkeypatch.setattr(f'{module}.HF_HUB_OFFLINE', True)
    c = types.SimpleNamespace(clip='', judge='us/judge')
    assert backbone('judge', c).pre == backbone('judge', CONFIG).pre
    os.remove(snapshot / 'preprocessor_config.json')
    message = refusal(backbone, 'judge', c)
    assert 'us/judge' in message and 'preprocessor_config.json' in message


# --- the cosine ----------------------------------------------------------------------------------
@pytest.fixture(scope='module', params=['clip', 'judge'])
def tower(request):
    return backbone(request.param, CONFIG)


@pytest.fixture(scope='module')
def x_hat(x):
    """Reconstructions of x, each worse than the one before."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return (x + noise * torch.linspace(0.05, 0.6, len(x)).view(-1, 1, 1, 1)).clamp(-1, 1)


def test_a_picture_is_like_itself(tower, x, x_hat):
    torch.testing.assert_close(clip_reward(x, x, tower), torch.ones(len(x)), atol=1e-5, rtol=0)
    assert (clip_reward(x, x_hat, tower) < 1 - 1e-4).all()
    assert (clip_reward(x, x.roll(1, 0), tower) < 0.999).all()


def test_symmetric_and_in_range(tower, x, x_hat):
    r = clip_reward(x, x_hat, tower)
    assert r.shape == (len(x),) and r.dtype == torch.float32
    torch.testing.assert_close(r, clip_reward(x_hat, x, tower), atol=1e-6, rtol=1e-5)
    worst = clip_reward(x, -x, tower)
    assert r.abs().max() <= 1 + 1e-6 and worst.abs().max() <= 1 + 1e-6 and worst.mean() < r.mean()


def test_it_is_the_cosine_of_the_features(tower, x, x_hat):
    f, g = tower.features(x), tower.features(x_hat)
    torch.testing.assert_close(f.norm(dim=-1), torch.ones(len(x)))
    cosines = torch.cosine_similarity(f, g)
    torch.testing.assert_close(clip_reward(x, x_hat, tower), cosines, atol=1e-5, rtol=0)


def test_row_i_is_scored_against_row_i(tower, x, x_hat):
    r = clip_reward(x, x_hat, tower)
    for i in range(len(x)):
        assert abs(clip_reward(x[i:i + 1], x_hat[i:i + 1], tower).item() - r[i].item()) < 1e-5
    order = torch.tensor([2, 0, 3, 1])
    permuted = clip_reward(x[order], x_hat[order], tower)
    torch.testing.assert_close(permuted, r[order], atol=1e-5, rtol=0)
    assert (clip_reward(x, x_hat[order], tower) - r).abs().min() > 1e-4
    mixed = x_hat.clone()
    mixed[1] = x[1]
    changed = (clip_reward(x, mixed, tower) - r).abs() > 1e-5
    assert changed.tolist() == [False, True, False, False]


def test_groups_share_their_source(tower, x, x_hat):
    """P pictures, P*G reconstructions in contiguous groups: each source is looked at once."""
    seen = []

    def count(module, args, kwargs, out):
        image, = (*args, *kwargs.values())
        seen.append(len(image))

    handle = tower.tower.register_forward_hook(count, with_kwargs=True)
    r = clip_reward(x[:2], x_hat, tower)
    handle.remove()
    assert seen == [2, 4]
    repeated = clip_reward(x[:2].repeat_interleave(2, 0), x_hat, tower)
    torch.testing.assert_close(r, repeated, atol=1e-6, rtol=1e-5)


def test_gradient_in_the_reconstruction_alone(tower, x, x_hat):
    x, x_hat = x.clone().requires_grad_(), x_hat.clone().requires_grad_()
    r = clip_reward(x, x_hat, tower)
    r.sum().backward()
    assert x.grad is None and x_hat.grad.isfinite().all()
    assert x_hat.grad.abs().amax((1, 2, 3)).min() > 0
    assert not any(p.requires_grad or p.grad is not None for p in tower.parameters())
    assert not tower.training
    with torch.no_grad():                                               # and uphill is uphill
        step = x_hat + 0.5 * x_hat.grad / x_hat.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        assert clip_reward(x, step, tower).mean() > r.mean()


def test_the_default_tower_is_the_tiny_clip(x, x_hat):
    by_default = clip_reward(x, x_hat)
    torch.testing.assert_close(by_default, clip_reward(x, x_hat, backbone('clip', CONFIG)))
    assert len(reward._default) == 1
    by_judge = clip_reward(x, x_hat, backbone('judge', CONFIG))
    assert (by_default - by_judge).abs().max() > 1e-3


def test_unknown_backbone_names_those_there_are():
    with pytest.raises(SystemExit) as stop:
        backbone('clop', CONFIG)
    message = str(stop.value)
    assert '\n' not in message and 'clop' in message and all(name in message for name in BACKBONES)


@pytest.mark.parametrize('name, key', [('clip', 'local-dir:no/such'), ('judge', 'no/such/folder')])
def test_missing_backbone_is_one_line(name, key):
    with pytest.raises(SystemExit) as stop:
        backbone(name, types.SimpleNamespace(clip=key, judge=key))
    assert '\n' not in str(stop.value) and 'no/such' in str(stop.value)


def test_a_tower_s_pass_has_micro_batch_rows(x, x_hat, monkeypatch):
    config = types.SimpleNamespace(**vars(CONFIG), micro_batch=2)
    tower = backbone('clip', config)
    passes = []
    features = tower.features
    monkeypatch.setattr(tower, 'features', lambda x: passes.append(len(x)) or features(x))
    with torch.no_grad():
        by_two = clip_reward(x, x_hat, tower)
    assert max(passes) == 2
    torch.testing.assert_close(by_two, clip_reward(x, x_hat, backbone('clip', CONFIG)))


def test_a_weighted_reward_is_the_weighted_sum_of_its_cosines():
    config = shared_config('--reward=clip:0.7,judge:0.3')
    mixed = reward.reward_tower(config)
    x, x_hat = torch.rand(2, 3, 3, 32, 32) * 2 - 1
    parts = [clip_reward(x, x_hat, backbone(name, config)) for name in ('clip', 'judge')]
    expected = 0.7 * parts[0] + 0.3 * parts[1]
    torch.testing.assert_close(clip_reward(x, x_hat, mixed), expected)


def test_a_tower_does_not_judge_itself():
    config = shared_config('--preset=medium', '--reward=dinov2')
    assert 'is the judge too' in refusal(reward.reward_parts, config)


# --- rewards without a tower ----------------------------------------------------------------------
FUNCTIONS = '''
def length(captions, x, x_hat):
    with open({path!r}, 'a') as f:
        print(*captions, sep='\\n', file=f)
    return x_hat.mean((1, 2, 3)) + x_hat.new_tensor([len(caption) for caption in captions])

def blind(captions, x, x_hat):
    return x_hat.detach().mean((1, 2, 3))
'''


@pytest.fixture
def functions(tmp_path):
    """A file of rewards of one's own; `length` notes the captions in captions.txt beside it."""
    path = tmp_path / 'own.py'
    path.write_text(FUNCTIONS.format(path=str(tmp_path / 'captions.txt')))
    return path


def test_a_function_of_one_s_own_gets_captions_and_sources(functions, x):
    tower = reward.reward_tower(shared_config(f'--reward=clip:0.5,{functions}:length:2'))
    x_hat = x.roll(1, 0)
    captions = ['a', 'bb', 'ccc', '']
    cosines = clip_reward(x[:2], x_hat, backbone('clip', CONFIG))
    expected = 0.5 * cosines + 2 * (x_hat.mean((1, 2, 3)) + torch.tensor([1, 2, 3, 0]))
    torch.testing.assert_close(clip_reward(x[:2], x_hat, tower, captions), expected)


def test_stage_1_gives_a_function_its_captions(functions, tmp_path):
    tiny('cold_start', tmp_path / 'out', f'--reward={functions}:length', steps=1, images=2)
    captions = (tmp_path / 'captions.txt').read_text().splitlines()
    assert len(captions) == 2 and all(len(caption.split()) > 2 for caption in captions)


def test_stage_1_refuses_a_reward_without_a_gradient(functions, tmp_path, monkeypatch):
    """Also beside one that has a gradient; the other stages take it."""
    monkeypatch.setattr('lib.ocr.Ocr', Reader)
    of_function = f'--reward=clip,{functions}:blind'
    for parts, name in ((of_function, f'{functions}:blind'), ('--reward=clip,ocr', 'ocr')):
        message = refusal(tiny, 'cold_start', tmp_path / name[-3:], parts)
        assert f'{name} has no gradient' in message
        (line,) = tiny('grpo_encoder', tmp_path / f'2{name[-3:]}', parts, steps=1)
        assert math.isfinite(line['reward'])


# --- text in images -------------------------------------------------------------------------------
@pytest.mark.parametrize('a, b, distance', [
    ('', '', 0), ('', 'abc', 3), ('abc', 'abc', 0), ('kitten', 'sitting', 3), ('flaw', 'lawn', 2),
    ('abc', 'xabc', 1), ('abcd', 'bcd', 1), ('abc', 'cba', 2), ('STOP', 'stop', 4)])
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


class Reader(Ocr):
    """Reads in an image what TEXTS says of its first value."""
    TEXTS = {0.0: 'it', 0.25: 'stop', 0.5: 'shop', 1.0: 'stops', -1.0: 'sto'}

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.asked = []

    def read(self, image):
        value = image.flatten()[0].item()
        self.asked.append(value)
        return self.TEXTS.get(value, '')


def images_of(*values):
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def test_ocr_is_one_minus_the_distance_over_the_longer_text():
    """A source is read once for its group; where it is without text, nothing else is read."""
    reader = Reader()
    x, x_hat = images_of(0.25, 0.0, -1.0), images_of(1.0, 0.5, 0.0, 0.0, 0.25, 0.125)
    expected = [0.8, 0.75, math.nan, math.nan, 0.75, 0]
    assert reader.reward(x, x_hat).tolist() == pytest.approx(expected, nan_ok=True)
    assert reader.asked == [0.25, 1.0, 0.5, 0.0, -1.0, 0.25, 0.125]


def test_without_text_the_weight_goes_to_the_others():
    class Fixed(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def reward(self, x, x_hat, captions):
            return torch.full((len(x_hat),), self.value)

    x, x_hat = images_of(0.25, 0.0), images_of(0.5, 0.5)
    mixed = reward.Reward(dict(clip=(0.6, Fixed(0.5)), ocr=(0.5, Reader()), own=(0.4, Fixed(1.0))))
    of_others = 0.6 * 0.5 + 0.4
    expected = [of_others + 0.5 * 0.75, 1.5 * of_others]
    assert clip_reward(x, x_hat, mixed).tolist() == pytest.approx(expected)


def test_ocr_alone_or_without_its_library_is_refused(monkeypatch):
    assert 'clip:0.7,ocr:0.3' in refusal(reward.reward_tower, shared_config('--reward=ocr'))
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    config = shared_config('--reward=clip:0.7,ocr:0.3')
    assert 'pip install rapidocr onnxruntime' in refusal(reward.reward_tower, config)


@pytest.fixture(scope='module')
def ocr():
    for package in ('rapidocr', 'onnxruntime'):
        pytest.importorskip(package, reason='the reward ocr reads with rapidocr and onnxruntime')
    return Ocr()


def written(*words, ink='black'):
    """An image (3, 256, 256) in [-1, 1] with a word in each line."""
    image = Image.new('RGB', (256, 256), 'white')
    for row, word in enumerate(words):
        place = 20, 20 + 60 * row
        ImageDraw.Draw(image).text(place, word, ink, ImageFont.load_default(32))
    return batch_of(np.array(image))[0]


def test_drawn_words_are_read(ocr):
    assert ocr.read(written('Exit 42!', 'Main-Street')) == 'Exit42MainStreet'
    assert ocr.read(written()) == ''


def test_ocr_rewards_the_text_of_the_source(ocr):
    x = torch.stack([written('OPEN'), written()])
    x_hat = torch.stack([written('OPEN', ink='red'), written('OVEN'), written('OPEN'), written()])
    r = ocr.reward(x, x_hat)
    assert r.tolist() == pytest.approx([1, 0.75, math.nan, math.nan], nan_ok=True)


def test_the_colours_of_an_image_reach_the_reader_in_its_order(ocr, monkeypatch):
    seen = []
    monkeypatch.setattr(ocr, 'engine', lambda pixels: seen.append(pixels) or Nothing)
    ocr.read(torch.tensor([1.5, -0.2, -1.0]).view(3, 1, 1).expand(3, 5, 7))
    assert seen[0].shape == (5, 7, 3)
    assert seen[0][0, 0].tolist() == [0, 102, 255]


class Nothing:
    txts = None
