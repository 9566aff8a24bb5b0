"""Counting the classes of label files beside decoding the same files with the same workers."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmseg.datasets import BaseSegDataset
from PIL import Image

from mmseg_imbalance.benchmark.case import Case, GivenTrial, Row, by
from mmseg_imbalance.counting import count_classes
from mmseg_imbalance.counting.annotations import find_annotations
from mmseg_imbalance.counting.label_files import decode
from mmseg_imbalance.counting.rows import AnnotationRows, count_rows
from mmseg_imbalance.counting.rows import Row as FileRow
from mmseg_imbalance.scenes.street import make_image

CLASSES = 19
DISTINCT = 8  # scenes take longer to draw than to count
KINDS = ('street', 'dense')


class DecodedFiles(AnnotationRows):
    """In place of the counts of a file, the number of its pixels."""

    def __getitem__(self, position):
        annotation = self.annotations[position]
        labels, _ = decode(annotation.path, annotation.steps.load[0])
        return FileRow(position, np.array([labels.size]), 0)


def write_labels(folder, kind, size, images):
    """Files in ``folder``: scenes of large regions, or pixels drawn one by one; pixels of each class."""
    labels = [draw(kind, size, index) for index in range(min(images, DISTINCT))]
    for part in ('images', 'labels'):
        (folder / part).mkdir(parents=True)
    for index in range(images):
        (folder / 'images' / f'{index}.jpg').touch()  # never read
        Image.fromarray(labels[index % DISTINCT]).save(folder / 'labels' / f'{index}.png')
    counts = np.stack([np.bincount(each.ravel(), minlength=256) for each in labels])
    return counts[np.arange(images) % DISTINCT].sum(0)[:CLASSES]


def draw(kind, size, index):
    if kind == 'street':
        return make_image(0, 'train', index, size[::-1])[1]
    return np.random.default_rng(index).integers(CLASSES, size=size, dtype=np.uint8)


def counting_cases(folder, args):
    """Cases on files that are written into ``folder`` first."""
    return [
        partial(counting_case, dataset, pixels, kind, size, workers)
        for size in args.size
        for kind in KINDS
        for dataset, pixels in [label_dataset(Path(folder, kind, by(*size)), kind, size, args.images)]
        for workers in args.workers
    ]


def label_dataset(folder, kind, size, images):
    """A data set of files that are written, and the pixels of each class, (C,)."""
    pixels = write_labels(folder, kind, size, images)
    dataset = BaseSegDataset(
        data_root=str(folder),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        metainfo=dict(classes=[f'class {index}' for index in range(CLASSES)]),
        pipeline=[dict(type='mmseg.LoadAnnotations')],
    )
    return dataset, torch.from_numpy(pixels)


def counting_case(dataset, pixels, kind, size, workers, args):
    """The files of a data set decoded, and counted by `count_classes` without a cache."""
    annotations = find_annotations(dataset)[1]
    images = len(annotations)
    decoded = DecodedFiles(annotations, CLASSES)

    def decode_all():
        return [torch.tensor([row.counts[0] for row in count_rows(decoded, range(images), workers, False)])]

    def count_all():
        return [torch.tensor(count_classes(dataset, num_workers=workers).pixels)]

    rows = [
        Row('decode alone', partial(trial, decode_all, torch.full((images,), size[0] * size[1]))),
        Row('count_classes', partial(trial, count_all, pixels), ours=True),
    ]
    return Case(f'{images} files {by(*size)}', f'{kind}, {workers} workers', rows, files=images, memory=False)


def trial(run, truth):
    return GivenTrial(run, run, lambda: [truth])
