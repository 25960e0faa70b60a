"""The memory of a batch: samples move into it one by one, and stacking them copies nothing."""

import math
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_ALIGNMENT = 64  # bytes, as PyTorch allocates; the last bit of a product can depend on it
_free: deque[np.ndarray] = deque(maxlen=4)  # memory of batches that nobody holds any more


class BatchRows:
    """Takes in the tensors of prepared samples, each in the next row of its batch, while the cache still holds them.

    Samples that wait for their batch to be complete need their memory twice, and memory that goes back to the kernel
    after every batch is cleared and handed out page by page for the next one: a quarter of a loader's time.

    Args:
        samples: Number of samples, of which some may turn out unusable.
    """

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._used = 0
        self._blocks: dict[str, torch.Tensor] = {}

    def add(self, sample: dict[str, Any]) -> dict[str, Any]:
        """The sample with its tensors in the next row; those of another shape than the first sample's stay alone."""
        moved = {
            name: self._in_row(name, value) if isinstance(value, torch.Tensor) else value
            for name, value in sample.items()
        }
        self._used += 1
        return moved

    def _in_row(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if name not in self._blocks:
            self._blocks[name] = _empty((self._samples, *value.shape), value.dtype)
        row = self._blocks[name][self._used]
        return row.copy_(value) if (row.shape, row.dtype) == (value.shape, value.dtype) else value


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """`torch.empty` in memory of an earlier batch, or in huge pages, which NumPy asks for and PyTorch does not."""
    size = math.prod(shape) * dtype.itemsize
    memory = _take(size + _ALIGNMENT)
    start = -memory.ctypes.data % _ALIGNMENT
    # Cut before it becomes a tensor: an offset within the tensor would outlive the way to another process.
    used = memory[start : start + size]
    weakref.finalize(used, _free.append, memory).atexit = False  # whatever shares the tensor's memory keeps `used`
    return torch.from_numpy(used).view(dtype).view(shape)


def _take(size: int) -> np.ndarray:
    for _ in range(len(_free)):
        memory = _free.popleft()
        if len(memory) == size:
            return memory
        _free.append(memory)
    return np.empty(size, np.uint8)


def stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.stack`; where the tensors are the rows of a batch already, the batch itself, which shares their memory."""
    first = tensors[0]
    place, step = first.untyped_storage().data_ptr(), first.nbytes
    if all(
        tensor.untyped_storage().data_ptr() == place
        and tensor.data_ptr() == first.data_ptr() + index * step
        and (tensor.shape, tensor.dtype) == (first.shape, first.dtype)
        and tensor.is_contiguous()
        for index, tensor in enumerate(tensors)
    ):
        return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))
    return torch.stack(list(tensors))
