"""`hf-rsheat bench backbone`: whole backbones beside each other, forward or a training step, in time and memory."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..errors import ConfigurationError
from ..models.heat_pretrained import HeatPreTrainedModel
from . import contestants
from .macs import count_macs
from .measure import conditions, in_fresh_process, load, peak_memory, summary, take_turns

FUSED = "+fused"


@dataclass(frozen=True)
class BackboneRun:
    """One contest.

    Attributes:
        image_size: Side of the images in pixels.
        batch: Images at once.
        dtype: "float32" or "bfloat16"; weights and images alike.
        compiled: Through `torch.compile`, default mode.
        train: Forward and backward pass instead of inference.
        threads: Threads of PyTorch.
        device: "cpu" or "cuda".
    """

    image_size: int
    batch: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    compiled: bool = False
    train: bool = False
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("image_size", "batch", "threads"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigurationError(f"`dtype` is float32 or bfloat16, got {self.dtype}.")


def bench_backbone(
    models: Sequence[str],
    sizes: Sequence[int],
    batches: Sequence[int] = (1,),
    *,
    repeats: int = 5,
    memory: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Every model at every size and batch.

    Args:
        models: Names of [`contestants.names`] or `timm:<model>`; ratios are to the first. `<name>+fused` is a heat
            model after `fuse()`, for inference on a CPU.
        sizes: Sides of the images in pixels.
        batches: Images at once.
        repeats: Timed rounds, after one that is not timed.
        memory: Whether to measure memory as well, one process per contestant.
        **options: Other fields of [`BackboneRun`].

    Returns:
        `conditions`, and `runs`: each with its settings and per model `minimum` and `median` seconds, `ratio` (of
        minima, to the first), `parameters`, `macs` (forward, whole batch) and the peak `above_start` and `total` in MB.
    """
    if repeats < 1 or not models or not sizes or not batches:
        raise ConfigurationError("A benchmark needs at least one model, size, batch and round.")
    torch.set_num_threads(options.get("threads", BackboneRun.threads))
    result: dict[str, Any] = {"conditions": conditions(), "repeats": repeats, "runs": []}
    for size in sizes:
        for batch in batches:
            run = BackboneRun(image_size=size, batch=batch, **options)
            rows = _contest(list(models), run, repeats)
            if memory:
                for name, row in rows.items():
                    row |= in_fresh_process("hf_rsheat.benchmarks.backbone", [name, asdict(run)])
            result["runs"].append({**asdict(run), "models": rows})
    result["load_after"] = load()
    return result


def _contest(models: list[str], run: BackboneRun, repeats: int) -> dict[str, dict[str, float]]:
    built = {name: contestants.build(name.removesuffix(FUSED), run.image_size) for name in models}
    images = _images(run)
    counted = {name: (sum(p.numel() for p in m.parameters()), count_macs(m, images)) for name, m in built.items()}
    steps = {name: _step(name, model, run, images) for name, model in built.items()}
    rows = summary(take_turns(steps, repeats, device=run.device))
    return {name: {**row, "parameters": counted[name][0], "macs": counted[name][1]} for name, row in rows.items()}


def _images(run: BackboneRun) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(run.batch, 3, run.image_size, run.image_size, generator=generator)
    return images.to(run.device, getattr(torch, run.dtype))


def _step(name: str, model: nn.Module, run: BackboneRun, images: torch.Tensor) -> Callable[[], Any]:
    model = model.to(run.device, images.dtype).train(run.train)
    if name.endswith(FUSED):
        if run.train or not isinstance(model, HeatPreTrainedModel):
            raise ConfigurationError(f"{name}: only vHeat and RS-vHeat can be fused, and only for inference.")
        model = model.fuse()
    forward = torch.compile(model) if run.compiled else model
    if not run.train:

        def infer() -> Any:
            with torch.inference_mode():
                return forward(images)

        return infer

    def train() -> None:
        model.zero_grad(set_to_none=True)
        _final(forward(images)).float().square().mean().backward()

    return train


def _final(output: Any) -> torch.Tensor:
    """The tensor that a head would see."""
    if isinstance(output, torch.Tensor):
        return output
    return next(getattr(output, name) for name in ("logits", "last_hidden_state") if hasattr(output, name))


def measure_memory(name: str, run: BackboneRun) -> dict[str, float]:
    """Peak memory of one pass; only meaningful in a fresh process."""
    torch.set_num_threads(run.threads)
    model = contestants.build(name.removesuffix(FUSED), run.image_size)
    step = _step(name, model, run, _images(run))
    if run.train:
        # Gradients belong to the weights: only what comes on top of both is the model's own.
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    del model  # of which a fused one is made
    return peak_memory(step, run.device)


if __name__ == "__main__":
    _name, _run = json.loads(sys.argv[1])
    print(json.dumps(measure_memory(_name, BackboneRun(**_run))))
