"Attention in somebody else's hands: masks against plain formulas, every use of the table, swaps in one line."
import itertools, math, re, shutil
from importlib.util import find_spec
from pathlib import Path

import pytest, torch, torch.nn as nn
import torch.nn.functional as F

from asamoe.attention import (LONG, USES, AdaptiveAttentionMoE, Ours, RoutedMHA, collect_routing, load_balance_loss,
                              outcome, replace_attention)
from asamoe.blocks import KEY_BLOCK, QUERY_BLOCK, block_attention
from asamoe.core import AsamoeError
from asamoe.data import import_torchvision
from asamoe.model import SmallViT
from asamoe.topk import masked_topk_attention, topk_attention, topk_forward

README = Path(__file__).resolve().parent.parent/'README.md'


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def qkv(B, h, M, N, d=8, dtype=torch.double, kv_heads=None):
    g, shapes = seeded(M + N), [(h, M), (kv_heads or h, N), (kv_heads or h, N)]
    draw = lambda heads, n: torch.randn(B, heads, n, d, generator=g, dtype=torch.double).to(dtype)
    return [draw(*shape).requires_grad_() for shape in shapes]


def masks(B, h, M, N):
    g = seeded(1)
    draw = lambda *shape: torch.rand(*shape, generator=g)
    holes = draw(M, N) < .02                                       # rows that may see nothing at all
    some = torch.zeros(M, N).masked_fill(draw(M, N) < .5, -math.inf)
    return {'none': None, 'padding': draw(B, 1, 1, N) < .7, 'boolean': draw(B, h, M, N) < .5, 'nothing': holes,
            'added': torch.randn(h, M, N, generator=g), 'added -inf': some}


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: .05, torch.float16: .01}


def agree(one, other, inputs, tolerance):
    "Values and gradients are the same: exactly in float64, and but for keys that all but tie in less."
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = one(*inputs), other(*exact)
    assert out.dtype == inputs[0].dtype and out.isfinite().all()
    apart = (out.double() - expected).abs().amax(-1)
    assert (apart > tolerance).double().mean() <= (0 if tolerance < 1e-6 else .002)
    target = torch.randn(out.shape, generator=seeded(2))
    grads = [torch.autograd.grad((o*target.to(o.dtype)).sum(), x) for o, x in ((out, inputs), (expected, exact))]
    for a, b in zip(*grads): assert a.isfinite().all() and (a.double() - b).norm() <= 5*tolerance*(b.norm() + 1)


@pytest.mark.parametrize('dtype, threads', [*((dtype, 1) for dtype in TOLERANCE), (torch.float32, 2)], ids=str)
def test_top_k_with_masks_equals_its_formula(dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for (B, h, g, M, N), causal in itertools.product([(2, 4, 2, 33, 33), (1, 2, 1, 170, 300)], (False, True)):
        for mask in masks(B, h, M, N).values():
            for budget in (1, 9, N)[:3 if M == N else 2]:
                wide = mask.double() if mask is not None and mask.is_floating_point() else mask
                def plain(q, k, v):
                    k, v = (x.repeat_interleave(h//g, 1) for x in (k, v))
                    return masked_topk_attention(q, k, v, budget, wide, causal)
                agree(lambda *x: topk_attention(*x, budget, attn_mask=mask, is_causal=causal), plain,
                      qkv(B, h, M, N, 8, dtype, g), TOLERANCE[dtype])
    torch.set_num_threads(before)


def test_the_plain_formula_is_scaled_dot_product_attention_with_a_mask():
    q, k, v = qkv(2, 3, 20, 30)
    for mask, causal in itertools.product(masks(2, 3, 20, 30).values(), (False, True)):
        seen = torch.zeros(20, 30) if mask is None else mask
        if seen.dtype == torch.bool: seen = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
        if causal: seen = seen.masked_fill(torch.ones(20, 30).triu(1).bool(), -math.inf)
        scores = q @ k.mT/math.sqrt(8) + seen
        kept = seen.masked_fill(scores < scores.topk(4).values[..., -1:], -math.inf)
        expected = F.scaled_dot_product_attention(q, k, v, kept.double())
        torch.testing.assert_close(masked_topk_attention(q, k, v, 4, mask, causal), expected, atol=1e-9, rtol=0)


def blocks_by_definition(q, k, v, budget, mask=None, causal=False):
    "Block attention by its definition, in loops: means of blocks, then a mask over all keys, then softmax."
    (B, h, M, _), N, scale = q.shape, k.shape[2], q.shape[3]**-.5
    bias = torch.zeros(B, h, M, N, dtype=q.dtype) if mask is None else torch.zeros(B, h, M, N, dtype=q.dtype) + \
        (torch.zeros(mask.shape).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask)
    of_keys = mask is not None and mask.ndim > 1 and mask.shape[-2] == 1
    seen = torch.zeros(B, h, M, N, dtype=torch.bool)
    for b, head, first in itertools.product(range(B), range(h), range(0, M, QUERY_BLOCK)):
        rows, scores = slice(first, min(M, first + QUERY_BLOCK)), []
        query = q[b, head, first] if causal else q[b, head, rows].sum(0)/min(QUERY_BLOCK, M)
        for start in range(0, N, KEY_BLOCK):
            there = bias[b, head, rows, start:start + KEY_BLOCK]
            keys = k[b, head, start:start + KEY_BLOCK]
            if of_keys: keys = keys[there[0] > -math.inf]
            mean = keys.mean(0) if len(keys) else torch.zeros_like(query)
            scores.append((query @ mean*scale + there.max()).item())
        scores, past = torch.tensor(scores), first//KEY_BLOCK if causal else len(scores)
        for block in scores[:past].argsort(descending=True)[:-(-budget//KEY_BLOCK)]:
            seen[b, head, rows, block*KEY_BLOCK:(block + 1)*KEY_BLOCK] = True
        if causal: seen[b, head, rows, first:] = True
    if causal: seen &= torch.ones(M, N).tril().bool()
    return F.scaled_dot_product_attention(q, k, v, bias.masked_fill(~seen, -math.inf))


@pytest.mark.parametrize('M, N, budget', [(33, 33, 16), (130, 130, 40), (70, 200, 32), (200, 70, 17)])
@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('kind', ['none', 'padding', 'boolean', 'nothing', 'added', 'added -inf'])
def test_blocks_with_masks_equal_their_definition(kind, causal, M, N, budget):
    mask = masks(2, 2, M, N)[kind]
    agree(lambda *x: block_attention(*x, budget, attn_mask=mask, is_causal=causal),
          lambda *x: blocks_by_definition(*x, budget, mask, causal), qkv(2, 2, M, N), 1e-9)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_blocks_with_masks_in_less_precision(dtype):
    for mask, causal in itertools.product(masks(2, 2, 130, 130).values(), (False, True)):
        agree(lambda *x: block_attention(*x, 40, attn_mask=mask, is_causal=causal),
              lambda *x: blocks_by_definition(*x, 40, mask, causal), qkv(2, 2, 130, 130, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.parametrize('attention', [topk_attention, block_attention])
def test_nothing_that_comes_later_has_any_influence(attention):
    q, k, v = (x.detach() for x in qkv(1, 2, 300, 300))
    out = attention(q, k, v, 32, is_causal=True)
    for n in (1, 63, 64, 65, 200):
        changed = [torch.cat([x[:, :, :n], torch.randn(1, 2, 300 - n, 8, dtype=x.dtype)], 2) for x in (q, k, v)]
        torch.testing.assert_close(attention(*changed, 32, is_causal=True)[:, :, :n], out[:, :, :n])


@pytest.mark.parametrize('attention', [topk_attention, block_attention])
def test_shared_heads_layout_scale_and_other_lengths(attention):
    q, k, v = qkv(2, 4, 40, 100, kv_heads=2)
    out = attention(q, k, v, 32)
    repeated = attention(q, *(x.repeat_interleave(2, 1) for x in (k, v)), 32)
    torch.testing.assert_close(out, repeated)
    swapped = attention(*(x.transpose(1, 2) for x in (q, k, v)), 32, layout='bnhd')
    torch.testing.assert_close(swapped.transpose(1, 2), out)
    torch.testing.assert_close(attention(2*q, k, v, 32, scale=.5/math.sqrt(8)), out)
    torch.testing.assert_close(attention(q, k, v[..., :5], 32), out[..., :5])
    with pytest.raises(AsamoeError, match='layout'): attention(q, k, v, 32, layout='nbhd')


@pytest.mark.parametrize('attention', [topk_attention, block_attention])
@pytest.mark.parametrize('change, says', [
    (dict(budget=0), 'at least 1'), (dict(budget=-3), 'at least 1'), (dict(budget=1.5), 'whole number'),
    (dict(budget=True), 'whole number'), (dict(q=torch.zeros(3, 4, 10, 8)), 'do not fit'),
    (dict(k=torch.zeros(2, 4, 11, 8)), 'do not fit'), (dict(q=torch.zeros(2, 4, 10, 9)), 'do not fit'),
    (dict(k=torch.zeros(2, 3, 10, 8), v=torch.zeros(2, 3, 10, 8)), 'cannot share'),
    (dict(q=torch.zeros(4, 10, 8)), 'four axes'), (dict(q=torch.zeros(2, 4, 10, 8).half()), 'one floating type'),
    (dict(q=torch.zeros(2, 4, 10, 8, device='meta')), 'devices'), (dict(attn_mask=torch.ones(9)), 'does not fit'),
    (dict(k=torch.zeros(2, 4, 0, 8), v=torch.zeros(2, 4, 0, 8)), 'at least one'),
    (dict(attn_mask=torch.ones(10, 10).int()), 'boolean'), (dict(dropout_p=1.), 'dropout_p')], ids=str)
def test_what_cannot_be_right_is_refused_in_a_sentence(attention, change, says):
    arguments = {name: torch.zeros(2, 4, 10, 8) for name in 'qkv'} | dict(budget=4) | change
    with pytest.raises(AsamoeError, match=says) as e: attention(**arguments)
    assert str(e.value).count('\n') == 0


def test_the_operator_is_one_of_pytorch():
    q, k, v = qkv(2, 1, 4, 5, 2)
    budgets, mask = torch.randint(1, 5, (2, 1, 4), generator=seeded()), torch.rand(2, 1, 4, 5, generator=seeded()) < .8
    for budget, each, hidden, causal in [(3, None, None, False), (3, None, mask, True), (0, budgets, None, False)]:
        torch.library.opcheck(topk_forward, (q, k, v, budget, each, hidden, causal, .5, True))
        torch.autograd.gradcheck(lambda *x: topk_forward(*x, budget, each, hidden, causal, .5, True)[0], (q, k, v))
    torch.autograd.gradgradcheck(lambda *x: topk_forward(*x, 3, None, mask, True, .5, True)[0], (q, k, v))


QUICK = ('test_schema', 'test_autograd_registration', 'test_faketensor')


@pytest.mark.parametrize('checks', [QUICK, pytest.param(('test_aot_dispatch_dynamic',), marks=pytest.mark.slow)])
def test_attention_over_blocks_is_an_operator_too(checks):
    q, k, v = qkv(1, 2, 70, 70, 4)
    for options in (dict(is_causal=True), dict(attn_mask=torch.rand(70, 70, generator=seeded()) < .8, scale=.3)):
        torch.library.opcheck(torch.ops.asamoe.block_attention, (q, k, v, 32), options, test_utils=checks)
        same = block_attention(q, k, v, 32, **options)
        torch.testing.assert_close(torch.ops.asamoe.block_attention(q, k, v, 32, **options), same)


def test_the_operator_keeps_its_word_about_strides():
    q, k, v = (x.detach().mT.contiguous().mT.requires_grad_() for x in qkv(1, 3, 8, 8, 4))       # one image, in any order
    assert not q.is_contiguous()
    torch.library.opcheck(topk_forward, (q, k, v, 3, None, None, False, .5, True))
    out = topk_forward(q, k, v, 3, None, None, False, .5, True)[0]
    assert all(g.is_contiguous() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_dropout_keeps_the_mean_and_an_additive_mask_learns():
    q, k, v = (x.detach() for x in qkv(64, 4, 20, 20))
    for attention in (topk_attention, block_attention):
        dropped, whole = attention(q, k, v, 16, dropout_p=.3), attention(q, k, v, 16)
        assert not torch.equal(dropped, whole) and (dropped - whole).mean().abs() < .01
    mask = torch.zeros(20, 20, dtype=torch.double, requires_grad=True)
    for attention, budget in [(topk_attention, 5), (block_attention, 16)]:
        grad, = torch.autograd.grad(attention(q, k, v, budget, attn_mask=mask).square().sum(), mask)
        assert grad.abs().max() > 0 and grad.isfinite().all()


VARIANTS = {'soft': {}, 'top-1': dict(routing='top1'), 'top-1, shared': dict(routing='top1', shared_keys=True),
            'blocks': dict(selection='blocks'), 'blocks, top-1': dict(selection='blocks', routing='top1')}
STRAIGHT_THROUGH = ('gradcheck in float64', 'forward-mode derivative: torch.func.jvp')      # not the values' gradient
SAYS = {'is_causal: what follows has no influence': 'never causal', 'torch.export of open batch and N': 'fixed number',
        'padding on the left and is_causal: nothing is NaN': 'never causal',
        'ONNX of open batch and N, in onnxruntime': 'fixed number'}


def slow(variant, what):
    "Chapter 12 asks soft and top-1 all but the long rows on every run; of these one variant is enough."
    return variant != 'soft' if what in LONG else variant in ('soft', 'top-1')


ROWS = [pytest.param(variant, what, marks=[pytest.mark.slow]*slow(variant, what))
        for variant in VARIANTS for what in USES]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('variant, what', ROWS)
def test_each_row_of_the_table(variant, what):
    if 'top-1' in variant and what in STRAIGHT_THROUGH: pytest.skip('top-1 routing has a straight-through gradient')
    if 'timm' in what: import_torchvision()
    said = outcome(what, Ours(**VARIANTS[variant]))
    if said.startswith('not installed'): pytest.skip(said)
    in_words = variant == 'blocks, top-1' and what in SAYS
    expected = 'refuses' if what.endswith('refused') else 'says' if in_words else 'works'
    assert said.startswith(expected) and (expected != 'says' or SAYS[what] in said), said


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('variant, backend', [
    ('top-1', 'aot_eager'), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in itertools.product(
        ['soft', 'top-1', 'blocks, top-1'], ['aot_eager', 'inductor']) if pair != ('top-1', 'aot_eager'))])
def test_compiled_to_the_end(variant, backend):
    if backend == 'inductor' and not (shutil.which('g++') or shutil.which('clang++')): pytest.skip('no C++ compiler')
    USES['torch.compile(fullgraph=True), forward and backward'](Ours(**VARIANTS[variant]), backend)


def test_the_model_works_in_inference_mode_on_all_cores():
    model, x, before = SmallViT(budgets=(8, 16, 32)).eval(), torch.rand(64, 3, 32, 32), torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.inference_mode(): out = model(x)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    torch.testing.assert_close(out, model(x))


def test_weights_drawn_anew_are_those_of_a_new_layer():
    for options in ({}, dict(routing='top1'), dict(router='random', shared_keys=True)):
        torch.manual_seed(3); new = AdaptiveAttentionMoE(32, 4, **options)
        torch.manual_seed(4); old = AdaptiveAttentionMoE(32, 4, **options)
        torch.manual_seed(3); old.reset_parameters()
        for a, b in zip(new.state_dict().values(), old.state_dict().values()): assert torch.equal(a, b)


def test_biases_types_and_names():
    layer = AdaptiveAttentionMoE(32, 4, (4, 8), qkv_bias=False, dtype=torch.bfloat16, proj_drop=.5)
    assert layer.experts[0].W_q.bias is None and layer.merge_proj.weight.dtype == torch.bfloat16
    assert 'budgets=(4, 8)' in repr(layer) and layer(torch.randn(2, 9, 32).bfloat16()).shape == (2, 9, 32)
    names = {re.sub(r'experts\.\d', 'experts.e', n) for n in AdaptiveAttentionMoE(32, 4).state_dict()}
    layers = ['router.routing_net.0', 'router.routing_net.2', 'merge_proj']
    layers += [f'experts.e.W_{w}' for w in ('q', 'k', 'v', 'out')]
    assert names == {f'{layer}.{p}' for layer in layers for p in ('weight', 'bias')}


@pytest.mark.parametrize('routing', ['soft', 'top1'])
@pytest.mark.parametrize('bias', [True, False])
def test_a_dense_layer_taken_over_gives_equal_outputs_at_full_budget(routing, bias):
    mha, x = nn.MultiheadAttention(32, 4, bias=bias, batch_first=True).eval(), torch.randn(2, 40, 32)
    ours = AdaptiveAttentionMoE.from_mha(mha, (40, 64), routing=routing)
    torch.testing.assert_close(ours(x), mha(x, x, x)[0], atol=1e-5, rtol=0)
    with pytest.raises(AsamoeError, match='self-attention'): RoutedMHA(ours)(x, x + 1, x)


@pytest.mark.parametrize('bias', [True, False])
def test_a_layer_of_timm_taken_over_gives_equal_outputs_at_full_budget(bias):
    import_torchvision()
    timm, x = pytest.importorskip('timm', exc_type=ImportError), torch.randn(2, 40, 32)
    dense = timm.layers.Attention(32, 4, qkv_bias=bias).eval()
    ours = AdaptiveAttentionMoE.from_timm(dense, (40, 64), qkv_bias=True)
    torch.testing.assert_close(ours(x), dense(x), atol=1e-5, rtol=0)
    with pytest.raises(AsamoeError, match='norms'):
        AdaptiveAttentionMoE.from_timm(timm.layers.Attention(32, 4, qk_norm=True, norm_layer=nn.LayerNorm))


def test_a_whole_encoder_in_one_call():
    x, padding = torch.randn(2, 40, 32), torch.arange(40).expand(2, 40) >= 30
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    later = nn.Transformer.generate_square_subsequent_mask(40)
    kinds = [dict(src_key_padding_mask=padding), dict(mask=later, is_causal=True), dict(mask=later),
             dict(mask=later.isinf())]
    before = [encoder(x, **kind)[:, :30] for kind in kinds]
    replace_attention(encoder, (40, 64))
    for kind, dense in zip(kinds, before):
        torch.testing.assert_close(encoder(x, **kind)[:, :30], dense, atol=1e-5, rtol=0)
    with collect_routing(encoder) as routings: encoder(x).sum().backward()
    assert len(routings) == 2 and sum(map(load_balance_loss, routings)).requires_grad
    assert all(p.grad is not None for p in encoder.layers[0].self_attn.moe.experts[0].parameters())


def test_the_example_of_the_readme_runs_as_printed():
    if not find_spec('timm'): pytest.skip('the extra timm is not installed')
    begins = 'import torch\nfrom asamoe.attention import import_timm'
    example, = re.findall(rf'```python\n({begins}.*?)```', README.read_text(), re.S)
    namespace = {}
    exec(example, namespace)
    assert len([line for line in example.splitlines() if line]) == 5
    assert namespace['logits'].shape == (2, 1000) and not namespace['vit'].training
