"""The soft statistics strip by strip: bounded memory, softmax recomputed in backward.

Each thread takes some rows of an image and walks them in strips that fit the cache. From small logits, it
first resizes the columns of the source rows that it needs, (C, k, w) to (C, k, W), block by block of a banded
matrix; a strip takes its rows from there, and the gradient goes back through the transposed matrices.

Rows, not operations, are what the CPU's threads share: a strip is dozens of short operations, and if each
were split among the threads, all would wait for the slowest dozens of times, which costs a multiple where
other processes, data loaders among them, want the same cores.

Backward, with p recomputed and the gradients gN, gI, gP, gL of nll, intersection, prediction, log_prob, for a
pixel of label y and weight m:

    a    = m (gI_y p_y + gN_y dl/dlog p_y),   l the pixel's loss: -log p_y or its focal form
    q_k  = m gP_k                             2 m gP_k p_k where the prediction is squared
    dz_k = p_k (q_k - sum_j q_j p_j - a - m sum_j gL_j) + m gL_k + [k = y] a

Only logits and labels are kept between the passes. p is never formed: e = exp(z - max z) stands for it,
and its sum over classes divides the per-pixel factors instead, C times fewer numbers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from threading import Barrier
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmseg_imbalance.ops.soft_stats import Options, SoftStats

# numbers in a (C, r, W) buffer of a strip: few enough for the cache, enough for Python's share to be small
STRIP_NUMBERS = 1 << 19
# a part keeps the source rows of its strips at full width, which are a strip's worth of memory or so
STRIPS_PER_PART = 4
COLUMN_BLOCK = 128
T = TypeVar('T')


def soft_stats(logits: Tensor, target: Tensor, options: Options) -> SoftStats:
    """See :func:`mmseg_imbalance.ops.soft_stats`."""
    return SoftStats(*_SoftStats.apply(logits, target, options))


def _take_one_core() -> None:
    torch.get_num_threads()  # the first use sets a thread's number to the process's: before, not after
    torch.set_num_threads(1)


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads whose operations run on one core each; of this process, as a fork keeps no threads."""
    pool = ThreadPoolExecutor(threads, 'soft_stats', _take_one_core)
    started = Barrier(threads)
    list(pool.map(lambda _: started.wait(), range(threads)))
    torch.set_num_threads(threads)  # what a thread sets for itself is also the default of later ones
    return pool


def _each(function: Callable[[_Rows], T], parts: list[_Rows]) -> Iterator[T]:
    """``function`` of each part, in their order; on CPU computed by as many threads as torch uses."""

    @torch.no_grad()
    def quietly(part: _Rows) -> T:
        return function(part)

    threads = torch.get_num_threads()
    if threads == 1 or len(parts) == 1 or not parts[0].logits.is_cpu:
        return map(quietly, parts)
    return _pool(os.getpid(), threads).map(quietly, parts)


class _Axis(NamedTuple):
    """Bilinear resize of one axis: output i is (1 - fraction) of cell low plus fraction of cell high."""

    low: Tensor  # (large,)
    high: Tensor  # (large,)
    fraction: Tensor  # (large,)
    matrix: Tensor  # (large, small), banded: the same numbers as a product

    @classmethod
    def make(cls, small: int, large: int, align_corners: bool, like: Tensor) -> _Axis:
        i = torch.arange(large, dtype=torch.float64)
        if align_corners:
            x = i * ((small - 1) / max(large - 1, 1))
        else:
            x = ((i + 0.5) * (small / large) - 0.5).clamp_min(0)
        low = x.long().clamp_max(small - 1)
        high = (low + 1).clamp_max(small - 1)
        fraction = x - low
        matrix = torch.zeros(large, small, dtype=torch.float64)
        matrix.scatter_add_(1, low[:, None], 1 - fraction[:, None])
        matrix.scatter_add_(1, high[:, None], fraction[:, None])
        device, dtype = like.device, torch.promote_types(like.dtype, torch.float32)
        weights = fraction.to(device, dtype), matrix.to(device, dtype)
        return cls(low.to(device), high.to(device), *weights)

    def band(self, outputs: slice) -> slice:
        """The cells that these outputs are resized from."""
        large, small = self.matrix.shape
        # one more on either side than the scale says covers both conventions of align_corners
        first = max(0, math.floor(outputs.start * small / large) - 2)
        return slice(first, min(small, math.ceil(outputs.stop * small / large) + 2))

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """(cells, outputs, their block of the matrix), few of each."""
        large = len(self.matrix)
        for start in range(0, large, COLUMN_BLOCK):
            outputs = slice(start, min(start + COLUMN_BLOCK, large))
            cells = self.band(outputs)
            yield cells, outputs, self.matrix[outputs, cells]


class _Rows:
    """Rows of one image's label, and the band of source rows where the logits are smaller."""

    def __init__(
        self,
        logits: Tensor,
        target: Tensor,
        o: Options,
        axes: tuple[_Axis, _Axis] | None,
        image: int,
        rows: slice,
    ) -> None:
        self.logits, self.target = logits.detach()[image], target[image]  # (C, h, w), (H, W)
        self.o, self.axes, self.image, self.rows = o, axes, image, rows
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        if axes is not None:
            self.band = axes[0].band(rows)

    def strips(self) -> Iterator[_Strip]:
        z = self.logits if self.axes is None else self._columns(self.axes[1])
        width = self.target.shape[1]
        step = min(_strip_rows(len(z), width), self.rows.stop - self.rows.start)
        numel = len(z) * step * width
        # of all strips: fresh ones would be paged in again each time
        buffers = torch.empty(2, numel, dtype=self.dtype, device=z.device)
        for start in range(self.rows.start, self.rows.stop, step):
            yield _Strip(self, z, buffers, slice(start, min(start + step, self.rows.stop)))

    def _columns(self, axis: _Axis) -> Tensor:
        """The source rows with their columns at label size, (C, k, W)."""
        small = self.logits[:, self.band].to(self.dtype)
        if self.o.logit_bias is not None:
            small = small + self.o.logit_bias.to(self.dtype)[:, None, None]
        columns = small.new_empty(*small.shape[:2], self.target.shape[1])
        for cells, outputs, block in axis.blocks():
            columns[:, :, outputs] = small[:, :, cells] @ block.T
        return columns

    def from_columns(self, grad: Tensor, axis: _Axis) -> Tensor:
        """The transposed resize: (C, k, W) to (C, k, w)."""
        small = grad.new_zeros(*grad.shape[:2], self.logits.shape[2])
        for cells, outputs, block in axis.blocks():
            small[:, :, cells] += grad[:, :, outputs] @ block
        return small


def _strip_rows(classes: int, width: int) -> int:
    return max(1, STRIP_NUMBERS // (classes * width))


def _split(logits: Tensor, target: Tensor, o: Options) -> list[_Rows]:
    """All images, each in parts of a few strips, and in enough of them for the threads."""
    (batch, height, width), (h, w) = target.shape, logits.shape[2:]
    axes = None
    if (h, w) != (height, width):
        axes = (
            _Axis.make(h, height, o.align_corners, logits),
            _Axis.make(w, width, o.align_corners, logits),
        )
    strips = math.ceil(height / _strip_rows(logits.shape[1], width))
    parts = math.ceil(strips / STRIPS_PER_PART)
    if logits.is_cpu:
        parts = max(parts, min(torch.get_num_threads(), 2 * strips, height))
    ends = [height * i // parts for i in range(parts + 1)]
    rows = [slice(start, stop) for start, stop in pairwise(ends)]
    return [_Rows(logits, target, o, axes, b, r) for b in range(batch) for r in rows]


class _Strip:
    """A few rows: labels ``y`` (1, r, W) with 0 for ignored ones, validity and weight ``m`` (r, W)."""

    def __init__(self, part: _Rows, z: Tensor, buffers: Tensor, rows: slice) -> None:
        o = part.o
        self.part, self.z, self.rows = part, z, rows
        target = part.target[rows]
        shape = (2, len(z), *target.shape)
        self.buffers = buffers[:, : math.prod(shape[1:])].view(shape)  # two of (C, r, W)
        self.valid = target != o.ignore_index
        self.y = torch.where(self.valid, target, 0).long()[None]
        self.m = self.valid.to(part.dtype)
        if o.pixel_weight is not None:
            self.m *= o.pixel_weight[part.image, rows]

    def below_top(self) -> Tensor:
        """z - max z over the classes, (C, r, W), in buffer 0; z: logits at label size with their bias."""
        part, out = self.part, self.buffers[0]
        if part.axes is not None:
            low, high, fraction = (values[self.rows] for values in part.axes[0][:3])
            first = part.band.start
            torch.index_select(self.z, 1, low - first, out=out)
            torch.index_select(self.z, 1, high - first, out=self.buffers[1])
            out.lerp_(self.buffers[1], fraction[:, None])
            return out.sub_(out.amax(0))
        z = self.z[:, self.rows]
        if part.o.logit_bias is not None:
            z = torch.add(z, part.o.logit_bias.to(part.dtype)[:, None, None], out=out)
        elif z.dtype != part.dtype:
            z = out.copy_(z)
        return torch.sub(z, z.amax(0), out=out)


def _focal(log_p: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """-(1 - p)^gamma log p and its derivative by log p."""
    p, miss = log_p.exp(), -torch.expm1(log_p)
    miss = miss.clamp_min(torch.finfo(miss.dtype).tiny)
    power = miss**gamma
    return -power * log_p, gamma * power / miss * p * log_p - power


def _hit(e: Tensor, below: Tensor, total: Tensor, y: Tensor) -> Tensor:
    """Whether the largest logit is that of y, the first one among equals, (r, W)."""
    if not e.is_cpu:
        return e.argmax(0) == y[0]
    # slow on CPU, so it is done only where classes share the maximum, which takes a sum of 2 at least
    hit = (below == 0).flatten()
    near = (hit & (total >= 2).flatten()).nonzero()[:, 0]
    top = e.flatten(1).index_select(1, near) == 1
    shared = top.sum(0) > 1
    if shared.any():
        tied = near[shared]
        hit[tied] = top[:, shared].to(torch.uint8).argmax(0) == y.flatten()[tied]
    return hit.view_as(below)


class _Sums(NamedTuple):
    by_label: Tensor  # (3, C): nll, intersection, truth
    prediction: Tensor  # (C,)
    correct: Tensor  # scalar
    log_prob: Tensor | None  # (C,)
    group: Tensor | None  # (2, S): nll, count


def _add(sums: list[_Sums]) -> _Sums:
    def total(field: str) -> Tensor | None:
        values = [getattr(s, field) for s in sums]
        return None if values[0] is None else torch.stack(values).sum(0)

    return _Sums._make(total(field) for field in _Sums._fields)


def _strip_sums(strip: _Strip) -> _Sums:
    """The sums of one strip, in double, as they are added up."""
    o, y, m = strip.part.o, strip.y, strip.m
    e = strip.below_top()
    below = e.gather(0, y)[0]  # z_y - max z, exact for logits of any size
    if o.with_log_prob:
        log_prob = (e.flatten(1) @ m.flatten()).double()
    total = e.exp_().sum(0)
    correct = (_hit(e, below, total, y) & strip.valid).sum()
    log_total = total.log()
    log_p = below - log_total
    p = log_p.exp()
    loss = _focal(log_p, o.focal_gamma)[0] if o.focal_gamma > 0 else -log_p
    by_label = torch.zeros(3, len(e), dtype=torch.float64, device=e.device)
    values = torch.stack([m * loss, m * p, m]).flatten(1).double()
    by_label.scatter_add_(1, y.flatten().expand(3, -1), values)
    group = None
    if o.group is not None:
        ids = torch.where(strip.valid, o.group[strip.part.image, strip.rows], 0).flatten().long()
        values = torch.stack([-log_p, torch.ones_like(p)])
        values = torch.where(strip.valid, values, 0).flatten(1).double()
        group = by_label.new_zeros(2, o.num_groups).scatter_add_(1, ids.expand(2, -1), values)
    factor = m / total
    if o.square_prediction:
        e, factor = e.square_(), factor / total
    return _Sums(
        by_label,
        (e.flatten(1) @ factor.flatten()).double(),
        correct,
        log_prob - (m * log_total).sum(dtype=torch.float64) if o.with_log_prob else None,
        group,
    )


class _Upstream(NamedTuple):
    """The gradients by the differentiable sums, (B, C) or, of one image, (C,)."""

    nll: Tensor | None
    intersection: Tensor | None
    prediction: Tensor | None
    log_prob: Tensor | None


def _by_label(values: Tensor, y: Tensor) -> Tensor:
    """values[y], (r, W)."""
    return values.index_select(0, y.flatten()).view(y.shape[1:])


def _strip_gradient(strip: _Strip, g: _Upstream, out: Tensor) -> Tensor:
    """Gradient by the logits of a strip, (C, r, W), into ``out``; the formula heads this file."""
    o, y, m = strip.part.o, strip.y, strip.m
    e = strip.below_top()
    below = e.gather(0, y)[0] if o.focal_gamma > 0 else None
    e.exp_()
    total = e.sum(0)
    a = torch.zeros_like(m)
    if g.intersection is not None:
        a += _by_label(g.intersection, y) * (e.gather(0, y)[0] / total)
    if g.nll is not None:
        slope = -1 if below is None else _focal(below - total.log(), o.focal_gamma)[1]
        a += _by_label(g.nll, y) * slope
    a *= m
    common = a if g.log_prob is None else a + m * g.log_prob.sum()

    if g.prediction is None:
        torch.mul(e, -common / total, out=out)
    elif o.square_prediction:
        q = torch.mul(e, 2 * g.prediction[:, None, None], out=out).mul_(m / total)
        q.sub_((q * e).sum(0) / total + common).mul_(e.div_(total))
    else:
        mean = (g.prediction @ e.flatten(1)).view_as(m) / total
        torch.mul(g.prediction[:, None, None], m / total, out=out)
        out.sub_((m * mean + common) / total).mul_(e)
    if g.log_prob is not None:
        out.add_(m * g.log_prob[:, None, None])
    return out.scatter_add_(0, y, a[None])


def _gradient(part: _Rows, g: _Upstream, grad: Tensor) -> Tensor | None:
    """Write the gradient of a part into grad (B, C, H, W), or return that of its band, (C, k, w)."""
    g = _Upstream(*(None if rows is None else rows[part.image].to(part.dtype) for rows in g))
    if part.axes is None:
        for strip in part.strips():
            rows = grad[part.image, :, strip.rows]
            if grad.dtype == part.dtype:
                _strip_gradient(strip, g, out=rows)
            else:
                rows.copy_(_strip_gradient(strip, g, out=strip.buffers[1]))
        return None
    row_axis, column_axis = part.axes
    size = (len(part.logits), part.band.stop - part.band.start, part.target.shape[1])
    columns = grad.new_zeros(size)  # (C, k, W)
    for strip in part.strips():
        cells = row_axis.band(strip.rows)
        here = slice(cells.start - part.band.start, cells.stop - part.band.start)
        dz = _strip_gradient(strip, g, out=strip.buffers[1])
        columns[:, here] += row_axis.matrix[strip.rows, cells].T @ dz
    return part.from_columns(columns, column_axis)


class _SoftStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, o):  # type: ignore[no-untyped-def]
        parts = _split(logits, target, o)
        counted = list(_each(lambda part: _add([_strip_sums(s) for s in part.strips()]), parts))
        each = len(parts) // len(logits)
        images = [_add(counted[i : i + each]) for i in range(0, len(parts), each)]
        by_label, prediction, correct, log_prob, group = (
            None if of[0] is None else torch.stack(of) for of in zip(*images, strict=True)
        )
        ctx.save_for_backward(logits, target)
        ctx.options = o
        ctx.set_materialize_grads(False)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        nll, intersection, truth = (sums.to(dtype, copy=True) for sums in by_label.unbind(1))
        log_prob = None if log_prob is None else log_prob.to(dtype)
        group_nll = group_count = None
        if group is not None:
            group_nll, group_count = group.sum(0)
            group_nll, group_count = group_nll.to(dtype, copy=True), group_count.long()
        fixed = (truth, correct, group_nll, group_count)
        ctx.mark_non_differentiable(*(t for t in fixed if t is not None))
        return nll, intersection, prediction.to(dtype), truth, correct, log_prob, group_nll, group_count

    @staticmethod
    @once_differentiable
    def backward(ctx, g_nll, g_intersection, g_prediction, _truth, _correct, g_log_prob, *_):  # type: ignore[no-untyped-def]
        logits, target = ctx.saved_tensors
        upstream = _Upstream(g_nll, g_intersection, g_prediction, g_log_prob)
        with torch.autocast(logits.device.type, enabled=False):
            parts = _split(logits, target, ctx.options)
            if parts[0].axes is None:
                grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
            else:
                grad = logits.new_zeros(logits.shape, dtype=parts[0].dtype)
            bands = _each(lambda part: _gradient(part, upstream, grad), parts)
            for part, band in zip(parts, bands, strict=True):
                if band is not None:
                    grad[part.image, :, part.band] += band
        return grad.to(logits.dtype), None, None
