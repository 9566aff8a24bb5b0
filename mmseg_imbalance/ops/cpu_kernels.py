"""The loops of the CPU backend, compiled by Numba: a piece of a row at a time.

The logits of a piece are copied, or resized, into a room that a core's own caches hold.
There sixteen pixels at a time (:mod:`~mmseg_imbalance.ops.lanes`) go through the classes.
exp and log are polynomials. The gradient is derived in :mod:`~mmseg_imbalance.ops.strips`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.extending import intrinsic

from mmseg_imbalance.ops.lanes import (
    FLOAT,
    INTEGER,
    INTEGERS,
    NUMBER,
    load,
    spread,
    store,
    sum_of,
    where_equal,
    where_less,
)

f32 = np.float32
ZERO, ONE, HALF, INFINITY = f32(0), f32(1), f32(0.5), f32(np.inf)
TINY = np.finfo(f32).tiny
LARGE = f32(1.5 * 2**23)  # added to a number, it leaves the nearest integer in the last bits
LOG2_E, LN_2, LN_2_REST = f32(1.44269504), f32(0.693359375), f32(-2.12194440e-4)


def compiled(function: Callable) -> Any:
    """Compile at the first call and keep the result on disk, where there is a place for it.

    Infinities and NaN stay what they are: of the fast arithmetic only fused multiply-add is on.
    """
    options: dict[str, Any] = dict(nogil=True, error_model='numpy', fastmath={'contract'})
    try:
        kernel = njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that can be written
        return njit(**options)(function)
    # Numba's own guard, which works on Windows alone: a full disk is no reason to stop
    with suppress(AttributeError):
        kernel._cache._guard_against_spurious_io_errors = lambda: suppress(OSError)
    with suppress(AttributeError, OSError):  # of what a kernel depends on, Numba looks at this file alone
        kept = kernel._cache._cache_file
        kept._source_stamp = kept._source_stamp, Path(__file__).with_name('lanes.py').read_bytes()
    return kernel


@intrinsic
def _power_of_2(typing_context, n):
    """2^i from n = i + LARGE: i becomes the exponent of a float."""

    def code(context, builder, signature, arguments):
        bits, number = _bits(builder, arguments[0])
        shifted = builder.shl(bits, number(23))
        return builder.bitcast(builder.add(shifted, number(0x3F800000)), arguments[0].type)

    return n(n), code


def _bits(builder: Any, x: Any) -> tuple[Any, Callable]:
    """The bits of a float or of lanes, and what makes an integer, or lanes of it."""
    kind = INTEGER if x.type == FLOAT else INTEGERS

    def number(value: int) -> Any:
        return INTEGER(value) if kind == INTEGER else ir.Constant(INTEGERS, [INTEGER(value)] * NUMBER)

    return builder.bitcast(x, kind), number


def _split_bits(builder: Any, x: Any) -> tuple[Any, Any, Callable]:
    """The bits of x = 2^i g with g from 1/sqrt(2) to sqrt(2), and i."""
    bits, number = _bits(builder, x)
    return bits, builder.ashr(builder.sub(bits, number(0x3F3504F3)), number(23)), number


@intrinsic
def _exponent(typing_context, x):
    def code(context, builder, signature, arguments):
        return builder.sitofp(_split_bits(builder, arguments[0])[1], arguments[0].type)

    return x(x), code


@intrinsic
def _mantissa(typing_context, x):
    def code(context, builder, signature, arguments):
        bits, exponent, number = _split_bits(builder, arguments[0])
        return builder.bitcast(builder.sub(bits, builder.shl(exponent, number(23))), arguments[0].type)

    return x(x), code


# coefficients of Cephes (S. Moshier), expf.c and logf.c, good to a unit in the last place
E0, E1, E2 = f32(1.9875691500e-4), f32(1.3981999507e-3), f32(8.3334519073e-3)
E3, E4, E5 = f32(4.1665795894e-2), f32(1.6666665459e-1), f32(5.0000001201e-1)
L0, L1, L2 = f32(7.0376836292e-2), f32(-1.1514610310e-1), f32(1.1676998740e-1)
L3, L4, L5 = f32(-1.2420140846e-1), f32(1.4249322787e-1), f32(-1.6668057665e-1)
L6, L7, L8 = f32(2.0000714765e-1), f32(-2.4999993993e-1), f32(3.3333331174e-1)


@compiled
def exp(x):
    """exp(x) of x <= 0; 0 below -87, where a float has no full precision left."""
    n = x * LOG2_E + LARGE
    i = n - LARGE
    r = x - i * LN_2
    r = r - i * LN_2_REST
    p = ((((E0 * r + E1) * r + E2) * r + E3) * r + E4) * r + E5
    p = p * (r * r) + r + ONE
    return where_less(x, f32(-87), ZERO, p * _power_of_2(n))


@compiled
def log(x):
    """log(x) of a normal number x > 0; NaN of NaN."""
    i, g = _exponent(x), _mantissa(x) - ONE
    p = (((L0 * g + L1) * g + L2) * g + L3) * g + L4
    p = ((((p * g + L5) * g + L6) * g + L7) * g + L8) * g
    square = g * g
    p = p * square + i * LN_2_REST - HALF * square
    return g + p + i * LN_2 + (x - x)


@compiled
def _focal(nll, gamma):
    """(1 - p)^gamma nll, p = exp(-nll), and its derivative by log p."""
    miss = max(f32(-math.expm1(-nll)), TINY)
    power = miss**gamma
    return power * nll, -gamma * power / miss * exp(-nll) * nll - power


@compiled
def to_columns(small, low, high, part, out):
    """(C, k, w) to (C, k, W): each output from the two cells that it lies between."""
    for c in range(out.shape[0]):
        for r in range(out.shape[1]):
            cells, row = small[c, r], out[c, r]
            for x in range(len(low)):
                row[x] = cells[low[x]] * (ONE - part[x]) + cells[high[x]] * part[x]


@compiled
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


@compiled
def _begin(room, target, ignored, weight, start, width):
    """Of a piece: its number of pixels, their labels, -1 if ignored, and weights, 0 if ignored."""
    n, label, m = min(width, len(target) - start), room[0], room[1]
    for x in range(len(label)):
        label[x], m[x] = -ONE, ZERO
    for x in range(n):
        if target[start + x] != ignored:
            label[x], m[x] = f32(target[start + x]), weight[start + x] if len(weight) else ONE
    return n, label, m


@compiled
def _logit(z, c, row, above, part, x):
    return z[c, row, x] if row == above else (ONE - part) * z[c, row, x] + part * z[c, above, x]


@compiled
def _take(z, row, above, part, start, n, e):
    """Fill e, (C, n), with logits of a row, or with those between two rows; 0 after the last."""
    rest, whole = ONE - part, n // NUMBER * NUMBER
    for c in range(len(z)):
        if row == above:
            for x in range(0, whole, NUMBER):
                store(e, (c, x), load(z, (c, row, start + x)))
        else:
            for x in range(0, whole, NUMBER):
                first, second = load(z, (c, row, start + x)), load(z, (c, above, start + x))
                store(e, (c, x), rest * first + part * second)
        for x in range(whole, n):
            e[c, x] = _logit(z, c, row, above, part, start + x)
        if whole < n:
            for x in range(n, whole + NUMBER):
                e[c, x] = ZERO


@compiled
def _softmax(e, n, label, by_class, square, total, top, largest, below, mean):
    """From the logits in e fill the room of a piece: see :func:`_room`.

    What is not finite under ignored pixels counts as 0.

    Args:
        by_class: (C,), or (0,) where no mean is asked for.
    """
    infinite = spread(ZERO)
    for x in range(0, n, NUMBER):
        wanted = load(label, (x,))
        highest, which, own = spread(-INFINITY), spread(ZERO), spread(ZERO)
        for c in range(len(e)):
            values = load(e, (c, x))
            which = where_less(highest, values, f32(c), which)
            highest = where_less(highest, values, values, highest)
            own = where_equal(wanted, f32(c), values, own)
        added, average = spread(ZERO), spread(ZERO)
        for c in range(len(e)):
            values = exp(load(e, (c, x)) - highest)
            store(e, (c, x), values)
            added = added + values
            if len(by_class):
                average = average + by_class[c] * (values * values if square else values)
        own = own - highest
        infinite = infinite + (added - added)
        store(below, (x,), where_less(own, ZERO, own, ZERO))
        store(total, (x,), added)
        store(top, (x,), highest)
        store(largest, (x,), which)
        store(mean, (x,), average)
    if sum_of(infinite) != ZERO:
        for x in range(n):
            if label[x] < ZERO and not np.isfinite(total[x]):
                total[x], mean[x], below[x] = ONE, ZERO, ZERO
                for c in range(len(e)):
                    e[c, x] = ZERO


@compiled
def _room(classes, width):
    """Room for a piece: e = exp(z - max z), (C, n), and for each pixel its label and weight,
    sum_c e_c, max z, its class, z_y - max z of the label y, and sum_c by_class_c e_c, or of e_c^2.
    """
    # rows that are a power of 2 apart would take turns in a few places of the cache
    width = (width + NUMBER - 1) // NUMBER * NUMBER + NUMBER
    return np.empty((classes, width), f32), np.empty((7, width), f32)


@compiled
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
    e, room = _room(len(z), width)
    total, top, largest, below, mean = room[2], room[3], room[4], room[5], room[6]
    no_mean = np.empty(0, f32)
    factor, log_total, nll, p = np.empty((4, room.shape[1]), f32)
    plain = gamma == 0 and marked.shape[1] + recall.shape[1] + group.shape[1] == 0
    correct = 0
    for r in range(len(target)):
        row, above, part = rows[0][r], rows[1][r], rows[2][r]
        for start in range(0, target.shape[1], width):
            n, label, m = _begin(room, target[r], ignored, weight[r], start, width)
            _take(z, row, above, part, start, n, e)
            _softmax(e, n, label, no_mean, square, total, top, largest, below, mean)
            for x in range(0, n, NUMBER):
                of_all, share = load(total, (x,)), load(m, (x,))
                log_of_all = log(of_all)
                loss = log_of_all - load(below, (x,))
                share = share / of_all
                store(log_total, (x,), log_of_all)
                store(nll, (x,), loss)
                store(p, (x,), exp(ZERO - loss))
                store(factor, (x,), share / of_all if square else share)
            for c in range(len(z)):
                predicted = spread(ZERO)
                for x in range(0, n, NUMBER):
                    values = load(e, (c, x))
                    predicted = predicted + (values * values if square else values) * load(factor, (x,))
                sums[5, c] += sum_of(predicted)
            for c in range(len(log_prob)):
                for x in range(n):
                    if label[x] >= ZERO:
                        value = _logit(z, c, row, above, part, start + x)
                        log_prob[c] += m[x] * (value - top[x] - log_total[x])
            for x in range(0, n, NUMBER):
                wanted, c = load(label, (x,)), int(label[x])
                one_class = sum_of(where_equal(wanted, label[x], ONE, ZERO)) == f32(NUMBER)
                if one_class and plain:  # as most blocks of a real label are
                    if c >= 0:
                        counted = load(m, (x,))
                        correct += int(sum_of(where_equal(load(largest, (x,)), wanted, ONE, ZERO)))
                        sums[0, c] += sum_of(counted * load(nll, (x,)))
                        sums[1, c] += sum_of(counted * load(p, (x,)))
                        sums[2, c] += sum_of(counted)
                    continue
                for i in range(x, min(x + NUMBER, n)):
                    c = int(label[i])
                    if c < 0:
                        continue
                    right = largest[i] == label[i]
                    correct += right
                    loss = nll[i] if gamma == 0 else _focal(nll[i], gamma)[0]
                    sums[0, c] += m[i] * loss
                    sums[1, c] += m[i] * p[i]
                    sums[2, c] += m[i]
                    if marked.shape[1] > 0 and marked[r, start + i]:
                        sums[3, c] += m[i] * p[i]
                        sums[4, c] += m[i]
                    if recall.shape[1] > 0:
                        recall[0, c] += right
                        recall[1, c] += 1
                    if group.shape[1] > 0:
                        groups[0, group[r, start + i]] += nll[i]
                        groups[1, group[r, start + i]] += 1
    return correct


@compiled
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
    e, room = _room(len(z), width)
    total, top, largest, below, mean = room[2], room[3], room[4], room[5], room[6]
    factor, own, added = np.zeros((3, room.shape[1]), f32)
    twice = f32(2) if square else ONE
    for r in range(len(target)):
        row, above, part = rows[0][r], rows[1][r], rows[2][r]
        for start in range(0, target.shape[1], width):
            n, label, m = _begin(room, target[r], ignored, weight[r], start, width)
            _take(z, row, above, part, start, n, e)
            _softmax(e, n, label, by_prediction, square, total, top, largest, below, mean)
            for x in range(n):
                c = max(int(label[x]), 0)
                own[x], added[x] = by_intersection[c], -by_nll[c]
                if marked.shape[1] > 0 and marked[r, start + x]:
                    own[x] += by_marked[c]
            for x in range(0, n, NUMBER):
                share = ONE / load(total, (x,))
                of_label = load(own, (x,)) * exp(load(below, (x,))) * share
                store(factor, (x,), share)
                store(own, (x,), of_label)
                store(mean, (x,), load(mean, (x,)) * (share * share if square else share))
            if weight_grad.shape[1] > 0:
                for x in range(n):
                    c = int(label[x])
                    if c < 0:
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
                    c = max(int(label[x]), 0)
                    added[x] = by_nll[c] * _focal(log(total[x]) - below[x], gamma)[1]
            for x in range(0, n, NUMBER):
                wanted, counted, share = load(label, (x,)), load(m, (x,)), load(factor, (x,))
                of_label = load(added, (x,)) + load(own, (x,))
                average = twice * load(mean, (x,)) + of_label + by_all
                of_label, scale = of_label * counted, counted * share
                for c in range(len(z)):
                    values, change = load(e, (c, x)), spread(twice * by_prediction[c])
                    if square:
                        change = change * values * share
                    values = values * scale * (change - average)
                    if log_prob:
                        values = values + counted * by_log_prob[c]
                    store(e, (c, x), where_equal(wanted, f32(c), values + of_label, values))
            _give(e, n, row, above, part, start, resized, grad)


@compiled
def _give(e, n, row, above, part, start, resized, grad):
    """Write e to a row of ``grad``, or add it to the two rows that it lies between."""
    rest, whole = ONE - part, n // NUMBER * NUMBER
    for c in range(len(e)):
        if not resized:
            for x in range(0, whole, NUMBER):
                store(grad, (c, row, start + x), load(e, (c, x)))
            for x in range(whole, n):
                grad[c, row, start + x] = e[c, x]
            continue
        for x in range(0, whole, NUMBER):
            values, at = load(e, (c, x)), start + x
            store(grad, (c, row, at), load(grad, (c, row, at)) + rest * values)
            store(grad, (c, above, at), load(grad, (c, above, at)) + part * values)
        for x in range(whole, n):
            grad[c, row, start + x] += rest * e[c, x]
            grad[c, above, start + x] += part * e[c, x]
