"""vHeat image processor on torchvision."""

from transformers.image_processing_backends import TorchvisionBackend

from .image_processing_pil_vheat import VHeatPreprocessing


class VHeatImageProcessor(VHeatPreprocessing, TorchvisionBackend):
    """`VHeatPreprocessing` with torchvision, on the CPU or on `device`."""


__all__ = ["VHeatImageProcessor"]
