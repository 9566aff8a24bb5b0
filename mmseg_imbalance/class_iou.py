"""MMSegmentation's metric with the IoU of each class, exact counts, and a number for each watched key."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from mmseg_imbalance.registry import METRICS

import numpy as np
from mmengine.logging import MessageHub
from mmseg.evaluation import IoUMetric

from mmseg_imbalance.counting.ranks import warn
from mmseg_imbalance.ignored_label import UNSAID, current_config, label_of_evaluation
from mmseg_imbalance.monitored import (
    FAR,
    KEYS,
    check_keys,
    framework_keys,
    given_in,
    monitored_in,
    rule_of,
    with_prefix,
)
from mmseg_imbalance.scores import class_areas, ratio

T = TypeVar('T')


@METRICS.register_module()
class ClassIoUMetric(IoUMetric):
    """MMSegmentation's IoUMetric, which also returns the IoU of each class, for logs and files.

    Adds ``IoU.NAME`` in per cent for every class; with ``mDice`` in ``iou_metrics`` also ``Dice.NAME``. All
    keys are there at every evaluation. One that has no value, such as that of a class that is in neither
    labels nor predictions, is NaN; if ``save_best``, EarlyStoppingHook or a schedule watches it, it is 0, a
    distance 1000000, and a warning says so. Pixels are counted in integers;
    MMSegmentation counts in float32, which is not exact above 2^24 pixels.

    Args:
        ignore_index: None: that of the data set evaluated, of the training data or of the decode head.
        *args, **kwargs: of IoUMetric.

    Raises:
        TypeError: an option that IoUMetric does not have; it would take it and do nothing.
        ValueError: an unknown name in ``iou_metrics``.
    """

    own_metrics: tuple[str, ...] = ()  # names in iou_metrics that MMSegmentation does not have

    def __init__(self, ignore_index: int | None = None, *args: object, **kwargs: object) -> None:
        parameters = inspect.signature(IoUMetric.__init__).parameters.values()
        known = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != 'self']
        known.append('keep_results')  # MMSegmentation's tools/test.py gives it to any metric
        if unknown := sorted(set(kwargs) - set(known)):
            raise TypeError(
                f'{type(self).__name__} has no option {unknown}; those of IoUMetric are {known}. What a '
                'config inherits from its base goes away with dict(_delete_=True, ...)'
            )
        super().__init__(ignore_index, *args, **kwargs)
        names = [self.metrics] if isinstance(self.metrics, str) else self.metrics
        if wrong := [name for name in names if name not in (*KEYS, *self.own_metrics)]:
            raise ValueError(f'iou_metrics are of {[*KEYS, *self.own_metrics]}, got {wrong}')
        self.asked = frozenset(names)
        self.metrics = [name for name in names if name in KEYS] or ['mIoU']  # MMSegmentation knows no others
        self.watched: set[str] | None = None  # keys, with the prefix; None: nobody has told yet
        self.named: set[str] = set()  # of what a warning has told already

    intersect_and_union = staticmethod(class_areas)

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        if self.ignore_index is None:
            self.ignore_index = _ask_config(label_of_evaluation, UNSAID, 'the ignored label')
        done = len(self.results)
        super().process(data_batch, data_samples)
        for (*_, area), sample in zip(self.results[done:], data_samples, strict=False):
            label = sample['gt_sem_seg']['data']
            if 'labels' not in self.named and int((label != self.ignore_index).sum()) > int(area.sum()):
                self.warn_once(
                    'labels',
                    f'labels of {sample.get("img_path")} are neither one of the '
                    f'{len(area)} classes nor the ignored label {self.ignore_index}: it holds '
                    f'{label.unique().tolist()[:50]}. They count as errors of what is predicted there',
                )

    def warn_once(self, about: str, message: str) -> None:
        """A warning, unless one about the same was given already."""
        if about not in self.named:
            self.named.add(about)
            warn(f'{type(self).__name__}: {message}')

    def expected_keys(self) -> list[str]:
        """The keys of every evaluation, without the prefix."""
        kinds = ['IoU', 'Dice'] if 'mDice' in self.asked else ['IoU']
        names = [f'{kind}.{name}' for kind in kinds for name in self.dataset_meta['classes']]
        return [*framework_keys(self.metrics), *names]

    def expect(self, *keys: str) -> None:
        """These keys with their prefix are watched: each has a number at every evaluation from now on."""
        self.watched = {*(self.watched or ()), *keys}

    def evaluate(self, size: int) -> dict[str, float]:
        if self.format_only:
            return super().evaluate(size)
        self._prepare()
        metrics = super().evaluate(size)
        undefined = {key for key in self.watched if math.isnan(metrics.get(key, 0))}
        if missing := self.watched - metrics.keys():  # of groups that are not known
            undefined |= missing & set(with_prefix(self.prefix, self.expected_keys()))
        if new := sorted(undefined - self.named):
            self.named.update(new)
            warn(
                f'{type(self).__name__}: {new} have no value at this evaluation. A hook or schedule that '
                f'watches them gets 0 instead, or {FAR:.0f} for a distance. Labels and predictions hold no '
                'pixel to compute them of, or no groups are known'
            )
        rules = {key: rule_of(key.removeprefix(f'{self.prefix}/')) for key in undefined}
        return metrics | {key: FAR if rule == 'less' else 0.0 for key, rule in rules.items()}

    def _prepare(self) -> None:
        """Before the first evaluation, on all ranks: ask what is watched, where no RunHook has told.

        Raises:
            ValueError: in the validations of a training, as RunHook before it.
        """
        if self.watched is not None:
            return
        hub = MessageHub.get_current_instance()
        self.watched = set()
        if hub.get_info('loop_stage') != 'val':  # hooks and schedules look at validations
            return
        monitored, given = _ask_config(
            lambda config: (monitored_in(config), given_in(config, self.dataset_meta)),
            ([], []),
            'which keys are watched',
        )
        self.watched = {each.key for each in monitored}
        if hub.get_info('max_iters') is None:  # a validation alone, no training
            return
        if hub.get_info('experiment_name') != hub.instance_name:
            warn(
                f'{type(self).__name__}: a resumed run shows the config of its checkpoint. If data, '
                "ignore_index or what is watched have changed, add dict(type='RunHook') to custom_hooks: the "
                'metric reads the present config then'
            )
            return
        try:
            check_keys(monitored, given)
            self.expect(*self.watched.intersection(with_prefix(self.prefix, self.expected_keys())))
        except ValueError as error:
            raise ValueError(
                f"{error}. With dict(type='RunHook') in custom_hooks you are told before training"
            ) from error

    def compute_metrics(self, results: Sequence[tuple]) -> dict[str, float]:
        if self.format_only:
            return super().compute_metrics(results)
        # float64 is exact up to 2^53, of which MMSegmentation makes the ratios
        total = [sum(areas).double() for areas in zip(*results, strict=True)]
        with np.errstate(invalid='ignore'), warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Mean of empty slice')
            metrics = super().compute_metrics([total])
        metrics = {key: float(value) for key, value in metrics.items()}
        intersect, union, pred, label = (areas.numpy() for areas in total)
        shares = dict(IoU=ratio(intersect, union))
        if 'mDice' in self.asked:
            shares['Dice'] = ratio(2 * intersect, pred + label)
        for kind, values in shares.items():
            if self.nan_to_num is not None:
                values = np.nan_to_num(values, nan=self.nan_to_num)
            names = [f'{kind}.{name}' for name in self.dataset_meta['classes']]
            metrics |= zip(names, map(per_cent, values), strict=True)
        return metrics


def per_cent(share: float) -> float:
    """Rounded as MMSegmentation does."""
    return round(100 * float(share), 2)


def _ask_config(question: Callable[[Mapping[str, Any]], T], otherwise: T, what: str) -> T:
    """The answer of the runner's config; another one, and a warning, where it has none.

    A training should not end at its first validation for it.
    """
    try:
        return question(current_config() or {})
    except Exception as error:  # a config is Python; data sets and heads may disagree
        warn(
            f'the config of the run does not tell {what} ({type(error).__name__}: {error}); the metric takes '
            f'{otherwise}'
        )
        return otherwise
