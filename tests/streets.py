"""A generated data set of streets, and one of lesions, for the tests of samplers and transforms."""

import label_sets
import numpy as np
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image

SIZE = (24, 32)
CLASSES = ('road', 'house', 'car', 'pole', 'bike')
SHARES = (0.55, 0.3, 0.1, 0.04, 0.01)  # about, of the pixels


class StreetDataset(label_sets.StreetDataset):
    METAINFO = {'classes': CLASSES, 'palette': [[i, i, i] for i in range(5)]}


class DropImage:
    """Leaves what is needed here: the labels, the index and the path, after crops if there are any."""

    def __call__(self, results):
        return {key: results[key] for key in ('gt_seg_map', 'sample_idx', 'seg_map_path')}


class AddImage:
    def __call__(self, results):
        return results | dict(img=np.zeros((*SIZE, 3), np.uint8))


def write_streets(root):
    """24 images of 32x24 whose classes have about the SHARES, with 255 here and there; the folder."""
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
    return label_sets.make(root, kind, pipeline=[LoadAnnotations(), DropImage()], **options)


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


def log_of(module, monkeypatch):
    """What a module logs from now on, by level."""
    messages = {}

    def print_log(message, logger, level=20):
        messages.setdefault(level, []).append(message)

    monkeypatch.setattr(module, 'print_log', print_log, raising=False)
    monkeypatch.setattr(module, 'warn', lambda message: print_log(message, 'current', 30))
    return messages
