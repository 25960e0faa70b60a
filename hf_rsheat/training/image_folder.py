"""From a folder to a sorted list of samples, and from a file to a tensor."""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps

from ..errors import ConfigurationError, DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp"})


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
    """Relative POSIX paths of all images below a folder, sorted. Links are followed, but no directory is read twice."""
    if not folder.is_dir():
        raise DataError(f"image_folder '{folder}' is not a folder: set image_folder to a folder of images.")
    paths = sorted(_walk(folder))
    if not paths:
        raise DataError(f"No images below '{folder}': expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}.")
    return paths


def _walk(folder: Path) -> Iterator[str]:
    seen: set[str] = set()
    for root, directories, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            directories.clear()  # a link back to a parent, or a second link to the same place
            continue
        seen.add(real)
        # Sorted: which of two links to one directory is read must not depend on the file system.
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in files:
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield (Path(root) / name).relative_to(folder).as_posix()


def scan_modalities(folder: Path, modalities: Sequence[str], default: str) -> list[Sample]:
    """Samples of a folder whose sub-folders may be named like modalities.

    A path component equal to a modality's name gives the modality; files whose paths agree apart from that component
    and the suffix are one sample (`optical/a.png` and `sar/a.tif`).

    Raises:
        DataError: If there are no images, or two files of one modality compete for one pair.
    """
    scenes: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in image_paths(folder):
        parts = list(PurePosixPath(path).with_suffix("").parts)
        named = next((i for i, part in enumerate(parts[:-1]) if part in modalities), None)
        modality = default if named is None else parts.pop(named)
        scenes["/".join(parts)][modality].append(path)
    samples: list[Sample] = []
    for files in scenes.values():
        if len(files) == 1:
            samples += [Sample(((modality, path),)) for modality, paths in files.items() for path in paths]
            continue
        for paths in files.values():
            if len(paths) > 1:
                raise DataError(f"Cannot tell which of {', '.join(paths)} belongs to the pair: keep one of them.")
        samples.append(Sample(tuple((modality, files[modality][0]) for modality in modalities if modality in files)))
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


def decode(path: Path, channels: int) -> torch.Tensor:
    """Read an image file, turned upright.

    Args:
        path: The file.
        channels: 1 or 3; 8-bit images are converted to grey or RGB.

    Returns:
        `(channels, height, width)`, values as stored: uint8, int32 (16 and 32 bit) or float32.

    Raises:
        DataError: If the file cannot be used; the message says why.
    """
    try:
        with Image.open(path) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot be read: {error}") from error
    if image.mode.startswith(("I", "F")):  # more than 8 bit: converting would clip
        if channels != 1:
            raise DataError(f"has 1 channel, the model expects {channels}")
        pixels = np.asarray(image).astype(np.float32 if image.mode == "F" else np.int32)[None]
    else:
        image = image.convert("L" if channels == 1 else "RGB")
        pixels = np.asarray(image).reshape(image.height, image.width, -1).transpose(2, 0, 1)
    return torch.from_numpy(np.array(pixels, order="C"))


def check_modalities(modalities: dict[str, int]) -> None:
    """Refuse modalities that image files cannot hold."""
    for name, channels in modalities.items():
        if channels not in (1, 3):
            raise ConfigurationError(
                f"Modality '{name}' has {channels} channels; training from an image folder reads files of 1 or 3."
            )
