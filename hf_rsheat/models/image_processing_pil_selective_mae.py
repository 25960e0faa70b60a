"""SelectiveMAE image processor on PIL, and what its torchvision twin shares."""

from .image_processing_heat import HeatPilBackend
from .image_processing_pil_vheat import VHeatPreprocessing


class SelectiveMAEPreprocessing(VHeatPreprocessing):
    """The evaluation preprocessing of SelectiveMAE's classifiers, which is vHeat's: see `VHeatPreprocessing`.

    With the defaults: shorter side to 256 bicubic, centre crop 224, values / 255, ImageNet mean and std, RGB.
    """


class SelectiveMAEImageProcessorPil(SelectiveMAEPreprocessing, HeatPilBackend):
    """`SelectiveMAEPreprocessing` with PIL; agrees with `SelectiveMAEImageProcessor` within resampling error."""


__all__ = ["SelectiveMAEImageProcessorPil"]
