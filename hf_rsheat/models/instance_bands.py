"""Maps worked on a band of rows at a time, so that intermediate results stay in the cache."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .channels_last import VALUES_IN_CACHE, is_tracing, overwritable

LEAST_ROWS_PER_HALO = 8


def by_bands(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, halo: int = 0) -> torch.Tensor:
    """`function(x)`, in inference on a CPU band by band.

    Args:
        function: From a map `(batch, channels, height, width)` to one of a whole multiple of its height, in which a row
            depends on the row of the same place and on `halo` rows of `x` to either side, or on zeros beyond the map.
        x: The map.
        halo: See above; these rows are computed twice where bands meet.
    """
    batch, channels, height, width = x.shape
    rows = max(1, LEAST_ROWS_PER_HALO * halo, VALUES_IN_CACHE // (batch * channels * width))
    if rows >= height or is_tracing() or x.device.type != "cpu" or not overwritable(x):
        return function(x)
    result = None
    for start in range(0, height, rows):
        stop, top, bottom = min(height, start + rows), max(0, start - halo), min(height, start + rows + halo)
        part = function(x[:, :, top:bottom])
        factor = part.shape[2] // (bottom - top)
        if result is None:
            shape = (batch, part.shape[1], factor * height, part.shape[3])
            result = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=torch.channels_last)
        result[:, :, factor * start : factor * stop] = part[:, :, factor * (start - top) : factor * (stop - top)]
    return function(x) if result is None else result  # the former for maps without rows


def relu(x: torch.Tensor) -> torch.Tensor:
    """ReLU of a temporary, over it where possible."""
    return F.relu(x, inplace=overwritable(x))
