"""What objectives for several model families ask of a recipe: which family, which sensors."""

from collections.abc import Collection
from pathlib import Path

from transformers import PreTrainedConfig

from ...errors import ConfigurationError, did_you_mean
from ..recipe import Recipe
from ..starting_point import stored_model_type


def find_model_type(recipe: Recipe, checkpoint: Path | None, known: Collection[str], default: str) -> str:
    """The family a recipe names, or that of the folder it starts from.

    Raises:
        ConfigurationError: If it is none of `known`, or the recipe and the folder disagree.
    """
    wanted = recipe.model_fields.get("model_type")
    start = checkpoint or recipe.pretrained
    found = stored_model_type(start) if start else wanted or default
    if found not in known:
        raise ConfigurationError(f"Unknown model_type '{found}': {did_you_mean(str(found), known)}")
    if wanted not in (None, found):
        raise ConfigurationError(f"'{start}' holds a '{found}' model, not '{wanted}': remove model.model_type.")
    return str(found)


def sensor_channels(config: PreTrainedConfig) -> dict[str, int]:
    """Channels per modality of a model; models of one sensor call it optical."""
    return dict(getattr(config, "modalities", None) or {"optical": config.num_channels})


def find_modality(recipe: Recipe, config: PreTrainedConfig, channels: dict[str, int]) -> str:
    """The modality of images whose path does not say.

    Raises:
        ConfigurationError: If the model has none of this name.
    """
    modality = str(recipe.modality or getattr(config, "default_modality", "optical"))
    if modality not in channels:
        raise ConfigurationError(f"Unknown modality '{modality}': {did_you_mean(modality, channels)}")
    return modality
