"""Tar and Parquet files read like folders: `shard.tar/scene.png`, `table.parquet/optical/12`.

Members are read by position, so that sampling, resuming and pairing work as for folders of files. A tar (WebDataset
shards are such) is indexed once; a Parquet file becomes an Arrow table in the cache of `datasets`, which is mapped into
memory. Every column of images of a Parquet file is a folder with one member per row.
"""

import tarfile
from collections.abc import Iterator
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError

ARCHIVE_SUFFIXES = frozenset({".tar", ".parquet"})


def members(archive: Path) -> list[str]:
    """Names of what an archive holds: files of a tar, `column/row` of a Parquet file.

    Raises:
        DataError: If it cannot be read.
    """
    return list(_tar_index(archive)) if archive.suffix.lower() == ".tar" else list(_cells(archive))


def read_member(path: Path) -> BytesIO | None:
    """The bytes behind a path through an archive; None where no part of the path is an archive.

    Raises:
        DataError: If the archive does not hold it.
    """
    archive = next((p for p in path.parents if p.suffix.lower() in ARCHIVE_SUFFIXES and p.is_file()), None)
    if archive is None:
        return None
    name = path.relative_to(archive).as_posix()
    return BytesIO(_tar_member(archive, name) if archive.suffix.lower() == ".tar" else _cell(archive, name))


def tar_index(file: BinaryIO, name: str) -> dict[str, tuple[int, int]]:
    """{member: (position, size)} of the files of an open, uncompressed tar.

    Raises:
        DataError: If it is none.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            return {info.name.removeprefix("./"): (info.offset_data, info.size) for info in tar if info.isfile()}
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"Cannot read '{name}': {error}. Unpack compressed tars, or make it again.") from error


@cache
def _tar_index(archive: Path) -> dict[str, tuple[int, int]]:
    try:
        with archive.open("rb") as file:
            return tar_index(file, str(archive))
    except OSError as error:
        raise DataError(f"Cannot read '{archive}': {error}.") from error


def _tar_member(archive: Path, name: str) -> bytes:
    index = _tar_index(archive)
    if name not in index:
        raise DataError(f"'{archive}' has no '{name}'")
    position, size = index[name]
    with archive.open("rb") as file:
        file.seek(position)
        return file.read(size)


@cache
def _table(archive: Path) -> Any:
    """A Parquet file as a `datasets` table with its image columns as bytes."""
    import datasets

    try:
        table: Any = datasets.load_dataset("parquet", data_files=str(archive), split="train")
    except Exception as error:  # pyarrow and datasets raise errors of many kinds
        raise DataError(f"Cannot read '{archive}': {str(error).splitlines()[0]}") from error
    images = [name for name, feature in table.features.items() if _holds_images(feature)]
    if not images:
        raise DataError(f"'{archive}' has no column of images: expected an Image feature or bytes.")
    table = table.select_columns(images)
    for name in images:
        table = table.cast_column(name, datasets.Image(decode=False))
    return table


def _holds_images(feature: Any) -> bool:
    kind = type(feature).__name__
    return kind == "Image" or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _cells(archive: Path) -> Iterator[str]:
    table = _table(archive)
    for column in table.column_names:
        yield from (f"{column}/{row}" for row in range(len(table)))


def _cell(archive: Path, name: str) -> bytes:
    column, _, row = name.rpartition("/")
    content = _table(archive)[int(row)][column]
    if content is None or content["bytes"] is None:
        raise DataError(f"row {row} of '{archive}' has no image in '{column}'")
    return content["bytes"]
