"""The innermost data sets of a wrapped one, and how often each of their rows occurs in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

NEVER = 2**62  # an index behind all others


class Part(NamedTuple):
    """An innermost data set, and the MultiImageMixDatasets around it: their pipelines come after its own."""

    dataset: Any
    mixers: tuple[Any, ...]

    def pipeline(self) -> list[Any]:
        """The transforms that its images go through, those of sequences of transforms one by one."""
        transforms = list(self.dataset.pipeline.transforms)
        for mixer in self.mixers:
            kinds = zip(mixer.pipeline, mixer.pipeline_types, strict=True)
            transforms += [step for step, kind in kinds if kind not in (mixer._skip_type_keys or ())]
        return [each for step in transforms for each in _flat(step)]


@contextmanager
def initialising() -> Iterator[None]:
    """Say what to take in place of ClassBalancedDataset, which fails while it is built or read.

    Raises:
        ValueError: a data set has no ``get_cat_ids``, as those of MMSegmentation.
    """
    try:
        yield
    except NotImplementedError as error:
        if 'get_cat_ids' not in str(error):
            raise
        raise ValueError(
            f'{error}: ClassBalancedDataset needs it, and data sets of MMSegmentation have none. Take '
            "the data set without it, and sampler=dict(_delete_=True, type='RareClassSampler') in "
            'train_dataloader.'
        ) from error


def part_repeats(dataset: Any, mixers: tuple[Any, ...] = ()) -> dict[Part, np.ndarray]:
    """How often a possibly wrapped data set has each row of each of its parts, (rows,) int64.

    Raises:
        TypeError: one that is not MMSegmentation's, or derived from such a one.
    """
    wrapper = hasattr(dataset, 'datasets') or hasattr(dataset, 'dataset')
    needed = ('full_init',) if wrapper else ('full_init', 'get_data_info', 'pipeline')
    if missing := [name for name in needed if not hasattr(dataset, name)]:
        raise TypeError(
            f'the classes of {type(dataset).__module__}.{type(dataset).__name__} cannot be counted, it has '
            f"no {', '.join(missing)}. Take one derived from MMSegmentation's BaseSegDataset, alone or "
            'in ConcatDataset, RepeatDataset, ClassBalancedDataset or MultiImageMixDataset. For another one '
            'give class_weight as numbers or as a file.'
        )
    with initialising():
        dataset.full_init()
    found = _repeats_inside(dataset, mixers)
    number = sum(int(times.sum()) for times in found.values())
    if number != len(dataset):
        raise TypeError(
            f'{type(dataset).__module__}.{type(dataset).__name__} has {len(dataset)} images, but {number} '
            'are found in it. It chooses them by itself, so it cannot be counted. If it wraps a data set, '
            'give it repeat_indices as ClassBalancedDataset has them: the index in `dataset` of each of its '
            'images. Else give class_weight as numbers or as a file.'
        )
    return found


def _repeats_inside(dataset: Any, mixers: tuple[Any, ...]) -> dict[Part, np.ndarray]:
    from mmengine.dataset import BaseDataset

    if hasattr(dataset, 'datasets'):  # ConcatDataset
        found: dict[Part, np.ndarray] = {}
        for inner in dataset.datasets:
            for part, times in part_repeats(inner, mixers).items():
                found[part] = found[part] + times if part in found else times
        return found
    if not hasattr(dataset, 'dataset'):
        rows = len(dataset)
        if getattr(type(dataset), 'get_data_info', None) is BaseDataset.get_data_info:
            rows = min(rows, BaseDataset.__len__(dataset))  # there are no more, whatever its own __len__ says
        return {Part(dataset, mixers): np.ones(rows, dtype=np.int64)}
    if hasattr(dataset, 'pipeline'):  # MultiImageMixDataset
        mixers = (dataset, *mixers)
    found = part_repeats(dataset.dataset, mixers)
    if hasattr(dataset, 'repeat_indices'):  # ClassBalancedDataset
        starts, size = part_starts(found)
        chosen = part_rows(dataset.dataset, starts, mixers)[
            np.asarray(dataset.repeat_indices, dtype=np.int64)
        ]
        times = np.bincount(chosen, minlength=size)
        return {part: times[starts[part] : starts[part] + len(rows)] for part, rows in found.items()}
    return {part: times * getattr(dataset, 'times', 1) for part, times in found.items()}  # RepeatDataset


def own_access(dataset: Any) -> Iterator[str]:
    """Names of the methods by which a data set, or one inside it, takes images in a way of its own."""
    if not hasattr(dataset, 'repeat_indices'):
        for name in ('__getitem__', 'prepare_data'):
            method: Any = getattr(type(dataset), name, None)
            if getattr(method, '__module__', 'mmengine').partition('.')[0] not in ('mmengine', 'mmseg'):
                yield f'{method.__module__}.{method.__qualname__}'
    for inner in [*getattr(dataset, 'datasets', ()), getattr(dataset, 'dataset', None)]:
        if inner is not None:
            yield from own_access(inner)


def part_starts(repeats: dict[Part, np.ndarray]) -> tuple[dict[Part, int], int]:
    """Where the rows of each part start when all are numbered through, and how many there are."""
    ends = np.cumsum([0, *map(len, repeats.values())]).tolist()
    return dict(zip(repeats, ends, strict=False)), ends[-1]


def part_rows(dataset: Any, starts: dict[Part, int], mixers: tuple[Any, ...] = ()) -> np.ndarray:
    """(len(dataset),) int64: the number of the row that each index is, numbered through as in `starts`."""
    if hasattr(dataset, 'datasets'):
        return np.concatenate([part_rows(inner, starts, mixers) for inner in dataset.datasets])
    if not hasattr(dataset, 'dataset'):
        start = starts[Part(dataset, mixers)]
        return np.arange(start, start + len(dataset), dtype=np.int64)
    if hasattr(dataset, 'pipeline'):
        mixers = (dataset, *mixers)
    rows = part_rows(dataset.dataset, starts, mixers)
    if hasattr(dataset, 'repeat_indices'):
        return rows[np.asarray(dataset.repeat_indices, dtype=np.int64)]
    return np.tile(rows, getattr(dataset, 'times', 1))


def first_indices(dataset: Any) -> np.ndarray:
    """(images,) int64: the first index of `dataset` at which each of its distinct images is."""
    repeats = part_repeats(dataset)
    occurs = np.concatenate(list(repeats.values())) > 0
    return _first_of_rows(dataset, *part_starts(repeats))[occurs]


def _first_of_rows(
    dataset: Any, starts: dict[Part, int], size: int, mixers: tuple[Any, ...] = ()
) -> np.ndarray:
    """(size,) int64: the first index that is each row, numbered through as in `starts`; NEVER: none is."""
    if hasattr(dataset, 'datasets'):
        offsets = np.cumsum([0, *map(len, dataset.datasets)])
        found = [_first_of_rows(inner, starts, size, mixers) for inner in dataset.datasets]
        return np.minimum.reduce([first + offset for first, offset in zip(found, offsets, strict=False)])
    if hasattr(dataset, 'dataset') and not hasattr(dataset, 'repeat_indices'):  # copies come later
        mixers = (dataset, *mixers) if hasattr(dataset, 'pipeline') else mixers
        return _first_of_rows(dataset.dataset, starts, size, mixers)
    first = np.full(size, NEVER)
    rows = part_rows(dataset, starts, mixers)
    first[rows[::-1]] = np.arange(len(rows))[::-1]  # the last one written stays
    return first


def _flat(step: Any) -> Iterator[Any]:
    if type(step).__name__ == 'Compose' and type(step).__module__.startswith(('mmcv.', 'mmengine.')):
        for each in step.transforms:
            yield from _flat(each)
    else:
        yield step
