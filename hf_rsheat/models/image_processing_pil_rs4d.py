"""RS4D image processor on PIL, and the defaults its torchvision twin shares."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling, SizeDict

from .image_checks import ImageFormatError
from .image_processing_heat import HeatImageProcessor, HeatPilBackend, pad_to


class RS4DPreprocessing(HeatImageProcessor):
    """Fit an image into `size` keeping its aspect ratio, normalise, and pad at the bottom and right with zeros.

    Zero after normalisation is the mean colour. With the defaults: 1024 x 1024, bilinear, values / 255, ImageNet mean
    and std, RGB - the preprocessing of SAM's encoder, too, from which RS4D was distilled.

    Args:
        size: What the model sees: an int or `{"height", "width"}`.
        do_pad: False leaves the images at their fitted sizes, which can then differ.
        pad_size: Pad to this instead of `size`.
        do_resize, resample, do_rescale, rescale_factor, do_normalize, image_mean, image_std, do_convert_rgb,
            value_range: See `HeatImageProcessor`. Another number of bands takes `image_mean` and `image_std` of that
            length.
    """

    size = {"height": 1024, "width": 1024}  # noqa: RUF012 - transformers copies class defaults to the instance
    resample = PILImageResampling.BILINEAR
    do_center_crop = False
    do_pad = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD

    def _fit(self, image: torch.Tensor, **options: Any) -> torch.Tensor:
        if options["do_resize"]:
            height, width = fitted_size(image.shape[-2], image.shape[-1], options["size"])
            options["size"] = SizeDict(height=height, width=width)
        return super()._fit(image, **options)

    def _collate(self, images: list[torch.Tensor], fill: float, **options: Any) -> list[Any]:
        if options["do_pad"]:
            images = pad_to(images, options["pad_size"] or options["size"], fill)
        return super()._collate(images, fill, **{**options, "do_pad": False})

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Return the class index of each pixel, int64 `(height, width)`, one map per image; padding is cut off.

        Args:
            outputs: Model output with `logits` `(batch, classes, height, width)` for images padded to `size`.
            target_sizes: (height, width) of each original image; None keeps the size of the logits, padding included.

        Raises:
            ImageFormatError: Not one target size per image.
        """
        if target_sizes is None or not self.do_pad or len(target_sizes) != len(outputs.logits):
            return super().post_process_semantic_segmentation(outputs, target_sizes)
        size, maps = SizeDict(**dict(self.size)), []
        canvas = SizeDict(**dict(self.pad_size)) if self.pad_size else size
        for logits, (height, width) in zip(outputs.logits, target_sizes, strict=True):
            target = int(height), int(width)
            rows, columns = fitted_size(*target, size) if self.do_resize else target
            whole = _resized(logits[None].float(), (canvas.height, canvas.width))
            maps.append(_resized(whole[..., :rows, :columns], target)[0].argmax(dim=0))
        return maps


def _resized(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return nn.functional.interpolate(logits, size=size, mode="bilinear")


def fitted_size(height: int, width: int, size: SizeDict) -> tuple[int, int]:
    """The largest (height, width) inside `size` with the image's aspect ratio, rounded, at least one pixel.

    Raises:
        ImageFormatError: `size` does not give both height and width.
    """
    if not size.height or not size.width:
        raise ImageFormatError(f"size={dict(size)} is not supported: pass an int or {{'height': h, 'width': w}}")
    scale = min(size.height / height, size.width / width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


class RS4DImageProcessorPil(RS4DPreprocessing, HeatPilBackend):
    """`RS4DPreprocessing` with PIL; agrees with `RS4DImageProcessor` within resampling error."""


__all__ = ["RS4DImageProcessorPil"]
