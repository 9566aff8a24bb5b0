"""Losses as arithmetic on the sums of :class:`~mmseg_imbalance.ops.SoftStats`; autograd does the rest.

Every loss is a sum over classes: what ``..._parts`` return, (C,), adds up to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmseg_imbalance.ops import SoftStats


def cross_entropy(
    stats: SoftStats,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    divide_by: str = 'weights',
) -> Tensor:
    """Weighted mean of the negative log-likelihood: sum_c w_c nll_c / sum_c w_c truth_c over the batch.

    Equals ``F.cross_entropy(weight=, ignore_index=, label_smoothing=)``, focal if ``stats`` is.

    Args:
        stats: with ``log_prob`` where ``label_smoothing`` > 0.
        class_weight: (C,), >= 0; None: all 1.
        label_smoothing: in [0, 1), the share of the label spread evenly over all classes.
        divide_by: 'weights', or 'pixels': sum_c w_c nll_c / sum_c truth_c, linear in the weights.

    Returns:
        Scalar; 0 where no pixel has any weight.
    """
    return cross_entropy_parts(stats, class_weight, label_smoothing, divide_by).sum()


def cross_entropy_parts(
    stats: SoftStats,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    divide_by: str = 'weights',
) -> Tensor:
    """What each class adds to :func:`cross_entropy`, (C,): w_c nll_c / sum_k w_k truth_k.

    The even part of label smoothing adds to the class whose probability it asks for.
    """
    weight = one_each(class_weight, stats.nll)
    total = stats.nll.sum(0)
    if label_smoothing > 0:
        if stats.log_prob is None:
            raise ValueError('label_smoothing needs the field log_prob; call soft_stats with_log_prob=True')
        even = -stats.log_prob.sum(0) / len(weight)
        total = (1 - label_smoothing) * total + label_smoothing * even
    norm = stats.truth.sum() if divide_by == 'pixels' else (weight * stats.truth).sum()
    return weight * total / _above_0(norm)


def tversky(stats: SoftStats, alpha: float, beta: float, smooth: float = 1.0) -> Tensor:
    """Tversky index (I + s) / (I + alpha (P - I) + beta (T - I) + s) of each image and class.

    I, P, T are intersection, prediction and truth; alpha weighs false positives, beta false negatives.

    Returns:
        (B, C), in [0, 1]; 1 where a class of no area meets smooth = 0.

    Source: Salehi et al. 2017, https://arxiv.org/abs/1706.05721, equation 4; the smoothing is ours.
    """
    _, area = _tversky_areas(stats, alpha, beta, smooth)
    return torch.where(area > 0, (stats.intersection + smooth) / area.where(area > 0, 1), 1)


def tversky_error(stats: SoftStats, alpha: float, beta: float, smooth: float = 1.0) -> Tensor:
    """1 - :func:`tversky` without its rounding: (alpha (P - I) + beta (T - I)) / (I + ... + s), (B, C)."""
    wrong, area = _tversky_areas(stats, alpha, beta, smooth)
    return wrong / _above_0(area)


def _tversky_areas(stats: SoftStats, alpha: float, beta: float, smooth: float) -> tuple[Tensor, Tensor]:
    i, p, t = stats.intersection, stats.prediction, stats.truth
    wrong = alpha * (p - i) + beta * (t - i)
    return wrong, i + wrong + smooth


def dice(stats: SoftStats, smooth: float = 1.0) -> Tensor:
    """Dice coefficient (2 I + s) / (P + T + s) of each image and class, (B, C): Tversky with 1/2, 1/2.

    Source: Milletari et al. 2016, https://arxiv.org/abs/1606.04797, section 3; there P is squared.
    """
    return tversky(stats, 0.5, 0.5, smooth / 2)


def jaccard(stats: SoftStats, smooth: float = 1.0) -> Tensor:
    """Jaccard index (I + s) / (P + T - I + s) of each image and class, (B, C): Tversky with 1, 1."""
    return tversky(stats, 1.0, 1.0, smooth)


def generalized_dice(
    stats: SoftStats,
    class_weight: Tensor | None = None,
    smooth: float = 1.0,
    absent_classes: str = 'include',
) -> Tensor:
    """Generalized Dice (2 sum_c w_c I_c + s) / (sum_c w_c (P_c + T_c) + s) of each image: a ratio of sums.

    The weights are scaled so that sum_c w_c T_c = sum_c T_c: the smoothing stays in pixels.

    Args:
        class_weight: w, (C,), >= 0; None: 1 / T_c^2 of the image, and for classes without a true pixel the
            largest of these.
        absent_classes: 'include', or 'ignore' to leave classes without a true pixel out of both sums.

    Returns:
        (B,), in [0, 1]; 1 where classes of no area meet smooth = 0.

    Source: Sudre et al. 2017, https://arxiv.org/abs/1707.03237, section 2.1; scale and smoothing are ours.
    """
    return 1 - _generalized_dice_errors(stats, class_weight, smooth, absent_classes).sum(1)


def generalized_dice_parts(
    stats: SoftStats,
    class_weight: Tensor | None = None,
    smooth: float = 1.0,
    absent_classes: str = 'include',
    *,
    gamma: float = 1.0,
) -> Tensor:
    """What each class adds to the mean over images of (1 - :func:`generalized_dice`)^gamma, (C,).

    Of 1 - index = sum_c w_c (P_c + T_c - 2 I_c) / (sum_k w_k (P_k + T_k) + s), the power is shared out in
    the proportion of these terms. gamma > 0.
    """
    errors = _generalized_dice_errors(stats, class_weight, smooth, absent_classes)
    if gamma != 1:
        loss = errors.sum(1, keepdim=True)
        share = (errors / _above_0(loss)).detach()
        errors = _power(loss, gamma) * share
    return errors.mean(0)


def _generalized_dice_errors(
    stats: SoftStats, class_weight: Tensor | None, smooth: float, absent_classes: str
) -> Tensor:
    """w_c (P_c + T_c - 2 I_c) / (sum_k w_k (P_k + T_k) + s) of each image and class, (B, C)."""
    i, p, t = stats.intersection, stats.prediction, stats.truth
    present = t > 0
    if class_weight is None:
        weight = torch.where(present, t, torch.inf).pow(-2)  # 0 where absent
        weight = torch.where(present, weight, weight.amax(1, keepdim=True))
    else:
        weight = one_each(class_weight, t).expand_as(t)
    if absent_classes == 'ignore':
        weight = weight * present
    area = (weight * t).sum(1, keepdim=True)
    weight = weight * (t.sum(1, keepdim=True) / _above_0(area))
    areas = p + t
    union = (weight * areas).sum(1, keepdim=True) + smooth
    return weight * (areas - 2 * i) / _above_0(union)


def marked_recall_parts(stats: SoftStats, class_weight: Tensor | None = None, smooth: float = 1.0) -> Tensor:
    """What each class adds to the part of the marked pixels that is missed, (C,).

    Of the mean over images of sum_c w_c (1 - (I_c + s) / (T_c + s)) / sum_c w_c, with the intersection I and
    the truth T of the marked pixels alone, over the classes with a marked pixel.

    Raises:
        ValueError: ``stats`` has no sums of marked pixels.
    """
    hit, truth = stats.marked_intersection, stats.marked_truth
    if hit is None or truth is None:
        raise ValueError('the sums of marked pixels are missing; call soft_stats with marked=')
    area = truth + smooth
    error = (truth - hit) / _above_0(area)
    return region_parts(error, truth, class_weight, absent_classes='ignore')


def region_loss(
    index: Tensor,
    truth: Tensor,
    class_weight: Tensor | None = None,
    *,
    gamma: float = 1.0,
    absent_classes: str = 'include',
) -> Tensor:
    """Mean over images of sum_c w_c (1 - index_c)^gamma / sum_c w_c.

    Args:
        index: (B, C) overlap of each image and class, in [0, 1]; of one image for sums of a batch.
        truth: (B, C) true pixels.
        class_weight: (C,), >= 0; None: all 1.
        gamma: > 0, applied to each class before the mean (Abraham & Khan 2018,
            https://arxiv.org/abs/1810.07842, equation 4, with gamma for 1 / gamma). Below 1, the power is a
            straight line where 1 - index is near rounding, so that its slope is finite.
        absent_classes: 'include', or 'ignore' to leave classes without a true pixel out of the mean.

    Returns:
        Scalar; an image in which no class has any weight counts as 0.
    """
    return region_parts(1 - index, truth, class_weight, gamma=gamma, absent_classes=absent_classes).sum()


def region_parts(
    error: Tensor,
    truth: Tensor,
    class_weight: Tensor | None = None,
    *,
    gamma: float = 1.0,
    absent_classes: str = 'include',
) -> Tensor:
    """What each class adds to :func:`region_loss`, (C,), from (B, C) errors, which are 1 - index."""
    loss = error if gamma == 1 else _power(error, gamma)
    weight = one_each(class_weight, loss)
    if absent_classes == 'ignore':
        weight = weight * (truth > 0)
        return (loss * (weight / _above_0(weight.sum(1, keepdim=True)))).mean(0)
    return loss.mean(0) * (weight / _above_0(weight.sum()))


def _power(error: Tensor, gamma: float) -> Tensor:
    """error^gamma; for gamma < 1 a straight line near 0, where the power would be infinitely steep.

    Rounding alone makes an error of eps or so, of which a small power is large: eps^0.1 = 0.2.
    """
    error = error.clamp_min(0)
    if gamma >= 1:
        return error**gamma
    end = 32 * torch.finfo(error.dtype).eps  # of the line
    return torch.where(error > end, error.clamp_min(end) ** gamma, error * end ** (gamma - 1))


def _above_0(divisor: Tensor) -> Tensor:
    """Sums >= 0 with infinity in place of 0: where there is nothing to divide by, the share is 0."""
    return divisor.where(divisor > 0, torch.inf)


def one_each(class_weight: Tensor | None, sums: Tensor) -> Tensor:
    """Class weights as (C,) numbers of the type and device of sums (B, C); None: all 1.

    Raises:
        ValueError: not one number for each class; a single one would be spread over all of them.
    """
    if class_weight is None:
        return torch.ones_like(sums[0])
    if class_weight.shape != sums.shape[1:]:
        raise ValueError(
            f'class_weight must be of shape ({sums.shape[1]},), one number per class, got '
            f'{tuple(class_weight.shape)}'
        )
    return class_weight.to(sums)
