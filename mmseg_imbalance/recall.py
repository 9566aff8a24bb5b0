"""Cross-entropy in which a class weighs the share of its pixels that the model misses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mmseg_imbalance.registry import MODELS

import torch
from torch import Tensor

from mmseg_imbalance import functional
from mmseg_imbalance.class_weight import ClassWeightSpec
from mmseg_imbalance.losses import WeightedLoss
from mmseg_imbalance.ops import SoftStats, sum_over_ranks

# A loss does not know its classes when it is made, and a buffer that comes later would spoil averaged models.
MOST_CLASSES = 1024


@dataclass(frozen=True)
class RecallCrossEntropy:
    """A term: sum_c w_c (1 - recall_c) nll_c / sum_c w_c truth_c, of the recall without its gradient."""

    def needs(self) -> dict[str, Any]:
        return dict(with_recall=True)

    def parts(self, stats: SoftStats, class_weight: Tensor | None) -> Tensor:
        correct, count = stats.class_correct.sum(0), stats.class_count.sum(0)
        missed = (count - correct) / count.where(count > 0, 1)  # 0 for a class without a pixel
        return missed.to(stats.nll) * functional.cross_entropy_parts(stats, class_weight)


@MODELS.register_module()
class RecallWeightedLoss(WeightedLoss):
    """Recall loss: cross-entropy, a pixel of class c times 1 - recall_c = FN_c / N_c, without its gradient.

    sum_c w_c (1 - recall_c) nll_c / sum_c w_c truth_c. Recall is that of the batch over all ranks, from the
    logits that the loss is of, and from all valid pixels, whatever a sampler makes them weigh. As the model
    learns, the loss goes to 0 faster than cross-entropy.

    Args:
        class_weight: see :class:`~mmseg_imbalance.losses.WeightedLoss`; the source has none: recall weighs
            the classes already.
        momentum: in (0, 1], the part that a batch has in the running means of the shares of pixels whose
            ratio the recall is; 1: recall of the batch alone, which is the source's. Below 1 the means are in
            checkpoints; evaluation leaves them as they are.
        **options: of :class:`~mmseg_imbalance.losses.WeightedLoss`.

    Raises:
        ValueError: momentum out of its range, or below 1 with more than 1024 classes.

    Source: Tian et al. 2022, https://arxiv.org/abs/2106.14917. In its public code the mean is over all
    pixels, ignored ones too, a count of 0 is taken for 1, and each rank has its own recall.
    """

    running_shares: Tensor  # (2, MOST_CLASSES) of the valid pixels: found right, and all, of each class

    def __init__(
        self, class_weight: ClassWeightSpec = None, *, momentum: float = 1.0, **options: Any
    ) -> None:
        if not (isinstance(momentum, int | float) and 0 < momentum <= 1):
            raise ValueError(f'momentum must lie in (0, 1], got {momentum!r}; 1 is the recall of the batch')
        super().__init__({'recall': (RecallCrossEntropy(), 1.0)}, class_weight, **options)
        self.momentum = momentum
        if momentum < 1:
            self.register_buffer('running_shares', torch.zeros(2, MOST_CLASSES))

    def start_anew(self) -> None:
        """Forget the running means: for a new training from a checkpoint of an earlier one."""
        if self.momentum < 1:
            self.running_shares.zero_()

    def combine(self, stats: SoftStats, logits: Tensor) -> tuple[Tensor, Tensor]:
        counts = torch.stack([stats.class_correct.sum(0), stats.class_count.sum(0)])  # (2, C)
        if self.training:
            counts = sum_over_ranks(counts)
        if self.momentum < 1:
            counts = self._running(counts)
        correct, count = counts[:, None]  # (1, C), as of one image
        return super().combine(replace(stats, class_correct=correct, class_count=count), logits)

    def _running(self, counts: Tensor) -> Tensor:
        """The running shares, (2, C), this batch included; a batch without a valid pixel changes no ratio."""
        classes = counts.shape[1]
        if classes > MOST_CLASSES:
            raise ValueError(
                f'momentum={self.momentum} keeps the recall of at most {MOST_CLASSES} classes, got '
                f'{classes}; momentum=1 takes that of the batch alone, of any number of classes'
            )
        if self.running_shares.element_size() < 4:  # in a model of half precision it would stand still
            self.running_shares = self.running_shares.float()
        shares = counts / counts[1].sum().clamp_min(1)
        shares = torch.lerp(self.running_shares[:, :classes], shares.to(self.running_shares), self.momentum)
        if self.training:
            self.running_shares[:, :classes] = shares
        return shares
