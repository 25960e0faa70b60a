"""RoIAlign (arXiv 1703.06870): torchvision's, and in inference on a CPU the same as weighted sums of a map's cells.

torchvision's CPU kernel goes through a map channel by channel. With all channels of a cell side by side a sample is
four rows of a table, and `embedding_bag`, made for such sums, is ten times faster.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from .channels_last import is_tracing, overwritable

ENTRIES_AT_ONCE = 2**20  # summands whose places and weights are listed at once: 12 MB


def align_boxes(
    features: torch.Tensor, boxes: torch.Tensor, size: int, scale: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`roi_align(features, boxes, size, scale, aligned=True)`, some boxes at a time, with their channels last.

    Args:
        features: `(batch, channels, height, width)`.
        boxes: `(n, 5)`: the number of the image, and corners x1, y1, x2, y2 in pixels, x1 <= x2 and y1 <= y2.
        size: Side of the result.
        scale: Cells per pixel.

    Yields:
        Indices of m boxes, and `(m, size, size, channels)`: each value the mean of as many bilinear samples along x and
        y as the map has cells there, rounded up. Boxes without width or height, whose values are 0, are left out.
    """
    if is_tracing() or features.device.type != "cpu" or not overwritable(features) or boxes.requires_grad:
        aligned = roi_align(features, boxes, size, scale, aligned=True)
        yield torch.arange(len(boxes), device=boxes.device), aligned.permute(0, 2, 3, 1)
        return
    corners = boxes[:, 1:] * scale - 0.5
    samples = ((corners[:, 2:] - corners[:, :2]) / size).ceil().long()
    for along_x, along_y in samples.unique(dim=0).tolist():
        chosen = (samples == samples.new_tensor([along_x, along_y])).all(dim=1).nonzero()[:, 0]
        entries = 4 * along_x * along_y * size**2
        for some in chosen.split(max(1, ENTRIES_AT_ONCE // max(1, entries))) if entries else ():
            yield some, _weighted_sums(features, boxes[some], size, scale, (along_x, along_y))


def _weighted_sums(
    features: torch.Tensor, boxes: torch.Tensor, size: int, scale: float, samples: tuple[int, int]
) -> torch.Tensor:
    """RoIAlign `(n, size, size, channels)` of boxes with the same number of samples along x and y."""
    _, channels, height, width = features.shape
    corners = boxes[:, 1:] * scale - 0.5
    columns, x_weights = _sample(corners[:, 0], corners[:, 2], size, samples[0], width)
    rows, y_weights = _sample(corners[:, 1], corners[:, 3], size, samples[1], height)
    rows = rows + boxes[:, 0].long()[:, None, None] * height
    # (n, size, 1, along y, 1) and (n, 1, size, 1, along x)
    places = rows[:, :, None, :, None] * width + columns[:, None, :, None, :]
    weights = y_weights[:, :, None, :, None] * x_weights[:, None, :, None, :] / math.prod(samples)
    table = features.permute(0, 2, 3, 1).reshape(-1, channels)
    bags = (part.flatten(3).flatten(0, 2) for part in (places, weights))
    sums = F.embedding_bag(next(bags), table, per_sample_weights=next(bags), mode="sum")
    return sums.view(len(boxes), size, size, channels)


def _sample(
    start: torch.Tensor, end: torch.Tensor, size: int, samples: int, cells: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells that each sample along one axis lies between, and their weights, both `(n, size, 2 * samples)`.

    Args:
        start, end: Of the boxes, `(n,)`, in cells of the map; 0 is the centre of its first cell.
        size: Cells of the result.
        samples: Per cell of the result.
        cells: Of the map. Samples up to one cell outside take the border's value, others 0, as in torchvision.
    """
    within = (torch.arange(samples, device=start.device) + 0.5) / samples
    steps = torch.arange(size, device=start.device)[:, None] + within
    position = start[:, None, None] + ((end - start) / size)[:, None, None] * steps
    inside = (position >= -1) & (position <= cells)
    position = position.clamp(0, cells - 1)
    lower = position.floor()
    fraction = position - lower
    places = torch.cat((lower, (lower + 1).clamp(max=cells - 1)), dim=2).long()
    return places, torch.cat(((1 - fraction) * inside, fraction * inside), dim=2)
