"""`hf-rsheat convert`: upstream checkpoints to Hub-ready folders."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .common import Output, register_models
from .hub import push_folder

app = typer.Typer(no_args_is_help=True, help="Turn an upstream checkpoint into a Hub-ready folder.")


class Weights(StrEnum):
    """Which weights of a checkpoint to take."""

    MODEL = "model"
    MODEL_EMA = "model_ema"


class Resize(StrEnum):
    """How tables of another image size are resized."""

    BICUBIC = "bicubic"
    BILINEAR = "bilinear"
    ZERO_PAD = "zero-pad"


class VisionTransformer(StrEnum):
    """What a SelectiveMAE checkpoint becomes."""

    SELECTIVE_MAE = "selective_mae"
    VIT = "vit"
    VIT_MAE = "vit_mae"


Checkpoint = Annotated[
    str, typer.Argument(help="A .pth, .pt or .safetensors file, or its https:// address. Nothing in it is executed.")
]
WeightsOption = Annotated[Weights, typer.Option(help="Which weights to take if the file has both.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A config field that the file cannot tell, e.g. post_norm=true."),
]
Sha256Option = Annotated[str | None, typer.Option(help="SHA-256 the file must have; required for an address.")]
PushOption = Annotated[str | None, typer.Option(metavar="USER/NAME", help="Push the verified result to the Hub.")]
ImageSizeOption = Annotated[int | None, typer.Option(help="Resize the tables to this image size in pixels.")]


def _convert(
    family: str,
    checkpoint: str,
    output: Path,
    weights: Weights,
    overrides: list[str] | None,
    sha256: str | None,
    push_to: str | None,
    **options,
) -> None:
    register_models()
    from importlib import import_module

    from hf_rsheat.conversion.common import parse_overrides
    from hf_rsheat.hub.download import fetch

    convert = import_module(f"hf_rsheat.conversion.{family}").convert
    source = fetch(checkpoint, sha256)
    folder = convert(source, output, weights=weights.value, overrides=parse_overrides(overrides or []), **options)
    typer.echo(f"Wrote {folder}")
    if push_to is not None:
        push_folder(folder, push_to)


@app.command("vheat")
def convert_vheat(
    checkpoint: Checkpoint,
    output: Output,
    weights: WeightsOption = Weights.MODEL,
    sha256: Sha256Option = None,
    push: PushOption = None,
    set_: SetOption = None,
    image_size: ImageSizeOption = None,
    resize: Annotated[Resize, typer.Option(help="How to resize them.")] = Resize.BICUBIC,
) -> None:
    """vHeat: classification, mmdetection and mmsegmentation checkpoints."""
    _convert("vheat", checkpoint, output, weights, set_, sha256, push, image_size=image_size, resize=resize.value)


@app.command("rs-vheat")
def convert_rs_vheat(
    checkpoint: Checkpoint,
    output: Output,
    weights: WeightsOption = Weights.MODEL,
    sha256: Sha256Option = None,
    push: PushOption = None,
    set_: SetOption = None,
    image_size: ImageSizeOption = None,
    resize: Annotated[Resize, typer.Option(help="How to resize them.")] = Resize.BILINEAR,
) -> None:
    """RS-vHeat: pretraining and fine-tuning checkpoints."""
    _convert("rs_vheat", checkpoint, output, weights, set_, sha256, push, image_size=image_size, resize=resize.value)


@app.command("rs4d")
def convert_rs4d(
    checkpoint: Checkpoint,
    output: Output,
    weights: WeightsOption = Weights.MODEL,
    sha256: Sha256Option = None,
    push: PushOption = None,
    set_: SetOption = None,
    image_size: ImageSizeOption = None,
) -> None:
    """RS4D: distilled backbones, bare, from several GPUs or inside an mmengine file, and instance detectors."""
    _convert("rs4d", checkpoint, output, weights, set_, sha256, push, image_size=image_size)


@app.command("selective-mae")
def convert_selective_mae(
    checkpoint: Checkpoint,
    output: Output,
    weights: WeightsOption = Weights.MODEL,
    sha256: Sha256Option = None,
    push: PushOption = None,
    set_: SetOption = None,
    image_size: ImageSizeOption = None,
    to: Annotated[
        VisionTransformer, typer.Option(help="Our classes, or transformers' own ViT or ViT-MAE.")
    ] = VisionTransformer.SELECTIVE_MAE,
) -> None:
    """SelectiveMAE: pretraining, encoder-only and fine-tuned checkpoints, and plain MAE ones."""
    _convert("selective_mae", checkpoint, output, weights, set_, sha256, push, image_size=image_size, to=to.value)
