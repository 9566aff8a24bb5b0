"""Rare class sampling: images that hold a class which was drawn for being rare, on all ranks, resumable."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from mmseg_imbalance.registry import DATA_SAMPLERS, HOOKS

import numpy as np
from mmengine.dist import get_dist_info, is_main_process, sync_random_seed
from mmengine.hooks import Hook
from mmengine.logging import MessageHub, print_log
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from rich.markup import escape
from rich.table import Table
from torch.utils.data import DataLoader, Sampler

from mmseg_imbalance.counting import training_frequency
from mmseg_imbalance.counting.ranks import warn
from mmseg_imbalance.draws import (
    DrawnIndex,
    check_temperature,
    least_pixels,
    make_draws,
    repeat_factor_choices,
    repeat_factors,
    softmax_choices,
)
from mmseg_imbalance.frequency import ClassFrequency
from mmseg_imbalance.ignored_label import check_heads_of_run, ignored_label
from mmseg_imbalance.options import check_whole
from mmseg_imbalance.tables import table_of, table_text

NEVER = 0.01  # draws of an image that are practically none, in as many draws as the data set has images
NOTABLE = 0.05  # share of such images that is worth a warning
RULES = {'softmax': ('temperature', 'uniform'), 'repeat_factor': ('threshold',)}  # their own options
BLOCK = 256  # draws of a rank that are made at once; another number gives the same ones


@DATA_SAMPLERS.register_module()
class RareClassSampler(Sampler):
    """Draw the images that hold rare classes more often than others, by one of two rules.

    ``'softmax'``: draw a class, the rarer the likelier, then one of the images that hold at least
    `min_pixels` of it, see :func:`~mmseg_imbalance.draws.class_probability`. A share `uniform` of the draws
    takes any image instead.

    ``'repeat_factor'``: draw an image in proportion to r_i = max r_c over the classes that it holds, see
    :func:`~mmseg_imbalance.draws.repeat_factors`. It is drawn for the class that decides, for none where
    r_i = 1.

    All ranks take turns in one stream of draws. An epoch is ``len(dataset)`` of them, and the next one goes
    on with the stream; under MMEngine's IterBasedTrainLoop it never ends. Each
    :class:`~mmseg_imbalance.draws.DrawnIndex` tells RareClassCrop the class.

    Args:
        dataset: of MMSegmentation, also a wrapped one; a repeated image is as many images.
        temperature: T > 0 of softmax; the lower, the more draws go to the rarest classes; None: 0.01.
        min_pixels: at least 1, of an annotation as it is on disk. None: softmax takes for each class the
            lower quartile of its pixels over the images that hold it, at most 3000, so at least three of four
            are drawn; repeat_factor takes 1.
        seed: the same on all ranks; None: one that they agree on.
        cache_dir: folder of the counts; None: $MMSEG_IMBALANCE_CACHE, else ``~/.cache/mmseg_imbalance``. A
            sampler does not know the config: it does not see the `cache_dir` of a ClassWeightHook.
        num_workers: processes of each rank that count; None: as :func:`training_frequency` has it.
        uniform: of softmax, share of the draws that take any image, at least 0 and below 1; None: 0.25.
        ignore_index: the label that is no class; None: that of the data set.
        label_transforms: names of the transforms that change labels, see
            :func:`~mmseg_imbalance.counting.count_classes`. It does not see those of a ClassWeightHook, which
            warns where it has counted other labels.
        rule: 'softmax' or 'repeat_factor'.
        threshold: t of repeat_factor, above 0 and at most 1: a class in a smaller share of the images is
            drawn more often.

    Raises:
        ValueError: a number out of range, an option of the other rule, or no image holds `min_pixels` of any
            class.

    Source: Hoyer et al., DAFormer, CVPR 2022, https://arxiv.org/abs/2111.14887, which has T = 0.01, 3000
    pixels, and no uniform draws. Gupta et al., LVIS, CVPR 2019, https://arxiv.org/abs/1908.03195; Detectron2
    repeats an image r_i times in each epoch, rounded at random, where this draws each time anew.
    """

    def __init__(
        self,
        dataset: Any,
        temperature: float | None = None,
        min_pixels: int | None = None,
        seed: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        num_workers: int | None = None,
        uniform: float | None = None,
        ignore_index: int | None = None,
        label_transforms: Sequence[str] | None = None,
        rule: str = 'softmax',
        threshold: float | None = None,
    ) -> None:
        _check_rule(rule, temperature=temperature, uniform=uniform, threshold=threshold)
        self.rule = rule
        self.temperature = 0.01 if temperature is None else temperature
        self.uniform = 0.25 if uniform is None else uniform
        self.threshold = threshold
        self._check_numbers()
        if min_pixels is not None:
            check_whole(1, min_pixels=min_pixels)
        self.rank, self.world_size = get_dist_info()
        self.seed = sync_random_seed() if seed is None else seed
        heads = [] if ignore_index is None else [dict(ignore_index=ignore_index)]
        frequency = training_frequency(
            dataset,
            heads=heads,
            num_workers=num_workers,
            cache_dir=cache_dir,
            per_image=True,
            label_transforms=label_transforms,
        )
        self.pixels = frequency.pixels  # (C,), which ClassWeightHook holds against its own
        self.ignore_index = ignored_label(dataset, heads)  # what was no class
        self.num_images = int(frequency.repeats.sum())
        least = least_pixels(frequency.counts) if rule == 'softmax' else np.ones_like(self.pixels)
        least = least if min_pixels is None else np.full_like(least, min_pixels)  # (C,)
        held = frequency.counts >= least  # (distinct images, C)
        short = _too_small(frequency, held.any(axis=0))
        remedy = f'no image holds min_pixels={min_pixels} of {short}. Lower min_pixels to draw them.'
        if not held.any():
            raise ValueError(f'RareClassSampler cannot draw: {remedy}')
        if rule == 'softmax':
            choices, chances = softmax_choices(frequency, held, self.temperature, self.uniform)
        else:
            choices, chances = repeat_factor_choices(held, frequency.repeats, self.threshold)
        self.draws = make_draws(dataset, frequency.repeats, choices, chances, least)
        self.min_pixels = least
        self.probability = chances[:-1] / max(chances[:-1].sum(), np.finfo(float).tiny)  # (C,)
        self.length = math.ceil(len(dataset) / self.world_size)
        self.endless = False
        self.by_iterations: bool | None = None  # whether the loop that trains goes by them; None: nobody told
        self.skipped = self.next = 0  # draws of this rank: before the stream starts, before the next epoch
        if is_main_process():
            if short:
                warn(f'RareClassSampler: {remedy}')
            chance = frequency.repeats * (choices @ (chances / np.maximum(self.draws.sizes, 1)))
            if rule == 'softmax':
                self._warn_of_images_never_drawn(self.num_images * chance)
                table = self._softmax_table(frequency, chances)
            else:
                factors = repeat_factors(held, frequency.repeats, self.threshold)
                self._warn_of_a_low_threshold(frequency, held, factors)
                table = self._factor_table(frequency, chances, held, factors, chance)
            print_log(f'RareClassSampler:\n{table_text(table)}', 'current')

    def _check_numbers(self) -> None:
        check_temperature(self.temperature)
        if not isinstance(self.uniform, int | float) or not 0 <= self.uniform < 1:
            raise ValueError(
                f'uniform={self.uniform!r}, allowed are numbers from 0 to below 1, as 0.25; for all images '
                "alike take MMEngine's InfiniteSampler."
            )
        threshold = self.threshold
        if self.rule == 'repeat_factor' and not (isinstance(threshold, int | float) and 0 < threshold <= 1):
            raise ValueError(
                f'threshold={threshold!r}, allowed are numbers above 0 and at most 1: classes in a smaller '
                'share of the images are drawn more often. LVIS, of 1203 classes, has 0.001; a data set of '
                'few classes needs more, and 1 is the most.'
            )

    def _warn_of_images_never_drawn(self, expected: np.ndarray) -> None:
        """`expected`: (images,) draws of each distinct image, in as many draws as the data set has images."""
        never = np.count_nonzero(expected < NEVER)
        if never > NOTABLE * len(expected):
            warn(
                f'RareClassSampler: {never:,} of {len(expected):,} images ({never / len(expected):.0%}) will '
                f'practically never be drawn: less than once in {1 / NEVER:.0f} x {self.num_images:,} draws. '
                f'Raise uniform={self.uniform}, the share of the draws that take any image.'
            )

    def _warn_of_a_low_threshold(
        self, frequency: ClassFrequency, held: np.ndarray, factors: np.ndarray
    ) -> None:
        if factors.max() > 1:
            return
        share = frequency.repeats @ held / self.num_images  # (C,)
        rarest = np.where(share > 0, share, np.inf).argmin()
        warn(
            f'RareClassSampler: no class is in less than threshold={self.threshold} of the images, so all '
            f'are drawn alike. The rarest, {frequency.classes[rarest]}, is in {share[rarest]:.3g} of them. '
            'Raise threshold above that.'
        )

    def _softmax_table(self, frequency: ClassFrequency, chances: np.ndarray) -> Table:
        table = table_of('share', 'draws', 'images', 'min pixels')
        sizes = self.draws.sizes
        for row in zip(frequency.classes, frequency.share, chances, sizes, self.min_pixels, strict=False):
            name, share, drawn, images, pixels = row
            table.add_row(escape(name), f'{share:.3%}', f'{drawn:.3%}', f'{images:,}', f'{pixels:,}')
        table.add_row('(any image)', '', f'{chances[-1]:.3%}', f'{sizes[-1]:,}', '')
        return table

    def _factor_table(
        self,
        frequency: ClassFrequency,
        chances: np.ndarray,
        held: np.ndarray,
        factors: np.ndarray,
        chance: np.ndarray,
    ) -> Table:
        """`chance`: (images,) of each distinct image in a draw."""
        table = table_of('images', 'factor', 'draws', 'draws that hold it')
        images, holding = frequency.repeats @ held, chance @ held
        for row in zip(frequency.classes, images, factors, chances, holding, strict=False):
            name, number, factor, drawn, holds = row
            table.add_row(escape(name), f'{number:,}', f'{factor:.3f}', f'{drawn:.3%}', f'{holds:.3%}')
        table.add_row('(no rare class)', f'{self.draws.sizes[-1]:,}', '1.000', f'{chances[-1]:.3%}', '')
        return table

    def _draws(self, skipped: int) -> Iterator[DrawnIndex]:
        """Draws `rank`, `rank` + `world_size`, ... of the stream without the first `skipped` of them."""
        bits = np.random.PCG64(self.seed)
        bits.advance(2 * skipped * self.world_size)  # a draw is two numbers
        random = np.random.Generator(bits)
        while True:
            numbers = random.random((BLOCK * self.world_size, 2))[self.rank :: self.world_size]
            yield from self.draws.take(numbers)

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
        check_heads_of_run(self, self.ignore_index)  # the config is not known earlier
        self.endless = _trains_by_iterations() if self.by_iterations is None else self.by_iterations
        if not self.endless:  # else a loader may have drawn already, and goes on
            self.next = self.skipped + epoch * self.length

    def skip(self, num_samples: int) -> None:
        """Continue after the first `num_samples` of this rank, counted from the start, to resume a run."""
        if num_samples < 0:
            raise ValueError(f'num_samples={num_samples}, allowed are 0 and more.')
        self.skipped = self.next = num_samples


def _check_rule(rule: str, **options: object) -> None:
    """Raise a ValueError for another rule than those that there are, and for options of another rule."""
    if rule not in RULES:
        raise ValueError(f'rule={rule!r}, allowed are {" and ".join(map(repr, RULES))}.')
    for name, value in options.items():
        if value is not None and name not in RULES[rule]:
            (other,) = (each for each in RULES if name in RULES[each])
            raise ValueError(
                f'{name}={value!r} is no option of rule={rule!r}, which has {" and ".join(RULES[rule])}. '
                f'Leave it out, or take rule={other!r}.'
            )


def _too_small(frequency: ClassFrequency, found: np.ndarray) -> str:
    """The classes that occur but are not (C,) `found`, with the pixels in the image that holds most."""
    most = dict(zip(frequency.classes, frequency.counts.max(axis=0).tolist(), strict=True))
    return ', '.join(
        f'{name} (at most {pixels})'
        for (name, pixels), enough in zip(most.items(), found, strict=True)
        if pixels and not enough
    )


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
    """Before training, tell RareClassSampler whether the loop goes by iterations or by epochs.

    Upstream's loop of iterations has started its workers by then. If they have asked for draws, the first
    epoch may have an end for them: the loop gets a new iterator.
    """
    loop = runner.train_loop
    if not isinstance(loop, IterBasedTrainLoop | EpochBasedTrainLoop):
        return
    loader = loop.dataloader
    for sampler in {loader.sampler, getattr(loader.batch_sampler, 'sampler', None)}:
        if not isinstance(sampler, RareClassSampler):
            continue
        ends = not sampler.endless and sampler.next != sampler.skipped
        sampler.by_iterations = sampler.endless = isinstance(loop, IterBasedTrainLoop)
        if sampler.endless and ends:
            sampler.next = sampler.skipped
            loop.dataloader_iterator = type(loop.dataloader_iterator)(loader)


@HOOKS.register_module()
class ResumeSamplerHook(Hook):
    """Resume a run of iterations without loading the images it has seen, where MMEngine itself would.

    Upstream's loop asks for each past batch. Here the sampler skips them, and the loop gets nothing in their
    place. The fork's loop does this by itself; there, and for a sampler without ``skip``, nothing is skipped.
    RareClassSampler is told which loop trains, see :func:`tell_sampler_of_loop`.
    """

    def before_train(self, runner: Any) -> None:
        """The loop has its iterator and its number of past iterations, and asks for these next."""
        runner.message_hub.update_info('cfg', runner.cfg.pretty_text)  # not that of the checkpoint
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
