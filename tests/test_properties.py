"""What holds of soft_stats and of every loss for whatever types, shapes, options and labels come."""

import inspect
import traceback

from mmseg_imbalance.registry import MODELS

import pytest
import torch
import torch.nn.functional as F
from conftest import cpu, needs_numba
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mmseg_imbalance import losses, recall, subclass
from mmseg_imbalance.losses import WeightedLoss
from mmseg_imbalance.ops import SoftStats, soft_stats, strips
from mmseg_imbalance.ops.soft_stats import FLOATS, INTEGERS

LOSSES = sorted(
    name
    for name, kind in MODELS.module_dict.items()
    if inspect.isclass(kind)
    and issubclass(kind, WeightedLoss)
    and kind.__module__ in (losses.__name__, recall.__name__, subclass.__name__)
)
DIFFERENTIABLE = ('nll', 'intersection', 'prediction', 'log_prob', 'marked_intersection')
# of values, which are summed in single precision at least, and of gradients, whose type is that of the logits
VALUES = {torch.float64: dict(rtol=1e-9, atol=1e-9)}
GRADIENTS = VALUES | {
    torch.float16: dict(rtol=2e-3, atol=2e-4),
    torch.bfloat16: dict(rtol=1.6e-2, atol=1e-3),
}
SINGLE = dict(rtol=2e-5, atol=5e-5)
FEW = st.integers(2, 6)


def settled(examples):
    """The same examples every time."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
    )


@pytest.fixture(autouse=True)
def several_strips(monkeypatch):
    monkeypatch.setattr(strips, 'STRIP_NUMBERS', 60)
    if not isinstance(cpu, str):
        monkeypatch.setattr(cpu, 'PART_NUMBERS', 60)
        monkeypatch.setattr(cpu, 'PIECE_NUMBERS', 20)


def with_other_strides(x, swap):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if swap else x


def can_hold(kind, ignore_index):
    return ignore_index is not None and torch.iinfo(kind).min <= ignore_index <= torch.iinfo(kind).max


@st.composite
def batches(draw, classes=FEW, dtypes=FLOATS, most=7):
    """Logits, target, ignore_index and a generator of random numbers."""
    c, images = draw(classes), draw(st.integers(1, 2))
    small = draw(st.tuples(st.integers(1, most), st.integers(1, most)))
    large = draw(st.one_of(st.just(small), st.tuples(st.integers(1, 2 * most), st.integers(1, 3 * most))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    dtype, kind = draw(st.sampled_from(dtypes)), draw(st.sampled_from(INTEGERS))
    ignore_index = draw(st.sampled_from([None, 255, -100, 0]))
    target = torch.randint(0, min(c, torch.iinfo(kind).max + 1), (images, *large), generator=generator)
    if draw(st.booleans()):  # rows of one class
        target = target[..., :1].expand_as(target).clone()
    if can_hold(kind, ignore_index):
        share = draw(st.sampled_from([0.0, 0.3, 1.0]))
        target[torch.rand(target.shape, generator=generator) < share] = ignore_index
    scale = draw(st.sampled_from([0.0, 1.0, 30.0]))
    logits = (scale * torch.randn(images, c, *small, generator=generator)).to(dtype)
    logits = with_other_strides(logits, draw(st.booleans()))
    target = with_other_strides(target.to(kind), draw(st.booleans()))
    return logits, target, ignore_index, generator


@st.composite
def calls(draw, spoilt=True, **options):
    """Logits, target and the options of a call; ``spoilt``: at times with NaN under ignored pixels."""
    logits, target, ignore_index, generator = draw(batches(**options))
    chosen = dict(
        ignore_index=ignore_index,
        focal_gamma=draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        square_prediction=draw(st.booleans()),
        with_log_prob=draw(st.booleans()),
        with_recall=draw(st.booleans()),
        align_corners=draw(st.booleans()),
    )
    weight = torch.rand(target.shape, generator=generator)
    if spoilt and can_hold(target.dtype, ignore_index) and draw(st.booleans()):
        value = draw(st.sampled_from([float('nan'), float('inf'), -float('inf')]))
        logits = logits.masked_fill(torch.rand(logits.shape, generator=generator) < 0.1, value)
        touched = ~logits.isfinite()
        if logits.shape[2:] != target.shape[1:]:  # by the coordinates of either precision
            resized = (
                F.interpolate(z, target.shape[1:], mode='bilinear', align_corners=chosen['align_corners'])
                for z in (logits.float(), logits.double())
            )
            touched = torch.cat([~z.isfinite() for z in resized], 1)
        target = target.masked_fill(touched.any(1), ignore_index)
        weight = weight.masked_fill(target == ignore_index, value)
    chosen['pixel_weight'] = draw(
        st.sampled_from([None, weight, (3 * weight.nan_to_num()).int(), weight.half()])
    )
    if draw(st.booleans()):
        chosen['logit_bias'] = torch.randn(logits.shape[1], generator=generator)
    if draw(st.booleans()):
        number = draw(st.sampled_from([1, 5, 300]))
        kind = draw(st.sampled_from(INTEGERS))
        most = min(number, torch.iinfo(kind).max + 1)
        group = torch.randint(0, most, target.shape, generator=generator).to(kind)
        chosen |= dict(group=with_other_strides(group, draw(st.booleans())), num_groups=number)
    if draw(st.booleans()):
        marked = torch.rand(target.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
        chosen['marked'] = with_other_strides(marked, draw(st.booleans()))
    return logits, target, chosen


def fields_and_gradient(logits, target, options, backend):
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    stats = soft_stats(leaf, target, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    total = 0
    for name in DIFFERENTIABLE:
        values = getattr(stats, name)
        if values is not None:
            upstream = torch.randn(values.shape, generator=generator, dtype=torch.float64)
            total = total + (values.double() * upstream).sum()
    (gradient,) = torch.autograd.grad(total, leaf)
    return {name: getattr(stats, name) for name in SoftStats.__dataclass_fields__}, gradient


def check_backend(call, backend):
    logits, target, options = call
    found, gradient = fields_and_gradient(logits, target, options, backend)
    # what is half is not rounded again: the definition is that of the numbers as they are
    expected, truth = fields_and_gradient(logits.double(), target, options, 'eager')
    for name, values in expected.items():
        if values is None:
            assert found[name] is None
            continue
        assert found[name].isfinite().all(), name
        assert found[name].shape == values.shape
        if name == 'correct' or name == 'class_correct':
            continue  # of ties that rounding decides
        torch.testing.assert_close(
            found[name].double(),
            values.double(),
            **VALUES.get(logits.dtype, SINGLE),
            msg=lambda message, name=name: f'{name}: {message}',
        )
    assert gradient.isfinite().all()
    assert gradient.dtype == logits.dtype
    largest = max(1.0, float(truth.abs().max()))  # where large terms cancel their rounding is left
    tolerance = GRADIENTS.get(logits.dtype, SINGLE)
    torch.testing.assert_close(gradient.double() / largest, truth / largest, **tolerance)
    if logits.shape[2:] == target.shape[1:] and options['ignore_index'] is not None:
        ignored = target.long() == options['ignore_index']
        assert (gradient.movedim(1, 3)[ignored] == 0).all()


@settled(150)
@given(calls())
def test_strips_are_the_definition(call):
    check_backend(call, 'strips')


@settled(15)
@given(calls(classes=st.sampled_from([127, 128, 255, 256, 257, 300]), most=3))
def test_strips_are_the_definition_with_many_classes(call):
    check_backend(call, 'strips')


@needs_numba
@settled(150)
@given(calls(dtypes=FLOATS[:3]))
def test_the_cpu_kernels_are_the_definition(call):
    check_backend(call, 'cpu')


@needs_numba
@settled(15)
@given(calls(dtypes=FLOATS[:3], classes=st.sampled_from([127, 128, 255, 256, 257, 300]), most=3))
def test_the_cpu_kernels_are_the_definition_with_many_classes(call):
    check_backend(call, 'cpu')


@settled(60)
@given(calls())
def test_the_definition_in_each_type_is_that_in_double(call):
    check_backend(call, 'eager')


@settled(60)
@given(calls(spoilt=False), st.sampled_from(['eager', 'strips', 'auto']))
def test_correct_counts_what_argmax_finds(call, backend):
    logits, target, options = call
    logits = logits.float().round()  # with ties
    assume(logits.shape[2:] == target.shape[1:] and 'logit_bias' not in options)
    stats = soft_stats(logits, target, backend=backend, **options)
    valid = torch.ones_like(target, dtype=torch.bool)
    if options['ignore_index'] is not None:
        valid = target.long() != options['ignore_index']
    hit = (logits.argmax(1) == target) & valid
    assert torch.equal(stats.correct, hit.sum((1, 2)))
    if options['with_recall']:
        for c in range(logits.shape[1]):
            assert torch.equal(stats.class_correct[:, c], (hit & (target == c)).sum((1, 2)))
            assert torch.equal(stats.class_count[:, c], (valid & (target == c)).sum((1, 2)))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='many small kernels; the interpreter needs no device')
@settled(10)
@given(calls(spoilt=False, dtypes=FLOATS[:3], most=2, classes=st.integers(2, 4)))
def test_triton_is_the_definition(call):
    triton = pytest.importorskip('mmseg_imbalance.ops.triton')
    assert triton.INTERPRETED
    check_backend(call, 'triton')


def raised_by_us(error):
    return 'mmseg_imbalance' in traceback.extract_tb(error.__traceback__)[-1].filename


def check_refusal(call):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert raised_by_us(caught.value), caught.value
    assert 'got' in str(caught.value) or 'there are no pixels' in str(caught.value)


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5]), max_size=5).map(tuple)


@settled(150)
@given(st.data(), SHAPES, st.sampled_from(['logits', 'target', 'pixel_weight', 'group', 'logit_bias']))
def test_no_other_shape_is_spread_or_cut_to_fit(data, shape, name):
    right = dict(
        logits=(2, 3, 4, 5), target=(2, 4, 5), pixel_weight=(2, 4, 5), group=(2, 4, 5), logit_bias=(3,)
    )
    fits = shape[:1] == (2,) and 0 not in shape
    # logits of another size are resized, and a label of another size takes no weights or groups of this one
    assume(shape != right[name] and not (name == 'logits' and fits and len(shape) == 4 and shape[1] == 3))
    arguments = {key: torch.ones(size, dtype=torch.int64) for key, size in right.items()}
    arguments |= {name: torch.ones(shape, dtype=torch.int64)}
    logits, target = arguments.pop('logits').float(), arguments.pop('target')
    if name == 'target':
        arguments = {}
        assume(not (fits and len(shape) == 3))
    check_refusal(lambda: soft_stats(logits, target, num_groups=2 if arguments else 0, **arguments))


def loss_options(name, draw):
    kind = MODELS.get(name)
    known = set(kind.term_options)
    choices = dict(
        gamma=[0.3, 1.0, 2.0],
        smooth=[0.0, 1.0],
        square_denominator=[False, True],
        region_reduction=['image', 'batch'],
        absent_classes=['include', 'ignore'],
        label_smoothing=[0.0, 0.1],
        focal_gamma=[0.0, 0.5, 2.0],
    )
    options = {key: draw(st.sampled_from(values)) for key, values in choices.items() if key in known}
    if name == 'WeightedTverskyLoss':
        del options['square_denominator']
    if name == 'CombinedWeightedLoss':
        options['region'] = draw(st.sampled_from(['dice', 'jaccard', 'tversky', 'generalized_dice']))
        options['square_denominator'] = options['square_denominator'] and options['region'] != 'tversky'
        options['balance'] = draw(st.sampled_from(['fixed', 'uncertainty']))
    if name == 'SimilaritySubclassifiedLoss' and not options.get('label_smoothing'):
        options['paper_exact'] = draw(st.booleans())
    return options


def value_and_gradient(name, options, backend, logits, target, weight, features, steps=2, **more):
    loss = MODELS.build(dict(type=name, backend=backend, **options))
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    inputs = dict(features=features) if loss.needs_features else {}
    for _ in range(steps if loss.needs_features else 1):
        value = loss(leaf, target, weight=weight, **inputs, **more)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value, gradient


@settled(15)
@given(data=st.data())
@pytest.mark.parametrize('name', LOSSES)
def test_every_loss_is_finite_and_that_of_the_definition(name, data):
    logits, target, ignore_index, generator = data.draw(batches(dtypes=(torch.float32, torch.float16)))
    options = loss_options(name, data.draw)
    weight = data.draw(st.sampled_from([None, torch.rand(target.shape, generator=generator)]))
    features = torch.randn(len(logits), 3, *logits.shape[2:], generator=generator)
    form = data.draw(st.sampled_from(['images', 'one channel', 'points']))
    if form == 'one channel':  # the logits of two classes
        logits = logits[:, :1]
        counted = torch.ones_like(target, dtype=torch.bool)
        if ignore_index is not None:
            counted = target.long() != ignore_index
        target = torch.where(counted, target % 2, target)
    elif form == 'points' and logits.shape[2:] == target.shape[1:]:
        logits, features, target = logits.flatten(2), features.flatten(2), target.flatten(1)
        weight = None if weight is None else weight.flatten(1)
    classes = max(2, logits.shape[1])
    weights = torch.rand(classes, generator=generator)
    weights[0] = data.draw(st.sampled_from([0.0, 1.0]))
    options['class_weight'] = data.draw(st.sampled_from([None, weights.tolist()]))
    more = dict(ignore_index=ignore_index, align_corners=data.draw(st.booleans()))
    arguments = (logits, target, weight, features)
    value, gradient = value_and_gradient(name, options, 'auto', *arguments, **more)
    expected, truth = value_and_gradient(name, options, 'eager', *arguments, **more)
    assert value.isfinite()
    assert gradient.isfinite().all()
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    assert gradient.shape == logits.shape
    torch.testing.assert_close(gradient, truth, rtol=5e-3, atol=5e-4)


@settled(15)
@given(shape=SHAPES, argument=st.sampled_from(['pred', 'target', 'weight', 'class_weight']))
@pytest.mark.parametrize('name', LOSSES)
def test_every_loss_refuses_other_shapes(name, shape, argument):
    right = dict(pred=(2, 3, 4, 5), target=(2, 4, 5), weight=(2, 4, 5))
    fits = shape[:1] == (2,) and 0 not in shape
    assume(shape != right.get(argument))
    assume(not (argument == 'pred' and fits and len(shape) == 4 and shape[1] == 3))
    arguments = {key: torch.ones(size) for key, size in right.items()}
    classes = 3
    if argument == 'class_weight':
        classes = len(shape) + 1
        assume(classes != 3)
    else:
        arguments[argument] = torch.ones(shape)
        if argument == 'target':
            del arguments['weight']
            assume(not (fits and len(shape) == 3))
    loss = MODELS.build(dict(type=name, class_weight=[1.0] * classes))
    pred, target = arguments.pop('pred'), arguments.pop('target').long()
    inputs = dict(features=torch.ones(2, 3, 4, 5)) if loss.needs_features else {}
    with pytest.raises((TypeError, ValueError)) as caught:
        loss(pred, target, **arguments, **inputs)
    assert raised_by_us(caught.value), caught.value


@pytest.mark.parametrize('name', LOSSES)
def test_a_first_call_in_inference_mode_is_no_hindrance_to_training(name, monkeypatch):
    from mmseg_imbalance import class_weight

    monkeypatch.setattr(class_weight, 'class_names', lambda: ['road', 'car', 'pole'])
    loss = MODELS.build(dict(type=name, class_weight=dict(pole=3.0), logit_adjustment=0.5))
    with torch.inference_mode():
        loss.class_weight.set_pixels([5, 3, 2])
    generator = torch.Generator().manual_seed(0)
    inputs = dict(features=torch.randn(2, 4, 5, 6, generator=generator)) if loss.needs_features else {}
    target = torch.randint(0, 3, (2, 10, 12), generator=generator)
    with torch.inference_mode():
        inside = loss(torch.ones(2, 3, 5, 6), target, **inputs)
    leaf = torch.ones(2, 3, 5, 6, requires_grad=True)
    for _ in range(2):
        value = loss(leaf, target, **inputs)
        value.backward()
    assert leaf.grad.isfinite().all()
    assert inside.isfinite()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('name', LOSSES)
def test_every_loss_is_finite_where_nothing_counts_and_whatever_lies_there(name, dtype):
    """A rank without a valid pixel: the rest of its logits may be anything."""
    target = torch.full((2, 5, 6), 255)
    leaf = torch.full((2, 3, 5, 6), float('nan'), dtype=dtype)
    leaf[0, 1] = float('inf')
    leaf.requires_grad_()
    for options in ({}, dict(class_weight=[0.0, 0.0, 1.0])):
        loss = MODELS.build(dict(type=name, **options))
        inputs = dict(features=torch.zeros(2, 4, 5, 6)) if loss.needs_features else {}
        value = loss(leaf, target, **inputs)
        (gradient,) = torch.autograd.grad(value, leaf)
        assert value == 0
        assert (gradient == 0).all()
        # the only class that occurs weighs nothing
        some = target.clone()
        some[0, 0] = 0
        near = leaf.detach().clone()
        near[0, :, 0] = 1.0
        near.requires_grad_()
        value = loss(near, some, **inputs)
        (gradient,) = torch.autograd.grad(value, near)
        assert value.isfinite()
        assert gradient.isfinite().all()
