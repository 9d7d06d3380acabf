"Trained weights, computed exactly: the bundled ones anywhere, the released ones where they lie beside the clone."
import json
from pathlib import Path

import numpy as np, pytest, torch

from asamoe import model as chapter
from asamoe.attention import AdaptiveAttentionMoE, load_balance_loss, naive_mixture
from asamoe.core import WeightsError
from asamoe.data import evaluation_noisy, load_source
from asamoe.model import SmallViT, load_model, naive_forward
from asamoe.training import build_model

PAPER = Path(chapter.__file__).parent/'weights'/'paper'
PARITY = Path(__file__).with_name('parity.npz')


def by_the_letter(model, noisy):
    "The denoised images and each block's routing, by loops and gathers, in float64."
    model, routings = model.double(), []
    tokens = model.patch_embed(noisy.double()).flatten(2).mT + model.pos_embed
    for block in model.blocks:
        out, routing = naive_mixture(block.attn, block.norm1(tokens))
        tokens = tokens + out
        tokens = tokens + block.ffn(block.norm2(tokens))
        routings.append(routing)
    side = model.image_size//model.patch_size
    return model.patch_unembed(tokens.mT.unflatten(2, (side, side))).clamp(0, 1), routings


@torch.no_grad()
def write_parity(n=6):
    "Make parity.npz anew, with `n` shipped photographs: python -c 'import test_model; test_model.write_parity()'"
    images = load_source('photos').test
    images = images[::len(images)//n][:n]
    noisy = evaluation_noisy(images, .2).half()                    # exact in float64, and small
    denoised, routings = by_the_letter(load_model(PAPER), noisy)
    balance = [load_balance_loss(r).item() for r in routings]
    np.savez_compressed(PARITY, noisy=noisy.numpy(), denoised=denoised.float().numpy(), load_balance=balance,
                        **{f'routing{i}': r.float().numpy() for i, r in enumerate(routings)})


@torch.no_grad()
def apart(model, known):
    "The largest differences from what is `known`: of the images, the routing, the load-balance losses."
    denoised, routings = model(torch.tensor(known['noisy']).float(), return_routing=True)
    routing = max(np.abs(r.numpy() - known[f'routing{i}']).max() for i, r in enumerate(routings))
    balance = np.abs([load_balance_loss(r).item() for r in routings] - known['load_balance']).max()
    return np.abs(denoised.numpy() - known['denoised']).max(), routing, balance


def test_parity_with_the_bundled_weights():
    image, routing, balance = apart(load_model(PAPER), np.load(PARITY))
    assert image < 1e-5 and routing < 1e-5 and balance < 1e-7


@pytest.mark.parametrize('change', [dict(budgets=(31, 64, 128)), dict(num_heads=8), dict(selection='blocks')], ids=str)
def test_parity_notices_a_wrong_operator(change):
    image, routing, _ = apart(load_model(PAPER, **change), np.load(PARITY))
    assert image > 1e-4 and routing > 1e-4                         # ten times what parity allows


def test_the_fixture_follows_from_the_bundled_weights():
    known = np.load(PARITY)
    with torch.no_grad(): denoised, routings = by_the_letter(load_model(PAPER), torch.tensor(known['noisy'][:2]))
    assert np.abs(denoised.numpy() - known['denoised'][:2]).max() < 1e-6
    for i, routing in enumerate(routings): assert np.abs(routing.numpy() - known[f'routing{i}'][:2]).max() < 1e-6


def test_parity_with_the_released_weights(reference):
    model = load_model(reference/'upstream'/'best_denoising_model_proper.pt')
    image, routing, balance = apart(model, np.load(reference/'upstream'/'parity.npz'))
    assert image < 1e-5 and routing < 1e-5 and balance < 1e-7


def test_parameter_counts():
    count = lambda **a: sum(p.numel() for p in build_model('SmallViT', **a).parameters())
    assert [count(), count(attention='standard'), count(attention='nonadaptive')] == [599_689, 285_571, 582_787]


def test_fast_equals_naive_below_and_above_the_budgets():
    for image_size, patch_size in ((16, 4), (32, 4), (32, 2)):
        torch.manual_seed(image_size)
        model = SmallViT(image_size, patch_size, budgets=(8, 13, 200)).eval()
        x = torch.rand(2, 3, image_size, image_size)
        with torch.no_grad(): assert (model(x) - naive_forward(model, x)).abs().max() < 1e-5


def test_budget_below_tokens_changes_the_result():
    "Guards the comparison above: an operator that ignored its budget would pass it only if the reference did too."
    torch.manual_seed(0)
    moe, x = AdaptiveAttentionMoE(budgets=(4, 8)), torch.randn(1, 64, 128)
    few = moe(x)
    for expert in moe.experts: expert.budget = 64
    assert (few - moe(x)).abs().max() > 1e-3
    assert (moe(x) - naive_mixture(moe, x)[0]).abs().max() < 1e-5


def test_clamped_outputs_get_no_gradient():
    model = SmallViT(clamp='train')
    torch.nn.init.constant_(model.patch_unembed.bias, -100.)
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    assert model.patch_unembed.weight.grad.abs().max() == 0


SMALL = dict(image_size=16, embed_dim=32, num_heads=2, depth=1)
KINDS = [dict(attention=a) for a in ('adaptive', 'nonadaptive', 'standard', 'standard+merge')] + [
    dict(router='random'), dict(router='constant'), dict(shared_keys=True, routing='top1'), dict(budgets=(3, 5))]

@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_a_saved_folder_gives_back_the_model(kind, tmp_path):
    model, x = SmallViT(**SMALL, **kind).eval(), torch.rand(1, 3, 16, 16)
    model.save_pretrained(tmp_path)
    with torch.no_grad(): assert torch.equal(load_model(tmp_path)(x), model(x))


@pytest.mark.parametrize('config, says', [
    ('{"embed_dim"', 'is damaged'), ('[1]', 'is damaged'), ('{"embed_dim": 128}', 'another model'),
    ('{"embed_dim": "wide"}', 'another model'), (None, 'has no config.json')])
def test_a_folder_that_does_not_fit_gets_a_sentence(config, says, tmp_path):
    SmallViT(**SMALL).save_pretrained(tmp_path)
    if config is None: (tmp_path/'config.json').unlink()
    else: (tmp_path/'config.json').write_text(config)
    with pytest.raises(WeightsError, match=says): load_model(tmp_path)


def test_weights_of_another_network_are_refused():
    with pytest.raises(WeightsError, match='another model'): load_model(PAPER.parent/'photo')
    assert 'budgets' not in json.loads((PAPER/'config.json').read_text())      # inferred from the tensors
    assert [e.budget for e in load_model(PAPER).blocks[0].attn.experts] == [32, 64, 128]
