"""The losses: MMSegmentation's calling convention written once, then one short class per formula."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path

import torch
from mmengine.fileio import load
from mmengine.logging import MessageHub
from torch import Tensor, nn

from mmseg_imbalance import functional
from mmseg_imbalance.ops import SoftStats, soft_stats
from mmseg_imbalance.registry import MODELS

ClassWeight = None | str | Path | Sequence[float] | Mapping[str, float]


class WeightedLoss(nn.Module):
    """What a decode head needs of a loss: weights, ignored pixels, a name, one scalar.

    Subclasses compute the scalar from :class:`~mmseg_imbalance.ops.SoftStats` in :meth:`compute`.

    Args:
        class_weight: one number >= 0 per class: None (all 1); a list; a dict by class name (classes
            that it leaves out weigh 1); the path of a JSON file that ``tools/class_weights.py`` wrote;
            or 'auto', which :class:`~mmseg_imbalance.hooks.ClassWeightHook` fills before training.
        loss_weight: factor on the loss.
        loss_name: key in the log; must contain 'loss', else MMEngine leaves it out of the total.
        backend: of :func:`~mmseg_imbalance.ops.soft_stats`.

    Raises:
        ValueError: a weight that is negative, NaN or infinite, or an argument out of its range.
        FileNotFoundError: no file at the path given as ``class_weight``.
    """

    focal_gamma = label_smoothing = 0.0
    square_denominator = False
    needs_features = False  # of a loss that looks at what enters the classifier; see forward

    def __init__(
        self,
        class_weight: ClassWeight = None,
        loss_weight: float = 1.0,
        loss_name: str = 'loss',
        backend: str = 'auto',
    ) -> None:
        super().__init__()
        if 'loss' not in loss_name:
            raise ValueError(
                f"loss_name must contain 'loss', got {loss_name!r}; MMEngine adds only such names up"
            )
        self.loss_weight = loss_weight
        self.loss_name = loss_name
        self.backend = backend
        # no buffer: averaged copies of a model pair buffers by position, and this one is filled late
        self.class_weight: Tensor | None = None
        self.pending: str | dict[str, float] | None = None
        self.weight_classes: list[str] | None = None
        self.correct: Tensor | None = None  # (B,) SoftStats.correct of the last batch, for acc_seg
        if isinstance(class_weight, str | Path) and class_weight != 'auto':
            class_weight, self.weight_classes = _read_class_weight(class_weight)
        if isinstance(class_weight, Mapping):
            # with the 1 of the classes that it leaves out
            _check_weights([*class_weight.values(), 1.0], f'class_weight={dict(class_weight)}')
            self.pending = dict(class_weight)
        elif isinstance(class_weight, str):
            self.pending = class_weight
        elif class_weight is not None:
            self.set_class_weight(class_weight)

    def set_class_weight(self, weights: Sequence[float] | Tensor) -> None:
        """Use these weights, one number >= 0 per class, from the next call on."""
        weights = weights.tolist() if hasattr(weights, 'tolist') else list(weights)
        _check_weights(weights, f'class_weight={weights}')
        self.class_weight = torch.tensor(weights, dtype=torch.float32)
        self.pending = None

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
        ignore_index: int | None = 255,
        align_corners: bool = False,
        features: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            pred: (B, C, h, w) logits at label size or smaller; C = 1 is softmax over [0, z]. Of sampled
                points, as PointRend has them, (B, C, N) with ``target`` (B, N).
            target: (B, H, W) class indices or ``ignore_index``.
            weight: (B, H, W) pixel weights >= 0, as OHEM samplers give; weight k counts as k pixels.
            avg_factor, reduction_override: refused unless they ask for the mean over this batch.
            ignore_index: None: no label is ignored.
            align_corners: of the resize where (h, w) != (H, W).
            features: (B, D, h', w') what entered the head's classifier, where the loss ``needs_features``.
        """
        if avg_factor is not None or reduction_override not in (None, 'mean'):
            raise ValueError(
                f'{type(self).__name__} is a mean over its own pixels and classes; it takes no '
                f'avg_factor={avg_factor} and no reduction_override={reduction_override!r}. '
                'An OHEMPixelSampler asks for the loss of each pixel unless it has a threshold: '
                "sampler=dict(type='OHEMPixelSampler', thresh=0.7)"
            )
        if pred.ndim == 3:
            pred, target = pred[:, :, None], target[:, None]
            weight = None if weight is None else weight[:, None]
        if pred.shape[1] == 1:
            pred = torch.cat([torch.zeros_like(pred), pred], 1)
        stats = soft_stats(
            pred,
            target,
            pixel_weight=weight,
            # a number that no label has
            ignore_index=torch.iinfo(torch.int64).min if ignore_index is None else ignore_index,
            focal_gamma=self.focal_gamma,
            square_prediction=self.square_denominator,
            with_log_prob=self.label_smoothing > 0,
            align_corners=align_corners,
            backend=self.backend,
        )
        self.correct = stats.correct
        return self.loss_weight * self.compute(stats, self._weight_for(pred))

    def compute(self, stats: SoftStats, class_weight: Tensor | None) -> Tensor:
        """The scalar from the sums of a batch and the (C,) weights."""
        raise NotImplementedError

    def _weight_for(self, pred: Tensor) -> Tensor | None:
        if self.pending == 'auto':
            raise RuntimeError(
                f"{type(self).__name__}(class_weight='auto') has no weights yet. Add "
                "custom_hooks = [dict(type='ClassWeightHook')] to the config: it counts the training "
                'annotations before the first iteration. Outside a runner, call set_class_weight'
            )
        if self.pending is not None or self.weight_classes is not None:
            self._match_class_names()
        if self.class_weight is None:
            return None
        if len(self.class_weight) != pred.shape[1]:
            raise ValueError(
                f'class_weight holds {len(self.class_weight)} numbers, '
                f'{self.class_weight.tolist()}, but the head predicts {pred.shape[1]} classes'
            )
        if self.class_weight.device != pred.device:
            self.class_weight = self.class_weight.to(pred.device)
        return self.class_weight

    def _match_class_names(self) -> None:
        # MMEngine's runner leaves the training data set's description in the message hub
        meta = MessageHub.get_current_instance().get_info('dataset_meta') or {}
        classes = meta.get('classes')
        if isinstance(self.pending, dict):
            if classes is None:
                raise RuntimeError(
                    'class_weight by name needs the class names of a training data set, which a runner '
                    'provides; outside a runner give a list in the order of the classes'
                )
            unknown = sorted(set(self.pending) - set(classes))
            if unknown:
                raise ValueError(
                    f'class_weight names {unknown}, which the data set does not have; '
                    f'its classes are {list(classes)}'
                )
            self.set_class_weight([self.pending.get(name, 1.0) for name in classes])
        elif classes is not None and list(classes) != self.weight_classes:
            raise ValueError(
                f'the class_weight file is for the classes {self.weight_classes}, but the data set has '
                f'{list(classes)}; write one for it with tools/class_weights.py CONFIG --out FILE'
            )
        self.weight_classes = None


def _check_weights(weights: Sequence[float], what: str) -> None:
    valid = all(isinstance(w, Real) and math.isfinite(w) and w >= 0 for w in weights)
    if not valid or not any(weights):
        raise ValueError(f'{what} must be finite numbers, at least 0 and not all 0')


def _read_class_weight(path: str | Path) -> tuple[list[float], list[str]]:
    """(weights, class names) of a file that ``tools/class_weights.py`` wrote."""
    try:
        content = load(str(path), file_format='json')
        return list(content['weights']), list(content['classes'])
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"class_weight={str(path)!r} is neither 'auto' nor a file; "
            'tools/class_weights.py CONFIG --out FILE writes one'
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'class_weight={str(path)!r} is not a file of tools/class_weights.py --out: {error!r}'
        ) from error


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f'{name} must be one of {choices}, got {value!r}')


def _check_at_least_0(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f'{name} must be a finite number, at least 0, got {value}')


class _PixelTerm(WeightedLoss):
    """Options of the cross-entropy part."""

    def __init__(self, *, focal_gamma: float = 0.0, label_smoothing: float = 0.0, **kwargs: object) -> None:
        super().__init__(**kwargs)
        _check_at_least_0(focal_gamma=focal_gamma)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f'label_smoothing must lie in [0, 1), got {label_smoothing}')
        self.focal_gamma = focal_gamma
        self.label_smoothing = label_smoothing

    def cross_entropy(self, stats: SoftStats, class_weight: Tensor | None) -> Tensor:
        return functional.cross_entropy(stats, class_weight, self.label_smoothing)


class _RegionTerm(WeightedLoss):
    """Options of the Dice part."""

    def __init__(
        self,
        *,
        smooth: float = 1.0,
        square_denominator: bool = False,
        region_reduction: str = 'image',
        absent_classes: str = 'include',
        sync_region: bool = False,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        _check_at_least_0(smooth=smooth)
        _check_choice('region_reduction', region_reduction, ('image', 'batch'))
        _check_choice('absent_classes', absent_classes, ('include', 'ignore'))
        if sync_region and region_reduction != 'batch':
            raise ValueError(
                "sync_region=True sums over the batches of all ranks, so it needs region_reduction='batch', "
                f'got {region_reduction!r}'
            )
        self.smooth = smooth
        self.square_denominator = square_denominator
        self.region_reduction = region_reduction
        self.absent_classes = absent_classes
        self.sync_region = sync_region

    def reduce(self, stats: SoftStats) -> SoftStats:
        if self.region_reduction == 'image':
            return stats
        return stats.sum_images(across_ranks=self.sync_region)

    def dice(self, stats: SoftStats, class_weight: Tensor | None) -> Tensor:
        return functional.region_loss(
            functional.dice(stats, self.smooth),
            stats.truth,
            class_weight,
            absent_classes=self.absent_classes,
        )


@MODELS.register_module()
class WeightedCrossEntropyLoss(_PixelTerm):
    """Cross-entropy sum_c w_c nll_c / sum_c w_c truth_c: PyTorch's weighted mean over the pixels.

    Unlike the framework's, it averages over valid pixels only and takes class weights together with
    ignored ones.

    Args:
        class_weight, loss_weight, loss_name, backend: see :class:`WeightedLoss`.
        label_smoothing: in [0, 1), as in ``F.cross_entropy``.
        focal_gamma: >= 0; factor (1 - p_y)^gamma on each pixel's loss (Lin et al. 2017,
            https://arxiv.org/abs/1708.02002, equation 4); the norm stays that of cross-entropy.
    """

    def __init__(self, class_weight: ClassWeight = None, *, loss_name: str = 'loss_ce', **kwargs) -> None:
        super().__init__(class_weight=class_weight, loss_name=loss_name, **kwargs)

    def compute(self, stats: SoftStats, class_weight: Tensor | None) -> Tensor:
        return self.cross_entropy(stats, class_weight)


@MODELS.register_module()
class WeightedDiceLoss(_RegionTerm):
    """Dice loss of each class, weighted: sum_c w_c (1 - (2 I_c + s) / (P_c + T_c + s)) / sum_c w_c.

    Args:
        class_weight, loss_weight, loss_name, backend: see :class:`WeightedLoss`.
        smooth: s >= 0, in pixels.
        square_denominator: P_c sums p_c^2, as in V-Net (Milletari et al. 2016,
            https://arxiv.org/abs/1606.04797, section 3).
        region_reduction: 'image' (loss of each image, then the mean) or 'batch' (sums over the batch first).
        absent_classes: 'include', or 'ignore' to leave classes without a true pixel out of the mean.
        sync_region: with 'batch', sum over all ranks too: n ranks of b images are one rank of n b.
    """

    def __init__(self, class_weight: ClassWeight = None, *, loss_name: str = 'loss_dice', **kwargs) -> None:
        super().__init__(class_weight=class_weight, loss_name=loss_name, **kwargs)

    def compute(self, stats: SoftStats, class_weight: Tensor | None) -> Tensor:
        return self.dice(self.reduce(stats), class_weight)


class _LogTerm(nn.Module):
    """A part of a loss that was computed with it: its detached value, under a name of its own."""

    def __init__(self, loss_name: str) -> None:
        super().__init__()
        self.loss_name = loss_name
        self.value: Tensor | None = None

    def forward(self, *args: object, **kwargs: object) -> Tensor | None:
        return self.value


@MODELS.register_module()
class CombinedWeightedLoss(_PixelTerm, _RegionTerm, nn.ModuleList):
    """``ce_weight`` * cross-entropy + ``dice_weight`` * Dice loss, both weighted by class, from one pass.

    Both parts appear in the log, unweighted: a decode head logs every entry of a ModuleList by its name
    and MMEngine adds only names with 'loss' to the total, so this loss is the list of itself and its
    parts. Inside a list of losses a head logs the sum alone.

    Args:
        ce_weight, dice_weight: >= 0.
        focal_gamma, label_smoothing: of the cross-entropy, see :class:`WeightedCrossEntropyLoss`.
        smooth, square_denominator, region_reduction, absent_classes: of the Dice loss, see
            :class:`WeightedDiceLoss`.
        sync_region: here for both parts: cross-entropy is a ratio of sums over all ranks as well.
        class_weight, loss_weight, loss_name, backend: see :class:`WeightedLoss`.
    """

    def __init__(
        self,
        ce_weight: float = 0.6,
        dice_weight: float = 0.4,
        smooth: float = 1.0,
        square_denominator: bool = False,
        class_weight: ClassWeight = None,
        region_reduction: str = 'image',
        absent_classes: str = 'include',
        sync_region: bool = False,
        focal_gamma: float = 0.0,
        label_smoothing: float = 0.0,
        loss_weight: float = 1.0,
        loss_name: str = 'loss_combined',
        backend: str = 'auto',
    ) -> None:
        super().__init__(
            class_weight=class_weight,
            loss_weight=loss_weight,
            loss_name=loss_name,
            backend=backend,
            focal_gamma=focal_gamma,
            label_smoothing=label_smoothing,
            smooth=smooth,
            square_denominator=square_denominator,
            region_reduction=region_reduction,
            absent_classes=absent_classes,
            sync_region=sync_region,
        )
        _check_at_least_0(ce_weight=ce_weight, dice_weight=dice_weight)
        self.ce_weight = ce_weight
        self.dice_weight = dice_weight
        stem = loss_name.replace('loss', '').strip('_.')
        self.parts = nn.ModuleDict({part: _LogTerm(f'{stem}_{part}'.lstrip('_')) for part in ('ce', 'dice')})

    def __iter__(self):
        return iter((self, *self.parts.values()))

    def __len__(self) -> int:
        return 1 + len(self.parts)

    def __getitem__(self, index: object) -> None:
        raise TypeError(
            'CombinedWeightedLoss is one loss; for a head that picks its losses by position write '
            'loss_decode as a list'
        )

    __repr__ = nn.Module.__repr__  # ModuleList's would walk the list, which begins with this object

    def compute(self, stats: SoftStats, class_weight: Tensor | None) -> Tensor:
        stats = self.reduce(stats)
        ce = self.cross_entropy(stats, class_weight)
        dice = self.dice(stats, class_weight)
        self.parts['ce'].value, self.parts['dice'].value = ce.detach(), dice.detach()
        return self.ce_weight * ce + self.dice_weight * dice
