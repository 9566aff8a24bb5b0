"""How far an IoU, a mean of IoUs or a difference would be with other images and other seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

CONFIDENCE = 0.95


class Noise(NamedTuple):
    """Variance of an estimate, and the degrees of freedom of Student's t that go with it."""

    variance: float
    freedom: float

    @property
    def margin(self) -> float:
        """Half the 95 % interval."""
        return float(student.ppf((1 + CONFIDENCE) / 2, self.freedom) * math.sqrt(self.variance))


class Jackknife(NamedTuple):
    """IoU of each class, and how it changes without each block of images."""

    iou: np.ndarray  # (C,) as a share; NaN of a class that no label holds
    change: np.ndarray  # (B, C) blocks with labels; NaN of a class that labels of less than two hold
    freedom: np.ndarray  # (C,) at least 1


def jackknife(
    intersect: np.ndarray, union: np.ndarray, label: np.ndarray, blocks: Sequence[str] | None = None
) -> Jackknife:
    """Leave each block of images out once.

    The degrees of freedom of a class are (sum u)^2 / sum u^2 - 1 of its union u in the blocks: a class that
    fills one block and hardly shows in others is known little better than from that block alone.

    Args:
        intersect, union, label: (N, C) pixels of each class in each image.
        blocks: (N,) name of the block of each image, images that are not independent such as frames of one
            video; None: each image is its own.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 11. The percentiles of a
    bootstrap over images are too narrow for classes in few images (tests/test_intervals.py).
    """
    if blocks is not None:
        names, at = np.unique(blocks, return_inverse=True)
        sums = np.zeros((3, len(names), label.shape[1]))
        for to, areas in zip(sums, (intersect, union, label), strict=True):
            np.add.at(to, at.ravel(), areas)
        intersect, union, label = sums
    held = np.asarray(label) > 0
    known, several, full = held.any(0), held.sum(0) > 1, held.any(1)
    total, parts = union.sum(0), union[full].astype(float)
    with np.errstate(divide='ignore', invalid='ignore'):
        iou = np.where(known, intersect.sum(0) / total, np.nan)
        without = (intersect.sum(0) - intersect[full]) / (total - parts)
        freedom = parts.sum(0) ** 2 / (parts**2).sum(0) - 1
    change = np.where(several, without - iou, np.nan)
    return Jackknife(iou, change, np.where(several, np.maximum(freedom, 1), 1))


def noise_of_mean(change: np.ndarray, freedom: np.ndarray) -> Noise | None:
    """Noise over images of the mean over classes of IoUs, or of differences of IoUs.

    A class of which nothing is known, as it is in one block only, counts as the noisiest of the others.

    Args:
        change, freedom: (B, C) and (C,), of :class:`Jackknife`, for the classes of the mean.

    Returns:
        None where nothing tells: no class is in two blocks, or nothing changes without a block.
    """
    blocks, classes = change.shape
    if blocks < 2:
        return None
    known = np.isfinite(change).all(0)
    squares = (blocks - 1) / blocks * (change**2).sum(0)  # (C,)
    if not (squares[known] > 0).any():
        return None
    highest = squares[known].argmax()
    each = np.where(known, squares, squares[known][highest])
    freedom = np.where(known, freedom, freedom[known][highest])
    joint = (blocks - 1) / blocks * (change[:, known].sum(1) ** 2).sum()
    variance = (joint + each[~known].sum()) / classes**2
    if not variance > 0:
        return None
    return Noise(float(variance), float(min(blocks - 1, each.sum() ** 2 / (each**2 / freedom).sum())))


def interval_of_share(value: float, noise: Noise | None) -> tuple[float, float] | None:
    """95 % interval of a number between 0 and 1, inside these: it is symmetric for ln(p / (1 - p))."""
    if noise is None or not 0 < value < 1:
        return None
    slope = value * (1 - value)
    middle, margin = math.log(value / (1 - value)), noise.margin / slope
    low, high = 1 / (1 + np.exp([min(margin - middle, 700), min(-margin - middle, 700)]))
    return float(low), float(high)


def noise_of_seeds(first: Sequence[float], second: Sequence[float]) -> Noise | None:
    """Noise over seeds of the difference of the means of two configs: s_1^2 / n_1 + s_2^2 / n_2.

    Runs of one config that are all equal, as where a class is never found, tell nothing: they are taken to
    spread as those of the other config.

    Returns:
        The degrees of freedom are those of Welch's test; None for a config with one run, and where the runs
        of both are all equal.
    """
    if min(len(first), len(second)) < 2:
        return None
    variances = [float(np.var(values, ddof=1)) for values in (first, second)]
    scale = max(np.abs(first).max(), np.abs(second).max())
    spread = [np.ptp(values) > 1e-9 * scale for values in (first, second)]
    if not any(spread):
        return None
    freedoms = [len(first) - 1, len(second) - 1]
    if not all(spread):
        variances, freedoms = [variances[spread.index(True)]] * 2, [freedoms[spread.index(True)]] * 2
    parts = [v / n for v, n in zip(variances, (len(first), len(second)), strict=True)]
    if not all(spread):  # one variance, used twice
        return Noise(sum(parts), freedoms[0])
    return Noise(sum(parts), sum(parts) ** 2 / sum(p**2 / f for p, f in zip(parts, freedoms, strict=True)))


def noise_of_both(images: Noise, seeds: Noise, shared: float) -> Noise:
    """Noise of a difference of means over seeds, on other images and with other seeds.

    Two runs differ on the same images in part because other images are hard for them. This part is in the
    noise over images already: V = V_images + max(0, V_seeds - V_shared), with the degrees of freedom of
    Satterthwaite.

    Args:
        images: of the difference of the means.
        seeds: see :func:`noise_of_seeds`.
        shared: see :func:`shared_variance`.

    Source: Cameron, Gelbach & Miller, Robust Inference with Multiway Clustering, 2011, for the sum.
    """
    more = seeds.variance - shared
    if more <= 0:
        return images
    freedom = images.variance**2 / images.freedom + seeds.variance**2 / seeds.freedom
    return Noise(images.variance + more, (images.variance + more) ** 2 / freedom)


def shared_variance(changes: Sequence[np.ndarray]) -> float:
    """Variance over images of what the runs of one config differ by, in the mean over its runs.

    Args:
        changes: (B,) of each run, of its mean over classes without each block.
    """
    runs = np.stack(changes)
    if len(runs) < 2:
        return 0.0
    blocks = runs.shape[1]
    squares = (blocks - 1) / blocks * ((runs - runs.mean(0)) ** 2).sum()
    return float(squares / (len(runs) - 1) / len(runs))


class Difference(NamedTuple):
    """Mean of a config minus that of another, and what is known of it."""

    mean: float
    interval: tuple[float, float] | None = None  # 95 %; None: nothing tells
    noise: str = ''  # what the interval holds: 'images and seeds', 'images', 'seeds' or ''

    @property
    def within_noise(self) -> bool | None:
        """Whether the difference may be chance; None: unknown, as without seeds nothing is sure."""
        if self.interval is None or math.isnan(self.mean):
            return None
        if self.interval[0] <= 0 <= self.interval[1]:
            return True  # more noise makes it wider
        return False if 'seeds' in self.noise else None


def difference(
    first: Sequence[float],
    second: Sequence[float],
    images: tuple[Sequence[Jackknife], Sequence[Jackknife]] | None = None,
    members: np.ndarray | None = None,
) -> Difference:
    """Second config minus first, with its interval over images and seeds.

    Args:
        first, second: a number of each run, as a share; NaN is left out.
        images: the runs of both, on the same images; None: not known.
        members: indices of the classes of which the numbers are means.
    """
    first, second = ([v for v in values if math.isfinite(v)] for values in (first, second))
    if not first or not second:
        return Difference(math.nan)
    mean = float(np.mean(second) - np.mean(first))
    of_seeds, of_images, shared = noise_of_seeds(first, second), None, 0.0
    if images is not None and all(images):
        changes = [[run.change[:, members] for run in runs] for runs in images]  # of each run (B, C)
        least = np.min([run.freedom[members] for runs in images for run in runs], axis=0)
        of_images = noise_of_mean(np.mean(changes[1], axis=0) - np.mean(changes[0], axis=0), least)
        if of_images is None:  # a class in one block, whatever the seeds say
            return Difference(mean)
        shared = sum(shared_variance([np.nan_to_num(c).mean(1) for c in runs]) for runs in changes)
    if of_images is not None and of_seeds is not None:
        noise, kind = noise_of_both(of_images, of_seeds, shared), 'images and seeds'
    else:
        noise, kind = (of_images, 'images') if of_seeds is None else (of_seeds, 'seeds')
    if noise is None:
        return Difference(mean)
    return Difference(mean, (max(-1, mean - noise.margin), min(1, mean + noise.margin)), kind)
