"""Pictures of what a pretrained RS-vHeat sees, restores and conducts.

The module needs nothing else of this package: it also draws for models loaded from a Hub folder with their own code.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

PATCH = 16  # side of the heated patch in pixels of the model's input: the stride of stage 3
HEAT = 1.0  # what is added there to the normalised pixel values: one standard deviation of the sensor


@dataclass(frozen=True)
class Explanation:
    """What `explain` found for one image; images are (height, width, channels) from 0 to 1 at the model's input size.

    Attributes:
        image: the model's input.
        low_cut: the input without its low frequencies.
        high_cut: the input without its high frequencies.
        reconstruction: what the model restores from the two.
        mask_radius: of the frequency mask, as a share of the padded spectrum's diagonal.
        diffusivity: thermal diffusivity k (rows, columns) over vertical and horizontal frequency n pi / rows and
            m pi / columns, in radians per sample of the stage's grid; mean over layers and channels.
        response: mean absolute change (rows, columns) of the stage's features when the patch is heated.
        patch: (row, column) of the heated patch, in patches.
        stage: 1 to 4, of `diffusivity` and `response`.
    """

    image: NDArray[np.float32]
    low_cut: NDArray[np.float32]
    high_cut: NDArray[np.float32]
    reconstruction: NDArray[np.float32]
    mask_radius: float
    diffusivity: NDArray[np.float32]
    response: NDArray[np.float32]
    patch: tuple[int, int]
    stage: int


@torch.inference_mode()
def explain(
    model: Any,
    processor: Any,
    image: Any,
    *,
    patch: tuple[int, int] | None = None,
    stage: int = 2,
    modality: str | None = None,
) -> Explanation:
    """Mask and reconstruct one image, read the diffusivity, and heat one patch.

    Args:
        model: an `RSVHeatForPreTraining`; it is set to evaluation.
        processor: its image processor.
        image: anything the processor takes; one image.
        patch: (row, column) of the patch to heat, in patches of `PATCH` pixels; the middle one if None.
        stage: stage whose diffusivity and response are shown, 1 to 4.
        modality: sensor of the image (default: optical, or the only one).

    Raises:
        ValueError: the stage or the patch does not exist.
    """
    if stage not in (1, 2, 3, 4):
        raise ValueError(f"There is no stage {stage}: choose 1, 2, 3 or 4.")
    modality = modality or model.config.default_modality
    model.eval()
    pixel_values = processor(image, return_tensors="pt", modality=modality)["pixel_values"].to(
        model.device, model.dtype
    )
    radius = sum(model.config.mask_radius_range) / 2
    output = model(pixel_values, modality=modality, mask_radius=radius)
    rows, columns = (side // PATCH for side in pixel_values.shape[-2:])
    patch = patch or (rows // 2, columns // 2)
    if not (0 <= patch[0] < rows and 0 <= patch[1] < columns):
        raise ValueError(f"There is no patch {patch}: this image has {rows} rows and {columns} columns of patches.")
    response = _heat_response(model, pixel_values, modality, patch, stage)
    diffusivity = model.base_model.encoder.stages[stage - 1].diffusivity(*response.shape)
    to_picture = _Denormalise(processor.modalities[modality])
    return Explanation(
        image=to_picture(pixel_values),
        low_cut=to_picture(output.low_cut),
        high_cut=to_picture(output.high_cut),
        reconstruction=to_picture(output.reconstruction),
        mask_radius=radius,
        diffusivity=diffusivity.float().mean((0, 3)).cpu().numpy(),
        response=response.cpu().numpy(),
        patch=patch,
        stage=stage,
    )


def _heat_response(
    model: Any, pixel_values: torch.Tensor, modality: str, patch: tuple[int, int], stage: int
) -> torch.Tensor:
    """Mean absolute change (rows, columns) of a stage's features when `HEAT` is added to one patch of the input."""
    heated = pixel_values.clone()
    top, left = patch[0] * PATCH, patch[1] * PATCH
    heated[..., top : top + PATCH, left : left + PATCH] += HEAT
    states = [
        model.base_model(values, modality=modality, output_hidden_states=True).hidden_states[stage].float()
        for values in (pixel_values, heated)
    ]
    return (states[1] - states[0]).abs().mean((0, 1))


class _Denormalise:
    """From normalised (1, channels, height, width) back to pictures from 0 to 1."""

    def __init__(self, statistics: dict[str, Any]) -> None:
        self.mean, self.spread = np.array(statistics["image_mean"]), np.array(statistics["image_std"])

    def __call__(self, pixel_values: torch.Tensor) -> NDArray[np.float32]:
        values = pixel_values[0].float().permute(1, 2, 0).cpu().numpy()
        return np.clip(values * self.spread + self.mean, 0, 1).astype(np.float32)


def pretraining_figure(model: Any, processor: Any, image: Any, path: str | Path, **options: Any) -> Path:
    """Draw one image, its masked versions, its reconstruction, the diffusivity and the response to a heat source.

    Args:
        model: an `RSVHeatForPreTraining`.
        processor: its image processor.
        image: one image.
        path: the PNG to write, 1600 pixels wide.
        options: see `explain`.

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: the stage or the patch does not exist.
    """
    return draw(explain(model, processor, image, **options), path)


def draw(explanation: Explanation, path: str | Path) -> Path:
    """Write the figure of an explanation.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = new_figure(16, 12.4)
    axes = [[_panel(figure, row, column) for column in range(3)] for row in range(2)]
    error = float(np.abs(explanation.reconstruction - explanation.image).mean())
    cut = f"masked input, radius {explanation.mask_radius:.2f} of the spectrum's diagonal"
    show(axes[0][0], explanation.image, "Image", "as the model receives it")
    show(axes[0][1], explanation.low_cut, "Low frequencies removed", cut)
    show(axes[0][2], explanation.high_cut, "High frequencies removed", cut)
    show(axes[1][0], explanation.reconstruction, "Reconstruction", f"mean absolute error {error:.3f} on a 0-1 scale")
    _draw_diffusivity(figure, axes[1][1], explanation)
    _draw_response(figure, axes[1][2], explanation)
    figure.savefig(path)
    return Path(path)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of a size in inches, at 100 pixels per inch.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        from .errors import MissingExtraError

        raise MissingExtraError("matplotlib", "viz", "Drawing figures") from error
    # No pyplot: it would keep the figure alive and touch the caller's backend.
    figure = Figure(figsize=(width, height), dpi=100)
    FigureCanvasAgg(figure)
    return figure


def _panel(figure: Any, row: int, column: int) -> Any:
    """A square of 4.5 inches; the second row leaves room for axis labels and colour bars below."""
    width, height = figure.get_size_inches()
    left, bottom = (0.35, 5.75, 11.15)[column], (7.0, 1.55)[row]
    return figure.add_axes((left / width, bottom / height, 4.5 / width, 4.5 / height))


def _title(axis: Any, title: str, subtitle: str) -> None:
    axis.set_title(title, fontsize=18, fontweight="bold", pad=28)
    axis.text(0.5, 1.02, subtitle, transform=axis.transAxes, ha="center", va="bottom", fontsize=13, color="0.3")


def show(axis: Any, picture: NDArray[np.float32], title: str, subtitle: str) -> None:
    """Draw a picture (height, width, channels) of 0 to 1, with a title and a line below it."""
    axis.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_axis_off()
    _title(axis, title, subtitle)


def _draw_diffusivity(figure: Any, axis: Any, explanation: Explanation) -> None:
    rows, columns = explanation.diffusivity.shape
    step_y, step_x = math.pi / rows, math.pi / columns  # the cell of frequency n pi / N is centred on it
    extent = (-step_x / 2, math.pi - step_x / 2, math.pi - step_y / 2, -step_y / 2)
    drawn = axis.imshow(explanation.diffusivity, cmap="viridis", extent=extent, aspect="equal")
    ticks, labels = [0, math.pi / 4, math.pi / 2, 3 * math.pi / 4, math.pi], ["0", "π/4", "π/2", "3π/4", "π"]
    axis.set(xlim=(-step_x / 2, math.pi), ylim=(math.pi, -step_y / 2))
    axis.set_xticks(ticks, labels, fontsize=13)
    axis.set_yticks(ticks, labels, fontsize=13)
    axis.set_xlabel("horizontal frequency (radians per sample)", fontsize=13)
    axis.set_ylabel("vertical frequency (radians per sample)", fontsize=13)
    _bar(figure, axis, drawn, f"k, mean of stage {explanation.stage}'s layers and channels")
    _title(axis, "Thermal diffusivity k", "the same for every image: k does not depend on the input")


def _draw_response(figure: Any, axis: Any, explanation: Explanation) -> None:
    from matplotlib.colors import PowerNorm
    from matplotlib.patches import Rectangle

    height, width = explanation.image.shape[:2]
    grey = explanation.image.mean(-1)
    peak = max(float(explanation.response.max()), 1e-12)
    norm = PowerNorm(0.5, 0, peak)  # square root: the far, faint part of the response is the interesting one
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axis.imshow(grey, cmap="gray", vmin=-0.3, vmax=1.3)
    strength = np.clip(np.sqrt(explanation.response / peak), 0, 1) * 0.85
    drawn = axis.imshow(
        explanation.response, cmap="inferno", norm=norm, alpha=strength, extent=extent, interpolation="bilinear"
    )
    corner = (explanation.patch[1] * PATCH - 0.5, explanation.patch[0] * PATCH - 0.5)
    axis.add_patch(Rectangle(corner, PATCH, PATCH, fill=False, edgecolor="cyan", linewidth=2.5))
    axis.set_axis_off()
    _bar(figure, axis, drawn, "mean |change| of the features (square-root scale)")
    _title(axis, "Response to a heat source", f"stage {explanation.stage} when the marked patch is heated")


def _bar(figure: Any, axis: Any, drawn: Any, label: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import MaxNLocator

    panel = axis.get_position()
    place = figure.add_axes((panel.x0, 0.055, panel.width, 0.014))
    bar = figure.colorbar(
        ScalarMappable(drawn.norm, drawn.cmap), cax=place, orientation="horizontal", ticks=MaxNLocator(5)
    )
    bar.formatter.set_powerlimits((-2, 3))
    bar.set_label(label, fontsize=13)
    bar.ax.tick_params(labelsize=12)
