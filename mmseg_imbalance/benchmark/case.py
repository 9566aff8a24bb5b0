"""Rows that are measured on one batch, and the batch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

IGNORED = 255
LOSS_SCALE = 4096  # the gradient of a mean over a million pixels would vanish in float16


@dataclass(eq=False)
class Row:
    """A line of the table; a trial's ``run`` is what is measured, its ``result`` is value and gradient."""

    name: str
    make_trial: Callable
    truth: Callable | None = None  # the result by the formula; None: the trial's own
    note: str = ''
    ours: bool = False
    trial: Any = None  # what make_trial has made
    skipped: str | None = None  # why
    off_by: float | None = None
    right: bool = False
    seconds: list[float] = field(default_factory=list)  # by round
    host_seconds: list[float | None] = field(default_factory=list)  # None on a CPU
    peak: int | None = None  # bytes


@dataclass(eq=False)
class Case:
    """Rows on one batch; the first is what the others are compared with."""

    batch: str  # BxCxHxW
    logits: str
    rows: list[Row]
    least_bytes: int | None = None  # that forward and backward move
    exponentials: int | None = None  # that they take: one of each resized logit, twice
    files: int = 1  # that one run reads; time is per file
    memory: bool = True  # of this process, which is not all where others work too


class LossTrial:
    """Forward and backward of one loss(logits, target)."""

    def __init__(self, loss, logits, target):
        self.loss, self.logits, self.target = loss, logits, target

    def run(self):
        (LOSS_SCALE * self.loss(self.logits, self.target)).backward()
        self.logits.grad = None

    def result(self):
        value = LOSS_SCALE * self.loss(self.logits, self.target)
        return [value.detach(), *torch.autograd.grad(value, self.logits)]


def truth_of(formula, logits, target):
    """Value and gradient of a formula, from the logits in double."""
    return LossTrial(formula, logits.detach().double().requires_grad_(), target).result()


@dataclass(eq=False)
class GivenTrial:
    """What has no gradient: ``run`` is measured, ``result`` is held to ``truth``, lists of tensors."""

    run: Callable
    result: Callable
    truth: Callable


def by(*sizes):
    return 'x'.join(map(str, sizes))


def make_labels(shape, classes, ignored):
    """(B, H, W) in blocks of 16x16 pixels, and the blocks, (B, 1, H / 16, W / 16)."""
    batch, height, width = shape
    blocks = torch.randint(classes, (batch, 1, max(1, height // 16), max(1, width // 16)))
    blocks = torch.where(torch.rand(blocks.shape) < ignored, IGNORED, blocks).float()
    return F.interpolate(blocks, (height, width))[:, 0].long(), blocks


def make_batch(shape, classes, scale, args):
    """Logits (B, C, h, w) that are mostly right, and labels (B, H, W)."""
    torch.manual_seed(0)
    target, blocks = make_labels(shape, classes, args.ignored)
    seen = F.interpolate(blocks, [round(n / scale) for n in shape[1:]]).to(args.device)
    logits = 2 * torch.randn(shape[0], classes, *seen.shape[2:], device=args.device)
    logits += 5 * (seen == torch.arange(classes, device=args.device)[:, None, None])
    return logits.to(getattr(torch, args.dtype)).requires_grad_(), target.to(args.device)
