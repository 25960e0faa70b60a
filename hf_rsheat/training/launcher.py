"""The process that started this one, and the command that continues a run."""

import os
import shlex
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from .signals import LAUNCHER_DIED, signal_on_parent_death

MODULE = "hf_rsheat.train"


@cache
def launcher_command() -> list[str] | None:
    """Command line of the parent process, if it is what started the training (`accelerate launch -m hf_rsheat.train`).

    None for a shell, a terminal or a cluster's daemon, and on systems without /proc. Looked up once, at the start: the
    launcher may be gone when it is asked for.
    """
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return None
    return words if MODULE in words else None


def follow_launcher() -> None:
    """Be told when the launcher dies. A shell may go: `nohup python -m hf_rsheat.train &` outlives its terminal."""
    if launcher_command() is not None:
        signal_on_parent_death(LAUNCHER_DIED)


def resume_command(arguments: Sequence[str], checkpoint: str | None = None) -> str:
    """The command that continues this run, for a person to copy.

    Args:
        arguments: What the training module was called with.
        checkpoint: The checkpoint named after `--resume` among them; the run has newer ones now.
    """
    words = launcher_command() or [sys.executable, "-m", MODULE, *arguments]
    if len(words) > 1 and Path(words[1]).name in ("accelerate", "torchrun"):  # words[0] is their Python
        words = [Path(words[1]).name, *words[2:]]
    return shlex.join([*(word for word in words if word not in ("--resume", checkpoint)), "--resume"])
