"""Pictures of what a masked autoencoder is shown of an image, and what it makes of the rest."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .figures import new_figure, show
from .models.selective_mae_layers import pad_to_patches, patchify
from .models.token_selection import token_mask


class PatchViews(NamedTuple):
    """Normalised images `(batch, channels, height, width)`; patches without content have the mean colour, 0.

    Args:
        encoded: The patches that the encoder sees.
        restored: The same, and the predicted patches.
        predicted: Bool `(batch, 1, height, width)`, true where `restored` is a prediction.
    """

    encoded: torch.Tensor
    restored: torch.Tensor
    predicted: torch.Tensor


def unpatchify(patches: torch.Tensor, patch_size: int, rows: int, columns: int) -> torch.Tensor:
    """`(batch, rows * columns, patch_size**2 * channels)` to `(batch, channels, height, width)`."""
    cells = patches.unflatten(1, (rows, columns)).unflatten(-1, (patch_size, patch_size, -1))
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def patch_views(
    pixel_values: torch.Tensor,
    patch_size: int,
    encoded: torch.Tensor,
    predicted: torch.Tensor,
    predictions: torch.Tensor,
    standardised: bool,
) -> PatchViews:
    """Put patches where they belong.

    Args:
        pixel_values: The input, `(batch, channels, height, width)`, normalised.
        patch_size: Side of a patch in pixels.
        encoded: Which patches the encoder sees, bool `(batch, patches)`.
        predicted: Which patches are predicted, bool `(batch, patches)`.
        predictions: A prediction for every patch, `(batch, patches, patch_size**2 * channels)`; others are not read.
        standardised: Whether each prediction lacks the mean and spread of its patch (`norm_pix_loss`), which are then
            taken from the image, since such a model never learns them.
    """
    height, width = pixel_values.shape[-2:]
    padded = pad_to_patches(pixel_values.float(), patch_size)
    rows, columns = (side // patch_size for side in padded.shape[-2:])
    patches, predictions = patchify(padded, patch_size), predictions.float()
    if standardised:
        spread = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        predictions = predictions * spread + patches.mean(-1, keepdim=True)
    shown = torch.where(encoded[..., None], patches, 0.0)
    restored = torch.where(predicted[..., None], predictions, shown)
    where = predicted[..., None].expand_as(patches)
    images = (unpatchify(view, patch_size, rows, columns)[..., :height, :width] for view in (shown, restored, where))
    first, second, third = images
    return PatchViews(first, second, third[:, :1])


def selective_mae_views(model: Any, pixel_values: torch.Tensor) -> PatchViews:
    """What a [`SelectiveMAEForPreTraining`] in evaluation, where it draws nothing, encodes and reconstructs.

    Args:
        model: The model.
        pixel_values: `(batch, channels, height, width)`, normalised.
    """
    output = model(pixel_values)
    length = output.mask.shape[1]
    predictions = output.logits.new_zeros(len(output.logits), length, output.logits.shape[-1])
    predictions[torch.arange(len(predictions))[:, None], output.reconstruct_ids] = output.logits
    encoded = token_mask(output.encode_ids, length)
    config = model.config
    return patch_views(
        pixel_values, config.patch_size, encoded, output.mask, predictions, standardised=config.norm_pix_loss
    )


@torch.inference_mode()
def reconstruction_figure(model: Any, processor: Any, image: Any, path: str | Path) -> Path:
    """Draw one image, the patches that are encoded, and those that are reconstructed from them.

    Args:
        model: A `SelectiveMAEForPreTraining`; it is set to evaluation.
        processor: Its image processor.
        image: One image.
        path: The PNG to write, 1600 pixels wide.

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    model.eval()
    pixel_values = processor(image, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    views = selective_mae_views(model, pixel_values)
    statistics = np.array(processor.image_mean), np.array(processor.image_std)
    original, encoded, restored = (_picture(view, *statistics) for view in (pixel_values, *views[:2]))
    predicted = views.predicted[0, 0].cpu().numpy()
    error = float(np.abs(restored - original)[predicted].mean())
    figure = new_figure(16, 6.2)
    panels = [figure.add_axes((left / 16, 0.5 / 6.2, 4.9 / 16, 4.9 / 6.2)) for left in (0.35, 5.55, 10.75)]
    show(panels[0], original, "Image", "as the model receives it")
    show(panels[1], encoded, "Encoded patches", f"{1 - model.config.mask_ratio:.0%} of all")
    given = ", mean and contrast given" if model.config.norm_pix_loss else " on a 0-1 scale"
    title = f"Reconstruction of {model.config.kept_mask_ratio:.0%} more"
    show(panels[2], restored, title, f"mean absolute error {error:.3f}{given}")
    figure.savefig(path)
    return Path(path)


def _picture(view: torch.Tensor, mean: NDArray, spread: NDArray) -> NDArray[np.float32]:
    """The first image of a normalised batch as `(height, width, channels)` from 0 to 1."""
    values = view[0].float().permute(1, 2, 0).cpu().numpy()
    return np.clip(values * spread + mean, 0, 1).astype(np.float32)
