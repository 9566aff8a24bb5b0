"""What a subclassified loss makes of images outside training: the subclass and the weight of every pixel."""

from __future__ import annotations

from typing import NamedTuple

import mmseg_imbalance.registry  # noqa: F401  its error says how to install MMSegmentation

import mmcv
import torch
from mmengine.model import is_model_wrapper
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from mmseg_imbalance.clustering import SubclassTable
from mmseg_imbalance.heads import FeatureKeeper
from mmseg_imbalance.losses import Batch
from mmseg_imbalance.ops import valid_pixels
from mmseg_imbalance.plots import SubclassMaps
from mmseg_imbalance.subclass import SimilaritySubclassifiedLoss, SubclassifiedLoss

Subclassified = SubclassifiedLoss | SimilaritySubclassifiedLoss


class LossOfHead(NamedTuple):
    """A loss and the head that calls it."""

    head: BaseDecodeHead
    loss: Subclassified


def find_subclassified(model: nn.Module) -> dict[str, LossOfHead]:
    """Each subclassified loss whose head can be run on its own, by ``decode_head.1`` and the like.

    Raises:
        ValueError: there is none.
    """
    found, refused = {}, []
    for name, loss in model.named_modules():
        path, of_head, index = name.partition('.loss_decode')
        if not (of_head and isinstance(loss, Subclassified)):
            continue
        # the stages of a cascade after its first take what the one before has predicted
        if path.startswith('decode_head.') and path != 'decode_head.0':
            refused.append(name)
        else:
            found[path + index] = LossOfHead(model.get_submodule(path), loss)
    if not found and refused:
        raise ValueError(
            f'{", ".join(refused)}: later stages of a cascade take what the stage before has predicted; only '
            'losses of its first stage and of auxiliary heads can be shown'
        )
    if not found:
        raise ValueError(
            f'no head of {type(model).__name__} has a subclassified loss; '
            "loss_decode=[dict(type='CombinedWeightedLoss'), dict(type='SubclassifiedLoss')] has one"
        )
    return found


def sharding_of(model: object) -> str | None:
    """What leaves this rank with a part of the parameters, so that no head runs on its own; None: nothing."""
    if is_model_wrapper(model) and not isinstance(model, DataParallel | DistributedDataParallel):
        return type(model).__name__
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__name__ == 'FullyShardedDataParallel':
                return kind.__name__
        if any(hasattr(parameter, 'device_mesh') for parameter in module.parameters(recurse=False)):
            return 'DTensor'
    return None


def subclasses(loss: Subclassified) -> SubclassTable | None:
    """The subclasses of a loss as arrays; None if it has none: not yet, or a SimilaritySubclassifiedLoss."""
    if not isinstance(loss, SubclassifiedLoss) or loss.weighting.centroid is None:
        return None
    return loss.weighting.table().numpy()


@torch.no_grad()
def subclass_maps(
    model: nn.Module, losses: dict[str, LossOfHead], data_batch: dict, index: int
) -> dict[str, SubclassMaps]:
    """What each of the losses makes of one image, from a forward pass over the whole of it.

    Args:
        model: the segmentor, in evaluation mode, without a wrapper.
        losses: of :func:`find_subclassified`.
        data_batch: of a validation loader: ``inputs``, (3, h, w) each and BGR as MMSegmentation loads images,
            and ``data_samples`` with the truth, (1, H, W).
        index: of the image in the batch.

    Raises:
        RuntimeError: a SubclassifiedLoss in a head that hands over no features.
    """
    own = {name: data_batch[name][index : index + 1] for name in ('inputs', 'data_samples')}
    seen = own['inputs'][0]
    inputs = model.data_preprocessor(own, False)['inputs']
    inputs = inputs[:, :, : seen.shape[1], : seen.shape[2]]  # it may have been padded
    target = own['data_samples'][0].gt_sem_seg.data.to(inputs.device)  # (1, H, W)
    pixels = seen[:3].flip(0).expand(3, -1, -1).permute(1, 2, 0)
    pixels = pixels.cpu().clamp(0, 255).to(torch.uint8).numpy()
    image = mmcv.imresize(pixels, target.shape[:0:-1])

    from_backbone = model.extract_feat(inputs)
    maps = {}
    for name, (head, loss) in losses.items():
        logits, features = _run(head, from_backbone)
        found = loss.weigh_pixels(Batch(logits, target, head.ignore_index, head.align_corners, features))
        counted = valid_pixels(target, head.ignore_index) & (target < logits.shape[1])
        truth = target.where(counted, -1)[0].cpu().numpy()
        subclass = None
        if isinstance(loss, SubclassifiedLoss):
            subclass = (found['group'][0] % loss.weighting.largest).cpu().numpy()
        weight = found['pixel_weight'][0].float()
        if getattr(loss, 'paper_exact', False):  # its weights bring along the mean over the batch
            weight = weight * target.numel()
        maps[name] = SubclassMaps(image, truth, weight.cpu().numpy(), subclass)
    return maps


def _run(head: BaseDecodeHead, inputs: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """The logits (1, C, h, w) of a head and, if it hands them over, the features."""
    if isinstance(head, FeatureKeeper):
        logits, features = head.forward_with_features(inputs)
    else:
        logits, features = head.forward(inputs), None
    if isinstance(logits, tuple | list):  # of heads with several outputs, the one that they predict with
        logits = logits[0]
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    return logits, features
