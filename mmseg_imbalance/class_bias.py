"""One number for each class, added to the logits of a trained model, so that argmax aims at the mIoU.

The class of the highest probability is the best guess for the pixel accuracy. For the mean IoU it is not: a
pixel of a rare class is worth more, as the union that it is divided by is smaller. How much more depends on
how sure the model is. No labels are needed: the probabilities say what IoU a decision is expected to have.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

SHARPNESS = 4.0  # of the softmax that stands for argmax while the bias is looked for
MINIMUM_PIXELS = 20.0  # expected of a class, else it keeps its logits


class ClassBias(NamedTuple):
    """What :func:`fit_class_bias` found; C numbers each."""

    bias: np.ndarray  # to add to the logits
    pixels: np.ndarray  # expected of the class in the sample
    before: np.ndarray  # expected IoU of argmax, 0 to 1; NaN of a class that is not expected
    after: np.ndarray  # the same with the bias


def expected_iou(probabilities: Tensor, decisions: Tensor) -> Tensor:
    """The IoU that each class is expected to have, (C,), 0 to 1: E[intersection] / E[union].

    Args:
        probabilities: (N, C) of each pixel, what the model believes the truth to be.
        decisions: (N, C) one-hot, or shares that add up to 1.

    The expectation of the ratio is taken as the ratio of the expectations.

    Source: Nowozin, Optimal decisions from probabilistic models: the intersection-over-union case, CVPR 2014.
    """
    intersection = (probabilities * decisions).sum(0)
    union = probabilities.sum(0) + decisions.sum(0) - intersection
    return intersection / union


def fit_class_bias(logits: Tensor) -> ClassBias:
    """The bias b that maximises the expected mIoU of argmax_c(z_c + b_c) under p = softmax(z).

    The best decision for a metric that is a function of the confusion matrix weighs the probabilities
    (Narasimhan et al., Consistent multiclass algorithms for complex performance measures, ICML 2015); here by
    one factor exp(b_c) for each class. It is looked for with argmax as a softmax of
    ``SHARPNESS`` times the logits, from two starts, by L-BFGS. What is returned never has a lower expected
    mIoU than no bias. Its mean over the classes that it moves is 0.

    Args:
        logits: (N, C) of pixels, whose softmax is what the model believes: without the tilt of class weights,
            see :func:`~mmseg_imbalance.trained.belief_offset`.

    Raises:
        ValueError: not two dimensions, a single class, or logits that are NaN or infinite.
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or not len(logits):
        raise ValueError(
            f'logits of N pixels and at least 2 classes, (N, C), are needed, got {tuple(logits.shape)}'
        )
    if not torch.isfinite(logits).all():
        raise ValueError('some logits are NaN or infinite: the model has diverged, or its input is damaged')
    z = logits.detach().float()
    p = z.softmax(1)
    pixels = p.sum(0)
    moved = pixels >= MINIMUM_PIXELS

    def iou(bias: Tensor) -> Tensor:
        decisions = torch.nn.functional.one_hot((z + bias).argmax(1), z.shape[1]).float()
        return torch.where(moved, expected_iou(p, decisions), torch.nan)

    def soft_loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        bias = torch.zeros_like(pixels)
        free = torch.tensor(values, dtype=z.dtype, device=z.device, requires_grad=True)
        shares = (SHARPNESS * (z + bias.masked_scatter(moved, free))).softmax(1)
        loss = -expected_iou(p, shares)[moved].mean()
        (gradient,) = torch.autograd.grad(loss, free)
        return loss.item(), gradient.double().cpu().numpy()

    none = torch.zeros_like(pixels)
    found, before = none, iou(none)
    if moved.sum() > 1:
        rarity = -0.5 * (pixels[moved] / pixels.sum()).log()
        for start in (torch.zeros_like(rarity), rarity - rarity.mean()):
            options = dict(ftol=1e-6)  # sums in float32 have no more digits
            begin = start.double().cpu().numpy()
            result = minimize(soft_loss, begin, jac=True, method='L-BFGS-B', options=options)
            values = torch.tensor(result.x, dtype=z.dtype, device=z.device)
            bias = none.masked_scatter(moved, values - values.mean())
            if iou(bias)[moved].mean() > iou(found)[moved].mean():
                found = bias
    return ClassBias(*(x.cpu().numpy() for x in (found, pixels, before, iou(found))))
