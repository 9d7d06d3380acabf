"Denoisers that people use. What the chapters of this part offer is here too, imported when it is asked for."
import importlib

_CHAPTERS = ('networks', 'contest', 'models', 'pictures')


def _chapter(name): return importlib.import_module(f'{__name__}.{name}')


def __getattr__(name):
    if name in _CHAPTERS: return _chapter(name)
    for module in map(_chapter, () if name.startswith('_') else _CHAPTERS):
        if hasattr(module, name): return getattr(module, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__(): return sorted({*_CHAPTERS, *(name for chapter in _CHAPTERS for name in _chapter(chapter).__all__)})
