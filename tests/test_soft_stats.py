import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, cpu, needs_numba, triton
from conftest import needs_triton as needs
from dispatch import Largest, NoDoubles

from mmseg_imbalance.ops import SoftStats, soft_stats, strips
from mmseg_imbalance.ops.contract import Options

contract = import_module('mmseg_imbalance.ops.soft_stats')  # whose name is also the function's
TRITON = (needs, pytest.mark.slow)
MARKS = dict(cpu=needs_numba, triton=TRITON)
ALL = ('eager', 'strips', 'cpu', 'triton') if DEVICE.type == 'cpu' else ('eager', 'strips', 'triton')
BACKENDS = [pytest.param(name, marks=MARKS.get(name, ())) for name in ALL]
TOLERANCE = {torch.float64: dict(rtol=1e-10, atol=1e-10), torch.float32: dict(rtol=1e-5, atol=2e-5)}
SUMS = ('nll', 'intersection', 'prediction', 'truth', 'correct')
DIFFERENTIABLE = ('nll', 'intersection', 'prediction', 'log_prob', 'marked_intersection')


def needs_triton(test):
    for mark in TRITON:
        test = mark(test)
    return test


pytestmark = pytest.mark.usefixtures('uninitialised_is_nan', 'several_parts')


@pytest.fixture
def several_parts(monkeypatch):
    """Several strips an image, threads, and rows a program, the last ones shorter, also at a test's size."""
    monkeypatch.setattr(strips, 'STRIP_NUMBERS', 500)
    if not isinstance(cpu, str):
        monkeypatch.setattr(cpu, 'PART_NUMBERS', 500)
        monkeypatch.setattr(cpu, 'PIECE_NUMBERS', 30)
    if not isinstance(triton, str):
        monkeypatch.setattr(triton, '_multiprocessors', lambda device: 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_batch(make_batch):
    """In every third row of the label all pixels are of one class, as most of a real label are."""

    def make(*args, **options):
        logits, target = make_batch(*args, **options)
        target[:, ::3] = target[:, ::3, :1]
        return logits.to(DEVICE), target.to(DEVICE)

    return make


def sizes():
    yield (13, 17), (13, 17), False
    yield (3, 53), (3, 53), False  # pieces of sixteen, and the rest
    for label in (
        (10, 14),
        (20, 28),
        (37, 51),
        (3, 5),
    ):  # scale 2, 4, 7.3 and a reduction, from 5 x 7
        yield (5, 7), label, False
        yield (5, 7), label, True


SAME_OR_TWICE = [((13, 17), (13, 17)), ((13, 17), (26, 34))]
FEW_SAME_OR_TWICE = [((3, 5), (3, 5)), ((3, 5), (6, 10))]


def batch_of(backend):
    """Kernels take single precision; Triton's interpreter, which is slow, takes one image."""
    if backend == 'cpu':
        return dict(dtype=torch.float32)
    if backend != 'triton':
        return dict(dtype=torch.float64)
    return dict(dtype=torch.float32, batch=1 if DEVICE.type == 'cpu' else 2)


def each(backends, cases, few_cases):
    """Backends and their cases, which are few for Triton's interpreter."""
    return [
        pytest.param(name, *case, marks=MARKS.get(name, ()))
        for name in backends
        for case in (few_cases if name == 'triton' and DEVICE.type == 'cpu' else cases)
    ]


OPTIONS = {
    'plain': {},
    'focal': dict(focal_gamma=1.7),
    'focal below 1': dict(focal_gamma=0.5),
    'square': dict(square_prediction=True),
    'bias': dict(logit_bias=torch.tensor([0.3, -2.0, 0.0, 1.0, 5.0])),
    'weight': dict(pixel_weight=True),
    'log_prob': dict(with_log_prob=True),
    'recall': dict(with_recall=True),
    'group': dict(group=True, num_groups=7),
    'marked': dict(marked=True),
    'all': dict(
        focal_gamma=2.0,
        square_prediction=True,
        logit_bias=torch.tensor([0.3, -2.0, 0.0, 1.0, 5.0]),
        pixel_weight=True,
        with_log_prob=True,
        with_recall=True,
        group=True,
        num_groups=7,
        marked=True,
    ),
}


def options_and_sizes(backends):
    """Each option with and without a resize; none and all of them at every size."""
    few_sizes = [((13, 17), (13, 17), False), ((5, 7), (13, 17), False), ((5, 7), (13, 17), True)]
    cases = [(o, *size) for o in OPTIONS for size in (sizes() if o in ('plain', 'all') else few_sizes)]
    few = [(option, (2, 3), (5, 22), False) for option in OPTIONS]
    for option in ('plain', 'all'):
        few.append((option, (2, 3), (5, 22), True))
        few.append((option, (3, 7), (3, 7), False))
        few += [(option, (3, 5), (2, 3), align_corners) for align_corners in (False, True)]
    names = ('backend', 'option', 'logit_size', 'label_size', 'align_corners')
    return pytest.mark.parametrize(names, each(backends, cases, few))


def options_for(name, target):
    options = dict(OPTIONS[name])
    generator = torch.Generator().manual_seed(3)
    if 'pixel_weight' in options:
        options['pixel_weight'] = torch.rand(target.shape, generator=generator) * 3
    if 'group' in options:
        options['group'] = torch.randint(0, 7, target.shape, generator=generator)
    if 'marked' in options:
        options['marked'] = torch.rand(target.shape, generator=generator) < 0.4
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def gradients(logits, target, backend, seed=1, fields=DIFFERENTIABLE, **options):
    """Gradient by the logits under random upstream vectors of those differentiable fields that exist."""
    leaf = logits.detach().clone().requires_grad_()
    stats = soft_stats(leaf, target, backend=backend, with_log_prob=True, **options)
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for name in fields:
        value = getattr(stats, name)
        if value is not None:
            upstream = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            total = total + (value * upstream.to(value)).sum()
    return torch.autograd.grad(total, leaf)[0]


def of_the_oracle(logits, target, **options):
    arrays = {k: v.cpu().numpy() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    sums = oracle.soft_stats(logits.cpu().numpy(), target.cpu().numpy(), **arrays)
    return {name: torch.from_numpy(values).to(DEVICE) for name, values in sums.items()}


@options_and_sizes(ALL)
def test_equals_the_loops_of_the_definition(
    make_batch, backend, option, logit_size, label_size, align_corners
):
    logits, target = make_batch(logit_size, label_size, **batch_of(backend))
    options = options_for(option, target) | dict(align_corners=align_corners)
    stats = soft_stats(logits, target, backend=backend, **options)
    with_log_prob, with_recall = (options.pop(f'with_{name}', False) for name in ('log_prob', 'recall'))
    expected = of_the_oracle(logits, target, **options)
    names = (
        *SUMS,
        *(['log_prob'] if with_log_prob else []),
        *(['class_correct', 'class_count'] if with_recall else []),
        *(['group_nll', 'group_count'] if 'group' in options else []),
        *(['marked_intersection', 'marked_truth'] if 'marked' in options else []),
    )
    for name in names:
        torch.testing.assert_close(
            getattr(stats, name).double(),
            expected[name],
            **TOLERANCE[logits.dtype],
            msg=lambda m, n=name: f'{n}: {m}',
        )


@options_and_sizes(ALL[1:])
def test_has_the_gradients_of_eager(make_batch, backend, option, logit_size, label_size, align_corners):
    logits, target = make_batch(logit_size, label_size, **batch_of(backend))
    options = options_for(option, target) | dict(align_corners=align_corners)
    options.pop('with_log_prob', None)
    expected = gradients(logits.double(), target, 'eager', **options)
    torch.testing.assert_close(
        gradients(logits, target, backend, **options).double(), expected, **TOLERANCE[logits.dtype]
    )


def weight_gradients(logits, target, weight, backend, seed=1, **options):
    """Gradients by pixel weights and by logits under random upstream vectors, which come third."""
    leaves = weight.detach().clone().requires_grad_(), logits.detach().clone().requires_grad_()
    stats = soft_stats(
        leaves[1], target, pixel_weight=leaves[0], backend=backend, with_log_prob=True, **options
    )
    generator = torch.Generator().manual_seed(seed)
    upstream, total = {}, 0
    for name in (*DIFFERENTIABLE, 'truth', 'marked_truth'):
        value = getattr(stats, name)
        if value is None:
            continue
        upstream[name] = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        total = total + (value * upstream[name]).sum()
    return *torch.autograd.grad(total, leaves), upstream


@options_and_sizes(ALL)
def test_a_pixel_weight_has_the_gradient_of_what_its_pixel_adds(
    make_batch, backend, option, logit_size, label_size, align_corners
):
    logits, target = make_batch(logit_size, label_size, **batch_of(backend))
    options = options_for(option, target) | dict(align_corners=align_corners)
    weight = options.pop('pixel_weight', torch.ones(target.shape, device=DEVICE)).to(logits.dtype)
    options.pop('with_log_prob', None)
    found, by_logits, upstream = weight_gradients(logits, target, weight, backend, **options)
    torch.testing.assert_close(
        by_logits, gradients_of(logits, target, upstream, backend, pixel_weight=weight, **options)
    )
    options.pop('with_recall', None)
    image, row, column = (target != 255).nonzero()[::23][:6].T.tolist()
    for at in zip(image, row, column, strict=True):  # the sums are linear in the weights
        alone = torch.zeros_like(weight)
        alone[at] = 1
        sums = of_the_oracle(logits, target, **options | dict(pixel_weight=alone))
        expected = sum((upstream[name].double() * sums[name]).sum() for name in upstream)
        torch.testing.assert_close(found[at].double(), expected, **TOLERANCE[logits.dtype])
    assert (found[target == 255] == 0).all()


def gradients_of(logits, target, upstream, backend, **options):
    """Gradient by the logits of weights that need none, under given upstream vectors."""
    leaf = logits.detach().clone().requires_grad_()
    stats = soft_stats(leaf, target, backend=backend, with_log_prob=True, **options)
    assert not stats.truth.requires_grad
    assert stats.marked_truth is None or not stats.marked_truth.requires_grad
    fields = [name for name in DIFFERENTIABLE if name in upstream]
    total = sum((getattr(stats, name) * upstream[name]).sum() for name in fields)
    return torch.autograd.grad(total, leaf)[0]


@pytest.mark.parametrize(('backend', 'logit_size', 'label_size'), each(ALL, SAME_OR_TWICE, FEW_SAME_OR_TWICE))
@pytest.mark.parametrize('option', ['plain', 'focal', 'square', 'marked'])
def test_every_pixel_weight_has_the_gradient_of_eager(make_batch, backend, option, logit_size, label_size):
    logits, target = make_batch(logit_size, label_size, **batch_of(backend))
    weight = torch.rand(target.shape, generator=torch.Generator().manual_seed(5)).to(logits) * 3
    options = options_for(option, target)
    found, *_ = weight_gradients(logits, target, weight, backend, **options)
    expected, *_ = weight_gradients(logits.double(), target, weight.double(), 'eager', **options)
    torch.testing.assert_close(found.double(), expected, **TOLERANCE[logits.dtype])


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_the_gradient_of_a_pixel_weight_keeps_its_type(make_batch, backend, dtype):
    logits, target = make_batch((3, 5), (6, 10), **batch_of(backend))
    weight = torch.rand(target.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE, dtype)
    half = weight_gradients(logits.to(dtype), target, weight, backend)[0]
    exact = weight_gradients(logits.to(dtype).double(), target, weight.double(), 'eager')[0]
    assert half.dtype == dtype
    torch.testing.assert_close(half.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_what_is_not_finite_under_ignored_pixels_gives_their_weight_no_gradient(make_batch, backend, value):
    logits, target = make_batch((3, 5), (3, 5), **batch_of(backend))
    target[:, 1] = 255
    weight = torch.ones(target.shape, device=DEVICE)
    clean, *_ = weight_gradients(logits, target, weight, backend)
    logits[:, :, 1] = value
    weight[:, 1] = value
    spoilt, *_ = weight_gradients(logits, target, weight, backend)
    torch.testing.assert_close(spoilt, clean)
    assert (spoilt[:, 1] == 0).all()


@needs_triton
@pytest.mark.parametrize(('field', 'gamma'), [('nll', 0.0), *((field, 1.3) for field in DIFFERENTIABLE)])
def test_triton_has_the_gradient_of_each_field_alone(make_batch, field, gamma):
    logits, target = make_batch((2, 3), (4, 5), dtype=torch.float32)
    options = dict(fields=[field], focal_gamma=gamma) | options_for('marked', target)
    expected = gradients(logits.double(), target, 'eager', **options)
    torch.testing.assert_close(
        gradients(logits, target, 'triton', **options).double(), expected, **TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize('backend', BACKENDS[1:])
def test_differentiated_twice_only_eager_does_not_refuse(make_batch, backend):
    """torch refuses only where an incoming gradient requires grad: that of cross-entropy is a number."""
    logits, target = make_batch((3, 5), (6, 10), **batch_of(backend))
    logits, factor = logits.requires_grad_(), torch.ones((), device=DEVICE, requires_grad=True)
    weight = torch.rand(target.shape, dtype=logits.dtype, device=DEVICE, requires_grad=True)
    for name in (backend, 'eager'):
        stats = soft_stats(logits * 1, target, pixel_weight=weight, backend=name)
        loss = factor * stats.nll.sum()
        plain = torch.autograd.grad(loss, (logits, weight), retain_graph=True)
        twice = torch.autograd.grad(loss, (logits, weight), create_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(plain, twice, strict=True))
        for gradient in twice:
            for source in (logits, weight, factor):
                again = dict(retain_graph=True, allow_unused=True)
                if name == 'eager':
                    torch.autograd.grad(gradient.sum(), source, **again)
                else:
                    with pytest.raises(RuntimeError, match=r"differentiated again.*backend='eager'"):
                        torch.autograd.grad(gradient.sum(), source, **again)


@pytest.mark.slow
@pytest.mark.parametrize('field', DIFFERENTIABLE)
@pytest.mark.parametrize('backend', ['eager', 'strips'])
def test_each_field_alone_passes_gradcheck(make_batch, backend, field):
    logits, target = make_batch((3, 4), (7, 5), 4, 1)
    logits = (logits / 4).requires_grad_()

    def function(z):
        options = options_for('marked', target)
        stats = soft_stats(z, target, backend=backend, focal_gamma=1.3, with_log_prob=True, **options)
        return getattr(stats, field)

    assert torch.autograd.gradcheck(function, logits)


@pytest.mark.parametrize(
    ('backend', 'logit_size', 'label_size'),
    each(ALL[1:], [((13, 17), (13, 17)), ((5, 7), (13, 17))], FEW_SAME_OR_TWICE),
)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_error_is_at_most_twice_that_of_eager(
    make_batch, backend, logit_size, label_size, dtype
):
    logits, target = make_batch(logit_size, label_size, dtype=dtype)
    marked = options_for('marked', target)

    def distance(values, truth):
        return max(float((v.double() - t.double()).abs().max()) for v, t in zip(values, truth, strict=True))

    def fields(z, backend):
        stats = soft_stats(z, target, backend=backend, with_log_prob=True, **marked)
        assert stats.nll.dtype == stats.marked_truth.dtype == torch.promote_types(z.dtype, torch.float32)
        return [getattr(stats, n) for n in DIFFERENTIABLE]

    truth = fields(logits.double(), 'eager')
    slack = 1e-6 * float(max(t.abs().max() for t in truth))
    assert distance(fields(logits, backend), truth) <= 2 * distance(fields(logits, 'eager'), truth) + slack
    truth = [gradients(logits.double(), target, 'eager', **marked)]
    mine, plain = ([gradients(logits, target, b, **marked)] for b in (backend, 'eager'))
    assert mine[0].dtype == dtype
    # half a unit in the last place is rounding's error; the interpreter cuts off, which errs by a whole one
    cut_off = backend == 'triton' and DEVICE.type == 'cpu' and dtype == torch.bfloat16
    assert distance(mine, truth) <= (4 if cut_off else 2) * distance(plain, truth) + 1e-6


@pytest.mark.parametrize(('backend', 'logit_size', 'label_size'), each(ALL, SAME_OR_TWICE, FEW_SAME_OR_TWICE))
def test_non_contiguous_inputs_and_integer_types_change_nothing(make_batch, backend, logit_size, label_size):
    logits, target = make_batch(logit_size, label_size, **batch_of(backend))
    expected = soft_stats(logits, target, backend=backend)
    odd_logits = logits.to(memory_format=torch.channels_last)
    odd_target = target.to(torch.uint8).transpose(1, 2).contiguous().transpose(1, 2)
    assert not odd_logits.is_contiguous()
    assert not odd_target.is_contiguous()
    stats = soft_stats(odd_logits, odd_target, backend=backend)
    for name in SUMS:
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name))
    torch.testing.assert_close(gradients(odd_logits, odd_target, backend), gradients(logits, target, backend))


def transposed(x):
    """The same numbers, the rows of an image behind one another column by column."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize(('backend', 'logit_size', 'label_size'), each(ALL, SAME_OR_TWICE, FEW_SAME_OR_TWICE))
@pytest.mark.parametrize('inputs', ['logits', 'target', 'others', 'all'])
def test_ties_are_the_same_for_inputs_that_are_not_contiguous(backend, logit_size, label_size, inputs):
    generator = torch.Generator().manual_seed(0)
    batch = batch_of(backend).get('batch', 2)
    logits = torch.randint(0, 2, (batch, 5, *logit_size), generator=generator).float().to(DEVICE)
    target, group = torch.randint(0, 5, (2, batch, *label_size), generator=generator).to(DEVICE)
    target[:, 1] = 255
    weight = torch.rand(target.shape, generator=generator).to(DEVICE)
    marked = weight < 0.4
    options = dict(backend=backend, num_groups=5, with_recall=True)
    expected = soft_stats(logits, target, pixel_weight=weight, group=group, marked=marked, **options)
    if inputs in ('logits', 'all'):
        logits = logits.to(memory_format=torch.channels_last)
    if inputs in ('target', 'all'):
        target = transposed(target)
    if inputs in ('others', 'all'):
        weight, group, marked = transposed(weight), transposed(group), transposed(marked)
    found = soft_stats(logits, target, pixel_weight=weight, group=group, marked=marked, **options)
    for name in SoftStats.__dataclass_fields__:
        if name != 'log_prob':
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), msg=name)
    # of a definition that writes nothing
    resized = F.interpolate(logits, label_size, mode='bilinear') if logit_size != label_size else logits
    assert found.correct.sum() == (resized.argmax(1) == target).sum()


@pytest.mark.parametrize('backend', BACKENDS)
def test_expanded_inputs_are_the_same_numbers(make_batch, backend):
    logits, target = make_batch((3, 5), (3, 5), **batch_of(backend) | dict(batch=1))
    logits, target = logits.expand(2, -1, -1, -1), target[:, :1].expand(2, 3, 5)
    weight = torch.rand(1, 1, 5, device=DEVICE).expand(2, 3, 5)
    found = soft_stats(logits, target, pixel_weight=weight, backend=backend)
    expected = soft_stats(logits.clone(), target.clone(), pixel_weight=weight.clone(), backend=backend)
    for name in SUMS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    torch.testing.assert_close(
        gradients(logits, target, backend, pixel_weight=weight),
        gradients(logits.clone(), target.clone(), backend, pixel_weight=weight.clone()),
    )


@pytest.mark.parametrize(
    ('backend', 'dtype', 'classes'),
    [
        *each(ALL, [(torch.uint8, 256), (torch.int8, 130)], [(torch.uint8, 256), (torch.int8, 130)]),
        # more than Triton's kernels take
        *each(ALL[:-1], [(torch.uint8, 300), (torch.int16, 32769)], []),
    ],
)
def test_narrow_labels_go_with_more_classes_than_they_can_name(backend, dtype, classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, classes, 2, 3, generator=generator).to(DEVICE)
    most = torch.iinfo(dtype).max
    target = torch.tensor([[[0, most, 3], [most - 1, 255 % (most + 1), most]]], device=DEVICE)
    options = dict(ignore_index=None, num_groups=classes, with_recall=True, backend=backend)
    found = soft_stats(logits, target.to(dtype), group=target.to(dtype), **options)
    expected = soft_stats(logits, target, group=target, **options)
    names = (*SUMS, 'group_nll', 'group_count', 'class_correct', 'class_count')
    for name in names:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    torch.testing.assert_close(
        gradients(logits, target.to(dtype), backend, ignore_index=None),
        gradients(logits, target, backend, ignore_index=None),
    )
    options['ignore_index'] = most  # ignored pixels are in no group, not in one whose number wraps around
    found = soft_stats(logits, target.to(dtype), group=target.to(dtype), **options)
    assert found.group_count[most] == 0
    assert found.group_count.sum() == (target != most).sum()


@pytest.mark.skipif(DEVICE.type == 'cuda', reason='values on a device are not checked before')
@pytest.mark.parametrize('dtype', [torch.int8, torch.int16])
def test_a_negative_narrow_label_is_refused_with_many_classes_too(dtype):
    target = torch.tensor([[[-1, 0]]], dtype=dtype)
    with pytest.raises(ValueError, match=r'target holds \[-1\] on 1 pixels; allowed are 0 to 39999'):
        soft_stats(torch.zeros(1, 40000, 1, 2), target)


@pytest.mark.parametrize('backend', BACKENDS)
def test_marked_pixels_are_those_that_are_not_0_and_valid(make_batch, backend):
    logits, target = make_batch((3, 5), (6, 10), **batch_of(backend))
    marked = options_for('marked', target)['marked']
    numbers = marked.to(torch.uint8) * torch.arange(1, 11, dtype=torch.uint8, device=DEVICE)
    found, expected = (soft_stats(logits, target, marked=m, backend=backend) for m in (numbers, marked))
    # of a definition that writes nothing: the other pixels are ignored
    alone = soft_stats(logits, target.masked_fill(~marked, 255), backend=backend)
    for name in ('intersection', 'truth'):
        assert torch.equal(getattr(found, f'marked_{name}'), getattr(expected, f'marked_{name}'))
        torch.testing.assert_close(getattr(found, f'marked_{name}'), getattr(alone, name))
    ignored = soft_stats(logits, target, marked=marked & (target != 255), backend=backend)
    assert torch.equal(ignored.marked_truth, found.marked_truth)
    none = soft_stats(logits, target, marked=torch.zeros_like(marked), backend=backend)
    assert none.marked_truth.sum() == none.marked_intersection.sum() == 0
    for name in SUMS:  # marks change nothing else
        assert torch.equal(getattr(found, name), getattr(soft_stats(logits, target, backend=backend), name))


@pytest.mark.parametrize('backend', BACKENDS)
def test_top_half_plus_bottom_half_is_the_whole(make_batch, backend):
    logits, target = make_batch(**batch_of(backend))
    marked = options_for('marked', target)['marked']
    halves = [
        soft_stats(logits[:, :, rows], target[:, rows], marked=marked[:, rows], backend=backend)
        for rows in (slice(0, 6), slice(6, None))
    ]
    whole = soft_stats(logits, target, marked=marked, backend=backend)
    for name in (*SUMS, 'marked_intersection', 'marked_truth'):
        torch.testing.assert_close(sum(getattr(h, name) for h in halves), getattr(whole, name))


@pytest.mark.parametrize('backend', BACKENDS)
def test_permuted_classes_permute_the_columns(make_batch, backend):
    logits, target = make_batch((5, 7), (13, 17), **batch_of(backend))
    order = torch.tensor([3, 0, 4, 1, 2], device=DEVICE)
    renamed = torch.where(target == 255, 255, order.argsort()[target.clamp(max=4)])
    plain = soft_stats(logits, target, backend=backend)
    permuted = soft_stats(logits[:, order], renamed, backend=backend)
    for name in ('nll', 'intersection', 'prediction', 'truth'):
        torch.testing.assert_close(getattr(permuted, name), getattr(plain, name)[:, order])
    torch.testing.assert_close(permuted.correct, plain.correct)


@pytest.mark.parametrize('backend', BACKENDS)
def test_weight_two_is_the_pixel_twice(make_batch, backend):
    logits, target = make_batch(**batch_of(backend))
    weight = torch.ones(target.shape, device=DEVICE)
    weight[:, 4:] = 2
    doubled = soft_stats(logits, target, pixel_weight=weight, backend=backend)
    twice = soft_stats(
        torch.cat([logits, logits[:, :, 4:]], 2),
        torch.cat([target, target[:, 4:]], 1),
        backend=backend,
    )
    for name in ('nll', 'intersection', 'prediction', 'truth'):
        torch.testing.assert_close(getattr(doubled, name), getattr(twice, name))


@pytest.mark.parametrize(('backend', 'logit_size', 'label_size'), each(ALL, SAME_OR_TWICE, FEW_SAME_OR_TWICE))
def test_logits_under_ignored_pixels_have_no_effect_and_no_gradient(
    make_batch, backend, logit_size, label_size
):
    logits, target = make_batch(logit_size, label_size, **batch_of(backend))
    half = label_size[0] // 2
    target[:, half:] = 255
    untouched = logits.clone()
    far = logit_size[0] // 2 + 1  # rows of the logits that only ignored pixels are resized from
    untouched[:, :, far:] = 1e4 * torch.randn_like(untouched[:, :, far:])
    for name in SUMS:
        torch.testing.assert_close(
            getattr(soft_stats(untouched, target, backend=backend), name),
            getattr(soft_stats(logits, target, backend=backend), name),
        )
    assert (gradients(untouched, target, backend)[:, :, far:] == 0).all()


NOT_FINITE = {
    'NaN': [float('nan')],
    'inf': [float('inf')],
    '-inf': [-float('inf')],
    'one class of -inf': [0.0, -float('inf')],
    'one class of NaN': [0.0, 0.0, float('nan')],
    'both': [float('inf'), -float('inf'), 0.0],
}


@pytest.mark.parametrize(('backend', 'option'), each(ALL, [(o,) for o in OPTIONS], [('plain',), ('all',)]))
@pytest.mark.parametrize('kind', NOT_FINITE)
def test_what_is_not_finite_under_ignored_pixels_changes_nothing(make_batch, backend, option, kind):
    size = (3, 5) if backend == 'triton' and DEVICE.type == 'cpu' else (13, 17)
    logits, target = make_batch(size, size, **batch_of(backend))
    target[:, 1] = 255
    options = options_for(option, target)
    spoilt = logits.clone()
    for c in range(5):
        values = NOT_FINITE[kind]
        spoilt[:, c][target == 255] = values[c % len(values)]
    found = soft_stats(spoilt, target, backend=backend, **options)
    expected = soft_stats(logits, target, backend=backend, **options)
    for name in SoftStats.__dataclass_fields__:
        if getattr(expected, name) is not None:
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), msg=name)
    options.pop('with_log_prob', None)
    found, expected = (gradients(z, target, backend, **options) for z in (spoilt, logits))
    torch.testing.assert_close(found, expected)
    assert (found.movedim(1, 3)[target == 255] == 0).all()


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('gamma', [0.0, 2.0])
def test_a_class_may_be_ruled_out_by_logits_of_minus_infinity(make_batch, backend, gamma):
    logits, target = make_batch((3, 7), (3, 7), **batch_of(backend))
    logits[:, 4] = -float('inf')  # no pixel is of this class
    found = soft_stats(logits, target, focal_gamma=gamma, backend=backend)
    expected = soft_stats(logits[:, :4], target, focal_gamma=gamma, backend='eager')
    for name in SUMS:
        ours, theirs = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(ours if name == 'correct' else ours[:, :4], theirs)
    leaf, four = logits.clone().requires_grad_(), logits[:, :4].clone().requires_grad_()
    for z, by in ((leaf, backend), (four, 'eager')):
        stats = soft_stats(z, target, focal_gamma=gamma, backend=by)
        (stats.nll.sum() + stats.prediction[:, :4].square().sum() + stats.intersection.sum()).backward()
    torch.testing.assert_close(leaf.grad[:, :4], four.grad)
    assert (leaf.grad[:, 4] == 0).all()


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -1.0])
def test_any_weight_of_an_ignored_pixel_is_none(make_batch, backend, value):
    logits, target = make_batch((3, 7), (3, 7), **batch_of(backend))
    target[:, 1] = 255
    weight = torch.rand(target.shape, device=DEVICE)
    spoilt = weight.masked_fill(target == 255, value)
    for name in SUMS:
        torch.testing.assert_close(
            getattr(soft_stats(logits, target, pixel_weight=spoilt, backend=backend), name),
            getattr(soft_stats(logits, target, pixel_weight=weight, backend=backend), name),
        )
    torch.testing.assert_close(
        gradients(logits, target, backend, pixel_weight=spoilt),
        gradients(logits, target, backend, pixel_weight=weight),
    )


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize(
    ('backend', 'logit_size', 'label_size'),
    each(
        ALL,
        [((9, 11), (31, 40)), ((9, 11), (6, 7)), ((9, 11), (9, 40)), ((9, 11), (31, 11))],
        [((4, 5), (9, 12)), ((4, 5), (4, 12)), ((4, 5), (9, 5))],
    ),
)
def test_low_resolution_logits_of_nan_spoil_the_pixels_that_are_resized_from_them(
    make_batch, backend, logit_size, label_size, align_corners
):
    """Where these are ignored nothing is spoilt; one that is valid makes the loss NaN, as in torch."""
    logits, target = make_batch(logit_size, label_size, **batch_of(backend))
    spoilt = logits.clone()
    spoilt[0, :, 2, 1] = float('nan')
    spoilt[0, 3, 1, 1] = float('inf')
    resized = F.interpolate(spoilt, label_size, mode='bilinear', align_corners=align_corners)
    touched = ~resized.isfinite().all(1)
    assert 0 < touched.sum() < target[0].numel()
    options = dict(backend=backend, align_corners=align_corners)
    hidden = target.masked_fill(touched, 255)
    found, expected = (soft_stats(z, hidden, **options) for z in (spoilt, logits))
    for name in SUMS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    found, expected = (gradients(z, hidden, **options) for z in (spoilt, logits))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    shown = torch.where(touched, 0, hidden)
    assert soft_stats(spoilt, shown, **options).nll[0, 0].isnan()


@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0])
@pytest.mark.parametrize(('backend', 'logit_size', 'label_size'), each(ALL, SAME_OR_TWICE, FEW_SAME_OR_TWICE))
def test_extreme_logits_stay_exact_and_finite(make_batch, backend, logit_size, gamma, label_size):
    logits, target = make_batch(logit_size, label_size, dtype=torch.float32)
    logits = logits.sign() * 1e4 + logits
    stats = soft_stats(logits, target, backend=backend, focal_gamma=gamma)
    expected = of_the_oracle(logits, target, focal_gamma=gamma)
    for name in ('nll', 'intersection', 'prediction'):
        torch.testing.assert_close(getattr(stats, name).double(), expected[name], rtol=1e-4, atol=2e-2)
    assert gradients(logits, target, backend, focal_gamma=gamma).isfinite().all()


@pytest.mark.parametrize('option', ['plain', 'all'])
@pytest.mark.parametrize('backend', BACKENDS)
def test_all_pixels_ignored_gives_zeros_and_zero_gradient(make_batch, backend, option):
    logits, target = make_batch((5, 7), (13, 17), **batch_of(backend))
    target.fill_(255)
    options = options_for('all', target) if option == 'all' else {}
    stats = soft_stats(logits, target, backend=backend, **options)
    for name in SoftStats.__dataclass_fields__:
        assert getattr(stats, name) is None or (getattr(stats, name) == 0).all(), name
    options.pop('with_log_prob', None)
    assert (gradients(logits, target, backend, **options) == 0).all()


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('ignore_index', [0, -100])
def test_any_value_can_be_the_ignored_one(make_batch, backend, ignore_index):
    logits, target = make_batch(**batch_of(backend))
    renamed = torch.where(target == 255, ignore_index, target)
    stats = soft_stats(logits, renamed, ignore_index=ignore_index, backend=backend)
    expected = of_the_oracle(logits, renamed, ignore_index=ignore_index)
    for name in SUMS:
        torch.testing.assert_close(getattr(stats, name).double(), expected[name], **TOLERANCE[logits.dtype])


@pytest.mark.parametrize('backend', BACKENDS)
def test_an_ignored_value_outside_the_type_of_the_labels_ignores_nothing(make_batch, backend):
    logits, target = make_batch(**batch_of(backend))
    target = target.clamp(max=4)
    expected = soft_stats(logits, target, backend=backend)
    for ignore_index in (torch.iinfo(torch.int64).min, -256, 256, 2**63, -(2**70)):
        stats = soft_stats(logits, target.to(torch.uint8), ignore_index=ignore_index, backend=backend)
        assert torch.equal(stats.truth, expected.truth)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('label_size', [(3, 40), (6, 80)])
def test_logits_closer_than_their_exponentials_are_no_tie(backend, label_size):
    generator = torch.Generator().manual_seed(0)
    logits = (1e-9 * torch.randn(1, 5, 3, 40, generator=generator)).to(DEVICE)
    target = torch.randint(0, 5, (1, *label_size), generator=generator).to(DEVICE)
    resized = F.interpolate(logits, label_size, mode='bilinear')
    assert soft_stats(logits, target, backend=backend).correct.item() == (resized.argmax(1) == target).sum()


@pytest.mark.parametrize('backend', BACKENDS)
def test_the_first_class_wins_a_tie(backend):
    logits = torch.zeros(1, 3, 4, 4, device=DEVICE)
    target = torch.arange(16, device=DEVICE).view(1, 4, 4) % 3
    assert soft_stats(logits, target, backend=backend).correct.item() == (target == 0).sum()


@pytest.mark.parametrize(('backend', 'logit_size', 'label_size'), each(ALL, SAME_OR_TWICE, FEW_SAME_OR_TWICE))
def test_inputs_are_bitwise_unchanged_after_backward(make_batch, backend, logit_size, label_size):
    logits, target = make_batch(logit_size, label_size, **batch_of(backend))
    weight = torch.rand(target.shape, device=DEVICE)
    bias = torch.randn(5, device=DEVICE)
    inputs = (logits.requires_grad_(), target, weight, bias)
    before = [t.detach().clone() for t in inputs]
    stats = soft_stats(logits, target, pixel_weight=weight, logit_bias=bias, backend=backend)
    (stats.nll.sum() + stats.prediction.square().sum()).backward()
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, inputs, strict=True))


@pytest.mark.parametrize('backend', BACKENDS[1:])
@pytest.mark.parametrize('name', ['pixel_weight', 'logit_bias', 'marked'])
def test_what_is_changed_before_backward_is_an_error(make_batch, backend, name):
    logits, target = make_batch((3, 5), (6, 10), **batch_of(backend))
    options = options_for('all', target)
    stats = soft_stats(logits.requires_grad_(), target, backend=backend, **options)
    options[name].zero_()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        stats.nll.sum().backward()


@pytest.mark.parametrize('backend', BACKENDS)
def test_backward_reads_only_what_was_saved_for_it(make_batch, backend):
    """What is kept elsewhere, checkpointing cannot drop, and it lives as long as the loss."""
    logits, target = make_batch((3, 5), (6, 10), **batch_of(backend))
    options = options_for('all', target)
    leaf = logits.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone(), lambda x: x):
        stats = soft_stats(leaf, target, backend=backend, **options)
        total = stats.nll.sum() + stats.marked_intersection.sum()
    (expected,) = torch.autograd.grad(total, leaf, retain_graph=True)
    for tensor in (leaf, target, *(x for x in options.values() if isinstance(x, torch.Tensor))):
        tensor.data.zero_()
    (found,) = torch.autograd.grad(total, leaf)
    assert torch.equal(found, expected)


@pytest.mark.parametrize('backend', BACKENDS)
def test_the_default_type_changes_nothing(make_batch, backend):
    logits, target = make_batch((3, 5), (6, 10), **batch_of(backend))
    options = options_for('plain', target)
    expected = gradients(logits, target, backend, **options)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = gradients(logits, target, backend, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize('backend', BACKENDS)
def test_autocast_does_not_lower_the_precision(make_batch, backend):
    logits, target = make_batch((3, 4), (5, 7), dtype=torch.float32)
    expected = soft_stats(logits, target, backend=backend), gradients(logits, target, backend)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        stats = soft_stats(logits, target, backend=backend), gradients(logits, target, backend)
    for name in SUMS:
        assert torch.equal(getattr(stats[0], name), getattr(expected[0], name))
    assert torch.equal(stats[1], expected[1])


def test_strips_holds_no_tensor_of_label_size(make_batch, monkeypatch):
    logits, target = make_batch((8, 8), (256, 256))
    monkeypatch.setattr(strips, 'STRIP_NUMBERS', 5 * 1024)
    leaf = logits.requires_grad_()
    with Largest() as seen:
        soft_stats(leaf, target, backend='strips').nll.sum().backward()
    assert seen.numel <= 2 * 256 * 256  # the label itself; logits at that size would be five times as much


@pytest.mark.parametrize('option', ['plain', 'all'])
@pytest.mark.parametrize(('logit_size', 'label_size'), SAME_OR_TWICE)
@pytest.mark.parametrize('backend', ['strips', 'eager'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_without_double_precision_the_sums_are_the_same_but_for_rounding(
    make_batch, backend, logit_size, label_size, option, dtype
):
    if DEVICE.type == 'cuda':
        pytest.skip('a CUDA device has double precision, and kernels that rely on it')
    logits, target = make_batch(logit_size, label_size, dtype=dtype)
    options = options_for(option, target) | dict(backend=backend)
    gradient_options = {k: v for k, v in options.items() if k != 'with_log_prob'}
    expected = soft_stats(logits, target, **options)
    gradient = gradients(logits, target, fields=['nll'], **gradient_options)
    leaf = logits.clone().requires_grad_()
    with NoDoubles():
        found = soft_stats(leaf, target, **options)
        found.nll.sum().backward()
    for name in SoftStats.__dataclass_fields__:
        if getattr(expected, name) is not None:
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), msg=name)
    assert leaf.grad.dtype == gradient.dtype


def test_sums_in_single_precision_do_not_stop_growing(monkeypatch):
    """1 - 3e-4 added to 1e5 is 1, if not first added to others of its kind."""
    if DEVICE.type == 'cuda':
        pytest.skip('on a CUDA device the sums are double')
    logits = torch.zeros(1, 2, 384, 512)
    logits[:, 0] = 8.1
    target = torch.zeros(1, 384, 512, dtype=torch.uint8)
    monkeypatch.setattr(strips, 'STRIP_NUMBERS', 3 << 18)
    expected = soft_stats(logits.double(), target, backend='strips').intersection
    with NoDoubles():
        found = soft_stats(logits, target, backend='strips').intersection
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=0)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('option', ['plain', 'all'])
def test_a_first_call_in_inference_mode_is_no_hindrance_to_training(make_batch, backend, option):
    logits, target = make_batch((3, 5), (6, 10), **batch_of(backend))
    options = options_for(option, target)
    with torch.inference_mode():
        inside = soft_stats(logits, target, backend=backend, **options)
    outside = soft_stats(logits, target, backend=backend, **options)
    assert torch.equal(inside.nll, outside.nll)
    options.pop('with_log_prob', None)
    assert gradients(logits, target, backend, **options).isfinite().all()


def test_sum_images_is_a_batch_of_one(make_batch):
    logits, target = make_batch()
    marked = options_for('marked', target)
    stats = soft_stats(logits.requires_grad_(), target, with_log_prob=True, with_recall=True, **marked)
    whole = stats.sum_images()
    assert isinstance(whole, SoftStats)
    for name in ('log_prob', *SUMS, 'class_correct', 'class_count', 'marked_intersection', 'marked_truth'):
        torch.testing.assert_close(getattr(whole, name), getattr(stats, name).sum(0, keepdim=True))
    assert whole.marked_intersection.requires_grad
    assert not whole.truth.requires_grad
    assert not whole.marked_truth.requires_grad


@pytest.mark.parametrize('backend', BACKENDS)
def test_nothing_but_the_differentiable_fields_requires_grad(make_batch, backend):
    logits, target = make_batch(**batch_of(backend))
    stats = soft_stats(
        logits.requires_grad_(),
        target,
        with_log_prob=True,
        with_recall=True,
        group=torch.zeros_like(target),
        num_groups=1,
        marked=target == 1,
        backend=backend,
    )
    for name in SoftStats.__dataclass_fields__:
        assert getattr(stats, name).requires_grad == (name in DIFFERENTIABLE), name


def test_plain_sums_are_those_of_torch(make_batch):
    logits, target = make_batch((5, 7), (13, 17))
    stats = soft_stats(logits, target)
    resized = F.interpolate(logits, (13, 17), mode='bilinear')
    torch.testing.assert_close(
        stats.nll.sum(), F.cross_entropy(resized, target, ignore_index=255, reduction='sum')
    )


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        (dict(logits=torch.zeros(5, 13, 17)), ValueError, r'\(B, C, h, w\).*\(5, 13, 17\)'),
        (dict(logits=torch.zeros(2, 1, 13, 17)), ValueError, 'C >= 2'),
        (
            dict(logits=torch.zeros(2, 5, 13, 17, dtype=torch.long)),
            ValueError,
            'floating point.*int64',
        ),
        (dict(target=torch.zeros(2, 13, 17)), TypeError, 'integer.*float32'),
        (
            dict(target=torch.zeros(3, 13, 17, dtype=torch.long)),
            ValueError,
            r'B = 2.*\(3, 13, 17\)',
        ),
        (
            dict(target=torch.full((2, 13, 17), 7)),
            ValueError,
            r'target holds \[7\] on 442 pixels; allowed are 0 to 4 or',
        ),
        (dict(target=torch.full((2, 13, 17), -1)), ValueError, r'target holds \[-1\]'),
        (dict(pixel_weight=torch.ones(2, 13)), ValueError, 'pixel_weight must be of the shape'),
        (dict(logit_bias=torch.ones(4)), ValueError, r'logit_bias must be of shape \(5,\)'),
        (dict(logits=torch.zeros(0, 5, 3, 3), target=torch.zeros(0, 3, 3).long()), ValueError, 'no pixels'),
        (dict(focal_gamma=-1.0), ValueError, 'focal_gamma must be a finite number, at least 0, got -1'),
        (
            dict(focal_gamma=float('inf')),
            ValueError,
            'focal_gamma must be a finite number, at least 0, got inf',
        ),
        (dict(target=torch.zeros(2, 13, 17, dtype=torch.bool)), TypeError, 'integer.*bool'),
        (dict(target=torch.zeros(2, 13, 17, dtype=torch.complex64)), TypeError, 'uint8 or a signed.*complex'),
        (dict(target=torch.zeros(2, 1, 13, 17, dtype=torch.long)), ValueError, r'got \(2, 1, 13, 17\)'),
        (dict(pixel_weight=torch.ones(2, 1, 13, 17)), ValueError, r'pixel_weight must be .*\(2, 1, 13, 17\)'),
        (dict(pixel_weight=torch.ones(13, 17)), ValueError, r'pixel_weight must be .*\(13, 17\)'),
        (dict(pixel_weight=torch.ones(2, 13, 17) * 1j), TypeError, 'pixel_weight must hold real numbers'),
        (dict(logit_bias=torch.ones(1)), ValueError, r'logit_bias must be of shape \(5,\)'),
        (dict(group=torch.zeros(2, 13, 17), num_groups=2), TypeError, 'group must hold integer ids.*float32'),
        (dict(group=torch.zeros(2, 13, 17, dtype=torch.long)), ValueError, 'go together'),
        (dict(num_groups=2), ValueError, 'go together'),
        (dict(marked=torch.ones(2, 13, 17)), TypeError, 'marked must be bool or uint8.*got torch.float32'),
        (dict(marked=torch.ones(2, 13, 17).long()), TypeError, 'marked must be bool or uint8.*int64'),
        (dict(marked=torch.ones(2, 13).bool()), ValueError, r'marked must be of the shape.*\(2, 13\)'),
        (
            dict(marked=torch.ones(2, 13, 17, device='meta').bool()),
            ValueError,
            'marked must be on cpu.*meta',
        ),
        (dict(group=torch.full((2, 13, 17), 2), num_groups=2), ValueError, r'group holds \[2\]'),
        (dict(backend='cuda'), ValueError, "'auto' or one of"),
        (
            dict(pixel_weight=torch.ones(2, 13, 17, device='meta')),
            ValueError,
            'pixel_weight must be on cpu.*meta',
        ),
    ],
)
def test_bad_input_gets_one_clear_error(make_batch, change, error, message):
    logits, target = (t.cpu() for t in make_batch())
    arguments = dict(logits=logits, target=target) | change
    with pytest.raises(error, match=message):
        soft_stats(arguments.pop('logits'), arguments.pop('target'), **arguments)


def both(make_batch, *args, **options):
    """Fields and gradient of triton, and those of eager in double."""
    logits, target = make_batch(*args, dtype=torch.float32)
    options |= options_for('marked', target)
    names = (*DIFFERENTIABLE, 'truth', 'marked_truth', 'correct', 'class_correct', 'class_count')
    for z, backend in ((logits, 'triton'), (logits.double(), 'eager')):
        stats = soft_stats(z, target, backend=backend, with_log_prob=True, with_recall=True, **options)
        yield [getattr(stats, n).double() for n in names] + [
            gradients(z, target, backend, **options).double()
        ]


@needs_triton
@pytest.mark.parametrize('classes', [2, 19, 40, 150, 256])
def test_triton_takes_up_to_256_classes(make_batch, classes):
    mine, expected = both(make_batch, (2, 3), (4, 5), classes, 1)
    torch.testing.assert_close(mine, expected, **TOLERANCE[torch.float32])


@needs_triton
@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize(
    ('logit_size', 'label_size'),
    [
        ((2, 300), (2, 300)),
        ((2, 40), (3, 300)),
        ((2, 2), (3, 300)),
        ((2, 300), (3, 75)),
        ((1, 3), (4, 1)),
        ((4, 1), (1, 9)),
    ],
)
def test_triton_takes_any_size(make_batch, logit_size, label_size, align_corners):
    mine, expected = both(make_batch, logit_size, label_size, 5, 1, align_corners=align_corners)
    # coordinates are single, as torch's own are for such logits: 300 is 3e-5 off
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=2e-4)


@needs_triton
@pytest.mark.parametrize('num_groups', [1, 257, 4096])
def test_triton_takes_up_to_4096_groups(make_batch, num_groups):
    logits, target = make_batch((5, 7), (5, 7), dtype=torch.float32)
    group = torch.randint(0, num_groups, target.shape, dtype=torch.int32, device=DEVICE)
    group[target == 255] = -1  # looked at on valid pixels only
    stats, expected = (
        soft_stats(logits, target, group=group, num_groups=num_groups, backend=b) for b in ('triton', 'eager')
    )
    torch.testing.assert_close(stats.group_nll, expected.group_nll)
    assert torch.equal(stats.group_count, expected.group_count)


@needs_triton
@pytest.mark.parametrize('weight', [torch.float16, torch.float64, torch.uint8, torch.bool])
@pytest.mark.parametrize('label', [torch.uint8, torch.int16])
def test_triton_takes_other_types(make_batch, weight, label):
    logits, target = make_batch((3, 7), (3, 7), **batch_of('triton'))
    pixel_weight = torch.randint(0, 2, target.shape, device=DEVICE).to(weight)
    options = dict(backend='triton', logit_bias=torch.arange(5, device=DEVICE))
    stats = soft_stats(logits, target.to(label), pixel_weight=pixel_weight, **options)
    expected = soft_stats(logits, target, pixel_weight=pixel_weight.float(), **options)
    for name in SUMS:
        assert torch.equal(getattr(stats, name), getattr(expected, name))


@needs_triton
@pytest.mark.parametrize('small', [False, True])
def test_triton_gives_the_same_bits_again(make_batch, small):
    label = (512, 1024) if DEVICE.type == 'cuda' else (3, 130)
    logits, target = make_batch((2, 9) if small else label, label, **batch_of('triton'))
    options = dict(backend='triton', group=target % 5, num_groups=5) | options_for('marked', target)
    first, second = (soft_stats(logits, target, **options) for _ in range(2))
    for name in (*SUMS, 'group_nll', 'group_count', 'marked_intersection', 'marked_truth'):
        assert torch.equal(getattr(first, name), getattr(second, name))
    first, second = (gradients(logits, target, **options) for _ in range(2))
    assert torch.equal(first, second)


@needs_triton
@pytest.mark.parametrize('resized', [False, True])
@pytest.mark.parametrize('axis', range(4))
def test_triton_reaches_beyond_32_bits(monkeypatch, axis, resized):
    # only its few used pages become real memory, if nobody fills it
    monkeypatch.setattr(torch.utils.deterministic, 'fill_uninitialized_memory', False)
    size, strides = [1, 2, 2, 2], [8, 4, 2, 1]
    size[axis], strides[axis] = 3, 2**30
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE).as_strided(size, strides)
    far.copy_(torch.randn(size))
    target = torch.randint(0, 2, (size[0], *((3, 5) if resized else size[2:])), device=DEVICE)
    near = far.float()
    torch.testing.assert_close(
        soft_stats(far, target, backend='triton').nll, soft_stats(near, target, backend='eager').nll
    )
    gradient = gradients(far, target, 'triton').float()
    torch.testing.assert_close(gradient, gradients(near, target, 'eager'), rtol=1e-2, atol=1e-2)


@needs_triton
@pytest.mark.skipif(DEVICE.type == 'cuda', reason='a device is lost to its process when it asserts')
@pytest.mark.parametrize(('label', 'group'), [(5, 0), (-1, 0), (2**32, 0), (0, 7), (0, -1)])
def test_triton_asserts_what_is_not_checked_before(make_batch, label, group):
    logits, target = make_batch((3, 7), (3, 7), dtype=torch.float32)
    group = torch.full_like(target, group)
    target[0, 1, 2] = label
    options = Options(None, 255, None, 0.0, False, False, False, group, 7, False, None)
    with pytest.raises(RuntimeError, match='target or group'):
        triton.soft_stats(logits, target, options)


@needs_triton
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(dtype=torch.float64), 'logits are float64'),
        (dict(classes=257), 'up to 256 classes and the logits have 257'),
        (dict(num_groups=4097), 'up to 4096 groups and num_groups is 4097'),
        (dict(interpreted=False), 'CUDA devices and the logits are on cpu'),
    ],
)
def test_a_named_backend_that_cannot_run_says_why(monkeypatch, change, message):
    change = dict(dtype=torch.float32, classes=5, num_groups=0, interpreted=True) | change
    logits = torch.zeros(1, change['classes'], 2, 2, dtype=change['dtype'])
    target = torch.zeros(1, 2, 2, dtype=torch.long)
    monkeypatch.setattr(triton, 'INTERPRETED', change['interpreted'])
    groups = dict(group=target, num_groups=change['num_groups']) if change['num_groups'] else {}
    with pytest.raises(RuntimeError, match=f"backend='triton' cannot run.*{message}"):
        soft_stats(logits, target, backend='triton', **groups)
    assert soft_stats(logits, target, **groups).correct.item() == 4


@needs_triton
def test_triton_needs_a_recent_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    reason = triton._why_not_on.__wrapped__(torch.device('cuda:9'))
    assert reason == 'its kernels need compute capability 8.0 and cuda:9 has 7.5'


@needs_triton
def test_the_first_launch_decides_once_with_one_warning(monkeypatch):
    """A compiler without Python's headers, for one: what Triton raises is an error of that compiler."""
    tries = []

    def fail(device):
        tries.append(device)
        raise subprocess.CalledProcessError(1, ['gcc', 'main.c', '-o', 'cuda_utils.so'])

    monkeypatch.setattr(triton, 'INTERPRETED', False)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 0))
    monkeypatch.setattr(triton, '_start_a_kernel', fail)
    triton._why_not_on.cache_clear()
    device = torch.device('cuda:9')
    logits = SimpleNamespace(is_cuda=True, device=device, dtype=torch.float32, shape=(1, 5, 2, 2))
    with pytest.warns(UserWarning, match=r"cannot start a kernel on cuda:9 .*gcc.*'strips'.*headers"):
        assert contract.choose_backend('auto', logits, 0) is strips
    assert contract.choose_backend('auto', logits, 0) is strips  # a second warning would be an error
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run: Triton cannot start.*gcc"):
        contract.choose_backend('triton', logits, 0)
    assert tries == [device]
    triton._why_not_on.cache_clear()


@needs_triton
def test_triton_takes_the_device_on_which_a_kernel_starts(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 0))
    monkeypatch.setattr(triton, '_start_a_kernel', lambda device: None)
    assert triton._why_not_on.__wrapped__(torch.device('cuda:9')) is None


def test_a_backend_without_its_package_says_so(monkeypatch):
    contract._compiled_backend.cache_clear()
    logits = torch.zeros(1, 2, 1, 1)
    for name, compiler in (('triton', 'Triton'), ('cpu', 'Numba')):
        monkeypatch.setitem(sys.modules, f'mmseg_imbalance.ops.{name}', None)
        with pytest.raises(RuntimeError, match=f'{compiler} cannot be imported'):
            soft_stats(logits, torch.zeros(1, 1, 1, dtype=torch.long), backend=name)
    for is_cuda in (False, True):
        assert contract.choose_backend('auto', SimpleNamespace(is_cuda=is_cuda), 0) is strips
    contract._compiled_backend.cache_clear()


@needs_numba
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_auto_takes_the_cpu_kernels_but_not_for_float64(dtype):
    logits = torch.zeros(1, 2, 1, 1, dtype=dtype)
    assert contract.choose_backend('auto', logits, 0) is (strips if dtype == torch.float64 else cpu)
    if dtype == torch.float64:
        with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run: .*the logits are float64"):
            contract.choose_backend('cpu', logits, 0)


@needs_numba
def test_auto_takes_strips_where_numba_does_not_compile(monkeypatch):
    monkeypatch.setattr(cpu.kernels, 'sum_rows', cpu.kernels.sum_rows.py_func)  # with NUMBA_DISABLE_JIT=1
    logits = torch.zeros(1, 2, 1, 1)
    assert contract.choose_backend('auto', logits, 0) is strips
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run: NUMBA_DISABLE_JIT is set"):
        contract.choose_backend('cpu', logits, 0)


@needs_numba
def test_the_cpu_kernels_refuse_another_device():
    with pytest.raises(RuntimeError, match='it runs on a CPU and the logits are on meta'):
        contract.choose_backend('cpu', torch.zeros(1, 2, 1, 1, device='meta'), 0)


@needs_numba
def test_the_cpu_kernels_give_the_same_bits_with_any_number_of_threads(make_batch):
    logits, target = (t.cpu() for t in make_batch((5, 7), (37, 51), dtype=torch.float32))
    options = {
        k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options_for('all', target).items()
    }
    options.pop('with_log_prob')
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        stats = soft_stats(logits, target, backend='cpu', **options)
        found.append((stats.nll, stats.prediction, gradients(logits, target, 'cpu', **options)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize('backend', [pytest.param('cpu', marks=needs_numba), 'strips'])
def test_a_compiled_step_calls_the_passes_as_they_are(make_batch, backend):
    from torch._dynamo.utils import counters

    logits, target = (t.cpu() for t in make_batch((5, 7), (13, 17), dtype=torch.float32))

    def step(z):
        z.grad = None
        stats = soft_stats(z, target, backend=backend)
        (stats.nll.sum() / stats.truth.sum()).backward()
        return z.grad

    expected = step(logits.clone().requires_grad_())
    torch._dynamo.reset()
    counters.clear()
    grad = torch.compile(step, backend='eager')(logits.clone().requires_grad_())
    torch.testing.assert_close(grad, expected)
    assert counters['frames']['total'] <= 12, counters['frames']  # 46 or more where they are traced


@needs_numba
def test_exp_and_log_of_the_cpu_kernels_are_exact_to_single_precision():
    x = np.linspace(-87, 0, 100_001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs([cpu.kernels.exp(value) for value in x] / exact - 1).max() < 1.5e-7
    assert cpu.kernels.exp(np.float32(-87.1)) == cpu.kernels.exp(np.float32(-np.inf)) == 0
    assert np.isnan([f(np.float32(np.nan)) for f in (cpu.kernels.exp, cpu.kernels.log)]).all()
    positive = np.geomspace(1, 1024, 100_001, dtype=np.float32)
    log = np.log(positive.astype(np.float64))
    assert np.abs([cpu.kernels.log(value) for value in positive] - log).max() < 5e-7
    # sixteen at a time
    of_lanes, out = on_lanes(cpu.kernels), np.empty(100_000, np.float32)
    of_lanes[0](x[:-1], out)
    assert np.abs(out / exact[:-1] - 1).max() < 1.5e-7
    of_lanes[1](positive[:-1], out)
    assert np.abs(out - log[:-1]).max() < 5e-7
    special = np.resize(np.float32([-87.1, -np.inf, 0, np.nan]), 16)
    of_lanes[0](special, out[:16])
    np.testing.assert_array_equal(out[:4], [0, 0, 1, np.nan])
    of_lanes[1](special[::-1].copy(), out[:16])
    assert np.isnan(out[0])


def on_lanes(kernels):
    """exp and log of an array whose length is a multiple of sixteen."""
    numba, lanes = pytest.importorskip('numba'), import_module('mmseg_imbalance.ops.lanes')
    load, store, number, exp, log = lanes.load, lanes.store, lanes.NUMBER, kernels.exp, kernels.log

    @numba.njit(error_model='numpy', fastmath={'contract'})
    def exp_of(values, out):
        for x in range(0, len(values), number):
            store(out, (x,), exp(load(values, (x,))))

    @numba.njit(error_model='numpy', fastmath={'contract'})
    def log_of(values, out):
        for x in range(0, len(values), number):
            store(out, (x,), log(load(values, (x,))))

    return exp_of, log_of


@needs_numba
@pytest.mark.slow
@pytest.mark.parametrize('place', ['a folder', 'none', 'a full disk'])
def test_the_cpu_kernels_are_kept_on_disk_where_there_is_a_place(place, tmp_path):
    """A child that forks after the first pass, as a data loader does, makes one too."""
    package, folder = tmp_path / 'ops', tmp_path / 'cache'
    package.mkdir()
    for name in (
        '__init__',
        'cpu',
        'cpu_kernels',
        'lanes',
        'bilinear',
        'contract',
        'threads',
        'soft_stats',
        'similarity',
    ):
        text = Path(strips.__file__).with_name(f'{name}.py').read_text()
        (package / f'{name}.py').write_text(text.replace('mmseg_imbalance.ops', 'ops'))
    script = """
import multiprocessing, resource, sys, torch
import ops.cpu, ops.soft_stats
if sys.argv[1] == 'a full disk':
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
def use(_=None):
    leaf = torch.randn(1, 3, 64, 64).requires_grad_()
    ops.soft_stats(leaf, torch.ones(1, 64, 64, dtype=torch.long), backend='cpu').nll.sum().backward()
    return leaf.grad.isfinite().all().item()
assert not ops.cpu.kernels.sum_rows.signatures, 'compiled at import'
torch.set_num_threads(2)
assert use() and all(multiprocessing.get_context('fork').Pool(2).map(use, range(4)))
print(sum(ops.cpu.kernels.sum_rows.stats.cache_hits.values()))
"""
    # a file in the way of each folder in which Numba would keep what it compiles
    (package / '__pycache__').write_text('')
    (tmp_path / 'no').write_text('')
    environment = {**os.environ, 'HOME': str(tmp_path / 'no'), 'XDG_CACHE_HOME': str(tmp_path / 'no')}
    environment |= {} if place == 'none' else dict(NUMBA_CACHE_DIR=str(folder))
    hits = []
    for run in range(3):
        if run == 2:  # a change of what the kernels are made of
            with (package / 'lanes.py').open('a') as file:
                file.write('# changed')
        command = [sys.executable, '-c', script, place]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        hits.append(done.stdout.split()[-1])
    assert hits == (['0', '1', '0'] if place == 'a folder' else ['0', '0', '0'])


@pytest.mark.parametrize(('reason', 'chosen'), [(None, 'kernels'), ('float64', 'strips')])
def test_auto_takes_triton_on_cuda_where_it_can_run(monkeypatch, reason, chosen):
    kernels = ModuleType('kernels')
    kernels.why_not = lambda logits, num_groups: reason
    monkeypatch.setattr(contract, '_compiled_backend', lambda name: kernels if name == 'triton' else 'none')
    assert contract.choose_backend('auto', SimpleNamespace(is_cuda=False), 0) is strips
    assert contract.choose_backend('auto', SimpleNamespace(is_cuda=True), 0).__name__.endswith(chosen)


@needs_triton
@pytest.mark.parametrize(
    ('capability', 'case'),
    [(80, 'all options'), *((n, 'few classes') for n in (80, 90, 100)), (90, 'many classes')],
)
def test_triton_compiles_without_a_device(capability, case, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    script = Path(__file__).with_name('compile_triton.py')
    done = subprocess.run(
        [sys.executable, script, str(capability), case],
        env=environment | dict(TRITON_CACHE_DIR=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
