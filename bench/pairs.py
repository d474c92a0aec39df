"""Unified-Bench's second protocol: judges compare two captions of every image.

The paper (UAE, v5, Table 6) reports in how many pairs ours wins, by four judges, and their mean.

    paper                        here                           why
    one order of the captions    both orders, and how often     judges prefer a place: a pair's
                                 they disagree                  score is the mean of its orders
    ties not described           a tie counts half              a forced choice has none
    all pairs                    those of similar length too    judges prefer the longer caption
    no errors                    bootstrap over images          300 pairs leave some .03
"""
import os
import re
import types

from lib.files import write_atomic, write_json, write_lines
from bench.answers import last_object
from bench.judges import Judge, api_keys, ask_all, kept_replies
from bench.pictures import Unusable, file_bytes
from bench.prompts import read_json, read_lines, texts_of
from bench.summary import markdown, pair_summary
from bench.unified import image_files, match_files, read_captions

PAIR = (
    'You see an image and two captions of it, A and B. Say which caption describes the image more '
    'completely and more correctly. Complete: objects, their number, attributes, places, visible '
    'text, background. Correct: a statement that the image does not bear out counts against its '
    'caption. Length alone and style count nothing. If neither is better, say tie. Answer with '
    'JSON alone: {"winner": "A", "B" or "tie", "reason": "one sentence"}')
SCORES = dict(A=1.0, B=0.0, TIE=0.5)
COLUMNS = ('win', 'win_error', 'win_similar', 'win_similar_error', 'disagree', 'first', 'failed')


# --- the rules: pure functions -------------------------------------------------------------------
def winner(answer):
    """A judge's answer -> the score of caption A: 1, 0, or .5 for a tie.

    Takes {"winner": ...} and, as the paper's prompt asks for, a line "Final Answer: A". Raises
    ValueError.
    """
    try:
        said = str(last_object(answer, 'winner')['winner'])
    except ValueError:
        said = re.split(r'(?i)final answer\W*', answer)[-1]
        if said == answer:
            raise
    said = re.fullmatch(r'(?i)\W*(?:caption\W*)?(A|B|tie)\W*', said)
    if not said:
        raise ValueError(f'neither A nor B nor tie in {answer[-60:]!r}')
    return SCORES[said.group(1).upper()]


# --- the run -------------------------------------------------------------------------------------
def read_pairs(config):
    """Two caption files, by the image's name -> [(image file, our caption, their caption)].

    The images are those in DATA/Image, or else where the lines of --captions say.
    """
    if os.path.isdir(f'{config.data}/Image'):
        files = image_files(f'{config.data}/Image')
    else:
        files = []
        for n, line in enumerate(read_lines(config.captions), 1):
            if not line.strip():
                continue
            where = f'{config.captions}:{n}'
            path, _ = texts_of(read_json(line, where), where, 'image', 'caption')
            files.append((os.path.basename(path), path))
    missing = [path for _, path in files if not os.path.exists(path)]
    if missing or not files:
        raise SystemExit(f'{config.captions}: {len(missing)} of {len(files)} images are missing, '
                         f'first {"".join(missing[:1])!r}; --data=DIR takes them from DIR/Image')
    references = match_files(files, dict(files), 'file')
    ours = read_captions(config.captions, references)
    theirs = read_captions(config.against, references)
    return [(path, ours[name], theirs[name]) for name, path in references.items()]


def open_judges(config, run):
    """{name: Judge} of judge_model, names between commas; judge_url is one for all, or as many.

    With several servers OPENAI_API_KEY holds a key for each, between commas too.
    """
    names, urls, keys = config.judge_model.split(','), config.judge_url.split(','), api_keys()
    if len(urls) not in (1, len(names)) or len(set(names)) < len(names):
        raise SystemExit(f'--judge_model={config.judge_model}: expected different names, and in '
                         f'--judge_url one address or one for each name, got {len(urls)}')
    if any(keys) and len(keys) != len(urls):
        raise SystemExit(f'OPENAI_API_KEY: expected {len(urls)} keys between commas, one for each '
                         f'address in --judge_url, got {len(keys)}')
    system = '\n'.join(read_lines(config.judge_prompt)) if config.judge_prompt else PAIR
    replies = kept_replies(f'{config.folder}/replies', run)
    judges = {}
    for i, name in enumerate(names):
        place = min(i, len(urls) - 1)
        own = types.SimpleNamespace(**vars(config))
        own.judge_model, own.judge_url = name, urls[place]
        judges[name] = Judge(own, replies, system, keys[min(place, len(keys) - 1)])
    return judges


def pair_scorer(judges):
    """-> scorer((judge's name, image file, ours, theirs)) -> a line of results.jsonl."""
    def scorer(job):
        name, path, ours, theirs = job
        image = file_bytes(path)
        record = dict(judge=name, image=path, ours=ours, theirs=theirs,
                      words=[len(ours.split()), len(theirs.split())], orders=None, reason='')
        if ours == theirs:
            return dict(record, orders=[0.5, 0.5], reason='the same caption, not asked')
        scores = []
        try:
            for order, a, b in (('ours first', ours, theirs), ('theirs first', theirs, ours)):
                question = f'Caption A:\n{a}\n\nCaption B:\n{b}'
                scores.append(judges[name].ask(winner, question, image, image=path, order=order))
        except Unusable as e:
            return dict(record, reason=f'no answer: {e}')
        return dict(record, orders=[scores[0], 1 - scores[1]])
    return scorer


def judge_pairs(config, run):
    """--bench=pairs: asks every judge about every pair; results.jsonl, summary.json, table.md.

    -> the summary, None on other ranks.
    """
    pairs = read_pairs(config)
    judges = open_judges(config, run)
    jobs = [(name, *pair) for name in judges for pair in pairs]
    records = ask_all(config, run, jobs, pair_scorer(judges))
    if not run.master:
        return None
    summary = pair_summary(records, config.seed)
    write_json(f'{config.folder}/summary.json', summary)
    rows = {}
    for name, row in summary['judges'].items():
        rows[name] = {column: row[column] for column in COLUMNS}
    text = f'{markdown("judge", rows)}\n{summary["similar"]} pairs of similar length.\n'
    path = f'{config.folder}/table.md'
    write_atomic(path, lambda tmp: write_lines(tmp, [text]))
    print(text)
    return summary
