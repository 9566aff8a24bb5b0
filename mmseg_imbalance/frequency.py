"""Class frequency: how many pixels and images of a data set hold each class."""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmseg_imbalance.files import write_atomically

__all__ = ['CITYSCAPES_TRAIN', 'ClassFrequency', 'count_classes', 'dataset_rows', 'default_cache_dir']

_CACHE_FORMAT = 1
T = TypeVar('T')


@dataclass(frozen=True, eq=False)
class ClassFrequency:
    """Integer counts of a data set with C classes; an image repeated k times counts k times.

    Args:
        classes: class names, C of them.
        pixels: (C,) int64, pixels of each class.
        images: (C,) int64, images that hold it.
        image_pixels: (C,) int64, all pixels, ignored ones included, of the images that hold it.
        ignored: pixels that belong to no class.
        num_images: images counted; fewer than `dataset_images` if this is a sample.
        dataset_images: images in the data set.
        counts: (images, C) int64, pixels in each distinct image; None where only totals are known,
            as are `repeats`, (images,) int64, how often each counts, and `image_keys`, their
            annotation paths.
    """

    classes: tuple[str, ...]
    pixels: np.ndarray
    images: np.ndarray
    image_pixels: np.ndarray
    ignored: int
    num_images: int
    dataset_images: int
    counts: np.ndarray | None = None
    repeats: np.ndarray | None = None
    image_keys: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ('pixels', 'images', 'image_pixels'):
            array = np.array(getattr(self, name), dtype=np.int64)
            if array.shape != (len(self.classes),):
                raise ValueError(
                    f'{name} has shape {array.shape}, but there are {len(self.classes)} classes. '
                    'Give one number per class.'
                )
            array.flags.writeable = False  # CITYSCAPES_TRAIN is shared by all callers
            object.__setattr__(self, name, array)

    @classmethod
    def from_rows(
        cls,
        classes: Sequence[str],
        counts: np.ndarray,
        ignored: np.ndarray,
        image_keys: Sequence[str],
        repeats: np.ndarray | None = None,
        dataset_images: int | None = None,
    ) -> ClassFrequency:
        """Totals of rows: `counts` (images, C), `ignored`, `repeats` (images,); fields as above."""
        counts, ignored = np.array(counts, dtype=np.int64), np.array(ignored, dtype=np.int64)
        once = np.ones(len(counts), dtype=np.int64)
        repeats = once if repeats is None else np.array(repeats, dtype=np.int64)
        held = (counts > 0) * repeats[:, None]  # (images, C)
        num_images = int(repeats.sum())
        return cls(
            classes=tuple(classes),
            pixels=repeats @ counts,
            images=held.sum(axis=0),
            image_pixels=(counts.sum(axis=1) + ignored) @ held,
            ignored=int(repeats @ ignored),
            num_images=num_images,
            dataset_images=num_images if dataset_images is None else dataset_images,
            counts=counts,
            repeats=repeats,
            image_keys=tuple(image_keys),
        )

    @property
    def share(self) -> np.ndarray:
        """Share of each class in the valid pixels, (C,) float64; zeros if there are none."""
        return self.pixels / max(int(self.pixels.sum()), 1)

    def __add__(self, other: ClassFrequency) -> ClassFrequency:
        """Counts of both data sets together; per-image rows only if both have them."""
        if self.classes != other.classes:
            raise ValueError(
                f'cannot add counts of {other.classes} to counts of {self.classes}. Count both '
                'data sets with the same classes in the same order.'
            )
        total: dict[str, Any] = {}
        for name in [field.name for field in fields(self)][1:]:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is None or theirs is None:
                total[name] = None
            elif name in ('counts', 'repeats'):
                total[name] = np.concatenate([mine, theirs])
            else:
                total[name] = mine + theirs
        return ClassFrequency(self.classes, **total)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one ``.npz`` file."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        with write_atomically(path, 'wb') as file:
            np.savez(file, **{name: value for name, value in values.items() if value is not None})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClassFrequency:
        """Read what `save` wrote; raises some exception if the file is damaged or missing."""
        with open(path, 'rb') as file, np.load(file, allow_pickle=False) as archive:
            values: dict[str, Any] = {name: archive[name] for name in archive.files}
        for name in {'classes', 'image_keys'} & values.keys():
            values[name] = tuple(values[name].tolist())
        for name in ('ignored', 'num_images', 'dataset_images'):
            values[name] = int(values[name])
        return cls(**values)


# Published counts of the 2975 training images, all of 2048x1024: pixels, images that hold the class.
_CITYSCAPES = {
    'road': (2036416525, 2934), 'sidewalk': (336090793, 2811), 'building': (1260636120, 2934),
    'wall': (36199498, 970), 'fence': (48454166, 1296), 'pole': (67789506, 2949),
    'traffic light': (11477088, 1658), 'traffic sign': (30448193, 2808),
    'vegetation': (879783988, 2891), 'terrain': (63949536, 1654), 'sky': (221979646, 2686),
    'person': (67326424, 2343), 'rider': (7463162, 1023), 'car': (386328286, 2832),
    'truck': (14772328, 359), 'bus': (12990290, 274), 'train': (12863955, 142),
    'motorcycle': (5449152, 513), 'bicycle': (22861233, 1646),
}  # fmt: skip
_CITYSCAPES_CITIES = {
    'aachen', 'bochum', 'bremen', 'cologne', 'darmstadt', 'dusseldorf', 'erfurt', 'hamburg',
    'hanover', 'jena', 'krefeld', 'monchengladbach', 'strasbourg', 'stuttgart', 'tubingen', 'ulm',
    'weimar', 'zurich',
}  # fmt: skip
CITYSCAPES_TRAIN = ClassFrequency(
    classes=tuple(_CITYSCAPES),
    pixels=np.array([pixels for pixels, _ in _CITYSCAPES.values()]),
    images=np.array([images for _, images in _CITYSCAPES.values()]),
    image_pixels=np.array([images * 2048 * 1024 for _, images in _CITYSCAPES.values()]),
    ignored=715747311,
    num_images=2975,
    dataset_images=2975,
)


def default_cache_dir() -> Path:
    """The user's folder for counts: ``mmseg_imbalance`` in $XDG_CACHE_HOME or ``~/.cache``."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'mmseg_imbalance')


class _Source(NamedTuple):
    """One distinct annotation and how it is read."""

    dataset: Any
    row: int  # its index in `dataset`
    path: str
    repeats: int
    ignore_index: int
    loader: Any
    table: np.ndarray | None  # (256,) raw value -> label; None: the loader itself is run


class _Row(NamedTuple):
    """What was counted in a source, or why not. Errors are data: they cross processes in order."""

    position: int  # among the sources
    counts: np.ndarray  # (C,)
    ignored: int
    error: Exception | None = None


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
    from mmengine.dist import get_dist_info

    rank, world_size = get_dist_info()
    if max_images is not None and max_images < 1:
        raise ValueError(f'max_images={max_images}, allowed are 1 and more. None counts all.')
    plan, failure = _attempt(lambda: _plan(dataset, ignore_index))
    classes, sources = plan or ((), [])
    if len(set(_exchange(failure, _digest(source.path for source in sources)))) > 1:
        raise ValueError(
            'not all ranks see the same annotation files. Give every node the same data set, under '
            'the same paths.'
        )
    if not per_image and _is_cityscapes_train(classes, sources):
        return CITYSCAPES_TRAIN
    dataset_images = sum(source.repeats for source in sources)
    if max_images is not None and max_images < len(sources):
        sample = np.random.default_rng(0).choice(len(sources), max_images, replace=False)
        sources = [sources[position] for position in np.sort(sample)]

    def look_up() -> tuple[Path | None, ClassFrequency | None]:
        if cache_dir is None or rank != 0:
            return None, None
        name = f'class_frequency_{_fingerprint(classes, sources, dataset_images)}.npz'
        return Path(cache_dir, name), _load_cached(Path(cache_dir, name), classes, sources)

    # Only rank 0 looks into the cache and tells the others, so that they never disagree.
    found, failure = _attempt(look_up)
    cache_file, cached = _exchange(failure, found)[0]
    if cached is not None:
        return cached

    part = range(rank, len(sources), world_size)
    show = progress and rank == 0
    counted, failure = _attempt(lambda: _count_part(sources, classes, part, num_workers, show))
    rows = [row for part_rows in _exchange(failure, counted) for row in part_rows]
    rows.sort(key=lambda row: row.position)
    for row in rows:  # in order, so that it is the error that a single process would meet
        if row.error is not None:
            raise row.error
    frequency = ClassFrequency.from_rows(
        classes,
        np.stack([row.counts for row in rows]),
        np.array([row.ignored for row in rows]),
        [source.path for source in sources],
        np.array([source.repeats for source in sources]),
        dataset_images,
    )
    if cache_file is not None and rank == 0:
        try:
            cache_file.parent.mkdir(parents=True, exist_ok=True)
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


def _plan(dataset: Any, ignore_index: int | None) -> tuple[tuple[str, ...], list[_Source]]:
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
    sources = []
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
        sources.append(_Source(base, row, path, times, ignore, loaders[base], tables[rule]))
    return names.pop(), sources


def _annotation_loader(dataset: Any) -> Any:
    """A copy of the transform that loads annotations in the pipeline of `dataset`."""
    from mmcv.transforms import LoadAnnotations

    for transform in dataset.pipeline.transforms:
        if isinstance(transform, LoadAnnotations):
            return copy.copy(transform)  # the framework's remembers the first data it sees
    names = [type(transform).__name__ for transform in dataset.pipeline.transforms]
    raise ValueError(
        f'the pipeline of {type(dataset).__name__} loads no annotations: {names}. Add '
        "dict(type='LoadAnnotations') to it, the pipeline of the innermost data set."
    )


def _label_table(loader: Any, info: dict[str, Any]) -> np.ndarray | None:
    """(256,) label of every raw value, got by loading an image that holds them all.

    None unless it is the framework's own loader: another may do more than map values.
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


def _is_cityscapes_train(classes: tuple[str, ...], sources: list[_Source]) -> bool:
    """Whether these are the very 2975 images and labels that the published counts are of."""
    if classes != CITYSCAPES_TRAIN.classes or len(sources) != CITYSCAPES_TRAIN.num_images:
        return False
    name = re.compile(r'([a-z]+)_\d{6}_\d{6}_gtFine_labelTrainIds\.png')
    matches = [name.fullmatch(os.path.basename(source.path)) for source in sources]
    unchanged = np.arange(256)
    return (
        len({match[0] for match in matches if match}) == len(sources)
        and {match[1] for match in matches if match} == _CITYSCAPES_CITIES
        and all(
            type(source.dataset).__name__ == 'CityscapesDataset'
            and (source.repeats, source.ignore_index) == (1, 255)
            and source.table is not None
            and np.array_equal(source.table, unchanged)
            for source in sources
        )
    )


def _digest(parts: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode())
    return digest.hexdigest()[:32]


def _fingerprint(classes: tuple[str, ...], sources: list[_Source], dataset_images: int) -> str:
    """Digest of everything that the counts depend on."""
    parts: list[object] = [_CACHE_FORMAT, classes, dataset_images]
    with np.printoptions(threshold=sys.maxsize):  # arrays whole
        for loader in {id(source.loader): source.loader for source in sources}.values():
            try:
                code = inspect.getsource(type(loader))  # somebody may be working on it
            except (OSError, TypeError):
                code = ''
            parts.append((type(loader).__module__, code, repr(vars(loader))))
        for source in sources:
            try:
                stat = os.stat(source.path)
                stamp: object = (stat.st_size, stat.st_mtime_ns)
            except OSError:  # not a local file
                stamp = None
            info = source.dataset.get_data_info(source.row)  # paths and label mapping
            parts.append((repr(info), stamp, source.repeats, source.ignore_index))
        return _digest(parts)


def _load_cached(path: Path, classes: tuple[str, ...], sources: list[_Source]) -> ClassFrequency | None:
    if not os.path.exists(path):  # False, not an error, where the folder cannot be entered
        return None
    try:
        frequency = ClassFrequency.load(path)
        if (frequency.classes, frequency.image_keys) != (classes, tuple(s.path for s in sources)):
            raise ValueError('it holds the counts of another data set')
    except Exception as error:
        _warn(f'class counts in {path} are damaged ({error}), counting again.')
        return None
    return frequency


class _Annotations(Dataset[_Row]):
    """Sources as the data set of a loader, whose workers count."""

    def __init__(self, sources: list[_Source], num_classes: int) -> None:
        self.sources, self.num_classes = sources, num_classes

    def __getitem__(self, position: int) -> _Row:
        try:
            return _Row(position, *_count_source(self.sources[position], self.num_classes))
        except (FileNotFoundError, ValueError) as error:
            return _Row(position, np.empty(0), 0, error)


def _count_part(
    sources: list[_Source], classes: tuple[str, ...], part: range, num_workers: int, show: bool
) -> list[_Row]:
    """Rows of the sources in `part`, up to the first error."""
    from rich.progress import track

    loader: DataLoader[_Row] = DataLoader(
        _Annotations(sources, len(classes)),
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


def _count_source(source: _Source, num_classes: int) -> tuple[np.ndarray, int]:
    """Pixels of each class, (num_classes,) int64, and ignored pixels of one annotation."""
    try:
        labels = _load_labels(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f'{source.path}: no such annotation file ({error}). Check data_root, data_prefix and '
            'seg_map_suffix.'
        ) from error
    except Exception as error:
        raise ValueError(
            f'{source.path}: cannot be read as a label image ({type(error).__name__}: {error}). '
            'It may be empty, cut off or no image. Replace the file.'
        ) from error
    if labels.shape[2:] not in ((), (1,)):
        raise ValueError(
            f'{source.path}: shape {labels.shape}, but a label image has one channel of class '
            "indices. Convert colours to indices; imdecode_backend='pillow' keeps a palette's."
        )
    raw, pixels = _value_counts(labels)
    mapped = raw
    if source.table is not None:
        # The framework's loader would wrap what a byte cannot hold.
        table = dict(enumerate(source.table.tolist()))
        mapped = np.array([table.get(value, -1) for value in raw.tolist()], dtype=np.int64)
    ignored = mapped == source.ignore_index
    outside = ~ignored & ~np.isin(mapped, np.arange(num_classes))
    if outside.any():
        found = zip(raw[outside], mapped[outside], pixels[outside], strict=True)
        listed = [f'{value} -> {label}: {count} pixels' for value, label, count in found]
        raise ValueError(
            f'{source.path}: labels out of range, value in the file -> label: '
            f'{", ".join(listed[:20])}. Allowed are 0 to {num_classes - 1} and ignore_index '
            f'{source.ignore_index}; the file holds {raw[:50].tolist()}. Usual causes: '
            f'reduce_zero_label is {getattr(source.dataset, "reduce_zero_label", None)} and should '
            'not be; raw labelIds instead of labelTrainIds (see seg_map_suffix); metainfo classes '
            f'({num_classes} names) that do not fit the files; another ignore_index.'
        )
    counts = np.zeros(num_classes, dtype=np.int64)
    np.add.at(counts, mapped[~ignored].astype(np.int64), pixels[~ignored])
    return counts, int(pixels[ignored].sum())


def _load_labels(source: _Source) -> np.ndarray:
    """What the file holds if there is a table to map it, else the labels themselves."""
    import mmcv
    from mmengine import fileio

    if source.table is None:
        return np.asarray(source.loader(source.dataset.get_data_info(source.row))['gt_seg_map'])
    data = fileio.get(source.path, backend_args=source.loader.backend_args)
    labels = mmcv.imfrombytes(data, flag='unchanged', backend=source.loader.imdecode_backend)
    if labels is None:
        raise ValueError('the decoder finds no image')
    return labels


def _value_counts(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
