"""What is kept of the subclasses from batch to batch, and what checkpoints, casts and copies do to it.

- A checkpoint gives all of it or nothing.
- It stays float32 in a model of half precision, where an average that moves by a hundredth would stand still.
- MMEngine's averaged models, as EMAHook makes them, hold it as it is in the model: averaged clusters mean
  nothing. They are deep copies, made before training, and MMEngine pairs their buffers with the model's by
  position, or averages what is float in their state dict and leaves integers as they were. So whenever a
  state changes it writes itself into its copies in averaged models, which also get their buffers when it
  does. An average of two equal numbers changes nothing. All other copies are left alone.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from mmseg_imbalance.class_weight import in_class_order

try:
    from mmengine.model import BaseAveragedModel
except ImportError:  # clusters need torch alone
    BaseAveragedModel = ()

NAMES = ('centroid', 'pixels', 'loss', 'starved', 'iteration')
RESERVOIR_NAMES = ('reservoir', 'reserved')


class SubclassState(nn.Module):
    """The buffers of :class:`~mmseg_imbalance.clustering.SubclassClustering`.

    Args:
        num_subclasses: K_c, see there.
        reservoir_size: R, cells kept of each class; 0: no reservoir.

    Raises:
        ValueError: ``num_subclasses`` is out of its range.
    """

    # C classes, K the largest K_c, D channels of the features, R cells
    centroid: Tensor  # (C, K, D)
    pixels: Tensor  # (C, K) average over batches; 0: there is no such subclass yet
    loss: Tensor  # (C, K) average over batches of the sum of -log p_y
    starved: Tensor  # (C, K) int64, batches for which the share has been too small
    iteration: Tensor  # () int64
    reservoir: Tensor  # (C, R, D), with a reservoir
    reserved: Tensor  # (C, R) bool, which of its cells are filled

    def __init__(self, num_subclasses: int | Sequence[int] | Mapping[str, int], reservoir_size: int) -> None:
        numbers = num_subclasses
        if isinstance(numbers, Mapping):
            numbers = [1, *numbers.values()]
        elif not isinstance(numbers, Sequence):
            numbers = [numbers]
        if not numbers or not all(isinstance(k, int) and 1 <= k <= 255 for k in numbers):
            raise ValueError(
                'num_subclasses must be an int from 1 to 255, a list of them, one for each class, or a dict '
                f'of them by class name, got {num_subclasses!r}'
            )
        super().__init__()
        self.num_subclasses = num_subclasses
        self.largest = max(numbers)
        self.reservoir_size = reservoir_size
        self.names = NAMES + (RESERVOIR_NAMES if reservoir_size else ())
        self.shape_from_checkpoint = False  # no head has said how many classes and channels there are
        self._exists: Tensor | None = None
        self.averaged = False  # whether it is part of an averaged model
        self._copies: list[weakref.ref[SubclassState]] = []
        for name in NAMES + RESERVOIR_NAMES:
            self.register_buffer(name, None)

    def shapes(self, num_classes: int, channels: int) -> dict[str, tuple[int, ...]]:
        """The shape of each buffer."""
        subclasses, cells = (num_classes, self.largest), (num_classes, self.reservoir_size)
        shapes = dict.fromkeys(NAMES, subclasses) | dict(centroid=(*subclasses, channels), iteration=())
        return shapes | (dict(reservoir=(*cells, channels), reserved=cells) if self.reservoir_size else {})

    def allocate(self, num_classes: int, channels: int, device: torch.device | None = None) -> None:
        """Make the state for this many classes and channels of the features, in averaged models too.

        Raises:
            ValueError: ``num_subclasses`` is a list of another length.
        """
        per_class = isinstance(self.num_subclasses, Sequence)
        if per_class and len(self.num_subclasses) != num_classes:
            raise ValueError(
                f'num_subclasses holds {len(self.num_subclasses)} numbers, {self.num_subclasses}, but the '
                f'head predicts {num_classes} classes'
            )
        dtypes = dict(starved=torch.int64, iteration=torch.int64, reserved=torch.bool)
        with torch.inference_mode(False):  # what is made in that mode cannot be changed in training
            for name, shape in self.shapes(num_classes, channels).items():
                dtype = dtypes.get(name, torch.float32)
                setattr(self, name, torch.zeros(shape, dtype=dtype, device=device))
        self.shape_from_checkpoint, self._exists = False, None
        self.share()

    @property
    def exists(self) -> Tensor:
        """(C, K) bool: whether class c has a subclass k."""
        if self._exists is None:
            numbers = self.num_subclasses
            if isinstance(numbers, Mapping):
                numbers = in_class_order(numbers, 1, 'num_subclasses')
            elif isinstance(numbers, int):
                numbers = [numbers] * len(self.pixels)
            if len(numbers) != len(self.pixels):
                raise ValueError(
                    f'num_subclasses is for {len(numbers)} classes, but the head predicts {len(self.pixels)}'
                )
            self._exists = torch.arange(self.largest) < torch.tensor(numbers)[:, None]
        if self._exists.device != self.pixels.device:
            self._exists = self._exists.to(self.pixels.device)
        return self._exists

    def prepare(self, num_classes: int, channels: int, device: torch.device) -> None:
        """Before a batch: make the state if no head has, or if a checkpoint has made another one."""
        if self.shape_from_checkpoint:
            shape = (num_classes, self.largest, channels)
            if self.centroid.shape != shape:
                self._leave_out(f'its centroids have the shape {tuple(self.centroid.shape)}, not {shape}')
                self.centroid = None
            else:
                self.to(device)
            self.shape_from_checkpoint = False
        if self.centroid is None:
            self.allocate(num_classes, channels, device)
        if self.pixels.element_size() < 4:  # cast by name, as sharding wrappers do
            self.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> SubclassState:
        def at_least_float32(x: Tensor) -> Tensor:
            y = fn(x)
            return x.to(y.device) if y.is_floating_point() and y.element_size() < 4 else y

        with torch.inference_mode(False):
            return super()._apply(at_least_float32, *args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        stored = {name: state_dict[prefix + name] for name in self.names if prefix + name in state_dict}
        if stored:
            reason = self._misfit(stored)
            if reason is not None:
                self._leave_out(reason, prefix)
                return
            if self.centroid is None or self.shape_from_checkpoint:
                classes, _, channels = stored['centroid'].shape
                self.allocate(classes, channels, stored['centroid'].device)
                self.shape_from_checkpoint = True
            own = {prefix + name: value.to(getattr(self, name).dtype) for name, value in stored.items()}
            state_dict = {**state_dict, **own}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if stored:
            self.share()

    def _misfit(self, stored: dict[str, Tensor]) -> str | None:
        """Why the tensors of a checkpoint are not the state of this module; None: they are."""
        missing = [name for name in self.names if name not in stored]
        if missing:
            return f'it holds {", ".join(stored)} without {", ".join(missing)}'
        unknown = self.centroid is None or self.shape_from_checkpoint
        known = stored['centroid'] if unknown else self.centroid
        per_class = isinstance(self.num_subclasses, Sequence)
        if known.ndim != 3 or (per_class and len(known) != len(self.num_subclasses)):
            return f'its centroid has the shape {tuple(known.shape)}'
        for name, shape in self.shapes(len(known), known.shape[2]).items():
            if stored[name].shape != shape:
                return f'its {name} has the shape {tuple(stored[name].shape)}, not {shape}'
            if not stored[name].isfinite().all():
                return f'its {name} is not finite'
        return None

    def _leave_out(self, reason: str, prefix: str = '') -> None:
        warnings.warn(
            f'{prefix.rstrip(".") or type(self).__name__} takes nothing of the subclasses in the checkpoint: '
            f'{reason}. They are found anew, warm-up included; no other weight depends on them',
            stacklevel=3,  # who loads it
        )

    def share(self) -> None:
        """After a change: write the state into its copies in averaged models."""
        for reference in self._copies:
            copied = reference()
            if copied is None or not copied.averaged:
                continue
            if copied.centroid is None or copied.centroid.shape != self.centroid.shape:
                copied.allocate(*self.centroid.shape[::2], self.centroid.device)
            for name in self.names:
                getattr(copied, name).copy_(getattr(self, name))
            copied.share()  # an average of averages

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes: all but its place among copies."""
        return {**self.__dict__, 'averaged': False, '_copies': []}

    def __deepcopy__(self, memo: dict[int, Any]) -> SubclassState:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        # it becomes part of an averaged model, if of any, later
        living = [reference for reference in self._copies if reference() is not None]
        self._copies = [*living, weakref.ref(copied)]
        return copied


def _mark_averaged(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if isinstance(parent, BaseAveragedModel) and child is not None:
        for module in child.modules():
            if isinstance(module, SubclassState):
                module.averaged = True


# torch calls it for each module that becomes part of another: the only place where a copy can be seen to be
# that of an averaged model, whoever makes it
register_module_module_registration_hook(_mark_averaged)
