"""COCO annotations as tensors and back: polygons and run lengths to masks, boxes to corners, masks to run lengths.

Masks are drawn and encoded by the COCO mask interface of faster-coco-eval or pycocotools, whichever is installed, so
that pixels on an edge belong where COCO's evaluation counts them.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from .image_checks import ImageFormatError
from .instance_targets import Instances, clip_boxes

FARTHEST = 1e6  # px; the largest distance of a polygon's corner from the image's origin


class MaskLibraryError(ImportError):
    """COCO masks were asked for, and no library that reads and writes them is installed."""

    def __init__(self) -> None:
        super().__init__(
            "COCO polygons and run lengths need faster-coco-eval (or pycocotools): "
            "run `pip install 'hf_rsheat[eval]'` or `pip install faster-coco-eval`."
        )


@lru_cache(maxsize=1)
def coco_mask() -> Any:
    """COCO's mask interface; imported when it is first needed.

    Raises:
        MaskLibraryError: No library has it.
    """
    try:
        from faster_coco_eval.core import mask
    except ImportError:
        try:
            from pycocotools import mask
        except ImportError:
            raise MaskLibraryError from None
    return mask


def segmentation_to_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Draw one COCO segmentation.

    Args:
        segmentation: A list of polygons `[x0, y0, x1, y1, ...]` in pixels, or a run-length dictionary `{"size",
            "counts"}`, its counts a list of ints or a compressed string.
        height, width: Size of the image in pixels.

    Returns:
        `(height, width)` bool; without a single pixel where the polygons have fewer than three corners.

    Raises:
        ImageFormatError: It is neither, was drawn for an image of another size, or has impossible corners.
        MaskLibraryError: No mask library is installed.
    """
    if isinstance(segmentation, Mapping):
        runs = _run_lengths(dict(segmentation), height, width)
    elif isinstance(segmentation, Sequence) and not isinstance(segmentation, str):
        polygons = [_polygon(polygon) for polygon in segmentation if len(polygon) >= 6]
        if not polygons:
            return np.zeros((height, width), dtype=bool)
        runs = coco_mask().merge(coco_mask().frPyObjects(polygons, height, width))
    else:
        raise ImageFormatError(
            f"a segmentation of type {type(segmentation).__name__} is not COCO's: pass a list of polygons or a "
            'run-length dictionary {"size", "counts"}'
        )
    return coco_mask().decode(runs).reshape(height, width).astype(bool)


def _polygon(polygon: Sequence[float]) -> list[float]:
    corners = [float(value) for value in polygon]
    # The library's memory grows with a polygon's length, and it does not check what it is given.
    if len(corners) % 2 or not all(abs(value) <= FARTHEST for value in corners):
        raise ImageFormatError(
            f"a polygon of {len(corners)} numbers up to {max(corners, key=abs):g} is no outline in pixels: "
            "COCO's are [x0, y0, x1, y1, ...]"
        )
    return corners


def _run_lengths(runs: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    if list(runs.get("size", ())) != [height, width] or "counts" not in runs:
        raise ImageFormatError(
            f"run lengths of size {runs.get('size')} do not fit an image of {height}x{width}: "
            "COCO's size is [height, width] of the image file"
        )
    compressed = isinstance(runs["counts"], str | bytes)
    return runs if compressed else coco_mask().frPyObjects(runs, height, width)


def mask_to_run_lengths(mask: np.ndarray | torch.Tensor) -> dict[str, Any]:
    """Encode a bool mask `(height, width)` as COCO's compressed run lengths, `{"size": [h, w], "counts": str}`.

    Raises:
        MaskLibraryError: No mask library is installed.
    """
    pixels = mask.cpu().numpy() if isinstance(mask, torch.Tensor) else mask
    runs = coco_mask().encode(np.asfortranarray(pixels.astype(np.uint8)))
    counts = runs["counts"]
    size = [int(side) for side in runs["size"]]
    return {"size": size, "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def read_annotation(annotation: Any, height: int, width: int) -> Instances:
    """The objects that a COCO annotation of one image lists; crowds, which are no single object, are left out.

    Boxes are cut at the image's border; objects outside of it or without a pixel are dropped.

    Args:
        annotation: `{"image_id": int, "annotations": [{"category_id", "segmentation", "bbox", "iscrowd"}, ...]}` as
            transformers' detection models take it: `category_id` is the class index, `bbox` is left, top, width,
            height in pixels (where it is missing, the mask's own).
        height, width: Size of the image in pixels.

    Raises:
        ImageFormatError: An object has no class or no segmentation.
        MaskLibraryError: No mask library is installed.
    """
    if not isinstance(annotation, Mapping) or "annotations" not in annotation:
        raise ImageFormatError('an annotation is a dictionary {"image_id": int, "annotations": list of COCO objects}')
    labels, boxes, masks = [], [], []
    for number, thing in enumerate(annotation["annotations"]):
        if thing.get("iscrowd"):
            continue
        if thing.get("category_id") is None or thing.get("segmentation") is None:
            raise ImageFormatError(f"object {number} has no category_id or no segmentation: instances need both")
        mask = segmentation_to_mask(thing["segmentation"], height, width)
        labels.append(int(thing["category_id"]))
        masks.append(torch.from_numpy(mask))
        boxes.append(_corners(thing["bbox"]) if thing.get("bbox") is not None else box_of_mask(mask))
    found = Instances(
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.bool),
    )
    return found._replace(boxes=clip_boxes(found.boxes, height, width)).drop_degenerate()


def _corners(box: Sequence[float]) -> list[float]:
    left, top, width, height = (float(value) for value in box)
    return [left, top, left + width, top + height]


def box_of_mask(mask: np.ndarray) -> list[float]:
    """Left, top, right, bottom of a bool mask `(height, width)` in pixels; zeros where it is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return [0.0] * 4
    return [float(value) for value in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]
