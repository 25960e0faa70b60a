"""From a detector's boxes and small masks to objects of the original image."""

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from .image_checks import ImageFormatError

BACKGROUND = -1  # of segmentation maps, as in transformers' processors
# Side of the class-wise masks inside a box, and possible strides of masks over the whole network input.
BOX_MASK_SIDE = 28
IMAGE_MASK_STRIDES = (1, 2, 4)


class Detections(NamedTuple):
    """Detections of one image, best first.

    Args:
        scores: `(objects,)`, 0 to 1.
        labels: `(objects,)`, class indices.
        boxes: `(objects, 4)`, left, top, right, bottom in pixels of `size`.
        masks: `(objects, h, w)`, probabilities as predicted.
        size: (height, width) of the result.
        fitted: (height, width) of the part of the network input that shows the image.
        canvas: (height, width) of the network input.
    """

    scores: torch.Tensor
    labels: torch.Tensor
    boxes: torch.Tensor
    masks: torch.Tensor
    size: tuple[int, int]
    fitted: tuple[int, int]
    canvas: tuple[int, int]

    def paste(self, layout: str, threshold: float) -> torch.Tensor:
        """Bool masks `(objects, height, width)` of `size`: the pixels of at least `threshold`.

        Args:
            layout: "box" for masks inside their boxes, "image" for masks over the whole network input.
            threshold: Probability, 0 to 1.
        """
        result = torch.zeros(len(self.masks), *self.size, dtype=torch.bool, device=self.masks.device)
        for index, mask in enumerate(self.masks.float()):
            if layout == "image":
                result[index] = fit_to_image(mask, self.canvas, self.fitted, self.size) >= threshold
            elif (window := _window(self.boxes[index], self.size)) is not None:
                rows, columns, grid = window
                pixels = nn.functional.grid_sample(mask[None, None], grid, align_corners=False)[0, 0]
                result[index, rows, columns] = pixels >= threshold
        return result


def _window(box: torch.Tensor, size: tuple[int, int]) -> tuple[slice, slice, torch.Tensor] | None:
    """Rows and columns that a mask stretched over a box can reach, and where in the mask their centres lie."""
    left, top, right, bottom = box.tolist()
    # One pixel more on each side: bilinear interpolation reaches half a mask cell beyond the box.
    rows = slice(max(0, math.floor(top) - 1), min(size[0], math.ceil(bottom) + 1))
    columns = slice(max(0, math.floor(left) - 1), min(size[1], math.ceil(right) + 1))
    if right <= left or bottom <= top:
        return None
    x = (torch.arange(columns.start, columns.stop, device=box.device) + 0.5 - left) / (right - left) * 2 - 1
    y = (torch.arange(rows.start, rows.stop, device=box.device) + 0.5 - top) / (bottom - top) * 2 - 1
    grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
    return rows, columns, grid[None]


def fit_to_image(
    mask: torch.Tensor, canvas: tuple[int, int], fitted: tuple[int, int], size: tuple[int, int]
) -> torch.Tensor:
    """Stretch a mask `(h, w)` over the network input, cut the padding off, stretch the rest over the original image.

    Args:
        mask: Probabilities.
        canvas: (height, width) of the network input.
        fitted: (height, width) of the part of it that shows the image.
        size: (height, width) of the original image.

    Returns:
        Probabilities `(height, width)`.
    """
    whole = nn.functional.interpolate(mask[None, None], size=canvas, mode="bilinear")
    return nn.functional.interpolate(whole[..., : fitted[0], : fitted[1]], size=size, mode="bilinear")[0, 0]


def find_mask_layout(found: Detections) -> str:
    """Whether the masks lie inside their boxes ("box") or cover the whole network input ("image"), by their size.

    Raises:
        ImageFormatError: The size fits neither or both.
    """
    size = tuple(found.masks.shape[-2:])
    sizes = {
        "box": [(BOX_MASK_SIDE,) * 2],
        "image": [tuple(side // stride for side in found.canvas) for stride in IMAGE_MASK_STRIDES],
    }
    layouts = [layout for layout, expected in sizes.items() if size in expected]
    if len(layouts) != 1:
        raise ImageFormatError(
            f"masks of {size} for a network input of {found.canvas} do not tell whether they lie inside their boxes: "
            "give the processor mask_layout=model.config.mask_layout"
        )
    return layouts[0]


def segment_map(masks: torch.Tensor, infos: list[dict[str, Any]], least_visible: float) -> dict[str, Any]:
    """Lay masks over each other, the first one on top.

    Args:
        masks: `(objects, height, width)` bool, best first.
        infos: What is known of each object.
        least_visible: Objects of which no more than this share is visible are left out.

    Returns:
        `segmentation`, int32 `(height, width)` of ids or -1, and `segments_info`, the visible objects with their ids.
    """
    segmentation = torch.full(masks.shape[-2:], BACKGROUND, dtype=torch.int32, device=masks.device)
    segments: list[dict[str, Any]] = []
    for mask, info in zip(masks, infos, strict=True):
        visible = mask & (segmentation == BACKGROUND)
        if int(visible.sum()) > least_visible * int(mask.sum()):
            segmentation[visible] = len(segments)
            segments.append({"id": len(segments), **info})
    return {"segmentation": segmentation, "segments_info": segments}


def semantic_segments(segmentation: torch.Tensor) -> dict[str, Any]:
    """A map of class indices as segments: one per class, fused of all its objects, without a score."""
    present = segmentation.unique().tolist()
    segments = [{"id": label, "label_id": label, "score": None, "was_fused": True} for label in present]
    return {"segmentation": segmentation, "segments_info": segments}
