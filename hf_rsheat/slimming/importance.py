"""Which units matter most (ours, not in the paper): measured on calibration images."""

import torch
from torch import nn
from tqdm.auto import tqdm

from .calibration import Batches, evaluating, observe
from .plan import PlannedGroup


def importance(model: nn.Module, groups: list[PlannedGroup], batches: Batches) -> dict[str, torch.Tensor]:
    """Name of a group -> importance of its units, `(blocks, units)`.

    A unit that is read by a linear layer counts E[unit²] · |its column|²: what the layer's output would lose in
    square mean if units were independent. A dimension of queries and keys counts E[q²] · E[k²].

    Args:
        model: The full model, unchanged by this.
        groups: Its units.
        batches: Calibration images.
    """
    sums: dict[str, list[torch.Tensor]] = {}
    readers = [group.place.full.get_submodule(group.group.reader) for group in groups if group.group.reader]
    factors = [group.place.full.get_submodule(name) for group in groups for name in group.group.products]
    with evaluating(model):
        for index, batch in enumerate(tqdm(batches, desc="importance", unit="batch")):
            inputs, outputs = observe(model, batch, index, readers, factors)
            values, products = iter(inputs), iter(outputs)
            for group in groups:
                taken = [next(values)] if group.group.reader else [next(products) for _ in group.group.products]
                energy = [value.detach().flatten(0, -2).float().square().sum(0) for value in taken]
                before = sums.get(group.name)
                sums[group.name] = energy if before is None else [a + b for a, b in zip(before, energy, strict=True)]
    return {group.name: _score(group, sums[group.name]) for group in groups}


def _score(group: PlannedGroup, energy: list[torch.Tensor]) -> torch.Tensor:
    score = torch.stack(energy).prod(0)
    if group.group.reader:
        score = score * group.place.full.get_submodule(group.group.reader).weight.detach().float().square().sum(0)
    return score.reshape(group.blocks, group.units).cpu()


def most_important(group: PlannedGroup, score: torch.Tensor) -> torch.Tensor:
    """Kept units `(blocks, kept)`, the most important first: of a model at full width this is a mere reordering."""
    return score.argsort(dim=1, descending=True, stable=True)[:, : group.kept]
