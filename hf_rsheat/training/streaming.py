"""Data sets that are larger than the disk: shards come when they are needed and go when they are not.

A sample is known by shard and position, so that order, resuming and pairing are those of local data. What differs is
that an epoch mixes a few shards at a time.
"""

import hashlib
import re
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from pathlib import Path, PurePosixPath
from queue import SimpleQueue
from typing import Any

from ..errors import ConfigurationError, DataError, HFRSHeatError, TransferError, did_you_mean
from ..hub.transfer import patiently, reason
from .dataset_source import (
    DatasetSettings,
    check_column,
    check_modalities_known,
    choose_columns,
    index_labels,
    loading,
)
from .image_folder import IMAGE_SUFFIXES, Sample, pair_paths
from .sampler import BatchPlan
from .shards import Shard, ShardCache, field_of

_CONNECTIONS = 8
_SPARE = 2  # shards fetched ahead
_KINDS = ("parquet", "webdataset", "imagefolder")
_ARCHIVE = re.compile(r".*?\.(?:tar|parquet)(?=/)", re.IGNORECASE)
_HUB = re.compile(r"hf://datasets/((?:[^/]+/)?[^/@]+)@[^/]+/(.+)")


class StreamSource:
    """Parquet files, WebDataset tars or image files that `datasets` finds, on the Hub or elsewhere.

    An image is called `shard/column/row`, `shard/member` or by its path, as it would be in a downloaded folder. What
    the shards hold is asked for once and remembered: for Parquet their footers, for tars the tars themselves.
    """

    def __init__(self, settings: DatasetSettings) -> None:
        import datasets

        self._settings = settings
        builder = loading(settings, lambda: datasets.load_dataset_builder(settings.path, **settings.loading))
        self._kind = type(builder).__module__.rpartition(".")[2]
        if self._kind not in _KINDS:
            raise ConfigurationError(
                f"'{settings.path}' consists of {self._kind} files, which cannot be streamed: set dataset.streaming to "
                "false, or convert it to Parquet."
            )
        urls = self._split(builder.config.data_files or {})
        self._urls = dict(zip(_names(urls, settings.path), urls, strict=True))
        self._found = loading(settings, lambda: _look_up(urls))
        self._features: Any = builder.info.features
        self.digest = hashlib.sha256(
            repr([(name, self._found[url][0]) for name, url in self._urls.items()]).encode()
        ).hexdigest()
        self._shards: dict[str, Shard] = {}
        folder = settings.cache_folder or Path(datasets.config.HF_DATASETS_CACHE) / "hf_rsheat_shards"
        most_open = max(64, 2 * settings.mixed_shards + 4)
        self._cache = ShardCache(Path(folder), settings.cache_gigabytes * 1e9, most_open)

    def _split(self, files: dict[Any, list[str]]) -> list[str]:
        by_name = {str(split): list(found) for split, found in files.items()}
        split = self._settings.split
        if split not in by_name:
            raise ConfigurationError(
                f"'{self._settings.path}' has no split '{split}' to stream: {did_you_mean(split, by_name)}"
            )
        suffixes = {"parquet": {".parquet"}, "webdataset": {".tar"}}.get(self._kind, IMAGE_SUFFIXES)
        urls = [url for url in by_name[split] if PurePosixPath(url).suffix.lower() in suffixes]
        if not urls:
            raise ConfigurationError(
                f"'{self._settings.path}' has no files ending in {', '.join(sorted(suffixes))}, as streaming needs: "
                "set dataset.streaming to false."
            )
        return urls

    def scenes(self, modalities: Sequence[str], default: str) -> list[Sample]:
        if self._kind == "parquet":
            columns = self._choose(modalities, default)
            counted = self._count(None)
            return [
                Sample(tuple((modality, f"{name}/{column}/{row}") for modality, column in columns.items()))
                for name, (rows, _) in zip(self._shards, counted, strict=True)
                for row in range(rows)
            ]
        if self._kind == "imagefolder":
            return pair_paths(sorted(self._urls), modalities, default)
        return self._members(modalities, default)

    def classes(self, modality: str) -> tuple[list[Sample], list[str]]:
        if self._kind == "webdataset":
            raise ConfigurationError(
                "Classes of WebDataset tars cannot be streamed: set dataset.streaming to false, or convert to Parquet."
            )
        if self._kind == "imagefolder":
            names = list(self._urls)
            labels, classes = index_labels((PurePosixPath(name).parent.name for name in names), None)
            return [Sample(((modality, name),), label) for name, label in zip(names, labels, strict=True)], classes
        ((_, column),) = self._choose([modality], modality).items()
        wanted = self._settings.label_column
        check_column(wanted, self._features, "label_column")
        counted = self._count(wanted)
        labels, classes = index_labels(
            (value for _, values in counted for value in values or ()), self._features[wanted]
        )
        images = (
            f"{name}/{column}/{row}"
            for name, (rows, _) in zip(self._shards, counted, strict=True)
            for row in range(rows)
        )
        return [Sample(((modality, name),), label) for name, label in zip(images, labels, strict=True)], classes

    def _choose(self, modalities: Sequence[str], default: str) -> dict[str, str]:
        """The columns of a Parquet data set to read; makes the shards, which hold just these."""
        if self._features is None:
            first = next(iter(self._urls.values()))
            self._features = loading(self._settings, lambda: _features(first))
        columns = choose_columns(self._features, self._settings.image_column, modalities, default)
        self._make_shards(tuple(columns.values()))
        return columns

    def _count(self, labels: str | None) -> list[tuple[int, list[Any] | None]]:
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            return list(pool.map(lambda shard: self._cache.rows(shard, labels), self._shards.values()))

    def _members(self, modalities: Sequence[str], default: str) -> list[Sample]:
        self._make_shards(())
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            members = dict(zip(self._shards, pool.map(self._cache.members, self._shards.values()), strict=True))
        setting = self._settings.image_column
        if setting is None:
            names = [f"{name}/{member}" for name, found in members.items() for member in found]
            return pair_paths(
                [name for name in names if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES], modalities, default
            )
        chosen = {default: setting} if isinstance(setting, str) else setting
        check_modalities_known(chosen, modalities)
        fields = {field: modality for modality, field in chosen.items()}
        scenes: dict[str, dict[str, str]] = defaultdict(dict)
        seen: set[str] = set()
        for name, found in members.items():
            for member in found:
                key, field = field_of(member)
                seen.add(field)
                if field in fields:
                    scenes[f"{name}/{key}"][fields[field]] = f"{name}/{member}"
        for field in fields:
            check_column(field, dict.fromkeys(seen), "image_column")
        order = [name for name in modalities if name in chosen]
        return [Sample(tuple((m, files[m]) for m in order if m in files)) for files in scenes.values()]

    def _make_shards(self, columns: tuple[str, ...]) -> None:
        self._shards = {
            name: Shard(url, name, self._found[url][0], columns, self._found[url][1])
            for name, url in self._urls.items()
        }

    def open(self, name: str) -> Path | BytesIO:
        if self._kind == "imagefolder":
            return BytesIO(self._file(name))
        shard = self._shard(name)
        return BytesIO(self._cache.read(shard, name[len(shard.name) + 1 :]))

    def _file(self, name: str) -> bytes:
        import fsspec

        filesystem, path = fsspec.url_to_fs(self._urls[name])
        try:
            return patiently(lambda: filesystem.cat_file(path))
        except (OSError, ValueError) as error:
            raise TransferError(
                f"Cannot fetch '{name}': {reason(error)} Continue with --resume when it is there again."
            ) from error

    def _shard(self, name: str) -> Shard:
        found = _ARCHIVE.match(name)
        if found is None or found[0] not in self._shards:
            raise DataError(f"'{name}' lies in no shard")
        return self._shards[found[0]]

    def shards(self, samples: Sequence[Sample]) -> tuple[list[int], int] | None:
        if self._kind == "imagefolder":
            return None
        numbers: dict[tuple[str, ...], int] = {}
        places = [tuple(self._shard(name).name for _, name in sample.files) for sample in samples]
        found = [numbers.setdefault(place, len(numbers)) for place in places]
        self._check_room(numbers)
        return found, self._settings.mixed_shards

    def _check_room(self, places: Iterable[tuple[str, ...]]) -> None:
        """Refuse a cache that cannot hold what is in use at a moment."""
        shards = ({self._shards[name] for name in place} for place in places)
        sizes = sorted((sum(shard.size for shard in place if shard.local is None) for place in shards), reverse=True)
        needed = sum(sizes[: self._settings.mixed_shards + 1 + _SPARE])
        for room, what in (
            (self._settings.cache_gigabytes * 1e9, "set dataset.cache_gigabytes higher"),
            (self._cache.room(), f"make room at {self._cache.folder}, set dataset.cache_folder"),
        ):
            if needed > room:
                raise ConfigurationError(
                    f"Mixing {self._settings.mixed_shards} shards takes {needed / 1e9:.3g} GB and there are "
                    f"{room / 1e9:.3g} GB: {what} or dataset.mixed_shards lower."
                )

    def read_ahead(self, plans: Iterator[BatchPlan], samples: Sequence[Sample], processes: int) -> Iterator[BatchPlan]:
        if self._kind == "imagefolder":
            yield from plans
            return
        wanted: SimpleQueue[Shard | None] = SimpleQueue()
        # A daemon: a run that ends must not wait for a download.
        threading.Thread(target=self._fetch_all, args=(wanted,), daemon=True).start()
        distance = _SPARE * len(samples) / len(self._shards) / processes
        waiting: deque[BatchPlan] = deque()
        images = 0
        try:
            for plan in plans:
                for name in {
                    self._shard(name).name for i in plan.indices for _, name in samples[i % len(samples)].files
                }:
                    wanted.put(self._shards[name])
                waiting.append(plan)
                images += len(plan.indices)
                while images > distance and waiting:
                    images -= len(waiting[0].indices)
                    yield waiting.popleft()
            yield from waiting
        finally:
            wanted.put(None)

    def _fetch_all(self, wanted: "SimpleQueue[Shard | None]") -> None:
        while (shard := wanted.get()) is not None:
            with suppress(HFRSHeatError):  # who reads it will meet the same error, and say so
                self._cache.prepare(shard)


def _names(urls: Sequence[str], path: str) -> list[str]:
    """Names of files: relative to the data set, or to the folder they share; several data sets are folders."""
    on_hub = [match for match in map(_HUB.fullmatch, urls) if match is not None]
    if len(on_hub) == len(urls):
        repos = {match[1] for match in on_hub}
        short = {repo: repo.rpartition("/")[2] for repo in repos}
        if len(set(short.values())) < len(repos):
            short = {repo: repo.replace("/", "--") for repo in repos}
        return [f"{short[match[1]]}/{match[2]}" if len(repos) > 1 else match[2] for match in on_hub]
    if all(Path(url).is_relative_to(Path(path).absolute()) for url in urls):
        return [Path(url).relative_to(Path(path).absolute()).as_posix() for url in urls]
    folders = [PurePosixPath(url).parent.parts for url in urls]
    shared = next(
        (i for i, parts in enumerate(zip(*folders, strict=False)) if len(set(parts)) > 1), min(map(len, folders))
    )
    return ["/".join(PurePosixPath(url).parts[shared:]) for url in urls]


def _look_up(urls: Sequence[str]) -> dict[str, tuple[int, str]]:
    """(bytes, version) of every file, with one request per folder."""
    import fsspec

    filesystem, _ = fsspec.url_to_fs(urls[0])
    paths = [filesystem._strip_protocol(url) for url in urls]
    known: dict[str, tuple[int, str]] = {}
    for folder in {path.rpartition("/")[0] for path in paths}:
        for entry in filesystem.ls(folder, detail=True):
            # An address on the Hub has the commit in it.
            version = entry.get("mtime") or entry.get("ETag") or entry.get("etag") or ""
            known[entry["name"]] = int(entry["size"] or 0), str(version)
    return {url: known[path] for url, path in zip(urls, paths, strict=True)}


def _features(url: str) -> Any:
    import datasets
    import fsspec
    import pyarrow.parquet

    with fsspec.open(url, "rb", cache_type="none") as file:
        return datasets.Features.from_arrow_schema(pyarrow.parquet.ParquetFile(file).schema_arrow)
