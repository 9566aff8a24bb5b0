"""What the hooks of this package do in every run."""

from __future__ import annotations

import math

from mmseg_imbalance.registry import HOOKS

import torch
from mmengine.hooks import Hook, LoggerHook

from mmseg_imbalance.balance import GradNorm
from mmseg_imbalance.ignored_label import follow_ignored_label
from mmseg_imbalance.logged_parts import log_parts, losses_by_head, unwrapped
from mmseg_imbalance.monitored import check_monitored_keys
from mmseg_imbalance.recall import RecallWeightedLoss
from mmseg_imbalance.samplers import tell_sampler_of_loop

# Iterations in a row: mixed precision may meet a few and goes on, weights that are NaN stay so.
NOT_FINITE = 10


@HOOKS.register_module()
class RunHook(Hook):
    """What the hooks of this package do in every run. Where a run has several of them, the first does it.

    ClassWeightHook and ClassBalanceHook are such hooks. A run without them, such as a baseline, can have this
    one alone. It works with any model and any loss.

    Before training:

    - the config of the run takes the place of that of the checkpoint, which MMEngine puts there when it
      resumes. The metrics read it.
    - RareClassSampler is told which loop trains
    - everything follows the label that is no class, see
      :func:`~mmseg_imbalance.ignored_label.follow_ignored_label`
    - where the run is not a resumed one, GradNorm and the running means of RecallWeightedLoss start anew,
      whatever ``load_from`` has brought
    - the keys that are watched are checked, see :func:`~mmseg_imbalance.monitored.check_monitored_keys`

    While training:

    - what the losses log beside their value goes into the log, see :mod:`mmseg_imbalance.logged_parts`. The
      priority of the hook must be above the logger's, as it is by default.
    - a training whose loss has not been finite in 10 iterations in a row ends: the weights of the model are
      NaN then, on all ranks, and stay so

    Raises:
        ValueError: what a run must agree on does not.
        RuntimeError: the loss stays NaN or infinite.
    """

    def before_train(self, runner) -> None:
        self.first = next(hook for hook in runner.hooks if isinstance(hook, RunHook)) is self
        if not self.first:
            return
        runner.message_hub.update_info('cfg', runner.cfg.pretty_text)  # before anything reads it
        tell_sampler_of_loop(runner)
        follow_ignored_label(runner)
        check_monitored_keys(runner)
        if runner.iter == 0:  # load_from is no resume
            for module in unwrapped(runner.model).modules():
                if isinstance(module, GradNorm | RecallWeightedLoss):
                    module.start_anew()
        self.not_finite = 0  # iterations in a row
        self.by_head = losses_by_head(unwrapped(runner.model))
        logger = next((hook for hook in runner.hooks if isinstance(hook, LoggerHook)), None)
        self.interval_of_logger = 0 if logger is None else logger.interval

    def after_train_iter(
        self, runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        if not self.first:
            return
        self._end_where_not_finite(runner, outputs)
        interval = self.interval_of_logger
        if interval and (
            self.every_n_inner_iters(batch_idx, interval)
            or self.end_of_epoch(runner.train_dataloader, batch_idx)
        ):
            log_parts(runner.message_hub, self.by_head)

    def _end_where_not_finite(self, runner, outputs: dict | None) -> None:
        if 'train/loss' not in runner.message_hub.log_scalars:  # MMEngine's RuntimeInfoHook is switched off
            return
        # a number that MMEngine has taken from the device already
        latest = float(runner.message_hub.get_scalar('train/loss').current())
        self.not_finite = 0 if math.isfinite(latest) else self.not_finite + 1
        if self.not_finite == NOT_FINITE:
            scalars = {key: torch.as_tensor(value).detach() for key, value in (outputs or {}).items()}
            which = [key for key, value in scalars.items() if not value.isfinite().all()]
            raise RuntimeError(
                f'the loss has not been finite in {NOT_FINITE} iterations in a row, up to iteration '
                f'{runner.iter + 1}: {", ".join(which)}. Training does not recover from that. Resume from a '
                'checkpoint before, with a smaller learning rate or clipped gradients '
                '(optim_wrapper.clip_grad). If it comes at the same iteration again, look at the images and '
                'labels of that batch'
            )
