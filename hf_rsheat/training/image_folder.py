"""From a folder to a sorted list of samples, and from a file to a tensor."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps

from ..errors import DataError
from .archives import ARCHIVE_SUFFIXES, members, read_member
from .geotiff import read_raster, require_rasterio

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp"})
PLAIN_CHANNELS = (1, 3)  # what image files hold


@dataclass(frozen=True)
class Sample:
    """One training sample: one image, or several co-registered ones.

    Args:
        files: (modality, path relative to the image folder) pairs, in the order of the model's modalities.
        label: Class index, where the task has classes.
    """

    files: tuple[tuple[str, str], ...]
    label: int | None = None

    @property
    def group(self) -> str:
        """The modalities of the sample, e.g. `"optical+sar"`; a batch holds one group only."""
        return "+".join(modality for modality, _ in self.files)


@dataclass(frozen=True)
class DecodedSample:
    """The pixels of a sample: modality -> `(channels, height, width)`, as stored in the file."""

    images: dict[str, torch.Tensor]
    label: int | None = None


def image_paths(folder: Path) -> list[str]:
    """Relative POSIX paths of all images below a folder, sorted; tar and Parquet files count as folders.

    Links are followed, but no directory is read twice.

    Raises:
        DataError: If there are none, or an archive or a folder cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"image_folder '{folder}' is not a folder: set image_folder to a folder of images.")
    paths = sorted(_walk(folder))
    if not paths:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES | ARCHIVE_SUFFIXES))
        raise DataError(f"No images below '{folder}': expected files ending in {suffixes}.")
    return paths


def _walk(folder: Path) -> Iterator[str]:
    def refuse(error: OSError) -> None:  # os.walk would leave its images out without a word
        raise DataError(f"Cannot list '{error.filename}': {error.strerror}. Allow it, or move the folder away.")

    seen: set[str] = set()
    for root, directories, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            directories.clear()  # a link back to a parent, or a second link to the same place
            continue
        seen.add(real)
        # Sorted: which of two links to one directory is read must not depend on the file system.
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in files:
            path = Path(root) / name
            suffix = path.suffix.lower()
            if name.startswith("."):
                continue
            if suffix in IMAGE_SUFFIXES:
                yield path.relative_to(folder).as_posix()
            elif suffix in ARCHIVE_SUFFIXES:
                yield from (f"{path.relative_to(folder).as_posix()}/{member}" for member in _images_of(path))


def _images_of(archive: Path) -> Iterator[str]:
    for member in members(archive):
        if archive.suffix.lower() == ".parquet" or PurePosixPath(member).suffix.lower() in IMAGE_SUFFIXES:
            yield member


def scan_modalities(folder: Path, modalities: Sequence[str], default: str) -> list[Sample]:
    """Samples of a folder whose sub-folders may be named like modalities.

    A path component equal to a modality's name gives the modality; files whose paths agree apart from that component
    and the suffix are one sample (`optical/a.png` and `sar/a.tif`).

    Raises:
        DataError: If there are no images, or two files of one modality compete for one pair.
    """
    return pair_paths(image_paths(folder), modalities, default)


def pair_paths(paths: Iterable[str], modalities: Sequence[str], default: str) -> list[Sample]:
    """`scan_modalities` of a list of paths."""
    scenes: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        parts = list(PurePosixPath(path).with_suffix("").parts)
        named = next((i for i, part in enumerate(parts[:-1]) if part in modalities), None)
        modality = default if named is None else parts.pop(named)
        scenes["/".join(parts)][modality].append(path)
    samples: list[Sample] = []
    for files in scenes.values():
        if len(files) == 1:
            samples += [Sample(((modality, path),)) for modality, found in files.items() for path in found]
            continue
        for found in files.values():
            if len(found) > 1:
                raise DataError(f"Cannot tell which of {', '.join(found)} belongs to the pair: keep one of them.")
        samples.append(Sample(tuple((modality, files[modality][0]) for modality in modalities if modality in files)))
    return samples


def pair_up(scenes: list[Sample]) -> list[Sample]:
    """Scenes of more than two sensors as one pair per further sensor, since losses compare two at a time."""
    samples: list[Sample] = []
    for scene in scenes:
        first, *others = scene.files
        samples += [Sample((first, other)) for other in others] or [scene]
    return samples


def scan_classes(folder: Path, modality: str) -> tuple[list[Sample], list[str]]:
    """Samples and class names of a folder with one sub-folder per class.

    Raises:
        DataError: If images lie outside of class folders or there are fewer than two classes.
    """
    paths = image_paths(folder)
    loose = [path for path in paths if "/" not in path]
    classes = sorted({path.split("/")[0] for path in paths} - set(loose))
    if loose:
        raise DataError(f"'{loose[0]}' lies in no class folder: move each image to '{folder}/<class>/'.")
    if len(classes) < 2:
        raise DataError(f"'{folder}' holds one class only ('{classes[0]}'): give the folder that holds all classes.")
    index = {name: i for i, name in enumerate(classes)}
    return [Sample(((modality, path),), index[path.split("/")[0]]) for path in paths], classes


def decode(path: Path | BytesIO, channels: int) -> torch.Tensor:
    """Read an image file, turned upright.

    Args:
        path: The file; it may lie in a tar or Parquet file (`shard.tar/scene.png`). Or its bytes.
        channels: 1 or 3; 8-bit images are converted to grey or RGB. Other numbers are bands of a raster.

    Returns:
        `(channels, height, width)`, values as stored: uint8, int32 (16 and 32 bit) or float32, all finite. Of an
        animation, the first frame.

    Raises:
        DataError: If the file cannot be used; the message says why.
    """
    try:
        source = path if isinstance(path, BytesIO) or path.is_file() else read_member(path)
    except OSError as error:  # in a folder that may not be entered
        raise DataError(f"cannot be read: {error.strerror}") from error
    if source is None:  # opening a pipe would wait for a writer
        raise DataError("cannot be read: it is no file, or a link to none")
    if channels not in PLAIN_CHANNELS:
        return read_raster(source, channels)
    try:
        with Image.open(source) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except Exception as error:  # on malformed files, decoders raise whatever their arithmetic comes to
        reason = str(error).replace(f" {str(path)!r}", "").replace(f" {source!r}", "")  # equal for equal causes
        raise DataError(f"cannot be read: {reason.removesuffix(':')}") from error
    if image.mode.startswith(("I", "F")):  # more than 8 bit: converting would clip
        if channels != 1:
            raise DataError(f"has 1 channel, the model expects {channels}")
        pixels = np.asarray(image).astype(np.float32 if image.mode == "F" else np.int32)[None]
        if not np.isfinite(pixels).all():
            raise DataError("has pixels that are not finite")
    else:
        image = image.convert("L" if channels == 1 else "RGB")
        pixels = np.asarray(image).reshape(image.height, image.width, -1).transpose(2, 0, 1)
    return torch.from_numpy(np.array(pixels, order="C"))


def check_content(image: torch.Tensor) -> None:
    """Refuse an image without content, such as a tile of nothing but nodata.

    Raises:
        DataError: If all its pixels are equal.
    """
    corner = image[:, :1, :1]
    if torch.equal(image[:, :1], corner.expand_as(image[:, :1])) and torch.equal(image, corner.expand_as(image)):
        raise DataError("has no content: all pixels are equal")


def check_modalities(modalities: dict[str, int]) -> None:
    """Refuse modalities whose files cannot be read here.

    Raises:
        MissingExtraError: If one has neither 1 nor 3 channels, and rasterio is not installed.
    """
    for name, channels in modalities.items():
        if channels not in PLAIN_CHANNELS:
            require_rasterio(f"Modality '{name}' of {channels} channels")
