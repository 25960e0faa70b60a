"""Pictures for the person who watches a run: input, what the model saw of it, what it made of it."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from .data import Batch
from .objectives import Objective

_IMAGES = 4  # rows of a picture
_GAP = 4  # white pixels between images


@torch.no_grad()
def write_picture(
    objective: Objective, model: nn.Module, batch: Batch, output_dir: Path, step: int, is_main: bool
) -> Path | None:
    """Draw the first images of a batch to `pictures/step-<step>.png`; called on every process.

    The model is in evaluation meanwhile, and no random state changes.

    Args:
        objective: Its `picture` gives the columns.
        model: The model being trained.
        batch: A batch on the model's device.
        output_dir: The run folder.
        step: Steps done.
        is_main: Whether this process writes.

    Returns:
        The file, or None where the objective has no picture or another process writes.
    """
    model.eval()
    try:
        columns = objective.picture(model, batch)
    finally:
        model.train()
    if not (columns and is_main):
        return None
    path = output_dir / "pictures" / f"step-{step:07d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [_join([_pixels(column[index]) for column in columns], axis=1) for index in range(_rows(columns))]
    Image.fromarray(_join(rows, axis=0)).save(path)
    return path


def _rows(columns: list[torch.Tensor]) -> int:
    return min(_IMAGES, *(len(column) for column in columns))


def _pixels(image: torch.Tensor) -> np.ndarray:
    """`(channels, height, width)` from 0 to 1 as `(height, width, 3)` of 8 bit; what is not finite is black."""
    shown = image.detach().float().nan_to_num(0, 0, 0).clamp(0, 1).cpu()
    shown = shown[:1].expand(3, -1, -1) if len(shown) < 3 else shown[:3]
    return (shown * 255).round().byte().permute(1, 2, 0).numpy()


def _join(images: list[np.ndarray], axis: int) -> np.ndarray:
    gap = np.full((_GAP, images[0].shape[1], 3) if axis == 0 else (images[0].shape[0], _GAP, 3), 255, np.uint8)
    spaced = [piece for image in images for piece in (gap, image)][1:]
    return np.concatenate(spaced, axis)
