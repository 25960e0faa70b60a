"""From batch plans to tensors: reading, preparing and collating, in worker processes or not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import DataError
from .image_folder import DecodedSample, Sample, decode
from .randomness import generator
from .sampler import BatchPlan

Batch = dict[str, Any]


class Skipped(NamedTuple):
    """An image that cannot be used: its path relative to the image folder, and why."""

    path: str
    reason: str


class LoadedBatch(NamedTuple):
    """What one process computes on in one part of a step.

    Args:
        plan: Where the batch belongs.
        batch: Collated tensors; never empty.
        images: Number of usable samples; 0 marks a stand-in that takes part in the step without weight.
        skipped: Images of the plan that cannot be used.
    """

    plan: BatchPlan
    batch: Batch
    images: int
    skipped: list[Skipped]


class Preparation(Protocol):
    """The part of an objective that runs where the data is read."""

    def prepare(self, sample: DecodedSample, rng: np.random.Generator) -> Batch: ...

    def collate(self, samples: list[Batch]) -> Batch: ...

    def stand_in(self, group: str) -> Batch: ...

    def channels(self, modality: str) -> int: ...


class BatchReader(Dataset):
    """Reads, prepares and collates the samples of a `BatchPlan`.

    Args:
        folder: The image folder that the samples' paths are relative to.
        samples: All samples.
        preparation: The objective.
        seed: Seed of the run.
    """

    def __init__(self, folder: Path, samples: list[Sample], preparation: Preparation, seed: int) -> None:
        self.folder = folder
        self.samples = samples
        self.preparation = preparation
        self.seed = seed

    def __getitem__(self, plan: BatchPlan) -> LoadedBatch:
        ready: list[Batch] = []
        skipped: list[Skipped] = []
        for index in plan.indices:
            sample = self.samples[index]
            path = ""
            images: dict[str, torch.Tensor] = {}
            try:
                for modality, path in sample.files:
                    images[modality] = decode(self.folder / path, self.preparation.channels(modality))
                rng = generator("sample", self.seed, plan.epoch, index)
                ready.append(self.preparation.prepare(DecodedSample(images, sample.label), rng))
            except DataError as error:
                skipped.append(Skipped(path, str(error)))
        batch = self.preparation.collate(ready) if ready else self.preparation.stand_in(plan.group)
        return LoadedBatch(plan, batch, len(ready), skipped)


class _Plans(Sampler):
    """Feeds plans to a `DataLoader` in order."""

    def __init__(self, plans: Iterator[BatchPlan]) -> None:
        self._plans = plans

    def __iter__(self) -> Iterator[BatchPlan]:
        return self._plans


def _unchanged(loaded: Any) -> Any:
    return loaded


def load_batches(
    reader: BatchReader, plans: Iterator[BatchPlan], num_workers: int, pin_memory: bool
) -> Iterator[LoadedBatch]:
    """Loaded batches in the order of their plans; the number of workers changes nothing but speed."""
    loader = DataLoader(
        reader,
        sampler=_Plans(plans),
        batch_size=None,  # a plan is a whole batch already
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
    )
    return iter(loader)
