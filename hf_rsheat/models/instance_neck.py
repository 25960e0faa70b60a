"""From a backbone's maps to the pyramid of five maps that proposals and heads look at (arXiv 2606.25324).

A plain backbone like RS4D has one stride: an aggregator joins its layers, and up- and downsampling make the pyramid. A
hierarchical one (vHeat, RS-vHeat) gets a feature pyramid network (arXiv 1612.03144) over its stages instead.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from .channels_last import respecting_hooks
from .configuration_rs4d_instances import RS4DInstanceConfig
from .instance_bands import by_bands


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of `(batch, channels, height, width)`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape in and out."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv_norm_relu(in_channels: int, channels: int, kernel_size: int, stride: int = 1) -> list[nn.Module]:
    """Convolution that keeps the size (but for its stride), batch norm, ReLU."""
    conv = nn.Conv2d(in_channels, channels, kernel_size, stride=stride, padding=kernel_size // 2)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU()]


class FeatureAggregator(nn.Module):
    """Joins maps of several layers into one, from the first layer to the last (and back, in the "Pa" variant)."""

    def __init__(self, in_channels: int, config: RS4DInstanceConfig) -> None:
        super().__init__()
        size, channels, layers = config.aggregator_size, config.feature_size, len(config.select_layers)
        self.downconvs = nn.ModuleList(
            nn.Sequential(*conv_norm_relu(in_channels, size, 1), *conv_norm_relu(size, size, 3)) for _ in range(layers)
        )
        self.hidden_convs = nn.ModuleList(nn.Sequential(*conv_norm_relu(size, size, 3)) for _ in range(layers))
        self.reverse_convs = nn.ModuleList(
            nn.Sequential(*conv_norm_relu(size, size, 3)) for _ in range(layers if config.aggregator_pa else 0)
        )
        self.fusion_conv = nn.Sequential(
            *conv_norm_relu(size, channels, 1),
            *conv_norm_relu(channels, channels, 3),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """Maps `(batch, in_channels, height, width)` of all selected layers to one `(batch, feature_size, ...)`."""
        reduced = [downconv(feature) for downconv, feature in zip(self.downconvs, maps, strict=True)]
        x = torch.zeros_like(reduced[0])
        for feature, hidden_conv in zip(reduced, self.hidden_convs, strict=True):
            x = x + feature
            x = x + hidden_conv(x)
        for i in range(len(self.reverse_convs) - 1, 0, -1):
            x = x + self.reverse_convs[i](x)
            x = x + self.reverse_convs[i - 1](reduced[i - 1])
        return self.fusion_conv(x)


class NormedConv(nn.Module):
    """Convolution without bias or activation, and a norm over channels."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = ChannelNorm(channels, eps=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, height, width)` of the same size."""
        return self.norm(self.conv(x))


class SimplePyramid(nn.Module):
    """One map to maps of 4x, 2x, 1x, 1/2 and 1/4 of its size; unlike in an FPN, no level sees a coarser one."""

    def __init__(self, config: RS4DInstanceConfig) -> None:
        super().__init__()
        channels = config.feature_size
        half, quarter = channels // 2, channels // 4

        def upsample(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
            return nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)

        self.fpn1 = nn.Sequential(
            upsample(channels, half), ChannelNorm(half, eps=1e-5), nn.GELU(), upsample(half, quarter)
        )
        self.fpn2 = nn.Sequential(upsample(channels, half))
        self.lateral_convs = nn.ModuleList(NormedConv(c, channels, 1) for c in (quarter, half, channels, channels))
        self.fpn_convs = nn.ModuleList(NormedConv(channels, channels, 3) for _ in range(4))
        self.adds_finer_level = config.fpn_pa

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """`(batch, feature_size, height, width)` to five maps, the finest first; odd sizes are halved upwards."""
        x = x.contiguous(memory_format=torch.channels_last)
        halved, same = F.max_pool2d(x, 2, ceil_mode=True), nn.Identity()
        sources = ((self.fpn1, x), (self.fpn2, x), (same, x), (same, halved))
        maps = []
        with respecting_hooks(self):
            for (resize, source), lateral, conv in zip(sources, self.lateral_convs, self.fpn_convs, strict=True):
                resized = by_bands(nn.Sequential(resize, lateral), source)
                maps.append(by_bands(conv, resized, halo=1))
        if self.adds_finer_level:
            for i in range(1, len(maps)):
                finer = F.interpolate(maps[i - 1], size=maps[i].shape[-2:], mode="bilinear")
                maps[i] = self.fpn_convs[i](maps[i] + finer)
        return [*maps, F.max_pool2d(maps[-1], 1, stride=2)]


class PlainNeck(nn.Module):
    """Aggregator and simple pyramid over the layers of a plain backbone."""

    def __init__(self, channels: list[int], config: RS4DInstanceConfig) -> None:
        super().__init__()
        self.image_channels = channels[-1]
        self.positions = [config.out_indices.index(layer + 1) for layer in config.select_layers]
        self.aggregator = FeatureAggregator(channels[-1], config)
        self.pyramid = SimplePyramid(config)

    def forward(self, maps: tuple[torch.Tensor, ...]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Maps of `config.out_indices` to the pyramid, finest first, and the image's embedding: the last map."""
        aggregated = self.aggregator([maps[position] for position in self.positions])
        return self.pyramid(aggregated), maps[-1]


class HierarchicalNeck(nn.Module):
    """Feature pyramid network over the four stages of a hierarchical backbone."""

    def __init__(self, channels: list[int], config: RS4DInstanceConfig) -> None:
        super().__init__()
        self.image_channels = config.feature_size
        self.pyramid = FeaturePyramidNetwork(channels, config.feature_size, extra_blocks=LastLevelMaxPool())

    def forward(self, maps: tuple[torch.Tensor, ...]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Maps of stages 1 to 4 to the pyramid, finest first, and the image's embedding: its level of stride 16."""
        levels = list(self.pyramid({f"p{i}": level for i, level in enumerate(maps)}).values())
        return levels, levels[2]


def instance_neck(channels: list[int], config: RS4DInstanceConfig) -> PlainNeck | HierarchicalNeck:
    """The neck that fits the backbone, whose maps have these channels."""
    return (HierarchicalNeck if config.is_hierarchical else PlainNeck)(channels, config)
