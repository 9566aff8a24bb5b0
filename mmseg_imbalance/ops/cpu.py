"""The soft statistics on a CPU: compiled by Numba, a piece of a row at a time, softmax recomputed in backward.

A piece is as many pixels as fit the innermost cache with all their classes. Its loops run along the row, so
that the compiler makes vector instructions of them; for the same reason exp and log are polynomials. Smaller
logits first get the columns of the label, (C, k, w) to (C, k, W), for the rows that a part of the image needs.

Parts do not depend on the number of threads, and their sums are added in their order: results are the same
bits for any number of threads. The backward is derived in :mod:`~mmseg_imbalance.ops.strips`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmseg_imbalance.ops.bilinear import taps
from mmseg_imbalance.ops.contract import Options, SoftStats
from mmseg_imbalance.ops.threads import each

# numbers of a part, C times its pixels: enough for Python's share to be small, few enough for all threads to
# have something to do
PART_NUMBERS = 1 << 19
CACHE = 128 << 10  # bytes of a piece

f32 = np.float32
ZERO, ONE, HALF = f32(0), f32(1), f32(0.5)
TINY = np.finfo(f32).tiny
LARGE = f32(1.5 * 2**23)  # added to a number, it leaves the nearest integer in the last bits
LOG2_E, LN_2, LN_2_REST = f32(1.44269504), f32(0.693359375), f32(-2.12194440e-4)
FLOAT, INTEGER = ir.FloatType(), ir.IntType(32)


def why_not(logits: Tensor, num_groups: int) -> str | None:
    """Why this backend cannot take these logits, None if it can."""
    if not logits.is_cpu:
        return f'it runs on a CPU and the logits are on {logits.device}'
    if logits.dtype == torch.float64:
        return 'it calculates in float32 and the logits are float64'
    return None


def compiled(*also: str) -> Callable[[Callable], Any]:
    """Compile at the first call and keep the result on disk, where there is a place for it.

    Infinities and NaN stay what they are: of the fast arithmetic only fused multiply-add is on, and what
    ``also`` names.
    """
    options = dict(nogil=True, error_model='numpy', fastmath={'contract', *also})

    def compile_it(function: Callable) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # no folder that can be written
            return njit(**options)(function)

    return compile_it


@intrinsic
def _power_of_2(typing_context, n):  # type: ignore[no-untyped-def]
    """2^i from n = i + LARGE: i becomes the exponent of a float."""

    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        bits = builder.shl(builder.bitcast(arguments[0], INTEGER), INTEGER(23))
        return builder.bitcast(builder.add(bits, INTEGER(0x3F800000)), FLOAT)

    return types.float32(types.float32), code


def _split_bits(builder: Any, x: Any) -> tuple[Any, Any]:
    """The bits of x = 2^i g with g from 1/sqrt(2) to sqrt(2), and i."""
    bits = builder.bitcast(x, INTEGER)
    return bits, builder.ashr(builder.sub(bits, INTEGER(0x3F3504F3)), INTEGER(23))


@intrinsic
def _exponent(typing_context, x):  # type: ignore[no-untyped-def]
    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.sitofp(_split_bits(builder, arguments[0])[1], FLOAT)

    return types.float32(types.float32), code


@intrinsic
def _mantissa(typing_context, x):  # type: ignore[no-untyped-def]
    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        bits, exponent = _split_bits(builder, arguments[0])
        return builder.bitcast(builder.sub(bits, builder.shl(exponent, INTEGER(23))), FLOAT)

    return types.float32(types.float32), code


# The polynomials of exp and log are those of Cephes (S. Moshier), expf.c and logf.c: 1 unit in the last place.
E0, E1, E2 = f32(1.9875691500e-4), f32(1.3981999507e-3), f32(8.3334519073e-3)
E3, E4, E5 = f32(4.1665795894e-2), f32(1.6666665459e-1), f32(5.0000001201e-1)
L0, L1, L2 = f32(7.0376836292e-2), f32(-1.1514610310e-1), f32(1.1676998740e-1)
L3, L4, L5 = f32(-1.2420140846e-1), f32(1.4249322787e-1), f32(-1.6668057665e-1)
L6, L7, L8 = f32(2.0000714765e-1), f32(-2.4999993993e-1), f32(3.3333331174e-1)


@compiled()
def _exp(x):  # type: ignore[no-untyped-def]
    """exp(x) of x <= 0; 0 below -87, where a float has no full precision left."""
    n = x * LOG2_E + LARGE
    i = n - LARGE
    r = x - i * LN_2
    r = r - i * LN_2_REST
    p = ((((E0 * r + E1) * r + E2) * r + E3) * r + E4) * r + E5
    p = p * (r * r) + r + ONE
    return ZERO if x < f32(-87) else p * _power_of_2(n)


@compiled()
def _log(x):  # type: ignore[no-untyped-def]
    """log(x) of a normal number x > 0; NaN of NaN."""
    i, g = _exponent(x), _mantissa(x) - ONE
    p = (((L0 * g + L1) * g + L2) * g + L3) * g + L4
    p = ((((p * g + L5) * g + L6) * g + L7) * g + L8) * g
    square = g * g
    p = p * square + i * LN_2_REST - HALF * square
    return g + p + i * LN_2 + (x - x)


@compiled('reassoc')
def _dot(a, b, n):  # type: ignore[no-untyped-def]
    total = ZERO
    for x in range(n):
        total += a[x] * b[x]
    return total


@compiled('reassoc')
def _dot_of_square(a, b, n):  # type: ignore[no-untyped-def]
    total = ZERO
    for x in range(n):
        total += a[x] * a[x] * b[x]
    return total


@compiled()
def _focal(nll, gamma):  # type: ignore[no-untyped-def]
    """(1 - p)^gamma nll, p = exp(-nll), and its derivative by log p."""
    miss = max(f32(-math.expm1(-nll)), TINY)
    power = miss**gamma
    return power * nll, -gamma * power / miss * _exp(-nll) * nll - power


@compiled()
def _to_columns(small, low, high, part, out):  # type: ignore[no-untyped-def]
    """(C, k, w) to (C, k, W): each output from the two cells that it lies between."""
    for c in range(out.shape[0]):
        for r in range(out.shape[1]):
            cells, row = small[c, r], out[c, r]
            for x in range(len(low)):
                row[x] = cells[low[x]] * (ONE - part[x]) + cells[high[x]] * part[x]


@compiled()
def _from_columns(columns, low, high, part, out):  # type: ignore[no-untyped-def]
    """The transpose: adds (C, k, W) to (C, k, w)."""
    for c in range(out.shape[0]):
        for r in range(out.shape[1]):
            row, cells = columns[c, r], out[c, r]
            for x in range(len(low)):
                cells[low[x]] += row[x] * (ONE - part[x])
                cells[high[x]] += row[x] * part[x]


@compiled()
def _softmax(z, row, above, part, start, label, ignored, piece):  # type: ignore[no-untyped-def]
    """Fill a piece of a row: see :func:`_piece`. What is not finite under ignored pixels counts as 0."""
    e, total, top, largest, below = piece
    n, resized, rest = len(label), row != above, ONE - part
    for x in range(n):
        total[x], top[x], largest[x] = ZERO, -np.inf, ZERO
    for c in range(len(z)):
        first, second, logits, number = z[c, row, start:], z[c, above, start:], e[c], f32(c)
        if resized:
            for x in range(n):
                logits[x] = rest * first[x] + part * second[x]
        else:
            for x in range(n):
                logits[x] = first[x]
        for x in range(n):
            larger = logits[x] > top[x]
            top[x] = logits[x] if larger else top[x]
            largest[x] = number if larger else largest[x]
    for x in range(n):
        below[x] = e[label[x] if label[x] != ignored else 0, x] - top[x]
    for c in range(len(z)):
        logits = e[c]
        for x in range(n):
            value = _exp(logits[x] - top[x])
            logits[x] = value
            total[x] += value
    if not np.isfinite(_dot(total, total, n)):
        for x in range(n):
            if label[x] == ignored and not np.isfinite(total[x]):
                total[x], below[x] = ONE, ZERO
                for c in range(len(z)):
                    e[c, x] = ZERO


@compiled()
def _piece(classes, width):  # type: ignore[no-untyped-def]
    """e = exp(z - max z), (C, n), and of each pixel: sum of e, max z, its class, z_y - max z."""
    n = min(width, max(64, CACHE // (4 * classes) // 16 * 16))
    row = np.empty((4, n), f32)
    return np.empty((classes, n), f32), row[0], row[1], row[2], row[3]


@compiled()
def _weigh(label, ignored, weight, start, m):  # type: ignore[no-untyped-def]
    """The weights m of the pixels of a piece; without weights, 1; 0 of ignored pixels."""
    for x in range(len(label)):
        m[x] = ONE if label[x] != ignored else ZERO
    if len(weight):
        for x in range(len(label)):
            m[x] = weight[start + x] if label[x] != ignored else ZERO


@compiled()
def _sum_rows(  # type: ignore[no-untyped-def]
    z, rows, target, ignored, weight, marked, group, gamma, square, sums, log_prob, recall, groups
):
    """Add the sums of some rows of an image, and return how many pixels are right.

    Args:
        z: (C, k, W), logits.
        rows: (first, second, part), (R,) each: the two of the k rows that a row of the label lies between,
            and how far it is from the first.
        target: (R, W).
        weight, marked, group: (R, W), or (R, 0) for none.
        sums: (6, C): nll, intersection, truth, intersection and truth of marked pixels, prediction.
        log_prob: (C,); recall: (2, C), correct, count; groups: (2, S). Or (0,), (2, 0), (2, 0) for none.
    """
    piece = e, total, top, largest, below = _piece(len(z), target.shape[1])
    width = len(total)
    m, factor, nll, p = np.empty(width, f32), np.empty(width, f32), np.empty(width, f32), np.empty(width, f32)
    log_total = np.empty(width, f32)
    correct = 0
    for r in range(len(target)):
        row, above, part = rows[0][r], rows[1][r], rows[2][r]
        for start in range(0, target.shape[1], len(total)):
            label = target[r, start : start + len(total)]
            n = len(label)
            _softmax(z, row, above, part, start, label, ignored, piece)
            _weigh(label, ignored, weight[r], start, m)
            # a loop that writes to several arrays is not vectorised
            for x in range(n):
                log_total[x] = _log(total[x])
            for x in range(n):
                nll[x] = log_total[x] - below[x]
            for x in range(n):
                p[x] = _exp(-nll[x])
            for x in range(n):
                factor[x] = m[x] / total[x]
            if square:
                for x in range(n):
                    factor[x] /= total[x]
            for c in range(len(z)):
                sums[5, c] += _dot_of_square(e[c], factor, n) if square else _dot(e[c], factor, n)
            for c in range(len(log_prob)):
                for x in range(n):
                    if label[x] != ignored:
                        value = _logit(z, c, row, above, part, start + x)
                        log_prob[c] += m[x] * (value - top[x] - log_total[x])
            for x in range(n):
                c = label[x]
                if c == ignored:
                    continue
                right = largest[x] == c
                correct += right
                loss = nll[x] if gamma == 0 else _focal(nll[x], gamma)[0]
                sums[0, c] += m[x] * loss
                sums[1, c] += m[x] * p[x]
                sums[2, c] += m[x]
                if marked.shape[1] > 0 and marked[r, start + x]:
                    sums[3, c] += m[x] * p[x]
                    sums[4, c] += m[x]
                if recall.shape[1] > 0:
                    recall[0, c] += right
                    recall[1, c] += 1
                if group.shape[1] > 0:
                    groups[0, group[r, start + x]] += nll[x]
                    groups[1, group[r, start + x]] += 1
    return correct


@compiled()
def _logit(z, c, row, above, part, x):  # type: ignore[no-untyped-def]
    return z[c, row, x] if row == above else (ONE - part) * z[c, row, x] + part * z[c, above, x]


@compiled()
def _gradient_of_rows(  # type: ignore[no-untyped-def]
    z, rows, target, ignored, weight, marked, gamma, square, upstream, log_prob, resized, grad, weight_grad
):
    """Write the gradient by z of some rows to ``grad``, (C, k, W), or add it where they are resized.

    Args:
        upstream: (7, C), by the ``sums`` of :func:`_sum_rows` and by the sums of log p.
        log_prob: whether the last of them are not 0; resized: whether rows lie between rows.
        weight_grad: (R, W), or (R, 0) where it is not asked for.
        others: as of :func:`_sum_rows`.
    """
    by_nll, by_intersection, by_truth, by_marked, by_marked_truth, by_prediction, by_log_prob = upstream
    by_all = by_log_prob.sum()
    piece = e, total, top, _, below = _piece(len(z), target.shape[1])
    width = len(total)
    m, factor, own = np.empty(width, f32), np.empty(width, f32), np.empty(width, f32)
    mean, added = np.empty(width, f32), np.empty(width, f32)
    for r in range(len(target)):
        row, above, part = rows[0][r], rows[1][r], rows[2][r]
        for start in range(0, target.shape[1], len(total)):
            label = target[r, start : start + len(total)]
            n = len(label)
            _softmax(z, row, above, part, start, label, ignored, piece)
            _weigh(label, ignored, weight[r], start, m)
            for x in range(n):
                mean[x] = ZERO
            if square:
                for c in range(len(z)):
                    logits = e[c]
                    for x in range(n):
                        logits[x] /= total[x]
                        mean[x] += by_prediction[c] * logits[x] * logits[x]
            else:
                for c in range(len(z)):
                    logits = e[c]
                    for x in range(n):
                        mean[x] += by_prediction[c] * logits[x]
            for x in range(n):
                c = label[x] if label[x] != ignored else 0
                own[x], added[x] = e[c, x] * by_intersection[c], -by_nll[c]
                if marked.shape[1] > 0 and marked[r, start + x]:
                    own[x] += e[c, x] * by_marked[c]
            for x in range(n):
                factor[x] = ONE if square else ONE / total[x]
            for x in range(n):
                own[x] *= factor[x]
            for x in range(n):
                mean[x] *= factor[x]
            if weight_grad.shape[1] > 0:
                for x in range(n):
                    c = label[x]
                    if c == ignored:
                        continue
                    nll = _log(total[x]) - below[x]
                    loss = nll if gamma == 0 else _focal(nll, gamma)[0]
                    value = own[x] + mean[x] + by_nll[c] * loss + by_truth[c]
                    if marked.shape[1] > 0 and marked[r, start + x]:
                        value += by_marked_truth[c]
                    if log_prob:
                        for k in range(len(z)):
                            log_p = _logit(z, k, row, above, part, start + x) - top[x] - _log(total[x])
                            value += by_log_prob[k] * log_p
                    weight_grad[r, start + x] = value
            if gamma > 0:
                for x in range(n):
                    c = label[x] if label[x] != ignored else 0
                    added[x] = by_nll[c] * _focal(_log(total[x]) - below[x], gamma)[1]
            twice = f32(2) if square else ONE
            for x in range(n):
                added[x] += own[x]
            for x in range(n):
                mean[x] = twice * mean[x] + added[x] + by_all
            for x in range(n):
                factor[x] *= m[x]
            for x in range(n):
                added[x] *= m[x]
            for c in range(len(z)):
                logits, of_class = e[c], twice * by_prediction[c]
                if square:
                    for x in range(n):
                        logits[x] = logits[x] * factor[x] * (of_class * logits[x] - mean[x])
                else:
                    for x in range(n):
                        logits[x] = logits[x] * factor[x] * (of_class - mean[x])
                if log_prob:
                    for x in range(n):
                        logits[x] += m[x] * by_log_prob[c]
            for x in range(n):
                e[label[x] if label[x] != ignored else 0, x] += added[x]
            for c in range(len(z)):
                dz, first, second = e[c], grad[c, row, start:], grad[c, above, start:]
                if resized:
                    for x in range(n):
                        first[x] += (ONE - part) * dz[x]
                    for x in range(n):
                        second[x] += part * dz[x]
                else:
                    for x in range(n):
                        first[x] = dz[x]


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
        self.taps = [
            taps(small, large, o.align_corners)
            for small, large in zip(logits.shape[2:], target.shape[1:], strict=True)
        ]
        # full-size logits are read, and their gradient is written, where they are
        self.in_place = (
            not self.resized
            and logits.dtype == torch.float32
            and logits.is_contiguous()
            and o.logit_bias is None
        )

    def parts(self) -> list[_Part]:
        batch, height, width = self.target.shape
        vertical, step = self.taps[0], max(1, PART_NUMBERS // (self.logits.shape[1] * width))
        parts = []
        for start in range(0, height, step):
            rows = slice(start, min(start + step, height))
            band = slice(int(vertical.low[rows.start]), int(vertical.high[rows.stop - 1]) + 1)
            parts.append((rows, band))
        return [_Part(image, *part) for image in range(batch) for part in parts]

    def inputs(self, part: _Part) -> tuple[Any, ...]:
        """``z``, ``rows`` and the arguments up to ``marked`` of the kernels."""
        vertical, horizontal = self.taps
        if self.in_place:
            z, first = self.logits[part.image].numpy(), 0
        else:
            small = self.logits[part.image, :, part.band].float()
            if self.o.logit_bias is not None:
                small = small + self.o.logit_bias.float()[:, None, None]
            z, first = small.contiguous().numpy(), part.band.start
            if self.resized:
                small, z = z, np.empty((*z.shape[:2], self.target.shape[2]), f32)
                _to_columns(small, horizontal.low, horizontal.high, horizontal.distance.astype(f32), z)
        low, high, distance = (values[part.rows] for values in vertical)
        pixels = (self.weight, self.marked)
        return (
            z,
            (low - first, high - first, distance.astype(f32)),
            self.target[part.image, part.rows],
            self.o.ignore_index,
            *(values[part.image, part.rows] for values in pixels),
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
        options = f32(self.o.focal_gamma), self.o.square_prediction
        sums.correct[0] = _sum_rows(*self.inputs(part), group, *options, *sums[:-1])
        return sums

    def gradient(
        self, part: _Part, upstream: np.ndarray, grad: Tensor, weight_grad: np.ndarray
    ) -> Tensor | None:
        """Write that of a part to ``grad``, (B, C, H, W); of resized logits return it, (C, band, w)."""
        z, *others = self.inputs(part)
        if self.in_place:
            into = grad[part.image].numpy()
        else:
            into = np.zeros_like(z)
        _gradient_of_rows(
            z,
            *others,
            f32(self.o.focal_gamma),
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
        horizontal = self.taps[1]
        cells = np.zeros((*z.shape[:2], self.logits.shape[3]), f32)
        _from_columns(into, horizontal.low, horizontal.high, horizontal.distance.astype(f32), cells)
        return torch.from_numpy(cells)


class _Sums(NamedTuple):
    """As :func:`_sum_rows` has them, and the number of pixels that are right, (1,)."""

    sums: np.ndarray
    log_prob: np.ndarray
    recall: np.ndarray
    groups: np.ndarray
    correct: np.ndarray


class _SoftStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, pixel_weight, o):  # type: ignore[no-untyped-def]
        here = _Pass(logits, target, o)
        parts = here.parts()
        counted = list(each(here.sums, parts, on_cpu=True))
        number = len(parts) // len(logits)  # of an image
        sums, log_prob, recall, groups, correct = (
            torch.from_numpy(np.stack(values).reshape(len(logits), number, *values[0].shape).sum(1))
            for values in zip(*counted, strict=True)
        )
        ctx.save_for_backward(logits, target)
        ctx.options = o
        ctx.set_materialize_grads(False)
        nll, intersection, truth, *of_marked, prediction = (x.float() for x in sums.unbind(1))
        marked_intersection, marked_truth = of_marked if o.marked is not None else (None, None)
        group_nll = group_count = class_correct = class_count = None
        if o.group is not None:
            group_nll, group_count = groups.sum(0)
            group_nll, group_count = group_nll.float(), group_count.long()
        if o.with_recall:
            class_correct, class_count = (x.contiguous() for x in recall.unbind(1))
        correct = correct[:, 0]
        fixed = (correct, group_nll, group_count, class_correct, class_count)
        if not ctx.needs_input_grad[2]:
            fixed = (truth, marked_truth, *fixed)
        ctx.mark_non_differentiable(*(x for x in fixed if x is not None))
        log_prob = log_prob.float() if o.with_log_prob else None
        fields = (nll, intersection, prediction, truth, correct, log_prob)
        return *fields, marked_intersection, marked_truth, *fixed[-4:]

    @staticmethod
    @once_differentiable
    def backward(ctx, g_nll, g_intersection, g_prediction, g_truth, _correct, g_log_prob, *more):  # type: ignore[no-untyped-def]
        logits, target = ctx.saved_tensors
        o, weight = ctx.options, ctx.options.pixel_weight
        given = (g_nll, g_intersection, g_truth, *more[:2], g_prediction, g_log_prob)
        zeros = torch.zeros(logits.shape[:2])
        upstream = torch.stack([zeros if x is None else x.float() for x in given]).numpy()
        size = target.shape if ctx.needs_input_grad[2] else (*target.shape[:2], 0)
        weight_grad = torch.zeros(size)
        here = _Pass(logits, target, o)
        grad = torch.empty(logits.shape, dtype=logits.dtype)
        if here.resized:
            grad = torch.zeros(logits.shape)
        parts = here.parts()
        bands = each(
            lambda part: here.gradient(part, upstream, grad, weight_grad.numpy()), parts, on_cpu=True
        )
        for part, band in zip(parts, bands, strict=True):
            if band is not None:
                grad[part.image, :, part.band] += band
        if not ctx.needs_input_grad[2]:
            return grad.to(logits.dtype), None, None, None
        return grad.to(logits.dtype), None, weight_grad.to(weight.dtype), None


def soft_stats(logits: Tensor, target: Tensor, options: Options) -> SoftStats:
    """See :func:`mmseg_imbalance.ops.soft_stats`."""
    return SoftStats(*_SoftStats.apply(logits, target, options.pixel_weight, options))
