"""Predictions that a test saves, and how they are found again."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from mmseg_imbalance.predictions import NO_CLASS, Prediction, PredictionHook, load_prediction, save_prediction

PALETTE = np.arange(15, dtype=np.uint8).reshape(5, 3)


def saved(image='data/a.png', classes=5):
    rng = np.random.default_rng(len(image))
    truth, prediction = rng.integers(0, classes, (2, 7, 11))
    truth[0, :3] = NO_CLASS
    palette = np.resize(PALETTE, (classes, 3))
    return Prediction(image, truth, prediction, palette)


@pytest.mark.parametrize('classes', [2, 254, 255, 300])
def test_a_prediction_is_loaded_as_it_was_saved(tmp_path, classes):
    before = saved(classes=classes)
    before.truth[1, 0] = before.prediction[1, 0] = classes - 1
    save_prediction(tmp_path, before)
    after = load_prediction(tmp_path, 'a.png')
    assert after.image == os.path.abspath('data/a.png')
    for name in ('truth', 'prediction', 'palette'):
        assert np.array_equal(getattr(after, name), getattr(before, name))


def test_images_of_one_name_are_told_apart_by_their_paths(tmp_path):
    for image in ('x/a.png', 'yy/a.png', 'x/a[1].png', 'x/aa.png'):
        save_prediction(tmp_path, saved(image))
    for image in ('x/a.png', 'yy/a.png'):
        assert np.array_equal(load_prediction(tmp_path, image).prediction, saved(image).prediction)
    assert load_prediction(tmp_path, 'a[1].png').image.endswith('x/a[1].png')
    for image in ('z/a.png', 'b.png'):
        with pytest.raises(FileNotFoundError, match='holds no prediction of'):
            load_prediction(tmp_path, image)


def test_a_damaged_file_is_named(tmp_path):
    path = save_prediction(tmp_path, saved())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r'a\.png.*--save-predictions'):
        load_prediction(tmp_path, 'a.png')


def runner_with(tmp_path, ignore_index):
    loop = SimpleNamespace(
        evaluator=SimpleNamespace(metrics=[SimpleNamespace(ignore_index=ignore_index)]),
        dataloader=SimpleNamespace(
            dataset=SimpleNamespace(metainfo=dict(classes='abcde', palette=PALETTE.tolist()))
        ),
    )
    return SimpleNamespace(test_loop=loop, log_dir=str(tmp_path))


def sample(**fields):
    made = SegDataSample(**fields)
    made.set_metainfo(dict(img_path='data/a.png'))
    return made


@pytest.mark.parametrize('ignored', [255, 0])
def test_the_hook_leaves_out_the_label_that_the_metric_leaves_out(tmp_path, ignored):
    truth, prediction = torch.tensor([[[0, 1, 255, 9]]]), torch.tensor([[[0, 2, 3, 4]]])
    made = sample(gt_sem_seg=PixelData(data=truth), pred_sem_seg=PixelData(data=prediction))
    PredictionHook().after_test_iter(runner_with(tmp_path, ignored), 0, {}, [made])
    found = load_prediction(tmp_path / 'predictions', 'a.png')
    assert found.truth.tolist() == [[NO_CLASS if ignored == 0 else 0, 1, NO_CLASS, NO_CLASS]]
    assert found.prediction.tolist() == [[0, 2, 3, 4]]
    assert np.array_equal(found.palette, PALETTE)


def test_samples_without_a_label_are_an_error(tmp_path):
    made = sample(pred_sem_seg=PixelData(data=torch.zeros(1, 2, 2)))
    with pytest.raises(ValueError, match='have no gt_sem_seg'):
        PredictionHook().after_test_iter(runner_with(tmp_path, 255), 0, {}, [made])
