"""The loops of the CPU backend, compiled by Numba: some pixels of a row at a time, along the row.

exp and log are polynomials, so that the compiler makes vector instructions of the loops. It does not where a
loop writes to several arrays. The gradient is derived in :mod:`~mmseg_imbalance.ops.strips`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

f32 = np.float32
ZERO, ONE, HALF = f32(0), f32(1), f32(0.5)
TINY = np.finfo(f32).tiny
LARGE = f32(1.5 * 2**23)  # added to a number, it leaves the nearest integer in the last bits
LOG2_E, LN_2, LN_2_REST = f32(1.44269504), f32(0.693359375), f32(-2.12194440e-4)
FLOAT, INTEGER = ir.FloatType(), ir.IntType(32)


def compiled(*also: str) -> Callable[[Callable], Any]:
    """Compile at the first call and keep the result on disk, where there is a place for it.

    Infinities and NaN stay what they are: of the fast arithmetic only fused multiply-add is on, and what
    ``also`` names.
    """
    options: dict[str, Any] = dict(nogil=True, error_model='numpy', fastmath={'contract', *also})

    def compile_it(function: Callable) -> Any:
        try:
            kernel = njit(cache=True, **options)(function)
        except RuntimeError:  # no folder that can be written
            return njit(**options)(function)
        # Numba's own guard, which works on Windows alone: a full disk is no reason to stop
        with suppress(AttributeError):
            kernel._cache._guard_against_spurious_io_errors = lambda: suppress(OSError)
        return kernel

    return compile_it


@intrinsic
def _power_of_2(typing_context, n):
    """2^i from n = i + LARGE: i becomes the exponent of a float."""

    def code(context, builder, signature, arguments):
        bits = builder.shl(builder.bitcast(arguments[0], INTEGER), INTEGER(23))
        return builder.bitcast(builder.add(bits, INTEGER(0x3F800000)), FLOAT)

    return types.float32(types.float32), code


def _split_bits(builder: Any, x: Any) -> tuple[Any, Any]:
    """The bits of x = 2^i g with g from 1/sqrt(2) to sqrt(2), and i."""
    bits = builder.bitcast(x, INTEGER)
    return bits, builder.ashr(builder.sub(bits, INTEGER(0x3F3504F3)), INTEGER(23))


@intrinsic
def _exponent(typing_context, x):
    def code(context, builder, signature, arguments):
        return builder.sitofp(_split_bits(builder, arguments[0])[1], FLOAT)

    return types.float32(types.float32), code


@intrinsic
def _mantissa(typing_context, x):
    def code(context, builder, signature, arguments):
        bits, exponent = _split_bits(builder, arguments[0])
        return builder.bitcast(builder.sub(bits, builder.shl(exponent, INTEGER(23))), FLOAT)

    return types.float32(types.float32), code


# coefficients of Cephes (S. Moshier), expf.c and logf.c, good to a unit in the last place
E0, E1, E2 = f32(1.9875691500e-4), f32(1.3981999507e-3), f32(8.3334519073e-3)
E3, E4, E5 = f32(4.1665795894e-2), f32(1.6666665459e-1), f32(5.0000001201e-1)
L0, L1, L2 = f32(7.0376836292e-2), f32(-1.1514610310e-1), f32(1.1676998740e-1)
L3, L4, L5 = f32(-1.2420140846e-1), f32(1.4249322787e-1), f32(-1.6668057665e-1)
L6, L7, L8 = f32(2.0000714765e-1), f32(-2.4999993993e-1), f32(3.3333331174e-1)


@compiled()
def exp(x):
    """exp(x) of x <= 0; 0 below -87, where a float has no full precision left."""
    n = x * LOG2_E + LARGE
    i = n - LARGE
    r = x - i * LN_2
    r = r - i * LN_2_REST
    p = ((((E0 * r + E1) * r + E2) * r + E3) * r + E4) * r + E5
    p = p * (r * r) + r + ONE
    return ZERO if x < f32(-87) else p * _power_of_2(n)


@compiled()
def log(x):
    """log(x) of a normal number x > 0; NaN of NaN."""
    i, g = _exponent(x), _mantissa(x) - ONE
    p = (((L0 * g + L1) * g + L2) * g + L3) * g + L4
    p = ((((p * g + L5) * g + L6) * g + L7) * g + L8) * g
    square = g * g
    p = p * square + i * LN_2_REST - HALF * square
    return g + p + i * LN_2 + (x - x)


@compiled('reassoc')
def _dot(a, b, n):
    total = ZERO
    for x in range(n):
        total += a[x] * b[x]
    return total


@compiled()
def _focal(nll, gamma):
    """(1 - p)^gamma nll, p = exp(-nll), and its derivative by log p."""
    miss = max(f32(-math.expm1(-nll)), TINY)
    power = miss**gamma
    return power * nll, -gamma * power / miss * exp(-nll) * nll - power


@compiled()
def to_columns(small, low, high, part, out):
    """(C, k, w) to (C, k, W): each output from the two cells that it lies between."""
    for c in range(out.shape[0]):
        for r in range(out.shape[1]):
            cells, row = small[c, r], out[c, r]
            for x in range(len(low)):
                row[x] = cells[low[x]] * (ONE - part[x]) + cells[high[x]] * part[x]


@compiled()
def from_columns(columns, low, high, part, out):
    """The transpose: adds (C, k, W) to (C, k, w)."""
    for c in range(out.shape[0]):
        for r in range(out.shape[1]):
            row, cells = columns[c, r], out[c, r]
            at, next_to, first, second = low[0], high[0], ZERO, ZERO
            for x in range(len(low)):
                if low[x] != at:
                    cells[at] += first
                    cells[next_to] += second
                    at, next_to, first, second = low[x], high[x], ZERO, ZERO
                first += row[x] * (ONE - part[x])
                second += row[x] * part[x]
            cells[at] += first
            cells[next_to] += second


@compiled()
def _softmax(z, row, above, part, start, label, ignored, by_class, square, piece):
    """Fill a piece of a row: see :func:`_piece`. What is not finite under ignored pixels counts as 0.

    ``by_class``: (C,), or (0,) where no mean is asked for.
    """
    e, total, top, largest, below, mean = piece
    n, rest = len(label), ONE - part
    for x in range(n):
        total[x], top[x], largest[x], below[x], mean[x] = ZERO, -np.inf, ZERO, ZERO, ZERO
    between = row != above
    for c in range(len(z) if between else 0):
        first, second, logits = z[c, row, start:], z[c, above, start:], e[c]
        for x in range(n):
            logits[x] = rest * first[x] + part * second[x]
    for c in range(0, len(z), 2):  # by two, which takes a quarter of the time
        d = min(c + 1, len(z) - 1)
        first = e[c] if between else z[c, row, start:]
        second = e[d] if between else z[d, row, start:]
        for x in range(n):
            value, number = top[x], largest[x]
            number = f32(c) if first[x] > value else number
            value = first[x] if first[x] > value else value
            largest[x] = f32(d) if second[x] > value else number
            top[x] = second[x] if second[x] > value else value
    for x in range(n):
        c = label[x]
        if c != ignored:
            below[x] = (e[c, x] if between else z[c, row, start + x]) - top[x]
    for c in range(len(z)):
        values, logits = e[c], z[c, row, start:]
        if between:  # one loop for both is not made of vector instructions: it may write what it reads next
            for x in range(n):
                values[x] = exp(values[x] - top[x])
        else:
            for x in range(n):
                values[x] = exp(logits[x] - top[x])
    for c in range(0, len(z), 2):
        d = min(c + 1, len(z) - 1)
        first, second, both = e[c], e[d], f32(d - c)
        for x in range(n):
            total[x] += first[x] + both * second[x]
        if len(by_class) == 0:
            continue
        by_first, by_second = by_class[c], both * by_class[d]
        if square:
            for x in range(n):
                mean[x] += by_first * first[x] * first[x] + by_second * second[x] * second[x]
        else:
            for x in range(n):
                mean[x] += by_first * first[x] + by_second * second[x]
    if not np.isfinite(_dot(total, total, n)):
        for x in range(n):
            if label[x] == ignored and not np.isfinite(total[x]):
                total[x], mean[x] = ONE, ZERO
                for c in range(len(z)):
                    e[c, x] = ZERO


@compiled()
def _piece(classes, width):
    """Room for a piece: e = exp(z - max z), (C, n), and for each pixel sum_c e_c, max z, its class,
    z_y - max z of the label y, and sum_c by_class_c e_c, or of e_c^2.
    """
    row = np.empty((5, width), f32)
    return np.empty((classes, width), f32), row[0], row[1], row[2], row[3], row[4]


@compiled()
def _weigh(label, ignored, weight, start, m):
    """The weights m of the pixels of a piece; without weights, 1; 0 of ignored pixels."""
    for x in range(len(label)):
        m[x] = ONE if label[x] != ignored else ZERO
    if len(weight):
        for x in range(len(label)):
            m[x] = weight[start + x] if label[x] != ignored else ZERO


@compiled()
def sum_rows(
    z, rows, width, target, ignored, weight, marked, group, gamma, square, sums, log_prob, recall, groups
):
    """Add the sums of some rows of an image, and return how many pixels are right.

    Args:
        z: (C, k, W), logits.
        rows: (first, second, part), (R,) each: the two of the k rows that a row of the label lies between,
            and how far it is from the first.
        width: of a piece; target: (R, W).
        weight, marked, group: (R, W), or (R, 0) for none.
        sums: (6, C): nll, intersection, truth, intersection and truth of marked pixels, prediction.
        log_prob: (C,); recall: (2, C), correct, count; groups: (2, S). Or (0,), (2, 0), (2, 0) for none.
    """
    piece = e, total, top, largest, below, _ = _piece(len(z), width)
    no_mean = np.empty(0, f32)
    m, factor, log_total = np.empty(width, f32), np.empty(width, f32), np.empty(width, f32)
    nll, p = np.empty(width, f32), np.empty(width, f32)
    correct = 0
    for r in range(len(target)):
        row, above, part = rows[0][r], rows[1][r], rows[2][r]
        for start in range(0, target.shape[1], width):
            label = target[r, start : start + width]
            n = len(label)
            _softmax(z, row, above, part, start, label, ignored, no_mean, square, piece)
            _weigh(label, ignored, weight[r], start, m)
            for x in range(n):
                log_total[x] = log(total[x])
            for x in range(n):
                nll[x] = log_total[x] - below[x]
            for x in range(n):
                p[x] = exp(-nll[x])
            for x in range(n):
                factor[x] = m[x] / total[x]
            if square:
                for x in range(n):
                    factor[x] /= total[x]
                for c in range(len(z)):
                    values = e[c]
                    for x in range(n):
                        values[x] *= values[x]
            for c in range(len(z)):
                sums[5, c] += _dot(e[c], factor, n)
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
def _logit(z, c, row, above, part, x):
    return z[c, row, x] if row == above else (ONE - part) * z[c, row, x] + part * z[c, above, x]


@compiled()
def gradient_of_rows(
    z,
    rows,
    width,
    target,
    ignored,
    weight,
    marked,
    gamma,
    square,
    upstream,
    log_prob,
    resized,
    grad,
    weight_grad,
):
    """Write the gradient by z of some rows to ``grad``, (C, k, W), or add it where they are resized.

    Args:
        upstream: (7, C), by the ``sums`` of :func:`sum_rows` and by the sums of log p.
        log_prob: whether the last of them are not 0; resized: whether rows lie between rows.
        weight_grad: (R, W), or (R, 0) where it is not asked for.
        others: as of :func:`sum_rows`.
    """
    by_nll, by_intersection, by_truth, by_marked, by_marked_truth, by_prediction, by_log_prob = upstream
    by_all = by_log_prob.sum()
    piece = e, total, top, _, below, mean = _piece(len(z), width)
    m, factor = np.empty(width, f32), np.empty(width, f32)
    own, added = np.empty(width, f32), np.empty(width, f32)
    for r in range(len(target)):
        row, above, part = rows[0][r], rows[1][r], rows[2][r]
        rest = ONE - part if resized else ONE
        for start in range(0, target.shape[1], width):
            label = target[r, start : start + width]
            n = len(label)
            _softmax(z, row, above, part, start, label, ignored, by_prediction, square, piece)
            _weigh(label, ignored, weight[r], start, m)
            for x in range(n):
                c = label[x] if label[x] != ignored else 0
                own[x], added[x] = e[c, x] * by_intersection[c], -by_nll[c]
                if marked.shape[1] > 0 and marked[r, start + x]:
                    own[x] += e[c, x] * by_marked[c]
            for x in range(n):
                factor[x] = ONE / total[x]
            for x in range(n):
                own[x] *= factor[x]
            for x in range(n):
                mean[x] *= factor[x] * factor[x] if square else factor[x]
            if weight_grad.shape[1] > 0:
                for x in range(n):
                    c = label[x]
                    if c == ignored:
                        continue
                    nll = log(total[x]) - below[x]
                    loss = nll if gamma == 0 else _focal(nll, gamma)[0]
                    value = own[x] + mean[x] + by_nll[c] * loss + by_truth[c]
                    if marked.shape[1] > 0 and marked[r, start + x]:
                        value += by_marked_truth[c]
                    if log_prob:
                        for k in range(len(z)):
                            log_p = _logit(z, k, row, above, part, start + x) - top[x] - log(total[x])
                            value += by_log_prob[k] * log_p
                    weight_grad[r, start + x] = value
            if gamma > 0:
                for x in range(n):
                    c = label[x] if label[x] != ignored else 0
                    added[x] = by_nll[c] * _focal(log(total[x]) - below[x], gamma)[1]
            twice = f32(2) if square else ONE
            for x in range(n):
                added[x] += own[x]
            for x in range(n):
                mean[x] = twice * mean[x] + added[x] + by_all
            for x in range(n):
                own[x] = m[x] * factor[x]
            for x in range(n):
                added[x] *= m[x]
            for c in range(len(z)):
                values, of_class, of_log_prob = e[c], twice * by_prediction[c], by_log_prob[c]
                first, second = grad[c, row, start:], grad[c, above, start:]
                if square:
                    for x in range(n):
                        values[x] *= own[x] * (of_class * values[x] * factor[x] - mean[x])
                elif log_prob or resized:
                    for x in range(n):
                        values[x] *= own[x] * (of_class - mean[x])
                else:
                    for x in range(n):
                        first[x] = values[x] * own[x] * (of_class - mean[x])
                    continue
                if log_prob:
                    for x in range(n):
                        values[x] += m[x] * of_log_prob
                if resized:
                    for x in range(n):
                        first[x] += rest * values[x]
                    for x in range(n):
                        second[x] += part * values[x]
                else:
                    for x in range(n):
                        first[x] = values[x]
            for x in range(n):
                c = label[x]
                if c != ignored:
                    grad[c, row, start + x] += added[x] * rest
                    if resized:
                        grad[c, above, start + x] += added[x] * part
