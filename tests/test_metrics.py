from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import recoloured
from mmengine.evaluator import Evaluator
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import METRICS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.evaluation import IoUMetric
from mmseg.structures import SegDataSample
from PIL import Image
from scipy import ndimage
from scripted import config, log_of, run, write_images
from sklearn.metrics import confusion_matrix, f1_score, jaccard_score, precision_score, recall_score

from mmseg_imbalance.counting import count_classes
from mmseg_imbalance.datasets import CamVidDataset
from mmseg_imbalance.scores import class_areas, load_image_scores

CLASSES = ('road', 'car', 'pole', 'sign', 'never')
GROUPS = dict(head=['road'], body=['car', 'never'], tail=['pole', 'sign'])
SMALL = 'segformer/segformer_mit-b0-small-combined_1xb8-2k_camvid-240x180'
TWO_HEADS = 'deeplabv3/deeplabv3_r18-d8-small-combined_1xb8-2k_camvid-240x180'


def samples(labels, predictions, names=None):
    made = [
        dict(pred_sem_seg=dict(data=torch.tensor(p)[None]), gt_sem_seg=dict(data=torch.tensor(t)[None]))
        for p, t in zip(predictions, labels, strict=True)
    ]
    for sample, name in zip(made, names or (), strict=False):
        sample['img_path'] = name
    return made


def evaluate(labels, predictions, classes, type='ClassIoUMetric', names=None, **options):
    metric = METRICS.build(dict(type=type, **options))
    metric.dataset_meta = dict(classes=classes)
    made = samples(labels, predictions, names)
    metric.process({}, made)
    return metric.evaluate(len(made))


def imbalance(labels, predictions, groups=GROUPS, **options):
    return evaluate(labels, predictions, CLASSES, 'ImbalanceIoUMetric', groups=groups, **options)


def scenes_of(images, seed=0, size=(23, 31)):
    """Labels with blobs of the first four of CLASSES, one of them in few images, and predictions."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((images, *size), np.int64)
    for label in labels:
        for c, times in ((1, 4), (2, 3), (3, rng.integers(0, 2))):
            for _ in range(times):
                y, x = rng.integers(0, size[0] - 3), rng.integers(0, size[1] - 3)
                label[y : y + rng.integers(1, 9), x : x + rng.integers(1, 9)] = c
    predictions = np.where(rng.random(labels.shape) < 0.3, rng.integers(0, 4, labels.shape), labels)
    labels[:, :2] = 255
    return labels, predictions


def same(metrics, others):
    """The same keys in the same order, the same numbers or no number."""
    assert list(metrics) == list(others)
    np.testing.assert_array_equal(list(metrics.values()), list(others.values()))


def test_the_iou_of_each_class_is_that_of_the_confusion_matrix():
    rng = np.random.default_rng(0)
    classes = ('a', 'b', 'c', 'never')
    labels, predictions = rng.integers(0, 3, (2, 2, 13, 17))
    labels[:, :3] = 255
    metrics = evaluate(labels, predictions, classes)
    valid = labels != 255
    matrix = confusion_matrix(labels[valid], predictions[valid])
    iou = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    for name, value in zip(classes, iou, strict=False):
        assert metrics[f'IoU.{name}'] == pytest.approx(100 * value, abs=0.01)
    assert np.isnan(metrics['IoU.never'])  # the key is there at every evaluation
    assert metrics['mIoU'] == pytest.approx(100 * iou.mean(), abs=0.01)


@pytest.mark.parametrize('iou_metrics', [['mIoU'], ['mIoU', 'mDice', 'mFscore']])
def test_the_keys_of_the_framework_come_first_with_its_values(iou_metrics):
    labels, predictions = scenes_of(7)
    theirs = evaluate(labels, predictions, CLASSES, 'mmseg.IoUMetric', iou_metrics=iou_metrics)
    ours = imbalance(labels, predictions, iou_metrics=iou_metrics)
    assert list(ours)[: len(theirs)] == list(theirs)
    assert [ours[key] for key in theirs] == pytest.approx(list(theirs.values()), abs=1e-5)  # of float32
    named = evaluate(labels, predictions, CLASSES, iou_metrics=iou_metrics)
    same(dict(list(ours.items())[: len(named)]), named)
    prefixed = imbalance(labels, predictions, iou_metrics=iou_metrics, prefix='val')
    same(prefixed, {f'val/{key}': value for key, value in ours.items()})


def test_group_means_are_those_of_sklearn():
    labels, predictions = scenes_of(6)
    metrics = imbalance(labels, predictions)
    valid = labels != 255
    truth, found = labels[valid], predictions[valid]
    for group, members in dict(head=[0], body=[1], tail=[2, 3]).items():  # class 4 is nowhere
        for key, score in dict(mIoU=jaccard_score, mPrecision=precision_score, mRecall=recall_score).items():
            expected = 100 * score(truth, found, labels=members, average=None).mean()
            assert metrics[f'{key}.{group}'] == pytest.approx(expected, abs=0.006)


def test_dice_is_sklearns_over_the_images_together_and_one_by_one():
    labels, predictions = scenes_of(6)
    metrics = imbalance(labels, predictions, iou_metrics=['mIoU', 'mDice'], quantiles=[50])
    valid = labels != 255
    dice = f1_score(labels[valid], predictions[valid], labels=range(4), average=None)
    of_images = np.full((6, 4), np.nan)
    for values, label, prediction, known in zip(of_images, labels, predictions, valid, strict=True):
        truth = label[known]
        held = np.unique(truth)
        values[held] = f1_score(truth, prediction[known], labels=held, average=None)
    for c, name in enumerate(CLASSES[:4]):
        assert metrics[f'Dice.{name}'] == pytest.approx(100 * dice[c], abs=0.006)
        assert metrics[f'Dice_C.{name}'] == pytest.approx(100 * np.nanmean(of_images[:, c]), abs=0.006)
    assert np.isnan([metrics['Dice.never'], metrics['Dice_C.never']]).all()
    assert metrics['mDice'] == pytest.approx(100 * dice.mean(), abs=0.006)
    assert metrics['mDice.tail'] == pytest.approx(100 * dice[2:].mean(), abs=0.006)
    assert metrics['mDice_C'] == pytest.approx(100 * np.nanmean(of_images, 0).mean(), abs=0.006)
    assert metrics['mDice_I'] == pytest.approx(100 * np.nanmean(of_images, 1).mean(), abs=0.006)
    worst = np.sort(np.nanmean(of_images, 1))[:3]
    assert metrics['mDice_I_q50'] == pytest.approx(100 * worst.mean(), abs=0.006)


def test_a_class_only_predicted_has_a_dice_of_0_and_counts_in_no_group():
    labels = np.zeros((1, 4, 5), int)
    predictions = labels.copy()
    predictions[0, 0] = 1
    groups = dict(tail=['road', 'car', 'pole'])
    metrics = imbalance(labels, predictions, groups, iou_metrics=['mDice'])
    road = 100 * 2 * 15 / 35
    assert metrics['Dice.car'] == 0
    assert metrics['mDice'] == pytest.approx(road / 2, abs=0.006)  # as in MMSegmentation
    assert metrics['mDice.tail'] == metrics['mDice_C'] == pytest.approx(road, abs=0.006)
    assert np.isnan(metrics['Dice_C.car'])


def test_a_class_only_predicted_has_an_iou_of_0_and_counts_in_no_group():
    labels = np.zeros((1, 4, 5), int)
    predictions = labels.copy()
    predictions[0, 0] = 1
    metrics = imbalance(labels, predictions, groups=dict(tail=['road', 'car', 'pole']))
    assert metrics['IoU.car'] == 0
    assert metrics['mIoU'] == pytest.approx((75 + 0) / 2)  # as in MMSegmentation
    # elsewhere it costs road alone
    assert metrics['mIoU.tail'] == metrics['mRecall.tail'] == 75
    assert metrics['mPrecision.tail'] == 100
    assert metrics['mIoU_I'] == metrics['mIoU_C'] == 75


def test_what_has_no_value_is_nan_and_a_group_without_classes_has_no_keys():
    labels, predictions = scenes_of(2)
    metrics = imbalance(labels, predictions, groups=dict(head=['road'], tail=['never']))
    assert np.isfinite(metrics['mIoU.head'])
    of_never = {key for key in metrics if 'tail' in key or 'never' in key}
    assert {'IoU.never', 'mIoU.tail', 'mRecall.tail', 'mIoU.tail.low', 'Recall.small.never'} <= of_never
    assert np.isnan([metrics[key] for key in of_never]).all()
    assert not [key for key in metrics if 'body' in key]


@pytest.mark.parametrize(
    ('groups', 'error', 'message'),
    [
        ('halves', TypeError, "'halves'"),
        (dict(tail='car'), TypeError, "'car'"),
        (dict(middle=['car']), ValueError, 'middle'),
        (dict(head=['car'], tail=['pole', 'car']), ValueError, r"\['car'\] are named twice"),
        (dict(tail=[3]), TypeError, r'\[3\]'),
        (dict(tail=None), TypeError, 'None'),
        (['car'], TypeError, r"\['car'\]"),
    ],
)
def test_wrong_groups_are_refused_when_the_metric_is_built(groups, error, message):
    with pytest.raises(error, match=message):
        METRICS.build(dict(type='ImbalanceIoUMetric', groups=groups))


def test_groups_of_unknown_classes_are_refused_as_soon_as_the_data_set_is_known(tmp_path):
    metric = METRICS.build(dict(type='ImbalanceIoUMetric', groups=dict(head=['lorry'])))
    with pytest.raises(ValueError, match=r"\['lorry'\], but the data set has \['road', 'car'"):
        metric.dataset_meta = dict(classes=CLASSES)
    data = write_images(tmp_path / 'data', np.zeros((2, 6, 8)))
    runner = run(config(data, val_evaluator=dict(groups=dict(head=['lorry'])), custom_hooks=[]), 'lorry')
    with pytest.raises(ValueError, match=r"\['lorry'\], but the data set has \['road', 'pole'"):
        runner.train()
    assert runner.iter == 0


@pytest.mark.parametrize(
    'option',
    [
        dict(quantiles=[0]),
        dict(quantiles=[101]),
        dict(object_areas=(9, 4)),
        dict(blocks='('),
        dict(blocks=0),
        dict(iou_metrics=['mIou']),
    ],
)
def test_options_out_of_range_are_named(option):
    with pytest.raises(ValueError, match=f'{next(iter(option))}.*got'):
        METRICS.build(dict(type='ImbalanceIoUMetric', **option))


def test_options_that_mmsegmentations_metric_would_swallow_are_named():
    with pytest.raises(TypeError, match=r"ImbalanceIoUMetric has no option \['group'\]; .*'nan_to_num'"):
        METRICS.build(dict(type='ImbalanceIoUMetric', group='thirds'))


def test_labels_that_are_neither_classes_nor_ignored_are_named_once(logger, tmp_path):
    labels, predictions = scenes_of(3)
    labels[1, :3] = 77
    imbalance(labels, predictions, names=['a.png', 'b.png', 'c.png'])
    log = (tmp_path / 'run.log').read_text()
    assert log.count('labels of b.png are neither one of the 5 classes nor the ignored label 255') == 1
    assert '77' in log
    assert 'labels of a.png' not in log


def counted_by_numpy(prediction, label, classes, ignored):
    valid = label != ignored
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (label[valid], prediction[valid]), 1)
    right, pred, truth = np.diag(matrix), matrix.sum(0), matrix.sum(1)
    return right, pred + truth - right, pred, truth


@pytest.mark.parametrize('dtype', [torch.int64, torch.uint8, torch.int32])
def test_pixels_are_those_of_mmsegmentation_and_numpy(dtype):
    labels, predictions = scenes_of(1)
    arguments = torch.tensor(predictions[0], dtype=dtype), torch.tensor(labels[0]).to(dtype), 5, 255
    ours, theirs = class_areas(*arguments), IoUMetric.intersect_and_union(*arguments)
    expected = counted_by_numpy(predictions[0], labels[0], 5, 255)
    for mine, other, numbers in zip(ours, theirs, expected, strict=True):
        assert mine.dtype == torch.int64
        assert mine.tolist() == other.tolist() == numbers.tolist()


@pytest.mark.slow
def test_more_pixels_than_float32_can_count_are_counted_exactly():
    # 2^24 right pixels and a twentieth of them missed
    labels = np.zeros((1, 1050 * 2**14 // 1000 + 1, 1024), np.uint8)
    predictions = labels.copy()
    right = 2**14
    predictions[:, right:] = 1
    iou = 100 * right / labels.shape[1]
    metrics = evaluate(labels, predictions, ('road', 'car'))
    assert iou == pytest.approx(95.24, abs=0.01)
    assert metrics['IoU.road'] == metrics['aAcc'] == round(iou, 2)
    assert metrics['mIoU'] == round(iou / 2, 2)
    assert evaluate(labels, predictions, ('road', 'car'), 'mmseg.IoUMetric')['aAcc'] == 100  # of histc


def test_sums_over_many_images_are_exact(tmp_path):
    names = ('road', 'car')
    metric = METRICS.build(dict(type='ImbalanceIoUMetric', groups=dict(tail=['car']), object_areas=None))
    metric.dataset_meta = dict(classes=names)
    huge = 2**40
    for right in (huge, 1, 1, 1):  # the last ones vanish in float32
        pred = torch.tensor([right, 3 if right == 1 else 0])
        truth = torch.tensor([right, 4 if right == 1 else 0])
        rows = torch.stack([pred.clone(), truth.clone(), pred, truth], 1)
        pairs = torch.empty((0, 3), dtype=torch.int64)
        metric.results.append((f'{len(metric.results)}', rows, pairs))
    metrics = metric.evaluate(4)
    assert metrics['IoU.car'] == metrics['mIoU.tail'] == 75
    assert metrics['mIoU'] == 87.5


def evaluator(logger, prefixes):
    made = Evaluator([dict(type='ImbalanceIoUMetric', groups=GROUPS, prefix=name) for name in prefixes])
    made.dataset_meta = dict(classes=CLASSES)
    return made


@pytest.mark.parametrize(
    ('prefixes', 'files'),
    [
        ([None], ['image_scores.npz']),
        (['val'], ['image_scores_val.npz']),
        ([None, 'tta'], ['image_scores.npz', 'image_scores_tta.npz']),
        (['a/b', 'a b', 'a_b'], ['image_scores_a%2Fb.npz', 'image_scores_a%20b.npz', 'image_scores_a_b.npz']),
    ],
)
def test_metrics_of_one_evaluator_write_files_of_their_own(logger, tmp_path, prefixes, files):
    labels, predictions = scenes_of(2)
    for _ in range(2):  # evaluators one after the other, as of validation and test, write the same files
        both = evaluator(logger, prefixes)
        for number, metric in enumerate(both.metrics):
            metric.process({}, samples(labels, np.full_like(predictions, number)))
        both.evaluate(2)
    assert sorted(path.name for path in tmp_path.glob('*.npz')) == sorted(files)
    for number, file in enumerate(files):
        assert np.flatnonzero(load_image_scores(tmp_path / file)['pred'].sum(0)).tolist() == [number]


def test_an_image_without_labels_is_left_out():
    labels, predictions = scenes_of(4)
    blank = np.full_like(labels[:1], 255)
    without, with_blank = (
        imbalance(t, p)
        for t, p in (
            (labels, predictions),
            (np.concatenate([labels, blank]), np.concatenate([predictions, blank - 255])),
        )
    )
    same(with_blank, without)


def recall_by_scipy(labels, predictions, limits):
    """{(size, class): (right, all) pixels} of the objects that scipy finds."""
    found = {}
    for label, prediction in zip(labels, predictions, strict=True):
        for c in range(4):
            ids, number = ndimage.label(label == c, np.ones((3, 3)))
            for k in range(1, number + 1):
                piece = ids == k
                area = piece.sum()
                size = 'small' if area < limits[0] else 'medium' if area < limits[1] else 'large'
                right, pixels = found.get((size, c), (0, 0))
                found[size, c] = (right + (piece & (prediction == c)).sum(), pixels + area)
    return found


def test_recall_by_object_size_is_that_of_scipys_objects():
    labels, predictions = scenes_of(5)
    labels[0, 5:7, 5:7] = labels[0, 7:9, 7:9] = 3  # joined by their corners: 8 pixels, not small
    limits = (7, 30)
    metrics = imbalance(labels, predictions, object_areas=limits)
    expected = recall_by_scipy(labels, predictions, limits)
    for size in ('small', 'medium', 'large'):
        recalls = {c: 100 * r / n for (s, c), (r, n) in expected.items() if s == size}
        assert len(recalls) > 1 or size == 'large'
        for c, value in recalls.items():
            assert metrics[f'Recall.{size}.{CLASSES[c]}'] == pytest.approx(value, abs=0.006)
        assert metrics[f'mRecall.{size}'] == pytest.approx(np.mean(list(recalls.values())), abs=0.006)
        known = [key for key, value in metrics.items() if key.startswith(f'Recall.{size}.') and value >= 0]
        assert len(known) == len(recalls)


def test_sizes_begin_at_their_limits():
    labels = np.full((1, 40, 40), 255)
    labels[0, 0, :3], labels[0, 10, :4], labels[0, 20, :9], labels[0, 30, :10] = 1, 1, 2, 2
    metrics = imbalance(labels, np.ones_like(labels), object_areas=(4, 10))
    assert {key: x for key, x in metrics.items() if key.startswith('Recall.') and x >= 0} == {
        'Recall.small.car': 100,
        'Recall.medium.car': 100,
        'Recall.medium.pole': 0,
        'Recall.large.pole': 0,
    }


def test_labels_out_of_range_are_no_objects():
    # 5 is no class here and not ignored either, as unlabelled CamVid is without a mapping
    labels, predictions = scenes_of(2)
    outside = labels.copy()
    outside[outside == 255] = 5
    other = imbalance(outside, predictions, object_areas=(7, 30), ignore_index=7)
    for key, value in imbalance(labels, predictions, object_areas=(7, 30)).items():
        if 'Recall' in key:
            np.testing.assert_equal(other[key], value)


def test_switched_off_parts_have_no_keys():
    labels, predictions = scenes_of(3)
    metrics = imbalance(labels, predictions, groups={}, quantiles=(), object_areas=None)
    names = evaluate(labels, predictions, CLASSES)
    assert set(metrics) - set(names) == {'mIoU.low', 'mIoU.high', 'mIoU_I', 'mIoU_C'}


def test_no_global_random_number_is_drawn():
    labels, predictions = scenes_of(3)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    expected = np.random.random(), torch.rand(()).item()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    imbalance(labels, predictions)
    assert (np.random.random(), torch.rand(()).item()) == expected  # noqa: NPY002


def test_intervals_are_over_images_or_blocks_of_them():
    labels, predictions = scenes_of(12)
    names = [f'images/seq{n // 2}_{n}.png' for n in range(12)]
    metrics = imbalance(labels, predictions, names=names)
    of_blocks = imbalance(labels, predictions, names=names, blocks=r'seq\d+')
    pairs = [np.concatenate(x) for x in zip(labels[::2], labels[1::2], strict=True)]
    found = [np.concatenate(x) for x in zip(predictions[::2], predictions[1::2], strict=True)]
    joined = imbalance(np.stack(pairs), np.stack(found))
    for key in ('mIoU', 'mIoU.tail'):
        assert metrics[f'{key}.low'] < metrics[key] < metrics[f'{key}.high']
        for end in ('low', 'high'):
            assert of_blocks[f'{key}.{end}'] == joined[f'{key}.{end}'] != metrics[f'{key}.{end}']
    assert {key: value for key, value in of_blocks.items() if key[-3:] not in ('low', 'igh')} == {
        key: value for key, value in metrics.items() if key[-3:] not in ('low', 'igh')
    } | {key: pytest.approx(value, nan_ok=True) for key, value in metrics.items() if np.isnan(value)}


@pytest.mark.parametrize(
    ('blocks', 'message'),
    [
        (
            'nowhere',
            "blocks finds 'nowhere' in no path of an image, such as a/0.png. Intervals are over images",
        ),
        ('^a', 'all 3 images are of one block: there are no intervals'),
    ],
)
def test_blocks_that_cannot_serve_are_a_warning_given_once(logger, tmp_path, blocks, message):
    labels, predictions = scenes_of(3)
    metric = METRICS.build(dict(type='ImbalanceIoUMetric', groups=GROUPS, blocks=blocks))
    metric.dataset_meta = dict(classes=CLASSES)
    for _ in range(2):
        metric.process({}, samples(labels, predictions, [f'a/{n}.png' for n in range(3)]))
        metrics = metric.evaluate(3)
    assert (tmp_path / 'run.log').read_text().count(message) == 1
    assert np.isnan(metrics['mIoU.low']) == (blocks == '^a')


@pytest.mark.parametrize('options', [{}, dict(nan_to_num=0)])
def test_miou_is_mmsegmentations_and_what_a_class_without_labels_costs_is_said_once(
    logger, tmp_path, options
):
    labels, predictions = scenes_of(9)
    predictions[0, 5, 5] = 4  # of no label
    metric = METRICS.build(dict(type='ImbalanceIoUMetric', groups=GROUPS, **options))
    metric.dataset_meta = dict(classes=CLASSES)
    for _ in range(2):
        metric.process({}, samples(labels, predictions))
        metrics = metric.evaluate(9)
    theirs = evaluate(labels, predictions, CLASSES, 'mmseg.IoUMetric', **options)
    assert metrics['mIoU'] == theirs['mIoU']
    assert metrics['mIoU.low'] < metrics['mIoU'] < metrics['mIoU.high']
    log = (tmp_path / 'run.log').read_text()
    line = "['never'] are predicted, though no label holds them. As in MMSegmentation, each counts as 0 in "
    without = np.mean([metrics[f'IoU.{name}'] for name in CLASSES[:4]])
    assert log.count(f'{line}mIoU, which is {without:.2f} without them') == 1


def test_batches_and_the_order_of_the_images_do_not_matter():
    labels, predictions = scenes_of(9)
    names = [f'{i % 3}/{i}.png' for i in range(9)]
    expected = imbalance(labels, predictions, names=names)
    order = np.random.default_rng(0).permutation(9)
    metric = METRICS.build(dict(type='ImbalanceIoUMetric', groups=GROUPS))
    metric.dataset_meta = dict(classes=CLASSES)
    made = samples(labels[order], predictions[order], [names[i] for i in order])
    for batch in (made[:4], made[4:5], made[5:]):
        metric.process({}, batch)
    same(metric.evaluate(9), expected)
    assert not metric.results


def test_only_integers_of_images_times_classes_are_kept():
    labels, predictions = scenes_of(2)
    metric = METRICS.build(dict(type='ImbalanceIoUMetric', groups=GROUPS))
    metric.dataset_meta = dict(classes=CLASSES)
    metric.process({}, samples(labels, predictions))
    for name, rows, pairs in metric.results:
        assert (name, rows.shape, rows.dtype) == ('', (5, 10), torch.int64)
        assert (pairs.shape[1], pairs.dtype) == (3, torch.int64)
        assert len(pairs) <= 16  # the classes of two labels, not all pairs


def test_format_only_writes_predictions_and_no_scores(tmp_path):
    metric = METRICS.build(
        dict(type='ImbalanceIoUMetric', format_only=True, output_dir=str(tmp_path / 'out'))
    )
    metric.dataset_meta = dict(classes=CLASSES)
    sample = SegDataSample(pred_sem_seg=PixelData(data=torch.full((1, 4, 6), 3)))
    metric.process({}, [sample.to_dict() | dict(img_path='a/b.png')])
    assert metric.evaluate(1) == {}
    assert np.array_equal(Image.open(tmp_path / 'out/b.png'), np.full((4, 6), 3))


@pytest.fixture
def logger(tmp_path):
    """A logger with a file, as a runner makes one."""
    made = MMLogger.get_instance(tmp_path.name, log_file=str(tmp_path / 'run.log'))
    yield made
    MMLogger._instance_dict.pop(tmp_path.name)


@pytest.fixture
def no_runner():
    """Message hubs of other tests are out of sight."""
    kept = dict(MessageHub._instance_dict)
    MessageHub._instance_dict.clear()
    yield
    MessageHub._instance_dict.clear()
    MessageHub._instance_dict.update(kept)


def test_the_counts_of_the_images_are_written_beside_the_log(logger, tmp_path):
    labels, predictions = scenes_of(3)
    metrics = imbalance(labels, predictions, names=['x/c.png', 'x/a.png', 'y/b.png'])
    scores = load_image_scores(tmp_path / 'image_scores.npz')
    assert scores['images'].tolist() == ['a.png', 'c.png', 'b.png']  # by path
    assert scores['classes'].tolist() == list(CLASSES)
    assert scores['group'].tolist() == ['head', 'body', 'tail', 'tail', 'body']
    order = [1, 0, 2]
    for key, theirs in zip(
        ('intersect', 'union', 'pred', 'label'),
        zip(
            *(
                IoUMetric.intersect_and_union(torch.tensor(predictions[i]), torch.tensor(labels[i]), 5, 255)
                for i in order
            ),
            strict=True,
        ),
        strict=True,
    ):
        assert scores[key].dtype == np.int64
        assert np.array_equal(scores[key], torch.stack(theirs).long())
    assert {file.name for file in tmp_path.iterdir()} == {'run.log', 'image_scores.npz'}
    table = (tmp_path / 'run.log').read_text()
    for word in ('tail', 'small', '95 % interval', f'{metrics["mIoU.tail"]:.2f}'):
        assert word in table


def test_the_confusion_of_all_images_is_written_too(logger, tmp_path):
    labels, predictions = scenes_of(4)
    labels[0, 5, :4], predictions[1, 6, 0] = (7, -1, 255, 254), 1
    imbalance(labels, predictions)
    valid = labels != 255
    valid &= (labels >= 0) & (labels < 5)
    expected = confusion_matrix(labels[valid], predictions[valid], labels=range(5))
    confusion = load_image_scores(tmp_path / 'image_scores.npz')['confusion']
    assert confusion.dtype == np.int64
    assert np.array_equal(confusion, expected)
    assert confusion[0, 1] != confusion[1, 0]


def test_file_names_that_are_not_unique_are_written_whole(logger, tmp_path):
    labels, predictions = scenes_of(2)
    for _ in range(2):  # the second overwrites
        imbalance(labels, predictions, names=['y/a.png', 'x/a.png'])
    assert load_image_scores(tmp_path / 'image_scores.npz')['images'].tolist() == ['x/a.png', 'y/a.png']


def test_a_file_that_cannot_be_written_is_a_warning(logger, tmp_path):
    (tmp_path / 'image_scores.npz').mkdir()
    labels, predictions = scenes_of(2)
    assert 'mIoU.tail' in imbalance(labels, predictions)
    assert 'image_scores.npz cannot be written' in (tmp_path / 'run.log').read_text()
    assert {file.name for file in tmp_path.iterdir()} == {'run.log', 'image_scores.npz'}


def test_thirds_without_a_runner_are_left_out_with_one_warning(logger, no_runner, tmp_path):
    labels, predictions = scenes_of(2)
    metric = METRICS.build(dict(type='ImbalanceIoUMetric'))
    metric.dataset_meta = dict(classes=CLASSES)
    for _ in range(2):
        metric.process({}, samples(labels, predictions))
        metrics = metric.evaluate(2)
    assert 'mIoU_I' in metrics
    assert 'mRecall.small' in metrics
    assert not [key for key in metrics if 'tail' in key]
    log = (tmp_path / 'run.log').read_text()
    assert log.count('ImbalanceIoUMetric cannot') == log.count('there is no runner') == 1
    assert 'groups=dict(head=[NAME' in log
    scores = load_image_scores(tmp_path / 'image_scores.npz')
    assert (scores['pixels'].size, set(scores['group'])) == (0, {''})


@pytest.mark.parametrize('watch', [True, False])
def test_a_rank_that_is_gone_ends_the_evaluation(monkeypatch, watch):
    """It is no reason to leave the groups out: the evaluation cannot go on."""

    def lost(*_, **__):
        raise RuntimeError('[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711')

    monkeypatch.setattr('mmseg_imbalance.metrics.training_frequency', lost)
    metric = METRICS.build(dict(type='ImbalanceIoUMetric'))
    metric.dataset_meta = dict(classes=CLASSES)
    metric.process({}, samples(*scenes_of(2)))
    with pytest.raises(RuntimeError, match='Connection closed by peer'):
        metric.expect('mIoU.tail') if watch else metric.evaluate(2)


def validated(cfg):
    runner = Runner.from_cfg(cfg)
    return runner, runner.val()


def test_a_runner_validates_with_thirds_of_its_training_annotations(small_config):
    cfg = small_config(SMALL, val_evaluator=dict(type='ImbalanceIoUMetric'))
    runner, metrics = validated(cfg)
    frequency = count_classes(runner.build_dataloader(cfg.train_dataloader).dataset)
    scores = load_image_scores(Path(runner._log_dir, 'image_scores.npz'))
    assert scores['images'].tolist() == ['0.jpg', '1.jpg']
    assert np.array_equal(scores['pixels'], frequency.pixels)
    order = np.argsort(-frequency.pixels, kind='stable')
    assert scores['group'][order].tolist() == ['head'] * 4 + ['body'] * 4 + ['tail'] * 3
    total = {key: scores[key].sum(0) for key in ('intersect', 'union', 'label')}
    iou = total['intersect'] / total['union']
    assert metrics['mIoU'] == pytest.approx(100 * np.nanmean(iou), abs=0.006)
    assert metrics['mIoU.tail'] == pytest.approx(100 * np.nanmean(iou[order[8:]]), abs=0.006)
    assert np.isnan(metrics['mIoU.low'])  # CamVid's images are in blocks of 20, and here are two
    log = log_of(runner)
    assert 'all 2 images are of one block: there are no intervals' in log
    assert 'mRecall.small: ' in log  # logged as every other number
    assert 'ImbalanceIoUMetric cannot' not in log


def test_the_counts_that_the_hook_has_kept_in_its_own_folder_are_found(small_config, tmp_path, monkeypatch):
    monkeypatch.setenv('MMSEG_IMBALANCE_CACHE', str(tmp_path / 'other'))
    cfg = small_config(SMALL, val_evaluator=dict(type='ImbalanceIoUMetric'))
    cfg.custom_hooks = [dict(type='ClassWeightHook', cache_dir=str(tmp_path / 'counts'))]
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert len(list((tmp_path / 'counts').iterdir())) == 1
    assert not (tmp_path / 'other').exists()
    scores = load_image_scores(Path(runner._log_dir, 'image_scores.npz'))
    assert scores['pixels'].sum() > 0


@pytest.mark.parametrize('tta', [False, True])
def test_training_pixels_are_counted_as_the_last_head_sees_them(
    small_config, camvid, logger, no_runner, tmp_path, tta
):
    cfg = small_config(TWO_HEADS)
    # without a pixel of 255, which would be out of range then
    cfg.train_dataloader.dataset.data_root = recoloured(camvid, tmp_path / 'camvid', 11)
    cfg.model.decode_head = [cfg.model.decode_head, cfg.model.decode_head | dict(ignore_index=3)]
    if tta:
        cfg.model = dict(type='SegTTAModel', module=cfg.model)
    MessageHub.get_instance(tmp_path.name).update_info('cfg', cfg.pretty_text)
    labels, predictions = scenes_of(2)
    with DefaultScope.overwrite_default_scope('mmseg'):
        evaluate(labels, predictions, CamVidDataset.METAINFO['classes'], 'ImbalanceIoUMetric')
    scores = load_image_scores(tmp_path / 'image_scores.npz')
    assert np.flatnonzero(scores['pixels'] == 0).tolist() == [3]
    assert scores['group'][3] == 'tail'


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (dict(train_dataloader=None, train_cfg=None, optim_wrapper=None), 'no train_dataloader'),
        ({'train_dataloader.dataset.data_root': '/nowhere'}, '/nowhere'),
        ({'train_dataloader.dataset.metainfo': dict(classes=('sky', 'road'))}, "classes ['sky', 'road']"),
        ({'train_dataloader.dataset.type': 'NoSuchDataset'}, 'NoSuchDataset'),
    ],
)
def test_training_data_that_cannot_be_counted_cost_the_groups_only(small_config, change, reason):
    cfg = small_config(SMALL, val_evaluator=dict(type='ImbalanceIoUMetric'))
    for key, value in change.items():
        if '.' in key:
            cfg.merge_from_dict({key: value})
        else:
            cfg[key] = value
    cfg.pop('param_scheduler')
    if 'train_cfg' not in change:
        cfg.custom_hooks = []
    runner, metrics = validated(cfg)
    assert 'mIoU_C_q5' in metrics
    assert 'mIoU.low' in metrics
    assert not [key for key in metrics if 'tail' in key]
    warning = next(line for line in log_of(runner).splitlines() if 'ImbalanceIoUMetric cannot' in line)
    assert 'WARNING' in warning
    assert reason in log_of(runner)


def test_with_nan_to_num_the_mean_lies_inside_its_interval():
    labels, predictions = scenes_of(12)  # 'never' is in neither
    metrics = imbalance(labels, predictions, nan_to_num=0)
    assert metrics['mIoU.low'] < metrics['mIoU'] < metrics['mIoU.high']


def test_recall_by_size_of_more_than_256_classes():
    names = tuple(f'c{n}' for n in range(300))
    labels = np.full((1, 8, 9), 255)
    labels[0, :4] = 257
    metrics = evaluate(labels, labels, names, 'ImbalanceIoUMetric', groups=dict(tail=['c257']))
    assert metrics['Recall.small.c257'] == 100
    assert np.isnan(metrics['Recall.small.c1'])
