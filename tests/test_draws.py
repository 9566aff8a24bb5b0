"""A drawn index keeps what it knows; chances are those of the formulas."""

import copy
import math
import pickle

import numpy as np
import pytest

from mmseg_imbalance.draws import (
    DrawnIndex,
    Draws,
    class_probability,
    least_pixels,
    repeat_factor_choices,
    repeat_factors,
)


@pytest.mark.parametrize('copied', [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize('drawn', [3, None])
def test_a_copy_of_an_index_knows_its_class(copied, drawn):
    index = copied(DrawnIndex(7, drawn, 30))
    assert (index, index.class_index, index.min_pixels, type(index)) == (7, drawn, 30, DrawnIndex)


def test_what_wrapped_data_sets_make_of_an_index_knows_its_class():
    for index in (DrawnIndex(9, 3, 30) - np.int64(2), DrawnIndex(16, 3, 30) % 9):
        assert (index, index.class_index, index.min_pixels, type(index)) == (7, 3, 30, DrawnIndex)


def test_the_default_asks_for_at_most_the_pixels_of_the_source():
    counts = np.array([[4000, 2, 0], [5000, 0, 0], [9000, 7, 0], [10**6, 9, 0]])
    assert least_pixels(counts).tolist() == [3000, 2, 1]
    assert least_pixels(counts[1:2]).tolist() == [3000, 1, 1]


def test_a_column_without_a_chance_is_never_taken_and_repeats_are_places():
    sizes, images, repeats = (np.array(x) for x in ([0, 3, 0, 2], [4, 6, 9], [2, 1, 2]))
    draws = Draws(np.array([0, 0.5, 0.5, 1]), sizes, images, repeats, np.array([5, 6, 7]))
    numbers = np.array([[0, 0], [0, 0.34], [0.49, 0.67], [0.5, 0], [0.99, 0.99]])
    found = [(index, index.class_index, index.min_pixels) for index in draws.take(numbers)]
    assert found == [(4, 1, 6), (4, 1, 6), (6, 1, 6), (9, None, 1), (9, None, 1)]


def test_a_class_that_cannot_be_drawn_leaves_the_formula_to_the_others():
    share = np.array([0.0, 0.4, 0.6])
    for temperature in (0.3, 5e-324):
        found = class_probability(share, temperature, np.array([False, True, True]))
        assert found.tolist() == [0, *class_probability(share[1:], temperature, np.array([True, True]))]


def factors_by_loops(held, repeats, threshold):
    """r_c of each class, and (r_i, the class that decides) of each image, as LVIS has them."""
    total = sum(repeats)
    of_classes = []
    for c in range(len(held[0])):
        share = sum(n for image, n in zip(held, repeats, strict=True) if image[c]) / total
        of_classes.append(max(1.0, math.sqrt(threshold / share)) if share else 1.0)
    of_images = []
    for image in held:
        factor, decides = 1.0, None
        for c, there in enumerate(image):
            if there and of_classes[c] > factor:
                factor, decides = of_classes[c], c
        of_images.append((factor, decides))
    return of_classes, of_images


@pytest.mark.parametrize('threshold', [0.001, 0.2, 0.5, 1])
@pytest.mark.parametrize('seed', range(4))
def test_repeat_factors_are_those_of_loops(seed, threshold):
    rng = np.random.default_rng(seed)
    held = rng.random((31, 6)) < (0.9, 0.7, 0.3, 0.1, 0.05, 0)
    held[3] = False  # an image without any class
    repeats = rng.integers(1, 4, 31)
    of_classes, of_images = factors_by_loops(held.tolist(), repeats.tolist(), threshold)
    assert repeat_factors(held, repeats, threshold) == pytest.approx(of_classes)
    choices, chances = repeat_factor_choices(held, repeats, threshold)
    assert (choices.sum(axis=1) == 1).all()
    assert chances.sum() == pytest.approx(1)
    total = sum(n * factor for n, (factor, _) in zip(repeats, of_images, strict=True))
    for row, n, (factor, decides) in zip(choices, repeats, of_images, strict=True):
        column = 6 if decides is None else decides
        assert row[column]
        images = (repeats * choices[:, column]).sum()
        assert chances[column] * n / images == pytest.approx(n * factor / total)
    assert threshold < 0.2 or max(of_classes) > 1
