"The explorer in JupyterLab and Voila: it answers whatever is touched, says what is wrong, and serves nobody else."
import io, json, os, re, shutil, socket, struct, subprocess, sys, time, urllib.error, urllib.request, zlib
from types import SimpleNamespace

import numpy as np, pytest
from PIL import Image
from playwright.sync_api import expect

from conftest import ROOT

EXPLORER, CHAPTER = '9_book/91_explorer.ipynb', '0_house/01_look.ipynb'      # a quick one, to run top to bottom


def png(array):
    file = io.BytesIO(); Image.fromarray(array).save(file, 'png')
    return file.getvalue()


def claimed(side):
    "The head of a PNG of `side` x `side` pixels that has none of them."
    parts = b'IHDR' + struct.pack('>2I5B', side, side, 8, 2, 0, 0, 0), b'IDAT'
    chunks = [struct.pack('>I', len(part) - 4) + part + struct.pack('>I', zlib.crc32(part)) for part in parts]
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunks)


def shorten(path):
    "Leave of the chapter at `path` what comes before its first section: the explorer."
    nb = json.loads(path.read_text())
    first = next(i for i, cell in enumerate(nb['cells']) if cell['source'][0].startswith('## '))
    path.write_text(json.dumps(nb | dict(cells=nb['cells'][:first])))


@pytest.fixture(scope='module', params=['lab', 'explore'])
def server(request, tmp_path_factory):
    "A server of a copy of the project: `name`, `port`, `token`."
    folder = tmp_path_factory.mktemp(request.param)
    for name in ('nbs', 'pages/voila', 'data/claims'): shutil.copytree(ROOT/name, folder/name)
    shorten(folder/'nbs'/EXPLORER)
    with socket.socket() as free: free.bind(('127.0.0.1', 0)); port = free.getsockname()[1]
    port_option = [f'--port={port}'] if request.param == 'explore' else []
    options = [] if port_option else ['--no-browser', '--allow-root', f'--port={port}']
    command = [sys.executable, '-m', 'asamoe', request.param, *port_option, '--', *options]
    environment = os.environ | dict(ASAMOE_ROOT=str(folder), JUPYTER_CONFIG_DIR=str(folder/'jupyter'),
                                    JUPYTER_DATA_DIR=str(folder/'data'))
    log = folder/'log'
    with log.open('w') as file: process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        end, token = time.time() + 120, None
        while not (token := re.search(rf'127.0.0.1:{port}/\S*\?token=(\w+)', log.read_text())):
            assert time.time() < end and process.poll() is None, log.read_text()
            time.sleep(.2)
        yield SimpleNamespace(name=request.param, port=port, token=token[1])
    finally:
        process.terminate()
        try: process.wait(20)
        except subprocess.TimeoutExpired: process.kill(); process.wait()


def asked(server, path): return f'http://127.0.0.1:{server.port}/{path}?token={server.token}'


def test_only_this_machine_with_the_token_is_served(server):
    path = f'lab/tree/scratch/{EXPLORER}' if server.name == 'lab' else ''
    def status(path):
        class Stay(urllib.request.HTTPRedirectHandler):
            def redirect_request(self, *args): return None
        try: return urllib.request.build_opener(Stay).open(f'http://127.0.0.1:{server.port}/{path}', timeout=60).status
        except urllib.error.HTTPError as e: return e.code
    for asked_for in (path, 'api/kernels', f'{path}?token=wrong'): assert status(asked_for) in (302, 403), asked_for
    for other in ('127.0.0.2', socket.gethostbyname(socket.gethostname())):
        if other != '127.0.0.1':
            with pytest.raises(OSError): socket.create_connection((other, server.port), 5).close()


def watched(chromium):
    "A page whose errors are kept in `page.faults`."
    page = chromium.new_context(viewport=dict(width=1280, height=900)).new_page()
    page.faults = []
    page.on('console', lambda m: page.faults.append(m.text) if m.type == 'error' else None)
    page.on('pageerror', lambda e: page.faults.append(str(e)))
    page.on('request', lambda r: page.faults.append(f'{r.url} is elsewhere')
            if r.url.startswith('http') and '127.0.0.1' not in r.url else None)
    return page


def run_all(page, server, name):
    "Open the copy of the chapter `name` in JupyterLab, run it top to bottom, save it; its cells of code as saved."
    own = name.split('/')[-1][:2]                                    # a workspace without the other chapters' tabs
    page.goto(asked(server, f'lab/workspaces/{own}/tree/scratch/{name}'), timeout=120_000)
    page.locator('.jp-Notebook-ExecutionIndicator[data-status=idle]').wait_for(timeout=120_000)
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
    code, end = [], time.time() + 180
    while not code or any(not cell['execution_count'] for cell in code):
        assert time.time() < end, f'{name} does not come to its end'
        page.wait_for_timeout(1000)
        page.keyboard.press('Control+s')
        try: answer = urllib.request.urlopen(asked(server, f'api/contents/scratch/{name}'), timeout=60)
        except urllib.error.HTTPError: continue                      # it is being saved
        with answer: code = [cell for cell in json.load(answer)['content']['cells'] if cell['cell_type'] == 'code']
    return code


def test_a_chapter_runs_top_to_bottom(chromium, server):
    if server.name != 'lab': pytest.skip('pages of Voila show one chapter')
    page = watched(chromium)
    outputs = [out for cell in run_all(page, server, CHAPTER) for out in cell['outputs']]
    assert not [out for out in outputs if out['output_type'] == 'error'] and not page.faults
    assert any('image/png' in out.get('data', {}) for out in outputs)
    page.context.close()


@pytest.fixture(scope='module')
def explorer(chromium, server):
    "The page with the explorer, which has answered once."
    page = watched(chromium)
    if server.name == 'lab': run_all(page, server, EXPLORER)
    else: page.goto(asked(server, ''), timeout=120_000)
    page.said, page.picture = page.locator('.widget-html [role=status]'), page.locator('img.widget-image')
    expect(page.said).to_contain_text('Answered in', timeout=120_000)
    yield page
    page.context.close()


def changes(page, act, says):
    "Do `act`: the explorer says `says`, and draws another picture."
    before = page.picture.get_attribute('src')
    act()
    expect(page.picture).not_to_have_attribute('src', before, timeout=20_000)
    expect(page.said).to_contain_text(says, timeout=20_000)


def refuses(page, act, says):
    "Do `act`: the explorer says `says`, in one sentence, and its picture stays."
    before = page.picture.get_attribute('src')
    act()
    expect(page.said).to_contain_text(says, timeout=20_000)
    assert page.picture.get_attribute('src') == before and '\n' not in page.said.inner_text()


def slider(page, name): return page.locator('.widget-slider', has_text=name)


def write(page, name, value):
    slider(page, name).locator('.widget-readout').click()
    page.keyboard.press('Control+a'); page.keyboard.type(value); page.keyboard.press('Enter')


def give(page, name, content):
    button = page.locator('button.jupyter-button', has_text='a picture of yours')
    with page.expect_file_chooser() as chosen: button.click()
    chosen.value.set_files(dict(name=name, mimeType='image/png', buffer=content))


def test_sliders_and_lists_are_answered(explorer):
    handle = slider(explorer, 'noise').locator('.noUi-handle')
    changes(explorer, lambda: handle.press('ArrowRight'), 'Answered in')
    changes(explorer, lambda: write(explorer, 'dead outputs', '3'), 'Answered in')
    for name, value in (('routing', 'top1'), ('tokens', '576'), ('selection', 'blocks'), ('model', 'photo'),
                        ('model', 'paper')):
        choose = explorer.locator('.widget-dropdown', has_text=name).locator('select')
        changes(explorer, lambda: choose.select_option(value), 'Answered in')


def test_a_click_asks_a_token(explorer):
    box = explorer.picture.bounding_box()
    def click(x, y): return lambda: explorer.picture.click(position=dict(x=x*box['width'], y=y*box['height']))
    changes(explorer, click(.15, .2), 'Token in row')                # in the noisy picture
    first = explorer.said.inner_text().split('.')[0]
    changes(explorer, click(.4, .25), 'Token in row')                # in the denoised one
    assert explorer.said.inner_text().split('.')[0] != first


def test_what_is_wrong_is_said_and_it_goes_on(explorer):
    refuses(explorer, lambda: write(explorer, 'keys, cheap', '0'), 'A budget of 0 keys is not possible')
    changes(explorer, lambda: write(explorer, 'keys, cheap', '8'), 'Answered in')
    refuses(explorer, lambda: give(explorer, 'notes.png', b'no picture'), 'notes.png cannot be read as a picture')
    refuses(explorer, lambda: give(explorer, 'huge.png', claimed(20_000)), 'huge.png has more pixels')
    glass = np.full((40, 60, 4), 90, np.uint8)
    changes(explorer, lambda: give(explorer, 'glass.png', png(glass)), 'without its transparency')
    large = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), np.uint8)          # 12 MB
    changes(explorer, lambda: give(explorer, 'large.png', png(large)), 'large.png: its middle is shown')
    assert not explorer.faults, explorer.faults
