"""Rare class sampling: images, and crops of them, that hold a class which was drawn for being rare."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from mmseg_imbalance.registry import DATA_SAMPLERS, TRANSFORMS

import numpy as np
from mmcv.transforms.utils import cache_randomness
from mmengine.dist import get_dist_info, is_main_process, sync_random_seed
from mmengine.logging import print_log
from mmseg.datasets.transforms import RandomCrop
from rich.markup import escape
from rich.table import Table
from torch.utils.data import Sampler

from mmseg_imbalance.annotations import dataset_rows
from mmseg_imbalance.counting import training_frequency
from mmseg_imbalance.frequency import ClassFrequency
from mmseg_imbalance.tables import table_text

BLOCK = 256  # draws of a rank that are made at once; another number gives the same ones


class DrawnIndex(int):
    """An index of a data set that knows the class it was drawn for.

    Wrapped data sets compute an index of the data set inside: ConcatDataset by ``-``, RepeatDataset by ``%``.
    The result keeps the class, and so does a copy in another process. MMSegmentation's data sets hand the
    index to their pipeline as ``results['sample_idx']``.
    """

    class_index: int

    def __new__(cls, index: int, class_index: int) -> DrawnIndex:
        drawn = super().__new__(cls, index)
        drawn.class_index = class_index
        return drawn

    def __getnewargs__(self) -> tuple[int, int]:
        return int(self), self.class_index

    def __sub__(self, other: int) -> DrawnIndex:
        return DrawnIndex(int(self) - other, self.class_index)

    def __mod__(self, other: int) -> DrawnIndex:
        return DrawnIndex(int(self) % other, self.class_index)


@DATA_SAMPLERS.register_module()
class RareClassSampler(Sampler):
    """Draw a class, the rarer the likelier, then one of the images that hold at least `min_pixels` of it.

    P(c) = exp((1 - f_c) / T) / sum_k exp((1 - f_k) / T), f_c the share of c in the valid pixels, k over the
    classes of which some image holds enough. The draws never end; all ranks take turns in one stream of them.
    Each :class:`DrawnIndex` tells :class:`RareClassCrop` the class.

    Args:
        dataset: of MMSegmentation, also a wrapped one; a repeated image is as many images.
        temperature: T > 0; the lower, the more draws go to the rarest classes.
        min_pixels: at least 1, of an annotation as it is on disk.
        seed: the same on all ranks; None: one that they agree on.
        cache_dir: folder of the counts; None: $MMSEG_IMBALANCE_CACHE, else ``~/.cache/mmseg_imbalance``. A
            sampler does not know the config: it does not see the `cache_dir` of a ClassWeightHook.
        num_workers: processes of each rank that count.
        label_transforms: names of the transforms that change labels, see
            :func:`~mmseg_imbalance.counting.count_classes`. It does not see those of a ClassWeightHook.

    Raises:
        ValueError: a number out of range, or no image holds `min_pixels` of any class.

    Source: Hoyer et al., DAFormer, CVPR 2022, https://arxiv.org/abs/2111.14887, "Rare Class Sampling".
    """

    def __init__(
        self,
        dataset: Any,
        temperature: float = 0.01,
        min_pixels: int = 3000,
        seed: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        num_workers: int = 2,
        label_transforms: Sequence[str] | None = None,
    ) -> None:
        if not 0 < temperature < np.inf:
            raise ValueError(f'temperature={temperature}, allowed are finite numbers above 0, as 0.01.')
        _check_count('min_pixels', min_pixels)
        self.rank, self.world_size = get_dist_info()
        self.seed = sync_random_seed() if seed is None else seed
        frequency = training_frequency(
            dataset,
            num_workers=num_workers,
            cache_dir=cache_dir,
            per_image=True,
            label_transforms=label_transforms,
        )
        held = (frequency.counts >= min_pixels)[dataset_rows(dataset)]  # (len(dataset), C)
        self.size = len(held)
        self.images = [np.flatnonzero(column) for column in held.T]  # of each class
        found = held.any(axis=0)
        short = {
            name: int(pixels.max())
            for name, pixels, enough in zip(frequency.classes, frequency.counts.T, found, strict=True)
            if not enough and pixels.any()
        }
        listed = ', '.join(f'{name} (at most {pixels})' for name, pixels in short.items()) or 'any class'
        remedy = f'no image holds min_pixels={min_pixels} of {listed}. Lower min_pixels to draw them.'
        if not found.any():
            raise ValueError(f'RareClassSampler cannot draw: {remedy}')
        self.probability = class_probability(frequency.share, temperature, found)
        self.indices = self._indices_of_rank(0)
        if is_main_process():
            if short:
                print_log(f'RareClassSampler: {remedy}', 'current', logging.WARNING)
            print_log(f'RareClassSampler:\n{table_text(self._table(frequency))}', 'current')

    def _table(self, frequency: ClassFrequency) -> Table:
        table = Table()
        table.add_column('class')
        for name in ('share', 'probability', 'images'):
            table.add_column(name, justify='right')
        rows = zip(frequency.classes, frequency.share, self.probability, self.images, strict=True)
        for name, share, probability, images in rows:
            table.add_row(escape(name), f'{share:.3%}', f'{probability:.3%}', f'{len(images):,}')
        return table

    def _indices_of_rank(self, skipped: int) -> Iterator[DrawnIndex]:
        """Draws `rank`, `rank` + `world_size`, ... of the stream without the first `skipped` of them."""
        cumulative = self.probability.cumsum()
        cumulative /= cumulative[-1]
        sizes = np.array([len(images) for images in self.images])
        starts = sizes.cumsum() - sizes
        images = np.concatenate(self.images)
        bits = np.random.PCG64(self.seed)
        bits.advance(2 * skipped * self.world_size)  # a draw is two numbers
        random = np.random.Generator(bits)
        while True:
            draws = random.random((BLOCK * self.world_size, 2))[self.rank :: self.world_size]
            classes = cumulative.searchsorted(draws[:, 0], side='right')  # never one of probability 0
            chosen = images[starts[classes] + (draws[:, 1] * sizes[classes]).astype(np.int64)]
            yield from map(DrawnIndex, chosen.tolist(), classes.tolist())

    def __iter__(self) -> Iterator[DrawnIndex]:
        return self.indices  # a new iterator goes on where the last one stopped

    def skip(self, num_samples: int) -> None:
        """Continue after the first `num_samples` of this rank, counted from the start, to resume a run."""
        if num_samples < 0:
            raise ValueError(f'num_samples={num_samples}, allowed are 0 and more.')
        self.indices = self._indices_of_rank(num_samples)

    def __len__(self) -> int:
        """Images of the data set, as MMEngine's InfiniteSampler has it."""
        return self.size

    def set_epoch(self, epoch: int) -> None:
        """Nothing to do: the stream has no epochs."""


def class_probability(share: np.ndarray, temperature: float, drawable: np.ndarray) -> np.ndarray:
    """(C,) P(c) as in :class:`RareClassSampler` from (C,) shares, 0 where not (C,) `drawable`."""
    with np.errstate(over='ignore'):  # a tiny temperature leaves the rarest class alone
        logits = (share[drawable].min() - share) / temperature  # less the largest, for exp
    probability = np.where(drawable, np.exp(np.minimum(logits, 0)), 0)
    return probability / probability.sum()


@TRANSFORMS.register_module()
class RareClassCrop(RandomCrop):
    """MMSegmentation's RandomCrop, repeated until it holds enough of the class that RareClassSampler drew.

    Without a drawn class, or where the whole image holds too little of it, it is a plain RandomCrop.

    Args:
        crop_size: (height, width), or one number for both.
        min_pixels: of the drawn class, at the size at which it is cropped. As in the source, half of the
            sampler's, times the change of area by a resize before.
        max_tries: crops looked at; then a plain one is taken.
        cat_max_ratio, ignore_index: see RandomCrop; each try keeps to them.

    Source: the public code of DAFormer, which repeats the whole pipeline up to 10 times instead.
    """

    # without a list of its own, cache_randomness adds to RandomCrop's, which then counts its calls twice
    _methods_with_randomness: list[str] = []

    def __init__(
        self,
        crop_size: int | tuple[int, int],
        min_pixels: int = 1500,
        max_tries: int = 10,
        cat_max_ratio: float = 1.0,
        ignore_index: int = 255,
    ) -> None:
        super().__init__(crop_size, cat_max_ratio, ignore_index)
        _check_count('min_pixels', min_pixels)
        _check_count('max_tries', max_tries)
        self.min_pixels = min_pixels
        self.max_tries = max_tries
        self.warned = False

    @cache_randomness
    def crop_bbox(self, results: dict) -> tuple[int, int, int, int]:
        """(top, bottom, left, right) of the crop."""
        plain = super().crop_bbox.func  # below the cache, which would return the first crop every time
        drawn = getattr(results.get('sample_idx'), 'class_index', None)
        if drawn is None:
            self._warn_once()
            return plain(self, results)
        mask = results['gt_seg_map'] == drawn
        if np.count_nonzero(mask) >= self.min_pixels:
            for _ in range(self.max_tries):
                bbox = plain(self, results)
                if np.count_nonzero(self.crop(mask, bbox)) >= self.min_pixels:
                    return bbox
        return plain(self, results)

    def _warn_once(self) -> None:
        if not self.warned:
            self.warned = True
            print_log(
                'RareClassCrop: an image comes without a drawn class, such crops are plain. Train with '
                "sampler=dict(type='RareClassSampler'), and not on a ClassBalancedDataset, which loses it.",
                'current',
                logging.WARNING,
            )

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(crop_size={self.crop_size}, min_pixels={self.min_pixels}, '
            f'max_tries={self.max_tries}, cat_max_ratio={self.cat_max_ratio})'
        )


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f'{name}={value!r}, allowed are integers from 1.')
