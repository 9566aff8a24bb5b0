"""Which transforms of a pipeline make its labels, found by running them on some rows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from mmseg_imbalance.counting.label_files import reading
from mmseg_imbalance.counting.label_steps import LabelSteps, moves_labels, noisy, same_labels
from mmseg_imbalance.counting.transforms import (
    IMAGE_LOADERS,
    LabelsTakenAway,
    attempt,
    attempt_labels,
    fresh,
    is_one_of,
    keeps_labels,
    name_of,
    own_name,
    packs,
    parts,
    with_image,
)

IDLE = 'it does nothing to these'
DEPENDS = 'its labels depend on the image'
LOOKED_AT, TRIED = 8, 4  # rows whose labels are loaded, and those with the most labels among them


class Found(NamedTuple):
    """What makes the labels in a pipeline."""

    steps: LabelSteps
    left_out: dict[str, str]  # those that may change labels and are not run, by name, with the reason
    unnamed: list[str]  # names of those that change labels, where the user has named others
    moving: list[str]  # names of those that need the image and only moved or kept labels
    held: set[str]  # which of the names that are wanted the pipeline has


def find_steps(
    transforms: Sequence[Any],
    rows: Sequence[tuple[dict[str, Any], str]],
    wanted: Sequence[str] | None,
    ignore_index: int = 255,
) -> Found:
    """What makes the labels in a pipeline, found by running it on some rows.

    Args:
        transforms: of :meth:`~mmseg_imbalance.counting.dataset_parts.Part.pipeline`.
        rows: data infos, from :meth:`BaseDataset.get_data_info`, and paths of their annotations.
        wanted: names of transforms after the loading one that change labels; None: those that are not known
            to keep them and work without the image.

    Raises:
        ValueError: nothing yields ``gt_seg_map``.
        FileNotFoundError: the annotation file of the first row is missing.
    """
    position, load = _find_loader(transforms, rows)
    after = [copy.copy(step) for step in transforms[position + 1 :]]
    held = [{own_name(part) for part in parts(step)} & set(wanted or ()) for step in after]
    image = [step for step in transforms if is_one_of(step, IMAGE_LOADERS)]
    image += [step for step in transforms[:position] if not keeps_labels(step)]
    image += [step for step, found in zip(after, held, strict=True) if not found and not keeps_labels(step)]
    steps = LabelSteps(load, named=wanted is not None)
    unknown = [not found and not keeps_labels(step) for step, found in zip(after, held, strict=True)]
    trial = _Trial(steps, image, rows if any(unknown) and (wanted is None or wanted) else [], ignore_index)
    kept: list[Any] = []
    result = Found(steps, {}, [], [], set().union(*held))
    for step, found, is_unknown in zip(after, held, unknown, strict=True):
        tried = fresh(step) if trial.rows else step  # training's own is left as it is
        if found or (packs(step) and not is_unknown):
            kept.append(step)
        elif not is_unknown:
            trial.advance_training(tried)
            continue
        elif wanted is not None:
            if trial.changes(tried):
                result.unnamed.append(name_of(step))
            trial.advance_training(tried)
            continue
        elif (reason := trial.reason(tried)) is None:
            kept.append(step)
        else:
            if reason:
                result.left_out[name_of(step)] = reason
            elif trial.needs_image(tried):
                result.moving.append(name_of(step))
            trial.advance_training(tried)
            continue
        trial.advance(tried)
    while kept and packs(kept[-1]) and keeps_labels(kept[-1]):  # nothing comes after this packing
        kept.pop()
    left_out = (*result.left_out, *result.unnamed)
    steps = steps._replace(change=tuple(kept), image=tuple(image) if kept else (), left_out=left_out)
    return result._replace(steps=steps)


class _Trial:
    """Results of some rows, without and with the image, on which transforms are tried one by one."""

    def __init__(
        self,
        steps: LabelSteps,
        image: Sequence[Any],
        rows: Sequence[tuple[dict[str, Any], str]],
        ignore_index: int,
    ) -> None:
        self.ignore_index = ignore_index
        loaded = [steps.loaded(*copy.deepcopy(row)) for row in rows[:1]]
        for row in rows[1:]:
            with suppress(FileNotFoundError, ValueError):  # is met again in counting
                loaded.append(steps.loaded(*copy.deepcopy(row)))
        results = [row for row in loaded if row is not None]
        results.sort(key=lambda row: -len(np.unique(np.asarray(row['gt_seg_map']))))
        self.rows = [(row, with_image(image, row)) for row in results[:TRIED]]
        self.training = [
            pictured for _, pictured in self.rows
        ]  # as they are there: resized, cropped, flipped

    def advance_training(self, step: Any) -> None:
        """Go on with what training would make of the rows, where it can be tried."""
        for at, row in enumerate(self.training):
            found = None if row is None else attempt_labels(step, row)
            self.training[at] = found if isinstance(found, dict) else row

    def advance(self, step: Any) -> None:
        """Go on with the labels that a transform makes, where it does."""
        self.advance_training(step)
        rows, training = [], []
        for (plain, pictured), trained in zip(self.rows, self.training, strict=True):
            found = attempt_labels(step, plain)
            seen = None if pictured is None else attempt_labels(step, pictured)
            if isinstance(found, Exception):
                found = seen if isinstance(seen, dict) else plain
            if found is not None:
                rows.append((found, seen if isinstance(seen, dict) else None))
                training.append(trained)
        self.rows, self.training = rows, training

    def changes(self, step: Any) -> bool:
        """Whether a transform makes other labels of some, with the image where there is one."""
        best = [plain if pictured is None else pictured for plain, pictured in self.rows]
        return any(
            isinstance(attempt_labels(step, row), dict) and not moves_labels(step, row, self.ignore_index)
            for row in best
        )

    def needs_image(self, step: Any) -> bool:
        """Whether a transform fails on some without it."""
        return any(isinstance(attempt_labels(step, plain), Exception) for plain, _ in self.rows)

    def reason(self, step: Any) -> str | None:
        """Why a transform is not run in counting; None: it is run; '': it needs no word."""
        if not self.rows:  # all are dropped, so nothing can be tried
            return None
        rows = zip(self.rows, self.training, strict=True)
        reasons = [self._reason(step, *row, trained) for row, trained in rows]
        if DEPENDS in reasons:
            return DEPENDS
        told = [reason for reason in reasons if reason not in (IDLE, '')]
        if None in told or IDLE not in reasons:
            return None if None in told else max(reasons, key=bool)
        # where it did nothing without the image, counting tries it again with the image where it fails
        return '' if not told and '' in reasons else None

    def _reason(
        self,
        step: Any,
        plain: dict[str, Any],
        pictured: dict[str, Any] | None,
        trained: dict[str, Any] | None,
    ) -> str | None:
        found = attempt_labels(step, plain)
        seen = found if pictured is None else attempt_labels(step, pictured)
        if isinstance(found, Exception):
            tried = pictured if isinstance(seen, dict) else trained
            if tried is not None and moves_labels(step, tried, self.ignore_index):
                return ''
            error = seen if isinstance(seen, Exception) else found
            return str(error) if isinstance(error, LabelsTakenAway) else f'{type(error).__name__}: {error}'
        if pictured is not None and not isinstance(seen, Exception):
            if (found is None) != (seen is None):
                return DEPENDS
            noise = [row and attempt_labels(step, row) for row in (noisy(plain), noisy(pictured))]
            if _differ(found, seen) or _differ(*noise):
                return '' if moves_labels(step, pictured, self.ignore_index) else DEPENDS
        if found is None:  # drops the image, as training does
            return None
        if same_labels(found, plain):
            loads = 'img' in found and 'img' not in plain
            return '' if loads else IDLE if moves_labels(step, plain, self.ignore_index) else None
        return '' if moves_labels(step, plain, self.ignore_index) else None


def _differ(first: Any, second: Any) -> bool:
    both = isinstance(first, dict) and isinstance(second, dict)
    return both and not same_labels(first, second)


def _decides(after: Any, before: dict[str, Any]) -> bool:
    """Whether a transform before the loading one drops the image, or says which labels are loaded."""
    says = ('seg_map_path', 'label_map', 'reduce_zero_label')
    changed = isinstance(after, dict) and any(repr(after.get(key)) != repr(before.get(key)) for key in says)
    return after is None or changed


def _loader(step: Any, info: dict[str, Any]) -> Any:
    """A copy of a transform that loads labels.

    MMSegmentation's remembers the `reduce_zero_label` of what it loads first. The copy knows it already, so
    its counts are found again whether training has loaded something or not.
    """
    loader = copy.copy(step)
    if getattr(loader, 'reduce_zero_label', False) is None:
        loader.reduce_zero_label = info.get('reduce_zero_label')
    return loader


def _find_loader(
    transforms: Sequence[Any], rows: Sequence[tuple[dict[str, Any], str]]
) -> tuple[int, tuple[Any, ...]]:
    """Position of the transform that yields the labels, and what has to run up to it."""
    from mmcv.transforms import LoadAnnotations

    info, path = rows[0]
    happened: dict[str, str] = {}
    errors: dict[str, Exception] = {}
    likely = None  # one that loads labels, by its class, but not those of this row
    for use_image in (False, True):
        states = [info for info, _ in rows]
        load: list[Any] = []
        image: list[Any] = []  # what loads it, where no label has depended on it so far
        for position, step in enumerate(transforms):
            loader = _loader(step, info)
            loads = isinstance(step, LoadAnnotations) and step.with_seg
            if loads and is_one_of(step, {'LoadAnnotations'}):
                return position, (*load, loader)
            if keeps_labels(step) and not (use_image and is_one_of(step, IMAGE_LOADERS)):
                happened.setdefault(name_of(step), 'not tried, it loads no labels')
                if is_one_of(step, IMAGE_LOADERS):
                    image.append(copy.copy(step))
                continue
            steps = [copy.copy(step)]
            tried = [attempt(steps, state) for state in states]
            if isinstance(tried[0], Exception) and image:
                pictured = [attempt([*image, *steps], state) for state in states]
                if any(map(_decides, pictured, states)):
                    steps, tried = [*image, *steps], pictured
            found = tried[0]
            if (isinstance(found, dict) and 'gt_seg_map' in found) or (loads and found is None):
                return position, (*load, *steps[:-1], loader)  # None: it drops this image
            if isinstance(found, Exception):
                happened[name_of(step)] = f'{type(found).__name__}: {found}'
                errors[name_of(step)] = found
                likely = (position, (*load, loader)) if loads else likely
                continue
            happened[name_of(step)] = 'ran, but adds no gt_seg_map'
            if use_image or 'img' not in (found or ()) or any(map(_decides, tried, states)):
                load += steps
                states = [
                    now if isinstance(now, dict) else old for now, old in zip(tried, states, strict=True)
                ]
            else:
                image.append(copy.copy(step))
    if likely is not None:
        return likely  # counting says why
    for error in errors.values():
        if isinstance(error, FileNotFoundError) and path in str(error):
            with reading(path):
                raise error
    listed = ', '.join(f'{name} ({what})' for name, what in happened.items()) or 'it is empty'
    nothing = (
        f'the pipeline loads no annotations, no transform of it yields gt_seg_map: {listed}. Add '
        "dict(type='LoadAnnotations') or your own loading transform to it, the pipeline of the innermost "
        'data set.'
    )
    for name, error in errors.items():
        raise ValueError(
            f'{path}: {name} raises {type(error).__name__}: {error}. If it loads the labels: this file, the '
            f'first, may be broken, or a library or a key may be missing. If it does not: {nothing}'
        ) from error
    raise ValueError(nothing)
