"""The losses: MMSegmentation's calling convention written once, then one short class per formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TypeVar

import torch
from mmengine.fileio import load
from mmengine.logging import MessageHub
from torch import Tensor, nn

from mmseg_imbalance import functional
from mmseg_imbalance.ops import SoftStats, soft_stats
from mmseg_imbalance.registry import MODELS
from mmseg_imbalance.weighting import log_prior

REGIONS = ('dice', 'jaccard', 'tversky', 'generalized_dice')
ClassWeight = None | str | Path | Sequence[float] | Mapping[str, float]
Number = TypeVar('Number', int, float)


class WeightedLoss(nn.Module):
    """What a decode head needs of a loss: weights, ignored pixels, a name, one scalar.

    Subclasses compute it from :class:`~mmseg_imbalance.ops.SoftStats`, class by class, in :meth:`compute`.

    Args:
        class_weight: one number >= 0 per class: None (all 1); a list; a dict by class name (classes
            that it leaves out weigh 1); the path of a JSON file that ``tools/class_weights.py`` wrote;
            or 'auto', which :class:`~mmseg_imbalance.hooks.ClassWeightHook` fills before training.
        logit_adjustment: tau >= 0; tau ln f_c is added to the logits, f_c the class's share of the training
            pixels, 0.3 to 1 as a rule (Menon et al. 2021, https://arxiv.org/abs/2007.07314, equation 10).
        logit_variation: sigma >= 0; in training |clamp(e, -1, 1)| rho_c is added to every logit as the head
            predicts it, e ~ N(0, sigma^2), rho_c = -ln f_c over its largest; 4 in the source (Balanced
            Logit Variation, Wang et al., CVPR 2023, https://arxiv.org/abs/2306.02061).
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
        logit_adjustment: float = 0.0,
        logit_variation: float = 0.0,
        loss_weight: float = 1.0,
        loss_name: str = 'loss',
        backend: str = 'auto',
    ) -> None:
        super().__init__()
        if 'loss' not in loss_name:
            raise ValueError(
                f"loss_name must contain 'loss', got {loss_name!r}; MMEngine adds only such names up"
            )
        _check_at_least_0(logit_adjustment=logit_adjustment, logit_variation=logit_variation)
        self.logit_adjustment = logit_adjustment
        self.logit_variation = logit_variation
        self.log_prior: Tensor | None = None  # (C,) ln f_c
        self.loss_weight = loss_weight
        self.loss_name = loss_name
        self.backend = backend
        # no buffer: averaged copies of a model pair buffers by position, and this one is filled late
        self.class_weight: Tensor | None = None
        self.pending: str | dict[str, float] | None = None
        self.weight_classes: list[str] | None = None
        # (B,) of the last batch, None if the logits were changed first; heads log the accuracy from it
        self.correct: Tensor | None = None
        # what the package's heads log beside the loss: no name contains 'loss', so none is added to it
        self.logged: dict[str, Tensor] = {}
        # shown each batch while training; ClassBalanceHook puts it here
        self.watcher: Callable[[Tensor, SoftStats, Tensor], None] | None = None
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

    @property
    def changes_logits(self) -> bool:
        return self.logit_adjustment > 0 or (self.logit_variation > 0 and self.training)

    @property
    def needs_class_pixels(self) -> bool:
        """Whether the class frequency of the training data is missing; the hook fills it."""
        return self.log_prior is None and (self.logit_adjustment > 0 or self.logit_variation > 0)

    def set_class_pixels(self, pixels: Sequence[float] | Tensor) -> None:
        """Take the priors of ``logit_adjustment`` and ``logit_variation`` from these pixels of each class."""
        pixels = pixels.tolist() if hasattr(pixels, 'tolist') else list(pixels)
        _check_weights(pixels, f'class pixels {pixels}')
        self.log_prior = torch.from_numpy(log_prior(pixels)).float()

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
        predicted = pred
        if pred.ndim == 3:
            pred, target = pred[:, :, None], target[:, None]
            weight = None if weight is None else weight[:, None]
        if pred.shape[1] == 1:
            pred = torch.cat([torch.zeros_like(pred), pred], 1)
        if self.changes_logits:
            self._match_class_pixels(pred)
        if self.logit_variation > 0 and self.training:
            pred = pred + self._variation(pred)
        if ignore_index is None:
            ignore_index = torch.iinfo(torch.int64).min  # a number that no label has
        own_weight, group, num_groups = self.weigh_pixels(pred, target, ignore_index, align_corners, features)
        if own_weight is not None:
            weight = own_weight if weight is None else weight * own_weight
        watcher = self.watcher if self.training else None
        stats = soft_stats(
            pred,
            target,
            pixel_weight=weight,
            logit_bias=self.logit_adjustment * self.log_prior if self.logit_adjustment > 0 else None,
            ignore_index=ignore_index,
            focal_gamma=self.focal_gamma,
            square_prediction=self.square_denominator,
            with_log_prob=self.label_smoothing > 0,
            with_recall=watcher is not None,
            group=group,
            num_groups=num_groups,
            align_corners=align_corners,
            backend=self.backend,
        )
        self.correct = None if self.changes_logits else stats.correct
        parts = self.compute(stats, self._weight_for(pred))
        if watcher is not None:
            watcher(predicted, stats, parts.detach())
        return self.loss_weight * self.total(parts)

    def weigh_pixels(
        self, pred: Tensor, target: Tensor, ignore_index: int, align_corners: bool, features: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, int]:
        """(B, H, W) weights besides the head's, group ids of the pixels, and the number of groups."""
        return None, None, 0

    def compute(self, stats: SoftStats, class_weight: Tensor | None) -> Tensor:
        """What each class adds to the loss, (C,), from the sums of a batch and the (C,) weights."""
        raise NotImplementedError

    def total(self, parts: Tensor) -> Tensor:
        """The scalar that the parts of the classes, (C,), add up to."""
        return parts.sum()

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

    def _match_class_pixels(self, pred: Tensor) -> None:
        if self.log_prior is None:
            raise RuntimeError(
                f'logit_adjustment and logit_variation of {type(self).__name__} have no class frequency yet. '
                "Add custom_hooks = [dict(type='ClassWeightHook')] to the config: it counts the "
                'training annotations before the first iteration. Outside a runner, call set_class_pixels'
            )
        if len(self.log_prior) != pred.shape[1]:
            raise ValueError(
                f'the class frequency is that of {len(self.log_prior)} classes, but the head predicts '
                f'{pred.shape[1]}'
            )
        if self.log_prior.device != pred.device:
            self.log_prior = self.log_prior.to(pred.device)

    def _variation(self, pred: Tensor) -> Tensor:
        rarity = self.log_prior / self.log_prior.min()  # (C,), 1 for the rarest
        noise = torch.randn_like(pred).mul_(self.logit_variation).clamp_(-1, 1).abs_()
        return noise.mul_(rarity.to(noise)[:, None, None])

    def _match_class_names(self) -> None:
        if isinstance(self.pending, dict):
            self.set_class_weight(in_class_order(self.pending, 1.0, 'class_weight'))
        elif (classes := _class_names()) is not None and classes != self.weight_classes:
            raise ValueError(
                f'the class_weight file is for the classes {self.weight_classes}, but the data set has '
                f'{classes}; write one for it with tools/class_weights.py CONFIG --out FILE'
            )
        self.weight_classes = None


def _class_names() -> list[str] | None:
    # MMEngine's runner leaves the training data set's description in the message hub
    meta = MessageHub.get_current_instance().get_info('dataset_meta') or {}
    return None if meta.get('classes') is None else list(meta['classes'])


def in_class_order(values: Mapping[str, Number], default: Number, name: str) -> list[Number]:
    """What is given by class name as a list in the order of the training data set's classes.

    Raises:
        RuntimeError: nobody has said which data set that is.
        ValueError: a name that it does not have.
    """
    classes = _class_names()
    if classes is None:
        raise RuntimeError(
            f'{name} by name needs the class names of a training data set, which a runner '
            'provides; outside a runner give a list in the order of the classes'
        )
    if unknown := sorted(set(values) - set(classes)):
        raise ValueError(
            f'{name} names {unknown}, which the data set does not have; its classes are {classes}'
        )
    return [values.get(c, default) for c in classes]


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
        if not (isinstance(value, Real) and math.isfinite(value) and value >= 0):
            raise ValueError(f'{name} must be a finite number, at least 0, got {value!r}')


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
        return functional.cross_entropy_parts(stats, class_weight, self.label_smoothing)


class _RegionTerm(WeightedLoss):
    """Options of the overlap part."""

    def __init__(
        self,
        *,
        region: str = 'dice',
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float = 1.0,
        smooth: float = 1.0,
        square_denominator: bool = False,
        region_reduction: str = 'image',
        absent_classes: str = 'include',
        sync_region: bool = False,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        if (alpha, beta) != (None, None) and region != 'tversky':
            raise ValueError(f"alpha={alpha} and beta={beta} are of region='tversky', got {region!r}")
        alpha, beta = 0.3 if alpha is None else alpha, 0.7 if beta is None else beta
        _check_at_least_0(alpha=alpha, beta=beta, smooth=smooth)
        if alpha == beta == 0:
            raise ValueError('alpha and beta must not both be 0: the index would be 1 for any prediction')
        if not 0 < gamma < math.inf:
            raise ValueError(f'gamma must be a finite number above 0, got {gamma}')
        _check_choice('region', region, REGIONS)
        _check_choice('region_reduction', region_reduction, ('image', 'batch'))
        _check_choice('absent_classes', absent_classes, ('include', 'ignore'))
        if square_denominator and region == 'tversky':
            raise ValueError(
                'square_denominator=True is for dice, jaccard and generalized_dice: a Tversky index of '
                'squared predictions can leave [0, 1]'
            )
        if sync_region and region_reduction != 'batch':
            raise ValueError(
                "sync_region=True sums over the batches of all ranks, so it needs region_reduction='batch', "
                f'got {region_reduction!r}'
            )
        self.region = region
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.smooth = smooth
        self.square_denominator = square_denominator
        self.region_reduction = region_reduction
        self.absent_classes = absent_classes
        self.sync_region = sync_region

    def reduce(self, stats: SoftStats) -> SoftStats:
        if self.region_reduction == 'image':
            return stats
        return stats.sum_images(across_ranks=self.sync_region)

    def region_loss(self, stats: SoftStats, class_weight: Tensor | None) -> Tensor:
        if self.region == 'generalized_dice':
            return functional.generalized_dice_parts(
                stats, class_weight, self.smooth, self.absent_classes, gamma=self.gamma
            )
        if self.region == 'tversky':
            index = functional.tversky(stats, self.alpha, self.beta, self.smooth)
        else:
            index = getattr(functional, self.region)(stats, self.smooth)
        return functional.region_parts(
            index, stats.truth, class_weight, gamma=self.gamma, absent_classes=self.absent_classes
        )


@MODELS.register_module()
class WeightedCrossEntropyLoss(_PixelTerm):
    """Cross-entropy sum_c w_c nll_c / sum_c w_c truth_c: PyTorch's weighted mean over the pixels.

    Unlike the framework's, it averages over valid pixels only and takes class weights together with
    ignored ones.

    Args:
        label_smoothing: in [0, 1), as in ``F.cross_entropy``.
        focal_gamma: see :class:`WeightedFocalLoss`.
        **kwargs: of :class:`WeightedLoss`.
    """

    def __init__(self, class_weight: ClassWeight = None, *, loss_name: str = 'loss_ce', **kwargs) -> None:
        super().__init__(class_weight=class_weight, loss_name=loss_name, **kwargs)

    def compute(self, stats: SoftStats, class_weight: Tensor | None) -> Tensor:
        return self.cross_entropy(stats, class_weight)


@MODELS.register_module()
class WeightedFocalLoss(WeightedCrossEntropyLoss):
    """Focal loss: cross-entropy with the factor (1 - p_y)^gamma on each pixel; softmax, not sigmoid.

    The norm stays that of cross-entropy, the sum of the weights of the pixels, as in the framework's.

    Args:
        class_weight: here also known as the per-class alpha.
        gamma: >= 0; 0 is cross-entropy.
        **kwargs: of :class:`WeightedCrossEntropyLoss`.

    Source: Lin et al. 2017, https://arxiv.org/abs/1708.02002, equation 5, there of two classes.
    """

    def __init__(
        self, class_weight: ClassWeight = None, *, gamma: float = 2.0, loss_name: str = 'loss_focal', **kwargs
    ) -> None:
        _check_at_least_0(gamma=gamma)
        super().__init__(class_weight, focal_gamma=gamma, loss_name=loss_name, **kwargs)


@MODELS.register_module()
class WeightedTverskyLoss(_RegionTerm):
    """Tversky loss sum_c w_c (1 - TI_c)^gamma / sum_c w_c, TI = (I + s) / (I + a (P - I) + b (T - I) + s).

    Args:
        alpha: a >= 0, weighs false positives; 0.3 without.
        beta: b >= 0, weighs false negatives; 0.7 without.
        gamma: > 0, on each class before the mean; other than 1 it is the focal Tversky loss. Below 1 it
            raises what well-segmented classes count, above 1 what badly segmented ones do.
        smooth: s >= 0, in pixels.
        region_reduction: 'image' (loss of each image, then the mean) or 'batch' (sums over the batch first).
        absent_classes: 'include', or 'ignore' to leave classes without a true pixel out of the mean.
        sync_region: with 'batch', sum over all ranks too: n ranks of b images are one rank of n b.
        **kwargs: of :class:`WeightedLoss`.

    Source: Salehi et al. 2017, https://arxiv.org/abs/1706.05721, equation 4; Abraham & Khan 2018,
    https://arxiv.org/abs/1810.07842, equation 4, whose gamma is 1 / gamma here.
    """

    region = 'tversky'

    def __init__(
        self, class_weight: ClassWeight = None, *, loss_name: str | None = None, **kwargs: object
    ) -> None:
        loss_name = f'loss_{self.region}' if loss_name is None else loss_name
        super().__init__(region=self.region, class_weight=class_weight, loss_name=loss_name, **kwargs)

    def compute(self, stats: SoftStats, class_weight: Tensor | None) -> Tensor:
        return self.region_loss(self.reduce(stats), class_weight)


@MODELS.register_module()
class WeightedDiceLoss(WeightedTverskyLoss):
    """Dice loss of each class, weighted: sum_c w_c (1 - (2 I_c + s) / (P_c + T_c + s)) / sum_c w_c.

    Args:
        square_denominator: P_c sums p_c^2, as in V-Net (Milletari et al. 2016,
            https://arxiv.org/abs/1606.04797, section 3).
        **kwargs: of :class:`WeightedTverskyLoss` but alpha and beta, which are 1/2 here.
    """

    region = 'dice'


@MODELS.register_module()
class WeightedJaccardLoss(WeightedTverskyLoss):
    """Jaccard (soft IoU) loss, weighted: sum_c w_c (1 - (I_c + s) / (P_c + T_c - I_c + s)) / sum_c w_c.

    Args:
        **kwargs: of :class:`WeightedDiceLoss`.

    Source: Rahman & Wang 2016, https://doi.org/10.1007/978-3-319-50835-1_22.
    """

    region = 'jaccard'


@MODELS.register_module()
class GeneralizedDiceLoss(WeightedTverskyLoss):
    """1 - (2 sum_c w_c I_c + s) / (sum_c w_c (P_c + T_c) + s): one overlap of all classes, each weighted.

    Args:
        class_weight: w; None: 1 / T_c^2 of the image itself, which is the source's.
        **kwargs: of :class:`WeightedDiceLoss`.

    Source: Sudre et al. 2017, https://arxiv.org/abs/1707.03237, section 2.1.
    """

    region = 'generalized_dice'


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
    """A pixel term and a region term, both weighted by class, from one pass: 0.6 CE + 0.4 Dice loss.

    ``focal_gamma`` makes the pixel term focal loss; ``region`` chooses the other: focal + Dice,
    cross-entropy + focal Tversky and all the rest. Both appear in the log, unweighted: a decode head logs
    every entry of a ModuleList by its name and MMEngine adds only names with 'loss' to the total, so this
    loss is the list of itself and its parts. Inside a list of losses a head logs the sum alone.

    Args:
        ce_weight, dice_weight: >= 0, factors on the pixel and the region term, whichever they are.
        region: 'dice', 'jaccard', 'tversky' or 'generalized_dice'.
        alpha, beta, gamma, smooth, square_denominator, region_reduction, absent_classes: of the region
            term, see :class:`WeightedTverskyLoss` and :class:`WeightedDiceLoss`.
        sync_region: here for both parts: cross-entropy is a ratio of sums over all ranks as well.
        focal_gamma, label_smoothing: of the pixel term, see :class:`WeightedCrossEntropyLoss`.
        balance: 'fixed', or 'uncertainty': sum_t exp(-s_t) L_t + s_t / 2 with learnt log-variances s, which
            start where exp(-s) is the fixed factor (Kendall et al. 2018, https://arxiv.org/abs/1705.07115,
            equation 10). They are parameters of the head, ``log_variance``, and logged as the parts are.
        **kwargs: of :class:`WeightedLoss`.
    """

    def __init__(
        self,
        ce_weight: float = 0.6,
        dice_weight: float = 0.4,
        smooth: float = 1.0,
        square_denominator: bool = False,
        class_weight: ClassWeight = None,
        *,
        balance: str = 'fixed',
        loss_name: str = 'loss_combined',
        **kwargs: object,
    ) -> None:
        super().__init__(
            smooth=smooth,
            square_denominator=square_denominator,
            class_weight=class_weight,
            loss_name=loss_name,
            **kwargs,
        )
        _check_at_least_0(ce_weight=ce_weight, dice_weight=dice_weight)
        _check_choice('balance', balance, ('fixed', 'uncertainty'))
        names = ['ce', self.region]
        if balance == 'uncertainty':
            if ce_weight == 0 or dice_weight == 0:
                raise ValueError(
                    "balance='uncertainty' starts from both terms: ce_weight and dice_weight must be above "
                    f'0, got {ce_weight} and {dice_weight}'
                )
            self.log_variance = nn.Parameter(-torch.tensor([ce_weight, dice_weight]).log())
            names += [f'{name}_log_variance' for name in names]
        self.balance = balance
        self.ce_weight = ce_weight
        self.dice_weight = dice_weight
        stem = loss_name.replace('loss', '').strip('_.')
        self.parts = nn.ModuleDict({name: _LogTerm(f'{stem}_{name}'.lstrip('_')) for name in names})

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
        terms = [self.cross_entropy(stats, class_weight), self.region_loss(stats, class_weight)]  # (C,) each
        factors = self.ce_weight, self.dice_weight
        logged = [term.detach().sum() for term in terms]
        if self.balance == 'uncertainty':
            s = self.log_variance.to(terms[0])
            factors = torch.exp(-s).unbind()
            logged += s.detach().unbind()
        for part, value in zip(self.parts.values(), logged, strict=True):
            part.value = value
        return factors[0] * terms[0] + factors[1] * terms[1]

    def total(self, parts: Tensor) -> Tensor:
        if self.balance == 'fixed':
            return parts.sum()
        return parts.sum() + self.log_variance.to(parts).sum() / 2  # which belongs to no class
