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
bench_app = typer.Typer(no_args_is_help=True, help="Measure speed and memory beside transformers' own code.")
app.add_typer(bench_app, name="bench")

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


class VisionTransformer(StrEnum):
    """What a SelectiveMAE checkpoint becomes."""

    SELECTIVE_MAE = "selective_mae"
    VIT = "vit"
    VIT_MAE = "vit_mae"


class Task(StrEnum):
    """What `evaluate` measures."""

    KNN = "knn"
    LINEAR = "linear"
    CLASSIFY = "classify"


Checkpoint = Annotated[
    str, typer.Argument(help="A .pth, .pt or .safetensors file, or its https:// address. Nothing in it is executed.")
]
Output = Annotated[Path, typer.Argument(help="Folder to write.")]
Folder = Annotated[Path, typer.Argument(help="A Hub folder or checkpoint folder of one of our models.")]
WeightsOption = Annotated[Weights, typer.Option(help="Which weights to take if the file has both.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A config field that the file cannot tell, e.g. post_norm=true."),
]
Sha256Option = Annotated[str | None, typer.Option(help="SHA-256 the file must have; required for an address.")]
PushOption = Annotated[str | None, typer.Option(metavar="USER/NAME", help="Push the verified result to the Hub.")]
ImageSizeOption = Annotated[int | None, typer.Option(help="Resize the tables to this image size in pixels.")]


@app.callback()
def _configure(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    _options["debug"] = debug
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for library in ("httpx", "httpx2"):  # they log every address, signed ones too
        logging.getLogger(library).setLevel(logging.WARNING)


def _register() -> None:
    """What `import hf_rsheat` does elsewhere; here each verb that works does it, so that `--help` need not."""
    from hf_rsheat.auto import register

    register()


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
    _register()
    from importlib import import_module

    from hf_rsheat.conversion.common import parse_overrides
    from hf_rsheat.hub.download import fetch

    convert = import_module(f"hf_rsheat.conversion.{family}").convert
    source = fetch(checkpoint, sha256)
    folder = convert(source, output, weights=weights.value, overrides=parse_overrides(overrides or []), **options)
    typer.echo(f"Wrote {folder}")
    if push_to is not None:
        _push(folder, push_to)


def _push(folder: Path, repo: str, **options) -> None:
    from hf_rsheat.hub.push import push

    result = push(folder, repo, **options)
    if options.get("dry_run"):
        typer.echo(str(result))
    else:
        typer.echo(f"Pushed and verified: {result.pull_request or f'{result.repo_id}@{result.revision}'}")


@convert_app.command("vheat")
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


@convert_app.command("rs-vheat")
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


@convert_app.command("rs4d")
def convert_rs4d(
    checkpoint: Checkpoint,
    output: Output,
    weights: WeightsOption = Weights.MODEL,
    sha256: Sha256Option = None,
    push: PushOption = None,
    set_: SetOption = None,
    image_size: ImageSizeOption = None,
) -> None:
    """RS4D: distilled backbones, bare, from several GPUs, or inside an mmengine file."""
    _convert("rs4d", checkpoint, output, weights, set_, sha256, push, image_size=image_size)


@convert_app.command("selective-mae")
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


@app.command()
def export(folder: Folder, output: Output) -> None:
    """Write a Hub-ready folder (weights, remote code, card) from a checkpoint folder."""
    _register()
    from hf_rsheat.hub import export_folder

    typer.echo(f"Wrote {export_folder(folder, output)}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="An exported folder; it is verified first.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the Hub; created if need be.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")] = False,
) -> None:
    """Verify a folder, push it to the Hub, and verify what arrived. The same command continues an interrupted push.

    The token comes from the usual Hugging Face places (`hf auth login`, HF_TOKEN).
    """
    _register()
    _push(folder, repo, private=private or None, create_pr=create_pr, revision=revision, dry_run=dry_run)


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

    summary = run(folder, images, output, batch_size=batch_size, modality=modality)
    typer.echo(f"Wrote {output}: {summary['images']} images, {len(summary['unreadable'])} left out")


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
def serve(
    folder: Folder,
    host: Annotated[str, typer.Option(help="Address to listen on. There is no password: think before you open it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch https:// addresses named in requests.")
    ] = False,
) -> None:
    """Answer HTTP requests with a model, as Inference Endpoints do."""
    _register()
    from hf_rsheat.hub.serve import serve as run

    run(folder, host, port, allow_urls=allow_urls)


@app.command()
def space(
    folder: Annotated[Path, typer.Argument(help="An exported folder.")],
    output: Output,
    model_id: Annotated[
        str | None, typer.Option(help="Repository that holds this model; no copy is written then.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of that repository.")] = None,
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
) -> None:
    """Write a Gradio Space in which visitors try the model."""
    _register()
    from hf_rsheat.hub.space import write_space

    typer.echo(f"Wrote {write_space(folder, output, model_id=model_id, revision=revision, title=title)}")


@app.command()
def demo(
    images: Annotated[Path | None, typer.Option(help="Your own images; generated scenes if not given.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path(".demo"),
) -> None:
    """Pretrain a small RS-vHeat, export it, load it as a stranger would, and draw what it does."""
    from hf_rsheat.demo import run

    run(images, output)


@bench_app.command("scan")
def bench_scan(
    batch: Annotated[int, typer.Option(min=1, help="Sequences; two directions of one image by default.")] = 2,
    length: Annotated[int, typer.Option(min=1, help="Time steps; patches of a 1024 px image by default.")] = 4096,
    channels: Annotated[int, typer.Option(min=1)] = 512,
    state: Annotated[int, typer.Option(min=1)] = 16,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
    backend: Annotated[str, typer.Option(help="Our scan backend: torch or associative.")] = "torch",
    memory: Annotated[bool, typer.Option(help="Also measure memory, one fresh process each.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Our selective scan and mixer against transformers', interleaved in one process."""
    import json

    from hf_rsheat import scan_benchmark

    size = scan_benchmark.ScanSize(batch, length, channels, state, threads, backend)
    result = scan_benchmark.bench_scan(size, repeats=repeats, memory=memory)
    typer.echo(json.dumps(result, indent=2) if as_json else scan_benchmark.report(result))


@bench_app.command("pretraining")
def bench_pretraining(
    preset: Annotated[str, typer.Option(help="Size of the encoder: small, base, large or huge.")] = "base",
    batch: Annotated[int, typer.Option(min=1, help="Images per step.")] = 8,
    image_size: Annotated[int, typer.Option(min=32, help="Side of the images, pixels.")] = 224,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; with 1, processor time is counted.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each model.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """SelectiveMAE's pretraining step against transformers' MAE, interleaved in one process."""
    import torch

    from hf_rsheat.pretraining_benchmark import benchmark_pretraining

    torch.set_num_threads(threads)
    typer.echo(benchmark_pretraining(preset, batch, image_size, steps, device).table())


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
