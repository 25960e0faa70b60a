"""Convert RS4D (arXiv 2606.25324) for transformers: backbones (bare, multi-GPU and mmengine files) and detectors.

    python conversion/rs4d.py model_parameterskk.pth my-rs4d-base

The original repository holds no licence file: convert files you may use, and do not redistribute the result without
asking.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_rsheat.conversion import rs4d_instances
from hf_rsheat.conversion.common import (
    ConversionResult,
    Source,
    build_config,
    load_strictly,
    open_checkpoint,
    run_script,
    strip_prefixes,
)
from hf_rsheat.errors import CheckpointError, ConfigurationError
from hf_rsheat.hub import export
from hf_rsheat.models.configuration_rs4d import RS4DConfig
from hf_rsheat.models.image_processing_rs4d import RS4DImageProcessor
from hf_rsheat.models.modeling_rs4d import RS4DModel, resize_positions
from hf_rsheat.models.modeling_rs4d_instances import RS4DForInstanceSegmentation

RESIZE = "bicubic"

# Outside the layers: original name -> ours. `ln2` and `cls_token` are in no official file.
_TOP = {
    "pos_embed": "embeddings.position_embeddings",
    "cls_token": "embeddings.cls_token",
    "patch_embed.projection.weight": "embeddings.patch_embeddings.weight",
    "pre_norm.weight": "encoder.norm.weight",
    "pre_norm.bias": "encoder.norm.bias",
    "ln1.weight": "encoder.layernorm.weight",
    "ln1.bias": "encoder.layernorm.bias",
    "ln2.weight": "pooled_layernorm.weight",
    "ln2.bias": "pooled_layernorm.bias",
}
# Inside a layer the names are the same.
_MIXER = (
    "A_log",
    "D",
    "conv1d.weight",
    "conv1d.bias",
    "in_proj.weight",
    "x_proj.weight",
    "dt_proj.weight",
    "dt_proj.bias",
    "out_proj.weight",
)
_DROPPABLE = {r"^shared_image_embedding\.": "detection head of another framework"}


def tensor_names(num_layers: int) -> dict[str, str]:
    """Every tensor of the original backbone -> ours, for this many layers."""
    names = dict(_TOP)
    for i in range(num_layers):
        names |= {f"layers.{i}.{name}": f"encoder.layers.{i}.mixer.{name}" for name in _MIXER}
        names[f"gate_layers.{i}.0.weight"] = f"encoder.layers.{i}.mixer.gate.weight"
    return names


def infer_fields(source: Source, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Configuration fields from names and shapes, and notes on what had to be assumed.

    Raises:
        CheckpointError: The file is no RS4D backbone, or the position table is not square and no size was given.
    """
    tensors, notes = source.tensors, []
    layers = {int(m[1]) for m in (re.match(r"layers\.(\d+)\.", name) for name in tensors) if m}
    needed = ("pos_embed", "patch_embed.projection.weight", *(f"layers.0.{n}" for n in _MIXER if n != "D"))
    absent = [
        name for name in needed if name not in tensors or tensors[name].ndim < (1 if name.endswith("bias") else 2)
    ]
    if absent:
        raise CheckpointError(
            f"{source.source_name} is no RS4D backbone: it has no {', '.join(absent)}. Its tensors begin with "
            f"{', '.join(list(source.names.values())[:4])}."
        )
    patches, config = tensors["patch_embed.projection.weight"], "layers.0."
    fields: dict[str, Any] = {
        "num_channels": patches.shape[1],
        "patch_size": patches.shape[-1],
        "hidden_size": patches.shape[0],
        "num_hidden_layers": max(layers) + 1,
        "inner_size": tensors[f"{config}A_log"].shape[0],
        "state_size": tensors[f"{config}A_log"].shape[1],
        "time_step_rank": tensors[f"{config}dt_proj.weight"].shape[1],
        "conv_kernel": tensors[f"{config}conv1d.weight"].shape[-1],
        "final_norm": "ln1.weight" in tensors,
        "out_type": "avg_featmap" if "ln2.weight" in tensors else "featmap",
        "use_cls_token": "cls_token" in tensors,
    }
    fields["path_type"], assumed = _path_type(tensors)
    if assumed and "path_type" not in overrides:
        notes.append(
            "The file does not tell path_type; assumed forward_reverse_mean, as in all published configurations. Set "
            "it if you know better: --set path_type=forward."
        )
    if "image_size" not in overrides:
        tokens = tensors["pos_embed"].shape[1] - int(fields["use_cls_token"])
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise CheckpointError(
                f"The position table of {source.source_name} has {tokens} entries, which is no square grid: say the "
                "image size it belongs to, --set image_size=[HEIGHT,WIDTH]."
            )
        fields["image_size"] = side * fields["patch_size"]
    return fields, notes


def _path_type(tensors: Mapping[str, Tensor]) -> tuple[str, bool]:
    """The path type, and whether it is an assumption."""
    gate = tensors.get("gate_layers.0.0.weight")
    if gate is None:
        return "forward_reverse_mean", True
    return "forward_reverse_gate" if gate.shape[0] == 2 else "forward_reverse_shuffle_gate", False


def load(
    checkpoint: str | Path,
    *,
    weights: str = "model",
    overrides: Mapping[str, Any] | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> tuple[RS4DModel | RS4DForInstanceSegmentation, ConversionResult]:
    """Build the model a checkpoint holds, with its weights, in eval mode; and the account of its tensors."""
    source = open_checkpoint(checkpoint, weights, _DROPPABLE)
    model: RS4DModel | RS4DForInstanceSegmentation
    if any(strip_prefixes(name) == rs4d_instances.MARK for name in source.dropped):
        source = open_checkpoint(checkpoint, weights, keep_heads=True)
        model, result = rs4d_instances.assemble(source, overrides=overrides, image_size=image_size)
    else:
        model, result = assemble(source, overrides=overrides, image_size=image_size)
    result.log()
    return model.eval(), result


def assemble(
    source: Source, *, overrides: Mapping[str, Any] | None = None, image_size: int | tuple[int, int] | None = None
) -> tuple[RS4DModel, ConversionResult]:
    """As `load`, from a checkpoint that is already open."""
    config, result, unmapped = rename(source, overrides=overrides, image_size=image_size)
    model = RS4DModel(config)
    names = tensor_names(config.num_hidden_layers)
    load_strictly(model, result, unmapped, {ours: theirs for theirs, ours in names.items()})
    return model, result


def rename(
    source: Source, *, overrides: Mapping[str, Any] | None = None, image_size: int | tuple[int, int] | None = None
) -> tuple[RS4DConfig, ConversionResult, list[str]]:
    """The configuration, the tensors under our names, and the names in the file that no rule knows."""
    fields, notes = infer_fields(source, overrides or {})
    config = build_config(RS4DConfig, fields, overrides)
    names = tensor_names(config.num_hidden_layers)
    result = source.result(notes)
    unmapped = []
    for name, tensor in source.tensors.items():
        if name in names:
            result.state_dict[names[name]] = tensor
            result.key_map[source.names[name]] = names[name]
        else:
            unmapped.append(source.names[name])
    if image_size is not None and image_size != config.image_size:
        notes.append(f"Position table resized from {config.image_size} to {image_size} px ({RESIZE}).")
        resized = build_config(RS4DConfig, fields, {**(overrides or {}), "image_size": image_size})
        _resize(result.state_dict, config, resized)
        config = resized
    return config, result, unmapped


def _resize(state: dict[str, Tensor], old: RS4DConfig, new: RS4DConfig) -> None:
    name, start = "embeddings.position_embeddings", int(old.use_cls_token)
    table = state[name]
    if table.shape[1] - start == math.prod(old.grid_size):  # else the strict load explains what does not fit
        grid = resize_positions(table[:, start:], old.grid_size, new.grid_size)
        state[name] = table.new_empty(1, start + grid.shape[1], grid.shape[2])
        state[name][:, :start], state[name][:, start:] = table[:, :start], grid


def _processor(model: RS4DModel | RS4DForInstanceSegmentation) -> RS4DImageProcessor:
    config = getattr(model.config, "backbone_config", model.config)
    height, width = config.image_size_pair
    options: dict[str, Any] = {}
    if isinstance(model, RS4DForInstanceSegmentation):
        options = {"mask_layout": model.config.mask_layout, "return_pixel_mask": True}
    if config.num_channels != 3:  # statistics of other sensors were never published: ours, for values 0 to 1
        options |= {name: [value] * config.num_channels for name, value in (("image_mean", 0.5), ("image_std", 0.25))}
    return RS4DImageProcessor(size={"height": height, "width": width}, **options)


def convert(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    weights: str = "model",
    overrides: Mapping[str, Any] | None = None,
    image_size: int | tuple[int, int] | None = None,
    resize: str = RESIZE,
) -> Path:
    """Convert an RS4D checkpoint into a Hub-ready folder.

    A backbone becomes an `RS4DModel`, whose folder `RS4DBackbone` loads as well; a detector, with either head, an
    `RS4DForInstanceSegmentation` with the class names of the file. Sizes come from the tensors. A file with a backbone
    and other heads gives the backbone, and what is left out is logged.

    Args:
        checkpoint: .pth, .pt or .safetensors file; nothing in it is executed.
        output_dir: Folder to write, with weights, configuration, image processor, code, card and provenance.json.
        weights: "model" or "model_ema": which weights of a training checkpoint.
        overrides: Fields of `RS4DConfig` (of a detector: or `RS4DInstanceConfig`) that win over what was inferred, like
            `image_size` if the table is not square.
        image_size: Resize the position table to this input size, pixels.
        resize: How; only "bicubic", as at run time.

    Returns:
        The folder.

    Raises:
        UnsafeCheckpointError: The pickle names something that weights never need.
        CheckpointError: The file is damaged, or its tensors do not fit; all are listed.
        ConfigurationError: An override or option is unknown.
    """
    if resize != RESIZE:
        raise ConfigurationError(f"Position tables are resized with {RESIZE!r}, got resize={resize!r}.")
    model, result = load(checkpoint, weights=weights, overrides=overrides, image_size=image_size)
    return export(model, _processor(model), output_dir, provenance={"converter": "RS4D", **result.provenance()})


def main() -> None:
    """Run the converter as a script."""
    run_script(convert, resize=RESIZE)


if __name__ == "__main__":
    main()
