"""Keys of an evaluation that decide what a run keeps and when it ends: are they there, and read rightly?

``save_best`` of CheckpointHook, ``monitor`` of EarlyStoppingHook and of ReduceOnPlateau schedules name them.
MMEngine looks at them for the first time after the first validation.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

import mmseg_imbalance.registry  # noqa: F401  its error says how to install MMSegmentation

from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmseg.evaluation import IoUMetric

# of MMSegmentation's IoUMetric, by what its iou_metrics holds
KEYS = dict(
    mIoU=('aAcc', 'mIoU', 'mAcc'),
    mDice=('aAcc', 'mDice', 'mAcc'),
    mFscore=('aAcc', 'mFscore', 'mPrecision', 'mRecall'),
)


class Monitored(NamedTuple):
    """A key, whether it should be 'greater' or 'less', and who watches it, as a config says it."""

    key: str
    rule: str
    watcher: str


def framework_keys(iou_metrics: str | Sequence[str]) -> list[str]:
    """The keys of MMSegmentation's IoUMetric in their order."""
    kinds = [iou_metrics] if isinstance(iou_metrics, str) else iou_metrics
    return list(dict.fromkeys(key for kind in kinds for key in KEYS.get(kind, ())))


def with_prefix(prefix: str | None, keys: Iterable[str]) -> list[str]:
    """The keys as an evaluator gives those of a metric."""
    return [f'{prefix}/{key}' if prefix else key for key in keys]


def keys_in_config(config: Mapping[str, Any]) -> set[str]:
    """The keys that the hooks and schedules of a config watch."""
    schedules = config.get('param_scheduler') or []
    entries = [
        *(config.get('default_hooks') or {}).values(),
        *(config.get('custom_hooks') or ()),
        *([schedules] if isinstance(schedules, dict) else schedules),
    ]
    keys: set[str] = set()
    for entry in entries:
        if isinstance(entry, dict):
            best = entry.get('save_best') or ()
            keys.update([best] if isinstance(best, str) else best)
            keys.update([entry['monitor']] if isinstance(entry.get('monitor'), str) else ())
    return keys


def check_monitored_keys(runner: Any) -> None:
    """Before training, see to it that every key that is watched will be there and is read rightly.

    MMEngine's log shows the mean of the latest evaluations for keys with 'loss' or 'time' in their names, as
    that of a class may have; those of the metrics are shown as they are.

    Raises:
        ValueError: no metric of the validation gives such a key, two give the same ones, or the lower value
            is taken for the better.
    """
    evaluator = getattr(runner.val_loop, 'evaluator', None)
    metrics = list(getattr(evaluator, 'metrics', ()))
    if not metrics:
        return
    keys = {number: _keys_of(metric) for number, metric in enumerate(metrics)}
    names = [name for known in keys.values() for name in known or ()]
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise ValueError(
            f'two metrics in val_evaluator give the same keys, such as {twice[0]!r}. Give them prefixes: '
            "dict(type='ImbalanceIoUMetric', prefix='NAME')"
        )
    _log_as_they_are(runner.log_processor, names)
    for key, rule, watcher in _watched(runner):
        owner = next((number for number, known in keys.items() if key in (known or ())), None)
        if owner is not None:
            if rule == 'less':
                raise ValueError(
                    f"{watcher} takes a lower {key!r} for the better one (rule='less', which MMEngine "
                    "takes for names that hold 'loss'); give it rule='greater'"
                )
            if hasattr(metrics[owner], 'expect'):
                metrics[owner].expect(key)
        elif None not in keys.values():
            near = get_close_matches(key, names, 6, 0.5) or names[:20]
            raise ValueError(
                f'{watcher} names {key!r}, which no evaluation of this run will give: it has no such class, '
                f'group, prefix or option. There are {near}, among {len(names)}; IoU.NAME is of '
                'ClassIoUMetric and ImbalanceIoUMetric'
            )


def _log_as_they_are(log_processor: Any, keys: Sequence[str]) -> None:
    smoothed = log_processor.mean_pattern
    if chosen := [re.escape(key) for key in keys if smoothed.search(key)]:
        others = rf'^(?!(val/)?({"|".join(chosen)})$).*({smoothed.pattern})'
        log_processor.mean_pattern = re.compile(others)


def _watched(runner: Any) -> Iterator[Monitored]:
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.save_best:
            for key, rule in zip(hook.key_indicators, hook.rules, strict=True):
                if key != 'auto':
                    yield Monitored(key, rule, f'save_best of {type(hook).__name__}')
        if isinstance(hook, EarlyStoppingHook):
            yield Monitored(hook.monitor, hook.rule, f'monitor of {type(hook).__name__}')
    schedules = runner.param_schedulers or []
    for several in schedules.values() if isinstance(schedules, dict) else [schedules]:
        for schedule in several if isinstance(several, list) else [several]:
            if getattr(schedule, 'need_val_args', False) and schedule.by_epoch:
                yield Monitored(schedule.monitor, schedule.rule, f'monitor of {type(schedule).__name__}')


def _keys_of(metric: Any) -> Iterable[str] | None:
    """All keys that the metric gives, with its prefix; None: who knows."""
    computed_by = next(kind for kind in type(metric).__mro__ if 'compute_metrics' in vars(kind))
    if getattr(metric, 'format_only', False) or not (metric.dataset_meta or {}).get('classes'):
        return None
    if computed_by is IoUMetric:
        keys = framework_keys(metric.metrics)
    elif 'expected_keys' in vars(computed_by):
        keys = metric.expected_keys()
    else:
        return None
    return with_prefix(metric.prefix, keys)
