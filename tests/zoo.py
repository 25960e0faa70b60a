"""Every model in a tiny size, with weights that exercise everything (at initialisation the decay is almost 1)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_rsheat import (
    HeatUperNetConfig,
    HeatUperNetForSemanticSegmentation,
    RS4DBackbone,
    RS4DConfig,
    RS4DForDistillation,
    RS4DForImageClassification,
    RS4DForInstanceSegmentation,
    RS4DImageProcessor,
    RS4DInstanceConfig,
    RS4DModel,
    RSVHeatBackbone,
    RSVHeatConfig,
    RSVHeatForImageClassification,
    RSVHeatForPreTraining,
    RSVHeatImageProcessor,
    RSVHeatModel,
    SelectiveMAEBackbone,
    SelectiveMAEConfig,
    SelectiveMAEForImageClassification,
    SelectiveMAEForPreTraining,
    SelectiveMAEImageProcessor,
    SelectiveMAEModel,
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


def rs4d_config(**fields) -> RS4DConfig:
    tiny = {"hidden_size": 16, "inner_size": 20, "num_hidden_layers": 2, "state_size": 4, "image_size": 64}
    return RS4DConfig(**{**tiny, "num_labels": 3, **fields})


def selective_mae_config(**fields) -> SelectiveMAEConfig:
    tiny = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 64}
    decoder = {"decoder_hidden_size": 12, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 3}
    return SelectiveMAEConfig(**{**tiny, **decoder, "num_labels": 3, **fields})


def upernet_config(backbone) -> HeatUperNetConfig:
    return HeatUperNetConfig(backbone_config=backbone, hidden_size=16, auxiliary_channels=8, num_labels=3)


def instance_config(backbone=None, head: str = "bbox", **fields) -> RS4DInstanceConfig:
    tiny = {"feature_size": 16, "aggregator_size": 8, "fc_size": 16, "mask_num_convs": 1, "num_labels": 3}
    if head == "prompt":
        decoder = {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 16, "iou_head_hidden_dim": 16}
        tiny["mask_decoder_config"] = decoder
    backbone = rs4d_config() if backbone is None else backbone
    numbers = {"rpn_max_per_img": 20, "rpn_max_per_img_train": 40, "rcnn_num_samples": 24, "max_per_img": 8}
    return RS4DInstanceConfig(**{"backbone_config": backbone, "head": head, **tiny, **numbers, **fields})


@dataclass(frozen=True)
class Entry:
    """A model class, how to configure it, the output that represents it, and the stride of its last feature map."""

    build: Callable[[], PreTrainedModel]
    output: str
    processor: Callable
    stride: int = 32

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
    "rs4d": Entry(lambda: RS4DModel(rs4d_config()), "last_hidden_state", RS4DImageProcessor),
    "rs4d-classifier": Entry(
        lambda: RS4DForImageClassification(rs4d_config(path_type="forward_reverse_gate", out_type="avg_featmap")),
        "logits",
        RS4DImageProcessor,
    ),
    "rs4d-distillation": Entry(
        lambda: RS4DForDistillation(rs4d_config(teacher_channels=24)), "feature_map", RS4DImageProcessor, stride=16
    ),
    "rs4d-backbone": Entry(
        lambda: RS4DBackbone(rs4d_config(out_indices=[1, 2])), "feature_maps", RS4DImageProcessor, stride=16
    ),
    "rs4d-upernet": Entry(
        lambda: HeatUperNetForSemanticSegmentation(
            upernet_config(rs4d_config(num_hidden_layers=4, out_indices=[1, 2, 3, 4], add_fpn=True))
        ),
        "logits",
        RS4DImageProcessor,
    ),
    "rs4d-instances": Entry(
        lambda: RS4DForInstanceSegmentation(instance_config()), "pred_masks", RS4DImageProcessor, stride=16
    ),
    "rs4d-prompted-instances": Entry(
        lambda: RS4DForInstanceSegmentation(instance_config(head="prompt")),
        "pred_masks",
        RS4DImageProcessor,
        stride=16,
    ),
    "selective-mae": Entry(
        lambda: SelectiveMAEModel(selective_mae_config()), "last_hidden_state", SelectiveMAEImageProcessor
    ),
    "selective-mae-pretraining": Entry(
        lambda: SelectiveMAEForPreTraining(selective_mae_config()), "logits", SelectiveMAEImageProcessor
    ),
    "selective-mae-classifier": Entry(
        lambda: SelectiveMAEForImageClassification(selective_mae_config(use_mean_pooling=True)),
        "logits",
        SelectiveMAEImageProcessor,
    ),
    "selective-mae-backbone": Entry(
        lambda: SelectiveMAEBackbone(selective_mae_config(out_features=["stage1", "stage2"])),
        "feature_maps",
        SelectiveMAEImageProcessor,
        stride=8,
    ),
}


def main_output(entry: Entry, outputs) -> torch.Tensor:
    """The one tensor that represents a model's output (the last map of a backbone)."""
    value = getattr(outputs, entry.output)
    return value[-1] if isinstance(value, tuple) else value
