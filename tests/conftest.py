import numpy as np
import pytest
import torch


@pytest.fixture
def uninitialised_is_nan():
    """Every fresh allocation is filled with NaN, so that a value nobody wrote cannot go unnoticed."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def make_batch():
    """Factory of (logits, target): half of the pixels confident, 15 % ignored, one class absent."""

    def make(logit_size=(13, 17), label_size=(13, 17), classes=5, batch=2, seed=0, dtype=torch.float64):
        rng = np.random.default_rng(seed)
        target = rng.integers(0, classes - 1, (batch, *label_size))  # the last class never occurs
        logits = rng.normal(0, 2, (batch, classes, *logit_size))
        # random logits hide cancellation: lift the class that most of a cell's pixels have by 10
        rows = np.arange(logit_size[0]) * label_size[0] // logit_size[0]
        cols = np.arange(logit_size[1]) * label_size[1] // logit_size[1]
        label = target[:, rows][:, :, cols]
        lifted = rng.random(label.shape) < 0.5
        for c in range(classes):
            logits[:, c][lifted & (label == c)] += 10
        target[rng.random(target.shape) < 0.15] = 255
        return torch.tensor(logits, dtype=dtype), torch.tensor(target)

    return make
