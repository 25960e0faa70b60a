"""Backbones by name: ours, transformers' and timm's, all with random weights and the published sizes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import ConfigurationError, MissingExtraError, did_you_mean

_DEEP: dict[str, Any] = {"depths": (2, 2, 18, 2), "post_norm": True, "layer_scale_init_value": 1e-5}
_VHEAT: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": _DEEP,
    "base": {**_DEEP, "hidden_sizes": (128, 256, 512, 1024)},
}
_SWIN: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
    "base": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},
}


def _vheat(size: str, image_size: int) -> nn.Module:
    from ..models.configuration_vheat import VHeatConfig
    from ..models.modeling_vheat import VHeatForImageClassification

    fields: dict[str, Any] = {"image_size": image_size, "num_labels": 1000, **_VHEAT[size]}
    return VHeatForImageClassification(VHeatConfig(**fields))


def _vheat_reference(size: str, image_size: int) -> nn.Module:
    from .vheat_reference import ReferenceVHeat

    return ReferenceVHeat(_vheat(size, image_size))  # type: ignore[arg-type]


def _rs_vheat(size: str, image_size: int) -> nn.Module:
    from ..models.configuration_rs_vheat import RSVHeatConfig
    from ..models.modeling_rs_vheat import RSVHeatModel

    return RSVHeatModel(RSVHeatConfig(image_size=image_size))


def _rs4d(size: str, image_size: int) -> nn.Module:
    from ..models.configuration_rs4d import RS4DConfig
    from ..models.modeling_rs4d import RS4DModel

    return RS4DModel(RS4DConfig.preset(size, image_size=image_size))


def _selective_mae(size: str, image_size: int) -> nn.Module:
    from ..models.configuration_selective_mae import SelectiveMAEConfig
    from ..models.modeling_selective_mae import SelectiveMAEModel

    return SelectiveMAEModel(SelectiveMAEConfig.preset(size, image_size=image_size))


def _swin(size: str, image_size: int) -> nn.Module:
    from transformers import SwinConfig, SwinModel

    return SwinModel(SwinConfig(image_size=image_size, **_SWIN[size]))


def _convnext(size: str, image_size: int) -> nn.Module:
    from transformers import ConvNextConfig, ConvNextModel

    return ConvNextModel(ConvNextConfig())


def _vit(size: str, image_size: int) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    widths: dict[str, Any] = (
        {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536} if size == "small" else {}
    )
    return ViTModel(ViTConfig(image_size=image_size, **widths))


def _sam_vit(size: str, image_size: int) -> nn.Module:
    from transformers import SamVisionConfig, SamVisionModel

    return SamVisionModel(SamVisionConfig(image_size=image_size))


_BUILDERS: dict[str, tuple[Callable[[str, int], nn.Module], str]] = {
    **{f"vheat-{size}": (_vheat, size) for size in _VHEAT},
    "vheat-tiny-reference": (_vheat_reference, "tiny"),
    "rs-vheat-base": (_rs_vheat, "base"),
    **{f"rs4d-{size}": (_rs4d, size) for size in ("small", "base", "large", "huge")},
    **{f"selective-mae-{size}": (_selective_mae, size) for size in ("small", "base", "large", "huge")},
    **{f"swin-{size}": (_swin, size) for size in _SWIN},
    "convnext-tiny": (_convnext, "tiny"),
    "vit-small": (_vit, "small"),
    "vit-base": (_vit, "base"),
    "sam-vit-base": (_sam_vit, "base"),
}


def names() -> list[str]:
    """All contestants that need no further name; `timm:<model>` is any classifier of timm's."""
    return sorted(_BUILDERS)


def build(name: str, image_size: int) -> nn.Module:
    """A contestant in eval mode.

    Args:
        name: One of [`names`], or `timm:<model>` (extra `bench`); `<name>@<share>` is the model slimmed to this share.
        image_size: Side of the images in pixels.

    Raises:
        ConfigurationError: There is none of this name.
        MissingExtraError: timm is not installed.
    """
    name, _, share = name.partition("@")
    if share:
        return _slimmed(build(name, image_size), share)
    torch.manual_seed(0)
    if name.startswith("timm:"):
        return _timm(name.removeprefix("timm:"), image_size).eval()
    if name not in _BUILDERS:
        raise ConfigurationError(f"Unknown contestant '{name}': {did_you_mean(name, [*_BUILDERS, 'timm:<model>'])}")
    builder, size = _BUILDERS[name]
    return builder(size, image_size).eval()


def _slimmed(model: Any, share: str) -> nn.Module:
    from ..slimming import slim

    try:
        width = float(share)
    except ValueError as error:
        raise ConfigurationError(f"A width is a number above 0 and at most 1, got '{share}'.") from error
    return slim(model, width).eval()


def _timm(model: str, image_size: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm", "bench", "A model of timm's") from error
    if not timm.is_model(model):
        raise ConfigurationError(f"timm has no model '{model}': {did_you_mean(model, timm.list_models())}")
    sized: dict[str, Any] = {"img_size": image_size} if model.startswith(("swin", "vit", "deit")) else {}
    return timm.create_model(model, **sized)
