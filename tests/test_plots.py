from dataclasses import replace

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.cbook import is_math_text
from PIL import Image
from test_tables import counted, three_classes

from mmseg_imbalance.class_balance import ClassBalance
from mmseg_imbalance.fonts import plain
from mmseg_imbalance.plots import (
    SubclassMaps,
    draw_subclasses,
    plot_class_balance,
    plot_class_weights,
    subclass_colours,
)

PALETTE = np.array([[128, 64, 128], [0, 0, 70], [250, 170, 30]])


@pytest.fixture
def state():
    return three_classes()


def test_the_chart_has_a_bar_for_each_class_also_for_one_that_never_occurs(tmp_path):
    plot_class_weights(counted(), np.array([0.25, 1.75, 0.0]), tmp_path / 'chart.png')
    pixels = np.array(Image.open(tmp_path / 'chart.png').convert('RGB')).reshape(-1, 3)
    for colour in ((0x48, 0x78, 0xA8), (0xD1, 0x78, 0x3C)):
        assert (pixels == colour).all(1).sum() > 1000


def test_names_between_dollars_are_no_formulas(tmp_path):
    names = [r'$\no$', '$b$', 'c']  # the first would be an error
    assert not any(is_math_text(plain(name)) for name in names)
    plot_class_weights(replace(counted(), classes=names), np.ones(3), tmp_path / 'chart.png')
    shares = np.full(3, 0.3)
    report = ClassBalance(1, shares, shares, shares, shares)
    plot_class_balance(names, {r'$\no$': [report]}, tmp_path / 'balance.png')
    draw_subclasses(squares()._replace(subclass=None), names, PALETTE, None)


def test_the_heavier_a_subclass_the_darker_it_is_painted(state):
    luma = subclass_colours(PALETTE, state.weight) @ [0.299, 0.587, 0.114] / 255
    light, dark = luma[0, 1], luma[0, 2]
    assert light - dark > 0.5
    assert luma[0, 0] == pytest.approx((light + dark) / 2, abs=0.01)
    np.testing.assert_allclose(luma[1, :2], [light, dark], atol=0.01)
    np.testing.assert_allclose(luma[2], (light + dark) / 2, atol=0.01)
    # the hue is still the class's: road is purple, its train is blue
    red, green, blue = subclass_colours(PALETTE, state.weight)[:2].astype(int).transpose(2, 0, 1)
    assert (green[0] < red[0]).all()
    assert (red[1, :2] < blue[1, :2]).all()


def squares(width=60):
    """Four stripes, of road, train and ignored, and their subclasses."""
    truth = np.repeat([0, 0, 1, -1], width // 4)[None].repeat(40, 0)
    subclass = np.repeat([1, 2, 0, 0], width // 4)[None].repeat(40, 0)
    weight = np.repeat([0.5, 2.0, 1.0, 0.0], width // 4)[None].repeat(40, 0)
    image = np.full((*truth.shape, 3), (10, 200, 90), np.uint8)
    return SubclassMaps(image, truth, weight, subclass)


def share_of(colour, picture):
    return (abs(picture.astype(int) - colour) <= 2).all(2).mean()


def test_the_picture_shows_image_truth_subclass_and_weight(state):
    picture = draw_subclasses(squares(), ['road', 'train', 'rider'], PALETTE, state)
    assert picture.dtype == np.uint8
    stripe = share_of((10, 200, 90), picture) / 4
    assert stripe > 0.03
    shades = subclass_colours(PALETTE, state.weight)
    # 1 is the middle of the colours, the largest of all the weights an end
    halves = np.log([0.5, 1, 2]) / np.log(2.8) / 2
    lighter, one, heavier = (255 * colormaps['RdBu_r'](0.5 + halves)[:, :3]).round()
    expected = [
        (PALETTE[0], 2),  # truth: two stripes of road
        (PALETTE[1], 1),
        (shades[0, 1], 1),
        (shades[0, 2], 1),
        (shades[1, 0], 1),
        (lighter, 1),
        (one, 1),
        (heavier, 1),
        ((24, 24, 24), 3),  # ignored, in three panels
    ]
    for colour, stripes in expected:
        assert share_of(colour, picture) == pytest.approx(stripes * stripe, rel=0.15), (colour, stripes)
    for colour in (shades[0, 0], shades[1, 1]):  # no pixel has it, the legend alone
        assert 0 < share_of(colour, picture) < 0.05 * stripe


def test_without_subclasses_there_are_three_panels_and_wide_images_take_two_rows(state):
    names = ['road', 'train', 'rider']
    three = draw_subclasses(squares()._replace(subclass=None), names, PALETTE, None)
    stripe = share_of((10, 200, 90), three) / 4
    assert share_of((24, 24, 24), three) == pytest.approx(2 * stripe, rel=0.15)
    assert share_of(PALETTE[0], three) == pytest.approx(2 * stripe, rel=0.15)
    wide = draw_subclasses(squares(80), names, PALETTE, state)
    narrow = draw_subclasses(squares(), names, PALETTE, state)
    assert len(wide) > 1.8 * len(narrow)


@pytest.mark.parametrize('truth', [-1, 0])
def test_an_image_that_is_ignored_altogether_or_weighs_the_same_everywhere_can_be_drawn(state, truth):
    maps = squares()._replace(truth=np.full((40, 60), truth), weight=np.ones((40, 60)))
    picture = draw_subclasses(maps, ['road', 'train', 'rider'], PALETTE, state)
    ignored = share_of((24, 24, 24), picture)
    assert ignored > 0.3 if truth == -1 else ignored < 1e-3
