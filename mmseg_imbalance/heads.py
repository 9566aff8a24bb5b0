"""Decode heads that leave the resize to the losses and hand them what enters the classifier.

MMSegmentation's heads resize their logits to label size before they call a loss. These heads give the losses
of this package the low-resolution logits. Logits of label size are made, once, only where a loss of
MMSegmentation or a pixel sampler works on them. Two classes do it, around MMSegmentation's head:

    FeatureASPPHead -> FeatureKeeper -> ASPPHead -> LowResolutionLogitHead -> BaseDecodeHead

The outer one sees each call of ``loss`` and ``cls_seg``, also of a head that replaces them. The inner one is
the ``super().loss_by_feat`` of heads with several outputs (DAHead) or labels of their own (STDCHead).
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from functools import cache

from mmseg_imbalance.registry import MODELS

import torch
from mmseg.models.decode_heads import ASPPHead, DepthwiseSeparableASPPHead, SegformerHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.losses import accuracy
from mmseg.models.utils import resize
from mmseg.registry import MODELS as FRAMEWORK_MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from mmseg_imbalance.ignored_label import pass_on_ignored_label
from mmseg_imbalance.losses import WeightedLoss
from mmseg_imbalance.ops import soft_stats, valid_pixels
from mmseg_imbalance.options import not_handed_over


def can_be_called(loss: nn.Module) -> bool:
    """Whether a loss takes what a decode head hands it: logits, labels, ``weight`` and ``ignore_index``."""
    try:
        inspect.signature(loss.forward).bind(None, None, weight=None, ignore_index=255)
    except TypeError:
        return False
    return True


def cannot_be_called(loss: nn.Module, head: nn.Module) -> str:
    return (
        f'{type(head).__name__} calls its losses with logits, labels, weight and ignore_index, but '
        f'{type(loss).__name__} takes {inspect.signature(loss.forward)}: it is made for a head that calls it '
        'in another way, as PIDHead calls BoundaryLoss. Take it out of loss_decode'
    )


def check_heads(model: nn.Module) -> None:
    """Refuse, before training, what MMSegmentation's own heads cannot do with a loss of this package.

    Raises:
        TypeError: a loss beside it that the head cannot call.
        ValueError: an OHEM sampler on the softmax of one output channel; a loss that needs tubes.
    """
    for name, head in model.named_modules():
        if not isinstance(head, BaseDecodeHead) or isinstance(head, LowResolutionLogitHead):
            continue
        losses = getattr(head, 'loss_decode', None)  # IterativeDecodeHead has none, but heads inside
        losses = losses if isinstance(losses, nn.ModuleList) else [losses]
        if not any(isinstance(loss, WeightedLoss) for loss in losses):
            continue
        for loss in losses:
            if getattr(loss, 'needs_marked', False):
                needs = f'{name}: {type(loss).__name__} needs the tubes around skeletons'
                raise ValueError(not_handed_over(needs))
        if head.out_channels == 1 and getattr(head.sampler, 'thresh', None) is not None:
            raise ValueError(
                f'{name}: the sampler of {type(head).__name__} takes the softmax of the logits, which needs '
                "two channels, but out_channels=1. Take dict(type='FeatureHead', "
                f"base='{type(head).__name__}', ...), which hands it both, or out_channels=2"
            )
        if type(head).loss_by_feat is BaseDecodeHead.loss_by_feat:
            for loss in losses:
                if not can_be_called(loss):
                    raise TypeError(f'{name}: {cannot_be_called(loss, head)}')


def tubes_of(samples: list[SegDataSample], label: Tensor) -> Tensor:
    """Which pixels of a batch SkeletonTubes has marked, (B, H, W) bool.

    Raises:
        ValueError: it has not, or not at the size of the labels, (B, H, W).
    """
    if not all('gt_edge_map' in sample for sample in samples):
        raise ValueError(
            "the samples have no gt_edge_map. Add dict(type='SkeletonTubes') to the training pipeline, right "
            'before PackSegInputs'
        )
    sizes = {tuple(sample.gt_edge_map.shape) for sample in samples}
    if sizes != {tuple(label.shape[1:])}:
        raise ValueError(
            f'labels are of size {tuple(label.shape[1:])}, their gt_edge_map of {sorted(sizes)}. '
            'SkeletonTubes belongs behind all transforms that change the size, right before PackSegInputs'
        )
    # padding may be 255
    return torch.cat([sample.gt_edge_map.data for sample in samples]).to(label.device) == 1


class LowResolutionLogitHead(BaseDecodeHead):
    """Losses and accuracy of low-resolution logits: names, order and values as in MMSegmentation's heads."""

    features: Tensor | None = None  # (B, D, h, w) what entered cls_seg last, while the losses are computed

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: list[SegDataSample]) -> dict[str, Tensor]:
        """The losses by name and ``acc_seg``, of (B, C, h, w) logits."""
        modules = self.loss_decode if isinstance(self.loss_decode, nn.ModuleList) else [self.loss_decode]
        label = self._stack_batch_gt(batch_data_samples)  # (B, 1, H, W)
        theirs = not all(isinstance(module, WeightedLoss) for module in modules)
        resized = weight = None
        # with one output channel, MMSegmentation's accuracy is not that of a softmax
        if theirs or self.sampler is not None or self.out_channels == 1:
            size = label.shape[2:]
            resized = resize(seg_logits, size, mode='bilinear', align_corners=self.align_corners)
        if self.sampler is not None:
            shown = resized
            # a threshold is one on the softmax; without, the sampler hands the logits to the losses
            if self.out_channels == 1 and getattr(self.sampler, 'thresh', None) is not None:
                shown = torch.cat([torch.zeros_like(resized), resized], 1)
            weight = self.sampler.sample(shown, label)
        label = label.squeeze(1)
        losses: dict[str, Tensor] = {}
        for module in modules:
            logits, arguments = resized, dict(weight=weight, ignore_index=self.ignore_index)
            if isinstance(module, WeightedLoss):
                logits = seg_logits
                arguments.update(align_corners=self.align_corners, features=self._features_for(module))
                if module.needs_marked:
                    arguments['marked'] = tubes_of(batch_data_samples, label)
            elif not can_be_called(module):
                raise TypeError(cannot_be_called(module, self))
            value = module(logits, label, **arguments)
            name = module.loss_name
            parts = module.take_logged() if isinstance(module, WeightedLoss) else {}
            for key, scalar in {name: value, **parts}.items():  # of losses of one name they are added
                losses[key] = losses[key] + scalar if key in losses else scalar
        if resized is None:
            losses['acc_seg'] = self._accuracy(seg_logits, label, modules)
        else:
            losses['acc_seg'] = accuracy(resized, label, ignore_index=self.ignore_index)
        return losses

    def _features_for(self, loss: nn.Module) -> Tensor | None:
        if not getattr(loss, 'needs_features', False):
            return None
        if self.features is None:
            raise RuntimeError(
                f'{type(loss).__name__} needs the features that enter the classifier, but no cls_seg was '
                f'called in the loss of {type(self).__name__}. Most heads call it: FeatureASPPHead, '
                "FeatureSegformerHead, FeatureHead(base='UPerHead'). With this one, take a loss that needs "
                'no features, such as CombinedWeightedLoss'
            )
        return self.features

    def _accuracy(self, seg_logits: Tensor, label: Tensor, modules: nn.ModuleList | list) -> Tensor:
        """MMSegmentation's accuracy in percent, (1,), from counts that a loss has made anyway."""
        counts = [getattr(module, 'correct', None) for module in modules]
        correct = next((count for count in counts if count is not None), None)
        if correct is None:  # every loss has changed the logits
            arguments = dict(ignore_index=self.ignore_index, align_corners=self.align_corners)
            correct = soft_stats(seg_logits.detach(), label, **arguments).correct
        valid = valid_pixels(label, self.ignore_index).sum()
        eps = torch.finfo(torch.float32).eps  # no valid pixel: 100, as in MMSegmentation
        return 100 * (correct.sum().float().reshape(1) + eps) / (valid + eps)


class FeatureKeeper(BaseDecodeHead):
    """Keeps what enters ``cls_seg`` from there to the end of the losses, if one of them needs it.

    Nothing is kept where ``forward`` runs on its own: in prediction, in a cascade's second pass, or when
    activation checkpointing repeats it in backward.
    """

    _keep = False

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        for module in self.modules():
            # without a conv_seg, the loss that is not handed features says so, or takes the first ones' shape
            known = hasattr(module, 'set_feature_shape') and hasattr(self, 'conv_seg')
            if known and module.needs_features:
                module.set_feature_shape(max(self.out_channels, 2), self.conv_seg.in_channels)
        pass_on_ignored_label(self)

    def loss(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        self._keep = any(getattr(module, 'needs_features', False) for module in self.modules())
        try:
            return super().loss(*args, **kwargs)
        finally:
            self._keep, self.features = False, None

    def forward_with_features(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """What ``forward`` returns, and (B, D, h, w) what entered ``cls_seg`` last: None if nothing did."""
        self._keep = True
        try:
            return self.forward(inputs), self.features
        finally:
            self._keep, self.features = False, None

    def cls_seg(self, feat: Tensor) -> Tensor:
        if self._keep:
            self.features = feat
        return super().cls_seg(feat)


@MODELS.register_module()
class FeatureASPPHead(FeatureKeeper, ASPPHead, LowResolutionLogitHead):
    """DeepLabV3's head; arguments and checkpoints are those of ``ASPPHead``."""


@MODELS.register_module()
class FeatureDepthwiseSeparableASPPHead(FeatureKeeper, DepthwiseSeparableASPPHead, LowResolutionLogitHead):
    """DeepLabV3+'s head; arguments and checkpoints are those of ``DepthwiseSeparableASPPHead``."""


@MODELS.register_module()
class FeatureSegformerHead(FeatureKeeper, SegformerHead, LowResolutionLogitHead):
    """SegFormer's head; arguments and checkpoints are those of ``SegformerHead``."""


@MODELS.register_module()
def FeatureHead(base: str | type[BaseDecodeHead], **kwargs: object) -> BaseDecodeHead:
    """Any other decode head: ``dict(type='FeatureHead', base='UPerHead', ...)`` is a ``FeatureUPerHead``.

    A head that calls its losses by position (DDRHead, PIDHead) stays as it is in MMSegmentation, but its
    losses get its ``ignore_index``, which it does not pass on.

    Args:
        base: class derived from ``BaseDecodeHead``, or its registered name, with or without a scope.
        **kwargs: of that class.

    Raises:
        ValueError: ``base`` is not such a class.
    """
    head = base
    if isinstance(base, str):
        with suppress(RuntimeError):  # an unknown name; ours says more than MMEngine's
            head = FRAMEWORK_MODELS.get(base)
    if not (isinstance(head, type) and issubclass(head, BaseDecodeHead)):
        found = f', which is {head}' if head is not base else ''
        raise ValueError(
            "base must be a class derived from MMSegmentation's BaseDecodeHead, or the name under which one "
            f"is registered, such as 'UPerHead', got {base!r}{found}"
        )
    return _feature_class(head)(**kwargs)


@cache
def _feature_class(head: type[BaseDecodeHead]) -> type[BaseDecodeHead]:
    if issubclass(head, FeatureKeeper):
        return head
    name = f'Feature{head.__name__}'
    own = dict(__module__=__name__, __doc__=head.__doc__)
    named = globals().get(name)
    if named is not None and issubclass(named, head):
        return named
    return type(name, (FeatureKeeper, head, LowResolutionLogitHead), own)


def __getattr__(name: str) -> type[BaseDecodeHead]:
    # how pickle finds the classes that FeatureHead has made
    head = FRAMEWORK_MODELS.module_dict.get(name.removeprefix('Feature'))
    if name.startswith('Feature') and isinstance(head, type) and issubclass(head, BaseDecodeHead):
        return _feature_class(head)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
