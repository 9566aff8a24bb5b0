"""Cityscapes train, whose counts are published: whether a data set is that one."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence

import numpy as np

from mmseg_imbalance.annotations import Annotation
from mmseg_imbalance.frequency import CITYSCAPES_TRAIN

__all__ = ['CITYSCAPES_CITIES', 'is_cityscapes_train', 'looks_like_it']

CITYSCAPES_CITIES = {
    'aachen', 'bochum', 'bremen', 'cologne', 'darmstadt', 'dusseldorf', 'erfurt', 'hamburg',
    'hanover', 'jena', 'krefeld', 'monchengladbach', 'strasbourg', 'stuttgart', 'tubingen', 'ulm',
    'weimar', 'zurich',
}  # fmt: skip
PIXELS = 2048 * 1024  # of each image
LOOKED_AT = 30  # images
# Shares above 5 % are compared; in 30 images they are hardly ever a quarter or four times as large.
FREQUENT, FACTOR = 0.05, 4


def is_cityscapes_train(
    classes: tuple[str, ...],
    annotations: Sequence[Annotation],
    recount: Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> bool:
    """Whether these are the 2975 labels that the published counts are of: by names and by a look at 30.

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
        print_log(
            f'{len(annotations)} label files have the names of Cityscapes train, but {LOOKED_AT} of them '
            'have other sizes, labels or shares of the classes. They are counted as those of any data set.',
            logger='current',
            level=logging.WARNING,
        )
        return False
    print_log(
        f'the published class counts of Cityscapes train are taken: all {len(annotations)} label files are '
        f'there, and {LOOKED_AT} of them look like it. max_images={len(annotations)} counts the files.',
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
    """Whether label images can be of Cityscapes train: by their size and the shares of frequent classes.

    Args:
        counts: (images, C) int64, pixels of each class.
        ignored: (images,) int64, pixels of no class.
    """
    if (counts.sum(axis=1) + ignored != PIXELS).any() or not counts.any():
        return False
    published = CITYSCAPES_TRAIN.share
    share = counts.sum(axis=0) / counts.sum()
    close = (share * FACTOR > published) & (share < published * FACTOR)
    return bool(close[published >= FREQUENT].all())
