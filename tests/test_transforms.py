"""Crops hold the drawn class if a try does."""

import itertools
from collections import Counter

import numpy as np
import pytest
from mmcv.transforms.utils import cache_random_params
from mmengine.registry import init_default_scope
from mmseg.datasets.transforms import RandomCrop
from mmseg.registry import TRANSFORMS
from PIL import Image
from streets import CLASSES, AddImage, DropImage, make, write_streets

from mmseg_imbalance import transforms as module
from mmseg_imbalance.draws import DrawnIndex
from mmseg_imbalance.samplers import RareClassSampler
from mmseg_imbalance.transforms import RareClassCrop


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write_streets(tmp_path_factory.mktemp('streets'))


@pytest.fixture
def logged(monkeypatch):
    """What is logged at each level."""
    messages = {}

    def print_log(message, logger, level=20):
        messages.setdefault(level, []).append(message)

    monkeypatch.setattr(module, 'print_log', print_log)
    return messages


@pytest.mark.parametrize('value', [0, -3, 2.5, '9'])
def test_counts_out_of_range_are_refused(value):
    for name in ('min_pixels', 'max_tries'):
        with pytest.raises(ValueError, match=f'{name}={value!r}, allowed are integers from 1'):
            RareClassCrop((8, 8), **{name: value})


def test_they_are_found_by_the_framework_by_plain_and_by_prefixed_name():
    init_default_scope('mmseg')
    for prefix in ('', 'mmseg_imbalance.'):
        crop = TRANSFORMS.build(dict(type=f'{prefix}RareClassCrop', crop_size=(8, 8)))
        assert type(crop) is RareClassCrop


def seed_crops(seed):
    np.random.seed(seed)  # noqa: NPY002  the framework's crops draw from it


def results_of(labels, drawn=None):
    index = 0 if drawn is None else DrawnIndex(0, drawn)
    image = np.repeat(np.arange(labels.size).reshape(*labels.shape, 1), 3, 2)
    return dict(img=image, gt_seg_map=labels, seg_fields=['gt_seg_map'], sample_idx=index)


@pytest.fixture
def count_tries(monkeypatch):
    """Counts the framework's crops."""
    tries = []
    plain = RandomCrop.__dict__['crop_bbox'].func
    monkeypatch.setattr(
        RandomCrop.__dict__['crop_bbox'],
        'func',
        lambda self, results: tries.append(1) or plain(self, results),
    )
    return tries


def first_that_holds(labels, drawn, size, min_pixels, max_tries, **options):
    """Brute force: the framework's crops in their order, each looked up among the sums at all positions."""
    height, width = (min(s, n) for s, n in zip(size, labels.shape, strict=True))
    held = {
        (y, x): sum(labels[r, c] == drawn for r in range(y, y + height) for c in range(x, x + width))
        for y in range(labels.shape[0] - height + 1)
        for x in range(labels.shape[1] - width + 1)
    }
    plain = RandomCrop(size, **options)
    if (labels == drawn).sum() >= min_pixels:
        for tries in range(1, max_tries + 1):
            bbox = plain.crop_bbox(results_of(labels))
            if held[bbox[0], bbox[2]] >= min_pixels:
                return bbox, tries, max(held.values())
    else:
        max_tries = 0
    return plain.crop_bbox(results_of(labels)), max_tries + 1, max(held.values())


@pytest.mark.parametrize('options', [{}, dict(cat_max_ratio=0.8)])
@pytest.mark.parametrize('seed', range(12))
def test_a_crop_is_the_first_try_that_holds_enough_or_a_plain_one(count_tries, seed, options):
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, (13, 17), p=(0.6, 0.35, 0.05)).astype(np.uint8)
    for drawn, min_pixels, max_tries in itertools.product((1, 2), (1, 3, 25, 90), (1, 4)):
        seed_crops(seed)
        bbox, tries, most = first_that_holds(labels, drawn, (7, 5), min_pixels, max_tries, **options)
        del count_tries[:]
        seed_crops(seed)
        got = RareClassCrop((7, 5), min_pixels, max_tries, **options)(results_of(labels, drawn))
        assert (got['gt_seg_map'] == labels[bbox[0] : bbox[1], bbox[2] : bbox[3]]).all()
        assert len(count_tries) == tries <= max_tries + 1
        if most < min_pixels:
            assert tries in (1, max_tries + 1)
        elif tries <= max_tries:
            assert (got['gt_seg_map'] == drawn).sum() >= min_pixels
        assert (
            got['img'][..., 0] == results_of(labels)['img'][bbox[0] : bbox[1], bbox[2] : bbox[3], 0]
        ).all()


def test_a_class_in_one_corner_is_found_far_more_often(count_tries):
    labels = np.zeros((40, 40), np.uint8)
    labels[:6, :6] = 1

    def found(crop):
        seed_crops(0)
        return np.mean([(crop(results_of(labels, 1))['gt_seg_map'] == 1).sum() >= 20 for _ in range(400)])

    plain, rare = found(RandomCrop((25, 25))), found(RareClassCrop((25, 25), 20))
    assert 0 < plain < 0.1
    chance = plain + (1 - plain) * (1 - (1 - plain) ** 10)  # ten tries and a plain crop
    assert rare == pytest.approx(chance, abs=0.08)


def test_an_image_smaller_than_the_crop_is_taken_whole(count_tries):
    labels = np.zeros((5, 6), np.uint8)
    labels[0, :4] = 1
    assert RareClassCrop((8, 8), 4)(results_of(labels, 1))['gt_seg_map'].shape == (5, 6)
    assert RareClassCrop((8, 8), 5)(results_of(labels, 1))['gt_seg_map'].shape == (5, 6)
    assert len(count_tries) == 2


def test_without_a_drawn_class_it_is_a_plain_crop_with_one_warning(logged):
    labels = np.random.default_rng(0).integers(0, 3, (13, 17)).astype(np.uint8)
    crop, plain = RareClassCrop(5, 90, cat_max_ratio=0.4), RandomCrop(5, cat_max_ratio=0.4)
    without_index = results_of(labels)
    del without_index['sample_idx']
    for results in (results_of(labels), without_index, results_of(labels)):
        cropped = []
        for transform in (crop, plain):
            seed_crops(3)
            cropped.append(transform(dict(results))['gt_seg_map'].tolist())
        assert cropped[0] == cropped[1]
    (warning,) = logged[30]
    assert 'RareClassSampler' in warning


def test_a_draw_of_any_image_is_a_plain_crop_without_a_warning(logged):
    labels = np.random.default_rng(0).integers(0, 3, (13, 17)).astype(np.uint8)
    results = results_of(labels) | dict(sample_idx=DrawnIndex(0, None))
    cropped = []
    for transform in (RareClassCrop(5, 1), RandomCrop(5)):
        seed_crops(3)
        cropped.append(transform(dict(results))['gt_seg_map'].tolist())
    assert cropped[0] == cropped[1]
    assert not logged


@pytest.mark.parametrize(
    ('min_pixels', 'ori_shape', 'least'),
    [(40, (30, 40), 20), (41, None, 20), (40, (15, 20), 80), (400, (60, 80), 50)],
)
def test_by_default_a_crop_holds_half_of_what_the_image_does_at_its_size(
    count_tries, min_pixels, ori_shape, least
):
    """`ori_shape` is the size of the file; the labels are 30x40 when they are cropped."""
    for pixels, tries in ((least, 4), (least - 1, 1)):
        labels = np.zeros((30, 40), np.uint8)
        labels.flat[:pixels] = 1
        results = results_of(labels) | dict(sample_idx=DrawnIndex(0, 1, min_pixels))
        if ori_shape is not None:
            results['ori_shape'] = ori_shape
        del count_tries[:]
        RareClassCrop((2, 2), max_tries=3)(results)  # such a crop never holds enough
        assert len(count_tries) == tries


def test_by_default_a_crop_holds_at_least_a_pixel(count_tries):
    results = results_of(np.zeros((30, 40), np.uint8))
    RareClassCrop((8, 8))(results | dict(sample_idx=DrawnIndex(0, 1, 3), ori_shape=(60, 80)))
    assert len(count_tries) == 1


def test_two_images_share_a_crop_where_the_framework_asks_for_it():
    labels = np.zeros((40, 40), np.uint8)
    labels[:6, :6] = 1
    seed_crops(0)
    for kind in (RareClassCrop((25, 25), 20), RandomCrop((25, 25))):  # one must not spoil the other
        for _ in range(3):
            with cache_random_params(kind):
                first, second = (kind(results_of(labels, 1))['img'] for _ in range(2))
            assert (first == second).all()
            if isinstance(kind, RareClassCrop):
                again = [(kind(results_of(labels, 1))['gt_seg_map'] == 1).sum() >= 20 for _ in range(30)]
                assert np.mean(again) > 0.15


@pytest.mark.parametrize(
    'folding', [dict(reduce_zero_label=True), dict(metainfo=dict(classes=CLASSES[::-1]))]
)
def test_labels_are_those_that_training_sees(root, folding):
    dataset = make(root, **folding)
    names = CLASSES[1:] if 'reduce_zero_label' in folding else CLASSES[::-1]
    dataset.pipeline.transforms[1:] = [AddImage(), RareClassCrop((12, 16), 4), DropImage()]
    seed_crops(0)
    sampler = RareClassSampler(
        make(root, **folding), temperature=0.3, uniform=0, min_pixels=16, seed=0, num_workers=0
    )
    enough = Counter()
    for index in itertools.islice(sampler, 300):
        sample = dataset[index]
        raw = np.asarray(Image.open(sample['seg_map_path']))
        assert (raw == CLASSES.index(names[index.class_index])).sum() >= 16
        enough[(sample['gt_seg_map'] == index.class_index).sum() >= 4] += 1
    assert enough[True] > 0.95 * enough.total()
