"""The 19 classes of Cityscapes by train id, and which of the rarer ones an image shows."""

from __future__ import annotations

import numpy as np

SPLITS = ('train', 'val')

(
    ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN, SKY, PERSON,
    RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE,
) = range(19)  # fmt: skip
IGNORED = 255

# Share of the images that must show a class, about the real one, and the step of its sequence: an
# irrational step spreads the chosen images evenly, so that even a small split holds every class.
RATES = {
    WALL: (0.33, 2**0.5),
    FENCE: (0.44, 3**0.5),
    LIGHT: (0.56, 7**0.5),
    SIGN: (0.9, 10**0.5),
    TERRAIN: (0.55, 11**0.5),
    PERSON: (0.8, 13**0.5),
    RIDER: (0.32, 14**0.5),
    TRUCK: (0.12, 6**0.5),
    BUS: (0.10, 8**0.5),
    TRAIN: (0.06, 5**0.5),
    MOTORCYCLE: (0.17, 12**0.5),
    BICYCLE: (0.5, 21**0.5),
}


def planned_classes(seed: int, split: str, index: int) -> set[int]:
    """Train ids of the rarer classes that image `index` of a split must show."""
    start = np.random.default_rng((seed, SPLITS.index(split))).random(len(RATES))
    return {
        label
        for (label, (rate, step)), first in zip(RATES.items(), start, strict=True)
        if (first + index * step) % 1 < rate
    }
