"""Data sets in which one class occurs alone, as in masks of 0 and 255, of which 255 is the ignored label."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from mmseg_imbalance.annotations import Annotation
from mmseg_imbalance.frequency import ClassFrequency
from mmseg_imbalance.pixel_counts import not_run

__all__ = ['refuse_lonely_class']


def refuse_lonely_class(frequency: ClassFrequency, annotations: Sequence[Annotation]) -> None:
    """Look for data sets that hold a single class out of several.

    Where other data sets hold the other classes, the ignored pixels of one that lacks them may well be void:
    a warning. Without ignored pixels images of one class are nothing special.

    Args:
        frequency: counts of these annotations; published totals are not looked at.

    Raises:
        ValueError: all data sets together hold at most one class, and ignored pixels.
    """
    parts = frequency.by_source()
    whole = frequency.num_images == frequency.dataset_images
    if len(frequency.classes) < 2 or not parts:
        return
    if whole and np.count_nonzero(frequency.pixels) < 2:
        found = _what_is_found(frequency)
        if frequency.ignored:
            cause = _cause(frequency, annotations[0]) + not_run(annotations[0].steps)
            raise ValueError(f'{found}, so there is nothing to learn. {cause}')
        _warn(f'{found}. Nothing can be learnt from one class alone: check annotations and classes.')
        return
    if len(parts) == 1:
        return
    datasets = {annotation.dataset: annotation for annotation in annotations}  # in the order of the parts
    for (name, part), one in zip(parts, datasets.values(), strict=True):
        if np.count_nonzero(part.pixels) < 2 and part.ignored:
            _warn(
                f'in {name}: {_what_is_found(part)}. Other data sets hold more classes, so this may be as it '
                f'should be. {_cause(part, one)}'
            )


def _what_is_found(frequency: ClassFrequency) -> str:
    names = [frequency.classes[c] for c in np.flatnonzero(frequency.pixels)]
    occurs = f'only the class {names[0]!r}' if names else 'none'
    return (
        f'{occurs} of {len(frequency.classes)} classes occurs in {frequency.num_images} images, with '
        f'{int(frequency.pixels.sum()):,} pixels, and {frequency.ignored:,} pixels have the ignored label'
    )


def _cause(frequency: ClassFrequency, annotation: Annotation) -> str:
    """Why that can be, and what to do."""
    ignored = annotation.ignore_index
    if getattr(annotation.dataset, 'reduce_zero_label', False):
        return (
            f'reduce_zero_label=True makes label 0 of a file {ignored}, which is ignored, and 1 the first '
            'class. If 0 is the first class of the files, set reduce_zero_label=False.'
        )
    if 0 <= ignored < len(frequency.classes):
        return (
            f'ignore_index={ignored} is the number of the class {frequency.classes[ignored]!r}: give another '
            'label, such as 255.'
        )
    if not frequency.pixels.any():
        return f'All labels are {ignored}: check the annotations and how they are loaded.'
    return (
        f'Masks of 0 and {ignored} look like this: {ignored} is the label that training ignores. If it is '
        f'an object, write the number of its class into the files in place of {ignored}, or let '
        f'get_label_map of the data set return {{{ignored}: 1}}.'
    )


def _warn(message: str) -> None:
    from mmengine.logging import print_log

    print_log(message, logger='current', level=logging.WARNING)
