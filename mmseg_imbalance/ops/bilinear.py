"""Bilinear resize of one axis, as a banded matrix or cell by cell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

COLUMN_BLOCK = 128


class Taps(NamedTuple):
    """The two cells of a small axis that each output of a large one lies between, (large,) each."""

    low: np.ndarray  # int64, the first one
    high: np.ndarray  # int64, the other one
    distance: np.ndarray  # float64, from the first


def taps(small: int, large: int, align_corners: bool) -> Taps:
    """Of an axis, as ``F.interpolate`` has them."""
    i = np.arange(large, dtype=np.float64)
    if align_corners:
        x = i * ((small - 1) / max(large - 1, 1))
    else:
        x = np.maximum((i + 0.5) * (small / large) - 0.5, 0)
    low = np.minimum(x.astype(np.int64), small - 1)
    # where nothing is resized an output is its cell, as in torch, whatever lies beside it
    high = low if small == large else np.minimum(low + 1, small - 1)
    return Taps(low, high, x - low)


class Axis(NamedTuple):
    """Where each of the large axis's outputs lies among the cells of the small one."""

    low: np.ndarray  # (large,) int, the first of the two cells that an output lies between
    high: np.ndarray  # (large,) int, the other one
    part: Tensor  # (large,), the distance from the first
    matrix: Tensor  # (large, small), banded

    @classmethod
    def make(cls, small: int, large: int, align_corners: bool, like: Tensor) -> Axis:
        """Of an axis of ``like``, as ``F.interpolate`` has it; numbers are single precision or better."""
        low, high, distance = taps(small, large, align_corners)
        matrix = np.zeros((large, small))
        every = np.arange(large)
        matrix[every, low] += 1 - distance
        matrix[every, high] += distance
        # rounded here: not every device has double precision
        numbers = np.float64 if like.dtype == torch.float64 else np.float32
        part, banded = (torch.from_numpy(t.astype(numbers)).to(like.device) for t in (distance, matrix))
        return cls(low, high, part, banded)

    def band(self, outputs: slice) -> slice:
        """The cells that these outputs are resized from."""
        return slice(int(self.low[outputs.start]), int(self.high[outputs.stop - 1]) + 1)

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """(cells, outputs, their block of the matrix), few of each."""
        large = len(self.matrix)
        for start in range(0, large, COLUMN_BLOCK):
            outputs = slice(start, min(start + COLUMN_BLOCK, large))
            cells = self.band(outputs)
            yield cells, outputs, self.matrix[outputs, cells]

    def between(self, x: Tensor, dim: int, outputs: slice, first: int = 0) -> Tensor:
        """These outputs from the cells of ``x`` along ``dim``, the first of which is number ``first``.

        In the product with the matrix each cell meets each output of a block, be it times 0, which is not 0
        where the cell is not finite. Here an output meets its two cells alone.
        """
        low, high = (torch.from_numpy(cells[outputs] - first).to(x.device) for cells in (self.low, self.high))
        part = self.part[outputs].view(-1, *[1] * (x.ndim - 1 - dim))
        return x.index_select(dim, low).mul_(1 - part).add_(x.index_select(dim, high).mul_(part))
