"""A judge on 127.0.0.1 that answers as told: also late, in halves, in errors, or not at all."""
import base64
import contextlib
import http.server
import io
import json
import os
import sys
import threading
import time

import numpy as np
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data.shapes import scenes as world  # noqa: E402


def chat(text, finish='stop', **message):
    """A server's JSON around an answer, as bytes."""
    choice = dict(message=dict(message, content=text), finish_reason=finish)
    return json.dumps(dict(choices=[choice])).encode()


def question_of(body):
    """The text that was asked."""
    return body['messages'][-1]['content'][0]['text']


def images_of(body):
    """The images that were shown."""
    images = []
    for part in body['messages'][-1]['content'][1:]:
        data = part['image_url']['url'].split(',')[1]
        images.append(Image.open(io.BytesIO(base64.b64decode(data))))
    return images


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.0'

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.seen.append((self.path, self.headers.get('Authorization'), None))
        self.send_error(404)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        self.server.seen.append((self.path, self.headers.get('Authorization'), body))
        status, headers, raw, how = self.server.respond(body)
        if how == 'hangs':
            time.sleep(1.5)
        if how == 'closes':
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header('Content-Length', str(len(raw)))
        self.end_headers()
        parts = [raw]
        if how == 'drips':
            parts = [raw[i:i + 1] for i in range(len(raw))]
        if how == 'partial':
            parts = [raw[:30]]
        for part in parts:
            with contextlib.suppress(OSError):               # the client has hung up
                self.wfile.write(part)
            if how == 'drips':
                time.sleep(0.02)


def response(raw=b'', status=200, how='', **headers):
    """What a respond(body) returns. how: hangs, closes, drips, partial, or nothing special."""
    if isinstance(raw, str):
        raw = raw.encode()
    return status, {name.replace('_', '-'): value for name, value in headers.items()}, raw, how


@contextlib.contextmanager
def serving(respond):
    """A running server: .url up to /v1, .seen [(path, key, body)]. respond(body) -> response()."""
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.respond, server.seen = respond, []
    server.url = f'http://127.0.0.1:{server.server_port}/v1'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class FactJudge:
    """respond(body) for pairs of captions of the embedded world: more right facts, fewer wrong.

    A caption's score is the facts of the picture that it states less its statements that do not
    hold; equal scores are a tie.
    """

    def __call__(self, body):
        (image,) = images_of(body)
        pixels = np.asarray(image.convert('RGB'), np.float32).transpose(2, 0, 1)[None]
        scene = world.read(pixels / 127.5 - 1)[0]
        text = question_of(body).removeprefix('Caption A:\n')
        a, b = [self.score(caption, scene) for caption in text.split('\n\nCaption B:\n')]
        winner = 'tie' if a == b else 'A' if a > b else 'B'
        return response(chat(json.dumps(dict(winner=winner, reason=f'{a} against {b}'))))

    def score(self, caption, scene):
        right = world.count_facts(world.parse(caption), scene)
        return right - len(world.false_phrases(caption, scene))


if __name__ == '__main__':                                   # for runs by hand: --judge_url
    with serving(FactJudge()) as running:
        print(running.url, flush=True)
        threading.Event().wait()
