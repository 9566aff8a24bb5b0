"""What each class gets in training: of the pixels, of the loss and of its gradient; and its recall."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

from mmseg_imbalance.registry import HOOKS

import numpy as np
import torch
from mmengine.dist import all_reduce, is_main_process
from torch import Tensor

from mmseg_imbalance.logged_parts import named_losses, unwrapped
from mmseg_imbalance.ops import SoftStats
from mmseg_imbalance.options import check_whole
from mmseg_imbalance.plots import plot_class_balance
from mmseg_imbalance.run_hook import RunHook
from mmseg_imbalance.tables import names_and_colours


class ClassBalance(NamedTuple):
    """What each class got since the last report, (C,) each; NaN where it is not known."""

    iteration: int
    pixel_share: np.ndarray
    loss_share: np.ndarray
    gradient_share: np.ndarray
    recall: np.ndarray

    @classmethod
    def from_sums(
        cls, iteration: int, pixels: np.ndarray, correct: np.ndarray, loss: np.ndarray, square: np.ndarray
    ) -> ClassBalance:
        """From the (C,) sums of a :class:`ClassWatcher`; shares of an infinite sum are NaN."""
        with np.errstate(divide='ignore', invalid='ignore'):
            totals = ((part, part.sum()) for part in (pixels, loss, np.sqrt(square)))
            shares = (part / total if np.isfinite(total) else part * np.nan for part, total in totals)
            return cls(iteration, *shares, recall=correct / pixels)


class ClassWatcher:
    """Adds up, on the device and without waiting for it, what a loss is made of, class by class."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # (4, C): pixels, correct ones, loss, square of the gradient's norm
        self.with_gradient = False

    def __call__(self, pred: Tensor, target: Tensor, stats: SoftStats, parts: Tensor) -> None:
        """Take a batch: the head's logits and labels, their sums, and the (C,) parts of the loss."""
        if self.sums is None:
            self.sums = parts.new_zeros(4, len(parts))
        self.sums[0] += stats.class_count.sum(0)
        self.sums[1] += stats.class_correct.sum(0)
        self.sums[2] += parts
        if self.with_gradient and pred.requires_grad:
            pred.register_hook(self._take_gradient)

    def _take_gradient(self, grad: Tensor) -> None:
        if self.sums is None:  # a backward after the report
            return
        dtype = torch.promote_types(grad.dtype, torch.float32)
        others = [0, *range(2, grad.ndim)]
        # of one output channel it is that of both classes
        self.sums[3] += torch.linalg.vector_norm(grad.detach(), dim=others, dtype=dtype).square()

    def take(self, classes: int, device: torch.device) -> Tensor:
        """The sums, (4, classes), which start anew; zeros where the loss was not called."""
        sums, self.sums = self.sums, None
        return torch.zeros(4, classes, device=device) if sums is None else sums


@HOOKS.register_module()
class ClassBalanceHook(RunHook):
    """Show what each class has of the pixels, of the loss and of its gradient, and its recall in training.

    It watches every loss of this package. At each report it sends scalars ``balance/LOSS/KIND/CLASS`` to the
    visualizer; at the end it writes ``class_balance.png`` into the work_dir. LOSS is 'decode', 'aux_0', or
    'decode.loss_ce' where a head has several losses. A head may call its loss for several outputs: their sums
    are added. All numbers are over all ranks, and pixels are counted without weights. KIND is one of

    - ``pixel_share``: valid pixels of the class over all, since the last report
    - ``loss_share``: what the class adds to the loss over the whole loss, since the last report
    - ``recall``: pixels of the class predicted right over its pixels, since the last report. A loss that
      changes the logits has none.
    - ``gradient_share``: the norm of the gradient at the logits of the class over the sum of these norms, of
      all losses together, in the iteration of the report. The logits are those that the loss receives:
      MMSegmentation's own heads resize them to the label before.

    A class has no scalar if it had no pixels or if the number is not finite. The hook does what
    :class:`~mmseg_imbalance.run_hook.RunHook` does.

    Args:
        interval: iterations from one report to the next, at least 1. Only then is the device waited for.
    """

    def __init__(self, interval: int = 50) -> None:
        check_whole(1, interval=interval)
        self.interval = interval

    def before_train(self, runner) -> None:
        super().before_train(runner)
        self.losses = named_losses(unwrapped(runner.model))
        if not self.losses:
            runner.logger.warning(
                'ClassBalanceHook has nothing to watch: it watches the losses of this package alone; '
                "dict(type='WeightedCrossEntropyLoss') is MMSegmentation's cross-entropy"
            )
        self.watchers = {name: ClassWatcher() for name in self.losses}
        for name, loss in self.losses.items():
            loss.watch(self.watchers[name])
        self.metainfo = getattr(runner.train_dataloader.dataset, 'metainfo', {})
        self.reports: dict[str, list[ClassBalance]] = {name: [] for name in self.losses}

    def before_train_iter(self, runner, batch_idx: int, data_batch: dict | None = None) -> None:
        due = self.every_n_train_iters(runner, self.interval)
        for watcher in self.watchers.values():
            watcher.with_gradient = due

    def after_train_iter(
        self, runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        if not self.losses or not self.every_n_train_iters(runner, self.interval):
            return
        # a rank may not have called a loss, where its images have no label for it
        watched = self.watchers
        widths = [0 if watcher.sums is None else watcher.sums.shape[1] for watcher in watched.values()]
        numbers = torch.tensor(widths)
        all_reduce(numbers, 'max')
        seen = next((watcher.sums for watcher in watched.values() if watcher.sums is not None), numbers)
        called = zip(watched.items(), numbers.tolist(), strict=True)
        sums = {name: watcher.take(number, seen.device) for (name, watcher), number in called if number}
        if not sums:
            return
        everything = torch.cat([rows.float() for rows in sums.values()], 1)
        all_reduce(everything)
        if not is_main_process():
            return
        ends = np.cumsum([rows.shape[1] for rows in sums.values()])
        scalars: dict[str, float] = {}
        for name, rows in zip(sums, np.split(np.array(everything.tolist()), ends[:-1], 1), strict=True):
            balance = ClassBalance.from_sums(runner.iter + 1, *rows)
            if self.losses[name].changes_logits:  # its argmax is not the prediction's
                balance = balance._replace(recall=np.full_like(balance.recall, np.nan))
            self.reports[name].append(balance)
            classes, _ = names_and_colours(self.metainfo, len(balance.recall))
            for kind, values in balance._asdict().items():
                if kind != 'iteration':
                    each = zip(classes, values.tolist(), strict=True)
                    scalars |= {f'balance/{name}/{kind}/{c}': x for c, x in each if math.isfinite(x)}
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)

    def after_train(self, runner) -> None:
        for loss in self.losses.values():
            loss.unwatch(ClassWatcher)
        reports = {name: history for name, history in self.reports.items() if history}
        if reports and is_main_process():
            number = max(len(history[0].recall) for history in reports.values())
            classes, _ = names_and_colours(self.metainfo, number)
            path = os.path.join(runner.work_dir, 'class_balance.png')
            picture = plot_class_balance(classes, reports, path)
            runner.visualizer.add_image('class_balance', picture, step=runner.iter)
