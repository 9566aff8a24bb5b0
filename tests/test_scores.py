import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from test_metrics import CLASSES, scenes_of

from mmseg_imbalance.scores import (
    AREAS,
    bootstrap_counts,
    class_groups,
    fine_grained_iou,
    load_image_scores,
    present_mean,
    resampled_iou,
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


def test_bootstrap_counts_are_draws_with_replacement():
    counts = bootstrap_counts(7, 4000, seed=3)
    assert counts.shape == (4000, 7)
    assert (counts.sum(1) == 7).all()
    assert np.array_equal(counts, bootstrap_counts(7, 4000, seed=3))
    assert not np.array_equal(counts, bootstrap_counts(7, 4000, seed=4))
    expected = 4000 * 7 * stats.binom(7, 1 / 7).pmf(np.arange(8))
    seen = np.bincount(counts.ravel(), minlength=8)
    pooled = [np.append(x[:4], x[4:].sum()) for x in (seen, expected)]
    assert stats.chisquare(*pooled).pvalue > 1e-3


def test_the_interval_agrees_with_scipys():
    labels, predictions = scenes_of(40)
    right = ((labels == predictions) & (labels == 1)).sum((1, 2))
    union = (((labels == 1) | (predictions == 1)) & (labels != 255)).sum((1, 2))
    theirs = stats.bootstrap(
        (right, union),
        lambda i, u, axis=-1: i.sum(axis) / u.sum(axis),
        paired=True,
        vectorized=True,
        method='percentile',
        n_resamples=4000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    counts = bootstrap_counts(40, 4000)
    ours = np.percentile(resampled_iou(counts, right[:, None], union[:, None]), [2.5, 97.5])
    width = theirs.high - theirs.low
    assert ours == pytest.approx([theirs.low, theirs.high], abs=0.1 * width)


def scores_of(images):
    areas = np.random.default_rng(0).integers(0, 90, (len(AREAS), images, len(CLASSES)))
    names = [f'{i}.png' for i in range(images)]
    group = ['head', 'body', 'tail', 'tail', '']
    return dict(zip(AREAS, areas, strict=True)) | dict(
        images=names, classes=CLASSES, group=group, pixels=np.arange(5), confusion=np.arange(25).reshape(5, 5)
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
