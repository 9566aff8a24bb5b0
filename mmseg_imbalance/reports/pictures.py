"""Images, truth and predictions side by side, errors marked: a part of the page of a comparison."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Iterator, Sequence
from html import escape
from io import BytesIO
from pathlib import Path

import cv2
import mmcv
import numpy as np
from PIL import Image

from mmseg_imbalance.components import components
from mmseg_imbalance.predictions import NO_CLASS, Prediction, load_prediction
from mmseg_imbalance.reports.comparison import Comparison
from mmseg_imbalance.reports.examples import Example, Shown, examples, risen_and_fallen, shown_runs
from mmseg_imbalance.scores import present_mean

SIDE = 440  # pixels of a picture at most
WRONG, WORSE, MENDED = (240, 176, 60), (190, 20, 60), (20, 100, 180)  # told apart by the colour-blind too
UNLABELLED = (45, 45, 45)
ROOM = 0.3  # around an object, of its size
SMALLEST = 40  # pixels of the image that a zoomed picture shows
LISTED = 4  # classes of an image whose IoU is told
NAMED = 12  # whose colour is
STYLE = """
.example { display: grid; gap: .5rem; align-items: end; }
.example figcaption { font-size: .82rem; overflow-wrap: anywhere; }
.example img { border-radius: 3px; max-height: 19rem; object-fit: contain; object-position: left; }
.about { grid-column: 1 / 3; align-self: start; font-size: .88rem; }
.about p { margin: .3rem 0; }
.values { display: grid; column-gap: .5rem; margin: .3rem 0 1.8rem; font-size: .82rem; }
.values .name { grid-column: 1 / 3; text-align: right; }
.values .key { margin: 0; }
.swatch { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin: 0 .3rem -.08rem 0; }
.key { display: inline-block; margin-right: .8rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
"""


def pictures(comparison: Comparison) -> list[str]:
    """The lines of HTML: examples of the predictions that the tests have saved, or how to get them."""
    shown, missing = shown_runs(comparison)
    lines = ['<h2>Predictions</h2>', *(f'<p>{escape(line)}</p>' for line in missing)]
    if not shown:
        return lines
    rarest = list(reversed(comparison.parts.get('tail') or comparison.classes))
    lines += _introduction(shown)
    title = ''
    for example in examples(shown, rarest):
        if example.title != title:
            title = example.title
            lines.append(f'<h3>{escape(title)}</h3>')
        try:
            saved = _load(example.image, shown)
        except (ValueError, FileNotFoundError) as error:
            lines.append(f'<p>{escape(f"{example.image} is not shown: {error}")}</p>')
        else:
            lines += _example(example, shown, saved)
    return lines


def _introduction(shown: list[Shown]) -> Iterator[str]:
    runs = [each.label + ('' if each.seed is None else f', seed {each.seed}') for each in shown]
    if len(shown) > 1:
        rose, fell = risen_and_fallen(shown)
        over = ', as a mean over the other configs,' if len(shown) > 2 else ''
        yield (
            f'<p>Against {escape(shown[0].label)}, the mean IoU of an image{over} rose in {rose} and fell in '
            f'{fell} of {len(shown[0].scores["images"])} images.</p>'
        )
    yield (
        '<p>Extremes, chosen by their numbers; that in the middle is the usual. One run of each config, the '
        f'first whose predictions were saved: {escape("; ".join(runs))}. Below each prediction its errors:'
        '</p><p>'
    )
    yield _key(WRONG, 'wrong')
    if len(shown) > 1:
        base = escape(shown[0].label)
        yield _key(WORSE, f'wrong, and right with {base}') + _key(MENDED, f'right, and wrong with {base}')
    yield _key(UNLABELLED, 'no label') + '</p>'


def _key(colour: Sequence[int], text: str) -> str:
    style = f'background: rgb({", ".join(map(str, colour))})'
    return f'<span class="key"><span class="swatch" style="{style}"></span>{text}</span>'


def _load(image: str, shown: list[Shown]) -> list[Prediction]:
    """What each run has predicted, of one and the same truth."""
    saved = [load_prediction(each.folder, image) for each in shown]
    for each, other in zip(shown, saved, strict=True):
        if not np.array_equal(saved[0].truth, other.truth):
            raise ValueError(f'the truth of {each.label} is another than that of {shown[0].label}')
    return saved


def _example(example: Example, shown: list[Shown], saved: list[Prediction]) -> Iterator[str]:
    first = saved[0]
    photo = _photo(first.image, first.truth.shape)
    box = slice(None), slice(None)
    if example.rare is not None:
        box = zoom(first.truth, [each.prediction for each in saved], example.rare)
    truth, maps = first.truth[box], [each.prediction[box] for each in saved]
    seen = np.full((*truth.shape, 3), 200, np.uint8) if photo is None else photo[box]
    outline = None if example.rare is None else truth == example.rare

    yield f'<div class="example" style="{_columns(shown)}">'
    yield _figure('image' if photo is not None else 'image: not found', seen, None)
    yield _figure('truth', paint_classes(seen, truth, first.palette), outline)
    for each, labels in zip(shown, maps, strict=True):
        yield _figure(each.label, paint_classes(seen, labels, first.palette), outline)
    yield '<div class="about">'
    yield from _about(example, shown, truth, maps, first, photo is None)
    yield '</div>'
    for labels in maps:
        errors = paint_errors(seen, truth, labels, None if labels is maps[0] else maps[0])
        yield _figure('errors', errors, outline)
    yield '</div>'
    yield from _values(example, shown, first.palette)


def _about(
    example: Example,
    shown: list[Shown],
    truth: np.ndarray,
    maps: list[np.ndarray],
    first: Prediction,
    lost: bool,
) -> Iterator[str]:
    names, colours = shown[0].scores['classes'].tolist(), first.palette.tolist()
    yield f'<p>{escape(example.image)}</p>'
    if lost:
        yield f'<p>{escape(f"The image is not at {first.image} or cannot be read.")}</p>'
    held, pixels = np.unique(np.stack([truth, *maps]), return_counts=True)
    seen = [c for c in held[np.argsort(-pixels, kind='stable')].tolist() if 0 <= c < len(names)]
    yield '<p>' + ''.join(_key(colours[c], escape(names[c])) for c in seen[:NAMED])
    yield f'and {len(seen) - NAMED} more</p>' if len(seen) > NAMED else '</p>'


def _values(example: Example, shown: list[Shown], palette: np.ndarray) -> Iterator[str]:
    """Rows of numbers below the pictures of each config."""
    names = shown[0].scores['classes'].tolist()
    yield f'<div class="values" style="{_columns(shown)}">'
    yield _row('IoU in this image, %: mean', present_mean(example.iou.T))
    for c in _changed_most(example):
        yield _row(_key(palette[c].tolist(), escape(names[c])), example.iou[:, c])
    yield '</div>'


def _changed_most(example: Example) -> list[int]:
    """Classes in an image: the rare one, then those whose IoU differs most among the configs."""
    spread = np.ptp(example.iou, axis=0)  # NaN is sorted last
    order = [c for c in np.argsort(-spread, kind='stable').tolist() if np.isfinite(spread[c])]
    rare = [] if example.rare is None else [example.rare]
    return [*rare, *(c for c in order if c not in rare)][:LISTED]


def _row(name: str, values: np.ndarray) -> str:
    cells = ('-' if math.isnan(value) else f'{100 * value:.1f}' for value in values.tolist())
    return f'<div class="name">{name}</div>{"".join(f"<div>{cell}</div>" for cell in cells)}'


def _columns(shown: list[Shown]) -> str:
    return f'grid-template-columns: repeat({len(shown) + 2}, minmax(0, 1fr))'


def _photo(path: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """(H, W, 3) uint8 RGB in the size of the labels; None: it is not there, or no image."""
    try:
        image = mmcv.imfrombytes(Path(path).read_bytes())
    except (OSError, cv2.error):
        return None
    if image is None:
        return None
    if image.shape[:2] != shape:
        image = mmcv.imresize(image, shape[::-1], interpolation='area')
    return np.ascontiguousarray(image[..., ::-1])


def zoom(truth: np.ndarray, maps: Sequence[np.ndarray], rare: int) -> tuple[slice, slice]:
    """The square around an object of a class, with room, within the image.

    Of the objects in the truth, 8-connected pieces, it is the one of which most pixels are predicted rightly
    by some and wrongly by others, else the largest. Where the truth has none, it is the largest that is
    predicted.

    Args:
        truth: (H, W).
        maps: predictions, (H, W) each.
        rare: the class.
    """
    right = np.stack([labels == truth for labels in maps])
    changed = right.any(0) & ~right.all(0)
    for here in (truth, *sorted(maps, key=lambda labels: -np.count_nonzero(labels == rare))):
        mask = here == rare
        if mask.any():
            break
    else:
        return slice(0, truth.shape[0]), slice(0, truth.shape[1])
    ids, areas, values = components(mask.astype(np.uint8))
    rated = np.bincount(ids[changed & mask], minlength=len(areas)) + areas / (truth.size + 1)
    ys, xs = np.nonzero(ids == np.where(values == 1, rated, -1).argmax())
    side = max(SMALLEST, round((1 + 2 * ROOM) * (1 + max(np.ptp(ys), np.ptp(xs)))))

    def span(places: np.ndarray, length: int) -> slice:
        size = min(side, length)
        start = (int(places.min()) + int(places.max()) + 1 - size) // 2
        start = min(max(start, 0), length - size)
        return slice(start, start + size)

    return span(ys, truth.shape[0]), span(xs, truth.shape[1])


def paint_classes(image: np.ndarray, labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: the colours of the classes over the greyed image; no label is nearly black."""
    colours = np.concatenate([palette, [UNLABELLED]]).astype(float)
    known = (labels >= 0) & (labels < len(palette))
    mixed = 0.72 * colours[np.where(known, labels, len(palette))] + 0.28 * _grey(image)
    return np.where(known[..., None], mixed, UNLABELLED).astype(np.uint8)


def paint_errors(
    image: np.ndarray, truth: np.ndarray, labels: np.ndarray, baseline: np.ndarray | None
) -> np.ndarray:
    """(H, W, 3) uint8: the pale grey image with wrong pixels marked, and how they differ from the baseline's.

    Args:
        image: (H, W, 3) uint8.
        truth: (H, W), NO_CLASS where nothing is wrong or right.
        labels: (H, W), the prediction.
        baseline: (H, W), that of the baseline; None: this is it.
    """
    painted = np.repeat(0.35 * _grey(image) + 0.65 * 255, 3, 2)
    wrong = (labels != truth) & (truth != NO_CLASS)
    painted[wrong] = WRONG
    if baseline is not None:
        before = (baseline != truth) & (truth != NO_CLASS)
        painted[wrong & ~before] = WORSE
        painted[before & ~wrong] = MENDED
    painted[truth == NO_CLASS] = 0.8 * painted[truth == NO_CLASS]
    return painted.astype(np.uint8)


def _grey(image: np.ndarray) -> np.ndarray:
    """(H, W, 1) brightness."""
    return image.astype(float) @ np.array([[0.299], [0.587], [0.114]])


def _figure(caption: str, picture: np.ndarray, outline: np.ndarray | None) -> str:
    factor = max(1, SIDE // max(picture.shape[:2]))  # whole pixels stay squares
    picture = picture.repeat(factor, 0).repeat(factor, 1)
    if outline is not None:
        picture = _outlined(picture, outline.repeat(factor, 0).repeat(factor, 1))
    drawn = Image.fromarray(picture)
    drawn.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    file = BytesIO()
    drawn.save(file, 'JPEG', quality=90, subsampling=0)
    tag = picture_tag(file.getvalue(), caption, 'jpeg')
    return f'<figure><figcaption>{escape(caption)}</figcaption>{tag}</figure>'


def picture_tag(content: bytes, text: str, kind: str) -> str:
    """A picture in HTML with its file, of this kind, inside."""
    return f'<img alt="{escape(text)}" src="data:image/{kind};base64,{b64encode(content).decode()}">'


def _outlined(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A line around what the mask holds, black and white: it shows on any colour."""
    picture, done = picture.copy(), mask.astype(np.uint8)
    thickness = max(1, round(max(picture.shape[:2]) / SIDE))
    for colour in (0, 255):
        grown = cv2.dilate(done, np.ones((3, 3), np.uint8), iterations=thickness)
        picture[(grown > 0) & (done == 0)] = colour
        done = grown
    return picture
