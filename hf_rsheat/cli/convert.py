"""`hf-rsheat convert`: upstream checkpoints to Hub-ready folders."""

from enum import StrEnum
from typing import Annotated

import typer

from .common import Output, register_models
from .hub import push_folder


class Family(StrEnum):
    """Whose checkpoint it is."""

    VHEAT = "vheat"
    RS_VHEAT = "rs-vheat"
    RS4D = "rs4d"
    SELECTIVE_MAE = "selective-mae"


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


def convert(
    family: Annotated[Family, typer.Argument(help="Whose checkpoint it is.")],
    checkpoint: Annotated[
        str,
        typer.Argument(help="A .pth, .pt or .safetensors file, or its https:// address. Nothing in it runs."),
    ],
    output: Output,
    weights: Annotated[Weights, typer.Option(help="Which weights to take if the file has both.")] = Weights.MODEL,
    sha256: Annotated[str | None, typer.Option(help="SHA-256 the file must have; required for an address.")] = None,
    push: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Push the verified result to the Hub.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A config field that the file cannot tell: post_norm=true."),
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Resize the tables to this image size in pixels.")] = None,
    resize: Annotated[
        Resize | None, typer.Option(help="How; vheat: bicubic, rs-vheat: bilinear unless given, rs4d: only bicubic.")
    ] = None,
    to: Annotated[
        VisionTransformer | None, typer.Option(help="selective-mae only: transformers' own ViT or ViT-MAE instead.")
    ] = None,
) -> None:
    """Turn an upstream checkpoint into a Hub-ready folder.

    vheat: classification, mmdetection and mmsegmentation files.

    rs-vheat: pretraining and fine-tuning files.

    rs4d: distilled backbones, bare, from several GPUs or inside an mmengine file, and instance detectors.

    selective-mae: pretraining, encoder-only and fine-tuned files, and plain MAE ones.
    """
    register_models()
    from importlib import import_module
    from inspect import signature

    from hf_rsheat.conversion.common import parse_overrides
    from hf_rsheat.hub.download import fetch

    converter = import_module(f"hf_rsheat.conversion.{family.value.replace('-', '_')}").convert
    special = {name: choice.value for name, choice in (("resize", resize), ("to", to)) if choice is not None}
    for name in special:
        if name not in signature(converter).parameters:
            raise typer.BadParameter(f"'{family.value}' has no such option.", param_hint=f"--{name}")
    folder = converter(
        fetch(checkpoint, sha256),
        output,
        weights=weights.value,
        overrides=parse_overrides(set_ or []),
        image_size=image_size,
        **special,
    )
    typer.echo(f"Wrote {folder}")
    if push is not None:
        push_folder(folder, push)
