"""Counting the classes of a data set, from its annotations alone."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmseg_imbalance.annotations import Annotation, find_annotations
from mmseg_imbalance.cityscapes import is_cityscapes_train
from mmseg_imbalance.count_cache import counts_file, default_cache_dir, load_counts, store_counts
from mmseg_imbalance.frequency import CITYSCAPES_TRAIN, ClassFrequency
from mmseg_imbalance.ignored_label import current_config, decode_heads, ignored_label
from mmseg_imbalance.lonely_class import refuse_lonely_class
from mmseg_imbalance.pixel_counts import Note, count_pixels, notes_text, one_class_alone

__all__ = ['check_counting', 'count_classes', 'training_frequency']

T = TypeVar('T')


class _Row(NamedTuple):
    """What was counted in an annotation, or why not. Errors are data: they cross processes in order."""

    position: int  # among the annotations
    counts: np.ndarray  # (C,)
    ignored: int
    notes: tuple[Note, ...] = ()
    error: Exception | None = None


def training_frequency(
    source: Any = None,
    *,
    heads: Iterable[Any] | None = None,
    max_images: int | None = None,
    num_workers: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    per_image: bool = False,
    progress: bool = True,
    label_transforms: Sequence[str] | None = None,
) -> ClassFrequency:
    """The class frequency of the training annotations; every user of this package gets it here.

    All ranks must call it, and all get the same or raise the same.

    The label that is no class is what the data set or the decode heads say, see
    :func:`~mmseg_imbalance.ignored_label.ignored_label`.

    The counts are kept in one folder: `cache_dir`, else the `cache_dir` of a ClassWeightHook among the
    `custom_hooks` of the config, else the environment variable MMSEG_IMBALANCE_CACHE, else
    ``~/.cache/mmseg_imbalance``. Without a home folder they are not kept. `label_transforms` too are those of
    that hook where none are given here.

    Args:
        source: a runner in training; a config, whose training data set is built; a data set (neither model
            nor config is known then); None: the config of the runner that was made last.
        heads: those whose ``ignore_index`` counts; None: the decode heads of the model.
        num_workers: worker processes of each rank; None: as many as the train_dataloader has.
        max_images, per_image, progress, label_transforms: see :func:`count_classes`.

    Raises:
        ValueError: there is no runner, or no train_dataloader; data set and heads ignore different labels; or
            as :func:`count_classes`.
        FileNotFoundError: the data set or an annotation is not there.
    """

    def find() -> tuple[Any, int, Path | None, int | None, Sequence[str] | None]:
        dataset, config, model, workers = _training_data(source)
        label = ignored_label(dataset, decode_heads(model) if heads is None else heads)
        folder = cache_dir or _option_of_hook(config, 'cache_dir') or _users_folder() or None
        workers = workers if num_workers is None else num_workers
        names = _option_of_hook(config, 'label_transforms') if label_transforms is None else label_transforms
        path = None if folder is None else Path(folder)
        return dataset, label, path, workers, names

    found, failure = _attempt(find)
    _exchange(failure, None)  # nobody starts to count unless all can
    dataset, ignore_index, folder, workers, names = found or (None,) * 5
    return count_classes(
        dataset,
        max_images=max_images,
        ignore_index=ignore_index,
        num_workers=workers,
        cache_dir=folder,
        progress=progress,
        per_image=per_image,
        label_transforms=names,
    )


def _users_folder() -> Path | None:
    try:
        return default_cache_dir()
    except RuntimeError as error:
        _warn(f'class counts are not cached, {error}')
        return None


def _default_workers() -> int:
    """Two, where a worker is a copy of this process; elsewhere it may not start, as in notebooks."""
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    return 2 if method == 'fork' else 0


def _training_data(source: Any) -> tuple[Any, Any, Any, int | None]:
    """The training data set, config, model and number of workers of `source`; None what is not known."""
    from mmseg_imbalance.registry import DATASETS

    from mmengine.config import Config

    if source is None and (source := current_config()) is None:
        raise ValueError('there is no runner, and so no config that names the training data')
    if isinstance(source, Config | dict):
        loader = source.get('train_dataloader')
        if loader is None:
            raise ValueError(
                'the training annotations are counted, but the config has no train_dataloader; add one, only '
                'its dataset is used'
            )
        return DATASETS.build(loader['dataset']), source, source.get('model'), loader.get('num_workers')
    if hasattr(source, 'train_dataloader'):  # a runner
        loader = source.train_dataloader
        return loader.dataset, source.cfg, source.model, getattr(loader, 'num_workers', None)
    return source, None, None, None


def _part(model: Any, name: str, default: Any = None) -> Any:
    return model.get(name, default) if isinstance(model, dict) else getattr(model, name, default)


def _option_of_hook(config: Any, option: str) -> Any:
    """What a ClassWeightHook of the config, or one made already, has for an option; None: it does not say."""
    for hook in (config.get('custom_hooks') or ()) if config is not None else ():
        kind = _part(hook, 'type', type(hook))  # the name or, in Python configs, the class
        if getattr(kind, '__name__', str(kind)).rpartition('.')[2] == 'ClassWeightHook':
            return _part(hook, option)
    return None


def count_classes(
    dataset: Any,
    *,
    max_images: int | None = None,
    ignore_index: int | None = None,
    num_workers: int | None = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
    per_image: bool = False,
    label_transforms: Sequence[str] | None = None,
) -> ClassFrequency:
    """Pixels and images of each class, from annotations alone, labelled as training sees them.

    All ranks must call it: each counts its part, all get the whole. Of the pipeline, what loads labels and
    what changes them is run, not what resizes, crops or flips. Cityscapes train is not read but for 30 of its
    label files, its counts are     published.

    Args:
        dataset: BaseSegDataset, or Concat-, Repeat-, ClassBalanced-, MultiImageMixDataset of such.
        max_images: count a random sample of so many distinct images, the same in every call. All are counted
            where the sample holds one class and ignored pixels alone.
        ignore_index: the label that is no class; None: each data set's own.
        num_workers: worker processes of each rank; None: two where a process can be copied, else none.
        cache_dir: folder where counts are kept. They are found again by path, size and time of
            the annotations (those that are not local: path only), label mapping, classes and the code that
            loads them. A few images are counted again each time; if they differ, all are.
        progress: show a bar, on rank 0.
        per_image: the counts of each image are needed, so Cityscapes train is read as any other, as it is
            where `max_images` is at least the number of images.
        label_transforms: names of the transforms after the loading one that change what a label means. They
            are run, with the image if they need it. None: transforms of MMCV and MMSegmentation are known to
            keep labels; any other is run if it needs no image, and named in a warning if it does. (): none.

    Raises:
        FileNotFoundError: an annotation file is missing.
        TypeError: the classes are a string.
        ValueError: no image, no or one class, no annotations, an unreadable file, a label out of range, or
            one class and ignored pixels alone, as in masks of 0 and 255.
    """
    import mmseg_imbalance.registry  # noqa: F401  its error says how to install MMSegmentation

    check_counting(max_images, num_workers)
    found, failure = _attempt(lambda: find_annotations(dataset, ignore_index, label_transforms))
    classes, annotations = found or ((), [])
    if len(set(_exchange(failure, _digest(annotation.path for annotation in annotations)))) > 1:
        raise ValueError(
            'not all ranks see the same annotation files. Give every node the same data set, under '
            'the same paths.'
        )
    dataset_images = sum(annotation.repeats for annotation in annotations)
    workers = _default_workers() if num_workers is None else num_workers
    count = partial(_count, classes, dataset_images, cache_dir, workers, progress)
    sampled = max_images is not None and max_images < len(annotations)
    chosen = annotations
    if sampled:
        sample = np.random.default_rng(0).choice(len(annotations), max_images, replace=False)
        chosen = [annotations[position] for position in np.sort(sample)]
    may_be_published = not per_image and (max_images is None or sampled)
    frequency = count(chosen, annotations if may_be_published else [])
    if sampled and frequency.ignored and np.count_nonzero(frequency.pixels) < 2:
        _warn(
            f'in a sample of {max_images} images one class and ignored pixels occur alone, so all '
            f'{len(annotations)} are counted to see whether the others are like them.'
        )
        chosen = annotations
        frequency = count(annotations)
    refuse_lonely_class(frequency, chosen)
    return frequency


def check_counting(max_images: int | None, num_workers: int | None) -> None:
    """Raise a ValueError unless these options can be used."""
    for name, value, smallest, remedy in (
        ('max_images', max_images, 1, 'None counts all.'),
        ('num_workers', num_workers, 0, 'None takes those of the train_dataloader.'),
    ):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Integral) or value < smallest:
            raise ValueError(f'{name}={value!r}, allowed are integers, {smallest} and more. {remedy}')


def _count(
    classes: tuple[str, ...],
    dataset_images: int,
    cache_dir: str | os.PathLike[str] | None,
    num_workers: int,
    progress: bool,
    annotations: list[Annotation],
    may_be_cityscapes: Sequence[Annotation] = (),
) -> ClassFrequency:
    """Counts from the cache or from the files, or those of Cityscapes train if this is that."""
    from mmengine.dist import get_dist_info

    rank, world_size = get_dist_info()
    counted = _Annotations(annotations, len(classes))

    def look_up() -> tuple[Path | None, ClassFrequency | None]:
        if rank != 0:
            return None, None
        if is_cityscapes_train(
            classes, may_be_cityscapes, _Annotations(may_be_cityscapes, len(classes)).some
        ):
            return None, CITYSCAPES_TRAIN
        if cache_dir is None:
            return None, None
        try:
            path = counts_file(cache_dir, classes, annotations, dataset_images)
        except Exception as error:  # whatever a loader of somebody's own holds
            _warn(f'class counts are not cached, the loader cannot be looked into: {error!r}')
            return None, None
        return path, load_counts(path, classes, annotations, counted.some)

    # Only rank 0 looks into the cache and tells the others, so that they never disagree.
    looked_up, failure = _attempt(look_up)
    path, cached = _exchange(failure, looked_up)[0]
    if cached is not None:
        return cached
    part = range(rank, len(annotations), world_size)
    show = progress and rank == 0
    part_rows, failure = _attempt(lambda: _count_part(counted, part, num_workers, show))
    rows = [row for rows_of_rank in _exchange(failure, part_rows) for row in rows_of_rank]
    rows.sort(key=lambda row: row.position)
    for row in rows:  # in order, so that it is the error that a single process would meet
        if row.error is not None:
            raise row.error
    if len(classes) == 1:
        raise ValueError(one_class_alone(annotations[0].dataset))
    unusual = notes_text(note for row in rows for note in row.notes)
    if unusual and rank == 0:
        _warn(unusual)
    names, sources = _sources(annotations)
    frequency = ClassFrequency.from_rows(
        classes,
        np.stack([row.counts for row in rows]),
        np.array([row.ignored for row in rows]),
        [annotation.path for annotation in annotations],
        np.array([annotation.repeats for annotation in annotations]),
        dataset_images,
        sources,
        names,
    )
    if path is not None and rank == 0:
        store_counts(frequency, path)
    return frequency


def _sources(annotations: list[Annotation]) -> tuple[list[str], np.ndarray]:
    """Names of the data sets that these are of, with what their paths have in common, and which is whose."""
    numbers: dict[Any, int] = {}
    paths: list[list[str]] = []
    sources = np.zeros(len(annotations), dtype=np.int64)
    for position, annotation in enumerate(annotations):
        number = numbers.setdefault(annotation.dataset, len(numbers))
        if number == len(paths):
            paths.append([])
        paths[number].append(os.path.dirname(annotation.path))
        sources[position] = number
    names = []
    for dataset, folders in zip(numbers, paths, strict=True):
        first, last = min(folders), max(folders)  # what these share, all share
        shared = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        names.append(f'{type(dataset).__name__} {first[:shared]}')
    return names, sources


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What `work` returns, or its exception as one that can be sent to other ranks."""
    try:
        return work(), None
    except Exception as error:
        failure: Exception = RuntimeError(f'counting failed: {type(error).__name__}: {error}')
        for kind in (FileNotFoundError, TypeError, ValueError):
            if isinstance(error, kind):
                failure = kind(str(error))  # a subclass may not survive pickling
        if isinstance(error, NotImplementedError) and 'get_cat_ids' in str(error):
            failure = ValueError(
                f'{error}: ClassBalancedDataset needs it, and data sets of MMSegmentation have none. Take '
                "the data set without it, and sampler=dict(type='RareClassSampler') in train_dataloader."
            )
        failure.__cause__ = error
        return None, failure


def _exchange(failure: Exception | None, value: Any) -> list[Any]:
    """The `value` of every rank; if one has failed, every rank raises the same."""
    from mmengine.dist import all_gather_object

    outcomes = all_gather_object((failure, value))
    for failed, _ in outcomes:
        if failed is not None:
            raise failed
    return [value for _, value in outcomes]


def _warn(message: str) -> None:
    from mmengine.logging import print_log

    print_log(message, logger='current', level=logging.WARNING)


def _digest(parts: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode())
    return digest.hexdigest()[:32]


class _Annotations(Dataset[_Row]):
    """Sources as the data set of a loader, whose workers count."""

    def __init__(self, annotations: Sequence[Annotation], num_classes: int) -> None:
        self.annotations, self.num_classes = annotations, num_classes

    def __getitem__(self, position: int) -> _Row:
        try:
            return _Row(position, *count_pixels(self.annotations[position], self.num_classes))
        except (FileNotFoundError, ValueError) as error:
            return _Row(position, np.empty(0), 0, error=error)

    def some(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions, spread and drawn anew each time, counts (number, C) and ignored pixels (number,) there.

        The counts of an annotation with an error are -1.
        """
        total = len(self.annotations)
        edges = np.linspace(0, total, min(number, total) + 1).astype(int)
        positions = np.random.default_rng().integers(edges[:-1], edges[1:])
        rows = [self[position] for position in positions]
        failed = np.full(self.num_classes, -1)
        counts = [failed if row.error is not None else row.counts for row in rows]
        return positions, np.stack(counts), np.array([row.ignored for row in rows])


def _count_part(counted: _Annotations, part: range, num_workers: int, show: bool) -> list[_Row]:
    """Rows of the annotations in `part`, up to the first error of a file."""
    from rich.progress import track

    rows: list[_Row] = []

    def read(source: Iterable[_Row]) -> None:
        for row in track(source, 'Counting classes', total=len(part) - len(rows), disable=not show):
            rows.append(row)
            if row.error is not None:
                break

    if num_workers > 0:
        try:
            read(
                DataLoader(
                    counted,
                    batch_size=None,
                    sampler=part,
                    num_workers=num_workers,
                    collate_fn=_unchanged,  # the default makes tensors of arrays
                    generator=torch.Generator(),  # the default draws from the one that training uses
                )
            )
            return rows
        except Exception as error:  # errors of files are rows; this is one of processes
            _warn(
                f'{num_workers} worker processes cannot count classes ({type(error).__name__}: {error}). '
                'This process counts the rest, which takes longer; num_workers=0 does so from the start.'
            )
    read(counted[position] for position in part[len(rows) :])
    return rows


def _unchanged(row: Any) -> Any:
    return row
