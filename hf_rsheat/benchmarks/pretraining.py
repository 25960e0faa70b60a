"""Measured speed of SelectiveMAE's pretraining step against MAE's, in one interleaved run."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from ..errors import ConfigurationError
from ..models.configuration_selective_mae import SelectiveMAEConfig
from ..models.modeling_selective_mae import SelectiveMAEForPreTraining
from ..models.token_selection import select_tokens

logger = logging.getLogger(__name__)

_STAGES = ("near", "random")


@dataclass(frozen=True)
class Measurement:
    """One kind of pretraining step.

    Attributes:
        name: As printed.
        seconds: Fastest step: forward, backward and optimiser, in seconds.
        macs: Multiply-adds of the forward pass per image, matrix products and convolutions.
        activations: Bytes that the forward pass keeps for the backward pass, parameters excluded.
        peak: On a GPU, bytes at the peak of the step above weights, gradients and optimiser state; else `None`.
    """

    name: str
    seconds: float
    macs: float
    activations: int
    peak: int | None = None


@dataclass(frozen=True)
class PretrainingBenchmark:
    """All measurements, MAE first, and the time of the selection alone."""

    batch_size: int
    image_size: int
    clock: str
    measurements: tuple[Measurement, ...]
    selection_seconds: dict[str, float]

    def table(self) -> str:
        """A table with ratios to MAE; larger is better for speed, smaller for the others."""
        base = self.measurements[0]
        lines = [
            f"ViT pretraining step, {self.image_size} px, batch {self.batch_size}, fastest of interleaved steps",
            f"({self.clock}); MACs per image and bytes kept for the backward pass, each beside its ratio to MAE",
            f"{'':34}{'images/s':>10}{'speed':>8}{'GMAC':>8}{'x':>7}{'saved MB':>10}{'x':>7}",
        ]
        for item in self.measurements:
            lines.append(
                f"{item.name:34}{self.batch_size / item.seconds:>10.2f}{base.seconds / item.seconds:>7.2f}x"
                f"{item.macs / 1e9:>8.2f}{item.macs / base.macs:>7.2f}"
                f"{item.activations / 1e6:>10.0f}{item.activations / base.activations:>7.2f}"
                + (f"  peak {item.peak / 1e6:.0f} MB, {item.peak / base.peak:.2f}x" if item.peak and base.peak else "")
            )
        fastest = min(item.seconds for item in self.measurements)
        for stage, seconds in self.selection_seconds.items():
            lines.append(f"selection alone, stage {stage}: {1000 * seconds:.1f} ms, {seconds / fastest:.1%} of a step")
        return "\n".join(lines)


def benchmark_pretraining(
    preset: str = "base",
    batch_size: int = 8,
    image_size: int = 224,
    steps: int = 5,
    device: str = "cpu",
    **fields: Any,
) -> PretrainingBenchmark:
    """Time SelectiveMAE with 8 and 12 decoder layers against MAE (75 % masked, 8 decoder layers), sdpa in all.

    The steps of the models take turns, so that a busy machine slows all of them, and the fastest of each counts. On a
    CPU with one thread (`torch.set_num_threads(1)`) processor time is counted, which other processes hardly change.

    Args:
        preset: Size of the encoder, see [`SelectiveMAEConfig.preset`].
        batch_size: Images per step.
        image_size: Side of the images in pixels.
        steps: Timed steps of each model, after one that is not timed.
        device: "cpu" or "cuda".
        **fields: Configuration fields on top of the preset.

    Raises:
        ConfigurationError: For fewer than one step or an unknown preset.
    """
    if steps < 1 or batch_size < 1:
        raise ConfigurationError("The benchmark needs at least one step and one image.")
    try:
        config = SelectiveMAEConfig.preset(preset, image_size=image_size, **fields)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    pixel_values = torch.randn(batch_size, 3, image_size, image_size, device=device)
    models = {"MAE, 8 decoder layers": _mae(config)}
    for depth in (8, 12):
        ours = SelectiveMAEConfig(**{**config.to_dict(), "decoder_num_hidden_layers": depth})
        models[f"SelectiveMAE, {depth} decoder layers"] = SelectiveMAEForPreTraining(ours)
    clock, clock_name = _clock(device)
    steppers = {name: _stepper(model.to(device).train(), pixel_values) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    peaks: dict[str, int | None] = dict.fromkeys(models)
    for turn in range(steps + 1):
        for name, step in steppers.items():
            start = clock()
            peaks[name] = _peak(step, device)
            if turn:  # the first turn warms up
                times[name].append(clock() - start)
        logger.info("Step %d of %d.", turn, steps)
    measurements = tuple(
        Measurement(name, min(times[name]), _macs(model, pixel_values[:1]), _saved(model, pixel_values), peaks[name])
        for name, model in models.items()
    )
    selection = _time_selection(models["SelectiveMAE, 8 decoder layers"], pixel_values, clock)
    return PretrainingBenchmark(batch_size, image_size, clock_name, measurements, selection)


def _mae(config: SelectiveMAEConfig) -> Any:
    shared = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
    )
    decoder = ("decoder_hidden_size", "decoder_num_attention_heads", "decoder_intermediate_size")
    fields = {name: getattr(config, name) for name in (*shared, *decoder)}
    return ViTMAEForPreTraining(ViTMAEConfig(**fields, norm_pix_loss=True, layer_norm_eps=1e-6))


def _clock(device: str) -> tuple[Callable[[], float], str]:
    if device != "cpu":

        def synchronized() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return synchronized, "wall-clock"
    if torch.get_num_threads() == 1:
        return time.process_time, "processor time, 1 thread"
    return time.perf_counter, f"wall-clock, {torch.get_num_threads()} threads"


def _stepper(model: Any, pixel_values: torch.Tensor) -> Callable[[], None]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def step() -> None:
        model(pixel_values).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=pixel_values.device.type == "cpu")  # on a GPU the peak is counted above them

    return step


def _peak(step: Callable[[], None], device: str) -> int | None:
    """Run a step; on a GPU, what it needs above what is allocated before it (weights, gradients, optimiser state)."""
    if device == "cpu":
        step()
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def _macs(model: Any, pixel_values: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values)
    return counter.get_total_flops() / 2


def _saved(model: Any, pixel_values: torch.Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps after a forward pass, without the parameters."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(pixel_values).loss  # alive until the sum, so that no storage is used twice
    total = sum(found.values())
    del loss
    return total


@torch.no_grad()
def _time_selection(model: Any, pixel_values: torch.Tensor, clock: Callable[[], float]) -> dict[str, float]:
    tokens, _ = model.selective_mae.embeddings.patches(pixel_values)
    config, results = model.config, {}
    for stage in _STAGES:
        times = []
        for _ in range(5):
            start = clock()
            select_tokens(tokens, stage, 1 - config.mask_ratio, config.kept_mask_ratio)
            times.append(clock() - start)
        results[stage] = min(times)
    return results
