"""Which classes take the pixels of the rare ones, and what is taken for a rare one: before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mmseg_imbalance.fonts import plain
from mmseg_imbalance.reports.work_dirs import Run
from mmseg_imbalance.scores import present_mean, ratio

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CLASSES = 8  # rare ones
MOST_OTHERS = 3  # of each, that it is confused with
TOLD = 0.05  # share of the bar from which its text has room


class Confusion(NamedTuple):
    """Shares of the pixels of rare classes, means over the runs of each config."""

    labels: list[str]  # of the configs
    rare: list[str]  # the rarest last
    classes: list[str]
    predicted_as: np.ndarray  # (G, R, C) of the pixels that are the rare class, by what is predicted
    truly: np.ndarray  # (G, R, C) of the pixels predicted as the rare class, by what they are; NaN where none


def confusion(groups: Mapping[str, Sequence[Run]], rare: Sequence[str]) -> Confusion | None:
    """Of the configs whose tests have kept it, and of the last of these classes, the rarest of all.

    None where the tests of the first config, the baseline, have not kept it.

    Args:
        groups: the runs of each config, by its label.
    """
    baseline = next(iter(groups))
    base = groups[baseline][0].scores
    if base is None:
        return None
    classes = base['classes'].tolist()
    kept = {}
    for label, runs in groups.items():
        scores = [run.scores for run in runs if run.scores is not None]
        scores = [s for s in scores if len(s['confusion']) and s['classes'].tolist() == classes]
        if scores:
            kept[label] = np.stack([s['confusion'] for s in scores])  # (runs, C, C)
    if baseline not in kept:
        return None
    held = {name for c, name in enumerate(classes) if base['label'][:, c].any()}
    rare = [name for name in rare if name in held][-MOST_CLASSES:]
    if not rare:
        return None
    rows = [classes.index(name) for name in rare]
    predicted_as, truly = [], []
    for counts in kept.values():
        of_rare, called_rare = counts[:, rows], counts.swapaxes(1, 2)[:, rows]
        for shares, pixels in ((predicted_as, of_rare), (truly, called_rare)):
            whole = np.broadcast_to(pixels.sum(2, keepdims=True), pixels.shape)
            shares.append(present_mean(ratio(pixels, whole)))
    return Confusion(list(kept), rare, classes, np.stack(predicted_as), np.stack(truly))


def most_confused(found: Confusion, shares: np.ndarray, row: int) -> list[int]:
    """The classes with the highest shares of a rare class's pixels in any config, itself left out."""
    most = np.nan_to_num(shares[:, row]).max(0)
    most[found.classes.index(found.rare[row])] = 0
    return [c for c in np.argsort(-most, kind='stable')[:MOST_OTHERS].tolist() if most[c] > 0]


def confusion_tables(found: Confusion) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of two tables, in per cent, the rarest class first."""
    tables = []
    for title, shares in (
        ('Where the pixels of the rare classes go, %', found.predicted_as),
        ('What the pixels predicted as a rare class are, %', found.truly),
    ):
        header = ['truth → predicted', found.labels[0]]
        header += [f'{label}{what}' for label in found.labels[1:] for what in ('', ': change')]
        rows = []
        for row, name in reversed(list(enumerate(found.rare))):
            own = found.classes.index(name)
            for c in [own, *most_confused(found, shares, row)]:
                pair = (name, found.classes[c]) if shares is found.predicted_as else (found.classes[c], name)
                first, *others = 100 * shares[:, row, c]
                cells = [f'{name}, right' if c == own else ' → '.join(pair), _percent(first)]
                for value in others:
                    cells += [_percent(value), _percent(value - first, '+')]
                rows.append(cells)
        tables.append((title, header, rows))
    return tables


def _percent(value: float, sign: str = '') -> str:
    return '-' if np.isnan(value) else f'{value:{sign}.1f}'


def plot_confusion(found: Confusion, colours: list[str]) -> Figure:
    """A bar for each rare class and config: what is right, and which classes take the rest.

    Args:
        found: the shares.
        colours: of the configs, in their order.
    """
    from matplotlib.figure import Figure

    configs, rare = len(found.labels), len(found.rare)
    figure = Figure(figsize=(12, 1.5 + rare * (0.3 + 0.3 * configs)), layout='constrained')
    axes = figure.subplots()
    for at, row in enumerate(reversed(range(rare))):  # the rarest on top
        own = found.classes.index(found.rare[row])
        others = most_confused(found, found.predicted_as, row)
        for number, label in enumerate(found.labels):
            place = at * (configs + 1) + number
            colour = colours[number % len(colours)]
            share = 100 * np.nan_to_num(found.predicted_as[number, row])
            name = plain(label) if at == 0 else None
            axes.barh(place, share[own], 0.9, color=colour, label=name)
            left = share[own]
            rest = 100 - share[own] - share[others].sum()
            parts = [(found.classes[c], share[c]) for c in others] + [('others', rest)]
            axes.text(-0.6, place, f'{share[own]:.0f} %', ha='right', va='center', fontsize=8.5, color=colour)
            for shade, (what, width) in zip(('0.72', '0.80', '0.87', '0.94'), parts, strict=False):
                axes.barh(place, width, 0.9, left=left, color=shade, edgecolor='white', linewidth=0.8)
                if width > 100 * TOLD + 0.75 * len(what):
                    text = plain(f'{what} {width:.0f}')
                    axes.text(left + width / 2, place, text, ha='center', va='center', fontsize=8.5)
                left += width
    middle = np.arange(rare) * (configs + 1) + (configs - 1) / 2
    axes.set_yticks(middle, [plain(name) for name in reversed(found.rare)])
    axes.tick_params(axis='y', length=0, pad=38)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel('share of the pixels of the class in the truth, %')
    axes.spines[['top', 'right', 'left']].set_visible(False)
    figure.legend(loc='outside lower center', ncols=max(1, min(configs, 4)), frameon=False)
    return figure
