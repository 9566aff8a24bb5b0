"""The soft statistics strip by strip: bounded memory, softmax recomputed in backward.

A part of an image is walked in strips. From small logits, the columns of the source rows that a part needs
are resized first, (C, k, w) to (C, k, W); a strip takes its rows from there, and the gradient goes back
through transposed banded matrices.

Any device can do this. :mod:`~mmseg_imbalance.ops.cpu` and :mod:`~mmseg_imbalance.ops.triton` are faster
where they can run. On a CPU each thread takes parts of its own: a strip is dozens of short operations, and
threads that share them would wait for the slowest one after each.

Backward, with p recomputed and the gradients gN, gI, gP, gL of nll, intersection, prediction, log_prob, for a
pixel of label y and weight m:

    a    = gI_y p_y + gN_y dl/dlog p_y,       l the pixel's loss: -log p_y or its focal form
    q_k  = gP_k                               2 gP_k p_k where the prediction is squared
    dz_k = q_k (m p_k) - (sum_j q_j p_j + a + sum_j gL_j) (m p_k) + m gL_k + [k = y] m a

Where a pixel is marked, gI_y is the sum of the gradients of intersection and of marked_intersection.

Each term is m p_k, in place, times a number of the class or of the pixel; as the transposed resize is linear,
those of the class wait until after it, and one (C, r, W) buffer is enough.

Only logits and labels are kept between the passes. p is never formed: e = exp(z - max z) stands for it,
and its sum over classes divides the per-pixel factors instead, C times fewer numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmseg_imbalance.ops.bilinear import Axis
from mmseg_imbalance.ops.contract import Options, SoftStats, once_differentiable, sum_dtype
from mmseg_imbalance.ops.threads import each

# numbers in a (C, r, W) buffer of a strip: few enough for the cache, enough for Python's share to be small
STRIP_NUMBERS = 3 << 18
# a part keeps the source rows of its strips at full width, which are a strip's worth of memory or so
STRIPS_PER_PART = 4


@torch.compiler.disable
def soft_stats(logits: Tensor, target: Tensor, options: Options) -> SoftStats:
    """See :func:`mmseg_imbalance.ops.soft_stats`."""
    return SoftStats(*_SoftStats.apply(logits, target, options.pixel_weight, options))


class _Part:
    """Some rows of an image: labels and weights at once, logits strip by strip.

    A strip is dozens of short operations and the threads take turns in calling them, so what has one number
    a pixel, not C, is calculated for all strips of a part at once.
    """

    def __init__(
        self,
        logits: Tensor,
        target: Tensor,
        o: Options,
        axes: tuple[Axis, Axis] | None,
        image: int,
        rows: slice,
    ) -> None:
        self.logits, self.o, self.axes, self.image, self.rows = logits.detach()[image], o, axes, image, rows
        self.target = target[image, rows].contiguous()  # (R, W)
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        self.sum_dtype = sum_dtype(logits)
        strips = math.ceil(len(self.target) / _strip_rows(len(self.logits), target.shape[2]))
        self.step = math.ceil(len(self.target) / strips)
        if axes is not None:
            self.band = axes[0].band(rows)

    def labels(self) -> tuple[Tensor, Tensor, Tensor]:
        """Validity, labels ``y`` with 0 for ignored ones, and weight ``m``, (R, W) each."""
        valid = self.target != self.o.ignore_index
        m = valid.to(self.dtype)
        if self.o.pixel_weight is not None:
            m = torch.where(valid, self.o.pixel_weight[self.image, self.rows].to(m).contiguous(), 0)
        return valid, torch.where(valid, self.target, 0).long(), m

    def marked(self) -> Tensor | None:
        """Which pixels are marked, (R, W)."""
        return None if self.o.marked is None else self.o.marked[self.image, self.rows] != 0

    def below_top(self, valid: Tensor) -> Iterator[Tensor]:
        """z - max z over the classes, (C, r, W), strip by strip; of ignored pixels 0.

        z: logits at label size with their bias.
        """
        z, bias = self.logits, self.o.logit_bias
        if self.axes is not None:
            z = self._columns(self.axes[1])
        for rows, counted in zip(self.strips(), valid.split(self.step), strict=True):
            if self.axes is not None:
                here = self.axes[0].between(z, 1, rows, self.band.start)
            else:
                here = z[:, rows].to(self.dtype)
                if bias is not None:
                    here = here + bias.to(self.dtype)[:, None, None]
            here = here.masked_fill(~counted, 0)
            yield here.sub_(here.amax(0))

    def strips(self) -> Iterator[slice]:
        """Their rows of the image."""
        for start in range(self.rows.start, self.rows.stop, self.step):
            yield slice(start, min(start + self.step, self.rows.stop))

    def resize(self, rows: slice) -> tuple[Tensor, slice]:
        """The matrix that makes rows of the label of source rows, (r, k), and which of the band these are."""
        assert self.axes is not None
        cells = self.axes[0].band(rows)
        band = slice(cells.start - self.band.start, cells.stop - self.band.start)
        return self.axes[0].matrix[rows, cells], band

    def _columns(self, axis: Axis) -> Tensor:
        """The source rows with their columns at label size, (C, k, W)."""
        small = self.logits[:, self.band].to(self.dtype)
        if self.o.logit_bias is not None:
            small = small + self.o.logit_bias.to(self.dtype)[:, None, None]
        return axis.between(small, 2, slice(0, self.target.shape[1]))

    def from_columns(self, grad: Tensor, axis: Axis) -> Tensor:
        """The transposed resize: (C, k, W) to (C, k, w)."""
        small = grad.new_zeros(*grad.shape[:2], self.logits.shape[2])
        for cells, outputs, block in axis.blocks():
            small[:, :, cells] += grad[:, :, outputs] @ block
        return small


def _strip_rows(classes: int, width: int) -> int:
    return max(1, STRIP_NUMBERS // (classes * width))


def _split(logits: Tensor, target: Tensor, o: Options) -> list[_Part]:
    """All images, each in parts of a few strips."""
    (batch, height, width), (h, w) = target.shape, logits.shape[2:]
    axes = None
    if (h, w) != (height, width):
        axes = (
            Axis.make(h, height, o.align_corners, logits),
            Axis.make(w, width, o.align_corners, logits),
        )
    strips = math.ceil(height / _strip_rows(logits.shape[1], width))
    parts = math.ceil(strips / STRIPS_PER_PART)
    ends = [height * i // parts for i in range(parts + 1)]
    rows = [slice(start, stop) for start, stop in pairwise(ends)]
    return [_Part(logits, target, o, axes, b, r) for b in range(batch) for r in rows]


def _focal(log_p: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """-(1 - p)^gamma log p and its derivative by log p."""
    p, miss = log_p.exp(), -torch.expm1(log_p)
    miss = miss.clamp_min(torch.finfo(miss.dtype).tiny)
    power = miss**gamma
    return -power * log_p, gamma * power / miss * p * log_p - power


class _Sums(NamedTuple):
    by_label: Tensor  # (3 or 5, C): nll, intersection, truth, and the last two of the marked pixels
    prediction: Tensor  # (C,)
    correct: Tensor  # scalar
    log_prob: Tensor | None  # (C,)
    group_nll: Tensor | None  # (S,)
    group_count: Tensor | None  # (S,) int64
    recall: Tensor | None  # (2, C) int64: correct, count


def _add(sums: list[_Sums]) -> _Sums:
    def total(field: str) -> Tensor | None:
        values = [getattr(s, field) for s in sums]
        return None if values[0] is None else torch.stack(values).sum(0)

    return _Sums._make(total(field) for field in _Sums._fields)


def _sum_by(ids: Tensor, number: int, dtype: torch.dtype, *values: Tensor) -> Tensor:
    """Sums of each of the values (R, W) by ids (R, W) below ``number``, (len(values), number)."""
    columns = 1
    if dtype == torch.float32:  # it loses what is small beside a large sum: each column has a sum of its own
        columns = ids.shape[1]
        ids = ids + number * torch.arange(columns, device=ids.device)
    sums = torch.zeros(len(values), columns * number, dtype=dtype, device=ids.device)
    for row, numbers in zip(sums, values, strict=True):
        row.scatter_add_(0, ids.flatten(), numbers.flatten().to(dtype))
    return sums.view(-1, columns, number).sum(1)


def _sums(part: _Part) -> _Sums:
    """The sums of a part, added up in double where the device has it."""
    o, classes = part.o, len(part.logits)
    valid, y, m = part.labels()
    below, total = torch.empty_like(m), torch.empty_like(m)  # z_y - max z; sum of exp(z - max z)
    hit = torch.empty_like(valid)
    prediction = m.new_zeros(classes, dtype=part.sum_dtype)
    log_prob = torch.zeros_like(prediction) if o.with_log_prob else None
    by_strip = (values.split(part.step) for values in (y, m, below, total, hit))
    for e, (e_y, e_m, e_below, e_total, e_hit) in zip(
        part.below_top(valid), zip(*by_strip, strict=True), strict=True
    ):
        torch.gather(e, 0, e_y[None], out=e_below[None])  # exact for logits of any size
        if log_prob is not None:
            log_prob += e.flatten(1) @ e_m.flatten()
        e_hit.copy_(e.argmax(0) == e_y)
        torch.sum(e.exp_(), 0, out=e_total)
        factor = e_m / e_total
        if o.square_prediction:
            e, factor = e.square_(), factor.div_(e_total)
        prediction += e.flatten(1) @ factor.flatten()

    log_total = total.log_()
    if log_prob is not None:
        log_prob -= (m * log_total).sum(dtype=part.sum_dtype)
    log_p = below.sub_(log_total)
    nll = -log_p
    loss = _focal(-nll, o.focal_gamma)[0] if o.focal_gamma > 0 else nll
    correct, recall = hit & valid, None
    numbers = [m * loss, m * log_p.exp(), m]
    if (marked := part.marked()) is not None:
        numbers += [torch.where(marked, values, 0) for values in numbers[1:]]
    by_label = _sum_by(y, classes, part.sum_dtype, *numbers)
    if o.with_recall:
        right = _sum_by(y, classes, part.sum_dtype, correct)[0]
        count = by_label[2] if o.pixel_weight is None else _sum_by(y, classes, part.sum_dtype, valid)[0]
        recall = torch.stack([right, count]).long()
    group_nll = group_count = None
    if o.group is not None:
        # ignored pixels are a group of their own, the last
        ids = torch.where(valid, o.group[part.image, part.rows].long(), o.num_groups)
        group = _sum_by(ids, o.num_groups + 1, part.sum_dtype, nll, torch.ones_like(nll))
        group_nll, group_count = group[0, : o.num_groups], group[1, : o.num_groups].long()
    return _Sums(by_label, prediction, correct.sum(), log_prob, group_nll, group_count, recall)


class _Upstream(NamedTuple):
    """The gradients by the differentiable sums, (B, C) or, of one image, (C,)."""

    nll: Tensor | None
    intersection: Tensor | None
    prediction: Tensor | None
    log_prob: Tensor | None
    truth: Tensor | None
    marked_intersection: Tensor | None
    marked_truth: Tensor | None


def _of_labels(rows: Tensor | None, y: Tensor) -> Tensor | None:
    """The number of each pixel's class, (R, W), from (C,) numbers."""
    return None if rows is None else rows.index_select(0, y.flatten()).view_as(y)


def _add_marked(values: Tensor | None, marked_values: Tensor | None, marked: Tensor | None) -> Tensor | None:
    """``values`` and, where a pixel is marked, ``marked_values``, (R, W) each."""
    if marked_values is None or marked is None:
        return values
    marked_values = torch.where(marked, marked_values, 0)
    return marked_values if values is None else values + marked_values


def _by_weight(part: _Part, below: Tensor, y: Tensor, by_label: list[Tensor | None], g: _Upstream) -> Tensor:
    """The gradient by the weights of a strip, (r, W): what each pixel adds to the sums for a weight of 1.

    ``below`` holds z - max z, (C, r, W); ``by_label`` are gN_y, gI_y and gT_y, (r, W) or None.
    """
    by_nll, by_intersection, by_truth = by_label
    p = below.exp()
    total = p.sum(0)
    log_p = below.gather(0, y[None])[0] - total.log()
    grad = torch.zeros_like(total) if by_truth is None else by_truth.clone()
    if by_nll is not None:
        gamma = part.o.focal_gamma
        grad.addcmul_(by_nll, _focal(log_p, gamma)[0] if gamma > 0 else -log_p)
    if by_intersection is not None:
        grad.addcmul_(by_intersection, log_p.exp())
    if g.log_prob is not None:
        grad += (g.log_prob @ below.flatten(1)).view_as(grad) - g.log_prob.sum() * total.log()
    if g.prediction is not None:
        p.div_(total)
        grad += (g.prediction @ (p.square_() if part.o.square_prediction else p).flatten(1)).view_as(grad)
    return grad


def _add_gradient(
    part: _Part,
    e: Tensor,
    y: Tensor,
    m: Tensor,
    by_label: list[Tensor | None],
    g: _Upstream,
    lift: Callable[[Tensor], Tensor],
    grad: Tensor,
) -> None:
    """Add the gradient by the logits of a strip, in the form that heads this file, to ``grad``.

    ``e`` holds z - max z, (C, r, W), and is overwritten; ``by_label`` as in :func:`_by_weight`;
    ``lift`` takes a tensor of the strip's rows to those of ``grad``.
    """
    by_nll, by_intersection, _ = by_label
    below = None
    if part.o.focal_gamma > 0 and by_nll is not None:
        below = e.gather(0, y[None])[0]
    total = e.exp_().sum(0)
    a = torch.zeros_like(m)
    if by_nll is not None:
        a = -by_nll if below is None else by_nll * _focal(below - total.log(), part.o.focal_gamma)[1]
    if by_intersection is not None:
        a.addcdiv_(by_intersection * e.gather(0, y[None])[0], total)
    mean = a if g.log_prob is None else a + g.log_prob.sum()

    if g.prediction is not None and part.o.square_prediction:
        squared = e.div_(total).square()
        mean = mean + 2 * (g.prediction @ squared.flatten(1)).view_as(m)
        grad.addcmul_(lift(squared.mul_(m)), g.prediction[:, None, None], value=2)
        e.mul_(m)
    else:
        if g.prediction is not None:
            mean = torch.addcdiv(mean, (g.prediction @ e.flatten(1)).view_as(m), total)
        e.mul_(m / total)
        if g.prediction is not None:
            grad.addcmul_(lift(e), g.prediction[:, None, None])
    grad.sub_(lift(e.mul_(mean).scatter_add_(0, y[None], a.mul_(m).neg_()[None])))
    if g.log_prob is not None:
        grad.addcmul_(lift(m[None]), g.log_prob[:, None, None])


def _gradient(part: _Part, g: _Upstream, grad: Tensor, weight_grad: Tensor | None) -> Tensor | None:
    """Write the gradient of a part into grad (B, C, H, W) of zeros, or return that of its band, (C, k, w).

    That by the pixel weights is written to ``weight_grad``, (B, H, W) of zeros, where it is asked for.
    """
    g = _Upstream(*(None if rows is None else rows[part.image].to(part.dtype) for rows in g))
    valid, y, m = part.labels()
    marked = part.marked()
    by_label = [
        _of_labels(g.nll, y),
        _add_marked(_of_labels(g.intersection, y), _of_labels(g.marked_intersection, y), marked),
        _add_marked(_of_labels(g.truth, y), _of_labels(g.marked_truth, y), marked),
    ]
    columns = None
    if part.axes is not None:
        columns = grad.new_zeros(len(part.logits), part.band.stop - part.band.start, y.shape[1])  # (C, k, W)
    for e, rows in zip(part.below_top(valid), part.strips(), strict=True):
        here = slice(rows.start - part.rows.start, rows.stop - part.rows.start)
        pixels = y[here], m[here], [None if values is None else values[here] for values in by_label]
        if weight_grad is not None:
            added = _by_weight(part, e, y[here], pixels[2], g)
            weight_grad[part.image, rows] = added.masked_fill_(~valid[here], 0)
        if columns is not None:
            matrix, band = part.resize(rows)
            _add_gradient(part, e, *pixels, g, matrix.T.matmul, columns[:, band])
        elif grad.dtype == part.dtype:
            _add_gradient(part, e, *pixels, g, _same, grad[part.image, :, rows])
        else:
            dz = torch.zeros_like(e)
            _add_gradient(part, e, *pixels, g, _same, dz)
            grad[part.image, :, rows] = dz
    return None if columns is None or part.axes is None else part.from_columns(columns, part.axes[1])


def _same(rows: Tensor) -> Tensor:
    return rows


class _SoftStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, pixel_weight, o):  # type: ignore[no-untyped-def]
        parts = _split(logits, target, o)
        counted = list(each(_sums, parts, logits.is_cpu))
        number = len(parts) // len(logits)  # of an image
        images = [_add(counted[i : i + number]) for i in range(0, len(parts), number)]
        by_label, prediction, correct, log_prob, group_nll, group_count, recall = (
            None if of[0] is None else torch.stack(of) for of in zip(*images, strict=True)
        )
        ctx.save_for_backward(logits, target, pixel_weight, o.logit_bias, o.marked)
        ctx.options = replace(o, pixel_weight=None, logit_bias=None, group=None, marked=None)
        ctx.set_materialize_grads(False)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        nll, intersection, truth, *of_marked = (sums.to(dtype, copy=True) for sums in by_label.unbind(1))
        marked_intersection, marked_truth = of_marked or (None, None)
        log_prob = None if log_prob is None else log_prob.to(dtype)
        if group_nll is not None and group_count is not None:
            group_nll, group_count = group_nll.sum(0).to(dtype), group_count.sum(0)
        class_correct = class_count = None
        if recall is not None:
            class_correct, class_count = (numbers.clone() for numbers in recall.unbind(1))
        fixed = (correct, group_nll, group_count, class_correct, class_count)
        if not ctx.needs_input_grad[2]:
            fixed = (truth, marked_truth, *fixed)
        ctx.mark_non_differentiable(*(t for t in fixed if t is not None))
        sums = (nll, intersection, prediction.to(dtype), truth, correct, log_prob)
        return *sums, marked_intersection, marked_truth, *fixed[-4:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], *by: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, target, weight, bias, marked = saved
        g_nll, g_intersection, g_prediction, g_truth, _correct, g_log_prob, *more = by
        o = replace(ctx.options, pixel_weight=weight, logit_bias=bias, marked=marked)
        upstream = _Upstream(g_nll, g_intersection, g_prediction, g_log_prob, g_truth, *more[:2])
        weight_grad = None
        if ctx.needs_input_grad[2]:
            weight_grad = logits.new_zeros(
                target.shape, dtype=torch.promote_types(logits.dtype, torch.float32)
            )
        with torch.autocast(logits.device.type, enabled=False):
            parts = _split(logits, target, o)
            if parts[0].axes is None:
                grad = logits.new_zeros(logits.shape)
            else:
                grad = logits.new_zeros(logits.shape, dtype=parts[0].dtype)
            # all of them first: OpenMP's threads, once woken for a sum, keep a core busy for a while
            bands = list(
                each(lambda part: _gradient(part, upstream, grad, weight_grad), parts, logits.is_cpu)
            )
            for part, band in zip(parts, bands, strict=True):
                if band is not None:
                    grad[part.image, :, part.band] += band
        return (
            grad.to(logits.dtype),
            None,
            None if weight_grad is None else weight_grad.to(weight.dtype),
            None,
        )
