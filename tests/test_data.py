"Splits that do not leak, and the headline measurement on real images."
import csv, json, subprocess, sys
from pathlib import Path

import numpy as np, pytest
from PIL import Image

import asamoe
from asamoe.core import AsamoeError
from asamoe.data import import_torchvision, load_source, read_picture
from asamoe.training import record_of


def test_photos_share_no_image_between_parts():
    source = load_source('photos')
    bytes_of = lambda part: {i.numpy().tobytes() for i in part.images}
    assert not bytes_of(source.pool) & bytes_of(source.test) and not bytes_of(source.pool) & bytes_of(source.val)


def test_deep_grey_pictures_keep_their_brightness(tmp_path):
    deep = np.random.default_rng(0).integers(0, 65535, (20, 30), dtype=np.uint16)
    for name in ('deep.png', 'deep.tif'):
        Image.fromarray(deep).save(tmp_path/name)
        assert np.abs(read_picture(tmp_path/name)[..., 1] - deep/257).max() <= .5


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


def test_the_part_of_all_of_cifar10_is_the_one_behind_the_records(reference, monkeypatch):
    subset = load_source(str(reference/'cifar10_subset.npz'))
    class Downloaded:
        def __init__(self, where, train, download):
            part = subset.pool if train else subset.test
            self.data = np.zeros((50_000 if train else 10_000, 32, 32, 3), np.uint8)
            self.targets = [0]*len(self.data)
            self.data[part.index] = part.images.permute(0, 2, 3, 1)
    import_torchvision()
    monkeypatch.setattr('torchvision.datasets.CIFAR10', Downloaded)
    part = load_source('cifar10-part')
    assert part.label == subset.label and part.test.fingerprint == subset.test.fingerprint
    run = json.loads((Path(asamoe.__file__).parent/'weights'/'paper'/'config.json').read_text())['run']
    assert part.split(5000, 170, 1000).train.fingerprint == record_of(run)['data']['train_fingerprint']


def test_released_weights_reach_the_papers_psnr(reference):
    from asamoe.denoising import evaluate
    from asamoe.model import load_model
    images = load_source(str(reference/'cifar10_subset.npz')).test
    scores = evaluate(load_model(reference/'upstream'/'best_denoising_model_proper.pt'), images, .2)
    assert len(scores) == 1017
    assert scores.psnr.mean() == pytest.approx(25.09, abs=.05) and scores.ssim.mean() == pytest.approx(.838, abs=.002)


def test_released_weights_reach_the_chapter_that_judges_them(reference, tmp_path):
    command = ['reproduce', '--preset', 'smoke', '--only', '20_headline', '--out', tmp_path, '--weights',
               reference/'upstream'/'best_denoising_model_proper.pt']
    done = subprocess.run([sys.executable, '-m', 'asamoe', *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = csv.DictReader((tmp_path/'2_paper'/'evaluation.csv').open())
    assert 'released weights' in {row['model'] for row in rows}
