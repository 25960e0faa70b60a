"""One writer per run folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import RunInUseError

LOCK = ".lock"
_PATIENCE = 15.0


@contextmanager
def run_lock(output_dir: Path) -> Iterator[None]:
    """Hold a run folder for the first process of a run; the others pass, since only that one writes.

    The operating system frees the lock when the process ends, however it ends. A run whose launcher was killed may
    still be saving its last checkpoint, so the folder is waited for a little.

    Raises:
        RunInUseError: If another run keeps the folder.
    """
    if int(os.environ.get("RANK", 0)) != 0:
        yield
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output_dir / LOCK)
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        raise RunInUseError(
            f"Another process is writing to {output_dir}: wait until it ends or stop it, or set another output_dir."
        ) from None
    try:
        yield
    finally:
        lock.release()


def is_running(output_dir: Path) -> bool:
    """Whether a run holds the folder now, on this machine or through a file system that shares locks."""
    if not (output_dir / LOCK).exists():
        return False
    lock = FileLock(output_dir / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False
