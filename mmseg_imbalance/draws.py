"""From class counts to draws of images: the rules that give chances, and what a drawn index knows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mmseg_imbalance.counting.dataset_parts import first_indices
from mmseg_imbalance.frequency import ClassFrequency


class DrawnIndex(int):
    """An index of a data set that knows what it was drawn for.

    `class_index` is the class, None where any image could be drawn; `min_pixels` is what the images of this
    class hold at least. Wrapped data sets compute an index of the data set inside: ConcatDataset by ``-``,
    RepeatDataset by ``%``. The result keeps both, and so does a copy in another process. MMSegmentation's
    data sets hand the index to their pipeline as ``results['sample_idx']``.
    """

    class_index: int | None
    min_pixels: int

    def __new__(cls, index: int, class_index: int | None, min_pixels: int = 1) -> DrawnIndex:
        drawn = super().__new__(cls, index)
        drawn.class_index, drawn.min_pixels = class_index, min_pixels
        return drawn

    def __getnewargs__(self) -> tuple[int, int | None, int]:
        return int(self), self.class_index, self.min_pixels

    def __sub__(self, other: int) -> DrawnIndex:
        return DrawnIndex(int(self) - other, self.class_index, self.min_pixels)

    def __mod__(self, other: int) -> DrawnIndex:
        return DrawnIndex(int(self) % other, self.class_index, self.min_pixels)


class Draws(NamedTuple):
    """A draw takes a column by its chance, then one of the column's images, each as likely as another.

    Column c below C is drawn for class c, the last one for no class. A repeated image is as many images.
    """

    cumulative: np.ndarray  # (C + 1,) sums of the chances, up to 1
    sizes: np.ndarray  # (C + 1,) images of each column
    images: np.ndarray  # (n,) indices of distinct images, column after column
    repeats: np.ndarray  # (n,) how often the data set has each
    min_pixels: np.ndarray  # (C,) what images hold at least that are drawn for a class

    def take(self, numbers: np.ndarray) -> list[DrawnIndex]:
        """The draws that (n, 2) numbers in [0, 1) stand for."""
        starts = self.sizes.cumsum() - self.sizes
        columns = self.cumulative.searchsorted(numbers[:, 0], side='right')  # never one of probability 0
        places = starts[columns] + (numbers[:, 1] * self.sizes[columns]).astype(np.int64)
        chosen = self.images[self.repeats.cumsum().searchsorted(places, side='right')]
        labels = [*range(len(self.min_pixels)), None]
        least = [*self.min_pixels.tolist(), 1]
        return [
            DrawnIndex(index, labels[column], least[column])
            for index, column in zip(chosen.tolist(), columns.tolist(), strict=True)
        ]


def make_draws(
    dataset: Any, repeats: np.ndarray, choices: np.ndarray, chances: np.ndarray, min_pixels: np.ndarray
) -> Draws:
    """The draws from a data set.

    Args:
        dataset: the one that was counted.
        repeats: (images,) how often it has each distinct image.
        choices: (images, C + 1), whether an image is in a column.
        chances: (C + 1,) of each column, 0 where it has no image.
        min_pixels: (C,), see :class:`Draws`.
    """
    # Copies of an image are alike: the first stands for all, and is as likely as they are together.
    first = first_indices(dataset)
    columns, rows = np.nonzero(choices.T)  # by column
    sizes = np.bincount(columns, repeats[rows], choices.shape[1]).astype(np.int64)
    cumulative = chances.cumsum()
    return Draws(cumulative / cumulative[-1], sizes, first[rows], repeats[rows], min_pixels)


def least_pixels(counts: np.ndarray) -> np.ndarray:
    """(C,) pixels of each class that are enough, from (images, C) counts.

    The lower quartile over the images that hold the class, at most 3000, the number of DAFormer.
    """
    least = np.ones(counts.shape[1], dtype=np.int64)
    for c, pixels in enumerate(counts.T):
        if pixels.any():
            least[c] = min(3000, np.quantile(pixels[pixels > 0], 0.25, method='lower'))
    return least


def class_probability(share: np.ndarray, temperature: float, drawable: np.ndarray) -> np.ndarray:
    """(C,) P(c) = exp((1 - f_c) / T) / sum_k exp((1 - f_k) / T), 0 where not (C,) `drawable`.

    Args:
        share: (C,) f_c, the share of c in the valid pixels.
        temperature: T > 0.

    Source: Hoyer et al., DAFormer, CVPR 2022, https://arxiv.org/abs/2111.14887, "Rare Class Sampling".
    """
    with np.errstate(over='ignore'):  # a tiny temperature leaves the rarest class alone
        logits = (share[drawable].min() - share) / temperature  # less the largest, for exp
    probability = np.where(drawable, np.exp(np.minimum(logits, 0)), 0)
    return probability / probability.sum()


def softmax_choices(
    frequency: ClassFrequency, held: np.ndarray, temperature: float, uniform: float
) -> tuple[np.ndarray, np.ndarray]:
    """(images, C + 1) choices and (C + 1,) chances of :func:`class_probability`, a share for any image.

    Args:
        held: (images, C), whether an image can be drawn for a class.
        uniform: the share of the draws that take any image.
    """
    probability = class_probability(frequency.share, temperature, held.any(axis=0))
    choices = np.column_stack([held, np.ones(len(held), dtype=bool)])
    return choices, np.append((1 - uniform) * probability, uniform)


def repeat_factors(held: np.ndarray, repeats: np.ndarray, threshold: float) -> np.ndarray:
    """(C,) r_c = max(1, sqrt(t / f_c)), f_c the share of the images that hold class c; 1 where none does.

    Args:
        held: (images, C), whether an image holds a class.
        repeats: (images,) how often each image counts.
        threshold: t, a share of the images.

    Source: Gupta, Dollar, Girshick, LVIS, CVPR 2019, https://arxiv.org/abs/1908.03195, "Repeat Factor
    Sampling".
    """
    images = repeats @ held  # (C,)
    return np.sqrt(np.maximum(1, threshold * repeats.sum() / np.where(images > 0, images, np.inf)))


def repeat_factor_choices(
    held: np.ndarray, repeats: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """(images, C + 1) choices and (C + 1,) chances that draw an image in proportion to its repeat factor.

    r_i = max r_c over the classes c that image i holds, 1 without any. The column of an image is the class
    that decides, the last one where r_i = 1: then all images of a column are as likely.

    Args:
        held, repeats, threshold: see :func:`repeat_factors`.
    """
    factors = np.append(repeat_factors(held, repeats, threshold), 1.0)  # (C + 1,)
    of_images = np.where(held, factors[:-1], 1.0)  # (images, C)
    column = np.where(of_images.max(axis=1) > 1, of_images.argmax(axis=1), len(factors) - 1)
    choices = column[:, None] == np.arange(len(factors))
    chances = factors * (repeats @ choices)
    return choices, chances / chances.sum()


def check_temperature(temperature: float) -> None:
    """Raise a ValueError unless it is one of :func:`class_probability`."""
    if not isinstance(temperature, int | float) or not 0 < temperature < np.inf:
        raise ValueError(f'temperature={temperature!r}, allowed are finite numbers above 0, as 0.01.')
