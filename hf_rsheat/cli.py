"""`hf-rsheat <verb>`. Every verb imports what it needs when it runs, so that `--help` answers at once."""

import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hf_rsheat.errors import HFRSHeatError

app = typer.Typer(
    name="hf-rsheat",
    help="Small, fast, explainable remote-sensing vision backbones for the Hugging Face Hub.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
convert_app = typer.Typer(no_args_is_help=True, help="Turn an upstream checkpoint into a Hub-ready folder.")
app.add_typer(convert_app, name="convert")

_options = {"debug": False}


class Weights(StrEnum):
    """Which weights of a checkpoint to take."""

    MODEL = "model"
    MODEL_EMA = "model_ema"


class Resize(StrEnum):
    """How tables of another image size are resized."""

    BICUBIC = "bicubic"
    BILINEAR = "bilinear"
    ZERO_PAD = "zero-pad"


class Task(StrEnum):
    """What `evaluate` measures."""

    KNN = "knn"
    LINEAR = "linear"
    CLASSIFY = "classify"


Checkpoint = Annotated[Path, typer.Argument(help="A .pth, .pt or .safetensors file. Nothing in it is executed.")]
Output = Annotated[Path, typer.Argument(help="Folder to write.")]
Folder = Annotated[Path, typer.Argument(help="A Hub folder or checkpoint folder of one of our models.")]
WeightsOption = Annotated[Weights, typer.Option(help="Which weights to take if the file has both.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A config field that the file cannot tell, e.g. post_norm=true."),
]
ImageSizeOption = Annotated[int | None, typer.Option(help="Resize the tables to this image size in pixels.")]


@app.callback()
def _configure(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    _options["debug"] = debug
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def _register() -> None:
    """What `import hf_rsheat` does elsewhere; here each verb that works does it, so that `--help` need not."""
    from hf_rsheat.auto import register

    register()


def _convert(family: str, checkpoint: Path, output: Path, weights: Weights, overrides: list[str] | None, **options):
    _register()
    from importlib import import_module

    from hf_rsheat.conversion.common import parse_overrides

    convert = import_module(f"hf_rsheat.conversion.{family}").convert
    folder = convert(checkpoint, output, weights=weights.value, overrides=parse_overrides(overrides or []), **options)
    typer.echo(f"Wrote {folder}")


@convert_app.command("vheat")
def convert_vheat(
    checkpoint: Checkpoint,
    output: Output,
    weights: WeightsOption = Weights.MODEL,
    set_: SetOption = None,
    image_size: ImageSizeOption = None,
    resize: Annotated[Resize, typer.Option(help="How to resize them.")] = Resize.BICUBIC,
) -> None:
    """vHeat: classification, mmdetection and mmsegmentation checkpoints."""
    _convert("vheat", checkpoint, output, weights, set_, image_size=image_size, resize=resize.value)


@convert_app.command("rs-vheat")
def convert_rs_vheat(
    checkpoint: Checkpoint,
    output: Output,
    weights: WeightsOption = Weights.MODEL,
    set_: SetOption = None,
    image_size: ImageSizeOption = None,
    resize: Annotated[Resize, typer.Option(help="How to resize them.")] = Resize.BILINEAR,
) -> None:
    """RS-vHeat: pretraining and fine-tuning checkpoints."""
    _convert("rs_vheat", checkpoint, output, weights, set_, image_size=image_size, resize=resize.value)


@app.command()
def export(folder: Folder, output: Output) -> None:
    """Write a Hub-ready folder (weights, remote code, card) from a checkpoint folder."""
    _register()
    from hf_rsheat.hub import export_folder

    typer.echo(f"Wrote {export_folder(folder, output)}")


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="An exported folder.")],
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="Results of `hf-rsheat evaluate` on these weights, to show in the card.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="An image to draw a pretraining model's picture of.")] = None,
) -> None:
    """Render the model card of a folder, with evaluation results and a picture."""
    _register()
    from hf_rsheat.hub.card import add_evaluation, add_picture
    from hf_rsheat.hub.export import finish

    for result in evaluation or []:
        add_evaluation(folder, result)
    if picture is not None:
        add_picture(folder, picture)
    finish(folder)
    typer.echo(f"Wrote {folder / 'README.md'}")


@app.command()
def verify(
    folder: Annotated[str, typer.Argument(help="A folder, or a Hub repository user/name[@revision].")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Check hashes, tensors, code, outputs and card of a folder.

    Exit status 0 if all hold, 1 if one fails, 3 if it is a plain save_pretrained folder.
    """
    _register()
    from hf_rsheat.hub import verify as run

    report = run(folder)
    typer.echo(report.to_json() if as_json else str(report))
    if not report.ok:
        raise typer.Exit(3 if report.is_plain else 1)


@app.command()
def embed(
    folder: Folder,
    images: Annotated[Path, typer.Argument(help="Folder of images, searched recursively.")],
    output: Annotated[Path, typer.Argument(help="Parquet file to write: one row per image.")],
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    modality: Annotated[str | None, typer.Option(help="Sensor of the images (RS-vHeat).")] = None,
) -> None:
    """Write one feature vector per image, with its path, to a Parquet file."""
    _register()
    from hf_rsheat.evaluation import embed as run

    typer.echo(f"Wrote {run(folder, images, output, batch_size=batch_size, modality=modality)}")


@app.command()
def evaluate(
    folder: Folder,
    data: Annotated[Path, typer.Option(help="Folder with one sub-folder of images per class.")],
    task: Annotated[Task, typer.Option(help="Probe frozen features, or test a classifier.")] = Task.KNN,
    output: Annotated[Path | None, typer.Option(help="JSON file to write; model cards read it.")] = None,
    folds: Annotated[int, typer.Option(min=2)] = 5,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    neighbours: Annotated[int, typer.Option("--k", min=1, help="Neighbours of the k-NN probe.")] = 5,
    baselines: Annotated[
        bool, typer.Option(help="Also the untrained network and a colour and gradient histogram.")
    ] = True,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    modality: Annotated[str | None, typer.Option(help="Sensor of the images (RS-vHeat).")] = None,
) -> None:
    """Measure a model on labelled images, with intervals and baselines."""
    _register()
    from hf_rsheat.evaluation import evaluate as run
    from hf_rsheat.evaluation.evaluate import report

    result = run(
        folder,
        data,
        task=task.value,
        folds=folds,
        repeats=repeats,
        k=neighbours,
        baselines=baselines,
        batch_size=batch_size,
        modality=modality,
        output_json=output,
    )
    typer.echo(report(result))


@app.command()
def demo(
    images: Annotated[Path | None, typer.Option(help="Your own images; generated scenes if not given.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path(".demo"),
) -> None:
    """Pretrain a small RS-vHeat, export it, load it as a stranger would, and draw what it does."""
    from hf_rsheat.demo import run

    run(images, output)


def main() -> None:
    """Entry point: bad input gets one clear sentence and exit status 1; `--debug` shows the traceback."""
    try:
        app()
    except (HFRSHeatError, ValueError, OSError) as error:
        if _options["debug"]:
            raise
        typer.secho(f"Error: {error}", err=True, fg=typer.colors.RED)
        sys.exit(1)


if __name__ == "__main__":
    main()
