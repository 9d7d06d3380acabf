"Many machines: the plan of all trainings, one by its id, records made elsewhere; with ten thousand records at hand."
import json, re, resource, shutil, subprocess, sys
from pathlib import Path

import pytest

from asamoe.book.grid import RUN, chapter_rows, on_record, planners, trainings
from asamoe.cli import main
from asamoe.core import get_preset, read_sealed, records_dir, runs_dir, write_sealed

ROOT = Path(__file__).resolve().parent.parent
SPARSE = ['--preset', 'smoke', '--only', '26']


def asamoe(capsys, *arguments):
    "(Exit status, what was printed, what was complained about) of a command."
    status = main([*map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err


def planned(capsys): return json.loads(asamoe(capsys, 'plan', '--json', *SPARSE)[1])


def made(folder, run):
    "All that a training left in the data folder, its record without its times."
    files = {p.name: p.read_bytes() for p in (folder/run).iterdir()}
    record = json.loads(files.pop('record.json'))
    return {k: v for k, v in record.items() if k not in ('seconds', 'finished', 'seal')}, files


def test_every_chapter_that_trains_has_a_plan_and_stands_in_it():
    from asamoe.cli import cells, chapters
    plan = re.compile(r'#\| export\n(.*\n)*def plan\(')
    def plans(path): return any(plan.match(''.join(cell['source'])) for cell in cells(path))
    assert set(planners()) == {key for key, path in chapters().items() if plans(path)} - {'9_book/99_reproduce'}
    for key in (key for key in planners() if key.startswith(('2_paper', '3_denoiser'))):
        assert {t.chapter for t in trainings(key, get_preset('smoke'), 'photos')} <= {key}


def test_the_plan_says_what_is_done_and_guesses_from_records_of_the_same_shape(capsys, home):
    rows = planned(capsys)
    assert len(rows) == 10 and not any(row['done'] or row['seconds'] for row in rows)
    assert {'id', 'chapter', 'variant', 'seed', 'config', 'seconds', 'done', 'images', 'visits'} <= rows[0].keys()
    folder = Path('data')/'records'/'2_paper'/'26_sparse'
    committed = sorted(path for path in (ROOT/folder).glob('dense-s*.json') if RUN.fullmatch(path.name))
    (home/folder).mkdir(parents=True)
    for path in committed[:3]: shutil.copy(path, home/folder)
    rates = [r['seconds']/(r['config']['epochs']*r['config']['epoch_images']) for r in map(read_sealed, committed[:3])]
    for row in planned(capsys):
        if row['variant'] != 'dense': assert row['seconds'] is None
        else: assert row['seconds'] == round(sorted(rates)[1]*row['visits'], 1)
    said = asamoe(capsys, 'plan', *SPARSE)[1].splitlines()
    assert len(said) == 12 and 'for 8 of them (?) nothing of their shape' in said[-1]


def test_the_plan_is_kept_until_what_it_follows_from_changes(capsys, home, monkeypatch):
    rows = planned(capsys)
    from asamoe.book import grid
    monkeypatch.setattr(grid, 'trainings', lambda *a: pytest.fail('made anew'))
    assert planned(capsys) == rows
    write_sealed(records_dir()/'2_paper'/'26_sparse'/'choices.json', dict(lr=1))       # what an earlier stage chose
    with pytest.raises(pytest.fail.Exception, match='made anew'): planned(capsys)


def test_train_makes_what_the_chapter_would_and_goes_on(capsys, home, monkeypatch):
    ids = [row['id'] for row in planned(capsys)][:2]
    assert asamoe(capsys, 'train', *ids, *SPARSE)[0] == 0
    assert asamoe(capsys, 'train', ids[0], *SPARSE)[1].startswith(ids[0])                  # there already
    monkeypatch.setenv('ASAMOE_ROOT', str(home/'chapter'))
    for t in trainings('2_paper/26_sparse', get_preset('smoke'), 'photos')[:2]: t.fit(progress=False)
    assert all(made(home/'data'/'runs', id) == made(runs_dir(), id) for id in ids)
    assert asamoe(capsys, 'train', '0123456789ab', *SPARSE)[2].startswith('asamoe: 0123456789ab is not planned')


def test_train_publishes_what_the_chapter_would(capsys, home, monkeypatch):
    from asamoe.training import Training
    asked = []
    monkeypatch.setattr(Training, 'fit', lambda self, publish: asked.append(publish) or pytest.skip.Exception)
    for preset in ('smoke', 'paper'):
        id = chapter_rows('2_paper/26_sparse', get_preset(preset), 'photos')[0]['id']
        with pytest.raises(AttributeError): main(['train', id, '--preset', preset, '--only', '26'])
    assert asked == [False, True]


@pytest.fixture
def there(home, capsys, monkeypatch):
    "The data folder of another machine, which has made one training, published; `home` has nothing yet."
    monkeypatch.setenv('ASAMOE_ROOT', str(home/'there'))
    run = trainings('2_paper/26_sparse', get_preset('smoke'), 'photos')[0].fit(publish=True, progress=False)
    run.measure('answer', lambda model: 42)
    monkeypatch.setenv('ASAMOE_ROOT', str(home))
    return run


def collected(capsys, there): return asamoe(capsys, 'collect', there.published.parents[4], *SPARSE)


def test_collected_it_is_as_if_it_had_been_made_here(capsys, there):
    assert not on_record()
    assert collected(capsys, there)[1].startswith('1 trainings are new here, 0')
    here = trainings('2_paper/26_sparse', get_preset('smoke'), 'photos')[0].found()
    assert here.published.read_bytes() == there.published.read_bytes() and here.published != there.published
    assert here.measure('answer', None) == 42 and here.model() is not None
    assert made(here.folder.parent, here.id) == made(there.folder.parent, here.id)
    assert [row['done'] for row in planned(capsys)] == [True] + [False]*9
    assert collected(capsys, there)[:2] == (0, '0 trainings are new here, 1 were here already.\n')


def altered(path): path.write_text(path.read_text().replace('0.', '0.1', 1))
def renamed(path): path.rename(path.with_name(path.name.replace(path.stem[-12:], '0123456789ab')))
def reseeded(path): r = read_sealed(path); r['config']['seed'] = 7; write_sealed(path, r)
def other_images(path): r = read_sealed(path); r['data']['train_fingerprint'] = 'f'*16; write_sealed(path, r)


@pytest.mark.parametrize('change, says', [(altered, 'was altered'), (renamed, 'named otherwise'),
                                          (reseeded, 'named otherwise'), (other_images, 'named otherwise')])
def test_what_is_not_as_it_says_is_left_out_with_a_sentence(capsys, there, change, says):
    change(there.published)
    shutil.rmtree(there.folder)
    status, out, err = collected(capsys, there)
    assert status == 1 and says in err and '1 files were not taken' in err and not on_record()


def test_damaged_weights_and_unknown_images_are_left_out(capsys, there):
    (there.folder/'weights.safetensors').write_bytes(b'0')
    assert 'is missing or not what its record says' in collected(capsys, there)[2] and not list(runs_dir().glob('*/*'))
    status, _, err = asamoe(capsys, 'collect', there.published.parents[4], '--preset', 'quick', '--only', '26')
    assert status == 1 and 'images that are not known here' in err


def test_a_record_is_never_replaced(capsys, there):
    collected(capsys, there)
    target = records_dir()/'2_paper'/'26_sparse'/there.published.name
    ours = target.read_bytes()
    write_sealed(there.published, there.record | dict(seconds=99.))              # another making, of the same result
    assert collected(capsys, there)[0] == 0
    write_sealed(there.published, there.record | dict(weights_sha256='0'*64))
    status, _, err = collected(capsys, there)
    assert status == 1 and 'with other weights_sha256: ours is kept' in err and target.read_bytes() == ours


def seconds_of(*arguments):
    "Processor seconds of a command of its own process."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, '-m', 'asamoe', *arguments], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
def test_ten_thousand_records_are_no_burden(home):
    from asamoe.book.grid import made_up_records
    made_up_records(10_000)
    (home/'figures').symlink_to(ROOT/'figures')
    assert len(on_record()) == 10_000
    seconds_of('plan', '--preset', 'smoke')                       # images are read, and what follows from them is kept
    assert seconds_of('plan', '--preset', 'smoke') < 5
    assert seconds_of('claims') < 5
