"""Multiply-adds of a forward pass: what PyTorch counts, and the selective scan's own arithmetic."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..models.rs4d_mixer import RS4DMixer

# Per time step, channel and state: decay of the state, its input (two factors), and the update. The readout is a matrix
# product in our scan, which PyTorch counts.
_SCAN_MULTIPLICATIONS = 3


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
    scans = 0

    def add_scan(mixer: RS4DMixer, arguments: tuple[torch.Tensor, ...]) -> None:
        nonlocal scans
        batch, tokens, _ = arguments[0].shape
        scans += _SCAN_MULTIPLICATIONS * batch * tokens * len(mixer.order_names) * mixer.A_log.numel()

    for module in ghost.modules():
        if isinstance(module, RS4DMixer):
            module.register_forward_pre_hook(add_scan)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ghost(pixel_values.to("meta", next(ghost.parameters()).dtype))
    return counter.get_total_flops() / 2 + scans
