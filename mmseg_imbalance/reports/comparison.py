"""Runs grouped by config: means over seeds, differences to a baseline, and what of them is noise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

from mmseg_imbalance.reports.names import readable_names
from mmseg_imbalance.reports.work_dirs import Run, Unusable, read_run
from mmseg_imbalance.scores import bootstrap_counts, class_groups, present_mean, resampled_iou

RESAMPLES = 2000
CONFIDENCE = 0.95
NOISE = 'within noise'


class Estimate(NamedTuple):
    """A number of one config, in per cent."""

    values: list[float]  # of each run
    mean: float
    std: float | None  # over the runs, None for a single one
    difference: float | None = None  # of the mean to the baseline's; None for the baseline itself
    seed_noise: float | None = None  # half the interval of a difference that other seeds would give
    interval: tuple[float, float] | None = None  # of the difference, over images

    @property
    def within_noise(self) -> bool | None:
        """Whether the difference may be chance; None: nothing tells."""
        known = self.seed_noise is not None or self.interval is not None
        if self.difference is None or math.isnan(self.difference) or not known:
            return None
        by_seed = self.seed_noise is not None and abs(self.difference) <= self.seed_noise
        by_image = self.interval is not None and self.interval[0] <= 0 <= self.interval[1]
        return by_seed or by_image


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
    left_out: list[tuple[str, str]]  # work dir and reason
    notes: list[str]


def compare(work_dirs: list[Path], baseline: Path | None = None) -> Comparison:
    """Read the runs, group them by config and estimate every number.

    Raises:
        ValueError: no run can be used, or not the baseline.
    """
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
        if not set(names) & set(run.classes):
            runs.remove(run)
            left_out.append(
                (str(run.work_dir), f'its classes {run.classes} are not those of {first.work_dir}, {names}')
            )
            continue
        names += [name for name in run.classes if name not in names]
    groups = _grouped(runs, first, left_out)
    full_names = dict(zip(labels := readable_names(groups), groups, strict=True))
    groups = dict(zip(labels, groups.values(), strict=True))
    for label, members in groups.items():
        seeds = [run.seed for run in members if run.seed is not None]
        if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            notes.append(f'{label}: seed {twice} more than once; these are not independent runs')
        roots = {
            str(run.config.get('train_dataloader', {}).get('dataset', {}).get('data_root')) for run in members
        }
        if len(roots) > 1:
            notes.append(f'{label}: trained on data at {sorted(roots)}, taken for the same')
    notes += [
        f'{run.work_dir}: {note}' for members in groups.values() for run in members for note in run.notes
    ]
    runs = [run for members in groups.values() for run in members]
    if len({run.source.split()[0] for run in runs}) > 1:
        notes.append('some results are of tests and some of validations')

    pixels = next((run.class_pixels for run in runs if set(names) <= set(run.class_pixels)), None)
    if pixels is None:
        notes.append(
            'how frequent the classes are in training is not known: neither image_scores.npz of '
            'ImbalanceIoUMetric nor class_weights.json of ClassWeightHook tells'
        )
        classes, shares, parts = names, {}, {}
    else:
        classes = sorted(pixels, key=lambda name: -pixels[name])
        shares = {name: pixels[name] / max(sum(pixels.values()), 1) for name in classes}
        parts = _parts(runs, classes, pixels)
    means = {'mIoU': classes} | {f'mIoU.{part}': members for part, members in parts.items()}
    more = [
        key
        for key in ('aAcc', *first.metrics)
        if key == 'aAcc' or key.startswith(('mIoU_I', 'mIoU_C', 'mRecall.small'))
    ]
    more = [key for key in dict.fromkeys(more) if all(key in run.metrics for run in runs)]
    values = {  # of each config, quantity and run
        label: {
            **{name: [run.iou.get(name, math.nan) for run in members] for name in classes},
            **{key: [_mean_iou(run, names) for run in members] for key, names in means.items()},
            **{key: [run.metrics[key] for run in members] for key in more},
        }
        for label, members in groups.items()
    }
    intervals = _image_intervals(groups, classes, means, notes)
    estimated, base = [], next(iter(values.values()))
    for number, (label, members) in enumerate(groups.items()):
        estimates = {}
        for key, found in values[label].items():
            known = _finite(found)
            mean = float(np.mean(known)) if known else math.nan
            std = float(np.std(known, ddof=1)) if len(known) > 1 else None
            estimates[key] = Estimate(found, mean, std)
            if number > 0:
                reference = _finite(base[key])
                difference = mean - float(np.mean(reference)) if reference else math.nan
                noise = _seed_noise(reference, known)
                estimates[key] = Estimate(found, mean, std, difference, noise, intervals.get((label, key)))
        estimated.append(Group(label, full_names[label], members, estimates))
    return Comparison(classes, shares, parts, [*means, *more], estimated, left_out, notes)


def _mean_iou(run: Run, names: list[str]) -> float:
    """Over the classes that occur or are predicted, in per cent."""
    found = [run.iou[name] for name in names if not math.isnan(run.iou.get(name, math.nan))]
    return float(np.mean(found)) if found else math.nan


def _grouped(runs: list[Run], first: Run, left_out: list[tuple[str, str]]) -> dict[str, list[Run]]:
    """Runs by label of their config, the baseline's first; what two of one name differ in is in the label.

    A model that was given twice, by its training and by its test, is taken once.
    """
    found: list[tuple[dict, list[Run]]] = []
    for run in sorted(runs, key=lambda run: run is not first):
        members = next((members for known, members in found if known == run.settings), None)
        if members is None:
            found.append((run.settings, [run]))
            continue
        same = next(
            (m for m in members if Path(m.checkpoint).resolve() == Path(run.checkpoint).resolve()), None
        )
        if same is None:
            members.append(run)
        else:
            left_out.append((str(run.work_dir), f'it is of the same model as {same.work_dir}'))
    labels: dict[str, list[Run]] = {}
    for settings, members in found:
        label = members[0].name
        namesakes = [known for known, others in found if others[0].name == label]
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
            of = dict(zip(run.scores['classes'].tolist(), run.scores['group'].tolist(), strict=True))
            return {part: [c for c in classes if of[c] == part] for part in ('head', 'body', 'tail')}
    thirds = class_groups(np.array([pixels[name] for name in classes]))
    return {part: [classes[c] for c in members] for part, members in thirds.items()}


def _finite(values: list[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _seed_noise(first: list[float], second: list[float]) -> float | None:
    """Half the 95 % interval of the difference of two means, by Student's t of two samples."""
    freedom = len(first) + len(second) - 2
    if not first or not second or freedom == 0:
        return None
    squares = sum(float(((np.array(x) - np.mean(x)) ** 2).sum()) for x in (first, second))
    factor = student.ppf((1 + CONFIDENCE) / 2, freedom)
    return float(factor * math.sqrt(squares / freedom * (1 / len(first) + 1 / len(second))))


def _image_intervals(
    groups: dict[str, list[Run]], classes: list[str], means: dict[str, list[str]], notes: list[str]
) -> dict[tuple[str, str], tuple[float, float]]:
    """95 % intervals of the differences to the first config, from the same resampled images for both."""
    if len(groups) < 2:
        return {}
    scored = {
        label: members
        for label, members in groups.items()
        if all(run.scores and set(classes) <= set(run.scores['classes'].tolist()) for run in members)
    }
    first = next(iter(groups))
    if first not in scored or len(scored) < 2:
        notes.append(
            'no intervals over images: ImbalanceIoUMetric leaves image_scores.npz for them, which the '
            'baseline or all others lack, or which lacks classes of other runs'
        )
        return {}
    images = scored[first][0].scores['images']
    counts = bootstrap_counts(len(images), RESAMPLES, seed=0)  # (R, N)

    def resampled(members: list[Run]) -> dict[str, np.ndarray]:
        total = np.zeros((RESAMPLES, len(classes)))
        for run in members:
            order = [run.scores['classes'].tolist().index(name) for name in classes]
            areas = (run.scores[key][:, order] for key in ('intersect', 'union'))
            total += 100 * resampled_iou(counts, *areas) / len(members)
        columns = dict(zip(classes, total.T, strict=True))
        for key, names in means.items():
            columns[key] = present_mean(total[:, [classes.index(name) for name in names]].T)
        return columns

    base, intervals = resampled(scored[first]), {}
    for label, members in list(scored.items())[1:]:
        if not all(
            np.array_equal(run.scores[key], scored[first][0].scores[key])
            for run in (*scored[first], *members)
            for key in ('images', 'label')
        ):
            notes.append(
                f"{label}: no interval over images, its images or their labels are not the baseline's"
            )
            continue
        for key, values in resampled(members).items():
            tail = 50 * (1 - CONFIDENCE)
            difference = values - base[key]
            if np.isfinite(difference).any():
                low, high = np.nanpercentile(difference, [tail, 100 - tail])
                intervals[label, key] = (float(low), float(high))
    return intervals
