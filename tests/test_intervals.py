"""Intervals hold what they should as often as they say: simulations, and plain loops."""

import math

import numpy as np
import pytest
from scipy import stats

from mmseg_imbalance.intervals import (
    Jackknife,
    Noise,
    difference,
    interval_of_share,
    jackknife,
    noise_of_both,
    noise_of_mean,
    noise_of_seeds,
    shared_variance,
)

PRESENT = np.array([0.05, 0.1, 0.2, 1.0])  # of four classes: the share of the images that hold one


def drawn_images(rng, images, present=PRESENT):
    """Pixels (N, C): few images hold a rare class, objects differ in size, hits from image to image."""
    label = np.where(
        rng.random((images, len(present))) < present, rng.lognormal(6, 1, (images, len(present))), 0
    )
    intersect = label * rng.beta(1, 2, label.shape)
    false = label * 0.3 * rng.random(label.shape)
    false += np.where(rng.random(label.shape) < 0.05, rng.lognormal(4, 1, label.shape), 0)
    return intersect, label + false, label


def loops(intersect, union):
    """Jackknife variance of the IoU of one class, by leaving out one image after the other."""
    n = len(union)
    value = sum(intersect) / sum(union)
    without = []
    for left_out in range(n):
        rest = [i for i in range(n) if i != left_out]
        without.append(sum(intersect[i] for i in rest) / sum(union[i] for i in rest))
    return (n - 1) / n * sum((w - value) ** 2 for w in without)


def test_the_variance_is_that_of_plain_loops():
    intersect, union, label = drawn_images(np.random.default_rng(0), 17, np.array([0.4, 1.0]))
    known = jackknife(intersect, union, label)
    for c in range(2):
        noise = noise_of_mean(known.change[:, [c]], known.freedom[[c]])
        assert noise.variance == pytest.approx(loops(intersect[:, c], union[:, c]))
        weight = union[:, c] / union[:, c].sum()
        assert noise.freedom == pytest.approx(max(1, 1 / (weight**2).sum() - 1))


def coverage(interval, images, repeats=250):
    """How often an interval of (intersect, union, label) holds the IoU of a class and of the mean."""
    rng = np.random.default_rng(1)
    intersect, union, _ = drawn_images(rng, 200_000)
    truth = intersect.sum(0) / union.sum(0)
    held = {key: [] for key in (*range(len(PRESENT)), 'mean')}
    for _ in range(repeats):
        areas = drawn_images(rng, images)
        for key in held:
            members = np.arange(len(PRESENT)) if key == 'mean' else np.array([key])
            members = members[areas[2].sum(0)[members] > 0]
            ends = interval(*(part[:, members] for part in areas)) if len(members) else None
            if ends is not None:
                held[key].append(ends[0] <= truth[members].mean() <= ends[1])
    assert min(map(len, held.values())) > repeats / 3
    return {key: np.mean(found) for key, found in held.items()}


def ours(intersect, union, label):
    known = jackknife(intersect, union, label)
    return interval_of_share(known.iou.mean(), noise_of_mean(known.change, known.freedom))


def bootstrap(intersect, union, label):
    """The percentiles of images drawn with replacement; a class that was not drawn is left out."""
    if (label > 0).any(1).sum() < 2:
        return None
    n = len(label)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), 400)
    with np.errstate(invalid='ignore'):
        values = np.nanmean((counts @ intersect) / (counts @ union), 1)
    return np.nanpercentile(values, [2.5, 97.5])


@pytest.mark.parametrize('images', [40, 100])
def test_nineteen_of_twenty_intervals_hold_the_truth_of_classes_in_few_images_too(images):
    found = coverage(ours, images)
    assert min(found.values()) > 0.92, found
    assert found[3] < 0.98  # of a class in all images: not wide for nothing


@pytest.mark.filterwarnings('ignore:Mean of empty slice')
def test_percentiles_of_a_bootstrap_would_hold_it_less_often():
    found = coverage(bootstrap, 40, repeats=100)
    assert found[0] < 0.85
    assert found[1] < 0.85


def seeds_of(rng, runs, ratio, own=0.6):
    """Runs of two configs that are equally good, their seeds ``ratio`` times as noisy as the images."""
    label = np.where(
        rng.random((60, 4)) < [0.15, 0.3, 0.5, 1], rng.lognormal(6, 0.7, (60, 4)), 0
    )  # the same images for all
    hard = rng.normal(0, 0.5, label.shape)
    effective = label.sum(0) ** 2 / (label**2).sum(0).clip(1)
    groups = []
    for _ in range(2):
        of_config = hard + rng.normal(0, own / math.sqrt(2), label.shape)
        group = []
        for _ in range(runs):
            of_run = rng.normal(0, own / math.sqrt(2), label.shape)
            of_seed = ratio * own * rng.normal(0, 1, 4) / np.sqrt(effective.clip(1))
            share = 1 / (1 + np.exp(-of_config - of_run - of_seed))
            group.append(jackknife(label * share, 1.2 * label, label))
        groups.append(group)
    return groups


@pytest.mark.parametrize('runs', [3, 5])
@pytest.mark.parametrize('ratio', [0, 1, 3])
def test_one_of_twenty_differences_of_equal_configs_is_called_real(runs, ratio):
    rng = np.random.default_rng(2)
    false = {'tail': [], 'mean': []}
    for _ in range(300):
        groups = seeds_of(rng, runs, ratio)
        for key, members in (('tail', np.array([0])), ('mean', np.arange(4))):
            values = [[run.iou[members].mean() for run in group] for group in groups]
            found = difference(*values, groups, members)
            false[key].append(found.within_noise is False)
    for key, calls in false.items():
        assert 0.01 <= np.mean(calls) <= 0.08, (key, np.mean(calls))  # 5 % of 300: 2.2 to 8.2


def test_a_difference_of_two_deviations_more_is_found():
    rng = np.random.default_rng(3)
    calls = []
    for _ in range(100):
        first, second = seeds_of(rng, 3, 1)
        members = np.arange(4)
        values = [[run.iou.mean() + shift for run in group] for group, shift in ((first, 0), (second, 0.2))]
        calls.append(difference(*values, (first, second), members).within_noise is False)
    assert np.mean(calls) > 0.8


def test_a_class_in_a_single_image_has_no_interval_and_one_that_is_never_found_none_of_width_0():
    label = np.array([[9, 5], [0, 5], [0, 5]])
    intersect = np.array([[4, 0], [0, 0], [0, 0]])
    union = np.array([[9, 5], [3, 6], [0, 7]])  # the first is predicted in another image too
    known = jackknife(intersect, union, label)
    assert known.iou == pytest.approx([4 / 12, 0])
    for c in (0, 1):
        assert noise_of_mean(known.change[:, [c]], known.freedom[[c]]) is None
    assert interval_of_share(0.3, None) is None


def test_a_class_in_a_single_image_counts_in_a_mean_as_the_noisiest_of_the_others():
    rng = np.random.default_rng(4)
    change, freedom = rng.normal(size=(9, 3)), np.array([5.0, 4.0, 1.0])
    change[:, 1] *= 2
    without = noise_of_mean(change[:, :2], freedom[:2])
    noisiest = noise_of_mean(change[:, [1]], freedom[[1]])
    change[:, 2] = np.nan
    noise = noise_of_mean(change, freedom)
    assert noise.variance == pytest.approx((4 * without.variance + noisiest.variance) / 9)
    assert 1 <= noise.freedom <= 8


@pytest.mark.parametrize('value', [0.001, 0.5, 0.999])
def test_an_interval_of_a_share_lies_inside_0_to_1_and_around_it(value):
    for variance in (1e-9, 1e-4, 1.0, 100.0):
        low, high = interval_of_share(value, Noise(variance, 1.0))
        assert 0 <= low < value < high <= 1


def test_frames_that_repeat_say_no_more_than_one_of_them():
    areas = drawn_images(np.random.default_rng(5), 20, np.array([0.5, 1.0]))
    once = jackknife(*areas)
    frames = [np.repeat(part, 5, axis=0) for part in areas]
    blocks = [f'scene{n // 5:02}' for n in range(100)]
    noise, of_blocks, of_frames = (
        noise_of_mean(known.change, known.freedom)
        for known in (once, jackknife(*frames, blocks), jackknife(*frames))
    )
    assert of_blocks == pytest.approx(noise)
    assert of_frames.variance < noise.variance / 4


def test_blocks_without_labels_do_not_count():
    intersect, union, label = drawn_images(np.random.default_rng(5), 20, np.array([0.5, 1.0]))
    known = jackknife(intersect, union, label)
    zeros = np.zeros((3, 2))
    more = jackknife(*(np.concatenate([part, zeros]) for part in (intersect, union, label)))
    for mine, other in zip(known, more, strict=True):
        assert np.array_equal(mine, other)
    false = jackknife(
        *(np.concatenate([part, zeros + n]) for part, n in ((intersect, 0), (union, 1), (label, 0)))
    )
    assert false.change.shape == known.change.shape  # whatever a model predicts there
    assert (false.iou < known.iou).all()


def test_one_block_tells_nothing():
    areas = drawn_images(np.random.default_rng(6), 20, np.array([1.0]))
    known = jackknife(*areas, ['one'] * 20)
    assert noise_of_mean(known.change, known.freedom) is None
    assert known.iou == pytest.approx(areas[0].sum(0) / areas[1].sum(0))


def test_the_noise_of_seeds_is_welchs():
    rng = np.random.default_rng(7)
    first, second = rng.normal(0, 1, 3), rng.normal(1, 4, 5)
    theirs = stats.ttest_ind(second, first, equal_var=False).confidence_interval(0.95)
    found = difference(first / 50, second / 50)
    assert np.multiply(found.interval, 50) == pytest.approx([theirs.low, theirs.high])
    assert found.noise == 'seeds'


def test_runs_that_are_all_equal_are_no_proof_that_seeds_do_not_matter():
    zeros, some = [0.0, 0.0, 0.0], [0.1, 0.4, 0.2]
    noise = noise_of_seeds(zeros, some)
    assert noise.variance == pytest.approx(2 * np.var(some, ddof=1) / 3)
    assert noise.freedom == 2
    assert noise_of_seeds(some, zeros) == noise
    assert noise_of_seeds(zeros, [0.3] * 3) is None
    assert noise_of_seeds([0.3] * 3, [0.3] * 3) is None
    assert difference(zeros, [0.3] * 3).within_noise is None


@pytest.mark.parametrize(
    ('runs', 'noise'), [((1, 1), 'images'), ((1, 3), 'images'), ((2, 2), 'images and seeds')]
)
def test_with_one_run_of_a_config_nothing_is_called_real(runs, noise):
    rng = np.random.default_rng(8)
    _, union, label = drawn_images(rng, 60, np.array([1.0]))
    members, groups = np.array([0]), []
    for number, share in zip(runs, (0.1, 0.9), strict=True):
        shares = share + 0.02 * rng.random(number)
        groups.append([jackknife(label * s, union, label) for s in shares])
    found = difference(*([float(run.iou[0]) for run in group] for group in groups), groups, members)
    assert found.noise == noise
    assert found.interval[0] > 0.3
    assert found.within_noise is (False if noise == 'images and seeds' else None)
    same = difference([0.4], [0.4 + 1e-4], (groups[0][:1], groups[1][:1]), members)
    assert same.within_noise is True  # within the noise of the images already


def test_what_runs_differ_by_from_image_to_image_counts_once():
    images, seeds = Noise(4.0, 50.0), Noise(3.0, 4.0)
    assert noise_of_both(images, seeds, 3.5) == images
    both = noise_of_both(images, seeds, 1.0)
    assert both.variance == 4 + 3 - 1
    assert both.freedom == pytest.approx(6**2 / (4**2 / 50 + 3**2 / 4))
    changes = np.random.default_rng(9).normal(size=(3, 11))
    deviations = changes - changes.mean(0)
    expected = 10 / 11 * (deviations**2).sum() / 2 / 3
    assert shared_variance(list(changes)) == pytest.approx(expected)
    assert shared_variance(list(changes[:1])) == 0


def by_hand(iou, change, freedom):
    return Jackknife(np.array(iou), np.array(change, float), np.array(freedom, float))


CHANGE = np.random.default_rng(0).normal(0, 0.01, (9, 1))


def test_the_freedom_of_a_difference_is_the_least_of_all_runs():
    runs = [[by_hand([0.3], CHANGE, [7])], [by_hand([0.4], -CHANGE, [2])]]
    found = difference([0.3], [0.4], runs, np.array([0]))
    expected = noise_of_mean(-2 * CHANGE, np.array([2.0]))
    assert found.interval[1] - found.mean == pytest.approx(expected.margin)


def test_a_class_in_one_block_leaves_the_other_classes_their_interval():
    change = np.concatenate([CHANGE, np.full_like(CHANGE, np.nan)], 1)
    runs = [
        [by_hand([v, v], sign * change * (1 + v), [7, 1]) for v in values]
        for sign, values in ((1, (0.3, 0.31)), (-1, (0.4, 0.42)))
    ]
    found = difference([0.3, 0.31], [0.4, 0.42], runs, np.arange(2))
    assert -0.2 < found.interval[0] < found.mean < found.interval[1] < 0.4  # (-1, 1) where a NaN comes in


def test_a_class_in_one_block_alone_has_no_interval_whatever_the_seeds_say():
    runs = [
        [by_hand([v], np.full((9, 1), np.nan), [1]) for v in values] for values in ((0.3, 0.31), (0.4, 0.42))
    ]
    assert difference([0.3, 0.31], [0.4, 0.42], runs, np.array([0])).interval is None


def test_an_interval_of_a_difference_of_shares_does_not_leave_minus_1_to_1():
    assert difference([0.0, 0.1], [0.9, 1.0]).interval[1] <= 1
    assert difference([0.9, 1.0], [0.0, 0.4]).interval[0] >= -1


def test_the_degrees_of_freedom_of_a_class_are_at_least_1():
    label = np.array([[10**6], [3]])
    known = jackknife(label // 2, label, label)
    assert known.freedom[0] >= 1


def test_a_class_in_one_block_has_the_freedom_of_the_noisiest():
    change = np.concatenate([CHANGE, 2 * CHANGE, np.full_like(CHANGE, np.nan)], 1)
    noise = noise_of_mean(change, np.array([5.0, 4.0, 1.0]))
    each = [1, 4, 4]  # in proportion: the unknown one is as noisy as the second, and as well known
    assert noise.freedom == pytest.approx(min(8, sum(each) ** 2 / (1 / 5 + 16 / 4 + 16 / 4)))
    change[:, 0] = 0
    noise = noise_of_mean(change, np.array([5.0, 3.0, 1.0]))
    assert noise.freedom == pytest.approx(min(8, 8**2 / (16 / 3 + 16 / 3)))
