import json
import math

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import nn

from mmseg_imbalance.losses import CombinedWeightedLoss, WeightedCrossEntropyLoss, WeightedDiceLoss

LOSSES = (CombinedWeightedLoss, WeightedCrossEntropyLoss, WeightedDiceLoss)
WEIGHT = [0.2, 3.0, 1.0, 0.0, 1.7]
CLASSES = ['a', 'b', 'c', 'd', 'e']


@pytest.fixture
def dataset_meta():
    """The class names as a runner leaves them in the message hub."""
    hub = MessageHub.get_current_instance()
    hub.update_info('dataset_meta', dict(classes=CLASSES))
    yield
    hub.pop_info('dataset_meta')


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
    total, ce_part, dice_part = (term(logits, target, weight=weight, ignore_index=255) for term in loss)
    assert (total.item(), ce_part.item(), dice_part.item()) == pytest.approx(
        (value.item(), ce, dice), rel=1e-6
    )


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
    value = loss(WEIGHT if loss is not CombinedWeightedLoss else 0.6)(leaf, target.fill_(255))
    value.backward()
    assert value == 0
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


@pytest.mark.parametrize('loss', LOSSES)
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


# class weights


@pytest.mark.parametrize(
    'given',
    [
        [1.0, -1.0],
        [1.0, math.nan],
        [math.inf, 1.0],
        [0.0, 0.0],
        [],
        ['x'],
        [[1.0, 2.0]],
        {'a': -2.0},
        {'a': math.nan},
    ],
)
def test_impossible_weights_are_refused_with_the_values(given):
    with pytest.raises(ValueError, match='must be finite numbers, at least 0'):
        CombinedWeightedLoss(class_weight=given)


def test_wrong_length_says_both_lengths(make_batch):
    with pytest.raises(ValueError, match=r'holds 2 numbers, \[1.0, 2.0\], but the head predicts 5'):
        WeightedDiceLoss([1.0, 2.0])(*make_batch())


@pytest.mark.parametrize('given', [np.array(WEIGHT), torch.tensor(WEIGHT), tuple(WEIGHT)])
def test_weights_come_as_any_sequence(make_batch, given):
    logits, target = make_batch()
    torch.testing.assert_close(
        WeightedDiceLoss(given)(logits, target), WeightedDiceLoss(WEIGHT)(logits, target)
    )


@pytest.mark.usefixtures('dataset_meta')
def test_a_dict_names_classes_and_the_others_weigh_1(make_batch):
    logits, target = make_batch()
    named = WeightedCrossEntropyLoss(dict(d=4.0, b=0.5))
    expected = WeightedCrossEntropyLoss([1, 0.5, 1, 4, 1])(logits, target)
    torch.testing.assert_close(named(logits, target), expected)


@pytest.mark.usefixtures('dataset_meta')
def test_an_unknown_class_name_says_which_ones_there_are(make_batch):
    with pytest.raises(ValueError, match=r"names \['rider'\].*classes are \['a', 'b'"):
        WeightedCrossEntropyLoss(dict(rider=4.0))(*make_batch())


@pytest.mark.usefixtures('dataset_meta')
def test_a_dict_may_switch_off_a_class(make_batch):
    logits, target = make_batch()
    expected = WeightedCrossEntropyLoss([0, 1, 1, 1, 1])(logits, target)
    torch.testing.assert_close(WeightedCrossEntropyLoss(dict(a=0.0))(logits, target), expected)


def test_a_dict_outside_a_runner_says_what_to_give_instead(make_batch):
    with pytest.raises(RuntimeError, match='give a list'):
        WeightedCrossEntropyLoss(dict(a=4.0))(*make_batch())


def test_auto_before_the_hook_says_which_hook_to_add(make_batch):
    loss = CombinedWeightedLoss(class_weight='auto')
    with pytest.raises(RuntimeError, match=r"custom_hooks = \[dict\(type='ClassWeightHook'\)\]"):
        loss(*make_batch())
    loss.set_class_weight(WEIGHT)
    torch.testing.assert_close(loss(*make_batch()), CombinedWeightedLoss(class_weight=WEIGHT)(*make_batch()))


def test_a_path_gives_the_weights_of_the_file(make_batch, tmp_path):
    path = tmp_path / 'weights.json'
    path.write_text(json.dumps(dict(classes=CLASSES, weights=WEIGHT)))
    expected = WeightedDiceLoss(WEIGHT)(*make_batch())
    for given in (path, str(path)):
        torch.testing.assert_close(WeightedDiceLoss(given)(*make_batch()), expected)


@pytest.mark.usefixtures('dataset_meta')
def test_a_file_for_other_classes_is_refused(make_batch, tmp_path):
    path = tmp_path / 'weights.json'
    path.write_text(json.dumps(dict(classes=CLASSES[::-1], weights=WEIGHT)))
    with pytest.raises(ValueError, match=r"is for the classes \['e'.*data set has \['a'"):
        WeightedDiceLoss(str(path))(*make_batch())


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.json' is neither 'auto' nor a file"):
        WeightedDiceLoss(str(tmp_path / 'nowhere.json'))
    for content in ('{', '[1, 2]', '{"classes": []}'):
        (tmp_path / 'foreign.json').write_text(content)
        with pytest.raises(ValueError, match=r'foreign.json. is not a file of'):
            WeightedDiceLoss(str(tmp_path / 'foreign.json'))


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
        (dict(sync_region=True), "needs region_reduction='batch', got 'image'"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CombinedWeightedLoss(**options)


# in the framework's heads


def samples(target):
    return [
        SegDataSample(gt_sem_seg=PixelData(data=t[None]), metainfo=dict(img_shape=t.shape)) for t in target
    ]


def head(type='FCNHead', loss=None, **kwargs):
    torch.manual_seed(0)
    options = dict(
        SegformerHead=dict(in_channels=[8, 8], in_index=[0, 1]),
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
def test_heads_log_the_parts_and_add_only_the_sum_to_the_total(type, prefix):
    decode_head = head(type, dict(type=f'{prefix}CombinedWeightedLoss', class_weight=WEIGHT))
    losses = run(decode_head, TARGET)
    assert set(losses) == {'loss_combined', 'combined_ce', 'combined_dice', 'acc_seg'}
    expected = 0.6 * losses['combined_ce'] + 0.4 * losses['combined_dice']
    torch.testing.assert_close(losses['loss_combined'], expected)
    total, logged = BaseModel.parse_losses(nn.Module(), losses)
    torch.testing.assert_close(total, losses['loss_combined'])
    assert {'combined_ce', 'combined_dice', 'loss_combined', 'loss'} <= set(logged)
    total.backward()
    assert decode_head.conv_seg.weight.grad.abs().sum() > 0
    assert 'CombinedWeightedLoss' in repr(decode_head)


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
