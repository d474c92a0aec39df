"""What a judge's server says, and what is in its answer: pure functions."""
import json
import re

MESSAGE = ('error', 'message', 'detail', 'msg')          # where servers put their words


# --- what a server says --------------------------------------------------------------------------
def words_of(raw):
    """What a server says, in one line: of JSON its message, of HTML its text."""
    text = raw.decode('utf-8', 'replace')
    try:
        said = json.loads(text)
        while not isinstance(said, str):
            if isinstance(said, dict):
                said = [said[name] for name in MESSAGE if said.get(name)]
            said = said[0]
        text = said
    except (ValueError, LookupError, TypeError):             # another form: as it stands
        pass
    text = re.sub(r'(?s)<(style|script).*?</\1>|<[^>]*>', ' ', text)
    text = ''.join(letter if letter.isprintable() else ' ' for letter in text)
    return ' '.join(text.split())[:300] or 'without a word'


def reply_of(raw):
    """A server's JSON -> (the answer's text, what to add if it cannot be used).

    Raises ValueError where there is no text.
    """
    try:
        choice = json.loads(raw)['choices'][0]
        message = choice['message']
        text = message.get('content')
        if isinstance(text, list):           # parts
            text = ''.join(part.get('text') or '' for part in text)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f'no choices in the answer: {words_of(raw)}')
    cut = ''
    if choice.get('finish_reason') == 'length':
        cut = ', cut at the server\'s limit of tokens'
    if not text or not isinstance(text, str):
        thoughts = message.get('reasoning_content') or message.get('reasoning')
        why = message.get('refusal') or (thoughts and 'thoughts without an answer')
        raise ValueError(f'{why or "an empty answer"}{cut}')
    return text, cut


# --- what is in an answer ------------------------------------------------------------------------
def without_thoughts(reply):
    """What follows the last </think>; an open <think> takes all that follows with it."""
    said = re.split(r'(?i)</think(?:ing)?>', reply)[-1]
    return re.split(r'(?i)<think(?:ing)?>', said)[0].strip()


def last_object(text, name):
    """The last JSON object in a text that has this key; its keys in lower case.

    Raises ValueError if there is none.
    """
    found, start = None, text.find('{')
    while start >= 0:
        end = start + 1
        try:
            value, whole = json.JSONDecoder().raw_decode(text, start)
            value = {key.lower(): item for key, item in value.items()}
            if name in value:                # else it may be around one
                found, end = value, whole
        except (ValueError, RecursionError):
            pass
        start = text.find('{', end)
    if found is None:
        raise ValueError(f'no {{"{name}": ...}} in {text[:60]!r}')
    return found


def number(value):
    """A JSON value as a float: 1, 1.0, "1", true, "yes". Raises ValueError."""
    if isinstance(value, str):
        value = dict(true=1, yes=1, false=0, no=0).get(value.strip().lower(), value)
    try:
        return float(value)
    except (TypeError, OverflowError):
        raise ValueError(f'not a number: {value!r}')
