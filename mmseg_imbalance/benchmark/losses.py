"""The losses on one batch: PyTorch's, this package's in each backend, and other libraries'."""

from functools import lru_cache, partial

import torch

from mmseg_imbalance.benchmark.case import IGNORED, Case, LossTrial, Row, by, make_batch, truth_of
from mmseg_imbalance.benchmark.formulas import (
    ce_and_dice,
    ce_and_dice_of_batch,
    ce_and_dice_of_present,
    ce_and_pooled_dice,
    cross_entropy,
    full_size,
    with_dice,
)
from mmseg_imbalance.functional import cross_entropy as cross_entropy_of
from mmseg_imbalance.functional import dice, region_loss
from mmseg_imbalance.ops import soft_stats

try:
    from mmseg_imbalance.losses import CombinedWeightedLoss
except ImportError:  # the torch core is there without MMSegmentation
    CombinedWeightedLoss = None


def combined(weight, backend):
    """CombinedWeightedLoss, or what it calls."""
    if CombinedWeightedLoss is not None:
        return CombinedWeightedLoss(class_weight=weight.tolist(), backend=backend)

    def loss(logits, target):
        stats = soft_stats(logits, target, backend=backend)
        return 0.6 * cross_entropy_of(stats, weight) + 0.4 * region_loss(dice(stats), stats.truth, weight)

    return loss


def framework(weight):
    from mmseg.registry import MODELS

    ce = MODELS.build(dict(type='mmseg.CrossEntropyLoss', avg_non_ignore=True))
    dice = MODELS.build(dict(type='mmseg.DiceLoss', use_sigmoid=False))

    def loss(logits, target):
        logits = full_size(logits, target)
        return 0.6 * ce(logits, target, ignore_index=IGNORED) + 0.4 * dice(logits, target)

    return loss


def monai(weight):
    from monai.losses import DiceLoss

    # its mean over the classes does not divide by the weights
    options = dict(softmax=True, to_onehot_y=True, smooth_nr=1, smooth_dr=1, ignore_index=IGNORED)
    dice = DiceLoss(weight=weight / weight.mean(), **options)
    return partial(with_dice(lambda logits, target, _: dice(logits, target[:, None])), weight=weight)


def smp(weight):
    from segmentation_models_pytorch.losses import DiceLoss

    dice = DiceLoss('multiclass', smooth=0.5, ignore_index=IGNORED, class_weights=weight)
    return partial(with_dice(lambda logits, target, _: dice(logits, target)), weight=weight)


def kornia(weight):
    from kornia.losses import DiceLoss

    dice = DiceLoss('macro', weight=weight, ignore_index=IGNORED)
    return partial(with_dice(lambda logits, target, _: dice(logits, target)), weight=weight)


def compiled(weight):
    torch.compiler.reset()  # else the limit on recompilations would count the other sizes too
    return torch.compile(combined(weight, 'eager'), dynamic=False)


# neighbours share a formula, whose result is kept for the next row
COMPETITORS = [
    ('torch.compile of ours, eager', compiled, ce_and_dice, ''),
    (
        'MONAI DiceLoss + CE',
        monai,
        ce_and_dice,
        f'its DiceCELoss is the same sum but takes no label {IGNORED}',
    ),
    ('SMP DiceLoss + CE', smp, ce_and_dice_of_batch, 'Dice of the whole batch; absent classes count as 0'),
    ('kornia DiceLoss + CE', kornia, ce_and_dice_of_present, 'no smoothing; absent classes left out'),
    (
        'framework CE + DiceLoss',
        framework,
        ce_and_pooled_dice,
        'Dice over pooled classes and ignored pixels; no weights',
    ),
]


def loss_case(shape, classes, scale, args):
    """The losses on (B, H, W) labels and logits that are ``scale`` times smaller."""
    logits, target = make_batch(shape, classes, scale, args)
    weight = torch.linspace(0.2, 3, classes, device=args.device)

    @lru_cache(maxsize=1)
    def truth(formula):
        return truth_of(partial(formula, weight=weight), logits, target)

    def row(name, make_loss, formula, note='', ours=False):
        def make_trial():
            return LossTrial(make_loss(weight), logits, target)

        return Row(name, make_trial, partial(truth, formula), note, ours)

    def in_torch(formula):
        return lambda weight: partial(formula, weight=weight)

    def of_this_package(backend):
        return partial(combined, backend=backend)

    full = logits.shape[2:] == target.shape[1:]
    prefix = '' if full else 'resize + '
    note = 'functions alone, no MMSegmentation' if CombinedWeightedLoss is None else ''
    rows = [
        row(f'{prefix}F.cross_entropy', in_torch(cross_entropy), cross_entropy),
        row(f'{prefix}CE + Dice in torch', in_torch(ce_and_dice), ce_and_dice),
        *(row(f'ours, {name}', of_this_package(name), ce_and_dice, note, ours=True) for name in args.backend),
        *(row(*competitor) for competitor in COMPETITORS if args.competitors),
    ]
    # read in forward and again in backward, which writes the gradient
    least = dict(least_bytes=3 * logits.nbytes + 2 * target.nbytes, exponentials=2 * classes * target.numel())
    return Case(by(shape[0], classes, *shape[1:]), by(*logits.shape[2:]), rows, **least)
