"""How much accelerator memory a recipe needs, and the largest batch that fits.

    memory(b) = weights + gradients + moments (+ average) + constant + b * per image

in bytes, with 4 bytes per number for everything but activations. `constant` and `per image` come from counting the
tensors that one forward and backward pass of the recipe's own objective keeps alive, at two small batch sizes, on the
CPU and in the recipe's precision. Under DDP every GPU holds the first four and a bucket of gradients; FSDP2 cuts them
into as many pieces as there are GPUs and gathers one layer group at a time.
"""

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import ConfigurationError
from .image_folder import DecodedSample
from .loop import check_objective, recompute_activations
from .normalization import mean_image
from .objectives import Objective, get_objective
from .randomness import generator
from .recipe import Recipe

RESERVED = 1.0e9
"""Bytes for the CUDA context and communication buffers of a process."""
HEADROOM = 0.9
"""Share of the rest that is planned with: allocators leave gaps, kernels need workspaces."""
_NUMBER = 4  # bytes: weights, gradients and optimiser state are float32 in every mixed precision
_MOMENTS = 2


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are created and still alive, and their peak.

    Views share their storage with what they show, and count once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Leave out storages that existed before."""
        for tensor in tensors:
            self._seen.add(tensor.untyped_storage())

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.live -= size


@dataclass(frozen=True)
class MemoryModel:
    """Memory of one process of a run, in bytes.

    Args:
        parameters: Numbers in the model.
        trained: Those of them that are trained.
        averaged: Whether an average of the weights is kept.
        constant: Activation memory that does not grow with the batch.
        per_image: Activation memory per image of a process and accumulation part.
        largest_group: Numbers in the largest group of layers that FSDP2 gathers at a time.
        gpus: Processes.
        sharded: Whether FSDP2 shards parameters, gradients and optimiser state.
    """

    parameters: int
    trained: int
    averaged: bool
    constant: float
    per_image: float
    largest_group: int
    gpus: int = 1
    sharded: bool = False

    @property
    def state(self) -> float:
        """Weights, gradients, optimiser moments, average, and what communication adds."""
        copies = 1 + _MOMENTS + self.averaged
        total = _NUMBER * (self.parameters + copies * self.trained)
        if self.sharded:
            return total / self.gpus + 2 * _NUMBER * self.largest_group  # the group in use and the one fetched ahead
        return total + (_NUMBER * self.trained if self.gpus > 1 else 0)  # DDP's buckets

    def total(self, images: int) -> float:
        """Bytes of a process with this many images per accumulation part."""
        return self.state + self.constant + images * self.per_image

    def largest_batch(self, memory: float) -> int:
        """Images per process that fit into `memory` bytes; 0 if none does."""
        room = (memory - RESERVED) * HEADROOM - self.state - self.constant
        return max(0, int(room // self.per_image))


def measure(recipe: Recipe, sizes: tuple[int, int] = (1, 3)) -> MemoryModel:
    """The memory model of a recipe, from its own model and objective at two small batches of blank images.

    Raises:
        ConfigurationError, DataError: What a run of the recipe would end with.
    """
    objective = get_objective(recipe.objective)(recipe, None)
    check_objective(recipe, objective)
    model: Any = objective.build_model().train()
    if recipe.gradient_checkpointing:
        recompute_activations(model)
    low, high = (activation_peak(recipe, objective, model, size) for size in sizes)
    per_image = (high - low) / (sizes[1] - sizes[0])
    groups = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in groups]
    return MemoryModel(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        averaged=recipe.ema_decay is not None,
        constant=max(0.0, low - sizes[0] * per_image),
        per_image=per_image,
        largest_group=max(
            (sum(p.numel() for p in block.parameters()) for block in blocks or [model]),
        ),
    )


def activation_peak(recipe: Recipe, objective: Objective, model: Any, images: int) -> int:
    """Peak bytes alive during one forward and backward pass, without weights and gradients.

    The group of samples with the most modalities is taken: it needs most.
    """
    group = max({sample.group for sample in objective.samples}, key=lambda name: (name.count("+"), name))
    views = {name: mean_image(objective.processor, name, recipe.image_size) for name in group.split("+")}
    samples = [objective.prepare(DecodedSample(views, 0), generator("memory", index)) for index in range(images)]
    batch = objective.collate(samples)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=recipe.mixed_precision != "no")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    memory = PeakMemory()
    memory.ignore(*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.requires_grad))
    with memory:
        with autocast:
            terms = objective.loss(model, batch, 0)
        total = sum(weight * terms[term][0].sum() for term, weight in objective.term_weights.items() if term in terms)
        if not isinstance(total, torch.Tensor):
            raise ConfigurationError(f"objective '{recipe.objective}' gives no loss for samples of '{group}'.")
        total.backward()
    model.zero_grad()
    return memory.peak


def plan(recipe: Recipe, gpus: int, gpu_memory: float, sharded: bool) -> str:
    """What a recipe needs per GPU, as text.

    Args:
        recipe: The recipe.
        gpus: Number of GPUs.
        gpu_memory: Memory of each in GB (10^9 bytes).
        sharded: Whether FSDP2 is used.

    Raises:
        ConfigurationError, DataError: What a run of the recipe would end with.
    """
    model = replace(measure(recipe), gpus=gpus, sharded=sharded)
    images = -(-recipe.batch_size // (gpus * recipe.gradient_accumulation_steps))
    largest = model.largest_batch(gpu_memory * 1e9)
    needed = (model.total(images) / HEADROOM + RESERVED) / 1e9
    verdict = "fits" if images <= largest else "does not fit"
    accumulation = -(-recipe.batch_size // (gpus * largest)) if largest else 0
    advice = (
        ""
        if images <= largest
        else (
            f"set gradient_accumulation_steps={accumulation}"
            if largest
            else "not even one image fits: set gradient_checkpointing=true, use --sharded, or a smaller model"
        )
    )
    lines = {
        "parameters": f"{model.parameters / 1e6:.1f} M ({model.trained / 1e6:.1f} M trained)",
        "state per GPU": f"{model.state / 1e9:.2f} GB of weights, gradients and optimiser"
        + (f", 1/{gpus} of each (FSDP2)" if sharded else ""),
        "activations": f"{model.per_image / 1e6:.1f} MB per image and {model.constant / 1e6:.1f} MB",
        "per GPU": f"{images} images of {recipe.batch_size}, {needed:.2f} GB of {gpu_memory:g} GB: {verdict}",
        "largest batch": f"{largest} images per GPU, {largest * gpus} in all without accumulation",
        "advice": advice,
    }
    return "\n".join(f"{name + ':':15}{value}" for name, value in lines.items() if value)
