"The notebooks are the source: exported, clean, in dependency order, and they run."
import json, os, re, shutil, subprocess, sys
from pathlib import Path

import nbformat, papermill, pandas as pd, pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
TAGS = {p.stem: [t for c in nbformat.read(p, 4).cells for t in c.metadata.get('tags', [])] for p in NOTEBOOKS}
LIBRARY = [p for p in NOTEBOOKS if 'parameters' not in TAGS[p.stem]]


@pytest.mark.parametrize('tool', ['nbdev_export', 'nbdev_clean'])
def test_export_and_clean_change_nothing(tool, tmp_path):
    copy = tmp_path/'asamoe'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.git', '.venv', 'data', 'figures', '__pycache__', '*.egg-info'))
    subprocess.run([Path(sys.executable).parent/tool], cwd=copy, check=True, capture_output=True)
    for folder in ('nbs', 'asamoe'):
        for path in (ROOT/folder).rglob('*'):
            if path.suffix in ('.py', '.ipynb') and '.ipynb_checkpoints' not in path.parts:
                assert (copy/path.relative_to(ROOT)).read_text() == path.read_text(), f'{tool} changes {path.name}: run it and commit'


def test_paper_chapters_have_one_parameters_cell():
    assert {name for name, tags in TAGS.items() if 'parameters' in tags} >= {'01_data', '05_evaluation', '06_ablations', '07_routing', '08_robustness', '09_scaling', '10_diagnosis', '11_claims', '14_sparse'}
    assert all(tags.count('parameters') <= 1 for tags in TAGS.values())


def test_chapters_import_from_lower_numbers_only():
    number = {}
    for path in NOTEBOOKS:
        exported = re.findall(r'#\| default_exp (\w+)', path.read_text())
        number |= {name: int(path.stem[:2]) for name in exported}
    for path in NOTEBOOKS:
        own = re.findall(r'#\| default_exp (\w+)', path.read_text())
        code = '\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'code')
        used = set(re.findall(r'(?:from|import) asamoe\.(\w+)', code)) - set(own)
        assert all(number[module] < int(path.stem[:2]) for module in used), f'{path.name} imports {used}'


@pytest.mark.parametrize('path', LIBRARY, ids=lambda p: p.stem)
def test_library_chapter_runs(path, tmp_path):
    papermill.execute_notebook(str(path), str(tmp_path/path.name), kernel_name='python3', language='python', cwd=str(path.parent), progress_bar=False)


def asamoe(*arguments, **environment):
    return subprocess.run([sys.executable, '-m', 'asamoe.cli', *map(str, arguments)], capture_output=True, text=True, env=os.environ | environment)


def test_reproduce_smoke(tmp_path):
    done = asamoe('reproduce', '--preset', 'smoke', '--out', tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((tmp_path/'manifest.json').read_text())
    files = {f for chapter in manifest['chapters'].values() for f in chapter['files']}
    figures = {'validation_data_pipeline', 'denoising_visualization', 'figure_ablation_study', 'figure_robustness', 'figure_scaling', 'figure_performance', 'figure_sparse_tradeoff', 'routing_heatmap_00', 'routing_heatmap_05', 'routing_summary_correlation', 'figure_diagnosis', 'figure_combined_overview'}
    assert {f'{name}.png' for name in figures} | {'evaluation.csv', 'claims.csv'} <= files
    assert all((tmp_path/f).exists() for f in files)
    settings = manifest['chapters']['05_evaluation']['parameters']
    assert settings['seed'] == '0' and str(tmp_path) not in (tmp_path/'manifest.json').read_text()
    assert 'demonstration' in (tmp_path/'evaluation.csv').read_text()
    claims = pd.read_csv(tmp_path/'claims.csv', keep_default_na=False)                   # chapter 11 ran last and found the others' tables; a demonstration has no verdicts on measured claims
    assert set(claims[claims.data.str.contains('demonstration')].verdict) == {''}


def test_only_replaces_one_chapter_and_a_failure_is_named(tmp_path):
    assert asamoe('reproduce', '--preset', 'smoke', '--only', '01_data', '--out', tmp_path).returncode == 0
    before = json.loads((tmp_path/'manifest.json').read_text())['chapters']
    failed = asamoe('reproduce', '--preset', 'smoke', '--only', '05_evaluation', '--out', tmp_path, '--set', 'sigma=7')
    assert failed.returncode == 1
    assert '05_evaluation failed in cell' in failed.stdout and 'sigma is 7' in failed.stdout
    assert (tmp_path/'notebooks'/'05_evaluation.ipynb').exists()
    after = json.loads((tmp_path/'manifest.json').read_text())['chapters']
    assert after['01_data'] == before['01_data'] and after['05_evaluation']['state'] == 'failed'


@pytest.mark.parametrize('arguments, says', [
    (['reproduce', '--set', 'sgima=0.1'], "no parameter 'sgima'"), (['reproduce', '--only', '42_answer'], 'Unknown chapter'),
    (['reproduce', '--data', 'gone.npz'], 'There is no file'), (['reproduce', '--weights', 'gone.pt'], 'There is no weights file'), (['repro'], 'Unknown command'), (['reproduce', '--jobs', '-1'], '--jobs is -1'),
    (['claims', '--table', '.'], 'cannot be read as a table'), (['claims', '--table', 'figures/scaling.csv'], 'no table of claims'), (['bench', '--reference', 'gone.py'], 'There is no file')])
def test_bad_input_gets_one_sentence(arguments, says):
    done = asamoe(*arguments)
    assert done.returncode == 1 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1
