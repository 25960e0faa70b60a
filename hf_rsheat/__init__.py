"""hf_rsheat: small, fast, explainable remote-sensing vision backbones for the Hugging Face Hub.

Importing the package registers its models with transformers' Auto classes. All public names load lazily.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_rsheat.hub.export import export
    from hf_rsheat.hub.verify import from_pretrained_verified, verify
    from hf_rsheat.models.configuration_heat_upernet import HeatUperNetConfig
    from hf_rsheat.models.configuration_rs4d import RS4DConfig
    from hf_rsheat.models.configuration_rs4d_instances import RS4DInstanceConfig
    from hf_rsheat.models.configuration_rs_vheat import RSVHeatConfig
    from hf_rsheat.models.configuration_selective_mae import SelectiveMAEConfig
    from hf_rsheat.models.configuration_vheat import VHeatConfig
    from hf_rsheat.models.frequency_masking import frequency_mask, frequency_target
    from hf_rsheat.models.image_processing_rs4d import RS4DImageProcessor
    from hf_rsheat.models.image_processing_rs_vheat import RSVHeatImageProcessor
    from hf_rsheat.models.image_processing_selective_mae import SelectiveMAEImageProcessor
    from hf_rsheat.models.image_processing_vheat import VHeatImageProcessor
    from hf_rsheat.models.input_channels import adapt_input_channels
    from hf_rsheat.models.modeling_heat_upernet import HeatUperNetForSemanticSegmentation
    from hf_rsheat.models.modeling_rs4d import RS4DBackbone, RS4DForImageClassification, RS4DModel
    from hf_rsheat.models.modeling_rs4d_distillation import RS4DForDistillation
    from hf_rsheat.models.modeling_rs4d_instances import RS4DForInstanceSegmentation
    from hf_rsheat.models.modeling_rs_vheat import (
        RSVHeatBackbone,
        RSVHeatForImageClassification,
        RSVHeatForPreTraining,
        RSVHeatModel,
    )
    from hf_rsheat.models.modeling_selective_mae import (
        SelectiveMAEBackbone,
        SelectiveMAEForImageClassification,
        SelectiveMAEForPreTraining,
        SelectiveMAEModel,
    )
    from hf_rsheat.models.modeling_vheat import VHeatBackbone, VHeatForImageClassification, VHeatModel
    from hf_rsheat.models.selective_scan import selective_scan
    from hf_rsheat.models.token_selection import select_tokens

__version__ = "0.1.0.dev0"

_MODULES = {
    "hub": ["export", "from_pretrained_verified", "verify"],
    "models.configuration_heat_upernet": ["HeatUperNetConfig"],
    "models.configuration_rs4d": ["RS4DConfig"],
    "models.configuration_rs4d_instances": ["RS4DInstanceConfig"],
    "models.configuration_rs_vheat": ["RSVHeatConfig"],
    "models.configuration_selective_mae": ["SelectiveMAEConfig"],
    "models.configuration_vheat": ["VHeatConfig"],
    "models.frequency_masking": ["frequency_mask", "frequency_target"],
    "models.image_processing_pil_rs4d": ["RS4DImageProcessorPil"],
    "models.image_processing_pil_rs_vheat": ["RSVHeatImageProcessorPil"],
    "models.image_processing_pil_selective_mae": ["SelectiveMAEImageProcessorPil"],
    "models.image_processing_pil_vheat": ["VHeatImageProcessorPil"],
    "models.image_processing_rs4d": ["RS4DImageProcessor"],
    "models.image_processing_rs_vheat": ["RSVHeatImageProcessor"],
    "models.image_processing_selective_mae": ["SelectiveMAEImageProcessor"],
    "models.image_processing_vheat": ["VHeatImageProcessor"],
    "models.input_channels": ["adapt_input_channels"],
    "models.modeling_heat_upernet": ["HeatUperNetForSemanticSegmentation"],
    "models.modeling_rs4d": ["RS4DBackbone", "RS4DForImageClassification", "RS4DModel"],
    "models.modeling_rs4d_distillation": ["RS4DForDistillation"],
    "models.modeling_rs4d_instances": ["RS4DForInstanceSegmentation"],
    "models.modeling_rs_vheat": [
        "RSVHeatBackbone",
        "RSVHeatForImageClassification",
        "RSVHeatForPreTraining",
        "RSVHeatModel",
    ],
    "models.modeling_selective_mae": [
        "SelectiveMAEBackbone",
        "SelectiveMAEForImageClassification",
        "SelectiveMAEForPreTraining",
        "SelectiveMAEModel",
    ],
    "models.modeling_vheat": ["VHeatBackbone", "VHeatForImageClassification", "VHeatModel"],
    "models.selective_scan": ["selective_scan"],
    "models.token_selection": ["select_tokens"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def _is_console_script() -> bool:
    """Whether we run as `hf-rsheat`, whose verbs register by themselves: its `--help` need not wait for torch."""
    return Path(sys.argv[0] if sys.argv else "").stem == "hf-rsheat"


if not _is_console_script():
    from hf_rsheat.auto import register

    register()
