"""What borders a street: trees, poles, houses, walls, fences."""

from __future__ import annotations

import numpy as np

from mmseg_imbalance.scenes.canvas import METAL, Canvas
from mmseg_imbalance.scenes.classes import (
    BUILDING,
    FENCE,
    IGNORED,
    LIGHT,
    POLE,
    SIGN,
    TERRAIN,
    VEGETATION,
    WALL,
)

BUILDING_COLOURS = (
    (168, 150, 128), (140, 128, 120), (150, 104, 84), (182, 174, 160), (120, 122, 128),
    (170, 140, 100),
)  # fmt: skip


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
