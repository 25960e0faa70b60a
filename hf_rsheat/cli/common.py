"""What the verbs share."""

from pathlib import Path
from typing import Annotated

import typer

Output = Annotated[Path, typer.Argument(help="Folder to write.")]
Folder = Annotated[Path, typer.Argument(help="A Hub folder or checkpoint folder of one of our models.")]


def register_models() -> None:
    """What `import hf_rsheat` does elsewhere; here each verb that works does it, so that `--help` need not."""
    from hf_rsheat.auto import register

    register()
