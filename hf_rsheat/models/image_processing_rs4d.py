"""RS4D image processor on torchvision."""

from transformers.image_processing_backends import TorchvisionBackend

from .image_processing_pil_rs4d import RS4DPreprocessing


class RS4DImageProcessor(RS4DPreprocessing, TorchvisionBackend):
    """`RS4DPreprocessing` with torchvision, on the CPU or on `device`."""


__all__ = ["RS4DImageProcessor"]
