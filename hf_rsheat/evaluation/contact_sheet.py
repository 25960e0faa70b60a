"""One picture of what a detector found, missed and made up."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from ..models.coco_annotations import segmentation_to_mask
from ..training.coco import CocoData, CocoImage
from .coco_metrics import match
from .detect import read_image

FOUND, MISSED, EXTRA = (60, 200, 90), (240, 60, 60), (255, 190, 40)  # green, red, yellow
_COLUMNS, _SIDE, _GAP = 4, 320, 4


def contact_sheet(
    data: CocoData,
    objects: dict[int, list[dict[str, Any]]],
    detections: dict[int, list[dict[str, Any]]],
    path: Path,
    count: int = 12,
) -> None:
    """Write a PNG of the images with most errors first: found objects green, missed ones red, false detections yellow.

    Args:
        data: The images.
        objects: COCO objects with run lengths, by image id.
        detections: COCO results to show, by image id.
        path: File to write.
        count: Number of images.
    """
    matches = {image.image_id: match(objects[image.image_id], detections[image.image_id]) for image in data.images}

    def errors(image: CocoImage) -> int:
        return len(matches[image.image_id].missed) + len(matches[image.image_id].extra)

    worst = sorted(data.images, key=errors, reverse=True)[:count]
    tiles = []
    for image in worst:
        truth, found = objects[image.image_id], detections[image.image_id]
        pairs, missed, extra = matches[image.image_id]
        pixels = tv.pil_to_tensor(read_image(data, image))
        for things, colour in (
            ([found[j] for _, j in pairs], FOUND),
            ([truth[i] for i in missed], MISSED),
            ([found[j] for j in extra], EXTRA),
        ):
            pixels = _draw(pixels, things, image, colour)
        tiles.append(_tile(pixels))
    grid = make_grid(torch.stack(tiles), nrow=min(_COLUMNS, len(tiles)), padding=_GAP, pad_value=255)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path, format="PNG")


def _draw(
    pixels: torch.Tensor, things: Sequence[dict[str, Any]], image: CocoImage, colour: tuple[int, int, int]
) -> torch.Tensor:
    if not things:
        return pixels
    masks = [torch.from_numpy(segmentation_to_mask(t["segmentation"], image.height, image.width)) for t in things]
    boxes = torch.tensor([[t["bbox"][0], t["bbox"][1], *_opposite(t["bbox"])] for t in things])
    pixels = draw_segmentation_masks(pixels, torch.stack(masks), alpha=0.5, colors=colour)
    return draw_bounding_boxes(pixels, boxes, colors=colour)


def _opposite(box: Sequence[float]) -> tuple[float, float]:
    return box[0] + box[2], box[1] + box[3]


def _tile(pixels: torch.Tensor) -> torch.Tensor:
    """The image fitted into a white square."""
    scale = _SIDE / max(pixels.shape[-2:])
    height, width = (max(1, round(side * scale)) for side in pixels.shape[-2:])
    small = tv.resize(pixels, [height, width], antialias=True)
    return tv.pad(small, [0, 0, _SIDE - width, _SIDE - height], fill=255)
