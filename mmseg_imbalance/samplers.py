"""Rare class sampling: images, and crops of them, that hold a class which was drawn for being rare."""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from mmseg_imbalance.registry import DATA_SAMPLERS, HOOKS, TRANSFORMS

import numpy as np
from mmcv.transforms.utils import cache_randomness
from mmengine.dist import get_dist_info, is_main_process, sync_random_seed
from mmengine.hooks import Hook
from mmengine.logging import MessageHub, print_log
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from mmseg.datasets.transforms import RandomCrop
from rich.markup import escape
from rich.table import Table
from torch.utils.data import DataLoader, Sampler

from mmseg_imbalance.counting import training_frequency
from mmseg_imbalance.counting.dataset_parts import first_indices
from mmseg_imbalance.frequency import ClassFrequency
from mmseg_imbalance.tables import table_text

NEVER = 0.01  # draws of an image that are practically none, in as many draws as the data set has images
NOTABLE = 0.05  # share of such images that is worth a warning
BLOCK = 256  # draws of a rank that are made at once; another number gives the same ones


class DrawnIndex(int):
    """An index of a data set that knows what it was drawn for.

    `class_index` is the class, None where any image could be drawn; `min_pixels` is what the images of this
    class hold at least. Wrapped data sets compute an index of the data set inside: ConcatDataset by ``-``,
    RepeatDataset by ``%``. The result keeps both, and so does a copy in another process. MMSegmentation's
    data sets hand the index to their pipeline as ``results['sample_idx']``.
    """

    class_index: int | None
    min_pixels: int

    def __new__(cls, index: int, class_index: int | None, min_pixels: int = 1) -> DrawnIndex:
        drawn = super().__new__(cls, index)
        drawn.class_index, drawn.min_pixels = class_index, min_pixels
        return drawn

    def __getnewargs__(self) -> tuple[int, int | None, int]:
        return int(self), self.class_index, self.min_pixels

    def __sub__(self, other: int) -> DrawnIndex:
        return DrawnIndex(int(self) - other, self.class_index, self.min_pixels)

    def __mod__(self, other: int) -> DrawnIndex:
        return DrawnIndex(int(self) % other, self.class_index, self.min_pixels)


@DATA_SAMPLERS.register_module()
class RareClassSampler(Sampler):
    """Draw a class, the rarer the likelier, then one of the images that hold at least `min_pixels` of it.

    P(c) = exp((1 - f_c) / T) / sum_k exp((1 - f_k) / T), f_c the share of c in the valid pixels, k over the
    classes of which some image holds enough. A share `uniform` of the draws takes any image instead. All
    ranks take turns in one stream of draws. An epoch is ``len(dataset)`` of them, and the next one goes on
    with the stream; under MMEngine's IterBasedTrainLoop it never ends. Each :class:`DrawnIndex` tells
    :class:`RareClassCrop` the class.

    Args:
        dataset: of MMSegmentation, also a wrapped one; a repeated image is as many images.
        temperature: T > 0; the lower, the more draws go to the rarest classes.
        min_pixels: at least 1, of an annotation as it is on disk; None: for each class the lower quartile of
            its pixels over the images that hold it, at most 3000: at least three of four are drawn.
        seed: the same on all ranks; None: one that they agree on.
        cache_dir: folder of the counts; None: $MMSEG_IMBALANCE_CACHE, else ``~/.cache/mmseg_imbalance``. A
            sampler does not know the config: it does not see the `cache_dir` of a ClassWeightHook.
        num_workers: processes of each rank that count; None: as :func:`training_frequency` has it.
        uniform: share of the draws that take any image, at least 0 and below 1.
        ignore_index: the label that is no class; None: each data set's own.
        label_transforms: names of the transforms that change labels, see
            :func:`~mmseg_imbalance.counting.count_classes`. It does not see those of a ClassWeightHook, which
            warns where it has counted other labels.

    Raises:
        ValueError: a number out of range, or no image holds `min_pixels` of any class.

    Source: Hoyer et al., DAFormer, CVPR 2022, https://arxiv.org/abs/2111.14887, "Rare Class Sampling", which
    has T = 0.01, 3000 pixels, and no uniform draws.
    """

    def __init__(
        self,
        dataset: Any,
        temperature: float = 0.01,
        min_pixels: int | None = None,
        seed: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        num_workers: int | None = None,
        uniform: float = 0.25,
        ignore_index: int | None = None,
        label_transforms: Sequence[str] | None = None,
    ) -> None:
        if not isinstance(temperature, int | float) or not 0 < temperature < np.inf:
            raise ValueError(f'temperature={temperature!r}, allowed are finite numbers above 0, as 0.01.')
        if not isinstance(uniform, int | float) or not 0 <= uniform < 1:
            raise ValueError(
                f'uniform={uniform!r}, allowed are numbers from 0 to below 1, as 0.25; for all images alike '
                "take MMEngine's InfiniteSampler."
            )
        if min_pixels is not None:
            _check_count('min_pixels', min_pixels)
        self.rank, self.world_size = get_dist_info()
        self.seed = sync_random_seed() if seed is None else seed
        frequency = training_frequency(
            dataset,
            heads=None if ignore_index is None else [dict(ignore_index=ignore_index)],
            num_workers=num_workers,
            cache_dir=cache_dir,
            per_image=True,
            label_transforms=label_transforms,
        )
        self.pixels = frequency.pixels  # (C,), which ClassWeightHook holds against its own
        labels = sorted(_ignored_labels(dataset)) if ignore_index is None else [ignore_index]
        self.ignore_index = labels[0] if len(labels) == 1 else tuple(labels)  # what was no class
        self.uniform = uniform
        least = least_pixels(frequency.counts)
        self.min_pixels = least if min_pixels is None else np.full_like(least, min_pixels)  # (C,)
        held = frequency.counts >= self.min_pixels  # (distinct images, C)
        found = held.any(axis=0)
        short = _too_small(frequency, found)
        remedy = f'no image holds min_pixels={min_pixels} of {short}. Lower min_pixels to draw them.'
        if not found.any():
            raise ValueError(f'RareClassSampler cannot draw: {remedy}')
        self.probability = class_probability(frequency.share, temperature, found)
        # Copies of an image are alike: the first stands for all, and is as likely as they are together.
        first, repeats = first_indices(dataset), frequency.repeats
        choices = np.column_stack([held, np.ones(len(held), dtype=bool)])  # the last column: any image
        columns, rows = np.nonzero(choices.T)  # by column
        self.images, self.repeats = first[rows], repeats[rows]
        self.sizes = np.bincount(columns, self.repeats).astype(np.int64)  # (C + 1,), images of each column
        chances = np.append((1 - uniform) * self.probability, uniform)  # (C + 1,)
        self.cumulative = chances.cumsum()
        self.cumulative /= self.cumulative[-1]
        one = chances / np.maximum(self.sizes, 1)  # of an image
        expected = repeats * np.bincount(rows, one[columns]) * self.sizes[-1]
        self.length = math.ceil(len(dataset) / self.world_size)
        self.endless = False
        self.by_iterations: bool | None = None  # whether the loop that trains goes by them; None: nobody told
        self.skipped = self.next = 0  # draws of this rank: before the stream starts, before the next epoch
        if is_main_process():
            if short:
                print_log(f'RareClassSampler: {remedy}', 'current', logging.WARNING)
            self._warn_of_images_never_drawn(expected)
            print_log(f'RareClassSampler:\n{table_text(self._table(frequency))}', 'current')

    def _warn_of_images_never_drawn(self, expected: np.ndarray) -> None:
        """`expected`: (images,) draws of each distinct image, in as many draws as the data set has images."""
        never = np.count_nonzero(expected < NEVER)
        if never > NOTABLE * len(expected):
            print_log(
                f'RareClassSampler: {never:,} of {len(expected):,} images ({never / len(expected):.0%}) will '
                f'practically never be drawn: less than once in {1 / NEVER:.0f} x {self.sizes[-1]:,} draws. '
                f'Raise uniform={self.uniform}, the share of the draws that take any image.',
                'current',
                logging.WARNING,
            )

    def _table(self, frequency: ClassFrequency) -> Table:
        table = Table()
        table.add_column('class')
        for name in ('share', 'draws', 'images', 'min pixels'):
            table.add_column(name, justify='right')
        draws = (1 - self.uniform) * self.probability
        for row in zip(frequency.classes, frequency.share, draws, self.sizes, self.min_pixels, strict=False):
            name, share, drawn, images, pixels = row
            table.add_row(escape(name), f'{share:.3%}', f'{drawn:.3%}', f'{images:,}', f'{pixels:,}')
        table.add_row('(any image)', '', f'{self.uniform:.3%}', f'{self.sizes[-1]:,}', '')
        return table

    def _draws(self, skipped: int) -> Iterator[DrawnIndex]:
        """Draws `rank`, `rank` + `world_size`, ... of the stream without the first `skipped` of them."""
        starts = self.sizes.cumsum() - self.sizes
        ends = self.repeats.cumsum()
        labels = [*range(len(self.sizes) - 1), None]
        least = [*self.min_pixels.tolist(), 1]
        bits = np.random.PCG64(self.seed)
        bits.advance(2 * skipped * self.world_size)  # a draw is two numbers
        random = np.random.Generator(bits)
        while True:
            draws = random.random((BLOCK * self.world_size, 2))[self.rank :: self.world_size]
            columns = self.cumulative.searchsorted(draws[:, 0], side='right')  # never one of probability 0
            places = starts[columns] + (draws[:, 1] * self.sizes[columns]).astype(np.int64)
            chosen = self.images[ends.searchsorted(places, side='right')]
            for index, column in zip(chosen.tolist(), columns.tolist(), strict=True):
                yield DrawnIndex(index, labels[column], least[column])

    def __iter__(self) -> Iterator[DrawnIndex]:
        draws = self._draws(self.next)
        while True:
            self.next += self.length
            yield from itertools.islice(draws, self.length)
            if not self.endless:
                return

    def __len__(self) -> int:
        """Draws of this rank in an epoch."""
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch. MMEngine calls it before each, and before a run of iterations."""
        self.endless = _trains_by_iterations() if self.by_iterations is None else self.by_iterations
        if not self.endless:  # else a loader may have drawn already, and goes on
            self.next = self.skipped + epoch * self.length

    def skip(self, num_samples: int) -> None:
        """Continue after the first `num_samples` of this rank, counted from the start, to resume a run."""
        if num_samples < 0:
            raise ValueError(f'num_samples={num_samples}, allowed are 0 and more.')
        self.skipped = self.next = num_samples


def class_probability(share: np.ndarray, temperature: float, drawable: np.ndarray) -> np.ndarray:
    """(C,) P(c) as in :class:`RareClassSampler` from (C,) shares, 0 where not (C,) `drawable`."""
    with np.errstate(over='ignore'):  # a tiny temperature leaves the rarest class alone
        logits = (share[drawable].min() - share) / temperature  # less the largest, for exp
    probability = np.where(drawable, np.exp(np.minimum(logits, 0)), 0)
    return probability / probability.sum()


def least_pixels(counts: np.ndarray) -> np.ndarray:
    """(C,) `min_pixels` of each class as in :class:`RareClassSampler` from (images, C) counts."""
    least = np.ones(counts.shape[1], dtype=np.int64)
    for c, pixels in enumerate(counts.T):
        if pixels.any():
            least[c] = min(3000, np.quantile(pixels[pixels > 0], 0.25, method='lower'))
    return least


def _too_small(frequency: ClassFrequency, found: np.ndarray) -> str:
    """The classes that occur but are not (C,) `found`, with the pixels in the image that holds most."""
    most = dict(zip(frequency.classes, frequency.counts.max(axis=0).tolist(), strict=True))
    return ', '.join(
        f'{name} (at most {pixels})'
        for (name, pixels), enough in zip(most.items(), found, strict=True)
        if pixels and not enough
    )


def _ignored_labels(dataset: Any) -> set[int]:
    """Those of the data sets inside `dataset`."""
    inner = getattr(dataset, 'datasets', None) or filter(None, [getattr(dataset, 'dataset', None)])
    labels = {label for wrapped in inner for label in _ignored_labels(wrapped)}
    return labels or {getattr(dataset, 'ignore_index', 255)}


def _trains_by_iterations() -> bool:
    """Whether the config of the runner that trains counts iterations, as IterBasedTrainLoop does.

    For runs without a hook that tells, as MMEngine tells a sampler nothing of the loop. A runner keeps the
    text of its config in the message hub, a resumed one that of the checkpoint; it is searched, not run,
    because objects in a config make text that is no Python.
    """
    text = MessageHub.get_current_instance().get_info('cfg') or ''
    train_cfg = re.search(r'^train_cfg *= *.*?(?=^\w|\Z)', text, re.MULTILINE | re.DOTALL)
    return train_cfg is not None and 'max_iters' in train_cfg[0]


def tell_sampler_of_loop(runner: Any) -> None:
    """Before training, tell RareClassSampler whether the loop goes by iterations or by epochs."""
    loop = runner.train_loop
    if isinstance(loop, IterBasedTrainLoop | EpochBasedTrainLoop):
        loader = loop.dataloader
        for sampler in (loader.sampler, getattr(loader.batch_sampler, 'sampler', None)):
            if isinstance(sampler, RareClassSampler):
                sampler.by_iterations = isinstance(loop, IterBasedTrainLoop)


@HOOKS.register_module()
class ResumeSamplerHook(Hook):
    """Resume a run of iterations without loading the images it has seen, where MMEngine itself would.

    Upstream's loop asks for each past batch. Here the sampler skips them, and the loop gets nothing in their
    place. The fork's loop does this by itself; there, and for a sampler without ``skip``, nothing is skipped.
    RareClassSampler is told which loop trains, see :func:`tell_sampler_of_loop`.
    """

    def before_train(self, runner: Any) -> None:
        """The loop has its iterator and its number of past iterations, and asks for these next."""
        tell_sampler_of_loop(runner)
        loop = runner.train_loop
        iterator = getattr(loop, 'dataloader_iterator', None)  # of the loop that goes by iterations
        if runner.iter == 0 or iterator is None or hasattr(iterator, 'skip_iter'):
            return
        loader = loop.dataloader
        if loader.batch_size is not None and hasattr(loader.sampler, 'skip'):
            loader.sampler.skip(runner.iter * loader.batch_size)
            loop.dataloader_iterator = _after(runner.iter, type(iterator), loader)


def _after(past: int, kind: type, loader: DataLoader) -> Iterator[Any]:
    """Nothing for each of the `past` batches, then what an iterator of this `kind` gives."""
    yield from itertools.repeat(None, past)
    yield from kind(loader)


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
            _check_count('min_pixels', min_pixels)
        _check_count('max_tries', max_tries)
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


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f'{name}={value!r}, allowed are integers from 1.')
