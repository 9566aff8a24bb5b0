"""Cityscapes train, whose counts are published: whether a data set is that one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

import numpy as np

from mmseg_imbalance.counting.annotations import Annotation
from mmseg_imbalance.counting.ranks import warn
from mmseg_imbalance.frequency import CITYSCAPES_TRAIN

CITYSCAPES_CITIES = {
    'aachen', 'bochum', 'bremen', 'cologne', 'darmstadt', 'dusseldorf', 'erfurt', 'hamburg',
    'hanover', 'jena', 'krefeld', 'monchengladbach', 'strasbourg', 'stuttgart', 'tubingen', 'ulm',
    'weimar', 'zurich',
}  # fmt: skip
PIXELS = 2048 * 1024  # of each image
LOOKED_AT = 120  # images
# In 120 images, shares above 5 % are hardly ever a quarter or four times as large, those of classes in 25 %
# of the images hardly ever a quarter, others never 20 times. Ignored pixels are never half as many again.
FREQUENT, FACTOR, FAR_ABOVE, IGNORED = 0.05, 4, 20, 1.5
UNLIKELY = 1e-5  # chance that a class is in so few or so many of the images


def is_cityscapes_train(
    classes: tuple[str, ...],
    annotations: Sequence[Annotation],
    recount: Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> bool:
    """Whether these are the 2975 labels that the published counts are of: by names and by a look at 120.

    All files must be there; the log says which way it is.

    Args:
        recount: positions of so many annotations, their counts (images, C) and ignored pixels (images,).
    """
    if not _has_the_names(classes, annotations):
        return False
    from mmengine.logging import print_log

    if not all(os.path.isfile(annotation.path) for annotation in annotations):
        return False  # the counting names the first that is not there
    if not looks_like_it(*recount(LOOKED_AT)[1:]):
        warn(
            f'{len(annotations)} label files have the names of Cityscapes train, but {LOOKED_AT} of them '
            'have other sizes, labels, classes or shares of them. They are counted as those of any data set.'
        )
        return False
    print_log(
        f'the published class counts of Cityscapes train are taken: all {len(annotations)} label files are '
        f'there, and {LOOKED_AT} of them look like it. The look would miss a few edited files, or '
        f'{_overlooked()} taken out of all: then max_images={len(annotations)} counts the files.',
        logger='current',
    )
    return True


def _has_the_names(classes: tuple[str, ...], annotations: Sequence[Annotation]) -> bool:
    if classes != CITYSCAPES_TRAIN.classes or len(annotations) != CITYSCAPES_TRAIN.num_images:
        return False
    name = re.compile(r'([a-z]+)_\d{6}_\d{6}_gtFine_labelTrainIds\.png')
    matches = [name.fullmatch(os.path.basename(annotation.path)) for annotation in annotations]
    unchanged = np.arange(256)
    return (
        len({match[0] for match in matches if match}) == len(annotations)
        and {match[1] for match in matches if match} == CITYSCAPES_CITIES
        and all(
            type(annotation.dataset).__name__ == 'CityscapesDataset'
            and (annotation.repeats, annotation.ignore_index) == (1, 255)
            and annotation.table is not None
            and not annotation.steps.change
            and np.array_equal(annotation.table, unchanged)
            for annotation in annotations
        )
    )


def looks_like_it(counts: np.ndarray, ignored: np.ndarray) -> bool:
    """Whether label images can be of Cityscapes train: by size, classes in them, and shares of these.

    Args:
        counts: (images, C) int64, pixels of each class.
        ignored: (images,) int64, pixels of no class.
    """
    if (counts.sum(axis=1) + ignored != PIXELS).any() or not counts.any():
        return False
    holds = zip((counts > 0).sum(axis=0).tolist(), _in_images(), strict=True)
    if any(_chance(images, len(counts), published) < UNLIKELY for images, published in holds):
        return False
    published = CITYSCAPES_TRAIN.share
    share = counts.sum(axis=0) / counts.sum()
    enough, often = share * FACTOR > published, np.array(_in_images()) >= 0.25
    close = enough & (share < published * FACTOR)
    total = CITYSCAPES_TRAIN.pixels.sum() + CITYSCAPES_TRAIN.ignored
    return bool(
        close[published >= FREQUENT].all()
        and enough[often].all()
        and (share < published * FAR_ABOVE).all()
        and ignored.mean() / PIXELS < IGNORED * CITYSCAPES_TRAIN.ignored / total
    )


def _in_images() -> list[float]:
    """Share of the images that hold each class."""
    return (CITYSCAPES_TRAIN.images / CITYSCAPES_TRAIN.num_images).tolist()


def _chance(images: int, number: int, share: float) -> float:
    """The probability that so few, or so many, of `number` images hold a class that a `share` of all holds.

    Binomial; images that are spread over the data set vary less.
    """
    from scipy.stats import binom  # slow to import

    return min(binom.cdf(images, number, share), binom.sf(images - 1, number, share))


def _overlooked() -> str:
    """The classes so rare that the look cannot tell whether they are there."""
    rare = [_chance(0, LOOKED_AT, share) >= UNLIKELY for share in _in_images()]
    return ', '.join(name for name, missed in zip(CITYSCAPES_TRAIN.classes, rare, strict=True) if missed)
