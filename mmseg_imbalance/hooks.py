"""Hooks of a training run."""

from __future__ import annotations

import inspect
import json
import math
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import autocast
from torch import Tensor, nn

from mmseg_imbalance.counting import training_frequency
from mmseg_imbalance.files import write_atomically
from mmseg_imbalance.frequency import ClassFrequency
from mmseg_imbalance.losses import WeightedLoss
from mmseg_imbalance.ops import SoftStats
from mmseg_imbalance.plots import ClassBalance, draw_subclasses, plot_class_balance, plot_class_weights
from mmseg_imbalance.registry import HOOKS
from mmseg_imbalance.subclass_maps import find_subclassified, subclass_maps, subclasses
from mmseg_imbalance.tables import class_table, names_and_colours, subclass_table, table_text
from mmseg_imbalance.weighting import SCHEMES, class_weights, log_prior, weight_record


@HOOKS.register_module()
class ClassWeightHook(Hook):
    """Before training, fill every loss with ``class_weight='auto'`` from the training annotations.

    Losses with ``logit_adjustment`` or ``logit_variation`` get the class frequency. The annotations are
    counted once and the counts cached, so another scheme or run costs nothing. Logs a table and writes
    ``class_weights.json`` and ``class_weights.png`` into the work_dir. A resumed run takes the weights from
    its checkpoint, unless the options below have changed.

    Args:
        scheme: of :func:`~mmseg_imbalance.weighting.class_weights`.
        cache_dir: folder of the counts; None: see :func:`~mmseg_imbalance.counting.training_frequency`.
        max_images: count a random sample of so many images; None: all.
        num_workers: worker processes of each rank.
        **options: of the scheme: beta, unit, k, power, max_ratio.
    """

    def __init__(
        self,
        scheme: str = 'sqrt_inv_freq',
        cache_dir: str | os.PathLike[str] | None = None,
        max_images: int | None = None,
        num_workers: int = 2,
        **options: object,
    ) -> None:
        if scheme not in SCHEMES:
            raise ValueError(f'scheme must be one of {SCHEMES}, got {scheme!r}')
        parameters = inspect.signature(class_weights).parameters.values()
        known = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY]
        if unknown := sorted(set(options) - set(known)):
            raise TypeError(f'ClassWeightHook has no option {unknown}; those of the schemes are {known}')
        self.scheme = scheme
        self.cache_dir = cache_dir
        self.max_images = max_images
        self.num_workers = num_workers
        self.options = options

    def before_train(self, runner) -> None:
        # not before_run: weights are initialised and a checkpoint's message hub is loaded between the two
        model = _unwrapped(runner.model)
        ours = {name: module for name, module in model.named_modules() if isinstance(module, WeightedLoss)}
        auto = {name: loss for name, loss in ours.items() if loss.pending == 'auto'}
        waiting = auto | {name: loss for name, loss in ours.items() if loss.needs_class_pixels}
        self._name_losses_left_alone(runner, model)
        if not waiting:
            runner.logger.warning(
                "ClassWeightHook has nothing to do: no loss says class_weight='auto', logit_adjustment or "
                'logit_variation'
            )
            return
        dataset = runner.train_dataloader.dataset
        asked = dict(scheme=self.scheme, options=self.options, max_images=self.max_images)
        asked['classes'] = list(dataset.metainfo.get('classes') or ())
        record = runner.message_hub.get_info('class_weights')
        if record is None or any(record[key] != value for key, value in asked.items()):
            heads = {name.rpartition('loss_decode')[0].rstrip('.') for name in waiting}
            frequency = training_frequency(
                runner,
                heads=[model.get_submodule(head) for head in heads],
                max_images=self.max_images,
                num_workers=self.num_workers,
                cache_dir=self.cache_dir,
            )
            record = self._weigh(runner, frequency) | asked
            runner.message_hub.update_info('class_weights', record)
            if is_main_process():
                with write_atomically(os.path.join(runner.work_dir, 'class_weights.json')) as file:
                    json.dump(record, file, indent=2)
        else:
            runner.logger.info(f'ClassWeightHook: weights of the checkpoint, {record["weights"]}')
        for name, loss in waiting.items():
            if name in auto:
                loss.set_class_weight(record['weights'])
            if loss.needs_class_pixels:
                loss.set_class_pixels(record['pixels'])
        if auto:
            runner.logger.info(f'ClassWeightHook: {self.scheme} weights for {", ".join(auto)}')

    def _weigh(self, runner, frequency: ClassFrequency) -> dict:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            weights = class_weights(frequency, self.scheme, **self.options)
        for warning in caught:
            runner.logger.warning(str(warning.message))
        runner.logger.info('\n' + table_text(class_table(frequency, {self.scheme: weights})))
        if is_main_process():
            chart = os.path.join(runner.work_dir, 'class_weights.png')
            plot_class_weights(frequency, weights, chart, label=f'{self.scheme} weight')
        return weight_record(frequency, weights)

    def _name_losses_left_alone(self, runner, model: nn.Module) -> None:
        for name, module in model.named_modules():
            weighted = 'loss' in name and getattr(module, 'class_weight', None) is not None
            if weighted and not isinstance(module, WeightedLoss):
                runner.logger.warning(
                    f'ClassWeightHook leaves {name} alone: the class_weight of {type(module).__name__} can '
                    "fail on ignored pixels; dict(type='WeightedCrossEntropyLoss', class_weight='auto') "
                    'takes both'
                )


@HOOKS.register_module()
class LogitAdjustmentHook(Hook):
    """Test a model that was trained without logit adjustment as if with it: z_c - tau ln f_c, post hoc.

    f_c is the share of class c in the training annotations, counted or taken from the cache as
    :class:`ClassWeightHook` does. The numbers are subtracted from what the ``conv_seg`` of the last decode
    head returns; resizing, sliding windows and test time augmentation follow.

    Args:
        tau: 0 changes nothing, 1 is the source's.
        cache_dir, max_images, num_workers: see :class:`ClassWeightHook`.

    Source: Menon et al. 2021, https://arxiv.org/abs/2007.07314, equation 9.
    """

    def __init__(
        self,
        tau: float = 1.0,
        cache_dir: str | os.PathLike[str] | None = None,
        max_images: int | None = None,
        num_workers: int = 2,
    ) -> None:
        if not math.isfinite(tau):
            raise ValueError(f'tau must be a finite number, got {tau}')
        self.tau = tau
        self.handle = None
        self.cache_dir = cache_dir
        self.max_images = max_images
        self.num_workers = num_workers

    def before_test(self, runner) -> None:
        model = runner.model
        while hasattr(model, 'module'):  # wrappers of DDP and of test time augmentation
            model = model.module
        head = getattr(model, 'decode_head', None)
        head = head[-1] if isinstance(head, nn.ModuleList) else head
        if not isinstance(getattr(head, 'conv_seg', None), nn.Module):
            raise TypeError(
                f'LogitAdjustmentHook shifts the logits of a conv_seg, which {type(head).__name__} of '
                f'{type(model).__name__} does not have; it works with heads derived from BaseDecodeHead'
            )
        for name, loss in model.named_modules():
            if isinstance(loss, WeightedLoss) and loss.logit_adjustment > 0:
                runner.logger.warning(
                    f'{name} was trained with logit_adjustment={loss.logit_adjustment} already; '
                    f'tau={self.tau} at test time comes on top of it'
                )
        frequency = training_frequency(
            runner.cfg,  # a runner that tests has no data set of training
            heads=[head],
            max_images=self.max_images,
            num_workers=self.num_workers,
            cache_dir=self.cache_dir,
        )
        shift = self.tau * torch.from_numpy(log_prior(frequency.pixels)).float()
        if len(shift) != head.num_classes:
            raise ValueError(
                f'the training data have {len(shift)} classes, {list(frequency.classes)}, but '
                f'{type(head).__name__} predicts {head.num_classes}'
            )
        if head.out_channels == 1:  # the logit of class 1 against class 0
            shift = shift[1:] - shift[:1]
        self._remove()  # of a test that ended in an error
        self.calls = 0

        def subtract(module, args, logits):
            self.calls += 1
            return logits - shift.to(logits)[:, None, None]

        self.handle = head.conv_seg.register_forward_hook(subtract)
        runner.logger.info(f'LogitAdjustmentHook: {self.tau} * ln f_c is subtracted from the logits')

    def _remove(self) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def after_test(self, runner) -> None:
        self._remove()
        if not self.calls:
            raise RuntimeError(
                'LogitAdjustmentHook changed nothing: the last decode head does not call its conv_seg'
            )


@HOOKS.register_module()
class SubclassVisualizationHook(Hook):
    """At validation, show what each SubclassifiedLoss makes of a few images, and log its subclasses.

    Each picture, of the image, the truth, the subclass of every pixel and its weight, goes to the backends
    of the visualizer: files, TensorBoard, WandB. It comes from a forward pass over the whole image, whatever
    windows the model is tested on. Neither the model nor the training is changed.

    Args:
        num_images: how many, at least 0: the first of the validation loop on the main rank.
    """

    def __init__(self, num_images: int = 4) -> None:
        if num_images < 0:
            raise ValueError(f'num_images must be at least 0, got {num_images}')
        self.num_images = num_images
        self.drawn = 0

    def before_run(self, runner) -> None:
        try:
            self.losses = find_subclassified(_unwrapped(runner.model))
        except ValueError as error:
            self.losses = {}
            runner.logger.warning(f'SubclassVisualizationHook has nothing to show: {error}')

    def before_val_epoch(self, runner) -> None:
        self.drawn = 0
        if not self.losses or not is_main_process():
            return
        metainfo = getattr(runner.val_dataloader.dataset, 'metainfo', {})
        if runner.message_hub.get_info('dataset_meta') is None:  # written before training alone
            runner.message_hub.update_info('dataset_meta', metainfo)
        number = max(2, *(head.out_channels for head, _ in self.losses.values()))
        self.classes, self.palette = names_and_colours(metainfo, number)
        for name, (_, loss) in self.losses.items():
            state = subclasses(loss)
            if state is not None:
                table = table_text(subclass_table(self.classes, state))
                runner.logger.info(f'subclasses of {name}, {runner.iter} iterations:\n{table}')

    def after_val_iter(self, runner, batch_idx: int, data_batch: dict, outputs: object = None) -> None:
        if not self.losses or not is_main_process():
            return
        model = _unwrapped(runner.model)
        for index in range(min(len(data_batch['inputs']), self.num_images - self.drawn)):
            with autocast(enabled=getattr(runner.val_loop, 'fp16', False)):
                maps = subclass_maps(model, self.losses, data_batch, index)
            image = Path(data_batch['data_samples'][index].get('img_path', str(self.drawn))).stem
            for name, seen in maps.items():
                state = subclasses(self.losses[name].loss)
                picture = draw_subclasses(seen, self.classes, self.palette, state)
                runner.visualizer.add_image(f'{name}_subclass_{image}', picture, step=runner.iter)
            self.drawn += 1


class ClassWatcher:
    """Adds up, on the device and without waiting for it, what a loss is made of, class by class."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # (4, C): pixels, correct ones, loss, square of the gradient's norm
        self.with_gradient = False

    def __call__(self, pred: Tensor, stats: SoftStats, parts: Tensor) -> None:
        """Take a batch: the head's logits, their sums, and the (C,) parts of the loss."""
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
class ClassBalanceHook(Hook):
    """Show what each class has of the pixels, of the loss and of its gradient, and its recall in training.

    Of every loss of this package, as scalars ``balance/LOSS/KIND/CLASS`` of the visualizer and at the end as
    ``class_balance.png`` in the work_dir; LOSS is 'decode', 'aux_0', or 'decode.loss_ce' where a head has
    several. KIND, over all ranks: ``pixel_share``, valid pixels of the class over all; ``loss_share``, what
    it adds to the loss; ``recall``, its pixels predicted right over its pixels (none from a loss that changes
    the logits); all since the last report, pixels without weights. ``gradient_share``: the norm of the
    gradient by the class's logits, of all losses together, over the sum of the classes' norms, in the
    iteration of the report; by the logits that the loss receives, which the framework's own heads have
    resized to the label. What a head calls for several outputs is added up over them.

    A class that the scalars leave out had no pixels, or the numbers were not finite.

    Args:
        interval: iterations from one report to the next, at least 1. Only then is the device waited for.
    """

    def __init__(self, interval: int = 50) -> None:
        if interval < 1:
            raise ValueError(f'interval must be at least 1 iteration, got {interval}')
        self.interval = interval

    def before_train(self, runner) -> None:
        self.losses = _named_as_logged(_unwrapped(runner.model))
        if not self.losses:
            runner.logger.warning(
                'ClassBalanceHook has nothing to watch: what a class has of a loss is known of the losses of '
                "this package alone; dict(type='WeightedCrossEntropyLoss') is the framework's cross-entropy"
            )
        for loss in self.losses.values():
            loss.watcher = ClassWatcher()
        self.metainfo = getattr(runner.train_dataloader.dataset, 'metainfo', {})
        self.reports: dict[str, list[ClassBalance]] = {name: [] for name in self.losses}

    def before_train_iter(self, runner, batch_idx: int, data_batch: dict | None = None) -> None:
        due = self.every_n_train_iters(runner, self.interval)
        for loss in self.losses.values():
            loss.watcher.with_gradient = due

    def after_train_iter(
        self, runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        if not self.losses or not self.every_n_train_iters(runner, self.interval):
            return
        # a rank may not have called a loss, where its images have no label for it
        watched = {name: loss.watcher for name, loss in self.losses.items()}
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
            balance = _class_balance(runner.iter + 1, *rows)
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
            loss.watcher = None
        reports = {name: of for name, of in self.reports.items() if of}
        if reports and is_main_process():
            number = max(len(of[0].recall) for of in reports.values())
            classes, _ = names_and_colours(self.metainfo, number)
            path = os.path.join(runner.work_dir, 'class_balance.png')
            picture = plot_class_balance(classes, reports, path)
            runner.visualizer.add_image('class_balance', picture, step=runner.iter)


def _class_balance(
    iteration: int, pixels: np.ndarray, correct: np.ndarray, loss: np.ndarray, square: np.ndarray
) -> ClassBalance:
    with np.errstate(divide='ignore', invalid='ignore'):
        # of an infinite sum, as an overflow in half precision gives, no share is known
        totals = ((part, part.sum()) for part in (pixels, loss, np.sqrt(square)))
        shares = (part / total if np.isfinite(total) else part * np.nan for part, total in totals)
        return ClassBalance(iteration, *shares, recall=correct / pixels)


def _named_as_logged(model: nn.Module) -> dict[str, WeightedLoss]:
    """The losses of this package by the names that the log gives them: decode, aux_0, decode.loss_ce."""
    by_head: dict[str, list[WeightedLoss]] = {}
    for path, module in model.named_modules():
        if isinstance(module, WeightedLoss):
            head, _, _ = path.partition('.loss_')
            head = head.replace('decode_head', 'decode').replace('auxiliary_head', 'aux').replace('.', '_')
            by_head.setdefault(head, []).append(module)
    named = {}
    for head, losses in by_head.items():
        for i, loss in enumerate(losses):
            name = head if len(losses) == 1 else f'{head}.{loss.loss_name}'
            while name in named:
                name += f'_{i}'
            named[name] = loss
    return named


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model
