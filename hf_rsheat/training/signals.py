"""Stopping in good order: what a training process does when it is told to stop, or when its launcher dies."""

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

# A number of its own: the kernel's notice that the launcher died must not pass for a second, impatient SIGTERM.
LAUNCHER_DIED = getattr(signal, "SIGRTMIN", signal.SIGTERM)
_PR_SET_PDEATHSIG = 1
_ECHO_SECONDS = 1.0


def signal_on_parent_death(number: int) -> None:
    """Have the kernel send a signal to this process when its parent dies, however it dies.

    Linux only (`PR_SET_PDEATHSIG`). Elsewhere nothing happens, and a process whose launcher was killed trains on.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def detach_loader(worker_id: int) -> None:
    """`worker_init_fn` of data loaders: a loader process lives exactly as long as its training process.

    A signal to the process group (Ctrl-C, a launcher's SIGTERM) must not reach it, since the training process still
    reads a batch before it saves.
    """
    signal_on_parent_death(signal.SIGKILL)
    if hasattr(os, "setsid"):
        os.setsid()


class StopRequest:
    """Notes SIGTERM, SIGINT and the launcher's death while a run is inside of it; a context manager.

    The same signal a second time ends the process at once. Within a second of the first it counts as the same one:
    launchers pass on what a terminal or a cluster has sent to the whole group already. Signals that are ignored when
    the run begins stay ignored (`nohup`, background jobs of a script). Outside of the main thread, where Python allows
    no handlers, nothing is noted.
    """

    def __init__(self) -> None:
        self._first: dict[int, float] = {}
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in {signal.SIGINT, signal.SIGTERM, LAUNCHER_DIED}:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number not in self._first:
            self._first[number] = now
            # No logging here: the handler may interrupt a log call that holds its lock.
            os.write(2, b"\nStopping after a checkpoint. The same signal again stops at once and saves nothing.\n")
        elif now - self._first[number] > _ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @property
    def flags(self) -> list[float]:
        """[asked by SIGINT, asked otherwise] as 0.0 or 1.0: their sums over all processes go into `exit_status`."""
        return [float(signal.SIGINT in self._first), float(bool(self._first.keys() - {signal.SIGINT}))]


def exit_status(interrupted: float, terminated: float) -> int:
    """What a run that was told to stop exits with: 143, or 130 where SIGINT was the only signal; 0 if it was not."""
    if terminated:
        return 128 + signal.SIGTERM
    return 128 + signal.SIGINT if interrupted else 0
