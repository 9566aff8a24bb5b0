"""Charts of class weights and class balance, pictures of subclasses.

Matplotlib is imported where something is drawn: a run that draws nothing does not need it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmseg_imbalance.clustering import SubclassTable
from mmseg_imbalance.files import write_atomically
from mmseg_imbalance.fonts import fonts_for, plain
from mmseg_imbalance.frequency import ClassFrequency
from mmseg_imbalance.scores import present_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

IGNORED = (24, 24, 24)  # RGB, darker than any subclass
TINY = 1e-6  # weights of 0 have no logarithm
LIGHTEST, DARKEST = 0.80, 0.25  # luma of a class's lightest and heaviest subclass


class SubclassMaps(NamedTuple):
    """The subclass and the weight that a loss gives to each pixel of an image."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    truth: np.ndarray  # (H, W) class indices, -1 where ignored
    weight: np.ndarray  # (H, W)
    subclass: np.ndarray | None  # (H, W) index within the class; None: the loss has no subclasses


def plot_class_weights(
    frequency: ClassFrequency, weights: np.ndarray, path: str | os.PathLike[str], label: str = 'weight'
) -> None:
    """Bar chart of each class's share of the pixels (log scale) beside its (C,) weight, rarest last."""
    with fonts_for(frequency.classes):
        save_figure(_weights_figure(frequency, weights, label), path, dpi=120)


def _weights_figure(frequency: ClassFrequency, weights: np.ndarray, label: str) -> Figure:
    from matplotlib.figure import Figure

    order = np.argsort(frequency.pixels)
    names = [plain(frequency.classes[c]) for c in order]
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
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int) -> None:
    """In the format that the ending of the name says, PNG without one."""
    with write_atomically(path, 'wb') as file:
        figure.savefig(file, format=Path(path).suffix[1:] or 'png', dpi=dpi)


def subclass_colours(palette: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(C, K, 3) uint8: the (C, 3) colour of each class from light to dark by the rank of the (C, K) weights.

    The only subclass of a class, and one without a weight, has the middle shade.
    """
    known = np.isfinite(weight)
    rank = np.where(known, weight, np.inf).argsort(1).argsort(1)
    last = known.sum(1, keepdims=True) - 1
    rank = np.where(known & (last > 0), rank / np.maximum(last, 1), 0.5)
    wanted = (LIGHTEST + rank * (DARKEST - LIGHTEST))[..., None]  # (C, K, 1)
    colour = np.asarray(palette, float)[:, None] / 255  # (C, 1, 3)
    luma = colour @ [[0.299], [0.587], [0.114]]
    darker = colour * wanted / np.maximum(luma, 1e-6)
    lighter = 1 - (1 - colour) * (1 - wanted) / np.maximum(1 - luma, 1e-6)
    return np.rint(255 * np.where(luma > wanted, darker, lighter)).astype(np.uint8)


def draw_subclasses(
    maps: SubclassMaps, classes: Sequence[str], palette: np.ndarray, state: SubclassTable | None
) -> np.ndarray:
    """The image, the truth, the subclass of every pixel and its weight, side by side: (h, w, 3) uint8 RGB.

    Args:
        maps: of one image; ignored pixels are dark grey.
        classes: C names.
        palette: (C, 3) RGB, 0 to 255.
        state: of the subclasses; None: the loss has none, and there is no such panel.
    """
    with fonts_for(classes):
        return _subclass_picture(maps, classes, palette, state)


def _subclass_picture(
    maps: SubclassMaps, classes: Sequence[str], palette: np.ndarray, state: SubclassTable | None
) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    counted = maps.truth >= 0
    shades = [[colour] for colour in np.asarray(palette, np.uint8)]  # of each class, from light to dark
    panels = dict(image=maps.image, truth=_painted(palette, maps.truth, counted))
    if state is not None:
        every = subclass_colours(palette, state.weight)
        each = np.maximum(np.isfinite(state.weight).sum(1), 1)
        order = state.weight.argsort(1)  # NaN comes last
        shades = [every[c, order[c, :n]] for c, n in enumerate(each)]
        title = 'subclass: the heavier, the darker'
        panels[title] = _painted(every, (maps.truth, maps.subclass), counted)
    scale = _weight_scale(maps.weight[counted], state)
    colours = scale.to_rgba(np.maximum(maps.weight, TINY), bytes=True)[..., :3]
    panels['weight'] = _painted(colours, ..., counted)

    height, width = maps.truth.shape
    columns = 2 if len(panels) == 4 and width > 1.6 * height else len(panels)
    rows = math.ceil(len(panels) / columns)
    present = np.unique(maps.truth[counted])
    inches = rows * (18 / columns * height / width + 0.4) + 0.3 * math.ceil(len(present) / 6)
    figure = Figure((19.2, inches), dpi=100, layout='constrained')
    figure.get_layout_engine().set(h_pad=0.08)
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid:
        axes.set_axis_off()
    for axes, (title, picture) in zip(grid, panels.items(), strict=False):
        axes.imshow(picture)
        axes.set_title(title, fontsize=13)
    ticks = np.geomspace(scale.norm.vmin, scale.norm.vmax, 5)
    beside = grid[len(panels) - 1].inset_axes((1.015, 0.04, 0.02, 0.92))
    bar = figure.colorbar(scale, cax=beside, ticks=ticks)
    bar.ax.set_yticklabels([f'{tick:.2f}' for tick in ticks])
    bar.ax.minorticks_off()
    figure.legend(
        [tuple(Patch(color=colour / 255) for colour in shades[c]) for c in present],
        [plain(classes[c]) for c in present],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        handlelength=4,
        ncols=6,
        loc='outside lower center',
        frameon=False,
        fontsize=12,
    )
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _weight_scale(weights: np.ndarray, state: SubclassTable | None) -> ScalarMappable:
    """Colours of weights, with 1 in the middle and a limit as far above it as below.

    The limit is that of all subclasses, so that images can be compared; without subclasses, of most pixels.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    percentile = 99.5
    if state is not None:
        weights, percentile = state.weight[np.isfinite(state.weight)], 100
    logs = np.abs(np.log(np.maximum(weights, TINY)))
    limit = max(1.2, np.exp(np.percentile(logs, percentile)) if len(logs) else 1)
    return ScalarMappable(LogNorm(1 / limit, limit, clip=True), colormaps['RdBu_r'])


def _painted(colours: np.ndarray, index: object, counted: np.ndarray) -> np.ndarray:
    return np.where(counted[..., None], np.asarray(colours, np.uint8)[index], np.uint8(IGNORED))


def plot_class_balance(
    classes: Sequence[str], reports: Mapping[str, Sequence[Any]], path: str | os.PathLike[str]
) -> np.ndarray:
    """Shares of pixels, loss and gradient by class, and recall over the iterations; rarest class last.

    Args:
        classes: at least as many names as there are classes.
        reports: by the name of the loss, which has a row of the picture, at least one
            :class:`~mmseg_imbalance.class_balance.ClassBalance`, in the order of time.
        path: of the PNG.

    Returns:
        The picture, (h, w, 3) uint8 RGB.
    """
    with fonts_for([*classes, *reports]):
        figure = _balance_figure(classes, reports)
        figure.canvas.draw()
        save_figure(figure, path, dpi=110)
        return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def _balance_figure(classes: Sequence[str], reports: Mapping[str, Sequence[Any]]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [1.3 + 0.27 * len(history[0].recall) for history in reports.values()]
    figure = Figure((13, sum(heights)), dpi=110, layout='constrained')
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.1, wspace=0.03)
    grid = figure.subplots(len(heights), 2, squeeze=False, width_ratios=[1, 1.1], height_ratios=heights)
    for (shares, recall), (name, history) in zip(grid, reports.items(), strict=True):
        order = np.argsort(-present_mean(np.array([report.pixel_share for report in history])), kind='stable')
        _draw_shares(shares, [plain(classes[c]) for c in order], history, order)
        shares.set_title(plain(name), loc='left', fontweight='bold')
        shown = _draw_recall(recall, history, order)
        figure.colorbar(shown, ax=recall, location='right', pad=0.02, aspect=30)
    return figure


def _draw_shares(axes: Axes, names: list[str], history: Sequence[Any], order: np.ndarray) -> None:
    """A row per class: its shares of the pixels, of the loss and of the gradient in the last reports."""
    from matplotlib.ticker import LogLocator, NullLocator

    latest = history[-10:]
    rows = np.arange(len(order))
    colours = dict(pixel_share='#4878a8', loss_share='#d1783c', gradient_share='#4f9a5b')
    every = np.array(
        [100 * present_mean(np.array([getattr(r, kind) for r in latest]))[order] for kind in colours]
    )
    every[every <= 0] = np.nan  # no logarithm
    known = np.isfinite(every).any(0)
    axes.hlines(rows[known], *(f(every[:, known], 0) for f in (np.nanmin, np.nanmax)), color='0.8')
    for (kind, colour), marker, values in zip(colours.items(), 'o^s', every, strict=True):
        axes.plot(values, rows, marker, color=colour, markersize=6, label=kind.replace('_', ' '))
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter('{x:g}')
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(rows, names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f'share (%), mean of the last {len(latest)} reports')
    axes.grid(axis='x', color='0.92')
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(loc='lower right', bbox_to_anchor=(1, 1), ncols=3, frameon=False, handletextpad=0.1)


def _draw_recall(axes: Axes, history: Sequence[Any], order: np.ndarray) -> ScalarMappable:
    """A row per class: its recall from report to report, beside it the last one."""
    values = np.array([report.recall for report in history]).T[order]  # (C, reports)
    number = len(values)
    shown = axes.pcolormesh(
        _edges([report.iteration for report in history]),
        np.arange(number + 1) - 0.5,
        values,
        vmin=0,
        vmax=1,
        cmap='YlGnBu',
    )
    axes.set_facecolor('0.8')  # no pixels of the class
    last = [row[np.isfinite(row)][-1:] for row in values]
    axes.set_yticks(np.arange(number), [f'{x[0]:.2f}' if len(x) else '' for x in last])
    axes.yaxis.tick_right()
    axes.tick_params(right=False)
    axes.set_ylim(number - 0.5, -0.5)
    axes.set_xlabel('iteration')
    axes.set_title('recall on the training batches, beside it the last', loc='left', fontsize=10)
    return shown


def _edges(iterations: Sequence[int]) -> np.ndarray:
    """Where the span of each report begins and ends; the first is as long as the second."""
    first = iterations[1] - iterations[0] if len(iterations) > 1 else iterations[0]
    return np.array([iterations[0] - first, *iterations])
