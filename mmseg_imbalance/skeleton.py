"""Tubes around skeletons: the transform that draws them, and the loss that asks for their recall."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mmseg_imbalance.registry import MODELS, TRANSFORMS

import cv2
import numpy as np
from mmcv.transforms import BaseTransform

from mmseg_imbalance.class_weight import ClassWeightSpec
from mmseg_imbalance.config_fields import get_field
from mmseg_imbalance.ignored_label import heads_of_run
from mmseg_imbalance.losses import WeightedLoss
from mmseg_imbalance.options import check_at_least_0, check_whole, take
from mmseg_imbalance.terms import CrossEntropy, Overlap, SkeletonRecall

TUBES = 'gt_edge_map'  # PackSegInputs packs a map of this name, and the preprocessor pads it
SHARED = ('smooth', 'region_reduction', 'sync_region')  # options of Dice and of the recall of the tubes


@TRANSFORMS.register_module()
class SkeletonTubes(BaseTransform):
    """Mark the tube of each class in a label: its skeleton, made thicker, inside the class's own pixels.

    :class:`SkeletonRecallLoss` needs it. It belongs behind all transforms that change labels or their size,
    before PackSegInputs. Labels stay as they are. The tubes are ``gt_edge_map`` in the results, (H, W) uint8,
    1 on a tube. PackSegInputs packs a map of this name, which is otherwise that of GenerateEdge.

    Args:
        classes: indices of those that get a tube; None: all. Without the background: all but 0.
        radius: how often the skeleton grows by its four neighbours, at least 1.
        ignore_index: the label that is no class.

    Raises:
        ImportError: scikit-image is missing.
        ValueError: an option out of its range; in use, an index that is no class of the heads of the run, no
            labels, or a ``gt_edge_map`` is there already.

    Source: Kirchhoff et al., Skeleton Recall Loss, ECCV 2024, https://arxiv.org/abs/2404.03010, algorithm 1.
    Differs: its public code takes the skeleton of all classes but the background together, and cuts it up by
    class. Here each class has its own, as a street scene has no background.
    """

    def __init__(
        self, classes: Sequence[int] | None = None, radius: int = 2, ignore_index: int = 255
    ) -> None:
        if classes is not None and not (
            isinstance(classes, list | tuple)
            and classes
            and all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in classes)
        ):
            raise ValueError(
                f'classes={classes!r}, allowed are indices of classes, as [5, 6, 7], or None for all.'
            )
        check_whole(1, radius=radius)
        self.classes = classes
        self.radius = radius
        self.ignore_index = ignore_index
        self.checked = False
        _skeletonize()  # before training, not in a worker

    def transform(self, results: dict) -> dict:
        """Add ``gt_edge_map``."""
        if not self.checked:
            self._check_classes()
        labels = results.get('gt_seg_map')
        if labels is None or labels.ndim != 2:
            found = 'none' if labels is None else f'shape {labels.shape}'
            raise ValueError(
                f'SkeletonTubes needs gt_seg_map of shape (H, W), found {found}. It belongs behind '
                'LoadAnnotations and the crop, before PackSegInputs.'
            )
        if TUBES in results:
            raise ValueError(
                'SkeletonTubes finds a gt_edge_map, which is where its tubes go. Take GenerateEdge out of '
                'the pipeline, or a second SkeletonTubes.'
            )
        tubes = np.zeros(labels.shape, np.uint8)
        for label in np.unique(labels).tolist():
            if label != self.ignore_index and (self.classes is None or label in self.classes):
                self._draw(tubes, labels == label)
        results[TUBES] = tubes
        fields = results.get('seg_fields', [])  # what a later flip or crop moves
        results['seg_fields'] = [*fields, TUBES]
        return results

    def _check_classes(self) -> None:
        """A class that does not exist would have no tube, and the loss would take that for none missed."""
        found = [get_field(head, 'num_classes') for head in heads_of_run()]
        number = max((2, *filter(None, found)))  # with num_classes=1, labels are 0 and 1
        if self.classes is not None and any(found) and max(self.classes) >= number:
            raise ValueError(
                f'classes={self.classes} of SkeletonTubes: the heads have {number} classes, with the indices '
                f'0 to {number - 1}.'
            )
        self.checked = True

    def _draw(self, tubes: np.ndarray, mask: np.ndarray) -> None:
        """Mark the tube of a class; beyond the box around its pixels there is nothing to look at."""
        left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
        box = slice(top, top + height), slice(left, left + width)
        mask = mask[box]
        tube = _skeletonize()(mask).astype(np.uint8)
        cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
        tube = cv2.dilate(tube, cross, iterations=self.radius)
        tubes[box][mask] = tube[mask]

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(classes={self.classes}, radius={self.radius}, '
            f'ignore_index={self.ignore_index})'
        )


def _skeletonize() -> Callable[[np.ndarray], np.ndarray]:
    try:
        from skimage.morphology import skeletonize
    except ImportError as error:
        raise ImportError(
            f'SkeletonTubes needs scikit-image, which cannot be imported ({error}). Install it: pip install '
            'scikit-image, or this package as mmseg-imbalance[skeleton].'
        ) from error
    return skeletonize


@MODELS.register_module()
class SkeletonRecallLoss(WeightedLoss):
    """Cross-entropy, Dice loss and the missed part of the tubes around skeletons, for thin things.

    The third term is sum_c w_c (1 - (sum_S p_c + s) / (|S_c| + s)) / sum_c w_c, S_c the tube of class c that
    :class:`SkeletonTubes` marks, over the classes that have one. Each piece of the length of a thing counts
    alike, however thin it is. All terms come from one pass over the pixels. It needs a Feature head, and
    SkeletonTubes in the training pipeline.

    Args:
        class_weight: see :class:`~mmseg_imbalance.losses.WeightedLoss`; the source has none.
        ce_weight, dice_weight, skeleton_weight: >= 0, factors on the terms.
        **options: smooth, region_reduction and sync_region of Dice and the tubes alike, absent_classes of
            Dice, see :class:`~mmseg_imbalance.terms.Overlap`; those of
            :class:`~mmseg_imbalance.losses.WeightedCrossEntropyLoss`.

    Raises:
        RuntimeError: in use, the head hands over no tubes.

    Source: Kirchhoff et al., Skeleton Recall Loss, ECCV 2024, https://arxiv.org/abs/2404.03010, equation 3.
    """

    term_options = (*CrossEntropy.OPTIONS, *SHARED, 'absent_classes')

    def __init__(
        self,
        class_weight: ClassWeightSpec = None,
        *,
        ce_weight: float = 1.0,
        dice_weight: float = 1.0,
        skeleton_weight: float = 1.0,
        loss_name: str = 'loss_skeleton',
        **options: Any,
    ) -> None:
        check_at_least_0(ce_weight=ce_weight, dice_weight=dice_weight, skeleton_weight=skeleton_weight)
        shared = {name: options.pop(name) for name in SHARED if name in options}
        dice = dict(shared)
        if 'absent_classes' in options:
            dice['absent_classes'] = options.pop('absent_classes')
        terms = {
            'ce': (take(CrossEntropy, options), ce_weight),
            'dice': (take(Overlap, dice), dice_weight),
            'recall': (take(SkeletonRecall, shared), skeleton_weight),
        }
        super().__init__(terms, class_weight, loss_name=loss_name, **options)
