"""Which samples belong to which step: a pure function of (seed, step)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .randomness import generator


@dataclass(frozen=True)
class BatchPlan:
    """The samples one process reads for one part of one optimiser step.

    Args:
        step: Zero-based optimiser step.
        epoch: Zero-based pass over the data.
        part: Index of the gradient-accumulation part.
        parts: Number of parts of this step; equal on every process.
        group: What the samples of this step have in common, e.g. `"optical+sar"`; equal on every process.
        indices: Sample indices; empty where the global batch is smaller than the number of processes.
    """

    step: int
    epoch: int
    part: int
    parts: int
    group: str
    indices: tuple[int, ...]


class GlobalBatchSampler:
    """Cuts every epoch into global batches of one group each.

    The order within a group and the order of the batches are shuffled per epoch. The last batch of a group may be
    smaller; every sample is used exactly once per epoch.

    Args:
        groups: Group of every sample, in sample order.
        batch_size: Samples per optimiser step over all processes.
        seed: Decides the order together with the epoch.
    """

    def __init__(self, groups: Sequence[str], batch_size: int, seed: int) -> None:
        labels = np.asarray(groups)
        self._members = {str(name): np.flatnonzero(labels == name) for name in np.unique(labels)}
        self._batch_size = batch_size
        self._seed = seed
        self._cached: tuple[int, list[tuple[str, np.ndarray]]] = (-1, [])
        self.steps_per_epoch = sum(math.ceil(len(members) / batch_size) for members in self._members.values())

    def _epoch_batches(self, epoch: int) -> list[tuple[str, np.ndarray]]:
        if self._cached[0] != epoch:
            rng = generator("order", self._seed, epoch)
            batches: list[tuple[str, np.ndarray]] = []
            for group, members in self._members.items():
                order = rng.permutation(members)
                cuts = range(0, len(order), self._batch_size)
                batches += [(group, order[start : start + self._batch_size]) for start in cuts]
            self._cached = (epoch, [batches[i] for i in rng.permutation(len(batches))])
        return self._cached[1]

    def global_batch(self, step: int) -> tuple[int, str, np.ndarray]:
        """(epoch, group, sample indices) of a zero-based step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        group, indices = self._epoch_batches(epoch)[position]
        return epoch, group, indices

    def parts(self, step: int, rank: int, world_size: int, accumulation: int) -> list[BatchPlan]:
        """What `rank` of `world_size` processes reads for a step, cut into at most `accumulation` parts.

        Parts that would be empty on every process are left out, so all processes agree on their number.
        """
        epoch, group, indices = self.global_batch(step)
        parts = min(accumulation, math.ceil(len(indices) / world_size))
        pieces = np.array_split(indices, parts * world_size)
        return [
            BatchPlan(step, epoch, part, parts, group, tuple(int(i) for i in pieces[part * world_size + rank]))
            for part in range(parts)
        ]

    def plans(self, first: int, last: int, rank: int, world_size: int, accumulation: int) -> Iterator[BatchPlan]:
        """All parts of the steps `first` up to, not including, `last`, in order."""
        for step in range(first, last):
            yield from self.parts(step, rank, world_size, accumulation)
