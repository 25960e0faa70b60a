"""Random geometry that is drawn once and applied to every image of a sample, so that pairs stay co-registered."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv


@dataclass(frozen=True)
class Geometry:
    """A crop in shares of the image, then one of the eight symmetries of the square.

    Overhead imagery has no preferred direction, so mirror images and quarter turns are all equally likely.

    Args:
        top: Upper edge of the crop, 0-1.
        left: Left edge of the crop, 0-1.
        height: Height of the crop, 0-1.
        width: Width of the crop, 0-1.
        mirrored: Whether left and right are swapped.
        quarter_turns: Counter-clockwise quarter turns, 0-3.
    """

    top: float
    left: float
    height: float
    width: float
    mirrored: bool
    quarter_turns: int

    @classmethod
    def draw(cls, rng: np.random.Generator, scale: tuple[float, float], aspect: float = 4 / 3) -> "Geometry":
        """Draw a random resized crop: area share from U(scale), log aspect ratio from U(-log aspect, log aspect)."""
        area = rng.uniform(*scale)
        ratio = math.exp(rng.uniform(-math.log(aspect), math.log(aspect)))
        height, width = min(1.0, math.sqrt(area / ratio)), min(1.0, math.sqrt(area * ratio))
        top, left = rng.uniform(0, 1 - height), rng.uniform(0, 1 - width)
        return cls(top, left, height, width, bool(rng.integers(2)), int(rng.integers(4)))

    def apply(self, image: torch.Tensor, size: int) -> torch.Tensor:
        """Crop and resize `(channels, height, width)` to `(channels, size, size)`, bicubic with antialiasing.

        The result keeps the image's dtype and stays inside its range: bicubic resampling overshoots at edges.
        """
        full_height, full_width = image.shape[-2:]
        box = [
            round(self.top * full_height),
            round(self.left * full_width),
            max(1, round(self.height * full_height)),
            max(1, round(self.width * full_width)),
        ]
        view = tv.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
        view = view.clamp(image.min(), image.max())
        if self.mirrored:
            view = view.flip(-1)
        return torch.rot90(view, self.quarter_turns, (-2, -1)).contiguous()
