"""The components of label maps, and small ones taken by the class around them, against loops over pixels."""

from collections import Counter

from mmseg_imbalance.registry import MODELS

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mmengine.model import BaseModel
from mmengine.runner.checkpoint import load_state_dict
from mmengine.structures import PixelData
from mmseg.models import SegTTAModel
from mmseg.structures import SegDataSample
from scipy import ndimage

from mmseg_imbalance.components import SmallRegionRemover, components, remove_small

maps = st.tuples(st.integers(1, 11), st.integers(1, 13), st.sampled_from([np.uint8, np.int64])).flatmap(
    lambda drawn: arrays(drawn[2], drawn[:2], elements=st.sampled_from([0, 3, 7, 200]))
)

STEADY = settings(derandomize=True, deadline=None)


def pixels_of_components(labels):
    """Sets of (row, column), by SciPy."""
    found = []
    for value in sorted(set(labels.flat)):
        ids, count = ndimage.label(labels == value, structure=np.ones((3, 3)))
        found += [set(zip(*map(list, np.nonzero(ids == i)), strict=True)) for i in range(1, count + 1)]
    return [{(int(y), int(x)) for y, x in pixels} for pixels in found]


def ring(pixels, shape):
    around = {(y + dy, x + dx) for y, x in pixels for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    return {(y, x) for y, x in around - pixels if 0 <= y < shape[0] and 0 <= x < shape[1]}


def removed_by_loops(labels, area):
    labels = labels.copy()
    while True:
        changed = set()
        small = [pixels for pixels in pixels_of_components(labels) if len(pixels) < area]
        for pixels in sorted(small, key=lambda pixels: (len(pixels), min(pixels))):
            border = ring(pixels, labels.shape)
            if not border or border & changed:
                continue
            votes = Counter(int(labels[at]) for at in border)
            winner = min(value for value in votes if votes[value] == max(votes.values()))
            for at in pixels:
                labels[at] = winner
            changed |= pixels
        if not changed:
            return labels


@STEADY
@given(maps)
def test_components_are_scipys(labels):
    ids, areas, values = components(labels)
    assert (ids.dtype, areas.dtype, values.dtype) == (np.int32, np.int64, labels.dtype)
    assert sorted(set(ids.flat)) == list(range(len(areas)))
    ours = [set(zip(*map(list, np.nonzero(ids == i)), strict=True)) for i in range(len(areas))]
    assert sorted(map(sorted, ours)) == sorted(map(sorted, pixels_of_components(labels)))
    assert areas.tolist() == [len(pixels) for pixels in ours]
    assert np.array_equal(values[ids], labels)


@pytest.mark.parametrize('labels', [2, 19, 300])
@pytest.mark.parametrize('cell', [1, 7])
def test_components_of_noise_and_of_large_regions_are_scipys(labels, cell):
    """Those of noise of few labels are found in another way; columns first in memory change nothing."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, labels, (12, 14)).astype(np.uint16)
    drawn = np.kron(small, np.ones((cell, cell), np.uint16))
    for labels in (drawn, np.asfortranarray(drawn), drawn[:, ::2]):
        test_components_are_scipys.hypothesis.inner_test(labels)


def test_a_component_may_wind_through_the_whole_map():
    spiral = np.zeros((41, 41), np.uint8)
    for ring in range(0, 20, 2):
        spiral[ring, ring : -ring or None] = spiral[ring : -ring or None, -1 - ring] = 1
        spiral[-1 - ring, ring : -ring or None] = spiral[ring + 2 : -ring or None, ring] = 1
        spiral[ring + 2, ring : ring + 3] = 1
    _, areas, values = components(spiral)
    assert areas[values == 1].sum() == spiral.sum()
    assert (values == 1).sum() == ndimage.label(spiral, structure=np.ones((3, 3)))[1]


@STEADY
@given(maps, st.integers(0, 20))
def test_removal_equals_loops_over_pixels(labels, area):
    before = labels.copy()
    ours = remove_small(labels, area)
    assert np.array_equal(labels, before)
    assert not np.shares_memory(ours, labels)
    assert ours.dtype == labels.dtype
    assert np.array_equal(ours, removed_by_loops(labels, area))


@STEADY
@given(maps, st.integers(0, 20))
def test_nothing_small_is_left_and_large_components_keep_every_pixel(labels, area):
    ours = remove_small(labels, area)
    areas = components(ours)[1]
    assert len(areas) == 1 or areas.min() >= area
    assert np.array_equal(remove_small(ours, area), ours)
    large = [pixels for pixels in pixels_of_components(labels) if len(pixels) >= area]
    for at in set().union(*large):
        assert ours[at] == labels[at]


@pytest.mark.parametrize('area', [0, 1])
def test_a_single_pixel_is_not_below_one(area):
    labels = np.random.default_rng(0).integers(0, 5, (17, 19))
    assert np.array_equal(remove_small(labels, area), labels)


def of(*rows):
    return np.array([[int(c) for c in row] for row in rows])


@pytest.mark.parametrize(
    ('area', 'before', 'after'),
    [
        # five of the eight pixels around are 1
        (2, of('1100', '1200', '1111'), of('1100', '1100', '1111')),
        # a diagonal is one component of three pixels
        (3, of('21111', '12111', '11211', '11111'), of('21111', '12111', '11211', '11111')),
        (4, of('21111', '12111', '11211', '11111'), of('11111', '11111', '11111', '11111')),
        # a tie goes to the smaller class, on either side
        (5, of('00055111', '00055111'), of('00000111', '00000111')),
        (5, of('11155000', '11155000'), of('11100000', '11100000')),
        # neighbours of one size never swap: the first by rows joins the second
        (2, of('12'), of('22')),
        (3, of('21', '21'), of('11', '11')),
        # the smallest first: 2 joins 3, which is then as large as asked, or not yet
        (3, of('2311', '1311', '1111'), of('3311', '1311', '1111')),
        (4, of('2311', '1311', '1111'), of('1111', '1111', '1111')),
        # one component is left alone, however small
        (2, of('3'), of('3')),
        (99, of('33', '33'), of('33', '33')),
    ],
)
def test_removal_by_hand(area, before, after):
    assert np.array_equal(removed_by_loops(before, area), after)
    assert np.array_equal(remove_small(before, area), after)


def test_what_is_no_label_map_is_refused():
    for labels in (np.zeros((1, 4, 5), np.uint8), np.zeros((4, 5)), np.zeros((4, 5), bool)):
        with pytest.raises(ValueError, match=r'\(H, W\) integers.*got'):
            remove_small(labels, 3)
    for area in (0, -3, 2.0, '5', None, True):
        with pytest.raises(ValueError, match=f'at least 1, got {area!r}'):
            SmallRegionRemover(Painter(), area)


class Painter(BaseModel):
    """A segmentor of one parameter that predicts the maps it was given."""

    out_channels = 3

    def __init__(self, *maps, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.backbone = torch.nn.Linear(1, 1)
        self.maps = maps

    def forward(self, inputs, data_samples=None, mode='tensor'):
        raise NotImplementedError

    def test_step(self, data):
        samples = [SegDataSample(metainfo=dict(img_path=f'{i}.png')) for i in range(len(self.maps))]
        for sample, labels in zip(samples, self.maps, strict=True):
            logits = (torch.arange(3)[:, None, None] == labels) * 9.0
            sample.seg_logits = PixelData(data=logits)
            sample.pred_sem_seg = PixelData(data=labels)
            sample.gt_sem_seg = PixelData(data=labels.clone())
        return samples


def random_maps(count, classes=3, dtype=torch.int64):
    return torch.randint(classes, (count, 1, 13, 17), generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(
    ('dtype', 'classes'),
    [(torch.int64, 3), (torch.uint8, 3), (torch.float32, 2), (torch.float16, 2), (torch.bfloat16, 2)],
)
def test_every_prediction_of_a_batch_is_cleaned_and_nothing_else(dtype, classes):
    maps = random_maps(3, classes, dtype)  # binary heads predict 0 and 1 in the dtype of the logits
    plain = Painter(*maps.clone()).test_step(None)
    cleaned = SmallRegionRemover(Painter(*maps), area=6).test_step(None)
    assert len(cleaned) == 3
    for before, after in zip(plain, cleaned, strict=True):
        expected = remove_small(before.pred_sem_seg.data[0].long().numpy(), 6)
        assert after.pred_sem_seg.data.dtype == dtype
        assert torch.equal(after.pred_sem_seg.data[0].long(), torch.from_numpy(expected))
        assert not torch.equal(after.pred_sem_seg.data, before.pred_sem_seg.data)
        assert torch.equal(after.seg_logits.data, before.seg_logits.data)
        assert torch.equal(after.gt_sem_seg.data, before.gt_sem_seg.data)
        assert after.metainfo == before.metainfo


def nested(augmented, *maps, **options):
    MODELS.register_module(module=Painter, force=True)
    model = dict(type='Painter')
    if augmented:
        model = dict(type='mmseg.SegTTAModel', module=model)
    remover = MODELS.build(dict(type='SmallRegionRemover', module=model, area=6, **options))
    remover.module.maps = maps
    return remover


@pytest.mark.parametrize('augmented', [False, True])
def test_the_same_checkpoint_loads_strictly_with_and_without_augmentation(augmented):
    checkpoint = Painter().state_dict()
    remover = nested(augmented)
    load_state_dict(remover, checkpoint, strict=True)
    assert isinstance(remover.module, Painter)  # what a hook that unwraps models comes to
    for name, value in remover.module.state_dict().items():
        assert torch.equal(value, checkpoint[name])


def test_merged_predictions_of_augmentation_are_cleaned_after_the_merge():
    maps = random_maps(2)
    data = dict(inputs=[None, None])  # two augmentations of two images
    augmented = SegTTAModel(Painter(*maps)).test_step(data)
    cleaned = nested(True, *maps).test_step(data)
    for before, after in zip(augmented, cleaned, strict=True):
        expected = remove_small(before.pred_sem_seg.data[0].numpy(), 6)
        assert np.array_equal(after.pred_sem_seg.data[0].numpy(), expected)
        assert not np.array_equal(expected, before.pred_sem_seg.data[0].numpy())


@pytest.mark.parametrize('augmented', [False, True])
def test_the_runners_data_preprocessor_reaches_a_segmentor_that_has_none(augmented):
    common = dict(type='mmseg.SegDataPreProcessor', mean=[1.0], std=[1.0])
    assert nested(augmented, data_preprocessor=common).module.data_preprocessor.mean.item() == 1
    model = dict(type='Painter', data_preprocessor=dict(common, mean=[2.0]))
    remover = SmallRegionRemover(model, 6, data_preprocessor=common)
    assert remover.module.data_preprocessor.mean.item() == 2
