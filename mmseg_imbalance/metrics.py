"""Metrics for imbalanced classes: each class, groups of classes, small objects, intervals."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmseg_imbalance.registry import METRICS

import numpy as np
import torch
from mmengine.logging import MMLogger, print_log
from mmseg.evaluation import IoUMetric
from rich.table import Table

from mmseg_imbalance.components import components
from mmseg_imbalance.counting import training_frequency
from mmseg_imbalance.scores import (
    AREAS,
    GROUPS,
    SIZES,
    class_groups,
    fine_grained_iou,
    group_scores,
    present_mean,
    ratio,
    save_image_scores,
)
from mmseg_imbalance.tables import table_text


@METRICS.register_module()
class ClassIoUMetric(IoUMetric):
    """MMSegmentation's IoUMetric, which also returns the IoU of each class, for logs and files.

    Adds ``IoU.NAME`` in per cent for every class that occurs in the labels or predictions; all arguments are
    those of IoUMetric.
    """

    def compute_metrics(self, results: Sequence[tuple]) -> dict[str, float]:
        metrics = super().compute_metrics(results)
        if self.format_only:
            return metrics
        intersection, union = (sum(areas) for areas in list(zip(*results, strict=True))[:2])
        for name, i, u in zip(self.dataset_meta['classes'], intersection, union, strict=True):
            if u > 0:
                metrics[f'IoU.{name}'] = round(100 * float(i / u), 2)
        return metrics


@METRICS.register_module()
class ImbalanceIoUMetric(ClassIoUMetric):
    """IoUMetric with numbers that show class imbalance: its own keys, ``IoU.NAME``, then these, in per cent.

    - ``mIoU.GROUP``, ``mPrecision.GROUP``, ``mRecall.GROUP``: mean over the head, body or tail classes
    - ``mIoU.low``, ``mIoU.high``, ``mIoU.GROUP.low``, ...: 95 % bootstrap interval over the tested images
    - ``mIoU_I``, ``mIoU_C``, ``mIoU_I_q5``, ...: see :func:`~mmseg_imbalance.scores.fine_grained_iou`
    - ``mRecall.SIZE``, ``Recall.SIZE.NAME``: share of the pixels of small, medium, large objects

    A mean is over the classes that have the number, as in MMSegmentation: a class that the labels do not hold
    has no recall, a class that is never predicted has no precision. If no class has it, there is no key. The
    pixels of each image go to ``image_scores.npz`` beside the log file, see
    :func:`~mmseg_imbalance.scores.load_image_scores`.

    Args:
        groups: 'thirds', see :func:`~mmseg_imbalance.scores.class_groups`, or lists of class names,
            ``dict(head=[NAME, ...], body=[...], tail=[...])``.
        quantiles: in per cent, of the images of the worst cases.
        object_areas: pixels that medium and large objects have at least, by default COCO's; an object is an
            8-connected piece of the label. None: no recall by size.
        bootstrap: resamples of the intervals; 0: none.
        *args, **kwargs: of IoUMetric.
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
            _check_groups(groups)
        if wrong := [q for q in quantiles if not 0 < q <= 100]:
            raise ValueError(f'quantiles are per cent above 0 and up to 100, got {wrong}')
        if object_areas is not None and not (
            len(object_areas) == 2 and 0 < object_areas[0] < object_areas[1]
        ):
            raise ValueError(
                'object_areas are two limits in pixels, the smaller one first, such as (1024, 9216), or '
                f'None, got {object_areas}'
            )
        if bootstrap < 0:
            raise ValueError(f'bootstrap is a number of resamples or 0, got {bootstrap}')
        self.groups = groups
        self.quantiles = quantiles
        self.object_areas = object_areas
        self.bootstrap = bootstrap
        self.train_pixels: np.ndarray | None = None  # (C,) int64; (0,) if they cannot be had; None: not tried

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        classes = self.dataset_meta['classes']
        if self.groups != 'thirds':
            _check_groups(self.groups, classes)
        done = len(self.results)
        super().process(data_batch, data_samples)
        # (name, (C, 4) or with the objects (C, 10) int64): all that is kept of an image
        for at, sample in zip(range(done, len(self.results)), data_samples, strict=False):
            rows = torch.stack(self.results[at], 1).long()
            if self.object_areas is not None:
                rows = torch.cat([rows, torch.from_numpy(self._objects(sample, len(classes)))], 1)
            self.results[at] = (str(sample.get('img_path') or ''), rows)

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

    def evaluate(self, size: int) -> dict[str, float]:
        if self.train_pixels is None and not self.format_only:
            # here, where all ranks are, as the counting is shared; compute_metrics is the main rank's alone
            self.train_pixels = self._count_train_pixels()
        return super().evaluate(size)

    def _count_train_pixels(self) -> np.ndarray:
        """(C,) int64, of the training annotations of the run's config; (0,) and a warning if impossible."""
        classes = tuple(self.dataset_meta['classes'])
        try:
            frequency = training_frequency()
        except Exception as error:  # whatever it is, the rest of the evaluation is worth more
            failure = f'{type(error).__name__}: {error}'
        else:
            if frequency.classes == classes:
                return frequency.pixels
            failure = f'training has the classes {list(frequency.classes)}, the test {list(classes)}'
        message = f'ImbalanceIoUMetric cannot count the classes of the training annotations ({failure})'
        level = logging.INFO
        if self.groups == 'thirds':
            message += '. There will be no head, body and tail; groups=dict(head=[NAME, ...], ...) names them'
            level = logging.WARNING
        print_log(message, logger='current', level=level)
        return np.empty(0, np.int64)

    def compute_metrics(self, results: Sequence[tuple[str, torch.Tensor]]) -> dict[str, float]:
        if self.format_only:
            return super().compute_metrics(results)
        metrics = super().compute_metrics([rows[:, : len(AREAS)].float().unbind(1) for _, rows in results])
        # a fixed order, so that loaders and ranks don't matter; the main rank gets them in the data set's
        named = [(name or f'{at:06}', rows.numpy()) for at, (name, rows) in enumerate(results)]
        named.sort(key=lambda pair: (pair[0], pair[1].tolist()))
        rows = np.stack([rows for _, rows in named])  # (N, C, 4) or (N, C, 10)
        areas = dict(zip(AREAS, np.moveaxis(rows[..., : len(AREAS)], 2, 0), strict=True))  # (N, C) each
        groups, classes = self._class_indices(), self.dataset_meta['classes']

        scores = group_scores(areas, groups, self.bootstrap)
        scores |= fine_grained_iou(areas['intersect'], areas['union'], areas['label'], self.quantiles)
        sizes = dict(all=len(classes)) | {group: len(members) for group, members in groups.items()}
        if self.object_areas is not None:
            right, pixels = np.split(rows[..., len(AREAS) :].sum(0), 2, 1)  # (C, 3)
            recall = dict(zip(SIZES, ratio(right, pixels).T, strict=True))
            sizes |= {size: int(np.isfinite(values).sum()) for size, values in recall.items()}
            scores |= {f'mRecall.{size}': present_mean(values) for size, values in recall.items()}
            for size, values in recall.items():
                scores |= zip([f'Recall.{size}.{name}' for name in classes], values, strict=True)
        metrics |= {key: round(100 * float(value), 2) for key, value in scores.items() if np.isfinite(value)}

        logger = MMLogger.get_current_instance()
        logger.info('\n' + table_text(_table(metrics, sizes)))
        self._save(logger, [name for name, _ in named], areas, groups)
        return metrics

    def _class_indices(self) -> dict[str, np.ndarray]:
        """The classes of each group that has any; none where the groups are not known."""
        if self.groups == 'thirds':
            known = self.train_pixels is not None and len(self.train_pixels)
            groups = class_groups(self.train_pixels) if known else {}
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
    ) -> None:
        """Write ``image_scores.npz`` into the folder of the log file, if there is one."""
        files = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
        if not files:
            return
        names = [os.path.basename(path) for path in paths]
        group = np.full(len(self.dataset_meta['classes']), '', '<U4')
        for name, members in groups.items():
            group[members] = name
        file = Path(files[0].baseFilename).with_name('image_scores.npz')
        try:
            save_image_scores(
                file,
                images=names if len(set(names)) == len(names) else paths,
                classes=self.dataset_meta['classes'],
                pixels=np.empty(0, np.int64) if self.train_pixels is None else self.train_pixels,
                group=group,
                **areas,
            )
        except OSError as error:
            logger.warning(f'the scores of the images are not saved, {file} cannot be written: {error}')


def _check_groups(groups: object, classes: Sequence[str] | None = None) -> None:
    kinds = 'thirds, or lists of class names: dict(head=[...], body=[...], tail=[...])'
    if not isinstance(groups, Mapping) or any(isinstance(names, str) for names in groups.values()):
        raise TypeError(f'groups must be {kinds}; got {groups!r}')
    if wrong := sorted(set(groups) - set(GROUPS)):
        raise ValueError(f'groups must be {kinds}; got {wrong}')
    names = [name for members in groups.values() for name in members]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f'a class can be in one of the groups only, but {twice} are named twice')
    if classes is not None and (unknown := sorted(set(names) - set(classes))):
        raise ValueError(f'groups has the classes {unknown}, but the data set has {list(classes)}')


def _table(metrics: Mapping[str, float], sizes: Mapping[str, int]) -> Table:
    """A row for all classes, for each group and for each object size; ``sizes``: how many classes it has."""

    def shown(key: str) -> str:
        return f'{metrics[key]:.2f}' if key in metrics else '-'

    table = Table()
    table.add_column('')
    for column in ('classes', 'mIoU', '95 % interval', 'mPrecision', 'mRecall'):
        table.add_column(column, justify='right')
    for name, number in sizes.items():
        suffix = '' if name == 'all' else f'.{name}'
        interval = '-'
        if f'mIoU{suffix}.low' in metrics:
            interval = ' to '.join(shown(f'mIoU{suffix}.{end}') for end in ('low', 'high'))
        numbers = [shown(f'{key}{suffix}') for key in ('mIoU', 'mPrecision', 'mRecall')]
        table.add_row(name, str(number), numbers[0], interval, *numbers[1:])
    return table
