__version__ = "0.1.0"

def __getattr__(name):
    "`asamoe.denoise`, `asamoe.Denoiser` and `asamoe.from_pretrained` are imported when they are asked for: commands that do not need them start sooner."
    if name in ('denoise', 'Denoiser', 'from_pretrained'):
        from . import pictures
        return getattr(pictures, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
