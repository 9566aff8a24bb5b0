"""Which annotations a data set has, of which classes."""

import pytest
from label_sets import of_classes
from mmengine.dataset import ConcatDataset

from mmseg_imbalance.counting import count_classes
from mmseg_imbalance.counting.annotations import find_annotations
from mmseg_imbalance.counting.pixel_counts import count_pixels, notes_text


@pytest.mark.parametrize('classes', ['water', 'w'])
def test_a_string_for_the_classes_is_refused_with_the_comma(save, classes):
    dataset = of_classes(save([0, 1]), classes)
    with pytest.raises(TypeError, match=rf"classes='{classes}' is a string.*path.*\('{classes}',\)"):
        count_classes(dataset)
    with pytest.raises(TypeError, match='comma'):
        find_annotations(ConcatDataset([dataset]))


def test_a_file_of_names_is_what_mmengine_makes_of_it(save, tmp_path):
    root = save([0, 1])
    (tmp_path / 'names.txt').write_text('background\nwater\n')
    assert count_classes(of_classes(root, str(tmp_path / 'names.txt'))).classes == ('background', 'water')


def test_an_annotation_tells_the_data_set_that_it_is_of(save):
    root = save([0, 1], [1, 1])
    first = of_classes(root, ('a', 'b'), indices=[1])
    second = of_classes(root, ('a', 'b'), reduce_zero_label=True)
    classes, annotations = find_annotations(ConcatDataset([first, second], ignore_keys='reduce_zero_label'))
    assert classes == ('a', 'b')
    assert [(a.dataset, a.row) for a in annotations] == [(first, 0), (second, 0), (second, 1)]
    counts = [count_pixels(annotation, 2) for annotation in annotations]
    assert [(count.pixels.tolist(), count.ignored) for count in counts] == [
        ([0, 12], 0),
        ([6, 0], 6),
        ([12, 0], 0),
    ]
    assert notes_text(note for count in counts for note in count.notes) == ''
