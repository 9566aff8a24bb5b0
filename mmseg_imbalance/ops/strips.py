"""The soft statistics strip by strip: bounded memory, softmax recomputed in backward.

An image is walked in strips of rows that fit the cache. From small logits, the columns are resized once
per image, (C, h, w) to (C, h, W), and a strip takes its rows from there: (r, k) @ (k, W), k a few rows.

Backward, with p recomputed and the gradients gN, gI, gP, gL of nll, intersection, prediction, log_prob, for a
pixel of label y and weight m:

    a    = m (gI_y p_y + gN_y dl/dlog p_y),   l the pixel's loss: -log p_y or its focal form
    q_k  = m gP_k                             2 m gP_k p_k where the prediction is squared
    dz_k = p_k (q_k - sum_j q_j p_j - a - m sum_j gL_j) + m gL_k + [k = y] a

Only logits and labels are kept between the passes. p is never formed: e = exp(z - max z) stands for it,
and its sum over classes divides the per-pixel factors instead, C times fewer numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmseg_imbalance.ops.soft_stats import Options, SoftStats

# pixels of a strip: its few (C, r, W) buffers stay in the cache and each operation still has work to share
STRIP_PIXELS = 32768


def soft_stats(logits: Tensor, target: Tensor, options: Options) -> SoftStats:
    """See :func:`mmseg_imbalance.ops.soft_stats`."""
    return SoftStats(*_SoftStats.apply(logits, target, options))


class _Image:
    """The strips of one image: logits at label size, labels and pixel weights, a few rows at a time."""

    def __init__(self, logits: Tensor, target: Tensor, o: Options, index: int) -> None:
        self.o = o
        self.z = logits.detach()[index]  # (C, h, w)
        self.target = target[index]  # (H, W)
        self.weight = None if o.pixel_weight is None else o.pixel_weight[index]
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        self.resized = self.z.shape[1:] != self.target.shape
        if o.logit_bias is not None:
            self.bias = o.logit_bias.to(self.dtype)[:, None, None]
        if self.resized:
            h, (height, width) = self.z.shape[1], self.target.shape
            small = self.z.to(self.dtype)
            if o.logit_bias is not None:
                small = small + self.bias
            # recorded, so that autograd's own transposed resize brings the gradient back to (h, w)
            with torch.enable_grad():
                self.small = small.requires_grad_()
                self.columns = F.interpolate(
                    self.small[None], (h, width), mode='bilinear', align_corners=o.align_corners
                )[0]
            self.z = self.columns.detach()  # (C, h, W)
            rows = torch.eye(h, dtype=self.dtype, device=self.z.device)[None, None]
            self.rows = F.interpolate(rows, (height, h), mode='bilinear', align_corners=o.align_corners)[
                0, 0
            ]  # (H, h): row i holds the one or two coefficients of output row i

    def strips(self) -> Iterator[_Strip]:
        height, width = self.target.shape
        step = max(1, STRIP_PIXELS // width)
        buffer = self.z.new_empty((len(self.z), min(step, height), width), dtype=self.dtype)
        for start in range(0, height, step):
            yield _Strip(self, slice(start, min(start + step, height)), buffer)


class _Strip:
    """Rows of one image: labels ``y``, weights ``m``, and the band of source rows they are resized from."""

    def __init__(self, image: _Image, rows: slice, buffer: Tensor) -> None:
        self.image = image
        self.index = rows
        self.buffer = buffer[:, : rows.stop - rows.start]
        target = image.target[rows]
        self.valid = target != image.o.ignore_index
        self.y = torch.where(self.valid, target, 0).long()[None]  # (1, r, W)
        self.m = self.valid.to(image.dtype)
        if image.weight is not None:
            self.m *= image.weight[rows]
        if image.resized:
            h, height = image.rows.shape[1], len(image.target)
            # one row more on either side covers both conventions of align_corners
            first = max(0, math.floor(rows.start * h / height) - 2)
            self.band = slice(first, min(h, math.ceil(rows.stop * h / height) + 2))

    def logits(self) -> Tensor:
        """(C, r, W): the logits at label size with their bias, in the buffer or where they lie."""
        image = self.image
        if image.resized:
            source = image.z[:, self.band]
            return torch.matmul(image.rows[self.index, self.band], source, out=self.buffer)
        z = image.z[:, self.index]
        if image.o.logit_bias is not None:
            return torch.add(z, image.bias, out=self.buffer)
        return z if z.dtype == image.dtype else self.buffer.copy_(z)

    def below_top(self) -> Tensor:
        """z - max z over the classes, (C, r, W), in the buffer."""
        z = self.logits()
        return torch.sub(z, z.amax(0), out=self.buffer)


def _focal(log_p: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """-(1 - p)^gamma log p and its derivative by log p."""
    p, miss = log_p.exp(), -torch.expm1(log_p)
    miss = miss.clamp_min(torch.finfo(miss.dtype).tiny)
    power = miss**gamma
    return -power * log_p, gamma * power / miss * p * log_p - power


def _hit(difference: Tensor, y: Tensor) -> Tensor:
    """Whether the largest logit is that of y, the first one among equals; ``difference`` is z - max z."""
    pixels = y.numel()
    if difference.is_cpu and difference.count_nonzero() == difference.numel() - pixels:
        # one maximum in each pixel, as nearly always: argmax takes a hundred times as long on CPU
        return difference.gather(0, y)[0] == 0
    return difference.argmax(0) == y[0]


class _SoftStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, o):  # type: ignore[no-untyped-def]
        batch, channels = logits.shape[:2]
        dtype = torch.promote_types(logits.dtype, torch.float32)
        # by class of the label: nll, intersection, truth; strips and pixels are added in double
        by_label = logits.new_zeros((batch, 3, channels), dtype=torch.float64)
        prediction = logits.new_zeros((batch, channels), dtype=torch.float64)
        log_prob = torch.zeros_like(prediction) if o.with_log_prob else None
        correct = logits.new_zeros(batch, dtype=torch.int64)
        group = logits.new_zeros((2, o.num_groups), dtype=torch.float64)

        for b in range(batch):
            for strip in _Image(logits, target, o, b).strips():
                y, m = strip.y, strip.m
                e = strip.below_top()
                correct[b] += (_hit(e, y) & strip.valid).sum()
                below = e.gather(0, y)[0]  # z_y - max z, exact for logits of any size
                if o.with_log_prob:
                    # before the exponentials overwrite the logits
                    shifted = e.flatten(1) @ m.flatten()
                total = e.exp_().sum(0)
                log_total = total.log()
                log_p = below - log_total
                p = log_p.exp()
                loss = _focal(log_p, o.focal_gamma)[0] if o.focal_gamma > 0 else -log_p
                sums = torch.stack([m * loss, m * p, m]).flatten(1).double()
                by_label[b].scatter_add_(1, y.flatten().expand(3, -1), sums)
                if o.square_prediction:
                    prediction[b] += e.square().flatten(1) @ (m / total.square()).flatten()
                else:
                    prediction[b] += e.flatten(1) @ (m / total).flatten()
                if log_prob is not None:
                    log_prob[b] += shifted.double() - (m * log_total).sum(dtype=torch.float64)
                if o.group is not None:
                    ids = torch.where(strip.valid, o.group[b, strip.index], 0).flatten().long()
                    sums = torch.where(strip.valid, torch.stack([-log_p, torch.ones_like(p)]), 0)
                    group.scatter_add_(1, ids.expand(2, -1), sums.flatten(1).double())

        ctx.save_for_backward(logits, target)
        ctx.options = o
        ctx.set_materialize_grads(False)
        nll, intersection, truth = (sums.to(dtype, copy=True) for sums in by_label.unbind(1))
        log_prob = None if log_prob is None else log_prob.to(dtype)
        group_nll = group_count = None
        if o.group is not None:
            group_nll, group_count = group[0].to(dtype, copy=True), group[1].long()
        fixed = (truth, correct, group_nll, group_count)
        ctx.mark_non_differentiable(*(t for t in fixed if t is not None))
        return nll, intersection, prediction.to(dtype), truth, correct, log_prob, group_nll, group_count

    @staticmethod
    @once_differentiable
    def backward(ctx, g_nll, g_intersection, g_prediction, _truth, _correct, g_log_prob, *_):  # type: ignore[no-untyped-def]
        logits, target = ctx.saved_tensors
        o = ctx.options
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        with torch.autocast(logits.device.type, enabled=False):
            for b in range(len(logits)):
                image = _Image(logits, target, o, b)
                rows = [
                    None if g is None else g[b].to(image.dtype)
                    for g in (g_nll, g_intersection, g_prediction, g_log_prob)
                ]
                if image.resized:
                    columns = torch.zeros_like(image.z)
                in_place = not image.resized and grad.dtype == image.dtype
                scratch: Tensor | None = None
                for strip in image.strips():
                    if in_place:
                        dz = grad[b, :, strip.index]
                    else:
                        if scratch is None:
                            scratch = torch.empty_like(strip.buffer)
                        dz = scratch[:, : strip.buffer.shape[1]]
                    _strip_gradient(strip, *rows, out=dz)
                    if image.resized:
                        taken = image.rows[strip.index, strip.band]
                        columns[:, strip.band] += torch.matmul(taken.T, dz)
                    elif not in_place:
                        grad[b, :, strip.index] = dz
                if image.resized:
                    grad[b] = torch.autograd.grad(image.columns, image.small, columns)[0]
        return grad, None, None


def _strip_gradient(
    strip: _Strip,
    g_nll: Tensor | None,
    g_intersection: Tensor | None,
    g_prediction: Tensor | None,
    g_log_prob: Tensor | None,
    *,
    out: Tensor,
) -> None:
    """Gradient by the logits of a strip, (C, r, W), into ``out``; the formula heads this file."""
    y, m, o = strip.y, strip.m, strip.image.o
    e = strip.below_top()
    below = e.gather(0, y)[0] if o.focal_gamma > 0 else None
    e.exp_()
    total = e.sum(0)
    a = torch.zeros_like(m)
    if g_intersection is not None:
        a += g_intersection[y[0]] * (e.gather(0, y)[0] / total)
    if g_nll is not None:
        slope = -1 if below is None else _focal(below - total.log(), o.focal_gamma)[1]
        a += g_nll[y[0]] * slope
    a *= m
    common = a if g_log_prob is None else a + m * g_log_prob.sum()

    if g_prediction is None:
        torch.mul(e, -common / total, out=out)
    elif o.square_prediction:
        q = torch.mul(e, 2 * g_prediction[:, None, None], out=out).mul_(m / total)
        q.sub_((q * e).sum(0) / total + common).mul_(e.div_(total))
    else:
        mean = (g_prediction @ e.flatten(1)).view_as(m) / total
        torch.mul(g_prediction[:, None, None], m / total, out=out)
        out.sub_((m * mean + common) / total).mul_(e)
    if g_log_prob is not None:
        out.add_(m * g_log_prob[:, None, None])
    out.scatter_add_(0, y, a[None])
