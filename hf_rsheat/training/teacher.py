"""The frozen teacher of a distillation: any SAM or SAM 2 vision encoder of transformers, from a folder."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv
from transformers import AutoConfig, AutoModel
from transformers.image_utils import SizeDict

from ..errors import CheckpointError, ConfigurationError
from ..hub.records import sha256, weights_digest
from ..models.image_processing_pil_rs4d import fitted_size

logger = logging.getLogger(__name__)

Precision = Literal["float32", "bfloat16", "float16"]
SYMMETRIES = 8  # of the square: mirrored or not, times four quarter turns


@dataclasses.dataclass(frozen=True)
class TeacherInput:
    """How the teacher wants its pixels: of a side in pixels, `(x * rescale_factor - mean) / std`, padded with zeros."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float

    def __call__(self, view: torch.Tensor) -> torch.Tensor:
        """A `whole_view` or crop, uint8 `(3, height, width)`, to float32 `(3, size, size)`."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        pixels = (view.float() * self.rescale_factor - mean) / std
        height, width = pixels.shape[-2:]
        return torch.nn.functional.pad(pixels, (0, self.size - width, 0, self.size - height))

    def normalizes_like(self, processor: Any) -> bool:
        """Whether an image processor of ours gives the same values."""
        ours = (tuple(processor.image_mean), tuple(processor.image_std), processor.rescale_factor)
        return ours == (self.mean, self.std, self.rescale_factor)


def whole_view(image: torch.Tensor, size: int, symmetry: int = 0) -> torch.Tensor:
    """A whole image as SAM's and RS4D's processors fit it: the longer side becomes `size`, bilinear with antialiasing.

    Args:
        image: uint8 `(channels, height, width)`.
        size: Side of the square it must fit into, pixels; padding is left to the normalisation.
        symmetry: 0 to 7: mirrored from 4 on, and so many quarter turns counter-clockwise. Images are turned before they
            are fitted, since a transformer's map of a turned image is not the turned map.
    """
    image = torch.rot90(image.flip(-1) if symmetry >= 4 else image, symmetry % 4, (-2, -1))
    target = fitted_size(image.shape[-2], image.shape[-1], SizeDict(height=size, width=size))
    return tv.resize(image, list(target), InterpolationMode.BILINEAR, antialias=True)


class Teacher:
    """A SAM or SAM 2 vision encoder: frozen, in eval mode, without gradients; weights are read when first needed.

    Its map is SAM's neck output, or the coarsest level of SAM 2's neck; both have a stride of 16 pixels.

    Args:
        folder: Folder with `config.json`, safetensors weights and `preprocessor_config.json`, of the whole model
            (`SamModel`, `Sam2Model`) or of its vision encoder alone.
        precision: What it computes in; its maps come back as float32.

    Raises:
        ConfigurationError: If the folder holds no such model, or lacks one of the files.
    """

    def __init__(self, folder: str | Path, precision: Precision = "float32") -> None:
        self.folder = Path(folder)
        self.precision = precision
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            processor = json.loads((self.folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"No teacher in '{folder}': give a folder with a SAM or SAM 2 model and its preprocessor_config.json. "
                f"({str(error).splitlines()[0]})"
            ) from error
        self._vision: Any = getattr(config, "vision_config", config)
        if self._vision.model_type not in ("sam_vision_model", "sam2_vision_model"):
            raise ConfigurationError(
                f"'{folder}' holds a '{config.model_type}' model: the teacher must be a SAM or SAM 2 vision encoder."
            )
        self._processor: dict[str, Any] = processor
        self._encoder: Any = None

    @property
    def _is_sam(self) -> bool:
        return self._vision.model_type == "sam_vision_model"

    @property
    def channels(self) -> int:
        """Channels of its map."""
        return self._vision.output_channels if self._is_sam else self._vision.fpn_hidden_size

    @property
    def image_size(self) -> int | None:
        """Side of the images it takes, pixels; None for SAM 2, which takes any multiple of 32."""
        return self._vision.image_size if self._is_sam else None

    def input_for(self, image_size: int) -> TeacherInput:
        """How images of this side are prepared for it, with the statistics of its own processor.

        Raises:
            ConfigurationError: If the teacher takes no images of this size.
        """
        if self.image_size not in (None, image_size):
            raise ConfigurationError(
                f"The teacher takes images of {self.image_size} px only, image_size is {image_size}: set image_size to "
                f"{self.image_size}."
            )
        if self.image_size is None and image_size % 32:
            raise ConfigurationError(f"SAM 2 takes images of a multiple of 32 px: image_size is {image_size}.")
        options = self._processor
        return TeacherInput(
            image_size, tuple(options["image_mean"]), tuple(options["image_std"]), options["rescale_factor"]
        )

    def fingerprint(self) -> dict[str, Any]:
        """SHA-256 of its weights and its configuration."""
        return {"weights": weights_digest(self.folder), "config": sha256(self.folder / "config.json")}

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images from `input_for`, `(batch, 3, size, size)`, to float32 maps `(batch, channels, size/16, size/16)`."""
        encoder = self._loaded(pixel_values.device)
        output = encoder(pixel_values.to(encoder.dtype))
        return (output.last_hidden_state if self._is_sam else output.fpn_hidden_states[-1]).float()

    def _loaded(self, device: torch.device) -> Any:
        if self._encoder is None:
            self._encoder = self._load().to(device)
        return self._encoder

    def _load(self) -> Any:
        try:
            model, info = AutoModel.from_pretrained(
                self.folder,
                dtype=getattr(torch, self.precision),
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"Cannot load the teacher '{self.folder}': {str(error).splitlines()[0]}") from error
        if info["missing_keys"]:
            first = sorted(info["missing_keys"])[0]
            raise CheckpointError(f"The teacher '{self.folder}' lacks {len(info['missing_keys'])} weights ({first}).")
        encoder = getattr(model, "vision_encoder", model).eval().requires_grad_(False)
        logger.info(
            "Teacher: %s, %.1f M parameters, %s.", self.folder.name, encoder.num_parameters() / 1e6, self.precision
        )
        return encoder

    def __getstate__(self) -> dict[str, Any]:
        """Loader processes do not need the weights."""
        return {**self.__dict__, "_encoder": None}
