import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F

from mmseg_imbalance import functional
from mmseg_imbalance.ops import SoftStats, soft_stats

WEIGHT = torch.tensor([0.2, 3.0, 1.0, 0.0, 1.7], dtype=torch.float64)


@pytest.fixture
def batch(make_batch):
    logits, target = make_batch((5, 7), (13, 17))
    stats = soft_stats(logits, target, with_log_prob=True)
    return logits, target, stats, oracle.soft_stats(logits.numpy(), target.numpy())


@pytest.mark.parametrize('smoothing', [0.0, 0.13])
@pytest.mark.parametrize('weight', [None, WEIGHT])
def test_cross_entropy_is_that_of_torch_and_of_the_loops(batch, weight, smoothing):
    logits, target, stats, sums = batch
    value = functional.cross_entropy(stats, weight, smoothing)
    resized = F.interpolate(logits, target.shape[1:], mode='bilinear')
    torch.testing.assert_close(
        value, F.cross_entropy(resized, target, weight, ignore_index=255, label_smoothing=smoothing)
    )
    plain = np.ones(5) if weight is None else weight.numpy()
    assert value.item() == pytest.approx(oracle.cross_entropy(sums, plain, smoothing), rel=1e-10)


@pytest.mark.parametrize('absent', ['include', 'ignore'])
@pytest.mark.parametrize('reduction', ['image', 'batch'])
@pytest.mark.parametrize('gamma', [0.75, 1.0, 1.5])
@pytest.mark.parametrize(('alpha', 'beta'), [(0.3, 0.7), (0.9, 0.2), (0.5, 0.5)])
def test_tversky_losses_are_those_of_the_loops(batch, alpha, beta, gamma, reduction, absent):
    *_, stats, sums = batch
    if reduction == 'batch':
        stats = stats.sum_images()
    index = functional.tversky(stats, alpha, beta, smooth=2.5)
    value = functional.region_loss(index, stats.truth, WEIGHT, gamma=gamma, absent_classes=absent)
    expected = oracle.region_loss(sums, WEIGHT.numpy(), alpha, beta, 2.5, gamma, reduction, absent)
    assert value.item() == pytest.approx(expected, rel=1e-9)


def test_dice_and_jaccard_are_written_out_as_in_the_textbook(batch):
    *_, stats, _ = batch
    i, p, t = stats.intersection, stats.prediction, stats.truth
    torch.testing.assert_close(functional.dice(stats, 3.0), (2 * i + 3) / (p + t + 3))
    torch.testing.assert_close(functional.jaccard(stats, 3.0), (i + 3) / (p + t - i + 3))
    torch.testing.assert_close(functional.tversky(stats, 0.5, 0.5, 1.5), functional.dice(stats, 3.0))
    torch.testing.assert_close(functional.tversky(stats, 1, 1, 3.0), functional.jaccard(stats, 3.0))


@pytest.mark.parametrize('absent', ['include', 'ignore'])
@pytest.mark.parametrize('reduction', ['image', 'batch'])
@pytest.mark.parametrize('weight', [None, WEIGHT])
@pytest.mark.parametrize('smooth', [0.0, 2.5])
def test_generalized_dice_is_that_of_the_loops(batch, weight, reduction, absent, smooth):
    *_, stats, sums = batch
    if reduction == 'batch':
        stats = stats.sum_images()
    value = (1 - functional.generalized_dice(stats, weight, smooth, absent)).mean()
    plain = None if weight is None else weight.numpy()
    expected = oracle.generalized_dice(sums, plain, smooth, reduction, absent)
    assert value.item() == pytest.approx(expected, rel=1e-9)


def test_generalized_dice_does_not_change_with_the_scale_of_its_weights(batch):
    *_, stats, _ = batch
    for weight in (None, WEIGHT):
        index = functional.generalized_dice(stats, weight, 2.5)
        assert ((index > 0) & (index < 1)).all()
    torch.testing.assert_close(index, functional.generalized_dice(stats, 1e4 * WEIGHT, 2.5))


def test_swapping_alpha_and_beta_changes_an_asymmetric_case(batch):
    *_, stats, _ = batch
    one, other = functional.tversky(stats, 0.3, 0.7), functional.tversky(stats, 0.7, 0.3)
    assert (one - other).abs().max() > 0.01


def test_alpha_weighs_false_positives_and_beta_false_negatives():
    # everything predicted as class 0, half of it truly class 0: class 0 has false positives, class 1 misses
    logits = torch.tensor([50.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    stats = soft_stats(logits, torch.tensor([[[0, 0], [1, 1]]]))
    torch.testing.assert_close(functional.tversky(stats, 1.0, 0.0), torch.tensor([[3 / 5, 1.0]]))
    torch.testing.assert_close(functional.tversky(stats, 0.0, 1.0), torch.tensor([[1.0, 1 / 3]]))


def test_dice_without_a_true_pixel_still_charges_false_positives():
    logits = torch.tensor([50.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 8, 8)
    stats = soft_stats(logits, torch.ones(1, 8, 8, dtype=torch.long))
    assert functional.dice(stats)[0, 0] < 0.02


def test_no_weight_anywhere_is_zero_with_zero_gradient(make_batch):
    logits, target = make_batch()
    target = torch.where(target == 3, target, 255)  # only the class of weight 0
    leaf = logits.requires_grad_()
    stats = soft_stats(leaf, target)
    index = functional.dice(stats, smooth=0.0)
    value = functional.cross_entropy(stats, WEIGHT) + functional.region_loss(
        index, stats.truth, WEIGHT, absent_classes='ignore'
    )
    for smooth in (0.0, 1.0):
        value = value + (1 - functional.generalized_dice(stats, WEIGHT, smooth)).sum()
    value.backward()
    assert value == 0
    assert (leaf.grad == 0).all()


def test_label_smoothing_without_its_sum_says_what_to_ask_for(make_batch):
    with pytest.raises(ValueError, match='with_log_prob=True'):
        functional.cross_entropy(soft_stats(*make_batch()), label_smoothing=0.1)


def perfect(make_batch, dtype=torch.float32, weighted=False):
    """Sums of a prediction without an error; weights make the sums round, each in its own order."""
    logits, target = make_batch((97, 131), (97, 131), dtype=dtype)
    logits = (logits * 0).scatter_(1, target.where(target != 255, 0)[:, None], 1e3).requires_grad_()
    weight = torch.rand(target.shape, generator=torch.Generator().manual_seed(0)) if weighted else None
    return logits, soft_stats(logits, target, pixel_weight=weight)


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('smooth', [0.0, 1.0])
@pytest.mark.parametrize('gamma', [0.01, 0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.float64])
def test_a_perfect_prediction_costs_nothing_with_any_gamma(make_batch, dtype, gamma, smooth, weighted):
    logits, stats = perfect(make_batch, dtype, weighted)
    for alpha, beta in [(0.5, 0.5), (1.0, 1.0), (0.3, 0.7), (0.0, 1.0)]:
        for sums in (stats, stats.sum_images()):
            error = functional.tversky_error(sums, alpha, beta, smooth)
            loss = functional.region_parts(error, sums.truth, gamma=gamma).sum()
            assert loss + 1e-6 >= 0
            assert loss <= (0.03 if weighted else 0), (alpha, beta)
            index = functional.tversky(sums, alpha, beta, smooth)
            assert functional.region_loss(index, sums.truth, gamma=gamma) <= (0.03 if weighted else 0)
            (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
            assert gradient.isfinite().all()
    loss = functional.generalized_dice_parts(stats, gamma=gamma, smooth=smooth).sum()
    assert -1e-6 <= loss <= (0.03 if weighted else 0)
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize('gamma', [0.1, 0.5])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_above_rounding_a_small_gamma_is_the_plain_power(gamma, dtype):
    error = torch.logspace(-5, 0, 50, dtype=dtype)[None].requires_grad_()
    truth = torch.ones_like(error)
    parts = functional.region_parts(error, truth, gamma=gamma)
    torch.testing.assert_close(parts, error[0] ** gamma / 50)
    below = torch.logspace(-14, -5, 100, dtype=dtype)[None]
    values = functional.region_parts(below, truth[:, :1].expand_as(below), gamma=gamma)
    assert (values.diff() > 0).all()
    assert (values * 100 <= (1 + 1e-6) * below[0] ** gamma).all()
    slope = torch.autograd.grad(parts.sum(), error)[0]
    assert slope.isfinite().all()


def test_an_error_that_rounding_hides_in_the_index_is_kept():
    """3 pixels of ten million."""
    sums = torch.tensor([[1e7 - 3]]), torch.tensor([[1e7]]), torch.tensor([[1e7]])
    stats = SoftStats(nll=sums[0], intersection=sums[0], prediction=sums[1], truth=sums[2], correct=sums[0])
    torch.testing.assert_close(functional.tversky_error(stats, 0.5, 0.5, 0.0), torch.tensor([[3e-7]]))
    torch.testing.assert_close(
        1 - functional.tversky(stats, 0.5, 0.5, 0.0), torch.tensor([[3e-7]]), rtol=0.3, atol=0
    )


@pytest.mark.parametrize('weight', [torch.ones(1), torch.tensor(2.0), torch.ones(2, 5), torch.ones(4)])
def test_class_weights_of_another_shape_are_not_spread(batch, weight):
    *_, stats, _ = batch
    index = functional.dice(stats)
    for call in (
        lambda: functional.cross_entropy(stats, weight),
        lambda: functional.region_loss(index, stats.truth, weight),
        lambda: functional.generalized_dice(stats, weight),
    ):
        with pytest.raises(ValueError, match=r'class_weight must be of shape \(5,\), one number per class'):
            call()


@pytest.mark.parametrize('gamma', [0.2, 0.7])
def test_a_saturated_generalized_dice_is_not_negative(make_batch, gamma):
    worst = []
    for seed in range(20):
        logits, target = make_batch((97, 131), (97, 131), seed=seed, dtype=torch.float32)
        logits = (logits * 0).scatter_(1, target.where(target != 255, 0)[:, None], 40.0).requires_grad_()
        weight = torch.rand(target.shape, generator=torch.Generator().manual_seed(seed))
        stats = soft_stats(logits, target, pixel_weight=weight)
        loss = functional.generalized_dice_parts(stats, gamma=gamma).sum()
        loss.backward()
        assert logits.grad.isfinite().all()
        worst.append(loss.item())
    assert min(worst) >= 0


@pytest.mark.parametrize('gamma', [0.1, 0.5])
def test_the_straight_line_near_0_meets_the_power(gamma):
    end = 32 * torch.finfo(torch.float64).eps
    error = end * torch.tensor([[1 - 1e-6, 1 + 1e-6, 0.5]], dtype=torch.float64)
    below, above, half = (2 + 1) * functional.region_parts(error, torch.ones_like(error), gamma=gamma)
    assert below.item() == pytest.approx(above.item(), rel=1e-5)
    assert half.item() == pytest.approx(end**gamma / 2)


@pytest.mark.parametrize('gamma', [0.5, 1.5])
def test_an_error_that_rounding_makes_negative_counts_as_0(gamma):
    errors = torch.tensor([[-1e-7, 0.5]], requires_grad=True), torch.tensor([[0.0, 0.5]], requires_grad=True)
    values = [functional.region_parts(error, torch.ones_like(error), gamma=gamma) for error in errors]
    assert torch.equal(*values)
    values[0].sum().backward()
    assert errors[0].grad.isfinite().all()
