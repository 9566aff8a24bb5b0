"""The class loss of heads that classify masks, one for each query, not pixels: Mask2Former, MaskFormer."""

from __future__ import annotations

from collections.abc import Sequence

from mmseg_imbalance.registry import MODELS

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmseg_imbalance.class_weight import ClassWeight, ClassWeightSpec
from mmseg_imbalance.options import check_at_least_0, check_choice


@MODELS.register_module()
class QueryClassLoss(nn.Module):
    """Cross-entropy of the queries, sum_q w_y(q) nll_q / sum_q w_y(q), as ``loss_cls`` of a query head.

    It takes the place of MMDetection's ``CrossEntropyLoss``, and the options that stand there in a config.

    Args:
        object_weight: w of the C classes: 'auto', or what ``class_weight`` of
            :class:`~mmseg_imbalance.losses.WeightedLoss` can be.
        class_weight: C + 1 numbers, which the head reads too: 1 for each class, then w of "no object".
        loss_weight: factor on the loss.
        use_sigmoid, reduction: False and 'mean'.

    Raises:
        ValueError: an argument out of its range.
        FileNotFoundError: no file at the path given as ``object_weight``.

    Source: Cheng et al. 2021, https://arxiv.org/abs/2107.06278, where w is 1 for all classes and 0.1 for "no
    object".
    """

    def __init__(
        self,
        object_weight: ClassWeightSpec = 'auto',
        class_weight: Sequence[float] = (0.1,),
        loss_weight: float = 1.0,
        use_sigmoid: bool = False,
        reduction: str = 'mean',
    ) -> None:
        super().__init__()
        numbers = list(class_weight) if isinstance(class_weight, list | tuple) else []
        if not numbers or any(w != 1 for w in numbers[:-1]):
            raise ValueError(
                "class_weight of QueryClassLoss must be a list of 1 for each class, then the weight of 'no "
                f"object', got {class_weight!r}; the weights of the classes are object_weight"
            )
        check_at_least_0(loss_weight=loss_weight, **{"the weight of 'no object'": numbers[-1]})
        check_choice('use_sigmoid', use_sigmoid, (False,))
        check_choice('reduction', reduction, ('mean',))
        self.object_weight = ClassWeight(object_weight, owner=type(self).__name__, name='object_weight')
        self.number = len(numbers)
        self.no_object_weight = float(numbers[-1])
        self.loss_weight = loss_weight

    @property
    def class_weights(self) -> list[ClassWeight]:
        """What :class:`~mmseg_imbalance.hooks.ClassWeightHook` fills."""
        return [self.object_weight]

    def check_classes(self, classes: int) -> None:
        """Raise a ValueError unless ``class_weight`` is of so many classes; the head reads it by index."""
        if self.number != classes + 1:
            raise ValueError(
                f'class_weight of QueryClassLoss has {self.number} numbers, but there are {classes} classes '
                f"and 'no object': write class_weight=[1.0] * {classes} + [{self.no_object_weight}]"
            )

    def forward(
        self, cls_score: Tensor, label: Tensor, weight: Tensor | None = None, avg_factor: object = None
    ) -> Tensor:
        """The loss of the queries of a batch, a scalar.

        Args:
            cls_score: (Q, C + 1) logits, "no object" last.
            label: (Q,) class indices, C for "no object".
            weight: (Q,) >= 0; a query of weight k counts as k queries.
            avg_factor: not used. A head makes it of its own ``class_weight``; the sum of w is known here.
        """
        if self.number > 1:  # without a head, the number of "no object" alone will do
            self.check_classes(cls_score.shape[1] - 1)
        w = self.object_weight.for_logits(cls_score[:, :-1])  # (C,)
        score = cls_score.to(torch.promote_types(cls_score.dtype, torch.float32))
        w = score.new_ones(score.shape[1] - 1) if w is None else w.to(score)
        w = F.pad(w, (0, 1), value=self.no_object_weight)
        nll, norm = F.cross_entropy(score, label, w, reduction='none'), w[label]
        if weight is not None:
            nll, norm = nll * weight, norm * weight
        # of weights that are all 0 the loss is 0
        return self.loss_weight * nll.sum() / norm.sum().clamp_min(torch.finfo(norm.dtype).tiny)
