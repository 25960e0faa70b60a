"""Running a model over calibration images while looking at single layers."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigurationError

Batches = Sequence[torch.Tensor | Mapping[str, Any]]
"""Batches that can be read several times: pixel values `(batch, channels, height, width)`, or arguments of forward."""


class _Reached(Exception):
    """What was asked for has run; the rest of the model need not."""


class ImageBatches(Sequence):
    """Image files as batches of model inputs, read anew whenever they are asked for.

    Args:
        extractor: Model and image processor (see `hf_rsheat.evaluation.features`).
        paths: Image files.
        batch_size: Images per batch.
    """

    def __init__(self, extractor: Any, paths: Sequence[Path], batch_size: int = 16) -> None:
        self.extractor, self.paths, self.batch_size = extractor, list(paths), batch_size

    def __len__(self) -> int:
        return -(-len(self.paths) // self.batch_size)

    def __getitem__(self, index: Any) -> Any:
        from ..evaluation.features import read_image

        if not 0 <= index < len(self):
            raise IndexError(index)
        paths = self.paths[index * self.batch_size : (index + 1) * self.batch_size]
        return self.extractor.inputs([read_image(path) for path in paths])


def require_batches(batches: Batches | None, purpose: str) -> Batches:
    """Refuse what cannot be read several times.

    Raises:
        ConfigurationError: If there are no batches, or they are an iterator.
    """
    if batches is None or not hasattr(batches, "__getitem__") or not len(batches):
        raise ConfigurationError(
            f"{purpose} looks at images: pass calibration=[batch, ...], a list of pixel values (batch, channels, "
            "height, width) or of forward arguments. A few hundred unlabelled images do."
        )
    return batches


def trunk_of(model: Any) -> Any:
    """The part of a model that sees whole images: without heads, decoders and the masks of pretraining."""
    base = model.base_model
    takes_images = "pixel_values" in inspect.signature(base.forward).parameters
    return base if takes_images else model  # DINOv3's base model is the encoder inside


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients for `observe`; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def observe(
    model: Any,
    batch: Any,
    seed: int,
    inputs: Sequence[nn.Module] = (),
    outputs: Sequence[nn.Module] = (),
    until: nn.Module | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run a batch and return what went into and came out of some layers (of their last call, where there are several).

    Args:
        model: In evaluation mode.
        batch: A batch of `Batches`.
        seed: For what the forward pass draws; the same draws for the same seed.
        inputs: Modules whose first input is wanted.
        outputs: Modules whose output is wanted.
        until: The model stops after this module.
    """
    seen_in: dict[nn.Module, torch.Tensor] = {}
    seen_out: dict[nn.Module, torch.Tensor] = {}
    devices = [model.device] if model.device.type == "cuda" else []
    with ExitStack() as hooks, torch.random.fork_rng(devices):
        for module in inputs:
            hooks.callback(module.register_forward_pre_hook(partial(_keep_input, seen_in)).remove)
        for module in outputs:
            hooks.callback(module.register_forward_hook(partial(_keep_output, seen_out)).remove)
        if until is not None:
            hooks.callback(until.register_forward_hook(_stop).remove)
        torch.manual_seed(seed)
        with suppress(_Reached):
            model(**_arguments(model, batch))
    return [seen_in[module].detach() for module in inputs], [seen_out[module].detach() for module in outputs]


def _keep_input(seen: dict[nn.Module, torch.Tensor], module: nn.Module, args: tuple) -> None:
    seen[module] = args[0]


def _keep_output(seen: dict[nn.Module, torch.Tensor], module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    seen[module] = output


def _stop(*_: object) -> None:
    raise _Reached


def _arguments(model: Any, batch: Any) -> dict[str, Any]:
    arguments = dict(batch) if isinstance(batch, Mapping) else {"pixel_values": batch}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            arguments[name] = value.detach().to(model.device, model.dtype)
        elif isinstance(value, torch.Tensor):
            arguments[name] = value.to(model.device)
    return arguments
