"""Counts are of the labels that training sees, whatever loads them and changes them in the pipeline."""

import importlib
import inspect
import json
import logging
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform, Compose, LoadImageFromFile, RandomApply, RandomChoice, Resize
from mmengine.config import Config
from mmengine.dataset import ConcatDataset, RepeatDataset
from mmengine.logging import MessageHub
from mmengine.registry import DATASETS, TRANSFORMS
from mmengine.runner import Runner
from mmseg.datasets import BaseSegDataset, MultiImageMixDataset
from mmseg.datasets.transforms import (
    LoadAnnotations,
    LoadBiomedicalAnnotation,
    LoadBiomedicalData,
    PackSegInputs,
    PhotoMetricDistortion,
    RandomCrop,
    RandomFlip,
)
from PIL import Image
from torch.utils.data import DataLoader

from mmseg_imbalance.commands import class_weights
from mmseg_imbalance.counting import count_classes, label_steps, training_frequency, transforms
from mmseg_imbalance.decisions import LogitAdjustmentHook
from mmseg_imbalance.hooks import ClassWeightHook
from mmseg_imbalance.losses import WeightedCrossEntropyLoss
from mmseg_imbalance.samplers import RareClassSampler

NAMES = ('background', 'tumour', 'vessel')


@pytest.fixture
def root(tmp_path):
    """Five masks with the values 0 to 5 and 255, and images of the same size."""
    numbers = np.random.default_rng(0)
    for name in ('img', 'ann'):
        (tmp_path / name).mkdir()
    for at in range(5):
        labels = numbers.choice([0, 1, 2, 3, 5, 255], (12 + at, 17)).astype(np.uint8)
        Image.fromarray(labels).save(tmp_path / 'ann' / f'{at}.png')
        Image.fromarray(numbers.integers(0, 256, (12 + at, 17, 3), np.uint8)).save(
            tmp_path / 'img' / f'{at}.jpg'
        )
    return tmp_path


def make(root, pipeline, classes=NAMES, **options):
    options = {'data_prefix': {'img_path': 'img', 'seg_map_path': 'ann'}} | options
    return BaseSegDataset(data_root=str(root), metainfo={'classes': classes}, pipeline=pipeline, **options)


def seen(dataset):
    """Pixels of each class as packed for training."""
    packed = [dataset[at]['data_samples'].gt_sem_seg.data.numpy().ravel() for at in range(len(dataset))]
    labels = np.concatenate(packed)
    return np.bincount(labels[labels != 255], minlength=len(dataset.metainfo['classes'])).tolist()


def counted(dataset, **options):
    return count_classes(dataset, **options).pixels.tolist()


class Merge(BaseTransform):
    """Values 3 and 5 become 2."""

    def transform(self, results):
        labels = results['gt_seg_map']
        results['gt_seg_map'] = np.where(np.isin(labels, (3, 5)), 2, labels)
        return results


class MergeInPlace(BaseTransform):
    def transform(self, results):
        results['gt_seg_map'][np.isin(results['gt_seg_map'], (3, 5))] = 2
        return results


class MergeByFields(BaseTransform):
    """As transforms of MMSegmentation do it, from a table that it holds."""

    def __init__(self):
        self.table = np.arange(256)
        self.table[[3, 5]] = 1, 255

    def transform(self, results):
        for key in results['seg_fields']:
            results[key] = self.table[results[key]]
        return results


def as_tensor(results):
    results['gt_seg_map'] = torch.from_numpy(results['gt_seg_map']).float()
    return results


class Drop(BaseTransform):
    """No image without much of class 2 is for training."""

    def transform(self, results):
        return None if (results['gt_seg_map'] == 2).sum() < 110 else results


class WithImage(BaseTransform):
    """Values 3 and 5 become 2; asks for the image."""

    def transform(self, results):
        results['gt_seg_map'][results['img'].shape[0] :] = 0
        return Merge()(results)


def as_array(results):
    return {**results, 'gt_seg_map': results['gt_seg_map'].numpy()}


LABELS = {
    'replaced': lambda: [LoadAnnotations(), Merge()],
    'in place': lambda: [LoadAnnotations(), MergeInPlace()],
    'by fields': lambda: [LoadAnnotations(), MergeByFields()],
    'a function': lambda: [LoadAnnotations(), Merge(), lambda results: results],
    'one after another': lambda: [LoadAnnotations(), Merge(), as_tensor, as_array],
    'in a sequence': lambda: [Compose([LoadAnnotations(), Compose([Merge()])])],
    'in a wrapper': lambda: [LoadAnnotations(), RandomApply([Merge()], prob=1.0)],
    'in either branch': lambda: [LoadAnnotations(), RandomChoice([[Merge()], [MergeInPlace()]])],
}


@pytest.mark.parametrize('case', LABELS)
@pytest.mark.parametrize('reduce_zero_label', [False, True])
def test_a_transform_that_changes_labels_is_run(root, warned, case, reduce_zero_label):
    options = {'reduce_zero_label': reduce_zero_label, 'classes': (*NAMES, 'bone', 'skin')}
    dataset = make(root, [*LABELS[case](), PackSegInputs()], **options)
    for path in (root / 'img').iterdir():
        path.write_bytes(b'')  # not read
    assert counted(make(root, [*LABELS[case](), PackSegInputs()], **options)) == seen(dataset)
    assert warned == []


def test_known_transforms_are_not_run_and_not_named(root, warned):
    geometry = [LoadImageFromFile(), LoadAnnotations(), Resize(scale=(8, 8)), RandomFlip(prob=0.5)]
    rest = [RandomCrop((4, 4)), PhotoMetricDistortion(), RandomApply([RandomFlip(prob=1.0)]), PackSegInputs()]
    dataset = make(root, [*geometry, Merge(), *rest])
    assert counted(dataset) == seen(make(root, [LoadAnnotations(), Merge(), PackSegInputs()]))
    assert warned == []
    for path in (root / 'img').iterdir():
        path.unlink()
    dataset = make(
        root, [*geometry, *rest], ann_file=str(root / 'list.txt'), classes=range(6), lazy_init=True
    )
    (root / 'list.txt').write_text('0\n3\n')
    plain = make(
        root, [LoadAnnotations(), PackSegInputs()], ann_file=str(root / 'list.txt'), classes=range(6)
    )
    assert counted(dataset) == seen(plain)
    assert warned == []


def test_every_transform_of_the_stack_is_known():
    """A new one of another version is tried as a user's would be."""
    known = transforms.KEEP_LABELS | transforms.IMAGE_LOADERS
    stack = {
        name
        for registry in (TRANSFORMS, *TRANSFORMS.children.values())
        for name, kind in registry.module_dict.items()
        if inspect.isclass(kind) and kind.__module__.startswith(('mmcv.', 'mmseg.'))
    }
    loaders = {'LoadAnnotations', 'LoadBiomedicalAnnotation', 'LoadBiomedicalData', 'LoadOneDLAnnotations'}
    assert stack
    assert stack - loaders <= known
    assert not loaders & known


class Added(BaseTransform):
    """A user's transform in a copy of MMSegmentation, as its tutorial says."""

    transform = Merge.transform


Added.__module__ = 'mmseg.datasets.transforms.transforms'


def test_a_transform_added_to_a_copy_of_mmsegmentation_is_not_taken_for_one_of_its_own(root, warned):
    assert counted(make(root, [LoadAnnotations(), Added()])) == seen(
        make(root, [LoadAnnotations(), Added(), PackSegInputs()])
    )


class Half(BaseTransform):
    """Draws from every source of random numbers, and from one of its own."""

    def __init__(self):
        self.own = np.random.default_rng(0)

    def transform(self, results):
        draws = random.random(), np.random.rand(), torch.rand(1).item(), self.own.random()  # noqa: NPY002  as transforms of users do
        results['gt_seg_map'][results['gt_seg_map'] != 255] = 0
        for at, draw in enumerate(draws):
            results['gt_seg_map'][at, : int(17 * draw)] = 1
        return results


def test_random_transforms_count_the_same_every_time_and_training_draws_as_without(root):
    dataset = RepeatDataset(make(root, [LoadAnnotations(), Half()]), times=2)
    states = (
        random.getstate(),
        torch.random.get_rng_state().tolist(),
        dataset.dataset.pipeline.transforms[1].own,
    )
    own = states[2].bit_generator.state
    first = counted(dataset)
    per_image = count_classes(dataset).counts[:, 1].tolist()
    assert len(set(per_image)) > 1  # images do not share their draws
    assert first == counted(dataset) == counted(dataset, num_workers=2)
    assert (random.getstate(), torch.random.get_rng_state().tolist()) == states[:2]
    assert states[2].bit_generator.state == own


def test_an_image_that_the_pipeline_drops_is_not_counted_and_a_warning_says_how_many(root, warned):
    def pipeline():
        return [LoadAnnotations(), Merge(), Drop(), PackSegInputs()]

    left = [
        at for at in range(5) if make(root, pipeline()).pipeline(make(root, []).get_data_info(at)) is not None
    ]
    assert 0 < len(left) < 5
    assert counted(make(root, pipeline())) == seen(make(root, pipeline(), indices=left))
    assert 'Drop returns None, so training takes another image' in warned[0]
    assert f'({5 - len(left)} files' in warned[0]


@pytest.mark.parametrize('order', [(0, 1, 2), (0, 1, 3), (0, 1, 4)])
def test_what_needs_the_image_is_named_with_the_option_that_runs_it(root, warned, order):
    steps = [
        LoadImageFromFile(),
        LoadAnnotations(),
        WithImage(),
        Compose([WithImage()]),
        RandomApply([WithImage()], 1.0),
    ]
    pipeline = [*(steps[at] for at in order), PackSegInputs()]
    classes = tuple(f'class {at}' for at in range(6))
    before = seen(make(root, [LoadAnnotations(), PackSegInputs()], classes))
    assert counted(make(root, pipeline, classes)) == before
    (message,) = warned
    for part in (
        'WithImage',
        "KeyError: 'img'",
        'counted as they are before',
        "label_transforms=('WithImage',)",
    ):
        assert part in message
    warned.clear()
    assert counted(make(root, pipeline, classes), label_transforms=()) == before
    truth = seen(make(root, pipeline, classes))
    assert truth != before
    for names in (('WithImage',), ['WithImage'], 'WithImage'):
        assert counted(make(root, pipeline, classes), label_transforms=names) == truth
    assert counted(make(root, pipeline, classes), label_transforms=['WithImage'], num_workers=1) == truth
    assert warned == []


class IfImage(BaseTransform):
    """Does nothing, without a word, where there is no image."""

    def transform(self, results):
        return Merge()(results) if results.get('img') is not None else results


def test_what_does_otherwise_with_the_image_is_found_by_looking_at_one(root, warned):
    pipeline = [LoadImageFromFile(), LoadAnnotations(), IfImage(), PackSegInputs()]
    classes = tuple(f'class {at}' for at in range(6))
    before = seen(make(root, [LoadAnnotations(), PackSegInputs()], classes))
    assert counted(make(root, pipeline, classes)) == before
    assert 'IfImage (its labels depend on the image)' in warned.pop()
    truth = seen(make(root, pipeline, classes))
    assert counted(make(root, pipeline, classes), label_transforms=['IfImage']) == truth
    assert warned == []


def test_one_warning_names_all_of_all_data_sets(root, warned):
    class Other(WithImage):
        pass

    classes = tuple(f'class {at}' for at in range(6))
    parts = [make(root, [LoadAnnotations(), kind(), Merge()], classes) for kind in (WithImage, Other, Other)]
    counted(ConcatDataset(parts))
    (message,) = warned
    assert "label_transforms=('Merge', 'WithImage', 'Other',)" in message


def test_named_transforms_alone_are_run_without_a_warning(root, warned):
    pipeline = [LoadAnnotations(), Merge(), as_tensor, PackSegInputs()]
    dataset = make(root, pipeline)
    assert counted(dataset, label_transforms=['Merge']) == seen(
        make(root, [pipeline[0], pipeline[1], pipeline[3]])
    )
    assert counted(dataset, label_transforms=['Merge', 'as_tensor']) == counted(dataset)
    with pytest.raises(ValueError, match=r"\['Marge'\].*no pipeline.*has it.*as_tensor"):
        counted(dataset, label_transforms=['Merge', 'Marge'])
    with pytest.raises(ValueError, match='LoadAnnotations'):  # not after itself
        counted(dataset, label_transforms=['LoadAnnotations'])
    concat = ConcatDataset([make(root, pipeline), make(root, [LoadAnnotations(), MergeInPlace()])])
    assert (
        counted(concat, label_transforms=['Merge', 'MergeInPlace'])
        == (2 * np.array(counted(dataset, label_transforms=['Merge']))).tolist()
    )
    assert warned == []


def test_labels_out_of_range_and_lossy_files_name_the_transforms_that_were_not_run(root, warned):
    pipeline = [LoadImageFromFile(), LoadAnnotations(), RandomApply([WithImage()], 1.0)]
    with pytest.raises(ValueError, match=r"3 -> 3.*did not run RandomApply\(WithImage\).*\('WithImage',\)"):
        counted(make(root, pipeline))
    assert counted(make(root, pipeline), label_transforms=[WithImage]) == counted(
        make(root, pipeline), label_transforms=['own.WithImage']
    )
    for path in (root / 'ann').iterdir():
        Image.open(path).save(path, format='JPEG')
    with pytest.raises(ValueError, match=r'saved as JPEG.*did not run RandomApply\(WithImage\)'):
        counted(make(root, pipeline))


def test_a_named_transform_that_fails_even_with_the_image_is_an_error(root):
    def broken(results):
        raise KeyError('gt_edge')

    pipeline = [LoadImageFromFile(), LoadAnnotations(), broken]
    with pytest.raises(ValueError, match=r"0\.png: broken, named in label_transforms.*KeyError: 'gt_edge'"):
        counted(make(root, pipeline), label_transforms=['broken'])


def test_what_needs_the_image_of_some_only_is_left_out_there_with_a_warning(root, warned):
    def sometimes(results):
        if results['sample_idx'] == 3:
            results['gt_seg_map'][:] = 0
            results['img']
        return results

    dataset = make(root, [LoadAnnotations(), Merge(), sometimes])
    assert counted(dataset) == seen(make(root, [LoadAnnotations(), Merge(), PackSegInputs()]))
    (message,) = warned
    assert 'sometimes fails on some labels' in message
    assert '1 files' in message
    pipeline = [LoadImageFromFile(), LoadAnnotations(), Merge(), sometimes, PackSegInputs()]
    assert counted(make(root, pipeline), label_transforms=['Merge', 'sometimes']) == seen(
        make(root, pipeline)
    )


def test_what_needs_the_image_now_and_then_never_stops_the_count(root, warned):
    for seed in range(4):
        steps = [
            LoadAnnotations(),
            Merge(),
            RandomApply([WithImage(), RandomFlip(prob=0.5), Half()], prob=0.5),
        ]
        counted(make(root, steps, indices=list(range(seed, 5))))
    assert len(warned) == 4
    assert all('RandomApply(WithImage, Half)' in message for message in warned)


def own_crop(results):
    results['gt_seg_map'] = results['gt_seg_map'][:4, :4]
    return results


def shrink_and_scale(results):
    results['gt_seg_map'] = results['gt_seg_map'][::2, ::2] // 100
    return results


def test_an_own_crop_is_left_out_but_a_change_of_values_with_it_is_run(root, warned):
    classes = tuple(f'class {at}' for at in range(6))
    pipeline = [LoadAnnotations(), own_crop, PackSegInputs()]
    assert counted(make(root, pipeline, classes)) == seen(
        make(root, [LoadAnnotations(), PackSegInputs()], classes)
    )
    assert warned == []
    assert counted(make(root, pipeline, classes), label_transforms=['own_crop']) == seen(
        make(root, pipeline, classes)
    )
    for path in (root / 'ann').iterdir():
        Image.fromarray(np.repeat(np.arange(16) % 4 * 85, 12).reshape(16, 12).T.astype(np.uint8)).save(path)
    pipeline = [LoadAnnotations(), shrink_and_scale, PackSegInputs()]
    assert counted(make(root, pipeline)) == seen(make(root, pipeline))
    assert warned == []


class OwnPack(PackSegInputs):
    pass


def test_an_own_packing_and_an_own_loader_of_images_need_no_word(root, warned):
    class OwnImage(LoadImageFromFile):
        pass

    pipeline = [OwnImage(), LoadAnnotations(), OwnImage(), Merge(), OwnPack()]
    assert counted(make(root, pipeline)) == seen(make(root, pipeline))
    assert warned == []

    def packs_other_labels(results):
        return {'label': results['gt_seg_map']}

    counted(make(root, [LoadAnnotations(), Merge(), packs_other_labels]))
    assert 'packs_other_labels (it takes gt_seg_map away)' in warned.pop()


def test_the_pipeline_of_a_mixed_data_set_comes_after_those_inside(root, warned):
    @TRANSFORMS.register_module(force=True)
    class MergeLate(Merge):
        pass

    def mixed(**options):
        inside = ConcatDataset([make(root, [LoadAnnotations()])])
        pipeline = [dict(type='MergeLate'), dict(type='mmseg.PackSegInputs')]
        return MultiImageMixDataset(inside, pipeline=pipeline, **options)

    try:
        assert counted(mixed()) == seen(mixed())
        with pytest.raises(ValueError, match='5 -> 5'):
            counted(mixed(skip_type_keys=['MergeLate']))
        assert warned == []
    finally:
        TRANSFORMS.module_dict.pop('MergeLate')


# Loaders


class Volumes(BaseTransform):
    """A loader of a user's own, derived from nothing of MMSegmentation's."""

    def __init__(self, kind=np.float64, shape=None):
        self.kind, self.shape = kind, shape

    def transform(self, results):
        labels = np.load(results['seg_map_path']).astype(self.kind)
        results['gt_seg_map'] = labels.reshape(self.shape(*labels.shape)) if self.shape else labels
        return results


def write_volumes(root):
    numbers = np.random.default_rng(1)
    for path in (root / 'ann').iterdir():
        np.save(path.with_suffix('.npy'), numbers.choice([0, 1, 2, 255], (3, 5, 4)).astype(np.uint8))
    return {'seg_map_suffix': '.npy'}


VOLUMES = {
    'of MMSegmentation': [LoadBiomedicalAnnotation(decode_backend='numpy')],
    'in another order': [LoadBiomedicalAnnotation(decode_backend='numpy', to_xyz=True)],
    'float64': [Volumes()],
    'float16': [Volumes(np.float16)],
    'int64': [Volumes(np.int64)],
    'a channel first': [Volumes(shape=lambda *shape: (1, *shape))],
    'a channel last': [Volumes(shape=lambda *shape: (*shape, 1))],
    'after an image': [LoadImageFromFile(), Volumes()],
}


@pytest.mark.parametrize('case', VOLUMES)
def test_a_volume_counts_as_one_image_of_all_its_pixels(root, case):
    options = write_volumes(root)
    frequency = count_classes(make(root, VOLUMES[case], **options))
    labels = np.concatenate([np.load(path).ravel() for path in (root / 'ann').glob('*.npy')])
    assert frequency.pixels.tolist() == np.bincount(labels, minlength=256)[:3].tolist()
    assert frequency.ignored == (labels == 255).sum()
    assert frequency.num_images == 5
    if 'channel' not in case:
        loaded = [step for step in VOLUMES[case] if not isinstance(step, LoadImageFromFile)]
        assert frequency.pixels.tolist() == seen(make(root, [*loaded, PackSegInputs()], **options))


def test_labels_inside_the_file_of_the_image_are_found(root):
    numbers = np.random.default_rng(1)
    for at in range(3):
        data = numbers.normal(size=(3, 4, 5, 6))
        data[-1] = numbers.integers(0, 3, (4, 5, 6))
        np.save(root / 'img' / f'{at}.npy', data)
    options = {'img_suffix': '.npy', 'data_prefix': {'img_path': 'img'}}
    pipeline = [LoadBiomedicalData(with_seg=True)]
    assert counted(make(root, pipeline, **options)) == [
        sum((np.load(path)[-1] == label).sum() for path in (root / 'img').glob('*.npy')) for label in range(3)
    ]


def test_a_nifti_volume_is_loaded(root):
    nibabel = pytest.importorskip('nibabel', reason='nibabel, which reads .nii.gz, is not installed')
    labels = np.random.default_rng(1).choice([0, 1, 2], (3, 5, 4)).astype(np.uint8)
    for at in range(5):
        nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), root / 'ann' / f'{at}.nii.gz')
    dataset = make(root, [LoadBiomedicalAnnotation()], seg_map_suffix='.nii.gz')
    assert counted(dataset) == (5 * np.bincount(labels.ravel(), minlength=3)).tolist()


class NeedsImage(BaseTransform):
    """Draws the labels of an image from what its data info says, at the size of the image."""

    def transform(self, results):
        height, width = results['img'].shape[:2]
        labels = np.zeros((height, width), np.uint8)
        labels[: height // 3] = 2
        results['gt_seg_map'] = labels
        return results


class FindsFile(BaseTransform):
    def transform(self, results):
        results['seg_map_path'] = results['img_path'].replace('img', 'ann').replace('jpg', 'png')
        return results


def test_a_loader_gets_what_it_needs_from_the_transforms_before_it(root, warned):
    pipeline = [LoadImageFromFile(), Resize(scale=(8, 8)), NeedsImage(), PackSegInputs()]
    assert counted(make(root, pipeline)) == seen(
        make(root, [LoadImageFromFile(), NeedsImage(), PackSegInputs()])
    )
    classes = tuple(f'class {at}' for at in range(6))
    for pipeline in ([FindsFile(), LoadAnnotations()], [LoadImageFromFile(), FindsFile(), LoadAnnotations()]):
        dataset = make(root, pipeline, classes, data_prefix={'img_path': 'img'})
        assert counted(dataset) == seen(make(root, [LoadAnnotations(), PackSegInputs()], classes))
    assert warned == []


class LoadsPair(LoadImageFromFile):
    """Loads the image and finds its labels, in another folder than the data set says."""

    def transform(self, results):
        results['seg_map_path'] = results['img_path'].replace('img', 'mended').replace('jpg', 'png')
        return super().transform(results)


class FindsFileBySize(FindsFile):
    """Asks for the image."""

    def transform(self, results):
        results['found_at'] = results['img'].shape[0]
        return super().transform(results)


class LoadsSome(LoadImageFromFile):
    """Leaves images of 15 rows out."""

    def transform(self, results):
        results = super().transform(results)
        return None if results['img'].shape[0] == 15 else results


@pytest.mark.parametrize('first', [[LoadsPair()], [LoadImageFromFile(), LoadsPair()]])
def test_a_step_that_loads_the_image_may_say_where_the_labels_are(root, warned, first):
    (root / 'mended').mkdir()
    for path in (root / 'ann').glob('*.png'):
        Image.fromarray(np.array(Image.open(path))[::2] % 3).save(root / 'mended' / path.name)
    pipeline = [*first, LoadAnnotations(), PackSegInputs()]
    assert counted(make(root, pipeline)) == seen(make(root, pipeline))
    missing = {'data_prefix': {'img_path': 'img', 'seg_map_path': 'nowhere'}}
    assert counted(make(root, pipeline, **missing)) == seen(make(root, pipeline))
    assert warned == []


def test_a_step_that_needs_the_image_may_say_where_the_labels_are(root, warned):
    classes = tuple(f'class {at}' for at in range(6))
    pipeline = [LoadImageFromFile(), FindsFileBySize(), LoadAnnotations(), PackSegInputs()]
    dataset = make(root, pipeline, classes, data_prefix={'img_path': 'img'})
    assert counted(dataset) == seen(make(root, [LoadAnnotations(), PackSegInputs()], classes))
    assert warned == []


def test_an_image_that_a_step_before_the_labels_drops_is_not_counted(root, warned):
    classes = tuple(f'class {at}' for at in range(6))
    plain = [LoadAnnotations(), PackSegInputs()]
    left = seen(make(root, plain, classes, indices=[0, 1, 2, 4]))  # the fourth has 15 rows
    assert counted(make(root, [LoadsSome(), *plain], classes)) == left
    assert 'returns None, so training takes another image' in warned[0]


def scale_to_1(labels):
    return labels // labels.max() if labels.max() > 2 else labels


def first_channel(labels):
    return labels[..., 0]


@pytest.mark.parametrize(
    ('edit', 'files'),
    [
        (scale_to_1, [np.eye(9), 255 * np.eye(9), 1 - np.eye(9)]),
        (first_channel, [np.dstack([np.eye(9)] * 3)]),
        (lambda labels: labels[::2, ::2], [np.eye(9)]),
        (lambda labels: np.unique(labels, return_inverse=True)[1].reshape(labels.shape), [7 + np.eye(9)]),
    ],
)
def test_the_loader_of_an_edited_mmsegmentation_counts_as_it_loads(tmp_path, monkeypatch, edit, files):
    """It keeps its module and its name."""
    load = LoadAnnotations._load_seg_map

    def edited(self, results):
        load(self, results)
        results['gt_seg_map'] = edit(results['gt_seg_map']).astype(np.uint8)

    monkeypatch.setattr(LoadAnnotations, '_load_seg_map', edited)
    for folder in ('img', 'ann'):
        (tmp_path / folder).mkdir()
    for at, labels in enumerate(files):
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / 'img' / f'{at}.jpg')
        Image.fromarray(labels.astype(np.uint8)).save(tmp_path / 'ann' / f'{at}.png')
    dataset = make(tmp_path, [LoadAnnotations(), PackSegInputs()])
    assert counted(dataset) == seen(dataset)


def test_a_pipeline_that_loads_no_labels_names_what_was_tried(root):
    def fails(results):
        raise RuntimeError('no such key')

    def adds_nothing(results):
        return results

    pipeline = [LoadImageFromFile(), fails, adds_nothing, PackSegInputs()]
    with pytest.raises(ValueError, match='loads no annotations') as caught:
        counted(make(root, pipeline))
    for part in (
        'fails (RuntimeError: no such key)',
        'adds_nothing (ran, but adds no gt_seg_map)',
        'PackSegInputs',
    ):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match='it is empty'):
        counted(make(root, []))
    options = write_volumes(root)
    (root / 'ann' / '0.npy').write_bytes(b'broken')
    with pytest.raises(ValueError, match=r'^\S*0\.npy: Volumes raises ValueError: .*may be broken'):
        counted(make(root, [LoadImageFromFile(), Volumes()], **options))

    def needs_library(results):
        import no_such_library  # noqa: F401

    with pytest.raises(ValueError, match=r'needs_library raises ModuleNotFoundError: .*no_such_lib'):
        counted(make(root, [LoadImageFromFile(), needs_library], **options))
    (root / 'ann' / '0.npy').unlink()
    for loader in (Volumes(), LoadBiomedicalAnnotation(decode_backend='numpy')):
        with pytest.raises(FileNotFoundError, match=r'0\.npy: no such annotation file'):
            counted(make(root, [loader], **options))


def test_counts_before_and_after_a_transform_are_cached_apart(root, tmp_path):
    cache = tmp_path / 'cache'
    classes = tuple(f'class {at}' for at in range(6))

    def count(*steps, **options):
        return counted(make(root, [LoadAnnotations(), *steps], classes), cache_dir=cache, **options)

    plain, merged = count(), count(Merge())
    assert plain != merged
    assert count(Merge(), label_transforms=()) == plain
    assert count(MergeByFields()) != merged
    assert count(RandomApply([Merge()], 1.0)) == merged
    assert count(lambda r: {**r, 'gt_seg_map': r['gt_seg_map'] * 0}) != count(
        lambda r: {**r, 'gt_seg_map': r['gt_seg_map'] * 0 + 1}
    )
    files = len(list(cache.iterdir()))
    for steps in ((), (Merge(),), (RandomApply([Merge()], 1.0),), (MergeByFields(),)):
        count(*steps)
    assert len(list(cache.iterdir())) == files


# Transforms that are tried on several rows


def draw(root, *files, suffix='.png'):
    """One file of labels for each list of values, which are all in it, and a random image."""
    numbers = np.random.default_rng(3)
    for folder in ('img', 'ann'):
        for path in (root / folder).iterdir():
            path.unlink()
    for at, values in enumerate(files):
        labels = numbers.permutation(np.resize(np.array(values, np.uint8), 12 * 17)).reshape(12, 17)
        Image.fromarray(labels).save(root / 'ann' / f'{at}{suffix}')
        Image.fromarray(numbers.integers(0, 256, (12, 17, 3), np.uint8)).save(root / 'img' / f'{at}.jpg')
    return root


class Merge21(BaseTransform):
    def transform(self, results):
        results['gt_seg_map'][results['gt_seg_map'] == 2] = 1
        return results


class Void9(BaseTransform):
    """9 is void; asks for the image."""

    def transform(self, results):
        assert results['img'].ndim == 3
        results['gt_seg_map'][results['gt_seg_map'] == 9] = 255
        return results


def test_the_advice_of_an_error_keeps_what_was_run_also_for_other_data_sets(root, warned):
    draw(root, [0, 1, 2, 9])

    def pipeline(*steps):
        return [LoadImageFromFile(), LoadAnnotations(), *steps, PackSegInputs()]

    other = make(root, pipeline(MergeByFields(), Void9()))
    for dataset, names in (
        (make(root, pipeline(Merge21(), Void9())), ('Merge21', 'Void9')),
        (ConcatDataset([make(root, pipeline(Merge21(), Void9())), other]), None),
    ):
        with pytest.raises(ValueError, match='9 -> 9') as caught:
            counted(dataset)
        option = str(caught.value).rpartition('label_transforms=')[2].rstrip('.')
        if names:
            assert eval(option) == names
            assert counted(dataset, label_transforms=names) == seen(dataset)
        assert set(eval(option)) >= {'Merge21', 'Void9'}
        assert option in warned[-1]
        assert len(warned.pop()) > 0
        warned.clear()


def test_what_changes_labels_and_is_not_among_those_named_is_warned_of(root, warned):
    draw(root, [0, 1], [0, 1], [0, 1, 2])
    pipeline = [LoadImageFromFile(), LoadAnnotations(), Merge21(), Unmoved(), IfImage(), PackSegInputs()]
    counted(make(root, pipeline), label_transforms=['IfImage'])
    (message,) = warned
    assert 'label_transforms does not name Merge21, which' in message
    assert "label_transforms=('IfImage', 'Merge21',)" in message
    warned.clear()
    counted(make(root, pipeline), label_transforms=['IfImage', 'Merge21'])
    counted(make(root, pipeline), label_transforms=())
    assert warned == []


class Unmoved(BaseTransform):
    def transform(self, results):
        return results


class Merge21IfImage(BaseTransform):
    def transform(self, results):
        return Merge21()(results) if 'img' in results else results


@pytest.mark.parametrize('at', range(6))
def test_a_silent_need_of_the_image_is_found_in_whichever_file_shows_it(root, warned, at):
    draw(root, *([0, 1, 2] if row == at else [0, 1] for row in range(6)))
    pipeline = [LoadImageFromFile(), LoadAnnotations(), Merge21IfImage(), PackSegInputs()]
    counted(make(root, pipeline))
    assert 'Merge21IfImage (its labels depend on the image)' in warned.pop()
    assert counted(make(root, pipeline), label_transforms=['Merge21IfImage']) == seen(make(root, pipeline))
    assert warned == []


def test_a_named_transform_gets_the_image_of_every_file(root, warned):
    """Of 30 files one needs it, which no look at some of them finds."""
    draw(root, *([0, 1, 2] if row == 17 else [0, 1] for row in range(30)))
    pipeline = [LoadImageFromFile(), LoadAnnotations(), Merge21IfImage(), PackSegInputs()]
    assert counted(make(root, pipeline), label_transforms=['Merge21IfImage']) == seen(make(root, pipeline))
    assert warned == []
    for path in (root / 'img').iterdir():
        path.write_bytes(b'')
    counted(make(root, pipeline), label_transforms=['Merge21IfImage'])
    assert 'Merge21IfImage ran without the image, which could not be loaded (30 files' in warned.pop()


def test_a_step_that_fails_half_way_is_run_again_with_the_image(root, warned):
    from mmcv.transforms import RandomFlip as MMCVFlip

    draw(root, *[[0, 1, 2]] * 12)
    for choice in (
        [[Merge21()], [Merge21(), MMCVFlip(prob=1.0)]],
        [[Merge21(), Unmoved()], [MMCVFlip(prob=1.0), Merge21()]],
    ):
        pipeline = [LoadImageFromFile(), LoadAnnotations(), RandomChoice(choice), PackSegInputs()]
        assert counted(make(root, pipeline)) == seen(make(root, [LoadAnnotations(), Merge21(), pipeline[-1]]))
        assert warned == []


class BinariseWithImage(BaseTransform):
    """Asks for the image unless there is nothing to do."""

    def transform(self, results):
        if results['gt_seg_map'].any():
            results['gt_seg_map'][results['gt_seg_map'] > 0] = results['img'].ndim - 2
        return results


def test_files_that_need_the_image_get_it_where_others_do_not(root, warned):
    draw(root, [0], *[[0, 255]] * 3, [0])
    pipeline = [LoadImageFromFile(), LoadAnnotations(), BinariseWithImage(), PackSegInputs()]
    assert counted(make(root, pipeline)) == seen(make(root, pipeline))
    assert warned == []


def fit(results):
    """Cut to 12 x 17."""
    results['gt_seg_map'] = results['gt_seg_map'][:12, :17]
    return results


def halve(results):
    results['gt_seg_map'] = results['gt_seg_map'][::2, ::2]
    return results


def merge_and_halve_large(results):
    labels = Merge21()(results)['gt_seg_map']
    results['gt_seg_map'] = labels[::2, ::2] if len(labels) > 12 else labels
    return results


def test_an_own_crop_that_the_first_files_do_not_need_is_run_on_none(root, warned):
    draw(root, *[[0, 1, 2]] * 20)
    numbers = np.random.default_rng(1)
    for at in (9, 10):
        Image.fromarray(numbers.choice([0, 1, 2], (30, 40)).astype(np.uint8)).save(root / 'ann' / f'{at}.png')
    plain = [LoadAnnotations(), PackSegInputs()]
    assert counted(make(root, [LoadAnnotations(), fit, PackSegInputs()])) == seen(make(root, plain))
    assert warned == []
    pipeline = [LoadAnnotations(), merge_and_halve_large, PackSegInputs()]
    assert counted(make(root, pipeline)) == seen(make(root, pipeline))  # what it makes of values counts
    assert warned == []


class Loads(LoadAnnotations):
    """Needs the image, as a loader that resizes or rasterizes to its size."""

    def transform(self, results):
        height, width = results['img_shape'][:2]
        results = super().transform(results)
        assert results['gt_seg_map'].shape == (height, width)
        results['gt_seg_map'][results['gt_seg_map'] > 2] = 2
        return results


def test_a_loader_derived_from_loadannotations_gets_the_image_if_it_asks(root, warned):
    draw(root, [0, 1, 2, 5], [0, 1])
    pipeline = [LoadImageFromFile(), Loads(), PackSegInputs()]
    assert counted(make(root, pipeline)) == seen(make(root, pipeline))
    assert warned == []
    (root / 'ann' / '1.png').write_bytes(b'no image')
    with pytest.raises(ValueError, match=r'1\.png: cannot be read as a label image'):
        counted(make(root, pipeline))
    with pytest.raises(
        ValueError, match=r"0\.png: .*raises KeyError: 'img_shape'.*such as the image"
    ) as caught:
        counted(make(root, [Loads(), PackSegInputs()]))
    assert 'Replace the file' not in str(caught.value)


def test_a_loader_derived_from_loadannotations_may_drop_the_first_image(root, warned):
    class Skips(LoadAnnotations):
        def transform(self, results):
            return None if results['sample_idx'] == 0 else super().transform(results)

    draw(root, [0, 1], [0, 1, 2], [0, 2])
    pipeline = [Skips(), Merge21(), PackSegInputs()]
    plain = [LoadAnnotations(), Merge21(), PackSegInputs()]
    assert counted(make(root, pipeline)) == seen(make(root, plain, indices=[1, 2]))
    assert 'Skips returns None' in warned.pop()


# Labels that are packed


class PackBinary(PackSegInputs):
    def transform(self, results):
        packed = super().transform(results)
        labels = packed['data_samples'].gt_sem_seg.data
        labels[(labels > 0) & (labels < 255)] = 1
        return packed


class PackWithImage(PackBinary):
    def transform(self, results):
        assert results['img'].ndim == 3
        return super().transform(results)


def binary_after_packing(packed):
    labels = packed['data_samples'].gt_sem_seg.data
    labels[(labels > 0) & (labels < 255)] = 1
    return packed


def with_inputs(packed):
    assert packed['inputs'].ndim == 3
    return binary_after_packing(packed)


def test_labels_that_change_in_packing_or_after_it_are_counted_so(root, warned):
    for steps in ([PackBinary()], [PackSegInputs(), binary_after_packing], [OwnPack(), binary_after_packing]):
        pipeline = [LoadImageFromFile(), LoadAnnotations(), *steps]
        assert counted(make(root, pipeline)) == seen(make(root, pipeline))
        assert warned == []
    for steps in ([PackWithImage()], [PackSegInputs(), with_inputs], [OwnPack(), with_inputs]):
        pipeline = [LoadImageFromFile(), LoadAnnotations(), *steps]
        name = 'PackWithImage' if len(steps) == 1 else 'with_inputs'
        classes = tuple(f'class {at}' for at in range(6))
        counted(make(root, pipeline, classes))
        assert name in warned[-1]
        option = warned.pop().partition('label_transforms=')[2].partition(' of ')[0]
        assert counted(make(root, pipeline, classes), label_transforms=eval(option)) == seen(
            make(root, pipeline, classes)
        )
        assert warned == []


def scale_inputs(packed):
    packed['inputs'] = packed['inputs'] / 255
    return packed


def flip_packed(packed):
    packed['inputs'] = packed['inputs'].flip(-1)
    sample = packed['data_samples'].gt_sem_seg
    sample.data = sample.data.flip(-1)
    return packed


def test_augmentations_of_what_is_packed_need_no_warning(root, warned):
    merged = seen(make(root, [LoadAnnotations(), Merge(), PackSegInputs()]))
    for steps in ([PackSegInputs(), scale_inputs], [OwnPack(), flip_packed, scale_inputs]):
        assert counted(make(root, [LoadImageFromFile(), LoadAnnotations(), Merge(), *steps])) == merged
        assert warned == []


def test_what_takes_the_labels_away_is_not_proposed_to_be_named(root, warned):
    def packs_pairs(results):
        return {'image': results['img'], 'label': results['gt_seg_map']}

    pipeline = [LoadImageFromFile(), LoadAnnotations(), Merge(), packs_pairs]
    counted(make(root, pipeline))
    message = warned.pop()
    assert 'packs_pairs (it takes gt_seg_map away)' in message
    assert 'before these' in message
    assert 'name all' not in message
    with pytest.raises(ValueError, match=r'packs_pairs, named in .*takes gt_seg_map away.*before it'):
        counted(make(root, pipeline), label_transforms=['packs_pairs'])


# Ordinary augmentations of somebody's own


def noise(results):
    results['img'] = results['img'] + np.random.default_rng(0).integers(0, 9, results['img'].shape)
    return results


def flip(results):
    results['img'] = results['img'][:, ::-1]
    results['gt_seg_map'] = results['gt_seg_map'][:, ::-1]
    return results


def crop_at_random(results):
    top, left = np.random.randint(6), np.random.randint(6)  # noqa: NPY002
    for key in ('img', 'gt_seg_map'):
        results[key] = results[key][top : top + 6, left : left + 6]
    return results


def shift(results):
    moved = np.full_like(results['gt_seg_map'], 255)
    moved[2:, 3:] = results['gt_seg_map'][:-2, :-3]
    results['img'] = np.roll(results['img'], (2, 3), (0, 1))
    results['gt_seg_map'] = moved
    return results


def shift_with_zeros(results):
    results = shift(results)
    results['gt_seg_map'][:2] = results['gt_seg_map'][:, :3] = 0
    return results


def crop_at_objects(results):
    y, x = np.argwhere((results['gt_seg_map'] > 0) & (results['gt_seg_map'] < 255))[0]
    for key in ('img', 'gt_seg_map'):
        results[key] = results[key][y : y + 6, x : x + 6]
    return results


class DrawsItself(BaseTransform):
    """As Albumentations: random numbers somewhere inside."""

    def __init__(self):
        self.inside = {'numbers': np.random.default_rng(0)}

    def transform(self, results):
        turns = self.inside['numbers'].integers(4)
        for key in ('img', 'gt_seg_map'):
            results[key] = np.rot90(results[key], turns)
        return results


def crop_at_class_1(results):
    y, x = np.argwhere(results['gt_seg_map'] == 1)[0]
    for key in ('img', 'gt_seg_map'):
        results[key] = results[key][y : y + 6, x : x + 6]
    return results


AUGMENTATIONS = [
    noise,
    crop_at_class_1,
    flip,
    crop_at_random,
    shift,
    shift_with_zeros,
    crop_at_objects,
    DrawsItself(),
]


def test_a_loader_that_differs_from_the_data_set_in_reduce_zero_label_is_no_broken_file(root):
    dataset = make(root, [LoadAnnotations(reduce_zero_label=True), PackSegInputs()])
    with pytest.raises(ValueError, match=r'0\.png: LoadAnnotations and the data set differ in reduce_z'):
        count_classes(dataset, num_workers=0)


class LabelsSome(LoadAnnotations):
    def transform(self, results):
        return results if results['seg_map_path'].endswith('4.png') else super().transform(results)


@pytest.mark.parametrize('workers', [0, 2])
def test_an_image_for_which_the_loader_yields_no_labels_is_named(root, workers):
    draw(root, *[[0, 1, 2]] * 5)
    dataset = make(root, [LabelsSome(), PackSegInputs()])
    with pytest.raises(ValueError, match=r'4\.png: the pipeline yields no gt_seg_map for this image'):
        count_classes(dataset, num_workers=workers)


class Floats(LoadAnnotations):
    """As LoadBiomedicalAnnotation, which yields floats."""

    def transform(self, results):
        results = super().transform(results)
        results['gt_seg_map'] = results['gt_seg_map'].astype(np.float32)
        return results


class Mask(LoadAnnotations):
    """As a threshold that leaves True and False."""

    def transform(self, results):
        results = super().transform(results)
        results['gt_seg_map'] = results['gt_seg_map'] == 1
        return results


def crop_what_is_there(results):
    y, x = np.argwhere(results['gt_seg_map'] == 1)[0]
    for key in ('img', 'gt_seg_map'):
        if key in results:
            results[key] = results[key][y : y + 3, x : x + 3]
    return results


@pytest.mark.parametrize('loader', [LoadAnnotations, Floats, Mask])
@pytest.mark.parametrize('step', [crop_what_is_there, crop_at_class_1, flip])
def test_a_crop_is_not_counted_whatever_the_type_of_the_labels(root, warned, loader, step):
    draw(root, *[[0, 1, 2, 255]] * 5)
    pipeline = [LoadImageFromFile(), loader(), step, PackSegInputs()]
    expected = counted(make(root, [loader(), PackSegInputs()]))
    assert expected[1] > 30
    assert counted(make(root, pipeline)) == expected
    assert not any('changes labels' in text or 'label_transforms' in text for text in warned)


def test_a_step_that_reads_a_mask_as_such_needs_no_warning(root, warned):
    def blank(results):
        results['img'][~results['gt_seg_map']] = 0
        return results

    draw(root, *[[0, 1, 2, 255]] * 5)
    pipeline = [LoadImageFromFile(), Mask(), blank, PackSegInputs()]
    assert counted(make(root, pipeline)) == counted(make(root, [Mask(), PackSegInputs()]))
    assert warned == []


@pytest.mark.parametrize('loader', [LoadAnnotations, Floats])
def test_a_rare_label_that_a_step_with_the_image_changes_is_named_whatever_the_type(root, warned, loader):
    """The labels that it changes are in none of the images that are looked at."""

    def artefact_is_void(results):
        results['gt_seg_map'][(results['gt_seg_map'] == 2) & (results['img'].sum() > 0)] = 255
        return results

    draw(root, *[[0, 1]] * 5)
    pipeline = [LoadImageFromFile(), loader(), artefact_is_void, PackSegInputs()]
    counted(make(root, pipeline))
    assert any('artefact_is_void' in text for text in warned)


@pytest.mark.parametrize('needs_image', [False, True])
def test_a_crop_around_a_tiny_object_of_a_large_background_is_not_counted(root, warned, needs_image):
    def lesion_crop(results):
        y, x = np.maximum(np.argwhere(results['gt_seg_map'] == 1)[0] - 10, 0)
        for key in ('img', 'gt_seg_map'):
            if needs_image or key in results:
                results[key] = results[key][y : y + 64, x : x + 64]
        return results

    for at in range(5):
        labels = np.zeros((200, 200), np.uint8)
        labels[60:160, 20:140] = 2
        labels[170 - at : 172 - at, 30 + 20 * at : 32 + 20 * at] = 1
        Image.fromarray(labels).save(root / 'ann' / f'{at}.png')
        Image.fromarray(np.zeros((200, 200, 3), np.uint8)).save(root / 'img' / f'{at}.jpg')
    pipeline = [LoadImageFromFile(), LoadAnnotations(), lesion_crop, PackSegInputs()]
    assert counted(make(root, pipeline)) == [5 * (40000 - 12000 - 4), 5 * 4, 5 * 12000]
    assert warned == []


def test_a_box_of_a_volume_is_found_in_it():
    volume = np.zeros((20, 30, 40), np.uint8)
    volume[11, 14, 17] = 1
    assert label_steps._is_window(volume[4:15, 9:20, 12:30], volume)
    assert not label_steps._is_window(volume[4:15, 9:20, 12:30] * 2, volume)
    assert not label_steps._is_window(volume[0], volume)


def test_an_augmentation_that_is_sometimes_drawn_costs_counting_no_image(root, warned, monkeypatch):
    draw(root, *[[0, 1, 2]] * 30)
    pipeline = [LoadImageFromFile(), LoadAnnotations(), RandomApply([flip], 0.5), PackSegInputs()]
    loaded = []
    load = LoadImageFromFile.transform
    monkeypatch.setattr(LoadImageFromFile, 'transform', lambda *a: loaded.append(a) or load(*a))
    counted(make(root, pipeline))
    assert len(loaded) <= 8
    assert warned == []


@pytest.mark.parametrize('step', AUGMENTATIONS, ids=lambda step: getattr(step, '__name__', 'DrawsItself'))
@pytest.mark.parametrize('values', [[0, 1, 2, 255], [0, 1], [0, 1, 2]])
def test_an_own_augmentation_with_the_image_needs_no_warning(root, warned, step, values):
    draw(root, *[values] * 5)
    plain = [LoadAnnotations(), PackSegInputs()]
    for pipeline in (
        [LoadImageFromFile(), LoadAnnotations(), step, PackSegInputs()],
        [LoadImageFromFile(), LoadAnnotations(), RandomApply([step], 0.5), PackSegInputs()],
    ):
        assert counted(make(root, pipeline)) == seen(make(root, plain))
        assert warned == []


def keeps_crop(results):
    assert results['img'].shape[:2] == (8, 8)
    return flip(results)


def by_scale(results):
    results['img'] = results['img'] * results['scale_factor'][0]
    return results


@pytest.mark.parametrize('step', [keeps_crop, by_scale])
def test_an_own_augmentation_is_tried_as_training_calls_it(root, warned, step):
    geometry = [Resize(scale=(20, 20)), RandomCrop((8, 8))]
    pipeline = [LoadImageFromFile(), LoadAnnotations(), Merge(), *geometry, step, PackSegInputs()]
    assert counted(make(root, pipeline)) == seen(make(root, [LoadAnnotations(), Merge(), PackSegInputs()]))
    assert warned == []


def test_a_rare_change_of_labels_is_found_in_noise(root, warned):
    """Label 2 is in one of 40 files."""
    draw(root, *([0, 1, 2] if row == 17 else [0, 1] for row in range(40)))
    for step in (merge, merge_and_crop):
        counted(make(root, [LoadImageFromFile(), LoadAnnotations(), step, PackSegInputs()]))
        assert f'before {step.__name__} (' in warned.pop()
    counted(make(root, [LoadImageFromFile(), LoadAnnotations(), Merge21IfImage(), PackSegInputs()]))
    assert 'Merge21IfImage (its labels depend on the image)' in warned.pop()
    counted(make(root, [LoadAnnotations(), Unmoved(), Merge21()]), label_transforms=['Unmoved'])
    assert 'does not name Merge21' in warned.pop()


def test_the_trial_leaves_the_transforms_of_training_alone(root):
    steps = [DrawsItself(), PhotoMetricDistortion()]
    dataset = make(root, [LoadImageFromFile(), LoadAnnotations(), Merge(), *steps, PackSegInputs()])
    own = dataset.pipeline.transforms[3].inside['numbers'].bit_generator
    state, drawn = own.state, random.getstate()
    counted(dataset)
    assert (own.state, random.getstate()) == (state, drawn)


def swap(results):
    labels = results['gt_seg_map']
    assert results['img'].ndim == 3
    results['gt_seg_map'] = np.array([1, 0, *range(2, 256)], np.uint8)[labels]
    return results


def shift_down(results):
    assert results['img'].ndim == 3
    labels = results['gt_seg_map'].astype(int)
    results['gt_seg_map'] = np.where(labels == 0, 255, labels - (labels < 255))
    return results


def merge(results):
    assert results['img'].ndim == 3
    return Merge21()(results)


def merge_and_crop(results):
    return crop_at_random(merge(results))


def dark_is_ignored(results):
    results['gt_seg_map'][results['img'][..., 0] < 60] = 255
    return results


def dark_is_background(results):
    results['gt_seg_map'][results['img'][..., 0] < 60] = 0
    return results


def everything(results):
    results['gt_seg_map'] = np.zeros(results['img'].shape[:2], np.uint8)
    return results


CHANGES = [swap, shift_down, merge, merge_and_crop, dark_is_ignored, dark_is_background, everything]


@pytest.mark.parametrize('step', CHANGES, ids=lambda step: step.__name__)
@pytest.mark.parametrize('values', [[0, 1, 2, 255], [0, 1, 2]])
def test_labels_that_change_with_the_image_are_warned_of(root, warned, step, values):
    draw(root, *[values] * 5)
    counted(make(root, [LoadImageFromFile(), LoadAnnotations(), step, PackSegInputs()]))
    assert f'before {step.__name__} (' in warned.pop()


# Who hands the option on


def config(root, **hook):
    """Of a training whose pipeline merges labels by a transform of the user's own."""
    module = root / 'merging.py'
    module.write_text(
        'from mmcv.transforms import BaseTransform\n'
        'from mmengine.registry import TRANSFORMS\n'
        '@TRANSFORMS.register_module(force=True)\n'
        'class MergeAll(BaseTransform):\n'
        '    def transform(self, results):\n'
        "        labels = results['gt_seg_map']\n"
        "        labels[labels < 9] = labels[labels < 9].clip(max=results['img'].ndim - 2)\n"
        '        return results\n'
    )
    dataset = dict(
        type='mmseg.BaseSegDataset',
        data_root=str(root),
        data_prefix=dict(img_path='img', seg_map_path='ann'),
        metainfo=dict(classes=tuple(f'class {at}' for at in range(6))),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='mmseg.LoadAnnotations'), dict(type='MergeAll')],
    )
    hooks = [dict(type='ClassWeightHook', cache_dir=str(root / 'cache'), **hook)] if hook else []
    imports = dict(imports=['merging'])
    return Config(dict(train_dataloader=dict(dataset=dataset), custom_hooks=hooks, custom_imports=imports))


@pytest.fixture
def merging(root, monkeypatch):
    monkeypatch.syspath_prepend(root)
    yield lambda **hook: config(root, **hook)
    TRANSFORMS.module_dict.pop('MergeAll', None)
    sys.modules.pop('merging', None)


def test_hook_sampler_and_command_hand_it_on_and_a_config_tells_the_others(
    root, merging, tmp_path, warned, capsys
):
    cfg = merging(label_transforms=['MergeAll'])
    importlib.import_module('merging')
    cache = dict(cache_dir=tmp_path / 'cache')
    for source, options in ((cfg, {}), (merging(), dict(label_transforms=('MergeAll',)))):
        frequency = training_frequency(source, progress=False, **options, **cache)
        assert np.flatnonzero(frequency.pixels).tolist() == [0, 1]
    assert warned == []
    assert np.flatnonzero(training_frequency(cfg, label_transforms=(), **cache).pixels).tolist() == [
        0,
        1,
        2,
        3,
        5,
    ]
    assert warned == []

    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    sampler = RareClassSampler(dataset, num_workers=0, label_transforms=['MergeAll'], **cache)
    drawn = {index.class_index for index, _ in zip(sampler, range(20), strict=False)}
    assert drawn - {None} <= {0, 1}

    seen_options = []

    handed = dict(label_transforms=['MergeAll'], max_images=5, num_workers=0, cache_dir='folder')

    def count(*_, **given):
        seen_options.append({name: given[name] for name in handed})
        raise RuntimeError('seen')

    loss = WeightedCrossEntropyLoss(class_weight='auto')
    head = torch.nn.Module()
    head.conv_seg, head.loss_decode = torch.nn.Identity(), loss
    model = torch.nn.Module()
    model.decode_head = head
    runner = SimpleNamespace(
        model=model,
        cfg=cfg,
        logger=logging.getLogger('x'),
        message_hub=MessageHub('x'),
        iter=0,
        train_dataloader=DataLoader(dataset),
        train_loop=None,
        val_loop=None,
    )
    with pytest.MonkeyPatch.context() as patch:
        for user in ('hooks', 'decisions'):
            patch.setattr(f'mmseg_imbalance.{user}.training_frequency', count)
        for hook, start in ((ClassWeightHook, 'before_train'), (LogitAdjustmentHook, 'before_test')):
            runner.hooks = [hook(**handed)]
            with pytest.raises(RuntimeError, match='seen'):
                getattr(runner.hooks[0], start)(runner)
    assert seen_options == [handed] * 2

    path = str(tmp_path / 'config.py')
    merging().dump(path)
    command = [path, '--workers', '0', '--cache-dir', str(tmp_path / 'cache'), '--label-transforms']
    assert class_weights.main([*command, 'MergeAll']) == 0
    assert class_weights.main([*command, '']) == 0
    assert '0.000' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        class_weights.main([*command, 'MergeAll,Merge'])
    assert "label_transforms names ['Merge']" in capsys.readouterr().err


def test_a_training_weighs_the_labels_that_its_pipeline_makes(small_config, tmp_path):
    @TRANSFORMS.register_module(force=True)
    class FoldClasses(BaseTransform):
        """Of the 11 classes those after the third become the third."""

        def transform(self, results):
            labels = results['gt_seg_map']
            labels[labels < 11] = labels[labels < 11].clip(max=2)
            return results

    cfg = small_config('segformer/segformer_mit-b0-small-combined-rcs_1xb8-2k_camvid-240x180')
    pipeline = cfg.train_dataloader.dataset.pipeline
    at = [step.type for step in pipeline].index('LoadAnnotations')
    pipeline.insert(at + 1, dict(type='FoldClasses'))
    cfg.custom_hooks = [dict(type='ClassWeightHook', cache_dir=str(tmp_path / 'cache'))]
    try:
        Runner.from_cfg(cfg).train()
    finally:
        TRANSFORMS.module_dict.pop('FoldClasses')
    record = json.loads((Path(cfg.work_dir) / 'class_weights.json').read_text())
    pixels = record['pixels']
    assert all(pixels[:3])
    assert not any(pixels[3:])
    assert np.argmin(record['weights'][:3]) == np.argmax(pixels[:3]) == 2
