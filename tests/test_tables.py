import subprocess
import sys

import numpy as np
import pytest
from matplotlib import colormaps

from mmseg_imbalance.clustering import SubclassTable
from mmseg_imbalance.frequency import ClassFrequency
from mmseg_imbalance.tables import (
    class_table,
    markdown_table,
    names_and_colours,
    source_table,
    subclass_table,
    table_text,
)


def counted():
    """Of three classes, one of which never occurs."""
    counts = np.array([[900_000, 50, 0], [800_000, 0, 0]])
    return ClassFrequency.from_rows(('road', 'traffic light', 'train [old]'), counts, [10, 20], ['a', 'b'])


def three_classes():
    """Three subclasses, of which the lightest in weight comes second; two; none yet."""
    nan = np.nan
    return SubclassTable(
        share=np.array([[0.2, 0.7, 0.1], [0.75, 0.25, nan], [nan] * 3]),
        mean_loss=np.array([[0.5, 0.1, 2.0], [0.3, 0.4, nan], [nan] * 3]),
        weight=np.array([[1.5, 0.6, 2.8], [0.8, 1.6, nan], [nan] * 3]),
        exists=np.array([[True] * 3, [True, True, False], [True, False, False]]),
    )


@pytest.fixture
def frequency():
    return counted()


def test_a_row_of_the_table_is_a_class_and_nothing_is_cut_off(frequency):
    weights = dict(sqrt_inv_freq=np.array([0.25, 1.75, 0.0]), median_freq=np.array([1.0, 1.0, 0.0]))
    text = table_text(class_table(frequency, weights))
    rows = [[cell.strip() for cell in line.split('│')[1:-1]] for line in text.splitlines() if '│' in line]
    assert rows == [
        ['road', '1,700,000', '99.997%', '2', '0.2500', '1.0000'],
        ['traffic light', '50', '0.003%', '1', '1.7500', '1.0000'],
        ['train [old]', '0', '0.000%', '0', '0.0000', '0.0000'],
    ]
    assert '2 images, 1,700,080 pixels, 0.0% ignored' in text


def test_a_table_says_which_data_set_brings_which_class(frequency):
    assert source_table(frequency) is None
    names = ('道路', 'car [old]')
    both = ClassFrequency.from_rows(
        names,
        [[1000, 0], [500, 20], [7, 0]],
        [0, 0, 3],
        ['a', 'b', 'c'],
        repeats=[1, 1, 4],
        sources=[0, 1, 0],
        source_names=['Street data/[1]', 'Street data/2'],
    )
    text = table_text(source_table(both))
    rows = [[cell.strip() for cell in line.split('│')[1:-1]] for line in text.splitlines() if '│' in line]
    assert rows == [['道路', '1,028', '500'], ['car [old]', '-', '20']]
    for part in ('Street data/[1]', 'Street data/2', '5 images', '1 images'):
        assert part in text


def test_a_row_of_the_table_is_a_subclass_and_a_dash_stands_for_what_is_not_known_yet():
    names = ['road', 'train [old]', 'rider', 'of another head alone']
    text = table_text(subclass_table(names, three_classes()))
    assert 'another' not in text
    rows = [[cell.strip() for cell in line.split('│')[1:-1]] for line in text.splitlines() if '│' in line]
    assert rows == [
        ['road', '0', '20.0%', '0.5000', '1.500'],
        ['', '1', '70.0%', '0.1000', '0.600'],
        ['', '2', '10.0%', '2.0000', '2.800'],
        ['train [old]', '0', '75.0%', '0.3000', '0.800'],
        ['', '1', '25.0%', '0.4000', '1.600'],
        ['rider', '0', '-', '-', '-'],
    ]


def test_a_data_set_without_names_or_colours_gets_numbers_and_different_colours():
    names, palette = names_and_colours(dict(classes=('road', 'car'), palette=[[1, 2, 3]]), 4)
    assert names == ['road', 'car', 'class 2', 'class 3']
    assert palette[0].tolist() == [1, 2, 3]
    tab20 = 255 * colormaps['tab20'](np.arange(20))[:, :3]
    assert palette[1:].tolist() == tab20[1:4].astype(int).tolist()
    assert names_and_colours({}, 25)[1].tolist() == np.concatenate([tab20, tab20[:5]]).astype(int).tolist()
    names, palette = names_and_colours({}, 2)
    assert names == ['class 0', 'class 1']
    assert palette.shape == (2, 3)


@pytest.mark.slow
def test_no_table_loads_matplotlib():
    code = (
        'import sys; from mmseg_imbalance.tables import names_and_colours, table_text; '
        'names_and_colours({}, 3); import mmseg_imbalance.plots; sys.exit("matplotlib" in sys.modules)'
    )
    assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0


def test_a_table_in_markdown_keeps_its_columns_whatever_its_cells_hold():
    lines = markdown_table(['name', 'ms'], [['a|b', '1']], {'ms'})
    assert list(lines) == ['| name | ms |', '| --- | --: |', r'| a\|b | 1 |', '']
