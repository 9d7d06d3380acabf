"The anchored autoencoder equals an independent transcription of its specification, and answers bad input."
import math
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch, torch.nn as nn

from asamoe.core import AsamoeError, TrainingError, WeightsError, get_preset, records_dir
from asamoe.data import DataError, Splits, bilinear, image_set, load_source, stl10_part
from asamoe.saaae.trial import ARMS, PARTS, VERDICT, complete, outcome, place_table, places, plan
from asamoe.saaae.vae import (SAAAE, VAE, PUBLISHED, Anchor, Reconstruction, attended, batch_map, code_book, hide,
                              image_masks, image_rows, to_signed)
from asamoe.training import fit

SHARED = Path(__file__).resolve().parent.parent.parent/'shared'/'data'


class Transcribed(nn.Module):
    "The specification, layer by layer and line by line, with nothing of the package."
    def __init__(self, anchored):
        super().__init__()
        def down(a, b): return [nn.Conv2d(a, b, kernel_size=4, stride=2, padding=1), nn.ReLU()]
        def up(a, b): return nn.ConvTranspose2d(a, b, kernel_size=4, stride=2, padding=1)
        self.encoder = nn.Sequential(*down(3, 64), *down(64, 128), *down(128, 256), *down(256, 512))
        self.fc_mu, self.fc_logvar = nn.Linear(8192, 128), nn.Linear(8192, 128)
        self.fc_decode = nn.Linear(128, 8192)
        self.decoder = nn.Sequential(up(512, 256), nn.ReLU(), up(256, 128), nn.ReLU(), up(128, 64), nn.ReLU(), up(64, 3),
                                     nn.Tanh())
        self.anchored = anchored
        if anchored: self.attention, self.head = nn.MultiheadAttention(4096, num_heads=1), nn.Linear(12288, 128)

    def forward(self, x, eps):
        flat = self.encoder(x).reshape(len(x), 8192)
        mu, logvar = self.fc_mu(flat), self.fc_logvar(flat)
        noise = torch.exp(0.5*logvar)*eps
        if self.anchored:
            planes = x.reshape(len(x), 3, 4096).permute(1, 0, 2)          # three tokens, the batch second
            out, _ = self.attention(planes, planes, planes)
            a = nn.functional.silu(self.head(out.permute(1, 0, 2).reshape(len(x), 12288)))
            noise = noise*(1 - (a - a.min())/(a.max() - a.min()))
        return self.decoder(self.fc_decode(mu + noise).reshape(len(x), 512, 4, 4)), mu, logvar


def transcribed_loss(x_hat, x, mu, logvar):
    return ((x_hat - x)**2).sum() - 0.5*torch.sum(1 + logvar - mu**2 - logvar.exp())


@pytest.fixture(scope='module')
def photos(): return load_source('photos', 64)


@pytest.mark.parametrize('cls, parameters', [(VAE, 8_666_755), (SAAAE, 77_364_995)])
def test_parameters_losses_and_gradients_are_the_specifications(cls, parameters, photos):
    torch.manual_seed(0)
    ours, reference = cls().double(), Transcribed(cls is SAAAE).double()     # at the start large sums cancel
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in reference.parameters()) == parameters
    names = {name.removeprefix('anchor.'): p for name, p in ours.named_parameters()}
    reference.load_state_dict(names)
    few = photos.test[:8]
    clean, masks = to_signed(few.images).double(), image_masks(few[:1])
    eps = torch.randn(len(few), 128, generator=torch.Generator().manual_seed(1)).double()
    x_hat, mu, logvar = reference(hide(clean, masks), eps)
    expected = transcribed_loss(x_hat, clean, mu, logvar)
    expected.backward()
    found = Reconstruction().loss(ours, (hide(clean, masks), clean, masks, eps, None))['train_loss']*len(few)
    found.backward()
    assert abs(found.item()/expected.item() - 1) < 1e-9
    for name, p in reference.named_parameters():
        assert (names[name].grad - p.grad).norm() < 1e-9*p.grad.norm(), name


def test_the_folded_attention_is_the_same_function_at_full_size():
    "With more images than latents, value, output and head are multiplied first; the numbers and gradients stay."
    torch.manual_seed(0)
    anchor, planes = Anchor(), torch.rand(130, 3, 64, 64)*2 - 1
    flat = planes.flatten(2)
    expected = anchor.head(anchor.attention(flat, flat, flat)[0].flatten(1))
    folded = attended(anchor.attention, anchor.head, flat)
    assert torch.allclose(folded, expected, rtol=1e-4, atol=1e-5*expected.abs().max().item())
    parameters = [anchor.head.weight, anchor.attention.out_proj.weight]
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), parameters) for x in (folded, expected))):
        assert (a - b).norm() < 1e-4*b.norm()


SMALL = dict(image_size=32, widths=(4, 8, 16))


@pytest.mark.parametrize('bad, why', [
    (lambda: SAAAE(**SMALL)(torch.zeros(2, 3, 64, 64)), r'takes images \[B, 3, 32, 32\], but got \[2, 3, 64, 64\]'),
    (lambda: VAE(**SMALL)(torch.zeros(2, 1, 32, 32)), 'repeat a single channel'),
    (lambda: batch_map(torch.zeros(3, 4)), 'same number'), (lambda: VAE(image_size=50), 'does not fit'),
    (lambda: Reconstruction(square=0), 'square is 0'), (lambda: SAAAE(**SMALL, anchor='hope'), "Unknown anchor 'hope'")])
def test_bad_input_gets_a_sentence(bad, why):
    with pytest.raises(AsamoeError, match=why) as error: bad()
    assert '\n' not in str(error.value)


def test_a_batch_of_one_has_a_map_of_its_own():
    torch.manual_seed(0)
    m = SAAAE(**SMALL)(torch.rand(1, 3, 32, 32), torch.zeros(1, 128)).m
    assert (m.min(), m.max()) == (0, 1)


def test_a_loss_that_is_no_number_stops_and_says_where(home):
    images = image_set(np.zeros((8, 3, 32, 32), np.uint8))
    data = Splits('black', images, images, images)
    config = PUBLISHED.but(model_args=SMALL, square=4, epochs=2, batch_size=4, lr=1e30)
    with pytest.raises(TrainingError, match='loss became nan in epoch 1, batch 2'): fit(config, data, progress=False)


def test_weights_of_the_other_model_are_refused(tmp_path):
    SAAAE(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match='another model than VAE'): VAE.from_pretrained(tmp_path)
    assert isinstance(SAAAE.from_pretrained(tmp_path), SAAAE)


def test_stl10_that_cannot_be_had_says_so(home, monkeypatch):
    import urllib.error, urllib.request
    def offline(*a, **k): raise urllib.error.URLError('no network')
    monkeypatch.setattr(urllib.request, 'urlopen', offline)
    with pytest.raises(DataError, match='stl10 could not be downloaded'): load_source('stl10-part', 64)


def test_all_pixels_masked_says_so(photos):
    few = photos.test[:2]
    clean = to_signed(few.images)
    with pytest.raises(AsamoeError, match='All pixels of an image are masked'):
        image_rows(Reconstruction(), VAE(widths=(4, 8, 16)), clean*0, clean, torch.ones(2, 1, 64, 64, dtype=bool), [])


def curve(seed, extra=()):
    "Runs of one seed: a curve along which the logarithm of the error falls linearly with the rate, and `extra` arms."
    points = [(arm, 50*i) for i, arm in enumerate((arm for arm in VERDICT if arm.startswith('VAE')), 1)]
    rows = [(arm, rate, math.exp(-rate/100)) for arm, rate in points] + list(extra)
    return [dict(arm=arm, seed=seed, rate=rate, charged=rate, mse=mse, m=1, below=0) for arm, rate, mse in rows]


def test_an_arm_is_placed_beside_its_seeds_curve():
    "Twenty per cent more error at 110 nats; the same error at as much less rate; beyond the curve there is no place."
    error = 1.2*math.exp(-1.1)
    rows = [row for seed in range(3)
            for row in curve(seed, [('SAAAE as published', 110, error), ('m = 0', 5000, .01),
                                    ('SAAAE, honest', 110, math.exp(-1.1)*(1 + seed/1e3))])]
    found = places(pd.DataFrame(rows)).groupby('arm').mean()
    assert np.allclose(found.loc['SAAAE as published', ['at_rate', 'at_error']], [.2, 110/(-100*math.log(error)) - 1])
    assert found.loc['m = 0'].isna()[['at_rate', 'at_error']].all()
    told = place_table(pd.DataFrame(rows)).set_index('arm')
    assert list(told.at_rate_outcome[['SAAAE as published', 'SAAAE, honest', 'm = 0']]) == [
        'worse', 'tie', 'not on the curve']


def test_only_whole_seeds_of_a_part_count():
    done = {(arm, seed) for arm in ARMS for seed in range(4)}
    done -= {('sigma-VAE', 1), ('map at random', 0), ('map at random', 3)}
    assert complete(done) == dict(verdict=[0, 2, 3], reasons=[], beyond=[0, 2, 3])
    assert complete(done, least=1)['reasons'] == [2] and outcome(np.array([.1, .2]), .02) == 'too few seeds'


@pytest.fixture(scope='module')
def subset():
    path = SHARED/'stl10_subset.npz'
    return load_source(str(path), 64) if path.exists() else pytest.skip('STL-10 is not beside this clone')


def test_every_record_is_of_the_plan(subset):
    planned = {t.id: t for t in plan(get_preset('paper'), subset)}
    assert len(planned) == 146 and {t.variant for t in planned.values()} >= set(ARMS)
    assert [len(arms) for arms in PARTS.values()] == [14, 6, 6]
    found = {path.stem[-12:] for path in (records_dir()/'4_saaae').rglob('*-????????????.json')}
    assert found <= set(planned)


def test_the_subset_is_recognised_and_resized_as_the_original_does(reference, subset):
    source = subset
    assert source.label == 'STL-10 at 64 pixels (5,000 of 5,000 training, 1,500 of 8,000 test images)'
    with np.load(reference/'stl10_subset.npz') as archive: large = archive['x_train96']
    assert (bilinear(large, 64) == source.pool.images[:256].numpy()).all()
    whole = type(source)('STL-10 at 64 pixels', source.pool, source.test, demonstration=False)
    assert stl10_part(whole).label == source.label


def test_the_published_noise_is_a_code_book(photos):
    task = PUBLISHED.task
    drawn = [task.batch(photos.pool[:16], torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    assert torch.equal(drawn[0][3], drawn[1][3]) and torch.equal(drawn[0][3], code_book(16, 128))
    assert not torch.equal(drawn[0][2], drawn[1][2]) and torch.equal(drawn[0][2][0], drawn[0][2][15])
    assert math.isclose(to_signed(torch.tensor(255)), 1)


def test_the_command_opens_this_parts_data_at_its_own_size(tmp_path):
    from asamoe.cli import data_labels, parse_data
    x = np.random.default_rng(0).integers(0, 256, (4, 3, 64, 64), dtype=np.uint8)
    np.savez(tmp_path/'mine.npz', x_train=x, x_test=x)
    sources = parse_data([f'saaae={tmp_path/"mine.npz"}'], ['4_saaae'])
    assert data_labels(sources, ['4_saaae/41_trial']) == {'4_saaae': 'mine.npz (demonstration)'}
    with pytest.raises(DataError, match=r'uint8 \[n, 3, 32, 32\] is needed'):
        data_labels({'2_paper': str(tmp_path/'mine.npz')}, ['2_paper/21_ablations'])
