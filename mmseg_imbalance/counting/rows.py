"""Counting annotation by annotation, in worker processes where they can be had."""

from __future__ import annotations

import builtins
import io
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmseg_imbalance.counting.annotations import Annotation
from mmseg_imbalance.counting.pixel_counts import Note, count_pixels
from mmseg_imbalance.counting.ranks import warn

_OPENING = threading.Lock()


class Row(NamedTuple):
    """What was counted in an annotation, or why not. Errors are data: they cross processes in order."""

    position: int  # among the annotations
    counts: np.ndarray  # (C,)
    ignored: int
    notes: tuple[Note, ...] = ()
    error: Exception | None = None
    unnamed: str = ''  # a file that was read and is none of `named_files`


class AnnotationRows(Dataset[Row]):
    """Annotations as the data set of a data loader, whose workers count them."""

    def __init__(self, annotations: Sequence[Annotation], num_classes: int) -> None:
        self.annotations, self.num_classes = annotations, num_classes

    def __getitem__(self, position: int) -> Row:
        annotation = self.annotations[position]
        opened: list[str] = []
        try:
            if annotation.table is not None and not annotation.steps.change:  # one file, of a known name
                return Row(position, *count_pixels(annotation, self.num_classes))
            with _opened_files(opened):
                counted = count_pixels(annotation, self.num_classes)
            return Row(position, *counted, unnamed=_unnamed(annotation, opened))
        except (FileNotFoundError, ValueError) as error:
            return Row(position, np.empty(0), 0, error=error)

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


def named_files(annotation: Annotation) -> list[str]:
    """The local files that the data info of an annotation names: its labels, its image, and others."""
    info = annotation.dataset.get_data_info(annotation.row)
    values = [each for value in info.values() for each in (value if isinstance(value, list) else [value])]
    texts = {os.fspath(value) for value in values if isinstance(value, str | os.PathLike)}
    return sorted(path for path in texts if os.path.isfile(path))


def _unnamed(annotation: Annotation, opened: Sequence[str]) -> str:
    """The first of the opened files that the data info does not name; '' if there is none."""
    named = set(map(os.path.realpath, named_files(annotation)))
    if not opened and not annotation.dataset.get_data_info(annotation.row).get('seg_map_path'):
        return annotation.path  # a guess: compiled code has read the labels, nobody knows where
    return next((path for path in opened if os.path.realpath(path) not in named), '')


@contextmanager
def _opened_files(opened: list[str]) -> Iterator[None]:
    """Add the paths of files that this thread opens to read; of compiled code, those of OpenCV alone."""
    import cv2

    thread = threading.get_ident()

    def watched(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, *args: Any, **options: Any) -> Any:
            mode = str(options.get('mode', args[0] if args else 'r'))
            found = plain(file, *args, **options)
            read = mode[0] not in 'wax' and found is not None and isinstance(file, str | os.PathLike)
            if read and threading.get_ident() == thread:
                opened.append(os.fspath(file))
            return found

        return call

    with _OPENING:
        places = (builtins, 'open'), (io, 'open'), (cv2, 'imread')
        plain = [getattr(*place) for place in places]
        for place, function in zip(places, plain, strict=True):
            setattr(*place, watched(function))
        try:
            yield
        finally:
            for place, function in zip(places, plain, strict=True):
                setattr(*place, function)


def count_rows(counted: AnnotationRows, part: range, num_workers: int, show: bool) -> list[Row]:
    """Rows of the annotations in `part`, up to the first error of a file."""
    from rich.progress import track

    rows: list[Row] = []

    def read(source: Iterable[Row]) -> None:
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
        # Errors of files are rows. Of processes many kinds are known, and what a loader of the user's own
        # raises there is raised once more below.
        except Exception as error:
            warn(
                f'{num_workers} worker processes cannot count classes ({type(error).__name__}: {error}). '
                'This process counts the rest, which takes longer; num_workers=0 does so from the start.'
            )
    read(counted[position] for position in part[len(rows) :])
    return rows


def _unchanged(row: Any) -> Any:
    return row


def default_workers() -> int:
    """Two, where a worker is a copy of this process; elsewhere it may not start, as in notebooks."""
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    return 2 if method == 'fork' else 0
