"""Every model in a tiny size, with weights that exercise everything (at initialisation the decay is almost 1)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_rsheat import (
    HeatUperNetConfig,
    HeatUperNetForSemanticSegmentation,
    RSVHeatBackbone,
    RSVHeatConfig,
    RSVHeatForImageClassification,
    RSVHeatForPreTraining,
    RSVHeatImageProcessor,
    RSVHeatModel,
    VHeatBackbone,
    VHeatConfig,
    VHeatForImageClassification,
    VHeatImageProcessor,
    VHeatModel,
)

STAGES = ["stage1", "stage2", "stage3", "stage4"]
TINY = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "image_size": 64, "mlp_ratio": 2.0, "num_labels": 3}


def vheat_config(**fields) -> VHeatConfig:
    return VHeatConfig(**{**TINY, "drop_path_rate": 0.0, **fields})


def rs_vheat_config(**fields) -> RSVHeatConfig:
    return RSVHeatConfig(**{**TINY, "drop_path_rate": 0.0, "layer_scale_init_value": 0.5, **fields})


def upernet_config(backbone) -> HeatUperNetConfig:
    return HeatUperNetConfig(backbone_config=backbone, hidden_size=16, auxiliary_channels=8, num_labels=3)


@dataclass(frozen=True)
class Entry:
    """A model class, how to configure it, and the output that represents it."""

    build: Callable[[], PreTrainedModel]
    output: str
    processor: Callable

    def model(self) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.build()
        randomize(model)
        return model.eval()


def randomize(model: nn.Module) -> None:
    """Weights far enough from their initial values that every path matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "frequency_embedding" in name or "heat_capacity" in name:
                parameter.copy_(noise)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * noise)


ZOO = {
    "vheat": Entry(lambda: VHeatModel(vheat_config()), "last_hidden_state", VHeatImageProcessor),
    "vheat-classifier": Entry(
        lambda: VHeatForImageClassification(vheat_config(post_norm=True, layer_scale_init_value=0.5)),
        "logits",
        VHeatImageProcessor,
    ),
    "vheat-backbone": Entry(
        lambda: VHeatBackbone(vheat_config(out_features=STAGES)), "feature_maps", VHeatImageProcessor
    ),
    "vheat-upernet": Entry(
        lambda: HeatUperNetForSemanticSegmentation(upernet_config(vheat_config(out_features=STAGES))),
        "logits",
        VHeatImageProcessor,
    ),
    "rs-vheat": Entry(lambda: RSVHeatModel(rs_vheat_config()), "last_hidden_state", RSVHeatImageProcessor),
    "rs-vheat-pretraining": Entry(
        lambda: RSVHeatForPreTraining(rs_vheat_config()), "reconstruction", RSVHeatImageProcessor
    ),
    "rs-vheat-classifier": Entry(
        lambda: RSVHeatForImageClassification(rs_vheat_config(post_norm=False)), "logits", RSVHeatImageProcessor
    ),
    "rs-vheat-backbone": Entry(
        lambda: RSVHeatBackbone(rs_vheat_config(out_features=STAGES)), "feature_maps", RSVHeatImageProcessor
    ),
    "rs-vheat-upernet": Entry(
        lambda: HeatUperNetForSemanticSegmentation(upernet_config(rs_vheat_config(out_features=STAGES))),
        "logits",
        RSVHeatImageProcessor,
    ),
}


def main_output(entry: Entry, outputs) -> torch.Tensor:
    """The one tensor that represents a model's output (the last map of a backbone)."""
    value = getattr(outputs, entry.output)
    return value[-1] if isinstance(value, tuple) else value
