"""What the losses receive is held against the counts: the rule itself, and whole runs on small data."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS, TRANSFORMS
from mmengine.runner import Runner
from PIL import Image
from ranks import on_ranks, trained_on_rank
from scripted import log_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from mmseg_imbalance.class_weight import WeightRecord
from mmseg_imbalance.frequency import ClassFrequency
from mmseg_imbalance.label_check import (
    COMPARED_AFTER,
    LabelCheck,
    LabelCounter,
    Received,
    compare,
    drawn_at_random,
)
from mmseg_imbalance.losses import CombinedWeightedLoss, WeightedCrossEntropyLoss
from mmseg_imbalance.ops import soft_stats

CLASSES = ['bg', 'crack', 'stain']


def record(pixels, images=None, num_images=100, dataset_images=None, ignored=0, **options):
    weights = [1.0 if n else 0.0 for n in pixels]
    images = [num_images if n else 0 for n in pixels] if images is None else images
    return WeightRecord(
        CLASSES[: len(pixels)],
        options.pop('weights', weights),
        pixels,
        images,
        ignored,
        num_images,
        num_images if dataset_images is None else dataset_images,
        'sqrt_inv_freq',
        **options,
    )


def received(pixels, images=None, num_images=800, ignored=0, of_points=False):
    pixels = np.array(pixels)
    images = np.where(pixels > 0, num_images, 0) if images is None else np.array(images)
    share = pixels / max(pixels.sum(), 1)
    return Received(pixels, images, share, ignored, num_images, num_images, of_points)


def kinds(found):
    return [(finding.severity, finding.kind, finding.label) for finding in found]


def test_a_label_that_never_occurs_and_yet_arrives_is_an_error_with_both_numbers_and_causes():
    (found,) = compare(received([9000, 1000, 7], [800, 700, 2]), record([90000, 10000, 0]))
    assert kinds([found]) == [('error', 'never counted', 2)]
    for part in (
        "class 'stain', label 2, was counted with 0 pixels in 0 of 100 images",
        'arrived with 7 pixels in 2 of 800 images',
        'the weight of these counts is 0',
    ):
        assert part in found.message


def test_in_a_sample_of_the_images_it_is_no_error_and_none_where_the_class_has_a_weight():
    came = received([9000, 1000, 7], [800, 700, 2])
    sample = record([90000, 10000, 0], dataset_images=5000)
    (found,) = compare(came, sample)
    assert kinds([found]) == [('warning', 'never counted', 2)]
    assert 'a sample of 5,000' in found.message
    assert compare(came, record([90000, 10000, 0], dataset_images=5000, weights=[1.0, 1.0, 3.0])) == []
    # a weight written by hand into the file of a complete count
    found = compare(came, record([90000, 10000, 0], weights=[1.0, 1.0, 3.0]))
    assert kinds(found) == [('warning', 'never counted', 2)]


@pytest.mark.parametrize(
    'known', [record([90, 10, 5], weights=[0.0, 1.0, 1.0]), WeightRecord(CLASSES, [0.0, 1.0, 1.0])]
)
def test_a_weight_of_0_that_was_given_on_purpose_is_only_noted(known):
    (found,) = compare(received([90, 10, 5]), known)
    assert kinds([found]) == [('note', 'given 0', 0)]
    assert 'arrived with 90 of 105 pixels' in found.message


def test_what_was_counted_arrives_no_finding():
    assert compare(received([900, 100, 10]), record([90000, 10000, 1000])) == []
    # rare: it need not arrive
    assert compare(received([900, 100, 0]), record([90000, 10000, 100], [100, 100, 3])) == []
    # and nothing to judge by yet
    assert compare(received([100, 0, 0], num_images=8), record([500, 500, 100])) == []
    assert compare(received([0, 0, 0], num_images=0), record([500, 500, 100])) == []


def test_a_large_class_that_does_not_arrive_is_a_warning_once_its_absence_is_no_chance():
    counted = record([7000, 3000])
    assert compare(received([100, 0], num_images=40), counted) == []
    (found,) = compare(received([100, 0], num_images=100), counted)
    assert kinds([found]) == [('warning', 'another share', 1)]
    assert 'counted with 3,000 pixels in 100 of 100 images' in found.message
    assert 'a share of 0, where 0.3 was to be expected' in found.message


@pytest.mark.parametrize('at_random', [True, False])
@pytest.mark.parametrize('share', [0.99, 0.9])
def test_swapped_classes_are_seen_with_any_sampler(share, at_random):
    counted = record([int(1000 * share), 1000 - int(1000 * share)])
    came = received([1000 - int(1000 * share), int(1000 * share)], num_images=40)
    found = compare(came, counted, at_random=at_random)
    assert ('warning', 'another share', 0) in kinds(found)


def test_more_of_a_rare_class_is_a_warning_unless_a_sampler_draws_it_on_purpose():
    counted = record([99_900, 100], [100, 40])
    came = received([500, 500], [800, 800])
    assert kinds(compare(came, counted)) == [('warning', 'another share', 1)]
    assert compare(came, counted, at_random=False) == []
    # one large object of a class that few images hold is chance
    counted = record([999_990, 10], [10_000, 1], num_images=10_000)
    assert compare(received([980, 20], [40, 1], num_images=40), counted) == []


def test_the_expected_share_is_that_of_an_image_where_large_images_hold_most_pixels():
    # ten large images of background alone beside 990 small ones that are half crack
    counts = np.array([[10**8, 0]] * 10 + [[2000, 2000]] * 990)
    frequency = ClassFrequency.from_rows(CLASSES[:2], counts, np.zeros(1000), [str(i) for i in range(1000)])
    counted = WeightRecord.count(frequency, np.array([0.1, 1.9]))
    assert counted.image_share == pytest.approx([0.505, 0.495])
    assert frequency.share[1] < 0.002
    assert compare(received([505, 495]), counted) == []
    assert kinds(compare(received([1000, 0]), counted)) == [('warning', 'another share', 1)]


def test_images_without_a_valid_pixel_and_repeats_count_right_in_the_share_of_an_image():
    counts, ignored = np.array([[4, 0], [0, 0], [1, 3]]), np.array([0, 4, 0])
    repeats = np.array([1, 5, 3])
    frequency = ClassFrequency.from_rows(CLASSES[:2], counts, ignored, list('abc'), repeats)
    np.testing.assert_allclose(frequency.image_share, [(1 + 3 / 4) / 4, 9 / 4 / 4])


def test_of_a_sample_no_more_is_believed_than_it_shows():
    # a class that one of four images was full of
    counted = record([300, 100], [3, 1], num_images=4, dataset_images=4000)
    assert compare(received([1000, 0]), counted) == []


def test_mostly_ignored_pixels_are_a_warning_where_few_were_counted_so():
    counted = record([900, 100], ignored=10)
    (found,) = compare(received([20, 10], ignored=970), counted)
    assert kinds([found]) == [('warning', 'ignored', None)]
    assert '97.00%' in found.message
    assert '0.99% of those counted' in found.message
    assert compare(received([20, 10], ignored=970), record([20, 10], ignored=970)) == []
    assert compare(received([20, 10], ignored=60), counted) == []
    found = compare(received([0, 0], ignored=1000)._replace(valid_images=0), counted)
    assert kinds(found) == [('warning', 'ignored', None)]


def test_points_that_a_head_chooses_are_only_held_against_what_cannot_be():
    came = received([10, 990, 5], of_points=True, ignored=10**6)
    assert kinds(compare(came, record([990, 10, 0]))) == [('error', 'never counted', 2)]


def test_the_counter_adds_up_pixels_images_and_shares(make_batch):
    counter = LabelCounter()
    for seed in (0, 1):
        logits, target = make_batch(seed=seed)
        target[1] = 255
        if seed:
            target[0, :, :8] = 3
        counter(logits, target, soft_stats(logits, target, with_recall=True), logits[0, :, 0, 0])
    seen = Received.from_sums(counter.total(5, torch.device('cpu')).tolist())
    labels = [make_batch(seed=0)[1][0].numpy(), make_batch(seed=1)[1][0].numpy()]
    labels[1][:, :8] = 3
    counts = np.array([[(label == c).sum() for c in range(5)] for label in labels])
    np.testing.assert_array_equal(seen.pixels, counts.sum(0))
    np.testing.assert_array_equal(seen.images, (counts > 0).sum(0))
    np.testing.assert_allclose(seen.share, (counts / counts.sum(1, keepdims=True)).mean(0), atol=1e-6)
    assert seen.ignored == 4 * 13 * 17 - counts.sum()
    assert (seen.num_images, seen.valid_images, seen.of_points) == (4, 2, False)
    assert not LabelCounter().total(5, torch.device('cpu')).any()


def test_weights_of_pixels_do_not_change_what_was_received_and_points_are_told_apart(make_batch):
    logits, target = make_batch()
    sums = []
    for arguments in (
        dict(pred=logits, target=target),
        dict(pred=logits, target=target, weight=torch.zeros(target.shape)),
        dict(pred=logits.flatten(2), target=target.flatten(1)),
    ):
        loss = CombinedWeightedLoss(class_weight=[1.0] * 5)
        counter = LabelCounter()
        loss.watch(counter)
        loss(**arguments)
        sums.append(counter.sums.tolist())
    assert sums[0] == sums[1]
    assert sums[0][:-1] == sums[2][:-1]
    assert (sums[0][-1], sums[2][-1]) == (0, 2)


def test_nothing_waits_for_the_device_while_labels_are_added_up(make_batch):
    class NoScalars(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    logits, target = make_batch()
    counter, stats = LabelCounter(), soft_stats(logits, target, with_recall=True)
    with NoScalars():
        counter(logits, target, stats, logits[0, :, 0, 0])
        counter(logits, target, stats, logits[0, :, 0, 0])


def test_what_draws_each_image_alike():
    data = list(range(10))

    class Own(InfiniteSampler):
        pass

    def loader(sampler, **options):
        return DataLoader(data, sampler=sampler, **options)

    assert drawn_at_random(loader(InfiniteSampler(data)))
    assert drawn_at_random(loader(DefaultSampler(data)))
    assert drawn_at_random(DataLoader(data, shuffle=True))
    assert not drawn_at_random(loader(DefaultSampler(data, shuffle=False)))
    assert not drawn_at_random(DataLoader(data))
    assert not drawn_at_random(loader(Own(data)))
    assert not drawn_at_random(SimpleNamespace(dataset=data))
    batches = torch.utils.data.BatchSampler(InfiniteSampler(data), 2, False)
    assert drawn_at_random(DataLoader(data, batch_sampler=batches))


@pytest.mark.parametrize('agree', [False, True])
def test_what_one_loss_of_a_head_is_given_on_purpose_is_no_warning(agree):
    """As PIDHead gives its last loss boundaries alone."""
    losses = nn.ModuleList([WeightedCrossEntropyLoss('auto'), WeightedCrossEntropyLoss('auto')])
    for loss in losses:
        loss.class_weight.set_weights([1.0, 1.0])
    model = nn.Module()
    model.decode_head = nn.Module()
    model.decode_head.loss_decode = losses
    said = []
    runner = SimpleNamespace(
        model=model,
        train_dataloader=DataLoader([0, 1], shuffle=True),
        message_hub=SimpleNamespace(get_info=lambda key: record([500, 500]).to_dict()),
        logger=SimpleNamespace(warning=said.append),
    )
    check = LabelCheck(runner)
    logits, target = torch.zeros(4, 2, 6, 6), torch.arange(144).view(4, 6, 6) % 2
    boundary = torch.full_like(target, 255)
    boundary[:, 0, :2] = target[:, 0, :2]
    for _ in range(COMPARED_AFTER[-1]):
        losses[0](logits, boundary if agree else target)
        losses[1](logits, boundary)
        check.after_iteration(runner)
    assert len(said) == agree
    if agree:
        assert 'decode_head.loss_decode.0: 94.44% of the pixels that arrive, in 32 images' in said[0]
    assert not losses[0].watchers + losses[1].watchers


# whole runs


@TRANSFORMS.register_module()
class Binarise(BaseTransform):
    """Of a user: every label from 2 on becomes 1, or `to`, where the image is not black."""

    def __init__(self, to=1, least=2):
        self.to, self.least = to, least

    def transform(self, results):
        label, image = results['gt_seg_map'], results['img']
        label[(label >= self.least) & (label != 255) & (image.max(axis=2) >= 0)] = self.to
        return results


@MODELS.register_module()
class Through(nn.Module):
    """A backbone that hands on the image."""

    def forward(self, images):
        return [images]


@TRANSFORMS.register_module()
class Swap(BaseTransform):
    """Of a user: labels 0 and 1 change places."""

    def transform(self, results):
        assert 'img' in results
        results['gt_seg_map'] = np.array([1, 0, *range(2, 256)], np.uint8)[results['gt_seg_map']]
        return results


def write_data(root, labels):
    """Images and labels of a data set; labels (H, W) each."""
    for i, label in enumerate(labels):
        for kind, array in (('images', np.stack([label] * 3, 2) * 40), ('labels', label)):
            (root / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(root / kind / f'{i}.png')


def half(height=16, width=16, below=1, rows=8):
    label = np.zeros((height, width), np.uint8)
    label[height - rows :] = below
    return label


FCN = dict(
    type='FCNHead', in_channels=3, channels=3, num_convs=0, concat_input=False, dropout_ratio=0,
    norm_cfg=dict(type='BN'), align_corners=False,
)  # fmt: skip
OCR = dict(type='OCRHead', in_channels=3, channels=4, ocr_channels=4, norm_cfg=dict(type='BN'))
AUTO = dict(type='WeightedCrossEntropyLoss', class_weight='auto')


def small_run(tmp_path, transforms=(), loss=AUTO, classes=3, head=FCN, iterations=4, sampler=None, **more):
    """A config on the data in tmp_path; the backbone hands on the image."""
    heads = head if isinstance(head, list) else [head]
    heads = [dict(h, num_classes=classes, loss_decode=h.get('loss_decode', loss)) for h in heads]
    model = dict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor', size=(16, 16), seg_pad_val=255),
        backbone=dict(type='Through'),
        decode_head=heads if isinstance(head, list) else heads[0],
        train_cfg=dict(),
        test_cfg=dict(mode='whole'),
    )
    if isinstance(head, list):
        model.update(type='CascadeEncoderDecoder', num_stages=len(heads))
    names = ('bg', 'crack', 'stain', 'rest')[:classes]
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        *transforms,
        dict(type='PackSegInputs'),
    ]
    data = dict(
        type='BaseSegDataset',
        data_root=str(tmp_path),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        img_suffix='.png',
        metainfo=dict(classes=names),
        pipeline=pipeline,
    )
    cfg = dict(
        default_scope='mmseg',
        model=model,
        train_dataloader=dict(
            batch_size=2,
            num_workers=0,
            sampler=sampler or dict(type='InfiniteSampler', shuffle=True),
            dataset=data,
        ),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iterations),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01)),
        custom_hooks=[dict(type='ClassWeightHook', num_workers=0, cache_dir=str(tmp_path / 'cache'))],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1000)),
        experiment_name=tmp_path.name,
        work_dir=str(tmp_path / 'work_dir'),
        randomness=dict(seed=0),
    )
    config = Config(cfg)
    config.merge_from_dict(more)
    return config


def train(cfg):
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


ARRIVES = r"loss_decode[.\w]*: class 'crack', label 1, was counted with 0 pixels.* arrived with \d+ pixels"


@pytest.mark.parametrize(
    'loss',
    [
        AUTO,
        dict(type='CombinedWeightedLoss', class_weight='auto', region='tversky'),
        dict(type='CombinedWeightedLoss', region_class_weight='auto'),
        dict(type='WeightedDiceLoss', logit_adjustment=1.0),
        dict(type='WeightedFocalLoss', logit_variation=1.0),
        dict(type='WeightedCrossEntropyLoss', class_weight=[1, 2, 3], divide_by='pixels'),
        dict(type='SimilaritySubclassifiedLoss', class_weight='auto'),
        [dict(type='CrossEntropyLoss'), AUTO],
    ],
    ids=str,
)
def test_labels_changed_after_loading_end_the_run_with_the_class_and_the_numbers(tmp_path, loss):
    write_data(tmp_path, [half(below=2)] * 4)
    with pytest.raises(ValueError, match='(?s)cannot be what was counted.*' + ARRIVES) as error:
        train(small_run(tmp_path, [dict(type='Binarise')], loss))
    assert (
        ', label 1, was counted with 0 pixels in 0 of 4 images, but arrived with 256 pixels in 2 of 2 images'
        in str(error.value)
    )


@pytest.mark.parametrize(
    'head',
    [
        dict(FCN, type='FeatureHead', base='FCNHead'),
        [FCN, OCR],
        # only the second stage has counted weights
        [dict(FCN, loss_decode=dict(type='CrossEntropyLoss')), dict(OCR, loss_decode=AUTO)],
    ],
    ids=['feature head', 'cascade', 'second stage'],
)
def test_every_kind_of_head_is_looked_at(tmp_path, head):
    write_data(tmp_path, [half(below=2)] * 4)
    loss = dict(type='CombinedWeightedLoss', class_weight='auto')
    with pytest.raises(ValueError, match=ARRIVES):
        train(small_run(tmp_path, [dict(type='Binarise')], loss, head=head))


def test_an_auxiliary_head_is_looked_at(tmp_path):
    write_data(tmp_path, [half(below=2)] * 4)
    cfg = small_run(tmp_path, [dict(type='Binarise')], dict(type='CrossEntropyLoss'))
    cfg.model.auxiliary_head = dict(FCN, num_classes=3, loss_decode=AUTO)
    with pytest.raises(ValueError, match='auxiliary_head.' + ARRIVES):
        train(cfg)


def test_the_subclassified_loss_is_looked_at_with_gradients_that_accumulate(tmp_path):
    write_data(tmp_path, [half(below=2)] * 4)
    loss = dict(type='SubclassifiedLoss', class_weight='auto', num_subclasses=2)
    head = dict(FCN, type='FeatureHead', base='FCNHead')
    cfg = small_run(tmp_path, [dict(type='Binarise')], loss, head=head)
    cfg.optim_wrapper.accumulative_counts = 4
    with pytest.raises(ValueError, match=ARRIVES):
        train(cfg)


def edit_labels(root, label):
    for path in (root / 'labels').glob('*.png'):
        Image.fromarray(label).save(path)


@HOOKS.register_module()
class LabelsAreEdited(Hook):
    """Between the count and the first iteration."""

    priority = 'VERY_LOW'

    def before_train(self, runner):
        root = Path(runner.train_dataloader.dataset.data_root)
        edit_labels(root, half(below=1))


def test_labels_that_are_edited_after_the_count_end_the_run(tmp_path):
    write_data(tmp_path, [half(below=2)] * 4)
    cfg = small_run(tmp_path)
    cfg.custom_hooks.append(dict(type='LabelsAreEdited'))
    with pytest.raises(ValueError, match=ARRIVES):
        train(cfg)


def test_a_file_of_weights_that_has_counts_is_held_against_what_arrives(tmp_path):
    write_data(tmp_path, [half(below=2)] * 4)
    first = small_run(tmp_path)
    train(first)
    edit_labels(tmp_path, half(below=1))
    path = str(tmp_path / 'work_dir' / 'class_weights.json')
    loss = dict(type='WeightedDiceLoss', class_weight=path)
    with pytest.raises(ValueError, match=ARRIVES):
        train(small_run(tmp_path, loss=loss, experiment_name='second'))


@pytest.mark.parametrize('given', [[0.0, 1.0, 1.0], dict(bg=0.0)], ids=['list', 'dict'])
def test_a_list_with_a_0_trains_with_a_note_in_the_log(tmp_path, given):
    write_data(tmp_path, [half(below=2)] * 4)
    loss = dict(type='WeightedCrossEntropyLoss', class_weight=given)
    log = log_of(train(small_run(tmp_path, loss=loss)))
    assert log.count("class 'bg' weighs 0 by the class_weight given, and arrived with 256 of 512 pixels") == 1
    assert 'hardly what was counted' not in log


@pytest.mark.parametrize('sampler', [None, dict(type='RareClassSampler', min_pixels=1, num_workers=0)])
def test_swapped_classes_are_warned_of_once(tmp_path, sampler):
    write_data(tmp_path, [half(rows=1)] * 4)
    cfg = small_run(tmp_path, [dict(type='Swap')], classes=2, iterations=40, sampler=sampler)
    cfg.model.auxiliary_head = dict(FCN, num_classes=2, loss_decode=AUTO)
    log = log_of(train(cfg))
    assert (
        log.count("what was counted.\ndecode_head.loss_decode: class 'bg', label 0, was counted with 960")
        == 1
    )
    assert log.count('what arrives in training is hardly what was counted') == 1
    assert 'order of the classes' in log


def test_a_large_class_that_a_transform_removes_is_warned_of(tmp_path):
    write_data(tmp_path, [half(rows=4), half(below=2, rows=6)] * 2)
    cfg = small_run(tmp_path, [dict(type='Binarise')], iterations=100)
    runner = train(cfg)
    assert (
        log_of(runner).count("class 'stain', label 2, was counted with 192 pixels in 2 of 4 images, but") == 1
    )


def test_an_ignored_label_of_the_head_that_was_not_counted_so_is_warned_of(tmp_path):
    write_data(tmp_path, [half(rows=1)] * 4)
    # nearly all of it ignored after it was counted
    cfg = small_run(tmp_path, [dict(type='Binarise', to=255, least=0)], iterations=20)
    assert log_of(train(cfg)).count('100.00% of the pixels that arrive, in 32 images, are ignored ones') == 1


def test_ordinary_runs_are_left_alone_after_the_first_iterations_and_when_they_end(tmp_path):
    rng = np.random.default_rng(0)
    write_data(tmp_path, [half(below=1 + i % 2, rows=rng.integers(1, 9)) for i in range(12)])
    crop = dict(type='RandomCrop', crop_size=(8, 8), cat_max_ratio=0.75)
    cfg = small_run(tmp_path, [crop], iterations=COMPARED_AFTER[-1] + 2)
    cfg.custom_hooks.append(dict(type='WatchersAreCounted'))
    runner = train(cfg)
    assert runner.watchers == [1] * (COMPARED_AFTER[-1] - 1) + [0] * 3
    assert 'hardly what was counted' not in log_of(runner)
    runner = train(small_run(tmp_path, [crop], iterations=3, experiment_name='short'))
    assert runner.model.decode_head.loss_decode.watchers == []


def test_ordinary_long_tails_that_a_sampler_draws_on_purpose_are_left_alone(tmp_path):
    rng = np.random.default_rng(0)
    labels = [half(rows=rng.integers(1, 3)) for _ in range(40)]
    for label in labels[:2]:
        label[3:5, 3:5] = 2  # 8 of 10,240 pixels
    write_data(tmp_path, labels)
    crop = dict(type='RareClassCrop', crop_size=(8, 8), min_pixels=2)
    sampler = dict(type='RareClassSampler', min_pixels=1, num_workers=0)
    runner = train(small_run(tmp_path, [crop], iterations=100, sampler=sampler))
    assert 'hardly what was counted' not in log_of(runner)


def test_ordinary_long_tails_that_are_pasted_on_purpose_are_left_alone(tmp_path):
    labels = [half(rows=3) for _ in range(40)]
    for label in labels[:2]:
        label[3:5, 3:5] = 2  # 8 of 10,240 pixels, and a third of each image after a paste
    write_data(tmp_path, labels)
    cfg = small_run(tmp_path, iterations=256)
    loader = cfg.train_dataloader
    *steps, pack = loader.dataset.pipeline
    loader.dataset.pipeline = steps
    cache = str(tmp_path / 'cache')
    paste = dict(type='RareClassPaste', prob=1, min_pixels=4, scale=(4.5, 5), max_share=1, cache_dir=cache)
    loader.dataset = dict(type='MultiImageMixDataset', dataset=loader.dataset, pipeline=[paste, pack])
    runner = train(cfg)
    assert 'hardly what was counted' not in log_of(runner)
    record = WeightRecord.from_dict(runner.message_hub.get_info('class_weights'))
    assert record.pixels[2] == 8  # of the annotations as they are


def test_four_accumulated_batches_of_one_train_as_one_batch_of_four(tmp_path):
    write_data(tmp_path, [half(rows=4), half(below=2, rows=1), half(rows=12), half(below=2, rows=8)])
    parameters = {}
    for batch, accumulated in ((4, 1), (1, 4)):
        loss = dict(type='WeightedCrossEntropyLoss', class_weight='auto', divide_by='pixels')
        cfg = small_run(tmp_path, loss=loss, iterations=accumulated, experiment_name=f'batches of {batch}')
        cfg.train_dataloader.update(batch_size=batch, sampler=dict(type='DefaultSampler', shuffle=False))
        cfg.optim_wrapper.update(accumulative_counts=accumulated, optimizer=dict(type='SGD', lr=1.0))
        runner = train(cfg)
        parameters[batch] = torch.cat([p.detach().flatten() for p in runner.model.parameters()])
    torch.testing.assert_close(parameters[1], parameters[4], rtol=1e-5, atol=1e-6)


@HOOKS.register_module()
class WatchersAreCounted(Hook):
    priority = 'VERY_LOW'

    def before_train(self, runner):
        runner.watchers = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        runner.watchers.append(len(runner.model.decode_head.loss_decode.watchers))


def train_on_ranks(text, root):
    trained_on_rank(text)


def test_what_a_head_cannot_do_with_its_losses_is_refused_before_training(tmp_path):
    write_data(tmp_path, [half()] * 4)
    with pytest.raises(TypeError, match=r'decode_head: FCNHead calls its losses .* but BoundaryLoss takes'):
        train(small_run(tmp_path, loss=[AUTO, dict(type='BoundaryLoss')]))


@pytest.mark.slow
def test_a_label_that_one_rank_receives_ends_both_with_the_same_error(tmp_path):
    # the transform finds a label on the image of one rank alone, in the second iteration
    write_data(tmp_path, [half(below=1)] * 3 + [half(below=3)])
    cfg = small_run(tmp_path, [dict(type='Binarise', to=2, least=3)], classes=4)
    cfg.train_dataloader.batch_size = 1
    cfg.train_dataloader.sampler.shuffle = False
    first, second = on_ranks(2, train_on_ranks, cfg.pretty_text, str(tmp_path))
    assert isinstance(first, ValueError), first
    assert str(first) == str(second)
    assert "class 'stain', label 2, was counted with 0 pixels in 0 of 4 images" in str(first)
    assert 'arrived with 128 pixels in 1 of 4 images' in str(first)


@pytest.mark.parametrize('told', [False, True])
def test_a_sampler_that_has_counted_other_labels_than_the_hook_is_named(tmp_path, told):
    write_data(tmp_path, [half(rows=4), half(below=2, rows=6)] * 2)
    names = dict(label_transforms=['Binarise'])
    sampler = dict(type='RareClassSampler', min_pixels=1, num_workers=0, **(names if told else {}))
    cfg = small_run(tmp_path, [dict(type='Binarise')], iterations=1, sampler=sampler)
    cfg.custom_hooks[0].update(names)
    log = log_of(train(cfg))
    message = (
        'the sampler has counted other pixels than ClassWeightHook: crack: 128, here 320; stain: 192, here 0'
    )
    assert log.count(message) == (not told)


def test_a_class_in_half_of_the_images_may_stay_away_where_a_sampler_draws():
    counted = record([70_000, 30_000], [100, 60])
    came = received([1000, 0])
    assert kinds(compare(came, counted, at_random=False)) == []
    assert kinds(compare(came, counted)) == [('warning', 'another share', 1)]


def test_a_large_object_of_a_class_that_few_images_hold_is_chance():
    counted = record([9_999_990, 10], [10_000, 1], num_images=10_000)
    assert compare(received([990, 10], [100, 1], num_images=100), counted) == []
