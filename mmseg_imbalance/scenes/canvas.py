"""A picture and its labels, drawn through one camera."""

from __future__ import annotations

import itertools

import numpy as np
from PIL import Image, ImageDraw

from mmseg_imbalance.scenes.classes import IGNORED

RUBBER = (26, 26, 28)
METAL = (104, 106, 106)


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
