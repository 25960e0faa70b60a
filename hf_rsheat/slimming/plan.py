"""From a model and its slimmed twin to index lists: which rows and columns of which parameter stay."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .families import Branch, Group, branches_of, family_of

Slices = dict[str, tuple[int, torch.Tensor]]
"""Parameter name -> axis and kept indices along it. What is not named stays whole."""


@dataclass(frozen=True)
class PlannedBranch:
    """A branch of a model: its layer's name, and the modules of full and slim model."""

    layer: str
    branch: Branch
    full_layer: nn.Module
    slim_layer: nn.Module

    @property
    def name(self) -> str:
        """Name of the branch's module in the model."""
        return f"{self.layer}.{self.branch.path}"

    @property
    def full(self) -> Any:
        """The full model's branch."""
        return self.full_layer.get_submodule(self.branch.path)

    @property
    def slim(self) -> Any:
        """The slim model's branch."""
        return self.slim_layer.get_submodule(self.branch.path)


@dataclass(frozen=True)
class PlannedGroup:
    """The units of a group: `units` in each of `blocks` blocks (heads), of which `kept` stay."""

    place: PlannedBranch
    group: Group
    blocks: int
    units: int
    kept: int

    @property
    def name(self) -> str:
        """Name that is unique in the model."""
        return f"{self.place.name}.{self.group.cuts[0].parameter}"


def planned_branches(full: nn.Module, slim: nn.Module) -> list[PlannedBranch]:
    """Every branch that is cut, in the order in which they run."""
    whole = family_of(full.config).whole_parts
    found = []
    for name, layer in full.named_modules():
        if name.split(".")[0] in whole:
            continue
        for branch in branches_of(layer):
            found.append(PlannedBranch(name, branch, layer, slim.get_submodule(name)))
    return found


def planned_groups(branches: list[PlannedBranch]) -> list[PlannedGroup]:
    """The groups of these branches, with their widths before and after."""
    return [
        PlannedGroup(place, group, *_widths(group, place.full, place.slim))
        for place in branches
        for group in place.branch.groups
    ]


def _widths(group: Group, full: Any, slim: Any) -> tuple[int, int, int]:
    cut = group.cuts[0]
    before, after = (module.get_parameter(cut.parameter).shape[cut.axis] // cut.copies for module in (full, slim))
    blocks = before // full.head_dim if group.per_head else 1
    return blocks, before // blocks, after // blocks


def first_units(group: PlannedGroup) -> torch.Tensor:
    """The first units of every block, `(blocks, kept)`: the paper's choice."""
    return torch.arange(group.kept).expand(group.blocks, -1)


def slices(groups: list[PlannedGroup], kept: Mapping[str, torch.Tensor]) -> Slices:
    """Index lists for every parameter.

    Args:
        groups: What is cut.
        kept: Name of a group -> its kept units `(blocks, kept)`, in the order they shall have.
    """
    found: Slices = {}
    for group in groups:
        for cut, name in _parameters(group):
            offsets = torch.arange(cut.copies * group.blocks).reshape(cut.copies, group.blocks, 1) * group.units
            found[name] = (cut.axis, (offsets + kept[group.name]).flatten())
    return found


def _parameters(group: PlannedGroup) -> Iterator[tuple[Any, str]]:
    present = dict(group.place.full.named_parameters())
    for cut in group.group.cuts:
        if cut.parameter in present:
            yield cut, f"{group.place.name}.{cut.parameter}"


def slice_state(state: Mapping[str, torch.Tensor], index: Slices) -> dict[str, torch.Tensor]:
    """The slim model's tensors out of the full model's; gradients flow back to the kept entries only."""
    return {
        name: value.index_select(index[name][0], index[name][1].to(value.device)) if name in index else value
        for name, value in state.items()
    }
