"""Exponential moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .sharding import placed_like, whole

_PREFIX = "ema."


class WeightAverage:
    """Average of the weights over the steps, `average = d * average + (1 - d) * weights`.

    d rises as `min(decay, (1 + step) / (10 + step))`, so that a short run does not keep its random start. It follows
    from the step alone; the averages are all there is to save.

    Args:
        model: The model being trained, on its device.
        decay: Upper limit of d, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._decay = decay
        self._weights: list[torch.Tensor] = list(named.values())
        self._averages = {name: parameter.detach().clone() for name, parameter in named.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a zero-based step."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._averages.values()), self._weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside of the `with` block."""
        trained = [weight.detach().clone() for weight in self._weights]
        try:
            self._replace(list(self._averages.values()))
            yield
        finally:
            self._replace(trained)

    @torch.no_grad()
    def _replace(self, values: list[torch.Tensor]) -> None:
        for weight, value in zip(self._weights, values, strict=True):
            weight.copy_(value)

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps; called on every process."""
        return {_PREFIX + name: whole(value) for name, value in self._averages.items()}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Continue from the tensors of a checkpoint; one without averages leaves them at the resumed weights."""
        for name, value in self._averages.items():
            if _PREFIX + name in tensors:
                value.copy_(placed_like(value, tensors[_PREFIX + name]))


@torch.no_grad()
def overlay(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Replace a model's weights by the averages among a checkpoint's tensors."""
    for name, parameter in model.named_parameters():
        if _PREFIX + name in tensors:
            parameter.copy_(tensors[_PREFIX + name])
