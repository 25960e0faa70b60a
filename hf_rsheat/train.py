"""Entry point of training.

    accelerate launch -m hf_rsheat.train --config recipe.yaml [key=value ...] [--resume [CHECKPOINT]]

`python -m hf_rsheat.train` does the same in one process; several CPU processes need
`ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m hf_rsheat.train ...`.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from .errors import HFRSHeatError, RunInterrupted
from .training.launcher import follow_launcher, resume_command


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="hf_rsheat.train", description="Train a model as a recipe says and export a Hub-ready folder."
    )
    parser.add_argument("--config", metavar="RECIPE.yaml", help="the recipe; see examples/")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="continue from the newest sound checkpoint of output_dir, or from the given one",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check recipe, data and model, print the plan, and write nothing"
    )
    parser.add_argument("--debug", action="store_true", help="show where an error was raised")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace recipe entries, e.g. batch_size=32")
    options = parser.parse_intermixed_args(arguments)
    if isinstance(options.resume, str) and "=" in options.resume and not os.path.exists(options.resume):
        options.overrides.insert(0, options.resume)  # `--resume batch_size=32`
        options.resume = True
    if options.config is None and not options.overrides:
        parser.error("give --config RECIPE.yaml or key=value pairs")
    return options


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _configure_logging() -> None:
    """Messages of the main process on stderr; the others only warn."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("hf_rsheat").setLevel(logging.INFO if _is_main() else logging.ERROR)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for errors, 143 after SIGTERM, 130 after Ctrl-C."""
    follow_launcher()
    options = _parse(arguments)
    _configure_logging()
    # Imported here: `--help` and typing errors should not wait for torch.
    from tqdm.contrib.logging import logging_redirect_tqdm
    from transformers.utils.logging import disable_progress_bar

    from .training.loop import train
    from .training.planning import dry_run
    from .training.recipe import load_recipe

    disable_progress_bar()  # one bar is enough: saving the weights of a checkpoint would draw its own
    try:
        recipe = load_recipe(options.config, options.overrides)
        if options.dry_run:
            plan = dry_run(recipe, resume=options.resume)
            if _is_main():
                print(plan)
            return 0
        with logging_redirect_tqdm():
            train(recipe, resume=options.resume)
    except RunInterrupted as stopped:
        if _is_main():
            command = resume_command(sys.argv[1:] if arguments is None else arguments, options.resume)
            print(f"{stopped} Continue with:\n    {command}", file=sys.stderr)
        return stopped.status
    except (HFRSHeatError, OSError) as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
