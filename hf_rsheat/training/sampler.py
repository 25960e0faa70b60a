"""Which samples belong to which step: a pure function of (seed, step), and of what pruning leaves out of an epoch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigurationError, did_you_mean
from .image_folder import Sample
from .randomness import generator
from .recipe import Recipe


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
        weights: How often an epoch holds each sample, on average; once each if None. Of `n` samples with weight `w`
            there are `round(w n)`: whole copies of all, and of some, drawn per epoch, one more. The copies have indices
            of their own, `sample + copy * len(groups)`, and with them random draws of their own.
        shards: Shard of every sample, and how many of them to mix at any moment: an epoch then passes over the shards
            in an order of its own, so that each is needed for a while only. None shuffles all samples.
    """

    def __init__(
        self,
        groups: Sequence[str],
        batch_size: int,
        seed: int,
        weights: Sequence[float] | None = None,
        shards: tuple[Sequence[int], int] | None = None,
    ) -> None:
        labels = np.asarray(groups)
        self._weights = None if weights is None else np.asarray(weights, dtype=float)
        self._shards = None if shards is None else np.asarray(shards[0])
        self._mixed = 0 if shards is None else shards[1]
        self._members = {str(name): np.flatnonzero(labels == name) for name in np.unique(labels)}
        self._batch_size = batch_size
        self._seed = seed
        self._first_epoch, self._first_step = 0, 0
        self._kept: np.ndarray | None = None
        self._cached: tuple[int, list[tuple[str, np.ndarray]]] = (-1, [])
        sizes = [len(self._copies(members, generator("size"))) for members in self._members.values()]
        self.steps_per_epoch = sum(math.ceil(size / batch_size) for size in sizes)

    def begin(self, epoch: int, step: int, kept: np.ndarray | None) -> None:
        """Let an epoch begin at a step.

        Args:
            epoch: The epoch.
            step: Its first step.
            kept: Which samples the epoch holds, `(samples,)` of bool; the order of the epochs after it is then unknown
                until they begin. None for all samples, also in the epochs that follow.
        """
        self._first_epoch, self._first_step, self._kept = epoch, step, kept
        self._cached = (-1, [])

    def _epoch_batches(self, epoch: int) -> list[tuple[str, np.ndarray]]:
        if self._cached[0] != epoch:
            rng = generator("order", self._seed, epoch)
            place = self._places(rng)
            batches: list[tuple[str, np.ndarray]] = []
            due: list[float] = []
            for group, members in self._members.items():
                kept = members if self._kept is None else members[self._kept[members]]
                order = rng.permutation(self._copies(kept, rng))
                turns = None if place is None else self._turns(place[order % len(place)], place.max() + 1, rng)
                if turns is not None:
                    order, turns = order[np.argsort(turns)], np.sort(turns)
                cuts = range(0, len(order), self._batch_size)
                batches += [(group, order[start : start + self._batch_size]) for start in cuts]
                due += [0.0 if turns is None else float(turns[start]) for start in cuts]
            shuffled = rng.permutation(len(batches)) if place is None else np.argsort(due, kind="stable")
            self._cached = (epoch, [batches[i] for i in shuffled])
        return self._cached[1]

    def _places(self, rng: np.random.Generator) -> np.ndarray | None:
        """Place of every sample's shard in the random order of an epoch; None without shards."""
        return None if self._shards is None else rng.permutation(self._shards.max() + 1)[self._shards]

    def _turns(self, place: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
        """When samples are due, counted in shards from the begin of an epoch.

        A sample of the p-th shard is due at random within `mixed / 2` of p: about `mixed` shards are in use at any
        moment, and one ends where another begins.
        """
        half = self._mixed / 2
        return rng.uniform(np.maximum(place - half, 0), np.minimum(place + 1 + half, number))

    def _copies(self, members: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The indices an epoch holds of some samples."""
        if self._weights is None:
            return members
        drawn: list[np.ndarray] = []
        for weight in np.unique(self._weights[members]):
            same = members[self._weights[members] == weight]
            whole, total = int(weight), round(weight * len(same))
            drawn += [same + copy * len(self._weights) for copy in range(whole)]
            extra = rng.choice(same, total - whole * len(same), replace=False)
            drawn.append(extra + whole * len(self._weights))
        return np.concatenate(drawn)

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, position in it) of a zero-based step; an epoch that is not known yet begins at position 0."""
        position = step - self._first_step
        if self._kept is None:
            epochs, position = divmod(position, self.steps_per_epoch)
            return self._first_epoch + epochs, position
        length = len(self._epoch_batches(self._first_epoch))
        return (self._first_epoch, position) if position < length else (self._first_epoch + 1, 0)

    def end_of_epoch(self, step: int) -> int:
        """First step after the epoch that a step belongs to."""
        epoch, position = self.locate(step)
        return step - position + len(self._epoch_batches(epoch))

    def global_batch(self, step: int) -> tuple[int, str, np.ndarray]:
        """(epoch, group, sample indices) of a zero-based step."""
        epoch, position = self.locate(step)
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


def build_sampler(
    recipe: Recipe, samples: Sequence[Sample], shards: tuple[Sequence[int], int] | None = None
) -> GlobalBatchSampler:
    """The sampler of a recipe; `shards` as there.

    Raises:
        ConfigurationError: If `mixture` names a folder without images, or leaves none.
    """
    weights = None
    if recipe.mixture:
        folders = [sample.files[0][1].split("/")[0] for sample in samples]
        for name in recipe.mixture:
            if name not in folders:
                raise ConfigurationError(f"'mixture' names '{name}', where no image is: {did_you_mean(name, folders)}")
        weights = [float(recipe.mixture.get(folder, 1)) for folder in folders]
    groups = [sample.group for sample in samples]
    sampler = GlobalBatchSampler(groups, recipe.batch_size, recipe.seed, weights, shards)
    if not sampler.steps_per_epoch:
        raise ConfigurationError("'mixture' leaves no image: raise a weight.")
    return sampler
