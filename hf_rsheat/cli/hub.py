"""Verbs around Hub-ready folders: export, card, verify, push, serve, space."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .common import Folder, Output, register_models


def push_folder(folder: Path, repo: str, **options) -> None:
    from hf_rsheat.hub.push import push as run

    result = run(folder, repo, **options)
    if options.get("dry_run"):
        typer.echo(str(result))
    else:
        typer.echo(f"Pushed and verified: {result.pull_request or f'{result.repo_id}@{result.revision}'}")


class Format(StrEnum):
    """What `export` writes."""

    HUB = "hub"
    ONNX = "onnx"
    OPENVINO = "openvino"


def export(
    folder: Folder,
    output: Annotated[Path, typer.Argument(help="Folder to write; for the other formats the file (.onnx, .xml).")],
    format_: Annotated[
        Format, typer.Option("--format", help="A Hub-ready folder, or a graph for onnxruntime or OpenVINO.")
    ] = Format.HUB,
    image_size: Annotated[
        int | None, typer.Option(min=32, help="Side of the images that a graph is checked with.")
    ] = None,
    modality: Annotated[str | None, typer.Option(help="Sensor that a graph is written for (RS-vHeat).")] = None,
) -> None:
    """Write a Hub-ready folder (weights, remote code, card) from a checkpoint folder, or a graph for a runtime."""
    register_models()
    if format_ is Format.HUB:
        from hf_rsheat.hub import export_folder

        typer.echo(f"Wrote {export_folder(folder, output)}")
        return
    if format_ is Format.ONNX:
        from hf_rsheat.hub.onnx import export_folder_onnx as export_graph
    else:
        from hf_rsheat.hub.openvino import export_folder_openvino as export_graph
    differences = export_graph(folder, output, image_size=image_size, modality=modality)
    worst = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    typer.echo(f"Wrote {output}; largest differences from PyTorch, of the largest value: {worst}")


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
    register_models()
    push_folder(folder, repo, private=private or None, create_pr=create_pr, revision=revision, dry_run=dry_run)


def card(
    folder: Annotated[Path, typer.Argument(help="An exported folder.")],
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="Results of `hf-rsheat evaluate` on these weights, to show in the card.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="An image to draw a pretraining model's picture of.")] = None,
) -> None:
    """Render the model card of a folder, with evaluation results and a picture."""
    register_models()
    from hf_rsheat.hub.card import add_evaluation, add_picture
    from hf_rsheat.hub.export import finish

    for result in evaluation or []:
        add_evaluation(folder, result)
    if picture is not None:
        add_picture(folder, picture)
    finish(folder)
    typer.echo(f"Wrote {folder / 'README.md'}")


def verify(
    folder: Annotated[str, typer.Argument(help="A folder, or a Hub repository user/name[@revision].")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Check hashes, tensors, code, outputs and card of a folder.

    Exit status 0 if all hold, 1 if one fails, 3 if it is a plain save_pretrained folder.
    """
    register_models()
    from hf_rsheat.hub import verify as run

    report = run(folder)
    typer.echo(report.to_json() if as_json else str(report))
    if not report.ok:
        raise typer.Exit(3 if report.is_plain else 1)


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
    register_models()
    from hf_rsheat.hub.serve import serve as run

    run(folder, host, port, allow_urls=allow_urls)


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
    register_models()
    from hf_rsheat.hub.space import write_space

    typer.echo(f"Wrote {write_space(folder, output, model_id=model_id, revision=revision, title=title)}")
