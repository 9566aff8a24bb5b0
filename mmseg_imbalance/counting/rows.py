"""Counting annotation by annotation, in worker processes where they can be had."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmseg_imbalance.counting.annotations import Annotation
from mmseg_imbalance.counting.pixel_counts import Note, count_pixels
from mmseg_imbalance.counting.ranks import warn

__all__ = ['AnnotationRows', 'Row', 'count_rows', 'default_workers']


class Row(NamedTuple):
    """What was counted in an annotation, or why not. Errors are data: they cross processes in order."""

    position: int  # among the annotations
    counts: np.ndarray  # (C,)
    ignored: int
    notes: tuple[Note, ...] = ()
    error: Exception | None = None


class AnnotationRows(Dataset[Row]):
    """Sources as the data set of a loader, whose workers count."""

    def __init__(self, annotations: Sequence[Annotation], num_classes: int) -> None:
        self.annotations, self.num_classes = annotations, num_classes

    def __getitem__(self, position: int) -> Row:
        try:
            return Row(position, *count_pixels(self.annotations[position], self.num_classes))
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
        except Exception as error:  # errors of files are rows; this is one of processes
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
