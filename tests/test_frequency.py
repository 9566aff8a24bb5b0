import numpy as np
import pytest
from mmengine.dataset import ConcatDataset
from test_counting import make, make_labels, numbers, same

from mmseg_imbalance.counting import count_classes
from mmseg_imbalance.frequency import CITYSCAPES_TRAIN, ClassFrequency


def test_published_counts_cannot_be_changed():
    with pytest.raises(ValueError, match='read-only'):
        CITYSCAPES_TRAIN.pixels[0] = 1


def test_sum_of_two_data_sets_is_the_count_of_both(tmp_path):
    root, other = make_labels(tmp_path / 'data'), make_labels(tmp_path / 'other', seed=1, images=3)
    both = count_classes(ConcatDataset([make(root), make(other)]))
    same(both, count_classes(make(root)) + count_classes(make(other)))
    assert (CITYSCAPES_TRAIN + CITYSCAPES_TRAIN).counts is None
    with pytest.raises(ValueError, match='cannot add'):
        both + CITYSCAPES_TRAIN


def test_saved_counts_are_loaded_again(tmp_path):
    counted = count_classes(make(make_labels(tmp_path / 'data')))
    counted.save(tmp_path / 'counts.npz')
    same(counted, ClassFrequency.load(tmp_path / 'counts.npz'))
    CITYSCAPES_TRAIN.save(tmp_path / 'totals.npz')
    loaded = ClassFrequency.load(tmp_path / 'totals.npz')
    assert numbers(loaded) == numbers(CITYSCAPES_TRAIN)
    assert loaded.counts is loaded.image_keys is None


def test_totals_need_one_number_per_class():
    with pytest.raises(ValueError, match=r'pixels has shape \(2,\), but there are 1 classes'):
        ClassFrequency(('a',), np.ones(2), np.ones(1), np.ones(1), 0, 1, 1)
