"""The arithmetic of the metrics, on the pixels of each class in each image, and the file that holds these."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mmseg_imbalance.files import write_atomically
from mmseg_imbalance.intervals import Jackknife, interval_of_share, jackknife, noise_of_mean

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
    areas: Mapping[str, np.ndarray],
    groups: Mapping[str, np.ndarray],
    blocks: Sequence[str] | None = None,
    absent: float | None = None,
) -> dict[str, float]:
    """Means over the classes of each group: IoU, precision, recall; and 95 % intervals of mean IoUs.

    The means of a group are over its classes that the labels hold. The interval of all classes is that of
    MMSegmentation's mean, which counts a class that is predicted only as 0.

    Args:
        areas: 'intersect', 'union', 'pred', 'label': (N, C) pixels of each class in each image.
        groups: indices of classes, by the name of the group.
        blocks: see :func:`~mmseg_imbalance.intervals.jackknife`.
        absent: IoU of a class that is neither in the labels nor predicted; None: the mean leaves it out.

    Returns:
        'mIoU.GROUP', 'mPrecision.GROUP', 'mRecall.GROUP', 'mIoU.GROUP.low', '.high' and the interval of the
        mean over all classes, 'mIoU.low', 'mIoU.high'; NaN where there is no such number.
    """
    total = {key: values.sum(0) for key, values in areas.items()}  # (C,)
    known = jackknife(areas['intersect'], areas['union'], areas['label'], blocks)
    held = total['label'] > 0
    precision = np.where(held, ratio(total['intersect'], total['pred']), np.nan)
    values = dict(mIoU=known.iou, mPrecision=precision, mRecall=ratio(total['intersect'], total['label']))
    iou = ratio(total['intersect'], total['union'])
    if absent is not None:
        iou = np.nan_to_num(iou, nan=absent)
    ends = _mean_interval(known, present_mean(iou), np.flatnonzero(held), int(np.isfinite(iou).sum()))
    scores = dict(zip(('mIoU.low', 'mIoU.high'), ends, strict=True))
    for name, members in groups.items():
        scores |= {f'{key}.{name}': present_mean(of_class[members]) for key, of_class in values.items()}
        members = members[held[members]]
        ends = _mean_interval(known, scores[f'mIoU.{name}'], members, len(members))
        scores |= zip((f'mIoU.{name}.low', f'mIoU.{name}.high'), ends, strict=True)
    return scores


def _mean_interval(known: Jackknife, mean: float, held: np.ndarray, number: int) -> tuple[float, float]:
    """Of a mean over so many classes, of which ``held`` are those whose IoU depends on the images."""
    noise = noise_of_mean(known.change[:, held], known.freedom[held])
    if noise is not None:
        noise = noise._replace(variance=noise.variance * (len(held) / number) ** 2)
    return interval_of_share(mean, noise) or (math.nan, math.nan)


def fine_grained_iou(
    intersect: np.ndarray,
    union: np.ndarray,
    label: np.ndarray,
    quantiles: Sequence[float] = (),
    index: str = 'IoU',
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
        index: name of intersect / union in the keys.

    Source: Wang et al., NeurIPS 2023, https://arxiv.org/abs/2310.19252, mIoU^I, mIoU^C and their worst cases,
    with the choices of its public code for more than two classes; it treats two as foreground and background.
    """
    iou = ratio(intersect, np.where(label > 0, union, 0))  # (N, C)
    scores = {}
    for suffix, percent in (('', 100), *((f'_q{q:g}', q) for q in quantiles)):
        scores[f'm{index}_I{suffix}'] = present_mean(present_mean(iou.T), percent)
        scores[f'm{index}_C{suffix}'] = present_mean(present_mean(iou, percent))
    return scores


def dice_scores(
    areas: Mapping[str, np.ndarray],
    classes: Sequence[str],
    groups: Mapping[str, np.ndarray],
    quantiles: Sequence[float] = (),
) -> dict[str, float]:
    """Dice, 2 intersect / (pred + label), over the classes of each group, and of single images.

    Images and classes count as for the IoU, see :func:`group_scores` and :func:`fine_grained_iou`.

    Args:
        areas, groups: as of :func:`group_scores`.
        classes: (C,) names.
        quantiles: in per cent.

    Returns:
        'mDice.GROUP'; 'mDice_I', 'mDice_C', 'mDice_I_q5', ...; 'Dice_C.NAME', the mean over the images whose
        label holds the class; NaN where there is no such number.
    """
    twice, both = 2 * areas['intersect'], areas['pred'] + areas['label']  # (N, C)
    held = np.where(areas['label'] > 0, both, 0)
    dice = ratio(twice.sum(0), np.where(held.any(0), both.sum(0), 0))  # (C,)
    scores = {f'mDice.{name}': present_mean(dice[members]) for name, members in groups.items()}
    scores |= fine_grained_iou(twice, both, areas['label'], quantiles, 'Dice')
    scores |= zip((f'Dice_C.{name}' for name in classes), present_mean(ratio(twice, held)), strict=True)
    return scores


def block_names(blocks: str | int, paths: Sequence[str]) -> list[str]:
    """The block of each image.

    Args:
        blocks: a regular expression: what it finds in the path is the name, and a path where it finds nothing
            is a block of its own; for instance ``seq\\d+``. Or a number: about so many images in a row.
        paths: of the images, with ``/``, in the order of their names.

    Raises:
        ValueError: it is neither, or it finds nothing in any path.
    """
    if isinstance(blocks, int) and blocks > 0:
        number = max(1, round(len(paths) / blocks))
        return [f'piece {at * number // len(paths):06}' for at in range(len(paths))]
    try:
        expression = re.compile(blocks)
    except (re.error, TypeError) as error:
        raise ValueError(
            'blocks is a regular expression for the path of an image, or a number of images from 1, got '
            f'{blocks!r}: {error}'
        ) from error
    found = [expression.search(path) for path in paths]
    if paths and not any(found):
        raise ValueError(f'blocks finds {blocks!r} in no path of an image, such as {paths[0]}')
    return [match[0] if match else path for match, path in zip(found, paths, strict=True)]


def image_scores_name(prefix: str | None) -> str:
    """Of the file of a metric: metrics of one evaluator have different prefixes."""
    # what a file name cannot hold becomes %..
    return f'image_scores_{quote(prefix, safe="")}.npz' if prefix else 'image_scores.npz'


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
        are not unique; ``blocks`` (N,) names of their blocks, (0,) where each is its own; ``classes`` (C,)
        names; ``intersect``, ``union``, ``pred``, ``label`` (N, C) int64 pixels; ``pixels`` (C,) int64 of the
        training annotations, (0,) if they are not known; ``group`` (C,) 'head', 'body', 'tail' or '';
        ``confusion`` (C, C) int64 pixels of all images by the class of the label, then by that predicted,
        (0, 0) in a file of an earlier version.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or another kind of file.
    """
    try:
        with open(path, 'rb') as file, np.load(file, allow_pickle=False) as archive:
            scores = {name: archive[name] for name in ('images', 'classes', *AREAS, 'pixels', 'group')}
            scores['confusion'] = archive['confusion'] if 'confusion' in archive else np.empty((0, 0), int)
            scores['blocks'] = archive['blocks'] if 'blocks' in archive else np.empty(0, str)
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
    expected['blocks'] = (min(n, len(scores['blocks'])),)
    if wrong := {k: scores[k].shape for k, shape in expected.items() if scores[k].shape != shape}:
        raise ValueError(
            f'{path} holds {n} images and {c} classes, but arrays of {wrong}; test the model again with '
            'ImbalanceIoUMetric'
        )
    return scores
