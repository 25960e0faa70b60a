"""Random geometry that is drawn once and applied to every image of a sample, so that pairs stay co-registered."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv
from torchvision.tv_tensors import BoundingBoxes, Image, Mask

from ..models.instance_targets import Instances


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
        lowest, highest = image.aminmax()
        view = view.clamp_(lowest.item(), highest.item())
        if self.mirrored:
            view = view.flip(-1)
        return torch.rot90(view, self.quarter_turns, (-2, -1)).contiguous()


@dataclass(frozen=True)
class Tone:
    """Brightness, contrast and colour of a normalised view, so that these alone do not tell which image it is of.

    Args:
        gain: Factor per channel.
        offset: Addend per channel, in standard deviations of the sensor.
        grey: Whether all channels become their mean first.
    """

    gain: torch.Tensor
    offset: torch.Tensor
    grey: bool

    @classmethod
    def draw(cls, rng: np.random.Generator, channels: int, strength: float, grey_share: float) -> "Tone":
        """Draw gain and offset, each half for all channels and half per channel, within `strength` of 1 and 0."""
        common, single = rng.uniform(-1, 1, (2, 1)), rng.uniform(-1, 1, (2, channels))
        gain, offset = torch.from_numpy(strength * (common + single) / 2).float()[..., None, None]
        return cls(1 + gain, offset, bool(rng.random() < grey_share))

    def apply(self, view: torch.Tensor) -> torch.Tensor:
        """Change a normalised view `(channels, height, width)`."""
        if self.grey:
            view = view.mean(0, keepdim=True).expand_as(view)
        return view * self.gain + self.offset


@dataclass(frozen=True)
class ScaleJitter:
    """Large-scale jitter (Ghiasi et al. 2021, arXiv 2012.07177) for images with objects, and a mirror image.

    The image is scaled, cut to the training size where it is larger, and mirrored. It is cut first and scaled then,
    which is the same to within a pixel and does not enlarge what is thrown away.

    Args:
        top, left: Upper left corner of the cut, in pixels of the image.
        height, width: Size of the cut, in pixels of the image.
        size: (height, width) of the result, at most the training size.
        mirrored: Whether left and right are swapped.
    """

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]
    mirrored: bool

    @classmethod
    def draw(
        cls, rng: np.random.Generator, image: tuple[int, int], size: int, scale: tuple[float, float], flip: float
    ) -> "ScaleJitter":
        """Draw a scale from U(scale), where 1 fits the image into the training size, a place, and a flip.

        Args:
            rng: Source of all draws.
            image: (height, width) of the image.
            size: Side of the square training images in pixels.
            scale: Smallest and largest scale.
            flip: Probability of a mirror image.
        """
        factor = rng.uniform(*scale) * min(size / side for side in image)
        cut = [min(side, max(1, round(size / factor))) for side in image]
        top, left = (int(rng.integers(side - part + 1)) for side, part in zip(image, cut, strict=True))
        scaled = [min(size, max(1, round(part * factor))) for part in cut]
        return cls(top, left, cut[0], cut[1], (scaled[0], scaled[1]), bool(rng.random() < flip))

    def apply(self, image: torch.Tensor, instances: Instances) -> tuple[torch.Tensor, Instances]:
        """Transform an image `(channels, height, width)` and its objects; those that leave it are dropped."""
        canvas = (image.shape[-2], image.shape[-1])
        boxes = BoundingBoxes(instances.boxes, format="XYXY", canvas_size=canvas)
        parts = [Image(image), boxes, Mask(instances.masks)]
        parts = [tv.crop(part, self.top, self.left, self.height, self.width) for part in parts]
        parts = [tv.resize(part, list(self.size), antialias=True) for part in parts]
        if self.mirrored:
            parts = [tv.horizontal_flip(part) for part in parts]
        view, corners, masks = (part.as_subclass(torch.Tensor) for part in parts)
        return view, Instances(instances.class_labels, corners, masks).drop_degenerate()
