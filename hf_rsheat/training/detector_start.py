"""Where a detector comes from: config fields, a detector's or a backbone's folder, a SAM, or a checkpoint to resume."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ..errors import CheckpointError, ConfigurationError, did_you_mean
from ..models.configuration_rs4d_instances import BACKBONE_CONFIGS, RS4DInstanceConfig
from ..models.image_processing_rs4d import RS4DImageProcessor
from ..models.modeling_rs4d_instances import BACKBONES, RS4DForInstanceSegmentation
from .normalization import resolve_processor
from .recipe import Recipe
from .starting_point import resolve_model, stored_model_type

_DEFAULT_BACKBONE = "rs4d"
_NEW_WITH_NEW_CLASSES = ("box_head.", "mask_head.")
_NEW_IN_A_BACKBONE = ("hidden_states_norms.",)  # a hierarchical model that is no backbone does not normalise its maps


def detector_config(recipe: Recipe, checkpoint: Path | None) -> RS4DInstanceConfig:
    """The config of the detector to train.

    Args:
        recipe: Its `model` names fields of `RS4DInstanceConfig` (those of the backbone below `backbone_config`), a
            folder of a detector or of a backbone to start from, or both.
        checkpoint: A checkpoint to resume; its config is taken as it is.

    Raises:
        ConfigurationError: For unknown fields (naming the nearest valid one), values the config refuses, or a folder of
            another kind of model.
    """
    if checkpoint is not None:
        return RS4DInstanceConfig.from_pretrained(checkpoint)
    fields = {name: value for name, value in recipe.model_fields.items() if name != "model_type"}
    _check_names(fields, RS4DInstanceConfig, "model field")
    backbone = dict(fields.pop("backbone_config", {}))
    start = stored_model_type(recipe.pretrained) if recipe.pretrained else None
    try:
        if start == RS4DInstanceConfig.model_type:
            if backbone:
                raise ConfigurationError("The backbone of a detector to start from stays: drop model.backbone_config.")
            # Not from_pretrained(**fields): it would set the fields after those that follow from them.
            stored = RS4DInstanceConfig.get_config_dict(str(recipe.pretrained))[0]
            return RS4DInstanceConfig.from_dict({**stored, **fields})
        return RS4DInstanceConfig(backbone_config=_backbone_config(recipe, start, backbone), **fields)
    except (StrictDataclassError, TypeError, ValueError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"Invalid model: {error.__cause__ or error}") from error


def _backbone_config(recipe: Recipe, start: str | None, fields: dict[str, Any]) -> Any:
    model_type = start or fields.get("model_type", _DEFAULT_BACKBONE)
    if model_type not in BACKBONE_CONFIGS or fields.get("model_type", model_type) != model_type:
        raise ConfigurationError(f"No detector over '{model_type}': {did_you_mean(str(model_type), BACKBONE_CONFIGS)}")
    config_class = BACKBONE_CONFIGS[model_type]
    fields = {name: value for name, value in fields.items() if name != "model_type"}
    _check_names(fields, config_class, "backbone_config field")
    if start is not None:
        stored = config_class.get_config_dict(str(recipe.pretrained))[0]
        # What follows from the number of layers, and from the detector, is not taken over.
        kept = {name: stored[name] for name in stored.keys() - {"stage_names", "out_features", "out_indices"}}
        return config_class.from_dict({**kept, **fields})
    return config_class(**{"image_size": recipe.image_size, **fields})


def _check_names(fields: dict[str, Any], config_class: Any, what: str) -> None:
    known = {field.name for field in dataclasses.fields(config_class) if not field.name.startswith("_")}
    for name in fields:
        if name not in known:
            raise ConfigurationError(f"Unknown {what} '{name}': {did_you_mean(name, known)}")


def detector_processor(config: RS4DInstanceConfig, recipe: Recipe, checkpoint: Path | None, modality: str) -> Any:
    """The image processor to train with and to export: RS4D's, whatever the backbone.

    A vHeat or RS-vHeat to start from has a processor of another kind, of which only the statistics are taken.

    Raises:
        ConfigurationError: For statistics that do not fit the images.
    """
    channels = {modality: int(getattr(config.backbone_config, "num_channels", 3))}
    if checkpoint is None and recipe.pretrained is not None and config.is_hierarchical:
        stored = RS4DImageProcessor.get_image_processor_dict(recipe.pretrained)[0]
        if stored.get("image_processor_type") != "RS4DImageProcessor":
            statistics = {**stored, **stored.get("modalities", {}).get(modality, {})}
            given = {name: statistics[name] for name in ("image_mean", "image_std")}
            recipe = dataclasses.replace(
                recipe,
                model=recipe.model_fields,
                preprocessing={modality: {**given, **recipe.preprocessing.get(modality, {})}},
            )
    processor = resolve_processor(RS4DImageProcessor, recipe, checkpoint, channels)
    processor.mask_layout = config.mask_layout
    processor.return_pixel_mask = True
    return processor


def build_detector(
    config: RS4DInstanceConfig, recipe: Recipe, checkpoint: Path | None, sam: str | None
) -> RS4DForInstanceSegmentation:
    """The detector to train, in float32.

    Args:
        config: What `detector_config` returned, with the classes.
        recipe: The run's recipe.
        checkpoint: A checkpoint to resume.
        sam: Folder of a SAM whose mask decoder the "prompt" head starts from.

    Raises:
        CheckpointError: If weights to start from are missing or have other shapes.
        ConfigurationError: If there is no SAM in the folder, or it does not fit the head.
    """
    starts_from_backbone = (
        checkpoint is None
        and recipe.pretrained is not None
        and stored_model_type(recipe.pretrained) != RS4DInstanceConfig.model_type
    )
    if starts_from_backbone:
        model: Any = RS4DForInstanceSegmentation(config)
        _load_backbone(model, str(recipe.pretrained))
    else:
        model = resolve_model(RS4DForInstanceSegmentation, config, recipe, checkpoint, may_be_new=_NEW_WITH_NEW_CLASSES)
    if sam is not None and checkpoint is None:
        try:
            model.load_sam_mask_decoder(sam)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"objective_options.sam '{sam}': {error}") from error
    return model


def _load_backbone(model: Any, folder: str) -> None:
    """Copy a backbone's weights out of the folder of any model of its family."""
    backbone_class: Any = BACKBONES[model.config.backbone_config.model_type]
    try:
        loaded, info = backbone_class.from_pretrained(
            folder, config=model.backbone.config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"Cannot start from '{folder}': {error}") from error
    if missing := sorted(name for name in info["missing_keys"] if not name.startswith(_NEW_IN_A_BACKBONE)):
        raise CheckpointError(
            f"'{folder}' lacks {len(missing)} weights of the backbone (first: {missing[0]}): "
            "drop the model.backbone_config fields that change its architecture."
        )
    model.backbone.load_state_dict(loaded.state_dict())
