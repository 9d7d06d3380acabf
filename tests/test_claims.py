"The committed tables follow from the committed quantities and records, and the verdicts from the rule."
import subprocess, sys
from pathlib import Path

import numpy as np, pandas as pd, pytest

from asamoe.claims import FAILS, HOLDS, UNTESTABLE, claims_table, read_claims, read_quantities, results_block, settings

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT/'figures'


@pytest.fixture(scope='module')
def table(): return claims_table(read_claims(), read_quantities(FIGURES), settings())


def test_the_committed_table_follows_from_the_committed_quantities(table, tmp_path):
    table.to_csv(tmp_path/'claims.csv', index=False, float_format='%.6g')
    assert (tmp_path/'claims.csv').read_text() == (FIGURES/'claims.csv').read_text()
    assert results_block(table, read_claims()) in (ROOT/'README.md').read_text()


def test_every_tested_row_has_an_interval_and_seeds_or_is_exact(table):
    assert table.id.is_unique and set(table.verdict) == {HOLDS, FAILS, UNTESTABLE} and set(table.consistent) <= {'yes', 'no'}
    tested = table[table.verdict != UNTESTABLE]
    assert len(tested) >= len(table)/2
    exact = tested.note.str.startswith('exact:')
    measured = tested[~exact]
    assert ((measured.ci_low <= measured.reproduced) & (measured.reproduced <= measured.ci_high)).all() and (measured.n_seeds >= 1).all()
    assert tested[exact].reproduced.notna().all()
    assert table[table.consistent == 'no'].note.str.contains('conflicts with|does not follow').all()


def test_the_papers_numbers_appear_as_printed(reference):
    for name, claims in read_claims().groupby('source'):
        path = reference.parent/'paper'/name
        if not path.exists(): continue
        text = path.read_text().replace('\n', ' ')
        missing = [c.paper for c in claims.itertuples() if c.paper.strip('~+≈').replace('.', '').isdigit() and c.paper.strip('~+≈') not in text and str(abs(c.value)) not in text]
        assert not missing, f'{name} does not print {missing}'


@pytest.mark.parametrize('chapter, tables', [('08_robustness', ['robustness.csv', 'robustness_gains.csv', 'quantities_08_robustness.csv'])])
def test_a_chapter_is_rebuilt_from_the_committed_records(reference, tmp_path, chapter, tables):
    done = subprocess.run([sys.executable, '-m', 'asamoe.cli', 'reproduce', '--preset', 'paper', '--data', reference/'cifar10_subset.npz', '--only', chapter, '--out', tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in tables: assert (tmp_path/name).read_text() == (FIGURES/name).read_text()


def test_claims_are_shown_by_word():
    done = subprocess.run([sys.executable, '-m', 'asamoe.cli', 'claims', '--search', 'learned routing'], capture_output=True, text=True)
    assert done.returncode == 0 and 'paper: +2.94 dB' in done.stdout
