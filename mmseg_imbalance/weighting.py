"""Class weights: pure functions of a class frequency."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from numbers import Real

import numpy as np
from numpy.typing import ArrayLike

from mmseg_imbalance.frequency import ClassFrequency

SCHEMES = ('inverse_freq', 'sqrt_inv_freq', 'effective_num', 'median_freq', 'log_inv_freq')
# A class so many times as heavy as the lightest, with fewer images or pixels behind it, is warned of.
RATIO, FEW_IMAGES, FEW_PIXELS = 100, 10, 1000


def class_weights(
    frequency: ClassFrequency,
    scheme: str = 'sqrt_inv_freq',
    *,
    beta: float = 0.9999,
    unit: str = 'image',
    k: float = 1.02,
    power: float = 1.0,
    max_ratio: float | None = None,
) -> np.ndarray:
    """Weight of each class, (C,) float64, with mean 1 over the classes that occur, 0 for others.

    A class that a sample did not meet may occur: it counts as one pixel in one image of the sample.

    n_c pixels of class c, N their sum, f_c = n_c / N, C classes that occur:
    inverse_freq N / (C n_c); sqrt_inv_freq 1 / sqrt(f_c); effective_num (1 - b) / (1 - b^n_c);
    median_freq median(q) / q_c, q_c = n_c / pixels of the images with c; log_inv_freq 1 / ln(k + f_c).

    Args:
        beta: b of effective_num, in [0, 1).
        unit: what n_c counts there, 'image' or 'pixel'.
        k: of log_inv_freq, above 1. ERFNet: 1.10.
        power: exponent on the weights, at least 0; below 1 brings them closer together.
        max_ratio: after that, larger weights become this many times the smallest.

    Raises:
        ValueError: an argument out of its range, or no class occurs.

    Source: Cui et al. 2019, eq. 2 (pixels or images here); Eigen & Fergus 2015; ENet and ERFNet,
    which take f_c over all pixels, ignored ones included.
    """
    if scheme not in SCHEMES:
        raise ValueError(f'scheme={scheme!r} is unknown. Choose one of {", ".join(SCHEMES)}.')
    check_options(beta=beta, unit=unit, k=k, power=power, max_ratio=max_ratio)
    if not frequency.pixels.any():
        raise ValueError(
            f'none of the {len(frequency.classes)} classes has a pixel, so there is nothing to weigh. '
            'Check the annotations, classes and ignore_index of the data set that was counted.'
        )
    sample, frequency = frequency, frequency.with_unmet()
    occurs = frequency.pixels > 0
    pixels = frequency.pixels[occurs].astype(np.float64)
    share = pixels / pixels.sum()
    if scheme == 'inverse_freq':
        weights = 1 / (len(share) * share)
    elif scheme == 'sqrt_inv_freq':
        weights = 1 / np.sqrt(share)
    elif scheme == 'effective_num':
        number = frequency.images[occurs].astype(np.float64) if unit == 'image' else pixels
        weights = _inverse_effective_number(number, beta, unit)
    elif scheme == 'median_freq':
        within = pixels / frequency.image_pixels[occurs]
        weights = np.median(within) / within
    else:
        weights = 1 / np.log(k + share)

    ratio = (weights / weights.min()) ** power
    if max_ratio is not None:
        ratio = np.minimum(ratio, max_ratio)
    result = np.zeros(len(occurs))
    result[occurs] = ratio / ratio.mean()
    for message in (*_without_pixels(sample), *_doubtful(sample, result)):
        warnings.warn(message, stacklevel=2)
    return result


def scheduled_weights(
    weights: ArrayLike, power_schedule: Sequence[tuple[float, float]], progress: float
) -> np.ndarray:
    """The weights at a moment of the training: w_c^p, (C,) float64, with mean 1 over those above 0.

    Args:
        weights: (C,) numbers >= 0; those that are 0 stay 0.
        power_schedule: points (progress, p) between which p is linear. Before the first and after the last it
            is constant; at two points of one progress it jumps.
        progress: share of the iterations done, 0 to 1.

    Source: [(0.8, 0), (0.8, 1)] is deferred re-weighting (Cao et al. 2019, https://arxiv.org/abs/1906.07413,
    section 3.3), with weights as they are chosen here.
    """
    weights = np.asarray(weights, dtype=np.float64)
    power = scheduled_power(power_schedule, progress)
    occurs = weights > 0
    result = np.zeros(len(weights))
    # relative to the largest: no overflow
    result[occurs] = (weights[occurs] / weights[occurs].max()) ** power
    return result / result[occurs].mean()


def scheduled_power(power_schedule: Sequence[tuple[float, float]], progress: float) -> float:
    """The exponent at a moment of the training, see :func:`scheduled_weights`."""
    after = sum(at <= progress for at, _ in power_schedule)  # points passed
    earlier, later = power_schedule[max(after - 1, 0)], power_schedule[min(after, len(power_schedule) - 1)]
    width = later[0] - earlier[0]
    part = (progress - earlier[0]) / width if width > 0 else 0.0
    return earlier[1] + min(max(part, 0.0), 1.0) * (later[1] - earlier[1])


def check_power_schedule(points: object) -> None:
    """Raise a ValueError unless it is a list of points as :func:`scheduled_weights` takes them."""
    try:
        pairs = [(at, power) for at, power in points]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        pairs = []
    numbers = all(_is_number(x) and math.isfinite(x) for pair in pairs for x in pair)
    places = [at for at, _ in pairs]
    ordered = numbers and places == sorted(places) and all(0 <= at <= 1 for at in places)
    if not pairs or not ordered or any(power < 0 for _, power in pairs):
        raise ValueError(
            f'power_schedule={points!r}, allowed is a list of points (progress, power): progress from 0 to 1 '
            'and in order, power at least 0. [(0.25, 1), (0.75, 0)] are weights that fade between a quarter '
            'and three quarters of the training.'
        )


def log_prior(pixels: ArrayLike) -> np.ndarray:
    """ln f_c, (C,) float64, f_c the share of each class in (C,) pixels.

    A class that never occurs, or that a sample did not meet, counts as the rarest that does: its own -inf,
    or ln of one pixel, subtracted at test time, would make it the prediction everywhere.

    Raises:
        ValueError: no class occurs.
    """
    counts = np.asarray(pixels, dtype=np.float64)
    if not (counts > 0).any():
        raise ValueError(f'none of the {len(counts)} classes has a pixel, so they have no prior')
    counts = np.where(counts > 0, counts, counts[counts > 0].min())
    return np.log(counts / counts.sum())


def _inverse_effective_number(number: np.ndarray, beta: float, unit: str) -> np.ndarray:
    """(1 - beta) / (1 - beta^n) without the cancellation for beta near 1."""
    log_beta = math.log(beta) if beta > 0 else -math.inf
    weights = (1 - beta) / -np.expm1(number * log_beta)
    if len(weights) > 1 and weights.max() / weights.min() < 1.01:
        other = '' if unit == 'image' else "unit='image', "
        warnings.warn(
            f'effective_num gives every class the same weight: with beta={beta} and n_c counting '
            f'{unit}s ({number.min():.0f} to {number.max():.0f}), 1 - beta^n_c hardly differs. '
            f'Take {other}a beta nearer to 1 - 1/n_c, or another scheme.',
            stacklevel=3,
        )
    return weights


def _without_pixels(frequency: ClassFrequency) -> Iterator[str]:
    """Messages about the classes without a pixel."""
    unmet = [frequency.classes[c] for c in np.flatnonzero(frequency.unmet)]
    absent = [frequency.classes[c] for c in np.flatnonzero((frequency.pixels == 0) & ~frequency.unmet)]
    if absent:
        ignored = ''
        if frequency.ignored:
            ignored = f'. {frequency.ignored:,} pixels have the ignored label; are they of these classes?'
        yield f'classes that never occur get weight 0: {", ".join(absent)}{ignored}'
    if unmet:
        yield (
            f'classes that were not met in {frequency.num_images} of {frequency.dataset_images} images are '
            f'weighed as if one of their pixels had been: {", ".join(unmet)}. A larger max_images tells '
            'more, max_ratio limits the weight.'
        )


def _doubtful(frequency: ClassFrequency, weights: np.ndarray) -> Iterator[str]:
    """A message about classes of large weight with few pixels or images behind it."""
    ratio = weights / weights[weights > 0].min()
    few = ~frequency.unmet & ((frequency.images < FEW_IMAGES) | (frequency.pixels < FEW_PIXELS))
    listed = [
        f'{frequency.classes[c]} {ratio[c]:,.0f} times, from {frequency.pixels[c]:,} pixels in '
        f'{frequency.images[c]:,} images'
        for c in np.flatnonzero((ratio > RATIO) & few)
    ]
    if listed:
        lightest = frequency.classes[int(np.where(weights > 0, weights, np.inf).argmin())]
        yield (
            f'classes weigh more than {RATIO} times as much as {lightest}, and that from little data: '
            f'{"; ".join(listed)}. Their few pixels, and errors in them, will steer the training. '
            f'max_ratio={RATIO} limits the weight, power=0.5 brings all closer together.'
        )


def check_options(
    beta: float = 0.9999,
    unit: str = 'image',
    k: float = 1.02,
    power: float = 1.0,
    max_ratio: float | None = None,
) -> None:
    """Raise a ValueError for an option of :func:`class_weights` out of its range; NaN is in none."""
    if not (_is_number(beta) and 0 <= beta < 1):
        raise ValueError(f'beta={beta!r}, allowed is [0, 1). Take e.g. 0.9999; near 1, n_c counts more.')
    if unit not in ('image', 'pixel'):
        raise ValueError(f"unit={unit!r}, allowed are 'image' and 'pixel'. Take 'image'.")
    if not (_is_number(k) and 1 < k < math.inf):
        raise ValueError(f'k={k!r}, but 1 / ln(k + f_c) needs a finite k above 1. Take e.g. 1.02.')
    if not (_is_number(power) and 0 <= power < math.inf):
        raise ValueError(f'power={power!r}, allowed are finite numbers from 0. Take 1 to change nothing.')
    if max_ratio is not None and not (_is_number(max_ratio) and max_ratio >= 1):
        raise ValueError(f'max_ratio={max_ratio!r}, allowed is 1 and more. Take None to clip nothing.')


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
