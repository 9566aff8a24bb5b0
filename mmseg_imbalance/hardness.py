"""A loss that learns how hard each pixel is, beside the model, and lets hard pixels weigh more."""

from __future__ import annotations

from typing import Any

from mmseg_imbalance.registry import MODELS

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmseg_imbalance.class_weight import ClassWeightSpec
from mmseg_imbalance.losses import Batch, WeightedLoss
from mmseg_imbalance.ops import valid_pixels
from mmseg_imbalance.options import check_at_least_0, not_handed_over, take
from mmseg_imbalance.terms import CrossEntropy

WIDTH = 64  # channels of the weight head


class _Reversed(torch.autograd.Function):
    """x, whose gradient is multiplied by -rate: what is before it climbs where what is behind it descends."""

    @staticmethod
    def forward(ctx, x: Tensor, rate: float) -> Tensor:
        ctx.rate = rate
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.rate * grad, None


class _Hardness(nn.Module):
    """A 1x1 convolution to one channel that starts at 0.

    It is no Conv2d: an ``init_cfg`` of the model for this type would give it other values.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


@MODELS.register_module()
class HardnessWeightedLoss(WeightedLoss):
    """Cross-entropy sum_i w_i l_i / sum_i w_i with weights w = sigmoid(h) + floor of pixels that are learnt.

    h is a small convolutional head on the features that enter the classifier, without a gradient to them. It
    is trained to make the loss large, while the model makes it small: it finds the pixels that stay hard. A
    pixel weighs at most (1 + floor) / floor times another. The weight head starts at equal weights. It is a
    part of the loss: in the optimizer and the checkpoint, and not run at test time. It needs a Feature head.

    Args:
        class_weight: see :class:`~mmseg_imbalance.losses.WeightedLoss`.
        floor: > 0.
        rate: > 0, factor on the gradient of the weight head.
        **options: of :class:`~mmseg_imbalance.losses.WeightedCrossEntropyLoss`.

    Raises:
        ValueError: an option out of its range.
        RuntimeError: in use, the head hands over no features, or has no classifier when it is built.

    Source: Xiao et al. 2023, Not All Pixels Are Equal: Learning Pixel Hardness for Semantic Segmentation,
    https://arxiv.org/abs/2305.08462, with floor 0.1 and rate 0.01. Differs: there the weight head is a second
    decode head on the backbone's features, and ignored pixels take a share of the weights.
    """

    needs_features = True
    term_options = tuple(CrossEntropy.OPTIONS)

    def __init__(
        self, class_weight: ClassWeightSpec = None, *, floor: float = 0.1, rate: float = 0.01, **options: Any
    ) -> None:
        check_at_least_0(floor=floor, rate=rate)
        if 0 in (floor, rate):
            raise ValueError(
                f'floor and rate must be above 0, got floor={floor} and rate={rate}; with equal weights the '
                'loss is WeightedCrossEntropyLoss'
            )
        super().__init__({'hardness': (take(CrossEntropy, options), 1.0)}, class_weight, **options)
        self.floor = floor
        self.rate = rate
        self.weight_head: nn.Sequential | None = None

    def set_feature_shape(self, num_classes: int, channels: int) -> None:
        """Make the weight head for what a head hands over; heads call it when they are built."""
        first = nn.Conv2d(channels, WIDTH, 3, padding=1)
        self.weight_head = nn.Sequential(first, nn.ReLU(), _Hardness(WIDTH))

    def weigh_pixels(self, batch: Batch) -> dict[str, Any]:
        """The learnt weights, (B, H, W)."""
        if batch.features is None:
            needs = 'HardnessWeightedLoss learns from the features that enter the classifier'
            raise RuntimeError(not_handed_over(needs))
        if self.weight_head is None:
            raise RuntimeError(
                'HardnessWeightedLoss has no weight head: it is made when the decode head is built, and this '
                'one has no conv_seg when it is built'
            )
        h = self.weight_head(batch.features.detach().to(self.weight_head[0].weight.dtype))
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        size = batch.target.shape[1:]
        if h.shape[2:] != size:
            h = F.interpolate(h, size, mode='bilinear', align_corners=batch.align_corners)
        hardness = h[:, 0].sigmoid()
        if self.training:
            valid = valid_pixels(batch.target, batch.ignore_index)
            mean = (hardness.detach() * valid).sum() / valid.sum().clamp_min(1)
            self.logged = self._named(dict(mean=mean))
        return dict(pixel_weight=_Reversed.apply(hardness + self.floor, self.rate))
