"""Convert SelectiveMAE checkpoints (arXiv 2406.11933): pretraining, encoder-only, fine-tuned, and plain-MAE files.

    python conversion/selective_mae.py checkpoint-799.pth my-selective-mae
    python conversion/selective_mae.py checkpoint-799.pth my-vit --to vit

The repository's licence file says MIT, its readme Apache-2.0, and parts derive from MAE (CC BY-NC 4.0); no licence is
stated for the weights. Convert files you may use, and do not redistribute the result without asking.
"""

import re
import sys
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from hf_rsheat.conversion.common import (
    ConversionResult,
    Source,
    build_config,
    load_strictly,
    open_checkpoint,
)
from hf_rsheat.conversion.reader import SKIPPED_ENTRIES, read_checkpoint
from hf_rsheat.conversion.selective_mae_names import DEAD, DECODER, Target, missing_names, module_names, rename
from hf_rsheat.conversion.stock import export_stock
from hf_rsheat.errors import CheckpointError, ConfigurationError
from hf_rsheat.hub import export
from hf_rsheat.models.configuration_selective_mae import SelectiveMAEConfig
from hf_rsheat.models.image_processing_selective_mae import SelectiveMAEImageProcessor
from hf_rsheat.models.modeling_selective_mae import (
    SelectiveMAEForImageClassification,
    SelectiveMAEForPreTraining,
    SelectiveMAEModel,
)
from hf_rsheat.models.selective_mae_layers import resize_positions

_OURS: dict[str, Any] = {"projection": "embeddings.projection", "layers": "encoder.layers"}
_OUR_DECODER = {
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.position_embeddings",
    "blocks": "decoder.layers",
    "decoder_norm": "decoder.layernorm",
    "decoder_pred": "decoder.predictor",
}
_MAE_DECODER = {
    "decoder_embed": "decoder.decoder_embed",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "blocks": "decoder.decoder_layers",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}
_OUR_MODEL = Target(SelectiveMAEModel, SelectiveMAEConfig, **_OURS)
_VIT = Target(ViTModel, ViTConfig, options={"add_pooling_layer": False})
_VIT_MAE = Target(ViTMAEModel, ViTMAEConfig)
# Output format -> kind of file -> what it becomes.
TARGETS: dict[str, dict[str, Target]] = {
    "selective_mae": {
        "pretraining": Target(
            SelectiveMAEForPreTraining, SelectiveMAEConfig, "selective_mae.", decoder=_OUR_DECODER, **_OURS
        ),
        "mae": _OUR_MODEL,
        "encoder": _OUR_MODEL,
        "classifier": Target(SelectiveMAEForImageClassification, SelectiveMAEConfig, "selective_mae.", **_OURS),
        "mean-pool classifier": Target(
            SelectiveMAEForImageClassification, SelectiveMAEConfig, "selective_mae.", **_OURS
        ),
    },
    "vit": {
        "pretraining": _VIT,
        "mae": _VIT,
        "encoder": _VIT,
        "classifier": Target(ViTForImageClassification, ViTConfig, "vit."),
    },
    "vit_mae": {
        "pretraining": _VIT_MAE,
        "mae": Target(ViTMAEForPreTraining, ViTMAEConfig, "vit.", decoder=_MAE_DECODER),
        "encoder": _VIT_MAE,
    },
}
# Shapes do not tell the number of heads: those of the published sizes, by width.
_HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16}
_DECODER_HEADS = {256: 8, 512: 16}


def convert(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    weights: str = "model",
    overrides: Mapping[str, Any] | None = None,
    image_size: int | tuple[int, int] | None = None,
    to: str = "selective_mae",
) -> Path:
    """Convert a SelectiveMAE (or plain MAE) checkpoint into a Hub-ready folder.

    Sizes come from the tensors, ratios and loss from the arguments saved in the file. A file with a cross-attention
    decoder becomes a `SelectiveMAEForPreTraining`, one with a classifier a `SelectiveMAEForImageClassification`, any
    other (also a plain MAE, whose decoder is left out) a `SelectiveMAEModel`.

    Args:
        checkpoint: .pth, .pt or .safetensors file; nothing in it is executed.
        output_dir: Folder to write, with weights, configuration, image processor, card and provenance.json.
        weights: "model" or "model_ema": which weights of the checkpoint.
        overrides: Configuration fields that win over what was inferred, e.g. `num_attention_heads` of a custom size.
        image_size: Resize the position tables to this input size, pixels (bicubic, as the original's fine-tuning).
        to: "selective_mae" for our classes, "vit" for transformers' `ViTModel` or `ViTForImageClassification`,
            "vit_mae" for its `ViTMAEForPreTraining` (plain MAE files) or `ViTMAEModel` (the encoder of the others).

    Returns:
        The folder.

    Raises:
        UnsafeCheckpointError: The pickle names something that weights never need.
        CheckpointError: The file is damaged, of no kind that the output can hold, or its tensors do not fit.
        ConfigurationError: An override or option is unknown, or the number of heads must be given.
    """
    model, result = load(checkpoint, weights=weights, overrides=overrides, image_size=image_size, to=to)
    provenance = {"converter": f"SelectiveMAE to {to}", **result.provenance()}
    if to == "selective_mae":
        return export(model, _processor(model.config), output_dir, provenance=provenance)
    return export_stock(model, output_dir, provenance)


def load(
    checkpoint: str | Path,
    *,
    weights: str = "model",
    overrides: Mapping[str, Any] | None = None,
    image_size: int | tuple[int, int] | None = None,
    to: str = "selective_mae",
) -> tuple[PreTrainedModel, ConversionResult]:
    """Build the model a checkpoint holds, with its weights, in eval mode; and the account of its tensors."""
    if to not in TARGETS:
        raise ConfigurationError(f"`to` is one of {', '.join(TARGETS)}, got {to!r}.")
    source = open_checkpoint(checkpoint, weights, DEAD)
    arguments = saved_arguments(checkpoint)
    model, result = assemble(source, arguments, overrides=overrides, image_size=image_size, to=to)
    result.log()
    return model.eval(), result


def assemble(
    source: Source,
    arguments: Mapping[str, Any],
    *,
    overrides: Mapping[str, Any] | None,
    image_size: int | tuple[int, int] | None,
    to: str,
) -> tuple[PreTrainedModel, ConversionResult]:
    """As `load`, from a checkpoint that is already open and the training arguments saved in it."""
    result = source.result([])
    kind = kind_of(source)
    target = TARGETS[to].get(kind)
    if target is None:
        raise CheckpointError(f"{source.source_name} is a {kind}, which {to!r} cannot hold: convert to selective_mae.")
    fields = infer_fields(source, kind, target.decoder is not None, arguments, overrides or {}, result.notes)
    config = build_config(target.config_class, _known(fields, target.config_class), overrides)
    if image_size is not None and image_size != config.image_size:
        resized = build_config(
            target.config_class,
            _known(fields, target.config_class),
            {**(overrides or {}), "image_size": image_size},
        )
        result.notes.append(f"Position tables resized from {config.image_size} to {image_size} px (bicubic).")
        _resize_tables(source.tensors, _grid(config), _grid(resized))
        config = resized
    _adapt(source, target, kind, to, result)
    names = module_names(target, config.num_hidden_layers, getattr(config, "decoder_num_hidden_layers", 0))
    unmapped = rename(source, names, result)
    model = target.model_class(config, **(target.options or {}))
    load_strictly(model, result, unmapped, missing_names(names, model.state_dict()))
    return model, result


def kind_of(source: Source) -> str:
    """What a file is, by its tensor names.

    Raises:
        CheckpointError: It holds no Vision Transformer of this family.
    """
    names = source.tensors
    if "patch_embed.proj.weight" not in names or "pos_embed" not in names or "blocks.0.norm1.weight" not in names:
        raise CheckpointError(
            f"{source.source_name} is no SelectiveMAE checkpoint (it needs patch_embed.proj, pos_embed and blocks.*). "
            f"Its tensors begin with {', '.join(list(source.names.values())[:4])}."
        )
    if any(".cross_attn." in name for name in names):
        return "pretraining"
    if any(name.startswith("decoder_blocks.") for name in names):
        return "mae"
    if "head.weight" in names:
        return "mean-pool classifier" if "fc_norm.weight" in names else "classifier"
    return "encoder"


def saved_arguments(path: str | Path) -> dict[str, Any]:
    """The training arguments in the file (an argparse.Namespace there), if any; reads no tensors of the model."""
    if Path(path).suffix == ".safetensors":
        return {}
    checkpoint = read_checkpoint(path, skip=(*SKIPPED_ENTRIES, "model", "model_ema", "state_dict"))
    arguments = checkpoint.get("args") if isinstance(checkpoint, dict) else None
    return arguments if isinstance(arguments, dict) else {}


def infer_fields(
    source: Source,
    kind: str,
    with_decoder: bool,
    arguments: Mapping[str, Any],
    overrides: Mapping[str, Any],
    notes: list[str],
) -> dict[str, Any]:
    """Configuration fields from shapes, names and saved arguments; notes what had to be assumed."""
    tensors = source.tensors
    width, channels, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch_size,
        "image_size": _stored_image_size(tensors["pos_embed"].shape[1] - 1, patch_size, overrides),
        "num_hidden_layers": _depth(tensors, "blocks"),
        "intermediate_size": _rows(tensors, "blocks.0.mlp.fc1.weight", 4 * width),
        "num_attention_heads": _heads("", width, _HEADS, 64, overrides, notes),
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "layer_norm_eps": 1e-6,
        "use_mean_pooling": kind == "mean-pool classifier",
    }
    if with_decoder and "decoder_pos_embed" in tensors:
        decoder_width = tensors["decoder_pos_embed"].shape[-1]
        fields |= {
            "decoder_hidden_size": decoder_width,
            "decoder_num_hidden_layers": _depth(tensors, "decoder_blocks"),
            "decoder_intermediate_size": _rows(tensors, "decoder_blocks.0.mlp.fc1.weight", 4 * decoder_width),
            "decoder_num_attention_heads": _heads("decoder_", decoder_width, _DECODER_HEADS, 32, overrides, notes),
        }
        saved = {"mask_ratio": "mask_ratio", "norm_pix_loss": "norm_pix_loss"}
        if kind == "pretraining":
            saved |= {"kept_mask_ratio": "kept_mask_ratio", "smooth_epochs": "smooth_scale_epoch"}
        fields |= {ours: arguments[theirs] for ours, theirs in saved.items() if theirs in arguments}
    if kind.endswith("classifier"):
        fields["id2label"] = {i: f"LABEL_{i}" for i in range(len(tensors["head.weight"]))}
        fields["label2id"] = {label: i for i, label in fields["id2label"].items()}
        if isinstance(arguments.get("drop_path"), int | float):
            fields["drop_path_rate"] = arguments["drop_path"]
    return fields


def _stored_image_size(tokens: int, patch_size: int, overrides: Mapping[str, Any]) -> int | list[int] | tuple[int, int]:
    if "image_size" in overrides:
        return overrides["image_size"]
    side = isqrt(tokens)
    if side * side != tokens:
        raise ConfigurationError(
            f"The file has positions for {tokens} patches, which is no square: say their image size, e.g. "
            f"--set image_size=[{patch_size},{tokens * patch_size}]."
        )
    return side * patch_size


def _depth(tensors: Mapping[str, Tensor], blocks: str) -> int:
    found = (re.match(rf"{blocks}\.(\d+)\.", name) for name in tensors)
    return max((int(match[1]) for match in found if match), default=-1) + 1


def _rows(tensors: Mapping[str, Tensor], name: str, default: int) -> int:
    return tensors[name].shape[0] if name in tensors else default


def _heads(
    prefix: str, width: int, known: Mapping[int, int], per_head: int, overrides: Mapping[str, Any], notes: list[str]
) -> int:
    field = f"{prefix}num_attention_heads"
    if field in overrides:
        return overrides[field]
    if width in known:
        return known[width]
    if width % per_head:
        raise ConfigurationError(f"The file does not tell the number of heads for a width of {width}: --set {field}=N.")
    notes.append(f"The file does not tell {field}; assumed {width // per_head} ({per_head} channels each).")
    return width // per_head


def _known(fields: Mapping[str, Any], config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields that a configuration class has: stock ones know nothing of schedules and pooling."""
    return {name: value for name, value in fields.items() if hasattr(config_class, name) or name.endswith("label2id")}


def _grid(config: PreTrainedConfig) -> tuple[int, int]:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return height // config.patch_size, width // config.patch_size


def _resize_tables(tensors: dict[str, Tensor], stored: tuple[int, int], wanted: tuple[int, int]) -> None:
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in tensors and tensors[name].shape[1] == stored[0] * stored[1] + 1:
            table = tensors[name]
            tensors[name] = torch.cat((table[:, :1], resize_positions(table[:, 1:], stored, wanted)), dim=1)


def _adapt(source: Source, target: Target, kind: str, to: str, result: ConversionResult) -> None:
    """Leave out what the target has no place for, and keep its sums equal to the original's."""
    if target.decoder is None:
        for name in [name for name in source.tensors if re.match(DECODER, name)]:
            del source.tensors[name]
            result.dropped[source.names[name]] = f"decoder of a {kind} file, which {target.model_class.__name__} lacks"
    elif to == "selective_mae":
        source.tensors["decoder_pos_embed"] = source.tensors["decoder_pos_embed"][:, 1:]
        result.dropped[f"{source.names['decoder_pos_embed']}[:, 0]"] = "position of the class token, never used"
    positions = source.tensors["pos_embed"]
    if kind == "pretraining" and to != "selective_mae" and positions[:, 0].any():
        # In its pretraining the original adds no position to the class token; the stock models always do.
        source.tensors["pos_embed"] = torch.cat((torch.zeros_like(positions[:, :1]), positions[:, 1:]), dim=1)
        result.notes.append("The position of the class token is set to zero: pretraining never adds it.")


def _processor(config: PreTrainedConfig) -> SelectiveMAEImageProcessor:
    height, width = config.image_size_pair
    options: dict[str, Any] = {}
    if config.num_channels != 3:  # statistics of other sensors were never published: ours, for values 0 to 1
        options = {"image_mean": [0.5] * config.num_channels, "image_std": [0.25] * config.num_channels}
    return SelectiveMAEImageProcessor(size={"height": height, "width": width}, **options)


def main() -> None:
    """Run the converter as a script."""
    from hf_rsheat.cli import main as run

    sys.argv[1:1] = ["convert", "selective-mae"]
    run()


if __name__ == "__main__":
    main()
