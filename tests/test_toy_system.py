"A new system is one file and touches nothing below: it trains, survives a kill, leaves records, is scored and judged."
import os, signal, subprocess, sys, time
from pathlib import Path

import pandas as pd

from asamoe.core import read_sealed, records_dir
from asamoe.data import load_source
from asamoe.verdicts import judge, read_claims, read_quantities

HERE = Path(__file__).resolve().parent
CLAIM = dict(id='toy-mse', source='toy.md', section='1', statement='The toy reaches an error of 0.9.', paper='0.9',
             value='0.9', decimals='1', unit='', kind='retraining', origin='toy.mse', judged_by='photographs',
             tolerance='0.05', margin='1')
TRAIN = 'import torch; torch.set_num_threads(1)\nimport toy_system, sys\n{}'


def start(home, code):
    environment = os.environ | dict(ASAMOE_ROOT=str(home), PYTHONPATH=str(HERE), OMP_NUM_THREADS='1')
    return subprocess.Popen([sys.executable, '-c', TRAIN.format(code)], env=environment, text=True, stdout=subprocess.PIPE)


def finished(home, code):
    process = start(home, code)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    return out.split()[-1]


FIRST = "print(toy_system.plan(None, toy_system.load_source('photos'))[0].fit(progress=False).record['weights_sha256'])"


def test_it_is_one_short_file(): assert len((HERE/'toy_system.py').read_text().splitlines()) <= 40


def test_killed_it_ends_with_the_same_bytes(tmp_path):
    whole = finished(tmp_path/'whole', FIRST)
    process, deadline = start(tmp_path/'cut', FIRST), time.time() + 120
    def begun(): return list((tmp_path/'cut').glob('data/runs/*/checkpoint'))
    while not begun() and process.poll() is None and time.time() < deadline: time.sleep(.002)
    process.send_signal(signal.SIGKILL); process.wait()
    assert finished(tmp_path/'cut', FIRST) == whole


def test_it_is_judged_by_its_own_claims(home, monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    import toy_system
    quantities = toy_system.trial(home/'figures')
    assert quantities == home/'figures'/'8_toy'/'quantities_80_repaint.csv'
    records = sorted((records_dir()/'8_toy'/'80_repaint').glob('plain-s*-????????????.json'))
    assert len(records) == 3 and read_sealed(records[0])['config']['task'] == 'Repaint'
    claims = home/'data'/'claims'; claims.mkdir()
    pd.DataFrame([CLAIM]).to_csv(claims/'toy.csv', index=False)
    row, = read_claims().itertuples()
    found = read_quantities(home/'figures')
    assert judge(row, found)['verdict'] == ''                      # photographs of scikit-image are a demonstration
    found['toy.mse']['data'] = 'photographs'
    assert judge(row, found)['verdict'] == 'does not hold'
    right = row._replace(value=round(found['toy.mse']['value'], 1), paper='')
    assert judge(right, found)['verdict'] == 'holds'


def test_a_process_with_the_engine_alone_opens_a_run_of_any_chapter(home):
    from asamoe.denoising import HEADLINE
    from asamoe.training import fit
    config = HEADLINE.but(epochs=1, batch_size=16, model_args=dict(embed_dim=16, depth=1))
    run = fit(config, load_source('photos').split(32, 8, 8), progress=False)
    code = ("from asamoe.training import *; import sys; assert 'asamoe.denoising' not in sys.modules\n"
            f"r = record_of('{run.id}'); c = config_of(r)\n"
            "net = build_model(c.model, r['homes']['model'], **c.model_args)\n"
            "net.load_state_dict(read_weights(r)); print(c.task.sigma)")
    environment = os.environ | dict(ASAMOE_ROOT=str(home))
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == '0.2', done.stderr
