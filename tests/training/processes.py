"""Training in processes of its own, so that they can be signalled and killed.

They are forked from a server that has imported everything, which takes tenths of a second instead of many. It computes
nothing itself, so that a child starts like a fresh process.
"""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from hf_rsheat.training.journal import read_lines
from hf_rsheat.training.recipe import Recipe

from .conftest import TINY_MODEL

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["hf_rsheat.train", "hf_rsheat.training.loop", "hf_rsheat.training.objectives.rs_vheat", __name__]
)
CLOCK = ("samples_per_second", "data_wait")


def _train(recipe_file: str, resume: bool, environment: dict[str, str], log: str, prepare: Callable | None) -> None:
    os.setsid()  # a signal to the group of this training must not reach the tests
    os.environ.update(environment, OMP_NUM_THREADS="1")
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    from hf_rsheat.train import main

    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    sys.exit(main(["--config", recipe_file, *(["--resume"] if resume else [])]))


def tiny(scenes: Path, output_dir: Path, **changes: Any) -> Recipe:
    """A recipe of 24 small steps; keyword arguments replace its entries."""
    values = {
        "objective": "rs_vheat",
        "image_folder": str(scenes),
        "output_dir": str(output_dir),
        "image_size": 32,
        "model": dict(TINY_MODEL),
        "batch_size": 4,
        "max_steps": 24,
        "save_steps": 100,
        "learning_rate": 1e-3,
        "num_workers": 0,
        "trackers": [],
    }
    return Recipe(**{**values, **changes})


class Training:
    """One run in one or several processes (gloo).

    Args:
        recipe: What to train.
        resume: Whether to continue.
        processes: How many.
        prepare: Called in every process before training, e.g. to slow a part down; a function of a module.
    """

    def __init__(
        self, recipe: Recipe, resume: bool = False, processes: int = 1, prepare: Callable | None = None
    ) -> None:
        self.output_dir = Path(recipe.output_dir)
        file = self.output_dir.parent / f"{self.output_dir.name}.yaml"
        recipe.save(file)
        self.log_file = file.with_suffix(".log")
        self.processes = []
        port = free_port()
        for rank in range(processes):
            environment = {} if processes == 1 else rank_environment(rank, processes, port)
            arguments = (str(file), resume, environment, str(self.log_file), prepare)
            process = _CONTEXT.Process(target=_train, args=arguments)
            process.start()
            self.processes.append(process)

    @property
    def text(self) -> str:
        """What the processes have printed."""
        return self.log_file.read_text()

    @property
    def steps(self) -> int:
        """Steps in the log so far."""
        return len(read_lines(self.output_dir / "log.jsonl"))

    def wait_for(self, condition: Callable[[], Any], seconds: float = 120) -> None:
        """Wait until something is so, or the first process has ended."""
        end = time.monotonic() + seconds
        while not condition() and self.processes[0].is_alive():
            assert time.monotonic() < end, self.text[-2000:]
            time.sleep(0.002)

    def signal(self, number: int, rank: int = 0) -> None:
        """Send a signal to one process."""
        os.kill(self.processes[rank].pid, number)

    def finish(self, seconds: float = 120) -> list[int]:
        """Wait for the end of all processes; returns their exit codes, negative for signals."""
        for process in self.processes:
            process.join(seconds)
            assert process.exitcode is not None, self.text[-2000:]
        return [process.exitcode for process in self.processes]


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def rank_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """What a launcher tells a process of several on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }


def assert_same_run(expected: str | Path, found: str | Path) -> None:
    """The logs, but for the clock, and the exported weights are equal to the bit."""
    logs = [
        [{k: v for k, v in line.items() if k not in CLOCK} for line in read_lines(Path(folder) / "log.jsonl")]
        for folder in (expected, found)
    ]
    assert logs[0] == logs[1]
    weights = [load_file(Path(folder) / "hub" / "model.safetensors") for folder in (expected, found)]
    assert weights[0].keys() == weights[1].keys()
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())
