"""Copies of remote files on the local disk, within a budget; Parquet files are kept as tars of their cells."""

import hashlib
import json
import os
import shutil
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from ..errors import DataError, TransferError
from ..hub.transfer import patiently, reason
from .archives import tar_index

_ROWS = 64  # rows of a Parquet file in memory at once, as far as its row groups allow


@dataclass(frozen=True)
class Shard:
    """A remote archive.

    Args:
        url: Where it is, as fsspec reads it: `hf://datasets/...`, or a path.
        name: What messages and samples call it, e.g. `data/train-00000.parquet`.
        size: Its bytes.
        columns: Columns to keep of a Parquet file; none for a tar.
        version: Differs where the file behind the address has changed, as far as its server says.
    """

    url: str
    name: str
    size: int
    columns: tuple[str, ...] = ()
    version: str = ""

    @property
    def local(self) -> Path | None:
        """The file itself, where no copy is needed."""
        return None if self.columns or "://" in self.url else Path(self.url)

    @property
    def key(self) -> str:
        """The name of its copy: another one for other columns."""
        return hashlib.sha256(repr((self.url, self.size, self.version, self.columns)).encode()).hexdigest()[:32]


class ShardCache:
    """Copies of the shards in use, shared by all processes of a machine.

    A shard is fetched when it is first read, by one process while others wait for it. What was not used for longest
    is deleted when the copies outgrow the budget; who has such a file open reads on.

    Args:
        folder: Where the copies lie.
        budget: Bytes they may take, not counting what is being fetched.
        most_open: How many a process keeps open.
    """

    def __init__(self, folder: Path, budget: float, most_open: int = 64) -> None:
        self.folder = folder
        self._budget = budget
        self._most_open = most_open
        self._open: OrderedDict[str, tuple[BinaryIO, dict[str, tuple[int, int]]]] = OrderedDict()
        folder.mkdir(parents=True, exist_ok=True)
        for draft in folder.glob("*.draft*"):  # of a killed process
            with suppress(Timeout, OSError), self._lock(draft.name.split(".")[0], 0):
                draft.unlink(missing_ok=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # files do not travel to another process

    def _lock(self, key: str, seconds: float = -1) -> FileLock:
        return FileLock(self.folder / f"{key}.lock", timeout=seconds)

    def read(self, shard: Shard, member: str) -> bytes:
        """The bytes of a member.

        Raises:
            DataError: If the shard does not hold it.
            TransferError: If the shard cannot be fetched.
        """
        file, index = self._opened(shard)
        if member not in index:
            raise DataError(f"'{shard.name}' has no '{member}'")
        position, size = index[member]
        if shard.local is None:
            os.utime(file.fileno())  # in use: delete others first
        return os.pread(file.fileno(), size, position)  # without the position that forked processes share

    def members(self, shard: Shard) -> list[str]:
        """Names of the files of a tar; fetches it where they are not known from before."""
        known = self.folder / f"{shard.key}.json"
        with suppress(OSError, ValueError):
            return json.loads(known.read_text(encoding="utf-8"))
        with self._open_copy(shard) as file:
            names = list(tar_index(file, shard.name))
        self._write(known, names)
        return names

    def rows(self, shard: Shard, labels: str | None) -> tuple[int, list[Any] | None]:
        """Rows of a Parquet file, and the values of a column; its footer and that column are all that is fetched."""
        known = self.folder / f"{shard.key}-{hashlib.sha256(repr(labels).encode()).hexdigest()[:8]}.json"
        with suppress(OSError, ValueError):
            return tuple(json.loads(known.read_text(encoding="utf-8")))
        found = _fetching(shard, lambda: _read_rows(shard, labels))
        self._write(known, found)
        return found

    def room(self) -> int:
        """Bytes on its disk that copies take or may take."""
        return shutil.disk_usage(self.folder).free + sum(size for _, size, _ in self._copies())

    def prepare(self, shard: Shard) -> None:
        """Fetch a shard that is not here yet."""
        self._fetch(shard)

    def _copy(self, shard: Shard) -> Path:
        return shard.local or self.folder / f"{shard.key}.tar"

    def _opened(self, shard: Shard) -> tuple[BinaryIO, dict[str, tuple[int, int]]]:
        if shard.key in self._open:
            self._open.move_to_end(shard.key)
            return self._open[shard.key]
        file = self._open_copy(shard)
        # A deleted file takes room until nobody has it open.
        for key in [key for key, (other, _) in self._open.items() if os.fstat(other.fileno()).st_nlink == 0]:
            self._open.pop(key)[0].close()
        self._open[shard.key] = file, tar_index(file, shard.name)
        if len(self._open) > self._most_open:
            self._open.popitem(last=False)[1][0].close()
        return self._open[shard.key]

    def _open_copy(self, shard: Shard) -> BinaryIO:
        while True:
            self._fetch(shard)
            try:
                return self._copy(shard).open("rb")
            except FileNotFoundError:
                if shard.local is not None:
                    raise TransferError(f"'{shard.url}' is gone: restore it, then continue with --resume.") from None
                continue  # deleted in between by a process with other needs

    def _fetch(self, shard: Shard) -> None:
        copy = self._copy(shard)
        if shard.local is not None or copy.exists():
            return
        with self._lock(shard.key):
            if copy.exists():  # now
                return
            draft = self.folder / f"{shard.key}.draft"
            _fetching(shard, lambda: _download(shard, draft))
            draft.replace(copy)
        self._make_room(copy)

    def _make_room(self, kept: Path) -> None:
        copies = self._copies()
        excess = sum(size for _, size, _ in copies) - self._budget
        for _, size, path in sorted(copies):
            if excess > 0 and path != kept:
                path.unlink(missing_ok=True)
                excess -= size

    def _copies(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of all copies."""
        found = []
        for path in self.folder.glob("*.tar"):
            with suppress(FileNotFoundError):  # deleted by another process
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return found

    def _write(self, path: Path, found: Any) -> None:
        new = path.with_suffix(f".json-{os.getpid()}")
        new.write_text(json.dumps(found, default=str), encoding="utf-8")
        new.replace(path)


def _fetching(shard: Shard, call: Any) -> Any:
    """The result of a call that reads a remote file; passing failures are waited for.

    Raises:
        TransferError: If they do not pass.
    """
    import pyarrow

    try:
        return patiently(call)
    except pyarrow.ArrowException as error:
        raise DataError(f"'{shard.name}' is no Parquet file that can be read: {error}") from error
    except (OSError, ValueError) as error:  # what clients of remote file systems raise
        if isinstance(error, DataError):
            raise
        raise TransferError(
            f"Cannot fetch '{shard.name}': {reason(error)} Continue with --resume when it is there again."
        ) from error


def _read_rows(shard: Shard, labels: str | None) -> tuple[int, list[Any] | None]:
    import fsspec
    import pyarrow.parquet

    with fsspec.open(shard.url, "rb", cache_type="none") as file:
        table = pyarrow.parquet.ParquetFile(file)
        values = None if labels is None else table.read(columns=[labels], use_threads=False)[labels].to_pylist()
        return table.metadata.num_rows, values


def _download(shard: Shard, draft: Path) -> None:
    import fsspec

    filesystem, path = fsspec.url_to_fs(shard.url)
    if not shard.columns:
        filesystem.get_file(path, str(draft))
        return
    table = draft.with_suffix(".draft-parquet")
    try:
        filesystem.get_file(path, str(table))
        _write_cells(table, draft, shard.columns)
    finally:
        table.unlink(missing_ok=True)


def _write_cells(table: Path, target: Path, columns: Sequence[str]) -> None:
    """The images of a Parquet file as a tar of files `column/row`; empty cells are left out."""
    import pyarrow.parquet

    row = 0
    with tarfile.open(target, "w") as tar, pyarrow.parquet.ParquetFile(table) as file:
        for batch in file.iter_batches(_ROWS, columns=list(columns), use_threads=False):
            for column in columns:
                for offset, cell in enumerate(batch.column(column)):
                    value = cell.as_py()
                    content = value.get("bytes") if isinstance(value, dict) else value
                    if content is not None:
                        info = tarfile.TarInfo(f"{column}/{row + offset}")
                        info.size = len(content)
                        tar.addfile(info, BytesIO(content))
            row += len(batch)


def field_of(member: str) -> tuple[str, str]:
    """(sample, field) of a file of a WebDataset tar: `a/0001.sar.png` is field `sar.png` of sample `a/0001`."""
    path = PurePosixPath(member)
    stem, _, field = path.name.partition(".")
    return (path.parent / stem).as_posix(), field
