"""The subclassified losses on one batch, and the similarity weights of one image."""

from functools import partial

import torch
import torch.nn.functional as F

from mmseg_imbalance.benchmark.case import IGNORED, Case, GivenTrial, LossTrial, Row, by, make_batch, truth_of
from mmseg_imbalance.benchmark.formulas import similarity_by_definition, weighted_mean
from mmseg_imbalance.losses import WeightedCrossEntropyLoss
from mmseg_imbalance.ops import similarity_weight
from mmseg_imbalance.subclass import SimilaritySubclassifiedLoss, SubclassifiedLoss

CHANNELS, SUBCLASSES = 512, 3  # of the features that are clustered


def cluster_weight(loss, features, target):
    """What the state of a loss makes of each pixel, from the distances of all cells to all centroids."""
    state = loss.weighting
    cells = features.double().movedim(1, 3).flatten(1, 2)  # (B, h w, D)
    away = torch.cdist(cells, state.centroid.double().flatten(0, 1)).unflatten(2, state.pixels.shape)
    nearest = away.argmin(3).mT.unflatten(2, features.shape[2:])  # (B, C, h, w)
    label = target.where(target != IGNORED, 0)[:, None]
    full = F.interpolate(nearest.float(), target.shape[1:]).gather(1, label).long()
    return state.table().weight.nan_to_num(1)[label, full][:, 0].double()


class SubclassTrial(LossTrial):
    """A subclassified loss beside its formula with the weights that its state gives before the step."""

    def __init__(self, loss, pixel_weight, logits, target, weight):
        super().__init__(loss, logits, target)
        self.pixel_weight, self.weight = pixel_weight, weight

    def result(self):
        return self.in_classes(super().result())

    def truth(self):
        formula = partial(weighted_mean, weight=self.weight, pixel_weight=self.pixel_weight())
        return self.in_classes(truth_of(formula, self.logits, self.target))

    def in_classes(self, result):
        # a similarity within rounding of the threshold turns out either way, so that pixels may differ
        value, gradient = result
        return value, gradient.double().square().sum((0, 2, 3)).sqrt()


def subclass_case(shape, classes, scale, args):
    """SubclassifiedLoss in its modes beside WeightedCrossEntropyLoss from the same logits."""
    logits, target = make_batch(shape, classes, scale, args)
    weight = torch.linspace(0.2, 3, classes, device=args.device)
    features = torch.randn(len(logits), CHANNELS, *logits.shape[2:], device=args.device).to(logits.dtype)

    def clusters(rule):
        loss = SubclassifiedLoss(
            weight.tolist(),
            num_subclasses=SUBCLASSES,
            update=rule,
            update_freq=1,
            warmup_iters=0,
            ramp_iters=1,
        )
        call = partial(loss, features=features)
        for _ in range(2):  # centroids, then weights
            call(logits, target)
        loss.weighting.update_freq = 100
        return SubclassTrial(call, partial(cluster_weight, loss, features, target), logits, target, weight)

    def similar():
        loss = SimilaritySubclassifiedLoss(weight.tolist())
        by_definition = partial(similarity_by_definition, logits.detach().double(), target)
        return SubclassTrial(loss, by_definition, logits, target, weight)

    def plain():
        ones = partial(torch.ones, target.shape, dtype=torch.float64, device=args.device)
        return SubclassTrial(WeightedCrossEntropyLoss(weight.tolist()), ones, logits, target, weight)

    size = f'{SUBCLASSES} subclasses, features {by(*features.shape)}, {features.nbytes / 1e6:.3g} MB'
    rows = [
        Row('WeightedCrossEntropyLoss', plain, ours=True),
        *(
            Row(f'clusters, {rule}', partial(clusters, rule), note=size, ours=True)
            for rule in ('ema', 'kmeans')
        ),
        Row('similarity', similar, ours=True),
    ]
    return Case(by(shape[0], classes, *shape[1:]), f'{by(*logits.shape[2:])} subclass', rows)


def similarity_case(shape, classes, scale, args):
    """The similarity weights of one image beside the product of all its queries and keys."""
    size = shape[1:]
    logits, target = make_batch((1, *size), classes, scale, args)
    logits = logits.detach()
    q, k = (torch.randn(size[0] // n * (size[1] // n), classes, device=args.device) for n in (4, 8))

    def product():
        for rows in q.split(512):  # the whole matrix would be 1 GB and slower
            rows @ k.T

    def nothing():
        return [torch.ones(1)]

    def weights():
        return [similarity_weight(logits, target).double().square().mean((1, 2))]

    def by_definition():
        return [similarity_by_definition(logits.double(), target).square().mean((1, 2))]

    rows = [
        Row('matrix product alone', partial(GivenTrial, product, nothing, nothing)),
        Row('similarity weights', partial(GivenTrial, weights, weights, by_definition), ours=True),
    ]
    return Case(by(1, classes, *size), f'{by(*logits.shape[2:])} similarity', rows)
