"""UPerNet (arXiv 1807.10221) over a heat or an RS4D backbone: transformers' own heads, loadable without the package."""

from torch import nn
from transformers.models.upernet.modeling_upernet import (
    UperNetFCNHead,
    UperNetForSemanticSegmentation,
    UperNetHead,
    UperNetPreTrainedModel,
)

from .configuration_heat_upernet import HeatUperNetConfig
from .modeling_rs4d import RS4DBackbone
from .modeling_rs_vheat import RSVHeatBackbone
from .modeling_vheat import VHeatBackbone

BACKBONES = {backbone.config_class.model_type: backbone for backbone in (VHeatBackbone, RSVHeatBackbone, RS4DBackbone)}


class HeatUperNetForSemanticSegmentation(UperNetForSemanticSegmentation):
    """Stock [`UperNetForSemanticSegmentation`] that builds its backbone itself, without transformers' registry.

    An RS-vHeat backbone uses its default modality ("optical", or the only one). Give an RS4D backbone four
    `out_indices` and `add_fpn`.
    """

    config_class = HeatUperNetConfig
    config: HeatUperNetConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ("HeatLayer", "RS4DLayer")

    def __init__(self, config: HeatUperNetConfig) -> None:
        # Not the parent's __init__: it looks the backbone up in AutoBackbone, which knows it only with our package.
        UperNetPreTrainedModel.__init__(self, config)
        self.backbone = BACKBONES[config.backbone_config.model_type](config.backbone_config)
        channels = self.backbone.channels
        self.decode_head = UperNetHead(config, in_channels=channels)
        self.auxiliary_head = UperNetFCNHead(config, in_channels=channels) if config.use_auxiliary_head else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's first convolution. Quantisation and PEFT ask for it."""
        return self.backbone.get_input_embeddings()


__all__ = ["HeatUperNetForSemanticSegmentation"]
