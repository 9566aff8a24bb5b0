import pytest
import torch

from mmseg_imbalance.ops import similarity_weight, soft_stats, valid_pixels

BACKENDS = ['eager', 'strips']


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
    with pytest.raises(ValueError, match=r'pixel_weight holds .* on 3 pixels; allowed are finite numbers'):
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
