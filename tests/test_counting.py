"""Counts equal a slow loop through the real pipeline, or there is one clear error."""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from label_sets import (
    NAMES,
    ShiftedLoader,
    StreetDataset,
    dataset_rows,
    make,
    make_labels,
    mosaic,
    numbers,
    same,
    spoil,
)
from mmengine import fileio
from mmengine.config import Config
from mmengine.dataset import ClassBalancedDataset, ConcatDataset, RepeatDataset
from mmengine.logging import MessageHub
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image
from ranks import in_process
from torch.utils.data import DataLoader

from mmseg_imbalance.counting import (
    count_classes,
    counts,
    rows,
    training_frequency,
)
from mmseg_imbalance.frequency import ClassFrequency

CAMVID = Path(__file__).resolve().parents[2] / 'shared' / 'camvid'


@fileio.register_backend('mmseg_imbalance_test')
class PrefixBackend(fileio.BaseStorageBackend):
    """Files of another place than their paths say."""

    def __init__(self, root):
        self.root = root

    def get(self, filepath):
        return Path(self.root, os.path.basename(filepath)).read_bytes()

    def get_text(self, filepath, encoding='utf-8'):
        raise NotImplementedError


def slow_count(dataset, classes, ignore_index=255):
    """(pixels, images, image_pixels, ignored) by walking through what training would load."""
    pixels, images, image_pixels = ([0] * len(classes) for _ in range(3))
    ignored = 0
    for index in range(len(dataset)):
        labels = dataset[index]['gt_seg_map']
        for value, count in zip(*np.unique(labels, return_counts=True), strict=True):
            if value == ignore_index:
                ignored += int(count)
            else:
                pixels[value] += int(count)
                images[value] += 1
                image_pixels[value] += labels.size
    return pixels, images, image_pixels, ignored


@pytest.fixture
def root(tmp_path):
    return make_labels(tmp_path / 'data')


CASES = {
    'plain': lambda root: make(root),
    'lazy': lambda root: make(root, lazy_init=True),
    'reduce_zero_label': lambda root: make(root, reduce_zero_label=True),
    'label_map': lambda root: make(root, metainfo={'classes': ('car', 'sky')}),
    'label_map reordered': lambda root: make(root, metainfo={'classes': NAMES[::-1]}),
    'ann_file': lambda root: make(root, ann_file='list.txt'),
    'indices': lambda root: make(root, indices=[5, 1]),
    'concat': lambda root: ConcatDataset([make(root), make(root, indices=3)]),
    'concat of two foldings': lambda root: ConcatDataset(
        [make(root), make(root, reduce_zero_label=True)], ignore_keys=['reduce_zero_label']
    ),
    'repeat': lambda root: RepeatDataset(make(root), times=3),
    'class balanced': lambda root: ClassBalancedDataset(make(root), oversample_thr=0.9),
    'mosaic': lambda root: mosaic(make(root, metainfo={'classes': ('car', 'sky')})),
    'own loader': lambda root: make(root, loader=ShiftedLoader()),
    'cv2': lambda root: make(root, loader=LoadAnnotations(imdecode_backend='cv2')),
    'local backend': lambda root: make(root, loader=LoadAnnotations(backend_args={'backend': 'local'})),
    'own backend': lambda root: make(
        root.parent / 'elsewhere',
        ann_file=str(root / 'list.txt'),
        loader=LoadAnnotations(backend_args={'backend': 'mmseg_imbalance_test', 'root': str(root / 'ann')}),
    ),
}


@pytest.mark.parametrize('case', CASES)
def test_equals_a_slow_loop_through_the_pipeline(root, case):
    (root / 'list.txt').write_text('1\n4\n')
    dataset = CASES[case](root)
    frequency = count_classes(CASES[case](root))
    assert frequency.classes == tuple(dataset.metainfo['classes'])
    assert numbers(frequency) == slow_count(dataset, frequency.classes)
    assert frequency.num_images == frequency.dataset_images == len(dataset)
    assert (frequency.repeats @ frequency.counts).tolist() == frequency.pixels.tolist()
    assert len(frequency.image_keys) == len(frequency.counts) == len(frequency.repeats)
    assert frequency.share.sum() == pytest.approx(1)


@pytest.mark.parametrize('case', CASES)
def test_every_index_finds_its_row_of_counts(root, case):
    (root / 'list.txt').write_text('1\n4\n')
    dataset = CASES[case](root)
    counts = count_classes(dataset).counts[dataset_rows(dataset)]
    assert len(counts) == len(dataset)
    for index, row in enumerate(counts):
        labels = dataset[index]['gt_seg_map']
        assert row.tolist() == [(labels == c).sum() for c in range(len(row))]


def test_wrappers_nest(root):
    def nested():
        scope = {'type': 'ConcatDataset', 'datasets': [make(root, indices=[2]), make(root)]}
        return RepeatDataset({'type': 'RepeatDataset', 'dataset': scope, 'times': 2}, times=3)

    frequency = count_classes(nested())
    assert numbers(frequency) == slow_count(nested(), NAMES)
    assert frequency.num_images == 48


def test_counting_leaves_the_data_set_as_it_was(root):
    dataset = make(root)
    count_classes(dataset)
    assert dataset.pipeline.transforms[0].reduce_zero_label is None


def test_workers_count_the_same_and_training_draws_the_same_random_numbers(root):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one, two = count_classes(make(root)), count_classes(make(root), num_workers=2, progress=True)
    assert numbers(one) == numbers(two)
    assert one.counts.tolist() == two.counts.tolist()
    assert torch.equal(before, torch.random.get_rng_state())


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def ended():
    os._exit(3)


@pytest.mark.parametrize('work', [killed, ended])
def test_where_workers_die_this_process_counts_the_rest(tmp_path, monkeypatch, warned, work):
    root = make_labels(tmp_path / 'data', images=40)
    want = count_classes(make(root))
    count_pixels, in_workers = rows.count_pixels, []

    def count(annotation, *args):
        if torch.utils.data.get_worker_info() is not None:
            in_workers.append(annotation)
            if len(in_workers) == 5:
                work()
        return count_pixels(annotation, *args)

    monkeypatch.setattr(rows, 'count_pixels', count)
    for workers in (1, 2):
        same(count_classes(make(root), num_workers=workers), want)
    assert len(warned) == 2
    assert '2 worker processes cannot count classes (RuntimeError' in warned[1]
    assert 'num_workers=0' in warned[1]


def test_where_workers_cannot_start_this_process_counts(root, monkeypatch, warned):
    def refuse(self):
        raise OSError(12, 'Cannot allocate memory')

    monkeypatch.setattr(multiprocessing.Process, 'start', refuse)
    want = count_classes(make(root))
    same(count_classes(make(root), num_workers=2), want)
    assert len(warned) == 1
    assert 'cannot count classes (OSError: [Errno 12] Cannot allocate memory)' in warned[0]


def test_a_loader_that_no_process_can_be_given_is_used_in_this_one(root, monkeypatch, warned):
    class Local(LoadAnnotations):
        """Of a function, so it cannot be pickled for a process that starts anew."""

    monkeypatch.setattr(rows, 'DataLoader', partial(DataLoader, multiprocessing_context='spawn'))
    same(count_classes(make(root, loader=Local()), num_workers=2), count_classes(make(root)))
    assert len(warned) == 1
    assert '2 worker processes cannot count classes' in warned[0]
    assert 'Local' in warned[0]


SCRIPT = """
import multiprocessing
multiprocessing.set_start_method('spawn')
from label_sets import make
from mmseg_imbalance.counting import count_classes
print('pixels', count_classes(make({root!r}), num_workers=1).pixels.tolist())
"""


@pytest.mark.slow
def test_a_script_without_a_main_guard_counts_although_its_workers_cannot_start(root, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT.format(root=str(root)))
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ | dict(PYTHONPATH=path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('pixels') == 1
    assert f'pixels {count_classes(make(root)).pixels.tolist()}' in done.stdout
    assert 'worker processes cannot count classes' in done.stdout + done.stderr


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'num_workers': -1}, 'num_workers must be a whole number, at least 0, got -1'),
        ({'num_workers': 2.0}, 'num_workers must be a whole number, at least 0, got 2.0'),
        ({'max_images': True}, 'max_images must be a whole number, at least 1, got True'),
    ],
)
def test_numbers_that_cannot_be_are_refused(root, options, words):
    with pytest.raises(ValueError, match=words):
        count_classes(make(root), **options)


@pytest.mark.parametrize('workers', [0, 3])
def test_workers_are_by_default_those_of_the_train_dataloader(labels, tmp_path, monkeypatch, workers):
    used = []
    count_part = counts.count_rows

    def count(counted, part, num_workers, show):
        used.append(num_workers)
        return count_part(counted, part, 0, show)

    monkeypatch.setattr(counts, 'count_rows', count)
    cfg = config(labels)
    cfg.train_dataloader.num_workers = workers
    loader = SimpleNamespace(dataset=make(labels), num_workers=workers)
    runner = SimpleNamespace(train_dataloader=loader, model=dict(decode_head=HEAD), cfg=cfg)
    for number, (source, given, expected) in enumerate(
        [(cfg, None, workers), (cfg, 1, 1), (runner, None, workers), (runner, 1, 1)]
    ):
        training_frequency(source, num_workers=given, cache_dir=tmp_path / str(number), progress=False)
        assert used[-1] == expected
    for method, expected in (('fork', 2), ('spawn', 0), ('forkserver', 0)):
        monkeypatch.setattr(multiprocessing, 'get_start_method', lambda method=method, **_: method)
        training_frequency(make(labels), cache_dir=tmp_path / method, progress=False)
        assert used[-1] == expected


def test_a_sample_is_the_same_every_time_and_each_image_once(root):
    dataset = RepeatDataset(make(root), times=2)
    first, again = (count_classes(dataset, max_images=4) for _ in range(2))
    assert first.image_keys == again.image_keys == tuple(sorted(set(first.image_keys)))
    assert (len(first.image_keys), first.num_images, first.dataset_images) == (4, 8, 14)
    chosen = [int(Path(key).stem) for key in first.image_keys]
    assert numbers(first) == slow_count(RepeatDataset(make(root, indices=chosen), 2), NAMES)
    assert count_classes(dataset, max_images=70).num_images == 14


@pytest.mark.parametrize('mode', ['bilevel', 'palette', '16 bit'])
def test_other_one_channel_png_modes_count_as_loaded(root, mode):
    labels = np.random.default_rng(0).integers(0, 2, (31, 17)).astype(np.uint8)
    image = Image.fromarray(labels)
    if mode == 'bilevel':
        image = Image.fromarray(labels.astype(bool))
    elif mode == 'palette':
        image.putpalette([9, 9, 9, 200, 0, 0])
    else:
        image = Image.fromarray(labels.astype(np.uint16))
    for path in (root / 'ann').iterdir():
        image.save(path)
    assert numbers(count_classes(make(root))) == slow_count(make(root), NAMES)


def test_camvid_equals_its_published_counts():
    if not CAMVID.is_dir():
        pytest.skip(f'CamVid is not at {CAMVID}')
    names = [f'class {number}' for number in range(11)]
    dataset = BaseSegDataset(
        data_root=str(CAMVID),
        data_prefix={'img_path': 'images/train', 'seg_map_path': 'annotations/train'},
        metainfo={'classes': names},
        ignore_index=11,
        pipeline=[LoadAnnotations()],
    )
    published = '10682767 14750079 623349 20076880 2845085 6166762 743859 714595 3719877 405385 184967'
    frequency = count_classes(dataset, num_workers=2)
    assert frequency.pixels.tolist() == [int(number) for number in published.split()]
    assert (frequency.ignored, frequency.num_images) == (2503995, 367)
    dataset.ignore_index = 255
    with pytest.raises(ValueError, match=r'11 -> 11: \d+ pixels.*ignore_index 255'):
        count_classes(dataset)
    assert numbers(count_classes(dataset, ignore_index=11)) == numbers(frequency)


# Errors


def test_a_label_out_of_range_is_named_with_its_pixels_and_usual_causes(root):
    labels = np.zeros((6, 7), np.uint8)
    labels[0, :3], labels[1] = 26, 33
    path = spoil(root, labels=labels)
    for workers in (0, 2):
        with pytest.raises(ValueError, match='out of range') as caught:
            count_classes(make(root), num_workers=workers)
        message = str(caught.value)
        for part in (str(path), '26 -> 26: 3 pixels', '33 -> 33: 7 pixels', '0 to 4', '255'):
            assert part in message
        for cause in ('reduce_zero_label', 'labelIds', 'metainfo'):
            assert cause in message


def test_reduce_zero_label_shows_value_and_label(root):
    spoil(root, labels=np.full((2, 3), 6, np.uint8))
    with pytest.raises(ValueError, match=r'6 -> 5: 6 pixels.*reduce_zero_label is True'):
        count_classes(make(root, reduce_zero_label=True))


def test_an_own_loader_out_of_range_is_an_error(root):
    spoil(root, labels=np.full((2, 3), 4, np.uint8))
    with pytest.raises(ValueError, match='5 -> 5: 6 pixels'):
        count_classes(make(root, loader=ShiftedLoader()))


def test_colours_are_refused(root):
    spoil(root, labels=np.zeros((5, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r'3\.png: shape \(5, 4, 3\).*one channel'):
        count_classes(make(root))


@pytest.mark.parametrize('backend', ['pillow', 'cv2'])
@pytest.mark.parametrize('kind', ['empty', 'text', 'cut', 'folder'])
def test_an_unreadable_file_is_named(root, kind, backend):
    whole = np.random.default_rng(0).integers(0, 4, (90, 90)).astype(np.uint8)
    path = spoil(root, labels=whole)
    data = path.read_bytes()
    path.write_bytes({'empty': b'', 'text': b'labels', 'cut': data[: len(data) // 2]}.get(kind, b''))
    if kind == 'folder':
        path.unlink()
        path.mkdir()
    with pytest.raises(ValueError, match=f'{path}: cannot be read'):
        count_classes(make(root, loader=LoadAnnotations(imdecode_backend=backend)))


def test_a_missing_file_is_named_and_it_is_the_first_one(root):
    for name in ('5.png', '2.png'):
        spoil(root, name=name)
    for loader in (LoadAnnotations(), ShiftedLoader()):
        for workers in (0, 2):
            with pytest.raises(FileNotFoundError, match=r'2\.png: no such annotation file'):
                count_classes(make(root, loader=loader), num_workers=workers)


def test_what_cannot_be_counted_says_why(root):
    for serialize in (True, False):
        empty = make(root, img_suffix='.tif', lazy_init=True, serialize_data=serialize)
        with pytest.raises(ValueError, match=r'holds no image.*Check data_root'):
            count_classes(empty)
    with pytest.raises(ValueError, match='loads no annotations'):
        count_classes(StreetDataset(data_root=str(root), data_prefix={'img_path': 'img'}))
    with pytest.raises(ValueError, match='has no annotation'):
        count_classes(
            StreetDataset(
                data_root=str(root),
                data_prefix={'img_path': 'img'},
                pipeline=[LoadAnnotations()],
            )
        )
    with pytest.raises(ValueError, match='there must be names'):
        count_classes(make(root, kind=BaseSegDataset))
    with pytest.raises(ValueError, match='max_images must be a whole number, at least 1, got 0'):
        count_classes(make(root), max_images=0)


# What hooks, sampler, metric and command share


def config(root, model=None, ignore_index=4, **options):
    """The config of a run. The labels are 0 to 4; the data set ignores 4, a head that says nothing too."""
    dataset = dict(
        type='mmseg.BaseSegDataset',
        data_root=str(root),
        data_prefix=dict(img_path='img', seg_map_path='ann'),
        metainfo=dict(classes=NAMES),
        ignore_index=ignore_index,
        pipeline=[dict(type='mmseg.LoadAnnotations')],
    )
    return Config(dict(train_dataloader=dict(dataset=dataset), model=model, **options))


@pytest.fixture
def labels(tmp_path):
    return make_labels(tmp_path / 'data', values=(0, 1, 2, 3, 4))


HEAD = dict(type='FCNHead')
MODELS = {  # model, what the data set says, what is ignored
    'no model': (None, 4, 4),
    'no head': (dict(type='Segmentor'), 4, 4),
    'head that says nothing': (dict(decode_head=HEAD), 4, 4),
    'nobody says anything': (dict(decode_head=HEAD), 255, 255),
    'head': (dict(decode_head=HEAD | dict(ignore_index=3)), 255, 3),
    'auxiliary head': (dict(decode_head=HEAD, auxiliary_head=HEAD | dict(ignore_index=3)), 255, 255),
    'last head': (dict(decode_head=[HEAD, HEAD | dict(ignore_index=3)]), 255, 3),
    'wrapped': (dict(module=dict(module=dict(decode_head=HEAD | dict(ignore_index=3)))), 255, 3),
}


@pytest.mark.parametrize('case', MODELS)
def test_the_ignored_label_is_what_data_set_or_decode_head_say(labels, tmp_path, case):
    model, said, ignored = MODELS[case]
    cfg = config(labels, model, ignore_index=said)
    frequency = training_frequency(cfg, cache_dir=tmp_path / 'cache', progress=False)
    assert numbers(frequency) == numbers(count_classes(make(labels), ignore_index=ignored))


def test_names_in_a_config_are_those_of_its_scope_or_of_mmsegmentation(labels, tmp_path):
    cfg = config(labels)
    cfg.train_dataloader.dataset.type = 'BaseSegDataset'
    with DefaultScope.overwrite_default_scope('mmengine'):  # as where no run has set its own
        frequency = training_frequency(cfg, cache_dir=tmp_path / 'cache', progress=False)
    assert numbers(frequency) == numbers(count_classes(make(labels), ignore_index=4))


def test_data_set_and_head_that_say_different_labels_are_refused(labels, tmp_path):
    cfg = config(labels, dict(decode_head=HEAD | dict(ignore_index=3)))
    with pytest.raises(ValueError, match='ignore_index=4 of BaseSegDataset and ignore_index=3 of FCNHead'):
        training_frequency(cfg, cache_dir=tmp_path / 'cache')


@pytest.mark.parametrize(
    ('ignored', 'expected'), [((3, 3), 3), ((3, 255), 3), ((255,), 255), ((None,), 255), ((), 255)]
)
def test_heads_that_are_given_say_it(labels, tmp_path, ignored, expected):
    heads = [torch.nn.Module() for _ in ignored]
    for head, label in zip(heads, ignored, strict=True):
        head.ignore_index = label
    cfg = config(labels, ignore_index=255)
    frequency = training_frequency(cfg, heads=heads, cache_dir=tmp_path / 'cache')
    assert numbers(frequency) == numbers(count_classes(make(labels), ignore_index=expected))


def test_of_a_runner_the_data_set_in_training_and_its_model_are_taken(labels, tmp_path):
    model = torch.nn.Module()
    model.decode_head = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
    model.decode_head[0].ignore_index, model.decode_head[1].ignore_index = 255, 3
    wrapper = torch.nn.Module()
    wrapper.module = model
    hooks = [dict(type='ClassWeightHook', cache_dir=str(tmp_path / 'cache'))]
    runner = SimpleNamespace(
        train_dataloader=SimpleNamespace(dataset=make(labels, indices=4)),
        model=wrapper,
        cfg=config('/nowhere', custom_hooks=hooks),
    )
    same(training_frequency(runner), count_classes(make(labels, indices=4), ignore_index=3))
    assert len(list((tmp_path / 'cache').iterdir())) == 1


def test_of_a_data_set_neither_model_nor_config_is_known(labels, tmp_path):
    frequency = training_frequency(make(labels, ignore_index=4), cache_dir=tmp_path / 'cache')
    same(frequency, count_classes(make(labels), ignore_index=4))


def test_the_cache_folder_is_the_argument_else_the_hooks_else_the_users(labels, tmp_path, monkeypatch):
    monkeypatch.setenv('MMSEG_IMBALANCE_CACHE', str(tmp_path / 'user'))
    hook = dict(type='mmseg_imbalance.ClassWeightHook', cache_dir=str(tmp_path / 'hook'))
    others = [dict(type='EMAHook'), dict(type='ClassWeightHook')]
    for folder, hooks, cache_dir in (
        ('argument', [hook], tmp_path / 'argument'),
        ('hook', [others[0], hook], None),
        ('user', others, None),
    ):
        assert not (tmp_path / folder).exists()
        training_frequency(config(labels, custom_hooks=hooks), cache_dir=cache_dir, progress=False)
        assert len(list((tmp_path / folder).iterdir())) == 1


def test_without_training_data_it_says_what_is_missing(monkeypatch):
    with pytest.raises(ValueError, match='no train_dataloader; add one'):
        training_frequency(Config(dict(model=None)))
    with pytest.raises(FileNotFoundError, match='/nowhere'):
        training_frequency(config('/nowhere'))
    monkeypatch.setattr(MessageHub, 'get_info', lambda *_: None)
    with pytest.raises(ValueError, match='there is no runner'):
        training_frequency()


def test_sampler_hooks_metric_and_command_share_one_file_of_counts(
    small_config, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / 'counts'
    monkeypatch.setenv('MMSEG_IMBALANCE_CACHE', str(folder))
    cfg = small_config('segformer/segformer_mit-b0-small-combined-rcs_1xb8-2k_camvid-240x180')
    cfg.val_evaluator = cfg.test_evaluator = dict(type='ImbalanceIoUMetric')
    cfg.custom_hooks = [dict(type='ClassWeightHook'), dict(type='LogitAdjustmentHook')]
    users = []
    for user in ('samplers', 'hooks', 'decisions', 'metrics'):
        monkeypatch.setattr(
            f'mmseg_imbalance.{user}.training_frequency',
            lambda *args, user=user, **options: (users.append(user), training_frequency(*args, **options))[1],
        )
    runner = Runner.from_cfg(cfg)
    runner.train()
    runner.test()
    assert users == ['samplers', 'hooks', 'metrics', 'decisions', 'metrics']
    cfg.dump(tmp_path / 'config.py')
    monkeypatch.setattr('sys.argv', ['class_weights.py', str(tmp_path / 'config.py')])
    with suppress(SystemExit):  # with its exit status
        runpy.run_path(str(Path(__file__).parents[1] / 'tools' / 'class_weights.py'), run_name='__main__')
    assert 'sqrt_inv_freq' in capsys.readouterr().out
    assert len(list(folder.iterdir())) == 1


# Ranks


def on_rank(rank, port, root, folder, results):
    torch.distributed.init_process_group(
        'gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2
    )
    for options in ({}, {'cache_dir': folder}, {'cache_dir': folder, 'num_workers': 1}):
        count_classes(make(root), **options).save(f'{results}/{len(options)}-{rank}.npz')
    spoilt = Path(root).parent / 'spoilt'  # ranks count alternate images: rank 1 meets the bad one
    failing = {
        'framework': make(spoilt),
        'own': make(spoilt, loader=ShiftedLoader()),
        'masks': make(Path(root).parent / 'masks'),
        'differ': make(root, indices=3 + rank),
        'empty': make(root, lazy_init=True, img_suffix='.tif' if rank else '.jpg'),
    }
    for name, dataset in failing.items():
        try:
            count_classes(dataset)
            message = 'counted'
        except ValueError as error:
            message = str(error)
        Path(results, f'{name}-{rank}.txt').write_text(message)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one_process_and_fail_together(root, tmp_path):
    spoil(make_labels(tmp_path / 'spoilt'), labels=np.full((3, 3), 77, np.uint8))
    make_labels(tmp_path / 'masks', values=(0, 255, 255))
    results = tmp_path / 'results'
    results.mkdir()
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    processes = [
        in_process(lambda rank=rank: on_rank(rank, port, root, tmp_path / 'cache', results))
        for rank in range(2)
    ]
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    want = count_classes(make(root))
    for path in results.glob('*.npz'):
        same(ClassFrequency.load(path), want)
    assert len(list(results.glob('*.npz'))) == 6

    def messages(name):
        return {(results / f'{name}-{rank}.txt').read_text() for rank in range(2)}

    for name in ('framework', 'own'):
        (message,) = messages(name)
        assert '3.png: labels out of range' in message
    (message,) = messages('masks')
    assert 'Masks of 0 and 255' in message
    assert all('not all ranks see the same' in message for message in messages('differ'))
    (message,) = messages('empty')
    assert 'holds no image' in message
