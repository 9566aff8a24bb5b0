"""Class frequencies and weights as a table and as a chart."""

from __future__ import annotations

import os
from collections.abc import Mapping
from io import StringIO
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmseg_imbalance.frequency import ClassFrequency


def class_table(frequency: ClassFrequency, weights: Mapping[str, np.ndarray]) -> Table:
    """One row per class: pixels, share of the valid pixels, images; one column of (C,) weights per name."""
    counted = f'{frequency.num_images} images'
    if frequency.num_images < frequency.dataset_images:
        counted += f', a sample of {frequency.dataset_images}'
    pixels = int(frequency.pixels.sum()) + frequency.ignored
    table = Table(title=f'{counted}, {pixels:,} pixels, {frequency.ignored / max(pixels, 1):.1%} ignored')
    table.add_column('class')
    for name in ('pixels', 'share', 'images', *weights):
        table.add_column(name, justify='right')
    rows = zip(frequency.classes, frequency.pixels, frequency.share, frequency.images, strict=True)
    for c, (name, count, share, images) in enumerate(rows):
        table.add_row(
            escape(name),
            f'{count:,}',
            f'{share:.3%}',
            f'{images:,}',
            *(f'{w[c]:.4f}' for w in weights.values()),
        )
    return table


def table_text(table: Table) -> str:
    """The table as plain text as wide as it needs, for log files and pipes."""
    out = StringIO()
    console = Console(file=out, width=1000)
    console.width = console.measure(table).maximum
    console.print(table)
    return out.getvalue().rstrip()


def plot_class_weights(
    frequency: ClassFrequency, weights: np.ndarray, path: str | os.PathLike[str], label: str = 'weight'
) -> None:
    """Bar chart of each class's share of the pixels (log scale) beside its (C,) weight, rarest last."""
    order = np.argsort(frequency.pixels)
    names = [frequency.classes[c] for c in order]
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(names)), layout='constrained')
    shares, bars = figure.subplots(1, 2, sharey=True)
    shares.barh(names, 100 * frequency.share[order], color='#4878a8')
    if frequency.pixels.any():
        shares.set_xscale('log')
        shares.set_xlim(left=50 * frequency.share[frequency.pixels > 0].min())
    shares.set_xlabel('share of valid pixels (%)')
    bars.barh(names, weights[order], color='#d1783c')
    bars.axvline(1, color='0.4', linewidth=0.8, linestyle=':')
    bars.set_xlabel(label)
    for axes in (shares, bars):
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(axis='x', color='0.9')
        axes.set_axisbelow(True)
    figure.suptitle(f'{frequency.num_images:,} images')
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
