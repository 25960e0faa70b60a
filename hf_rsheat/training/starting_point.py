"""Where a model comes from: config fields of the recipe, a folder to start from, or a checkpoint to resume."""

import dataclasses
import logging
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError, ConfigurationError, did_you_mean
from .checkpoint import load_weights
from .recipe import Recipe

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=PreTrainedConfig)


def stored_model_type(folder: str | Path) -> str | None:
    """`model_type` of a model folder's config."""
    try:
        return PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"No model to start from in '{folder}': {_first_line(error)}") from error


def resolve_config(config_class: type[C], recipe: Recipe, checkpoint: Path | None) -> C:
    """The config of the model to train.

    Args:
        config_class: Class of the config.
        recipe: Its `model` names config fields, a folder to start from, or both.
        checkpoint: A checkpoint to resume; its config is taken as it is.

    Raises:
        ConfigurationError: For unknown fields (naming the nearest valid one) or values the config refuses.
    """
    if checkpoint is not None:
        return config_class.from_pretrained(checkpoint)
    fields = {name: value for name, value in recipe.model_fields.items() if name != "model_type"}
    known = {f.name for f in dataclasses.fields(config_class) if not f.name.startswith("_")}
    for name in fields:
        if name not in known:
            raise ConfigurationError(f"Unknown model field '{name}': {did_you_mean(name, known)}")
    if fields.get("image_size", recipe.image_size) != recipe.image_size:
        raise ConfigurationError("'model.image_size' differs from 'image_size': set image_size only.")
    if isinstance(fields.get("modalities"), dict):
        # Saved configs come back with sorted keys, and the order of the stems decides the order of the parameters.
        fields["modalities"] = dict(sorted(fields["modalities"].items()))
    try:
        if recipe.pretrained is not None:
            return config_class.from_pretrained(recipe.pretrained, **fields)
        return config_class(**{**fields, "image_size": recipe.image_size})
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConfigurationError(f"Invalid model: {_first_line(error.__cause__ or error)}") from error
    except OSError as error:
        raise ConfigurationError(f"No model to start from in '{recipe.pretrained}': {_first_line(error)}") from error


def resolve_model(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    recipe: Recipe,
    checkpoint: Path | None,
    may_be_new: tuple[str, ...] | None = None,
) -> PreTrainedModel:
    """The model to train, in float32.

    Args:
        model_class: Class of the model.
        config: Its config.
        recipe: The run's recipe.
        checkpoint: A checkpoint to resume.
        may_be_new: Beginnings of the names of weights that the folder to start from may lack; all but those of an
            encoder if None.

    Raises:
        CheckpointError: If the folder to start from lacks trunk weights, or trunk weights have other shapes.
    """
    if checkpoint is not None or recipe.pretrained is None:
        model = model_class(config)
        if checkpoint is not None:
            load_weights(checkpoint, model)
        return model
    try:
        loaded: Any = model_class.from_pretrained(
            recipe.pretrained,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # a classifier for other classes starts anew; the trunk is checked below
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"Cannot start from '{recipe.pretrained}': {_first_line(error)}") from error
    model, info = loaded
    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]}
    new = sorted(set(info["missing_keys"]) | mismatched)
    lost = [name for name in new if ("encoder." in name if may_be_new is None else not name.startswith(may_be_new))]
    if lost:
        raise CheckpointError(
            f"'{recipe.pretrained}' lacks {len(lost)} trunk weights of this model, or they have other shapes "
            f"(first: {lost[0]}): drop the model fields that change its architecture."
        )
    logger.info("Started from %s; new weights: %s.", recipe.pretrained, ", ".join(new) or "none")
    with torch.no_grad():
        for parameter in model.parameters():
            # Memory-mapped weights are aligned unlike those of a resumed run, which would change last bits.
            parameter.data = parameter.data.clone()
    return model


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
