"""A U-Net of residual units, trained from scratch: medical and aerial images, defects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from mmseg_imbalance.registry import MODELS

import torch
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from mmseg.registry import MODELS as FRAMEWORK_MODELS
from torch import Tensor, nn

from mmseg_imbalance.options import check_whole


class ResidualUnit(nn.Module):
    """Norm, activation and 3x3 convolution, twice, added to the shortcut: a full pre-activation unit.

    The shortcut is the input, or a 1x1 convolution and norm of it where channels or stride change.

    Args:
        stride: of the first convolution and the shortcut; a side becomes ceil(side / stride).
        norm_cfg, act_cfg: as in MMCV's ConvModule.
        first: the input is an image, which no norm and activation precede.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        norm_cfg: dict | None,
        act_cfg: dict,
        first: bool = False,
    ) -> None:
        super().__init__()
        # in place, the activation would change the input where there is no norm
        before = dict(order=('norm', 'act', 'conv'), norm_cfg=norm_cfg, act_cfg=act_cfg, inplace=False)
        image = dict(norm_cfg=None, act_cfg=None) if first else {}
        self.convs = nn.Sequential(
            ConvModule(in_channels, out_channels, 3, stride, padding=1, **(before | image)),
            ConvModule(out_channels, out_channels, 3, padding=1, **before),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = ConvModule(in_channels, out_channels, 1, stride, norm_cfg=norm_cfg, act_cfg=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.convs(x)


@MODELS.register_module()
class ResUNet(BaseModule):
    """Deep residual U-Net, with the outputs of MMSegmentation's UNet.

    Of images (B, in_channels, H, W), S = num_stages features (B, C_i, ceil(H / s_i), ceil(W / s_i)), from
    the coarsest to the finest: s_i = stem_stride * 2^k and C_i = base_channels * 2^k, k = S - 1 - i. The
    first is the bottleneck, the others are the decoder's. Images may have any size.

    Args:
        base_channels: of the finest level; each coarser one has twice as many.
        num_stages: levels, the bottleneck included, at least 2.
        stem_stride: 1 or more; with 2 the finest level has half of the image's height and width, which takes
            about a quarter of the time.
        norm_cfg: ``dict(type='BN')`` is the default; ``dict(type='GN', num_groups=8)`` does not depend on the
            batch, for batches of a few images.
        upsample_cfg: ``dict(type='InterpConv')``, the default, is bilinear and a 1x1 convolution;
            ``dict(type='DeconvModule')`` is a transposed convolution, which is learnt.
        act_cfg, init_cfg: as in MMSegmentation's UNet.

    Raises:
        ValueError: a number out of range, or ``num_groups`` that does not divide the channels.

    Source: Zhang, Liu & Wang 2018, https://arxiv.org/abs/1711.10684, which has 4 levels. Ours halves the
    channels when it upsamples, as UNet does.
    """

    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 64,
        num_stages: int = 5,
        stem_stride: int = 1,
        norm_cfg: dict | None = None,
        act_cfg: dict | None = None,
        upsample_cfg: dict | None = None,
        init_cfg: dict | Sequence[dict] | None = None,
    ) -> None:
        check_whole(1, in_channels=in_channels, base_channels=base_channels, stem_stride=stem_stride)
        check_whole(2, num_stages=num_stages)
        norm_cfg = norm_cfg or dict(type='BN')
        act_cfg = act_cfg or dict(type='ReLU')
        upsample_cfg = upsample_cfg or dict(type='InterpConv')
        if not isinstance(norm_cfg, dict) or 'type' not in norm_cfg:
            raise ValueError(
                f"norm_cfg={norm_cfg!r}, allowed are dict(type='BN'), dict(type='SyncBN') and "
                "dict(type='GN', num_groups=8)"
            )
        groups = norm_cfg.get('num_groups', 0 if norm_cfg.get('type') == 'GN' else 1)
        if not isinstance(groups, int) or groups < 1 or base_channels % groups:
            raise ValueError(
                f'norm_cfg={norm_cfg!r}: num_groups must divide base_channels={base_channels}. Take '
                f'num_groups={math.gcd(8, base_channels)}, or another divisor'
            )
        if not isinstance(upsample_cfg, dict):
            raise ValueError(
                f"upsample_cfg={upsample_cfg!r}, allowed are dict(type='InterpConv'), which is bilinear, and "
                "dict(type='DeconvModule'), which is learnt"
            )
        super().__init__(
            init_cfg
            or [
                dict(type='Kaiming', layer=['Conv2d', 'ConvTranspose2d']),
                dict(type='Constant', val=1, layer=['_BatchNorm', 'GroupNorm']),
            ]
        )
        options = dict(norm_cfg=norm_cfg, act_cfg=act_cfg)
        widths = [base_channels * 2**stage for stage in range(num_stages)]
        self.encoder = nn.ModuleList(
            [ResidualUnit(in_channels, base_channels, stem_stride, first=True, **options)]
        )
        self.upsample, self.decoder = nn.ModuleList(), nn.ModuleList()
        for fine, coarse in pairwise(widths):
            self.encoder.append(ResidualUnit(fine, coarse, stride=2, **options))
            # from the coarsest to the finest
            upsample = dict(upsample_cfg, in_channels=coarse, out_channels=fine, **options)
            self.upsample.insert(0, FRAMEWORK_MODELS.build(upsample))
            self.decoder.insert(0, ResidualUnit(2 * fine, fine, **options))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x, skips = images, []
        for unit in self.encoder:
            x = unit(x)
            skips.append(x)
        outputs = [skips.pop()]
        for upsample, unit in zip(self.upsample, self.decoder, strict=True):
            skip = skips.pop()
            x = upsample(x)[..., : skip.shape[2], : skip.shape[3]]  # one more where the side is odd
            x = unit(torch.cat([skip, x], dim=1))
            outputs.append(x)
        return tuple(outputs)
