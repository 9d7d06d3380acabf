"A corpus of bad input: each gets one sentence within ten seconds and four GiB, and never a traceback."
import ast, dataclasses, inspect, json, math, os, resource, signal, struct, subprocess, sys, zipfile, zlib
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import load_file, save_file

import asamoe.camoxpert.segmentation, asamoe.denoising, asamoe.saaae.vae, asamoe.use   # they register networks and tasks
from asamoe.cli import main, parse_settings
from asamoe.core import PARAMETERS, AsamoeError, DataError, WeightsError, check_parameters
from asamoe.data import load_source, read_picture
from asamoe.denoiser.models import from_pretrained
from asamoe.denoiser.networks import AdaptiveUNet
from asamoe.denoiser.pictures import Denoiser, denoise, estimate_noise, read_file
from asamoe.denoising import HEADLINE, Denoising
from asamoe.model import SmallViT, load_folder, load_model
from asamoe.saaae.vae import SAAAE, VAE
from asamoe.training import MODELS, TASKS, RunConfig, build_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def bounded():
    "Ten seconds for each, and 4 GiB for all."
    def late(*_): raise TimeoutError('it took more than ten seconds')
    for number in (signal.SIGPROF, signal.SIGALRM): signal.signal(number, late)
    signal.setitimer(signal.ITIMER_PROF, 10); signal.alarm(60)    # of the processor; on the clock, for what blocks
    yield
    signal.setitimer(signal.ITIMER_PROF, 0); signal.alarm(0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4*2**20


def refused(f, *arguments, error=AsamoeError, says='', **kwargs):
    "The sentence with which `f(*arguments)` refuses."
    with pytest.raises(error) as caught: f(*arguments, **kwargs)
    said = str(caught.value)
    assert isinstance(caught.value, AsamoeError) and 10 < len(said) < 700 and '\n' not in said and says in said, said
    return said


# settings ------------------------------------------------------------------------------------------------------------

def chapters_parameters():
    "{name: default} of the parameters of all chapters (None where one has that), {chapter: (names, names checked next)}."
    defaults, checked = {}, {}
    for path in sorted((ROOT/'nbs').glob('[0-9]*_*/*.ipynb')):
        cells = json.loads(path.read_text())['cells']
        for i, cell in enumerate(cells):
            if 'parameters' not in cell['metadata'].get('tags', []): continue
            own = {a.targets[0].id: ast.literal_eval(a.value) for a in ast.parse(''.join(cell['source'])).body}
            calls = [n for n in ast.walk(ast.parse(''.join(cells[i + 1]['source']))) if isinstance(n, ast.Call)]
            told = [{k.arg for k in c.keywords} for c in calls if getattr(c.func, 'id', '') == 'check_parameters']
            defaults |= {name: None if name in defaults and defaults[name] is None else value for name, value in own.items()}
            checked[path.stem] = set(own), set().union(*told)
    return defaults, checked

DEFAULTS, CHECKED = chapters_parameters()
NUMBERS = ['abc', '', -1, math.nan, math.inf, -math.inf, True, 10**400, 1e308, {}, [1, [2]], 1j, None]
WRONG = {int: NUMBERS + [.5, 2**64, [1]], float: NUMBERS + [[.3, .1]], bool: [0, 1, 'yes', '', None, [], math.nan],
         str: [5, None, True, [], ['a'], {}, b'a', 'a\0b', '\ud800', 'x'*5000], list: NUMBERS[:-1] + [5, (), [-1], [True], [None], [[]], ['a', 1], [1]*101]}
OPTIONAL = {name for name, default in DEFAULTS.items() if default is None or default == []}

def wrong_values(name):
    "What the parameter `name` may not be, by the kind of its default."
    default = DEFAULTS[name]
    kind = {'variants': list}.get(name, int) if default is None else type(default)
    values = [v for v in WRONG[kind] if not (name in OPTIONAL and (v is None or v == () and kind is list))]
    return [v for v in values if not (name == 'seconds' and v == .5)]

CASES = [(name, value) for name in DEFAULTS for value in wrong_values(name)]


def test_every_parameter_of_every_chapter_has_bounds_and_is_checked_first():
    assert set(DEFAULTS) <= set(PARAMETERS)
    for chapter, (own, checked) in CHECKED.items(): assert own - {'preset'} <= checked, chapter
    for name, default in DEFAULTS.items(): check_parameters(**{name: default})


@pytest.mark.parametrize('name, value', CASES, ids=lambda x: repr(x)[:30] if not isinstance(x, int) or abs(x) < 1e9 else 'big')
def test_a_wrong_parameter_gets_its_sentence(name, value):
    said = refused(check_parameters, says=f'{name} is ', **{name: value})
    assert 'give ' in said or name == 'sigma_range'


@pytest.mark.parametrize('text', ['sigma=abc', 'sigma=NaN', 'sigma=[0.3,0.1]', 'seeds=-1', 'budgets=5', 'budgets=[]', 'epochs=0', 'epochs=true',
    'epochs=' + '9'*5000, 'noise_seed=1e400', 'sigma_range=[0.3,0.1]', 'sigma_range=[0.1]', 'levels=0.1', 'variants=5', 'headline=1', 'images=0',
    'seeds=' + '['*100_000, 'sigma', '=1', 'out=x', 'nobody=1', 'sigma-x=1', 'seeds=null1', 'sizes=[4]', 'num_heads=0', 'seconds=-1', 'rounds=0'])
def test_a_wrong_setting_of_the_command_line(text): refused(parse_settings, [text], set(DEFAULTS))


@pytest.mark.parametrize('name', ['seeds', 'cheap_seeds', 'epochs', 'images', 'sigma', 'seed', 'budgets', 'photographs'])
@pytest.mark.parametrize('value', [-1, 1.5, 'abc', math.nan, [[]]], ids=str)
def test_a_plan_that_is_asked_for_wrongly(name, value):
    from asamoe.book.grid import module_of, planners
    plans = [module_of(path).plan for path in planners().values()]
    asked = [plan for plan in plans if name in inspect.signature(plan).parameters]
    for plan in asked:
        if name != 'photographs' or not isinstance(value, str): refused(plan, None, None, says=f'{name} is ', **{name: value})
    assert asked


def test_sides_that_contradict_each_other():
    refused(check_parameters, embed_dim=128, num_heads=3, says='num_heads is 3')
    refused(check_parameters, nobody=1, says='nobody')


FIELDS = [(None, f) for f in dataclasses.fields(RunConfig)] + [(t, f) for t in TASKS.values() for f in dataclasses.fields(t)
                                                               if t.__module__.startswith('asamoe')]
KINDS = {'int': int, 'float': float, 'bool': bool, 'str': str, 'dict': dict, 'Task': dict}
WRONG_FIELDS = {k: [v for v in WRONG[k] if not (isinstance(v, float) and v == 1e308 and k is float)] for k in (int, float, bool, str)} | {
    dict: [5, None, 'a', [], math.nan]}

def wrong_fields():
    for task, f in FIELDS:
        names = [n.strip() for n in str(getattr(f.type, '__name__', f.type)).split('|')]
        kind = KINDS[names[0]]
        values = WRONG_FIELDS[kind]
        if len(names) > 1: values = [-1, math.nan, math.inf, 'loud', {}, None, 10**400, (), [[1]], 1j]
        for value in values:
            if kind is str and value == 'x'*5000: continue
            yield task, f.name, value


@pytest.mark.parametrize('task, name, value', list(wrong_fields()), ids=lambda x: getattr(x, '__name__', repr(x))[:30] if not isinstance(x, int) or abs(x) < 1e9 else 'big')
def test_a_wrong_field_gets_its_sentence(task, name, value):
    refused(task or HEADLINE.but, says=name, **{name: value})


@pytest.mark.parametrize('change', [dict(sigma=(.3, .1)), dict(sigma=()), dict(sigma=(.1,)), dict(sigma=(.1, .2, .3)), dict(sigma=0), dict(clip=2),
    dict(clip=math.nan), dict(augment='turned'), dict(augment=1), dict(criterion='l1'), dict(sigma_power=0, sigma=(0, .1)), dict(nobody=1),
    dict(grad_clip=-1), dict(optimizer=np.array(['Adam'])), dict(optimizer='SGD'), dict(keep='first'), dict(precision='fp8'), dict(task='Denoising')],
    ids=str)
def test_a_wrong_recipe(change): refused(HEADLINE.but, **change)


# networks ------------------------------------------------------------------------------------------------------------

SMALL = dict(image_size=16, embed_dim=32, num_heads=2, depth=1)
UNET = dict(dims=(8, 16), encoder=('R',), decoder=('R',), middle='A', num_heads=2, window=4)
CODER = dict(image_size=16, widths=(4, 8), latent=8)
NETWORKS = {SmallViT: SMALL, AdaptiveUNet: UNET, VAE: CODER, SAAAE: CODER}

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "A saved folder of each network."
    folders = {}
    for cls, arguments in NETWORKS.items():
        folders[cls] = tmp_path_factory.mktemp(cls.__name__)
        cls(**arguments).save_pretrained(folders[cls])
    return folders


def copied(folder, to, config=None, **change):
    "A copy of the saved `folder` whose configuration says `change`, or is the text `config`."
    for path in folder.iterdir(): (to/path.name).write_bytes(path.read_bytes())
    told = json.loads((to/'config.json').read_text()) | change
    (to/'config.json').write_text(json.dumps(told) if config is None else config)
    return to


def test_what_is_saved_is_opened_again(saved):
    for cls, folder in saved.items():
        again = cls.from_pretrained(folder)
        assert type(again) is cls and not again.training and type(load_folder(folder, cls.__name__)) is cls


BAD = [10**8, -1, 0, 1.5, 'many', None, [1], {}, True, 10**400, math.nan]
CHANGES = [(SmallViT, dict(depth=d)) for d in (10**8, 60_000, 2, 0, -1, 1.5, '1', None, [1], True, 10**400)]
CHANGES += [(SmallViT, {k: v}) for k in ('embed_dim', 'image_size', 'patch_size', 'num_heads') for v in (30_000, 10**9, *BAD)]
CHANGES += [(SmallViT, {k: v}) for k, v in [('budgets', 5), ('budgets', [10**9]), ('budgets', []), ('budgets', [32]*10**5), ('budgets', 'abc'), ('budgets', [-1]),
    ('budgets', [[1]]), ('attention', 'other'), ('attention', 5), ('attention', 'standard'), ('router', None), ('clamp', True), ('selection', []), ('routing', 'x'*10**5),
    ('shared_keys', 1), ('shared_keys', True), ('nobody', 1), ('self', 1), ('model', 'Nobody'), ('model', 5), ('model', ['SmallViT']), ('model', 'AdaptiveUNet'),
    ('model', 'VAE'), ('clipped', 'yes'), ('clipped', 1), ('run', 5), ('a\nb', 65537.), ('name', 'x'), ('home', 'os'), ('where', 1), ('given', 2)]]
CHANGES += [(AdaptiveUNet, {k: v}) for k, v in [('dims', [8, 16, 32]), ('dims', [10**6, 10**6]), ('dims', 8), ('dims', []), ('encoder', ['R'*10**6]), ('encoder', ['X']),
    ('encoder', [5]), ('middle', 'A'*90), ('middle', 5), ('middle', ''), ('decoder', ['R', 'R']), ('window', 10**6), ('window', 8), ('window', 0), ('told_sigma', False),
    ('told_sigma', 'no'), ('residual', 2), ('num_heads', 3), ('budgets', [8]), ('attention', 'standard'), ('router', 'random'), ('nobody', [])]]
CHANGES += [(cls, {k: v}) for cls in (VAE, SAAAE) for k, v in [('image_size', 10**8), ('image_size', 32), ('latent', 10**8), ('latent', 16), ('latent', -1),
    ('widths', [10**6]*2), ('widths', [4]*200), ('widths', []), ('widths', 4), ('spatial', 1), ('told', True), ('nobody', 1)]]
CHANGES += [(VAE, dict(noise=v)) for v in (math.nan, math.inf, 'loud', True, None)] + [(SAAAE, dict(anchor='none')), (SAAAE, dict(strength=math.nan))]


@pytest.mark.parametrize('cls, change', CHANGES, ids=lambda x: getattr(x, '__name__', str(x)[:60]))
def test_a_configuration_that_its_weights_do_not_fit(cls, change, saved, tmp_path):
    folder = copied(saved[cls], tmp_path, **change)
    refused(cls.from_pretrained, folder, error=WeightsError, says=str(folder))
    refused(from_pretrained, copied(saved[cls], tmp_path, **dict(model=cls.__name__) | change), error=WeightsError)


CONFIGS = ['', '{', '[]', '[["depth", 1]]', '5', 'null', '"text"', '{"depth": 1', 'NaN', '{"depth": NaN}', '\0', '{"a":'*2000, '['*10**5, '{"x": "' + 'y'*10**6 + '"}',
           '{"embed_dim": 32, "depth": 1e400}', "{'depth': 1}", '<html>', '{"depth": ' + '9'*5000 + '}']

@pytest.mark.parametrize('config', CONFIGS, ids=lambda c: repr(c[:20]))
def test_a_configuration_that_is_none(config, saved, tmp_path):
    refused(load_folder, copied(saved[SmallViT], tmp_path, config), 'SmallViT', error=WeightsError)
    refused(SmallViT.from_pretrained, tmp_path, error=WeightsError)


def header(entries, data=b''):
    "A safetensors file whose head says `entries`."
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack('<Q', len(text)) + text + data

WEIGHTS = {
    'empty': lambda b: b'', 'torn head': lambda b: b[:100], 'torn data': lambda b: b[:-100], 'longer': lambda b: b + b'x', 'text': lambda b: b'hello world',
    'head of 2^60': lambda b: struct.pack('<Q', 2**60) + b[8:], 'head of 2^27': lambda b: struct.pack('<Q', 2**27) + b[8:], 'no json': lambda b: header(b'x'*50),
    'list': lambda b: header([1]), 'nothing': lambda b: header({}), 'claims too much': lambda b: header({'a': dict(dtype='F32', shape=[10**9], data_offsets=[0, 4*10**9])}),
    'shape too large': lambda b: header({'a': dict(dtype='F32', shape=[10**9], data_offsets=[0, 4])}, b'1234'),
    'overflow': lambda b: header({'a': dict(dtype='F32', shape=[2**40, 2**40], data_offsets=[0, 4])}, b'1234'),
    'negative': lambda b: header({'a': dict(dtype='F32', shape=[-1], data_offsets=[0, 4])}, b'1234'),
    'other type': lambda b: header({'a': dict(dtype='F99', shape=[1], data_offsets=[0, 4])}, b'1234'),
    'of no numbers': lambda b: header({'pos_embed': dict(dtype='F32', shape=[1, 10**12, 0], data_offsets=[0, 0]),
        'patch_embed.weight': dict(dtype='F32', shape=[0, 3, 4, 4], data_offsets=[0, 0]), 'blocks.0.norm1.weight': dict(dtype='F32', shape=[0], data_offsets=[0, 0])}),
    'zip': lambda b: b'PK\x03\x04' + b[4:]}

@pytest.mark.parametrize('damage', WEIGHTS)
@pytest.mark.parametrize('cls', [SmallViT, AdaptiveUNet], ids=lambda c: c.__name__)
def test_weights_that_are_torn_or_foreign(damage, cls, saved, tmp_path):
    path = copied(saved[cls], tmp_path)/'model.safetensors'
    path.write_bytes(WEIGHTS[damage](path.read_bytes()))
    for f, argument in [(cls.from_pretrained, tmp_path), (load_model, path), (from_pretrained, tmp_path)]: refused(f, argument, error=WeightsError)


def changed(state, how):
    name = 'blocks.0.norm1.weight' if 'blocks.0.norm1.weight' in state else next(iter(state))
    if how == 'missing': del state[name]
    elif how == 'extra': state['extra'] = torch.ones(3)
    elif how == 'many blocks': state |= {f'blocks.{10**8}.norm1.weight': torch.ones(3)}
    elif how == 'shape': state[name] = torch.ones(7)
    elif how == 'scalar': state[name] = torch.tensor(1.)
    elif how == 'whole numbers': state[name] = state[name].long()
    elif how == 'none': state.clear(); state['x'] = torch.ones(1)
    else: state[name] = torch.full_like(state[name], float(how))
    return state

HOWS = ['missing', 'extra', 'many blocks', 'shape', 'scalar', 'whole numbers', 'none', 'nan', 'inf', '-inf']

@pytest.mark.parametrize('how', HOWS)
@pytest.mark.parametrize('cls', NETWORKS, ids=lambda c: c.__name__)
def test_tensors_that_are_not_those_of_the_network(how, cls, saved, tmp_path):
    folder = copied(saved[cls], tmp_path)
    state = changed(load_file(folder/'model.safetensors'), how)
    save_file({k: v.contiguous() for k, v in state.items()}, folder/'model.safetensors')
    refused(cls.from_pretrained, folder, error=WeightsError, says=str(folder))
    refused(load_folder, folder, cls.__name__, error=WeightsError)


@pytest.mark.parametrize('how', [h for h in HOWS if h != 'scalar'] + ['expanded', 'sparse', 'meta', 'code', 'list', 'torn', 'text', 'compressed', 'no tensors'])
def test_a_released_file_that_is_wrong(how, tmp_path):
    path, state = tmp_path/'released.pt', dict(SmallViT(**SMALL).state_dict())
    if how in HOWS: state = changed(state, how)
    elif how == 'expanded': state['pos_embed'] = torch.ones(1).expand(1, 10**10, 32)
    elif how == 'sparse': state['pos_embed'] = torch.ones(1, 16, 32).to_sparse()
    elif how == 'meta': state['pos_embed'] = torch.ones(1, 16, 32, device='meta')
    elif how == 'no tensors': state['pos_embed'] = 5
    torch.save(print if how == 'code' else [1] if how == 'list' else state, path)
    if how == 'torn': path.write_bytes(path.read_bytes()[:-500])
    if how == 'text': path.write_text('hello')
    if how == 'compressed':
        with zipfile.ZipFile(path) as old: content = {i.filename: old.read(i) for i in old.infolist()}
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as new:
            for name, data in content.items(): new.writestr(name, data + bytes(10**6))
    refused(load_model, path, error=WeightsError, says=str(path))


def test_classes_are_not_mixed_up(saved):
    for cls in NETWORKS:
        for other in set(NETWORKS) - {cls}: refused(other.from_pretrained, saved[cls], error=WeightsError)


@pytest.mark.parametrize('file', ['config.json', 'model.safetensors'])
@pytest.mark.parametrize('kind', ['pipe', 'folder', 'device', 'gone', 'loop'])
def test_a_saved_folder_of_other_things_than_files(file, kind, saved, tmp_path):
    path = copied(saved[SmallViT], tmp_path)/file
    path.unlink()
    if kind == 'pipe': os.mkfifo(path)
    if kind == 'folder': path.mkdir()
    if kind == 'device': path.symlink_to('/dev/zero')
    if kind == 'loop': path.symlink_to(path)
    refused(load_folder, tmp_path, 'SmallViT', error=WeightsError)


@pytest.mark.parametrize('model', ['phto', '', '.', '/', '~', 'a/b/c', 'x'*5000, 'a\0b', '\ud800', 5, None, b'photo', [], {}, 'photo\n', '../photo', Path('gone')], ids=lambda m: repr(m)[:20])
def test_a_name_that_is_no_model(model):
    refused(from_pretrained, model, error=WeightsError)
    if model is not None: refused(denoise, np.zeros((8, 8)), model=model, error=WeightsError)


def test_a_hub_id_brings_nothing_that_is_believed(saved, tmp_path, monkeypatch):
    asked = []
    def download(name, revision=None, **options): asked.append((name, revision)); return str(tmp_path)
    monkeypatch.setattr('huggingface_hub.snapshot_download', download)
    copied(saved[SmallViT], tmp_path, depth=10**8)
    refused(from_pretrained, 'owner/name', error=WeightsError)
    refused(denoise, np.zeros((8, 8)), model='owner/other@v1.2', error=WeightsError)
    refused(SmallViT.from_pretrained, 'owner/third', revision='abc', error=WeightsError)
    copied(saved[SmallViT], tmp_path, model='SmallViT')
    assert type(from_pretrained('owner/good', revision='main')) is SmallViT
    assert type(SmallViT.from_pretrained('owner/fine', token=False)) is SmallViT
    assert asked == [('owner/name', None), ('owner/other', 'v1.2'), ('owner/third', 'abc'), ('owner/good', 'main'), ('owner/fine', None)]


def test_runs_and_checkpoints_go_through_the_same_gate(home):
    from asamoe.core import seal, sha256, write_sealed
    from asamoe.training import fit, save_checked
    splits = load_source('photos').split(8, 4, 4)
    config = HEADLINE.but(epochs=1, model_args=SMALL | dict(image_size=32))
    run = fit(config, splits, progress=False)
    path = run.folder/'weights.safetensors'
    state = load_file(path)
    for how in ('nan', 'missing', 'extra', 'shape'):
        save_file(changed(dict(state), how), path)
        run.record['weights_sha256'] = sha256(path)
        refused(run.model, error=WeightsError, says=run.id)
        refused(fit, config.but(start=run.id, seed=3), splits, progress=False, error=AsamoeError) if how == 'none' else None
    for state in (dict(model={}, optimizer={}), dict(history=[]), dict(model=dict(x=torch.ones(1)), optimizer=None, history=[], best=None, lowest=1., seconds=0.)):
        from asamoe.training import initial_state
        refused(initial_state, config, state, error=WeightsError)


@pytest.mark.parametrize('name', MODELS)
def test_every_network_can_be_tried_without_memory(name):
    arguments = dict(backbone=True) if name == 'Segmenter' else {}
    with torch.device('meta'): net = build_model(name, **arguments)
    assert any(x.device.type == 'meta' for x in net.state_dict().values()) or arguments


# pictures ------------------------------------------------------------------------------------------------------------

def png(width, height, depth=8, colour=2, data=b''):
    "A PNG file whose head claims a size."
    def chunk(kind, body): return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + head + chunk(b'IDAT', zlib.compress(data)) + chunk(b'IEND', b'')

def bmp(width, height):
    "A BMP file whose head claims a size."
    return b'BM' + struct.pack('<IHHI', 54, 0, 0, 54) + struct.pack('<IiiHHIIiiII', 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)

def tiff(width, height, bits=8, samples=3, photometric=2):
    "A TIFF file whose head claims a size, with a strip of four bytes."
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, 1), (262, 3, 1, photometric), (273, 4, 1, 8),
            (277, 3, 1, samples), (278, 4, 1, height), (279, 4, 1, 4)]
    return b'II*\0' + struct.pack('<I', 12) + b'1234' + struct.pack('<H', len(tags)) + b''.join(
        struct.pack('<HHII', *tag) for tag in tags) + bytes(4)

def written(kind, size=(12, 10), **options):
    "A good picture file of `kind`."
    import io
    Image.new('RGB', size, (9, 99, 200)).save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()

FILES = {f'{size} {name}': content for size in ((60_000, 60_000), (15_000, 14_000), (10_400, 10_400), (2**31 - 1, 2**31 - 1), (0, 0))
         for name, content in {'a.png': png(*size), 'grey.png': png(*size, 16, 0), 'a.bmp': bmp(*size), 'a.tif': tiff(*size),
                               'deep.tif': tiff(*size, 16), 'grey.tif': tiff(*size, 16, 1, 1)}.items()}
for ending, kind in {'png': 'png', 'jpg': 'jpeg', 'bmp': 'bmp', 'tif': 'tiff', 'webp': 'webp'}.items():
    whole = written(kind)
    FILES |= {f'empty a.{ending}': b'', f'text a.{ending}': b'no picture', f'head a.{ending}': whole[:9], f'torn a.{ending}': whole[:len(whole)//2],
              f'zeros a.{ending}': bytes(5000), f'page a.{ending}': b'<html></html>', f'script a.{ending}': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n'}
FILES |= {'samples a.tif': tiff(10, 10, 16, 60_000), 'bits a.tif': tiff(10, 10, 64), 'floats a.tif': tiff(10, 10, 32, 1, 1), 'gif a.png': written('gif'), 'pdf a.jpg': b'%PDF-1.4\n'}

@pytest.mark.parametrize('case', FILES)
def test_a_file_that_is_no_picture_or_too_large(case, tmp_path, capsys):
    path = tmp_path/case.split()[-1]
    path.write_bytes(FILES[case])
    for read in (read_file, read_picture): refused(read, path, error=DataError, says=str(path))
    if case.startswith('(') and not case.startswith('(0'): refused(read_file, path, error=DataError, says=' pixels')   # from its head
    assert main(['denoise', str(path), str(tmp_path/'out.png'), '--model', 'paper']) == 1
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith('asamoe: ')]) == 1


def bomb(size):
    "Deflated zeros, `size` times 16 MiB, made at once."
    packer = zlib.compressobj(9)
    first, again = (packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + again*(size - 1)

@pytest.mark.parametrize('tile', [None, (16, 16)], ids=['strip', 'tile'])
def test_a_strip_that_unpacks_to_gigabytes_is_not_unpacked(tile, tmp_path):
    import tifffile
    path = tmp_path/'deep.tif'
    tifffile.imwrite(path, iter([bomb(512)]), shape=(16, 16, 3), dtype=np.uint16, photometric='rgb', compression='zlib', rowsperstrip=16, tile=tile)
    assert path.stat().st_size < 2**24
    refused(read_file, path, error=DataError, says='unpacks to more')                        # 8 GiB


def test_a_packed_picture_of_16_bits_is_still_read(tmp_path):
    import tifffile
    deep, path = np.random.default_rng(0).integers(0, 65535, (300, 400, 3), dtype=np.uint16), tmp_path/'deep.tif'
    tifffile.imwrite(path, deep, photometric='rgb', compression='zlib', rowsperstrip=300)
    assert np.array_equal(read_file(path)[0], deep)
    tifffile.imwrite(path, deep, photometric='rgb', compression='lzma')
    refused(read_file, path, error=DataError, says='LZMA')


@pytest.mark.parametrize('kind', ['pipe', 'folder', 'device', 'loop', 'gone', 'long', 'zero'])
def test_a_path_that_is_no_file(kind, tmp_path):
    path = tmp_path/'a.png'
    if kind == 'pipe': os.mkfifo(path)
    if kind == 'folder': path.mkdir()
    if kind == 'device': path.symlink_to('/dev/zero')
    if kind == 'loop': path.symlink_to(path)
    if kind == 'long': path = tmp_path/('x'*300)
    if kind == 'zero': path = tmp_path/'a\0b.png'
    for read in (read_file, read_picture): refused(read, path, error=DataError)


def test_one_limit_for_all_readers_is_where_it_says():
    from asamoe.data import MOST_PIXELS, fits
    fits('a', 12_000, 9_000)
    assert MOST_PIXELS == 108_000_000
    refused(fits, 'a', 12_001, 9_000, error=DataError)


def arrays(**changes):
    "The arrays of a good source, with `changes`."
    x = np.zeros((4, 3, 32, 32), np.uint8)
    return {k: v for k, v in (dict(x_train=x, x_test=x) | changes).items() if v is not None}

X = np.zeros((4, 3, 32, 32), np.uint8)
SOURCES = dict(none=arrays(x_test=None), floats=arrays(x_train=X.astype(float)), signed=arrays(x_train=X.astype(np.int8)), last=arrays(x_train=X.transpose(0, 2, 3, 1)),
    empty=arrays(x_train=X[:0]), oblong=arrays(x_test=X[..., :30]), grey=arrays(x_train=X[:, :1]), flat=arrays(x_test=X[0]), number=arrays(x_train=np.uint8(1)),
    objects=arrays(x_train=np.array([{}], object)), texts=arrays(y_train=np.array(list('abcd'))), labels=arrays(y_train=np.zeros(3, int)), nan=arrays(y_train=np.full(4, np.nan)),
    masks=arrays(mask_train=X), floating=arrays(mask_train=X[:, :1].astype(float)), index=arrays(train_index=np.zeros((4, 2), int)), complex=arrays(train_index=np.zeros(4, complex)))

@pytest.mark.parametrize('case', SOURCES)
def test_a_source_with_wrong_arrays(case, tmp_path):
    np.savez(tmp_path/'a.npz', **SOURCES[case])
    refused(load_source, tmp_path/'a.npz', error=DataError, says='a.npz')


@pytest.mark.parametrize('case', ['text', 'empty', 'torn', 'folder', 'pipe', 'claims', 'bomb', 'negative', 'no array', 'npy'])
def test_a_source_that_is_no_archive(case, tmp_path):
    path = tmp_path/'a.npz'
    np.savez(path, x_train=X, x_test=X)
    def head(shape):
        import io
        np.lib.format.write_array_header_1_0(buffer := io.BytesIO(), dict(descr='|u1', fortran_order=False, shape=shape))
        return buffer.getvalue()
    if case == 'text': path.write_text('hello')
    if case == 'empty': path.write_bytes(b'')
    if case == 'torn': path.write_bytes(path.read_bytes()[:-60])
    if case in ('folder', 'pipe'): path.unlink(); path.mkdir() if case == 'folder' else os.mkfifo(path)
    if case == 'npy': np.save(tmp_path/'b.npy', X); path.write_bytes((tmp_path/'b.npy').read_bytes())
    if case in ('claims', 'bomb', 'negative', 'no array'):
        shape = dict(negative=(-1, 3, 32, 32)).get(case, (10**7, 3, 32, 32))
        content = head(shape) + bytes(10**7 if case == 'bomb' else 5)
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
            for name in ('x_train', 'x_test'): archive.writestr(f'{name}.npy', b'none' if case == 'no array' else content)
    refused(load_source, path, error=DataError, says='a.npz')


@pytest.mark.parametrize('data', ['', 'foto', 'gone.npz', 'x'*5000, 'a\0b', '~nobody/x', 5, None, [], b'photos', '\ud800', 'photos '], ids=lambda d: repr(d)[:20])
def test_a_source_that_is_unknown(data): refused(load_source, data, error=DataError)


@pytest.mark.parametrize('size', [-1, 1, 7, 10**6, 1.5, 'big', True, 10**400], ids=lambda s: repr(s)[:10] if s != 10**400 else 'huge')
def test_a_size_that_no_source_has(size): refused(load_source, 'photos', size)


def test_a_folder_of_pictures_that_cannot_be_cut(tmp_path):
    for i in range(4): Image.new('RGB', (60_000 if i == 2 else 60, 2 if i == 2 else 40)).save(tmp_path/f'{i}.png')
    refused(load_source, tmp_path, error=DataError, says='2.png')
    (tmp_path/'2.png').unlink(); os.mkfifo(tmp_path/'2.png')
    refused(load_source, tmp_path, error=DataError, says='2.png')


@pytest.fixture(scope='module')
def small(): return AdaptiveUNet(**UNET).eval()

GOOD = np.full((16, 16, 3), .5, np.float32)
IMAGES = dict(nan=GOOD*np.nan, inf=GOOD + np.inf, one_nan=np.where(np.arange(16)[:, None, None] == 3, np.nan, GOOD), scale_255=GOOD*255, whole=np.round(GOOD*200), dark=np.round(GOOD*3),
    negative=GOOD - 300, night=np.where(np.arange(16)[:, None, None]*np.arange(16)[None, :, None] == 225, 250.3, GOOD), far=GOOD*1e30, beyond=np.full((8, 8), 1e300), ints=np.ones((8, 8), int), int8=np.ones((8, 8), np.int8), uint32=np.ones((8, 8), np.uint32), bool=GOOD > 0, complex=GOOD*1j,
    objects=np.array([[{}]]), text=np.array([['a']]), date=np.zeros((4, 4), 'M8[s]'), record=np.zeros((4, 4), [('a', 'u1')]), empty=GOOD[:0], no_width=GOOD[:, :0], number=np.float32(1),
    line=np.ones(8, np.uint8), seven=np.ones((8, 8, 7), np.uint8), path='photo.png', file=Path('photo.png'), none=None, five=5, ragged=[[1., 2.], [3.]], dict={}, bytes=b'abc', set={1},
    int_tensor=torch.ones(8, 8, dtype=torch.int64), bool_tensor=torch.ones(8, 8) > 0, nan_tensor=torch.full((3, 8, 8), torch.nan), complex_tensor=torch.ones(8, 8)*1j,
    empty_tensor=torch.ones(3, 0, 8), sparse=torch.ones(8, 8).to_sparse(), meta=torch.ones(8, 8, device='meta'), scale_tensor=torch.full((3, 8, 8), 99.),
    pil_int=Image.new('I', (8, 8)), pil_float=Image.new('F', (8, 8)), pil_lab=Image.new('LAB', (8, 8)), pil_empty=Image.new('RGB', (0, 0)), pil_flat=Image.new('L', (5, 0)))

@pytest.mark.parametrize('case', IMAGES)
@pytest.mark.filterwarnings('ignore')
def test_what_is_no_image(case, small):
    refused(denoise, IMAGES[case], .1, small, error=DataError)
    if case not in ('scale_255', 'whole', 'dark', 'negative', 'night', 'far', 'scale_tensor'): refused(estimate_noise, IMAGES[case], error=DataError)


@pytest.mark.parametrize('arguments', [dict(sigma=s) for s in (25, -1, math.nan, math.inf, 'abc', [], [.1, .2], [[.1], []], {}, True, 10**400, 1j, b'a', object)] + [
    dict(ensemble=e) for e in (0, 9, -1, 1.5, True, None, 'two', 10**400)] + [dict(tile=t) for t in (-1, 1.5, 'all', True, 10**400, 10**6)] + [
    dict(overlap=o) for o in (-1, 1.5, 10**6, 600, math.nan, 'much')] + [dict(channel_axis=a) for a in (5, -4, 1.5, 'last', True, 1, 10**400, [2])], ids=lambda a: repr(a)[:30] if 10**400 not in a.values() else 'huge')
def test_what_denoise_cannot_do(arguments, small):
    refused(lambda: denoise(GOOD, **dict(sigma=.1, model=small) | arguments))


@pytest.mark.parametrize('y', [GOOD, None, torch.ones(3, 8, 8), torch.ones(1, 2, 8, 8), torch.ones(1, 3, 8, 8).byte(), torch.full((1, 3, 8, 8), torch.inf), 'a',
    255*torch.rand(1, 3, 8, 8), torch.full((2, 1, 8, 8), 3.), torch.stack([torch.rand(3, 8, 8), -99*torch.rand(3, 8, 8)]), torch.ones(1, 3, 0, 8)], ids=lambda y: str(y)[:10])
def test_what_a_plugged_in_denoiser_cannot_take(y, small): refused(Denoiser(small), y, error=DataError)


@pytest.mark.parametrize('mode, shape', [('1', (6, 8)), ('L', (6, 8)), ('LA', (6, 8, 2)), ('P', (6, 8, 3)), ('PA', (6, 8, 4)), ('RGB', (6, 8, 3)), ('RGBA', (6, 8, 4)), ('RGBa', (6, 8, 4)),
    ('RGBX', (6, 8, 3)), ('CMYK', (6, 8, 3)), ('YCbCr', (6, 8, 3)), ('HSV', (6, 8, 3)), ('I;16', (6, 8))])
def test_a_picture_of_pillow_is_taken_by_its_mode(mode, shape, small):
    source = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8))
    via = {'I;16': 'L', 'PA': 'P', 'LA': 'L', 'RGBa': 'RGBA'}.get(mode)
    picture = (source.convert(via) if via else source).convert(mode)
    out = denoise(picture, 0, torch.nn.Identity())
    assert out.shape == shape and (out.dtype == np.uint16) == (mode == 'I;16')
    if mode in ('P', 'PA', 'CMYK', 'YCbCr', 'HSV', 'RGBX'): assert np.array_equal(out[..., :3], np.asarray(picture.convert('RGBA' if mode == 'PA' else 'RGB'))[..., :3])


# the command line ----------------------------------------------------------------------------------------------------

COMMANDS = ['denoise', 'denoise a', 'denoise gone.png o.png', 'denoise in.png o.xyz', 'denoise in.png o', 'denoise in.png in.png', 'denoise in.png o.png --sigma abc', 'denoise in.png o.png --sigma 25',
    'denoise in.png o.png --sigma nan', 'denoise in.png o.png --sigma -1', 'denoise in.png o.png --ensemble 9', 'denoise in.png o.png --ensemble 1.5', 'denoise in.png o.png --ensemble 0',
    'denoise in.png o.png --model nobody', 'denoise in.png o.png --model .', 'denoise in.png o.png --nobody', 'denoise in.png o.png --turns x', 'denoise . .', 'denoise . in.png', 'denoise empty o',
    'denoise pipe.png o.png', 'denoise in.png pipe.png', 'denoise in.png in.png/o.png', 'denoise /dev/null o.png', 'denoise /dev/zero o.png', 'repro', '--nobody', '-x', 'denoise in.png o.png extra',
    'reproduce --preset nobody', 'reproduce --preset', 'reproduce --jobs -1', 'reproduce --jobs many', 'reproduce --jobs 1.5', 'reproduce --only 98', 'reproduce --only 00_core', 'reproduce --only',
    'reproduce --data nobody', 'reproduce --data nobody=photos', 'reproduce --data gone.npz', 'reproduce --data pipe.npz', 'reproduce --weights gone.pt', 'reproduce --weights .', 'reproduce --weights pipe.pt',
    'reproduce --weights /dev/zero', 'reproduce --set', 'reproduce --set x', 'reproduce --set sigma=abc', 'reproduce --set seeds=-1', 'reproduce --set budgets=5', 'reproduce --set epochs=0',
    'reproduce --set sigma=[.3,.1]', 'reproduce --set sigma=NaN', 'reproduce --set seeds=1e999', 'reproduce --set nobody=1', 'reproduce --set out=x', 'reproduce extra',
    'claims --table gone.csv', 'claims --table .', 'claims --table pipe.png', 'claims --table in.png', 'claims --table /dev/null', 'claims --verdict nobody', 'claims --nobody', 'check', 'check nobody', 'check a b',
    'bench --batch 0', 'bench --batch -1', 'bench --rounds 0', 'bench --seconds -1', 'bench --largest 0', 'bench --batch x', 'bench --system nobody', 'bench --reference gone.py', 'bench --reference .',
    'bench --reference wrong.py', 'bench --reference empty.py', 'bench --batch 99999999999999999999']
HARMLESS = {'reproduce --only', 'reproduce --set'}

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp('place')
    Image.new('RGB', (8, 8)).save(place/'in.png')
    (place/'empty').mkdir(); (place/'wrong.py').write_text('1 +'); (place/'empty.py').write_text('')
    for name in ('pipe.png', 'pipe.npz', 'pipe.pt'): os.mkfifo(place/name)
    return place

@pytest.mark.parametrize('line', [c for c in COMMANDS if c not in HARMLESS])
def test_a_command_line_gets_one_sentence(line, place, monkeypatch, capsys):
    monkeypatch.chdir(place); monkeypatch.setenv('ASAMOE_ROOT', str(ROOT))
    quick = ['--only', '20', '21', '22', '24'] if line.startswith('reproduce --set') else []   # chapters to look at
    status, said = main(line.split() + quick), capsys.readouterr().err.strip().splitlines()
    assert status == 1 and len([s for s in said if s.startswith('asamoe: ')]) == 1 and not any('Traceback' in s for s in said), said


@pytest.mark.parametrize('line', ['denoise pipe.png o.png', 'denoise in.png o.png --sigma abc', 'claims --table pipe.png'])
def test_a_process_ends_with_one_sentence(line, place):
    done = subprocess.run([sys.executable, '-m', 'asamoe', *line.split()], capture_output=True, text=True, cwd=place, timeout=60)
    assert done.returncode == 1 and done.stdout == '' and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_the_corpus_is_large():
    assert len(CASES) + len(list(wrong_fields())) + len(CHANGES) + len(FILES) + len(IMAGES) + len(COMMANDS) >= 300
