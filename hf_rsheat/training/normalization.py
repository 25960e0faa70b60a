"""The image processor of a run: its statistics normalise the training images and travel with the model."""

import copy
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigurationError, DataError, did_you_mean
from ..models.image_checks import UINT8_FACTOR, ImageFormatError
from .recipe import Recipe


def resolve_processor(processor_class: Any, recipe: Recipe, checkpoint: Path | None, channels: dict[str, int]) -> Any:
    """The processor to train with and to export.

    Statistics come from the class, then from the folder to start from, then from the recipe's `preprocessing`.

    Args:
        processor_class: Class of the processor.
        recipe: The run's recipe.
        checkpoint: A checkpoint to resume; its processor is taken as it is.
        channels: Channels of every modality of the model.

    Raises:
        ConfigurationError: For a modality without statistics, with the wrong number of them, or unknown options.
    """
    if checkpoint is not None:
        return processor_class.from_pretrained(checkpoint)
    for name in recipe.preprocessing:
        if name not in channels:
            raise ConfigurationError(f"Unknown modality '{name}' in preprocessing: {did_you_mean(name, channels)}")
    base = processor_class() if recipe.pretrained is None else _stored_processor(processor_class, recipe.pretrained)
    size = {"height": recipe.image_size, "width": recipe.image_size}
    statistics = {name: {**_statistics(base, name), **recipe.preprocessing.get(name, {})} for name in channels}
    for name, options in statistics.items():
        if any(len(options.get(key) or ()) != channels[name] for key in ("image_mean", "image_std")):
            raise ConfigurationError(
                f"Modality '{name}' needs {channels[name]} statistics for values 0-1: "
                f"set preprocessing.{name}.image_mean and preprocessing.{name}.image_std."
            )
    options = {"modalities": statistics} if _is_per_modality(base) else next(iter(statistics.values()))
    try:
        return processor_class(**{**_plain_options(base), "size": size, **options})
    except (ImageFormatError, TypeError) as error:
        raise ConfigurationError(f"Invalid preprocessing: {error}") from error


def _stored_processor(processor_class: Any, folder: str) -> Any:
    try:
        return processor_class.from_pretrained(folder)
    except OSError as error:
        raise ConfigurationError(
            f"'{folder}' has no preprocessor_config.json: export it with its image processor, "
            "since weights without their statistics would see wrong values."
        ) from error


def _is_per_modality(processor: Any) -> bool:
    """RS-vHeat's processors keep statistics per modality, vHeat's only once."""
    return hasattr(processor, "modalities")


def _statistics(processor: Any, modality: str) -> dict[str, Any]:
    if _is_per_modality(processor):
        return processor.modalities.get(modality, {})
    return {"image_mean": processor.image_mean, "image_std": processor.image_std}


def _plain_options(processor: Any) -> dict[str, Any]:
    """Constructor arguments of a processor; the modality assumed by default follows from the new statistics."""
    dropped = {"image_processor_type", "processor_class", "auto_map", "modality", "modalities", "size"}
    return {name: value for name, value in processor.to_dict().items() if name not in dropped and value is not None}


def normalize(processor: Any, image: torch.Tensor, modality: str) -> torch.Tensor:
    """Rescale and normalise a view that already has its final size.

    Args:
        processor: The run's processor.
        image: `(channels, height, width)`, values as stored.
        modality: Whose statistics to use.

    Returns:
        float32 `(channels, height, width)`.

    Raises:
        DataError: If the pixels do not fit the processor, e.g. 16-bit values without a factor.
    """
    try:
        arguments, options = _call_of(processor, modality)
        return processor._preprocess_image_like_inputs(image, *arguments, **options).pixel_values[0]
    except ImageFormatError as error:
        raise DataError(f"{error} (in a recipe: preprocessing.{modality}.<option>)") from error


@lru_cache(maxsize=32)
def _call_of(processor: Any, modality: str) -> tuple[tuple, dict[str, Any]]:
    """What a processor passes on when it is called for a modality: resolving its options for every image takes longer
    than the pixels do."""
    probe = copy.copy(processor)
    probe._preprocess_image_like_inputs = lambda images, *arguments, **options: (arguments, options)
    sensor = {"modality": modality} if _is_per_modality(processor) else {}
    fixed = {"do_resize": False, "do_center_crop": False, "input_data_format": "channels_first"}
    return probe([], return_tensors=None, **fixed, **sensor)


def denormalize(processor: Any, views: torch.Tensor, modality: str) -> torch.Tensor:
    """Normalised images `(batch, channels, height, width)` back on the scale 0-1 of their sensor's statistics."""
    statistics = _statistics(processor, modality)
    mean, spread = (views.new_tensor(statistics[name])[:, None, None] for name in ("image_mean", "image_std"))
    return views * spread + mean


def mean_image(processor: Any, modality: str, size: int) -> torch.Tensor:
    """An image `(channels, size, size)` of the mean colour, in the dtype and scale the processor expects."""
    statistics = _statistics(processor, modality)
    factor = statistics.get("rescale_factor", processor.rescale_factor)
    if not statistics.get("do_rescale", processor.do_rescale):
        factor = 1.0
    stored = torch.tensor(statistics["image_mean"])[:, None, None].expand(-1, size, size) / factor
    return stored.round().to(torch.uint8) if math.isclose(factor, UINT8_FACTOR) else stored
