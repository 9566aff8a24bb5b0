"""The losses: MMSegmentation's calling convention written once, then one short class per formula.

Losses that do more than a formula on the sums have modules of their own: :mod:`~mmseg_imbalance.hardness`,
:mod:`~mmseg_imbalance.recall`, :mod:`~mmseg_imbalance.skeleton` and :mod:`~mmseg_imbalance.subclass`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from mmseg_imbalance.registry import MODELS

import torch
from torch import Tensor, nn

from mmseg_imbalance.balance import make_balance
from mmseg_imbalance.class_weight import ClassWeight, ClassWeightSpec
from mmseg_imbalance.ops import SoftStats, check_arguments, choose_backend, soft_stats
from mmseg_imbalance.options import (
    check_at_least_0,
    not_handed_over,
    refuse_other_reductions,
    take,
    unknown_options,
)
from mmseg_imbalance.terms import CrossEntropy, Overlap, Term, pass_options

Watcher = Callable[[Tensor, Tensor, SoftStats, Tensor], None]
INDEX_OPTIONS = [name for name in Overlap.OPTIONS if name not in ('alpha', 'beta')]


class Batch(NamedTuple):
    """What a loss looks at."""

    logits: Tensor  # (B, C, h, w)
    target: Tensor  # (B, H, W)
    ignore_index: int | None = 255
    align_corners: bool = False
    features: Tensor | None = None  # (B, D, h', w'), see forward


class WeightedLoss(nn.Module):
    """A loss made of terms, sum_t factor_t term_t, from one pass over the pixels, as a decode head calls it.

    Args:
        terms: (term, factor >= 0) by the name that the log gives the term, see :mod:`mmseg_imbalance.terms`;
            a third, a :class:`~mmseg_imbalance.class_weight.ClassWeight`, if it has class weights of its own.
        class_weight: one number >= 0 per class: None (all 1); a list; a dict by class name (classes that it
            leaves out weigh 1); the path of a file that ``mmseg-imbalance class-weights CONFIG --out FILE``
            wrote; or 'auto', which :class:`~mmseg_imbalance.hooks.ClassWeightHook` fills before training.
        balance: 'fixed', or where there are several terms 'uncertainty', which starts from the factors, or
            'gradnorm', which keeps their sum; they change the factors while training, see
            :mod:`mmseg_imbalance.balance`. Its options go into a dict, dict(type='gradnorm', asymmetry=0.5).
        logit_adjustment: tau >= 0; tau ln f_c is added to the logits, f_c the class's share of the training
            pixels, 0.3 to 1 as a rule (Menon et al. 2021, https://arxiv.org/abs/2007.07314, equation 10).
        logit_variation: sigma >= 0; in training |clamp(e, -1, 1)| rho_c is added to every logit as the head
            predicts it, e ~ N(0, sigma^2), rho_c = -ln f_c over its largest; 4 in the source (Balanced
            Logit Variation, Wang et al., CVPR 2023, https://arxiv.org/abs/2306.02061).
        loss_weight: factor on the loss.
        loss_name: key in the log; must contain 'loss', else MMEngine leaves it out of the total. None:
            'loss_' and the names of the terms.
        backend: of :func:`~mmseg_imbalance.ops.soft_stats`.

    Raises:
        TypeError: an option that the loss does not have.
        ValueError: a weight that is negative, NaN or infinite, or an argument out of its range.
        FileNotFoundError: no file at the path given as ``class_weight``.
    """

    needs_features = False  # of a loss that looks at what enters the classifier; see forward
    term_options: Collection[str] = ()  # options in the config that become fields of the terms

    def __init__(
        self,
        terms: Mapping[str, tuple[Term, float] | tuple[Term, float, ClassWeight]],
        /,
        class_weight: ClassWeightSpec = None,
        *,
        balance: str | Mapping[str, Any] = 'fixed',
        logit_adjustment: float = 0.0,
        logit_variation: float = 0.0,
        loss_weight: float = 1.0,
        loss_name: str | None = None,
        backend: str = 'auto',
        **unknown: object,
    ) -> None:
        if unknown:
            raise TypeError(unknown_options(unknown, type(self), WeightedLoss))
        if not terms or any('loss' in name for name in terms):
            raise ValueError(
                f"a loss has at least one term, and no name of a term contains 'loss', got {list(terms)}; "
                'MMEngine would add it to the total'
            )
        super().__init__()
        self.loss_name = '_'.join(['loss', *terms]) if loss_name is None else loss_name
        if 'loss' not in self.loss_name:
            raise ValueError(
                f"loss_name must contain 'loss', got {loss_name!r}; MMEngine adds only such names up"
            )
        check_at_least_0(
            logit_adjustment=logit_adjustment, logit_variation=logit_variation, loss_weight=loss_weight
        )
        self.logit_adjustment = logit_adjustment
        self.logit_variation = logit_variation
        self.class_weight = ClassWeight(
            class_weight,
            logit_adjustment > 0 or logit_variation > 0,
            type(self).__name__,
            # an overlap is a ratio, in which the scale of the weights cancels out
            mean_of_1=any(getattr(term, 'divide_by', None) == 'pixels' for term, *_ in terms.values()),
        )
        self.loss_weight = loss_weight
        self.backend = backend
        self.terms = {name: term for name, (term, *_) in terms.items()}
        self.factors = {name: factor for name, (_, factor, *_) in terms.items()}
        self.class_weight_of = {
            name: own[0] if own else self.class_weight for name, (_, _, *own) in terms.items()
        }
        check_at_least_0(**{f'the factor of {name!r}': factor for name, factor in self.factors.items()})
        if not any(self.factors.values()):
            raise ValueError(
                f'all factors on the terms of {type(self).__name__} are 0, {self.factors}; one has to be '
                'above 0. A loss that shall not count gets loss_weight=0'
            )
        self.pass_options = pass_options(self.terms)
        self.needs_marked = any(getattr(term, 'needs_marked', False) for term in self.terms.values())
        self.balance = make_balance(balance, self.factors)
        # (B,) right pixels of the last batch, None if the logits were changed; heads log the accuracy from it
        self.correct: Tensor | None = None
        # scalars for the log beside the loss, without 'loss' in their names, so that none is added to it
        self.logged: dict[str, Tensor] = {}
        # shown (pred, target, stats, parts) of each batch while training; see watch
        self.watchers: list[Watcher] = []

    def __getitem__(self, index: object) -> None:
        raise TypeError(
            f'{type(self).__name__} is one loss; for a head that picks its losses by position write '
            'loss_decode as a list'
        )

    @property
    def class_weights(self) -> list[ClassWeight]:
        """``class_weight``, and those that terms have of their own."""
        return list(dict.fromkeys([self.class_weight, *self.class_weight_of.values()]))

    @property
    def changes_logits(self) -> bool:
        return self.logit_adjustment > 0 or (self.logit_variation > 0 and self.training)

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
        marked: Tensor | None = None,
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
            marked: (B, H, W) bool or uint8, where a term looks at marked pixels, as ``needs_marked`` says.
        """
        logits, target, weight = _as_images(pred, target, weight)
        check_arguments(logits, target, weight)
        if self.balance is not None:
            logits = logits.view_as(logits)  # a gradient by it, which GradNorm takes, runs no hooks on pred
        refuse_other_reductions(type(self).__name__, avg_factor, reduction_override, pred.shape[1])
        if self.needs_marked and marked is None:
            raise RuntimeError(not_handed_over(f'{type(self).__name__} needs the tubes around skeletons'))
        if self.logit_variation > 0 and self.training:
            logits = logits + self.class_weight.logit_noise(logits, self.logit_variation)
        own = self.weigh_pixels(Batch(logits, target, ignore_index, align_corners, features))
        if weight is not None:
            own['pixel_weight'] = weight * own['pixel_weight'] if 'pixel_weight' in own else weight
        watchers = self.watchers if self.training else []
        stats = soft_stats(
            logits,
            target,
            ignore_index=ignore_index,
            align_corners=align_corners,
            logit_bias=self.class_weight.logit_bias(logits, self.logit_adjustment),
            backend=self.backend,
            marked=marked if self.needs_marked else None,
            **dict(with_recall=bool(watchers)) | self.pass_options,
            **own,
        )
        if self.training and torch.is_grad_enabled() and not logits.requires_grad:
            self._warn_of_logits_without_gradient()
        self.correct = None if self.changes_logits else stats.correct
        parts, value = self.combine(stats, logits)
        self.learn(stats)
        for watcher in watchers:
            watcher(pred, target, stats, parts.detach())
        plain = isinstance(self.loss_weight, float) and self.loss_weight == 1
        return value if plain else self.loss_weight * value  # one launch less

    def weigh_pixels(self, batch: Batch) -> dict[str, Any]:
        """The loss's own ``pixel_weight``, ``group`` and ``num_groups`` of ``soft_stats``, if it has them."""
        return {}

    def combine(self, stats: SoftStats, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What each class adds to the loss, (C,), and the scalar; leaves the terms in ``logged``."""
        # evaluation waits for nobody: ranks may have other numbers of batches
        if self.training and any(getattr(term, 'sync', False) for term in self.terms.values()):
            stats = stats.sum_images(across_ranks=True)  # once, for all terms
        weights = {name: own.for_logits(stats.nll) for name, own in self.class_weight_of.items()}
        if self.balance is None and not stats.truth.requires_grad and self._on_triton(logits):
            from mmseg_imbalance import term_kernel  # Triton is optional

            formula = term_kernel.formula_of(self.terms, self.factors)
            if formula is not None:
                value, values, parts = term_kernel.weighted_sum_of_terms(stats, weights, formula)
                self._log(values)
                return parts, value
        parts = [term.parts(stats, weights[name]) for name, term in self.terms.items()]  # (C,) each
        sums = [part.sum() for part in parts]
        factors, offset = self.factors.values(), 0.0
        self._log({name: x.detach() for name, x in zip(self.terms, sums, strict=True)})
        if self.balance is not None:
            balanced = self.balance(sums, logits)
            factors, offset = balanced.factors.unbind(), balanced.offset  # the offset belongs to no class
            for word, values in balanced.logged.items():
                names = [f'{name}_{word}' for name in self.terms]
                self.logged |= self._named(dict(zip(names, values, strict=True)))
        weighed = sum(factor * part for factor, part in zip(factors, parts, strict=True))
        return weighed, weighed.sum() + offset

    def _warn_of_logits_without_gradient(self) -> None:
        """Of another loss autograd says so; that of parameters hides it."""
        if any(parameter.requires_grad for parameter in self.parameters()):
            warnings.warn(
                f'the logits that {type(self).__name__} receives have no gradient: its own parameters learn, '
                'but not the model. Is the head frozen, or does the reentrant variant of activation '
                'checkpointing run on it?',
                stacklevel=3,
            )

    def _on_triton(self, logits: Tensor) -> bool:
        return choose_backend(self.backend, logits).__name__.endswith('.triton')

    def _log(self, values: Mapping[str, Tensor]) -> None:
        """Of a single term the log has the loss itself."""
        if len(values) > 1:
            self.logged = self._named(values)

    def watch(self, watcher: Watcher) -> None:
        """Show it every batch while training, in place of an earlier one of its class."""
        self.unwatch(type(watcher))
        self.watchers.append(watcher)

    def unwatch(self, kind: type) -> None:
        self.watchers = [watcher for watcher in self.watchers if type(watcher) is not kind]

    def learn(self, stats: SoftStats) -> None:
        """Called with the sums of each batch; for losses that have a state."""

    def take_logged(self) -> dict[str, Tensor]:
        """The scalars of ``logged``, which is empty then: whoever puts them into the log takes them."""
        logged, self.logged = self.logged, {}
        return logged

    def _named(self, scalars: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scalars as the log names them: 'combined_ce' is the term 'ce' of the loss 'loss_combined'."""
        stem = self.loss_name.replace('loss', '').strip('_.')
        return {f'{stem}_{name}'.lstrip('_'): value for name, value in scalars.items()}


def _as_images(pred: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sampled points as images of one row, and a single output channel as the logits [0, z]."""
    if pred.ndim == 3 and target.ndim == 2:
        pred, target = pred[:, :, None], target[:, None]
        weight = None if weight is None else torch.atleast_1d(weight)[:, None]
    if pred.ndim == 4 and pred.shape[1] == 1:
        pred = torch.cat([torch.zeros_like(pred), pred], 1)
    return pred, target, weight


@MODELS.register_module()
class WeightedCrossEntropyLoss(WeightedLoss):
    """Cross-entropy sum_c w_c nll_c / sum_c w_c truth_c: PyTorch's weighted mean over the pixels.

    MMSegmentation's averages over ignored pixels too. This one averages over valid pixels only, and takes
    class weights together with ignored pixels.

    Args:
        class_weight: see :class:`WeightedLoss`.
        **options: focal_gamma, label_smoothing and divide_by of
            :class:`~mmseg_imbalance.terms.CrossEntropy`; those of :class:`WeightedLoss`.
    """

    term_options = CrossEntropy.OPTIONS

    def __init__(self, class_weight: ClassWeightSpec = None, **options: Any) -> None:
        term = take(CrossEntropy, options)
        super().__init__({'ce': (term, 1.0)}, class_weight, **options)


@MODELS.register_module()
class WeightedFocalLoss(WeightedLoss):
    """Focal loss: cross-entropy with the factor (1 - p_y)^gamma on each pixel; softmax, not sigmoid.

    The norm stays that of cross-entropy, the sum of the weights of the pixels, as in MMSegmentation's.

    Args:
        class_weight: here also known as the per-class alpha.
        gamma: >= 0; 0 is cross-entropy.
        **options: label_smoothing and divide_by of :class:`~mmseg_imbalance.terms.CrossEntropy`; those of
            :class:`WeightedLoss`.

    Source: Lin et al. 2017, https://arxiv.org/abs/1708.02002, equation 5, there of two classes.
    """

    term_options = ('label_smoothing', 'divide_by')

    def __init__(self, class_weight: ClassWeightSpec = None, *, gamma: float = 2.0, **options: Any) -> None:
        check_at_least_0(gamma=gamma)
        own = {name: options.pop(name) for name in self.term_options if name in options}
        super().__init__({'focal': (CrossEntropy(gamma, **own), 1.0)}, class_weight, **options)


@MODELS.register_module()
class WeightedTverskyLoss(WeightedLoss):
    """Tversky loss sum_c w_c (1 - TI_c)^gamma / sum_c w_c, TI = (I + s) / (I + a (P - I) + b (T - I) + s).

    alpha weighs false positives and beta false negatives. Some other libraries have it the other way round.

    Args:
        class_weight: see :class:`WeightedLoss`.
        **options: alpha (0.3 without), beta (0.7 without), gamma, smooth, absent_classes of
            :class:`~mmseg_imbalance.terms.Overlap`, and its reduction and sync under the names
            region_reduction and sync_region; those of :class:`WeightedLoss`.

    Source: Salehi et al. 2017, https://arxiv.org/abs/1706.05721, equation 4; Abraham & Khan 2018,
    https://arxiv.org/abs/1810.07842, equation 4, whose gamma is 1 / gamma here.
    """

    index = 'tversky'
    term_options = Overlap.OPTIONS

    def __init__(self, class_weight: ClassWeightSpec = None, **options: Any) -> None:
        term = take(Overlap, options, self.index)
        super().__init__({self.index: (term, 1.0)}, class_weight, **options)


@MODELS.register_module()
class WeightedDiceLoss(WeightedTverskyLoss):
    """Dice loss of each class, weighted: sum_c w_c (1 - (2 I_c + s) / (P_c + T_c + s)) / sum_c w_c.

    Args:
        square_denominator: P_c sums p_c^2, as in V-Net (Milletari et al. 2016,
            https://arxiv.org/abs/1606.04797, section 3).
        **options: of :class:`WeightedTverskyLoss` but alpha and beta, which are 1/2 here.
    """

    index = 'dice'
    term_options = INDEX_OPTIONS


@MODELS.register_module()
class WeightedJaccardLoss(WeightedTverskyLoss):
    """Jaccard (soft IoU) loss, weighted: sum_c w_c (1 - (I_c + s) / (P_c + T_c - I_c + s)) / sum_c w_c.

    Args:
        **options: of :class:`WeightedDiceLoss`.

    Source: Rahman & Wang 2016, https://doi.org/10.1007/978-3-319-50835-1_22.
    """

    index = 'jaccard'
    term_options = INDEX_OPTIONS


@MODELS.register_module()
class GeneralizedDiceLoss(WeightedTverskyLoss):
    """1 - (2 sum_c w_c I_c + s) / (sum_c w_c (P_c + T_c) + s): one overlap of all classes, each weighted.

    Args:
        class_weight: w, which is scaled to sum_c w_c T_c = sum_c T_c, so that s counts pixels; None:
            1 / T_c^2 of the image itself, which is the source's.
        **options: of :class:`WeightedDiceLoss`.

    Source: Sudre et al. 2017, https://arxiv.org/abs/1707.03237, section 2.1.
    """

    index = 'generalized_dice'
    term_options = INDEX_OPTIONS


@MODELS.register_module()
class CombinedWeightedLoss(WeightedLoss):
    """Cross-entropy and an overlap loss, both weighted by class, from one pass: 0.6 CE + 0.4 Dice loss.

    ``focal_gamma`` makes the first term focal loss, ``region`` chooses the second: focal with Dice,
    cross-entropy with focal Tversky and all the rest. The log shows each term without its factor.

    Args:
        ce_weight, dice_weight: >= 0, factors on the first and the second term, whichever they are.
        region: 'dice', 'jaccard', 'tversky' or 'generalized_dice'.
        region_class_weight: class weights of the second term; 'same', or what ``class_weight`` can be. A
            weight of 0 leaves a class out of the mean of its overlaps.
        **options: focal_gamma, label_smoothing and divide_by of :class:`WeightedCrossEntropyLoss`; those of
            :class:`WeightedTverskyLoss` and :class:`WeightedDiceLoss` for the second term; those of
            :class:`WeightedLoss`. With sync_region, cross-entropy is a ratio of sums over all ranks as well.
    """

    term_options = (*CrossEntropy.OPTIONS, *Overlap.OPTIONS)

    def __init__(
        self,
        ce_weight: float = 0.6,
        dice_weight: float = 0.4,
        smooth: float = 1.0,
        square_denominator: bool = False,
        class_weight: ClassWeightSpec = None,
        *,
        region: str = 'dice',
        region_class_weight: ClassWeightSpec = 'same',
        loss_name: str = 'loss_combined',
        **options: Any,
    ) -> None:
        check_at_least_0(ce_weight=ce_weight, dice_weight=dice_weight)
        options |= dict(smooth=smooth, square_denominator=square_denominator)
        own = ()
        if not (isinstance(region_class_weight, str) and region_class_weight == 'same'):
            names = dict(owner=type(self).__name__, name='region_class_weight', words="'same', 'auto'")
            own = (ClassWeight(region_class_weight, **names),)
        terms = {
            'ce': (take(CrossEntropy, options), ce_weight),
            region: (take(Overlap, options, region), dice_weight, *own),
        }
        super().__init__(terms, class_weight, loss_name=loss_name, **options)
        self.region_class_weight = self.class_weight_of[region]
