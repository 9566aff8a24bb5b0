"""Transforms for rare classes: crops that hold a class which was drawn for being rare."""

from __future__ import annotations

import logging

from mmseg_imbalance.registry import TRANSFORMS

import numpy as np
from mmcv.transforms.utils import cache_randomness
from mmengine.logging import print_log
from mmseg.datasets.transforms import RandomCrop

from mmseg_imbalance.draws import DrawnIndex, check_count


@TRANSFORMS.register_module()
class RareClassCrop(RandomCrop):
    """MMSegmentation's RandomCrop, repeated until it holds enough of the class that RareClassSampler drew.

    It is a plain RandomCrop where any image could be drawn, or where the whole image holds too little.

    Args:
        crop_size: (height, width), or one number for both.
        min_pixels: of the drawn class, at the size at which it is cropped; None: as in the source, half of
            what the sampler asks of an image for this class, times the change of area by a resize before.
        max_tries: crops looked at; then a plain one is taken.
        cat_max_ratio, ignore_index: see RandomCrop; each try keeps to them.

    Source: the public code of DAFormer, which repeats the whole pipeline up to 10 times instead.
    """

    # without a list of its own, cache_randomness adds to RandomCrop's, which then counts its calls twice
    _methods_with_randomness: list[str] = []

    def __init__(
        self,
        crop_size: int | tuple[int, int],
        min_pixels: int | None = None,
        max_tries: int = 10,
        cat_max_ratio: float = 1.0,
        ignore_index: int = 255,
    ) -> None:
        super().__init__(crop_size, cat_max_ratio, ignore_index)
        if min_pixels is not None:
            check_count('min_pixels', min_pixels)
        check_count('max_tries', max_tries)
        self.min_pixels = min_pixels
        self.max_tries = max_tries
        self.warned = False

    @cache_randomness
    def crop_bbox(self, results: dict) -> tuple[int, int, int, int]:
        """(top, bottom, left, right) of the crop."""
        plain = super().crop_bbox.func  # below the cache, which would return the first crop every time
        drawn = results.get('sample_idx')
        if not isinstance(drawn, DrawnIndex):
            self._warn_once()
        elif drawn.class_index is not None:
            mask = results['gt_seg_map'] == drawn.class_index
            least = self.min_pixels
            if least is None:
                height, width = results.get('ori_shape', mask.shape)[:2]
                least = max(1, drawn.min_pixels * mask.size // (2 * height * width))
            if np.count_nonzero(mask) >= least:
                for _ in range(self.max_tries):
                    bbox = plain(self, results)
                    if np.count_nonzero(self.crop(mask, bbox)) >= least:
                        return bbox
        return plain(self, results)

    def _warn_once(self) -> None:
        if not self.warned:
            self.warned = True
            print_log(
                'RareClassCrop: an image comes without a drawn class, such crops are plain. Train with '
                "sampler=dict(type='RareClassSampler'), and not on a ClassBalancedDataset, which loses it. "
                'Images that a MultiImageMixDataset adds, as for a mosaic, have none.',
                'current',
                logging.WARNING,
            )

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(crop_size={self.crop_size}, min_pixels={self.min_pixels}, '
            f'max_tries={self.max_tries}, cat_max_ratio={self.cat_max_ratio})'
        )
