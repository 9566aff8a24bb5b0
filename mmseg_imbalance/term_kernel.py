"""Cross-entropy and an overlap as one small CUDA kernel, with their gradients by the sums.

On a few hundred numbers an operation of torch takes as long as its launch, and the formulas take some 45 of
them: on an H100 more time than both passes over the pixels. The kernel computes what ``cross_entropy_parts``
and, of ``tversky_error``, ``region_parts`` do in :mod:`mmseg_imbalance.functional`. Terms and options that it
does not know are left to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmseg_imbalance.ops import SoftStats
from mmseg_imbalance.terms import CrossEntropy, Overlap, Term


class Formula(NamedTuple):
    """factor ce + factor overlap, or one of them alone."""

    names: tuple[str | None, str | None]  # of the two terms in the loss; None: it has none
    options: dict[str, Any]  # of the kernel


def formula_of(terms: Mapping[str, Term], factors: Mapping[str, float]) -> Formula | None:
    """The formula of a loss, or None where the kernel does not know one of its terms."""
    ce = overlap = None
    options: dict[str, Any] = dict(
        ce_factor=0.0, BY_PIXELS=False, overlap_factor=0.0, alpha=0.0, beta=0.0, smooth=0.0, BATCH=False,
        PRESENT=False,
    )  # fmt: skip
    for name, term in terms.items():
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
            of_image = tl.where(t > 0, w, 0.0) if PRESENT else w
            share = _share(of_image, tl.sum(of_image, 0))
            overlap += share * error  # with BATCH the same for each image
            pull = overlap_factor * share if BATCH else overlap_factor * share / images
            by_intersection = _share(pull * (-alpha - beta - error * (1 - alpha - beta)), area)
            by_prediction = _share(pull * alpha * (1 - error), area)
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
        ctx.slopes = nll.new_empty(3, images, classes)
        ctx.ce, ctx.overlap = (name is not None for name in formula.names)
        sums = [x if x.stride(1) == 1 else x.contiguous() for x in (nll, intersection, prediction, truth)]
        with torch.cuda.device_of(nll):
            _terms_kernel[(1,)](
                *sums, ce_weight, overlap_weight, value, details, ctx.slopes, *(x.stride(0) for x in sums),
                images=images, C=classes, CE=ctx.ce, OVERLAP=ctx.overlap,
                BLOCK=max(16, triton.next_power_of_2(classes)), num_warps=1, **formula.options,
            )  # fmt: skip
        ctx.mark_non_differentiable(details)
        ctx.set_materialize_grads(False)
        return value, details

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        nll, intersection, prediction = (upstream * ctx.slopes).unbind()
        if not ctx.ce:
            nll = None
        if not ctx.overlap:
            intersection = prediction = None
        return nll, intersection, prediction, None, None, None, None
