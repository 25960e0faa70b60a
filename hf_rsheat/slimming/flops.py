"""Floating-point operations of an encoder, counted from its config.

The rule of arXiv 2601.22841: matrix products and convolutions of one image through the whole encoder, patch embedding
included, one multiply-add counted as two; norms, softmax, activations, biases, poolers and heads are not counted. Two
things the paper does not have are ours: heat operators count their decay map (which is computed once and cached in
evaluation mode), and state-space mixers count the recurrence, six operations per channel and state.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .families import COMPONENTS, family_of, trunk_config, widths
from .slim import slim_config

Size = int | Sequence[int]
Model = PreTrainedModel | PreTrainedConfig


def flops(model: Model, image_size: Size | None = None, channels: int | None = None) -> int:
    """Operations for one image.

    Args:
        model: A model, or its config.
        image_size: Side, or height and width, in pixels; the config's if None.
        channels: Channels of the image; the config's (RS-vHeat: those of its default modality) if None.

    Raises:
        ConfigurationError: If the architecture is not known.
    """
    return sum(flop_parts(model, image_size, channels).values())


def relative_compute(
    model: Model,
    width_multiplier: float,
    image_size: Size | None = None,
    channels: int | None = None,
    components: Sequence[str] = COMPONENTS,
) -> float:
    """Operations of the model at a width over those it has now; the embedding keeps it above 0 at any width.

    Raises:
        ConfigurationError: If the architecture is not known.
    """
    config: Any = getattr(model, "config", model)
    slimmed = slim_config(config, width_multiplier, components)
    return flops(slimmed, image_size, channels) / flops(config, image_size, channels)


def flop_parts(model: Model, image_size: Size | None = None, channels: int | None = None) -> dict[str, int]:
    """Operations by part: "embedding", "attn", "ffn", "downsampling" (heat models) and "scan" (RS4D).

    "scan" is what is not made of matrix products: the update of the states.
    """
    config = trunk_config(getattr(model, "config", model))
    family_of(config)  # refuses what is not known
    height, width = _pair(image_size or config.image_size)
    if channels is None:
        modalities = getattr(config, "modalities", None)
        channels = modalities[config.default_modality] if modalities else config.num_channels
    return _COUNTERS.get(config.model_type, _vit)(config, height, width, channels)


def _pair(size: Size) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def _patches(config: Any, height: int, width: int) -> int:
    rows, columns = _pair(config.patch_size)
    if config.model_type in ("selective_mae", "rs4d"):  # they pad to whole patches
        return math.ceil(height / rows) * math.ceil(width / columns)
    return (height // rows) * (width // columns)


def _vit(config: Any, height: int, width: int, channels: int) -> dict[str, int]:
    patches, dim = _patches(config, height, width), config.hidden_size
    tokens = patches + 1 + getattr(config, "num_register_tokens", 0)
    layers, now = config.num_hidden_layers, widths(config)
    head_dim = now.get("head_dim", dim // config.num_attention_heads)
    inner = config.num_attention_heads * head_dim  # type: ignore[operator]
    gated = getattr(config, "use_swiglu_ffn", False) or getattr(config, "use_gated_mlp", False)
    return {
        "embedding": 2 * patches * channels * math.prod(_pair(config.patch_size)) * dim,
        "attn": layers * (8 * tokens * dim * inner + 4 * tokens**2 * inner),
        "ffn": layers * (6 if gated else 4) * tokens * dim * now["intermediate_size"],  # type: ignore[operator]
    }


def _heat(config: Any, height: int, width: int, channels: int) -> dict[str, int]:
    dims = config.hidden_sizes
    counts = {"embedding": 0, "attn": 0, "ffn": 0, "downsampling": 0}
    for out_dim, in_dim in ((dims[0] // 2, channels), (dims[0], dims[0] // 2)):
        height, width = math.ceil(height / 2), math.ceil(width / 2)
        counts["embedding"] += 2 * height * width * 9 * in_dim * out_dim
    for stage, dim in enumerate(dims):
        cells, inner, depth = height * width, config.inner_dim(stage), config.depths[stage]
        depthwise = 2 * cells * 9 * dim
        linears = 2 * cells * dim * 4 * inner  # signal, gate, diffusivity, output
        transforms = 4 * cells * (height + width) * inner
        counts["attn"] += depth * (depthwise + linears + transforms)
        counts["ffn"] += depth * 4 * cells * dim * config.mlp_hidden_dim(stage)
        if stage + 1 < len(dims):
            height, width = math.ceil(height / 2), math.ceil(width / 2)
            counts["downsampling"] += 2 * height * width * 9 * dim * dims[stage + 1]
    return counts


def _rs4d(config: Any, height: int, width: int, channels: int) -> dict[str, int]:
    patches, dim, inner = _patches(config, height, width), config.hidden_size, config.inner_size
    tokens, orders = patches + int(config.use_cls_token), len(config.orders)
    state, rank = config.state_size, config.time_step_rank
    projections = 2 * tokens * dim * 3 * inner
    read = tokens * orders  # every order is read by itself
    selection = 2 * read * inner * (config.conv_kernel + 2 * rank + 2 * state)
    readout = 2 * read * inner * state
    gate = orders * (2 * dim * inner + 2 * orders * dim) if config.has_gate else 0
    return {
        "embedding": 2 * patches * channels * config.patch_size**2 * dim,
        "attn": config.num_hidden_layers * (projections + selection + readout + gate),
        "scan": config.num_hidden_layers * 4 * read * inner * state,
    }


_COUNTERS: dict[str, Callable[[Any, int, int, int], dict[str, int]]] = {
    "vheat": _heat,
    "rs_vheat": _heat,
    "rs4d": _rs4d,
}
