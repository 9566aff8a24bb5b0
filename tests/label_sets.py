"""Data sets of label images, the files beside them and what counting finds there."""

import numpy as np
from mmengine.dataset import ConcatDataset
from mmseg.datasets import BaseSegDataset, MultiImageMixDataset
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image

from mmseg_imbalance.counting.dataset_parts import part_repeats, part_rows, part_starts

NAMES = ('sky', 'road', 'tree', 'car', 'sign')


class StreetDataset(BaseSegDataset):
    METAINFO = {'classes': NAMES, 'palette': [[i, i, i] for i in range(5)]}

    def get_cat_ids(self, index):
        return np.unique(self[index]['gt_seg_map']).tolist()


class ShiftedLoader(LoadAnnotations):
    """A loader of a user's own: 64-bit labels, one more than those in the file."""

    def _load_seg_map(self, results):
        super()._load_seg_map(results)
        labels = results['gt_seg_map'].astype(np.int64)
        results['gt_seg_map'] = np.where(labels == 255, 255, labels + 1)


def make(root, kind=StreetDataset, loader=None, **options):
    """The data set of a folder that `make_labels` or the fixture `save` has written."""
    files = dict(
        data_root=str(root),
        data_prefix=dict(img_path='img', seg_map_path='ann'),
        pipeline=[loader or LoadAnnotations()],
    )
    return kind(**files | options)


def of_classes(root, classes, **options):
    return make(root, BaseSegDataset, metainfo=dict(classes=classes), **options)


def write(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(labels)).save(path)


def make_labels(root, images=7, values=(0, 1, 2, 3, 255), seed=0, size=(37, 53)):
    """Label PNGs, each with some of the values, blocks and noise; and empty images."""
    random = np.random.default_rng(seed)
    for number in range(images):
        present = random.choice(values, 3)
        labels = np.kron(random.choice(present, (5, 3)), np.ones((8, 20), int))[: size[0], : size[1]]
        if number % 2:
            labels[: size[0] // 2] = random.choice(present, (size[0] // 2, size[1]))
        write(root / 'ann' / f'{number}.png', labels.astype(np.uint8))
        (root / 'img').mkdir(exist_ok=True)
        (root / 'img' / f'{number}.jpg').touch()  # never read
    return root


def spoil(root, data=None, labels=None, name='3.png'):
    path = root / 'ann' / name
    path.unlink()
    if labels is not None:
        write(path, labels)
    elif data is not None:
        path.write_bytes(data)
    return path


def numbers(frequency):
    return (
        frequency.pixels.tolist(),
        frequency.images.tolist(),
        frequency.image_pixels.tolist(),
        frequency.ignored,
    )


def dataset_rows(dataset):
    """(len(dataset),): which row of the counts of all images each index of a data set is."""
    repeats = part_repeats(dataset)
    occurs = np.concatenate(list(repeats.values())) > 0
    return (np.cumsum(occurs) - 1)[part_rows(dataset, part_starts(repeats)[0])]


def same(first, second):
    for name in ('classes', 'image_keys', 'num_images', 'dataset_images'):
        assert getattr(first, name) == getattr(second, name)
    for name in ('counts', 'repeats'):
        assert getattr(first, name).tolist() == getattr(second, name).tolist()
    assert numbers(first) == numbers(second)


def mosaic(dataset):
    return MultiImageMixDataset(ConcatDataset([dataset]), pipeline=[])
