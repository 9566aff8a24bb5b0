"""The HTML page of a comparison of runs, with its plots inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from mmseg_imbalance.fonts import fonts_for, plain
from mmseg_imbalance.reports.comparison import Comparison, Group
from mmseg_imbalance.reports.confusion import plot_confusion
from mmseg_imbalance.reports.pictures import STYLE as STYLE_OF_PICTURES
from mmseg_imbalance.reports.pictures import picture_tag, pictures
from mmseg_imbalance.reports.sheets import Sheet, explanation

COLOURS = ['#59636f', '#d1783c', '#4878a8', '#5b9a4a', '#a5569a', '#b8982f', '#3a9a94', '#c44f5b']
NAMED = 44  # classes that a plot has room to name
STYLE = """
:root { --line: #dcdfe4; --faint: #5f6772; }
body { font: 15px/1.45 system-ui, sans-serif; color: #1d2129; max-width: 1280px; }
body { margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin-bottom: .4rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p, li, figcaption { color: var(--faint); margin: .2rem 0; max-width: 62rem; }
figure { margin: 0; }
figure img { display: block; width: 100%; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .3rem .7rem; text-align: right; vertical-align: top; border-top: 1px solid var(--line); }
td { white-space: nowrap; }
tr:first-child th { border-top: 0; }
th { font-weight: 600; overflow-wrap: anywhere; min-width: 5rem; vertical-align: bottom; }
th:first-child, td:first-child, .text th, .text td { text-align: left; }
.text td { white-space: normal; overflow-wrap: anywhere; min-width: 4.5rem; }
.noise { color: #8a919b; }
.up { color: #2f7d32; font-weight: 600; }
.down { color: #b3372f; font-weight: 600; }
"""


def page(comparison: Comparison, tables: list[Sheet]) -> tuple[str, bytes]:
    """The whole page, which needs no other file, and its first plot as PNG."""
    lines = ['<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">']
    lines += [f'<title>Comparison of runs</title><style>{STYLE}{STYLE_OF_PICTURES}</style></head><body>']
    lines += ['<h1>Comparison of runs</h1>', *(f'<p>{escape(line)}</p>' for line in explanation(comparison))]
    charts = []
    names = [*comparison.classes, *(group.label for group in comparison.groups)]
    for title, caption, draw in _plots(comparison):
        file = BytesIO()
        with fonts_for(names):
            draw(comparison).savefig(file, dpi=150)
        charts.append(file.getvalue())
        lines += [f'<h2>{title}</h2><figure>{picture_tag(charts[-1], title, "png")}']
        lines += [f'<figcaption>{caption}</figcaption></figure>']
    for sheet in tables:
        kind = ' class="text"' if sheet.of_text else ''
        lines += [f'<h2>{escape(sheet.title)}</h2><div class="scroll"><table{kind}><tr>']
        lines += [*(f'<th>{escape(name)}</th>' for name in sheet.header), '</tr>']
        for row in sheet.rows:
            lines += ['<tr>', *_cells(sheet, row), '</tr>']
        lines += ['</table></div>']
    lines += pictures(comparison)
    if comparison.notes:
        lines += ['<h2>Notes</h2><ul>', *(f'<li>{escape(note)}</li>' for note in comparison.notes), '</ul>']
    return '\n'.join([*lines, '</body></html>\n']), charts[0]


def _cells(sheet: Sheet, row: list[str]) -> Iterator[str]:
    for name, cell in zip(sheet.header, row, strict=True):
        kind = ''
        if name.endswith(': difference') and cell[0] in '+-' and cell != '-':
            kind = 'noise' if 'noise' in cell or 'unknown' in cell else 'up' if cell[0] == '+' else 'down'
        yield f'<td class="{kind}">{escape(cell)}</td>' if kind else f'<td>{escape(cell)}</td>'


def _plots(comparison: Comparison) -> Iterator[tuple[str, str, Callable[[Comparison], Figure]]]:
    base = escape(comparison.groups[0].label)
    if len(comparison.groups) > 1:
        yield (
            'Difference by class frequency',
            f'IoU of each class minus that of {base}, by its share of the training pixels. Hollow: within '
            'noise, or noise unknown. Bars: 95 % interval. Dashed: the difference of the mean over classes.',
            plot_differences,
        )
    yield (
        'IoU of each class',
        'Most frequent class first. A line joins the means, small dots are single runs.',
        plot_classes,
    )
    yield 'Means over classes', 'Bars are means over runs, dots single runs.', plot_means
    if (confused := comparison.confusion) is not None:
        yield (
            'Which classes take the pixels of the rare ones',
            'Of the pixels of a rare class in the truth: what is found (coloured), and as what the rest is '
            'predicted (grey). Means over runs.',
            lambda _: plot_confusion(confused, COLOURS),
        )
    if all(run.scores is not None for group in comparison.groups for run in group.runs):
        yield (
            'Images from worst to best',
            'Mean over the classes in an image of its IoU, images sorted, mean over runs. Left is where a '
            'model fails.',
            plot_images,
        )


def plot_differences(comparison: Comparison) -> Figure:
    """Difference of the IoU of each class to the baseline over its share of the pixels."""
    classes = comparison.classes
    figure = Figure(figsize=(12, 6.2), layout='constrained')
    axes = figure.subplots()
    if comparison.shares:
        share = np.array([100 * comparison.shares[name] for name in classes])
        lowest = share[share > 0].min(initial=1)
        x = np.log10(np.where(share > 0, share, lowest / 3))
    else:
        x = -np.arange(len(classes), dtype=float)
    width = max(x.max() - x.min(), 0.5)
    others = comparison.groups[1:]
    for number, group in enumerate(others):
        colour = COLOURS[(number + 1) % len(COLOURS)]
        at = x + width * 0.008 * (number - (len(others) - 1) / 2)
        estimates = [group.estimates[name] for name in classes]
        for place, estimate in zip(at, estimates, strict=True):
            if estimate.interval is not None:
                axes.plot([place, place], estimate.interval, color=colour, linewidth=1, alpha=0.6)
        for hollow in (False, True):
            chosen = [n for n, e in enumerate(estimates) if (e.within_noise is not False) == hollow]
            axes.plot(
                at[chosen],
                [estimates[n].difference for n in chosen],
                linestyle='',
                marker=_marker(number + 1),
                markersize=7,
                color=colour,
                markerfacecolor='white' if hollow else colour,
                label=None if hollow else plain(group.label),
            )
        axes.axhline(group.estimates['mIoU'].difference, color=colour, linewidth=1, linestyle='--')
    axes.axhline(0, color='0.3', linewidth=0.8)
    axes.set_ylabel(plain(f'IoU minus that of {comparison.groups[0].label}'), wrap=True)
    axes.set_xlim(x.max() + 0.03 * width, x.min() - 0.03 * width)
    most = [max(abs(g.estimates[c].difference) for g in others) for c in classes]
    named = np.sort(np.argsort(-np.nan_to_num(most, nan=-1), kind='stable')[:NAMED])
    _name_along_top(axes, [classes[c] for c in named], x[named], width / (NAMED + 2))
    if comparison.shares:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{10**value:.3g}'))
        ticks = np.arange(np.floor(x.min()), np.ceil(x.max()) + 1)
        marks = np.sort(np.concatenate([ticks, ticks + np.log10(2), ticks + np.log10(5)]))
        axes.set_xticks([mark for mark in marks if x.min() - 0.03 * width <= mark <= x.max() + 0.03 * width])
        axes.set_xlabel('share of the valid training pixels, %: rare classes to the right')
    else:
        axes.xaxis.set_major_locator(NullLocator())
    axes.spines[['top', 'right']].set_visible(False)
    _legend(figure, others)
    return figure


def _name_along_top(axes: Axes, names: list[str], places: np.ndarray, gap: float) -> None:
    """Names moved apart where they would overlap, each tied to its place by a line."""
    low, high = axes.get_ylim()
    top = high + 0.02 * (high - low)
    lift = 0.05 * (top - low)
    slanted = dict(rotation=60, rotation_mode='anchor', ha='left', va='bottom', fontsize=9)
    for name, place, label in zip(names, places, spread(places, gap), strict=True):
        axes.plot([place, place], [low, top], color='0.93', linewidth=0.8, zorder=0)
        axes.plot([place, label], [top, top + lift], color='0.75', linewidth=0.8, clip_on=False)
        axes.text(label, top + 1.2 * lift, plain(name), **slanted)
    axes.set_ylim(low, top)


def _marker(number: int) -> str:
    return 'osD^v'[number // len(COLOURS) % 5]


def _legend(figure: Figure, groups: list[Group]) -> None:
    columns = max(1, 120 // (max(len(group.label) for group in groups) + 6))
    figure.legend(loc='outside lower center', ncols=min(columns, len(groups)), frameon=False)


def spread(places: np.ndarray, gap: float) -> np.ndarray:
    """Places at least ``gap`` apart, in the same order, moved as little as it takes in the least squares.

    Pools neighbours that are too close around their mean, as isotonic regression does.
    """
    order = np.argsort(places)
    blocks: list[list[float]] = []  # mean of place - rank * gap, number
    for rank, place in enumerate(np.asarray(places, float)[order]):
        blocks.append([place - rank * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    moved = np.concatenate([np.full(n, mean) for mean, n in blocks]) + gap * np.arange(len(places))
    result = np.empty(len(places))
    result[order] = moved
    return result


def plot_classes(comparison: Comparison) -> Figure:
    """IoU of each class and config, a row for each class."""
    classes = comparison.classes
    figure = Figure(figsize=(12, 1.6 + 0.34 * len(classes)), layout='constrained')
    axes = figure.subplots()
    rows = np.arange(len(classes))
    means = np.array([[group.estimates[c].mean for group in comparison.groups] for c in classes])
    known = np.isfinite(means).any(1)  # a class may be in no run's result
    ends = np.nanmin(means[known], 1), np.nanmax(means[known], 1)
    axes.hlines(rows[known], *ends, color='0.8', linewidth=2, zorder=1)
    for number, group in enumerate(comparison.groups):
        colour = COLOURS[number % len(COLOURS)]
        axes.scatter(
            means[:, number],
            rows,
            s=52,
            marker=_marker(number),
            color=colour,
            label=plain(group.label),
            zorder=3,
        )
        for row, name in zip(rows, classes, strict=True):
            values = group.estimates[name].values
            if len(values) > 1:
                axes.scatter(values, [row] * len(values), s=10, color=colour, alpha=0.5, zorder=2)
    shares = comparison.shares
    axes.set_yticks(rows, [plain(f'{c}  {shares[c]:.2%}' if shares else c) for c in classes])
    axes.invert_yaxis()
    axes.set_xlabel('IoU, %')
    axes.set_xlim(left=min(0, axes.get_xlim()[0]))
    axes.grid(axis='x', color='0.92')
    axes.set_axisbelow(True)
    axes.spines[['top', 'right', 'left']].set_visible(False)
    axes.tick_params(axis='y', length=0)
    _legend(figure, comparison.groups)
    return figure


def plot_means(comparison: Comparison) -> Figure:
    """Bars of the means over all, head, body and tail classes."""
    keys = [key for key in comparison.summaries if key.startswith('mIoU')]
    figure = Figure(figsize=(12, 4.2), layout='constrained')
    axes = figure.subplots()
    width = 0.8 / len(comparison.groups)
    for number, group in enumerate(comparison.groups):
        at = np.arange(len(keys)) + (number - (len(comparison.groups) - 1) / 2) * width
        bars = [group.estimates[key].mean for key in keys]
        axes.bar(at, bars, 0.92 * width, color=COLOURS[number % len(COLOURS)], label=plain(group.label))
        for place, key in zip(at, keys, strict=True):
            values = group.estimates[key].values
            axes.scatter([place] * len(values), values, s=12, color='0.15', zorder=3)
    axes.set_xticks(range(len(keys)), keys)
    axes.set_ylabel('%')
    axes.grid(axis='y', color='0.92')
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    _legend(figure, comparison.groups)
    return figure


def plot_images(comparison: Comparison) -> Figure:
    """Mean IoU of each image over the classes in it, sorted."""
    figure = Figure(figsize=(12, 4.2), layout='constrained')
    axes = figure.subplots()
    for number, group in enumerate(comparison.groups):
        curves = []
        for run in group.runs:
            held = run.scores['label'] > 0
            iou = np.where(held, run.scores['intersect'] / np.maximum(run.scores['union'], 1), 0)
            each = iou.sum(1)[held.any(1)] / held.sum(1)[held.any(1)]
            curves.append(np.interp(np.linspace(0, 1, 200), np.linspace(0, 1, len(each)), np.sort(each)))
        x = np.linspace(0, 100, 200)
        axes.plot(x, 100 * np.mean(curves, 0), color=COLOURS[number % len(COLOURS)], label=plain(group.label))
    axes.set_xlabel('images, %')
    axes.set_ylabel('mean IoU of the image, %')
    axes.set_xlim(0, 100)
    axes.grid(color='0.92')
    axes.spines[['top', 'right']].set_visible(False)
    _legend(figure, comparison.groups)
    return figure
