"""Pixel weights from how many pixels of the same class in the image have similar logits.

The similarity of a query i and a key j is <q_i, k_j> / (max(|q_i|^2, |k_j|^2) + eps). By Cauchy and Schwarz
it is at most the shorter length over the longer, so keys similar to a query have nearly its length. Both
are sorted by label and length: a tile of queries meets one short range of keys, and no two labels meet.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg_imbalance.ops.contract import sum_dtype, valid_pixels
from mmseg_imbalance.ops.soft_stats import check_arguments

QUERY_STRIDE, KEY_STRIDE = 4, 8  # pixels of the label between two of them
EPS = 1e-5
OFFSET = 10.0  # added to the number of similar keys
LARGEST = 10.0
TILE_NUMBERS = 1 << 21  # similarities at a time
# of the largest length: more than rounding moves a length, less than matters for the size of a range
SLACK = 1e-6


@torch.no_grad()
def similarity_weight(
    logits: Tensor,
    target: Tensor,
    *,
    threshold: float = 0.98,
    ignore_index: int | None = 255,
    align_corners: bool = False,
    paper_exact: bool = False,
) -> Tensor:
    """Weights (N + 10)^-1/2 over their mean in the image, at most 10; N is the number of similar pixels.

    Queries are the logits, resized to label size, at every 4th pixel each way, keys those at every 8th; N
    counts the keys of a query's label whose similarity exceeds the threshold. The weights of the queries are
    resized to label size.

    Args:
        logits: (B, C, h, w); resized to the label bilinearly, with ``align_corners``, where they are smaller.
            Those that are not finite count as 0.
        target: (B, H, W) class indices or ``ignore_index``.
        ignore_index: the label of pixels that do not count; None: all count.
        threshold: above 0. Above 1 nothing is similar and every weight is 1.
        paper_exact: as the public code has it: ignored pixels are a class of their own and enter the mean,
            and each image gets the mean of the weights of all images of the batch. By default ignored pixels
            count nowhere and an image keeps its own weights.

    Returns:
        (B, H, W) in float32 or better.

    Raises:
        ValueError: a threshold that is not above 0.
        TypeError, ValueError: logits or a target of another type or shape.

    Source: Qiu et al. 2023, Subclassified Loss, IEEE Transactions on Intelligent Vehicles.
    """
    if not threshold > 0:
        raise ValueError(f'threshold must be above 0, got {threshold}; similarities are at most 1')
    check_arguments(logits, target)
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # what lies under ignored pixels reaches their neighbours by the resize
        logits = logits.nan_to_num(0, 0, 0)
        images = zip(logits.split(1), target, strict=True)
        maps = [_image_weight(z, y, threshold, ignore_index, align_corners, paper_exact) for z, y in images]
        weight = torch.stack(maps)
        return weight.mean(0).expand_as(weight) if paper_exact else weight


def _image_weight(
    logits: Tensor,
    target: Tensor,
    threshold: float,
    ignore_index: int | None,
    align_corners: bool,
    exact: bool,
) -> Tensor:
    """The weights of one image, (H, W), from logits (1, C, h, w)."""
    size = list(target.shape)
    counted = valid_pixels(target, None if exact else ignore_index)
    vectors, labels, used = [], [], []
    for stride in (QUERY_STRIDE, KEY_STRIDE):
        grid = [max(n // stride, 1) for n in size]
        use = F.interpolate(counted[None, None].to(logits), grid).bool()  # (1, 1, *grid)
        used.append(use)
        vectors.append(_resize_twice(logits, size, grid, align_corners)[0][:, use[0, 0]])  # (C, n)
        labels.append(F.interpolate(target[None, None].to(logits), grid)[use])
    weight = used[0].to(logits)
    counts = count_similar(vectors[0], vectors[1], labels[0], labels[1], threshold)
    weight[used[0]] = (counts + OFFSET).to(logits).rsqrt()
    # ignored queries weigh 0 here, and what a pixel lacks by them it gets from the others around it
    weight = F.interpolate(torch.cat([weight, used[0].to(logits)], 1), size, mode='bilinear')[0]
    inside = counted & (weight[1] > 0)
    weight = torch.where(inside, weight[0] / weight[1], 0)
    return torch.where(inside, weight * (inside.sum() / weight.sum()), 1).clamp_max(LARGEST)


def _resize_twice(z: Tensor, size: list[int], grid: list[int], align_corners: bool) -> Tensor:
    """Logits (1, C, h, w) as if resized to label size and from there to a grid, without the former."""
    if list(z.shape[2:]) == size:
        return F.interpolate(z, grid, mode='bilinear')
    both = []
    for small, full, few in zip(z.shape[2:], size, grid, strict=True):
        resize = torch.eye(small, dtype=z.dtype, device=z.device)[None]
        resize = F.interpolate(resize, full, mode='linear', align_corners=align_corners)
        both.append(F.interpolate(resize, few, mode='linear')[0])  # (h, H'), (w, W')
    return both[0].T @ (z @ both[1])


def count_similar(
    queries: Tensor, keys: Tensor, query_label: Tensor, key_label: Tensor, threshold: float
) -> Tensor:
    """How many keys (C, m) of its own label each of the queries (C, n) resembles, (n,) int64."""
    counts = torch.zeros(queries.shape[1], dtype=torch.int64, device=queries.device)
    if not len(query_label) or not len(key_label):
        return counts
    dtype = sum_dtype(queries)
    q, q_square, q_label, order = _by_label_and_length(queries, query_label, dtype)
    k, k_square, k_label, _ = _by_label_and_length(keys, key_label, dtype)
    tiles = _tiles(q_label, max(TILE_NUMBERS // len(k_label), 1))
    ends = torch.tensor(tiles, device=q.device)  # (t, 2)

    q_length, k_length = q_square.to(dtype).sqrt(), k_square.to(dtype).sqrt()
    longest = torch.maximum(q_length.max(), k_length.max())
    slack = longest * (8 * torch.finfo(dtype).eps * k_label.abs().max()).clamp_min(SLACK)
    low = (threshold * q_length[ends[:, 0]] - slack).clamp_min(0)
    high = (q_length[ends[:, 1] - 1] / threshold).clamp_max(longest) + slack
    # one number for label and length, in which no two labels come near each other
    apart = 4 * longest + torch.finfo(torch.float32).tiny
    place = apart * k_label + k_length
    base = apart * q_label[ends[:, 0]]
    first, last = torch.searchsorted(place, base + low), torch.searchsorted(place, base + high, right=True)

    q_limit, k_limit = threshold * (q_square + EPS), threshold * (k_square + EPS)
    for (start, end), (a, b) in zip(tiles, torch.stack([first, last], 1).tolist(), strict=True):
        if a < b:
            limit = torch.maximum(q_limit[start:end, None], k_limit[a:b])
            counts[order[start:end]] = (q[start:end] @ k[a:b].T > limit).sum(1)
    return counts


def _by_label_and_length(
    vectors: Tensor, label: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(n, C) vectors in the order of label and length, their squared lengths, labels and old places."""
    square = vectors.square().sum(0)
    order = square.argsort()
    order = order[label[order].argsort(stable=True)]
    return vectors.T[order], square[order], label[order].to(dtype), order


def _tiles(label: Tensor, most: int) -> list[tuple[int, int]]:
    """From and to of at most so many neighbours of one label."""
    ends = torch.unique_consecutive(label, return_counts=True)[1].cumsum(0).tolist()
    return [
        (start, min(start + most, end))
        for begin, end in zip([0, *ends[:-1]], ends, strict=True)
        for start in range(begin, end, most)
    ]
