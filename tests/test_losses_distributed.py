import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks, share_of_rank
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmseg_imbalance.losses import (
    CombinedWeightedLoss,
    GeneralizedDiceLoss,
    WeightedCrossEntropyLoss,
    WeightedDiceLoss,
    WeightedFocalLoss,
    WeightedTverskyLoss,
)
from mmseg_imbalance.ops import sum_over_ranks
from mmseg_imbalance.recall import RecallWeightedLoss
from mmseg_imbalance.subclass import SubclassifiedLoss

pytestmark = pytest.mark.slow

WEIGHT = [0.2, 3.0, 1.0, 0.5, 1.7]
CASES = {
    'combined': lambda: CombinedWeightedLoss(
        class_weight=WEIGHT, region_reduction='batch', sync_region=True, label_smoothing=0.1
    ),
    'absent': lambda: WeightedDiceLoss(
        WEIGHT, region_reduction='batch', sync_region=True, absent_classes='ignore'
    ),
    'tversky': lambda: WeightedTverskyLoss(
        WEIGHT, alpha=0.2, beta=0.9, gamma=0.75, region_reduction='batch', sync_region=True
    ),
    'generalized': lambda: GeneralizedDiceLoss(region_reduction='batch', sync_region=True),
    'learnt': lambda: CombinedWeightedLoss(
        balance='uncertainty',
        region='generalized_dice',
        focal_gamma=2.0,
        region_reduction='batch',
        sync_region=True,
        logit_adjustment=0.5,
    ),
}


def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 9, 11, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 4, (4, 9, 11), generator=generator)
    target[2:][target[2:] == 1] = 255  # class 1 on the first rank alone, and unequal numbers of pixels
    return x, target


def train_step(images):
    """(value, gradient) of each case for one backward of a small model over the given images."""
    results = {}
    for name, loss in CASES.items():
        torch.manual_seed(1)
        model = nn.Conv2d(3, 5, 3, padding=1).double()
        if dist.is_initialized():
            model = DistributedDataParallel(model)
        x, target = (t[images] for t in batch())
        loss = loss()
        loss.class_weight.set_pixels([50, 4, 30, 20, 1])
        value = loss(model(x), target)
        value.backward()
        results[name] = value.item(), next(model.parameters()).grad.numpy()
    return results


def test_two_ranks_of_two_images_are_one_rank_of_four():
    alone = train_step(slice(None))
    for rank in on_ranks(2, share_of_rank, train_step):
        for name, (value, gradient) in alone.items():
            assert rank[name][0] == pytest.approx(value, rel=1e-12), name
            np.testing.assert_allclose(rank[name][1], gradient, rtol=1e-10, atol=1e-14, err_msg=name)


def summed():
    x = torch.full((3,), dist.get_rank() + 1.0).requires_grad_()
    total = sum_over_ranks(x)
    (total * torch.tensor([1.0, 2.0, 3.0]) * (dist.get_rank() + 1)).sum().backward()
    return total.tolist(), x.grad.tolist()


def test_the_gradient_of_the_sum_over_ranks_is_summed_too():
    assert on_ranks(2, summed) == [([3.0] * 3, [3.0, 6.0, 9.0])] * 2


def step_by_pixels(images):
    """(value, gradient) of losses that divide by the number of pixels, without a sum over ranks."""
    x, target = batch()
    target[target == 255] = 1
    target[:, :2] = 255  # every image has as many valid pixels
    target[0, 2:] = 0
    x, target = x[images], target[images]
    results = {}
    for name, kind in (('cross-entropy', WeightedCrossEntropyLoss), ('focal and Dice', CombinedWeightedLoss)):
        torch.manual_seed(1)
        model = nn.Conv2d(3, 5, 3, padding=1).double()
        if dist.is_initialized():
            model = DistributedDataParallel(model)
        loss = kind(class_weight=WEIGHT, divide_by='pixels', focal_gamma=1.0)
        loss.class_weight.set_pixels([50, 4, 30, 20, 1])
        value = loss(model(x), target)
        value.backward()
        results[name] = value.item(), next(model.parameters()).grad.numpy()
    return results


def test_divided_by_pixels_the_gradient_of_two_ranks_is_that_of_one_without_a_sum_over_ranks():
    alone = step_by_pixels(slice(None))
    ranks = on_ranks(2, share_of_rank, step_by_pixels)
    for name, (value, gradient) in alone.items():
        assert np.mean([rank[name][0] for rank in ranks]) == pytest.approx(value, rel=1e-12), name
        for rank in ranks:
            np.testing.assert_allclose(rank[name][1], gradient, rtol=1e-10, atol=1e-14, err_msg=name)


def recall_steps(images):
    """Values, last gradient and running means of a few steps, with as many valid pixels in every image."""
    results = {}
    for momentum in (1.0, 0.3):
        torch.manual_seed(1)
        inner = nn.ModuleDict(
            dict(conv=nn.Conv2d(3, 5, 3, padding=1), loss=RecallWeightedLoss(None, momentum=momentum))
        )
        inner.forward = lambda x, target, inner=inner: inner.loss(inner.conv(x), target)
        model = DistributedDataParallel(inner.double()) if dist.is_initialized() else inner.double()
        values = []
        for step in range(3):
            x, target = batch()
            target[target == 255] = 1
            target[:, :2] = 255
            target[2:][target[2:] == step] = 3  # a class on the first rank alone
            model.zero_grad()
            value = model(x[images] + step, target[images])
            value.backward()
            values.append(value.item())
        running = [share.numpy() for share in inner.loss.buffers()]
        results[momentum] = values, inner.conv.weight.grad.numpy(), running
    return results


def recall_on_rank():
    results = share_of_rank(recall_steps)
    loss = RecallWeightedLoss(momentum=0.3).eval()
    x, target = batch()
    region = CombinedWeightedLoss(region_reduction='batch', sync_region=True).eval()
    if dist.get_rank() == 0:  # evaluation waits for nobody
        loss(nn.functional.pad(x, (0, 0, 0, 0, 0, 2)), target)
        region(nn.functional.pad(x, (0, 0, 0, 0, 0, 2)), target)
    return results


def test_recall_is_that_of_all_ranks_and_so_are_its_running_means():
    alone = recall_steps(slice(None))
    ranks = on_ranks(2, recall_on_rank)
    for momentum, (values, gradient, running) in alone.items():
        both = [rank[momentum] for rank in ranks]
        np.testing.assert_allclose(np.mean([rank[0] for rank in both], 0), values, rtol=1e-6)
        for _, of_rank, shares in both:
            np.testing.assert_allclose(of_rank, gradient, rtol=1e-5, atol=1e-12)
            np.testing.assert_equal(shares, both[0][2])
            np.testing.assert_allclose(shares, running, rtol=1e-6)
        assert len(running) == (momentum < 1)


def void_on_the_last_rank():
    """Of each case, whether value and gradient are finite where a rank has void or weight 0 alone."""
    more = {
        'focal': lambda: WeightedFocalLoss(class_weight=WEIGHT, divide_by='pixels'),
        'recall': lambda: RecallWeightedLoss(class_weight=WEIGHT, momentum=0.3),
        'subclass': lambda: SubclassifiedLoss([0.2, 3.0, 1.0, 0.5, 0.0], num_subclasses=2),
    }
    finite = {}
    for name, case in (CASES | more).items():
        loss = case()
        loss.class_weight.set_pixels([50, 4, 30, 20, 1])
        for label in (255, 4):
            x, target = batch()
            if dist.get_rank() == 1:
                target.fill_(label)
            logits = nn.functional.pad(x, (0, 0, 0, 0, 0, 2)).requires_grad_()
            value = loss(logits, target, features=x)
            value.backward()
            finite[name, label] = bool(value.isfinite() and logits.grad.isfinite().all())
    return finite


def test_a_rank_without_a_valid_pixel_has_a_finite_value_and_gradient_and_the_others_too():
    for finite in on_ranks(2, void_on_the_last_rank):
        assert finite == dict.fromkeys(finite, True)
        assert len(finite) == 2 * (len(CASES) + 3)
