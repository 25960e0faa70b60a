"""A teacher's maps on disk: computed once, checked whenever they are read.

The folder holds safetensors shards and `manifest.json`: what made the maps (hashes of the teacher's weights and
configuration, how its input was prepared), for every image its path, the hash of its pixels and of its maps, and which
images could not be read.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..errors import CacheError, DataError
from .image_folder import decode
from .teacher import SYMMETRIES, Teacher, whole_view

MANIFEST = "manifest.json"
FORMAT = 1


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a CPU tensor's values in memory order."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()


def cache_key(teacher: Teacher, image_size: int, symmetries: bool) -> dict[str, Any]:
    """Everything that maps depend on besides the image: maps of another key are stale."""
    prepared = teacher.input_for(image_size)
    return {
        "format": FORMAT,
        "teacher": teacher.fingerprint(),
        "precision": teacher.precision,
        "input": {**vars(prepared), "mean": list(prepared.mean), "std": list(prepared.std)},
        "views": SYMMETRIES if symmetries else 1,
    }


class TeacherCache:
    """Reads maps; safe to use in loader processes, which open the shards by themselves.

    Args:
        folder: The cache.
        key: What `cache_key` gives now.

    Raises:
        CacheError: If there is no cache, it is damaged, or it was made with another teacher or other settings.
    """

    def __init__(self, folder: str | Path, key: dict[str, Any]) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise CacheError(f"There is no cache in '{folder}': make it with `hf-rsheat distill cache RECIPE`.")
        _check_key(self.folder, manifest["key"], key)
        self._entries = {
            image["path"]: (shard["file"], image) for shard in manifest["shards"] for image in shard["images"]
        }
        self._unreadable = frozenset(manifest["unreadable"])
        self._open: dict[str, Any] = {}

    def check_complete(self, paths: Sequence[str]) -> None:
        """Raise `CacheError` if there are images that were not there, or not reached, when the cache was made."""
        missing = [path for path in paths if path not in self._entries and path not in self._unreadable]
        if missing:
            raise CacheError(
                f"{len(missing)} of {len(paths)} images are not in {self.folder} (first: '{missing[0]}'): "
                "add them with `hf-rsheat distill cache RECIPE`."
            )

    def read(self, path: str, pixels: torch.Tensor, view: int) -> torch.Tensor:
        """The teacher's map of one view of an image.

        Args:
            path: The image, relative to the image folder.
            pixels: What was decoded from it.
            view: See `whole_view`.

        Returns:
            float16 `(channels, rows, columns)`.

        Raises:
            CacheError: If the image is not in the cache, has changed since, or the map is damaged.
        """
        if path not in self._entries:
            raise CacheError(f"'{path}' is not in {self.folder}: add it with `hf-rsheat distill cache RECIPE`.")
        file, image = self._entries[path]
        if tensor_digest(pixels) != image["pixels"]:
            raise CacheError(
                f"'{path}' has changed since {self.folder} was made: make it again with `hf-rsheat distill cache "
                "RECIPE --overwrite`."
            )
        try:
            maps = self._shard(file).get_slice(path)[view]
        except (OSError, SafetensorError, IndexError) as error:
            raise CacheError(f"{self.folder / file} {_DAMAGED} ({error})") from error
        if tensor_digest(maps) != image["maps"][view]:
            raise CacheError(f"{self.folder / file} {_DAMAGED} (the map of '{path}' does not match its hash)")
        return maps

    def _shard(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt")
        return self._open[file]

    def __getstate__(self) -> dict[str, Any]:
        """Open files do not cross over to loader processes."""
        return {**self.__dict__, "_open": {}}


_DAMAGED = "is damaged: make the cache again with `hf-rsheat distill cache RECIPE --overwrite`."


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a cache; None where there is none.

    Raises:
        CacheError: If it cannot be read, or a shard it names is missing or has another size.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        sizes = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
        for file, size in sizes.items():
            if (folder / file).stat().st_size != size:
                raise ValueError(f"{file} does not have {size} bytes")
        return {name: manifest[name] for name in ("key", "shards", "unreadable")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{folder} {_DAMAGED} ({error})") from error


def _check_key(folder: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    changed = sorted(name for name in wanted if stored.get(name) != wanted[name])
    if changed:
        name = changed[0]
        raise CacheError(
            f"{folder} is stale: '{name}' was {stored.get(name)!r} and is {wanted[name]!r} now. Restore it, use "
            "another teacher_cache, or make this one again with `hf-rsheat distill cache RECIPE --overwrite`."
        )


def build_cache(
    folder: str | Path,
    teacher: Teacher,
    image_folder: Path,
    paths: Sequence[str],
    image_size: int,
    symmetries: bool = False,
    device: str | torch.device = "cpu",
    shard_images: int = 32,
    overwrite: bool = False,
) -> dict[str, str]:
    """Compute the maps that are missing; a killed run continues after its last whole shard.

    Args:
        folder: The cache.
        teacher: Whose maps.
        image_folder: Folder that `paths` are relative to.
        paths: Images; those that are in the cache already are passed over.
        image_size: Side of the views, pixels.
        symmetries: All eight views of every image instead of the upright one.
        device: Where the teacher computes.
        shard_images: Images per shard.
        overwrite: Throw away what is there.

    Returns:
        The images that cannot be read, path -> reason.

    Raises:
        CacheError: If there is a cache of another teacher or other settings, or a damaged one, and not `overwrite`.
        DataError: If a map has values that float16 does not hold.
    """
    folder = Path(folder)
    key = cache_key(teacher, image_size, symmetries)
    if overwrite:
        _remove(folder)
    manifest = read_manifest(folder) or {"key": key, "shards": [], "unreadable": []}
    _check_key(folder, manifest["key"], key)
    known = {image["path"] for shard in manifest["shards"] for image in shard["images"]}
    missing = [path for path in paths if path not in known]
    folder.mkdir(parents=True, exist_ok=True)
    unreadable: dict[str, str] = {}
    shard: dict[str, tuple[str, torch.Tensor]] = {}
    for path in tqdm(missing, initial=len(paths) - len(missing), total=len(paths), desc="teacher", unit="image"):
        try:
            pixels = decode(image_folder / path, channels=3)
        except DataError as error:
            unreadable[path] = str(error)
            continue
        shard[path] = tensor_digest(pixels), _maps(teacher, pixels, image_size, key["views"], device)
        if len(shard) == shard_images:
            _write_shard(folder, manifest, shard)
            shard = {}
    manifest["unreadable"] = sorted(unreadable)
    _write_shard(folder, manifest, shard)
    return unreadable


def _maps(teacher: Teacher, pixels: torch.Tensor, size: int, views: int, device: str | torch.device) -> torch.Tensor:
    """float16 `(views, channels, rows, columns)`."""
    prepare = teacher.input_for(size)
    inputs = torch.stack([prepare(whole_view(pixels, size, view)) for view in range(views)])
    maps = teacher(inputs.to(device)).half().cpu().contiguous()
    if not maps.isfinite().all():
        raise DataError(
            "The teacher's maps do not fit into float16, which the cache holds: train without teacher_cache."
        )
    return maps


def _write_shard(folder: Path, manifest: dict[str, Any], shard: dict[str, tuple[str, torch.Tensor]]) -> None:
    """Write a shard, then the manifest that names it: a kill between the two leaves a file that is written again."""
    if shard:
        manifest["shards"].append(_shard_record(folder, len(manifest["shards"]), shard))
    _replace(folder / MANIFEST, lambda draft: draft.write_text(json.dumps(manifest), encoding="utf-8"))


def _shard_record(folder: Path, index: int, shard: dict[str, tuple[str, torch.Tensor]]) -> dict[str, Any]:
    file = f"maps-{index:05d}.safetensors"
    _replace(folder / file, lambda draft: save_file({path: maps for path, (_, maps) in shard.items()}, draft))
    images = [
        {"path": path, "pixels": digest, "maps": [tensor_digest(view) for view in maps]}
        for path, (digest, maps) in shard.items()
    ]
    return {"file": file, "bytes": (folder / file).stat().st_size, "images": images}


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file that is complete or absent, also after a loss of power."""
    draft = path.with_name(f"{path.name}.part")
    write(draft)
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    draft.replace(path)


def _remove(folder: Path) -> None:
    """Remove what `build_cache` wrote, the manifest first, and nothing else."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for shard in folder.glob("maps-*.safetensors"):
        shard.unlink()
