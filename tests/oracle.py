"""The definitions in plain float64 loops over pixels; shares no code with the package, nor any of torch."""

import math

import numpy as np


def resize_bilinear(z, height, width, align_corners=False):
    """Bilinear resize of (C, h, w) to (C, height, width), from the definition of the sampling grid."""
    channels, h, w = z.shape
    out = np.empty((channels, height, width))

    def source(i, size, new):
        if align_corners:
            x = i * (size - 1) / (new - 1) if new > 1 else 0.0
        else:
            x = max((i + 0.5) * size / new - 0.5, 0.0)
        low = min(math.floor(x), size - 1)
        return low, min(low + 1, size - 1), x - low

    for i in range(height):
        i0, i1, u = source(i, h, height)
        for j in range(width):
            j0, j1, v = source(j, w, width)
            top = z[:, i0, j0] * (1 - v) + z[:, i0, j1] * v
            bottom = z[:, i1, j0] * (1 - v) + z[:, i1, j1] * v
            out[:, i, j] = top * (1 - u) + bottom * u
    return out


def softmax(z):
    top = max(z)
    e = [math.exp(x - top) for x in z]
    total = sum(e)
    return [x / total for x in e], [x - top - math.log(total) for x in z]


def soft_stats(
    logits,
    target,
    *,
    pixel_weight=None,
    ignore_index=255,
    logit_bias=None,
    focal_gamma=0.0,
    square_prediction=False,
    group=None,
    num_groups=0,
    align_corners=False,
):
    """Dict of every field of SoftStats as float64 arrays, from arrays (B, C, h, w) and (B, H, W)."""
    batch, channels = logits.shape[:2]
    height, width = target.shape[1:]
    names = ('nll', 'intersection', 'prediction', 'truth', 'log_prob')
    sums = {name: np.zeros((batch, channels)) for name in names}
    sums['correct'] = np.zeros(batch)
    sums['group_nll'], sums['group_count'] = np.zeros(num_groups), np.zeros(num_groups)
    for b in range(batch):
        z = resize_bilinear(logits[b].astype(np.float64), height, width, align_corners)
        for i in range(height):
            for j in range(width):
                y = int(target[b, i, j])
                if y == ignore_index:
                    continue
                m = 1.0 if pixel_weight is None else float(pixel_weight[b, i, j])
                pixel = [z[c, i, j] + (0 if logit_bias is None else logit_bias[c]) for c in range(channels)]
                p, log_p = softmax(pixel)
                sums['nll'][b, y] += -m * (1 - p[y]) ** focal_gamma * log_p[y]
                sums['intersection'][b, y] += m * p[y]
                sums['truth'][b, y] += m
                sums['correct'][b] += pixel.index(max(pixel)) == y
                for c in range(channels):
                    sums['prediction'][b, c] += m * p[c] ** (2 if square_prediction else 1)
                    sums['log_prob'][b, c] += m * log_p[c]
                if group is not None:
                    sums['group_nll'][int(group[b, i, j])] += -log_p[y]
                    sums['group_count'][int(group[b, i, j])] += 1
    return sums


def cross_entropy(sums, weight, label_smoothing=0.0):
    """Weighted mean over pixels, PyTorch's label smoothing, from the oracle's sums."""
    batch, channels = sums['nll'].shape
    value = norm = 0.0
    for b in range(batch):
        for c in range(channels):
            value += (1 - label_smoothing) * weight[c] * sums['nll'][b, c]
            value -= label_smoothing / channels * weight[c] * sums['log_prob'][b, c]
            norm += weight[c] * sums['truth'][b, c]
    return value / norm if norm else 0.0


def region_loss(sums, weight, alpha, beta, smooth, gamma=1.0, reduction='image', absent='include'):
    """Mean over images of the weighted mean over classes of (1 - Tversky index)^gamma."""
    keys = ('intersection', 'prediction', 'truth')
    images = [{k: sums[k][b] for k in keys} for b in range(len(sums['truth']))]
    if reduction == 'batch':
        images = [{k: sum(image[k] for image in images) for k in keys}]
    total = 0.0
    for image in images:
        value = norm = 0.0
        for c, w in enumerate(weight):
            hit, area, truth = (image[k][c] for k in keys)
            if absent == 'ignore' and truth == 0:
                continue
            low = hit + alpha * (area - hit) + beta * (truth - hit) + smooth
            index = (hit + smooth) / low if low > 0 else 1.0
            value += w * (1 - index) ** gamma
            norm += w
        total += value / norm if norm else 0.0
    return total / len(images)


def generalized_dice(sums, weight=None, smooth=0.0, reduction='image', absent='include'):
    """Mean over images of Sudre's ratio, one minus; weights over their truth-weighted mean."""
    keys = ('intersection', 'prediction', 'truth')
    images = [{k: sums[k][b] for k in keys} for b in range(len(sums['truth']))]
    if reduction == 'batch':
        images = [{k: sum(image[k] for image in images) for k in keys}]
    total = 0.0
    for image in images:
        hit, area, truth = (image[k] for k in keys)
        w = list(weight) if weight is not None else [t**-2 if t else None for t in truth]
        largest = max((x for x in w if x is not None), default=0.0)
        w = [largest if x is None else x for x in w]
        if absent == 'ignore':
            w = [x if t else 0.0 for x, t in zip(w, truth, strict=True)]
        mean = sum(x * t for x, t in zip(w, truth, strict=True)) / sum(truth) if sum(truth) else 0.0
        w = [x / mean if mean else 0.0 for x in w]
        over = 2 * sum(x * i for x, i in zip(w, hit, strict=True)) + smooth
        under = sum(x * (p + t) for x, p, t in zip(w, area, truth, strict=True)) + smooth
        total += 1 - (over / under if under else 1.0)
    return total / len(images)
