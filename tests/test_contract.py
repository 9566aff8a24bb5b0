import pytest
import torch

from mmseg_imbalance.ops import similarity_weight, soft_stats, valid_pixels
from mmseg_imbalance.ops.contract import sum_dtype

BACKENDS = ['eager', 'strips', 'auto']


@pytest.mark.parametrize('dtype', [torch.int64, torch.uint8])
@pytest.mark.parametrize('backend', BACKENDS)
def test_without_an_ignored_label_all_pixels_count(make_batch, backend, dtype):
    logits, target = make_batch()
    target = target.clamp(max=4).to(dtype)
    found = soft_stats(logits, target, ignore_index=None, backend=backend)
    expected = soft_stats(logits, target.long(), backend=backend)
    torch.testing.assert_close(found.nll, expected.nll)
    assert found.truth.sum() == target.numel()
    assert valid_pixels(target, None).all()
    torch.testing.assert_close(
        similarity_weight(logits, target, ignore_index=None), similarity_weight(logits, target.long())
    )


def test_without_an_ignored_label_255_is_no_class(make_batch):
    with pytest.raises(ValueError, match=r'target holds \[255\] on .* allowed are 0 to 4$'):
        soft_stats(*make_batch(), ignore_index=None)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('wrong', [-1.0, float('nan'), float('inf'), -float('inf')])
def test_pixel_weights_that_are_negative_or_not_finite_are_refused(make_batch, backend, wrong):
    logits, target = make_batch()
    weight = torch.ones(target.shape)
    target[0, 0, :3] = 1
    weight[0, 0, :3] = wrong
    with pytest.raises(ValueError, match=r'pixel_weight holds .* on 3 valid pixels; allowed are finite'):
        soft_stats(logits, target, pixel_weight=weight, backend=backend)
    weight[0, 0, :3] = 0
    assert soft_stats(logits, target, pixel_weight=weight, backend=backend).nll.isfinite().all()


@pytest.mark.parametrize('backend', BACKENDS)
def test_a_negative_weight_of_an_ignored_pixel_does_not_matter(make_batch, backend):
    logits, target = make_batch()
    weight = torch.where(target == 255, -1.0, 1.0)
    found = soft_stats(logits, target, pixel_weight=weight, backend=backend)
    torch.testing.assert_close(found.nll, soft_stats(logits, target, backend=backend).nll)


def test_an_ignored_label_that_the_type_of_the_label_cannot_hold_ignores_nothing(make_batch):
    _, target = make_batch()
    target[0, 0, :3] = 44  # 300 - 256
    assert valid_pixels(target.to(torch.uint8), 300).all()


def test_similarity_takes_what_is_not_finite_for_0(make_batch):
    logits, target = make_batch((32, 40), (32, 40))
    target[:, 8:16] = 255
    for size in ((32, 40), (8, 10)):
        near = logits[:, :, : size[0], : size[1]]
        spoilt, zero = near.clone(), near.clone()
        at = slice(8, 16) if size == (32, 40) else slice(2, 4)
        spoilt[:, :, at], zero[:, :, at] = float('nan'), 0
        spoilt[:, 1, at] = -float('inf')
        torch.testing.assert_close(similarity_weight(spoilt, target), similarity_weight(zero, target))


def test_similarity_needs_no_double_precision(make_batch, monkeypatch):
    from mmseg_imbalance.ops import similarity

    logits, target = make_batch((40, 48), (40, 48), classes=20, dtype=torch.float32)
    expected = similarity_weight(logits, target, threshold=0.5)
    monkeypatch.setattr(similarity, 'sum_dtype', lambda like: torch.float32)
    assert torch.equal(similarity_weight(logits, target, threshold=0.5), expected)
    assert len(expected.unique()) > 3


@pytest.mark.parametrize('shape', [(2, 1, 13, 17), (13, 17), (3, 13, 17), (2, 0, 17)])
def test_similarity_refuses_labels_of_another_shape(make_batch, shape):
    with pytest.raises(ValueError, match=r'target must be of shape|there are no pixels'):
        similarity_weight(make_batch()[0], torch.zeros(shape, dtype=torch.int64))


def test_double_precision_is_tried_on_the_device():
    like = torch.zeros(1)
    assert sum_dtype(like) == torch.float64

    class Refusing(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if (kwargs or {}).get('dtype') == torch.float64:
                raise TypeError('Cannot convert a MPS Tensor to float64 dtype')
            return function(*args, **(kwargs or {}))

    with Refusing():
        assert sum_dtype(like) == torch.float32
    assert sum_dtype(like) == torch.float64  # nothing is remembered


def test_similarities_are_those_of_single_precision_under_autocast(make_batch):
    logits, target = make_batch()
    logits = logits.float()
    expected = similarity_weight(logits, target, threshold=0.5)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(similarity_weight(logits, target, threshold=0.5), expected)
