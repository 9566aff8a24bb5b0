"""The soft statistics strip by strip: bounded memory, softmax recomputed in backward.

An image is walked in strips of rows that fit the cache. From small logits, the columns are resized once
per image, (C, h, w) to (C, h, W), block by block of a banded matrix, and a strip takes its rows from there.
The gradient goes back through the transposed matrices.

Strips, not operations, are what the CPU's threads share: a strip is dozens of short operations, and if each
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
from threading import Barrier
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmseg_imbalance.ops.soft_stats import Options, SoftStats

# pixels of a strip: its (C, r, W) buffers stay in the cache, and Python's share of the time is small
STRIP_PIXELS = 32768
COLUMN_BLOCK = 128


def soft_stats(logits: Tensor, target: Tensor, options: Options) -> SoftStats:
    """See :func:`mmseg_imbalance.ops.soft_stats`."""
    return SoftStats(*_SoftStats.apply(logits, target, options))


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads whose operations run on one core each; of this process, as a fork keeps no threads."""
    pool = ThreadPoolExecutor(threads, 'soft_stats', torch.set_num_threads, (1,))
    started = Barrier(threads)
    list(pool.map(lambda _: started.wait(), range(threads)))
    torch.set_num_threads(threads)  # what a thread sets for itself is also the default of later ones
    return pool


def _each(function: Callable[[_Strip], object], strips: list[_Strip]) -> Iterator:
    """``function`` of each strip, in their order; on CPU computed by all of torch's threads."""

    @torch.no_grad()
    def quietly(strip: _Strip) -> object:
        return function(strip)

    threads = torch.get_num_threads()
    if threads == 1 or len(strips) == 1 or not strips[0].image.z.is_cpu:
        return map(quietly, strips)
    return _pool(os.getpid(), threads).map(quietly, strips)


class _Image:
    """One image: its logits, with the columns at label size, its labels and its pixel weights."""

    def __init__(self, logits: Tensor, target: Tensor, o: Options, index: int) -> None:
        self.o = o
        self.z = logits.detach()[index]  # (C, h, w)
        self.target = target[index]  # (H, W)
        self.weight = None if o.pixel_weight is None else o.pixel_weight[index]
        self.group = None if o.group is None else o.group[index]
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        self.resized = self.z.shape[1:] != self.target.shape
        if o.logit_bias is not None:
            self.bias = o.logit_bias.to(self.dtype)[:, None, None]
        if self.resized:
            (h, w), (height, width) = self.z.shape[1:], self.target.shape
            self.row_axis = _Axis.make(h, height, o.align_corners, self.z)
            self.column_matrix = _Axis.make(w, width, o.align_corners, self.z).matrix
            small = self.z.to(self.dtype)
            if o.logit_bias is not None:
                small = small + self.bias
            self.z = small.new_empty(len(small), h, width)
            for cells, columns in self.column_blocks():
                self.z[:, :, columns] = small[:, :, cells] @ self.column_matrix[columns, cells].T

    def column_blocks(self) -> Iterator[tuple[slice, slice]]:
        """(source columns, label columns): few of each, since the matrix between them is banded."""
        width, w = self.column_matrix.shape
        for start in range(0, width, COLUMN_BLOCK):
            columns = slice(start, min(start + COLUMN_BLOCK, width))
            yield _band(columns, w, width), columns

    def to_small(self, grad: Tensor) -> Tensor:
        """The transposed resize of the columns: (C, h, W) to (C, h, w)."""
        small = grad.new_zeros(*grad.shape[:2], self.column_matrix.shape[1])
        for cells, columns in self.column_blocks():
            small[:, :, cells] += grad[:, :, columns] @ self.column_matrix[columns, cells]
        return small

    def strips(self) -> list[_Strip]:
        height, width = self.target.shape
        share = math.ceil(height / torch.get_num_threads())
        step = max(1, min(STRIP_PIXELS // width, share))
        return [_Strip(self, slice(i, min(i + step, height))) for i in range(0, height, step)]


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


def _band(outputs: slice, small: int, large: int) -> slice:
    """The cells of one axis that these outputs are resized from."""
    # one more on either side than the scale says covers both conventions of align_corners
    first = max(0, math.floor(outputs.start * small / large) - 2)
    return slice(first, min(small, math.ceil(outputs.stop * small / large) + 2))


class _Strip:
    """Rows of one image, and the band of source rows that they are resized from."""

    def __init__(self, image: _Image, rows: slice) -> None:
        self.image = image
        self.rows = rows
        if image.resized:
            height, h = image.row_axis.matrix.shape
            self.band = _band(rows, h, height)

    def labels(self) -> tuple[Tensor, Tensor, Tensor]:
        """Labels y (1, r, W) with 0 for ignored ones, validity and weight m of each pixel (r, W)."""
        image = self.image
        target = image.target[self.rows]
        valid = target != image.o.ignore_index
        m = valid.to(image.dtype)
        if image.weight is not None:
            m *= image.weight[self.rows]
        return torch.where(valid, target, 0).long()[None], valid, m

    def to_band(self, grad: Tensor) -> Tensor:
        """The transposed resize of the rows: (C, r, W) to (C, k, W), the source rows of the band."""
        return self.image.row_axis.matrix[self.rows, self.band].T @ grad

    def below_top(self) -> Tensor:
        """z - max z over the classes, (C, r, W), z the logits at label size with their bias."""
        image = self.image
        if image.resized:
            low, high, fraction = (part[self.rows] for part in image.row_axis[:3])
            z, below = image.z.index_select(1, low), image.z.index_select(1, high)
            z.lerp_(below, fraction[:, None])
            return z.sub_(z.amax(0))
        z = image.z[:, self.rows].to(image.dtype)
        if image.o.logit_bias is not None:
            z = z + image.bias
        # contiguous, whatever the memory format of the logits
        return torch.sub(z, z.amax(0), out=z.new_empty(z.shape))


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
    # slow on CPU, so it is done only where two classes may share the maximum
    hit = (below == 0).flatten()
    tied = (hit & (total >= 2).flatten()).nonzero()[:, 0]
    hit[tied] = e.flatten(1).index_select(1, tied).max(0).indices == y.flatten()[tied]
    return hit.view_as(below)


class _Sums(NamedTuple):
    by_label: Tensor  # (3, C): nll, intersection, truth
    prediction: Tensor  # (C,)
    correct: Tensor  # scalar
    log_prob: Tensor | None  # (C,)
    group: Tensor | None  # (2, S): nll, count


def _strip_sums(strip: _Strip) -> _Sums:
    """The sums of one strip; added up in double, by the caller too."""
    o = strip.image.o
    y, valid, m = strip.labels()
    e = strip.below_top()
    below = e.gather(0, y)[0]  # z_y - max z, exact for logits of any size
    if o.with_log_prob:
        log_prob = (e.flatten(1) @ m.flatten()).double()
    total = e.exp_().sum(0)
    correct = (_hit(e, below, total, y) & valid).sum()
    log_total = total.log()
    log_p = below - log_total
    p = log_p.exp()
    loss = _focal(log_p, o.focal_gamma)[0] if o.focal_gamma > 0 else -log_p
    by_label = torch.zeros(3, len(e), dtype=torch.float64, device=e.device)
    values = torch.stack([m * loss, m * p, m]).flatten(1).double()
    by_label.scatter_add_(1, y.flatten().expand(3, -1), values)
    group = None
    if strip.image.group is not None:
        ids = torch.where(valid, strip.image.group[strip.rows], 0).flatten().long()
        values = torch.where(valid, torch.stack([-log_p, torch.ones_like(p)]), 0).flatten(1).double()
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
    """The gradients by the differentiable sums of one image, (C,) each."""

    nll: Tensor | None
    intersection: Tensor | None
    prediction: Tensor | None
    log_prob: Tensor | None


def _strip_gradient(strip: _Strip, g: _Upstream, out: Tensor | None = None) -> Tensor:
    """Gradient by the logits of a strip, (C, r, W), into ``out`` if given; the formula heads this file."""
    o = strip.image.o
    y, _, m = strip.labels()
    e = strip.below_top()
    below = e.gather(0, y)[0] if o.focal_gamma > 0 else None
    e.exp_()
    total = e.sum(0)
    a = torch.zeros_like(m)
    if g.intersection is not None:
        a += g.intersection.take(y[0]) * (e.gather(0, y)[0] / total)
    if g.nll is not None:
        slope = -1 if below is None else _focal(below - total.log(), o.focal_gamma)[1]
        a += g.nll.take(y[0]) * slope
    a *= m
    common = a if g.log_prob is None else a + m * g.log_prob.sum()

    out = torch.empty_like(e) if out is None else out
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


class _SoftStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, o):  # type: ignore[no-untyped-def]
        images = []
        for b in range(len(logits)):
            parts = list(_each(_strip_sums, _Image(logits, target, o, b).strips()))
            images.append([None if p[0] is None else sum(p) for p in zip(*parts, strict=True)])
        sums = [None if s[0] is None else torch.stack(s) for s in zip(*images, strict=True)]
        by_label, prediction, correct, log_prob, group = sums

        ctx.save_for_backward(logits, target)
        ctx.options = o
        ctx.set_materialize_grads(False)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        nll, intersection, truth = (s.to(dtype, copy=True) for s in by_label.unbind(1))
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
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        with torch.autocast(logits.device.type, enabled=False):
            for b in range(len(logits)):
                image = _Image(logits, target, ctx.options, b)
                sums = (g_nll, g_intersection, g_prediction, g_log_prob)
                upstream = _Upstream(*(None if g is None else g[b].to(image.dtype) for g in sums))
                _image_gradient(image, upstream, out=grad[b])
        return grad, None, None


def _image_gradient(image: _Image, upstream: _Upstream, out: Tensor) -> None:
    """Gradient by the logits of an image, (C, h, w), into ``out``."""
    strips = image.strips()
    if not image.resized:

        def write(strip: _Strip) -> None:
            rows = out[:, strip.rows]
            if out.dtype == image.dtype:
                _strip_gradient(strip, upstream, out=rows)
            else:
                rows.copy_(_strip_gradient(strip, upstream))

        list(_each(write, strips))
        return
    columns = torch.zeros_like(image.z)  # (C, h, W)
    to_band = _each(lambda strip: strip.to_band(_strip_gradient(strip, upstream)), strips)
    for strip, part in zip(strips, to_band, strict=True):
        columns[:, strip.band] += part
    out.copy_(image.to_small(columns))
