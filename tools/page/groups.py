"""The opened groups of stages 2 and 3: several attempts at one image, the best first."""
import math
import os
from html import escape

from tools.page.pictures import picture
from tools.page.runs import finite, number
from tools.page.scenes import at_stop, when_html
from tools.page.words import SHADES, caption_html, tokens_html

NO_GROUP = 'No group here: groups open after an update of stage 2 or 3.'
SWATCHES = ''.join(f'<i class="shade{k}"></i>' for k in range(SHADES + 1))
HEAD = (f'<li class="head"><span>reward</span><span>advantage</span><span>token probability: 1 '
        f'<span class="swatches">{SWATCHES}</span> .01 or less</span></li>')


def by_reward(member):
    """What members are sorted by; without a reward they are last."""
    reward = member.get('reward')
    if not finite(reward):
        return -math.inf
    return reward


def bar_html(advantage, most):
    """A bar from the middle, negative to the left, `most` filling one half; and the number."""
    if not finite(advantage):
        advantage = 0.0
    share = 50 * abs(advantage) / most
    side, sign = 'left', 'plus'
    if advantage < 0:
        side, sign = 'right', 'minus'
    shown = f'{advantage:+.2f}'.replace('-', '−')
    return (f'<span class="bar"><i class="{sign}" style="{side}: 50%; width: {share:.1f}%"></i>'
            f'</span><b>{shown}</b>')


def member_html(member, place, folder, most):
    """One attempt: its reward and advantage, beside its caption or below its drawing."""
    bar = bar_html(member.get('adv'), most)
    reward = f'<span class="reward">{number(member.get("reward"))}</span>'
    if 'image' not in member:
        tokens = tokens_html(member)
        return f'<li class="words">{reward}{bar}<span class="tokens">{tokens}</span></li>'
    path = os.path.join(folder, member['image'] or '')
    image = picture(path, f'drawing {place} of the group, by reward')
    return f'<li class="drawing">{image}{reward}{bar}</li>'


def members_html(group, folder):
    """The list of all attempts."""
    members = sorted(group.get('members') or [], key=by_reward, reverse=True)
    sizes = [abs(member['adv']) for member in members if finite(member.get('adv'))]
    most = max(sizes, default=0) or 1               # all rewards equal: no bars
    rows = [member_html(member, place, folder, most) for place, member in enumerate(members, 1)]
    if group.get('kind') == 'drawings':
        return f'<ol class="members drawings">{"".join(rows)}</ol>'
    return f'<ol class="members words">{HEAD}{"".join(rows)}</ol>'


def group_html(stop, run, edge):
    """The opened group of one stop; `edge` ones are shown without scripts."""
    group = run.groups[stop.step]
    source = picture(os.path.join(run.folder, group.get('source') or ''), 'the image of the group')
    caption = ''
    if group.get('caption'):
        caption = f'<p class="caption">{caption_html(group["caption"])}</p>'
    return (f'<div {at_stop(stop, edge, "stop group")}>'
            f'<figure class="source">{when_html("source", stop, run)}{source}'
            f'<figcaption>{caption}</figcaption></figure>{members_html(group, run.folder)}</div>')


def groups_html(runs, stops):
    """The groups of all stops."""
    opened = {}                                     # run -> its stops with a group
    for stop in stops:
        if stop.step in runs[stop.run].groups:
            opened.setdefault(stop.run, []).append(stop)
    if not opened:
        return '<p class="none">No run here opened a group.</p>'
    parts = []
    for stop in stops:
        own = opened.get(stop.run, [])
        if stop in own:
            edge = stop in (own[0], own[-1])
            parts.append(group_html(stop, runs[stop.run], edge))
        else:
            parts.append(f'<p class="none" data-stop="{stop.index}">{NO_GROUP}</p>')
    return ''.join(parts)
