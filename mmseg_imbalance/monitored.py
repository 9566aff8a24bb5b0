"""Keys of an evaluation that decide what a run keeps and when it ends: are they there, and read rightly?

``save_best`` of CheckpointHook, ``monitor`` of EarlyStoppingHook and of ReduceOnPlateau schedules name them.
MMEngine looks at them for the first time after the first validation. RunHook does it before training; where
a run has no such hook, the metrics of this package do it at their first evaluation.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from mmseg_imbalance.registry import HOOKS, METRICS

from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmengine.registry import PARAM_SCHEDULERS, Registry
from mmseg.evaluation import IoUMetric

# of MMSegmentation's IoUMetric, by what its iou_metrics holds
KEYS = dict(
    mIoU=('aAcc', 'mIoU', 'mAcc'),
    mDice=('aAcc', 'mDice', 'mAcc'),
    mFscore=('aAcc', 'mFscore', 'mPrecision', 'mRecall'),
)
DISTANCES = ('HD95.', 'mHD95')  # how keys begin, without the prefix, of which the lower value is the better
FAR = 1e6  # pixels; of a watched distance that has no value


class Monitored(NamedTuple):
    """A key, whether it should be 'greater' or 'less', and who watches it, as a config says it."""

    key: str
    rule: str
    watcher: str


def framework_keys(iou_metrics: str | Sequence[str]) -> list[str]:
    """The keys of MMSegmentation's IoUMetric in their order."""
    kinds = [iou_metrics] if isinstance(iou_metrics, str) else iou_metrics
    return list(dict.fromkeys(key for kind in kinds for key in KEYS.get(kind, ())))


def rule_of(key: str) -> str:
    """Whether a number of this package should be 'greater' or 'less'; the key is without the prefix."""
    return 'less' if key.startswith(DISTANCES) else 'greater'


def with_prefix(prefix: str | None, keys: Iterable[str]) -> list[str]:
    """The keys as an evaluator gives those of a metric."""
    return [f'{prefix}/{key}' if prefix else key for key in keys]


def check_monitored_keys(runner: Any) -> None:
    """Before training, see to it that every key that is watched will be there and is read rightly.

    MMEngine's log shows the mean of the latest evaluations for keys with 'loss' or 'time' in their names, as
    that of a class may have; those of the metrics are shown as they are.

    Raises:
        ValueError: see :func:`check_keys`.
    """
    evaluator = getattr(runner.val_loop, 'evaluator', None)
    metrics = list(getattr(evaluator, 'metrics', ()))
    if not metrics:
        return
    monitored = list(_monitored_by(runner.hooks, runner.param_schedulers or []))
    given = [given_keys(metric) for metric in metrics]
    check_keys(monitored, given)
    _log_as_they_are(runner.log_processor, [key for keys in given for key in keys or ()])
    for metric, keys in zip(metrics, given, strict=True):
        if hasattr(metric, 'expect'):
            metric.expect(*(each.key for each in monitored if each.key in (keys or ())))


def check_keys(monitored: Sequence[Monitored], given: Sequence[Mapping[str, str] | None]) -> None:
    """Hold the keys that are watched against those that each metric gives, see :func:`given_keys`.

    Raises:
        ValueError: no metric of the validation gives such a key, two give the same ones, or the worse value
            is taken for the better.
    """
    names = [name for keys in given for name in keys or ()]
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise ValueError(
            f'two metrics in val_evaluator give the same keys, such as {twice[0]!r}. Give them prefixes: '
            "dict(type='ImbalanceIoUMetric', prefix='NAME')"
        )
    rules = {key: rule for keys in given if keys for key, rule in keys.items()}
    for key, rule, watcher in monitored:
        if key in names:
            if rule == 'greater' and rules[key] == 'less':
                raise ValueError(
                    f'{watcher} takes a higher {key!r} for the better one, but it is a distance or counts '
                    "errors; give it rule='less'"
                )
            if rule == 'less' and rules[key] == 'greater':
                raise ValueError(
                    f"{watcher} takes a lower {key!r} for the better one (rule='less', which MMEngine "
                    "takes for names that hold 'loss'); give it rule='greater'"
                )
        elif given and None not in given:
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


def _monitored_by(hooks: Iterable[Any], schedules: Any) -> Iterator[Monitored]:
    for hook in hooks:
        if isinstance(hook, CheckpointHook) and hook.save_best:
            for key, rule in zip(hook.key_indicators, hook.rules, strict=True):
                if key != 'auto':
                    yield Monitored(key, rule, f'save_best of {type(hook).__name__}')
        if isinstance(hook, EarlyStoppingHook):
            yield Monitored(hook.monitor, hook.rule, f'monitor of {type(hook).__name__}')
    for several in schedules.values() if isinstance(schedules, dict) else [schedules]:
        for schedule in several if isinstance(several, list) else [several]:
            if getattr(schedule, 'need_val_args', False) and schedule.by_epoch:
                yield Monitored(schedule.monitor, schedule.rule, f'monitor of {type(schedule).__name__}')


def monitored_in(config: Mapping[str, Any]) -> list[Monitored]:
    """What the hooks and schedules of a config watch; such hooks are made to ask them for their rule."""
    hooks = [*(config.get('default_hooks') or {}).values(), *(config.get('custom_hooks') or ())]
    made = [
        HOOKS.build({key: value for key, value in hook.items() if key != 'priority'})
        for hook in hooks
        if isinstance(hook, dict) and issubclass(_kind(hook, HOOKS), CheckpointHook | EarlyStoppingHook)
    ]
    schedules = config.get('param_scheduler') or []
    several = schedules.values() if isinstance(schedules, dict) and 'type' not in schedules else [schedules]
    schedules = [each for one in several for each in ([one] if isinstance(one, dict) else one)]
    by_value = [
        Monitored(
            schedule.get('monitor', 'loss'), schedule.get('rule', 'less'), f'monitor of {kind.__name__}'
        )
        for schedule in schedules
        if getattr(kind := _kind(schedule, PARAM_SCHEDULERS), 'need_val_args', False)
    ]
    return [*_monitored_by(made, []), *by_value]


def given_in(config: Mapping[str, Any], dataset_meta: dict | None) -> list[dict[str, str] | None]:
    """The keys that each metric in the val_evaluator of a config gives, see :func:`given_keys`."""
    metrics = config.get('val_evaluator') or []
    if isinstance(metrics, dict):
        metrics = metrics.get('metrics', metrics)
    given: list[dict[str, str] | None] = []
    for entry in [metrics] if isinstance(metrics, dict) else metrics:
        known = _computed_by(_kind(entry, METRICS))  # others might do anything when they are made
        metric = None if known is None else METRICS.build(entry)
        if metric is not None:
            metric.dataset_meta = dataset_meta
        given.append(given_keys(metric))
    return given


def _kind(entry: Mapping[str, Any], registry: Registry) -> type:
    kind = entry['type']
    if not isinstance(kind, str):
        return kind
    with registry.switch_scope_and_registry(None) as of_scope:
        return of_scope.get(kind) or object


def _computed_by(kind: type) -> type | None:
    """The class that computes the results of a metric; None: it is not one whose keys are known."""
    found = next((base for base in kind.__mro__ if 'compute_metrics' in vars(base)), None)
    return found if found is IoUMetric or 'expected_keys' in vars(found or object) else None


def given_keys(metric: Any) -> dict[str, str] | None:
    """The rule of each key that the metric gives, by the key with its prefix; None: it may give any."""
    computed_by = _computed_by(type(metric))
    if computed_by is None or metric.format_only or not (metric.dataset_meta or {}).get('classes'):
        return None
    keys = framework_keys(metric.metrics) if computed_by is IoUMetric else metric.expected_keys()
    return dict(zip(with_prefix(metric.prefix, keys), map(rule_of, keys), strict=True))
