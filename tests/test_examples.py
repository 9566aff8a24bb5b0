"""Which images a comparison shows."""

import numpy as np
import pytest
from test_comparison import CLASSES, write_run

from mmseg_imbalance.predictions import Prediction, save_prediction
from mmseg_imbalance.reports.comparison import compare
from mmseg_imbalance.reports.examples import Shown, examples, risen_and_fallen, shown_runs

IMAGES = 60


def scores(**changes):
    """Of two classes, 100 and 20 pixels in each image, half of them found; changes are (rows, values)."""
    label = np.tile([100, 20], (IMAGES, 1))
    made = dict(label=label, intersect=label // 2, union=label.copy(), pred=label // 2)
    for name, (rows, value) in changes.items():
        made[name][rows] = value
    images = np.array([f'{n:02}.png' for n in range(IMAGES)])
    return made | dict(images=images, classes=np.array(['road', 'pole']))


def shown(*each):
    return [Shown(f'config {n}', None, None, s) for n, s in enumerate(each)]


def test_images_that_changed_most_and_one_in_the_middle_are_chosen():
    after = scores(intersect=([5, 6, 7, 20, 40], [[100, 20], [90, 20], [90, 20], [0, 0], [60, 10]]))
    found = [e for e in examples(shown(scores(), after), []) if e.rare is None]
    assert [(e.title.split()[-1], e.image) for e in found[:3]] == [
        ('better', '05.png'),  # 06 and 07 may be the next frames of a video
        ('better', '40.png'),
        ('worse', '20.png'),
    ]
    assert found[0].iou == pytest.approx(np.array([[0.5, 0.5], [1, 1]]))
    assert (found[-1].title, len(found)) == ('In the middle', 4)
    assert risen_and_fallen(shown(scores(), after)) == (4, 1)
    assert found[-1].iou == pytest.approx(np.full((2, 2), 0.5))


def test_of_a_rare_class_the_images_of_highest_and_lowest_gain_are_chosen():
    """In pixels: 0.4 of 20 is less than 0.1 of 200, 9 of false alarm more than 0.4 of 20."""
    labels = [[100, 200], [120, 0], [120, 0]]
    before = scores(label=([3, 8, 9], labels), union=([3, 8, 9], labels), intersect=([3], [[50, 100]]))
    after = {name: values.copy() for name, values in before.items()}
    after['intersect'][3, 1] = 120  # 0.5 to 0.6
    after['intersect'][[4, 5], 1] = 18, 2  # 0.5 to 0.9 and to 0.1
    before['pred'][[8, 9], 1], after['pred'][[8, 9], 1] = [0, 70], [9, 0]
    found = [e for e in examples(shown(before, after), ['pole', 'unknown']) if e.rare is not None]
    assert [(e.title, e.image, e.rare) for e in found] == [
        ('pole: most for the better', '03.png', 1),
        ('pole: most for the worse', '08.png', 1),
    ]
    assert found[0].iou[:, 1] == pytest.approx([0.5, 0.6])
    assert np.isnan(found[1].iou[:, 1]).all()


def test_a_rare_class_that_did_not_change_is_shown_where_most_of_it_is():
    made = scores(label=([30], [[90, 30]]))
    [found] = [e for e in examples(shown(made, made), ['pole']) if e.rare is not None]
    assert (found.title, found.image) == ('pole: where most of it is', '30.png')


def test_one_config_alone_shows_its_worst_images():
    made = scores(intersect=([11], [[0, 0]]))
    found = examples(shown(made), [])
    assert (found[0].title, found[0].image) == ('Lowest mean IoU', '11.png')
    assert found[0].iou.tolist() == [[0, 0]]


def with_predictions(folder, **options):
    run = write_run(folder, **options)
    labels = np.zeros((4, 4), int)
    made = Prediction('0.png', labels, labels, np.zeros((len(CLASSES), 3), np.uint8))
    save_prediction(next(run.glob('test/*/image_scores.npz')).parent / 'predictions', made)
    return run


def test_the_first_run_with_predictions_stands_for_its_config_and_what_is_missing_is_said(tmp_path):
    runs = [
        write_run(tmp_path / 'a'),
        with_predictions(tmp_path / 'b', seed=1),
        with_predictions(tmp_path / 'c', seed=2),
        write_run(tmp_path / 'd', loss='Dice'),
        with_predictions(tmp_path / 'e', loss='Focal'),
        with_predictions(tmp_path / 'f', loss='Other'),
    ]
    path = next(runs[-1].glob('test/*/image_scores.npz'))
    rows = dict(np.load(path))
    np.savez(path, **rows | dict(images=np.array([f'other{n}' for n in range(40)])))
    found, missing = shown_runs(compare(runs))
    assert [(each.label, each.seed) for each in found] == [('CE', 1), ('Focal', 0)]
    assert found[0].folder == next((tmp_path / 'b').glob('test/*/predictions'))
    assert missing[0].startswith('no pictures of predictions of Dice: test it')
    assert '--save-predictions' in missing[0]
    assert missing[1] == "no pictures of Other: its images or labels are not the baseline's"


def test_without_predictions_of_the_baseline_nothing_is_shown(tmp_path):
    runs = [write_run(tmp_path / 'a'), with_predictions(tmp_path / 'b', loss='Dice')]
    assert shown_runs(compare(runs))[0] == []


def test_configs_beyond_the_room_are_named(tmp_path):
    runs = [with_predictions(tmp_path / str(n), loss=f'Loss{n}') for n in range(6)]
    found, missing = shown_runs(compare(runs))
    assert [each.label for each in found] == ['Loss0', 'Loss1', 'Loss2', 'Loss3']
    assert missing == ['pictures show 4 configs; Loss4, Loss5 would not fit beside them']
