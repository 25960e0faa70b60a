"""Convert RS4D's instance segmentation models: mmengine files with either head. `conversion.rs4d` calls this."""

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from torch import Tensor
from transformers import SamMaskDecoderConfig

from hf_rsheat.conversion import rs4d
from hf_rsheat.conversion.common import ConversionResult, Source, build_config, load_strictly
from hf_rsheat.errors import CheckpointError, ConfigurationError
from hf_rsheat.models.configuration_rs4d import RS4DConfig
from hf_rsheat.models.configuration_rs4d_instances import RS4DInstanceConfig
from hf_rsheat.models.modeling_rs4d_instances import RS4DForInstanceSegmentation

MARK = "roi_head.bbox_head.fc_cls.weight"  # what a detector has and a backbone has not
_DECODER = "roi_head.mask_head.mask_decoder.mask_decoder."
# Beginnings of names outside the backbone, the original's and ours; the first pair that fits counts.
_NAMES = (
    ("neck.feature_aggregator.", "neck.aggregator."),
    ("neck.feature_spliter.{}.norm_layer.", "neck.pyramid.{}.norm."),
    ("neck.feature_spliter.", "neck.pyramid."),
    ("rpn_head.rpn_conv.", "proposal_head.conv."),
    ("rpn_head.rpn_cls.", "proposal_head.classifier."),
    ("rpn_head.rpn_reg.", "proposal_head.regressor."),
    ("roi_head.bbox_head.shared_fcs.0.", "box_head.fc1."),
    ("roi_head.bbox_head.shared_fcs.1.", "box_head.fc2."),
    ("roi_head.bbox_head.fc_cls.", "box_head.classifier."),
    ("roi_head.bbox_head.fc_reg.", "box_head.regressor."),
    ("roi_head.mask_head.convs.{}.conv.", "mask_head.convs.{}."),
    ("roi_head.mask_head.upsample.", "mask_head.upsample."),
    ("roi_head.mask_head.conv_logits.", "mask_head.classifier."),
    ("roi_head.mask_head.point_emb.", "mask_head.point_emb."),
    ("roi_head.mask_head.no_mask_embed.", "mask_head.no_mask_embed."),
    (_DECODER, "mask_head.mask_decoder."),
    ("shared_image_embedding.shared_image_embedding.", "mask_head.shared_image_embedding."),
)
# Layers of the published configurations by (layers of the backbone, number selected, head); no file tells them.
_PUBLISHED_LAYERS = {
    (24, 11, "bbox"): range(1, 22, 2),
    (24, 12, "bbox"): range(1, 24, 2),
    (24, 11, "prompt"): range(2, 23, 2),
    (24, 3, "bbox"): (3, 10, 17),
    (28, 5, "bbox"): (2, 8, 14, 20, 26),
}


def our_name(name: str) -> str | None:
    """Our name of an original tensor outside the backbone; None if there is none."""
    return _translate(name, _NAMES)


def _translate(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    for beginning, other in pairs:
        if match := re.match(re.escape(beginning).replace(r"\{\}", "(.+)"), name):
            return other.format(*match.groups()) + name[match.end() :]
    return None


def assemble(
    source: Source, *, overrides: Mapping[str, Any] | None = None, image_size: int | tuple[int, int] | None = None
) -> tuple[RS4DForInstanceSegmentation, ConversionResult]:
    """Build the model a checkpoint holds, with its weights, and the account of its tensors.

    Args:
        source: An open checkpoint, with its neck and heads.
        overrides: Fields of `RS4DInstanceConfig` or, where that has none of the name, of the backbone's `RS4DConfig`.
        image_size: Resize the backbone's position table to this input size, pixels.

    Raises:
        CheckpointError: The tensors do not fit.
        ConfigurationError: An override is unknown, or does not fit.
    """
    own, backbone_overrides = _split(overrides or {})
    heads = {name: ours for name in source.tensors if (ours := our_name(name))}
    bare = {name: tensor for name, tensor in source.tensors.items() if name not in heads}
    backbone, result, unmapped = rs4d.rename(
        replace(source, tensors=bare), overrides=backbone_overrides, image_size=image_size
    )
    inferred, notes = infer_fields(source, backbone.num_hidden_layers, own)
    known = own.get("mask_decoder_config", {})
    if not isinstance(known, Mapping):
        raise ConfigurationError('`mask_decoder_config` is an object of its fields, e.g. {"num_attention_heads": 8}.')
    if decoder := {**inferred.get("mask_decoder_config", {}), **known}:
        own["mask_decoder_config"] = decoder
    config = build_config(RS4DInstanceConfig, {**inferred, "backbone_config": backbone.to_dict()}, own)
    if config.head == "prompt":
        _check_attention_heads(config.mask_decoder_config)
    result.notes.extend(notes)
    result.state_dict = {f"backbone.{name}": tensor for name, tensor in result.state_dict.items()}
    result.key_map = {name: f"backbone.{ours}" for name, ours in result.key_map.items()}
    for name, ours in heads.items():
        result.state_dict[ours] = source.tensors[name]
        result.key_map[source.names[name]] = ours
    model = RS4DForInstanceSegmentation(config)
    theirs = {f"backbone.{ours}": name for name, ours in rs4d.tensor_names(backbone.num_hidden_layers).items()}
    back = [(ours, original) for original, ours in _NAMES]
    theirs |= {name: original for name in model.state_dict() if (original := _translate(name, back))}
    load_strictly(model, result, unmapped, theirs)
    return model, result


def _check_attention_heads(decoder: SamMaskDecoderConfig) -> None:
    """Refuse a number of attention heads, which no tensor tells, that does not divide the attention's width."""
    width, heads = decoder.hidden_size // decoder.attention_downsample_rate, decoder.num_attention_heads
    if heads < 1 or width % heads:
        raise ConfigurationError(
            f"The mask decoder's attention is {width} wide, which {heads} heads do not divide. No "
            "tensor tells their number: say it, e.g. --set mask_decoder_config='{\"num_attention_heads\": 2}'."
        )


def _split(overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The overrides of the whole model, and those of its backbone."""
    own = {f.name for f in fields(RS4DInstanceConfig)}
    backbone = {f.name for f in fields(RS4DConfig)} - own
    chosen = {name: value for name, value in overrides.items() if name in backbone}
    return {name: value for name, value in overrides.items() if name not in chosen}, chosen


def infer_fields(source: Source, layers: int, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Configuration fields from names, shapes and the saved configuration, and notes on what had to be assumed.

    Args:
        source: The checkpoint.
        layers: Layers of its backbone.
        overrides: What the user knows.

    Raises:
        CheckpointError: A tensor that tells a size is missing, or the selected layers cannot be known.
    """
    tensors = source.tensors
    head = "prompt" if "roi_head.mask_head.point_emb.8.weight" in tensors else "bbox"
    fusion, reduced = "neck.feature_aggregator.fusion_conv.6.weight", "neck.feature_aggregator.downconvs.0.0.weight"
    anchors, fc = "rpn_head.rpn_cls.weight", "roi_head.bbox_head.shared_fcs.0.weight"
    absent = [name for name in (fusion, reduced, anchors, fc) if name not in tensors]
    if absent:
        raise CheckpointError(f"{source.source_name} is no complete RS4D detector: it has no {', '.join(absent)}.")
    scales = {3: (8,), 6: (4, 8)}.get(len(tensors[anchors]))
    found = {
        "head": head,
        "feature_size": len(tensors[fusion]),
        "aggregator_size": len(tensors[reduced]),
        "aggregator_pa": _count(tensors, r"neck\.feature_aggregator\.reverse_convs\.(\d+)\.") > 0,
        "anchor_scales": scales,
        "fc_size": len(tensors[fc]),
    }
    if scales is None and "anchor_scales" not in overrides:
        raise CheckpointError(
            f"{len(tensors[anchors])} anchors per place are in no published configuration: say their sides in strides, "
            "--set anchor_scales=[4,8]."
        )
    found |= _prompt_fields(tensors, overrides) if head == "prompt" else _mask_fields(tensors)
    names, notes = _class_names(source, len(tensors[MARK]) - 1)
    found |= names
    for more, note in (_layers(source, layers, head, overrides), _pyramid(source, layers, overrides)):
        found |= more
        notes += note
    return found, notes


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for match in (re.match(pattern, name) for name in tensors) if match})


def _mask_fields(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"mask_num_convs": _count(tensors, r"roi_head\.mask_head\.convs\.(\d+)\.")}


def _prompt_fields(tensors: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
    size = tensors["roi_head.mask_head.point_emb.0.weight"].shape[0]
    values = len(tensors["roi_head.mask_head.point_emb.8.weight"]) // size
    sizes = {
        "mlp_dim": "transformer.layers.0.mlp.lin1.weight",
        "num_multimask_outputs": "mask_tokens.weight",
        "iou_head_hidden_dim": "iou_prediction_head.proj_in.weight",
        "attention_downsample_rate": "transformer.final_attn_token_to_image.q_proj.weight",
    }
    absent = [name for name in sizes.values() if _DECODER + name not in tensors]
    if absent:
        raise CheckpointError(f"The mask decoder has no {', '.join(absent)}: the file is not complete.")
    decoder = {field: len(tensors[_DECODER + name]) for field, name in sizes.items()}
    decoder["num_multimask_outputs"] -= 1
    decoder["attention_downsample_rate"] = size // decoder["attention_downsample_rate"]
    decoder["num_hidden_layers"] = _count(tensors, rf"{re.escape(_DECODER)}transformer\.layers\.(\d+)\.")
    decoder["iou_head_depth"] = 2 + _count(tensors, rf"{re.escape(_DECODER)}iou_prediction_head\.layers\.(\d+)\.")
    points = values // 2 if overrides.get("with_sincos") else values
    return {"n_points": points, "mask_decoder_config": {"hidden_size": size, **decoder}}


def _class_names(source: Source, classes: int) -> tuple[dict[str, Any], list[str]]:
    names = source.class_names or []
    if len(names) == classes:
        return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}, []
    note = f"The file names {len(names)} classes for {classes} outputs: they are called LABEL_0 ... here."
    return {"num_labels": classes}, [note]


def _layers(source: Source, layers: int, head: str, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Which layers the aggregator joins: as the saved configuration says, or as published for their number."""
    if "select_layers" in overrides:
        return {}, []
    number = _count(source.tensors, r"neck\.feature_aggregator\.downconvs\.(\d+)\.")
    saved = _saved_layers(source.config_text)
    if saved is not None and len(saved) == number:
        return {"select_layers": saved}, []
    known = range(layers) if number == layers else _PUBLISHED_LAYERS.get((layers, number, head))
    if known is None:
        raise CheckpointError(
            f"{source.source_name} joins {number} of {layers} layers, but does not say which: --set "
            "select_layers=[FIRST,...], from 0."
        )
    if number == layers:
        return {"select_layers": tuple(known)}, []
    note = f"The file does not tell select_layers; assumed {list(known)}, as published for {number} of {layers} layers."
    return {"select_layers": tuple(known)}, [note]


def _saved_layers(text: str) -> tuple[int, ...] | None:
    """`select_layers` of a configuration's text: a range, a list or a tuple of numbers."""
    match = re.search(r"\bselect_layers\W{1,3}?(range)?\s*([(\[][\d\s,]*[)\]])", text)
    if match is None:
        return None
    numbers = ast.literal_eval(match[2])
    return tuple(range(*numbers) if match[1] else numbers)


def _pyramid(source: Source, layers: int, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Whether the pyramid is the "Pa" variant, which has the same tensors as the plain one."""
    if "fpn_pa" in overrides:
        return {}, []
    named = re.search(r"RSSimple(Pa)?FPN", source.config_text)
    if named is not None:
        return {"fpn_pa": named[1] is not None}, []
    number = _count(source.tensors, r"neck\.feature_aggregator\.downconvs\.(\d+)\.")
    reverse = _count(source.tensors, r"neck\.feature_aggregator\.reverse_convs\.(\d+)\.")
    pa = number == 3 and layers > 3 and not reverse
    note = (
        f"The file does not tell fpn_pa; assumed {str(pa).lower()}, as in the published configuration of these sizes."
    )
    return {"fpn_pa": pa}, [note]
