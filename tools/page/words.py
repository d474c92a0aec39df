"""A caption as it was then: what is new in it, what is false, and how sure each token was."""
import difflib
import re
from html import escape

from tools.page.runs import finite, number

SEPARATORS = (',', '.')        # of a caption's phrases, words of their own
SHADES = 8                     # steps of a token's shade
LOGP_FLOOR = -4.6              # a token with probability .01 or less has the darkest shade


def closed_up(text):
    """Without the space that the embedded world has before a comma and a full stop."""
    return re.sub(r' ([,.])(?= |$)', r'\1', text)


def new_words(words, before):
    """Places of the words that a caption did not have before, as a set."""
    matcher = difflib.SequenceMatcher(None, before, words, autojunk=False)
    places = set()
    for kind, _, _, start, end in matcher.get_opcodes():
        if kind != 'equal':
            places.update(range(start, end))
    return {place for place in places if words[place] not in SEPARATORS}


def false_words(words, false):
    """Places of the words of those phrases, between commas, that are among the false ones."""
    false = {' '.join(str(phrase).split()) for phrase in false}
    places, start = set(), 0
    for end in range(len(words) + 1):
        if end == len(words) or words[end] in SEPARATORS:
            phrase = range(start, end)
            if ' '.join(words[start:end]) in false:
                places.update(phrase)
            start = end + 1
    return places


def caption_html(caption, before=None, false=()):
    """A caption: words new since `before` marked, false phrases struck out."""
    words = str(caption).split()
    new = set()
    if before is not None:
        new = new_words(words, str(before).split())
    struck = false_words(words, false)
    parts, last = [], None
    for place, word in enumerate(words):
        style = (place in new, place in struck)
        if style == last:
            parts[-1][1].append(word)
        else:
            parts.append((style, [word]))
        last = style
    texts = []
    for (is_new, is_struck), group in parts:
        text = escape(' '.join(group))
        if is_new:
            text = f'<mark>{text}</mark>'
        if is_struck:
            text = f'<del>{text}</del>'
        texts.append(text)
    return closed_up(' '.join(texts)) or '<em>empty caption</em>'


def shade(logp):
    """0 for a certain token to SHADES for an unlikely one, or for what is no number."""
    if not finite(logp):
        return SHADES
    share = min(1, max(0, logp / LOGP_FLOOR))
    return round(share * SHADES)


def tokens_html(member):
    """A caption whose tokens are shaded by their log-prob."""
    parts = []
    for token, logp in zip(member.get('tokens') or [], member.get('logp') or []):
        parts.append(f'<span class="shade{shade(logp)}" title="log-prob {number(logp)}">'
                     f'{escape(str(token))}</span>')
    return ''.join(parts) or escape(str(member.get('caption', '')))
