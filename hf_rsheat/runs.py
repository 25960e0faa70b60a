"""What run folders tell: which runs there are, how far they came, and their curves."""

import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError, HFRSHeatError
from .training.journal import NOT_FINITE, read_lines
from .training.locking import is_running
from .training.recipe import load_recipe

logger = logging.getLogger(__name__)

_POINTS = 400  # a curve shows means of windows, at most this many


@dataclass(frozen=True)
class RunSummary:
    """One run.

    Args:
        folder: The run folder.
        objective: What it learns.
        state: `running`, `finished`, `stopped` (it can be continued with --resume) or `not finite`.
        step: Steps in the log.
        max_steps: Steps to reach.
        best_loss: Lowest mean loss of an epoch, over its images; None before the first step.
        best_epoch: That epoch, from 0. The last one counts when it has had as many images as the one before it.
    """

    folder: Path
    objective: str
    state: str
    step: int
    max_steps: int
    best_loss: float | None
    best_epoch: int | None


def find_runs(folder: Path) -> list[RunSummary]:
    """Summaries of the runs in and below a folder, by path; folders that cannot be read are named in the log.

    Raises:
        DataError: If there are none.
    """
    runs: list[RunSummary] = []
    for path in _run_folders(folder):
        try:
            runs.append(summarize(path))
        except (HFRSHeatError, ValueError, KeyError) as error:
            logger.warning("Cannot read the run %s: %s", path, error)
    if not runs:
        raise DataError(f"No runs in '{folder}': give a folder with run folders, which hold recipe.yaml and log.jsonl.")
    return runs


def _run_folders(folder: Path) -> Iterator[Path]:
    for root, directories, files in os.walk(folder):
        if "recipe.yaml" in files and "log.jsonl" in files:
            yield Path(root)
            directories.clear()  # a run's own folders hold no runs
        directories.sort()


def summarize(folder: Path) -> RunSummary:
    """The state of one run."""
    recipe = load_recipe(folder / "recipe.yaml")
    records = read_lines(folder / "log.jsonl")
    step = records[-1]["step"] if records else 0
    epochs = _epoch_losses(records)
    best = min(epochs, key=lambda epoch: epochs[epoch]) if epochs else None
    loss = None if best is None else epochs[best]
    state = _state(folder, step, recipe.max_steps)
    return RunSummary(folder, recipe.objective, state, step, recipe.max_steps, loss, best)


def _state(folder: Path, step: int, max_steps: int) -> str:
    if is_running(folder):
        return "running"
    broken = folder / NOT_FINITE
    if broken.exists() and json.loads(broken.read_text(encoding="utf-8"))["step"] == step:
        return "not finite"
    return "finished" if step >= max_steps and (folder / "hub" / "config.json").exists() else "stopped"


def _epoch_losses(records: Sequence[dict[str, Any]]) -> dict[int, float]:
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for record in records:
        if record["loss"] is not None:
            sums[record["epoch"]][0] += record["loss"] * record["images"]
            sums[record["epoch"]][1] += record["images"]
    *earlier, last = sorted(sums) or [0]
    if earlier and sums[last][1] < sums[earlier[-1]][1]:
        del sums[last]
    return {epoch: total / images for epoch, (total, images) in sums.items()}


def runs_table(runs: Sequence[RunSummary], root: Path) -> str:
    """A table of runs for the terminal."""
    rows = [("run", "objective", "state", "step", "best loss of an epoch")]
    for run in runs:
        best = "-" if run.best_loss is None else f"{run.best_loss:.4g} (epoch {run.best_epoch})"
        name = os.path.relpath(run.folder, root)
        rows.append((name, run.objective, run.state, f"{run.step}/{run.max_steps}", best))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def plot_runs(folders: Sequence[Path], path: Path, terms: Sequence[str] = ("loss",)) -> Path:
    """Draw curves of runs over their steps, one panel per term.

    Args:
        folders: Run folders.
        path: The picture to write; the suffix decides the format (png, svg, pdf).
        terms: Entries of the log, e.g. `loss`, `grad_norm`, `samples_per_second`.

    Returns:
        The path.

    Raises:
        DataError: If a folder has no log, or no run has one of the terms.
        MissingExtraError: If matplotlib is not installed.
    """
    from .figures import new_figure

    logs = {folder: read_lines(folder / "log.jsonl") for folder in folders}
    for folder, records in logs.items():
        if not records:
            raise DataError(f"'{folder}' has no log.jsonl with steps: give run folders.")
    figure = new_figure(9, 4.5 * len(terms))
    for index, term in enumerate(terms):
        axis = figure.add_subplot(len(terms), 1, index + 1)
        curves = {folder: _curve(records, term) for folder, records in logs.items()}
        if not any(len(steps) for steps, _ in curves.values()):
            raise DataError(f"No run has '{term}': the logs have {', '.join(sorted(logs[folders[0]][-1]))}.")
        for folder, (steps, values) in curves.items():
            axis.plot(steps, values, label=folder.name if len(folders) > 1 else None, linewidth=1.5)
        axis.set(xlabel="step", ylabel=term)
        axis.grid(alpha=0.3)
        if len(folders) > 1:
            axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    return path


def _curve(records: Sequence[dict[str, Any]], term: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a term, means of windows where there are many."""
    points = [(record["step"], record[term]) for record in records if isinstance(record.get(term), int | float)]
    windows = np.array_split(np.array(points, dtype=float).reshape(-1, 2), min(_POINTS, max(1, len(points))))
    means = np.array([window.mean(0) for window in windows if len(window)]).reshape(-1, 2)
    return means[:, 0], means[:, 1]
