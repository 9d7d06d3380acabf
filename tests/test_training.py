"Runs: same bytes twice, after a kill, from two processes at once, and on two ranks."
import json, os, random, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import pytest

from asamoe.core import AsamoeError, RecordError, atomic_write, read_sealed, records_dir, runs_dir
from asamoe.data import load_source
from asamoe.denoising import HEADLINE, Denoising
from asamoe.training import config_of, fit, images_seen, run_id

SCRIPT = '''
import sys, torch
torch.set_num_threads(1)
from asamoe.data import Source, image_set
from asamoe.denoising import HEADLINE
from asamoe.training import fit
import numpy as np
x = np.random.default_rng(0).integers(0, 256, (72, 3, 32, 32), dtype=np.uint8)
data = Source('random', image_set(x), image_set(x[:8])).split(64, 8, 8)
config = HEADLINE.but(epochs=6, batch_size=16, model_args=dict(embed_dim=32, depth=1, num_heads=2))
run = fit(config, data, progress=False)
from accelerate import PartialState
print(run.record["weights_sha256"], run.record["hardware"]["processes"])
'''


def start(home, *launcher, script=SCRIPT):
    path = home/'train.py'
    path.write_text(script)
    environment = os.environ | dict(ASAMOE_ROOT=str(home), OMP_NUM_THREADS='1')
    return subprocess.Popen([sys.executable, *launcher, str(path)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def result(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out.split()[-2:]


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    home = tmp_path_factory.mktemp('undisturbed')
    weights = result(start(home))[0]
    return weights, json.loads(next((home/'data'/'runs').glob('*/record.json')).read_text())


def test_same_seed_same_bytes_from_two_processes_at_once(tmp_path, undisturbed):
    processes = [start(tmp_path) for _ in range(2)]
    assert {result(p)[0] for p in processes} == {undisturbed[0]}
    assert len(list((tmp_path/'data'/'runs').glob('*/weights.safetensors'))) == 1


@pytest.mark.parametrize('epochs_seen', [0, 3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5))])
def test_killed_and_started_again_gives_the_same_bytes(tmp_path, undisturbed, epochs_seen):
    "SIGKILL a random moment after the n-th checkpoint was written."
    process, deadline, seen, last = start(tmp_path), time.time() + 120, 0, None
    while process.poll() is None and time.time() < deadline and seen < epochs_seen:
        stamp = [p.stat().st_mtime_ns for p in tmp_path.glob('data/runs/*/checkpoint')]
        if stamp and stamp != last: last, seen = stamp, seen + 1
        time.sleep(.001)
    time.sleep(random.uniform(0, .05) + (2 if not epochs_seen else 0))
    process.send_signal(signal.SIGKILL); process.wait()
    assert result(start(tmp_path))[0] == undisturbed[0]


def torchrun(n):
    return '-m', 'torch.distributed.run', f'--nproc_per_node={n}', '--master_port', str(random.randint(20_000, 60_000))


def same_curve(home, processes, undisturbed):
    "Whether the training below `home` ran on so many processes and came to what one comes to."
    record = json.loads(next((home/'data'/'runs').glob('*/record.json')).read_text())
    assert record['hardware']['processes'] == processes
    for key in ('train_loss', 'val_mse'):
        assert max(abs(a[key] - b[key]) for a, b in zip(record['history'], undisturbed[1]['history'])) < 1e-4


@pytest.mark.parametrize('processes', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_torchrun_with_several_processes_gives_the_same_curve(tmp_path, undisturbed, processes):
    assert int(result(start(tmp_path, *torchrun(processes)))[1]) == processes
    same_curve(tmp_path, processes, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize('processes', [2, 4])
def test_one_process_of_several_is_killed_and_the_training_goes_on(tmp_path, undisturbed, processes):
    psutil = pytest.importorskip('psutil')
    launched, deadline = start(tmp_path, *torchrun(processes)), time.time() + 120
    launcher, ranks = psutil.Process(launched.pid), []
    while len(ranks) < processes and time.time() < deadline: ranks = launcher.children(); time.sleep(.1)
    while not list(tmp_path.glob('data/runs/*/checkpoint')) and time.time() < deadline: time.sleep(.001)
    ranks[-1].kill()                                              # torchrun then ends the others
    launched.communicate(timeout=120)
    assert launched.returncode and not list(tmp_path.glob('data/runs/*/record.json'))
    result(start(tmp_path, *torchrun(processes)))
    same_curve(tmp_path, processes, undisturbed)


@pytest.mark.slow
def test_a_notebook_launches_two_processes(tmp_path, undisturbed):
    def indented(code): return ''.join(f'    {line}\n' for line in code.splitlines())
    launch = 'from accelerate import notebook_launcher\nnotebook_launcher(train, num_processes=2, use_port="{}")\n'
    script = f'def train():\n{indented(SCRIPT)}\n{launch.format(random.randint(20_000, 60_000))}'
    assert int(result(start(tmp_path, script=script))[1]) == 2
    same_curve(tmp_path, 2, undisturbed)


TINY = HEADLINE.but(epochs=2, batch_size=16, model_args=dict(embed_dim=16, depth=1))


@pytest.fixture
def data(): return load_source('photos').split(64, 16, 8)


def test_what_a_network_draws_follows_from_its_seed_too(home, data, monkeypatch):
    "Top-1 routing draws in training: not from what the process has drawn before, and the same after a kill."
    import torch
    from asamoe import training
    config = TINY.but(model_args=TINY.model_args | dict(routing='top1', shared_keys=True))
    found, save = [], training.save_checked
    def saved_then_killed(*a): save(*a); raise KeyboardInterrupt
    for seed in (1, 2):
        monkeypatch.setenv('ASAMOE_ROOT', str(home/f'{seed}'))
        torch.manual_seed(seed)
        if seed == 2:
            monkeypatch.setattr(training, 'save_checked', saved_then_killed)
            with pytest.raises(KeyboardInterrupt): fit(config, data, progress=False)
            monkeypatch.setattr(training, 'save_checked', save)
        found.append(fit(config, data, progress=False).record['weights_sha256'])
    assert found[0] == found[1]


@pytest.mark.parametrize('damage', ['weights.safetensors', 'record.json'])
def test_a_damaged_run_is_set_aside_and_trained_anew(home, data, damage):
    run = fit(TINY, data, progress=False)
    (run.folder/damage).write_bytes(b'\0'*10)
    assert fit(TINY, data, progress=False).record['weights_sha256'] == run.record['weights_sha256']
    assert list(runs_dir().glob('*.aside-1'))


def test_records_stand_in_for_weights_and_retraining_ignores_them(home, data):
    run = fit(TINY, data, publish=True, progress=False)
    assert run.measure('n', lambda model: 1) == 1
    import shutil; shutil.rmtree(run.folder)
    again = fit(TINY, data, publish=True, progress=False)
    assert again.measure('n', lambda model: 2) == 1 and not run.folder.exists()
    with pytest.raises(AsamoeError, match='--retrain'): again.measure('new', lambda model: 2)
    assert fit(TINY, data, publish=True, retrain='2000-01-01T00:00:00Z', progress=False).folder.exists()


def test_a_training_starts_from_the_weights_of_another_or_says_what_is_missing(home, data):
    first = fit(TINY, data, publish=True, progress=False)
    still = fit(TINY.but(start=first.id, lr=1e-12), data, progress=False)
    weights, same = first.model().state_dict(), still.model().state_dict()
    assert all((weights[name] - same[name]).abs().max() < 1e-6 for name in weights)
    assert images_seen(still.record) == 2*images_seen(first.record)
    (first.folder/'weights.safetensors').unlink()
    with pytest.raises(AsamoeError, match=f'weights of run {first.id} are not here'):
        fit(TINY.but(start=first.id), data, progress=False)
    with pytest.raises(AsamoeError, match='no run gone'): fit(TINY.but(start='gone'), data, progress=False)


def test_a_loss_that_is_no_number_names_the_batch_and_keeps_the_checkpoint(home, data, monkeypatch):
    honest, calls = Denoising.loss, []
    def poisoned(*a):
        calls.append(1)
        losses = honest(*a)
        return losses | dict(train_loss=losses['train_loss']*float('nan')) if len(calls) == 7 else losses
    monkeypatch.setattr(Denoising, 'loss', poisoned)
    with pytest.raises(AsamoeError, match=r'epoch 2, batch 3'): fit(TINY, data, progress=False)
    assert next(runs_dir().glob('*/checkpoint')).exists()


def test_a_full_disk_is_said_and_loses_nothing(tmp_path):
    path = atomic_write(tmp_path/'file', 'old')
    code = ("import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            f"from asamoe.core import atomic_write, AsamoeError\n"
            f"try: atomic_write({str(path)!r}, 'x'*5000)\nexcept AsamoeError as e: print(e)")
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout
    assert 'the disk is full' in said and path.read_text() == 'old' and len(list(tmp_path.iterdir())) == 1


def test_every_record_keeps_its_identity_and_is_whole():
    "What a run is called follows from its configuration and data; the first edition's identities are listed."
    found = {}
    for path in records_dir().rglob('*-????????????.json'):
        record = read_sealed(path)
        part = lambda name: SimpleNamespace(fingerprint_with=lambda beside: record['data'][f'{name}_fingerprint'])
        same = run_id(config_of(record), SimpleNamespace(train=part('train'), val=part('val')))
        assert same == record['id'] == path.stem[-12:]
        assert path.stem.endswith(f"-s{record['config']['seed']}-{record['id']}")
        found[record['id']] = path
    listed = (Path(__file__).parent/'identities.txt').read_text().split()
    assert len(listed) == 264 and set(listed) <= set(found)


def test_what_was_measured_beside_each_record_is_whole():
    "Every measurement is sealed, belongs to its weights, and every table and picture is as it was measured."
    from asamoe.core import sha256
    for path in records_dir().rglob('*.measured.json'):
        told, record = read_sealed(path), path.with_name(path.name.replace('.measured', ''))
        if record.exists(): assert read_sealed(record)['weights_sha256'] == told['weights_sha256'], path
        for key, entry in told['measured'].items():
            assert 'value' in entry or sha256(path.with_name(entry['file'])) == entry['sha256'], (path, key)


def test_side_by_side_measurements_are_all_kept(tmp_path):
    "Two processes measure the same weights at the same time; nothing of either is lost."
    code = ("import sys; from asamoe.training import Measured; from pathlib import Path\n"
            "class M(Measured):\n    weights_sha256, stem = 'x', Path(sys.argv[1])\n    def model(self): return None\n"
            "for i in range(40): M().measure(f'{sys.argv[2]}{i}', lambda model: i)")
    started = [subprocess.Popen([sys.executable, '-c', code, str(tmp_path/'m-s0-1'), name],
                                env=os.environ | dict(ASAMOE_ROOT=str(tmp_path))) for name in 'ab']
    assert [p.wait() for p in started] == [0, 0]
    assert len(read_sealed(tmp_path/'m-s0-1.measured.json')['measured']) == 80


@pytest.mark.parametrize('which', ['record', 'measured', 'csv'])
def test_one_altered_byte_of_a_record_is_named(home, data, which):
    run = fit(TINY, data, publish=True, progress=False)
    run.measure('n', lambda model: 1); run.table('t', lambda model: __import__('pandas').DataFrame(dict(a=[1])))
    path = dict(record=run.published, measured=run.path, csv=next(run.published.parent.glob('*.csv')))[which]
    content = bytearray(path.read_bytes()); content[len(content)//2] ^= 1; path.write_bytes(content)
    with pytest.raises(RecordError, match=path.name.replace('.', r'\.')):
        again = fit(TINY, data, publish=True, progress=False)
        again.measure('n', lambda model: 1); again.table('t', None)
