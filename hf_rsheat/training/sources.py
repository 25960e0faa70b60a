"""Where the images of a run come from: a folder, or a data set of the `datasets` library."""

from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Protocol

from .image_folder import Sample, scan_classes, scan_modalities
from .recipe import Recipe
from .sampler import BatchPlan


class ImageSource(Protocol):
    """Images by name; names are what samples, `skipped.jsonl` and resumed runs refer to."""

    digest: str
    """Identifies what the names stand for, where they alone do not."""

    def scenes(self, modalities: Sequence[str], default: str) -> list[Sample]:
        """All samples; images whose name does not say have the default modality.

        Raises:
            DataError, ConfigurationError: If there are none, or the recipe does not fit them.
        """

    def classes(self, modality: str) -> tuple[list[Sample], list[str]]:
        """Labelled samples of one modality, and the names of the classes."""

    def open(self, name: str) -> Path | BytesIO:
        """An image file for `decode`.

        Raises:
            DataError: If there is no such image.
            TransferError: If it cannot be fetched; the image is not to blame.
        """

    def shards(self, samples: Sequence[Sample]) -> tuple[Sequence[int], int] | None:
        """The shard of every sample and how many of them an epoch mixes; None where any order is as good as another."""

    def read_ahead(self, plans: Iterator[BatchPlan], samples: Sequence[Sample], processes: int) -> Iterator[BatchPlan]:
        """The plans of one of several processes, while what later ones need is being fetched."""


class FolderSource:
    """A local folder, with what archives hold in it."""

    digest = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def scenes(self, modalities: Sequence[str], default: str) -> list[Sample]:
        return scan_modalities(self.folder, modalities, default)

    def classes(self, modality: str) -> tuple[list[Sample], list[str]]:
        return scan_classes(self.folder, modality)

    def open(self, name: str) -> Path | BytesIO:
        return self.folder / name

    def shards(self, samples: Sequence[Sample]) -> tuple[Sequence[int], int] | None:
        return None

    def read_ahead(self, plans: Iterator[BatchPlan], samples: Sequence[Sample], processes: int) -> Iterator[BatchPlan]:
        return plans


def open_source(recipe: Recipe) -> ImageSource:
    """The source of a recipe: its `image_folder` or its `dataset`.

    Raises:
        ConfigurationError, DataError, TransferError: If the data set does not exist, cannot be reached, or lacks what
            the recipe names.
    """
    if not recipe.dataset:
        return FolderSource(Path(recipe.image_folder))
    from .dataset_source import open_dataset

    return open_dataset(recipe.dataset)
