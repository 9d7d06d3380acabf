"The committed tables follow from the committed quantities, and the verdicts from one rule that knows no system."
import inspect, json, re, subprocess, sys
from pathlib import Path

import numpy as np, pandas as pd, pytest

import asamoe.verdicts
from asamoe.book.claims import claims_table, results_block, results_of, settings
from asamoe.cli import run_command
from asamoe.core import AsamoeError, Chapter, get_preset, quantity, save_quantities
from asamoe.evaluation import over_trainings
from asamoe.verdicts import DIFFERS, FAILS, HOLDS, SAME, UNDECIDED, UNTESTABLE, judge, judge_run, printed, read_claims
from asamoe.verdicts import read_quantities, runs_of, short_verdict

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT/'figures'


@pytest.fixture(scope='module')
def claims(): return read_claims()


@pytest.fixture(scope='module')
def quantities(): return read_quantities(FIGURES)


@pytest.fixture(scope='module')
def table(claims, quantities): return claims_table(claims, quantities, settings(quantities))


def test_the_committed_table_follows_from_the_committed_quantities(table, claims, quantities):
    assert table.to_csv(index=False, float_format='%.6g') == (FIGURES/'claims.csv').read_text()
    assert results_block(table, claims, quantities) in (ROOT/'README.md').read_text()


def test_the_columns_and_verdicts_are_the_contract(table):
    assert list(table) == ('id source section statement paper unit reproduced ci_low ci_high n_seeds data verdict consistent '
                           'notebook note kind recipe reference quantity').split()
    results = table[~table.kind.isin(['setting', 'text'])].verdict.map(short_verdict)
    assert set(results) <= {HOLDS, 'holds only with k dead outputs', FAILS, UNDECIDED, UNTESTABLE}
    assert set(table.verdict[table.kind == 'setting']) == {SAME, DIFFERS, UNTESTABLE}
    assert set(table.verdict[table.kind == 'text']) == {''}
    assert set(table.recipe) == {'', 'as published', 'repaired'} and (table.recipe[table.kind != 'retraining'] == '').all()
    assert table.id.is_unique and (table.quantity != '').all() and set(table.consistent) == {'yes', 'no'}


def test_every_tested_row_has_an_interval_or_is_exact(table):
    tested = table[~table.verdict.isin(['', UNTESTABLE])]
    assert len(tested) >= .6*len(table)
    exact = tested.note.str.startswith('exact:')
    measured = tested[~exact]
    assert (measured.ci_low.notna() & (measured.ci_low <= measured.reproduced)).all()
    assert (measured.reproduced <= measured.ci_high).all() and (measured.n_seeds >= 1).all()
    assert tested[exact].ci_low.isna().all() and (tested.reference != '').all()
    assert table[table.consistent == 'no'].note.str.contains('conflicts with|does not follow').all()


def test_a_wide_reference_never_holds(table, claims):
    holds = table[table.verdict.str.startswith(HOLDS) & table.ci_low.notna()]
    assert len(holds) > 50
    assert (holds.ci_high - holds.ci_low <= 2*claims.margin[holds.index]).all()
    undecided = table[table.verdict == UNDECIDED]
    assert undecided.note.str.contains('would decide it|would not narrow it|isolates it|is nearer').all()


def test_of_two_numbers_for_one_quantity_at_most_one_holds(table, claims):
    good = table.verdict.str.startswith(HOLDS) & table.ci_low.notna()
    rows = claims.loc[table.index[good]].dropna(subset='value')
    for _, same in rows.groupby('quantity'): assert np.ptp(same.value) <= same.tolerance.max()


def test_swapped_columns_and_another_models_number_do_not_hold(claims, quantities):
    columns = claims[claims.origin.str.fullmatch(r'robustness\.(fixed|varied)\.\d\.\d\d\.(psnr|ssim)')]
    columns = columns.drop_duplicates(['origin', 'value'])
    swap = {'fixed': 'varied', 'varied': 'fixed'}
    swapped = columns.origin.str.replace(r'\b(fixed|varied)\b', lambda m: swap[m[0]], regex=True)
    verdicts = [judge(row, quantities)['verdict'] for row in columns.assign(origin=swapped).itertuples()]
    assert len(verdicts) == 36 and verdicts.count(HOLDS) <= 6
    standard = claims[claims.id == 'tp-3.1-standard-psnr']
    other, = [judge(row, quantities) for row in standard.assign(value=printed('tp-3.1-nonadaptive-psnr')).itertuples()]
    assert other['verdict'] != HOLDS


def test_a_published_run_is_judged_by_its_kind(claims, quantities):
    row, = claims[claims.id == 'tp-3.1-adaptive-psnr'].itertuples()
    found = judge_run(row, runs_of(quantities[row.origin]))
    assert found['verdict'] == FAILS and found['ci_low'] > 22.8 and 'with 0 dead outputs' in found['reference']


def test_no_interval_reaches_impossible_values(table, quantities):
    limits = {'MSE': (0, np.inf), 'SSIM': (-1, 1), '%': (0, 400), 'correlation': (-1, 1), 'share': (0, 1)}
    for unit, (low, high) in limits.items():
        rows = table[(table.unit == unit) & table.ci_low.notna()]
        assert len(rows) and rows.ci_low.min() >= low and rows.ci_high.max() <= high
    for name, q in quantities.items():
        if 'dead_outputs' in name or '_loss.' in name: assert q['ci_low'] >= 0, name


def test_statements_have_a_control_or_no_verdict(table, claims):
    rows = claims[(claims.kind == 'retraining') & (claims.test != '') & (claims.control == '')]
    assert len(rows) and set(table.verdict[rows.index]) <= {UNDECIDED, UNTESTABLE}
    assert not claims.test[claims.kind == 'retraining'].isin(['> 0.9', '< 1.05', '> 5', '< 5']).any()


def test_results_are_counted_once(table):
    results = results_of(table)
    assert not results.duplicated(['quantity', 'verdict']).any() and not results.kind.isin(['setting', 'text']).any()
    assert (results.quantity == 'released.psnr.mean').sum() == 1
    assert (table.quantity == 'released.psnr.mean').sum() > 5


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


TOY = '''id,source,section,statement,paper,value,decimals,unit,kind,origin,judged_by,tolerance,margin,needs
toy-mse,TOY.md,1,The toy has an error of 0.5.,0.5,0.5,1,MSE,retraining,toy.mse,{judge},.05,.1,needs three trainings
toy-size,TOY.md,1,The toy has four parameters.,4,4,0,parameters,arithmetic,toy.size,any,,,
'''

@pytest.mark.parametrize('judged_by, data, errors, verdict', [
    ('any', 'photographs (demonstration)', [.52, .53, .51], HOLDS),
    ('any', 'photographs (demonstration)', [.52, .53], UNDECIDED), ('any', 'STL-10', [.52, .12, .93], UNDECIDED),
    ('stl10-part', 'photographs (demonstration)', [.52, .53, .51], ''),
    ('stl10-part', 'STL-10 at 64 pixels', [.52, .53, .51], HOLDS), ('stl10', 'STL-10', [.72, .73, .71], FAILS),
    ('stl10', 'STL-10 (5,000 of 100,000 images)', [.52, .53, .51], UNTESTABLE),
    ('camo', 'STL-10', [.52, .53, .51], UNTESTABLE)])
def test_a_new_system_needs_one_file_and_its_quantities(tmp_path, judged_by, data, errors, verdict):
    (tmp_path/'toy.csv').write_text(TOY.format(judge=judged_by))
    chapter = Chapter('8_toys/80_toy', get_preset('smoke'), data, out=tmp_path)
    save_quantities(chapter, [over_trainings('toy.mse', errors), quantity('toy.size', 4)])
    found = read_quantities(tmp_path)
    mse, size = [judge(row, found) for row in read_claims(tmp_path).itertuples()]
    assert (mse['verdict'], size['verdict'], mse['notebook']) == (verdict, HOLDS, '80_toy')
    if verdict == UNTESTABLE: assert mse['note'].endswith('needs three trainings')


@pytest.mark.parametrize('old, new, why', [
    ('judged_by,', 'judges,', 'no column judged_by'), ('parameters,arithmetic', 'parameters,vague', "kind 'vague'"),
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


def test_a_row_is_followed_back_to_its_records(capsys):
    assert run_command('check', ['tp-3.1-adaptive-psnr']) == 0
    told = capsys.readouterr().out
    for words in ('verdict: does not hold', 'one more run with 0 dead outputs', 'tolerance 0.1, margin 0.5 dB', '[==]'):
        assert words in told
    files = re.findall(r'data/records/\S+\.json', told)
    assert len(files) >= 5 and all((ROOT/path).exists() for path in files)
    for claim, why in [('tp-3.1-adaptive-psnt', 'perhaps tp-3.1-adaptive-psnr'), ('', 'No claim has the id')]:
        assert run_command('check', [claim]) == 1
        wrong = capsys.readouterr().err
        assert why in wrong and len(wrong.splitlines()) == 1
