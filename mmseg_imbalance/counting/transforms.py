"""The transforms of a pipeline: which are known to keep labels, their names, and how one is run."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mmseg_imbalance.config_fields import get_field

# Transforms of MMCV and MMSegmentation. By name, since users add their own to a copy of MMSegmentation.
IMAGE_LOADERS = {
    'InferencerLoader', 'LoadBiomedicalImageFromFile', 'LoadDepthAnnotation', 'LoadImageFromFile',
    'LoadImageFromNDArray', 'LoadImageFromNpyFile', 'LoadMultipleRSImageFromFile',
    'LoadSingleRSImageFromFile',
}  # fmt: skip
KEEP_LABELS = {  # they move, cut or pack labels, or see the image alone
    'AdjustGamma', 'Albu', 'BioMedical3DPad', 'BioMedical3DRandomCrop', 'BioMedical3DRandomFlip',
    'BioMedicalGaussianBlur', 'BioMedicalGaussianNoise', 'BioMedicalRandomGamma', 'CLAHE', 'CenterCrop',
    'Compose', 'ConcatCDInput', 'GenerateEdge', 'ImageToTensor', 'KeyMapper', 'MultiScaleFlipAug',
    'Normalize', 'PackSegInputs', 'Pad', 'PhotoMetricDistortion', 'RGB2Gray', 'RandomApply', 'RandomChoice',
    'RandomChoiceResize', 'RandomCrop', 'RandomCutOut', 'RandomDepthMix', 'RandomFlip', 'RandomGrayscale',
    'RandomMosaic', 'RandomResize', 'RandomRotFlip', 'RandomRotate', 'Rerange', 'Resize',
    'ResizeShortestEdge', 'ResizeToMultiple', 'SegRescale', 'TestTimeAug', 'ToTensor',
    'TransformBroadcaster',
}  # fmt: skip
TAKEN_AWAY = 'it takes gt_seg_map away'
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


def run(steps: Sequence[Any], results: dict[str, Any]) -> Any:
    """What transforms make of results, one after the other, with random numbers that the image decides."""
    with _seeded(steps, int(results.get('sample_idx', 0))):
        for step in steps:
            results = step(results)
            if results is None:
                break
    return results


def attempt(steps: Sequence[Any], results: dict[str, Any]) -> Any:
    """What transforms make of a copy of the results, or the error that one raises."""
    try:
        return run(steps, copy.deepcopy(results))
    except Exception as error:  # a transform of the user's own raises what it likes
        return error


def fresh(step: Any) -> Any:
    """A copy with random numbers and a memory of its own, where it can be copied."""
    try:
        return copy.deepcopy(step)
    except Exception:  # it may hold what cannot be copied, such as an open file
        return step


class LabelsTakenAway(Exception):
    """After a transform there are no labels, neither ``gt_seg_map`` nor packed ones."""


def attempt_labels(step: Any, results: dict[str, Any]) -> dict[str, Any] | Exception | None:
    """As :func:`attempt`, of results with labels; those that it packs are ``gt_seg_map`` again."""
    found = attempt([step], results)
    if found is None or isinstance(found, Exception):
        return found
    sample = get_field(found, 'data_samples')
    packed = getattr(get_field(sample, 'gt_sem_seg'), 'data', None)
    if packed is not None:
        labels = np.asarray(packed)
        labels = labels[0] if labels.ndim == 3 and len(labels) == 1 else labels
        more = found if isinstance(found, dict) else {'data_samples': sample}
        return {**results, **more, 'gt_seg_map': labels}
    if not isinstance(found, dict) or 'gt_seg_map' not in found:
        return LabelsTakenAway(TAKEN_AWAY)
    return found


def with_labels(results: dict[str, Any], labels: np.ndarray) -> dict[str, Any]:
    """The results with other labels of the same shape, also where they are packed."""
    packed = getattr(get_field(results.get('data_samples'), 'gt_sem_seg'), 'data', None)
    changed = {**results, 'gt_seg_map': labels}
    if packed is not None:
        changed['data_samples'] = copy.deepcopy(results['data_samples'])
        same_kind = torch.as_tensor(labels).to(packed.dtype).reshape(packed.shape)
        get_field(changed['data_samples'], 'gt_sem_seg').data = same_kind
    return changed


def with_image(loaders: Sequence[Any], results: dict[str, Any]) -> dict[str, Any] | None:
    """The results with the image, from the first transform that loads it; None if none does."""
    if 'img' in results:
        return results
    for loader in loaders:
        found = attempt([loader], results)
        if isinstance(found, dict) and 'img' in found:
            return {**found, 'gt_seg_map': results['gt_seg_map']}
    return None


@contextmanager
def _seeded(steps: Sequence[Any], seed: int) -> Iterator[None]:
    """The same random numbers for an image in every count, and none taken from training."""
    sources: list[Any] = [random, np.random, torch.default_generator]
    for part in (part for step in steps for part in parts(step)):
        options = getattr(part, '__dict__', {}).values()
        sources += [value for value in options if isinstance(value, GENERATORS)]
    states = [_state(source) for source in sources]
    for source in sources:
        if isinstance(source, np.random.Generator):
            source.bit_generator.state = type(source.bit_generator)(seed).state
        else:
            getattr(source, 'manual_seed' if isinstance(source, torch.Generator) else 'seed')(seed)
    try:
        yield
    finally:
        for source, state in zip(sources, states, strict=True):
            if isinstance(source, np.random.Generator):
                source.bit_generator.state = state
            else:
                getattr(source, 'setstate' if hasattr(source, 'setstate') else 'set_state')(state)


def _state(source: Any) -> Any:
    if isinstance(source, np.random.Generator):
        return source.bit_generator.state
    return getattr(source, 'getstate' if hasattr(source, 'getstate') else 'get_state')()


def is_one_of(step: Any, known: set[str]) -> bool:
    """Whether a transform is MMCV's or MMSegmentation's, of one of these names."""
    root = str(getattr(step, '__module__', '')).partition('.')[0]
    return root in ('mmcv', 'mmengine', 'mmseg') and type(step).__name__ in known


def is_known(step: Any) -> bool:
    """Whether a transform, whatever it holds, is one of the stack or of this package that keeps labels."""
    ours = str(getattr(step, '__module__', '')).startswith('mmseg_imbalance.')
    return ours or is_one_of(step, KEEP_LABELS | IMAGE_LOADERS)


def keeps_labels(step: Any) -> bool:
    """Whether a transform, and all that it holds, is known not to change what a label means."""
    return all(map(is_known, parts(step)))


def packs(step: Any) -> bool:
    """Whether a transform packs the labels as MMSegmentation does, or as one derived from it."""
    return any(kind.__name__ == 'PackSegInputs' for kind in type(step).__mro__)


def parts(step: Any) -> Iterator[Any]:
    """A transform and those inside it, as MMCV's wrappers have them."""
    yield step
    inner = getattr(step, 'transforms', ())
    for each in inner if isinstance(inner, list | tuple) else [inner]:
        if callable(each):
            yield from parts(each)


def own_name(step: Any) -> str:
    """Of a class or function, as ``type=`` and ``label_transforms`` have it."""
    return str(getattr(step, '__name__', type(step).__name__))


def name_of(step: Any) -> str:
    """Of a transform as a config has it; a wrapper with those in brackets that it holds and nobody knows."""
    held = [own_name(part) for part in parts(step) if part is not step and not is_known(part)]
    return f'{own_name(step)}({", ".join(held)})' if held else own_name(step)


def names(steps: Iterable[Any]) -> list[str]:
    """The :func:`name_of` each."""
    return [name_of(step) for step in steps]
