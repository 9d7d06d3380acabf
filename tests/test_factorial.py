"The factorial experiment goes as planned: rates before seeds, groups in order, nothing that is not written down."
import re
from types import SimpleNamespace

import pandas as pd, pytest

import asamoe.paper.factorial as factorial
from asamoe.core import get_preset, root
from asamoe.data import load_source
from asamoe.denoiser.contest import DENOISER
from asamoe.training import run_id

PAPER = get_preset('paper')


@pytest.fixture
def kept(monkeypatch):
    "What is chosen, kept in a dict in the place of the committed record."
    costs = {name: 100. for name in factorial.costed()} | {f'{w} channels': .75*w for w in factorial.WIDTHS}
    kept = dict(costs=costs | dict(learned=150.))
    def chosen(what, make=None, publish=True):
        if make: kept[what] = make()
        return kept.get(what) or {}
    monkeypatch.setattr(factorial, 'chosen', chosen)
    return kept


def trained(training):
    "A stand-in for a run: its best learning rate is 0.004, but for the dense arm, where it is 0.001."
    best = .001 if training.variant.startswith('dense,') else .004
    return SimpleNamespace(history=pd.DataFrame(dict(val_psnr=[20 - abs(training.config.lr - best)])))


def test_the_plan_unfolds_group_by_group(kept):
    source, order = load_source('photos'), []
    runs = factorial.gather(PAPER, source, lambda t: order.append(t.variant) or trained(t))
    count = {group: len(arms)*n for group, (arms, n) in factorial.GROUPS.items()}
    assert {g: sum(k[0] == g and k[2] > 0 for k in runs) for g in count} == count
    begun = list(dict.fromkeys(order))
    assert begun[:7] == [*(f'{a}, lr {lr:g}' for a in ('constant', 'learned') for lr in factorial.RATES), 'constant']
    assert begun.index('learned') < begun.index('dense, lr 0.002') < begun.index('dense, lr 0.0005') < begun.index('dense')
    planned = factorial.factorial(PAPER, source)
    assert planned['steps', 'dense', 1].config.lr == .001 and planned['first question', 'learned', 1].config.lr == .004
    assert planned['dense peers', 'equal cost', 1].config.model_args['embed_dim'] == 200
    assert len({t.id for t in planned.values()}) == len(planned), 'every training is another one'


def test_nothing_is_begun_without_the_rates_and_costs_that_it_rests_on(kept):
    assert {k[0] for k in factorial.planned_keys(PAPER)} == {'first question'}
    assert all(seed == 0 for *_, seed in factorial.planned_keys(PAPER))
    kept['rates'] = {arm: [[.002, 1], [.004, 2], [.008, 1]] for arm in factorial.ARMS}
    del kept['costs']
    assert {k[0] for k in factorial.planned_keys(PAPER)} == {'first question', 'steps'}


def test_the_code_is_what_the_plan_says():
    plan = (root()/'data'/'plans'/'factorial.md').read_text()
    assert re.findall(r'^\| ([\w -]+) \| (?!what)', plan.split('**Learning rates')[0], re.M) == list(factorial.ARMS)
    assert f'margin of equivalence is {factorial.MARGIN} dB' in plan and len(factorial.CONTRASTS) == 9
    assert '; '.join(', '.join(map(str, b)) for b in factorial.EXPERTS.values()) in plan
    assert [n for _, n in factorial.GROUPS.values()] == [16, 16, 16, 8, 5, 5, 5, 5]
    c = factorial.factorial_config('learned', 1)
    assert c.epochs*c.epoch_images == 75_000 and c.task == DENOISER.task and c.task.load_balance == 0
    told = SimpleNamespace(train=(part := SimpleNamespace(fingerprint_with=lambda beside: 'a'*16)), val=part)
    assert run_id(c.but(model='AdaptiveUNet', model_args={}, lr=2e-3, seed=0, epoch_images=0, batch_size=32),
                  told) == run_id(DENOISER, told), "the contest's recipe"
