"""Crops hold the drawn class if a try does; what is pasted is an object of a donor, and nothing else."""

import itertools
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from mmcv.transforms import Resize
from mmcv.transforms.utils import cache_random_params
from mmengine.dataset import pseudo_collate, worker_init_fn
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.datasets import BaseSegDataset, MultiImageMixDataset
from mmseg.datasets.transforms import GenerateEdge, RandomCrop
from mmseg.registry import TRANSFORMS
from PIL import Image
from ranks import on_ranks
from scipy.stats import binomtest, chisquare
from streets import CLASSES, AddImage, DropImage, log_of, make, write_streets
from torch.utils.data import DataLoader

from mmseg_imbalance import transforms as module
from mmseg_imbalance.counting import count_classes
from mmseg_imbalance.draws import DrawnIndex, class_probability, least_pixels
from mmseg_imbalance.samplers import RareClassSampler
from mmseg_imbalance.transforms import RareClassCrop, RareClassPaste


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write_streets(tmp_path_factory.mktemp('streets'))


@pytest.fixture
def logged(monkeypatch):
    return log_of(module, monkeypatch)


@pytest.mark.parametrize('value', [0, -3, 2.5, '9'])
def test_counts_out_of_range_are_refused(value):
    for name in ('min_pixels', 'max_tries'):
        with pytest.raises(ValueError, match=f'{name} must be a whole number, at least 1, got {value!r}'):
            RareClassCrop((8, 8), **{name: value})


def test_they_are_found_by_the_framework_by_plain_and_by_prefixed_name():
    init_default_scope('mmseg')
    for prefix in ('', 'mmseg_imbalance.'):
        crop = TRANSFORMS.build(dict(type=f'{prefix}RareClassCrop', crop_size=(8, 8)))
        assert type(crop) is RareClassCrop
        assert type(TRANSFORMS.build(dict(type=f'{prefix}RareClassPaste'))) is RareClassPaste


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


# Pasting

NAMES = ('ground', 'wall', 'sign')
PLAIN = dict(prob=1, min_pixels=1, scale=(1, 1), max_share=1)


class PlaceDataset(BaseSegDataset):
    METAINFO = {'classes': NAMES, 'palette': [[i, i, i] for i in range(3)]}


def write_places(root, *images):
    """Images (H, W, 3) with their labels (H, W)."""
    for number, (image, labels) in enumerate(images):
        for kind, array in (('img', image), ('ann', labels)):
            (root / kind).mkdir(exist_ok=True)
            Image.fromarray(array).save(root / kind / f'{number:02d}.png')
    return root


def scene_with_a_sign(seed=0):
    """An image of dark colours, and one with a bright sign beside ignored pixels of the brightest."""
    rng = np.random.default_rng(seed)
    dark = [rng.integers(0, 90, (12, 17, 3), dtype=np.uint8) for _ in range(2)]
    labels = [np.zeros((12, 17), np.uint8) for _ in range(2)]
    labels[0][:3] = 1
    labels[0][rng.random((12, 17)) < 0.3] = 255
    sign = np.zeros((12, 17), bool)
    sign[4:8, 9] = sign[7, 9:13] = True  # an L
    labels[1][3:8, 10:12] = 255
    dark[1][3:8, 10:12] = 255
    labels[1][sign] = 2
    dark[1][sign] = rng.integers(150, 200, (sign.sum(), 3))
    return list(zip(dark, labels, strict=True))


def place_config(root, transforms=(), **options):
    return dict(
        type=PlaceDataset,
        data_root=str(root),
        data_prefix=dict(img_path='img', seg_map_path='ann'),
        img_suffix='.png',
        pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), *transforms],
        **options,
    )


def pasting(root, transforms=(), after=(), dataset=None, **options):
    """A data set whose images get a paste."""
    init_default_scope('mmseg')
    paste = dict(type='RareClassPaste', **(PLAIN | options))
    return MultiImageMixDataset(dataset or place_config(root, transforms), [paste, *after])


def all_pastes(image, labels, pixels, mask, label):
    """Each (image, labels) that a paste of an object can make: every place, flipped or not. By loops."""
    height, width = mask.shape
    for flip in (False, True):
        for top in range(labels.shape[0] - height + 1):
            for left in range(labels.shape[1] - width + 1):
                new, new_labels = image.copy(), labels.copy()
                for y in range(height):
                    for x in range(width):
                        there = top + y, left + (width - 1 - x if flip else x)
                        if mask[y, x] and labels[there] != 255:
                            new[there], new_labels[there] = pixels[y, x], label
                yield new, new_labels


def test_what_is_pasted_is_the_object_and_image_and_labels_stay_in_step(tmp_path):
    (image, labels), (other, other_labels) = scene_with_a_sign()
    dataset = pasting(write_places(tmp_path, *scene_with_a_sign()))
    box = slice(4, 8), slice(9, 13)
    mask = other_labels[box] == 2
    possible = list(all_pastes(image[..., ::-1], labels, other[box][..., ::-1], mask, 2))  # BGR, as loaded
    seen = set()
    for seed in range(60):
        seed_crops(seed)
        got = dataset[0]
        fits = [
            at
            for at, (new, new_labels) in enumerate(possible)
            if (got['img'] == new).all() and (got['gt_seg_map'] == new_labels).all()
        ]
        assert fits
        seen.add(fits[0])
        assert 'mix_results' not in got
    assert len(seen) > 35


def test_a_paste_depends_on_the_seed_alone(tmp_path):
    dataset = pasting(write_places(tmp_path, *scene_with_a_sign()), scale=(0.5, 2))
    seed_crops(3)
    first = [dataset[0] for _ in range(4)]
    for again in (dataset, pasting(tmp_path, scale=(0.5, 2))):  # whether it is counted or from the cache
        seed_crops(3)
        for one, other in zip(first, [again[0] for _ in range(4)], strict=True):
            assert (one['img'] == other['img']).all()
            assert (one['gt_seg_map'] == other['gt_seg_map']).all()
    assert any((first[0]['gt_seg_map'] != one['gt_seg_map']).any() for one in first[1:])


def test_it_pastes_as_often_as_it_is_told(tmp_path):
    root = write_places(tmp_path, *scene_with_a_sign())
    (_, labels), _ = scene_with_a_sign()
    for prob in (0, 0.3, 1):
        dataset = pasting(root, prob=prob)
        seed_crops(0)
        pasted = sum((dataset[0]['gt_seg_map'] != labels).any() for _ in range(300))
        assert pasted in (0, 300) if prob in (0, 1) else binomtest(pasted, 300, prob).pvalue > 1e-3
        assert (dataset.pipeline[0].draws is None) == (prob == 0)  # without a paste nothing is counted


def given_donor(labels, pixels=None, drawn=2):
    """Results of an image, 20x30 of ground, with a donor of these labels."""
    image = np.full((*labels.shape, 3), 7, np.uint8) if pixels is None else pixels
    donor = dict(img=image, gt_seg_map=labels, sample_idx=DrawnIndex(1, drawn))
    receiver = dict(img=np.zeros((20, 30, 3), np.uint8), gt_seg_map=np.zeros((20, 30), np.uint8))
    return receiver | dict(seg_fields=['gt_seg_map'], mix_results=[donor])


def paste(results, **options):
    return RareClassPaste(**(PLAIN | options))(results)


def test_a_donor_without_the_class_changes_nothing():
    labels = np.ones((9, 9), np.uint8)
    labels[0] = 255
    got = paste(given_donor(labels))
    assert not got['img'].any()
    assert not got['gt_seg_map'].any()


def test_an_object_is_one_component_of_enough_pixels():
    labels = np.zeros((12, 14), np.uint8)
    labels[1:3, 1:3] = 2  # 4 pixels
    labels[5:8, 2:5] = 2  # 9
    labels[4, 5] = 2  # touches it by a corner: 10
    labels[9:11, 8:14] = 2  # 12
    for min_pixels, sizes in ((1, {4, 10, 12}), (5, {10, 12}), (11, {12}), (13, {0})):
        found = Counter()
        for seed in range(60):
            seed_crops(seed)
            got = paste(given_donor(labels), min_pixels=min_pixels)
            found[int((got['gt_seg_map'] == 2).sum())] += 1
        assert set(found) == sizes
        assert min(found.values()) > 8


def test_in_a_donor_that_was_made_smaller_an_object_needs_fewer_pixels():
    labels = np.zeros((12, 14), np.uint8)
    labels[5:8, 2:5] = 2  # 9 pixels, 36 at twice the height and width
    for factor, min_pixels, pasted in (
        (0.5, 36, 9),
        (0.5, 40, 0),
        (2.0, 3, 0),
        (2.0, 2, 9),
        (None, 9, 9),
        (None, 10, 0),
    ):
        donor = given_donor(labels)
        donor['mix_results'][0]['ori_shape'] = (24, 28)  # of a donor that was cropped as well
        if factor:
            Resize(scale_factor=factor).transform(resized := dict(img=np.zeros((24, 28, 3), np.uint8)))
            donor['mix_results'][0]['scale_factor'] = resized['scale_factor']
        assert (paste(donor, min_pixels=min_pixels)['gt_seg_map'] == 2).sum() == pasted


@pytest.mark.parametrize(('scale', 'factor'), [((0.5, 0.5), 0.5), ((1, 1), 1), ((1.5, 1.5), 1.5)])
def test_an_object_is_scaled(scale, factor):
    labels = np.zeros((12, 14), np.uint8)
    labels[2:10, 1:11] = 2
    got = paste(given_donor(labels), scale=scale)
    rows, columns = np.nonzero(got['gt_seg_map'])
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (8 * factor, 10 * factor)
    assert len(rows) == 80 * factor**2


def test_an_object_that_is_too_large_is_made_smaller():
    labels = np.full((200, 150), 2, np.uint8)
    for max_share in (0.02, 0.1, 1):
        got = paste(given_donor(labels), max_share=max_share, scale=(1, 3))
        covered = (got['gt_seg_map'] == 2).mean()
        assert 0.7 * min(max_share, 0.5) < covered <= max_share * 1.1


@pytest.mark.parametrize('channels', [0, 1, 3, 7])
@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
def test_images_of_any_number_of_channels_keep_their_kind(channels, dtype):
    labels = np.zeros((12, 14), np.uint8)
    labels[2:10, 1:11] = 2
    shape = (channels,) if channels else ()
    results = given_donor(labels, np.full((12, 14, *shape), 9, dtype))
    results['img'] = np.zeros((20, 30, *shape), dtype)
    for factor in (0.6, 1, 1.4):
        got = paste(dict(results), scale=(factor, factor))
        assert (got['img'].dtype, got['img'].shape) == (dtype, (20, 30, *shape))
        assert (got['img'][got['gt_seg_map'] == 2] == 9).all()
        assert not got['img'][got['gt_seg_map'] != 2].any()


LABELS = st.sampled_from([0, 1, 2, 255])


@given(
    arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=14), elements=LABELS),
    arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=14), elements=LABELS),
    st.floats(0.2, 4),
    st.integers(0, 99),
)
def test_the_labels_change_by_the_pasted_pixels_alone(labels, other, factor, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(100, 150, (*other.shape, 3), dtype=np.uint8)
    pixels[other != 2] = 255  # nothing of these may be seen
    image = rng.integers(0, 90, (*labels.shape, 3), dtype=np.uint8)
    results = given_donor(other, pixels) | dict(img=image, gt_seg_map=labels)
    before = image.copy(), labels.copy(), pixels.copy(), other.copy()
    seed_crops(seed)
    got = paste(dict(results), scale=(factor, factor))
    pasted = (got['img'] != image).any(axis=-1)
    assert (labels[pasted] != 255).all()
    assert (got['gt_seg_map'][pasted] == 2).all()
    assert (got['gt_seg_map'][~pasted] == labels[~pasted]).all()
    assert (got['img'][pasted] >= 100).all()
    assert (got['img'][pasted] < 150).all()
    histograms = [np.bincount(x.ravel(), minlength=256) for x in (labels, labels[pasted], got['gt_seg_map'])]
    histograms[0][2] += pasted.sum()
    assert (histograms[0] - histograms[1] == histograms[2]).all()
    for kept, given_array in zip(before, (image, labels, pixels, other), strict=True):
        assert (kept == given_array).all()  # nothing is written over


# Donors


def donors(dataset, number, **options):
    step = RareClassPaste(**(PLAIN | options))
    seed_crops(0)
    return [index for _ in range(number) for index in step.get_indices(dataset)]


def test_donors_are_drawn_by_class_then_among_the_images_that_hold_enough(root):
    dataset = make(root)
    counts = np.array([[(x['gt_seg_map'] == c).sum() for c in range(5)] for x in dataset])
    least = least_pixels(counts)
    drawn = donors(dataset, 6000, temperature=0.3)
    times = Counter(index.class_index for index in drawn)
    want = class_probability(counts.sum(0) / counts.sum(), 0.3, np.ones(5, bool))
    assert chisquare([times[c] for c in range(5)], 6000 * want).pvalue > 1e-3
    for c in range(5):
        images = Counter(int(index) for index in drawn if index.class_index == c)
        enough = np.flatnonzero(counts[:, c] >= least[c])
        assert set(images) == set(enough)
        assert chisquare([images[i] for i in enough]).pvalue > 1e-3


def test_only_the_classes_that_are_named_are_pasted(root):
    drawn = donors(make(root), 300, classes=['car', 'pole'], temperature=9)
    assert {index.class_index for index in drawn} == {CLASSES.index('car'), CLASSES.index('pole')}
    with pytest.raises(ValueError, match=r"classes of RareClassPaste names \['van'\].*'road'"):
        donors(make(root), 1, classes=['car', 'van'])


def test_a_class_that_no_image_holds_cannot_be_pasted(tmp_path):
    (image, labels), _ = scene_with_a_sign()
    dataset = pasting(write_places(tmp_path, (image, labels)), classes=['sign'])
    with pytest.raises(ValueError, match=r"nothing to paste: no image holds a pixel of \['sign'\]"):
        dataset[0]


def test_a_crop_of_the_donor_looks_for_the_class_and_that_of_the_image_does_not(tmp_path, logged):
    """The data set inside crops both; the donor's index says which class."""
    rng = np.random.default_rng(0)
    image, labels = rng.integers(0, 90, (60, 60, 3), dtype=np.uint8), np.zeros((60, 60), np.uint8)
    labels[:3, :3], labels[30:, 30:] = 2, 1
    root = write_places(tmp_path, (image, labels))
    pasted = {}
    for kind in ('RandomCrop', 'RareClassCrop'):
        dataset = pasting(root, [dict(type=kind, crop_size=(30, 30))], classes=['sign'])
        seed_crops(0)
        pasted[kind] = sum((dataset[DrawnIndex(0, None)]['gt_seg_map'] == 2).any() for _ in range(200))
    assert pasted['RareClassCrop'] > 2 * pasted['RandomCrop'] > 0
    assert not logged


def test_wrapped_data_sets_hand_on_the_class(tmp_path, logged):
    inner = place_config(write_places(tmp_path, *scene_with_a_sign()))
    nested = dict(type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[inner, inner]))
    dataset = pasting(None, dataset=nested)
    assert all((dataset[index]['gt_seg_map'] == 2).any() for index in range(8))
    assert not logged


def test_a_donor_without_a_drawn_class_pastes_nothing_with_one_warning(logged):
    step = RareClassPaste(**PLAIN)
    for _ in range(2):
        results = given_donor(np.full((4, 4), 2, np.uint8))
        results['mix_results'][0]['sample_idx'] = 1
        assert not step(results)['gt_seg_map'].any()
    (warning,) = logged[30]
    assert 'a donor comes without a drawn class' in warning


@pytest.mark.parametrize(('missing', 'words'), [('mix_results', 'no mix_results'), ('img', 'no img')])
def test_a_place_where_it_cannot_paste_is_refused(missing, words):
    results = given_donor(np.full((4, 4), 2, np.uint8))
    del results[missing]
    with pytest.raises(
        ValueError, match=f'finds {words}. It belongs in the pipeline of a MultiImageMixDataset'
    ):
        paste(results)


def test_other_maps_of_an_image_are_refused():
    results = given_donor(np.full((4, 4), 2, np.uint8)) | dict(seg_fields=['gt_seg_map', 'gt_depth_map'])
    with pytest.raises(ValueError, match=r"cannot paste into \['gt_depth_map'\]"):
        paste(results)
    # MMSegmentation does not list edges among the fields
    edges = GenerateEdge()(given_donor(np.full((4, 4), 2, np.uint8)) | dict(img_shape=(20, 30)))
    with pytest.raises(ValueError, match=r"cannot paste into \['gt_edge_map'\]"):
        paste(edges)


@pytest.mark.parametrize(
    ('option', 'words'),
    [
        (dict(prob=1.1), 'prob=1.1, allowed are numbers from 0 to 1'),
        (dict(prob=None), 'prob=None, allowed are'),
        (dict(temperature=0), 'temperature=0, allowed are finite numbers above 0'),
        (dict(min_pixels=0), 'min_pixels must be a whole number, at least 1, got 0'),
        (dict(scale=(1.5, 0.5)), r'scale=\(1.5, 0.5\), allowed are two finite numbers'),
        (dict(scale=2), 'scale=2, allowed are two finite numbers'),
        (dict(max_share=0), 'max_share=0, allowed are numbers above 0 and at most 1'),
        (dict(classes='pole'), "classes='pole', allowed are names of classes"),
        (dict(classes=8), 'classes=8, allowed are names of classes'),
        (dict(classes=[]), r'classes=\[\], allowed are names of classes'),
    ],
)
def test_options_out_of_range_are_refused(option, words):
    with pytest.raises(ValueError, match=words):
        RareClassPaste(**option)


# Ignored labels, counts, workers


def test_the_ignored_label_is_that_of_the_data_set_unless_another_is_given(tmp_path):
    scenes = [(image, np.where(labels == 255, 9, labels)) for image, labels in scene_with_a_sign()]
    root = write_places(tmp_path, *[(image, labels.astype(np.uint8)) for image, labels in scenes])
    for said, given_label in ((9, None), (255, 9)):
        dataset = pasting(None, dataset=place_config(root, ignore_index=said), ignore_index=given_label)
        for seed in range(20):
            seed_crops(seed)
            got = dataset[0]
            assert ((got['gt_seg_map'] == 9) == (scenes[0][1] == 9)).all()
    with pytest.raises(ValueError, match=r'ignore_index=9 .* and ignore_index=7'):
        pasting(None, dataset=place_config(root, ignore_index=9), ignore_index=7)[0]


def test_counts_are_of_the_annotations_as_they_are_and_kept_once(tmp_path):
    root = write_places(tmp_path, *scene_with_a_sign())
    dataset = pasting(root, cache_dir=tmp_path / 'counts')
    before = count_classes(dataset, cache_dir=tmp_path / 'counts', per_image=True)
    dataset[0]
    assert len(list((tmp_path / 'counts').iterdir())) == 1
    assert before.pixels.tolist() == [
        sum((labels == c).sum() for _, labels in scene_with_a_sign()) for c in range(3)
    ]


def batches_of(root, cache, workers):
    """Labels of an epoch, loaded by workers that are seeded as MMEngine seeds them."""
    dataset = pasting(root, cache_dir=cache)
    loader = DataLoader(
        dataset,
        batch_size=1,
        num_workers=workers,
        collate_fn=pseudo_collate,
        worker_init_fn=partial(worker_init_fn, num_workers=workers, rank=0, seed=5),
    )
    return [batch['gt_seg_map'][0].tolist() for batch in loader]


def test_workers_count_once_and_paste_the_same_whether_counts_are_kept_or_not(tmp_path):
    root = write_places(tmp_path, *scene_with_a_sign(), *scene_with_a_sign(1))
    counted = batches_of(root, tmp_path / 'counts', 2)
    (path,) = (tmp_path / 'counts').iterdir()
    written = path.stat().st_ino
    assert batches_of(root, tmp_path / 'counts', 2) == counted
    assert path.stat().st_ino == written
    assert batches_of(root, None, 2) == counted
    assert all(2 in np.unique(labels) for labels in counted)


def loaded_on_a_rank(root, cache):
    return batches_of(root, cache, 2), batches_of(root, cache, 0)


@pytest.mark.slow
def test_workers_of_a_rank_do_not_wait_for_other_ranks(tmp_path):
    """One that took part in what the ranks do together would hang."""
    root = write_places(tmp_path, *scene_with_a_sign())
    for (by_workers, _), rank in zip(
        on_ranks(2, loaded_on_a_rank, root, tmp_path / 'counts'), '01', strict=True
    ):
        assert len(by_workers) == 2, rank
    assert len(list((tmp_path / 'counts').iterdir())) == 1


# Through a runner


class SeeBatches(Hook):
    def __init__(self):
        self.labels, self.paths = [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        for sample in data_batch['data_samples']:
            self.labels.append(sample.gt_sem_seg.data.clone())
            self.paths.append(sample.img_path)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_training_sees_pasted_images_and_weights_of_the_annotations(small_config, tmp_path, workers):
    def run(name, **options):
        config = 'segformer/segformer_mit-b0-small-combined_1xb8-2k_longtail-cityscapes-256x128'
        cfg = small_config(config, experiment_name=f'{tmp_path.name}-{name}')
        cfg.work_dir = str(tmp_path / name)
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
        loader = cfg.train_dataloader
        loader.update(num_workers=workers, persistent_workers=workers > 0)
        *steps, pack = loader.dataset.pipeline
        for step in steps:
            if step.type == 'RandomCrop':
                step.update(type='RareClassCrop', min_pixels=1)
        loader.dataset.pipeline = steps
        mixed = [
            dict(type='RareClassPaste', min_pixels=1, cache_dir=str(tmp_path / 'counts'), **options),
            pack,
        ]
        loader.dataset = dict(type='MultiImageMixDataset', dataset=loader.dataset, pipeline=mixed)
        cfg.train_cfg.max_iters = 4
        cfg.default_hooks.logger.interval = 1
        runner, seen = Runner.from_cfg(cfg), SeeBatches()
        runner.register_hook(seen)
        runner.train()
        log = Path(runner._log_dir, f'{runner.timestamp}.log').read_text()
        assert 'hardly what was counted' not in log
        weights = runner.message_hub.get_info('class_weights')['weights']
        runner._train_loop = None  # the workers end here
        return seen, weights

    (plain, without), (pasted, weights), (again, _) = (
        run('plain', prob=0),
        run('one', prob=1),
        run('two', prob=1),
    )
    assert weights == without
    rarest = np.argmax(weights)
    held = [sum((labels == rarest).any() for labels in seen.labels) for seen in (plain, pasted)]
    assert held[0] < held[1]
    assert all((a == b).all() for a, b in zip(pasted.labels, again.labels, strict=True))
    assert pasted.paths == plain.paths == again.paths
    assert len(list((tmp_path / 'counts').iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize('hooks', [[], [dict(type='RunHook')]])
def test_a_head_that_ignores_another_label_is_refused(hooks, small_config, tmp_path):
    cfg = small_config('segformer/segformer_mit-b0-small-combined_1xb8-2k_longtail-cityscapes-256x128')
    *steps, pack = cfg.train_dataloader.dataset.pipeline
    cfg.train_dataloader.dataset.pipeline = steps
    cfg.train_dataloader.dataset = dict(
        type='MultiImageMixDataset',
        dataset=cfg.train_dataloader.dataset,
        pipeline=[dict(type='RareClassPaste', prob=1.0), pack],
    )
    cfg.model.decode_head.ignore_index = 3
    cfg.custom_hooks = hooks
    runner = Runner.from_cfg(cfg)
    with pytest.raises(ValueError, match=r'RareClassPaste has counted .*=255, but training ignores 3'):
        runner.train()


def test_an_object_of_just_min_pixels_is_pasted():
    labels = np.zeros((12, 14), np.uint8)
    labels[1:3, 1:3] = 2
    assert (paste(given_donor(labels), min_pixels=4)['gt_seg_map'] == 2).sum() == 4
