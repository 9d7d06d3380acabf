"Splits that do not leak, and the headline measurement on real images."
import csv, subprocess, sys
from pathlib import Path

import pytest

from asamoe.core import AsamoeError
from asamoe.data import load_source


def test_photos_share_no_image_between_parts():
    source = load_source('photos')
    bytes_of = lambda part: {i.numpy().tobytes() for i in part.images}
    assert not bytes_of(source.pool) & bytes_of(source.test) and not bytes_of(source.pool) & bytes_of(source.val)


def test_without_network_the_message_says_what_to_do(home, monkeypatch):
    import urllib.error, urllib.request
    def offline(*a, **k): raise urllib.error.URLError('no network')
    monkeypatch.setattr(urllib.request, 'urlopen', offline)
    with pytest.raises(AsamoeError, match='local copy'): load_source('cifar10')


def test_the_subset_is_recognised_as_cifar10(reference):
    source = load_source(str(reference/'cifar10_subset.npz'))
    assert not source.demonstration
    parts = source.split(5000, 1000, 1000)
    assert [len(parts.train), len(parts.val), len(parts.test)] == [5000, 170, 1000]


def test_released_weights_reach_the_papers_psnr(reference, tmp_path):
    command = ['reproduce', '--only', '05_evaluation', '--data', reference/'cifar10_subset.npz', '--weights', reference/'upstream'/'best_denoising_model_proper.pt',
               '--out', tmp_path]
    done = subprocess.run([sys.executable, '-m', 'asamoe.cli', *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    row = next(r for r in csv.DictReader((tmp_path/'evaluation.csv').open()) if r['model'] == 'released weights')
    assert int(row['images']) == 1017
    assert float(row['psnr']) == pytest.approx(25.09, abs=.05) and float(row['ssim']) == pytest.approx(.838, abs=.002)
