"""`hf-rsheat distill`: what stands around a distillation into RS4D."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Distil a SAM encoder into RS4D: cached teacher maps, held-out error.")


@app.command("cache")
def cache_teacher(
    recipe: Annotated[Path, typer.Argument(help="Recipe of objective rs4d_distill that names a teacher_cache.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Recipe entries to replace, key=value.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Throw away the maps that are there.")] = False,
) -> None:
    """Compute the teacher's maps of a recipe's images once; started again, it continues."""
    from hf_rsheat.training.objectives.rs4d_distill import cache_for_recipe
    from hf_rsheat.training.recipe import load_recipe

    unreadable = cache_for_recipe(load_recipe(recipe, overrides or ()), overwrite=overwrite)
    for path, reason in unreadable.items():
        typer.echo(f"Left out {path}: {reason}")


@app.command("evaluate")
def evaluate_students(
    students: Annotated[list[Path], typer.Argument(help="Exported folders or checkpoints of rs4d_distill.")],
    teacher: Annotated[Path, typer.Option(help="Folder of the SAM or SAM 2 model they imitate.")],
    images: Annotated[Path, typer.Option(help="Folder of held-out images.")],
    reference: Annotated[Path, typer.Option(help="Folder of the training images: their mean map is the baseline.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Error of students' maps on held-out images, beside predicting the teacher's mean map."""
    import json

    from hf_rsheat.evaluation.distillation import evaluate_distillation, report
    from hf_rsheat.training.teacher import Teacher

    result = evaluate_distillation(students, Teacher(teacher), images, reference)
    typer.echo(json.dumps(result, indent=2) if as_json else report(result))
