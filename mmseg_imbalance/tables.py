"""Tables, as text, of class frequencies, weights, subclasses and scores; names and colours of classes."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from io import StringIO

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmseg_imbalance.class_bias import ClassBias
from mmseg_imbalance.clustering import SubclassTable
from mmseg_imbalance.frequency import ClassFrequency

# Matplotlib's tab20, RGB; written out, as text needs no matplotlib
COLOURS = (
    (31, 119, 180), (174, 199, 232), (255, 127, 14), (255, 187, 120), (44, 160, 44),
    (152, 223, 138), (214, 39, 40), (255, 152, 150), (148, 103, 189), (197, 176, 213),
    (140, 86, 75), (196, 156, 148), (227, 119, 194), (247, 182, 210), (127, 127, 127),
    (199, 199, 199), (188, 189, 34), (219, 219, 141), (23, 190, 207), (158, 218, 229),
)  # fmt: skip


def table_of(*numbers: str, first: str = 'class', title: str | None = None) -> Table:
    """A table without rows: a first column of names, the others, of numbers, aligned to the right."""
    table = Table(title=title)
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify='right')
    return table


def class_table(frequency: ClassFrequency, weights: Mapping[str, np.ndarray]) -> Table:
    """One row per class: pixels, share of the valid pixels, images; one column of (C,) weights per name."""
    counted = f'{frequency.num_images} images'
    if frequency.num_images < frequency.dataset_images:
        counted += f', a sample of {frequency.dataset_images}'
    pixels = int(frequency.pixels.sum()) + frequency.ignored
    title = f'{counted}, {pixels:,} pixels, {frequency.ignored / max(pixels, 1):.1%} ignored'
    table = table_of('pixels', 'share', 'images', *weights, title=title)
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


def source_table(frequency: ClassFrequency) -> Table | None:
    """One row per class, its pixels in each data set that was put together; None where there is but one."""
    parts = frequency.by_source()
    if len(parts) < 2:
        return None
    table = table_of(
        *(f'{escape(name)}\n{part.num_images:,} images' for name, part in parts),
        title=f'pixels of each class in {len(parts)} data sets; - where it has none',
    )
    for c, name in enumerate(frequency.classes):
        pixels = [int(part.pixels[c]) for _, part in parts]
        table.add_row(escape(name), *(f'{count:,}' if count else '-' for count in pixels))
    return table


def table_text(table: Table) -> str:
    """The table as plain text as wide as it needs, for log files and pipes."""
    out = StringIO()
    console = Console(file=out, width=1000)
    console.width = console.measure(table).maximum
    console.print(table)
    return out.getvalue().rstrip()


def markdown_table(
    header: Sequence[str], rows: Iterable[Iterable[str]], numbers: Container[str] = ()
) -> Iterator[str]:
    """The lines of a table in Markdown, and an empty one; columns in ``numbers`` are aligned to the right."""
    for row in (header, ['--:' if name in numbers else '---' for name in header], *rows):
        cells = [cell.replace('|', r'\|') for cell in row]
        yield f'| {" | ".join(cells)} |'
    yield ''


def subclass_table(classes: Sequence[str], state: SubclassTable) -> Table:
    """One row per subclass: share of its class, mean loss, weight; - where it has none yet."""
    table = table_of('subclass', 'share', 'mean loss', 'weight')
    for c, name in enumerate(classes[: len(state.exists)]):  # a head may have fewer classes than another
        table.add_section()
        for k in np.flatnonzero(state.exists[c]):
            numbers = ['-'] * 3
            if np.isfinite(state.weight[c, k]):
                share, loss, weight = (x[c, k] for x in (state.share, state.mean_loss, state.weight))
                numbers = [f'{share:.1%}', f'{loss:.4f}', f'{weight:.3f}']
            table.add_row(escape(name) if k == 0 else '', str(k), *numbers)
    return table


def bias_table(classes: Sequence[str], found: ClassBias) -> Table:
    """One row per class: expected share, bias, expected IoU before and after; - where it is not expected."""

    def shown(iou: float) -> str:
        return f'{100 * iou:.2f}' if math.isfinite(iou) else '-'

    title = 'expected of the model by itself; bias: beyond the class weights that are taken back'
    table = table_of('share', 'bias', 'IoU', 'with the bias', title=title)
    share = found.pixels / found.pixels.sum()
    for c, name in enumerate(classes):
        iou = shown(found.before[c]), shown(found.after[c])
        table.add_row(escape(name), f'{share[c]:.3%}', f'{found.bias[c]:+.3f}', *iou)
    table.add_section()
    table.add_row('mean', '', '', shown(np.nanmean(found.before)), shown(np.nanmean(found.after)))
    return table


def names_and_colours(metainfo: Mapping[str, object], number: int) -> tuple[list[str], np.ndarray]:
    """Names and (number, 3) uint8 RGB colours of the first ``number`` classes of a data set's metainfo.

    Where the metainfo has none, a name is ``class 7`` and the colour one of twenty.
    """
    names = list(metainfo.get('classes') or ())
    palette = np.reshape(metainfo.get('palette') or (), (-1, 3))
    more = np.resize(COLOURS, (number, 3))[len(palette) :]
    names += [f'class {c}' for c in range(len(names), number)]
    return names[:number], np.concatenate([palette, more])[:number].astype(np.uint8)


def group_table(metrics: Mapping[str, float], sizes: Mapping[str, int]) -> Table:
    """A row for all classes, for each group and for each object size; ``sizes``: how many classes it has."""

    def shown(key: str) -> str:
        return f'{metrics[key]:.2f}' if math.isfinite(metrics.get(key, math.nan)) else '-'

    kinds = ['mPrecision', 'mRecall', *(kind for kind in ('mDice', 'mHD95') if kind in metrics)]
    table = table_of('classes', 'mIoU', '95 % interval', *kinds, first='')
    for name, number in sizes.items():
        suffix = '' if name == 'all' else f'.{name}'
        interval = '-'
        if shown(f'mIoU{suffix}.low') != '-':
            interval = ' to '.join(shown(f'mIoU{suffix}.{end}') for end in ('low', 'high'))
        numbers = [shown(f'{kind}{suffix}') for kind in kinds]
        table.add_row(name, str(number), shown(f'mIoU{suffix}'), interval, *numbers)
    return table
