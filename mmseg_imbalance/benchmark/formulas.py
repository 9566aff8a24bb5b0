"""The formulas in plain PyTorch, as one would write them down; truth is their result in double.

Another library's loss is held to what its own documentation says, which need not be this package's Dice.
"""

import torch
import torch.nn.functional as F

from mmseg_imbalance.benchmark.case import IGNORED


def full_size(logits, target):
    """Logits as other losses want them: at label size, in float32 or better."""
    if logits.shape[2:] != target.shape[1:]:
        logits = F.interpolate(logits, target.shape[1:], mode='bilinear', align_corners=False)
    return logits if logits.dtype == torch.float64 else logits.float()


def cross_entropy(logits, target, weight):
    logits = full_size(logits, target)
    return F.cross_entropy(logits, target, weight.to(logits), ignore_index=IGNORED)


def with_dice(dice):
    """0.6 * F.cross_entropy + 0.4 * dice, on logits that are resized once."""

    def loss(logits, target, weight):
        logits = full_size(logits, target)
        weight = weight.to(logits)
        region = dice(logits, target, weight)  # first: the other order holds more at its peak
        return 0.6 * cross_entropy(logits, target, weight) + 0.4 * region

    return loss


def overlap(logits, target):
    """Intersection, prediction and truth over the valid pixels, (B, C) each."""
    valid = target[:, None] != IGNORED
    # scattered, since F.one_hot makes a tensor of int64, twice the size, on the way
    truth = torch.zeros_like(logits).scatter_(1, torch.where(valid, target[:, None], 0), valid.to(logits))
    p = logits.softmax(1) * valid
    return (p * truth).sum((2, 3)), p.sum((2, 3)), truth.sum((2, 3))


@with_dice
def ce_and_dice(logits, target, weight):
    i, p, t = overlap(logits, target)
    return ((1 - (2 * i + 1) / (p + t + 1)) @ weight / weight.sum()).mean()


@with_dice
def ce_and_dice_of_batch(logits, target, weight):
    i, p, t = (x.sum(0) for x in overlap(logits, target))
    return ((1 - (2 * i + 1) / (p + t + 1)) * (t > 0)) @ weight / weight.sum()


@with_dice
def ce_and_dice_of_present(logits, target, weight):
    i, p, t = overlap(logits, target)
    weight = weight * (t > 0)
    return ((1 - 2 * i / (p + t + 1e-8)) * weight).sum(1).div(weight.sum(1)).mean()


def ce_and_pooled_dice(logits, target, weight):
    logits = full_size(logits, target)
    p, valid = logits.softmax(1), target != IGNORED
    i = (p.gather(1, torch.where(valid, target, 0)[:, None])[:, 0] * valid).sum((1, 2))
    dice = 2 * i / (p.square().sum((1, 2, 3)) + valid.sum((1, 2)) + 2e-3)
    return 0.6 * F.cross_entropy(logits, target, ignore_index=IGNORED) + 0.4 * (1 - dice).mean()


def recall_cross_entropy(logits, target, weight):
    """Each pixel times the share of its class that the batch misses."""
    logits, valid = full_size(logits, target), target != IGNORED
    label, weight = target[valid], weight.to(logits)
    right = logits.argmax(1)[valid] == label
    found, count = (labels.bincount(minlength=len(weight)) for labels in (label[right], label))
    nll = F.cross_entropy(logits, target, ignore_index=IGNORED, reduction='none')[valid]
    return ((weight * (1 - found / count.clamp(min=1)))[label] * nll).sum() / weight[label].sum()


def skeleton_recall(logits, target, weight, marked):
    """Cross-entropy, Dice and the recall of the marked pixels."""
    logits = full_size(logits, target)
    weight = weight.to(logits)
    i, p, t = overlap(logits, target)
    dice = ((1 - (2 * i + 1) / (p + t + 1)) @ weight / weight.sum()).mean()
    hit, _, tube = overlap(logits, target.where(marked, IGNORED))
    weights = weight * (tube > 0)
    missed = ((1 - (hit + 1) / (tube + 1)) * weights).sum(1) / weights.sum(1)
    return cross_entropy(logits, target, weight) + dice + missed.nan_to_num(0).mean()


def over_all_pixels(logits, target, weight):
    """MMSegmentation's cross-entropy: ignored pixels count in the mean."""
    return F.cross_entropy(logits, target, ignore_index=IGNORED, reduction='none').mean()


def weighted_mean(logits, target, weight, pixel_weight):
    """Cross-entropy in which a pixel of weight k is k pixels."""
    loss = F.cross_entropy(
        full_size(logits, target), target, weight.to(logits), ignore_index=IGNORED, reduction='none'
    )
    valid = target != IGNORED
    return (loss * pixel_weight).sum() / (weight[target.where(valid, 0)] * valid * pixel_weight).sum()


def similarity_by_definition(logits, target, threshold=0.98):
    """The weights of :func:`~mmseg_imbalance.ops.similarity_weight`, every query with every key."""
    maps = []
    for z, y in zip(logits.split(1), target[:, None, None].float().split(1), strict=True):
        grids = [[n // stride for n in y.shape[-2:]] for stride in (4, 8)]
        q, k = (F.interpolate(full_size(z, y[0, 0]), grid, mode='bilinear')[0].flatten(1) for grid in grids)
        q_label, k_label = (F.interpolate(y[0], grid).flatten() for grid in grids)
        count = []
        for vectors, labels in zip(q.T.split(1024), q_label.split(1024), strict=True):
            longest = torch.maximum(vectors.square().sum(1)[:, None], k.square().sum(0))
            similar = (vectors @ k / (longest + 1e-5) > threshold) & (labels[:, None] == k_label)
            count.append(similar.sum(1))
        known = (q_label != IGNORED).to(z)
        both = torch.stack([known / (torch.cat(count) + 10).sqrt(), known]).view(1, 2, *grids[0])
        weight, known = F.interpolate(both, y.shape[-2:], mode='bilinear')[0]
        inside = (y[0, 0, 0] != IGNORED) & (known > 0)
        weight = weight / known.where(inside, 1)
        maps.append(torch.where(inside, weight / weight[inside].mean(), 1).clamp(max=10))
    return torch.stack(maps)
