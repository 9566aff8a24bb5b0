"""Hooks of a training run."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from mmseg_imbalance.registry import HOOKS

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import autocast
from torch import nn

from mmseg_imbalance.class_weight import ClassWeight, WeightRecord
from mmseg_imbalance.counting import check_counting, training_frequency
from mmseg_imbalance.frequency import ClassFrequency
from mmseg_imbalance.heads import check_heads
from mmseg_imbalance.label_check import LabelCheck
from mmseg_imbalance.logged_parts import unwrapped
from mmseg_imbalance.losses import WeightedLoss
from mmseg_imbalance.options import check_choice, check_whole
from mmseg_imbalance.plots import draw_subclasses, plot_class_weights
from mmseg_imbalance.queries import QueryClassLoss
from mmseg_imbalance.run_hook import RunHook
from mmseg_imbalance.subclass_maps import find_subclassified, sharding_of, subclass_maps, subclasses
from mmseg_imbalance.tables import class_table, names_and_colours, source_table, subclass_table, table_text
from mmseg_imbalance.weighting import (
    SCHEMES,
    check_options,
    check_power_schedule,
    class_weights,
    scheduled_power,
    scheduled_weights,
)

FILLED = (WeightedLoss, QueryClassLoss)


@HOOKS.register_module()
class ClassWeightHook(RunHook):
    """Before training, fill every loss with ``class_weight='auto'`` from the training annotations.

    Of :class:`~mmseg_imbalance.queries.QueryClassLoss` it fills ``object_weight``. Losses with
    ``logit_adjustment`` or ``logit_variation`` get the class frequency. The annotations are counted once and
    the counts cached, so another scheme or run costs nothing. Logs a table and writes ``class_weights.json``
    and ``class_weights.png`` into the work_dir. A resumed run takes the weights from its checkpoint, unless
    the options below or the counts have changed. In the first iterations it holds the labels that arrive
    against the counts, see :class:`~mmseg_imbalance.label_check.LabelCheck`. It does what
    :class:`~mmseg_imbalance.run_hook.RunHook` does.

    Args:
        scheme: of :func:`~mmseg_imbalance.weighting.class_weights`.
        cache_dir: folder of the counts; None: see :func:`~mmseg_imbalance.counting.training_frequency`.
        max_images: count a random sample of so many images; None: all.
        num_workers: worker processes of each rank; None: as many as the train_dataloader has.
        label_transforms: names of the transforms that change labels, see
            :func:`~mmseg_imbalance.counting.count_classes`.
        power_schedule: points (progress, power) of an exponent on the weights while training, see
            :func:`~mmseg_imbalance.weighting.scheduled_weights`, logged as class_weight_power; None: the
            weights stay.
        **options: of the scheme: beta, unit, k, power, max_ratio.

    Raises:
        ValueError: an option out of its range; before training, 'auto' in a loss of another package that
            took it.
        TypeError: an unknown option.
    """

    def __init__(
        self,
        scheme: str = 'sqrt_inv_freq',
        cache_dir: str | os.PathLike[str] | None = None,
        max_images: int | None = None,
        num_workers: int | None = None,
        label_transforms: Sequence[str] | None = None,
        power_schedule: Sequence[tuple[float, float]] | None = None,
        **options: object,
    ) -> None:
        check_choice('scheme', scheme, SCHEMES)
        parameters = inspect.signature(class_weights).parameters.values()
        known = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY]
        if unknown := sorted(set(options) - set(known)):
            raise TypeError(
                f'ClassWeightHook has no option {unknown}; those of the schemes are {known}, and '
                'weights that change while training are power_schedule=[(progress, power), ...]'
            )
        check_options(**options)
        check_counting(max_images, num_workers)
        self.scheme = scheme
        self.cache_dir = cache_dir
        self.max_images = max_images
        self.num_workers = num_workers
        self.label_transforms = label_transforms
        if power_schedule is not None:
            check_power_schedule(power_schedule)
        self.power_schedule = power_schedule
        self.options = options

    def before_train(self, runner) -> None:
        # not before_run: weights are initialised and a checkpoint's message hub is loaded between the two
        super().before_train(runner)
        model = unwrapped(runner.model)
        check_heads(model)
        self.label_check = LabelCheck(runner)
        self.scheduled: list[ClassWeight] = []  # that change while training
        ours = [
            (name if weight.name == 'class_weight' else f'{weight.name} of {name}', weight)
            for name, loss in model.named_modules()
            if isinstance(loss, FILLED)
            for weight in loss.class_weights
        ]
        auto = {name: weight for name, weight in ours if weight.waiting}
        waiting = [weight for _, weight in ours if weight.waiting or weight.needs_pixels]
        self._name_losses_left_alone(runner, model)
        if not any(weight.spec is not None or weight.by_counts for _, weight in ours):
            runner.logger.warning(
                "ClassWeightHook has nothing to do: no loss of this package says class_weight='auto' or "
                'another class_weight, logit_adjustment or logit_variation'
            )
        if self.power_schedule is not None and not auto:
            runner.logger.warning(
                "power_schedule of ClassWeightHook changes nothing: no loss says class_weight='auto'"
            )
        classes = (getattr(runner.train_dataloader.dataset, 'metainfo', None) or {}).get('classes')
        for loss in model.modules():
            if isinstance(loss, QueryClassLoss) and classes:  # before the head reads its numbers
                loss.check_classes(len(classes))
        if not self.power_schedule or not auto:  # of a run that this one resumes
            runner.message_hub.log_scalars.pop('train/class_weight_power', None)
        if not waiting:
            return
        record = self._find_record(runner)
        self._warn_of_other_counts(runner, record)
        for weight in waiting:
            if weight.waiting:
                weight.set_weights(record.weights)
            if weight.needs_pixels:
                weight.set_pixels(record.pixels)
        if self.power_schedule is not None:
            self.record, self.scheduled = record, list(auto.values())
        if auto:
            runner.logger.info(f'ClassWeightHook: {self.scheme} weights for {", ".join(auto)}')

    def before_train_iter(self, runner, batch_idx: int, data_batch: dict | None = None) -> None:
        if self.scheduled:
            progress = runner.iter / runner.max_iters
            weights = scheduled_weights(self.record.weights, self.power_schedule, progress)
            for weight in self.scheduled:
                weight.set_weights(weights)
            power = float(scheduled_power(self.power_schedule, progress))
            runner.message_hub.update_scalar('train/class_weight_power', power)

    def after_train_iter(
        self, runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        self.label_check.after_iteration(runner)

    def after_train(self, runner) -> None:
        super().after_train(runner)
        self.label_check.remove()

    def _warn_of_other_counts(self, runner, record: WeightRecord) -> None:
        """A sampler that has counted for itself may have counted other labels."""
        drawn = getattr(getattr(runner.train_dataloader, 'sampler', None), 'pixels', None)
        if drawn is None or record.pixels is None or record.num_images != record.dataset_images:
            return
        counted = zip(record.classes, drawn.tolist(), record.pixels, strict=True)
        other = [f'{name}: {theirs:,}, here {ours:,}' for name, theirs, ours in counted if theirs != ours]
        if other:
            runner.logger.warning(
                'the sampler has counted other pixels than ClassWeightHook: '
                f'{"; ".join(other[:10])}. Give both the same label_transforms and ignore_index'
            )

    def _find_record(self, runner) -> WeightRecord:
        """The weights of the checkpoint where the counts are still the same, else those of the counts."""
        old = self._of_checkpoint(runner)
        try:
            frequency = training_frequency(
                runner,
                max_images=self.max_images,
                num_workers=self.num_workers,
                cache_dir=self.cache_dir,
                label_transforms=self.label_transforms,
            )
        except FileNotFoundError as error:
            if old is None:
                raise
            runner.logger.warning(
                'ClassWeightHook cannot compare the class counts with those of the checkpoint, whose weights '
                f'stay: {error}'
            )
            return old
        changes = [] if old is None else old.changes(frequency)
        if old is not None and not changes:
            runner.logger.info(f'ClassWeightHook: weights of the checkpoint, {old.weights}')
            return old
        if old is not None:
            more = f'; and {len(changes) - 10} more classes' if len(changes) > 10 else ''
            runner.logger.warning(
                'ClassWeightHook: the training annotations are not those that the weights of the checkpoint '
                f'come from, so these are weighed anew: {"; ".join(changes[:10])}{more}. '
                f'{self._how_to_keep(runner, old, frequency)}'
            )
        record = self._weigh(runner, frequency)
        runner.message_hub.update_info('class_weights', record.to_dict())
        if is_main_process():
            record.save(os.path.join(runner.work_dir, 'class_weights.json'))
        return record

    def _how_to_keep(self, runner, old: WeightRecord, frequency: ClassFrequency) -> str:
        now = zip(old.classes, old.weights, frequency.pixels.tolist(), strict=True)
        if taught_nothing := [name for name, weight, pixels in now if weight == 0 and pixels > 0]:
            return f'The old weights, which are 0 for {taught_nothing}, cannot be kept.'
        kept = os.path.join(runner.work_dir, f'class_weights_until_{runner.iter}.json')
        if is_main_process():
            old.save(kept)
        how = f'resume from the same checkpoint with class_weight={kept!r} in the losses'
        return f'To keep the old weights {how}.'

    def _of_checkpoint(self, runner) -> WeightRecord | None:
        """The record of a resumed run, unless it is of other classes or other options."""
        known = runner.message_hub.get_info('class_weights')
        if known is None:
            return None
        record = WeightRecord.from_dict(known)
        classes = list(runner.train_dataloader.dataset.metainfo.get('classes') or ())
        same = (record.scheme, record.options, record.max_images, record.classes) == (
            self.scheme,
            self.options,
            self.max_images,
            classes,
        )
        return record if same else None

    def _weigh(self, runner, frequency: ClassFrequency) -> WeightRecord:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            weights = class_weights(frequency, self.scheme, **self.options)
        for warning in caught:
            runner.logger.warning(str(warning.message))
        runner.logger.info('\n' + table_text(class_table(frequency, {self.scheme: weights})))
        if (sources := source_table(frequency)) is not None:
            runner.logger.info('\n' + table_text(sources))
        if is_main_process():
            chart = os.path.join(runner.work_dir, 'class_weights.png')
            plot_class_weights(frequency, weights, chart, label=f'{self.scheme} weight')
        return WeightRecord.count(frequency, weights, self.scheme, self.options, self.max_images)

    def _name_losses_left_alone(self, runner, model: nn.Module) -> None:
        for name, module in model.named_modules():
            weight = getattr(module, 'class_weight', None)
            if 'loss' not in name or weight is None or isinstance(module, FILLED):
                continue
            kind = type(module).__name__
            if name.endswith('loss_cls'):  # of queries, which are never ignored
                ours = "dict(type='QueryClassLoss', object_weight='auto')"
                reason = f'the class_weight of {kind} stays as it is; {ours} is filled'
            else:
                ours = "dict(type='WeightedCrossEntropyLoss', class_weight='auto')"
                reason = f'the class_weight of {kind} can fail on ignored pixels; {ours} takes both'
            if isinstance(weight, str) and weight == 'auto':
                raise ValueError(f"{name}: {kind} does not know class_weight='auto'; {ours} does")
            runner.logger.warning(f'ClassWeightHook leaves {name} alone: {reason}')


@HOOKS.register_module()
class SubclassVisualizationHook(Hook):
    """At validation, draw subclasses and weights of each SubclassifiedLoss in a few images; log a table.

    A picture shows the image, the truth, the subclass of every pixel and its weight. It goes to the backends
    of the visualizer: files, TensorBoard, WandB. The model sees the whole image, also where it is tested on
    sliding windows. Neither the model nor the training is changed. All ranks run it, since a module such as
    SyncBN may wait for the others. Where the parameters are sharded, one warning takes the place of pictures.

    Args:
        num_images: at least 0; the first images of the validation loop on the main rank are drawn.
    """

    def __init__(self, num_images: int = 4) -> None:
        check_whole(0, num_images=num_images)
        self.num_images = num_images
        self.drawn = 0

    def before_run(self, runner) -> None:
        self.losses = {}
        sharding = sharding_of(runner.model)
        if sharding is not None:
            runner.logger.warning(
                f'SubclassVisualizationHook shows nothing: with {sharding} each rank holds a part of the '
                'parameters, and heads cannot be run on their own. mmseg-imbalance subclasses shows them '
                'from a checkpoint of the whole model'
            )
            return
        try:
            self.losses = find_subclassified(unwrapped(runner.model))
        except ValueError as error:
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
        if not self.losses:
            return
        model, images = unwrapped(runner.model), len(data_batch['inputs'])
        # as often on all ranks, also where the last batch is not as long on all of them
        number = min(runner.val_dataloader.batch_size or images, self.num_images - self.drawn)
        for index in range(number):
            with autocast(enabled=getattr(runner.val_loop, 'fp16', False)):
                maps = subclass_maps(model, self.losses, data_batch, min(index, images - 1))
            self.drawn += 1
            if index >= images or not is_main_process():
                continue
            image = Path(data_batch['data_samples'][index].get('img_path', str(self.drawn - 1))).stem
            for name, seen in maps.items():
                state = subclasses(self.losses[name].loss)
                picture = draw_subclasses(seen, self.classes, self.palette, state)
                runner.visualizer.add_image(f'{name}_subclass_{image}', picture, step=runner.iter)
