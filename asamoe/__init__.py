"""Reproductions by notebook: `asamoe.denoise` removes noise, `asamoe.SmallViT` and its parts are modules of PyTorch,
`python -m asamoe` has the commands. What is here is imported when it is asked for; `dir(asamoe)` lists it."""
__version__ = "0.2.0"

import importlib, os, pkgutil

_OFFERS = dict(
    denoise='denoiser.pictures', Denoiser='denoiser.pictures', from_pretrained='denoiser.models',
    SmallViT='model', load_model='model',
    AdaptiveAttentionMoE='attention', SparseAttentionExpert='attention', TokenRouter='attention')


def calm(threads=None, environment=os.environ):
    """Let OpenMP's threads sleep while they wait, and have `threads` of them; returns `environment`, where it says so.

    OpenMP reads it once, when torch is imported: call this before, and for another process in what becomes that one's
    environment. Threads that spin while they wait take the cores from whoever they wait for: beside one busy process,
    a step on two threads takes many times as long. What the user has set stays, but for a number of threads asked for.
    """
    environment.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    environment.setdefault('GOMP_SPINCOUNT', '0')
    if threads: environment.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    return environment


def _modules(): return {m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith('_')}


def __getattr__(name):
    if name in _OFFERS: return getattr(importlib.import_module(f'{__name__}.{_OFFERS[name]}'), name)
    if name in _modules(): return importlib.import_module(f'{__name__}.{name}')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__(): return sorted({*_OFFERS, *_modules(), 'calm', '__version__'})


calm()
