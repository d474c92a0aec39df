"""Who looks at the images: GenEval's detector and colour namer, a captioner, GenEval++'s judge."""
import email.utils
import json
import os
import threading
import time
import types

import numpy as np
import pytest
import torch
from PIL import Image

import eval_t2i
from bench import answers, detector, dpg, geneval, judges, pictures, summary
from judge_server import chat, images_of, question_of, response, serving
from running import lines, refusal
from t2i import GOOD, SHAPES, contents, keys_of, picture_of, read_json


# --- GenEval's detector ------------------------------------------------------------------------
def blob(h, w, y0, y1, x0, x1, inside=8.0, outside=-8.0):
    m = torch.full((h, w), outside)
    m[y0:y1, x0:x1] = inside
    return m


def test_instances_from_hand_made_logits():
    """A 64x64 image, so that every resize is the identity.

    A sure query, one between two classes, an empty mask, a half-sure mask.
    """
    size = (64, 64)
    p = torch.tensor([[0.9, 0.05, 0.05], [0.5, 0.4, 0.1], [0.95, 0.01, 0.04], [0.8, 0.1, 0.1]])
    masks = torch.stack([
        blob(64, 64, 4, 8, 10, 30),
        blob(64, 64, 32, 64, 0, 1),
        torch.full(size, -8.0),
        blob(64, 64, 0, 2, 0, 2, inside=np.log(3))])
    scores, labels, boxes, m = detector.instances(p.log(), masks, size, size, size, most=6)
    sure = 1 / (1 + np.exp(-8))
    expected = [
        (0.9 * sure, 0, [10, 4, 30, 8]),
        (0.8 * 0.75, 0, [0, 0, 2, 2]),
        (0.5 * sure, 0, [0, 32, 1, 64]),
        (0.4 * sure, 1, [0, 32, 1, 64]),
        (0.1 * 0.75, 1, [0, 0, 2, 2]),
        (0, 0, [0, 0, 0, 0])]
    assert scores.tolist() == pytest.approx([score for score, _, _ in expected], abs=1e-5)
    assert labels.tolist() == [label for _, label, _ in expected]
    assert boxes.tolist() == [box for _, _, box in expected]
    assert m.dtype == torch.bool and m[0].sum() == 80 and m[5].sum() == 0
    scores, _, _, _ = detector.instances(p.log(), masks, size, size, size, most=3)
    assert len(scores) == 3


def test_masks_go_back_to_the_image_without_the_padding():
    """A 50x100 image is shown as 667x1333 in 672x1344.

    The left half of its mask must come back as the left half.
    """
    image = Image.new('RGB', (100, 50), (124, 116, 104))
    x, inside = detector.to_detector(image)
    assert x.shape == (1, 3, 672, 1344) and inside == (667, 1333)
    assert x[0, :, :667, :1333].abs().max() < 0.01, 'normalised'
    assert x[0, :, 667:].abs().max() == 0 and x[0, :, :, 1333:].abs().max() == 0, 'then zeros'
    one_class = torch.tensor([[5.0, 0.0]])
    half = round(336 * 1333 / 1344 / 2)
    low = blob(168, 336, 0, 168, 0, half)[None]
    _, _, boxes, masks = detector.instances(one_class, low, (672, 1344), inside, (50, 100))
    assert masks.shape == (1, 50, 100) and boxes.tolist() == [[0, 0, 50, 50]]
    upper = blob(64, 64, 0, 16, 0, 64)[None]
    _, _, boxes, _ = detector.instances(one_class, upper, (64, 64), (32, 64), (32, 64))
    assert boxes.tolist() == [[0, 0, 64, 16]], 'the lower half was padding'
    x, _ = detector.to_detector(Image.new('RGB', (512, 512)))
    assert x.shape == (1, 3, 800, 800)


class NoNetwork:
    """In place of the network, where its output does not count."""
    device = 'cpu'

    def __call__(self, pixel_values):
        return types.SimpleNamespace(
            class_queries_logits=torch.zeros(1, 2, 81),
            masks_queries_logits=torch.zeros(1, 2, 8, 8))


@pytest.mark.parametrize('tag, kept', [('counting', [0.95]), ('colors', [0.95, 0.9, 0.31])])
def test_thresholds_and_the_limit_of_a_class(monkeypatch, tag, kept):
    def found(scores, label):
        n = len(scores)
        labels, boxes = torch.full((n,), label), torch.zeros(n, 4)
        masks = torch.zeros(n, 8, 8, dtype=torch.bool)
        instances = torch.tensor(scores), labels, boxes, masks
        monkeypatch.setattr(detector, 'instances', lambda *a: instances)
        classes = detector.detect(NoNetwork(), Image.new('RGB', (32, 32)), tag)
        return {name: [score for _, score, _ in them] for name, them in classes.items()}

    assert found([0.95, 0.9, 0.31, 0.3, 0.1], 16) == dict(dog=pytest.approx(kept))
    assert len(found([0.99] * 20, 79)['toothbrush']) == 16
    assert found([0.2], 0) == {}


def tiny_detector(folder, last='toothbrush'):
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    names = {n: f'{n}' for n in range(80)}
    names[0], names[79] = 'person', last
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=['stage1', 'stage2', 'stage3', 'stage4'])
    c = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, num_queries=5, id2label=names)
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(c).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def no_matcher(monkeypatch):
    """Mask2Former asks for scipy when it is built, for its training loss alone."""
    from transformers.models.mask2former import modeling_mask2former
    monkeypatch.setattr(modeling_mask2former, 'requires_backends', lambda *a: None)
    monkeypatch.setattr(eval_t2i.importlib.util, 'find_spec', lambda name: name)


@pytest.fixture
def small_input(monkeypatch):
    """The detector's input is 96x128, without padding: a whole one takes long."""
    real, size = detector.to_detector, (96, 128)

    def to_detector(image):
        x, _ = real(image)
        return torch.nn.functional.interpolate(x, size), size
    monkeypatch.setattr(detector, 'to_detector', to_detector)
    return size


def test_a_tiny_detector(tmp_path, no_matcher, small_input):
    c = keys_of(f'--detector={tiny_detector(tmp_path / "detector")}')
    model = detector.open_detector(c, 'cpu')
    image = picture_of(SHAPES[0]['prompt']).resize((64, 48))
    x, _ = detector.to_detector(image)
    with torch.no_grad():
        out = model(pixel_values=x)
    scores, labels, _, masks = detector.instances(
        out.class_queries_logits[0], out.masks_queries_logits[0], small_input, small_input,
        (48, 64))
    assert len(scores) == 100 and masks.shape == (100, 48, 64)
    assert labels.max() < 80 and (scores.diff() <= 0).all()
    c = keys_of(f'--detector={tiny_detector(tmp_path / "other", last="teapot")}')
    assert '80 classes' in refusal(detector.open_detector, c, 'cpu')


RED_DOG = dict(
    tag='colors', include=[{'class': 'dog', 'count': 1, 'color': 'red'}], prompt='a red dog')


@pytest.fixture
def theirs(tmp_path):
    """Two folders that somebody else drew, and the flags of a run over them but its detector's."""
    for n, m in enumerate([GOOD, RED_DOG]):
        folder = f'{tmp_path}/theirs/{n:04d}'
        os.makedirs(f'{folder}/samples')
        with open(f'{folder}/metadata.jsonl', 'w') as f:
            json.dump(m, f, indent=1)
        image = picture_of(SHAPES[0]['prompt']).resize((64, 48))
        image.save(f'{folder}/samples/0000.png')
    return ['--bench=geneval', '--generate=False', f'--images={tmp_path}/theirs', '--samples=1',
            f'--out_dir={tmp_path}/out', '--device=cpu']


def test_geneval_with_a_tiny_detector(
        tmp_path, theirs, no_matcher, small_input, monkeypatch, capsys):
    """The whole bench; colours by a stand-in."""
    asked = []

    def name_colours(image, found, name):
        asked.extend([name] * len(found))
        return ['red'] * len(found)

    def two_dogs(model, image, tag):
        mask = np.ones((48, 64), bool)
        return dict(dog=[((0.0, 0.0, 9.0, 9.0), 0.95, mask)] * 2)

    monkeypatch.setattr(geneval, 'open_colours', lambda c, device: name_colours)
    argv = [*theirs, f'--detector={tiny_detector(tmp_path / "detector")}']
    eval_t2i.main(argv)
    out = capsys.readouterr().out
    assert 'other weights than the official' in out
    assert '| theirs | 0.000 | 0.000 | 0.000 |' in out, 'random weights see nothing'
    monkeypatch.setattr(geneval, 'detect', two_dogs)
    eval_t2i.main(argv)
    assert asked == ['dog'], 'colours are named where they are asked for, of the best `count`'
    records = lines(f'{tmp_path}/out/geneval/theirs/results.jsonl')
    assert [record['correct'] for record in records] == [True, True]
    for record in records:
        assert json.loads(record['details']) == dict(dog=[[0, 0, 9, 9, 0.95]] * 2)
    os.rename(f'{tmp_path}/theirs/0001', f'{tmp_path}/theirs/00000')
    message = refusal(eval_t2i.main, argv)
    assert '00000/metadata.jsonl' in message and 'twice' in message


def test_without_scipy_there_is_a_line_and_no_score(monkeypatch):
    monkeypatch.setattr(eval_t2i.importlib.util, 'find_spec', lambda name: None)
    assert 'scipy' in eval_t2i.why_not(keys_of('--bench=geneval'), [])
    assert eval_t2i.why_not(keys_of(), []) == ''


# --- their colours -----------------------------------------------------------------------------
class MeanColour(torch.nn.Module):
    """A stand-in for CLIP: a crop's feature is its mean colour, a text's is the text itself."""

    def __init__(self):
        super().__init__()
        self.crops = []

    def encode_text(self, texts):
        return texts

    def encode_image(self, x):
        self.crops.append(x)
        return x.mean((2, 3)) - 0.3


def to_crop(image):
    small = image.resize((4, 4), Image.NEAREST)
    return torch.from_numpy(np.array(small) / 255.).float().permute(2, 0, 1)


def test_colours_are_named_from_the_object_alone():
    palette = dict(red=(1., 0, 0), green=(0, 1., 0), blue=(0, 0, 1.))
    texts = []

    def tokenizer(batch):
        """The colour that each text names, (-1, -1, -1) for others than these three."""
        texts.extend(batch)
        rows = []
        for text in batch:
            first = text.removeprefix('a photo of a ').split('-')[0].split()[0]
            rows.append(palette.get(first, (-1., -1., -1.)))
        return torch.tensor(rows)

    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[:, :] = (0, 255, 0)                               # all green
    pixels[0:8, 0:8] = (255, 0, 0)
    pixels[10:18, 10:18] = (0, 0, 255)
    image = Image.fromarray(pixels)
    red, blue = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    red[0:8, 0:4] = True
    blue[10:18, 10:18] = True
    found = [((0., 0., 8., 8.), 0.9, red), ((10., 10., 18., 18.), 0.8, blue)]
    model = MeanColour()
    name_colours = detector.colour_namer(model, to_crop, tokenizer, 'cpu')
    assert name_colours(image, found, 'dog') == ['red', 'blue']
    (crops,) = model.crops
    grey = torch.full((3,), 0.6)
    assert torch.allclose(crops[0, :, 0, 3], grey), 'around the object it is grey 153'
    assert crops[0, 0, 0, 0] == 1
    assert (crops[1, 2] == 1).all(), 'and nothing beyond its box'
    assert len(texts) == 30
    assert texts[:3] == [
        'a photo of a red dog', 'a photo of a red-colored dog', 'a photo of a red object']
    name_colours(image, found, 'dog')
    assert len(texts) == 30, 'texts once per class'


def test_openai_s_weights_need_quickgelu():
    c = keys_of('--colour_clip=ViT-L-14:openai')
    assert 'quickgelu' in refusal(detector.open_colours, c, 'cpu')


# --- a vision-language model -------------------------------------------------------------------
def test_a_real_model_answers_something():
    """The tiny captioner has never seen a question: it answers prose, neither yes nor no."""
    vqa = dpg.local_vlm(keys_of('--vqa=data/shapes/base/encoder'), 'cpu')
    answer = vqa(picture_of(SHAPES[0]['prompt']), 'describe the image')
    assert isinstance(answer, str) and '<|' not in answer and dpg.says_yes(answer) is None


# --- GenEval++: the judge ----------------------------------------------------------------------
@pytest.mark.parametrize('meta, text', [
    (dict(include=[{'class': 'dog', 'count': 1}]), '- 1 dog present in the image.'),
    (dict(include=[
        {'class': 'dog', 'count': 3, 'color': 'red', 'size': 'larger', 'region': 'left'}]),
     '- red-colored larger 3 dogs located in the left part of the image.'),
    (GOOD,
     '- 2 dogs present in the image.\n- No more than 2 dogs should appear.'),
    (dict(include=[
        {'class': 'cup', 'count': 1, 'color': 'blue'}, {'class': 'cat', 'count': 2}]),
     '- blue-colored 1 cup present in the image.\n- 2 cats present in the image.')])
def test_checklist(meta, text):
    assert geneval.checklist(meta) == 'This image should contain:\n' + text


FENCED = '<think>the checklist {a: 1} holds</think>\n```json\n{"correct": 1}\n```'


@pytest.mark.parametrize('reply, found', [
    ('{"correct": 1, "reason": "fine"}', (1, 'fine')),
    ('```json\n{"correct": 0, "reason": "x"}\n```', (0, 'x')),
    ('Sure! {"correct": 1}', (1, '')),
    ('{"correct": true}', (1, '')),
    ('{"correct": "1"}', (1, '')),
    ('{"correct": " No "}', (0, '')),
    ('{"correct": 0.0}', (0, '')),
    ('{"Correct": 1, "REASON": "x"}', (1, 'x')),
    ('{"correct": 1} or {"correct": 0}', (0, '')),
    ('the format {"correct": 1 or 0}, so {"correct": 1}', (1, '')),
    ('{"correct": 1} {"note": 2}', (1, '')),
    ('{"result": {"correct": 1}}', (1, '')),
    ('{"correct": 1, "parts": {"correct": 0}}', (1, '')),
    ('{"correct": 1, "reason": "}{"}', (1, '}{')),
    ('[{"correct": 1}]', (1, '')),
    (FENCED, (1, '')),
    ('{"a":' * 100000, None),
    ('The image is correct.', None),
    ('{"correct": 1, "reason": "cut', None),
    ('{"correct": 1} hm, {"correct": "unsure"}', None),
    ('{"correct": 0.5}', None),
    ('{"correct": NaN}', None),
    ('{"correct": 1e999}', None),
    ('{"correct": "maybe"}', None),
    ('{"correct": null}', None),
    ('[1]', None),
    ('{"correct": [1]}', None)])
def test_verdict(reply, found):
    if found is None:
        pytest.raises(ValueError, geneval.verdict, reply)
    else:
        assert geneval.verdict(reply) == found


@pytest.mark.parametrize('reply, left', [
    ('<think>a</think> b', 'b'),
    ('a</think>b', 'b'),                                     # the template opened it
    ('<think>a<think>b</think>c</think>d', 'd'),
    ('<THINKING>a</THINKING>b', 'b'),
    ('b<think>a', 'b'),
    ('<think>a {"correct": 1}', ''),
    ('b', 'b')])
def test_thoughts_are_no_answer(reply, left):
    assert answers.without_thoughts(reply) == left


def test_judge_summary_counts_what_failed_apart():
    rows = [('a', 1, ''), ('a', None, 'no answer'), ('a', 0, 'no image'), ('b', 1, '')]
    records = [dict(tag=t, correct=v, reason=r) for t, v, r in rows]
    s = summary.judge_summary(records)
    assert s['columns'] == dict(a=0.5, b=1.0, overall=0.75)
    assert (s['failed'], s['missing'], s['images']) == (1, 1, 4)
    s = summary.judge_summary([*records, dict(tag='c', correct=None, reason='')])
    # no overall without every tag
    assert s['columns'] == dict(a=0.5, b=1.0, c=None, overall=None)


FINE = '{"correct": 1, "reason": "fine"}'
PARTS = [dict(type='text', text='{"correct"'), dict(type='text', text=': 0}')]
HTML = '<html><style>b {}</style><body>\n<h1>Bad\tgateway</h1></body></html>'
# what the server does when it is asked -> the verdict, or what the reason for there being none says
REPLIES = dict(
    fine=(response(chat(FINE)), 1),
    wrong=(response(chat('{"correct": 0}')), 0),
    fenced=(response(chat(FENCED)), 1),
    text=(response(chat('{"correct": "1"}')), 1),
    parts=(response(chat(PARTS)), 0),
    thoughts=(response(chat(FINE, reasoning_content='{"correct": 0}')), 1),
    long=(response(chat(FINE + ' and so', finish='length')), 1),
    prose=(response(chat('It looks right to me.')), 'no {"correct": ...} in \'It looks right'),
    cut=(response(chat('{"correct": 1, "rea', finish='length')), 'limit of tokens'),
    unclosed=(response(chat('<think>maybe {"correct": 1}')), 'no {"correct"'),
    thought=(response(chat(None, reasoning_content=FINE)), 'thoughts without an answer'),
    refuses=(response(chat(None, refusal='I do not judge.')), 'I do not judge.'),
    null=(response(chat(None)), 'an empty answer'),
    empty=(response(chat('')), 'an empty answer'),
    number=(response(chat(7)), 'an empty answer'),
    page=(response(HTML), 'no choices in the answer: Bad gateway'),
    shape=(response('{"choices": []}'), 'no choices in the answer'),
    other=(response('[1]'), 'no choices in the answer'),
    late=(response('{"error": {"message": "too many", "code": 429}}'), 'too many'),
    busy=(response('{"error": {"message": "slow down"}}', 429), 'HTTP 429: slow down'),
    broken=(response(HTML, 500), 'HTTP 500: Bad gateway'),
    silent=(response('', 503), 'HTTP 503: without a word'),
    hangs=(response(chat(FINE), how='hangs'), 'TimeoutError'),
    drips=(response(chat(FINE), how='drips'), 'TimeoutError'),
    partial=(response(chat(FINE), how='partial'), 'no choices'),
    closes=(response(how='closes'), 'RemoteDisconnected'))
# answers after which none can come -> the words that stop the run
STOPS = dict(
    key=(response('{"error": {"message": "bad sk-very-secret"}}', 401), 'HTTP 401: bad (key)'),
    forbidden=(response('{"detail": "not yours"}', 403), 'HTTP 403: not yours'),
    model=(response('{"error": "model m not found"}', 404), 'HTTP 404: model m not found'),
    limit=(response('{"error": {"message": "max_tokens is\\nnot\\u001b supported"}}', 400),
           'HTTP 400: max_tokens is not supported'),
    listed=(response('[{"error": {"message": "no images"}}]', 400), 'HTTP 400: no images'),
    schema=(response('{"detail": [{"msg": "field required"}]}', 422), 'HTTP 422: field required'),
    large=(response('<b>Too</b> large', 413), 'HTTP 413: Too large'),
    quota=(response('{"error": {"message": "pay", "code": "insufficient_quota"}}', 429), 'pay'),
    moved=(response('elsewhere', 302, Location='/elsewhere'), 'HTTP 302: elsewhere'))


def prompt_of(body):
    return question_of(body).split('\n')[1]


@pytest.fixture
def server(monkeypatch):
    """A server that does what REPLIES or STOPS say of the prompt; .paused: how long its client was.

    `recovers` is fine the third time, `cold` where no temperature is sent.
    """
    real = time.sleep

    def sleep(seconds):
        if threading.current_thread() is threading.main_thread():
            running.paused.append(seconds)
        else:
            real(seconds)

    def respond(body):
        how = prompt_of(body)
        asked = [prompt_of(earlier) for _, _, earlier in running.seen].count(how)
        if how == 'recovers' and asked < 3:
            return response('', 503, Retry_After='70')
        if how == 'cold' and 'temperature' in body:
            return response('{"error": {"message": "temperature: only 1"}}', 400)
        reply, _ = {**REPLIES, **STOPS}.get(how, REPLIES['fine'])
        return reply

    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-very-secret\n')
    monkeypatch.setattr(judges.time, 'sleep', sleep)
    with serving(respond) as running:
        running.paused = []
        yield running


@pytest.fixture
def judged(tmp_path, server):
    """Runs GenEval++ over prompts, each of which is what the server should do.

    -> (records, summary, requests [(path, key, body)])
    """
    def run(*behaviours, lost=(), url=None):
        server.seen.clear()
        metas = []
        os.makedirs(tmp_path / 'theirs', exist_ok=True)
        for n, behaviour in enumerate(behaviours):
            metas.append(dict(tag=f't{n % 2}', include=GOOD['include'], prompt=behaviour))
            file = tmp_path / 'theirs' / f'{n + 1}.jpg'
            if n not in lost and not file.exists():
                Image.new('RGB', (16, 16), (n, 0, 0)).save(file)
        path = tmp_path / 'p.jsonl'
        path.write_text(''.join(json.dumps(meta) + '\n' for meta in metas))
        eval_t2i.main([
            '--bench=geneval++', f'--prompts={path}', '--generate=False',
            f'--images={tmp_path}/theirs', f'--out_dir={tmp_path}/out', '--judge_timeout=0.5',
            '--judge_tries=3', '--judge_model=m', f'--judge_url={url or server.url}',
            '--device=cpu'])
        out = f'{tmp_path}/out/geneval++/theirs'
        by_prompt = {record['prompt']: record for record in lines(f'{out}/results.jsonl')}
        records = [by_prompt[behaviour] for behaviour in behaviours]
        return records, read_json(f'{out}/summary.json'), list(server.seen)
    return run


def test_a_judge_that_misbehaves(judged, tmp_path, capsys):
    behaviours = [*REPLIES, 'recovers']
    records, s, requests = judged(*behaviours, 'lost', lost=[len(behaviours)])
    wanted = [expected for _, expected in REPLIES.values()] + [1, 0]
    failed = 0
    for record, expected in zip(records, wanted):
        if isinstance(expected, str):
            failed += 1
            assert record['correct'] is None and expected in record['reason'], record
        else:
            assert record['correct'] == expected, record
    assert (s['failed'], s['missing'], s['images']) == (failed, 1, len(records))
    asked = [prompt_of(body) for _, _, body in requests]
    for behaviour, (_, expected) in REPLIES.items():
        assert asked.count(behaviour) == (3 if isinstance(expected, str) else 1), behaviour
    assert {path for path, _, _ in requests} == {'/v1/chat/completions'}
    assert {key for _, key, _ in requests} == {'Bearer sk-very-secret'}
    assert not any(b'secret' in text for text in contents(tmp_path / 'out').values())
    assert capsys.readouterr().out.count('warning: no answer from m: no {"correct"') == 1


def test_what_was_answered_is_not_asked_again(judged, tmp_path):
    """Failures are; and a new image is a new question."""
    judged('fine', 'fenced', 'wrong', 'prose')
    file = f'{tmp_path}/out/geneval++/theirs/judge.0.jsonl'
    kept = lines(file)
    assert [row['reply'] for row in kept][-3:] == ['It looks right to me.'] * 3, 'every reply'
    assert kept[0]['image'] == f'{tmp_path}/theirs/1.jpg' and kept[0]['judge'] == 'm'
    Image.new('RGB', (16, 16), (200, 0, 0)).save(tmp_path / 'theirs' / '1.jpg')
    _, _, again = judged('fine', 'fenced', 'wrong', 'prose')
    assert [prompt_of(body) for _, _, body in again] == ['fine'] + ['prose'] * 3
    text = open(file).read()
    with open(file, 'w') as f:
        f.write(text[:text.index('\n') + 20])                # killed within the second line
    judged('fine', 'fenced')
    assert [json.loads(line)['reply'] for line in open(file).readlines()[2:]] == [FINE, FENCED]
    assert not judged('fine', 'fenced')[2]


@pytest.mark.parametrize('behaviour', STOPS)
def test_an_answer_that_cannot_come_stops_the_run_and_nothing_is_lost(judged, behaviour):
    with pytest.raises(SystemExit) as stop:
        judged('fine', behaviour, 'wrong')
    message = stop.value.code
    assert STOPS[behaviour][1] in message and '\n' not in message and 'secret' not in message
    records, _, requests = judged('fine', 'fenced', 'wrong')
    assert [record['correct'] for record in records] == [1, 1, 0]
    assert [prompt_of(body) for _, _, body in requests] == ['fenced', 'wrong']


@pytest.mark.parametrize('url, words', [
    ('http://127.0.0.1:9/v1', 'refused'),
    ('http://127.0.0.1:port/v1', '--judge_url'),
    ('http://a b/v1', '--judge_url'),
    ('http:///v1', '--judge_url'),
    ('http://127.0.0.1:9/\u2026', '--judge_url'),
    ('http://127.0.0.1:9', 'OPENAI_API_KEY')])
def test_no_server_at_all(judged, monkeypatch, url, words):
    if words == 'OPENAI_API_KEY':
        monkeypatch.setenv('OPENAI_API_KEY', 'sk-\u2026')
    with pytest.raises(SystemExit, match=words) as stop:
        judged('fine', url=url)
    assert '\n' not in stop.value.code


def test_a_parameter_that_a_model_refuses_is_not_sent_again(judged):
    records, _, requests = judged('cold', 'fine')
    assert [record['correct'] for record in records] == [1, 1]
    assert ['temperature' in body for _, _, body in requests] == [True, False, False]


def test_pauses(judged, server):
    """2 and 4 seconds, or as long as the server asks, but never longer than five minutes."""
    judged('recovers', 'broken')
    assert server.paused == [0, 70, 70, 0, 2, 4]
    date = email.utils.formatdate(time.time() + 90)
    asked = {'7': 7, '1e9': 300, 'inf': 300, '-5': 0, 'nan': 0, 'soon': 0, '': 0}
    for text, seconds in asked.items():
        assert judges.asked_pause({'Retry-After': text}) == seconds
    assert 60 < judges.asked_pause({'Retry-After': date}) <= 90


@pytest.mark.parametrize('name', ['a.png', 'a.jpg', 'a.webp', 'a.gif'])
def test_files_go_as_they_are_and_other_kinds_as_png(tmp_path, name):
    path = str(tmp_path / name)
    Image.new('RGB', (9, 7), (250, 0, 0)).save(path)
    raw = pictures.file_bytes(path)
    as_it_is = raw == open(path, 'rb').read()
    assert as_it_is == name.endswith(('png', 'jpg'))
    body = dict(messages=judges.messages_of('', 'q', [raw]))
    (image,) = images_of(body)
    assert image.size == (9, 7) and question_of(body) == 'q' and len(body['messages']) == 1
    kind = 'jpeg' if name.endswith('jpg') else 'png'
    url = body['messages'][0]['content'][1]['image_url']['url']
    assert url.startswith(f'data:image/{kind};base64,') and image.format == kind.upper()
    (tmp_path / 'b.png').write_bytes(b'no image')
    with pytest.raises(pictures.Unusable, match='b.png: cannot be read'):
        pictures.file_bytes(str(tmp_path / 'b.png'))


def test_what_the_judge_is_sent(judged, server, tmp_path):
    _, _, ((path, _, body),) = judged('fine', url=server.url + '/chat/completions/')
    assert path == '/v1/chat/completions'
    assert set(body) == {'model', 'temperature', 'messages'}, 'nothing that a server may not know'
    assert (body['model'], body['temperature']) == ('m', 0)
    assert body['messages'][0]['role'] == 'system'
    assert question_of(body) == (
        'Instruction:\nfine\n\nExpectation checklist:\n'
        'This image should contain:\n- 2 dogs present in the image.')
    url = body['messages'][1]['content'][1]['image_url']['url']
    assert url.startswith('data:image/jpeg;base64,/9j/')
    (sent,) = images_of(body)
    Image.open(tmp_path / 'theirs' / '1.jpg').save(tmp_path / '75.jpg', quality=75)
    Image.open(tmp_path / 'theirs' / '1.jpg').save(tmp_path / '95.jpg', quality=95)
    tables = [Image.open(tmp_path / f'{quality}.jpg').quantization for quality in (75, 95)]
    assert sent.quantization == tables[0] != tables[1], 'as coarse as the official image'
