"""Vehicles and people."""

from __future__ import annotations

import numpy as np

from mmseg_imbalance.scenes.canvas import METAL, RUBBER, Canvas
from mmseg_imbalance.scenes.classes import BUS, CAR, MOTORCYCLE, PERSON, RIDER, TRAIN, TRUCK

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
SHADE = (34, 34, 36)
HAIR = ((40, 30, 24), (110, 84, 50), (150, 150, 146))
HELMETS = ((30, 30, 34), (200, 200, 204), (180, 40, 40))


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
