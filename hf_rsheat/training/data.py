"""From batch plans to tensors: reading, preparing and collating, in worker processes or not."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import DataError, HFRSHeatError
from .batching import BatchRows
from .image_folder import DecodedSample, Sample, check_content, decode
from .randomness import generator
from .sampler import BatchPlan
from .signals import detach_loader
from .sources import FolderSource, ImageSource

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
        indices: Samples of the plan that the batch holds, in its order; none marks a stand-in that takes part in the
            step without weight.
        skipped: Images of the plan that cannot be used.
    """

    plan: BatchPlan
    batch: Batch
    indices: list[int]
    skipped: list[Skipped]

    @property
    def images(self) -> int:
        """Number of usable samples."""
        return len(self.indices)


class Preparation(Protocol):
    """The part of an objective that runs where the data is read."""

    def prepare(self, sample: DecodedSample, rng: np.random.Generator) -> Batch: ...

    def collate(self, samples: list[Batch]) -> Batch: ...

    def stand_in(self, group: str) -> Batch: ...

    def channels(self, modality: str) -> int: ...


class BatchReader(Dataset):
    """Reads, prepares and collates the samples of a `BatchPlan`.

    Args:
        source: Where the samples' images are; a folder that their paths are relative to will do.
        samples: All samples.
        preparation: The objective.
        seed: Seed of the run.
    """

    def __init__(self, source: Path | ImageSource, samples: list[Sample], preparation: Preparation, seed: int) -> None:
        self.source = FolderSource(source) if isinstance(source, Path) else source
        self.samples = samples
        self.preparation = preparation
        self.seed = seed

    def __getitem__(self, plan: BatchPlan) -> LoadedBatch:
        ready: list[Batch] = []
        rows = BatchRows(len(plan.indices))
        usable: list[int] = []
        skipped: list[Skipped] = []
        for index in plan.indices:
            number = index % len(self.samples)  # copies of a sample have indices of their own
            sample = self.samples[number]
            path = ""
            images: dict[str, torch.Tensor] = {}
            try:
                for modality, path in sample.files:
                    images[modality] = decode(self.source.open(path), self.preparation.channels(modality))
                    check_content(images[modality])
                rng = generator("sample", self.seed, plan.epoch, index)
                ready.append(rows.add(self.preparation.prepare(DecodedSample(images, sample.label), rng)))
                usable.append(number)
            except DataError as error:
                skipped.append(Skipped(path, str(error)))
        batch = self.preparation.collate(ready) if ready else self.preparation.stand_in(plan.group)
        return LoadedBatch(plan, batch, usable, skipped)


class _Plans(Sampler):
    """Feeds plans to a `DataLoader` in order."""

    def __init__(self, plans: Iterator[BatchPlan]) -> None:
        self._plans = plans

    def __iter__(self) -> Iterator[BatchPlan]:
        return self._plans


class _Reporting(Dataset):
    """Hands over our errors instead of raising them: a `DataLoader` would bury their sentence in a traceback."""

    def __init__(self, reader: BatchReader) -> None:
        self._reader = reader

    def __getitem__(self, plan: BatchPlan) -> LoadedBatch | HFRSHeatError:
        try:
            return self._reader[plan]
        except HFRSHeatError as error:
            return error


def _raised(loaded: LoadedBatch | HFRSHeatError) -> LoadedBatch:
    if isinstance(loaded, HFRSHeatError):
        raise loaded
    return loaded


def _unchanged(loaded: Any) -> Any:
    return loaded


def load_batches(
    reader: BatchReader, plans: Iterator[BatchPlan], num_workers: int, pin_memory: bool
) -> Iterator[LoadedBatch]:
    """Loaded batches in the order of their plans; the number of workers changes nothing but speed."""
    loader = DataLoader(
        _Reporting(reader),
        sampler=_Plans(plans),
        batch_size=None,  # a plan is a whole batch already
        num_workers=num_workers,
        collate_fn=_unchanged,
        worker_init_fn=detach_loader,
        # A child of this process, not of a fork server (the default from Python 3.14 on), so that it dies with it.
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        pin_memory=pin_memory,
    )
    return map(_raised, loader)
