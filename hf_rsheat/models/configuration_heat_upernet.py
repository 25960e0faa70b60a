"""Configuration of UPerNet over a heat or an RS4D backbone, loadable without the package."""

from huggingface_hub.dataclasses import strict
from transformers import UperNetConfig

from .configuration_rs4d import RS4DConfig
from .configuration_rs_vheat import RSVHeatConfig
from .configuration_vheat import VHeatConfig

BACKBONE_CONFIGS = {config.model_type: config for config in (VHeatConfig, RSVHeatConfig, RS4DConfig)}


@strict
class HeatUperNetConfig(UperNetConfig):
    r"""[`UperNetConfig`] whose backbone is a vHeat, an RS-vHeat or an RS4D; all other fields are its own.

    Args:
        backbone_config (`VHeatConfig`, `RSVHeatConfig`, `RS4DConfig` or `dict`, *optional*):
            The backbone; vHeat-T with the features of all four stages if `None`.
    """

    model_type = "heat_upernet"

    def __post_init__(self, **kwargs):
        backbone = self.backbone_config
        if backbone is None:
            backbone = {"model_type": "vheat", "out_features": ["stage1", "stage2", "stage3", "stage4"]}
        if isinstance(backbone, dict):
            model_type = backbone.get("model_type")
            if model_type not in BACKBONE_CONFIGS:
                raise ValueError(f"`backbone_config` must be one of {list(BACKBONE_CONFIGS)}, got {model_type!r}.")
            backbone = BACKBONE_CONFIGS[model_type].from_dict(backbone)
        self.backbone_config = backbone
        super().__post_init__(**kwargs)


__all__ = ["HeatUperNetConfig"]
