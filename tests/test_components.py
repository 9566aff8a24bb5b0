"""The components of label maps, and small ones taken by the class around them, against loops over pixels."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from mmseg_imbalance.components import components, remove_small

maps = st.tuples(st.integers(1, 11), st.integers(1, 13), st.sampled_from([np.uint8, np.int64])).flatmap(
    lambda drawn: arrays(drawn[2], drawn[:2], elements=st.sampled_from([0, 3, 7, 200]))
)

STEADY = settings(derandomize=True, deadline=None)


def pixels_of_components(labels):
    """Sets of (row, column), by SciPy."""
    found = []
    for value in sorted(set(labels.flat)):
        ids, count = ndimage.label(labels == value, structure=np.ones((3, 3)))
        found += [set(zip(*map(list, np.nonzero(ids == i)), strict=True)) for i in range(1, count + 1)]
    return [{(int(y), int(x)) for y, x in pixels} for pixels in found]


def ring(pixels, shape):
    around = {(y + dy, x + dx) for y, x in pixels for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    return {(y, x) for y, x in around - pixels if 0 <= y < shape[0] and 0 <= x < shape[1]}


def removed_by_loops(labels, area):
    labels = labels.copy()
    while True:
        changed = set()
        small = [pixels for pixels in pixels_of_components(labels) if len(pixels) < area]
        for pixels in sorted(small, key=lambda pixels: (len(pixels), min(pixels))):
            border = ring(pixels, labels.shape)
            if not border or border & changed:
                continue
            votes = Counter(int(labels[at]) for at in border)
            winner = min(value for value in votes if votes[value] == max(votes.values()))
            for at in pixels:
                labels[at] = winner
            changed |= pixels
        if not changed:
            return labels


@STEADY
@given(maps)
def test_components_are_scipys(labels):
    ids, areas, values = components(labels)
    assert (ids.dtype, areas.dtype, values.dtype) == (np.int32, np.int64, labels.dtype)
    assert sorted(set(ids.flat)) == list(range(len(areas)))
    ours = [set(zip(*map(list, np.nonzero(ids == i)), strict=True)) for i in range(len(areas))]
    assert sorted(map(sorted, ours)) == sorted(map(sorted, pixels_of_components(labels)))
    assert areas.tolist() == [len(pixels) for pixels in ours]
    assert np.array_equal(values[ids], labels)


@pytest.mark.parametrize('labels', [2, 19, 300])
@pytest.mark.parametrize('cell', [1, 7])
def test_components_of_noise_and_of_large_regions_are_scipys(labels, cell):
    """Those of noise of few labels are found in another way; columns first in memory change nothing."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, labels, (12, 14)).astype(np.uint16)
    drawn = np.kron(small, np.ones((cell, cell), np.uint16))
    for labels in (drawn, np.asfortranarray(drawn), drawn[:, ::2]):
        test_components_are_scipys.hypothesis.inner_test(labels)


def test_a_component_may_wind_through_the_whole_map():
    spiral = np.zeros((41, 41), np.uint8)
    for ring in range(0, 20, 2):
        spiral[ring, ring : -ring or None] = spiral[ring : -ring or None, -1 - ring] = 1
        spiral[-1 - ring, ring : -ring or None] = spiral[ring + 2 : -ring or None, ring] = 1
        spiral[ring + 2, ring : ring + 3] = 1
    _, areas, values = components(spiral)
    assert areas[values == 1].sum() == spiral.sum()
    assert (values == 1).sum() == ndimage.label(spiral, structure=np.ones((3, 3)))[1]


@STEADY
@given(maps, st.integers(0, 20))
def test_removal_equals_loops_over_pixels(labels, area):
    before = labels.copy()
    ours = remove_small(labels, area)
    assert np.array_equal(labels, before)
    assert not np.shares_memory(ours, labels)
    assert ours.dtype == labels.dtype
    assert np.array_equal(ours, removed_by_loops(labels, area))


@STEADY
@given(maps, st.integers(0, 20))
def test_nothing_small_is_left_and_large_components_keep_every_pixel(labels, area):
    ours = remove_small(labels, area)
    areas = components(ours)[1]
    assert len(areas) == 1 or areas.min() >= area
    assert np.array_equal(remove_small(ours, area), ours)
    large = [pixels for pixels in pixels_of_components(labels) if len(pixels) >= area]
    for at in set().union(*large):
        assert ours[at] == labels[at]


@pytest.mark.parametrize('area', [0, 1])
def test_a_single_pixel_is_not_below_one(area):
    labels = np.random.default_rng(0).integers(0, 5, (17, 19))
    assert np.array_equal(remove_small(labels, area), labels)


def of(*rows):
    return np.array([[int(c) for c in row] for row in rows])


@pytest.mark.parametrize(
    ('area', 'before', 'after'),
    [
        # five of the eight pixels around are 1
        (2, of('1100', '1200', '1111'), of('1100', '1100', '1111')),
        # a diagonal is one component of three pixels
        (3, of('21111', '12111', '11211', '11111'), of('21111', '12111', '11211', '11111')),
        (4, of('21111', '12111', '11211', '11111'), of('11111', '11111', '11111', '11111')),
        # a tie goes to the smaller class, on either side
        (5, of('00055111', '00055111'), of('00000111', '00000111')),
        (5, of('11155000', '11155000'), of('11100000', '11100000')),
        # neighbours of one size never swap: the first by rows joins the second
        (2, of('12'), of('22')),
        (3, of('21', '21'), of('11', '11')),
        # the smallest first: 2 joins 3, which is then as large as asked, or not yet
        (3, of('2311', '1311', '1111'), of('3311', '1311', '1111')),
        (4, of('2311', '1311', '1111'), of('1111', '1111', '1111')),
        # one component is left alone, however small
        (2, of('3'), of('3')),
        (99, of('33', '33'), of('33', '33')),
    ],
)
def test_removal_by_hand(area, before, after):
    assert np.array_equal(removed_by_loops(before, area), after)
    assert np.array_equal(remove_small(before, area), after)


def test_what_is_no_label_map_is_refused():
    for labels in (np.zeros((1, 4, 5), np.uint8), np.zeros((4, 5)), np.zeros((4, 5), bool)):
        with pytest.raises(ValueError, match=r'\(H, W\) integers.*got'):
            remove_small(labels, 3)
