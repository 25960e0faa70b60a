"""Fine-tuning of an image classifier from a folder with one sub-folder per class."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from ...errors import ConfigurationError
from ...models.configuration_rs4d import RS4DConfig
from ...models.configuration_rs_vheat import RSVHeatConfig
from ...models.configuration_selective_mae import SelectiveMAEConfig
from ...models.configuration_vheat import VHeatConfig
from ...models.image_processing_rs4d import RS4DImageProcessor
from ...models.image_processing_rs_vheat import RSVHeatImageProcessor
from ...models.image_processing_selective_mae import SelectiveMAEImageProcessor
from ...models.image_processing_vheat import VHeatImageProcessor
from ...models.modeling_rs4d import RS4DForImageClassification
from ...models.modeling_rs_vheat import RSVHeatForImageClassification
from ...models.modeling_selective_mae import SelectiveMAEForImageClassification
from ...models.modeling_vheat import VHeatForImageClassification
from ..augmentation import Geometry
from ..batching import stack
from ..data import Batch
from ..image_folder import DecodedSample, check_modalities
from ..normalization import normalize, resolve_processor
from ..recipe import Recipe
from ..starting_point import resolve_config, resolve_model
from .base import AugmentationOptions, Objective, Terms
from .families import find_modality, find_model_type, sensor_channels

_FAMILIES: dict[str, tuple[Any, Any, Any]] = {
    "rs_vheat": (RSVHeatConfig, RSVHeatForImageClassification, RSVHeatImageProcessor),
    "vheat": (VHeatConfig, VHeatForImageClassification, VHeatImageProcessor),
    "selective_mae": (SelectiveMAEConfig, SelectiveMAEForImageClassification, SelectiveMAEImageProcessor),
    "rs4d": (RS4DConfig, RS4DForImageClassification, RS4DImageProcessor),
}


@strict
@dataclass(kw_only=True)
class ClassificationOptions(AugmentationOptions):
    """Options of the classification objective.

    Args:
        crop_scale: Range of the share of the image's area that a crop covers.
        label_smoothing: Share of the target spread evenly over all classes.
    """

    label_smoothing: float | int = 0.0

    def validate_label_smoothing(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"'label_smoothing' must be in [0, 1), got {self.label_smoothing}")


class Classification(Objective):
    """Cross-entropy on class folders. `model.model_type`: `rs_vheat` (default), `vheat`, `selective_mae` or `rs4d`.

    Started from a pretraining folder, the trunk is loaded and the classifier is new. Terms: `cross_entropy`, and
    `accuracy`, which is only logged.
    """

    Options = ClassificationOptions
    addends_per_image = True
    reads_dataset = True

    def __init__(self, recipe: Recipe, checkpoint: Path | None = None) -> None:
        super().__init__(recipe, checkpoint)
        self._model_type = find_model_type(recipe, checkpoint, _FAMILIES, "rs_vheat")
        config_class, self._model_class, processor_class = _FAMILIES[self._model_type]
        self.config = resolve_config(config_class, recipe, checkpoint)
        self._channels = sensor_channels(self.config)
        check_modalities(self._channels)
        self.samples, classes = self.source.classes(find_modality(recipe, self.config, self._channels))
        self._name_classes(classes)
        self.processor = resolve_processor(processor_class, recipe, checkpoint, self._channels)

    def _name_classes(self, classes: list[str]) -> None:
        names = dict(enumerate(classes))
        if self.checkpoint is not None and dict(self.config.id2label or {}) != names:
            raise ConfigurationError(
                f"The checkpoint was trained on other classes than '{self.recipe.data_name}' has: "
                "start a new run from it with model=FOLDER instead of resuming."
            )
        self.config.id2label = names
        self.config.label2id = {name: index for index, name in names.items()}

    def build_model(self) -> PreTrainedModel:
        return resolve_model(self._model_class, self.config, self.recipe, self.checkpoint)

    def channels(self, modality: str) -> int:
        return self._channels[modality]

    def prepare(self, sample: DecodedSample, rng: np.random.Generator) -> Batch:
        ((modality, image),) = sample.images.items()
        view = Geometry.draw(rng, self.options.crop_scale).apply(image, self.recipe.image_size)
        return {"pixel_values": normalize(self.processor, view, modality), "label": sample.label, "modality": modality}

    def collate(self, samples: list[Batch]) -> Batch:
        return {
            "pixel_values": stack([sample["pixel_values"] for sample in samples]),
            "labels": torch.tensor([sample["label"] for sample in samples]),
            "modality": samples[0]["modality"],
        }

    @property
    def term_weights(self) -> dict[str, float]:
        return {"cross_entropy": 1.0, "accuracy": 0.0}

    def counts(self, batch: Batch) -> dict[str, int]:
        images = len(batch["labels"])
        return {"cross_entropy": images, "accuracy": images}

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Terms:
        labels = batch["labels"]
        sensor = {"modality": batch["modality"]} if self._model_type == "rs_vheat" else {}
        logits = model(pixel_values=batch["pixel_values"], **sensor).logits
        entropy = functional.cross_entropy(
            logits.float(), labels, reduction="none", label_smoothing=float(self.options.label_smoothing)
        )
        return {
            "cross_entropy": (entropy, len(labels)),
            "accuracy": ((logits.argmax(-1) == labels).float(), len(labels)),
        }
