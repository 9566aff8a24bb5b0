"""What the backends of :func:`~mmseg_imbalance.ops.soft_stats` receive and return, and which pixels count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NOTHING_IGNORED = torch.iinfo(torch.int64).min  # a number that no label has


@dataclass(frozen=True)
class SoftStats:
    """Sums over the valid pixels of each image, by class; see :func:`soft_stats`.

    ``nll``, ``intersection``, ``prediction``, ``log_prob`` and ``marked_intersection`` are differentiable,
    and ``truth`` and ``marked_truth`` by pixel weights that require grad. ``group_nll`` and ``group_count``
    are sums over the whole batch. A field that was not asked for is None.
    """

    nll: Tensor  # (B, C)
    intersection: Tensor  # (B, C)
    prediction: Tensor  # (B, C)
    truth: Tensor  # (B, C)
    correct: Tensor  # (B,) int64
    log_prob: Tensor | None = None  # (B, C)
    marked_intersection: Tensor | None = None  # (B, C)
    marked_truth: Tensor | None = None  # (B, C)
    group_nll: Tensor | None = None  # (S,)
    group_count: Tensor | None = None  # (S,) int64
    class_correct: Tensor | None = None  # (B, C) int64
    class_count: Tensor | None = None  # (B, C) int64

    def sum_images(self, across_ranks: bool = False) -> SoftStats:
        """The same sums over the whole batch, as a batch of one image: (1, C) in place of (B, C).

        With ``across_ranks`` the weighted (B, C) fields are also summed over all ranks, in one all-reduce.
        The numbers of pixels and the group fields stay those of this rank.
        """
        names = [f.name for f in fields(self)[:8] if f.name != 'correct']
        rows = {n: v.sum(0) for n in names if (v := getattr(self, n)) is not None}
        total = torch.stack(list(rows.values()))
        if across_ranks:
            total = sum_over_ranks(total)
        summed = dict(zip(rows, total[:, None].unbind(), strict=True))
        if not self.truth.requires_grad:
            summed.update({n: summed[n].detach() for n in ('truth', 'marked_truth') if n in summed})
        recall = (self.class_correct, self.class_count)
        class_correct, class_count = (None if n is None else n.sum(0, keepdim=True) for n in recall)
        return SoftStats(
            correct=self.correct.sum(0, keepdim=True),
            class_correct=class_correct,
            class_count=class_count,
            group_nll=self.group_nll,
            group_count=self.group_count,
            **summed,
        )


@dataclass(frozen=True)
class Options:
    """The validated options of one pass, as the backends receive them."""

    pixel_weight: Tensor | None = None
    ignore_index: int = 255
    logit_bias: Tensor | None = None
    focal_gamma: float = 0.0
    square_prediction: bool = False
    with_log_prob: bool = False
    with_recall: bool = False
    group: Tensor | None = None
    num_groups: int = 0
    align_corners: bool = False
    marked: Tensor | None = None


class _Once(torch.autograd.Function):
    """A gradient as it is; to differentiate it by one of ``sources`` is an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor | None) -> Tensor:
        return gradient

    @staticmethod
    def backward(ctx: Any, *by: Tensor) -> None:
        raise RuntimeError(
            "this gradient cannot be differentiated again; losses with backend='eager' differentiate twice"
        )


def once_differentiable(backward: Callable) -> Callable:
    """The ``backward(ctx, saved, *by)`` of a function without a second derivative; ``saved``: its tensors.

    torch's decorator of this name lets a second derivative be 0 where no incoming gradient requires grad.
    """

    @torch.compiler.disable
    @wraps(backward)
    def wrapper(ctx: Any, *by: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # checkpointing allows to read them once
        with torch.no_grad():
            gradients = backward(ctx, saved, *by)
        if not torch.is_grad_enabled():
            return gradients
        return tuple(None if x is None else _Once.apply(x, *saved, *by) for x in gradients)

    return wrapper


def valid_pixels(target: Tensor, ignore_index: int | None) -> Tensor:
    """Which pixels of a label count, bool of its shape; None: all of them."""
    limits = torch.iinfo(target.dtype)  # beyond them a comparison would wrap around
    if ignore_index is None or not limits.min <= ignore_index <= limits.max:
        return torch.ones_like(target, dtype=torch.bool)
    return target != ignore_index


def sum_dtype(like: Tensor) -> torch.dtype:
    """What sums over pixels are added up in: float64, or float32 on a device that has none, as Apple's.

    Whether a device has float64 is found out by making such a tensor: no list of devices would be complete.
    """
    try:
        torch.empty(0, dtype=torch.float64, device=like.device)
    except (TypeError, RuntimeError):  # Apple's raises the first, others the second
        return torch.float32
    return torch.float64


class _SumOverRanks(torch.autograd.Function):
    # The loss of every rank depends on the sums of all of them, so the gradients of all ranks' losses are
    # summed too; an all-reduce that passes its gradient through would leave it world_size times too small.
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return _SumOverRanks.apply(grad)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of ``x`` over all ranks, differentiable; ``x`` itself where nothing is distributed."""
    if rank_and_number()[1] == 1:
        return x
    return _SumOverRanks.apply(x)


def gather_from_ranks(x: Tensor) -> list[Tensor]:
    """The ``x`` of every rank, all of one shape, not differentiable; ``[x]`` where nothing is distributed."""
    number = rank_and_number()[1]
    if number == 1:
        return [x]
    gathered = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(number)]
    dist.all_gather(gathered, x.contiguous())
    return gathered


def rank_and_number() -> tuple[int, int]:
    """This process's rank and the number of ranks; 0 and 1 where nothing is distributed."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()
