"""Objectives by name. Each lives in its own file and is imported only when a recipe names it."""

from importlib import import_module

from ...errors import ConfigurationError, did_you_mean
from .base import Objective

_OBJECTIVES = {
    "rs_vheat": "RSVHeatPretraining",
    "classification": "Classification",
    "selective_mae": "SelectiveMAEPretraining",
    "mae": "MAEPretraining",
    "moco": "MomentumContrastPretraining",
    "instances": "InstanceSegmentation",
    "rs4d_distill": "RS4DDistillation",
    "slimmable": "Slimmable",
}


def get_objective(name: str) -> type[Objective]:
    """The objective class a recipe names.

    Raises:
        ConfigurationError: If there is none of this name; the message has the nearest one.
    """
    if name not in _OBJECTIVES:
        raise ConfigurationError(f"Unknown objective '{name}': {did_you_mean(name, _OBJECTIVES)}")
    return getattr(import_module(f".{name}", __name__), _OBJECTIVES[name])


__all__ = ["Objective", "get_objective"]
