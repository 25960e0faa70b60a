"""Seeded scenes for instance segmentation, in COCO's format: ships in speckled radar images, buildings in aerial ones.

They show that a detector learns, on any machine and without a download. Every other image is a radar image of open
water with ships (4-look gamma speckle), the rest are optical images of built-up land; sizes are in pixels.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from .errors import ConfigurationError
from .scene_canvas import Array, Canvas, SceneObject, polygon_area
from .scene_parts import building, grass, ship, tree, water

CLASSES = ("ship", "building")
MIN_SIZE = 96  # the longest object has to fit
_SHIP_LENGTHS, _BUILDING_LENGTHS = (20.0, 60.0), (14.0, 60.0)
_SLENDERNESS = (2.6, 3.6)  # broad-beamed ships: a cargo ship of 20 px is 4 px wide, too little for a fair mask
_MIN_OBJECTS, _MAX_OBJECTS = 2, 7  # in 256 x 256 pixels


def make_instance_scene(
    size: int = 256, seed: int | Sequence[int] = 0, kind: str = "ship"
) -> tuple[NDArray[np.uint8], tuple[SceneObject, ...]]:
    """Draw one scene; the same arguments give the same bytes in every process.

    Args:
        size: Side in pixels, at least `MIN_SIZE`.
        seed: A non-negative number, or several, e.g. (data set seed, index).
        kind: What to show, one of `CLASSES`: ships in a radar image, or buildings in an optical one.

    Returns:
        `(size, size, 3)` uint8 (three equal bands for radar), and the objects with their outlines.

    Raises:
        ConfigurationError: The size or kind cannot be used.
    """
    if size < MIN_SIZE:
        raise ConfigurationError(f"An instance scene needs a size of at least {MIN_SIZE} pixels, not {size}.")
    if kind not in CLASSES:
        raise ConfigurationError(f"There are no scenes of {kind!r}: choose one of {', '.join(CLASSES)}.")
    canvas = Canvas(size, np.random.default_rng(seed))
    (_ships if kind == "ship" else _buildings)(canvas)
    scene = canvas.finish(kind)
    image = np.repeat(scene.sar[..., None], 3, axis=2) if kind == "ship" else scene.optical
    return image, scene.objects


def _ships(canvas: Canvas) -> None:
    canvas.background(*water(canvas))
    for spot, length in _spots(canvas, _SHIP_LENGTHS):
        ship(canvas, spot, length, canvas.rng.uniform(0, 2 * math.pi), _SLENDERNESS)


def _buildings(canvas: Canvas) -> None:
    rng = canvas.rng
    grass(canvas)
    for _ in range(int(rng.poisson(canvas.size / 16))):
        tree(canvas, rng.uniform(0, canvas.size, 2), rng.uniform(1.5, 4))
    for spot, length in _spots(canvas, _BUILDING_LENGTHS):
        width = max(10.0, length * rng.uniform(0.45, 0.9))
        turn, height = rng.uniform(0, math.pi), rng.uniform(3, 8)
        building(canvas, spot, length, width, turn, height, flat=bool(rng.integers(2)))


def _spots(canvas: Canvas, lengths: tuple[float, float]) -> list[tuple[Array, float]]:
    """Places and lengths of objects that lie apart from each other; some are cut by the image's border."""
    rng, share = canvas.rng, (canvas.size / 256) ** 2
    count = max(1, round(rng.integers(_MIN_OBJECTS, _MAX_OBJECTS + 1) * share))
    placed: list[tuple[Array, float]] = []
    for _ in range(20 * count):
        spot, length = rng.uniform(0.04, 0.96, 2) * canvas.size, float(rng.uniform(*lengths))
        if all(math.dist(spot, other) > 0.6 * (length + reach) for other, reach in placed):
            placed.append((spot, length))
        if len(placed) == count:
            break
    return placed


def write_instance_scenes(folder: Path | str, train: int = 128, test: int = 64, size: int = 256, seed: int = 0) -> Path:
    """Write `train/` and `test/` images with `annotations/train.json` and `annotations/test.json` in COCO's format.

    Args:
        folder: Folder to write; files of the same names are replaced.
        train, test: Number of images; every other one shows ships.
        size: Side of the images in pixels.
        seed: Decides everything.

    Returns:
        The folder.
    """
    folder = Path(folder)
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for part, (split, count) in enumerate((("train", train), ("test", test))):
        (folder / split).mkdir(exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in tqdm(range(count), desc=split, unit="image", disable=None):
            pixels, objects = make_instance_scene(size, (seed, part, index), CLASSES[index % 2])
            name = f"scene_{index:05d}.png"
            Image.fromarray(pixels).save(folder / split / name)
            images.append({"id": index + 1, "file_name": name, "height": size, "width": size})
            annotations += [_annotation(thing, index + 1, len(annotations) + n) for n, thing in enumerate(objects, 1)]
        categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
        listing = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(listing), encoding="utf-8")
    return folder


def _annotation(thing: SceneObject, image_id: int, number: int) -> dict[str, Any]:
    corners = np.asarray(thing.polygon)
    low, high = corners.min(0), corners.max(0)
    return {
        "id": number,
        "image_id": image_id,
        "category_id": CLASSES.index(thing.label) + 1,
        "segmentation": [corners.ravel().tolist()],
        "bbox": [*low.tolist(), *(high - low).tolist()],
        "area": round(polygon_area(thing.polygon), 2),
        "iscrowd": 0,
    }
