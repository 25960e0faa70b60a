"""RS-vHeat image processor on PIL, and the defaults its torchvision twin shares."""

from typing import Any

from transformers.image_processing_base import BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .image_checks import ImageFormatError, check_statistics
from .image_processing_heat import HeatImageProcessor, HeatImageProcessorKwargs, HeatPilBackend, plain_floats

MODALITY_OPTIONS = ("image_mean", "image_std", "do_rescale", "rescale_factor", "value_range")


class RSVHeatImageProcessorKwargs(HeatImageProcessorKwargs, total=False):
    """Options of the RS-vHeat processors.

    Attributes:
        modality: name of the sensor the images come from.
        modalities: name -> options of that sensor; `image_mean` and `image_std` are required, `do_rescale`,
            `rescale_factor` and `value_range` optional.
    """

    modality: str | None
    modalities: dict[str, dict] | None


class RSVHeatPreprocessing(HeatImageProcessor):
    """The preprocessing of RS-vHeat, in training and evaluation alike: resize to `size` bicubic, no crop.

    Optical images use the ImageNet statistics. The statistics for SAR were never published: mean 0.5 and std 0.25 on
    values 0 to 1 are **ours**; weights trained elsewhere may have used others.

    Args:
        size: what the model sees: an int (a square), `{"height", "width"}`, or `{"shortest_edge"}`.
        modality: sensor assumed by a call that names none; None takes the first of `modalities`.
        modalities: name -> `image_mean`, `image_std` (one value per channel) and, where a sensor needs its own,
            `do_rescale`, `rescale_factor`, `value_range`. Another sensor is another entry, e.g.
            `"msi": {"image_mean": [...], "image_std": [...], "rescale_factor": 1 / 10000}`.
        do_resize, resample, do_center_crop, crop_size, do_rescale, rescale_factor, do_normalize, do_convert_rgb,
            value_range: see `HeatImageProcessor`.

    A call takes `modality=` and any option of one sensor, such as `image_mean=`; the call wins over the entry, the
    entry over the processor.
    """

    valid_kwargs = RSVHeatImageProcessorKwargs

    size = {"height": 224, "width": 224}  # noqa: RUF012 - transformers copies class defaults to the instance
    do_center_crop = False
    modality = None
    modalities = {  # noqa: RUF012 - as above
        "optical": {"image_mean": list(IMAGENET_DEFAULT_MEAN), "image_std": list(IMAGENET_DEFAULT_STD)},
        "sar": {"image_mean": [0.5], "image_std": [0.25]},
    }
    channel_hint = (
        'Pass modality= if the images come from another sensor (e.g. modality="sar"); or give that sensor image_mean '
        "and image_std with one value per band in modalities= (and the model that many channels), choose the bands, or "
        "pass input_data_format"
    )

    def check_defaults(self) -> None:
        """Refuse incomplete modalities, and statistics that would belong to none of them."""
        if self.image_mean is not None or self.image_std is not None:
            raise ImageFormatError(
                "RS-vHeat keeps statistics per sensor: pass modalities={'optical': {'image_mean': [...], "
                "'image_std': [...]}} instead of image_mean and image_std"
            )
        if not self.modalities:
            raise ImageFormatError("modalities is empty: name at least one sensor with image_mean and image_std")
        self.modalities = {name: modality_options(self.modalities, name) for name in self.modalities}
        # Resolved now, because the saved file sorts its keys and would change which one comes first.
        self.modality = self.modality or next(iter(self.modalities))
        modality_options(self.modalities, self.modality)

    def preprocess(self, images: Any, segmentation_maps: Any = None, **kwargs: Any) -> BatchFeature:
        """As in `HeatImageProcessor`, with the options of `modality` (default: the processor's `modality`)."""
        modalities = kwargs.get("modalities") or self.modalities
        sensor = modality_options(modalities, kwargs.get("modality") or self.modality)
        return super().preprocess(images, segmentation_maps, **{**sensor, **kwargs})


def modality_options(modalities: dict[str, dict[str, Any]], name: str | None) -> dict[str, Any]:
    """Return the checked options of one sensor, as plain Python values.

    Raises:
        ImageFormatError: unknown sensor, unknown option, or statistics that do not belong together.
    """
    if name is None or name not in modalities:
        raise ImageFormatError(
            f"modality={name!r} is unknown: this processor has {', '.join(modalities)}: pass modality= with one of "
            "them, or add an entry to modalities"
        )
    options = plain_floats(modalities[name])
    if unknown := sorted(set(options) - set(MODALITY_OPTIONS)):
        raise ImageFormatError(f"modalities[{name!r}] has {unknown}: only {', '.join(MODALITY_OPTIONS)} are per sensor")
    check_statistics(options.get("image_mean"), options.get("image_std"))
    return options


class RSVHeatImageProcessorPil(RSVHeatPreprocessing, HeatPilBackend):
    """`RSVHeatPreprocessing` with PIL; agrees with `RSVHeatImageProcessor` within resampling error."""


__all__ = ["RSVHeatImageProcessorPil"]
