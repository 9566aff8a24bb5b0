import json
from hashlib import sha256

import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from mmseg.datasets import CityscapesDataset
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image
from scipy.ndimage import label as components
from scipy.stats import spearmanr

from mmseg_imbalance.commands.make_scenes import main
from mmseg_imbalance.scenes.classes import RATES, planned_classes
from mmseg_imbalance.scenes.dataset import CITIES, RECIPE, generate
from mmseg_imbalance.scenes.street import make_image

CLASSES = CityscapesDataset.METAINFO['classes']
# Published counts of Cityscapes train: pixels per class, images that hold the class, ignored pixels.
PIXELS = [
    2036416525, 336090793, 1260636120, 36199498, 48454166, 67789506, 11477088, 30448193, 879783988,
    63949536, 221979646, 67326424, 7463162, 386328286, 14772328, 12990290, 12863955, 5449152,
    22861233,
]  # fmt: skip
IMAGES = [
    2934, 2811, 2934, 970, 1296, 2949, 1658, 2808, 2891, 1654, 2686, 2343, 1023, 2832, 359, 274,
    142, 513, 1646,
]  # fmt: skip
IGNORED = 715747311
DEMO = {'train': 120, 'val': 40, 'size': (256, 128)}
SMALL = {'train': 3, 'val': 2, 'size': (96, 48)}
REAL_CITIES = (
    'aachen bochum bremen cologne darmstadt dusseldorf erfurt hamburg hanover jena krefeld '
    'monchengladbach strasbourg stuttgart tubingen ulm weimar zurich frankfurt lindau munster '
    'berlin bielefeld bonn leverkusen mainz munich'
)


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp('demo')
    generate(out, **DEMO, seed=0)
    return out


def labels(out, split):
    paths = sorted((out / 'gtFine' / split).glob('*/*_gtFine_labelTrainIds.png'))
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def content(out):
    return {path.relative_to(out): path.read_bytes() for path in out.rglob('*.png')}


def test_layout_names_and_formats_are_those_of_cityscapes(demo):
    for split in ('train', 'val'):
        images = sorted((demo / 'leftImg8bit' / split).glob('*/*'))
        annotations = sorted((demo / 'gtFine' / split).glob('*/*'))
        assert len(images) == len(annotations) == DEMO[split]
        for image, annotation in zip(images, annotations, strict=True):
            city, sequence, frame = image.name.removesuffix('_leftImg8bit.png').split('_')
            assert (len(sequence), frame) == (6, '000019')
            assert city == image.parent.name == annotation.parent.name
            assert annotation.name == f'{city}_{sequence}_{frame}_gtFine_labelTrainIds.png'
        with Image.open(images[0]) as image, Image.open(annotations[0]) as annotation:
            assert (image.mode, annotation.mode) == ('RGB', 'L')
            assert image.size == annotation.size == DEMO['size']


def test_no_city_is_a_real_one():
    assert not any(city in REAL_CITIES for split in CITIES.values() for city in split)
    assert set(CITIES['train']).isdisjoint(CITIES['val'])


def test_the_frameworks_dataset_and_loading_read_it(demo):
    for split in ('train', 'val'):
        dataset = CityscapesDataset(
            data_root=str(demo),
            data_prefix={'img_path': f'leftImg8bit/{split}', 'seg_map_path': f'gtFine/{split}'},
            pipeline=[LoadImageFromFile(), LoadAnnotations()],
        )
        assert len(dataset) == DEMO[split]
        for item in dataset:
            assert item['img'].shape[:2] == item['gt_seg_map'].shape == (128, 256)
            assert set(np.unique(item['gt_seg_map'])) <= {*range(19), 255}


@pytest.mark.parametrize(('split', 'least'), [('train', 5), ('val', 2)])
def test_every_class_occurs_in_several_images(demo, split, least):
    maps = labels(demo, split)
    for index, name in enumerate(CLASSES):
        assert (maps == index).any(axis=(1, 2)).sum() >= least, name


@pytest.mark.parametrize('train', [20, 60, 200, 1000])
def test_planned_classes_keep_their_rate_in_every_split_size(train):
    for seed in range(5):
        planned = [planned_classes(seed, 'train', index) for index in range(train)]
        for name, (rate, _) in RATES.items():
            count = sum(name in classes for classes in planned)
            assert count >= 1
            assert abs(count - rate * train) <= 2 + 0.02 * train


def test_long_tail_follows_the_real_one(demo):
    maps = labels(demo, 'train')
    share = np.array([(maps == index).mean() for index in range(19)])
    real = np.array(PIXELS) / (sum(PIXELS) + IGNORED)
    held = np.array([(maps == index).any(axis=(1, 2)).mean() for index in range(19)])
    assert spearmanr(share, real).statistic > 0.9
    assert spearmanr(held, IMAGES).statistic > 0.8
    assert (np.abs(np.log(share / real)) < np.log(3)).all(), share / real
    assert 0.08 < (maps == 255).mean() < 0.15


@pytest.mark.parametrize('name', ['car', 'person'])
def test_objects_are_near_and_far(demo, name):
    sizes = []
    for mask in labels(demo, 'train') == CLASSES.index(name):
        regions, _ = components(mask)
        sizes += np.bincount(regions.ravel())[1:].tolist()
    small, large = np.quantile(sizes, [0.1, 0.95])
    assert large > 30 * small
    assert max(sizes) > 100 * max(min(sizes), 4)


@pytest.mark.parametrize(
    ('index', 'size', 'picture', 'labels'),
    [
        (0, (128, 64), 'd10df5016029121c', 'f2b8ed087f3d5c14'),
        (1, (128, 64), '0fdcc5c1dbe00f8d', '68781f0daf861931'),
    ],
)
def test_a_seed_gives_the_pixels_that_it_has_always_given(index, size, picture, labels):
    pair = make_image(7, 'train', index, size)
    assert [sha256(array.tobytes()).hexdigest()[:16] for array in pair] == [picture, labels]


def test_same_seed_same_bytes_whatever_the_workers(tmp_path):
    generate(tmp_path / 'a', **SMALL, seed=3, workers=1)
    generate(tmp_path / 'b', **SMALL, seed=3, workers=2)
    generate(tmp_path / 'c', **SMALL, seed=4, workers=1)
    a, b, c = (content(tmp_path / name) for name in 'abc')
    assert a == b
    assert a.keys() == c.keys()
    assert all(a[path] != c[path] for path in a)


def test_second_call_writes_nothing_and_an_interrupted_one_is_completed(tmp_path, capsys):
    arguments = [str(tmp_path), '--train', '3', '--val', '2', '--size', '96x48']
    assert main(arguments) == 0
    before = content(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    capsys.readouterr()
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == times
    assert '3 train and 2 val' in capsys.readouterr().out
    for path in list(before)[:3]:
        (tmp_path / path).unlink()
    generate(tmp_path, **SMALL)
    assert content(tmp_path) == before


def test_another_recipe_or_a_foreign_folder_is_refused(tmp_path, capsys):
    out, foreign = tmp_path / 'out', tmp_path / 'foreign'
    generate(out, **SMALL, workers=1)
    before = content(out)
    with pytest.raises(ValueError, match=r"'seed': 0.*'seed': 1"):
        generate(out, **SMALL, seed=1)
    foreign.mkdir()
    (foreign / 'notes.txt').write_text('mine')
    with pytest.raises(ValueError, match='not empty'):
        generate(foreign, **SMALL)
    with pytest.raises(ValueError, match='is a file'):
        generate(foreign / 'notes.txt', **SMALL)
    (out / RECIPE).write_text('{')
    with pytest.raises(ValueError, match='cannot be read'):
        generate(out, **SMALL)
    with pytest.raises(SystemExit) as stopped:
        main([str(foreign)])
    assert stopped.value.code == 2
    assert 'not empty' in capsys.readouterr().err
    assert content(out) == before


@pytest.mark.parametrize(
    'arguments',
    [
        ['--size', '512'],
        ['--size', '128x10'],
        ['--train', '0'],
        ['--seed', '-1'],
        ['--workers', '0'],
    ],
)
def test_bad_arguments_end_with_one_clear_error(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / 'out'), *arguments])
    assert stopped.value.code == 2
    assert arguments[1].split('x')[-1] in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_full_cityscapes_size(tmp_path):
    generate(tmp_path, train=1, val=1, size=(2048, 1024), workers=1)
    image, annotation = sorted(tmp_path.rglob('*.png'), key=lambda path: 'gtFine' in str(path))[::2]
    assert Image.open(image).size == Image.open(annotation).size == (2048, 1024)
    assert json.loads((tmp_path / RECIPE).read_text())['size'] == [2048, 1024]
