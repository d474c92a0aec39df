"""Who looks at the images: GenEval's detector and colour namer, a captioner, GenEval++'s judge."""
import base64
import http.server
import io
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
from bench import detector, geneval, judges, summary
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
    vqa = judges.local_vlm(keys_of('--vqa=data/shapes/base/encoder'), 'cpu')
    answer = vqa(picture_of(SHAPES[0]['prompt']), 'describe the image')
    assert isinstance(answer, str) and '<|' not in answer and judges.says_yes(answer) is None


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
    assert judges.checklist(meta) == 'This image should contain:\n' + text


@pytest.mark.parametrize('reply, found', [
    ('{"correct": 1, "reason": "fine"}', (1, 'fine')),
    ('```json\n{"correct": 0, "reason": "x"}\n```', (0, 'x')),
    ('Sure! {"correct": 1}', (1, '')),
    ('{"correct": true}', (1, '')),
    ('The image is correct.', None),
    ('{"correct": 1, "reason": "cut', None),
    ('{"correct": 2}', None),
    ('{"correct": -1}', None),
    ('{"correct": "maybe"}', None),
    ('{}', None),
    ('', None),
    ('[1]', None),
    ('{"correct": 1} or {"correct": 0}', None),
    ('{"correct": [1]}', None)])
def test_verdict(reply, found):
    if found is None:
        pytest.raises(ValueError, judges.verdict, reply)
    else:
        assert judges.verdict(reply) == found


def test_judge_summary_counts_what_failed_apart():
    rows = [('a', 1, ''), ('a', None, 'no answer'), ('a', 0, 'no image'), ('b', 1, '')]
    records = [dict(tag=t, correct=v, reason=r) for t, v, r in rows]
    s = summary.judge_summary(records)
    assert s['columns'] == dict(a=0.5, b=1.0, overall=0.75)
    assert (s['failed'], s['missing'], s['images']) == (1, 1, 4)
    s = summary.judge_summary([*records, dict(tag='c', correct=None, reason='')])
    # no overall without every tag
    assert s['columns'] == dict(a=0.5, b=1.0, c=None, overall=None)


def question_of(body):
    return body['messages'][1]['content'][0]['text']


def prompt_of(body):
    return question_of(body).split('\n')[1]


def reply_with(text):
    return json.dumps(dict(choices=[dict(message=dict(content=text))]))


FINE = json.dumps(dict(correct=1, reason='fine'))
TEXTS = dict(
    prose='It looks right to me.',
    cut='{"correct": 1, "rea',
    fenced=f'```json\n{FINE}\n```',
    wrong='{"correct": 0}')
BODIES = dict(
    bad='<html>',
    shape='{"choices": []}',
    null='{"choices": [{"message": {"content": null}}]}')
CODES = {'500': 500, '403': 403, '400': 400, 'recovers': 503}


class Server(http.server.BaseHTTPRequestHandler):
    """Behaves as the prompt in the request tells it."""
    protocol_version = 'HTTP/1.0'
    seen, got = [], []

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.got.append((self.path, self.headers.get('Authorization')))
        self.send_error(404)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        self.seen.append((self.path, self.headers.get('Authorization'), body))
        how = prompt_of(body)
        asked = [prompt_of(earlier) for _, _, earlier in self.seen].count(how)
        if how == 'hangs':
            time.sleep(1.5)
        if how == 'closes':
            return
        if how == 'redirects':
            self.redirect()
        elif how in CODES and not (how == 'recovers' and asked == 3):
            self.send_error(CODES[how])
        else:
            self.answer(how, BODIES.get(how, reply_with(TEXTS.get(how, FINE))))

    def redirect(self):
        self.send_response(302)
        self.send_header('Location', f'http://127.0.0.1:{self.server.server_port}/elsewhere')
        self.end_headers()

    def answer(self, how, raw):
        self.send_response(200)
        self.send_header('Content-Length', str(len(raw)))
        self.end_headers()
        parts, pause = [raw], 0
        if how == 'drips':
            parts, pause = raw, 0.02                         # letter by letter
        elif how == 'partial':
            parts = [raw[:30]]
        try:
            for part in parts:
                self.wfile.write(part.encode())
                self.wfile.flush()
                time.sleep(pause)
        except OSError:                                      # the client has hung up
            pass


@pytest.fixture
def server(monkeypatch):
    """The address of a running Server; whoever asks it does not sleep between two tries."""
    real = time.sleep

    def sleep(seconds):
        if threading.current_thread() is not threading.main_thread():
            real(seconds)
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-very-secret')
    monkeypatch.setattr(judges.time, 'sleep', sleep)
    running = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{running.server_port}/v1'
    running.shutdown()
    running.server_close()


@pytest.fixture
def judged(tmp_path, server):
    """Runs GenEval++ over prompts, each of which is what the server should do.

    -> (records, summary, requests [(path, key, body)])
    """
    def run(*behaviours, lost=()):
        Server.seen.clear()
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
            '--bench=geneval++', f'--batch={path}', '--generate=False',
            f'--images={tmp_path}/theirs', f'--out_dir={tmp_path}/out', '--judge_timeout=0.5',
            '--judge_tries=3', '--judge_model=m', f'--judge_url={server}', '--device=cpu'])
        out = f'{tmp_path}/out/geneval++/theirs'
        by_prompt = {record['prompt']: record for record in lines(f'{out}/results.jsonl')}
        records = [by_prompt[behaviour] for behaviour in behaviours]
        return records, read_json(f'{out}/summary.json'), list(Server.seen)
    return run


GOOD_ANSWERS = dict(fine=1, fenced=1, recovers=1, wrong=0)
FAILURES = {
    '500': 'HTTP',
    '400': 'HTTP',
    'hangs': 'TimeoutError',
    'drips': 'TimeoutError',
    'prose': 'ValueError',
    'cut': 'ValueError',
    'bad': 'JSONDecodeError',
    'shape': 'IndexError',
    'null': 'TypeError',
    'partial': 'JSONDecodeError',
    'closes': 'RemoteDisconnected',
    'redirects': 'HTTP'}


def test_a_judge_that_misbehaves(judged, tmp_path):
    records, s, requests = judged(*GOOD_ANSWERS, *FAILURES, 'lost', lost=[16])
    correct = [record['correct'] for record in records]
    assert correct == [*GOOD_ANSWERS.values(), *[None] * len(FAILURES), 0]
    reasons = [record['reason'].split(': ')[1].split()[0] for record in records[4:16]]
    assert reasons == list(FAILURES.values())
    assert (s['failed'], s['missing'], s['images']) == (12, 1, 17)
    # fine, recovers, not lost | fenced, not wrong
    assert s['columns'] == dict(
        t0=pytest.approx(2 / 3), t1=0.5, overall=pytest.approx(7 / 12))
    asked = [prompt_of(body) for _, _, body in requests]
    for behaviour in ('recovers', *FAILURES):
        assert asked.count(behaviour) == 3, 'three tries'
    assert asked.count('fine') == 1
    assert {path for path, _, _ in requests} == {'/v1/chat/completions'}, 'none elsewhere'
    assert not Server.got, 'the key does not follow a redirect'
    assert all(key == 'Bearer sk-very-secret' for _, key, _ in requests)
    assert not any(b'secret' in text for text in contents(tmp_path / 'out').values())
    # answers are kept, failures are asked again; a new image is a new question
    Image.new('RGB', (16, 16), (200, 0, 0)).save(tmp_path / 'theirs' / '1.jpg')
    _, _, again = judged('fine', 'fenced', 'recovers', 'wrong', 'prose')
    assert [prompt_of(body) for _, _, body in again] == ['fine'] + ['prose'] * 3


def test_what_the_judge_is_sent(judged, tmp_path):
    _, _, ((_, _, body),) = judged('fine')
    assert (body['model'], body['temperature'], body['max_tokens']) == ('m', 0, 200)
    assert body['messages'][0]['role'] == 'system'
    assert question_of(body) == (
        'Instruction:\nfine\n\nExpectation checklist:\n'
        'This image should contain:\n- 2 dogs present in the image.')
    url = body['messages'][1]['content'][1]['image_url']['url']
    assert url.startswith('data:image/jpeg;base64,/9j/')
    sent = Image.open(io.BytesIO(base64.b64decode(url.split(',')[1])))
    image = Image.open(tmp_path / 'theirs' / '1.jpg').convert('RGB')
    assert sent.quantization == jpeg(image, 75).quantization, 'as coarse as the official image'
    assert sent.quantization != jpeg(image, 95).quantization


def jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, 'jpeg', quality=quality)
    return Image.open(file)


def test_a_judge_that_wants_another_key_ends_the_run_and_nothing_is_lost(judged, tmp_path):
    with pytest.raises(SystemExit, match='HTTP 403.*OPENAI_API_KEY'):
        judged('fine', '403', 'wrong')
    records, _, requests = judged('fine', 'fenced', 'wrong')
    assert [record['correct'] for record in records] == [1, 1, 0]
    assert len(requests) == 2
