"""Slimmable training: a model that works at every width, as a wrapper of another objective.

Known of arXiv 2601.22841: five widths a step - full, minimal, three random - with distillation from the full one. Not
published, so ours: the smallest width, loss weights, and what is distilled. The sandwich rule is that of universally
slimmable networks (arXiv 1903.05134).
"""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import convert_to_fp32, extract_model_from_parallel
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from ...errors import did_you_mean
from ...slimming.shells import Shells
from ..data import Batch
from ..image_folder import DecodedSample
from ..randomness import generator
from ..recipe import Recipe
from .base import Objective, Terms

logger = logging.getLogger(__name__)

# Where the features that are distilled leave the encoder; `moco` distils through its keys instead.
_FEATURES: dict[str, str | None] = {
    "mae": "vit.layernorm",
    "selective_mae": "selective_mae.layernorm",
    "rs_vheat": "rs_vheat.encoder",
    "moco": None,
}
_HALVES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@strict
@dataclass(kw_only=True)
class SlimmableOptions:
    """Options of slimmable training.

    Args:
        objective: What is learned: `mae`, `selective_mae`, `rs_vheat` or `moco`.
        objective_options: Options of that objective.
        widths_per_step: Widths a step trains: the full one, the smallest one, and random ones between them.
        min_width: The smallest width. Ours.
        sub_loss_weight: Weight of each width below the full one; 1 / (widths_per_step - 1) if None, so that all of them
            together weigh as much as the full one (in a trial with weight 1 each, training stalled). Ours.
        distillation: Share of a narrow width's loss that asks for the full width's features instead of the objective's
            own targets; half if None, and 0 for `moco`, whose keys come from the full width anyway. Ours.
    """

    objective: str
    objective_options: dict[str, Any] = field(default_factory=dict)
    widths_per_step: int = 5
    min_width: float | int = 0.01
    sub_loss_weight: float | int | None = None
    distillation: float | int | None = None

    def validate_options(self) -> None:
        if self.objective not in _FEATURES:
            raise ValueError(f"'objective' cannot be '{self.objective}': {did_you_mean(self.objective, _FEATURES)}")
        if self.widths_per_step < 2:
            raise ValueError("'widths_per_step' must be at least 2: the full width and the smallest")
        if not 0 < self.min_width < 1:
            raise ValueError(f"'min_width' must be in (0, 1), got {self.min_width}")
        if self.sub_loss_weight is not None and self.sub_loss_weight <= 0:
            raise ValueError("'sub_loss_weight' must be above 0")
        if not 0 <= (self.distillation or 0) <= 1 or (self.distillation and _FEATURES[self.objective] is None):
            raise ValueError("'distillation' must be in [0, 1], and 0 for moco")


class Slimmable(Objective):
    """Trains the full width and narrower ones of another objective together, on the same batch, masks and views.

    Terms: those of the objective at full width; the same at the narrow widths, as `narrow_<term>`; and `distillation`,
    the squared distance of normalised features to the full width's. Narrow widths are slices of the full weights and
    the same function as what `hf_rsheat.slimming.slim` writes. The exported folder holds the full model.
    """

    Options = SlimmableOptions
    reads_dataset = True  # or the objective within refuses

    def __init__(self, recipe: Recipe, checkpoint: Path | None = None) -> None:
        super().__init__(recipe, checkpoint)
        from . import get_objective

        options = self.options
        wrapped = dataclasses.replace(
            recipe, objective=options.objective, objective_options=dict(options.objective_options)
        )
        self.inner = get_objective(options.objective)(wrapped, checkpoint)
        self.config, self.processor, self.samples = self.inner.config, self.inner.processor, self.inner.samples
        self.source = self.inner.source
        self.counts_from_data = self.inner.counts_from_data  # type: ignore[misc]
        if options.distillation is None:
            options.distillation = 0.0 if _FEATURES[options.objective] is None else 0.5
        if _FEATURES[options.objective] is not None:
            logger.warning(
                "The paper found that slimmable training helps contrastive pretraining, and reconstruction hardly: "
                "compare with a plain run of '%s'.",
                options.objective,
            )
        self._shells: Shells | None = None

    def widths(self, step: int) -> list[float]:
        """The narrow widths of a zero-based step, the smallest first: a function of seed and step alone."""
        options = self.options
        draws = generator("widths", self.recipe.seed, step).uniform(
            options.min_width, 1, size=options.widths_per_step - 2
        )
        return [float(options.min_width), *draws.tolist()]

    @property
    def term_weights(self) -> dict[str, float]:
        options, full = self.options, self.inner.term_weights
        narrow = options.widths_per_step - 1
        weight = narrow * (options.sub_loss_weight or 1 / narrow)
        own = {f"narrow_{term}": (1 - options.distillation) * weight * value for term, value in full.items()}
        return {**full, **own, **({"distillation": options.distillation * weight} if options.distillation else {})}

    def counts(self, batch: Batch) -> dict[str, int]:
        full, narrow = self.inner.counts(batch), self.options.widths_per_step - 1
        distilled = {"distillation": narrow * len(batch["pixel_values"])} if self.options.distillation else {}
        return {**full, **{f"narrow_{term}": narrow * count for term, count in full.items()}, **distilled}

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Terms:
        trained: Any = extract_model_from_parallel(model)
        contrastive = self.options.objective == "moco"
        queue = trained.queue.clone() if contrastive else None
        with _outputs_of(self._features_of(trained)) as targets, _outputs_of(trained) as answers:
            full = self.inner.loss(model, batch, step)
        terms = {name: (addends.sum(), count) for name, (addends, count) in full.items()}
        for width in self.widths(step):
            narrow = self._shells_of(trained).at(width)
            view: nn.Module = _AtPrecision(narrow, trained.device, _HALVES[self.recipe.mixed_precision])
            if contrastive:
                view = _NarrowQueries(trained, view, answers[-1][1], queue)
            with _outputs_of(self._features_of(narrow.shell)) as found:
                own = self.inner.loss(view, batch, step)
            for name, (addends, count) in own.items():
                _add(terms, f"narrow_{name}", addends.sum(), count)
            if self.options.distillation:
                images = len(batch["pixel_values"])
                _add(terms, "distillation", images * _distance(found, targets), images)
        return terms

    def _shells_of(self, trained: Any) -> Shells:
        slimmed = trained.encoder if self.options.objective == "moco" else trained
        if self._shells is None or self._shells.model is not slimmed:
            self._shells = Shells(slimmed)
        return self._shells

    def _features_of(self, model: Any) -> nn.Module | None:
        path = _FEATURES[self.options.objective]
        return model.get_submodule(path) if path and self.options.distillation else None

    # What follows is the inner objective's.

    def build_model(self) -> PreTrainedModel:
        self.inner.checkpoint = self.checkpoint
        return self.inner.build_model()

    def compiled_parts(self, model: PreTrainedModel) -> list[nn.Module]:
        return self.inner.compiled_parts(model)

    def exported(self, model: PreTrainedModel) -> PreTrainedModel:
        return self.inner.exported(model)

    def channels(self, modality: str) -> int:
        return self.inner.channels(modality)

    def prepare(self, sample: DecodedSample, rng: np.random.Generator) -> Batch:
        return self.inner.prepare(sample, rng)

    def collate(self, samples: list[Batch]) -> Batch:
        return self.inner.collate(samples)

    def stand_in(self, group: str) -> Batch:
        return self.inner.stand_in(group)

    def picture(self, model: nn.Module, batch: Batch) -> list[torch.Tensor]:
        return self.inner.picture(model, batch)


class _AtPrecision(nn.Module):
    """Computes in half precision if asked to, and answers in float32, as Accelerate has the full model do."""

    def __init__(self, narrow: nn.Module, device: torch.device, half: torch.dtype | None) -> None:
        super().__init__()
        self.narrow, self.device, self.precision = narrow, device, half

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.precision is None:
            return self.narrow(*args, **kwargs)
        with torch.autocast(self.device.type, dtype=self.precision):
            outputs = self.narrow(*args, **kwargs)
        return convert_to_fp32(outputs)


class _NarrowQueries(nn.Module):
    """A `MomentumContrast` whose queries come from a narrow encoder, and whose keys from the full width's pass.

    The momentum encoder and the queue move on in that pass, once per step.
    """

    def __init__(self, trained: Any, encoder: nn.Module, keys: torch.Tensor, queue: torch.Tensor | None) -> None:
        super().__init__()
        self.heads = nn.Sequential(trained.projector, trained.predictor)
        self.encoder, self.keys, self.queue = encoder, keys, queue

    def forward(self, views: list[dict], both: bool) -> tuple[torch.Tensor, torch.Tensor]:
        queries = [self.heads(self.encoder(**views[index]).pooler_output) for index in ((0, 1) if both else (0,))]
        return functional.normalize(torch.stack(queries).float(), dim=-1), self.keys

    def follow(self, momentum: float) -> None:
        """The full width's pass has done it."""

    def enqueue(self, keys: torch.Tensor) -> None:
        """The full width's pass has done it."""


@contextmanager
def _outputs_of(module: nn.Module | None) -> Iterator[list[Any]]:
    """What a module returns while this lasts, call by call."""
    outputs: list[Any] = []
    if module is None:
        yield outputs
        return
    hook = module.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


def _distance(narrow: list[Any], full: list[Any]) -> torch.Tensor:
    """Mean squared distance of features, each normalised over its channels; the full width's are not trained by it."""
    distances = []
    for mine, theirs in zip(narrow, full, strict=True):
        # A heat encoder returns the features of all stages.
        pair = [(value[-1] if isinstance(value, list) else value).float() for value in (mine, theirs)]
        normed = [functional.layer_norm(value, value.shape[-1:]) for value in pair]
        distances.append(functional.mse_loss(normed[0], normed[1].detach()))
    return torch.stack(distances).mean()


def _add(terms: Terms, name: str, value: torch.Tensor, count: int) -> None:
    before, counted = terms.get(name, (0.0, 0))
    terms[name] = (before + value, counted + count)
