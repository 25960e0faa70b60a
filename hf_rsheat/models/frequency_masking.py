"""Frequency-domain hierarchical masking and the frequency target of RS-vHeat's pretraining (arXiv 2411.17984).

Images are `(batch, channels, height, width)` on any device, already normalised. The paper publishes the idea; the exact
maths here is that of the authors' released masking helper.
"""

import torch
import torch.nn.functional as F

from .heat_conduction import cosine_basis


def _next_power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _pad_to_powers_of_two(images: torch.Tensor) -> torch.Tensor:
    height, width = images.shape[-2:]
    return F.pad(images, (0, _next_power_of_two(width) - width, 0, _next_power_of_two(height) - height))


def _bases(images: torch.Tensor, normalized: bool) -> tuple[torch.Tensor, torch.Tensor]:
    height, width = images.shape[-2:]
    options = {"normalized": normalized, "dtype": images.dtype, "device": images.device}
    return cosine_basis(height, **options), cosine_basis(width, **options)


def frequency_distance(height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """Distance of each DCT coefficient from the mean (0, 0) in units of coefficients, `(height, width)`."""
    # float64 decides ties at the radius as the authors' code does; Apple GPUs have none.
    dtype = torch.float32 if device is not None and device.type == "mps" else torch.float64
    rows = torch.arange(height, dtype=dtype, device=device)
    columns = torch.arange(width, dtype=dtype, device=device)
    return torch.sqrt(rows[:, None] ** 2 + columns[None, :] ** 2)


def frequency_masks(
    height: int, width: int, radius: float | torch.Tensor, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of a `height` x `width` spectrum: `(low_cut_mask, high_cut_mask)`, float32, 1 = kept.

    Args:
        radius: Share of the spectrum's diagonal in [0, 1] (its sign is ignored); a number, giving masks
            `(height, width)`, or one per image, giving masks `(batch, height, width)`. The low-cut mask drops
            0 < distance < radius, the high-cut mask drops distance > radius; both keep the mean and coefficients at
            exactly the radius.
    """
    distance = frequency_distance(height, width, device)
    radius = torch.as_tensor(radius, device=device).to(distance.dtype).abs()
    if not torch.compiler.is_compiling() and bool((radius > 1).any()):
        raise ValueError(f"The mask radius is a share of the spectrum's diagonal in [0, 1], got {radius.max().item()}.")
    limit = (radius * float(height**2 + width**2) ** 0.5)[..., None, None]
    low_cut = ~((distance > 0) & (distance < limit))
    high_cut = distance <= limit
    return low_cut.float(), (high_cut | (distance == 0)).float()


def frequency_mask(
    pixel_values: torch.Tensor, radius: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split images into a part without low frequencies and a part without high ones.

    Args:
        pixel_values: `(batch, channels, height, width)`; padded with zeros to powers of two for the transform.
        radius: Share of the padded diagonal in [0, 1], a number or a tensor `(batch,)`.

    Returns:
        `(low_cut, high_cut, low_cut_mask, high_cut_mask)`: two images like `pixel_values` and two masks
        `(padded_height, padded_width)`, or `(batch, padded_height, padded_width)` if the radius is a tensor.
    """
    height, width = pixel_values.shape[-2:]
    # Half precision cannot hold a spectrum: its largest coefficients would swallow the small ones.
    with torch.autocast(device_type=pixel_values.device.type, enabled=False):
        padded = _pad_to_powers_of_two(pixel_values.to(torch.promote_types(pixel_values.dtype, torch.float32)))
        rows, columns = _bases(padded, normalized=True)
        masks = frequency_masks(padded.shape[-2], padded.shape[-1], radius, device=pixel_values.device)
        coefficients = rows @ padded @ columns.T
        images = []
        for mask in masks:
            kept = coefficients * mask[..., None, :, :].to(coefficients.dtype)
            images.append((rows.T @ kept @ columns)[..., :height, :width].to(pixel_values.dtype))
    return images[0], images[1], masks[0], masks[1]


def frequency_target(pixel_values: torch.Tensor, clamp: bool = False) -> torch.Tensor:
    """Spectrum used by the frequency loss: unnormalised DCT-II / 1000, cropped to the image size, at least float32.

    Args:
        pixel_values: `(batch, channels, height, width)`; padded with zeros to powers of two for the transform.
        clamp: Limit values to [-1000, 1000], as the authors do for predictions but not for targets.
    """
    height, width = pixel_values.shape[-2:]
    with torch.autocast(device_type=pixel_values.device.type, enabled=False):
        padded = _pad_to_powers_of_two(pixel_values.to(torch.promote_types(pixel_values.dtype, torch.float32)))
        rows, columns = _bases(padded, normalized=False)
        spectrum = rows @ padded @ columns.T / 1000
        spectrum = torch.where(torch.isinf(spectrum), torch.zeros_like(spectrum), spectrum)
        if clamp:
            spectrum = spectrum.clamp(-1000, 1000)
        return spectrum[..., :height, :width]
