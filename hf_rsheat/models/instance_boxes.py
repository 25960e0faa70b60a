"""Boxes of two-stage detectors (arXiv 1506.01497, 1703.06870): codes, anchors, assignment, sampling, pooling.

Boxes are `(n, 4)` corners x1, y1, x2, y2 in pixels.
"""

import math

import torch
from torch import nn
from torchvision.ops import box_iou, clip_boxes_to_image

from .instance_pooling import align_boxes

MAX_LOG_SCALE = abs(math.log(16 / 1000))
ROI_CANONICAL_SIZE = 56
BACKGROUND, IGNORED = -1, -2
TARGETS_AT_ONCE = 16


def start_normal(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d, std: float) -> nn.Module:
    """Have a new layer start with normally distributed weights, and zeros as its bias."""
    layer.initial_std = std
    return layer


def encode_boxes(boxes: torch.Tensor, targets: torch.Tensor, stds: tuple[float, ...]) -> torch.Tensor:
    """Shifts and log-scales `(n, 4)`, divided by `stds`, that take boxes to targets; all sides must be positive."""
    sizes, target_sizes = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    shifts = ((targets[:, :2] + targets[:, 2:]) - (boxes[:, :2] + boxes[:, 2:])) / 2 / sizes
    return torch.cat((shifts, (target_sizes / sizes).log()), dim=1) / boxes.new_tensor(stds)


def decode_boxes(
    boxes: torch.Tensor, deltas: torch.Tensor, stds: tuple[float, ...], size: tuple[int, int]
) -> torch.Tensor:
    """Undo `encode_boxes` and clip to an image.

    Args:
        boxes: `(n, 4)`.
        deltas: `(n, 4)`; log-scales are limited to a factor of 62.5.
        stds: What `encode_boxes` divided by.
        size: Height and width of the image, pixels.
    """
    deltas = deltas * deltas.new_tensor(stds)
    sizes = boxes[:, 2:] - boxes[:, :2]
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2 + deltas[:, :2] * sizes
    half = sizes * deltas[:, 2:].clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp() / 2
    return clip_boxes_to_image(torch.cat((centers - half, centers + half), dim=1), size)


def make_anchors(
    size: tuple[int, int],
    stride: int,
    scales: tuple[float, ...],
    ratios: tuple[float, ...],
    device: torch.device | None = None,
) -> torch.Tensor:
    """Anchors `(rows * columns * len(ratios) * len(scales), 4)` of a map: row by row, then by ratio, then by scale.

    An anchor of scale s and ratio r has the area of a square of s strides and r times as much height as width. Its
    centre is the upper left corner of its cell, as in MMDetection.

    Args:
        size: Rows and columns of the map.
        stride: Its stride, pixels.
        scales: Sides in strides.
        ratios: Heights over widths.
        device: Where to make them.
    """
    roots = torch.tensor(ratios, dtype=torch.float32, device=device).sqrt()[:, None]
    sides = stride * torch.tensor(scales, dtype=torch.float32, device=device)
    half = torch.stack(((sides / roots).flatten(), (sides * roots).flatten()), dim=1) / 2
    y, x = (torch.arange(cells, device=device, dtype=torch.float32) * stride for cells in size)
    centers = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 1, 2)
    return torch.cat((centers - half, centers + half), dim=-1).reshape(-1, 4)


def assign(
    boxes: torch.Tensor, targets: torch.Tensor, pos_iou: float, neg_iou: float, min_pos_iou: float
) -> torch.Tensor:
    """Which target each box stands for, int64 `(boxes,)`: its index, `BACKGROUND` or `IGNORED`.

    A box belongs to the target it overlaps most, if their IoU is at least `pos_iou`; with less than `neg_iou` it is
    background, and in between ignored. Whatever the IoU of a box, it also belongs to a target none overlaps more, from
    `min_pos_iou` on (to the last one, if there are several).
    """
    match = torch.full((len(boxes),), BACKGROUND, device=boxes.device)
    if len(boxes) == 0 or len(targets) == 0:
        return match
    best, forced = boxes.new_zeros(len(boxes)), match.clone()
    for start in range(0, len(targets), TARGETS_AT_ONCE):  # all at once needs gigabytes for crowded images
        overlaps = box_iou(targets[start : start + TARGETS_AT_ONCE], boxes)
        highest, rows = overlaps.max(dim=0)
        match = torch.where(highest > best, rows + start, match)
        best = torch.maximum(best, highest)
        peaks = overlaps.amax(dim=1, keepdim=True)
        indices = torch.arange(start, start + len(overlaps), device=boxes.device)[:, None]
        hits = torch.where((overlaps == peaks) & (peaks >= min_pos_iou), indices, BACKGROUND)
        forced = torch.maximum(forced, hits.amax(dim=0))
    rest = torch.where(best < neg_iou, BACKGROUND, IGNORED)
    return torch.where(forced >= 0, forced, torch.where(best >= pos_iou, match, rest))


def sample(
    match: torch.Tensor, number: int, pos_fraction: float, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw at most `number` boxes for the loss.

    Args:
        match: What `assign` returned.
        number: How many; background fills up what objects leave.
        pos_fraction: Largest share of objects.
        generator: Where the draws come from; torch's global generator if `None`. Nothing is drawn where all are taken.

    Returns:
        Indices of the drawn objects and of the drawn background.
    """
    objects = _choose((match >= 0).nonzero()[:, 0], int(number * pos_fraction), generator)
    return objects, _choose((match == BACKGROUND).nonzero()[:, 0], number - len(objects), generator)


def _choose(indices: torch.Tensor, number: int, generator: torch.Generator | None) -> torch.Tensor:
    if len(indices) <= number:
        return indices
    device = "cpu" if generator is None else generator.device
    order = torch.randperm(len(indices), generator=generator, device=device)[:number]
    return indices[order.to(indices.device)]


def pool_boxes(
    pyramid: list[torch.Tensor], strides: tuple[int, ...], boxes: list[torch.Tensor], size: int
) -> torch.Tensor:
    """Cut boxes out of the four finest maps: RoIAlign on the level that fits the box.

    torchvision's `MultiScaleRoIAlign` would align by half a pixel less, and guess the strides.

    Args:
        pyramid: Maps `(batch, channels, height, width)`, finest first.
        strides: Their strides, pixels.
        boxes: Per image `(n, 4)`.
        size: Side of the result.

    Returns:
        `(all boxes, channels, size, size)`, image by image.
    """
    dtype = pyramid[0].dtype
    flat = torch.cat(boxes)
    image = torch.repeat_interleave(
        torch.arange(len(boxes), device=flat.device), torch.tensor([len(b) for b in boxes], device=flat.device)
    )
    rois = torch.cat((image[:, None].to(flat.dtype), flat), dim=1)
    sides = ((flat[:, 2] - flat[:, 0]) * (flat[:, 3] - flat[:, 1])).sqrt()
    level = (sides / (ROI_CANONICAL_SIZE * strides[0] / 4) + 1e-6).log2().floor().clamp(0, 3)
    result = flat.new_zeros(len(flat), size, size, pyramid[0].shape[1])
    for i, (features, stride) in enumerate(zip(pyramid[:4], strides[:4], strict=True)):
        chosen = (level == i).nonzero()[:, 0]
        # Not in half precision, for which torchvision has no CPU kernel, and in which coordinates would be rounded.
        for some, aligned in align_boxes(features.to(flat.dtype), rois[chosen], size, 1 / stride):
            result[chosen[some]] = aligned
    return result.permute(0, 3, 1, 2).to(dtype)
