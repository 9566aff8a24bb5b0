"""Runs grouped by config: means over seeds, differences to a baseline, and what of them is noise."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmseg_imbalance.intervals import Difference, Jackknife, difference, jackknife
from mmseg_imbalance.reports.confusion import Confusion, confusion
from mmseg_imbalance.reports.identity import data_roots
from mmseg_imbalance.reports.names import readable_names
from mmseg_imbalance.reports.work_dirs import Run, Unusable, read_run
from mmseg_imbalance.scores import block_names, class_groups

NOISE = 'within noise'


class Estimate(NamedTuple):
    """A number of one config, in per cent."""

    values: list[float]  # of each run
    mean: float
    std: float | None  # over the runs, None for a single one
    difference: float | None = None  # of the mean to the baseline's; None for the baseline itself
    interval: tuple[float, float] | None = None  # of the difference, 95 %
    noise: str = ''  # what the interval holds: 'images and seeds', 'images', 'seeds' or ''

    @property
    def within_noise(self) -> bool | None:
        """Whether the difference may be chance; None: unknown."""
        if self.difference is None:
            return None
        return Difference(self.difference, self.interval, self.noise).within_noise


class Group(NamedTuple):
    """The runs of one config that differ in the seed alone."""

    label: str  # that a reader understands
    name: str  # of the config, and what it says otherwise than another of that name
    runs: list[Run]
    estimates: dict[str, Estimate]  # by quantity: class names, then the summaries


class Comparison(NamedTuple):
    """All that is shown."""

    classes: list[str]  # most frequent first
    shares: dict[str, float]  # of the valid pixels
    parts: dict[str, list[str]]  # head, body and tail; empty where the frequencies are not known
    summaries: list[str]  # names of the means over classes
    groups: list[Group]  # the baseline first
    confusion: Confusion | None  # of the rare classes; None where the baseline's tests have not kept it
    left_out: list[tuple[str, str]]  # work dir and reason
    notes: list[str]
    images: int | None = None  # that intervals are over, and their blocks; None: there are none over images
    blocks: int | None = None


def compare(
    work_dirs: list[Path], baseline: Path | None = None, blocks: str | int | None = None
) -> Comparison:
    """Read the runs, group them by config and estimate every number.

    Args:
        work_dirs: of trainings or tests.
        baseline: one of them; None: the first.
        blocks: see :func:`~mmseg_imbalance.scores.block_names`; None: as the baseline was tested with.

    Raises:
        ValueError: no run can be used, or not the baseline; ``blocks`` are no such thing.
    """
    runs, names, left_out, notes = _usable(work_dirs, baseline)
    groups = _grouped(runs, left_out)
    full_names = list(groups)
    groups = dict(zip(readable_names(groups), groups.values(), strict=True))
    runs = [run for members in groups.values() for run in members]
    notes += _notes(groups, runs)
    classes, shares, parts = _frequencies(runs, names, notes)
    counted = [c for c in classes if all(math.isfinite(run.iou.get(c, math.nan)) for run in runs)]
    if rest := [c for c in classes if c not in counted]:
        notes.append(
            f'{rest} are in no mean: no label of the tested images holds them, or not every run has them'
        )
    means = {'mIoU': counted}
    means |= {f'mIoU.{part}': [c for c in members if c in counted] for part, members in parts.items()}
    kinds = ('mIoU_I', 'mIoU_C', 'mRecall.small')
    more = ['aAcc', *(key for key in runs[0].metrics if key.startswith(kinds))]
    more = [key for key in more if all(key in run.metrics for run in runs)]
    estimates = {
        label: {name: _estimate(run.iou.get(name, math.nan) for run in members) for name in classes}
        | {key: _estimate(_mean_iou(run, names) for run in members) for key, names in means.items()}
        | {key: _estimate(run.metrics[key] for run in members) for key in more}
        for label, members in groups.items()
    }
    base, *others = groups
    alike = {base}
    alike |= {label for label in others if all(_same_images(runs[0], run) for run in groups[label])}
    of_images, number = _jackknives(groups, alike, counted, blocks, notes)
    notes += [
        f"{label}: its images or their labels are not the baseline's, so nothing is known of the noise"
        for label in groups
        if label not in alike
    ]
    for label in others:
        for key, own in estimates[label].items():
            averaged = [counted.index(name) for name in means.get(key, [key]) if name in counted]
            images = (of_images[base], of_images[label]) if label in of_images and averaged else None
            pair = ([value / 100 for value in e.values] for e in (estimates[base][key], own))
            result = difference(*pair, images, np.array(averaged, int))
            if label not in alike:
                result = Difference(result.mean)
            interval = result.interval and tuple(100 * end for end in result.interval)
            estimates[label][key] = own._replace(
                difference=100 * result.mean, interval=interval, noise=result.noise
            )
    shown = [
        Group(label, name, members, estimates[label])
        for name, (label, members) in zip(full_names, groups.items(), strict=True)
    ]
    confused = confusion(groups, parts.get('tail') or classes)
    return Comparison(classes, shares, parts, [*means, *more], shown, confused, left_out, notes, *number)


def _usable(
    work_dirs: list[Path], baseline: Path | None
) -> tuple[list[Run], list[str], list[tuple[str, str]], list[str]]:
    """The runs that can be compared, the baseline first, the classes of all; what is left out, and notes."""
    runs, left_out, notes = [], [], []
    for work_dir in {path.resolve(): path for path in work_dirs}.values():
        run = read_run(work_dir)
        if isinstance(run, Unusable):
            left_out.append((str(work_dir), run.reason))
        else:
            runs.append(run)
    chosen = work_dirs[0] if baseline is None else baseline
    first = next((run for run in runs if run.work_dir.resolve() == chosen.resolve()), None)
    if first is None and runs and baseline is None:
        first = runs[0]
        notes.append(f'{chosen} cannot be compared, so {first.work_dir} is the baseline')
    if first is None:
        reasons = ''.join(f'\n  {name}: {reason}' for name, reason in left_out)
        what = 'none of the runs' if baseline is None else f'the baseline {baseline}'
        raise ValueError(f'{what} can be compared:{reasons}')
    names = list(first.classes)
    for run in list(runs):
        # a metric leaves out classes that neither occur nor are predicted
        if set(names) & set(run.classes):
            names += [name for name in run.classes if name not in names]
        else:
            runs.remove(run)
            left_out.append(
                (str(run.work_dir), f'its classes {run.classes} are not those of {first.work_dir}, {names}')
            )
    return sorted(runs, key=lambda run: run is not first), names, left_out, notes


def _notes(groups: dict[str, list[Run]], runs: list[Run]) -> list[str]:
    """What a reader has to know of the runs."""
    notes = []
    for label, members in groups.items():
        seeds = [run.seed for run in members if run.seed is not None]
        if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            notes.append(f'{label}: seed {twice} more than once; these are not independent runs')
        roots = {', '.join(data_roots(run.config.get('train_dataloader'))) for run in members}
        if len(roots) > 1:
            notes.append(
                f'{label}: trained on data at {sorted(roots)}, of the same counts, so taken as the same'
            )
    notes += [f'{run.work_dir}: {note}' for run in runs for note in run.notes]
    without = [str(run.work_dir) for run in runs if run.scores is None]
    if len(without) < len(runs):
        notes += [
            f'{name}: there is no image_scores.npz of ImbalanceIoUMetric that can be used, so nobody knows '
            'whether it was tested on the images of the others: it is not put together with these'
            for name in without
        ]
    if len({run.source.split()[0] for run in runs}) > 1:
        notes.append('some results are of tests and some of validations')
    return notes


def _frequencies(
    runs: list[Run], names: list[str], notes: list[str]
) -> tuple[list[str], dict[str, float], dict[str, list[str]]]:
    """The classes, most frequent first, their shares and parts, of the first run that knows all of them."""
    pixels = next((run.class_pixels for run in runs if set(names) <= set(run.class_pixels)), None)
    if pixels is None:
        notes.append(
            'how frequent the classes are in training is not known: neither image_scores.npz of '
            'ImbalanceIoUMetric nor class_weights.json of ClassWeightHook tells'
        )
        return names, {}, {}
    classes = sorted(pixels, key=lambda name: -pixels[name])
    shares = {name: pixels[name] / max(sum(pixels.values()), 1) for name in classes}
    return classes, shares, _parts(runs, classes, pixels)


def _estimate(values: Iterable[float]) -> Estimate:
    values = list(values)
    known = [value for value in values if math.isfinite(value)]
    mean = float(np.mean(known)) if known else math.nan
    return Estimate(values, mean, float(np.std(known, ddof=1)) if len(known) > 1 else None)


def _mean_iou(run: Run, names: list[str]) -> float:
    """Over these classes, in per cent."""
    return float(np.mean([run.iou[name] for name in names])) if names else math.nan


def _grouped(runs: list[Run], left_out: list[tuple[str, str]]) -> dict[str, list[Run]]:
    """Runs by label of their config, in their order; what two of one name differ in is in the label.

    A model that was given twice, by its training and by its test, is taken once.
    """
    found: list[list[Run]] = []
    taken: list[tuple[dict, Run]] = []
    for run in runs:
        evaluated = {
            key: value
            for key, value in run.settings.items()
            if key.startswith('evaluation.') or key == 'tested data'
        }
        twin = next((r for how, r in taken if how == evaluated and r.models & run.models), None)
        if twin is not None:
            left_out.append((str(run.work_dir), f'it is of the same model as {twin.work_dir}'))
            continue
        taken.append((evaluated, run))
        members = next((members for members in found if members[0].settings == run.settings), None)
        if members is None:
            found.append([run])
        else:
            members.append(run)
    labels: dict[str, list[Run]] = {}
    for members in found:
        label, settings = members[0].name, members[0].settings
        namesakes = [others[0].settings for others in found if others[0].name == label]
        if len(namesakes) > 1:
            keys = {key for known in namesakes for key in known}
            differing = sorted(k for k in keys if len({repr(known.get(k)) for known in namesakes}) > 1)
            label += ' [' + ', '.join(f'{key}={settings.get(key)}' for key in differing[:3])
            label += f', {len(differing) - 3} more]' if len(differing) > 3 else ']'
        while label in labels:
            label += "'"
        labels[label] = members
    return labels


def _parts(runs: list[Run], classes: list[str], pixels: dict[str, int]) -> dict[str, list[str]]:
    """Head, body and tail as the metric of the first run has them that knows, else thirds by pixels."""
    for run in runs:
        if run.scores is not None and any(run.scores['group']):
            part_of = dict(zip(run.scores['classes'].tolist(), run.scores['group'].tolist(), strict=True))
            return {part: [c for c in classes if part_of.get(c) == part] for part in ('head', 'body', 'tail')}
    thirds = class_groups(np.array([pixels[name] for name in classes]))
    return {part: [classes[c] for c in members] for part, members in thirds.items()}


def _same_images(one: Run, other: Run) -> bool:
    """Whether two runs were tested on the same images, and on the same labels of the classes of both."""
    if one.scores is None or other.scores is None:
        keys = {key for key in (*one.settings, *other.settings) if key.startswith('evaluation.dataset.')}
        return all(one.settings.get(k) == other.settings.get(k) for k in keys if '.pipeline.' not in k)
    both = [name for name in one.scores['classes'].tolist() if name in other.scores['classes'].tolist()]
    labels = [run.scores['label'][:, _columns(run, both)] for run in (one, other)]
    return np.array_equal(one.scores['images'], other.scores['images']) and np.array_equal(*labels)


def _columns(run: Run, names: list[str]) -> list[int]:
    classes = run.scores['classes'].tolist()
    return [classes.index(name) for name in names]


def _jackknives(
    groups: dict[str, list[Run]],
    alike: set[str],
    classes: list[str],
    blocks: str | int | None,
    notes: list[str],
) -> tuple[dict[str, list[Jackknife]], tuple[int | None, int | None]]:
    """How the IoU of these classes changes without each block of images, for each run of the configs that
    know and were tested alike, and the numbers of images and blocks.
    """
    scored = {label: members for label, members in groups.items() if all(run.scores for run in members)}
    first = next(iter(groups))
    if len(groups) < 2:
        return {}, (None, None)
    if first not in scored or len(scored) < 2:
        notes.append(
            'no intervals over images: ImbalanceIoUMetric leaves image_scores.npz for them, which the '
            'baseline or all others lack'
        )
        return {}, (None, None)
    scores = scored[first][0].scores
    names = scores['images'].tolist()
    of_image = scores['blocks'].tolist() or names if blocks is None else block_names(blocks, names)
    number = len(set(of_image))
    if number < 2:
        notes.append(
            f'no intervals over images: all {len(names)} are of one block, and nothing tells what others '
            'would give'
        )
        return {}, (None, None)
    found = {
        label: [
            jackknife(
                *(run.scores[key][:, _columns(run, classes)] for key in ('intersect', 'union', 'label')),
                of_image,
            )
            for run in members
        ]
        for label, members in scored.items()
        if label in alike
    }
    return found, (len(names), number)
