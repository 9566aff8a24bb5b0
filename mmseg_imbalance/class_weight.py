"""The class weights of a loss: what a config says, the file that holds them, the numbers on the device."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmseg_imbalance.files import write_atomically
from mmseg_imbalance.frequency import ClassFrequency
from mmseg_imbalance.weighting import log_prior

ClassWeightSpec = None | str | Path | Sequence[float] | Mapping[str, float]
Number = TypeVar('Number', int, float)


@dataclass(frozen=True)
class WeightRecord:
    """Weights of a data set's classes and what they come from: the content of ``class_weights.json``.

    Args:
        classes: C names.
        weights: C numbers >= 0, in the order of the classes.
        pixels, images: C numbers each, pixels of the class and images that hold it.
        ignored: pixels that belong to no class.
        num_images, dataset_images: images counted, and images of the data set.
        scheme: of :func:`~mmseg_imbalance.weighting.class_weights`.
        options: of the scheme.
        max_images: size of the sample that was asked for; None: all.
        image_share: C numbers, the mean over the images of the class's share in an image: what a random crop
            is expected to hold.
    """

    classes: list[str]
    weights: list[float]
    pixels: list[int] | None = None
    images: list[int] | None = None
    ignored: int | None = None
    num_images: int | None = None
    dataset_images: int | None = None
    scheme: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    max_images: int | None = None
    image_share: list[float] | None = None

    @classmethod
    def count(
        cls,
        frequency: ClassFrequency,
        weights: np.ndarray,
        scheme: str | None = None,
        options: Mapping[str, Any] | None = None,
        max_images: int | None = None,
    ) -> WeightRecord:
        """The record of (C,) weights that a scheme has made of counts."""
        return cls(
            list(frequency.classes),
            weights.tolist(),
            frequency.pixels.tolist(),
            frequency.images.tolist(),
            frequency.ignored,
            frequency.num_images,
            frequency.dataset_images,
            scheme,
            dict(options or {}),
            max_images,
            image_share=frequency.image_share.tolist(),
        )

    def changes(self, frequency: ClassFrequency) -> list[str]:
        """Where counts differ from those that the weights come from, one line per class; empty if nowhere.

        They must be of the same classes. A record without pixels is of no counts.
        """
        if self.pixels is None:
            return []
        images = frequency.images.tolist() if self.images is None else self.images
        return [
            f'{name}: {self.pixels[c]:,} pixels in {images[c]:,} images, now {frequency.pixels[c]:,} in '
            f'{frequency.images[c]:,}'
            for c, name in enumerate(self.classes)
            if (self.pixels[c], images[c]) != (frequency.pixels[c], frequency.images[c])
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and text, for JSON and for MMEngine's message hub."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> WeightRecord:
        """The record of such a dictionary; names that it does not know are left out."""
        known = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
        return cls(**known | dict(classes=list(content['classes']), weights=list(content['weights'])))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, which ``class_weight='FILE'`` of a loss reads."""
        with write_atomically(path) as file:
            json.dump(self.to_dict(), file, indent=2, ensure_ascii=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WeightRecord:
        """Read such a file; ``classes`` and ``weights`` are enough.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or another kind of file.
        """
        try:
            return cls.from_dict(json.loads(_text(path)))
        except (ValueError, KeyError, TypeError, IsADirectoryError) as error:
            raise ValueError(
                f'{os.fspath(path)!r} is not a file of mmseg-imbalance class-weights --out: {error!r}'
            ) from error


def _text(path: str | os.PathLike[str]) -> str:
    if '://' not in str(path):
        return Path(path).read_text(encoding='utf-8')
    from mmengine.fileio import get_text

    return get_text(str(path))


class ClassWeight:
    """The weights of the classes in a loss, and the prior of its logit adjustment, as far as they are known.

    It is no buffer of the loss: averaged copies of a model pair buffers by position, and this one is filled
    late.

    Args:
        spec: None (all 1); C numbers >= 0; a dict by class name (classes that it leaves out weigh 1); the
            path of a file of :class:`WeightRecord`; or 'auto': the hook calls :meth:`set_weights`.
        with_prior: whether the loss asks for the prior; then the hook calls :meth:`set_pixels`.
        owner, name, words: name of the loss, of its option, and words that this can be; for messages.
        mean_of_1: scale the weights to sum_c f_c w_c = 1, f_c the share of each class in the training pixels,
            which the hook hands over too; those of a file are taken from the file.

    Raises:
        ValueError: a weight that is negative, NaN or infinite, or all of them 0.
        FileNotFoundError: there is no file at the path.
    """

    def __init__(
        self,
        spec: ClassWeightSpec = None,
        with_prior: bool = False,
        owner: str = 'a loss',
        mean_of_1: bool = False,
        name: str = 'class_weight',
        words: str = "'auto'",
    ) -> None:
        self.spec = spec
        self.owner = owner
        self.name = name
        self.with_prior = with_prior
        self.mean_of_1 = mean_of_1 and spec is not None
        self.values: Tensor | None = None  # (C,) float32
        self.record: WeightRecord | None = None  # of a file
        self._log_prior: Tensor | None = None  # (C,) float32, ln f_c
        self._pixels: list[float] | None = None
        self._scaled: Tensor | None = None  # (C,) float32, with a mean of 1 over the pixels
        self._by_name: dict[str, float] | None = None  # until the class names are known
        self._file_classes: list[str] | None = None  # until they were compared with the data set's
        if isinstance(spec, Mapping):
            # with the 1 of the classes that it leaves out
            check_weights([*spec.values(), 1.0], f'{name}={dict(spec)}')
            self._by_name = dict(spec)
        elif isinstance(spec, str | Path):
            if spec != 'auto':
                self.record = record = self._load(spec, words)
                self.set_weights(record.weights)
                self._file_classes = record.classes
                if self.mean_of_1 and not with_prior and record.pixels is not None:
                    self.set_pixels(record.pixels)
        elif hasattr(spec, '__iter__'):
            self.set_weights(spec)
        elif spec is not None:
            raise TypeError(
                f'{name} must be None, {words}, a list of numbers, a dict by class name or the path of a '
                f'file, got {spec!r}'
            )

    def _load(self, path: str | Path, words: str) -> WeightRecord:
        try:
            return WeightRecord.load(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f'{self.name}={str(path)!r} is neither {words} nor a file; '
                'mmseg-imbalance class-weights CONFIG --out FILE writes one'
            ) from error
        except ValueError as error:
            raise ValueError(f'{self.name}={error}') from error

    @property
    def waiting(self) -> bool:
        """Whether the weights are 'auto' and have not been set yet."""
        return self.values is None and self.auto

    @property
    def by_counts(self) -> bool:
        """Whether it relies on what the hook has counted."""
        own_pixels = self.record is not None and self.record.pixels is not None
        return self.auto or self.with_prior or (self.mean_of_1 and not own_pixels)

    @property
    def auto(self) -> bool:
        return isinstance(self.spec, str) and self.spec == 'auto'

    @property
    def needs_pixels(self) -> bool:
        """Whether the loss asks for the class frequency, which has not been set yet."""
        return (self.with_prior or self.mean_of_1) and self._pixels is None

    def given(self) -> list[float] | None:
        """The weights in the order of the classes; None where all are 1, or not known yet."""
        if self._by_name is not None and class_names() is not None:
            return in_class_order(self._by_name, 1.0, self.name)
        return None if self.values is None else self.values.tolist()

    def set_weights(self, weights: Sequence[float] | Tensor | np.ndarray) -> None:
        """Use these weights, one number >= 0 per class, from the next call on."""
        weights = weights.tolist() if hasattr(weights, 'tolist') else list(weights)
        check_weights(weights, f'{self.name}={weights}')
        values = _single(weights)
        # of a power_schedule, in each iteration: in the loss the copy to a GPU would wait for the network
        self.values = values if self.values is None else _on(self.values.device, values)
        self._by_name = self._file_classes = self._scaled = None

    def set_pixels(self, pixels: Sequence[float] | Tensor | np.ndarray) -> None:
        """Take the prior and the scale of the weights from the pixels of each class in the training."""
        pixels = pixels.tolist() if hasattr(pixels, 'tolist') else list(pixels)
        check_weights(pixels, f'class pixels {pixels}')
        self._pixels, self._scaled = pixels, None
        self._log_prior = _single(log_prior(pixels).tolist())

    def for_logits(self, logits: Tensor) -> Tensor | None:
        """(C,) weights on the device of the logits (B, C, ...); None: all 1.

        Raises:
            RuntimeError: 'auto' that nobody has filled, names without a data set, or no class frequency to
                scale them by.
            ValueError: another number of classes than the logits have, or other classes than the data set.
        """
        if self.waiting:
            raise RuntimeError(
                f"{self.owner}({self.name}='auto') has no weights yet. Add "
                "custom_hooks = [dict(type='ClassWeightHook')] to the config: it counts the training "
                'annotations before the first iteration. Outside a runner, call '
                f'{self.name}.set_weights of the loss'
            )
        if self._by_name is not None:
            self.set_weights(in_class_order(self._by_name, 1.0, self.name))
        elif self._file_classes is not None:
            classes = class_names()
            if classes is not None and classes != self._file_classes:
                raise ValueError(
                    f'the {self.name} file is for the classes {self._file_classes}, but the data set has '
                    f'{classes}; write one for it with mmseg-imbalance class-weights CONFIG --out FILE'
                )
            self._file_classes = None
        if self.values is None:
            return None
        if len(self.values) != logits.shape[1]:
            raise ValueError(
                f'{self.name} holds {len(self.values)} numbers, '
                f'{self.values.tolist()}, but the head predicts {logits.shape[1]} classes'
            )
        if self.mean_of_1:
            if self._scaled is None:
                self._scaled = _single(self._with_mean_of_1(self.values.tolist()))
            self._scaled = _on(logits.device, self._scaled)
            return self._scaled
        self.values = _on(logits.device, self.values)
        return self.values

    def _with_mean_of_1(self, weights: list[float]) -> list[float]:
        pixels = self._known_pixels(len(weights))
        mean = sum(w * n for w, n in zip(weights, pixels, strict=True)) / sum(pixels)
        if mean == 0:
            raise ValueError(
                f'{self.name}={weights} is 0 for every class that has a pixel in the training '
                f'data, {pixels}, so its mean over the pixels cannot be 1; give one of them a weight'
            )
        return [w / mean for w in weights]

    def logit_bias(self, logits: Tensor, tau: float) -> Tensor | None:
        """(C,) tau ln f_c, f_c the share of each class in the training pixels; None where tau is 0.

        Raises:
            RuntimeError: nobody has set the class frequency.
            ValueError: it is of another number of classes than the logits have.
        """
        return tau * self._prior(logits) if tau > 0 else None

    def logit_noise(self, logits: Tensor, sigma: float) -> Tensor:
        """|clamp(e, -1, 1)| rho_c of the shape of the logits, e ~ N(0, sigma^2), rho_c = ln f_c / min ln f.

        Raises:
            RuntimeError, ValueError: as :meth:`logit_bias`.
        """
        prior = self._prior(logits)
        rarity = prior / prior.min()  # (C,), 1 for the rarest
        noise = torch.randn_like(logits).mul_(sigma).clamp_(-1, 1).abs_()
        return noise.mul_(rarity.to(noise)[:, None, None])

    def _prior(self, logits: Tensor) -> Tensor:
        self._known_pixels(logits.shape[1])
        self._log_prior = _on(logits.device, self._log_prior)
        return self._log_prior

    def _known_pixels(self, num_classes: int) -> list[float]:
        if self._pixels is None:
            raise RuntimeError(
                f'logit_adjustment, logit_variation and divide_by of {self.owner} have no class frequency '
                "yet. Add custom_hooks = [dict(type='ClassWeightHook')] to the config: it counts the "
                'training annotations before the first iteration. Outside a runner, call '
                'class_weight.set_pixels of the loss'
            )
        if len(self._pixels) != num_classes:
            raise ValueError(
                f'the class frequency is that of {len(self._pixels)} classes, but the head predicts '
                f'{num_classes}'
            )
        return self._pixels


def _single(numbers: Sequence[float]) -> Tensor:
    """Not by way of a double tensor, which some devices do not have."""
    with torch.inference_mode(False):  # training may follow a call in it, and takes no tensors of its kind
        return torch.tensor(numbers, dtype=torch.float32)


def _on(device: torch.device, x: Any) -> Tensor:
    with torch.inference_mode(False):
        return x.to(device)  # itself where it lies there


def class_names() -> list[str] | None:
    """The classes of the training data set, which MMEngine's runner leaves in the message hub."""
    try:
        from mmengine.logging import MessageHub
    except ImportError:  # without MMEngine there is no runner
        return None
    meta = MessageHub.get_current_instance().get_info('dataset_meta') or {}
    return None if meta.get('classes') is None else list(meta['classes'])


def in_class_order(values: Mapping[str, Number], default: Number, name: str) -> list[Number]:
    """What is given by class name as a list in the order of the training data set's classes.

    Raises:
        RuntimeError: nobody has told which data set that is.
        ValueError: a name that it does not have.
    """
    classes = class_names()
    if classes is None:
        raise RuntimeError(
            f'{name} by name needs the class names of a training data set, which a runner '
            'provides; outside a runner give a list in the order of the classes'
        )
    if unknown := sorted(set(values) - set(classes)):
        raise ValueError(
            f'{name} names {unknown}, which the data set does not have; its classes are {classes}'
        )
    return [values.get(c, default) for c in classes]


def check_weights(weights: Sequence[object], what: str) -> None:
    """Raise a ValueError unless these are finite numbers, at least 0 and not all 0."""
    valid = all(isinstance(w, Real) and math.isfinite(w) and w >= 0 for w in weights)
    if not valid or not any(weights):
        raise ValueError(f'{what} must be finite numbers, at least 0 and not all 0')
