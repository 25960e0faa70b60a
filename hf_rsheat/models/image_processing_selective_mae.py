"""SelectiveMAE image processor on torchvision."""

from transformers.image_processing_backends import TorchvisionBackend

from .image_processing_pil_selective_mae import SelectiveMAEPreprocessing


class SelectiveMAEImageProcessor(SelectiveMAEPreprocessing, TorchvisionBackend):
    """`SelectiveMAEPreprocessing` with torchvision, on the CPU or on `device`."""


__all__ = ["SelectiveMAEImageProcessor"]
