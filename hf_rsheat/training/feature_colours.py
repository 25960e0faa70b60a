"""Feature maps as colours, for pictures of a run."""

import torch
import torch.nn.functional as F


def false_colours(reference: torch.Tensor, maps: torch.Tensor, size: int) -> torch.Tensor:
    """Maps in the colours of the three directions in which a reference map varies most, so that equal looks equal.

    Args:
        reference: Decides directions and ranges, `(batch, channels, rows, columns)`, at least 3 channels.
        maps: What to show, of the same shape.
        size: Side of the result, pixels; positions become squares.

    Returns:
        `(batch, 3, size, size)` from 0 to 1; red is the strongest direction.
    """
    points = reference.float().permute(0, 2, 3, 1).flatten(0, 2)
    centre = points.mean(dim=0)
    directions = torch.linalg.svd(points - centre, full_matrices=False).Vh[:3]
    spread = 4 * ((points - centre) @ directions.T).std(dim=0).clamp_min(1e-12)  # two standard deviations either way
    shown = (maps.float().permute(0, 2, 3, 1) - centre) @ directions.T / spread + 0.5
    return F.interpolate(shown.permute(0, 3, 1, 2), size=(size, size)).clamp(0, 1)
