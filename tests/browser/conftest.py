import os, threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ('--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
         '--disable-component-update --disable-sync').split()


@pytest.fixture(scope='session')
def chromium():
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=os.environ.get('CHROMIUM', '/usr/bin/chromium'), args=FLAGS)
        yield browser
        browser.close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


class Isolated(Quiet):
    "A server that allows threads to share memory."
    def end_headers(self):
        self.send_header('Cross-Origin-Opener-Policy', 'same-origin')
        self.send_header('Cross-Origin-Embedder-Policy', 'require-corp')
        super().end_headers()


def served(handler):
    assert (ROOT/'book'/'html'/'index.html').exists(), 'there are no pages: run make book first'
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(handler, directory=ROOT/'book'))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/html'
    server.shutdown()


@pytest.fixture(scope='session')
def site():
    "The address of the book, served from a sub-folder."
    yield from served(Quiet)


@pytest.fixture(scope='session')
def isolated_site(): yield from served(Isolated)


@pytest.fixture
def open_page(chromium):
    "open_page(address, width, ...): a page whose errors are kept in `page.faults`."
    contexts = []
    def opened(address, width=1280, script='', **options):
        contexts.append(chromium.new_context(viewport=dict(width=width, height=900), **options))
        page = contexts[-1].new_page()
        page.faults = []
        page.set_default_timeout(60_000)                          # a busy machine is slow, not broken
        page.on('console', lambda m: page.faults.append(m.text) if m.type in ('error', 'warning') else None)
        page.on('pageerror', lambda e: page.faults.append(str(e)))
        page.on('request', lambda r: page.faults.append(f'{r.url} is elsewhere')
                if r.url.startswith('http') and '127.0.0.1' not in r.url else None)
        if script: page.add_init_script(script)
        page.goto(address)
        return page
    yield opened
    for context in contexts: context.close()
