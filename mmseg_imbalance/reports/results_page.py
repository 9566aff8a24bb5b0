"""The page of the results of suites, in MyST Markdown, and its plots."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from matplotlib.figure import Figure

from mmseg_imbalance.files import write_atomically
from mmseg_imbalance.fonts import fonts_for, plain
from mmseg_imbalance.plots import save_figure
from mmseg_imbalance.reports.page import COLOURS
from mmseg_imbalance.reports.paired import PairedTest
from mmseg_imbalance.reports.results import (
    ALPHA,
    SUMMARIES,
    TESTED,
    Regime,
    Row,
    mean_and_half,
    number,
    survives,
)
from mmseg_imbalance.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEST = 4  # methods in the plot of classes
HINT = (
    'The range of mIoU or tail leaves out 0, but p is not below 0.05 after the correction. No claims. '
    'Few seeds prove only what is much the same in each.'
)
NEITHER = (
    'Tested, and 0 lies in the ranges of both. That no help is proven does not prove that there is none.'
)


class Plot(NamedTuple):
    file: str
    title: str
    caption: str
    draw: Callable[[Regime], Figure]


def write_results(regimes: list[Regime], folder: Path) -> list[Path]:
    """The page FOLDER.md beside the folder, and the plots in it.

    Returns:
        The files written.
    """
    page = folder.parent / f'{folder.name}.md'
    with write_atomically(page) as file:
        file.write(results_page(regimes, folder.name))
    written = [page]
    for regime in regimes:
        with fonts_for([*regime.classes, *regime.methods]):
            for plot in plots(regime):
                written.append(folder / plot.file)
                save_figure(plot.draw(regime), written[-1], dpi=110)
    return written


def results_page(regimes: list[Regime], folder: str) -> str:
    """The text of the page, the same for the same rows; its plots lie in ``folder``."""
    return '\n'.join(_page(regimes, folder)).rstrip() + '\n'


def _page(regimes: list[Regime], folder: str) -> Iterator[str]:
    rows = [row for regime in regimes for row in regime.rows]
    baseline = regimes[0].baseline
    yield '# Results of the experiments\n'
    yield (
        f'Written by `mmseg-imbalance results` from the rows in `{folder}/*.csv`. '
        '`mmseg-imbalance suite` adds a row as each run ends.\n'
    )
    yield f'**{len(rows)} runs, {_hours(rows):.1f} hours of training** (evaluations are not counted).\n'
    yield f'- Hardware: {_joined(row["hardware"] for row in rows)}'
    yield f'- Commits: {_joined(row["commit"] or "unknown" for row in rows)}'
    suites = _joined(f'`{regime.suite}.py`' for regime in regimes)
    yield f'- What each method changes is in the suite file: {suites}\n'
    yield from markdown_table(
        ['data', 'iterations', 'methods', 'seeds', 'runs', 'hours'],
        ([_place(regime), f'{regime.iterations:,}', *_size(regime)] for regime in regimes),
    )
    yield '## How to read it\n'
    yield from (
        '- Numbers are per cent, of the last iteration, on the validation images.',
        '- Head, body and tail are thirds of the classes by training pixels, if no note says otherwise; the '
        'tail is the rarest.',
        "- A mean is over seeds; ± is half its 95 % interval by Student's t. One seed has none.",
        f'- A difference is the method minus {_text(baseline)}, of the seeds that both have. The range '
        'after it is its 95 % interval. Intervals are not corrected for their number.',
        '- p is of the paired t-test over seeds, two-sided, corrected by Holm for all tests of mIoU and tail '
        'with one data set and schedule. Bold: p is below 0.05.',
        '- Nothing is claimed from one seed, nor from differences that are equal in all seeds.',
        '- Seeds tell how much another training would differ, not how much other images would.\n',
    )
    yield from _verdicts(regimes)
    for regime in regimes:
        yield from _section(regime, folder)


def _verdicts(regimes: list[Regime]) -> Iterator[str]:
    base = _text(regimes[0].baseline)
    better, worse, hints, neither, untested, number_of_tests, surviving = [], [], [], [], [], 0, 0
    for regime in regimes:
        for method in list(regime.methods)[1:] if regime.tests else ():
            tests = [regime.tests[metric][method] for metric in TESTED]
            left = [test for test in tests if survives(test)]
            number_of_tests += sum(test.p is not None for test in tests)
            surviving += len(left)
            if all(test.p is None for test in tests):
                untested.append(f'{_text(method)} ({_place(regime)})')
                continue
            cells = (cell for test in tests for cell in (_difference(test), _p(test)))
            hint = not left and any(test.p is not None and test.p < ALPHA for test in tests)
            row = [_whole(_place(regime)), _text(method), str(len(tests[0].seeds)), *cells]
            for rows, chosen in (
                (better, any(test.mean > 0 for test in left)),
                (worse, any(test.mean < 0 for test in left)),
                (hints, hint),
                (neither, not left and not hint),
            ):
                rows += [row] if chosen else []
    yield '## Significant differences\n'
    yield f'{surviving} of {number_of_tests} tests are below 0.05 after the correction.\n'
    header = ['data', 'method', 'seeds', 'mIoU', 'p', 'tail', 'p']
    for title, rows in (
        (f'### Better than {base}', better),
        (f'### Worse than {base}', worse),
        (f'### Hints\n\n{HINT}', hints),
        (f'## Not beyond noise\n\n{NEITHER}', neither),
    ):
        yield f'{title}\n'
        yield from markdown_table(header, rows) if rows else ('None.\n',)
    if untested:
        yield f'Not tested, as there is at most one seed in common: {"; ".join(untested)}.\n'


def _section(regime: Regime, folder: str) -> Iterator[str]:
    yield f'## {_place(regime)}: {regime.iterations:,} iterations\n'
    if regime.pixels:
        for part, names in regime.parts.items():
            yield f'- {part}: {", ".join(map(_text, names))}'
        yield ''
    values = {metric: regime.values(metric) for metric in SUMMARIES}
    yield from markdown_table(
        ['method', 'seeds', *map(_name, SUMMARIES)],
        (
            [_text(name), str(len(rows)), *(_mean(values[metric][name]) for metric in SUMMARIES)]
            for name, rows in regime.methods.items()
        ),
    )
    if len(regime.methods) > 1 and regime.tests:
        yield f'Difference to {_text(regime.baseline)}:\n'
        tests = {metric: regime.differences(metric) for metric in SUMMARIES}
        header = [title for m in SUMMARIES for title in (_name(m), *(['p'] if m in TESTED else []))]
        yield from markdown_table(
            ['method', 'seeds', *header],
            (
                [
                    _text(name),
                    str(len(tests['mIoU'][name].seeds)),
                    *(
                        cell
                        for metric in SUMMARIES
                        for cell in _cells(tests[metric][name], tested=metric in TESTED)
                    ),
                ]
                for name in list(regime.methods)[1:]
            ),
        )
    for plot in plots(regime):
        yield f'![{plot.title}: {_place(regime)}]({folder}/{plot.file})\n'
        yield f'{plot.caption}\n'
    if regime.notes:
        yield from (f'- {_text(note)}.' for note in regime.notes)
        yield ''


def _text(text: str) -> str:
    """As plain text in Markdown; a table escapes its own |."""
    return re.sub(r'([\\*_`<\[\]$])', r'\\\1', text)


def _joined(texts: Iterable[str]) -> str:
    return '; '.join(sorted({*texts}))


def _place(regime: Regime) -> str:
    return _text(f'{regime.dataset}, {regime.schedule}')


def _hours(rows: Iterable[dict[str, str]]) -> float:
    """Of training; a model with a fitted bias was trained as another method."""
    minutes = (number(row, 'minutes') for row in rows if not row['config'].endswith('+bias'))
    return sum(filter(math.isfinite, minutes)) / 60


def _size(regime: Regime) -> list[str]:
    seeds = sorted({len(rows) for rows in regime.methods.values()})
    shown = str(seeds[0]) if len(seeds) == 1 else f'{seeds[0]} to {seeds[-1]}'
    return [str(len(regime.methods)), shown, str(len(regime.rows)), f'{_hours(regime.rows):.1f}']


def _name(metric: str) -> str:
    return metric.removeprefix('mIoU.')


def _mean(of_seed: dict[int, float]) -> str:
    mean, half = mean_and_half(of_seed.values())
    if math.isnan(mean):
        return '-'
    known = sum(map(math.isfinite, of_seed.values()))
    fewer = f' ({known} seeds)' if known < len(of_seed) else ''
    return f'{mean:.2f}{"" if half is None else f" ± {half:.2f}"}{fewer}'


def _difference(test: PairedTest) -> str:
    if math.isnan(test.mean):
        return '-'
    text = f'**{test.mean:+.2f}**' if survives(test) else f'{test.mean:+.2f}'
    if test.interval is None:
        return text
    low, high = test.interval
    return f'{text} {_whole(f"({low:+.2f}, {high:+.2f})")}'


def _whole(text: str) -> str:
    """With spaces at which no line breaks."""
    return text.replace(' ', '\N{NO-BREAK SPACE}')


def _p(test: PairedTest) -> str:
    if test.holm is None:
        return '-'
    return _whole('< 0.001') if test.holm < 0.001 else f'{test.holm:.3f}'


def _cells(test: PairedTest, tested: bool) -> list[str]:
    return [_difference(test), _p(test)] if tested else [_difference(test._replace(holm=None))]


def plots(regime: Regime) -> list[Plot]:
    """The plots that the rows of a regime allow."""
    name = f'{regime.suite}-{regime.dataset}-{regime.schedule}'
    stem = re.sub(r'[^A-Za-z0-9.]+', '-', name)
    if re.search(r'[^A-Za-z0-9._-]', name):  # without these characters it may be another's
        stem += f'-{zlib.crc32(name.encode()):08x}'
    base = _text(regime.baseline)
    found = []
    if len(regime.methods) > 1 and regime.tests:
        caption = (
            f'mIoU and tail minus those of {base}. Bars: 95 % interval over seeds. Filled: p is below 0.05 '
            'after the correction.'
        )
        found.append(Plot(f'{stem}-methods.png', 'Difference by method', caption, plot_methods))
        order = 'most frequent class first' if regime.pixels else 'in the order of the data set'
        caption = (
            f'IoU of each class minus that of {base}, {order}: the methods with the highest mIoU, only those '
            'with several seeds, if there are any. Bars: 95 % interval over seeds, not corrected. Hollow: it '
            'holds 0, or is not known.'
        )
        found.append(Plot(f'{stem}-classes.png', 'Difference by class', caption, plot_classes))
    if any(len(curve(row)) > 1 for row in regime.rows):
        caption = 'mIoU on the validation images during training. Thick: mean. Thin: single seeds.'
        found.append(Plot(f'{stem}-curve.png', 'mIoU during training', caption, plot_curves))
    return found


def plot_methods(regime: Regime) -> Figure:
    """Difference to the baseline of mIoU and tail, a row for each method, best first."""
    names = list(regime.methods)[1:]
    figure = Figure(figsize=(11, 1.3 + 0.3 * len(names)), layout='constrained')
    for axes, metric in zip(figure.subplots(1, len(TESTED), sharey=True), TESTED, strict=True):
        tests = [regime.tests[metric][name] for name in names]
        for row, test in enumerate(tests):
            _point(axes, test, row, COLOURS[2], filled=survives(test))
        _finish(axes, tests, names, f'{_name(metric)} minus that of {regime.baseline}')
    return figure


def plot_classes(regime: Regime) -> Figure:
    """Difference to the baseline of the IoU of each class, a row for each, by frequency, for the best."""
    tested = [name for name, test in regime.differences('mIoU').items() if test.p is not None]
    names = sorted(tested or regime.differences('mIoU'), key=list(regime.methods).index)[:BEST]
    classes = regime.classes
    figure = Figure(figsize=(11, 1.6 + 0.1 * (2 + len(names)) * len(classes)), layout='constrained')
    axes = figure.subplots()
    tests = [regime.differences(f'IoU.{label}') for label in classes]
    for number_, name in enumerate(names):
        for row, test in enumerate(by_method[name] for by_method in tests):
            place = row + 0.7 * ((number_ + 0.5) / len(names) - 0.5)
            known = test.interval is not None and not test.interval[0] <= 0 <= test.interval[1]
            _point(axes, test, place, COLOURS[number_ + 1], filled=known)
        axes.plot([], [], 'o', color=COLOURS[number_ + 1], label=plain(name))
    labels = classes
    if total := sum(regime.pixels.values()):
        labels = [f'{name}  {100 * regime.pixels.get(name, 0) / total:.3g} %' for name in classes]
        for part, members in regime.parts.items():
            top = classes.index(members[0]) - 0.5
            axes.axhline(top, color='0.6', linewidth=0.8)
            axes.text(1, top + 0.1, part, transform=axes.get_yaxis_transform(), ha='right', va='top')
    shown = [by_method[name] for by_method in tests for name in names]
    _finish(axes, shown, labels, f'IoU minus that of {regime.baseline}')
    figure.legend(loc='outside lower center', ncols=len(names), frameon=False)
    return figure


def _point(axes: Axes, test: PairedTest, place: float, colour: str, filled: bool) -> None:
    if test.interval is not None:
        axes.plot(test.interval, [place, place], color=colour, linewidth=1.2, alpha=0.7)
    axes.plot(
        test.mean, place, 'o', color=colour, markersize=6, markerfacecolor=colour if filled else 'white'
    )


def _finish(axes: Axes, tests: list[PairedTest], labels: list[str], title: str) -> None:
    """A row for each label, the first on top, and room for the points; what of the bars is beyond is cut."""
    means = [test.mean for test in tests if math.isfinite(test.mean)] + [0.0]
    room = max(0.35 * (max(means) - min(means)), 1.0)
    axes.set_xlim(min(means) - room, max(means) + room)
    axes.set_yticks(range(len(labels)), map(plain, labels))
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.axvline(0, color='0.3', linewidth=0.8)
    axes.set_xlabel(plain(title))
    axes.grid(axis='x', color='0.92')
    axes.set_axisbelow(True)
    axes.spines[['top', 'right', 'left']].set_visible(False)
    axes.tick_params(axis='y', length=0)


def plot_curves(regime: Regime) -> Figure:
    """mIoU over the iterations, of every method."""
    figure = Figure(figsize=(11, 4.8), layout='constrained')
    axes = figure.subplots()
    for number_, (name, rows) in enumerate(regime.methods.items()):
        look = dict(
            color=COLOURS[number_ % len(COLOURS)], linestyle=('-', '--', ':')[number_ // len(COLOURS) % 3]
        )
        curves = [curve(row) for row in rows.values()]
        if not all(curves):  # a method that is not trained
            continue
        for each in curves:
            axes.plot(each.keys(), each.values(), linewidth=0.6, alpha=0.5, **look)
        steps = sorted(set.intersection(*map(set, curves)))
        means = [mean_and_half(each[step] for each in curves)[0] for step in steps]
        axes.plot(steps, means, 'o', linewidth=2, markersize=4, label=plain(name), **look)
    axes.set_xlim(left=0)
    axes.set_xlabel('iterations')
    axes.set_ylabel('mIoU on val, %')
    axes.grid(color='0.92')
    axes.spines[['top', 'right']].set_visible(False)
    figure.legend(loc='outside right center', frameon=False)
    return figure


def curve(row: Row) -> dict[int, float]:
    """The mIoU of each evaluation of a run by its iteration."""
    points = (point.partition(':') for point in row['curve'].split())
    return {int(step): float(value) for step, _, value in points}
