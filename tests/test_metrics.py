import numpy as np
import pytest
import torch
from mmengine.registry import METRICS
from sklearn.metrics import confusion_matrix


def evaluate(labels, predictions, classes):
    metric = METRICS.build(dict(type='ClassIoUMetric'))
    metric.dataset_meta = dict(classes=classes)
    samples = [
        dict(pred_sem_seg=dict(data=torch.tensor(p)[None]), gt_sem_seg=dict(data=torch.tensor(t)[None]))
        for p, t in zip(predictions, labels, strict=True)
    ]
    metric.process({}, samples)
    return metric.evaluate(len(samples))


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
    assert 'IoU.never' not in metrics
    assert metrics['mIoU'] == pytest.approx(100 * iou.mean(), abs=0.01)
