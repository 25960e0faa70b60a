"""Tensor names of the original SelectiveMAE and MAE code, and what they are called in our and in stock models."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_rsheat.conversion.common import ConversionResult, Source

# Parameters the original never uses, and fixed filters of its HOG layer.
DEAD = {
    r"^pos_embed_probs$": "never used by the original",
    r"^get_token_probs(_linear)?\.": "never used by the original",
    r"^decoder_embed1\.": "never used by the original",
    r"^hog\.": "fixed filters of a score that is zero everywhere",
}
DECODER = r"^(mask_token$|decoder_)"

_PROJECTIONS = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
# Inside a layer: original name -> ours and transformers'. Several names: equal parts of the tensor, in this order.
_LAYER = {
    "norm1": ("layernorm_before",),
    "attn.qkv": _PROJECTIONS,
    "attn.proj": ("attention.o_proj",),
    "cross_attn.q": _PROJECTIONS[:1],
    "cross_attn.kv": _PROJECTIONS[1:],
    "cross_attn.proj": ("attention.o_proj",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}


@dataclass(frozen=True)
class Target:
    """What a checkpoint becomes.

    Attributes:
        model_class, config_class: Of this package or of transformers.
        prefix: Of the encoder's names.
        projection, layers: Names of the patch projection and of the list of layers in the encoder.
        decoder: Original decoder names -> new ones, and under "blocks" the list of its layers; `None` drops it.
        options: Further arguments of the model.
    """

    model_class: Any
    config_class: Any
    prefix: str = ""
    projection: str = "embeddings.patch_embeddings.projection"
    layers: str = "layers"
    decoder: Mapping[str, str] | None = None
    options: Mapping[str, Any] | None = None


def module_names(target: Target, num_layers: int, num_decoder_layers: int) -> dict[str, tuple[str, ...]]:
    """Every module (or raw parameter) of the original -> the modules that its tensors go to."""
    prefix = target.prefix
    names: dict[str, tuple[str, ...]] = {
        "cls_token": (f"{prefix}embeddings.cls_token",),
        "pos_embed": (f"{prefix}embeddings.position_embeddings",),
        "patch_embed.proj": (prefix + target.projection,),
        "norm": (f"{prefix}layernorm",),
        "fc_norm": (f"{prefix}layernorm",),
        "head": ("classifier",),
    }
    blocks = [(f"blocks.{i}", f"{prefix}{target.layers}.{i}") for i in range(num_layers)]
    if target.decoder is not None:
        names |= {old: (new,) for old, new in target.decoder.items() if old != "blocks"}
        blocks += [(f"decoder_blocks.{i}", f"{target.decoder['blocks']}.{i}") for i in range(num_decoder_layers)]
    for old, new in blocks:
        names |= {f"{old}.{module}": tuple(f"{new}.{name}" for name in news) for module, news in _LAYER.items()}
    return names


def rename(source: Source, names: Mapping[str, tuple[str, ...]], result: ConversionResult) -> list[str]:
    """Fill the result with the new names; returns the names in the file that have no counterpart."""
    unmapped = []
    for name, tensor in source.tensors.items():
        module, _, leaf = name.rpartition(".")
        if name in names:
            targets = list(names[name])
        elif module in names:
            targets = [f"{new}.{leaf}" for new in names[module]]
        else:
            unmapped.append(source.names[name])
            continue
        parts = tensor.chunk(len(targets)) if len(targets) > 1 else (tensor,)
        result.state_dict.update(zip(targets, (part.contiguous() for part in parts), strict=False))
        result.key_map[source.names[name]] = ", ".join(targets)
    return unmapped


def missing_names(names: Mapping[str, tuple[str, ...]], expected: Mapping[str, Tensor]) -> dict[str, str]:
    """New tensor name -> the original's, to name missing tensors as the file would."""
    modules = {new: old for old, news in names.items() for new in news}
    found = {}
    for name in expected:
        module, _, leaf = name.rpartition(".")
        if name in modules:
            found[name] = modules[name]
        elif module in modules:
            found[name] = f"{modules[module]}.{leaf}"
    return found
