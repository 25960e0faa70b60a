"""RS-vHeat image processor on torchvision."""

from transformers.image_processing_backends import TorchvisionBackend

from .image_processing_pil_rs_vheat import RSVHeatPreprocessing


class RSVHeatImageProcessor(RSVHeatPreprocessing, TorchvisionBackend):
    """`RSVHeatPreprocessing` with torchvision, on the CPU or on `device`."""


__all__ = ["RSVHeatImageProcessor"]
