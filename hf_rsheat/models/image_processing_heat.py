"""Preprocessing shared by the vHeat and RS-vHeat image processors and their PIL twins.

An image goes through: tensor `(channels, height, width)` -> checks -> rescaling of everything but uint8 -> resize ->
centre crop -> rescaling of uint8 -> normalisation. Only the resize differs between the twins. 16-bit and float images
are rescaled first because neither torchvision nor PIL resizes uint16 bands; uint8 stays uint8 during the resize, with
rounding, as in the pipelines the published weights were trained with.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import nn
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from .image_checks import (
    UINT8_FACTOR,
    ImageFormatError,
    check_rescaling,
    check_statistics,
    check_values,
    flatten_images,
    image_to_tensor,
    to_channels_first,
)

IGNORED_LABEL = 255  # what the segmentation heads of transformers leave out of the loss by default
FLOAT_OPTIONS = ("image_mean", "image_std", "rescale_factor", "value_range", "crop_pct")


class HeatImageProcessorKwargs(ImagesKwargs, total=False):
    """Options of every processor here, beyond the usual ones of transformers.

    Attributes:
        value_range: (lowest, highest) pixel value allowed after rescaling and before normalisation; None: no check.
    """

    value_range: list[float] | tuple[float, ...] | None


def plain_floats(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with NumPy scalars, arrays, tensors and ints of statistics and factors as Python floats."""

    def convert(value: Any) -> Any:
        if value is None or isinstance(value, float | str):
            return value
        if isinstance(value, np.ndarray | torch.Tensor):
            value = value.tolist()
        return [float(item) for item in value] if isinstance(value, Sequence) else float(value)

    return {name: convert(value) if name in FLOAT_OPTIONS else value for name, value in options.items()}


def resize_target(height: int, width: int, size: SizeDict, crop_pct: float | None) -> tuple[int, int]:
    """Return the (height, width) to resize an image of the given height and width to.

    Args:
        height, width: size of the image in pixels.
        size: `height` and `width`, or `shortest_edge`.
        crop_pct: share of the resized image that the crop after it keeps, 0 to 1: the image is resized, keeping its
            aspect ratio, to cover `size / crop_pct`. None: no crop follows, `size` is reached exactly.

    Raises:
        ImageFormatError: `size` has another form or `crop_pct` is out of range.
    """
    box_height, box_width = _box(size)
    if crop_pct is None and size.height:
        return box_height, box_width
    if crop_pct is not None:
        if not 0 < crop_pct <= 1:
            raise ImageFormatError(f"crop_pct={crop_pct} must be above 0 and at most 1")
        box_height, box_width = int(box_height / crop_pct), int(box_width / crop_pct)
    if height * box_width <= width * box_height:
        return box_height, int(box_height * width / height)
    return int(box_width * height / width), box_width


def _box(size: SizeDict) -> tuple[int, int]:
    if size.height and size.width:
        return size.height, size.width
    if size.shortest_edge and not size.longest_edge:
        return size.shortest_edge, size.shortest_edge
    raise ImageFormatError(
        f"size={dict(size)} is not supported: pass an int, {{'height': h, 'width': w}} or {{'shortest_edge': s}}"
    )


def center_crop(image: torch.Tensor, size: SizeDict) -> torch.Tensor:
    """Return the centre of `(channels, height, width)`; an image that is too small is refused, never padded."""
    (height, width), (crop_height, crop_width) = image.shape[-2:], _box(size)
    if height < crop_height or width < crop_width:
        raise ImageFormatError(
            f"an image of {height}x{width} is smaller than the centre crop {crop_height}x{crop_width}: pass "
            "do_resize=True with a size that covers the crop, a smaller crop_size, or do_center_crop=False"
        )
    # Rounding half to even, as torchvision's CenterCrop does in the evaluation code of the original.
    top, left = round((height - crop_height) / 2), round((width - crop_width) / 2)
    return image[:, top : top + crop_height, left : left + crop_width]


def pad_to(images: list[torch.Tensor], size: SizeDict | None, value: float) -> list[torch.Tensor]:
    """Pad `(channels, height, width)` images at the bottom and right to `size` (None: the largest of the batch)."""
    height, width = _box(size) if size else (max(image.shape[axis] for image in images) for axis in (-2, -1))
    for image in images:
        if image.shape[-2] > height or image.shape[-1] > width:
            raise ImageFormatError(f"an image of {tuple(image.shape[-2:])} does not fit pad_size=({height}, {width})")
    return [
        nn.functional.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]), value=value)
        for image in images
    ]


class HeatImageProcessor(BaseImageProcessor):
    """What the processors have in common; a backend beside it brings `resize`, a subclass the defaults.

    Images: PIL, NumPy or torch, single or lists of different sizes; uint8, uint16, int16, int32, float16/32/64; 1 to 16
    channels, first or last (told apart by the length of `image_mean`). Output: `pixel_values`, float32
    `(batch, channels, height, width)`, normalised.

    What would silently give wrong values raises `ImageFormatError` (a `ValueError`) that names the argument to pass.
    """

    valid_kwargs = HeatImageProcessorKwargs

    resample = PILImageResampling.BICUBIC
    do_resize = True
    do_rescale = True
    rescale_factor = UINT8_FACTOR
    do_normalize = True
    do_convert_rgb = True
    value_range = (0.0, 1.0)
    channel_hint = (
        "Pass image_mean and image_std with one value per band (and give the model that num_channels), "
        "choose the bands, or pass input_data_format"
    )

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**plain_floats(kwargs))
        self.check_defaults()

    def check_defaults(self) -> None:
        """Refuse statistics that cannot belong together as soon as the processor is built."""
        check_statistics(self.image_mean, self.image_std)

    def preprocess(self, images: Any, segmentation_maps: Any = None, *annotations: Any, **kwargs: Any) -> BatchFeature:
        """Turn images into model input.

        Args:
            images: one image, a batch array or a list; see the class.
            segmentation_maps: class indices `(height, width)`, one per image, of the same sizes as the images; resized
                with the nearest neighbour and cropped alike, returned as int64 `labels` `(batch, height, width)`.
            annotations: whatever else a subclass takes to go with the images.
            kwargs: any option of the processor, for this call only.

        Returns:
            `pixel_values` float32 `(batch, channels, height, width)` with `return_tensors="pt"`, else a list.

        Raises:
            ImageFormatError: see the class.
        """
        # A saved 1/255 is the uint8 convention; any other factor was somebody's choice for their data.
        explicit = kwargs.get("rescale_factor") is not None or self.rescale_factor != UINT8_FACTOR
        return super().preprocess(images, segmentation_maps, explicit, *annotations, **plain_floats(kwargs))

    def _validate_preprocess_kwargs(self, crop_size: Any = None, size: Any = None, **kwargs: Any) -> None:
        # Without crop_size the crop is `size`, which the base class does not know.
        super()._validate_preprocess_kwargs(crop_size=crop_size or size, size=size, **kwargs)

    def _preprocess_image_like_inputs(
        self, images: Any, segmentation_maps: Any, factor_is_explicit: bool, *annotations: Any, **options: Any
    ) -> BatchFeature:
        data_format = options.get("data_format")
        if getattr(data_format, "value", data_format) not in (None, "channels_first"):
            raise ImageFormatError(f"data_format={data_format!r}: the models take channels_first only")
        flat = flatten_images(images)
        tensors = [
            _at(index, len(flat), self.process_image, image, factor_is_explicit=factor_is_explicit, **options)
            for index, image in enumerate(flat)
        ]
        pixel_values = [
            self._normalized(_at(index, len(flat), self._fit, tensor, **options), **options)
            for index, tensor in enumerate(tensors)
        ]
        data = {"pixel_values": self._collate(pixel_values, 0, **options)}
        if segmentation_maps is not None:
            maps = self._label_maps(segmentation_maps, tensors, **options)
            data["labels"] = [label[0] for label in self._collate(maps, IGNORED_LABEL, **options)]
        batch = BatchFeature(data=data, tensor_type=options["return_tensors"])
        return self._annotate(batch, tensors, *annotations, **options) if annotations else batch

    def _annotate(self, batch: BatchFeature, images: list[torch.Tensor], *annotations: Any, **options: Any) -> Any:
        raise ImageFormatError(f"{type(self).__name__} takes no annotations beside images and segmentation_maps")

    def process_image(self, image: Any, factor_is_explicit: bool = False, **options: Any) -> torch.Tensor:
        """Return one checked image as `(channels, height, width)`: uint8 as stored, all else float32 and rescaled."""
        channels = check_statistics(options["image_mean"], options["image_std"])
        tensor = image_to_tensor(image, channels, bool(options["do_convert_rgb"]))
        tensor = to_channels_first(tensor, channels, options["input_data_format"], self.channel_hint)
        factor = check_rescaling(tensor.dtype, options["do_rescale"], options["rescale_factor"], factor_is_explicit)
        if tensor.dtype != torch.uint8:
            tensor = tensor.to(torch.float32)
        check_values(tensor, factor, options["value_range"])
        if tensor.dtype != torch.uint8:
            tensor = tensor * factor
        if self.backend == "torchvision" and options["device"] is not None:
            tensor = tensor.to(options["device"])
        return tensor.contiguous()

    def _fit(self, image: torch.Tensor, **options: Any) -> torch.Tensor:
        size, crop_size, cropped = options["size"], options["crop_size"], options["do_center_crop"]
        if options["do_resize"]:
            margin = options.get("crop_pct") if cropped and crop_size is None else None
            height, width = resize_target(image.shape[-2], image.shape[-1], size, margin)
            image = self.resize(image, SizeDict(height=height, width=width), resample=options["resample"])
        return center_crop(image, crop_size or size) if cropped else image

    def _normalized(self, image: torch.Tensor, **options: Any) -> torch.Tensor:
        if image.dtype == torch.uint8:
            image = image.to(torch.float32).mul_(options["rescale_factor"] if options["do_rescale"] else 1.0)
        if not options["do_normalize"]:
            return image
        mean, std = (
            torch.tensor(options[name], dtype=torch.float32, device=image.device)[:, None, None]
            for name in ("image_mean", "image_std")
        )
        return (image - mean).div_(std)  # in place: new memory costs more than the arithmetic

    def _collate(self, images: list[torch.Tensor], fill: float, **options: Any) -> list[Any]:
        if options["do_pad"]:
            images = pad_to(images, options["pad_size"], fill)
        sizes = sorted({tuple(image.shape[-2:]) for image in images})
        if options["return_tensors"] is not None and len(sizes) > 1:
            raise ImageFormatError(
                f"images of different sizes {sizes[:4]} cannot form one tensor: pass do_resize=True with a fixed "
                "height and width, do_pad=True, or return_tensors=None for a list"
            )
        as_arrays = self.backend == "pil" and options["return_tensors"] is None
        return [image.numpy() if as_arrays else image for image in images]

    def _label_maps(self, segmentation_maps: Any, images: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
        # A (batch, height, width) array is a batch here, where flatten_images would see one image of many bands.
        is_batch = getattr(segmentation_maps, "ndim", 0) == 3 and len(segmentation_maps) == len(images)
        maps = list(segmentation_maps) if is_batch else flatten_images(segmentation_maps)
        if len(maps) != len(images):
            raise ImageFormatError(f"{len(maps)} segmentation maps for {len(images)} images: pass one for each")
        options = {**options, "resample": PILImageResampling.NEAREST}
        labels = []
        for index, (item, image) in enumerate(zip(maps, images, strict=True)):
            label = _at(index, len(maps), label_map, item, image.shape[-2:])
            labels.append(self._fit(label.to(image.device), **options).to(torch.int64))
        return labels

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Return the class index of each pixel, int64 `(height, width)`, one map per image.

        The logits are stretched to the target size, so they must show the whole image: preprocess with
        `do_center_crop=False`.

        Args:
            outputs: model output with `logits` `(batch, classes, height, width)`.
            target_sizes: (height, width) of each original image; None keeps the size of the logits.

        Raises:
            ImageFormatError: not one target size per image.
        """
        logits = outputs.logits
        if target_sizes is None:
            return list(logits.argmax(dim=1))
        if len(target_sizes) != len(logits):
            raise ImageFormatError(f"{len(target_sizes)} target_sizes for {len(logits)} images: pass one for each")
        sizes = [(int(height), int(width)) for height, width in target_sizes]
        return [
            nn.functional.interpolate(image[None].float(), size=size, mode="bilinear")[0].argmax(dim=0)
            for image, size in zip(logits, sizes, strict=True)
        ]


class HeatPilBackend(HeatImageProcessor, PilBackend):
    """PIL resize of any number of bands, one by one; needs no torchvision."""

    def resize(self, image: torch.Tensor, size: SizeDict, resample: Any = None, **kwargs: Any) -> torch.Tensor:
        """Resize `(channels, height, width)`; each band in PIL's mode L (uint8), F (float32) or I (int32)."""
        height, width = _box(size)
        bands = [PIL.Image.fromarray(band).resize((width, height), resample) for band in image.cpu().numpy()]
        return torch.from_numpy(np.stack([np.array(band) for band in bands]))


def label_map(label: Any, size: Sequence[int]) -> torch.Tensor:
    """Return a map of class indices as int32 `(1, height, width)`.

    Raises:
        ImageFormatError: not integer, or not of the image's (height, width).
    """
    tensor = image_to_tensor(label, channels=1, do_convert_rgb=False)
    if tensor.is_floating_point():
        raise ImageFormatError("a segmentation map holds class indices: convert it to an integer dtype")
    tensor = tensor if tensor.ndim == 2 else to_channels_first(tensor, 1, channel_hint="A map has one channel.")[0]
    if tuple(tensor.shape) != tuple(size):
        raise ImageFormatError(f"a segmentation map of {tuple(tensor.shape)} does not fit its image of {tuple(size)}")
    return tensor.to(torch.int32)[None]


def _at(index: int, count: int, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function and, in a batch, say in its error which image it was."""
    try:
        return function(*args, **kwargs)
    except ImageFormatError as error:
        if count == 1:
            raise
        raise ImageFormatError(f"image {index} of {count}: {error}") from error
