"""How the labels of a row are made: the transforms that load them and those that change them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmseg_imbalance.counting.label_files import reading
from mmseg_imbalance.counting.transforms import (
    IMAGE_LOADERS,
    LabelsTakenAway,
    attempt_labels,
    fresh,
    is_one_of,
    name_of,
    names,
    parts,
    run,
    with_image,
    with_labels,
)

LOOKED_AT = 64  # pixels of a window, and places where one may start
DROPPED = '{} returns None, so training takes another image and this counts nothing'


class LabelSteps(NamedTuple):
    """Copies of the transforms that make the labels of a row; none of them resizes, crops or flips."""

    load: tuple[Any, ...]  # up to the one that yields gt_seg_map
    change: tuple[Any, ...] = ()  # those after it that change what labels mean
    image: tuple[Any, ...] = ()  # one of them loads the image, for a step that asks for it
    named: bool = False  # `change` was named by the user: it gets the image, what fails then is an error
    left_out: tuple[str, ...] = ()  # names of those that may change labels too, and are not run
    option: str = ''  # label_transforms= with those that are run and those left out, of all data sets

    def parts(self) -> Iterator[Any]:
        """Every transform whose code or options decide about the labels, those inside others too."""
        for step in (*self.load, *self.change, *self.image):
            yield from parts(step)

    def loaded(self, info: dict[str, Any], path: str) -> dict[str, Any] | None:
        """Results with the labels as loaded, from the data info of a row; None: the pipeline drops the image.

        Raises:
            FileNotFoundError, ValueError: as :func:`~mmseg_imbalance.counting.label_files.reading`.
        """
        with reading(path):
            return run(self.load, info)

    def changed(self, results: dict[str, Any], path: str) -> tuple[dict[str, Any] | None, list[str]]:
        """Results with the labels as training sees them, and what is unusual about them, in words.

        A step gets the image if the user named it, or if it fails without. No results: one drops the image.

        Raises:
            ValueError: a step that the user named fails.
        """
        unusual = []
        if self.named and (pictured := with_image(self.image, results)) is not None:
            results = pictured
        elif self.named and any(is_one_of(step, IMAGE_LOADERS) for step in self.image):
            unusual.append(
                f'{", ".join(names(self.change))} ran without the image, which could not be loaded'
            )
        for step in self.change:
            after, pictured = attempt_labels(step, results), None
            if isinstance(after, Exception):
                pictured = None if 'img' in results else with_image(self.image, results)
                after = after if pictured is None else attempt_labels(step, pictured)
            if after is None:
                return None, [DROPPED.format(name_of(step))]
            if isinstance(after, Exception) and self.named:
                raise _failure(step, after, path)
            if isinstance(after, Exception):
                unusual.append(
                    f'{name_of(step)} fails on some labels, even with the image if the pipeline '
                    'loads one, and is left out there unless label_transforms names it'
                )
            elif self.named or not self._moved(step, results, pictured, after):
                results = after
        return results, unusual

    def _moved(self, step: Any, results: Any, pictured: Any, after: dict[str, Any]) -> bool:
        """Whether a step that was tried on other rows resizes these labels, or moves them with the image."""
        looked_at = pictured is not None or _resized(results, after)
        return looked_at and moves_labels(step, pictured or results)


def _failure(step: Any, error: Exception, path: str) -> ValueError:
    what = str(error) if isinstance(error, LabelsTakenAway) else f'{type(error).__name__}: {error}'
    failure = ValueError(
        f'{path}: {name_of(step)}, named in label_transforms, fails on these labels ({what}). It gets the '
        'image as it is loaded and the labels, both before any resize or crop. Leave it out of '
        'label_transforms if it does not change what a label means; if it does, change them in a transform '
        'of its own before it.'
    )
    failure.__cause__ = error
    return failure


def loads_images(steps: LabelSteps) -> bool:
    """Whether a loader of images of MMCV or MMSegmentation, or one derived from it, loads the labels."""
    from mmcv.transforms import LoadAnnotations

    return any(isinstance(step, LoadAnnotations) for step in steps.load)


def same_labels(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether results hold the same labels, pixel by pixel."""
    return np.array_equal(np.asarray(first['gt_seg_map']), np.asarray(second['gt_seg_map']))


def _resized(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return np.asarray(before['gt_seg_map']).shape != np.asarray(after['gt_seg_map']).shape


def moves_labels(step: Any, results: dict[str, Any], ignore_index: int = 255) -> bool:
    """Whether a transform keeps labels, or only crops, flips or warps them, as far as a trial tells.

    It is tried on these labels and on noise in their place, of all values, the small ones most.
    """
    noise = noisy(results)
    if noise is None:
        kept = attempt_labels(fresh(step), results)
        return isinstance(kept, dict) and same_labels(kept, results)
    return all(
        _moves(fresh(step), results, np.asarray(each['gt_seg_map']), ignore_index)
        for each in (results, noise)
    )


def noisy(results: dict[str, Any]) -> dict[str, Any] | None:
    """The results with noise in place of labels that fit into a byte; None: they do not."""
    labels = np.asarray(results['gt_seg_map'])
    if labels.dtype.kind not in 'biuf' or not _are_bytes(labels):
        return None
    numbers = np.random.default_rng(0)
    if labels.dtype == bool:
        return with_labels(results, numbers.random(labels.shape) < 0.5)
    drawn, shifts = (numbers.integers(0, end, labels.shape, np.uint8) for end in (256, 8))
    noise = drawn >> shifts
    return with_labels(results, noise.astype(labels.dtype))


def _moves(step: Any, results: dict[str, Any], before: np.ndarray, ignore_index: int) -> bool:
    """Whether labels are kept, cut or moved: what does so does the same with other numbers in their place.

    Pixels that are filled with 0 or the ignored label count as moved where others move.
    """
    after = _made(step, results, before)
    if after is None or np.array_equal(before, after) or _is_window(after, before):
        return after is not None
    if not _are_bytes(after):
        return False
    numbers = np.random.default_rng(1)
    for first in (0, 1):  # the background is another number, or is not, for crops that look at objects
        table = np.arange(256, dtype=np.uint8)
        if before.dtype == bool:  # the two have each other's place
            table[:2] = 1, 0
        else:
            table[first:255] = numbers.permutation(table[first:255])
        other = _made(step, results, table[before.astype(np.uint8)].astype(before.dtype))
        if other is None or other.shape != after.shape:
            continue
        filled = (other == after) & np.isin(after, (0, 255, ignore_index))
        in_place = before.shape == after.shape and (filled | (before == after)).all()
        if (filled | (other == table[after.astype(np.uint8)])).all() and not in_place:
            return True
    return False


def _are_bytes(labels: np.ndarray) -> bool:
    with np.errstate(invalid='ignore'):  # floats out of range
        return labels.dtype == np.uint8 or np.array_equal(labels, labels.astype(np.uint8))


def _made(step: Any, results: dict[str, Any], labels: np.ndarray) -> np.ndarray | None:
    found = attempt_labels(fresh(step), with_labels(results, labels))
    return np.asarray(found['gt_seg_map']) if isinstance(found, dict) else None


def _is_window(part: np.ndarray, whole: np.ndarray) -> bool:
    """Whether a rectangle of the second, or a box of a volume, is the first."""
    if part.ndim != whole.ndim or not part.size or (np.array(part.shape) > whole.shape).any():
        return False
    starts = [large - small + 1 for large, small in zip(whole.shape, part.shape, strict=True)]
    drawn = np.random.default_rng(2).integers(0, part.size, LOOKED_AT)
    # and the pixels whose label is rarest: most of a mask is background, which fits everywhere
    _, label_of, number = np.unique(part, return_inverse=True, return_counts=True)
    rarity = number[label_of.ravel()]
    rarest = np.argpartition(rarity, min(LOOKED_AT, part.size) - 1)[:LOOKED_AT]
    same = np.ones(starts, dtype=bool)
    for at in zip(*np.unravel_index([*drawn, *rarest], part.shape), strict=True):
        same &= whole[_box(at, starts)] == part[at]
    return any(
        np.array_equal(whole[_box(first, part.shape)], part) for first in np.argwhere(same)[:LOOKED_AT]
    )


def _box(first: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(first, size, strict=True))
