"""The sums over pixels that losses are arithmetic on: validation and choice of backend."""

from __future__ import annotations

import math
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from mmseg_imbalance.ops.contract import NOTHING_IGNORED, Options, SoftStats

BACKENDS = ('eager', 'strips', 'cpu', 'triton')
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def soft_stats(
    logits: Tensor,
    target: Tensor,
    *,
    pixel_weight: Tensor | None = None,
    ignore_index: int | None = 255,
    logit_bias: Tensor | None = None,
    focal_gamma: float = 0.0,
    square_prediction: bool = False,
    with_log_prob: bool = False,
    with_recall: bool = False,
    group: Tensor | None = None,
    num_groups: int = 0,
    marked: Tensor | None = None,
    align_corners: bool = False,
    backend: str = 'auto',
) -> SoftStats:
    r"""Sums of cross-entropy, soft overlap and soft area, by image and class, in one pass.

    With p = softmax(z + logit_bias), z the logits resized bilinearly to the label's size, and m the
    weight of a pixel, over the pixels whose label y is not ``ignore_index``:
    ``nll[c]`` = sum_{y=c} -m (1 - p_c)^focal_gamma log p_c, ``intersection[c]`` = sum_{y=c} m p_c,
    ``truth[c]`` = sum_{y=c} m, ``prediction[c]`` = sum m p_c (m p_c^2 with ``square_prediction``),
    ``log_prob[c]`` = sum m log p_c, ``correct`` = number of pixels with argmax p = y, and for group
    ids g: ``group_nll[s]`` = sum_{g=s} -log p_y, ``group_count[s]`` = number of pixels with g = s.
    ``with_recall``: ``class_count[c]`` = number of pixels with y = c, ``class_correct[c]`` = of these,
    number with argmax p = c. With ``marked``: ``marked_intersection`` and ``marked_truth``, the sums of
    ``intersection`` and ``truth`` over the marked pixels alone.

    Args:
        logits: (B, C, h, w), floating point, C >= 2. Half precision is summed in float32.
        target: (B, H, W), integers in [0, C) or ``ignore_index``.
        pixel_weight: (B, H, W), finite, >= 0 on valid pixels; a pixel of weight k counts as k pixels. Where
            it requires grad, its gradient is that of what its pixel adds to the sums, ``truth`` among them.
        ignore_index: the label of pixels that do not count; None: all count.
        logit_bias: (C,), added to the logits of every pixel. Not differentiated.
        focal_gamma: >= 0; 0 is the plain negative log-likelihood.
        group: (B, H, W), integers in [0, num_groups) on valid pixels; gives the ``group`` sums.
        marked: (B, H, W), bool or uint8, other than 0 on marked pixels; gives the ``marked`` sums.
        align_corners: as in ``F.interpolate``; matters where (h, w) != (H, W).
        backend: 'eager' (the definition), 'strips' (bounded memory, any device), 'cpu' (kernels compiled by
            Numba), 'triton' (CUDA kernels), or 'auto': the kernels where they can run, else strips.

    Whatever lies under ignored pixels, NaN and infinity too, has no effect and gets a gradient of 0. In
    smaller logits a pixel that is resized from a cell of NaN is NaN, as in torch.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range. Values of ``target``, ``group``
            and ``pixel_weight`` are checked on CPU. On a CUDA device a wrong label asserts, as it does in
            torch's own losses.
        RuntimeError: the named backend cannot run here, or not with these arguments.
    """
    check_arguments(logits, target, pixel_weight, group, logit_bias, marked)
    also = '' if ignore_index is None else f' or ignore_index={ignore_index}'
    if ignore_index is None or abs(ignore_index) >= 2**63:  # which no label can be
        ignore_index = NOTHING_IGNORED
    limits = torch.iinfo(target.dtype)
    if not limits.min <= ignore_index <= limits.max:
        target = target.long()  # in the narrower type the comparison would wrap around
    if not 0 <= focal_gamma < math.inf:
        raise ValueError(f'focal_gamma must be a finite number, at least 0, got {focal_gamma!r}')
    if (group is not None) != (num_groups > 0):
        raise ValueError(
            f'group and num_groups go together: num_groups is {num_groups} while group is '
            f'{"given" if group is not None else "None"}'
        )
    if backend not in ('auto', *BACKENDS):
        raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {backend!r}")
    if target.device.type == 'cpu':
        # by NumPy: threads that torch wakes keep a core busy for a while
        labels = target.numpy()
        valid = labels != ignore_index
        _check_range('target', labels, valid, logits.shape[1], also)
        if pixel_weight is not None:
            _check_weight(pixel_weight, torch.from_numpy(valid))
        if group is not None:
            _check_range('group', group.numpy(), valid, num_groups, ' wherever target is valid')
    options = Options(
        pixel_weight,
        ignore_index,
        None if logit_bias is None else logit_bias.detach(),
        focal_gamma,
        square_prediction,
        with_log_prob,
        with_recall,
        group,
        num_groups,
        align_corners,
        marked,
    )
    module = choose_backend(backend, logits, num_groups)
    # the sums are float32 or better under autocast too
    with torch.autocast(logits.device.type, enabled=False):
        return module.soft_stats(logits, target, options)


def choose_backend(name: str, logits: Tensor, num_groups: int = 0) -> ModuleType:
    """The module of the backend that takes these logits; see :func:`soft_stats` for names and errors."""
    fast = 'triton' if logits.is_cuda else 'cpu'
    for compiled in (fast,) if name == 'auto' else (name,):
        if compiled not in ('cpu', 'triton'):
            continue
        module = _compiled_backend(compiled)
        reason = module if isinstance(module, str) else module.why_not(logits, num_groups)
        if isinstance(module, ModuleType) and reason is None:
            return module
        if name != 'auto':
            raise RuntimeError(f"backend={name!r} cannot run: {reason}; backend='auto' takes what can")
    return import_module(f'mmseg_imbalance.ops.{"strips" if name == "auto" else name}')


@lru_cache
def _compiled_backend(name: str) -> ModuleType | str:
    """The backend that Triton or Numba compiles, or why it cannot be imported."""
    try:
        # torch.compile would trace the import
        return torch.compiler.disable(import_module)(f'mmseg_imbalance.ops.{name}')
    except ImportError as error:
        compiler = dict(cpu='Numba', triton='Triton')[name]
        return f'{compiler} cannot be imported ({error})'


def check_arguments(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None = None,
    group: Tensor | None = None,
    logit_bias: Tensor | None = None,
    marked: Tensor | None = None,
) -> None:
    """Raise the TypeError or ValueError of :func:`soft_stats` for types, shapes and devices."""
    if logits.ndim != 4 or logits.dtype not in FLOATS or logits.shape[1] < 2:
        raise ValueError(
            'logits must be floating point (half, bfloat16, float or double) of shape (B, C, h, w) with '
            f'C >= 2, got {logits.dtype} of shape {tuple(logits.shape)}'
        )
    if target.dtype not in INTEGERS:
        raise TypeError(
            f'target must hold integer class indices (uint8 or a signed type), got {target.dtype}'
        )
    if target.ndim != 3 or len(target) != len(logits):
        raise ValueError(
            f'target must be of shape (B, H, W) with B = {len(logits)} as in logits, got '
            f'{tuple(target.shape)}'
        )
    if logits.numel() == 0 or target.numel() == 0:
        raise ValueError(f'there are no pixels: logits {tuple(logits.shape)}, target {tuple(target.shape)}')
    for name, value in (('pixel_weight', pixel_weight), ('group', group), ('marked', marked)):
        if value is not None and value.shape != target.shape:
            raise ValueError(
                f'{name} must be of the shape of target {tuple(target.shape)}, got {tuple(value.shape)}'
            )
    if logit_bias is not None and logit_bias.shape != logits.shape[1:2]:
        raise ValueError(
            f'logit_bias must be of shape ({logits.shape[1]},), one number per class, got '
            f'{tuple(logit_bias.shape)}'
        )
    if group is not None and group.dtype not in INTEGERS:
        raise TypeError(f'group must hold integer ids (uint8 or a signed type), got {group.dtype}')
    if marked is not None and marked.dtype not in (torch.bool, torch.uint8):
        raise TypeError(
            f'marked must be bool or uint8, 0 where a pixel is not marked, got {marked.dtype}; marked != 0 is'
        )
    others = (
        ('target', target),
        ('pixel_weight', pixel_weight),
        ('group', group),
        ('logit_bias', logit_bias),
        ('marked', marked),
    )
    for name, value in others:
        if value is not None and value.is_complex():
            raise TypeError(f'{name} must hold real numbers, got {value.dtype}')
        if value is not None and value.device != logits.device:
            raise ValueError(f'{name} must be on {logits.device} as the logits are, got {value.device}')


def _check_weight(weight: Tensor, valid: Tensor) -> None:
    weight = weight.detach()
    at_least_single = torch.promote_types(weight.dtype, torch.float32)  # PyTorch 2.1 has no aminmax of half
    least, most = weight.to(at_least_single).aminmax()  # of NaN, both are
    if least >= 0 and most < torch.inf:
        return
    wrong = weight[valid & ~(weight.isfinite() & (weight >= 0))]
    if wrong.numel():
        found = list(dict.fromkeys(map(str, wrong.unique().tolist())))
        raise ValueError(
            f'pixel_weight holds {", ".join(found[:10])}{" and more" if len(found) > 10 else ""} on '
            f'{wrong.numel()} valid pixels; allowed are finite numbers, at least 0'
        )


def _check_range(name: str, ids: np.ndarray, valid: np.ndarray, end: int, also: str) -> None:
    bad = ids < 0
    if end <= np.iinfo(ids.dtype).max:  # beyond it the comparison would wrap around
        bad |= ids >= end
    bad &= valid
    if bad.any():
        found = np.unique(ids[bad]).tolist()
        raise ValueError(
            f'{name} holds {found[:10]}{" and more" if len(found) > 10 else ""} on '
            f'{int(bad.sum())} pixels; allowed are 0 to {end - 1}{also}'
        )
