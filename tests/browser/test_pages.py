import io

import numpy as np, pytest, torch
from axe_playwright_python.sync_playwright import Axe
from PIL import Image

from conftest import ROOT

PAGES = sorted(str(p.relative_to(ROOT/'book'/'html')) for p in (ROOT/'book'/'html').glob('nbs/**/*.html'))
ITEMS = ('nbs/index.html', 'nbs/claims.html', 'nbs/model.html')


@pytest.mark.parametrize('width', [1280, 390])
def test_every_page_loads(open_page, site, width):
    assert len(PAGES) > 35
    page = open_page(f'{site}/index.html', width)
    for name in PAGES:
        page.goto(f'{site}/{name}', wait_until='load')
        wide, raw, bad = page.evaluate('''[document.documentElement.scrollWidth,
            [...document.querySelectorAll('article p')].map(p => p.textContent).filter(t => /\\|(--|—)/.test(t)),
            [...document.querySelectorAll('article img')]
            .filter(i => !i.alt || i.alt.endsWith('.png') || (i.complete && !i.naturalWidth))
            .map(i => i.outerHTML.slice(0, 200))]''')
        assert wide <= width, f'{name} is {wide} pixels wide'
        assert not raw, f'{name}: a table that is no table: {raw[0][:200]}'
        assert not bad, f'{name}: pictures without a text, or not there: {bad}'
        assert not page.faults, f'{name}: {page.faults}'


def choose(page, name): return page.locator('.filters').get_by_label(name)


def shown(page): return page.locator('#claims tbody tr[id]')


def test_claims_are_filtered_searched_and_sorted(open_page, site):
    page = open_page(f'{site}/nbs/claims.html')
    assert '741 rows' in page.locator('.dt-info').inner_text() and shown(page).count() == 25
    choose(page, 'verdict').select_option('does not hold')
    assert all('does not hold' in text for text in page.locator('#claims tbody .verdict').all_inner_texts())
    choose(page, 'kind').select_option('arithmetic')
    choose(page, 'source').select_option('TECHNICAL_PAPER.md')
    few = page.locator('.dt-info').inner_text()
    assert 'of 741' in few and 0 < int(few.split(' rows')[0].split()[-1]) < 741
    for name in ('verdict', 'kind', 'source'): choose(page, name).select_option('')
    page.get_by_label('Search:').fill('tp-3.1-adaptive-psnr')
    assert shown(page).count() == 2 and page.locator('#tp-3\\.1-adaptive-psnr svg[role=img]').count() == 1
    page.get_by_label('Search:').fill('')
    page.locator('#claims thead th', has_text='paper').click()
    order = page.locator('td[data-name=paper]').evaluate_all('cells => cells.map(c => c.dataset.order)')
    order = [float(v) for v in order if v]
    assert order == sorted(order)
    assert not page.faults


def test_a_claim_leads_to_the_cell_that_computes_it(open_page, site):
    page = open_page(f'{site}/nbs/claims.html#tp-3.1-adaptive-psnr')
    row = page.locator('tr.named')
    assert row.get_attribute('id') == 'tp-3.1-adaptive-psnr' and row.is_visible()
    row.locator('td[data-name="computed in"] a').click()
    page.wait_for_url('**/2_paper/21_ablations.html#cell-*')
    assert page.locator(page.evaluate('"[id=" + location.hash.slice(1) + "]"')).count() == 1


def test_four_questions_take_four_clicks(open_page, site):
    for door, to in {'Is it true?': 'claims', 'What does the router look at?': '22_routing',
                     'Denoise a picture': 'model', 'Where is figure 4?': 'figures'}.items():
        page = open_page(f'{site}/nbs/index.html')
        page.locator('.doors a', has_text=door).click()
        page.wait_for_url(f'**/{to}.html')
    assert page.get_by_text('Figure 4, routing_heatmap_00.png').count() == 1


def test_search_and_figures(open_page, site):
    page = open_page(f'{site}/nbs/search.html?q=robustness'.replace('/nbs/', '/'))
    page.get_by_role('link', name='Robustness').first.wait_for()
    page = open_page(f'{site}/nbs/2_paper/23_robustness.html')
    page.locator('article img').first.click()
    assert page.locator('dialog.figure[open] img').count() == 1
    page.keyboard.press('Escape')
    page.locator('dialog.figure').wait_for(state='hidden')


def test_pages_are_read_from_a_disk(open_page):
    for name in ITEMS:
        page = open_page((ROOT/'book'/'html'/name).as_uri())
        if name.endswith('claims.html'): assert shown(page).count() == 25
        if name.endswith('model.html'): page.get_by_text('serve this folder').wait_for()
        else: assert not page.faults


@pytest.mark.parametrize('theme', ['light', 'dark'])
@pytest.mark.parametrize('name', ITEMS)
def test_nothing_serious_stands_in_the_way_of_anybody(open_page, site, name, theme):
    page = open_page(f'{site}/{name}', color_scheme=theme)
    if name.endswith('model.html'): answered(page)
    found = Axe().run(page).response['violations']
    serious = [(v['id'], [node['html'][:150] for node in v['nodes'][:4]])
               for v in found if v['impact'] in ('serious', 'critical')]
    assert not serious, serious


def answered(page):
    page.get_by_text('ms in this browser').wait_for()
    return page


def model_page(open_page, site, *args): return answered(open_page(f'{site}/nbs/model.html', *args))


@pytest.mark.parametrize('model', ['cifar10', 'paper'])
def test_the_model_in_the_page_is_the_model_of_the_package(open_page, site, model):
    from asamoe.denoiser.pictures import loaded
    page = model_page(open_page, site)
    page.get_by_label('Model').select_option(model)
    page.get_by_label('Noise level').fill('0.15')
    page.wait_for_function(f'lastRun.model === "{model}" && lastRun.sigma === 0.15')
    run = page.evaluate('lastRun')
    noisy, image = (torch.tensor(run[name]).reshape(3, 96, 96) for name in ('noisy', 'image'))
    clean = torch.tensor(page.evaluate('Array.from(clean)')).reshape(3, 96, 96)
    assert 14 < -10*(noisy - clean).square().mean().log10() < 20
    if model == 'cifar10':
        with torch.no_grad(): ours = loaded(model)(noisy[None], .15)[0]
    else:
        tiles = noisy.unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4).reshape(9, 3, 32, 32)
        with torch.no_grad(): ours, routing = loaded(model)(tiles, return_routing=True)
        ours = ours.reshape(3, 3, 3, 32, 32).permute(2, 0, 3, 1, 4).reshape(3, 96, 96)
        assert abs(torch.tensor(run['routing']).reshape(2, 9, 64, 3) - torch.stack(routing)).max() < 1e-3
        assert page.locator('#maps canvas').count() == 6
    assert (image - ours).abs().max() < 1e-3
    assert not page.faults


def picture(mode='RGB', size=(64, 48), color=None):
    out = io.BytesIO()
    Image.new(mode, size, color).save(out, 'PNG')
    return out.getvalue()


def test_bad_input_gets_a_sentence_and_the_page_goes_on(open_page, site):
    page = model_page(open_page, site)
    def give(name, content, told):
        page.locator('#file').set_input_files(dict(name=name, mimeType='image/png', buffer=content))
        page.locator('#message', has_text=told).wait_for()
    give('letter.png', b'Dear reader', 'letter.png is no picture')
    give('huge.png', picture('L', (9000, 9000)), '9000 × 9000 pixels')
    give('glass.png', picture('RGBA', color=(255, 0, 0, 0)), 'laid on white')
    assert np.allclose(page.evaluate('Array.from(clean)'), 1, atol=.01)
    give('fine.png', picture(color=(0, 0, 255)), 'ms in this browser')
    assert 'white' not in page.locator('#message').inner_text()
    assert not page.faults


def test_a_browser_without_webassembly_is_told(open_page, site):
    page = open_page(f'{site}/nbs/model.html', script='delete globalThis.WebAssembly')
    page.get_by_text('no WebAssembly').wait_for()
    page.get_by_label('Noise level').fill('0.4')
    page.locator('figcaption', has_text='noisy: 1').wait_for()


@pytest.mark.parametrize('broken', ['worker.js', 'cifar10.onnx', 'ort-wasm-simd-threaded.wasm'])
def test_a_part_that_does_not_load_is_told_and_asked_for_again(open_page, site, broken):
    page = open_page('about:blank')
    page.route(f'**/{broken}', lambda route: route.abort())
    page.goto(f'{site}/nbs/model.html')
    page.locator('#message', has_text='could not be').wait_for()
    page.unroute(f'**/{broken}')
    page.get_by_label('Noise level').fill('0.3')
    answered(page)


LONGEST_PAUSE = '''async () => {
    let longest = 0, last = performance.now()
    const look = () => { longest = Math.max(longest, performance.now() - last); last = performance.now() }
    const timer = setInterval(look, 5)
    $('sigma').value = .37
    await update()
    clearInterval(timer)
    return [longest, lastRun.sigma, lastRun.ms]
}'''


def test_the_page_is_free_while_the_model_computes(open_page, site):
    page = model_page(open_page, site)
    page.evaluate(LONGEST_PAUSE)                                  # scripts are warm
    page.evaluate("$('sigma').value = .1; update()")
    page.wait_for_function('lastRun.sigma === .1')
    longest, sigma, ms = page.evaluate(LONGEST_PAUSE)
    assert sigma == .37 and longest < ms/2, f'{longest:.0f} of {ms:.0f} ms without an answer'


def test_threads_are_taken_where_a_server_allows_them(open_page, site, isolated_site):
    assert model_page(open_page, site).evaluate('[crossOriginIsolated, lastRun.threads]') == [False, 1]
    page = model_page(open_page, isolated_site)
    isolated, threads = page.evaluate('[crossOriginIsolated, lastRun.threads]')
    assert isolated and threads == page.evaluate('Math.min(4, navigator.hardwareConcurrency)') and not page.faults


@pytest.mark.parametrize('width, pictures', [(1280, 4), (390, 2)])
def test_maps_and_pictures_stand_in_even_rows(open_page, site, width, pictures):
    page = model_page(open_page, site, width)
    page.get_by_label('Model').select_option('paper')
    page.wait_for_function('lastRun.model === "paper"')
    for panels, columns, n in (('#pictures', pictures, 4), ('#maps', 3, 6)):
        rows = page.locator(f'{panels} canvas').evaluate_all(
            'all => all.map(c => c.getBoundingClientRect()).map(r => [r.top, Math.round(r.width)])')
        assert len(rows) == n and len({top for top, _ in rows}) == n//columns and len({w for _, w in rows}) == 1
