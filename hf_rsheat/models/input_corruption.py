"""Noise and masks for the input of a student, as pure functions of given draws.

"Adaptive noise and masking" is what RS4D's paper (arXiv 2606.25324) names; no formula was published. Ours: the noise is
Gaussian and as strong as a share of the image's own contrast, and masked patches are the mean colour.
"""

import torch
import torch.nn.functional as F


def add_noise(pixel_values: torch.Tensor, noise: torch.Tensor, ratio: float) -> torch.Tensor:
    """Add noise of `ratio` times each image's standard deviation.

    Args:
        pixel_values: Normalised images `(batch, channels, height, width)`.
        noise: Standard normal draws of the same shape.
        ratio: Strength, at least 0; 0.2 is the "20 %" of the published runs.
    """
    contrast = pixel_values.flatten(1).std(dim=1)[:, None, None, None]
    return pixel_values + ratio * contrast * noise.to(pixel_values.dtype)


def masked_patches(order: torch.Tensor, ratio: float) -> torch.Tensor:
    """Which patches are masked: `round(ratio * patches)` of every image, those that come first in its order.

    Args:
        order: A permutation of `0 ... patches - 1` per image, `(batch, patches)`.
        ratio: Share of masked patches, 0 to 1.

    Returns:
        bool `(batch, patches)`.
    """
    return order < round(ratio * order.shape[1])


def hide_patches(pixel_values: torch.Tensor, mask: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Set masked patches to zero, the mean colour of normalised images.

    Args:
        pixel_values: `(batch, channels, height, width)`.
        mask: bool `(batch, patches)`, row by row over `ceil(height / patch_size)` x `ceil(width / patch_size)` patches.
        patch_size: Side of a patch, pixels.
    """
    height, width = pixel_values.shape[-2:]
    grid = mask.to(pixel_values.dtype).reshape(len(mask), 1, -(-height // patch_size), -(-width // patch_size))
    return pixel_values * (1 - F.interpolate(grid, scale_factor=patch_size)[..., :height, :width])


def corrupt(
    pixel_values: torch.Tensor,
    noise: torch.Tensor | None,
    mask_order: torch.Tensor | None,
    noise_ratio: float,
    mask_ratio: float,
    patch_size: int,
) -> torch.Tensor:
    """Noise, then masks; what has no draws is left out. See `add_noise`, `masked_patches` and `hide_patches`."""
    if noise is not None:
        pixel_values = add_noise(pixel_values, noise, noise_ratio)
    if mask_order is not None:
        pixel_values = hide_patches(pixel_values, masked_patches(mask_order, mask_ratio), patch_size)
    return pixel_values
