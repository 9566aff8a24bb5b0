"""Counting the classes of a data set, from its annotations alone."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mmseg_imbalance.annotations import Annotation, count_pixels, find_annotations
from mmseg_imbalance.frequency import CITYSCAPES_TRAIN, ClassFrequency

__all__ = ['CITYSCAPES_CITIES', 'count_classes', 'default_cache_dir', 'training_frequency']

_CACHE_FORMAT = 1
T = TypeVar('T')

CITYSCAPES_CITIES = {
    'aachen', 'bochum', 'bremen', 'cologne', 'darmstadt', 'dusseldorf', 'erfurt', 'hamburg',
    'hanover', 'jena', 'krefeld', 'monchengladbach', 'strasbourg', 'stuttgart', 'tubingen', 'ulm',
    'weimar', 'zurich',
}  # fmt: skip


def default_cache_dir() -> Path:
    """The user's folder for counts: $MMSEG_IMBALANCE_CACHE, else ``~/.cache/mmseg_imbalance``."""
    return Path(os.environ.get('MMSEG_IMBALANCE_CACHE') or Path.home() / '.cache' / 'mmseg_imbalance')


class _Row(NamedTuple):
    """What was counted in an annotation, or why not. Errors are data: they cross processes in order."""

    position: int  # among the annotations
    counts: np.ndarray  # (C,)
    ignored: int
    error: Exception | None = None


def training_frequency(
    source: Any = None,
    *,
    heads: Iterable[nn.Module] | None = None,
    max_images: int | None = None,
    num_workers: int = 2,
    cache_dir: str | os.PathLike[str] | None = None,
    per_image: bool = False,
    progress: bool = True,
) -> ClassFrequency:
    """The class frequency of the training annotations; every user of this package gets it here.

    All ranks must call it, and all get the same or raise the same.

    The ignored label is the one that the last decode head of the model ignores, which is what training sees.
    It is each data set's own where no model is known or where `heads` ignore different labels.

    The counts are kept in one folder: `cache_dir`, else the `cache_dir` of a ClassWeightHook among the
    `custom_hooks` of the config, else the environment variable MMSEG_IMBALANCE_CACHE, else
    ``~/.cache/mmseg_imbalance``.

    Args:
        source: a runner in training; a config, whose training data set is built; a data set (neither model
            nor config is known then); None: the config of the runner that was made last.
        heads: those of the model that the counts are for; None: the last decode head.
        max_images, num_workers, per_image, progress: see :func:`count_classes`.

    Raises:
        ValueError: there is no runner, or no train_dataloader; and as :func:`count_classes`.
        FileNotFoundError: the data set or an annotation is not there.
    """

    def find() -> tuple[Any, int | None, Path]:
        dataset, config, model = _training_data(source)
        counted_for = _last_decode_head(model) if heads is None else heads
        folder = cache_dir or _cache_dir_of_hook(config) or default_cache_dir()
        return dataset, _ignored_label(counted_for), Path(folder)

    found, failure = _attempt(find)
    _exchange(failure, None)  # nobody starts to count unless all can
    dataset, ignore_index, folder = found or (None, None, None)
    return count_classes(
        dataset,
        max_images=max_images,
        ignore_index=ignore_index,
        num_workers=num_workers,
        cache_dir=folder,
        progress=progress,
        per_image=per_image,
    )


def _training_data(source: Any) -> tuple[Any, Any, Any]:
    """The training data set, the config and the model of `source`; None what is not known."""
    from mmseg_imbalance.registry import DATASETS

    from mmengine.config import Config
    from mmengine.logging import MessageHub

    if source is None:
        text = MessageHub.get_current_instance().get_info('cfg')
        if not text:
            raise ValueError('there is no runner, and so no config that names the training data')
        source = Config.fromstring(text, '.py')
    if isinstance(source, Config | dict):
        loader = source.get('train_dataloader')
        if loader is None:
            raise ValueError(
                'the training annotations are counted, but the config has no train_dataloader; add one, only '
                'its dataset is used'
            )
        return DATASETS.build(loader['dataset']), source, source.get('model')
    if hasattr(source, 'train_dataloader'):  # a runner
        return source.train_dataloader.dataset, source.cfg, source.model
    return source, None, None


def _last_decode_head(model: Any) -> list[Any]:
    """The last decode head of a model or of its config, alone in a list; an empty list if it has none."""
    while (inner := _part(model, 'module')) is not None:  # wrappers of ranks and of test time augmentation
        model = inner
    head = _part(model, 'decode_head')
    head = head[-1] if isinstance(head, list | tuple | nn.ModuleList) else head
    return [] if head is None else [head]


def _part(model: Any, name: str, default: Any = None) -> Any:
    return model.get(name, default) if isinstance(model, dict) else getattr(model, name, default)


def _ignored_label(heads: Iterable[Any]) -> int | None:
    """The label that all of the heads, or configs of heads, ignore; None if they differ or there is none."""
    found = {_part(head, 'ignore_index', 255 if isinstance(head, dict) else None) for head in heads}
    return found.pop() if len(found) == 1 else None


def _cache_dir_of_hook(config: Any) -> str | os.PathLike[str] | None:
    """Where a ClassWeightHook of the config, or one made already, keeps its counts; None: it does not say."""
    for hook in (config.get('custom_hooks') or ()) if config is not None else ():
        kind = _part(hook, 'type', type(hook))  # the name or, in Python configs, the class
        if getattr(kind, '__name__', str(kind)).rpartition('.')[2] == 'ClassWeightHook':
            return _part(hook, 'cache_dir')
    return None


def count_classes(
    dataset: Any,
    *,
    max_images: int | None = None,
    ignore_index: int | None = None,
    num_workers: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
    per_image: bool = False,
) -> ClassFrequency:
    """Pixels and images of each class, from annotations alone, labelled as training sees them.

    All ranks must call it: each counts its part, all get the whole. Transforms after the one that
    loads annotations are not run. Cityscapes train is not read, its counts are published.

    Args:
        dataset: BaseSegDataset, or Concat-, Repeat-, ClassBalanced-, MultiImageMixDataset of such.
        max_images: count a random sample of so many distinct images, the same in every call.
        ignore_index: the label that is no class; None: each data set's own.
        num_workers: worker processes of each rank.
        cache_dir: folder where counts are kept. They are found again by path, size and time of
            the annotations (those that are not local: path only), label mapping and classes.
        progress: show a bar, on rank 0.
        per_image: the counts of each image are needed, so Cityscapes train is read as any other.

    Raises:
        FileNotFoundError: an annotation file is missing.
        ValueError: no image, no classes, no annotations, an unreadable file, a label out of range.
    """
    import mmseg_imbalance.registry  # noqa: F401  its error says how to install MMSegmentation

    from mmengine.dist import get_dist_info

    rank, world_size = get_dist_info()
    if max_images is not None and max_images < 1:
        raise ValueError(f'max_images={max_images}, allowed are 1 and more. None counts all.')
    found, failure = _attempt(lambda: find_annotations(dataset, ignore_index))
    classes, annotations = found or ((), [])
    if len(set(_exchange(failure, _digest(annotation.path for annotation in annotations)))) > 1:
        raise ValueError(
            'not all ranks see the same annotation files. Give every node the same data set, under '
            'the same paths.'
        )
    if not per_image and _is_cityscapes_train(classes, annotations):
        return CITYSCAPES_TRAIN
    dataset_images = sum(annotation.repeats for annotation in annotations)
    if max_images is not None and max_images < len(annotations):
        sample = np.random.default_rng(0).choice(len(annotations), max_images, replace=False)
        annotations = [annotations[position] for position in np.sort(sample)]

    def look_up() -> tuple[Path | None, ClassFrequency | None]:
        if cache_dir is None or rank != 0:
            return None, None
        name = f'class_frequency_{_fingerprint(classes, annotations, dataset_images)}.npz'
        return Path(cache_dir, name), _load_cached(Path(cache_dir, name), classes, annotations)

    # Only rank 0 looks into the cache and tells the others, so that they never disagree.
    looked_up, failure = _attempt(look_up)
    cache_file, cached = _exchange(failure, looked_up)[0]
    if cached is not None:
        return cached

    part = range(rank, len(annotations), world_size)
    show = progress and rank == 0
    counted, failure = _attempt(lambda: _count_part(annotations, classes, part, num_workers, show))
    rows = [row for part_rows in _exchange(failure, counted) for row in part_rows]
    rows.sort(key=lambda row: row.position)
    for row in rows:  # in order, so that it is the error that a single process would meet
        if row.error is not None:
            raise row.error
    frequency = ClassFrequency.from_rows(
        classes,
        np.stack([row.counts for row in rows]),
        np.array([row.ignored for row in rows]),
        [annotation.path for annotation in annotations],
        np.array([annotation.repeats for annotation in annotations]),
        dataset_images,
    )
    if cache_file is not None and rank == 0:
        try:
            frequency.save(cache_file)
        except OSError as error:
            _warn(f'class counts are not cached, {cache_file} cannot be written: {error}')
    return frequency


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What `work` returns, or its exception as one that can be sent to other ranks."""
    try:
        return work(), None
    except Exception as error:
        failure: Exception = RuntimeError(f'counting failed: {type(error).__name__}: {error}')
        for kind in (FileNotFoundError, TypeError, ValueError):
            if isinstance(error, kind):
                failure = kind(str(error))  # a subclass may not survive pickling
        if isinstance(error, NotImplementedError) and 'get_cat_ids' in str(error):
            failure = ValueError(
                f'{error}: ClassBalancedDataset needs it, and data sets of MMSegmentation have none. Take '
                "the data set without it, and sampler=dict(type='RareClassSampler') in train_dataloader."
            )
        failure.__cause__ = error
        return None, failure


def _exchange(failure: Exception | None, value: Any) -> list[Any]:
    """The `value` of every rank; if one has failed, every rank raises the same."""
    from mmengine.dist import all_gather_object

    outcomes = all_gather_object((failure, value))
    for failed, _ in outcomes:
        if failed is not None:
            raise failed
    return [value for _, value in outcomes]


def _warn(message: str) -> None:
    from mmengine.logging import print_log

    print_log(message, logger='current', level=logging.WARNING)


def _is_cityscapes_train(classes: tuple[str, ...], annotations: list[Annotation]) -> bool:
    """Whether these are the very 2975 images and labels that the published counts are of."""
    if classes != CITYSCAPES_TRAIN.classes or len(annotations) != CITYSCAPES_TRAIN.num_images:
        return False
    name = re.compile(r'([a-z]+)_\d{6}_\d{6}_gtFine_labelTrainIds\.png')
    matches = [name.fullmatch(os.path.basename(annotation.path)) for annotation in annotations]
    unchanged = np.arange(256)
    return (
        len({match[0] for match in matches if match}) == len(annotations)
        and {match[1] for match in matches if match} == CITYSCAPES_CITIES
        and all(
            type(annotation.dataset).__name__ == 'CityscapesDataset'
            and (annotation.repeats, annotation.ignore_index) == (1, 255)
            and annotation.table is not None
            and np.array_equal(annotation.table, unchanged)
            for annotation in annotations
        )
    )


def _digest(parts: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode())
    return digest.hexdigest()[:32]


def _fingerprint(classes: tuple[str, ...], annotations: list[Annotation], dataset_images: int) -> str:
    """Digest of everything that the counts depend on."""
    parts: list[object] = [_CACHE_FORMAT, classes, dataset_images]
    with np.printoptions(threshold=sys.maxsize):  # arrays whole
        for loader in {id(annotation.loader): annotation.loader for annotation in annotations}.values():
            try:
                code = inspect.getsource(type(loader))  # somebody may be working on it
            except (OSError, TypeError):
                code = ''
            parts.append((type(loader).__module__, code, repr(vars(loader))))
        for annotation in annotations:
            try:
                stat = os.stat(annotation.path)
                stamp: object = (stat.st_size, stat.st_mtime_ns)
            except OSError:  # not a local file
                stamp = None
            info = annotation.dataset.get_data_info(annotation.row)  # paths and label mapping
            parts.append((repr(info), stamp, annotation.repeats, annotation.ignore_index))
        return _digest(parts)


def _load_cached(
    path: Path, classes: tuple[str, ...], annotations: list[Annotation]
) -> ClassFrequency | None:
    if not os.path.exists(path):  # False, not an error, where the folder cannot be entered
        return None
    try:
        frequency = ClassFrequency.load(path)
        if (frequency.classes, frequency.image_keys) != (classes, tuple(s.path for s in annotations)):
            raise ValueError('it holds the counts of another data set')
    except Exception as error:
        _warn(f'class counts in {path} are damaged ({error}), counting again.')
        return None
    return frequency


class _Annotations(Dataset[_Row]):
    """Sources as the data set of a loader, whose workers count."""

    def __init__(self, annotations: list[Annotation], num_classes: int) -> None:
        self.annotations, self.num_classes = annotations, num_classes

    def __getitem__(self, position: int) -> _Row:
        try:
            return _Row(position, *count_pixels(self.annotations[position], self.num_classes))
        except (FileNotFoundError, ValueError) as error:
            return _Row(position, np.empty(0), 0, error)


def _count_part(
    annotations: list[Annotation], classes: tuple[str, ...], part: range, num_workers: int, show: bool
) -> list[_Row]:
    """Rows of the annotations in `part`, up to the first error."""
    from rich.progress import track

    loader: DataLoader[_Row] = DataLoader(
        _Annotations(annotations, len(classes)),
        batch_size=None,
        sampler=part,
        num_workers=num_workers,
        collate_fn=_unchanged,  # the default makes tensors of arrays
        generator=torch.Generator(),  # the default draws from the one that training uses
    )
    rows: list[_Row] = []
    for row in track(loader, 'Counting classes', total=len(part), disable=not show):
        rows.append(row)
        if row.error is not None:
            break
    return rows


def _unchanged(row: Any) -> Any:
    return row
