"""Unified-Bench: the official layout and rules, each backbone as its own library runs it, and refusals instead of a mean over fewer.

The three backbones that are too large to ship stand here as random ones of the same classes, loaded by the same code.
"""
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import eval_unified
import reward
from data.shapes import scenes as world
from running import refusal
from test_reward import structured

QUICK = ['--bench=unified', '--device=cpu', '--eval_steps=2', '--caption_len=6']


@pytest.fixture(scope='session')
def standins(tmp_path_factory):
    """{name: folder} of tiny random models with the real ones' classes, input size and preprocessing."""
    from transformers import CLIPConfig, CLIPModel, DINOv3ViTConfig, DINOv3ViTModel, Dinov2Config, Dinov2Model
    root, small = tmp_path_factory.mktemp('backbones'), dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    torch.manual_seed(0)
    vision = dict(small, image_size=224, patch_size=32)
    models = dict(longclip=CLIPModel(CLIPConfig(vision_config=vision, text_config=dict(small, vocab_size=50, max_position_embeddings=248), projection_dim=24)),
                  dinov2=Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=28)),
                  dinov3=DINOv3ViTModel(DINOv3ViTConfig(**small, image_size=224, patch_size=32, num_register_tokens=4)))
    for name, model in models.items():
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))           # as initialised all pictures look alike to them
        model.save_pretrained(root / name)
    return {name: str(root / name) for name in models}


@pytest.fixture
def four(standins):
    return '--backbones=clip,' + ','.join(f'{name}={folder}' for name, folder in standins.items())


def picture(seed, h, w):
    """(h, w, 3) uint8, unlike for unlike seeds."""
    return np.roll(structured(h, w), 7 * seed, (0, 1)) // (1 + seed % 2) + 10 * seed


def folder_of(path, images):
    path.mkdir(parents=True, exist_ok=True)
    for name, pixels in images.items():
        Image.fromarray(pixels.astype(np.uint8)).save(path / name)
    return path


@pytest.fixture
def bench(tmp_path):
    """Three scenes as references in the official layout."""
    rng = np.random.default_rng(3)
    folder_of(tmp_path / 'bench' / 'Image', {f'{i}.png': world.draw(world.random_scene(rng)) for i in range(3)})
    return tmp_path / 'bench'


@pytest.fixture
def others(tmp_path):
    """References of several shapes and somebody's reconstructions, named by each of the three rules, one of no reference."""
    root = tmp_path / 'others'
    folder_of(root / 'Image', {'0.png': picture(0, 300, 500), '1.png': picture(1, 427, 320), '10.png': picture(2, 256, 256)})
    folder_of(root / 'example_image', {'0.png': picture(3, 240, 240), '1.jpg': picture(4, 256, 256), 'recon_10.png': picture(5, 224, 256), 'x.png': picture(6, 64, 64)})
    return root


def run(out, data, *words):
    """eval_unified.py in this process -> (unified.json, report.json)."""
    eval_unified.main([*QUICK, f'--data={data}', f'--out_dir={out}', *words])
    return tuple(json.loads((out / f'{name}.json').read_text()) for name in ('unified', 'report'))


def official_processors():
    """The processors of the four, made from the settings that their hub folders hold."""
    from transformers import DINOv3ViTImageProcessor
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    bit = BitImageProcessorPil(size=dict(shortest_edge=256), crop_size=dict(height=224, width=224), resample=3,
                               image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    return dict(clip=CLIPImageProcessorPil(size=dict(shortest_edge=224), crop_size=dict(height=224, width=224)), dinov2=bit,
                dinov3=DINOv3ViTImageProcessor(size=dict(height=224, width=224)))


# --- the backbones ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('h, w', [(512, 512), (427, 640), (640, 427), (301, 512), (100, 100)])
@pytest.mark.parametrize('name', ['clip', 'longclip', 'dinov2', 'dinov3'])
def test_preprocessing_is_that_of_the_model_s_own_library(name, h, w):
    image = structured(h, w)
    how = dict(reward.OPENAI, resize=224, crop=224, corner=math.floor) if name == 'clip' else reward.BACKBONES[name][2]
    got = reward.preprocess(torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1, **how)[0]
    if name == 'longclip':
        from open_clip import image_transform
        want = image_transform(224, False, mean=reward.OPENAI['mean'], std=reward.OPENAI['std'])(Image.fromarray(image))
    else:
        want = official_processors()[name](images=Image.fromarray(image), return_tensors='pt')['pixel_values'][0]
    assert got.shape == want.shape and (got - want).abs().max() < 0.03


def test_features_are_the_official_ones(standins):
    """LongCLIP: the projected vector, not the hidden state; the DINOs: the CLS token, not a register or a patch."""
    from transformers import AutoModel
    x = torch.rand(2, 3, 224, 224) * 2 - 1
    for name, folder in standins.items():
        tower, model = reward.Backbone(name, '', '', source=folder), AutoModel.from_pretrained(folder).eval()
        pixels = reward.preprocess(x, **reward.BACKBONES[name][2])
        with torch.no_grad():
            if name == 'longclip':
                want = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
            else:
                want = model(pixel_values=pixels).last_hidden_state[:, 0]
            torch.testing.assert_close(tower.features(x), torch.nn.functional.normalize(want, dim=-1), atol=1e-5, rtol=0)
        assert want.shape[1] == (24 if name == 'longclip' else 32)


def test_scores_are_those_of_the_official_recipe(others, standins, four, tmp_path, capsys):
    """Each pair through the libraries' own processors, PIL image by PIL image, cosine, plain means."""
    from transformers import AutoModel
    found, report = run(tmp_path / 'out', others, four, f'--generated={others}/example_image')
    pairs = {'0.png': '0.png', '1.jpg': '1.png', 'recon_10.png': '10.png'}
    processors = dict(official_processors(), longclip=official_processors()['clip'])
    means = {}
    for name, folder in standins.items():
        model, cosines = AutoModel.from_pretrained(folder).eval(), {}
        for made, ref in pairs.items():
            f = []
            for path in (others / 'Image' / ref, others / 'example_image' / made):
                pixels = processors[name](images=Image.open(path).convert('RGB'), return_tensors='pt')['pixel_values']
                with torch.no_grad():
                    f.append(model.get_image_features(pixel_values=pixels).pooler_output if name == 'longclip' else model(pixel_values=pixels).last_hidden_state[:, 0])
            cosines[made] = torch.cosine_similarity(*f).item()
        got = found['similarities_by_model'][name]
        assert got.keys() == {*pairs, 'x.png'} and got['x.png'] is None
        assert max(cosines.values()) < 0.98, 'pictures that this tower can tell apart'
        assert all(abs(got[made] - cosines[made]) < 4e-3 for made in pairs), name
        means[name] = sum(got[made] for made in pairs) / 3
    means['clip'] = sum(found['similarities_by_model']['clip'][made] for made in pairs) / 3
    assert {k: round(v, 6) for k, v in found['summary']['average_scores_by_model'].items()} == {k: round(v, 6) for k, v in means.items()}
    assert abs(found['summary']['overall_average'] - sum(means.values()) / 4) < 1e-9
    assert abs(report['summary']['overall'] - sum(means.values()) / 4) < 1e-9 and report['standard_error'] == {}
    assert 'x.png belongs to no reference' in capsys.readouterr().out


# --- the official script's JSON and rules ------------------------------------------------------------------------------
def test_json_has_the_official_keys_and_statistics():
    found = reward.unified_score(dict(clip={'0.jpg': 0.5, '1.jpg': 0.75, 'x.jpg': None}, dinov2={'0.jpg': -0.25, '1.jpg': 0.5, 'x.jpg': None}))
    assert found == dict(
        model_types=['clip', 'dinov2'], similarities_by_model=dict(clip={'0.jpg': 0.5, '1.jpg': 0.75, 'x.jpg': None}, dinov2={'0.jpg': -0.25, '1.jpg': 0.5, 'x.jpg': None}),
        statistics_by_model=dict(clip=dict(total_images=3, valid_pairs=2, average_similarity=0.625, min_similarity=0.5, max_similarity=0.75),
                                 dinov2=dict(total_images=3, valid_pairs=2, average_similarity=0.125, min_similarity=-0.25, max_similarity=0.5)),
        summary=dict(models_used=['clip', 'dinov2'], average_scores_by_model=dict(clip=0.625, dinov2=0.125), overall_average=0.375,
                     best_model=('clip', 0.625), worst_model=('dinov2', 0.125)))


@pytest.mark.parametrize('name, ref', [('1.jpg', '1.jpg'), ('1.png', '1.jpg'), ('recon_1.png', '1.jpg'), ('recon_10.jpg', '10.jpg'), ('a.b.png', 'a.b.png'),
                                       ('recon_a.b.jpg', 'a.b.png'), ('01.jpg', None), ('1', '1.jpg'), ('recon1.jpg', None), ('x_recon_1.jpg', None), ('recon_recon_1.jpg', None)])
def test_a_file_belongs_to_the_reference_of_its_name_or_stem(name, ref):
    refs = ['1.jpg', '10.jpg', 'a.b.png']
    rest = [(r, r) for r in refs if r != ref]
    found = reward.pair([(name, 'mine'), *rest, *([] if ref else [])], refs, 'picture')
    assert found == {r: 'mine' if r == ref else r for r in refs}


def test_the_same_name_goes_before_the_same_stem():
    refs = ['1.jpg', '1.png']
    assert reward.pair([('1.png', 'b'), ('1.jpg', 'a')], refs, 'picture') == {'1.jpg': 'a', '1.png': 'b'}


def test_missing_and_double_reconstructions_are_refused(others, four, tmp_path):
    folder = others / 'example_image'
    for name in ('1.jpg', 'recon_10.png'):
        os.remove(folder / name)
    message = refusal(run, tmp_path / 'out', others, four, f'--generated={folder}')
    assert '2 of 3' in message and '1.png' in message and '10.png' in message and ' 0.png' not in message
    assert not (tmp_path / 'out' / 'unified.json').exists()
    Image.new('RGB', (64, 64)).save(folder / 'recon_0.png')
    message = refusal(run, tmp_path / 'out', others, four, f'--generated={folder}')
    assert f'{folder}/0.png' in message and f'{folder}/recon_0.png' in message


def test_fewer_backbones_than_asked_are_refused_before_anything_is_drawn(bench, standins, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_unified, 'UAE', lambda *a: pytest.fail('drawn before the backbones were there'))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    message = refusal(run, tmp_path / 'out', bench, f'--backbones=clip,dinov2={standins["dinov2"]},dinov3={tmp_path}/nowhere')
    assert 'dinov3' in message and f'{tmp_path}/nowhere' in message and 'dinov2' not in message.split(':')[1]
    assert 'clip comes twice' in refusal(run, tmp_path / 'out', bench, '--backbones=clip,clip')
    assert 'clap' in refusal(run, tmp_path / 'out', bench, '--backbones=clip,clap')


def test_a_backbone_that_would_be_partly_random_is_refused(standins, tmp_path):
    from safetensors.torch import load_file, save_file
    shutil.copytree(standins['dinov3'], tmp_path / 'half')
    tensors = load_file(tmp_path / 'half' / 'model.safetensors')
    gone = next(k for k in sorted(tensors) if 'layer.1' in k)
    save_file({k: v for k, v in tensors.items() if k != gone}, tmp_path / 'half' / 'model.safetensors', metadata=dict(format='pt'))
    message = refusal(reward.Backbone, 'dinov3', '', '', 'cpu', str(tmp_path / 'half'))
    assert gone in message and str(tmp_path / 'half') in message
    shutil.copytree('data/shapes/base/clip', tmp_path / 'clip', ignore=shutil.ignore_patterns('*.safetensors', '*.bin'))
    for source in ('ViT-L-14-quickgelu', 'no-such-model:openai', f'local-dir:{tmp_path}/clip'):
        assert source in refusal(reward.Backbone, 'clip', source, '')


# --- our own captions and images ---------------------------------------------------------------------------------------
CLIP = '--backbones=clip,judge'


def test_what_is_written_and_that_it_is_ours(bench, tmp_path, capsys):
    """Official layout, captions by our encoder, images of its own decoder; the score is that of the files."""
    out = tmp_path / 'out'
    found, report = run(out, bench, CLIP, '--eval_temperature=0.7', '--seed=5')
    names = ['0.png', '1.png', '2.png']
    assert sorted(os.listdir(out / 'example_image')) == names
    c = eval_unified.config.parse(eval_unified.keys, {}, [*QUICK, '--eval_temperature=0.7', '--seed=5'], 'x.py')
    uae = eval_unified.UAE(c)
    tower = reward.backbone('judge', c)
    for i, name in enumerate(names):
        x = torch.from_numpy(np.array(Image.open(bench / 'Image' / name))).permute(2, 0, 1)[None] / 127.5 - 1
        texts, _, x_hat = eval_unified.reconstruct(uae, x, [i], 0.7, seed=(5,))
        assert report['captions'][name] == texts[0]
        made = torch.from_numpy(np.array(Image.open(out / 'example_image' / name))).permute(2, 0, 1)[None] / 127.5 - 1
        assert (made - x_hat).abs().max() < 0.6 / 127.5
        assert abs(found['similarities_by_model']['judge'][name] - reward.clip_reward(x, made, tower).item()) < 1e-5
    told = [eval_unified.reconstruct(uae, x, [0], 3.0, drawn=False, seed=seed)[0] for seed in ((5,), (6,), (5,))]
    assert told[0] == told[2] != told[1], 'another seed samples another caption'
    sheet = np.array(Image.open(out / 'contact_sheet.png').convert('RGB'))
    wanted = np.array(Image.open(bench / 'Image' / '0.png'))[0, 0]
    assert sheet.shape[0] > 400 and (sheet == wanted).all(-1).sum() > 500, 'the first scene is on the sheet, in its colours'
    assert 'overall' in capsys.readouterr().out


def test_seeds_give_mean_and_standard_error_and_images_are_drawn_once(bench, tmp_path, monkeypatch):
    out, drawn, really = tmp_path / 'out', [], eval_unified.draw
    monkeypatch.setattr(eval_unified, 'draw', lambda *a, **kw: drawn.append(a[3]) or really(*a, **kw))
    _, one = run(out, bench, CLIP)
    assert drawn == [[0], [1], [2]]
    before = (out / 'example_image' / '1.png').read_bytes()
    os.remove(out / 'example_image' / '1.png')
    drawn.clear()
    _, three = run(out, bench, CLIP, '--seeds=3')
    assert drawn == [[1], [0], [1], [2], [0], [1], [2]], 'the lost one and the new seeds'
    assert (out / 'example_image' / '1.png').read_bytes() == before
    assert len({(out / f'example_image{k}' / '1.png').read_bytes() for k in ('', '_1', '_2')}) == 3
    rows = [json.loads((out / f'unified{k}.json').read_text())['summary'] for k in ('', '_1', '_2')]
    assert rows[0]['overall_average'] == one['summary']['overall']
    overall = np.array([row['overall_average'] for row in rows])
    assert abs(three['summary']['overall'] - overall.mean()) < 1e-12
    assert abs(three['standard_error']['overall'] - overall.std(ddof=1) / 3 ** 0.5) < 1e-12 and three['standard_error']['clip'] > 0
    drawn.clear()
    assert run(out, bench, CLIP, '--seeds=3')[1] == three and not drawn
    for word in ('--eval_steps=3', '--seed=4', '--eval_temperature=1'):
        message = refusal(run, out, bench, CLIP, word)
        assert str(out) in message and word[2:].split('=')[0] in message


def test_other_people_s_captions_through_our_decoder(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_unified, 'reconstruct', lambda *a, **kw: pytest.fail('our encoder captioned'))
    lines = [dict(image=f'/elsewhere/{i}.{"jpg" if i else "png"}', caption=f'small red circle top-{side} , gray background .') for i, side in enumerate(('left', 'right', 'left'))]
    (tmp_path / 'c.jsonl').write_text('\n'.join(map(json.dumps, lines[::-1])) + '\n\n')
    _, report = run(tmp_path / 'out', bench, CLIP, f'--captions={tmp_path}/c.jsonl', '--caption_len=12')
    assert report['captions'] == {f'{i}.png': line['caption'] for i, line in enumerate(lines)}
    c = eval_unified.config.parse(eval_unified.keys, {}, [*QUICK, '--caption_len=12'], 'x.py')
    uae = eval_unified.UAE(c)
    y, mask, _ = uae.tokens([lines[1]['caption']])
    made = torch.from_numpy(np.array(Image.open(tmp_path / 'out' / 'example_image' / '1.png'))).permute(2, 0, 1) / 127.5 - 1
    assert (made - eval_unified.draw(uae, y, mask, [1], seed=(c.seed,))[0]).abs().max() < 0.6 / 127.5


@pytest.mark.parametrize('text, said', [
    ('{"image": "0.png", "caption": "a"}\n{"image": "1.png"\n', 'line 2'), ('{"image": "0.png"}\n', 'line 1'), ('[1]\n', 'line 1'), ('{"image": 3, "caption": "a"}\n', 'line 1'),
    ('{"image": "0.png", "caption": ["a"]}\n', 'line 1'), ('{"image": "0.png", "caption": "a"}\n\n7\n', 'line 3'),
    ('{"image": "0.png", "caption": "a"}\n{"image": "d/0.jpg", "caption": "b"}\n', 'line 2'),
    ('{"image": "0.png", "caption": "a"}\n{"image": "2.png", "caption": "b"}\n', '1 of 3 references have no caption, and a mean over the others is no score: 1.png')])
def test_captions_that_cannot_be_used_are_named_with_file_and_line(bench, tmp_path, text, said):
    (tmp_path / 'c.jsonl').write_text(text)
    message = refusal(run, tmp_path / 'out', bench, CLIP, f'--captions={tmp_path}/c.jsonl')
    assert said in message and (f'{tmp_path}/c.jsonl {said}' in message or 'of 3' in message)


def test_references_of_any_shape_are_seen_whole_and_a_jpeg_stays_one(tmp_path, monkeypatch):
    """Scaled to the area the encoder was trained at; a 2:1 picture stays 2:1; scored at its own size."""
    folder_of(tmp_path / 'b' / 'Image', {'wide.jpg': picture(0, 60, 120), 'tall.webp': picture(1, 90, 45)})
    assert eval_unified.picture(tmp_path / 'b/Image/wide.jpg', 32 * 32).shape == (1, 3, 23, 45)
    assert eval_unified.picture(tmp_path / 'b/Image/wide.jpg').shape == (1, 3, 60, 120)
    shapes, really = [], eval_unified.reconstruct
    monkeypatch.setattr(eval_unified, 'reconstruct', lambda uae, x, *a, **kw: shapes.append(tuple(x.shape[2:])) or really(uae, x, *a, **kw))
    run(tmp_path / 'out', tmp_path / 'b', CLIP)
    assert shapes == [(45, 23), (23, 45)], 'what the encoder was shown'
    made = {p.name: Image.open(p) for p in (tmp_path / 'out' / 'example_image').iterdir()}
    assert {name: (im.format, im.size) for name, im in made.items()} == {'wide.jpg': ('JPEG', (32, 32)), 'tall.webp': ('WEBP', (32, 32))}


@pytest.mark.parametrize('words, said', [
    (['--bench=unify'], 'unify'), (['--bench=', '--seeds=3'], 'seeds'), (['--bench=', '--captions=x'], 'captions'), (['--seeds=0'], 'seeds'),
    (['--generated=x', '--captions=x'], '--generated'), (['--generated=x', '--seeds=2'], '--generated'), (['--generated=no/such'], 'no/such'),
    (['--captions=no/such.jsonl'], 'no/such.jsonl'), (['--data=shapes'], 'shapes/Image')])
def test_words_that_make_no_sense(bench, tmp_path, words, said):
    assert said in refusal(run, tmp_path / 'out', bench, CLIP, *words)


def test_damaged_pictures_are_named_and_what_was_drawn_stays(bench, tmp_path):
    (bench / 'Image' / '1.png').write_bytes((bench / 'Image' / '0.png').read_bytes()[:-40])
    assert f'{bench}/Image/1.png' in refusal(run, tmp_path / 'out', bench, CLIP)
    assert os.listdir(tmp_path / 'out' / 'example_image') == ['0.png'] and not (tmp_path / 'out' / 'report.json').exists()
    Image.new('RGB', (1000, 8)).save(bench / 'Image' / '1.png')
    assert 'too long' in refusal(run, tmp_path / 'out', bench, CLIP)
    (bench / 'empty' / 'Image').mkdir(parents=True)
    assert 'no images' in refusal(run, tmp_path / 'out', bench / 'empty', CLIP)


def test_a_sheet_shows_any_text(tmp_path):
    x = [torch.zeros(3, 20, 30), torch.ones(3, 8, 8)]
    eval_unified.contact_sheet([x, x], ['costs $5 and $6_{', 'a ' * 200], tmp_path / 'sheet.png')
    assert Image.open(tmp_path / 'sheet.png').size[1] > 200
