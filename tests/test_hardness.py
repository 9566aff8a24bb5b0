"""Weights of pixels that are learnt: the value, both gradients, the weight head in a model."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.optim import build_optim_wrapper
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from mmseg_imbalance.hardness import HardnessWeightedLoss
from mmseg_imbalance.losses import WeightedCrossEntropyLoss

WEIGHT = [0.2, 3.0, 1.0, 0.5, 0.0]


def make_loss(trained=True, **options):
    loss = HardnessWeightedLoss(WEIGHT, **options)
    torch.manual_seed(0)
    loss.set_feature_shape(5, 4)
    if trained:  # at first all weights are the same
        torch.nn.init.normal_(loss.weight_head[-1].weight, std=2.0)
    return loss.double()


def batch(size=(23, 31), seed=1):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, 5, 5, 7, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 5, (2, *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    features = torch.randn(2, 4, 5, 7, generator=generator, dtype=torch.float64)
    return logits, target, features


def by_loops(loss, logits, target, features, align_corners, sampled=None):
    """The weighted mean of the source, pixel by pixel, with the gradients of both players."""
    size = target.shape[1:]
    z = F.interpolate(logits, size, mode='bilinear', align_corners=align_corners)
    h = F.interpolate(loss.weight_head(features), size, mode='bilinear', align_corners=align_corners)
    w = h[:, 0].sigmoid() + loss.floor
    if sampled is not None:
        w = w * sampled
    top = bottom = 0.0
    for image, row, column in (target != 255).nonzero().tolist():
        y = int(target[image, row, column])
        pixel = z[image, :, row, column]
        nll = pixel.exp().sum().log() - pixel[y]
        top = top + WEIGHT[y] * w[image, row, column] * nll
        bottom = bottom + WEIGHT[y] * w[image, row, column]
    return top / bottom


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('sampler', [False, True])
def test_the_model_descends_and_the_weight_head_climbs(align_corners, sampler):
    loss = make_loss(floor=0.3, rate=0.05, loss_weight=2.0)
    logits, target, features = batch()
    sampled = torch.rand(target.shape, dtype=torch.float64) if sampler else None
    logits.requires_grad_()
    features.requires_grad_()
    parameters = list(loss.weight_head.parameters())
    value = loss(logits, target, sampled, features=features, align_corners=align_corners)
    found = torch.autograd.grad(value, [logits, *parameters], retain_graph=True)
    assert torch.autograd.grad(value, features, allow_unused=True) == (None,)
    expected = 2 * by_loops(loss, logits, target, features.detach(), align_corners, sampled)
    torch.testing.assert_close(value, expected)
    of_model, *of_head = torch.autograd.grad(expected, [logits, *parameters])
    torch.testing.assert_close(found[0], of_model)
    for mine, theirs in zip(found[1:], of_head, strict=True):
        assert theirs.abs().max() > 1e-6
        torch.testing.assert_close(mine, -0.05 * theirs)


def test_it_starts_as_cross_entropy():
    logits, target, features = batch()
    plain = WeightedCrossEntropyLoss(WEIGHT)
    expected = plain(logits, target)
    torch.testing.assert_close(make_loss(trained=False)(logits, target, features=features), expected)


def test_an_init_cfg_of_the_model_for_all_convolutions_leaves_the_weights_equal():
    head = dict(type='FeatureHead', base='FCNHead', num_convs=0, concat_input=False, kernel_size=1)
    head |= dict(in_channels=4, channels=4, num_classes=5, loss_decode=dict(type='HardnessWeightedLoss'))
    head = MODELS.build(head | dict(init_cfg=dict(type='Normal', layer=['Conv2d'], std=5.0)))
    head.init_weights()
    assert head.conv_seg.weight.std() > 1
    assert not head.loss_decode.weight_head[-1].weight.any()
    assert not head.loss_decode.weight_head[-1].bias.any()


def test_pixels_that_stay_hard_get_the_weight():
    """Labels in the right half are noise, which nothing can learn; the features tell the halves apart."""
    torch.manual_seed(0)
    loss = HardnessWeightedLoss()
    loss.set_feature_shape(2, 1)
    logits = torch.zeros(1, 2, 16, 16, requires_grad=True)
    features = torch.zeros(1, 1, 16, 16)
    features[..., 8:] = 1
    optimizer = torch.optim.Adam([logits, *loss.parameters()], lr=0.02)
    for _ in range(150):
        target = torch.zeros(1, 16, 16, dtype=torch.long)
        target[..., 8:] = torch.randint(0, 2, (1, 16, 8))
        optimizer.zero_grad()
        loss(logits, target, features=features).backward()
        optimizer.step()
    with torch.no_grad():
        hardness = loss.weight_head(features).sigmoid()[0, 0]
    assert hardness[:, 11:].min() > 0.9
    assert hardness[:, :5].max() < 0.1


def test_ignored_pixels_take_no_share_of_the_weight():
    loss = make_loss()
    logits, target, features = batch((5, 7))
    target[:, :, 4:] = 255
    value = loss(logits, target, features=features)
    expected = by_loops(loss, logits, target, features, False)
    torch.testing.assert_close(value, expected)
    logged = loss.take_logged()['hardness_mean']
    hardness = loss.weight_head(features)[:, 0].sigmoid()
    torch.testing.assert_close(logged, hardness[target != 255].mean().detach())


def test_all_pixels_ignored_is_a_loss_of_0_with_gradients():
    loss = make_loss()
    logits, target, features = batch()
    value = loss(logits.requires_grad_(), target.fill_(255), features=features)
    value.backward()
    assert value == 0
    assert all((p.grad == 0).all() for p in [logits, *loss.weight_head.parameters()])
    assert loss.take_logged()['hardness_mean'] == 0


def segmentor(head='FeatureSegformerHead', **options):
    decode_head = dict(
        type=head,
        in_channels=[8, 8, 8, 8],
        in_index=[0, 1, 2, 3],
        channels=6,
        num_classes=5,
        loss_decode=dict(type='HardnessWeightedLoss', **options),
    )
    return MODELS.build(decode_head)


def step(head):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 8, 16 // s, 16 // s, generator=generator) for s in (1, 2, 4, 8)]
    label = torch.randint(0, 5, (1, 64, 64), generator=generator)
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label), metainfo=dict(img_shape=(64, 64)))] * 2
    return head.loss(inputs, samples, {}), inputs


def test_the_weight_head_trains_with_the_model_and_is_gone_at_test_time():
    head = segmentor()
    names = [name for name, _ in head.named_parameters() if 'weight_head' in name]
    assert names == [f'loss_decode.weight_head.{n}' for n in ('0.weight', '0.bias', '2.weight', '2.bias')]
    optimizer = build_optim_wrapper(head, dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1)))
    before = {name: value.clone() for name, value in head.state_dict().items()}
    losses, inputs = step(head)
    assert set(losses) == {'loss_hardness', 'hardness_mean', 'acc_seg'}
    optimizer.update_params(losses['loss_hardness'])
    changed = {name for name, value in head.state_dict().items() if not torch.equal(value, before[name])}
    assert 'loss_decode.weight_head.2.weight' in changed
    assert 'conv_seg.weight' in changed
    head.eval()
    head.loss_decode.weight_head = None
    assert head.predict(inputs, [dict(img_shape=(64, 64))] * 2, {}).shape == (2, 5, 64, 64)


@pytest.mark.parametrize('kind', ['SegformerHead', 'FeatureSegformerHead'])
def test_a_head_that_hands_over_no_features_is_refused(kind):
    if kind == 'SegformerHead':
        with pytest.raises(RuntimeError, match='HardnessWeightedLoss learns from the features'):
            step(segmentor(kind))
    loss = HardnessWeightedLoss()  # as of a head without conv_seg
    logits, target, features = batch()
    with pytest.raises(RuntimeError, match='no conv_seg when it is built'):
        loss(logits, target, features=features)


@pytest.mark.parametrize('options', [dict(floor=0), dict(rate=0.0)])
def test_no_floor_or_rate_of_0(options):
    with pytest.raises(ValueError, match='must be above 0, got floor='):
        HardnessWeightedLoss(**options)
