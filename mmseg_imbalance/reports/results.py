"""What the rows of a suite of experiments show: methods paired by seed with a baseline, and tested."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from mmseg_imbalance.reports.paired import PairedTest, holm, paired_tests
from mmseg_imbalance.scores import class_groups
from mmseg_imbalance.suite import read_rows

ALPHA = 0.05
TESTED = ('mIoU', 'mIoU.tail')  # what claims are made of
SUMMARIES = (*TESTED, 'mIoU.body', 'mIoU.head')

Row = dict[str, str]
Methods = dict[str, dict[int, Row]]  # by name and seed


@dataclass(frozen=True)
class Regime:
    """A data set trained with one schedule: the methods that are compared, and how they did."""

    suite: str
    dataset: str
    schedule: str
    baseline: str
    methods: Methods  # the baseline first, then the highest mIoU
    pixels: dict[str, int]  # of the training annotations by class; empty where no row tells
    tests: dict[str, dict[str, PairedTest]]  # by metric and method; empty without the baseline
    notes: list[str]

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.methods.values() for row in rows.values()]

    @property
    def iterations(self) -> int:
        return max(int(row['iterations']) for row in self.rows)

    @property
    def classes(self) -> list[str]:
        """Most frequent first; where no row tells, in the order of the data set."""
        names = [key.removeprefix('IoU.') for key in self.rows[0] if key.startswith('IoU.')]
        return sorted(names, key=lambda name: -self.pixels.get(name, 0))

    @property
    def parts(self) -> dict[str, list[str]]:
        """The classes of head, body and tail as thirds; empty where the rows have other groups, or none."""
        parts = _thirds(self.classes, self.pixels)
        return {} if any(_has_other_groups(row, parts) for row in self.rows) else parts

    def values(self, metric: str) -> dict[str, dict[int, float]]:
        """The number of each run by method and seed; NaN where it has none."""
        return _values(self.methods, metric)

    def differences(self, metric: str) -> dict[str, PairedTest]:
        """Each method against the baseline; those of ``tests`` are corrected, others are not."""
        if self.baseline not in self.methods:
            return {}
        return self.tests.get(metric) or paired_tests(self.values(metric), self.baseline)


def _values(methods: Methods, metric: str) -> dict[str, dict[int, float]]:
    return {name: {s: number(row, metric) for s, row in rows.items()} for name, rows in methods.items()}


def _thirds(names: list[str], pixels: dict[str, int]) -> dict[str, list[str]]:
    groups = class_groups(np.array([pixels.get(name, 0) for name in names]))
    return {part: [names[c] for c in members] for part, members in groups.items() if len(members)}


def _with_common_classes(methods: Methods, pixels: dict[str, int]) -> tuple[Methods, list[str]]:
    """The rows with means over the classes that all have, and a note if that leaves any out.

    A class that no tested label holds has an IoU of 0 in a run that predicts it, and none in the others.
    """
    rows = [row for of_seed in methods.values() for row in of_seed.values()]
    names = [key for key in rows[0] if key.startswith('IoU.')]
    known = [{name for name in names if math.isfinite(number(row, name))} for row in rows]
    common = set.intersection(*known)
    if not common or not (extra := sorted(set.union(*known) - common)):
        return methods, []
    parts = _thirds([name.removeprefix('IoU.') for name in names], pixels) if pixels else {}
    if any(_has_other_groups(row, parts) for row in rows):
        parts = {}
    means = {'mIoU': common}
    for part, members in parts.items():
        means[f'mIoU.{part}'] = common.intersection(f'IoU.{name}' for name in members)

    def changed(row: Row) -> Row:
        kept = {m: str(_mean_of(row, of)) for m, of in means.items() if math.isfinite(number(row, m))}
        return row | kept | dict(curve='')  # whose means are over other classes

    note = (
        f'Left out of {"the means" if parts else "mIoU, not of the groups"}: '
        f'{", ".join(name.removeprefix("IoU.") for name in extra)}. Not all runs have an IoU there: a class '
        'that no tested label holds has 0 where it is predicted, and none elsewhere. No curves are shown'
    )
    return {name: {s: changed(row) for s, row in of_seed.items()} for name, of_seed in methods.items()}, [
        note
    ]


def _mean_of(row: Row, metrics: Iterable[str]) -> float:
    values = [number(row, metric) for metric in sorted(metrics)]
    return round(math.fsum(values) / len(values), 2) if values else math.nan


def _has_other_groups(row: Row, parts: dict[str, list[str]]) -> bool:
    """Whether the mean of a part is not that of its classes: the metric was given ``groups``."""
    for part, members in parts.items():
        ious = [iou for name in members if math.isfinite(iou := number(row, f'IoU.{name}'))]
        mean = number(row, f'mIoU.{part}')
        # a class that no label holds is left out of the mean, and has 0 where it is predicted
        numbers = range(max(1, sum(iou > 0 for iou in ious)), len(ious) + 1)
        if math.isfinite(mean) and ious and all(abs(math.fsum(ious) / n - mean) > 0.02 for n in numbers):
            return True
    return False


def survives(test: PairedTest) -> bool:
    """Whether a difference is beyond noise after the correction."""
    return test.holm is not None and test.holm < ALPHA


def number(row: Row, metric: str) -> float:
    return float(row.get(metric) or 'nan')


def mean_and_half(values: Iterable[float]) -> tuple[float, float | None]:
    """The mean over seeds and half its 95 % interval by Student's t; None where nothing tells the noise."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return math.nan, None
    mean = math.fsum(known) / len(known)
    if len(known) < 2 or max(known) == min(known):
        return mean, None
    error = float(np.std(known, ddof=1)) / math.sqrt(len(known))
    return mean, float(student.ppf(1 - ALPHA / 2, len(known) - 1)) * error


def read_results(folder: Path, baseline: str = 'cross-entropy') -> list[Regime]:
    """The comparisons that the rows of a folder hold, by data set, the longest schedule first.

    Of several rows of one run the last counts. The result does not depend on the order of other rows.

    Args:
        folder: of the CSV files of ``mmseg-imbalance suite``.
        baseline: name of the method that the others are compared with.

    Raises:
        FileNotFoundError: there are no rows.
        ValueError: a file is none of a suite; no row is of the baseline.
    """
    regimes = []
    for path in sorted(folder.glob('*.csv')):
        rows = read_rows(path)
        keys = sorted({(row['suite'], row['dataset'], row['schedule']) for row in rows})
        regimes += [
            _regime([row for row in rows if (row['suite'], row['dataset'], row['schedule']) == key], baseline)
            for key in keys
        ]
    if not regimes:
        raise FileNotFoundError(
            f'no rows of a suite in {folder}; mmseg-imbalance suite writes RESULTS/DATASET.csv'
        )
    if not any(baseline in regime.methods for regime in regimes):
        names = sorted({name for regime in regimes for name in regime.methods})
        raise ValueError(f'no row is of the baseline {baseline!r}, but of {names}; --baseline names another')
    for number_, regime in enumerate(regimes):  # frequencies are those of the data set
        pixels = next((r.pixels for r in regimes if r.dataset == regime.dataset and r.pixels), {})
        regimes[number_] = regime = replace(regime, pixels=pixels)
        if pixels and not regime.parts:
            regime.notes.append('Head, body and tail are the groups that the metric was given, not thirds')
    return sorted(regimes, key=lambda r: (r.dataset, -r.iterations, r.schedule, r.suite))


def _regime(rows: list[Row], baseline: str) -> Regime:
    methods: Methods = {}
    pixels = {
        key.removeprefix('Pixels.'): int(count)
        for row in rows
        for key, count in row.items()
        if key.startswith('Pixels.') and count
    }
    notes = []
    for row in rows:
        seeds = methods.setdefault(row['method'], {})
        if (old := seeds.get(int(row['seed']))) is not None:
            changed = '' if old['config'] == row['config'] else ', with another config'
            notes.append(
                f'{row["method"]}, seed {row["seed"]}: there is an older row{changed}; the last counts'
            )
        seeds[int(row['seed'])] = row
    methods = {name: dict(sorted(methods[name].items())) for name in sorted(methods)}
    methods, left_out = _with_common_classes(methods, pixels)
    tests = {}
    if baseline in methods:
        tests = {metric: paired_tests(_values(methods, metric), baseline) for metric in TESTED}
        flat = [(metric, name) for metric in TESTED for name in tests[metric]]
        corrected = holm([tests[metric][name].p for metric, name in flat])
        for (metric, name), p in zip(flat, corrected, strict=True):
            tests[metric][name] = tests[metric][name]._replace(holm=p)
    rank = {name: mean_and_half(of_seed.values())[0] for name, of_seed in _values(methods, 'mIoU').items()}
    rank |= {name: test.mean for name, test in tests.get('mIoU', {}).items()}
    order = sorted(methods, key=lambda name: (name != baseline, -np.nan_to_num(rank[name], nan=-math.inf)))
    methods = {name: methods[name] for name in order}
    names = (rows[0][column] for column in ('suite', 'dataset', 'schedule'))
    return Regime(
        *names, baseline, methods, pixels, tests, [*left_out, *sorted(notes), *_notes(methods, baseline)]
    )


def _notes(methods: Methods, baseline: str) -> list[str]:
    """What a reader of the comparison has to know besides the numbers."""
    notes = []
    for column, what in (
        ('commit', 'Rows of different commits stand beside each other'),
        ('iterations', 'Rows of different length stand beside each other'),
        ('hardware', 'The runs were made on different hardware'),
    ):
        found = sorted({row[column] for rows in methods.values() for row in rows.values()})
        if len(found) > 1:
            parts = [f'{value or "unknown"} ({_holders(methods, column, value)})' for value in found]
            notes.append(f'{what}: {"; ".join(parts)}')
    of_all = [row for rows in methods.values() for row in rows.values()]
    for column in sorted({key for row in of_all for key in row if key.startswith('Pixels.')}):
        found = sorted({row[column] for row in of_all if row.get(column)}, key=int)
        if len(found) > 1:
            parts = [f'{int(value):,} ({_holders(methods, column, value)})' for value in found]
            notes.append(
                f'The runs were trained on different labels; pixels of {column.removeprefix("Pixels.")}: '
                f'{"; ".join(parts)}. Their differences are of that too'
            )
            break
    commits = {row['commit'] for rows in methods.values() for row in rows.values()}
    if changed := sorted(commit for commit in commits if commit.endswith('+')):
        notes.append(f'Files differed from the commit where it has a +: {", ".join(changed)}')
    if baseline not in methods:
        return [*notes, f'There is no run of {baseline} here, so that nothing is compared']
    for name, rows in methods.items():
        if len({row['config'] for row in rows.values()}) > 1:
            notes.append(
                f'{name}: not all seeds have the same config, so their mean is of different things. Run the '
                'suite again and take old rows out'
            )
        alone = [str(seed) for seed in rows if seed not in methods[baseline]]
        if alone:
            notes.append(f'{name}: no {baseline} of seed {", ".join(alone)}, which is not in the differences')
    return notes


def _holders(methods: Methods, column: str, value: str) -> str:
    """The methods whose rows have a value, with the seeds where it is not all of them."""
    held = {
        name: [str(s) for s, row in rows.items() if row[column] == value] for name, rows in methods.items()
    }
    if len(set(map(tuple, held.values()))) == 1:  # by seed alone
        return f'seed {", ".join(held[next(iter(held))])}'
    return '; '.join(
        name if len(seeds) == len(methods[name]) else f'{name} seed {", ".join(seeds)}'
        for name, seeds in held.items()
        if seeds
    )
