"""How far the borders of predictions are from those of labels: the Hausdorff distance, and its means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.spatial import KDTree

from mmseg_imbalance.scores import present_mean, ratio

PERCENT = 95


def surface(classes: np.ndarray) -> np.ndarray:
    """The pixels of each class that its erosion by the 4 neighbours takes away, those at the image's end too.

    Args:
        classes: (H, W) integers, below 0 of no class.

    Returns:
        (H, W) bool, of all classes at once.
    """
    found = np.zeros(classes.shape, bool)
    found[[0, -1]] = found[:, [0, -1]] = True
    below, beside = classes[1:] != classes[:-1], classes[:, 1:] != classes[:, :-1]
    found[1:] |= below
    found[:-1] |= below
    found[:, 1:] |= beside
    found[:, :-1] |= beside
    return found & (classes >= 0)


def hausdorff_distances(prediction: np.ndarray, label: np.ndarray, num_classes: int) -> np.ndarray:
    """The 95 % Hausdorff distance of each class in an image, in pixels.

    HD95_c = max(q(d(P_c, T_c)), q(d(T_c, P_c))) of the surfaces P_c of the prediction and T_c of the label;
    d(A, B): from each pixel of A to the nearest of B, Euclidean; q: the 95th percentile, interpolated.

    Args:
        prediction, label: (H, W) class indices; below 0: of no class.
        num_classes: C.

    Returns:
        (C,) float64; inf of a class that one of the two holds, NaN of a class that none holds.

    Source: ``compute_hausdorff_distance(percentile=95)`` of MONAI, which gives NaN for some of what is inf
    here. medpy's ``hd95`` takes one percentile of both directions together, usually a lower number.
    """
    points = [_points(each, num_classes) for each in (prediction, label)]
    distances = np.full(num_classes, np.nan)
    for c, (first, second) in enumerate(zip(*points, strict=True)):
        if len(first) and len(second):
            distances[c] = max(_percentile(first, second), _percentile(second, first))
        elif len(first) or len(second):
            distances[c] = np.inf
    return distances


def _points(classes: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """(P, 2) row and column of the pixels of the surface of each class."""
    found = np.argwhere(surface(classes))
    of_class = classes[tuple(found.T)]
    found = found[np.argsort(of_class, kind='stable')]
    return np.split(found, np.bincount(of_class, minlength=num_classes)[:num_classes].cumsum())[:num_classes]


def _percentile(points: np.ndarray, others: np.ndarray) -> float:
    # a tree is faster than a distance transform: borders are a small part of an image
    return float(np.percentile(KDTree(others, leafsize=32).query(points)[0], PERCENT))


def distance_scores(
    distances: np.ndarray, held: np.ndarray, classes: Sequence[str], groups: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Means of distances, in pixels, and the share of the images that have none, in per cent.

    The mean of a class is over the images where label and prediction hold it. Where one of them holds it,
    the distance is infinite: such images are in no mean. Their share is that of the images where at
    least one of the two holds the class.

    Args:
        distances: (N, C) of :func:`hausdorff_distances`; the order of the images does not matter.
        held: (C,) whether any label holds the class; means over classes are over these.
        classes: (C,) names.
        groups: indices of classes, by the name of the group.

    Returns:
        'HD95.NAME', 'HD95.infinite.NAME', 'mHD95', 'mHD95.infinite', 'mHD95.GROUP', 'mHD95.GROUP.infinite';
        NaN where there is no such number.
    """
    infinite = 100 * ratio(np.isinf(distances).sum(0), (~np.isnan(distances)).sum(0))  # (C,)
    mean = present_mean(np.where(np.isfinite(distances), distances, np.nan))
    scores = {}
    for name, members in (('', np.arange(len(held))), *((f'.{name}', of) for name, of in groups.items())):
        members = members[held[members]]
        for key, values in ((f'mHD95{name}', mean), (f'mHD95{name}.infinite', infinite)):
            scores[key] = present_mean(values[members]) if len(members) else np.nan
    scores |= zip((f'HD95.{name}' for name in classes), mean, strict=True)
    scores |= zip((f'HD95.infinite.{name}' for name in classes), infinite, strict=True)
    return {key: float(value) for key, value in scores.items()}
