"""What a loss is made of: terms, each a formula on the sums of :class:`~mmseg_imbalance.ops.SoftStats`.

A term is a small frozen object with two methods:

- ``needs()``: the options of :func:`~mmseg_imbalance.ops.soft_stats` that it relies on;
- ``parts(stats, class_weight)``: what each class adds to it, (C,), which sums to the value of the term.

A term never sees a pixel. A formula that cannot be written on the sums needs a new field of ``SoftStats``, in
every backend, with an oracle. A term knows no weights of its own: the loss hands it the class weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from mmseg_imbalance import functional
from mmseg_imbalance.ops import SoftStats
from mmseg_imbalance.options import check_at_least_0, check_choice

INDICES = ('dice', 'jaccard', 'tversky', 'generalized_dice')


class Term(Protocol):
    """What a loss calls. Any object with these two methods is a term."""

    def needs(self) -> dict[str, Any]:
        """Options of :func:`~mmseg_imbalance.ops.soft_stats`; two terms of a loss must not disagree."""

    def parts(self, stats: SoftStats, class_weight: Tensor | None) -> Tensor:
        """What each class adds, (C,), from the sums (B, C) of a batch and the (C,) weights, None for 1."""


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy, or focal loss: sum_c w_c nll_c / sum_c w_c truth_c.

    Args:
        focal_gamma: >= 0; above 0 each pixel counts (1 - p_y)^focal_gamma times (Lin et al. 2017,
            https://arxiv.org/abs/1708.02002, equation 5).
        label_smoothing: in [0, 1), as in ``F.cross_entropy``.
        divide_by: 'weights', as PyTorch does: a mean in which a pixel counts by its class's weight. 'pixels':
            sum_c w_c nll_c / sum_c truth_c, the weights scaled to sum_c f_c w_c = 1, f_c the share of the
            class in the training pixels. Batches of as many valid pixels then add up: four batches of 1 have
            the mean gradient of one batch of 4.

    Raises:
        ValueError: an argument out of its range.
    """

    OPTIONS: ClassVar = dict(  # see take
        focal_gamma='focal_gamma', label_smoothing='label_smoothing', divide_by='divide_by'
    )

    focal_gamma: float = 0.0
    label_smoothing: float = 0.0
    divide_by: str = 'weights'

    def __post_init__(self) -> None:
        check_at_least_0(focal_gamma=self.focal_gamma)
        check_at_least_0(label_smoothing=self.label_smoothing)
        if not self.label_smoothing < 1:
            raise ValueError(f'label_smoothing must lie in [0, 1), got {self.label_smoothing}')
        check_choice('divide_by', self.divide_by, ('weights', 'pixels'))

    def needs(self) -> dict[str, Any]:
        smooths = dict(with_log_prob=True) if self.label_smoothing > 0 else {}
        return dict(focal_gamma=self.focal_gamma, **smooths)

    def parts(self, stats: SoftStats, class_weight: Tensor | None) -> Tensor:
        return functional.cross_entropy_parts(stats, class_weight, self.label_smoothing, self.divide_by)


@dataclass(frozen=True)
class Overlap:
    """An overlap loss: sum_c w_c (1 - index_c)^gamma / sum_c w_c, the index one of four.

    Args:
        index: 'dice', 'jaccard', 'tversky' or 'generalized_dice', see :mod:`mmseg_imbalance.functional`.
        alpha: >= 0, weighs false positives; of 'tversky' only; None: 0.3.
        beta: >= 0, weighs false negatives (missed pixels); of 'tversky' only; None: 0.7.
        gamma: > 0, on each class before the mean; other than 1 it is a focal overlap loss. Below 1 it raises
            what well-segmented classes count, above 1 what badly segmented ones do. Errors near rounding,
            below 4e-6 in single precision, count in proportion, so that a perfect prediction costs 0.
        smooth: >= 0, in pixels.
        square_denominator: the predicted area sums p^2, as in V-Net; not for 'tversky'.
        reduction: 'image' (loss of each image, then the mean) or 'batch' (sums over the batch first).
        absent_classes: 'include', or 'ignore' to leave classes without a true pixel out of the mean.
        sync: with 'batch', the sums are those of all ranks. The loss adds them up before it calls any term.

    Raises:
        ValueError: an argument out of its range, or of another index.
    """

    OPTIONS: ClassVar = dict(
        alpha='alpha',
        beta='beta',
        gamma='gamma',
        smooth='smooth',
        square_denominator='square_denominator',
        region_reduction='reduction',
        absent_classes='absent_classes',
        sync_region='sync',
    )

    index: str = 'dice'
    alpha: float | None = None
    beta: float | None = None
    gamma: float = 1.0
    smooth: float = 1.0
    square_denominator: bool = False
    reduction: str = 'image'
    absent_classes: str = 'include'
    sync: bool = False

    def __post_init__(self) -> None:
        check_choice('region', self.index, INDICES)
        tversky = self.index == 'tversky'
        if (self.alpha, self.beta) != (None, None) and not tversky:
            raise ValueError(
                f"alpha={self.alpha} and beta={self.beta} are of region='tversky', got {self.index!r}"
            )
        if tversky:
            object.__setattr__(self, 'alpha', 0.3 if self.alpha is None else self.alpha)
            object.__setattr__(self, 'beta', 0.7 if self.beta is None else self.beta)
            check_at_least_0(alpha=self.alpha, beta=self.beta)
            if self.alpha == self.beta == 0:
                raise ValueError('alpha and beta must not both be 0: the index would be 1 for any prediction')
        check_at_least_0(smooth=self.smooth)
        if not (isinstance(self.gamma, int | float) and 0 < self.gamma < math.inf):
            raise ValueError(f'gamma must be a finite number above 0, got {self.gamma!r}')
        check_choice('region_reduction', self.reduction, ('image', 'batch'))
        check_choice('absent_classes', self.absent_classes, ('include', 'ignore'))
        if self.square_denominator and tversky:
            raise ValueError(
                'square_denominator=True is for dice, jaccard and generalized_dice: a Tversky index of '
                'squared predictions can leave [0, 1]'
            )
        if self.sync and self.reduction != 'batch':
            raise ValueError(
                "sync_region=True sums over the batches of all ranks, so it needs region_reduction='batch', "
                f'got {self.reduction!r}'
            )

    def needs(self) -> dict[str, Any]:
        return dict(square_prediction=self.square_denominator)

    def as_tversky(self) -> tuple[float, float, float]:
        """alpha, beta and smoothing of the Tversky index that it is, unless it is the generalized Dice."""
        if self.index == 'tversky':
            return self.alpha or 0.0, self.beta or 0.0, self.smooth
        return (1.0, 1.0, self.smooth) if self.index == 'jaccard' else (0.5, 0.5, self.smooth / 2)

    def parts(self, stats: SoftStats, class_weight: Tensor | None) -> Tensor:
        if self.reduction == 'batch':
            stats = stats.sum_images()
        options: dict[str, Any] = dict(gamma=self.gamma, absent_classes=self.absent_classes)
        if self.index == 'generalized_dice':
            return functional.generalized_dice_parts(stats, class_weight, self.smooth, **options)
        error = functional.tversky_error(stats, *self.as_tversky())
        return functional.region_parts(error, stats.truth, class_weight, **options)


@dataclass(frozen=True)
class SkeletonRecall:
    """A term: sum_c w_c (1 - (I_c + s) / (T_c + s)) / sum_c w_c, I and T those of the marked pixels alone.

    The sums are over the classes with a marked pixel; the loss is handed the marks, see
    :class:`~mmseg_imbalance.skeleton.SkeletonRecallLoss`.

    Args:
        smooth: s >= 0, in pixels.
        reduction: 'image' (loss of each image, then the mean) or 'batch' (sums over the batch first).
        sync: with 'batch', the sums are those of all ranks. The loss adds them up before it calls any term.

    Raises:
        ValueError: an argument out of its range; in use, sums without those of marked pixels.
    """

    OPTIONS: ClassVar = dict(smooth='smooth', region_reduction='reduction', sync_region='sync')
    needs_marked: ClassVar = True

    smooth: float = 1.0
    reduction: str = 'image'
    sync: bool = False

    def __post_init__(self) -> None:
        check_at_least_0(smooth=self.smooth)
        check_choice('region_reduction', self.reduction, ('image', 'batch'))
        if self.sync and self.reduction != 'batch':
            raise ValueError(
                "sync_region=True sums over the batches of all ranks, so it needs region_reduction='batch', "
                f'got {self.reduction!r}'
            )

    def needs(self) -> dict[str, Any]:
        return {}

    def parts(self, stats: SoftStats, class_weight: Tensor | None) -> Tensor:
        if self.reduction == 'batch':
            stats = stats.sum_images()
        return functional.marked_recall_parts(stats, class_weight, self.smooth)


def pass_options(terms: Mapping[str, Term]) -> dict[str, Any]:
    """The options of ``soft_stats`` that the terms of one loss rely on.

    Raises:
        ValueError: two terms need different values of an option.
    """
    options: dict[str, Any] = {}
    for name, term in terms.items():
        for option, value in term.needs().items():
            if options.setdefault(option, value) != value:
                raise ValueError(
                    f'the terms {list(terms)} share one pass, but {name!r} needs {option}={value!r} and '
                    f'another {option}={options[option]!r}; make two losses of them'
                )
    return options
