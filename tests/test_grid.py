"""Trainings spread by Snakemake, on a real Slurm of this machine: `make test-grid`.

40 trainings run as jobs; ten are killed, and a worker with all that runs on it. Records, weights and histories must be
those of a run without a cluster, byte for byte but for `seconds` and `finished`."""
import json, os, random, re, shutil, subprocess, sys, time
from pathlib import Path

import pytest

from asamoe.core import read_sealed

ROOT = Path(__file__).resolve().parent.parent
TIMES = ('seconds', 'finished')
OPTIONS = ['--preset', 'smoke', '--only', '15', '21', '23', '26']
MANY, KILLED = int(os.environ.get('ASAMOE_GRID_TRAININGS', 40)), int(os.environ.get('ASAMOE_GRID_KILLED', 10))
SLURM = ['--slurm-no-account', '--slurm-status-command', 'squeue', '--slurm-init-seconds-before-status-checks', '3',
         '--seconds-between-status-checks', '3', '--jobs', '12', '--latency-wait', '5']
pytestmark = [pytest.mark.grid, pytest.mark.skipif(not shutil.which('snakemake'), reason='snakemake is not installed')]


def command(*arguments): return [sys.executable, '-m', 'asamoe', *map(str, arguments)]
def environment(root, **more): return os.environ | dict(ASAMOE_ROOT=str(root), OMP_NUM_THREADS='1', **more)


def asamoe(root, *arguments):
    done = subprocess.run(command(*arguments), env=environment(root), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def results(root, id):
    "What a training left: its record without its times, and the bytes of the other files."
    folder = root/'data'/'runs'/id
    record = {name: value for name, value in read_sealed(folder/'record.json').items() if name not in TIMES}
    return record, {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != 'record.json'}


def trainings(root, ids):
    "The processes that train one of `ids` below `root`, {id: process}."
    import psutil
    found = {}
    for process in psutil.process_iter(['cmdline']):
        words = process.info['cmdline'] or []
        if words[1:4] == ['-m', 'asamoe', 'train'] and words[4] in ids:
            try: found |= {words[4]: process} if process.environ().get('ASAMOE_ROOT') == str(root) else {}
            except psutil.Error: pass
    return found


def kill_some(root, ids, many, going):
    "SIGKILL `many` trainings, each at a random moment of its life, as long as `going()`. Returns whom."
    killed, due = set(), {}
    while len(killed) < many and going():
        for id, process in trainings(root, ids - killed).items():
            if time.time() < due.setdefault(id, time.time() + random.uniform(0, 6)): continue
            if process.is_running(): process.kill(); killed.add(id)
            if len(killed) == many: break
        time.sleep(.1)
    return killed


@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
    import slurm
    if slurm.missing(): pytest.fail(f'{slurm.missing()} not found: make test-grid installs slurm-wlm and munge')
    with slurm.Slurm(tmp_path_factory.mktemp('slurm')/'s') as running: yield running


def test_on_slurm_forty_trainings_survive_ten_kills_and_the_loss_of_a_worker(slurm, tmp_path, capsys):
    began, here, there = time.time(), tmp_path/'here', tmp_path/'there'
    ids = [row['id'] for row in json.loads(asamoe(here, 'plan', '--json', *OPTIONS))][:MANY]
    asamoe(here, 'train', *ids, *OPTIONS)
    given = ['grid', *OPTIONS, '--profile', 'slurm', '--']
    own = {name: slurm.environment[name] for name in ('SLURM_CONF', 'PATH')}
    with (tmp_path/'grid.txt').open('w') as out:
        grid = subprocess.Popen(command(*given, *(f'done/{id}' for id in ids), *SLURM), env=environment(there, **own),
                                stdout=out, stderr=out)
    def going(): return grid.poll() is None
    def said(): return (tmp_path/'grid.txt').read_text() + '\n'.join(p.read_text() for p in there.rglob('log/*.txt'))
    try:
        killed = kill_some(there, set(ids), KILLED//2, going)
        slurm.kill_worker('w2'); slurm.start_worker('w2')
        killed |= kill_some(there, set(ids) - killed, KILLED - len(killed), going)
        assert grid.wait(1200) == 0 and len(killed) == KILLED, said()[-4000:]
    finally:
        if going(): grid.kill(); grid.wait(60)
    differ = [id for id in ids if results(here, id) != results(there, id)]
    assert not differ, f'{differ} are not what they are without a cluster'
    with capsys.disabled():
        print(f'\n{len(ids)} trainings as jobs of Slurm on 2 workers, {len(killed)} killed, 1 worker lost: records, '
              f'weights and histories as without a cluster, but for {" and ".join(TIMES)}; {time.time() - began:.0f} s')


def test_the_local_profile_trains_then_makes_the_chapter_and_the_claims(tmp_path):
    for name in ('nbs', 'tests', 'data/claims', 'data/records', 'settings.ini', 'README.md'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).symlink_to(ROOT/name)
    asamoe(tmp_path, 'grid', '--preset', 'smoke', '--only', '20')
    results = tmp_path/'figures'/'smoke'
    assert (results/'2_paper'/'evaluation.csv').exists() and (results/'claims.csv').exists()
    assert '"1 done' not in asamoe(tmp_path, 'plan', '--preset', 'smoke', '--only', '20')


def test_the_profile_of_kubernetes_renders_and_the_workflow_has_no_lint(tmp_path):
    said = asamoe(tmp_path, 'grid', '--preset', 'smoke', '--only', '26', '--profile', 'kubernetes', '--', '--dryrun')
    assert re.search(r'^training +10$', said, re.M) and 'claims' in said
    lint = command('grid', '--preset', 'smoke', '--only', '26', '--', '--lint')
    done = subprocess.run(lint, env=environment(tmp_path), capture_output=True, text=True)
    lints = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip().startswith('* ')]
    assert set(lints) == {'* Specify a conda environment or container for each rule.:'}    # the profile has the image
