"""The bias that makes argmax aim at the expected mIoU: against a search, and its laws."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseg_imbalance.class_bias import expected_iou, fit_class_bias


def unsure(seed=0, pixels=20000, classes=3):
    """Logits of a model that is seldom sure of its rare classes."""
    rng = np.random.default_rng(seed)
    prior = np.log(0.05 ** np.arange(classes) + 0.002)
    truth = rng.choice(classes, pixels, p=np.exp(prior) / np.exp(prior).sum())
    evidence = rng.normal(0, 1, (pixels, classes)) + 1.5 * np.eye(classes)[truth]
    return torch.tensor(1.5 * evidence + prior).float(), torch.tensor(truth)


def mean_iou(logits, truth):
    classes = logits.shape[1]
    decided = logits.argmax(1)
    counts = torch.bincount(truth * classes + decided, minlength=classes**2).view(classes, classes).double()
    return (counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())).mean().item()


def hard(logits, bias):
    return torch.nn.functional.one_hot((logits + torch.tensor(bias)).argmax(1), logits.shape[1]).float()


def test_expected_iou_of_certain_probabilities_is_the_iou():
    logits, truth = unsure()
    certain = torch.nn.functional.one_hot(truth, 3).float()
    assert expected_iou(certain, hard(logits, np.zeros(3))).mean().item() == pytest.approx(
        mean_iou(logits, truth), abs=1e-6
    )


def test_expected_iou_by_hand():
    probabilities = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.0, 1.0]])
    decisions = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    # class 0: 0.75 + 0.5 over 1.25 + 2 - 1.25; class 1: 1 over 1.75 + 1 - 1
    assert expected_iou(probabilities, decisions).tolist() == pytest.approx([1.25 / 2, 1 / 1.75])


def test_two_classes_have_the_bias_that_a_search_finds():
    logits, _ = unsure(classes=2)
    found = fit_class_bias(logits)
    p = logits.softmax(1)
    tried = np.arange(-4, 4, 0.01)
    expected = [expected_iou(p, hard(logits, np.float32([-b / 2, b / 2]))).mean().item() for b in tried]
    assert found.after.mean() >= max(expected) - 2e-4
    assert found.bias[1] - found.bias[0] == pytest.approx(tried[np.argmax(expected)], abs=0.15)


@pytest.mark.parametrize('seed', range(3))
def test_three_classes_come_near_the_best_of_a_grid_and_the_truth_agrees(seed):
    logits, truth = unsure(seed)
    p, grid = logits.softmax(1), np.arange(-1, 4.01, 0.25)
    best = max(expected_iou(p, hard(logits, np.float32([0, a, b]))).mean().item() for a in grid for b in grid)
    found = fit_class_bias(logits)
    assert found.after.mean() >= best - 2e-3
    assert found.after.mean() > found.before.mean() + 0.02
    # the logits are not scaled to be the truth's log-odds: the belief is not exact, the gain is there
    assert mean_iou(logits + torch.tensor(found.bias), truth) > mean_iou(logits, truth) + 0.02


def test_a_threshold_of_two_classes_is_where_the_odds_are_the_ious():
    # where both unions are far from equal, the rare class is taken at p / (1 - p) > its IoU
    rng = np.random.default_rng(0)
    p = rng.beta(0.05, 2, 200000)
    found = fit_class_bias(torch.tensor(np.stack([np.log1p(-p), np.log(p + 1e-12)], 1)).float())
    threshold = np.exp(found.bias[0] - found.bias[1])
    assert threshold == pytest.approx(found.after[1], rel=0.1)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.floats(0.2, 4))
def test_it_never_expects_less_than_argmax_and_its_mean_is_0(seed, classes, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(500, classes, generator=generator)
    logits -= torch.arange(classes) * scale
    found = fit_class_bias(logits)
    assert np.nanmean(found.after) >= np.nanmean(found.before)
    assert found.bias.sum() == pytest.approx(0, abs=1e-4)
    moved = ~np.isnan(found.before)
    assert (found.bias[~moved] == 0).all()
    assert ((found.pixels >= 20) == moved).all()


def test_a_constant_added_to_all_logits_of_a_pixel_changes_nothing():
    logits, _ = unsure(pixels=5000)
    shifted = fit_class_bias(logits + 5 * torch.randn(5000, 1, generator=torch.Generator().manual_seed(0)))
    np.testing.assert_allclose(shifted.bias, fit_class_bias(logits).bias, atol=0.02)


def test_a_class_that_is_not_expected_keeps_its_logits():
    logits, _ = unsure()
    logits = torch.cat([logits, logits.new_full((len(logits), 1), -20.0)], 1)
    found = fit_class_bias(logits)
    assert found.bias[3] == 0
    assert np.isnan(found.before[3])
    assert np.isnan(found.after[3])
    np.testing.assert_allclose(found.bias[:3], fit_class_bias(logits[:, :3]).bias, atol=0.02)


def test_a_model_that_is_sure_needs_no_bias():
    truth = torch.randint(3, (5000,), generator=torch.Generator().manual_seed(0))
    logits = 40.0 * torch.nn.functional.one_hot(truth, 3)
    found = fit_class_bias(logits)
    assert found.after == pytest.approx(1)
    assert (found.bias == 0).all()


@pytest.mark.parametrize('shape', [(5,), (5, 1), (0, 3), (2, 3, 4, 4)])
def test_logits_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r'\(N, C\), are needed'):
        fit_class_bias(torch.zeros(shape))


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_logits_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match='diverged'):
        fit_class_bias(torch.tensor([[0.0, 1.0], [bad, 0.0]]))
