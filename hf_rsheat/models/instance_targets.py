"""Objects of an image as tensors, and what happens to them when the image is resized, cut and padded."""

from typing import NamedTuple

import torch
from torch import nn


class Instances(NamedTuple):
    """The objects of one image.

    Args:
        class_labels: `(objects,)` int64.
        boxes: `(objects, 4)` float32, left, top, right, bottom in pixels.
        masks: `(objects, height, width)` bool.
    """

    class_labels: torch.Tensor
    boxes: torch.Tensor
    masks: torch.Tensor

    def select(self, keep: torch.Tensor) -> "Instances":
        """The objects of a bool mask or of indices, `(objects,)`."""
        return Instances(self.class_labels[keep], self.boxes[keep], self.masks[keep])

    def drop_degenerate(self) -> "Instances":
        """Without objects that have no pixel, or whose box has no area."""
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        return self.select((sides > 1e-5).all(1) & self.masks.flatten(1).any(1))


def clip_boxes(boxes: torch.Tensor, height: float, width: float) -> torch.Tensor:
    """Cut boxes `(..., 4)` (left, top, right, bottom) at the border of an image."""
    limits = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limits)


def resize_instances(instances: Instances, size: tuple[int, int], canvas: tuple[int, int]) -> Instances:
    """Follow an image that is resized and then padded at the bottom and right; masks by nearest neighbour.

    Args:
        instances: Objects of the image.
        size: (height, width) that the image is resized to.
        canvas: (height, width) that it is padded to.

    Returns:
        The objects that still have a pixel.
    """
    height, width = instances.masks.shape[-2:]
    rows = torch.arange(size[0]).mul(height).add(height / 2).div(size[0], rounding_mode="floor").long()
    columns = torch.arange(size[1]).mul(width).add(width / 2).div(size[1], rounding_mode="floor").long()
    masks = instances.masks[:, rows.clamp(max=height - 1)][:, :, columns.clamp(max=width - 1)]
    masks = nn.functional.pad(masks, (0, canvas[1] - size[1], 0, canvas[0] - size[0]))
    scale = instances.boxes.new_tensor([size[1] / width, size[0] / height]).repeat(2)
    boxes = clip_boxes(instances.boxes * scale, *size)
    return Instances(instances.class_labels, boxes, masks).drop_degenerate()


def instance_label(instances: Instances) -> dict[str, torch.Tensor]:
    """The training label of one image as transformers' detection models take it.

    Args:
        instances: Objects in pixels of the network input, masks of its size.

    Returns:
        `class_labels`; `boxes` as centre x, centre y, width, height in shares of the input; `masks`; `area`, pixels of
        the input; `iscrowd`, zeros.
    """
    height, width = instances.masks.shape[-2:]
    corners = instances.boxes / instances.boxes.new_tensor([width, height]).repeat(2)
    boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=1)
    return {
        "class_labels": instances.class_labels,
        "boxes": boxes,
        "masks": instances.masks,
        "area": instances.masks.flatten(1).sum(1).float(),
        "iscrowd": torch.zeros_like(instances.class_labels),
    }
