"""The losses that look at recall beside weighted cross-entropy, on one batch."""

from functools import partial

import torch

from mmseg_imbalance.benchmark.case import Case, LossTrial, Row, by, make_batch, truth_of
from mmseg_imbalance.benchmark.formulas import cross_entropy, recall_cross_entropy, skeleton_recall
from mmseg_imbalance.losses import WeightedCrossEntropyLoss
from mmseg_imbalance.recall import RecallWeightedLoss
from mmseg_imbalance.skeleton import SkeletonRecallLoss


def recall_case(shape, classes, scale, args):
    """RecallWeightedLoss, and SkeletonRecallLoss with a sixteenth of the pixels in tubes."""
    logits, target = make_batch(shape, classes, scale, args)
    weight = torch.linspace(0.2, 3, classes, device=args.device)
    marked = torch.zeros_like(target, dtype=torch.bool)
    marked[..., ::16] = True
    tubes = dict(marked=marked)

    def row(loss, formula, options):
        def make_trial():
            return LossTrial(partial(loss(class_weight=weight.tolist()), **options), logits, target)

        def truth():
            return truth_of(partial(formula, weight=weight, **options), logits, target)

        return Row(loss.__name__, make_trial, truth, ours=True)

    rows = [
        row(WeightedCrossEntropyLoss, cross_entropy, {}),
        row(RecallWeightedLoss, recall_cross_entropy, {}),
        row(SkeletonRecallLoss, skeleton_recall, tubes),
    ]
    return Case(by(shape[0], classes, *shape[1:]), f'{by(*logits.shape[2:])} recall', rows)
