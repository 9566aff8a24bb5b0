"""Masks of 0 and 255 end in an error; void beside an object, or in one of several data sets, does not."""

import re

import numpy as np
import pytest
from label_sets import of_classes, same, write
from mmengine.config import Config
from mmengine.dataset import ConcatDataset, RepeatDataset
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations

from mmseg_imbalance import commands
from mmseg_imbalance.counting import count_classes, training_frequency
from mmseg_imbalance.samplers import RareClassSampler

NAMES = ('background', 'lesion')


def masks(root, *images):
    """A data set of images of 4 rows, each given as the labels of its rows."""
    for number, rows in enumerate(images):
        write(root / 'ann' / f'{number}.png', np.repeat(np.array(rows, np.uint8)[:, None], 5, 1))
        (root / 'img').mkdir(exist_ok=True)
        (root / 'img' / f'{number}.jpg').touch()
    return root


def make(root, classes=NAMES, **options):
    return of_classes(root, classes, **options)


OBJECT_IGNORED = [(0, 0, 255, 255), (0, 0, 0, 0), (0, 255, 0, 0)]
WRONG = {
    'two classes': (OBJECT_IGNORED, {}, 'Masks of 0 and 255 look like this.*Or write this number into the f'),
    'object alone': ([(1, 1, 255, 255)], {}, "only the class 'lesion' of 2"),
    'more classes': (OBJECT_IGNORED, {'classes': ('a', 'b', 'c')}, "only the class 'a' of 3 classes occurs"),
    'zero label': ([(0, 1, 1, 1)], {'reduce_zero_label': True}, 'set reduce_zero_label=False'),
    'zero label and 255': (OBJECT_IGNORED, {'reduce_zero_label': True}, 'none of 2 classes occurs'),
    'a class is ignored': (
        [(0, 1, 1, 1)],
        {'ignore_index': 1},
        "ignore_index=1 is the number of the class 'les",
    ),
    'all is ignored': (
        [(255,) * 4],
        {},
        'none of 2 classes occurs in . images, with 0 pixels.*All labels are 255',
    ),
}


@pytest.mark.parametrize('case', WRONG)
def test_one_class_beside_ignored_pixels_is_an_error_with_its_cause(tmp_path, case):
    images, options, message = WRONG[case]
    dataset = make(masks(tmp_path, *images), **options)
    for wrapped in (dataset, RepeatDataset(dataset, times=3), ConcatDataset([dataset])):
        for _ in range(2):  # the second is from the cache
            with pytest.raises(ValueError, match=message):
                count_classes(wrapped, cache_dir=tmp_path / 'cache')


RIGHT = {
    'band around objects': [(0, 255, 1, 255), (0, 0, 0, 0)],
    'object in one image': [(0, 255, 255, 255), (255, 255, 0, 0), (0, 0, 0, 1)],
    'nothing ignored': [(0, 0, 1, 1)],
}


@pytest.mark.parametrize('case', RIGHT)
def test_void_beside_an_object_is_counted_in_silence(tmp_path, case, warned):
    frequency = count_classes(make(masks(tmp_path, *RIGHT[case])))
    assert frequency.pixels.all()
    assert not warned


def test_ade20k_has_a_zero_label_that_is_ignored(tmp_path, warned):
    names = [f'class {number}' for number in range(150)]
    dataset = make(masks(tmp_path, (0, 1, 1, 150), (0, 2, 3, 3)), names, reduce_zero_label=True)
    frequency = count_classes(dataset)
    assert np.flatnonzero(frequency.pixels).tolist() == [0, 1, 2, 149]
    assert frequency.ignored == 10
    assert not warned


def test_one_class_alone_without_ignored_pixels_is_warned_of(tmp_path, warned):
    frequency = count_classes(make(masks(tmp_path, (0, 0, 0, 0))))
    assert frequency.pixels.tolist() == [20, 0]
    assert len(warned) == 1
    assert "only the class 'background' of 2 classes occurs in 1 images, with 20 pixels" in warned[0]
    assert 'Nothing can be learnt' in warned[0]


def test_beside_a_data_set_with_objects_one_class_and_void_are_warned_of(tmp_path, warned):
    void = make(masks(tmp_path / 'void', *OBJECT_IGNORED))
    objects = make(masks(tmp_path / 'objects', (0, 255, 1, 1)))
    empty = make(masks(tmp_path / 'empty', (0, 0, 0, 0)))
    frequency = count_classes(ConcatDataset([objects, void, empty]))
    assert frequency.pixels.tolist() == [5 + 45 + 20, 10]
    assert len(warned) == 1
    for part in (f'in BaseSegDataset {tmp_path}/void/ann: ', 'may be as it should be', 'Masks of 0 and 255'):
        assert part in warned[0]
    with pytest.raises(ValueError, match='Masks of 0 and 255'):
        count_classes(ConcatDataset([void, empty]))


def many(root, last):
    return make(masks(root, *[(0, 255, 0, 0)] * 9, last))


@pytest.mark.parametrize('usual', [(0, 255, 0, 0), (0, 0, 0, 0)])
def test_where_a_sample_holds_one_class_all_images_are_counted(tmp_path, warned, usual):
    dataset = make(masks(tmp_path / 'void', *[usual] * 9, (1, 0, 0, 0), (1, 0, 255, 0)))
    for _ in range(2):  # the second is from the cache
        same(count_classes(dataset, max_images=2, cache_dir=tmp_path / 'cache'), count_classes(dataset))
    assert len(warned) == 2
    assert 'in a sample of 2 images fewer than two classes occur, so all 11 are' in warned[0]


def test_a_sample_of_empty_masks_does_not_hide_that_objects_are_ignored(tmp_path, warned):
    dataset = make(masks(tmp_path, *[(0, 0, 0, 0)] * 30, *[(0, 255, 0, 0)] * 3))
    with pytest.raises(ValueError, match=r'of 2 classes occurs in 33 images.*Masks of 0 and 255'):
        count_classes(dataset, max_images=2)


def test_a_sample_of_two_classes_stays_a_sample(tmp_path, warned):
    frequency = count_classes(make(masks(tmp_path, *[(0, 1, 0, 0)] * 10)), max_images=2)
    assert (frequency.num_images, frequency.dataset_images) == (2, 10)
    assert not warned


EMPTY, IGNORED, GOOD, BAND = (0, 0, 0, 0), (0, 255, 0, 0), (0, 0, 1, 1), (0, 255, 1, 255)
MIXED = {
    'one is good': ([IGNORED] * 39 + [GOOD], "in 39 of 40 images only the class 'background'"),
    'many are empty': ([EMPTY] * 60 + [IGNORED] * 30 + [GOOD] * 10, 'in 30 of 100 images'),
    'one has void': ([IGNORED] * 30 + [GOOD] * 19 + [BAND], 'in 30 of 50 images'),
    'more classes': ([IGNORED] * 9 + [GOOD, (0, 2, 2, 0)], "while 'lesion', 'scar' occur in 2, which"),
    'good ones are most': ([IGNORED] * 4 + [GOOD] * 5, None),
    'bands': ([BAND] * 3 + [IGNORED] * 9, None),
    'bands around many': ([BAND] * 3 + [GOOD] * 3 + [IGNORED] * 9, None),
    'void beside many classes': ([(0, 1, 2, 255)] * 9 + [GOOD], None),
    'one class alone here and there': ([(1, 1, 1, 255)] * 4 + [IGNORED] * 4 + [GOOD] * 5, None),
}


@pytest.mark.parametrize('case', MIXED)
@pytest.mark.parametrize('options', [{}, {'max_images': 100}])
def test_where_most_objects_may_be_ignored_a_warning_says_so(tmp_path, warned, case, options):
    images, message = MIXED[case]
    dataset = make(masks(tmp_path, *images), (*NAMES, 'scar'))
    for _ in range(2):  # the second is from the cache
        count_classes(dataset, cache_dir=tmp_path / 'cache', **options)
        if message is None:
            assert not warned
        else:
            (text,) = warned
            for part in (
                message,
                'hardly an ignored pixel. If these pixels are void, all is well',
                'Masks of',
            ):
                assert part in text
            warned.clear()


def test_beside_another_data_set_most_objects_may_be_ignored_too(tmp_path, warned):
    bad, good = (make(masks(tmp_path / str(n), *[rows] * 9, GOOD)) for n, rows in enumerate((IGNORED, BAND)))
    count_classes(ConcatDataset([good, bad]))
    assert len(warned) == 1
    assert f"in BaseSegDataset {tmp_path}/0/ann: in 9 of 10 images only the class 'background'" in warned[0]


def test_a_subset_of_a_data_set_may_be_too_small(tmp_path, warned):
    root = masks(tmp_path, IGNORED, EMPTY, BAND)
    with pytest.raises(ValueError, match=r'Or the subset is too small: indices leaves 1 images\.'):
        count_classes(ConcatDataset([make(root, indices=1)]))
    count_classes(make(root, indices=[1]))
    assert warned[0].endswith(
        'check annotations and classes. Or the subset is too small: indices leaves 1 images.'
    )
    with pytest.raises(ValueError, match='Masks of 0 and 255') as raised:
        count_classes(make(masks(tmp_path / 'whole', IGNORED)))
    assert 'subset' not in str(raised.value)


def test_sampler_and_command_end_with_the_error(tmp_path, capsys):
    root = masks(tmp_path, *OBJECT_IGNORED)
    with pytest.raises(ValueError, match='Masks of 0 and 255'):
        RareClassSampler(make(root), min_pixels=1, num_workers=0)
    dataset = dict(
        type='BaseSegDataset',
        data_root=str(root),
        data_prefix=dict(img_path='img', seg_map_path='ann'),
        metainfo=dict(classes=NAMES),
        pipeline=[dict(type='LoadAnnotations')],
    )
    cfg = Config(dict(default_scope='mmseg', train_dataloader=dict(dataset=dataset, num_workers=0)))
    cfg.dump(tmp_path / 'config.py')
    with pytest.raises(SystemExit) as end:
        commands.main(['class-weights', str(tmp_path / 'config.py')])
    assert end.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match('mmseg-imbalance class-weights: only the class .* Masks of 0 and 255', error)


def test_the_remedy_in_the_message_works(tmp_path):
    def objects(results):
        results['gt_seg_map'][results['gt_seg_map'] == 255] = 1
        return results

    root = masks(tmp_path, *OBJECT_IGNORED)
    with pytest.raises(ValueError, match='after LoadAnnotations') as raised:
        count_classes(make(root))
    assert "results['gt_seg_map'][results['gt_seg_map'] == 255] = 1" in str(raised.value)
    assert count_classes(make(root, pipeline=[LoadAnnotations(), objects])).pixels.tolist() == [45, 15]


def test_a_label_map_is_a_remedy_too(tmp_path):
    class Masks(BaseSegDataset):
        METAINFO = dict(classes=NAMES, palette=[[0, 0, 0], [255, 255, 255]])

        @classmethod
        def get_label_map(cls, new_classes=None):
            return {255: 1}

    root = masks(tmp_path, *OBJECT_IGNORED)
    dataset = Masks(
        data_root=str(root),
        data_prefix=dict(img_path='img', seg_map_path='ann'),
        pipeline=[LoadAnnotations()],
    )
    assert training_frequency(dataset, progress=False).pixels.tolist() == [45, 15]
    assert sum((dataset[row]['gt_seg_map'] == 1).sum() for row in range(3)) == 15
