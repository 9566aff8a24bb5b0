from pathlib import Path

from mmseg_imbalance.registry import DATASETS

import numpy as np
import pytest
import torch
from mmengine.structures import PixelData
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.evaluation import IoUMetric
from mmseg.structures import SegDataSample
from PIL import Image

from mmseg_imbalance import count_classes
from mmseg_imbalance.datasets import CamVidDataset, MergedClassDataset

CAMVID = Path(__file__).parents[2] / 'shared' / 'camvid'
# Published counts of the 367 train images, classes 0..10, then unlabelled.
PUBLISHED = [
    10682767, 14750079, 623349, 20076880, 2845085, 6166762, 743859, 714595, 3719877, 405385, 184967,
    2503995,
]  # fmt: skip


@pytest.fixture
def root(tmp_path):
    """One image whose label holds every raw value 0..11, row r being value r."""
    for folder in ('images/train', 'annotations/train'):
        (tmp_path / folder).mkdir(parents=True)
    Image.new('RGB', (5, 12)).save(tmp_path / 'images/train/a.jpg')
    label = np.repeat(np.arange(12, dtype=np.uint8)[:, None], 5, axis=1)
    Image.fromarray(label).save(tmp_path / 'annotations/train/a.png')
    return tmp_path


def build(root, split='train', **kwargs):
    return CamVidDataset(
        data_root=str(root),
        data_prefix={'img_path': f'images/{split}', 'seg_map_path': f'annotations/{split}'},
        pipeline=[LoadAnnotations()],
        **kwargs,
    )


def test_unlabelled_is_loaded_as_255(root):
    dataset = build(root)
    assert dataset[0]['gt_seg_map'][:, 0].tolist() == [*range(11), 255]
    assert dataset.ignore_index == 255


@pytest.mark.parametrize(
    ('classes', 'rows', 'palette'),
    [
        (('road', 'car'), {3: 0, 8: 1}, [[128, 64, 128], [64, 0, 128]]),
        (['bicyclist', 'sky'], {10: 0, 0: 1}, [[0, 128, 192], [128, 128, 128]]),
        (('sky',), {0: 0}, [[128, 128, 128]]),
    ],
)
def test_chosen_classes_and_unlabelled_are_mapped_together(root, classes, rows, palette):
    dataset = build(root, metainfo={'classes': classes})
    expected = [rows.get(raw, 255) for raw in range(12)]
    assert dataset[0]['gt_seg_map'][:, 0].tolist() == expected
    assert dataset.metainfo['palette'] == palette


@pytest.mark.parametrize('metainfo', [None, {'classes': ('car', 'road')}])
def test_public_label_maps_agree(root, metainfo):
    dataset = build(root, metainfo=metainfo)
    assert dataset.label_map == dataset.metainfo['label_map'] == dataset[0]['label_map']
    assert dataset.label_map == dataset.get_data_info(0)['label_map']
    assert dataset.label_map[11] == 255
    assert CamVidDataset.get_label_map() == {11: 255}


def test_unknown_class_is_refused(root):
    with pytest.raises(ValueError, match='not a subset'):
        build(root, metainfo={'classes': ('road', 'lorry')})


def test_is_found_by_its_plain_name_and_has_a_colour_per_class(root):
    dataset = DATASETS.build(
        {
            'type': 'CamVidDataset',
            'data_root': str(root),
            'data_prefix': {'img_path': 'images/train', 'seg_map_path': 'annotations/train'},
        }
    )
    assert len(dataset) == 1
    assert len({tuple(colour) for colour in dataset.metainfo['palette']}) == 11


def test_default_metric_ignores_unlabelled(root):
    dataset = build(root)
    truth = torch.from_numpy(dataset[0]['gt_seg_map'])[None].long()
    prediction = truth.clone()
    prediction[truth == 255] = 3  # whatever is predicted where nothing is labelled is no error
    sample = SegDataSample(gt_sem_seg=PixelData(data=truth), pred_sem_seg=PixelData(data=prediction))
    metric = IoUMetric()
    metric.dataset_meta = dataset.metainfo
    metric.process({}, [sample.to_dict()])
    assert metric.evaluate(size=1)['mIoU'] == 100


def merged(root, classes_of_labels, **options):
    prefix = dict(img_path='images/train', seg_map_path='annotations/train')
    return MergedClassDataset(
        classes_of_labels, data_root=str(root), data_prefix=prefix, pipeline=[LoadAnnotations()], **options
    )


def test_merged_classes_are_loaded_and_counted_as_one(root):
    dataset = merged(root, ['background', *['defect'] * 11])
    assert dataset.metainfo['classes'] == ('background', 'defect')
    assert dataset[0]['gt_seg_map'][:, 0].tolist() == [0] + [1] * 11
    frequency = count_classes(dataset)
    assert frequency.classes == ('background', 'defect')
    assert frequency.pixels.tolist() == [5, 55]


def test_classes_of_metainfo_set_the_order_and_others_are_ignored(root):
    names = ['sky', *['thing'] * 5, *['stuff'] * 6]
    dataset = merged(root, names, metainfo=dict(classes=('stuff', 'sky')))
    assert dataset[0]['gt_seg_map'][:, 0].tolist() == [1, *[255] * 5, *[0] * 6]
    assert count_classes(dataset).pixels.tolist() == [30, 5]


def test_a_label_without_a_class_is_an_error_of_counting(root):
    with pytest.raises(ValueError, match='labels out of range'):
        count_classes(merged(root, ['background', *['defect'] * 10]))


def test_255_stays_ignored(root):
    path = root / 'annotations/train/a.png'
    label = np.array(Image.open(path))
    label[:2] = 255
    Image.fromarray(label).save(path)
    dataset = merged(root, ['background', *['defect'] * 11])
    assert dataset[0]['gt_seg_map'][:, 0].tolist() == [255] * 2 + [1] * 10


@pytest.mark.parametrize('scope', ['', 'mmseg_imbalance.'])
def test_merging_is_built_from_a_config(root, scope):
    names = ['background', *['defect'] * 11]
    prefix = dict(img_path='images/train', seg_map_path='annotations/train')
    options = dict(classes_of_labels=names, data_root=str(root), data_prefix=prefix)
    dataset = DATASETS.build(dict(type=f'{scope}MergedClassDataset', **options))
    assert dataset.get_data_info(0)['label_map'] == {0: 0} | dict.fromkeys(range(1, 12), 1)


@pytest.mark.parametrize(
    ('names', 'metainfo', 'message'),
    [
        ('background', None, "classes_of_labels='background'"),
        ([], None, r'classes_of_labels=\[\]'),
        (['sky', 3], None, r"classes_of_labels=\['sky', 3\]"),
        (['sky', 'road'], dict(classes=('sky', 'lorry')), r"no label is of \['lorry'\]"),
    ],
)
def test_merging_that_names_no_classes_is_refused(root, names, metainfo, message):
    with pytest.raises(ValueError, match=message):
        merged(root, names, metainfo=metainfo)


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f'real CamVid is not at {CAMVID}')
@pytest.mark.parametrize(('split', 'images'), [('train', 367), ('val', 101)])
def test_real_camvid(split, images):
    dataset = build(CAMVID, split)
    assert len(dataset) == images
    counts = sum(np.bincount(item['gt_seg_map'].ravel(), minlength=256) for item in dataset)
    assert counts.sum() == images * 480 * 360
    assert counts[11:255].sum() == 0
    if split == 'train':
        assert [*counts[:11].tolist(), int(counts[255])] == PUBLISHED
