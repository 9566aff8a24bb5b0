"""Connected components of label maps, and the removal of small ones from predictions."""

from __future__ import annotations

import cv2
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

FEW = 20  # labels
PAIRS = 1 << 18  # of neighbours, looked at a time


def components(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The 8-connected components of equal label: pixels that touch by a corner belong together.

    Args:
        labels: (H, W) integers.

    Returns:
        Of n components: (H, W) int32, the component of each pixel, from 0 to n - 1; (n,) int64, the pixels of
        each; (n,), the label of each.
    """
    # a run is what a row holds of one label side by side: few in a label map, as many as pixels in noise
    starts = np.ones(labels.shape, bool)
    np.not_equal(labels[:, 1:], labels[:, :-1], out=starts[:, 1:])
    if 4 * np.count_nonzero(starts) > labels.size and int(labels.max()) - int(labels.min()) < FEW:
        return _by_label(labels)
    run = np.cumsum(starts, dtype=np.int32).reshape(labels.shape) - np.int32(1)  # of each pixel
    first = np.flatnonzero(starts)  # the pixel at which each run starts
    # Two rows' runs touch where one starts below the other, or beside its end, diagonally.
    upper, lower = (slice(None, -1), slice(None)), (slice(1, None), slice(None))
    upper_left, lower_left = (slice(None, -1), slice(None, -1)), (slice(1, None), slice(None, -1))
    upper_right, lower_right = (slice(None, -1), slice(1, None)), (slice(1, None), slice(1, None))
    touches = (
        (lower, upper, starts[lower]),
        (lower_right, upper_left, starts[lower_right] & starts[upper_right]),
        (lower_left, upper_right, starts[upper_right]),
    )
    pairs = []
    for here, there, may in touches:
        same = (labels[here] == labels[there]) & may
        pairs.append((run[here][same], run[there][same]))
    one, other = (np.concatenate(runs) for runs in zip(*pairs, strict=True))
    graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(len(first), len(first)))
    number, component = connected_components(graph, connection='weak')
    areas = np.bincount(component, np.diff(first, append=labels.size), number).astype(np.int64)
    values = np.empty(number, labels.dtype)
    values[component] = labels.ravel()[first]
    return component.astype(np.int32, copy=False)[run], areas, values


def _by_label(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """:func:`components` of one label after the other: faster than runs in noise of few labels."""
    ids = np.empty(labels.shape, np.int32)
    values = []
    start = 0
    for value in np.unique(labels):
        mask = labels == value
        count, found = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
        found += start - 1  # 0 is what is outside of the mask
        np.copyto(ids, found, where=mask)
        values.append(np.full(count - 1, value))
        start += count - 1
    # OpenCV's own areas come with centroids, which take four times as long as the labelling
    return ids, np.bincount(ids.ravel(), minlength=start), np.concatenate(values)


def remove_small(labels: np.ndarray, area: int) -> np.ndarray:
    """Give components of fewer than ``area`` pixels to the class that surrounds them.

    The surroundings are the pixels that touch the component by a side or a corner. Their most frequent class
    wins, with a tie the class of the lower number. Small components take turns: fewer pixels first, with a
    tie the one that the image shows first, row by row. A component beside one that has just changed waits for
    the next pass over the map: two neighbours would otherwise swap their classes. Passes go on until no
    component is small or one fills the image. Components of ``area`` pixels or more keep all their pixels.

    Args:
        labels: (H, W) integers, left unchanged.
        area: in pixels; 1 and less change nothing.

    Returns:
        (H, W), a new map in the dtype of ``labels``.

    Raises:
        ValueError: if labels are of another kind.
    """
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f'labels must be (H, W) integers, one map, got {labels.dtype} of {labels.shape}')
    labels = labels.copy()
    while area > 1 and _remove_once(labels, area):
        pass
    return labels


def _remove_once(labels: np.ndarray, area: int) -> bool:
    """One pass of :func:`remove_small`, in place; returns whether a component waits for the next."""
    ids, areas, values = components(labels)
    framed = np.pad(ids, 1, constant_values=-1)
    small = np.append(areas < area, False)  # its last entry is what the frame's -1 looks up
    pixels = np.flatnonzero(small[framed])
    if len(areas) < 2 or not len(pixels):
        return False
    found, first = np.unique(framed.flat[pixels], return_index=True)
    rank = np.empty(len(areas), np.int64)
    rank[found[np.lexsort((first, areas[found]))]] = np.arange(len(found))

    component, neighbour = _rings(framed, pixels)
    # pairs of small neighbours, by the one whose turn is later: when it comes, all earlier turns are settled
    both = small[neighbour]
    turn, other = rank[component[both]], rank[neighbour[both]]
    pairs = np.unique((turn * len(found) + other)[turn > other])
    absorbed = bytearray(b'\1') * len(found)
    for start in range(0, len(pairs), PAIRS):  # lists of all pairs would take ten times the memory
        later, earlier = np.divmod(pairs[start : start + PAIRS], len(found))
        for one, before in zip(later.tolist(), earlier.tolist(), strict=True):
            if absorbed[before]:
                absorbed[one] = 0
    absorbed = np.frombuffer(absorbed, bool)[rank[found]]

    values[found[absorbed]] = _most_frequent(component, values[neighbour])[absorbed]
    labels[:] = values[ids]
    return not absorbed.all()


def _rings(framed: np.ndarray, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(component, the component of the pixel) of each pixel around each small component.

    ``pixels`` are those of all small components.
    """
    own = framed.flat[pixels].astype(np.int64)
    width = framed.shape[1]
    pairs = []
    for shift in (-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1):
        beside = pixels + shift
        other = framed.flat[beside]
        ring = (other != own) & (other >= 0)
        pairs.append(own[ring] * framed.size + beside[ring])
    pairs = np.sort(np.concatenate(pairs))
    component, pixel = np.divmod(pairs[np.diff(pairs, prepend=-1) > 0], framed.size)  # each pixel once
    return component, framed.flat[pixel]


def _most_frequent(component: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The most frequent value of each component that occurs, in their order; with a tie the lower value."""
    classes, values = np.unique(values, return_inverse=True)
    pairs, counts = np.unique(component * len(classes) + values, return_counts=True)
    component, values = np.divmod(pairs, len(classes))
    order = np.lexsort((values, -counts, component))
    _, first = np.unique(component[order], return_index=True)
    return classes[values[order[first]]]
