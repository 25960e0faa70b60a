"""`hf-rsheat runs | plot | plan`: what training runs did and what they would need."""

from pathlib import Path
from typing import Annotated

import typer


def runs(folder: Annotated[Path, typer.Argument(help="Folder with run folders.")] = Path(".")) -> None:
    """List training runs with their state and best loss."""
    from hf_rsheat.runs import find_runs, runs_table

    typer.echo(runs_table(find_runs(folder), folder))


def plot(
    folders: Annotated[list[Path], typer.Argument(help="Run folders.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write (png, svg, pdf).")] = Path(
        "runs.png"
    ),
    term: Annotated[list[str] | None, typer.Option(help="Entry of the log; repeat it for more panels.")] = None,
) -> None:
    """Draw the curves of training runs."""
    from hf_rsheat.runs import plot_runs

    typer.echo(plot_runs(folders, output, term or ["loss"]))


def plan(
    recipe: Annotated[Path, typer.Argument(help="Recipe of a training run (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value pairs, e.g. batch_size=512.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    gpu_memory: Annotated[float, typer.Option(min=1, help="Memory of each GPU in GB.")] = 80,
    sharded: Annotated[bool, typer.Option(help="Plan for FSDP2 instead of DDP.")] = False,
) -> None:
    """Estimate the memory a recipe needs per GPU, and the largest batch that fits."""
    from hf_rsheat.training.memory import plan
    from hf_rsheat.training.recipe import load_recipe

    typer.echo(plan(load_recipe(recipe, overrides or []), gpus, gpu_memory, sharded))
