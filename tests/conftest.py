import os
from pathlib import Path

import pytest

import asamoe

asamoe.calm(os.environ.get('OMP_NUM_THREADS', 1))   # before anything imports torch, and for all processes started here
ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent/'shared'/'data'


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A root of its own, so that a test neither sees nor leaves runs."
    monkeypatch.setenv('ASAMOE_ROOT', str(tmp_path))
    return tmp_path


@pytest.fixture
def reference():
    "The released weights and data, which the project does not contain."
    if not SHARED.exists(): pytest.skip('the reference data (released weights, CIFAR-10 subset) is not beside this clone')
    return SHARED
