"""How the labels of a data set are made: the transforms that load them and those that change them."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from mmseg_imbalance.label_files import reading, value_counts

__all__ = ['LabelSteps', 'find_steps', 'loads_images', 'names']

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
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


class LabelSteps(NamedTuple):
    """Copies of the transforms that make the labels of a row; none of them resizes, crops or flips."""

    load: tuple[Any, ...]  # up to the one that yields gt_seg_map
    change: tuple[Any, ...] = ()  # those after it that change what labels mean
    image: tuple[Any, ...] = ()  # one of them loads the image, for a step that asks for it
    named: bool = False  # `change` was named by the user: what fails then is an error
    left_out: tuple[str, ...] = ()  # names of those that may change labels too, and could not be run

    def parts(self) -> Iterator[Any]:
        """Every transform whose code or options decide about the labels, those inside others too."""
        for step in (*self.load, *self.change, *self.image):
            yield from _parts(step)

    def loaded(self, info: dict[str, Any], path: str) -> dict[str, Any] | None:
        """Results with the labels as loaded, from the data info of a row; None: the pipeline drops the image.

        Raises:
            FileNotFoundError, ValueError: as :func:`~mmseg_imbalance.label_files.reading`.
        """
        with reading(path):
            return _run(self.load, info)

    def changed(self, results: dict[str, Any], path: str) -> tuple[dict[str, Any] | None, list[str]]:
        """Results with the labels as training sees them, and the names of what failed.

        Where a step drops the image by returning None, that and its name.

        Raises:
            ValueError: a step that the user named fails.
        """
        failed = []
        for step in self.change:
            before = {**results, 'gt_seg_map': copy.deepcopy(results['gt_seg_map'])}  # not changed in place
            try:
                after = _run([step], results)
                if after is not None and 'gt_seg_map' not in after:
                    raise KeyError('gt_seg_map')
            except Exception as error:
                if self.named:
                    after = self._with_image(step, before, error, path)
                else:
                    failed.append(_name(step))
                    after = before
            if after is None:
                return None, [_name(step)]
            results = after
        return results, failed

    def _with_image(self, step: Any, results: dict[str, Any], error: Exception, path: str) -> Any:
        _, pictured = _picture(self.image, results)
        after = _attempt(step, pictured)
        dropped = after is None and pictured is not None
        if dropped or (isinstance(after, dict) and 'gt_seg_map' in after):
            return after
        error = after if isinstance(after, Exception) else error
        raise ValueError(
            f'{path}: {_name(step)}, named in label_transforms, fails on these labels '
            f'({type(error).__name__}: {error}). It gets the image as it is loaded and the labels, both '
            'before any resize or crop. Leave it out of label_transforms if it does not change what a label '
            'means.'
        ) from error


def loads_images(steps: LabelSteps) -> bool:
    """Whether a loader of images of MMCV or MMSegmentation, or one derived from it, loads the labels."""
    from mmcv.transforms import LoadAnnotations

    return any(isinstance(step, LoadAnnotations) for step in steps.load)


def names(steps: Sequence[Any]) -> list[str]:
    """Of transforms as a config has them; a wrapper with those in brackets that it holds and nobody knows."""
    return [_name(step) for step in steps]


def find_steps(
    transforms: Sequence[Any], info: dict[str, Any], path: str, wanted: Sequence[str] | None
) -> tuple[LabelSteps, dict[str, str], set[str]]:
    """What makes the labels in a pipeline, found by running it on the data info of one row.

    Args:
        transforms: of :meth:`~mmseg_imbalance.dataset_parts.Part.pipeline`.
        info, path: of an image, from :meth:`BaseDataset.get_data_info`, and of its annotation.
        wanted: names of transforms after the loading one that change labels; None: those that are not known
            to keep them and need no image.

    Returns:
        the steps; those left out by name, with the reason; which of `wanted` the pipeline has.

    Raises:
        ValueError: nothing yields ``gt_seg_map``.
        FileNotFoundError: the annotation file is missing.
    """
    position, load = _find_loader(transforms, info, path)
    after = [copy.copy(step) for step in transforms[position + 1 :]]
    held = [({_own_name(part) for part in _parts(step)} & set(wanted or ()), step) for step in after]
    image = [step for step in transforms if _is(step, IMAGE_LOADERS)]
    image += [step for step in transforms[:position] if not _keeps_labels(step)]
    image += [step for found, step in held if not found and not _keeps_labels(step)]
    if wanted is None:
        unknown = [step for step in after if not _keeps_labels(step)]
        steps, left_out = _try_steps(load, unknown, image, info, path)
        return steps, left_out, set()
    steps = LabelSteps(load, tuple(step for found, step in held if found), tuple(image), named=True)
    if steps.change:
        results = steps.loaded(info, path)
        loader, pictured = _picture(image, results)
        if not _same(_labels(steps, results, path), _labels(steps, pictured, path)):
            steps = steps._replace(load=(*load, loader))  # a step that works without the image, but otherwise
    return steps, {}, set().union(*(found for found, _ in held))


def _try_steps(
    load: tuple[Any, ...], unknown: Sequence[Any], image: Sequence[Any], info: dict[str, Any], path: str
) -> tuple[LabelSteps, dict[str, str]]:
    """Those of the transforms that can be run without the image, and why the others are left out."""
    results = LabelSteps(load).loaded(info, path) if unknown else None
    _, pictured = _picture(image, results)
    kept, left_out = [], {}
    for step in unknown:
        if results is None:  # this row is dropped, so nothing can be tried on it
            kept.append(step)
            continue
        found, seen = _attempt(step, results), _attempt(step, pictured)
        reason = _reason(results, found)
        if reason is None and not _same(found, seen):
            reason = 'its labels depend on the image'
        if reason is None:
            kept.append(step)
            results = found
            pictured = seen if isinstance(seen, dict) else None
        elif reason:
            left_out[_name(step)] = reason
    return LabelSteps(load, tuple(kept), left_out=tuple(left_out)), left_out


def _picture(image: Sequence[Any], results: dict[str, Any] | None) -> tuple[Any, dict[str, Any] | None]:
    """The first transform that loads the image, and the results with it; None, None if none does."""
    if results is not None and 'img' not in results:
        for loader in image:
            found = _attempt(loader, results)
            if isinstance(found, dict) and 'img' in found:
                return loader, {**found, 'gt_seg_map': results['gt_seg_map']}
    return None, None


def _same(first: Any, second: Any) -> bool:
    """Whether results hold the same labels; yes where the second are an error or no results."""
    if not isinstance(second, dict):
        return True
    labels = first.get('gt_seg_map') if isinstance(first, dict) else None
    return np.array_equal(np.asarray(labels), np.asarray(second.get('gt_seg_map')))


def _labels(steps: LabelSteps, results: dict[str, Any] | None, path: str) -> Any:
    try:
        return None if results is None else steps.changed(copy.deepcopy(results), path)[0]
    except ValueError as error:  # is met again in counting
        return error


def _find_loader(transforms: Sequence[Any], info: dict[str, Any], path: str) -> tuple[int, tuple[Any, ...]]:
    """Position of the transform that yields the labels, and what has to run up to it."""
    from mmcv.transforms import LoadAnnotations

    happened: dict[str, str] = {}
    missing = None
    for with_image in (False, True):
        results = info
        load: list[Any] = []
        for position, step in enumerate(transforms):
            if isinstance(step, LoadAnnotations) and step.with_seg:
                return position, (*load, copy.copy(step))  # MMSegmentation's remembers the first data it sees
            if _keeps_labels(step) and not (with_image and _is(step, IMAGE_LOADERS)):
                happened.setdefault(_name(step), 'not tried, it loads no labels')
                continue
            found = _attempt(copy.copy(step), results)
            if isinstance(found, dict) and 'gt_seg_map' in found:
                return position, (*load, copy.copy(step))
            if isinstance(found, Exception):
                happened[_name(step)] = f'{type(found).__name__}: {found}'
                if isinstance(found, FileNotFoundError) and path in str(found):
                    missing = found
            elif isinstance(found, dict) and (with_image or 'img' not in found):
                happened[_name(step)] = 'ran, but adds no gt_seg_map'
                results = found
                load.append(copy.copy(step))
    if missing is not None:
        with reading(path):
            raise missing
    listed = ', '.join(f'{name} ({what})' for name, what in happened.items()) or 'it is empty'
    raise ValueError(
        f'the pipeline loads no annotations, no transform of it yields gt_seg_map: {listed}. Add '
        "dict(type='LoadAnnotations') or your own loading transform to it, the pipeline of the innermost "
        'data set.'
    )


def _reason(results: dict[str, Any], found: Any) -> str | None:
    """Why a transform that was tried is not run in counting; None: it is run; '': it needs no word."""
    if isinstance(found, Exception):
        return f'{type(found).__name__}: {found}'
    if found is None:  # drops the image, as training does
        return None
    before = np.asarray(results['gt_seg_map'])
    if not isinstance(found, dict) or 'gt_seg_map' not in found:
        packed = getattr(_part(_part(found, 'data_samples'), 'gt_sem_seg'), 'data', None)
        same = packed is not None and np.array_equal(np.squeeze(packed), before.squeeze())
        return '' if same else 'it takes gt_seg_map away'
    after = np.asarray(found['gt_seg_map'])
    if 'img' in found and 'img' not in results and np.array_equal(before, after):
        return ''  # it loads the image
    resized = before.ndim == after.ndim and before.shape != after.shape
    if resized and np.isin(value_counts(after)[0], before).all():
        return 'it changes the size of the labels'
    return None


def _part(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else getattr(value, name, None)


def _attempt(step: Any, results: dict[str, Any] | None) -> Any:
    """What a transform makes of a copy of the results, or the error that it raises."""
    if results is None:
        return None
    try:
        return _run([step], copy.deepcopy(results))
    except Exception as error:
        return error


def _run(steps: Sequence[Any], results: dict[str, Any]) -> Any:
    with _seeded(steps, int(results.get('sample_idx', 0))):
        for step in steps:
            results = step(results)
            if results is None:
                break
    return results


@contextmanager
def _seeded(steps: Sequence[Any], seed: int) -> Iterator[None]:
    """The same random numbers for an image in every count, and none taken from training."""
    sources: list[Any] = [random, np.random, torch.default_generator]
    for part in (part for step in steps for part in _parts(step)):
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


def _is(step: Any, known: set[str]) -> bool:
    root = str(getattr(step, '__module__', '')).partition('.')[0]
    return root in ('mmcv', 'mmengine', 'mmseg') and type(step).__name__ in known


def _is_known(step: Any) -> bool:
    ours = str(getattr(step, '__module__', '')).startswith('mmseg_imbalance.')
    return ours or _is(step, KEEP_LABELS | IMAGE_LOADERS)


def _keeps_labels(step: Any) -> bool:
    """Whether a transform, and all that it holds, is known not to change what a label means."""
    return all(map(_is_known, _parts(step)))


def _parts(step: Any) -> Iterator[Any]:
    """A transform and those inside it, as MMCV's wrappers have them."""
    yield step
    inner = getattr(step, 'transforms', ())
    for each in inner if isinstance(inner, list | tuple) else [inner]:
        if callable(each):
            yield from _parts(each)


def _own_name(step: Any) -> str:
    return str(getattr(step, '__name__', type(step).__name__))


def _name(step: Any) -> str:
    held = [_own_name(part) for part in _parts(step) if part is not step and not _is_known(part)]
    return f'{_own_name(step)}({", ".join(held)})' if held else _own_name(step)
