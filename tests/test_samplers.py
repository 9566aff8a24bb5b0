"""Draws follow the formula, on any number of ranks and after a resume; crops hold the class if a try does."""

import copy
import itertools
import math
import pickle
import re
import shutil
import tracemalloc
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from conftest import REPOSITORY
from mmcv.transforms import LoadImageFromFile
from mmcv.transforms.utils import cache_random_params
from mmengine.dataset import ClassBalancedDataset, ConcatDataset, RepeatDataset, pseudo_collate
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.registry import DATA_SAMPLERS, LOOPS, init_default_scope
from mmengine.runner import IterBasedTrainLoop, Runner
from mmseg.datasets import BaseSegDataset, MultiImageMixDataset
from mmseg.datasets.transforms import LoadAnnotations, RandomCrop
from mmseg.registry import TRANSFORMS
from PIL import Image
from ranks import on_ranks
from scipy.stats import binomtest, chisquare
from torch.utils.data import DataLoader

from mmseg_imbalance import samplers as module
from mmseg_imbalance.samplers import DrawnIndex, RareClassCrop, RareClassSampler, least_pixels

CONFIG = 'segformer/segformer_mit-b0-small-combined-rcs_1xb8-2k_camvid-240x180'
SIZE = (24, 32)
CLASSES = ('road', 'house', 'car', 'pole', 'bike')
SHARES = (0.55, 0.3, 0.1, 0.04, 0.01)  # about, of the pixels


class StreetDataset(BaseSegDataset):
    METAINFO = {'classes': CLASSES, 'palette': [[i, i, i] for i in range(5)]}

    def get_cat_ids(self, index):
        return np.unique(self[index]['gt_seg_map']).tolist()


class DropImage:
    """Leaves what is needed here: the labels, the index and the path, after crops if there are any."""

    def __call__(self, results):
        return {key: results[key] for key in ('gt_seg_map', 'sample_idx', 'seg_map_path')}


class AddImage:
    def __call__(self, results):
        return results | dict(img=np.zeros((*SIZE, 3), np.uint8))


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """24 images of 32x24 whose classes have about the SHARES, with 255 here and there."""
    root = tmp_path_factory.mktemp('streets')
    rng = np.random.default_rng(0)
    for number in range(24):
        shares = rng.dirichlet(np.array(SHARES) * 4)
        labels = rng.choice(5, SIZE, p=shares).astype(np.uint8)
        labels[rng.random(SIZE) < 0.05] = 255
        for kind, image in (('img', np.zeros((*SIZE, 3), np.uint8)), ('ann', labels)):
            (root / kind).mkdir(exist_ok=True)
            Image.fromarray(image).save(root / kind / f'{number:02d}.{"jpg" if kind == "img" else "png"}')
    return root


def make(root, kind=StreetDataset, **options):
    return kind(
        data_root=str(root),
        data_prefix=dict(img_path='img', seg_map_path='ann'),
        pipeline=[LoadAnnotations(), DropImage()],
        **options,
    )


def make_sampler(root, dataset=None, **options):
    options = dict(temperature=0.3, uniform=0, min_pixels=9, seed=0, num_workers=0) | options
    return RareClassSampler(make(root) if dataset is None else dataset, **options)


def draw(sampler, number):
    """As many draws as wanted, from one epoch after another."""
    epochs = itertools.chain.from_iterable(itertools.repeat(sampler))
    return [(int(i), i.class_index) for i in itertools.islice(epochs, number)]


def pixels_of(dataset, classes=5):
    """(len(dataset), classes) pixels, counted from what the pipeline loads."""
    labels = [dataset[index]['gt_seg_map'] for index in range(len(dataset))]
    return np.array([[(image == c).sum() for c in range(classes)] for image in labels])


def formula(pixels, temperature, min_pixels):
    share = [float(n) / float(pixels.sum()) for n in pixels.sum(0)]
    found = [any(image[c] >= min_pixels for image in pixels) for c in range(len(share))]
    terms = [math.exp((1 - f) / temperature) if there else 0 for f, there in zip(share, found, strict=True)]
    return [term / sum(terms) for term in terms]


@pytest.fixture
def logged(monkeypatch):
    """What is logged at each level."""
    messages = {}

    def print_log(message, logger, level=20):
        messages.setdefault(level, []).append(message)

    monkeypatch.setattr(module, 'print_log', print_log)
    return messages


# Draws


@pytest.mark.parametrize('temperature', [0.07, 0.3, 5])
def test_class_shares_follow_the_formula(root, temperature):
    want = formula(pixels_of(make(root)), temperature, 9)
    sampler = make_sampler(root, temperature=temperature)
    assert sampler.probability == pytest.approx(want)
    drawn = Counter(c for _, c in draw(sampler, 20_000))
    assert chisquare([drawn[c] for c in range(5)], [20_000 * p for p in want]).pvalue > 1e-3


def test_images_are_those_with_enough_pixels_each_as_often_as_another(root):
    pixels = pixels_of(make(root))
    drawn = draw(make_sampler(root), 20_000)
    for c in range(5):
        enough = np.flatnonzero(pixels[:, c] >= 9)
        assert len(enough) > 1
        times = Counter(i for i, k in drawn if k == c)
        assert set(times) == set(enough)
        assert chisquare([times[i] for i in enough]).pvalue > 1e-3
    assert (pixels == 9).any()  # tells at least from more than


def test_ignored_pixels_do_not_count(root):
    labels = np.stack([sample['gt_seg_map'] for sample in make(root)])
    assert 0.03 < (labels == 255).mean() < 0.07
    share = np.bincount(labels[labels != 255], minlength=5) / (labels != 255).sum()
    weights = np.exp((1 - share) / 0.3)
    assert make_sampler(root).probability == pytest.approx(weights / weights.sum())


def test_a_tiny_temperature_draws_the_rarest_class_and_a_huge_one_all_alike(root):
    assert make_sampler(root, temperature=5e-324).probability.tolist() == [0, 0, 0, 0, 1]
    assert make_sampler(root, temperature=1e308).probability == pytest.approx([0.2] * 5)
    assert {c for _, c in draw(make_sampler(root, temperature=5e-324), 999)} == {4}


def test_the_stream_depends_on_the_seed_alone(root, monkeypatch):
    stream = draw(make_sampler(root), 700)
    assert stream != draw(make_sampler(root, seed=1), 700)
    monkeypatch.setattr(module, 'BLOCK', 7)
    assert stream == draw(make_sampler(root), 700)


def test_an_epoch_is_as_long_as_the_data_set_and_the_next_one_goes_on(root):
    stream = draw(make_sampler(root), 120)
    sampler = make_sampler(root)
    assert len(sampler) == 24
    assert len(list(sampler)) == 24
    assert [(int(i), i.class_index) for i in sampler] == stream[24:48]
    sampler.set_epoch(4)
    assert [(int(i), i.class_index) for i in sampler] == stream[96:]
    sampler.set_epoch(1)  # a resumed run says where it is
    assert [(int(i), i.class_index) for i in sampler] == stream[24:48]


TRAIN_CFG = {
    "dict(max_epochs=3, type='EpochBasedTrainLoop')": 24,
    'dict(by_epoch=True, max_epochs=3)': 24,
    "dict(max_iters=3, type='IterBasedTrainLoop', val_interval=2)": 1000,
    'dict(by_epoch=False, max_iters=3)': 1000,
    "dict(\n    max_iters=3,\n    type='mmengine.runner.loops.IterBasedTrainLoop',\n)": 1000,
    'dict()': 24,
    None: 24,
}
TEXT = """model=dict(
    train_cfg=dict(max_iters=1))
train_cfg{0}
val_cfg=dict(max_iters=1, hook=<an object>)
"""


@pytest.mark.parametrize('train_cfg', TRAIN_CFG)
@pytest.mark.parametrize('equals', ['=', ' = '])  # with and without yapf
@pytest.mark.parametrize('before', [0, 5])
def test_only_a_run_of_iterations_has_no_end(root, train_cfg, equals, before):
    text = TEXT.format(f'{equals}{train_cfg}') if train_cfg else ''
    MessageHub.get_instance('run').update_info('cfg', text)
    sampler = make_sampler(root)
    indices = iter(sampler)
    first = [next(indices) for _ in range(before)]  # upstream's loader draws before the run starts
    sampler.set_epoch(0)
    got = first + list(itertools.islice(indices, 1000 - before))
    assert len(got) == TRAIN_CFG[train_cfg]
    assert [(int(i), i.class_index) for i in got] == draw(make_sampler(root), len(got))


@pytest.mark.parametrize('skipped', [0, 1, 5, 255, 256, 1000])
def test_skip_continues_where_an_uninterrupted_run_would_be(root, skipped):
    stream = draw(make_sampler(root), 1100)
    sampler = make_sampler(root)
    draw(sampler, 3)  # absolute: what was drawn before does not matter
    sampler.skip(skipped)
    assert draw(sampler, 100) == stream[skipped : skipped + 100]


def test_skip_costs_nothing_and_goes_forward_only(root):
    sampler = make_sampler(root)
    sampler.skip(10**15)
    assert draw(sampler, 1)
    with pytest.raises(ValueError, match='num_samples=-1'):
        sampler.skip(-1)


# Draws of any image


def test_a_part_of_the_draws_takes_any_image_and_the_rest_follows_the_formula(root):
    want = formula(pixels_of(make(root)), 0.3, 9)
    sampler = make_sampler(root, uniform=0.4)
    assert sampler.probability == pytest.approx(want)
    drawn = draw(sampler, 20_000)
    times = Counter(c for _, c in drawn)
    expected = [20_000 * p for p in (*(0.6 * p for p in want), 0.4)]
    assert chisquare([times[c] for c in (*range(5), None)], expected).pvalue > 1e-3
    images = Counter(i for i, c in drawn if c is None)
    assert chisquare([images[i] for i in range(24)]).pvalue > 1e-3


def test_every_draw_is_two_numbers_whatever_it_takes(root):
    plain, mixed = (draw(make_sampler(root, uniform=uniform), 2000) for uniform in (0, 0.4))
    chance = np.random.Generator(np.random.PCG64(0)).random((2000, 2))
    assert [c is None for _, c in mixed] == (chance[:, 0] >= 0.6).tolist()
    assert {c for _, c in plain} == set(range(5))
    sampler = make_sampler(root, uniform=0.4)
    sampler.skip(777)
    assert draw(sampler, 100) == mixed[777:877]


def lesions(folder, images, holding, pixels=20, size=(60, 64)):
    """`images` of background, of which the first `holding` have a lesion."""
    for number in range(images):
        labels = np.zeros(size, np.uint8)
        labels.flat[: pixels if number < holding else 0] = 1
        for kind, image in (('img', np.zeros((*size, 3), np.uint8)), ('ann', labels)):
            (folder / kind).mkdir(exist_ok=True)
            Image.fromarray(image).save(folder / kind / f'{number:02d}.{"jpg" if kind == "img" else "png"}')
    return make(folder, kind=LesionDataset)


class LesionDataset(StreetDataset):
    METAINFO = {'classes': ('background', 'lesion'), 'palette': [[0, 0, 0], [1, 1, 1]]}


def test_of_a_binary_set_every_image_is_drawn_by_default(tmp_path, logged):
    sampler = RareClassSampler(lesions(tmp_path, 40, 2), seed=0, num_workers=0)
    drawn = draw(sampler, 4000)
    assert {i for i, _ in drawn} == set(range(40))
    assert Counter(c for _, c in drawn)[1] == pytest.approx(3000, rel=0.05)
    assert 30 not in logged


def test_a_warning_tells_how_many_images_will_practically_never_be_drawn(tmp_path, logged):
    dataset = lesions(tmp_path, 40, 2)
    for uniform in (0, 0.009):
        make_sampler(None, dataset, temperature=0.01, uniform=uniform)
    for warning in logged.pop(30):
        assert '38 of 40 images (95%)' in warning
        assert 'less than once in 100 x 40 draws. Raise uniform=' in warning
    make_sampler(None, dataset, temperature=0.01, uniform=0.011)
    make_sampler(None, RepeatDataset(dataset, 9), temperature=0.01, uniform=0.1)
    make_sampler(None, dataset, temperature=9, uniform=0)
    assert 30 not in logged


@pytest.mark.parametrize('value', [-0.1, 1, 1.5, math.nan, '0.2', None])
def test_a_uniform_share_out_of_range_is_refused(root, value):
    with pytest.raises(ValueError, match=f'uniform={value!r}, allowed are numbers from 0 to below 1'):
        make_sampler(root, uniform=value)


def test_the_script_of_the_docs_tells_it_for_a_config(tmp_path, capsys, monkeypatch):
    lesions(tmp_path, 40, 2)
    dataset = dict(
        type='BaseSegDataset',
        metainfo=LesionDataset.METAINFO,
        data_root=str(tmp_path),
        data_prefix=dict(img_path='img', seg_map_path='ann'),
        pipeline=[dict(type='LoadAnnotations')],
    )
    (tmp_path / 'config.py').write_text(f'train_dataloader = dict(dataset={dataset})')
    page = (REPOSITORY / 'docs' / 'sampling.md').read_text(encoding='utf-8')
    script = re.search(r'# draws.py\n(.*?)```', page, re.S)[1].replace(
        'per_image', 'num_workers=0, per_image'
    )
    monkeypatch.setattr('sys.argv', ['draws.py', str(tmp_path / 'config.py')])
    exec(script, {})
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines[0] == 'uniform=0: never drawn in 100 epochs 95.0%, effective images 5%'
    assert lines[2] == 'uniform=0.25: never drawn in 100 epochs 0.0%, effective images 9%'


# Enough pixels


def test_by_default_the_images_of_a_class_tell_how_many_pixels_are_enough(root):
    pixels = pixels_of(make(root))
    sampler = make_sampler(root, min_pixels=None)
    for c, least in enumerate(sampler.min_pixels):
        held = sorted(pixels[:, c][pixels[:, c] > 0])
        assert least == held[(len(held) - 1) // 4]
        enough = np.flatnonzero(pixels[:, c] >= least)
        assert len(enough) >= 0.75 * len(held)
        assert {i for i, k in draw(sampler, 3000) if k == c} == set(enough)


def test_the_default_asks_for_at_most_the_pixels_of_the_source():
    counts = np.array([[4000, 2, 0], [5000, 0, 0], [9000, 7, 0], [10**6, 9, 0]])
    assert least_pixels(counts).tolist() == [3000, 2, 1]
    assert least_pixels(counts[1:2]).tolist() == [3000, 1, 1]


def test_without_a_pixel_of_any_class_nothing_can_be_drawn(root, tmp_path):
    for kind in ('img', 'ann'):
        shutil.copytree(root / kind, tmp_path / kind)
    for path in (tmp_path / 'ann').iterdir():
        Image.fromarray(np.full(SIZE, 255, np.uint8)).save(path)
    with pytest.raises(ValueError, match=r'none of 5 classes occurs .* All labels are 255'):
        make_sampler(tmp_path, min_pixels=None)


# Ignored labels


def test_it_counts_without_the_ignored_label_and_tells_it(root, tmp_path):
    for kind in ('img', 'ann'):
        shutil.copytree(root / kind, tmp_path / kind)
    for path in (tmp_path / 'ann').iterdir():
        labels = np.asarray(Image.open(path))
        Image.fromarray(np.where(labels == 255, 7, labels).astype(np.uint8)).save(path)
    for dataset, given in ((make(tmp_path), 7), (make(tmp_path, ignore_index=7), None)):
        sampler = make_sampler(None, dataset, ignore_index=given)
        assert sampler.ignore_index == 7
        assert sampler.probability == pytest.approx(formula(pixels_of(make(root)), 0.3, 9))
    assert make_sampler(root).ignore_index == 255
    assert make_sampler(root, ignore_index=255).ignore_index == 255
    with pytest.raises(ValueError, match='255 -> 255'):  # out of range where another label is ignored
        make_sampler(root, ignore_index=7)


def test_labels_ignored_by_some_of_the_data_sets_are_all_told(tmp_path):
    lesions(tmp_path, 4, 2)  # holds none of them
    both = ConcatDataset([make(tmp_path, LesionDataset, ignore_index=label) for label in (255, 7)])
    assert make_sampler(None, MultiImageMixDataset(both, [])).ignore_index == (7, 255)


def test_class_balanced_dataset_is_refused_with_what_to_use(tmp_path):
    lesions(tmp_path, 4, 2)

    class Plain(LesionDataset):
        get_cat_ids = BaseSegDataset.get_cat_ids  # as all data sets of MMSegmentation

    dataset = ClassBalancedDataset(make(tmp_path, Plain), oversample_thr=0.5, lazy_init=True)
    with pytest.raises(ValueError, match=r"get_cat_ids.*sampler=dict\(type='RareClassSampler'\)"):
        make_sampler(None, dataset)


# Ranks


def drawn_on_a_rank(root):
    fresh, skipping, seedless = (make_sampler(root, seed=seed) for seed in (0, 0, None))
    skipping.skip(11)
    odd = make_sampler(root, make(root, indices=5), uniform=0.3)
    odd.set_epoch(2)
    epoch = [(int(i), i.class_index) for i in odd]
    return draw(fresh, 3000), draw(skipping, 50), epoch, (seedless.seed, draw(seedless, 50))


@pytest.mark.slow
def test_two_ranks_are_one_stream_and_never_in_lockstep(root):
    ranks = on_ranks(2, drawn_on_a_rank, root)
    fresh, skipping, epoch, ((seed, _), (other, _)) = zip(*ranks, strict=True)
    stream = draw(make_sampler(root), 6000)
    assert [one for pair in zip(*fresh, strict=True) for one in pair] == stream
    assert [one for pair in zip(*skipping, strict=True) for one in pair] == stream[22:122]
    five = draw(make_sampler(root, make(root, indices=5), uniform=0.3), 18)
    assert [one for pair in zip(*epoch, strict=True) for one in pair] == five[12:]  # 3 of 5 for each rank
    assert seed == other  # nobody gave one, and they agree
    pixels = pixels_of(make(root))
    shares = formula(pixels, 0.3, 9)
    chance = sum(p**2 / (pixels[:, c] >= 9).sum() for c, p in enumerate(shares))
    same = sum(a == b for a, b in zip(*fresh, strict=True))
    assert 0 < chance < 0.2
    assert binomtest(same, 3000, chance).pvalue > 1e-3


# Classes that cannot be drawn


def test_a_class_without_enough_pixels_is_named_and_the_rest_renormalised(root, logged):
    pixels = pixels_of(make(root))
    scarce = pixels.max(0).argmin()
    bound = int(pixels[:, scarce].max()) + 1
    sampler = make_sampler(root, min_pixels=bound)
    assert sampler.probability[scarce] == 0
    assert sampler.probability == pytest.approx(formula(pixels, 0.3, bound))
    assert scarce not in {c for _, c in draw(sampler, 2000)}
    (warning,) = logged[30]
    assert f'min_pixels={bound} of {CLASSES[scarce]} (at most {bound - 1})' in warning
    assert 'Lower min_pixels' in warning
    assert warning.count('at most') == 1


def test_a_class_that_never_occurs_is_not_drawn_and_not_warned_of(root, logged, tmp_path):
    for kind in ('img', 'ann'):
        shutil.copytree(root / kind, tmp_path / kind)
    for path in (tmp_path / 'ann').iterdir():
        labels = np.asarray(Image.open(path))
        Image.fromarray(np.where(labels == 4, 255, labels).astype(np.uint8)).save(path)
    sampler = make_sampler(tmp_path, min_pixels=1)
    assert ((sampler.probability > 0) == [True, True, True, True, False]).all()
    assert 30 not in logged


def test_no_class_that_can_be_drawn_is_an_error(root):
    with pytest.raises(ValueError, match=r'min_pixels=769 of road \(at most \d+\), house .*Lower min_pixels'):
        make_sampler(root, min_pixels=769)


@pytest.mark.parametrize('value', [0, -0.01, math.inf, math.nan, '0.01', None])
def test_a_temperature_out_of_range_is_refused(root, value):
    with pytest.raises(ValueError, match=f'temperature={value!r}, allowed are finite numbers above 0'):
        make_sampler(root, temperature=value)


@pytest.mark.parametrize('value', [0, -3, 2.5, '9'])
def test_counts_out_of_range_are_refused(root, value):
    with pytest.raises(ValueError, match=f'min_pixels={value!r}, allowed are integers from 1'):
        make_sampler(root, min_pixels=value)
    for name in ('min_pixels', 'max_tries'):
        with pytest.raises(ValueError, match=f'{name}={value!r}, allowed are integers from 1'):
            RareClassCrop((8, 8), **{name: value})


def test_one_table_tells_what_is_drawn(root, logged):
    sampler = make_sampler(root)
    (table,) = logged[20]
    row = next(line for line in table.splitlines() if 'bike' in line)
    assert f'{sampler.probability[4]:.3%}' in row
    assert f' {(pixels_of(make(root))[:, 4] >= 9).sum()} ' in row
    assert all(name in table for name in CLASSES)


def test_counts_are_cached(root, tmp_path):
    first = make_sampler(root, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    written = path.stat().st_ino
    assert draw(make_sampler(root, cache_dir=tmp_path), 50) == draw(first, 50)
    assert path.stat().st_ino == written


# The way of the class to the pipeline


@pytest.mark.parametrize('copied', [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize('drawn', [3, None])
def test_a_copy_of_an_index_knows_its_class(copied, drawn):
    index = copied(DrawnIndex(7, drawn, 30))
    assert (index, index.class_index, index.min_pixels, type(index)) == (7, drawn, 30, DrawnIndex)


def test_what_wrapped_data_sets_make_of_an_index_knows_its_class():
    for index in (DrawnIndex(9, 3, 30) - np.int64(2), DrawnIndex(16, 3, 30) % 9):
        assert (index, index.class_index, index.min_pixels, type(index)) == (7, 3, 30, DrawnIndex)


def test_an_index_tells_what_the_images_of_its_class_hold_at_least(root):
    for min_pixels in (None, 9):
        sampler = make_sampler(root, uniform=0.3, min_pixels=min_pixels)
        for index in itertools.islice(sampler, 24):
            c = index.class_index
            assert index.min_pixels == (1 if c is None else sampler.min_pixels[c])


@pytest.mark.slow
def test_the_class_reaches_workers_that_are_spawned(root):
    """As on Windows and macOS: whatever they need is pickled."""
    dataset = make(root)
    dataset.pipeline.transforms[1:] = [AddImage(), RareClassCrop((12, 16)), DropImage()]
    loader = DataLoader(
        dataset,
        batch_size=4,
        sampler=make_sampler(root, uniform=0.4),
        num_workers=1,
        multiprocessing_context='spawn',
        collate_fn=pseudo_collate,
    )
    got = [(int(i), i.class_index) for batch in loader for i in batch['sample_idx']]
    assert got == draw(make_sampler(root, uniform=0.4), 24)


def test_a_set_repeated_many_times_takes_the_room_of_its_images(root):
    """A repeat is one chance more for the image, and nothing that is kept."""
    once = make(root, indices=5)
    repeated = RepeatDataset(once, 40_000)
    tracemalloc.start()
    sampler = make_sampler(root, repeated, uniform=0.3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    plain = make_sampler(root, once, uniform=0.3)
    assert len(sampler) == 200_000
    kept = [value for value in vars(sampler).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in kept) < 2000
    assert draw(sampler, 500) == draw(plain, 500)


def test_an_image_that_is_there_three_times_is_drawn_three_times_as_often(root):
    one = make(root, indices=1)
    dataset = ConcatDataset([one, make(root), one, one])
    drawn = draw(make_sampler(root, dataset, uniform=0.4), 20_000)
    times = Counter(i for i, c in drawn if c is None)
    assert (
        chisquare(
            [times[i] for i in range(25)], [sum(times.values()) / 27 * n for n in [3] + [1] * 24]
        ).pvalue
        > 1e-3
    )
    class_draws = Counter(i for i, c in drawn if c == 0)
    assert class_draws[0] == pytest.approx(3 * class_draws[1], rel=0.15)  # two copies of the same picture
    assert max(times) == 24


WRAPPED = {
    'plain': lambda root: make(root),
    'lazy': lambda root: make(root, lazy_init=True),
    'concat': lambda root: ConcatDataset([make(root, indices=[3]), make(root, indices=9), make(root)]),
    'repeat': lambda root: RepeatDataset(make(root), times=3),
    'nested': lambda root: RepeatDataset(
        dict(type='ConcatDataset', datasets=[make(root, indices=5), make(root)]), times=2
    ),
    'mosaic': lambda root: MultiImageMixDataset(ConcatDataset([make(root, indices=[8, 2]), make(root)]), []),
    'label_map': lambda root: make(root, metainfo=dict(classes=('bike', 'car', 'pole'))),
    'reduce_zero_label': lambda root: make(root, reduce_zero_label=True),
    'class balanced': lambda root: ClassBalancedDataset(make(root), oversample_thr=0.99),
}


@pytest.mark.parametrize('case', WRAPPED)
def test_the_image_at_an_index_holds_enough_of_the_class(root, case):
    dataset = WRAPPED[case](root)
    sampler = make_sampler(root, dataset)
    assert len(sampler) == len(dataset)
    pixels = pixels_of(dataset, len(sampler.probability))
    found = (pixels >= 9).any(0)
    assert found.sum() > 2
    drawn = draw(sampler, 3000)
    paths = [dataset[index]['seg_map_path'] for index in range(len(dataset))]
    for c in np.flatnonzero(found):
        enough = {paths[index] for index in np.flatnonzero(pixels[:, c] >= 9)}
        assert {paths[index] for index, k in drawn if k == c} <= enough
    for index, c in draw(sampler, 300):
        assert (dataset[index]['gt_seg_map'] == c).sum() >= 9


@pytest.mark.parametrize(
    ('case', 'workers'),
    [*((case, 0) for case in WRAPPED if case != 'class balanced'), ('nested', 2), ('nested', 'persistent')],
)
def test_the_class_reaches_the_pipeline(root, case, workers):
    dataset, sampler = WRAPPED[case](root), make_sampler(root, WRAPPED[case](root))
    loader = DataLoader(
        dataset,
        batch_size=3,
        sampler=sampler,
        num_workers=2 if workers else 0,
        persistent_workers=workers == 'persistent',
        collate_fn=pseudo_collate,
    )
    batches = itertools.islice(loader, 8)
    wanted = draw(make_sampler(root, dataset), 24)
    for number, batch in enumerate(batches):
        assert [index.class_index for index in batch['sample_idx']] == [
            c for _, c in wanted[3 * number : 3 * number + 3]
        ]
        for index, labels in zip(batch['sample_idx'], batch['gt_seg_map'], strict=True):
            assert (labels == index.class_index).sum() >= 9


def test_both_are_found_by_the_framework_by_plain_and_by_prefixed_name(root):
    init_default_scope('mmseg')
    for prefix in ('', 'mmseg_imbalance.'):
        config = dict(type=f'{prefix}RareClassSampler', min_pixels=9, num_workers=0)
        sampler = DATA_SAMPLERS.build(config, default_args=dict(dataset=make(root), seed=0))
        assert type(sampler) is RareClassSampler
        crop = TRANSFORMS.build(dict(type=f'{prefix}RareClassCrop', crop_size=(8, 8)))
        assert type(crop) is RareClassCrop


# Crops


def seed_crops(seed):
    np.random.seed(seed)  # noqa: NPY002  the framework's crops draw from it


def results_of(labels, drawn=None):
    index = 0 if drawn is None else DrawnIndex(0, drawn)
    image = np.repeat(np.arange(labels.size).reshape(*labels.shape, 1), 3, 2)
    return dict(img=image, gt_seg_map=labels, seg_fields=['gt_seg_map'], sample_idx=index)


@pytest.fixture
def count_tries(monkeypatch):
    """Counts the framework's crops."""
    tries = []
    plain = RandomCrop.__dict__['crop_bbox'].func
    monkeypatch.setattr(
        RandomCrop.__dict__['crop_bbox'],
        'func',
        lambda self, results: tries.append(1) or plain(self, results),
    )
    return tries


def first_that_holds(labels, drawn, size, min_pixels, max_tries, **options):
    """Brute force: the framework's crops in their order, each looked up among the sums at all positions."""
    height, width = (min(s, n) for s, n in zip(size, labels.shape, strict=True))
    held = {
        (y, x): sum(labels[r, c] == drawn for r in range(y, y + height) for c in range(x, x + width))
        for y in range(labels.shape[0] - height + 1)
        for x in range(labels.shape[1] - width + 1)
    }
    plain = RandomCrop(size, **options)
    if (labels == drawn).sum() >= min_pixels:
        for tries in range(1, max_tries + 1):
            bbox = plain.crop_bbox(results_of(labels))
            if held[bbox[0], bbox[2]] >= min_pixels:
                return bbox, tries, max(held.values())
    else:
        max_tries = 0
    return plain.crop_bbox(results_of(labels)), max_tries + 1, max(held.values())


@pytest.mark.parametrize('options', [{}, dict(cat_max_ratio=0.8)])
@pytest.mark.parametrize('seed', range(12))
def test_a_crop_is_the_first_try_that_holds_enough_or_a_plain_one(count_tries, seed, options):
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, (13, 17), p=(0.6, 0.35, 0.05)).astype(np.uint8)
    for drawn, min_pixels, max_tries in itertools.product((1, 2), (1, 3, 25, 90), (1, 4)):
        seed_crops(seed)
        bbox, tries, most = first_that_holds(labels, drawn, (7, 5), min_pixels, max_tries, **options)
        del count_tries[:]
        seed_crops(seed)
        got = RareClassCrop((7, 5), min_pixels, max_tries, **options)(results_of(labels, drawn))
        assert (got['gt_seg_map'] == labels[bbox[0] : bbox[1], bbox[2] : bbox[3]]).all()
        assert len(count_tries) == tries <= max_tries + 1
        if most < min_pixels:
            assert tries in (1, max_tries + 1)
        elif tries <= max_tries:
            assert (got['gt_seg_map'] == drawn).sum() >= min_pixels
        assert (
            got['img'][..., 0] == results_of(labels)['img'][bbox[0] : bbox[1], bbox[2] : bbox[3], 0]
        ).all()


def test_a_class_in_one_corner_is_found_far_more_often(count_tries):
    labels = np.zeros((40, 40), np.uint8)
    labels[:6, :6] = 1

    def found(crop):
        seed_crops(0)
        return np.mean([(crop(results_of(labels, 1))['gt_seg_map'] == 1).sum() >= 20 for _ in range(400)])

    plain, rare = found(RandomCrop((25, 25))), found(RareClassCrop((25, 25), 20))
    assert 0 < plain < 0.1
    chance = plain + (1 - plain) * (1 - (1 - plain) ** 10)  # ten tries and a plain crop
    assert rare == pytest.approx(chance, abs=0.08)


def test_an_image_smaller_than_the_crop_is_taken_whole(count_tries):
    labels = np.zeros((5, 6), np.uint8)
    labels[0, :4] = 1
    assert RareClassCrop((8, 8), 4)(results_of(labels, 1))['gt_seg_map'].shape == (5, 6)
    assert RareClassCrop((8, 8), 5)(results_of(labels, 1))['gt_seg_map'].shape == (5, 6)
    assert len(count_tries) == 2


def test_without_a_drawn_class_it_is_a_plain_crop_with_one_warning(logged):
    labels = np.random.default_rng(0).integers(0, 3, (13, 17)).astype(np.uint8)
    crop, plain = RareClassCrop(5, 90, cat_max_ratio=0.4), RandomCrop(5, cat_max_ratio=0.4)
    without_index = results_of(labels)
    del without_index['sample_idx']
    for results in (results_of(labels), without_index, results_of(labels)):
        cropped = []
        for transform in (crop, plain):
            seed_crops(3)
            cropped.append(transform(dict(results))['gt_seg_map'].tolist())
        assert cropped[0] == cropped[1]
    (warning,) = logged[30]
    assert 'RareClassSampler' in warning


def test_a_draw_of_any_image_is_a_plain_crop_without_a_warning(logged):
    labels = np.random.default_rng(0).integers(0, 3, (13, 17)).astype(np.uint8)
    results = results_of(labels) | dict(sample_idx=DrawnIndex(0, None))
    cropped = []
    for transform in (RareClassCrop(5, 1), RandomCrop(5)):
        seed_crops(3)
        cropped.append(transform(dict(results))['gt_seg_map'].tolist())
    assert cropped[0] == cropped[1]
    assert not logged


@pytest.mark.parametrize(
    ('min_pixels', 'ori_shape', 'least'),
    [(40, (30, 40), 20), (41, None, 20), (40, (15, 20), 80), (400, (60, 80), 50)],
)
def test_by_default_a_crop_holds_half_of_what_the_image_does_at_its_size(
    count_tries, min_pixels, ori_shape, least
):
    """`ori_shape` is the size of the file; the labels are 30x40 when they are cropped."""
    for pixels, tries in ((least, 4), (least - 1, 1)):
        labels = np.zeros((30, 40), np.uint8)
        labels.flat[:pixels] = 1
        results = results_of(labels) | dict(sample_idx=DrawnIndex(0, 1, min_pixels))
        if ori_shape is not None:
            results['ori_shape'] = ori_shape
        del count_tries[:]
        RareClassCrop((2, 2), max_tries=3)(results)  # such a crop never holds enough
        assert len(count_tries) == tries


def test_by_default_a_crop_holds_at_least_a_pixel(count_tries):
    results = results_of(np.zeros((30, 40), np.uint8))
    RareClassCrop((8, 8))(results | dict(sample_idx=DrawnIndex(0, 1, 3), ori_shape=(60, 80)))
    assert len(count_tries) == 1


def test_two_images_share_a_crop_where_the_framework_asks_for_it():
    labels = np.zeros((40, 40), np.uint8)
    labels[:6, :6] = 1
    seed_crops(0)
    for kind in (RareClassCrop((25, 25), 20), RandomCrop((25, 25))):  # one must not spoil the other
        for _ in range(3):
            with cache_random_params(kind):
                first, second = (kind(results_of(labels, 1))['img'] for _ in range(2))
            assert (first == second).all()
            if isinstance(kind, RareClassCrop):
                again = [(kind(results_of(labels, 1))['gt_seg_map'] == 1).sum() >= 20 for _ in range(30)]
                assert np.mean(again) > 0.15


@pytest.mark.parametrize(
    'folding', [dict(reduce_zero_label=True), dict(metainfo=dict(classes=CLASSES[::-1]))]
)
def test_labels_are_those_that_training_sees(root, folding):
    dataset = make(root, **folding)
    names = CLASSES[1:] if 'reduce_zero_label' in folding else CLASSES[::-1]
    dataset.pipeline.transforms[1:] = [AddImage(), RareClassCrop((12, 16), 4), DropImage()]
    seed_crops(0)
    enough = Counter()
    for index in itertools.islice(make_sampler(root, make(root, **folding), min_pixels=16), 300):
        sample = dataset[index]
        raw = np.asarray(Image.open(sample['seg_map_path']))
        assert (raw == CLASSES.index(names[index.class_index])).sum() >= 16
        enough[(sample['gt_seg_map'] == index.class_index).sum() >= 4] += 1
    assert enough[True] > 0.95 * enough.total()


# Through a runner


class Record(Hook):
    def __init__(self):
        self.seen = {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.seen[runner.iter] = [
            (Path(s.img_path).name, int(s.sample_idx), s.sample_idx.class_index)
            for s in data_batch['data_samples']
        ]


class EagerIterator:
    """As upstream's of the loop that goes by iterations: starts at once, and cannot skip."""

    def __init__(self, loader):
        self.iterator = iter(loader)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.iterator)


@LOOPS.register_module()
class UpstreamLoop(IterBasedTrainLoop):
    """As upstream's, which asks for each batch of the past."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if hasattr(self.dataloader_iterator, 'skip_iter'):  # of the fork
            self.dataloader_iterator = EagerIterator(self.dataloader)

    def run(self):
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        for _ in range(self._iter):
            next(self.dataloader_iterator)
        while self._iter < self._max_iters:
            self.runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')


def counting_loads(path):
    """Every image that is loaded, in whatever process, adds a character to a file."""
    load = LoadImageFromFile.transform

    def transform(self, results):
        with open(path, 'a') as file:
            file.write('.')
        return load(self, results)

    return patch.object(LoadImageFromFile, 'transform', transform)


@pytest.fixture
def train(small_config, tmp_path):
    """Trains, on 4 images in batches of 2, and tells what was seen in each iteration."""

    def run(name, train_cfg, workers=0, hooks=(), **options):
        cfg = small_config(CONFIG, experiment_name=f'{tmp_path.name}-{name}', **options)
        others = [hook for hook in cfg.custom_hooks if hook.type != 'ResumeSamplerHook']
        cfg.train_cfg, cfg.custom_hooks = train_cfg, [*others, *hooks]
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None  # a metric would look at the labels too
        by_epoch = 'max_epochs' in train_cfg
        cfg.default_hooks.checkpoint.update(interval=1 if by_epoch else 2, by_epoch=by_epoch)
        cfg.train_dataloader.update(num_workers=workers, persistent_workers=workers > 0)
        cfg.train_dataloader.sampler.temperature = 0.5  # several classes
        keys = ('img_path', 'img_shape', 'ori_shape', 'pad_shape', 'scale_factor', 'flip', 'sample_idx')
        cfg.train_dataloader.dataset.pipeline[-1].meta_keys = keys
        cfg.work_dir = str(tmp_path / name) + '.run'
        with counting_loads(tmp_path / name):
            runner, record = Runner.from_cfg(cfg), Record()
            runner.register_hook(record)
            runner.train()
        runner._train_loop = None  # the workers end here; if the garbage collector ends them, they take 10 s
        record.loads = len((tmp_path / name).read_text())
        return record

    return run


@pytest.mark.parametrize(
    ('loop', 'workers', 'hook'),
    [
        ('IterBasedTrainLoop', 1, True),
        ('UpstreamLoop', 0, False),
        ('UpstreamLoop', 0, True),
        ('UpstreamLoop', 1, True),
    ],
)
def test_a_resumed_run_sees_the_images_and_classes_of_an_uninterrupted_one(
    train, tmp_path, loop, workers, hook
):
    """Upstream without the hook loads what it has seen before it goes on; with it, only the rest."""

    def run(name, iterations, **options):
        hooks = [dict(type='ResumeSamplerHook')] if hook else []
        cfg = dict(type=loop, max_iters=iterations, val_interval=100)
        return train(name, cfg, workers, hooks, **options)

    whole = run('whole', 8)
    run('half', 6)
    rest = run('rest', 8, resume=True, load_from=str(tmp_path / 'half.run' / 'iter_6.pth'))
    assert list(rest.seen) == [6, 7]
    assert {i: whole.seen[i] for i in (6, 7)} == rest.seen
    assert len({c for batch in whole.seen.values() for _, _, c in batch}) > 2
    if workers == 0:
        assert rest.loads == (4 if hook else 16)


@pytest.mark.parametrize('workers', [0, 1])
def test_epochs_end_and_a_resumed_run_goes_on_with_the_next_one(train, tmp_path, workers):
    def run(name, epochs, **options):
        return train(name, dict(type='EpochBasedTrainLoop', max_epochs=epochs), workers, **options).seen

    whole = run('whole', 3)
    assert list(whole) == list(range(6))
    half = run('half', 1)
    rest = run('rest', 3, resume=True, load_from=str(tmp_path / 'half.run' / 'epoch_1.pth'))
    assert half | rest == whole
    assert len({tuple(batch) for batch in whole.values()}) > 3  # no epoch is the one before


@pytest.mark.parametrize('workers', [0, 1])
def test_a_run_of_iterations_never_restarts_the_loader(train, workers, monkeypatch):
    """MMEngine would warn, wait 2 s and start new workers each time."""
    messages = []
    monkeypatch.setattr('mmengine.runner.loops.print_log', lambda text, *_, **__: messages.append(text))
    seen = train('run', dict(type='IterBasedTrainLoop', max_iters=7, val_interval=100), workers).seen
    assert len(seen) == 7
    assert not [text for text in messages if 'Reach the end' in text]
