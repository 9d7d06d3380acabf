"What goes wrong outside: altered bytes, signals, kills, two at once, odd names. Nothing is believed, lost or left."
import os, random, shutil, signal, stat, subprocess, sys, time
from pathlib import Path

import pandas as pd, pytest, torch

import asamoe.core as core
from asamoe.cli import Job, alone, cells, chapters, main, run_jobs
from asamoe.core import Chapter, RecordError, accept, atomic_write, committed, faults, get_preset, read_sealed
from asamoe.core import read_sums, records_dir, save_table, seal, sha256, sweep, temporary, write_result, write_sums
from asamoe.data import load_source
from asamoe.denoising import HEADLINE
from asamoe.training import Run, fit

ROOT = Path(__file__).resolve().parent.parent
KINDS = dict(
    record='data/records/2_paper/20_headline/adaptive-s0-????????????.json',
    measurement='data/records/2_paper/20_headline/adaptive-s0-*.measured.json',
    scores='data/records/2_paper/20_headline/adaptive-s0-*.scores-*.csv',
    pictures='data/records/2_paper/20_headline/released-*.pictures-*.png',
    times='data/records/2_paper/24_scaling/scaling.json', claims='data/claims/technical_paper.csv',
    table='figures/2_paper/evaluation.csv', quantities='figures/2_paper/quantities_21_ablations.csv',
    figure='figures/2_paper/figure_robustness.png', verdicts='figures/claims.csv', map='figures/map.csv',
    manifest='figures/manifest.json', weights='asamoe/weights/paper/model.safetensors',
    configuration='asamoe/weights/photo/config.json', card='asamoe/weights/photo/README.md')
TINY = HEADLINE.but(epochs=2, batch_size=16, model_args=dict(embed_dim=16, depth=1))


def test_every_committed_result_is_as_listed():
    assert faults() == []


@pytest.fixture
def house(home):
    "A root with one committed result of each kind."
    for pattern in KINDS.values():
        path = next(ROOT.glob(pattern)).relative_to(ROOT)
        (home/path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/path, home/path)
    write_sums({name: sha256(path) for name, path in committed().items()})
    assert faults() == [] and len(committed()) == len(KINDS)
    return home


def mutations(content, rng):
    "What a bad disk, a quick edit or a torn copy makes of `content`."
    n, digits = len(content), [i for i, byte in enumerate(content) if 48 <= byte < 58]
    for i in (0, n//2, n - 1, *rng.sample(range(n), 2)): yield content[:i] + bytes([content[i] ^ 1]) + content[i + 1:]
    for i in rng.sample(digits, min(4, len(digits))):
        yield content[:i] + bytes([48 + (content[i] - 47) % 10]) + content[i + 1:]
    yield from (content[:-1], content + b' ', b'', content[:n//2], content.replace(b'\n', b'\r\n', 1) + b'\n')


@pytest.mark.parametrize('kind', KINDS)
def test_whatever_is_altered_is_named_with_what_to_do(kind, house):
    path = next(house.glob(KINDS[kind]))
    name, content, found = path.relative_to(house).as_posix(), path.read_bytes(), 0
    for altered in mutations(content, random.Random(kind)):
        path.write_bytes(altered)
        said, = faults()
        assert said.startswith(f'{name} was altered') and 'git checkout' in said and f'--accept {name}' in said
        found += 1
    assert found >= 10
    path.unlink(); assert faults()[0].startswith(f'{name} is missing')
    path.write_bytes(content); assert faults() == []
    stray = path.with_name('stray' + path.suffix); stray.touch()
    assert 'stray' in faults()[0] and 'is not in SHA256SUMS' in faults()[0]


def test_an_altered_list_is_noticed_too(house):
    content = (house/'SHA256SUMS').read_bytes()
    for i in range(0, len(content), 29):
        (house/'SHA256SUMS').write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1:])
        try: assert faults(), f'byte {i}'
        except RecordError as e: assert 'git checkout' in str(e)
    (house/'SHA256SUMS').unlink()
    assert 'There is no SHA256SUMS' in faults()[0]


def test_two_lines_for_one_file_as_a_merge_leaves_them_are_settled_by_accepting(house):
    name = next(iter(committed()))
    with open(house/'SHA256SUMS', 'a') as f: f.write(f'{sha256("other")}  {name}\n')
    assert faults()[0].startswith(name)
    accept(name); assert faults() == [] and read_sums()[name] == sha256(house/name)


def test_the_command_says_what_is_wrong_and_accepts_an_edit(house, capsys, monkeypatch):
    monkeypatch.chdir(house)
    assert main(['verify']) == 0 and 'All 15 committed results' in capsys.readouterr().out
    claims = house/KINDS['claims']
    claims.write_text(claims.read_text().replace('25.12', '25.21', 1))
    assert main(['verify']) == 1
    said = capsys.readouterr()
    assert said.out.startswith(KINDS['claims'] + ' was altered')
    assert '1 of the 15' in said.err and len(said.err.splitlines()) == 1
    assert main(['verify', '--accept', KINDS['claims']]) == 0 and faults() == []
    assert main(['verify', '--accept', 'setup.py']) == 1 and 'none of the committed' in capsys.readouterr().err


def test_what_vouches_for_an_accepted_file_follows(house):
    record, table, figure = (next(house.glob(KINDS[kind])) for kind in ('record', 'scores', 'table'))
    record.write_text(record.read_text().replace('"seconds": ', '"seconds": 1'))
    for path in (table, figure): path.write_text(path.read_text().replace('.', '.0', 1))
    accept(record, table, figure)
    assert faults() == [] and read_sealed(record)['seconds'] > 100
    told = read_sealed(next(house.glob(KINDS['measurement'])))['measured']
    assert sha256(table) in {entry.get('sha256') for entry in told.values()}
    assert core.read_table(house/'figures', '2_paper/evaluation') is not None


def test_publishing_needs_no_accepting(home):
    data = load_source('photos').split(64, 16, 8)
    run = fit(TINY, data, publish=True, progress=False)
    run.measure('n', lambda model: 1); run.table('t', lambda model: pd.DataFrame(dict(a=[1])))
    run.measure('m', lambda model: 2)
    def table(value, preset, out=''):
        chapter = Chapter('2_paper/21_ablations', get_preset(preset), 'ramps', out)
        save_table(chapter, pd.DataFrame(dict(a=[value])), 'table')
    table(1, 'paper'); table(2, 'paper'); table(3, 'smoke')
    assert faults() == [] and len(read_sums()) == 4
    table(4, 'smoke', core.figures_dir())                         # a demonstration in the place of results
    assert 'table.csv was altered' in faults()[0]


@pytest.mark.parametrize('written', [False, True])
def test_a_publication_that_was_killed_half_way_is_completed_or_forgotten(home, written):
    path = write_result(records_dir()/'a.json', 'old')
    (core.runs_dir()/'publishing').write_text(f'{sha256("new")}  data/records/a.json')
    if written: path.write_text('new')
    assert faults() == [] and read_sums()['data/records/a.json'] == sha256('new' if written else 'old')


def test_ten_thousand_records_are_verified_in_seconds(home):
    folder = records_dir()/'2_paper'/'21_ablations'; folder.mkdir(parents=True)
    content = seal(dict(history=[.123456789]*300))
    (folder/'a-s0.json').write_text(content)
    for i in range(1, 10_000): os.link(folder/'a-s0.json', folder/f'a-s{i}.json')
    write_sums(dict.fromkeys(committed(), sha256(content)))
    start = time.process_time()
    assert faults() == [] and time.process_time() - start < 5
    atomic_write(folder/'a-s77.json', '')
    assert len(faults()) == 1


def test_verdicts_are_not_drawn_from_altered_records(house, capsys, monkeypatch):
    (house/'nbs').symlink_to(ROOT/'nbs')
    record = next(house.glob(KINDS['record'])); record.write_text(record.read_text().replace('1', '2', 1))
    monkeypatch.setattr('asamoe.cli.run_in_order', lambda *a: pytest.fail('it started'))
    assert main(['reproduce', '--preset', 'paper', '--only', '90']) == 1
    assert f'{record.name} was altered' in capsys.readouterr().err
    found = cells(chapters()['9_book/90_claims'])
    at = next(i for i, cell in enumerate(found) if 'parameters' in cell['metadata'].get('tags', []))
    assert 'if chapter.publishes: check_committed()' in ''.join(found[at + 1]['source'])


# ---- files

def test_a_renamed_file_is_on_disk_with_its_folder(tmp_path, monkeypatch):
    done, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, 'replace', lambda *a: (done.append('rename'), replace(*a)))
    def synced(fd): done.append('folder' if stat.S_ISDIR(os.fstat(fd).st_mode) else 'file'); fsync(fd)
    monkeypatch.setattr(os, 'fsync', synced)
    atomic_write(tmp_path/'a', 'b')
    assert done == ['file', 'rename', 'folder']


def test_modes_are_the_users(tmp_path):
    def mode(path): return stat.S_IMODE(path.stat().st_mode)
    before = os.umask(0o027)
    try: path = atomic_write(tmp_path/'a', '1')
    finally: os.umask(before)
    assert mode(path) == 0o640
    for kept in (0o600, 0o755):
        path.chmod(kept); atomic_write(path, '2')
        assert mode(path) == kept and path.read_text() == '2'


def test_what_a_killed_process_was_writing_is_swept_away_and_nothing_else(tmp_path):
    code = ('import os, sys, asamoe.core as core; from pathlib import Path\n'
            'core.os.replace = lambda *a: os.kill(os.getpid(), 9)\ncore.atomic_write(Path(sys.argv[1]), "half")')
    subprocess.run([sys.executable, '-c', code, str(tmp_path/'a.csv')])
    left, = tmp_path.iterdir()
    others = [temporary(tmp_path/'b.csv'), tmp_path/'.c.csv.elsewhere-1-01234567.tmp', tmp_path/'.mine.tmp']
    for path in others: path.touch()
    sweep.cache_clear(); atomic_write(tmp_path/'d.csv', 'whole')
    assert set(tmp_path.iterdir()) == {*others, tmp_path/'d.csv'} and left.name.startswith('.a.csv.')


# ---- same bytes

def test_made_now_or_read_from_a_file_is_the_same(home):
    data = load_source('photos').split(64, 16, 8)
    def columns():
        run = fit(TINY, data, publish=True, progress=False)
        return [list(run.history), list(run.measure('x', lambda model: dict(b=1, a=(2,)))), list(run.record)]
    assert columns() == columns()
    assert fit(TINY, data, publish=True).measure('y', lambda model: dict(b=1, a=(2,))) == dict(a=[2], b=1)


def test_threads_are_one_unless_the_configuration_says_otherwise(home):
    data, found = load_source('photos').split(64, 16, 8), []
    for n in (1, 2):
        with core.on_threads(n):
            found.append(fit(TINY, data, progress=False).record)
            assert torch.get_num_threads() == n
        shutil.rmtree(home/'data'/'runs')
    assert [r['hardware']['threads'] for r in found] == [1, 1]
    assert found[0]['weights_sha256'] == found[1]['weights_sha256']
    two = fit(TINY.but(threads=2), data, progress=False)
    assert two.record['hardware']['threads'] == 2 and two.id != found[0]['id'] == Run(TINY.but(threads=1), data).id


@pytest.mark.parametrize('pays', [False, True])
def test_bf16_is_used_where_it_pays_and_the_record_says_which(home, monkeypatch, pays):
    monkeypatch.setattr('asamoe.training.bf16_pays', lambda: pays)
    if not pays: monkeypatch.setattr(torch, 'autocast', None)     # nobody asks for it
    run = fit(TINY.but(precision='bf16', epochs=1), load_source('photos').split(32, 16, 8), progress=False)
    assert run.record['hardware']['precision'] == ('bf16' if pays else 'no')
    assert run.record['config']['precision'] == 'bf16'


def test_a_training_goes_on_in_the_precision_that_it_began_with(home, monkeypatch):
    data, config, stop = load_source('photos').split(32, 16, 8), TINY.but(precision='bf16'), []
    def kept(state, path): stop.append(path); raise KeyboardInterrupt if save(state, path) else None
    import asamoe.training as training
    save = training.save_checked
    monkeypatch.setattr(training, 'bf16_pays', lambda: True)
    monkeypatch.setattr(training, 'save_checked', kept)
    with pytest.raises(KeyboardInterrupt): fit(config, data, progress=False)
    monkeypatch.setattr(training, 'save_checked', save)
    monkeypatch.setattr(training, 'bf16_pays', lambda: False)     # another machine
    assert fit(config, data, progress=False).record['hardware']['precision'] == 'bf16'


def test_whether_bf16_pays_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    measured = []
    monkeypatch.setattr(core, 'bf16_time', lambda: measured.append(1) or .5)
    for _ in range(3): core.bf16_pays.cache_clear(); assert core.bf16_pays()
    assert len(measured) == 1 and list((tmp_path/'asamoe').glob('bf16-*.json'))
    core.bf16_pays.cache_clear()


# ---- ends

def python(*arguments, **kwargs):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGHUP'])
@pytest.mark.parametrize('module, arguments', [('fastcore', ['--version']), ('torch', ['denoise', 'a.png', 'b.png'])])
def test_an_interruption_while_something_is_imported_is_one_sentence(tmp_path, name, module, arguments):
    (tmp_path/module).mkdir()
    code = f'import os, signal, time\nos.kill(os.getpid(), signal.{name})\ntime.sleep(5)'
    (tmp_path/module/'__init__.py').write_text(code)
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    def heard(): [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    done = python('-m', 'asamoe', *arguments, env=environment, preexec_fn=heard)
    assert (done.returncode, done.stderr) == (130, 'asamoe: interrupted.\n')


def test_a_closing_terminal_interrupts_unless_it_is_ignored():
    code = ('import os, signal, sys, time; from asamoe.__main__ import hear; hear()\n'
            'try: os.kill(os.getpid(), signal.SIGHUP); time.sleep(.1); print("goes on")\n'
            'except KeyboardInterrupt: print("ends")')
    def said(how):
        return python('-c', code, preexec_fn=lambda: signal.signal(signal.SIGHUP, how), cwd=ROOT).stdout.strip()
    assert [said(signal.SIG_DFL), said(signal.SIG_IGN)] == ['ends', 'goes on']


def test_killed_it_leaves_no_process_and_the_folder_can_be_used_again(tmp_path, capsys):
    psutil = pytest.importorskip('psutil')
    command = ['reproduce', '--preset', 'smoke', '--only', '21', '--out', str(tmp_path)]
    process = subprocess.Popen([sys.executable, '-m', 'asamoe', *command], stdout=subprocess.DEVNULL)
    children, end = [], time.time() + 120
    while time.time() < end and not any('ipykernel' in ' '.join(c.cmdline()) for c in children if c.is_running()):
        time.sleep(.2); children = psutil.Process(process.pid).children(recursive=True)
    assert main(command) == 1 and 'Another asamoe reproduce is at work' in capsys.readouterr().err
    process.kill(); process.wait()
    gone, alive = psutil.wait_procs(children, timeout=20)
    for p in alive: p.kill()
    assert len(gone) >= 2 and not alive
    assert list((tmp_path/'notebooks'/'.runtime').glob('*.json')), 'how kernels are met lies elsewhere'
    with alone(tmp_path): assert not (tmp_path/'notebooks'/'.runtime').exists()


def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('asamoe.cli.prepare', lambda *a: pytest.fail('it began'))
    (tmp_path/'file').touch()
    for out, says in [(tmp_path/'file', 'Nothing can be written'), (tmp_path/'file'/'in', 'Nothing can be written'),
                      ('/proc/nowhere', 'Nothing can be written'), (tmp_path/'\udcff', 'no valid text')]:
        assert main(['reproduce', '--only', '21', '--out', str(out)]) == 1
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and says in said[0] and '--out' in said[0]


def test_any_name_of_a_folder_will_do(tmp_path):
    import nbformat
    folder = tmp_path/'für {alle} 图 😀 [x] "y" \'z\' 100% $HOME # a'; folder.mkdir()
    kernel, code = dict(name='python3', display_name='Python', language='python'), nbformat.v4.new_code_cell
    nb = nbformat.v4.new_notebook(metadata=dict(kernelspec=kernel))
    nb.cells = [code("out = ''", metadata=dict(tags=['parameters'])), code("open(out + '/made', 'w').close()")]
    nbformat.write(nb, folder/'00 {small}.ipynb')
    job = Job('0_test/00 {small}', folder/'00 {small}.ipynb', folder, dict(out=str(folder)))
    assert run_jobs([job], 1) == [], job.failure()
    assert (folder/'made').exists() and job.copy.exists()


@pytest.mark.slow
def test_the_same_command_twice_gives_the_same_files(home):
    "Trained the first time, read from the runs the second time."
    for name in ('nbs', 'tests'): (home/name).symlink_to(ROOT/name)
    shutil.copytree(ROOT/'data'/'claims', home/'data'/'claims')
    def files():
        done = python('-m', 'asamoe', 'reproduce', '--preset', 'smoke', '--only', '20', '21', '23', '25', cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        return {p.name: sha256(p) for p in (home/'figures'/'smoke').glob('*/*.*') if p.suffix in ('.csv', '.png')}
    first, second = files(), files()
    assert len(first) > 15 and [name for name in first | second if first.get(name) != second.get(name)] == []
