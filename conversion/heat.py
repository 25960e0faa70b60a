"""What the converters of vHeat and RS-vHeat share: their networks differ by a table, a norm and the stems only."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

from hf_rsheat.conversion.common import (
    RESIZE_MODES,
    ConversionResult,
    Source,
    build_config,
    load_strictly,
    open_checkpoint,
    resize_tables,
)
from hf_rsheat.errors import CheckpointError, ConfigurationError
from hf_rsheat.hub import export

STAGES = range(4)
IMAGENET_LAYER_SCALE = 1e-5  # the only value the authors use; it matters for fresh weights alone

# Inside a block: original name -> ours. `op.norm1` exists in RS-vHeat only.
_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "op.dwconv": "heat.depthwise_conv",
    "op.norm1": "heat.correction_norm",
    "op.linear": "heat.in_proj",
    "op.to_k.0": "heat.to_diffusivity",
    "op.out_norm": "heat.out_norm",
    "op.out_linear": "heat.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "gamma1": "layer_scale1",
    "gamma2": "layer_scale2",
}
_STEM = {"conv1": "conv1", "norm1.1": "norm1", "conv2": "conv2", "norm2.1": "norm2"}


@dataclass(frozen=True)
class Family:
    """A model family: its classes and where its names differ.

    Attributes:
        name: As printed.
        config_class, model_class, classifier_class, backbone_class: What a file can become.
        stems: Name of each stem in the file -> (ours, its usual channels).
        channels: Channels of the stems in the file, by their names there -> configuration fields.
        processor: Model -> image processor.
        foreign: A piece of tensor names that only the other family has, and the converter to use then.
        droppable: Patterns of tensors that may be left out -> why.
    """

    name: str
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    classifier_class: type[PreTrainedModel]
    backbone_class: type[PreTrainedModel]
    stems: Mapping[str, tuple[str, int]]
    channels: Callable[[dict[str, int]], dict[str, Any]]
    processor: Callable[[PreTrainedModel], BaseImageProcessor]
    foreign: tuple[str, str]
    droppable: Mapping[str, str] = field(default_factory=dict)


def convert(
    family: Family,
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    weights: str,
    overrides: Mapping[str, Any] | None,
    image_size: int | tuple[int, int] | None,
    resize: str,
) -> Path:
    """Convert a checkpoint into a Hub-ready folder with a provenance.json; see the converters of the families."""
    model, result = load(family, checkpoint, weights=weights, overrides=overrides, image_size=image_size, resize=resize)
    provenance = {"converter": family.name, **result.provenance()}
    return export(model, family.processor(model), output_dir, provenance=provenance)


def load(
    family: Family,
    checkpoint: str | Path,
    *,
    weights: str,
    overrides: Mapping[str, Any] | None,
    image_size: int | tuple[int, int] | None,
    resize: str,
) -> tuple[PreTrainedModel, ConversionResult]:
    """Build the model a checkpoint holds, with its weights, in eval mode; and the account of its tensors."""
    if resize not in RESIZE_MODES:
        raise ConfigurationError(f"`resize` is one of {list(RESIZE_MODES)}, got {resize!r}.")
    source = open_checkpoint(checkpoint, weights, family.droppable)
    model, result = assemble(family, source, overrides=overrides, image_size=image_size, resize=resize)
    result.log()
    return model.eval(), result


def assemble(
    family: Family,
    source: Source,
    *,
    overrides: Mapping[str, Any] | None,
    image_size: int | tuple[int, int] | None,
    resize: str,
) -> tuple[PreTrainedModel, ConversionResult]:
    """As `load`, from a checkpoint that is already open."""
    piece, converter = family.foreign
    if any(piece in name for name in source.tensors):
        raise CheckpointError(f"{source.source_name} is not {family.name}: use `hf-rsheat convert {converter}`.")
    model_class = kind(family, source.tensors)
    fields, notes = infer_fields(family, source, overrides or {})
    config = build_config(family.config_class, fields, overrides)
    if image_size is not None and image_size != config.image_size:
        notes.append(f"Tables resized from {config.image_size} to {image_size} px ({resize}).")
        config = build_config(family.config_class, fields, {**(overrides or {}), "image_size": image_size})
    prefix = "" if model_class is not family.classifier_class else f"{model_class.base_model_prefix}."
    modules = module_names(family, config.depths, prefix)
    result = source.result(notes)
    unmapped = rename(source, modules, result)
    if model_class is family.model_class and not any(name.startswith("classifier.") for name in source.tensors):
        result.notes.append("The file has no final norm: `layernorm` is initialised to identity (weight 1, bias 0).")
        result.state_dict["layernorm.weight"] = torch.ones(config.hidden_sizes[-1])
        result.state_dict["layernorm.bias"] = torch.zeros(config.hidden_sizes[-1])
    if image_size is not None:
        resize_tables(result.state_dict, config, resize)
    model = model_class(config)
    inverse = {ours: theirs for theirs, ours in modules.items()}
    upstream_names = {name: _renamed(name, inverse) or "" for name in model.state_dict()}
    load_strictly(model, result, unmapped, upstream_names)
    return model, result


def kind(family: Family, tensors: Mapping[str, Tensor]) -> type[PreTrainedModel]:
    """The class a file becomes: a backbone if it has output norms, a classifier if it has a head, else the trunk."""
    if any(name.startswith("outnorm") for name in tensors):
        return family.backbone_class
    if any(name.startswith("classifier.3.") for name in tensors):
        return family.classifier_class
    return family.model_class


def module_names(family: Family, depths: list[int], prefix: str) -> dict[str, str]:
    """Every module (or raw parameter) of the original -> ours, spelled out for these depths."""
    names = {"classifier.0": f"{prefix}layernorm", "classifier.3": "classifier"}
    for theirs, (ours, _) in family.stems.items():
        names |= {f"{theirs}.{old}": f"{prefix}{ours}.{new}" for old, new in _STEM.items()}
    for i, depth in enumerate(depths):
        stage = f"{prefix}encoder.stages.{i}"
        names[f"freq_embed.{i}"] = f"{stage}.frequency_embedding"
        names[f"heat_capacity.{i}"] = f"{stage}.heat_capacity"
        names[f"outnorm{i}"] = f"{prefix}hidden_states_norms.stage{i + 1}"
        for j in range(depth):
            names |= {f"layers.{i}.{j}.{old}": f"{stage}.layers.{j}.{new}" for old, new in _BLOCK.items()}
        # The downsampling sits behind the blocks of its stage, in the same sequence.
        names[f"layers.{i}.{depth}.0"] = f"{stage}.downsample.conv"
        names[f"layers.{i}.{depth}.1"] = f"{stage}.downsample.norm"
    return names


def rename(source: Source, modules: Mapping[str, str], result: ConversionResult) -> list[str]:
    """Fill the result with our names and layouts; returns the names in the file that have no counterpart."""
    unmapped = []
    for name, tensor in source.tensors.items():
        target = _renamed(name, modules)
        if target is None:
            unmapped.append(source.names[name])
            continue
        if re.search(r"\.mlp\.fc[12]\.weight$", name) and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]  # a 1x1 convolution there, a linear layer here
        result.state_dict[target] = tensor
        result.key_map[source.names[name]] = target
    return unmapped


def _renamed(name: str, modules: Mapping[str, str]) -> str | None:
    if name in modules:
        return modules[name]
    module, _, leaf = name.rpartition(".")
    return f"{modules[module]}.{leaf}" if module in modules else None


def infer_fields(family: Family, source: Source, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Configuration fields from names, shapes and saved settings, and notes on what had to be assumed."""
    tensors, settings, notes = source.tensors, source.settings, []
    depths = [_depth(tensors, i) for i in STAGES]
    widths = [_size(tensors, -1, f"freq_embed.{i}", f"layers.{i}.0.norm1.weight") for i in STAGES]
    if 0 in depths or None in widths:
        raise CheckpointError(
            f"{source.source_name} is no {family.name} checkpoint: a stage has no blocks (layers.<stage>.<block>.op.*) "
            f"or no known width. Its tensors begin with {', '.join(list(source.names.values())[:4])}."
        )
    fields: dict[str, Any] = {"hidden_sizes": widths, "depths": depths, **_mlp_sizes(tensors, widths)}
    fields |= family.channels(
        {
            stem: _size(tensors, 1, f"{stem}.conv1.weight") or channels
            for stem, (_, channels) in family.stems.items()
            if any(name.startswith(f"{stem}.") for name in tensors)
        }
    )
    has_layer_scale = any(name.endswith(".gamma1") for name in tensors)
    saved_scale = settings.get("layer_scale_init_value")
    fields["layer_scale_init_value"] = float(saved_scale or IMAGENET_LAYER_SCALE) if has_layer_scale else None
    fields["post_norm"] = settings.get("post_norm", has_layer_scale)
    if "post_norm" not in settings and "post_norm" not in overrides:
        notes.append(
            f"The file does not tell post_norm; assumed {has_layer_scale}, as in released models "
            f"{'with' if has_layer_scale else 'without'} layer scale. Set it if you know better: --set post_norm="
            f"{str(not has_layer_scale).lower()}."
        )
    if "drop_path_rate" in settings:
        fields["drop_path_rate"] = settings["drop_path_rate"]
    return fields | _image_size(tensors) | _head_fields(source), notes


def _depth(tensors: Mapping[str, Tensor], stage: int) -> int:
    blocks = [int(m[1]) for m in (re.match(rf"layers\.{stage}\.(\d+)\.op\.", name) for name in tensors) if m]
    return max(blocks, default=-1) + 1


def _size(tensors: Mapping[str, Tensor], axis: int, *names: str) -> int | None:
    """Size along an axis of the first of these tensors that exists and has this axis."""
    return next((tensors[n].shape[axis] for n in names if n in tensors and tensors[n].ndim > max(axis, 0)), None)


def _mlp_sizes(tensors: Mapping[str, Tensor], widths: list) -> dict[str, Any]:
    hidden = [_size(tensors, 0, f"layers.{i}.0.mlp.fc1.bias", f"layers.{i}.0.mlp.fc1.weight") for i in STAGES]
    known = [(h, w) for h, w in zip(hidden, widths, strict=True) if h is not None]
    if not known:
        return {}
    ratio = known[0][0] / known[0][1]
    if all(int(w * ratio) == h for h, w in known):
        return {"mlp_ratio": ratio}
    return {"mlp_hidden_dims": [h or int(w * ratio) for h, w in zip(hidden, widths, strict=True)]}


def _image_size(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    for i in STAGES:
        for name in (f"freq_embed.{i}", f"heat_capacity.{i}"):
            if name in tensors and tensors[name].ndim == 3:
                height, width = (size * 4 * 2**i for size in tensors[name].shape[:2])
                return {"image_size": height if height == width else (height, width)}
    return {}


def _head_fields(source: Source) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    norms = sorted({m[1] for m in (re.match(r"outnorm(\d)\.", name) for name in source.tensors) if m})
    if norms:
        fields["out_features"] = [f"stage{int(i) + 1}" for i in norms]
    num_labels = _size(source.tensors, 0, "classifier.3.bias", "classifier.3.weight")
    if num_labels is not None:
        names = source.class_names if len(source.class_names or ()) == num_labels else None
        fields["id2label"] = dict(enumerate(names or [f"LABEL_{i}" for i in range(num_labels)]))
        fields["label2id"] = {label: i for i, label in fields["id2label"].items()}
    return fields
