"Every fast path equals its plain formula, forward and gradient, odd sizes and extremes included."
import math, os, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch
import torch.nn.functional as F

from asamoe import blocks
from asamoe.attention import AdaptiveAttentionMoE, dispatch, group_size
from asamoe.blocks import KEY_BLOCK, QUERY_BLOCK, block_attention, z_order
from asamoe.clock import peak_memory
from asamoe.data import evaluation_noisy, load_source, to_float
from asamoe.model import SmallViT, load_model, naive_forward
from asamoe.topk import kth_largest, masked_topk_attention, naive_topk_attention, pieces, topk_attention


def qkv(B, h, N, d, M=None, dtype=torch.double, scale=1.):
    g = torch.Generator().manual_seed(N)
    draw = lambda n: (scale*torch.randn(B, h, n, d, generator=g, dtype=torch.double)).to(dtype).requires_grad_()
    return draw(M or N), draw(N), draw(N)


def agree(one, other, inputs, atol=1e-9):
    "Forward and gradient of two functions are the same."
    outs = [f(*inputs) for f in (one, other)]
    torch.testing.assert_close(*outs, atol=atol, rtol=0)
    target = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(1)).to(outs[0])
    for a, b in zip(*(torch.autograd.grad((o*target).sum(), inputs) for o in outs)):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param                # the pool of workers leaves the setting alone
    torch.set_num_threads(before)


@pytest.mark.parametrize('B, h, N, M, budget', [
    (1, 1, 1, 1, 1), (2, 3, 7, 7, 1), (2, 3, 7, 7, 6), (2, 3, 7, 7, 7), (2, 3, 7, 7, 99), (3, 2, 65, 65, 33),
    (70, 2, 64, 64, 32), (1, 2, 700, 700, 128), (2, 2, 100, 37, 9), (2, 2, 9, 200, 4)])
def test_exact_equals_its_formula(B, h, N, M, budget, threads):
    inputs = qkv(B, h, N, 8, M)
    agree(lambda *x: topk_attention(*x, budget), lambda *x: masked_topk_attention(*x, budget), inputs)
    if M == N: agree(lambda *x: topk_attention(*x, budget), lambda *x: naive_topk_attention(*x, budget), inputs)


def test_exact_is_cut_into_pieces_that_cover_everything():
    for H, M, N in [(1, 1, 1), (5, 64, 64), (300, 64, 64), (3, 1000, 700), (2, 3, 400_000)]:
        seen = np.zeros((H, M), int)
        for heads, rows in pieces(H, M, N): seen[heads, rows] += 1
        assert (seen == 1).all()


def test_ties_at_the_threshold_are_all_kept():
    k = torch.tensor([3., 1, 2, 2, 2]).view(1, 1, 5, 1)
    v = torch.eye(5)[None, None]
    weights = topk_attention(torch.ones(1, 1, 1, 1), k, v, 2)
    assert ((weights > 0)[0, 0, 0] == torch.tensor([1, 0, 1, 1, 1]).bool()).all()
    torch.testing.assert_close(weights, masked_topk_attention(torch.ones(1, 1, 1, 1), k, v, 2))
    nothing = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 9, 2)                # all scores equal: dense
    same = topk_attention(*nothing, torch.randn(1, 1, 9, 2), 3)
    assert same.std(2).max() == 0 and torch.isfinite(same).all()


@pytest.mark.parametrize('k', [1, 2, 500, 999, 1000])
def test_threshold(k):
    scores = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    scores[0] = 0; scores[1] = torch.randn(1000).round(); scores[2] *= 1e30; scores[3] *= 1e-42
    assert torch.equal(kth_largest(scores, k), scores.topk(k).values[:, -1:])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('attention', [topk_attention, block_attention], ids=['exact', 'blocks'])
def test_half_precision_neither_overflows_nor_ties(attention, dtype):
    for scale in (1e-3, 1, 100):                                   # at 100 scores pass 65,504, the end of float16
        inputs = qkv(2, 2, 130, 32, dtype=dtype, scale=scale)
        out = attention(*inputs, 32)
        assert out.dtype == dtype and torch.isfinite(out).all()
        torch.testing.assert_close(out.float(), attention(*(x.float() for x in inputs), 32), atol=.02*scale, rtol=.02)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.float().square().mean(), inputs))


def test_4096_tokens_within_a_gibibyte():
    inputs = [x.detach() for x in qkv(1, 4, 4096, 32, dtype=torch.float32)]
    assert peak_memory(lambda: topk_attention(*inputs, 128)) < 64
    trained = [x.requires_grad_() for x in inputs]
    assert peak_memory(lambda: topk_attention(*trained, 128).sum().backward()) < 1024


def masked_blocks(q, k, v, budget):
    "`block_attention` by its definition: all scores, then a mask of the kept blocks."
    N, n = k.shape[2], -(-budget//KEY_BLOCK)
    if n*KEY_BLOCK >= N: return F.scaled_dot_product_attention(q, k, v)
    means = lambda x, size: torch.stack([part.mean(2) for part in x.split(size, 2)], 2)
    pooled = means(q, QUERY_BLOCK) @ means(k, KEY_BLOCK).mT
    kept = torch.zeros_like(pooled, dtype=torch.bool).scatter_(-1, pooled.topk(n).indices, True)
    mask = kept.repeat_interleave(QUERY_BLOCK, 2)[:, :, :q.shape[2]].repeat_interleave(KEY_BLOCK, 3)[..., :N]
    return (q @ k.mT/math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize('N, M, budget', [
    (1, 1, 1), (15, 15, 1), (17, 17, 1), (64, 64, 16), (65, 65, 40), (130, 130, 128), (256, 256, 128), (200, 200, 1),
    (100, 100, 500), (97, 10, 20), (33, 150, 32)])
def test_blocks_equal_their_definition(N, M, budget):
    inputs = qkv(2, 3, N, 8, M)
    agree(lambda *x: block_attention(*x, budget), lambda *x: masked_blocks(*x, budget), inputs)


def test_blocks_of_several_owners():
    q, k, v = (x.detach() for x in qkv(2, 2, 100, 8))
    owner = torch.tensor([1, 0, 1])
    for budget in (32, 200):
        theirs = block_attention(q, k, v, budget)[owner]
        torch.testing.assert_close(block_attention(q[owner], k, v, budget, owner), theirs)


@pytest.fixture
def triton(): return pytest.importorskip('triton', reason="Triton is not installed; pip install 'asamoe[gpu]'")


KERNEL_CASES = [(70, 70, 16, 32, None, torch.float32, 1e-5), (33, 10, 48, 17, [1, 0, 1], torch.float32, 1e-5),
                (100, 130, 32, 40, [1, 1, 0], torch.float16, 4e-3), (256, 64, 128, 128, None, torch.float16, 4e-3),
                (150, 37, 112, 65, [0, 1], torch.bfloat16, 3e-2), (48, 1, 64, 1, None, torch.bfloat16, 3e-2)]


def forward_and_gradients(inputs, budget, owner):
    q, k, v = inputs
    out = blocks.block_attention(q if owner is None else q[owner], k, v, budget, owner)
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    return [out.detach(), *torch.autograd.grad((out.double()*target).sum(), inputs)]


def interpreted_kernels():
    "Run in a process of its own: Triton's interpreter is chosen on import."
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder
    dot = InterpreterBuilder.create_dot                            # multiplies the bit patterns of bfloat16
    widen = lambda self, x: self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widen(self, a), widen(self, b), *rest)
    blocks.wide_blocks, choose = blocks.attend_blocks, blocks.choose_blocks      # half precision, though on the CPU
    for N, M, d, budget, owner, dtype, atol in KERNEL_CASES:
        owner = None if owner is None else torch.tensor(owner)
        inputs = [x.detach().to(dtype).requires_grad_() for x in qkv(2, 3, N, d, M)]
        blocks.kernel_takes, blocks.choose_blocks = lambda *qkv: True, choose      # though they are on the CPU
        kernels = forward_and_gradients(inputs, budget, owner)
        assert all(x.dtype == dtype for x in kernels)
        blocks.kernel_takes = lambda *qkv: False
        blocks.choose_blocks = lambda q, k, *rest: choose(q.to(dtype), k.to(dtype), *rest)     # the same blocks
        gathered = forward_and_gradients([x.detach().double().requires_grad_() for x in inputs], budget, owner)
        for a, b in zip(kernels, gathered):
            torch.testing.assert_close(a.double(), b, atol=atol*b.abs().max().item(), rtol=0)


def test_triton_kernels_equal_the_gathered_path(triton):
    done = subprocess.run([sys.executable, '-c', 'import test_attention; test_attention.interpreted_kernels()'],
                          cwd=Path(__file__).parent, capture_output=True, text=True,
                          env=os.environ | {'TRITON_INTERPRET': '1', 'PYTHONPATH': os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('dtype, name', [(torch.float32, 'fp32'), (torch.bfloat16, 'bf16')])
@pytest.mark.parametrize('kernel', ['forward_kernel', 'backward_kernel'])
def test_triton_kernels_compile_and_fit(triton, kernel, dtype, name, tmp_path, monkeypatch):
    "Down to machine code for a GPU that need not be there, within the smallest shared memory of its generation."
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    kernel, constants = getattr(blocks, kernel), blocks.tiles(64, 128, dtype)
    options = dict(num_stages=constants.pop('num_stages'))
    types = {'constexpr': constants, '*fp32': ['LSE', 'DK', 'DV'], '*i64': ['CHOSEN', 'OWNER'],
             'i32': ['h', 'N', 'n', 'blocks'], 'fp32': ['scale']}
    known = {argument: type for type, arguments in types.items() for argument in arguments}
    signature = {argument: known.get(argument, f'*{name}') for argument in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget('cuda', 80, 32), options=options)
    assert compiled.asm['cubin'] and compiled.metadata.shared < 99*1024


def test_z_order_has_square_tiles():
    order = z_order(16, 16)
    assert sorted(order.tolist()) == list(range(256))
    for size in (16, 64):
        for tile in order.view(-1, size):
            assert (tile // 16).unique().numel() == (tile % 16).unique().numel() == size**.5
    assert sorted(z_order(3, 5).tolist()) == list(range(15))


def plain_top1(moe, x):
    routing = moe.router(x)
    chosen = routing.argmax(-1, keepdim=True)
    every = torch.stack([expert.W_out(o) for expert, o in zip(moe.experts, moe.attend(x))], 2)    # (B, N, E, D)
    own = every.gather(2, chosen[..., None].expand(-1, -1, 1, x.shape[-1])).squeeze(2)
    p = routing.gather(-1, chosen)
    return moe.merge_proj(own*(1 + p - p.detach()))


def unlike(moe):
    "Experts that differ: they begin as copies."
    with torch.no_grad():
        for i, p in enumerate(moe.parameters()):
            p.add_(.3*torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return moe.double().eval()


@pytest.mark.parametrize('shared_keys', [False, True])
@pytest.mark.parametrize('N, selection, budgets', [
    (1, 'exact', (1, 2)), (67, 'exact', (1, 32, 128)), (300, 'exact', (8, 32, 500)), (100, 'blocks', (200, 300))])
def test_top1_equals_its_definition(N, selection, budgets, shared_keys):
    moe = unlike(AdaptiveAttentionMoE(16, 2, budgets, selection=selection, routing='top1', shared_keys=shared_keys))
    x = torch.randn(3, N, 16, generator=torch.Generator().manual_seed(N), dtype=torch.double, requires_grad=True)
    agree(moe, lambda x: plain_top1(moe, x), [x])
    grads = [torch.autograd.grad(y.square().sum(), list(moe.parameters()), allow_unused=True)
             for y in (moe(x), plain_top1(moe, x))]
    for a, b in zip(*grads):
        if a is not None: torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)
        else: assert b is None or not b.any()                      # an expert that got no token


def test_top1_with_blocks_gives_each_query_its_own_budget():
    q, k, v = (x.detach() for x in qkv(2, 2, 256, 8))
    rows, budgets = q.transpose(1, 2).flatten(0, 1), (32, 64)      # (B*N, h, d)
    expert = torch.arange(2)[:, None].expand(2, 256)               # one image each
    def answer(e, token, filled, image):
        return block_attention(rows[token].transpose(1, 2), k, v, budgets[e], image).transpose(1, 2)
    size = group_size(256, 2)
    for e, out in enumerate(dispatch(expert, answer)):
        parts = [block_attention(part[e:e+1], k[e:e+1], v[e:e+1], budgets[e]) for part in q.split(size, 2)]
        torch.testing.assert_close(out.transpose(0, 1), torch.cat(parts, 2)[0])


def test_the_router_of_top1_learns_and_stays_balanced():
    moe = AdaptiveAttentionMoE(16, 2, (8, 32, 64), routing='top1').train()
    out, routing = moe(torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0)), return_routing=True)
    out.square().mean().backward()
    assert routing.shape == (2, 64, 3) and moe.router.routing_net[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize('options', [dict(selection='blocks'), dict(routing='top1'),
                                     dict(selection='blocks', routing='top1', shared_keys=True)], ids=str)
def test_the_model_takes_every_option(options):
    model = SmallViT(image_size=24, patch_size=2, embed_dim=16, num_heads=2, budgets=(8, 16, 32), **options)
    x = torch.rand(2, 3, 24, 24)
    out, routings = model(x, return_routing=True)
    out.square().mean().backward()
    assert out.shape == x.shape and routings[0].shape == (2, 144, 3)
    with pytest.raises(Exception, match='selection'): SmallViT(selection='magic')


def test_routing_maps_stay_in_the_order_of_the_image():
    sizes = dict(patch_size=2, embed_dim=16, num_heads=2, budgets=(300, 300))      # all keys: order must not matter
    model, plain = SmallViT(selection='blocks', **sizes).eval(), SmallViT(**sizes).eval()
    plain.load_state_dict(model.state_dict())
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad(): (a, ra), (b, rb) = (m(x, return_routing=True) for m in (model, plain))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    torch.testing.assert_close(ra[1], rb[1], atol=1e-5, rtol=0)


def psnr(a, b): return -10*(a - b).square().mean((1, 2, 3)).log10()


@pytest.fixture(params=['bundled', 'released'])
def trained(request):
    "A trained model and 100 images: what the package ships, or the released weights with CIFAR-10."
    if request.param == 'bundled':
        return load_model(Path(blocks.__file__).parent/'weights'/'paper'), load_source('photos').test[:100]
    reference = request.getfixturevalue('reference')
    images = load_source(str(reference/'cifar10_subset.npz')).test[:100]
    return load_model(reference/'upstream'/'best_denoising_model_proper.pt'), images


def test_bf16_costs_no_quality(trained):
    model, images = trained
    clean, noisy = to_float(images.images), evaluation_noisy(images, .2)
    with torch.no_grad():
        full = model(noisy)
        with torch.autocast('cpu', torch.bfloat16): half = model(noisy).float()
        apart = (full - naive_forward(model, noisy)).abs().amax((1, 2, 3))
    assert (psnr(full, clean) - psnr(half, clean)).abs().mean() < .02
    assert (apart > 1e-5).sum() <= 2 and apart.max() < 2e-3        # where two scores all but tie, rounding decides


@pytest.mark.filterwarnings('ignore')
def test_onnx_gives_the_same_picture(tmp_path):
    import onnxruntime
    model = SmallViT(image_size=16, patch_size=2, embed_dim=32, num_heads=2, budgets=(8, 32, 64)).eval()
    x = torch.rand(2, 3, 16, 16)
    torch.onnx.export(model, (x,), tmp_path/'model.onnx', dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path/'model.onnx', providers=['CPUExecutionProvider'])
    with torch.no_grad(): ours = model(x)
    theirs, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(theirs, ours.numpy(), atol=1e-5)


def test_bf16_gradients_point_the_same_way():
    model, x = SmallViT(), torch.rand(4, 3, 32, 32)
    grads = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled): out = model(x).float()
        F.mse_loss(out, torch.zeros_like(x)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert F.cosine_similarity(*grads, dim=0) > .999
