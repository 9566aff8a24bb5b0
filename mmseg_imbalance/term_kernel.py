"""Cross-entropy and an overlap loss as one small CUDA kernel, with their gradients with respect to the sums.

On a few hundred numbers an operation of torch takes as long as its launch, and these formulas take some 50 of
them: on an H100 more time than both passes over the pixels. The kernel gives the values of
``cross_entropy_parts`` and of ``region_parts(tversky_error(...))`` in :mod:`mmseg_imbalance.functional`.
Losses with other terms or options use those functions.

With I, P and T the intersection, prediction and truth of an image and class:

    error      = (alpha (P - I) + beta (T - I)) / A,    A = I + alpha (P - I) + beta (T - I) + smooth
    d error/dI = (-alpha - beta - error (1 - alpha - beta)) / A
    d error/dP = alpha (1 - error) / A
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmseg_imbalance.functional import one_each
from mmseg_imbalance.ops import SoftStats
from mmseg_imbalance.ops.contract import once_differentiable
from mmseg_imbalance.terms import CrossEntropy, Overlap, Term


class Formula(NamedTuple):
    """Of a loss, which is ce_factor cross-entropy + overlap_factor overlap, or one of the two."""

    names: tuple[str | None, str | None]  # of the two terms; None: the loss has none of this kind
    options: dict[str, Any]  # numbers and choices, as the kernel takes them


def formula_of(terms: Mapping[str, Term], factors: Mapping[str, float]) -> Formula | None:
    """The formula of a loss, or None where the kernel does not know one of its terms."""
    ce = overlap = None
    options: dict[str, Any] = dict(
        ce_factor=0.0, BY_PIXELS=False, overlap_factor=0.0, alpha=0.0, beta=0.0, smooth=0.0, BATCH=False,
        PRESENT=False,
    )  # fmt: skip
    for name, term in terms.items():
        if not isinstance(factors[name], Real):  # a tensor, which may want a gradient
            return None
        if type(term) is CrossEntropy and ce is None and term.label_smoothing == 0:
            ce = name
            options |= dict(ce_factor=float(factors[name]), BY_PIXELS=term.divide_by == 'pixels')
        elif (
            type(term) is Overlap and overlap is None and term.gamma == 1 and term.index != 'generalized_dice'
        ):
            overlap = name
            options |= zip(('alpha', 'beta', 'smooth'), map(float, term.as_tversky()), strict=True)
            options |= dict(
                overlap_factor=float(factors[name]),
                BATCH=term.reduction == 'batch',
                PRESENT=term.absent_classes == 'ignore',
            )
        else:
            return None
    return Formula((ce, overlap), options)


def weighted_sum_of_terms(
    stats: SoftStats, class_weights: Mapping[str, Tensor | None], formula: Formula
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss, a scalar, the value of each term by its name, and the loss's parts of the classes, (C,).

    Only the first has a gradient.

    Args:
        stats: in float32, with a ``truth`` that does not require grad.
        class_weights: (C,) by the name of a term; None: all 1.
    """
    names = formula.names
    weights = [None if name is None else class_weights[name] for name in names]
    weights = [None if w is None else one_each(w, stats.nll).contiguous() for w in weights]
    sums = (stats.nll, stats.intersection, stats.prediction, stats.truth)
    value, details = _Terms.apply(*sums, *weights, formula)
    return value, {name: details[i] for i, name in enumerate(names) if name is not None}, details[2:]


@triton.jit
def _share(part, whole):
    """part / whole, and 0 where there is nothing."""
    return part / tl.where(whole > 0, whole, float('inf'))


@triton.jit
def _weights(weight, c, known):
    w = known.to(tl.float32)
    if weight is not None:
        w = tl.load(weight + c, mask=known, other=0.0)
    return w


@triton.jit(do_not_specialize=['images'])
def _terms_kernel(
    nll, intersection, prediction, truth, ce_weight, overlap_weight, value, details, slopes,
    nll_stride, intersection_stride, prediction_stride, truth_stride, images,
    ce_factor, overlap_factor, alpha, beta, smooth,
    C: tl.constexpr, CE: tl.constexpr, OVERLAP: tl.constexpr, BY_PIXELS: tl.constexpr, BATCH: tl.constexpr,
    PRESENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss; details: both terms, then the loss's parts of the classes; slopes: (3, images, C).

    These are the gradients by nll, intersection and prediction. Those of an absent term stay as they are.
    """
    c = tl.arange(0, BLOCK)
    known = c < C
    i = tl.zeros((BLOCK,), tl.float32)
    p = tl.zeros((BLOCK,), tl.float32)
    t = tl.zeros((BLOCK,), tl.float32)
    part = tl.zeros((BLOCK,), tl.float32)
    if CE:
        w = _weights(ce_weight, c, known)
        total = tl.zeros((BLOCK,), tl.float32)
        for image in range(images):
            total += tl.load(nll + image * nll_stride + c, mask=known, other=0.0)
            t += tl.load(truth + image * truth_stride + c, mask=known, other=0.0)
        norm = tl.sum(t if BY_PIXELS else w * t, 0)
        ce = _share(w * total, norm)
        tl.store(details, tl.sum(ce, 0))
        part += ce_factor * ce
        for image in range(images):
            tl.store(slopes + image * C + c, _share(ce_factor * w, norm), mask=known)
    if OVERLAP:
        w = _weights(overlap_weight, c, known)
        if BATCH:
            t = tl.zeros((BLOCK,), tl.float32)
            for image in range(images):
                i += tl.load(intersection + image * intersection_stride + c, mask=known, other=0.0)
                p += tl.load(prediction + image * prediction_stride + c, mask=known, other=0.0)
                t += tl.load(truth + image * truth_stride + c, mask=known, other=0.0)
        overlap = tl.zeros((BLOCK,), tl.float32)
        for image in range(images):
            if not BATCH:
                i = tl.load(intersection + image * intersection_stride + c, mask=known, other=0.0)
                p = tl.load(prediction + image * prediction_stride + c, mask=known, other=0.0)
                t = tl.load(truth + image * truth_stride + c, mask=known, other=0.0)
            wrong = alpha * (p - i) + beta * (t - i)
            area = i + wrong + smooth
            error = _share(wrong, area)
            counted = tl.where(t > 0, w, 0.0) if PRESENT else w
            share = _share(counted, tl.sum(counted, 0))  # of each class in the mean
            overlap += share * error  # with BATCH the same again for each image; both are divided below
            scale = overlap_factor * share if BATCH else overlap_factor * share / images
            scale = _share(scale, area)
            by_intersection = tl.where(area > 0, scale * (-alpha - beta - error * (1 - alpha - beta)), 0.0)
            by_prediction = tl.where(area > 0, scale * alpha * (1 - error), 0.0)
            at = slopes + image * C + c
            tl.store(at + images * C, by_intersection, mask=known)
            tl.store(at + 2 * images * C, by_prediction, mask=known)
        overlap /= images
        tl.store(details + 1, tl.sum(overlap, 0))
        part += overlap_factor * overlap
    tl.store(details + 2 + c, part, mask=known)
    tl.store(value, tl.sum(part, 0))


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, nll, intersection, prediction, truth, ce_weight, overlap_weight, formula):
        images, classes = nll.shape
        value, details = nll.new_empty(()), nll.new_empty(2 + classes)
        slopes = nll.new_empty(3, images, classes)
        ctx.ce, ctx.overlap = (name is not None for name in formula.names)
        sums = [x if x.stride(1) == 1 else x.contiguous() for x in (nll, intersection, prediction, truth)]
        with torch.cuda.device_of(nll):
            _terms_kernel[(1,)](
                *sums, ce_weight, overlap_weight, value, details, slopes, *(x.stride(0) for x in sums),
                images=images, C=classes, CE=ctx.ce, OVERLAP=ctx.overlap,
                BLOCK=max(16, triton.next_power_of_2(classes)), num_warps=1, **formula.options,
            )  # fmt: skip
        ctx.save_for_backward(slopes, nll, intersection, prediction)  # whose values backward does not need
        ctx.mark_non_differentiable(details)
        ctx.set_materialize_grads(False)
        return value, details

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, upstream, _):
        if upstream is None:
            return (None,) * 7
        nll, intersection, prediction = (upstream * saved[0]).unbind()
        if not ctx.ce:
            nll = None
        if not ctx.overlap:
            intersection = prediction = None
        return nll, intersection, prediction, None, None, None, None
