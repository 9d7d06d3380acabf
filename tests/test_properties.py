"Properties, not cases: whatever array, file, configuration or setting comes, an answer of the right form or one sentence."
import io, json, math

import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from asamoe.core import PARAMETERS, AsamoeError, DataError, WeightsError, check_parameters
from asamoe.denoiser.networks import AdaptiveUNet
from asamoe.denoiser.pictures import denoise, read_file
from asamoe.denoising import HEADLINE
from asamoe.model import SmallViT, load_folder, load_model

pytestmark = pytest.mark.filterwarnings('ignore')
calm = dict(derandomize=True, deadline=None, database=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large])
some, many = settings(max_examples=150, **calm), settings(max_examples=1500, **calm)
anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=6)


def one_sentence(e): assert '\n' not in str(e) and 10 < len(str(e)) < 700


def answers(f, *arguments, error=AsamoeError, **kwargs):
    "What `f` gives, or None where it refuses in one sentence."
    try: return f(*arguments, **kwargs)
    except error as e: one_sentence(e)


def twice(*strategies):
    "Makes of a check a test of some examples, and a slow one of many: (test, slow test)."
    def pair(check): return some(given(*strategies)(check)), pytest.mark.slow(many(given(*strategies)(check)))
    return pair


dtypes = st.one_of(hnp.integer_dtypes(), hnp.unsigned_integer_dtypes(), hnp.floating_dtypes(), hnp.boolean_dtypes(),
                   hnp.complex_number_dtypes(), hnp.datetime64_dtypes(), hnp.unicode_string_dtypes())
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)
identity = torch.nn.Identity()

@twice(dtypes.flatmap(lambda d: hnp.arrays(d, shapes)), st.none() | st.floats(0, 1))
def _any_array(image, sigma):
    "Another array of the same type and shape, finite and within the range, or a sentence."
    done = answers(denoise, image, sigma, identity, error=DataError)
    if done is None: return
    assert done.shape == image.shape and done.dtype == image.dtype
    assert np.isfinite(done).all() and done.min() >= 0 or done.shape[-1] in (2, 4)

test_any_array, test_many_arrays = _any_array


@twice(anything, anything)
def _any_argument(image, sigma): answers(denoise, image, sigma, identity)

test_any_argument, test_many_arguments = _any_argument


@twice(st.sampled_from(sorted(PARAMETERS)), anything)
def _any_parameter(name, value): answers(check_parameters, **{name: value})

test_any_parameter, test_many_parameters = _any_parameter


@twice(st.sampled_from(['sigma', 'clip', 'augment', 'sigma_power', 'epochs', 'lr', 'grad_clip', 'keep', 'seed', 'model_args',
                        'optimizer', 'task', 'start', 'fused']), anything)
def _any_recipe(name, value):
    "A recipe that can be written down, or a sentence."
    made = answers(HEADLINE.but, **{name: value})
    if made: assert not (isinstance(getattr(made, name, 0), float) and math.isnan(getattr(made, name)))

test_any_recipe, test_many_recipes = _any_recipe


SMALL = dict(image_size=16, embed_dim=32, num_heads=2, depth=1)

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved')
    SmallViT(**SMALL).save_pretrained(folder)
    return folder, (folder/'model.safetensors').read_bytes(), json.loads((folder/'config.json').read_text())


@twice(st.data())
def _any_configuration(saved, data):
    "A network whose weights are those of the file, or a sentence."
    folder, weights, config = saved
    names = st.sampled_from(sorted(config)) | st.text(max_size=5)
    (folder/'model.safetensors').write_bytes(weights)
    (folder/'config.json').write_text(json.dumps(config | data.draw(st.dictionaries(names, anything, min_size=1, max_size=2))))
    net = answers(load_folder, folder, 'SmallViT', error=WeightsError)
    assert net is None or sum(p.numel() for p in net.parameters())*4 < len(weights)

test_any_configuration, test_many_configurations = _any_configuration


def mutated(data, content):
    "`content` cut, or with some bytes changed."
    content = bytearray(content[:data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=4)):
        if place < len(content): content[place] = value
    return bytes(content)


@twice(st.data())
def _any_weights(saved, data):
    folder, weights, config = saved
    path = folder/'any.safetensors'
    path.write_bytes(mutated(data, weights))
    answers(load_model, path, num_heads=2, error=WeightsError)

test_any_weights, test_many_weights = _any_weights


def pictures():
    "{ending: bytes of a small picture}."
    made = {}
    for ending, kind in dict(png='png', jpg='jpeg', bmp='bmp', tif='tiff', webp='webp').items():
        Image.fromarray(np.arange(12*10*3, dtype=np.uint8).reshape(10, 12, 3)).save(buffer := io.BytesIO(), kind)
        made[ending] = buffer.getvalue()
    return made

PICTURES = pictures()

@twice(st.sampled_from(sorted(PICTURES)), st.data())
def _any_picture_file(tmp_path, ending, data):
    path = tmp_path/f'a.{ending}'
    path.write_bytes(mutated(data, PICTURES[ending]))
    found = answers(read_file, path, error=DataError)
    assert found is None or found[0].dtype in (np.uint8, np.uint16)

test_any_picture_file, test_many_picture_files = _any_picture_file
