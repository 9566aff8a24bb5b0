"""Wrapped data sets count as training sees them, in memory of their images and not of their repeats."""

import tracemalloc
from functools import partial

import label_sets
import numpy as np
import pytest
import torch
from mmengine.dataset import BaseDataset, ClassBalancedDataset, ConcatDataset, RepeatDataset
from mmseg.datasets import MultiImageMixDataset
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image

from mmseg_imbalance.counting import count_classes, training_frequency
from mmseg_imbalance.counting.annotations import find_annotations
from mmseg_imbalance.counting.dataset_parts import first_indices, part_repeats
from mmseg_imbalance.samplers import RareClassSampler

NAMES = ('sky', 'road', 'tree')


class ThreeClasses(label_sets.StreetDataset):
    METAINFO = {'classes': NAMES, 'palette': [[at] * 3 for at in range(3)]}


make = partial(label_sets.make, kind=ThreeClasses)


@pytest.fixture
def root(tmp_path):
    numbers = np.random.default_rng(0)
    for name in ('img', 'ann'):
        (tmp_path / name).mkdir()
    for at in range(4):
        labels = numbers.choice(3, (5, 7), p=[0.6, 0.3, 0.1]) if at else np.full((5, 7), 2)
        Image.fromarray(labels.astype(np.uint8)).save(tmp_path / 'ann' / f'{at}.png')
        (tmp_path / 'img' / f'{at}.jpg').touch()
    return tmp_path


def given(dataset):
    """A config of a data set that is made already: wrappers take other wrappers as configs alone."""
    return dict(type=lambda: dataset)


def concat(*datasets):
    return ConcatDataset([given(each) for each in datasets], ignore_keys=['reduce_zero_label', 'label_map'])


def repeat(dataset, times):
    return RepeatDataset(given(dataset), times)


class Balanced(ClassBalancedDataset):
    def _get_repeat_factors(self, dataset, threshold):
        return [1 + at % 3 for at in range(len(dataset))]


def balance(dataset):
    return Balanced(given(dataset), oversample_thr=1.0)


def mix(dataset, *pipeline):
    return MultiImageMixDataset(given(dataset), pipeline=[dict(type=kind) for kind in pipeline])


def nested(root):
    shared = make(root)
    inner = concat(shared, make(root, reduce_zero_label=True, indices=[3, 0]))
    return concat(
        repeat(balance(inner), 3), repeat(make(root, indices=2), 5), shared, balance(repeat(shared, 2))
    )


CASES = {
    'zero labels of their own': lambda root: concat(make(root), make(root, reduce_zero_label=True)),
    'the other way round': lambda root: concat(make(root, reduce_zero_label=True), make(root)),
    'names in another order': lambda root: concat(make(root), make(root, metainfo={'classes': NAMES})),
    'repeated': lambda root: RepeatDataset(make(root), 3),
    'repeated inside': lambda root: concat(repeat(make(root), 3), make(root, indices=[2])),
    'balanced': lambda root: ClassBalancedDataset(make(root), oversample_thr=0.9),
    'mixed': lambda root: MultiImageMixDataset(concat(make(root), make(root, indices=1)), pipeline=[]),
    'mixed and not': lambda root: concat(MultiImageMixDataset(concat(make(root)), pipeline=[]), make(root)),
    'mixed twice': lambda root: mix(mix(concat(make(root), make(root, indices=1)))),
    'nested': nested,
}


@pytest.mark.parametrize('case', CASES)
def test_counts_and_rows_are_those_of_the_data_set_index_by_index(root, case):
    dataset = CASES[case](root)
    frequency = count_classes(CASES[case](root))
    labels = [dataset[at]['gt_seg_map'].ravel() for at in range(len(dataset))]
    truth = np.stack([np.bincount(each, minlength=256)[:3] for each in labels])
    assert frequency.pixels.tolist() == truth.sum(0).tolist()
    assert frequency.num_images == len(dataset)
    first = first_indices(dataset)
    assert truth[first].tolist() == frequency.counts.tolist()
    rows = label_sets.dataset_rows(dataset)
    assert first.tolist() == np.unique(rows, return_index=True)[1].tolist()
    assert (rows.dtype, rows.shape) == (np.int64, (len(dataset),))
    assert count_classes(dataset).counts[rows].tolist() == truth.tolist()
    assert np.bincount(rows).tolist() == frequency.repeats.tolist()


def test_the_pipelines_around_a_data_set_follow_from_the_inside_out(root):
    (part,) = part_repeats(mix(mix(make(root), 'mmseg.Rerange'), 'mmseg.PackSegInputs'))
    kinds = [type(step).__name__ for step in part.pipeline()]
    assert kinds == ['LoadAnnotations', 'Rerange', 'PackSegInputs']


def test_a_label_map_of_its_own_is_that_of_the_data_set(root):
    """Here with the same classes, as one that is set by hand."""
    other = make(root)
    other.label_map = {0: 1, 1: 0}
    other.data_list, other.serialize_data = (
        [{**each, 'label_map': {0: 1, 1: 0}} for each in map(other.get_data_info, range(4))],
        False,
    )
    dataset = concat(make(root), other)
    truth = np.bincount(np.concatenate([dataset[at]['gt_seg_map'].ravel() for at in range(8)]), minlength=3)
    assert truth[0] == truth[1]
    assert count_classes(dataset).pixels.tolist() == truth.tolist()


def test_memory_goes_by_images_and_not_by_repeats(root):
    many = repeat(repeat(make(root), 40_000), 40_000)
    once = count_classes(make(root))
    find_annotations(many)
    tracemalloc.start()
    frequency = count_classes(many)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    assert frequency.pixels.tolist() == [pixels * 40_000**2 for pixels in once.pixels.tolist()]
    assert frequency.num_images == 4 * 40_000**2
    tracemalloc.start()
    first = first_indices(many)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert first.tolist() == list(range(4))
    assert peak < 2**20


class Plain(torch.utils.data.Dataset):
    def __len__(self):
        return 4


OTHERS = {
    'of PyTorch': (lambda root: Plain(), 'test_dataset_parts.Plain', 'full_init, get_data_info, pipeline'),
    'a part': (lambda root: torch.utils.data.Subset(make(root), [1]), r'torch\.\S*Subset', 'full_init'),
    'joined': (
        lambda root: torch.utils.data.ConcatDataset([make(root)]),
        r'torch\.\S*ConcatDataset',
        'full_init',
    ),
    'nothing': (lambda root: None, 'builtins.NoneType', 'full_init'),
}


@pytest.mark.parametrize('case', OTHERS)
def test_a_data_set_that_cannot_be_counted_is_an_error_with_those_that_can(root, case):
    other, name, missing = OTHERS[case]
    with pytest.raises(TypeError, match=f'{name} cannot be counted, it has no {missing}') as raised:
        count_classes(other(root))
    assert 'BaseSegDataset, alone or in ConcatDataset' in str(raised.value)


class Chosen:
    """Takes the images of a data set in an order of its own."""

    def __init__(self, dataset, indices):
        self.dataset, self.indices, self.metainfo = dataset, indices, dataset.metainfo

    def full_init(self):
        self.dataset.full_init()

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.dataset[self.indices[index]]


class Endless(ThreeClasses):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return super().__getitem__(index % 4)


class Binary(ThreeClasses):
    def prepare_data(self, index):
        results = super().prepare_data(index)
        return results | dict(gt_seg_map=results['gt_seg_map'] > 0)


def test_a_data_set_that_chooses_its_images_by_itself_is_refused(root):
    for dataset, number in ((Chosen(make(root), [1, 1, 3]), 4), (make(root, kind=Endless), 4)):
        message = f'{type(dataset).__name__} has {len(dataset)} images, but {number} are found'
        with pytest.raises(TypeError, match=f'{message}.*repeat_indices'):
            count_classes(dataset)


class Tiles(ThreeClasses):
    """Each image twice, found by its own `get_data_info`."""

    def __len__(self):
        return 2 * super().__len__()

    def get_data_info(self, index):
        return super().get_data_info(index // 2)


class FirstTwo(ThreeClasses):
    def __len__(self):
        return min(2, super().__len__())


def test_what_a_data_set_s_own_get_data_info_or_shorter_length_says_is_counted(root):
    whole, start = count_classes(make(root)).pixels, count_classes(make(root, indices=[0, 1])).pixels
    assert count_classes(make(root, kind=Tiles)).pixels.tolist() == (2 * whole).tolist()
    assert count_classes(make(root, kind=FirstTwo)).pixels.tolist() == start.tolist()


def test_a_wrapper_that_tells_its_indices_is_counted_and_drawn_from(root, warned):
    chosen = Chosen(make(root), [1, 1, 3])
    chosen.repeat_indices = chosen.indices
    rows = [count_classes(make(root, indices=[row])).pixels for row in (1, 3)]
    assert count_classes(chosen).pixels.tolist() == (2 * rows[0] + rows[1]).tolist()
    assert first_indices(chosen).tolist() == [0, 2]
    assert warned == []


def test_what_takes_images_in_its_own_way_is_named(root, warned):
    count_classes(concat(make(root), make(root)))
    assert warned == []
    chosen, binary = Chosen(make(root), [3, 1, 0, 2]), make(root, kind=Binary)
    for dataset, method in ((chosen, '__getitem__'), (binary, 'prepare_data')):
        count_classes(repeat(dataset, 2))
        name = f'test_dataset_parts.{type(dataset).__name__}.{method}'
        assert f'counting does not call {name}. It counts' in warned.pop()
        count_classes(repeat(dataset, 2), label_transforms=())
        assert warned == []


class OfMMEngine(BaseDataset):
    """Neither MMSegmentation's nor with an ignored label, but with all that counting needs."""

    METAINFO = {'classes': NAMES}
    root = None

    def load_data_list(self):
        rule = dict(seg_fields=[], label_map=None, reduce_zero_label=False)
        return [dict(rule, seg_map_path=str(path)) for path in self.root]


def test_a_data_set_of_mmengine_alone_counts_with_255_ignored(root):
    OfMMEngine.root = sorted((root / 'ann').iterdir())
    dataset = OfMMEngine(pipeline=[LoadAnnotations()], data_prefix={})
    want = count_classes(make(root))
    assert training_frequency(dataset, progress=False).pixels.tolist() == want.pixels.tolist()
    assert RareClassSampler(dataset, num_workers=0, min_pixels=1).ignore_index == 255
