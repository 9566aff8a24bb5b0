"""The one label of a run that is no class: who says which it is, and who follows.

The training data sets and the decode heads say it. 255 is MMSegmentation's default everywhere, so 255 says
nothing: whatever has it follows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from mmseg_imbalance.config_fields import get_field, innermost, transforms_of, type_name

UNSAID = 255
OPTIONS = ('ignore_index', 'ignore_label', 'seg_pad_val')  # of heads, of losses, of the data preprocessor
OWN_LABELS = 'STDCHead'  # this one makes labels of edges from those of the data


def ignored_label(dataset: Any = None, heads: Iterable[Any] = ()) -> int:
    """The label that is no class: what the data set or the heads say, 255 if none does.

    Args:
        dataset: a data set, also a wrapped one, or its config; None: not known.
        heads: decode heads, or their configs.

    Raises:
        ValueError: they say different labels.
    """
    said: dict[str, int] = {}
    for speaker in [*map(_unread, innermost(dataset)), *heads]:
        label = get_field(speaker, 'ignore_index')
        if label not in (None, UNSAID):
            said[f'ignore_index={label} of {type_name(speaker)}'] = label
    if len(set(said.values())) > 1:
        raise ValueError(
            f'one label is no class, but there are {" and ".join(said)}. Give the same ignore_index to all '
            'data sets and heads, or to one of them alone: those with the default of 255 take it over'
        )
    return next(iter(said.values()), UNSAID)


def decode_heads(model: Any) -> list[Any]:
    """The decode heads of a model or of its config, several of a cascade.

    A model without ``decode_head`` has those modules that have losses.
    """
    model = _unwrapped(model)
    heads = get_field(model, 'decode_head')
    if heads is None:
        return _heads(model) if isinstance(model, nn.Module) else []
    return list(heads) if isinstance(heads, list | tuple | nn.ModuleList) else [heads]


def _heads(model: nn.Module) -> list[nn.Module]:
    """All modules with losses, auxiliary ones too, that look at the labels of the data."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, 'loss_decode', None), nn.Module) and not _has_own_labels(module)
    ]


def _has_own_labels(module: nn.Module) -> bool:
    return any(kind.__name__ == OWN_LABELS for kind in type(module).__mro__)


def _unwrapped(model: Any) -> Any:
    """The model, or its config, without wrappers of ranks and of test time augmentation."""
    while (inner := get_field(model, 'module')) is not None:
        model = inner
    return model


def _unread(dataset: Any) -> Any:
    """Of a config the data set, which has read nothing yet: its class may have a default of its own."""
    if not isinstance(dataset, dict) or 'ignore_index' in dataset:
        return dataset
    from mmseg_imbalance.registry import DATASETS

    try:
        return DATASETS.build(dict(dataset, lazy_init=True, pipeline=[]))
    # it is not registered here, takes no such options, or looks for its files at once
    except (AssertionError, KeyError, OSError, TypeError):
        return dataset


def current_config() -> Any:
    """The config of the runner that was made last; None if there is none."""
    from mmengine.config import Config
    from mmengine.logging import MessageHub

    text = MessageHub.get_current_instance().get_info('cfg')
    return Config.fromstring(text, '.py') if text else None


def heads_of_run() -> list[Any]:
    """The decode heads in the config of the run; none where it is not known."""
    try:
        return decode_heads((current_config() or {}).get('model'))
    except (ImportError, NameError, SyntaxError):  # objects in a config make a text that is no Python
        return []


def check_heads_of_run(user: Any, counted: int) -> None:
    """As :func:`check_counted`, by the config of the run, where it is known and its heads say a label."""
    label = ignored_label(heads=heads_of_run())
    if label != UNSAID:
        check_counted(user, counted, label)


def label_of_evaluation(config: Any) -> int:
    """The label that is no class in the validation or test that runs now.

    It is that of the data set evaluated if this says one, else that of training.

    Args:
        config: of the run; an empty one: not known.
    """
    from mmengine.logging import MessageHub

    stage = MessageHub.get_current_instance().get_info('loop_stage')
    evaluated, training = (config.get(f'{name}_dataloader') or {} for name in (stage, 'train'))
    label = ignored_label(evaluated.get('dataset'))
    if label == UNSAID:
        label = ignored_label(training.get('dataset'), decode_heads(config.get('model')))
    return label


def give_ignored_label(model: nn.Module, label: int) -> list[str]:
    """Let all of a model that still has the default of 255 ignore the label instead.

    These are heads, losses that have an option for it, and the padding of the data preprocessor.

    Returns:
        Names of what has changed.
    """
    changed = []
    for name, module in _unwrapped(model).named_modules():
        if _has_own_labels(module):
            continue
        for option in OPTIONS:
            value = getattr(module, option, None)
            if isinstance(value, int) and value == UNSAID != label:
                setattr(module, option, label)
                changed.append(f'{name}.{option}')
        pass_on_ignored_label(module)
    return changed


def pass_on_ignored_label(head: nn.Module) -> None:
    """Tell the losses of a head its ``ignore_index`` where the head itself does not (DDRHead, PIDHead)."""
    losses = getattr(head, 'loss_decode', None)
    if not isinstance(losses, nn.Module) or not hasattr(head, 'ignore_index'):
        return
    for loss in losses if isinstance(losses, nn.ModuleList) else [losses]:
        names = list(inspect.signature(loss.forward).parameters)
        told = any(getattr(hook, 'func', None) is _tell for hook in loss._forward_pre_hooks.values())
        if 'ignore_index' in names and not told:
            hook = partial(_tell, head, names.index('ignore_index'))
            loss.register_forward_pre_hook(hook, with_kwargs=True)


def _tell(head: Any, position: int, loss: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    if len(args) <= position and 'ignore_index' not in kwargs:
        kwargs = dict(kwargs, ignore_index=head.ignore_index)
    return args, kwargs


def follow_ignored_label(runner: Any) -> None:
    """Before training, let all of a run ignore the label that its data sets or decode heads say.

    Raises:
        ValueError: a data set, a head, the sampler, a RareClassPaste or a metric says another one.
    """
    dataset = runner.train_dataloader.dataset
    model = _unwrapped(runner.model)
    label = ignored_label(dataset, decode_heads(model))
    if changed := give_ignored_label(model, label):
        message = f'the label that is no class is {label}; it is set in {", ".join(changed)}'
        classes = (getattr(dataset, 'metainfo', None) or {}).get('classes') or ()
        if 0 <= label < len(classes):
            runner.logger.warning(f'{message}. So {classes[label]!r} is not trained')
        else:
            runner.logger.info(message)
    if label != UNSAID:
        ignored_label(dataset, _heads(model))  # auxiliary heads say nothing, but they may not say another
        filling = sorted({type_name(step) for step in transforms_of(dataset) if _fills_with_255(step)})
        if filling:
            runner.logger.warning(
                f'{", ".join(filling)} may fill labels with 255, but the label that is no class is {label}. '
                f'Give seg_pad_val={label}, or pad_val=dict(img=0, seg={label}), to these transforms'
            )
    sampler = getattr(runner.train_dataloader, 'sampler', None)
    check_counted(sampler, getattr(sampler, 'ignore_index', None), label)
    for step in transforms_of(dataset):
        if type_name(step) == 'RareClassPaste':  # counts in another process
            own = step.ignore_index
            check_counted(step, ignored_label(dataset) if own is None else own, label)
    if getattr(runner.val_loop, 'evaluator', None) is not None:
        _check_metrics(runner, label)


def _fills_with_255(step: Any) -> bool:
    padding = getattr(step, 'pad_val', None)
    of_labels = [getattr(step, name, None) for name in ('seg_pad_val', 'seg_fill_in')]
    return UNSAID in [*of_labels, padding.get('seg') if isinstance(padding, dict) else None]


def check_counted(user: Any, counted: Any, label: int) -> None:
    """Raise a ValueError if a sampler or a transform has taken another label for no class than training."""
    if counted not in (None, label):
        raise ValueError(
            f'{type(user).__name__} has counted the classes with ignore_index={counted}, but training '
            f'ignores {label}. Give ignore_index={label} to it or to the data set in train_dataloader'
        )


def _check_metrics(runner: Any, label: int) -> None:
    """One of this package follows unless it is told a label; MMSegmentation's cannot."""
    evaluated = ignored_label(runner.val_loop.dataloader.dataset)
    expected = label if evaluated == UNSAID else evaluated
    for metric in runner.val_loop.evaluator.metrics:
        own = getattr(metric, 'ignore_index', None)
        if own is None and hasattr(metric, 'expect'):
            metric.ignore_index = expected
        if own in (None, expected):
            continue
        message = (
            f'{type(metric).__name__} in val_evaluator has ignore_index={own}, but training and validation '
            f'data ignore {expected}. Give it ignore_index={expected}; ClassIoUMetric and ImbalanceIoUMetric '
            'find it by themselves'
        )
        classes = (metric.dataset_meta or {}).get('classes') or ()
        if expected == UNSAID and 0 <= own < len(classes):  # some leave the background out of the numbers
            runner.logger.warning(f'{message}. Predictions on pixels of {classes[own]!r} count nowhere')
        else:
            raise ValueError(message)
