"""Labels out of range name their likely cause; data sets without two classes are refused."""

import contextlib

import pytest
from label_sets import of_classes
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations

from mmseg_imbalance.counting import count_classes


def message(dataset, **options):
    with pytest.raises(ValueError, match=r'.') as caught:
        count_classes(dataset, **options)
    return str(caught.value)


# One class


@pytest.mark.parametrize(
    ('files', 'options'),
    [
        ([[0, 1]], {}),
        ([[0], [0, 1]], {}),
        ([[1, 255]], {}),
        ([[0, 255]], {'ignore_index': 7}),
        ([[1, 2]], {'reduce_zero_label': True}),
        ([[0, 1]], {'classes': ['water']}),
    ],
)
def test_two_values_and_one_class_are_named(save, files, options):
    text = message(of_classes(save(*files), **{'classes': ('water',)} | options))
    assert 'labels out of range' in text
    assert 'two values and one class' in text
    assert "classes=('background', 'water')" in text
    assert 'out_channels=1' in text


@pytest.mark.parametrize(
    ('files', 'options'),
    [([[0], [0]], {}), ([[0, 255]], {}), ([[0, 1]], {'reduce_zero_label': True}), ([[255]], {})],
)
def test_one_class_alone_teaches_nothing(save, tmp_path, files, options):
    dataset = of_classes(save(*files), ('water',), **options)
    for _ in range(2):
        text = message(dataset, cache_dir=tmp_path / 'cache')
        assert "'water' is the only class" in text
        assert 'learns nothing' in text
        assert "classes=('background', 'water')" in text
    assert not (tmp_path / 'cache').exists()


# Values that are spread over the byte


@pytest.mark.parametrize(
    ('values', 'classes'),
    [
        ([0, 128, 255], 3),
        ([0, 127, 254], 3),
        ([0, 128, 255], 2),
        ([0, 64, 128, 192], 4),
        ([0, 85, 170, 255], 4),
        ([0, 85, 170, 255], 5),
        ([0, 170], 4),
        ([192], 4),
        (range(0, 250, 25), 10),
        ([0, 38, 75, 113], 4),
    ],
)
def test_masks_scaled_for_viewing_are_named_with_the_remedy(save, values, classes):
    root = save(list(values))
    names = [f'class {at}' for at in range(classes)]
    text = message(of_classes(root, names))
    assert 'spread over the byte' in text
    assert f'to 0 to {classes - 1}' in text
    assert 'First collect the values of all files' in text
    code = text.partition('by a table, in which all others are ignored: ')[2].partition(' Or ')[0]
    path = root / 'ann' / '0.png'
    space = {'PATH': path, 'values': list(values)[:classes]}
    with contextlib.suppress(ValueError):  # a list of another length cannot be written into the table
        exec('import numpy, PIL.Image; ' + code.rstrip('.'), space)
        assert len(values) >= classes
        assert count_classes(of_classes(root, names)).pixels.tolist() == [6] * classes


def test_a_file_that_lacks_values_gives_no_list_that_would_destroy_labels(save):
    for values, classes in (
        ([128, 255], 3),
        ([0, 100, 200, 255], 4),
        ([100, 200, 255], 3),
        ([0, 255, 128], 4),
    ):
        text = message(of_classes(save(values), [f'class {at}' for at in range(classes)]))
        assert 'spread over the byte' in text
        assert 'in this file' not in text
        assert 'searchsorted' not in text
    text = message(of_classes(save([0, 100, 200, 255]), ('a', 'b', 'c')))
    assert 'as [0, 100, 200] in this file' in text
    assert 'numpy.full(256, 255' in text


@pytest.mark.parametrize(
    ('values', 'classes'),
    [
        ([0, 3, 60, 190, 252, 255], 2),
        ([*range(6), *range(250, 256)], 2),
        ([*range(6), *range(250, 256)], 1),
        (range(0, 256, 5), 2),
        ([0, 40, 80, 120, 160, 255], 3),
        ([0, 1, 2, 126, 127, 128, 129, 254], 3),
    ],
)
def test_masks_with_smooth_edges_are_told_from_scaled_ones(save, values, classes):
    root = save(list(values))
    text = message(of_classes(root, [f'class {at}' for at in range(classes)]))
    assert 'smooth edges' in text
    assert 'interpolation' in text
    assert 'once was JPEG' in text
    code = text.partition('restores them: ')[2].partition(', or the same')[0]
    exec('import numpy, PIL.Image; ' + code, {'PATH': root / 'ann' / '0.png'})
    assert count_classes(of_classes(root, ('a', 'b'))).pixels.all()


def test_the_label_of_classes_that_are_left_out_must_be_the_ignored_one(save):
    class Three(BaseSegDataset):
        METAINFO = dict(classes=('a', 'b', 'c'), palette=[[0, 0, 0], [1, 1, 1], [2, 2, 2]])

    def three(**options):
        prefix = {'img_path': 'img', 'seg_map_path': 'ann'}
        metainfo = {'classes': ('c', 'a')}
        steps = [LoadAnnotations()]
        return Three(data_root=str(root), data_prefix=prefix, metainfo=metainfo, pipeline=steps, **options)

    root = save([0, 1, 2])
    text = message(three(ignore_index=7))
    assert 'label_map makes 255 of the labels of the others, and ignore_index is 7. It must be 255' in text
    assert 'reduce_zero_label' not in text
    assert count_classes(three()).pixels.tolist() == [6, 6]
    assert 'reduce_zero_label' in message(of_classes(save([0, 1, 255]), ('a', 'b'), ignore_index=7))


def test_a_step_that_fails_on_a_file_out_of_range_is_named_there(save):
    def maps(results):
        if results['sample_idx'] == 1:
            raise KeyError('edges')
        results['gt_seg_map'] //= 255
        return results

    files = [[0, 128], [0, 128]]
    dataset = of_classes(save(*files), ('a', 'b'), pipeline=[LoadAnnotations(), maps])
    assert 'maps fails on some labels' in message(dataset)


@pytest.mark.parametrize(
    ('values', 'classes', 'options'),
    [
        ([7, 8, 11, 21, 23, 26, 33], 19, {}),
        ([26, 255], 19, {}),
        ([0, 33], 19, {}),
        ([0, 100, 181], 171, {}),
        ([0, 150], 150, {}),
        ([0, 1, 2, 254], 3, {}),
        ([0, 5], 5, {}),
    ],
)
def test_other_labels_out_of_range_have_the_usual_causes(save, values, classes, options):
    text = message(of_classes(save(values), [f'class {at}' for at in range(classes)], **options))
    assert 'Usual causes' in text
    assert 'spread' not in text
