"""Counting a data set: on all ranks together, from what is kept or from the files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmseg_imbalance.counting.annotations import Annotation, find_annotations
from mmseg_imbalance.counting.cache import counts_file, load_counts, store_counts
from mmseg_imbalance.counting.cityscapes import is_cityscapes_train
from mmseg_imbalance.counting.lonely_class import refuse_lonely_class
from mmseg_imbalance.counting.pixel_counts import notes_text, one_class_alone
from mmseg_imbalance.counting.ranks import alone, attempt, exchange, place, speaks, warn
from mmseg_imbalance.counting.rows import AnnotationRows, count_rows, default_workers
from mmseg_imbalance.files import locked
from mmseg_imbalance.frequency import CITYSCAPES_TRAIN, ClassFrequency
from mmseg_imbalance.options import check_whole


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

    All ranks must call it: each counts its part, all get the whole. A worker of a data loader counts all by
    itself; where counts are kept, workers take turns, so that the next one finds them. Of the pipeline, what
    loads labels and what changes them is run, not what resizes, crops or flips. Cityscapes train is not read
    but for 120 of its label files, its counts are published.

    Args:
        dataset: BaseSegDataset, or Concat-, Repeat-, ClassBalanced-, MultiImageMixDataset of such.
        max_images: count a random sample of so many distinct images, the same in every call. All are counted
            where the sample holds fewer than two classes.
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
    found, failure = attempt(lambda: find_annotations(dataset, ignore_index, label_transforms))
    classes, annotations = found or ((), [])
    if len(set(exchange(failure, _digest(annotation.path for annotation in annotations)))) > 1:
        raise ValueError(
            'not all ranks see the same annotation files. Give every node the same data set, under '
            'the same paths.'
        )
    dataset_images = sum(annotation.repeats for annotation in annotations)
    workers = default_workers() if num_workers is None else num_workers
    count = partial(_count, classes, dataset_images, cache_dir, workers, progress)
    sampled = max_images is not None and max_images < len(annotations)
    chosen = annotations
    if sampled:
        sample = np.random.default_rng(0).choice(len(annotations), max_images, replace=False)
        chosen = [annotations[position] for position in np.sort(sample)]
    may_be_published = not per_image and (max_images is None or sampled)
    with ExitStack() as held:
        if alone() and cache_dir is not None:
            with suppress(OSError):  # a folder that nobody may write to
                held.enter_context(locked(cache_dir))
        frequency = count(chosen, annotations if may_be_published else [])
    if sampled and np.count_nonzero(frequency.pixels) < 2:
        warn(
            f'in a sample of {max_images} images fewer than two classes occur, so all {len(annotations)} are '
            'counted to see whether the others are like them.'
        )
        chosen = annotations
        frequency = count(annotations)
    refuse_lonely_class(frequency, chosen)
    return frequency


def check_counting(max_images: int | None, num_workers: int | None) -> None:
    """Raise a ValueError unless these options can be used."""
    if max_images is not None:  # which counts all
        check_whole(1, max_images=max_images)
    if num_workers is not None:  # which takes those of the train_dataloader
        check_whole(0, num_workers=num_workers)


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
    from mmengine.logging import print_log

    rank, world_size = place()
    counted = AnnotationRows(annotations, len(classes))

    def look_up() -> tuple[Path | None, ClassFrequency | None]:
        if rank != 0:
            return None, None
        if is_cityscapes_train(
            classes, may_be_cityscapes, AnnotationRows(may_be_cityscapes, len(classes)).some
        ):
            return None, CITYSCAPES_TRAIN
        if cache_dir is None:
            return None, None
        try:
            path = counts_file(cache_dir, classes, annotations, dataset_images)
        except Exception as error:  # the repr or an attribute of what a loader of the user's own holds
            warn(f'class counts are not cached, the loader cannot be looked into: {error!r}')
            return None, None
        return path, load_counts(path, classes, annotations, counted.some)

    # Only rank 0 looks into the cache and tells the others, so that they never disagree.
    looked_up, failure = attempt(look_up)
    path, cached = exchange(failure, looked_up)[0]
    if cached is not None:
        return cached
    part = range(rank, len(annotations), world_size)
    show = progress and rank == 0
    part_rows, failure = attempt(lambda: count_rows(counted, part, num_workers, show))
    rows = [row for rows_of_rank in exchange(failure, part_rows) for row in rows_of_rank]
    rows.sort(key=lambda row: row.position)
    for row in rows:  # in order, so that it is the error that a single process would meet
        if row.error is not None:
            raise row.error
    if len(classes) == 1:
        raise ValueError(one_class_alone(annotations[0].dataset))
    unusual = notes_text(note for row in rows for note in row.notes)
    if unusual and speaks():
        warn(unusual)
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
    frequency = replace(frequency, unusual=unusual or None)
    if path is not None and rank == 0:
        unnamed = next((row.unnamed for row in rows if row.unnamed), '')
        if unnamed:
            print_log(
                'class counts are not kept: labels also come from files that the data set does not name, '
                f'such as {unnamed}, so nobody would notice when these change. Counts are kept if '
                'load_data_list of the data set names the files in the dict of each image, under any key.',
                logger='current',
            )
        else:
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


def _digest(parts: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode())
    return digest.hexdigest()[:32]
