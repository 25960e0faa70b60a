"""Corrections of a slimmed model by least squares on unlabelled images (ours, not in the paper)."""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from ..errors import ConfigurationError
from .calibration import Batches, evaluating, observe
from .plan import PlannedBranch, PlannedGroup

RIDGE = 1e-3  # times the mean of the Gram matrix's diagonal


class NormalEquations:
    """Sums of a linear least-squares problem, batch by batch: memory does not grow with the number of images.

    Args:
        inputs: Width of the inputs.
        outputs: Width of the targets.
        intercept: Whether a constant is fitted, too.
    """

    def __init__(self, inputs: int, outputs: int, intercept: bool, device: torch.device) -> None:
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)
        self.input_sum = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.target_sum = torch.zeros(outputs, dtype=torch.float64, device=device)
        self.rows, self.intercept = 0, intercept

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Take in rows `(..., inputs)` and their targets `(..., outputs)`."""
        x, y = inputs.flatten(0, -2).float(), targets.flatten(0, -2).float()
        self.gram += x.T @ x
        self.cross += x.T @ y
        self.input_sum += x.sum(0)
        self.target_sum += y.sum(0)
        self.rows += len(x)

    def solve(self, ridge: float = RIDGE) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight `(outputs, inputs)` and bias `(outputs,)` (None without intercept), in float64.

        The penalty `ridge` is relative to the mean of the Gram matrix's diagonal and leaves the intercept free.
        """
        gram, cross = self.gram.clone(), self.cross
        means = self.input_sum / self.rows, self.target_sum / self.rows
        if self.intercept:
            gram.addr_(means[0], means[0], alpha=-self.rows)
            cross = cross.addr(*means, alpha=-self.rows)
        gram.diagonal().add_(ridge * gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
        weight = torch.linalg.solve(gram, cross).T
        return weight, means[1] - weight @ means[0] if self.intercept else None


def refit_writers(full: nn.Module, small: nn.Module, branches: list[PlannedBranch], batches: Batches) -> None:
    """Refit, in the order in which they run, the layers that sum over slimmed units, in place.

    What writes to the residual stream is fitted so that the stream afterwards is the full model's: errors of the layers
    before are made up for as well. Where a norm stands between branch and stream, and for layers inside a branch, the
    target is the full model's output of that layer. Each layer takes a pass over the images by both models: time grows
    with depth, and memory is that of the forward passes of one batch.

    Args:
        full: The full model, unchanged by this.
        small: The slimmed model.
        branches: Its slimmed branches.
        batches: Calibration images.
    """
    with evaluating(full, small), tqdm(total=_fits(branches) * len(batches), desc="ridge", unit="batch") as progress:
        for place in branches:
            for name in place.branch.inner:
                _refit(full, small, place, name, False, batches, progress)
            _refit(full, small, place, place.branch.writer, _writes_plainly(place), batches, progress)


def _fits(branches: list[PlannedBranch]) -> int:
    return sum(1 + len(place.branch.inner) for place in branches)


def _writes_plainly(place: PlannedBranch) -> bool:
    """Whether nothing but a scale stands between the writer and the stream."""
    return not getattr(place.full_layer, "post_norm", False)


def _refit(
    full: nn.Module,
    small: nn.Module,
    place: PlannedBranch,
    name: str,
    to_stream: bool,
    batches: Batches,
    progress: tqdm,
) -> None:
    mine, theirs = place.slim.get_submodule(name), place.full.get_submodule(name)
    streams = [layer.get_submodule(place.branch.stream) for layer in (place.slim_layer, place.full_layer)]
    equations = NormalEquations(mine.in_features, mine.out_features, mine.bias is not None, mine.weight.device)
    for index, batch in enumerate(batches):
        # The full model first: its pass needs most memory, and nothing is held yet.
        (before,), (target,) = observe(full, batch, index, [streams[1]], [theirs], until=place.full_layer)
        (units, mine_before), _ = observe(small, batch, index, [mine, streams[0]], until=place.slim_layer)
        if to_stream:
            target = target + _unscaled(before - mine_before, place)
        equations.add(units, target)
        progress.update()
    weight, bias = equations.solve()
    with torch.no_grad():
        mine.weight.copy_(weight)
        if bias is not None:
            mine.bias.copy_(bias)


def _unscaled(difference: torch.Tensor, place: PlannedBranch) -> torch.Tensor:
    """What the writer has to add so that the scaled branch makes up for a difference of the streams."""
    owner, _, name = (place.branch.scale or "").rpartition(".")
    scale = getattr(place.full_layer.get_submodule(owner), name, None) if name else None
    if scale is None:
        return difference
    scale = scale.detach()
    return torch.where(scale == 0, 0, difference / scale)


def fit_norms(
    full: nn.Module,
    small: nn.Module,
    groups: list[PlannedGroup],
    kept: Mapping[str, torch.Tensor],
    batches: Batches,
) -> None:
    """Fold into the affine part of every norm over slimmed units the line that leads closest to the full norm's output.

    The mean and variance that a norm takes over the kept channels are not those over all channels. Per channel a gain
    and an offset are fitted by least squares, in the order in which the norms run, in place.

    Args:
        full: The full model, unchanged by this.
        small: The slimmed model.
        groups: Its slimmed units.
        kept: Name of a group -> kept units `(blocks, kept)`.
        batches: Calibration images.

    Raises:
        ConfigurationError: If the model has no norm over slimmed units.
    """
    normed = [group for group in groups if group.place.branch.norm is not None]
    if not normed:
        raise ConfigurationError(
            f"correction='affine' repairs norms over slimmed units, and {type(full).__name__} has none: use 'ridge'."
        )
    with evaluating(full, small), tqdm(total=len(normed) * len(batches), desc="affine", unit="batch") as progress:
        for group in normed:
            name = group.place.branch.norm or ""
            mine, theirs = group.place.slim.get_submodule(name), group.place.full.get_submodule(name)
            pairs = _normalised(full, small, mine, theirs, kept[group.name].flatten(), batches, progress)
            gain, offset = _lines(pairs)
            with torch.no_grad():
                mine.bias.copy_(mine.bias + mine.weight * offset)
                mine.weight.copy_(mine.weight * gain)


def _normalised(
    full: nn.Module,
    small: nn.Module,
    mine: nn.LayerNorm,
    theirs: nn.LayerNorm,
    units: torch.Tensor,
    batches: Batches,
    progress: tqdm,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batch by batch `(rows, kept)`: the kept channels normalised by themselves, and among all channels."""
    for index, batch in enumerate(batches):
        sides = []
        for model, norm in ((small, mine), (full, theirs)):
            ((x,), _) = observe(model, batch, index, [norm], until=norm)
            sides.append(F.layer_norm(x.float(), norm.normalized_shape, eps=norm.eps).flatten(0, -2))
        yield sides[0], sides[1].index_select(1, units.to(sides[1].device))
        progress.update()


def _lines(pairs: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Gain and offset per column that lead from the first to the second of each pair, by least squares."""
    rows, sums = 0, torch.zeros(())
    for x, y in pairs:
        sums = sums + torch.stack([x.sum(0), y.sum(0), (x * x).sum(0), (x * y).sum(0)]).double()
        rows += len(x)
    mean_x, mean_y, mean_xx, mean_xy = sums / rows
    variance = mean_xx - mean_x**2
    flat = variance <= torch.finfo(torch.float32).eps * mean_xx
    gain = torch.where(flat, 1.0, (mean_xy - mean_x * mean_y) / torch.where(flat, 1.0, variance))
    return gain, mean_y - gain * mean_x
