"""The arithmetic of the metrics, on the pixels of each class in each image, and the file that holds these."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mmseg_imbalance.files import write_atomically

GROUPS = ('head', 'body', 'tail')
SIZES = ('small', 'medium', 'large')
AREAS = ('intersect', 'union', 'pred', 'label')  # in the order of MMSegmentation's IoUMetric


def class_groups(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """The most frequent third of the classes, the middle third and the rarest, most frequent class first.

    If C is no multiple of 3, the first groups have one class more. Of two classes, one is the head and one
    the tail.

    Args:
        pixels: (C,) pixels in the training annotations; a class without any is among the rarest.

    Returns:
        Indices of classes by 'head', 'body', 'tail'.
    """
    order = np.argsort(-np.asarray(pixels), kind='stable')
    number = len(order)
    cuts = [math.ceil(number / 3), number - max(number // 3, int(number > 1))]
    return dict(zip(GROUPS, np.split(order, cuts), strict=True))


def check_groups(groups: object, classes: Sequence[str] | None = None) -> None:
    """Raise a TypeError or ValueError unless these are lists of class names by group, of these classes."""
    kinds = 'thirds, or lists of class names: dict(head=[...], body=[...], tail=[...])'
    lists = isinstance(groups, Mapping) and all(isinstance(g, list | tuple) for g in groups.values())
    if not lists or not all(isinstance(name, str) for members in groups.values() for name in members):
        raise TypeError(f'groups must be {kinds}; got {groups!r}')
    if wrong := sorted(set(groups) - set(GROUPS)):
        raise ValueError(f'groups must be {kinds}; got {wrong}')
    names = [name for members in groups.values() for name in members]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f'a class can be in one of the groups only, but {twice} are named twice')
    if classes is not None and (unknown := sorted(set(names) - set(classes))):
        raise ValueError(f'groups has the classes {unknown}, but the data set has {list(classes)}')


def class_areas(
    pred_label: Tensor, label: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels of each class in intersection, union, prediction and label, (C,) int64 each, on the CPU.

    MMSegmentation's ``intersect_and_union`` with exact counts: ``torch.histc`` counts in float32.

    Args:
        pred_label, label: (H, W) class indices; what is out of range counts for no class.
        num_classes: C.
        ignore_index: pixels of this label are left out.
    """
    valid = label != ignore_index
    pred_label, label = pred_label[valid].long(), label[valid].long()

    def pixels(indices: Tensor) -> Tensor:
        outside = (indices < 0) | (indices >= num_classes)
        return torch.bincount(indices.masked_fill(outside, num_classes), minlength=num_classes + 1)[:-1].cpu()

    intersect, pred, truth = pixels(label[pred_label == label]), pixels(pred_label), pixels(label)
    return intersect, pred + truth - intersect, pred, truth


def class_pairs(pred_label: Tensor, label: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """The entries of the confusion matrix of an image that are not 0, few of C * C: (P, 3) int64 on the CPU.

    A row holds the class of the label, that of the prediction, and the pixels. Arguments as of
    :func:`class_areas`; a pixel whose label or prediction is out of range is in no row.
    """
    both = torch.stack([label.reshape(-1), pred_label.reshape(-1)]).long()
    inside = ((both >= 0) & (both < num_classes)).all(0) & (both[0] != ignore_index)
    pixels = torch.bincount(both[0][inside] * num_classes + both[1][inside], minlength=num_classes**2).cpu()
    pairs = pixels.nonzero()[:, 0]
    return torch.stack([pairs // num_classes, pairs % num_classes, pixels[pairs]], 1)


def confusion_matrix(pairs: Sequence[Tensor], num_classes: int) -> np.ndarray:
    """(C, C) int64 pixels by the class of the label, then of the prediction, from :func:`class_pairs`."""
    matrix = np.zeros((num_classes, num_classes), np.int64)
    for label, pred, pixels in (each.numpy().T for each in pairs):
        matrix[label, pred] += pixels  # no pair twice in an image
    return matrix


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, float64 of their shape; NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def present_mean(values: np.ndarray, percent: float = 100) -> np.ndarray:
    """Mean along the first axis of the values that are not NaN, or of the lowest ``percent`` of them.

    Args:
        values: (N, ...), at least one row.
        percent: above 0 and up to 100; max(1, floor(percent n / 100)) of the n values are taken.

    Returns:
        (...); NaN where there is no value.
    """
    taken = np.maximum(1, np.isfinite(values).sum(0) * percent // 100)
    rank = np.arange(len(values)).reshape(-1, *[1] * (np.ndim(values) - 1))
    return np.where(rank < taken, np.sort(values, axis=0), 0).sum(0) / taken  # NaN is sorted last


def group_scores(
    areas: Mapping[str, np.ndarray], groups: Mapping[str, np.ndarray], resamples: int = 0
) -> dict[str, float]:
    """Means over the classes of each group: IoU, precision, recall, and a 95 % interval of the IoU.

    Args:
        areas: 'intersect', 'union', 'pred', 'label': (N, C) pixels of each class in each image.
        groups: indices of classes, by the name of the group.
        resamples: of the bootstrap that gives the interval; 0: no interval.

    Returns:
        'mIoU.GROUP', 'mPrecision.GROUP', 'mRecall.GROUP', and with resamples 'mIoU.GROUP.low', '.high' and
        those of all classes, 'mIoU.low', 'mIoU.high'; NaN where no class of the group has such a number.
    """
    total = {key: values.sum(0) for key, values in areas.items()}  # (C,)
    iou = ratio(total['intersect'], total['union'])
    scores = {}
    if resamples:
        counts = bootstrap_counts(len(areas['label']), resamples)
        resampled = resampled_iou(counts, areas['intersect'], areas['union'])  # (R, C)
    for suffix, members in {
        '': np.arange(len(iou)),
        **{f'.{name}': m for name, m in groups.items()},
    }.items():
        if suffix:
            scores[f'mIoU{suffix}'] = present_mean(iou[members])
            for key, whole in (('mPrecision', 'pred'), ('mRecall', 'label')):
                scores[key + suffix] = present_mean(ratio(total['intersect'], total[whole])[members])
        if resamples:
            means = present_mean(resampled[:, members].T)
            known = np.isfinite(means)
            low, high = np.percentile(means[known], [2.5, 97.5]) if known.any() else (np.nan, np.nan)
            scores |= {f'mIoU{suffix}.low': low, f'mIoU{suffix}.high': high}
    return scores


def fine_grained_iou(
    intersect: np.ndarray, union: np.ndarray, label: np.ndarray, quantiles: Sequence[float] = ()
) -> dict[str, float]:
    """IoU of single images, averaged over the classes of an image first or over the images of a class first.

    IoU_ic is the IoU of class c in image i. It is defined where the label of the image holds the class. A
    class that is only predicted has no IoU there, but its pixels lower the IoU of the others.
    mIoU_I = mean_i mean_c IoU_ic and mIoU_C = mean_c mean_i IoU_ic.
    The worst cases, such as `mIoU_I_q5`, take mean_i over the lowest q per cent of the images, `mIoU_C_q5`
    over the lowest of the images of each class: max(1, floor(q n / 100)) of n images.

    Args:
        intersect, union, label: (N, C) pixels of each class in each image.
        quantiles: in per cent.

    Source: Wang et al., NeurIPS 2023, https://arxiv.org/abs/2310.19252, mIoU^I, mIoU^C and their worst cases,
    with the choices of its public code for more than two classes; it treats two as foreground and background.
    """
    iou = ratio(intersect, np.where(label > 0, union, 0))  # (N, C)
    scores = {}
    for suffix, percent in (('', 100), *((f'_q{q:g}', q) for q in quantiles)):
        scores[f'mIoU_I{suffix}'] = present_mean(present_mean(iou.T), percent)
        scores[f'mIoU_C{suffix}'] = present_mean(present_mean(iou, percent))
    return scores


def bootstrap_counts(images: int, resamples: int, seed: int = 0) -> np.ndarray:
    """How often each image is in each bootstrap sample: (resamples, images) int64, rows sum to `images`.

    The images of a sample are drawn with replacement. The generator is this function's own: the same
    arguments give the same samples, which a paired comparison needs, and no other random number changes.
    """
    drawn = np.random.default_rng(seed).integers(images, size=(resamples, images))
    drawn += images * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * images).reshape(resamples, images)


def resampled_iou(counts: np.ndarray, intersect: np.ndarray, union: np.ndarray) -> np.ndarray:
    """(R, C) IoU of each class in the samples ``counts`` (R, N) of images with (N, C) pixels; NaN if none."""
    # floats are exact up to 2^53 pixels, and their product is the fast one
    return ratio(*(counts.astype(float) @ areas.astype(float) for areas in (intersect, union)))


def save_image_scores(path: str | os.PathLike[str], **scores: ArrayLike) -> None:
    """Write the arrays that :func:`load_image_scores` returns, all of them by name.

    Raises:
        OSError: the file cannot be written.
    """
    with write_atomically(path, 'wb') as file:
        np.savez_compressed(file, **{name: np.asarray(values) for name, values in scores.items()})


def load_image_scores(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The ``image_scores.npz`` that ImbalanceIoUMetric writes beside the log of an evaluation.

    Returns:
        N images in the order of their paths, C classes. ``images`` (N,) file names, whole paths where names
        are not unique; ``classes`` (C,) names; ``intersect``, ``union``, ``pred``, ``label`` (N, C) int64
        pixels; ``pixels`` (C,) int64 of the training annotations, (0,) if they are not known; ``group`` (C,)
        'head', 'body', 'tail' or ''; ``confusion`` (C, C) int64 pixels of all images by the class of the
        label, then by that predicted, (0, 0) in a file of an earlier version.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or another kind of file.
    """
    try:
        with open(path, 'rb') as file, np.load(file, allow_pickle=False) as archive:
            scores = {name: archive[name] for name in ('images', 'classes', *AREAS, 'pixels', 'group')}
            scores['confusion'] = archive['confusion'] if 'confusion' in archive else np.empty((0, 0), int)
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile and zlib have their own
        raise ValueError(
            f'{path} cannot be read as image scores ({type(error).__name__}: {error}); test the model again '
            'with ImbalanceIoUMetric'
        ) from error
    n, c = len(scores['images']), len(scores['classes'])
    expected = dict.fromkeys(AREAS, (n, c)) | dict(group=(c,), pixels=(min(c, len(scores['pixels'])),))
    expected['confusion'] = (min(c, len(scores['confusion'])),) * 2
    if wrong := {k: scores[k].shape for k, shape in expected.items() if scores[k].shape != shape}:
        raise ValueError(
            f'{path} holds {n} images and {c} classes, but arrays of {wrong}; test the model again with '
            'ImbalanceIoUMetric'
        )
    return scores
