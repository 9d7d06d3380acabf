"Runs: same bytes twice, after a kill, from two processes at once, and on two ranks."
import json, os, random, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import pytest

from asamoe.core import AsamoeError, atomic_write
from asamoe.data import load_source
from asamoe.training import RunConfig, fit, images_seen, runs_dir

SCRIPT = '''
import sys, torch
torch.set_num_threads(1)
from asamoe.data import Source, image_set
from asamoe.training import RunConfig, fit
import numpy as np
x = np.random.default_rng(0).integers(0, 256, (72, 3, 32, 32), dtype=np.uint8)
data = Source('random', image_set(x), image_set(x[:8])).split(64, 8, 8)
run = fit(RunConfig(epochs=6, batch_size=16, model_args=dict(embed_dim=32, depth=1, num_heads=2)), data, progress=False)
from accelerate import PartialState
print(run.record["weights_sha256"], run.record["hardware"]["processes"])
'''


def start(home, *launcher):
    path = home/'train.py'
    path.write_text(SCRIPT)
    return subprocess.Popen([sys.executable, *launcher, str(path)], env=os.environ | dict(ASAMOE_ROOT=str(home), OMP_NUM_THREADS='1'), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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


@pytest.mark.parametrize('epochs_seen', [0, 1, 3, 5])
def test_killed_and_started_again_gives_the_same_bytes(tmp_path, undisturbed, epochs_seen):
    "SIGKILL a random moment after the n-th checkpoint was written."
    process, deadline, seen, last = start(tmp_path), time.time() + 120, 0, None
    while process.poll() is None and time.time() < deadline and seen < epochs_seen:
        stamp = [p.stat().st_mtime_ns for p in (tmp_path/'data').glob('runs/*/checkpoint')] if (tmp_path/'data').exists() else []
        if stamp and stamp != last: last, seen = stamp, seen + 1
        time.sleep(.001)
    time.sleep(random.uniform(0, .05) + (2 if not epochs_seen else 0))
    process.send_signal(signal.SIGKILL); process.wait()
    assert result(start(tmp_path))[0] == undisturbed[0]


def test_torchrun_with_two_processes_gives_the_same_curve(tmp_path, undisturbed):
    out = result(start(tmp_path, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port', str(random.randint(20_000, 60_000))))
    record = json.loads(next((tmp_path/'data'/'runs').glob('*/record.json')).read_text())
    assert record['hardware']['processes'] == 2 == int(out[1])
    for key in ('train_loss', 'val_mse'):
        assert max(abs(a[key] - b[key]) for a, b in zip(record['history'], undisturbed[1]['history'])) < 1e-4


TINY = RunConfig(epochs=2, batch_size=16, model_args=dict(embed_dim=16, depth=1))


@pytest.fixture
def data(): return load_source('photos').split(64, 16, 8)


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
    still = fit(replace(TINY, start=first.id, lr=1e-12), data, progress=False)
    for (name, a), b in zip(first.model().state_dict().items(), still.model().state_dict().values()): assert (a - b).abs().max() < 1e-6, name
    assert images_seen(still.record) == 2*images_seen(first.record)
    (first.folder/'weights.safetensors').unlink()
    with pytest.raises(AsamoeError, match=f'weights of run {first.id} are not here'): fit(replace(TINY, start=first.id), data, progress=False)
    with pytest.raises(AsamoeError, match='no run gone'): fit(replace(TINY, start='gone'), data, progress=False)


def test_a_loss_that_is_no_number_names_the_batch_and_keeps_the_checkpoint(home, data, monkeypatch):
    import asamoe.training as training
    honest, calls = training.batch_loss, []
    def poisoned(*a):
        calls.append(1)
        losses = honest(*a)
        return (losses[0]*float('nan'), *losses[1:]) if len(calls) == 7 else losses
    monkeypatch.setattr(training, 'batch_loss', poisoned)
    with pytest.raises(AsamoeError, match=r'epoch 2, batch 3'): fit(TINY, data, progress=False)
    assert next(runs_dir().glob('*/checkpoint')).exists()


def test_a_full_disk_is_said_and_loses_nothing(tmp_path):
    path = atomic_write(tmp_path/'file', 'old')
    code = ("import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            f"from asamoe.core import atomic_write, AsamoeError\n"
            f"try: atomic_write({str(path)!r}, 'x'*5000)\nexcept AsamoeError as e: print(e)")
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout
    assert 'the disk is full' in said and path.read_text() == 'old' and len(list(tmp_path.iterdir())) == 1


def test_every_record_keeps_its_identity():
    "A field added to the configuration must not change what earlier runs are called."
    from types import SimpleNamespace
    from asamoe.training import run_id
    records = [json.loads(p.read_text()) for p in (Path(__file__).resolve().parent.parent/'data'/'records').glob('*.json')]
    trained = [r for r in records if 'config' in r]
    for r in trained:
        config = RunConfig(**{k: tuple(v) if k == 'sigma' and isinstance(v, list) else v for k, v in r['config'].items()})
        data = SimpleNamespace(**{part: SimpleNamespace(fingerprint=r['data'][f'{part}_fingerprint']) for part in ('train', 'val')})
        assert run_id(config, data) == r['id']
    assert len(trained) > 100
