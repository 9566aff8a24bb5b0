"""Data sets in which one class occurs alone, as in masks of 0 and 255, of which 255 is the ignored label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmseg_imbalance.counting.annotations import Annotation
from mmseg_imbalance.counting.pixel_counts import not_run
from mmseg_imbalance.counting.ranks import warn
from mmseg_imbalance.frequency import ClassFrequency

RARELY = 0.1  # of the images with objects


def refuse_lonely_class(frequency: ClassFrequency, annotations: Sequence[Annotation]) -> None:
    """Look for data sets that hold a single class out of several, or objects that may be ignored.

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
            raise ValueError(f'{found}, so there is nothing to learn. {cause}{_subset(annotations)}')
        warn(
            f'{found}. Nothing can be learnt from one class alone: check annotations and classes.'
            f'{_subset(annotations)}'
        )
        return
    datasets = {annotation.dataset: annotation for annotation in annotations}  # in the order of the parts
    for (name, part), one in zip(parts, datasets.values(), strict=True):
        if found := _mostly_ignored(part):
            warn(f'in {name}: {found}. If these pixels are void, all is well. {_cause(part, one)}')
        if len(parts) > 1 and np.count_nonzero(part.pixels) < 2 and part.ignored:
            warn(
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


def _mostly_ignored(frequency: ClassFrequency) -> str:
    """What is found where objects seem to be ignored in most images and labelled in a few; else ''.

    In most of the images that are not of one class alone, ignored pixels take the place of all other
    classes; where these are, hardly a pixel is ignored. Void would be found beside objects too.
    """
    counts, ignored = frequency.counts, frequency.ignored_counts
    if counts is None or ignored is None:
        return ''
    held = counts > 0  # (images, C)
    alone = (held.sum(axis=1) == 1) & (ignored > 0)
    usual = int(held[alone].sum(axis=0).argmax())
    alone &= held[:, usual]
    others = np.delete(held, usual, axis=1).any(axis=1)
    if alone.sum() <= max(others.sum(), 2) or not others.any() or (ignored[others] > 0).mean() > RARELY:
        return ''
    names = [frequency.classes[c] for c in np.flatnonzero(frequency.pixels) if c != usual]
    listed = f'{len(names)} other classes occur' if len(names) > 3 else f'{", ".join(map(repr, names))} occur'
    return (
        f'in {alone.sum()} of {len(counts)} images only the class {frequency.classes[usual]!r} and ignored '
        f'pixels occur, while {listed} in {others.sum()}, which have hardly an ignored pixel'
    )


def _subset(annotations: Sequence[Annotation]) -> str:
    """Another cause, where data sets are cut to a few of their images."""
    if all(getattr(annotation.dataset, '_indices', None) is None for annotation in annotations):
        return ''
    return f' Or the subset is too small: indices leaves {len(annotations)} images.'


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
        f'Masks of 0 and {ignored} look like this: {ignored} is the label that training ignores. If it is an '
        'object, add a transform of your own after LoadAnnotations, in training and test, that does '
        f"results['gt_seg_map'][results['gt_seg_map'] == {ignored}] = 1, with the number of its class for 1. "
        'It is run in counting too. Or write this number into the files.'
    )
