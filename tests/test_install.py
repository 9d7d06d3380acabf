"What is built can be installed, starts at once, and brings what it needs and no more."
import json, os, re, shutil, subprocess, sys, tarfile, zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

import asamoe

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ConfigParser(delimiters=['='])
SETTINGS.read(ROOT/'settings.ini')
SETTINGS = SETTINGS['DEFAULT']


def python(*arguments, **kwargs):
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(kind, source, folder):
    "A `wheel` or `sdist` of the project at `source`, built offline with what is installed. Returns its path."
    folder.mkdir(exist_ok=True)
    script = f'from setuptools import build_meta; print(build_meta.build_{kind}({str(folder)!r}))'
    return folder/python('-W', 'ignore', '-c', script, cwd=source).splitlines()[-1]


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "(wheel from the tree, source distribution, wheel from that)"
    folder = tmp_path_factory.mktemp('built')
    names = ('settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'constraints.txt', 'README.md',
             'CHANGELOG.md', 'MOVED.md')
    (folder/'tree').mkdir()
    for name in names: shutil.copy(ROOT/name, folder/'tree'/name)
    shutil.copytree(ROOT/'asamoe', folder/'tree'/'asamoe', ignore=shutil.ignore_patterns('__pycache__'))
    sdist = build('sdist', folder/'tree', folder/'first')
    wheel = build('wheel', folder/'tree', folder/'first')
    with tarfile.open(sdist) as tar: tar.extractall(folder/'second', filter='data')
    return wheel, sdist, build('wheel', next((folder/'second').glob('asamoe-*')), folder/'third')


def test_the_source_distribution_builds_the_same_wheel(built):
    names = [set(zipfile.ZipFile(path).namelist()) for path in (built[0], built[2])]
    assert names[0] == names[1]
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT/'asamoe').rglob('*.py')}
    data = {p.relative_to(ROOT).as_posix() for name in ('weights', 'grid') for p in (ROOT/'asamoe'/name).rglob('*')
            if p.is_file()}
    assert modules | data | {'asamoe/py.typed'} == {n for n in names[0] if '.dist-info' not in n}


@pytest.fixture(scope='module')
def installed(built, tmp_path_factory):
    "Runs Python in a folder where the built wheel is what `asamoe` is, and no clone is near."
    folder = tmp_path_factory.mktemp('installed')
    python('-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index', '--target', folder/'site', built[2])
    (folder/'work').mkdir()
    environment = {k: v for k, v in os.environ.items() if k != 'ASAMOE_ROOT'} | dict(PYTHONPATH=str(folder/'site'))
    def run(*arguments):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=folder/'work', env=environment)
    return run


def test_installed_it_works_without_a_clone(installed):
    import numpy as np
    from PIL import Image
    where = installed('-c', 'import asamoe; print(asamoe.__file__, asamoe.__version__)')
    assert 'site/asamoe' in where.stdout and where.stdout.split()[-1] == SETTINGS['version']
    picture = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    folder = Path(where.stdout.split()[0]).parents[2]/'work'
    Image.fromarray(picture).save(folder/'in.png')
    done = installed('-m', 'asamoe', 'denoise', 'in.png', 'out.png', '--model', 'paper')
    assert done.returncode == 0 and Image.open(folder/'out.png').size == (24, 20), done.stderr


@pytest.mark.parametrize('command', ['reproduce', 'claims', 'lab'])
def test_outside_a_clone_a_command_says_what_it_needs(command, installed):
    done = installed('-m', 'asamoe', command)
    assert done.returncode == 1 and 'in a clone' in done.stderr and len(done.stderr.strip().splitlines()) == 1


def cpu_seconds(*arguments):
    "Processor time of a Python process, which a busy neighbour does not lengthen; the best of three."
    script = ('import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); '
              'u = resource.getrusage(resource.RUSAGE_CHILDREN); print(u.ru_utime + u.ru_stime)')
    return min(float(python('-c', script, sys.executable, *arguments, cwd=ROOT)) for _ in range(3))


@pytest.mark.parametrize('arguments', [
    ['--help'], ['--version'], ['reproduce', '--help'], ['claims', '--search', 'routing']])
def test_commands_that_compute_nothing_answer_in_under_a_second(arguments):
    assert cpu_seconds('-m', 'asamoe', *arguments) < 1


def test_attention_costs_little_to_import():
    script = ('import sys, time, torch; start = time.process_time(); import asamoe.attention; '
              'print(time.process_time() - start, *sys.modules)')
    found = [python('-c', script).split() for _ in range(3)]
    assert min(float(f[0]) for f in found) < .3
    assert not {'pandas', 'matplotlib', 'seaborn', 'papermill', 'IPython', 'torchvision', 'skimage'} & set(found[0])


def test_everything_that_is_listed_is_there():
    assert {'denoise', 'SmallViT', 'load_model', 'attention', 'core', 'denoiser', 'paper', 'calm'} <= set(dir(asamoe))
    for name in dir(asamoe): assert getattr(asamoe, name) is not None
    with pytest.raises(AttributeError): asamoe.telepathy
    assert asamoe.__version__ == SETTINGS['version'] and SETTINGS['version'] in (ROOT/'CITATION.cff').read_text()


def test_calm_comes_before_torch_and_leaves_what_the_user_set():
    names = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'OMP_NUM_THREADS')
    script = ('import asamoe, os, json, sys; '
              f'print(json.dumps([os.environ.get(n) for n in {names}] + ["torch" in sys.modules]))')
    bare = {k: v for k, v in os.environ.items() if k not in names}
    assert json.loads(python('-c', script, env=bare)) == ['PASSIVE', '0', None, False]
    assert json.loads(python('-c', script, env=bare | dict(OMP_WAIT_POLICY='ACTIVE')))[0] == 'ACTIVE'
    asked = dict(OMP_NUM_THREADS='3', MKL_NUM_THREADS='3')
    assert asamoe.calm(3, {}) == dict(OMP_WAIT_POLICY='PASSIVE', GOMP_SPINCOUNT='0') | asked


def test_the_constraints_pin_what_is_required():
    from packaging.requirements import Requirement
    lines = [line for line in (ROOT/'constraints.txt').read_text().splitlines() if not line.startswith('#')]
    pinned = dict(line.lower().split('==') for line in lines)
    extras = [f'{extra}_requirements' for extra in ('data', 'reproduce', 'lab', 'onnx', 'timm', 'camoxpert', 'dev', 'book', 'browser')]
    needed = [Requirement(r) for names in ['requirements', *extras] for r in SETTINGS[names].split()]
    for r in needed:
        if r.name != 'asamoe': assert r.specifier.contains(pinned[r.name.lower()]), r
    named = {'torch', 'torchvision', 'jupyterlab', 'papermill', 'nbdev', 'matplotlib', 'seaborn', 'scikit-image'}
    assert named <= {r.name for r in needed} and ".[dev,lab]" in (ROOT/'Makefile').read_text()


def test_the_core_needs_no_jupyter_and_pins_nothing():
    from packaging.requirements import Requirement
    core = {r.name: r.specifier for r in map(Requirement, SETTINGS['requirements'].split())}
    assert core['torch'].contains('2.14.1') and core['torch'].contains('2.13.0')
    assert not {'papermill', 'ipykernel', 'nbclient', 'jupyterlab', 'torchvision', 'nbdev'} & set(core)
    assert not any(str(s).startswith('==') for s in core.values())
    for name in ('pillow', 'tifffile', 'safetensors'): assert '>=' in str(core[name]), f'{name} needs a floor'


def test_nothing_is_written_that_newer_tools_could_not_read():
    for path in (ROOT/'asamoe').rglob('*.py'):
        assert not re.search(r'\bParam\b', path.read_text()), f'{path}: fastcore 2 has no Param'


def test_without_torchvision_only_data_sets_are_missed():
    script = ('import sys; sys.modules["torchvision"] = None; from asamoe.cli import main; '
              'sys.exit(main(["reproduce", "--only", "21", "--data", "cifar10"]))')
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().endswith("pip install 'asamoe[data]'.")
    assert len(done.stderr.strip().splitlines()) == 1
