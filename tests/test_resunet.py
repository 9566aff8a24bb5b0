"""ResUNet: shapes at any size, both norms and upsamplings, gradients, and what a residual unit adds."""

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.registry import init_default_scope
from mmseg.models.backbones import UNet
from mmseg.registry import MODELS
from torch import nn

from mmseg_imbalance.resunet import ResidualUnit, ResUNet

BATCH = dict(type='BN')
GROUP = dict(type='GN', num_groups=4)
BILINEAR = dict(type='InterpConv')
LEARNT = dict(type='DeconvModule')
RELU = dict(type='ReLU')


def network(**options):
    torch.manual_seed(0)
    return ResUNet(**(dict(base_channels=4, num_stages=4) | options))


@pytest.mark.parametrize('norm', [BATCH, GROUP])
@pytest.mark.parametrize('upsample', [BILINEAR, LEARNT])
def test_outputs_are_those_of_mmsegmentations_unet(norm, upsample):
    options = dict(in_channels=2, base_channels=4, num_stages=4, norm_cfg=norm, upsample_cfg=upsample)
    lengths = dict(strides=(1,) * 4, enc_num_convs=(2,) * 4, enc_dilations=(1,) * 4)
    lengths |= dict(dec_num_convs=(2,) * 3, downsamples=(True,) * 3, dec_dilations=(1,) * 3)
    images = torch.randn(2, 2, 32, 48)
    init_default_scope('mmseg')  # theirs needs it
    ours, theirs = ResUNet(**options)(images), UNet(**options, **lengths)(images)
    assert [level.shape for level in ours] == [level.shape for level in theirs]
    assert [tuple(level.shape[1:]) for level in ours] == [(32, 4, 6), (16, 8, 12), (8, 16, 24), (4, 32, 48)]


@pytest.mark.parametrize('upsample', [BILINEAR, LEARNT])
@pytest.mark.parametrize('size', [(37, 53), (9, 32), (1, 7)])
def test_sides_that_no_stride_divides_are_rounded_up(size, upsample):
    levels = network(upsample_cfg=upsample)(torch.randn(2, 3, *size))
    for stride, level in zip((8, 4, 2, 1), levels, strict=True):
        assert level.shape[2:] == tuple(-(-side // stride) for side in size)


def test_a_stem_stride_makes_every_level_coarser():
    levels = network(stem_stride=2)(torch.randn(2, 3, 37, 53))
    assert [tuple(level.shape[1:]) for level in levels] == [(32, 3, 4), (16, 5, 7), (8, 10, 14), (4, 19, 27)]


@pytest.mark.parametrize('norm', [BATCH, GROUP])
@pytest.mark.parametrize('upsample', [BILINEAR, LEARNT])
def test_the_finest_output_has_a_gradient_for_every_parameter(norm, upsample):
    model = network(norm_cfg=norm, upsample_cfg=upsample)
    model.init_weights()
    model(torch.randn(2, 3, 40, 40))[-1].pow(2).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


@pytest.mark.parametrize(('norm', 'alone'), [(BATCH, False), (GROUP, True)])
def test_with_group_norm_an_image_does_not_see_its_batch(norm, alone):
    model, images = network(norm_cfg=norm).train(), torch.randn(3, 3, 24, 24)
    together, single = model(images)[-1][:1], model(images[:1])[-1]
    assert torch.allclose(together, single, atol=1e-4) == alone


def test_a_unit_whose_last_norm_is_zero_is_its_shortcut():
    unit, x = ResidualUnit(6, 6, norm_cfg=BATCH, act_cfg=RELU), torch.randn(2, 6, 5, 7)
    kept = x.clone()
    assert not torch.allclose(unit(x), x)
    for parameter in unit.convs[-1].norm.parameters():
        nn.init.zeros_(parameter)
    torch.testing.assert_close(unit(x), x, rtol=0, atol=0)
    assert torch.equal(x, kept)  # no activation is written over it


def test_without_a_norm_the_activation_leaves_the_shortcut_alone():
    unit, x = ResidualUnit(6, 6, norm_cfg=None, act_cfg=RELU), torch.randn(2, 6, 5, 7)
    expected = x.clone() + unit.convs(x.clone())
    torch.testing.assert_close(unit(x), expected)


def test_the_shortcut_changes_channels_and_stride_where_the_unit_does():
    for channels, stride in ((6, 2), (8, 1), (8, 2)):
        unit = ResidualUnit(6, channels, stride, norm_cfg=BATCH, act_cfg=RELU)
        assert unit(torch.randn(2, 6, 9, 10)).shape == (2, channels, -(-9 // stride), -(-10 // stride))
        assert not isinstance(unit.shortcut, nn.Identity)


def test_the_image_enters_as_it_is():
    """Norm and activation before the first convolution would cut off half of the intensities."""
    first = network().encoder[0].convs[0]
    assert not first.with_norm
    assert not first.with_activation


@pytest.mark.parametrize('upsample', [BILINEAR, LEARNT])
def test_weights_start_as_he_says(upsample):
    model = network(base_channels=32, upsample_cfg=upsample)
    model.init_weights()
    conv = model.encoder[2].convs[1].conv.weight
    assert conv.std().item() == pytest.approx((2 / (9 * len(conv))) ** 0.5, rel=0.05)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


def test_it_is_built_from_a_config_with_and_without_a_scope():
    for name in ('ResUNet', 'mmseg_imbalance.ResUNet'):
        model = MODELS.build(dict(type=name, base_channels=4, num_stages=2))
        assert isinstance(model, ResUNet)
        assert isinstance(model, BaseModule)
        assert len(model(torch.zeros(2, 3, 8, 8))) == 2


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(num_stages=1), 'num_stages must be .* at least 2, got 1'),
        (dict(num_stages=2.0), r'num_stages must be .* got 2\.0'),
        (dict(base_channels=0), 'base_channels must be .* at least 1, got 0'),
        (dict(in_channels='3'), "in_channels must be .* got '3'"),
        (dict(stem_stride=0), 'stem_stride must be .* at least 1, got 0'),
        (
            dict(base_channels=12, norm_cfg=dict(type='GN', num_groups=8)),
            'num_groups must divide base_channels=12. Take num_groups=4',
        ),
        (dict(norm_cfg=dict(type='GN')), 'num_groups must divide base_channels=64. Take num_groups=8'),
        (dict(norm_cfg=dict(type='GN', num_groups=0)), 'num_groups must divide base_channels=64'),
        (dict(norm_cfg='GN'), "norm_cfg='GN', allowed are dict"),
        (dict(upsample_cfg='bilinear'), r"upsample_cfg='bilinear'.*dict\(type='DeconvModule'\)"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ResUNet(**options)
