"""Narrow views of a model in training: the same function as the exported slim model, gradients in the full weights."""

import copy
from typing import Any

from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from .families import family_of, slim_widths
from .plan import Slices, first_units, planned_branches, planned_groups, slice_state, slices
from .slim import build_shell, slim_config

MAX_SHELLS = 64


class Narrow(nn.Module):
    """A model at a narrower width, made of slices of its present weights: called like the model itself.

    Args:
        model: The full model.
        shell: A model of the narrow widths without weights of its own.
        index: Which entries of the full weights the narrow ones are.
    """

    def __init__(self, model: PreTrainedModel, shell: Any, index: Slices) -> None:
        super().__init__()
        # In tuples, so that neither counts as a child: this module has no parameters of its own.
        self._model, self._shell, self._index = (model,), (shell,), index

    @property
    def shell(self) -> Any:
        """The module that runs; hooks on its children see what they compute."""
        return self._shell[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the full model's forward."""
        model = self._model[0]
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.shell.train(model.training)
        return functional_call(self.shell, slice_state(tensors, self._index), args, kwargs)


class Shells:
    """Narrow views of one model, built when a width is first asked for.

    Args:
        model: The full model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._shells: dict[str, Narrow] = {}

    def at(self, width_multiplier: float) -> Narrow:
        """The model at a width, with the units that `slim(keep="first")` keeps."""
        components = family_of(self.model.config).components
        key = repr(slim_widths(self.model.config, width_multiplier, components))
        if key not in self._shells:
            if len(self._shells) >= MAX_SHELLS:
                del self._shells[next(iter(self._shells))]
            self._shells[key] = self._build(width_multiplier, components)
        return self._shells[key]

    def _build(self, width_multiplier: float, components: tuple[str, ...]) -> Narrow:
        model = self.model
        config = slim_config(model.config, width_multiplier, components)
        shell = build_shell(model, config)
        for part in family_of(model.config).whole_parts:
            if hasattr(model, part):
                setattr(shell, part, copy.deepcopy(getattr(model, part)).to("meta"))
        groups = planned_groups(planned_branches(model, shell))
        return Narrow(model, shell, slices(groups, {group.name: first_units(group) for group in groups}))
