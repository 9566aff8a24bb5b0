from dataclasses import fields

import numpy as np
import pytest
from label_sets import make, make_labels, numbers, same
from mmengine.dataset import RepeatDataset

from mmseg_imbalance.counting import count_classes
from mmseg_imbalance.frequency import CITYSCAPES_TRAIN, ClassFrequency


def test_published_counts_cannot_be_changed():
    with pytest.raises(ValueError, match='read-only'):
        CITYSCAPES_TRAIN.pixels[0] = 1


def test_saved_counts_are_loaded_again(tmp_path):
    counted = count_classes(make(make_labels(tmp_path / 'data')))
    counted.save(tmp_path / 'counts.npz')
    same(counted, ClassFrequency.load(tmp_path / 'counts.npz'))
    CITYSCAPES_TRAIN.save(tmp_path / 'totals.npz')
    loaded = ClassFrequency.load(tmp_path / 'totals.npz')
    assert numbers(loaded) == numbers(CITYSCAPES_TRAIN)
    assert loaded.counts is loaded.image_keys is None


def test_counts_know_the_data_sets_that_they_are_of(tmp_path):
    root, other = make_labels(tmp_path / 'data'), make_labels(tmp_path / 'other', seed=1, images=3)

    def together():
        parts = [make(root), make(other), make(root, indices=2)]
        return RepeatDataset(dict(type='ConcatDataset', datasets=parts), times=2)

    counted = count_classes(together())
    counted.save(tmp_path / 'counts.npz')
    for frequency in (counted, ClassFrequency.load(tmp_path / 'counts.npz')):
        names, parts = zip(*frequency.by_source(), strict=True)
        assert names == tuple(f'StreetDataset {folder}/ann' for folder in (root, other, root))
        for part, alone in zip(parts, (make(root), make(other), make(root, indices=2)), strict=True):
            same(part, count_classes(RepeatDataset(alone, times=2)))
        assert frequency.counted == counted.counted
    assert CITYSCAPES_TRAIN.by_source() == []


def test_a_file_of_an_older_version_has_no_data_sets(tmp_path):
    counted = count_classes(make(make_labels(tmp_path / 'data')))
    new = ('ignored_counts', 'sources', 'source_names', 'counted', 'unusual')
    old = {field.name: getattr(counted, field.name) for field in fields(counted) if field.name not in new}
    np.savez(tmp_path / 'counts.npz', **old)
    loaded = ClassFrequency.load(tmp_path / 'counts.npz')
    same(loaded, counted)
    assert loaded.by_source() == []


def test_class_names_of_any_script_are_kept_as_they_are(tmp_path):
    names = ('道路', 'Straße', 'дорога', 'طريق', '🚗', 'a/b loss')
    counted = ClassFrequency.from_rows(names, [[1, 0, 2, 3, 4, 5]], [0], ['图像/一.png'])
    counted.save(tmp_path / 'counts.npz')
    loaded = ClassFrequency.load(tmp_path / 'counts.npz')
    assert loaded.classes == names
    assert loaded.image_keys == ('图像/一.png',)


def test_totals_need_one_number_per_class():
    with pytest.raises(ValueError, match=r'pixels has shape \(2,\), but there are 1 classes'):
        ClassFrequency(('a',), np.ones(2), np.ones(1), np.ones(1), 0, 1, 1)
