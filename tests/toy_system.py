"A whole system in one file: a network, a task, a plan, a trial. Nothing below knows of it."
from dataclasses import dataclass

import pandas as pd, torch, torch.nn as nn, torch.nn.functional as F

from asamoe.core import Chapter, get_preset, quantity, save_quantities, setting
from asamoe.data import load_source, to_float
from asamoe.evaluation import mean_ci
from asamoe.training import RunConfig, Task, Training, register

@register
class Autoencoder(nn.Module):
    def __init__(self, dim=4):
        super().__init__()
        self.encode, self.decode = nn.Conv2d(3, dim, 8, 8), nn.ConvTranspose2d(dim, 3, 8, 8)
    def forward(self, x): return self.decode(F.gelu(self.encode(x)))

@register
@dataclass(frozen=True)
class Repaint(Task):
    jitter: float = setting(.1, low=0, high=1)
    def batch(self, images, generator):
        clean = to_float(images.images)
        return clean + self.jitter*torch.rand(len(clean), 1, 1, 1, generator=generator), clean
    def loss(self, model, batch): return dict(train_mse=F.mse_loss(model(batch[0]), batch[1]))
    def validation(self, images): return lambda model: dict(val_mse=self.scores(model, images).mse.mean())
    def scores(self, model, images):
        x = to_float(images.images)
        with torch.no_grad(): return pd.DataFrame(dict(mse=(model(x) - x).square().mean((1, 2, 3)).double().numpy()))

def plan(preset, source):
    config = RunConfig(Repaint(), 'Autoencoder', epochs=6, batch_size=16, lr=3e-3)
    return [Training('8_toy/80_repaint', 'plain', config.but(seed=s), source.split(96, 16, 32)) for s in range(3)]

def trial(out, source=None):
    source = source or load_source('photos')
    runs = [t.fit(publish=True, progress=False) for t in plan(get_preset('paper'), source)]
    mse = [r.table('scores', lambda model: r.config.task.scores(model, r.data.test)).mse.mean() for r in runs]
    chapter = Chapter('8_toy/80_repaint', get_preset('paper'), source.label, out)
    return save_quantities(chapter, [quantity('toy.mse', *mean_ci(mse), len(mse), 'interval over 3 trainings')])
