"""Post-hoc slimming (Hackel, Burgert, Demir, arXiv 2601.22841): really smaller models, without training."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..errors import ConfigurationError
from .calibration import Batches, require_batches, trunk_of
from .correction import fit_norms, refit_writers
from .families import COMPONENTS, family_of, slim_widths, trunk_config, widths
from .importance import importance, most_important
from .plan import PlannedGroup, Slices, first_units, planned_branches, planned_groups, slice_state, slices

logger = logging.get_logger(__name__)

KEEP = ("first", "last", "random", "importance")
CORRECTIONS = (None, "affine", "ridge")
Keep = Literal["first", "last", "random", "importance"]
Correction = Literal["affine", "ridge"]


def slim(
    model: PreTrainedModel,
    width_multiplier: float,
    *,
    keep: Keep = "first",
    components: Sequence[str] = COMPONENTS,
    softmax_scale: Literal["new", "full"] = "new",
    correction: Correction | None = None,
    calibration: Batches | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A new, really smaller model that keeps a share of every layer's inner units.

    Of n units max(1, floor(s · n)) stay: hidden neurons of the MLPs, dimensions of every attention head, channels of a
    heat operator (at least 8 of them, or all) or of a state-space mixer. The residual stream, embeddings, norms on it,
    depth and number of heads stay whole. At s = 1 the outputs are bit-identical.

    The result saves and loads like any transformers model; its widths and `slim`, the record of what was done, are in
    its config. Classifiers keep their head, but after slimming it should be trained anew.

    Args:
        model: Any of the architectures in `families.FAMILIES`, with or without a head; never changed.
        width_multiplier: Share s in (0, 1] of the units it has now.
        keep: Which units: the "first" (the paper's choice), the "last", "random" ones, or those of most "importance"
            on the calibration images (ours), in descending order.
        components: "attn" (what mixes tokens) and "ffn" (MLPs), or one of them.
        softmax_scale: "new" divides attention scores by the root of the new head width (the paper's choice); "full"
            by that of the full one, by means of the query weights, so that slimming equals zeroing the other units.
        correction: None (the paper); "affine" refits heat operators' norms, whose statistics change with the channels;
            "ridge" refits, layer by layer, what is written to the residual stream (ours; much better).
        calibration: For `keep="importance"` and corrections: a list of batches, pixel values `(batch, channels, height,
            width)` or dicts of forward arguments. A few hundred unlabelled images do.
        seed: For `keep="random"`.

    Raises:
        ConfigurationError: For an unknown architecture or option, a width outside (0, 1], or missing calibration.
    """
    components = _check(model, width_multiplier, keep, components, softmax_scale, correction)
    if keep == "importance" or correction is not None:
        calibration = require_batches(calibration, f"keep={keep!r} with correction={correction!r}")
    small = build_shell(model, slim_config(model.config, width_multiplier, components))
    branches = [b for b in planned_branches(model, small) if b.branch.component in components]
    groups = planned_groups(branches)
    kept = _kept_units(model, groups, keep, calibration, seed)
    _fill(small, model, slices(groups, kept))
    if softmax_scale == "full":
        _restore_softmax_scale(groups)
    if correction == "affine":
        fit_norms(trunk_of(model), trunk_of(small), groups, kept, calibration or [])
    elif correction == "ridge":
        refit_writers(trunk_of(model), trunk_of(small), branches, calibration or [])
    _record(small, model, width_multiplier, keep, components, softmax_scale, correction)
    return small


def _check(
    model: Any, share: float, keep: str, components: Sequence[str], scale: str, correction: Any
) -> tuple[str, ...]:
    if not 0 < share <= 1:
        raise ConfigurationError(f"The width multiplier must be in (0, 1], got {share}.")
    for name, value, known in (("keep", keep, KEEP), ("correction", correction, CORRECTIONS)):
        if value not in known:
            raise ConfigurationError(f"{name}={value!r} is not known: choose one of {', '.join(map(str, known))}.")
    if scale not in ("new", "full"):
        raise ConfigurationError(f"softmax_scale={scale!r} is not known: choose 'new' or 'full'.")
    family = family_of(model.config)
    if unknown := sorted(set(components) - set(COMPONENTS)):
        raise ConfigurationError(f"Unknown components {unknown}: choose from {', '.join(COMPONENTS)}.")
    possible = tuple(name for name in family.components if name in components)
    for component, reason in family.whole:
        if component in components:
            logger.warning("'%s' of %s stays whole: %s.", component, type(model).__name__, reason)
    if not possible:
        raise ConfigurationError(f"{type(model).__name__} has nothing to slim in {list(components)}.")
    if any(hasattr(model, part) for part in family.whole_parts):
        raise ConfigurationError(
            f"transformers gives the decoder of {type(model).__name__} the head width of the encoder, so that a "
            "slimmed one could not be loaded: slim its encoder, `model.base_model`."
        )
    attends = any(group.per_head for place in planned_branches(model, model) for group in place.branch.groups)
    if scale == "full" and not ("attn" in possible and attends):
        raise ConfigurationError(f"{type(model).__name__} has no softmax to slim: leave softmax_scale as it is.")
    return possible


def slim_config(config: PreTrainedConfig, width_multiplier: float, components: Sequence[str] = COMPONENTS) -> Any:
    """A copy of a config with the widths of a slimmed model."""
    config = copy.deepcopy(config)
    trunk, family = trunk_config(config), family_of(config)
    new_widths = slim_widths(config, width_multiplier, tuple(components))
    if family.as_slim is not None:
        slimmed = family.as_slim(trunk)
        if trunk is config:
            config = slimmed
        else:
            config.backbone_config = slimmed
        trunk = slimmed
    for field, width in new_widths.items():
        setattr(trunk, field, width)
    return config


def build_shell(model: PreTrainedModel, config: PreTrainedConfig) -> Any:
    """A model of the same kind for a slimmed config, in the same mode, on the meta device: without weights."""
    # Whatever is drawn afterwards must not depend on whether a model was built before.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        shell = slim_class(model)(config)
    for name, _ in list(shell.named_children()):
        if getattr(model, name, None) is None:  # built without, as `ViTModel(config, add_pooling_layer=False)`
            setattr(shell, name, None)
    return shell.train(model.training)


def _fill(small: Any, model: PreTrainedModel, index: Slices) -> None:
    """Give a shell its weights, cut from the full model's, and copies of the rest."""
    state = {name: value.detach() for name, value in model.state_dict().items()}
    cut = slice_state(state, index)
    small.load_state_dict({name: v if name in index else v.clone() for name, v in cut.items()}, assign=True)
    for name, buffer in model.named_buffers():
        if name not in state:  # not saved with the weights, so not in the state
            owner, _, last = name.rpartition(".")
            small.get_submodule(owner).register_buffer(last, buffer.clone(), persistent=False)
    for name, parameter in model.named_parameters():
        small.get_parameter(name).requires_grad_(parameter.requires_grad)
    small.tie_weights()


def slim_class(model: PreTrainedModel) -> Any:
    """The class of a slimmed model: the same, except for DINOv2.

    Raises:
        ConfigurationError: For a DINOv2 with a head that has no slim counterpart.
    """
    if model.config.model_type != "dinov2":
        return type(model)
    from ..models import modeling_slim_dinov2

    name = f"Slim{type(model).__name__}"
    if name not in modeling_slim_dinov2.__all__:
        raise ConfigurationError(f"There is no {name}: slim the trunk, `model.base_model`.")
    return getattr(modeling_slim_dinov2, name)


def _kept_units(
    model: PreTrainedModel, groups: list[PlannedGroup], keep: str, calibration: Batches | None, seed: int
) -> dict[str, torch.Tensor]:
    if keep == "importance":
        scores = importance(trunk_of(model), groups, calibration or [])
        return {group.name: most_important(group, scores[group.name]) for group in groups}
    if keep == "first":
        return {group.name: first_units(group) for group in groups}
    if keep == "last":
        return {group.name: first_units(group) + group.units - group.kept for group in groups}
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[tuple[str, int, int], torch.Tensor] = {}
    kept = {}
    for group in groups:
        # Queries, keys and values of a head keep the same dimensions, as with "first".
        key = (group.place.name, group.blocks, group.units)
        if key not in drawn:
            order = torch.stack([torch.randperm(group.units, generator=generator) for _ in range(group.blocks)])
            drawn[key] = order[:, : group.kept].sort(dim=1).values
        kept[group.name] = drawn[key]
    return kept


@torch.no_grad()
def _restore_softmax_scale(groups: list[PlannedGroup]) -> None:
    for group in groups:
        if group.group.products:
            query = group.place.slim.get_submodule(group.group.products[0])
            factor = (group.kept / group.units) ** 0.5
            for parameter in query.parameters():
                parameter.mul_(factor)


def _record(small: Any, model: PreTrainedModel, share: float, keep: str, components: Any, scale: str, fit: Any) -> None:
    before = getattr(trunk_config(model.config), "slim", None)
    trunk_config(small.config).slim = {
        "width_multiplier": share,
        "keep": keep,
        "components": list(components),
        "softmax_scale": scale,
        "correction": fit,
        "base": Path(model.config.name_or_path or "").name,  # of a folder its name only: configs go to the Hub
        "full_widths": before["full_widths"] if before else widths(model.config),
        "previous": before,
    }
