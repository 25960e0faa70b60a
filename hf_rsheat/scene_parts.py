"""What scenes are made of: fields, water, roads, trees, buildings, ships, each drawn for both sensors at once."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

from .scene_canvas import Array, Canvas, Colour, axes, noise, rectangle

_CROPS: tuple[tuple[Colour, float], ...] = (  # colour, backscatter (dB)
    ((86, 112, 58), -10.0),  # cereal
    ((62, 92, 48), -8.5),  # maize
    ((112, 126, 66), -11.0),  # meadow
    ((176, 158, 106), -13.0),  # stubble
    ((136, 108, 80), -12.0),  # bare soil
    ((108, 84, 64), -10.0),  # ploughed
    ((168, 164, 74), -9.5),  # rape in flower
    ((148, 140, 104), -14.0),  # fallow
)
_ROOFS: tuple[Colour, ...] = (
    (150, 84, 66),
    (124, 72, 60),
    (104, 100, 98),
    (142, 132, 122),
    (88, 80, 78),
    (166, 108, 82),
)
_FLAT_ROOFS: tuple[Colour, ...] = ((188, 186, 180), (150, 150, 150), (120, 128, 138), (172, 160, 142), (108, 104, 102))
BOXES: tuple[Colour, ...] = ((158, 62, 50), (52, 88, 132), (72, 112, 80), (186, 180, 168), (190, 128, 56))
_ASPHALT: Colour = (112, 112, 114)
CONCRETE: Colour = (158, 154, 146)


def pick(rng: np.random.Generator, colours: Sequence[Colour], spread: float = 8) -> Array:
    """One of the colours, a little lighter or darker."""
    colour = np.asarray(colours[int(rng.integers(len(colours)))], np.float32)
    return colour * rng.normal(1, spread / 100) + rng.normal(0, 2.5, 3).astype(np.float32)


def ramp(level: Array, stops: Sequence[tuple[float, Colour, float]]) -> tuple[Array, Array]:
    """Colours and decibels interpolated over `level` through (level, colour, decibels) stops."""
    at = [stop[0] for stop in stops]
    rgb = np.stack([np.interp(level, at, [stop[1][band] for stop in stops]) for band in range(3)], -1)
    return rgb.astype(np.float32), np.interp(level, at, [stop[2] for stop in stops]).astype(np.float32)


def water(canvas: Canvas) -> tuple[Array, Array]:
    """Water with swell: colours and decibels, to blend with land or to use as the whole background."""
    rng = canvas.rng
    x, y = canvas.grid()
    direction = axes(rng.uniform(0, math.pi))[0]
    calm = noise(rng, canvas.side, canvas.side, 3)
    wave = np.sin(
        2 * math.pi * (x * direction[0] + y * direction[1]) / rng.uniform(5, 9) + 2.5 * noise(rng, canvas.side, 40, 2)
    )
    ripple = (wave * (0.6 + 0.4 * calm) + noise(rng, canvas.side, 8, 2))[..., None]
    deep = np.array([24, 52, 72], np.float32) + rng.uniform(-8, 18) * np.array([0.3, 1.0, 0.8], np.float32)
    return deep + 3.5 * calm[..., None] + 2.6 * ripple, -19 + 1.0 * calm + 0.7 * wave + rng.uniform(-1.5, 1.0)


def grass(canvas: Canvas, colour: Colour = (96, 112, 66), decibels: float = -12.0) -> None:
    """Uneven meadow as the whole background."""
    rng, side = canvas.rng, canvas.side
    dry = noise(rng, side, side / 2, 4)[..., None]
    rgb = np.asarray(colour, np.float32) + dry * np.array([9, 6, 4]) + 5 * noise(rng, side, 12, 2)[..., None]
    canvas.background(rgb, decibels + 0.6 * dry[..., 0])


def fields(canvas: Canvas, angle: float) -> None:
    """Parcels cut from a rotated rectangle, each with a crop, rows and tramlines, and grass between them."""
    rng, size = canvas.rng, canvas.size
    along, across = axes(angle)
    centre = np.full(2, size / 2)
    parcels = list(_split(rng, (-0.75 * size, -0.75 * size, 1.5 * size, 1.5 * size)))
    identity = Image.new("I", (canvas.side, canvas.side))
    pen = ImageDraw.Draw(identity)
    for number, (u, v, width, height) in enumerate(parcels, 1):
        gap = rng.uniform(0.4, 1.6)
        corners = [
            (u + gap, v + gap),
            (u + width - gap, v + gap),
            (u + width - gap, v + height - gap),
            (u + gap, v + height - gap),
        ]
        pen.polygon(
            [float(c) for a, b in corners for c in (centre + along * a + across * b) * canvas.side / size], fill=number
        )
    parcel = np.asarray(identity)
    count = len(parcels) + 1
    crops = rng.integers(len(_CROPS), size=count)
    colours = np.array([_CROPS[c][0] for c in crops], np.float32) + rng.normal(0, 7, (count, 3)).astype(np.float32)
    decibels = np.array([_CROPS[c][1] for c in crops], np.float32) + rng.normal(0, 1.2, count).astype(np.float32)
    colours[0], decibels[0] = (104, 108, 68), -10.5
    rows = angle + np.where(rng.random(count) < 0.5, 0, math.pi / 2) + rng.normal(0, 0.03, count)
    strength, spacing, tram = rng.uniform(1, 11, count), rng.uniform(2.4, 4.2, count), rng.uniform(11, 20, count)
    strength[0] = 0
    x, y = canvas.grid()
    u = (x * np.cos(rows).astype(np.float32)[parcel] + y * np.sin(rows).astype(np.float32)[parcel]).astype(np.float32)
    stripes = np.sin(2 * math.pi * u / spacing.astype(np.float32)[parcel])
    tramlines = np.clip(np.cos(2 * math.pi * u / tram.astype(np.float32)[parcel]) - 0.9, 0, 1) * 10
    patches, clods = noise(rng, canvas.side, canvas.side / 2, 4), noise(rng, canvas.side, 10, 2)
    relief = strength.astype(np.float32)[parcel] * (stripes - tramlines) + 6 * patches + 3.5 * clods
    canvas.background(colours[parcel] + relief[..., None], decibels[parcel] + 0.6 * patches + 0.07 * relief)


def _split(rng: np.random.Generator, box: tuple[float, ...]) -> Iterator[tuple[float, ...]]:
    """Cut a box (u, v, width, height) into parcels at random, the long side first."""
    u, v, width, height = box
    if max(width, height) < 40 or (max(width, height) < 75 and rng.random() < 0.45):
        yield box
        return
    share = rng.uniform(0.35, 0.65)
    if width > height:
        yield from _split(rng, (u, v, width * share, height))
        yield from _split(rng, (u + width * share, v, width * (1 - share), height))
    else:
        yield from _split(rng, (u, v, width, height * share))
        yield from _split(rng, (u, v + height * share, width, height * (1 - share)))


def road(
    canvas: Canvas, start: ArrayLike, end: ArrayLike, width: float, bend: float = 0.0, *, paved: bool = True
) -> None:
    """A road or track from `start` to `end`, its middle `bend` pixels off the straight line."""
    start, end = np.asarray(start, np.float32), np.asarray(end, np.float32)
    side = np.array([start[1] - end[1], end[0] - start[0]]) / max(1e-6, float(np.hypot(*(end - start))))
    t = np.linspace(0, 1, 24, dtype=np.float32)[:, None]
    points = start + t * (end - start) + side * bend * np.sin(math.pi * t)
    line = points if bend else points[[0, -1]]
    if paved:
        canvas.stroke(line, width + 2.2, (136, 132, 116), -13)
        canvas.stroke(line, width, np.array(_ASPHALT) + canvas.rng.normal(0, 8), -19)
        if width >= 5:
            for a, b in zip(points[::2], points[1::2], strict=True):
                canvas.stroke([a, b], 0.5, (205, 203, 196))
    else:
        canvas.stroke(line, width, (166, 148, 118), -15)


def tree(canvas: Canvas, centre: Sequence[float] | Array, radius: float) -> None:
    """A crown with its shadow, lit from the sun's side; in the radar image a bright front and a dark back."""
    x, y = float(centre[0]), float(centre[1])
    shade_x, shade_y = (float(step) * radius for step in canvas.shadow_step)
    reach = math.hypot(shade_x, shade_y) / radius + 1e-6
    tone, yellow = canvas.rng.normal(1, 0.13), canvas.rng.normal(0, 5)
    base = (50 * tone + yellow, 70 * tone, 40 * tone - yellow / 2)
    canvas.shade_disc((x + shade_x * 1.1, y + shade_y * 1.1), radius)
    canvas.shade_disc((x, y), radius, 0)
    canvas.disc((x + canvas.look * radius * 0.8, y), radius * 0.8, None, -15)
    canvas.disc((x, y), radius, base, -8.5)
    for share, size, light in ((0.3, 0.62, 1.24), (0.45, 0.3, 1.5)):
        spot = (x - shade_x / reach * share, y - shade_y / reach * share)
        canvas.disc(spot, radius * size, [band * light + 4 for band in base])
    canvas.disc((x - canvas.look * radius * 0.4, y), radius * 0.5, None, -5)


def building(
    canvas: Canvas, centre: Array, length: float, width: float, angle: float, height: float, *, flat: bool
) -> None:
    """A block with a flat or a gabled roof, its shadows, its wall lines towards the radar; listed as an object."""
    rng = canvas.rng
    footprint = rectangle(centre, length, width, angle)
    canvas.raise_block(footprint, height)
    along, across = axes(angle)
    if flat:
        roof = pick(rng, _FLAT_ROOFS)
        canvas.fill(footprint, roof * 0.84, -9)
        canvas.fill(rectangle(centre, length - 1.4, width - 1.4, angle), roof)
        for _ in range(int(rng.integers(0, 2 + int(length * width) // 90))):
            spot = centre + along * rng.uniform(-0.38, 0.38) * length + across * rng.uniform(-0.35, 0.35) * width
            canvas.fill(rectangle(spot, 2.0, 1.5, angle), roof * rng.choice([0.7, 1.2]), 0)
    else:
        roof = pick(rng, _ROOFS)
        for sign in (-1, 1):
            half = rectangle(np.asarray(centre) + across * sign * width / 4, length, width / 2, angle)
            light = 1 - 0.24 * sign * float(across @ canvas.shadow_step) / max(
                1e-6, float(np.hypot(*canvas.shadow_step))
            )
            canvas.fill(half, roof * light, -9 - 4 * sign * float(across[0]) * canvas.look)
        canvas.stroke([centre - along * length / 2, centre + along * length / 2], 0.5, roof * 1.18, -3)
    canvas.bright_walls(footprint, 4.0)
    canvas.add_object("building", footprint)


def wake(canvas: Canvas, centre: Array, length: float, angle: float) -> None:
    """The wake of a ship under way: a churned stern trail, dark to the radar, and the arms of the bow wave."""
    along, across = axes(angle)
    bow, stern = centre + along * length * 0.45, centre - along * length * 0.45
    still, foam = canvas.colour_at(stern), np.array([196, 210, 210], np.float32)
    reach, width = length * canvas.rng.uniform(1.0, 2.2), length * 0.08
    for share in (1.0, 0.7, 0.45, 0.25):  # a trail that fades away from the stern
        end, half = stern - along * reach * share, across * width * (1.3 - 0.5 * share)
        trail = still + (foam - still) * (0.12 + 0.4 * (1 - share))
        canvas.fill([stern - half * 0.7, stern + half * 0.7, end + half, end - half], trail, -23)
    for sign in (-1, 1):
        arm = -along + across * sign * 0.3
        for start, stop, share in ((0.1, 0.5, 0.5), (0.5, 0.9, 0.3), (0.9, 1.3, 0.16)):
            line = [bow + arm * length * start, bow + arm * length * stop]
            canvas.stroke(line, 0.9, still + (foam - still) * share, -15)


def ship(
    canvas: Canvas, centre: Array, length: float, angle: float, slenderness: tuple[float, float] = (4.2, 5.6)
) -> None:
    """A cargo ship: pointed bow along `angle`, bridge astern, hatches or boxes on deck; length by beam is drawn."""
    rng, width = canvas.rng, length / canvas.rng.uniform(*slenderness)
    along, across = axes(angle)
    centre = np.asarray(centre, np.float32)

    def spots(points: Sequence[tuple[float, float]]) -> Array:
        return np.stack([centre + along * (u * length / 2) + across * (v * width / 2) for u, v in points])

    hull = spots(
        [(1, 0), (0.78, 0.72), (0.5, 1), (-0.94, 1), (-1, 0.8), (-1, -0.8), (-0.94, -1), (0.5, -1), (0.78, -0.72)]
    )
    canvas.raise_block(hull, width * 0.45)
    canvas.fill(hull, pick(rng, [(70, 40, 38), (44, 50, 60), (52, 66, 58)], 5), -4.0)
    deck = pick(rng, [(136, 70, 56), (112, 118, 116), (96, 108, 92), (150, 142, 128)])
    canvas.fill(centre + (hull - centre) * 0.86, deck, -2.5)
    rows = max(2, int(length / 7))
    boxes = rng.random() < 0.5
    for row in range(rows):
        u = -0.5 + 1.1 * row / rows
        ink = pick(rng, BOXES) if boxes else deck * 0.78
        canvas.fill(
            spots([(u, -0.6), (u, 0.6), (u + 0.75 / rows, 0.6), (u + 0.75 / rows, -0.6)]), ink, 2 if boxes else -4
        )
    canvas.fill(spots([(-0.9, -0.8), (-0.9, 0.8), (-0.66, 0.8), (-0.66, -0.8)]), (226, 226, 220), 6)
    canvas.add_object("ship", hull)


def trees(
    canvas: Canvas, count: int, low: float = 1.6, high: float = 3.4, *, where: Callable[[Array], bool] | None = None
) -> None:
    """Scatter trees, in loose groups, over the places `where` allows; far ones first so that shadows overlap well."""
    rng, size = canvas.rng, canvas.size
    centres = rng.uniform(-3, size + 3, (max(1, count // 4), 2))
    spots = centres[rng.integers(len(centres), size=count)] + rng.normal(0, 6, (count, 2))
    for spot in spots[np.argsort(spots[:, 1])]:
        if where is None or where(spot):
            tree(canvas, spot, rng.uniform(low, high))
