"""Transforms for rare classes: crops that hold one that was drawn, and objects pasted from other images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from mmseg_imbalance.registry import TRANSFORMS

import cv2
import numpy as np
from mmcv.transforms import BaseTransform
from mmcv.transforms.utils import cache_randomness
from mmseg.datasets.transforms import RandomCrop

from mmseg_imbalance.counting import training_frequency
from mmseg_imbalance.counting.ranks import alone, warn
from mmseg_imbalance.draws import (
    DrawnIndex,
    Draws,
    check_temperature,
    least_pixels,
    make_draws,
    softmax_choices,
)
from mmseg_imbalance.ignored_label import check_heads_of_run, ignored_label
from mmseg_imbalance.options import check_whole


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
            check_whole(1, min_pixels=min_pixels)
        check_whole(1, max_tries=max_tries)
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
            warn(
                'RareClassCrop: an image comes without a drawn class, such crops are plain. Train with '
                "sampler=dict(_delete_=True, type='RareClassSampler'), and not on a ClassBalancedDataset, "
                'which loses it. Images that a MultiImageMixDataset adds, as for a mosaic, have none.'
            )

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(crop_size={self.crop_size}, min_pixels={self.min_pixels}, '
            f'max_tries={self.max_tries}, cat_max_ratio={self.cat_max_ratio})'
        )


@TRANSFORMS.register_module()
class RareClassPaste(BaseTransform):
    """Paste an object of a rare class from another training image into this one.

    It belongs in the pipeline of MMSegmentation's MultiImageMixDataset, before PackSegInputs. A class is
    drawn, the rarer the likelier, see :func:`~mmseg_imbalance.draws.class_probability`, then an image that
    holds enough of it, see :func:`~mmseg_imbalance.draws.least_pixels`. The pipeline of the data set inside
    makes it the donor; RareClassCrop there knows the class. The object is one of the class's connected
    components in the donor. It is scaled, flipped half of the time, and put anywhere in the image, with hard
    edges.

    Ignored pixels of the image stay as they are. Nothing is pasted where the donor holds no component of
    `min_pixels`. All random numbers are of NumPy's global generator, as those of MMCV's transforms.

    Args:
        prob: share of the images that an object is pasted into, from 0 to 1.
        classes: names of those that are pasted; None: all.
        temperature: T > 0; the lower, the more often the rarest classes are pasted.
        min_pixels: of a component, at the size of the donor's file, at least 1. Where the donor's pipeline
            has a Resize, it changes with the area.
        scale: smallest and largest factor, at random between.
        max_share: of the image's pixels, about what an object covers at most, above 0 and at most 1; larger
            ones are made smaller.
        ignore_index: the label that is no class; None: that of the data set.
        cache_dir, label_transforms: see :class:`~mmseg_imbalance.samplers.RareClassSampler`.

    Raises:
        ValueError: a number out of range, or no image holds any of the classes.

    Source: Ghiasi et al., Simple Copy-Paste, CVPR 2021, https://arxiv.org/abs/2012.07177. It draws all images
    alike, pastes several instances, jitters images as a whole, and keeps the place of an object in its image.
    """

    def __init__(
        self,
        prob: float = 0.5,
        classes: Sequence[str] | None = None,
        temperature: float = 0.01,
        min_pixels: int = 64,
        scale: tuple[float, float] = (0.5, 1.5),
        max_share: float = 0.25,
        ignore_index: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        label_transforms: Sequence[str] | None = None,
    ) -> None:
        if not isinstance(prob, int | float) or not 0 <= prob <= 1:
            raise ValueError(f'prob={prob!r}, allowed are numbers from 0 to 1, as 0.5.')
        listed = isinstance(classes, list | tuple) and classes and all(isinstance(c, str) for c in classes)
        if classes is not None and not listed:
            raise ValueError(
                f"classes={classes!r}, allowed are names of classes, as ['pole', 'rider'], or None for all."
            )
        check_temperature(temperature)
        check_whole(1, min_pixels=min_pixels)
        if not isinstance(scale, tuple | list) or len(scale) != 2 or not 0 < scale[0] <= scale[1] < np.inf:
            raise ValueError(
                f'scale={scale!r}, allowed are two finite numbers above 0, the smaller one first, as '
                '(0.5, 1.5).'
            )
        if not isinstance(max_share, int | float) or not 0 < max_share <= 1:
            raise ValueError(f'max_share={max_share!r}, allowed are numbers above 0 and at most 1, as 0.25.')
        self.prob = prob
        self.classes = classes
        self.temperature = temperature
        self.min_pixels = min_pixels
        self.scale = tuple(scale)
        self.max_share = max_share
        self.ignore_index = ignore_index
        self.cache_dir = cache_dir
        self.label_transforms = label_transforms
        self.draws: Draws | None = None  # of the data set, once it is known
        self.ignored = 255 if ignore_index is None else ignore_index
        self.warned = False

    def get_indices(self, dataset: Any) -> list[DrawnIndex]:
        """Of the donor, if there shall be one, from the data set that MultiImageMixDataset has inside.

        The first call gets the counts, from the cache as a rule. In a worker of the data loader it takes no
        part in what the ranks do together.
        """
        if self.draws is None and self.prob > 0:
            self.draws = self._draws_of(dataset)
        if self.draws is None or np.random.random() >= self.prob:
            return []
        return self.draws.take(np.random.random((1, 2)))

    def _draws_of(self, dataset: Any) -> Draws:
        heads = [] if self.ignore_index is None else [dict(ignore_index=self.ignore_index)]
        self.ignored = ignored_label(dataset, heads)
        check_heads_of_run(self, self.ignored)
        frequency = training_frequency(
            dataset,
            heads=heads,
            num_workers=0 if alone() else None,  # a worker has no workers
            cache_dir=self.cache_dir,
            per_image=True,
            label_transforms=self.label_transforms,
        )
        pasted = frequency.classes if self.classes is None else self.classes
        if unknown := [name for name in pasted if name not in frequency.classes]:
            raise ValueError(
                f'classes of RareClassPaste names {unknown}, but the data set has {frequency.classes}.'
            )
        least = least_pixels(frequency.counts)
        held = (frequency.counts >= least) & np.isin(frequency.classes, pasted)
        if not held.any():
            raise ValueError(f'RareClassPaste has nothing to paste: no image holds a pixel of {pasted}.')
        choices, chances = softmax_choices(frequency, held, self.temperature, uniform=0)
        return make_draws(dataset, frequency.repeats, choices, chances, least)

    def transform(self, results: dict) -> dict:
        """Paste into ``img`` and ``gt_seg_map`` from ``mix_results``."""
        if missing := [key for key in ('img', 'gt_seg_map', 'mix_results') if key not in results]:
            raise ValueError(
                f'RareClassPaste finds no {" and no ".join(missing)}. It belongs in the pipeline of a '
                'MultiImageMixDataset, before PackSegInputs, which belongs there too; the data set inside '
                'loads images and labels.'
            )
        # GenerateEdge does not list its map
        maps = {*results.get('seg_fields', ()), *(results.keys() & {'gt_edge_map'})}
        if others := maps - {'gt_seg_map'}:
            raise ValueError(
                f'RareClassPaste cannot paste into {sorted(others)}, which would not fit the image then. '
                'Make these after it, or leave it out.'
            )
        for donor in results['mix_results']:
            drawn = donor.get('sample_idx')
            if not isinstance(drawn, DrawnIndex):
                self._warn_once()
            elif (found := self._object(donor, drawn.class_index)) is not None:
                self._paste(results, *found, drawn.class_index)
        return results

    def _object(self, donor: dict, class_index: int | None) -> tuple[np.ndarray, np.ndarray] | None:
        """(h, w, channels) pixels around a component of the class, and (h, w), which of them are of it."""
        mask = (donor['gt_seg_map'] == class_index).astype(np.uint8)
        _, ids, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
        wider, higher = donor.get('scale_factor', (1.0, 1.0))  # of MMCV's Resize
        least = max(1, int(self.min_pixels * wider * higher))
        large = np.flatnonzero(stats[1:, cv2.CC_STAT_AREA] >= least) + 1
        if not len(large):
            return None
        chosen = large[np.random.randint(len(large))]
        left, top, width, height = stats[chosen, :4]
        box = slice(top, top + height), slice(left, left + width)
        return donor['img'][box], ids[box] == chosen

    def _paste(self, results: dict, pixels: np.ndarray, mask: np.ndarray, class_index: int) -> None:
        labels, image = results['gt_seg_map'].copy(), results['img'].copy()
        height, width = labels.shape
        largest = (
            height / mask.shape[0],
            width / mask.shape[1],
            (self.max_share * labels.size / np.count_nonzero(mask)) ** 0.5,
        )
        factor = min(np.random.uniform(*self.scale), *largest)
        pixels, mask = _resized(pixels, mask, factor)
        if np.random.random() < 0.5:
            pixels, mask = pixels[:, ::-1], mask[:, ::-1]
        top = np.random.randint(height - mask.shape[0] + 1)
        left = np.random.randint(width - mask.shape[1] + 1)
        box = slice(top, top + mask.shape[0]), slice(left, left + mask.shape[1])
        mask = mask & (labels[box] != self.ignored)
        if np.issubdtype(image.dtype, np.integer):
            pixels = np.rint(pixels)
        image[box][mask] = pixels[mask]
        labels[box][mask] = class_index
        results['gt_seg_map'], results['img'] = labels, image

    def _warn_once(self) -> None:
        if not self.warned:
            self.warned = True
            warn(
                'RareClassPaste: a donor comes without a drawn class, nothing is pasted from such images. A '
                'ClassBalancedDataset inside loses it, and so does MMEngine where a pipeline drops an image.'
            )

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(prob={self.prob}, classes={self.classes}, '
            f'temperature={self.temperature}, min_pixels={self.min_pixels}, scale={self.scale}, '
            f'max_share={self.max_share}, ignore_index={self.ignore_index})'
        )


def _resized(pixels: np.ndarray, mask: np.ndarray, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """An object of another size. Colours are means over pixels of the object alone, none from beside it."""
    height, width = mask.shape
    size = max(1, round(width * factor)), max(1, round(height * factor))
    if size == (width, height):
        return pixels, mask
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    channels = np.moveaxis(pixels.reshape(height, width, -1), -1, 0)
    planes = [mask, *np.where(mask, channels, 0)]
    weight, *colours = (cv2.resize(plane.astype(np.float32), size, interpolation=how) for plane in planes)
    means = np.stack(colours, axis=-1) / np.maximum(weight, 0.5)[..., None]
    return means.reshape(*weight.shape, *pixels.shape[2:]), weight >= 0.5
