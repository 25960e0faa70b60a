"""Verbs that look at what a model knows: embed, evaluate, demo."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .common import Folder, register_models


class Task(StrEnum):
    """What `evaluate` measures."""

    KNN = "knn"
    LINEAR = "linear"
    CLASSIFY = "classify"


def embed(
    folder: Folder,
    images: Annotated[Path, typer.Argument(help="Folder of images, searched recursively.")],
    output: Annotated[Path, typer.Argument(help="Parquet file to write: one row per image.")],
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    modality: Annotated[str | None, typer.Option(help="Sensor of the images (RS-vHeat).")] = None,
) -> None:
    """Write one feature vector per image, with its path, to a Parquet file."""
    register_models()
    from hf_rsheat.evaluation import embed as run

    summary = run(folder, images, output, batch_size=batch_size, modality=modality)
    typer.echo(f"Wrote {output}: {summary['images']} images, {len(summary['unreadable'])} left out")


def evaluate(
    folder: Folder,
    data: Annotated[
        Path, typer.Option(help="Folder with one sub-folder of images per class; for a detector its COCO file.")
    ],
    task: Annotated[Task, typer.Option(help="Probe frozen features, or test a classifier.")] = Task.KNN,
    output: Annotated[Path | None, typer.Option(help="JSON file to write; model cards read it.")] = None,
    folds: Annotated[int, typer.Option(min=2)] = 5,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    neighbours: Annotated[int, typer.Option("--k", min=1, help="Neighbours of the k-NN probe.")] = 5,
    baselines: Annotated[
        bool, typer.Option(help="Also the untrained network and a colour and gradient histogram.")
    ] = True,
    batch_size: Annotated[int | None, typer.Option(min=1, help="32 if not given; 4 for a detector.")] = None,
    modality: Annotated[str | None, typer.Option(help="Sensor of the images (RS-vHeat).")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the COCO file's images: measures average precision of a detector.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG of a detector's finds, misses and false alarms.")] = None,
    score_threshold: Annotated[float, typer.Option(help="For a detector's confusion table and picture.")] = 0.5,
) -> None:
    """Measure a model on labelled images, with intervals and baselines; a detector with COCO's average precision."""
    register_models()
    if images is not None:
        from hf_rsheat.evaluation.instances import evaluate_instances, report_instances

        found = evaluate_instances(
            folder,
            data,
            images,
            output,
            picture=picture,
            score_threshold=score_threshold,
            batch_size=batch_size or 4,
        )
        typer.echo(report_instances(found))
        return
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
        batch_size=batch_size or 32,
        modality=modality,
        output_json=output,
    )
    typer.echo(report(result))


def demo(
    images: Annotated[Path | None, typer.Option(help="Your own images; generated scenes if not given.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path(".demo"),
) -> None:
    """Pretrain a small RS-vHeat, export it, load it as a stranger would, and draw what it does."""
    from hf_rsheat.demo import run

    run(images, output)
