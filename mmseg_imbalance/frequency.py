"""Class frequency: how many pixels and images of a data set hold each class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

import numpy as np

from mmseg_imbalance.files import write_atomically


@dataclass(frozen=True, eq=False)
class ClassFrequency:
    """Integer counts of a data set with C classes; an image repeated k times counts k times.

    Args:
        classes: class names, C of them.
        pixels: (C,) int64, pixels of each class.
        images: (C,) int64, images that hold it.
        image_pixels: (C,) int64, all pixels, ignored ones included, of the images that hold it.
        ignored: pixels that belong to no class.
        num_images: images counted; fewer than `dataset_images` if this is a sample.
        dataset_images: images in the data set.
        counts: (images, C) int64, pixels in each distinct image; None where only totals are known, as is
            all that follows.
        repeats: (images,) int64, how often each image counts.
        image_keys: annotation path of each image.
        ignored_counts: (images,) int64, pixels of each image that belong to no class.
        sources: (images,) int64, the data set that each image is of, a position in `source_names`.
        source_names: names of the data sets that were put together; one, if there is but one.
        counted: when, in ISO format.
        unusual: a warning about labels that were counted and may not be what is meant.
    """

    classes: tuple[str, ...]
    pixels: np.ndarray
    images: np.ndarray
    image_pixels: np.ndarray
    ignored: int
    num_images: int
    dataset_images: int
    counts: np.ndarray | None = None
    repeats: np.ndarray | None = None
    image_keys: tuple[str, ...] | None = None
    ignored_counts: np.ndarray | None = None
    sources: np.ndarray | None = None
    source_names: tuple[str, ...] | None = None
    counted: str | None = None
    unusual: str | None = None

    def __post_init__(self) -> None:
        for name in ('pixels', 'images', 'image_pixels'):
            array = np.array(getattr(self, name), dtype=np.int64)
            if array.shape != (len(self.classes),):
                raise ValueError(
                    f'{name} has shape {array.shape}, but there are {len(self.classes)} classes. '
                    'Give one number per class.'
                )
            array.flags.writeable = False  # CITYSCAPES_TRAIN is shared by all callers
            object.__setattr__(self, name, array)

    @classmethod
    def from_rows(
        cls,
        classes: Sequence[str],
        counts: np.ndarray,
        ignored: np.ndarray,
        image_keys: Sequence[str],
        repeats: np.ndarray | None = None,
        dataset_images: int | None = None,
        sources: np.ndarray | None = None,
        source_names: Sequence[str] = ('',),
    ) -> ClassFrequency:
        """Totals of rows: `counts` (images, C), `ignored`, `repeats` (images,); fields as above."""
        counts, ignored = np.array(counts, dtype=np.int64), np.array(ignored, dtype=np.int64)
        once = np.ones(len(counts), dtype=np.int64)
        repeats = once if repeats is None else np.array(repeats, dtype=np.int64)
        held = (counts > 0) * repeats[:, None]  # (images, C)
        num_images = int(repeats.sum())
        return cls(
            classes=tuple(classes),
            pixels=repeats @ counts,
            images=held.sum(axis=0),
            image_pixels=(counts.sum(axis=1) + ignored) @ held,
            ignored=int(repeats @ ignored),
            num_images=num_images,
            dataset_images=num_images if dataset_images is None else dataset_images,
            counts=counts,
            repeats=repeats,
            image_keys=tuple(image_keys),
            ignored_counts=ignored,
            sources=0 * once if sources is None else np.array(sources, dtype=np.int64),
            source_names=tuple(source_names),
            counted=datetime.now().isoformat(' ', 'seconds'),
        )

    def by_source(self) -> list[tuple[str, ClassFrequency]]:
        """Name and counts of each data set that this is of; empty where only totals are known."""
        counts, ignored, sources, names = self.counts, self.ignored_counts, self.sources, self.source_names
        if counts is None or ignored is None or sources is None or not names:
            return []
        if len(names) == 1:
            return [(names[0], self)]
        if self.repeats is None or self.image_keys is None:
            return []
        parts = []
        for number, name in enumerate(names):
            rows = np.flatnonzero(sources == number)
            keys = [self.image_keys[row] for row in rows]
            part = ClassFrequency.from_rows(
                self.classes, counts[rows], ignored[rows], keys, self.repeats[rows], source_names=[name]
            )
            parts.append((name, part))
        return parts

    @property
    def unmet(self) -> np.ndarray:
        """(C,) bool, classes without a pixel in a sample: nobody knows whether the data set has them."""
        return (self.pixels == 0) & (self.num_images < self.dataset_images)

    def with_unmet(self) -> ClassFrequency:
        """The totals, in which a class that a sample did not meet has one pixel in one of its images."""
        image = (int(self.pixels.sum()) + self.ignored) // max(self.num_images, 1)
        return ClassFrequency(
            self.classes,
            self.pixels + self.unmet,
            self.images + self.unmet,
            self.image_pixels + self.unmet * max(image, 1),
            self.ignored,
            self.num_images,
            self.dataset_images,
        )

    @property
    def share(self) -> np.ndarray:
        """Share of each class in the valid pixels, (C,) float64; zeros if there are none."""
        return self.pixels / max(int(self.pixels.sum()), 1)

    @property
    def image_share(self) -> np.ndarray:
        """Mean over the images of the share of each class in the valid pixels of an image, (C,) float64.

        `share` where only totals are known; images without a valid pixel are left out.
        """
        if self.counts is None or self.repeats is None:
            return self.share
        valid = self.counts.sum(axis=1)
        once = np.divide(self.repeats, valid, out=np.zeros(len(valid)), where=valid > 0)
        return once @ self.counts / max(int(self.repeats[valid > 0].sum()), 1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one ``.npz`` file."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        with write_atomically(path, 'wb') as file:
            np.savez(file, **{name: value for name, value in values.items() if value is not None})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClassFrequency:
        """Read what `save` wrote, in older versions too.

        Raises:
            OSError: the file is missing or may not be read.
            ValueError: it is damaged, or another kind of file.
        """
        with open(path, 'rb') as file:
            try:
                with np.load(file, allow_pickle=False) as archive:
                    values: dict[str, Any] = {name: archive[name] for name in archive.files}
                for name in {'classes', 'image_keys', 'source_names'} & values.keys():
                    values[name] = tuple(values[name].tolist())
                for name in ('ignored', 'num_images', 'dataset_images'):
                    values[name] = int(values[name])
                for name in {'counted', 'unusual'} & values.keys():
                    values[name] = str(values[name])
                return cls(**values)
            except Exception as error:  # zipfile, zlib and NumPy have their own
                raise ValueError(f'{type(error).__name__}: {error}') from error


# Published counts of the 2975 training images, all of 2048x1024: pixels, images that hold the class.
_CITYSCAPES = {
    'road': (2036416525, 2934), 'sidewalk': (336090793, 2811), 'building': (1260636120, 2934),
    'wall': (36199498, 970), 'fence': (48454166, 1296), 'pole': (67789506, 2949),
    'traffic light': (11477088, 1658), 'traffic sign': (30448193, 2808),
    'vegetation': (879783988, 2891), 'terrain': (63949536, 1654), 'sky': (221979646, 2686),
    'person': (67326424, 2343), 'rider': (7463162, 1023), 'car': (386328286, 2832),
    'truck': (14772328, 359), 'bus': (12990290, 274), 'train': (12863955, 142),
    'motorcycle': (5449152, 513), 'bicycle': (22861233, 1646),
}  # fmt: skip
CITYSCAPES_TRAIN = ClassFrequency(
    classes=tuple(_CITYSCAPES),
    pixels=np.array([pixels for pixels, _ in _CITYSCAPES.values()]),
    images=np.array([images for _, images in _CITYSCAPES.values()]),
    image_pixels=np.array([images * 2048 * 1024 for _, images in _CITYSCAPES.values()]),
    ignored=715747311,
    num_images=2975,
    dataset_images=2975,
)
