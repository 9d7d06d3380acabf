"The command line: what is asked for is checked first, failures are named, and nothing is left running."
import os, re, signal, socket, subprocess, sys, time
import urllib.request
from pathlib import Path

import pytest

from asamoe.cli import main, reading_copy

ROOT = Path(__file__).resolve().parent.parent


def asamoe(*arguments, **kwargs):
    command = [sys.executable, '-m', 'asamoe', *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize('arguments, says', [
    (['reproduce', '--set', 'sgima=0.1'], "no parameter 'sgima'"),
    (['reproduce', '--set', 'sigma=loud'], "sigma is 'loud'"),
    (['reproduce', '--set', 'sigma'], 'name=value'),
    (['reproduce', '--set', 'out=elsewhere'], 'an option of its own'),
    (['reproduce', '--only', '42_answer'], 'Unknown chapter'),
    (['reproduce', '--only', '00_core'], 'no figures or tables'),
    (['reproduce', '--data', 'gone.npz'], 'There is no file'),
    (['reproduce', '--data', 'nopart=photos'], 'Unknown part'),
    (['reproduce', '--weights', 'gone.pt'], 'There is no weights file'),
    (['reproduce', '--preset', 'papers'], 'Unknown preset'),
    (['reproduce', '--jobs', '-1'], '--jobs is -1'),
    (['repro'], 'Unknown command'),
    (['claims', '--table', '.'], 'is no file but a folder'),
    (['claims', '--table', 'settings.ini'], 'no table of claims'),
    (['claims', '--verdict', 'maybe'], 'Unknown verdict'),
    (['bench', '--reference', 'gone.py'], 'There is no file')])
def test_bad_input_gets_one_sentence(arguments, says, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    status, said = main(arguments), capsys.readouterr().err.strip().splitlines()
    assert status == 1 and len(said) == 1 and said[0].startswith('asamoe: ') and says in said[0]


def test_the_status_is_that_of_the_process():
    done = asamoe('repro')
    assert done.returncode == 1 and done.stdout == '' and done.stderr.startswith('asamoe: Unknown command')
    assert asamoe('--version').stdout.startswith('asamoe 0.') and asamoe().returncode == 2


def test_an_altered_table_of_claims_is_noticed(tmp_path):
    table = (ROOT/'figures'/'claims.csv').read_text()
    (tmp_path/'claims.csv').write_text(table.replace('25.12', '25.21', 1))
    (tmp_path/'manifest.json').write_text((ROOT/'figures'/'manifest.json').read_text())
    done = asamoe('claims', '--table', tmp_path/'claims.csv')
    assert done.returncode == 1 and 'was altered' in done.stderr


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_no_process(number, tmp_path):
    psutil = pytest.importorskip('psutil')
    command = ['-m', 'asamoe', 'reproduce', '--preset', 'smoke', '--only', '21', '22', '--out', str(tmp_path)]
    def heard(): signal.signal(signal.SIGINT, signal.SIG_DFL)     # the background jobs of a shell are deaf to it
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=heard)
    children, end = [], time.time() + 120
    while time.time() < end and sum('ipykernel' in ' '.join(c.cmdline()) for c in children if c.is_running()) < 2:
        time.sleep(.2); children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)                                   # two chapters with their kernels run by now
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and 'Interrupted: what was computed is kept' in err
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert len(gone) >= 4 and not alive


def test_the_lab_serves_the_whole_project_on_copies_and_without_news(tmp_path):
    pytest.importorskip('jupyterlab')
    for name in ('nbs/0_house/00_core.ipynb', 'nbs/index.ipynb', 'figures/claims.csv'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_bytes((ROOT/name).read_bytes())
    with socket.socket() as free: free.bind(('127.0.0.1', 0)); port = free.getsockname()[1]
    options = ['--no-browser', '--allow-root', '--IdentityProvider.token=t', f'--port={port}']
    environment = os.environ | dict(ASAMOE_ROOT=str(tmp_path), JUPYTER_CONFIG_DIR=str(tmp_path/'jupyter'))
    process = subprocess.Popen([sys.executable, '-m', 'asamoe', 'lab', '--', *options], env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    def get(path): return urllib.request.urlopen(f'http://127.0.0.1:{port}/{path}?token=t', timeout=60).read()
    try:
        end = time.time() + 120
        while True:
            try: page = get('lab/tree/scratch/index.ipynb').decode(); break
            except OSError:
                assert time.time() < end and process.poll() is None
                time.sleep(.5)
        assert re.search(r'"disabledExtensions": \[[^]]*apputils-extension:announcements', page), 'it offers news'
        assert get('files/scratch/0_house/00_core.ipynb').decode() == reading_copy(ROOT/'nbs'/'0_house'/'00_core.ipynb')
        assert get('files/figures/claims.csv') == (ROOT/'figures'/'claims.csv').read_bytes()
    finally:
        process.terminate(); process.wait(20)
