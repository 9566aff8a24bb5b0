"""What the losses log beside their value: the terms of a combined loss, the state of subclasses.

A loss leaves these scalars in ``loss.logged``. Feature heads log them in every iteration. With
MMSegmentation's own heads :class:`~mmseg_imbalance.run_hook.RunHook` does it, in the iterations that the
logger shows.
"""

from __future__ import annotations

import mmseg_imbalance.registry  # noqa: F401  its error says how to install MMSegmentation

import torch
from mmengine.logging import MessageHub
from mmengine.model import is_model_wrapper
from torch import Tensor, nn

from mmseg_imbalance.losses import WeightedLoss


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without MMEngine's distributed wrapper."""
    return model.module if is_model_wrapper(model) else model


def losses_by_head(model: nn.Module) -> dict[str, list[WeightedLoss]]:
    """The losses of this package by the prefix of their head in the log: 'decode', 'aux', 'aux_0'."""
    by_head: dict[str, list[WeightedLoss]] = {}
    for path, module in model.named_modules():
        if isinstance(module, WeightedLoss):
            head, _, _ = path.partition('.loss_')
            head = head.replace('decode_head', 'decode').replace('auxiliary_head', 'aux').replace('.', '_')
            by_head.setdefault(head, []).append(module)
    return by_head


def named_losses(model: nn.Module) -> dict[str, WeightedLoss]:
    """The losses of this package by names as in the log: 'decode', 'aux_0', of several 'decode.loss_ce'."""
    named: dict[str, WeightedLoss] = {}
    for head, losses in losses_by_head(model).items():
        for i, loss in enumerate(losses):
            name = head if len(losses) == 1 else f'{head}.{loss.loss_name}'
            while name in named:
                name += f'_{i}'
            named[name] = loss
    return named


def log_parts(hub: MessageHub, by_head: dict[str, list[WeightedLoss]]) -> None:
    """Put ``logged`` of the losses that no Feature head has logged into the log; the device is waited for.

    The keys are those of a Feature head, such as ``decode.combined_ce``. Where a head calls a loss for
    several outputs (DAHead), they are of the last one.

    Args:
        by_head: see :func:`losses_by_head`.
    """
    values: dict[str, Tensor] = {}
    for head, losses in by_head.items():
        for loss in losses:
            for name, value in loss.take_logged().items():
                key = f'{head}.{name}'
                values[key] = values[key] + value if key in values else value
    if values:
        numbers = torch.stack([value.float() for value in values.values()]).tolist()
        for key, number in zip(values, numbers, strict=True):
            hub.update_scalar(f'train/{key}', number)
