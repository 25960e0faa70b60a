"""Tensors that FSDP2 cuts over the processes, and the whole tensors that checkpoints hold."""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(value: torch.Tensor) -> torch.Tensor:
    """The whole tensor; a collective where it is sharded, so that every process calls it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def placed_like(reference: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A copy of a whole tensor, sharded like another one of its shape."""
    if isinstance(reference, DTensor) and value.shape == reference.shape:
        value = value.to(reference.device_mesh.device_type)
        return distribute_tensor(value, reference.device_mesh, reference.placements)
    return value.clone()
