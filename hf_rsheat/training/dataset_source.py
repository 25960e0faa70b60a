"""Data sets of the `datasets` library as sources: their settings, columns and labels, and reading prepared tables."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.dataclasses import strict

from ..errors import ConfigurationError, DataError, HFRSHeatError, TransferError, did_you_mean
from ..hub.transfer import reason
from .image_folder import Sample
from .recipe import build
from .sampler import BatchPlan
from .sources import ImageSource

T = TypeVar("T")


@strict
@dataclass(kw_only=True)
class DatasetSettings:
    """The `dataset` of a recipe. The first six say what `datasets.load_dataset` is told.

    Args:
        path: A data set on the Hub (`user/name`), a folder of Parquet files, WebDataset tars or images, a folder that
            `save_to_disk` wrote, or a format (`parquet`, `webdataset`, `imagefolder`) for `data_files`.
        name: Configuration of the data set.
        split: Its split.
        revision: Branch, tag or commit on the Hub. Name a commit where the data set may change during a run.
        data_dir: Folder of the data set to read.
        data_files: Files to read, by pattern.
        image_column: Column of images; `{modality: column}` for several. Needed where there are several that are not
            named like modalities. Of WebDataset tars, what follows the first dot of a file name (`sar.png`).
        label_column: Column of the class, for `classification`.
        streaming: Fetch shards when they are needed, and keep `cache_gigabytes` of them, instead of preparing the whole
            data set on the disk. For Parquet, WebDataset tars and image files.
        mixed_shards: Shards that an epoch mixes at any moment when streaming: more shuffle better and take more disk.
        cache_folder: Where streamed shards are kept; beside the cache of `datasets` if None.
        cache_gigabytes: How much of the disk they may take, in 10^9 bytes.
    """

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, Any] | None = None
    image_column: str | dict[str, str] | None = None
    label_column: str = "label"
    streaming: bool = False
    mixed_shards: int = 16
    cache_folder: str | None = None
    cache_gigabytes: float | int = 50.0

    def validate_streaming(self) -> None:
        if self.mixed_shards < 1:
            raise ValueError(f"'mixed_shards' must be at least 1, got {self.mixed_shards}")
        if self.cache_gigabytes <= 0:
            raise ValueError(f"'cache_gigabytes' must be above 0, got {self.cache_gigabytes}")

    @property
    def loading(self) -> dict[str, Any]:
        """The arguments of `load_dataset` but for path and split."""
        given = {name: getattr(self, name) for name in ("name", "revision", "data_dir", "data_files")}
        return {name: value for name, value in given.items() if value is not None}


def open_dataset(values: Mapping[str, Any]) -> ImageSource:
    """The source that a recipe's `dataset` describes.

    Raises:
        ConfigurationError: For an unknown setting, data set or split.
        TransferError: If the Hub cannot be reached.
        DataError: If it is not made of images.
    """
    settings = build(DatasetSettings, values, "dataset key")
    if not settings.streaming:
        return TableSource(settings)
    from .streaming import StreamSource

    return StreamSource(settings)


def loading(settings: DatasetSettings, call: Callable[[], T]) -> T:
    """The result of a call of `datasets`, with its errors as ours."""
    import datasets
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    version = "" if settings.revision is None else f" with a revision '{settings.revision}'"

    try:
        return call()
    except HFRSHeatError:
        raise
    except (datasets.exceptions.DatasetNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ConfigurationError(
            f"No data set '{settings.path}'{version} that you may read, neither as a folder nor on the Hub: check "
            "dataset.path, and for a private or gated one run `hf auth login` or set HF_TOKEN."
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise TransferError(f"Cannot reach '{settings.path}': {reason(error)} Try again.") from error
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        # An unknown configuration, split or file, data that cannot be parsed: the library's sentence says which.
        raise DataError(f"Cannot load '{settings.path}': {reason(error)}") from error


class TableSource:
    """A data set that `datasets` has prepared on the disk, read by position. An image is called `column/row`."""

    def __init__(self, settings: DatasetSettings) -> None:
        self._settings = settings
        self._table: Any = loading(settings, lambda: _load(settings))
        self._images: dict[str, Any] = {}
        self.digest = str(self._table._fingerprint)

    def __len__(self) -> int:
        return len(self._table)

    def scenes(self, modalities: Sequence[str], default: str) -> list[Sample]:
        columns = self._choose(modalities, default)
        return [
            Sample(tuple((modality, f"{column}/{row}") for modality, column in columns.items()))
            for row in range(len(self._table))
        ]

    def classes(self, modality: str) -> tuple[list[Sample], list[str]]:
        ((_, column),) = self._choose([modality], modality).items()
        label = self._settings.label_column
        check_column(label, self._table.features, "label_column")
        labels, names = index_labels(self._table[label], self._table.features[label])
        return [Sample(((modality, f"{column}/{row}"),), index) for row, index in enumerate(labels)], names

    def _choose(self, modalities: Sequence[str], default: str) -> dict[str, str]:
        import datasets

        columns = choose_columns(self._table.features, self._settings.image_column, modalities, default)
        for column in columns.values():
            table = self._table.select_columns([column]).with_format(None)
            self._images[column] = table.cast_column(column, datasets.Image(decode=False))
        return columns

    def open(self, name: str) -> Path | BytesIO:
        column, _, row = name.rpartition("/")
        cell = self._images[column][int(row)][column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise DataError(f"row {row} has no image in '{column}'")
        return Path(cell["path"]) if cell["bytes"] is None else BytesIO(cell["bytes"])

    def shards(self, samples: Sequence[Sample]) -> None:
        return None

    def read_ahead(self, plans: Iterator[BatchPlan], samples: Sequence[Sample], processes: int) -> Iterator[BatchPlan]:
        return plans


def _load(settings: DatasetSettings) -> Any:
    import datasets

    folder = Path(settings.path)
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return datasets.load_dataset(settings.path, split=settings.split, **settings.loading)
    saved = datasets.load_from_disk(folder)
    if isinstance(saved, datasets.Dataset):
        return saved
    if settings.split not in saved:
        raise ConfigurationError(f"'{folder}' has no split '{settings.split}': {did_you_mean(settings.split, saved)}")
    return saved[settings.split]


def choose_columns(
    features: Mapping[str, Any], setting: str | dict[str, str] | None, modalities: Sequence[str], default: str
) -> dict[str, str]:
    """{modality: column of its images}, in the order of the modalities.

    Args:
        features: The columns and what they hold.
        setting: What the recipe says, if anything.
        modalities: Those the model knows.
        default: The modality of a column that is not named like one.

    Raises:
        ConfigurationError: If a column or modality does not exist, holds no images, or several would do.
    """
    images = [name for name, feature in features.items() if holds_images(feature)]
    if setting is None:
        named = {name: name for name in modalities if name in images}
        if named:
            return named
        if len(images) != 1:
            found = f"several columns of images ({', '.join(images)})" if images else "no column of images"
            raise ConfigurationError(f"The data set has {found}: set dataset.image_column.")
        return {default: images[0]}
    chosen = {default: setting} if isinstance(setting, str) else setting
    check_modalities_known(chosen, modalities)
    for column in chosen.values():
        check_column(column, features, "image_column")
        if column not in images:
            raise ConfigurationError(f"dataset.image_column: '{column}' holds {features[column]}, no images.")
    return {name: chosen[name] for name in modalities if name in chosen}


def check_modalities_known(names: Iterable[str], modalities: Sequence[str]) -> None:
    """Refuse names in `image_column` that are no modalities of the model."""
    for name in names:
        if name not in modalities:
            raise ConfigurationError(
                f"dataset.image_column: unknown modality '{name}', {did_you_mean(name, modalities)}"
            )


def check_column(column: str, features: Mapping[str, Any], key: str) -> None:
    """Refuse a column that does not exist."""
    if column not in features:
        raise ConfigurationError(f"dataset.{key}: no column '{column}', {did_you_mean(column, features)}")


def holds_images(feature: Any) -> bool:
    """Whether a column may hold images: it is said to, or it holds bytes."""
    return type(feature).__name__ == "Image" or getattr(feature, "dtype", None) in ("binary", "large_binary")


def index_labels(values: Iterable[Any], feature: Any) -> tuple[list[int], list[str]]:
    """Class indices and names of a column of labels.

    Raises:
        DataError: If a label is missing, or there are fewer than two classes.
    """
    values = list(values)
    names = list(getattr(feature, "names", None) or ())
    if missing := [
        row for row, value in enumerate(values) if value is None or (names and value not in range(len(names)))
    ]:
        raise DataError(f"Row {missing[0]} and {len(missing) - 1} more have no label: use a split with labels.")
    if not names:
        kinds = sorted(set(values))
        index = {value: number for number, value in enumerate(kinds)}
        values, names = [index[value] for value in values], [str(value) for value in kinds]
    if len(names) < 2:
        raise DataError(f"The data set has one class only ({', '.join(names)}).")
    return values, names
