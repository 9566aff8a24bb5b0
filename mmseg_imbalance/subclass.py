"""The subclassified losses: the hard part inside each class, found in the features or in the logits.

Inter-class weights cannot see that a class is itself imbalanced: near cars are many and easy, far cars few
and hard. Two ways to find the subclasses: clusters of the features that enter the classifier, followed from
batch to batch, or the pixels of an image whose logits resemble few others of their class.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from mmseg_imbalance.registry import MODELS

import torch
from torch import Tensor

from mmseg_imbalance.class_weight import ClassWeightSpec
from mmseg_imbalance.clustering import SubclassClustering
from mmseg_imbalance.losses import Batch, WeightedLoss
from mmseg_imbalance.ops import SoftStats, similarity_weight, valid_pixels
from mmseg_imbalance.options import not_handed_over, take
from mmseg_imbalance.terms import CrossEntropy

CLUSTERING_OPTIONS = tuple(inspect.signature(SubclassClustering).parameters)


@MODELS.register_module()
class SubclassifiedLoss(WeightedLoss):
    """Cross-entropy in which the rare and the hard part of a class weigh more than its bulk.

    The parts are clusters of the features that enter the classifier, which the heads of
    :mod:`~mmseg_imbalance.heads` hand over.

    Args:
        class_weight: see :class:`~mmseg_imbalance.losses.WeightedLoss`.
        **options: of :class:`~mmseg_imbalance.clustering.SubclassClustering`: num_subclasses, update, ...;
            and of :class:`~mmseg_imbalance.losses.WeightedCrossEntropyLoss`.

    Raises:
        ValueError: an option out of its range.
        RuntimeError: in use, no features; or features or losses that are not finite.

    Source: after Qiu et al. 2023, see :class:`SimilaritySubclassifiedLoss`; finding the subclasses by
    clustering is ours.
    """

    needs_features = True
    term_options = (*CLUSTERING_OPTIONS, *CrossEntropy.OPTIONS)

    def __init__(self, class_weight: ClassWeightSpec = None, **options: Any) -> None:
        chosen = {name: options.pop(name) for name in CLUSTERING_OPTIONS if name in options}
        super().__init__({'subclass': (take(CrossEntropy, options), 1.0)}, class_weight, **options)
        self.weighting = SubclassClustering(**chosen)  # its name in checkpoints

    def set_feature_shape(self, num_classes: int, channels: int) -> None:
        """Make the state for what a head hands over; heads call it when they are built."""
        self.weighting.allocate(num_classes, channels)

    def weigh_pixels(self, batch: Batch) -> dict[str, Any]:
        """The weights of the subclasses, (B, H, W), and the subclasses c K + k as groups of the pixels."""
        if batch.features is None:
            message = not_handed_over('SubclassifiedLoss clusters the features that enter the classifier')
            raise RuntimeError(f'{message}. SimilaritySubclassifiedLoss needs the logits alone')
        logits, target = batch.logits.detach(), batch.target
        with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
            valid = valid_pixels(target, batch.ignore_index)
            weight, group, num_groups = self.weighting(logits, target, valid, batch.features)
        return dict(pixel_weight=weight, group=group, num_groups=num_groups)

    def learn(self, stats: SoftStats) -> None:
        if self.training:
            with torch.no_grad(), torch.autocast(stats.nll.device.type, enabled=False):
                self.weighting.learn(stats)
                self.logged = self._named(self.weighting.summary())


@dataclass(frozen=True)
class NLLSum:
    """A term: sum_c w_c nll_c, of pixel weights that are divided by the number of pixels already."""

    focal_gamma: float = 0.0

    def needs(self) -> dict[str, Any]:
        return dict(focal_gamma=self.focal_gamma)

    def parts(self, stats: SoftStats, class_weight: Tensor | None) -> Tensor:
        return (stats.nll if class_weight is None else stats.nll * class_weight).sum(0)


@MODELS.register_module()
class SimilaritySubclassifiedLoss(WeightedLoss):
    """Cross-entropy in which pixels weigh more the fewer of their class in the image have similar logits.

    Args:
        class_weight: see :class:`~mmseg_imbalance.losses.WeightedLoss`.
        threshold: above 0, of :func:`~mmseg_imbalance.ops.similarity_weight`.
        paper_exact: as in the public code: see :func:`~mmseg_imbalance.ops.similarity_weight`; the loss is
            the mean over all pixels, ignored ones included, which class weights do not divide.
        **options: of :class:`~mmseg_imbalance.losses.WeightedCrossEntropyLoss`.

    Raises:
        ValueError: an option out of its range, or label_smoothing with ``paper_exact``.

    Source: Qiu et al. 2023, Subclassified Loss: Rethinking Data Imbalance From Subclass Perspective for
    Semantic Segmentation, IEEE Transactions on Intelligent Vehicles.
    """

    term_options = tuple(CrossEntropy.OPTIONS)

    def __init__(
        self,
        class_weight: ClassWeightSpec = None,
        *,
        threshold: float = 0.98,
        paper_exact: bool = False,
        **options: Any,
    ) -> None:
        if not 0 < threshold < torch.inf:
            raise ValueError(
                f'threshold must be finite and above 0, got {threshold!r}; similarity is at most 1'
            )
        term: Any = take(CrossEntropy, options)
        if paper_exact:
            if term.label_smoothing > 0:
                raise ValueError(
                    'paper_exact=True is plain cross-entropy, weighted; it takes no label_smoothing, got '
                    f'{term.label_smoothing}'
                )
            if term.divide_by == 'pixels':
                raise ValueError(
                    "paper_exact=True divides by all pixels, ignored ones too; it takes no divide_by='pixels'"
                )
            term = NLLSum(term.focal_gamma)
        super().__init__({'subclass': (term, 1.0)}, class_weight, **options)
        self.threshold = threshold
        self.paper_exact = paper_exact

    def weigh_pixels(self, batch: Batch) -> dict[str, Any]:
        """The weights by similarity, (B, H, W)."""
        weight = similarity_weight(
            batch.logits,
            batch.target,
            threshold=self.threshold,
            ignore_index=batch.ignore_index,
            align_corners=batch.align_corners,
            paper_exact=self.paper_exact,
        )
        if self.paper_exact:
            weight = weight / batch.target.numel()
        return dict(pixel_weight=weight)
