"""Which classes take the pixels of the rare ones."""

import numpy as np
import pytest
from test_comparison import CLASSES, write_run

from mmseg_imbalance.reports.comparison import compare
from mmseg_imbalance.reports.confusion import confusion_tables, most_confused, plot_confusion
from mmseg_imbalance.reports.sheets import markdown, sheets

# truth pole: 40 right, 50 as tree, 10 as road; truth rider: never right
POLE, RIDER = [10, 0, 0, 50, 40, 0], [6, 0, 14, 0, 0, 0]


def with_confusion(folder, *rows, **options):
    """A run with these last rows of the confusion matrix; of the other classes 100 pixels are right."""
    run = write_run(folder, **options)
    path = next(run.glob('test/*/image_scores.npz'))
    matrix = 100 * np.eye(6, dtype=int)
    matrix[-len(rows) :] = rows
    np.savez(path, **dict(np.load(path)), confusion=matrix)
    return run


@pytest.fixture
def comparison(tmp_path):
    """The second config has two seeds."""
    return compare(
        [
            with_confusion(tmp_path / 'ce', POLE, RIDER),
            with_confusion(tmp_path / 'a', [0, 0, 0, 30, 70, 0], RIDER, loss='Dice'),
            with_confusion(tmp_path / 'b', [0, 0, 0, 20, 70, 10], RIDER, loss='Dice', seed=1),
        ]
    )


def test_shares_are_means_over_the_runs(comparison):
    found = comparison.confusion
    assert (found.labels, found.rare) == (['CE', 'Dice'], ['pole', 'rider'])
    assert found.predicted_as[0, 0] == pytest.approx([0.1, 0, 0, 0.5, 0.4, 0])
    assert found.predicted_as[1, 0] == pytest.approx([0, 0, 0, 0.25, 0.7, 0.05])
    assert found.truly[0, 0] == pytest.approx([0, 0, 0, 0, 1, 0])  # all that is called pole
    # no pixel is called rider but in one run, and these are poles
    assert np.isnan(found.truly[0, 1]).all()
    assert found.truly[1, 1] == pytest.approx([0, 0, 0, 0, 1, 0])


def test_the_classes_that_take_most_in_any_config_come_first(comparison):
    found = comparison.confusion
    assert [CLASSES[c] for c in most_confused(found, found.predicted_as, 0)] == ['tree', 'road', 'rider']
    assert [CLASSES[c] for c in most_confused(found, found.predicted_as, 1)] == ['car', 'road']


def test_the_tables_name_pairs_before_and_after(comparison):
    (_, header, going), (_, _, called) = confusion_tables(comparison.confusion)
    assert header == ['truth → predicted', 'CE', 'Dice', 'Dice: change']
    assert going[0] == ['rider, right', '0.0', '0.0', '+0.0']  # the rarest first
    assert ['pole → tree', '50.0', '25.0', '-25.0'] in going
    assert called[:2] == [['rider, right', '-', '0.0', '-'], ['pole → rider', '-', '100.0', '-']]
    assert '| pole → tree | 50.0 | 25.0 | -25.0 |' in markdown(comparison, sheets(comparison))


def test_the_chart_shows_all_pixels_of_each_class(comparison):
    axes = plot_confusion(comparison.confusion, ['0.3', '0.6']).axes[0]
    widths = [bar.get_width() for bar in axes.patches]
    assert sum(widths) == pytest.approx(4 * 100)  # two classes, two configs
    assert {text.get_text() for text in axes.texts} >= {'tree 50', 'tree 25', 'road 10', '70 %', '40 %'}


def test_runs_tested_by_an_earlier_version_have_none(tmp_path):
    new, old = with_confusion(tmp_path / 'new', POLE, RIDER), write_run(tmp_path / 'old', 'Dice')
    assert compare([old, new]).confusion is None
    assert compare([new, old]).confusion.labels == ['CE']
    assert compare([write_run(tmp_path / 'none', scored=False)]).confusion is None
