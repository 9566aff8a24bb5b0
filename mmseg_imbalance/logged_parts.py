"""What the losses log beside their value: the terms of a combined loss, the state of subclasses.

A loss leaves these scalars in ``loss.logged``. Feature heads log them in every iteration. With
MMSegmentation's own heads a hook of this package does it, in the iterations that the logger shows.
"""

from __future__ import annotations

import math

import mmseg_imbalance.registry  # noqa: F401  its error says how to install MMSegmentation

import torch
from mmengine.hooks import Hook, LoggerHook
from mmengine.model import is_model_wrapper
from torch import Tensor, nn

from mmseg_imbalance.ignored_label import follow_ignored_label
from mmseg_imbalance.losses import WeightedLoss
from mmseg_imbalance.monitored import check_monitored_keys

# Iterations in a row: mixed precision may meet a few and goes on, weights that are NaN stay so.
NOT_FINITE = 10


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


class LoggedPartsHook(Hook):
    """Puts ``logged`` of the losses that no Feature head has logged into the log; base of other hooks.

    The keys are those of a Feature head, such as ``decode.combined_ce``. They reach the message hub in the
    iterations in which the logger is due; only then is the device waited for. Where a head calls a loss for
    several outputs (DAHead), they are of the last one. Where a run has several hooks of this kind the first
    one does it. Its priority must be above the logger's, as it is by default.

    Before training it also sees to what the parts of a run must agree on:
    :func:`~mmseg_imbalance.ignored_label.follow_ignored_label` and
    :func:`~mmseg_imbalance.monitored.check_monitored_keys`.

    It also ends a training whose loss has not been finite in 10 iterations in a row: the weights of the model
    are NaN then, on all ranks, and stay so.
    """

    def before_train(self, runner) -> None:
        self.interval_of_logger = 0  # of no use unless this hook is the first and there is a logger
        self.not_finite = 0  # iterations in a row
        logger = next((hook for hook in runner.hooks if isinstance(hook, LoggerHook)), None)
        self.first = next(hook for hook in runner.hooks if isinstance(hook, LoggedPartsHook)) is self
        if self.first:
            follow_ignored_label(runner)
            check_monitored_keys(runner)
        if self.first and logger is not None:
            self.interval_of_logger = logger.interval
            self.by_head = losses_by_head(unwrapped(runner.model))

    def after_train_iter(
        self, runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        if self.first:
            self._end_where_not_finite(runner, outputs)
        interval = self.interval_of_logger
        if not interval or not (
            self.every_n_inner_iters(batch_idx, interval)
            or self.end_of_epoch(runner.train_dataloader, batch_idx)
        ):
            return
        values: dict[str, Tensor] = {}
        for head, losses in self.by_head.items():
            for loss in losses:
                for name, value in loss.take_logged().items():
                    key = f'{head}.{name}'
                    values[key] = values[key] + value if key in values else value
        if values:
            numbers = torch.stack([value.float() for value in values.values()]).tolist()
            for key, number in zip(values, numbers, strict=True):
                runner.message_hub.update_scalar(f'train/{key}', number)

    def _end_where_not_finite(self, runner, outputs: dict | None) -> None:
        if 'train/loss' not in runner.message_hub.log_scalars:  # MMEngine's RuntimeInfoHook is switched off
            return
        # a number that MMEngine has taken from the device already
        latest = float(runner.message_hub.get_scalar('train/loss').current())
        self.not_finite = 0 if math.isfinite(latest) else self.not_finite + 1
        if self.not_finite == NOT_FINITE:
            which = [key for key, value in (outputs or {}).items() if not math.isfinite(value)]
            raise RuntimeError(
                f'the loss has not been finite in {NOT_FINITE} iterations in a row, up to iteration '
                f'{runner.iter + 1}: {", ".join(which)}. Training does not recover from that. Resume from a '
                'checkpoint before, with a smaller learning rate or clipped gradients '
                '(optim_wrapper.clip_grad). If it comes at the same iteration again, look at the images and '
                'labels of that batch'
            )
