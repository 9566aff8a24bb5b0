"""A whole street scene: what is in it and where, light and noise."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from mmseg_imbalance.scenes.canvas import Canvas
from mmseg_imbalance.scenes.classes import (
    BICYCLE,
    BUILDING,
    BUS,
    FENCE,
    IGNORED,
    LIGHT,
    MOTORCYCLE,
    PERSON,
    POLE,
    RIDER,
    ROAD,
    SIDEWALK,
    SIGN,
    SKY,
    SPLITS,
    TERRAIN,
    TRAIN,
    TRUCK,
    VEGETATION,
    WALL,
    planned_classes,
)
from mmseg_imbalance.scenes.roadside import BUILDING_COLOURS, draw_bin, draw_frontage, draw_pole, draw_tree
from mmseg_imbalance.scenes.traffic import (
    draw_car,
    draw_crossing_car,
    draw_long_vehicle,
    draw_person,
    draw_two_wheeler,
)

# Amplitude of the grain (per pixel) and of the blotches (coarser) that texture each class.
GRAIN = np.full(256, 0.03, np.float32)
BLOTCH = np.full(256, 0.05, np.float32)
GRAIN[[ROAD, SIDEWALK, WALL, VEGETATION, TERRAIN]] = 0.06, 0.05, 0.08, 0.16, 0.10
BLOTCH[[ROAD, BUILDING, VEGETATION, TERRAIN, SKY]] = 0.05, 0.07, 0.22, 0.12, 0.04


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
