"""The soft statistics as CUDA kernels, one forward and one backward, softmax recomputed in backward.

A program walks label rows, P columns wide, with all classes at once: tiles are (BLOCK_C, P), a warp's lanes
along the pixels. Up to 20 classes are one thread's own, so that softmax needs no communication, and as C is a
constant the compiler drops the classes that fill it up to a power of two.

From small logits, the label rows between two source rows are a *band*: a row of it is lower - (1 - part)
(lower - upper), of source rows resized to the label's columns; the lower one is the next band's upper one.
What lies beyond the last source row is a band too, of that row alone.

Forward: sums by label are products with the one-hot tile, kept in registers and written once per program;
torch adds up the programs in double. Group ids are split into two digits: one-hot (S, P) of the high one
times one-hot (P, S) of the low one counts S^2 groups at the price of 2 S.

Backward, with the gradients gN, gI, gP, gL of nll, intersection, prediction, log_prob, for a pixel of label y
and weight m, l its loss:

    a    = m (gI_y p_y + gN_y dl/dlog p_y)
    q_k  = gP_k                               2 gP_k p_k where the prediction is squared
    dz_k = p_k (m q_k - m sum_j q_j p_j - a - m sum_j gL_j) + m gL_k + [k = y] a

and by a weight that requires grad, gT being the gradient of truth:

    dm   = gT_y + gI_y p_y + gN_y l + sum_j gP_j p_j + sum_j gL_j log p_j      p_j^2 where it is squared

Where a pixel is marked, the gradients of marked_intersection and marked_truth are added to gI and gT.

To small logits this is a gather, as bilinear weights are hats, max(0, 1 - |x - n|) of a pixel's source
coordinate x and a cell n: a program owns some cells of some source rows and walks the pixels under their
hats, band by band. The rows of a band are added up by their weights, for the source row above and for the one
below; once a source row has both of its bands, its sums are multiplied by the columns' weights, (16, P).
"""

import math
import warnings
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmseg_imbalance.ops.contract import Options, SoftStats, once_differentiable

if tuple(int(n) for n in triton.__version__.split('.')[:2]) < (3, 3):
    raise ImportError(f'the kernels need Triton 3.3 or newer, got {triton.__version__}')

MAX_CLASSES = 256
MAX_GROUPS = 4096
# Programs of four warps for each multiprocessor; in forward few enough for their sums to be added up soon
FORWARD, BACKWARD = 4, 24
HELD = 2  # of those that gather a gradient, at once
# Multiples of 16 among these are not worth a kernel of their own. As the compiler knows no alignment, a
# thread takes one pixel at a time, which leaves it room for more classes.
SIZES = ['h', 'w', 'height', 'width', 'bands', 'bands_each', 'cells_each', 'num_groups']
SIZES += [f'{of}stride_{axis}' for of in ('', 'grad_') for axis in ('image', 'class', 'row')]


@torch.compiler.disable
def soft_stats(logits: Tensor, target: Tensor, options: Options) -> SoftStats:
    """See :func:`mmseg_imbalance.ops.soft_stats`."""
    return SoftStats(*_SoftStats.apply(logits, target, options.pixel_weight, options))


def why_not(logits: Tensor, num_groups: int) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    if logits.dtype == torch.float64:
        return 'its kernels calculate in float32 and the logits are float64'
    if logits.shape[1] > MAX_CLASSES:
        return f'its kernels take up to {MAX_CLASSES} classes and the logits have {logits.shape[1]}'
    if num_groups > MAX_GROUPS:
        return f'its kernels take up to {MAX_GROUPS} groups and num_groups is {num_groups}'
    if INTERPRETED:
        return None
    if not logits.is_cuda:
        return f'its kernels run on CUDA devices and the logits are on {logits.device}'
    return _why_not_on(logits.device)


@lru_cache
def _why_not_on(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return 'its kernels run on CUDA devices and this torch is built for ROCm'
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f'its kernels need compute capability 8.0 and {device} has {major}.{minor}'
    try:
        _start_a_kernel(device)
    except Exception as error:  # compilers, drivers and Triton raise what they like
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:500]
        warnings.warn(
            f"Triton cannot start a kernel on {device} ({reason}), so backend='auto' takes 'strips', which "
            "is slower. Install a C compiler, such as gcc, and Python's headers, such as python3-dev",
            stacklevel=2,
        )
        return f'Triton cannot start a kernel on {device} ({reason})'
    return None


@triton.jit
def _first_kernel(x):
    tl.store(x, 0.0)


def _start_a_kernel(device: torch.device) -> None:
    """Raises, whatever it is, where Triton finds no C compiler or no headers of Python to build it with."""
    x = torch.empty(1, device=device)
    with torch.cuda.device_of(x):
        _first_kernel[(1,)](x)


@triton.jit
def _coordinate(pixel, scale, last, ALIGN: tl.constexpr):
    """Where a label row or column lies among the cells 0 to ``last``."""
    x = pixel * scale if ALIGN else (pixel + 0.5) * scale - 0.5
    return tl.minimum(tl.maximum(x, 0.0), last)


@triton.jit
def _first_pixel(cell, inverse, size, slack, ALIGN: tl.constexpr):
    """The first of ``size`` label rows or columns that does not lie before a cell, moved by some slack."""
    x = cell * inverse if ALIGN else (cell + 0.5) * inverse - 0.5
    return tl.minimum(tl.maximum(tl.ceil(x + slack), 0.0), size).to(tl.int32)


@triton.jit
def _first_row(band, bands, inverse, height, ALIGN: tl.constexpr):
    """The first label row of a band; however it is rounded, each row is in one band."""
    row = tl.where(band == bands, height, _first_pixel(band, inverse, height, 0.0, ALIGN))
    return tl.where(band == 0, 0, row)


@triton.jit
def _row_part(row, band, scale, h, ALIGN: tl.constexpr):
    """The distance of a label row from the source row above it."""
    return tl.minimum(tl.maximum(_coordinate(row, scale, h - 1, ALIGN) - band, 0.0), 1.0)


@triton.jit
def _load_row(row, bias, c, used, stride_class, C: tl.constexpr):
    """Logits at places of a row with their bias, (BLOCK_C, P); nothing but the bias where none is used."""
    at = row[None, :] + c.to(tl.int64)[:, None] * stride_class
    # Which axis goes along the lanes depends on the version of Triton where none is known to be contiguous.
    # As nothing is known of the alignment either, no other conclusion is drawn from this.
    at = tl.max_contiguous(at, [1, 2])
    known = c[:, None] < C
    z = tl.load(at, mask=known if used is None else known & used[None, :], other=0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[:, None]
    return z


@triton.jit
def _resize_row(
    row, bias, c, column, w, width, scale, band, stride_class, stride_column,
    C: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A source row at the label's columns, (BLOCK_C, P); columns beyond the last one take the last cell."""
    # both as they are, but the compiler does not know, and keeps nothing that is made of them for other bands
    stride_class += tl.minimum(band, 0)
    column += tl.minimum(band, 0)
    x = _coordinate(column, scale, w - 1, ALIGN)
    cell = x.to(tl.int32)
    part = (x - cell)[None, :]
    # 0 times what is not finite is not 0: nothing is taken of a neighbour where columns are not resized;
    # elsewhere it is, as in torch
    beside = cell < tl.where(w == width, 0, w - 1)
    row += cell.to(tl.int64) * stride_column
    z = _load_row(row, bias, c, None, stride_class, C) * (1 - part)
    return z + _load_row(row + stride_column, bias, c, beside, stride_class, C) * part


@triton.jit
def _load_labels(target, weight, pixel, inside, C: tl.constexpr, IGNORE: tl.constexpr):
    """Label and weight of each pixel, -1 and 0 where it does not count; whether the label is no class."""
    y = tl.load(target + pixel, mask=inside, other=0).to(tl.int64)
    valid = inside & (y != IGNORE)
    known = valid & (y >= 0) & (y < C)
    m = known.to(tl.float32)
    if weight is not None:
        m = tl.load(weight + pixel, mask=known, other=0).to(tl.float32)
    return tl.where(known, y, -1).to(tl.int32), m, valid & ((y < 0) | (y >= C))


@triton.jit
def _is_marked(marked, pixel, y):
    """Whether a pixel that counts is marked."""
    return (y >= 0) & (tl.load(marked + pixel, mask=y >= 0, other=0) != 0)


@triton.jit
def _exp(x):
    # without the detour of tl.exp for denormal results
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _of_label(z, c, y, C: tl.constexpr):
    """Max z, z_y - max z, or 0 where a pixel does not count, and where a class is the label."""
    top = tl.max(tl.where(c[:, None] < C, z, float('-inf')), 0)
    member = (c[:, None] == y[None, :]) & (c[:, None] < C)
    below = tl.where(y < 0, 0.0, tl.sum(tl.where(member, z, 0.0), 0) - top)
    return top, below, member


@triton.jit
def _softmax(z, top, below, member, c, C: tl.constexpr, FOCAL: tl.constexpr):
    """exp(z - max z), its sum, -log p_y and, where asked, 1 - p_y; as if z_y = max z where none counts."""
    e = tl.where(c[:, None] < C, _exp(z - top[None, :]), 0.0)
    total = tl.sum(e, 0)
    nll = tl.log(total) - below
    miss = nll
    if FOCAL:
        # from the other classes, 1 - p_y and log p_y keep their digits where p_y is close to 1
        others = tl.sum(tl.where(member, 0.0, e), 0)
        miss = others / total
        u = 1 + others
        log1p = tl.where(u == 1, others, tl.log(u) * (others / tl.where(u == 1, 1.0, u - 1)))
        nll = tl.where(below == 0, log1p, nll)
    return e, total, nll, miss


@triton.jit
def _power(miss, gamma):
    # above 0, where each power and the quotient of both are finite
    miss = tl.maximum(miss, 1.1754944e-38)
    return tl.exp2(gamma * tl.log2(miss)), miss


@triton.jit
def _large_part(x):
    """x cut off to the 11 bits that tf32 keeps; what is left fits as well, but for two bits."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _store_sums(at, values, c, C: tl.constexpr, P: tl.constexpr):
    if P == 32:
        tl.store(at + c, tl.sum(values, 1), mask=c < C)
    else:
        # a product with ones: with several classes a thread, the shuffles of tl.sum cost as much as some rows
        k = tl.arange(0, 16)[None, :]
        # in two parts one after the other, as tf32x3 takes more registers
        ones = tl.full((P, 16), 1.0, tl.float32)
        large = _large_part(values)
        total = tl.dot(values - large, ones, input_precision='tf32')
        total = tl.dot(large, ones, total, input_precision='tf32')
        tl.store(at + c[:, None] + k, total, mask=(c[:, None] < C) & (k == 0))


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    logits, target, bias, weight, group, marked, sums, group_sums, intact,
    stride_image, stride_class, stride_row, stride_column, h, w, height, width,
    row_scale, row_inverse, column_scale, gamma, bands, bands_each, num_groups,
    C: tl.constexpr, IGNORE: tl.constexpr, FOCAL: tl.constexpr, SQUARE: tl.constexpr, LOG_PROB: tl.constexpr,
    RECALL: tl.constexpr, RESIZE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, P: tl.constexpr,
    S: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(2).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    known = c[:, None] < C
    digit = tl.arange(0, S)
    column = tl.program_id(0) * P + tl.arange(0, P)
    inside = column < width
    # these go on from row to row, as their multiples would make 64 bits of every number of a row
    band = tl.program_id(1) * bands_each
    source = logits + (image * stride_image + band.to(tl.int64) * stride_row)

    nll = tl.zeros((BLOCK_C, P), tl.float32)
    intersection = tl.zeros((BLOCK_C, P), tl.float32)
    prediction = tl.zeros((BLOCK_C, P), tl.float32)
    truth = tl.zeros((BLOCK_C, P), tl.float32)
    log_prob = tl.zeros((BLOCK_C, P), tl.float32)
    group_nll = tl.zeros((S, S), tl.float32)
    group_count = tl.zeros((S, S), tl.float32)
    correct = tl.zeros((P,), tl.float32)
    class_correct = tl.zeros((BLOCK_C, P), tl.float32)
    class_count = tl.zeros((BLOCK_C, P), tl.float32)
    marked_intersection = tl.zeros((BLOCK_C, P), tl.float32)
    marked_truth = tl.zeros((BLOCK_C, P), tl.float32)

    last = tl.minimum(band + bands_each, bands)
    row = band
    if RESIZE:
        row = _first_row(band, bands, row_inverse, height, ALIGN)
        lower = _resize_row(
            source, bias, c, column, w, width, column_scale, band, stride_class, stride_column, C, ALIGN
        )  # fmt: skip
    pixel = (image * height + row) * width + column
    tl.assume(band < last)  # else the sums were kept twice, for no bands at all
    while band < last:
        stop = row + 1
        if RESIZE:
            stop = _first_row(band + 1, bands, row_inverse, height, ALIGN)
            under = source + tl.where((band < h - 1) & (h != height), stride_row, 0)
            upper = lower
            lower = _resize_row(
                under, bias, c, column, w, width, column_scale, band, stride_class, stride_column, C, ALIGN
            )  # fmt: skip
            change = tl.where(h == height, 0.0, lower - upper)
        while row < stop:
            if RESIZE:
                z = lower - (1 - _row_part(row, band, row_scale, h, ALIGN)) * change
            else:
                at_columns = source + column.to(tl.int64) * stride_column
                z = _load_row(at_columns, bias, c, inside, stride_class, C)
            y, m, strange = _load_labels(target, weight, pixel, inside, C, IGNORE)
            # all that find something write the same value
            tl.store(intact + tl.zeros_like(y), 0, mask=strange)
            top, below, member = _of_label(z, c, y, C)
            # among equals the first is the prediction
            earlier = tl.max(tl.where((c[:, None] < y[None, :]) & known, z, float('-inf')), 0)
            hit = tl.where((y >= 0) & (below == 0) & (earlier < top), 1.0, 0.0)
            correct += hit
            e, total, plain, miss = _softmax(z, top, below, member, c, C, FOCAL)

            loss = plain
            if FOCAL:
                power, miss = _power(miss, gamma)
                loss = plain * power
            share = m * (_exp(below) / total)
            # the label as it is, but the compiler does not know, and compares again: there are few predicates
            member = known & (c[:, None] == (y + tl.minimum(row, 0))[None, :])
            # 0 times what is not finite is not 0
            counts = known & (y >= 0)[None, :]
            nll = tl.where(member, nll + (m * loss)[None, :], nll)
            intersection = tl.where(member, intersection + share[None, :], intersection)
            truth = tl.where(member, truth + m[None, :], truth)
            if marked is not None:
                here = member & _is_marked(marked, pixel, y)[None, :]
                marked_intersection += tl.where(here, share[None, :], 0.0)
                marked_truth += tl.where(here, m[None, :], 0.0)
            if SQUARE:
                prediction = tl.where(counts, prediction + e * e * (m / total / total)[None, :], prediction)
            else:
                prediction = tl.where(counts, prediction + e * (m / total)[None, :], prediction)
            if LOG_PROB:
                log_p = z - top[None, :] - tl.log(total)[None, :]
                log_prob = tl.where(counts, log_prob + m[None, :] * log_p, log_prob)
            if RECALL:
                class_correct += tl.where(member, hit[None, :], 0.0)
                if weight is not None:
                    class_count += tl.where(member, 1.0, 0.0)

            if group is not None:
                s = tl.load(group + pixel, mask=y >= 0, other=0).to(tl.int64)
                found = (y >= 0) & (s >= 0) & (s < num_groups)
                tl.store(intact + tl.zeros_like(y), 0, mask=(y >= 0) & ((s < 0) | (s >= num_groups)))
                s = tl.where(found, s, 0).to(tl.int32)
                high = (digit[:, None] == (s // S)[None, :]) & found[None, :]  # (S, P)
                low = ((s % S)[:, None] == digit[None, :]).to(tl.float32)  # (P, S)
                group_count += tl.dot(high.to(tl.float32), low, input_precision='tf32')
                # in two parts, of which tf32 keeps 11 bits each, 22 of the 24
                large = _large_part(plain)
                group_nll += tl.dot(tl.where(high, large[None, :], 0.0), low, input_precision='tf32')
                group_nll += tl.dot(
                    tl.where(high, (plain - large)[None, :], 0.0), low, input_precision='tf32'
                )
            row += 1
            pixel += width
        band += 1
        source += stride_row

    blocks = tl.num_programs(0) * tl.num_programs(1)
    program = image * blocks + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    before_marked: tl.constexpr = 5 + (1 if LOG_PROB else 0)
    fields: tl.constexpr = before_marked + (2 if marked is not None else 0) + (2 if RECALL else 0)
    sums += program * (fields * C)
    tl.store(sums + c, tl.where(c == 0, tl.sum(correct, 0), 0.0), mask=c < C)
    _store_sums(sums + C, nll, c, C, P)
    _store_sums(sums + 2 * C, intersection, c, C, P)
    _store_sums(sums + 3 * C, prediction, c, C, P)
    _store_sums(sums + 4 * C, truth, c, C, P)
    if LOG_PROB:
        _store_sums(sums + 5 * C, log_prob, c, C, P)
    if marked is not None:
        _store_sums(sums + before_marked * C, marked_intersection, c, C, P)
        _store_sums(sums + (before_marked + 1) * C, marked_truth, c, C, P)
    if RECALL:
        _store_sums(sums + (fields - 2) * C, class_correct, c, C, P)
        if weight is None:
            class_count = truth
        _store_sums(sums + (fields - 1) * C, class_count, c, C, P)
    if group is not None:
        group_sums += program * (2 * S * S) + digit[:, None] * S + digit[None, :]
        tl.store(group_sums, group_nll)
        tl.store(group_sums + S * S, group_count)


@triton.jit
def _gradient(
    z, c, target, weight, marked, pixel, inside, image,
    g_nll, g_intersection, g_prediction, g_log_prob, g_truth, g_marked_intersection, g_marked_truth,
    weight_grad, q, r, gamma,
    C: tl.constexpr, IGNORE: tl.constexpr, FOCAL: tl.constexpr, SQUARE: tl.constexpr,
):  # fmt: skip
    """Gradient by the logits of P pixels, (BLOCK_C, P); that by their weights is stored, at each pixel."""
    y, m, _ = _load_labels(target, weight, pixel, inside, C, IGNORE)
    top, below, member = _of_label(z, c, y, C)
    e, total, nll, miss = _softmax(z, top, below, member, c, C, FOCAL)
    p = e * (1 / total)[None, :]
    p_y = _exp(below) / total
    a = tl.zeros_like(m)
    if g_intersection is not None:
        a += p_y * tl.load(g_intersection + image * C + y, mask=y >= 0, other=0.0)
    if g_marked_intersection is not None:
        a += p_y * tl.load(
            g_marked_intersection + image * C + y, mask=_is_marked(marked, pixel, y), other=0.0
        )
    dm = a
    if g_nll is not None:
        slope = tl.zeros_like(m) - 1
        if FOCAL:
            power, miss = _power(miss, gamma)
            slope = -power - gamma * (power / miss) * p_y * nll
            nll *= power
        upstream = tl.load(g_nll + image * C + y, mask=y >= 0, other=0.0)
        a += slope * upstream
        dm += nll * upstream
    a *= m
    common = a
    dz = tl.where(member, a[None, :], 0.0)
    if g_log_prob is not None:
        common += m * tl.sum(r, 0)
        dz += m[None, :] * r[:, None]
    if g_prediction is not None:
        slopes = q[:, None]
        if SQUARE:
            slopes = 2 * slopes * p
        common += m * tl.sum(slopes * p, 0)
        dz += p * (m[None, :] * slopes)
    if weight_grad is not None:
        if g_truth is not None:
            dm += tl.load(g_truth + image * C + y, mask=y >= 0, other=0.0)
        if g_marked_truth is not None:
            dm += tl.load(g_marked_truth + image * C + y, mask=_is_marked(marked, pixel, y), other=0.0)
        if g_prediction is not None:
            dm += tl.sum(q[:, None] * (p * p if SQUARE else p), 0)
        if g_log_prob is not None:
            log_p = z - top[None, :] - tl.log(total)[None, :]
            dm += tl.sum(tl.where(c[:, None] < C, r[:, None] * log_p, 0.0), 0)
        tl.store(weight_grad + pixel, tl.where(y >= 0, dm, 0.0), mask=inside)
    # 0 times what is not finite is not 0
    return tl.where((c[:, None] < C) & (y >= 0)[None, :], dz - p * common[None, :], 0.0)


@triton.jit
def _of_classes(g, image, c, C: tl.constexpr):
    """Upstream gradients of an image's classes, zeros where there are none."""
    values = tl.zeros_like(c).to(tl.float32)
    if g is not None:
        values = tl.load(g + image * C + c, mask=c < C, other=0.0)
    return values


@triton.jit(do_not_specialize=SIZES)
def _backward_kernel(
    logits, target, bias, weight, marked,
    g_nll, g_intersection, g_prediction, g_log_prob, g_truth, g_marked_intersection, g_marked_truth,
    weight_grad, grad, grad_stride_image, grad_stride_class, grad_stride_row, grad_stride_column,
    stride_image, stride_class, stride_row, stride_column, h, w, height, width,
    row_scale, row_inverse, column_scale, column_inverse, gamma, bands, bands_each, cells_each,
    C: tl.constexpr, IGNORE: tl.constexpr, FOCAL: tl.constexpr, SQUARE: tl.constexpr, RESIZE: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(2).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    known = c[:, None] < C
    logits += image * stride_image
    grad += image * grad_stride_image + c.to(tl.int64)[:, None] * grad_stride_class
    first = tl.program_id(1) * bands_each
    last = tl.minimum(first + bands_each, bands)
    if RESIZE:
        first_cell = tl.program_id(0) * cells_each
        last_cell = tl.minimum(first_cell + cells_each, w)
        # a margin for rounding; what it adds weighs 0
        left = _first_pixel(first_cell - 1, column_inverse, width, -0.0625, ALIGN)
        right = _first_pixel(first_cell + cells_each, column_inverse, width, 0.0625, ALIGN)
        tile = left
        while tile < tl.maximum(right, left + 1):  # cells without a pixel have a gradient of 0
            column = tile + tl.arange(0, P)
            inside = column < right
            x = _coordinate(column, column_scale, w - 1, ALIGN)
            from_above = tl.zeros((BLOCK_C, P), tl.float32)
            band = tl.maximum(first - 1, 0)
            row = _first_row(band, bands, row_inverse, height, ALIGN)
            source = logits + band.to(tl.int64) * stride_row
            at_row = grad + band.to(tl.int64) * grad_stride_row
            pixel = (image * height + row) * width + column
            while band < last:
                stop = _first_row(band + 1, bands, row_inverse, height, ALIGN)
                under = source + tl.where((band < h - 1) & (h != height), stride_row, 0)
                # read again, for registers to hold other numbers in between
                upper = _resize_row(
                    source, bias, c, column, w, width, column_scale, band, stride_class, stride_column, C,
                    ALIGN)  # fmt: skip
                lower = _resize_row(
                    under, bias, c, column, w, width, column_scale, band, stride_class, stride_column, C,
                    ALIGN)  # fmt: skip
                change = tl.where(h == height, 0.0, lower - upper)
                q = _of_classes(g_prediction, image, c, C)
                r = _of_classes(g_log_prob, image, c, C)
                total = from_above
                from_above = tl.zeros((BLOCK_C, P), tl.float32)
                while row < stop:
                    row_part = _row_part(row, band, row_scale, h, ALIGN)
                    dz = _gradient(
                        lower - (1 - row_part) * change, c, target, weight, marked, pixel, inside, image,
                        g_nll, g_intersection, g_prediction, g_log_prob, g_truth, g_marked_intersection,
                        g_marked_truth, weight_grad, q, r, gamma, C, IGNORE, FOCAL, SQUARE,
                    )  # fmt: skip
                    total = tl.where(known, total + (1 - row_part) * dz, 0.0)
                    from_above = tl.where(known, from_above + row_part * dz, 0.0)
                    row += 1
                    pixel += width
                start = tl.where(band < first, last_cell, first_cell)
                large = _large_part(total)
                while start < last_cell:
                    n = start + tl.arange(0, 16)
                    hat = tl.maximum(0.0, 1 - tl.abs(x[None, :] - n[:, None]))  # (16, P)
                    large_hat = _large_part(hat)
                    value = tl.dot(hat - large_hat, tl.trans(large), input_precision='tf32')
                    value = tl.dot(large_hat, tl.trans(large), value, input_precision='tf32')
                    value = tl.dot(large_hat, tl.trans(total - large), value, input_precision='tf32')
                    value = tl.trans(value)
                    at = at_row + n.to(tl.int64)[None, :] * grad_stride_column
                    before = (n < tl.where(tile > left, last_cell, 0))[None, :]
                    value += tl.load(at, mask=known & before, other=0.0)
                    tl.store(at, value, mask=known & (n < last_cell)[None, :])
                    start += 16
                band += 1
                source += stride_row
                at_row += grad_stride_row
            tl.debug_barrier()
            tile += P
    else:
        column = tl.program_id(0) * P + tl.arange(0, P)
        inside = column < width
        grad += column.to(tl.int64)[None, :] * grad_stride_column
        logits += column.to(tl.int64) * stride_column
        q = _of_classes(g_prediction, image, c, C)
        r = _of_classes(g_log_prob, image, c, C)
        row = first
        while row < last:
            source = logits + row.to(tl.int64) * stride_row
            z = _load_row(source, bias, c, inside, stride_class, C)
            pixel = (image * height + row) * width + column
            dz = _gradient(
                z, c, target, weight, marked, pixel, inside, image,
                g_nll, g_intersection, g_prediction, g_log_prob, g_truth,
                g_marked_intersection, g_marked_truth, weight_grad, q, r, gamma, C, IGNORE, FOCAL, SQUARE,
            )  # fmt: skip
            at = tl.max_contiguous(grad + row.to(tl.int64) * grad_stride_row, [1, 2])
            tl.store(at, dz, mask=known & inside[None, :])
            row += 1


# TRITON_INTERPRET=1 makes them Python functions, for any device
INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)


def _axis(small: int, large: int, align_corners: bool) -> tuple[float, float]:
    """Cells per label row or column, and the reverse."""
    if not align_corners:
        return small / large, large / small
    steps = max(large - 1, 1)
    return (small - 1) / steps, steps / (small - 1) if small > 1 else large


@lru_cache(maxsize=64)  # working it out takes longer than some launches
class _Launch:
    """Blocks and grids for the sizes of a call, and the arguments that both kernels take."""

    def __init__(
        self, multiprocessors: int, shape: torch.Size, strides: tuple[int, ...], label: torch.Size,
        ignore_index: int, gamma: float, square: bool, align_corners: bool,
    ) -> None:  # fmt: skip
        (batch, classes, h, w), (height, width) = shape, label[1:]
        self.resize = (h, w) != (height, width)
        row_scale, row_inverse = _axis(h, height, align_corners)
        column_scale, self.column_inverse = _axis(w, width, align_corners)
        # a warp takes 20 classes of 32 pixels; what is left of at least four warps takes more pixels
        class_warps = triton.next_power_of_2(triton.cdiv(classes, 20))
        warps = max(4, class_warps)
        self.pixels = 32 * warps // class_warps
        self.registers = 168 if warps == 4 else None  # of forward: three programs fit a multiprocessor
        chunks = triton.cdiv(width, self.pixels)
        bands = h if self.resize else height
        self.images = batch
        self.places = 4 * multiprocessors / warps / batch  # for programs of an image
        self.forward = self._spread(FORWARD, chunks, bands)
        stride_image, stride_class, stride_row, stride_column = strides
        self.arguments = dict(
            stride_image=stride_image, stride_class=stride_class,
            stride_row=stride_row, stride_column=stride_column,
            h=h, w=w, height=height, width=width,
            row_scale=row_scale, row_inverse=row_inverse, column_scale=column_scale,
            gamma=float(gamma), bands=bands,
            C=classes, IGNORE=ignore_index, FOCAL=gamma > 0, SQUARE=square,
            RESIZE=self.resize, ALIGN=align_corners,
            BLOCK_C=max(16, triton.next_power_of_2(classes)), P=self.pixels, num_warps=warps, num_stages=1,
        )  # fmt: skip
        if self.resize:
            # pixels under two programs' hats are walked by both, so each takes some cells and rows
            self.tiles = math.ceil(8 * self.column_inverse / self.pixels)
            self.cells = max(1, int((self.tiles * self.pixels - 2 * align_corners) / self.column_inverse) - 1)
            self.backward = self._spread_gather(triton.cdiv(w, self.cells), h)
        else:
            self.tiles = self.cells = 1
            self.backward = self._spread(BACKWARD, chunks, height)

    def _spread(self, each: int, chunks: int, bands: int) -> tuple[tuple[int, int, int], int]:
        """Programs by columns, rows and images, and the bands of one."""
        bands_each = triton.cdiv(bands, max(1, int(each * self.places / chunks)))
        return (chunks, triton.cdiv(bands, bands_each), self.images), bands_each

    def _spread_gather(self, chunks: int, bands: int) -> tuple[tuple[int, int, int], int]:
        """The same where each program walks the band before its own too: the soonest end of the last one."""

        def end(bands_each: int) -> float:
            at_once = max(1, int(HELD * self.places * self.images))
            return (bands_each + 1) * -(-chunks * -(-bands // bands_each) * self.images // at_once)

        bands_each = min(range(min(2, bands), bands + 1), key=end)
        return (chunks, triton.cdiv(bands, bands_each), self.images), bands_each


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 64


class _SoftStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, pixel_weight, o):
        marked = None if o.marked is None else o.marked.view(torch.uint8)
        target, bias, weight, group, marked = (
            None if t is None else t.contiguous()
            for t in (target, o.logit_bias, pixel_weight, o.group, marked)
        )
        launch = _Launch(
            _multiprocessors(logits.device), logits.shape, logits.stride(), target.shape, o.ignore_index,
            o.focal_gamma, o.square_prediction, o.align_corners,
        )  # fmt: skip
        batch, classes = logits.shape[:2]
        grid, bands_each = launch.forward
        programs = grid[0] * grid[1]
        fields = 5 + o.with_log_prob + 2 * (marked is not None) + 2 * o.with_recall
        sums = logits.new_empty(batch, programs, fields, classes, dtype=torch.float32)
        # a product takes 16 rows and columns at least
        digits = max(16, triton.next_power_of_2(math.ceil(math.sqrt(o.num_groups))))
        group_sums = None if group is None else sums.new_empty(batch * programs, 2, digits * digits)
        intact = torch.ones((), dtype=torch.int32, device=logits.device)
        with torch.cuda.device_of(logits):
            _forward_kernel[grid](
                logits, target, bias, weight, group, marked, sums, group_sums, intact,
                bands_each=bands_each, num_groups=o.num_groups, LOG_PROB=o.with_log_prob,
                RECALL=o.with_recall, S=digits, **launch.arguments, maxnreg=launch.registers,
            )  # fmt: skip
        torch._assert_async(
            intact, f'target or group holds values beyond {classes} classes or {o.num_groups} groups'
        )
        totals = sums.sum(1, dtype=torch.float64)  # (B, fields, C)
        correct = totals[:, 0, 0].long()
        class_correct, class_count = totals[:, -2:].long().unbind(1) if o.with_recall else (None, None)
        _, nll, intersection, prediction, truth, *more = totals.float().unbind(1)
        log_prob = more.pop(0) if o.with_log_prob else None
        marked_intersection, marked_truth = (None, None) if marked is None else more[:2]
        group_nll = group_count = None
        if group_sums is not None:
            group_nll, group_count = group_sums.sum(0, dtype=torch.float64)[:, : o.num_groups]
            group_nll, group_count = group_nll.float(), group_count.long()
        ctx.save_for_backward(logits, target, bias, weight, marked)
        ctx.launch = launch
        ctx.set_materialize_grads(False)
        fixed = (correct, group_nll, group_count, class_correct, class_count)
        if not ctx.needs_input_grad[2]:
            fixed = (truth, marked_truth, *fixed)
        ctx.mark_non_differentiable(*(t for t in fixed if t is not None))
        sums = (nll, intersection, prediction, truth, correct, log_prob)
        return *sums, marked_intersection, marked_truth, *fixed[-4:]

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, g_nll, g_intersection, g_prediction, g_truth, _correct, g_log_prob, *more):
        logits, target, bias, weight, marked = saved
        launch, weight_grad = ctx.launch, None
        if ctx.needs_input_grad[2]:
            weight_grad = logits.new_empty(target.shape, dtype=torch.float32)
        upstream = (g_nll, g_intersection, g_prediction, g_log_prob, g_truth, *more[:2])
        upstream = (None if g is None else g.contiguous() for g in upstream)
        grid, bands_each = launch.backward
        # a program's tiles are added up in it
        grad = torch.empty_like(logits, dtype=torch.float32 if launch.tiles > 1 else None)
        with torch.cuda.device_of(logits):
            _backward_kernel[grid](
                logits, target, bias, weight, marked, *upstream, weight_grad, grad, *grad.stride(),
                column_inverse=launch.column_inverse, bands_each=bands_each, cells_each=launch.cells,
                **launch.arguments,
            )  # fmt: skip
        weight_grad = None if weight_grad is None else weight_grad.to(weight.dtype)
        return grad.to(logits.dtype), None, weight_grad, None
