"""The drawing board of the scene generator: optical colours, radar backscatter and shadows drawn together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

Array = NDArray[np.floating[Any]]
Colour = tuple[float, float, float]
Ink = Sequence[float] | Array  # red, green, blue from 0 to 255; what lies outside is cut

_OVERSAMPLING = 2  # drawn at twice the size, then averaged: soft edges without an anti-aliasing rasteriser
_MIN_VISIBLE_AREA = 6.0  # px²; smaller remains of an object at the image border are not listed
_SAR_WHITE_DB = 0.5  # backscatter shown as 255
_DB_OFFSET, _DB_STEP = -40.0, 0.2  # backscatter is drawn into 8-bit images: -40 dB to 11 dB


@dataclass(frozen=True)
class SceneObject:
    """One object: `label` is "ship" or "building"; `polygon` its outline, (x, y) in pixels, cut at the image border."""

    label: str
    polygon: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Scene:
    """A scene seen by two sensors on the same pixel grid.

    Attributes:
        optical: (size, size, 3) uint8, red, green, blue.
        sar: (size, size) uint8, amplitude (square root of the speckled backscatter).
        kind: one of `KINDS`.
        objects: ships and buildings in drawing order; trees may cover part of a building.
    """

    optical: NDArray[np.uint8]
    sar: NDArray[np.uint8]
    kind: str
    objects: tuple[SceneObject, ...]


def noise(rng: np.random.Generator, side: int, cell: float, octaves: int = 3) -> Array:
    """Smooth noise, (side, side), about zero mean and unit spread; `cell` is the largest blob in canvas pixels."""
    total, norm = np.zeros((side, side), np.float32), 0.0
    for octave in range(octaves):
        cells = min(side, max(2, math.ceil(side * 2**octave / cell) + 1))
        grid = rng.standard_normal((cells, cells), dtype=np.float32)
        total += np.asarray(Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC)) * 0.55**octave
        norm += 0.3025**octave
    return total / np.float32(0.75 * math.sqrt(norm))


def rectangle(centre: Array, length: float, width: float, angle: float) -> Array:
    """Corners (4, 2) of a rectangle whose long side points along `angle` (radians)."""
    along, across = axes(angle)
    corners = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    return np.array([centre + along * (i * length / 2) + across * (j * width / 2) for i, j in corners], np.float32)


def axes(angle: float) -> tuple[Array, Array]:
    cosine, sine = math.cos(angle), math.sin(angle)
    return np.array([cosine, sine], np.float32), np.array([-sine, cosine], np.float32)


def clip(polygon: Array, size: float) -> list[tuple[float, float]]:
    """The part of a convex polygon inside the image (Sutherland-Hodgman), empty if there is none."""
    points = [(float(x), float(y)) for x, y in polygon]
    for axis, bound, sign in ((0, 0.0, 1), (0, size, -1), (1, 0.0, 1), (1, size, -1)):
        kept: list[tuple[float, float]] = []
        for start, end in zip(points[-1:] + points[:-1], points, strict=True):
            a, b = sign * (start[axis] - bound), sign * (end[axis] - bound)
            if (a < 0) != (b < 0):
                t = a / (a - b)
                kept.append((start[0] + t * (end[0] - start[0]), start[1] + t * (end[1] - start[1])))
            if b >= 0:
                kept.append(end)
        points = kept
    return points


def polygon_area(points: Sequence[tuple[float, float]]) -> float:
    pairs = zip(points, [*points[1:], *points[:1]], strict=True)
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairs)) / 2


class Canvas:
    """Optical colours, backscatter and shadow of one scene, drawn together in image pixels."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.size, self.rng, self.side = size, rng, size * _OVERSAMPLING
        # The sun stands in the lower half of the picture, so shadows fall upwards or sideways as in the north.
        self.shadow_step = axes(rng.uniform(-2.6, -0.5))[0] * rng.uniform(0.5, 0.9)
        self.look = rng.choice([-1.0, 1.0])  # +1: the radar looks towards growing x
        self.objects: list[SceneObject] = []
        self._shadow = Image.new("L", (self.side, self.side))
        self.background(np.full((self.side, self.side, 3), 110, np.float32), np.full((self.side,) * 2, -12, np.float32))

    def grid(self) -> tuple[Array, Array]:
        """Image coordinates x, y of every canvas pixel, each (side, side)."""
        y, x = np.mgrid[: self.side, : self.side].astype(np.float32) / _OVERSAMPLING
        return x, y

    def background(self, colours: Array, decibels: Array) -> None:
        """Replace what is drawn so far: `colours` (side, side, 3) 0-255, `decibels` (side, side)."""
        self._optical = Image.fromarray(to_bytes(colours))
        self._sar = Image.fromarray(to_bytes((decibels - _DB_OFFSET) / _DB_STEP))
        self._pens = ImageDraw.Draw(self._optical), ImageDraw.Draw(self._sar), ImageDraw.Draw(self._shadow)

    @staticmethod
    def _level(decibels: float) -> int:
        return min(max(int((decibels - _DB_OFFSET) / _DB_STEP), 0), 255)

    @staticmethod
    def _points(points: ArrayLike) -> list[float]:
        return (np.asarray(points, np.float32) * _OVERSAMPLING).ravel().tolist()

    def fill(self, points: ArrayLike, colour: Ink | None, decibels: float | None = None) -> None:
        """Fill a polygon in the optical image and, with a level, in the SAR image; None leaves that image."""
        flat = self._points(points)
        if colour is not None:
            self._pens[0].polygon(flat, fill=rgb(colour))
        if decibels is not None:
            self._pens[1].polygon(flat, fill=self._level(decibels))

    def stroke(self, points: ArrayLike, width: float, colour: Ink | None, decibels: float | None = None) -> None:
        """Draw a polyline `width` pixels wide."""
        flat, pen_width = self._points(points), max(1, round(width * _OVERSAMPLING))
        if colour is not None:
            self._pens[0].line(flat, fill=rgb(colour), width=pen_width, joint="curve")
        if decibels is not None:
            self._pens[1].line(flat, fill=self._level(decibels), width=pen_width, joint="curve")

    def disc(
        self, centre: Sequence[float] | Array, radius: float, colour: Ink | None, decibels: float | None = None
    ) -> None:
        """Fill a circle."""
        box = _box(centre, radius)
        if colour is not None:
            self._pens[0].ellipse(box, fill=rgb(colour))
        if decibels is not None:
            self._pens[1].ellipse(box, fill=self._level(decibels))

    def colour_at(self, point: Array) -> Array:
        """The optical colour (3,) at a point, or at the image border nearest to it."""
        x, y = (min(max(int(value * _OVERSAMPLING), 0), self.side - 1) for value in point)
        return np.array(self._optical.getpixel((x, y)), np.float32)

    def raise_block(self, footprint: Array, height: float) -> None:
        """Cast the sun's and the radar's shadow of a block `height` metres high, and its bright wall to the sensor."""
        radar = np.array([self.look, 0.0], np.float32)
        for step, pen, ink in (
            (self.shadow_step * height, self._pens[2], 255),
            (radar * height * 0.8, self._pens[1], self._level(-24)),
        ):
            moved = footprint + step
            for i in range(len(footprint)):
                j = (i + 1) % len(footprint)
                pen.polygon(self._points([footprint[i], footprint[j], moved[j], moved[i]]), fill=ink)
            pen.polygon(self._points(moved), fill=ink)
        self._pens[2].polygon(self._points(footprint), fill=0)

    def bright_walls(self, footprint: Array, decibels: float) -> None:
        """Double bounce: bright lines along the sides that face the radar, brightest when they face it squarely."""
        centre = footprint.mean(0)
        for a, b in zip(footprint, np.roll(footprint, -1, 0), strict=True):
            normal = np.array([b[1] - a[1], a[0] - b[0]]) / max(1e-6, float(np.hypot(*(b - a))))
            facing = -self.look * normal[0] * np.sign(normal @ ((a + b) / 2 - centre))
            if facing > 0.25:
                self.stroke([a, b], 1.0, None, decibels - 9 * (1 - facing))

    def shade_disc(self, centre: Sequence[float] | Array, radius: float, shade: int = 255) -> None:
        """Put a disc into the sun's shadow, or with `shade` 0 back into the light."""
        self._pens[2].ellipse(_box(centre, radius), fill=shade)

    def add_object(self, label: str, polygon: Array) -> None:
        """List an object if enough of it lies inside the image."""
        visible = clip(polygon, self.size)
        if len(visible) >= 3 and polygon_area(visible) >= _MIN_VISIBLE_AREA:
            self.objects.append(SceneObject(label, tuple((round(x, 2), round(y, 2)) for x, y in visible)))

    def finish(self, kind: str) -> Scene:
        """Average down, add texture, shadow, light and speckle."""
        rng, size = self.rng, self.size
        colours: Array = np.asarray(self._optical.reduce(_OVERSAMPLING), np.float32)
        shade = np.asarray(self._shadow.reduce(_OVERSAMPLING), np.float32)[..., None] / 255
        texture = 1 + 0.035 * noise(rng, size, 6, 2)[..., None] + 0.05 * noise(rng, size, size / 2, 2)[..., None]
        colours = (
            colours * texture * (1 - shade * np.array([0.62, 0.58, 0.48], np.float32))
        )  # sky light: shadows are bluish
        light = rng.uniform(0.85, 1.1) * rng.normal(1, 0.015, 3)
        haze = rng.uniform(4, 16) * np.array([0.8, 1.0, 1.25])
        colours = colours * light + haze + 2 * rng.standard_normal(colours.shape, dtype=np.float32)
        power = 10 ** ((np.asarray(self._sar, np.float32) * _DB_STEP + _DB_OFFSET) / 10)
        power = power.reshape(size, _OVERSAMPLING, size, _OVERSAMPLING).mean((1, 3))
        one_look = rng.standard_exponential((size + 1, size + 1), dtype=np.float32)
        # The mean of 2x2 one-look pixels: 4-look gamma statistics, correlated between neighbours as in real products.
        speckle = (one_look[1:, 1:] + one_look[:-1, 1:] + one_look[1:, :-1] + one_look[:-1, :-1]) / 4
        amplitude = 255 * np.sqrt(power * speckle / 10 ** (_SAR_WHITE_DB / 10))
        return Scene(to_bytes(colours), to_bytes(amplitude), kind, tuple(self.objects))


def to_bytes(values: Array) -> NDArray[np.uint8]:
    """Cut to 0-255 and drop the fraction."""
    return np.clip(values, 0, 255).astype(np.uint8)


def rgb(colour: Ink) -> tuple[int, int, int]:
    """A colour as the three whole numbers from 0 to 255 that pillow wants."""
    red, green, blue = (min(max(int(band), 0), 255) for band in colour)
    return red, green, blue


def _box(centre: Sequence[float] | Array, radius: float) -> tuple[float, float, float, float]:
    x, y, r = float(centre[0]) * _OVERSAMPLING, float(centre[1]) * _OVERSAMPLING, radius * _OVERSAMPLING
    return x - r, y - r, x + r, y + r
