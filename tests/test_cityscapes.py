"""Published counts are taken for what is Cityscapes train, and for nothing else."""

import logging
import os

import numpy as np
import pytest
from mmengine.dataset import RepeatDataset
from mmseg.datasets import CityscapesDataset
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image
from test_counting import mosaic, numbers

from mmseg_imbalance import cityscapes as module
from mmseg_imbalance.cityscapes import CITYSCAPES_CITIES, LOOKED_AT, looks_like_it
from mmseg_imbalance.counting import count_classes
from mmseg_imbalance.frequency import CITYSCAPES_TRAIN

CITIES = tuple(sorted(CITYSCAPES_CITIES))


class Listed(CityscapesDataset):
    """CityscapesDataset whose file names are given."""

    files = ()
    folder = '/nowhere'

    def load_data_list(self):
        return [
            {
                'img_path': name,
                'seg_map_path': f'{self.folder}/{name}{self.seg_map_suffix}',
                'label_map': self.label_map,
                'reduce_zero_label': self.reduce_zero_label,
                'seg_fields': [],
            }
            for name in self.files
        ]


Listed.__name__ = 'CityscapesDataset'


def cityscapes(folder='/nowhere', cities=CITIES, images=2975, **options):
    Listed.files = [f'{cities[n % len(cities)]}_{n:06d}_000019' for n in range(images)]
    Listed.folder = str(folder)
    return Listed(pipeline=[LoadAnnotations()], **options)


def street(size=(1024, 2048), share=CITYSCAPES_TRAIN.share, ignored=0.1):
    """Label image in which each class has its share of the pixels that are not ignored."""
    pixels = size[0] * size[1]
    ends = np.round(share.cumsum() * (1 - ignored) * pixels)
    labels = ends.searchsorted(np.arange(pixels), side='right').astype(np.uint8)
    labels[int(ends[-1]) :] = 255
    return labels.reshape(size)


@pytest.fixture(scope='module')
def full(tmp_path_factory):
    """2975 names of one label image that has the published shares, and a way to name another one."""
    folder = tmp_path_factory.mktemp('cityscapes')
    dataset = cityscapes(folder)
    paths = [dataset.get_data_info(row)['seg_map_path'] for row in range(2975)]
    Image.fromarray(street()).save(paths[0], compress_level=1)
    for path in paths[1:]:
        os.link(paths[0], path)
    return folder


@pytest.fixture
def links(full, tmp_path):
    """The same, to be changed: (folder, function that makes some of the files another image)."""
    for path in full.iterdir():
        os.link(path, tmp_path / path.name)

    def change(positions, labels):
        names = sorted(path.name for path in tmp_path.iterdir())
        Image.fromarray(labels).save(tmp_path / 'other.png', compress_level=1)
        for position in positions:
            (tmp_path / names[position]).unlink()
            os.link(tmp_path / 'other.png', tmp_path / names[position])
        (tmp_path / 'other.png').unlink()

    return tmp_path, change


@pytest.fixture
def logged(monkeypatch):
    messages = []

    def log(message, logger=None, level=logging.INFO):
        messages.append((level, message))

    monkeypatch.setattr('mmengine.logging.print_log', log)
    return messages


@pytest.fixture
def counted(monkeypatch):
    """Positions at which files were decoded, one list for each call."""
    calls = []
    original = module.looks_like_it

    def look(counts, ignored):
        calls.append(len(counts))
        return original(counts, ignored)

    monkeypatch.setattr(module, 'looks_like_it', look)
    return calls


@pytest.mark.parametrize('options', [{}, {'max_images': 5}])
def test_published_counts_are_taken_after_a_look_at_some_files(full, options, logged, counted):
    assert count_classes(cityscapes(full, lazy_init=True), **options) is CITYSCAPES_TRAIN
    assert count_classes(mosaic(cityscapes(full)), **options) is CITYSCAPES_TRAIN
    assert counted == [LOOKED_AT] * 2
    assert [level for level, _ in logged] == [logging.INFO] * 2
    assert 'max_images=2975 counts the files' in logged[0][1]
    # Nothing was left out: valid and ignored pixels are all pixels of 2975 images.
    assert CITYSCAPES_TRAIN.pixels.sum() + CITYSCAPES_TRAIN.ignored == 2975 * 2048 * 1024


def stop(*_, **__):
    raise FileNotFoundError('files are counted')


@pytest.mark.parametrize('options', [{'per_image': True}, {'max_images': 2975}])
def test_who_wants_the_files_counted_gets_them_counted(full, monkeypatch, options):
    monkeypatch.setattr('mmseg_imbalance.counting._count_part', stop)
    with pytest.raises(FileNotFoundError, match='files are counted'):
        count_classes(cityscapes(full), **options)


@pytest.mark.parametrize(
    'options',
    [
        {'images': 2974},
        {'cities': ('aachen', 'bochum')},
        {'cities': (*CITIES, 'otherville')},
        {'reduce_zero_label': True},
        {'ignore_index': 254},
        {'seg_map_suffix': '_gtFine_labelIds.png'},
        {'metainfo': {'classes': CITYSCAPES_TRAIN.classes[::-1]}},
        {},
    ],
    ids=lambda options: next(iter(options), 'no file'),
)
def test_what_is_nearly_cityscapes_train_is_counted(options):
    with pytest.raises(FileNotFoundError, match='/nowhere/aachen_000000_000019'):
        count_classes(cityscapes(**options))
    with pytest.raises(FileNotFoundError):
        count_classes(RepeatDataset(cityscapes(), times=2))


def test_one_missing_label_is_named(links):
    folder, _ = links
    gone = sorted(folder.iterdir())[20]
    gone.unlink()
    dataset = cityscapes(folder)
    with pytest.raises(FileNotFoundError, match=gone.name):
        count_classes(dataset, num_workers=0)


EDITED = {
    'smaller': street((512, 1024)),
    'road and sidewalk merged': np.where(street() == 1, 0, street()).astype(np.uint8),
    'other classes': street(share=CITYSCAPES_TRAIN.share[::-1]),
    'labels out of range': np.where(street() == 0, 26, street()).astype(np.uint8),
    'all ignored': street(ignored=1),
}


@pytest.mark.parametrize('edit', EDITED)
def test_edited_labels_are_counted_with_a_warning(links, edit, logged, monkeypatch):
    folder, change = links
    change(range(2975), EDITED[edit])
    monkeypatch.setattr('mmseg_imbalance.counting._count_part', stop)
    with pytest.raises(FileNotFoundError, match='files are counted'):
        count_classes(cityscapes(folder))
    assert logged == [(logging.WARNING, logged[0][1])]
    assert 'other sizes, labels or shares of the classes' in logged[0][1]


def test_shares_of_a_few_images_may_differ_from_those_of_all():
    random = np.random.default_rng(0)
    pixels = 2048 * 1024
    for _ in range(100):
        share = random.dirichlet(8 * CITYSCAPES_TRAIN.share, LOOKED_AT)
        counts = (share * pixels * 0.9).astype(int)
        assert looks_like_it(counts, pixels - counts.sum(axis=1))


@pytest.mark.slow
def test_counted_files_of_cityscapes_are_as_many_as_published(full):
    frequency = count_classes(cityscapes(full), max_images=2975, num_workers=2)
    assert frequency is not CITYSCAPES_TRAIN
    np.testing.assert_allclose(frequency.share, CITYSCAPES_TRAIN.share, atol=1e-6)
    assert numbers(frequency)[1] == [2975] * 19
