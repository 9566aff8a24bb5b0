"""The pixels of each class in an annotation, as training sees them, or why they cannot be counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from mmseg_imbalance.counting.annotations import Annotation
from mmseg_imbalance.counting.label_files import (
    MAY_BE_LOSSY,
    as_bytes,
    decode,
    lossy_file,
    reading,
    value_counts,
    whole_numbers,
)
from mmseg_imbalance.counting.label_steps import DROPPED, LabelSteps, loads_images
from mmseg_imbalance.counting.transforms import name_of


class Note(NamedTuple):
    """What is unusual about a file and yet counted, in words that are the same for other files."""

    text: str
    pixels: int  # how many of the file it is about


class PixelCount(NamedTuple):
    """Pixels of each class, (C,) int64, ignored pixels, and notes on one annotation."""

    pixels: np.ndarray
    ignored: int
    notes: tuple[Note, ...] = ()


def count_pixels(annotation: Annotation, num_classes: int) -> PixelCount:
    """The pixels of each class in one annotation, labelled as training sees them.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it cannot be read or used, or holds labels that are neither classes nor ignored.
    """
    steps, table, path = annotation.steps, annotation.table, annotation.path
    info = annotation.dataset.get_data_info(annotation.row)
    notes: list[Note] = []
    if table is None:
        lossy = lossy_file(str(info.get('seg_map_path')))
        results = steps.loaded(info, path)
    else:
        with reading(path):
            raw, lossy = decode(path, steps.load[0])
        raw = raw.squeeze()
        if not steps.change:
            _refuse_lossy(lossy, path, steps)
            _check_array(raw, path, colours=raw.ndim > 2)
        values, pixels = value_counts(raw)
        whole = whole_numbers(values, path)
        cast = as_bytes(values)
        if not steps.change:
            counted = _tally(annotation, num_classes, whole, table[cast], pixels, cast != whole)
            return counted._replace(notes=(*_lossy_notes(lossy, raw.size), *counted.notes))
        changed = np.flatnonzero(cast != whole)
        notes += [_cast_note(whole[at], table[cast[at]], pixels[at]) for at in changed]
        fields = [*info.get('seg_fields', ()), 'gt_seg_map']
        results = {**info, 'gt_seg_map': table[as_bytes(raw)], 'seg_fields': fields}
    unusual = [DROPPED.format(name_of(steps.load[-1]))]
    if results is not None:
        results, unusual = steps.changed(results, path)
    if results is None:
        return PixelCount(np.zeros(num_classes, dtype=np.int64), 0, (Note(unusual[0], 0),))
    if 'gt_seg_map' not in results:
        raise ValueError(
            f'{path}: the pipeline yields no gt_seg_map for this image, and it does for others. Let it yield '
            'the ignored label everywhere, or drop the image by returning None.'
        )
    labels = np.asarray(results['gt_seg_map'])
    channels = labels.squeeze().shape[2:]
    _check_array(labels, path, colours=loads_images(steps) and channels in ((2,), (3,), (4,)))
    notes += _lossy_notes(lossy, labels.size)
    notes += [Note(text, labels.size) for text in unusual]
    values, pixels = value_counts(labels)
    whole = whole_numbers(values, path)
    unchanged = np.zeros(len(whole), dtype=bool)
    counted = _tally(annotation, num_classes, whole, whole, pixels, unchanged, lossy, unusual)
    return counted._replace(notes=(*notes, *counted.notes))


def _check_array(labels: np.ndarray, path: str, colours: bool) -> None:
    if colours:
        grey = labels[..., :3] if labels.shape[-1] > 2 else labels[..., :1]  # without transparency
        same = ' Its channels are the same here: save one of them.' if (grey == grey[..., :1]).all() else ''
        raise ValueError(
            f'{path}: shape {labels.shape}, but a label image has one channel of class '
            f"indices. Convert colours to indices; imdecode_backend='pillow' keeps a palette's.{same}"
        )
    if labels.dtype.kind not in 'biuf':
        raise ValueError(f'{path}: gt_seg_map must hold numbers, got an array of {labels.dtype}')
    if labels.squeeze().ndim > 3:
        raise ValueError(
            f'{path}: gt_seg_map has the shape {labels.shape}, allowed are (H, W) and volumes (Z, H, W), of '
            'class indices, with at most one channel.'
        )


def _lossy_notes(lossy: str, pixels: int) -> list[Note]:
    if lossy == MAY_BE_LOSSY:
        text = f'a {lossy} file keeps labels only if nothing was cut off to make it smaller: save PNG'
    else:
        text = f'a {lossy} file does not keep labels, and transforms of your own must restore them'
    return [Note(text, pixels)] if lossy else []


def _refuse_lossy(lossy: str, path: str, steps: LabelSteps) -> None:
    if lossy and lossy != MAY_BE_LOSSY:
        raise ValueError(
            f'{path}: a label image saved as {lossy}, whatever its name ends with. This compression changes '
            'values, so at the edges of objects there are labels that nobody has drawn: '
            'numpy.unique(numpy.array(PIL.Image.open(PATH))) shows them. Save the labels anew as PNG from '
            'where they were drawn; changing the format of this file keeps the wrong labels. If only two '
            'values were meant, a threshold restores them, also in a transform of your own after '
            f'LoadAnnotations.{not_run(steps)}'
        )


def not_run(steps: LabelSteps) -> str:
    """What to do about transforms that may mend the labels and that counting has left out."""
    if not steps.left_out:
        return ''
    remedy = f'write {steps.option}' if steps.option else 'mend them in a transform before it'
    return f' Counting did not run {", ".join(steps.left_out)}: if the labels are mended there, {remedy}.'


def _cast_note(value: int, label: int | str, pixels: int, seen_by: str = 'the transforms after it') -> Note:
    text = f'{value} in the file is {label} for {seen_by}, as LoadAnnotations keeps one byte of a value'
    return Note(text, int(pixels))


def notes_text(notes: Iterable[Note]) -> str:
    """One message about the notes on all files, or ''."""
    files: Counter[str] = Counter()
    pixels: Counter[str] = Counter()
    for note in notes:
        files[note.text] += 1
        pixels[note.text] += note.pixels
    listed = '; '.join(f'{text} ({files[text]:,} files, {pixels[text]:,} pixels)' for text in files)
    return listed and f'labels are counted as training sees them, which may not be what is meant: {listed}.'


def _tally(
    annotation: Annotation,
    num_classes: int,
    values: np.ndarray,
    labels: np.ndarray,
    pixels: np.ndarray,
    changed: np.ndarray,
    lossy: str = '',
    unusual: Iterable[str] = (),
) -> PixelCount:
    """Counts from the values of a file, (n,) each: label, pixels, whether the cast to a byte changes it."""
    labels = labels.astype(np.int64)
    ignored = labels == annotation.ignore_index
    refused = ~ignored & (changed | ~np.isin(labels, np.arange(num_classes)))
    if refused.any():
        found = zip(values[refused], labels[refused], pixels[refused], strict=True)
        listed = [f'{value} -> {label}: {count} pixels' for value, label, count in found]
        causes = _causes(annotation, num_classes, values, labels, refused, changed, lossy)
        raise ValueError(
            f'{annotation.path}: labels out of range, value in the file -> label: '
            f'{", ".join(listed[:20])}. Allowed are 0 to {num_classes - 1} and ignore_index '
            f'{annotation.ignore_index}; the file holds {values[:50].tolist()}. '
            f'{" ".join((causes + not_run(annotation.steps), *(f"{text}." for text in unusual)))}'
        )
    counts = np.zeros(num_classes, dtype=np.int64)
    np.add.at(counts, labels[~ignored], pixels[~ignored])
    at_changed = zip(values[changed], labels[changed], pixels[changed], strict=True)
    notes = [_cast_note(value, f'{label}, ignored,', count, 'training') for value, label, count in at_changed]
    return PixelCount(counts, int(pixels[ignored].sum()), tuple(notes))


def _causes(
    annotation: Annotation,
    num_classes: int,
    values: np.ndarray,
    labels: np.ndarray,
    refused: np.ndarray,
    changed: np.ndarray,
    lossy: str,
) -> str:
    """The likely cause of labels that are out of range, and the remedy."""
    if lossy:
        return (
            f'It is a {lossy} file, a compression that changes values. Save labels as PNG, or restore the '
            'values in the transform that loads them.'
        )
    if (refused & changed).any():
        return (
            "MMSegmentation's LoadAnnotations keeps one byte of a value, so training would see other labels "
            'than the file holds. Save labels from 0 to 255, and ignore_index where there is none.'
        )
    ignored = annotation.ignore_index
    others = (getattr(annotation.dataset, 'label_map', None) or {}).values()
    if ignored != 255 and 255 in others and (labels[refused] == 255).all():
        return (
            "Likely cause: classes is a part of the data set's classes. MMSegmentation's label_map makes 255 "
            f'of the labels of the others, and ignore_index is {ignored}. It must be 255, in the data set '
            'and in the decode heads.'
        )
    drawn = np.unique(values[labels != ignored])
    if num_classes == 1 and len(drawn) < 3:
        return f'Likely cause: two values and one class. {_two_classes(annotation.dataset)}'
    if drawn.max() >= max(100, 3 * num_classes):
        if len(drawn) > num_classes and np.count_nonzero(refused) > 2:
            return (
                'Likely cause: masks with smooth edges, by a resize with interpolation, by drawing, or from '
                'a file that once was JPEG, whose values lie beside and between those that were meant. '
                'Export the labels anew from where they were drawn. If only two values were meant, a '
                'threshold restores them: labels = numpy.array(PIL.Image.open(PATH)) > 127; '
                "PIL.Image.fromarray(labels.astype('uint8')).save(PATH), or the same in a transform of your "
                'own after LoadAnnotations, which is run in counting too. If all these values were drawn, '
                'classes names too few.'
            )
        if np.diff(drawn).min(initial=256) >= 10:
            return _scaled(np.unique(values), num_classes, ignored)
    return (
        f'Usual causes: reduce_zero_label is {getattr(annotation.dataset, "reduce_zero_label", None)} and '
        'should not be; raw labelIds instead of labelTrainIds (see seg_map_suffix); metainfo classes '
        f'({num_classes} names) that do not fit the files; another ignore_index.'
    )


def _scaled(values: np.ndarray, num_classes: int, ignore_index: int) -> str:
    if len(values) > num_classes:
        values = values[values != ignore_index]
    known = len(values) == num_classes and ignore_index not in values  # it could be a class, or mean void
    here = f', as {values.tolist()} in this file' if known else ''
    return (
        'Likely cause: masks scaled for viewing, or made of colours, whose values are spread over the byte. '
        'First collect the values of all files: set().union(*(numpy.unique(numpy.array(PIL.Image.open(path)))'
        f'.tolist() for path in PATHS)). Let values be the list of the {num_classes} of them that mean a '
        f'class, in the order of the classes{here}, and map each file to 0 to {num_classes - 1} by a table, '
        f"in which all others are ignored: table = numpy.full(256, {ignore_index}, 'uint8'); table[values] = "
        f'range({num_classes}); PIL.Image.fromarray(table[numpy.array(PIL.Image.open(PATH))]).save(PATH). Or '
        'map them in a transform of your own after LoadAnnotations, which is run in counting too.'
    )


def _two_classes(dataset: Any) -> str:
    return (
        "The background is a class too: write classes=('background', "
        f'{str(dataset.metainfo["classes"][0])!r}), num_classes=2 in the head, where out_channels=1 stays '
        'possible, and labels 0 and 1.'
    )


def one_class_alone(dataset: Any) -> str:
    """The message about a training data set of one class."""
    return (
        f'{str(dataset.metainfo["classes"][0])!r} is the only class and all valid pixels are of it, so a '
        f'model learns nothing: the softmax over one class is always 1. {_two_classes(dataset)} Objects '
        'saved as 255 are ignored, and so are zeros with reduce_zero_label=True.'
    )
