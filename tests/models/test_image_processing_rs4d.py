"""RS4D's image processors fit, normalise and pad as the original does, on torchvision and on PIL."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.modeling_outputs import SemanticSegmenterOutput

from hf_rsheat import RS4DImageProcessor, RS4DImageProcessorPil
from hf_rsheat.models.image_checks import ImageFormatError

BOTH = pytest.mark.parametrize("processor_class", [RS4DImageProcessor, RS4DImageProcessorPil])
MEAN, STD = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])  # the original's, for 0 to 255


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@BOTH
def test_an_image_of_the_right_size_is_normalised_as_the_original_does(processor_class):
    image = picture(64, 64)
    pixel_values = processor_class(size=64)(image, return_tensors="pt")["pixel_values"]
    expected = torch.from_numpy((np.array(image) - MEAN) / STD).permute(2, 0, 1).float()
    torch.testing.assert_close(pixel_values[0], expected, atol=2e-6, rtol=0)


@BOTH
@pytest.mark.parametrize(
    ("size", "fitted"),
    [((50, 100), (32, 64)), ((100, 50), (64, 32)), ((33, 64), (33, 64)), ((20, 30), (43, 64)), ((5, 900), (1, 64))],
)
def test_images_are_fitted_and_padded_with_the_mean_colour(processor_class, size, fitted):
    pixel_values = processor_class(size={"height": 64, "width": 64})(picture(*size), return_tensors="pt")[
        "pixel_values"
    ]
    assert pixel_values.shape == (1, 3, 64, 64)
    rows, columns = fitted
    assert pixel_values[0, :, rows:].eq(0).all()
    assert pixel_values[0, :, :, columns:].eq(0).all()
    assert pixel_values[0, :, rows - 1, :columns].ne(0).any()
    assert pixel_values[0, :, :rows, columns - 1].ne(0).any()


def test_both_backends_agree_within_resampling_error():
    a, b = (
        processor(size=64)(picture(90, 120), return_tensors="pt")["pixel_values"]
        for processor in (RS4DImageProcessor, RS4DImageProcessorPil)
    )
    assert (a - b).abs().max() < 2 / 255 / 0.224


@BOTH
def test_label_maps_are_fitted_alike_and_padded_with_the_ignored_label(processor_class):
    labels = np.zeros((50, 100), dtype=np.uint8)
    labels[:, 50:] = 1
    batch = processor_class(size=64)([picture(50, 100)], segmentation_maps=[labels], return_tensors="pt")
    assert batch["labels"].shape == (1, 64, 64)
    assert batch["labels"][0, :32].unique().tolist() == [0, 1]
    assert batch["labels"][0, 32:].unique().tolist() == [255]


def test_segmentations_come_back_without_the_padding():
    logits = torch.zeros(1, 2, 4, 4)
    logits[0, 0] = 2.5
    logits[0, 1, :2, 2:] = 5.0  # right half of the image, whose lower half is padding
    logits[0, 1, 2:] = 5.0
    (segmentation,) = RS4DImageProcessor(size=64).post_process_semantic_segmentation(
        SemanticSegmenterOutput(logits=logits), target_sizes=[(50, 100)]
    )
    assert segmentation.shape == (50, 100)
    assert segmentation[:30, :40].eq(0).all()
    assert segmentation[:, 60:].eq(1).all()


@BOTH
def test_ways_to_go_wrong_are_refused(processor_class):
    with pytest.raises(ImageFormatError, match="height"):
        processor_class(size={"shortest_edge": 64})(picture(50, 100))
    with pytest.raises(ImageFormatError, match="does not fit"):
        processor_class(size=32)(picture(50, 100), do_resize=False)
    sizes = processor_class(size=64)([picture(50, 100), picture(100, 50)], do_pad=False)["pixel_values"]
    assert [tuple(image.shape[-2:]) for image in sizes] == [(32, 64), (64, 32)]
