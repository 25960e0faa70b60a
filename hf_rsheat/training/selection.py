"""The best checkpoint of a run: measured whenever one is saved, kept, and exported in the end."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from transformers import PreTrainedModel

from .journal import read_lines
from .objectives import Objective

logger = logging.getLogger(__name__)

EVALUATIONS = "evaluations.jsonl"


class Selection:
    """Evaluates the model at checkpoints and remembers which is the best, for objectives that can evaluate.

    Measurements stand in `evaluations.jsonl`, one line each, written before the checkpoint is saved: a killed run
    repeats both or neither.

    Args:
        objective: The run's objective; one without `best_by` is never evaluated.
        accelerator: The run's accelerator; every process evaluates its share.
        output_dir: The run folder.
        first_step: Steps done before this run; later measurements are being repeated and are dropped.
    """

    def __init__(self, objective: Objective, accelerator: Accelerator, output_dir: Path, first_step: int) -> None:
        self._objective = objective
        self._accelerator = accelerator
        self._output_dir = output_dir
        self._lines = [line for line in read_lines(output_dir / EVALUATIONS) if line["step"] <= first_step]

    @property
    def best(self) -> int | None:
        """Step of the best checkpoint that is there, the earliest of equals; None without a measurement."""
        metric = str(self._objective.best_by)
        present = [line for line in self._lines if (self._output_dir / f"checkpoint-{line['step']}").is_dir()]
        return max(present, key=lambda line: line.get(metric, -1.0))["step"] if present else None

    def measure(self, model: PreTrainedModel, step: int) -> None:
        """Evaluate the model after a step; called on every process."""
        if self._objective.best_by is None:
            return
        if self._accelerator.num_processes > 1:
            # Batch norms have seen other images in each process; those of the first one are saved.
            for buffer in model.buffers():
                broadcast(buffer)
        share = slice(self._accelerator.process_index, None, self._accelerator.num_processes)
        scores = self._objective.evaluate(model, share, gather_object)
        if scores is None:
            return
        self._lines.append({"step": step, **scores})
        if self._accelerator.is_main_process:
            _write(self._output_dir / EVALUATIONS, self._lines)
            self._accelerator.log({f"eval/{name}": value for name, value in scores.items()}, step=step)
            metric = str(self._objective.best_by)
            logger.info("Step %d: %s %.4f.", step, metric, scores.get(metric, float("nan")))


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    draft = path.with_suffix(".part")
    with draft.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
