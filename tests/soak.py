"""Kill trainings, chapters and `asamoe reproduce` at random moments, many times, and look what is lost: `make soak`.

Each kind of victim is made once undisturbed, then again and again under SIGKILL until it is done, in a root of its own.
After every kill no process may be left and all that was published must be whole; once a victim is done, its files must
be those of the undisturbed one, byte for byte, and no temporary file may be left. A summary goes to tests/soak.json;
status 1 if anything was wrong.
"""
import argparse, json, multiprocessing, os, platform, random, shutil, signal, subprocess, sys, tempfile, time
from functools import partial
from pathlib import Path

import asamoe
from asamoe.cli import follow

asamoe.calm(1)
ROOT = Path(__file__).resolve().parent.parent

def train():
    import pandas as pd
    from asamoe.data import load_source
    from asamoe.denoising import HEADLINE
    from asamoe.training import fit
    config = HEADLINE.but(epochs=6, batch_size=16, model_args=dict(embed_dim=32, depth=1, num_heads=2))
    for seed in range(2):
        data, at = load_source('photos').split(96, 16, 8), '2_paper/20_headline/soak'
        run = fit(config.but(seed=seed), data, at, publish=True, progress=False)
        run.measure('answer', lambda model: dict(b=1, a=[seed]*2000))
        run.table('scores', lambda model: pd.DataFrame(dict(psnr=[seed/7]*3000)))


def asamoe_does(*words): os.execv(sys.executable, [sys.executable, '-m', 'asamoe', *words])


REPRODUCE = partial(asamoe_does, 'reproduce', '--preset', 'smoke', '--only')
VICTIMS = {   # what is done, its share of the kills, files that do not depend on time
    'training': (train, .92, 'data/records/**/*'),
    'chapter': (partial(REPRODUCE, '20'), .04, 'figures/smoke/2_paper/*'),
    'reproduce': (partial(REPRODUCE, '02', '23', '--jobs', '2'), .04, 'figures/smoke/[0-9]_*/*')}
# A server that has imported PyTorch forks the victims, so that they are killed at work, not while they import
FORKED = multiprocessing.get_context('forkserver')
FORKED.set_forkserver_preload(['__main__', 'pandas', 'asamoe.data', 'asamoe.denoising', 'asamoe.training'])
MOMENT = ('seconds', 'finished')      # what a record tells of the clock


def prepared(home):
    "A root of its own, with all that is temporary in it, so that what is left can be seen."
    (home/'tmp').mkdir(parents=True)
    for name in ('nbs', 'tests'): (home/name).symlink_to(ROOT/name)
    shutil.copytree(ROOT/'data'/'claims', home/'data'/'claims')
    listed = [line for line in (ROOT/'SHA256SUMS').read_text().splitlines(True) if '  data/claims/' in line]
    (home/'SHA256SUMS').write_text(''.join(listed))
    return home


def environment(home):
    own = dict(ASAMOE_ROOT=home, TMPDIR=home/'tmp', PYTHONPATH=ROOT, ASAMOE_PROGRESS='0', SOAK=home)
    return {name: str(value) for name, value in own.items()}


def family(home):
    "Processes that were started for `home`, whoever their parent is now: {pid: command}."
    found = {}
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            began = f'SOAK={home}\0'.encode() in (folder/'environ').read_bytes()
            if not began and (folder/'cwd').readlink() != home: continue           # a fork keeps its first environment
            if (folder/'stat').read_text().rpartition(')')[2].split()[0] != 'Z':
                found[int(folder.name)] = (folder/'cmdline').read_text(errors='replace').replace('\0', ' ')[:120]
        except (OSError, ValueError): pass
    return found


def settled(home, seconds=15):
    "The processes of `home` that are still there after `seconds`; they are ended, so that what follows is undisturbed."
    end = time.time() + seconds
    while (left := family(home)) and time.time() < end: time.sleep(.1)
    for pid in left: os.kill(pid, signal.SIGKILL)
    return left


def without_time(path):
    "The content of the file at `path`, without what tells the time of day in a record."
    if path.suffix != '.json': return path.read_bytes()
    told = json.loads(path.read_text())
    return {k: v for k, v in told.items() if k not in (*MOMENT, 'seal')} if 'config' in told else told


def files(home, pattern):
    "What was made below `home`: {name: content}."
    return {p.relative_to(home).as_posix(): without_time(p) for p in sorted(home.glob(pattern)) if p.is_file()}


def leftovers(home):
    "Temporary files below `home`."
    kept = {'tmp', 'nbs', 'tests', 'data', 'figures', 'SHA256SUMS'}
    stray = [p for p in home.iterdir() if p.name not in kept] + list((home/'tmp').iterdir())
    hidden = [p for top in ('data', 'figures') for p in (home/top).rglob('*')
              if p.name.endswith('.tmp') or p.name == '.runtime' or p.name == 'publishing']
    return [str(p.relative_to(home)) for p in stray + hidden]


def damage(home):
    "What is wrong with the published results and the runs of `home`, as sentences."
    code = ('from asamoe.core import committed, faults, read_sealed\n'
            '[print(f) for f in faults()]\n'
            'for p in committed().values(): p.suffix == ".json" and read_sealed(p)')
    done = subprocess.run([sys.executable, '-c', code], env=os.environ | environment(home), capture_output=True, text=True)
    return done.stdout.splitlines() + done.stderr.splitlines()[-1:]


def begin(work, home):
    "In a process of its own: do `work` in `home`."
    follow(os.getppid())
    log = os.open(home/'tmp.log', os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2): os.dup2(log, stream)
    os.environ.update(environment(home))
    os.chdir(home)
    tempfile.tempdir = None                                       # that of the server is not this one's
    work()


def start(work, home):
    process = FORKED.Process(target=begin, args=(work, home))
    process.start()
    return process


def undisturbed(work, home, pattern):
    "Do `work` to its end. Returns (seconds, files, what PyTorch and others leave in any case)."
    process, began = start(work, prepared(home)), time.time()
    process.join()
    assert process.exitcode == 0, (home/'tmp.log').read_text()
    (home/'tmp.log').unlink()
    assert (made := files(home, pattern)), f'nothing was made below {pattern}'
    return time.time() - began, made, leftovers(home)


def attempt(work, home, seconds, rng):
    "Start `work` and kill it, or one of its children, after a random share of `seconds`. Returns (whom, status)."
    process = start(work, home)
    process.join(rng.uniform(0, seconds))
    if process.exitcode is not None: return 'nobody', process.exitcode
    others = [pid for pid in family(home) if pid != process.pid]
    whom = rng.choice(others) if others and rng.random() < .3 else process.pid
    try: os.kill(whom, signal.SIGKILL)
    except ProcessLookupError: pass
    process.join()                                                # where a child was killed, it ends with a sentence
    return 'itself' if whom == process.pid else 'a child', process.exitcode


def soak(kind, kills, folder, rng, say):
    "Kill victims of one `kind` until there were so many `kills`. Returns counts, and what was wrong."
    work, _, pattern = VICTIMS[kind]
    seconds, expected, usual = undisturbed(work, folder/f'{kind}-0', pattern)
    count, wrong = dict(kills=0, of_children=0, finished=0, undisturbed_seconds=round(seconds, 1)), []
    while count['kills'] < kills:
        home, tries = prepared(folder/f'{kind}-{count["finished"] + 1}'), 0
        while True:
            tries += 1
            spent = tries > 9 or count['kills'] >= kills          # enough of this one: let it end
            began = time.time()
            whom, status = attempt(work, home, 3600 if spent else seconds, rng)
            if whom == 'nobody' and tries == 1: seconds = min(seconds, time.time() - began)    # the first was cold
            if whom != 'nobody': count['kills'] += 1; count['of_children'] += whom == 'a child'
            wrong += [f'{kind}: process left: {told}' for told in settled(home).values()]
            wrong += [f'{kind}: {told}' for told in damage(home)]
            if status == 0: break
            if whom == 'nobody': wrong.append(f'{kind} failed: {(home/"tmp.log").read_text()[-500:]}'); break
        (home/'tmp.log').unlink()
        made = files(home, pattern)
        wrong += [f'{kind}: {n} is another' for n in expected | made if expected.get(n) != made.get(n)]
        wrong += [f'{kind}: temporary file left: {name}' for name in leftovers(home) if name not in usual]
        count['finished'] += 1
        shutil.rmtree(home)
        say(kind, count, wrong)
    return count, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--kills', type=int, default=300, help='how many (300 take some half an hour)')
    parser.add_argument('--seed', type=int, default=None, help='of the moments (default: another each time)')
    parser.add_argument('--out', type=Path, default=ROOT/'tests'/'soak.json', help='where the summary goes')
    asked = parser.parse_args()
    seed, began, wrong, counts = asked.seed or random.randrange(10**6), time.time(), [], {}
    def say(kind, count, wrong): print(f'{time.time() - began:6.0f} s  {kind}: {count}, {len(wrong)} wrong', flush=True)
    with tempfile.TemporaryDirectory(prefix='soak') as folder:
        for kind, (_, share, _) in VICTIMS.items():
            kills, rng = max(1, round(share*asked.kills)), random.Random(f'{seed} {kind}')
            counts[kind], found = soak(kind, kills, Path(folder), rng, say)
            wrong += found
    told = dict(kills=sum(count['kills'] for count in counts.values()), seed=seed, seconds=round(time.time() - began),
                wrong=wrong, victims=counts, python=platform.python_version(), asamoe=asamoe.__version__,
                machine=platform.machine(), cores=os.cpu_count(), date=time.strftime('%Y-%m-%d', time.gmtime()))
    asked.out.write_text(json.dumps(told, indent=1) + '\n')
    print(*wrong, f"{told['kills']} kills, {len(wrong)} things wrong; summary: {asked.out}", sep='\n')
    return bool(wrong)


if __name__ == '__main__': sys.exit(main())
