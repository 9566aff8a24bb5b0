"""Predictions and truth that a test leaves in its work dir, for the pictures of a comparison."""

from __future__ import annotations

import os
from hashlib import sha1
from pathlib import Path
from typing import Any, NamedTuple

from mmseg_imbalance.registry import HOOKS

import numpy as np
from mmengine.hooks import Hook

from mmseg_imbalance.files import write_atomically
from mmseg_imbalance.ignored_label import UNSAID
from mmseg_imbalance.tables import names_and_colours

FOLDER = 'predictions'  # in the folder of the log
NO_CLASS = -1


class Prediction(NamedTuple):
    """An image of a test."""

    image: str  # its path
    truth: np.ndarray  # (H, W) int64, NO_CLASS where the label is ignored
    prediction: np.ndarray  # (H, W) int64
    palette: np.ndarray  # (C, 3) uint8 RGB, the colours of the classes


def save_prediction(folder: Path, saved: Prediction) -> Path:
    """Write one compressed file, whose name is made of that of the image."""
    path = folder / f'{os.path.basename(saved.image)}.{_digest(saved.image)}.npz'
    classes = len(saved.palette)
    kind = np.uint8 if classes < 255 else np.uint16
    truth = np.where((saved.truth >= 0) & (saved.truth < classes), saved.truth, np.iinfo(kind).max)
    arrays = dict(truth=truth.astype(kind), prediction=saved.prediction.astype(kind))
    with write_atomically(path, 'wb') as file:
        np.savez_compressed(file, image=os.path.abspath(saved.image), palette=saved.palette, **arrays)
    return path


def load_prediction(folder: Path, image: str) -> Prediction:
    """That of an image.

    Args:
        folder: where the test has written them.
        image: its file name, or its path where two images of the test have the same name.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: the file is damaged.
    """
    name = os.path.basename(image)
    # the name of an image may hold what a pattern would read otherwise
    found = sorted(path for path in folder.glob('*.npz') if path.name.rsplit('.', 2)[0] == name)
    if name != image:  # a path
        found = [path for path in found if _digest(image) in path.name]
    if not found:
        raise FileNotFoundError(f'{folder} holds no prediction of {image}')
    try:
        with np.load(found[0], allow_pickle=False) as archive:
            truth, prediction = archive['truth'], archive['prediction'].astype(np.int64)
            truth = np.where(truth == np.iinfo(truth.dtype).max, NO_CLASS, truth.astype(np.int64))
            return Prediction(str(archive['image']), truth, prediction, archive['palette'])
    except Exception as error:  # zipfile and zlib have their own
        raise ValueError(
            f'{found[0]} cannot be read as a prediction ({type(error).__name__}: {error}); test the model '
            'again with --save-predictions'
        ) from error


def _digest(path: str) -> str:
    return sha1(os.fspath(path).encode(), usedforsecurity=False).hexdigest()[:8]


@HOOKS.register_module()
class PredictionHook(Hook):
    """At test, write prediction and truth of each image into ``predictions`` in the folder of the log.

    ``mmseg-imbalance compare`` shows them beside the images. Labels are as the metric sees them, after
    ``label_map``, ``reduce_zero_label`` and transforms. Images are not copied; their paths are kept.

    Raises:
        ValueError: a sample of the test has no label or no path.
    """

    def after_test_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        metrics = runner.test_loop.evaluator.metrics
        ignored = (getattr(metric, 'ignore_index', None) for metric in metrics)
        ignored = next((label for label in ignored if label is not None), UNSAID)
        metainfo = getattr(runner.test_loop.dataloader.dataset, 'metainfo', {})
        for sample in outputs:
            if missing := [key for key in ('gt_sem_seg', 'img_path') if key not in sample]:
                raise ValueError(
                    f'predictions are saved with their truth and the path of the image, but samples of the '
                    f'test have no {" and no ".join(missing)}; --out saves the predictions alone'
                )
            prediction, truth = (
                sample.get(key).data.squeeze(0).cpu().numpy().astype(np.int64)
                for key in ('pred_sem_seg', 'gt_sem_seg')
            )
            _, palette = names_and_colours(metainfo, len(metainfo.get('classes') or ()))
            truth = np.where(truth == ignored, NO_CLASS, truth)
            folder = Path(runner.log_dir, FOLDER)
            save_prediction(folder, Prediction(sample.img_path, truth, prediction, palette))
