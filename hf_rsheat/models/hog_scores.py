"""How much structure a patch holds, from histograms of oriented gradients (HOG).

The cells are those of SelectiveMAE's released code (which uses them for a score that comes out as zero, see
`token_selection`). There every cell is divided by its length over the orientations; a flat patch with sensor noise then
looks as busy as a city block. The score here is that length itself: strong gradients of a common direction count most.
"""

import math

import torch
import torch.nn.functional as F

ORIENTATIONS = 9
_CELL = 8  # pixels, in the original at patch size 16


def hog_histograms(images: torch.Tensor, cell: int = _CELL) -> torch.Tensor:
    """Gradient magnitude per cell and unsigned orientation, weighted by a Gaussian window of two cells.

    Args:
        images: `(batch, channels, height, width)`; sides are multiples of `cell`.
        cell: Side of a cell in pixels.

    Returns:
        `(batch, channels, 9, height / cell, width / cell)` in float32, not normalised.
    """
    batch, channels, height, width = images.shape
    rows, columns = height // cell, width // cell
    sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]], device=images.device)
    padded = F.pad(images.float().flatten(0, 1)[:, None], (1, 1, 1, 1), mode="reflect")
    with torch.autocast(images.device.type, enabled=False):
        gradients = F.conv2d(padded, torch.stack((sobel, sobel.T))[:, None])
    horizontal, vertical = gradients.unbind(1)
    magnitude = torch.sqrt(horizontal**2 + vertical**2)
    orientation = torch.floor(torch.atan2(horizontal, vertical) / math.pi * ORIENTATIONS).long() % ORIENTATIONS
    axis = torch.arange(2 * cell, device=images.device) - (cell - 0.5)
    window = torch.exp(-(axis**2) / (2 * cell**2))
    window = (window[:, None] * window) / window.sum() ** 2
    weights = window.repeat(-(-rows // 2), -(-columns // 2))[:height, :width]
    magnitude = magnitude * weights
    sums = [  # one orientation after the other: all nine at once would be the largest tensor of a training step
        F.avg_pool2d(magnitude.where(orientation == index, 0.0)[:, None], cell)[:, 0] * cell**2
        for index in range(ORIENTATIONS)
    ]
    return torch.stack(sums, dim=1).reshape(batch, channels, ORIENTATIONS, rows, columns)


@torch.no_grad()
def hog_scores(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """One score per patch: the length of its cells' histograms, averaged over cells and channels; 0 where flat.

    Args:
        images: `(batch, channels, height, width)`, normalised or not; sides are multiples of the patch size.
        patch_size: Side of a patch in pixels; it is cut into cells of about 8 pixels.

    Returns:
        `(batch, height / patch_size * width / patch_size)`, row by row.
    """
    parts = max(1, round(patch_size / _CELL))
    while patch_size % parts:
        parts -= 1
    lengths = hog_histograms(images, patch_size // parts).norm(dim=2).mean(dim=1)
    return F.avg_pool2d(lengths[:, None], parts).flatten(1)
