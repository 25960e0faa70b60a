"""Multiply-adds of a forward pass: what PyTorch counts, and the selective scan's own arithmetic."""

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..models.rs4d_mixer import RS4DMixer

# Per time step, channel and state: decay of the state, its input (two factors), and the update. The readout is a matrix
# product in our scan, which PyTorch counts.
_SCAN_MULTIPLICATIONS = 3


def _linear_flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


# What `channels_last.linear` uses on CPUs; not every build of PyTorch has it.
_ONEDNN = {torch.ops.mkldnn._linear_pointwise: _linear_flops} if hasattr(torch.ops.mkldnn, "_linear_pointwise") else {}


def count_macs(model: nn.Module, pixel_values: torch.Tensor) -> float:
    """Multiply-adds of `model(pixel_values)`.

    Matrix products, convolutions and attention as `FlopCounterMode` counts them (two operations each), and for every
    selective scan 3 multiply-adds per step, channel and state, over all reading orders. Norms and activations are left
    out, as everywhere. Nothing is computed: model and images are taken to the meta device.

    Args:
        model: Any vision model.
        pixel_values: `(batch, channels, height, width)`.
    """
    ghost = copy.deepcopy(model).to("meta")
    return _count(ghost, pixel_values.to("meta", next(ghost.parameters()).dtype))


def count_macs_of_pass(model: nn.Module, pixel_values: torch.Tensor) -> float:
    """The same of a real pass, for models whose arithmetic depends on what they find.

    RoIAlign and other sampling of maps is left out.
    """
    return _count(model, pixel_values)


def _count(model: nn.Module, pixel_values: torch.Tensor) -> float:
    scans = 0

    def add_scan(mixer: RS4DMixer, arguments: tuple[torch.Tensor, ...]) -> None:
        nonlocal scans
        batch, tokens, _ = arguments[0].shape
        scans += _SCAN_MULTIPLICATIONS * batch * tokens * len(mixer.order_names) * mixer.A_log.numel()

    mixers = [module for module in model.modules() if isinstance(module, RS4DMixer)]
    hooks = [mixer.register_forward_pre_hook(add_scan) for mixer in mixers]
    try:
        with FlopCounterMode(display=False, custom_mapping=_ONEDNN) as counter, torch.no_grad():
            model(pixel_values)
    finally:
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops() / 2 + scans
