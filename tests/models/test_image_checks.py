"""Promises of the image checks, seen from the processors: each refusal names the argument to pass instead."""

import numpy as np
import pytest
import torch

from hf_rsheat.models.image_checks import ImageFormatError
from hf_rsheat.models.image_processing_pil_rs_vheat import RSVHeatImageProcessorPil
from hf_rsheat.models.image_processing_pil_vheat import VHeatImageProcessorPil
from hf_rsheat.models.image_processing_rs_vheat import RSVHeatImageProcessor
from hf_rsheat.models.image_processing_vheat import VHeatImageProcessor

RS_VHEAT = [RSVHeatImageProcessor, RSVHeatImageProcessorPil]
ALL = [VHeatImageProcessor, VHeatImageProcessorPil, *RS_VHEAT]


def picture(height: int = 60, width: int = 80, channels: int = 3) -> np.ndarray:
    """Random uint8 image (height, width, channels)."""
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def pixels(processor, images, **kwargs) -> torch.Tensor:
    return processor(images, return_tensors="pt", **kwargs).pixel_values


U8, U16, F32 = picture(), picture().astype(np.uint16) * 39, picture().astype(np.float32) / 255
NAN = F32.copy()
NAN[3, 4, 1] = np.nan
REFUSED = {
    "uint16 with the uint8 factor": (U16, {}, r"rescale_factor=1/10000.*1/65535"),
    "int16 with the uint8 factor": (U16.astype(np.int16), {"rescale_factor": 1 / 255}, r"rescale_factor=1/10000"),
    "float with a factor nobody chose": (F32, {}, r"do_rescale=False.*rescale_factor="),
    "uint8 with a 16-bit factor": (U8, {"rescale_factor": 1 / 10000}, r"rescale_factor=1/255"),
    "0-1 values with a 16-bit factor": (F32, {"rescale_factor": 1 / 10000}, r"do_rescale=False"),
    "uint8 without rescaling": (U8, {"do_rescale": False}, r"value_range=\(0, 1\).*rescale_factor"),
    "uint16 without rescaling": (U16, {"do_rescale": False}, r"value_range"),
    "16-bit scene of another scale": (U16 * 2, {"rescale_factor": 1 / 10000}, r"value_range=None"),
    "dB": (F32 * 40 - 30, {"do_rescale": False}, r"dB.*value_range=\(lowest, highest\)"),
    "nodata": (np.where(F32 > 0.5, F32, -9999), {"do_rescale": False}, r"-9999"),
    "NaN": (NAN, {"do_rescale": False}, r"NaN.*fill"),
    "infinity": (np.where(F32 > 0.5, F32, np.inf), {"do_rescale": False, "value_range": None}, r"infinite.*fill"),
    "too many bands": (picture(channels=13), {}, r"image_mean and image_std with one value per band.*num_channels"),
    "two axes for three channels": (U8[..., 0], {}, r"3 channels"),
    "ambiguous layout": (picture(3, 40), {}, r"input_data_format"),
    "wrong stated layout": (U8, {"input_data_format": "channels_first"}, r"channels_first"),
    "unknown layout": (U8, {"input_data_format": "hwc"}, r"channels_first, channels_last"),
    "no pixels": (np.zeros((0, 5, 3), np.uint8), {}, r"no pixels"),
    "boolean": (U8 > 9, {}, r"convert to uint8"),
    "complex": (torch.zeros(3, 8, 8, dtype=torch.complex64), {}, r"convert to uint8"),
    "one axis": (np.zeros(5, np.uint8), {}, r"\(height, width\)"),
    "empty list": ([], {}, r"no image"),
    "path": ("scene.tif", {}, r"PIL.Image.open.*rasterio"),
    "negative factor": (U8, {"rescale_factor": -1.0}, r"positive"),
    "reversed value range": (U8, {"value_range": [1.0, 0.0]}, r"lowest, highest"),
    "mixed sizes without resizing": (
        [U8, picture(40, 40)],
        {"do_resize": False, "do_center_crop": False},
        r"different sizes.*do_resize=True",
    ),
    "crop larger than the image": (
        U8,
        {"do_resize": False, "do_center_crop": True, "crop_size": 224},
        r"do_center_crop=False",
    ),
    "unsupported size": (U8, {"size": {"longest_edge": 64}, "do_center_crop": False}, r"shortest_edge"),
    "channels-last output": (U8, {"data_format": "channels_last"}, r"channels_first"),
    "17 bands": (picture(channels=17), {"image_mean": [0.0] * 17, "image_std": [1.0] * 17}, r"1 to 16 bands"),
    "scalar statistics": (U8, {"image_mean": 0.5, "image_std": 0.25}, r"one value per channel"),
    "unequal statistics": (U8, {"image_mean": [0.5] * 3, "image_std": [0.5]}, r"one of each per channel"),
    "zero std": (U8, {"image_mean": [0.5] * 3, "image_std": [0.5, 0, 0.5]}, r"positive"),
}


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("case", REFUSED)
def test_what_would_give_wrong_values_is_refused_with_the_way_out(cls, case):
    images, options, message = REFUSED[case]
    if cls in RS_VHEAT:
        message = message.replace("num_channels", "that many channels")
    with pytest.raises(ImageFormatError, match=f"(?s){message}"):
        pixels(cls(size=32), images, **options)


@pytest.mark.parametrize("cls", ALL)
def test_a_refusal_says_which_image_of_the_batch(cls):
    with pytest.raises(ImageFormatError, match="image 1 of 2"):
        pixels(cls(size=32), [U8, U16])


@pytest.mark.parametrize("cls", ALL)
def test_ambiguous_layout_is_accepted_once_stated(cls):
    image, processor = picture(3, 40), cls(size=32)
    last = pixels(processor, image.transpose(2, 1, 0), input_data_format="channels_first")
    assert torch.equal(pixels(processor, image.transpose(1, 0, 2), input_data_format="channels_last"), last)


@pytest.mark.parametrize("cls", ALL)
def test_a_stated_value_range_lets_decibels_through(cls):
    options = {"do_rescale": False, "value_range": (-50, 20), "image_mean": [-12] * 3, "image_std": np.full(3, 5)}
    values = pixels(cls(size=32), F32 * 40 - 30, **options)
    assert -5 < values.mean() < 5


@pytest.mark.parametrize("cls", ALL)
def test_values_a_rounding_error_outside_the_range_pass(cls):
    pixels(cls(size=32), F32 * 0 + 1.0005, do_rescale=False)


@pytest.mark.parametrize("cls", ALL)
def test_a_factor_saved_with_the_processor_counts_as_chosen(cls, tmp_path):
    cls(size=32, rescale_factor=1 / 10000).save_pretrained(tmp_path)
    processor = cls.from_pretrained(tmp_path)
    assert torch.equal(pixels(processor, U16), pixels(processor, U16.astype(np.float32)))
    with pytest.raises(ImageFormatError, match="1/255"):
        pixels(processor, U8)
