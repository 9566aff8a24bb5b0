import numpy as np
import pytest
from PIL import Image

from mmseg_imbalance.frequency import ClassFrequency
from mmseg_imbalance.visualization import class_table, plot_class_weights, table_text


@pytest.fixture
def frequency():
    counts = np.array([[900_000, 50, 0], [800_000, 0, 0]])
    return ClassFrequency.from_rows(('road', 'traffic light', 'train [old]'), counts, [10, 20], ['a', 'b'])


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


def test_the_chart_has_a_bar_for_each_class_also_for_one_that_never_occurs(frequency, tmp_path):
    plot_class_weights(frequency, np.array([0.25, 1.75, 0.0]), tmp_path / 'chart.png')
    pixels = np.array(Image.open(tmp_path / 'chart.png').convert('RGB')).reshape(-1, 3)
    for colour in ((0x48, 0x78, 0xA8), (0xD1, 0x78, 0x3C)):
        assert (pixels == colour).all(1).sum() > 1000
