"""`hf-rsheat <verb>`. Every verb imports what it needs when it runs, so that `--help` answers at once."""

import logging
import sys
from typing import Annotated

import typer

from ..errors import HFRSHeatError
from . import bench, convert, distill, evaluation, hub, runs, slimming

app = typer.Typer(
    name="hf-rsheat",
    help="Small, fast, explainable remote-sensing vision backbones for the Hugging Face Hub.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _verb in (
    convert.convert,
    hub.export,
    hub.card,
    hub.verify,
    hub.push,
    evaluation.embed,
    evaluation.evaluate,
    hub.serve,
    hub.space,
    slimming.slim,
    slimming.redundancy,
    runs.plan,
    runs.runs,
    runs.plot,
    evaluation.demo,
):
    app.command()(_verb)
app.add_typer(distill.app, name="distill")
app.add_typer(bench.app, name="bench")

_options = {"debug": False}


@app.callback()
def _configure(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    _options["debug"] = debug
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for library in ("httpx", "httpx2", "onnx_ir", "onnxscript"):  # the first two log every address, signed ones too
        logging.getLogger(library).setLevel(logging.WARNING)


def main() -> None:
    """Entry point: bad input gets one clear sentence and exit status 1; `--debug` shows the traceback."""
    try:
        app()
    except (HFRSHeatError, ValueError, OSError) as error:
        if _options["debug"]:
            raise
        typer.secho(f"Error: {error}", err=True, fg=typer.colors.RED)
        sys.exit(1)
