"""How the terms of a loss are balanced: learnt log-variances, GradNorm."""

import copy
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.model import ExponentialMovingAverage
from mmengine.runner import Runner
from ranks import on_ranks
from scripted import log_of

from mmseg_imbalance.balance import GradNorm
from mmseg_imbalance.losses import CombinedWeightedLoss, WeightedCrossEntropyLoss, WeightedDiceLoss

WEIGHT = [0.2, 3.0, 1.0, 0.0, 1.7]
BALANCED = 'segformer/segformer_mit-b0-small-combined_1xb8-2k_camvid-240x180'


def combined(**options):
    return CombinedWeightedLoss(class_weight=WEIGHT, balance=dict(type='gradnorm', **options))


def pulls(logits, target):
    """Values and norms of the gradients at the logits of cross-entropy and Dice, each on its own."""
    values, norms = [], []
    for kind in (WeightedCrossEntropyLoss, WeightedDiceLoss):
        x = logits.detach().clone().requires_grad_()
        value = kind(WEIGHT)(x, target)
        value.backward()
        values.append(value.item())
        norms.append(x.grad.double().square().sum().sqrt().item())
    return np.array(values), np.array(norms)


def test_uncertainty_learns_log_variances_that_start_at_the_fixed_weights(make_batch):
    batch = make_batch()
    options = dict(ce_weight=0.6, dice_weight=0.4, class_weight=WEIGHT)
    loss = CombinedWeightedLoss(balance='uncertainty', **options)
    ce, dice = WeightedCrossEntropyLoss(WEIGHT)(*batch), WeightedDiceLoss(WEIGHT)(*batch)
    s = [-math.log(0.6), -math.log(0.4)]
    value = loss(*batch)
    assert value.item() == pytest.approx(0.6 * ce + 0.4 * dice + sum(s) / 2)
    value.backward()
    expected = torch.tensor([0.5 - 0.6 * ce.item(), 0.5 - 0.4 * dice.item()])
    torch.testing.assert_close(loss.balance.log_variance.grad, expected)
    assert loss.logged['combined_ce_log_variance'].item() == pytest.approx(s[0])
    assert loss.logged['combined_dice_log_variance'].item() == pytest.approx(s[1])
    # at the optimum exp(s) = 2 L each
    optimizer = torch.optim.LBFGS([loss.balance.log_variance], max_iter=50)

    def closure():
        optimizer.zero_grad()
        value = loss(*batch)
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(
        loss.balance.log_variance.detach().exp(), 2 * torch.stack([ce, dice]).float(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize('backend', ['eager', 'strips', 'triton'])
def test_gradnorm_first_gives_all_terms_the_same_pull_and_keeps_their_sum(make_batch, backend):
    if backend == 'triton' and find_spec('triton') is None:
        pytest.skip('Triton is not installed')
    logits, target = make_batch()
    logits = logits.float()  # Triton takes no float64
    loss = CombinedWeightedLoss(class_weight=WEIGHT, balance='gradnorm', backend=backend)
    logits.requires_grad_()
    value = loss(logits, target)
    values, norms = pulls(logits, target)
    factors = loss.balance.factors.numpy()
    np.testing.assert_allclose(factors * norms, (factors * norms).mean(), rtol=1e-5)
    assert factors.sum() == pytest.approx(1.0)
    assert factors[1] / factors[0] == pytest.approx(norms[0] / norms[1], rel=1e-5)
    assert value.item() == pytest.approx((factors * values).sum(), rel=1e-5)
    logged = [loss.logged[f'combined_{name}_factor'].item() for name in ('ce', 'dice')]
    assert logged == pytest.approx(factors.tolist())
    # the measurement leaves the gradient of the loss as it is: that of its terms by these factors
    value.backward()
    expected = CombinedWeightedLoss(*factors.tolist(), class_weight=WEIGHT)
    other = logits.detach().clone().requires_grad_()
    expected(other, target).backward()
    torch.testing.assert_close(logits.grad, other.grad)


@pytest.mark.parametrize('asymmetry', [0.0, 1.5])
def test_gradnorm_is_its_formula_over_several_batches(make_batch, asymmetry):
    loss = combined(asymmetry=asymmetry, interval=2)
    factors, first = np.array([0.6, 0.4]), None
    for call in range(7):
        logits, target = make_batch((5, 7), (13, 17), seed=call)
        loss(logits.requires_grad_(), target)
        if call % 2:
            continue
        values, norms = pulls(logits, target)
        first, fresh = (values, True) if first is None else (first, False)
        progress = values / first
        aim = (progress / progress.mean()) ** asymmetry / norms
        aim /= aim.sum()
        factors = aim if fresh else factors + 0.1 * (aim - factors)
        np.testing.assert_allclose(loss.balance.factors, factors, rtol=1e-5)


def test_gradnorm_only_measures_in_training_and_what_can_be_measured(make_batch):
    logits, target = make_batch()
    for case in ('no gradient', 'evaluation', 'all ignored', 'not a number'):
        loss = combined().train(case != 'evaluation')
        x, y = logits.clone(), target.clone()
        if case == 'all ignored':
            y.fill_(255)
        if case == 'not a number':
            x[0] = math.nan
        loss(x.requires_grad_(case != 'no gradient'), y)
        assert loss.balance.factors.tolist() == pytest.approx([0.6, 0.4]), case
        loss.train()(logits.clone().requires_grad_(), target)
        measured = case in ('no gradient', 'evaluation')  # these do not count as calls
        assert (loss.balance.first > 0).all().item() == measured, case


def test_gradnorm_goes_on_from_a_checkpoint(make_batch, tmp_path):
    def go(loss, calls):
        for seed in calls:
            logits, target = make_batch(seed=seed)
            loss(logits.requires_grad_(), target)

    through, until = combined(interval=3), combined(interval=3)
    go(through, range(10))
    go(until, range(5))
    torch.save(until.state_dict(), tmp_path / 'state.pth')
    resumed = combined(interval=3)
    resumed.load_state_dict(torch.load(tmp_path / 'state.pth', weights_only=True))
    go(resumed, range(5, 10))
    assert torch.equal(resumed.balance.factors, through.balance.factors)
    assert torch.equal(copy.deepcopy(resumed).balance.first, through.balance.first)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_gradnorm_does_not_lose_small_gradients_in_half_precision(make_batch, dtype):
    logits, target = make_batch((64, 64), (256, 256))
    exact, half = combined(), combined()
    exact(logits.requires_grad_(), target)
    half(logits.detach().to(dtype).requires_grad_(), target)
    np.testing.assert_allclose(half.balance.factors, exact.balance.factors, rtol=0.02)


def test_gradnorm_in_a_model_of_half_precision_does_not_stand_still(make_batch):
    loss = combined(interval=1).bfloat16()
    logits, target = make_batch()
    loss(logits.requires_grad_(), target)
    before = loss.balance.factors.clone()
    loss((logits * 1.001).detach().requires_grad_(), target)
    assert before.dtype == torch.float32
    assert not torch.equal(before, loss.balance.factors)


def test_a_norm_that_overflows_in_half_precision_changes_nothing():
    balance = GradNorm([0.6, 0.4])
    logits = torch.zeros(1, 2, 512, 512, dtype=torch.float16, requires_grad=True)
    balance([logits.float().mean() + 1, logits[0, 0, 0, 0].float() + 1], logits)
    assert balance.factors.tolist() == pytest.approx([0.6, 0.4])
    assert (balance.first == 0).all()


@pytest.mark.parametrize('update_buffers', [False, True])
def test_a_model_with_gradnorm_can_be_averaged(make_batch, update_buffers):
    loss = combined(interval=1)
    averaged = ExponentialMovingAverage(loss, momentum=0.5, update_buffers=update_buffers)
    for seed in range(3):
        logits, target = make_batch(seed=seed)
        loss(logits.requires_grad_(), target)
        averaged.update_parameters(loss)
    assert averaged.module.balance.factors.isfinite().all()


def factors_of_rank():
    generator = torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    logits = torch.randn(2, 5, 9, 11, generator=generator)
    target = torch.randint(0, 5, (2, 9, 11), generator=generator)
    loss = combined()
    loss(logits.requires_grad_(), target).backward()
    return loss.balance.factors.tolist(), pulls(logits, target)[1]


@pytest.mark.slow
def test_gradnorm_is_of_all_ranks():
    (one, norms), (other, more) = on_ranks(2, factors_of_rank)
    assert one == other
    assert one[0] / one[1] == pytest.approx((norms + more)[1] / (norms + more)[0], rel=1e-5)


@pytest.mark.parametrize(
    ('balance', 'error', 'message'),
    [
        (dict(type='gradnorm', interval=0), ValueError, 'interval must be .* at least 1, got 0'),
        (dict(type='gradnorm', asymmetry=-1.0), ValueError, 'asymmetry must be'),
        (dict(type='gradnorm', alpha=1.5), TypeError, r"no option \['alpha'\].*\['asymmetry', 'interval'\]"),
        (
            dict(type='uncertainty', interval=3),
            TypeError,
            r"'uncertainty' has no option .*are \[\]",
        ),
        (dict(type='fixed', interval=3), TypeError, "'fixed' has no option"),
        (dict(interval=3), ValueError, 'balance must be one of .*got None'),
        (None, ValueError, 'balance must be one of .*got None'),
    ],
)
def test_options_of_a_balance_are_checked(balance, error, message):
    with pytest.raises(error, match=message):
        CombinedWeightedLoss(balance=balance)
    with pytest.raises(ValueError, match='two terms or more'):
        WeightedDiceLoss(balance='gradnorm')


def test_learnt_log_variances_are_optimized_logged_and_saved(small_config):
    cfg = small_config(BALANCED)
    cfg.model.decode_head.loss_decode.balance = 'uncertainty'
    cfg.default_hooks.checkpoint.interval = 2
    runner = Runner.from_cfg(cfg)
    before = runner.model.decode_head.loss_decode.balance.log_variance.detach().clone()
    runner.train()
    after = runner.model.decode_head.loss_decode.balance.log_variance.detach()
    assert (before != after).all()
    saved = torch.load(Path(cfg.work_dir, 'iter_2.pth'), weights_only=False)['state_dict']
    assert torch.equal(saved['decode_head.loss_decode.balance.log_variance'], after)
    assert 'decode.combined_ce_log_variance: ' in log_of(runner)


def test_a_new_training_from_a_checkpoint_starts_gradnorm_and_recall_anew(small_config, tmp_path):
    def trained(name, ce_weight, **options):
        cfg = small_config(BALANCED, experiment_name=f'{tmp_path.name}-{name}', **options)
        loss = dict(type='CombinedWeightedLoss', ce_weight=ce_weight, balance='gradnorm')
        cfg.model.decode_head.loss_decode = [loss, dict(type='RecallWeightedLoss', momentum=0.1)]
        cfg.default_hooks.checkpoint.interval = 2
        runner = Runner.from_cfg(cfg)
        runner.train()
        gradnorm, recall = runner.model.decode_head.loss_decode
        return gradnorm.balance.factors.sum().item(), recall.running_shares.sum(1), runner.work_dir

    total, shares, folder = trained('first', 0.6)
    assert total == pytest.approx(1.0)
    total, again, _ = trained('second', 1.6, load_from=f'{folder}/iter_2.pth')
    assert total == pytest.approx(2.0)
    assert again[1] == pytest.approx(shares[1])  # of two iterations, 1 - 0.9^2, and not of four


def test_gradnorm_trains_is_logged_and_saved(small_config):
    cfg = small_config(BALANCED)
    cfg.model.decode_head.loss_decode.balance = dict(type='gradnorm', interval=1)
    cfg.default_hooks.checkpoint.interval = 2
    runner = Runner.from_cfg(cfg)
    runner.train()
    factors = runner.model.decode_head.loss_decode.balance.factors
    assert factors.sum().item() == pytest.approx(1.0)
    assert factors.tolist() != pytest.approx([0.6, 0.4], rel=1e-3)
    saved = torch.load(Path(cfg.work_dir, 'iter_2.pth'), weights_only=False)['state_dict']
    assert torch.equal(saved['decode_head.loss_decode.balance.factors'], factors)
    assert saved['decode_head.loss_decode.balance._extra_state'] == 2
    assert 'decode.combined_dice_factor: ' in log_of(runner)


def measured(balance, scale):
    logits = torch.ones(1, 2, 4, 4, requires_grad=True)
    balance([scale * logits.square().mean(), logits.exp().mean()], logits)
    return balance.factors.tolist()


def test_gradnorm_started_anew_measures_progress_from_its_own_start():
    fresh, used = (GradNorm([0.6, 0.4], interval=2) for _ in range(2))
    measured(used, 100.0)
    used.start_anew()
    for scale in (1.0, 1.0, 0.5):
        assert measured(used, scale) == measured(fresh, scale)


def test_gradnorm_of_a_loss_that_is_called_for_several_outputs(make_batch):
    loss = combined(interval=1)
    total = 0
    for seed in (0, 1):
        logits, target = make_batch(seed=seed, dtype=torch.float32)
        total = total + loss(logits.requires_grad_(), target)
    total.backward()  # as DAHead, which calls its loss three times


def test_gradnorm_measures_gradients_below_the_smallest_half():
    balance = GradNorm([0.6, 0.4])
    logits = torch.zeros(1, 2, 512, 512, dtype=torch.float16, requires_grad=True)
    mean = logits.float().mean() + 1
    balance([1e-3 * mean, 4e-3 * mean], logits)  # 1e-3 / 2^19 is 2e-9, the smallest half 6e-8
    assert balance.factors.tolist() == pytest.approx([0.8, 0.2])
