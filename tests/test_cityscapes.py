"""Published counts are taken for what is Cityscapes train, and for nothing else."""

import logging
import os

import numpy as np
import pytest
from label_sets import mosaic
from mmengine.dataset import RepeatDataset
from mmseg.datasets import CityscapesDataset
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image

from mmseg_imbalance.counting import cityscapes as module
from mmseg_imbalance.counting import count_classes
from mmseg_imbalance.counting.annotations import find_annotations
from mmseg_imbalance.counting.cityscapes import CITYSCAPES_CITIES, LOOKED_AT, PIXELS, looks_like_it
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


IN_IMAGES = CITYSCAPES_TRAIN.images / 2975
KINDS = 43  # of label images
# Which of them hold a class: so many that its share of the images is as published, others for each class.
HOLDS = np.stack([(np.arange(KINDS) * (c + 3)) % KINDS < KINDS * q for c, q in enumerate(IN_IMAGES)], axis=1)


def street(kind, size=(1024, 2048), share=CITYSCAPES_TRAIN.share, ignored=0.1):
    """Label image of the classes of its kind, the more of one, the fewer images hold it."""
    share = share / IN_IMAGES * HOLDS[kind]
    share = share / share.sum()
    pixels = size[0] * size[1]
    ends = np.round(share.cumsum() * (1 - ignored) * pixels)
    labels = ends.searchsorted(np.arange(pixels), side='right').astype(np.uint8)
    labels[int(ends[-1]) :] = 255
    return labels.reshape(size)


def write_all(folder, change=lambda labels: labels, **options):
    """2975 names of label images whose classes are in as many of them as published."""
    dataset = cityscapes(folder)
    paths = [dataset.get_data_info(row)['seg_map_path'] for row in range(2975)]
    for number, path in enumerate(paths):
        if number < KINDS:
            Image.fromarray(change(street(number, **options))).save(path, compress_level=1)
        else:
            os.link(paths[number % KINDS], path)


@pytest.fixture(scope='module')
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp('cityscapes')
    write_all(folder)
    return folder


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
    monkeypatch.setattr('mmseg_imbalance.counting.counts.count_rows', stop)
    with pytest.raises(FileNotFoundError, match='files are counted'):
        count_classes(cityscapes(full), **options)


NEARLY = [
    {'images': 2974},
    {'cities': ('aachen', 'bochum')},
    {'cities': (*CITIES, 'otherville')},
    {'reduce_zero_label': True},
    {'ignore_index': 254},
    {'seg_map_suffix': '_gtFine_labelIds.png'},
    {'metainfo': {'classes': CITYSCAPES_TRAIN.classes[::-1]}},
]


@pytest.mark.parametrize('options', [*NEARLY, {}], ids=lambda options: next(iter(options), 'no file'))
def test_what_is_nearly_cityscapes_train_is_counted(options):
    with pytest.raises(FileNotFoundError, match='/nowhere/aachen_000000_000019'):
        count_classes(cityscapes(**options))
    with pytest.raises(FileNotFoundError):
        count_classes(RepeatDataset(cityscapes(), times=2))


def test_every_name_and_label_is_as_in_cityscapes_train():
    """Whatever the files look like."""
    for options in NEARLY:
        assert not module._has_the_names(*find_annotations(cityscapes(**options))), options
    classes, annotations = find_annotations(cityscapes())
    assert module._has_the_names(classes, annotations)
    assert not module._has_the_names(classes[::-1], annotations)
    *others, last = annotations
    for change in (
        dict(path=others[0].path),
        dict(repeats=2),
        dict(ignore_index=254),
        dict(table=None),
        dict(table=np.roll(last.table, 1)),
        dict(steps=last.steps._replace(change=(LoadAnnotations(),))),
        dict(dataset=RepeatDataset(last.dataset, times=1)),
    ):
        assert not module._has_the_names(classes, [*others, last._replace(**change)]), change


def test_one_missing_label_is_named(full, tmp_path):
    for path in full.iterdir():
        os.link(path, tmp_path / path.name)
    gone = sorted(tmp_path.iterdir())[20]
    gone.unlink()
    dataset = cityscapes(tmp_path)
    with pytest.raises(FileNotFoundError, match=gone.name):
        count_classes(dataset, num_workers=0)


def replaced(old, new):
    table = np.arange(256, dtype=np.uint8)
    table[[CITYSCAPES_TRAIN.classes.index(name) for name in old]] = new
    return dict(change=lambda labels: table[labels])


THINGS = ('person', 'rider', 'truck', 'bus', 'train', 'motorcycle', 'bicycle')
EDITED = {
    'things ignored': replaced(THINGS, 255),
    'rider and person merged': replaced(['rider'], 11),
    'smaller': dict(size=(512, 1024)),
    'road and sidewalk merged': replaced(['sidewalk'], 0),
    'other classes': dict(share=CITYSCAPES_TRAIN.share[::-1]),
    'labels out of range': replaced(['road'], 26),
    'all ignored': dict(ignored=1),
    'a class in all images': dict(
        change=lambda labels: np.where(np.arange(2048) < 3, 16, labels).astype(np.uint8)
    ),
    'motorcycle ignored': replaced(['motorcycle'], 255),
    'bus ignored': replaced(['bus'], 255),
    'truck and car merged': replaced(['truck'], 13),
}


@pytest.mark.parametrize(
    'edit', [pytest.param(edit, marks=[pytest.mark.slow] if n > 1 else []) for n, edit in enumerate(EDITED)]
)
def test_edited_labels_are_counted_with_a_warning(tmp_path, edit, logged, monkeypatch):
    write_all(tmp_path, **EDITED[edit])
    monkeypatch.setattr('mmseg_imbalance.counting.counts.count_rows', stop)
    with pytest.raises(FileNotFoundError, match='files are counted'):
        count_classes(cityscapes(tmp_path))
    assert logged == [(logging.WARNING, logged[0][1])]
    assert 'other sizes, labels, classes or shares' in logged[0][1]


def drawn(random, images=LOOKED_AT, share=IN_IMAGES):
    """Counts and ignored pixels of images drawn at random; objects are of very different sizes."""
    sizes = CITYSCAPES_TRAIN.pixels / CITYSCAPES_TRAIN.images * random.lognormal(-0.5, 1, (images, 19))
    part = sizes * (random.random((images, 19)) < share)
    valid = 2975 * PIXELS - CITYSCAPES_TRAIN.ignored
    counts = np.ceil(part / part.sum(axis=1, keepdims=True) * valid / 2975).astype(int)
    return counts, PIXELS - counts.sum(axis=1)


def test_some_images_may_differ_from_all():
    random = np.random.default_rng(0)
    assert all(looks_like_it(*drawn(random)) for _ in range(100))


def test_ignored_borders_and_small_classes_that_shrink_are_noticed():
    """As where the borders of objects are set to the ignored label, in files of the same names."""
    pole, light = map(CITYSCAPES_TRAIN.classes.index, ('pole', 'traffic light'))
    for seed in range(20):
        counts, ignored = drawn(np.random.default_rng(seed))
        eroded = counts * 8 // 10
        assert not looks_like_it(eroded, ignored + (counts - eroded).sum(axis=1))
        shrunk = counts.copy()
        shrunk[:, [pole, light]] = np.ceil(counts[:, [pole, light]] * 0.1)
        assert not looks_like_it(shrunk, ignored + (counts - shrunk).sum(axis=1))


def test_one_image_of_another_size_is_noticed():
    counts, ignored = drawn(np.random.default_rng(0))
    assert looks_like_it(counts, ignored)
    ignored[7] += 1
    assert not looks_like_it(counts, ignored)


@pytest.mark.parametrize(
    ('taken', 'given'),
    [(dict(road=0.9), None), (dict(road=0.6, building=0.6), 'sidewalk'), (dict(road=0.6), 'motorcycle')],
)
def test_a_share_far_from_the_published_one_is_noticed(taken, given):
    """The classes are in as many images as before."""
    counts, ignored = drawn(np.random.default_rng(0))
    columns = dict(zip(CITYSCAPES_TRAIN.classes, counts.T, strict=True)) | {None: ignored}
    for name, part in taken.items():
        moved = (part * columns[name]).astype(int) * (columns[given] > 0)
        columns[name] -= moved
        columns[given] += moved
    assert not looks_like_it(counts, ignored)


def test_a_class_in_too_few_or_too_many_images_is_noticed():
    random = np.random.default_rng(0)
    for c, name in enumerate(CITYSCAPES_TRAIN.classes):
        none, all_images = (
            looks_like_it(*drawn(random, share=np.where(np.arange(19) == c, share, IN_IMAGES)))
            for share in (0, 1)
        )
        assert none == (name == 'train')
        assert not all_images or IN_IMAGES[c] > 0.85


def test_the_log_says_what_the_look_misses(full, logged):
    count_classes(cityscapes(full))
    assert 'would miss a few edited files, or train taken out of all' in logged[0][1]


@pytest.mark.slow
def test_counted_files_of_cityscapes_are_as_many_as_published(full):
    frequency = count_classes(cityscapes(full), max_images=2975, num_workers=2)
    assert frequency is not CITYSCAPES_TRAIN
    np.testing.assert_allclose(frequency.share, CITYSCAPES_TRAIN.share, rtol=0.4)
    np.testing.assert_allclose(frequency.images / 2975, IN_IMAGES, atol=1 / KINDS)
