"""The annotation files of a data set: which they are, and how they are read."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from mmseg_imbalance.counting.dataset_parts import Part, own_access, part_repeats
from mmseg_imbalance.counting.label_files import as_bytes, decode, reading
from mmseg_imbalance.counting.label_steps import LabelSteps
from mmseg_imbalance.counting.label_trial import LOOKED_AT, Found, find_steps
from mmseg_imbalance.counting.ranks import speaks, warn
from mmseg_imbalance.counting.transforms import TAKEN_AWAY, attempt, keeps_labels, name_of, names, packs


class Annotation(NamedTuple):
    """One annotation file of a data set and how it is read."""

    dataset: Any  # the innermost one
    row: int  # its index in `dataset`
    path: str
    repeats: int
    ignore_index: int
    steps: LabelSteps
    table: np.ndarray | None  # (256,) byte -> label, of MMSegmentation's loader; None: it is another


def find_annotations(
    dataset: Any, ignore_index: int | None = None, label_transforms: Sequence[str] | None = None
) -> tuple[tuple[str, ...], list[Annotation]]:
    """Class names and every distinct annotation of the data set: data set by data set, row by row.

    Args:
        dataset: see :func:`~mmseg_imbalance.counting.count_classes`.
        ignore_index: the label that is no class; None: each data set's own.
        label_transforms: names of transforms after the loading one that change labels; None: those that are
            not known to keep labels and need no image. What may change labels and is not run is named in a
            warning.

    Raises:
        ValueError: no image, no class names, no annotations, a name that no pipeline has.
        TypeError: the class names are a string.
        FileNotFoundError: the first annotation of a data set is looked at, and it is missing.
    """
    repeats, reason = {}, ''
    try:
        repeats = part_repeats(dataset)
    except ValueError as error:
        if 'at least one array' not in str(error):  # what MMEngine says of an empty data set
            raise
        reason = f' ({error})'
    repeats = {part: times for part, times in repeats.items() if times.any()}
    if not repeats:
        raise ValueError(
            f'{type(dataset).__name__} holds no image, nothing to count{reason}. Check data_root, '
            'data_prefix, img_suffix, ann_file and indices.'
        )
    if label_transforms is None and (own := ', '.join(dict.fromkeys(own_access(dataset)))):
        warn(
            f'counting does not call {own}. It counts the labels that the pipeline makes of each image in '
            'the list. If this method changes labels or takes other images, the counts are wrong. Change '
            'labels in a transform, and give a wrapper that chooses images repeat_indices, as '
            'ClassBalancedDataset has them: the index in `dataset` of each of its images. '
            'label_transforms=() silences this.'
        )
    classes = _classes(part.dataset for part in repeats)
    wanted = [label_transforms] if isinstance(label_transforms, str) else label_transforms
    if wanted is not None:  # type= takes classes, and names with the scope of a registry
        wanted = [str(getattr(name, '__name__', name)).rpartition('.')[2] for name in wanted]
    chosen = {part: np.flatnonzero(times).tolist() for part, times in repeats.items()}
    found: dict[Part, Found] = {}
    edited: set[Part] = set()
    for part, rows in chosen.items():
        spread = np.unique(np.linspace(0, len(rows) - 1, LOOKED_AT).astype(int))
        infos = [part.dataset.get_data_info(rows[at]) for at in spread]
        looked_at = [(info, _path(info)) for info in infos]
        ignored = part.dataset.ignore_index if ignore_index is None else ignore_index
        found[part] = find_steps(part.pipeline(), looked_at, wanted, ignored)
        if not all(_by_table(found[part].steps, *row) for row in looked_at):
            edited.add(part)
    if unknown := set(wanted or ()).difference(*(each.held for each in found.values())):
        listed = [name for part in found for name in names(part.pipeline())]
        raise ValueError(
            f'label_transforms names {sorted(unknown)}, but no pipeline of the training data has it after '
            f'the transform that loads annotations. The transforms are {list(dict.fromkeys(listed))}.'
        )
    option = _warn_of_left_out(list(found.values()))
    annotations: list[Annotation] = []
    for part, rows in chosen.items():
        base, steps = part.dataset, found[part].steps._replace(option=option)
        ignored = base.ignore_index if ignore_index is None else ignore_index
        tables: dict[Any, np.ndarray | None] = {}
        for row in rows:
            info = base.get_data_info(row)
            rule = repr(info.get('label_map')), info.get('reduce_zero_label')
            if rule not in tables:
                tables[rule] = None if part in edited else _label_table(steps, info)
            path = _path(info, needed=tables[rule] is not None)
            times = int(repeats[part][row])
            annotations.append(Annotation(base, row, path, times, ignored, steps, tables[rule]))
    return classes, annotations


def _classes(datasets: Iterable[Any]) -> tuple[str, ...]:
    """The class names that all data sets have."""
    found = set()
    for dataset in datasets:
        classes = dataset.metainfo.get('classes') or ()
        if isinstance(classes, str):
            raise TypeError(
                f'classes={classes!r} is a string, whose letters would be the classes. MMEngine takes a '
                'string for the path of a file with one name a line, and there is none. Write a tuple, with '
                f'a comma also after a single name: classes=({classes!r},).'
            )
        found.add(tuple(classes))
    if len(found) > 1 or () in found:
        raise ValueError(
            f'the classes are {found}, but there must be names, the same for all wrapped data '
            'sets. Give metainfo=dict(classes=(...)) in their configs.'
        )
    return found.pop()


def _path(info: dict[str, Any], needed: bool = False) -> str:
    """Where the labels of an image are; of a loader that does not take ``seg_map_path``, a guess."""
    if info.get('seg_map_path'):
        return str(info['seg_map_path'])
    if needed:
        raise ValueError(
            f'{info.get("img_path")} has no annotation. Give data_prefix=dict(seg_map_path=...).'
        )
    paths = [value for key, value in info.items() if isinstance(value, str) and key != 'img_path']
    return next((path for path in paths if os.path.isfile(path)), str(info.get('img_path')))


def _warn_of_left_out(found: list[Found]) -> str:
    """Name the transforms that are not run; the option with them and with those that are."""
    from mmengine.logging import print_log

    left_out: dict[str, str] = {}
    for each in found:
        left_out |= each.left_out
    run = [
        name_of(step)
        for each in found
        for step in each.steps.change
        if not (packs(step) and keeps_labels(step))
    ]
    unnamed = list(dict.fromkeys(name for each in found for name in each.unnamed))
    nameable = [name for name, reason in left_out.items() if reason != TAKEN_AWAY]
    option = _option_naming([*run, *unnamed, *nameable]) if unnamed or nameable else ''
    if not speaks():
        return option
    if left_out:
        listed = ', '.join(f'{name} ({reason})' for name, reason in left_out.items())
        remedy = (
            f'name all that do, {option} of ClassWeightHook, RareClassSampler and others. They are run with '
            'the image then.'
            if option
            else 'change labels in a transform of your own before these, where gt_seg_map still is.'
        )
        warn(
            f'the labels are counted as they are before {listed}. Transforms that are not '
            "MMSegmentation's may change what a label means, and counting, which loads no image, did not "
            f'run these. If they do, the counts are wrong: {remedy} label_transforms=() runs none and '
            'silences this.'
        )
    if unnamed:
        warn(
            f'label_transforms does not name {", ".join(unnamed)}, which change labels in a trial, so the '
            f'labels are counted as they are without. If they change what a label means, write {option}.'
        )
    if moving := list(dict.fromkeys(name for each in found for name in each.moving)):
        print_log(
            'in a trial on some images these transforms only moved labels or kept them, so counting does not '
            f'run them: {", ".join(moving)}.',
            logger='current',
        )
    return option


def _option_naming(listed: Iterable[str]) -> str:
    """``label_transforms=`` with these transforms, those inside a wrapper in place of it."""
    inside = (name.rpartition('(')[2].rstrip(')').split(', ') for name in listed)
    return f'label_transforms=({", ".join(map(repr, dict.fromkeys(chain.from_iterable(inside))))},)'


def _label_table(steps: LabelSteps, info: dict[str, Any]) -> np.ndarray | None:
    """(256,) label of every byte, got by loading an image that holds them all.

    None unless MMSegmentation's own loader alone loads the labels: another may do more than map values.
    """
    from PIL import Image

    loader = steps.load[-1]
    kind = f'{type(loader).__module__}.{type(loader).__qualname__}'
    if len(steps.load) > 1 or kind != 'mmseg.datasets.transforms.loading.LoadAnnotations':
        return None
    probe = copy.copy(loader)
    probe.backend_args, probe.imdecode_backend = None, 'pillow'
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'values.png')
        Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(path)
        found = attempt([probe], {**info, 'seg_map_path': path, 'seg_fields': []})
    table = found.get('gt_seg_map') if isinstance(found, dict) else None
    return None if table is None or table.size != 256 else table.ravel()  # of an edited loader


def _by_table(steps: LabelSteps, info: dict[str, Any], path: str) -> bool:
    """Whether the labels of a file are those of its table: users edit the loader in their MMSegmentation."""
    table = _label_table(steps, info)
    loaded = None if table is None else attempt(steps.load, info)
    if table is None or not isinstance(loaded, dict):
        return True
    try:
        with reading(path):
            raw, _ = decode(path, steps.load[0])
    except (FileNotFoundError, ValueError):  # counting says why
        return True
    return np.array_equal(table[as_bytes(raw.squeeze())], np.asarray(loaded.get('gt_seg_map')))
