"The committed tables follow from the committed quantities, and the verdicts from one rule that knows no system."
import inspect, json, re, subprocess, sys
from pathlib import Path

import numpy as np, pandas as pd, pytest

import asamoe.verdicts
from asamoe.book.claims import claims_table, results_block, settings
from asamoe.core import AsamoeError, Chapter, get_preset, quantity, save_quantities
from asamoe.verdicts import FAILS, HOLDS, UNTESTABLE, judge, printed, read_claims, read_quantities

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT/'figures'


@pytest.fixture(scope='module')
def claims(): return read_claims()


@pytest.fixture(scope='module')
def table(claims): return claims_table(claims, read_quantities(FIGURES), settings())


def test_the_committed_table_follows_from_the_committed_quantities(table, claims):
    assert table.to_csv(index=False, float_format='%.6g') == (FIGURES/'claims.csv').read_text()
    assert results_block(table, claims) in (ROOT/'README.md').read_text()


def test_every_tested_row_has_an_interval_and_seeds_or_is_exact(table):
    assert table.id.is_unique and set(table.verdict) == {HOLDS, FAILS, UNTESTABLE}
    assert set(table.consistent) <= {'yes', 'no'}
    tested = table[table.verdict != UNTESTABLE]
    assert len(tested) >= len(table)/2
    exact = tested.note.str.startswith('exact:')
    measured = tested[~exact]
    assert ((measured.ci_low <= measured.reproduced) & (measured.reproduced <= measured.ci_high)).all()
    assert (measured.n_seeds >= 1).all() and tested[exact].reproduced.notna().all()
    assert table[table.consistent == 'no'].note.str.contains('conflicts with|does not follow').all()


def test_the_sources_print_the_numbers_of_their_rows(reference, claims):
    for name, rows in claims.groupby('source'):
        path = reference.parent/'paper'/name
        if not path.exists(): continue
        text, missing = path.read_text().replace('\n', ' '), []
        for row in rows.itertuples():
            plain = row.paper.strip('~+≈')
            shown = plain in text or str(abs(row.value)) in text
            if plain.replace('.', '').isdigit() and not shown: missing.append(row.paper)
        assert not missing, f'{name} does not print {missing}'


def test_the_rule_knows_no_claim_and_no_source(claims):
    code = inspect.getsource(asamoe.verdicts)
    words = set(claims.id) | set(claims.source) | {origin for origin in claims.origin if '.' in origin}
    assert not [word for word in words if word and re.search(rf'\b{re.escape(word)}\b', code)]


TOY = '''id,source,section,statement,paper,value,decimals,unit,kind,origin,judged_by,min_seeds,needs
toy-mse,TOY.md,1,The toy has an error of 0.5.,0.5,0.5,1,MSE,measured,toy.mse,{judge},3,needs three trainings
toy-size,TOY.md,1,The toy has four parameters.,4,4,0,parameters,exact,toy.size,any,,
'''

@pytest.mark.parametrize('judged_by, data, seeds, verdict', [
    ('any', 'photographs (demonstration)', 3, HOLDS), ('any', 'photographs (demonstration)', 2, UNTESTABLE),
    ('stl10-part', 'photographs (demonstration)', 3, ''), ('stl10-part', 'STL-10 at 64 pixels', 3, HOLDS),
    ('stl10', 'STL-10 (5,000 of 100,000 images)', 3, UNTESTABLE), ('camo', 'STL-10', 3, UNTESTABLE)])
def test_a_new_system_needs_one_file_and_its_quantities(tmp_path, judged_by, data, seeds, verdict):
    (tmp_path/'toy.csv').write_text(TOY.format(judge=judged_by))
    chapter = Chapter('8_toys/80_toy', get_preset('smoke'), data, out=tmp_path)
    save_quantities(chapter, [quantity('toy.mse', .52, .48, .55, seeds=seeds), quantity('toy.size', 4)])
    found = read_quantities(tmp_path)
    mse, size = [judge(row, found) for row in read_claims(tmp_path).itertuples()]
    assert (mse['verdict'], size['verdict'], mse['notebook']) == (verdict, HOLDS, '80_toy')
    if verdict == UNTESTABLE: assert mse['note'].endswith('needs three trainings')


@pytest.mark.parametrize('old, new, why', [
    ('judged_by,', 'judges,', 'no column judged_by'), ('parameters,exact', 'parameters,vague', "kind 'vague'"),
    (',any,,', '', 'row 2 has'), ('0.5,0.5,1', '0.5,half,1', 'where a number should stand'),
    ('toy-size', 'toy-mse', 'twice')])
def test_a_damaged_claims_file_says_so_in_one_sentence(tmp_path, old, new, why):
    (tmp_path/'toy.csv').write_text(TOY.format(judge='camo').replace(old, new, 1))
    with pytest.raises(AsamoeError, match=why) as error: read_claims(tmp_path)
    assert 'toy.csv' in str(error.value) and '\n' not in str(error.value)


def test_printed_numbers_are_looked_up(claims):
    assert printed('tp-3.1-standard-psnr') == 15.07 and printed('tp-3.5-sigma-varied') == (.1, .3)
    with pytest.raises(AsamoeError, match='perhaps tp-3.1-standard-psnr'): printed('tp-3.1-standart-psnr')


def test_chapters_type_no_number_that_a_document_prints(claims):
    "PSNR and SSIM of the ablation and the robustness study come from `printed`."
    numbers = set(claims.paper[claims.id.str.match('tp-3.[15]-')]) | {'-0.465'}
    numbers = [n for n in numbers if re.fullmatch(r'\d\d\.\d\d|-?0\.\d{3,4}', n)]
    assert len(numbers) > 18
    for path in (ROOT/'nbs'/'2_paper').glob('*.ipynb'):
        source = '\n'.join(''.join(cell['source']) for cell in json.loads(path.read_text())['cells'])
        typed = [n for n in numbers if re.search(rf'(?<![\w.])-?0?{re.escape(n.lstrip("-0"))}(?!\d)', source)]
        assert not typed, f'{path.name} types {typed}: use printed()'


def test_every_figure_and_table_of_the_documents_has_a_counterpart_or_a_reason():
    items = pd.read_csv(FIGURES/'map.csv', keep_default_na=False)
    assert items.document.nunique() == 5 and not items.duplicated(['document', 'item']).any()
    assert ((items.counterpart != '') | items.note.str.startswith('none')).all()
    missing = [path for path in items.counterpart if path and not (ROOT/path).exists()]
    assert not missing, f'there is no {missing}'


def test_the_map_misses_no_table_of_the_documents(reference):
    items = pd.read_csv(FIGURES/'map.csv', keep_default_na=False)
    for name, rows in items.groupby('document'):
        text = (reference.parent/'paper'/name).read_text()
        tables = len(re.findall(r'^\|[ :|-]+\|$', text, re.M))
        assert rows.item.str.startswith('table').sum() == tables, f'{name} has {tables} tables'
        for figure in set(re.findall(r'\w+\.png', text)):
            assert rows.item.str.contains(figure, regex=False).any(), f'{name} has the figure {figure}'


def test_claims_are_shown_by_word():
    command = [sys.executable, '-m', 'asamoe', 'claims', '--search', 'learned routing']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and 'paper: +2.94 dB' in done.stdout
