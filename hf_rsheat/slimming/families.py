"""What can be cut in which architecture: one declarative table that drives slicing, FLOPs, corrections and training.

A *unit* is one hidden neuron of an MLP, one dimension of every attention head, one channel of a heat operator or of a
state-space mixer. The residual stream, embeddings, norms on it, depth and heads stay whole (arXiv 2601.22841).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from ..errors import ConfigurationError

COMPONENTS = ("attn", "ffn")
MIN_HEAT_CHANNELS = 8  # a heat operator normalises over its channels: of a single one nothing but a constant is left


@dataclass(frozen=True)
class Cut:
    """A parameter that loses units along an axis. `copies`: how often all units follow each other on that axis."""

    parameter: str
    axis: int = 0
    copies: int = 1


@dataclass(frozen=True)
class Group:
    """Units that leave together.

    Args:
        cuts: The parameters they are part of, relative to the branch; those a model does not have are passed over.
        reader: The linear layer that reads the units; its input tells how much each unit matters.
        products: Instead of a reader: linear layers whose outputs are multiplied unit by unit (queries and keys).
        per_head: Whether every head keeps its own units.
    """

    cuts: tuple[Cut, ...]
    reader: str | None = None
    products: tuple[str, ...] = ()
    per_head: bool = False


@dataclass(frozen=True)
class Branch:
    """A residual branch of a layer.

    Args:
        component: "attn" (what mixes tokens) or "ffn".
        path: The branch, relative to its layer.
        groups: The units in it.
        writer: The linear layer that writes to the residual stream.
        stream: The module (relative to the layer, "" for the layer) whose input is the stream before this branch.
        scale: Parameter that multiplies what is written, if the layer has it.
        inner: Linear layers without bias before the writer that sum over the units.
        norm: A norm over the units.
    """

    component: str
    path: str
    groups: tuple[Group, ...]
    writer: str
    stream: str
    scale: str | None = None
    inner: tuple[str, ...] = ()
    norm: str | None = None


def _linear(name: str, axis: int = 0, copies: int = 1) -> tuple[Cut, ...]:
    """A linear layer (or norm) that loses rows and their biases (axis 0), or columns (axis 1)."""
    weight = Cut(f"{name}.weight", axis, copies)
    return (weight, Cut(f"{name}.bias", 0, copies)) if axis == 0 else (weight,)


def _attention(stream: str, scale: str | None = None) -> Branch:
    match_units = Group((*_linear("q_proj"), *_linear("k_proj")), products=("q_proj", "k_proj"), per_head=True)
    value_units = Group((*_linear("v_proj"), *_linear("o_proj", 1)), reader="o_proj", per_head=True)
    return Branch("attn", "attention", (match_units, value_units), "o_proj", stream, scale)


def _mlp(inputs: tuple[str, ...], output: str, stream: str, scale: str | None = None) -> Branch:
    cuts = sum((_linear(name) for name in inputs), ()) + _linear(output, 1)
    return Branch("ffn", "mlp", (Group(cuts, reader=output),), output, stream, scale)


_HEAT = Group(
    (*_linear("in_proj", copies=2), *_linear("to_diffusivity"), *_linear("out_norm"), *_linear("out_proj", 1)),
    reader="out_proj",
)
_MIXER = Group(
    (
        *_linear("in_proj", copies=2),
        *_linear("conv1d"),
        *_linear("x_proj", 1),
        *_linear("dt_proj"),
        Cut("A_log"),
        Cut("D"),
        *_linear("out_proj", 1),
    ),
    reader="out_proj",
)
_VIT_LAYER = (_attention("layernorm_before"), _mlp(("fc1",), "fc2", "layernorm_after"))
_DINO_NORMS = (("norm1", "layer_scale1.lambda1"), ("norm2", "layer_scale2.lambda1"))

# By class name: code loaded from the Hub brings class objects of its own.
LAYERS: dict[str, tuple[Branch, ...]] = {
    "ViTLayer": _VIT_LAYER,
    "ViTMAELayer": _VIT_LAYER,
    "SelectiveMAELayer": _VIT_LAYER,
    "Dinov2Layer": (_attention(*_DINO_NORMS[0]), _mlp(("fc1",), "fc2", *_DINO_NORMS[1])),
    "DINOv3ViTLayer": (_mlp(("up_proj",), "down_proj", *_DINO_NORMS[1]),),
    "HeatLayer": (
        Branch("attn", "heat", (_HEAT,), "out_proj", "norm1", "layer_scale1", norm="out_norm"),
        _mlp(("fc1",), "fc2", "norm2", "layer_scale2"),
    ),
    "RS4DLayer": (Branch("attn", "mixer", (_MIXER,), "out_proj", "", inner=("x_proj",)),),
}
GATED_MLPS = ("Dinov2SwiGLUFFN", "DINOv3ViTGatedMLP")


def branches_of(layer: Any) -> tuple[Branch, ...]:
    """The branches of a layer that can be slimmed; none for other modules."""
    branches = LAYERS.get(type(layer).__name__, ())
    if type(getattr(layer, "mlp", None)).__name__ not in GATED_MLPS:
        return branches
    ffn = next(branch for branch in branches if branch.component == "ffn")
    gated = _mlp(("gate_proj", "up_proj"), "down_proj", ffn.stream, ffn.scale)
    return tuple(gated if branch is ffn else branch for branch in branches)


@dataclass(frozen=True)
class Knob:
    """A config field that holds the width of a component: one number, or one per stage."""

    field: str
    component: str
    full: Callable[[Any], int | list[int]]
    minimum: int = 1


@dataclass(frozen=True)
class Family:
    """An architecture.

    Args:
        knobs: Its widths.
        whole: Components that stay whole, and why.
        whole_parts: Modules that stay whole although their layers look like those that are cut.
        as_slim: From its config to one that can hold any width.
    """

    knobs: tuple[Knob, ...]
    whole: tuple[tuple[str, str], ...] = ()
    whole_parts: tuple[str, ...] = ()
    as_slim: Callable[[Any], PreTrainedConfig] | None = None

    @property
    def components(self) -> tuple[str, ...]:
        """Components that can be slimmed."""
        return tuple(component for component in COMPONENTS if any(k.component == component for k in self.knobs))


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _mlp_dim(config: Any) -> int:
    if hasattr(config, "intermediate_size"):
        return config.intermediate_size
    from ..models.configuration_slim_dinov2 import mlp_width

    return mlp_width(config)


def _per_stage(method: str) -> Callable[[Any], list[int]]:
    return lambda config: [getattr(config, method)(stage) for stage in range(len(config.depths))]


def _slim_dinov2(config: Any) -> PreTrainedConfig:
    from ..models.configuration_slim_dinov2 import SlimDinov2Config

    return SlimDinov2Config.of(config)


_VIT = Family((Knob("head_dim", "attn", _head_dim), Knob("intermediate_size", "ffn", _mlp_dim)))
_HEAT_FAMILY = Family(
    (
        Knob("inner_dims", "attn", _per_stage("inner_dim"), MIN_HEAT_CHANNELS),
        Knob("mlp_hidden_dims", "ffn", _per_stage("mlp_hidden_dim")),
    )
)
FAMILIES: dict[str, Family] = {
    "vit": _VIT,
    "vit_mae": Family(_VIT.knobs, whole_parts=("decoder",)),
    "selective_mae": _VIT,
    "slim_dinov2": _VIT,
    "dinov2": Family(_VIT.knobs, as_slim=_slim_dinov2),
    "dinov3_vit": Family(
        _VIT.knobs[1:],
        whole=(("attn", "rotary positions pair up the dimensions of a head, and the config has no width for heads"),),
    ),
    "vheat": _HEAT_FAMILY,
    "rs_vheat": _HEAT_FAMILY,
    "rs4d": Family((Knob("inner_size", "attn", lambda c: c.inner_size),)),
}


def trunk_config(config: Any) -> Any:
    """The config of the trunk: that of the backbone where a head stands on one."""
    return getattr(config, "backbone_config", None) or config


def family_of(config: Any) -> Family:
    """The family of a model's config.

    Raises:
        ConfigurationError: If it is none of `FAMILIES`.
    """
    model_type = trunk_config(config).model_type
    if model_type not in FAMILIES:
        raise ConfigurationError(f"Cannot slim a '{model_type}': known architectures are {', '.join(FAMILIES)}.")
    return FAMILIES[model_type]


def slim_width(full: int, width_multiplier: float, minimum: int = 1) -> int:
    """Units kept: max(minimum, floor(s * full)), never more than there are.

    The small addend keeps products such as 0.1 * 30 from falling below their integer.
    """
    return min(full, max(minimum, math.floor(width_multiplier * full + 1e-9)))


def widths(config: Any) -> dict[str, int | list[int]]:
    """Config field -> units now, of everything that can be slimmed."""
    trunk = trunk_config(config)
    return {knob.field: knob.full(trunk) for knob in family_of(config).knobs}


def slim_widths(config: Any, width_multiplier: float, components: tuple[str, ...]) -> dict[str, int | list[int]]:
    """Config field -> units at a width multiplier; components that are not named keep theirs."""
    found: dict[str, int | list[int]] = {}
    for knob in family_of(config).knobs:
        full = knob.full(trunk_config(config))
        share = width_multiplier if knob.component in components else 1.0
        if isinstance(full, int):
            found[knob.field] = slim_width(full, share, knob.minimum)
        else:
            found[knob.field] = [slim_width(units, share, knob.minimum) for units in full]
    return found
