"""Which images a comparison shows, and of which runs: those that changed most, and rare classes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmseg_imbalance.predictions import FOLDER
from mmseg_imbalance.reports.comparison import Comparison
from mmseg_imbalance.scores import present_mean, ratio

MOST_CONFIGS = 4  # side by side, the baseline among them
MOST_IMAGES = 3  # for the better, and as many for the worse
MOST_CLASSES = 4


class Shown(NamedTuple):
    """The run of a config whose predictions are shown: its first that has any."""

    label: str  # of the config
    seed: int | None
    folder: Path  # of the predictions
    scores: dict  # see mmseg_imbalance.scores.load_image_scores


class Example(NamedTuple):
    """An image of the test."""

    title: str
    image: str  # its name in the scores
    rare: int | None  # the class to whose object the picture is zoomed; None: the whole image
    iou: np.ndarray  # (G, C) of each config and class in this image; NaN of classes that it does not hold


def shown_runs(comparison: Comparison) -> tuple[list[Shown], list[str]]:
    """The runs whose predictions can be shown, the baseline's first, and sentences on what is missing.

    Without predictions of the baseline there is none.
    """
    shown, lacking, others = [], [], []
    for group in comparison.groups:
        runs = (run for run in group.runs if run.scores is not None and run.session is not None)
        run = next((run for run in runs if any(run.session.glob(f'{FOLDER}/*.npz'))), None)
        if run is None:
            lacking.append(group.label)
        elif shown and not all(
            np.array_equal(run.scores[key], shown[0].scores[key]) for key in ('images', 'classes', 'label')
        ):
            others.append(group.label)
        else:
            shown.append(Shown(group.label, run.seed, run.session / FOLDER, run.scores))
    missing = []
    if lacking:
        missing.append(
            f'no pictures of predictions of {", ".join(lacking)}: test it with ImbalanceIoUMetric and '
            '--save-predictions: mmseg-imbalance test CONFIG CHECKPOINT --work-dir DIR --save-predictions'
        )
    if comparison.groups[0].label in lacking:
        return [], missing
    if others:
        missing.append(f"no pictures of {', '.join(others)}: its images or labels are not the baseline's")
    if len(shown) > MOST_CONFIGS:
        rest = ', '.join(each.label for each in shown[MOST_CONFIGS:])
        missing.append(f'pictures show {MOST_CONFIGS} configs; {rest} would not fit beside them')
    return shown[:MOST_CONFIGS], missing


def examples(shown: list[Shown], classes: list[str]) -> list[Example]:
    """The images to show.

    Whole images by the mean IoU over the classes in them, its change to the baseline as a mean over the
    others: highest, lowest, and the one in the middle. Two of a kind are not neighbours in the order of their
    names, which may be frames of a video. Of each rare class, among the images that hold it, that of the
    highest gain: change of its IoU times its pixels; and of all images that of the lowest, where one that
    does not hold it loses the pixels of false alarm. With one config alone the images of its lowest mean IoU
    and those that hold most of a rare class.

    Args:
        shown: at least one.
        classes: names of those to zoom to, the rarest first.
    """
    scores = [each.scores for each in shown]
    label = scores[0]['label']  # (N, C)
    iou, means = _iou(shown)
    images = scores[0]['images'].tolist()

    def whole(title: str, row: int) -> Example:
        return Example(title, images[row], None, iou[:, row])

    usable = np.flatnonzero(np.isfinite(means).all(0))
    if len(shown) == 1:
        worst = usable[np.argsort(means[0][usable], kind='stable')]
        found = [whole('Lowest mean IoU', row) for row in _apart(worst, len(images))]
    else:
        change = means[1:].mean(0) - means[0]
        order = usable[np.argsort(change[usable], kind='stable')]  # the worst first
        better, worse = (_apart(rows, len(images)) for rows in (order[::-1], order))
        found = [whole('Changed most for the better', row) for row in better if change[row] > 0]
        found += [whole('Changed most for the worse', row) for row in worse if change[row] < 0]
        middle = order[len(order) // 2 : len(order) // 2 + 1]
        found += [
            whole('In the middle', r) for r in middle if r not in [images.index(each.image) for each in found]
        ]
    names = scores[0]['classes'].tolist()
    held = [c for c in map(names.index, (name for name in classes if name in names)) if label[:, c].any()]
    for c in held[:MOST_CLASSES]:
        rows = {}
        if len(shown) > 1:
            alarm = np.stack([s['pred'][:, c] for s in scores])  # (G, N), false where the class is not
            better, worse = iou[1:, :, c].mean(0) - iou[0, :, c], alarm[1:].mean(0) - alarm[0]
            gain = np.where(label[:, c] > 0, better * label[:, c], -worse)
            inside = np.where(label[:, c] > 0, gain, 0)
            rows = {'most for the better': inside.argmax()} if inside.max() > 0 else {}
            rows |= {'most for the worse': gain.argmin()} if gain.min() < 0 else {}
        for what, row in (rows or {'where most of it is': label[:, c].argmax()}).items():
            found.append(Example(f'{names[c]}: {what}', images[row], c, iou[:, row]))
    return found


def risen_and_fallen(shown: list[Shown]) -> tuple[int, int]:
    """In how many images the mean IoU is above that of the baseline, as a mean over the others, and below."""
    _, means = _iou(shown)
    change = means[1:].mean(0) - means[0]
    return int((change > 0).sum()), int((change < 0).sum())


def _iou(shown: list[Shown]) -> tuple[np.ndarray, np.ndarray]:
    """(G, N, C) of the classes that an image holds, else NaN, and (G, N) means over these classes."""
    label = shown[0].scores['label']
    areas = ((each.scores['intersect'], each.scores['union']) for each in shown)
    iou = np.stack([ratio(intersect, np.where(label > 0, union, 0)) for intersect, union in areas])
    return iou, np.stack([present_mean(each.T) for each in iou])


def _apart(rows: np.ndarray, images: int) -> list[int]:
    """The first of the rows that are at least a 20th of the images apart."""
    chosen: list[int] = []
    for row in rows.tolist():
        if all(abs(row - other) >= images / 20 for other in chosen):
            chosen.append(row)
        if len(chosen) == MOST_IMAGES:
            break
    return chosen
