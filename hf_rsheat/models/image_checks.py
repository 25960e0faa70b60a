"""Checks that stand between an image and a wrong tensor.

Satellite images come as 8-bit photographs, 16-bit reflectance, floats in any unit, with 1 to 16 bands in either layout.
Each function here either returns what its name says or raises `ImageFormatError` with the argument to pass instead;
nothing is guessed. Plain torch, NumPy and PIL; shared by the torchvision processors and their PIL twins.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch

UINT8_FACTOR = 1 / 255
MAX_CHANNELS = 16
# Above 8-bit data: a factor this small maps the whole uint8 range to less than 0.26.
SIXTEEN_BIT_FACTOR = 1 / 1000
# Share of the stated range by which rounding (float16, resampling before us) may leave it.
RANGE_TOLERANCE = 1e-3
# Modes whose samples are wider than 8 bits: PIL would clip or truncate them when converting to RGB or L.
WIDE_PIL_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
INTEGER_DTYPES = (torch.uint16, torch.int16, torch.uint32, torch.int32, torch.int64)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = ("channels_first", "channels_last")


class ImageFormatError(ValueError):
    """An image, or an argument that describes it, would give wrong pixel values; the message says what to pass."""


def flatten_images(images: Any) -> list[Any]:
    """Return a flat list of single images from an image, a batch array `(batch, ...)` or a nested list of those.

    Args:
        images: PIL image, array or tensor of 2, 3 or 4 dimensions, or a list of them (sizes may differ).

    Raises:
        ImageFormatError: nothing was passed, or something that is not an image.
    """
    if isinstance(images, PIL.Image.Image):
        return [images]
    if isinstance(images, np.ndarray | torch.Tensor):
        if images.ndim in (2, 3):
            return [images]
        if images.ndim == 4:
            return list(images)
        raise ImageFormatError(
            f"an array of shape {tuple(images.shape)} is not an image: pass (height, width), three axes with the "
            "channels first or last, or a batch of four axes"
        )
    if isinstance(images, list | tuple):
        flat = [single for item in images for single in flatten_images(item)]
        if not flat:
            raise ImageFormatError("no image was passed: the list is empty")
        return flat
    raise ImageFormatError(
        f"{type(images).__name__} is not an image: pass a PIL image, a NumPy array or a torch tensor. Open files first "
        "(PIL.Image.open for 8-bit pictures, rasterio or tifffile for multi-band rasters)"
    )


def check_statistics(image_mean: Any, image_std: Any) -> int:
    """Return the channel count that a pair of per-channel statistics stands for.

    Args:
        image_mean: one value per channel, in units of the rescaled pixel values.
        image_std: as many positive values.

    Raises:
        ImageFormatError: scalar, unequal, missing, non-positive or too many values.
    """
    if not isinstance(image_mean, Sequence) or not isinstance(image_std, Sequence):
        raise ImageFormatError(
            f"image_mean={image_mean!r} and image_std={image_std!r} must be lists with one value per channel: "
            "their length tells how many channels an image has (also with do_normalize=False)"
        )
    if len(image_mean) != len(image_std):
        raise ImageFormatError(
            f"image_mean has {len(image_mean)} values and image_std {len(image_std)}: pass one of each per channel"
        )
    if not 1 <= len(image_mean) <= MAX_CHANNELS:
        raise ImageFormatError(
            f"{len(image_mean)} channels are not supported: choose 1 to {MAX_CHANNELS} bands and pass that many values "
            "in image_mean and image_std"
        )
    if not all(math.isfinite(value) for value in image_mean) or not all(0 < value < math.inf for value in image_std):
        raise ImageFormatError(f"image_mean={image_mean} must be finite and image_std={image_std} finite and positive")
    return len(image_mean)


def _pil_to_array(image: PIL.Image.Image, channels: int, do_convert_rgb: bool) -> np.ndarray:
    target = {1: "L", 3: "RGB"}.get(channels)
    if do_convert_rgb and target and image.mode not in WIDE_PIL_MODES:
        image = image.convert(target)
    return np.array(image)


def image_to_tensor(image: Any, channels: int, do_convert_rgb: bool = True) -> torch.Tensor:
    """Return the samples of one image as a tensor of the image's own dtype, with two or three axes.

    Args:
        image: PIL image, NumPy array or tensor.
        channels: expected channel count. 8-bit PIL images are converted to RGB when it is 3 and to grey when it is 1.
        do_convert_rgb: False keeps a PIL image's own mode. 16-bit, 32-bit and float modes are never converted.

    Raises:
        ImageFormatError: unsupported dtype, or an image without pixels.
    """
    if isinstance(image, PIL.Image.Image):
        image = _pil_to_array(image, channels, do_convert_rgb)
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "uif" or image.dtype.itemsize > 8:
            raise ImageFormatError(_dtype_message(image.dtype))
        # torch takes neither foreign byte order, nor negative strides, nor read-only memory (without a warning).
        image = image.astype(image.dtype.newbyteorder("="), copy=not image.flags.writeable)
        image = torch.from_numpy(np.ascontiguousarray(image))
    image = image.detach()
    if image.dtype not in (torch.uint8, *INTEGER_DTYPES, *FLOAT_DTYPES):
        raise ImageFormatError(_dtype_message(image.dtype))
    if image.numel() == 0:
        raise ImageFormatError(f"an image of shape {tuple(image.shape)} has no pixels")
    return image


def _dtype_message(dtype: Any) -> str:
    return f"images of dtype {dtype} are not supported: convert to uint8, uint16, int16, int32, or float16/32/64"


def to_channels_first(
    image: torch.Tensor, channels: int, input_data_format: Any = None, channel_hint: str = ""
) -> torch.Tensor:
    """Return the image as `(channels, height, width)`; the layout is taken from the only axis that fits `channels`.

    Args:
        image: two axes (one channel) or three, channels first or last.
        channels: expected channel count.
        input_data_format: "channels_first" or "channels_last"; needed only when both axes fit.
        channel_hint: what to do about a wrong channel count, for the message.

    Raises:
        ImageFormatError: the layout is ambiguous or unknown, or the channel count does not fit.
    """
    layout = getattr(input_data_format, "value", input_data_format)
    if layout not in (None, *LAYOUTS):
        raise ImageFormatError(f"input_data_format={layout!r} is unknown: pass one of {', '.join(LAYOUTS)}")
    shape = tuple(image.shape)
    if image.ndim == 2:
        image, layout = image[None], "channels_first"
    first, last = image.shape[0] == channels, image.shape[2] == channels
    if layout is None and first and last:
        raise ImageFormatError(
            f"an image of shape {shape} could hold its {channels} channels first or last: pass "
            'input_data_format="channels_first" or "channels_last"'
        )
    fits = {"channels_first": first, "channels_last": last, None: first or last}[layout]
    if not fits:
        stated = f" ({layout})" if layout and len(shape) == 3 else ""
        raise ImageFormatError(
            f"an image of shape {shape}{stated} does not have the {channels} channels of image_mean. {channel_hint}"
        )
    return image if (first and layout != "channels_last") else image.permute(2, 0, 1)


def check_rescaling(dtype: torch.dtype, do_rescale: bool, rescale_factor: float, explicit: bool) -> float:
    """Return the factor that brings stored values to pixel values (1 without rescaling), if it fits the dtype.

    Args:
        dtype: dtype of the stored values.
        do_rescale: whether to rescale at all.
        rescale_factor: factor to multiply with.
        explicit: whether somebody chose that factor (for this call, or saved one other than 1/255).

    Raises:
        ImageFormatError: the factor belongs to another dtype, is not positive, or nobody chose it for floats.
    """
    if not do_rescale:
        return 1.0
    if not 0 < rescale_factor < math.inf:
        raise ImageFormatError(f"rescale_factor={rescale_factor} must be positive: pass do_rescale=False for none")
    is_uint8_factor = math.isclose(rescale_factor, UINT8_FACTOR, rel_tol=1e-3)
    if dtype in INTEGER_DTYPES and is_uint8_factor:
        raise ImageFormatError(
            f"{_name(dtype)} image with the uint8 factor 1/255: pass rescale_factor=1/10000 for reflectance x10000 or "
            "rescale_factor=1/65535 for full-range 16 bit (convert to uint8 if the values really are 0-255)"
        )
    if dtype == torch.uint8 and rescale_factor <= SIXTEEN_BIT_FACTOR:
        raise ImageFormatError(
            f"uint8 image with rescale_factor={rescale_factor:.6g}, a factor for 16-bit values: pass "
            "rescale_factor=1/255 (convert to float32 first if you do mean this factor)"
        )
    if dtype in FLOAT_DTYPES and not explicit:
        raise ImageFormatError(
            f"{_name(dtype)} image with the default rescale_factor 1/255: floats do not tell their scale. Pass "
            "do_rescale=False if the values are 0-1 already, or rescale_factor=... with the call (1/255 for 0-255, "
            "1/10000 for reflectance x10000)"
        )
    return rescale_factor


def check_values(image: torch.Tensor, factor: float, value_range: Sequence[float] | None) -> None:
    """Check that stored values times `factor` are finite and inside `value_range`.

    Args:
        image: stored values, uint8 or floating point, any shape.
        factor: what they will be multiplied with.
        value_range: (lowest, highest) pixel value, with a tolerance of 0.1 % of the span; None: any finite value.

    Raises:
        ImageFormatError: nodata, a value outside the range, or a factor that was applied already.
    """
    if image.is_floating_point() and not torch.isfinite(image).all():
        raise ImageFormatError(
            "the image holds NaN or infinite values (nodata?): fill them first, e.g. with the band's mean"
        )
    low, high = (float(value) for value in image.aminmax())
    if factor <= SIXTEEN_BIT_FACTOR and 0 < high <= 1 and low >= 0 and image.is_floating_point():
        raise ImageFormatError(
            f"the stored values end at {high:.4g} and rescale_factor={factor:.6g} would turn them all into almost 0: "
            "they look rescaled already, pass do_rescale=False"
        )
    if value_range is None:
        return
    if len(value_range) != 2 or not value_range[0] < value_range[1]:
        raise ImageFormatError(f"value_range={value_range} must be (lowest, highest), or None for no check")
    tolerance = RANGE_TOLERANCE * (value_range[1] - value_range[0])
    if low * factor < value_range[0] - tolerance or high * factor > value_range[1] + tolerance:
        raise ImageFormatError(
            f"values run from {low * factor:.4g} to {high * factor:.4g} (stored {low:.4g} to {high:.4g}, times "
            f"{factor:.6g}), outside value_range=({value_range[0]:g}, {value_range[1]:g}). Pass the do_rescale and "
            "rescale_factor that bring them into it (1/255 for 8 bit, 1/10000 for reflectance x10000); fill or clip "
            "nodata such as -9999. If they are right as they are (dB, clouds above 1), pass value_range=(lowest, "
            "highest) with image_mean and image_std in the same unit; value_range=None switches this check off"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
