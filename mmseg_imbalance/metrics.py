"""The metric for imbalanced classes: groups of classes, small objects, worst images, intervals."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmseg_imbalance.registry import METRICS

import numpy as np
import torch
from mmengine.logging import MMLogger, print_log

from mmseg_imbalance.class_iou import ClassIoUMetric, per_cent
from mmseg_imbalance.components import components
from mmseg_imbalance.counting import training_frequency
from mmseg_imbalance.distances import distance_scores, hausdorff_distances
from mmseg_imbalance.scores import (
    AREAS,
    GROUPS,
    SIZES,
    block_names,
    check_groups,
    class_groups,
    class_pairs,
    confusion_matrix,
    dice_scores,
    fine_grained_iou,
    group_scores,
    image_scores_name,
    present_mean,
    ratio,
    save_image_scores,
)
from mmseg_imbalance.tables import group_table, table_text


@METRICS.register_module()
class ImbalanceIoUMetric(ClassIoUMetric):
    """ClassIoUMetric with numbers that show class imbalance: its keys, then these, in per cent.

    - ``mIoU.GROUP``, ``mPrecision.GROUP``, ``mRecall.GROUP``: mean over the head, body or tail classes
    - ``mIoU.low``, ``mIoU.high``, ``mIoU.GROUP.low``, ...: 95 % interval over the tested images or blocks
    - ``mIoU_I``, ``mIoU_C``, ``mIoU_I_q5``, ...: see :func:`~mmseg_imbalance.scores.fine_grained_iou`
    - ``mRecall.SIZE``, ``Recall.SIZE.NAME``: share of the pixels of small, medium, large objects
    - with ``mDice`` in ``iou_metrics``: see :func:`~mmseg_imbalance.scores.dice_scores`
    - with ``mHD95``, in pixels: see :func:`~mmseg_imbalance.distances.distance_scores`

    A mean of a group is over its classes that the labels hold; a class that is never predicted has no
    precision. If no class has the number, the mean is NaN. ``mIoU`` is MMSegmentation's: a class that is
    predicted though no label holds it counts as 0 there, and a warning says so once. The pixels of each
    image go to ``image_scores.npz`` beside the log file, see
    :func:`~mmseg_imbalance.scores.load_image_scores`; with a ``prefix`` to ``image_scores_PREFIX.npz``.

    Args:
        groups: 'thirds', see :func:`~mmseg_imbalance.scores.class_groups`, or lists of class names,
            ``dict(head=[NAME, ...], body=[...], tail=[...])``.
        quantiles: in per cent, of the images of the worst cases.
        object_areas: pixels that medium and large objects have at least, by default COCO's; an object is an
            8-connected piece of the label. None: no recall by size.
        blocks: see :func:`~mmseg_imbalance.scores.block_names`. Frames of one video are not independent:
            intervals are over blocks of them. None: over images.
        *args, **kwargs: of ClassIoUMetric.

    Raises:
        TypeError, ValueError: an option out of range; names in ``groups`` that are no classes, as soon as the
            data set is known.
    """

    own_metrics = ('mHD95',)

    def __init__(
        self,
        *args: object,
        groups: str | Mapping[str, Sequence[str]] = 'thirds',
        quantiles: Sequence[float] = (1, 5),
        object_areas: tuple[int, int] | None = (32**2, 96**2),
        blocks: str | int | None = None,
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
        if blocks is not None:
            block_names(blocks, [])
        self.groups = groups
        self.quantiles = quantiles
        self.object_areas = object_areas
        self.blocks = blocks
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
        # (name, (C, 4) or with the objects (C, 10), (P, 3) int64): all that is kept of an image, and on
        # request (C,) distances
        for at, sample in zip(range(done, len(self.results)), data_samples, strict=False):
            rows = torch.stack(self.results[at], 1)
            if self.object_areas is not None:
                rows = torch.cat([rows, torch.from_numpy(self._objects(sample, len(classes)))], 1)
            pairs = class_pairs(*_maps(sample), len(classes), self.ignore_index)
            self.results[at] = (str(sample.get('img_path') or ''), rows, pairs)
            if 'mHD95' in self.asked:
                self.results[at] += (self._distances(sample, len(classes)),)

    def _distances(self, sample: dict, classes: int) -> np.ndarray:
        """(C,) float64; ignored pixels are of no class."""
        prediction, label = _maps(sample)
        ignored = label == self.ignore_index
        valid = [
            each.int().masked_fill(ignored | (each < 0) | (each >= classes), -1).cpu().numpy()
            for each in (prediction, label)
        ]
        return hausdorff_distances(*valid, classes)

    def _objects(self, sample: dict, classes: int) -> np.ndarray:
        """(C, 6) int64 pixels of each class in small, medium and large objects: those right, then all."""
        prediction, label = _maps(sample)
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
        borders = self._borders([np.full(classes, np.nan)], nothing, groups) if 'mHD95' in self.asked else ()
        return [*super().expected_keys(), *self._scores(nothing, groups), *borders]

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

    def compute_metrics(self, results: Sequence[tuple]) -> dict[str, float]:
        if self.format_only:
            return super().compute_metrics(results)
        metrics = super().compute_metrics([rows[:, : len(AREAS)].unbind(1) for _, rows, *_ in results])
        # a fixed order, so that loaders and ranks don't matter; the main rank gets them in the data set's
        named = [(name or f'{at:06}', rows.numpy()) for at, (name, rows, *_) in enumerate(results)]
        named.sort(key=lambda pair: (pair[0], pair[1].tolist()))
        rows = np.stack([rows for _, rows in named])  # (N, C, 4) or (N, C, 10)
        known = self.train_pixels is not None and len(self.train_pixels)
        groups = self._class_indices(self.train_pixels if known else None)
        blocks = self._block_names([name for name, _ in named])
        scores = self._scores(rows, groups, blocks)
        metrics |= {key: per_cent(value) for key, value in scores.items()}
        if 'mHD95' in self.asked:
            metrics |= self._borders([distances for *_, distances in results], rows, groups)

        sizes = dict(all=rows.shape[1]) | {group: len(members) for group, members in groups.items()}
        if self.object_areas is not None:
            of_size = {size: [f'Recall.{size}.{c}' for c in self.dataset_meta['classes']] for size in SIZES}
            sizes |= {size: sum(map(math.isfinite, map(scores.get, keys))) for size, keys in of_size.items()}
        logger = MMLogger.get_current_instance()
        logger.info('\n' + table_text(group_table(metrics, sizes)))
        areas = dict(zip(AREAS, np.moveaxis(rows[..., : len(AREAS)], 2, 0), strict=True))  # (N, C) each
        confusion = confusion_matrix([pairs for _, _, pairs, *_ in results], rows.shape[1])
        self._save(logger, [name for name, _ in named], blocks, areas, groups, confusion)
        total = {key: values.sum(0) for key, values in areas.items()}
        classes = np.array(self.dataset_meta['classes'])
        held = total['label'] > 0
        if (found := classes[~held & (total['pred'] > 0)]).size:
            mean = present_mean(ratio(total['intersect'], total['union'])[held]) if held.any() else math.nan
            self.warn_once(
                'absent',
                f'{found.tolist()} are predicted, though no label holds them. As in MMSegmentation, each '
                f'counts as 0 in mIoU, which is {per_cent(mean):.2f} without them. Groups and comparisons '
                'leave them out',
            )
        return metrics

    def _block_names(self, paths: list[str]) -> list[str] | None:
        if self.blocks is None:
            return None
        try:
            blocks = block_names(self.blocks, [Path(path).as_posix() for path in paths])
        except ValueError as error:  # no reason to end a training
            self.warn_once('blocks', f'{error}. Intervals are over images')
            return None
        if len(set(blocks)) == 1:
            self.warn_once('blocks', f'all {len(paths)} images are of one block: there are no intervals')
        return blocks

    def _scores(
        self, rows: np.ndarray, groups: Mapping[str, np.ndarray], blocks: list[str] | None = None
    ) -> dict[str, float]:
        """Shares, NaN where one has no value, of (N, C, 4) or (N, C, 10) pixels in N images."""
        areas = dict(zip(AREAS, np.moveaxis(rows[..., : len(AREAS)], 2, 0), strict=True))  # (N, C) each
        scores = group_scores(areas, groups, blocks, self.nan_to_num)
        scores |= fine_grained_iou(areas['intersect'], areas['union'], areas['label'], self.quantiles)
        if self.object_areas is not None:
            right, pixels = np.split(rows[..., len(AREAS) :].sum(0), 2, 1)  # (C, 3)
            recall = dict(zip(SIZES, ratio(right, pixels).T, strict=True))
            scores |= {f'mRecall.{size}': present_mean(values) for size, values in recall.items()}
            for size, values in recall.items():
                names = [f'Recall.{size}.{name}' for name in self.dataset_meta['classes']]
                scores |= zip(names, values, strict=True)
        if 'mDice' in self.asked:
            scores |= dice_scores(areas, self.dataset_meta['classes'], groups, self.quantiles)
        return scores

    def _borders(
        self, distances: Sequence[np.ndarray], rows: np.ndarray, groups: Mapping[str, np.ndarray]
    ) -> dict[str, float]:
        held = rows[..., AREAS.index('label')].any(0)
        scores = distance_scores(np.stack(distances), held, self.dataset_meta['classes'], groups)
        return {key: round(value, 2) for key, value in scores.items()}

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
        blocks: Sequence[str] | None,
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
        file = Path(files[0].baseFilename).with_name(image_scores_name(self.prefix))
        try:
            save_image_scores(
                file,
                images=names if len(set(names)) == len(names) else paths,
                blocks=np.empty(0, str) if blocks is None else blocks,
                classes=self.dataset_meta['classes'],
                pixels=np.empty(0, np.int64) if self.train_pixels is None else self.train_pixels,
                group=group,
                confusion=confusion,
                **areas,
            )
        except OSError as error:
            logger.warning(f'the scores of the images are not saved, {file} cannot be written: {error}')


def _maps(sample: dict) -> list[torch.Tensor]:
    """(H, W) class indices that are predicted, and those of the label on the same device."""
    prediction, label = (
        sample[key]['data'].reshape(sample[key]['data'].shape[-2:]) for key in ('pred_sem_seg', 'gt_sem_seg')
    )
    return [prediction, label.to(prediction)]
