"""How everything is measured: contestants take turns in one process, memory in a fresh process each.

Whatever else the machine does then falls on all of them, and what counts is the ratio of the fastest rounds.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigurationError

_PROCESS = Path("/proc/self")


def conditions() -> dict[str, Any]:
    """What the times depend on: processor, threads, load and versions."""
    versions = {}
    for name in ("torch", "transformers", "timm"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": load(),
        "device": device,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "versions": versions,
    }


def load() -> float:
    """Mean number of running processes over the last minute; more than the cores means noisy times."""
    return round(os.getloadavg()[0], 2)


def take_turns(
    contestants: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of every round and contestant; `warmup` rounds before them are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(-warmup, repeats):
        for name, run in contestants.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def summary(seconds: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """`minimum` and `median` seconds of each contestant, and `ratio` of its minimum to that of the first one."""
    first = min(next(iter(seconds.values())))
    return {
        name: {"minimum": min(values), "median": statistics.median(values), "ratio": min(values) / first}
        for name, values in seconds.items()
    }


def peak_memory(run: Callable[[], Any], device: str = "cpu") -> dict[str, float]:
    """Peak of the memory during one run, in MB: above what import, weights and input take, and in total.

    On a CPU this is the resident memory and means anything only in a fresh process, see [`in_fresh_process`].
    """
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated()
        return {"above_start": (peak - before) / 2**20, "total": peak / 2**20}
    (_PROCESS / "clear_refs").write_text("5")  # forget the peak so far: importing may have needed more than is kept
    resident = _megabytes("VmRSS")
    run()
    total = _megabytes("VmHWM")  # not getrusage: its peak survives fork and exec, so it would be the parent's
    return {"above_start": max(0.0, total - resident), "total": total}


def _megabytes(field: str) -> float:
    line = next(line for line in (_PROCESS / "status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def in_fresh_process(module: str, arguments: Any) -> Any:
    """What `python -m module ARGUMENTS` prints last, both JSON.

    Raises:
        ConfigurationError: The system does not tell a process's peak memory (not Linux).
    """
    if not _PROCESS.is_dir():
        raise ConfigurationError("Memory is measured on Linux only: leave it out (--no-memory).")
    command = [sys.executable, "-m", module, json.dumps(arguments)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode != 0:
        raise RuntimeError(f"Measuring {arguments} failed:\n{child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1])
