"""The definition of the soft statistics in plain differentiable torch, (B, C, H, W) at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg_imbalance.ops.contract import Options, SoftStats, sum_dtype


def soft_stats(logits: Tensor, target: Tensor, options: Options) -> SoftStats:
    """See :func:`mmseg_imbalance.ops.soft_stats`; every field is written out as it is defined there."""
    o = options
    dtype = torch.promote_types(logits.dtype, torch.float32)
    z = logits.to(dtype)
    if z.shape[2:] != target.shape[1:]:
        z = F.interpolate(z, target.shape[1:], mode='bilinear', align_corners=o.align_corners)
    if o.logit_bias is not None:
        z = z + o.logit_bias.to(dtype)[:, None, None]
    valid = target != o.ignore_index  # (B, H, W)
    # 0 times what is not finite is not 0: what lies under ignored pixels is left out, not weighed
    z = torch.where(valid[:, None], z, 0)
    y = torch.where(valid, target, 0).long()
    m = valid.to(dtype)
    if o.pixel_weight is not None:
        m = torch.where(valid, o.pixel_weight.to(dtype), 0)
    label = F.one_hot(y, z.shape[1]).movedim(3, 1)  # (B, C, H, W)
    member = label * m[:, None]

    log_p = z.log_softmax(1)
    p = log_p.exp()
    nll = -log_p.gather(1, y[:, None])  # (B, 1, H, W)
    loss = nll
    if o.focal_gamma > 0:
        # 1 - p_y from the logarithm keeps its digits where p_y is close to 1
        miss = -torch.expm1(-nll)
        loss = nll * miss.clamp_min(torch.finfo(dtype).tiny) ** o.focal_gamma

    group_nll = group_count = None
    if o.group is not None:
        ids = o.group[valid].long()
        group_count = torch.bincount(ids, minlength=o.num_groups)
        group_nll = nll.new_zeros(o.num_groups, dtype=sum_dtype(nll))
        group_nll = group_nll.index_add(0, ids, nll.detach()[:, 0][valid].to(group_nll)).to(dtype)
    marked_intersection = marked_truth = None
    if o.marked is not None:
        marked_member = member * (o.marked != 0)[:, None]
        marked_intersection, marked_truth = (marked_member * p).sum((2, 3)), marked_member.sum((2, 3))
    correct = (z.argmax(1) == y) & valid
    class_correct = class_count = None
    if o.with_recall:
        class_correct, class_count = ((label * pixels[:, None]).sum((2, 3)) for pixels in (correct, valid))
    return SoftStats(
        nll=(member * loss).sum((2, 3)),
        intersection=(member * p).sum((2, 3)),
        prediction=((p.square() if o.square_prediction else p) * m[:, None]).sum((2, 3)),
        truth=member.sum((2, 3)),
        correct=correct.sum((1, 2)),
        log_prob=(log_p * m[:, None]).sum((2, 3)) if o.with_log_prob else None,
        marked_intersection=marked_intersection,
        marked_truth=marked_truth,
        group_nll=group_nll,
        group_count=group_count,
        class_correct=class_correct,
        class_count=class_count,
    )
