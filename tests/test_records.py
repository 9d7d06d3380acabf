"Every chapter of the paper's part follows, byte for byte, from the committed records: `make test-slow`."
import json, subprocess, sys
from pathlib import Path

import pytest

from asamoe.cli import chapters, makes_figures

FIGURES = Path(__file__).resolve().parent.parent/'figures'
PAPER = [key for key, path in chapters().items() if key.startswith('2_paper/') and makes_figures(path)]
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def rebuilt(tmp_path_factory):
    "The folder of results of all chapters of the part, made anew at preset paper."
    shared = Path(__file__).resolve().parent.parent.parent/'shared'/'data'
    if not shared.exists(): pytest.skip('the reference data (CIFAR-10 subset) is not beside this clone')
    folder = tmp_path_factory.mktemp('rebuilt')
    command = ['reproduce', '--preset', 'paper', '--only', '2_paper', '--out', folder, '--data', shared/'cifar10_subset.npz']
    done = subprocess.run([sys.executable, '-m', 'asamoe', *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize('key', PAPER)
def test_a_chapter_is_rebuilt_byte_for_byte_from_records(key, rebuilt):
    listed = (json.loads((f/'manifest.json').read_text())['chapters'] for f in (FIGURES, rebuilt))
    committed, again = (chapters.get(key, dict(files={})) for chapters in listed)   # what is not begun publishes nothing
    assert set(again['files']) == set(committed['files'])
    differ = [name for name in again['files'] if (rebuilt/name).read_bytes() != (FIGURES/name).read_bytes()]
    assert not differ, f'{differ} do not follow from the records'
