"""tools/report.py: the page about runs, from made-up runs, read in a browser where there is one."""
import base64
import html
import json
import math
import os
import re
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from data.shapes import scenes as world
from running import lines, refusal
from tools import report
from tools.page import curves, gif, pictures, png, words
from tools.page import runs as run_files

STAGES = ('cold_start', 'grpo_encoder', 'grpo_decoder')
HOSTILE = '<script>document.title = "hacked"</script>'


# --- made-up runs -------------------------------------------------------------------------------
def save(folder, name, scene, noise, rng):
    """A scene's picture with some noise, as PNG."""
    pixels = world.draw(scene) + rng.normal(0, 255 * noise, (32, 32, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(f'{folder}/samples/{name}')
    return f'samples/{name}'


def append(folder, name, value):
    with open(f'{folder}/{name}.jsonl', 'a') as f:
        f.write(json.dumps(value) + '\n')


def member(place, rng):
    """What every attempt of a group has."""
    return dict(reward=0.5 + place / 10, adv=(place - 1.5) / 1.1,
                logp=[float(value) for value in -rng.exponential(1, 6)])


def make_groups(folder, script, step, scene, rng):
    """One opened group of four attempts."""
    source = save(folder, f'group_{step:06d}.png', scene, 0, rng)
    members = []
    for place in range(4):
        attempt = member(place, rng)
        if script == 'grpo_encoder':
            words = world.terse(scene, 0.2 + place / 4, rng).split()
            attempt['tokens'] = [f' {word}' for word in words]
            attempt['caption'] = ' '.join(words)
            attempt['logp'] = [float(value) for value in -rng.exponential(1, len(words))]
        else:
            name = f'group_{step:06d}_{place:02d}.png'
            attempt['image'] = save(folder, name, scene, 0.3 - place / 20, rng)
        members.append(attempt)
    line = dict(step=step, kind='captions', source=source, members=members)
    if script == 'grpo_decoder':
        line.update(kind='drawings', caption=world.caption(scene))
    append(folder, 'groups', line)


def make_run(folder, script, steps=(0, 20, 40), watch=8, start=0.0):
    """A run folder as the contract of its files has it; skill goes from `start` up by a third."""
    os.makedirs(f'{folder}/samples', exist_ok=True)
    rng = np.random.default_rng(len(script))
    scenes = [world.random_scene(np.random.default_rng(row)) for row in range(watch)]
    for step in steps:
        skill = start + 0.3 * step / max(*steps, 1)
        evaluation = dict(step=step, reward=0.5 + skill / 2, judge=0.45 + skill / 2, mse=0.1,
                          caption_len=6 + 9 * skill)
        for name in ('caption_truth', 'caption_recall', 'greedy_caption_truth',
                     'greedy_caption_recall', 't2i_own', 't2i_true'):
            evaluation[name] = 0.3 + 0.6 * skill + 0.1 * rng.random()
        append(folder, 'eval', evaluation)
        for row, scene in enumerate(scenes):
            caption = world.terse(scene, 0.2 + 0.8 * skill, np.random.default_rng(row))
            false = [phrase.strip() for phrase in caption.strip(' .').split(',')][:row % 2]
            append(folder, 'samples', dict(
                step=step, row=row, name=f'scene {row}', caption=caption,
                caption_len=len(caption.split()), reward=0.5 + skill / 2, judge=0.4, mse=0.05,
                source=save(folder, f'source_{row:03d}.png', scene, 0, rng),
                image=save(folder, f'step_{step:06d}_{row:03d}.png', scene, 0.4 * (1 - skill), rng),
                truth=world.caption(scene), false=false))
        if step and script != 'cold_start':
            make_groups(folder, script, step, scenes[-1], rng)
    with open(f'{folder}/config.json', 'w') as f:
        changed = dict(init_from='out/before', lr=1e-4)
        json.dump(dict(script=script, changed=changed, config=dict(steps=max(steps))), f)


def make_demo(folder, **how):
    for place, script in enumerate(STAGES):
        make_run(f'{folder}/{script}', script, start=0.3 * place, **how)
    scores = dict(reward=0.5, judge=0.4, t2i_own=0.5)
    table = dict(stages=dict(base=scores, cold_start=scores, grpo_encoder=scores,
                             grpo_decoder=scores),
                 ceiling=dict(reward=0.99, judge=0.98, t2i=0.997), controls={})
    with open(f'{folder}/report.json', 'w') as f:
        json.dump(table, f)
    return str(folder)


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    """A demo folder with its page: three stages of three stops each; one caption is hostile."""
    folder = make_demo(tmp_path_factory.mktemp('report') / 'demo')
    samples = read(f'{folder}/cold_start/samples.jsonl')
    first, rest = samples.split('\n', 1)
    line = json.loads(first)
    line.update(caption=HOSTILE, name=HOSTILE, false=[])
    write(f'{folder}/cold_start/samples.jsonl', f'{json.dumps(line)}\n{rest}')
    report.main([folder])
    return folder


def read(path):
    with open(path, encoding='utf-8') as f:
        return f.read()


def write(path, text):
    with open(path, 'w', encoding='utf-8') as f:
        f.write(text)


# --- the page as text -----------------------------------------------------------------------------
def test_the_page_has_what_the_runs_left(demo):
    page = read(f'{demo}/report.html')
    text = html.unescape(re.sub('</?(mark|del)>', '', page))
    for stage in STAGES:
        for line in lines(f'{demo}/{stage}/samples.jsonl'):
            assert f'<p class="caption">{words.closed_up(line["caption"])}</p>' in text
        assert f'<caption>{stage}</caption>' in page
    assert page.count('alt="reconstruction: ') == 3 * 3 * 8
    assert page.count('alt="source: ') == 8                 # each source once, over all stages
    assert page.count('class="members words"') == page.count('class="members drawings"') == 2
    for title in ('Reward and judge', 'Caption length', 'Recall', 'Truth', 't2i'):
        assert f'<h3>{title}' in page
    assert 'out/before' in page                             # a changed key
    assert '<td>0.990</td>' in page                         # the ceiling of report.json
    assert len(page) < 3e6


def test_the_head_says_what_each_stage_changed(tmp_path):
    evals = {0: dict(reward=0.5, judge=0.412, caption_len=6.0), 5: {},
             10: dict(reward=0.5, judge=0.634, caption_len=14.82)}
    make_run(tmp_path, 'grpo_encoder')
    run = report.read_runs([str(tmp_path)])[0]._replace(evals=evals)
    assert report.gains(run, [0, 5, 10]) == ['judge 0.41 → 0.63', 'tokens per caption 6.0 → 14.8']
    assert report.gains(run, []) == []


def test_the_table_explains_the_control_where_there_is_one(tmp_path):
    table = dict(stages=dict(base=dict(reward=0.5)), ceiling=dict(reward=0.99))
    (tmp_path / 'report.json').write_text(json.dumps(table))
    assert report.CONTROL not in report.table_html([str(tmp_path)])
    table['controls'] = dict(shuffled_reward=dict(reward=0.612))
    (tmp_path / 'report.json').write_text(json.dumps(table))
    text = report.table_html([str(tmp_path)])
    assert report.CONTROL in text
    assert '<td>0.612</td>' in text


def test_text_of_runs_is_escaped_and_nothing_is_loaded(demo):
    page = read(f'{demo}/report.html')
    assert HOSTILE not in page
    assert '&lt;script&gt;' in page
    assert page.count('<script>') == 2                      # the page's own
    links = re.findall(r'(?:src|href)="([^"]{5})', page)
    assert set(links) == {'data:'}
    assert 'http' not in page


def test_groups_are_sorted_and_bars_point_to_their_side(demo):
    page = read(f'{demo}/report.html')
    group = re.search(r'<ol class="members words">.*?</ol>', page)[0]
    rewards = re.findall(r'class="reward">([\d.]+)', group)
    assert rewards == ['0.80', '0.70', '0.60', '0.50']
    bars = re.findall(r'class="(\w+)" style="(\w+): 50%; width: ([\d.]+)%', group)
    assert [bar[:2] for bar in bars] == 2 * [('plus', 'left')] + 2 * [('minus', 'right')]
    assert [bar[2] for bar in bars] == ['50.0', '16.7', '16.7', '50.0']


def test_small_images_stay_as_they_are(demo):
    path = f'{demo}/cold_start/samples/source_000.png'
    uri, width, height = pictures.data_uri(path)
    with open(path, 'rb') as f:
        assert base64.b64decode(uri.removeprefix('data:image/png;base64,')) == f.read()
    assert (width, height) == (32, 32)


def test_large_images_are_made_small(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (512, 384, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'photo.png')
    uri, width, height = pictures.data_uri(str(tmp_path / 'photo.png'))
    assert (width, height) == (192, 256)
    assert uri.startswith('data:image/webp;base64,') and len(uri) < 60_000


# --- words ----------------------------------------------------------------------------------------
@pytest.mark.parametrize('before, caption, false, expected', [
    (None, 'red circle .', [], 'red circle.'),
    ('red circle .', 'red circle , blue square .', [], 'red circle, <mark>blue square</mark>.'),
    ('red circle .', 'small red circle .', [], '<mark>small</mark> red circle.'),
    ('red circle .', 'red circle .', ['red circle'], '<del>red circle</del>.'),
    ('', 'red circle , red .', ['red'], '<mark>red circle</mark>, <del><mark>red</mark></del>.'),
    (None, 'a < b', [], 'a &lt; b'),
    ('red', '', [], '<em>empty caption</em>'),
])
def test_new_and_false_words(before, caption, false, expected):
    assert words.caption_html(caption, before, false) == expected


def test_shades_go_from_certain_to_unlikely():
    assert words.shade(0.0) == 0
    assert words.shade(-2.3) == words.SHADES // 2
    assert words.shade(-9.0) == words.shade(-math.inf) == words.shade(None) == words.SHADES


@pytest.mark.parametrize('low, high, expected', [
    (0, 1, [0, 0.5, 1]),
    (0.41, 1.03, [0.6, 0.8, 1]),
    (0, 15.2, [0, 5, 10, 15]),
    (-0.3, 0.3, [-0.2, 0, 0.2]),
])
def test_ticks_are_round(low, high, expected):
    assert curves.ticks(low, high) == expected


# --- what may be missing --------------------------------------------------------------------------
@pytest.fixture
def run(tmp_path):
    folder = str(tmp_path / 'grpo_encoder')
    make_run(folder, 'grpo_encoder', steps=(0, 20), watch=2)
    return folder


@pytest.mark.parametrize('name, expected', [
    ('config.json', 'it left no config.json'),
    ('eval.jsonl', 'have not evaluated yet'),
    ('samples.jsonl', 'watched no images'),
    ('groups.jsonl', 'No run here opened a group'),
    ('samples', '>no image<'),
])
def test_a_missing_piece_leaves_the_others(run, name, expected):
    whole = report.page([run])
    path = f'{run}/{name}'
    if os.path.isdir(path):
        shutil.rmtree(path)
    else:
        os.remove(path)
    page = report.page([run])
    assert expected in page and expected not in whole
    assert len(re.findall('<section', page)) == len(re.findall('<section', whole)) == 5
    assert 'grpo_encoder' in page and page.rstrip().endswith('</html>')


def test_an_unfinished_run_says_how_far_it_came(run):
    config = json.loads(read(f'{run}/config.json'))
    config['config']['steps'] = 100
    write(f'{run}/config.json', json.dumps(config))
    for name in ('eval', 'samples', 'groups'):
        with open(f'{run}/{name}.jsonl', 'a') as f:
            f.write('{"step": 40, "rew')                    # a kill cut this line short
    assert 'unfinished: 20 of 100 updates' in report.page([run])


def test_photos_have_no_truth_and_need_no_judge(run):
    for name in ('samples', 'eval'):
        kept = []
        for line in lines(f'{run}/{name}.jsonl'):
            wanted = ('step', 'row', 'name', 'caption', 'source', 'image', 'reward', 'caption_len')
            kept.append({key: line[key] for key in wanted if key in line})
        write(f'{run}/{name}.jsonl', '\n'.join(map(json.dumps, kept)))
    page = report.page([run])
    assert '<h3>Truth' not in page and '<h3>Reward' in page
    assert '<del>' not in page and '>judge <' not in page
    assert 'class="truth"' not in page


def test_the_page_goes_where_it_is_told(run, tmp_path):
    report.main([run])
    report.main([run, f'--out_dir={tmp_path}/elsewhere'])
    assert read(f'{run}/report.html') == read(f'{tmp_path}/elsewhere/report.html')


@pytest.mark.parametrize('argv, expected', [
    (['tools'], 'tools: no run here'),
    (['nowhere'], 'nowhere: no run here'),
    ([], 'expected a folder'),
    (['out', '--gift=x'], "unknown key 'gift'"),
    (['-v'], "got '-v'"),
])
def test_what_is_no_run_gets_one_line(argv, expected):
    assert expected in refusal(report.main, argv)


def test_runs_keep_their_order_and_long_ones_are_thinned(tmp_path):
    folders = [str(tmp_path / name / 'grpo_decoder') for name in ('b', 'a')]
    for folder in folders:
        os.makedirs(folder)
        evals = [json.dumps(dict(step=step, reward=0.5)) for step in range(0, 1000, 5)]
        write(f'{folder}/eval.jsonl', '\n'.join(evals))
    runs = run_files.read_runs(folders)
    assert [run.name for run in runs] == ['grpo_decoder', 'grpo_decoder (2)']
    stops = run_files.stops_of(runs)
    assert len(stops) == 2 * run_files.MOST_STOPS
    assert [stop.step for stop in stops if stop.edge] == [0, 995, 0, 995]
    report.write_report(folders, f'{tmp_path}/deep/page.html')
    assert 'grpo_decoder (2)' in read(f'{tmp_path}/deep/page.html')


# --- the moving picture ---------------------------------------------------------------------------
def test_the_gif_has_a_frame_for_every_stop(demo, tmp_path):
    path = str(tmp_path / 'loop.gif')
    report.main([demo, f'--gif={path}'])
    assert os.path.getsize(path) <= 1_500_000
    seconds, frames = 0, set()
    with Image.open(path) as moving:
        assert moving.size[0] == 800 and moving.n_frames == 9
        for k in range(moving.n_frames):
            moving.seek(k)
            seconds += moving.info['duration'] / 1000
            frames.add(moving.convert('RGB').tobytes())
    assert len(frames) == 9
    assert seconds == pytest.approx(12, abs=0.2)


def test_colours_of_the_gif_are_those_of_the_images(demo, tmp_path):
    path, side = str(tmp_path / 'loop.gif'), 85
    gif.write_gif([demo], path)
    with Image.open(path) as moving, Image.open(f'{demo}/cold_start/samples/source_000.png') as one:
        box = (gif.MARGIN, gif.HEAD, gif.MARGIN + side, gif.HEAD + side)
        shown = np.asarray(moving.convert('RGB').crop(box), float)
        source = np.asarray(one.convert('RGB').resize((side, side), Image.NEAREST), float)
    assert abs(shown - source).mean() < 8


def test_no_gif_of_runs_that_watched_nothing(run, tmp_path):
    os.remove(f'{run}/samples.jsonl')
    message = refusal(report.main, [run, f'--gif={tmp_path}/loop.gif'])
    assert 'no watched images' in message


# --- the sheet ------------------------------------------------------------------------------------
def test_the_sheet_has_each_runs_last_drawings(demo, tmp_path):
    path = f'{tmp_path}/deep/sheet.png'
    folders = [f'{demo}/grpo_decoder', f'{demo}/cold_start']
    report.main([*folders, f'--png={path}'])
    runs = run_files.read_runs(folders)
    drawn = [f'{runs[0].folder}/samples/source_000.png']
    for run in runs:
        last = run.samples[max(run.samples)][0]
        drawn.append(f'{run.folder}/{last["image"]}')
    with Image.open(path) as sheet:
        assert sheet.width == 2 * png.MARGIN + 3 * png.COLUMN
        for column, name in enumerate(drawn):
            left = png.MARGIN + column * png.COLUMN
            shown = sheet.crop((left, png.HEAD, left + png.SIDE, png.HEAD + png.SIDE))
            expected = gif.load(name, png.SIDE)
            assert np.array_equal(np.asarray(shown), np.asarray(expected)), name


def test_no_sheet_beside_a_gif_or_of_nothing(demo, run, tmp_path):
    message = refusal(report.main, [demo, f'--png={tmp_path}/a.png', f'--gif={tmp_path}/a.gif'])
    assert 'one at a time' in message
    os.remove(f'{run}/samples.jsonl')
    message = refusal(report.main, [run, f'--png={tmp_path}/a.png'])
    assert 'no watched images' in message


# --- in a browser ---------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def chromium():
    webdriver = pytest.importorskip('selenium.webdriver')
    binary, driver = shutil.which('chromium'), shutil.which('chromedriver')
    if not binary or not driver:
        pytest.skip('no chromium with its chromedriver on this machine')
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ('headless=new', 'no-sandbox', 'disable-dev-shm-usage', 'disable-gpu',
                 'hide-scrollbars'):
        options.add_argument(f'--{flag}')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    service = webdriver.ChromeService(executable_path=driver)
    browser = webdriver.Chrome(options=options, service=service)
    yield browser
    browser.quit()


@pytest.fixture
def browser(chromium, demo):
    """The page just opened, 1400 pixels wide, light."""
    resize(chromium, 1400)
    colours(chromium, 'light')
    chromium.get(f'file://{demo}/report.html')
    return chromium


def resize(browser, width):
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(
        width=width, height=900, deviceScaleFactor=1, mobile=False))


def colours(browser, scheme):
    feature = dict(name='prefers-color-scheme', value=scheme)
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[feature]))


STATE = '''
const all = selector => [...document.querySelectorAll(selector)]
const seen = selector => all(selector).filter(e => e.getClientRects().length)
const text = selector => seen(selector).map(e => e.textContent)
return {
  stop: Number(document.querySelector('#stop').value),
  where: text('#where [data-stop]'),
  images: seen('.scene .stop img').map(e => e.src),
  captions: text('.scene .stop .caption'),
  marks: text('.scene mark'),
  cursors: seen('.cursor').map(e => Number(e.dataset.stop)),
  scores: text('.key b'),
  groups: seen('.group, .none').map(e => Number(e.dataset.stop)),
  bars: seen('#bar').length,
  title: document.title,
}'''


def state(browser):
    """What is to be seen, by the browser's own account."""
    return browser.execute_script(STATE)


def slide(browser, stop):
    browser.execute_script('''
        const slider = document.querySelector('#stop')
        slider.value = arguments[0]
        slider.dispatchEvent(new Event('input'))''', stop)


def press(browser, key):
    from selenium.webdriver import ActionChains
    ActionChains(browser).send_keys(key).perform()


def test_the_page_loads_without_a_message(browser):
    assert browser.get_log('browser') == []
    assert state(browser)['title'].startswith('nanoUAE')    # no caption ran as a script
    slide(browser, 0)
    assert HOSTILE in state(browser)['captions'][0]
    broken = browser.execute_script(
        'return [...document.images].filter(e => !e.naturalWidth).length')
    assert broken == 0


def test_slider_moves_images_captions_groups_and_cursors(browser):
    last = state(browser)
    assert last['bars'] == 1
    assert last['stop'] == 8 and last['where'] == ['grpo_decoder update 40 of 40']
    slide(browser, 3)
    then = state(browser)
    assert then['where'] == ['grpo_encoder update 0 of 40']
    for name in ('images', 'captions'):
        assert len(then[name]) == len(last[name]) == 8
        assert then[name] != last[name]
    assert then['cursors'] == [3] * 5 and then['groups'] == [3]
    assert then['marks'] == []                              # the captions of the stop before
    slide(browser, 4)
    assert state(browser)['marks']
    assert len(then['scores']) == 9 and then['scores'] != last['scores']


def test_cursor_moves_the_slider(browser):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    drawing = browser.find_elements(By.CSS_SELECTOR, '.panel svg')[1]
    browser.execute_script('arguments[0].scrollIntoView({block: "center"})', drawing)
    ActionChains(browser).move_to_element(drawing).click().perform()
    assert state(browser)['stop'] == 4                      # the middle of the second stage
    assert state(browser)['cursors'] == [4] * 5


def test_keys_move_the_slider_by_one(browser):
    from selenium.webdriver import Keys
    press(browser, Keys.ARROW_LEFT)
    assert state(browser)['stop'] == 7
    browser.execute_script('document.querySelector("#stop").focus()')
    press(browser, Keys.ARROW_LEFT)                         # once, not twice, with the focus on it
    assert state(browser)['stop'] == 6
    for _ in range(3):
        press(browser, Keys.ARROW_RIGHT)
    assert state(browser)['stop'] == 8                      # the end is the end
    outline = browser.execute_script(
        'return getComputedStyle(document.activeElement).outlineStyle')
    assert outline == 'solid'                               # the focus is to be seen


def test_play_runs_from_the_start_until_a_key(browser):
    from selenium.webdriver import Keys
    from selenium.webdriver.common.by import By
    play = browser.find_element(By.ID, 'play')
    play.click()
    assert state(browser)['stop'] == 0 and play.text == 'Pause'
    deadline = time.time() + 120
    while state(browser)['stop'] == 0 and time.time() < deadline:
        time.sleep(0.05)
    assert state(browser)['stop'] > 0
    press(browser, Keys.ARROW_LEFT)
    assert play.text == 'Play'


def luminance(colour):
    """Relative luminance of 'rgb(r, g, b)' as WCAG defines it."""
    channels = [int(value) / 255 for value in re.findall(r'\d+', colour)[:3]]
    linear = []
    for channel in channels:
        value = ((channel + 0.055) / 1.055) ** 2.4
        if channel <= 0.04045:
            value = channel / 12.92
        linear.append(value)
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_light_and_dark_are_legible(browser):
    ask = '''const style = getComputedStyle(document.querySelector(arguments[0]))
             return [style.color, style.backgroundColor]'''
    papers = []
    for scheme in ('light', 'dark'):
        colours(browser, scheme)
        ink, paper = map(luminance, browser.execute_script(ask, 'body'))
        soft, _ = map(luminance, browser.execute_script(ask, '.scores'))
        papers.append(paper)
        for text in (ink, soft):
            low, high = sorted((text, paper))
            assert (high + 0.05) / (low + 0.05) > 4.5
    assert papers[0] > 0.8 and papers[1] < 0.05


@pytest.mark.parametrize('width', [400, 1400])
def test_nothing_is_wider_than_the_screen(browser, width):
    resize(browser, width)
    for stop in (8, 5, 0):
        slide(browser, stop)
        wide = browser.execute_script('return document.documentElement.scrollWidth')
        assert wide == width
        out = browser.execute_script('''
            return [...document.querySelectorAll('body *')].filter(e => {
                const box = e.getBoundingClientRect()
                return box.right > innerWidth + 1 && !e.closest('.wide')
            }).map(e => e.outerHTML.slice(0, 80))''')
        assert not out


def test_without_scripts_the_ends_of_every_stage_are_shown(browser):
    disable = 'Emulation.setScriptExecutionDisabled'
    browser.execute_cdp_cmd(disable, dict(value=True))
    try:
        browser.refresh()
        then = state(browser)
    finally:
        browser.execute_cdp_cmd(disable, dict(value=False))
    assert len(then['images']) == 8 * 3 * 2                 # 8 scenes, 3 stages, 2 ends
    assert not then['bars'] and not then['cursors']         # no slider that does nothing
    assert len(then['scores']) == 9 and len(then['groups']) == 4
