"""RS-vHeat pretraining (arXiv 2411.17984): restore frequency-masked images, agree across sensors."""

import logging
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ...errors import ConfigurationError, did_you_mean
from ...models.configuration_rs_vheat import RSVHeatConfig
from ...models.image_processing_rs_vheat import RSVHeatImageProcessor
from ...models.modeling_rs_vheat import RSVHeatForPreTraining
from ..augmentation import Geometry
from ..batching import stack
from ..data import Batch
from ..image_folder import DecodedSample, Sample, check_modalities, pair_up
from ..manifest import find_scenes
from ..normalization import denormalize, normalize, resolve_processor
from ..recipe import Recipe
from ..starting_point import resolve_config, resolve_model
from .base import Objective, Terms

logger = logging.getLogger(__name__)


class RSVHeatPretraining(Objective):
    """Frequency-masked reconstruction of optical, SAR and paired images.

    Terms: `spatial` and `frequency`, one addend per image; `contrastive`, one per pair. The mask's radius is drawn per
    sample, so that neither workers nor processes change it.
    """

    reads_manifest = True
    reads_dataset = True

    def __init__(self, recipe: Recipe, checkpoint: Path | None = None) -> None:
        super().__init__(recipe, checkpoint)
        if recipe.model_fields.get("model_type", "rs_vheat") != "rs_vheat":
            raise ConfigurationError("objective 'rs_vheat' trains model_type 'rs_vheat' only: remove model.model_type.")
        self.config: RSVHeatConfig = resolve_config(RSVHeatConfig, recipe, checkpoint)
        self._channels: dict[str, int] = dict(self.config.modalities or {})
        check_modalities(self._channels)
        self.processor = resolve_processor(RSVHeatImageProcessor, recipe, checkpoint, self._channels)
        self.samples = self._find_samples()

    def _find_samples(self) -> list[Sample]:
        known = self._channels
        default = self.recipe.modality or self.config.default_modality
        if default not in known:
            raise ConfigurationError(f"Unknown modality '{default}': {did_you_mean(default, known)}")
        samples = pair_up(find_scenes(self.recipe, self.source, sorted(known), default))
        for modality in known:
            if not any(modality == name for sample in samples for name, _ in sample.files):
                logger.warning(
                    "No images of modality '%s': its stem stays untrained; leave it out of model.modalities.",
                    modality,
                )
        return samples

    def build_model(self) -> PreTrainedModel:
        return resolve_model(RSVHeatForPreTraining, self.config, self.recipe, self.checkpoint)

    def channels(self, modality: str) -> int:
        return self._channels[modality]

    def prepare(self, sample: DecodedSample, rng: np.random.Generator) -> Batch:
        geometry = Geometry.draw(rng, self.options.crop_scale)
        views = [
            normalize(self.processor, geometry.apply(image, self.recipe.image_size), modality)
            for modality, image in sample.images.items()
        ]
        return {
            **dict(zip(("pixel_values", "paired_pixel_values"), views, strict=False)),
            **dict(zip(("modality", "paired_modality"), sample.images, strict=False)),
            "mask_radius": rng.uniform(*self.config.mask_radius_range),
        }

    def collate(self, samples: list[Batch]) -> Batch:
        first = samples[0]
        views = [name for name in ("pixel_values", "paired_pixel_values") if name in first]
        return {
            **{name: stack([sample[name] for sample in samples]) for name in views},
            **{name: first[name] for name in ("modality", "paired_modality") if name in first},
            "mask_radius": torch.tensor([sample["mask_radius"] for sample in samples], dtype=torch.float32),
        }

    @property
    def term_weights(self) -> dict[str, float]:
        return {
            "spatial": self.config.spatial_loss_weight,
            "frequency": self.config.frequency_loss_weight,
            "contrastive": self.config.contrastive_loss_weight,
        }

    def counts(self, batch: Batch) -> dict[str, int]:
        images = len(batch["pixel_values"])
        if "paired_pixel_values" in batch:
            return {"spatial": 2 * images, "frequency": 2 * images, "contrastive": images}
        return {"spatial": images, "frequency": images, "contrastive": 0}

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Terms:
        output = model(**batch)
        losses = {
            "spatial": output.spatial_loss,
            "frequency": output.frequency_loss,
            "contrastive": output.contrastive_loss,
        }
        return {term: (values.sum(), len(values)) for term, values in losses.items() if values is not None}

    def picture(self, model: nn.Module, batch: Batch) -> list[torch.Tensor]:
        """Input, input without low frequencies, without high ones, and what is restored from the two."""
        modality = batch["modality"]
        output = model(batch["pixel_values"], modality=modality, mask_radius=batch["mask_radius"])
        views = (batch["pixel_values"], output.low_cut, output.high_cut, output.reconstruction)
        return [denormalize(self.processor, view, modality) for view in views]
