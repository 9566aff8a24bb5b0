"""Kept counts are those of the files: what they depend on is noticed, what is damaged is counted again."""

import errno
import io
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from label_sets import NAMES, ShiftedLoader, StreetDataset, make, make_labels, same, spoil
from mmcv.transforms import BaseTransform
from mmengine.dataset import ConcatDataset, RepeatDataset
from mmengine.fileio import BaseStorageBackend
from mmengine.fileio.backends import backends
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image
from ranks import in_process

from mmseg_imbalance.counting import cache as count_cache
from mmseg_imbalance.counting import count_classes, rows, training_frequency
from mmseg_imbalance.counting.cache import (
    RECOUNTED,
    cached_counts,
    clear,
    default_cache_dir,
    store_counts,
)
from mmseg_imbalance.frequency import ClassFrequency


@pytest.fixture
def root(tmp_path):
    return make_labels(tmp_path / 'data')


@pytest.fixture
def warned(logged):
    """A function that returns the warnings so far."""
    return lambda: [message for level, message in logged if level == logging.WARNING]


@pytest.fixture
def decoded(monkeypatch):
    """Paths of the annotations that were read."""
    paths = []
    count_pixels = rows.count_pixels
    monkeypatch.setattr(
        rows,
        'count_pixels',
        lambda annotation, *args: (paths.append(annotation.path), count_pixels(annotation, *args))[1],
    )
    return paths


@pytest.mark.parametrize('loader', [LoadAnnotations, ShiftedLoader])
def test_of_kept_counts_a_few_annotations_are_read_and_others_each_time(tmp_path, decoded, loader, logged):
    root = make_labels(tmp_path / 'data', images=40)
    folder = tmp_path / 'a' / 'cache'
    first = count_classes(make(root, loader=loader()), cache_dir=folder)
    assert len(decoded) == 40
    del decoded[:]
    for _ in range(12):
        same(first, count_classes(make(root, loader=loader()), cache_dir=folder))
    assert len(decoded) == 12 * RECOUNTED
    assert len(set(decoded)) > 2 * RECOUNTED
    parts = [int(Path(path).stem) for path in sorted(decoded[:RECOUNTED])]
    assert len(set(parts)) == RECOUNTED
    assert {level for level, _ in logged} == {logging.INFO}
    for word in (
        'of 40 label files',
        f'counted {first.counted}',
        str(folder),
        'mmseg-imbalance cache --clear',
    ):
        assert word in logged[0][1]


CHANGES = {
    'classes': lambda dataset: (make(dataset, metainfo={'classes': NAMES[::-1]}), {}),
    'ignored label': lambda dataset: (make(dataset), {'ignore_index': 3}),
    'repeats': lambda dataset: (RepeatDataset(make(dataset), times=2), {}),
    'sample': lambda dataset: (make(dataset), {'max_images': 3}),
    'reduce_zero_label': lambda dataset: (make(dataset, reduce_zero_label=True), {}),
    'loader': lambda dataset: (make(dataset, loader=ShiftedLoader()), {}),
    'file': lambda dataset: (spoil(dataset, labels=[[True]]) and make(dataset), {}),
}


@pytest.mark.parametrize('change', CHANGES)
def test_a_cached_count_of_something_else_is_not_used(tmp_path, change):
    root = make_labels(tmp_path / 'data', values=(0, 1, 2, 3))
    count_classes(make(root), cache_dir=tmp_path / 'cache')
    dataset, options = CHANGES[change](root)
    want = count_classes(dataset, **options)
    for _ in range(2):
        same(count_classes(dataset, cache_dir=tmp_path / 'cache', **options), want)
    assert len(list((tmp_path / 'cache').iterdir())) == 2


def test_which_images_are_repeated_and_of_how_many_they_are_is_told_apart(tmp_path):
    """The files and the sum of the repeats are the same."""
    root, cache = make_labels(tmp_path / 'data'), tmp_path / 'cache'
    for times in ((2, 1), (1, 2)):
        parts = [
            dict(type='RepeatDataset', dataset=make(root, indices=[row]), times=number)
            for row, number in enumerate(times)
        ]
        same(count_classes(ConcatDataset(parts), cache_dir=cache), count_classes(ConcatDataset(parts)))
    sample = count_classes(make(root), max_images=3, cache_dir=cache)
    rows = [int(Path(key).stem) for key in sample.image_keys]
    assert count_classes(make(root, indices=rows), cache_dir=cache).dataset_images == 3


@pytest.mark.parametrize(
    'damage', ['cut', 'empty', 'garbage', 'flipped', 'other', 'renamed', 'columns', 'older', 'pickled']
)
def test_a_damaged_cache_is_counted_again_with_a_warning(root, tmp_path, warned, damage):
    first = count_classes(make(root), cache_dir=tmp_path / 'cache')
    (path,) = (tmp_path / 'cache').iterdir()
    data = bytearray(path.read_bytes())
    if damage == 'other':
        ClassFrequency.from_rows(['a'], [[1]], [0], ['x']).save(path)
    elif damage == 'renamed':
        replace(first, classes=NAMES[::-1]).save(path)
    elif damage == 'columns':
        replace(first, counts=first.counts[:, 1:]).save(path)
    elif damage == 'older':
        with np.load(path) as archive:
            kept = {n: archive[n] for n in archive.files if n not in ('ignored_counts', 'sources')}
        np.savez(path, **kept)
    elif damage == 'pickled':
        np.savez(path, classes=np.array([print], dtype=object))
    else:
        data[len(data) // 3] ^= 0xFF
        half = bytes(data[: len(data) // 2])
        path.write_bytes({'cut': half, 'empty': b'', 'garbage': b'PK12'}.get(damage, bytes(data)))
    same(first, count_classes(make(root), cache_dir=tmp_path / 'cache'))
    assert len(warned()) == 1
    assert 'counting again' in warned()[0]
    assert ('older version' in warned()[0]) == (damage == 'older')
    same(first, count_classes(make(root), cache_dir=tmp_path / 'cache'))
    assert len(warned()) == 1


def test_a_cache_that_cannot_be_written_costs_a_warning_only(root, tmp_path, warned):
    (tmp_path / 'file').touch()
    same(count_classes(make(root)), count_classes(make(root), cache_dir=tmp_path / 'file'))
    assert 'not cached' in warned()[0]


def test_the_default_cache_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv('MMSEG_IMBALANCE_CACHE', str(tmp_path / 'folder'))
    assert default_cache_dir() == tmp_path / 'folder'
    monkeypatch.setenv('HOME', '/home/somebody')
    monkeypatch.setenv('MMSEG_IMBALANCE_CACHE', '~/counts')
    assert default_cache_dir() == Path('/home/somebody/counts')
    monkeypatch.delenv('MMSEG_IMBALANCE_CACHE')
    assert default_cache_dir() == Path('/home/somebody/.cache/mmseg_imbalance')


def test_killed_while_writing_the_next_run_finds_no_half_written_cache(root, tmp_path):
    folder = tmp_path / 'cache'

    def die(file, **_):
        file.write(b'half')
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def work():
        np.savez = die
        count_classes(make(root), cache_dir=folder)

    process = in_process(work)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.suffix for path in folder.iterdir()] == ['.tmp']
    same(count_classes(make(root)), count_classes(make(root), cache_dir=folder))


def test_two_runs_share_one_cache_folder(root, tmp_path, warned):
    want = count_classes(make(root))

    def work():
        for number in range(8):
            same(want, count_classes(make(root), cache_dir=tmp_path / str(number)))
        if warned():
            raise RuntimeError(warned())

    processes = [in_process(work) for _ in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    for number in range(8):
        assert [path.suffix for path in (tmp_path / str(number)).iterdir()] == ['.npz']


def test_two_runs_that_make_room_in_one_folder_do_not_disturb_each_other(root, tmp_path, warned, monkeypatch):
    monkeypatch.setattr(count_cache, 'MAX_FILES', 1)
    wanted = {indices: count_classes(make(root, indices=indices)) for indices in (2, 3, 4)}

    def work():
        for _ in range(6):
            for indices, want in wanted.items():
                same(want, count_classes(make(root, indices=indices), cache_dir=tmp_path / 'cache'))
        if warned():
            raise RuntimeError(warned())

    processes = [in_process(work) for _ in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


# What is edited


LOADER = """
from mmseg.datasets.transforms import LoadAnnotations
import {tables}

TABLE = {{0: 0, 1: 1, 2: 2, 3: 3, 255: 255}}

def shift(labels):
    return labels + 0

class Base(LoadAnnotations):
    offset = 0

    def moved(self, label):
        return label

class Loader(Base):
    def _load_seg_map(self, results):
        super()._load_seg_map(results)
        labels = shift(results['gt_seg_map'])
        new = labels.copy()
        for old in {{0, 1, 2, 3}}:
            moved = self.moved({tables}.MORE[TABLE[old]] + self.offset)
            new[labels == old] = moved
        results['gt_seg_map'] = new
"""
MORE = 'MORE = {0: 0, 1: 1, 2: 2, 3: 3}'
EDITS = {
    'table of the module': ('loaders', '2: 2', '2: 1'),
    'table of an imported module': ('tables', '2: 2', '2: 1'),
    'base class': ('loaders', 'return label\n', 'return min(label, 2)\n'),
    'class attribute': ('loaders', 'offset = 0', 'offset = 1'),
    'function of the module': ('loaders', 'labels + 0', 'labels * (labels != 2)'),
}
COUNT = """
import sys
sys.path[:0] = {path}
import numpy as np
from label_sets import make
from {loaders} import Loader
from mmseg_imbalance.counting import count_classes
frequency = count_classes(make({root!r}, loader=Loader()), cache_dir={cache!r})
print('pixels', frequency.pixels.tolist())
"""


def in_new_process(code, **environment):
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, '-c', code],
        env=os.environ | dict(PYTHONPATH=path) | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f'{done.returncode} {done.stderr}'
    return done.stdout + done.stderr


@pytest.mark.parametrize('edit', EDITS)
def test_an_edit_of_what_a_loader_refers_to_is_noticed(tmp_path, monkeypatch, decoded, edit):
    import importlib

    root = make_labels(tmp_path / 'data', images=20, values=(0, 1, 2, 3))
    monkeypatch.syspath_prepend(tmp_path)
    name = re.sub(r'\W', '_', edit)
    names = {'loaders': f'loaders_{name}', 'tables': f'tables_{name}'}
    files = {'loaders': LOADER.format(tables=names['tables']), 'tables': MORE}

    def count():
        for kind, text in files.items():
            (tmp_path / f'{names[kind]}.py').write_text(text)
            sys.modules.pop(names[kind], None)
        importlib.invalidate_caches()
        monkeypatch.setattr(sys, 'dont_write_bytecode', True)
        count_cache.fingerprint.__globals__['_is_own'].cache_clear()
        loader = importlib.import_module(names['loaders']).Loader()
        del decoded[:]
        frequency = count_classes(make(root, loader=loader), cache_dir=tmp_path / 'cache')
        return frequency.pixels.tolist(), len(decoded)

    before, read = count()
    assert read == 20
    assert count() == (before, RECOUNTED)
    kind, old, new = EDITS[edit]
    assert old in files[kind]
    files[kind] = files[kind].replace(old, new)
    after, read = count()
    assert read == 20
    assert after != before
    assert count() == (after, RECOUNTED)


@pytest.mark.slow
def test_other_processes_find_what_one_has_counted(tmp_path):
    root = make_labels(tmp_path / 'data', values=(0, 1, 2, 3))
    (tmp_path / 'loaders.py').write_text(LOADER.format(tables='tables'))
    (tmp_path / 'tables.py').write_text(MORE)
    code = COUNT.format(
        path=[str(tmp_path)], loaders='loaders', root=str(root), cache=str(tmp_path / 'cache')
    )
    first, second = [in_new_process(code, PYTHONHASHSEED=str(seed)) for seed in range(2)]
    assert 'are taken from' not in first
    assert 'are taken from' in second
    assert len(cached_counts(tmp_path / 'cache')) == 1


class InOneFile(BaseStorageBackend):
    """Files in an archive, as LmdbBackend has them in a database; `db_path` is it or its folder."""

    def __init__(self, db_path, token):
        self.path = Path(db_path, 'data.mdb') if os.path.isdir(db_path) else db_path

    def get(self, filepath):
        with zipfile.ZipFile(self.path) as archive:
            return archive.read(filepath.rpartition('/')[2])

    def get_text(self, filepath, encoding='utf-8'):
        return self.get(filepath).decode(encoding)


@pytest.mark.parametrize('of_folder', [False, True])
def test_a_database_that_was_written_anew_is_counted_again(root, tmp_path, monkeypatch, of_folder):
    monkeypatch.setitem(backends, 'in_one_file', InOneFile)
    data = tmp_path / 'database' / 'data.mdb'
    data.parent.mkdir()
    where = dict(backend='in_one_file', token='t' * 300, db_path=str(data.parent if of_folder else data))
    found = []
    for value in (0, 1):
        with zipfile.ZipFile(data, 'w') as archive:
            for path in (root / 'ann').iterdir():
                Image.fromarray(np.full((37, 53), value, np.uint8)).save(buffer := io.BytesIO(), 'png')
                archive.writestr(path.name, buffer.getvalue())
        os.utime(data, (10**9, 10**9 + value))
        dataset = make(root, loader=LoadAnnotations(backend_args=where))
        found.append(count_classes(dataset, cache_dir=tmp_path / 'cache').pixels[value])
    assert found == [7 * 37 * 53] * 2
    assert len(list((tmp_path / 'cache').glob('*.npz'))) == 2  # not found out by looking at a few images


def test_what_no_fingerprint_sees_is_seen_in_a_few_images(root, tmp_path, warned, decoded):
    path = root / 'ann' / '3.png'
    for labels in (np.zeros((37, 53), np.uint8), np.ones((37, 53), np.uint8)):
        Image.fromarray(labels).save(path, compress_level=0)  # of one size
        os.utime(path, (10**9, 10**9))
        frequency = count_classes(make(root), cache_dir=tmp_path / 'cache')
    same(frequency, count_classes(make(root)))
    assert len(warned()) == 1
    assert 'are stale: 1 of 7 images' in warned()[0]
    assert '3.png' in warned()[0]
    same(frequency, count_classes(make(root), cache_dir=tmp_path / 'cache'))
    assert len(warned()) == 1


def test_a_file_of_the_same_size_and_another_time_is_another(root, tmp_path, warned):
    path = root / 'ann' / '3.png'
    for label in (0, 1):
        Image.fromarray(np.full((37, 53), label, np.uint8)).save(path, compress_level=0)
        os.utime(path, (10**9, 10**9 + label))
        same(count_classes(make(root), cache_dir=tmp_path / 'cache'), count_classes(make(root)))
    assert warned() == []  # not found out by looking at a few images


def test_a_file_that_cannot_be_read_any_more_is_the_error_of_the_next_count(root, tmp_path):
    path = root / 'ann' / '3.png'
    stat = path.stat()
    count_classes(make(root), cache_dir=tmp_path / 'cache')
    path.write_bytes(b'x' * stat.st_size)
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    with pytest.raises(ValueError, match=r'3\.png: cannot be read'):
        count_classes(make(root), cache_dir=tmp_path / 'cache')


def test_a_loader_that_cannot_be_looked_into_is_counted_each_time(root, tmp_path, warned):
    class Shy:
        __slots__ = ('value',)

        @property
        def __dict__(self):
            raise RuntimeError('nothing to see here')

    loader = LoadAnnotations()
    loader.extra = Shy()
    same(count_classes(make(root, loader=loader), cache_dir=tmp_path / 'cache'), count_classes(make(root)))
    assert len(warned()) == 1
    assert 'cannot be looked into' in warned()[0]


class BesideImage(LoadAnnotations):
    """Finds the labels by the name of the image."""

    def _load_seg_map(self, results):
        path = results['img_path'].replace('img', 'ann').replace('.jpg', '.png')
        results['gt_seg_map'] = self.read(path)
        results.setdefault('seg_fields', []).append('gt_seg_map')

    def read(self, path):
        return np.array(Image.open(path))


class ByOpenCV(BesideImage):
    def read(self, path):
        return cv2.imread(path, cv2.IMREAD_UNCHANGED)


class ByCompiledCode(BesideImage):
    def read(self, path):
        file = os.open(path, os.O_RDONLY)
        with os.fdopen(file, 'rb') as opened:
            return np.array(Image.open(opened))


class Unlabelled(StreetDataset):
    """Names images alone, and more if it is told to."""

    extra = None

    def load_data_list(self):
        rows = super().load_data_list()
        for row in rows:
            label = row.pop('seg_map_path')
            if self.extra:
                row[self.extra] = label
        return rows


class Naming(Unlabelled):
    extra = 'mask'


class SecondMask(BaseTransform):
    """Ignores what a second mask beside the labels says."""

    def transform(self, results):
        labels = results['gt_seg_map']
        for key in ('mask_path', 'seg_map_path'):
            path = results.get(key, '').replace('/ann/', '/second/')
            if os.path.exists(path):
                labels = np.where(np.array(Image.open(path)) == 1, 255, labels)
        return {**results, 'gt_seg_map': labels}


class TwoMasks(StreetDataset):
    listed = False

    def load_data_list(self):
        rows = super().load_data_list()
        for row in rows:
            second = row['seg_map_path'].replace('/ann/', '/second/')
            row.update({'masks': [second, second]} if self.listed else {'mask_path': second})
        return rows


class ListedMasks(TwoMasks):
    listed = True


def second_masks(root, value):
    for number in (2, 3):
        path = root / 'second' / f'{number}.png'
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((37, 53), value, np.uint8)).save(path)


def change_labels(root):
    Image.fromarray(np.full((37, 53), 4, np.uint8)).save(root / 'ann' / '3.png')


UNNAMED = {
    'by the image': (Unlabelled, [BesideImage()], change_labels, False),
    'by the image, of data with labels': (StreetDataset, [BesideImage()], change_labels, True),
    'by OpenCV': (Unlabelled, [ByOpenCV()], change_labels, False),
    'by compiled code': (Unlabelled, [ByCompiledCode()], change_labels, False),
    'named': (Naming, [BesideImage()], change_labels, True),
    'second mask': (
        StreetDataset,
        [LoadAnnotations(), SecondMask()],
        lambda root: second_masks(root, 1),
        False,
    ),
    'second mask, named': (
        TwoMasks,
        [LoadAnnotations(), SecondMask()],
        lambda root: second_masks(root, 1),
        True,
    ),
    'second mask, in a list': (
        ListedMasks,
        [LoadAnnotations(), SecondMask()],
        lambda root: second_masks(root, 1),
        True,
    ),
}


@pytest.mark.parametrize('case', UNNAMED)
@pytest.mark.parametrize('workers', [0, 1])
def test_counts_from_files_that_nobody_names_are_not_kept(tmp_path, logged, case, workers):
    kind, pipeline, change, kept = UNNAMED[case]
    root = make_labels(tmp_path / 'data')
    second_masks(root, 0)

    def count(**options):
        dataset = kind(
            data_root=str(root),
            data_prefix=dict(img_path='img', seg_map_path='ann'),
            pipeline=pipeline,
        )
        return count_classes(dataset, num_workers=workers, **options)

    plain = open, io.open, cv2.imread
    for _ in range(2):
        count(cache_dir=tmp_path / 'cache')
    assert (open, io.open, cv2.imread) == plain
    assert len(logged) == 1 + (not kept)
    for level, message in logged:
        assert level == logging.INFO
        assert ('counted again and agree' if kept else 'class counts are not kept') in message
    change(root)
    same(count(cache_dir=tmp_path / 'cache'), count())
    assert len(cached_counts(tmp_path / 'cache')) == 2 * kept


def test_what_is_unusual_about_labels_is_said_of_kept_counts_too(root, tmp_path, warned):
    labels = np.array(Image.open(root / 'ann' / '3.png')).astype(np.uint16)
    labels[0, :4] = 65535
    Image.fromarray(labels).save(root / 'ann' / '3.png')
    for _ in range(3):
        count_classes(make(root), cache_dir=tmp_path / 'cache')
    messages = warned()
    assert len(messages) == 3
    assert messages[0] == messages[1] == messages[2]
    assert '65535 in the file is 255, ignored, for training' in messages[0]


# The folder


def test_the_names_of_the_files_come_from_no_data_set(tmp_path):
    outside = make_labels(tmp_path / 'data' / '..' / '..' / tmp_path.name / 'Straße und 道路')
    names = ('../../sky', '/etc/passwd', '道路', 'C:\\car', 'CON')
    both = [make(outside, BaseSegDataset, metainfo={'classes': names}) for _ in range(2)]
    dataset = ConcatDataset(both)
    cache = tmp_path / 'cache'
    frequency = count_classes(dataset, cache_dir=cache)
    same(frequency, count_classes(dataset, cache_dir=cache))
    assert frequency.classes == names
    assert [path.name for path in cache.iterdir()] == [path.path.name for path in cached_counts(cache)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ['Straße und 道路', 'cache', 'data']


def test_where_there_are_too_many_files_those_go_that_were_not_used_for_longest(root, tmp_path, monkeypatch):
    monkeypatch.setattr(count_cache, 'MAX_FILES', 3)
    cache = tmp_path / 'cache'

    def count(indices):
        count_classes(make(root, indices=indices), cache_dir=cache)
        return {path.path for path in cached_counts(cache)}

    (first,) = count(1)
    (second,) = count(2) - {first}
    (third,) = count(3) - {first, second}
    for age, path in enumerate((third, second, first)):
        os.utime(path, (10**9 - age, 10**9 - age))
    (cache / 'notes.txt').write_text('of somebody')
    killed = cache / f'{first.name}.{"a" * 32}.tmp'
    killed.write_bytes(b'half')
    count(1)  # used again
    now = count(4)
    assert now == {first, third, *(now - {first, second, third})}
    assert (cache / 'notes.txt').exists()
    assert killed.exists()  # another run may be writing it
    os.utime(killed, (10**9, 10**9))
    monkeypatch.setattr(count_cache, 'MAX_FILES', 200)
    monkeypatch.setattr(count_cache, 'MAX_BYTES', 1)
    assert len(count(5)) == 1
    assert not killed.exists()


def test_all_counts_are_cleared_and_nothing_else(root, tmp_path):
    cache = tmp_path / 'cache'
    for indices in (1, 2):
        count_classes(make(root, indices=indices), cache_dir=cache)
    (cache / 'class_frequency_notes.npz').touch()
    assert clear(cache) == 2
    assert [path.name for path in cache.iterdir()] == ['class_frequency_notes.npz']
    assert clear(cache) == clear(tmp_path / 'nowhere') == 0


@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_is_full_costs_a_warning_only(root, tmp_path, monkeypatch, warned, code):
    def fail(file, **_):
        file.write(b'half')
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(np, 'savez', fail)
    same(count_classes(make(root)), count_classes(make(root), cache_dir=tmp_path / 'cache'))
    assert len(warned()) == 1
    assert os.strerror(code) in warned()[0]
    assert not list((tmp_path / 'cache').iterdir())


@pytest.mark.parametrize('limit', [0, 1000, 10**6, 8 * 10**6 + 2000, 8_016_800])
def test_a_file_that_cannot_grow_costs_a_warning_only(tmp_path, warned, limit):
    frequency = ClassFrequency.from_rows(
        ['a', 'b'], np.ones((500_000, 2)), np.zeros(500_000), ['x'] * 500_000
    )

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        store_counts(frequency, tmp_path / 'cache' / 'counts.npz')
        (message,) = warned()
        if 'cannot be written: [Errno 27] File too large' not in message:
            raise RuntimeError(message)

    process = in_process(work)
    process.join()
    assert process.exitcode == 0
    assert not list((tmp_path / 'cache').iterdir())


def test_without_a_home_folder_counts_are_not_kept(root, monkeypatch, warned):
    def nowhere():
        raise RuntimeError('Could not determine home directory.')

    monkeypatch.delenv('MMSEG_IMBALANCE_CACHE')
    monkeypatch.setattr(Path, 'home', nowhere)
    with pytest.raises(RuntimeError, match='Set MMSEG_IMBALANCE_CACHE'):
        default_cache_dir()
    same(training_frequency(make(root), progress=False), count_classes(make(root)))
    assert len(warned()) == 1
    assert 'no home folder' in warned()[0]


KILLED = """
import os, signal, sys
from mmseg_imbalance.counting import count_classes, rows
from label_sets import make
count = rows.count_pixels
seen = []
def until_killed(annotation, *args):
    seen.append(annotation)
    if len(seen) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return count(annotation, *args)
rows.count_pixels = until_killed
count_classes(make({root!r}), cache_dir={cache!r})
"""


@pytest.mark.slow
def test_killed_while_counting_the_next_run_counts_the_same(tmp_path):
    root = make_labels(tmp_path / 'data', images=30)
    cache = tmp_path / 'cache'
    with pytest.raises(AssertionError, match='-9'):
        in_new_process(KILLED.format(root=str(root), cache=str(cache)))
    assert not cache.exists()
    want = count_classes(make(root))
    for _ in range(2):
        same(count_classes(make(root), cache_dir=cache), want)
    assert len(cached_counts(cache)) == 1
