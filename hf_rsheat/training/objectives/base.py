"""The seam between the training loop and what is learned."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import ConfigurationError
from ..data import Batch
from ..image_folder import DecodedSample, Sample
from ..normalization import mean_image
from ..randomness import generator
from ..recipe import Recipe, build
from ..sources import ImageSource, open_source

Terms = dict[str, tuple[torch.Tensor, int]]
"""Per term the sum of its addends or the addends themselves, and their number."""


def check_share_range(name: str, value: tuple[float, float]) -> None:
    """Raise `ValueError` unless 0 < low <= high <= 1."""
    if not 0 < value[0] <= value[1] <= 1:
        raise ValueError(f"'{name}' must be low <= high within (0, 1], got {list(value)}")


@strict
@dataclass(kw_only=True)
class AugmentationOptions:
    """Options of objectives that look at random crops.

    Args:
        crop_scale: Range of the share of the image's area that a crop covers.
    """

    crop_scale: tuple[float | int, float | int] = (0.67, 1.0)

    def validate_crop_scale(self) -> None:
        check_share_range("crop_scale", self.crop_scale)


class Objective(ABC):
    """What is learned from which data by which model.

    The loop only sees *sums and counts per term*: it divides by counts over all processes and accumulation parts, so
    that neither changes the gradient, whatever the number of images, pairs or targets in each part.

    Subclasses set `config`, `processor` and `samples` in `__init__`. `prepare` and `collate` run in loader processes.

    Args:
        recipe: The run's recipe.
        checkpoint: The checkpoint being resumed, if any.
    """

    Options: ClassVar[type] = AugmentationOptions
    """Strict dataclass of `objective_options`."""
    counts_from_data: ClassVar[bool] = True
    """Whether `counts` needs the batch only; without it gradients cannot be accumulated."""
    every_parameter_every_step: ClassVar[bool] = False
    """Whether each step reaches all parameters; where it does not, several processes must look for those left out."""

    addends_per_image: ClassVar[bool] = False
    """Whether `loss` returns every term as a vector with one addend per image, in batch order; pruning needs it."""
    reads_manifest: ClassVar[bool] = False
    """Whether the samples may come from the recipe's `manifest`."""
    reads_dataset: ClassVar[bool] = False
    """Whether the samples may come from the recipe's `dataset`."""
    watches_terms: ClassVar[bool] = False
    """Whether `observe` wants the means of every step; it costs a synchronisation with the device."""

    best_by: ClassVar[str | None] = None
    """Score of `evaluate` that is highest for the best checkpoint; None for objectives without evaluation."""

    data_digest: str = ""
    """What else than files and labels the samples depend on, e.g. annotations; a resumed run notices a change."""

    config: PreTrainedConfig
    processor: Any
    samples: list[Sample]

    def __init__(self, recipe: Recipe, checkpoint: Path | None = None) -> None:
        if recipe.dataset and not self.reads_dataset:
            raise ConfigurationError(f"objective '{recipe.objective}' reads folders: set image_folder, not dataset.")
        self.recipe = recipe
        self.checkpoint = checkpoint
        self.options: Any = build(
            self.Options, recipe.objective_options, f"objective_options key of {recipe.objective}"
        )

    @cached_property
    def source(self) -> ImageSource:
        """Where the images of the samples are."""
        return open_source(self.recipe)

    @abstractmethod
    def build_model(self) -> PreTrainedModel:
        """The model to train, in float32."""

    def compiled_parts(self, model: PreTrainedModel) -> list[nn.Module]:
        """What `torch_compile` compiles: the model, or the parts of it whose shapes follow from those of the batch."""
        return [model]

    def exported(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model that the Hub folder at the end holds, made of the trained one."""
        return model

    def observe(self, means: dict[str, float]) -> None:  # noqa: B027 - most objectives need none
        """Take note of a step's mean per term, over all processes; called after each step where `watches_terms`."""

    def state(self) -> dict[str, Any]:
        """What `observe` has gathered, as JSON values; every checkpoint holds it."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027 - as above
        """Continue from the `state` of the checkpoint being resumed."""

    def card_context(self, context: dict[str, Any]) -> dict[str, Any]:
        """The facts on the exported card: an objective may add notes, and replaces options that name local paths."""
        return context

    @abstractmethod
    def channels(self, modality: str) -> int:
        """Channels of a modality's images."""

    @abstractmethod
    def prepare(self, sample: DecodedSample, rng: np.random.Generator) -> Batch:
        """Augment and normalise one sample. All randomness comes from `rng`.

        Raises:
            DataError: If the sample cannot be used; it is then left out of its batch and listed.
        """

    @abstractmethod
    def collate(self, samples: list[Batch]) -> Batch:
        """A batch of prepared samples, all of one group."""

    def stand_in(self, group: str) -> Batch:
        """A batch for a process without data, which has to take part in the collective forward and backward."""
        images = {name: mean_image(self.processor, name, self.recipe.image_size) for name in group.split("+")}
        return self.collate([self.prepare(DecodedSample(images, label=0), generator("stand-in"))])

    @property
    @abstractmethod
    def term_weights(self) -> dict[str, float]:
        """Every term and its weight in the loss; a term of weight 0 is only logged."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, step: int) -> Terms:
        """Per term the *sum* over the batch, or its addends, and their number; one without addends may be left out."""

    def picture(self, model: nn.Module, batch: Batch) -> list[torch.Tensor]:
        """Columns of a picture of the run, e.g. input, masked input and reconstruction; none by default.

        Returns:
            Each column `(batch, channels, height, width)` from 0 to 1.
        """
        return []

    def evaluate(
        self, model: PreTrainedModel, share: slice, gather: Callable[[list[Any]], list[Any]]
    ) -> dict[str, float] | None:
        """Measure the model on data of its own, so that the best checkpoint can be chosen; None where there is none.

        Args:
            model: The model; left in the mode it came in.
            share: Which samples this process takes.
            gather: Joins lists over all processes.
        """
        return None

    def counts(self, batch: Batch) -> dict[str, int]:
        """The numbers of addends that `loss` will return, from the batch alone."""
        raise NotImplementedError(f"{type(self).__name__} sets counts_from_data but has no counts().")
