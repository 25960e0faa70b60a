"""Heat encoders rebuilt for inference on a CPU: the same function in fewer and faster steps.

Weights lie in the blocks that oneDNN computes with and otherwise makes of them in every call; layer scale is part of
them; activations and residuals belong to the matrix product before them.
"""

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .channels_last import (
    ONEDNN_TYPES,
    VALUES_IN_CACHE,
    has_forward_hooks,
    has_onednn_linear,
    is_plain,
    is_tracing,
    onednn_linear,
    per_image_in_cache,
)
from .heat_conduction import MAX_CACHED_VALUES, HeatConduction, cosine_basis
from .heat_encoder import HeatDownsample, HeatEncoder, HeatLayer, HeatMLP, HeatStem

# Up to this size of a map one product over all positions is faster than one for each axis.
_FEW_POSITIONS = 64


class PackedLinear:
    """A linear map `(..., in_features)` to `(..., out_features)` without gradients.

    Args:
        weight: `(out_features, in_features)`, float32 or bfloat16, on a CPU.
        bias: `(out_features,)`.
        scale: `(out_features,)`, multiplied with the results.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        if scale is not None:
            weight, bias = weight * scale[:, None], bias * scale
        self.out_features = len(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self.bias = bias.contiguous()

    def __call__(self, x: torch.Tensor, activation: str = "none") -> torch.Tensor:
        """`activation` is "none", "gelu" (erf) or "swish" (SiLU)."""
        return onednn_linear(x, self.weight, self.bias, activation)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The map of `x`, plus `residual` `(..., out_features)`."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")


class PackedConv3x3(nn.Module):
    """A 3x3 convolution with padding 1 on `(batch, height, width, channels)`, without gradients.

    Which blocks are fast depends on the shape of the input: those for the latest shape are kept beside the weight.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.in_channels = conv.in_channels
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry = ([1, 1], list(conv.stride), [1, 1], conv.groups)  # padding, stride, dilation
        self._packed: tuple[torch.Size, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same layout out."""
        image, packed = x.permute(0, 3, 1, 2), self._packed
        if packed is None or packed[0] != image.shape:
            blocks = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.geometry, image.shape)
            packed = self._packed = image.shape, blocks
        result = torch.ops.mkldnn._convolution_pointwise.default(
            image, packed[1], self.bias, *self.geometry, "none", [], ""
        )
        return result.permute(0, 2, 3, 1)


class _Conduction:
    """Heat conduction in one layer at one size, `(batch, height, width, channels)` in and out, without gradients.

    Args:
        heat: The layer's operator.
        table: The frequency embedding of this size.
        size: Height and width.
    """

    def __init__(self, heat: HeatConduction, table: torch.Tensor, size: tuple[int, int]) -> None:
        self.size = size
        self.decay = heat.decay(table, table.dtype)
        bases = [cosine_basis(length) for length in size]
        if math.prod(size) <= _FEW_POSITIONS:
            bases = [torch.kron(*bases)]  # for a map as one long row
        self.bases = [basis.to(table.dtype) for basis in bases]
        self.inverse_bases = [basis.T.to(table.dtype).contiguous() for basis in bases]

    def __call__(self, signal: torch.Tensor) -> torch.Tensor:
        batch, _, width, channels = shape = signal.shape
        rows, *columns = self.bases
        x = _left_product(rows, signal.view(batch, len(rows), -1))
        for basis in columns:
            x = _each_left_product(basis, x.view(-1, width, channels))
        x = x.view(shape).mul_(self.decay)
        rows, *columns = self.inverse_bases
        for basis in columns:
            x = _each_left_product(basis, x.view(-1, width, channels))
        return _left_product(rows, x.view(batch, len(rows), -1)).view(shape)


def _left_product(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`matrix @ x` of `(m, n)` and `(batch, n, columns)`."""
    if len(x) > 1:
        return _each_left_product(matrix, x)
    return onednn_linear(matrix, x[0].T, None, "none")


def _each_left_product(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.bmm(matrix.expand(len(x), -1, -1), x)


class FusedHeatLayer(nn.Module):
    """What a [`HeatLayer`] computes in inference on a CPU, to rounding.

    Args:
        layer: In eval mode, without gradients; is taken apart.
    """

    def __init__(self, layer: HeatLayer) -> None:
        super().__init__()
        heat, mlp = layer.heat, layer.mlp
        scales = layer.layer_scale1, layer.layer_scale2
        self.post_norm, self.norm1, self.norm2 = layer.post_norm, layer.norm1, layer.norm2
        if self.post_norm:
            for norm, scale in zip((self.norm1, self.norm2), scales, strict=True):
                if scale is not None:
                    norm.weight.mul_(scale)
                    norm.bias.mul_(scale)
            scales = None, None
        (signal, gate), biases = heat.in_proj.weight.chunk(2), heat.in_proj.bias.chunk(2)
        self.signal_proj, self.gate_proj = PackedLinear(signal, biases[0]), PackedLinear(gate, biases[1])
        self.out_proj = PackedLinear(heat.out_proj.weight, heat.out_proj.bias, scales[0])
        self.fc1 = PackedLinear(mlp.fc1.weight, mlp.fc1.bias)
        self.fc2 = PackedLinear(mlp.fc2.weight, mlp.fc2.bias, scales[1])
        del heat.in_proj, heat.out_proj
        heat.depthwise_conv = PackedConv3x3(heat.depthwise_conv)
        self.heat = heat
        self._conduction: _Conduction | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        frequency_embedding: torch.Tensor,
        heat_capacity: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(batch, height, width, dim)` in and out; tables `(height, width, dim)`."""
        return per_image_in_cache(lambda x: self._forward(x, frequency_embedding, heat_capacity), hidden_states)

    def _forward(self, x: torch.Tensor, table: torch.Tensor, heat_capacity: torch.Tensor | None) -> torch.Tensor:
        y = self._mixed_with_neighbours(x, heat_capacity)
        conducted = self._conduct([self.signal_proj(y)], table)
        tiles = math.ceil(x.numel() // x.shape[-1] * self.fc1.out_features / VALUES_IN_CACHE)
        if tiles <= 1:
            return self._of_positions(conducted, y, x)
        for tile in zip(*(each.flatten(0, 2).chunk(tiles) for each in (conducted, y, x)), strict=True):
            tile[0].copy_(self._of_positions(*tile))
        return conducted

    def _mixed_with_neighbours(self, x: torch.Tensor, heat_capacity: torch.Tensor | None) -> torch.Tensor:
        """Up to the depthwise convolution; of large maps in bands of rows, which stay in the cache."""
        _, height, width, channels = x.shape
        rows = max(8, VALUES_IN_CACHE // (4 * width * channels))  # at most a quarter is computed twice
        if rows >= height or len(x) > 1:
            return self._depthwise(x, heat_capacity)
        result = torch.empty_like(x)
        for start in range(0, height, rows):
            stop, top, bottom = min(height, start + rows), max(0, start - 1), min(height, start + rows + 1)
            band = self._depthwise(x[:, top:bottom], None if heat_capacity is None else heat_capacity[top:bottom])
            result[:, start:stop] = band[:, start - top : stop - top]
        return result

    def _depthwise(self, x: torch.Tensor, heat_capacity: torch.Tensor | None) -> torch.Tensor:
        y = x if self.post_norm else self.norm1(x)
        if self.heat.correction_norm is not None:
            y = self.heat.correction_norm(F.relu(y + heat_capacity, inplace=True))
        return self.heat.depthwise_conv(y)

    def _of_positions(self, conducted: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The rest, which no longer mixes positions, `(..., dim)`: from the gate to the end of the MLP."""
        y = self.heat.out_norm(conducted).mul_(self.gate_proj(y, "swish"))
        if self.post_norm:
            x = self.norm1(self.out_proj(y)).add_(x)
            return self.norm2(self.fc2(self.fc1(x, "gelu"))).add_(x)
        x = self.out_proj.plus(y, x)
        return self.fc2.plus(self.fc1(self.norm2(x), "gelu"), x)

    def _conduct(self, signal: list[torch.Tensor], table: torch.Tensor) -> torch.Tensor:
        """As [`HeatConduction.conduct`]; bases and decay of the latest size are kept unless they are large."""
        size = signal[-1].shape[1:3]
        if signal[-1][0].numel() >= MAX_CACHED_VALUES:
            return self.heat.conduct(signal, table)
        conduction = self._conduction
        if conduction is None or conduction.size != size:
            conduction = self._conduction = _Conduction(self.heat, table, size)
        return conduction(signal.pop())


class _FusedModule(nn.Module):
    """Stays as it is: on a CPU, in eval mode, of its type."""

    def __deepcopy__(self, memo: dict) -> nn.Module:
        return self  # packed weights cannot be copied, and need not be: nothing in it changes

    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            raise ValueError("A fused model cannot be trained: train the model that it was made of.")
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        for parameter in self.parameters():
            moved = fn(parameter[:0])
            if moved.dtype != parameter.dtype or moved.device != parameter.device:
                raise ValueError("A fused model cannot be moved or converted: do so before `fuse()`.")
        return self

    def _save_to_state_dict(self, *args, **kwargs) -> None:
        raise ValueError("A fused model cannot be saved: save the model that it was made of.")

    def refuse_tracing(self) -> None:
        """A graph for others cannot hold packed weights."""
        if is_tracing():
            raise ValueError("A fused model cannot be exported: export the model that it was made of.")


class FusedHeatStem(_FusedModule):
    """A [`HeatStem`] with packed convolutions."""

    def __init__(self, stem: HeatStem) -> None:
        super().__init__()
        stem.conv1, stem.conv2 = PackedConv3x3(stem.conv1), PackedConv3x3(stem.conv2)
        self.stem = stem

    @torch.compiler.disable
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """As [`HeatStem.forward`]."""
        self.refuse_tracing()
        return self.stem(pixel_values)


class FusedHeatEncoder(_FusedModule):
    """A [`HeatEncoder`] of [`FusedHeatLayer`]s."""

    def __init__(self, encoder: HeatEncoder) -> None:
        super().__init__()
        for stage in encoder.stages:
            stage.layers = nn.ModuleList(FusedHeatLayer(layer) for layer in stage.layers)
            if stage.downsample is not None:
                stage.downsample.conv = PackedConv3x3(stage.downsample.conv)
        self.encoder = encoder

    @property
    def stages(self) -> nn.ModuleList:
        """As [`HeatEncoder.stages`]."""
        return self.encoder.stages

    @torch.compiler.disable
    def forward(self, hidden_states: torch.Tensor) -> list[torch.Tensor]:
        """As [`HeatEncoder.forward`]."""
        self.refuse_tracing()
        with torch.autocast("cpu", enabled=False):  # packed weights have the type they have
            return self.encoder(hidden_states)


@torch.no_grad()
def fuse(model: nn.Module) -> None:
    """Replace stems and encoders of a fusable model, in eval mode and without gradients, by fused ones."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, HeatStem):
                setattr(module, name, FusedHeatStem(child))
            elif isinstance(child, HeatEncoder):
                setattr(module, name, FusedHeatEncoder(child))


def check_fusable(model: nn.Module) -> None:
    """Raises a `ValueError`, which says what to do, if something in the model cannot be fused."""
    if is_fused(model):
        raise ValueError("The model is fused already.")
    if not _has_packed_operators():
        raise ValueError(
            "Fused models need a PyTorch whose oneDNN operators for packed weights work as in PyTorch 2.15."
        )
    for parameter in model.parameters():
        if parameter.device.type != "cpu" or parameter.dtype not in ONEDNN_TYPES:
            raise ValueError(
                "Models can be fused in float32 and bfloat16 on a CPU; this one has weights of "
                f"{parameter.dtype} on {parameter.device}. On a GPU use torch.compile."
            )
    for module in model.modules():
        hooked = isinstance(module, HeatStem | HeatEncoder) and has_forward_hooks(module)
        if hooked or not all(is_plain(part) or is_plain(part, nn.Conv2d) for part in _maps(module)):
            raise ValueError(
                "A model with hooks, adapters or quantised weights cannot be fused: remove or merge them first."
            )


@lru_cache(maxsize=1)
@torch.no_grad()
def _has_packed_operators() -> bool:
    """Whether the operators, which are those of PyTorch's compiler, are there and mean what they meant."""
    if not has_onednn_linear():
        return False
    with torch.random.fork_rng(devices=[]):
        linear, conv = nn.Linear(16, 32), nn.Conv2d(16, 32, 3, stride=2, padding=1)
    x, residual = torch.arange(-72.0, 72.0).view(1, 3, 3, 16) / 72, torch.ones(1, 3, 3, 32)
    expected = [F.silu(linear(x)), linear(x) + 1, conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)]
    try:
        packed = PackedLinear(linear.weight, linear.bias)
        actual = [packed(x, "swish"), packed.plus(x, residual), PackedConv3x3(conv)(x)]
    except (AttributeError, RuntimeError, TypeError):
        return False
    return all(torch.allclose(*pair, atol=1e-5) for pair in zip(actual, expected, strict=True))


def _maps(module: nn.Module) -> list[nn.Module]:
    """The module's own linear maps and convolutions that are going to be packed."""
    if isinstance(module, HeatConduction):
        return [module.depthwise_conv, module.in_proj, module.to_diffusivity, module.out_proj]
    if isinstance(module, HeatMLP):
        return [module.fc1, module.fc2]
    if isinstance(module, HeatStem):
        return [module.conv1, module.conv2]
    return [module.conv] if isinstance(module, HeatDownsample) else []


def is_fused(model: nn.Module) -> bool:
    """Whether [`fuse`] has been here."""
    return any(isinstance(module, _FusedModule) for module in model.modules())
