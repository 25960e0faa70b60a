"""Momentum contrast of two views of each scene, for every family of backbones; see `momentum_contrast`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedModel

from ...models.configuration_rs4d import RS4DConfig
from ...models.configuration_rs_vheat import RSVHeatConfig
from ...models.configuration_selective_mae import SelectiveMAEConfig
from ...models.configuration_vheat import VHeatConfig
from ...models.image_processing_rs4d import RS4DImageProcessor
from ...models.image_processing_rs_vheat import RSVHeatImageProcessor
from ...models.image_processing_selective_mae import SelectiveMAEImageProcessor
from ...models.image_processing_vheat import VHeatImageProcessor
from ...models.modeling_rs4d import RS4DModel
from ...models.modeling_rs_vheat import RSVHeatModel
from ...models.modeling_selective_mae import SelectiveMAEModel
from ...models.modeling_vheat import VHeatModel
from ..augmentation import Geometry, Tone
from ..batching import stack
from ..checkpoint import load_weights
from ..data import Batch
from ..image_folder import DecodedSample, check_modalities, pair_up
from ..manifest import find_scenes
from ..momentum_contrast import MomentumContrast, gather_keys, info_nce, info_nce_in_batch, momentum_at
from ..normalization import normalize, resolve_processor
from ..recipe import Recipe
from ..starting_point import resolve_config, resolve_model
from .base import AugmentationOptions, Objective, Terms
from .families import find_modality, find_model_type, sensor_channels

_FAMILIES: dict[str, tuple[Any, Any, Any]] = {
    "rs_vheat": (RSVHeatConfig, RSVHeatModel, RSVHeatImageProcessor),
    "vheat": (VHeatConfig, VHeatModel, VHeatImageProcessor),
    "selective_mae": (SelectiveMAEConfig, SelectiveMAEModel, SelectiveMAEImageProcessor),
    "rs4d": (RS4DConfig, RS4DModel, RS4DImageProcessor),
}


@strict
@dataclass(kw_only=True)
class MocoOptions(AugmentationOptions):
    """Options of momentum contrast.

    Args:
        crop_scale: Range of the share of the image's area that a view covers.
        tone_strength: How much brightness and contrast of a view change, in standard deviations of the sensor.
        grey_share: Share of the views without colour.
        queue_size: Keys of earlier steps that a query is told apart from (MoCo v2); 0 takes the keys of the same batch
            over all processes instead, in both directions and with a predictor (MoCo v3), which wants large batches.
        temperature: Divides the cosine similarities.
        momentum: Momentum of the second encoder at the first and at the last step, along half a cosine.
        head_size: Hidden width of the heads.
        key_size: Width of the keys.
    """

    crop_scale: tuple[float | int, float | int] = (0.2, 1.0)
    tone_strength: float | int = 0.4
    grey_share: float | int = 0.2
    queue_size: int = 4096
    temperature: float | int = 0.2
    momentum: tuple[float | int, float | int] = (0.99, 1.0)
    head_size: int = 2048
    key_size: int = 128

    def validate_ranges(self) -> None:
        if not all(0 <= value <= 1 for value in (*self.momentum, self.tone_strength, self.grey_share)):
            raise ValueError("'momentum', 'tone_strength' and 'grey_share' must be within [0, 1]")
        if self.queue_size < 0 or min(self.head_size, self.key_size) < 1 or self.temperature <= 0:
            raise ValueError("'queue_size' must be at least 0, 'head_size', 'key_size' and 'temperature' above 0")


class MomentumContrastPretraining(Objective):
    """A view of a scene finds the other view of it; a pair of sensors gives one view each.

    Terms: `contrastive`, the cross-entropy (times twice the temperature in the form of MoCo v3, as there), and
    `accuracy`, the share of views whose nearest key is their own; one addend per scene. The momentum encoder follows
    once per optimiser step. The exported folder holds the backbone.
    """

    Options = MocoOptions
    counts_from_data = False  # the keys of an accumulated part could not be told apart from those of the next
    addends_per_image = True
    reads_manifest = True
    reads_dataset = True

    def __init__(self, recipe: Recipe, checkpoint: Path | None = None) -> None:
        super().__init__(recipe, checkpoint)
        model_type = find_model_type(recipe, checkpoint, _FAMILIES, "rs_vheat")
        config_class, self._encoder_class, processor_class = _FAMILIES[model_type]
        self._names_sensor = model_type == "rs_vheat"
        self.config = resolve_config(config_class, recipe, checkpoint)
        self._channels = sensor_channels(self.config)
        check_modalities(self._channels)
        default = find_modality(recipe, self.config, self._channels)
        self.processor = resolve_processor(processor_class, recipe, checkpoint, self._channels)
        self.samples = pair_up(find_scenes(recipe, self.source, sorted(self._channels), default))

    def build_model(self) -> PreTrainedModel:
        options, start = self.options, None if self.checkpoint else self.recipe.pretrained
        encoder = (
            resolve_model(self._encoder_class, self.config, self.recipe, None)
            if start
            else self._encoder_class(self.config)
        )
        width = getattr(self.config, "hidden_sizes", None) or [self.config.hidden_size]
        model = MomentumContrast(encoder, width[-1], options.head_size, options.key_size, options.queue_size)
        if self.checkpoint is not None:
            load_weights(self.checkpoint, model)
        return model

    def exported(self, model: Any) -> PreTrainedModel:
        return model.encoder.eval()

    def channels(self, modality: str) -> int:
        return self._channels[modality]

    def prepare(self, sample: DecodedSample, rng: np.random.Generator) -> Batch:
        first, *others = sample.images.items()
        sensors = (first, others[0] if others else first)
        views = (self._view(modality, image, rng) for modality, image in sensors)
        return {**dict(zip(("first", "second"), views, strict=True)), "modalities": [name for name, _ in sensors]}

    def _view(self, modality: str, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        options = self.options
        view = Geometry.draw(rng, options.crop_scale).apply(image, self.recipe.image_size)
        tone = Tone.draw(rng, len(view), options.tone_strength, options.grey_share)
        return tone.apply(normalize(self.processor, view, modality))

    def collate(self, samples: list[Batch]) -> Batch:
        views = {name: stack([sample[name] for sample in samples]) for name in ("first", "second")}
        return {**views, "modalities": samples[0]["modalities"], "used": True}

    def stand_in(self, group: str) -> Batch:
        return {**super().stand_in(group), "used": False}

    @property
    def term_weights(self) -> dict[str, float]:
        return {"contrastive": 1.0, "accuracy": 0.0}

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Terms:
        options, trained = self.options, extract_model_from_parallel(model)
        momentum = momentum_at(step, self.recipe.max_steps, *options.momentum)
        trained.follow(momentum)  # before the forward pass: to the weights that the step before has left
        in_batch = options.queue_size == 0
        queries, keys = model(self.inputs(batch), both=in_batch)
        shared, first = gather_keys(keys, batch["used"])
        if in_batch:
            if not batch["used"]:  # a stand-in has no key among them
                shared, first = keys, 0
            pairs = zip(queries, shared, strict=True)
            found = [info_nce_in_batch(query, key, first, options.temperature) for query, key in pairs]
            scale = 2 * options.temperature
        else:
            found = [info_nce(queries[0], keys[0], trained.queue.clone(), options.temperature)]
            scale = 1.0
            trained.enqueue(shared[0])
        losses = scale * torch.stack([loss for loss, _ in found]).mean(0)
        nearest = torch.stack([hit.float() for _, hit in found]).mean(0)
        return {"contrastive": (losses, len(losses)), "accuracy": (nearest, len(nearest))}

    def inputs(self, batch: Batch) -> list[dict[str, Any]]:
        """What the backbone takes for the first and for the second views of a batch."""
        sensors = [{"modality": name} if self._names_sensor else {} for name in batch["modalities"]]
        return [
            {"pixel_values": batch[name], **sensor} for name, sensor in zip(("first", "second"), sensors, strict=True)
        ]
