"""Draws follow the formula, on any number of ranks and after a resume."""

import itertools
import math
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
from mmengine.dataset import ClassBalancedDataset, ConcatDataset, RepeatDataset, pseudo_collate
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.registry import DATA_SAMPLERS, LOOPS, init_default_scope
from mmengine.runner import IterBasedTrainLoop, Runner
from mmseg.datasets import BaseSegDataset, MultiImageMixDataset
from PIL import Image
from ranks import on_ranks
from scipy.stats import binomtest, chisquare
from streets import CLASSES, SIZE, AddImage, DropImage, LesionDataset, lesions, log_of, make, write_streets
from torch.utils.data import DataLoader

from mmseg_imbalance import samplers as module
from mmseg_imbalance.samplers import RareClassSampler
from mmseg_imbalance.transforms import RareClassCrop

CONFIG = 'segformer/segformer_mit-b0-small-combined-rcs_1xb8-2k_camvid-240x180'


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write_streets(tmp_path_factory.mktemp('streets'))


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
    return log_of(module, monkeypatch)


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


@pytest.mark.parametrize('value', [-0.1, 1, 1.5, math.nan, '0.2'])
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


def test_the_label_that_some_of_the_data_sets_say_is_ignored_in_all(tmp_path):
    lesions(tmp_path, 4, 2)  # holds none of them
    both = ConcatDataset([make(tmp_path, LesionDataset, ignore_index=label) for label in (255, 7)])
    assert make_sampler(None, MultiImageMixDataset(both, [])).ignore_index == 7


def test_class_balanced_dataset_is_refused_with_what_to_use(tmp_path):
    lesions(tmp_path, 4, 2)

    class Plain(LesionDataset):
        get_cat_ids = BaseSegDataset.get_cat_ids  # as all data sets of MMSegmentation

    dataset = ClassBalancedDataset(make(tmp_path, Plain), oversample_thr=0.5, lazy_init=True)
    wanted = r"get_cat_ids.*sampler=dict\(_delete_=True, type='RareClassSampler'\)"
    with pytest.raises(ValueError, match=wanted):
        make_sampler(None, dataset)


# Repeat factors


@pytest.fixture(scope='module')
def towns(tmp_path_factory):
    """40 images of 8x9: all hold class 0, 20 class 1, 8 class 2, 3 class 3, a pixel or some of each."""
    root = tmp_path_factory.mktemp('towns')
    rng = np.random.default_rng(0)
    for kind in ('img', 'ann'):
        (root / kind).mkdir()
    for number in range(40):
        labels = np.zeros((8, 9), np.uint8)
        for c, images in ((1, 20), (2, 8), (3, 3)):
            if number < images:
                labels[2 * c, : rng.integers(1, 9)] = c
        labels[0, :4] = 255
        Image.fromarray(labels).save(root / 'ann' / f'{number:02d}.png')
        Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(root / 'img' / f'{number:02d}.jpg')
    return root


def make_repeating(root, dataset=None, **options):
    options = dict(rule='repeat_factor', threshold=0.3, seed=0, num_workers=0) | options
    return RareClassSampler(make(root) if dataset is None else dataset, **options)


def repeat_factor_of(held, threshold):
    """(r_i, class) of each image from (images, C), by plain loops."""
    share = [sum(column) / len(held) for column in zip(*held, strict=True)]
    found = []
    for image in held:
        factors = [math.sqrt(threshold / share[c]) for c, there in enumerate(image) if there]
        best = max([1.0, *factors])
        decides = [c for c, there in enumerate(image) if there and math.sqrt(threshold / share[c]) == best]
        found.append((best, decides[0] if best > 1 else None))
    return found


@pytest.mark.parametrize('threshold', [0.1, 0.3, 1])
def test_images_are_drawn_in_proportion_to_their_repeat_factor(towns, threshold):
    factors = repeat_factor_of((pixels_of(make(towns)) > 0).tolist(), threshold)
    drawn = draw(make_repeating(towns, threshold=threshold), 20_000)
    times = Counter(i for i, _ in drawn)
    total = sum(factor for factor, _ in factors)
    expected = [20_000 * factor / total for factor, _ in factors]
    assert max(expected) > 1.1 * min(expected)
    assert chisquare([times[i] for i in range(40)], expected).pvalue > 1e-3
    assert {(i, factors[i][1]) for i in range(40)} == set(drawn)


def test_an_image_whose_classes_are_all_frequent_is_drawn_for_none(towns):
    drawn = draw(make_repeating(towns, threshold=0.3), 2000)
    assert {c for i, c in drawn if i < 3} == {3}
    assert {c for i, c in drawn if 3 <= i < 8} == {2}
    assert {c for i, c in drawn if i >= 8} == {None}
    exactly = draw(make_repeating(towns, threshold=0.2), 2000)  # f_c = t: r_c = 1
    assert {c for _, c in exactly} == {3, None}


def test_a_repeated_image_counts_as_often_as_it_is_there(towns):
    one = make(towns, indices=1)
    dataset = ConcatDataset([one, make(towns), *[one] * 8])
    pixels = pixels_of(dataset)
    factors = repeat_factor_of((pixels > 0).tolist(), 0.3)
    drawn = Counter(i for i, _ in draw(make_repeating(None, dataset), 20_000))
    total = sum(factor for factor, _ in factors)
    expected = [20_000 * factors[i][0] / total for i in range(41)]
    expected[0] *= 9  # its copies are drawn as the first of them
    assert chisquare([drawn[i] for i in range(41)], expected).pvalue > 1e-3


def test_fewer_pixels_than_min_pixels_are_none(towns):
    pixels = pixels_of(make(towns))
    least = int(np.median(pixels[:8, 2]))
    sampler = make_repeating(towns, min_pixels=least)
    factors = repeat_factor_of((pixels >= least).tolist(), 0.3)
    assert {(i, factors[i][1]) for i in range(40)} == set(draw(sampler, 5000))
    for index in itertools.islice(sampler, 40):
        assert index.min_pixels == (1 if index.class_index is None else least)


@pytest.mark.parametrize('skipped', [0, 7, 256, 1000])
def test_a_stream_by_repeat_factors_resumes_and_depends_on_the_seed_alone(towns, skipped, monkeypatch):
    stream = draw(make_repeating(towns), 1100)
    assert stream != draw(make_repeating(towns, seed=1), 1100)
    monkeypatch.setattr(module, 'BLOCK', 7)
    sampler = make_repeating(towns)
    assert len(sampler) == 40
    sampler.skip(skipped)
    assert draw(sampler, 100) == stream[skipped : skipped + 100]


def repeating_on_a_rank(root):
    sampler = make_repeating(root)
    return draw(sampler, 500)


@pytest.mark.slow
def test_two_ranks_share_a_stream_by_repeat_factors(towns):
    ranks = on_ranks(2, repeating_on_a_rank, towns)
    stream = draw(make_repeating(towns), 1000)
    assert [one for pair in zip(*ranks, strict=True) for one in pair] == stream


def test_the_table_of_repeat_factors_tells_how_often_a_class_is_drawn(towns, logged):
    make_repeating(towns, threshold=0.3)
    (table,) = logged[20]
    factors = repeat_factor_of((pixels_of(make(towns)) > 0).tolist(), 0.3)
    total = sum(factor for factor, _ in factors)
    pole = next(line for line in table.splitlines() if 'pole' in line)
    assert f' {3} ' in pole
    assert f'{math.sqrt(0.3 / (3 / 40)):.3f}' in pole
    assert pole.count(f'{3 * factors[0][0] / total:.3%}') == 2
    car = next(line for line in table.splitlines() if 'car' in line)
    assert f'{5 * factors[5][0] / total:.3%}' in car
    assert f'{(3 * factors[0][0] + 5 * factors[5][0]) / total:.3%}' in car
    assert f'{32 / total:.3%}' in next(line for line in table.splitlines() if 'no rare class' in line)
    assert 30 not in logged


def test_a_threshold_below_every_class_draws_all_alike_with_a_warning(towns, logged):
    sampler = make_repeating(towns, threshold=0.05)
    times = Counter(draw(sampler, 8000))
    assert chisquare([times[i, None] for i in range(40)]).pvalue > 1e-3
    (warning,) = logged[30]
    assert 'no class is in less than threshold=0.05 of the images' in warning
    assert 'The rarest, pole, is in 0.075 of them' in warning


@pytest.mark.parametrize('value', [None, 0, -0.1, 1.01, math.nan, '0.1'])
def test_a_threshold_out_of_range_is_refused(towns, value):
    with pytest.raises(ValueError, match=f'threshold={value!r}, allowed are numbers above 0 and at most 1'):
        make_repeating(towns, threshold=value)


@pytest.mark.parametrize(
    ('rule', 'option', 'other'),
    [
        ('repeat_factor', dict(temperature=0.01), 'softmax'),
        ('repeat_factor', dict(uniform=0.25), 'softmax'),
        ('softmax', dict(threshold=0.1), 'repeat_factor'),
    ],
)
def test_an_option_of_another_rule_is_refused(towns, rule, option, other):
    ((name, value),) = option.items()
    words = rf"{name}={value} is no option of rule='{rule}', .*take rule='{other}'"
    with pytest.raises(ValueError, match=words):
        RareClassSampler(make(towns), rule=rule, **option)


def test_a_rule_that_there_is_not_is_refused(towns):
    with pytest.raises(ValueError, match=r"rule='lvis', allowed are 'softmax' and 'repeat_factor'\."):
        RareClassSampler(make(towns), rule='lvis')


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


@pytest.mark.parametrize('value', [0, -0.01, math.inf, math.nan, '0.01'])
def test_a_temperature_out_of_range_is_refused(root, value):
    with pytest.raises(ValueError, match=f'temperature={value!r}, allowed are finite numbers above 0'):
        make_sampler(root, temperature=value)


@pytest.mark.parametrize('value', [0, -3, 2.5, '9'])
def test_counts_out_of_range_are_refused(root, value):
    with pytest.raises(ValueError, match=f'min_pixels must be a whole number, at least 1, got {value!r}'):
        make_sampler(root, min_pixels=value)


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
    kept = [x for x in (*vars(sampler).values(), *sampler.draws) if isinstance(x, np.ndarray)]
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


def test_it_is_found_by_the_framework_by_plain_and_by_prefixed_name(root):
    init_default_scope('mmseg')
    for prefix in ('', 'mmseg_imbalance.'):
        config = dict(type=f'{prefix}RareClassSampler', min_pixels=9, num_workers=0)
        sampler = DATA_SAMPLERS.build(config, default_args=dict(dataset=make(root), seed=0))
        assert type(sampler) is RareClassSampler


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


@pytest.mark.parametrize(
    ('loop', 'workers'), [('IterBasedTrainLoop', 0), ('IterBasedTrainLoop', 1), ('UpstreamLoop', 2)]
)
def test_a_run_of_iterations_never_restarts_the_loader(train, loop, workers, monkeypatch):
    """MMEngine would warn, wait 2 s and start new workers each time. Two workers ask for 4 batches."""
    messages = []
    monkeypatch.setattr('mmengine.runner.loops.print_log', lambda text, *_, **__: messages.append(text))
    seen = train('run', dict(type=loop, max_iters=7, val_interval=100), workers).seen
    assert [len(batch) for batch in seen.values()] == [2] * 7
    assert not [text for text in messages if 'Reach the end' in text]
