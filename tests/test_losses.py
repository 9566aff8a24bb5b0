import functools
import itertools
import json
import math
import warnings

import oracle
import pytest
import torch
import torch.nn.functional as F
from dispatch import NoDoubles
from mmengine.model import BaseModel
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import nn

from mmseg_imbalance.class_balance import ClassWatcher
from mmseg_imbalance.hardness import HardnessWeightedLoss
from mmseg_imbalance.label_check import LabelCounter
from mmseg_imbalance.losses import (
    CombinedWeightedLoss,
    GeneralizedDiceLoss,
    WeightedCrossEntropyLoss,
    WeightedDiceLoss,
    WeightedFocalLoss,
    WeightedJaccardLoss,
    WeightedLoss,
    WeightedTverskyLoss,
)
from mmseg_imbalance.ops import soft_stats
from mmseg_imbalance.recall import RecallWeightedLoss
from mmseg_imbalance.skeleton import SkeletonRecallLoss
from mmseg_imbalance.subclass import SimilaritySubclassifiedLoss, SubclassifiedLoss


def focal_and_focal_tversky(**options):
    """A combination of everything that is not the default."""
    return CombinedWeightedLoss(
        region='tversky', alpha=0.2, beta=0.9, gamma=0.75, focal_gamma=1.5, balance='uncertainty', **options
    )


LOSSES = (
    CombinedWeightedLoss,
    WeightedCrossEntropyLoss,
    WeightedFocalLoss,
    WeightedDiceLoss,
    WeightedJaccardLoss,
    WeightedTverskyLoss,
    GeneralizedDiceLoss,
    RecallWeightedLoss,
    focal_and_focal_tversky,
)
PIXELS = [9e6, 4e4, 3e5, 0, 7e3]
SHARE = [n / 9354000 for n in (9e6, 4e4, 3e5, 7e3, 7e3)]  # what never occurs counts as the rarest
WEIGHT = [0.2, 3.0, 1.0, 0.0, 1.7]


@pytest.mark.parametrize('reduction', ['image', 'batch'])
@pytest.mark.parametrize('absent', ['include', 'ignore'])
@pytest.mark.parametrize('square', [False, True])
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('gamma', [0.0, 1.5])
def test_combined_is_the_textbook_formula(make_batch, reduction, absent, square, smoothing, gamma):
    logits, target = make_batch()
    weight = torch.rand(target.shape, dtype=torch.float64)
    loss = CombinedWeightedLoss(
        ce_weight=0.7,
        dice_weight=0.2,
        smooth=2.0,
        square_denominator=square,
        class_weight=WEIGHT,
        region_reduction=reduction,
        absent_classes=absent,
        focal_gamma=gamma,
        label_smoothing=smoothing,
        loss_weight=3.0,
    )
    sums = oracle.soft_stats(
        logits.numpy(),
        target.numpy(),
        pixel_weight=weight.numpy(),
        focal_gamma=gamma,
        square_prediction=square,
    )
    ce = oracle.cross_entropy(sums, WEIGHT, smoothing)
    dice = oracle.region_loss(sums, WEIGHT, 0.5, 0.5, 1.0, reduction=reduction, absent=absent)
    value = loss(logits, target, weight=weight, ignore_index=255)
    assert value.item() == pytest.approx(3 * (0.7 * ce + 0.2 * dice), rel=1e-6)
    assert {name: term.item() for name, term in loss.logged.items()} == {
        'combined_ce': pytest.approx(ce, rel=1e-6),
        'combined_dice': pytest.approx(dice, rel=1e-6),
    }


OF_REGION = [0.0, 1.0, 0.5, 2.0, 1.0]


@pytest.mark.parametrize('weight', [None, WEIGHT])
@pytest.mark.parametrize('absent', ['include', 'ignore'])
def test_combined_with_other_weights_in_the_region_term_is_the_textbook_formula(make_batch, weight, absent):
    logits, target = make_batch()
    loss = CombinedWeightedLoss(
        0.7, 0.2, class_weight=weight, region_class_weight=OF_REGION, absent_classes=absent, smooth=2.0
    )
    sums = oracle.soft_stats(logits.numpy(), target.numpy())
    ce = oracle.cross_entropy(sums, [1.0] * 5 if weight is None else weight)
    dice = oracle.region_loss(sums, OF_REGION, 0.5, 0.5, 1.0, absent=absent)
    assert loss(logits, target).item() == pytest.approx(0.7 * ce + 0.2 * dice, rel=1e-6)


def test_a_class_of_weight_0_in_the_region_term_is_trained_by_cross_entropy_alone(make_batch):
    batch = make_batch()
    loss = CombinedWeightedLoss(class_weight=WEIGHT, region_class_weight=[0, 1, 1, 1, 1])
    watcher = ClassWatcher()
    loss.watch(watcher)
    loss(*batch)
    ce = WeightedCrossEntropyLoss(WEIGHT)
    alone = ClassWatcher()
    ce.watch(alone)
    ce(*batch)
    torch.testing.assert_close(watcher.sums[2, 0], 0.6 * alone.sums[2, 0])
    dice = WeightedDiceLoss([0, 1, 1, 1, 1])(*batch)
    torch.testing.assert_close(loss.logged['combined_dice'], dice)


def test_the_region_term_has_the_same_weights_unless_it_is_given_others(make_batch):
    batch = make_batch()
    plain = CombinedWeightedLoss(class_weight=WEIGHT)
    same = CombinedWeightedLoss(class_weight=WEIGHT, region_class_weight='same')
    assert torch.equal(same(*batch), plain(*batch))
    assert same.class_weights == [same.class_weight] == [same.region_class_weight]
    ones = CombinedWeightedLoss(class_weight=WEIGHT, region='generalized_dice', region_class_weight=None)
    ones(*batch)
    torch.testing.assert_close(ones.logged['combined_generalized_dice'], GeneralizedDiceLoss()(*batch))
    # the scale of cross-entropy's weights is not that of the region term's
    by_pixels = CombinedWeightedLoss(class_weight=WEIGHT, divide_by='pixels', region_class_weight=OF_REGION)
    by_pixels.class_weight.set_pixels(PIXELS)
    by_pixels(*batch)
    torch.testing.assert_close(by_pixels.logged['combined_dice'], WeightedDiceLoss(OF_REGION)(*batch))


@pytest.mark.parametrize('reduction', ['image', 'batch'])
@pytest.mark.parametrize('absent', ['include', 'ignore'])
@pytest.mark.parametrize('weight', [None, WEIGHT])
@pytest.mark.parametrize('gamma', [1.0, 0.75, 4 / 3])
@pytest.mark.parametrize(('alpha', 'beta'), [(0.2, 0.9), (0.9, 0.2), (1.5, 0.0)])
def test_tversky_is_the_textbook_formula(make_batch, reduction, absent, weight, gamma, alpha, beta):
    logits, target = make_batch()
    options = dict(region_reduction=reduction, absent_classes=absent, gamma=gamma, smooth=2.0)
    loss = WeightedTverskyLoss(weight, alpha=alpha, beta=beta, **options)
    sums = oracle.soft_stats(logits.numpy(), target.numpy())
    given = [1.0] * 5 if weight is None else weight
    expected = oracle.region_loss(sums, given, alpha, beta, 2.0, gamma, reduction=reduction, absent=absent)
    assert loss(logits, target).item() == pytest.approx(expected, rel=1e-6)
    assert loss.loss_name == 'loss_tversky'


def test_tversky_swapped_is_another_loss_and_its_special_cases_are_dice_and_jaccard(make_batch):
    batch = make_batch()
    one, other = (WeightedTverskyLoss(WEIGHT, alpha=a, beta=b)(*batch) for a, b in ((0.2, 0.9), (0.9, 0.2)))
    assert abs(one - other) > 0.01
    dice = WeightedTverskyLoss(WEIGHT, alpha=0.5, beta=0.5, smooth=0.5)(*batch)
    torch.testing.assert_close(dice, WeightedDiceLoss(WEIGHT)(*batch))
    jaccard = WeightedTverskyLoss(WEIGHT, alpha=1.0, beta=1.0)(*batch)
    torch.testing.assert_close(jaccard, WeightedJaccardLoss(WEIGHT)(*batch))


@pytest.mark.parametrize('gamma', [0.0, 0.7, 2.0])
def test_focal_is_the_textbook_formula(make_batch, gamma):
    logits, target = make_batch()
    log_p = logits.log_softmax(1)
    valid = target != 255
    y = torch.where(valid, target, 0)
    log_p = log_p.gather(1, y[:, None])[:, 0]
    weight = torch.tensor(WEIGHT, dtype=torch.float64)[y] * valid
    expected = (weight * -((1 - log_p.exp()) ** gamma) * log_p).sum() / weight.sum()
    torch.testing.assert_close(WeightedFocalLoss(WEIGHT, gamma=gamma)(logits, target), expected)


def test_focal_of_gamma_2_is_the_default(make_batch):
    batch = make_batch()
    torch.testing.assert_close(WeightedFocalLoss()(*batch), WeightedFocalLoss(gamma=2.0)(*batch))
    torch.testing.assert_close(WeightedCrossEntropyLoss(focal_gamma=2.0)(*batch), WeightedFocalLoss()(*batch))


@pytest.mark.parametrize('reduction', ['image', 'batch'])
@pytest.mark.parametrize('absent', ['include', 'ignore'])
@pytest.mark.parametrize('weight', [None, WEIGHT])
@pytest.mark.parametrize('square', [False, True])
def test_generalized_dice_is_the_textbook_formula(make_batch, reduction, absent, weight, square):
    logits, target = make_batch()
    target[0][target[0] == 1] = 2  # a class that one of the images lacks
    loss = GeneralizedDiceLoss(
        weight, smooth=3.0, square_denominator=square, region_reduction=reduction, absent_classes=absent
    )
    sums = oracle.soft_stats(logits.numpy(), target.numpy(), square_prediction=square)
    expected = oracle.generalized_dice(sums, weight, 3.0, reduction, absent)
    assert loss(logits, target).item() == pytest.approx(expected, rel=1e-6)


def test_generalized_dice_weighs_classes_by_their_own_volume(make_batch):
    # missing a rare class costs as much as missing a frequent one
    target = torch.zeros(1, 10, 10, dtype=torch.long)
    target[0, 0, :2] = 1
    missed = 20 * torch.nn.functional.one_hot(torch.zeros_like(target), 2).movedim(3, 1).double()
    generalized, pooled = (
        GeneralizedDiceLoss(w, smooth=0.0)(missed, target).item() for w in (None, [1.0, 1.0])
    )
    assert pooled == pytest.approx(0.02)
    assert generalized == pytest.approx(1 - 2 * (1 / 98) / ((98 + 100) / 98**2 + 2 / 4))


@pytest.mark.parametrize('region', ['dice', 'jaccard', 'tversky', 'generalized_dice'])
@pytest.mark.parametrize('focal_gamma', [0.0, 1.5])
def test_any_region_index_goes_with_any_pixel_term(make_batch, region, focal_gamma):
    batch = make_batch()
    options = dict(gamma=0.75, absent_classes='ignore') | (
        dict(alpha=0.2, beta=0.9) if region == 'tversky' else {}
    )
    single = dict(
        dice=WeightedDiceLoss,
        jaccard=WeightedJaccardLoss,
        tversky=WeightedTverskyLoss,
        generalized_dice=GeneralizedDiceLoss,
    )[region]
    loss = CombinedWeightedLoss(
        0.3, 0.9, class_weight=WEIGHT, region=region, focal_gamma=focal_gamma, **options
    )
    pixel = WeightedFocalLoss(WEIGHT, gamma=focal_gamma)(*batch)
    overlap = single(WEIGHT, **options)(*batch)
    torch.testing.assert_close(loss(*batch), 0.3 * pixel + 0.9 * overlap)
    assert (loss.loss_name, [*loss.logged]) == ('loss_combined', ['combined_ce', f'combined_{region}'])


# the class frequency in the logits


@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('size', [(13, 17), (5, 7)])
def test_logit_adjustment_adds_the_log_prior(make_batch, loss, size):
    logits, target = make_batch(size, (13, 17))
    adjusted = loss(class_weight=WEIGHT, logit_adjustment=0.7)
    adjusted.class_weight.set_pixels(PIXELS)
    shifted = logits + 0.7 * torch.tensor([math.log(f) for f in SHARE], dtype=torch.float64)[:, None, None]
    plain = loss(class_weight=WEIGHT)(shifted, target)
    torch.testing.assert_close(adjusted(logits, target), plain, rtol=1e-5, atol=1e-6)
    assert adjusted.correct is None  # it would be the accuracy of the adjusted logits


@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float16])
def test_logit_variation_adds_noise_by_rarity_while_training(make_batch, loss, dtype):
    logits, target = make_batch((5, 7), (13, 17), dtype=dtype)
    varied = loss(class_weight=WEIGHT, logit_variation=4.0)
    varied.class_weight.set_pixels(PIXELS)
    plain = loss(class_weight=WEIGHT)
    torch.manual_seed(7)
    value = varied(logits, target)
    torch.manual_seed(7)
    noise = (4 * torch.randn(logits.shape, dtype=dtype)).double().clamp(-1, 1).abs()
    rarity = -torch.tensor(SHARE, dtype=torch.float64).log()
    noisy = logits.double() + noise * (rarity / rarity.max())[:, None, None]
    tolerance = 1e-5 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(value.double(), plain(noisy, target).double(), rtol=tolerance, atol=tolerance)
    assert value != varied(logits, target)
    varied.eval()
    torch.testing.assert_close(varied(logits, target), plain(logits, target))


def test_logit_variation_trains_the_head_and_counts_in_the_total():
    loss = dict(type='WeightedCrossEntropyLoss', logit_variation=4.0)
    decode_head = head(loss=loss)
    decode_head.loss_decode.class_weight.set_pixels(PIXELS)
    losses = run(decode_head, TARGET)
    total, _ = BaseModel.parse_losses(nn.Module(), losses)
    torch.testing.assert_close(total, losses['loss_ce'])
    total.backward()
    assert decode_head.conv_seg.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('option', ['logit_adjustment', 'logit_variation'])
def test_without_a_class_frequency_the_error_says_which_hook_to_add(make_batch, option):
    loss = WeightedDiceLoss(**{option: 1.0})
    assert loss.class_weight.needs_pixels
    with pytest.raises(RuntimeError, match=r"dict\(type='ClassWeightHook'\)"):
        loss(*make_batch())
    loss.class_weight.set_pixels([1, 2])
    with pytest.raises(ValueError, match='that of 2 classes, but the head predicts 5'):
        loss(*make_batch())
    with pytest.raises(ValueError, match=r'class pixels .* must be finite'):
        loss.class_weight.set_pixels([1, -2])


def test_the_number_of_right_pixels_is_kept_for_the_log(make_batch):
    logits, target = make_batch()
    loss = WeightedDiceLoss()
    loss(logits, target)
    assert loss.correct.tolist() == ((logits.argmax(1) == target).sum((1, 2))).tolist()


def test_the_two_parts_alone_are_those_of_the_combined_loss(make_batch):
    logits, target = make_batch()
    ce = WeightedCrossEntropyLoss(WEIGHT)(logits, target)
    dice = WeightedDiceLoss(WEIGHT)(logits, target)
    torch.testing.assert_close(
        CombinedWeightedLoss(class_weight=WEIGHT)(logits, target), 0.6 * ce + 0.4 * dice
    )
    torch.testing.assert_close(
        ce, F.cross_entropy(logits, target, torch.tensor(WEIGHT, dtype=torch.float64), ignore_index=255)
    )


@pytest.mark.parametrize('loss', LOSSES)
def test_all_pixels_ignored_is_zero_with_zero_gradient(make_batch, loss):
    logits, target = make_batch()
    leaf = logits.requires_grad_()
    value = loss(class_weight=WEIGHT)(leaf, target.fill_(255))
    value.backward()
    # learnt log-variances s add their s / 2
    offset = -math.log(0.6 * 0.4) / 2 if loss is focal_and_focal_tversky else 0
    assert value.item() == pytest.approx(offset)
    assert (leaf.grad == 0).all()


@pytest.mark.parametrize('loss', LOSSES)
def test_one_output_channel_is_softmax_over_zero_and_z(loss):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 1, 13, 17, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randint(0, 2, (2, 13, 17), generator=generator)
    target[:, 0] = 255
    pair = torch.cat([torch.zeros_like(z), z], 1)
    value = loss(class_weight=[1.0, 4.0])(z, target)
    torch.testing.assert_close(value, loss(class_weight=[1.0, 4.0])(pair, target))
    value.backward()
    assert z.grad.abs().sum() > 0
    if loss is WeightedCrossEntropyLoss:
        valid = target != 255
        bce = F.binary_cross_entropy_with_logits(z[:, 0][valid], target[valid].double())
        torch.testing.assert_close(loss()(z, target), bce)


@pytest.mark.parametrize('loss', [loss for loss in LOSSES if loss is not RecallWeightedLoss])
def test_pixel_weights_and_ignore_index_both_count(make_batch, loss):
    logits, target = make_batch()
    module = loss(class_weight=WEIGHT)
    plain = module(logits, target)
    weight = torch.ones(target.shape)
    weight[:, :6] = 0
    cut = target.clone()
    cut[:, :6] = 255
    torch.testing.assert_close(module(logits, target, weight=weight), module(logits, cut))
    assert module(logits, target, weight=weight) != plain
    shifted = torch.where(target == 255, 7, target)
    torch.testing.assert_close(module(logits, shifted, ignore_index=7), plain)
    clean = target.clamp(max=4)
    torch.testing.assert_close(module(logits, clean, ignore_index=None), module(logits, clean))


@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize(
    'asked', [dict(avg_factor=10.0), dict(reduction_override='none'), dict(reduction_override='sum')]
)
def test_another_reduction_is_refused_not_dropped(make_batch, loss, asked):
    with pytest.raises(ValueError, match=r'mean over its own pixels.*thresh'):
        loss()(*make_batch(), **asked)
    loss()(*make_batch(), reduction_override='mean')


@pytest.mark.parametrize('loss', LOSSES)
def test_points_are_an_image_of_one_row(make_batch, loss):
    logits, target = make_batch()
    module = loss(class_weight=WEIGHT)
    torch.testing.assert_close(module(logits.flatten(2), target.flatten(1)), module(logits, target))


@pytest.mark.parametrize('shape', [(2, 1, 20), (2, 20, 1), (20,), ()])
def test_a_weight_of_points_of_another_shape_is_refused(shape):
    logits, target = torch.randn(2, 3, 20), torch.zeros(2, 20, dtype=torch.long)
    with pytest.raises(ValueError, match='pixel_weight must be of the shape of target'):
        WeightedCrossEntropyLoss()(logits, target, weight=torch.ones(shape))


@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_a_float32_loss_close_to_the_exact_one(make_batch, loss, dtype):
    logits, target = make_batch((5, 7), (13, 17), dtype=dtype)
    leaf = logits.requires_grad_()
    value = loss(class_weight=WEIGHT)(leaf, target)
    value.backward()
    assert value.dtype == torch.float32
    assert leaf.grad.dtype == dtype
    assert value.item() == pytest.approx(loss(class_weight=WEIGHT)(logits.double(), target).item(), rel=1e-5)


def test_weights_stay_out_of_checkpoints_and_out_of_the_order_of_buffers():
    loss = CombinedWeightedLoss(class_weight=WEIGHT)
    assert not loss.state_dict()
    assert not list(loss.buffers())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(loss_name='combined'), "must contain 'loss', got 'combined'"),
        (dict(ce_weight=-1), 'ce_weight must be a finite number, at least 0, got -1'),
        (dict(dice_weight=math.nan), 'dice_weight must be'),
        (dict(smooth=-1.0), 'smooth must be'),
        (dict(focal_gamma=-0.5), 'focal_gamma must be'),
        (dict(label_smoothing=1.0), r'label_smoothing must lie in \[0, 1\), got 1.0'),
        (dict(region_reduction='sum'), r"one of \('image', 'batch'\), got 'sum'"),
        (dict(absent_classes='drop'), r"one of \('include', 'ignore'\), got 'drop'"),
        (dict(region='iou'), r"region must be one of \('dice', .*got 'iou'"),
        (dict(alpha=0.3), r"alpha=0.3 and beta=None are of region='tversky', got 'dice'"),
        (dict(region='tversky', beta=-1.0), 'beta must be'),
        (dict(region='tversky', alpha=0, beta=0), 'must not both be 0'),
        (dict(smooth='x'), "smooth must be a finite number, at least 0, got 'x'"),
        (dict(gamma=0.0), 'gamma must be a finite number above 0, got 0.0'),
        (dict(region='tversky', square_denominator=True), 'can leave'),
        (dict(balance='learnt'), r"balance must be one of \('fixed', 'uncertainty', 'gradnorm'\), got 'lea"),
        (dict(ce_weight=0, dice_weight=0), 'all factors on the terms of CombinedWeightedLoss are 0'),
        (dict(balance='uncertainty', ce_weight=0.0), r'must be above 0, got .*0\.0.*0\.4'),
        (dict(logit_adjustment=-1.0), 'logit_adjustment must be'),
        (dict(logit_variation=math.inf), 'logit_variation must be'),
        (dict(sync_region=True), "needs region_reduction='batch', got 'image'"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CombinedWeightedLoss(**options)


@pytest.mark.parametrize('loss', [*LOSSES[:-1], SubclassifiedLoss, SimilaritySubclassifiedLoss])
def test_an_option_that_a_loss_does_not_have_is_refused_in_its_name(loss):
    name = loss.__name__
    with pytest.raises(TypeError, match=rf'{name} has no option los_weight=2\.0.* options are .*loss_weight'):
        loss(los_weight=2.0)
    for option in ('use_sigmoid', 'reduction', 'avg_non_ignore', 'use_mask'):
        message = rf"{name} has no option {option}=.*CrossEntropyLoss.*dict\(_delete_=True, type='{name}'"
        with pytest.raises(TypeError, match=message):
            loss(**{option: False})


def test_a_config_that_forgets_delete_is_told_so():
    inherited = dict(type='CombinedWeightedLoss', use_sigmoid=False, loss_weight=1.0)
    with pytest.raises(
        TypeError, match=r'CombinedWeightedLoss has no option use_sigmoid=False.*_delete_=True'
    ):
        MODELS.build(inherited)


def test_a_misspelt_option_and_the_old_mode_get_a_remedy():
    with pytest.raises(TypeError, match='Is focal_gamma meant'):
        WeightedCrossEntropyLoss(focal_gama=2.0)
    with pytest.raises(TypeError, match='a loss of its own, SimilaritySubclassifiedLoss'):
        SubclassifiedLoss(mode='similarity')


def test_options_of_one_loss_are_not_those_of_another():
    for loss, option in (
        (WeightedDiceLoss, dict(focal_gamma=2.0)),
        (WeightedDiceLoss, dict(region='jaccard')),
        (WeightedDiceLoss, dict(index='jaccard')),
        (WeightedCrossEntropyLoss, dict(smooth=1.0)),
        (WeightedFocalLoss, dict(focal_gamma=1.0)),
        (WeightedTverskyLoss, dict(ce_weight=1.0)),
        (SubclassifiedLoss, dict(threshold=0.9)),
        (SimilaritySubclassifiedLoss, dict(momentum=0.1)),
    ):
        with pytest.raises(TypeError, match=f'{loss.__name__} has no option {next(iter(option))}='):
            loss(**option)
    with pytest.raises(ValueError, match='two terms or more'):
        WeightedDiceLoss(balance='uncertainty')


def by_pixels(loss, **options):
    """A loss that divides by the number of pixels; the weights given do not have mean 1 over PIXELS."""
    options |= dict(divide_by='pixels')
    made = loss(class_weight=WEIGHT, **options)
    made.class_weight.set_pixels(PIXELS)
    return made


BY_PIXELS = [
    WeightedCrossEntropyLoss,
    WeightedFocalLoss,
    functools.partial(WeightedCrossEntropyLoss, label_smoothing=0.1, focal_gamma=1.5),
    functools.partial(CombinedWeightedLoss, region='tversky', absent_classes='ignore'),
    functools.partial(CombinedWeightedLoss, balance='uncertainty', logit_adjustment=1.0),
]


def equally_valid(make_batch):
    """Four images of as many valid pixels, but of other classes."""
    logits, target = make_batch(batch=4)
    target[target == 255] = 0
    target[:, :3] = 255
    target[1][target[1] == 1] = 2
    target[2, 3:9] = 0
    return logits, target


@pytest.mark.parametrize('loss', BY_PIXELS)
def test_divided_by_pixels_four_batches_of_one_have_the_gradient_of_one_batch_of_four(make_batch, loss):
    logits, target = equally_valid(make_batch)
    one, four = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    whole = by_pixels(loss)(one, target)
    whole.backward()
    values = [by_pixels(loss)(four[i : i + 1], target[i : i + 1]) / 4 for i in range(4)]
    sum(values).backward()
    torch.testing.assert_close(sum(values), whole, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(four.grad, one.grad, rtol=1e-12, atol=1e-16)
    weights = loss(class_weight=WEIGHT)
    if weights.class_weight.needs_pixels:
        weights.class_weight.set_pixels(PIXELS)
    pytorch = [weights(four[i : i + 1], target[i : i + 1]) / 4 for i in range(4)]
    assert abs(sum(pytorch) - weights(one, target)) > 1e-3  # what it is for


def test_divided_by_pixels_is_a_mean_over_valid_pixels_of_weights_with_mean_1(make_batch):
    logits, target = make_batch()
    share = torch.tensor(PIXELS, dtype=torch.float64) / sum(PIXELS)
    weight = torch.tensor(WEIGHT, dtype=torch.float64)
    weight = weight / (share @ weight)
    nll = F.cross_entropy(logits, target, weight, ignore_index=255, reduction='none')
    expected = nll.sum() / (target != 255).sum()
    torch.testing.assert_close(
        by_pixels(WeightedCrossEntropyLoss)(logits, target), expected, rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        WeightedCrossEntropyLoss(divide_by='pixels')(logits, target),
        WeightedCrossEntropyLoss()(logits, target),
    )
    # a pixel of weight k is k pixels
    half = torch.full(target.shape, 0.5)
    torch.testing.assert_close(
        by_pixels(WeightedCrossEntropyLoss)(logits, target, weight=half), expected, rtol=1e-6, atol=0
    )


def test_divided_by_pixels_the_overlap_beside_it_stays_as_it_is(make_batch):
    batch = make_batch()
    plain, scaled = CombinedWeightedLoss(class_weight=WEIGHT), by_pixels(CombinedWeightedLoss)
    plain(*batch), scaled(*batch)
    torch.testing.assert_close(
        scaled.logged['combined_dice'], plain.logged['combined_dice'], rtol=1e-6, atol=0
    )


def test_divided_by_pixels_it_says_what_is_missing_or_impossible(make_batch, tmp_path):
    batch = make_batch()
    with pytest.raises(RuntimeError, match='divide_by of WeightedFocalLoss have no class frequency yet'):
        WeightedFocalLoss(WEIGHT, divide_by='pixels')(*batch)
    loss = WeightedCrossEntropyLoss([0, 0, 0, 1, 0], divide_by='pixels')
    loss.class_weight.set_pixels(PIXELS)
    with pytest.raises(ValueError, match=r'is 0 for every class that has a pixel .*9000000'):
        loss(*batch)
    loss.class_weight.set_pixels([1, 2])
    with pytest.raises(ValueError, match='frequency is that of 2 classes, but the head predicts 5'):
        loss(*batch)
    with pytest.raises(ValueError, match=r"divide_by must be one of \('weights', 'pixels'\), got 'pixel'"):
        CombinedWeightedLoss(divide_by='pixel')
    with pytest.raises(
        ValueError, match="divides by all pixels, ignored ones too; it takes no divide_by='pix"
    ):
        SimilaritySubclassifiedLoss(paper_exact=True, divide_by='pixels')


def test_divided_by_pixels_a_file_brings_its_own_pixels_and_the_scale_of_weights_cancels_out(
    make_batch, tmp_path
):
    batch = make_batch()
    path = tmp_path / 'weights.json'
    path.write_text(json.dumps(dict(classes=list('abcde'), weights=WEIGHT, pixels=PIXELS)))
    of_file = WeightedCrossEntropyLoss(str(path), divide_by='pixels')
    assert not of_file.class_weight.needs_pixels
    given = by_pixels(WeightedCrossEntropyLoss)
    torch.testing.assert_close(of_file(*batch), given(*batch))
    before = given(*batch)
    given.class_weight.set_weights([2 * w for w in WEIGHT])
    torch.testing.assert_close(given(*batch), before)
    given.class_weight.set_weights(WEIGHT[::-1])
    assert abs(given(*batch) - before) > 1e-3
    path.write_text(json.dumps(dict(classes=list('abcde'), weights=WEIGHT)))
    assert WeightedCrossEntropyLoss(str(path), divide_by='pixels').class_weight.needs_pixels
    assert WeightedCrossEntropyLoss('auto', divide_by='pixels').class_weight.needs_pixels
    assert not WeightedCrossEntropyLoss(divide_by='pixels').class_weight.needs_pixels


# whatever a batch holds, and whatever the device


def subclassified(**options):
    """With a state from two earlier batches, so that subclasses weigh."""
    options |= dict(num_subclasses=2, warmup_iters=0, ramp_iters=0, momentum=0.5, divide_by='pixels')
    loss = SubclassifiedLoss(**options)
    loss.class_weight.set_pixels(PIXELS)
    for seed in (5, 6):
        generator = torch.Generator().manual_seed(seed)
        target = torch.randint(0, 5, (2, 13, 17), generator=generator)
        pred = torch.randn(2, 5, 13, 17, generator=generator)
        loss(pred, target, features=torch.randn(2, 3, 5, 7, generator=generator))
    return loss


def hardness(**options):
    loss = HardnessWeightedLoss(**options)
    loss.set_feature_shape(5, 3)
    torch.nn.init.normal_(loss.weight_head[-1].weight, generator=torch.Generator().manual_seed(3))
    return loss


EVERY_LOSS = {
    **{loss.__name__: loss for loss in LOSSES},
    'focal, by pixels': functools.partial(by_pixels, WeightedFocalLoss),
    'focal and generalized Dice': functools.partial(
        CombinedWeightedLoss, region='generalized_dice', focal_gamma=2.0, gamma=0.5, region_reduction='batch'
    ),
    'generalized Dice, smooth 0': functools.partial(GeneralizedDiceLoss, smooth=0.0, absent_classes='ignore'),
    'Dice, smooth 0': functools.partial(WeightedDiceLoss, smooth=0.0, absent_classes='ignore', gamma=0.5),
    'V-Net': functools.partial(WeightedDiceLoss, square_denominator=True, region_reduction='batch'),
    'other weights in Dice': functools.partial(CombinedWeightedLoss, region_class_weight=OF_REGION),
    'smoothed': functools.partial(CombinedWeightedLoss, label_smoothing=0.1, focal_gamma=0.5),
    'adjusted': functools.partial(WeightedFocalLoss, logit_adjustment=1.0, logit_variation=2.0),
    'HardnessWeightedLoss': hardness,
    'SkeletonRecallLoss': SkeletonRecallLoss,
    'tubes, smooth 0': functools.partial(SkeletonRecallLoss, smooth=0.0, region_reduction='batch'),
    'running recall': functools.partial(RecallWeightedLoss, momentum=0.1),
    'SubclassifiedLoss': subclassified,
    'SimilaritySubclassifiedLoss': SimilaritySubclassifiedLoss,
    'paper_exact': functools.partial(SimilaritySubclassifiedLoss, paper_exact=True),
}
BATCHES = dict(
    void=lambda target: target.fill_(255),
    one_void_image=lambda target: target[0].fill_(255),
    one_valid_pixel=lambda target: target.fill_(255)[0, 3, 4].fill_(1),
    only_classes_of_weight_0=lambda target: target.fill_(3),
    weight_0_and_void=lambda target: target.fill_(3)[1].fill_(255),
    one_class=lambda target: target.fill_(0),
)


def made(name, **options):
    kind = EVERY_LOSS[name]
    if getattr(kind, 'func', None) is by_pixels:
        loss = kind(**options)
    else:
        loss = kind(class_weight=WEIGHT, **options)
    if loss.class_weight.needs_pixels:
        loss.class_weight.set_pixels(PIXELS)
    return loss


def test_the_battery_holds_every_registered_loss():
    registered = {c for c in MODELS.module_dict.values() if isinstance(c, type)} | {
        c for c in ROOT_MODELS.module_dict.values() if isinstance(c, type)
    }
    ours = {
        c for c in registered if issubclass(c, WeightedLoss) and c.__module__.startswith('mmseg_imbalance')
    }
    assert ours
    assert ours <= {type(made(name)) for name in EVERY_LOSS}


@pytest.mark.parametrize('precision', ['float32', 'large', 'float16', 'bfloat16', 'autocast'])
@pytest.mark.parametrize('name', EVERY_LOSS)
def test_value_and_gradient_are_finite_whatever_the_batch_holds(make_batch, name, precision):
    loss = made(name)
    for pixels, weigh in itertools.product(BATCHES, (None, 0.0, 1e-30)):
        logits, target = make_batch((7, 9), dtype=torch.float32)
        BATCHES[pixels](target)
        if precision == 'large':
            logits *= 1e3
        if precision in ('float16', 'bfloat16'):
            logits = logits.to(getattr(torch, precision))
        leaf = logits.requires_grad_()
        features = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)).to(logits.dtype)
        weight = None if weigh is None else torch.full(target.shape, weigh)
        marked = torch.ones_like(target, dtype=torch.bool)
        marked[:, ::2] = False
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'autocast'):
            value = loss(leaf, target, weight=weight, features=features, marked=marked)
        value.backward()
        assert value.isfinite(), (pixels, weigh)
        assert value.dtype == torch.float32
        assert leaf.grad.isfinite().all(), (pixels, weigh)
        assert all(x.isfinite().all() for x in loss.take_logged().values()), (pixels, weigh)
    for parameter in loss.parameters():
        assert parameter.grad.isfinite().all()
    assert all(x.isfinite().all() for x in loss.buffers() if x.is_floating_point())


@pytest.mark.parametrize('name', EVERY_LOSS)
def test_outside_of_the_one_pass_a_loss_makes_no_double_tensor(make_batch, name, monkeypatch):
    """What the backends of soft_stats do, test_soft_stats pins."""
    logits, target = make_batch((7, 9), dtype=torch.float32)
    leaf = logits.requires_grad_()
    features = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    loss = made(name)
    loss.watch(LabelCounter())
    loss.watch(ClassWatcher())
    weigh, learn = loss.weigh_pixels, loss.learn

    def outside(function):
        def call(*args, **options):
            with torch.utils._python_dispatch._disable_current_modes():
                return function(*args, **options)

        return call

    monkeypatch.setattr('mmseg_imbalance.losses.soft_stats', outside(soft_stats))
    monkeypatch.setattr(loss, 'weigh_pixels', outside(weigh))
    monkeypatch.setattr(loss, 'learn', outside(learn))
    with NoDoubles():
        value = loss(leaf, target, features=features, marked=target == 1)
    value.backward()
    assert leaf.grad.isfinite().all()


# in MMSegmentation's heads


def samples(target):
    return [
        SegDataSample(gt_sem_seg=PixelData(data=t[None]), metainfo=dict(img_shape=t.shape)) for t in target
    ]


def head(type='FCNHead', loss=None, **kwargs):
    torch.manual_seed(0)
    options = dict(
        SegformerHead=dict(in_channels=[8, 8], in_index=[0, 1]),
        FeatureSegformerHead=dict(in_channels=[8, 8], in_index=[0, 1]),
        FCNHead=dict(in_channels=8, in_index=0, num_convs=1),
        ASPPHead=dict(in_channels=8, in_index=0, dilations=(1, 2)),
    )[type]
    options |= dict(
        type=type, channels=8, num_classes=5, dropout_ratio=0.0, norm_cfg=dict(type='BN'), loss_decode=loss
    )
    return MODELS.build(options | kwargs)


def run(decode_head, target):
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(2, 8, 10, 12, generator=generator), torch.randn(2, 8, 5, 6, generator=generator)]
    return decode_head.loss(features, samples(target), None)


TARGET = torch.randint(0, 5, (2, 40, 48), generator=torch.Generator().manual_seed(2))
TARGET[:, :5] = 255


@pytest.mark.parametrize('prefix', ['', 'mmseg_imbalance.'])
@pytest.mark.parametrize('type', ['SegformerHead', 'FCNHead', 'ASPPHead'])
def test_heads_of_mmsegmentation_log_the_total_alone_and_train(type, prefix):
    decode_head = head(type, dict(type=f'{prefix}CombinedWeightedLoss', class_weight=WEIGHT))
    losses = run(decode_head, TARGET)
    assert set(losses) == {'loss_combined', 'acc_seg'}
    parts = decode_head.loss_decode.logged
    expected = 0.6 * parts['combined_ce'] + 0.4 * parts['combined_dice']
    torch.testing.assert_close(losses['loss_combined'].detach(), expected)
    losses['loss_combined'].backward()
    assert decode_head.conv_seg.weight.grad.abs().sum() > 0
    assert 'CombinedWeightedLoss' in repr(decode_head)


@pytest.mark.parametrize('more', [[], [dict(type='SubclassifiedLoss', loss_weight=0.2, class_weight=WEIGHT)]])
def test_feature_heads_log_the_parts_and_add_only_the_sum_to_the_total(more):
    combined = dict(type='CombinedWeightedLoss', class_weight=WEIGHT)
    decode_head = head('FeatureSegformerHead', [combined, *more] if more else combined)
    losses = run(decode_head, TARGET)
    subclass = {'loss_subclass', 'subclass_smallest_share', 'subclass_weight_ratio'} if more else set()
    assert set(losses) == {'loss_combined', 'combined_ce', 'combined_dice', 'acc_seg', *subclass}
    expected = 0.6 * losses['combined_ce'] + 0.4 * losses['combined_dice']
    torch.testing.assert_close(losses['loss_combined'].detach(), expected)
    total, logged = BaseModel.parse_losses(nn.Module(), losses)
    torch.testing.assert_close(total, sum(x for name, x in losses.items() if name.startswith('loss')))
    assert {'combined_ce', 'combined_dice', 'loss_combined', 'loss', *subclass} <= set(logged)


@pytest.mark.parametrize('type', ['HardnessWeightedLoss', 'CombinedWeightedLoss'])
def test_a_loss_that_learns_says_that_the_model_does_not(type):
    """As under reentrant activation checkpointing, where another loss ends with autograd's error."""
    more = dict(balance='uncertainty') if type.startswith('Combined') else {}
    head = dict(type='FeatureHead', base='FCNHead', num_convs=0, concat_input=False, kernel_size=1)
    head |= dict(in_channels=4, channels=4, num_classes=5, loss_decode=dict(type=type, **more))
    head = MODELS.build(head)
    sample = SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, 5, (1, 8, 8))))
    features = [torch.randn(1, 4, 4, 4)]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        head.loss(features, [sample], {})
        with torch.no_grad():
            head.loss(features, [sample], {})
    head.conv_seg.requires_grad_(False)
    with pytest.warns(UserWarning, match=f'the logits that {type} receives have no gradient'):
        head.loss(features, [sample], {})
    head.loss_decode.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        head.loss(features, [sample], {})


def test_a_head_passes_its_ignore_index():
    loss = dict(type='WeightedCrossEntropyLoss')
    same = torch.where(TARGET == 255, 7, TARGET)
    one = run(head(loss=loss), TARGET)['loss_ce']
    torch.testing.assert_close(run(head(loss=loss, ignore_index=7), same)['loss_ce'], one)


def test_an_ohem_sampler_changes_the_loss():
    loss = dict(type='CombinedWeightedLoss', class_weight=WEIGHT)
    sampler = dict(type='OHEMPixelSampler', thresh=0.2, min_kept=50)
    with_sampler = run(head(loss=loss, sampler=sampler), TARGET)['loss_combined']
    assert with_sampler != run(head(loss=loss), TARGET)['loss_combined']
    with pytest.raises(ValueError, match='thresh'):
        run(head(loss=loss, sampler=dict(type='OHEMPixelSampler', min_kept=50)), TARGET)


def test_beside_losses_of_the_framework_in_a_list():
    mixed = [
        dict(type='CombinedWeightedLoss', class_weight=WEIGHT),
        dict(type='CrossEntropyLoss', avg_non_ignore=True),
    ]
    losses = run(head(loss=mixed), TARGET)
    assert set(losses) == {'loss_combined', 'loss_ce', 'acc_seg'}
    alone = run(head(loss=mixed[0]), TARGET)['loss_combined']
    torch.testing.assert_close(losses['loss_combined'], alone)


def test_a_head_that_picks_losses_by_position_gets_a_clear_error():
    with pytest.raises(TypeError, match='write loss_decode as a list'):
        CombinedWeightedLoss()[0]


def test_a_binary_head_with_one_output_channel_trains():
    decode_head = head(
        loss=dict(type='CombinedWeightedLoss', class_weight=[1, 5]),
        num_classes=2,
        out_channels=1,
        threshold=0.5,
    )
    losses = run(decode_head, TARGET.clamp(max=255) % 2 * (TARGET != 255) + 255 * (TARGET == 255))
    losses['loss_combined'].backward()
    assert decode_head.conv_seg.weight.grad.abs().sum() > 0
