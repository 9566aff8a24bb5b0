"""The kernel of the terms has the values and gradients of the formulas in torch, and leaves them the rest."""

from functools import reduce

import pytest
import torch
from conftest import DEVICE, needs_triton

from mmseg_imbalance.losses import CombinedWeightedLoss, WeightedDiceLoss
from mmseg_imbalance.ops import SoftStats
from mmseg_imbalance.terms import CrossEntropy, Overlap

pytestmark = needs_triton
FACTORS = dict(ce=0.6, overlap=0.4)
TERMS = {
    'ce': dict(ce=CrossEntropy()),
    'ce by pixels': dict(ce=CrossEntropy(divide_by='pixels')),
    'focal, of which the sums know': dict(ce=CrossEntropy(focal_gamma=2.0)),
    'dice': dict(overlap=Overlap()),
    'both': dict(ce=CrossEntropy(), overlap=Overlap()),
    'the other way round': dict(overlap=Overlap(), ce=CrossEntropy()),
    'jaccard of the batch': dict(ce=CrossEntropy(), overlap=Overlap('jaccard', reduction='batch')),
    'tversky of present classes': dict(
        overlap=Overlap('tversky', alpha=0.2, beta=0.9, absent_classes='ignore')
    ),
    'batch, present, no smoothing': dict(
        ce=CrossEntropy(), overlap=Overlap(reduction='batch', absent_classes='ignore', smooth=0.0)
    ),
    'no smoothing': dict(overlap=Overlap('jaccard', smooth=0.0)),
}
OTHERS = {
    'label smoothing': dict(ce=CrossEntropy(label_smoothing=0.1)),
    'a power': dict(ce=CrossEntropy(), overlap=Overlap(gamma=0.75)),
    'generalized dice': dict(overlap=Overlap('generalized_dice')),
    'two of a kind': dict(ce=CrossEntropy(), focal=CrossEntropy(focal_gamma=2.0)),
}


@pytest.fixture
def term_kernel():
    from mmseg_imbalance import term_kernel

    return term_kernel


def make_sums(images, classes, seed=0):
    """Sums that a pass could have found; every third class is absent, from the last image all but one."""
    generator = torch.Generator().manual_seed(seed)
    truth = (1e3 * torch.rand(images, classes, generator=generator)).round()
    truth[:, ::3] = 0
    truth[-1, 1:] = 0
    hit = torch.rand(images, classes, generator=generator)
    predicted = 1e3 * torch.rand(images, classes, generator=generator)
    predicted[:, 0] = 0  # with no smoothing, a class of no area
    fields = torch.stack([3 * truth * hit, truth * hit, predicted + truth * hit, truth], 1)  # as of one pass
    return [x.requires_grad_(i < 3) for i, x in enumerate(fields.to(DEVICE).unbind(1))]


def in_torch(terms, stats, weights):
    parts = {name: term.parts(stats, weights[name]) for name, term in terms.items()}
    values = {name: part.sum() for name, part in parts.items()}
    together = reduce(torch.add, (FACTORS[name] * part for name, part in parts.items()))
    return together.sum(), values, together


@pytest.mark.parametrize('terms', TERMS.values(), ids=TERMS)
@pytest.mark.parametrize('weighted', ['all 1', 'weights', 'of the overlap alone', 'zero'])
@pytest.mark.parametrize(('images', 'classes'), [(1, 2), (3, 19), (2, 150)])
def test_values_parts_and_gradients_are_those_of_torch(term_kernel, terms, weighted, images, classes):
    sums = make_sums(images, classes)
    stats = SoftStats(*sums, correct=torch.zeros(1))
    some = torch.linspace(0.0, 3.0, classes, device=DEVICE)
    own = dict.fromkeys(FACTORS, torch.zeros_like(some) if weighted == 'zero' else some)
    if weighted in ('all 1', 'of the overlap alone'):
        own['ce'] = None
    if weighted == 'all 1':
        own['overlap'] = None
    value, values, parts = term_kernel.weighted_sum_of_terms(
        stats, own, term_kernel.formula_of(terms, FACTORS)
    )
    expected, expected_values, expected_parts = in_torch(terms, stats, own)
    close = dict(rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(value, expected, **close)
    torch.testing.assert_close(values, {k: v.detach() for k, v in expected_values.items()}, **close)
    torch.testing.assert_close(parts, expected_parts.detach(), **close)
    assert not parts.requires_grad
    assert not any(v.requires_grad for v in values.values())
    found = torch.autograd.grad(3 * value, sums[:3], allow_unused=True)
    wanted = torch.autograd.grad(3 * expected, sums[:3], allow_unused=True)
    for mine, its in zip(found, wanted, strict=True):
        assert (mine is None) == (its is None)
        if mine is not None:
            torch.testing.assert_close(mine, its, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize('smooth', [0.0, 1.0])
@pytest.mark.parametrize('field', range(3))
@pytest.mark.parametrize('number', [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden_nor_spread(term_kernel, smooth, field, number):
    sums = make_sums(2, 5)
    with torch.no_grad():
        sums[field][0, 1] = number
    stats = SoftStats(*sums, correct=torch.zeros(1))
    terms, weights = dict(ce=CrossEntropy(), overlap=Overlap(smooth=smooth)), dict.fromkeys(FACTORS)
    formula = term_kernel.formula_of(terms, FACTORS)
    value, _, _ = term_kernel.weighted_sum_of_terms(stats, weights, formula)
    expected, _, _ = in_torch(terms, stats, weights)
    same = dict(rtol=2e-5, atol=1e-9, equal_nan=True)
    assert not value.isfinite()
    torch.testing.assert_close(value, expected, **same)
    mine, its = (torch.autograd.grad(x, sums[:3]) for x in (value, expected))
    torch.testing.assert_close(mine, its, **same)


def test_no_gradient_arrives(term_kernel):
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            return None

    logits = torch.randn(2, 5, 4, 6, device=DEVICE, requires_grad=True)
    target = torch.randint(5, (2, 8, 12), device=DEVICE)
    (Stop.apply(CombinedWeightedLoss(backend='triton')(logits, target)) + logits.sum()).backward()
    assert (logits.grad == 1).all()


def test_a_second_derivative_is_refused(term_kernel):
    sums = make_sums(2, 5)
    formula = term_kernel.formula_of(TERMS['both'], FACTORS)
    stats = SoftStats(*sums, correct=torch.zeros(1))
    value, _, _ = term_kernel.weighted_sum_of_terms(stats, dict.fromkeys(FACTORS), formula)
    for gradient in torch.autograd.grad(value, sums[:3], create_graph=True):
        with pytest.raises(RuntimeError, match=r"differentiated again.*backend='eager'"):
            gradient.sum().backward(retain_graph=True)


def test_sums_of_any_strides(term_kernel):
    sums = [x.detach() for x in make_sums(3, 7)]
    formula = term_kernel.formula_of(TERMS['both'], FACTORS)
    values = [
        term_kernel.weighted_sum_of_terms(
            SoftStats(*given, correct=torch.zeros(1)), dict.fromkeys(FACTORS), formula
        )[0]
        for given in (sums, [x.t().contiguous().t() for x in sums])
    ]
    assert values[0] == values[1]


@pytest.mark.parametrize('terms', OTHERS.values(), ids=OTHERS)
def test_other_terms_are_left_to_torch(term_kernel, terms):
    assert term_kernel.formula_of(terms, dict.fromkeys(terms, 1.0)) is None


def test_factors_that_are_tensors_are_left_to_torch(term_kernel):
    assert term_kernel.formula_of(dict(ce=CrossEntropy()), dict(ce=1)) is not None
    assert term_kernel.formula_of(dict(ce=CrossEntropy()), dict(ce=torch.ones(()))) is None


def test_a_term_of_the_users_own_is_left_to_torch(term_kernel):
    class Mine(CrossEntropy):
        pass

    assert term_kernel.formula_of(dict(ce=Mine()), FACTORS) is None


@pytest.mark.parametrize(
    ('kind', 'options'),
    [
        (CombinedWeightedLoss, dict(loss_weight=0.7)),
        (CombinedWeightedLoss, dict(ce_weight=1, dice_weight=0)),
        (CombinedWeightedLoss, dict(region_reduction='batch', sync_region=True)),
        (CombinedWeightedLoss, dict(region_class_weight=[0.0, 1.0, 1.0, 2.0, 3.0])),
        (WeightedDiceLoss, {}),
    ],
)
def test_a_loss_is_the_same_with_and_without_it(kind, options, monkeypatch, term_kernel):
    torch.manual_seed(0)
    logits, target = torch.randn(2, 5, 4, 6, device=DEVICE), torch.randint(5, (2, 8, 12), device=DEVICE)
    found = {}
    for backend in ('eager', 'triton'):
        seen = []
        loss = kind(class_weight=[1.0, 2.0, 3.0, 0.5, 0.0], backend=backend, **options)
        loss.watch(lambda pred, target, stats, parts, seen=seen: seen.append(parts))
        leaf = logits.clone().requires_grad_()
        value = loss(leaf, target)
        found[backend] = (value.detach(), *torch.autograd.grad(value, leaf), *seen, loss.take_logged())
    torch.testing.assert_close(found['triton'], found['eager'], rtol=1e-5, atol=1e-7)
    calls = []
    monkeypatch.setattr(term_kernel, 'weighted_sum_of_terms', lambda *args: calls.append(args) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kind(backend='triton')(logits, target)
    kind(backend='eager')(logits, target)
    weight = torch.ones_like(target, dtype=torch.float32, requires_grad=True)  # of which truth has a gradient
    kind(backend='triton')(logits, target, weight=weight).backward()
    assert len(calls) == 1
    assert weight.grad is not None
