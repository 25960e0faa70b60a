"""Distillation of a SAM encoder into RS4D (arXiv 2606.25324).

Published: an L1 loss on SAM's features, from noised and masked images. Ours: what is compared (the student's final map
with the output of SAM's neck), what noise and masks are (`input_corruption`), their schedule (`distillation_schedule`).
"""

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedModel

from ...errors import ConfigurationError
from ...models.configuration_rs4d import RS4DConfig
from ...models.image_processing_rs4d import RS4DImageProcessor
from ...models.input_corruption import corrupt
from ...models.modeling_rs4d_distillation import RS4DForDistillation
from ..augmentation import Geometry
from ..batching import stack
from ..data import Batch
from ..distillation_schedule import AdaptiveState, CorruptionSchedule
from ..feature_colours import false_colours
from ..image_folder import DecodedSample, Sample, image_paths
from ..normalization import denormalize, mean_image, normalize, resolve_processor
from ..randomness import generator
from ..recipe import Recipe, build
from ..starting_point import resolve_config, resolve_model
from ..teacher import SYMMETRIES, Precision, Teacher, whole_view
from ..teacher_cache import TeacherCache, build_cache, cache_key
from .base import Objective, Terms, check_share_range

MODALITY = "optical"
_CARD_NOTES = (
    "Distilled from a SAM encoder with an L1 loss between the last feature map and the teacher's neck output. The loss "
    "is published, and that images are noised and masked; which maps are compared, what noise and masks are, and how "
    "their ratios change over the run are this package's choice.",
)


@strict
@dataclass(kw_only=True)
class RS4DDistillationOptions(CorruptionSchedule):
    """Options of the distillation, besides those of `CorruptionSchedule`.

    Args:
        teacher: Folder with a SAM or SAM 2 model (or its vision encoder) of transformers and its image processor.
        teacher_dtype: What the teacher computes in; `bfloat16` halves its memory on a GPU.
        teacher_cache: Folder of maps made by `hf-rsheat distill cache`; None runs the teacher in every step.
        crop_scale: Range of the share of the image's area that a random crop covers, which needs the live teacher; None
            shows whole images, fitted and padded as the processors of SAM and RS4D do.
        symmetries: Whether whole images are also mirrored and turned (a cache then holds eight maps per image). Crops
            always are.
        noise_ratio: Standard deviation of the student's noise, as a share of that of the image.
        mask_ratio: Share of the student's patches that are masked.
    """

    teacher: str
    teacher_dtype: Precision = "float32"
    teacher_cache: str | None = None
    crop_scale: list[float | int] | tuple[float | int, ...] | None = None
    symmetries: bool = False
    noise_ratio: float | int = 0.2
    mask_ratio: float | int = 0.2

    def validate_views(self) -> None:
        if self.crop_scale is not None:
            if len(self.crop_scale) != 2:
                raise ValueError(f"'crop_scale' must be low and high, got {list(self.crop_scale)}")
            check_share_range("crop_scale", (self.crop_scale[0], self.crop_scale[1]))
            if self.teacher_cache is not None:
                raise ValueError("random crops have no cached maps: remove 'crop_scale' or 'teacher_cache'")

    def validate_ratios(self) -> None:
        if self.noise_ratio < 0:
            raise ValueError(f"'noise_ratio' must be at least 0, got {self.noise_ratio}")
        highest = self.mask_ratio * (1 if self.schedule == "constant" else self.strength_range[1])
        if not 0 <= self.mask_ratio <= highest < 1:
            raise ValueError(f"'mask_ratio' must stay in [0, 1) at the highest strength, got {highest:g}")


class RS4DDistillation(Objective):
    """RS4D learns the map of a frozen SAM encoder; the exported folder holds the plain [`RS4DModel`].

    Terms: `l1`, the mean absolute difference per image, and for the log `l1_times_tokens` (the published logs print
    4096 times the loss at 1024 px), `noise_ratio` and `mask_ratio`. Every draw belongs to a sample; the ratios are the
    same for all images of a step and follow from the schedule, which sees the losses of all processes.
    """

    Options = RS4DDistillationOptions
    every_parameter_every_step = True
    addends_per_image = True

    def __init__(self, recipe: Recipe, checkpoint: Path | None = None) -> None:
        super().__init__(recipe, checkpoint)
        if recipe.model_fields.get("model_type", "rs4d") != "rs4d":
            raise ConfigurationError("objective 'rs4d_distill' trains model_type 'rs4d': remove model.model_type.")
        self.teacher = Teacher(self.options.teacher, self.options.teacher_dtype)
        self._teacher_input = self.teacher.input_for(recipe.image_size)
        self.config: RS4DConfig = resolve_config(RS4DConfig, recipe, checkpoint)
        self._fit_config()
        self.processor = resolve_processor(RS4DImageProcessor, recipe, checkpoint, {MODALITY: 3})
        self._same_input = self._teacher_input.normalizes_like(self.processor)
        paths = image_paths(Path(recipe.image_folder))
        # The label is the sample's index, by which `prepare` finds the image's cached maps.
        self.samples = [Sample(((MODALITY, path),), label=index) for index, path in enumerate(paths)]
        self._cache: TeacherCache | None = None
        if self.options.teacher_cache is not None:
            key = cache_key(self.teacher, recipe.image_size, self.options.symmetries)
            self._cache = TeacherCache(self.options.teacher_cache, key)
            self._cache.check_complete(paths)
        self._patches = (-(-recipe.image_size // self.config.patch_size)) ** 2
        self.watches_terms = self.options.schedule == "adaptive"
        self._state = AdaptiveState()

    def _fit_config(self) -> None:
        config = self.config
        if config.num_channels != 3:
            raise ConfigurationError(f"The teacher sees RGB, the student {config.num_channels} channels: set 3.")
        if config.out_type == "avg_featmap":
            raise ConfigurationError("Maps cannot teach the norm of 'avg_featmap': remove model.out_type.")
        if config.patch_size != 16:
            raise ConfigurationError(f"The teacher's maps have a stride of 16 px, the student's {config.patch_size}.")
        config.teacher_channels = None if self.teacher.channels == config.hidden_size else self.teacher.channels

    def build_model(self) -> PreTrainedModel:
        return resolve_model(RS4DForDistillation, self.config, self.recipe, self.checkpoint)

    def exported(self, model: PreTrainedModel) -> PreTrainedModel:
        student: Any = model.base_model
        student.config = copy.deepcopy(student.config)
        student.config.teacher_channels = None  # the projector stays behind, and must not be made anew from random
        return student

    def channels(self, modality: str) -> int:
        return 3

    def prepare(self, sample: DecodedSample, rng: np.random.Generator) -> Batch:
        image, options, size = sample.images[MODALITY], self.options, self.recipe.image_size
        symmetry = int(rng.integers(SYMMETRIES)) if options.symmetries else 0
        if options.crop_scale is None:
            view = whole_view(image, size, symmetry)
        else:
            view = Geometry.draw(rng, options.crop_scale).apply(image, size)
        prepared = self._student_input(view, rng)
        if self._cache is not None and sample.label is not None:
            prepared["teacher_features"] = self._cache.read(self.samples[sample.label].files[0][1], image, symmetry)
        elif not self._same_input:
            prepared["teacher_pixel_values"] = self._teacher_input(view)
        return prepared

    def _student_input(self, view: torch.Tensor, rng: np.random.Generator) -> Batch:
        size = self.recipe.image_size
        return {
            "pixel_values": normalize(self.processor, view, MODALITY),
            "noise": torch.from_numpy(rng.standard_normal((3, size, size), dtype=np.float32)),
            "mask_order": torch.from_numpy(rng.permutation(self._patches)),
        }

    def collate(self, samples: list[Batch]) -> Batch:
        return {name: stack([sample[name] for sample in samples]) for name in samples[0]}

    def stand_in(self, group: str) -> Batch:
        size = self.recipe.image_size
        prepared = self._student_input(mean_image(self.processor, MODALITY, size), generator("stand-in"))
        side = -(-size // self.config.patch_size)
        return self.collate([{**prepared, "teacher_features": torch.zeros(self.teacher.channels, side, side)}])

    @property
    def term_weights(self) -> dict[str, float]:
        return {"l1": 1.0, "l1_times_tokens": 0.0, "noise_ratio": 0.0, "mask_ratio": 0.0}

    def counts(self, batch: Batch) -> dict[str, int]:
        return dict.fromkeys(self.term_weights, len(batch["pixel_values"]))

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Terms:
        strength = self.options.strength(step / max(1, self.recipe.max_steps - 1), self._state)
        ratios = {"noise_ratio": strength * self.options.noise_ratio, "mask_ratio": strength * self.options.mask_ratio}
        # Noised and masked here and not by the model, which torch.compile would compile anew for every ratio.
        noise, order, patch_size = batch["noise"], batch["mask_order"], self.config.patch_size
        seen = corrupt(batch["pixel_values"], noise, order, ratios["noise_ratio"], ratios["mask_ratio"], patch_size)
        output = model(seen, teacher_features=self._target(batch))
        losses, images = output.loss_per_image, len(batch["pixel_values"])
        return {
            "l1": (losses, images),
            "l1_times_tokens": (self._patches * losses.detach(), images),
            **{name: (losses.new_full((images,), ratio), images) for name, ratio in ratios.items()},
        }

    def _target(self, batch: Batch) -> torch.Tensor:
        if "teacher_features" in batch:
            return batch["teacher_features"]
        return self.teacher(batch["teacher_pixel_values" if "teacher_pixel_values" in batch else "pixel_values"])

    def picture(self, model: nn.Module, batch: Batch) -> list[torch.Tensor]:
        """Input, input with noise and masks of the ratios set, the teacher's map and the student's of the latter."""
        options, pixel_values, target = self.options, batch["pixel_values"], self._target(batch)
        ratios = (float(options.noise_ratio), float(options.mask_ratio))
        seen = corrupt(pixel_values, batch["noise"], batch["mask_order"], *ratios, self.config.patch_size)
        return [
            *(denormalize(self.processor, view, MODALITY) for view in (pixel_values, seen)),
            *(false_colours(target, maps, self.recipe.image_size) for maps in (target, model(seen).feature_map)),
        ]

    def observe(self, means: dict[str, float]) -> None:
        self._state = self.options.advance(self._state, means["l1"])

    def state(self) -> dict[str, Any]:
        return asdict(self._state)

    def load_state(self, state: dict[str, Any]) -> None:
        self._state = AdaptiveState(**state)

    def card_context(self, context: dict[str, Any]) -> dict[str, Any]:
        options = {name: value for name, value in asdict(self.options).items() if name != "teacher_cache"}
        options["teacher"] = f"{self.teacher.folder.name} (SHA-256 {self.teacher.fingerprint()['weights']})"
        recipe = {**context["recipe"], "objective_options": options}
        return {**context, "recipe": recipe, "notes": [*context.get("notes", []), *_CARD_NOTES]}


def cache_for_recipe(recipe: Recipe, overwrite: bool = False) -> dict[str, str]:
    """Make or complete the cache that a recipe names, on the GPU if there is one.

    Returns:
        The images that cannot be read, path -> reason.

    Raises:
        ConfigurationError: If the recipe has another objective or no `teacher_cache`.
        CacheError: See `build_cache`.
    """
    if recipe.objective != "rs4d_distill":
        raise ConfigurationError(f"Only objective 'rs4d_distill' has a teacher; the recipe has '{recipe.objective}'.")
    options = build(RS4DDistillationOptions, recipe.objective_options, "objective_options key of rs4d_distill")
    if options.teacher_cache is None:
        raise ConfigurationError("The recipe names no cache: set objective_options.teacher_cache to a folder.")
    folder = Path(recipe.image_folder)
    return build_cache(
        options.teacher_cache,
        Teacher(options.teacher, options.teacher_dtype),
        folder,
        image_paths(folder),
        recipe.image_size,
        options.symmetries,
        device="cuda" if torch.cuda.is_available() else "cpu",
        overwrite=overwrite,
    )
