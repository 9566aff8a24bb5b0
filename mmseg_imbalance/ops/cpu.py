"""The soft statistics on a CPU, by kernels that Numba compiles; softmax is recomputed in backward.

A part of an image is read where it is, or the rows that it needs are resized to the columns of the label,
(C, k, w) to (C, k, W). Parts do not depend on the number of threads, and their sums are added in order: the
results are the same bits for any number of threads.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmseg_imbalance.ops import cpu_kernels as kernels
from mmseg_imbalance.ops.bilinear import Taps, taps
from mmseg_imbalance.ops.contract import Options, SoftStats, once_differentiable
from mmseg_imbalance.ops.lanes import NUMBER
from mmseg_imbalance.ops.threads import each

# of a part, C times its pixels: enough for Python's share to be small, and a part for each thread
PART_NUMBERS = 1 << 21
# of a piece, which the kernels take at a time: as many as a core's second cache holds beside others
PIECE_NUMBERS = 1 << 15


def why_not(logits: Tensor, num_groups: int) -> str | None:
    """Why this backend cannot take these logits, None if it can."""
    if not logits.is_cpu:
        return f'it runs on a CPU and the logits are on {logits.device}'
    if logits.dtype == torch.float64:
        return 'it calculates in float32 and the logits are float64'
    if not hasattr(kernels.sum_rows, 'py_func'):
        return 'NUMBA_DISABLE_JIT is set, so Numba compiles nothing'
    return None


def _room(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """By NumPy, which asks Linux for huge pages: else page faults take half of the time of backward."""
    return torch.from_numpy(np.empty(shape.numel() * dtype.itemsize, np.uint8)).view(dtype).view(shape)


@lru_cache
def _taps(small: int, large: int, align_corners: bool) -> Taps:
    low, high, distance = taps(small, large, align_corners)
    return Taps(low, high, distance.astype(np.float32))


class _Part(NamedTuple):
    """Some rows of the label of an image, and the rows of the logits that they are made from."""

    image: int
    rows: slice
    band: slice


class _Pass:
    """A batch in the form that the kernels take, and its parts.

    Args:
        logits, target, o: as a backend receives them.
    """

    def __init__(self, logits: Tensor, target: Tensor, o: Options) -> None:
        nothing = target.new_empty((*target.shape[:2], 0))

        def numbers(values: Tensor | None, dtype: torch.dtype) -> np.ndarray:
            return (nothing if values is None else values.detach()).to(dtype).contiguous().numpy()

        self.logits, self.o = logits.detach(), o
        self.target = numbers(target, torch.int64)
        self.weight = numbers(o.pixel_weight, torch.float32)
        self.marked = numbers(None if o.marked is None else o.marked != 0, torch.bool)
        self.group = numbers(o.group, torch.int64)
        self.resized = logits.shape[2:] != target.shape[1:]
        sizes = zip(logits.shape[2:], target.shape[1:], strict=True)
        self.vertical, self.horizontal = (_taps(*size, o.align_corners) for size in sizes)
        # full-size logits are read, and their gradient is written, where they are
        self.in_place = (
            not self.resized
            and logits.dtype == torch.float32
            and logits.is_contiguous()
            and o.logit_bias is None
        )

    def parts(self) -> list[_Part]:
        batch, height, width = self.target.shape
        step = max(1, PART_NUMBERS // (self.logits.shape[1] * width))
        parts = []
        for start in range(0, height, step):
            rows = slice(start, min(start + step, height))
            first, last = self.vertical.low[rows.start], self.vertical.high[rows.stop - 1]
            band = slice(int(first), int(last) + 1)
            parts.append((rows, band))
        return [_Part(image, *part) for image in range(batch) for part in parts]

    def inputs(self, part: _Part) -> tuple[Any, ...]:
        """``z``, ``rows`` and the arguments up to ``marked`` of the kernels."""
        if self.in_place:
            z, first = self.logits[part.image].numpy(), 0
        else:
            small = self.logits[part.image, :, part.band].float()
            if self.o.logit_bias is not None:
                small = small + self.o.logit_bias.float()[:, None, None]
            z, first = small.contiguous().numpy(), part.band.start
            if self.resized:
                columns = np.empty((*z.shape[:2], self.target.shape[2]), np.float32)
                kernels.to_columns(z, *self.horizontal, columns)
                z = columns
        low, high, distance = (values[part.rows] for values in self.vertical)
        return (
            z,
            (low - first, high - first, distance),
            min(self.target.shape[2], max(1, PIECE_NUMBERS // self.logits.shape[1] // NUMBER) * NUMBER),
            self.target[part.image, part.rows],
            self.o.ignore_index,
            self.weight[part.image, part.rows],
            self.marked[part.image, part.rows],
        )

    def sums(self, part: _Part) -> _Sums:
        classes = self.logits.shape[1]
        sums = _Sums(
            np.zeros((6, classes)),
            np.zeros(classes if self.o.with_log_prob else 0),
            np.zeros((2, classes if self.o.with_recall else 0), np.int64),
            np.zeros((2, self.o.num_groups)),
            np.zeros(1, np.int64),
        )
        group = self.group[part.image, part.rows]
        options = np.float32(self.o.focal_gamma), self.o.square_prediction
        sums.correct[0] = kernels.sum_rows(*self.inputs(part), group, *options, *sums[:-1])
        return sums

    def gradient(
        self, part: _Part, upstream: np.ndarray, grad: Tensor, weight_grad: np.ndarray
    ) -> np.ndarray | None:
        """Write that of a part to ``grad``, (B, C, H, W); of resized logits return it, (C, band, w)."""
        z, *others = self.inputs(part)
        into = grad[part.image].numpy() if self.in_place else np.zeros_like(z)
        kernels.gradient_of_rows(
            z,
            *others,
            np.float32(self.o.focal_gamma),
            self.o.square_prediction,
            upstream[:, part.image],
            self.o.with_log_prob,
            self.resized,
            into,
            weight_grad[part.image, part.rows],
        )
        if self.in_place:
            return None
        if not self.resized:
            grad[part.image, :, part.rows] = torch.from_numpy(into)
            return None
        cells = np.zeros((*z.shape[:2], self.logits.shape[3]), np.float32)
        kernels.from_columns(into, *self.horizontal, cells)
        return cells


class _Sums(NamedTuple):
    """As ``kernels.sum_rows`` has them, and the number of pixels that are right, (1,)."""

    sums: np.ndarray
    log_prob: np.ndarray
    recall: np.ndarray
    groups: np.ndarray
    correct: np.ndarray


class _SoftStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, pixel_weight: Tensor | None, o: Options
    ) -> tuple[Tensor | None, ...]:
        here = _Pass(logits, target, o)
        parts = here.parts()
        counted = list(each(here.sums, parts, on_cpu=True))
        number = len(parts) // len(logits)  # of an image
        sums, log_prob, recall, groups, correct = (
            torch.from_numpy(np.stack(values).reshape(len(logits), number, *values[0].shape).sum(1))
            for values in zip(*counted, strict=True)
        )
        ctx.save_for_backward(logits, target, pixel_weight, o.logit_bias, o.marked)
        ctx.options = replace(o, pixel_weight=None, logit_bias=None, group=None, marked=None)
        ctx.set_materialize_grads(False)
        nll, intersection, truth, *of_marked, prediction = sums.float().unbind(1)
        marked_intersection, marked_truth = of_marked if o.marked is not None else (None, None)
        group_nll = group_count = class_correct = class_count = None
        if o.group is not None:
            group_nll, group_count = groups.sum(0)
            group_nll, group_count = group_nll.float(), group_count.long()
        if o.with_recall:
            class_correct, class_count = (x.contiguous() for x in recall.unbind(1))
        numbers = (group_nll, group_count, class_correct, class_count)
        weights = () if ctx.needs_input_grad[2] else (truth, marked_truth)
        fixed = (correct[:, 0], *numbers, *weights)
        ctx.mark_non_differentiable(*(x for x in fixed if x is not None))
        fields = (
            nll,
            intersection,
            prediction,
            truth,
            fixed[0],
            log_prob.float() if o.with_log_prob else None,
        )
        return *fields, marked_intersection, marked_truth, *numbers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], *by: Tensor | None) -> tuple[Tensor | None, ...]:
        g_nll, g_intersection, g_prediction, g_truth, _, g_log_prob, g_marked, g_marked_truth, *_ = by
        logits, target, weight, bias, marked = saved
        here = _Pass(
            logits, target, replace(ctx.options, pixel_weight=weight, logit_bias=bias, marked=marked)
        )
        given = (g_nll, g_intersection, g_truth, g_marked, g_marked_truth, g_prediction, g_log_prob)
        zeros = torch.zeros(logits.shape[:2], dtype=torch.float32)
        upstream = torch.stack([zeros if x is None else x.float() for x in given]).numpy()
        size = target.shape if ctx.needs_input_grad[2] else (*target.shape[:2], 0)
        weight_grad = torch.zeros(size, dtype=torch.float32)
        if here.resized:
            grad = torch.zeros(logits.shape, dtype=torch.float32)
        else:
            grad = _room(logits.shape, logits.dtype)
        parts = here.parts()
        weights = weight_grad.numpy()
        bands = each(lambda part: here.gradient(part, upstream, grad, weights), parts, on_cpu=True)
        whole = grad.numpy() if here.resized else None
        for part, band in zip(parts, bands, strict=True):
            if whole is not None:  # by NumPy: threads that torch wakes keep a core busy for a while
                whole[part.image, :, part.band] += band
        by_weight = weight_grad.to(weight.dtype) if ctx.needs_input_grad[2] else None
        return grad.to(logits.dtype), None, by_weight, None


@torch.compiler.disable
def soft_stats(logits: Tensor, target: Tensor, options: Options) -> SoftStats:
    """See :func:`mmseg_imbalance.ops.soft_stats`."""
    return SoftStats(*_SoftStats.apply(logits, target, options.pixel_weight, options))
