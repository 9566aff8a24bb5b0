"""Schemes against numbers worked out by hand and laws that hold for any counts."""

import math
import re
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmseg_imbalance.frequency import CITYSCAPES_TRAIN, ClassFrequency
from mmseg_imbalance.weighting import (
    SCHEMES,
    check_options,
    check_power_schedule,
    class_weights,
    log_prior,
    scheduled_weights,
)


def frequency(pixels, images=None, image_pixels=None, dataset_images=10, ignored=0):
    images = [1] * len(pixels) if images is None else images
    names = tuple(f'class {number}' for number in range(len(pixels)))
    total = sum(pixels)
    return ClassFrequency(
        classes=names,
        pixels=pixels,
        images=[held if count else 0 for held, count in zip(images, pixels, strict=True)],
        image_pixels=image_pixels or [total if count else 0 for count in pixels],
        ignored=ignored,
        num_images=10,
        dataset_images=dataset_images,
    )


def mean_one(weights):
    return [weight * len(weights) / sum(weights) for weight in weights]


PIXELS, IMAGES, IMAGE_PIXELS = [600, 300, 100], [10, 8, 2], [1000, 800, 250]
# Shares 0.6, 0.3, 0.1; shares within the images that hold the class 0.6, 0.375, 0.4.
BY_HAND = {
    'inverse_freq': [1 / 1.8, 1 / 0.9, 1 / 0.3],
    'sqrt_inv_freq': [1.2909944487, 1.8257418584, 3.1622776602],
    'effective_num': [0.1 / (1 - 0.9**10), 0.1 / (1 - 0.9**8), 0.1 / 0.19],
    'median_freq': [0.4 / 0.6, 0.4 / 0.375, 1.0],
    'log_inv_freq': [1 / math.log(1.62), 1 / math.log(1.32), 1 / math.log(1.12)],
}


@pytest.mark.parametrize('scheme', SCHEMES)
def test_equals_the_formula_by_hand(scheme):
    counted = frequency(PIXELS, IMAGES, IMAGE_PIXELS)
    assert class_weights(counted, scheme, beta=0.9) == pytest.approx(mean_one(BY_HAND[scheme]))


def test_inverse_and_log_k_and_pixel_unit_follow_their_options():
    counted = frequency([6, 3, 1])
    want = mean_one([1 / math.log(1.7), 1 / math.log(1.4), 1 / math.log(1.2)])
    assert class_weights(counted, 'log_inv_freq', k=1.1) == pytest.approx(want)
    want = mean_one([0.5 / (1 - 0.5**6), 0.5 / (1 - 0.5**3), 1])
    got = class_weights(counted, 'effective_num', beta=0.5, unit='pixel')
    assert got == pytest.approx(want)


def test_the_default_is_sqrt_inv_freq():
    assert tuple(BY_HAND) == SCHEMES
    default, named = (class_weights(CITYSCAPES_TRAIN, *args) for args in ((), ('sqrt_inv_freq',)))
    assert default.tolist() == named.tolist()
    assert default.dtype == np.float64


def test_power_tempers_before_max_ratio_clips():
    counted = frequency([100, 10, 1])
    assert class_weights(counted, 'inverse_freq', power=0.5) == pytest.approx(
        class_weights(counted, 'sqrt_inv_freq')
    )
    assert class_weights(counted, 'inverse_freq', power=0).tolist() == [1, 1, 1]
    clipped = class_weights(counted, 'inverse_freq', max_ratio=20)
    assert clipped == pytest.approx(mean_one([1, 10, 20]))
    both = class_weights(counted, 'inverse_freq', power=0.5, max_ratio=5)
    assert both == pytest.approx(mean_one([1, math.sqrt(10), 5]))


@pytest.mark.parametrize(('beta', 'ratio'), [(0.9999, 1), (0.99999, 1), (1 - 1e-7, 2.4), (1 - 1e-9, 160)])
def test_effective_number_of_pixels_on_cityscapes(beta, ratio):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        weights = class_weights(CITYSCAPES_TRAIN, 'effective_num', beta=beta, unit='pixel')
    assert weights.max() / weights.min() == pytest.approx(ratio, rel=0.02)
    assert len(caught) == (ratio == 1)
    if caught:
        message = str(caught[0].message)
        for part in ('same weight', f'beta={beta}', '5449152 to 2036416525', "unit='image'"):
            assert part in message
        assert caught[0].filename == __file__


def test_effective_number_of_images_differs_on_cityscapes():
    weights = class_weights(CITYSCAPES_TRAIN, 'effective_num')
    assert CITYSCAPES_TRAIN.classes[weights.argmax()] == 'train'
    assert weights.max() / weights.min() > 15


def test_effective_number_is_exact_near_beta_one_and_zero():
    counted = frequency([10**9, 10**6, 10])
    near_one = class_weights(counted, 'effective_num', beta=1 - 2**-53, unit='pixel')
    assert near_one == pytest.approx(class_weights(counted, 'inverse_freq'), rel=1e-6)
    with pytest.warns(UserWarning, match='same weight'):
        assert class_weights(counted, 'effective_num', beta=0, unit='pixel').tolist() == [1, 1, 1]


def test_median_frequency_of_cityscapes_is_over_the_images_that_hold_a_class():
    shares = CITYSCAPES_TRAIN.pixels / (CITYSCAPES_TRAIN.images * 2048.0 * 1024.0)
    weights = class_weights(CITYSCAPES_TRAIN, 'median_freq')
    assert weights == pytest.approx(mean_one(list(np.median(shares) / shares)))


def test_classes_that_never_occur_get_zero_and_one_warning():
    counted = frequency([60, 0, 40, 0])
    for scheme in SCHEMES:
        with pytest.warns(UserWarning, match='weight 0: class 1, class 3') as caught:
            weights = class_weights(counted, scheme, beta=0.999, unit='pixel')
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert weights[[1, 3]].tolist() == [0, 0]
        present = class_weights(frequency([60, 40]), scheme, beta=0.999, unit='pixel')
        assert weights[[0, 2]] == pytest.approx(present)


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'scheme': 'auto'}, "scheme='auto' is unknown.*sqrt_inv_freq"),
        ({'unit': 'pixels'}, "unit='pixels', allowed are 'image' and 'pixel'"),
        ({'beta': 1.0}, r'beta=1.0, allowed is \[0, 1\)'),
        ({'beta': -0.1}, 'beta=-0.1'),
        ({'beta': math.nan}, 'beta=nan'),
        ({'k': 1.0}, 'k=1.0.*above 1'),
        ({'k': math.inf}, 'k=inf'),
        ({'power': -1.0}, 'power=-1.0, allowed'),
        ({'power': math.nan}, 'power=nan'),
        ({'max_ratio': 0.5}, 'max_ratio=0.5, allowed is 1 and more'),
        ({'max_ratio': math.nan}, 'max_ratio=nan'),
        ({'beta': '0.9'}, "beta='0.9', allowed"),
        ({'k': None}, 'k=None'),
        ({'power': [1]}, r'power=\[1\]'),
        ({'max_ratio': True}, 'max_ratio=True'),
    ],
)
def test_an_option_out_of_range_names_value_and_range(options, words):
    with pytest.raises(ValueError, match=words):
        class_weights(frequency(PIXELS), **options)
    if 'scheme' not in options:
        with pytest.raises(ValueError, match=words):
            check_options(**options)


def test_absent_classes_beside_ignored_pixels_are_asked_about():
    with pytest.warns(
        UserWarning, match=r'weight 0: class 1\. 4,321 pixels have the ignored label; are they'
    ):
        class_weights(frequency([60, 0], ignored=4321))


@pytest.mark.parametrize('scheme', SCHEMES)
@pytest.mark.parametrize('options', [{}, {'power': 0.5}, {'max_ratio': 3.0}, {'unit': 'pixel', 'beta': 0.99}])
def test_a_class_that_a_sample_did_not_meet_counts_as_one_pixel_in_one_image(scheme, options):
    counted = frequency([600, 0, 100], [10, 8, 2], [1000, 0, 250], dataset_images=300, ignored=300)
    with pytest.warns(UserWarning, match=r'not met in 10 of 300 images .*: class 1\.') as caught:
        weights = class_weights(counted, scheme, **options)
    assert not any('never occur' in str(warning.message) for warning in caught)
    met = frequency([600, 1, 100], [10, 1, 2], [1000, 100, 250], ignored=300)  # 100 pixels an image
    expected = class_weights(met, scheme, **options)
    np.testing.assert_allclose(weights, expected)
    assert weights[1] == weights.max()


def test_a_class_that_a_sample_did_not_meet_is_warned_of_once():
    counted = frequency([10**9, 0, 10**4], [500, 0, 9], dataset_images=3000)
    with pytest.warns(UserWarning, match='class 1') as caught:
        class_weights(counted)
    unmet, heavy = (str(warning.message) for warning in caught)
    assert 'one of their pixels had been: class 1. A larger max_images tells more, max_ratio' in unmet
    assert 'class 2 316 times' in heavy
    assert 'class 1' not in heavy


@pytest.mark.parametrize(
    ('unit', 'remedy'), [('image', 'Take a beta'), ('pixel', "Take unit='image', a beta")]
)
def test_effective_num_does_not_advise_the_unit_that_it_has(unit, remedy):
    with pytest.warns(UserWarning, match=f'hardly differs. {remedy} nearer'):
        class_weights(frequency([10**9, 10**9], [10**7, 10**7]), 'effective_num', unit=unit)


def test_where_all_images_were_looked_at_a_class_without_a_pixel_weighs_0():
    with pytest.warns(UserWarning, match='never occur get weight 0: class 1'):
        assert class_weights(frequency([600, 0, 100]))[1] == 0


HEAVY = r'more than 100 times as much as class 0.*little data: '


@pytest.mark.parametrize(
    ('pixels', 'images', 'options', 'message'),
    [
        ([10**9, 10**4, 10**8], [500, 9, 400], {}, 'class 1 316 times, from 10,000 pixels in 9 images'),
        ([10**8, 999], [500, 300], {}, 'class 1 316 times, from 999 pixels in 300 images'),
        ([10**9, 10**4], [500, 10], {}, None),  # images enough
        ([10**7, 10**4], [500, 1], {}, None),  # 32 times
        ([10**9, 10**4], [500, 9], {'power': 0.5}, None),
        ([10**9, 10**4], [500, 9], {'max_ratio': 100}, None),
        ([10**7, 10**4], [500, 9], {'scheme': 'inverse_freq'}, 'class 1 1,000 times'),
    ],
)
def test_a_large_weight_with_little_behind_it_is_warned_of_once(pixels, images, options, message):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        class_weights(frequency(pixels, images), **options)
    assert len(caught) == (message is not None)
    if message:
        assert re.search(HEAVY + re.escape(message), str(caught[0].message))
        assert 'max_ratio=100' in str(caught[0].message)
        assert caught[0].filename == __file__


def test_nothing_to_weigh_is_an_error():
    with pytest.raises(ValueError, match='none of the 2 classes has a pixel'):
        class_weights(frequency([0, 0]))


counts = st.lists(st.integers(1, 10**9), min_size=2, max_size=30)
schemes = st.sampled_from(SCHEMES)


@given(counts, schemes, st.floats(0, 2), st.none() | st.floats(1, 100))
@pytest.mark.filterwarnings('ignore:effective_num gives', 'ignore:classes weigh more than')
def test_weights_are_positive_with_mean_one_and_never_heavier_for_more_pixels(
    pixels, scheme, power, max_ratio
):
    weights = class_weights(
        frequency(pixels), scheme, beta=1 - 1e-9, unit='pixel', power=power, max_ratio=max_ratio
    )
    assert (weights > 0).all()
    assert weights.mean() == pytest.approx(1)
    assert (np.diff(weights[np.argsort(pixels)]) <= 1e-12 * weights.max()).all()
    if max_ratio is not None:
        assert weights.max() / weights.min() <= max_ratio * (1 + 1e-12)


@pytest.mark.filterwarnings('ignore:classes weigh more than')
@given(counts, st.sampled_from(sorted(set(SCHEMES) - {'effective_num'})), st.integers(2, 1000))
def test_frequency_schemes_do_not_depend_on_the_size_of_the_data_set(pixels, scheme, times):
    small, large = frequency(pixels), frequency([count * times for count in pixels])
    assert class_weights(large, scheme) == pytest.approx(class_weights(small, scheme))


@given(counts, schemes, st.randoms(use_true_random=False))
@pytest.mark.filterwarnings('ignore:effective_num gives', 'ignore:classes weigh more than')
def test_reordered_classes_reorder_weights(pixels, scheme, random):
    order = list(range(len(pixels)))
    random.shuffle(order)
    weights = class_weights(frequency(pixels), scheme, unit='pixel')
    moved = class_weights(frequency([pixels[place] for place in order]), scheme, unit='pixel')
    assert moved == pytest.approx(weights[order])


def test_the_log_prior_of_what_never_occurs_is_that_of_the_rarest():
    np.testing.assert_allclose(log_prior([60, 0, 30, 10]), np.log(np.array([60, 10, 30, 10]) / 110))
    with pytest.raises(ValueError, match='none of the 2 classes has a pixel'):
        log_prior([0, 0])


@pytest.mark.parametrize(
    ('points', 'progress', 'power'),
    [
        ([(0.25, 1), (0.75, 0)], 0.0, 1),
        ([(0.25, 1), (0.75, 0)], 0.25, 1),
        ([(0.25, 1), (0.75, 0)], 0.5, 0.5),
        ([(0.25, 1), (0.75, 0)], 0.7, 0.1),
        ([(0.25, 1), (0.75, 0)], 1.0, 0),
        ([(0.8, 0), (0.8, 1)], 0.79, 0),
        ([(0.8, 0), (0.8, 1)], 0.8, 1),
        ([(0.8, 0), (0.8, 1)], 1.0, 1),
        ([(0.0, 2)], 0.3, 2),
        ([(0.0, 0), (0.5, 1), (1.0, 0)], 0.75, 0.5),
    ],
)
def test_the_exponent_is_linear_between_points_and_jumps_at_two_of_one_progress(points, progress, power):
    found = scheduled_weights([4.0, 1.0, 0.0, 0.25], points, progress)
    expected = [4.0**power, 1.0, 0.25**power]
    assert found[[0, 1, 3]] == pytest.approx([3 * weight / sum(expected) for weight in expected])
    assert found[2] == 0


@pytest.mark.parametrize(
    'points',
    [
        [],
        3,
        None,
        [(0.5,)],
        [(0.5, -1)],
        [(0.7, 1), (0.3, 0)],
        [(1.5, 1)],
        [(math.nan, 1)],
        [('a', 1)],
        [0.5, 1],
    ],
)
def test_a_schedule_that_is_no_list_of_points_is_refused(points):
    with pytest.raises(ValueError, match=r'power_schedule=.*allowed is a list of points'):
        check_power_schedule(points)
