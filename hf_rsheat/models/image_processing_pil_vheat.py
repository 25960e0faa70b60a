"""vHeat image processor on PIL, and the defaults its torchvision twin shares."""

from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .image_processing_heat import HeatImageProcessor, HeatImageProcessorKwargs, HeatPilBackend


class VHeatImageProcessorKwargs(HeatImageProcessorKwargs, total=False):
    """Options of the vHeat processors.

    Attributes:
        crop_pct: share of the resized image kept by the centre crop, 0 to 1.
    """

    crop_pct: float


class VHeatPreprocessing(HeatImageProcessor):
    """The evaluation preprocessing of vHeat: shorter side to `int(size / crop_pct)` bicubic, centre crop to `size`.

    With the defaults: 256, 224, values / 255, ImageNet mean and std, RGB.

    Args:
        size: what the model sees: an int, `{"height", "width"}`, or `{"shortest_edge"}`.
        crop_pct: see above; 224/256. Used only while `crop_size` is None.
        crop_size: given, `size` is reached exactly and then cropped to this, as in other processors of transformers.
        do_center_crop: False resizes to `size` without a margin: use it for segmentation and detection.
        do_resize, resample, do_rescale, rescale_factor, do_normalize, image_mean, image_std, do_convert_rgb,
            value_range: see `HeatImageProcessor`. Another number of bands takes `image_mean` and `image_std` of that
            length.
    """

    valid_kwargs = VHeatImageProcessorKwargs

    size = {"height": 224, "width": 224}  # noqa: RUF012 - transformers copies class defaults to the instance
    crop_pct = 224 / 256
    do_center_crop = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD


class VHeatImageProcessorPil(VHeatPreprocessing, HeatPilBackend):
    """`VHeatPreprocessing` with PIL; agrees with `VHeatImageProcessor` within resampling error."""


__all__ = ["VHeatImageProcessorPil"]
