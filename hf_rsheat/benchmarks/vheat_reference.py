"""vHeat the way its paper's code computes it, restated from its description: what our speed is compared with.

Features are `(batch, channels, height, width)`; every LayerNorm and every heat operator copies them to channels-last
and back; each DCT is a convolution of kernel 1 over one spatial axis; the decay is a power of a map, computed again
in each call. The outputs are those of our model, whose weights it borrows. In bfloat16, which the original refuses, its
tables are cast.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..models.heat_conduction import HeatConduction, cosine_basis
from ..models.heat_encoder import HeatLayer, HeatStage
from ..models.modeling_vheat import VHeatForImageClassification


def _norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return norm(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2).contiguous()


def transform_of_original(x: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """DCT-II or its inverse over both axes of `(batch, height, width, channels)`, each a convolution of kernel 1."""
    batch, height, width, channels = x.shape
    rows, columns = (cosine_basis(size, dtype=x.dtype, device=x.device) for size in (height, width))
    if inverse:
        rows, columns = rows.t().contiguous(), columns.t().contiguous()
    x = F.conv1d(x.contiguous().view(batch, height, -1), rows.unsqueeze(-1))
    x = F.conv1d(x.contiguous().view(-1, width, channels), columns.unsqueeze(-1))
    return x.contiguous().view(batch, height, width, channels)


def heat_of_original(operator: HeatConduction, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The operator on `(batch, channels, height, width)` with the frequency embedding `(height, width, channels)`."""
    _, _, height, width = x.shape
    x = operator.depthwise_conv(x).permute(0, 2, 3, 1).contiguous()
    signal, gate = operator.in_proj(x).chunk(2, dim=-1)
    signal = transform_of_original(signal)
    angles = [torch.linspace(0, math.pi, size + 1, device=x.device)[:-1] for size in (height, width)]
    decay = torch.exp(-(angles[0][:, None] ** 2 + angles[1][None, :] ** 2))
    signal = signal * torch.pow(decay[..., None], F.relu(operator.to_diffusivity(table))).to(signal.dtype)
    signal = transform_of_original(signal, inverse=True)
    x = operator.out_proj(operator.out_norm(signal) * F.silu(gate))
    return x.permute(0, 3, 1, 2).contiguous()


def _mlp(layer: HeatLayer, x: torch.Tensor) -> torch.Tensor:
    for linear, activation in ((layer.mlp.fc1, F.gelu), (layer.mlp.fc2, nn.Identity())):
        x = activation(F.conv2d(x, linear.weight[..., None, None], linear.bias))
    return x


class ReferenceVHeat(nn.Module):
    """`(batch, num_channels, height, width)` to logits, at the image size of the model's tables, without drop path.

    Args:
        model: Ours, with the norm before each branch (`post_norm=False`) and no layer scale, as vHeat-T; its parameters
            are shared.
    """

    def __init__(self, model: VHeatForImageClassification) -> None:
        super().__init__()
        if model.config.post_norm or model.config.layer_scale_init_value is not None:
            raise ValueError("The reference restates vHeat-T: post_norm=False and no layer scale.")
        self.model = model

    def _layer(self, layer: HeatLayer, x: torch.Tensor, stage: HeatStage) -> torch.Tensor:
        x = x + heat_of_original(layer.heat, _norm(layer.norm1, x), stage.frequency_embedding)
        return x + _mlp(layer, _norm(layer.norm2, x))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, num_labels)`."""
        stem = self.model.vheat.stem
        stages: Any = self.model.vheat.encoder.stages
        x = F.gelu(_norm(stem.norm1, stem.conv1(pixel_values)))
        x = _norm(stem.norm2, stem.conv2(x))
        for stage in stages:
            for layer in stage.layers:
                x = self._layer(layer, x, stage)
            if (downsample := stage.downsample) is not None:
                x = _norm(downsample.norm, downsample.conv(x))
        return self.model.classifier(_norm(self.model.vheat.layernorm, x).mean(dim=(2, 3)))
