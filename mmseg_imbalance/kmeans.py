"""k-means of many small sets of points at once, without a loop over the sets."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

STARTS = 4  # of which the best is kept
CANDIDATES = 8  # for each seed
ROUNDS = 10


def draw_uniform(shape: tuple[int, ...], generator: torch.Generator) -> np.ndarray:
    """What ``torch.rand(shape, dtype=torch.float64)`` draws, without a tensor that some devices lack."""
    return torch.empty(shape, dtype=torch.int64).random_(0, 2**53, generator=generator).numpy() / 2**53


def like(numbers: np.ndarray, x: Tensor) -> Tensor:
    """Numbers as a tensor of the dtype of ``x``, on its device."""
    return torch.from_numpy(numbers.astype(np.float64 if x.dtype == torch.float64 else np.float32)).to(x)


def kmeans(
    points: Tensor, valid: Tensor, exists: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """k-means of C sets of points: the best of several k-means++ starts.

    Args:
        points: (C, n, D).
        valid: (C, n) bool, which of them count; at least one of each set.
        exists: (C, K) bool, how many centroids each set has.
        generator: of the CPU.

    Returns:
        Centroids (C, K, D), and how many points are nearest to each, (C, K): 0 for those that do not exist
        or find no different points.

    Source: Arthur & Vassilvitskii 2007, k-means++: the advantages of careful seeding, section 2.2, with the
    choice among several candidates for each seed of its last section.
    """
    sets, number, _ = points.shape
    every = torch.arange(sets, device=points.device)
    # differences from the middle have more digits
    middle = points.mul(valid[..., None]).sum(1, keepdim=True) / valid.sum(1)[:, None, None]
    x = torch.where(valid[..., None], points - middle, 0)
    square = x.square().sum(2)[:, None]  # (C, 1, n)
    # closer than this two points are one
    same = 1e-5 * square.amax(2, keepdim=True) + 1e-10 * points.square().sum(2).amax(1)[:, None, None]
    shape = (exists.shape[1], sets, STARTS, CANDIDATES)
    draws = like(draw_uniform(shape, generator), x)
    nearest = torch.full((sets, STARTS, number), torch.inf, dtype=x.dtype, device=x.device)
    chance = valid[:, None].expand_as(nearest).to(x)  # even for the first
    seeds, made = [], []
    for draw, wanted in zip(draws, exists.unbind(1), strict=True):
        until = chance.cumsum(2)  # (C, T, n)
        total = until[:, :, -1:]
        below = torch.minimum(draw * total, torch.nextafter(total, torch.zeros_like(total)))
        drawn = torch.searchsorted(until, below, right=True).clamp_max(number - 1)
        seed = x[every[:, None, None], drawn]  # (C, T, L, D)
        away = square[:, None] - 2 * seed @ x.mT[:, None] + seed.square().sum(3, keepdim=True)
        away = torch.minimum(nearest[:, :, None], away).where(valid[:, None, None], 0)  # (C, T, L, n)
        least = away.sum(3).argmin(2)[..., None]  # of the candidates, (C, T, 1)
        seeds.append(seed.take_along_dim(least[..., None], 2)[:, :, 0])
        made.append((total[:, :, 0] > 0) & wanted[:, None])
        away = away.take_along_dim(least[..., None], 2)[:, :, 0]
        nearest = torch.where(made[-1][..., None], away, nearest)
        chance = torch.where(nearest > same, nearest, 0).where(valid[:, None], 0)
    centroid, counts, spread = lloyd(x, valid, torch.stack(seeds, 2), torch.stack(made, 2))
    best = spread.argmin(1)
    return centroid[every, best] + middle, counts[every, best]


def lloyd(points: Tensor, valid: Tensor, centroid: Tensor, alive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds of k-means from given centroids, T starts at once: centroids, points of each, and inertia.

    Args:
        points: (C, n, D); valid: (C, n) bool.
        centroid: (C, T, K, D); alive: (C, T, K) bool. Those that no point is nearest to stay.

    Returns:
        (C, T, K, D); (C, T, K); (C, T), the sum of squared distances.
    """
    for _ in range(ROUNDS):
        score = torch.einsum('ctkd,cnd->ctkn', centroid, points) - centroid.square().sum(3)[..., None] / 2
        best, nearest = score.where(alive[..., None], -torch.inf).max(2)  # (C, T, n)
        member = F.one_hot(nearest, centroid.shape[2]).movedim(3, 2) * valid[:, None, None]  # (C, T, K, n)
        counts = member.sum(3)
        total = torch.einsum('ctkn,cnd->ctkd', member.to(points), points)
        mean = total / counts.clamp_min(1)[..., None]
        centroid = torch.where((counts > 0)[..., None], mean, centroid)
    inertia = (points.square().sum(2)[:, None] - 2 * best).where(valid[:, None], 0).sum(2)
    return centroid, counts, inertia
