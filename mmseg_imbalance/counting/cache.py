"""The folder in which counts of classes are kept: their names, what they depend on, how much there may be."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmseg_imbalance.counting.annotations import Annotation
from mmseg_imbalance.counting.fingerprint import fingerprint, packages
from mmseg_imbalance.counting.ranks import speaks, warn
from mmseg_imbalance.counting.rows import named_files
from mmseg_imbalance.frequency import ClassFrequency

MAX_FILES, MAX_BYTES = 200, 10**9  # of a folder; what was not used for longest goes first
RECOUNTED = 8  # images, each time
_FORMAT = 3
_NAME = re.compile(r'class_frequency_[0-9a-f]{32}\.npz')
_HALF_WRITTEN = re.compile(_NAME.pattern + r'\.[0-9a-f]{32}\.tmp')


def default_cache_dir() -> Path:
    """The user's folder for counts: $MMSEG_IMBALANCE_CACHE, else ``~/.cache/mmseg_imbalance``.

    Raises:
        RuntimeError: the variable is not set, and this user has no home folder.
    """
    if folder := os.environ.get('MMSEG_IMBALANCE_CACHE'):
        return Path(os.path.expanduser(folder))
    try:
        return Path.home() / '.cache' / 'mmseg_imbalance'
    except RuntimeError as error:
        raise RuntimeError(
            f'there is no home folder to keep class counts in ({error}). Set MMSEG_IMBALANCE_CACHE, or '
            'cache_dir of ClassWeightHook, to a folder.'
        ) from error


def counts_file(
    folder: str | os.PathLike[str],
    classes: tuple[str, ...],
    annotations: Sequence[Annotation],
    dataset_images: int,
) -> Path:
    """The path of the counts of these annotations; another one where anything that they depend on differs.

    These are path, size and time of each file (of files that are not local the path, and those of a local
    database; for transforms of somebody's own, of all files that the data info names), how it is read and
    labelled, the code of the loader, classes, ignored label and repeats.
    """
    numbers: dict[tuple[int, ...], int] = {}  # of each way to read a file
    rules: list[tuple[object, ...]] = []
    datasets: dict[int, int] = {}
    files = []
    for annotation in annotations:
        rule = (type(annotation.dataset).__name__, *annotation._replace(dataset=0, row=0, path='', repeats=0))
        number = numbers.setdefault(
            (id(annotation.dataset), *map(id, rule[1:])),
            len(numbers),
        )
        if number == len(rules):
            rules.append((*rule, _databases(annotation.steps.parts())))
        info, named = None, [annotation.path]
        if annotation.table is None or annotation.steps.change:  # a transform sees all that the data set says
            info = annotation.dataset.get_data_info(annotation.row)
            named = named_files(annotation)
        stamp = [_stamp(path) for path in named]
        source = datasets.setdefault(id(annotation.dataset), len(datasets))
        files.append((annotation.path, stamp, annotation.repeats, source, number, info))
    steps = {id(annotation.steps): annotation.steps for annotation in annotations}.values()
    own = set().union(*(packages(part) for each in steps for part in each.parts()))
    with np.printoptions(threshold=sys.maxsize):  # arrays whole
        name = fingerprint([_FORMAT, classes, dataset_images, rules, repr(files)], own)
    return Path(folder, f'class_frequency_{name}.npz')


def _databases(steps: Iterable[Any]) -> list[tuple[str, tuple[int, int] | None]]:
    """The local files that the storage backends of loaders name, and the content of an LMDB's folder."""
    options = [getattr(step, 'backend_args', None) for step in steps]
    named = [item for each in options if isinstance(each, dict) for item in each.items()]
    paths = [value for name, value in named if name != 'backend' and isinstance(value, str)]
    files = [os.path.join(path, 'data.mdb') if os.path.isdir(path) else path for path in paths]
    return [(file, _stamp(file)) for file in files]


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    except (OSError, ValueError):  # not a local file
        return None


def load_counts(
    path: Path,
    classes: tuple[str, ...],
    annotations: Sequence[Annotation],
    recount: Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> ClassFrequency | None:
    """The counts in the file, unless they are damaged or a few images that are counted again differ.

    Args:
        recount: positions of so many annotations, their counts (images, C) and ignored pixels (images,).
    """
    from mmengine.logging import print_log

    if not os.path.exists(path):  # False, not an error, where the folder cannot be entered
        return None
    try:
        frequency = ClassFrequency.load(path)
        all_counts, all_ignored = _rows(frequency, classes, annotations)
    except FileNotFoundError:  # another run has made room
        return None
    except (OSError, ValueError) as error:
        warn(f'class counts in {path} are damaged ({error}), counting again.')
        return None
    positions, counts, ignored = recount(RECOUNTED)
    differ = (counts != all_counts[positions]).any(axis=1) | (ignored != all_ignored[positions])
    if differ.any():
        first = positions[differ.argmax()]
        warn(
            f'class counts in {path} are stale: {differ.sum()} of {len(positions)} images that were counted '
            f'again have other pixels now, such as {annotations[first].path}, although neither size nor time '
            'of the files nor the code that loads them have changed. All are counted again.'
        )
        return None
    if speaks():
        print_log(
            f'class counts of {len(annotations)} label files, counted {frequency.counted}, are taken from '
            f'{path}. {len(positions)} of the files were counted again and agree. To count all anew, delete '
            'this file, or every one with mmseg-imbalance cache --clear.',
            logger='current',
        )
    if frequency.unusual and speaks():
        warn(frequency.unusual)
    with suppress(OSError):  # somebody else's folder
        os.utime(path)  # used now
    return frequency


def _rows(
    frequency: ClassFrequency, classes: tuple[str, ...], annotations: Sequence[Annotation]
) -> tuple[np.ndarray, np.ndarray]:
    """Counts and ignored pixels of each annotation; an error unless these are what a file should hold."""
    if (frequency.classes, frequency.image_keys) != (classes, tuple(a.path for a in annotations)):
        raise ValueError('it holds the counts of another data set')
    counts, ignored = frequency.counts, frequency.ignored_counts
    if counts is None or ignored is None or not frequency.by_source():
        raise ValueError('it was written by an older version')
    if (counts.shape, ignored.shape) != ((len(annotations), len(classes)), (len(annotations),)):
        raise ValueError(f'it holds arrays of the shapes {counts.shape} and {ignored.shape}')
    return counts, ignored


def store_counts(frequency: ClassFrequency, path: Path) -> None:
    """Write counts and remove others where there are too many; a warning where that cannot be."""
    try:
        frequency.save(path)
    except (OSError, ValueError) as error:  # ValueError: a half-written archive cannot be closed
        warn(f'class counts are not cached, {path} cannot be written: {error}')
        return
    with suppress(OSError):  # others' files; the next run tries again
        _make_room(path)


def _make_room(newest: Path) -> None:
    total = newest.stat().st_size
    others = [file for file in cached_counts(newest.parent) if file.path != newest]
    for number, file in enumerate(sorted(others, key=lambda file: file.used, reverse=True), 2):
        total += file.size
        if number > MAX_FILES or total > MAX_BYTES:
            file.path.unlink(missing_ok=True)
    for path in newest.parent.iterdir():  # of runs that were killed
        if _HALF_WRITTEN.fullmatch(path.name) and path.stat().st_mtime < time.time() - 86400:
            path.unlink(missing_ok=True)


class CachedCounts(NamedTuple):
    """A file of counts."""

    path: Path
    size: int  # bytes
    used: float  # seconds since 1970


def cached_counts(folder: str | os.PathLike[str]) -> list[CachedCounts]:
    """The files of counts in a folder, those used last first; none where there is no such folder.

    Raises:
        OSError: the folder cannot be read.
    """
    files = []
    try:
        for entry in os.scandir(folder):
            if _NAME.fullmatch(entry.name):
                try:
                    stat = entry.stat()
                except FileNotFoundError:  # another run makes room
                    continue
                files.append(CachedCounts(Path(entry.path), stat.st_size, stat.st_mtime))
    except FileNotFoundError:
        return []
    return sorted(files, key=lambda file: file.used, reverse=True)


def clear(folder: str | os.PathLike[str]) -> int:
    """Remove the files of counts from a folder and leave all others there; returns their number.

    Raises:
        OSError: the folder cannot be read, or a file not be removed.
    """
    files = [file.path for file in cached_counts(folder)]
    for path in files:
        path.unlink(missing_ok=True)
    return len(files)
