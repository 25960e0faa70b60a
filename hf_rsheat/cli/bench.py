"""`hf-rsheat bench`: measured speed and memory."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Measure speed and memory beside other people's code.")


# Options that several benchmarks share.
Sizes = Annotated[str, typer.Option(help="Sides of the images in pixels, with commas.")]
Batches = Annotated[str, typer.Option(help="Images at once, with commas.")]
Threads = Annotated[int, typer.Option(min=1)]
Rounds = Annotated[int, typer.Option(min=1, help="Timed rounds.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
WithMemory = Annotated[bool, typer.Option(help="Also measure memory, one fresh process each.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Chart = Annotated[Path | None, typer.Option(help="PNG of time against image size.")]
Check = Annotated[Path | None, typer.Option(help="Earlier JSON: fail if a ratio is over 10 % worse.")]


class Precision(StrEnum):
    """Type of weights and images."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@app.command("backbone")
def bench_backbone(
    models: Annotated[
        str,
        typer.Option(
            help="Names with commas, ratios to the first; `timm:<model>` for timm's, `<name>+fused` for fused."
        ),
    ] = "convnext-tiny,swin-tiny,vheat-tiny",
    size: Sizes = "224",
    batch: Batches = "1",
    dtype: Annotated[Precision, typer.Option(help="Type of weights and images.")] = Precision.FLOAT32,
    compiled: Annotated[bool, typer.Option("--compile", help="Through torch.compile.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Forward and backward pass instead of inference.")] = False,
    threads: Threads = 1,
    repeats: Rounds = 5,
    device: Device = "cpu",
    memory: WithMemory = True,
    as_json: AsJson = False,
    chart: Chart = None,
    check: Check = None,
) -> None:
    """Whole backbones, ours and others', interleaved in one process."""
    from hf_rsheat.benchmarks import backbone

    result = backbone.bench_backbone(
        models.split(","),
        _numbers("--size", size),
        _numbers("--batch", batch),
        repeats=repeats,
        memory=memory,
        dtype=dtype.value,
        compiled=compiled,
        train=train,
        threads=threads,
        device=device,
    )
    _show(result, as_json, chart, check)


def _show(
    result: dict[str, Any],
    as_json: bool,
    chart: Path | None,
    check: Path | None,
    draw: Callable[[dict[str, Any], Path], None] | None = None,
) -> None:
    import json

    from hf_rsheat.benchmarks import report

    typer.echo(json.dumps(result, indent=2) if as_json else report.table(result))
    if chart is not None:
        (draw or report.chart)(result, chart)
    if check is not None:
        lines = report.check(result, json.loads(check.read_text(encoding="utf-8")))
        typer.echo("\n".join(["", "Beside the stored ratios:", *lines]), err=as_json)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"whole numbers with commas, got '{text}'.", param_hint=option) from error


@app.command("heat")
def bench_heat(
    size: Annotated[str, typer.Option(help="Sides of the images in pixels, with commas; maps have a quarter.")] = "224",
    batch: Annotated[str, typer.Option(help="Maps at once, with commas.")] = "1",
    channels: Annotated[int, typer.Option(min=1, help="Of the map.")] = 96,
    threads: Threads = 1,
    repeats: Rounds = 5,
    memory: WithMemory = True,
    as_json: AsJson = False,
    chart: Chart = None,
    check: Check = None,
) -> None:
    """The heat conduction operator alone, beside its restated original and an FFT; with the machine's limits."""
    from hf_rsheat.benchmarks import heat

    sizes, batches = _numbers("--size", size), _numbers("--batch", batch)
    result = heat.bench_heat(sizes, batches, channels=channels, threads=threads, repeats=repeats, memory=memory)
    _show(result, as_json, chart, check)


@app.command("scan")
def bench_scan(
    batch: Annotated[int, typer.Option(min=1, help="Sequences; two directions of one image by default.")] = 2,
    length: Annotated[int, typer.Option(min=1, help="Time steps; patches of a 1024 px image by default.")] = 4096,
    channels: Annotated[int, typer.Option(min=1)] = 512,
    state: Annotated[int, typer.Option(min=1)] = 16,
    threads: Threads = 1,
    repeats: Rounds = 5,
    backend: Annotated[str, typer.Option(help="Our scan backend: torch or associative.")] = "torch",
    memory: WithMemory = True,
    as_json: AsJson = False,
) -> None:
    """Our selective scan and mixer against transformers', interleaved in one process."""
    import json

    from hf_rsheat.benchmarks import scan

    size = scan.ScanSize(batch, length, channels, state, threads, backend)
    result = scan.bench_scan(size, repeats=repeats, memory=memory)
    typer.echo(json.dumps(result, indent=2) if as_json else scan.report(result))


@app.command("instances")
def bench_instances(
    models: Annotated[
        str, typer.Option(help="Names with commas, ratios to the first.")
    ] = "mask2former-swin-tiny,rs4d-base-bbox,rs4d-base-prompt,maskrcnn-resnet50-v2,rf-detr-seg-medium",
    size: Sizes = "512,1024",
    batch: Batches = "1",
    threads: Threads = 1,
    repeats: Rounds = 3,
    device: Device = "cpu",
    memory: WithMemory = True,
    as_json: AsJson = False,
    chart: Chart = None,
    check: Check = None,
) -> None:
    """RS4D's detectors and others', random weights, interleaved in one process.

    Two-stage detectors keep as many proposals and detections as published, whatever their scores; masks are not pasted.
    """
    from hf_rsheat.benchmarks import instances

    result = instances.bench_instances(
        models.split(","),
        _numbers("--size", size),
        _numbers("--batch", batch),
        repeats=repeats,
        memory=memory,
        threads=threads,
        device=device,
    )
    _show(result, as_json, chart, check)


@app.command("pretraining")
def bench_pretraining(
    preset: Annotated[str, typer.Option(help="Size of the encoder: small, base, large or huge.")] = "base",
    batch: Annotated[int, typer.Option(min=1, help="Images per step.")] = 8,
    image_size: Annotated[int, typer.Option(min=32, help="Side of the images, pixels.")] = 224,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; with 1, processor time is counted.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each model.")] = 5,
    device: Device = "cpu",
) -> None:
    """SelectiveMAE's pretraining step against transformers' MAE, interleaved in one process."""
    import torch

    from hf_rsheat.benchmarks.pretraining import benchmark_pretraining

    torch.set_num_threads(threads)
    typer.echo(benchmark_pretraining(preset, batch, image_size, steps, device).table())


@app.command("slim")
def bench_slim(
    models: Annotated[str, typer.Option(help="Names with commas, as for `bench backbone`.")] = "vheat-tiny,vit-base",
    widths: Annotated[str, typer.Option(help="Shares of the inner units, with commas; 1 is added.")] = "0.75,0.5,0.25",
    size: Sizes = "224",
    batch: Batches = "1",
    threads: Threads = 1,
    repeats: Rounds = 5,
    device: Device = "cpu",
    memory: WithMemory = True,
    as_json: AsJson = False,
    chart: Annotated[Path | None, typer.Option(help="PNG of time and arithmetic against width.")] = None,
    check: Check = None,
) -> None:
    """Models cut to shares of their width, beside the full ones."""
    from hf_rsheat.benchmarks import slim

    try:
        shares = [float(part) for part in widths.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"numbers with commas, got '{widths}'.", param_hint="--widths") from error
    result = slim.bench_slim(
        models.split(","),
        shares,
        sizes=_numbers("--size", size),
        batches=_numbers("--batch", batch),
        repeats=repeats,
        memory=memory,
        threads=threads,
        device=device,
    )
    _show(result, as_json, chart, check, draw=slim.chart)
