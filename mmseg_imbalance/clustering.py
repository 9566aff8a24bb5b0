"""Splitting each class into subclasses by clustering features, followed from batch to batch.

It knows no loss; the weights that it gives are those of :class:`~mmseg_imbalance.subclass.SubclassifiedLoss`.
What it keeps from batch to batch is a :class:`~mmseg_imbalance.subclass_state.SubclassState`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg_imbalance.kmeans import draw_uniform, kmeans, like, lloyd
from mmseg_imbalance.ops import SoftStats, gather_from_ranks, rank_and_number, sum_over_ranks
from mmseg_imbalance.options import check_choice
from mmseg_imbalance.subclass_state import SubclassState

# cells of a class, over all ranks, among which its first centroids are sought
START_CELLS = 256
NEW_SHARE = 1e-3  # of a subclass that has been moved
LOSS_FLOOR = 1e-6  # a mean loss below it counts as it


class SubclassTable(NamedTuple):
    """What is known of the subclasses, (C, K) each; NaN where there is none yet."""

    share: Any  # of the pixels of its class
    mean_loss: Any  # mean of -log p_y
    weight: Any  # of each of its pixels
    exists: Any  # bool, whether the class is to have so many

    def numpy(self) -> SubclassTable:
        """The same as arrays, in place of tensors on the device of the model."""
        return SubclassTable(*(np.asarray(values.cpu()) for values in self))


class SubclassClustering(SubclassState):
    """Splits each class into K_c subclasses by clustering features; the state lies in buffers.

    A pixel of subclass s weighs w_s = r_s / sum_t f_t r_t with r_s = f_s^-a l_s^b: f is the share of the
    subclass within its class, l the mean of its -log p_y, t runs over the subclasses of the class. So the
    mean over a class's pixels is 1: the balance between classes stays as it was. A class's pixels weigh 1
    until it has centroids, which k-means++ seeks in the first batch that holds it, or in the reservoir.

    Sums are those of all ranks, cells are chosen from those of all ranks, and what is random depends on the
    iteration and the image alone: every rank holds the state that one process with all images would.

    Args:
        num_subclasses: K_c, 1 to 255: an int; a list, one for each class; or a dict by class name (classes
            that it leaves out are not split).
        update: 'ema': a centroid is the moving average of the features nearest to it; 'kmeans': it comes from
            k-means over a reservoir. Shares and losses are moving averages with either.
        momentum: in (0, 1], the part that a batch has in the averages, as in BatchNorm. Those of a class
            stand still while it does not occur.
        update_freq: iterations from one k-means to the next; of 'kmeans'.
        reservoir_size: cells kept of each class, at least K; of 'kmeans'.
        frequency_power: a >= 0.
        difficulty_power: b >= 0. It is 0 for the first ``warmup_iters`` iterations and grows linearly in the
            next ``ramp_iters``.
        max_ratio: >= 1, largest weight over smallest in a class. Weights are clipped to between
            1 / sqrt(max_ratio) and sqrt(max_ratio), then divided by their mean. None: not clipped.
        min_share: in [0, 1 / K); a subclass whose share stays below it in 1 / momentum batches that hold its
            class moves to the class's hardest cell.
        normalize_features: cluster f / |f| in place of f.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        num_subclasses: int | Sequence[int] | Mapping[str, int] = 3,
        update: str = 'ema',
        momentum: float = 0.01,
        update_freq: int = 100,
        reservoir_size: int = 256,
        frequency_power: float = 0.5,
        difficulty_power: float = 1.0,
        warmup_iters: int = 1000,
        ramp_iters: int = 1000,
        max_ratio: float | None = 10.0,
        min_share: float = 0.02,
        normalize_features: bool = False,
    ) -> None:
        check_choice('update', update, ('ema', 'kmeans'))
        super().__init__(num_subclasses, reservoir_size if update == 'kmeans' else 0)
        largest = self.largest
        for name, value, allowed, what in (
            ('momentum', momentum, 0 < momentum <= 1, 'lie in (0, 1]'),
            ('update_freq', update_freq, update_freq >= 1, 'be at least 1'),
            ('reservoir_size', reservoir_size, reservoir_size >= largest, f'be at least K = {largest}'),
            ('frequency_power', frequency_power, 0 <= frequency_power < math.inf, 'be finite and >= 0'),
            ('difficulty_power', difficulty_power, 0 <= difficulty_power < math.inf, 'be finite and >= 0'),
            ('warmup_iters', warmup_iters, warmup_iters >= 0, 'be at least 0'),
            ('ramp_iters', ramp_iters, ramp_iters >= 0, 'be at least 0'),
            ('max_ratio', max_ratio, max_ratio is None or max_ratio >= 1, 'be None or at least 1'),
            ('min_share', min_share, 0 <= min_share < 1 / largest, f'lie in [0, 1 / K) with K = {largest}'),
        ):
            if not allowed:
                raise ValueError(f'{name} must {what}, got {value!r}')
        self.update_rule = update
        self.momentum = momentum
        self.update_freq = update_freq
        self.frequency_power = frequency_power
        self.difficulty_power = difficulty_power
        self.warmup_iters = warmup_iters
        self.ramp_iters = ramp_iters
        self.max_ratio = max_ratio
        self.min_share = min_share
        self.normalize_features = normalize_features
        self._batch: tuple[Tensor, ...] | None = None  # what the state learns from once the losses are known

    def table(self) -> SubclassTable:
        """Share, mean loss and weight of every subclass, from the state as it is."""
        alive = self.pixels > 0
        share = self.pixels / self.pixels.sum(1, keepdim=True)
        mean_loss = self.loss / self.pixels
        grown = (self.iteration - self.warmup_iters) / max(self.ramp_iters, 1)
        power = self.difficulty_power * grown.clamp(0, 1)
        ratio = share**-self.frequency_power * mean_loss.clamp_min(LOSS_FLOOR) ** power
        weight = ratio / (share * ratio).where(alive, 0).sum(1, keepdim=True)
        if self.max_ratio is not None:
            weight = weight.clamp(self.max_ratio**-0.5, self.max_ratio**0.5)
            weight = weight / (share * weight).where(alive, 0).sum(1, keepdim=True)
        return SubclassTable(*(x.where(alive, torch.nan) for x in (share, mean_loss, weight)), self.exists)

    def summary(self) -> dict[str, Tensor]:
        """For the log: the smallest share of a subclass, and the largest weight over smallest in a class.

        Both are 1 until a class that is split has centroids.
        """
        share, _, weight, exists = self.table()
        split = (exists.sum(1) > 1) & (self.pixels > 0).any(1)
        smallest = share.nan_to_num(0).where(exists & split[:, None], 1).min()
        spread = weight.nan_to_num(0).amax(1) / weight.nan_to_num(torch.inf).amin(1)
        return dict(smallest_share=smallest, weight_ratio=spread.where(split, 1).max())

    def forward(
        self, logits: Tensor, target: Tensor, valid: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """Weights and subclasses of the pixels, (B, H, W) each, and the number of subclasses, C K.

        Args:
            logits: (B, C, h', w').
            target: (B, H, W) class indices.
            valid: (B, H, W) bool, which pixels count.
            features: (B, D, h, w) what entered the classifier, or (B, D, N) of sampled points.

        Raises:
            ValueError: features or logits of another shape than the state.
        """
        features = features.detach()
        if features.ndim == 3:  # of sampled points, as the logits
            features = features[:, :, None]
        self.prepare(logits.shape[1], features.shape[1], logits.device)
        expected = (len(logits), self.centroid.shape[2])
        if features.ndim != 4 or features.shape[:2] != expected or logits.shape[1] != len(self.centroid):
            raise ValueError(
                f'features must be of shape {(*expected, "h", "w")} beside logits of {len(self.centroid)} '
                f'classes, got {tuple(features.shape)} beside logits of shape {tuple(logits.shape)}'
            )
        group, by_cell = self.assign(features, target, valid)
        weight = self.table().weight.nan_to_num(1.0).flatten()
        self._batch = (features, logits, by_cell) if self.training else None
        return weight.index_select(0, group.flatten()).view(target.shape), group, weight.numel()

    def assign(self, features: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """The subclass of every pixel, c K + k: the nearest centroid of its class.

        Equals clustering features resized to the label by nearest neighbour: each centroid is compared with
        each cell, f mu - |mu|^2 / 2, in one product, and a pixel looks up what its cell is for its class.

        Args:
            features: (B, D, h, w).
            target: (B, H, W) class indices.
            valid: (B, H, W) bool; the subclass of another pixel has no meaning.

        Returns:
            (B, H, W) int32, and how many valid pixels of each subclass each cell holds, (B, C, K, h w).
        """
        classes, each, _ = self.centroid.shape
        (h, w), (height, width) = features.shape[2:], target.shape[1:]
        centroid = self.centroid.flatten(0, 1)  # (C K, D)
        alive = self.pixels.flatten() > 0
        # of centroids at one place the first is nearest, whatever a product rounds to in which column
        slack = 16 * torch.finfo(centroid.dtype).eps * torch.arange(each).to(centroid).repeat(classes)
        offset = torch.where(alive, centroid.square().sum(1) / 2 * (1 + slack), torch.inf)[:, None]
        numbers = torch.arange(classes * each, dtype=torch.int32, device=target.device).view(classes, each, 1)
        rows, columns = _nearest(h, height, target.device), _nearest(w, width, target.device)
        cell = (rows[:, None] * w + columns).flatten()
        groups = torch.empty(target.shape, dtype=torch.int32, device=target.device)
        by_cell = centroid.new_empty(len(target), classes, each, h * w)
        for image, label, counted, group, count in zip(features, target, valid, groups, by_cell, strict=True):
            values, scale = self._values(image)
            score = centroid @ values  # (C K, h w)
            if scale is not None:
                score *= scale
            # argmax is slow on CPU along an axis that is not the last
            nearest = (score - offset).view(classes, each, h * w).max(1, keepdim=True).indices
            nearest = nearest.int() + numbers[:, :1]  # (C, 1, h w)
            # a label beyond the classes is left for soft_stats to name
            at = label.long().flatten().clamp(0, classes - 1).mul_(h * w).add_(cell)
            group.copy_(nearest.flatten().index_select(0, at).view_as(group))
            pixels = torch.zeros(classes * h * w, dtype=torch.int32, device=at.device)
            pixels.scatter_add_(0, at, counted.flatten().int())
            torch.mul(pixels.view_as(nearest), nearest == numbers, out=count)
        return groups, by_cell

    def _values(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """The features (D, h, w) of an image as (D, h w), and what is to be multiplied to normalise them."""
        values = image.flatten(1).to(self.centroid.dtype)
        if not self.normalize_features:
            return values, None
        return values, values.square().sum(0).clamp_min(torch.finfo(values.dtype).tiny).rsqrt()

    def learn(self, stats: SoftStats) -> None:
        """Take the last batch into the state; ``stats`` are those of its subclasses.

        One all-reduce, and two small collectives more where cells are chosen. The state stays as it was if an
        error is raised, which happens on all ranks at once.

        Raises:
            RuntimeError: features or losses that are not finite, with the iteration.
        """
        (features, logits, by_cell), self._batch = self._batch, None
        shape = self.pixels.shape
        if self.update_rule == 'ema':
            found = self._feature_sums(features, by_cell)
        else:
            found = features.sum(dtype=self.centroid.dtype) * 0  # NaN if there is one that is not finite
        sums = [stats.group_count, stats.group_nll, found]
        sums = sum_over_ranks(torch.cat([x.flatten().to(self.centroid.dtype) for x in sums]))
        pixels, loss = (x.view(shape) for x in sums[: 2 * shape.numel()].split(shape.numel()))
        found = sums[2 * shape.numel() :]

        present = pixels.sum(1) > 0  # (C,)
        born = (self.pixels > 0).any(1)
        kept = 1 - self.momentum * (present & born).to(pixels)[:, None]
        # a checkpoint may hold subclasses that the config has no more
        new_pixels = (kept * self.pixels + (1 - kept) * pixels) * self.exists
        new_loss = (kept * self.loss + (1 - kept) * loss) * self.exists
        share = new_pixels / new_pixels.sum(1, keepdim=True).clamp_min(torch.finfo(pixels.dtype).tiny)
        starving = self.exists & (share < self.min_share) & born[:, None]
        new_starved = torch.where(present[:, None], self.starved + 1, self.starved) * starving
        lost = (new_starved > 1 / self.momentum) & present[:, None]

        # what the host has to know, read once: whether all is finite and whether cells are to be chosen
        waiting = present & ~born
        facts = [sums.isfinite().all(), waiting.any(), lost.any(), self.iteration]
        finite, waits, loses, iteration = torch.stack([x.long() for x in facts]).tolist()
        if not finite:
            raise RuntimeError(
                f'SubclassifiedLoss: in its training iteration {iteration + 1} the features that enter the '
                'classifier, or the losses, are not finite on at least one rank. The state is unchanged; '
                'a smaller learning rate or clipped gradients (optim_wrapper.clip_grad) keep training stable'
            )

        if self.update_rule == 'ema':
            step = (1 - kept) / new_pixels.where(new_pixels > 0, 1)  # (C, K)
            found = found.view_as(self.centroid)
            self.centroid += step[..., None] * (found - pixels[..., None] * self.centroid)
        self.pixels.copy_(new_pixels)
        self.loss.copy_(new_loss)
        self.starved.copy_(new_starved)
        if self.update_rule == 'kmeans':
            self._reserve(features, by_cell, iteration)
            if (iteration + 1) % self.update_freq == 0:
                alive = (self.pixels > 0)[:, None]
                centroid, _, _ = lloyd(self.reservoir, self.reserved, self.centroid[:, None], alive)
                self.centroid.copy_(centroid[:, 0])
            if waits and iteration + 1 >= self.update_freq:
                self._start(self.reservoir, self.reserved, waiting, pixels, loss, iteration)
        elif waits:
            chosen = self._choose(features, self._random_keys(by_cell, iteration), START_CELLS)
            self._start(*chosen, waiting, pixels, loss, iteration)
        if loses:
            self._reseed(features, logits, by_cell, lost)
        self.iteration += 1
        self.share()

    def _feature_sums(self, features: Tensor, by_cell: Tensor) -> Tensor:
        """Sum of the features of the pixels of each subclass, (C K, D)."""
        total = torch.zeros_like(self.centroid.flatten(0, 1))
        for image, count in zip(features, by_cell.flatten(1, 2), strict=True):
            values, scale = self._values(image)
            total += (count if scale is None else count * scale) @ values.T
        return total

    def _random_keys(self, by_cell: Tensor, iteration: int) -> Tensor:
        """(B, C, h w) keys whose largest are a random sample of a class's pixels, without replacement.

        Source: Efraimidis & Spirakis 2006, https://doi.org/10.1016/j.ipl.2005.11.003, algorithm A-ES, as
        log(u) / weight.
        """
        images, cells = len(by_cell), by_cell.shape[-1]
        drawn = []
        for image in range(images):
            # an image draws the same whichever rank holds it
            seed = iteration * 1_000_003 + rank_and_number()[0] * images + image
            drawn.append(draw_uniform((cells,), torch.Generator().manual_seed(seed)))
        with np.errstate(divide='ignore'):
            keys = like(np.log(drawn), by_cell)[:, None]
        return keys / by_cell.sum(2)  # -inf where it has no pixels

    def _choose(self, features: Tensor, keys: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """The cells of each class with the largest keys over all ranks, (C, n, D), and which are any."""
        images, _, cells = keys.shape
        keys = keys.transpose(0, 1).flatten(1)  # (C, B h w)
        top, at = keys.topk(min(number, images * cells))
        top = F.pad(top, (0, number - top.shape[1]), value=-torch.inf)
        at = F.pad(at, (0, number - at.shape[1]))
        rows = features.flatten(2)[at // cells, :, at % cells].to(self.centroid.dtype)  # (C, n, D)
        if self.normalize_features:
            rows = F.normalize(rows, dim=2)
        everyone = gather_from_ranks(top)
        if len(everyone) > 1:
            top, at = torch.cat(everyone, 1).topk(number)
            at = at - rank_and_number()[0] * number
            here = (at >= 0) & (at < number)
            own = rows.gather(1, at.clamp(0, number - 1)[..., None].expand_as(rows))
            rows = sum_over_ranks(torch.where(here[..., None], own, 0))
        return rows, top > -torch.inf

    def _start(
        self, points: Tensor, valid: Tensor, which: Tensor, pixels: Tensor, loss: Tensor, iteration: int
    ) -> None:
        """First centroids of the classes ``which``, from (C, n, D) points.

        They share the (C, K) pixels and losses of the batch, which holds the classes, by their points.
        """
        which = which & valid.any(1)
        # on the CPU, since cumulative sums on CUDA need not come out alike on all ranks
        args = (x[which].cpu() for x in (points, valid, self.exists))
        centroid, counts = kmeans(*args, torch.Generator().manual_seed(iteration))
        self.centroid[which] = centroid.to(points.device)
        share = counts.to(self.pixels) / counts.sum(1, keepdim=True).to(self.pixels)
        self.pixels[which] = share * pixels[which].sum(1, keepdim=True)
        self.loss[which] = share * loss[which].sum(1, keepdim=True)
        self.starved[which] = 0

    def _reserve(self, features: Tensor, by_cell: Tensor, iteration: int) -> None:
        """Put a few random cells of each class in the reservoir, at places that go by the iteration."""
        size = self.reservoir_size
        number = math.ceil(size / self.update_freq)
        rows, found = self._choose(features, self._random_keys(by_cell, iteration), number)
        slots = torch.arange(iteration * number, (iteration + 1) * number, device=rows.device) % size
        self.reservoir[:, slots] = torch.where(found[..., None], rows, self.reservoir[:, slots])
        self.reserved[:, slots] |= found

    def _reseed(self, features: Tensor, logits: Tensor, by_cell: Tensor, lost: Tensor) -> None:
        """Move the subclasses ``lost``, (C, K), to the hardest cells of their classes.

        A cell's loss for a class is -log p of the logits at that cell.
        """
        if logits.shape[2:] != features.shape[2:]:
            logits = F.interpolate(logits, features.shape[2:], mode='bilinear', align_corners=False)
        hardness = -logits.to(by_cell).log_softmax(1).flatten(2)
        hardness = torch.where(by_cell.sum(2) > 0, hardness, -torch.inf)
        rows, found = self._choose(features, hardness, self.largest)
        order = (lost.cumsum(1) - 1).clamp_min(0)  # the first of them takes the hardest
        lost = lost & found.gather(1, order)
        rows = rows.gather(1, order[..., None].expand_as(rows))
        # next to nothing of its class, so that its share is soon what it attracts
        for state in (self.pixels, self.loss):
            state.copy_(torch.where(lost, NEW_SHARE * state.sum(1, keepdim=True), state))
        self.centroid.copy_(torch.where(lost[..., None], rows, self.centroid))
        self.starved.masked_fill_(lost, 0)


def _nearest(cells: int, pixels: int, device: torch.device) -> Tensor:
    """The cell that resizing by nearest neighbour puts on each pixel of an axis, (pixels,) int64."""
    index = torch.arange(cells, dtype=torch.float32, device=device)
    return F.interpolate(index.view(1, 1, -1), pixels, mode='nearest').flatten().long()
