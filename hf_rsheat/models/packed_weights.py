"""Weights kept a second time, in the layout that oneDNN computes with.

oneDNN rewrites the weights of a linear map into blocks each time. For few positions (one image) that is a tenth of the
time; kept blocks save it and need the memory of the weights again.
"""

from collections.abc import MutableMapping

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary


class OptimizerSteps:
    """Counts optimiser steps in this process: fused optimisers change weights without bumping tensor versions."""

    count = 0

    @classmethod
    def increment(cls, *_: object) -> None:
        cls.count += 1


register_optimizer_step_post_hook(OptimizerSteps.increment)

# Keys are the weights themselves, which compiled code passes around as well. Values: the blocks, and what they are of.
_blocks: MutableMapping[torch.Tensor, tuple[torch.Tensor, tuple]] = WeakTensorKeyDictionary()
_halves: MutableMapping[torch.Tensor, tuple[torch.Tensor, ...]] = WeakTensorKeyDictionary()


def _state(weight: torch.Tensor) -> tuple:
    return weight._version, weight.data_ptr(), weight.dtype, OptimizerSteps.count


@torch.no_grad()
def pack(weight: torch.Tensor, *, in_halves: bool = False) -> None:
    """Keep the blocks of the weight `(out_features, in_features)` of a linear map for as long as it is unchanged.

    Changes through `weight.data[...]` are invisible to PyTorch and need another call.

    Args:
        weight: In float32 or bfloat16, on a CPU.
        in_halves: Whether it is used in two halves of its rows, see [`halves`].
    """
    with torch.inference_mode(False):
        if in_halves:
            _halves[weight] = weight.detach().chunk(2)
        for part in _halves[weight] if in_halves else (weight,):
            _blocks[part] = torch.ops.mkldnn._reorder_linear_weight(part.detach(), None), _state(part)


def packed(weight: torch.Tensor) -> torch.Tensor:
    """The weight's blocks, or the weight itself if there are none or it has changed since."""
    entry = _blocks.get(weight) if _blocks else None
    return entry[0] if entry is not None and entry[1] == _state(weight) else weight


def halves(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`weight.chunk(2)`; of a packed weight the very halves that are packed."""
    kept = _halves.get(weight) if _halves else None
    return kept if kept is not None and kept[0].data_ptr() == weight.data_ptr() else weight.chunk(2)
