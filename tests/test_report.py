"""tools/report.py: the page about runs, from made-up runs, read in a browser where there is one."""
import base64
import html
import io
import json
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

STAGES = ('cold_start', 'grpo_encoder', 'grpo_decoder')
STEPS = (0, 20, 40)
MEASURES = ('reward', 'judge', 'caption_truth', 'caption_recall', 'greedy_caption_truth',
            'greedy_caption_recall', 't2i_own', 't2i_true')
HOSTILE = '<script>document.title = "hacked"</script>'


# --- made-up runs -------------------------------------------------------------------------------
def write(path, text, mode='w'):
    with open(path, mode, encoding='utf-8') as f:
        f.write(text)


def append(path, **line):
    write(path, json.dumps(line) + '\n', 'a')


def save(folder, name, scene, noise, rng):
    """A scene's picture with some noise, as PNG."""
    pixels = world.draw(scene) + rng.normal(0, 255 * noise, (32, 32, 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(f'{folder}/samples/{name}.png')
    return f'samples/{name}.png'


def make_group(folder, script, step, scene, rng):
    """One opened group of four attempts, the worst first."""
    members = []
    for place in range(4):
        attempt = dict(reward=0.5 + place / 10, adv=(place - 1.5) / 1.1, logp=[-0.1, -3.0])
        if script == 'grpo_encoder':
            attempt.update(caption='red circle', tokens=['red', ' circle'])
        else:
            attempt['image'] = save(folder, f'group_{step:06d}_{place:02d}', scene, 0.2, rng)
        members.append(attempt)
    about = dict(kind='captions')
    if script == 'grpo_decoder':
        about = dict(kind='drawings', caption=world.caption(scene))
    source = save(folder, f'group_{step:06d}', scene, 0, rng)
    append(f'{folder}/groups.jsonl', step=step, source=source, members=members, **about)


def make_run(folder, script, steps=STEPS, watch=8, start=0.0):
    """A run folder as the contract of its files has it; skill goes from `start` up by a third."""
    os.makedirs(f'{folder}/samples')
    rng = np.random.default_rng(len(script))
    for step in steps:
        skill = start + 0.3 * step / max(steps)
        scores = {name: 0.3 + 0.6 * skill + 0.01 * rng.random() for name in MEASURES}
        append(f'{folder}/eval.jsonl', step=step, caption_len=6 + 9 * skill, **scores)
        for row in range(watch):
            scene = world.random_scene(np.random.default_rng(row))
            caption = world.terse(scene, 0.2 + 0.8 * skill, np.random.default_rng(row))
            false = [phrase.strip() for phrase in caption.strip(' .').split(',')][:row % 2]
            append(f'{folder}/samples.jsonl', step=step, row=row, name=f'scene {row}',
                   caption=caption, reward=0.5 + skill / 2, judge=0.4, false=false,
                   truth=world.caption(scene),
                   source=save(folder, f'source_{row:03d}', scene, 0, rng),
                   image=save(folder, f'step_{step:06d}_{row:03d}', scene, 0.4 - skill / 3, rng))
        if step and script != 'cold_start':
            make_group(folder, script, step, scene, rng)
    keys = dict(init_from=f'out/{STAGES[max(0, STAGES.index(script) - 1)]}', lr=1e-4)
    about = dict(script=script, changed=keys, config=dict(keys, steps=max(steps)))
    write(f'{folder}/config.json', json.dumps(about))


def page_of(*folders):
    """The page about some runs, which is written into the last folder."""
    report.main([str(folder) for folder in folders])
    return (folders[-1] / 'report.html').read_text(encoding='utf-8')


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    """A demo folder: three stages of three stops each; one caption is hostile."""
    folder = tmp_path_factory.mktemp('report') / 'demo'
    for place, script in enumerate(STAGES):
        make_run(folder / script, script, start=0.3 * place)
    samples = folder / 'cold_start' / 'samples.jsonl'
    first, *rest = lines(samples)
    first.update(caption=HOSTILE, name=HOSTILE, false=[])
    write(samples, '\n'.join(map(json.dumps, [first, *rest])))
    scores = dict(reward=0.5, judge=0.4, t2i_own=0.5)
    write(folder / 'report.json', json.dumps(dict(
        stages=dict(base=scores, grpo_decoder=scores), ceiling=dict(reward=0.99, t2i=0.997),
        controls=dict(shuffled_reward=dict(reward=0.612)))))
    return folder


@pytest.fixture(scope='module')
def page(demo):
    return page_of(demo)


# --- the page as text -----------------------------------------------------------------------------
def test_the_page_has_what_the_runs_left(demo, page):
    text = html.unescape(re.sub('</?(mark|del)>', '', page))
    for stage in STAGES:
        for line in lines(demo / stage / 'samples.jsonl'):
            caption = line['caption'].replace(' ,', ',').replace(' .', '.')
            assert f'<p class="caption">{caption}</p>' in text
        assert f'<caption>{stage}</caption>' in page
    assert page.count('alt="reconstruction: ') == 3 * 3 * 8
    assert page.count('alt="source: ') == 8                 # each source once, over all stages
    assert page.count('class="members words"') == page.count('class="members drawings"') == 2
    for title in ('Reward and judge', 'Caption length', 'Recall', 'Truth', 't2i'):
        assert f'<h3>{title}' in page
    assert '<td>out/cold_start</td>' in page                # a changed key
    for score in ('0.990', '0.997', '0.612'):               # the table: ceilings and the control
        assert f'<td>{score}</td>' in page
    assert len(page) < 3e6


def test_text_of_runs_is_escaped_and_nothing_is_loaded(page):
    assert HOSTILE not in page and '&lt;script&gt;' in page
    assert page.count('<script>') == 2                      # the page's own
    assert set(re.findall(r' (?:src|href)="([^"]{5})', page)) == {'data:'}
    assert 'http' not in page


def test_groups_are_sorted_and_bars_point_to_their_side(page):
    group = re.search(r'<ol class="members words">.*?</ol>', page, re.S)[0]
    assert re.findall(r'class="reward">([\d.]+)', group) == ['0.80', '0.70', '0.60', '0.50']
    bars = re.findall(r'class="(\w+)" style="(\w+): 50%; width: ([\d.]+)%', group)
    assert bars == [('plus', 'left', '50.0'), ('plus', 'left', '16.7'),
                    ('minus', 'right', '16.7'), ('minus', 'right', '50.0')]
    assert re.findall(r'--shade: (\d+)%', group) == 4 * ['1', '37']


@pytest.mark.parametrize('size, small, shown', [
    ((32, 32), True, (32, 32)), ((512, 384), False, (256, 192))])
def test_small_images_stay_as_they_are_and_large_ones_are_made_small(tmp_path, size, small, shown):
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'photo.png')
    uri, is_small = report.data_uri(tmp_path / 'photo.png')
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix('data:image/webp;base64,'))))
    assert (image.size, is_small) == (shown, small)
    assert len(uri) < 60_000
    assert not small or np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize('before, caption, false, expected', [
    (None, 'red circle .', [], 'red circle.'),
    ('red circle .', 'red circle , blue square .', [], 'red circle, <mark>blue square</mark>.'),
    ('red circle .', 'small red circle .', [], '<mark>small</mark> red circle.'),
    ('red circle .', 'red circle .', ['red circle'], '<del>red circle</del>.'),
    ('', 'red circle , red .', ['red'], '<mark>red circle</mark>, <del><mark>red</mark></del>.'),
    (None, 'a < b', [], 'a &lt; b'),
    ('red', '', [], ''),
])
def test_new_and_false_words(before, caption, false, expected):
    assert report.caption_html(caption, before, false) == expected


# --- what may be missing --------------------------------------------------------------------------
@pytest.fixture
def run(tmp_path):
    make_run(tmp_path / 'grpo_encoder', 'grpo_encoder', steps=(0, 20), watch=2)
    return tmp_path / 'grpo_encoder'


@pytest.mark.parametrize('name, expected', [
    ('config.json', 'it left no config.json'),
    ('eval.jsonl', 'have not evaluated yet'),
    ('samples.jsonl', 'watched no images'),
    ('samples', '>no image<'),
])
def test_a_missing_piece_leaves_the_others(run, name, expected):
    whole = page_of(run)
    (run / name).rename(run / 'elsewhere')
    page = page_of(run)
    assert expected in page and expected not in whole
    assert page.count('<section') == whole.count('<section') == 5
    assert 'grpo_encoder' in page and page.rstrip().endswith('</html>')


def test_an_unfinished_run_says_how_far_it_came_and_what_it_changed(tmp_path):
    scores = [dict(reward=0.5, judge=0.412), dict(), dict(reward=0.5, judge=0.634)]
    for step, line in zip((0, 5, 10), scores):
        append(tmp_path / 'eval.jsonl', step=step, **line)
    write(tmp_path / 'eval.jsonl', '{"step": 40, "rew', 'a')          # a kill cut this line short
    write(tmp_path / 'config.json', json.dumps(dict(config=dict(steps=100))))
    head = ' '.join(page_of(tmp_path).split())
    assert 'unfinished: 10 of 100 updates' in head
    assert '<span class="gains"> judge 0.41 → 0.63 </span>' in head


def test_photos_have_no_truth_and_need_no_judge(run):
    for name in ('samples', 'eval'):
        kept = []
        for line in lines(run / f'{name}.jsonl'):
            wanted = ('step', 'row', 'name', 'caption', 'source', 'image', 'reward', 'caption_len')
            kept.append({key: line[key] for key in wanted if key in line})
        write(run / f'{name}.jsonl', '\n'.join(map(json.dumps, kept)))
    page = page_of(run)
    assert '<h3>Truth' not in page and '<h3>Reward' in page
    assert page.count('<del>') == 1 and '· judge' not in page         # the one is in the legend
    assert 'class="truth"' not in page


@pytest.mark.parametrize('argv, expected', [
    (['tools'], 'tools: no run here'),
    (['nowhere'], 'nowhere: no run here'),
    ([], 'expected a folder'),
    (['out', '--gift=x'], "got '--gift=x'"),
    (['-v'], "got '-v'"),
])
def test_what_is_no_run_gets_one_line(argv, expected):
    assert expected in refusal(report.main, argv)


def test_runs_keep_their_order_and_long_ones_are_thinned(tmp_path):
    folders = [tmp_path / name / 'grpo_decoder' for name in ('b', 'a')]
    for folder in folders:
        os.makedirs(folder)
        for step in range(0, 1000, 5):
            append(folder / 'eval.jsonl', step=step, reward=0.5)
    runs, stops = report.read_runs(list(map(str, folders)))
    assert [run.name for run in runs] == ['grpo_decoder', str(folders[1])]
    for run in runs:
        assert len(run.stops) <= report.MOST_STOPS
        assert (run.stops[0].step, run.stops[-1].step) == (0, 995)
    assert [stop.index for stop in stops] == list(range(len(stops)))
    assert str(folders[1]) in page_of(*folders)


# --- pictures and curves --------------------------------------------------------------------------
def enlarged(path):
    with Image.open(path) as image:
        return np.asarray(image.convert('RGB').resize((96, 96), Image.Resampling.NEAREST), float)


def part(image, left, top):
    return np.asarray(image.convert('RGB').crop((left, top, left + 96, top + 96)), float)


def test_the_gif_has_a_frame_for_every_stop_in_the_colours_of_the_images(demo, tmp_path):
    report.main([str(demo), f'--gif={tmp_path}/loop.gif'])
    assert os.path.getsize(tmp_path / 'loop.gif') <= 1_500_000
    source, frames = enlarged(demo / 'cold_start' / 'samples' / 'source_000.png'), set()
    with Image.open(tmp_path / 'loop.gif') as moving:
        assert moving.n_frames == 9
        for k in range(moving.n_frames):
            moving.seek(k)
            frames.add(moving.convert('RGB').tobytes())
            assert abs(part(moving, 8, 30) - source).mean() < 8
    assert len(frames) == 9


def test_the_sheet_has_each_runs_last_drawings(demo, tmp_path):
    folders = [demo / 'grpo_decoder', demo / 'cold_start']
    report.main([*map(str, folders), f'--png={tmp_path}/sheet.png'])
    with Image.open(tmp_path / 'sheet.png') as sheet:
        for place, folder in enumerate(folders):
            for left, name in ((8, 'source_000'), (112, 'step_000040_000')):
                shown = part(sheet, left, place * sheet.height // 2 + 30)
                assert np.array_equal(shown, enlarged(folder / 'samples' / f'{name}.png'))


@pytest.mark.parametrize('kind', ['gif', 'png'])
def test_no_pictures_of_runs_that_watched_nothing(run, tmp_path, kind):
    os.remove(run / 'samples.jsonl')
    said = refusal(report.main, [str(run), f'--{kind}={tmp_path}/a.{kind}'])
    assert 'no watched images' in said


@pytest.mark.parametrize('content', ['', None])
def test_no_sheet_without_one_of_its_pictures(run, tmp_path, content):
    picture = run / 'samples' / 'step_000020_000.png'
    picture.unlink()
    if content is not None:
        picture.write_text(content)
    assert str(picture) in refusal(report.main, [str(run), f'--png={tmp_path}/a.png'])


def test_a_run_begins_where_the_one_before_it_ended(demo):
    folders = [str(demo / stage) for stage in (*STAGES, 'grpo_encoder')]
    runs, _ = report.read_runs(folders)
    assert [run.start for run in runs] == [0, 40, 80, 40]
    runs, _ = report.read_runs(folders[1:2])
    assert runs[0].start == 0


def test_curves_of_named_fields(tmp_path):
    for name in 'ab':
        (tmp_path / name).mkdir()
        for step in range(3):
            append(tmp_path / name / 'log.jsonl', step=step, reward=step, entropy=-step)
            append(tmp_path / name / 'eval.jsonl', step=step, reward=step, judge=-step)
    folders, sizes = [f'{tmp_path}/a', f'{tmp_path}/b'], []
    for fields in ('entropy,reward+judge', 'entropy,reward,judge'):
        report.main([*folders, f'--curves={fields}'])
        with Image.open(tmp_path / 'b' / 'curves.png') as picture:
            sizes.append(picture.size)
    assert sizes[1][0] == 1.5 * sizes[0][0] and sizes[1][1] == sizes[0][1]
    assert 'measured kl' in refusal(report.main, [*folders, '--curves=kl,reward'])


# --- in a browser ---------------------------------------------------------------------------------
STATE = '''
const seen = selector => [...document.querySelectorAll(selector)].filter(e => e.getClientRects()[0])
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
  broken: [...document.images].filter(e => !e.naturalWidth).length,
  play: document.querySelector('#play').textContent,
  outline: getComputedStyle(document.activeElement).outlineStyle,
  width: document.documentElement.scrollWidth,
  outside: [...document.querySelectorAll('body *')].filter(e =>
    e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.wide')).map(e => e.outerHTML),
}'''


@pytest.fixture(scope='module')
def chromium():
    webdriver = pytest.importorskip('selenium.webdriver')
    binary, driver = shutil.which('chromium'), shutil.which('chromedriver')
    if not binary or not driver:
        pytest.skip('no chromium with its chromedriver on this machine')
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ('headless=new', 'no-sandbox', 'disable-dev-shm-usage', 'hide-scrollbars'):
        options.add_argument(f'--{flag}')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    service = webdriver.ChromeService(executable_path=driver)
    with webdriver.Chrome(options=options, service=service) as browser:
        yield browser


@pytest.fixture
def browser(chromium, demo, page):
    """The page just opened, 1400 pixels wide, light."""
    look(chromium)
    chromium.get(f'file://{demo}/report.html')
    return chromium


def look(browser, width=1400, scheme='light'):
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(
        width=width, height=900, deviceScaleFactor=1, mobile=False))
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(
        features=[dict(name='prefers-color-scheme', value=scheme)]))


def state(browser):
    """What is to be seen, by the browser's own account."""
    return browser.execute_script(STATE)


def slide(browser, stop):
    browser.execute_script('''
        const slider = document.querySelector('#stop')
        slider.value = arguments[0]
        slider.dispatchEvent(new Event('input'))''', stop)
    return state(browser)


def press(browser, key):
    from selenium.webdriver import ActionChains, Keys
    ActionChains(browser).send_keys(getattr(Keys, key)).perform()
    return state(browser)


def click(browser, selector):
    from selenium.webdriver import ActionChains
    element = browser.find_elements('css selector', selector)[1 if 'drawing' in selector else 0]
    browser.execute_script('arguments[0].scrollIntoView({block: "center"})', element)
    ActionChains(browser).move_to_element(element).click().perform()
    return state(browser)


def test_slider_moves_images_captions_groups_and_cursors(browser):
    last = state(browser)
    assert browser.get_log('browser') == [] and last['broken'] == 0
    assert last['bars'] == 1 and last['stop'] == 8
    assert last['where'] == ['grpo_decoder update 40 of 40']
    then = slide(browser, 3)
    assert then['where'] == ['grpo_encoder update 0 of 40']
    for name in ('images', 'captions'):
        assert len(then[name]) == len(last[name]) == 8
        assert then[name] != last[name]
    assert then['cursors'] == [3] * 5 and then['groups'] == [3]
    assert then['marks'] == []                              # the captions of the stop before
    assert len(then['scores']) == 9 and then['scores'] != last['scores']
    assert slide(browser, 4)['marks']
    assert HOSTILE in slide(browser, 0)['captions'][0]
    assert browser.title.startswith('nanoUAE')              # no caption ran as a script


def test_clicks_and_keys_move_the_slider(browser):
    then = click(browser, '.drawing')
    assert then['stop'] == 4                                # the middle of the second stage
    assert then['cursors'] == [4] * 5
    assert click(browser, '#stages button:nth-child(3)')['stop'] == 6
    assert press(browser, 'ARROW_RIGHT')['stop'] == 7
    browser.execute_script('document.querySelector("#stop").focus()')
    then = press(browser, 'ARROW_LEFT')                     # once, not twice, with the focus on it
    assert then['stop'] == 6 and then['outline'] == 'solid'          # the focus is to be seen
    for stop in (7, 8, 8):                                  # the end is the end
        assert press(browser, 'ARROW_RIGHT')['stop'] == stop
    then = click(browser, '#play')
    assert then['stop'] == 0 and then['play'] == 'Pause'
    deadline = time.time() + 10
    while state(browser)['stop'] == 0 and time.time() < deadline:
        time.sleep(0.05)
    assert state(browser)['stop'] > 0
    assert press(browser, 'ARROW_LEFT')['play'] == 'Play'


@pytest.mark.parametrize('width', [400, 1400])
def test_nothing_is_wider_than_the_screen(browser, width):
    look(browser, width)
    for stop in (8, 5, 0):
        then = slide(browser, stop)
        assert then['width'] == width and not then['outside']


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
    assert len(then['scores']) == 9 and len(then['groups']) == 2
