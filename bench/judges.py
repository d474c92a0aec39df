"""A judge behind any OpenAI-compatible server, and the replies that it gave before.

GenEval++ (bench/geneval.py), bench/pairs.py and bench/edit.py ask it.
"""
import base64
import email.utils
import glob
import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from lib import ranks
from bench.answers import reply_of, without_thoughts, words_of
from bench.pictures import PNG, Unusable, write_results

LONGEST_PAUSE = 300                          # seconds between two tries
TRANSIENT = (TimeoutError, ConnectionResetError, BrokenPipeError)


# --- what was replied before ---------------------------------------------------------------------
def digest(*parts):
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def kept_replies(stem, run):
    """Replies in stem.RANK.jsonl: nothing is asked twice, not even by another run.

    -> (known {key: reply}, keep(key, reply, **about)); keep may be called by several threads.
    """
    known = {}
    mine = f'{stem}.{run.rank}.jsonl'
    for path in glob.glob(f'{glob.escape(stem)}.*.jsonl'):
        with open(path, encoding='utf-8', errors='replace') as f:
            lines = f.readlines()
        for line in lines:
            try:
                row = json.loads(line)
                known[row['key']] = row['reply']
            except (ValueError, TypeError, LookupError):     # a kill in the middle of a line
                continue
        if path == mine and lines and not lines[-1].endswith('\n'):
            with open(path, 'a') as f:
                f.write('\n')                # or the next line would be lost with this one
    lock = threading.Lock()

    def keep(key, reply, **about):
        line = json.dumps(dict(key=key, **about, reply=reply)) + '\n'
        with lock:
            known[key] = reply
            with open(mine, 'a', encoding='utf-8') as f:
                f.write(line)
    return known, keep


# --- the client ----------------------------------------------------------------------------------
class Judge:
    """One model behind one server, with its instructions and the replies it gave before."""

    def __init__(self, config, replies, system='', key=None):
        self.config, self.system = config, system
        self.key = api_keys()[0] if key is None else key
        self.known, self.keep = replies      # of kept_replies
        self.url = chat_address(config.judge_url)
        self.optional = dict(temperature=0)  # some models refuse it
        self.warned = False

    def ask(self, read, text, *images, **about):
        """-> read(the answer to a text with images, the bytes of PNG or JPEG files).

        read raises ValueError at an answer that it cannot use; about is noted with every reply.
        Raises Unusable after judge_tries failures, SystemExit where no answer can ever come.
        """
        key = digest(self.url, self.config.judge_model, self.system, text, images)
        messages = messages_of(self.system, text, images)
        why, cut, pause = '', '', 0
        if key in self.known:
            try:
                return read(without_thoughts(self.known[key]))
            except ValueError:               # a reply that could not be used then either
                pass
        for attempt in range(self.config.judge_tries):
            time.sleep(pause)
            pause, gone = min(2 ** (attempt + 1), LONGEST_PAUSE), False
            try:
                status, headers, raw = self.send(messages)
                if status == 200:
                    reply, cut = reply_of(raw)
                    self.keep(key, reply, judge=self.config.judge_model, **about)
                    return read(without_thoughts(reply))
                why = f'HTTP {status}: {words_of(raw)}'.replace(self.key or '\0', '(key)')
                if in_vain(status, raw):
                    raise SystemExit(f'{self.url}: {why}; the replies so far are kept')
                pause = max(pause, asked_pause(headers))
            except ValueError as e:          # an answer of another form
                why = f'{e}{cut}'
            except (OSError, http.client.HTTPException) as e:
                why = f'{type(e).__name__}: {e}'
                gone = isinstance(e, urllib.error.URLError) and not isinstance(e.reason, TRANSIENT)
        if gone:
            raise SystemExit(f'{self.url}: {why}; the replies so far are kept')
        if not self.warned:
            self.warned = True
            print(f'warning: no answer from {self.config.judge_model}: {why[:200]}; '
                  'it is left out and counted, and so are more of them')
        raise Unusable(why[:200])

    def send(self, messages):
        """One request -> (status, headers, bytes)."""
        body = dict(model=self.config.judge_model, messages=messages)
        seconds, optional = self.config.judge_timeout, self.optional
        answer = post(self.url, dict(body, **optional), seconds, self.key)
        status, _, raw = answer
        if status == 400 and b'temperature' in raw and optional:
            self.optional = {}               # other threads may have sent it as well by now
            answer = post(self.url, body, seconds, self.key)
        return answer


def chat_address(server):
    """--judge_url -> the address that is asked. Raises SystemExit if it is none."""
    url = server.rstrip('/').removesuffix('/chat/completions') + '/chat/completions'
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ('http', 'https') and parts.hostname and (parts.port or True)
    except ValueError:                       # a port that is no number
        good = False
    if not good or len(url.split()) > 1 or not url.isascii():
        raise SystemExit(f'--judge_url={server}: expected http://SERVER/v1')
    return url


def messages_of(system, text, images):
    content = [dict(type='text', text=text)]
    for image in images:
        kind = 'png' if image.startswith(PNG) else 'jpeg'
        data = base64.b64encode(image).decode()
        url = f'data:image/{kind};base64,{data}'
        content.append(dict(type='image_url', image_url=dict(url=url)))
    messages = [dict(role='user', content=content)]
    if system:
        messages.insert(0, dict(role='system', content=system))
    return messages


class AnyStatus(urllib.request.HTTPErrorProcessor):
    """Hands every answer back; a redirect is not followed, so the key goes to no other server."""

    def http_response(self, request, response):
        return response
    https_response = http_response


def api_keys():
    """The keys of the servers, from the environment alone; without line ends, which http.client
    would refuse and quote.
    """
    text = ''.join(os.environ.get('OPENAI_API_KEY', '').split())
    if not text.isascii():
        raise SystemExit('OPENAI_API_KEY: expected plain letters, digits and signs')
    return text.split(',')


def post(url, body, seconds, key):
    """-> (status, headers, bytes). Raises OSError or HTTPException where no answer comes."""
    headers = {'Content-Type': 'application/json'}
    if key:
        headers['Authorization'] = f'Bearer {key}'
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    end = time.time() + seconds
    raw = b''
    with urllib.request.build_opener(AnyStatus).open(request, timeout=seconds) as response:
        while part := response.read1(65536):
            raw += part
            if time.time() > end:            # a server that drips may not outlast the limit either
                raise TimeoutError('too slow')
    return response.status, response.headers, raw


def in_vain(status, raw):
    """Whether no answer can ever come: redirects, and 4xx but for those that pass with time."""
    return status < 500 and status not in (408, 409, 429) or b'insufficient_quota' in raw


def asked_pause(headers):
    """Seconds of a Retry-After header, a number or a date; 0 without one."""
    asked = headers.get('Retry-After', '')
    try:
        seconds = float(asked)
    except ValueError:
        date = email.utils.parsedate_tz(asked)
        seconds = email.utils.mktime_tz(date) - time.time() if date else 0
    return max(0, min(seconds, LONGEST_PAUSE))


def ask_all(config, run, jobs, scorer):
    """scorer(job) -> a record for all jobs, judge_threads at a time on every rank.

    -> the records in the jobs' order, on rank 0, where `write_results` writes them.
    """
    if config.judge_threads < 1 or config.judge_tries < 1:
        raise SystemExit(f'--judge_threads={config.judge_threads} '
                         f'--judge_tries={config.judge_tries}: expected 1 or more')

    def one(number):
        try:
            return number, scorer(jobs[number]), ''
        except Unusable as e:
            return number, None, str(e)

    os.makedirs(config.folder, exist_ok=True)
    mine = range(run.rank, len(jobs), run.world)
    with ThreadPoolExecutor(config.judge_threads) as pool:
        asked = pool.map(one, mine)
        done = list(tqdm(asked, desc='ask', total=len(mine), disable=not run.master))
    done = sorted(ranks.gather_objects(done, run), key=lambda row: row[0])
    if not run.master:
        return []
    records = [record for _, record, why in done if not why]
    write_results(config.folder, records, [why for _, _, why in done if why])
    return records
