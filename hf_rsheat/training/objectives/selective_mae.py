"""SelectiveMAE pretraining (arXiv 2406.11933): reconstruct a quarter of the patches from a selected 15 %."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedModel

from ...errors import ConfigurationError
from ...models.configuration_selective_mae import SelectiveMAEConfig
from ...models.image_processing_selective_mae import SelectiveMAEImageProcessor
from ...models.modeling_selective_mae import SelectiveMAEForPreTraining
from ...models.token_selection import SelectionStage, permutation_lengths, stage_at, token_counts
from ...patch_figures import selective_mae_views
from ..augmentation import Geometry
from ..batching import stack
from ..data import Batch
from ..image_folder import DecodedSample, check_modalities
from ..manifest import find_scenes
from ..normalization import denormalize, normalize, resolve_processor
from ..randomness import generator
from ..recipe import Recipe
from ..starting_point import resolve_config, resolve_model
from .base import AugmentationOptions, Objective, Terms

MODALITY = "optical"


@strict
@dataclass(kw_only=True)
class MaskedAutoencoderOptions(AugmentationOptions):
    """Options of the masked autoencoders.

    Args:
        crop_scale: Range of the share of the image's area that a crop covers; wide, as in the original.
    """

    crop_scale: tuple[float | int, float | int] = (0.2, 1.0)


class SelectiveMAEPretraining(Objective):
    """Masked reconstruction with selected tokens; one term, `reconstruction`, with one addend per image.

    All draws are made per sample, or per step for the permutations that a batch shares: neither workers, nor processes,
    nor gradient accumulation change them. The stage of the schedule follows from the share of steps done.
    """

    Options = MaskedAutoencoderOptions
    every_parameter_every_step = True
    addends_per_image = True
    reads_manifest = True
    reads_dataset = True

    def __init__(self, recipe: Recipe, checkpoint: Path | None = None) -> None:
        super().__init__(recipe, checkpoint)
        if recipe.model_fields.get("model_type", "selective_mae") != "selective_mae":
            raise ConfigurationError("objective 'selective_mae' trains model_type 'selective_mae': remove it.")
        self.config: SelectiveMAEConfig = resolve_config(SelectiveMAEConfig, recipe, checkpoint)
        channels = {MODALITY: self.config.num_channels}
        check_modalities(channels)
        self.processor = resolve_processor(SelectiveMAEImageProcessor, recipe, checkpoint, channels)
        self.samples = find_scenes(recipe, self.source, [MODALITY], MODALITY)
        rows, columns = self.config.grid(recipe.image_size, recipe.image_size)
        self._length = rows * columns
        try:
            self._counts = token_counts(self._length, 1 - self.config.mask_ratio, self.config.kept_mask_ratio)
        except ValueError as error:
            raise ConfigurationError(f"Invalid model for images of {recipe.image_size} px: {error}") from error
        self._progress: dict[tuple, float] = {}

    def build_model(self) -> PreTrainedModel:
        return resolve_model(SelectiveMAEForPreTraining, self.config, self.recipe, self.checkpoint)

    def channels(self, modality: str) -> int:
        return self.config.num_channels

    def prepare(self, sample: DecodedSample, rng: np.random.Generator) -> Batch:
        ((modality, image),) = sample.images.items()
        view = Geometry.draw(rng, self.options.crop_scale).apply(image, self.recipe.image_size)
        counts = self._counts
        left = self._length - counts.seeds - sum(counts.rounds)
        return {
            "pixel_values": normalize(self.processor, view, modality),
            "seed_ids": rng.permutation(self._length)[: counts.seeds],
            "reconstruct_choice": rng.permutation(left)[: counts.reconstructed],
        }

    def collate(self, samples: list[Batch]) -> Batch:
        batch: Batch = {"pixel_values": stack([sample["pixel_values"] for sample in samples])}
        if self.config.criterion == "uniform":  # "hog" ranks tokens and draws neither
            for name in ("seed_ids", "reconstruct_choice"):
                batch[name] = torch.from_numpy(np.stack([sample[name] for sample in samples]))
        return batch

    @property
    def term_weights(self) -> dict[str, float]:
        return {"reconstruction": 1.0}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"reconstruction": len(batch["pixel_values"])}

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Terms:
        progress = self._representative(min(1.0, step / self.recipe.max_steps))
        output = model(**batch, progress=progress, permutations=self._permutations(progress, step))
        return {"reconstruction": (output.loss_per_image, len(output.loss_per_image))}

    def picture(self, model: nn.Module, batch: Batch) -> list[torch.Tensor]:
        """Input, encoded patches, and these with the reconstructed ones; the patches are the same at every step."""
        views = selective_mae_views(model, batch["pixel_values"])
        shown = (batch["pixel_values"], views.encoded, views.restored)
        return [denormalize(self.processor, view, MODALITY) for view in shown]

    def _stage(self, progress: float) -> SelectionStage:
        total = self.config.total_epochs
        return stage_at(progress * total, total, self.config.smooth_epochs)

    def _representative(self, progress: float) -> float:
        """The first share of training at which tokens were chosen just as at this one.

        There are few ways to choose, and `torch.compile` would compile the model anew for every other number.
        """
        stage = self._stage(progress)
        way = (stage.phase, *(int(stage.share * number) for number in self._counts.rounds))
        return self._progress.setdefault(way, progress)

    def _permutations(self, progress: float, step: int) -> list[torch.Tensor]:
        """The permutations that all images of a step share, on every process."""
        rng = generator("permutations", self.recipe.seed, step)
        lengths = permutation_lengths(self._length, self._counts, self._stage(progress))
        return [torch.from_numpy(rng.permutation(n)) for n in lengths]
