"""Unified-Bench: the official layout and rules, refusals instead of a mean over fewer.

Each backbone is compared with its own library. The three that are too large to ship stand here as
random ones of the same classes, loaded by the same code.
"""
import json
import math
import os
import shutil
import types

import numpy as np
import pytest
import torch
from PIL import Image

import config
import eval_unified
from lib import scores as lib_scores
import reward
from bench import unified
from conftest import new_uae
from data.shapes import scenes as world
from running import refusal
from test_reward import structured

QUICK = ['--bench=unified', '--device=cpu', '--eval_denoise_steps=2', '--caption_len=6']


@pytest.fixture(scope='session')
def standins(tmp_path_factory):
    """{name: folder} of tiny random models with the real ones' classes and input size."""
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model
    from transformers import DINOv3ViTConfig, DINOv3ViTModel
    root = tmp_path_factory.mktemp('backbones')
    tiny = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    small = dict(tiny, intermediate_size=64)
    torch.manual_seed(0)
    vision = dict(small, image_size=224, patch_size=32)
    text = dict(small, vocab_size=50, max_position_embeddings=248)
    longclip = CLIPConfig(vision_config=vision, text_config=text, projection_dim=24)
    dinov2 = Dinov2Config(**tiny, image_size=224, patch_size=28)
    dinov3 = DINOv3ViTConfig(**small, image_size=224, patch_size=32, num_register_tokens=4)
    models = dict(longclip=CLIPModel(longclip), dinov2=Dinov2Model(dinov2),
                  dinov3=DINOv3ViTModel(dinov3))
    for name, model in models.items():
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))     # as initialised all pictures look alike
        model.save_pretrained(root / name)
    return {name: str(root / name) for name in models}


@pytest.fixture
def four(standins):
    named = [f'{name}={folder}' for name, folder in standins.items()]
    return '--backbones=clip,' + ','.join(named)


def picture(seed, h, w):
    """(h, w, 3) uint8, unlike for unlike seeds."""
    return np.roll(structured(h, w), 7 * seed, (0, 1)) // (1 + seed % 2) + 10 * seed


def folder_of(path, pictures):
    path.mkdir(parents=True, exist_ok=True)
    for name, pixels in pictures.items():
        Image.fromarray(pixels.astype(np.uint8)).save(path / name)
    return path


def tensor_of(path):
    """x (1, 3, H, W) of an image file."""
    pixels = torch.from_numpy(np.array(Image.open(path)))
    return pixels.permute(2, 0, 1)[None] / 127.5 - 1


@pytest.fixture
def bench(tmp_path):
    """Three scenes as references in the official layout."""
    rng = np.random.default_rng(3)
    drawn = {f'{i}.png': world.draw(world.random_scene(rng)) for i in range(3)}
    folder_of(tmp_path / 'bench' / 'Image', drawn)
    return tmp_path / 'bench'


@pytest.fixture
def others(tmp_path):
    """References of several shapes and somebody's reconstructions.

    They are named by each of the three rules; one belongs to no reference.
    """
    root = tmp_path / 'others'
    folder_of(root / 'Image', {
        '0.png': picture(0, 300, 500), '1.png': picture(1, 427, 320),
        '10.png': picture(2, 256, 256)})
    folder_of(root / 'example_image', {
        '0.png': picture(3, 240, 240), '1.jpg': picture(4, 256, 256),
        'recon_10.png': picture(5, 224, 256), 'x.png': picture(6, 64, 64)})
    return root


def run(out, data, *flags):
    """eval_unified.py in this process -> (unified.json, report.json)."""
    eval_unified.main([*QUICK, f'--data={data}', f'--out_dir={out}', *flags])
    return tuple(json.loads((out / f'{name}.json').read_text()) for name in ('unified', 'report'))


def official_processors():
    """The processors of the four, made from the settings that their hub folders hold."""
    from transformers import DINOv3ViTImageProcessor
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    square = dict(height=224, width=224)
    clip = CLIPImageProcessorPil(size=dict(shortest_edge=224), crop_size=square)
    bit = BitImageProcessorPil(
        size=dict(shortest_edge=256), crop_size=square, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    return dict(clip=clip, dinov2=bit, dinov3=DINOv3ViTImageProcessor(size=square))


# --- the backbones -------------------------------------------------------------------------------
@pytest.mark.parametrize('h, w', [(512, 512), (427, 640), (640, 427), (301, 512), (100, 100)])
@pytest.mark.parametrize('name', ['clip', 'longclip', 'dinov2', 'dinov3'])
def test_preprocessing_is_that_of_the_model_s_own_library(name, h, w):
    pixels = structured(h, w)
    image = Image.fromarray(pixels)
    how = reward.BACKBONES[name][2]
    if name == 'clip':
        how = dict(reward.OPENAI, resize=224, crop=224, corner=math.floor)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    got = reward.preprocess(x, **how)[0]
    if name == 'longclip':
        from open_clip import image_transform
        want = image_transform(224, False, **reward.OPENAI)(image)
    else:
        processor = official_processors()[name]
        want = processor(images=image, return_tensors='pt')['pixel_values'][0]
    assert got.shape == want.shape and (got - want).abs().max() < 0.03


def test_scores_are_those_of_the_official_recipe(others, standins, four, tmp_path, capsys):
    """Each pair by the libraries' own processors, image by image, cosine, plain means.

    LongCLIP: the projected vector, not the hidden state; the DINOs: the CLS token.
    """
    from transformers import AutoModel
    found, report = run(tmp_path / 'out', others, four, f'--generated={others}/example_image')
    pairs = {'0.png': '0.png', '1.jpg': '1.png', 'recon_10.png': '10.png'}
    processors = official_processors()
    processors['longclip'] = processors['clip']
    means = {}
    for name, folder in standins.items():
        model, cosines = AutoModel.from_pretrained(folder).eval(), {}
        for made, reference in pairs.items():
            features = []
            for path in (others / 'Image' / reference, others / 'example_image' / made):
                image = Image.open(path).convert('RGB')
                pixels = processors[name](images=image, return_tensors='pt')['pixel_values']
                with torch.no_grad():
                    if name == 'longclip':
                        f = model.get_image_features(pixel_values=pixels).pooler_output
                    else:
                        f = model(pixel_values=pixels).last_hidden_state[:, 0]
                features.append(f)
            cosines[made] = torch.cosine_similarity(*features).item()
        got = found['similarities_by_model'][name]
        assert got.keys() == {*pairs, 'x.png'} and got['x.png'] is None
        assert max(cosines.values()) < 0.98, 'pictures that this tower can tell apart'
        assert all(abs(got[made] - cosines[made]) < 4e-3 for made in pairs), name
        means[name] = sum(got[made] for made in pairs) / 3
    clip = found['similarities_by_model']['clip']
    means['clip'] = sum(clip[made] for made in pairs) / 3
    averages = found['summary']['average_scores_by_model']
    assert ({name: round(value, 6) for name, value in averages.items()}
            == {name: round(value, 6) for name, value in means.items()})
    overall = sum(means.values()) / 4
    assert abs(found['summary']['overall_average'] - overall) < 1e-9
    assert abs(report['summary']['overall'] - overall) < 1e-9
    assert report['standard_error'] == {}
    assert 'x.png belongs to no reference' in capsys.readouterr().out


# --- the official script's JSON and rules --------------------------------------------------------
def test_json_has_the_official_keys_and_statistics():
    scores = dict(clip={'0.jpg': 0.5, '1.jpg': 0.75, 'x.jpg': None},
                  dinov2={'0.jpg': -0.25, '1.jpg': 0.5, 'x.jpg': None})
    assert unified.unified_score(scores) == dict(
        model_types=['clip', 'dinov2'],
        similarities_by_model=dict(
            clip={'0.jpg': 0.5, '1.jpg': 0.75, 'x.jpg': None},
            dinov2={'0.jpg': -0.25, '1.jpg': 0.5, 'x.jpg': None}),
        statistics_by_model=dict(
            clip=dict(total_images=3, valid_pairs=2, average_similarity=0.625,
                      min_similarity=0.5, max_similarity=0.75),
            dinov2=dict(total_images=3, valid_pairs=2, average_similarity=0.125,
                        min_similarity=-0.25, max_similarity=0.5)),
        summary=dict(
            models_used=['clip', 'dinov2'], overall_average=0.375,
            average_scores_by_model=dict(clip=0.625, dinov2=0.125),
            best_model=('clip', 0.625), worst_model=('dinov2', 0.125)))


@pytest.mark.parametrize('name, reference', [
    ('1.jpg', '1.jpg'), ('1.png', '1.jpg'), ('recon_1.png', '1.jpg'), ('recon_10.jpg', '10.jpg'),
    ('a.b.png', 'a.b.png'), ('recon_a.b.jpg', 'a.b.png'), ('01.jpg', None), ('1', '1.jpg'),
    ('recon1.jpg', None), ('x_recon_1.jpg', None), ('recon_recon_1.jpg', None)])
def test_a_file_belongs_to_the_reference_of_its_name_or_stem(name, reference):
    references = ['1.jpg', '10.jpg', 'a.b.png']
    rest = [(r, r) for r in references if r != reference]
    found = unified.match_files([(name, 'mine'), *rest], references, 'picture')
    assert found == {r: 'mine' if r == reference else r for r in references}


@pytest.mark.parametrize('files, references', [
    (['1.jpg', '1.png'], ['1.jpg', '1.png']),               # the same name before the same stem
    (['recon_1.png', 'recon_1.jpg'], ['1.jpg', 'recon_1.jpg']),
    (['recon_1.png', '1.png'], ['recon_1.jpg', '1.jpg'])])
def test_of_two_references_that_fit_a_file_belongs_to_the_first(files, references):
    """As officially, where the references are gone through in order; whatever the files' order."""
    wanted = dict(zip(references, files))
    for some in (files, files[::-1]):
        found = unified.match_files([(name, name) for name in some], references, 'picture')
        assert found == wanted


def test_missing_and_double_reconstructions_are_refused(others, four, tmp_path):
    folder = others / 'example_image'
    for name in ('1.jpg', 'recon_10.png'):
        os.remove(folder / name)
    message = refusal(run, tmp_path / 'out', others, four, f'--generated={folder}')
    assert '2 of 3' in message and '1.png' in message and '10.png' in message
    assert ' 0.png' not in message
    assert not (tmp_path / 'out' / 'unified.json').exists()
    Image.new('RGB', (64, 64)).save(folder / 'recon_0.png')
    message = refusal(run, tmp_path / 'out', others, four, f'--generated={folder}')
    assert f'{folder}/0.png' in message and f'{folder}/recon_0.png' in message


def test_fewer_backbones_than_asked_are_refused_before_anything_is_drawn(
        bench, standins, tmp_path, monkeypatch):
    def too_soon(*args):
        pytest.fail('drawn before the backbones were there')

    monkeypatch.setattr(unified, 'open_uae', too_soon)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    nowhere = f'{tmp_path}/nowhere'
    names = f'--backbones=clip,dinov2={standins["dinov2"]},dinov3={nowhere}'
    message = refusal(run, tmp_path / 'out', bench, names)
    assert 'dinov3' in message and nowhere in message and 'dinov2' not in message.split(':')[1]
    assert 'clip comes twice' in refusal(run, tmp_path / 'out', bench, '--backbones=clip,clip')
    assert 'clap' in refusal(run, tmp_path / 'out', bench, '--backbones=clip,clap')


def test_a_backbone_that_would_be_partly_random_is_refused(standins, tmp_path):
    from safetensors.torch import load_file, save_file
    shutil.copytree(standins['dinov3'], tmp_path / 'half')
    path = tmp_path / 'half' / 'model.safetensors'
    tensors = load_file(path)
    gone = next(k for k in sorted(tensors) if 'layer.1' in k)
    del tensors[gone]
    save_file(tensors, path, metadata=dict(format='pt'))
    half = str(tmp_path / 'half')
    message = refusal(reward.backbone, 'dinov3', None, 'cpu', half)
    assert gone in message and half in message
    without = shutil.ignore_patterns('*.safetensors', '*.bin')
    shutil.copytree('data/shapes/base/clip', tmp_path / 'clip', ignore=without)
    for source in ('ViT-L-14-quickgelu', 'no-such-model:openai', f'local-dir:{tmp_path}/clip'):
        c = types.SimpleNamespace(clip=source)
        assert source in refusal(reward.backbone, 'clip', c)


# --- our own captions and images -----------------------------------------------------------------
CLIP = '--backbones=clip,judge'


def test_what_is_written_and_that_it_is_ours(bench, tmp_path, capsys):
    """Official layout, captions by our encoder, images by its decoder; scored are the files."""
    out = tmp_path / 'out'
    sampled = ['--temperature=0.7', '--seed=5']
    found, report = run(out, bench, CLIP, *sampled)
    names = ['0.png', '1.png', '2.png']
    assert sorted(os.listdir(out / 'example_image')) == names
    c = config.parse(eval_unified.keys, {}, [*QUICK, *sampled], 'x.py')
    uae = new_uae(c)
    tower = reward.backbone('judge', c)
    for i, name in enumerate(names):
        x = tensor_of(bench / 'Image' / name)
        texts, _, x_hat = lib_scores.reconstruct(uae, x, [i], 0.7, seed=(5,))
        assert report['captions'][name] == texts[0]
        made = tensor_of(out / 'example_image' / name)
        assert (made - x_hat).abs().max() < 0.6 / 127.5
        score = found['similarities_by_model']['judge'][name]
        assert abs(score - reward.clip_reward(x, made, tower).item()) < 1e-5
    told = []
    for seed in ((5,), (6,), (5,)):
        texts, _, _ = lib_scores.reconstruct(uae, x, [0], 3.0, drawn=False, seed=seed)
        told.append(texts)
    assert told[0] == told[2] != told[1], 'another seed samples another caption'
    sheet = np.array(Image.open(out / 'contact_sheet.png').convert('RGB'))
    wanted = np.array(Image.open(bench / 'Image' / '0.png'))[0, 0]
    assert sheet.shape[1] > 3 * 2 * 160
    assert (sheet == wanted).all(-1).sum() > 500, 'the first scene, in its colours'
    assert 'overall' in capsys.readouterr().out


def test_seeds_give_mean_and_standard_error_and_images_are_drawn_once(bench, tmp_path, monkeypatch):
    out, drawn, really = tmp_path / 'out', [], lib_scores.draw_captions

    def counted(uae, y, mask, rows, *args):
        drawn.append(rows)
        return really(uae, y, mask, rows, *args)

    monkeypatch.setattr(lib_scores, 'draw_captions', counted)
    _, one = run(out, bench, CLIP)
    assert drawn == [[0], [1], [2]]
    before = (out / 'example_image' / '1.png').read_bytes()
    os.remove(out / 'example_image' / '1.png')
    drawn.clear()
    _, three = run(out, bench, CLIP, '--seeds=3')
    assert drawn == [[1], [0], [1], [2], [0], [1], [2]], 'the lost one and the new seeds'
    assert (out / 'example_image' / '1.png').read_bytes() == before
    files = [out / f'example_image{k}' / '1.png' for k in ('', '_1', '_2')]
    assert len({file.read_bytes() for file in files}) == 3
    results = [json.loads((out / f'unified{k}.json').read_text()) for k in ('', '_1', '_2')]
    overall = np.array([result['summary']['overall_average'] for result in results])
    assert overall[0] == one['summary']['overall']
    assert abs(three['summary']['overall'] - overall.mean()) < 1e-12
    error = overall.std(ddof=1) / 3 ** 0.5
    assert abs(three['standard_error']['overall'] - error) < 1e-12
    assert three['standard_error']['clip'] > 0
    drawn.clear()
    assert run(out, bench, CLIP, '--seeds=3')[1] == three and not drawn
    for flag in ('--eval_denoise_steps=3', '--seed=4', '--temperature=1'):
        message = refusal(run, out, bench, CLIP, flag)
        assert str(out) in message and flag[2:].split('=')[0] in message


def test_other_people_s_captions_through_our_decoder(bench, tmp_path, monkeypatch):
    def ours(*args, **how):
        pytest.fail('our encoder captioned')

    monkeypatch.setattr(unified, 'reconstruct', ours)
    names = ('0.png', '1.jpg', '2.jpg')
    lines = []
    for name, side in zip(names, ('left', 'right', 'left')):
        caption = f'small red circle top-{side} , gray background .'
        lines.append(dict(image=f'/elsewhere/{name}', caption=caption))
    file = tmp_path / 'c.jsonl'
    file.write_text('\n'.join(map(json.dumps, lines[::-1])) + '\n\n')
    flags = [f'--captions={file}', '--caption_len=12']
    _, report = run(tmp_path / 'out', bench, CLIP, *flags)
    assert report['captions'] == {f'{i}.png': line['caption'] for i, line in enumerate(lines)}
    c = config.parse(eval_unified.keys, {}, [*QUICK, '--caption_len=12'], 'x.py')
    uae = new_uae(c)
    y, mask, _ = uae.encoder.tokens([lines[1]['caption']])
    made = tensor_of(tmp_path / 'out' / 'example_image' / '1.png')
    drawn = lib_scores.draw_captions(uae, y, mask, [1], seed=(c.seed,))
    assert (made - drawn).abs().max() < 0.6 / 127.5


GOOD = '{"image": "0.png", "caption": "a"}\n'


@pytest.mark.parametrize('text, said', [
    (GOOD + '{"image": "1.png"\n', 'line 2'),
    ('{"image": "0.png"}\n', 'line 1'),
    ('[1]\n', 'line 1'),
    ('{"image": 3, "caption": "a"}\n', 'line 1'),
    ('{"image": "0.png", "caption": ["a"]}\n', 'line 1'),
    (GOOD + '\n7\n', 'line 3'),
    (GOOD + '{"image": "d/0.jpg", "caption": "b"}\n', 'line 2'),
    (GOOD + '{"image": "2.png", "caption": "b"}\n',
     '1 of 3 references have no caption, and a mean over the others is no score: 1.png')])
def test_captions_that_cannot_be_used_are_named_with_file_and_line(bench, tmp_path, text, said):
    file = tmp_path / 'c.jsonl'
    file.write_text(text)
    message = refusal(run, tmp_path / 'out', bench, CLIP, f'--captions={file}')
    assert said in message and (f'{file} {said}' in message or 'of 3' in message)


def test_references_of_any_shape_are_seen_whole_and_a_jpeg_stays_one(tmp_path, monkeypatch):
    """Scaled to the area the encoder was trained at; 2:1 stays 2:1; scored at its own size."""
    root = tmp_path / 'b' / 'Image'
    folder_of(root, {'wide.jpg': picture(0, 60, 120), 'tall.webp': picture(1, 90, 45)})
    assert unified.load_picture(root / 'wide.jpg', 32 * 32).shape == (1, 3, 23, 45)
    assert unified.load_picture(root / 'wide.jpg').shape == (1, 3, 60, 120)
    shapes, really = [], unified.reconstruct

    def watched(uae, x, *args, **how):
        shapes.append(tuple(x.shape[2:]))
        return really(uae, x, *args, **how)

    monkeypatch.setattr(unified, 'reconstruct', watched)
    run(tmp_path / 'out', tmp_path / 'b', CLIP)
    assert shapes == [(45, 23), (23, 45)], 'what the encoder was shown'
    run(tmp_path / 'own', tmp_path / 'b', CLIP, '--own_size=True')
    assert shapes[2:] == [(90, 45), (60, 120)], 'as the authors\' demo shows it'
    made = {}
    for path in (tmp_path / 'out' / 'example_image').iterdir():
        with Image.open(path) as image:
            made[path.name] = image.format, image.size
    assert made == {'wide.jpg': ('JPEG', (32, 32)), 'tall.webp': ('WEBP', (32, 32))}


@pytest.mark.parametrize('flags, said', [
    (['--bench=unify'], 'unify'),
    (['--bench=', '--seeds=3'], 'seeds'),
    (['--bench=', '--captions=x'], 'captions'),
    (['--seeds=0'], 'seeds'),
    (['--generated=x', '--captions=x'], '--generated'),
    (['--generated=x', '--seeds=2'], '--generated'),
    (['--generated=no/such'], 'no/such'),
    (['--captions=no/such.jsonl'], 'no/such.jsonl'),
    (['--data=shapes'], 'shapes/Image')])
def test_flags_that_make_no_sense(bench, tmp_path, flags, said):
    assert said in refusal(run, tmp_path / 'out', bench, CLIP, *flags)


def test_damaged_pictures_are_named_and_what_was_drawn_stays(bench, tmp_path):
    whole = (bench / 'Image' / '0.png').read_bytes()
    (bench / 'Image' / '1.png').write_bytes(whole[:-40])
    assert f'{bench}/Image/1.png' in refusal(run, tmp_path / 'out', bench, CLIP)
    assert os.listdir(tmp_path / 'out' / 'example_image') == ['0.png']
    assert not (tmp_path / 'out' / 'report.json').exists()
    Image.new('RGB', (1000, 8)).save(bench / 'Image' / '1.png')
    assert 'too long' in refusal(run, tmp_path / 'out', bench, CLIP)
    (bench / 'empty' / 'Image').mkdir(parents=True)
    assert 'no images' in refusal(run, tmp_path / 'out', bench / 'empty', CLIP)


# --- the evaluation on held-out images -----------------------------------------------------------
def test_images_in_several_chunks_score_like_all_at_once(uae, x, monkeypatch):
    """Every image once and in order, its randomness its own."""
    c = types.SimpleNamespace(**dict(vars(uae.config), reward='clip', eval_denoise_steps=2))
    here = types.SimpleNamespace(rank=0, world=1, device='cpu', master=True)
    held = dict(x=x, names=list('abcd'), scenes=None)
    at_once, _ = lib_scores.Evaluator(uae, held, c, here)()
    monkeypatch.setattr(lib_scores, 'images_at_once', lambda config: 3)
    summary, records = lib_scores.Evaluator(uae, held, c, here)()
    assert [record['name'] for record in records] == list('abcd')
    assert summary.keys() == at_once.keys()
    assert all(abs(summary[name] - at_once[name]) < 1e-4 for name in summary)
