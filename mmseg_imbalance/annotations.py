"""The annotation files of a data set: which they are, how they are read, and the pixels of each label."""

from __future__ import annotations

import copy
import os
import tempfile
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

__all__ = ['Annotation', 'count_pixels', 'dataset_rows', 'find_annotations', 'value_counts']


class Annotation(NamedTuple):
    """One annotation file of a data set and how it is read."""

    dataset: Any
    row: int  # its index in `dataset`
    path: str
    repeats: int
    ignore_index: int
    loader: Any
    table: np.ndarray | None  # (256,) raw value -> label; None: the loader itself is run


def _flatten(dataset: Any) -> list[tuple[Any, int]]:
    """(base data set, row) for every index of a possibly wrapped data set, in its order."""
    dataset.full_init()
    if hasattr(dataset, 'datasets'):  # ConcatDataset
        return [pair for inner in dataset.datasets for pair in _flatten(inner)]
    if not hasattr(dataset, 'dataset'):
        return [(dataset, row) for row in range(len(dataset))]
    pairs = _flatten(dataset.dataset)
    if hasattr(dataset, 'repeat_indices'):  # ClassBalancedDataset
        return [pairs[index] for index in dataset.repeat_indices]
    return pairs * getattr(dataset, 'times', 1)  # RepeatDataset, or MultiImageMixDataset


def dataset_rows(dataset: Any) -> np.ndarray:
    """(len(dataset),) int64: which row of the counts of all images of `dataset` each of its indices is."""
    rows: dict[tuple[Any, int], int] = {}
    return np.array([rows.setdefault(pair, len(rows)) for pair in _flatten(dataset)], dtype=np.int64)


def find_annotations(
    dataset: Any, ignore_index: int | None = None
) -> tuple[tuple[str, ...], list[Annotation]]:
    """Class names and every distinct annotation of the data set, in its order."""
    reason = ''
    try:
        repeats = Counter(_flatten(dataset))
    except ValueError as error:
        if 'at least one array' not in str(error):  # what MMEngine says of an empty data set
            raise
        repeats, reason = Counter(), f' ({error})'
    if not repeats:
        raise ValueError(
            f'{type(dataset).__name__} holds no image, nothing to count{reason}. Check data_root, '
            'data_prefix, img_suffix, ann_file and indices.'
        )
    bases = list(dict.fromkeys(base for base, _ in repeats))
    names = {tuple(base.metainfo.get('classes') or ()) for base in bases}
    if len(names) > 1 or () in names:
        raise ValueError(
            f'the classes are {names}, but there must be names, the same for all wrapped data '
            'sets. Give metainfo=dict(classes=(...)) in their configs.'
        )
    loaders = {base: _annotation_loader(base) for base in bases}
    tables: dict[Any, np.ndarray | None] = {}
    annotations = []
    for (base, row), times in repeats.items():
        info = base.get_data_info(row)
        if not info.get('seg_map_path'):
            raise ValueError(
                f'{info.get("img_path")} of {type(base).__name__} has no annotation. Give '
                'data_prefix=dict(seg_map_path=...).'
            )
        rule = (base, repr(info.get('label_map')), info.get('reduce_zero_label'))
        if rule not in tables:
            tables[rule] = _label_table(loaders[base], info)
        ignore = base.ignore_index if ignore_index is None else ignore_index
        path = str(info['seg_map_path'])
        annotations.append(Annotation(base, row, path, times, ignore, loaders[base], tables[rule]))
    return names.pop(), annotations


def _annotation_loader(dataset: Any) -> Any:
    """A copy of the transform that loads annotations in the pipeline of `dataset`."""
    from mmcv.transforms import LoadAnnotations

    for transform in dataset.pipeline.transforms:
        if isinstance(transform, LoadAnnotations):
            return copy.copy(transform)  # MMSegmentation's remembers the first data it sees
    names = [type(transform).__name__ for transform in dataset.pipeline.transforms]
    raise ValueError(
        f'the pipeline of {type(dataset).__name__} loads no annotations: {names}. Add '
        "dict(type='LoadAnnotations') to it, the pipeline of the innermost data set."
    )


def _label_table(loader: Any, info: dict[str, Any]) -> np.ndarray | None:
    """(256,) label of every raw value, got by loading an image that holds them all.

    None unless it is MMSegmentation's own loader: another may do more than map values.
    """
    from PIL import Image

    kind = f'{type(loader).__module__}.{type(loader).__qualname__}'
    if kind != 'mmseg.datasets.transforms.loading.LoadAnnotations':
        return None
    probe = copy.copy(loader)
    probe.backend_args, probe.imdecode_backend = None, 'pillow'
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'values.png')
        Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(path)
        return probe({**info, 'seg_map_path': path, 'seg_fields': []})['gt_seg_map'].ravel()


def count_pixels(annotation: Annotation, num_classes: int) -> tuple[np.ndarray, int]:
    """Pixels of each class, (num_classes,) int64, and ignored pixels of one annotation."""
    try:
        labels = _load_labels(annotation)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f'{annotation.path}: no such annotation file ({error}). Check data_root, data_prefix and '
            'seg_map_suffix.'
        ) from error
    except Exception as error:
        raise ValueError(
            f'{annotation.path}: cannot be read as a label image ({type(error).__name__}: {error}). '
            'It may be empty, cut off or no image. Replace the file.'
        ) from error
    if labels.shape[2:] not in ((), (1,)):
        raise ValueError(
            f'{annotation.path}: shape {labels.shape}, but a label image has one channel of class '
            "indices. Convert colours to indices; imdecode_backend='pillow' keeps a palette's."
        )
    raw, pixels = value_counts(labels)
    mapped = raw
    if annotation.table is not None:
        # MMSegmentation's loader would wrap what a byte cannot hold.
        table = dict(enumerate(annotation.table.tolist()))
        mapped = np.array([table.get(value, -1) for value in raw.tolist()], dtype=np.int64)
    ignored = mapped == annotation.ignore_index
    outside = ~ignored & ~np.isin(mapped, np.arange(num_classes))
    if outside.any():
        found = zip(raw[outside], mapped[outside], pixels[outside], strict=True)
        listed = [f'{value} -> {label}: {count} pixels' for value, label, count in found]
        raise ValueError(
            f'{annotation.path}: labels out of range, value in the file -> label: '
            f'{", ".join(listed[:20])}. Allowed are 0 to {num_classes - 1} and ignore_index '
            f'{annotation.ignore_index}; the file holds {raw[:50].tolist()}. Usual causes: '
            f'reduce_zero_label is {getattr(annotation.dataset, "reduce_zero_label", None)} and should '
            'not be; raw labelIds instead of labelTrainIds (see seg_map_suffix); metainfo classes '
            f'({num_classes} names) that do not fit the files; another ignore_index.'
        )
    counts = np.zeros(num_classes, dtype=np.int64)
    np.add.at(counts, mapped[~ignored].astype(np.int64), pixels[~ignored])
    return counts, int(pixels[ignored].sum())


def _load_labels(annotation: Annotation) -> np.ndarray:
    """What the file holds if there is a table to map it, else the labels themselves."""
    import mmcv
    from mmengine import fileio

    if annotation.table is None:
        return np.asarray(annotation.loader(annotation.dataset.get_data_info(annotation.row))['gt_seg_map'])
    data = fileio.get(annotation.path, backend_args=annotation.loader.backend_args)
    labels = mmcv.imfrombytes(data, flag='unchanged', backend=annotation.loader.imdecode_backend)
    if labels is None:
        raise ValueError('the decoder finds no image')
    return labels


def value_counts(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values and how many pixels hold each.

    `np.bincount` of bytes takes half as long as decoding them from a PNG. So runs of equal pixels
    are counted where they are long, and Pillow counts the others.
    """
    from PIL import Image

    narrow = labels.astype(np.uint8, copy=False)
    if labels.size == 0 or (narrow is not labels and not np.array_equal(narrow, labels)):
        return np.unique(labels, return_counts=True)
    flat = narrow.ravel()
    breaks = flat[1:] != flat[:-1]
    if np.count_nonzero(breaks) < flat.size // 32:
        ends = np.append(np.flatnonzero(breaks), flat.size - 1)  # last pixel of each run
        counts = np.bincount(flat[ends], np.diff(ends, prepend=-1)).astype(np.int64)
    else:
        row = Image.frombuffer('L', (flat.size, 1), flat, 'raw', 'L', 0, 1)
        counts = np.array(row.histogram())
    values = np.flatnonzero(counts)
    return values, counts[values]
