"""Which files are one sample: said by folders, or by a table."""

import csv
from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError, did_you_mean
from .image_folder import Sample
from .recipe import Recipe
from .sources import ImageSource


def find_scenes(recipe: Recipe, source: ImageSource, modalities: Sequence[str], default: str) -> list[Sample]:
    """Samples of a recipe: those of its manifest if it has one, else all that its source has.

    Args:
        recipe: The run's recipe.
        source: Where its images come from.
        modalities: Names of the model's modalities.
        default: Modality of images whose path does not say.

    Raises:
        DataError: If there are no images, or the manifest cannot be used.
    """
    if recipe.manifest is None:
        return source.scenes(modalities, default)
    return read_manifest(Path(recipe.manifest), modalities)


def read_manifest(path: Path, modalities: Sequence[str]) -> list[Sample]:
    """One sample per line of a CSV file with a column of paths per modality; an empty cell leaves a modality out.

    Paths are relative to the image folder. Whether they can be read shows when they are.

    Raises:
        DataError: If the file cannot be read, or has an unknown column or no path.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, strict=True)
            columns, rows = list(table.fieldnames or ()), list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"Cannot read the manifest '{path}': {error}.") from error
    for column in columns:
        if column not in modalities:
            raise DataError(f"'{path}' has an unknown column '{column}': {did_you_mean(column, modalities)}")
    samples = [Sample(tuple((name, row[name]) for name in modalities if row.get(name))) for row in rows]
    samples = [sample for sample in samples if sample.files]
    if not samples:
        raise DataError(f"'{path}' names no image: write a header like '{','.join(modalities)}' and a line per sample.")
    return samples
