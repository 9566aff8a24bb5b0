"""Generate street scenes in the Cityscapes layout: 19 classes, long-tailed, objects near and far.

    python tools/make_longtail_cityscapes.py data/longtail_cityscapes

writes OUT/leftImg8bit/SPLIT/CITY/*_leftImg8bit.png (RGB) and
OUT/gtFine/SPLIT/CITY/*_gtFine_labelTrainIds.png (uint8: 0..18, 255 ignored), which MMSegmentation's
CityscapesDataset reads. The same seed gives the same pixels, whatever the number of workers.
From 40 images on, a split holds every class. A call that was interrupted is completed by the next.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from rich.progress import track

RECIPE = 'longtail_cityscapes.json'
VERSION = 1  # to be raised when the same recipe gives other pixels
SPLITS = ('train', 'val')
# Invented: real city names would make these pictures pass for Cityscapes itself.
CITIES = {'train': ('longtailingen', 'kleinklassen', 'seltenau'), 'val': ('pruefstadt',)}

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

# Amplitude of the grain (per pixel) and of the blotches (coarser) that texture each class.
GRAIN = np.full(256, 0.03, np.float32)
BLOTCH = np.full(256, 0.05, np.float32)
GRAIN[[ROAD, SIDEWALK, WALL, VEGETATION, TERRAIN]] = 0.06, 0.05, 0.08, 0.16, 0.10
BLOTCH[[ROAD, BUILDING, VEGETATION, TERRAIN, SKY]] = 0.05, 0.07, 0.22, 0.12, 0.04

BUILDING_COLOURS = (
    (168, 150, 128), (140, 128, 120), (150, 104, 84), (182, 174, 160), (120, 122, 128),
    (170, 140, 100),
)  # fmt: skip
CAR_COLOURS = (
    (32, 34, 38), (70, 74, 80), (150, 153, 156), (205, 206, 204), (120, 26, 28), (30, 50, 96),
    (58, 74, 62),
)  # fmt: skip
CLOTHES = (
    (40, 44, 60), (70, 66, 62), (150, 40, 44), (60, 84, 120), (170, 160, 140), (34, 36, 34),
    (90, 60, 96), (190, 150, 60),
)  # fmt: skip
SKIN = (190, 148, 120)
GLASS = (44, 54, 64)
RUBBER = (26, 26, 28)
METAL = (104, 106, 106)
SHADE = (34, 34, 36)
HAIR = ((40, 30, 24), (110, 84, 50), (150, 150, 146))
HELMETS = ((30, 30, 34), (200, 200, 204), (180, 40, 40))


def planned_classes(seed: int, split: str, index: int) -> set[int]:
    """Train ids of the rarer classes that image `index` of a split must show."""
    start = np.random.default_rng((seed, SPLITS.index(split))).random(len(RATES))
    return {
        label
        for (label, (rate, step)), first in zip(RATES.items(), start, strict=True)
        if (first + index * step) % 1 < rate
    }


class Canvas:
    """A picture and its labels, drawn together through one pinhole camera, far to near.

    Points are (x, y, z) in metres: right of the camera, above the ground, ahead. `label` None
    paints the picture only, `colour` None the labels only.
    """

    def __init__(self, rng: np.random.Generator, width: int, height: int) -> None:
        self.rng, self.width, self.height = rng, width, height
        self.image = Image.new('RGB', (width, height))
        self.labels = Image.new('L', (width, height), IGNORED)
        self.pen, self.label_pen = ImageDraw.Draw(self.image), ImageDraw.Draw(self.labels)
        self.focal = width * rng.uniform(1.02, 1.18)
        self.eye = rng.uniform(1.2, 1.4)
        self.centre = width * rng.uniform(0.4, 0.6), height * rng.uniform(0.40, 0.46)
        self.haze = self.vary((196, 202, 208), 12)
        self.visibility = rng.uniform(120, 500)  # metres

    def vary(self, colour, spread=14):
        """A shade of a colour: brighter or darker as a whole, and a little off in each channel."""
        shade = np.array(colour) * self.rng.normal(1, spread / 90)
        return tuple(int(v) for v in np.clip(shade + self.rng.normal(0, spread / 3, 3), 4, 250))

    def pick(self, colours, spread=14):
        return self.vary(colours[self.rng.integers(len(colours))], spread)

    def dim(self, colour, factor):
        return tuple(min(int(v * factor), 255) for v in colour)

    def at(self, x, y, z):
        """Pixel coordinates of a point."""
        scale = self.focal / max(z, 0.5)
        return self.centre[0] + x * scale, self.centre[1] + (self.eye - y) * scale

    def hazy(self, colour, z):
        veil = 1 - np.exp(-max(z, 0) / self.visibility)
        return tuple(int(c + (h - c) * veil) for c, h in zip(colour, self.haze, strict=True))

    def shape(self, label, colour, points):
        """A filled polygon through 3D points."""
        flat = [self.at(*point) for point in points]
        if colour is not None:
            self.pen.polygon(flat, self.hazy(colour, min(point[2] for point in points)))
        if label is not None:
            self.label_pen.polygon(flat, label)

    def ground(self, label, colour, x0, x1, z0, z1):
        self.shape(label, colour, [(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)])

    def flat(self, label, colour, z, *points):
        """A polygon that faces the camera, through (x, y)."""
        self.shape(label, colour, [(x, y, z) for x, y in points])

    def front(self, label, colour, x0, x1, y0, y1, z):
        self.flat(label, colour, z, (x0, y0), (x1, y0), (x1, y1), (x0, y1))

    def flank(self, label, colour, x, y0, y1, z0, z1):
        self.shape(label, colour, [(x, y0, z0), (x, y1, z0), (x, y1, z1), (x, y0, z1)])

    def disc(self, label, colour, x, y, z, radius, squeeze=1.0):
        """A circle that faces the camera, or an ellipse narrowed to `squeeze` of its width."""
        (u, v), r = self.at(x, y, z), radius * self.focal / z
        box = (u - r * squeeze, v - r, u + r * squeeze, v + r)
        if colour is not None:
            self.pen.ellipse(box, self.hazy(colour, z))
        if label is not None:
            self.label_pen.ellipse(box, label)

    def rod(self, label, colour, start, end, thickness):
        """A straight bar, at least one pixel wide."""
        line, z = [self.at(*start), self.at(*end)], min(start[2], end[2])
        pixels = max(1, round(thickness * self.focal / z))
        if colour is not None:
            self.pen.line(line, self.hazy(colour, z), pixels)
        if label is not None:
            self.label_pen.line(line, label, pixels)

    def bars(self, label, colour, z, thickness, *points):
        """Bars from one (x, y) to the next, facing the camera."""
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            self.rod(label, colour, (x0, y0, z), (x1, y1, z), thickness)

    def box(self, label, colour, x0, x1, y0, y1, z0, z1):
        """The visible flank, top and near face of a block that stands along the street."""
        if x0 > 0 or x1 < 0:
            self.flank(label, self.dim(colour, 0.75), x0 if x0 > 0 else x1, y0, y1, z0, z1)
        if y1 < self.eye:
            points = [(x0, y1, z0), (x1, y1, z0), (x1, y1, z1), (x0, y1, z1)]
            self.shape(label, self.dim(colour, 1.2), points)
        self.front(label, colour, x0, x1, y0, y1, z0)

    def wheel(self, label, x, z, radius):
        """A wheel seen on the flank of a vehicle."""
        turn = np.linspace(0, 2 * np.pi, 12, endpoint=False)
        for r, colour in ((radius, RUBBER), (radius * 0.5, METAL)):
            points = [(x, radius + r * np.sin(t), z + r * np.cos(t)) for t in turn]
            self.shape(label, colour, points)


def draw_car(c: Canvas, x: float, z: float, oncoming: bool) -> None:
    rng, colour = c.rng, c.pick(CAR_COLOURS, 18)
    half, length, height = rng.uniform(0.82, 0.95), rng.uniform(3.7, 4.8), rng.uniform(1.38, 1.75)
    x0, x1, waist = x - half, x + half, height * 0.58
    c.ground(None, SHADE, x0 - 0.15, x1 + 0.15, z - 0.1, z + length + 0.2)
    c.box(CAR, colour, x0, x1, 0.25, waist, z, z + length)
    # The cabin: sloped at both ends, narrower at the roof; `bonnet` metres behind the near end.
    bonnet = 1.1 if oncoming else 0.1
    near, far = z + bonnet, z + length - 1.1 + bonnet * 0.9
    if x0 > 0 or x1 < 0:
        side, roof = (x0, x0 + 0.15) if x0 > 0 else (x1, x1 - 0.15)
        for label, paint, inset in ((CAR, c.dim(colour, 0.7), 0), (None, GLASS, 0.07)):
            foot0, foot1 = (side, waist, near + 4 * inset), (side, waist, far - 4 * inset)
            roof0, roof1 = near + 0.5 + 2 * inset, far - 0.3 - 2 * inset
            top = height - inset
            c.shape(label, paint, [foot0, (roof, top, roof0), (roof, top, roof1), foot1])
        for axle in (0.75, length - 0.8):
            c.wheel(CAR, side, z + axle, 0.31)
    for label, paint, inset in (
        (CAR, c.dim(colour, 1.05), 0),
        (None, c.dim(GLASS, rng.uniform(0.7, 1.6)), 0.08),
    ):
        foot, top, roof = waist + inset / 2, height - inset, inset + 0.15
        corners = [(x0 + roof, top, near + 0.5), (x1 - roof, top, near + 0.5)]
        c.shape(label, paint, [(x1 - inset, foot, near), (x0 + inset, foot, near), *corners])
    lamp = (235, 232, 215) if oncoming else (190, 24, 22)
    for left, right in ((x0 + 0.04, x0 + 0.3), (x1 - 0.3, x1 - 0.04)):
        c.front(CAR, RUBBER, left, right, 0, 0.3, z)
        c.front(None, lamp, left, right, waist - 0.22, waist - 0.06, z)
    c.front(None, (225, 225, 215), x - 0.26, x + 0.26, 0.42, 0.54, z)


def draw_crossing_car(c: Canvas, x: float, z: float) -> None:
    """A car seen from its side, crossing the street."""
    colour, length = c.pick(CAR_COLOURS, 18), c.rng.uniform(3.8, 4.7)
    body = [
        (0, 0.25), (0, 0.8), (0.22, 0.9), (0.36, 1.42), (0.76, 1.45), (0.93, 0.92), (1, 0.8),
        (1, 0.25),
    ]  # fmt: skip
    window = [(0.29, 0.93), (0.39, 1.34), (0.73, 1.36), (0.85, 0.95)]
    if c.rng.random() < 0.5:  # it drives to the right
        x, length = x + length, -length
    c.ground(None, SHADE, x, x + length, z, z + 1.9)
    c.flat(CAR, colour, z, *((x + length * u, y) for u, y in body))
    c.flat(None, GLASS, z, *((x + length * u, y) for u, y in window))
    c.bars(None, colour, z, 0.09, (x + length * 0.55, 0.9), (x + length * 0.55, 1.4))
    for u in (0.18, 0.82):
        c.disc(CAR, RUBBER, x + length * u, 0.32, z, 0.32)
        c.disc(None, METAL, x + length * u, 0.32, z, 0.17)


def draw_long_vehicle(c: Canvas, label: int, x: float, z: float) -> None:
    """A truck, bus or tram: one big box each, told apart by windows, wheels and front."""
    rng = c.rng
    if label == TRUCK:
        half, height, length = 1.2, rng.uniform(2.7, 3.8), rng.uniform(6, 10)
        colour = c.pick(((190, 190, 184), (84, 100, 128), (160, 134, 60), (110, 40, 40)), 20)
    elif label == BUS:
        half, height, length = 1.25, rng.uniform(2.9, 3.2), rng.uniform(10, 13)
        colour = c.pick(((200, 170, 50), (176, 44, 40), (190, 192, 196), (60, 120, 110)), 16)
    else:
        half, height, length = 1.25, rng.uniform(3.3, 3.7), rng.uniform(22, 32)
        colour = c.pick(((180, 60, 50), (214, 206, 180), (76, 130, 90), (60, 90, 150)), 16)
    x0, x1 = x - half, x + half
    side = x0 if x0 > 0 else x1
    c.ground(None, SHADE, x0 - 0.2, x1 + 0.2, z - 0.2, z + length)
    low = 0.75 if label == TRUCK else 0.25
    c.box(label, colour, x0, x1, low, height, z, z + length)
    if x0 > 0 or x1 < 0:
        if label == TRUCK:
            c.flank(label, (50, 50, 52), side, 0.45, 0.75, z + 0.6, z + length)
            for rib in np.arange(z + 1.5, z + length, 1.5):
                c.rod(None, c.dim(colour, 0.6), (side, low, rib), (side, height, rib), 0.05)
        else:
            c.flank(None, c.dim(colour, 0.45), side, 0.25, 0.6, z, z + length)
            pane = 1.5 if label == BUS else 2.6
            for start in np.arange(z + 0.3, z + length - pane, pane):
                c.flank(None, GLASS, side, 1.3, height - 0.5, start, start + pane - 0.2)
        if label != TRAIN:
            for axle in (1.2, length * 0.3, length - 1.4):
                c.wheel(label, side, z + axle, 0.48)
    if label == TRUCK:
        c.front(label, (44, 44, 46), x0 + 0.1, x1 - 0.1, 0.45, low, z)
        for seam in (x, x0 + 0.06, x1 - 0.06):
            c.bars(None, c.dim(colour, 0.6), z, 0.05, (seam, low), (seam, height))
        for left in (x0 + 0.05, x1 - 0.55):
            c.front(label, RUBBER, left, left + 0.5, 0, 0.5, z)
            c.front(None, (180, 24, 22), left, left + 0.3, 0.6, 0.72, z)
        return
    c.front(None, GLASS, x0 + 0.15, x1 - 0.15, 1.25, height - 0.55, z)
    c.front(None, (24, 24, 24), x0 + 0.4, x1 - 0.4, height - 0.42, height - 0.14, z)
    c.front(None, (240, 170, 50), x0 + 0.6, x1 - 0.6, height - 0.36, height - 0.2, z)
    for left in (x0 + 0.12, x1 - 0.42):
        c.front(None, (236, 230, 210), left, left + 0.3, 0.6, 0.78, z)
        if label == BUS:
            c.front(label, RUBBER, left, left + 0.3, 0, 0.3, z)
    if label == TRAIN:
        c.front(label, (40, 40, 42), x0 + 0.3, x1 - 0.3, 0.05, 0.3, z)
        for rail in (x - 0.72, x + 0.72):
            c.ground(None, (70, 68, 70), rail - 0.05, rail + 0.05, 4, z)
        c.rod(None, (50, 50, 52), (x, height, z + 4), (x, height + 1.3, z + 5), 0.08)


def draw_person(c: Canvas, x: float, z: float) -> None:
    rng = c.rng
    height = rng.uniform(1.5, 1.9) if rng.random() < 0.85 else rng.uniform(1, 1.4)
    coat, trousers = c.pick(CLOTHES, 20), c.pick(CLOTHES[:4], 16)
    hip, shoulder, stride = height * 0.5, height * 0.82, rng.uniform(0.03, 0.3)
    c.ground(None, SHADE, x - 0.3, x + 0.3, z - 0.1, z + 0.2)
    c.bars(PERSON, trousers, z, 0.17, (x - stride, 0.03), (x, hip), (x + stride, 0.03))
    torso = [(x - 0.17, hip - 0.06), (x + 0.17, hip - 0.06), (x + 0.24, shoulder), (x - 0.24, shoulder)]
    c.flat(PERSON, coat, z, *torso)
    for arm in (-1, 1):
        hand = x + arm * rng.uniform(0.2, 0.4), hip + rng.uniform(-0.1, 0.15)
        c.bars(PERSON, c.dim(coat, 0.85), z, 0.11, (x + arm * 0.22, shoulder - 0.03), hand)
    c.disc(PERSON, c.vary(SKIN), x, height * 0.92, z, height * 0.075, 0.85)
    c.disc(None, c.pick(HAIR), x, height * 0.96, z, height * 0.055)


def draw_two_wheeler(c: Canvas, label: int, x: float, z: float, ridden: bool) -> None:
    """A bicycle or motorcycle at any angle to the camera, with or without its rider."""
    rng, motor = c.rng, label == MOTORCYCLE
    # How much of its length is seen, and to which side it heads.
    along = rng.choice([-1, 1]) * max(abs(np.cos(rng.uniform(0, np.pi))), 0.2)
    radius, base = (0.31, 0.68) if motor else (0.34, 0.54)
    squeeze = max(abs(along), 0.3 if motor else 0.22)
    back, front, bar = x - base * along, x + base * along, x + 0.38 * along
    c.ground(None, SHADE, back - 0.1, front + 0.1, z - 0.05, z + 0.15)
    for hub in (back, front):
        if motor:
            c.disc(label, RUBBER, hub, radius, z, radius, squeeze)
            c.disc(None, METAL, hub, radius, z, radius * 0.5, squeeze)
        else:  # labelled as a disc, as in Cityscapes; painted as a tyre with spokes
            c.disc(label, None, hub, radius, z, radius, squeeze)
            turn = np.linspace(0, 2 * np.pi, 13)
            rim = [(hub + radius * squeeze * np.cos(t), radius * (1 + np.sin(t))) for t in turn]
            c.bars(None, RUBBER, z, 0.07, *rim)
            for spoke in range(3):
                c.bars(None, METAL, z, 0.01, rim[2 * spoke], rim[2 * spoke + 6])
    if motor:
        paint = c.pick(((150, 24, 26), (24, 26, 30), (40, 60, 140), (200, 120, 30)), 20)
        low, seat = (x + 0.2 * along, 0.28), (x - 0.3 * along, 0.85)
        tank = (x + 0.35 * along, 0.98)
        c.flat(label, paint, z, (back, 0.55), seat, tank, (front, 0.62), low)
        c.disc(label, c.dim(paint, 0.8), x, 0.62, z, 0.3, max(abs(along) * 1.3, 0.7))
        c.bars(label, METAL, z, 0.09, (front, radius), (bar, 1.02))
        c.disc(label, (230, 226, 200), x + 0.5 * along, 0.86, z, 0.11)
    else:
        crank, saddle, grip = (x, 0.32), (x - 0.18 * along, 0.88), (bar, 0.98)
        frame = [(back, radius), saddle, crank, (back, radius), crank, grip, saddle]
        c.bars(label, c.pick(CLOTHES, 24), z, 0.06, *frame)
        c.bars(label, METAL, z, 0.06, grip, (front, radius))
        c.bars(label, RUBBER, z, 0.07, (x - 0.3 * along, 0.93), (x - 0.05 * along, 0.93))
    c.bars(label, RUBBER, z, 0.06, (bar - 0.25, 1.03), (bar + 0.25, 1.03))
    if not ridden:
        return
    coat, trousers = c.pick(CLOTHES, 20), c.pick(CLOTHES[:4], 16)
    hip, chest, head = x - 0.15 * along, x + 0.1 * along, x + 0.16 * along
    for leg in (-0.1, 0.12):
        knee = (x + (0.2 + leg) * along, 0.72)
        c.bars(RIDER, trousers, z, 0.17, (hip, 0.95), knee, (x + leg, 0.3))
    torso = [(hip - 0.19, 0.9), (hip + 0.19, 0.9), (chest + 0.24, 1.46), (chest - 0.24, 1.46)]
    c.flat(RIDER, coat, z, *torso)
    c.bars(RIDER, c.dim(coat, 0.85), z, 0.12, (chest, 1.4), (bar, 1.04))
    c.disc(RIDER, c.vary(SKIN), head, 1.62, z, 0.13, 0.9)
    c.disc(RIDER, c.pick(HELMETS if motor else HAIR), head, 1.68, z, 0.14)


def draw_tree(c: Canvas, x: float, z: float, height: float) -> None:
    rng, leaf = c.rng, c.vary((74, 96, 48), 22)
    c.bars(VEGETATION, c.vary((78, 64, 50)), z, 0.035 * height, (x, 0), (x, height * 0.6))
    spread = height * rng.uniform(0.22, 0.34)
    for _ in range(22):
        dx, dy = rng.normal(0, spread * 0.4, 2).clip(-spread, spread)
        tone = c.dim(leaf, max(1 + 0.25 * dy / spread + rng.normal(0, 0.12), 0.4))  # lit from above
        c.disc(VEGETATION, tone, x + dx, height * 0.72 + dy, z, spread * rng.uniform(0.2, 0.5))


def draw_bushes(c: Canvas, x: float, z0: float, z1: float, height: float) -> None:
    """A dense row of bushes along the street."""
    rng, leaf = c.rng, c.vary((66, 88, 44), 22)
    c.flank(VEGETATION, c.dim(leaf, 0.75), x, 0, height * 0.7, z0, z1)
    for z in np.repeat(np.linspace(z1, z0, 14), 2):
        level, off = rng.uniform(0.15, 0.85), rng.normal(0, 0.3)
        tone = c.dim(leaf, 0.7 + 0.5 * level + rng.normal(0, 0.1))
        c.disc(VEGETATION, tone, x + off, level * height, z, height * rng.uniform(0.18, 0.34))


def draw_pole(c: Canvas, kind: int, x: float, z: float) -> None:
    """A lamp post, or the post of a sign or of traffic lights."""
    rng, grey = c.rng, c.pick((METAL, (84, 86, 84), (136, 138, 138)))
    height = rng.uniform(5, 9) if kind == POLE else rng.uniform(2.6, 3.8)
    c.bars(POLE, grey, z, rng.uniform(0.13, 0.22), (x, 0), (x, height))
    if kind == POLE:
        lamp = (x - np.sign(x) * rng.uniform(0.8, 2), height + 0.2)
        c.bars(POLE, grey, z, 0.1, (x, height), lamp)
    elif kind == LIGHT:
        heads, lit = [(x, height - 0.5)], rng.integers(3)
        if rng.random() < 0.45:  # a mast that reaches over the road
            heads.append((x - np.sign(x) * rng.uniform(2, 4), 5.1))
            c.bars(POLE, grey, z, 0.16, (x, 0), (x, 5.3), (heads[1][0], 5.5))
        for u, v in heads:
            c.front(LIGHT, (28, 32, 30), u - 0.21, u + 0.21, v - 0.52, v + 0.52, z)
            for lamp, colour in enumerate(((236, 40, 30), (240, 180, 40), (40, 220, 130))):
                tone = colour if lamp == lit else (52, 50, 46)
                c.disc(None, tone, u, v + 0.32 - 0.32 * lamp, z, 0.12)
    else:
        y, r, face = height - 0.1, rng.uniform(0.3, 0.46), rng.integers(4)
        pale = (232, 232, 228)
        if face == 0:  # a prohibition
            c.disc(SIGN, (196, 28, 34), x, y, z, r)
            c.disc(None, pale, x, y, z, r * 0.65)
        elif face == 1:  # a warning
            for label, colour, q in ((SIGN, (200, 30, 34), r), (None, pale, r * 0.58)):
                c.flat(label, colour, z, (x - q, y - q * 0.8), (x + q, y - q * 0.8), (x, y + q))
        elif face == 2:  # blue: a crossing
            c.front(SIGN, (30, 74, 160), x - r, x + r, y - r, y + r, z)
            c.flat(None, pale, z, (x - r / 2, y - r / 2), (x + r / 2, y - r / 2), (x, y + r * 0.6))
        else:  # yellow: a place
            c.front(SIGN, (222, 184, 40), x - r * 1.9, x + r * 1.9, y - r * 0.8, y + r * 0.8, z)
            for row in (y - 0.3 * r, y + 0.3 * r):
                c.bars(None, (40, 38, 34), z, 0.07, (x - r * 1.4, row), (x + r * 1.4, row))


def draw_bin(c: Canvas, x: float, z: float) -> None:
    size = c.rng.uniform(0.25, 0.6)
    c.box(IGNORED, c.vary((84, 86, 80), 40), x - size, x + size, 0, size * 2.2, z, z + size)


def draw_facade(c: Canvas, x: float, z0: float, z1: float, height: float, side: int) -> None:
    """A house along the street: the flank that faces the road, its near end, and windows."""
    rng, colour = c.rng, c.pick(BUILDING_COLOURS, 20)
    lit = c.dim(colour, rng.uniform(0.75, 1.1))
    c.front(BUILDING, c.dim(colour, 0.8), x, x + side * 12, 0, height, z0)
    c.flank(BUILDING, lit, x, 0, height, z0, z1)
    c.flank(None, c.dim(lit, 0.7), x, 0, 0.7, z0, z1)
    c.flank(None, c.dim(lit, 0.6), x, height - 0.5, height, z0, z1)
    storey, pane = rng.uniform(2.8, 3.6), rng.uniform(1.8, 3.2)
    glass, wide = c.vary((70, 80, 92), 20), rng.uniform(0.4, 0.7) * pane
    for y0 in np.arange(1.0, height - storey * 0.7, storey):
        y1 = y0 + storey * 0.5
        for z in np.arange(z0 + 0.6, z1 - pane * 0.8, pane):
            window = glass if rng.random() < 0.85 else (190, 176, 130)
            c.flank(None, window, x, y0, y1, z, z + wide)
        for u in x + side * np.arange(1, 10, pane * 1.3):
            c.front(None, c.dim(glass, 0.8), u, u + side * wide, y0, y1, z0)


def draw_wall(c: Canvas, x: float, z0: float, z1: float, height: float, side: int) -> None:
    colour = c.pick(((128, 118, 106), (146, 136, 120), (118, 96, 82), (112, 112, 108)), 16)
    c.front(WALL, c.dim(colour, 0.8), x, x + side * 0.4, 0, height, z0)
    c.flank(WALL, colour, x, 0, height, z0, z1)
    for y in np.arange(0.4, height, 0.4):  # courses of stone, joints staggered
        c.rod(None, c.dim(colour, 0.72), (x, y, z0), (x, y, z1), 0.03)
    for z in np.arange(z0, min(z1, z0 + 25), 1.1):
        y = 0.4 * c.rng.integers(0, max(int(height / 0.4), 1))
        c.rod(None, c.dim(colour, 0.72), (x, y, z), (x, y + 0.4, z), 0.03)


def draw_fence(c: Canvas, x: float, z0: float, z1: float, height: float) -> None:
    """Labelled as a whole, painted as bars with what lies behind in between."""
    colour = c.pick(((60, 62, 64), (120, 96, 70), (150, 152, 152), (52, 76, 60)), 16)
    c.flank(FENCE, None, x, 0, height, z0, z1)
    for y in (0.15, height * 0.95):
        c.rod(None, colour, (x, y, z0), (x, y, z1), 0.08)
    gap = c.rng.uniform(0.3, 0.7)
    for z in np.arange(z1, z0, -gap):
        c.rod(None, colour, (x, 0, z), (x, height, z), gap * 0.3)


def draw_frontage(c: Canvas, side: int, line: float, end: float, barriers: list[int]) -> None:
    """What borders one side of the street: houses, walls, fences, bushes, gaps; far to near."""
    rng, edges = c.rng, [3.0]
    while edges[-1] < end:
        edges.append(edges[-1] + rng.uniform(7, 24))
    kinds = rng.choice([BUILDING, VEGETATION, TERRAIN], len(edges), p=[0.71, 0.23, 0.06])
    for kind, block in zip(barriers * 2, rng.permutation(4), strict=False):
        kinds[block] = kind
    tall = rng.uniform(9, 20)
    for kind, z0, z1 in reversed(list(zip(kinds, edges, edges[1:], strict=False))):
        x = side * line
        if kind == BUILDING:
            draw_facade(c, x, z0, z1, tall * rng.uniform(0.7, 1.3), side)
            continue
        back = side * (line + rng.uniform(5, 14))
        if rng.random() < 0.6:
            draw_facade(c, back, z0, z1, tall * rng.uniform(0.6, 1.2), side)
        for _ in range(rng.integers(1, 4)):
            draw_tree(c, side * (line + rng.uniform(2, 5)), rng.uniform(z0, z1), rng.uniform(5, 11))
        if kind == WALL:
            draw_wall(c, x, z0, z1, rng.uniform(1.3, 3.2), side)
        elif kind == FENCE:
            draw_fence(c, x, z0, z1, rng.uniform(1.1, 2.2))
        elif kind == VEGETATION:
            draw_bushes(c, x, z0, z1, rng.uniform(1.2, 4))


def draw_street(c: Canvas, wanted: set[int]) -> tuple[dict[int, float], dict[int, float]]:
    """Sky, ground and frontages; returns how far kerb and frontage of either side (-1, 1) are."""
    rng, horizon = c.rng, c.centre[1]
    c.label_pen.rectangle((0, 0, c.width, horizon), SKY)
    zenith, low = np.array(c.vary((120, 152, 196), 30)), np.array(c.haze) * 1.1
    fade = np.linspace(0, 1, int(horizon) + 2)[:, None, None]
    sky = np.broadcast_to(zenith * (1 - fade) + low * fade, (len(fade), c.width, 3))
    c.image.paste(Image.fromarray(np.clip(sky, 0, 255).astype(np.uint8)))

    kerbs, lines = {-1: rng.uniform(4.5, 7.5), 1: rng.uniform(2.6, 5.5)}, {}
    end = rng.uniform(55, 140)
    paving = c.pick(((134, 126, 122), (118, 116, 116), (150, 138, 130)), 12)
    meadow = c.vary((106, 116, 62), 16)
    c.ground(SIDEWALK, paving, -400, 400, 2, 2000)
    c.ground(ROAD, c.vary((92, 92, 94), 14), -kerbs[-1], kerbs[1], 2, 2000)
    for side, kerb in kerbs.items():
        walk, grass = rng.uniform(2.2, 5.5), 0.0
        if TERRAIN in wanted:
            grass = rng.uniform(0.8, 4.5)
            inner = kerb + (walk if rng.random() < 0.6 else 0)
            c.ground(TERRAIN, meadow, side * inner, side * (inner + grass), 2, end)
        lines[side] = kerb + walk + grass
        c.ground(None, c.dim(paving, 1.15), side * kerb, side * (kerb + 0.2), 2, end)
        if rng.random() < 0.4:  # a parking bay or driveway, which has no class
            z0 = rng.uniform(8, 40)
            z1, colour = z0 + rng.uniform(3, 7), c.vary(paving, 20)
            c.ground(IGNORED, colour, side * kerb, side * lines[side], z0, z1)
    middle = (kerbs[1] - kerbs[-1]) / 2
    for z in np.arange(4, 90, 6.0):
        c.ground(None, (206, 206, 200), middle - 0.07, middle + 0.07, z, z + 3)
    if rng.random() < 0.25:  # a crossing
        z = rng.uniform(8, 25)
        for x in np.arange(-kerbs[-1] + 0.5, kerbs[1] - 0.5, 1.0):
            c.ground(None, (200, 200, 196), x, x + 0.5, z, z + 3)

    for _ in range(4):
        x, height = rng.uniform(-32, 16), rng.uniform(7, 22)
        c.front(BUILDING, c.pick(BUILDING_COLOURS), x, x + rng.uniform(10, 28), 0, height, end + 30)
    for _ in range(rng.integers(2, 7)):
        draw_tree(c, rng.uniform(-16, 16), end + 10, rng.uniform(6, 13))
    barriers = {-1: [], 1: []}
    for kind in sorted(wanted & {WALL, FENCE}):
        for side in ((-1,), (1,), (-1, 1))[rng.integers(3)]:
            barriers[side].append(kind)
    for side, line in lines.items():
        draw_frontage(c, side, line, end, barriers[side])
    return kerbs, lines


def draw_things(c: Canvas, wanted: set[int], kerbs: dict[int, float], lines: dict[int, float]) -> None:
    """Everything that stands on the ground, far to near."""
    rng = c.rng
    things = []  # (distance, drawing, its arguments)

    def depth(near: float, far: float) -> float:
        return float(np.exp(rng.uniform(np.log(near), np.log(far))))

    def beside(near: float, far: float) -> tuple[float, float]:
        """A place (x, z) on one of the sidewalks, in view of the camera."""
        side = int(rng.choice([-1, 1]))
        x = rng.uniform(kerbs[side] + 0.3, lines[side] - 0.3)
        return side * x, depth(max(near, x / 0.42), far)

    for _ in range(rng.poisson(3.5)):
        x, z = beside(9, 90)
        things.append((z, draw_tree, (x, z, rng.uniform(5, 11))))
    kinds = [POLE, *sorted(wanted & {LIGHT, SIGN})]
    for kind in (*kinds, *rng.choice(kinds, rng.poisson(4))):
        x, z = beside(8, 80)
        things.append((z, draw_pole, (kind, x, z)))
    for _ in range(rng.poisson(1.0)):
        x, z = beside(8, 50)
        things.append((z, draw_bin, (x, z)))

    for side, kerb in kerbs.items():  # parked cars
        bays = np.arange(rng.uniform(5, 20), 80, rng.uniform(5.5, 9))
        taken, x = bays[rng.random(len(bays)) < 0.34], side * (kerb - 1)
        things += [(z, draw_car, (x, z, side < 0)) for z in taken]
    # Traffic keeps to the right of the middle line, oncoming traffic to the left.
    middle = (kerbs[1] - kerbs[-1]) / 2
    lanes = (middle + kerbs[1]) / 2 - 0.6, (middle - kerbs[-1]) / 2 + 0.6
    for _ in range(rng.poisson(2.2)):
        z, oncoming = depth(10, 100), int(rng.integers(2))
        things.append((z, draw_car, (lanes[oncoming] + rng.normal(0, 0.3), z, bool(oncoming))))
    if rng.random() < 0.12:
        z = depth(12, 40)
        things.append((z, draw_crossing_car, (rng.uniform(-8, 5), z)))
    for label, places in (
        (TRUCK, (1.2 - kerbs[-1], kerbs[1] - 1.2)),
        (BUS, (*lanes, kerbs[1] - 1.2)),
        (TRAIN, lanes),
    ):
        if label in wanted:
            z = depth(16, 55)
            things.append((z, draw_long_vehicle, (label, rng.choice(places), z)))

    if PERSON in wanted:
        for _ in range(rng.poisson(4) + 1):  # alone or in small groups, mostly on sidewalks
            x0, z0 = beside(7, 60)
            if rng.random() < 0.15:
                x0 = rng.uniform(-kerbs[-1], kerbs[1])
            for _ in range(rng.integers(1, 4)):
                x, z = x0 + rng.normal(0, 0.6), z0 + rng.uniform(-0.5, 0.5)
                things.append((z, draw_person, (x, z)))
    parked = sorted(wanted & {MOTORCYCLE, BICYCLE})
    for label in parked:
        for _ in range(rng.integers(1, 4 if label == BICYCLE else 2)):
            x, z = beside(7, 40)
            things.append((z, draw_two_wheeler, (label, x, z, False)))
    if RIDER in wanted:
        z, label = depth(9, 45), int(rng.choice(parked or [BICYCLE]))
        x = rng.uniform(-kerbs[-1] + 0.5, kerbs[1])
        things.append((z, draw_two_wheeler, (label, x, z, True)))

    for _, draw, arguments in sorted(things, key=lambda thing: -thing[0]):
        draw(c, *arguments)
    # The bonnet of the ego car and the rim left by rectification are ignored, as in Cityscapes.
    c.label_pen.ellipse(bonnet(c), IGNORED)
    rim = max(1, round(c.width * 0.004))
    c.label_pen.rectangle((0, 0, c.width - 1, c.height - 1), None, IGNORED, rim)


def bonnet(c: Canvas) -> tuple[float, ...]:
    """Box of the ellipse of which the top is the bonnet of the ego car."""
    return -0.2 * c.width, c.height * 0.88, 1.2 * c.width, c.height * 1.7


def finish(c: Canvas, kerbs: dict[int, float]) -> np.ndarray:
    """The picture (height, width, 3) uint8 with textures, shadows, ego car, light and noise."""
    rng, width, height = c.rng, c.width, c.height
    labels = np.asarray(c.labels)
    picture = np.array(c.image, dtype=np.float32)
    # Where each pixel of the ground lies: joints of paving and shadows follow perspective.
    row = np.arange(height)[:, None] + 0.5
    z = c.focal * c.eye / np.maximum(row - c.centre[1], 0.5)
    x = (np.arange(width)[None] + 0.5 - c.centre[0]) * z / c.focal
    joints = ((x % 0.8 < 0.08) | (z % 0.8 < 0.1)) & (labels == SIDEWALK) & (z < 25)
    picture[joints] *= 0.82
    if rng.random() < 0.5:  # the shadow of the houses on one side
        side, reach = rng.choice([-1, 1]), rng.uniform(0, 0.9)
        dark = (x * side > kerbs[int(side)] * reach + 0.6 * np.sin(z * 0.5)) & (labels <= SIDEWALK)
        picture[dark] *= rng.uniform(0.55, 0.75)

    def noise(cells: int) -> np.ndarray:
        """Normal noise of `cells` across the picture, resized to it, (H, W, 1)."""
        coarse = rng.standard_normal((max(cells // 2, 2), cells), dtype=np.float32)
        full = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(full)[:, :, None]

    picture *= 1 + GRAIN[labels][:, :, None] * noise(width) + BLOTCH[labels][:, :, None] * noise(48)
    mask = Image.new('L', (width, height))
    ImageDraw.Draw(mask).ellipse(bonnet(c), 255)
    shine = np.clip(90 - (row / height - 0.88) * 500, 30, 90)[:, :, None]
    picture = np.where(np.asarray(mask)[:, :, None] > 0, shine + noise(8) * 4, picture)

    light = rng.uniform(0.72, 1.2) * np.clip(rng.normal(1, 0.05, 3), 0.88, 1.12)
    contrast = rng.uniform(0.85, 1.15)
    picture = (picture * light - 110) * contrast + 110
    picture = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    picture = picture.filter(ImageFilter.GaussianBlur(max(0.4, width / 1400)))
    sensor = rng.normal(0, rng.uniform(1, 5), (height, width, 3))
    return np.clip(np.asarray(picture) + sensor, 0, 255).astype(np.uint8)


def make_image(seed: int, split: str, index: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Picture (height, width, 3) uint8 and train ids (height, width) uint8 of one image."""
    wanted = planned_classes(seed, split, index)
    # A street in which cars hide a planned class is drawn anew, but not for ever: pictures of a few
    # pixels may have no room for all.
    for attempt in range(100):
        rng = np.random.default_rng((seed, SPLITS.index(split), index, attempt))
        canvas = Canvas(rng, *size)
        kerbs, lines = draw_street(canvas, wanted)
        draw_things(canvas, wanted, kerbs, lines)
        labels = np.asarray(canvas.labels)
        if wanted <= set(np.unique(labels).tolist()):
            break
    return finish(canvas, kerbs), labels


def paths(out: Path, split: str, index: int) -> tuple[Path, Path]:
    """Where picture and train ids of one image lie."""
    city = CITIES[split][index % len(CITIES[split])]
    name = f'{city}_{index // len(CITIES[split]):06d}_000019'
    return (
        out / 'leftImg8bit' / split / city / f'{name}_leftImg8bit.png',
        out / 'gtFine' / split / city / f'{name}_gtFine_labelTrainIds.png',
    )


def write_image(job: tuple[Path, str, int, tuple[int, int], int]) -> None:
    """Generate one image and write both its files, each under a temporary name first."""
    out, split, index, size, seed = job
    pair = make_image(seed, split, index, size)
    for array, path in zip(pair, paths(out, split, index), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f'.{os.getpid()}.tmp')
        Image.fromarray(array).save(partial, 'PNG')
        partial.replace(path)


def claim(out: Path, recipe: dict) -> None:
    """Note the recipe in `out`; ValueError if the folder holds anything made otherwise."""
    note = out / RECIPE
    if out.exists() and not out.is_dir():
        raise ValueError(f'{out} is a file. Give a folder.')
    if note.exists():
        try:
            old = json.loads(note.read_text())
            differing = [key for key in recipe if old.get(key) != recipe[key]]
        except (ValueError, AttributeError) as error:
            raise ValueError(f'{note} cannot be read ({error}). Give another folder.') from error
        if differing:
            was, now = ({key: values.get(key) for key in differing} for values in (old, recipe))
            raise ValueError(f'{out} was made with {was}, not {now}. Give another folder.')
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f'{out} is not empty and holds no {RECIPE}. Give a new or empty folder.')
    out.mkdir(parents=True, exist_ok=True)
    partial = note.with_suffix(f'.{os.getpid()}.tmp')
    partial.write_text(json.dumps(recipe, indent=2) + '\n')
    partial.replace(note)


def generate(
    out: str | Path,
    train: int = 400,
    val: int = 100,
    size: tuple[int, int] = (512, 256),
    seed: int = 0,
    workers: int | None = None,
) -> int:
    """Write what is missing of a generated data set into `out`.

    Args:
        out: folder; new, empty, or begun earlier with the same arguments.
        train, val: number of images of each split.
        size: (width, height) in pixels, at least (64, 32).
        seed: same seed, same pixels.
        workers: processes; None takes one per core, at most 8. More than one needs this module to
            be importable by name.

    Returns:
        Number of images written; 0 if all were there.

    Raises:
        ValueError: a number is out of range; `out` is a file, or holds something else or images
            of other arguments.
    """
    out = Path(out)
    for name, value, least in (
        ('train', train, 1), ('val', val, 1), ('width', size[0], 64), ('height', size[1], 32),
        ('seed', seed, 0), ('workers', 1 if workers is None else workers, 1),
    ):  # fmt: skip
        if value < least:
            raise ValueError(f'{name} is {value}, allowed is {least} or more')
    recipe = {'version': VERSION, 'train': train, 'val': val, 'size': list(size), 'seed': seed}
    claim(out, recipe)
    jobs = [
        (out, split, index, tuple(size), seed)
        for split, count in (('train', train), ('val', val))
        for index in range(count)
        if not all(path.exists() for path in paths(out, split, index))
    ]
    workers = workers or min(os.cpu_count() or 1, 8, 1 + len(jobs) // 8)
    bar = {'description': 'street scenes', 'total': len(jobs), 'disable': not jobs}
    if workers == 1:
        for job in track(jobs, **bar):
            write_image(job)
    else:
        # Spawned: a caller that has loaded torch holds threads, which a fork may deadlock.
        spawn = multiprocessing.get_context('spawn')
        with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            for _ in track(pool.map(write_image, jobs, chunksize=4), **bar):
                pass
    return len(jobs)


def main(argv: list[str] | None = None) -> int:
    def extent(text: str) -> tuple[int, int]:
        width, _, height = text.partition('x')
        if not (width.isdecimal() and height.isdecimal()):
            raise argparse.ArgumentTypeError(f'{text!r} is not WIDTHxHEIGHT, for instance 512x256')
        return int(width), int(height)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('out', metavar='OUT', type=Path, help='folder to write')
    parser.add_argument('--train', type=int, default=400, help='images (default: 400)')
    parser.add_argument('--val', type=int, default=100, help='images (default: 100)')
    parser.add_argument(
        '--size', type=extent, default=(512, 256), metavar='WxH', help='pixels (default: 512x256)'
    )
    parser.add_argument('--seed', type=int, default=0, help='(default: 0)')
    parser.add_argument('--workers', type=int, help='processes (default: cores, at most 8)')
    options = parser.parse_args(argv)
    try:
        written = generate(**vars(options))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    width, height = options.size
    print(
        f'{options.out}: {options.train} train and {options.val} val images of {width}x{height} '
        f'(seed {options.seed}), {written} of them written now'
    )
    return 0


if __name__ == '__main__':
    sys.exit(main())
