"The notebooks are the source: exported, clean, in dependency order, and all of them run, from any folder."
import ast, base64, json, re, shutil, subprocess, sys
from hashlib import sha256
from pathlib import Path

import pytest

from asamoe.cli import Job, cells, chapters, makes_figures, run_jobs

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = chapters()
NOTEBOOKS = CHAPTERS | {'index': ROOT/'nbs'/'index.ipynb'}
BIN = Path(sys.executable).parent
MODULE = {key: re.search(r'#\| default_exp ([\w.]+)', path.read_text()) for key, path in CHAPTERS.items()}
MODULE = {key: found[1] for key, found in MODULE.items() if found}


def text(cell): return ''.join(cell['source'])
def code(path): return [text(cell) for cell in cells(path) if cell['cell_type'] == 'code']
def number(key): return int(key.split('/')[1][:2])
def tags(cell): return cell['metadata'].get('tags', [])
def digest(path): return sha256(path.read_bytes()).hexdigest()


def source_files():
    "Checksums of all that a run must leave as it is."
    paths = [*(ROOT/'nbs').rglob('*'), *(ROOT/'asamoe').rglob('*.py'), *(ROOT/'data'/'records').rglob('*'),
             *(ROOT/'data'/'claims').rglob('*'), *(ROOT/'figures').glob('*_*/*'), ROOT/'README.md']
    return {str(p): digest(p) for p in paths if p.is_file() and '.ipynb_checkpoints' not in p.parts}


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    "A copy of the project's source, with a reader's copies and executed ones in it, which are nobody's source."
    copy = tmp_path_factory.mktemp('tree')/'asamoe'
    ignored = ('.git', '.venv*', 'data', 'figures', 'scratch', 'book', '__pycache__', '*.egg-info', '.ipynb_checkpoints',
               '.pytest_cache', '.hypothesis')
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*ignored))
    stray = (ROOT/'nbs'/'0_house'/'00_core.ipynb').read_text().replace('class AsamoeError', 'class Stray')
    for folder in ('scratch', 'figures/quick/notebooks'):
        (copy/folder/'0_house').mkdir(parents=True)
        (copy/folder/'0_house'/'00_core.ipynb').write_text(stray)
    return copy


@pytest.mark.parametrize('tool', ['nbdev_export', 'nbdev_clean'])
def test_export_and_clean_change_nothing(tool, tree):
    subprocess.run([BIN/tool], cwd=tree, check=True, capture_output=True)
    for folder in ('nbs', 'asamoe'):
        for kind in ('*.py', '*.ipynb'):
            found = {p.relative_to(tree) for p in (tree/folder).rglob(kind)}
            expected = {p.relative_to(ROOT) for p in (ROOT/folder).rglob(kind) if '.ipynb_checkpoints' not in p.parts}
            assert found == expected, f'{tool} makes or misses {found ^ expected}'
            for p in found: assert digest(tree/p) == digest(ROOT/p), f'{tool} changes {p}: run it and commit'


def test_every_notebook_is_a_chapter_of_a_part():
    found = {p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts}
    assert found == set(NOTEBOOKS.values())
    assert len({number(key) for key in CHAPTERS}) == len(CHAPTERS), 'two chapters with one number'
    for key in CHAPTERS: assert number(key)//10 == int(key[0]), f"{key}: the tens digit is the part's"


@pytest.mark.parametrize('key', CHAPTERS)
def test_chapter_has_the_shape_of_its_kind(key):
    found = [i for i, cell in enumerate(cells(CHAPTERS[key])) if 'parameters' in tags(cell)]
    own = set(re.findall(r"^\s*chapter = Chapter\('([^']+)', preset", '\n'.join(code(CHAPTERS[key])), re.M))
    assert own <= {key}, f'{key} saves its results as {own}'
    assert len(found) == 1 if own else len(found) <= 1, f'{key} needs one cell with the tag parameters'
    if found: assert 'check_parameters(' in text(cells(CHAPTERS[key])[found[0] + 1]), f'{key} does not check them'
    if key.startswith('2_paper'): assert found, 'a chapter that tries something has parameters'


def shown_calls(cell):
    "Whether `cell` does nothing but show what is published."
    if cell['cell_type'] != 'code' or 'show_published(' not in text(cell): return False
    calls = [getattr(s, 'value', None) for s in ast.parse(text(cell)).body]
    return all(isinstance(c, ast.Call) and getattr(c.func, 'id', '') in ('show_published', 'show_table') for c in calls)


def test_chapters_open_with_the_published_figure_and_table(monkeypatch):
    import asamoe.look as look
    for key, path in CHAPTERS.items():
        found = cells(path)
        place = next((i for i, cell in enumerate(found) if 'parameters' in tags(cell)), 0)
        opening = [cell for cell in found[:place] if shown_calls(cell)]
        if 'Chapter(' not in '\n'.join(code(path)) or not opening:
            assert not key.startswith(('2_paper', '5_camoxpert/52')), f'{key} does not open with what is published'
            continue
        for cell in opening:
            shown = []
            monkeypatch.setattr('IPython.display.display', shown.append)
            exec(text(cell), vars(look).copy())
            kept = [o['data'] for o in cell['outputs'] if 'data' in o]
            kept = [base64.b64decode(d['image/png']) if 'image/png' in d else ''.join(d['text/html']) for d in kept]
            assert kept == [s.data for s in shown], f'{key}: an older figure or table; run its first cells again'
        if key != '0_house/02_data': assert any('show_table(' in text(cell) for cell in opening), f'{key}: no table'


def test_chapters_import_from_lower_numbers_only():
    number_of = {module: number(key) for key, module in MODULE.items()}
    for key, path in CHAPTERS.items():
        statement = r'^\s*(?:from|import) asamoe\.([\w.]+)(?: import ([\w, ]+))?'
        imported = re.findall(statement, '\n'.join(code(path)), re.M)
        used = {m for module, names in imported for m in (module, *(f'{module}.{n.strip()}' for n in names.split(',')))}
        for module in used & set(number_of) - {MODULE.get(key)}:
            # the last chapter starts what the others are, and imports it where it does
            assert number_of[module] < number(key), f'{key} imports {module}, a later chapter'


def test_nothing_is_wider_than_a_page_and_no_cell_is_a_module():
    for key, path in NOTEBOOKS.items():
        for i, cell in enumerate(cells(path)):
            wide = [line for line in text(cell).splitlines() if len(line) > 120 and 'http' not in line]
            assert not wide, f'{key} cell {i}: {wide[0]}'
            if cell['cell_type'] == 'code':
                assert len(text(cell)) <= 2500, f'{key} cell {i} has {len(text(cell))} characters'
                if '#| export' in text(cell): assert len(text(cell).splitlines()) <= 46, f'{key} cell {i} is too long'
    for path in (ROOT/'asamoe').rglob('*.py'):
        if path.name != '_modidx.py': assert all(len(line) <= 120 for line in path.read_text().splitlines()), path


def links(markdown):
    "Targets of the relative links in `markdown`, outside code."
    plain = re.sub(r'```.*?```|`[^`]*`', '', markdown, flags=re.S)
    return [t for t in re.findall(r'\]\(([^)\s]+)\)', plain) if not re.match(r'[a-z]+:|#', t)]


def test_all_links_lead_somewhere():
    files = [*ROOT.glob('*.md'), ROOT/'data'/'README.md', *(ROOT/'nbs').glob('*.md')]
    pages = [(path, links(path.read_text())) for path in files]
    pages += [(path, links('\n'.join(text(c) for c in cells(path) if c['cell_type'] == 'markdown')))
              for path in NOTEBOOKS.values()]
    broken = [f'{page.relative_to(ROOT)} -> {target}' for page, targets in pages for target in targets
              if not (page.parent/target.split('#')[0]).exists()]
    assert not broken, broken


@pytest.mark.parametrize('page', ['README.md', 'nbs/index.ipynb'])
def test_the_chapters_are_all_listed(page):
    content = (ROOT/page).read_text()                            # of the start page its saved output, too
    missing = [key for key in CHAPTERS if f'{key}.ipynb' not in content]
    assert not missing, f'{page} does not name {missing}' + '; run it and save it'*page.endswith('ipynb')


def test_what_moved_is_where_the_page_says():
    import pkgutil
    for line in (ROOT/'MOVED.md').read_text().splitlines():
        for name in re.findall(r'`(asamoe[.\w]*)`', line.split('|')[-2] if line.startswith('|') else ''):
            assert pkgutil.resolve_name(name) is not None, name


@pytest.fixture(scope='module')
def executed(tmp_path_factory):
    """All chapters run once at preset smoke, two at a time, by plain papermill from another folder than theirs:
    (folder of results, what the command said, {key: what went wrong}, what of the source has changed)."""
    folder, before = tmp_path_factory.mktemp('executed'), source_files()
    command = [sys.executable, '-m', 'asamoe', 'reproduce', '--preset', 'smoke', '--jobs', '2', '--out', str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    said = done.stdout + done.stderr
    wrong = {line.split()[1]: line for line in said.splitlines() if line.startswith(('FAILED', 'not run'))}
    others = [NOTEBOOKS[key] for key in NOTEBOOKS if key == 'index' or not makes_figures(NOTEBOOKS[key])]
    jobs = [Job(p.relative_to(ROOT/'nbs').with_suffix('').as_posix(), p, folder) for p in others]
    wrong |= {job.name: job.failure() for job in run_jobs(jobs, 2)}
    after = source_files()
    return folder, said, wrong, {name for name in before | after if after.get(name) != before.get(name)}


@pytest.mark.parametrize('key', NOTEBOOKS)
def test_chapter_runs_from_another_folder_and_keeps_its_cells(key, executed):
    folder, said, wrong, _ = executed
    assert NOTEBOOKS[key].stem not in wrong, wrong[NOTEBOOKS[key].stem]
    copy = folder/'notebooks'/f'{key}.ipynb'
    assert copy.exists(), said
    kept = [text(c) for c in cells(copy) if 'injected-parameters' not in tags(c)]
    assert kept == [text(c) for c in cells(NOTEBOOKS[key])]


def test_running_leaves_the_source_as_it_was(executed):
    assert executed[3] == set()


def test_reproduce_makes_every_figure_and_a_manifest(executed):
    folder, said, _, _ = executed
    assert 'chapters done' in said, said
    manifest = json.loads((folder/'manifest.json').read_text())
    assert set(manifest['chapters']) == {key for key, path in CHAPTERS.items() if makes_figures(path)}
    files = {f: d for chapter in manifest['chapters'].values() for f, d in chapter['files'].items()}
    figures = {'validation_data_pipeline', 'denoising_visualization', 'figure_ablation_study', 'figure_robustness',
               'figure_scaling', 'figure_performance', 'figure_sparse_tradeoff', 'figure_factorial', 'routing_heatmap_00',
               'routing_heatmap_05', 'routing_summary_correlation', 'figure_diagnosis', 'figure_combined_overview'}
    assert {f'{name}.png' for name in figures} | {'evaluation.csv'} <= {Path(f).name for f in files}
    assert {f for f in files if '/' not in f} == {'claims.csv'}, 'all others are in the folder of their part'
    for f, expected in files.items(): assert digest(folder/f) == expected
    assert manifest['data']['2_paper'] == manifest['data']['9_book'] and 'demonstration' in manifest['data']['2_paper']
    assert manifest['chapters']['2_paper/20_headline']['parameters']['seed'] == '0'
    assert str(folder) not in (folder/'manifest.json').read_text(), 'paths are relative'


def test_demonstrations_say_so_and_give_no_verdicts(executed):
    import pandas as pd
    folder = executed[0]
    assert 'demonstration' in (folder/'2_paper'/'evaluation.csv').read_text()
    claims = pd.read_csv(folder/'claims.csv', keep_default_na=False)        # the last chapter found the others' tables
    assert len(claims) > 700 and set(claims[claims.data.str.contains('demonstration')].verdict) == {''}


def test_only_replaces_one_chapter_and_a_failure_is_named(executed, tmp_path):
    shutil.copytree(executed[0], tmp_path, dirs_exist_ok=True)
    before = json.loads((tmp_path/'manifest.json').read_text())['chapters']
    options = ['--preset', 'smoke', '--only', '07_routing', '--out', str(tmp_path), '--set', 'budgets=[8]']    # its old name
    failed = subprocess.run([sys.executable, '-m', 'asamoe', 'reproduce', *options], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.strip() == 'asamoe: 1 of 1 chapters failed: 22_routing.'
    assert '22_routing failed in cell' in failed.stdout and 'budgets is [8]' in failed.stdout
    after = json.loads((tmp_path/'manifest.json').read_text())['chapters']
    assert after.pop('2_paper/22_routing')['state'] == 'failed'
    assert before.pop('2_paper/22_routing')['state'] == 'done' and after == before
