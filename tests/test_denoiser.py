"The denoiser as users meet it: any kind of picture, files, folders, plug and play."
import subprocess, sys
from copy import deepcopy

import numpy as np, pytest, torch
from PIL import Image

import asamoe
from asamoe.cli import main
from asamoe.core import DataError, get_preset, sha256
from asamoe.data import import_torchvision, load_source
from asamoe.denoiser import contest, models
from asamoe.denoiser.contest import DENSE, contest_setting
from asamoe.denoiser.models import (Shipped, WIDE, bundled, card_scores, from_pretrained, model_card, photo_scores,
                                    weights_dir)
from asamoe.denoiser.networks import AdaptiveUNet
from asamoe.denoiser.pictures import Denoiser, denoise, denoise_file, estimate_noise, read_file
from asamoe.denoising import evaluate

PAPER = 599_689


@pytest.fixture(scope='module')
def small():
    torch.manual_seed(0)
    return AdaptiveUNet(dims=(8, 16), encoder=('R',), decoder=('R',), middle='A', num_heads=2, window=4).eval()


@pytest.fixture
def command(capsys):
    "asamoe denoise ARGUMENTS -> (exit status, lines on stderr)."
    def run(*arguments):
        status = main(['denoise', *map(str, arguments)])
        return status, capsys.readouterr().err.strip().splitlines()
    return run


@pytest.mark.parametrize('name', bundled())
def test_bundled_models_load_are_small_and_have_a_card(name):
    net = from_pretrained(name)
    assert sum(p.numel() for p in net.parameters()) <= PAPER and not net.training
    card = (weights_dir()/name/'README.md').read_text()
    assert '## Limits' in card and '## Data and recipe' in card


@pytest.mark.parametrize('name', bundled())
def test_bundled_models_remove_noise(name):
    clean = np.tile(np.linspace(.2, .8, 48, dtype=np.float32)[:, None, None], (1, 40, 3))
    noisy = clean + .2*np.random.default_rng(0).standard_normal(clean.shape).astype(np.float32)
    error = lambda x: ((x - clean)**2).mean()
    assert error(asamoe.denoise(noisy.clip(0, 1), .2, model=name)) < .25*error(noisy.clip(0, 1))


@pytest.mark.parametrize('name', bundled())
def test_bundled_weights_and_their_cards_are_those_of_the_record(name):
    shipped, folder = Shipped(name), weights_dir()/name
    assert sha256(folder/'model.safetensors') == shipped.weights_sha256
    scores = card_scores(shipped)
    assert scores and (folder/'README.md').read_text() == model_card(name, shipped.record, scores)


# mean PSNR (dB) on the first 32 test squares of the photographs that scikit-image ships, at this size and noise level
ON_SHIPPED_PHOTOGRAPHS = {('paper', 32, .2): 25.4279, ('cifar10', 32, .2): 25.8274, ('cifar10', 32, .05): 33.1602,
                          ('photo', 64, .1): 30.0492}


@pytest.mark.parametrize('case', ON_SHIPPED_PHOTOGRAPHS, ids=str)
def test_bundled_weights_reach_their_numbers_on_shipped_photographs(case):
    name, size, sigma = case
    scores = evaluate(from_pretrained(name), load_source('photos', size).test[:32], sigma)
    assert scores.psnr.mean() == pytest.approx(ON_SHIPPED_PHOTOGRAPHS[case], abs=.005)


def on_card(name, data, level):
    "PSNR on the card of bundled model `name`."
    return next(psnr for d, s, psnr, _ in card_scores(Shipped(name)) if d.startswith(data) and s == level)


@pytest.mark.parametrize('name', ['paper', 'cifar10'])
def test_bundled_weights_reach_the_numbers_of_their_cards(name, reference):
    test = load_source(reference/'cifar10_subset.npz').test
    scores = evaluate(from_pretrained(name), test, .2)
    assert scores.psnr.mean() == pytest.approx(on_card(name, f'{len(test):,} CIFAR-10', '0.2'), abs=.005)


def test_photo_reaches_its_number_on_the_first_photographs_of_its_card(reference):
    "All 68 of them take minutes."
    found = photo_scores(from_pretrained('photo'), sorted((reference/'cbsd68').iterdir())[:6], 25)
    assert found['psnr'] == pytest.approx(31.3948, abs=.005)


@pytest.mark.parametrize('chapter', [contest, models])
def test_all_that_is_planned_is_on_record(chapter, reference):
    planned = chapter.plan(get_preset('paper'), load_source(reference/'cifar10_subset.npz'))
    assert planned and all(training.found() for training in planned)
    assert len({training.id for training in planned}) == len(planned)


def test_a_choice_that_is_on_record_goes_on_from_there(home):
    preset, source = get_preset('paper'), load_source('photos')
    first = contest.plan(preset, source)
    assert {training.config.lr for training in first} == set(contest.LEARNING_RATES)
    assert len(first) == 3*len(contest.PEERS)
    reached = {name: {.001: 25., .002: 26., .004: 24.} for name in contest.PEERS}
    contest.reached_rates(*contest_setting(preset, source), now=reached)
    entrants = [t for t in contest.plan(preset, source) if t.config.lr == .002]
    assert len(entrants) == 3*len([*contest.PEERS, *contest.PARTS, *contest.DRAWS, *contest.LEVELS])


@pytest.mark.parametrize('shape', [DENSE, WIDE])
def test_the_shipped_networks_are_within_the_papers_parameters(shape):
    assert sum(p.numel() for p in AdaptiveUNet(**shape).parameters()) <= PAPER


@pytest.mark.parametrize('shape, axis', [((1, 1), 'auto'), ((37, 50, 3), 'auto'), ((3, 20, 20), 0), ((20, 4, 20), 1),
                                         ((2, 9, 70, 1), -1)])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.float32, np.float64])
def test_same_type_shape_and_range(small, shape, axis, dtype):
    scale = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    picture = (np.random.default_rng(0).random(shape)*scale).astype(dtype)
    done = denoise(picture, None, model=small, channel_axis=axis)
    assert done.shape == shape and done.dtype == dtype and done.min() >= 0 and done.max() <= scale


def test_a_batch_is_its_images_and_types_agree(small):
    x = torch.rand(2, 3, 40, 33)
    both = denoise(x, .1, model=small)
    assert torch.equal(both[1], denoise(x[1], .1, model=small))
    assert np.allclose(denoise(x[0].permute(1, 2, 0).numpy(), .1, model=small), both[0].permute(1, 2, 0).numpy())
    bytes_ = (x*255).round().byte()
    of_bytes, of_floats = denoise(bytes_, .1, model=small), denoise(bytes_.float()/255, .1, model=small)
    assert (of_bytes.float()/255 - of_floats).abs().max() <= .5/255 + 1e-6


def test_a_constant_channel_does_not_hide_the_noise_of_the_others():
    noisy = .5 + .2*np.random.default_rng(0).standard_normal((64, 64, 3)).astype(np.float32)
    noisy[..., 2] = 0
    assert estimate_noise(noisy)[0] == pytest.approx(.2, rel=.1) and estimate_noise(np.zeros((64, 64, 3))) == [.01]


@pytest.mark.parametrize('size', [1, 40, 100, 300])
def test_in_one_piece_or_in_tiles_a_picture_of_one_tile_is_the_same(small, size):
    picture = torch.rand(3, size, size)
    assert torch.equal(denoise(picture, .1, small, tile=0), denoise(picture, .1, small))


def test_a_self_ensemble_of_eight_is_blind_to_turns(small):
    picture = np.random.default_rng(0).random((32, 32, 3)).astype(np.float32)
    ways = [lambda x: x, np.rot90, np.flipud, np.fliplr]
    done = [way(denoise(picture, .1, small, ensemble=8)) for way in ways]
    for way, expected in zip(ways, done):
        np.testing.assert_allclose(denoise(way(picture), .1, small, ensemble=8), expected, atol=1e-5)
    assert np.array_equal(denoise(picture, .1, small, turns=8), done[0])   # the old name
    assert np.abs(np.rot90(denoise(picture, .1, small)) - denoise(np.rot90(picture), .1, small)).max() > 1e-3


def test_sixteen_bits_of_colour_are_not_dropped_in_silence(tmp_path):
    import struct, zlib
    def chunk(kind, body):
        return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    rows = b''.join(b'\0' + bytes(6*4) for _ in range(4))          # a 4 x 4 PNG of 3 x 16 bits: Pillow cannot write one
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', 4, 4, 16, 2, 0, 0, 0))
    content = b'\x89PNG\r\n\x1a\n' + head + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
    (tmp_path/'deep.png').write_bytes(content)
    with pytest.warns(UserWarning, match='16 bits'): array, _ = read_file(tmp_path/'deep.png')
    assert array.shape == (4, 4, 3)


@pytest.mark.parametrize('form', [dict(photometric='rgb'), dict(photometric='rgb', planarconfig='separate'),
                                  dict(photometric='rgb', byteorder='>', compression='zlib'),
                                  dict(photometric='minisblack')])
def test_tiff_keeps_sixteen_bits_and_orientation(small, tmp_path, form):
    tifffile = pytest.importorskip('tifffile')
    shape = (12, 10) if form['photometric'] == 'minisblack' else (12, 10, 3)
    deep = np.random.default_rng(0).integers(0, 65535, shape, dtype=np.uint16)
    pixels = np.moveaxis(deep, -1, 0) if 'planarconfig' in form else deep
    tifffile.imwrite(tmp_path/'in.tif', pixels, extratags=[(274, 3, 1, 6, True)], **form)
    assert np.array_equal(read_file(tmp_path/'in.tif')[0], deep)
    denoise_file(tmp_path/'in.tif', tmp_path/'out.tif', .1, small)
    done, along = read_file(tmp_path/'out.tif')
    assert done.shape == deep.shape and done.dtype == np.uint16 and (done % 257 > 0).any()
    exif = Image.Exif(); exif.load(along['exif'])
    assert exif[274] == 6


def test_a_damaged_deep_tiff_does_not_stop_the_others(tmp_path, command):
    tifffile = pytest.importorskip('tifffile')
    folder = tmp_path/'in'; folder.mkdir()
    deep = np.random.default_rng(0).integers(0, 65535, (40, 40, 3), dtype=np.uint16)
    tifffile.imwrite(folder/'a.tif', deep, photometric='rgb', compression='zlib')
    content = bytearray((folder/'a.tif').read_bytes())
    content[len(content)//2:len(content)//2 + 400] = bytes(400)
    (folder/'a.tif').write_bytes(content)
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(folder/'b.png')
    status, said = command(folder, tmp_path/'out', '--model', 'paper')
    assert status == 1 and 'a.tif' in said[-1] and (tmp_path/'out'/'b.png').exists()


def test_what_is_left_behind_is_said(small, tmp_path):
    grey, colour = np.full((9, 8), 30_000, np.uint16), np.full((9, 8, 3), 90, np.uint8)
    Image.fromarray(grey).save(tmp_path/'deep.png')
    with pytest.warns(UserWarning, match='8 of the 16 bits'):
        denoise_file(tmp_path/'deep.png', tmp_path/'deep.webp', .1, small)
    assert abs(read_file(tmp_path/'deep.webp')[0].astype(int).mean() - denoise(grey, .1, small).mean()/257) < 8
    Image.fromarray(colour).save(tmp_path/'pages.tif', save_all=True, append_images=[Image.fromarray(colour)])
    with pytest.warns(UserWarning, match='2 pictures'): read_file(tmp_path/'pages.tif')
    Image.fromarray(colour).save(tmp_path/'clear.png', transparency=(90, 90, 90))
    assert read_file(tmp_path/'clear.png')[0].shape == (9, 8, 4)


def test_a_result_that_cannot_be_written_is_not_computed(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(tmp_path/'alpha.png')
    (tmp_path/'file').write_text('')
    monkeypatch.setattr('asamoe.denoiser.pictures.denoise', lambda *a, **k: pytest.fail('computed'))
    Image.fromarray(np.zeros((1, 16_400, 3), np.uint8)).save(tmp_path/'wide.png')
    for name, out, says in [('alpha', 'o.jpg', 'transparency'), ('alpha', 'o.bmp', 'transparency'),
                            ('alpha', 'o.xyz', 'ending'), ('alpha', 'file/o.png', 'another place'),
                            ('wide', 'o.webp', '16383 pixels')]:
        with pytest.raises(DataError, match=says): denoise_file(tmp_path/f'{name}.png', tmp_path/out, .1, 'paper')


def test_resume_knows_what_was_made_of_what_and_how(tmp_path, command):
    folder, out = tmp_path/'in', tmp_path/'out'; folder.mkdir(); out.mkdir()
    for name in 'abc': Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(folder/f'{name}.png')
    (out/'a.png').touch()                                         # empty: cut off, or somebody else's
    def again(*options):
        "The pictures that another run makes."
        def stamps(): return {p.name: p.stat().st_ino for p in out.glob('*.png')}
        before = stamps()
        assert command(folder, out, '--model', 'paper', '--resume', *options)[0] == 0
        return ''.join(sorted(name[0] for name, stamp in stamps().items() if stamp != before.get(name)))
    assert again() == 'abc' and again() == ''
    (out/'b.png').unlink(); (out/'c.png').write_bytes((folder/'c.png').read_bytes()[:20])
    assert again() == 'bc'
    Image.fromarray(np.full((8, 8, 3), 80, np.uint8)).save(folder/'a.png')
    assert again() == 'a'
    assert again('--sigma', '0.1') == 'abc' and again('--sigma', '0.1') == ''
    assert again('--sigma', '0.1', '--model', 'cifar10') == 'abc'
    assert command(folder/'a.png', tmp_path/'one.png', '--model', 'paper')[0] == 0
    assert not [p for p in tmp_path.iterdir() if p.name.startswith('.')], 'a list beside a single picture'


def test_an_interruption_is_one_sentence(tmp_path, command, monkeypatch):
    def interrupt(*a, **k): raise KeyboardInterrupt
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path/'a.png')
    monkeypatch.setattr('asamoe.denoiser.pictures.denoise_file', interrupt)
    status, said = command(tmp_path/'a.png', tmp_path/'b.png', '--model', 'paper')
    assert status == 130 and len(said) == 1 and '--resume' in said[0]


def test_a_folder_saved_again_is_read_again(small, tmp_path):
    picture = np.random.default_rng(0).random((16, 16, 3)).astype('float32')
    small.save_pretrained(tmp_path/'mine')
    before = denoise(picture, .1, tmp_path/'mine')
    AdaptiveUNet(dims=(8, 16), encoder=('R',), decoder=('R',), middle='R').save_pretrained(tmp_path/'mine')
    assert np.abs(denoise(picture, .1, tmp_path/'mine') - before).max() > 1e-4


@pytest.mark.parametrize('model', ['cifar10', 'paper'])
def test_a_bundled_model_saved_again_denoises_the_same(model, tmp_path):
    picture = 1.2*np.random.default_rng(0).random((32, 32, 3)).astype('float32') - .1
    from_pretrained(model).save_pretrained(tmp_path/'mine')
    assert np.array_equal(denoise(picture, .2, tmp_path/'mine'), denoise(picture, .2, model))


@pytest.mark.parametrize('model', ['cifar10', 'photo'])
def test_grey_is_denoised_as_well(model):
    "Also by a network that has seen clipped noise only."
    clean = np.tile(np.linspace(.2, .8, 64, dtype=np.float32), (64, 1))
    noisy = clean + .2*np.random.default_rng(0).standard_normal(clean.shape).astype('float32')
    assert ((denoise(noisy, .2, model) - clean)**2).mean() < .1*((noisy - clean)**2).mean()


@pytest.mark.parametrize('y, sigma', [
    (torch.rand(1, 3, 8, 8), 25), (torch.rand(1, 3, 8, 8)*torch.nan, .1), (torch.rand(2, 3, 8, 8), [.1]*3),
    (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), .1), (torch.rand(1, 3, 8, 8), 'much')])
def test_denoiser_refuses_what_it_cannot_take(small, y, sigma):
    with pytest.raises(DataError): Denoiser(small)(y, sigma)


def test_tiles_leave_no_seams():
    torch.manual_seed(1)
    net = AdaptiveUNet(**DENSE).eval()
    x = torch.rand(3, 200, 420)
    whole = denoise(x, .1, net, tile=0)
    assert (denoise(x, .1, net, tile=256, overlap=128) - whole).abs().max() < 1/255


def test_the_largest_picture_within_4_gib():
    "Its own share of the memory, without what the network needs for a tile, 0.9 GiB."
    script = '''
import resource, numpy as np, torch
from asamoe.data import MOST_PIXELS
from asamoe.denoiser.pictures import denoise
picture = np.zeros((9000, MOST_PIXELS//9000, 3), np.uint8)
assert denoise(picture, .1, torch.nn.Identity()).shape == picture.shape
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20)'''
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 3, done.stdout


def test_command_on_a_picture_and_a_folder(tmp_path, command):
    folder = tmp_path/'in'; folder.mkdir()
    exif = Image.Exif(); exif[274] = 8
    Image.fromarray(np.full((40, 30, 3), 90, np.uint8)).save(folder/'photo.jpg', exif=exif)
    (folder/'torn.png').write_bytes(b'no picture')
    assert command(folder/'photo.jpg', tmp_path/'out.png', '--sigma', '.1', '--model', 'paper')[0] == 0
    with Image.open(tmp_path/'out.png') as out: assert out.size == (30, 40) and out.getexif()[274] == 8
    status, said = command(folder, tmp_path/'out', '--model', 'paper')
    assert status == 1 and (tmp_path/'out'/'photo.jpg').exists()
    assert said[-1] == 'asamoe: 1 of 2 pictures failed: torn.png.'


@pytest.mark.parametrize('arguments, says', [
    (['gone.jpg', 'o.png'], 'no file or folder'), (['gone.jpg', 'o.png', '--sigma', '25'], 'for 25 grey levels'),
    (['x.png', 'o.png', '--model', 'phto'], 'There is no model')])
def test_bad_input_gets_one_sentence(arguments, says, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    status, said = command(*arguments, *([] if '--model' in arguments else ['--model', 'paper']))
    assert status == 1 and len(said) == 1 and says in said[0]


def test_denoiser_passes_gradients_and_takes_levels_per_image(small):
    y = torch.rand(2, 1, 19, 23, requires_grad=True)
    out = Denoiser(small)(y, torch.tensor([.1, .2]))
    out.sum().backward()
    assert out.shape == y.shape and y.grad.abs().sum() > 0


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_denoiser_takes_every_float_and_a_network_of_its_own_type(small, dtype):
    y = torch.rand(1, 3, 19, 23, dtype=dtype)
    for denoiser in (Denoiser(small), Denoiser(deepcopy(small).to(dtype))):
        assert (done := denoiser(y)).dtype == dtype
        assert (done - Denoiser(small)(y)).abs().max() < .1


def test_plug_and_play_reconstruction_with_deepinv():
    import_torchvision()                                          # deepinv imports it too, and it may work by half
    dinv = pytest.importorskip('deepinv')
    torch.manual_seed(0)
    clean = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 6), size=48, mode='bicubic').clamp(0, 1)
    physics = dinv.physics.Inpainting((3, 48, 48), mask=.5, noise_model=dinv.physics.GaussianNoise(.05))
    y = physics(clean)
    solver = dinv.optim.optim_builder(
        'HQS', prior=dinv.optim.PnP(Denoiser('photo')), data_fidelity=dinv.optim.L2(), max_iter=8,
        params_algo=dict(stepsize=1., g_param=.1), verbose=False)
    error = lambda x: (x - clean).square().mean()
    assert error(solver(y, physics)) < .5*error(y)
