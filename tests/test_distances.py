"""The Hausdorff distance of each class against all pairs of surface pixels, and as keys of the metric."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mmengine.registry import METRICS
from scipy import ndimage
from test_metrics import CLASSES, evaluate, imbalance, samples, scenes_of

from mmseg_imbalance.distances import distance_scores, hausdorff_distances, surface

MAPS = arrays(np.int64, (7, 11), elements=st.integers(-1, 3))


def border(mask):
    return np.argwhere(mask & ~ndimage.binary_erosion(mask))


def of_all_pairs(prediction, label, classes):
    """From each surface pixel to all of the other surface, by numpy."""
    found = []
    for c in range(classes):
        first, second = border(prediction == c), border(label == c)
        if len(first) and len(second):
            pairs = np.hypot(*(first[:, None] - second[None]).transpose(2, 0, 1))
            found.append(max(np.quantile(pairs.min(axis), 0.95) for axis in (0, 1)))
        else:
            found.append(np.inf if len(first) + len(second) else np.nan)
    return found


def without_ignored(labels, predictions):
    return np.where(labels == 255, -1, labels), np.where(labels == 255, -1, predictions)


@settings(max_examples=100, deadline=None)
@given(MAPS, MAPS)
def test_distances_are_those_of_all_pairs_of_surface_pixels(prediction, label):
    np.testing.assert_allclose(hausdorff_distances(prediction, label, 5), of_all_pairs(prediction, label, 5))


@pytest.mark.parametrize('shape', [(1, 1), (1, 9), (9, 1), (2, 2), (40, 53)])
def test_images_of_any_shape_have_the_surfaces_of_scipys_erosion(shape):
    rng = np.random.default_rng(0)
    noise = np.stack([ndimage.gaussian_filter(rng.normal(size=shape), 2) for _ in range(6)])
    prediction, label = noise[:3].argmax(0) - 1, noise[3:].argmax(0) - 1
    for c in range(2):
        assert (np.argwhere(surface(label) & (label == c)) == border(label == c)).all()
    np.testing.assert_allclose(hausdorff_distances(prediction, label, 2), of_all_pairs(prediction, label, 2))


def test_the_larger_of_both_directions_counts_and_a_few_far_pixels_do_not():
    label = np.full((50, 60), -1)
    label[0, :40] = 0
    prediction = label.copy()
    prediction[49, :2] = 0  # 2 of 42, 49 pixels away
    assert hausdorff_distances(prediction, label, 1)[0] < 5
    prediction[49, :4] = 0  # 4 of 44
    assert hausdorff_distances(prediction, label, 1)[0] == 49
    # each pixel of the label is in the prediction, so one direction alone would give 0
    assert hausdorff_distances(label, prediction, 1)[0] == 49
    assert hausdorff_distances(label, label, 1)[0] == 0


def test_what_has_no_distance_is_counted_and_in_no_mean():
    distances = np.array(
        [[1.0, np.inf, np.nan, np.inf], [4.0, 6.0, np.nan, np.nan], [np.nan, 8.0, np.nan, np.nan]]
    )
    held = np.array([True, True, False, False])
    groups = dict(head=np.array([0]), tail=np.array([1, 2, 3]))
    scores = distance_scores(distances, held, ['a b', 'loss', 'never', 'only predicted'], groups)
    expected = {
        'mHD95': (2.5 + 7) / 2,
        'mHD95.infinite': 100 / 6,
        'mHD95.head': 2.5,
        'mHD95.head.infinite': 0,
        'mHD95.tail': 7,
        'mHD95.tail.infinite': 100 / 3,
        'HD95.a b': 2.5,
        'HD95.loss': 7,
        'HD95.never': np.nan,
        'HD95.only predicted': np.nan,
        'HD95.infinite.a b': 0,
        'HD95.infinite.loss': 100 / 3,
        'HD95.infinite.never': np.nan,
        'HD95.infinite.only predicted': 100,
    }
    assert list(scores) == list(expected)
    assert scores == pytest.approx(expected, nan_ok=True)


def test_the_metric_gives_the_means_over_images_and_ignored_pixels_belong_to_no_class():
    labels, predictions = scenes_of(6)
    predictions[0][predictions[0] == 3] = labels[1][labels[1] == 3] = 0
    metrics = imbalance(labels, predictions, iou_metrics=['mIoU', 'mHD95'])
    maps = zip(*without_ignored(labels, predictions), strict=True)
    found = np.array([of_all_pairs(prediction, label, 5) for label, prediction in maps])
    finite = np.where(np.isfinite(found), found, np.nan)
    infinite = 100 * np.isinf(found).sum(0) / np.maximum(1, (~np.isnan(found)).sum(0))
    assert np.isinf(found[:2, 3]).all()
    for c, name in enumerate(CLASSES[:4]):
        assert metrics[f'HD95.{name}'] == pytest.approx(np.nanmean(finite[:, c]), abs=0.006)
        assert metrics[f'HD95.infinite.{name}'] == pytest.approx(infinite[c], abs=0.006)
    assert np.isnan(metrics['HD95.never'])
    assert metrics['mHD95.tail'] == pytest.approx(np.nanmean(finite[:, 2:4], 0).mean(), abs=0.006)
    assert metrics['mHD95.infinite'] == pytest.approx(infinite[:4].mean(), abs=0.006)


def test_the_other_numbers_stay_and_the_keys_are_those_expected():
    labels, predictions = scenes_of(3)
    plain = imbalance(labels, predictions)
    metric = METRICS.build(
        dict(type='ImbalanceIoUMetric', groups=dict(tail=['pole']), iou_metrics=['mIoU', 'mDice', 'mHD95'])
    )
    metric.dataset_meta = dict(classes=CLASSES)
    metric.process({}, samples(labels, predictions))
    metrics = metric.evaluate(3)
    assert sorted(metric.expected_keys()) == sorted(metrics)
    assert not [key for key in plain if 'HD95' in key or 'Dice' in key]
    for key in ('mIoU', 'IoU.pole', 'mIoU.low', 'mRecall.small'):
        assert metrics[key] == plain[key]
    alone = imbalance(labels, predictions, iou_metrics=['mHD95'])
    assert {key: alone[key] for key in plain} == pytest.approx(plain, nan_ok=True)


def test_images_in_which_nothing_is_valid_change_nothing():
    labels, predictions = scenes_of(3)
    options = dict(iou_metrics=['mIoU', 'mDice', 'mHD95'])
    blank = np.full_like(labels[:1], 255)
    more = imbalance(np.concatenate([labels, blank]), np.concatenate([predictions, blank - 255]), **options)
    assert more == pytest.approx(imbalance(labels, predictions, **options), nan_ok=True)
    nothing = imbalance(blank, blank - 255, **options)
    assert np.isnan([value for key, value in nothing.items() if 'HD95' in key]).all()


def test_only_the_metric_that_has_distances_takes_the_name():
    with pytest.raises(
        ValueError, match=r"iou_metrics are of \['mIoU', 'mDice', 'mFscore'\], got \['mHD95'\]"
    ):
        METRICS.build(dict(type='ClassIoUMetric', iou_metrics=['mHD95']))
    labels, predictions = scenes_of(2)
    assert 'Dice.pole' in evaluate(labels, predictions, CLASSES, iou_metrics='mDice')
