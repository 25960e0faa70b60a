"""Tiny models of every architecture that can be slimmed."""

import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
)

from tests.zoo import ZOO, randomize

VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}

STOCK = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**VIT, intermediate_size=50, num_labels=3)),
    "vit-mae": lambda: ViTMAEModel(ViTMAEConfig(**VIT, intermediate_size=50, mask_ratio=0.0)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**VIT, mlp_ratio=2)),
    "dinov2-swiglu": lambda: Dinov2Model(Dinov2Config(**VIT, mlp_ratio=4, use_swiglu_ffn=True)),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**VIT, intermediate_size=50)),
    "dinov3-gated": lambda: DINOv3ViTModel(
        DINOv3ViTConfig(**VIT, intermediate_size=50, use_gated_mlp=True, num_register_tokens=2)
    ),
}
OURS = tuple(ZOO)
TRUNKS = (*(name for name in STOCK if name != "vit"), "vheat", "rs-vheat", "rs4d", "selective-mae")


def build(name: str) -> PreTrainedModel:
    """A model in evaluation mode with weights that exercise everything."""
    if name in ZOO:
        return ZOO[name].model()
    torch.manual_seed(0)
    model = STOCK[name]()
    randomize(model)
    return model.eval()


def images(model: PreTrainedModel, count: int = 2) -> torch.Tensor:
    """Random images `(count, 3, height, width)` of the size a model is made for."""
    config = getattr(model.config, "backbone_config", None) or model.config
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 3, config.image_size, config.image_size, generator=generator)


def outputs(model: PreTrainedModel, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """All tensors a forward pass returns, with what it draws fixed."""
    torch.manual_seed(5)
    with torch.no_grad():
        values = model(pixel_values).values()
    flat = [tensor for value in values for tensor in (value if isinstance(value, tuple) else (value,))]
    return [tensor for tensor in flat if tensor.is_floating_point()]


def difference(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """Largest difference of any output."""
    pixel_values = images(model)
    pairs = zip(outputs(model, pixel_values), outputs(other, pixel_values), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)
