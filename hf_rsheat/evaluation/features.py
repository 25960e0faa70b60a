"""From image files to feature vectors: by a model, and by colour and gradient histograms for comparison."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel, PretrainedConfig

from ..auto import register
from ..errors import ConfigurationError, DataError

logger = logging.getLogger(__name__)

_READ_ERRORS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Features:
    """Feature vectors of the images that could be read.

    Attributes:
        vectors: (images, dimensions) float32.
        paths: the images, one per row.
        unreadable: path -> reason, for the images left out.
    """

    vectors: NDArray[np.float32]
    paths: tuple[str, ...]
    unreadable: dict[str, str]


@dataclass(frozen=True)
class FeatureExtractor:
    """A model with its image processor, ready to compute on one device."""

    model: Any
    processor: Any
    modality: str | None = None

    def inputs(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Keyword arguments of the model's forward for a batch of images."""
        extra = {} if self.modality is None else {"modality": self.modality}
        pixel_values = self.processor(list(images), return_tensors="pt", **extra)["pixel_values"]
        return {"pixel_values": pixel_values.to(self.model.device, self.model.dtype), **extra}

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Pooled features (images, dimensions)."""
        return self.model(**self.inputs(images)).pooler_output.flatten(1).float().cpu().numpy()


def choose_modality(config: PretrainedConfig, modality: str | None) -> str | None:
    """The modality to pass to a model: the named one, else its default; None for models with a single stem.

    Raises:
        ConfigurationError: the model has no such modality.
    """
    known = list(getattr(config, "modalities", None) or [])
    if modality is None:
        return config.default_modality if known else None
    if modality not in known:
        has = f"knows {', '.join(known)}" if known else "has one kind of input and takes no modality"
        raise ConfigurationError(f"Modality {modality!r} cannot be used: this model {has}.")
    return modality


def default_device() -> str:
    """The accelerator if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_extractor(model: Any, processor: Any = None, modality: str | None = None) -> FeatureExtractor:
    """Load a Hub folder or id with its processor; a model object needs its processor beside it.

    Raises:
        ConfigurationError: a model object without processor, or a modality the model does not have.
    """
    register()  # the console script imports the package without
    if isinstance(model, str | Path):
        processor = processor or AutoImageProcessor.from_pretrained(model)
        model = AutoModel.from_pretrained(model)
    elif processor is None:
        raise ConfigurationError("A model object needs its image processor: pass processor=, or a model folder.")
    trunk = model.base_model.to(default_device()).eval()
    return FeatureExtractor(trunk, processor, choose_modality(trunk.config, modality))


def untrained_like(extractor: FeatureExtractor, seed: int) -> FeatureExtractor:
    """The same architecture with random weights: what the images and the design give away without training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModel.from_config(extractor.model.config)
    model = model.to(extractor.model.device).eval()
    return FeatureExtractor(model, extractor.processor, extractor.modality)


def read_image(path: Path) -> Image.Image:
    """Open and decode an image, upright.

    Raises:
        DataError: the file is not an image or is damaged; the message gives the reason.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except _READ_ERRORS as error:
        reason = str(error).replace(str(path), path.name)  # pillow names the whole path; results hold none
        raise DataError(f"cannot be read: {reason}") from error


def iterate_features(
    compute: Callable[[Sequence[Image.Image]], NDArray[np.float32]],
    paths: Sequence[str],
    root: Path,
    unreadable: dict[str, str],
    batch_size: int = 32,
    title: str = "features",
) -> Iterator[tuple[list[str], NDArray[np.float32]]]:
    """Yield (paths, vectors) batch by batch; add the images that cannot be read to `unreadable`, path -> reason.

    Raises:
        DataError: an image was read, but `compute` refuses it (for instance 16-bit pixels without a rescale factor).
    """
    with tqdm(total=len(paths), desc=title, unit="image") as progress:
        for start in range(0, len(paths), batch_size):
            images = {}
            for path in paths[start : start + batch_size]:
                try:
                    images[path] = read_image(root / path)
                except DataError as error:
                    unreadable[path] = str(error)
                    logger.warning("%s is left out: it %s", path, error)
            if images:
                try:
                    vectors = compute(list(images.values()))
                except ValueError as error:
                    raise DataError(f"The images {', '.join(list(images)[:3])}, ... cannot be used: {error}") from error
                yield list(images), vectors
            progress.update(len(paths[start : start + batch_size]))


def collect(
    compute: Callable[[Sequence[Image.Image]], NDArray[np.float32]], paths: Sequence[str], **options
) -> Features:
    """All batches of `iterate_features` in one table.

    Raises:
        DataError: no image can be read.
    """
    unreadable: dict[str, str] = {}
    batches = list(iterate_features(compute, paths, unreadable=unreadable, **options))
    if not batches:
        raise DataError(f"None of the {len(paths)} images can be read: check the folder.")
    kept = tuple(path for names, _ in batches for path in names)
    return Features(np.concatenate([vectors for _, vectors in batches]), kept, unreadable)


def extract_features(
    model: Any,
    paths: Sequence[str | Path],
    batch_size: int = 32,
    modality: str | None = None,
    processor: Any = None,
) -> Features:
    """Pooled features of image files by a model.

    Args:
        model: Hub folder or id, or a model object together with `processor`.
        paths: image files; those that cannot be read are left out and listed.
        batch_size: images per forward pass.
        modality: which sensor the images come from, for models with several stems (default: optical, or the only one).
        processor: the image processor of a model object.

    Raises:
        ConfigurationError: see `load_extractor`.
        DataError: no image can be read, or the processor refuses them.
    """
    extractor = load_extractor(model, processor, modality)
    return collect(extractor, [str(path) for path in paths], root=Path(), batch_size=batch_size)


def histograms(images: Sequence[Image.Image]) -> NDArray[np.float32]:
    """Colour and gradient histograms, (images, 69): the yardstick that needs no network.

    Square roots of 16-bin histograms of red, green and blue, of gradient directions weighted by strength (9 bins), and
    of gradient strengths (12 bins), at 128 x 128 pixels.
    """
    return np.stack([_histogram(image) for image in images])


def _histogram(image: Image.Image) -> NDArray[np.float32]:
    pixels = np.asarray(image.convert("RGB").resize((128, 128), Image.Resampling.BILINEAR), np.float32)
    rows, columns = np.gradient(pixels.mean(-1))
    strength, direction = np.hypot(rows, columns), np.arctan2(rows, columns) % np.pi
    counts = [np.histogram(pixels[..., band], 16, (0, 256))[0] for band in range(3)]
    counts.append(np.histogram(direction, 9, (0, np.pi), weights=strength)[0])
    counts.append(np.histogram(np.log1p(strength), 12, (0, 6))[0])
    return np.concatenate([np.sqrt(count / max(count.sum(), 1e-9)) for count in counts]).astype(np.float32)
