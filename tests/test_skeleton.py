"""Tubes around skeletons: as they are drawn, on their way to the loss, and the recall that it asks for."""

import sys

import numpy as np
import oracle
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.structures import PixelData
from mmseg.datasets.transforms import PackSegInputs, RandomCrop, RandomFlip
from mmseg.models.data_preprocessor import SegDataPreProcessor
from mmseg.registry import MODELS, TRANSFORMS
from mmseg.structures import SegDataSample
from ranks import on_ranks, share_of_rank
from scipy import ndimage

from mmseg_imbalance import heads
from mmseg_imbalance.counting.transforms import keeps_labels
from mmseg_imbalance.losses import WeightedLoss
from mmseg_imbalance.ops import soft_stats
from mmseg_imbalance.skeleton import SkeletonRecallLoss, SkeletonTubes
from mmseg_imbalance.terms import SkeletonRecall

WEIGHT = [0.2, 3.0, 1.0, 0.5, 1.7]


@pytest.fixture
def skeletonize():
    return pytest.importorskip('skimage.morphology', reason='scikit-image draws the tubes').skeletonize


def labels_of(seed, size=(60, 83), classes=5):
    """Blobs, some thin, some at the border, some ignored."""
    noise = np.random.default_rng(seed).normal(size=(classes, *size))
    smooth = np.stack([ndimage.gaussian_filter(n, 1 + c) * (1 + c) for c, n in enumerate(noise)])
    labels = smooth.argmax(0).astype(np.uint8)
    labels[5:9, 10:60] = 255
    labels[:, 40:43] = 1
    return labels


def results_of(labels, **more):
    image = np.repeat(labels[..., None], 3, -1)
    shapes = dict(img_shape=labels.shape, ori_shape=labels.shape)
    return dict(img=image, gt_seg_map=labels, seg_fields=['gt_seg_map'], **shapes) | more


@pytest.mark.parametrize('radius', [1, 2, 4])
@pytest.mark.parametrize('classes', [None, [1, 3]])
def test_a_tube_is_the_skeleton_of_a_class_made_thicker_inside_the_class(skeletonize, radius, classes):
    for seed in range(5):
        labels = labels_of(seed)
        results = SkeletonTubes(classes, radius).transform(results_of(labels.copy()))
        expected = np.zeros(labels.shape, bool)
        for c in range(5) if classes is None else classes:
            thick = ndimage.binary_dilation(skeletonize(labels == c), iterations=radius)
            expected |= thick & (labels == c)
        assert results['gt_edge_map'].dtype == np.uint8
        assert np.array_equal(results['gt_edge_map'], expected)
        assert expected[labels == 1].any()
        assert not expected.all()
        assert np.array_equal(results['gt_seg_map'], labels)


def test_labels_without_a_class_have_no_tube(skeletonize):
    labels = np.full((8, 9), 255, np.uint8)
    assert not SkeletonTubes().transform(results_of(labels))['gt_edge_map'].any()
    assert SkeletonTubes(ignore_index=0).transform(results_of(labels))['gt_edge_map'].any()
    assert not SkeletonTubes([0]).transform(results_of(labels * 0 + 2))['gt_edge_map'].any()


def test_a_later_flip_or_crop_takes_the_tubes_along(skeletonize):
    results = SkeletonTubes().transform(results_of(labels_of(0)))
    tubes = results['gt_edge_map']
    flipped = RandomFlip(prob=1.0)(dict(results))
    assert np.array_equal(flipped['gt_edge_map'], tubes[:, ::-1])
    cropped = RandomCrop((20, 30))(dict(results))
    assert cropped['gt_edge_map'].shape == cropped['gt_seg_map'].shape == (20, 30)


def test_the_check_of_the_labels_leaves_it_alone(skeletonize):
    assert keeps_labels(SkeletonTubes())


def test_it_is_found_by_the_framework_and_says_its_options(skeletonize):
    step = TRANSFORMS.build(dict(type='SkeletonTubes', classes=[1]))
    assert repr(step) == 'SkeletonTubes(classes=[1], radius=2, ignore_index=255)'


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(radius=0), 'radius must be a whole number, at least 1, got 0'),
        *(
            (dict(classes=wrong), r'classes=.*, allowed are indices of classes, as \[5, 6, 7\], or None')
            for wrong in ([], 'pole', ['pole'], [-1], [True], 3)
        ),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SkeletonTubes(**options)


def test_a_class_that_the_heads_do_not_have_is_refused(skeletonize, tmp_path):
    config = Config(dict(model=dict(decode_head=dict(num_classes=5), auxiliary_head=dict(num_classes=5))))
    MessageHub.get_instance(tmp_path.name).update_info('cfg', config.pretty_text)
    SkeletonTubes(classes=[1, 4]).transform(results_of(labels_of(0)))
    with pytest.raises(ValueError, match=r'classes=\[1, 5\] of SkeletonTubes: the heads have 5 classes'):
        SkeletonTubes(classes=[1, 5]).transform(results_of(labels_of(0)))


def test_what_it_cannot_work_on_is_refused(skeletonize):
    with pytest.raises(ValueError, match=r'needs gt_seg_map of shape \(H, W\), found none'):
        SkeletonTubes().transform({})
    with pytest.raises(ValueError, match=r'found shape \(2, 3, 4\)'):
        SkeletonTubes().transform(dict(gt_seg_map=np.zeros((2, 3, 4))))
    with pytest.raises(ValueError, match=r'finds a gt_edge_map.*Take GenerateEdge out'):
        SkeletonTubes().transform(results_of(labels_of(0), gt_edge_map=0))


def test_without_scikit_image_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'skimage.morphology', None)
    with pytest.raises(ImportError, match=r'SkeletonTubes needs scikit-image.*mmseg-imbalance\[skeleton\]'):
        SkeletonTubes()


# the loss


def batch(seed=1, images=2, size=(13, 17), logit_size=(13, 17)):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, 5, *logit_size, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 4, (images, *size), generator=generator)  # class 4 is absent
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    marked = torch.rand(target.shape, generator=generator) < 0.3
    marked[target == 2] = False  # a class without a tube
    marked[1, target[1] == 0] = False
    return logits, target, marked


def recall_by_loops(sums, weight, smooth, reduction):
    keys = ('marked_intersection', 'marked_truth')
    images = [[sums[k][b] for k in keys] for b in range(len(sums['truth']))]
    if reduction == 'batch':
        images = [[sum(image[i] for image in images) for i in (0, 1)]]
    total = 0.0
    for hit, truth in images:
        value = norm = 0.0
        for c, w in enumerate(weight):
            if truth[c] > 0:
                value += w * (1 - (hit[c] + smooth) / (truth[c] + smooth))
                norm += w
        total += value / norm if norm else 0.0
    return total / len(images)


@pytest.mark.parametrize('reduction', ['image', 'batch'])
@pytest.mark.parametrize('smooth', [0.0, 1.0, 2.5])
@pytest.mark.parametrize('weight', [None, WEIGHT])
@pytest.mark.parametrize('sampled', [False, True])
def test_value_is_that_of_the_loops(reduction, smooth, weight, sampled):
    logits, target, marked = batch()
    pixels = torch.rand(target.shape, dtype=torch.float64) if sampled else None
    factors = dict(ce_weight=0.7, dice_weight=1.3, skeleton_weight=2.5)
    loss = SkeletonRecallLoss(weight, smooth=smooth, region_reduction=reduction, loss_weight=0.5, **factors)
    value = loss(logits, target, pixels, marked=marked)
    numpy = {k: v.numpy() for k, v in dict(pixel_weight=pixels, marked=marked).items() if v is not None}
    sums = oracle.soft_stats(logits.numpy(), target.numpy(), **numpy)
    w = [1.0] * 5 if weight is None else weight
    ce = oracle.cross_entropy(sums, w)
    dice = oracle.region_loss(sums, w, 0.5, 0.5, smooth / 2, reduction=reduction)
    recall = recall_by_loops(sums, w, smooth, reduction)
    assert value.item() == pytest.approx(0.5 * (0.7 * ce + 1.3 * dice + 2.5 * recall), rel=1e-6)
    logged = {name: scalar.item() for name, scalar in loss.take_logged().items()}
    assert logged == pytest.approx(dict(skeleton_ce=ce, skeleton_dice=dice, skeleton_recall=recall), rel=1e-6)


def test_gradient_is_that_of_the_formula():
    logits, target, marked = batch()
    logits.requires_grad_()
    loss = SkeletonRecallLoss(ce_weight=0, dice_weight=0, skeleton_weight=2, region_reduction='batch')
    found = torch.autograd.grad(loss(logits, target, marked=marked), logits)[0]
    p, tubes = logits.softmax(1), []
    for c in range(5):
        here = marked & (target == c)
        if here.any():
            tubes.append(1 - (p[:, c][here].sum() + 1) / (here.sum() + 1))
    assert len(tubes) == 3
    expected = torch.autograd.grad(2 * sum(tubes) / 3, logits)[0]
    torch.testing.assert_close(found, expected)
    assert (found.movedim(1, 3)[~marked | (target == 255)] == 0).all()


def test_without_a_tube_the_third_term_is_0():
    logits, target, marked = batch()
    loss = SkeletonRecallLoss(smooth=0.0)
    value = loss(logits, target, marked=torch.zeros_like(marked))
    assert loss.take_logged()['skeleton_recall'] == 0
    assert value.isfinite()


def test_the_term_in_a_loss_of_ones_own():
    logits, target, marked = batch()
    term = SkeletonRecall(smooth=2.0)
    parts = term.parts(soft_stats(logits, target, marked=marked), torch.tensor(WEIGHT, dtype=torch.float64))
    assert parts.shape == (5,)
    assert parts[2] == parts[4] == 0
    loss = WeightedLoss({'recall': (term, 0.7)}, WEIGHT)
    torch.testing.assert_close(loss(logits, target, marked=marked), 0.7 * parts.sum(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match='sums of marked pixels are missing; call soft_stats with marked='):
        term.parts(soft_stats(logits, target), None)
    with pytest.raises(ValueError, match="so it needs region_reduction='batch', got 'image'"):
        SkeletonRecall(sync=True)


def step_of_ranks(images):
    logits, target, marked = (t[images] for t in batch(images=4))
    loss = SkeletonRecallLoss(WEIGHT, region_reduction='batch', sync_region=True)
    logits.requires_grad_()
    value = loss(logits, target, marked=marked)
    value.backward()
    return value.item(), logits.grad.numpy()


@pytest.mark.slow
def test_two_ranks_are_one_where_the_sums_are_of_all():
    value, gradient = step_of_ranks(slice(None))
    for rank, (found, share) in enumerate(on_ranks(2, share_of_rank, step_of_ranks)):
        assert found == pytest.approx(value, rel=1e-12)
        # the gradient of the sum of both ranks' losses
        np.testing.assert_allclose(share, 2 * gradient[2 * rank : 2 * rank + 2], rtol=1e-10, atol=1e-14)


# on the way to it


def head(type='FeatureSegformerHead', **options):
    inputs = dict(in_channels=[8] * 4, in_index=[0, 1, 2, 3])
    if 'FCNHead' in (type, options.get('base')):
        inputs = dict(in_channels=8, in_index=0, num_convs=1)
    torch.manual_seed(0)
    return MODELS.build(
        dict(type=type, channels=8, num_classes=5, dropout_ratio=0, **inputs, **options)
        | dict(loss_decode=dict(type='SkeletonRecallLoss', class_weight=WEIGHT))
    ).eval()


def features():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 8, 16 // s, 16 // s, generator=generator) for s in (1, 2, 4, 8)]


def samples_of(target, marked, size=None):
    found = []
    for labels, tubes in zip(target, marked, strict=True):
        sample = SegDataSample(gt_sem_seg=PixelData(data=labels[None]), metainfo=dict(img_shape=labels.shape))
        sample.set_data(dict(gt_edge_map=PixelData(data=tubes[None, :size].long())))
        found.append(sample)
    return found


@pytest.mark.parametrize('kind', [dict(), dict(type='FeatureHead', base='FCNHead')])
def test_a_feature_head_hands_the_tubes_to_the_loss(kind):
    _, target, marked = batch(size=(62, 64))
    module = head(**kind)
    losses = module.loss(features(), samples_of(target, marked), {})
    logits = module(features())
    expected = SkeletonRecallLoss(WEIGHT)(logits, target, marked=marked, align_corners=module.align_corners)
    torch.testing.assert_close(losses['loss_skeleton'], expected)
    assert {'skeleton_ce', 'skeleton_dice', 'skeleton_recall'} < set(losses)
    losses['loss_skeleton'].backward()
    assert module.conv_seg.weight.grad.isfinite().all()


def test_the_tubes_travel_from_the_pipeline_to_the_loss(skeletonize):
    packed = []
    for seed, size in enumerate([(60, 64), (64, 51)]):
        packed.append(PackSegInputs()(SkeletonTubes()(results_of(labels_of(seed, size)))))
    preprocessor = SegDataPreProcessor(size=(64, 64), pad_val=0, seg_pad_val=255)
    data = dict(inputs=[p['inputs'] for p in packed], data_samples=[p['data_samples'] for p in packed])
    samples = preprocessor(data, training=True)['data_samples']
    labels = torch.cat([sample.gt_sem_seg.data for sample in samples])
    tubes = heads.tubes_of(samples, labels)
    assert tubes.shape == labels.shape == (2, 64, 64)
    for seed, size in enumerate([(60, 64), (64, 51)]):
        expected = SkeletonTubes()(results_of(labels_of(seed, size)))['gt_edge_map']
        assert np.array_equal(tubes[seed, : size[0], : size[1]], expected)
    assert not tubes[labels == 255].any()
    assert head().loss(features(), samples, {})['loss_skeleton'].isfinite()


def test_tubes_that_are_missing_or_of_another_size_are_named_with_the_transform():
    _, target, marked = batch(size=(62, 64))
    samples = samples_of(target, marked)
    del samples[1].gt_edge_map
    with pytest.raises(ValueError, match=r"no gt_edge_map. Add dict\(type='SkeletonTubes'\)"):
        head().loss(features(), samples, {})
    samples = samples_of(target, marked, size=50)
    with pytest.raises(ValueError, match=r'of size \(62, 64\), their gt_edge_map of \[\(50, 64\)\]'):
        head().loss(features(), samples, {})


def test_a_head_of_mmsegmentation_cannot_hand_them_over():
    _, target, marked = batch(size=(62, 64))
    theirs = head('SegformerHead')
    with pytest.raises(RuntimeError, match=r'SkeletonRecallLoss needs the tubes .*FeatureSegformerHead'):
        theirs.loss(features(), samples_of(target, marked), {})
    with pytest.raises(ValueError, match='decode_head: SkeletonRecallLoss needs the tubes'):
        heads.check_heads(torch.nn.ModuleDict(dict(decode_head=theirs)))
    heads.check_heads(torch.nn.ModuleDict(dict(decode_head=head())))


def test_other_losses_need_no_tubes():
    module = MODELS.build(dict(type='CombinedWeightedLoss'))
    assert not module.needs_marked
    logits, target, marked = batch()
    assert torch.equal(module(logits, target), module(logits, target, marked=marked))
