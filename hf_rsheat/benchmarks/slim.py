"""`hf-rsheat bench slim`: what cutting a model to a share of its width saves in time, arithmetic and memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, MissingExtraError
from .backbone import bench_backbone


def bench_slim(models: Sequence[str], widths: Sequence[float], **options: Any) -> dict[str, Any]:
    """Every model at every width, each beside its own full width.

    Args:
        models: Names of [`contestants.names`] that [`slim`] can cut.
        widths: Shares of the inner units, above 0 and below 1; the full model always takes part.
        **options: `sizes`, `batches`, `repeats`, `memory` and the fields of a run, see [`bench_backbone`].

    Returns:
        As [`bench_backbone`], one run per model, size and batch. The contestants of a run are the model itself and
        `<model>@<width>`, so ratios are to the full width.

    Raises:
        ConfigurationError: No width, or one outside (0, 1), or a model that cannot be cut.
    """
    if not models or not widths or not all(0 < width < 1 for width in widths):
        raise ConfigurationError("Name at least one model, and widths above 0 and below 1 (the full one is added).")
    results = [bench_backbone([name, *(f"{name}@{width:g}" for width in widths)], **options) for name in models]
    runs = [run for result in results for run in result["runs"]]
    return {**results[0], "runs": runs, "load_after": results[-1]["load_after"]}


def chart(result: dict[str, Any], path: Path) -> None:
    """Time (solid) and multiply-adds (dotted) as a share of the full model's, against width, as a PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "viz", "A chart") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for run in result["runs"]:
        name = next(iter(run["models"]))
        rows = {float(key.partition("@")[2] or 1): row for key, row in run["models"].items()}
        shares = sorted(rows)
        label = f"{name}, {run['image_size']} px, batch {run['batch']}"
        (line,) = axes.plot(shares, [rows[share]["ratio"] for share in shares], marker="o", label=label)
        arithmetic = [rows[share]["macs"] / rows[1.0]["macs"] for share in shares]
        axes.plot(shares, arithmetic, linestyle=":", color=line.get_color())
    axes.set(xlabel="width", ylabel="share of the full model (dotted: multiply-adds)", xlim=(0, 1.02), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
