"The released weights, computed exactly."
import numpy as np, torch

from asamoe.attention import AdaptiveAttentionMoE, load_balance_loss, naive_mixture
from asamoe.model import SmallViT, load_model, naive_forward


def test_parity_with_the_released_weights(reference):
    known = np.load(reference/'upstream'/'parity.npz')
    model = load_model(reference/'upstream'/'best_denoising_model_proper.pt')
    with torch.no_grad(): denoised, routings = model(torch.tensor(known['noisy']), return_routing=True)
    assert np.abs(denoised.numpy() - known['denoised']).max() < 1e-5
    for i, routing in enumerate(routings): assert np.abs(routing.numpy() - known[f'routing{i}']).max() < 1e-5
    assert np.allclose([load_balance_loss(r).item() for r in routings], known['load_balance'], atol=1e-7)


def test_parameter_counts():
    count = lambda **a: sum(p.numel() for p in SmallViT(**a).parameters())
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
