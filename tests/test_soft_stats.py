import oracle
import pytest
import torch
import torch.nn.functional as F

from mmseg_imbalance.ops import SoftStats, soft_stats, strips

BACKENDS = ('eager', 'strips')
SUMS = ('nll', 'intersection', 'prediction', 'truth', 'correct')
DIFFERENTIABLE = ('nll', 'intersection', 'prediction', 'log_prob')

pytestmark = pytest.mark.usefixtures('uninitialised_is_nan', 'narrow_strips')


@pytest.fixture
def narrow_strips(monkeypatch):
    """Several strips an image, the last one shorter, also at the size of a test."""
    monkeypatch.setattr(strips, 'STRIP_NUMBERS', 500)


def sizes():
    yield (13, 17), (13, 17), False
    for label in (
        (10, 14),
        (20, 28),
        (37, 51),
        (3, 5),
    ):  # scale 2, 4, 7.3 and a reduction, from 5 x 7
        yield (5, 7), label, False
        yield (5, 7), label, True


OPTIONS = {
    'plain': {},
    'focal': dict(focal_gamma=1.7),
    'focal below 1': dict(focal_gamma=0.5),
    'square': dict(square_prediction=True),
    'bias': dict(logit_bias=torch.tensor([0.3, -2.0, 0.0, 1.0, 5.0])),
    'weight': dict(pixel_weight=True),
    'log_prob': dict(with_log_prob=True),
    'group': dict(group=True, num_groups=7),
    'all': dict(
        focal_gamma=2.0,
        square_prediction=True,
        logit_bias=torch.tensor([0.3, -2.0, 0.0, 1.0, 5.0]),
        pixel_weight=True,
        with_log_prob=True,
        group=True,
        num_groups=7,
    ),
}


def options_for(name, target):
    options = dict(OPTIONS[name])
    generator = torch.Generator().manual_seed(3)
    if 'pixel_weight' in options:
        options['pixel_weight'] = torch.rand(target.shape, generator=generator) * 3
    if 'group' in options:
        options['group'] = torch.randint(0, 7, target.shape, generator=generator)
    return options


def gradients(logits, target, backend, seed=1, **options):
    """Gradient by the logits under random upstream vectors of every differentiable field."""
    leaf = logits.detach().clone().requires_grad_()
    stats = soft_stats(leaf, target, backend=backend, with_log_prob=True, **options)
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for name in DIFFERENTIABLE:
        value = getattr(stats, name)
        upstream = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        total = total + (value * upstream.to(value.dtype)).sum()
    return torch.autograd.grad(total, leaf)[0]


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('option', OPTIONS)
@pytest.mark.parametrize(('logit_size', 'label_size', 'align_corners'), list(sizes()))
def test_equals_the_loops_of_the_definition(
    make_batch, backend, option, logit_size, label_size, align_corners
):
    logits, target = make_batch(logit_size, label_size)
    options = options_for(option, target) | dict(align_corners=align_corners)
    stats = soft_stats(logits, target, backend=backend, **options)
    arrays = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with_log_prob = arrays.pop('with_log_prob', False)
    expected = oracle.soft_stats(logits.numpy(), target.numpy(), **arrays)
    names = (
        *SUMS,
        *(['log_prob'] if with_log_prob else []),
        *(['group_nll', 'group_count'] if 'group' in options else []),
    )
    for name in names:
        torch.testing.assert_close(
            getattr(stats, name).double(),
            torch.from_numpy(expected[name]),
            rtol=1e-10,
            atol=1e-10,
            msg=lambda m, n=name: f'{n}: {m}',
        )


@pytest.mark.parametrize('option', OPTIONS)
@pytest.mark.parametrize(('logit_size', 'label_size', 'align_corners'), list(sizes()))
def test_strips_has_the_gradients_of_eager(make_batch, option, logit_size, label_size, align_corners):
    logits, target = make_batch(logit_size, label_size)
    options = options_for(option, target) | dict(align_corners=align_corners)
    options.pop('with_log_prob', None)
    expected = gradients(logits, target, 'eager', **options)
    torch.testing.assert_close(
        gradients(logits, target, 'strips', **options), expected, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize('field', DIFFERENTIABLE)
@pytest.mark.parametrize('backend', BACKENDS)
def test_each_field_alone_passes_gradcheck(make_batch, backend, field):
    logits, target = make_batch((3, 4), (7, 5))
    logits = (logits / 4).requires_grad_()

    def function(z):
        stats = soft_stats(z, target, backend=backend, focal_gamma=1.3, with_log_prob=True)
        return getattr(stats, field)

    assert torch.autograd.gradcheck(function, logits)


@pytest.mark.parametrize('size', [(13, 17), (5, 7)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_error_is_at_most_twice_that_of_eager(make_batch, dtype, size):
    logits, target = make_batch(size, (13, 17), dtype=dtype)

    def distance(values, truth):
        return max(float((v.double() - t.double()).abs().max()) for v, t in zip(values, truth, strict=True))

    def fields(z, backend):
        stats = soft_stats(z, target, backend=backend, with_log_prob=True)
        assert stats.nll.dtype == torch.promote_types(z.dtype, torch.float32)
        return [getattr(stats, n) for n in DIFFERENTIABLE]

    truth = fields(logits.double(), 'eager')
    slack = 1e-6 * float(max(t.abs().max() for t in truth))
    assert distance(fields(logits, 'strips'), truth) <= 2 * distance(fields(logits, 'eager'), truth) + slack
    truth = [gradients(logits.double(), target, 'eager')]
    mine, plain = ([gradients(logits, target, b)] for b in ('strips', 'eager'))
    assert mine[0].dtype == dtype
    assert distance(mine, truth) <= 2 * distance(plain, truth) + 1e-6


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('label_size', [(13, 17), (26, 34)])
def test_non_contiguous_inputs_and_integer_types_change_nothing(make_batch, backend, label_size):
    logits, target = make_batch((13, 17), label_size)
    expected = soft_stats(logits, target, backend=backend)
    odd_logits = logits.to(memory_format=torch.channels_last)
    odd_target = target.to(torch.uint8).transpose(1, 2).contiguous().transpose(1, 2)
    assert not odd_logits.is_contiguous()
    assert not odd_target.is_contiguous()
    stats = soft_stats(odd_logits, odd_target, backend=backend)
    for name in SUMS:
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name))
    torch.testing.assert_close(gradients(odd_logits, odd_target, backend), gradients(logits, target, backend))


@pytest.mark.parametrize('backend', BACKENDS)
def test_top_half_plus_bottom_half_is_the_whole(make_batch, backend):
    logits, target = make_batch()
    halves = [
        soft_stats(logits[:, :, rows], target[:, rows], backend=backend)
        for rows in (slice(0, 6), slice(6, None))
    ]
    whole = soft_stats(logits, target, backend=backend)
    for name in SUMS:
        torch.testing.assert_close(sum(getattr(h, name) for h in halves), getattr(whole, name))


@pytest.mark.parametrize('backend', BACKENDS)
def test_permuted_classes_permute_the_columns(make_batch, backend):
    logits, target = make_batch((5, 7), (13, 17))
    order = torch.tensor([3, 0, 4, 1, 2])
    renamed = torch.where(target == 255, 255, order.argsort()[target.clamp(max=4)])
    plain = soft_stats(logits, target, backend=backend)
    permuted = soft_stats(logits[:, order], renamed, backend=backend)
    for name in ('nll', 'intersection', 'prediction', 'truth'):
        torch.testing.assert_close(getattr(permuted, name), getattr(plain, name)[:, order])
    torch.testing.assert_close(permuted.correct, plain.correct)


@pytest.mark.parametrize('backend', BACKENDS)
def test_weight_two_is_the_pixel_twice(make_batch, backend):
    logits, target = make_batch()
    weight = torch.ones(target.shape)
    weight[:, 4:] = 2
    doubled = soft_stats(logits, target, pixel_weight=weight, backend=backend)
    twice = soft_stats(
        torch.cat([logits, logits[:, :, 4:]], 2),
        torch.cat([target, target[:, 4:]], 1),
        backend=backend,
    )
    for name in ('nll', 'intersection', 'prediction', 'truth'):
        torch.testing.assert_close(getattr(doubled, name), getattr(twice, name))


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('label_size', [(13, 17), (26, 34)])
def test_logits_under_ignored_pixels_have_no_effect_and_no_gradient(make_batch, backend, label_size):
    logits, target = make_batch((13, 17), label_size)
    half = label_size[0] // 2
    target[:, half:] = 255
    untouched = logits.clone()
    far = 8  # rows of the logits that only ignored pixels are resized from
    untouched[:, :, far:] = 1e4 * torch.randn_like(untouched[:, :, far:])
    for name in SUMS:
        torch.testing.assert_close(
            getattr(soft_stats(untouched, target, backend=backend), name),
            getattr(soft_stats(logits, target, backend=backend), name),
        )
    assert (gradients(untouched, target, backend)[:, :, far:] == 0).all()


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0])
@pytest.mark.parametrize('label_size', [(13, 17), (26, 34)])
def test_extreme_logits_stay_exact_and_finite(make_batch, backend, gamma, label_size):
    logits, target = make_batch((13, 17), label_size, dtype=torch.float32)
    logits = logits.sign() * 1e4 + logits
    stats = soft_stats(logits, target, backend=backend, focal_gamma=gamma)
    expected = oracle.soft_stats(logits.numpy(), target.numpy(), focal_gamma=gamma)
    for name in ('nll', 'intersection', 'prediction'):
        torch.testing.assert_close(
            getattr(stats, name).double(), torch.from_numpy(expected[name]), rtol=1e-4, atol=2e-2
        )
    assert gradients(logits, target, backend, focal_gamma=gamma).isfinite().all()


@pytest.mark.parametrize('backend', BACKENDS)
def test_all_pixels_ignored_gives_zeros_and_zero_gradient(make_batch, backend):
    logits, target = make_batch((5, 7), (13, 17))
    target.fill_(255)
    stats = soft_stats(logits, target, backend=backend)
    for name in SUMS:
        assert (getattr(stats, name) == 0).all()
    assert (gradients(logits, target, backend) == 0).all()


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('ignore_index', [0, -100])
def test_any_value_can_be_the_ignored_one(make_batch, backend, ignore_index):
    logits, target = make_batch()
    renamed = torch.where(target == 255, ignore_index, target)
    stats = soft_stats(logits, renamed, ignore_index=ignore_index, backend=backend)
    expected = oracle.soft_stats(logits.numpy(), renamed.numpy(), ignore_index=ignore_index)
    for name in SUMS:
        torch.testing.assert_close(getattr(stats, name).double(), torch.from_numpy(expected[name]))


@pytest.mark.parametrize('backend', BACKENDS)
def test_an_ignored_value_outside_the_type_of_the_labels_ignores_nothing(make_batch, backend):
    logits, target = make_batch()
    target = target.clamp(max=4)
    expected = soft_stats(logits, target, backend=backend)
    for ignore_index in (torch.iinfo(torch.int64).min, -256, 256):
        stats = soft_stats(logits, target.to(torch.uint8), ignore_index=ignore_index, backend=backend)
        assert torch.equal(stats.truth, expected.truth)


@pytest.mark.parametrize('backend', BACKENDS)
def test_the_first_class_wins_a_tie(backend):
    logits = torch.zeros(1, 3, 4, 4)
    target = torch.arange(16).view(1, 4, 4) % 3
    assert soft_stats(logits, target, backend=backend).correct.item() == (target == 0).sum()


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('label_size', [(13, 17), (26, 34)])
def test_inputs_are_bitwise_unchanged_after_backward(make_batch, backend, label_size):
    logits, target = make_batch((13, 17), label_size)
    weight = torch.rand(target.shape)
    bias = torch.randn(5)
    inputs = (logits.requires_grad_(), target, weight, bias)
    before = [t.detach().clone() for t in inputs]
    stats = soft_stats(logits, target, pixel_weight=weight, logit_bias=bias, backend=backend)
    (stats.nll.sum() + stats.prediction.square().sum()).backward()
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, inputs, strict=True))


@pytest.mark.parametrize('backend', BACKENDS)
def test_autocast_does_not_lower_the_precision(make_batch, backend):
    logits, target = make_batch((5, 7), (13, 17), dtype=torch.float32)
    expected = soft_stats(logits, target, backend=backend), gradients(logits, target, backend)
    with torch.autocast('cpu', torch.bfloat16):
        stats = soft_stats(logits, target, backend=backend), gradients(logits, target, backend)
    for name in SUMS:
        assert torch.equal(getattr(stats[0], name), getattr(expected[0], name))
    assert torch.equal(stats[1], expected[1])


def test_strips_holds_no_tensor_of_label_size(make_batch, monkeypatch):
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    logits, target = make_batch((8, 8), (256, 256))
    monkeypatch.setattr(strips, 'STRIP_NUMBERS', 5 * 1024)
    leaf = logits.requires_grad_()
    with Largest() as seen:
        soft_stats(leaf, target, backend='strips').nll.sum().backward()
    assert seen.numel <= 2 * 256 * 256  # the label itself; logits at that size would be five times as much


def test_sum_images_is_a_batch_of_one(make_batch):
    logits, target = make_batch()
    stats = soft_stats(logits, target, with_log_prob=True)
    whole = stats.sum_images()
    assert isinstance(whole, SoftStats)
    for name in ('nll', 'intersection', 'prediction', 'truth', 'log_prob', 'correct'):
        torch.testing.assert_close(getattr(whole, name), getattr(stats, name).sum(0, keepdim=True))
    assert not whole.truth.requires_grad


def test_nothing_but_the_differentiable_fields_requires_grad(make_batch):
    logits, target = make_batch()
    group = torch.zeros_like(target)
    for backend in BACKENDS:
        stats = soft_stats(
            logits.requires_grad_(),
            target,
            with_log_prob=True,
            group=group,
            num_groups=1,
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
        (dict(focal_gamma=-1.0), ValueError, 'focal_gamma must be at least 0, got -1'),
        (dict(group=torch.zeros(2, 13, 17, dtype=torch.long)), ValueError, 'go together'),
        (dict(num_groups=2), ValueError, 'go together'),
        (dict(group=torch.full((2, 13, 17), 2), num_groups=2), ValueError, r'group holds \[2\]'),
        (dict(backend='cuda'), ValueError, "'auto' or one of"),
    ],
)
def test_bad_input_gets_one_clear_error(make_batch, change, error, message):
    logits, target = make_batch()
    arguments = dict(logits=logits, target=target) | change
    with pytest.raises(error, match=message):
        soft_stats(arguments.pop('logits'), arguments.pop('target'), **arguments)
