"""Seeded aerial-like scenes: an optical image and the co-registered SAR image of the same ground.

They feed the demo and the tests where real images cannot be shipped. One pixel stands for about one metre. Optical
images have one sun (shadows of a scene fall one way); SAR images have one look direction (bright wall lines towards
the sensor, radar shadow behind), fully developed 4-look speckle, dark water and bright ships. Nothing here is a
physical simulation: backscatter levels are typical values in decibels.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from .errors import ConfigurationError
from .scene_canvas import Array, Canvas, Scene, SceneObject, axes, noise, rectangle
from .scene_parts import BOXES, CONCRETE, building, fields, grass, pick, ramp, road, ship, tree, trees, wake, water

__all__ = ["KINDS", "MIN_SIZE", "Scene", "SceneObject", "make_scene", "write_labelled_scenes", "write_scenes"]

MIN_SIZE = 32


def _farmland(canvas: Canvas) -> None:
    rng, size = canvas.rng, canvas.size
    angle = rng.uniform(0, math.pi)
    fields(canvas, angle)
    along, across = axes(angle + rng.normal(0, 0.1))
    middle = rng.uniform(0.25, 0.75, 2) * size
    if rng.random() < 0.75:
        road(canvas, middle - along * size, middle + along * size, rng.uniform(4, 6), rng.normal(0, 12))
    else:
        road(canvas, middle - across * size, middle + across * size, 1.8, rng.normal(0, 8), paved=False)
    for _ in range(_scaled(canvas, 2)):  # a hedge along a field edge
        start, direction = rng.uniform(0, size, 2), axes(angle + rng.integers(2) * math.pi / 2)[0]
        for step in np.arange(0, rng.uniform(20, 60), 3.2):
            tree(canvas, start + direction * step + rng.normal(0, 0.7, 2), rng.uniform(1.3, 2.6))
    for _ in range(_scaled(canvas, 0.6)):  # a farmstead
        yard = rng.uniform(0.15, 0.85, 2) * size
        canvas.fill(rectangle(yard, 30, 24, angle), (146, 136, 116), -14)
        for u, v in ((-8, -5), (7, -6), (-6, 7)):
            spot = yard + along * u + across * v
            building(canvas, spot, rng.uniform(10, 15), rng.uniform(6, 8), angle, 4, flat=False)
        for _ in range(5):
            tree(canvas, yard + along * rng.uniform(-16, 16) + across * rng.choice([-13, 13]), rng.uniform(1.6, 3))


def _residential(canvas: Canvas) -> None:
    rng, size = canvas.rng, canvas.size
    grass(canvas, (94, 106, 66), -12)
    angle = rng.uniform(0, math.pi)
    along, across = axes(angle)
    origin, block, lot = rng.uniform(0.3, 0.7, 2) * size, rng.uniform(42, 54), rng.uniform(14, 19)
    big = rng.random() < 0.25  # apartment blocks instead of houses
    reach = int(size / block) + 2
    rows = range(-reach, reach + 1)
    crossings = np.arange(-reach * 90, reach * 90 + 1, 90) + rng.uniform(-30, 30)
    for u in crossings:
        start = origin + along * u
        road(canvas, start - across * 2 * size, start + across * 2 * size, 5)
    for k in rows:
        start = origin + across * k * block
        road(canvas, start - along * 2 * size, start + along * 2 * size, 5.5)
    lots = [
        (k * block + side * (12.5 if not big else 14), u, side)
        for k in rows
        for side in (-1, 1)
        for u in np.arange(-1.6 * size, 1.6 * size, lot * (2.4 if big else 1))
        if np.abs(crossings - u).min() > (16 if big else 10) and rng.random() < 0.9
    ]
    for v, u, side in lots:
        spot = origin + along * u + across * v
        if not (-14 < spot[0] < size + 14 and -14 < spot[1] < size + 14):
            continue
        garden = spot + across * side * 6
        if rng.random() < 0.5:
            canvas.fill(rectangle(garden, lot * 0.8, 9, angle), pick(rng, [(104, 124, 70)]))
        if rng.random() < 0.12:
            canvas.fill(rectangle(garden, 4.5, 2.6, angle), (88, 172, 190), -22)  # a pool
        canvas.fill(rectangle(spot - across * side * 5 + along * 4, 2.4, 8, angle), CONCRETE, -16)  # a driveway
        if rng.random() < 0.4:
            canvas.fill(rectangle(spot - across * side * 6 + along * 4, 1.8, 3.6, angle), pick(rng, BOXES), -1)  # a car
        turn = angle + (math.pi / 2 if rng.random() < 0.3 and not big else 0)
        length, width = (
            (rng.uniform(24, 34), rng.uniform(9, 12)) if big else (rng.uniform(9.5, 12.5), rng.uniform(7, 8.8))
        )
        building(canvas, spot, length, width, turn, rng.uniform(8, 12) if big else rng.uniform(3.5, 5), flat=big)
        for _ in range(int(rng.integers(0, 3))):
            tree(canvas, garden + along * rng.uniform(-7, 7) + across * side * rng.uniform(0, 4), rng.uniform(1.4, 2.8))


def _harbor(canvas: Canvas) -> None:
    rng, size = canvas.rng, canvas.size
    rgb, decibels = water(canvas)
    canvas.background(rgb, decibels)
    angle = rng.uniform(0, 2 * math.pi)
    along, out = axes(angle)  # the quay runs along `along`; `out` points to the water
    quay = np.full(2, size / 2) - out * rng.uniform(-0.05, 0.22) * size
    land = rectangle(quay - out * 1.5 * size, 4 * size, 3 * size, angle)
    canvas.raise_block(land, 2.5)
    canvas.fill(land, np.array(CONCRETE) + rng.normal(0, 6), -13)
    canvas.stroke([quay - along * 2 * size, quay + along * 2 * size], 1.6, (196, 192, 184), 0)
    road(canvas, quay - out * 13 - along * 2 * size, quay - out * 13 + along * 2 * size, 6)
    if rng.random() < 0.6:  # one ship passes outside the piers
        spot, length = quay + out * rng.uniform(72, 100) + along * rng.uniform(-0.4, 0.4) * size, rng.uniform(16, 26)
        course = angle + rng.choice([0, math.pi]) + rng.normal(0, 0.15)
        wake(canvas, spot, length, course)
        ship(canvas, spot, length, course)
    _yard(canvas, quay, angle)
    _berths(canvas, quay, angle)


def _yard(canvas: Canvas, quay: Array, angle: float) -> None:
    """Warehouses, container stacks and tanks in rows behind the quay road."""
    rng, size = canvas.rng, canvas.size
    along, out = axes(angle)
    for row, depth in enumerate(np.arange(31, 1.6 * size, 27)):
        u = -1.2 * size + rng.uniform(0, 20)
        while u < 1.2 * size:
            length = rng.uniform(26, 46)
            spot, what = quay - out * depth + along * (u + length / 2), rng.random()
            u += length + rng.uniform(5, 12)
            if not (-30 < spot[0] < size + 30 and -30 < spot[1] < size + 30):
                continue
            if what < 0.5:
                building(canvas, spot, length, rng.uniform(14, 19), angle, rng.uniform(6, 11), flat=rng.random() < 0.6)
            elif what < 0.85 or row > 1:
                for i, j in np.ndindex(max(1, int(length / 7)), 5):
                    if rng.random() < 0.85:
                        box = rectangle(spot + along * (i * 7 - length / 2 + 3) + out * (j * 3.2 - 7), 6.2, 2.5, angle)
                        canvas.raise_block(box, rng.uniform(2.5, 5))
                        canvas.fill(box, pick(rng, BOXES), rng.uniform(-4, 5))
            else:
                for i in range(int(length / 15)):
                    _tank(canvas, spot + along * (i * 15 - length / 2 + 8), rng.uniform(5, 6.5))


def _tank(canvas: Canvas, centre: Array, radius: float) -> None:
    corners = np.linspace(0, 2 * math.pi, 20, endpoint=False)
    ring = centre + radius * np.stack([np.cos(corners), np.sin(corners)], 1).astype(np.float32)
    canvas.raise_block(ring, radius * 1.1)
    canvas.fill(ring, (206, 206, 200), -9)
    canvas.disc(centre, radius * 0.86, (228, 228, 222))
    canvas.bright_walls(ring, 5)
    canvas.add_object("building", ring)


def _berths(canvas: Canvas, quay: Array, angle: float) -> None:
    """Piers with ships moored on both sides, and ships along the quay between them."""
    rng, size = canvas.rng, canvas.size
    along, out = axes(angle)
    u = -size + rng.uniform(0, 30)
    while u < size:
        if rng.random() < 0.55:
            reach, width = rng.uniform(36, 56), rng.uniform(5, 9)
            pier = rectangle(quay + along * u + out * reach / 2, reach, width, angle + math.pi / 2)
            canvas.raise_block(pier, 2)
            canvas.fill(pier, CONCRETE, -9)
            for side in (-1, 1):
                if rng.random() < 0.8:
                    length = rng.uniform(22, reach * 0.85)
                    spot = quay + along * (u + side * (width / 2 + length * 0.11 + 1)) + out * (reach - length / 2)
                    ship(canvas, spot, length, angle + rng.choice([-1, 1]) * math.pi / 2)
            u += width + rng.uniform(28, 46)
        else:
            length = rng.uniform(26, 44)
            spot = quay + along * (u + length / 2) + out * (length * 0.11 + 1.2)
            ship(canvas, spot, length, angle + rng.choice([0, math.pi]))
            u += length + rng.uniform(18, 30)


def _open_water(canvas: Canvas) -> None:
    rng, size = canvas.rng, canvas.size
    canvas.background(*water(canvas))
    fleet: list[tuple[Array, float, float]] = []
    for _ in range(_scaled(canvas, 2.6) + 1):
        spot, length, course = rng.uniform(0.08, 0.92, 2) * size, rng.uniform(14, 46), rng.uniform(0, 2 * math.pi)
        if all(math.hypot(*(spot - other)) > (length + reach) * 0.6 for other, reach, _ in fleet):
            fleet.append((spot, length, course))
    for place, length, course in fleet:
        if rng.random() < 0.7:
            wake(canvas, place, length, course)
    for place, length, course in fleet:
        ship(canvas, place, length, course)


def _coast(canvas: Canvas) -> None:
    rng, size = canvas.rng, canvas.size
    sea, sea_db = water(canvas)
    x, y = canvas.grid()
    direction = axes(rng.uniform(0, 2 * math.pi))[0]
    height = (x - size / 2) * direction[0] + (y - size / 2) * direction[1] + rng.normal(0, size / 10)
    height += size * 0.07 * noise(rng, canvas.side, canvas.side * 0.8, 4)
    foam = np.clip(1 - np.abs(height + 1.2 + 0.8 * noise(rng, canvas.side, 14, 2)) / 1.6, 0, 1)[..., None]
    sand, dry = (206, 190, 152), (222, 208, 172)
    stops = [
        (0, (150, 140, 116), -17),
        (3, sand, -16),
        (14, dry, -15),
        (18, (128, 130, 84), -11),
        (40, (92, 108, 62), -10),
    ]
    rgb, decibels = ramp(height, stops)
    shallow = np.exp(np.minimum(height, 0) / 14)[..., None]
    sea = sea * (1 - 0.75 * shallow) + np.array([116, 168, 158]) * 0.75 * shallow
    rgb = np.where(height[..., None] > 0, rgb + 5 * noise(rng, canvas.side, 10, 2)[..., None], sea)
    rgb = rgb * (1 - 0.8 * foam) + np.array([232, 236, 232]) * 0.8 * foam
    canvas.background(rgb, np.where(height > 0, decibels, sea_db) + 5 * foam[..., 0])
    level = height[::2, ::2]

    def on_grass(spot: Array) -> bool:
        column, row = np.clip(spot.astype(int), 0, size - 1)
        return bool(level[row, column] > 20)

    trees(canvas, _scaled(canvas, 60), where=on_grass)


def _forest(canvas: Canvas) -> None:
    rng, size = canvas.rng, canvas.size
    grass(canvas, (84, 92, 56), -12)
    openness = noise(rng, canvas.side, canvas.side * 0.8, 4)[::2, ::2]
    bearing, middle = axes(rng.uniform(0, math.pi))[0], rng.uniform(0.3, 0.7, 2) * size
    track = rng.random() < 0.6
    if track:
        road(canvas, middle - bearing * 1.5 * size, middle + bearing * 1.5 * size, 2.4, rng.normal(0, 3), paved=False)
    spacing = rng.uniform(5, 6.5)
    rows, columns = np.arange(-4, size + 6, spacing * 0.85), np.arange(-4, size + 6, spacing)
    spots = np.stack(np.meshgrid(columns, rows), -1).reshape(-1, 2)
    spots += rng.uniform(-0.6, 0.6, spots.shape) * spacing
    column, row = np.clip(spots.astype(int), 0, size - 1).T
    wooded = openness[row, column] < rng.uniform(0.7, 1.6)
    if track:
        offset = spots - middle
        wooded &= np.abs(bearing[0] * offset[:, 1] - bearing[1] * offset[:, 0]) > 5
    for spot, radius in zip(spots[wooded], spacing * rng.uniform(0.4, 0.85, int(wooded.sum())), strict=True):
        tree(canvas, spot, radius)


def _scaled(canvas: Canvas, mean: float) -> int:
    """A number of things for this scene's area: Poisson, `mean` for 128 x 128 pixels."""
    return int(canvas.rng.poisson(mean * (canvas.size / 128) ** 2))


_DRAW: dict[str, Callable[[Canvas], None]] = {
    "coast": _coast,
    "farmland": _farmland,
    "forest": _forest,
    "harbor": _harbor,
    "open_water": _open_water,
    "residential": _residential,
}
KINDS = tuple(_DRAW)


def make_scene(size: int = 128, seed: int | Sequence[int] = 0, kind: str | None = None) -> Scene:
    """Draw one scene; the same arguments give the same bytes in every process.

    Args:
        size: side in pixels (about metres), at least `MIN_SIZE`.
        seed: a non-negative number, or several, e.g. (data set seed, index).
        kind: one of `KINDS`; by default the seed chooses.

    Raises:
        ConfigurationError: the size, seed or kind cannot be used.
    """
    if size < MIN_SIZE:
        raise ConfigurationError(f"A scene needs a size of at least {MIN_SIZE} pixels, not {size}.")
    if kind is not None and kind not in _DRAW:
        raise ConfigurationError(f"There is no scene kind {kind!r}: choose one of {', '.join(KINDS)}.")
    if min([seed] if isinstance(seed, int) else seed) < 0:
        raise ConfigurationError(f"A seed is a number from 0 on, not {seed}.")
    rng = np.random.default_rng(seed)
    drawn = KINDS[rng.integers(len(KINDS))]  # drawn in any case: naming the kind that the seed chooses changes nothing
    canvas = Canvas(size, rng)
    _DRAW[kind or drawn](canvas)
    return canvas.finish(kind or drawn)


def write_scenes(folder: Path | str, count: int, size: int = 128, seed: int = 0) -> Path:
    """Write `count` co-registered pairs as optical/scene_00000.png and sar/scene_00000.png; replacing.

    The kinds come in equal shares. `objects.json` lists every scene's kind, ships and buildings.

    Returns:
        The folder.
    """
    folder, listing = Path(folder), {}
    for sensor in ("optical", "sar"):
        (folder / sensor).mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(count), desc="pairs", unit="scene", disable=None):  # None: only at a terminal
        scene = make_scene(size, (seed, index), KINDS[index % len(KINDS)])
        name = f"scene_{index:05d}.png"
        Image.fromarray(scene.optical).save(folder / "optical" / name)
        Image.fromarray(scene.sar).save(folder / "sar" / name)
        shapes = [{"label": thing.label, "polygon": thing.polygon} for thing in scene.objects]
        listing[name] = {"kind": scene.kind, "objects": shapes}
    (folder / "objects.json").write_text(json.dumps(listing))
    return folder


def write_labelled_scenes(folder: Path | str, count: int, size: int = 128, seed: int = 0) -> Path:
    """Write `count` optical images as <kind>/scene_00000.png, kinds in equal shares, for classification.

    Returns:
        The folder.
    """
    folder = Path(folder)
    for index in tqdm(range(count), desc="scenes", unit="scene", disable=None):
        kind = KINDS[index % len(KINDS)]
        (folder / kind).mkdir(parents=True, exist_ok=True)
        scene = make_scene(size, (seed, index), kind)
        Image.fromarray(scene.optical).save(folder / kind / f"scene_{index:05d}.png")
    return folder
