"""Verbs about how much of a model is needed: slim, redundancy."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Output, register_models


class KeepUnits(StrEnum):
    """Which units stay."""

    FIRST = "first"
    LAST = "last"
    RANDOM = "random"
    IMPORTANCE = "importance"


class Fit(StrEnum):
    """How a slimmed model is corrected."""

    NONE = "none"
    AFFINE = "affine"
    RIDGE = "ridge"


Source = Annotated[Path, typer.Argument(help="Folder of one of our models, or of a ViT, ViTMAE, DINOv2 or DINOv3.")]
Modality = Annotated[str | None, typer.Option(help="Sensor of the images (RS-vHeat).")]


def slim(
    folder: Source,
    output: Output,
    width: Annotated[float, typer.Option(help="Share of the inner units to keep, above 0 and at most 1.")],
    keep: Annotated[KeepUnits, typer.Option(help="Which units; importance needs --calibrate.")] = KeepUnits.FIRST,
    calibrate: Annotated[Path | None, typer.Option(help="Folder of unlabelled images, for corrections.")] = None,
    correction: Annotated[
        Fit | None, typer.Option(help="ridge if there are --calibrate images, else none. ridge is much better.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="How many images to calibrate on.")] = 256,
    modality: Modality = None,
) -> None:
    """Write a really smaller model that loads like the full one."""
    register_models()
    from hf_rsheat.slimming import relative_compute
    from hf_rsheat.slimming.folder import slim_folder

    if correction is None:
        correction = Fit.RIDGE if calibrate is not None else Fit.NONE
    fit: Any = None if correction is Fit.NONE else correction.value
    small = slim_folder(
        folder,
        output,
        width,
        keep=keep.value,
        correction=fit,
        images=calibrate,
        max_images=images,
        modality=modality,
    )
    from transformers import AutoConfig

    compute = relative_compute(AutoConfig.from_pretrained(folder), width)
    parameters = sum(parameter.numel() for parameter in small.parameters())
    typer.echo(f"Wrote {output}: {parameters / 1e6:.2f} M parameters, {compute:.1%} of the compute")


def redundancy(
    folder: Source,
    data: Annotated[Path, typer.Option(help="Folder with one sub-folder of images per class.")],
    output: Annotated[Path, typer.Option("--out", help="Folder for the report; what is there already is kept.")],
    widths: Annotated[str, typer.Option(help="'paper' for its 31 widths, or numbers such as 0.1,0.25,0.5.")] = "paper",
    keep: Annotated[KeepUnits, typer.Option(help="Which units stay.")] = KeepUnits.FIRST,
    correction: Annotated[Fit, typer.Option(help="Refit slimmed models on the images, without labels.")] = Fit.NONE,
    images: Annotated[int, typer.Option(min=1, help="How many images to calibrate on.")] = 256,
    folds: Annotated[int, typer.Option(min=2)] = 5,
    repeats: Annotated[int, typer.Option(min=1, help="Seeds of the splits.")] = 5,
    neighbours: Annotated[int, typer.Option("--k", min=1, help="Neighbours of the k-NN probe.")] = 5,
    untrained: Annotated[int, typer.Option(min=0, help="Untrained networks to slim beside it.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    modality: Modality = None,
) -> None:
    """Report what a model still knows at every width: accuracy, compute, latency, redundancy of its features."""
    register_models()
    from hf_rsheat.slimming.redundancy import Settings
    from hf_rsheat.slimming.redundancy import redundancy as run

    fit: Any = None if correction is Fit.NONE else correction.value
    settings = Settings(
        keep=keep.value,
        correction=fit,
        calibration_images=images,
        folds=folds,
        repeats=repeats,
        neighbours=neighbours,
        untrained=untrained,
        batch_size=batch_size,
        modality=modality,
    )
    report = run(folder, data, output, _numbers(widths), settings)
    for row in report["rows"]:
        accuracy = row["knn"]["accuracy"]["value"]
        typer.echo(f"width {row['width']:<6g} compute {row['compute']:6.1%}  k-NN {accuracy:6.1%}")
    typer.echo(f"Wrote {output / 'report.html'}")


def _numbers(widths: str) -> list[float] | None:
    if widths == "paper":
        return None
    try:
        return [float(text) for text in widths.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{widths!r} is neither 'paper' nor numbers such as 0.1,0.25,0.5.") from error
