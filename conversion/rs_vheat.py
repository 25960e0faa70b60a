"""Convert RS-vHeat checkpoints (arXiv 2411.17984; fine-tuned classifiers and pre-training files) for transformers.

    python conversion/rs_vheat.py ckpt_epoch_best.pth my-rs-vheat

No RS-vHeat weights have been published; the layouts are those the released training code writes and reads. That code
carries no licence: convert files you may use, and do not redistribute the result without asking.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_rsheat.conversion import heat
from hf_rsheat.conversion.common import run_script
from hf_rsheat.models.configuration_rs_vheat import RSVHeatConfig
from hf_rsheat.models.image_processing_rs_vheat import RSVHeatImageProcessor
from hf_rsheat.models.modeling_rs_vheat import RSVHeatBackbone, RSVHeatForImageClassification, RSVHeatModel

_STEMS = {"patch_embed_opt": ("stems.optical", 3), "patch_embed_sar": ("stems.sar", 1)}


def _modalities(found: dict[str, int]) -> dict[str, Any]:
    found = found or {"patch_embed_opt": 3}  # a file without a stem: its tensors will be listed as missing
    return {"modalities": {_STEMS[stem][0].removeprefix("stems."): channels for stem, channels in found.items()}}


def _processor(model: PreTrainedModel) -> RSVHeatImageProcessor:
    height, width = model.config.image_size_pair
    published = RSVHeatImageProcessor().modalities
    modalities = {
        name: published[name]
        if len(published[name]["image_mean"]) == channels
        else {"image_mean": [0.5] * channels, "image_std": [0.25] * channels}  # ours, for values 0 to 1
        for name, channels in model.config.modalities.items()
    }
    return RSVHeatImageProcessor(size={"height": height, "width": width}, modalities=modalities)


FAMILY = heat.Family(
    name="RS-vHeat",
    config_class=RSVHeatConfig,
    model_class=RSVHeatModel,
    classifier_class=RSVHeatForImageClassification,
    backbone_class=RSVHeatBackbone,
    stems=_STEMS,
    channels=_modalities,
    processor=_processor,
    foreign=("patch_embed.", "vheat"),
    droppable={
        "fuse_frequency": "fusion module of the pre-training model; its structure was never published",
        "^decoder": "pre-training decoder; its structure was never published",
    },
)


def convert(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    weights: str = "model",
    overrides: Mapping[str, Any] | None = None,
    image_size: int | tuple[int, int] | None = None,
    resize: str = "bilinear",
) -> Path:
    """Convert an RS-vHeat checkpoint into a Hub-ready folder.

    Depths, widths, image size, modalities, classes and layer scale come from the tensors; `post_norm` and
    `drop_path_rate` from the training configuration in the file. A file with a classifier becomes an
    `RSVHeatForImageClassification`, any other an `RSVHeatModel`; it has the modalities whose stems are in the file.

    Args:
        checkpoint: .pth, .pt or .safetensors file; nothing in it is executed.
        output_dir: Folder to write, with weights, configuration, image processor, code, card and provenance.json.
        weights: "model" or "model_ema": which weights of an epoch checkpoint.
        overrides: `RSVHeatConfig` fields that win over what was inferred.
        image_size: Resize both tables of every stage to this input size, pixels.
        resize: "bilinear" (the paper's), "bicubic" or "zero-pad" (frequency embeddings as the original's
            `interpolate4downstream` script, heat capacities bilinearly); only with `image_size`.

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
    run_script(convert, resize="bilinear")


if __name__ == "__main__":
    main()
