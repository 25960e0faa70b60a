"""Convert vHeat checkpoints (arXiv 2405.16555; classification, mmdetection and mmsegmentation files) for transformers.

    python conversion/vheat.py vHeat_tiny.pth my-vheat-tiny

The original code publishes no licence: convert files you may use, and do not redistribute the result without asking.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_rsheat.conversion import heat
from hf_rsheat.conversion.common import run_script
from hf_rsheat.models.configuration_vheat import VHeatConfig
from hf_rsheat.models.image_processing_vheat import VHeatImageProcessor
from hf_rsheat.models.modeling_vheat import VHeatBackbone, VHeatForImageClassification, VHeatModel


def _processor(model: PreTrainedModel) -> VHeatImageProcessor:
    config = model.config
    height, width = config.image_size_pair
    options: dict[str, Any] = {"do_center_crop": not isinstance(model, VHeatBackbone)}  # a backbone sees whole images
    if config.num_channels != 3:  # statistics of other sensors were never published: ours, for values 0 to 1
        options |= {"image_mean": [0.5] * config.num_channels, "image_std": [0.25] * config.num_channels}
    return VHeatImageProcessor(size={"height": height, "width": width}, **options)


FAMILY = heat.Family(
    name="vHeat",
    config_class=VHeatConfig,
    model_class=VHeatModel,
    classifier_class=VHeatForImageClassification,
    backbone_class=VHeatBackbone,
    stems={"patch_embed": ("stem", 3)},
    channels=lambda found: {"num_channels": found.get("patch_embed", 3)},
    processor=_processor,
    foreign=("heat_capacity.", "rs-vheat"),
)


def convert(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    weights: str = "model",
    overrides: Mapping[str, Any] | None = None,
    image_size: int | tuple[int, int] | None = None,
    resize: str = "bicubic",
) -> Path:
    """Convert a vHeat checkpoint into a Hub-ready folder.

    Depths, widths, image size, channels, classes and layer scale come from the tensors; `post_norm` and
    `drop_path_rate` from the training configuration in the file. A file with a classifier becomes a
    `VHeatForImageClassification`, one with output norms (detection, segmentation) a `VHeatBackbone`, any other a
    `VHeatModel`.

    Args:
        checkpoint: .pth, .pt or .safetensors file; nothing in it is executed.
        output_dir: Folder to write, with weights, configuration, image processor, code, card and provenance.json.
        weights: "model" or "model_ema": which weights of an epoch checkpoint.
        overrides: `VHeatConfig` fields that win over what was inferred.
        image_size: Resize the frequency embeddings to this input size, pixels.
        resize: "bicubic" (as vHeat's detection code at run time), "bilinear" or "zero-pad" (as its
            `interpolate4downstream` script); only with `image_size`. The ways are not interchangeable.

    Returns:
        The folder.

    Raises:
        UnsafeCheckpointError: The pickle names something that weights never need.
        CheckpointError: The file is damaged, saved in inference mode, or its tensors do not fit; all are listed.
        ConfigurationError: An override or option is unknown.
    """
    return heat.convert(
        FAMILY, checkpoint, output_dir, weights=weights, overrides=overrides, image_size=image_size, resize=resize
    )


def main() -> None:
    """Run the converter as a script."""
    run_script(convert, resize="bicubic")


if __name__ == "__main__":
    main()
