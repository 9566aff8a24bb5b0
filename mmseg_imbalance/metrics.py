"""Metrics for imbalanced classes: each class, groups of classes, small objects, intervals."""

from __future__ import annotations

import inspect
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from mmseg_imbalance.registry import METRICS

import numpy as np
import torch
from mmengine.logging import MessageHub, MMLogger, print_log
from mmseg.evaluation import IoUMetric

from mmseg_imbalance.components import components
from mmseg_imbalance.counting import training_frequency
from mmseg_imbalance.ignored_label import UNSAID, current_config, label_of_evaluation
from mmseg_imbalance.monitored import KEYS, check_keys, framework_keys, given_in, monitored_in, with_prefix
from mmseg_imbalance.scores import (
    AREAS,
    GROUPS,
    SIZES,
    check_groups,
    class_areas,
    class_groups,
    class_pairs,
    confusion_matrix,
    fine_grained_iou,
    group_scores,
    present_mean,
    ratio,
    save_image_scores,
)
from mmseg_imbalance.tables import group_table, table_text

T = TypeVar('T')


@METRICS.register_module()
class ClassIoUMetric(IoUMetric):
    """MMSegmentation's IoUMetric, which also returns the IoU of each class, for logs and files.

    Adds ``IoU.NAME`` in per cent for every class. All keys are there at every evaluation. One that has no
    value, such as that of a class that is in neither labels nor predictions, is NaN; if ``save_best``,
    EarlyStoppingHook or a schedule watches it, it is 0 and a warning says so. Pixels are counted in integers;
    MMSegmentation counts in float32, which is not exact above 2^24 pixels.

    Args:
        ignore_index: None: that of the data set evaluated, of the training data or of the decode head.
        *args, **kwargs: of IoUMetric.

    Raises:
        TypeError: an option that IoUMetric does not have; it would take it and do nothing.
        ValueError: an unknown name in ``iou_metrics``.
    """

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
        if wrong := [name for name in names if name not in KEYS]:
            raise ValueError(f'iou_metrics are of {list(KEYS)}, got {wrong}')
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
                self.named.add('labels')
                print_log(
                    f'{type(self).__name__}: labels of {sample.get("img_path")} are neither one of the '
                    f'{len(area)} classes nor the ignored label {self.ignore_index}: it holds '
                    f'{label.unique().tolist()[:50]}. They count as errors of what is predicted there',
                    logger='current',
                    level=logging.WARNING,
                )

    def expected_keys(self) -> list[str]:
        """The keys of every evaluation, without the prefix."""
        return [*framework_keys(self.metrics), *(f'IoU.{name}' for name in self.dataset_meta['classes'])]

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
            print_log(
                f'{type(self).__name__}: {new} have no value at this evaluation. A hook or schedule that '
                'watches them gets 0 instead. Labels and predictions hold no pixel to compute them of, or no '
                'groups are known',
                logger='current',
                level=logging.WARNING,
            )
        return metrics | dict.fromkeys(undefined, 0.0)

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
            print_log(
                f'{type(self).__name__}: a resumed run shows the config of its checkpoint. If data, '
                "ignore_index or what is watched have changed, add dict(type='RunHook') to custom_hooks: the "
                'metric reads the present config then',
                logger='current',
                level=logging.WARNING,
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
        iou = ratio(total[0].numpy(), total[1].numpy())
        if self.nan_to_num is not None:
            iou = np.nan_to_num(iou, nan=self.nan_to_num)
        names = [f'IoU.{name}' for name in self.dataset_meta['classes']]
        return metrics | dict(zip(names, map(_per_cent, iou), strict=True))


@METRICS.register_module()
class ImbalanceIoUMetric(ClassIoUMetric):
    """ClassIoUMetric with numbers that show class imbalance: its keys, then these, in per cent.

    - ``mIoU.GROUP``, ``mPrecision.GROUP``, ``mRecall.GROUP``: mean over the head, body or tail classes
    - ``mIoU.low``, ``mIoU.high``, ``mIoU.GROUP.low``, ...: 95 % bootstrap interval over the tested images
    - ``mIoU_I``, ``mIoU_C``, ``mIoU_I_q5``, ...: see :func:`~mmseg_imbalance.scores.fine_grained_iou`
    - ``mRecall.SIZE``, ``Recall.SIZE.NAME``: share of the pixels of small, medium, large objects

    A mean is over the classes that have the number, as in MMSegmentation: a class that the labels do not hold
    has no recall, a class that is never predicted has no precision. If no class has it, the mean is NaN. The
    pixels of each image go to ``image_scores.npz`` beside the log file, see
    :func:`~mmseg_imbalance.scores.load_image_scores`; with a ``prefix`` to ``image_scores_PREFIX.npz``.

    Args:
        groups: 'thirds', see :func:`~mmseg_imbalance.scores.class_groups`, or lists of class names,
            ``dict(head=[NAME, ...], body=[...], tail=[...])``.
        quantiles: in per cent, of the images of the worst cases.
        object_areas: pixels that medium and large objects have at least, by default COCO's; an object is an
            8-connected piece of the label. None: no recall by size.
        bootstrap: resamples of the intervals; 0: none.
        *args, **kwargs: of ClassIoUMetric.

    Raises:
        TypeError, ValueError: an option out of range; names in ``groups`` that are no classes, as soon as the
            data set is known.
    """

    def __init__(
        self,
        *args: object,
        groups: str | Mapping[str, Sequence[str]] = 'thirds',
        quantiles: Sequence[float] = (1, 5),
        object_areas: tuple[int, int] | None = (32**2, 96**2),
        bootstrap: int = 1000,
        **kwargs: object,
    ) -> None:
        super().__init__(*args, **kwargs)
        if groups != 'thirds':
            check_groups(groups)
        if wrong := [q for q in quantiles if not 0 < q <= 100]:
            raise ValueError(f'quantiles are per cent above 0 and up to 100, got {wrong}')
        if object_areas is not None and not (
            len(object_areas) == 2 and 0 < object_areas[0] < object_areas[1]
        ):
            raise ValueError(
                'object_areas are two limits in pixels, the smaller one first, such as (1024, 9216), or '
                f'None, got {object_areas}'
            )
        if not isinstance(bootstrap, int) or bootstrap < 0:
            raise ValueError(f'bootstrap is a number of resamples or 0, got {bootstrap}')
        self.groups = groups
        self.quantiles = quantiles
        self.object_areas = object_areas
        self.bootstrap = bootstrap
        self.train_pixels: np.ndarray | None = None  # (C,) int64; (0,) if they cannot be had; None: not tried

    @ClassIoUMetric.dataset_meta.setter
    def dataset_meta(self, meta: dict | None) -> None:
        # a runner tells it before the first iteration
        ClassIoUMetric.dataset_meta.fset(self, meta)
        if self.groups != 'thirds' and (meta or {}).get('classes'):
            check_groups(self.groups, meta['classes'])

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        classes = self.dataset_meta['classes']
        done = len(self.results)
        super().process(data_batch, data_samples)
        # (name, (C, 4) or with the objects (C, 10), (P, 3) int64): all that is kept of an image
        for at, sample in zip(range(done, len(self.results)), data_samples, strict=False):
            rows = torch.stack(self.results[at], 1)
            if self.object_areas is not None:
                rows = torch.cat([rows, torch.from_numpy(self._objects(sample, len(classes)))], 1)
            maps = [sample[key]['data'].squeeze() for key in ('pred_sem_seg', 'gt_sem_seg')]
            pairs = class_pairs(maps[0], maps[1].to(maps[0]), len(classes), self.ignore_index)
            self.results[at] = (str(sample.get('img_path') or ''), rows, pairs)

    def _objects(self, sample: dict, classes: int) -> np.ndarray:
        """(C, 6) int64 pixels of each class in small, medium and large objects: those right, then all."""
        prediction, label = (
            sample[key]['data'].reshape(sample[key]['data'].shape[-2:])
            for key in ('pred_sem_seg', 'gt_sem_seg')
        )
        label = label.to(prediction)
        outside = (label == self.ignore_index) | (label < 0) | (label >= classes)
        narrow = torch.uint8 if classes < 256 else torch.int32
        right = ((prediction == label) & ~outside).cpu().numpy()
        ids, areas, values = components(label.masked_fill(outside, classes).to(narrow).cpu().numpy())
        hits = np.bincount(ids[right], minlength=len(areas))
        rows = np.zeros((2, classes + 1, len(SIZES)), np.int64)  # what is outside is class C
        where = values, np.searchsorted(self.object_areas, areas, side='right')
        np.add.at(rows[0], where, hits)
        np.add.at(rows[1], where, areas)
        return np.concatenate(rows[:, :classes], 1)

    def expected_keys(self) -> list[str]:
        classes = len(self.dataset_meta['classes'])
        width = len(AREAS) if self.object_areas is None else len(AREAS) + 2 * len(SIZES)
        groups = self._class_indices(np.zeros(classes)) if self.groups == 'thirds' else self._class_indices()
        nothing = np.zeros((1, classes, width), np.int64)
        return [*super().expected_keys(), *self._scores(nothing, groups)]

    def expect(self, *keys: str) -> None:
        super().expect(*keys)
        group = re.compile(rf'm\w+\.({"|".join(GROUPS)})\b')
        of_group = [key for key in keys if group.match(key.removeprefix(f'{self.prefix}/'))]
        if of_group and self.groups == 'thirds' and self.train_pixels is None:
            try:
                self.train_pixels = self._count_train_pixels()
            except (ValueError, TypeError, FileNotFoundError) as error:
                raise ValueError(
                    f'{of_group[0]!r} is watched, but the classes of the training annotations cannot be '
                    f'counted ({type(error).__name__}: {error}). Give groups=dict(head=[NAME, ...], ...) to '
                    f'{type(self).__name__}, or watch another key'
                ) from error

    def _prepare(self) -> None:
        super()._prepare()
        if self.train_pixels is None:
            # here, where all ranks are, as the counting is shared; compute_metrics is the main rank's alone
            try:
                self.train_pixels = self._count_train_pixels()
            except (ValueError, TypeError, FileNotFoundError) as error:
                self._name_failure(error)  # the rest of the evaluation is worth more
                self.train_pixels = np.empty(0, np.int64)

    def _count_train_pixels(self) -> np.ndarray:
        """(C,) int64, of the training annotations of the run's config."""
        classes = tuple(self.dataset_meta['classes'])
        try:
            frequency = training_frequency()
        except RuntimeError as error:
            if not str(error).startswith('counting failed'):  # a rank is gone: no evaluation goes on
                raise
            raise ValueError(str(error)) from error
        if frequency.classes != classes:
            raise ValueError(f'training has the classes {list(frequency.classes)}, the test {list(classes)}')
        return frequency.pixels

    def _name_failure(self, error: Exception) -> None:
        message = (
            f'{type(self).__name__} cannot count the classes of the training annotations '
            f'({type(error).__name__}: {error})'
        )
        level = logging.INFO
        if self.groups == 'thirds':
            message += '. There will be no head, body and tail; groups=dict(head=[NAME, ...], ...) names them'
            level = logging.WARNING
        print_log(message, logger='current', level=level)

    def compute_metrics(self, results: Sequence[tuple[str, torch.Tensor]]) -> dict[str, float]:
        if self.format_only:
            return super().compute_metrics(results)
        metrics = super().compute_metrics([rows[:, : len(AREAS)].unbind(1) for _, rows, _ in results])
        # a fixed order, so that loaders and ranks don't matter; the main rank gets them in the data set's
        named = [(name or f'{at:06}', rows.numpy()) for at, (name, rows, _) in enumerate(results)]
        named.sort(key=lambda pair: (pair[0], pair[1].tolist()))
        rows = np.stack([rows for _, rows in named])  # (N, C, 4) or (N, C, 10)
        known = self.train_pixels is not None and len(self.train_pixels)
        groups = self._class_indices(self.train_pixels if known else None)
        scores = self._scores(rows, groups)
        metrics |= {key: _per_cent(value) for key, value in scores.items()}

        sizes = dict(all=rows.shape[1]) | {group: len(members) for group, members in groups.items()}
        if self.object_areas is not None:
            of_size = {size: [f'Recall.{size}.{c}' for c in self.dataset_meta['classes']] for size in SIZES}
            sizes |= {size: sum(map(math.isfinite, map(scores.get, keys))) for size, keys in of_size.items()}
        logger = MMLogger.get_current_instance()
        logger.info('\n' + table_text(group_table(metrics, sizes)))
        areas = dict(zip(AREAS, np.moveaxis(rows[..., : len(AREAS)], 2, 0), strict=True))  # (N, C) each
        confusion = confusion_matrix([pairs for *_, pairs in results], rows.shape[1])
        self._save(logger, [name for name, _ in named], areas, groups, confusion)
        return metrics

    def _scores(self, rows: np.ndarray, groups: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Shares, NaN where one has no value, of (N, C, 4) or (N, C, 10) pixels in N images."""
        areas = dict(zip(AREAS, np.moveaxis(rows[..., : len(AREAS)], 2, 0), strict=True))  # (N, C) each
        scores = group_scores(areas, groups, self.bootstrap)
        scores |= fine_grained_iou(areas['intersect'], areas['union'], areas['label'], self.quantiles)
        if self.object_areas is not None:
            right, pixels = np.split(rows[..., len(AREAS) :].sum(0), 2, 1)  # (C, 3)
            recall = dict(zip(SIZES, ratio(right, pixels).T, strict=True))
            scores |= {f'mRecall.{size}': present_mean(values) for size, values in recall.items()}
            for size, values in recall.items():
                names = [f'Recall.{size}.{name}' for name in self.dataset_meta['classes']]
                scores |= zip(names, values, strict=True)
        return scores

    def _class_indices(self, pixels: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The classes of each group that has any; of thirds none where (C,) pixels are not known."""
        if self.groups == 'thirds':
            groups = {} if pixels is None else class_groups(pixels)
        else:
            classes = list(self.dataset_meta['classes'])
            groups = {
                group: np.array([classes.index(name) for name in self.groups.get(group, ())], int)
                for group in GROUPS
            }
        return {group: members for group, members in groups.items() if len(members)}

    def _save(
        self,
        logger: MMLogger,
        paths: Sequence[str],
        areas: Mapping[str, np.ndarray],
        groups: Mapping[str, np.ndarray],
        confusion: np.ndarray,
    ) -> None:
        """Write the pixels of each image into the folder of the log file, if there is one."""
        files = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
        if not files:
            return
        names = [os.path.basename(path) for path in paths]
        group = np.full(len(self.dataset_meta['classes']), '', '<U4')
        for name, members in groups.items():
            group[members] = name
        # metrics of one evaluator have different prefixes; what a file name cannot hold becomes %..
        name = f'image_scores_{quote(self.prefix, safe="")}' if self.prefix else 'image_scores'
        file = Path(files[0].baseFilename).with_name(f'{name}.npz')
        try:
            save_image_scores(
                file,
                images=names if len(set(names)) == len(names) else paths,
                classes=self.dataset_meta['classes'],
                pixels=np.empty(0, np.int64) if self.train_pixels is None else self.train_pixels,
                group=group,
                confusion=confusion,
                **areas,
            )
        except OSError as error:
            logger.warning(f'the scores of the images are not saved, {file} cannot be written: {error}')


def _per_cent(share: float) -> float:
    return round(100 * float(share), 2)


def _ask_config(question: Callable[[Mapping[str, Any]], T], otherwise: T, what: str) -> T:
    """The answer of the runner's config; another one, and a warning, where it has none.

    A training should not end at its first validation for it.
    """
    try:
        return question(current_config() or {})
    except Exception as error:  # a config is Python; data sets and heads may disagree
        print_log(
            f'the config of the run does not tell {what} ({type(error).__name__}: {error}); the metric takes '
            f'{otherwise}',
            logger='current',
            level=logging.WARNING,
        )
        return otherwise
