import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from mmseg_imbalance.class_weight import ClassWeight
from mmseg_imbalance.losses import CombinedWeightedLoss, WeightedCrossEntropyLoss, WeightedLoss
from mmseg_imbalance.ops import soft_stats
from mmseg_imbalance.terms import INDICES, CrossEntropy, Overlap, pass_options

TERMS = [
    CrossEntropy(),
    CrossEntropy(focal_gamma=1.5),
    CrossEntropy(label_smoothing=0.1),
    *(Overlap(index) for index in INDICES),
    Overlap('tversky', 0.2, 0.9, gamma=1.3, reduction='batch', absent_classes='ignore'),
    Overlap(square_denominator=True),
]


@pytest.mark.parametrize('term', TERMS, ids=str)
def test_a_loss_of_one_term_is_the_sum_of_its_parts(make_batch, term):
    logits, target = make_batch()
    stats = soft_stats(logits, target, **term.needs())
    weight = torch.tensor([0.2, 3.0, 1.0, 0.0, 1.7], dtype=torch.float64)
    parts = term.parts(stats, weight)
    assert parts.shape == (5,)
    loss = WeightedLoss({'term': (term, 0.7)}, weight.tolist())
    torch.testing.assert_close(loss(logits, target), 0.7 * parts.sum(), rtol=1e-6, atol=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        term.smooth = 2.0


def test_terms_that_need_different_passes_are_refused():
    with pytest.raises(ValueError, match=r"'plain' needs focal_gamma=0\.0 and another focal_gamma=2\.0"):
        pass_options(dict(focal=CrossEntropy(2.0), plain=CrossEntropy()))
    shared = pass_options(dict(ce=CrossEntropy(label_smoothing=0.1), dice=Overlap()))
    assert shared == dict(focal_gamma=0.0, with_log_prob=True, square_prediction=False)


def test_a_stranger_s_term_is_weighed_and_logged_beside_ours(make_batch):
    class Share:
        """What is predicted of each class."""

        def needs(self) -> dict:
            return {}

        def parts(self, stats, class_weight) -> Tensor:
            return stats.prediction.sum(0) / stats.truth.sum()

    loss = WeightedLoss(dict(ce=(CrossEntropy(), 1.0), share=(Share(), 0.5)))
    value = loss(*make_batch())
    assert loss.loss_name == 'loss_ce_share'
    assert loss.logged['ce_share_share'].item() == pytest.approx(1)
    assert value.item() == pytest.approx(loss.logged['ce_share_ce'].item() + 0.5)


def test_a_term_may_have_class_weights_of_its_own(make_batch):
    batch, own = make_batch(), [1.0, 0.0, 2.0, 1.0, 0.5]
    terms = dict(ce=(CrossEntropy(), 1.0), own=(CrossEntropy(), 1.0, ClassWeight(own)))
    loss = WeightedLoss(terms, [0.2, 3.0, 1.0, 0.0, 1.7])
    loss(*batch)
    torch.testing.assert_close(loss.logged['ce_own_own'], WeightedCrossEntropyLoss(own)(*batch))
    copied = copy.deepcopy(loss)
    copied.class_weight.set_weights(own)
    copied(*batch)
    assert torch.equal(copied.logged['ce_own_ce'], copied.logged['ce_own_own'])
    assert len(loss.class_weights) == len(copied.class_weights) == 2


@pytest.mark.parametrize(
    ('factor', 'match'),
    [(-1.0, "the factor of 'ce' must be a finite number, at least 0, got -1"), ('x', 'factor')],
)
def test_a_factor_out_of_range_is_named(factor, match):
    with pytest.raises(ValueError, match=match):
        WeightedLoss({'ce': (CrossEntropy(), factor)})


@pytest.mark.parametrize('terms', [{}, {'loss_ce': (CrossEntropy(), 1.0)}])
def test_terms_that_would_spoil_the_total_are_refused(terms):
    with pytest.raises(ValueError, match="no name of a term contains 'loss'"):
        WeightedLoss(terms)


def test_terms_are_no_option_of_a_registered_loss():
    with pytest.raises(TypeError, match=r'CombinedWeightedLoss has no option terms=\{\}'):
        CombinedWeightedLoss(terms={})
