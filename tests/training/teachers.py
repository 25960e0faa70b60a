"""Tiny SAM and SAM 2 models with random weights, in folders as their users have them."""

from pathlib import Path

import torch
from transformers import (
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2ImageProcessor,
    Sam2Model,
    Sam2VisionConfig,
    Sam2VisionModel,
    SamConfig,
    SamImageProcessor,
    SamModel,
    SamVisionConfig,
    SamVisionModel,
)

SIZE, CHANNELS = 64, 24


def save_sam(folder: Path, whole: bool = False, seed: int = 0, **processor) -> Path:
    """A SAM of 64 px images whose maps are `(24, 4, 4)`: the whole model or its vision encoder."""
    torch.manual_seed(seed)
    vision = SamVisionConfig(
        hidden_size=16,
        output_channels=CHANNELS,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        window_size=2,
        global_attn_indexes=[1],
        mlp_dim=24,
        initializer_range=0.02,
    )
    model = SamModel(SamConfig(vision_config=vision.to_dict())) if whole else SamVisionModel(vision)
    model.save_pretrained(folder)
    sizes = {"size": {"longest_edge": SIZE}, "pad_size": {"height": SIZE, "width": SIZE}}
    SamImageProcessor(**{**sizes, **processor}).save_pretrained(folder)
    return folder


def save_sam2(folder: Path, whole: bool = False) -> Path:
    """A SAM 2 whose coarsest neck level is `(24, 4, 4)` for 64 px images."""
    torch.manual_seed(0)
    hiera = Sam2HieraDetConfig(
        hidden_size=8,
        embed_dim_per_stage=[8, 16, 24, 32],
        num_attention_heads_per_stage=[1, 1, 1, 1],
        blocks_per_stage=[1, 1, 2, 1],
        global_attention_blocks=[3],
        window_size_per_stage=[2, 2, 2, 2],
        image_size=[SIZE, SIZE],
    )
    vision = Sam2VisionConfig(
        backbone_config=hiera.to_dict(), backbone_channel_list=[32, 24, 16, 8], fpn_hidden_size=CHANNELS
    )
    model = Sam2Model(Sam2Config(vision_config=vision.to_dict())) if whole else Sam2VisionModel(vision)
    model.save_pretrained(folder)
    Sam2ImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder
