"""`hf-rsheat bench`: measured speed and memory."""

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Measure speed and memory beside other people's code.")


@app.command("scan")
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

    from hf_rsheat.benchmarks import scan

    size = scan.ScanSize(batch, length, channels, state, threads, backend)
    result = scan.bench_scan(size, repeats=repeats, memory=memory)
    typer.echo(json.dumps(result, indent=2) if as_json else scan.report(result))


@app.command("pretraining")
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

    from hf_rsheat.benchmarks.pretraining import benchmark_pretraining

    torch.set_num_threads(threads)
    typer.echo(benchmark_pretraining(preset, batch, image_size, steps, device).table())
