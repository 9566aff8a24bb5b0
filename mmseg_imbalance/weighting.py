"""Class weights: pure functions of a class frequency."""

from __future__ import annotations

import math
import warnings

import numpy as np
from numpy.typing import ArrayLike

from mmseg_imbalance.frequency import ClassFrequency

__all__ = ['SCHEMES', 'class_weights', 'log_prior']

SCHEMES = ('inverse_freq', 'sqrt_inv_freq', 'effective_num', 'median_freq', 'log_inv_freq')


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
    _check(beta, unit, k, power, max_ratio)
    occurs = frequency.pixels > 0
    if not occurs.any():
        raise ValueError(
            f'none of the {len(occurs)} classes has a pixel, so there is nothing to weigh. Check '
            'the annotations, classes and ignore_index of the data set that was counted.'
        )
    if not occurs.all():
        absent = [name for name, found in zip(frequency.classes, occurs, strict=True) if not found]
        warnings.warn(f'classes that never occur get weight 0: {", ".join(absent)}', stacklevel=2)
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
    return result


def log_prior(pixels: ArrayLike) -> np.ndarray:
    """ln f_c, (C,) float64, f_c the share of each class in (C,) pixels.

    A class that never occurs counts as the rarest that does: its own -inf, subtracted at test time, would
    make it the prediction everywhere.

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
        warnings.warn(
            f'effective_num gives every class the same weight: with beta={beta} and n_c counting '
            f'{unit}s ({number.min():.0f} to {number.max():.0f}), 1 - beta^n_c hardly differs. '
            "Take unit='image', a beta nearer to 1 - 1/n_c, or another scheme.",
            stacklevel=3,
        )
    return weights


def _check(beta: float, unit: str, k: float, power: float, max_ratio: float | None) -> None:
    """Raise for an option out of its range; NaN is in none."""
    if not 0 <= beta < 1:
        raise ValueError(f'beta={beta}, allowed is [0, 1). Take e.g. 0.9999; near 1, n_c counts more.')
    if unit not in ('image', 'pixel'):
        raise ValueError(f"unit={unit!r}, allowed are 'image' and 'pixel'. Take 'image'.")
    if not 1 < k < math.inf:
        raise ValueError(f'k={k}, but 1 / ln(k + f_c) needs a finite k above 1. Take e.g. 1.02.')
    if not 0 <= power < math.inf:
        raise ValueError(f'power={power}, allowed are finite numbers from 0. Take 1 to change nothing.')
    if max_ratio is not None and not max_ratio >= 1:
        raise ValueError(f'max_ratio={max_ratio}, allowed is 1 and more. Take None to clip nothing.')
