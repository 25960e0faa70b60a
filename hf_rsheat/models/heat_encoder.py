"""Stem, layers and stages that vHeat and RS-vHeat share. Features are `(batch, height, width, channels)` inside."""

import math

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .channels_last import (
    VALUES_IN_CACHE,
    added,
    gelu,
    is_compiling_inference,
    is_tracing,
    linear_gelu_linear,
    overwritable,
    per_image_in_cache,
    respecting_hooks,
    strided_conv3x3,
)
from .heat_conduction import CachingModule, DerivedTensorCache, HeatConduction, resize_table


class PointwiseConv(nn.Linear):
    """A 1x1 convolution on channels-last features; initialised as a convolution, not as the trunk's linears."""


class HeatDropPath(nn.Module):
    """Stochastic depth per sample (arXiv 1603.09382); kept samples are divided by the keep probability."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return hidden_states
        keep_prob = 1.0 - self.drop_prob
        shape = (hidden_states.shape[0],) + (1,) * (hidden_states.ndim - 1)
        keep = torch.rand(shape, device=hidden_states.device) < keep_prob
        return hidden_states * (keep.to(hidden_states.dtype) / keep_prob)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


class HeatStem(nn.Module):
    """Two stride-2 3x3 convolutions with LayerNorm: image to features at a quarter of its size (rounded up)."""

    input_layer = "conv1"

    def __init__(self, num_channels: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_channels, dim // 2, kernel_size=3, stride=2, padding=1)
        self.norm1 = nn.LayerNorm(dim // 2, eps=1e-6)
        self.conv2 = nn.Conv2d(dim // 2, dim, kernel_size=3, stride=2, padding=1)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch, num_channels, height, width)` to `(batch, ceil(height / 4), ceil(width / 4), dim)`."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.conv1.in_channels:
            raise ValueError(
                f"Expected pixel_values of shape (batch, {self.conv1.in_channels}, height, width), got "
                f"{tuple(pixel_values.shape)}. For another number of channels load the model with "
                "`from_pretrained(..., num_channels=N)`."
            )
        with respecting_hooks(self):
            return per_image_in_cache(self._forward, pixel_values.to(self.conv1.weight.dtype))

    def _forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = pixel_values.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        x = gelu(self.norm1(strided_conv3x3(self.conv1, x)))
        return self.norm2(strided_conv3x3(self.conv2, x))


class HeatMLP(nn.Module):
    """linear -> GELU (erf) -> linear on every position."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = PointwiseConv(dim, hidden_dim)
        self.fc2 = PointwiseConv(hidden_dim, dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return linear_gelu_linear(self.fc1, self.fc2, hidden_states)


class HeatLayer(GradientCheckpointingLayer):
    """One block: heat conduction and MLP, each residual, with the norm before (`post_norm=False`) or after it."""

    def __init__(self, config, stage: int, drop_path: float) -> None:
        super().__init__()
        dim = config.hidden_sizes[stage]
        self.post_norm = config.post_norm
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.heat = HeatConduction(
            dim, config.inner_dim(stage), config.has_heat_capacity, table_interpolation=config.table_interpolation
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = HeatMLP(dim, config.mlp_hidden_dim(stage))
        self.drop_path = HeatDropPath(drop_path)
        self.layer_scale1: nn.Parameter | None = None
        self.layer_scale2: nn.Parameter | None = None
        if config.layer_scale_init_value is not None:
            self.layer_scale1 = nn.Parameter(torch.full((dim,), float(config.layer_scale_init_value)))
            self.layer_scale2 = nn.Parameter(torch.full((dim,), float(config.layer_scale_init_value)))

    def _heat_branch(self, x: torch.Tensor, *tables: torch.Tensor | None) -> torch.Tensor:
        x = self.norm1(self.heat(x, *tables)) if self.post_norm else self.heat(self.norm1(x), *tables)
        return x if self.layer_scale1 is None else x * self.layer_scale1

    def _mlp_branch(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm2(self.mlp(x)) if self.post_norm else self.mlp(self.norm2(x))
        return x if self.layer_scale2 is None else x * self.layer_scale2

    def forward(
        self,
        hidden_states: torch.Tensor,
        frequency_embedding: torch.Tensor,
        heat_capacity: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(batch, height, width, dim)` in and out; tables `(height, width, dim)`."""

        def conduct(x: torch.Tensor) -> torch.Tensor:
            return added(self.drop_path(self._heat_branch(x, frequency_embedding, heat_capacity)), x)

        with respecting_hooks(self):
            x = per_image_in_cache(conduct, hidden_states)
            if self.training or is_tracing() or not overwritable(x):
                return added(self.drop_path(self._mlp_branch(x)), x)
            return self._mlp_in_tiles(x)

    def _mlp_in_tiles(self, x: torch.Tensor) -> torch.Tensor:
        """The second half in inference, added in place to the temporary `x`, one tile of positions after the other."""
        positions = x.reshape(-1, x.shape[-1])
        tiles = math.ceil(len(positions) * self.mlp.fc1.out_features / VALUES_IN_CACHE)
        for tile in positions.chunk(tiles):
            tile += self._mlp_branch(tile)
        return positions.view_as(x)


class HeatDownsample(nn.Module):
    """Stride-2 3x3 convolution without bias, then LayerNorm."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(out_dim, eps=1e-5)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, height, width, dim)` to `(batch, ceil(height / 2), ceil(width / 2), out_dim)`."""
        with respecting_hooks(self):
            return self.norm(strided_conv3x3(self.conv, hidden_states))


class HeatStage(CachingModule):
    """Layers at one resolution with the tables they share, and the downsampling after them (not in the last stage)."""

    def __init__(self, config, stage: int) -> None:
        super().__init__()
        dim = config.hidden_sizes[stage]
        rows, columns = config.table_size(stage)
        self.table_interpolation = config.table_interpolation
        self.frequency_embedding = nn.Parameter(torch.zeros(rows, columns, dim))
        self.heat_capacity = nn.Parameter(torch.zeros(rows, columns, dim)) if config.has_heat_capacity else None
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
        first = sum(config.depths[:stage])
        self.layers = nn.ModuleList(HeatLayer(config, stage, rates[first + j]) for j in range(config.depths[stage]))
        is_last = stage == len(config.depths) - 1
        self.downsample = None if is_last else HeatDownsample(dim, config.hidden_sizes[stage + 1])
        self._table_caches = (DerivedTensorCache(), DerivedTensorCache())

    def caches(self) -> tuple[DerivedTensorCache, ...]:
        return self._table_caches

    def tables(self, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Frequency embedding and heat capacity at the size of the feature map (resized if they differ)."""
        first, second = self._table_caches
        frequency_embedding = self._resized(self.frequency_embedding, first, height, width)
        if self.heat_capacity is None:
            return frequency_embedding, None
        return frequency_embedding, self._resized(self.heat_capacity, second, height, width)

    def _resized(self, table: torch.Tensor, cache: DerivedTensorCache, height: int, width: int) -> torch.Tensor:
        exported_for_any_size = isinstance(height, torch.SymInt) or isinstance(width, torch.SymInt)
        if not exported_for_any_size and table.shape[0] == height and table.shape[1] == width:
            return table
        return cache.get(
            (table,),
            (height, width, table.device),
            lambda: resize_table(table, height, width, self.table_interpolation),
            enabled=not self.training,
        )

    def diffusivity(self, height: int | None = None, width: int | None = None) -> torch.Tensor:
        """Thermal diffusivity k >= 0 of every layer, `(layers, height, width, inner_dim)`, indexed by frequency.

        The same for every image. Without a size, at the size of the stored tables.
        """
        rows, columns, _ = self.frequency_embedding.shape
        table, _ = self.tables(height or rows, width or columns)
        return torch.stack([layer.heat.diffusivity(table) for layer in self.layers])

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the features of this stage and the input of the next, both `(batch, height, width, channels)`."""
        height, width = hidden_states.shape[1:3]
        if is_compiling_inference(hidden_states):  # nothing here compares sizes: one graph serves all
            table, heat_capacity = self.frequency_embedding, self.heat_capacity
            if heat_capacity is not None:
                heat_capacity = resize_table(heat_capacity, height, width, self.table_interpolation)
        else:
            table, heat_capacity = self.tables(height, width)
        for layer in self.layers:
            hidden_states = layer(hidden_states, table, heat_capacity)
        return hidden_states, hidden_states if self.downsample is None else self.downsample(hidden_states)


class HeatEncoder(nn.Module):
    """The stages in order."""

    def __init__(self, config) -> None:
        super().__init__()
        self.stages = nn.ModuleList(HeatStage(config, stage) for stage in range(len(config.depths)))

    def forward(self, hidden_states: torch.Tensor) -> list[torch.Tensor]:
        """Features of every stage before its downsampling, `(batch, height, width, channels)` each."""
        features = []
        for stage in self.stages:
            stage_features, hidden_states = stage(hidden_states)
            features.append(stage_features)
        return features


def to_channels_first(features: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Views of channels-last features as `(batch, channels, height, width)`."""
    return tuple(feature.permute(0, 3, 1, 2) for feature in features)
