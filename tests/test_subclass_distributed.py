import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks, share_of_rank
from test_subclass import RULES, batch, make_loss

pytestmark = pytest.mark.slow

STEPS = 10


def state_after(rule, images):
    """The state and the values logged after some steps with these of four images."""
    torch.set_num_threads(1)
    loss = make_loss(
        num_subclasses=3, update=rule, update_freq=3, reservoir_size=20, momentum=0.6, min_share=0.3,
        warmup_iters=2, ramp_iters=4, dtype=torch.float32,
    )  # fmt: skip
    moved = 0
    for i in range(STEPS):
        logits, target, features = batch(i, images=4, dtype=torch.float32)
        target[2:][target[2:] == 2] = 255  # a class that the first rank alone has
        logits, target, features = logits[images], target[images], features[images]
        loss(logits, target, features=features)
        moved += (loss.weighting.table().share < 0.0011).sum().item()
    values = {name: value.cpu().numpy() for name, value in loss.state_dict().items()}
    return values, {name: value.item() for name, value in loss.logged.items()}, moved


@pytest.mark.parametrize('rule', RULES)
def test_two_ranks_hold_the_same_state_and_that_of_one_with_all_images(rule):
    alone, logged, moved = state_after(rule, slice(0, 4))
    ranks = on_ranks(2, share_of_rank, state_after, rule)
    for rank in ranks:
        if isinstance(rank, Exception):
            raise rank
    assert moved > 0
    for name, value in alone.items():
        np.testing.assert_array_equal(ranks[0][0][name], ranks[1][0][name], err_msg=name)
        np.testing.assert_allclose(ranks[0][0][name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    assert ranks[0][1] == ranks[1][1] == pytest.approx(logged, rel=1e-5)


def with_nan(rule):
    loss = make_loss(num_subclasses=3, update=rule)
    for i in range(3):
        logits, target, features = batch(i, seed=dist.get_rank())
        if i == 2 and dist.get_rank() == 1:
            features[0, 0, 0, 0] = float('nan')
        loss(logits, target, features=features)


@pytest.mark.parametrize('rule', RULES)
def test_features_that_are_not_finite_end_all_ranks(rule):
    for error in on_ranks(2, with_nan, rule):
        assert isinstance(error, RuntimeError)
        assert 'training iteration 3 the features' in str(error)


def with_void(rule):
    """The states after each step where the second rank never has a valid pixel, and its losses."""
    loss = make_loss(num_subclasses=3, update=rule, update_freq=2, momentum=0.3, dtype=torch.float32)
    states, losses = [], []
    for i in range(5):
        logits, target, features = batch(i, dtype=torch.float32)
        if dist.get_rank() == 1 or i == 3:  # and once nobody has
            target[:] = 255
        losses.append(loss(logits, target, features=features).item())
        states.append({name: value.numpy().copy() for name, value in loss.state_dict().items()})
    return states, losses


@pytest.mark.parametrize('rule', RULES)
def test_a_rank_without_a_valid_pixel_holds_the_same_state(rule):
    ranks = on_ranks(2, with_void, rule)
    for rank in ranks:
        if isinstance(rank, Exception):
            raise rank
    (states, losses), (others, void) = ranks
    assert void == [0.0] * 5
    assert np.isfinite(losses).all()
    for state, other in zip(states, others, strict=True):
        for name, value in state.items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)
            assert np.isfinite(value).all()
    assert (states[-1]['weighting.pixels'] > 0).all()
