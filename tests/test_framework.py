"""What MMSegmentation's own losses do, shown by running them, beside what ours do in the same case.

The README names these tests as the reasons for the package.
"""

from contextlib import contextmanager
from importlib.metadata import packages_distributions

import pytest
import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from mmseg_imbalance.losses import WeightedCrossEntropyLoss, WeightedDiceLoss

MENDED = 'MMSegmentation has mended this: update the README'
# the maintained fork, or OpenMMLab's own MMSegmentation 1.2
FORK = 'onedl-mmsegmentation' in packages_distributions()['mmseg']
WEIGHT = [0.5, 1.0, 2.0, 4.0]


@contextmanager
def still_raises(error):
    try:
        yield
    except error:
        return
    pytest.fail(MENDED)


def framework(type, **options):
    return MODELS.build(dict(type=f'mmseg.{type}', **options))


def make_batch(ignore_index=255):
    """Logits of 4 classes and labels, a quarter of them ignored: (2, 4, 16, 20), (2, 16, 20)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 16, 20, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 4, (2, 16, 20), generator=generator)
    target[:, :4] = ignore_index
    return logits, target


def in_head(loss, logits, target, **options):
    """The loss as a decode head calls it: with its ignore_index and the pixel weights of its sampler."""
    head = MODELS.build(
        dict(type='mmseg.FCNHead', in_channels=4, channels=4, num_classes=4, num_convs=1, loss_decode=loss)
        | options
    )
    samples = [SegDataSample(gt_sem_seg=PixelData(data=t[None])) for t in target]
    return head.loss_by_feat(logits, samples)[head.loss_decode.loss_name]


OURS = dict(type='mmseg_imbalance.CombinedWeightedLoss', class_weight=WEIGHT)


@pytest.mark.parametrize('avg_non_ignore', [False, True])
def test_cross_entropy_with_class_weight_fails_on_ignored_pixels(avg_non_ignore):
    logits, target = make_batch()
    loss = framework('CrossEntropyLoss', class_weight=WEIGHT, avg_non_ignore=avg_non_ignore)
    expected = F.cross_entropy(logits, target, logits.new_tensor(WEIGHT), ignore_index=255)
    if FORK and not avg_non_ignore:  # the one case that the fork has mended
        torch.testing.assert_close(loss(logits, target, ignore_index=255), expected)
    else:
        with still_raises(IndexError):
            loss(logits, target, ignore_index=255)
    torch.testing.assert_close(WeightedCrossEntropyLoss(WEIGHT)(logits, target, ignore_index=255), expected)


def test_cross_entropy_divides_by_ignored_pixels():
    logits, target = make_batch()
    expected = F.cross_entropy(logits, target, ignore_index=255)
    theirs = framework('CrossEntropyLoss')(logits, target, ignore_index=255)
    assert theirs.item() == pytest.approx(0.75 * expected.item()), MENDED
    torch.testing.assert_close(WeightedCrossEntropyLoss()(logits, target, ignore_index=255), expected)


@pytest.mark.parametrize('naive_dice', [False, True])
def test_dice_hardly_sees_a_missed_rare_class(naive_dice):
    target = torch.zeros(1, 200, 500, dtype=torch.long)
    target[:, :10, :10] = 1  # 0.1 % of the pixels
    perfect = 40.0 * F.one_hot(target, 2).movedim(3, 1)
    missed = 40.0 * F.one_hot(torch.zeros_like(target), 2).movedim(3, 1)

    def cost(loss):
        return (loss(missed, target) - loss(perfect, target)).item()

    theirs = cost(framework('DiceLoss', use_sigmoid=False, naive_dice=naive_dice))
    assert theirs == pytest.approx(0.001, rel=0.01), MENDED
    assert cost(WeightedDiceLoss()) == pytest.approx(0.5, rel=0.02)
    assert cost(WeightedDiceLoss([1.0, 9.0])) == pytest.approx(0.9, rel=0.02)


def test_dice_takes_no_class_weight():
    with still_raises(TypeError):
        framework('DiceLoss', class_weight=WEIGHT)
    logits, target = make_batch()
    assert WeightedDiceLoss(WEIGHT)(logits, target) != WeightedDiceLoss()(logits, target)


def test_logits_under_ignored_pixels_change_dice():
    logits, target = make_batch()
    other = logits.clone()
    other[:, 0, :4] += 5  # where the label is 255

    def change(loss):
        return (loss(other, target, ignore_index=255) - loss(logits, target, ignore_index=255)).abs()

    assert change(framework('DiceLoss', use_sigmoid=False)) > 0.01, MENDED
    assert change(WeightedDiceLoss(WEIGHT)) == 0


def test_ohem_pixel_weights_crash_dice():
    logits, target = make_batch()
    sampler = dict(sampler=dict(type='mmseg.OHEMPixelSampler', thresh=0.2, min_kept=10))
    with still_raises(AssertionError):
        in_head(dict(type='DiceLoss', use_sigmoid=False), logits, target, **sampler)
    assert in_head(OURS, logits, target, **sampler) != in_head(OURS, logits, target)


def test_tversky_drops_the_ignore_index_of_the_head():
    logits, target = make_batch(ignore_index=7)
    other = logits.clone()
    other[:, 0, :4] += 5  # where the label is 7

    def change(loss):
        return (
            in_head(loss, other, target, ignore_index=7) - in_head(loss, logits, target, ignore_index=7)
        ).abs()

    assert change(dict(type='TverskyLoss')) > 0.01, MENDED
    assert change(OURS) == 0


def test_tversky_drops_pixel_weights():
    logits, target = make_batch()
    sampler = dict(sampler=dict(type='mmseg.OHEMPixelSampler', thresh=0.2, min_kept=10))
    tversky = dict(type='TverskyLoss')
    assert in_head(tversky, logits, target, **sampler) == in_head(tversky, logits, target), MENDED
    assert in_head(OURS, logits, target, **sampler) != in_head(OURS, logits, target)
