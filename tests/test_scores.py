import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_metrics import CLASSES

from mmseg_imbalance.intervals import Noise, jackknife, noise_of_mean
from mmseg_imbalance.scores import (
    AREAS,
    block_names,
    class_groups,
    class_pairs,
    fine_grained_iou,
    group_scores,
    load_image_scores,
    present_mean,
    save_image_scores,
)


@pytest.mark.parametrize(
    ('pixels', 'expected'),
    [
        ([5, 0, 9, 7, 1, 3], ([2, 3], [0, 5], [4, 1])),
        ([1, 2, 3, 4], ([3, 2], [1], [0])),
        ([1, 2, 3, 4, 5], ([4, 3], [2, 1], [0])),
        ([4, 4, 4], ([0], [1], [2])),
        ([1, 2], ([1], [], [0])),
        ([1], ([0], [], [])),
    ],
)
def test_thirds_by_pixels(pixels, expected):
    groups = class_groups(np.array(pixels))
    assert tuple(members.tolist() for members in groups.values()) == expected
    assert list(groups) == ['head', 'body', 'tail']


def loops_over_images(intersect, union, label, percent):
    """mIoU_I and mIoU_C over the lowest ``percent``, written as sorted lists."""
    of_images, of_classes = [], {}
    for i in range(len(label)):
        ious = []
        for c in range(label.shape[1]):
            if label[i, c]:
                ious.append(intersect[i, c] / union[i, c])
                of_classes.setdefault(c, []).append(ious[-1])
        if ious:
            of_images.append(sum(ious) / len(ious))

    def lowest(values):
        taken = sorted(values)[: max(1, int(percent * len(values) / 100))]
        return sum(taken) / len(taken)

    means = [lowest(values) for values in of_classes.values()]
    return lowest(of_images), sum(means) / len(means)


@given(
    st.integers(1, 43),
    st.integers(1, 5),
    st.sampled_from([1, 5, 7, 10, 29, 33.3, 100]),
    st.integers(0, 2**31),
)
def test_fine_grained_iou_is_that_of_plain_loops(images, classes, percent, seed):
    rng = np.random.default_rng(seed)
    label, predicted = rng.integers(0, 50, (2, images, classes)) * rng.integers(0, 2, (2, images, classes))
    label[0, 0] = 8  # one pair at least
    intersect = rng.integers(0, np.minimum(label, predicted) + 1)
    scores = fine_grained_iou(intersect, label + predicted - intersect, label, [percent])
    for suffix, share in (('', 100), (f'_q{percent}', percent)):
        expected = loops_over_images(intersect, label + predicted - intersect, label, share)
        assert (scores[f'mIoU_I{suffix}'], scores[f'mIoU_C{suffix}']) == pytest.approx(expected)


def test_a_mean_is_over_the_numbers_that_are_known():
    assert present_mean(np.array([np.nan, 3.0, 1.0])) == 2
    assert present_mean(np.array([np.nan, 3.0, 1.0]), 34) == 1
    assert np.isnan(present_mean(np.array([np.nan, np.nan])))


def pixels_of(label, right, false):
    """The four areas of (N, C) pixels in labels, of those found and of those predicted wrongly."""
    label, right, false = (np.array(values) for values in (label, right, false))
    return dict(intersect=right, union=label + false, pred=right + false, label=label)


def test_the_means_of_a_group_are_over_the_classes_that_labels_hold():
    areas = pixels_of([[9, 4, 0], [9, 6, 0]], [[6, 3, 0], [9, 2, 0]], [[1, 0, 1], [0, 0, 0]])
    scores = group_scores(areas, dict(head=np.array([0]), tail=np.array([1, 2])))
    assert scores['mIoU.tail'] == scores['mRecall.tail'] == 5 / 10
    assert scores['mPrecision.tail'] == 1
    without = group_scores({key: x[:, :2] for key, x in areas.items()}, dict(tail=np.array([1])))
    assert [scores[f'mIoU.tail.{end}'] for end in ('low', 'high')] == [
        without[f'mIoU.tail.{end}'] for end in ('low', 'high')
    ]
    nothing = group_scores(areas, dict(tail=np.array([2])))
    assert np.isnan([value for key, value in nothing.items() if 'tail' in key]).all()


@pytest.mark.parametrize('absent', [None, 0.0, 0.5])
@pytest.mark.parametrize('false', [0, 7])
def test_a_mean_lies_inside_its_interval_whatever_absent_classes_count_as(absent, false):
    rng = np.random.default_rng(0)
    label = rng.integers(1, 90, (30, 4)) * [1, 1, 0, 0]
    right = rng.binomial(label, 0.9)
    wrong = rng.integers(0, 9, label.shape) * [1, 1, 0, 0]
    wrong[0, 2] = false
    scores = group_scores(pixels_of(label, right, wrong), {}, None, absent)
    total = {key: values.sum(0) for key, values in pixels_of(label, right, wrong).items()}
    counted = [i / u if u else absent for i, u in zip(total['intersect'], total['union'], strict=True)]
    mean = np.mean([value for value in counted if value is not None])
    assert scores['mIoU.low'] < mean < scores['mIoU.high']
    alone = group_scores(pixels_of(label[:, :2], right[:, :2], wrong[:, :2]), {})
    if len([value for value in counted if value is not None]) == 2:
        assert scores == alone
    else:
        assert np.ptp(list(scores.values())) < np.ptp(list(alone.values()))


def test_a_group_of_classes_in_one_image_has_no_interval():
    label = np.array([[9, 5], [9, 0], [9, 0]])
    areas = pixels_of(label, [[4, 3], [5, 0], [7, 0]], [[0, 1], [0, 2], [0, 0]])
    scores = group_scores(areas, dict(head=np.array([0]), tail=np.array([1])))
    assert scores['mIoU.tail'] == 3 / 8
    assert np.isnan([scores['mIoU.tail.low'], scores['mIoU.tail.high']]).all()
    assert scores['mIoU.head.low'] < scores['mIoU.head'] < scores['mIoU.head.high']
    assert scores['mIoU.low'] < (20 / 27 + 3 / 8) / 2 < scores['mIoU.high']
    one_block = group_scores(areas, dict(head=np.array([0])), ['a'] * 3)
    assert np.isnan([value for key, value in one_block.items() if 'low' in key or 'high' in key]).all()


def test_blocks_of_so_many_images_are_pieces_in_a_row():
    blocks = block_names(20, [f'{n}.png' for n in range(101)])
    assert blocks == sorted(blocks)
    assert np.unique(blocks, return_counts=True)[1].tolist() == [21, 20, 20, 20, 20]
    assert len(set(block_names(20, ['a', 'b']))) == 1
    assert len(set(block_names(1, ['a', 'b']))) == 2
    assert block_names(20, []) == []


def test_a_block_is_what_the_expression_finds_in_the_path():
    paths = ['x/0016E5_07959.jpg', 'x/0016E5_08001.jpg', 'y/0016E5_07961.jpg', 'y/other.jpg']
    blocks = block_names(r'[^/]+(?=\d\d\.)', paths)
    assert blocks == ['0016E5_079', '0016E5_080', '0016E5_079', 'y/other.jpg']
    assert block_names('^.', paths) == ['x', 'x', 'y', 'y']
    with pytest.raises(ValueError, match=r"blocks finds 'seq' in no path of an image, such as x/0016E5"):
        block_names('seq', paths)
    for wrong in ('(', 0, -3, 1.5, None):
        with pytest.raises(ValueError, match=r'blocks is a regular expression.*got'):
            block_names(wrong, [])


def scores_of(images):
    areas = np.random.default_rng(0).integers(0, 90, (len(AREAS), images, len(CLASSES)))
    names = [f'{i}.png' for i in range(images)]
    group = ['head', 'body', 'tail', 'tail', '']
    return dict(zip(AREAS, areas, strict=True)) | dict(
        images=names,
        blocks=['a'] * images,
        classes=CLASSES,
        group=group,
        pixels=np.arange(5),
        confusion=np.arange(25).reshape(5, 5),
    )


def test_saved_scores_are_loaded_again(tmp_path):
    saved = scores_of(3)
    save_image_scores(tmp_path / 'new' / 'scores.npz', **saved)
    loaded = load_image_scores(tmp_path / 'new' / 'scores.npz')
    assert loaded.keys() == saved.keys()
    assert all(np.array_equal(loaded[name], saved[name]) for name in saved)


def test_scores_of_an_earlier_version_have_no_confusion(tmp_path):
    saved = {name: values for name, values in scores_of(3).items() if name != 'confusion'}
    save_image_scores(tmp_path / 'scores.npz', **saved)
    assert load_image_scores(tmp_path / 'scores.npz')['confusion'].shape == (0, 0)


def test_scores_of_an_older_version_have_no_blocks(tmp_path):
    saved = scores_of(3)
    del saved['blocks']
    save_image_scores(tmp_path / 'scores.npz', **saved)
    assert load_image_scores(tmp_path / 'scores.npz')['blocks'].shape == (0,)


@pytest.mark.parametrize('damage', ['cut', 'other', 'text', 'shape'])
def test_damaged_scores_are_named(tmp_path, damage):
    file = tmp_path / 'image_scores.npz'
    save_image_scores(file, **scores_of(2))
    if damage == 'cut':
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == 'other':
        np.savez(file, images=np.zeros(3))
    elif damage == 'text':
        file.write_text('404')
    else:
        with np.load(file) as archive:
            np.savez(file, **dict(archive) | dict(label=np.zeros((2, 4), int)))
    with pytest.raises(ValueError, match=r'image_scores\.npz.*ImbalanceIoUMetric'):
        load_image_scores(file)
    with pytest.raises(FileNotFoundError):
        load_image_scores(tmp_path / 'none.npz')


def test_absent_classes_make_the_interval_of_the_mean_as_narrow_as_leaving_out_images_does():
    rng = np.random.default_rng(0)
    label = rng.integers(1, 90, (30, 4)) * [1, 1, 0, 0]
    right = rng.binomial(label, 0.7)
    areas = pixels_of(label, right, 0 * label)
    scores = group_scores(areas, {}, None, 0.0)

    def mean(rows):
        return sum(right[rows, c].sum() / label[rows, c].sum() for c in (0, 1)) / 4  # two absent ones are 0

    rows, value = np.arange(30), mean(np.arange(30))
    variance = 29 / 30 * sum((mean(np.delete(rows, i)) - value) ** 2 for i in rows)
    known = jackknife(right, label, label)
    freedom = noise_of_mean(known.change[:, :2], known.freedom[:2]).freedom
    low, high = (math.log(scores[f'mIoU.{end}'] / (1 - scores[f'mIoU.{end}'])) for end in ('low', 'high'))
    assert (high - low) / 2 == pytest.approx(Noise(variance, freedom).margin / (value * (1 - value)))


def test_a_class_that_is_ignored_is_in_no_pair():
    label, prediction = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[1, 0, 1, 0]])
    assert class_pairs(prediction, label, 2, 0).tolist() == [[1, 0, 1], [1, 1, 1]]
